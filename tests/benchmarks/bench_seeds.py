"""Eight seeds' fits and sweeps in one vectorised pass beside one after the other, in one process.

    python tests/benchmarks/bench_seeds.py [--threads 1] [--repeats 3]

Ratios of CPU seconds, medians of pairs; peak memory of the whole process.
"""

import argparse
import resource
import statistics
import time

import torch

import msif_lab as msif
from msif_lab import experiments

SEEDS = 8
MOST = {"digits": 0.6, "mnist": 1.0}  # of the time one by one: a small MLP, a small conv net
SIZES = {"digits": {}, "mnist": {"epochs": (2, 3)}}


def measured(setting: str, link, queries: int, lanes: int):
    """CPU seconds of fits and of sweeps, and the scores of each seed."""

    def build(seed):
        return experiments.SETTINGS[setting](link, seed=seed, **SIZES[setting])

    asked = build(0).queries[:queries]
    pipelines = {seed: build(seed).pipeline for seed in range(SEEDS)}  # made and checked before
    start = time.process_time()
    runs = msif.over_seeds(pipelines.get, SEEDS, lanes=lanes, progress=False)
    fitted = time.process_time()
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence(), lanes=lanes).fit(runs)
    scores = averaged.score(asked, progress=False)
    return fitted - start, time.process_time() - fitted, scores.per_seed


def main(threads=1, repeats=3):
    torch.set_num_threads(threads)
    print(
        f"{SEEDS} seeds, {threads} thread(s), {repeats} pairs (median), CPU time at once ÷ in turn"
    )
    failed = []
    for setting, most in MOST.items():
        for link in (msif.WarmStart(), msif.Frozen()):
            for queries in (1, 20):
                ratios = []
                for _ in range(repeats):
                    fit, sweep, each = measured(setting, link, queries, 1)
                    fit_lanes, sweep_lanes, together = measured(setting, link, queries, SEEDS)
                    whole = (fit_lanes + sweep_lanes) / (fit + sweep)
                    ratios.append((fit_lanes / fit, sweep_lanes / sweep, whole))
                found = [statistics.median(column) for column in zip(*ratios, strict=True)]
                apart = float((together - each).abs().max() / each.abs().max())
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                row = f"{setting:<7} {type(link).__name__:<10} {queries:>2} queries: "
                row += "fit {:.2f}, sweep {:.2f}, both {:.2f}".format(*found)
                print(f"{row}; scores differ by {apart:.0e}; peak {memory:,.0f} MB", flush=True)
                failed += [row] * (found[2] > most)
    assert not failed, "slower than promised:\n" + "\n".join(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of which the median is taken")
    main(**vars(parser.parse_args()))
