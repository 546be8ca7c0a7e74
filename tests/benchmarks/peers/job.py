"""One influence job as every library sees it, and the meter that times it.

Needs only torch, numpy and safetensors.

All take the mean loss over the N examples, plus damping times the identity on its curvature, and no
weight decay; scores are ``∂q/∂w_i = −(1/N) ∇qᵀ (C + damping)⁻¹ ∇f_i``, ``(Q, N)``.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass, replace

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import nn

BATCH = 250  # of the plain epoch; peers choose their own


@dataclass(frozen=True)
class Spec:
    """What a job is: data, curvature and how exactly it is to be solved."""

    net: str
    examples: int
    curvature: str
    damping: float
    residual: float
    checked: int  # queries that the independent reference solves


SPECS = {
    "S": Spec("softmax", 2000, "hessian", 1e-2, 1e-6, 20),
    "D": Spec("conv", 2000, "hessian", 0.2, 1e-3, 4),
    "M": Spec("conv", 10_000, "ggn", 1e-2, 1e-3, 2),
}
TRAINED_ON = {"softmax": 2000, "conv": 10_000}


def network(net: str) -> nn.Module:
    """``softmax``: 196 inputs × 4 classes + bias = 788; ``conv``: tanh, 28 × 28 inputs, 26,698
    parameters.
    """
    if net == "softmax":
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 4))
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    convolutions += [nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))


@dataclass
class Job:
    """A loaded job: trained network, ``x`` (N, 1, s, s), ``y`` (N,), queries ``qx``, ``qy``,
    settings.
    """

    name: str
    folder: pathlib.Path
    net: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    qx: torch.Tensor
    qy: torch.Tensor
    spec: Spec

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def data(self) -> torch.utils.data.TensorDataset:
        return torch.utils.data.TensorDataset(self.x, self.y)

    def queries(self) -> torch.utils.data.TensorDataset:
        return torch.utils.data.TensorDataset(self.qx, self.qy)

    def small(self) -> "Job":
        """The first 60 examples and two queries, to run what happens only once per process; damped
        to be easy.
        """
        easy = replace(self.spec, damping=10.0)
        return replace(
            self, x=self.x[:60], y=self.y[:60], qx=self.qx[:2], qy=self.qy[:2], spec=easy
        )

    def epoch(self) -> float:
        """CPU seconds of one plain forward and backward pass over the data."""
        parameters = list(self.net.parameters())
        start = time.process_time()
        for x, y in zip(self.x.split(BATCH), self.y.split(BATCH), strict=True):
            torch.autograd.grad(nn.functional.cross_entropy(self.net(x), y), parameters)
        return time.process_time() - start

    def epochs(self, seconds: float = 1.5) -> list[float]:
        """Plain epochs, at least three, for about this long."""
        times = [self.epoch()]
        while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
            times.append(self.epoch())
        return times


def train(net: str, x: torch.Tensor, y: torch.Tensor, path: pathlib.Path, epochs: int = 3) -> None:
    """A short plain SGD run, momentum 0.9, batches of 50, no weight decay."""
    torch.manual_seed(0)
    model = network(net)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    save_file(model.state_dict(), path)


def load(folder, name: str) -> Job:
    """The job from the work folder; its data must be there, its network is trained when it is first
    asked for.
    """
    folder, spec = pathlib.Path(folder), SPECS[name]
    arrays = load_file(folder / f"{spec.net}-data.safetensors")
    weights = folder / f"{spec.net}.safetensors"
    if not weights.exists():
        train(spec.net, arrays["x"], arrays["y"], weights)
    net = network(spec.net)
    net.load_state_dict(load_file(weights))
    n = spec.examples
    return Job(
        name, folder, net.eval(), arrays["x"][:n], arrays["y"][:n], arrays["qx"], arrays["qy"], spec
    )


def status(key: str) -> float:
    """A memory figure of this process in MB: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def work(run) -> None:
    """Main of a worker: ``run(job, variant)`` -> ``(Q, N)`` scores, or those and a line of facts;
    timed and written.

    Lazy imports and the like are paid in a first run on a few examples, which is reported apart.
    """
    parser = argparse.ArgumentParser()
    for name in ("folder", "job", "variant", "out"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = load(args.folder, args.job)
    start = time.process_time()
    if args.variant != "-":
        run(job.small(), args.variant)
    first = time.process_time() - start
    before = job.epochs()
    reset = pathlib.Path("/proc/self/clear_refs")
    if os.access(reset, os.W_OK):
        reset.write_text("5")  # VmHWM starts afresh, so that it is the job's
    resident = status("VmRSS")
    wall, start = time.perf_counter(), time.process_time()
    scores = run(job, args.variant)
    wall, seconds = time.perf_counter() - wall, time.process_time() - start
    peak = status("VmHWM")
    scores, note = scores if isinstance(scores, tuple) else (scores, "")
    after = job.epochs()
    numpy.save(args.out + ".npy", torch.as_tensor(scores).detach().numpy())
    facts = {
        "seconds": seconds,
        "wall": wall,
        "first": first,
        "epoch": statistics.median(before + after),
        "drift": statistics.median(after) / statistics.median(before),
        "peak": peak,
        "added": peak - resident,
        "note": note,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    pathlib.Path(args.out + ".json").write_text(json.dumps(facts))
