"""Costs of curvature products and scoring, in plain forward and backward epochs.

    python tests/benchmarks/bench_scoring.py [--quick] [--threads 1]

CPU seconds of this process, not wall-clock time, so that other work on the machine counts less; the
epoch is measured before and after each figure. Data: MNIST, a tanh conv net; memory is the growth
of the process's peak.
"""

import argparse
import functools
import resource
import time

import numpy
import torch

import msif_lab as msif
from msif_lab.curvature.derivatives import cheapest_products

MOST = {"GGN": 1.2, "Hessian": 1.6}  # epochs a column, 20 columns
FORWARDS, EPOCHS, SLOPE = 3.0, 3.0, 1.1  # one query; 20 queries; log-log in N and Q


def seconds(work, repeats=3):
    """The least CPU time of a few calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def build(pool, n, width=64):
    train, test = msif.load_mnist(pool=pool) if pool > 1 else msif.load_mnist()
    side = 28 // pool
    model = msif.convnet((1, side, side), channels=(16, 32), width=width, classes=10)
    pipeline = msif.Pipeline(
        [msif.Stage("mnist", model, train.select(n=n, seed=0), weight_decay=1e-3)]
    ).adopt()
    return pipeline, test


def plain(pipeline, backward, step=250):
    """One pass over the data as a training loop would do it."""
    stage = pipeline.stages[0]
    with torch.set_grad_enabled(backward):
        for x, y in zip(stage.data.x.split(step), stage.data.y.split(step), strict=True):
            loss = torch.nn.functional.cross_entropy(stage.model(x), y)
            if backward:
                torch.autograd.grad(loss, list(stage.model.parameters()))


def ratio(work, unit, repeats=2):
    before = seconds(unit)
    spent = seconds(work, repeats)
    return spent / min(before, seconds(unit))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    n, failed = 500 if asked.quick else 2000, []

    def row(what, value, most, unit):
        print(f"{what:<58}{value:>8.2f} {unit:<9} allowed {most}", flush=True)
        if value > most:
            failed.append(what)

    for pool in (2,) if asked.quick else (2, 1):
        pipeline, _ = build(pool, n)
        o, full = pipeline.objective(0), pipeline.trained()[0]
        what = f"{28 // pool} × {28 // pool}, {o.size:,} parameters, {n:,} examples"
        epoch = functools.partial(plain, pipeline, True)
        forward = functools.partial(plain, pipeline, False)
        generator = torch.Generator().manual_seed(0)
        for name, kind in (("GGN", "ggn"), ("Hessian", "hessian")):
            operator = pipeline.curvature(0, kind)
            for columns in (1, 20):
                v = torch.randn(o.size, columns, generator=generator)
                each = ratio(lambda operator=operator, v=v: operator @ v, epoch) / columns
                row(
                    f"{what}: {name}, {columns} columns",
                    each,
                    MOST[name] if columns > 1 else 4.0,
                    "epochs",
                )
        for queries, unit, most in ((1, forward, FORWARDS), (20, epoch, EPOCHS)):
            v = torch.randn(o.size, queries, generator=generator)
            spent = ratio(functools.partial(msif.example_products, o, full, v), unit)
            name = f"{what}: score {queries}, {cheapest_products(o, queries)}"
            row(name, spent, most, "forwards" if unit is forward else "epochs")

    pipeline, _ = build(2, 8000 if not asked.quick else 2000)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    data, sizes, times, peaks = pipeline.stages[0].data, [], [], []
    v = torch.randn(o.size, 20, generator=torch.Generator().manual_seed(0))
    msif.example_products(o, full, v, data[:250])
    for count in (len(data) // 8, len(data) // 4, len(data) // 2, len(data)):
        part, before = data[:count], peak()
        times.append(seconds(lambda part=part: msif.example_products(o, full, v, part), 2))
        sizes.append(count)
        peaks.append(peak() - before)
    row(
        f"log-log slope over N = {sizes}",
        float(numpy.polyfit(numpy.log(sizes), numpy.log(times), 1)[0]),
        SLOPE,
        "",
    )
    row("growth of the peak from first to last N", sum(peaks[1:]), 60, "MB")
    queries, times = [5, 10, 20, 40, 80], []
    for count in queries:
        v = torch.randn(o.size, count, generator=torch.Generator().manual_seed(0))
        times.append(seconds(lambda v=v: msif.example_products(o, full, v, data[:1000]), 2))
    row(
        f"log-log slope over Q = {queries}",
        float(numpy.polyfit(numpy.log(queries), numpy.log(times), 1)[0]),
        SLOPE,
        "",
    )
    print(f"peak memory of the process {peak():,.0f} MB")
    print("all within bounds" if not failed else "beyond bounds:\n  " + "\n  ".join(failed))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
