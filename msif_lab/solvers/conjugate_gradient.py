"""Conjugate gradients on many right-hand sides, from curvature products only."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.operators import Operator
from ..errors import IndefiniteCurvatureError
from .nested import KEPT, basis, check_shares, levels, split
from .report import WAYS_OUT, Settings, Solved, SolveReport, check_columns, verified

__all__ = ["ConjugateGradient"]


def _definite(smallest: float, iteration: int) -> None:
    if not smallest > 0:
        raise IndefiniteCurvatureError(
            f"conjugate gradients met curvature pᵀAp / pᵀp = {smallest:.3e} in iteration "
            f"{iteration}: the matrix is not positive definite; {WAYS_OUT}, or MINRES",
            smallest,
        )


@dataclass(frozen=True, repr=False)
class ConjugateGradient(Settings):
    """Conjugate gradients on many right-hand sides at once; needs products only, no matrix.

    The columns search one shared Krylov space (block conjugate gradients): each column's best
    answer in it, so that 20 queries need about a third of the products that 20 separate solves do.
    Converged columns stop adding directions.

    Args:
        tol: relative residual ``‖A x − b‖ / ‖b‖`` at which a column is done.
        max_iter: most iterations; short of ``tol`` a `ConvergenceWarning` names the residual.
        strict: raise `NotConvergedError` instead of warning.
        callback: called with ``(iteration, relative residuals (K,))`` after every iteration.
        preconditioner: an approximate inverse, `LowRank`, `EKFAC` or `Jacobi`; fewer products, the
            same answer.
        block: most columns that share one space, bounding memory at about ``6 P · block`` numbers.
            1: every column has its own space and step lengths, as in the textbooks; products are
            still shared.
        shares: rising shares of the examples, say ``(0.08, 0.3)``: systems of those that matter
            most are solved first, roughly, so that fewer directions meet all examples (`nested`).
            The answer and its residual are those of all. It pays where few examples carry the
            Hessian, as after training a classifier; with ``block`` columns it takes another
            ``16 P · block`` numbers for each share and for all.

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
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")
        check_shares(self.shares)
        if self.preconditioner is not None and not hasattr(self.preconditioner, "prepare"):
            raise TypeError(
                f"preconditioner={self.preconditioner!r} must be LowRank(), EKFAC() or Jacobi()"
            )

    @property
    def vectors(self) -> int:
        """How many vectors a solve holds for each right-hand side."""
        return 6 + (2 * KEPT * (len(self.shares) + 1) if self.shares else 0)

    def prepare(self, operator: Operator) -> "Preconditioned":
        """Make the preconditioner, once for all solves."""
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
        self.solver, self.operator, self.made = solver, operator, made
        self.parts = split(operator, solver.shares) if solver.shares else None

    def _apply(self, columns: Tensor) -> Tensor:
        return columns if self.made is None else self.made.apply(columns)

    def solve(self, columns: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ B`` for ``B`` (P, K), and the report."""
        check_columns(self.operator, columns)
        start, solver = time.perf_counter(), self.solver
        norm = columns.norm(dim=0)
        some = (norm > 0).nonzero().flatten()
        b = columns[:, some] / norm[some]
        x, relative = torch.zeros_like(columns), (norm > 0).to(norm.dtype)
        iterations, smallest, products = 0, float("inf"), 0
        way, width = (
            (self._shared, solver.block)
            if solver.block > 1
            else (self._separate, max(1, len(some)))
        )
        if self.parts is not None:
            way, width = self._nested, solver.block
        for part in torch.arange(len(some), device=b.device).split(width):
            answer, left, rounds = torch.zeros_like(b[:, part]), b[:, part], 0
            residual, open_columns = left, torch.arange(len(part), device=b.device)
            while len(open_columns) and rounds < solver.max_iter:
                # A second round happens only when rounding made the recursion of the first too
                # optimistic.
                places = some[part][open_columns]
                done = way(
                    left[:, open_columns], solver.max_iter - rounds, rounds, relative, places
                )
                answer[:, open_columns] += done.x
                rounds, products = rounds + done.iterations, products + done.products
                smallest = min(smallest, done.smallest)
                left = left.index_copy(1, open_columns, done.residual)
                before = residual.norm(dim=0)
                residual, spent = verified(self.operator, answer, b[:, part], left, solver.tol)
                left, products = residual, products + spent
                falling = residual.norm(dim=0) <= before / 2
                open_columns = ((residual.norm(dim=0) > solver.tol) & falling).nonzero().flatten()
            x[:, some[part]] = answer * norm[some[part]]
            relative[some[part]] = residual.norm(dim=0)
            iterations = max(iterations, rounds)
        held = solver.vectors * min(width, len(some)) * b.shape[0] * b.element_size()
        held += getattr(self.made, "bytes", 0)
        way_out = "raise max_iter, add damping, use a preconditioner, or loosen tol"
        return x, solver.report(iterations, relative, smallest, products, held, start, way_out)

    def _tell(self, iteration: int, relative: Tensor) -> None:
        if self.solver.callback is not None:
            self.solver.callback(iteration, relative.clone())

    def _shared(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """One space for all columns: ``X += P (PᵀAP)⁻¹ PᵀR``, the next P made A-conjugate to this
        one.
        """
        x, r, smallest, products, iterations = torch.zeros_like(b), b, float("inf"), 0, 0
        p = basis(self._apply(r))[0]
        while p.shape[1] and iterations < most:
            iterations += 1
            a_p = self.operator @ p
            products += p.shape[1]
            # of PᵀAP, with P orthonormal: Ritz values
            values, vectors = torch.linalg.eigh(p.T @ a_p)
            smallest = min(smallest, float(values[0]))
            _definite(smallest, before + iterations)

            def inverse(m, values=values, vectors=vectors):
                return vectors @ ((vectors.T @ m) / values[:, None])

            step = inverse(p.T @ r)
            x, r = x + p @ step, r - a_p @ step
            size = r.norm(dim=0)
            relative[places] = size
            self._tell(before + iterations, relative)
            z = self._apply(r[:, size > self.solver.tol])
            if not z.shape[1]:
                break
            p, _ = basis(z - p @ inverse(a_p.T @ z))
        return Solved(x, r, iterations, smallest, products)

    def _nested(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """As `_shared`, with rough solves on shares of the examples as preconditioners, see
        `nested`.
        """
        made = levels(self.parts, self.solver.shares, getattr(self.made, "apply", None), b.shape[1])
        top, x, r, iterations = made[-1], torch.zeros_like(b), b.clone(), 0
        left = torch.ones_like(b[0], dtype=torch.bool)
        while bool(left.any()) and iterations < most:
            iterations += 1
            p, a_p = top.widen(r[:, left])
            _definite(top.smallest, before + iterations)
            if not p.shape[1]:
                break
            step = p.T @ r
            x, r = x.addmm_(p, step), r.addmm_(a_p, step, alpha=-1)
            size = r.norm(dim=0)
            relative[places], left = size, size > self.solver.tol
            self._tell(before + iterations, relative)
        return Solved(
            x, r, iterations, top.smallest, math.ceil(sum(level.products for level in made))
        )

    def _separate(
        self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor
    ) -> Solved:
        """Each column its own space; finished columns leave."""
        x, residual, alive = (
            torch.zeros_like(b),
            b.clone(),
            torch.arange(b.shape[1], device=b.device),
        )
        r, smallest, products, iterations = b, float("inf"), 0, 0
        p = z = self._apply(r)
        product = (r * z).sum(0)
        while len(alive) and iterations < most:
            iterations += 1
            a_p = self.operator @ p
            products += len(alive)
            curvature = (p * a_p).sum(0)
            smallest = min(smallest, float((curvature / (p * p).sum(0)).min()))
            _definite(smallest, before + iterations)
            step = product / curvature
            x[:, alive] += step * p
            r = r - step * a_p
            residual[:, alive] = r
            size = r.norm(dim=0)
            relative[places[alive]] = size
            self._tell(before + iterations, relative)
            keep = size > self.solver.tol
            alive, r, p, product = alive[keep], r[:, keep], p[:, keep], product[keep]
            z = self._apply(r)
            new = (r * z).sum(0)
            p, product = z + new / product * p, new
        return Solved(x, residual, iterations, smallest, products)
