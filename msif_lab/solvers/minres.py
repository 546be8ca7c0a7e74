"""MINRES: minimal residuals, for symmetric matrices that need not be positive definite."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.operators import Operator
from .report import Prepared, Settings, Solved, SolveReport, check_columns, ratio, verified

__all__ = ["MINRES"]

RITZ = 200  # first steps of MINRES that tell its smallest curvature


@dataclass(frozen=True, repr=False)
class MINRES(Settings):
    """Minimal residuals: solves ``A x = b`` for symmetric A that need not be positive definite.

    An indefinite Hessian belongs to a point that is no minimum; the answer is then the stationary
    point of the quadratic model, not an effect of retraining. The report's ``smallest_curvature``
    says which case it was.

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
        held, way_out = (
            8 * b.numel() * b.element_size(),
            "raise max_iter, add damping, or loosen tol",
        )
        return x, self.report(iterations, relative, smallest, products, held, start, way_out)

    def _lanczos(self, operator: Operator, b: Tensor, relative: Tensor, places: Tensor) -> Solved:
        """Lanczos vectors v, their tridiagonal matrix made triangular by rotations (c, s) as it
        grows.
        """
        x, residual, alive = (
            torch.zeros_like(b),
            b.clone(),
            torch.arange(b.shape[1], device=b.device),
        )
        v, v_old, w, w_old, r = b, torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b), b
        zero = torch.zeros_like(b[0])
        c, s, bar, far, beta, size = zero - 1, zero, zero, zero, zero, zero + 1
        # Written in place: small tensors kept from every iteration would pin the heap between large
        # ones.
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
            alive, c, s, bar, far, beta, size = (
                m[keep] for m in (alive, c, s, bar, far, beta, size)
            )
        return Solved(
            x,
            residual,
            iterations,
            _smallest_ritz(diagonal[:iterations], beside[:iterations]),
            products,
        )


def _smallest_ritz(diagonal: Tensor, beside: Tensor) -> float:
    """Smallest eigenvalue of the columns' tridiagonal matrices, from their first steps (T, K); inf
    without any.
    """
    if not diagonal.numel():
        return float("inf")
    a, e = diagonal.T, beside.T[:, :-1]
    # after a column's end: its first Rayleigh quotient again
    matrix = torch.diag_embed(a.where(a != 0, a[:, :1]))
    if a.shape[1] > 1:
        e = e.where(a[:, 1:] != 0, 0.0)  # a finished column's last coupling leads out of its matrix
        matrix = matrix + torch.diag_embed(e, 1) + torch.diag_embed(e, -1)
    return float(torch.linalg.eigvalsh(matrix).min())
