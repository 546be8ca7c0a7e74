"""Do error bars over seeds keep their promise? Against the mean over 200 seeds.

    python tests/benchmarks/bench_coverage.py [--seeds 200] [--threads 1]

Digits 0-3 → 4-9, 120 → 60 images, warm start. The mean over all seeds stands for the truth. Of
disjoint groups of 4, 8 and 16 seeds: how often the 95 % interval of the mean score holds it
(allowing for its own noise), and how many of the signs that are called sure are wrong.
"""

import argparse
import math

import torch

import msif_lab as msif
from msif_lab import experiments

SETTING = {
    "pretraining": 120,
    "finetuning": 60,
    "queries": 10,
    "epochs": (6, 8),
    "batch_size": (20, 20),
}
COUNTS = (4, 8, 16)


def build(seed: int) -> experiments.Experiment:
    return experiments.digits(msif.WarmStart(), seed=seed, **SETTING)


def main(seeds=200, threads=1):
    torch.set_num_threads(threads)
    runs = msif.over_seeds(lambda seed: build(seed).pipeline, seeds, lanes=25, progress=False)
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence(), lanes=25).fit(runs)
    scores = averaged.score(build(0).queries, progress=False)
    print(f"{scores!r}")
    failed = []
    for average in ("mean", "normalised", "median"):
        for count in COUNTS:
            inside, sure, wrong = [], 0, 0
            for start in range(0, seeds - count + 1, count):
                chosen = slice(start, start + count)
                some = part(scores, chosen, average)
                rest = torch.cat([scores.per_seed[:start], scores.per_seed[start + count :]])
                truth = part(scores, slice(None), average, rest)
                # The truth is a mean of other seeds, so its noise adds to that of the interval.
                wider = math.sqrt(1 + count / len(rest))
                low, high = some.interval(0.95)
                middle, half = some.values, wider * (high - low) / 2
                inside.append(float(((truth - middle).abs() <= half).double().mean()))
                signs = some.trusted(0.95)
                sure += int(signs.sum())
                wrong += int((some.values.sign() != truth.sign())[signs].sum())
            coverage = sum(inside) / len(inside)
            rate = wrong / max(1, sure)
            pairs = scores.values.numel() * len(inside)
            row = f"{average:<10} {count:>2} seeds: {coverage:.1%} of intervals hold the truth; "
            row += f"{sure / pairs:.1%} of signs sure, {rate:.2%} of them wrong"
            print(row, flush=True)
            if average == "mean" and not (0.93 <= coverage <= 0.97 and rate <= 0.05):
                failed.append(row)
    assert not failed, "\n".join(failed)


def part(scores, chosen: slice, average: str, per_seed=None):
    """Some seeds' scores, or the plain average of ``per_seed``."""
    from msif_lab.influence.averaged import averages

    if per_seed is not None:
        return averages(per_seed, average)[0]
    about = scores.ids, scores.query_ids, scores.stage, scores.target, "", ""
    return msif.InfluenceOverSeeds.of(
        scores.per_seed[chosen], scores.seeds[chosen], average, *about, origin={}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    main(**vars(parser.parse_args()))
