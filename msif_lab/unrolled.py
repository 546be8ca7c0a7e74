"""Unrolled influence: the derivative of the whole multi-stage run that really happened.

Once seeds and batch order are fixed, the final parameters are a function of the example weights, however early
training stopped. A bar means ∂q/∂; one step of gradient descent with momentum, and its reverse, are

    v ← μ v + ∇L_B(θ; w)        v̄ ← v̄ − η θ̄,    ḡ = v̄
    θ ← θ − η v                 score_i += ∇f_i·ḡ / |B|   for i in B
                                θ̄ ← θ̄ + ∇²L_B ḡ,   v̄ ← μ v̄

The reverse goes through the last stage first, then over each link into the stage before (MATH.md, section 3).
Derived in notebooks/09.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from .curvature import per_example_gradients
from .data import Examples
from .errors import MemoryBudgetError
from .influence import Influence, require_unchanged
from .objective import Objective, ask, target_name
from .pipeline import Pipeline
from .replay import Trajectory, UnrolledPlan, even_bounds, plan_segments
from .storage import parse_bytes
from .training import MiniBatch, progress_bar

__all__ = ["UnrolledInfluence"]


class UnrolledInfluence:
    """Multi-stage influence as the exact derivative of the training runs, converged or not.

    The thought experiment: give example i weight ``w_i``, rerun every stage with the same initial weights and the
    same batches, and watch q. The answer, ``∂q/∂w_i`` at w = 1, takes one sweep backwards over all steps, for all
    queries and all examples together. For stages trained by `SGD`, `Adam` or `AdamW`; for stages trained to an
    optimum `ImplicitInfluence` gives the same answer without a run to replay.

    Args:
        memory: for states of the run, adjoints and batch derivatives, as ``"1GB"``. Where not every step's state
            fits, states are recomputed from checkpoints, same bits.
        segments: cut every stage's run into this many stretches instead of letting the budget decide.

    Attributes:
        plan_: after `score`, the `UnrolledPlan` that was followed.
        adjoint_norms_: after `score`, per stage ``(T,)``: the queries' mean ‖θ̄‖ before each step. Growth backwards
            in time by orders of magnitude means a run so sensitive that removals are beyond any derivative.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, recipe=msif.SGD(lr=0.1, epochs=2))
    >>> scores = msif.UnrolledInfluence().fit(msif.Pipeline([stage]).fit()).score(test[:3])
    >>> scores.values.shape
    torch.Size([3, 1201])

    Reference: Ilyas & Engstrom 2025 (arXiv 2504.16430) for one stage; across stages, MATH.md section 3.
    """

    def __init__(self, *, memory: str | int = "1GB", segments: int | None = None):
        self.memory = parse_bytes(memory)
        if segments is not None and (not isinstance(segments, int) or segments < 1):
            raise ValueError(f"segments={segments!r} must be a whole number of at least 1, or None")
        self.segments = segments
        self.plan_: UnrolledPlan | None = None
        self.adjoint_norms_: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"UnrolledInfluence(memory={self.memory}, segments={self.segments})"

    def plan(self, pipeline: Pipeline, queries: Examples | int) -> UnrolledPlan:
        """Segments, bytes and estimated seconds for so many queries, before anything long is done.

        Raises:
            MemoryBudgetError: not even the smallest plan fits the budget.
            ValueError: the pipeline cannot be unrolled (see `fit`).
        """
        _require_run(pipeline)
        plan = self._plan(pipeline, queries if isinstance(queries, int) else len(queries))
        fit, sweep = 0.0, 0.0
        for k, stage in enumerate(pipeline.stages):
            o, lanes = pipeline.objective(k), pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None)
            theta, full = lanes.base[:, o.rows], lanes.base[0]
            batch, rate = next(iter(stage.recipe.steps(len(stage.data))))
            cotangents = torch.ones_like(theta).expand(plan.part, -1)
            every = bool(k and pipeline.prepared(k).frozen)
            forward = _seconds(stage.recipe.advance, lanes, theta, stage.recipe.start(theta), 0, batch, rate)
            back = _seconds(gradient_transpose, o, full, batch, cotangents, every=every, memory=self.memory // 4)
            replay = forward * (plan.segments[stage.name] > 1)
            fit, sweep = fit + forward * plan.steps[stage.name], sweep + (back + replay) * plan.steps[stage.name]
        return dataclasses.replace(plan, seconds=(fit, sweep * plan.sweeps))

    def _plan(self, pipeline: Pipeline, queries: int) -> UnrolledPlan:
        """Half of the budget for the run's states, a quarter each for adjoints and for one batch's derivatives."""
        if queries < 1:
            raise ValueError(f"queries={queries} must be at least 1")
        steps, segments, stored = plan_segments(pipeline, self.memory // 2, self.segments)
        quarter = self.memory // 4
        adjoint = one = 0
        for k in range(len(pipeline.stages)):
            o = pipeline.objective(k)
            item = pipeline.initial(k).element_size()
            adjoint = max(adjoint, 12 * o.layout.size * item)  # θ̄, its state, ḡ, products, and their temporaries
            one = max(one, o.bytes_per_example())
        part = min(queries, quarter // adjoint, (quarter // one - FIXED_COPIES) // COPIES_PER_QUERY)
        if part < 1:
            needed = 4 * max(adjoint, one * (FIXED_COPIES + COPIES_PER_QUERY))
            raise MemoryBudgetError(
                f"one query's sweep needs a budget of about {needed / 1e6:,.1f} MB, memory= gives "
                f"{self.memory / 1e6:,.1f} MB; give more"
            )
        swept = part * adjoint + quarter
        return UnrolledPlan(steps, segments, stored, swept, self.memory, queries, part)

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "UnrolledInfluence":
        """Replay the pipeline's training, keep its states or checkpoints, and see that it ends at the same weights.

        Raises:
            ValueError: not trained, adopted, changed since, trained by `LBFGS`, or the replay ends elsewhere.
            MemoryBudgetError: not even √T checkpoints fit half of the budget.
        """
        _require_run(pipeline)
        trained = pipeline.trained()
        plan = self._plan(pipeline, 1)
        runs, previous = [], None
        with progress_bar(sum(plan.steps.values()), "replay", progress) as bar:
            for k, stage in enumerate(pipeline.stages):
                lanes = pipeline.fresh_lanes(k, previous)
                bounds = even_bounds(plan.steps[stage.name], plan.segments[stage.name])
                runs.append(Trajectory(stage.recipe, lanes, bounds).run(bar))
                _require_same_end(stage.name, runs[-1].final, trained[k])
                previous = runs[-1].final[None]
        self._pipeline, self._runs, self._full = pipeline, runs, [t.clone() for t in trained]
        return self

    def score(
        self, queries: Examples, stage: int | str = 0, target: str | Callable = "loss", progress: bool = True
    ) -> Influence:
        """Influence of one stage's examples on each query, as `ImplicitInfluence.score`.

        Raises:
            ValueError, TypeError: queries or target do not fit; the pipeline changed since fit.
            MemoryBudgetError: a single query's sweep exceeds the budget.

        Warns:
            UnsmoothTrainingWarning: the adjoints grow so much that no derivative will predict a removal.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before score(queries)")
        pipeline, first = self._pipeline, self._pipeline.index(stage)
        require_unchanged(pipeline, self._full)
        o = pipeline.objective(-1)
        function = ask(o, queries, target)
        self.plan_ = plan = self._plan(pipeline, len(queries))
        gradients = torch.cat([g for _, g in per_example_gradients(o, self._full[-1], queries, function, every=True)])
        total = plan.sweeps * sum(len(run.steps) for run in self._runs[first:])
        self._norms, parts = {}, []
        with progress_bar(total, "sweep", progress) as bar:
            for part in gradients.split(plan.part):  # (Q, D) = ∇q by all parameters of the last stage
                for k in range(len(self._runs) - 1, first - 1, -1):
                    part, values = self._sweep(k, part, first, bar)
                parts.append(values)
        self.adjoint_norms_ = {name: norms.cpu() / len(queries) for name, norms in self._norms.items()}
        self._warn_if_unsmooth()
        scored = pipeline.stages[first]
        return Influence(torch.cat(parts), scored.data.ids, queries.ids, scored.name, target_name(target), repr(self))

    def _sweep(self, k: int, cotangent: Tensor, first: int, bar) -> tuple[Tensor, Tensor]:
        """Backwards through stage k.

        From ∇q by its final parameters (Q, D) to ∇q by those of the stage before (Q, D'), and the scores of
        its own examples (Q, m).
        """
        run, p, recipe = self._runs[k], self._pipeline.prepared(k), self._runs[k].recipe
        o, base, decay = p.objective, run.lanes.base[0], recipe.decay(run.lanes)
        every = k > first and bool(p.frozen)
        ridge = o.ridge - decay  # curvature of the penalty as the gradient has it
        scores = cotangent.new_zeros(len(cotangent), len(o.data))
        norms = self._norms.setdefault(self._pipeline.stages[k].name, cotangent.new_zeros(len(run.steps)))
        theta_bar, frozen_bar = cotangent[:, o.rows], cotangent[:, p.here["frozen"]]
        centre_bar = cotangent.new_zeros(len(cotangent), len(o.coupled))
        state_bar = tuple(torch.zeros_like(theta_bar) for _ in recipe.start(base[o.rows]))
        for segment in reversed(range(len(run.bounds) - 1)):
            records = run.segment(segment)
            for step in reversed(range(*run.bounds[segment : segment + 2])):
                (batch, rate), (theta, saved) = run.steps[step], records.pop()
                batch = batch.to(base.device)
                g_bar, theta_bar, state_bar = recipe.pull_back(theta_bar, state_bar, saved, step, rate, decay)
                full = o.join(theta, base)
                product, own = gradient_transpose(o, full, batch, g_bar, every=every, memory=self.memory // 4)
                scores[:, batch] += own
                if every:  # what is frozen shapes every step's gradient
                    frozen_bar = frozen_bar + product[:, p.here["frozen"]]
                    product = product[:, o.rows]
                theta_bar = theta_bar + product + ridge * g_bar
                centre_bar -= 2 * o.alpha * g_bar[:, o.coupled]  # ∇ of α‖θ_S − c‖² by θ, then by c
                norms[step] += theta_bar.norm(dim=1).sum()
                bar.update()
        if not bool(torch.isfinite(theta_bar).all()):
            raise ValueError(
                f"stage {self._pipeline.stages[k].name!r}: the adjoint overflows, so the run amplifies the smallest "
                "change without bound and no derivative describes it; lower the learning rate or train fewer steps"
            )
        if k == 0:
            return theta_bar, scores
        before = cotangent.new_zeros(len(cotangent), self._pipeline.objective(k - 1).layout.size)
        before[:, p.there["coupled"]] = (
            centre_bar + theta_bar[:, o.coupled]
        )  # centre of the penalty, and start of the run
        before[:, p.there["frozen"]] = frozen_bar
        return before, scores

    def _warn_if_unsmooth(self) -> None: ...


COPIES_PER_QUERY, FIXED_COPIES = 5, 4  # activation sets one example of a batch costs in `gradient_transpose`


def gradient_transpose(
    o: Objective, full: Tensor, batch: Tensor, cotangents: Tensor, *, every: bool = False, memory: int = 10**9
) -> tuple[Tensor, Tensor]:
    """Pull ``ḡ`` back through ``(θ, w) ↦ (1/|B|) Σ_{i∈B} w_i ∇f_i(θ)`` at w = 1.

    By θ that is the Hessian-vector product ``∇²L_B ḡ``, by ``w_i`` the score ``∇f_i·ḡ / |B|``: one pass gives both.

    Args:
        o: the stage.
        full: all its parameters ``(D,)``.
        batch: positions of B in the stage's data.
        cotangents: ḡ ``(Q, P)``.
        every: derivatives by all D parameters, not only the trained P: the other rows hold G_WT ḡ.
        memory: bytes that the pass may take.

    Returns:
        ``(Q, P or D)`` products, the penalty's left out, and ``(Q, |B|)`` scores.
    """
    point = full if every else full[o.rows]
    if every:
        cotangents = cotangents.new_zeros(len(cotangents), len(full)).index_copy(1, o.rows, cotangents)
    products, scores = torch.zeros_like(cotangents), []
    copies = FIXED_COPIES + COPIES_PER_QUERY * len(cotangents)
    for _, x, y in o.chunks(copies=copies, rows=batch, memory=memory):

        def risk(theta, w, x=x, y=y):
            return (w * o.losses(theta if every else o.join(theta, full), x, y)).sum()

        weights = full.new_full((len(x),), 1 / len(batch))
        by_theta, by_weight = _transpose(risk, point, weights, cotangents)
        products += by_theta
        scores.append(by_weight / len(batch))
    return products, torch.cat(scores, dim=1)


def _transpose(risk: Callable, theta: Tensor, weights: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Many cotangents through ``(θ, w) ↦ ∂risk/∂θ``: the vjp of a gradient."""
    if len(cotangents) > 1:
        return vmap(vjp(grad(risk), theta, weights)[1])(cotangents)
    with torch.enable_grad():  # for a single one PyTorch's own double backward is twice as fast
        theta, weights = theta.detach().requires_grad_(), weights.requires_grad_()
        (gradient,) = torch.autograd.grad(risk(theta, weights), theta, create_graph=True)
        by = torch.autograd.grad(gradient @ cotangents[0], (theta, weights), materialize_grads=True)
    return by[0][None], by[1][None]


def _require_run(pipeline: Pipeline) -> None:
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"pipeline must be a msif_lab.Pipeline, not {type(pipeline).__name__}")
    for stage in pipeline.stages:
        if not isinstance(stage.recipe, MiniBatch):
            raise ValueError(
                f"stage {stage.name!r} was trained by {type(stage.recipe).__name__}, whose steps cannot be run "
                "backwards here; train it with recipe=SGD(...) or Adam(...), or use ImplicitInfluence, made for optima"
            )
    pipeline.trained()
    if pipeline.reports is None:
        raise ValueError(
            "the pipeline's weights were adopted, so there is no run to differentiate; train with pipeline.fit() and a "
            "recipe such as SGD(...), or use ImplicitInfluence, which needs only the final weights"
        )
    pipeline.require_repeatable()


def _require_same_end(name: str, ours: Tensor, trained: Tensor) -> None:
    apart = float((ours - trained).norm() / trained.norm().clamp(min=1e-30))
    if not apart <= torch.finfo(trained.dtype).eps ** 0.5:
        raise ValueError(
            f"stage {name!r}: replaying its training ends {apart:.1e} (relative) away from the trained weights, so the "
            "run is not deterministic: a loss or model that draws random numbers or counts its calls, or GPU kernels "
            "that add in changing order (torch.use_deterministic_algorithms(True) before fit())"
        )


def _seconds(function: Callable, *args, **kwargs) -> float:
    """Wall-clock time of the faster of two calls after one to warm up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
