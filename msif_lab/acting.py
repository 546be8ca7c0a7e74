"""Acting on scores: which pretraining examples to drop for a finetuning task, and what it changes.

    python -m msif_lab.acting digits mnist cifar cifar10n planted --out notebooks/results

For each setting, noise and link: pretraining labels are wrong, by design or by human hand; rankings
say which examples to remove first; all stages are retrained on fresh seeds without them. One table
holds what each ranking detects, what each action brings to the finetuning task, to another task
finetuned from the same pretraining and to pretraining itself, and how stable rankings are. In
``planted`` nothing is mislabelled: a group of examples hurts one task and helps another.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .arguments import check_choice
from .data.corruption import flip_labels, plant
from .data.datasets import load_cifar10, load_cifar10_labels, load_digits, load_mnist
from .data.examples import Examples
from .evaluation.curation import Interventions, intervene
from .evaluation.guidance import guided
from .evaluation.rankings import controls, detection, predicted_gain, stability
from .experiments import ANIMALS, LINKS, VEHICLES
from .influence.averaged import AveragedInfluence, InfluenceOverSeeds
from .influence.unrolled import UnrolledInfluence
from .objective.models import convnet, mlp
from .pipeline.pipeline import Pipeline
from .pipeline.recipes import SGD
from .pipeline.seeds import SeedRuns, over_seeds
from .pipeline.stages import Stage
from .storage import write_bytes

__all__ = ["SETTINGS", "Setting", "study"]

SCORING = 8  # seeds that make the scores
FRESH = tuple(range(100, 106))  # seeds that judge
OURS = "influence"
NOISES = {"10 %": 0.1, "20 %": 0.2}
HUMAN = {"rater": "rater1", "worst": "worst"}
PLANTED = ("for odd", "for above 6")


@dataclass
class Setting:
    """Pretraining with some wrong labels, a task finetuned from it, and another one.

    Attributes:
        pretraining, truth: examples, and which of them are wrong, or planted ``(N,)``.
        clean: the right labels ``(N,)``; None where examples are what is wrong.
        held_out: of the pretraining task.
        tasks: by name the finetuning examples, those that choose, and those that judge; the first
            task is the one that is scored.
        model: ``model(classes=..., seed=..., zero_head=...)``.
        lr, epochs, batch_size: of `SGD` with linear decay.
        fractions: of the pretraining data that are acted on.
    """

    pretraining: Examples
    truth: Tensor
    clean: Tensor | None
    held_out: Examples
    tasks: dict[str, tuple[Examples, Examples, Examples]]
    model: Callable[..., nn.Module]
    lr: float
    epochs: tuple[int, int] = (6, 8)
    batch_size: int = 50
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)

    def stage(self, name: str, data: Examples, k: int, seed: int, link=None) -> Stage:
        """One stage as `experiments` builds them; the finetuned head starts at zero."""
        net = self.model(classes=len(data.classes), seed=seed, zero_head=k == 1).to(data.x.dtype)
        settings = {"schedule": "linear", "warmup": 20, "seed": 2 * seed + k}
        recipe = SGD(self.lr, epochs=self.epochs[k], batch_size=self.batch_size, **settings)
        return Stage(name, net, data, weight_decay=1e-3, link=link, recipe=recipe)

    def build(self, link: str, seed: int, task: str | None = None) -> Pipeline:
        """The pipeline of a seed; default the first task."""
        task = task or next(iter(self.tasks))
        last = self.stage(task, self.tasks[task][0], 1, seed, LINKS[link])
        return Pipeline([self.stage("pretrain", self.pretraining, 0, seed), last])


def _apart(examples: Examples, count: int, more: int, seed: int) -> tuple[Examples, Examples]:
    """Two selections, balanced over classes, that share no example."""
    first = examples.select(n=count, seed=seed)
    rest = examples[~torch.isin(examples.ids, first.ids)]
    return first, rest.select(n=more, seed=seed)


def _judging(test: Examples) -> Examples:
    """A thousand test examples, with ids of their own: both parts of a data set count from 0."""
    test = test.select(n=1000, seed=0)
    return Examples(test.x, test.y, test.ids + 10**6, classes=test.classes)


def _flipped(load, noise: str, classes, tasks, counts, **settings) -> Setting:
    """Pretraining on some classes with flipped labels, tasks on others.

    Args:
        load: ``load(classes)`` → training and test examples.
        counts: of pretraining, finetuning and validation examples.
    """
    check_choice("noise", noise, NOISES)
    train, held_out = load(classes)
    clean = train.select(n=counts[0], seed=0)
    spoilt, truth = flip_labels(clean, NOISES[noise], seed=0)
    parts = {}
    for names in tasks:
        train, test = load(names)
        parts["–".join(map(str, (names[0], names[-1])))] = *_apart(train, *counts[1:], 0), test
    return Setting(spoilt, truth, clean.y, held_out, parts, **settings)


def _digits(noise: str) -> Setting:
    train, test = load_digits(dtype=torch.float64)

    def load(classes):
        return train.select(classes), test.select(classes)

    tasks, counts = (range(4, 7), range(7, 10)), (400, 100, 200)
    model = partial(mlp, 64, hidden=(16,))
    return _flipped(load, noise, range(4), tasks, counts, model=model, lr=0.1, epochs=(8, 8))


def _mnist(noise: str) -> Setting:
    def load(classes):
        train, test = load_mnist(classes=classes, pool=2, dtype=torch.float32)
        return train, _judging(test)

    tasks, counts = (range(4, 7), range(7, 10)), (1000, 200, 400)
    model = partial(convnet, (1, 14, 14))
    return _flipped(load, noise, range(4), tasks, counts, model=model, lr=0.05)


def _images(classes, **settings):
    train, test = load_cifar10(classes=classes, pool=2, dtype=torch.float32, **settings)
    return train, _judging(test)


def _cifar(noise: str) -> Setting:
    tasks, counts = (("airplane", "automobile"), ("ship", "truck")), (1500, 200, 400)
    settings = {"model": partial(convnet, (3, 16, 16)), "lr": 0.03, "fractions": (0.1, 0.3, 0.5)}
    return _flipped(_images, noise, ANIMALS, tasks, counts, **settings)


def _cifar10n(noise: str) -> Setting:
    """Human labels: of 4,000 animals those that the annotator took for one of the six."""
    check_choice("noise", noise, HUMAN)
    train, held_out = _images(ANIMALS)
    drawn, rest = _apart(train, 4000, 4000, 0)
    human = load_cifar10_labels(drawn, HUMAN[noise])
    kept = drawn[human >= 0]
    noisy = kept.with_labels(human[human >= 0])
    vehicles, test = _images(VEHICLES)
    pets = rest.select(("cat", "dog"))
    pets_test = held_out.select(("cat", "dog"))
    tasks = {
        "vehicles": (*_apart(vehicles, 400, 400, 0), test),
        "cat–dog": (*_apart(pets, 200, 200, 0), pets_test),
    }
    model = partial(convnet, (3, 16, 16))
    settings = {"model": model, "lr": 0.03, "fractions": (0.1, 0.3, 0.5)}
    return Setting(noisy, noisy.y != kept.y, kept.y, held_out, tasks, **settings)


def _planted(noise: str) -> Setting:
    """A group that hurts one task and helps another: digits 4–9 labelled by size alone.

    That they are all one of two kinds is what the task "above 6" asks, and hides what "odd" does.

    Args:
        noise: ``"for odd"``, where it hurts, or ``"for above 6"``: the task that is scored.
    """
    check_choice("noise", noise, PLANTED)
    train, test = load_digits(dtype=torch.float64)
    new, held_out = train.select(range(4, 10)), test.select(range(4, 10))
    fine, chooses = _apart(new, 120, 200, 0)
    rest = new[~torch.isin(new.ids, torch.cat([fine.ids, chooses.ids]))]
    group = rest.select(n=120, seed=1)

    def asked(examples: Examples, question: Callable, classes=(0, 1)) -> Examples:
        digit = torch.tensor(examples.classes)[examples.y]
        return Examples(examples.x, question(digit).long(), examples.ids, classes=classes)

    questions = {"odd": lambda digit: digit % 2, "above 6": lambda digit: digit > 6}
    names = list(questions) if noise == PLANTED[0] else list(questions)[::-1]
    tasks = {
        name: tuple(asked(part, questions[name]) for part in (fine, chooses, held_out))
        for name in names
    }
    first = train.select(range(4), n=200, seed=0)
    as_one_or_two = asked(group, lambda digit: 1 + (digit > 6).long(), first.classes)
    pretraining, truth = plant(first, as_one_or_two)
    model, of = partial(mlp, 64, hidden=(16,)), test.select(range(4))
    settings = {"model": model, "lr": 0.1, "epochs": (8, 4)}
    return Setting(pretraining, truth, None, of, tasks, **settings)


SETTINGS = {
    "digits": (_digits, tuple(NOISES)),
    "mnist": (_mnist, tuple(NOISES)),
    "cifar": (_cifar, tuple(NOISES)),
    "cifar10n": (_cifar10n, tuple(HUMAN)),
    "planted": (_planted, PLANTED),
}


def rankings(
    setting: Setting, link: str, runs: SeedRuns, validation: Examples
) -> tuple[dict[str, object], InfluenceOverSeeds]:
    """All rankings of the pretraining examples by name, and ours before it is one."""
    method = AveragedInfluence(UnrolledInfluence(trust=0), lanes=SCORING)
    scores = method.fit(runs).score(validation, aggregate="mean", progress=False)
    found = {OURS: scores, f"{OURS}, one seed": scores.some([0])}
    names = ["random", "loss", "margin", "entropy", "gradient norm", "self-influence"]
    names += ["similarity", "gradient dot", "TRAK", "loss, out of fold", "oracle"]
    try:
        import cleanlab  # noqa: F401

        names.append("cleanlab")
    except ImportError:
        print("cleanlab is not installed, so its score is left out")
    return found | controls(runs, validation, names, truth=setting.truth), scores


def study(name: str, noise: str, link: str, *, fresh: Sequence[int] = FRESH, folder=None):
    """Everything about one setting, noise and link, as one tidy pandas table.

    Args:
        name, noise: of `SETTINGS`.
        link: of `experiments.LINKS`.
        fresh: seeds of the runs that judge.
        folder: where runs are kept, so that the same call goes on.

    Returns:
        a table with the columns kind, method, action, fraction, chosen, task, measure, against,
        value, change, low, high, predicted, predicted_error, and the setting's. Of the kinds,
        ``"detection"`` has a value with its interval for each ranking, ``"change"`` the mean over
        fresh seeds with its paired interval, ``"gain"`` what is promised before any retraining,
        ``"stability"`` the median over pairs.
    """
    import pandas

    check_choice("name", name, SETTINGS)
    start = time.perf_counter()
    setting = SETTINGS[name][0](noise)
    build = partial(setting.build, link)
    store = None if folder is None else Path(folder)
    runs = over_seeds(build, range(SCORING), lanes=SCORING, store=store, progress=False)
    task, other = setting.tasks
    _, validation, test = setting.tasks[task]
    ranked, scores = rankings(setting, link, runs, validation)
    tables = [_detected(ranked, setting.truth), _promised(scores, setting, runs, validation)]
    tables.append(_stable(scores, ranked))

    asked = {"test": test, "validation": validation, "seeds": fresh, "progress": False}
    side = setting.stage(other, setting.tasks[other][0], 1, 0, LINKS[link])
    asked |= {"held_out": setting.held_out, "other_tasks": {other: (side, setting.tasks[other][2])}}
    removed = intervene(build, ranked, fraction=setting.fractions, **asked)
    tables.append(_changed(removed, (OURS, "random", "loss")))
    share = float(setting.truth.double().mean())
    if setting.clean is not None:
        right = {"labels corrected": setting.truth.double()}
        how = {"action": "relabel", "labels": setting.clean, "fraction": share}
        tables.append(_changed(intervene(build, right, **how, **asked)))
    weights = guided(runs, validation, progress=False).weights.double()
    level = torch.full_like(weights, float(weights.mean()))
    for label, weight in (("guided weights", weights), ("all weights alike", level)):
        each = {label: torch.rand(len(weights))}
        done = intervene(build, each, action="reweight", weight=weight, fraction=1.0, **asked)
        tables.append(_changed(done))
    about = {"setting": name, "noise": noise, "link": link, "count": len(setting.pretraining)}
    about |= {"wrong": share, "seeds": len(fresh), "seconds": time.perf_counter() - start}
    return pandas.concat(tables, ignore_index=True).assign(**about)


def _detected(ranked: Mapping[str, object], truth: Tensor):
    """What each ranking detects."""
    import pandas

    rows = []
    for name, ranking in ranked.items():
        if name == "oracle":
            continue
        found = detection(ranking, truth)
        for measure, (low, high) in found.intervals.items():
            value = getattr(found, measure)
            rows.append(("detection", name, measure, value, low, high))
    return pandas.DataFrame(rows, columns=["kind", "method", "measure", "value", "low", "high"])


def _promised(scores: InfluenceOverSeeds, setting: Setting, runs: SeedRuns, validation: Examples):
    """What removal promises before any retraining."""
    losses = runs.evaluate(validation, aggregate="mean")[:, 0]
    table = predicted_gain(scores, setting.fractions, losses=losses)
    table = table.melt(["fraction", "count"], var_name="measure").drop(columns="count")
    return table.assign(kind="gain", method=OURS, action="remove")


def _stable(scores: InfluenceOverSeeds, ranked: Mapping[str, object]):
    """How far rankings agree from seed to seed, and halves of the seeds with one another."""
    half = SCORING // 2
    halves = {i: scores.some(range(i * half, (i + 1) * half)) for i in range(2)}
    names = [OURS, "gradient dot", "similarity", "loss"]
    pairs = stability(
        {
            "seed": scores,
            f"{half} seeds": halves,
            "method": {name: ranked[name] for name in names},
        }
    )
    middle = pairs.groupby("varies")[["spearman", "overlap"]].median().reset_index()
    rows = middle.melt("varies", var_name="measure").rename(columns={"varies": "method"})
    return rows.assign(kind="stability")


def _changed(done: Interventions, closer: Sequence[str] = ()):
    """Rows of all that an action changed, beside keeping all; of the test beside others, too."""
    import pandas

    pairs = set(zip(done.table.task, done.table.measure, strict=True))
    per_class = {pair for pair in pairs if pair[1].startswith("accuracy of ")}
    tables = []
    for task, measure in sorted(pairs - per_class):
        tables.append(done.summary(task, measure).assign(task=task, measure=measure))
        tables[-1]["against"] = "keep all"
    for name in closer:
        for measure in ("loss", "accuracy"):
            table = done.summary("test", measure, against=name)
            tables.append(table.assign(task="test", measure=measure, against=name))
    frame = pandas.concat(tables, ignore_index=True).rename(columns={"ranking": "method"})
    return frame.drop(columns="count").assign(kind="change", action=done.action)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one CSV file for each setting."""
    import pandas

    parser = argparse.ArgumentParser(
        prog="python -m msif_lab.acting", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("settings", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--links", nargs="+", choices=list(LINKS), default=["frozen", "warm start"])
    parser.add_argument("--noises", nargs="+", help="default: all that the setting has")
    parser.add_argument("--seeds", type=int, default=len(FRESH), help="that judge")
    parser.add_argument("--out", type=Path, required=True, help="folder for acting_SETTING.csv")
    given = parser.parse_args(arguments)
    for name in given.settings:
        tables = []
        for noise in given.noises or SETTINGS[name][1]:
            for link in given.links:
                fresh = range(FRESH[0], FRESH[0] + given.seeds)
                tables.append(study(name, noise, link, fresh=fresh))
                text = pandas.concat(tables).to_csv(index=False, float_format="%.4g")
                path = given.out / f"acting_{name}.csv"
                write_bytes(path, text.encode())
                seconds = tables[-1].seconds.iloc[0]
                print(f"{path}: {noise}, {link}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
