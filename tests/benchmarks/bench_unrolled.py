"""Unrolled influence on digits: its cost in training runs and its agreement with real retraining.

    python tests/benchmarks/bench_unrolled.py cost [--threads 1] [--repeats 3]
    python tests/benchmarks/bench_unrolled.py agreement [--seeds 3] [--epochs 10]

Costs are ratios to one training of the same pipeline in the same process, so they hold on slow
machines; run on an idle one. The agreement tables remove single examples and random groups and
retrain both stages, same seed.
"""

import argparse
import statistics
import time
import warnings

import numpy
import torch

import msif_lab as msif

NETS = {
    "mlp": lambda classes, **kw: msif.mlp(64, hidden=(16,), classes=classes, **kw),
    "conv": lambda classes, **kw: msif.convnet((1, 8, 8), classes=classes, **kw),
}
LINKS = {"frozen": msif.Frozen(), "warm start": msif.WarmStart()}
MOST = {("mlp", 20): 8.0, ("conv", 20): 20.0, ("mlp", 1): 4.0, ("conv", 1): 4.0}  # training runs
REACHED = {"one": 0.97, "2 %": 0.93, "10 %": 0.80}  # mean per-query Pearson over seeds


def build(net, link, seed=0, epochs=10, dtype=torch.float64, lr=0.1, weight_decay=1e-3):
    """Pretrain on 400 of the digits 0-3, finetune on 200 of 4-9 from a head at zero."""
    train, test = msif.load_digits(dtype=dtype)
    stages = []
    for k, (name, classes, n) in enumerate(
        (("pretrain", range(4), 400), ("finetune", range(4, 10), 200))
    ):
        recipe = msif.SGD(
            lr, epochs=epochs, batch_size=50, schedule="linear", warmup=20, seed=2 * seed + k
        )
        model = NETS[net](len(classes), seed=seed, zero_head=k == 1).to(dtype)
        data = train.select(classes=classes, n=n, seed=seed)
        stages.append(
            msif.Stage(
                name,
                model,
                data,
                weight_decay=weight_decay,
                recipe=recipe,
                link=link if k else None,
            )
        )
    return msif.Pipeline(stages).fit(progress=False), test.select(
        classes=range(4, 10), n=20, seed=seed
    )


# ---- Cost ----


def timed(work, repeats):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ratio(pipeline, queries, repeats):
    """(training seconds, fit and score in training runs), measured in turns."""
    pairs = []
    for _ in range(repeats + 1):
        training = timed(lambda: pipeline.fit(progress=False), 1)
        scoring = timed(
            lambda: msif.UnrolledInfluence().fit(pipeline, False).score(queries, progress=False), 1
        )
        pairs.append((training, scoring / training))
    return statistics.median(t for t, _ in pairs[1:]), statistics.median(r for _, r in pairs[1:])


def cost(repeats):
    print(
        f"fit and score in training runs; medians of {repeats}, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{'net':<6} {'dtype':<8} {'link':<11} {'queries':>7} {'training':>10} {'unrolled':>9} "
        f"{'allowed':>8}"
    )
    failed = []
    for net in NETS:
        for dtype in (torch.float32, torch.float64):
            for name, link in LINKS.items():
                pipeline, queries = build(net, link, dtype=dtype)
                for count in (1, 20):
                    seconds, runs = ratio(pipeline, queries[:count], repeats)
                    row = f"{net:<6} {str(dtype)[6:]:<8} {name:<11} {count:>7} "
                    row += f"{seconds:>8.2f} s {runs:>8.1f}×"
                    print(f"{row} {MOST[net, count]:>7.0f}×", flush=True)
                    failed += [row] if runs > MOST[net, count] else []
    pipeline, queries = build("mlp", LINKS["warm start"])
    steps, seconds = [], []
    for epochs in (5, 10, 20):
        for stage in pipeline.stages:
            stage.recipe = msif.SGD(0.1, epochs=epochs, batch_size=50)
        pipeline.fit(progress=False)
        steps.append(12 * epochs)
        seconds.append(
            timed(
                lambda: (
                    msif.UnrolledInfluence().fit(pipeline, False).score(queries, progress=False)
                ),
                repeats + 1,
            )
        )
    slope = float(numpy.polyfit(numpy.log(steps), numpy.log(seconds), 1)[0])
    print(f"seconds over steps {steps}: log-log slope {slope:.2f} (allowed 1.1)")
    assert not failed, "more costly than allowed:\n" + "\n".join(failed)
    assert slope <= 1.1


# ---- Agreement ----


def implicit(pipeline, link):
    """The implicit method on the same weights, and its name.

    A warm start is read as the proximal link that resembles it.
    """
    if isinstance(link, msif.WarmStart):
        first, last = pipeline.stages
        alpha = last.recipe.equivalent_alpha(len(last.data))
        stages = [
            msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay) for s in (first, last)
        ]
        stages[1].link = msif.Proximal(alpha)
        pipeline = msif.Pipeline(stages).adopt()
    with warnings.catch_warnings():
        # these runs are meant not to end at an optimum
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        try:
            return "implicit, Hessian", msif.ImplicitInfluence().fit(pipeline)
        except msif.IndefiniteCurvatureError:
            return "implicit, GGN", msif.ImplicitInfluence(curvature="ggn").fit(pipeline)


def agreement(seeds, epochs, nets):
    print(
        f"mean per-query Pearson r (slope) over 20 queries and 40 removals, {seeds} seeds, "
        f"{epochs} epochs, float64"
    )
    failed = []
    for net in nets:
        for name, link in LINKS.items():
            found = {}
            for seed in range(seeds):
                pipeline, queries = build(net, link, seed, epochs)
                m, generator = len(pipeline.stages[0].data), torch.Generator().manual_seed(seed)
                removed = {"one": [[int(i)] for i in torch.randperm(m, generator=generator)[:40]]}
                for part, size in (("2 %", m // 50), ("10 %", m // 10)):
                    removed[part] = [
                        torch.randperm(m, generator=generator)[:size].tolist() for _ in range(40)
                    ]
                label, classic = implicit(pipeline, link)
                methods = {
                    "unrolled": msif.UnrolledInfluence().fit(pipeline, False),
                    label: classic,
                }
                group = msif.UnrolledInfluence(group_fraction=0.1).fit(pipeline, False)
                scores = {method: a.score(queries) for method, a in methods.items()}
                for part, subsets in removed.items():
                    effects = msif.removal_effects(
                        pipeline, queries, subsets, lanes=40, progress=False
                    )
                    for method, values in scores.items():
                        report = msif.agreement(values, effects)
                        found.setdefault((method, part), []).append(
                            (report.mean("r"), report.mean("slope"))
                        )
                report = msif.agreement(group.score(queries, progress=False), effects)
                found.setdefault(("unrolled, group_fraction=0.1", part), []).append(
                    (report.mean("r"), report.mean("slope"))
                )
            for (method, part), pairs in found.items():
                r, slope = numpy.array(pairs).T
                each = " ".join(f"{x:.3f}" for x in r)
                print(
                    f"{net:<5} {name:<11} {part:<5} {method:<29} r {r.mean():.3f} ({each})  slope "
                    f"{slope.mean():.2f}"
                )
                if method == "unrolled" and (
                    r.mean() < REACHED[part] or (part == "one" and not 0.8 < slope.mean() < 1.25)
                ):
                    failed.append(
                        f"{net} {name} {part}: r {r.mean():.3f}, slope {slope.mean():.2f}"
                    )
            print(flush=True)
    assert not failed, "\n".join(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cost", "agreement"))
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default its own choice")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cost(args.repeats) if args.what == "cost" else agreement(args.seeds, args.epochs, args.nets)
