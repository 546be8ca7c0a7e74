"""Conjugate gradients on shares of the examples, each the preconditioner of the next.

The curvature of m examples is a sum, and in a trained classifier few of them carry most of what is
hard about it. With ``A_k`` the penalty, damping and the most important examples up to a share, a
rough solve of ``A_{k−1}`` is the preconditioner of ``A_k``, and knows its own product with what it
gives: ``A_k z = A_{k−1} z + (A_k − A_{k−1}) z``. So an example meets only as many directions as it
matters for; the last ``A_k`` is the whole, its residual the true one.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator

ROUGH, INNER = 0.04, 10  # of a solve on a share: relative residual times √share, most iterations
KEPT = 8  # directions kept for each right-hand side


def check_shares(shares: tuple[float, ...]) -> None:
    if not all(0 < a < b for a, b in itertools.pairwise([*shares, 1.0])):
        raise ValueError(f"shares={shares!r} must rise between 0 and 1, as (0.08, 0.3)")


def basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of the columns' span and T with ``Q = columns T``: duplicates, zeros
    and more columns than rows only shrink it.

    What is left out is below a thousandth of the columns, far less than an iteration leaves, and
    comes back once it is more. A finer sieve would spend products on the rounding in which
    duplicates differ.
    """
    norm = columns.norm(dim=0)
    scale = 1 / norm.where(norm > 0, 1.0)
    q, r = torch.linalg.qr(columns * scale)
    u, s, v = torch.linalg.svd(r, full_matrices=False)
    keep = (s > 1e-3 * s[:1]) & (s > 0)
    return q @ u[:, keep], scale[:, None] * v[keep].T / s[keep]


def split(operator: Operator, shares: tuple[float, ...]) -> tuple[Tensor, list[DataCurvature]]:
    """The known diagonal, and the examples' curvature in parts, the most important first."""
    base, shift = operator.unshifted()
    if not isinstance(base, DataCurvature):
        raise ValueError(f"{base!r} has no examples to take shares={shares} of: leave shares=()")
    diagonal = torch.zeros_like(base.theta) + shift + (0.0 if base.ridge is None else base.ridge)
    order = base.importance().argsort(descending=True)
    ends = [math.ceil(share * len(order)) for share in (0.0, *shares, 1.0)]
    return diagonal, [base.part(order[a:b].sort().values) for a, b in itertools.pairwise(ends)]


class Level:
    """Block conjugate gradients on ``A_k``, preconditioned by the level below.

    Directions stay, A_k-orthonormal, for the later solves of this level, which start with the best
    that they offer. They lie in one piece of memory from the start: kept as they come, between
    chunks of activations, they would leave holes in the heap that cost as much again.

    Args:
        part: ``A_k − A_{k−1}``.
        below: gives ``z ≈ A⁻¹ r`` and ``A_{k−1} z``.
        rough: relative residual of its own solves.
        columns: most right-hand sides at a time; `KEPT` directions for each are kept, the oldest
            go.
        floor: a smaller curvature of a share says nothing about the whole: the level is passed over
            from then on.
    """

    def __init__(
        self, part: DataCurvature, below: Callable, rough: float, columns: int, floor: float
    ):
        self.part, self.below, self.rough, self.columns, self.floor = (
            part,
            below,
            rough,
            columns,
            floor,
        )
        # directions and their products
        self.store = part.theta.new_empty(2, KEPT * columns, len(part.theta))
        self.count = 0  # of directions found so far
        self.products, self.smallest = 0.0, float("inf")  # products with all examples

    def _multiply(self, z: Tensor, product: Tensor) -> Tensor:
        """``A_k z`` from ``A_{k−1} z``."""
        self.products += z.shape[1] * len(self.part.rows) / len(self.part.weights)
        return product + self.part @ z

    def _kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Directions and their products, a few columns at a time: each of two pieces ``(P, K)``."""
        for piece in self.store[:, : self.count].split(self.columns, 1):
            yield piece[0].T, piece[1].T

    def widen(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """New directions P for residuals ``r`` (P, K), with ``PᵀA_kP = 1``, and ``A_k P``; useless
        once `smallest` is not above the floor.
        """
        p, a_p = self.below(r)
        p, turn = basis(p)
        a_p = self._multiply(p, a_p @ turn)
        for d, a_d in self._kept():
            along = a_d.T @ p
            p, a_p = p.addmm_(d, along, alpha=-1), a_p.addmm_(a_d, along, alpha=-1)
        p, turn = basis(p)
        a_p = a_p @ turn
        values, vectors = torch.linalg.eigh(p.T @ a_p)  # Ritz values
        self.smallest = min(self.smallest, *values.tolist(), float("inf"))
        turn = vectors / values.sqrt()
        p, a_p = p @ turn, a_p @ turn
        places = (
            torch.arange(self.count, self.count + p.shape[1], device=p.device) % self.store.shape[1]
        )
        self.store[0, places], self.store[1, places] = p.T, a_p.T
        self.count += p.shape[1]
        return p, a_p

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """A rough ``x ≈ A_k⁻¹ b``, and ``A_k x``."""
        if self.smallest > self.floor:
            x, r, goal = torch.zeros_like(b), b.clone(), self.rough * b.norm(dim=0)
            for p, a_p in self._kept():
                step = p.T @ r
                x, r = x.addmm_(p, step), r.addmm_(a_p, step, alpha=-1)
            for _ in range(INNER):
                left = r.norm(dim=0) > goal
                if not bool(left.any()):
                    break
                p, a_p = self.widen(r[:, left])
                if not (self.smallest > self.floor and p.shape[1]):
                    break
                step = p.T @ r
                x, r = x.addmm_(p, step), r.addmm_(a_p, step, alpha=-1)
        if self.smallest > self.floor:
            return x, r.neg_().add_(b)
        z, product = self.below(b)
        return z, self._multiply(z, product)


def levels(
    parts: tuple, shares: tuple[float, ...], approximate: Callable | None, columns: int
) -> list[Level]:
    """One level a share and the whole, on top of an approximate inverse."""
    diagonal, curvatures = parts

    def start(r):
        z = r if approximate is None else approximate(r)
        return z, diagonal[:, None] * z

    made, below = [], start
    for part, share in zip(curvatures, (*shares, 1.0), strict=True):
        floor = float(diagonal.mean()) / 100 if share < 1 else 0.0
        made.append(Level(part, below, min(0.5, ROUGH / share**0.5), columns, floor))
        below = made[-1].solve
    return made
