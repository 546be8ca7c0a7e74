"""What implicit and unrolled influence will cost, measured by short probes beforehand."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import check_choice, check_damping, check_instance, check_whole, shown
from ..curvature.derivatives import TRANSPOSE_FIXED as FIXED
from ..curvature.derivatives import TRANSPOSE_PER_QUERY as PER_QUERY
from ..curvature.derivatives import (
    cheapest_products,
    cross_products,
    example_products,
    gradient_transpose,
    per_example_gradients,
    plain_routes,
)
from ..curvature.matrices import DataCurvature, curvature
from ..data.examples import Examples
from ..errors import ConvergenceWarning, IndefiniteCurvatureError, MemoryBudgetError
from ..memory import parse_bytes, require_memory, working_bytes
from ..objective.objective import Objective
from ..pipeline.pipeline import Pipeline
from ..solvers.conjugate_gradient import ConjugateGradient
from ..solvers.exact import Exact
from ..solvers.lowrank import LowRank
from .adjoint import CHUNK_BYTES

__all__ = ["Plan", "SegmentedPlan", "StagePlan", "UnrolledPlan", "plan"]

PROBE = 128  # examples at most
PROBE_BYTES = 2**28  # of a probe's vectors
PRODUCT_SECONDS = 0.1  # of one product on the probe's examples
SOLVE_SECONDS = 2.0  # of the probe's conjugate gradients
STEPS = 60  # of those, at most
LARGE = 2000  # parameters from which a preconditioner pays


@dataclass(frozen=True)
class StagePlan:
    """One stage's share of a `Plan`.

    Attributes:
        stage: its name.
        parameters, examples: P and m.
        solver: the suggestion, ready for use.
        products: curvature-vector products, counted per column.
        bytes: estimated peak beyond data and model.
        seconds: of solving for all queries and of scoring all examples.
        reason: why this solver.
        plain: fast routes to derivatives that are wrong or missing for this model, and what is
            done instead; the seconds are measured with that.
    """

    stage: str
    parameters: int
    examples: int
    solver: Exact | ConjugateGradient
    products: int
    bytes: int
    seconds: float
    reason: str
    plain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Costs of implicit influence, stage by stage; prints as a table.

    Attributes:
        stages: one `StagePlan` per stage.
        queries, memory: Q and the budget in bytes, as asked.
    """

    stages: tuple[StagePlan, ...]
    queries: int
    memory: int

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(s.seconds for s in self.stages)

    @property
    def bytes(self) -> int:
        """Peak bytes: those of the largest stage."""
        return max(s.bytes for s in self.stages)

    def solver(self, stage: str) -> Exact | ConjugateGradient:
        """The suggested solver of a stage by name."""
        known = {s.stage: s.solver for s in self.stages}
        if not isinstance(stage, str) or stage not in known:
            raise ValueError(f"stage={shown(stage)} is none of {list(known)}")
        return known[stage]

    def __str__(self) -> str:
        title = f"{self.queries} queries, {self.memory / 1e6:,.0f} MB; a probe's estimate"
        counted = f"{'parameters':>11} {'examples':>9} {'products':>9}"
        head = f"{'stage':<14}{counted} {'memory':>10} {'time':>8}  solver"
        notes = [f"  {s.stage}: {note}" for s in self.stages for note in s.plain]
        return "\n".join([title, head, *map(self._row, self.stages), *notes])

    @staticmethod
    def _row(s: StagePlan) -> str:
        counted = f"{s.parameters:>11,} {s.examples:>9,} {s.products:>9,}"
        taken = f"{s.bytes / 1e6:>7,.0f} MB {s.seconds:>6,.1f} s"
        return f"{s.stage:<14}{counted} {taken}  {type(s.solver).__name__}: {s.reason}"

    __repr__ = __str__


def plan(
    pipeline: Pipeline,
    queries: int = 20,
    *,
    memory: str | int = "1GB",
    kind: str = "hessian",
    damping: float = 0.0,
) -> Plan:
    """What implicit influence will cost, stage by stage, and a solver for each.

    From a probe of a few seconds, whatever the model: a few products, the start of one solve and
    one scoring per stage, with at most 128 examples. `Exact` is suggested where its matrices fit
    the memory and it is about as fast (it has no tolerance to worry about and finds the smallest
    eigenvalue), `ConjugateGradient` elsewhere, with `LowRank` as its preconditioner for larger
    models. Below the table stands what must be done the slow way for this model, and why.

    Args:
        pipeline: trained or adopted.
        queries: Q.
        memory: budget of the dense matrices.
        kind, damping: ``curvature`` and ``damping`` of `ImplicitInfluence`.

    Raises:
        ValueError: the pipeline is not trained; no queries.

    >>> import msif_lab as msif
    >>> train, _ = msif.load_digits(dtype=torch.float64)
    >>> model = msif.softmax_regression(64, 10).double()
    >>> stage = msif.Stage("digits", model, train, weight_decay=1e-2)
    >>> msif.plan(msif.Pipeline([stage]).fit()).solver("digits")
    Exact(memory=1000000000)
    """
    check_instance("pipeline", pipeline, Pipeline)
    queries, damping = check_whole("queries", queries), check_damping(damping)
    check_choice("kind", kind, ("hessian", "ggn"))
    budget, trained = parse_bytes(memory), pipeline.trained()
    stages = [
        _plan_stage(pipeline, k, full, queries, budget, kind, damping)
        for k, full in enumerate(trained)
    ]
    return Plan(tuple(stages), queries, budget)


def _plan_stage(
    pipeline, k: int, full: Tensor, queries: int, memory: int, kind: str, damping: float
) -> StagePlan:
    o = pipeline.objective(k)
    size, item = o.size, full.element_size()
    few, operator = _probe(o, full, kind)
    more = len(o.data) / len(few.data)
    at_once = max(1, PROBE_BYTES // (6 * size * item))  # gradients, solutions, search directions
    some = torch.arange(min(queries, len(few.data), at_once))
    block = torch.cat([g for _, g in per_example_gradients(few, full, rows=some)])
    column = seconds(lambda: operator @ block.T) * more / len(block)
    shifted = operator + damping if damping else operator
    solver = _iterative(o, size, damping, memory, item)
    products, note = _products(shifted, _scaled(solver, more, column / more), block.T)
    products = round(products * queries / len(block))
    scoring = seconds(lambda: example_products(few, full, block.T)) * more * queries / len(block)
    if cheapest_products(o, queries) == "gradients":
        scoring *= len(block) / queries  # once for all queries
    dense, columns = 4 * size * size * item, 5 * size * queries * item
    direct, iterative = _dense_seconds(operator, column, len(o.data)), products * column
    exact = dense <= memory and direct <= 2 * iterative
    if exact:
        reason = f"{dense / 1e6:,.0f} MB of dense matrices fit, and about {direct:,.1f} s against "
        reason += f"{iterative:,.1f} s"
    elif dense > memory:
        reason = f"dense matrices would take {dense / 1e6:,.0f} MB; about {products} products{note}"
    else:
        reason = f"about {products} products, {iterative:,.1f} s, where a dense matrix takes "
        reason += f"{direct:,.1f} s{note}"
    return StagePlan(
        stage=pipeline.stages[k].name,
        parameters=size,
        examples=len(o.data),
        solver=Exact(memory) if exact else solver,
        products=size if exact else products,
        bytes=(dense if exact else columns)
        + min(3 * working_bytes(o.device) // 2, 40 * len(o.data) * o.bytes_per_example()),
        seconds=(direct if exact else iterative) + scoring,
        reason=reason,
        plain=tuple(plain_routes(o)),
    )


def _probe(o: Objective, full: Tensor, kind: str) -> tuple[Objective, DataCurvature]:
    """The stage on as many examples, 128 at most, as one product takes little time with."""

    def on(count: int) -> Objective:
        if len(o.data) <= count:
            return o
        return o.on(o.data[torch.linspace(0, len(o.data) - 1, count).long()])

    few = on(4)
    operator = curvature(kind, few, full)
    v = torch.ones(o.size, 1, dtype=full.dtype, device=full.device)
    each = seconds(lambda: operator @ v) / len(few.data)
    few = on(int(min(PROBE, max(4, PRODUCT_SECONDS / each))))
    return few, curvature(kind, few, full)


def _iterative(o, size: int, damping: float, memory: int, item: int) -> ConjugateGradient:
    """Conjugate gradients, preconditioned where that pays and all shifts are positive."""
    rank = min(500, memory // (6 * size * item))
    if size < LARGE or rank < 50 or not bool((o.ridge + damping > 0).all()):
        return ConjugateGradient()
    return ConjugateGradient(tol=1e-3, preconditioner=LowRank(rank=rank, memory=memory))


def _scaled(solver: ConjugateGradient, more: float, column: float) -> ConjugateGradient:
    """The solver for 1/``more`` of the data: its preconditioner's rank shrinks in proportion.

    There is none where making it would take long, at ``column`` seconds a product.
    """
    if solver.preconditioner is None:
        return solver
    rank = max(1, round(solver.preconditioner.rank / more))
    if rank * column > SOLVE_SECONDS:
        return replace(solver, preconditioner=None)
    return replace(solver, preconditioner=replace(solver.preconditioner, rank=rank))


class _Enough(Exception):
    """The probe's time is up."""


def _products(operator, solver: ConjugateGradient, columns: Tensor) -> tuple[int, str]:
    """Products to the solver's tolerance on the probe's data, extrapolated if it falls short."""
    worst, most = [], columns.numel()
    deadline = time.perf_counter() + SOLVE_SECONDS

    def note(step: int, residuals: Tensor) -> None:
        worst.append(float(residuals.max()))
        if time.perf_counter() > deadline:
            raise _Enough

    probe = replace(solver, max_iter=STEPS, callback=note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            _, report = probe.solve(operator, columns)
        except _Enough:
            rate = max(1e-3, -math.log(min(worst))) / len(worst)
            return min(most, math.ceil(-math.log(solver.tol) / rate) * columns.shape[1]), ""
        except IndefiniteCurvatureError as error:
            return most, f"; indefinite on the probe ({error.smallest:.1e}), so use curvature='ggn'"
    if bool(report.converged.all()):
        return max(1, report.products), ""
    rate = max(1e-3, -math.log(min(worst))) / len(worst)
    return min(most, round(report.products * -math.log(solver.tol) / rate / len(worst))), ""


def _dense_seconds(operator: DataCurvature, column: float, examples: int) -> float:
    """Time to make and factorise the matrix, from the machine's rate of multiplication."""
    size = operator.shape[0]
    a = torch.ones(512, 512, dtype=operator.dtype, device=operator.device)
    rate = 512**3 / seconds(lambda: a @ a)
    return min(size * column, operator.dense_multiplications(examples) / rate) + size**3 / 3 / rate


def count_queries(queries) -> int:
    """How many queries are meant by a number, or by examples.

    Raises:
        ValueError: none, or something else.
    """
    if isinstance(queries, Examples):
        return len(queries)
    return check_whole("queries", queries, why="or be msif_lab.Examples")


@dataclass(frozen=True)
class UnrolledPlan:
    """What unrolling a pipeline will take; prints as a table.

    Attributes:
        steps: per stage, T.
        segments: per stage, how many stretches its run is cut into; 1 keeps every step.
        stored: bytes of the checkpoints and of the longest stretch between two.
        swept: bytes of the adjoints and of one mini-batch's derivatives during a sweep.
        budget: bytes allowed.
        queries, part: Q, and how many of them one sweep carries.
        seconds: estimates for fit and for score, from one measured step of each stage; NaN if not
            measured.
    """

    steps: dict[str, int]
    segments: dict[str, int]
    stored: int
    swept: int
    budget: int
    queries: int
    part: int
    seconds: tuple[float, float] = (math.nan, math.nan)

    @property
    def sweeps(self) -> int:
        return -(-self.queries // self.part)

    def __repr__(self) -> str:
        used = f"{(self.stored + self.swept) / 1e6:,.1f} of {self.budget / 1e6:,.1f} MB"
        lines = [f"{self.queries} queries, {self.part} a sweep, {self.sweeps} sweep(s); {used}"]
        for name, count in self.segments.items():
            how = "every step kept"
            if count > 1:
                how = f"{count} checkpoints, recomputed once a sweep"
            lines.append(f"  {name}: {self.steps[name]} steps, {how}")
        if not math.isnan(self.seconds[0]):
            lines.append("  estimated: {:.1f} s to fit, {:.1f} s to score".format(*self.seconds))
        return "\n".join(lines)


def make_plan(
    pipeline: Pipeline, queries: int, memory: int, segments: int | None = None, runs: int = 1
) -> UnrolledPlan:
    """Cut runs into segments and queries into parts, so that a sweep stays within the budget.

    Half of it is for the states of this many runs, a quarter each for adjoints and for one batch's
    derivatives.

    Raises:
        ValueError: no queries.
        MemoryBudgetError: not even a single query and √T checkpoints fit.
    """
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1")
    steps, segments, stored = _segments(pipeline, memory, segments, runs)
    quarter = memory // 4
    objectives = [pipeline.objective(k) for k in range(len(pipeline.stages))]
    # θ̄, the optimiser's share, ḡ, the product, and their temporaries
    adjoint = max(12 * o.layout.size * o.dtype.itemsize for o in objectives)
    example = max(o.bytes_per_example() for o in objectives)
    smallest = min(len(o.data) for o in objectives)
    together = min(16, smallest, quarter // (example * (FIXED + PER_QUERY)))
    if quarter < adjoint or together < 1:
        needed = 4 * max(adjoint, example * (FIXED + PER_QUERY))
        raise MemoryBudgetError(
            f"sweeping with a single query needs a budget of about {needed / 1e6:,.1f} MB, "
            f"memory= gives {memory / 1e6:,.1f} MB; give more"
        )
    part = min(queries, quarter // adjoint, (quarter // (example * together) - FIXED) // PER_QUERY)
    return UnrolledPlan(
        steps, segments, stored * runs, part * adjoint + quarter, memory, queries, part
    )


def _segments(pipeline: Pipeline, memory: int, segments: int | None, runs: int):
    """Steps and segments per stage, and the bytes of one run's states.

    Keeps every step where that fits; else √T checkpoints per stage, which with one recomputation is
    the least memory: checkpoints and the stretch between two are then equally large.

    Raises:
        MemoryBudgetError: not even that fits.
    """
    steps, checkpoint, record = {}, {}, {}
    for k, stage in enumerate(pipeline.stages):
        lanes = pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None)
        theta = lanes.objective.trained.take(lanes.base)
        walk = list(stage.recipe.steps(len(stage.data)))
        state = stage.recipe.start(theta)
        _, _, saved = stage.recipe.advance(lanes, theta, state, 0, *walk[0])
        steps[stage.name] = len(walk)
        checkpoint[stage.name] = _bytes(theta, *state)
        record[stage.name] = _bytes(theta, *saved)

    def needed(counts):
        if all(c == 1 for c in counts.values()):
            return sum(steps[n] * record[n] for n in steps)
        kept = [steps[n] * record[n] for n in steps if counts[n] == 1]
        stretch = [-(-steps[n] // c) * record[n] for n, c in counts.items() if c > 1]
        return sum(kept) + sum(c * checkpoint[n] for n, c in counts.items()) + max(stretch)

    chosen = {n: min(segments or 1, t) for n, t in steps.items()}
    if not segments and needed(chosen) * runs > memory // 2:
        root = {n: math.sqrt(t * record[n] / checkpoint[n]) for n, t in steps.items()}
        chosen = {n: min(max(2, math.ceil(root[n])), t) for n, t in steps.items()}
    require_memory(
        2 * needed(chosen) * runs,
        memory,
        f"replaying {runs} × {sum(steps.values())} steps from {sum(chosen.values())} checkpoints "
        "and sweeping back",
        "give more memory=" + ("" if not segments else ", or leave segments= to the plan"),
    )
    return steps, chosen, needed(chosen)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def timed(plan: UnrolledPlan, pipeline: Pipeline, memory: int, fits: int) -> UnrolledPlan:
    """The plan with seconds for ``fits`` replayed runs, from one step of each stage, both ways."""
    fit = sweep = 0.0
    for k, stage in enumerate(pipeline.stages):
        there = _step_seconds(pipeline, k)
        batch, _ = next(iter(stage.recipe.steps(len(stage.data))))
        back = _backward_seconds(pipeline, k, batch, plan.part, memory)
        replay = there * (plan.segments[stage.name] > 1)
        fit += there * plan.steps[stage.name]
        sweep += (back + replay) * plan.steps[stage.name]
    return replace(plan, seconds=(fit, sweep * plan.sweeps + fit * (fits - 1)))


def _backward_seconds(
    pipeline: Pipeline, k: int, batch: Tensor, queries: int, memory: int
) -> float:
    """Time of one step of a stage backwards, for some queries side by side."""
    o = pipeline.objective(k)
    full = pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None).base[0]
    cotangents = o.trained.take(torch.ones_like(full)).expand(queries, -1)
    every, room = bool(k and pipeline.functional(k).frozen), min(memory // 4, CHUNK_BYTES)
    return seconds(lambda: gradient_transpose(o, full, batch, cotangents, every=every, memory=room))


@dataclass(frozen=True)
class SegmentedPlan:
    """What segmented influence will take; prints as a table.

    Attributes:
        stretches: per stage, how many its run is cut into.
        products: per stage, curvature products of each query, with all of the stage's examples or
            some of them, or with a batch for each step.
        queries, part: Q, and how many of them are taken side by side.
        bytes: of the Krylov spaces of these, and of the working chunks.
        budget: bytes allowed for Krylov spaces.
        seconds: estimates for fit and for score, from a probe with a few examples, for as many
            products as that; smooth runs and many queries take half of them, but what is done
            between products is not in it.
    """

    stretches: dict[str, int]
    products: dict[str, int]
    queries: int
    part: int
    bytes: int
    budget: int
    seconds: tuple[float, float]

    def __repr__(self) -> str:
        used = f"{self.bytes / 1e6:,.0f} MB, of which Krylov spaces at most "
        lines = [
            f"{self.queries} queries, {self.part} side by side; {used}{self.budget / 1e6:,.0f} MB"
        ]
        for name, count in self.stretches.items():
            most = self.products[name]
            lines.append(f"  {name}: {count} stretches, at most {most} products a query")
        lines.append("  estimated: {:.1f} s to fit, {:.1f} s to score".format(*self.seconds))
        return "\n".join(lines)


def segmented_plan(
    pipeline: Pipeline,
    queries: int,
    part: int,
    spaces: int,
    lengths: list[list[int]],
    dimensions: list[list[int]],
    sizes: list[list[int] | None],
    kind: str,
    few: int | None,
    details: bool,
    budget: int,
) -> SegmentedPlan:
    """The plan of `SegmentedInfluence`, measured with at most 128 examples of each stage.

    Args:
        lengths, dimensions: of each stage's stretches, steps and dimension of the Krylov spaces.
        sizes: of each stage's batches, where every step is taken with its own instead.
        spaces: bytes of the Krylov spaces of ``part`` queries.
        details: whether the examples of each step are known, so that a stretch takes only those.
        few: examples for the curvature, or None for all.
    """
    fit = score = 0.0
    for k, stage in enumerate(pipeline.stages):
        if not pipeline.adopted:
            fit += _step_seconds(pipeline, k) * sum(lengths[k])
        if sizes[k] is not None:
            first = torch.arange(max(sizes[k]))
            back = _backward_seconds(pipeline, k, first, part, budget)
            score += back * (len(sizes[k]) + 2 * len(lengths[k]))
            continue
        o, full, m = pipeline.objective(k), pipeline.trained()[k], len(stage.data)
        probe, operator = _probe(o, full, kind)
        share = len(probe.data)
        v = torch.ones(o.size, part, dtype=full.dtype, device=full.device)
        product = seconds(lambda operator=operator, v=v: operator @ v) / share
        passing = mixed = 0.0
        if k == 0:
            passing = seconds(lambda p=probe, full=full, v=v: example_products(p, full, v))
        if k and pipeline.functional(k).frozen:
            names = pipeline.functional(k).frozen
            mixed = seconds(lambda p=probe, f=full, n=names, v=v: cross_products(p, f, n, v.T))
        size = m
        if details:
            each = [len(batch) for batch, _ in stage.recipe.steps(m)]
            size = sum(each) / len(each)
        for steps, dimension in zip(lengths[k], dimensions[k], strict=True):
            seen = min(m, steps * size)
            score += dimension * product * min(seen, few or m)
            score += (passing * (1 + details) + mixed) / share * seen
    names = [stage.name for stage in pipeline.stages]
    pairs = zip(sizes, dimensions, strict=True)
    products = [sum(each) if batches is None else len(batches) for batches, each in pairs]
    return SegmentedPlan(
        dict(zip(names, map(len, lengths), strict=True)),
        dict(zip(names, products, strict=True)),
        queries,
        part,
        spaces + working_bytes(pipeline.objective(0).device),
        budget,
        (fit, score * -(-queries // part)),
    )


def _step_seconds(pipeline: Pipeline, k: int) -> float:
    """Time of one training step of a stage."""
    stage = pipeline.stages[k]
    lanes = pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None)
    theta = pipeline.objective(k).trained.take(lanes.base)
    batch, rate = next(iter(stage.recipe.steps(len(stage.data))))
    state = stage.recipe.start(theta)
    return seconds(lambda: stage.recipe.advance(lanes, theta, state, 0, batch, rate))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of the faster of two calls; the first one warms up."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
