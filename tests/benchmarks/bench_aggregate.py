"""Price of one row for a function of many queries, in prices of one query.

    python tests/benchmarks/bench_aggregate.py [--queries 200] [--repeats 5]

CPU seconds of this process. One query and the mean of all queries are scored in turn, so that other
work on the machine slows both alike; the figure is the median of the turns' ratios. For scale: what
a row for each query would cost. The mean must cost at most `MOST` queries. Data: the bundled
digits, 0-3 then 4-9.
"""

import argparse
import statistics
import time

import torch

import msif_lab as msif

MOST = 1.2  # times one query


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def noisy(data, copies):
    """The data so many times over, each time with other noise in the inputs."""
    x = data.x.repeat(copies, *[1] * (data.x.ndim - 1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return msif.Examples(x + 0.1 * noise, data.y.repeat(copies), classes=data.classes)


def build(recipe, k=2, copies=1):
    train, test = msif.load_digits(dtype=torch.float64)
    stages = []
    for name, classes, n in (("pretrain", range(4), 400), ("finetune", range(4, 10), 400))[-k:]:
        stages.append(
            msif.Stage(
                name,
                msif.mlp(64, hidden=(16,), classes=len(classes)).double(),
                noisy(train.select(classes=classes, n=n), copies),
                weight_decay=1e-2,
                link=msif.Proximal(0.05) if stages else None,
                recipe=recipe,
            )
        )
    pipeline = msif.Pipeline(stages).fit(progress=False)
    return pipeline, test.select(classes=range(4, 10))


def cases():
    """Fitted methods by name, with the queries."""
    optimum, queries = build(msif.LBFGS())
    run, _ = build(msif.SGD(0.1, epochs=10, batch_size=50))
    single, _ = build(msif.LBFGS(), k=1)
    solver = msif.ConjugateGradient(tol=1e-8)
    yield "implicit, Exact", msif.ImplicitInfluence().fit(optimum), queries
    yield "implicit, ConjugateGradient", msif.ImplicitInfluence(solver).fit(optimum), queries
    yield "implicit, one stage", msif.ImplicitInfluence(solver).fit(single), queries
    yield "unrolled", msif.UnrolledInfluence().fit(run, progress=False), queries
    yield "single stage, GGN", msif.SingleStage(solver).fit(optimum), queries
    # These take one pass over the examples, or a few, so 200 queries count beside 400 of them.
    many, _ = build(msif.SGD(0.1, epochs=1, batch_size=50), copies=20)
    yield "gradient dot, 20 times the data", msif.GradientDot().fit(many), queries
    yield "TracIn, 20 times the data", msif.TracIn().fit(many), queries


def quiet(method):
    return {"progress": False} if isinstance(method, msif.UnrolledInfluence) else {}


def log_sum_exp(values):
    return values.logsumexp(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    failed = []
    for name, method, queries in cases():
        queries = queries[: asked.queries]
        ways = {
            "one": lambda m=method, q=queries: m.score(q[:1], **quiet(m)),
            "mean": lambda m=method, q=queries: m.score(q, aggregate="mean", **quiet(m)),
            "function": lambda m=method, q=queries: m.score(q, aggregate=log_sum_exp, **quiet(m)),
        }
        turns = [{way: seconds(work) for way, work in ways.items()} for _ in range(asked.repeats)]
        each = seconds(lambda m=method, q=queries: m.score(q, **quiet(m)))
        one = statistics.median(turn["one"] for turn in turns)
        mean, function = (
            statistics.median(turn[way] / turn["one"] for turn in turns)
            for way in ("mean", "function")
        )
        print(
            f"{name:<32} one query {one:7.3f} s; of {len(queries)} queries: mean {mean:5.2f} "
            f"(allowed {MOST}), function {function:5.2f}, a row each "
            f"{each / one:6.1f} times that",
            flush=True,
        )
        if mean > MOST:
            failed.append(name)
    print("all within bounds" if not failed else f"beyond bounds: {', '.join(failed)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
