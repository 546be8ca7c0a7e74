"""Leave-one-out: the Newton step of each example's removal, its own curvature included."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..curvature.derivatives import own_products, per_example_gradients
from ..errors import ConvergenceWarning
from ..memory import require_memory, working_bytes
from ..objective.objective import Objective

SHIFT_BYTES = 512 * 10**6  # that the steps of all examples may take
ITERATIONS = 50
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}  # relative residual of a step
HELD_UP = 100.0  # times the plain step along ∇f_i; in ridge regression that is a leverage of 0.99

Solve = Callable[[Tensor], Tensor]  # columns (P, K) → H⁻¹ columns


def removal_steps(kind: str, o: Objective, full: Tensor, solve: Solve) -> Tensor:
    """Each example's Newton step of leaving it out, ``(H − h_i/m)⁻¹ ∇f_i / m``, ``(N, P)``.

    Args:
        kind: ``"hessian"`` or ``"ggn"``, of H and of the example's own ``h_i``.
        o: the stage.
        full: all its parameters ``(D,)``.
        solve: ``H⁻¹`` of many columns.

    Raises:
        MemoryBudgetError: the steps of all examples take too much memory.

    Warns:
        ConvergenceWarning: without some examples the curvature is not positive definite, or barely;
            their steps are the uncorrected ``H⁻¹ ∇f_i / m``.
    """
    size = o.size * len(o.data) * full.element_size()
    require_memory(
        size, SHIFT_BYTES, "leave_one_out=True", "leave it out, or use a smaller model or data set"
    )
    # about 24 (B, P) at once
    few = max(1, working_bytes(o.device) // (24 * o.size * full.element_size()))
    steps, failed = [], []
    for part in torch.arange(len(o.data), device=full.device).split(few):
        for rows, gradients in per_example_gradients(o, full, rows=part):
            step, good = _corrected(kind, o, full, rows, gradients / len(o.data), solve)
            steps.append(step)
            failed += o.data.ids[rows.cpu()][~good.cpu()].tolist()
    if failed:
        warnings.warn(
            f"{o.where}: without examples {failed[:10]} ({len(failed)} in all) the curvature H − "
            "h_i/m is not positive definite, or barely, so there may be no nearby minimum; their "
            "scores are not corrected. Use curvature='ggn' or more weight decay",
            ConvergenceWarning,
            stacklevel=4,
        )
    return torch.cat(steps)


def _corrected(
    kind: str, o: Objective, full: Tensor, rows: Tensor, b: Tensor, solve: Solve
) -> tuple[Tensor, Tensor]:
    """Steps ``(H − h_i/m)⁻¹ b_i`` of some examples ``(B, P)``, and which are corrected ``(B,)``."""
    x, y = o.data.x[rows], o.data.y[rows]

    def own(p: Tensor) -> Tensor:
        return own_products(kind, o, full, x, y, p) / len(o.data)

    step, plain, good = _side_by_side(own, b, solve)
    # a direction that is flat but for this example: the quadratic model fails there
    if plain is not None:
        good = good & ((b * step).sum(1) <= HELD_UP * (b * plain).sum(1))
    if not bool(good.all()):  # no nearby minimum without these: fall back on the derivative
        step[~good] = solve(b[~good].T).T
    return step, good


def _side_by_side(
    own: Callable[[Tensor], Tensor], b: Tensor, solve: Solve
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Conjugate gradients on B systems ``(H − h_i/m) x_i = b_i``, preconditioned by ``H⁻¹``.

    ``h_i`` has few directions that matter, so a handful of iterations suffice; ``H p`` follows from
    the recursion, since ``H H⁻¹ r = r``.

    Returns:
        x ``(B, P)``; ``H⁻¹ b`` (None where all b are zero); which systems were solved, ``(B,)``.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, h_p = torch.zeros_like(b), torch.zeros_like(b)
    before = b.new_full((len(b),), torch.inf)
    alive = b.norm(dim=1) > 0
    good = torch.ones(len(b), dtype=torch.bool, device=b.device)
    tolerance = TOLERANCE.get(b.dtype, TOLERANCE[torch.float32]) * b.norm(dim=1)
    first = None
    for _ in range(ITERATIONS):
        if not bool(alive.any()):
            break
        z = solve(r.T).T
        first = z if first is None else first
        square = (r * z).sum(1)
        zero = torch.zeros_like(square)
        beta = torch.where(alive, square / before, zero)[:, None]
        p = z + beta * p
        h_p = r + beta * h_p
        a_p = h_p - own(p)
        curvature = (p * a_p).sum(1)
        good &= ~alive | (curvature > 0)
        alive = alive & good
        length = torch.where(alive, square / curvature, zero)[:, None]
        x = x + length * p
        r = r - length * a_p
        before = square
        alive = alive & (r.norm(dim=1) > tolerance)
    return x, first, good & ~alive
