"""Dense factorisations, spectra and Schur complements, for a few thousand parameters."""

import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_tensor, numbers_of, shown
from ..curvature.operators import Operator
from ..errors import ConvergenceWarning, IndefiniteCurvatureError
from ..memory import parse_bytes
from .null import NullDirections, find_null, null_range
from .report import WAYS_OUT, SolveReport, check_columns, check_operator, ratio

__all__ = ["Exact", "Spectrum", "schur_complement"]


@dataclass
class Spectrum:
    """Eigenvalues ``(P,)`` in ascending order and eigenvectors ``(P, P)`` of a symmetric matrix.

    One decomposition answers every shift: ``spectrum.apply(lambda s: 1 / (s + damping), B)``.
    """

    values: Tensor
    vectors: Tensor

    def apply(self, function: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
        """``f(A) B`` for ``B`` (P, K), f acting on the eigenvalues."""
        check_tensor("columns", columns, "(P, K)")
        if columns.ndim != 2 or len(columns) != len(self.values):
            raise ValueError(
                f"columns have shape {tuple(columns.shape)}, expected (P, K) with "
                f"P = {len(self.values)}"
            )
        return self.vectors @ (function(self.values)[:, None] * (self.vectors.T @ columns))


def schur_complement(matrix: Tensor, keep: Tensor) -> Tensor:
    """``A_kk − A_kr A_rr⁻¹ A_rk``: the curvature of the kept parameters while the rest adapts.

    Args:
        matrix: symmetric ``(P, P)`` with a positive definite rest block.
        keep: positions of the kept parameters.

    Raises:
        IndefiniteCurvatureError: the rest block is not positive definite.
    """
    check_tensor("matrix", matrix, "(P, P)")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected (P, P)")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("matrix holds NaN or inf")
    keep = _positions(keep, len(matrix)).to(matrix.device)
    rest = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
    rest[keep] = False
    if not bool(rest.any()):
        return matrix[keep][:, keep]
    factor = _cholesky(matrix[rest][:, rest], "the block that adapts")
    response = torch.cholesky_solve(matrix[rest][:, keep], factor)
    return matrix[keep][:, keep] - matrix[keep][:, rest] @ response


def _positions(keep, size: int) -> Tensor:
    """Different positions below ``size``, from a list of them or from a mask."""
    what = f"different positions from 0 to {size - 1}, or a mask ({size},)"
    places = numbers_of("keep", keep, what)
    if places.dtype == torch.bool and places.shape == (size,):
        places = places.nonzero().flatten()
    whole = places.ndim == 1 and len(places) and not places.is_floating_point()
    if not whole or places.dtype == torch.bool:
        raise ValueError(f"keep={shown(keep)} must be {what}")
    inside = -size <= int(places.min()) and int(places.max()) < size
    if not inside or len((places % size).unique()) != len(places):
        raise ValueError(f"keep={shown(keep)} must be {what}")
    return places.long()


def _cholesky(matrix: Tensor, what: str) -> Tensor:
    """The lower Cholesky factor; ``what`` is how the message names the matrix."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        smallest = float(torch.linalg.eigvalsh(matrix)[0])
        raise IndefiniteCurvatureError(
            f"{what} is not positive definite: its smallest eigenvalue is {smallest:.3e}; "
            f"{WAYS_OUT}",
            smallest,
        )
    return factor


class Exact:
    """Dense Cholesky factorisation: exact up to rounding, for a few thousand parameters.

    The dense matrix and its eigendecomposition are kept for each curvature operator, so further
    queries, dampings and shifts cost a triangular solve or two products.

    A minimum may be flat along a symmetry, as that of a low-rank layer ``B A`` is. Such null
    directions are named in a `SymmetryWarning` and left out: the answer is that on the rest, which
    is right for every question without a part along them. Another one is refused.

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
        base, shift = operator.unshifted()
        if base not in self._dense:
            self._dense[base] = base.dense(self.memory)
        if base is operator:
            return self._dense[base]
        return self._dense[base] + torch.diag(shift.expand(base.shape[0]))

    def spectrum(self, operator: Operator) -> Spectrum:
        """The eigendecomposition, made once per curvature.

        A uniform shift only moves the eigenvalues, so all uniform shifts share one decomposition.
        """
        base, shift = operator.unshifted()
        if base is not operator and shift.ndim:  # not uniform: the eigenvectors change too
            base = operator
        if base not in self._spectra:
            self._spectra[base] = Spectrum(*torch.linalg.eigh(self.dense(base)))
        spectrum = self._spectra[base]
        return spectrum if base is operator else Spectrum(spectrum.values + shift, spectrum.vectors)

    def prepare(self, operator: Operator) -> "Factorised":
        """Factorise once; the result solves any number of right-hand sides.

        Raises:
            MemoryBudgetError: before any work, if the matrix exceeds the budget.
            IndefiniteCurvatureError: an eigenvalue is not positive; the message names it.

        Warns:
            SymmetryWarning: it has null directions, in which no example's gradient has a part.
        """
        check_operator(operator)
        return Factorised(self, operator)


def as_solver(solver):
    """A solver as attributors take it; `Exact` for None.

    Raises:
        TypeError: it is none, or a class of them.
    """
    if solver is None:
        return Exact()
    if not hasattr(solver, "prepare") or isinstance(solver, type):
        raise TypeError(
            f"solver={shown(solver)} must be a solver object, such as Exact() or "
            "ConjugateGradient(); ImplicitInfluence also takes 'auto'"
        )
    return solver


class Factorised:
    """A dense factorisation ready to solve; made by `Exact.prepare`.

    Attributes:
        matrix: the curvature ``(P, P)``.
        smallest: its smallest eigenvalue, null directions left out.
        null: its null directions, or None.
    """

    def __init__(self, solver: Exact, operator: Operator):
        self.operator = operator
        self._name = repr(solver)
        self.matrix = solver.dense(operator)
        self.null: NullDirections | None = None
        self.factor, failed = torch.linalg.cholesky_ex(self.matrix)
        self.definite = not bool(failed)
        self.smallest = self._inverse_iteration() if self.definite else float("-inf")
        if self.smallest <= null_range(operator, float(self.matrix.norm()))[1]:
            spectrum = solver.spectrum(operator)
            self.null = find_null(operator, spectrum.values, spectrum.vectors)
        if self.null is not None:
            lifted = self.matrix + self.null.largest * (self.null.vectors @ self.null.vectors.T)
            self.lifted = _cholesky(lifted, "the curvature without its null directions")
        elif not self.definite:
            _cholesky(self.matrix, "the curvature")  # raises, with the smallest eigenvalue

    def _inverse_iteration(self) -> float:
        """The smallest eigenvalue, at the cost of a few triangular solves."""
        # The cosine keeps the start from being orthogonal to an eigenvector that sums to zero.
        ripple = torch.cos(torch.arange(len(self.matrix)).to(self.matrix))[:, None]
        v = torch.ones_like(self.matrix[:, :1]) + 0.1 * ripple
        for _ in range(30):
            v = torch.cholesky_solve(v / v.norm(), self.factor)
        v = v / v.norm()
        return float(v.T @ self.matrix @ v)

    def _solve(self, columns: Tensor) -> tuple[Tensor, NullDirections | None]:
        """``A⁻¹ B``, and the null directions if they were left out.

        Raises:
            IndefiniteCurvatureError: a column has a part along them, so they are no symmetry for
                it.
        """
        if self.null is None:
            return torch.cholesky_solve(columns, self.factor), None
        share = float(self.null.share(columns).max()) if columns.shape[1] else 0.0
        if share > self.null.tolerance:
            self.null.refuse(share)
        x = torch.cholesky_solve(self.null.without(columns), self.lifted)
        return self.null.without(x), self.null

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report.

        Raises:
            IndefiniteCurvatureError: the matrix has null directions and B a part along them.
        """
        check_columns(self.operator, columns)
        start = time.perf_counter()
        x, null = self._solve(columns)
        left = self.matrix @ x - (columns if null is None else null.without(columns))
        residuals = ratio(left.norm(dim=0), columns.norm(dim=0))
        held = (self.matrix.numel() + self.factor.numel()) * self.matrix.element_size()
        smallest = self.smallest if null is None else null.gap
        good = residuals <= 1e-3 if x.dtype == torch.float32 else residuals <= 1e-6
        if not bool(good.all()):
            warnings.warn(
                f"{self._name}: residual {float(residuals.max()):.1e} after a direct solve: "
                "the curvature is nearly singular "
                f"(smallest eigenvalue about {smallest:.1e}); add damping or use float64",
                ConvergenceWarning,
                stacklevel=2,
            )
        seconds = time.perf_counter() - start
        left_out = 0 if null is None else len(null.values)
        report = SolveReport(self._name, 0, residuals, good, smallest, 0, held, seconds, left_out)
        return x, report
