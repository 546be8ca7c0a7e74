"""Implicit influence through any number of stages, each trained to a minimum."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arguments import check_choice, check_damping, check_flag, check_instance, shown
from ..curvature.derivatives import (
    cross_products,
    example_products,
    per_example_gradients,
    product_chunks,
    query_gradients,
)
from ..data.examples import Examples
from ..errors import ConvergenceWarning, IndefiniteCurvatureError
from ..memory import working_bytes
from ..objective.checks import ask
from ..objective.questions import Question
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from ..pipeline.stages import Stage, WarmStart
from ..solvers.exact import as_solver
from ..solvers.report import SolveReport
from .cost import Plan, plan
from .leave_one_out import removal_steps
from .replay import as_proximal
from .result import Influence, TopInfluence, rank_stream

__all__ = ["ImplicitInfluence"]

SOLVING_BYTES = 2 * 10**9  # what queries solved side by side may take on a CPU


class ImplicitInfluence:
    """Multi-stage influence by the implicit function theorem, for stages trained to a minimum.

    The thought experiment: give example i weight ``w_i`` in its stage, retrain this stage and all
    later ones to their minima, and watch q. The answer, ``∂q/∂w_i``, comes from one pass backwards:
    with ``a`` the gradient of q in a stage's parameters, ``v = H⁻¹ a``; that stage's own examples
    score ``−(1/m) vᵀ∇f_i``; the stage before gets ``2α v_S`` through a `Proximal` link,
    ``a_W − G_WT v`` through a `Frozen` one. With one stage this is Koh & Liang (2017); with two,
    the two cases of Chen et al. (2020).

    Args:
        solver: how ``H v = a`` is solved: `Exact` (default), `ConjugateGradient`, `MINRES`,
            `LiSSA`, approximately by `LowRank` or `EKFAC`, or ``"auto"``: what `plan` suggests for
            each stage, printed with its reason.
        curvature: which matrix is inverted: ``"hessian"``, or ``"ggn"`` where the Hessian is not
            positive definite (the cross block of the frozen case stays exact).
        damping: added to H; a modelling choice, 0 by default.
        leave_one_out: replace H by ``H − h_i/m`` for example i with its own curvature ``h_i``,
            because removal is a finite step: the scores then predict removal, not the derivative.
            For squared error and a model linear in its parameters, ridge regression, they are the
            refits themselves, even with fewer examples than parameters, where the derivative is
            hundreds of times too small; in float64 to about ``ε ‖H‖ / λ``. Elsewhere it is one
            Newton step; where that overshoots, a `ConvergenceWarning` names the examples and their
            scores are rough. Costs a solve per example and output, and an epoch or two for each
            example whose step is long; meant for `Exact`.

    Attributes:
        report_: after `score`, one `SolveReport` per stage solved, by stage name.
        plan_: with ``solver="auto"``, after `fit`, the `Plan` that was followed.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> model = msif.softmax_regression(64, 10).double()
    >>> stage = msif.Stage("digits", model, train, weight_decay=1e-2)
    >>> scores = msif.ImplicitInfluence().fit(msif.Pipeline([stage]).fit()).score(test[:3])
    >>> scores.values.shape
    torch.Size([3, 1201])

    Reference: Chen et al., Multi-Stage Influence Function, NeurIPS 2020 (arXiv 2007.09081),
    theorems 1 and 2.
    """

    def __init__(
        self,
        solver=None,
        *,
        curvature: str = "hessian",
        damping: float = 0.0,
        leave_one_out: bool = False,
    ):
        check_choice("curvature", curvature, ("hessian", "ggn"))
        self.solver = solver if isinstance(solver, str) and solver == "auto" else as_solver(solver)
        self.curvature = curvature
        self.damping = check_damping(damping)
        self.leave_one_out = check_flag("leave_one_out", leave_one_out)
        self.plan_: Plan | None = None
        self.report_: dict[str, SolveReport] = {}

    def __repr__(self) -> str:
        settings = f"{self.solver}, curvature={self.curvature!r}, damping={self.damping}"
        settings += ", leave_one_out=True" if self.leave_one_out else ""
        return f"ImplicitInfluence({settings})"

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "ImplicitInfluence":
        """Do the query-free work once: the curvature of every stage, prepared for solving.

        Args:
            pipeline: trained.
            progress: show a bar over the stages if it takes longer than two seconds.

        Raises:
            ValueError: the pipeline is not trained, or has a `WarmStart` link.
            IndefiniteCurvatureError, MemoryBudgetError: from the solver.

        Warns:
            ConvergenceWarning: a stage is not at a stationary point, with its gradient norm.
            SymmetryWarning: from `Exact`; a stage's minimum is flat along a symmetry.
        """
        check_instance("pipeline", pipeline, Pipeline)
        self._full = [full.clone() for full in pipeline.trained()]
        self._pipeline = pipeline
        self._steps: dict[int, Tensor] = {}  # by stage, from `removal_steps`
        self._prepared = []
        for stage in pipeline.stages:
            _refuse_warm_start(stage, pipeline.adopted)
        if self.solver == "auto":
            self.plan_ = plan(pipeline, kind=self.curvature, damping=self.damping)
            print(self.plan_)
        with progress_bar(len(pipeline.stages), "curvature", progress) as bar:
            for k, stage in enumerate(pipeline.stages):
                solver = self.plan_.solver(stage.name) if self.plan_ else self.solver
                operator = pipeline.curvature(k, self.curvature)
                self._check_stationary(k, operator.gradient_norm)
                operator = operator + self.damping if self.damping else operator
                try:
                    self._prepared.append(solver.prepare(operator))
                except IndefiniteCurvatureError as error:
                    message = f"stage {stage.name!r}: {error}"
                    raise IndefiniteCurvatureError(message, error.smallest) from None
                bar.update()
        return self

    def _check_stationary(self, k: int, left: float) -> None:
        """Warn when the remaining gradient is not small beside one example's share, ‖∇f_i‖/m."""
        o = self._pipeline.objective(k)
        few = 256 if o.size < 10**5 else 32  # an order of magnitude is enough
        some = torch.arange(0, len(o.data), -(-len(o.data) // few), device=o.device)
        parts = per_example_gradients(o, self._full[k], rows=some)
        squares = torch.cat([gradients.norm(dim=1) ** 2 for _, gradients in parts])
        pull = float(squares.mean().sqrt()) / len(o.data)
        if left > 0.1 * pull:
            warnings.warn(
                f"{o.where} is not at a stationary point: ‖∇F‖ = {left:.1e}, one example's pull "
                f"is {pull:.1e}. Implicit influence assumes an optimum; train with LBFGS(), or "
                "for longer",
                ConvergenceWarning,
                stacklevel=3,
            )

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate: str | Sequence[float] | Tensor | Callable | None = None,
        top: int | None = None,
    ) -> Influence | TopInfluence:
        """Influence of one stage's examples on each query, or on one number of all queries.

        Such a number, A, costs as much as one query: its gradient ``Σ_q c_q ∇q``, with
        ``c_q = ∂A/∂q``, is one backward pass through the queries, and goes on as theirs would.

        Args:
            queries: examples of the last stage's task, Q of them.
            stage: whose training examples to score, by name or index.
            target: q: ``"loss"``, ``"margin"``, ``"output"``, or a function
                ``(outputs, targets) -> (B,)``.
            progress: show a bar over the queries if their solves take longer than two seconds.
            aggregate: None for a row per query; for one row, A is their ``"mean"`` (a validation
                loss) or ``"sum"``, ``Σ_q w_q q`` for weights ``(Q,)`` of any sign (a fairness
                gap), or a function of all q ``(Q,)`` that gives one number and need not be a sum
                (a calibration error). Then ``target`` may give several numbers for each query,
                ``(B, K)``, and the function gets ``(Q, K)``.
            top: keep only this many lowest and highest scores of each query, so that ``(Q, N)`` is
                never held.

        Returns:
            `Influence` with values ``(Q, N)``, or with ``top`` a `TopInfluence`. With
            ``aggregate`` there is one row, its query id is −1, and ``.aggregate`` says of what. It
            is named for its target, as "loss"; "weighted loss" where a weight is negative, and
            "gap of loss" for a function ``gap``: a positive score raises A, and that is called
            harmful unless A is the mean, sum or positively weighted sum of margins.

        Raises:
            ValueError, TypeError: queries, target or aggregate do not fit; the target or aggregate
                is a step function, such as accuracy, whose derivative is zero or missing.
            IndefiniteCurvatureError: the queries depend on which of many equal minima was reached.

        >>> import msif_lab as msif
        >>> train, test = msif.load_digits(dtype=torch.float64)
        >>> model = msif.softmax_regression(64, 10).double()
        >>> stage = msif.Stage("digits", model, train, weight_decay=1e-2)
        >>> influence = msif.ImplicitInfluence().fit(msif.Pipeline([stage]).fit())
        >>> influence.score(test, aggregate="mean").values.shape  # on the validation loss
        torch.Size([1, 1201])
        >>> odd = test.y % 2 == 1
        >>> gap = odd / odd.sum() - ~odd / (~odd).sum()  # between the mean losses of two groups
        >>> influence.score(test, aggregate=gap)
        Influence(weighted sum of 596 queries #... × 1201 examples of 'digits' on weighted loss; ...
        """
        known = isinstance(top, int) and not isinstance(top, bool) and top >= 1
        if top is not None and (not known or self.leave_one_out):
            raise ValueError(
                f"top={shown(top)} must be a whole number of at least 1, and needs "
                "leave_one_out=False: the corrections are kept for all examples anyway, so score "
                "without top and use .helpful(k)"
            )
        if not hasattr(self, "_prepared"):
            raise ValueError("call fit(pipeline) before score(queries)")
        first = self._pipeline.index(stage)
        self._pipeline.require_unchanged(self._full)
        question = ask(self._pipeline.objective(-1), queries, target, aggregate, derivative=True)
        reports: list[dict[str, SolveReport]] = []
        parts, solved = list(question.split(self._side_by_side(first))), []
        with progress_bar(len(parts), "solves", progress) as bar:
            for part in parts:
                solved.append(self._solve(part, first, reports))
                bar.update()
        cotangent, solution = solved[0]
        if len(solved) > 1:
            cotangent, solution = map(torch.cat, zip(*solved, strict=True))
        solution = solution.T  # (P, Q)
        self.report_ = {name: _together([r[name] for r in reports]) for name in reports[0]}
        o = self._pipeline.objective(first)
        about = self._pipeline.stages[first].name, question.target, repr(self), question.aggregate
        if top is not None:
            chunks = product_chunks(o, self._full[first], solution / -len(o.data))
            lowest, highest = rank_stream(chunks, min(top, len(o.data)), o.data.ids)
            return TopInfluence(lowest, highest, question.ids, len(o.data), *about)
        values = self._example_scores(first, cotangent, solution)
        origin = self._pipeline.origin(question)
        return Influence(values, o.data.ids, question.ids, *about, origin)

    def _side_by_side(self, first: int) -> int:
        """How many queries to solve at once, from the memory that each one takes."""
        sizes = [self._pipeline.objective(k).layout.size for k in range(first, len(self._full))]
        last = self._full[-1]
        room = 2 * working_bytes(last.device) if last.is_cuda else SOLVING_BYTES
        held = 4 + getattr(self.solver, "vectors", 6)  # here, and in the solver
        return max(1, room // (held * max(sizes) * last.element_size()))

    def _solve(self, question: Question, first: int, reports: list) -> tuple[Tensor, Tensor]:
        """From the queries back to stage ``first``, with one solve per stage.

        Returns:
            ∇q in what the stage trains and ``H⁻¹∇q``, ``(Q, P)`` each; the former without columns
            where it is no longer needed. The solves' reports are added to ``reports`` by stage.
        """
        last = len(self._full) - 1
        # ∇q in all of the last stage
        cotangent = query_gradients(self._pipeline.objective(last), self._full[last], question)
        report = {}
        for k in range(last, first - 1, -1):
            right = self._pipeline.objective(k).trained.take(cotangent)
            solution, report[self._pipeline.stages[k].name] = self._prepared[k].solve(right.T)
            if k > first:
                cotangent = self._pull_back(k, cotangent, solution.T)
        reports.append(report)
        return right if self.leave_one_out else right[:, :0], solution.T

    def _pull_back(self, k: int, cotangent: Tensor, solution: Tensor) -> Tensor:
        """∇q in the stage before (Q, D'), from ∇q in stage k (Q, D) and ``v = H⁻¹∇q`` (Q, P)."""
        functional = self._pipeline.functional(k)
        o, layout = functional.objective, self._pipeline.objective(k - 1).layout
        before = cotangent.new_zeros(len(cotangent), layout.size)
        if functional.coupled:  # proximal: 2α v_S
            pull = 2 * o.alpha * o.coupled.take(solution)
            functional.there["coupled"].put(before, pull)
        names = [name for name in functional.frozen if name in functional.live]
        if names:  # frozen: a_W − G_WT v, for the W that a stage before trains
            direct = o.layout.places(names).take(cotangent)
            through_head = cross_products(o, self._full[k], names, solution)
            there = layout.places(functional.partners(names))
            there.put(before, direct - through_head)
        return before

    def _example_scores(self, k: int, cotangent: Tensor, solution: Tensor) -> Tensor:
        """``−(1/m) ∇qᵀH⁻¹∇f_i`` of the stage's examples, ``(Q, N)``; or with ``(H − h_i/m)⁻¹``."""
        o, full = self._pipeline.objective(k), self._full[k]
        if not self.leave_one_out:
            return -example_products(o, full, solution) / len(o.data)
        if k not in self._steps:
            self._steps[k] = removal_steps(self.curvature, o, full, self._prepared[k], self.damping)
        return -cotangent @ self._steps[k].T


def _together(reports: Sequence[SolveReport]) -> SolveReport:
    """The report of queries that were solved in groups."""
    return replace(
        reports[0],
        iterations=max(r.iterations for r in reports),
        residuals=torch.cat([r.residuals for r in reports]),
        converged=torch.cat([r.converged for r in reports]),
        smallest_curvature=min(r.smallest_curvature for r in reports),
        products=sum(r.products for r in reports),
        bytes=max(r.bytes for r in reports),
        seconds=sum(r.seconds for r in reports),
    )


def _refuse_warm_start(stage: Stage, adopted: bool) -> None:
    if isinstance(stage.link, WarmStart):
        run = "" if adopted else "use UnrolledInfluence on a run by SGD(...) or Adam(...); or "
        raise ValueError(
            f"stage {stage.name!r} has link=WarmStart(): a minimum does not depend on where "
            f"training started, so implicit influence has nothing to say; {run}"
            f"{as_proximal(stage)}, and curvature='ggn' where that is no minimum"
        )
