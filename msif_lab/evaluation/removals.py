"""Ground truth by real retraining: what happens to the queries when examples are removed."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy
import torch
from torch import Tensor

from ..data.examples import Examples
from ..errors import ConvergenceWarning, SavedFileError
from ..objective.checks import ask
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from ..storage import check_writable, describe, digest, read_tensors, write_tensors

__all__ = ["Effects", "random_removals", "removal_effects"]

PROTOCOLS = ("same-seed", "warm-start")


@dataclass
class Effects:
    """Actual changes of queries when examples are removed and every stage is retrained.

    Attributes:
        values: ``(Q, R)``, q after removal minus q before, in nats (or units of q).
        subsets: the R removed groups, positions in the stage's data.
        base: ``(Q,)``, q before.
        query_ids: identities of the queries ``(Q,)``.
        gradient_norm: ``(R,)``, largest ``‖∇F‖`` over the retrained stages.
        stage, target, protocol: whose examples, what q is, how the retraining was started.
        aggregate: empty for a row per query; else of what the only row is made, as in `Influence`.
    """

    values: Tensor
    subsets: list[list[int]]
    base: Tensor
    query_ids: Tensor
    gradient_norm: Tensor
    stage: str
    target: str
    protocol: str
    aggregate: str = ""

    def __repr__(self) -> str:
        queries, removals = self.values.shape
        return (
            f"Effects({self.aggregate or f'{queries} queries'} × {removals} removals from stage "
            f"{self.stage!r}, {self.protocol})"
        )

    def save(self, path) -> None:
        """Write to one safetensors file, all or nothing."""
        tensors = {
            name: getattr(self, name) for name in ("values", "base", "query_ids", "gradient_norm")
        }
        names = ("subsets", "stage", "target", "protocol", "aggregate")
        facts = {name: getattr(self, name) for name in names}
        write_tensors(path, "effects", tensors, facts)

    @classmethod
    def load(cls, path) -> "Effects":
        """Read what `save` wrote; a cut-off, changed or foreign file raises `SavedFileError`."""
        tensors, facts = read_tensors(path, "effects")
        return cls(**tensors, **facts)


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
    size = 1 if fraction is None else round(fraction * m)
    if not 1 <= size < m or count < 1 or (fraction is None and count > m):
        raise ValueError(
            f"{count} groups of {size} among {m} examples (fraction={fraction}) cannot be drawn"
        )
    generator = torch.Generator().manual_seed(seed)
    if fraction is None:
        return [[i] for i in torch.randperm(m, generator=generator)[:count].tolist()]
    return [sorted(torch.randperm(m, generator=generator)[:size].tolist()) for _ in range(count)]


def _check_subsets(subsets: Sequence[Sequence[int]], m: int) -> list[list[int]]:
    """The groups as lists of positions below m; a bare number is a group of one."""
    if not isinstance(subsets, Iterable):
        raise TypeError(f"subsets={subsets!r} must be lists of positions, e.g. [[3], [17], [5, 9]]")
    groups = []
    for subset in subsets:
        known = isinstance(subset, int | torch.Tensor)
        members = torch.as_tensor(subset if known else numpy.asarray(subset)).reshape(-1)
        whole = not members.is_floating_point() and members.dtype != torch.bool
        if len(members) and not whole:
            raise ValueError(
                f"subset {subset} must hold positions, whole numbers between 0 and {m - 1}"
            )
        groups.append([int(i) for i in members])
    if not groups:
        raise ValueError("subsets is empty; give lists of positions, e.g. [[3], [17], [5, 9]]")
    for group in groups:
        if not group or len(set(group)) != len(group) or min(group) < 0 or max(group) >= m:
            raise ValueError(f"subset {group} must hold different positions between 0 and {m - 1}")
        if len(group) == m:
            raise ValueError(f"subset of all {m} examples leaves nothing to train on")
    return groups


def _retrain_without(
    pipeline, stage, groups, queries, target, aggregate, protocol
) -> tuple[Tensor, Tensor, Tensor]:
    """After retraining: q ``(Q, R)``, ``‖∇F‖`` ``(R,)``, and which missed a tolerance ``(R,)``."""
    weights = torch.ones(len(groups), len(pipeline.stages[stage].data))
    for lane, group in enumerate(groups):
        weights[lane, group] = 0
    again = pipeline.retrain({stage: weights}, warm_start=protocol == "warm-start", progress=False)
    norm = torch.stack([r.gradient_norm for r in again.reports]).amax(0)
    short = torch.zeros(len(groups), dtype=torch.bool)
    for s, r in zip(pipeline.stages, again.reports, strict=True):
        if hasattr(s.recipe, "tol"):
            short |= ~r.converged.cpu()
    after = again.evaluate(queries, target, aggregate=aggregate)
    return after.cpu().double(), norm.cpu().double(), short


def default_protocol(pipeline: Pipeline) -> str:
    """How `removal_effects` retrains by default: warm if every stage is trained to an optimum."""
    return "warm-start" if all(hasattr(s.recipe, "tol") for s in pipeline.stages) else "same-seed"


def removal_effects(
    pipeline: Pipeline,
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
        pipeline: fitted (or adopted, with ``"warm-start"``); its models stay as they are.
        queries: examples of the last stage's task.
        subsets: R groups of positions in the stage's data; a bare number removes one example.
        stage: whose examples are removed.
        target, aggregate: as in `ImplicitInfluence.score`, but here step functions will do too,
            such as accuracy: ``target=lambda z, y: (z.argmax(-1) == y).to(z.dtype)``.
        protocol: ``"same-seed"`` reruns from the initial weights with the same batches,
            ``"warm-start"`` continues from the trained weights. Default: warm start where every
            stage is trained to an optimum (from scratch a removal may end in another one, which
            influence does not describe), else same seed.
        n_jobs: processes through joblib; ``joblib.parallel_config`` moves them to a cluster.
        lanes: how many removals one process retrains at once, vectorised over models.
        store: a file that keeps the results so far after every batch of ``lanes``; the same call
            resumes from it.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        `Effects` with values ``(Q, R)``; ``(1, R)`` with ``aggregate``.

    Raises:
        ValueError: empty or repeated positions, unknown stage, target, aggregate or protocol.
        SavedFileError: ``store`` belongs to another call, or is damaged.

    Warns:
        ConvergenceWarning: a recipe with a tolerance missed it in some retraining.
    """
    k = pipeline.index(stage)
    protocol = default_protocol(pipeline) if protocol is None else protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} must be one of {PROTOCOLS}")
    if not isinstance(lanes, int) or lanes < 1:
        raise ValueError(f"lanes={lanes!r} must be a positive whole number")
    groups = _check_subsets(subsets, len(pipeline.stages[k].data))
    question = ask(pipeline.objective(-1), queries, target, aggregate)
    if store is not None:
        check_writable(store)
    base = _base(pipeline, queries, target, aggregate, protocol)
    name = pipeline.stages[k].name
    key = _key(pipeline, queries, groups, name, target, question.aggregate, protocol)
    kept = _Kept.open(store, key, base, groups)
    parts = [part for part in kept.missing().split(lanes) if len(part)]
    retrain = joblib.delayed(_retrain_without)
    jobs = (
        retrain(pipeline, k, [groups[i] for i in part], queries, target, aggregate, protocol)
        for part in parts
    )
    with progress_bar(len(groups), "retraining", progress) as bar:
        bar.update(int(kept.done.sum()))
        results = joblib.Parallel(n_jobs, return_as="generator")(jobs)
        for part, result in zip(parts, results, strict=True):
            kept.add(part, *result)
            bar.update(len(part))
    if bool(kept.short.any()):
        warnings.warn(
            "some retrainings stopped short of their recipe's tolerance: largest ‖∇F‖ is "
            f"{float(kept.norms.max()):.1e}; raise max_iter or weight_decay",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Effects(
        kept.after - base[:, None],
        groups,
        base,
        question.ids,
        kept.norms,
        name,
        question.target,
        protocol,
        question.aggregate,
    )


def _base(pipeline: Pipeline, queries: Examples, target, aggregate, protocol: str) -> Tensor:
    """The queries at the trained weights; a same-seed rerun needs a run that can be repeated."""
    if protocol == "same-seed" and pipeline.reports is None:
        raise ValueError(
            "the weights were adopted, so the run cannot be repeated; use protocol='warm-start', "
            "or fit()"
        )
    return pipeline.evaluate(queries, target, aggregate=aggregate).cpu().double()


def _key(pipeline, queries, groups, stage, target, aggregate: str, protocol) -> str:
    parts = [digest(full) for full in pipeline.trained()]
    if isinstance(queries.x, Tensor):
        parts += [digest(t) for t in (queries.x, queries.y, queries.ids)]
    else:
        parts.append(queries.digest())
    asked = f"{describe(target)} {aggregate}".rstrip()
    return f"{parts} {groups} {stage} {asked} {protocol} {pipeline.facts()}"


@dataclass
class _Kept:
    """The retrainings that are done, kept in a file if there is a ``store``.

    Attributes:
        store: the file, or None.
        key: what identifies the call that the file must belong to.
        after: ``(Q, R)``, q after each removal.
        norms: ``(R,)``, largest ``‖∇F‖`` over the stages.
        done, short: ``(R,)``, which removals are done, and which of them missed a tolerance.
    """

    store: str | Path | None
    key: str
    after: Tensor
    norms: Tensor
    done: Tensor
    short: Tensor

    @classmethod
    def open(cls, store, key: str, base: Tensor, groups: list) -> "_Kept":
        """What the store holds, or nothing done yet.

        Raises:
            SavedFileError: it belongs to another call.
        """
        try:
            tensors, facts = read_tensors(store, "removals") if store is not None else (None, {})
        except FileNotFoundError:
            tensors = None
        if tensors is None:
            count = len(groups)
            after = torch.zeros(len(base), count, dtype=torch.float64)
            norms = torch.zeros(count, dtype=torch.float64)
            none = torch.zeros(count, dtype=torch.bool)
            return cls(store, key, after, norms, done=none, short=none.clone())
        if facts["key"] != key:
            raise SavedFileError(
                f"store={str(store)!r} holds removals of another pipeline, queries or subsets; "
                "name another file"
            )
        return cls(store, key, **tensors)

    def missing(self) -> Tensor:
        """Indices of the removals that are still to do."""
        return (~self.done).nonzero().flatten()

    def add(self, part: Tensor, after: Tensor, norms: Tensor, short: Tensor) -> None:
        """Keep the results of the removals ``part``, and write them to the file if there is one."""
        self.after[:, part] = after
        self.norms[part] = norms
        self.done[part] = True
        self.short[part] = short
        if self.store is not None:
            names = ("after", "norms", "done", "short")
            state = {name: getattr(self, name) for name in names}
            write_tensors(self.store, "removals", state, {"key": self.key})
