"""Solvers that need products only: conjugate gradients in one shared Krylov space, MINRES, LiSSA."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import DataCurvature, Operator, Shifted
from .errors import IndefiniteCurvatureError
from .solvers import WAYS_OUT, Prepared, Settings, SolveReport, check_columns, ratio, verified

__all__ = ["MINRES", "ConjugateGradient"]

ROUGH, INNER = 0.04, 10  # of solves on a share of the examples: residual times √share, and most iterations
RITZ = 200  # first steps of MINRES that tell its smallest curvature


class Solved(NamedTuple):
    """A solve of normalised columns before its report: residual vectors by recursion, and what it took."""

    x: Tensor
    residual: Tensor
    iterations: int
    smallest: float
    products: int


def _definite(smallest: float, iteration: int) -> None:
    if not smallest > 0:
        raise IndefiniteCurvatureError(
            f"conjugate gradients met curvature pᵀAp / pᵀp = {smallest:.3e} in iteration {iteration}: the matrix is "
            f"not positive definite; {WAYS_OUT}, or MINRES",
            smallest,
        )


def _basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of the columns' span, and T with ``Q = columns T``: duplicates, zeros and more columns than
    rows only shrink it.

    What is left out is below a thousandth of the columns, far less than an iteration leaves, and comes back once it is
    more. A finer sieve would spend products on the rounding in which duplicates differ.
    """
    scale = ratio(torch.ones_like(columns[0]), columns.norm(dim=0))
    q, r = torch.linalg.qr(columns * scale)
    u, s, v = torch.linalg.svd(r, full_matrices=False)
    keep = (s > 1e-3 * s[:1]) & (s > 0)
    return q @ u[:, keep], scale[:, None] * v[keep].T / s[keep]


def _directions(columns: Tensor) -> Tensor:
    return _basis(columns)[0]


class _Level:
    """Conjugate gradients on ``A_k``, the diagonal and the examples of parts 0 to k, preconditioned by level k − 1.

    Directions stay, A_k-orthonormal, for the later solves of this level: their first guess is the best in all of them.
    The level below knows its own product with what it returns, so that only part k is left to multiply.

    Args:
        part: the examples that this level adds.
        below: gives an approximate ``A⁻¹ r`` and ``A_{k−1}`` times it.
        room: most directions kept; the oldest go.
        rough: relative residual of its solves.
    """

    def __init__(self, part: DataCurvature, below: Callable, room: int, rough: float):
        self.part, self.below, self.room, self.rough = part, below, room, rough
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.columns, self.smallest = 0, float("inf")

    def widen(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """New directions P for residuals ``r`` (P, K), with ``PᵀA_kP = 1``, and their products."""
        z, product = self.below(r)
        p, turn = _basis(z)
        a_p = product @ turn + self.part @ p
        self.columns += p.shape[1]
        for d, a_d in self.kept:
            along = a_d.T @ p
            p, a_p = p - d @ along, a_p - a_d @ along
        p, turn = _basis(p)
        a_p = a_p @ turn
        values, vectors = torch.linalg.eigh(p.T @ a_p)
        self.smallest = min(self.smallest, *values.tolist())
        turn = vectors[:, values > 0] / values[values > 0].sqrt()  # what a part alone bends downwards is left out
        p, a_p = p @ turn, a_p @ turn
        self.kept.append((p, a_p))
        while sum(d.shape[1] for d, _ in self.kept) > max(self.room, p.shape[1]):
            self.kept.pop(0)
        return p, a_p

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """``x ≈ A_k⁻¹ b`` to a rough residual, and ``A_k x``."""
        x, r, goal = torch.zeros_like(b), b, self.rough * b.norm(dim=0)
        for p, a_p in self.kept:
            step = p.T @ r
            x, r = x + p @ step, r - a_p @ step
        for _ in range(INNER):
            left = r.norm(dim=0) > goal
            if not bool(left.any()):
                break
            p, a_p = self.widen(r[:, left])
            step = p.T @ r
            x, r = x + p @ step, r - a_p @ step
        return x, b - r


@dataclass(frozen=True, repr=False)
class ConjugateGradient(Settings):
    """Conjugate gradients on many right-hand sides at once; needs products only, no matrix.

    The columns search one shared Krylov space (block conjugate gradients): each column's best answer in it, so that
    20 queries need about a third of the products that 20 separate solves do. Converged columns stop adding directions.

    Args:
        tol: relative residual ``‖A x − b‖ / ‖b‖`` at which a column is done.
        max_iter: most iterations; short of ``tol`` a `ConvergenceWarning` names the residual.
        strict: raise `NotConvergedError` instead of warning.
        callback: called with ``(iteration, relative residuals (K,))`` after every iteration.
        preconditioner: an approximate inverse, `LowRank`, `EKFAC` or `Jacobi`; fewer products, the same answer.
        block: most columns that share one space, bounding memory at about ``6 P · block`` numbers. 1: every column
            has its own space and step lengths, as in the textbooks; products are still shared.
        shares: rising shares of the examples, say ``(0.08, 0.3)``, for nested solves: those that bend the loss most
            (`DataCurvature.importance`) are solved for first and roughly, which makes the directions that all
            examples are multiplied with fewer. The answer and its residual are those of all examples; it pays where
            few examples carry most of the curvature, as after training a classifier. Needs another ``8 P · block``
            numbers for each share and for all.

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

    Reference: Hestenes & Stiefel (1952); O'Leary (1980) for blocks; Martens (2010) for curvature products.
    """

    preconditioner: object = None
    block: int = 64
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")
        if not all(0 < a < b for a, b in itertools.pairwise([*self.shares, 1.0])):
            raise ValueError(f"shares={self.shares!r} must rise between 0 and 1, as (0.08, 0.3)")
        if self.preconditioner is not None and not hasattr(self.preconditioner, "prepare"):
            raise TypeError(f"preconditioner={self.preconditioner!r} must be LowRank(), EKFAC() or Jacobi()")

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


def _parts(operator: Operator, shares: tuple[float, ...]) -> tuple[Tensor, list[DataCurvature]]:
    """The known diagonal, and the examples' curvature in parts, the most important first."""
    base, shift = (operator.base, operator.shift) if isinstance(operator, Shifted) else (operator, 0.0)
    if not isinstance(base, DataCurvature):
        raise ValueError(f"{base!r} has no examples to take shares={shares} of: leave shares=()")
    diagonal = base.theta.new_zeros(base.shape[0]) + (0.0 if base.ridge is None else base.ridge) + shift
    order = base.importance().argsort(descending=True)
    ends = [math.ceil(share * len(order)) for share in (*shares, 1.0)]
    rows = [order[a:b].sort().values for a, b in itertools.pairwise([0, *ends])]
    return diagonal, [base.part(r) for r in rows]


class Preconditioned:
    """Conjugate gradients ready to solve; made by `ConjugateGradient.prepare`."""

    def __init__(self, solver: ConjugateGradient, operator: Operator, made):
        self.solver, self.operator, self.made = solver, operator, made
        self.parts = _parts(operator, solver.shares) if solver.shares else ()
        self.held = 0

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
        way, width = (self._shared, solver.block) if solver.block > 1 else (self._separate, max(1, len(some)))
        if self.parts:
            way, width = self._nested, solver.block
        for part in torch.arange(len(some), device=b.device).split(width):
            answer, left, rounds = torch.zeros_like(b[:, part]), b[:, part], 0
            residual, open_columns = left, torch.arange(len(part), device=b.device)
            while len(open_columns) and rounds < solver.max_iter:
                # A second round happens only when rounding made the recursion of the first too optimistic.
                places = some[part][open_columns]
                done = way(left[:, open_columns], solver.max_iter - rounds, rounds, relative, places)
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
        held = 6 * min(width, len(some)) * b.shape[0] * b.element_size()
        held += getattr(self.made, "bytes", 0) + self.held
        way_out = "raise max_iter, add damping, use a preconditioner, or loosen tol"
        return x, solver.report(iterations, relative, smallest, products, held, start, way_out)

    def _tell(self, iteration: int, relative: Tensor) -> None:
        if self.solver.callback is not None:
            self.solver.callback(iteration, relative.clone())

    def _shared(self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor) -> Solved:
        """One space for all columns: ``X += P (PᵀAP)⁻¹ PᵀR``, the next P made A-conjugate to this one."""
        x, r, smallest, products, iterations = torch.zeros_like(b), b, float("inf"), 0, 0
        p = _directions(self._apply(r))
        while p.shape[1] and iterations < most:
            iterations += 1
            a_p = self.operator @ p
            products += p.shape[1]
            values, vectors = torch.linalg.eigh(p.T @ a_p)  # of PᵀAP, with P orthonormal: Ritz values
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
            p = _directions(z - p @ inverse(a_p.T @ z))
        return Solved(x, r, iterations, smallest, products)

    def _nested(self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor) -> Solved:
        """As `_shared`, every level's directions conjugate to all it has kept."""
        diagonal, parts = self.parts

        def start(r):
            z = self._apply(r)
            return z, diagonal[:, None] * z

        below, levels = start, []
        for part, share in zip(parts, (*self.solver.shares, 1.0), strict=True):
            levels.append(_Level(part, below, 4 * self.solver.block, min(0.5, ROUGH / share**0.5)))
            below = levels[-1].solve
        top, x, r, iterations = levels[-1], torch.zeros_like(b), b, 0
        left = torch.ones_like(b[0], dtype=torch.bool)
        while bool(left.any()) and iterations < most:
            iterations += 1
            p, a_p = top.widen(r[:, left])
            _definite(top.smallest, before + iterations)
            step = p.T @ r
            x, r = x + p @ step, r - a_p @ step
            size = r.norm(dim=0)
            relative[places], left = size, size > self.solver.tol
            self._tell(before + iterations, relative)
        whole = sum(len(level.part.rows) * level.columns for level in levels) / len(self.parts[1][0].weights)
        kept = sum(2 * p.numel() * p.element_size() for level in levels for p, _ in level.kept)
        self.held = max(self.held, kept)
        return Solved(x, r, iterations, top.smallest, math.ceil(whole))

    def _separate(self, b: Tensor, most: int, before: int, relative: Tensor, places: Tensor) -> Solved:
        """Each column its own space; finished columns leave."""
        x, residual, alive = torch.zeros_like(b), b.clone(), torch.arange(b.shape[1], device=b.device)
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


@dataclass(frozen=True, repr=False)
class MINRES(Settings):
    """Minimal residuals: solves ``A x = b`` for symmetric A that need not be positive definite.

    An indefinite Hessian belongs to a point that is no minimum; the answer is then the stationary point of the
    quadratic model, not an effect of retraining. The report's ``smallest_curvature`` says which case it was.

    Args:
        tol, max_iter, strict, callback: as in `ConjugateGradient`.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> stage = msif.Stage("digits", msif.mlp(64, hidden=(4,), classes=10).double(), train[:100], weight_decay=1e-2)
    >>> pipeline = msif.Pipeline([stage]).fit(progress=False)
    >>> indefinite = pipeline.curvature(0) + (-0.1)
    >>> x, report = msif.MINRES(tol=1e-6).solve(indefinite, torch.ones(indefinite.shape[0], 1, dtype=torch.float64))
    >>> bool(report.converged.all()), report.smallest_curvature < 0
    (True, True)

    Reference: Paige & Saunders (1975).
    """

    def prepare(self, operator: Operator) -> Prepared:
        """Nothing to prepare: each solve starts from zero."""
        return Prepared(self, operator)

    def solve(self, operator: Operator, b: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ b`` for ``b`` (P, K), and the report.

        Raises:
            NotConvergedError: in strict mode, short of the tolerance after ``max_iter``.
        """
        check_columns(operator, b)
        start, norm = time.perf_counter(), b.norm(dim=0)
        some = (norm > 0).nonzero().flatten()
        unit = b[:, some] / norm[some]
        x, relative = torch.zeros_like(b), (norm > 0).to(b.dtype)
        answer, r, iterations, smallest, products = self._lanczos(operator, unit, relative, some)
        x[:, some] = answer * norm[some]
        if len(some):
            true, spent = verified(operator, answer, unit, r, self.tol)
            relative[some], products = true.norm(dim=0), products + spent
        held, way_out = 8 * b.numel() * b.element_size(), "raise max_iter, add damping, or loosen tol"
        return x, self.report(iterations, relative, smallest, products, held, start, way_out)

    def _lanczos(self, operator: Operator, b: Tensor, relative: Tensor, places: Tensor) -> Solved:
        """Lanczos vectors v, their tridiagonal matrix made triangular by rotations (c, s) as it grows."""
        x, residual, alive = torch.zeros_like(b), b.clone(), torch.arange(b.shape[1], device=b.device)
        v, v_old, w, w_old, r = b, torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b), b
        zero = torch.zeros_like(b[0])
        c, s, bar, far, beta, size = zero - 1, zero, zero, zero, zero, zero + 1
        # Written in place: small tensors kept from every iteration would pin the heap between large ones.
        diagonal, beside = (b.new_zeros(min(RITZ, self.max_iter), b.shape[1]) for _ in range(2))
        products = iterations = 0
        while len(alive) and iterations < self.max_iter:
            iterations += 1
            a_v = operator @ v
            products += len(alive)
            alpha = (v * a_v).sum(0)
            v_new = a_v - alpha * v - beta * v_old
            beta = v_new.norm(dim=0)
            if iterations <= RITZ:
                diagonal[iterations - 1, alive], beside[iterations - 1, alive] = alpha, beta
            delta, gamma_bar, far_old = c * bar + s * alpha, s * bar - c * alpha, far
            far, bar = s * beta, -c * beta
            gamma = torch.hypot(gamma_bar, beta).clamp(min=torch.finfo(b.dtype).tiny)
            c, s = gamma_bar / gamma, beta / gamma
            w, w_old = (v - far_old * w_old - delta * w) / gamma, w
            x[:, alive] += c * size * w
            size = s * size
            v, v_old = v_new * ratio(torch.ones_like(beta), beta), v
            r = s * s * r - size * c * v
            residual[:, alive], relative[places[alive]] = r, size
            if self.callback is not None:
                self.callback(iterations, relative.clone())
            keep = size > self.tol
            v, v_old, w, w_old, r = (m[:, keep] for m in (v, v_old, w, w_old, r))
            alive, c, s, bar, far, beta, size = (m[keep] for m in (alive, c, s, bar, far, beta, size))
        return Solved(x, residual, iterations, _smallest_ritz(diagonal[:iterations], beside[:iterations]), products)


def _smallest_ritz(diagonal: Tensor, beside: Tensor) -> float:
    """Smallest eigenvalue of the columns' tridiagonal matrices, from their first steps (T, K); inf without any."""
    if not diagonal.numel():
        return float("inf")
    a, e = diagonal.T, beside.T[:, :-1]
    matrix = torch.diag_embed(a.where(a != 0, a[:, :1]))  # after a column's end: its first Rayleigh quotient again
    if a.shape[1] > 1:
        e = e.where(a[:, 1:] != 0, 0.0)  # a finished column's last coupling leads out of its matrix
        matrix = matrix + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    return float(torch.linalg.eigvalsh(matrix).min())
