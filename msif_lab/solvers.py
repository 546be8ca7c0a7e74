"""Solvers for ``H v = a``: one prepared per stage, many right-hand sides, every solve with its report."""

import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from .curvature.operators import Operator, Shifted
from .errors import ConvergenceWarning, IndefiniteCurvatureError, NotConvergedError
from .memory import parse_bytes

__all__ = ["Exact", "SolveReport", "Spectrum", "schur_complement"]

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
    """

    solver: str
    iterations: int
    residuals: Tensor
    converged: Tensor
    smallest_curvature: float
    products: int
    bytes: int
    seconds: float = field(compare=False)

    def __str__(self) -> str:
        worst = float(self.residuals.max()) if len(self.residuals) else 0.0
        return (
            f"{self.solver}: {int(self.converged.sum())} of {len(self.converged)} columns converged, {self.iterations} "
            f"iterations, worst residual {worst:.1e}, smallest curvature {self.smallest_curvature:.2e}"
        )

    __repr__ = __str__


@dataclass(frozen=True)
class Settings:
    """What every iterative or approximate solver takes; the fields are explained there."""

    tol: float = 1e-6
    max_iter: int = 1000
    strict: bool = False
    callback: Callable[[int, Tensor], None] | None = None

    def __post_init__(self):
        if not 0 < self.tol < 1 or self.max_iter < 1:
            raise ValueError(f"tol={self.tol} must lie between 0 and 1, max_iter={self.max_iter} must be at least 1")

    def __repr__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def report(self, iterations, residuals, smallest, products, held, start, way_out) -> SolveReport:
        """The report of a finished solve; warns, or raises in strict mode, when a column missed the tolerance."""
        converged, seconds = residuals <= self.tol, time.perf_counter() - start
        report = SolveReport(repr(self), iterations, residuals, converged, smallest, products, held, seconds)
        if not bool(converged.all()):
            message = (
                f"{self!r}: {int((~converged).sum())} of {len(residuals)} columns stopped at relative residual up to "
                f"{float(residuals.max()):.1e} (asked: {self.tol:.0e}) after {iterations} iterations, smallest "
                f"curvature {smallest:.1e}; {way_out}"
            )
            if self.strict:
                raise NotConvergedError(message)
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return report


class Prepared:
    """An operator waiting for right-hand sides."""

    def __init__(self, solver, operator: Operator):
        self.solver, self.operator = solver, operator

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report."""
        return self.solver.solve(self.operator, columns)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Elementwise quotient; 0 / 0 is 0: a zero right-hand side is answered by zero, with residual 0."""
    return above / below.where(below > 0, torch.ones_like(below))


def relative_residuals(operator: Operator, x: Tensor, b: Tensor) -> Tensor:
    """``‖A x − b‖ / ‖b‖`` of each column, at the price of one product each."""
    return ratio((operator @ x - b).norm(dim=0), b.norm(dim=0))


def verified(operator: Operator, x: Tensor, b: Tensor, residual: Tensor, tol: float) -> tuple[Tensor, int]:
    """True residual vectors ``b − A x`` and the products that took.

    A recursion drifts from the truth by rounding. One product tells: with random signs s, ``A(Xs) − Bs + Rs`` is on
    average as long as all columns' drifts together. Only where that is not far below ``tol`` is each column's own
    residual computed.
    """
    count = b.shape[1]
    if count > 1:
        generator = torch.Generator(device=b.device).manual_seed(0)
        signs = torch.randint(0, 2, (count,), generator=generator, device=b.device).to(b.dtype) * 2 - 1
        drift = float((operator @ (x @ signs) - b @ signs + residual @ signs).norm())
        if drift <= 0.1 * tol:
            return residual, 1
    return b - operator @ x, count + (count > 1)


def check_columns(operator: Operator, b: Tensor) -> None:
    if b.ndim != 2 or not bool(torch.isfinite(b).all()):
        raise ValueError(f"right-hand sides of shape {tuple(b.shape)} must be a finite (P, K) tensor")
    if b.shape[0] != operator.shape[0]:
        raise ValueError(f"operator of shape {operator.shape} times {tuple(b.shape)}: give a (P, K) tensor")


@dataclass
class Spectrum:
    """Eigenvalues ``(P,)`` in rising order and eigenvectors ``(P, P)`` of a symmetric matrix.

    One decomposition answers every shift: ``spectrum.apply(lambda s: 1 / (s + damping), B)``.
    """

    values: Tensor
    vectors: Tensor

    def apply(self, function: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
        """``f(A) B`` for ``B`` (P, K), f acting on the eigenvalues."""
        return self.vectors @ (function(self.values)[:, None] * (self.vectors.T @ columns))


def schur_complement(matrix: Tensor, keep: Tensor) -> Tensor:
    """``A_kk − A_kr A_rr⁻¹ A_rk``: what is left for the kept rows when the rest adapts.

    Args:
        matrix: symmetric ``(P, P)`` with a positive definite rest block.
        keep: positions of the kept rows.

    Raises:
        IndefiniteCurvatureError: the rest block is not positive definite.
    """
    rest = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    rest[keep] = False
    if not bool(rest.any()):
        return matrix[keep][:, keep]
    factor = _cholesky(matrix[rest][:, rest], "the block that adapts")
    return matrix[keep][:, keep] - matrix[keep][:, rest] @ torch.cholesky_solve(matrix[rest][:, keep], factor)


def _cholesky(matrix: Tensor, what: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        smallest = float(torch.linalg.eigvalsh(matrix)[0])
        raise IndefiniteCurvatureError(
            f"{what} is not positive definite: its smallest eigenvalue is {smallest:.3e}; {WAYS_OUT}",
            smallest,
        )
    return factor


class Exact:
    """Dense Cholesky factorisation: exact to rounding, for a few thousand parameters.

    The dense matrix and its eigendecomposition are kept per curvature operator, so further queries,
    dampings and shifts cost a triangular solve or two products.

    Args:
        memory: budget for the dense matrices, e.g. ``"2GB"``.
    """

    def __init__(self, memory: str | int = "2GB"):
        self.memory = parse_bytes(memory)
        self._dense: weakref.WeakKeyDictionary[Operator, Tensor] = weakref.WeakKeyDictionary()
        self._spectra: weakref.WeakKeyDictionary[Operator, Spectrum] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Exact(memory={self.memory})"

    def dense(self, operator: Operator) -> Tensor:
        """The operator's matrix, made once."""
        base = operator.base if isinstance(operator, Shifted) else operator
        if base not in self._dense:
            self._dense[base] = base.dense(self.memory)
        if base is operator:
            return self._dense[base]
        return self._dense[base] + torch.diag(operator.shift.expand(base.shape[0]))

    def spectrum(self, operator: Operator) -> Spectrum:
        """Eigendecomposition, made once per curvature; a uniform shift only moves the eigenvalues."""
        base = operator.base if isinstance(operator, Shifted) and operator.shift.ndim == 0 else operator
        if base not in self._spectra:
            self._spectra[base] = Spectrum(*torch.linalg.eigh(self.dense(base)))
        spectrum = self._spectra[base]
        return spectrum if base is operator else Spectrum(spectrum.values + operator.shift, spectrum.vectors)

    def prepare(self, operator: Operator) -> "Factorised":
        """Factorise once; the result solves any number of right-hand sides.

        Raises:
            MemoryBudgetError: before any work, if the matrix exceeds the budget.
            IndefiniteCurvatureError: an eigenvalue is not positive; the message names it.
        """
        return Factorised(self, operator)


class Factorised:
    """A dense factorisation ready to solve; made by `Exact.prepare`."""

    def __init__(self, solver: Exact, operator: Operator):
        self.operator, self.matrix, self._name = operator, solver.dense(operator), repr(solver)
        self.factor = _cholesky(self.matrix, "the curvature")
        # Inverse iteration: the smallest eigenvalue for the price of a few triangular solves.
        v = (
            torch.ones_like(self.matrix[:, :1])
            + 0.1 * torch.cos(torch.arange(len(self.matrix)).to(self.matrix))[:, None]
        )
        for _ in range(30):
            v = torch.cholesky_solve(v / v.norm(), self.factor)
        v = v / v.norm()
        self.smallest = float(v.T @ self.matrix @ v)

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report."""
        check_columns(self.operator, columns)
        start = time.perf_counter()
        x = torch.cholesky_solve(columns, self.factor)
        residuals = ratio((self.matrix @ x - columns).norm(dim=0), columns.norm(dim=0))
        held = (self.matrix.numel() + self.factor.numel()) * self.matrix.element_size()
        good = residuals <= 1e-3 if x.dtype == torch.float32 else residuals <= 1e-6
        if not bool(good.all()):
            warnings.warn(
                f"{self._name}: residual {float(residuals.max()):.1e} after a direct solve: the curvature is nearly "
                f"singular (smallest eigenvalue about {self.smallest:.1e}); add damping or use float64",
                ConvergenceWarning,
                stacklevel=2,
            )
        report = SolveReport(self._name, 0, residuals, good, self.smallest, 0, held, time.perf_counter() - start)
        return x, report
