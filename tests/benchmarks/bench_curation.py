"""Acting on scores where a fifth of the pretraining labels is wrong: what is found, what it brings.

    python tests/benchmarks/bench_curation.py [digits mnist cifar] [--links frozen "warm start"]
        [--flips 0.2] [--size live] [--seeds 8] [--fresh 5] [--out folder]

For each setting and link: AUC of every control for the wrong labels, the gain predicted beforehand
from scores averaged over seeds, and test loss and accuracy on fresh seeds after removing what each
ranking puts first (5, 10 or 20 %, chosen on validation), with the seconds of each step.
"""

import argparse
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import msif_lab as msif
from msif_lab import experiments

FRACTIONS = (0.05, 0.1, 0.2)
COMPARED = ("random", "loss", "margin", "entropy", "gradient dot", "similarity", "TRAK", "oracle")


def flipped(data: msif.Examples, share: float) -> tuple[msif.Examples, torch.Tensor]:
    """Some labels changed to another class, and whose."""
    draw = torch.Generator().manual_seed(5)
    places = torch.randperm(len(data), generator=draw)[: round(share * len(data))]
    y, classes = data.y.clone(), len(data.classes)
    y[places] = (y[places] + torch.randint(1, classes, (len(places),), generator=draw)) % classes
    return msif.Examples(data.x, y, data.ids, classes=data.classes), places


@contextmanager
def timed(what: str):
    start = time.perf_counter()
    yield
    print(f"  {what}: {time.perf_counter() - start:.1f} s", flush=True)


def study(setting: str, link: str, flips: float, size: str, seeds: int, fresh: int, out):
    made = experiments.SETTINGS[setting](experiments.LINKS[link], size=size)
    noisy, truth = flipped(made.pipeline.stages[0].data, flips)
    order = torch.randperm(len(made.test), generator=torch.Generator().manual_seed(1))
    count = min(400, len(order) // 2)
    validation, test = made.test[order[:count]], made.test[order[count:]]

    def build(seed: int) -> msif.Pipeline:
        stages = experiments.SETTINGS[setting](
            experiments.LINKS[link], size=size, seed=seed
        ).pipeline.stages
        return msif.Pipeline([replace(stages[0], data=noisy), *stages[1:]])

    print(f"{made.title}, {link}, {len(truth)} of {len(noisy)} labels wrong", flush=True)
    with timed(f"training {seeds} seeds"):
        runs = msif.over_seeds(build, seeds, lanes=8, progress=False)
    with timed("influence on the mean validation loss"):
        method = msif.AveragedInfluence(msif.UnrolledInfluence(), lanes=8).fit(runs)
        scores = method.score(validation, aggregate="mean", progress=False)
    with timed("controls"):
        rankings = {"influence": scores} | msif.controls(runs, validation, truth=truth)
    for name, ranking in rankings.items():
        found = msif.detection(ranking, truth)
        low, high = found.intervals["roc_auc"]
        print(f"  AUC for wrong labels, {name}: {found.roc_auc:.3f} [{low:.3f}, {high:.3f}]")
    losses = runs.evaluate(validation, aggregate="mean")
    print(msif.predicted_gain(scores, FRACTIONS, losses=losses).round(4).to_string(index=False))
    some = {name: rankings[name] for name in ("influence", *COMPARED)}
    with timed(f"{len(some)} rankings × {len(FRACTIONS)} fractions × {fresh} seeds"):
        report = msif.intervene(
            build,
            some,
            validation=validation,
            test=test,
            fraction=FRACTIONS,
            seeds=range(100, 100 + fresh),
            progress=False,
        )
    print(report)
    for against in ("random", "loss", "oracle"):
        row = report.summary(against=against).query("ranking == 'influence' and chosen").iloc[0]
        print(
            f"  against {against}: {row.change:+.4f} [{row.low:+.4f}, {row.high:+.4f}]", flush=True
        )
    if out is not None:
        name = f"{setting}_{link.replace(' ', '_')}_curation.csv"
        report.table.to_csv(Path(out) / name, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=["digits", "mnist", "cifar"])
    parser.add_argument("--links", nargs="+", default=["frozen", "warm start"])
    parser.add_argument("--flips", type=float, default=0.2)
    parser.add_argument("--size", default="live")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--fresh", type=int, default=5)
    parser.add_argument("--out")
    given = parser.parse_args()
    for setting in given.settings:
        for link in given.links:
            study(setting, link, given.flips, given.size, given.seeds, given.fresh, given.out)
