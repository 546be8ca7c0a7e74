"""One stage backwards: from its final parameters to those of the stage before, collecting scores.

A bar means ∂q/∂. One step of gradient descent with momentum, and its reverse, are

    v ← μ v + ∇L_B(θ; w)        v̄ ← v̄ − η θ̄,    ḡ = v̄
    θ ← θ − η v                 score_i += ∇f_i·ḡ / |B|   for i in B
                                θ̄ ← θ̄ + ∇²L_B ḡ,   v̄ ← μ v̄
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.derivatives import gradient_transpose, own_products, transpose_lanes
from ..pipeline.stages import FunctionalStage
from .replay import Trajectory

CHUNK_BYTES = 150 * 10**6  # of derivatives at once; more only misses the caches


@dataclass
class Probes:
    """Pairs of runs of a stage with all weights changed a little: ``w̄ ± h z``, z random signs.

    ``∂θ/∂w_i ≈ (1/R) Σ_r z_ri (θ⁺_r − θ⁻_r) / 2h``: the other examples' parts cancel on average.

    Attributes:
        run: the 2R runs, first all ``+``, then all ``−``.
        signs: ``z / h``, ``(R, m)``.
        share: of the correction that is wanted: all of it for a removal on its own, ``1 − 2p`` for
            one among random others, each removed with probability p.
    """

    run: Trajectory
    signs: Tensor
    share: float = 1.0

    def responses(self, theta: Tensor, examples: Tensor) -> Tensor:
        """``∂θ/∂w_i`` of some examples (B, P), from the runs' parameters (2R, P) at one step."""
        plus, minus = theta.chunk(2)
        return self.signs[:, examples].T @ (plus - minus) / (2 * len(self.signs))


class Backwards:
    """Derivatives of Q queries on their way back through one stage, and over the link before it.

    Args:
        functional: the stage.
        cotangent: ∂q/∂ all its final parameters ``(Q, D)``; ``(R, Q, D)`` for R lanes that differ
            in weights and batches, and so all that follows.
        onwards: whether the way goes on to a stage before it.

    Attributes:
        scores: of the stage's own examples so far, ``(Q, m)``.
        theta_bar: ∂q/∂ what is trained ``(Q, P)``.
        frozen_bar, centre_bar: ∂q/∂ what the stage took over and keeps, and ∂q/∂ the values that
            its penalty pulls towards.
    """

    def __init__(self, functional: FunctionalStage, cotangent: Tensor, *, onwards: bool):
        self.functional = functional
        self.objective = o = functional.objective
        self.onwards = onwards
        self.through_frozen = onwards and bool(functional.frozen)
        shape = cotangent.shape[:-1]
        self.scores = cotangent.new_zeros(*shape, len(o.data))
        self.theta_bar = o.trained.take(cotangent)
        self.frozen_bar = functional.here["frozen"].take(cotangent)
        self.centre_bar = cotangent.new_zeros(*shape, o.coupled.size)

    def size(self) -> Tensor:
        """``Σ_q ‖θ̄_q‖``."""
        return self.theta_bar.norm(dim=-1).sum()

    def require_finite(self) -> None:
        """Raise `ValueError` where the derivatives have overflowed."""
        if not bool(torch.isfinite(self.theta_bar).all()):
            raise ValueError(
                f"{self.objective.where}: the adjoint overflows, so the run amplifies the "
                "smallest change without bound and no derivative describes it; lower the "
                "learning rate or train fewer steps"
            )

    def before(self, size: int) -> Tensor:
        """∂q/∂ the final parameters of the stage before, ``(Q, D')`` with D' = ``size``."""
        there = self.functional.there
        cotangent = self.theta_bar.new_zeros(*self.theta_bar.shape[:-1], size)
        # the run starts where the stage before ended
        start_bar = self.objective.coupled.take(self.theta_bar)
        there["coupled"].put(cotangent, start_bar + self.centre_bar)
        there["frozen"].put(cotangent, self.frozen_bar)
        return cotangent


class Adjoint(Backwards):
    """The way back through every step of a stage's run.

    Args:
        functional, cotangent, onwards: as in `Backwards`.
        run: its replayed run, of one lane, or of as many as the cotangent has.
        memory: bytes, a quarter of which one mini-batch's derivatives may take.
        probes: for the leave-one-out correction.

    Attributes:
        state_bar: ∂q/∂ the optimiser's memory, zero at the end: q does not depend on it.
    """

    def __init__(
        self,
        functional: FunctionalStage,
        run: Trajectory,
        cotangent: Tensor,
        *,
        onwards: bool,
        memory: int,
        probes: Probes | None = None,
    ):
        super().__init__(functional, cotangent, onwards=onwards)
        self.run, self.probes, self.memory = run, probes, memory
        self.base = run.lanes.base
        # the penalty's curvature as ∇L_B has it
        self.ridge = self.objective.ridge - run.recipe.decay_apart(self.objective)
        self.state_bar = tuple(map(torch.zeros_like, run.recipe.start(self.theta_bar)))

    def sweep(self, norms: Tensor, bar=None) -> None:
        """Backwards through all T steps; adds `size` at every state to ``norms`` (T + 1,).

        Raises:
            ValueError: the adjoint overflows.
        """
        norms[-1] += self.size()
        for segment in reversed(range(len(self.run.bounds) - 1)):
            records = self.run.segment(segment)
            probed = self.probes.run.segment(segment) if self.probes else []
            for step in reversed(range(*self.run.bounds[segment : segment + 2])):
                theta, saved = records.pop()
                g_bar = self._step(step, theta, saved)
                if self.probes:
                    self._correct(step, theta[0], probed.pop()[0], g_bar)
                norms[step] += self.size()
                if bar is not None:
                    bar.update()
            self.reached(segment)
        self.require_finite()

    def reached(self, segment: int) -> None:
        """Called where the way back has reached the start of a segment."""

    def _batch(self, step: int) -> Tensor:
        return self.run.steps[step][0].to(self.base.device)

    def _step(self, step: int, theta: Tensor, saved: tuple) -> Tensor:
        """One step backwards, from θ (R, P) before it and what the recipe saved: ḡ ``(Q, P)``."""
        o, batch, rate = self.objective, self._batch(step), self.run.steps[step][1]
        several = self.theta_bar.ndim == 3
        if several:  # a lane's numbers are those of all its queries
            saved = tuple(part[:, None] for part in saved)
        g_bar, self.theta_bar, self.state_bar = self.run.recipe.retreat(
            o, self.theta_bar, self.state_bar, saved, step, rate
        )
        more = self.through_frozen, min(self.memory // 4, CHUNK_BYTES)
        weights = self.run.lanes.weights
        if several:
            fulls = self.run.lanes.full(theta)
            product, own = transpose_lanes(o, fulls, batch, g_bar, weights.gather(1, batch), *more)
            self.scores.scatter_add_(2, batch[:, None].expand(own.shape), own)
        else:
            full = o.join(theta[0], self.base[0])
            product, own = gradient_transpose(o, full, batch, g_bar, weights[0, batch], *more)
            self.scores.index_add_(1, batch, own)  # an example may be in a batch twice
        if self.through_frozen:  # frozen parameters enter every step's gradient
            self.frozen_bar = self.frozen_bar + self.functional.here["frozen"].take(product)
            product = o.trained.take(product)
        self.theta_bar = self.theta_bar + product + self.ridge * g_bar
        self.centre_bar -= 2 * o.alpha * o.coupled.take(g_bar)  # the gradient holds 2α (θ_S − c)
        return g_bar

    def _correct(self, step: int, theta: Tensor, probed: Tensor, g_bar: Tensor) -> None:
        """Take each example's own curvature out too: ``score_i −= ḡᵀ h_i ∂θ/∂w_i / |B|``."""
        o, batch = self.objective, self._batch(step)
        full, row = o.join(theta, self.base[0]), theta.numel() * theta.element_size()
        for part in batch.split(max(1, self.memory // 4 // (8 * row))):
            responses = self.probes.responses(probed, part)
            bent = own_products("hessian", o, full, o.data.x[part], o.data.y[part], responses)
            found = self.probes.share * (g_bar @ bent.T) / len(batch)
            self.scores.index_add_(1, part, found, alpha=-1)
