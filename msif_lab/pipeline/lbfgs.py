"""Full-batch training to a stationary point, as the implicit function theorem requires."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.matrices import Hessian
from ..curvature.soundness import missing_second_derivative
from ..objective.objective import Lanes
from .recipes import (
    FitReport,
    check_finite,
    keep_number,
    keep_whole,
    noise_floor,
    progress_bar,
)

__all__ = ["LBFGS"]


@dataclass(frozen=True)
class LBFGS:
    """Full-batch L-BFGS with a strong-Wolfe line search and a Newton polish.

    Implicit influence differentiates an optimum, so training has to reach one: L-BFGS goes to
    gradient norm ``tol``; in stages of up to ``polish_up_to`` parameters Newton's method takes over
    as soon as each of its steps halves the gradient, and goes on down to rounding. All lanes move
    together; finished ones drop out.

    Args:
        tol: gradient norm ``‖∇F‖`` that counts as converged; default 1e-8 in float64, 1e-5 in
            float32.
        max_iter: most L-BFGS iterations.
        history: pairs kept for the inverse Hessian.
        polish_up_to: largest P for which a dense Hessian is formed; 0 turns the polish off.

    Reference: Nocedal & Wright, Numerical Optimization, algorithms 3.5, 3.6, 7.4.
    """

    tol: float | None = None
    max_iter: int = 5000
    history: int = 20
    polish_up_to: int = 2000

    def __post_init__(self):
        if self.tol is not None:
            keep_number(self, "tol", lambda tol: 0 < tol < math.inf, "positive, or None")
        keep_whole(self, max_iter=1, history=1, polish_up_to=0)

    def run(self, lanes: Lanes, theta: Tensor, progress: bool = True) -> tuple[Tensor, FitReport]:
        """Minimise F from ``theta`` (R, P); returns the minimisers and their report."""
        start = time.perf_counter()
        tol = self.tol or (1e-8 if theta.dtype == torch.float64 else 1e-5)
        polish = theta.shape[1] <= self.polish_up_to
        levels = [level for level in (1e-3, 1e-4, 1e-5, 1e-6) if polish and level > tol]
        iterations = 0
        for level in (*levels, tol):
            most = max(1, self.max_iter - iterations)
            theta, steps = self._descend(lanes, theta, level, most, progress)
            iterations += steps
            if polish:
                theta, steps = _polish(lanes, theta)
                iterations += steps
        value, gradient = lanes.value_and_grad(theta)
        norm = gradient.norm(dim=1)
        # In float32 rounding alone can exceed tol; a gradient at that floor counts as converged.
        converged = norm <= torch.maximum(norm.new_tensor(tol), noise_floor(lanes, theta))
        seconds = time.perf_counter() - start
        return theta, FitReport(str(self), iterations, value, norm, converged, seconds)

    def _descend(
        self, lanes: Lanes, theta: Tensor, tol: float, most: int, progress: bool
    ) -> tuple[Tensor, int]:
        """L-BFGS from ``theta`` to gradient norm ``tol``, or until rounding hides all progress."""
        result = theta.clone()
        alive = torch.arange(len(theta), device=theta.device)
        value, gradient = lanes.value_and_grad(theta)
        check_finite(value, gradient, 0, "check the starting weights and the loss")
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        smallest = gradient.norm(dim=1)
        stalled = torch.zeros_like(value)  # iterations without any progress
        with progress_bar(most, "L-BFGS", progress) as bar:
            for iteration in range(most):
                keep = (gradient.norm(dim=1) > tol) & (stalled < 30)
                if not bool(keep.all()):  # finished lanes leave
                    result[alive[~keep]] = theta[~keep]
                    lanes = lanes.select(keep)
                    alive, theta, value, gradient, smallest, stalled = (
                        t[keep] for t in (alive, theta, value, gradient, smallest, stalled)
                    )
                    pairs = [tuple(t[keep] for t in pair) for pair in pairs]
                    if not len(alive):
                        return result, iteration
                direction = _two_loop(gradient, pairs)
                slope = (direction * gradient).sum(1)
                uphill = slope >= 0  # rounding only; those lanes restart from steepest descent
                direction = torch.where(uphill[:, None], -gradient, direction)
                step = torch.ones_like(value)
                if not pairs:
                    step = 1 / gradient.norm(dim=1).clamp(min=1)
                new, new_value, new_gradient, moved = strong_wolfe(
                    lanes, theta, value, gradient, direction, step
                )
                advice = "the objective is unbounded or not smooth here"
                check_finite(new_value, new_gradient, iteration, advice)
                pairs = [*pairs, _pair(new - theta, new_gradient - gradient)][-self.history :]
                lower = value - new_value > 4 * torch.finfo(value.dtype).eps * value.abs()
                smaller = new_gradient.norm(dim=1) < 0.9 * smallest
                stalled = torch.where(moved & (lower | smaller), 0.0, stalled + 1)
                smallest = torch.minimum(smallest, new_gradient.norm(dim=1))
                theta, value, gradient = new, new_value, new_gradient
                bar.update()
                largest = float(gradient.norm(dim=1).max())
                bar.set_postfix_str(f"{len(alive)} running, ‖∇F‖ {largest:.1e}", refresh=False)
        result[alive] = theta
        return result, iteration + 1


def _pair(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step, its change of gradient, and ``rho = 1 / sᵀy``, 0 without positive curvature."""
    curvature = (s * y).sum(1)
    good = curvature > 1e-10 * s.norm(dim=1) * y.norm(dim=1)
    rho = torch.where(good, 1 / curvature.where(good, torch.ones_like(curvature)), 0.0)
    return s, y, rho


def _two_loop(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """``−H⁻¹∇F`` of each lane from its last steps; pairs with rho 0 drop out."""
    q, factors = gradient.clone(), []
    for s, y, rho in reversed(pairs):
        a = rho * (s * q).sum(1)
        q = q - a[:, None] * y
        factors.append(a)
    scale = torch.ones_like(gradient[:, :1])
    for _, y, rho in pairs:  # γ = sᵀy / yᵀy of each lane's newest valid pair
        scale = torch.where(rho[:, None] > 0, 1 / (rho * (y * y).sum(1))[:, None], scale)
    q = scale * q
    for (s, y, rho), a in zip(pairs, reversed(factors), strict=True):
        q = q + (a - rho * (y * q).sum(1))[:, None] * s
    return -q


def strong_wolfe(lanes, theta, value, gradient, direction, step, c1=1e-4, c2=0.9, max_tries=25):
    """A step for each lane that satisfies the strong Wolfe conditions, all lanes side by side.

    Keeps a bracket (lo, hi) per lane: hi is infinite until a step overshoots; then cubic
    interpolation. Near the optimum, where F differences are rounding, the approximate Wolfe
    condition of Hager & Zhang (2005) stands in for the decrease. Lanes that find nothing stay where
    they are.

    Returns:
        ``(theta, value, gradient, moved)`` after the step; ``moved`` (R,) is False where none was
        found.
    """
    slope = (direction * gradient).sum(1)
    slack = 4 * torch.finfo(value.dtype).eps * value.abs()
    lo, lo_value, lo_slope = torch.zeros_like(step), value.clone(), slope.clone()
    hi, hi_value, hi_slope = torch.full_like(step, torch.inf), value.clone(), slope.clone()
    best, best_value, best_gradient = theta.clone(), value.clone(), gradient.clone()
    open_ = torch.arange(len(step), device=step.device)
    moved = torch.zeros_like(step, dtype=torch.bool)
    for _ in range(max_tries):  # only lanes whose search is still open are evaluated
        t, d, start, down = step[open_], direction[open_], value[open_], slope[open_]
        trial = theta[open_] + t[:, None] * d
        some = lanes if len(open_) == len(lanes) else lanes.select(open_)
        t_value, t_gradient = some.value_and_grad(trial)
        t_slope = (t_gradient * d).sum(1)
        wolfe = t_value <= start + c1 * t * down
        approximate = (t_value <= start + slack[open_]) & (t_slope <= (2 * c1 - 1) * down)
        above = (t_value > lo_value[open_] + slack[open_]) & (lo[open_] > 0)
        worse = ~(wolfe | approximate) | above | ~torch.isfinite(t_value)
        kept = open_[~worse]  # every decrease is remembered, in case the tries run out
        best[kept] = trial[~worse]
        best_value[kept] = t_value[~worse]
        best_gradient[kept] = t_gradient[~worse]
        moved[kept] = True
        turn = ~worse & (t_slope * (hi - lo)[open_] >= 0)
        for high, low, new in (
            (hi, lo, t),
            (hi_value, lo_value, t_value),
            (hi_slope, lo_slope, t_slope),
        ):
            high[open_] = torch.where(worse, new, torch.where(turn, low[open_], high[open_]))
            low[open_] = torch.where(worse, low[open_], new)
        open_ = open_[worse | (t_slope.abs() > -c2 * down)]
        if not len(open_):
            break
        between = _cubic(lo, lo_value, lo_slope, hi, hi_value, hi_slope)
        step = torch.where(torch.isinf(hi), 2 * step, between)
    return best, best_value, best_gradient, moved


def _cubic(a, fa, ga, b, fb, gb):
    """Minimiser of the cubic through two values and slopes, in the inner 80 % of the bracket."""
    d1 = ga + gb - 3 * (fa - fb) / (a - b)
    root = (d1**2 - ga * gb).clamp(min=0).sqrt() * torch.sign(b - a)
    point = b - (b - a) * (gb + root - d1) / (gb - ga + 2 * root)
    near, far = torch.minimum(a, b), torch.maximum(a, b)
    middle, margin = (a + b) / 2, (far - near) / 10
    return torch.where(torch.isfinite(point), point, middle).clamp(near + margin, far - margin)


def _polish(lanes: Lanes, theta: Tensor, max_steps: int = 60) -> tuple[Tensor, int]:
    """Newton's method to rounding, for the lanes where it contracts; the others stay.

    The lanes' optima lie close together (one example in m differs), so one factorised Hessian, the
    chord, serves many: each step shrinks the gradient by about the relative change of curvature. A
    lane is kept only while every step halves its gradient, which no step into another basin does.
    """
    floor = noise_floor(lanes, theta)
    rounding = 1e3 if theta.dtype == torch.float64 else 4.0
    gradient = lanes.value_and_grad(theta)[1]
    norm = gradient.norm(dim=1)
    waiting, total = norm > floor, 0
    theta = theta.clone()
    while bool(waiting.any()):
        chord = _hessian_factor(lanes, theta, int(waiting.nonzero()[0]))
        if chord is None:  # not yet in the convex neighbourhood of a minimum
            return theta, total
        before = int(waiting.sum())
        lane = waiting.nonzero().flatten()
        point, slope, size = theta[lane], gradient[lane], norm[lane]
        for _ in range(max_steps):
            total += 1
            trial = point - torch.cholesky_solve(slope.T, chord).T
            t_slope = lanes.select(lane).value_and_grad(trial)[1]
            t_size = t_slope.norm(dim=1)
            halved = t_size < 0.5 * size
            # This near the floor, a step that no longer halves the gradient is limited by rounding.
            done = (halved & (t_size <= floor[lane])) | (~halved & (size <= rounding * floor[lane]))
            best = torch.where((t_size < size)[:, None], trial, point)
            theta[lane[done]], waiting[lane[done]] = best[done], False
            more = halved & ~done
            lane, point, slope, size = lane[more], trial[more], t_slope[more], t_size[more]
            if not len(lane):
                break
        # Lanes far away go on with L-BFGS rather than each with its own Hessian.
        if int(waiting.sum()) == before or before > 8:
            break
    return theta, total


def _hessian_factor(lanes: Lanes, theta: Tensor, lane: int) -> Tensor | None:
    """Cholesky factor of one lane's Hessian, None where it is not positive definite.

    Directions in which F is flat count as positive: symmetries, as that of a low-rank layer, or
    classes that share a bias without a penalty. The gradient has no part there, so a shift that
    makes them positive leaves the steps as they are.
    """
    if missing_second_derivative(lanes.objective):
        return None
    one = torch.tensor([lane], device=theta.device)
    full = lanes.select(one).full(theta[one])[0]
    matrix = Hessian(lanes.objective, full, lanes.weights[lane]).dense()
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    eps = torch.finfo(matrix.dtype).eps
    if bool(failed) or float(pivots.min()) < eps * len(matrix) * float(pivots.max()):
        matrix.diagonal().add_(eps**0.5 * matrix.diagonal().max())
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool(failed) else factor
