"""What approximate inverses share: the parts of an operator, and how an approximation answers as a
solver.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from .report import Settings, SolveReport, check_columns, relative_residuals


class Parts(NamedTuple):
    """``A = data + diag(diagonal)``: what examples contribute, and what penalty and damping add."""

    base: Operator
    ridge: Tensor | None
    diagonal: Tensor

    def data(self, vectors: Tensor) -> Tensor:
        """Products with the examples' part alone."""
        product = self.base @ vectors
        return product if self.ridge is None else product - self.ridge[:, None] * vectors


def parts(operator: Operator) -> Parts:
    """Look inside an operator for its known diagonal."""
    base, shift = operator.unshifted()
    ridge = base.ridge if isinstance(base, DataCurvature) else None
    diagonal = torch.zeros(base.shape[0], dtype=base.dtype, device=base.device)
    for known in (ridge, shift):
        diagonal = diagonal if known is None else diagonal + known
    return Parts(base, ridge, diagonal)


class Approximation:
    """A symmetric positive definite approximate inverse, made by a solver's ``prepare``.

    Attributes:
        products: operator products its making took.
        bytes: memory it holds.
    """

    products, bytes = 0, 0

    def __init__(self, solver: Settings, operator: Operator):
        self.solver, self.operator = solver, operator

    def apply(self, columns: Tensor) -> Tensor:
        """``M⁻¹ B`` for ``B`` (P, K)."""
        raise TypeError(f"{type(self).__name__} must define apply")

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``M⁻¹ B`` and a report with true residuals ``‖A x − b‖ / ‖b‖`` of ``max_iter`` columns,
        evenly spaced.

        The others are given the root mean square of those: the products for 20 exact residuals
        would cost more than the approximation itself. ``max_iter=10**6`` measures every column.
        """
        check_columns(self.operator, columns)
        start = time.perf_counter()
        x, norm = self.apply(columns), columns.norm(dim=0)
        some, most = norm > 0, self.solver.max_iter
        count = int(some.sum())
        residuals, products = torch.zeros_like(norm), min(count, most)
        if 0 < count <= most:
            residuals[some] = relative_residuals(self.operator, x[:, some], columns[:, some])
        elif count:
            measured = some.nonzero().flatten()[:: -(-count // most)]
            found = relative_residuals(self.operator, x[:, measured], columns[:, measured])
            residuals[some], products = found.square().mean().sqrt(), len(measured)
            residuals[measured] = found
        curvature = float((x * columns).sum() / (x * x).sum()) if count else float("inf")
        if self.solver.callback is not None:
            self.solver.callback(1, residuals.clone())
        way_out = "this is an approximation: refine it by ConjugateGradient(preconditioner=...)"
        report = self.solver.report(0, residuals, curvature, products, self.bytes, start, way_out)
        return x, report
