"""How far will scores predict removals? Candidate figures beside real r over many settings.

    python tests/benchmarks/bench_trust.py measure [--first 0] [--count 160] [--raw DIR]
    python tests/benchmarks/bench_trust.py table
    python tests/benchmarks/bench_trust.py remedies [--raw DIR]

`measure` trains small nets at rates from calm to chaotic, one line of `trust.csv` for each: r of
unrolled scores with real same-seed removals of 40 random examples, and what each candidate says of
it from a few other runs. `table` chooses every threshold on three quarters of the settings and
shows how it does on the fourth (every fourth by number, fixed before the first was run).
`remedies` trains the rough ones again with one thing changed.
"""

import argparse
import itertools
import random
import time
import warnings
from pathlib import Path

import torch
from bench_chaos import sentences
from torch import nn

import msif_lab as msif

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
LINKS = {
    "none": None,
    "frozen": msif.Frozen(),
    "warm start": msif.WarmStart(),
    "proximal": msif.Proximal(0.05),
}
QUERIES = 10
TRUTH = 40  # removals that give the real r
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


def cpu_seconds(call, repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def measure(one: dict, run: int = 0) -> dict:
    """Everything about one setting: predicted and actual changes of q, growth, and seconds."""
    pipeline, queries = build(one, run)
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        values = attributor.score(queries, progress=False).values
        sweep = time.process_time() - start
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
        "sweep": sweep,
    }
    for lanes in (2, 4):
        w = {0: weights[rows["probes"]][:lanes]}
        found[f"lanes {lanes}"] = cpu_seconds(lambda w=w: pipeline.retrain(w, progress=False))
    return {"one": one, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["measure", "table", "remedies"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--raw", type=Path, default=Path("/tmp/trust_raw"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.raw.mkdir(exist_ok=True)
    for one in settings(args.count)[args.first :]:
        path = args.raw / f"{one['setting']:03d}.pt"
        if path.exists():
            continue
        start = time.time()
        try:
            found = measure(one)
        except (msif.NotConvergedError, ValueError) as error:
            found = {"one": one, "error": str(error)}
            print(one, str(error)[:100], flush=True)
            torch.save(found, path)
            continue
        torch.save(found, path)
        t = found["rows"]["truth"]
        p, a = found["predicted"][:, t], found["actual"][:, t]
        r = torch.stack(
            [torch.corrcoef(torch.stack(x))[0, 1] for x in zip(p, a, strict=True)]
        ).mean()
        print(
            f"{one['setting']:3d} r {float(r):5.2f} growth {found['growth']:8.1f} "
            f"sweep {found['sweep']:.2f} lanes {found['lanes 2']:.2f} {found['lanes 4']:.2f} "
            f"all {time.time() - start:.1f} s  {list(one.values())[1:]}",
            flush=True,
        )
