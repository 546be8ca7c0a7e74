"""Most memory of scoring all of MNIST, and of saving and loading a large pipeline.

    python tests/benchmarks/bench_memory.py [score] [save] [--net mlp|conv] [--only NAME ...]

``score``: an MLP (or conv net) is pretrained on 60,000 images for one epoch and finetuned on 1,000
others; each method then scores the 60,000 for 20 queries. *plain loop* is PyTorch alone, training
the same net for that one epoch. ``save``: pipelines of 400 MB, once of
weights and once of data. Each row is a process of its own on one thread; its most memory is Linux's
VmHWM. MNIST is found as `msif_lab.load_mnist` finds it. Exits with 1 where a row is over its limit:
900 MB, or what the plain loop takes if that is more, as it is with a conv net.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

import torch

import msif_lab as msif

MOST_SCORING = 900  # MB in all
MOST_SAVING = 2.2  # times the file, beyond the pipeline
QUERIES = 20
METHODS = {
    "implicit, CG": lambda: msif.ImplicitInfluence(
        msif.ConjugateGradient(1e-2), curvature="ggn", damping=0.1
    ),
    "implicit, EKFAC": lambda: msif.ImplicitInfluence(msif.EKFAC(), curvature="ggn", damping=0.1),
    "unrolled": msif.UnrolledInfluence,
    "segmented": msif.SegmentedInfluence,
    "TracIn": msif.TracIn,
    "gradient dot": msif.GradientDot,
    "gradient norm": msif.GradientNorm,
    "representations": msif.RepresentationSimilarity,
    "single stage": lambda: msif.SingleStage(
        msif.ConjugateGradient(1e-2), curvature="ggn", damping=0.1
    ),
    "loss": msif.Loss,
    "entropy": msif.Entropy,
    "margin": msif.Margin,
    "random": msif.Random,
}


def status(name: str) -> float:
    """``VmHWM``, the most memory of this process so far, or ``VmRSS``, what it holds now; in MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def net(kind: str) -> torch.nn.Module:
    if kind == "mlp":
        return msif.mlp(784, hidden=(16,), classes=10)
    return msif.convnet((1, 28, 28), channels=(4, 8), width=16, classes=10)


def train_plainly(kind: str) -> dict:
    """Most memory of PyTorch's own training, without anything of ours."""
    facts = {"import": status("VmHWM")}
    train, _ = msif.load_mnist()
    facts["data"] = status("VmRSS")
    model = net(kind)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    start = time.process_time()
    for batch in torch.randperm(len(train)).split(500):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(train.x[batch]), train.y[batch]).backward()
        optimiser.step()
    return facts | {"train": status("VmHWM"), "seconds": time.process_time() - start}


def score_one(kind: str, method: str) -> dict:
    """Most memory after each part of the work, and CPU seconds of the method's."""
    facts = {"import": status("VmHWM")}
    train, test = msif.load_mnist()
    fine, queries = test[:1000], test[1000 : 1000 + QUERIES]  # copies
    del test
    facts["data"] = status("VmRSS")
    recipe = msif.SGD(lr=0.05, epochs=1, batch_size=500)
    pipeline = msif.Pipeline(
        [
            msif.Stage("pre", net(kind), train, weight_decay=1e-3, recipe=recipe),
            msif.Stage(
                "fine",
                net(kind),
                fine,
                weight_decay=1e-3,
                link=msif.Proximal(alpha=0.05),
                recipe=recipe,
            ),
        ]
    ).fit(progress=False)
    facts["train"] = status("VmHWM")
    start = time.process_time()
    fitted = METHODS[method]().fit(pipeline)
    facts["fit"] = status("VmHWM")
    scores = fitted.score(queries)
    facts["score"], facts["seconds"] = status("VmHWM"), time.process_time() - start
    assert scores.values.shape == (QUERIES, len(train))
    return facts


def save_one(what: str, work: str, file: str) -> dict:
    """Most memory of save or load beyond what was held, the file's size, and the pipeline's."""
    width, n = {"weights": (62_000, 4), "data": (16, 125_000)}[what]
    torch.manual_seed(0)
    layers = torch.nn.Linear(784, width), torch.nn.Tanh(), torch.nn.Linear(width, 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    data = msif.Examples(torch.rand(n, 1, 28, 28), torch.arange(n) % 10)
    # Twice the weights: the pipeline keeps the initial ones too.
    size = data.x.nbytes + 2 * sum(p.nbytes for p in model.parameters())
    pipeline = msif.Pipeline([msif.Stage("one", model, data)]).adopt()
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    getattr(pipeline, work)(file)
    written = pathlib.Path(file).stat().st_size / 1e6
    added = status("VmHWM") - before
    return {"before": before, "added": added, "file": written, "size": size / 1e6}


def apart(*command) -> dict:
    """What one measurement finds, in a process of its own."""
    whole = [sys.executable, __file__, "one", "--ask", *map(str, command)]
    done = subprocess.run(whole, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def scoring(kind: str, only: list[str]) -> list[str]:
    """Prints a row for each method; returns those over the limit."""
    print(f"{kind}, {QUERIES} queries; most MB after each part")
    names = ("import", "data", "train", "fit", "score")
    print(f"{'method':<18}" + "".join(f"{name:>8}" for name in names) + f"{'CPU s':>8}", flush=True)
    over = []
    plain = apart("train_plainly", kind)
    row = "".join(f"{plain[name]:>8,.0f}" if name in plain else f"{'':>8}" for name in names)
    print(f"{'plain loop':<18}{row}{plain['seconds']:>8.1f}", flush=True)
    most = max(MOST_SCORING, plain["train"])
    for method in only or METHODS:
        facts = apart("score_one", kind, method)
        cells = "".join(f"{facts[name]:>8,.0f}" for name in names)
        over += [method] if facts["score"] > most else []
        mark = " over" if facts["score"] > most else ""
        print(f"{method:<18}{cells}{facts['seconds']:>8.1f}{mark}", flush=True)
    return over


def saving() -> list[str]:
    """Prints a row for each of save and load; returns those over the limit."""
    print(f"MB beyond a pipeline of 400 MB, over its size; allowed {MOST_SAVING}")
    print(
        f"{'most of it':<11}{'work':<6}{'file':>7}{'held':>7}{'added':>7}{'ratio':>7}", flush=True
    )
    over = []
    for what in ("weights", "data"):
        with tempfile.TemporaryDirectory() as folder:
            for work in ("save", "load"):
                facts = apart("save_one", what, work, pathlib.Path(folder, "pipeline"))
                ratio = facts["added"] / facts["size"]
                cells = "".join(f"{facts[name]:>7,.0f}" for name in ("file", "before", "added"))
                print(f"{what:<11}{work:<6}{cells}{ratio:>7.2f}", flush=True)
                over += [f"{work} of {what}"] if ratio > MOST_SAVING else []
    return over


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["score", "save"])
    parser.add_argument("--net", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--only", nargs="+", default=[], choices=METHODS, metavar="NAME")
    parser.add_argument("--ask", nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.ask:
        warnings.simplefilter("ignore")
        measure, *about = asked.ask
        measures = {f.__name__: f for f in (score_one, save_one, train_plainly)}
        print(json.dumps(measures[measure](*about)))
        return
    over = scoring(asked.net, asked.only) if "score" in asked.parts else []
    over += saving() if "save" in asked.parts else []
    print("all within limits" if not over else f"over their limits: {', '.join(over)}")
    raise SystemExit(bool(over))


if __name__ == "__main__":
    main()
