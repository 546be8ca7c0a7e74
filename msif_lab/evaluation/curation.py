"""Acting on scores: remove, relabel or reweight examples, retrain, and see what else changes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import (
    check_choice,
    check_instance,
    check_number,
    check_whole,
    is_number,
    listed,
    numbers_of,
    shown,
)
from ..data.examples import Examples, Inputs
from ..errors import SavedFileError
from ..influence.averaged import InfluenceOverSeeds
from ..influence.result import Influence
from ..objective.checks import check_examples
from ..objective.objective import Objective
from ..parallel import check_jobs, each_result
from ..pipeline.origin import asked_about, share_runs, sketch
from ..pipeline.pipeline import Pipeline, Retrained
from ..pipeline.recipes import progress_bar
from ..pipeline.seeds import SeedRuns, not_fitted, redrawn_stage, seed_paths
from ..pipeline.stages import Stage
from ..storage import digest, locked, read_tensors, valid, write_tensors
from .rankings import (
    cross_fitted,
    fractions_of,
    ordered,
    out_of_fold,
    ranking_of,
    require_classes,
    weighted,
)
from .removals import largest_gradient, warn_short

__all__ = ["Interventions", "intervene"]

ACTIONS = ("remove", "relabel", "reweight", "repeat")
KEEP = "keep all"
BINS = 15  # of the calibration error, as in Guo et al. (2017)
UNKNOWN_SEEDS = 1000  # fresh seeds start here where it is not known which ones made the scores
KIND = "interventions"


@dataclass
class Interventions:
    """What acting on examples has changed, under each fresh seed, beside keeping all.

    Attributes:
        table: tidy pandas table with a row for each ranking, fraction, seed, task and measure:
            ``value``, and ``change``, the value minus that of keeping all under the same seed.
            Tasks: ``"validation"``, ``"test"``, the stage acted on (its held-out examples), other
            tasks by name. Measures: ``"loss"``, ``"accuracy"``, ``"calibration error"`` (expected,
            15 equal bins of confidence; Guo et al. 2017), ``"accuracy of CLASS"``, ``"flips"`` (the
            share of predicted classes that are not those of keeping all) and ``"shift"`` (mean
            |Δp| over examples and classes); the last two of keeping all are those between it and
            its run under another seed, mean over the others.
        predicted: for each ranking and fraction ``count``, the examples acted on, and for an
            `Influence` on the loss ``predicted``, the first-order change of its queries' mean
            loss; of two or more seeds, each judging what the others choose, with its
            ``standard_error``. NaN where it is not known.
        action: what was done.
        seeds: the fresh ones.
    """

    table: object
    predicted: object
    action: str
    seeds: list[int]

    @property
    def chosen(self) -> dict[str, float]:
        """The fraction of each ranking with the least mean validation loss; the test has no say.

        Of a single fraction it is that one. Keeping all is not among the choices.
        """
        loss = self.table[(self.table.measure == "loss") & (self.table.ranking != KEEP)]
        seen = loss[loss.task == ("validation" if "validation" in set(loss.task) else "test")]
        means = seen.groupby(["ranking", "fraction"], sort=False)["value"].mean()
        best = means.groupby("ranking", sort=False).idxmin()
        return {KEEP: 0.0} | dict(best.tolist())

    def summary(
        self,
        task: str = "test",
        measure: str = "loss",
        *,
        against: str = KEEP,
        level: float = 0.95,
    ):
        """Mean change of one measure over seeds, with its paired interval, and the prediction.

        Args:
            task, measure: as in `table`.
            against: what each run is paired with, by seed: ``"keep all"``, or a ranking at its
                chosen fraction.
            level: of Student's interval ``low`` to ``high`` of the mean over other seeds.

        Returns:
            pandas table: ranking, fraction, count, value, change, standard_error, low, high,
            predicted, predicted_error, chosen. The data that judge are taken as given: other test
            examples add their own spread.

        Raises:
            ValueError: an unknown task, measure or ranking, or a level that is none.
        """
        import pandas
        from scipy.stats import t

        check_choice("task", task, dict.fromkeys(self.table.task))
        some = self.table[self.table.task == task]
        check_choice("measure", measure, dict.fromkeys(some.measure))
        check_choice("against", against, self.chosen)
        check_number("level", level, lambda x: 0 < x < 1, "a number between 0 and 1, such as 0.95")
        some = some[some.measure == measure]
        values = some.pivot_table("value", "seed", ["ranking", "fraction"], sort=False)
        changes = values.sub(values[against, self.chosen[against]], axis=0)
        error = changes.std() / len(changes) ** 0.5
        half = t.ppf((1 + level) / 2, max(1, len(changes) - 1)) * error
        parts = {"value": values.mean(), "change": changes.mean(), "standard_error": error}
        parts |= {"low": changes.mean() - half, "high": changes.mean() + half}
        frame = pandas.DataFrame(parts).reset_index()
        known = self.predicted.rename(columns={"standard_error": "predicted_error"})
        frame = frame.merge(known, on=["ranking", "fraction"], how="left")
        if measure != "loss" or task not in ("validation", "test") or against != KEEP:
            frame[["predicted", "predicted_error"]] = float("nan")
        frame.insert(2, "count", frame.pop("count").fillna(0).astype(int))
        chosen = self.chosen
        return frame.assign(
            chosen=[chosen[r] == f for r, f in frame[["ranking", "fraction"]].values]
        )

    def best(self):
        """Each ranking at its chosen fraction: test loss and accuracy, their changes, flips."""
        frame = self.summary()
        frame = frame[frame.chosen].set_index("ranking")
        found = frame[["fraction", "value"]].rename(columns={"value": "loss"})
        found["change"] = _cells(frame, "+.4f")
        measures = set(self.table[self.table.task == "test"].measure)
        if "accuracy" in measures:
            frame = self.summary(measure="accuracy").query("chosen").set_index("ranking")
            found["accuracy"], found["its change"] = frame["value"], _cells(frame, "+.3f")
            frame = self.summary(measure="flips").query("chosen").set_index("ranking")
            found["flips"] = frame["value"]
        return found

    def _title(self) -> str:
        return (
            f"{self.action} at the fraction chosen on validation; test, mean of {len(self.seeds)} "
            "fresh seeds, 95 % interval of the paired change"
        )

    def __str__(self) -> str:
        return f"{self._title()}\n{self.best().to_string(float_format='{:.3f}'.format)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{self._title()}</p>{self.best().to_html(float_format='{:.3f}'.format)}"


def _cells(frame, form: str) -> list[str]:
    """Change and interval as text; nothing for what the others are compared with."""
    numbers = frame[["change", "low", "high"]].itertuples(index=False)
    cells = [f"{c:{form}} [{low:{form}}, {high:{form}}]" for c, low, high in numbers]
    return ["" if name == KEEP else cell for name, cell in zip(frame.index, cells, strict=True)]


@dataclass
class _Plan:
    """What every seed does: A ways to act, of which the first keeps all.

    Attributes:
        k: the stage acted on.
        arms: name of the ranking and fraction of each way.
        first: positions of the examples that each acts on.
        weights: ``(A, N)`` example weights.
        relabel: whether labels change instead, to ``labels`` or out-of-fold predictions.
        judged: by task the other task it belongs to (or None), the stage and the examples.
        lanes: how many ways are retrained at once.
    """

    k: int
    arms: list[tuple[str, float]]
    first: list[Tensor]
    weights: Tensor
    relabel: bool
    labels: Tensor | None
    judged: dict[str, tuple[str | None, int, Examples]]
    lanes: int

    def about(self) -> dict:
        """What results are of, but for the pipeline."""
        labels = [] if self.labels is None else [self.labels]
        acted = digest(self.weights, torch.cat(self.first), *labels)
        judged = {task: [*where[:2], where[2].digest()] for task, where in self.judged.items()}
        return {
            "acted": [acted, self.relabel],
            "arms": list(map(list, self.arms)),
            "judged": judged,
        }


def intervene(
    pipeline: Pipeline | SeedRuns | Callable[[int], Pipeline],
    ranking: Influence | Tensor | Mapping[str, object],
    *,
    test: Examples,
    validation: Examples | None = None,
    action: str = "remove",
    fraction: float | Sequence[float] = 0.1,
    weight=None,
    labels=None,
    seeds: int | Iterable[int] = 5,
    stage: int | str = 0,
    other_tasks: Mapping[str, tuple[Stage, Examples]] | None = None,
    held_out: Examples | None = None,
    n_jobs: int = 1,
    lanes: int = 32,
    store=None,
    progress: bool = True,
) -> Interventions:
    """Act on the examples that a ranking puts first, retrain all stages on fresh seeds, compare.

    Validation data choose, test data judge: of each ranking's fractions the one with the least
    validation loss is `Interventions.chosen`. All rankings and fractions share the seeds and one
    run that keeps all, so that changes are paired. As in `Pipeline.retrain`, weights change
    neither the 1/m nor the batches.

    Args:
        pipeline: whose initial weights and batches are drawn anew for each seed, as `over_seeds`
            does it; runs that made the scores; or a function of the seed that makes a pipeline.
        ranking: an `Influence`, whose most harmful examples on the mean query come first (for
            ``"repeat"`` the most helpful), or numbers ``(N,)``, larger first; or several by name,
            such as those of `controls`.
        test: judges; examples of the last stage's task.
        validation: chooses among several fractions; shares no example with ``test``.
        action: ``"remove"`` (weight 0), ``"reweight"`` (to ``weight``), ``"repeat"`` (``weight``
            times, default 2) or ``"relabel"`` (to ``labels``).
        fraction: of the stage's examples that are acted on, one share or several.
        weight: one number, or one for each example ``(N,)``, which those acted on get.
        labels: a label for each example, which those acted on get; default the classes that each
            seed's own models predict out of fold (`out_of_fold`).
        seeds: fresh ones, none of which made the scores; or how many.
        stage: whose examples.
        other_tasks: by name, another last stage that is trained after the same pretraining, and
            test examples of its task.
        held_out: examples of the acted-on stage's own task that judge that stage's model.
        n_jobs: processes through joblib, each with some of the seeds.
        lanes: how many retrainings a process does at once, vectorised over models; relabelled data
            are retrained one by one.
        store: a folder that keeps each seed's results; the same call goes on from it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError, TypeError: seeds that made the scores, validation and test that share examples
            or scores that asked about the test, rankings of other examples, NaN, unknown actions,
            fractions of no example or all.
        SavedFileError: ``store`` holds other interventions, or damaged files.

    Warns:
        ConvergenceWarning: a recipe with a tolerance missed it in some retraining.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2)
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10), train[:200], recipe=recipe)
    >>> rankings = {"random": torch.rand(200), "last": torch.arange(200)}
    >>> report = msif.intervene(msif.Pipeline([stage]), rankings, test=test, seeds=3)
    >>> report.summary(measure="accuracy")[["ranking", "fraction", "count"]].values.tolist()
    [['keep all', 0.0, 0], ['random', 0.1, 20], ['last', 0.1, 20]]
    """
    if not isinstance(pipeline, Pipeline | SeedRuns) and not callable(pipeline):
        raise TypeError(
            f"pipeline={shown(pipeline)} must be a Pipeline, SeedRuns, or a function of the seed"
        )
    check_choice("action", action, ACTIONS)
    lanes, n_jobs = check_whole("lanes", lanes), check_jobs(n_jobs)
    rankings = dict(ranking) if isinstance(ranking, Mapping) else {"ranking": ranking}
    if not rankings or KEEP in rankings or not all(isinstance(name, str) for name in rankings):
        raise ValueError(f"ranking={shown(ranking)} must name one or more, none of them {KEEP!r}")
    seeds = _fresh(pipeline, rankings, seeds)
    base = pipeline[0] if isinstance(pipeline, SeedRuns) else pipeline
    runs = not_fitted(base, seeds)
    k = runs[0].index(stage)
    acted = runs[0].stages[k]
    weight = _checked_weight(action, weight, len(acted.data))
    labels = _checked_labels(action, labels, acted)
    branches = [_branches(other_tasks, k, run, seed) for run, seed in zip(runs, seeds, strict=True)]
    judged = _judged(runs[0], k, test, validation, held_out, other_tasks or {}, branches[0])
    most = 1 - 1 / len(acted.data) if action == "remove" else 1.0
    fractions = fractions_of(fraction, len(acted.data), most)
    if len(fractions) > 1 and validation is None:
        raise ValueError(
            f"fraction={shown(fraction)} are several, and test data may not choose among them; "
            "give validation="
        )
    orders = {}
    for name, given in rankings.items():
        values = ranking_of(f"ranking[{name!r}]", given, acted.data, acted.name)
        orders[name] = ordered(-values if _upwards(action, given) else values)
        if isinstance(given, Influence) and asked_about(given.origin, given.query_ids, test):
            raise ValueError(
                f"ranking[{name!r}] holds scores on queries of test, which then judge their own "
                "choice; score validation examples"
            )
    plan = _plan(k, orders, fractions, action, weight, labels, judged, lanes)
    values, names = _measured(runs, branches, plan, seeds, rankings, n_jobs, store, progress)
    predicted = _predictions(rankings, plan, action, weight)
    return Interventions(_table(plan.arms, seeds, names, values), predicted, action, seeds)


# ---- What is asked for, checked ----


def _fresh(pipeline, rankings: Mapping, seeds) -> list[int]:
    """The seeds to retrain on, none of which the scores have seen."""
    seen = set(pipeline.seeds) if isinstance(pipeline, SeedRuns) else set()
    for given in rankings.values():
        seen |= set(given.seeds) if isinstance(given, InfluenceOverSeeds) else set()
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        count = check_whole("seeds", seeds, why="or several seeds")
        start = max(seen, default=UNKNOWN_SEEDS - 1) + 1
        return list(range(start, start + count))
    seeds = listed("seeds", seeds, "fresh seeds, or how many")
    if not seeds or len(set(map(str, seeds))) != len(seeds):
        raise ValueError(f"seeds={shown(seeds)} must be one or more different whole numbers")
    seeds = [check_whole("seeds", seed, 0) for seed in seeds]
    if used := sorted(seen & set(seeds)):
        raise ValueError(
            f"seeds {used} made the scores, which would be judged by what they were fitted to; "
            f"give others, such as range({max(seen) + 1}, {max(seen) + 6})"
        )
    return seeds


def _upwards(action: str, given) -> bool:
    """Whether the action takes the other end of a ranking: repeating the most helpful."""
    return action == "repeat" and isinstance(given, Influence)


def _checked_weight(action: str, given, m: int) -> float | Tensor:
    """What the examples acted on weigh."""
    if action in ("remove", "relabel"):
        if given is not None:
            raise ValueError(f"weight={shown(given)} has no meaning for action={action!r}")
        return 0.0 if action == "remove" else 1.0
    if action == "repeat":
        return float(check_whole("weight", given, 2, none="twice") or 2)
    what = f"zero or positive: one number, or one for each of the {m} examples"
    if is_number(given):
        return float(check_number("weight", given, lambda w: 0 <= w < float("inf"), what))
    weight = numbers_of("weight", given, what).cpu().double()
    if weight.shape != (m,) or not bool(torch.isfinite(weight).all() & (weight >= 0).all()):
        raise ValueError(f"weight={shown(given)} must be {what}, finite")
    return weight


def _checked_labels(action: str, given, stage: Stage) -> Tensor | None:
    """The new label of each example, if they are given."""
    if action != "relabel":
        if given is not None:
            raise ValueError(f"labels={shown(given)} have no meaning for action={action!r}")
        return None
    data = stage.data
    if given is None:
        require_classes(data, f"stage {stage.name!r}", "labels=None, out-of-fold predictions, need")
        return None
    labels = numbers_of("labels", given, "one for each example").to(data.y.device)
    most = f", whole numbers below {len(data.classes)}" if data.has_labels else ""
    whole = labels.is_floating_point() == data.y.is_floating_point()
    fine = labels.shape == data.y.shape and whole and labels.dtype != torch.bool
    if not fine or (
        data.has_labels and not 0 <= int(labels.min()) <= int(labels.max()) < len(data.classes)
    ):
        raise ValueError(
            f"labels={shown(given)} must be one for each example, {tuple(data.y.shape)}{most}"
        )
    return labels.to(data.y.dtype)


def _branches(given, k: int, run: Pipeline, seed: int) -> dict[str, Pipeline]:
    """The pipelines of other tasks, which share all stages with this seed's run but the last."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"other_tasks={shown(given)} must be a dictionary: name to (stage, test)")
    last = len(run.stages) - 1
    if given and k == last:
        raise ValueError(
            f"other_tasks follow the stages before the last, and stage {run.stages[k].name!r}, "
            "which is acted on, is the last; leave them out"
        )
    found = {}
    for name, pair in given.items():
        pair = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        if not isinstance(pair[0], Stage) or not isinstance(pair[1], Examples):
            raise TypeError(
                f"other_tasks[{name!r}]={shown(given[name])} must be a pair: the last Stage of "
                "that task, and test Examples"
            )
        own = redrawn_stage(pair[0], seed * (last + 1) + last)
        found[name] = Pipeline([*run.stages[:-1], own])
    return found


def _judged(
    run: Pipeline, k: int, test, validation, held_out, other_tasks: Mapping, branches: Mapping
) -> dict[str, tuple[str | None, int, Examples]]:
    """By task its other task or None, the stage whose model answers, and the examples."""
    last = len(run.stages) - 1
    asked = [
        ("validation", "validation", None, last, validation),
        ("test", "test", None, last, test),
        (run.stages[k].name, "held_out", None, k, held_out),
        *((n, f"other_tasks[{n!r}]", n, last, other_tasks[n][1]) for n in other_tasks),
    ]
    found: dict[str, tuple[str | None, int, Examples]] = {}
    for task, what, other, at, examples in asked:
        if examples is None and task != "test":
            continue
        if task in found:
            raise ValueError(f"{what} gives the table a second task {task!r}; rename its stage")
        check_instance(what, examples, Examples)
        check_examples((branches[other] if other else run).objective(at), examples, what)
        found[task] = other, at, examples
    if validation is not None:
        _require_apart(validation, test)
    return found


def _require_apart(validation: Examples, test: Examples) -> None:
    """Refuse validation and test that share an id, or an input bit for bit."""
    shared = sorted(set(validation.ids.tolist()) & set(test.ids.tolist()))
    if shared:
        raise ValueError(
            f"validation and test share {len(shared)} ids, such as {shared[:5]}: one chooses, the "
            "other judges. Where equal ids name different examples, number them apart: "
            "Examples(x, y, ids=ids + 10**6)"
        )
    rows = [_rows(examples) for examples in (validation, test)]
    held = set(rows[1])
    twins = [i for i, row in enumerate(rows[0]) if row in held]
    if twins:
        raise ValueError(
            f"validation and test share {len(twins)} equal inputs, at positions {twins[:5]} of "
            "validation: one chooses, the other judges; leave them out of one"
        )


def _rows(examples: Examples) -> list[bytes]:
    """Each input's bytes; none of data that are read lazily, which only ids tell apart."""
    if isinstance(examples.x, Inputs):
        return []
    parts = [examples.x] if isinstance(examples.x, Tensor) else list(examples.x.values())
    flat = [part.detach().cpu().double().reshape(len(examples), -1) for part in parts]
    return [row.tobytes() for row in torch.cat(flat, 1).numpy()]


# ---- Retraining ----


def _plan(k, orders, fractions, action, weight, labels, judged, lanes) -> _Plan:
    """All ways to act, keeping all first."""
    m = len(next(iter(orders.values())))
    arms, first, weights = [(KEEP, 0.0)], [torch.zeros(0, dtype=torch.int64)], [torch.ones(m)]
    for name, order in orders.items():
        for fraction in fractions:
            arms.append((name, fraction))
            first.append(order[: round(fraction * m)])
            weights.append(weighted(order, len(first[-1]), weight))
    relabel = action == "relabel"
    return _Plan(k, arms, first, torch.stack(weights).double(), relabel, labels, judged, lanes)


def _measured(
    runs, branches, plan: _Plan, seeds, rankings, n_jobs: int, store, progress
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Every measure of every way and seed, ``(S, A, K)``, and of what task each is."""
    paths, about = seed_paths(store, seeds, "-interventions"), plan.about()
    whose = [_facts(run, others) for run, others in zip(runs, branches, strict=True)]
    found = {
        i: _read(path, about | {"pipeline": whose[i]})
        for i, path in enumerate(paths)
        if path is not None and path.exists()
    }
    left = [i for i in range(len(seeds)) if i not in found]
    kept = "nothing is kept; give store=" if store is None else f"finished seeds are in {store!s}"
    calls = [(runs[i], branches[i], plan) for i in left]
    with progress_bar(len(seeds), "seeds", progress) as bar:
        bar.update(len(found))
        for place, result in each_result(_one_seed, calls, n_jobs, lambda: kept):
            i = left[place]
            found[i] = result
            _require_unseen(result, runs[i], seeds[i], rankings)
            if paths[i] is not None:
                _write(paths[i], result, about | {"pipeline": whose[i]})
            bar.update()
    results = [found[i] for i in range(len(seeds))]
    missed = (torch.cat([r[part] for r in results]) for part in ("norms", "short"))
    warn_short(*missed, stacklevel=4)
    values = torch.stack([result["values"] for result in results])
    names = results[0]["names"]
    for task in plan.judged:
        if f"p {task}" in results[0]:
            apart = _between_seeds([result[f"p {task}"] for result in results])
            for measure, part in zip(("flips", "shift"), apart, strict=True):
                values[:, 0, names.index((task, measure))] = part
    return values, names


def _one_seed(pipeline: Pipeline, branches: Mapping[str, Pipeline], plan: _Plan) -> dict:
    """All measures of a seed ``(A, K)``; of keeping all, its probabilities and final weights."""
    kept: dict[str, Tensor] = {}
    columns: dict[tuple[str, str], list[Tensor]] = {}
    norms, short = [], []
    for again in _retrained(pipeline, plan):
        others = {name: again.with_last(branch) for name, branch in branches.items()}
        if not norms:
            weights = {f"w {k}": full[0] for k, full in enumerate(again.parameters)}
            ends = {name: torch.tensor(sketch(full)) for name, full in weights.items()}
        for one in (again, *others.values()):
            for part, total in zip(largest_gradient(one), (norms, short), strict=True):
                total.append(part)
        for task, (other, k, examples) in plan.judged.items():
            one = others[other] if other else again
            outputs = one.outputs(examples, k)
            found, p = _judge(one.pipeline.objective(k), outputs, examples)
            if p is not None:
                before = kept.setdefault(f"p {task}", p[0].cpu())
                found |= _moved(p, before.to(p))
            for measure, values in found.items():
                columns.setdefault((task, measure), []).append(values.cpu().double())
    values = torch.stack([torch.cat(parts) for parts in columns.values()], 1)
    about = {"norms": torch.cat(norms), "short": torch.cat(short), "names": list(columns)}
    return {"values": values} | about | kept | ends


def _retrained(pipeline: Pipeline, plan: _Plan) -> Iterator[Retrained]:
    """The retrainings of all ways to act, some at once, in their order."""
    k, data = plan.k, pipeline.stages[plan.k].data
    if not plan.relabel:
        for part in plan.weights.split(plan.lanes):
            yield pipeline.retrain({k: part}, progress=False)
        return
    labels = plan.labels
    if labels is None:
        labels = out_of_fold(pipeline, k).argmax(1)
    for first in plan.first:
        y = data.y.clone()
        y[first] = labels[first]
        changed = Examples(data.x, y, data.ids, classes=data.classes)
        changed.named = data.named
        stages = list(pipeline.stages)
        stages[k] = replace(stages[k], data=changed)
        yield Pipeline(stages).retrain({k: torch.ones(1, len(data))}, progress=False)


def _judge(o: Objective, outputs: Tensor, examples: Examples) -> tuple[dict, Tensor | None]:
    """Measures ``(R,)`` of outputs ``(R, M, ...)``, and of classes the probabilities."""
    y = examples.y
    found = {"loss": torch.stack([o.loss(lane, y).mean() for lane in outputs])}
    if not examples.has_labels or outputs.ndim != 3 or outputs.shape[2] < 2:
        return found, None
    p = outputs.softmax(-1)
    confidence, label = p.max(-1)
    right = (label == y).to(p)
    found |= {"accuracy": right.mean(1), "calibration error": calibration_error(confidence, right)}
    for c, name in enumerate(examples.classes):
        if bool((y == c).any()):
            found[f"accuracy of {name}"] = right[:, y == c].mean(1)
    return found, p


def calibration_error(confidence: Tensor, right: Tensor) -> Tensor:
    """Expected calibration error ``(R,)`` of confidences and hits ``(R, M)``.

    ``Σ_b (|B_b| / M) |hits in b − confidence in b|``, means over each of 15 equal bins of
    confidence.

    Reference: Guo et al. (2017, arXiv 1706.04599), equation 3.

    >>> calibration_error(torch.tensor([[0.9, 0.9, 0.6, 0.6]]), torch.tensor([[1.0, 1, 1, 0]]))
    tensor([0.1000])
    """
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(len(bins), BINS, dtype=confidence.dtype, device=confidence.device)
    return gaps.scatter_add(1, bins, right - confidence).abs().sum(1) / confidence.shape[1]


def _moved(p: Tensor, before: Tensor) -> dict[str, Tensor]:
    """How far predictions ``(..., M, C)`` are from others."""
    flips = (p.argmax(-1) != before.argmax(-1)).to(p).mean(-1)
    return {"flips": flips, "shift": (p - before).abs().mean((-2, -1))}


def _between_seeds(p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How far each seed's predictions are from those of the others on average, ``(S,)`` each."""
    apart = torch.zeros(2, len(p), len(p), dtype=torch.float64)
    for i, j in combinations(range(len(p)), 2):
        apart[:, i, j] = apart[:, j, i] = torch.stack(list(_moved(p[i], p[j]).values())).double()
    return tuple(apart.sum(2) / (len(p) - 1) if len(p) > 1 else apart[:, :, 0] * torch.nan)


def _require_unseen(result: dict, run: Pipeline, seed: int, rankings: Mapping) -> None:
    """Refuse a run that ended where one that made the scores did."""
    stages = {
        stage.name: {"weights": result[f"w {k}"].tolist()} for k, stage in enumerate(run.stages)
    }
    for name, given in rankings.items():
        if isinstance(given, Influence) and share_runs(given.origin, {"stages": stages}):
            raise ValueError(
                f"seed {seed} gives the very run that made the scores of ranking[{name!r}], which "
                "would be judged by what they were fitted to; give other seeds="
            )


# ---- Files of finished seeds ----


def _facts(run: Pipeline, branches: Mapping[str, Pipeline]) -> list[str]:
    """What identifies a seed's run and those of other tasks."""
    found = []
    for pipeline in (run, *branches.values()):
        weights = digest(*(pipeline.initial(k) for k in range(len(pipeline.stages))))
        found.append(f"{weights} {pipeline.facts()}")
    return found


def _write(path: Path, result: dict, about: dict) -> None:
    tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    with locked(path):
        write_tensors(path, KIND, tensors, {"about": about, "names": result["names"]})


def _read(path: Path, about: dict) -> dict:
    tensors, facts = read_tensors(path, KIND)
    if differ := [key for key in about if facts.get("about", {}).get(key) != about[key]]:
        raise SavedFileError(
            f"{str(path)!r} holds interventions of another call, with other {', '.join(differ)}; "
            "name another store"
        )
    with valid(path):
        names = [(task, measure) for task, measure in facts["names"]]
        if tensors["values"].shape != (len(about["arms"]), len(names)):
            raise ValueError("values have another shape")
        return tensors | {"names": names}


# ---- The result ----


def _predictions(rankings: Mapping, plan: _Plan, action: str, weight: float | Tensor):
    """First-order change of the queries' mean loss for each ranking and fraction."""
    import pandas

    rows = []
    for (name, fraction), first in list(zip(plan.arms, plan.first, strict=True))[1:]:
        given, predicted, error = rankings[name], float("nan"), float("nan")
        known = isinstance(given, Influence) and given.target == "loss"
        # Another label is another loss, whose score nobody has computed.
        if known and given.aggregate[:4] in ("", "mean") and action != "relabel":
            act = partial(_acted, k=len(first), weight=weight, turned=_upwards(action, given))
            if isinstance(given, InfluenceOverSeeds) and len(given.seeds) > 1:
                predicted, error = cross_fitted(given, act)
            else:
                row = given.mean().values[0].detach().cpu().double()
                predicted = float((act(ordered(row)) - 1) @ row)
        rows.append((name, fraction, len(first), predicted, error))
    names = ["ranking", "fraction", "count", "predicted", "standard_error"]
    return pandas.DataFrame(rows, columns=names)


def _acted(order: Tensor, k: int, weight: float | Tensor, turned: bool) -> Tensor:
    """The weights of an action on an order, from its other end where that is `_upwards`."""
    return weighted(order.flip(0) if turned else order, k, weight)


def _table(arms, seeds: Sequence[int], names: Sequence[tuple[str, str]], values: Tensor):
    """Values ``(S, A, K)`` as a tidy table."""
    import pandas

    levels = [range(len(seeds)), range(len(arms)), range(len(names))]
    s, a, j = (pandas.MultiIndex.from_product(levels).get_level_values(i) for i in range(3))
    return pandas.DataFrame(
        {
            "ranking": [arms[i][0] for i in a],
            "fraction": [arms[i][1] for i in a],
            "seed": [seeds[i] for i in s],
            "task": [names[i][0] for i in j],
            "measure": [names[i][1] for i in j],
            "value": values.reshape(-1).numpy(),
            "change": (values - values[:, :1]).reshape(-1).numpy(),
        }
    )
