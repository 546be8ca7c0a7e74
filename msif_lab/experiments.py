"""The named settings of lessons and results as one-line builders, and the study that compares every method on them.

    python -m msif_lab.experiments mnist cifar --jobs 2 --out notebooks/results

reruns the figures that the lessons show beside what they compute live.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import torch
from torch import nn

from .baselines import all_baselines
from .comparison import compare_methods, noise_ceiling
from .data import Examples, load_digits
from .datasets import load_cifar10, load_mnist
from .errors import ConvergenceWarning
from .influence import ImplicitInfluence, Influence
from .models import convnet, mlp
from .pipeline import Pipeline
from .solvers import Exact
from .stages import Frozen, Link, Proximal, Stage, WarmStart
from .storage import digest, write_bytes
from .training import SGD
from .unrolled import UnrolledInfluence
from .validation import Effects, random_removals, removal_effects

__all__ = ["SETTINGS", "Experiment", "cifar", "cifar_vehicles", "digits", "mnist", "mnist_to_digits", "run", "study"]

LINKS = {"frozen": Frozen(), "warm start": WarmStart()}
NETS = {"tanh": {"activation": nn.Tanh}, "silu": {"activation": nn.SiLU, "norm_groups": 4}}
REMOVALS = {"one": None, "2 %": 0.02, "10 %": 0.1}
ANIMALS, VEHICLES = ("bird", "cat", "deer", "dog", "frog", "horse"), ("airplane", "automobile", "ship", "truck")


@dataclass(frozen=True)
class Experiment:
    """A setting, ready to fit.

    Attributes:
        title: what is transferred to what.
        pipeline: two stages, not fitted yet.
        queries: test examples of the finetuning task.
        test: all test examples of that task, for its accuracy.
    """

    title: str
    pipeline: Pipeline
    queries: Examples
    test: Examples

    def accuracy(self) -> float:
        """Share of ``test`` that the fitted pipeline gets right."""
        o, full = self.pipeline.objective(-1), self.pipeline.trained()[-1]
        with torch.no_grad():
            right = [o.outputs(full, x).argmax(1) == y for _, x, y in o.chunks(self.test)]
        return float(torch.cat(right).double().mean())


@dataclass(frozen=True)
class Sizes:
    """How much of everything: examples, passes, and the recipe's numbers; each a keyword of every builder.

    Attributes:
        pretraining, finetuning: examples of the two stages.
        queries: test examples asked about.
        lr: learning rate of both stages, after 20 steps of warm-up falling linearly to zero.
        epochs: passes over the data, in pretraining and in finetuning.
        batch_size: examples a step of pretraining and of finetuning.
        weight_decay: of both stages.
    """

    pretraining: int
    finetuning: int
    queries: int = 20
    lr: float = 0.1
    epochs: tuple[int, int] = (8, 12)
    batch_size: tuple[int, int] = (50, 50)
    weight_decay: float = 1e-3

    @classmethod
    def of(cls, size: str, sizes: dict[str, "Sizes"], changes: dict) -> "Sizes":
        if size not in sizes:
            raise ValueError(f"size={size!r} must be one of {sorted(sizes)}")
        unknown = set(changes) - set(cls.__dataclass_fields__)
        if unknown:
            raise TypeError(f"unknown setting {sorted(unknown)}; known are {sorted(cls.__dataclass_fields__)}")
        return replace(sizes[size], **changes)


def _transfer(
    title: str,
    first: Examples,
    second: tuple[Examples, Examples],
    model: Callable[..., nn.Module],
    link: Link,
    seed: int,
    data_seed: int,
    sizes: Sizes,
) -> Experiment:
    """Two SGD stages of the same architecture; the finetuned head starts at zero."""
    train, test = second
    stages = []
    parts = ("pretrain", first, sizes.pretraining), ("finetune", train, sizes.finetuning)
    for k, (name, data, n) in enumerate(parts):
        recipe = SGD(
            sizes.lr,
            epochs=sizes.epochs[k],
            batch_size=sizes.batch_size[k],
            schedule="linear",
            warmup=20,
            seed=2 * seed + k,
        )
        net = model(classes=len(data.classes), seed=seed, zero_head=k == 1).to(data.x.dtype)
        some = data.select(n=n, seed=data_seed)
        stages.append(Stage(name, net, some, weight_decay=sizes.weight_decay, recipe=recipe, link=link if k else None))
    return Experiment(title, Pipeline(stages), test.select(n=sizes.queries, seed=data_seed), test)


def digits(
    link: Link, *, size: str = "live", seed: int = 0, data_seed: int = 0, net: str = "tanh", **changes
) -> Experiment:
    """Bundled 8 × 8 digits, 0–3 → 4–9, a small MLP in float64; no download.

    Args:
        link: `Frozen()`, `WarmStart()` or `Proximal(alpha)`.
        size: ``"live"`` for lessons, ``"large"`` for the results files.
        seed: of initial weights and batches.
        data_seed: of the choice of examples.
        net: ``"tanh"``, or ``"silu"`` (convolutional nets then have GroupNorm too).
        changes: any of `Sizes`, e.g. ``epochs=(20, 20)``.

    >>> digits(Frozen()).title
    'digits 0–3 → 4–9'
    """
    train, test = load_digits(dtype=torch.float64)
    new = tuple(half.select(range(4, 10)) for half in (train, test))
    sizes = Sizes.of(size, {"live": Sizes(400, 200, epochs=(8, 8)), "large": Sizes(400, 200, epochs=(8, 8))}, changes)

    def model(**settings):
        return mlp(64, hidden=(16,), activation=_net(net)["activation"], **settings)

    return _transfer("digits 0–3 → 4–9", train.select(range(4)), new, model, link, seed, data_seed, sizes)


def _net(name: str) -> dict:
    if name not in NETS:
        raise ValueError(f"net={name!r} must be one of {sorted(NETS)}")
    return NETS[name]


def _conv(shape, net: str) -> Callable[..., nn.Module]:
    settings = _net(net)
    return lambda **more: convnet(shape, **settings, **more)


MNIST_SIZES = {
    "live": Sizes(600, 300),
    "large": Sizes(2000, 600, epochs=(6, 12), batch_size=(100, 50)),
}
CIFAR_SIZES = {
    "live": Sizes(600, 300, lr=0.05, epochs=(6, 6)),
    "large": Sizes(2000, 600, lr=0.05, epochs=(5, 10), batch_size=(100, 50)),
}


def mnist(
    link: Link, *, size: str = "live", seed: int = 0, data_seed: int = 0, net: str = "tanh", root=None, **changes
) -> Experiment:
    """MNIST 0–3 → 4–9 at 14 × 14 pixels: the paper's four pretraining classes, the other six to finetune.

    Arguments as in `digits`; ``root`` as in `load_mnist`.
    """
    (train, _), new = (load_mnist(root, classes=c, pool=2, dtype=torch.float32) for c in (range(4), range(4, 10)))
    sizes = Sizes.of(size, MNIST_SIZES, changes)
    return _transfer("MNIST 0–3 → 4–9", train, new, _conv((1, 14, 14), net), link, seed, data_seed, sizes)


def mnist_to_digits(
    link: Link, *, size: str = "live", seed: int = 0, data_seed: int = 0, net: str = "tanh", root=None, **changes
) -> Experiment:
    """A real shift: all ten MNIST digits → the ten of the bundled set, other hands and another scanner, enlarged
    from 8 × 8 to 14 × 14 pixels. Arguments as in `mnist`."""
    train, _ = load_mnist(root, pool=2, dtype=torch.float32)
    halves = load_digits(dtype=torch.float32)
    large = [nn.functional.interpolate(half.x, size=(14, 14), mode="bilinear") for half in halves]
    new = tuple(Examples(x, half.y, half.ids, classes=half.classes) for x, half in zip(large, halves, strict=True))
    sizes = Sizes.of(size, MNIST_SIZES, changes)
    return _transfer("MNIST → other digits", train, new, _conv((1, 14, 14), net), link, seed, data_seed, sizes)


def _cifar(title, first, second, link, size, seed, data_seed, net, root, changes) -> Experiment:
    (train, _), new = (load_cifar10(root, classes=c, pool=2, dtype=torch.float32) for c in (first, second))
    sizes = Sizes.of(size, CIFAR_SIZES, changes)
    return _transfer(title, train, new, _conv((3, 16, 16), net), link, seed, data_seed, sizes)


def cifar(
    link: Link, *, size: str = "live", seed: int = 0, data_seed: int = 0, net: str = "tanh", root=None, **changes
) -> Experiment:
    """CIFAR-10 bird / frog → automobile / deer at 16 × 16 pixels: the paper's two pretraining classes.

    Arguments as in `mnist`.
    """
    title, first, second = "CIFAR-10 bird/frog → automobile/deer", ("bird", "frog"), ("automobile", "deer")
    return _cifar(title, first, second, link, size, seed, data_seed, net, root, changes)


def cifar_vehicles(
    link: Link, *, size: str = "live", seed: int = 0, data_seed: int = 0, net: str = "tanh", root=None, **changes
) -> Experiment:
    """A harder, natural transfer: the six animals of CIFAR-10 → its four vehicles. Arguments as in `mnist`."""
    return _cifar("CIFAR-10 animals → vehicles", ANIMALS, VEHICLES, link, size, seed, data_seed, net, root, changes)


SETTINGS = {
    "digits": digits,
    "mnist": mnist,
    "mnist_to_digits": mnist_to_digits,
    "cifar": cifar,
    "cifar_vehicles": cifar_vehicles,
}


# --- every method on one setting -----------------------------------------------------------------------


def implicit(experiment: Experiment) -> Influence:
    """The paper's formula at the weights where SGD stopped: GGN, no damping, warm starts read as proximal.

    The curvature of a stage that is not at a minimum has no inverse to speak of but the GGN's, and
    `SGD.equivalent_alpha` is the coupling that resembles so many steps.
    """
    pipeline = experiment.pipeline
    stages = [replace(s) for s in pipeline.stages]
    for stage in stages:
        if isinstance(stage.link, WarmStart):
            stage.link = Proximal(stage.recipe.equivalent_alpha(len(stage.data)), stage.link.shared)
    copy = pipeline if stages == pipeline.stages else Pipeline(stages).adopt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # not at a minimum: that is what is being shown
        return ImplicitInfluence(Exact("4GB"), curvature="ggn").fit(copy).score(experiment.queries)


def run(
    experiment: Experiment,
    *,
    removals: int = 40,
    kinds: Sequence[str] = tuple(REMOVALS),
    baselines: bool = True,
    folder=None,
    progress: bool = True,
) -> tuple[dict, dict[str, Effects]]:
    """Fit one experiment, remove examples for real, and score them by every method.

    Args:
        experiment: from one of the builders.
        removals: how many of each kind, drawn at random, the same for every seed of training.
        kinds: of `REMOVALS`: single examples and random groups of 2 % and 10 %.
        baselines: also those of `all_baselines`.
        folder: keep retrainings here and resume from it.
        progress: show bars.

    Returns:
        scores by method (``(method, kind)`` where they are for one kind of removal) and effects by kind, as
        `compare_methods` takes them.
    """
    pipeline, queries = experiment.pipeline.fit(progress), experiment.queries
    m = len(pipeline.stages[0].data)
    key = digest(*pipeline.trained())[:12]
    effects = {}
    for kind in kinds:
        groups = random_removals(m, removals, REMOVALS[kind])
        store = None if folder is None else Path(folder) / f"{key}-{kind.replace(' %', '')}.safetensors"
        effects[kind] = removal_effects(pipeline, queries, groups, store=store, progress=progress)
    scores = {"unrolled": UnrolledInfluence().fit(pipeline, progress).score(queries, progress=progress)}
    for kind in kinds:
        if REMOVALS[kind]:
            method = UnrolledInfluence(group_fraction=REMOVALS[kind]).fit(pipeline, progress)
            scores["unrolled, for groups", kind] = method.score(queries, progress=progress)
    scores["implicit, GGN"] = implicit(experiment)
    for name, method in (all_baselines(Exact("4GB")) if baselines else {}).items():
        scores[name] = method.fit(pipeline).score(queries)
    return scores, effects


def study(
    setting: str,
    *,
    links: Sequence[str] = tuple(LINKS),
    seeds: int = 3,
    removals: int = 40,
    size: str = "large",
    folder=None,
    n_jobs: int = 1,
    **changes,
):
    """Every method against real retraining in one setting: links × seeds of training, pooled over seeds.

    Args:
        setting: a name in `SETTINGS`.
        links: names in `LINKS`.
        seeds: how many seeds of initial weights and batches; data, queries and removals stay the same, so that
            the noise ceiling compares like with like.
        removals, folder: as in `run`.
        size, changes: as in the builders.
        n_jobs: processes, one for each link and seed.

    Returns:
        the table of `compare_methods` with the noise ceiling, and for each link its title, sizes, seeds and accuracy.
    """
    import pandas

    def one(link, seed):
        experiment = SETTINGS[setting](LINKS[link], size=size, seed=seed, **changes)
        scores, effects = run(experiment, removals=removals, folder=folder, progress=False)
        return scores, effects, experiment.accuracy(), [len(s.data) for s in experiment.pipeline.stages]

    jobs = (joblib.delayed(one)(link, seed) for link in links for seed in range(seeds))
    done = joblib.Parallel(n_jobs)(jobs)
    tables = []
    for i, link in enumerate(links):
        scores, effects, accuracies, counts = zip(*done[i * seeds : (i + 1) * seeds], strict=True)
        by_kind = {kind: [e[kind] for e in effects] for kind in effects[0]}
        table = compare_methods({name: [s[name] for s in scores] for name in scores[0]}, by_kind)
        if seeds > 1:
            table = pandas.concat([table, noise_ceiling(by_kind)])
        facts = {
            "setting": setting,
            "link": link,
            "seeds": seeds,
            "count": removals,
            "accuracy": sum(accuracies) / seeds,
        }
        facts |= {"pretraining": counts[0][0], "finetuning": counts[0][1]}
        tables.append(table.assign(**facts))
    return pandas.concat(tables, ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one CSV a setting."""
    parser = argparse.ArgumentParser(prog="python -m msif_lab.experiments", description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--removals", type=int, default=40, help="of each kind: single examples, 2 %%, 10 %%")
    parser.add_argument("--size", default="large", help="live or large")
    parser.add_argument("--jobs", type=int, default=1, help="processes; a gigabyte or two each")
    parser.add_argument("--out", type=Path, required=True, help="folder for SETTING.csv; retrainings resume from here")
    given = parser.parse_args(arguments)
    for setting in given.settings:
        store = given.out / "retrainings" / setting
        store.mkdir(parents=True, exist_ok=True)
        table = study(
            setting, seeds=given.seeds, removals=given.removals, size=given.size, folder=store, n_jobs=given.jobs
        )
        path = given.out / f"{setting}.csv"
        write_bytes(path, table.to_csv(index=False, float_format="%.4g").encode())
        print(f"{path}: {len(table)} rows")


if __name__ == "__main__":
    main()
