"""Unrolled influence: the derivative of the whole multi-stage run that really happened.

Once seeds and batch order are fixed, the final parameters are a function of the example weights,
however early training stopped. Its derivative goes backwards through the last stage first
(`adjoint`), then over each link into the stage before. Derived in notebooks/09.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import check_flag, check_instance, check_number, check_whole, numbers_of
from ..curvature.derivatives import query_gradients
from ..data.examples import Examples
from ..errors import UnsmoothTrainingWarning
from ..memory import parse_bytes
from ..objective.checks import ask
from ..objective.questions import Question
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from .adjoint import Adjoint, Probes
from .cost import UnrolledPlan, count_queries, make_plan, timed
from .replay import (
    Trajectory,
    even_bounds,
    require_run,
    require_same_end,
)
from .result import Influence
from .run_check import RunCheck, check_run
from .trust import Reruns, Trust, check_count, measured_trust

__all__ = ["UnrolledInfluence"]

# Growth of the adjoint on its way back through all stages. Of 272 runs of MLPs on digits and of
# small transformers, half of them on seeds that the limits were not chosen on, none had r > 0.9
# above the first limit and most r < 0.5; none had r > 0.2 above the second (bench_chaos.py).
ROUGH = 5.0
CHAOTIC = 100.0


def growth_in_words(norms: dict[str, Tensor]) -> tuple[float, str]:
    """How far adjoints of these sizes along each stage's run have grown on their way back."""
    growth = {n: float(norm.max() / norm[-1].clamp(min=1e-30)) for n, norm in norms.items()}
    whole = math.prod(growth.values())  # a change in one stage goes on through the next
    each = ", ".join(f"{name!r} {factor:.0f}-fold" for name, factor in growth.items())
    return whole, f"the run amplifies small changes {whole:.0f}-fold ({each})"


def growth_if_rough(norms: dict[str, Tensor]) -> str:
    """`growth_in_words` where it is beyond the first limit, else nothing."""
    whole, words = growth_in_words(norms)
    return words if whole > ROUGH else ""


def warn_of_growth(norms: dict[str, Tensor], stacklevel: int = 3) -> None:
    """Warn where adjoints of these sizes along each stage's run have grown on their way back."""
    whole, words = growth_in_words(norms)
    if whole <= ROUGH:
        return
    verdict = "so rough that its derivatives predict removals poorly"
    if whole > CHAOTIC:
        verdict = "too chaotic for its derivatives to predict removals"
    warnings.warn(
        f"{words}, {verdict}; lower the learning rate, warm it up or let it decay, and see check()",
        UnsmoothTrainingWarning,
        stacklevel=stacklevel,
    )


class UnrolledInfluence:
    """Multi-stage influence as the exact derivative of the training runs, converged or not.

    The thought experiment: give example i weight ``w_i``, rerun every stage with the same initial
    weights and the same batches, and watch q. The answer, ``∂q/∂w_i`` at w = 1, takes one sweep
    backwards over all steps, for all queries and all examples together. For stages trained by
    `SGD`, `Adam` or `AdamW`; for stages trained to an optimum `ImplicitInfluence` gives the same
    answer without a run to replay.

    Args:
        memory: for states of the run, adjoints and batch derivatives, as ``"1GB"``. Where not every
            step's state fits, states are recomputed from checkpoints, bit for bit.
        segments: cut every stage's run into this many stretches instead of letting the budget
            decide.
        group_fraction: p > 0 predicts the removal of *random groups* holding this fraction of the
            stage's examples better, at the price of one more training: the run is differentiated
            at w̄ = 1 − p, the average of such removals, instead of w = 1. Where q is quadratic in w
            the best linear predictor has the scores ``∂q/∂w_i(w̄) + ½ (2p − 1) ∂²q/∂w_i²``; so the
            gradient at w̄ alone is best only for p = ½, or where that diagonal is zero.
            ``leave_one_out=True`` adds most of the diagonal; where that is small the noise of the
            probes can cost more than it gains. The scores then predict removal, its mean
            included, and are no longer the derivative.
        leave_one_out: predict the removal of *single examples* better, at the price of about one
            more sweep: without example i its own curvature leaves the steps too, which
            `ImplicitInfluence(leave_one_out=True)` accounts for by ``H − h_i/m`` and the run by
            ``(1/|B|) ḡᵀ h_i ∂θ/∂w_i`` in each step that holds i. That is half of ``∂²q/∂w_i²``
            without the curvature of q itself and third derivatives of the loss; with
            `group_fraction` 1 − 2p of it is taken. How θ depends on each weight is estimated from
            runs of the stage with all weights changed a little at random.
        probes: pairs of such runs, all at once; more for longer training, whose estimate is
            noisier.
        trust: how many runs to make under other example weights to say how far the scores will
            predict removals, as ``scores.trust_`` (see `Trust`). Default 2, from 20 queries
            on 4, from 50 on 8: side by side they take from 1.5 trainings in small nets to one each
            in large ones. They serve later calls too; 0 makes none, and then only the growth of the
            adjoint warns.

    Attributes:
        plan_: after `score`, the `UnrolledPlan` that was followed.
        adjoint_norms_: after `score`, per stage ``(T + 1,)``: the queries' mean ‖θ̄‖ before each
            step and, last, at the end of the run. Growth backwards in time means a run that
            amplifies small changes.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2)
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, recipe=recipe)
    >>> scores = msif.UnrolledInfluence().fit(msif.Pipeline([stage]).fit()).score(test[:3])
    >>> scores.values.shape
    torch.Size([3, 1201])

    Reference: Ilyas & Engstrom 2025 (arXiv 2504.16430) for one stage; across stages, notebooks/09.
    """

    def __init__(
        self,
        *,
        memory: str | int = "1GB",
        segments: int | None = None,
        group_fraction: float = 0.0,
        leave_one_out: bool = False,
        probes: int = 32,
        trust: int | None = None,
    ):
        self.trust = check_count(trust)
        self.memory = parse_bytes(memory)
        self.segments = check_whole("segments", segments, none="as many as fit the memory")
        share = "a fraction of the examples, in [0, 1)"
        fraction = check_number("group_fraction", group_fraction, lambda p: 0 <= p < 1, share)
        self.group_fraction = float(fraction)
        self.leave_one_out = check_flag("leave_one_out", leave_one_out)
        self.probes = check_whole("probes", probes)
        self.plan_: UnrolledPlan | None = None
        self.adjoint_norms_: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        asked = f", group_fraction={self.group_fraction}" if self.group_fraction else ""
        asked += f", leave_one_out=True, probes={self.probes}" if self.leave_one_out else ""
        return f"UnrolledInfluence(memory={self.memory}, segments={self.segments}{asked})"

    def plan(self, pipeline: Pipeline, queries: Examples | int) -> UnrolledPlan:
        """Segments, bytes and estimated seconds for this many queries, before any long work.

        All queries together, as with ``aggregate``, count as one. The runs for ``trust_`` come on
        top of the seconds.

        Raises:
            MemoryBudgetError: not even the smallest plan fits the budget.
            ValueError: the pipeline cannot be unrolled (see `fit`).
        """
        check_instance("pipeline", pipeline, Pipeline)
        require_run(pipeline)
        plan = self._plan(pipeline, count_queries(queries))
        return timed(plan, pipeline, self.memory, fits=1 + (self.group_fraction > 0))

    @property
    def _corrected(self) -> bool:
        """Whether there is anything to correct by probes: at p = ½ there is not."""
        return self.leave_one_out and self.group_fraction != 0.5

    def _plan(self, pipeline: Pipeline, queries: int) -> UnrolledPlan:
        runs = 1 + (self.group_fraction > 0) + 2 * self.probes * self._corrected
        return make_plan(pipeline, queries, self.memory, self.segments, runs)

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "UnrolledInfluence":
        """Replay the pipeline's training and keep its states or checkpoints.

        Raises:
            ValueError: not trained, adopted, changed since, trained by `LBFGS`, or the replay does
                not end at the trained weights.
            MemoryBudgetError: not even √T checkpoints fit their half of the budget.
        """
        check_instance("pipeline", pipeline, Pipeline)
        require_run(pipeline)
        trained = pipeline.trained()
        self._pipeline, self._at, self._reruns = pipeline, {}, {}
        plan = self._plan(pipeline, 1)
        runs = self._replay(plan, {}, progress)
        for stage, run, end in zip(pipeline.stages, runs, trained, strict=True):
            require_same_end(stage.name, run.final[0], end)
        self._runs, self._full = runs, [t.clone() for t in trained]
        return self

    def _replay(
        self, plan: UnrolledPlan, weights: dict[int, float | Tensor], progress: bool
    ) -> list[Trajectory]:
        """Every stage's run; ``weights``: of a stage's examples, all or ``(m,)``, where not one."""
        runs, previous = [], None
        with progress_bar(sum(plan.steps.values()), "replay", progress) as bar:
            for k, stage in enumerate(self._pipeline.stages):
                lanes = self._pipeline.fresh_lanes(k, previous)
                lanes = replace(lanes, weights=weights.get(k, 1.0) * lanes.weights)
                bounds = even_bounds(plan.steps[stage.name], plan.segments[stage.name])
                runs.append(Trajectory(stage.recipe, lanes, bounds).run(bar))
                previous = runs[-1].final
        return runs

    def _differentiated_at(
        self, first: int, progress: bool
    ) -> tuple[list[Trajectory], Probes | None]:
        """The runs to be differentiated, and the probes of the scored stage."""
        runs = self._runs
        if self.group_fraction:
            runs = self._replay(self.plan_, {first: 1 - self.group_fraction}, progress)
        return runs, self._probe(runs[first]) if self._corrected else None

    def _replayed_with(self, weights: Tensor, first: int, progress: bool) -> list[Trajectory]:
        """The runs under given weights of one stage's examples, checked."""
        if self.group_fraction or self.leave_one_out:
            raise ValueError(
                "weights= says where the run is differentiated, and so do group_fraction and "
                f"leave_one_out: {self!r}; use UnrolledInfluence() for it"
            )
        lanes, m = self._runs[first].lanes, len(self._pipeline.stages[first].data)
        at = numbers_of("weights", weights, f"numbers, one for each of the {m} examples")
        if at.shape != (m,) or not bool(torch.isfinite(at).all()):
            raise ValueError(
                f"weights of shape {tuple(at.shape)} must be {m} finite numbers, one for each "
                f"example of stage {self._pipeline.stages[first].name!r}"
            )
        return self._replay(self.plan_, {first: at.to(lanes.weights)}, progress)

    def _probe(self, run: Trajectory) -> Probes:
        """A stage's run once more, under ``2 · probes`` weightings close to its own."""
        o = run.lanes.objective
        h = 1e-3 if o.dtype == torch.float64 else 1e-2
        draw = torch.Generator().manual_seed(0)
        signs = 2 * torch.randint(0, 2, (self.probes, len(o.data)), generator=draw) - 1
        signs = signs.to(run.lanes.weights)
        one = torch.zeros(2 * self.probes, dtype=torch.int64, device=signs.device)
        weights = run.lanes.weights + h * torch.cat([signs, -signs])
        lanes = replace(run.lanes.select(one), weights=weights)
        share = 1 - 2 * self.group_fraction
        return Probes(Trajectory(run.recipe, lanes, run.bounds).run(), signs / h, share)

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate: str | Sequence[float] | Tensor | Callable | None = None,
        weights: Tensor | None = None,
    ) -> Influence:
        """Influence of one stage's examples on each query, as `ImplicitInfluence.score`.

        With ``aggregate`` one row, on one number of all queries, at the price of one query's sweep.
        The weights ``c_q = ∂A/∂q`` of a function of all queries are those at the end of the run
        that is differentiated, at w̄ with `group_fraction`.

        With ``weights`` ``(m,)`` the derivatives ``∂q/∂w_i`` at these weights of the stage's
        examples instead of at one: the run is replayed with them, as `guided` asks for. ``trust_``
        is not measured there.

        Raises:
            ValueError, TypeError: queries, target or aggregate do not fit; the pipeline changed
                since fit.
            MemoryBudgetError: a single query's sweep exceeds the budget.

        Warns:
            UnsmoothTrainingWarning: removals will be predicted badly, as a few real runs show
                (``scores.trust_``). With ``trust=0``: the run amplifies changes so much that
                derivatives predict removals poorly (more than 5-fold over all stages) or not at all
                (100-fold).
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before score(queries)")
        pipeline, first = self._pipeline, self._pipeline.index(stage)
        pipeline.require_unchanged(self._full)
        question = ask(pipeline.objective(-1), queries, target, aggregate, derivative=True)
        self.plan_ = self._plan(pipeline, len(question))
        if weights is not None:
            runs, probes = self._replayed_with(weights, first, progress), None
        else:
            asked = first, self.group_fraction, self.leave_one_out, self.probes
            if asked not in self._at:
                self._at = {asked: self._differentiated_at(first, progress)}
            runs, probes = self._at[asked]
        start = time.perf_counter()
        values, self.adjoint_norms_ = self._sweep(
            runs, first, question, self.plan_, probes, progress
        )
        if self.group_fraction:
            values = values + self._level(runs, values, question)
        spent = time.perf_counter() - start
        trust = None
        if weights is not None:
            warn_of_growth(self.adjoint_norms_)
        else:
            whole = queries, target, aggregate
            trust = self._measure(first, values, question, whole, spent, progress=progress)
        about = pipeline.stages[first].name, question.target, repr(self), question.aggregate
        ids, origin = pipeline.stages[first].data.ids, pipeline.origin(question)
        return Influence(values, ids, question.ids, *about, origin, trust)

    def _measure(self, first: int, *known, progress: bool) -> Trust | None:
        """How far these scores predict removals, with a warning where that, or growth, is bad."""
        if self.trust == 0:
            warn_of_growth(self.adjoint_norms_, stacklevel=4)
            return None
        how = first, self.group_fraction, self.leave_one_out
        if how not in self._reruns:
            self._reruns[how] = Reruns(self._pipeline, *how, memory=self.memory)
        growth = growth_if_rough(self.adjoint_norms_)
        return measured_trust(self._reruns[how], self.trust, *known, growth, progress)

    def _level(self, runs: Sequence[Trajectory], values: Tensor, question: Question) -> Tensor:
        """What to add to every score so that −Σ over a group of pN is right on average, ``(Q, 1)``.

        Around w̄ = 1 − p: ``q(w) ≈ q(w̄) + Σ_j s_j (w_j − w̄)``. Relative to q(1) that is −Σ over the
        group plus ``q(w̄) − q(1) + p Σ_j s_j`` for all; each of the pN members carries its share.
        """
        p, m = self.group_fraction, values.shape[1]
        o = self._pipeline.objective(-1)
        ends = runs[-1].final[0], self._full[-1]
        there, here = (question.answer(question.values(o, full))[:, None] for full in ends)
        return -(there - here + p * values.sum(1, keepdim=True)) / (p * m)

    def _sweep(
        self,
        runs: Sequence[Trajectory],
        first: int,
        question: Question,
        plan: UnrolledPlan,
        probes: Probes | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Backwards through all stages down to ``first``, some of the queries at a time.

        Returns:
            the scores of its examples ``(Q, m)``, and by stage the mean ‖θ̄‖ before each step and
            at the end.
        """
        o, final = self._pipeline.objective(-1), runs[-1].final[0]
        gradients = query_gradients(o, final, question)  # (Q, D): ∇q in all of the last stage
        stages = range(len(runs) - 1, first - 1, -1)
        steps = {k: len(runs[k].steps) for k in stages}
        norms = {k: final.new_zeros(steps[k] + 1) for k in stages}
        values = []
        with progress_bar(plan.sweeps * sum(steps.values()), "sweep", progress) as bar:
            for cotangent in gradients.split(plan.part):
                for k in stages:
                    adjoint = Adjoint(
                        self._pipeline.functional(k),
                        runs[k],
                        cotangent,
                        onwards=k > first,
                        memory=self.memory,
                        probes=probes if k == first else None,
                    )
                    adjoint.sweep(norms[k], bar)
                    if k > first:
                        cotangent = adjoint.before(self._pipeline.objective(k - 1).layout.size)
                values.append(adjoint.scores)
        names = {k: self._pipeline.stages[k].name for k in reversed(stages)}
        return torch.cat(values), {n: (norms[k] / len(question)).cpu() for k, n in names.items()}

    def check(
        self,
        n: int = 3,
        queries: Examples | None = None,
        stage: int | str = 0,
        steps: Sequence[float] | None = None,
        seed: int = 0,
    ) -> RunCheck:
        """Compare the derivatives of n random examples with reruns of all stages.

        Their weights are changed a little, for central differences, and set to 0 and 2.

        Args:
            n: examples to try; all stages are run ``2 n (len(steps) + 1)`` times, side by side.
            queries: default the first five training examples of the last stage.
            stage: whose examples.
            steps: changes h in weight for the central differences ``(q(1 + h) − q(1 − h)) / 2h``.
            seed: of the choice of examples.

        Warns:
            UnsmoothTrainingWarning: an example's derivative is more than 5 % from differences of
                the run at every step; or removing an example and doubling it do not have opposite
                effects (median nonlinearity above 0.3), so its derivative says little about its
                removal.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before check()")
        pipeline, norms = self._pipeline, {}
        k = pipeline.index(stage)
        queries = pipeline.stages[-1].data[:5] if queries is None else queries

        def derivative() -> Tensor:
            pipeline.require_unchanged(self._full)
            question = ask(pipeline.objective(-1), queries, "loss", derivative=True)
            plan = self._plan(pipeline, len(question))
            values, found = self._sweep(self._runs, k, question, plan)
            norms.update(found)
            return values

        report = check_run(pipeline, derivative, n, queries, k, steps, seed)
        warn_of_growth(norms)
        report.warn(stacklevel=3)
        return report
