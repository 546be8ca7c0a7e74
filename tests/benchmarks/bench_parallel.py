"""A study of 96 retrainings on one process and on two: seconds, their ratio, equal numbers.

Run it on an idle machine: ``python tests/benchmarks/bench_parallel.py [--repeats 3]``. Each process
computes on one thread, as `removal_effects` leaves it to joblib.
"""

import argparse
import statistics
import time

import joblib
import torch

import msif_lab as msif
from msif_lab import experiments

REMOVALS, LEAST_RATIO = 96, 1.6


def main(repeats=3):
    torch.set_num_threads(1)
    experiment = experiments.mnist(msif.WarmStart(), size="live")
    pipeline = experiment.pipeline.fit(progress=False)
    groups = msif.random_removals(len(pipeline.stages[0].data), REMOVALS)

    def study(n_jobs):
        start = time.perf_counter()
        effects = msif.removal_effects(
            pipeline, experiment.queries, groups, n_jobs=n_jobs, lanes=8, progress=False
        )
        return effects.values, time.perf_counter() - start

    joblib.Parallel(2)(joblib.delayed(abs)(i) for i in range(2))  # starts both processes
    study(2)  # in which torch and msif_lab are imported
    ratios = []
    for _ in range(repeats):
        one, alone = study(1)
        two, together = study(2)
        ratios.append(alone / together)
        apart = float((one - two).abs().max())
        seconds = f"1 process {alone:.1f} s, 2 processes {together:.1f} s"
        print(f"{seconds}: {ratios[-1]:.2f}×, numbers differ by {apart:.1e}", flush=True)
    ratio = statistics.median(ratios)
    assert ratio >= LEAST_RATIO, f"median ratio {ratio:.2f} is below {LEAST_RATIO}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="pairs of which the median is taken")
    main(**vars(parser.parse_args()))
