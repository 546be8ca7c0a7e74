"""Most memory of scoring all of MNIST, and of saving and loading a large pipeline.

    python tests/benchmarks/bench_memory.py [score] [save] [--net mlp|conv] [--only NAME ...]

``score``: an MLP (or conv net) is pretrained on 60,000 images for one epoch and finetuned on 1,000
others; each method then scores the 60,000 for 20 queries. ``save``: a pipeline of 400 MB, of weights
and of data. Each row is a process of its own on one thread. Its most memory is Linux's VmHWM, in
all and beyond what it held before: imports and data, or the pipeline to be saved. Exits with 1
where a row is over its limit. MNIST is read as `msif_lab.load_mnist` finds it.
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
    "implicit, EK-FAC": lambda: msif.ImplicitInfluence(
        msif.EKFAC(), curvature="ggn", damping=0.1
    ),
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


def score_one(kind: str, method: str) -> dict:
    """Most memory after each part of the work, and CPU seconds of the method's."""
    facts = {"import": status("VmHWM")}
    train, test = msif.load_mnist()
    fine, queries = test[:1000], test[1000 : 1000 + QUERIES]
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
    """Most memory of one of save and load beyond what was held before, and the file's size."""
    width, n = {"weights": (62_000, 4), "data": (16, 125_000)}[what]
    layers = torch.nn.Linear(784, width), torch.nn.Tanh(), torch.nn.Linear(width, 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    data = msif.Examples(torch.rand(n, 1, 28, 28), torch.arange(n) % 10)
    pipeline = msif.Pipeline([msif.Stage("one", model, data)]).adopt()
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    getattr(pipeline, work)(file)
    return {
        "before": before,
        "peak": status("VmHWM"),
        "file": pathlib.Path(file).stat().st_size / 1e6,
    }


def apart(*command) -> dict:
    """What one measurement prints, in a process of its own."""
    whole = [sys.executable, __file__, "one", *map(str, command)]
    done = subprocess.run(whole, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
