"""MINRES, minimal residuals by Lanczos: for symmetric matrices that may be indefinite."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.operators import Operator
from .report import Prepared, Settings, Solved, SolveReport, check_columns, ratio, verified

__all__ = ["MINRES"]

RITZ = 200  # how many first steps are kept to find the smallest curvature


@dataclass(frozen=True, repr=False)
class MINRES(Settings):
    """Minimal residuals: solves ``A x = b`` for symmetric A that need not be positive definite.

    An indefinite Hessian means that the point is not a minimum. The answer is then the stationary
    point of the quadratic model, not an effect of retraining. The report's ``smallest_curvature``
    says which case it was.

    Args:
        tol, max_iter, strict, callback: as in `ConjugateGradient`.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> model = msif.mlp(64, hidden=(4,), classes=10).double()
    >>> stage = msif.Stage("digits", model, train[:100], weight_decay=1e-2)
    >>> pipeline = msif.Pipeline([stage]).fit(progress=False)
    >>> indefinite = pipeline.curvature(0) + (-0.1)
    >>> b = torch.ones(indefinite.shape[0], 1, dtype=torch.float64)
    >>> x, report = msif.MINRES(tol=1e-6).solve(indefinite, b)
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
        start = time.perf_counter()
        norm = b.norm(dim=0)
        some = (norm > 0).nonzero().flatten()
        unit = b[:, some] / norm[some]
        x = torch.zeros_like(b)
        relative = (norm > 0).to(b.dtype)
        answer, r, iterations, smallest, products = self._lanczos(operator, unit, relative, some)
        x[:, some] = answer * norm[some]
        if len(some):
            true, spent = verified(operator, answer, unit, r, self.tol)
            relative[some] = true.norm(dim=0)
            products += spent
        held = 8 * b.numel() * b.element_size()
        way_out = "raise max_iter, add damping, or loosen tol"
        return x, self.report(iterations, relative, smallest, products, held, start, way_out)

    def _lanczos(self, operator: Operator, b: Tensor, relative: Tensor, places: Tensor) -> Solved:
        """Lanczos vectors v, whose tridiagonal matrix rotations (c, s) make triangular as it grows.

        ``alpha`` and ``beta`` are its new diagonal and off-diagonal entries; ``delta``, ``gamma``
        and ``far`` those of the triangular matrix, whose columns give the search directions w.
        """
        x = torch.zeros_like(b)
        residual = b.clone()
        alive = torch.arange(b.shape[1], device=b.device)
        v = r = b
        v_old = torch.zeros_like(b)
        w = torch.zeros_like(b)
        w_old = torch.zeros_like(b)
        zero = torch.zeros_like(b[0])
        c = zero - 1
        s = bar = far = beta = zero
        size = zero + 1  # of the residuals
        # Filled in place: small tensors kept from each iteration would fragment the heap between
        # large ones.
        steps = min(RITZ, self.max_iter)
        diagonal = b.new_zeros(steps, b.shape[1])
        beside = b.new_zeros(steps, b.shape[1])
        products = iterations = 0
        while len(alive) and iterations < self.max_iter:
            iterations += 1
            a_v = operator @ v
            products += len(alive)
            alpha = (v * a_v).sum(0)
            v_new = a_v - alpha * v - beta * v_old
            beta = v_new.norm(dim=0)
            if iterations <= RITZ:
                diagonal[iterations - 1, alive] = alpha
                beside[iterations - 1, alive] = beta
            delta = c * bar + s * alpha
            gamma_bar = s * bar - c * alpha
            far_old = far
            far = s * beta
            bar = -c * beta
            gamma = torch.hypot(gamma_bar, beta).clamp(min=torch.finfo(b.dtype).tiny)
            c = gamma_bar / gamma
            s = beta / gamma
            w, w_old = (v - far_old * w_old - delta * w) / gamma, w
            x[:, alive] += c * size * w
            size = s * size
            v, v_old = v_new * ratio(torch.ones_like(beta), beta), v
            r = s * s * r - size * c * v
            residual[:, alive] = r
            relative[places[alive]] = size
            if self.callback is not None:
                self.callback(iterations, relative.clone())
            keep = size > self.tol
            v, v_old, w, w_old, r = (m[:, keep] for m in (v, v_old, w, w_old, r))
            alive, c, s, bar, far, beta, size = (
                m[keep] for m in (alive, c, s, bar, far, beta, size)
            )
        smallest = _smallest_ritz(diagonal[:iterations], beside[:iterations])
        return Solved(x, residual, iterations, smallest, products)


def _smallest_ritz(diagonal: Tensor, beside: Tensor) -> float:
    """Smallest eigenvalue of the columns' tridiagonal matrices, from their first steps ``(T, K)``.

    Infinity if no step was taken.
    """
    if not diagonal.numel():
        return float("inf")
    a = diagonal.T
    e = beside.T[:, :-1]
    # Where a column has ended, the diagonal repeats its first entry, which changes no minimum.
    matrix = torch.diag_embed(a.where(a != 0, a[:, :1]))
    if a.shape[1] > 1:
        # The last off-diagonal entry of such a column leads out of its matrix.
        e = e.where(a[:, 1:] != 0, 0.0)
        matrix = matrix + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    return float(torch.linalg.eigvalsh(matrix).min())
