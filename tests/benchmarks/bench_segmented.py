"""Segmented influence: its cost beside training and unrolling, its settings, and a large net.

    python tests/benchmarks/bench_segmented.py cost [--threads 1]
    python tests/benchmarks/bench_segmented.py settings [--seeds 3]
    python tests/benchmarks/bench_segmented.py losses [--seeds 3]
    python tests/benchmarks/bench_segmented.py own [--seeds 3]
    python tests/benchmarks/bench_segmented.py warning [--seeds 2]
    python tests/benchmarks/bench_segmented.py large [--data DIR] [--device cpu]

`cost`: CPU seconds of fit and score in trainings of T steps by a plain PyTorch loop, for runs of T,
4T and 16T steps, 1 and 20 queries, with what each adds to the process's peak memory (Linux); each
figure in a process of its own. T is 48 epochs a stage, so that a stretch has more steps than a
Krylov space dimensions: shorter runs take less. "Segmented" knows the batches of all steps, and
takes step by step or Krylov spaces, what costs less. Of adopted checkpoints fit takes nothing; of a
pipeline's own run it is one replay, shown apart. `settings`: r with 40 real removals of single
examples and with unrolled scores, by the dimension of Krylov spaces and by the share of examples
that the curvature is taken from. `losses`: what each simplification costs. `own`: a plain loop's 12
checkpoints a stage, and r with 40 real removals by that loop, without and with what else it knows:
batches and mean weights. `warning`: what `score` and `check` say of runs from smooth to rough,
beside r with unrolled scores. `large`: 11 million parameters, from a plain loop's checkpoints,
timed. The r tables are the same on any machine; run `cost` and `large` on an idle one.
"""

import argparse
import copy
import itertools
import json
import pathlib
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import torch

import msif_lab as msif
from msif_lab.experiments import LINKS, digits

FACTORS = (1, 4, 16)
EPOCHS = 12  # of a stage; where stretches of that are longer than Krylov spaces, four times as many
LONG = 48
FLAT, CHEAPER = 1.2, 5.0


def setting(link: str, factor: int = 1, seed: int = 0):
    """Digits, a tanh MLP, in runs of so many times 12 epochs."""
    return digits(LINKS[link], seed=seed, epochs=(EPOCHS * factor,) * 2, lr=0.05)


def correlation(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean Pearson r of rows."""
    pairs = zip(ours, truth, strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in pairs]).mean())


# ---- Cost ----


def plain_training(pipeline) -> float:
    """CPU seconds of both stages' runs in a plain loop with torch.optim."""
    start = time.process_time()
    for stage in pipeline.stages:
        net = copy.deepcopy(stage.model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for batch, rate in stage.recipe.steps(len(stage.data)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            msif.cross_entropy(net(stage.data.x[batch]), stage.data.y[batch]).mean().backward()
            optimizer.step()
    return time.process_time() - start


def peak(reset: bool = False) -> float:
    """Most memory of this process since the last reset, in MB."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def one_cost(method: str, factor: int, count: int) -> dict:
    """CPU seconds of training T and so many T, of fit and score, and MB that these added."""
    warnings.simplefilter("ignore")
    short = setting("warm start", LONG // EPOCHS).pipeline
    experiment = setting("warm start", factor * LONG // EPOCHS)
    pipeline, queries = experiment.pipeline.fit(False), experiment.queries[:count]
    make = {
        "unrolled": lambda: msif.UnrolledInfluence(trust=0),
        "segmented": lambda: msif.SegmentedInfluence(trust=0),
        "checkpoints alone": lambda: msif.SegmentedInfluence(details=False, trust=0),
    }[method]
    make().fit(pipeline, False).score(queries[:1], progress=False)  # what is done once
    training = sorted(plain_training(short) for _ in range(5))[2]
    whole, before = plain_training(pipeline), peak(reset=True)
    start = time.process_time()
    fitted = make().fit(pipeline, False)
    fit = time.process_time() - start
    fitted.score(queries, progress=False)
    score = time.process_time() - start - fit
    return {"T": training, "whole": whole, "fit": fit, "score": score, "MB": peak() - before}


def cost(threads: int) -> None:
    print(f"CPU time in plain-loop trainings of T = {LONG} epochs; {threads} thread(s), float64")
    head = f"{'method':<21} {'queries':>7} {'steps':>6} {'training':>9}"
    print(f"{head} {'fit':>6} {'score':>7} {'MB':>6}")
    found = {}
    for method in ("segmented", "checkpoints alone", "unrolled"):
        for count, factor in itertools.product((1, 20), FACTORS):
            command = [sys.executable, __file__, "one", "--ask", method, str(factor), str(count)]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            facts = json.loads(done.stdout.splitlines()[-1])
            fit, score, whole = (facts[key] / facts["T"] for key in ("fit", "score", "whole"))
            found[method, count, factor] = score, fit + score
            row = f"{method:<21} {count:>7} {f'{factor}T':>6} {whole:>9.1f}"
            print(f"{row} {fit:>6.1f} {score:>7.1f} {facts['MB']:>6.0f}", flush=True)
    for count in (1, 20):
        steady = [found["checkpoints alone", count, factor][0] for factor in FACTORS]
        whole = found["unrolled", count, 16][1]
        alone = whole / steady[-1]
        both = whole / found["segmented", count, 16][1]
        print(
            f"{count} queries: from checkpoints alone {steady[-1] / steady[0]:.2f} × at 16T what "
            f"it takes at T (aim {FLAT}); at 16T unrolled takes {alone:.1f} × as long (aim "
            f"{CHEAPER}), {both:.1f} × where our own run is replayed first"
        )


# ---- Settings, and what is lost ----


def truths(link: str, factor: int, seed: int):
    """A fitted setting with real effects of 40 removals, and the unrolled scores."""
    experiment = setting(link, factor, seed)
    pipeline, queries = experiment.pipeline.fit(False), experiment.queries
    groups = msif.random_removals(len(pipeline.stages[0].data), 40, seed=0)
    effects = msif.removal_effects(pipeline, queries, groups, lanes=40, progress=False).values
    unrolled = msif.UnrolledInfluence().fit(pipeline, False).score(queries, progress=False).values
    return pipeline, queries, [g[0] for g in groups], effects, unrolled


def compared(truth, **choice) -> tuple[float, float]:
    """r with real removals and with the unrolled scores."""
    pipeline, queries, removed, effects, unrolled = truth
    method = msif.SegmentedInfluence(**choice).fit(pipeline, False)
    values = method.score(queries, progress=False).values
    return correlation(-values[:, removed], effects), correlation(values, unrolled)


def table(choices: dict, factors, seeds: int) -> None:
    """Mean of r over links and seeds, and the lowest, a row for each choice."""
    for factor in factors:
        truth = [
            truths(link, factor, 10 + s) for link in ("frozen", "warm start") for s in range(seeds)
        ]
        best = [correlation(-u[:, removed], effects) for _, _, removed, effects, u in truth]
        print(f"\n{factor}T, 12 segments: r with real removals (lowest), r with unrolled scores")
        print(f"  {'unrolled':<38} {sum(best) / len(best):.3f} ({min(best):.3f})")
        for name, choice in choices.items():
            found = [compared(each, **choice) for each in truth]
            real, close = ([pair[i] for pair in found] for i in (0, 1))
            mean = sum(real) / len(real)
            print(
                f"  {name:<38} {mean:.3f} ({min(real):.3f})  {sum(close) / len(close):.3f}",
                flush=True,
            )


def settings(seeds: int) -> None:
    choices = {f"krylov={k}": {"krylov": k} for k in (4, 6, 10, 20)}
    choices["None: step by step"] = {}
    for k in (4, 6, 10, 20, None):
        choices[f"krylov={k}, checkpoints alone"] = {"krylov": k, "details": False}
    for count in (40, 133):
        part = f"curvature from {count} of 400 + {count} of 200"
        choices[part] = {"curvature_examples": count}
    table(choices, FACTORS, seeds)


def losses(seeds: int) -> None:
    everything = {"segments": 10**6, "krylov": 20}
    choices = {
        "a stretch a step, details": everything,  # the unrolled derivative itself
        "a stretch a step, checkpoints alone": everything | {"details": False},
        "24, step by step": {"segments": 24},
        "24, checkpoints alone": {"segments": 24, "details": False},
        "12, step by step": {},
        "12, details, one Hessian": {"krylov": 20},
        "12, checkpoints alone": {"details": False},
        "12, GGN": {"curvature": "ggn"},
        "12, gradient flow, details": {"dynamics": "flow"},
        "12, GGN, gradient flow, alone (SOURCE)": {
            "curvature": "ggn",
            "dynamics": "flow",
            "details": False,
        },
    }
    table(choices, (1,), seeds)


# ---- Trained by a plain loop ----


def loop(net, data, epochs: int, every: int, seed: int, lr=0.01, make=None, removed=()):
    """A plain loop with its own shuffling; its checkpoints, rates and optimiser, and what else it
    knows of its steps.

    A removed example keeps its place in its batches and counts for nothing.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, momentum=0.9) if make is None else make(trained)
    total = epochs * -(-len(data) // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    weights = torch.ones(len(data), dtype=data.x.dtype, device=data.x.device)
    weights[list(removed)] = 0
    order, saved, rates, step = torch.Generator().manual_seed(seed), [], [], 0
    batches, means = [], []

    def keep():
        saved.append((step, *map(copy.deepcopy, (net.state_dict(), optimizer.state_dict()))))
        means.append([])

    for _ in range(epochs):
        for batch in torch.randperm(len(data), generator=order).split(50):
            if step % every == 0:
                keep()
            means[-1].append(copy.deepcopy(net.state_dict()))
            batches.append(batch)
            optimizer.zero_grad()
            losses = msif.cross_entropy(net(data.x[batch]), data.y[batch])
            (weights[batch] * losses).mean().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
            step += 1
    keep()
    mean = [
        {name: sum(s[name] for s in some) / len(some) for name in some[0]} for some in means[:-1]
    ]
    return msif.Run(saved, rates, optimizer), {"batches": batches, "means": mean}


def two_loops(make, data, seed: int, removed=()):
    """Pretraining and finetuning on digits by `loop`, 12 epochs each; nets and runs."""
    nets, runs = [], []
    for k, part in enumerate(data):
        nets.append(msif.mlp(64, (16,), classes=(4, 6)[k], seed=10 * seed + k).double())
        if k:
            nets[1].embedding.load_state_dict(nets[0].embedding.state_dict())
        every = -(-len(part) // 50)  # an epoch: 12 checkpoints and the start
        runs.append(loop(nets[k], part, 12, every, 10 * seed + k, make=make, removed=removed))
        removed = ()
    return nets, runs


def own(seeds: int) -> None:
    """r with 40 real removals by the same loop, from its checkpoints alone."""
    makers = {
        "SGD, 0.05": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        "Adam, 3e-3": lambda p: torch.optim.Adam(p, 3e-3),
    }
    train, test = msif.load_digits(dtype=torch.float64)
    for name, make in makers.items():
        found = {}
        for seed in range(10, 10 + seeds):
            pre = train.select(classes=range(4), n=300, seed=seed)
            fine = train.select(classes=range(4, 10), n=150, seed=seed)
            queries = test.select(classes=range(4, 10), n=20, seed=seed)
            groups = msif.random_removals(300, 40, seed=seed)
            rows = []
            for group in ([], *groups):
                nets, runs = two_loops(make, (pre, fine), seed, group)
                if not group:
                    full = nets, runs
                with torch.no_grad():
                    rows.append(msif.cross_entropy(nets[1](queries.x), queries.y))
            (first, second), runs = full
            stages = [
                msif.Stage("pre", first, pre),
                msif.Stage("fine", second, fine, link=msif.WarmStart()),
            ]
            effects = torch.stack([row - rows[0] for row in rows[1:]], 1)
            for known in (False, True):
                given = [replace(run, **also) if known else run for run, also in runs]
                pipeline = msif.Pipeline(stages).adopt(checkpoints=given)
                scores = msif.SegmentedInfluence().fit(pipeline).score(queries, progress=False)
                r = correlation(-scores.values[:, [g[0] for g in groups]], effects)
                found.setdefault(known, []).append(r)
        for known, all_r in found.items():
            which = "and all it knows" if known else "alone"
            all_r = ", ".join(f"{r:.3f}" for r in all_r)
            print(f"{name}, checkpoints {which}: r = {all_r} (seeds 10 to {9 + seeds})", flush=True)


# ---- What it says of itself ----


def rough(seed: int, lr: float, schedule: str, batch_size: int, link):
    """Two stages on digits at this learning rate, and six queries."""
    train, test = msif.load_digits(dtype=torch.float64)
    stages = []
    for k, (classes, n) in enumerate(((range(4), 240), (range(4, 10), 120))):
        at = {"epochs": 8, "batch_size": batch_size, "warmup": 10, "seed": 2 * seed + k}
        recipe = msif.SGD(lr, schedule=schedule, **at)
        net = msif.mlp(64, (8,), classes=len(classes), seed=seed + k).double()
        data = train.select(classes=classes, n=n, seed=seed)
        stage = msif.Stage("pf"[k], net, data, weight_decay=1e-3, recipe=recipe)
        stages.append(replace(stage, link=link if k else None))
    queries = test.select(classes=range(4, 10), n=6, seed=seed)
    return msif.Pipeline(stages).fit(False), queries


def warning(seeds: int) -> None:
    """A row for each rate, schedule and number of stretches; batches and links take turns."""
    about = "seed rate schedule batch link"
    print(f"{about:<36} {'segments':>8} {'r':>6}  changes_  check: r, change")
    kinds = list(itertools.product((0.05, 0.1, 0.2, 0.4), ("constant", "linear", "cosine")))
    for seed, (i, (lr, schedule)) in itertools.product(range(10, 10 + seeds), enumerate(kinds, 1)):
        batch_size = (20, 50)[(i + seed) % 2]
        link = ("frozen", "warm start")[(i // 2 + seed) % 2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline, queries = rough(seed, lr, schedule, batch_size, LINKS[link])
            unrolled = msif.UnrolledInfluence().fit(pipeline, False)
            truth = unrolled.score(queries, progress=False).values
            for segments in (3, 6, 12, 24):
                method = msif.SegmentedInfluence(segments).fit(pipeline, False)
                values = method.score(queries, progress=False).values
                changes = float(method.changes_.median())
                told = method.check(queries, progress=False)
                row = f"{seed:>4} {lr:<4} {schedule:<8} {batch_size:>5} {link}"
                told = f"{float(told.r.median()):.3f}, {float(told.change.median()):.2f}"
                r = correlation(values, truth)
                print(f"{row:<36} {segments:>8} {r:>6.3f}  {changes:>8.2f}  {told}", flush=True)


# ---- 11 million parameters ----


def large(folder, device: str) -> None:
    """ResNet-18 on CIFAR-10 at 16 × 16 pixels, animals to vehicles, warm start."""
    import gpu

    data = []
    for classes, n, part in ((gpu.PRETRAIN, 1000, "train"), (gpu.FINETUNE, 500, "train")):
        data.append(gpu.examples(folder, classes, n, 2, part))
    queries = gpu.examples(folder, gpu.FINETUNE, 4, 2, "test")
    nets = [
        gpu.resnet(len(c), (2, 2, 2, 2), 0).to(device).eval() for c in (gpu.PRETRAIN, gpu.FINETUNE)
    ]
    data, queries = [d.to(device) for d in data], queries.to(device)
    start = time.perf_counter()
    runs = [loop(nets[0], data[0], 3, 10, 0)[0]]
    shared = {k: v for k, v in nets[0].state_dict().items() if not k.startswith("fc.")}
    nets[1].load_state_dict(shared, strict=False)
    runs.append(loop(nets[1], data[1], 3, 5, 1)[0])
    training = time.perf_counter() - start
    stages = [
        msif.Stage(name, net, d, link=link)
        for name, net, d, link in zip(
            ("pretrain", "finetune"), nets, data, (None, msif.WarmStart()), strict=True
        )
    ]
    pipeline = msif.Pipeline(stages).adopt(checkpoints=runs)
    method = msif.SegmentedInfluence(6, krylov=6, curvature_examples=100, memory="8GB")
    for count in (1, 4):
        plan = method.plan(pipeline, count)
        start = time.perf_counter()
        scores = method.fit(pipeline).score(queries[:count], progress=False)
        taken = time.perf_counter() - start
        print(
            f"{pipeline.objective(0).size:,} parameters, {len(data[0])} + {len(data[1])} images, "
            f"{count} queries: {taken:.0f} s, {taken / training:.1f} trainings "
            f"of {training:.0f} s; planned {plan.seconds[1]:.0f} s, peak {peak():,.0f} MB; "
            f"largest |score| {float(scores.values.abs().max()):.2g}",
            flush=True,
        )
    print(method.check(queries[:1], progress=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("cost", "settings", "losses", "own", "warning", "large", "one")
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=pathlib.Path, help="folder with CIFAR-10, for `large`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--ask", nargs=3, help="method, factor, queries; what `cost` calls itself with"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "one":
        method, factor, count = given.ask
        print(json.dumps(one_cost(method, int(factor), int(count))))
    elif given.what == "cost":
        cost(given.threads)
    elif given.what == "large":
        large(given.data, given.device)
    else:
        tables = {"settings": settings, "losses": losses, "own": own, "warning": warning}
        tables[given.what](given.seeds)
