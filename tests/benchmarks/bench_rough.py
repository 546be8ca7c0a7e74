"""How to average in rough runs, beside retraining itself.

    python tests/benchmarks/bench_rough.py [--scored 16] [--fresh 16] [--threads 1]

Digits 0-3 → 4-9 at learning rates where a single run's derivative says little. Averages of unrolled
scores over some seeds, and of real removals over the same seeds, against real removals averaged
over other seeds: Pearson's r, mean over 20 queries, for 40 single examples and 40 random halves
(`group_fraction=0.5`). Efficiency: the scores' r over that of retraining.
"""

import argparse
import warnings

import torch
from torch import nn

import msif_lab as msif
from msif_lab.influence.averaged import AVERAGES, averages


def net(kind: str, activation, classes: int, seed: int):
    if kind == "conv":
        shape = (1, 8, 8)
        return msif.convnet(shape, (4, 8), 16, classes=classes, activation=activation, seed=seed)
    return msif.mlp(64, hidden=(16,), classes=classes, activation=activation, seed=seed)


SETTINGS = {
    "mlp, warm, tanh, constant 0.2": ("mlp", msif.WarmStart(), nn.Tanh, 0.2, "constant"),
    "mlp, warm, relu, linear 0.3": ("mlp", msif.WarmStart(), nn.ReLU, 0.3, "linear"),
    "mlp, frozen, relu, constant 0.3": ("mlp", msif.Frozen(), nn.ReLU, 0.3, "constant"),
    "conv, warm, tanh, constant 0.2": ("conv", msif.WarmStart(), nn.Tanh, 0.2, "constant"),
}


def builder(kind, link, activation, lr, schedule):
    train, _ = msif.load_digits(dtype=torch.float64)
    data = train.select(range(4), n=300, seed=0), train.select(range(4, 10), n=150, seed=0)

    def build(seed: int) -> msif.Pipeline:
        stages = []
        for k, examples in enumerate(data):
            recipe = msif.SGD(lr, epochs=8, batch_size=50, schedule=schedule, seed=2 * seed + k)
            model = net(kind, activation, len(examples.classes), seed=2 * seed + k).double()
            stage = msif.Stage(
                ("pretrain", "finetune")[k],
                model,
                examples,
                weight_decay=1e-3,
                link=link if k else None,
                recipe=recipe,
            )
            stages.append(stage)
        return msif.Pipeline(stages)

    return build


def mean_r(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean over queries of Pearson's r of two ``(Q, R)``."""
    pairs = zip(predicted, actual, strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


def measured(setting: str, scored: int, fresh: int) -> list[tuple[float, dict[str, float]]]:
    """Print a setting's table; by kind retraining's r, and that of each average of scores."""
    runs = msif.over_seeds(builder(*SETTINGS[setting]), scored + fresh, lanes=8, progress=False)
    _, test = msif.load_digits(dtype=torch.float64)
    queries = test.select(range(4, 10), n=20, seed=0)
    found = []
    print(f"{setting}: {scored} seeds against {fresh} fresh ones", flush=True)
    for kind, fraction in (("one", None), ("halves", 0.5)):
        groups = msif.random_removals(300, 40, fraction)
        effects = msif.removal_effects(runs, queries, groups, progress=False)
        truth = effects.some(range(scored, scored + fresh)).values
        real = mean_r(effects.some(range(scored)).values, truth)
        method = msif.UnrolledInfluence(group_fraction=fraction or 0.0)
        averaged = msif.AveragedInfluence(method, "weighted").fit(runs[:scored])
        scores = averaged.score(queries, progress=False)
        row = {}
        for average in AVERAGES:
            values = averages(scores.per_seed, average, scores.run_trust)[0]
            predicted = torch.stack([-values[:, group].sum(1) for group in groups], 1)
            row[average] = mean_r(predicted, truth)
        cells = ", ".join(f"{name} {r:.2f}" for name, r in row.items())
        print(f"  {kind:<7} retraining {real:.2f}; scores: {cells}", flush=True)
        found.append((real, row))
    return found


def main(scored=16, fresh=16, threads=1):
    torch.set_num_threads(threads)
    table = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.UnsmoothTrainingWarning)
        for setting in SETTINGS:
            table.append(measured(setting, scored, fresh))
    for place, (kind, least) in enumerate((("one", 0.3), ("halves", 0.6))):
        kept = [row[place] for row in table if row[place][0] >= least]
        for average in AVERAGES if kept else ():
            mean = sum(found[average] / real for real, found in kept) / len(kept)
            print(f"{kind}: mean efficiency of {average} {mean:.2f} over {len(kept)} settings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scored", type=int, default=16, help="seeds whose scores are averaged")
    parser.add_argument("--fresh", type=int, default=16, help="other seeds")
    parser.add_argument("--threads", type=int, default=1)
    main(**vars(parser.parse_args()))
