"""Conjugate gradients on many right-hand sides, in one shared Krylov space or one for each."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_whole, shown
from ..curvature.operators import Operator
from ..errors import IndefiniteCurvatureError
from .nested import KEPT, basis, check_shares, levels, split
from .null import null_range
from .report import (
    WAYS_OUT,
    Settings,
    Solved,
    SolveReport,
    check_columns,
    check_operator,
    verified,
)

__all__ = ["ConjugateGradient"]


SOLVED = 1e-3  # relative residual above which a negative curvature is no null direction's


def _refuse(smallest: float, iteration: int) -> None:
    raise IndefiniteCurvatureError(
        f"conjugate gradients met curvature pᵀAp / pᵀp = {smallest:.3e} in iteration "
        f"{iteration}: the matrix is not positive definite; {WAYS_OUT}, or MINRES",
        smallest,
    )


def _null_level(operator: Operator, smallest: float, largest: float, iteration: int) -> float:
    """The curvature up to which a direction is null and no step is taken along it (see `null`).

    Rounding brings such directions in once the rest is solved. Positive curvature above rounding
    may be an example's own, so steps are taken along it, small as it is.

    Raises:
        IndefiniteCurvatureError: the smallest curvature met is more negative than that.
    """
    low, high = null_range(operator, largest, dense=False)
    if not smallest >= low:
        _refuse(smallest, iteration)
    return min(high, 10 * torch.finfo(operator.dtype).eps * largest)


@dataclass(frozen=True, repr=False)
class ConjugateGradient(Settings):
    """Conjugate gradients on many right-hand sides at once; needs products only, no matrix.

    The columns share one Krylov space (block conjugate gradients), and each takes its best answer
    in it; so 20 queries need about a third of the products of 20 separate solves. Converged columns
    stop adding directions.

    Args:
        tol: relative residual ``‖A x − b‖ / ‖b‖`` at which a column is done.
        max_iter: most iterations; if they miss ``tol``, a `ConvergenceWarning` names the residual.
        strict: raise `NotConvergedError` instead of warning.
        callback: called with ``(iteration, relative residuals (K,))`` after every iteration.
        preconditioner: an approximate inverse, `LowRank`, `EKFAC` or `Jacobi`: fewer products for
            the same answer.
        block: most columns that share one space, which takes about ``6 P · block`` numbers of
            memory. With 1, every column has its own space and step lengths, as in textbooks, and
            products are still computed together.
        shares: rising shares of the examples, say ``(0.08, 0.3)``. Systems of the examples that
            matter most are then solved first, roughly, so that fewer products with all examples are
            needed (see the module `nested`). The answer and its residual are
            those for all examples. It pays where few examples dominate the Hessian, as after
            training a classifier; it takes another ``16 P · block`` numbers of memory for each
            share, and once more for the whole.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, weight_decay=1e-2)
    >>> pipeline = msif.Pipeline([stage]).fit(progress=False)
    >>> solver = msif.ConjugateGradient(tol=1e-3, preconditioner=msif.Jacobi())
    >>> attributor = msif.ImplicitInfluence(solver, curvature="ggn", damping=1e-2).fit(pipeline)
    >>> attributor.score(test[:5]).values.shape
    torch.Size([5, 1201])
    >>> bool(attributor.report_["digits"].converged.all())
    True

    Reference: Hestenes & Stiefel (1952); O'Leary (1980) for blocks; Martens (2010) for curvature
    products.
    """

    preconditioner: object = None
    block: int = 64
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_whole("block", self.block)
        check_shares(self.shares)
        made = hasattr(self.preconditioner, "prepare") and not isinstance(self.preconditioner, type)
        if self.preconditioner is not None and not made:
            raise TypeError(
                f"preconditioner={shown(self.preconditioner)} must be LowRank(), EKFAC() or "
                "Jacobi()"
            )

    @property
    def vectors(self) -> int:
        """How many vectors a solve holds for each right-hand side."""
        kept = 2 * KEPT * (len(self.shares) + 1) if self.shares else 0
        return 6 + kept

    def prepare(self, operator: Operator) -> "Preconditioned":
        """Make the preconditioner, once for all solves."""
        check_operator(operator, dense=True)
        made = None if self.preconditioner is None else self.preconditioner.prepare(operator)
        return Preconditioned(self, operator, made)

    def solve(self, operator: Operator, b: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ b`` for a positive definite operator and ``b`` (P, K), and the report.

        Raises:
            IndefiniteCurvatureError: a direction with ``pᵀAp ≤ 0`` was met; no number is returned.
            NotConvergedError: in strict mode, short of the tolerance after ``max_iter``.
        """
        return self.prepare(operator).solve(b)


class Preconditioned:
    """Conjugate gradients ready to solve; made by `ConjugateGradient.prepare`."""

    def __init__(self, solver: ConjugateGradient, operator: Operator, made):
        self.solver = solver
        self.operator = operator
        self.made = made
        self.parts = split(operator, solver.shares) if solver.shares else None

    def _apply(self, columns: Tensor) -> Tensor:
        return columns if self.made is None else self.made.apply(columns)

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report."""
        check_columns(self.operator, columns)
        start = time.perf_counter()
        solver = self.solver
        norm = columns.norm(dim=0)
        some = (norm > 0).nonzero().flatten()
        b = columns[:, some] / norm[some]
        x = torch.zeros_like(columns)
        relative = (norm > 0).to(norm.dtype)
        iterations = products = 0
        smallest = float("inf")
        width = solver.block
        if self.parts is not None:
            way = self._nested
        elif solver.block > 1:
            way = self._shared
        else:
            way = self._separate
            width = max(1, len(some))
        for part in torch.arange(len(some), device=b.device).split(width):
            places = some[part]
            done = self._refined(way, b[:, part], relative, places)
            x[:, places] = done.x * norm[places]
            relative[places] = done.residual.norm(dim=0)
            iterations = max(iterations, done.iterations)
            smallest = min(smallest, done.smallest)
            products += done.products
        held = solver.vectors * min(width, len(some)) * b.shape[0] * b.element_size()
        held += getattr(self.made, "bytes", 0)
        way_out = "raise max_iter, add damping, use a preconditioner, or loosen tol"
        return x, solver.report(iterations, relative, smallest, products, held, start, way_out)

    def _refined(self, way: Callable, b: Tensor, relative: Tensor, places: Tensor) -> Solved:
        """Solve one block of columns until its true residuals are small, or stop falling.

        Args:
            way: one of the three methods below.
            b: normalised right-hand sides ``(P, K)``.
            relative: relative residuals of all columns, for the callback; kept up to date.
            places: where the columns of ``b`` lie in ``relative``.
        """
        solver = self.solver
        x = torch.zeros_like(b)
        left = residual = b
        open_columns = torch.arange(b.shape[1], device=b.device)
        iterations = products = 0
        smallest = float("inf")
        # A second round is needed only if rounding made the first one's recursion too optimistic.
        while len(open_columns) and iterations < solver.max_iter:
            most = solver.max_iter - iterations
            done = way(left[:, open_columns], most, iterations, relative, places[open_columns])
            x[:, open_columns] += done.x
            iterations += done.iterations
            smallest = min(smallest, done.smallest)
            left = left.index_copy(1, open_columns, done.residual)
            before = residual.norm(dim=0)
            residual, spent = verified(self.operator, x, b, left, solver.tol)
            left = residual
            products += done.products + spent
            falling = residual.norm(dim=0) <= before / 2
            open_columns = ((residual.norm(dim=0) > solver.tol) & falling).nonzero().flatten()
        if not smallest > 0 and float(residual.norm(dim=0).max()) > max(SOLVED, solver.tol):
            _refuse(smallest, iterations)  # not met by rounding: b has a part there
        return Solved(x, residual, iterations, smallest, products)

    def _tell(self, iteration: int, relative: Tensor) -> None:
        if self.solver.callback is not None:
            self.solver.callback(iteration, relative.clone())

    # The three ways to solve. Each takes normalised columns, how many iterations are left, how many
    # were taken before, and the relative residuals of all columns with the places of these.

    def _shared(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """One space for all columns: ``X += P (PᵀAP)⁻¹ PᵀR``, each P A-conjugate to the last."""
        x = torch.zeros_like(b)
        r = b
        iterations = products = 0
        smallest, largest = float("inf"), 0.0
        p, _ = basis(self._apply(r))
        while p.shape[1] and iterations < most:
            iterations += 1
            a_p = self.operator @ p
            products += p.shape[1]
            values, vectors = torch.linalg.eigh(p.T @ a_p)  # P is orthonormal: Ritz values
            smallest, largest = min(smallest, float(values[0])), max(largest, float(values[-1]))
            level = _null_level(self.operator, smallest, largest, before + iterations)
            shares = torch.where(values > level, 1 / values, 0.0)[:, None]

            def inverse(m, shares=shares, vectors=vectors):
                return vectors @ (shares * (vectors.T @ m))

            step = inverse(p.T @ r)
            x = x + p @ step
            r = r - a_p @ step
            size = r.norm(dim=0)
            relative[places] = size
            self._tell(before + iterations, relative)
            z = self._apply(r[:, size > self.solver.tol])
            if not z.shape[1] or float(values[0]) <= level:  # rounding has come in: `_refined`
                break
            p, _ = basis(z - p @ inverse(a_p.T @ z))
        return Solved(x, r, iterations, smallest, products)

    def _nested(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """One space for all columns, preconditioned by rough solves on shares (`nested`)."""
        made = levels(self.parts, self.solver.shares, getattr(self.made, "apply", None), b.shape[1])
        top = made[-1]
        x = torch.zeros_like(b)
        r = b.clone()
        iterations = 0
        left = torch.ones_like(b[0], dtype=torch.bool)
        while bool(left.any()) and iterations < most:
            iterations += 1
            p, a_p = top.widen(r[:, left])
            _null_level(self.operator, top.smallest, top.largest, before + iterations)
            if not p.shape[1]:
                break
            step = p.T @ r
            x = x.addmm_(p, step)
            r = r.addmm_(a_p, step, alpha=-1)
            size = r.norm(dim=0)
            relative[places] = size
            left = size > self.solver.tol
            self._tell(before + iterations, relative)
        products = math.ceil(sum(level.products for level in made))
        return Solved(x, r, iterations, top.smallest, products)

    def _separate(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """A space for each column, as in textbooks; converged columns are dropped."""
        x = torch.zeros_like(b)
        residual = b.clone()
        alive = torch.arange(b.shape[1], device=b.device)
        iterations = products = 0
        smallest, largest = float("inf"), 0.0
        r = b
        p = z = self._apply(r)
        product = (r * z).sum(0)
        while len(alive) and iterations < most:
            iterations += 1
            a_p = self.operator @ p
            products += len(alive)
            curvature = (p * a_p).sum(0)
            bend = curvature / (p * p).sum(0)
            smallest, largest = min(smallest, float(bend.min())), max(largest, float(bend.max()))
            bent = bend > _null_level(self.operator, smallest, largest, before + iterations)
            step = torch.where(bent, product / curvature, 0.0)
            x[:, alive] += step * p
            r = r - step * a_p
            residual[:, alive] = r
            size = r.norm(dim=0)
            relative[places[alive]] = size
            self._tell(before + iterations, relative)
            keep = (size > self.solver.tol) & bent
            alive = alive[keep]
            r = r[:, keep]
            p = p[:, keep]
            z = self._apply(r)
            new = (r * z).sum(0)
            p = z + new / product[keep] * p
            product = new
        return Solved(x, residual, iterations, smallest, products)
