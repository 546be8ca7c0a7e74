"""Scores of the average run beside the real effects of fresh seeds: the tables of averages.

    python -m msif_lab.lds mnist cifar --out notebooks/results

For each setting and link: every method's scores, averaged over some seeds of training, and real
removals averaged over other seeds, which no score has seen. Removals are single examples, random
10 % and random halves; Spearman's correlation over random subsets, mean over queries, is the linear
datamodelling score (LDS) as Park et al. (2023, arXiv 2303.14186) report it.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

from .data.examples import Examples
from .evaluation.comparison import agreement
from .evaluation.removals import EffectsOverSeeds, random_removals, removal_effects
from .experiments import LINKS, SETTINGS, Experiment
from .influence.averaged import AveragedInfluence, InfluenceOverSeeds
from .influence.baselines import GradientDot, RepresentationSimilarity, SingleStage, TracIn
from .influence.ensembles import trak
from .influence.result import Influence
from .influence.unrolled import UnrolledInfluence
from .pipeline.pipeline import Pipeline
from .pipeline.seeds import SeedRuns, over_seeds
from .solvers.exact import Exact
from .storage import write_bytes
from .studies import implicit

__all__ = ["study"]

KINDS = {"one": None, "10 %": 0.1, "50 %": 0.5}
FRESH = 16
COUNTS = (1, 4, 8, 16)
ENSEMBLE = 8  # seeds that every other method has
RETRAININGS = (120, 1200)  # of a datamodel: what the scores cost, and ten times as many
RIDGES = tuple(10.0**k for k in range(-2, 5))


def datamodel(runs: SeedRuns, queries: Examples, count: int, folder=None) -> Tensor:
    """Scores ``(Q, N)`` by ridge regression on ``count`` retrainings without random halves.

    The retrainings are spread over the runs; the ridge is chosen by cross-validation.
    """
    from sklearn.linear_model import RidgeCV

    m = len(runs[0].stages[0].data)
    masks, changes = [], []
    for seed, run in zip(runs.seeds, runs, strict=True):
        groups = random_removals(m, count // len(runs), 0.5, seed=1000 + seed)
        store = None if folder is None else Path(folder) / f"seed-{seed}-halves.safetensors"
        values = removal_effects(run, queries, groups, store=store, progress=False).values
        mask = torch.ones(len(groups), m, dtype=torch.float64)
        for row, group in enumerate(groups):
            mask[row, group] = 0
        masks.append(mask - 0.5)
        changes.append((values - values.mean(1, keepdim=True)).T)
    masks, changes = torch.cat(masks).numpy(), torch.cat(changes).numpy()
    rows = [RidgeCV(RIDGES, fit_intercept=False).fit(masks, one).coef_ for one in changes.T]
    return torch.tensor(numpy.array(rows))


def scored(build, runs: SeedRuns, queries: Examples, folder, costs: dict) -> dict[str, object]:
    """Scores by method, averaged over the runs.

    Args:
        build: the experiment of a seed.
        runs: of the seeds that the scores see.
        folder: where retrainings are kept.
        costs: takes the seconds of each method.
    """
    solver = Exact("4GB")
    few = runs[:ENSEMBLE]

    def average(method, some=few, how="mean") -> InfluenceOverSeeds:
        return AveragedInfluence(method, how).fit(some).score(queries, progress=False)

    def ggn() -> InfluenceOverSeeds:
        def one(seed: int, run: Pipeline) -> Influence:
            made: Experiment = build(seed)
            return implicit(Experiment(made.title, run, queries, made.test), solver)

        each = [one(seed, run) for seed, run in zip(few.seeds, few, strict=True)]
        return _of_rows(torch.stack([e.values for e in each]), template)

    found: dict = {}
    template = average(UnrolledInfluence(), runs)
    ways = {
        "unrolled, for 10 %": lambda: average(UnrolledInfluence(group_fraction=0.1)),
        "unrolled, for 50 %": lambda: average(UnrolledInfluence(group_fraction=0.5)),
        "unrolled, for 50 %, weighted": lambda: average(
            UnrolledInfluence(group_fraction=0.5), how="weighted"
        ),
        "implicit, GGN": ggn,
        "TRAK": lambda: _of_ensemble(trak(few, queries), template),
        "gradient product": lambda: average(GradientDot()),
        "TracIn": lambda: average(TracIn()),
        "single stage": lambda: average(SingleStage(solver)),
        "similarity": lambda: average(RepresentationSimilarity()),
        "datamodel, equal cost": partial(_model, few, queries, RETRAININGS[0], folder, template),
        "datamodel, 10 × the cost": partial(_model, few, queries, RETRAININGS[1], folder, template),
    }
    for count in COUNTS:
        if count <= len(runs):
            found[f"unrolled, {count} seeds"] = template.some(range(count))
    found["unrolled, normalised"] = _of_rows(template.per_seed, template, "normalised")
    for name, way in ways.items():
        start = time.perf_counter()
        found[name] = way()
        costs[name] = time.perf_counter() - start
    return found


def _model(runs, queries, count, folder, template) -> InfluenceOverSeeds:
    return _of_ensemble(datamodel(runs, queries, count, folder), template)


def _of_ensemble(values: Tensor, like: InfluenceOverSeeds) -> InfluenceOverSeeds:
    """Scores that were made of all seeds together, and count as an average over them."""
    return _of_rows(values.expand(ENSEMBLE, -1, -1), like)


def _of_rows(
    per_seed: Tensor, like: InfluenceOverSeeds, average: str = "mean"
) -> InfluenceOverSeeds:
    """Scores on the same queries and examples as others."""
    per_seed = per_seed.to(like.values)
    seeds = like.seeds[: len(per_seed)]
    about = like.ids, like.query_ids, like.stage, like.target, "", like.aggregate
    return InfluenceOverSeeds.of(per_seed, seeds, average, *about, origin={})


def rows(name: str, scores, truth: Mapping[str, EffectsOverSeeds], own: Mapping) -> list[dict]:
    """Agreement of one method with every kind of removal."""
    table = []
    for kind, effects in truth.items():
        count = len(scores.seeds)
        report = agreement(scores, effects, retrained=own[kind].some(range(count)))
        line = {"removals": kind, "method": name, "seeds": count, "r": report.mean("r")}
        line |= {"low": report.intervals["r"][0], "high": report.intervals["r"][1]}
        line |= {"lds": report.mean("rho"), "lds_low": report.intervals["rho"][0]}
        line |= {"lds_high": report.intervals["rho"][1], "retraining": report.noise.ceiling}
        line |= {"efficiency": report.noise.efficiency, "corrected": report.noise.corrected}
        for statistic in ("efficiency", "corrected"):
            ends = report.noise.intervals[statistic]
            line |= {f"{statistic}_low": ends[0], f"{statistic}_high": ends[1]}
        table.append(line | {"reliability": report.noise.reliability})
    return table


def study(
    setting: str,
    link: str,
    *,
    size: str = "live",
    removals: int = 40,
    fresh: int = FRESH,
    folder=None,
):
    """One setting and link: a tidy table of every method's agreement with fresh seeds.

    Args:
        setting, link: names in `experiments.SETTINGS` and `experiments.LINKS`.
        size: as in the builders.
        removals: how many of each kind.
        fresh: seeds that judge, beyond the `COUNTS` that score.
        folder: where runs and retrainings are kept; the same call goes on from it.
    """
    import pandas

    def build(seed: int) -> Experiment:
        return SETTINGS[setting](LINKS[link], size=size, seed=seed)

    seen = max(COUNTS)
    runs = over_seeds(
        lambda seed: build(seed).pipeline, seen + fresh, store=_in(folder, "runs"), progress=False
    )
    queries, m = build(0).queries, len(runs[0].stages[0].data)
    truth, own = {}, {}
    for kind, fraction in KINDS.items():
        groups = random_removals(m, removals, fraction)
        where = _in(folder, f"removals-{kind.replace(' %', '')}")
        every = removal_effects(runs, queries, groups, store=where, progress=False)
        own[kind], truth[kind] = every.some(range(seen)), every.some(range(seen, len(runs)))
    costs: dict[str, float] = {}
    found = scored(build, runs[:seen], queries, folder, costs)
    table = [line for name, scores in found.items() for line in rows(name, scores, truth, own)]
    about = {"setting": setting, "link": link, "count": removals, "fresh": fresh}
    return pandas.DataFrame(table).assign(**about).assign(seconds=lambda t: t.method.map(costs))


def _in(folder, name: str):
    return None if folder is None else Path(folder) / name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one CSV file for each setting."""
    import pandas

    parser = argparse.ArgumentParser(
        prog="python -m msif_lab.lds", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("settings", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--links", nargs="+", choices=list(LINKS), default=["warm start", "frozen"])
    parser.add_argument("--removals", type=int, default=40, help="of each kind")
    parser.add_argument("--fresh", type=int, default=FRESH, help="seeds that judge")
    parser.add_argument("--size", default="live", help="live or large")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for SETTING_average.csv; runs and retrainings resume from here",
    )
    given = parser.parse_args(arguments)
    for setting in given.settings:
        tables = []
        for link in given.links:
            folder = given.out / "retrainings" / f"{setting}-{given.size}-{link.replace(' ', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
            asked = {"size": given.size, "removals": given.removals, "fresh": given.fresh}
            asked |= {"folder": folder}
            tables.append(study(setting, link, **asked))
            path = given.out / f"{setting}_average.csv"
            text = pandas.concat(tables).to_csv(index=False, float_format="%.4g")
            write_bytes(path, text.encode())
            print(f"{path}: {link} done", flush=True)


if __name__ == "__main__":
    main()
