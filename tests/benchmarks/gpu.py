"""Two-stage influence on a ResNet-18 of 11 million parameters: the solvers compared on a GPU.

    # dry run on a CPU, a minute
    python tests/benchmarks/gpu.py --device cpu --size tiny
    # all 11 million parameters on a CPU, but 64 examples, minutes
    python tests/benchmarks/gpu.py --device cpu --size slice
    # 40 MB of CIFAR-10 for a machine without a network
    python tests/benchmarks/gpu.py --pack DIR --n 12000
    python tests/benchmarks/gpu.py --device cuda --data DIR --out gpu.json [--precision tf32]

torchvision's ResNet-18 with the usual CIFAR stem (3 × 3, stride 1, no pooling) is trained on six
classes of CIFAR-10 by SGD, then finetuned with a new ``fc`` on the other four: `fc` alone (Frozen),
or everything held near the pretrained weights (Proximal). BatchNorm uses batch statistics in
pretraining and the running statistics (eval mode) from then on, so that the loss of an example
depends on that example alone; its scales and shifts stay 1 and 0, since EK-FAC knows only Linear
and Conv2d. Pretraining examples are scored on held-out queries. r is the median over queries of
Pearson's r with the scores of plain CG. Everything is float32 unless --precision says otherwise;
then the error is shown.
"""

import argparse
import copy
import json
import pathlib
import sys
import time
import warnings
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy

import msif_lab as msif
from msif_lab import curvature, memory, objective

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
from job import status

PRETRAIN, FINETUNE = (0, 1, 2, 3, 4, 5), (6, 7, 8, 9)


@dataclass
class Size:
    """How much of everything; the command line can change the counts."""

    blocks: tuple[int, ...]
    pool: int
    pretrain: int
    finetune: int
    queries: int
    epochs: int
    max_iter: int
    tol: float
    rank: int


SIZES = {
    "full": Size((2, 2, 2, 2), 1, 3000, 1000, 4, 12, 15, 1e-2, 150),
    "slice": Size((2, 2, 2, 2), 1, 48, 24, 2, 3, 6, 1e-1, 8),
    "tiny": Size((1, 1), 4, 60, 40, 2, 2, 4, 1e-1, 30),
}
# Built when it is its turn: a solver that this machine lacks costs one line, not the whole run.
METHODS = {
    "cg": lambda rank, **kw: msif.ConjugateGradient(**kw),
    "ekfac": lambda rank, **kw: msif.EKFAC(),
    "lowrank": lambda rank, **kw: msif.LowRank(rank=rank, memory="60GB"),
    "cg-ekfac": lambda rank, **kw: msif.ConjugateGradient(preconditioner=msif.EKFAC(), **kw),
    "cg-lowrank": lambda rank, **kw: msif.ConjugateGradient(
        preconditioner=msif.LowRank(rank=rank, memory="60GB"), **kw
    ),
}


class OutOfTime(Exception):
    """The time for all methods is over."""


# ---- Data ----


def pack(folder: pathlib.Path, n: int) -> None:
    """Write ``n`` training and ``n / 12`` test images as bytes, equally many of each class."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", n), ("test", n // 12)):
        images, labels = [], []
        for c in range(10):
            train, test = msif.load_cifar10(classes=(CLASSES[c],))
            data = (train if part == "train" else test)[: count // 10]
            images.append((data.x * 255).round().to(torch.uint8))
            labels += [c] * len(data)
        arrays |= {f"{part}_x": torch.cat(images).numpy(), f"{part}_y": numpy.array(labels)}
    numpy.savez(folder / "cifar10-pack.npz", **arrays)
    size = (folder / "cifar10-pack.npz").stat().st_size / 1e6
    print(
        f"{folder / 'cifar10-pack.npz'}: {len(arrays['train_x'])} + {len(arrays['test_x'])} "
        f"images, {size:.0f} MB"
    )


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def examples(data, classes: tuple[int, ...], n: int, pool: int, part: str) -> msif.Examples:
    """``n`` images of these classes as normalised floats, from a pack or from `load_cifar10`."""
    if data is not None and (data / "cifar10-pack.npz").exists():
        with numpy.load(data / "cifar10-pack.npz") as arrays:
            x, y = torch.from_numpy(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"])
        keep = torch.isin(y, torch.tensor(classes))
        found = msif.Examples(x[keep].float() / 255, y[keep]).select(classes=classes)
    else:
        found = msif.load_cifar10(data, classes=[CLASSES[c] for c in classes])[part == "test"]
    found = found.select(n=min(n, len(found)), seed=0)
    x = found.x if pool == 1 else avg_pool2d(found.x, pool)
    return msif.Examples((x - 0.47) / 0.25, found.y)


# ---- Training, plain PyTorch ----


def resnet(classes: int, blocks: tuple[int, ...], seed: int) -> nn.Module:
    """ResNet-18 with a CIFAR stem; fewer ``blocks`` than four groups leave out the widest."""
    from torchvision.models.resnet import BasicBlock, ResNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ResNet(BasicBlock, [*blocks, 1, 1][:4], num_classes=classes)
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        for group in range(len(blocks), 4):
            setattr(net, f"layer{group + 1}", nn.Identity())
        net.fc = nn.Linear(64 * 2 ** (len(blocks) - 1), classes)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    return net


def carried(net: nn.Module) -> list[str]:
    """The trained parameters that finetuning takes over: the convolutions."""
    return [n for n, p in net.named_parameters() if p.requires_grad and not n.startswith("fc.")]


def train(net, data, epochs, lr, weight_decay, trained, alpha=0.0, centre=None, batch=100) -> float:
    """SGD on the stage's own objective, penalties included; returns the last batch's loss."""
    optimiser = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=weight_decay)
    steps = epochs * -(-len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(batch):
            rows = rows.to(data.x.device)
            loss = cross_entropy(net(data.x[rows]), data.y[rows])
            if alpha:
                named = dict(net.named_parameters())
                loss = loss + alpha * sum((named[n] - c).square().sum() for n, c in centre.items())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return float(loss.detach())


def accuracy(net, data) -> float:
    with torch.no_grad():
        right = [
            (net(x).argmax(1) == y).sum()
            for x, y in zip(data.x.split(200), data.y.split(200), strict=True)
        ]
    return float(sum(right)) / len(data)


def build(size: Size, data: dict, device: str, weight_decay: float, alpha: float) -> dict:
    """Both pipelines, trained and adopted: the same pretrained net with each link."""
    net = resnet(len(PRETRAIN), size.blocks, 0).to(device)
    train(net.train(), data["pretrain"], size.epochs, 0.1, weight_decay, net.parameters())
    net.eval()
    shared = carried(net)
    backbone = {n: net.get_parameter(n).detach().clone() for n in shared}
    print(
        f"pretrained: {accuracy(net, data['pretrain']):.1%} of its training images right",
        flush=True,
    )
    pipelines = {}
    for name in ("frozen", "proximal"):
        fine = resnet(len(FINETUNE), size.blocks, 1).to(device).eval()
        state = {n: t for n, t in net.state_dict().items() if not n.startswith("fc.")}
        fine.load_state_dict(state, strict=False)  # BatchNorm's buffers too: constants from here on
        frozen = name == "frozen"
        trained = list((fine.fc if frozen else fine).parameters())
        if frozen:
            train(fine, data["finetune"], size.epochs, 0.1, weight_decay, trained)
        else:
            settings = (0.02, weight_decay, trained, alpha, backbone)
            train(fine, data["finetune"], size.epochs, *settings)
        print(
            f"{name}: {accuracy(fine, data['queries']):.1%} of the held-out images right",
            flush=True,
        )
        link = msif.Frozen(shared) if frozen else msif.Proximal(alpha, shared)
        stages = [
            msif.Stage("pretrain", copy.deepcopy(net), data["pretrain"], weight_decay=weight_decay),
            msif.Stage("finetune", fine, data["finetune"], weight_decay=weight_decay, link=link),
        ]
        pipelines[name] = msif.Pipeline(stages).adopt()
    return pipelines


# ---- Measuring ----


class Meter:
    """Seconds, with the device's work done, and the peak of the memory that counts there, in MB."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif pathlib.Path("/proc/self/clear_refs").exists():
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak = torch.cuda.max_memory_allocated() / 1e6 if self.cuda else status("VmHWM")


def set_precision(precision: str) -> None:
    allow = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow


def products(pipeline, device: str, counts=(1, 4)) -> list[dict]:
    """Times of the pretraining stage's curvature products and of a plain epoch."""
    stage, rows = pipeline.stages[0], []
    net, x, y = stage.model, stage.data.x, stage.data.y

    def epoch():
        for a, b in zip(x.split(250), y.split(250), strict=True):
            torch.autograd.grad(
                cross_entropy(net(a), b), [p for p in net.parameters() if p.requires_grad]
            )

    epoch()
    with Meter(device) as meter:
        epoch()
    plain = meter.seconds
    print(f"plain forward and backward epoch over {len(x)} pretraining examples: {plain:.3f} s")
    generator = torch.Generator().manual_seed(0)
    for kind in ("ggn", "hessian"):
        operator = pipeline.curvature(0, kind)
        for count in counts:
            v = torch.randn(operator.shape[0], count, generator=generator).to(x)
            operator @ v[:, :1]  # warms up
            with Meter(device) as meter:
                operator @ v
            seconds = meter.seconds / count
            row = {
                "kind": kind,
                "columns": count,
                "seconds": seconds,
                "epochs": seconds / plain,
                "peak": meter.peak,
            }
            rows.append(row)
            print(
                f"{kind:<8} product of {count} column(s): {row['seconds']:.3f} s = "
                f"{row['epochs']:.1f} epochs a column, {1 / row['seconds']:.2f} products/s, peak "
                f"{meter.peak:.0f} MB",
                flush=True,
            )
    return rows


def precision_error(pipeline, precision: str, device: str) -> dict:
    """Relative error and speed of one GGN product in the precision asked for, against float32."""
    full, stage = pipeline.curvature(0, "ggn"), pipeline.stages[0]
    v = torch.randn(full.shape[0], 1, generator=torch.Generator().manual_seed(1)).to(stage.data.x)
    set_precision("float32")
    with Meter(device) as slow:
        right = full @ v
    # parameters, data and activations alike: autocast does not reach through torch.func
    if precision == "bf16":
        net = copy.deepcopy(stage.model).bfloat16()
        data = msif.Examples(stage.data.x.bfloat16(), stage.data.y)
        half = objective.Objective(net, data, stage.loss, stage.weight_decay)
        other = curvature.GGN(half, half.layout.flatten(net))
    else:
        set_precision(precision)
        other = full
    w = v.to(other.dtype)
    other @ w
    with Meter(device) as fast:
        found = other @ w
    error = float((found.to(right) - right).norm() / right.norm())
    print(
        f"{precision}: a GGN product is {slow.seconds / fast.seconds:.1f}× faster, relative error "
        f"{error:.1e}"
    )
    return {"precision": precision, "speedup": slow.seconds / fast.seconds, "error": error}


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median over queries of Pearson's r."""
    r = [numpy.corrcoef(x, y)[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    return float(numpy.median(r))


def study(pipelines: dict, queries, size: Size, args, deadline: float) -> list[dict]:
    """End-to-end two-stage scores by every method and link."""

    def watch(iteration, residuals):
        if time.perf_counter() > deadline:
            raise OutOfTime(
                f"stopped in iteration {iteration} at residual {float(residuals.max()):.1e}"
            )

    form = "{:<9} {:<11} {:>8} {:>8} {:>6} {:>9} {:>9} {:>8} {:>7}  {}"
    columns = ("fit s", "score s", "iter", "residual", "products", "MB", "r", "")
    print("\n" + form.format("link", "method", *columns))
    rows = []
    for link in args.links:
        pipeline, found = pipelines[link], {}
        for name in args.methods or (["ekfac", "cg"] if args.size == "slice" else METHODS):
            row = {"link": link, "method": name}
            try:
                if time.perf_counter() > deadline:
                    raise OutOfTime("no time left")
                solver = METHODS[name](
                    rank=size.rank, tol=size.tol, max_iter=size.max_iter, callback=watch
                )
                method = msif.ImplicitInfluence(solver, curvature="ggn", damping=args.damping)
                with Meter(args.device) as fit:
                    method.fit(pipeline)
                with Meter(args.device) as score:
                    found[name] = method.score(queries).values.detach().cpu()
            except (
                msif.errors.MsifError,
                AttributeError,
                TypeError,
                ImportError,
                OutOfTime,
                RuntimeError,
            ) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"
                print(form.format(link, name, *"-------", reason), flush=True)
                rows.append(row | {"failed": reason})
                continue
            report = method.report_["pretrain"]
            row |= {
                "fit": fit.seconds,
                "score": score.seconds,
                "iterations": report.iterations,
                "residual": float(report.residuals.max()),
                "products": report.products,
                "solve_seconds": report.seconds,
                "peak": max(fit.peak, score.peak),
                "r": pearson(found[name], found["cg"]) if "cg" in found else None,
            }
            rows.append(row)
            r = "-" if row["r"] is None else f"{row['r']:.3f}"
            cells = (
                f"{fit.seconds:.1f}",
                f"{score.seconds:.1f}",
                report.iterations,
                f"{row['residual']:.1e}",
            )
            rate = f"{report.products / report.seconds:.2f} products/s" if report.products else ""
            print(
                form.format(link, name, *cells, report.products, f"{row['peak']:.0f}", r, rate),
                flush=True,
            )
    return rows


def main(args) -> None:
    start = time.perf_counter()
    size = SIZES[args.size]
    for name in ("pretrain", "finetune", "queries", "epochs", "max_iter", "rank"):
        setattr(size, name, getattr(args, name) or getattr(size, name))
    if args.threads:
        torch.set_num_threads(args.threads)
    set_precision("float32")
    cuda = args.device.startswith("cuda")
    memory.WORKING_BYTES = args.working  # None: the library's own choice for the device
    # a few epochs of SGD are no optimum; residuals are shown
    warnings.simplefilter("ignore", msif.ConvergenceWarning)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{device}, torch {torch.__version__}, size {args.size}", flush=True)
    parts = (
        ("pretrain", PRETRAIN, size.pretrain),
        ("finetune", FINETUNE, size.finetune),
        ("queries", FINETUNE, 50 * size.queries),
    )
    data = {
        name: examples(
            args.data, classes, n, size.pool, "test" if name == "queries" else "train"
        ).to(args.device)
        for name, classes, n in parts
    }
    pipelines = build(size, data, args.device, args.weight_decay, args.alpha)
    print(
        f"data and training: {time.perf_counter() - start:.1f} s\n{pipelines['proximal']}",
        flush=True,
    )
    timed = products(pipelines["proximal"], args.device, (1, 2) if args.size != "full" else (1, 4))
    errors = []
    if args.precision != "float32":
        errors.append(precision_error(pipelines["proximal"], args.precision, args.device))
        set_precision(args.precision)  # bf16 stays with the products: scores are in float32 then
    queries = data["queries"][: size.queries]
    rows = study(pipelines, queries, size, args, start + args.budget)
    if args.out:
        facts = {
            "device": device,
            "torch": torch.__version__,
            "size": vars(size),
            "damping": args.damping,
        }
        facts |= {"products": timed, "precision": errors, "methods": rows}
        args.out.write_text(json.dumps(facts, indent=1))
    print(f"all: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--data", type=pathlib.Path, help="folder with a pack, or what load_cifar10 reads"
    )
    parser.add_argument(
        "--pack",
        type=pathlib.Path,
        help="only write a pack of --n training images into this folder",
    )
    parser.add_argument("--n", type=int, default=12_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument(
        "--links", nargs="+", default=["frozen", "proximal"], choices=("frozen", "proximal")
    )
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    for name in ("pretrain", "finetune", "queries", "epochs", "max-iter", "rank", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--working", type=int, help="bytes of a chunk")
    parser.add_argument(
        "--budget",
        type=float,
        default=360,
        help="seconds after which no method is started or goes on",
    )
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    pack(args.pack, args.n) if args.pack else main(args)
