"""What the approximate inverses share: an operator's parts, and `Approximation` as a solver."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from .report import Settings, SolveReport, check_columns, check_operator, relative_residuals


class Parts(NamedTuple):
    """``A = data + diag(diagonal)``: the examples' part, and the sum of penalty and damping.

    Attributes:
        base: the operator without damping.
        ridge: the part of ``diagonal`` that ``base`` contains, ``(P,)``; None without a penalty.
        diagonal: penalty and damping ``(P,)``.
    """

    base: Operator
    ridge: Tensor | None
    diagonal: Tensor

    def data(self, vectors: Tensor) -> Tensor:
        """Products of the examples' part alone with ``vectors`` (P, K)."""
        product = self.base @ vectors
        return product if self.ridge is None else product - self.ridge[:, None] * vectors


def parts(operator: Operator) -> Parts:
    """Split an operator into what comes from the examples and its known diagonal."""
    check_operator(operator)
    base, shift = operator.unshifted()
    ridge = base.ridge if isinstance(base, DataCurvature) else None
    diagonal = torch.zeros(base.shape[0], dtype=base.dtype, device=base.device)
    for known in (ridge, shift):
        diagonal = diagonal if known is None else diagonal + known
    return Parts(base, ridge, diagonal)


class Approximation:
    """A symmetric positive definite approximate inverse, made by a solver's ``prepare``.

    Attributes:
        products: how many operator products making it took.
        bytes: memory it holds.
    """

    products = 0
    bytes = 0

    def __init__(self, solver: Settings, operator: Operator):
        self.solver = solver
        self.operator = operator

    def apply(self, columns: Tensor) -> Tensor:
        """``M⁻¹ B`` for ``B`` (P, K)."""
        raise TypeError(f"{type(self).__name__} must define apply")

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``M⁻¹ B`` for ``B`` (P, K), and a report with the true residuals of some columns.

        ``‖A x − b‖ / ‖b‖`` is measured for ``max_iter`` evenly spaced columns; the others are given
        the root mean square of these, since the products for 20 exact residuals would cost more
        than the approximation itself. ``max_iter=10**6`` measures every column.
        """
        check_columns(self.operator, columns)
        start = time.perf_counter()
        x = self.apply(columns)
        norm = columns.norm(dim=0)
        some = norm > 0
        count = int(some.sum())
        most = self.solver.max_iter
        residuals = torch.zeros_like(norm)
        products = min(count, most)
        if 0 < count <= most:
            residuals[some] = relative_residuals(self.operator, x[:, some], columns[:, some])
        elif count:
            measured = some.nonzero().flatten()[:: -(-count // most)]
            found = relative_residuals(self.operator, x[:, measured], columns[:, measured])
            residuals[some] = found.square().mean().sqrt()
            residuals[measured] = found
            products = len(measured)
        curvature = float((x * columns).sum() / (x * x).sum()) if count else float("inf")
        if self.solver.callback is not None:
            self.solver.callback(1, residuals.clone())
        way_out = "this is an approximation: refine it by ConjugateGradient(preconditioner=...)"
        report = self.solver.report(0, residuals, curvature, products, self.bytes, start, way_out)
        return x, report
