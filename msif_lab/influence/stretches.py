"""A run read as stretches of constant curvature, and the way back through them.

Within a stretch the loss is taken as quadratic, with the Hessian H at the mean of the weights along
it, and the optimiser's own recurrence is kept. Backwards over the steps of a stretch,

    v̄ ← v̄ − η_t θ̄        ḡ_t = v̄        θ̄ ← θ̄ + H v̄        v̄ ← μ v̄

and ``score_i += Σ_t ḡ_t·∇f_i / |B_t|`` over the steps that hold example i; where it is not known
which those are, each has ``1/m`` of it: an example is in one step of an epoch. ∇f_i lies on a
straight line between its values at the two ends. θ̄, v̄ and every ḡ_t are polynomials in H applied
to the pair (θ̄, v̄), so a small Krylov space of H from the pair holds them, and the recurrence runs
on its Ritz values.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..curvature.derivatives import cross_products, product_chunks
from ..curvature.matrices import curvature
from ..curvature.operators import Operator
from ..data.examples import Examples
from ..pipeline.recipes import LinearStep, MiniBatch
from ..pipeline.runs import KeptRun
from ..pipeline.stages import FunctionalStage
from .adjoint import Backwards

MOST_DIMENSIONS = 20  # of a Krylov space, by default


@dataclass(frozen=True)
class Reading:
    """How a stretch is read; the settings of `SegmentedInfluence`."""

    krylov: int | None = None
    curvature: str = "hessian"
    curvature_examples: int | None = None
    dynamics: str = "optimizer"

    def dimension(self, steps: int) -> int:
        """Of the Krylov spaces of a stretch of so many steps."""
        return self.krylov or min(MOST_DIMENSIONS, max(6, steps // 2))


@dataclass
class Stretch:
    """A part of a run: where it starts and ends, and its steps.

    Attributes:
        start, end: all parameters ``(D,)``.
        steps: number, and learning rate of each step.
        middle: where its curvature is taken ``(D,)``: the mean of the weights before each step.
        batches: the examples of each step, or None where unknown.
        scale: square root of the optimiser's preconditioner ``(P,)``, or None.
    """

    start: Tensor
    end: Tensor
    steps: list[tuple[int, float]]
    middle: Tensor
    batches: list[Tensor] | None
    scale: Tensor | None

    @property
    def path(self) -> Tensor:
        """How far from start to end each step begins, as a share of the learning rates' sum."""
        return _path(self.steps).to(self.start)

    def members(self, shares: Tensor, count: int) -> Tensor:
        """``Σ_t shares_t [i in B_t] / |B_t|`` for each of ``count`` examples, ``(N, ...)``.

        Args:
            shares: of each step ``(T, ...)``.
        """
        sizes = torch.tensor([len(batch) for batch in self.batches])
        step = torch.arange(len(sizes)).repeat_interleave(sizes)
        at = torch.stack([torch.cat(self.batches), step]).to(shares.device)
        weights = (1 / sizes.to(shares)).repeat_interleave(sizes.to(shares.device))
        shape = count, len(sizes)
        table = torch.sparse_coo_tensor(at, weights, shape, check_invariants=True)
        return (table @ shares.flatten(1)).unflatten(1, shares.shape[1:])


def _path(steps: Sequence[tuple[int, float]]) -> Tensor:
    rates = torch.tensor([rate for _, rate in steps], dtype=torch.float64)
    done = rates.cumsum(0) - rates
    return done / rates.sum() if bool(rates.any()) else done


def krylov(
    operator: Callable[[Tensor], Tensor], pair: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Krylov space of a symmetric matrix from each query's pair, with its Ritz values.

    Block Lanczos with full reorthogonalisation, all queries side by side.

    Args:
        operator: ``(Q, P, B)`` → the matrix times each column.
        pair: ``(Q, P, B)``, the vectors that the space starts from.
        size: of the space, rounded up to whole blocks.

    Returns:
        an orthonormal basis ``(Q, P, K)``, zero where a space is exhausted; the Ritz values
        ``(Q, K)``; the Ritz vectors in the basis ``(Q, K, K)``.
    """
    queries, width, wide = pair.shape
    basis, small = pair.new_zeros(queries, width, 0), pair.new_zeros(queries, 0, 0)
    room = wide * -(-min(size, width) // wide)  # more only where pairs are nearly dependent
    filled, image = 0, pair
    while True:
        if filled + wide > basis.shape[2]:
            more = room if not filled else wide
            basis = nn.functional.pad(basis, (0, more))
            small = nn.functional.pad(small, (0, more, 0, more))
        added = _orthonormal(basis, filled, image)
        ranks = basis[:, :, :filled].any(1).sum(1)
        if not bool((added & (ranks < min(size, width))).any()):
            break
        block = slice(filled, filled + wide)
        filled += wide
        image = operator(basis[:, :, block])
        small[:, :filled, block] = basis[:, :, :filled].mT @ image
    small = small[:, :filled, :filled]
    small = small.triu() + small.triu(1).mT  # symmetric; what lies below was not computed
    values, rotation = torch.linalg.eigh(small)
    return basis[:, :, :filled], values, rotation


def _orthonormal(basis: Tensor, filled: int, block: Tensor) -> Tensor:
    """Write what a block adds to a basis behind its first ``filled`` columns, orthonormal.

    Zero where that is only rounding; returns for which queries anything was added ``(Q,)``.
    """
    start = filled
    for z in block.split(1, 2):
        limit = 30 * torch.finfo(z.dtype).eps * z.norm(dim=1, keepdim=True)
        known = basis[:, :, :filled]
        for share in (limit, 0.5):
            for _ in range(2):
                z = z - known @ (known.mT @ z)
            left = z.norm(dim=1, keepdim=True)
            z = torch.where(left > share, z / left.clamp(min=torch.finfo(z.dtype).tiny), 0.0)
        basis[:, :, filled : filled + 1] = z
        filled += 1
    return basis[:, :, start:filled].any(1).any(1)


Steps = Sequence[tuple[LinearStep, float, float]]


def by_steps(
    values: Tensor, theta_bar: Tensor, momentum_bar: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """The optimiser's recurrence backwards, on coordinates along eigenvectors of H.

    Args:
        values: eigenvalues ``(Q, K)``.
        theta_bar, momentum_bar: ∂q/∂ the parameters and the momentum at the end ``(Q, K)``.
        steps: each step's recurrence, learning rate, and rate of decoupled weight decay.

    Returns:
        ḡ of each step ``(T, Q, K)``, then θ̄ and the momentum's at the start, ``(Q, K)`` each.
    """
    g_bars = []
    for (a, b, c, d), rate, decay in reversed(steps):
        momentum_bar = momentum_bar - rate * c * theta_bar
        g_bars.append(b * momentum_bar - rate * d * theta_bar)
        theta_bar = (1 - rate * decay) * theta_bar + values * g_bars[-1]
        momentum_bar = a * momentum_bar
    return torch.stack(g_bars[::-1]), theta_bar, momentum_bar


def by_flow(
    values: Tensor, theta_bar: Tensor, momentum_bar: Tensor, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """`by_steps` for gradient flow of the same length: ``θ̄ ← exp(−τH) θ̄``, and no momentum.

    A step with momentum passes a time ``η / (1 − μ)``. ``Σ ḡ = −H⁻¹ (1 − exp(−τH)) θ̄`` is spread
    evenly over the steps.
    """
    time = sum(rate * (b * c / (1 - a) + d) for (a, b, c, d), rate, _ in steps)
    shrink = sum(rate * decay for _, rate, decay in steps)
    exponent = (time * values + shrink).clamp(min=-50.0)
    ratio = torch.where(exponent == 0, 1.0, -torch.expm1(-exponent) / exponent)
    whole = -time * ratio * theta_bar
    shares = whole[None].expand(len(steps), -1, -1) / len(steps)
    return shares, torch.exp(-exponent) * theta_bar, torch.zeros_like(momentum_bar)


@dataclass
class Pull:
    """What the steps of a stretch ask of the examples' gradients: ``ḡ_t = basis c_t``.

    Attributes:
        stretch: of which run.
        basis: ``(Q, P, K)``.
        coordinates: c of each step ``(T, Q, K)``.
    """

    stretch: Stretch
    basis: Tensor
    coordinates: Tensor

    @property
    def total(self) -> Tensor:
        """``Σ_t ḡ_t``, ``(Q, P)``."""
        return self._along(self.coordinates.sum(0))

    def _along(self, coordinates: Tensor) -> Tensor:
        return (self.basis @ coordinates[:, :, None])[..., 0]

    def asked(self, late: bool, count: int) -> tuple[Tensor, Tensor]:
        """Directions ``(Q, P, J)`` and each example's shares ``(N, 1 or Q, J)`` in them.

        Example i's part of the score at this end is ``Σ_j shares_ij ∇f_i·direction_j``. Its
        gradient lies on a straight line between those at the two ends of the stretch.

        Args:
            late: at the end of the stretch, else at its start.
            count: N.
        """
        path = self.stretch.path
        weights = (path if late else 1 - path)[:, None, None]
        if self.stretch.batches is None:  # in every epoch once, somewhere: 1/m a step on average
            total = self._along((weights * self.coordinates).sum(0))[:, :, None]
            return total, total.new_full((1, 1, 1), 1 / count).expand(count, 1, 1)
        if len(path) < self.basis.shape[2]:  # fewer steps than dimensions
            directions = self.basis @ self.coordinates.permute(1, 2, 0)
            each = weights.flatten().diag()
            return directions, self.stretch.members(each, count)[:, None]
        return self.basis, self.stretch.members(weights * self.coordinates, count)


class SegmentAdjoint(Backwards):
    """The way back through the stretches of a stage's run.

    Args:
        functional, cotangent, onwards: as in `Backwards`.
        recipe: how it was trained.
        reading: of its stretches.

    Attributes:
        momentum_bar: ∂q/∂ the optimiser's momentum ``(Q, P)``.
        sizes: ``Σ_q ‖θ̄_q‖`` at each checkpoint from the one reached to the end.
    """

    def __init__(
        self,
        functional: FunctionalStage,
        recipe: MiniBatch,
        cotangent: Tensor,
        reading: Reading,
        *,
        onwards: bool,
    ):
        super().__init__(functional, cotangent, onwards=onwards)
        self.recipe, self.reading = recipe, reading
        self.decay = self.objective.weight_decay if recipe.decoupled else 0.0
        self.momentum_bar = torch.zeros_like(self.theta_bar)
        self.sizes = [self.size()]

    def sweep(self, stretches: Sequence[Stretch], bar=None) -> None:
        """Backwards through all stretches of the stage."""
        o, count = self.objective, len(self.objective.data)
        asked: list[tuple[Tensor, Tensor]] = []
        for stretch in reversed(stretches):
            data, weights = self._seen(stretch)
            pull = self._through(stretch, self._curvature(stretch, data, weights))
            self._add(stretch.end, [*asked, pull.asked(True, count)])
            asked = [pull.asked(False, count)]
            if self.through_frozen:
                names = self.functional.frozen
                self.frozen_bar += cross_products(
                    o.on(data), stretch.middle, names, pull.total, weights
                )
            self.centre_bar -= 2 * o.alpha * o.coupled.take(pull.total)
            self.sizes.insert(0, self.size())
            if bar is not None:
                bar.update()
        self.require_finite()
        self._add(stretches[0].start, asked)

    def _seen(self, stretch: Stretch) -> tuple[Examples, Tensor | None]:
        """The examples of a stretch's steps, and how often each counts; None for once each."""
        data = self.objective.data
        if stretch.batches is None:
            return data, None
        each = self.theta_bar.new_full((len(stretch.steps), 1), 1 / len(stretch.steps))
        weights = stretch.members(each, len(data))[:, 0]
        rows = weights.nonzero()[:, 0]
        return data if len(rows) == len(data) else data[rows.cpu()], weights[rows] * len(rows)

    def _curvature(self, stretch: Stretch, data: Examples, weights: Tensor | None) -> Operator:
        """The curvature in the middle of a stretch, on its examples or some of them."""
        few = self.reading.curvature_examples
        if few is not None and few < len(data):
            draw = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(data), generator=draw)[:few].sort().values
            data = data[rows]
            if weights is not None:
                weights = weights[rows.to(weights.device)]
                weights = weights / weights.mean()
        return curvature(self.reading.curvature, self.objective.on(data), stretch.middle, weights)

    def _add(self, full: Tensor, asked: Sequence[tuple[Tensor, Tensor]]) -> None:
        """``score_i += Σ_j shares_ij ∇f_i·direction_j`` at all parameters ``full`` (D,)."""
        asked = [part for part in asked if bool(part[0].any()) and bool(part[1].any())]
        if not asked:
            return
        queries = len(self.scores)
        vectors = torch.cat([v for v, _ in asked], 2)
        shares = torch.cat([s.expand(-1, queries, -1) for _, s in asked], 2)
        flat = vectors.transpose(0, 1).flatten(1)
        rows = shares.flatten(1).any(1).nonzero()[:, 0]
        data = self.objective.data
        data = data if len(rows) == len(data) else data[rows.cpu()]
        for part, products in product_chunks(self.objective, full, flat, data):
            found = products.unflatten(0, (queries, -1)) * shares[rows[part]].permute(1, 2, 0)
            self.scores[:, rows[part]] += found.sum(1)

    def _through(self, stretch: Stretch, operator: Operator) -> Pull:
        """One stretch backwards."""
        scale = stretch.scale
        theta_bar, momentum_bar = self.theta_bar, self.momentum_bar
        # Decay that differs between parameters has no eigenvectors in common with H: half of it
        # comes before the stretch and half after.
        by_name = isinstance(self.decay, Tensor)
        half = math.prod(1 - rate * self.decay for _, rate in stretch.steps) ** 0.5
        theta_bar = theta_bar * half if by_name else theta_bar
        if scale is not None:  # the coordinates in which the preconditioner is one
            theta_bar, momentum_bar = theta_bar * scale, momentum_bar / _nonzero(scale)

        def product(block: Tensor) -> Tensor:
            columns = block.permute(1, 0, 2).reshape(block.shape[1], -1)
            columns = columns if scale is None else scale[:, None] * columns
            images = operator @ columns - (self.decay * columns.T).T
            images = images if scale is None else scale[:, None] * images
            return images.view(block.shape[1], block.shape[0], -1).permute(1, 0, 2)

        pair = [theta_bar] if not bool(momentum_bar.any()) else [theta_bar, momentum_bar]
        basis, values, rotation = krylov(
            product, torch.stack(pair, 2), self.reading.dimension(len(stretch.steps))
        )
        turned = (rotation.mT @ (basis.mT @ v[:, :, None]) for v in (theta_bar, momentum_bar))
        decay = 0.0 if by_name else self.decay
        steps = [(self.recipe.linear_step(t), rate, decay) for t, rate in stretch.steps]
        reverse = by_flow if self.reading.dynamics == "flow" else by_steps
        ended = reverse(values, *(c[..., 0] for c in turned), steps)
        g_bars, theta_bar, momentum_bar = ((rotation @ c[..., None])[..., 0] for c in ended)
        theta_bar, momentum_bar = (
            (basis @ c[..., None])[..., 0] for c in (theta_bar, momentum_bar)
        )
        if scale is not None:
            basis = scale[:, None] * basis
            momentum_bar = momentum_bar * scale
            kept = self.theta_bar * (half if by_name else half**2)
            theta_bar = torch.where(scale > 0, theta_bar / _nonzero(scale), kept)
        self.theta_bar = theta_bar * half if by_name else theta_bar
        self.momentum_bar = momentum_bar
        return Pull(stretch, basis, g_bars)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def stretches_of(run: KeptRun, details: bool) -> list[Stretch]:
    """What lies between the checkpoints of a run, with or without what is known beyond them."""
    stretches = []
    for i, (a, b) in enumerate(itertools.pairwise(run.steps)):
        ends = [(run.states[j], run.steps[j]) for j in (i, i + 1) if run.states[j] is not None]
        found = [run.recipe.preconditioner(state, step) for state, step in ends if step]
        steps = list(zip(range(a, b), run.rates[a:b], strict=True))
        scale = None
        if found and found[-1] is not None:
            # A step uses what comes after it: of a single one that is the end's.
            share = (len(steps) + 1) / (2 * len(steps))
            scale = (share * found[-1] + (1 - share) * found[0])[0].sqrt()
        start, end = run.fulls[i : i + 2]
        middle = start + float(_path(steps).mean()) * (end - start)  # on a straight path
        middle = run.means[i] if details and run.means is not None else middle
        known = run.batches[a:b] if details and run.batches is not None else None
        stretches.append(Stretch(start, end, steps, middle, known, scale))
    return stretches
