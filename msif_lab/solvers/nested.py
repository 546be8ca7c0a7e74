"""Conjugate gradients on growing shares of the examples, each preconditioning the next.

The curvature of m examples is a sum, and in a trained classifier few of them cause most of its
ill-conditioning. Let ``A_k`` consist of penalty, damping and the most important examples up to the
k-th share. A rough solve with ``A_{k−1}`` is the preconditioner of ``A_k``. It also gives
``A_{k−1} z`` for its answer z, and ``A_k z = A_{k−1} z + (A_k − A_{k−1}) z``, so only the examples
added at level k have to be multiplied. An example is thus multiplied with only as many directions
as it matters for; the last ``A_k`` is the whole matrix, and its residual the true one.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..arguments import is_number, shown
from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from .null import null_range

ROUGH = 0.04  # relative residual of a solve on a share, times √share
INNER = 10  # most iterations of such a solve
KEPT = 8  # directions kept for each right-hand side


def check_shares(shares: tuple[float, ...]) -> None:
    """Refuse shares that do not rise between 0 and 1."""
    found = shares if isinstance(shares, tuple | list) else (None,)
    pairs = itertools.pairwise([*found, 1.0])
    if not all(map(is_number, found)) or not all(0 < a < b for a, b in pairs):
        raise ValueError(f"shares={shown(shares)} must rise between 0 and 1, as (0.08, 0.3)")


def basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of the columns' span, and T with ``Q = columns T``.

    Q has fewer columns if some are zero or duplicates, or if they outnumber the rows. Directions
    that make up less than a thousandth of the columns are left out; that is far less than an
    iteration leaves unsolved, and they return once they have grown. With a lower threshold,
    products would be spent on the rounding errors by which duplicates differ.
    """
    norm = columns.norm(dim=0)
    scale = 1 / norm.where(norm > 0, 1.0)
    q, r = torch.linalg.qr(columns * scale)
    u, s, v = torch.linalg.svd(r, full_matrices=False)
    keep = (s > 1e-3 * s[:1]) & (s > 0)
    return q @ u[:, keep], scale[:, None] * v[keep].T / s[keep]


def split(operator: Operator, shares: tuple[float, ...]) -> tuple[Tensor, list[DataCurvature]]:
    """The known diagonal, and the examples' curvature in parts, the most important part first."""
    base, shift = operator.unshifted()
    if not isinstance(base, DataCurvature):
        raise ValueError(f"{base!r} has no examples to take shares={shares} of: leave shares=()")
    diagonal = torch.zeros_like(base.theta) + shift + (0.0 if base.ridge is None else base.ridge)
    order = base.importance().argsort(descending=True)
    ends = [math.ceil(share * len(order)) for share in (0.0, *shares, 1.0)]
    return diagonal, [base.part(order[a:b].sort().values) for a, b in itertools.pairwise(ends)]


class Level:
    """Block conjugate gradients on ``A_k``, preconditioned by the level below.

    The directions are kept, A_k-orthonormal, for later solves of this level, which start with the
    best answer in their span. They have one block of memory from the start: allocated one by one
    between chunks of activations, they would leave holes in the heap that cost as much again.

    Args:
        part: ``A_k − A_{k−1}``.
        below: gives ``z``, roughly ``A_k⁻¹ r``, and ``A_{k−1} z``.
        rough: relative residual of its own solves.
        columns: most right-hand sides at a time; `KEPT` directions are kept for each, and the
            oldest are overwritten.
        floor: once a curvature at or below it is met, this level is skipped: so small a curvature
            of a share says nothing about the whole.
    """

    def __init__(
        self, part: DataCurvature, below: Callable, rough: float, columns: int, floor: float
    ):
        self.part = part
        self.below = below
        self.rough = rough
        self.columns = columns
        self.floor = floor
        # P and A_k P, one direction per row
        self.store = part.theta.new_empty(2, KEPT * columns, len(part.theta))
        self.count = 0  # of directions found so far
        self.products = 0.0  # in units of a product with all examples
        self.smallest = float("inf")  # curvature met so far
        self.largest = 0.0

    def _multiply(self, z: Tensor, product: Tensor) -> Tensor:
        """``A_k z`` from z and its ``product`` ``A_{k−1} z``."""
        self.products += z.shape[1] * len(self.part.rows) / len(self.part.weights)
        return product + self.part @ z

    def _kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The kept directions and their products, a few at a time, ``(P, K)`` each."""
        for piece in self.store[:, : self.count].split(self.columns, 1):
            yield piece[0].T, piece[1].T

    def widen(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """New directions P for residuals ``r`` (P, K), with ``PᵀA_kP = 1``, and ``A_k P``.

        They are useless once ``smallest`` is no longer above the floor. Null directions, whose
        curvature is rounding, are left out.
        """
        p, a_p = self.below(r)
        p, turn = basis(p)
        a_p = self._multiply(p, a_p @ turn)
        for d, a_d in self._kept():
            along = a_d.T @ p
            p = p.addmm_(d, along, alpha=-1)
            a_p = a_p.addmm_(a_d, along, alpha=-1)
        p, turn = basis(p)
        a_p = a_p @ turn
        values, vectors = torch.linalg.eigh(p.T @ a_p)  # Ritz values
        self.smallest = min(self.smallest, *values.tolist(), float("inf"))
        self.largest = max(self.largest, *values.tolist(), 0.0)
        bent = values > null_range(self.part, self.largest, dense=False)[1]
        turn = vectors[:, bent] / values[bent].sqrt()
        p = p @ turn
        a_p = a_p @ turn
        new = torch.arange(self.count, self.count + p.shape[1], device=p.device)
        places = new % self.store.shape[1]  # the oldest are overwritten
        self.store[0, places] = p.T
        self.store[1, places] = a_p.T
        self.count += p.shape[1]
        return p, a_p

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A rough ``x ≈ A_k⁻¹ b``, and ``A_k x``."""
        if self.smallest > self.floor:
            x = torch.zeros_like(b)
            r = b.clone()
            goal = self.rough * b.norm(dim=0)
            for p, a_p in self._kept():
                step = p.T @ r
                x = x.addmm_(p, step)
                r = r.addmm_(a_p, step, alpha=-1)
            for _ in range(INNER):
                left = r.norm(dim=0) > goal
                if not bool(left.any()):
                    break
                p, a_p = self.widen(r[:, left])
                if not (self.smallest > self.floor and p.shape[1]):
                    break
                step = p.T @ r
                x = x.addmm_(p, step)
                r = r.addmm_(a_p, step, alpha=-1)
        if self.smallest > self.floor:
            return x, r.neg_().add_(b)  # A_k x = b − r
        z, product = self.below(b)
        return z, self._multiply(z, product)


def levels(
    parts: tuple, shares: tuple[float, ...], approximate: Callable | None, columns: int
) -> list[Level]:
    """A level for each share and one for the whole, the lowest on an approximate inverse.

    Args:
        parts: diagonal and curvatures, from `split`.
        shares: as in `ConjugateGradient`.
        approximate: the inverse below the lowest level; None for the identity.
        columns: most right-hand sides at a time.
    """
    diagonal, curvatures = parts

    def start(r):
        z = r if approximate is None else approximate(r)
        return z, diagonal[:, None] * z

    made: list[Level] = []
    below = start
    for part, share in zip(curvatures, (*shares, 1.0), strict=True):
        floor = float(diagonal.mean()) / 100 if share < 1 else 0.0
        made.append(Level(part, below, min(0.5, ROUGH / share**0.5), columns, floor))
        below = made[-1].solve
    return made
