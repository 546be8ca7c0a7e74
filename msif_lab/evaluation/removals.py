"""Ground truth by real retraining: what happens to the queries when examples are removed."""

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from ..arguments import (
    check_function,
    check_instance,
    check_path,
    check_seed,
    check_whole,
    is_number,
    numbers_of,
    shown,
)
from ..data.examples import Examples
from ..errors import ConvergenceWarning
from ..fingerprints import describe
from ..influence.averaged import averages, reliability
from ..influence.result import Influence
from ..objective.checks import ask
from ..objective.losses import target_name
from ..objective.questions import Question, require_finite
from ..parallel import check_jobs, each_result
from ..pipeline.origin import Origin, averaged, checked, some_runs
from ..pipeline.pipeline import Pipeline, Retrained
from ..pipeline.recipes import progress_bar
from ..pipeline.saved import former_facts
from ..pipeline.seeds import SeedRuns
from ..storage import digest, read_tensors, valid, write_tensors
from .store import RemovalStore

__all__ = ["Effects", "EffectsOverSeeds", "random_removals", "removal_effects"]

PROTOCOLS = ("same-seed", "warm-start")
# Share of the queries' loss by which going on may move them. Optima to the tolerance of other
# libraries move by up to 0.035, nets stopped early by 0.09 and more.
MOVED = 0.05
OWN_CODE = (
    "retrain with your own code and pass on what it measured: "
    "msif.Effects.from_values(before, after, subsets, stage=...)"
)


@dataclass
class Effects:
    """Actual changes of queries when examples are removed and every stage is retrained.

    Attributes:
        values: ``(Q, R)``, q after removal minus q before, in nats (or units of q).
        subsets: the R removed groups, positions in the stage's data.
        base: ``(Q,)``, q before: after a retraining that removes nobody.
        query_ids: identities of the queries ``(Q,)``.
        gradient_norm: ``(R,)``, largest ``‖∇F‖`` over the retrained stages; NaN where unknown.
        stage, target, protocol: whose examples, what q is, how the retraining was started.
        aggregate: empty for a row per query; else of what the only row is made, as in `Influence`.
        origin: of which pipeline, queries and target, as in `Influence`.
    """

    KIND: ClassVar[str] = "effects"  # of saved files

    values: Tensor
    subsets: list[list[int]]
    base: Tensor
    query_ids: Tensor
    gradient_norm: Tensor
    stage: str
    target: str
    protocol: str
    aggregate: str = ""
    origin: Origin = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        queries, removals = self.values.shape
        return (
            f"Effects({self.aggregate or f'{queries} queries'} × {removals} removals from stage "
            f"{self.stage!r}, {self.protocol})"
        )

    @classmethod
    def from_values(
        cls,
        before,
        after,
        subsets: Sequence[Sequence[int]],
        *,
        like: Influence | None = None,
        stage: str | None = None,
        query_ids=None,
        target: str | Callable = "loss",
        protocol: str = "own",
    ) -> "Effects":
        """Effects that your own training code measured, for `agreement` and everything after it.

        Your code trains all stages once on everything and once without each group, in the same way
        otherwise (same initial weights, same batches), and measures q of each query after each.

        Args:
            before: ``(Q,)``, q after training on everything.
            after: ``(Q, R)``, q after training without each group, a column for each.
            subsets: R groups of positions in the stage's data; a bare number removes one example.
            like: the scores that they will be compared with, which give all of the following; for
                one row about all queries too (``aggregate``).
            stage: without ``like``, the name of the stage whose examples were removed.
            query_ids: ``(Q,)``, the queries' ``ids``; default 0 to Q − 1, as `Examples` numbers
                them.
            target: what q is, as given to ``score``.
            protocol: in a word, how the retraining was started.

        Raises:
            ValueError, TypeError: other shapes, NaN, or groups that are none.

        >>> before, after = [0.5, 0.2], [[0.6, 0.5, 0.4], [0.2, 0.3, 0.1]]
        >>> Effects.from_values(before, after, [[3], [17], [5, 9]], stage="pretrain")
        Effects(2 queries × 3 removals from stage 'pretrain', own)
        """
        if like is not None:
            check_instance("like", like, Influence, "the scores to compare with")
        if not isinstance(protocol, str):
            raise TypeError(f"protocol={shown(protocol)} must be a word, such as 'own'")
        if not isinstance(target, str):
            check_function("target", target, "(outputs, targets) -> (B,), or its name")
        before, after = (_finite(n, v) for n, v in (("before", before), ("after", after)))
        groups = _check_subsets(subsets)
        expected = (before.numel(), len(groups))
        if before.ndim != 1 or after.shape != expected:
            turned = "; turn it: after.T" if tuple(after.shape) == expected[::-1] else ""
            raise ValueError(
                f"before {tuple(before.shape)} and after {tuple(after.shape)}: expected (Q,) and "
                f"(Q, R) with R = {len(groups)} groups in subsets, a column for each{turned}"
            )
        ids = torch.arange(len(before))
        if query_ids is not None:
            ids = numbers_of("query_ids", query_ids, "whole numbers, such as queries.ids")
        name, aggregate, origin = target_name(target), "", {}
        if like is not None:
            origin = like.origin
            ids, stage, name, aggregate = like.query_ids, like.stage, like.target, like.aggregate
        odd = ids.is_floating_point() or ids.dtype == torch.bool
        if ids.shape != before.shape or odd:
            raise ValueError(
                f"query_ids={shown(query_ids)} {tuple(ids.shape)} {ids.dtype}: expected one whole "
                f"number for each of the {len(before)} queries, such as queries.ids"
            )
        if not isinstance(stage, str):
            raise TypeError(f"stage={stage!r} must be the stage's name; or give like=scores")
        unknown = torch.full((len(groups),), torch.nan, dtype=torch.float64)
        about = stage, name, protocol, aggregate, origin
        values = after - before[:, None]
        return cls(values, groups, before, ids.cpu().long(), unknown, *about)

    def save(self, path) -> None:
        """Write to one safetensors file, all or nothing."""
        tensors = self._tensors()
        tensors["members"] = torch.cat([torch.tensor(group) for group in self.subsets])
        tensors["sizes"] = torch.tensor([len(group) for group in self.subsets])
        names = ("stage", "target", "protocol", "aggregate", "origin")
        facts = {name: getattr(self, name) for name in names}
        write_tensors(path, self.KIND, tensors, facts)

    @classmethod
    def load(cls, path) -> "Effects":
        """Read what `save` wrote; a cut-off, changed or foreign file raises `SavedFileError`."""
        tensors, facts = read_tensors(path, cls.KIND)
        with valid(path):
            if "members" in tensors:  # not in files of version 0.1.0
                members, sizes = tensors.pop("members"), tensors.pop("sizes")
                facts["subsets"] = [part.tolist() for part in members.split(sizes.tolist())]
            facts["origin"] = checked(facts.get("origin", {}))
            return cls._read(tensors, facts)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("values", "base", "query_ids", "gradient_norm")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def _read(cls, tensors: dict, facts: dict) -> "Effects":
        return cls(**tensors, **facts)

    def __post_init__(self):
        queries, removals = len(self.base), len(self.subsets)
        shapes = [tuple(t.shape) for t in (self.values, self.query_ids, self.gradient_norm)]
        if shapes != [(queries, removals), (queries,), (removals,)]:
            raise ValueError(
                f"values, query_ids and gradient_norm of shapes {shapes} do not fit {queries} "
                f"queries and {removals} removals"
            )
        _finite("values", self.values)
        _finite("base", self.base)
        _check_subsets(self.subsets)


@dataclass
class EffectsOverSeeds(Effects):
    """Actual effects in the average run: `values` are means over seeds, with standard errors.

    Attributes:
        per_seed: ``(S, Q, R)``, the effects under each seed.
        seeds: of the S runs.
        standard_error: ``(Q, R)``, of `values` over other seeds; NaN for a single seed.
        reliability: ``(Q,)``, correlation of one seed's effects with another's over the removals,
            mean over all pairs of seeds.
    """

    KIND: ClassVar[str] = "effects over seeds"

    per_seed: Tensor = field(default=None, repr=False)
    seeds: Sequence[int] = ()
    standard_error: Tensor = field(init=False, repr=False)
    reliability: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        shape = (len(self.seeds), *self.values.shape)
        if self.per_seed is None or tuple(self.per_seed.shape) != shape:
            raise ValueError(f"per_seed must be {shape}: seeds × queries × removals")
        self.standard_error = averages(self.per_seed, "mean")[1]
        self.reliability = reliability(self.per_seed)

    @classmethod
    def of(cls, effects: Sequence[Effects], seeds: Sequence[int]) -> "EffectsOverSeeds":
        """The mean of effects of the same removals and queries under several seeds.

        Raises:
            ValueError: other removals, queries, stages, targets or protocols.

        >>> before, subsets = [0.5, 0.2], [[3], [17], [5, 9]]
        >>> after = [[0.6, 0.5, 0.4], [0.2, 0.3, 0.1]], [[0.7, 0.5, 0.4], [0.1, 0.3, 0.1]]
        >>> runs = [Effects.from_values(before, a, subsets, stage="pretrain") for a in after]
        >>> EffectsOverSeeds.of(runs, seeds=(0, 1))
        EffectsOverSeeds(2 queries × 3 removals from stage 'pretrain', own, mean of 2 seeds)
        """
        effects, seeds = list(effects), list(seeds)
        if not effects or len(effects) != len(seeds):
            raise ValueError(f"{len(effects)} effects have {len(seeds)} seeds; give one for each")
        first = effects[0]
        for seed, one in zip(seeds, effects, strict=True):
            names = ("subsets", "stage", "target", "protocol", "aggregate")
            differ = [n for n in names if getattr(one, n) != getattr(first, n)]
            differ += ["queries"] * (not torch.equal(one.query_ids, first.query_ids))
            if differ:
                raise ValueError(f"effects of seed {seed} are of other {', '.join(differ)}")
        per_seed = torch.stack([one.values for one in effects])
        return cls(
            per_seed.mean(0),
            first.subsets,
            torch.stack([one.base for one in effects]).mean(0),
            first.query_ids,
            torch.stack([one.gradient_norm for one in effects]).amax(0),
            *(first.stage, first.target, first.protocol, first.aggregate),
            averaged([one.origin for one in effects]),
            per_seed,
            seeds,
        )

    def some(self, places: Sequence[int]) -> "EffectsOverSeeds":
        """The mean over some of the seeds, by their places among them."""
        places = list(places)
        per_seed, seeds = self.per_seed[places], [self.seeds[i] for i in places]
        return replace(
            self,
            values=per_seed.mean(0),
            per_seed=per_seed,
            seeds=seeds,
            origin=some_runs(self.origin, places),
        )

    def __repr__(self) -> str:
        inside = super().__repr__().removeprefix("Effects(").removesuffix(")")
        return f"EffectsOverSeeds({inside}, mean of {len(self.seeds)} seeds)"

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {"per_seed": self.per_seed, "seeds": torch.tensor(self.seeds)}

    @classmethod
    def _read(cls, tensors: dict, facts: dict) -> "EffectsOverSeeds":
        return cls(**tensors | {"seeds": tensors["seeds"].tolist()}, **facts)


def random_removals(
    m: int, count: int, fraction: float | None = None, *, seed: int = 0
) -> list[list[int]]:
    """Random groups of positions in data of m examples, to be removed.

    PyTorch draws them, so another version of it may draw other groups.

    Args:
        m: how many examples there are.
        count: how many groups.
        fraction: of m, the size of each group; default groups of one example, all different.
        seed: of the draws.

    Raises:
        ValueError: too few different groups exist, or they would be empty or hold everything.

    >>> [len(group) for group in random_removals(100, 2, fraction=0.03)]
    [3, 3]
    """
    m, count = check_whole("m", m), check_whole("count", count)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    size = 1
    if fraction is not None:
        known = is_number(fraction) and 0 < fraction < 1
        size = round(fraction * m) if known else 0
    if not 1 <= size < m or (fraction is None and count > m):
        raise ValueError(
            f"count={count} groups of {size} among m={m} examples (fraction={shown(fraction)}) "
            "cannot be drawn: fraction is a share between 0 and 1 that gives groups of one "
            "example or more, or None for count different groups of one"
        )
    if fraction is None:
        return [[i] for i in torch.randperm(m, generator=generator)[:count].tolist()]
    return [sorted(torch.randperm(m, generator=generator)[:size].tolist()) for _ in range(count)]


def _finite(name: str, values) -> Tensor:
    """Numbers as a float64 tensor on the CPU."""
    values = numbers_of(name, values, "numbers").cpu().double()
    if not bool(torch.isfinite(values).all()):
        first = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(f"{name} holds NaN or inf, first at {first}; did that training diverge?")
    return values


def _check_subsets(subsets: Sequence[Sequence[int]], m: int = sys.maxsize) -> list[list[int]]:
    """The groups as lists of positions below m; a bare number is a group of one."""
    if (
        not isinstance(subsets, Iterable)
        or isinstance(subsets, str)
        or getattr(subsets, "ndim", 1) == 0
    ):
        raise TypeError(
            f"subsets={shown(subsets)} must be lists of positions, e.g. [[3], [17], [5, 9]]"
        )
    groups = []
    for subset in subsets:
        known = isinstance(subset, int | torch.Tensor)
        listed = sorted(subset) if isinstance(subset, set | frozenset) else subset
        what = f"positions, whole numbers {_between(m)}"
        array = subset if known else _array(listed)
        if array is None:
            raise TypeError(f"subset={shown(subset)} must be {what}")
        members = numbers_of("subset", array, what).reshape(-1)
        whole = not members.is_floating_point() and members.dtype != torch.bool
        if len(members) and not whole:
            raise ValueError(f"subset {subset} must hold positions, whole numbers {_between(m)}")
        ranked = members.sort().values
        repeated = bool((ranked[1:] == ranked[:-1]).any())
        if not len(members) or repeated or int(ranked[0]) < 0 or int(ranked[-1]) >= m:
            first = str(members.tolist()[:20])
            raise ValueError(f"subset {first} must hold different positions {_between(m)}")
        if len(members) == m:
            raise ValueError(f"subset of all {m} examples leaves nothing to train on")
        groups.append(members.tolist())
    if not groups:
        raise ValueError("subsets is empty; give lists of positions, e.g. [[3], [17], [5, 9]]")
    return groups


def _array(listed) -> numpy.ndarray | None:
    """Positions as an array; None where they are no numbers."""
    try:
        array = numpy.asarray(listed)
    except ValueError:  # lists of different lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def _between(m: int) -> str:
    return "from 0 on" if m == sys.maxsize else f"between 0 and {m - 1}"


def _retrain_without(
    pipeline, stage, groups, queries, target, aggregate, protocol
) -> tuple[Tensor, Tensor, Tensor]:
    """After retraining: q ``(Q, R)``, ``‖∇F‖`` ``(R,)``, and which missed a tolerance ``(R,)``."""
    weights = torch.ones(len(groups), len(pipeline.stages[stage].data))
    for lane, group in enumerate(groups):
        weights[lane, group] = 0
    again = pipeline.retrain({stage: weights}, warm_start=protocol == "warm-start", progress=False)
    norm, short = largest_gradient(again)
    after = again.evaluate(queries, target, aggregate=aggregate)
    return after.cpu().double(), norm, short


def largest_gradient(again: Retrained) -> tuple[Tensor, Tensor]:
    """Largest ``‖∇F‖`` over the stages, and which weightings missed a tolerance, ``(R,)`` each."""
    norm = torch.stack([r.gradient_norm for r in again.reports]).amax(0)
    short = torch.zeros(len(norm), dtype=torch.bool)
    for stage, report in zip(again.pipeline.stages, again.reports, strict=True):
        if hasattr(stage.recipe, "tol"):
            short |= ~report.converged.cpu()
    return norm.cpu().double(), short


def default_protocol(pipeline: Pipeline) -> str:
    """How `removal_effects` retrains by default: warm if every stage is trained to an optimum."""
    return "warm-start" if all(hasattr(s.recipe, "tol") for s in pipeline.stages) else "same-seed"


def removal_effects(
    pipeline: Pipeline | SeedRuns,
    queries: Examples,
    subsets: Sequence[Sequence[int]],
    *,
    stage: int | str = 0,
    target: str | Callable = "loss",
    aggregate: str | Sequence[float] | Tensor | Callable | None = None,
    protocol: str | None = None,
    n_jobs: int = 1,
    lanes: int = 32,
    store=None,
    progress: bool = True,
) -> Effects:
    """Remove examples for real: set their weights to 0, rerun every stage, subtract the queries.

    Args:
        pipeline: fitted, or adopted at an optimum (`Effects.from_values` takes the effects of your
            own training code otherwise); its models stay as they are.
        queries: examples of the last stage's task.
        subsets: R groups of positions in the stage's data; a bare number removes one example.
        stage: whose examples are removed.
        target, aggregate: as in `ImplicitInfluence.score`, but here step functions will do too,
            such as accuracy: ``target=lambda z, y: (z.argmax(-1) == y).to(z.dtype)``.
        protocol: ``"same-seed"`` reruns from the initial weights with the same batches,
            ``"warm-start"`` continues from the trained weights. Effects are differences to the same
            rerun with nobody removed. Default: warm start where every stage is trained to an
            optimum (from scratch a removal may end in another one, which influence does not
            describe), else same seed.
        n_jobs: processes through joblib; ``joblib.parallel_config`` moves them to a cluster.
        lanes: how many removals one process retrains at once, vectorised over models.
        store: a file that keeps the results so far after every batch of ``lanes``. The same call
            resumes from it, calls with other subsets add to it, and several processes may do so at
            once. Of several runs it is a folder, with a file for each seed.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        `Effects` with values ``(Q, R)``; ``(1, R)`` with ``aggregate``. Of several runs
        `EffectsOverSeeds`.

    Raises:
        ValueError: empty or repeated positions, unknown stage, target, aggregate or protocol; or
            adopted weights that are no optimum: going on from them with nobody removed moves the
            queries' losses by more than a twentieth.
        WorkerError: worker processes died, and again when their work was repeated.
        SavedFileError: ``store`` is of another pipeline, target, queries or protocol, or damaged.

    Warns:
        ConvergenceWarning: a recipe with a tolerance missed it in some retraining.
    """
    if isinstance(pipeline, SeedRuns):
        asked = {"stage": stage, "target": target, "aggregate": aggregate, "protocol": protocol}
        asked |= {"n_jobs": n_jobs, "lanes": lanes}
        return _of_runs(pipeline, queries, subsets, store, progress, asked)
    check_instance("pipeline", pipeline, Pipeline)
    k = pipeline.index(stage)
    protocol = default_protocol(pipeline) if protocol is None else protocol
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise ValueError(f"protocol={shown(protocol)} must be one of {PROTOCOLS}")
    require_start(pipeline, protocol)
    n_jobs = _checked_work(lanes, n_jobs, store)
    groups = _check_subsets(subsets, len(pipeline.stages[k].data))
    question = _asked(pipeline, queries, target, aggregate)
    name, asked = pipeline.stages[k].name, (queries, target, aggregate, protocol)
    facts = pipeline, queries, name, target, question.aggregate, protocol
    kept = RemovalStore(
        store,
        {} if store is None else _about(*facts),
        groups,
        functools.partial(removal_base, pipeline, *asked),
        lambda: _former_key(*facts[:2], groups, *facts[2:]),
    )
    parts = [part for part in kept.missing().split(lanes) if len(part)]
    calls = [(pipeline, k, [groups[i] for i in part], *asked) for part in parts]
    with progress_bar(len(groups), "retraining", progress) as bar:
        bar.update(len(groups) - sum(map(len, parts)))
        for i, result in each_result(_retrain_without, calls, n_jobs, kept.state):
            kept.add(parts[i], *result)
            bar.update(len(parts[i]))
    found = kept.all()
    warn_short(found.norms, found.short)
    return Effects(
        found.after - kept.base[:, None],
        groups,
        kept.base,
        question.ids,
        found.norms,
        name,
        question.target,
        protocol,
        question.aggregate,
        pipeline.origin(question),
    )


def warn_short(norms: Tensor, short: Tensor, stacklevel: int = 3) -> None:
    """Warn where retrainings missed their recipe's tolerance, at the caller's caller by default."""
    if bool(short.any()):
        warnings.warn(
            "some retrainings stopped short of their recipe's tolerance: largest ‖∇F‖ is "
            f"{float(norms.max()):.1e}; raise max_iter or weight_decay",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )


def _of_runs(runs: SeedRuns, queries, subsets, store, progress, asked: dict) -> EffectsOverSeeds:
    """`removal_effects` of each run."""
    if store is not None:
        check_path("store", store)
        Path(store).mkdir(parents=True, exist_ok=True)
    effects = []
    with progress_bar(len(runs), "seeds", progress) as bar:
        for seed, pipeline in zip(runs.seeds, runs, strict=True):
            path = None if store is None else Path(store) / f"seed-{seed}-removals.safetensors"
            one = removal_effects(pipeline, queries, subsets, store=path, progress=False, **asked)
            effects.append(one)
            bar.update()
    return EffectsOverSeeds.of(effects, runs.seeds)


def _checked_work(lanes: int, n_jobs: int, store) -> int:
    """Refuse settings of how the work is done; returns the number of processes."""
    if not isinstance(lanes, int) or isinstance(lanes, bool) or lanes < 1:
        raise ValueError(f"lanes={shown(lanes)} must be a positive whole number")
    if store is not None:
        check_path("store", store)
    return check_jobs(n_jobs)


def _asked(pipeline: Pipeline, queries: Examples, target, aggregate) -> Question:
    """What is asked, with a finite answer by every query before anything is retrained."""
    o = pipeline.objective(-1)
    question = ask(o, queries, target, aggregate)
    require_finite(question, question.each.values(o, pipeline.trained()[-1]))
    return question


def require_start(pipeline: Pipeline, protocol: str) -> None:
    """Refuse a same-seed rerun of adopted weights, which no recipe of the stages has trained."""
    if protocol == "same-seed" and pipeline.adopted:
        raise ValueError(
            "the weights were adopted, so the run cannot be repeated; where they are an optimum, "
            "give the stages recipe=LBFGS() and use protocol='warm-start'; else train here, by "
            f"fit(), or {OWN_CODE}"
        )


def removal_base(pipeline: Pipeline, queries: Examples, target, aggregate, protocol: str) -> Tensor:
    """The queries after a rerun that removes nobody, ``(Q,)``: what effects are measured from.

    For ``"same-seed"`` that is the fit itself.

    Raises:
        ValueError: a warm start of adopted weights that are no optimum.
    """
    if protocol == "same-seed":
        return pipeline.evaluate(queries, target, aggregate=aggregate).cpu().double()
    nobody = {0: torch.ones(1, len(pipeline.stages[0].data))}
    again = pipeline.retrain(nobody, warm_start=True, progress=False)
    if pipeline.adopted:
        _require_still(pipeline, again, queries)
    return again.evaluate(queries, target, aggregate=aggregate)[:, 0].cpu().double()


def _require_still(pipeline: Pipeline, again: Retrained, queries: Examples) -> None:
    """Refuse adopted weights from which a warm start goes on training.

    The effects would be those of another model, and the less like this one's the further it went.
    """
    before = pipeline.evaluate(queries).cpu().double()
    after = again.evaluate(queries)[:, 0].cpu().double()
    size, moved = (float(v.square().mean().sqrt()) for v in (before, after - before))
    if moved <= MOVED * size + torch.finfo(pipeline.objective(-1).dtype).eps ** 0.5:
        return
    recipes = ", ".join(sorted({type(stage.recipe).__name__ for stage in pipeline.stages}))
    raise ValueError(
        "the adopted weights are no optimum of the stages as given: going on from them by "
        f"{recipes} with nobody removed moves the queries' losses by {moved:.1e} where they are "
        f"{size:.1e} (root mean squares), so the effects would be those of another model. Train "
        "to an optimum, by fit() with recipe=LBFGS() or by code of your own with a smaller "
        f"tolerance and the same weight_decay; or {OWN_CODE}"
    )


def _about(pipeline, queries, stage, target, aggregate: str, protocol) -> dict:
    """What a store's results are of, but for the groups."""
    return {
        "stage": stage,
        "target": target if isinstance(target, str) else describe(target),
        "aggregate": aggregate,
        "protocol": protocol,
        "weights": [digest(full) for full in pipeline.trained()],
        "queries": queries.digest(),
    } | {f"stage {facts['name']!r}": facts for facts in pipeline.facts()["stages"]}


def _former_key(pipeline, queries, groups, stage, target, aggregate: str, protocol) -> str:
    """What version 0.1.0 knew a call by."""
    parts = [digest(full) for full in pipeline.trained()]
    if isinstance(queries.x, Tensor):
        parts += [digest(t) for t in (queries.x, queries.y, queries.ids)]
    else:
        parts.append(queries.digest())
    asked = f"{describe(target)} {aggregate}".rstrip()
    return f"{parts} {groups} {stage} {asked} {protocol} {former_facts(pipeline.facts())}"
