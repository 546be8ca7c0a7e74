"""What the solvers share: settings, the report of a solve, and the check of true residuals."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import (
    check_flag,
    check_function,
    check_instance,
    check_number,
    check_seed,
    check_tensor,
    check_whole,
)
from ..curvature.operators import Operator
from ..errors import ConvergenceWarning, NotConvergedError

__all__ = ["SolveReport"]

WAYS_OUT = "use curvature='ggn', more damping, a larger alpha, or train to a minimum (LBFGS)"


@dataclass
class SolveReport:
    """What a solve of K right-hand sides did.

    Attributes:
        solver: its settings, as text.
        iterations: the most of any column; 0 for a factorisation.
        residuals: ``‖A x − b‖ / ‖b‖`` of each column, ``(K,)``; 0 where b is 0.
        converged: which columns are within the tolerance, ``(K,)``.
        smallest_curvature: smallest ``pᵀAp / pᵀp`` seen, an upper bound of the smallest eigenvalue.
        products: matrix-vector products spent, counted per column.
        bytes: largest memory the solver itself held.
        seconds: wall-clock time.
        null_directions: of the curvature, left out of the solve; see `SymmetryWarning`.
    """

    solver: str
    iterations: int
    residuals: Tensor
    converged: Tensor
    smallest_curvature: float
    products: int
    bytes: int
    seconds: float = field(compare=False)
    null_directions: int = 0

    def __str__(self) -> str:
        worst = float(self.residuals.max()) if len(self.residuals) else 0.0
        left_out = f", {self.null_directions} null directions left out"
        return (
            f"{self.solver}: {int(self.converged.sum())} of {len(self.converged)} columns "
            f"converged, {self.iterations} iterations, worst residual {worst:.1e}, smallest "
            f"curvature {self.smallest_curvature:.2e}{left_out * bool(self.null_directions)}"
        )

    __repr__ = __str__


@dataclass(frozen=True)
class Settings:
    """Settings of every iterative or approximate solver; each class explains its own."""

    tol: float = 1e-6
    max_iter: int = 1000
    strict: bool = False
    callback: Callable[[int, Tensor], None] | None = None

    def __post_init__(self):
        self._check(lambda tol: 0 < tol < 1, "a number between 0 and 1")

    def _check(self, holds: Callable[[float], bool], text: str, **least: int) -> None:
        """Check what all solvers have, and whole numbers of at least this size.

        Args:
            holds: which tolerances there are.
            text: the same in words.
            least: of settings besides ``max_iter``.
        """
        check_number("tol", self.tol, holds, text)
        check_flag("strict", self.strict)
        if self.callback is not None:
            check_function("callback", self.callback, "(iteration, relative residuals)")
        for name, lowest in {"max_iter": 1, **least}.items():
            check_whole(name, getattr(self, name), lowest)
        if hasattr(self, "seed"):
            check_seed("seed", self.seed)

    def __repr__(self) -> str:
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        changed = [f"{name}={value!r}" for name, value, default in values if value != default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def report(
        self, iterations, residuals, smallest, products, held, start, way_out
    ) -> SolveReport:
        """The report of a finished solve.

        A column that missed the tolerance causes a warning, in strict mode an error.
        """
        converged = residuals <= self.tol
        seconds = time.perf_counter() - start
        report = SolveReport(
            repr(self), iterations, residuals, converged, smallest, products, held, seconds
        )
        if not bool(converged.all()):
            message = (
                f"{self!r}: {int((~converged).sum())} of {len(residuals)} columns stopped at "
                f"relative residual up to {float(residuals.max()):.1e} (asked: {self.tol:.0e}) "
                f"after {iterations} iterations, smallest curvature {smallest:.1e}; {way_out}"
            )
            if self.strict:
                raise NotConvergedError(message)
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return report


class Prepared:
    """An operator waiting for right-hand sides, for solvers with nothing to prepare."""

    def __init__(self, solver, operator: Operator):
        check_operator(operator, dense=True)
        self.solver = solver
        self.operator = operator

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report."""
        return self.solver.solve(self.operator, columns)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Elementwise quotient in which 0 / 0 is 0, so a zero right-hand side has residual 0."""
    return above / below.where(below > 0, torch.ones_like(below))


def relative_residuals(operator: Operator, x: Tensor, b: Tensor) -> Tensor:
    """``‖A x − b‖ / ‖b‖`` of each column, which costs one product each."""
    return ratio((operator @ x - b).norm(dim=0), b.norm(dim=0))


def verified(
    operator: Operator, x: Tensor, b: Tensor, residual: Tensor, tol: float
) -> tuple[Tensor, int]:
    """True residual vectors ``b − A x``, and how many products finding them took.

    Rounding makes a recursion's ``residual`` drift away from the true one. One product tells how
    far: with random signs s, ``A(Xs) − Bs + Rs`` is on average as long as all columns' drifts
    together. Only if that is not far below ``tol`` is each column's own residual computed.
    """
    count = b.shape[1]
    if count > 1:
        generator = torch.Generator(device=b.device).manual_seed(0)
        bits = torch.randint(0, 2, (count,), generator=generator, device=b.device)
        signs = bits.to(b.dtype) * 2 - 1
        drift = float((operator @ (x @ signs) - b @ signs + residual @ signs).norm())
        if drift <= 0.1 * tol:
            return residual, 1
    return b - operator @ x, count + (count > 1)


def check_columns(operator: Operator, b: Tensor) -> None:
    """Refuse right-hand sides that are not finite or do not fit the operator."""
    check_tensor("right-hand sides", b, "(P, K)")
    if b.ndim != 2 or not bool(torch.isfinite(b).all()):
        raise ValueError(
            f"right-hand sides of shape {tuple(b.shape)} must be a finite (P, K) tensor"
        )
    if b.shape[0] != operator.shape[0]:
        raise ValueError(
            f"operator of shape {operator.shape} times {tuple(b.shape)}: give right-hand sides "
            "that are a (P, K) tensor"
        )
    if b.dtype != operator.dtype or b.device != operator.device:
        raise ValueError(
            f"right-hand sides are {b.dtype} on {b.device}, the operator is {operator.dtype} on "
            f"{operator.device}: convert one"
        )


def check_operator(operator, dense: bool = False) -> None:
    """Refuse what is no operator.

    Args:
        operator: as given.
        dense: whether a matrix ``(P, P)`` will do, as for solvers that need only ``A @ V``.
    """
    square = isinstance(operator, Tensor) and operator.ndim == 2 and len({*operator.shape}) == 1
    if dense and square:
        return
    check_instance(
        "operator", operator, Operator, "as pipeline.curvature(stage) gives it, plus a damping"
    )


class Solved(NamedTuple):
    """A solve of normalised columns before its report.

    Attributes:
        x: the answers ``(P, K)``.
        residual: residual vectors ``(P, K)``, by recursion.
        iterations: how many were taken.
        smallest: smallest curvature seen.
        products: products spent, counted per column.
    """

    x: Tensor
    residual: Tensor
    iterations: int
    smallest: float
    products: int
