"""Unrolled influence: the derivative of the whole multi-stage run that really happened.

Once seeds and batch order are fixed, the final parameters are a function of the example weights, however early
training stopped. A bar means ∂q/∂; one step of gradient descent with momentum, and its reverse, are

    v ← μ v + ∇L_B(θ; w)        v̄ ← v̄ − η θ̄,    ḡ = v̄
    θ ← θ − η v                 score_i += ∇f_i·ḡ / |B|   for i in B
                                θ̄ ← θ̄ + ∇²L_B ḡ,   v̄ ← μ v̄

The reverse goes through the last stage first, then over each link into the stage before. Derived in notebooks/09.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..curvature.derivatives import gradient_transpose, own_products, per_example_gradients
from ..data.examples import Examples
from ..errors import UnsmoothTrainingWarning
from ..memory import parse_bytes
from ..objective.checks import ask
from ..objective.losses import target_name
from ..pipeline.pipeline import Pipeline, Retrained
from ..pipeline.recipes import progress_bar
from .cost import UnrolledPlan, make_plan, seconds
from .implicit import require_unchanged
from .replay import Trajectory, even_bounds, require_run, require_same_end
from .result import Influence
from .run_check import NONLINEARITY, RunCheck

__all__ = ["UnrolledInfluence"]


CHUNK_BYTES = 150 * 10**6  # of derivatives at once; more only misses the caches
GROWTH = 30.0  # of the adjoint, backwards: runs below it had r > 0.9 on digits, runs above r = 0 (lesson 09)


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
        group_fraction: p > 0 predicts the removal of *random groups* holding this fraction of the stage's examples
            better, at the price of one more training. Instead of at w = 1 the run is differentiated at w = 1 − p,
            the average of such removals, which is the best linear predictor where q is quadratic in w. The scores
            then predict removal, level included, and are no longer the derivative.
        leave_one_out: predict the removal of *single examples* better, at the price of about one more sweep: without
            example i its own curvature leaves the steps too, which `ImplicitInfluence(leave_one_out=True)` accounts
            for by ``H − h_i/m`` and the run by ``(1/|B|) ḡᵀ h_i ∂θ/∂w_i`` in each step that holds i. How θ depends
            on each weight is estimated from runs of the stage with all weights changed a little at random.
        probes: pairs of such runs, all at once; more for longer training, whose estimate is noisier.

    Attributes:
        plan_: after `score`, the `UnrolledPlan` that was followed.
        adjoint_norms_: after `score`, per stage ``(T,)``: the queries' mean ‖θ̄‖ before each step, ‖∇q‖ being the
            end of it. Growth backwards in time means a run that amplifies small changes.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, recipe=msif.SGD(lr=0.1, epochs=2))
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
    ):
        self.memory = parse_bytes(memory)
        if segments is not None and (not isinstance(segments, int) or segments < 1):
            raise ValueError(f"segments={segments!r} must be a whole number of at least 1, or None")
        if not isinstance(group_fraction, (int, float)) or not 0 <= group_fraction < 1:
            raise ValueError(f"group_fraction={group_fraction!r} must be a fraction of the examples, in [0, 1)")
        if not isinstance(probes, int) or probes < 1:
            raise ValueError(f"probes={probes!r} must be a whole number of at least 1")
        if group_fraction and leave_one_out:
            raise ValueError("leave_one_out=True is for single examples, group_fraction for groups; choose one")
        self.segments, self.group_fraction = segments, float(group_fraction)
        self.leave_one_out, self.probes = bool(leave_one_out), probes
        self.plan_: UnrolledPlan | None = None
        self.adjoint_norms_: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        asked = f", group_fraction={self.group_fraction}" if self.group_fraction else ""
        asked += f", leave_one_out=True, probes={self.probes}" if self.leave_one_out else ""
        return f"UnrolledInfluence(memory={self.memory}, segments={self.segments}{asked})"

    def plan(self, pipeline: Pipeline, queries: Examples | int) -> UnrolledPlan:
        """Segments, bytes and estimated seconds for so many queries, before anything long is done.

        Raises:
            MemoryBudgetError: not even the smallest plan fits the budget.
            ValueError: the pipeline cannot be unrolled (see `fit`).
        """
        require_run(pipeline)
        plan = self._plan(pipeline, queries if isinstance(queries, int) else len(queries))
        fit, sweep = 0.0, 0.0
        for k, stage in enumerate(pipeline.stages):
            o, lanes = pipeline.objective(k), pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None)
            theta, full = o.trained.take(lanes.base), lanes.base[0]
            batch, rate = next(iter(stage.recipe.steps(len(stage.data))))
            cotangents = torch.ones_like(theta).expand(plan.part, -1)
            every = bool(k and pipeline.functional(k).frozen)
            forward = seconds(stage.recipe.advance, lanes, theta, stage.recipe.start(theta), 0, batch, rate)
            room = min(self.memory // 4, CHUNK_BYTES)
            back = seconds(gradient_transpose, o, full, batch, cotangents, every=every, memory=room)
            replay = forward * (plan.segments[stage.name] > 1)
            fit, sweep = fit + forward * plan.steps[stage.name], sweep + (back + replay) * plan.steps[stage.name]
        return replace(plan, seconds=(fit, sweep * plan.sweeps + fit * (self.group_fraction > 0)))

    def _plan(self, pipeline: Pipeline, queries: int) -> UnrolledPlan:
        runs = 1 + (self.group_fraction > 0) + 2 * self.probes * self.leave_one_out
        return make_plan(pipeline, queries, self.memory, self.segments, runs)

    def fit(self, pipeline: Pipeline, progress: bool = True) -> "UnrolledInfluence":
        """Replay the pipeline's training, keep its states or checkpoints, and see that it ends at the same weights.

        Raises:
            ValueError: not trained, adopted, changed since, trained by `LBFGS`, or the replay ends elsewhere.
            MemoryBudgetError: not even √T checkpoints fit their half of the budget.
        """
        require_run(pipeline)
        trained = pipeline.trained()
        self._pipeline, self._at = pipeline, {}
        plan = self._plan(pipeline, 1)
        runs = self._replay(plan, {}, progress)
        for stage, run, end in zip(pipeline.stages, runs, trained, strict=True):
            require_same_end(stage.name, run.final[0], end)
        self._runs, self._full = runs, [t.clone() for t in trained]
        return self

    def _replay(self, plan: UnrolledPlan, weights: dict[int, float], progress: bool) -> list[Trajectory]:
        """Every stage's run, at weight one or at another weight of all examples of some stages."""
        runs, previous = [], None
        with progress_bar(sum(plan.steps.values()), "replay", progress) as bar:
            for k, stage in enumerate(self._pipeline.stages):
                lanes = self._pipeline.fresh_lanes(k, previous)
                lanes = replace(lanes, weights=weights.get(k, 1.0) * lanes.weights)
                bounds = even_bounds(plan.steps[stage.name], plan.segments[stage.name])
                runs.append(Trajectory(stage.recipe, lanes, bounds).run(bar))
                previous = runs[-1].final
        return runs

    def _probe(self, k: int) -> tuple[Trajectory, Tensor]:
        """Stage k under weights ``1 ± h z`` with random signs z ``(probes, m)``; returns the runs and ``z / h``.

        Then ``∂θ/∂w_i ≈ (1/probes) Σ_r z_ri (θ⁺_r − θ⁻_r) / 2h``: what the other examples add cancels on average.
        """
        run, o = self._runs[k], self._pipeline.objective(k)
        h = 1e-3 if o.dtype == torch.float64 else 1e-2
        signs = torch.randint(0, 2, (self.probes, len(o.data)), generator=torch.Generator().manual_seed(0))
        signs = (2 * signs - 1).to(run.lanes.weights)
        one = torch.zeros(2 * self.probes, dtype=torch.int64, device=signs.device)
        lanes = replace(run.lanes.select(one), weights=torch.cat([1 + h * signs, 1 - h * signs]))
        return Trajectory(run.recipe, lanes, run.bounds).run(), signs / h

    def score(
        self, queries: Examples, stage: int | str = 0, target: str | Callable = "loss", progress: bool = True
    ) -> Influence:
        """Influence of one stage's examples on each query; arguments as in `ImplicitInfluence.score`.

        Raises:
            ValueError, TypeError: queries or target do not fit; the pipeline changed since fit.
            MemoryBudgetError: a single query's sweep exceeds the budget.

        Warns:
            UnsmoothTrainingWarning: the run amplifies changes so much that no derivative will predict a removal.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before score(queries)")
        pipeline, first = self._pipeline, self._pipeline.index(stage)
        require_unchanged(pipeline, self._full)
        o = pipeline.objective(-1)
        function = ask(o, queries, target)
        self.plan_ = self._plan(pipeline, len(queries))
        runs = self._runs
        if self.group_fraction:
            if first not in self._at:  # one run more, kept for the next call
                self._at = {first: self._replay(self.plan_, {first: 1 - self.group_fraction}, progress)}
            runs = self._at[first]
        if self.leave_one_out and first not in self._at:
            self._at = {first: self._probe(first)}
        values = self._sweep(runs, first, queries, function, progress)
        if self.group_fraction:
            values = values + self._level(runs, values, queries, target)
        scored = pipeline.stages[first]
        return Influence(values, scored.data.ids, queries.ids, scored.name, target_name(target), repr(self))

    def _level(self, runs: Sequence[Trajectory], values: Tensor, queries: Examples, target) -> Tensor:
        """What every score must change by so that −Σ over a group of pN is right on average, ``(Q, 1)``.

        Around w̄ = 1 − p: ``q(w) ≈ q(w̄) + Σ_j s_j (w_j − w̄)``. Seen from q(1) that is −Σ over the group plus
        ``q(w̄) − q(1) + p Σ_j s_j`` for all; each of the pN members carries its share.
        """
        p, m = self.group_fraction, values.shape[1]
        at = Retrained(self._pipeline, [run.final for run in runs], []).evaluate(queries, target)
        return -(at - self._pipeline.evaluate(queries, target)[:, None] + p * values.sum(1, keepdim=True)) / (p * m)

    def _sweep(self, runs: Sequence[Trajectory], first: int, queries: Examples, function, progress: bool) -> Tensor:
        """Backwards through all stages down to ``first``, in parts of the queries; its scores ``(Q, N)``."""
        o = self._pipeline.objective(-1)
        gradients = [g for _, g in per_example_gradients(o, runs[-1].final[0], queries, function, every=True)]
        norms = {k: torch.zeros(len(runs[k].steps) + 1, dtype=o.dtype, device=o.device) for k in range(len(runs))}
        total, parts = self.plan_.sweeps * sum(len(run.steps) for run in runs[first:]), []
        with progress_bar(total, "sweep", progress) as bar:
            for part in torch.cat(gradients).split(self.plan_.part):  # (Q, D): ∇q by all of the last stage
                for k in range(len(runs) - 1, first - 1, -1):
                    part, values = self._stage(k, runs[k], part, first, norms[k], bar)
                parts.append(values)
        named = {self._pipeline.stages[k].name: norms[k] / len(queries) for k in range(first, len(runs))}
        self.adjoint_norms_ = {name: norm.cpu() for name, norm in named.items()}
        growth = {name: float(norm.max() / norm[-1].clamp(min=1e-30)) for name, norm in self.adjoint_norms_.items()}
        worst = max(growth, key=growth.get)
        if growth[worst] > GROWTH:
            warnings.warn(
                f"stage {worst!r}: its run amplifies small changes {growth[worst]:.0f}-fold, so it is too chaotic for "
                "these derivatives to predict removals; lower the learning rate, warm it up or let it decay, and see "
                "check()",
                UnsmoothTrainingWarning,
                stacklevel=3,
            )
        return torch.cat(parts)

    def _stage(self, k: int, run: Trajectory, cotangent: Tensor, first: int, norms: Tensor, bar):
        """Backwards through stage k: from ∇q by its final parameters ``(Q, D)`` to ∇q by those of the stage before
        ``(Q, D')``, and the scores of its own examples ``(Q, m)``."""
        p, recipe, base = self._pipeline.functional(k), run.recipe, run.lanes.base[0]
        o, decay = p.objective, recipe.decay(run.lanes)
        every, ridge = k > first and bool(p.frozen), o.ridge - decay  # the penalty's curvature as ∇L_B has it
        scores = cotangent.new_zeros(len(cotangent), len(o.data))
        theta_bar, frozen_bar = o.trained.take(cotangent), p.here["frozen"].take(cotangent)
        centre_bar = cotangent.new_zeros(len(cotangent), o.coupled.size)
        state_bar = recipe.start(theta_bar)  # zeros: q does not ask for the optimiser's memory
        norms[-1] += theta_bar.norm(dim=1).sum()
        probes, signs = self._at[k] if self.leave_one_out and k == first else (None, None)
        for segment in reversed(range(len(run.bounds) - 1)):
            records, probed = run.segment(segment), probes.segment(segment) if probes else []
            for step in reversed(range(*run.bounds[segment : segment + 2])):
                (batch, rate), (theta, saved) = run.steps[step], records.pop()
                batch = batch.to(base.device)
                g_bar, theta_bar, state_bar = recipe.pull_back(theta_bar, state_bar, saved, step, rate, decay)
                full, weights = o.join(theta[0], base), run.lanes.weights[0, batch]
                product, own = gradient_transpose(
                    o, full, batch, g_bar, weights, every, min(self.memory // 4, CHUNK_BYTES)
                )
                scores[:, batch] += own
                if probes:
                    plus, minus = probed.pop()[0].chunk(2)
                    for part in batch.split(max(1, self.memory // 4 // (8 * plus[0].numel() * plus.element_size()))):
                        shift = signs[:, part].T @ (plus - minus) / (2 * self.probes)  # (B, P) = ∂θ/∂w_i
                        bent = own_products("hessian", o, full, o.data.x[part], o.data.y[part], shift)
                        scores[:, part] -= g_bar @ bent.T / len(batch)
                if every:  # what is frozen shapes every step's gradient
                    frozen_bar = frozen_bar + p.here["frozen"].take(product)
                    product = o.trained.take(product)
                theta_bar = theta_bar + product + ridge * g_bar
                centre_bar -= 2 * o.alpha * o.coupled.take(g_bar)  # the gradient holds 2α (θ_S − c)
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
        p.there["coupled"].put(before, o.coupled.take(theta_bar) + centre_bar)  # where the run starts, what holds it
        p.there["frozen"].put(before, frozen_bar)
        return before, scores

    def check(
        self,
        n: int = 3,
        queries: Examples | None = None,
        stage: int | str = 0,
        steps: Sequence[float] | None = None,
        seed: int = 0,
    ) -> "RunCheck":
        """Hold the scores of n random examples against reruns of all stages: tiny changes of weight, and removal.

        Args:
            n: examples to try; the run is repeated ``2 n (len(steps) + 1)`` times, all at once.
            queries: default the first five training examples of the last stage.
            stage: whose examples.
            steps: changes h of weight for the central differences ``(q(1 + h) − q(1 − h)) / 2h``.
            seed: of the choice of examples.

        Warns:
            UnsmoothTrainingWarning: removing an example and doubling it do not have opposite effects (median
                nonlinearity above 0.3), so its derivative says little about its removal.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(pipeline) before check()")
        pipeline, k = self._pipeline, self._pipeline.index(stage)
        m = len(pipeline.stages[k].data)
        if not isinstance(n, int) or not 1 <= n <= m:
            raise ValueError(f"n={n!r} must be between 1 and the number of examples, {m}")
        queries = pipeline.stages[-1].data[:5] if queries is None else queries
        double = pipeline.objective(k).dtype == torch.float64
        steps = steps or ((1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6) if double else (0.3, 0.1, 0.03, 0.01))
        examples = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:n]
        plain = UnrolledInfluence(memory=self.memory, segments=self.segments)
        plain._pipeline, plain._runs, plain._full = pipeline, self._runs, self._full
        scores = plain.score(queries, stage, progress=False).values[:, examples]
        weights = torch.ones(len(steps) + 1, 2, n, m, dtype=torch.float64)
        for row, h in enumerate((*steps, 1.0)):
            for column, i in enumerate(examples):
                weights[row, :, column, i] = torch.tensor([1 + h, 1 - h], dtype=torch.float64)
        q = pipeline.retrain({k: weights.reshape(-1, m)}, progress=False).evaluate(queries)
        up, down = q.reshape(len(q), len(steps) + 1, 2, n).unbind(2)  # (Q, H + 1, n)
        differences = (up - down)[:, :-1] / (2 * torch.tensor(steps, dtype=q.dtype, device=q.device)[:, None])
        size = scores.norm(dim=0).clamp(min=1e-30)
        now = pipeline.evaluate(queries)[:, None]
        bend = (up[:, -1] + down[:, -1] - 2 * now).norm(dim=0) / (up - down)[:, -1].norm(dim=0).clamp(min=1e-30)
        report = RunCheck(
            examples, tuple(steps), ((differences - scores[:, None]).norm(dim=0) / size).cpu(), bend.cpu(),
            -scores.cpu(), (down[:, -1] - now).cpu()
        )  # fmt: skip
        if float(bend.median()) > NONLINEARITY:
            warnings.warn(
                f"removing an example and doubling it differ by {float(bend.median()):.0%} of their effect (median of "
                f"{n}): this run is too unsmooth for derivatives to predict removals. Smaller or decaying learning "
                "rates, warm-up, smooth activations (tanh, SiLU) and larger batches help",
                UnsmoothTrainingWarning,
                stacklevel=2,
            )
        return report
