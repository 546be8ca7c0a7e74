"""Segmented influence: a run read as a few stretches of constant curvature (`stretches`)."""

import copy
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import joblib
import torch
from torch import Tensor

from ..arguments import check_choice, check_flag, check_instance, check_whole
from ..curvature.derivatives import query_gradients
from ..curvature.soundness import require_loss_curvature, require_second_derivative
from ..data.examples import Examples
from ..errors import UnsmoothTrainingWarning
from ..memory import parse_bytes, require_memory
from ..objective.checks import ask
from ..objective.precision import require_precision
from ..parallel import check_jobs, each_result
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from ..pipeline.runs import KeptRun
from .cost import SegmentedPlan, count_queries, segmented_plan
from .path import PathAdjoint, RunPath, known_sizes
from .replay import kept_runs, step_counts
from .result import Influence
from .stretches import MOST_DIMENSIONS, Reading, SegmentAdjoint, stretches_of
from .trust import Reruns, Trust, check_count, measured_trust
from .unrolled import growth_if_rough, warn_of_growth

__all__ = ["SegmentedInfluence"]


MOST_TOGETHER = 32  # queries in one Krylov space
COORDINATES = 8  # of every step in it: two responses of two stretches, and weighted
# Median `changes_` beyond which scores may be far from the run's derivative: chosen on one seed of
# `bench_segmented.py warning`. On others, of the rows with r < 0.8 it named 17 of 18 step by step
# and 4 of 5 in Krylov spaces, of those with r > 0.95 2 of 69 and 1 of 17.
UNSTEADY = 2.0
VECTORS = 4  # per dimension: the bases of two stretches, and both side by side for the scores


@dataclass
class SegmentCheck:
    """Scores beside those from half as many stretches.

    Attributes:
        r: correlation of the two over examples, for each query ``(Q,)``.
        change: ``‖difference‖ / ‖scores‖`` of each query ``(Q,)``.
    """

    r: Tensor
    change: Tensor

    def __str__(self) -> str:
        return (
            f"half as many stretches give scores that correlate by r = {float(self.r.median()):.3f}"
            f" and differ by {float(self.change.median()):.0%} (medians of {len(self.r)} queries)"
        )


class SegmentedInfluence:
    """Multi-stage influence from a dozen checkpoints of each run, converged or not.

    `UnrolledInfluence` for runs that cannot be replayed, or are too long to. What it does depends
    on how much is known of a stage's run:

    **Checkpoints alone.** Curvature is constant along each stretch from one to the next. That takes
    4 to 20 Hessian products for each stretch and query instead of one for each step, on all of the
    stage's examples, and pays for long runs. For `SGD` a dozen stretches come close to the unrolled
    derivative where the run is smooth; large learning rates with small batches need more (`check`).
    For `Adam` and `AdamW` the squared gradients count as constant within a stretch, and what they
    pass on is left out: a rougher answer. Up to 32 queries share their Krylov spaces: many take
    fewer products each than one alone, and their scores depend on which are scored together by less
    than a hundredth.

    **The batches of each step, too**, as of a pipeline's own run. Every step is taken with its own
    Hessian, of its batch, at weights on a smooth curve through the checkpoints. That comes much
    closer, for every recipe, and takes about as many products as the sweep of `UnrolledInfluence`.
    Where stretches are longer than about five epochs, curvature is constant along them again, and
    each example counts in its own steps.

    Args:
        segments: how many stretches a stage's run is cut into, at most. 24 come closer than 12 at
            little more cost where each step's examples are known: a shorter stretch takes fewer.
        krylov: dimension of each stretch's Krylov space, for each query. Default: step by step
            where the batches are known and stretches are short, else as many dimensions as it takes
            until a block more changes what comes of it by less than a thousandth, at most 20.
        curvature: ``"hessian"``, or ``"ggn"`` where there are no second derivatives.
        curvature_examples: take the curvature from this many of a stage's examples, drawn at
            random; default all. A rough guide only: its noise adds up over long runs
            (``bench_segmented.py settings``).
        dynamics: ``"optimizer"``, its own recurrence, or ``"flow"``, gradient flow ``exp(−τH)`` of
            the same length. With ``curvature="ggn"`` and ``details=False`` that is how SOURCE reads
            a run.
        details: use what is known beyond checkpoints: which examples each step had, the mean
            weights between two checkpoints, and the optimiser's memory. Of a pipeline's own run all
            of it is.
        memory: for the queries' Krylov spaces and derivatives, as ``"1GB"``.
        n_jobs: processes through joblib, which share the queries; ``joblib.parallel_config`` moves
            them to a cluster.
        trust: how many runs to make for ``scores.trust_``, as for `UnrolledInfluence`, where the
            pipeline has its own run to repeat.

    Attributes:
        adjoint_norms_: after `score`, by stage the mean ‖θ̄‖ at each checkpoint.
        changes_: after `score`, how much curvature changed from stretch to stretch, where each
            query ``(Q,)`` felt it: the root of the sum, over all checkpoints between two stretches,
            of ``(τ ‖(H − H') θ̄‖ / ‖θ̄‖)²``, with τ their mean time, ``Σ η / (1 − μ)`` for SGD. Step
            by step: half of what it differs by from what it would be at the checkpoint if that had
            not been known. Steps that are a stretch each count for nothing, and a stage that is one
            stretch cannot tell.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> recipe = msif.SGD(lr=0.05, epochs=2, batch_size=100)
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10).double(), train, recipe=recipe)
    >>> segmented = msif.SegmentedInfluence(segments=6).fit(msif.Pipeline([stage]).fit())
    >>> segmented.score(test[:3]).values.shape
    torch.Size([3, 1201])

    Reference: the reading as segments is SOURCE (Bae et al. 2024, arXiv 2405.12186), for one stage,
    with the Gauss-Newton matrix and ``exp(−τH)`` instead of the optimiser's recurrence.
    """

    def __init__(
        self,
        segments: int = 12,
        krylov: int | None = None,
        *,
        curvature: str = "hessian",
        curvature_examples: int | None = None,
        dynamics: str = "optimizer",
        details: bool = True,
        memory: str | int = "1GB",
        n_jobs: int = 1,
        trust: int | None = None,
    ):
        self.trust = check_count(trust)
        check_choice("curvature", curvature, ("hessian", "ggn"))
        check_choice("dynamics", dynamics, ("optimizer", "flow"))
        self.segments = check_whole("segments", segments)
        self.krylov = check_whole("krylov", krylov, none="as many as it takes")
        few = check_whole("curvature_examples", curvature_examples, none="all")
        self.curvature, self.curvature_examples = curvature, few
        self.dynamics, self.details = dynamics, check_flag("details", details)
        self.memory, self.n_jobs = parse_bytes(memory), check_jobs(n_jobs)

    def __repr__(self) -> str:
        given = f", curvature_examples={self.curvature_examples}" * bool(self.curvature_examples)
        return (
            f"SegmentedInfluence(segments={self.segments}, krylov={self.krylov}, "
            f"curvature={self.curvature!r}{given}, dynamics={self.dynamics!r}, "
            f"details={self.details})"
        )

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "SegmentedInfluence":
        """Replay every stage's run once for its checkpoints, or take those that were adopted.

        Raises:
            ValueError: a stage was trained to an optimum, or adopted without checkpoints.
            UnsupportedModelError: a model without second derivatives, or in half precision.
        """
        check_instance("pipeline", pipeline, Pipeline)
        self._full = [full.clone() for full in pipeline.trained()]
        for k in range(len(pipeline.stages)):
            require_precision(pipeline.objective(k), "differentiating its run")
            if self.curvature == "hessian":
                require_second_derivative(pipeline.objective(k), "curvature='hessian'")
            else:
                require_loss_curvature(pipeline.objective(k))
        self._runs = kept_runs(pipeline, self.segments, progress)
        self._pipeline, self._reruns = pipeline, {}
        return self

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate=None,
    ) -> Influence:
        """Influence of one stage's examples on each query, as `ImplicitInfluence.score`.

        Raises:
            ValueError, TypeError: queries or target do not fit; the pipeline changed since fit.

        Warns:
            UnsmoothTrainingWarning: removals will be predicted badly, as for `UnrolledInfluence`.
                Of adopted checkpoints, and with ``trust=0``: the run amplifies changes, or its
                curvature changes much from stretch to stretch, median `changes_` above 2.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before score(queries)")
        pipeline, first = self._pipeline, self._pipeline.index(stage)
        pipeline.require_unchanged(self._full)
        o = pipeline.objective(-1)
        question = ask(o, queries, target, aggregate, derivative=True)
        start = time.perf_counter()
        gradients = query_gradients(o, self._full[-1], question)
        values, self.adjoint_norms_, self.changes_ = self._sweep(
            self._runs, gradients, first, progress
        )
        spent = time.perf_counter() - start
        trust = None
        if self.trust == 0 or pipeline.adopted:
            warn_of_growth(self.adjoint_norms_)
            _warn_of_changes(float(self.changes_.median()))
        else:
            whole = queries, target, aggregate
            trust = self._measure(first, values, question, whole, spent, progress=progress)
        about = pipeline.stages[first].name, question.target, repr(self), question.aggregate
        ids, origin = pipeline.stages[first].data.ids, pipeline.origin(question)
        return Influence(values, ids, question.ids, *about, origin, trust)

    def _measure(self, first: int, *known, progress: bool) -> Trust | None:
        """As `UnrolledInfluence` measures it."""
        if first not in self._reruns:
            self._reruns[first] = Reruns(self._pipeline, first, memory=self.memory)
        growth = growth_if_rough(self.adjoint_norms_)
        return measured_trust(self._reruns[first], self.trust, *known, growth, progress)

    def _sweep(
        self, runs: Sequence[KeptRun], gradients: Tensor, first: int, progress: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Backwards through all stages down to ``first``, some of the queries at a time.

        Returns:
            the scores of its examples ``(Q, m)``, by stage the mean ‖θ̄‖ at each checkpoint, and the
            changes of curvature ``(Q,)``.
        """
        jobs = joblib.effective_n_jobs(self.n_jobs)
        lengths = [run.lengths for run in runs]
        few = min(self._side_by_side(self._pipeline, first, lengths), -(-len(gradients) // jobs))
        parts = gradients.split(few)
        each = sum(len(run.rates) for run in runs[first:])
        with progress_bar(each * len(parts), "sweep", progress) as bar:
            if jobs == 1 or len(parts) == 1:
                done = [self._swept(runs, part, first, bar) for part in parts]
            else:
                done, calls = [], [(runs, part, first) for part in parts]
                for _, result in each_result(self._swept, calls, self.n_jobs):
                    done.append(result)
                    bar.update(each)
        values, sizes, changes = zip(*done, strict=True)
        names = [stage.name for stage in self._pipeline.stages[first:]]
        norms = [sum(parts).cpu() / len(gradients) for parts in zip(*sizes, strict=True)]
        return torch.cat(values), dict(zip(names, norms, strict=True)), torch.cat(changes).cpu()

    def _swept(
        self, runs: Sequence[KeptRun], cotangent: Tensor, first: int, bar=None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """`_sweep` for some of the queries: scores, ``Σ_q ‖θ̄_q‖`` of each stage, and changes."""
        pipeline, sizes = self._pipeline, []
        changes = [cotangent.new_zeros(len(cotangent))]
        for k in range(len(runs) - 1, first - 1, -1):
            adjoint, norms = self._backwards(runs, k, cotangent, k > first, bar)
            sizes.insert(0, norms)
            changes += adjoint.changes
            if k > first:
                cotangent = adjoint.before(pipeline.objective(k - 1).layout.size)
        return adjoint.scores, sizes, torch.stack(changes).norm(dim=0)

    def _backwards(
        self, runs: Sequence[KeptRun], k: int, cotangent: Tensor, onwards: bool, bar
    ) -> tuple[PathAdjoint | SegmentAdjoint, Tensor]:
        """Through one stage, and ``Σ_q ‖θ̄_q‖`` at its checkpoints."""
        pipeline, run = self._pipeline, runs[k]
        functional = pipeline.functional(k)
        if self._step_by_step(known_sizes(run), run.lengths, len(functional.objective.data)):
            lanes = pipeline.fresh_lanes(k, runs[k - 1].fulls[-1][None] if k else None)
            settings = {"onwards": onwards, "memory": self.memory}
            adjoint = PathAdjoint(functional, RunPath(run, lanes), cotangent, **settings)
            norms = cotangent.new_zeros(len(run.rates) + 1)
            adjoint.sweep(norms, bar)
            return adjoint, norms[run.steps]
        adjoint = SegmentAdjoint(functional, run.recipe, cotangent, self._reading, onwards=onwards)
        shares = run.recipe.shares(functional.objective)
        adjoint.sweep(stretches_of(run, self.details, shares), bar)
        return adjoint, torch.stack(adjoint.sizes)

    @property
    def _reading(self) -> Reading:
        return Reading(self.krylov, self.curvature, self.curvature_examples, self.dynamics)

    def _step_by_step(self, sizes: list[int] | None, lengths: list[int], m: int) -> bool:
        """Whether to take each step's own Hessian, of its batch, instead of its stretch's.

        If nothing else was asked for, the batches are known, and there are no more of them than
        products in Krylov spaces, or together they hold a quarter of the examples of those: of
        small batches a product costs more than in proportion.

        Args:
            sizes: how many examples each step had; None where the path cannot be followed.
            lengths: how many steps each stretch had.
            m: how many examples there are.
        """
        if not self.details or self._reading != Reading() or sizes is None:
            return False
        left, products, seen = iter(sizes), 0, 0
        for length in lengths:
            dimension = self._reading.dimension(length)
            products += dimension
            seen += dimension * min(m, sum(itertools.islice(left, length)))
        return len(sizes) <= products or 4 * sum(sizes) <= seen

    def plan(self, pipeline: Pipeline, queries: Examples | int) -> SegmentedPlan:
        """Products and bytes at most, and estimated seconds, for this many queries.

        The first stage's scores are meant; those of later ones take less. All queries together, as
        with ``aggregate``, count as one.

        Raises:
            MemoryBudgetError: the Krylov spaces of one query exceed the budget.
            ValueError: no queries, or a pipeline that `fit` would refuse.
        """
        check_instance("pipeline", pipeline, Pipeline)
        count = count_queries(queries)
        lengths = step_counts(pipeline, self.segments)
        part = min(count, self._side_by_side(pipeline, 0, lengths))
        sizes = []
        for k, stage in enumerate(pipeline.stages):
            m = len(stage.data)
            if pipeline.adopted:
                batches = known_sizes(pipeline.runs[k])
            else:
                batches = [len(batch) for batch, _ in stage.recipe.steps(m)]
            sizes.append(batches if self._step_by_step(batches, lengths[k], m) else None)
        dimensions = [[self._reading.dimension(n) for n in each] for each in lengths]
        details = self.details and (not pipeline.adopted)
        few = self.curvature_examples
        asked = self.curvature, few, details, self.memory
        spaces = self._bytes(pipeline, 0, lengths, part)
        return segmented_plan(pipeline, count, part, spaces, lengths, dimensions, sizes, *asked)

    def check(
        self, queries: Examples | None = None, stage: int | str = 0, progress: bool = True
    ) -> "SegmentCheck":
        """Compare the scores with those from half as many stretches of the same checkpoints.

        It sees the error from the length of the stretches alone, not that of Krylov spaces or of
        what no derivative can tell, and its r is no estimate of the r with the run's own
        derivative. On digits nets (``bench_segmented.py warning``) an r of at least 0.9 went with
        0.86 to 1.00 of the latter. In rough runs it is too high, since both readings err alike:
        0.92 where it was 0.86, 0.70 where it was 0.15. In smooth ones it is too low: 0.73 where it
        was 0.95. `UnrolledInfluence` is the sure comparison where the run can be replayed.

        Args:
            queries: default the first five training examples of the last stage.
            stage: whose examples.
            progress: show a bar if it takes longer than two seconds.

        Warns:
            UnsmoothTrainingWarning: the two correlate by less than 0.9 for the median query.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before check()")
        first = self._pipeline.index(stage)
        queries = self._pipeline.stages[-1].data[:5] if queries is None else queries
        scorer = copy.copy(self)
        scorer.trust = 0  # nothing is retrained here
        whole = scorer.score(queries, stage, progress=progress).values
        self.adjoint_norms_ = scorer.adjoint_norms_
        question = ask(self._pipeline.objective(-1), queries, "loss", derivative=True)
        gradients = query_gradients(self._pipeline.objective(-1), self._full[-1], question)
        coarse = [run.thinned(max(1, (len(run.steps) - 1) // 2)) for run in self._runs]
        half, *_ = self._sweep(coarse, gradients, first, progress)
        pairs = zip(whole, half, strict=True)
        r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
        report = SegmentCheck(r.cpu(), ((whole - half).norm(dim=1) / whole.norm(dim=1)).cpu())
        if not float(report.r.median()) >= 0.9:
            warnings.warn(
                f"{report}: the stretches are too long for their curvature to be constant; keep "
                "more checkpoints, or raise segments=",
                UnsmoothTrainingWarning,
                stacklevel=2,
            )
        return report

    def _side_by_side(self, pipeline: Pipeline, first: int, lengths: list[list[int]]) -> int:
        """How many queries to take at once, from the memory that their Krylov spaces take.

        Together they have a space of so many times the dimensions, in which every step has two
        responses: more than a few dozen gain nothing.

        Args:
            lengths: how many steps each stretch of every stage has.
        """
        what = "the Krylov space of a single query"
        needed = functools.partial(self._bytes, pipeline, first, lengths)
        require_memory(needed(1), self.memory, what, "give more memory= or a smaller krylov=")
        return max(q for q in range(1, MOST_TOGETHER + 1) if needed(q) <= self.memory)

    def _bytes(self, pipeline: Pipeline, first: int, lengths: list[list[int]], queries: int) -> int:
        """What the Krylov spaces of so many queries take, with the responses of every step."""
        stages = range(first, len(pipeline.stages))
        widest = max(pipeline.objective(k).layout.size for k in stages)
        longest = max(max(lengths[k]) for k in stages)
        dimensions = self.krylov or MOST_DIMENSIONS
        size = pipeline.trained()[-1].element_size()
        vectors = widest * (VECTORS * (dimensions + 2) + 9)
        return size * queries * (vectors + COORDINATES * longest * dimensions)


def _warn_of_changes(changes: float) -> None:
    if changes > UNSTEADY:
        warnings.warn(
            f"curvature changes from stretch to stretch by {changes:.1f} (changes_, the median of "
            f"the queries; above {UNSTEADY:.0f} scores are often far from the run's derivative): "
            "raise segments= or keep more checkpoints, or use UnrolledInfluence",
            UnsmoothTrainingWarning,
            stacklevel=3,
        )
