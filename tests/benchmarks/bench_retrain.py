"""Retraining 24 weightings of the digits MLP one by one and all at once: seconds and differences.

Run it on an idle machine: ``python tests/benchmarks/bench_retrain.py [--threads 1] [--repeats 3]``.
"""

import argparse
import statistics
import time

import torch

import msif_lab as msif

LANES, LEAST_RATIO, LARGEST_DIFFERENCE = 24, 5.0, 1e-5
SGD = msif.SGD(lr=0.2, momentum=0.9, epochs=10, batch_size=50, schedule="linear")
KINDS = {
    "L-BFGS, warm start": (msif.LBFGS(), True),
    "L-BFGS, same seed": (msif.LBFGS(), False),
    "SGD, same seed": (SGD, False),
}
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.05)}


def digits_pipeline(link, recipe):
    """Pretrain on 400 of the digits 0-3, finetune on 200 of 4-9; 16 hidden units, float64."""
    train, _ = msif.load_digits(dtype=torch.float64)
    stages = []
    for name, classes, n in (
        ("pretrain", (0, 1, 2, 3), 400),
        ("finetune", (4, 5, 6, 7, 8, 9), 200),
    ):
        model = msif.mlp(64, hidden=(16,), classes=len(classes)).double()
        data = train.select(classes=classes, n=n)
        stages.append(
            msif.Stage(
                name, model, data, weight_decay=1e-2, link=link if stages else None, recipe=recipe
            )
        )
    return msif.Pipeline(stages).fit(progress=False)


def timed(work, repeats):
    """(result, median seconds)."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def measure(link, recipe, warm, repeats):
    """(seconds one by one, seconds at once, largest difference of any parameter)."""
    pipeline = digits_pipeline(link, recipe)
    weights = torch.ones(LANES, 400, dtype=torch.float64)
    # each leaves another example out
    weights[range(LANES), range(0, 400, 400 // LANES)[:LANES]] = 0

    def one_by_one():
        return [pipeline.retrain(w, warm_start=warm, progress=False).parameters for w in weights]

    def at_once():
        return pipeline.retrain(weights, warm_start=warm, progress=False).parameters

    at_once()  # warm up
    together, fast = timed(at_once, repeats)
    alone, slow = timed(one_by_one, repeats)
    difference = max(
        float((together[k][lane] - alone[lane][k][0]).abs().max())
        for lane in range(LANES)
        for k in range(2)
    )
    return slow, fast, difference


def main(threads=None, repeats=3):
    if threads:
        torch.set_num_threads(threads)
    print(
        f"{LANES} weightings, medians of {repeats}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}"
    )
    print(
        f"{'recipe':<20} {'link':<9} {'one by one':>11} {'at once':>9} {'ratio':>7}  largest "
        "difference"
    )
    failed = []
    for kind, (recipe, warm) in KINDS.items():
        for name, link in LINKS.items():
            slow, fast, difference = measure(link, recipe, warm, repeats)
            row = f"{kind:<20} {name:<9} {slow:>9.2f} s {fast:>7.2f} s "
            row += f"{slow / fast:>6.1f}×  {difference:.1e}"
            print(row, flush=True)
            if slow / fast < LEAST_RATIO or difference > LARGEST_DIFFERENCE:
                failed.append(row)
    assert not failed, (
        f"ratio below {LEAST_RATIO:g} or difference above {LARGEST_DIFFERENCE:g}:\n"
        + "\n".join(failed)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default its own choice")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    main(**vars(parser.parse_args()))
