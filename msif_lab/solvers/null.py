"""Directions in which a minimum is flat: found, named, and left out of the solves.

A low-rank layer ``W₀ + B A`` is the same function for ``R A`` and ``B R⁻¹``; logits may all grow by
one number. Along such a symmetry F does not change, so its Hessian has the eigenvalue 0 at a
minimum, up to rounding and to the gradient that is left: with G the symmetry's generator,
``F(e^{tG} θ) = F(θ)`` for all θ gives ``H G θ = −Gᵀ ∇F``. What a model computes does not change
either, so the gradients of examples and queries have no part there, and ``H⁻¹`` means the inverse
on the rest, the directions orthogonal to them.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.derivatives import per_example_gradients
from ..curvature.matrices import GGN, DataCurvature
from ..curvature.operators import Operator
from ..curvature.soundness import missing_loss_curvature
from ..errors import IndefiniteCurvatureError, SymmetryWarning
from .report import WAYS_OUT, ratio

ROOM = 10.0  # times ‖∇F‖ / ‖θ‖, for a generator that moves few of the parameters
FLOOR = 1e-3  # of the largest gradient: smaller columns are measured against this
MOST = 1e-3  # part of a vector along null directions that may be an error of theirs
NAMED = 0.1  # share of the directions' squares from which a parameter is named


def null_range(operator: Operator, largest: float, dense: bool = True) -> tuple[float, float]:
    """Between which two numbers an eigenvalue may be that of a symmetry.

    They are as far from 0 as rounding, times the largest eigenvalue ``ε P`` of a dense matrix and
    ``10 ε`` of products, plus what the remaining gradient adds; never more than ``√ε`` times the
    largest, so that no point far from a minimum passes. The upper one is also below half of what
    penalty and damping add at least: a direction that no example bends has all of that.
    """
    eps = torch.finfo(operator.dtype).eps
    errors = operator.shape[0] if dense else 10
    # A lesson solves with plain tensors.
    base, shift = operator.unshifted() if isinstance(operator, Operator) else (operator, 0.0)
    slack, known = 0.0, torch.as_tensor(shift)
    if isinstance(base, DataCurvature):
        slack = ROOM * base.gradient_norm / float(base.theta.norm().clamp(min=1e-30))
        known = known if base.ridge is None else known + base.ridge
    level = min(eps * errors * largest + slack, eps**0.5 * largest)
    least = float(known.min())
    return -level, min(level, least / 2) if least > 0 else level


@dataclass
class NullDirections:
    """Null directions of a curvature.

    Attributes:
        vectors: orthonormal, ``(P, k)``.
        values: their eigenvalues, ``(k,)``.
        largest: the largest eigenvalue of all.
        gap: the smallest eigenvalue of the rest.
        level: how far from 0 an eigenvalue could be.
        scale: norm of the largest gradient of an example, 0 without examples.
        where: the stage, for messages; or empty.
    """

    vectors: Tensor
    values: Tensor
    largest: float
    gap: float
    level: float
    scale: float = 0.0
    where: str = ""

    @property
    def tolerance(self) -> float:
        """Part of a vector along them that may be an error: they are known to ``level / gap``."""
        return min(torch.finfo(self.values.dtype).eps ** 0.5 + self.level / self.gap, MOST)

    def share(self, columns: Tensor) -> Tensor:
        """The relative part of each column (P, K) along them, ``(K,)``.

        A confident prediction's gradient ``Jᵀ (p − y)`` is small, but its rounding is not.
        """
        norm = columns.norm(dim=0).clamp(min=FLOOR * self.scale)
        return ratio((self.vectors.T @ columns).norm(dim=0), norm)

    def without(self, columns: Tensor) -> Tensor:
        """The columns ``(P, K)`` without their part along them."""
        return columns - self.vectors @ (self.vectors.T @ columns)

    def describe(self) -> str:
        """Number and eigenvalues in words."""
        count = len(self.values)
        low, high = float(self.values[0]), float(self.values[-1])
        span = f"eigenvalue {low:.1e}" if count == 1 else f"eigenvalues {low:.1e} to {high:.1e}"
        size = float(self.values.abs().max()) / self.largest
        return (
            f"{self.where}the curvature has {count} null direction{'s' if count > 1 else ''} "
            f"({span}, at most {size:.0e} of the largest)"
        )

    def refuse(self, share: float) -> None:
        """Raise the error for a right-hand side with so large a part along them."""
        smallest = float(self.values[0])
        raise IndefiniteCurvatureError(
            f"{self.describe()}, and a right-hand side has a part of {share:.1e} along them "
            f"(rounding explains {self.tolerance:.0e}): it asks which of many equal minima was "
            f"reached. The smallest eigenvalue is {smallest:.3e}; {WAYS_OUT}",
            smallest,
        )


def find_null(operator: Operator, values: Tensor, vectors: Tensor) -> NullDirections | None:
    """The null directions among ascending eigenvalues (P,) and eigenvectors (P, P), if any.

    None as well where an eigenvalue is too negative for one, or where some example's gradient
    has a part along them: then they are no symmetry.
    """
    largest = float(values[-1])
    low, high = null_range(operator, largest)
    if float(values[0]) < low:
        return None
    base, _ = operator.unshifted()
    few = int((values <= high).sum())
    count = few - int(_bent(base, values[:few], vectors[:, :few], largest).sum())
    if not 0 < count < len(values):
        return None
    found = NullDirections(
        vectors[:, :count].clone(), values[:count], largest, float(values[count]), -low
    )
    if isinstance(base, DataCurvature):
        found.where = f"{base.objective.where}: "
        parts, norms = [], []
        for _, gradients in per_example_gradients(base.objective, base.full, every=base.every):
            parts.append((gradients @ found.vectors).norm(dim=1))
            norms.append(gradients.norm(dim=1))
        norm = torch.cat(norms)
        found.scale = float(norm.max())
        share = ratio(torch.cat(parts), norm.clamp(min=FLOOR * found.scale))
        if float(share.max()) > found.tolerance:
            return None
        _announce(found, base)
    return found


def _bent(base: Operator, values: Tensor, vectors: Tensor, largest: float) -> Tensor:
    """From which of some eigenvectors (P, k) on the curvature is the examples' own, ``(k,)``.

    What the remaining gradient adds to a symmetry's eigenvalue is no curvature of an example's
    loss in its outputs: ``vᵀ (JᵀΛJ) v = 0``. The eigenvalue of an intercept beside features a
    thousand times as large may be as small, but all of it comes from there. Eigenvalues rise, so
    once one is an example's, those behind it count as such too.
    """
    rounding = torch.finfo(values.dtype).eps * len(vectors) * largest
    doubtful = values > rounding
    if not bool(doubtful.any()) or not isinstance(base, DataCurvature):
        return torch.zeros_like(doubtful)
    if missing_loss_curvature(base.objective):
        return doubtful
    outputs = GGN(base.objective, base.full, base.weights, ridge=False, every=base.every)
    bends = (vectors * (outputs @ vectors.contiguous())).sum(0)
    return (doubtful & (bends > 0.1 * values)).int().cumsum(0) > 0


def _announce(found: NullDirections, base: DataCurvature) -> None:
    """Say which parameters hold the null directions."""
    o = base.objective
    squares = found.vectors.square().sum(1)
    names = list(o.layout.spans) if base.every else o.trained_names
    sizes = [len(o.layout.spans[name]) for name in names]
    shares = {n: float(s.sum()) for n, s in zip(names, squares.split(sizes), strict=True)}
    total = sum(shares.values())
    most = sorted((n for n in names if shares[n] >= NAMED * total), key=lambda n: -shares[n])
    warnings.warn(
        f"{found.describe()}, in {', '.join(map(repr, most[:6]))}; no example's gradient has a "
        "part there: a symmetry, as of a low-rank layer B A = (B R⁻¹)(R A) or of logits that all "
        "move by one number, or fewer examples than parameters. Solves leave them out; a question "
        "that depends on them is refused",
        SymmetryWarning,
        stacklevel=6,
    )
