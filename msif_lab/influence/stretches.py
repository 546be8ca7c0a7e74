"""A run read as stretches of constant curvature, and the way back through them.

Within a stretch the loss is taken as quadratic, with the Hessian H at the mean of the weights along
it, and the optimiser's own recurrence is kept. Backwards over the steps of a stretch,

    v̄ ← v̄ − η_t θ̄        ḡ_t = v̄        θ̄ ← θ̄ + H v̄        v̄ ← μ v̄

and ``score_i += Σ_t ḡ_t·∇f_i / |B_t|`` over the steps that hold example i; where it is not known
which those are, each has ``1/m`` of it: an example is in one step of an epoch. ∇f_i lies on a
straight line between its values at the two ends. θ̄, v̄ and every ḡ_t are polynomials in H applied
to the pair (θ̄, v̄), so a small Krylov space of H from the pairs of all queries holds them, and the
recurrence runs on its Ritz values.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from ..curvature.derivatives import cross_products, product_chunks
from ..curvature.matrices import DataCurvature, curvature
from ..curvature.operators import Operator
from ..pipeline.recipes import LinearStep, MiniBatch
from ..pipeline.runs import KeptRun
from ..pipeline.stages import FunctionalStage
from .adjoint import Backwards

MOST_DIMENSIONS = 20  # of a Krylov space for each query, by default
SHARED_PASS = 100  # directions of both ends of a stretch that are taken through the data at once
SETTLED = 1e-3  # grow a Krylov space until a step changes what comes of it by less


@dataclass(frozen=True)
class Reading:
    """How a stretch is read; the settings of `SegmentedInfluence`."""

    krylov: int | None = None
    curvature: str = "hessian"
    curvature_examples: int | None = None
    dynamics: str = "optimizer"

    def dimension(self, steps: int) -> int:
        """Of the Krylov space of a stretch of so many steps, at most, for each query.

        Each step multiplies by H once, so more than that the pair cannot reach.
        """
        return self.krylov or min(MOST_DIMENSIONS, 2 * steps + 2)


@dataclass
class Stretch:
    """A part of a run: where it starts and ends, and its steps.

    Attributes:
        start, end: all parameters ``(D,)``.
        steps: number, and learning rate of each step.
        middle: where its curvature is taken ``(D,)``: the mean of the weights before each step.
        batches: the examples of each step, or None where unknown.
        scale: square root of the optimiser's preconditioner and of the parameters' shares of the
            learning rate ``(P,)``, or None.
        factors: what clipping multiplied the gradient of each step by; None for one.
    """

    start: Tensor
    end: Tensor
    steps: list[tuple[int, float]]
    middle: Tensor
    batches: list[Tensor] | None
    scale: Tensor | None
    factors: list[float] | None = None

    @property
    def factor(self) -> float:
        """What clipping multiplied gradients by, on average."""
        return 1.0 if self.factors is None else sum(self.factors) / len(self.factors)

    @property
    def path(self) -> Tensor:
        """How far from start to end each step begins, as a share of the learning rates' sum."""
        return _path(self.steps).to(self.start)

    def members(self, count: int, rows: Tensor | None = None) -> Tensor:
        """``[i in B_t] / |B_t|`` of each of ``count`` examples and step, sparse ``(N, T)``.

        Args:
            rows: only these examples.
        """
        sizes = torch.tensor([len(batch) for batch in self.batches])
        step = torch.arange(len(sizes)).repeat_interleave(sizes)
        at = torch.stack([torch.cat(self.batches), step])
        weights = (1 / sizes.to(self.start.dtype)).repeat_interleave(sizes)
        shape = count, len(sizes)
        table = torch.sparse_coo_tensor(at, weights, shape, check_invariants=True)
        table = table.to(self.start.device)
        table = table if rows is None else table.index_select(0, rows)
        return table.coalesce()


def spread(steps: int) -> float:
    """How far so many steps lie around their middle, as a share of what a stretch of many would.

    Zero for one step, whose curvature is nobody else's.
    """
    return math.sqrt(1 - 1 / steps**2)


def _path(steps: Sequence[tuple[int, float]]) -> Tensor:
    rates = torch.tensor([rate for _, rate in steps], dtype=torch.float64)
    done = rates.cumsum(0) - rates
    return done / rates.sum() if bool(rates.any()) else done


def krylov(
    operator: Callable[[Tensor], Tensor], start: Tensor, size: int, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Krylov spaces of a symmetric matrix from some vectors, each larger than the one before.

    Block Lanczos with full reorthogonalisation.

    Args:
        operator: ``(P, B)`` → the matrix times each column.
        start: ``(P, B)``, the vectors that the spaces start from.
        size: of the last space, rounded up to whole blocks.
        rows: ``(size + B, P)`` or more to write the basis to; made here by default.

    Yields:
        an orthonormal basis ``(P, K)``, the Ritz values ``(K,)``, and the Ritz vectors in the
        basis ``(K, K)``. The first columns of a basis are the basis before.
    """
    block = _orthonormal(start.new_empty(len(start), 0), start)
    # One piece of memory, which is taken only as far as it is written to.
    rows = start.new_empty(size + start.shape[1], len(start)) if rows is None else rows
    count = 0
    small = start.new_zeros(0, 0)
    if not block.shape[1]:  # nothing but zeros
        yield block, small.flatten(), small
    while more := block.shape[1]:
        rows[count : count + more] = block.T
        count += more
        basis = rows[:count].T
        image = operator(block)
        small = nn.functional.pad(small, (0, more, 0, more))
        small[:, -more:] = basis.T @ image
        # symmetric; what lies below the diagonal was not computed
        values, rotation = torch.linalg.eigh(small.triu() + small.triu(1).T)
        yield basis, values, rotation
        if count >= size:
            break
        block = _orthonormal(basis, image)


def _orthonormal(basis: Tensor, block: Tensor) -> Tensor:
    """What a block (P, B) adds to an orthonormal basis (P, K), orthonormal: ``(P, at most B)``.

    A column of which only rounding is left adds nothing.
    """
    least = 30 * torch.finfo(block.dtype).eps * block.norm(dim=0)
    for _ in range(2):  # once more for what rounding let through
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        added, count = torch.empty_like(block.T, memory_format=torch.contiguous_format), 0
        for z, limit in zip(block.T, least.tolist(), strict=True):
            known = added[:count]
            for _ in range(2):
                z = z - (known @ z) @ known
            left = float(z.norm())
            if left > limit:
                added[count] = z / left
                count += 1
        block = added[:count].T
        least = block.new_full((count,), 0.5)
    return block


Steps = Sequence[tuple[LinearStep, float, float]]


def by_steps(values: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """The optimiser's recurrence backwards, along eigenvectors of H: how it answers to its end.

    It is linear in θ̄ and the momentum's derivative at the end, so two responses for each eigenvalue
    serve all queries.

    Args:
        values: eigenvalues ``(K,)``.
        steps: each step's recurrence, learning rate, and rate of decoupled weight decay.

    Returns:
        what ḡ of each step ``(T, 2, K)``, and θ̄ and the momentum's derivative at the start,
        ``(2, K)`` each, have of θ̄ and of the momentum's derivative at the end.
    """
    # NumPy's calls on such small arrays take a fifth of the time of torch's.
    h = values.cpu().numpy()
    theta = numpy.stack([numpy.ones_like(h), numpy.zeros_like(h)])
    momentum = theta[::-1].copy()
    g_bars = numpy.empty((len(steps), *theta.shape), theta.dtype)
    for at in reversed(range(len(steps))):
        (a, b, c, d), rate, decay = steps[at]
        momentum = momentum - (rate * c) * theta
        g_bar = numpy.multiply(momentum, b, out=g_bars[at])
        if d:
            g_bar -= (rate * d) * theta
        theta = (theta if not decay else (1 - rate * decay) * theta) + h * g_bar
        momentum *= a
    return tuple(torch.from_numpy(part).to(values) for part in (g_bars, theta, momentum))


def time_of(steps: Steps) -> float:
    """How long gradient flow takes for these steps: one with momentum passes ``η / (1 − μ)``."""
    return sum(rate * (b * c / (1 - a) + d) for (a, b, c, d), rate, _ in steps)


def by_flow(values: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """`by_steps` for gradient flow of the same length: ``θ̄ ← exp(−τH) θ̄``, and no momentum.

    ``Σ ḡ = −H⁻¹ (1 − exp(−τH)) θ̄`` is spread evenly over the steps.
    """
    time = time_of(steps)
    shrink = sum(rate * decay for _, rate, decay in steps)
    exponent = (time * values + shrink).clamp(min=-50.0)
    ratio = torch.where(exponent == 0, 1.0, -torch.expm1(-exponent) / exponent)
    nothing = torch.zeros_like(values)
    shares = torch.stack([-time * ratio / len(steps), nothing]).expand(len(steps), -1, -1)
    theta_bar = torch.stack([torch.exp(-exponent), nothing])
    return shares, theta_bar, torch.zeros_like(theta_bar)


def _mixed(responses: Tensor, ends: Tensor) -> Tensor:
    """Responses ``(..., 2, K)`` to θ̄ and momentum at the end ``(2, Q, K)``: ``(..., Q, K)``."""
    return torch.einsum("...ik,iqk->...qk", responses, ends)


@dataclass
class Pull:
    """What the steps of a stretch ask of the examples' gradients.

    ``ḡ_t = basis rotation c_t``, where c_t mixes the ends by the responses of `by_steps`. Half of
    it is asked at the stretch's start and half at its end, step by step more of it: an example's
    gradient lies on a straight line between those at the two ends.

    Attributes:
        stretch: of which run.
        basis: ``(P, K)``.
        rotation: to the Ritz vectors ``(K, K)``.
        responses: of each step ``(T, 2, K)``.
        ends: θ̄ and the momentum's derivative at the end, along Ritz vectors ``(2, Q, K)``.
    """

    stretch: Stretch
    basis: Tensor
    rotation: Tensor
    responses: Tensor
    ends: Tensor

    @property
    def total(self) -> Tensor:
        """``Σ_t ḡ_t``, ``(Q, P)``."""
        return self._along_basis(self.responses.sum(0)) @ self.basis.T

    def asks(self, late: bool) -> bool:
        """Whether anything is asked at this end; not at the end of a single step."""
        return bool(self.ends.any()) and bool(self._weighted(late).any())

    def _along_basis(self, responses: Tensor) -> Tensor:
        """Coordinates in the basis, ``(..., Q, K)``."""
        return _mixed(responses, self.ends) @ self.rotation.T

    def _weighted(self, late: bool) -> Tensor:
        path = self.stretch.path
        return (path if late else 1 - path)[:, None, None] * self.responses

    @property
    def _by_step(self) -> bool:
        """Whether the ḡ_t are fewer vectors than the basis has."""
        return len(self.responses) * self.ends.shape[1] < self.basis.shape[1]

    def directions(self, late: bool) -> Tensor:
        """The vectors ``(P, J)`` whose products with the examples' gradients are wanted.

        Args:
            late: at the end of the stretch, else at its start.
        """
        weighted = self._weighted(late)
        if self.stretch.batches is None:
            return self.basis @ self._along_basis(weighted.sum(0)).T  # one for each query
        if self._by_step:
            return self.basis @ self._along_basis(weighted).flatten(0, 1).T
        return self.basis

    def scores(self, late: bool, products: Tensor, rows: Tensor, count: int) -> Tensor:
        """What this end adds to the scores of some examples ``(Q, B)``.

        Args:
            late: as in `directions`.
            products: of the directions with the gradients of these examples ``(J, B)``.
            rows: which examples they are ``(B,)``.
            count: of all examples.
        """
        if self.stretch.batches is None:  # in every epoch once, somewhere: 1/m a step on average
            return products / count
        members = self.stretch.members(count, rows)
        if self._by_step:
            by_step = products.unflatten(0, (len(self.responses), -1))
            return torch.einsum("bt,tqb->qb", members.to_dense(), by_step)
        own = (members @ self._weighted(late).flatten(1)).unflatten(1, (2, -1))  # (B, 2, K)
        return torch.einsum("bik,iqk->qb", own * (products.T @ self.rotation)[:, None], self.ends)


class SegmentAdjoint(Backwards):
    """The way back through the stretches of a stage's run.

    Args:
        functional, cotangent, onwards: as in `Backwards`.
        recipe: how it was trained.
        reading: of its stretches.

    Attributes:
        momentum_bar: ∂q/∂ the optimiser's momentum ``(Q, P)``.
        sizes: ``Σ_q ‖θ̄_q‖`` at each checkpoint from the one reached to the end.
        changes: at each checkpoint between two stretches, ``τ ‖(H − H') θ̄‖ / ‖θ̄‖`` of each query
            ``(Q,)``: what their curvatures H and H' differ by, over the mean time τ of the two.
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
        o = self.objective
        self.decay, self.apart = recipe.decay(o), recipe.decay_apart(o)
        self.shrink = self.decay * recipe.shares(o)  # what decay takes off θ at a rate of one
        self.momentum_bar = torch.zeros_like(self.theta_bar)
        self.sizes, self.changes = [self.size()], []
        self._rows = self.theta_bar[:0]  # of all Krylov bases in turn: each anew leaves holes

    def sweep(self, stretches: Sequence[Stretch], bar=None) -> None:
        """Backwards through all stretches of the stage."""
        o = self.objective
        later: Pull | None = None
        before: tuple[Tensor, float] | None = None
        for stretch in reversed(stretches):
            rows, weights = self._seen(stretch)
            size = self.theta_bar.norm(dim=1)
            pull, images = self._through(stretch, self._curvature(stretch, rows, weights))
            time = spread(len(stretch.steps)) * time_of(self._linear_steps(stretch))
            if before is not None:
                change = (images[0] - before[0]).norm(dim=1) * (time + before[1]) / 2
                self.changes.insert(0, torch.where(size > 0, change / _nonzero(size), 0.0))
            before = images[1], time
            self._add(stretch.end, pull, later)
            later = pull
            if self.through_frozen:
                names = self.functional.frozen
                self.frozen_bar += cross_products(
                    o, stretch.middle, names, pull.total, weights, rows
                )
            self.centre_bar -= 2 * o.alpha * o.coupled.take(pull.total)
            self.sizes.insert(0, self.size())
            if bar is not None:
                bar.update(len(stretch.steps))
        self.require_finite()
        self._add(stretches[0].start, None, later)

    def _seen(self, stretch: Stretch) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the examples in a stretch's steps, and how often each example counts (m,).

        None for all of them, and for once each. Positions, since data may be too large to copy.
        """
        count = len(self.objective.data)
        if stretch.batches is None:
            return None, None
        weights = stretch.members(count).sum(1).to_dense() * (count / len(stretch.steps))
        rows = weights.nonzero()[:, 0]
        return rows if len(rows) < count else None, weights

    def _curvature(
        self, stretch: Stretch, rows: Tensor | None, weights: Tensor | None
    ) -> DataCurvature:
        """The curvature in the middle of a stretch, on its examples or some of them."""
        o, few = self.objective, self.reading.curvature_examples
        seen = torch.arange(len(o.data)) if rows is None else rows.cpu()
        if few is not None and few < len(seen):
            draw = torch.Generator().manual_seed(0)
            rows = seen[torch.randperm(len(seen), generator=draw)[:few].sort().values]
            rows = rows.to(stretch.middle.device)
            weights = torch.ones_like(self.scores[0]) if weights is None else weights
            weights = weights * (len(o.data) / weights[rows].sum())
        operator = curvature(self.reading.curvature, o, stretch.middle, weights)
        operator.rows = rows
        return operator

    def _add(self, full: Tensor, before: Pull | None, after: Pull | None) -> None:
        """Scores from the gradients at a checkpoint ``full`` (D,), between two stretches.

        Not of a stage that the way only passes through.
        """
        if self.onwards:
            return
        ends = [(p, p is before) for p in (before, after) if p is not None and p.asks(p is before)]
        if not ends:
            return
        count = len(self.objective.data)
        known = [pull.stretch.batches for pull, _ in ends]
        rows = torch.arange(count)
        if all(batches is not None for batches in known):
            rows = torch.cat([batch for batches in known for batch in batches]).unique()
        rows = rows.to(full.device)
        asked = [(pull, late, pull.directions(late)) for pull, late in ends]
        # Few directions share a pass over the data; of many a copy would take memory.
        few = sum(vectors.shape[1] for *_, vectors in asked) <= SHARED_PASS
        for together in [asked] if few else [[one] for one in asked]:
            vectors = [v for *_, v in together]
            sizes = [v.shape[1] for v in vectors]
            vectors = torch.cat(vectors, 1) if few else vectors[0]
            for part, products in product_chunks(self.objective, full, vectors, rows=rows):
                for (pull, late, _), some in zip(together, products.split(sizes), strict=True):
                    self.scores[:, part] += pull.scores(late, some, part, count)

    def _linear_steps(self, stretch: Stretch) -> list[tuple[LinearStep, float, float]]:
        decay = 0.0 if isinstance(self.shrink, Tensor) else self.shrink
        return [(self.recipe.linear_step(t), rate, decay) for t, rate in stretch.steps]

    def _through(self, stretch: Stretch, operator: Operator) -> tuple[Pull, list[Tensor]]:
        """One stretch backwards.

        Returns:
            what it asks of the examples, and ``H θ̄`` at its end and at its start ``(Q, P)``.
        """
        scale = stretch.scale
        theta_bar, momentum_bar = self.theta_bar, self.momentum_bar
        # Decay that differs between parameters has no eigenvectors in common with H: half of it
        # comes before the stretch and half after.
        by_name = isinstance(self.shrink, Tensor)
        half = math.prod(1 - rate * self.shrink for _, rate in stretch.steps) ** 0.5
        theta_bar = theta_bar * half if by_name else theta_bar
        if scale is not None:  # the coordinates in which the preconditioner is one
            theta_bar, momentum_bar = theta_bar * scale, momentum_bar / _nonzero(scale)

        def product(columns: Tensor) -> Tensor:
            columns = columns if scale is None else scale[:, None] * columns
            images = operator @ columns - (self.apart * columns.T).T
            if stretch.factors is not None:  # decay comes after clipping, or acts on θ itself
                images = stretch.factor * images + ((self.apart - self.decay) * columns.T).T
            return images if scale is None else scale[:, None] * images

        pull, theta_bar, momentum_bar, *images = self._in_krylov_space(
            stretch, product, theta_bar, momentum_bar
        )
        if scale is not None:
            images = [image / _nonzero(scale) for image in images]
            pull.basis = scale[:, None] * pull.basis
            momentum_bar = momentum_bar * scale
            kept = self.theta_bar * (half if by_name else half**2)
            theta_bar = torch.where(scale > 0, theta_bar / _nonzero(scale), kept)
        self.theta_bar = theta_bar * half if by_name else theta_bar
        self.momentum_bar = momentum_bar
        if stretch.factors is not None:
            factors = pull.responses.new_tensor(stretch.factors)
            pull.responses = factors[:, None, None] * pull.responses
        return pull, images

    def _in_krylov_space(
        self,
        stretch: Stretch,
        product: Callable[[Tensor], Tensor],
        theta_bar: Tensor,
        momentum_bar: Tensor,
    ) -> tuple:
        """Backwards over a stretch's steps in a Krylov space, grown until the answer settles.

        Returns:
            what is asked of the examples, θ̄ and the momentum's derivative at the start ``(Q, P)``,
            and H times θ̄ at the end and at the start, as the space has it.
        """
        steps = self._linear_steps(stretch)
        reverse = by_flow if self.reading.dynamics == "flow" else by_steps
        pair = [theta_bar, momentum_bar] if bool(momentum_bar.any()) else [theta_bar]
        size = len(theta_bar) * self.reading.dimension(len(steps))

        def through(basis: Tensor, values: Tensor, rotation: Tensor) -> tuple[Pull, list[Tensor]]:
            ends = torch.stack([v @ basis @ rotation for v in (theta_bar, momentum_bar)])
            responses, *start = reverse(values, steps)
            pull = Pull(stretch, basis, rotation, responses, ends)
            return pull, [_mixed(part, ends) @ rotation.T for part in (responses.sum(0), *start)]

        if len(self._rows) < size + 2 * len(theta_bar):
            self._rows = theta_bar.new_empty(size + 2 * len(theta_bar), theta_bar.shape[1])
        before, last = None, 0
        for space in krylov(product, torch.cat(pair).T, size, self._rows):
            if last < len(space[1]) < min(1.5 * last, size):
                continue  # the steps of a long stretch take longer than a product
            last = len(space[1])
            pull, parts = through(*space)
            now = torch.cat(parts)
            if before is not None and self.reading.krylov is None:
                change = now - nn.functional.pad(before, (0, now.shape[1] - before.shape[1]))
                if bool((change.norm(dim=1) <= SETTLED * now.norm(dim=1)).all()):
                    break
            before = now
        if last < len(space[1]):  # it ended sooner than it was asked to grow
            pull, parts = through(*space)
        basis, values, rotation = space
        images = [values * pull.ends[0], values * (parts[1] @ rotation)]
        held = *parts[1:], *(image @ rotation.T for image in images)
        pull.basis = basis.T.clone().T  # its memory is used again
        return pull, *(c @ basis.T for c in held)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def stretches_of(run: KeptRun, details: bool, shares: float | Tensor = 1.0) -> list[Stretch]:
    """What lies between the checkpoints of a run, with or without what is known beyond them.

    ``shares``: of the parameters in the learning rate, see `MiniBatch.shares`.
    """
    stretches = []
    for i, (a, b) in enumerate(itertools.pairwise(run.steps)):
        ends = [(run.states[j], run.steps[j]) for j in (i, i + 1) if run.states[j] is not None]
        found = [run.recipe.preconditioner(state, step) for state, step in ends if step]
        steps = list(zip(range(a, b), run.rates[a:b], strict=True))
        scale = shares.sqrt() if isinstance(shares, Tensor) else None
        if found and found[-1] is not None:
            # A step uses what comes after it: of a single one that is the end's.
            share = (len(steps) + 1) / (2 * len(steps))
            scale = (shares * (share * found[-1] + (1 - share) * found[0])[0]).sqrt()
        start, end = run.fulls[i : i + 2]
        middle = start + float(_path(steps).mean()) * (end - start)  # on a straight path
        middle = run.means[i] if details and run.means is not None else middle
        known = run.batches[a:b] if details and run.batches is not None else None
        factors = None if run.factors is None else run.factors[a:b]
        stretches.append(Stretch(start, end, steps, middle, known, scale, factors))
    return stretches
