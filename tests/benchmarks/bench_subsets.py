"""The most influential 5 % of the pretraining examples: new scores each round against plain sums.

    python tests/benchmarks/bench_subsets.py [digits mnist cifar] [--seeds 0 1 2] [--singles 10]
        [--rounds 4] [--fraction 0.05] [--variants] [--out rows.jsonl]

For the mean of 20 queries and for single ones, warm start and frozen, both directions: the change
of q when the plain list, or the subset of `msif.most_influential`, is removed and both stages rerun
with the same seed, and the same under another seed. Ratios are of mean effects over seeds (and
queries). `--variants` compares ways to choose on the mean query instead: 2, 4 and 8 rounds, the
mean of the scores with everybody in and with the list out ("second order"), and exchange: after 8
rounds, from the plain list, or from a random group, members are swapped as long as a rerun says
that it helps. No such swap improves the sets that these end at; where they agree, they tell how
much the plain list leaves to be found.
"""

import argparse
import collections
import json

import torch

import msif_lab as msif
from msif_lab import experiments
from msif_lab.influence.subsets import RunUnderWeights
from msif_lab.objective.checks import ask

LINKS = {"warm start": msif.WarmStart(), "frozen": msif.Frozen()}


def build(setting: str, link: str, seed: int):
    experiment = experiments.SETTINGS[setting](LINKS[link], seed=seed)
    experiment.pipeline.fit(progress=False)
    return experiment


def change(pipeline, queries, groups) -> list[float]:
    """Of the mean query, by real removal."""
    effects = msif.removal_effects(pipeline, queries, groups, aggregate="mean", progress=False)
    return effects.values[0].tolist()


def rows_of(setting, link, seed, singles, rounds, fraction):
    """One row for each question and direction."""
    experiment, fresh = build(setting, link, seed), build(setting, link, seed + 50)
    pipeline, queries = experiment.pipeline, experiment.queries
    k = round(fraction * len(pipeline.stages[0].data))
    questions = {"mean": queries} | {f"query {i}": queries[i : i + 1] for i in range(singles)}
    for name, asked in questions.items():
        for raises in (True, False):
            way = {"raises": raises, "rounds": rounds, "progress": False}
            s = msif.most_influential(pipeline, asked, k, **way)
            plain, chosen = change(fresh.pipeline, asked, [s.plain, s.positions])
            yield {
                "setting": setting,
                "link": link,
                "seed": seed,
                "question": name,
                "raises": raises,
                "predicted": s.predicted,
                "plain": s.plain_effect,
                "greedy": s.rounds[-1].effect,
                "chosen": s.effect,
                "base": float(pipeline.evaluate(asked, aggregate="mean")[0]),
                "fresh plain": plain,
                "fresh chosen": chosen,
                "shared": len(set(s.plain) & set(s.positions)) / k,
            }


# ---- Ways to choose, on the mean query ----


class Search:
    """Scores and real effects for one question and direction."""

    def __init__(self, pipeline, queries, raises: bool):
        self.pipeline, self.queries, self.sign = pipeline, queries, 1 if raises else -1
        self.question = ask(pipeline.objective(-1), queries, "loss", "mean", derivative=True)
        self.attributor = RunUnderWeights().fit(pipeline, progress=False)

    def gains(self, group):
        """What every example promises when it goes too, if this group has gone."""
        o = self.pipeline.objective(0)
        weights = torch.ones(len(o.data), dtype=o.dtype)
        weights[group] = 0
        return -self.sign * self.attributor.at(self.question, 0, weights)[0][0]

    def effects(self, groups):
        return [self.sign * v for v in change(self.pipeline, self.queries, groups)]

    def greedy(self, k: int, rounds: int):
        way = {"raises": self.sign > 0, "rounds": rounds, "progress": False}
        records = msif.most_influential(self.pipeline, self.queries, k, **way).rounds
        return [i for record in records for i in record.added]

    def exchanged(self, group, times: int = 6):
        """Swap the worst members for the best others, as many as a rerun says, while it helps."""
        (value,) = self.effects([group])
        for _ in range(times):
            gains, k = self.gains(group), len(group)
            inside = torch.zeros(len(gains), dtype=torch.bool)
            inside[group] = True
            enter = gains.masked_fill(inside, -torch.inf).topk(k)
            leave = gains.masked_fill(~inside, torch.inf).topk(k, largest=False)
            helpful = int((enter.values > leave.values).sum())
            if not helpful:
                break
            tried = []
            for n in sorted({max(1, helpful >> j) for j in range(6)}):
                kept = inside.clone()
                kept[leave.indices[:n]], kept[enter.indices[:n]] = False, True
                tried.append(kept.nonzero().flatten().tolist())
            found = self.effects(tried)
            best = max(range(len(found)), key=found.__getitem__)
            if found[best] <= value:
                break
            group, value = tried[best], found[best]
        return group


def variants_of(setting, link, seed, fraction):
    experiment = build(setting, link, seed)
    for raises in (True, False):
        search = Search(experiment.pipeline, experiment.queries, raises)
        at_one = search.gains([])
        k = round(fraction * len(at_one))
        plain = at_one.topk(k).indices.tolist()
        groups = {"plain": plain}
        groups |= {f"{rounds} rounds": search.greedy(k, rounds) for rounds in (2, 4, 8)}
        groups["second order"] = (at_one + search.gains(plain)).topk(k).indices.tolist()
        groups["8 rounds, exchange"] = search.exchanged(groups["8 rounds"])
        groups["plain, exchange"] = search.exchanged(plain)
        drawn = torch.randperm(len(at_one), generator=torch.Generator().manual_seed(seed))[:k]
        groups["random, exchange"] = search.exchanged(drawn.tolist(), times=12)
        effects = dict(zip(groups, search.effects(list(groups.values())), strict=True))
        yield {"setting": setting, "link": link, "seed": seed, "raises": raises, **effects}


# ---- Tables ----


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def summary(rows) -> None:
    groups = collections.defaultdict(list)
    for row in rows:
        kind = "mean query" if row["question"] == "mean" else "single query"
        groups[row["setting"], row["link"], kind, row["raises"]].append(row)
    print(
        "setting, link, question, removal | cases | q | predicted | plain | chosen | ratio "
        "(lowest, highest seed) | another seed: plain, chosen | shared members"
    )
    for (setting, link, kind, raises), group in groups.items():
        ratios = []
        for seed in sorted({row["seed"] for row in group}):
            of_seed = [row for row in group if row["seed"] == seed]
            ratios.append(mean(of_seed, "chosen") / mean(of_seed, "plain"))
        get = {key: mean(group, key) for key in group[0] if isinstance(group[0][key], float)}
        print(
            f"{setting}, {link}, {kind}, {'raises' if raises else 'lowers'} | {len(group)} | "
            f"{get['base']:.3f} | {get['predicted']:+.4f} | {get['plain']:+.4f} | "
            f"{get['chosen']:+.4f} | {get['chosen'] / get['plain']:.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f}) | {get['fresh plain']:+.4f}, "
            f"{get['fresh chosen']:+.4f} | {get['shared']:.0%}"
        )


def summary_of_variants(rows) -> None:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["setting"], row["link"], row["raises"]].append(row)
    for (setting, link, raises), group in groups.items():
        ways = [key for key, value in group[0].items() if isinstance(value, float)]
        plain = mean(group, "plain")
        ratios = ", ".join(f"{way} {mean(group, way) / plain:.2f}" for way in ways[1:])
        way = "raises" if raises else "lowers"
        print(f"{setting}, {link}, {way} | {len(group)} seeds | plain {plain:.4f} | {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=["digits", "mnist", "cifar"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--singles", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--out", help="add each row to this file too")
    asked = parser.parse_args()
    rows = []
    for setting in asked.settings:
        for link in LINKS:
            for seed in asked.seeds:
                one = (setting, link, seed)
                found = (
                    variants_of(*one, asked.fraction)
                    if asked.variants
                    else rows_of(*one, asked.singles, asked.rounds, asked.fraction)
                )
                for row in found:
                    rows.append(row)
                    if asked.out:
                        with open(asked.out, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
    (summary_of_variants if asked.variants else summary)(rows)


if __name__ == "__main__":
    main()
