"""A run between its checkpoints as far as it is known: the weights before each step, on a curve."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..curvature.derivatives import gradient_transpose
from ..objective.objective import Lanes
from ..pipeline.recipes import LinearStep, MiniBatch, State
from ..pipeline.runs import KeptRun
from ..pipeline.stages import FunctionalStage
from .adjoint import CHUNK_BYTES, Adjoint
from .stretches import spread, time_of

__all__ = ["RunPath", "PathAdjoint", "known_sizes"]


def known_sizes(run: KeptRun) -> list[int] | None:
    """How many examples each step had; None where too little is known to go back step by step."""
    steps = zip(run.steps, run.states, strict=True)
    if _keeps_memory(run.recipe) and any(step and state is None for step, state in steps):
        return None
    return None if run.batches is None else [len(batch) for batch in run.batches]


def _keeps_memory(recipe: MiniBatch) -> bool:
    """Whether the transpose of a step needs more than its batch, such as Adam's moments."""
    zero = torch.zeros(1, 1)
    _, _, saved = recipe.update(zero, recipe.start(zero), zero, 0, 0.0, 0.0)
    return len(saved) > 0


class RunPath:
    """What a `Trajectory` recomputes, from a dozen checkpoints and the batches of all steps.

    Between two checkpoints the weights before each step lie on a polynomial in the sum of learning
    rates: through both ends, with the mean that the weights had, where known, and where momentum
    remembers the whole stretch through the weights before the last step at each end, which the
    optimiser's memory tells. Stretches of one step are exact, and of two or three with all of this.

    Args:
        run: with the batches of each step.
        lanes: the stage as it starts, on one lane.
    """

    def __init__(self, run: KeptRun, lanes: Lanes):
        self.known, self.recipe, self.bounds = run, run.recipe, run.steps
        self.lanes = replace(lanes, base=run.fulls[0][None])
        self.steps = list(zip(run.batches, run.rates, strict=True))

    def segment(self, index: int) -> list[tuple[Tensor, tuple]]:
        """As `Trajectory.segment`; what the recipe saves comes of gradients at these weights."""
        thetas = self._weights(self.known, index)
        if not _keeps_memory(self.recipe) and self.recipe.clip is None:
            return [(theta[None], ()) for theta in thetas]
        state, records = self.known.states[index], []
        state = self.recipe.start(thetas[:1]) if state is None else state
        for step, theta in enumerate(thetas, self.bounds[index]):
            at = self.lanes, theta[None], state, step, *self.steps[step]
            _, state, saved = self.recipe.advance(*at)
            records.append((theta[None], saved))
        return records

    def at(self, index: int) -> tuple[Tensor, Tensor]:
        """The weights at a checkpoint ``(P,)``, and where they would be taken without it."""
        run, ends = self.known, [index - 1, index + 1]
        parts = ([part[i] for i in ends] for part in (run.steps, run.fulls, run.states))
        means = None if run.means is None else [run.mean(*ends)]
        coarse = KeptRun(run.recipe, *parts, run.rates, run.batches, means, run.factors)
        step = run.steps[index] - run.steps[index - 1]
        return self._trained(run.fulls[index]), self._weights(coarse, 0)[step]

    def time(self, index: int) -> float:
        """How long gradient flow takes for a stretch, 0 for one of a single step."""
        steps = range(*self.bounds[index : index + 2])
        linear = [self._linear(step) for step in steps]
        return spread(len(steps)) * time_of(
            [(each, self.known.rates[step], 0.0) for each, step in zip(linear, steps, strict=True)]
        )

    def _weights(self, run: KeptRun, index: int) -> Tensor:
        """The weights before each step of a stretch ``(n, P)``."""
        first, last = run.steps[index : index + 2]
        passed = torch.tensor([0.0, *run.rates[first:last]], dtype=torch.float64).cumsum(0)
        ends = zip(passed[[0, -1]].tolist(), run.fulls[index : index + 2], strict=True)
        points = [(time, self._trained(full)) for time, full in ends]
        if self._remembers(last - first):
            points += [
                (time - run.rates[step - 1], self._before(theta, state, step))
                for (time, theta), state, step in zip(
                    points, run.states[index : index + 2], (first, last), strict=True
                )
                if step and state is not None
            ]
        distinct = {}
        for time, theta in points:
            if not any(math.isclose(time, other, abs_tol=1e-12) for other in distinct):
                distinct[time] = theta
        nodes = torch.tensor(list(distinct), dtype=torch.float64)
        shares, bump = _lagrange(passed[:-1], nodes)
        curve = shares.to(self.lanes.base) @ torch.stack(list(distinct.values()))
        if run.means is not None and float(bump.mean()):
            gap = self._trained(run.means[index]) - curve.mean(0)
            curve = curve + (bump / bump.mean()).to(curve)[:, None] * gap
        return curve

    def _trained(self, full: Tensor) -> Tensor:
        return self.lanes.objective.trained.take(full)

    def _linear(self, step: int) -> LinearStep:
        """A step's recurrence; that of plain gradient descent where a recipe does not say."""
        if type(self.recipe).linear_step is MiniBatch.linear_step:
            return LinearStep(0.0, 1.0, 1.0)
        return self.recipe.linear_step(step)

    def _remembers(self, steps: int) -> bool:
        """Whether momentum alone makes a step, and still knows the first of so many."""
        linear = self._linear(0)
        return not linear.d and steps * (1 - linear.a) <= 1

    def _before(self, theta: Tensor, state: State, step: int) -> Tensor:
        """The weights ``(P,)`` before the step that led to a checkpoint, by its momentum."""
        o, scale = self.lanes.objective, self.recipe.preconditioner(state, step)
        rate = self.known.rates[step - 1] * self.recipe.shares(o)
        move = self._linear(step - 1).c * state[0][0]
        move = move if scale is None else scale[0] * move
        return (theta + rate * move) / (1 - rate * self.recipe.decay(o))


def _lagrange(at: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the values at some nodes in the polynomial through them ``(n, J)``.

    And one that is zero at all nodes and has one sign between them ``(n,)``.
    """
    apart = at[:, None] - nodes
    others = ~torch.eye(len(nodes), dtype=torch.bool)
    shares = [(apart[:, rest] / (nodes[j] - nodes[rest])).prod(1) for j, rest in enumerate(others)]
    return torch.stack(shares, 1), apart.prod(1)


class PathAdjoint(Adjoint):
    """`Adjoint` along a `RunPath`, which also tells how far off the path may be.

    Attributes:
        changes: at each checkpoint between two stretches, ``½ τ ‖(H − H') θ̄‖ / ‖θ̄‖`` of each
            query ``(Q,)``: H of the next batch at the checkpoint, and H' where the path would have
            run without it; τ is the mean time of the two stretches.
    """

    def __init__(self, functional: FunctionalStage, run: RunPath, cotangent: Tensor, **settings):
        super().__init__(functional, run, cotangent, **settings)
        self.changes: list[Tensor] = []

    def reached(self, segment: int) -> None:
        if segment == 0:
            return
        o, path = self.objective, self.run
        batch = self._batch(path.bounds[segment])
        more = path.lanes.weights[0, batch], self.through_frozen, min(self.memory // 4, CHUNK_BYTES)
        images = []
        for theta in path.at(segment):
            full = o.join(theta, self.base[0])
            image, _ = gradient_transpose(o, full, batch, self.theta_bar, *more)
            images.append(o.trained.take(image) if self.through_frozen else image)
        size = self.theta_bar.norm(dim=1)
        change = (images[0] - images[1]).norm(dim=1) / torch.where(size > 0, size, 1.0)
        time = (path.time(segment - 1) + path.time(segment)) / 2
        self.changes.append(change * time / 2)  # knowing the checkpoint, stretches are half as long
