"""How far will scores predict removals? Candidate figures beside real r over many settings.

    python tests/benchmarks/bench_trust.py measure [--count 140] [--raw DIR]
    python tests/benchmarks/bench_trust.py table
    python tests/benchmarks/bench_trust.py remedies
    python tests/benchmarks/bench_trust.py own
    python tests/benchmarks/bench_trust.py cost

`measure` trains small nets at rates from calm to chaotic, one line of `trust.csv` for each: r of
unrolled scores with real same-seed removals of 40 random examples (100 where r is below 0.95), and
what each candidate says of it from a few other runs. `table` chooses every threshold on three
quarters of the settings and shows how it does on the fourth (every fourth by number, fixed before
the first was run). `remedies` trains the first rough ones again with one thing changed. `own` tries
`scores.trust_` itself on a quarter of the held-out settings, by every method that has it.
"""

import argparse
import contextlib
import csv
import itertools
import math
import random
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from bench_chaos import sentences
from scipy.optimize import least_squares
from torch import nn

import msif_lab as msif
from msif_lab.influence.trust import width

RESULTS = Path(__file__).parents[2] / "notebooks/results"
TABLE, REMEDIES = RESULTS / "trust.csv", RESULTS / "trust_remedies.csv"
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
LINKS = {
    "none": None,
    "frozen": msif.Frozen(),
    "warm start": msif.WarmStart(),
    "proximal": msif.Proximal(0.05),
}
QUERIES = 10
TRUTH = 40  # removals that give the real r
MORE = 60  # further ones where those say less than 0.95: a low r varies much with the examples
PROBES = 8  # other removals, of examples drawn at random
PAIRS = 4  # of runs with all weights changed a little, up or down at random, and the reverse


def settings(count: int) -> list[dict]:
    """The settings by number: each draws its factors on its own, so that more can be added."""
    drawn = []
    for i in range(count):
        draw = random.Random(i)
        net = draw.choice(["mlp", "mlp", "conv", "conv", "transformer"])
        one = {
            "net": net,
            "data": "sentences" if net == "transformer" else draw.choice(["digits", "mnist"]),
            "activation": draw.choice(["tanh", "relu", "silu" if net != "transformer" else "gelu"]),
            "pooling": draw.choice(["mean", "max"]) if net == "conv" else "",
            "link": draw.choice(["none", "frozen", "warm start", "warm start", "proximal"]),
            "schedule": draw.choice(["constant", "constant", "linear", "cosine"]),
            "warmup": draw.choice([0, 0, 20]),
            "momentum": draw.choice([0.0, 0.9, 0.9]),
            "lr": draw.choice([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]),
            "epochs": draw.choice([8, 12]),
        }
        if one["activation"] != "tanh" and net == "transformer":
            one["activation"] = draw.choice(["relu", "gelu"])
        elif net == "transformer":
            one["activation"] = "gelu"
        one["lr"] *= 1 if one["momentum"] else 4
        drawn.append({"setting": i, **one})
    return drawn


class Conv(nn.Module):
    """Two convolutions, each pooled, and a hidden layer."""

    def __init__(self, side: int, classes: int, activation, pooling: str):
        super().__init__()
        pool = {"mean": nn.AvgPool2d, "max": nn.MaxPool2d}[pooling]
        self.embedding = nn.Sequential(
            *(nn.Conv2d(1, 3, 3, padding=1), activation(), pool(2)),
            *(nn.Conv2d(3, 6, 3, padding=1), activation(), pool(2)),
            *(nn.Flatten(), nn.Linear(6 * (side // 4) ** 2, 16), activation()),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.embedding(x))


class Transformer(nn.Module):
    """One layer, and a mean over the tokens."""

    def __init__(self, classes: int, activation: str):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True, activation=activation
        )
        self.head = nn.Linear(8, classes)

    def forward(self, tokens):
        return self.head(self.layer(self.words(tokens)).mean(1))


def data(which: str, seed: int) -> tuple[msif.Examples, msif.Examples, msif.Examples]:
    """Pretraining, finetuning, and queries."""
    if which == "sentences":
        return (
            sentences(100, 4, seed),
            sentences(60, 3, 1000 + seed),
            sentences(QUERIES, 3, 2000 + seed),
        )
    train, test = msif.load_digits() if which == "digits" else msif.load_mnist()
    parts = (
        train.select(range(4), n=200, seed=seed),
        train.select(range(4, 10), n=120, seed=seed),
        test.select(range(4, 10), n=QUERIES, seed=seed),
    )
    if which == "digits":
        return tuple(p.double() for p in parts)
    small = [nn.functional.avg_pool2d(p.x[:, :, 2:26, 2:26], 3).double() for p in parts]
    return tuple(msif.Examples(x, p.y, p.ids) for x, p in zip(small, parts, strict=True))


def make_net(one: dict, x: torch.Tensor, classes: int) -> nn.Module:
    activation = ACTIVATIONS[one["activation"]]
    if one["net"] == "transformer":
        return Transformer(classes, one["activation"])
    if one["net"] == "mlp":
        inputs = x[0].numel()
        return msif.mlp(inputs, hidden=(16,), classes=classes, activation=activation).double()
    return Conv(x.shape[-1], classes, activation, one["pooling"]).double()


def build(one: dict, run: int = 0) -> tuple[msif.Pipeline, msif.Examples]:
    """The pipeline, fitted, and its queries; ``run``: another seed of weights and batches."""
    before, after, queries = data(one["data"], one["setting"])
    torch.manual_seed(one["setting"] + 1000 * run)
    recipe = msif.SGD(
        one["lr"],
        momentum=one["momentum"],
        epochs=one["epochs"],
        batch_size=20 if one["net"] == "transformer" else 50,
        schedule=one["schedule"],
        warmup=one["warmup"],
        seed=run,
    )
    common = {"weight_decay": 1e-3, "recipe": recipe}
    classes = len(after.classes)
    if one["link"] == "none":
        stages = [msif.Stage("fit", make_net(one, after.x, classes), after, **common)]
    else:
        stages = [
            msif.Stage("pretrain", make_net(one, before.x, len(before.classes)), before, **common),
            msif.Stage(
                "finetune",
                make_net(one, after.x, classes),
                after,
                link=LINKS[one["link"]],
                **common,
            ),
        ]
    if run:
        for stage in stages:
            for p in stage.model.parameters():
                if p.ndim > 1:
                    nn.init.kaiming_uniform_(p, a=5**0.5)
    pipeline = msif.Pipeline(stages)
    if one["net"] != "mlp":
        pipeline, queries = pipeline.float(), queries.to(torch.float32)
    return pipeline.fit(progress=False), queries


def weightings(values: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """All runs of one setting as weights ``(R, N)``, and which rows are what."""
    n = values.shape[1]
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(n, generator=draw)
    truth = order[: min(TRUTH, n // 2)]
    others = order[len(truth) :]
    probes = others[:PROBES]
    signs = 2.0 * torch.randint(0, 2, (PAIRS, n), generator=draw) - 1
    kinds = {
        "truth": 1 - nn.functional.one_hot(truth, n).double(),
        "probes": 1 - nn.functional.one_hot(probes, n).double(),
        "doubled": 1 + nn.functional.one_hot(probes[:4], n).double(),
        "pairs": 1 + torch.stack([signs, -signs], 1).flatten(0, 1) / n**0.5,
        "meta1": 1 + 0.1 * signs[:2],
        "meta2": 1 + 0.2 * signs[:2],
    }
    ends = list(itertools.accumulate(len(w) for w in kinds.values()))
    rows = {name: slice(b - len(w), b) for (name, w), b in zip(kinds.items(), ends, strict=True)}
    return torch.cat(list(kinds.values())), rows


def cpu_seconds(call, *given, **settings) -> float:
    start = time.process_time()
    call(*given, **settings, progress=False)
    return time.process_time() - start


def measure(one: dict, run: int = 0) -> dict:
    """Everything about one setting: predicted and actual changes of q, growth, and seconds."""
    pipeline, queries = build(one, run)
    attributor = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = attributor.score(queries, progress=False).values
    growth = 1.0
    for norms in attributor.adjoint_norms_.values():
        growth *= float(norms.max() / norms[-1])
    weights, rows = weightings(values)
    weights = weights.to(values)
    again = pipeline.retrain({0: weights}, progress=False)
    base = pipeline.evaluate(queries)[:, None]
    found = {
        "values": values,
        "predicted": values @ (weights - 1).T,
        "actual": again.evaluate(queries) - base,
        "parameters": again.parameters[-1][rows["pairs"].start :] - pipeline.trained()[-1],
        "rows": rows,
        "growth": growth,
    }
    return {"one": one, **found}


def pearson(p: torch.Tensor, a: torch.Tensor) -> float:
    """Mean over queries."""
    pairs = zip(p.double(), a.double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in pairs]).mean())


def sign_agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Metasmoothness: how far successive differences along a line agree in sign, by their size.

    Definition 2 of Engstrom et al. 2025 (arXiv 2503.13751); first, second: after steps h and 2h.
    """
    share = first.abs() / first.abs().sum()
    return float((first.sign() * share * (second - first).sign()).sum())


def unevenness(changes: torch.Tensor) -> float:
    """``‖Δ₊ + Δ₋‖ / ‖Δ₊ − Δ₋‖`` of changes ``(Q, R)`` under weights 1 + h and 1 − h in turn."""
    up, down = changes[:, ::2], changes[:, 1::2]
    return float((up + down).norm() / (up - down).norm().clamp(min=1e-30))


def figures(found: dict) -> dict:
    """What each candidate says of a setting, from what `measure` found: a line of the table."""
    rows, growth = found["rows"], found["growth"]
    p, a = found["predicted"].double(), found["actual"].double()
    ends = found["parameters"].double()
    start = rows["pairs"].start
    spread = found["values"].double().var(1, correction=0).sqrt()[:, None]
    one = dict(found["one"])
    real = [
        torch.cat([x[:, rows["truth"]], y], 1) for x, y in zip((p, a), found["more"], strict=True)
    ]
    halves = [pearson(*(x[:, i::2] for x in real)) for i in (0, 1)]
    one |= {"r": pearson(*real), "r error": abs(halves[0] - halves[1]) / 2, "growth": growth}
    removed, doubled = a[:, rows["probes"]][:, :4], a[:, rows["doubled"]]
    bent = (removed + doubled).norm(dim=0) / (doubled - removed).norm(dim=0).clamp(min=1e-30)
    one["nonlinearity"] = float(bent.median())
    steps = [slice(rows[n].start - start, rows[n].stop - start) for n in ("meta1", "meta2")]
    one["metasmoothness"] = sign_agreement(*(ends[s][0] for s in steps))
    one["metasmoothness of q"] = sign_agreement(*(a[:, rows[n]][:, 0] for n in ("meta1", "meta2")))
    predicted, actual = p / spread, a / spread
    first, weights = rows["probes"].start, rows["pairs"].start
    for n in (2, 4, 8):
        removals, pairs = list(range(first, first + n)), list(range(weights, weights + n))
        mixed = removals[: n // 2] + list(range(weights, weights + n, 2))
        for name, runs in (("removals", removals), ("weights", pairs), ("mixed", mixed)):
            some_p, some_a = predicted[:, runs], actual[:, runs]
            cosine = (some_a * some_p).sum() / (some_a.norm() * some_p.norm()).clamp(min=1e-30)
            one[f"{name} {n}"] = float(cosine)
            if name == "weights":
                one[f"unevenness {n}"] = unevenness(some_a)
            elif name == "removals" and n > 2:
                one[f"mean r {n}"] = pearson(some_p, some_a)
    return one


def write(path: Path, lines: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, lines[0], lineterminator="\n")
        table.writeheader()
        for line in lines:
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()})


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [{k: _number(v) for k, v in line.items()} for line in csv.DictReader(file)]


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def add_truth(found: dict) -> None:
    """Remove more examples where r is low, to know it better."""
    t = found["rows"]["truth"]
    if pearson(found["predicted"][:, t], found["actual"][:, t]) >= 0.95:
        found["more"] = found["predicted"][:, :0], found["actual"][:, :0]
        return
    pipeline, queries = build(found["one"])
    n = found["values"].shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    first = found["predicted"][:, t].shape[1] + PROBES
    groups = [[i] for i in order[first : first + MORE].tolist()]
    effects = msif.removal_effects(pipeline, queries, groups, lanes=MORE, progress=False)
    predicted = -found["values"][:, [i for (i,) in groups]]
    found["more"] = predicted, effects.values.to(predicted)


def measure_all(numbers: range, raw: Path) -> None:
    """Measure the settings that ``raw`` lacks, and write the table of all that it holds."""
    raw.mkdir(exist_ok=True)
    for one in settings(numbers.stop)[numbers.start :]:
        path = raw / f"{one['setting']:03d}.pt"
        if not path.exists():
            try:
                found = measure(one)
            except (msif.NotConvergedError, ValueError) as error:  # diverged, or its adjoint did
                found = {"one": one, "error": str(error)}
            torch.save(found, path)
            print(*one.values(), found.get("error", "")[:80], flush=True)
    for path in sorted(raw.glob("*.pt")):
        found = torch.load(path, weights_only=False)
        if "error" not in found and "more" not in found:
            add_truth(found)
            torch.save(found, path)
            print(path.name, flush=True)
    kept = [torch.load(path, weights_only=False) for path in sorted(raw.glob("*.pt"))]
    whole = [f for f in kept if "error" not in f and bool(torch.isfinite(f["actual"]).all())]
    print(f"{len(whole)} of {len(kept)} settings; the others diverged")
    write(TABLE, [figures(found) for found in whole])


# ---- What each candidate is worth ----


def log_ratio(cosine: float) -> float:
    """The logarithm of noise / signal, ``√(1 / r² − 1)``."""
    return 0.5 * math.log(max(max(cosine, 0.1) ** -2 - 1, 1e-6))


def of(*columns: str):
    """The logarithms of noise / signal from these columns, which hold cosines or unevenness."""

    def figure(line: dict) -> list[float]:
        found = []
        for name in columns:
            if name.startswith("unevenness"):
                k = min(line[name], 0.995)
                found.append(math.log(max(math.sqrt(2 * k**2 / (1 - k**2)), 1e-3)))
            else:
                found.append(log_ratio(line[name]))
        return found

    return figure


CANDIDATES = {  # name: (further runs, figures from a line of the table)
    "adjoint growth": (0, lambda x: [math.log(max(x["growth"], 1.0) - 0.99)]),
    "nonlinearity of removal, 4 examples": (8, lambda x: [math.log(x["nonlinearity"] + 1e-3)]),
    "metasmoothness of the weights": (2, lambda x: [x["metasmoothness"]]),
    "metasmoothness of the queries": (2, lambda x: [x["metasmoothness of q"]]),
    "unevenness under opposite changes": (4, of("unevenness 4")),
    "removals, mean r": (8, of("mean r 8")),
    **{f"{n} removals, cosine": (n, of(f"removals {n}")) for n in (2, 4, 8)},
    **{f"{n} changes of all weights, cosine": (n, of(f"weights {n}")) for n in (2, 4, 8)},
    **{f"{n} runs, half of each, cosine": (n, of(f"mixed {n}")) for n in (2, 4, 8)},
}


def area(bad: np.ndarray, good: np.ndarray) -> float:
    """Chance that a good setting has the higher figure."""
    return float(np.mean((good[:, None] > bad) + 0.5 * (good[:, None] == bad)))


def held_out(line: dict) -> bool:
    return int(line["setting"]) % 4 == 3


def fitted(lines: list[dict], figure) -> tuple[np.ndarray, float]:
    """Coefficients for log(noise / signal), and the limit on r between good and bad."""
    x = np.array([[1.0, *figure(line)] for line in lines])
    r = np.array([line["r"] for line in lines])
    start = np.linalg.lstsq(x, [log_ratio(min(each, 0.9995)) for each in r], rcond=None)[0]
    # a slight pull to the start, where several figures say nearly the same
    b = least_squares(
        lambda b: np.r_[(1 + np.exp(2 * x @ b)) ** -0.5 - r, 0.1 * (b - start)], start
    ).x
    e = estimates(b, lines, figure)
    return b, float(np.mean([np.quantile(e[r < 0.8], 0.98), np.quantile(e[r > 0.95], 0.02)]))


def estimates(b: np.ndarray, lines: list[dict], figure) -> np.ndarray:
    x = np.array([[1.0, *figure(line)] for line in lines])
    return (1 + np.exp(2 * x @ b)) ** -0.5


def interval(e: np.ndarray, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """The interval that `Trust` gives around estimates from so many runs."""
    log_rho, wide = 0.5 * np.log(np.maximum(e**-2 - 1, 1e-6)), width(max(runs, 1))
    return tuple((1 + np.exp(2 * (log_rho + s * wide))) ** -0.5 for s in (1, -1))


def table() -> None:
    """Every candidate: chosen on three quarters, judged on the fourth."""
    lines = read(TABLE)
    parts = [[x for x in lines if held_out(x) == out] for out in (False, True)]
    r = [np.array([x["r"] for x in part]) for part in parts]
    for name, each in zip(("chosen on", "held out"), r, strict=True):
        print(f"{name}: {len(each)} settings, {(each < 0.8).sum()} bad, {(each > 0.95).sum()} good")
    print(
        "candidate | runs | limit | AUC | warned of bad | of good | within 0.15 | in interval || "
        "held out: the same"
    )
    for name, (runs, figure) in CANDIDATES.items():
        b, limit = fitted(parts[0], figure)
        cells = [f"{name} | {runs} | {limit:.2f}"]
        for part, real in zip(parts, r, strict=True):
            e = estimates(b, part, figure)
            bad, good, near = e[real < 0.8], e[real > 0.95], np.abs(e - real) <= 0.15
            low, high = interval(e, runs)
            inside = (low - 0.01 <= real) & (real <= high + 0.01)
            cells.append(
                f"{area(bad, good):.3f} | {np.mean(bad < limit):.0%} | {np.mean(good < limit):.0%}"
                f" | {near.mean():.0%} ({near[real < 0.95].mean():.0%} of r < 0.95)"
                f" | {inside.mean():.0%}"
            )
        print(" || ".join(cells), f"|| {b.round(2)}")


# ---- Remedies ----


def remedies(one: dict) -> dict[str, dict]:
    """What is changed in a setting, of what is not so already."""
    changes = {
        "half the rate": {"lr": one["lr"] / 2},
        "a quarter of the rate": {"lr": one["lr"] / 4},
    }
    if one["schedule"] == "constant":
        changes["linear decay"] = {"schedule": "linear"}
    if not one["warmup"]:
        changes["warm-up"] = {"warmup": 20}
    if one["activation"] == "relu":
        smooth = "gelu" if one["net"] == "transformer" else "tanh"
        changes["smooth activation"] = {"activation": smooth}
    if one["pooling"] == "max":
        changes["mean pooling"] = {"pooling": "mean"}
    return {name: one | change for name, change in changes.items()}


def predicted_and_real(one: dict, run: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Effects of removing 30 examples, and the queries' mean loss."""
    pipeline, queries = build(one, run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
        scores = method.score(queries, progress=False)
    groups = msif.random_removals(len(scores.ids), 30)
    effects = msif.removal_effects(pipeline, queries, groups, progress=False)
    predicted = -scores.values[:, [i for (i,) in groups]].double()
    return predicted, effects.values.double(), float(effects.base.mean())


def try_remedies(most: int, runs: int = 4) -> None:
    """The first rough settings of the table again, with one thing changed, or averaged."""
    rough = [int(x["setting"]) for x in read(TABLE) if x["r"] < 0.8][:most]
    lines: list[dict] = []
    for one in settings(max(rough) + 1):
        if one["setting"] not in rough:
            continue
        p, a, loss = predicted_and_real(one)
        before = {"setting": one["setting"], "r before": pearson(p, a), "loss before": loss}
        for name, changed in remedies(one).items():
            with contextlib.suppress(msif.NotConvergedError, ValueError):
                *both, after = predicted_and_real(changed)
                lines.append(before | {"remedy": name, "r": pearson(*both), "loss": after})
        with contextlib.suppress(msif.NotConvergedError, ValueError):
            each = [predicted_and_real(one, run) for run in range(1, runs + 1)]
            p, a = (torch.stack([x[i] for x in each]).mean(0) for i in (0, 1))
            mean = {"r": pearson(p, a), "loss": float(np.mean([x[2] for x in each]))}
            lines.append(before | {"remedy": f"mean of {runs} runs"} | mean)
        print(one["setting"], f"{before['r before']:.2f}", flush=True)
        write(REMEDIES, lines)


def remedies_table() -> None:
    lines = read(REMEDIES)
    print("remedy | settings | median r before | after | now r > 0.8 | > 0.95 | loss, times")
    for name in dict.fromkeys(x["remedy"] for x in lines):
        some = [x for x in lines if x["remedy"] == name]
        before, r = (np.array([x[n] for x in some]) for n in ("r before", "r"))
        loss = np.median([x["loss"] / x["loss before"] for x in some])
        print(
            f"{name} | {len(some)} | {np.median(before):.2f} | {np.median(r):.2f} | "
            f"{np.mean(r > 0.8):.0%} | {np.mean(r > 0.95):.0%} | {loss:.2f}"
        )


# ---- The library's own figure ----

METHODS = {  # name: (what is made, whether groups are removed)
    "4 runs": (lambda: msif.UnrolledInfluence(trust=4), False),
    "8 runs": (lambda: msif.UnrolledInfluence(trust=8), False),
    "8 runs, leave one out": (
        lambda: msif.UnrolledInfluence(leave_one_out=True, probes=8, trust=8),
        False,
    ),
    "8 runs, groups of a tenth": (
        lambda: msif.UnrolledInfluence(group_fraction=0.1, trust=8),
        True,
    ),
    "8 runs, 12 segments": (lambda: msif.SegmentedInfluence(12, trust=8), False),
}


def own(numbers: list[int]) -> None:
    """What `scores.trust_` says on held-out settings, by every method that measures it."""
    kept = {name: [] for name in METHODS}
    for one in settings(max(numbers) + 1):
        if one["setting"] not in numbers:
            continue
        pipeline, queries = build(one)
        m = len(pipeline.stages[0].data)
        real = {}
        for groups in (False, True):
            removed = msif.random_removals(m, 30, 0.1 if groups else None, seed=1)
            effects = msif.removal_effects(pipeline, queries, removed, progress=False)
            real[groups] = removed, effects.values.double()
        for name, (make, groups) in METHODS.items():
            removed, actual = real[groups]
            with warnings.catch_warnings(), contextlib.suppress(ValueError):
                warnings.simplefilter("ignore")
                scores = make().fit(pipeline, progress=False).score(queries, progress=False)
                p = torch.stack([scores.removal_effect(each) for each in removed], 1)
                kept[name].append((pearson(p, actual), scores.trust_))
        print(one["setting"], *(f"{x[-1][0]:.2f} {x[-1][1]}" for x in kept.values()), flush=True)
    for name, found in kept.items():
        r = np.array([x for x, _ in found])
        e, low, high = (np.array([getattr(t, n) for _, t in found]) for n in ("r", "low", "high"))
        warns = np.array([t.warns for _, t in found])
        share = np.median([t.share for _, t in found])
        print(
            f"{name} | {len(r)} | {warns[r < 0.8].mean():.0%} of {(r < 0.8).sum()} | "
            f"{warns[r > 0.95].mean():.0%} of {(r > 0.95).sum()} | "
            f"{np.mean(abs(e - r) <= 0.15):.0%} | "
            f"{np.mean((low - 0.01 <= r) & (r <= high + 0.01)):.0%} | {share:.0%}"
        )


def cost() -> None:
    """What runs take beside a sweep, in processor time, on one setting in eight."""
    shares: dict[tuple[int, int], list[float]] = {}
    for one in settings(140)[1::8]:
        pipeline, _ = build(one)
        with warnings.catch_warnings(), contextlib.suppress(ValueError, msif.NotConvergedError):
            warnings.simplefilter("ignore")
            method = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
            m, lanes = len(pipeline.stages[0].data), {}
            for n in (1, 2, 4, 8):
                lanes[n] = cpu_seconds(pipeline.retrain, {0: torch.ones(n, m)})
            for count in (QUERIES, 2 * QUERIES, 5 * QUERIES):
                sweep = cpu_seconds(method.score, pipeline.stages[-1].data[:count])
                for n, seconds in lanes.items():
                    shares.setdefault((n, count), []).append(seconds / sweep)
    for (n, count), each in sorted(shares.items()):
        low, middle, high = np.quantile(each, [0.1, 0.5, 0.9])
        print(f"{n} runs beside a sweep of {count} queries: {middle:.0%} ({low:.0%} to {high:.0%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["measure", "table", "remedies", "own", "cost"])
    parser.add_argument("--count", type=int, default=140)
    parser.add_argument("--raw", type=Path, default=Path("/tmp/trust_raw"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "measure":
        measure_all(range(args.count), args.raw)
    elif args.what == "remedies":
        try_remedies(args.count)
    elif args.what == "cost":
        cost()
    elif args.what == "own":
        own([i for i in range(args.count) if i % 16 == 3])
    else:
        table()
        if REMEDIES.exists():
            remedies_table()
