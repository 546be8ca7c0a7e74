"""When does an unrolled score stop predicting removals? The growth of the adjoint beside real r.

    python tests/benchmarks/bench_chaos.py [--seeds 2 3] [--threads 1]

Two-stage runs of small MLPs on digits and of small transformers on made-up sentences, from calm to
chaotic learning rates. For each: how far the adjoint grows on its way back through both stages
(`UnrolledInfluence` warns above 5, a limit chosen on seeds 0 and 1), and Pearson's r, mean over
queries, of scores and real same-seed removals of 40 single examples. A smooth net with r < 0.35 and
no warning, or a run with r >= 0.9 and one, is misjudged; more than 3 % of those fail. ReLU nets can
have any r at any growth; `UnrolledInfluence.check` sees that.
"""

import argparse
import warnings

import torch
from torch import nn

import msif_lab as msif

WORDS = 20
LENGTH = 8


class Transformer(nn.Module):
    """Two layers and a mean over the tokens."""

    def __init__(self, classes: int, **settings):
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.position = nn.Parameter(0.1 * torch.randn(1, LENGTH, 12))
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True, **settings)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, classes)

    def forward(self, tokens):
        return self.head(self.layers(self.words(tokens) + self.position).mean(1))


def sentences(n: int, classes: int, seed: int) -> msif.Examples:
    """Random words, labelled by the sum of a vector per word; a tenth of the labels are random."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (n, LENGTH), generator=generator)
    rule = torch.randn(WORDS, classes, generator=torch.Generator().manual_seed(classes))
    labels = rule[tokens].sum(1).argmax(1)
    drawn = torch.rand(n, generator=generator) < 0.1
    labels[drawn] = torch.randint(0, classes, (int(drawn.sum()),), generator=generator)
    return msif.Examples(tokens, labels)


def digits(seed: int):
    train, test = msif.load_digits(dtype=torch.float64)
    return (
        train.select(range(4), n=200, seed=seed),
        train.select(range(4, 10), n=120, seed=seed),
        test.select(range(4, 10), n=12, seed=seed),
    )


def texts(seed: int):
    return sentences(120, 4, seed), sentences(60, 3, 100 + seed), sentences(12, 3, 200 + seed)


NETS = {
    "mlp, tanh": (digits, lambda c: msif.mlp(64, hidden=(16,), classes=c)),
    "mlp, ReLU": (digits, lambda c: msif.mlp(64, hidden=(16,), classes=c, activation=nn.ReLU)),
    "transformer, GELU": (texts, lambda c: Transformer(c, activation="gelu")),
    "transformer, ReLU": (texts, lambda c: Transformer(c, norm_first=True)),
}
LINKS = {"frozen": msif.Frozen(), "warm start": msif.WarmStart()}


def recipes(net: str) -> list:
    if net.startswith("mlp"):
        rates = (0.05, 0.2, 0.4, 0.5, 0.7)
        settings = {"epochs": 10, "batch_size": 50}
    else:
        rates = (0.05, 0.2)
        settings = {"epochs": 8, "batch_size": 20}
    gentle = [msif.SGD(0.1, schedule="linear", **settings)]
    adam = [msif.Adam(lr, **settings) for lr in (0.003, 0.01, 0.03, 0.1)]
    return gentle + [msif.SGD(lr, **settings) for lr in rates] + adam


def measured(net: str, link: str, recipe, seed: int) -> tuple[float, float, bool]:
    """Growth, r, and whether `score` warned."""
    data, make = NETS[net]
    before, after, queries = data(seed)
    torch.manual_seed(seed)
    common = {"weight_decay": 1e-3, "recipe": recipe}
    stages = [
        msif.Stage("pretrain", make(4).double(), before, **common),
        msif.Stage(
            "finetune", make(len(after.classes)).double(), after, link=LINKS[link], **common
        ),
    ]
    pipeline = msif.Pipeline(stages).fit(progress=False)
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = attributor.score(queries, progress=False)
    warned = any(issubclass(w.category, msif.UnsmoothTrainingWarning) for w in seen)
    effects = msif.removal_effects(pipeline, queries, [[i] for i in range(40)], progress=False)
    growth = 1.0
    for norms in attributor.adjoint_norms_.values():
        growth *= float(norms.max() / norms[-1])
    pairs = zip(-scores.values[:, :40], effects.values, strict=True)
    r = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    return growth, sum(r) / len(r), warned


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    misjudged, runs = [], 0
    for net in NETS:
        for recipe in recipes(net):
            for link in LINKS:
                for seed in args.seeds:
                    case = f"{net:<18} {link:<11} seed {seed}  {recipe!r}"
                    try:
                        growth, r, warned = measured(net, link, recipe, seed)
                    except msif.NotConvergedError:
                        print(f"diverged                     {case}", flush=True)
                        continue
                    word = "warns" if warned else "     "
                    print(f"growth {growth:>9.1f}  r {r:5.2f}  {word}  {case}", flush=True)
                    runs += 1
                    if (r >= 0.9 and warned) or (r < 0.35 and not warned and "ReLU" not in net):
                        misjudged.append(case)
    print(f"{len(misjudged)} of {runs} runs are misjudged", *misjudged, sep="\n  ")
    assert len(misjudged) <= 0.03 * runs
