"""Leave-one-out: the Newton step of each example's removal, its own curvature included.

Without example i, F becomes ``F − f_i/m``; its Newton step from the minimum of F is
``(H − h_i/m)⁻¹ ∇f_i / m``, with ``h_i = J_iᵀ Λ_i J_i`` for the GGN and for models linear in their
parameters. By Woodbury's identity that takes a system of C numbers, the outputs:

    x = H⁻¹ Jᵀ (I − Λ K / m)⁻¹ ∇_z f_i / m,    K = J H⁻¹ Jᵀ

which is exact up to rounding however near the leverage, the largest eigenvalue of ``Λ K / m``, is
to one. What a network's Hessian has beyond, ``Σ_c ∂f_i/∂z_c ∇²z_c``, conjugate gradients add. For
squared error and a linear model the step is the removal itself. Elsewhere it may overshoot, so a
step that is much longer than the derivative is tried out on the loss of the others.
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..curvature.derivatives import own_products, per_example_gradients
from ..curvature.matrices import GGN
from ..errors import ConvergenceWarning, IndefiniteCurvatureError
from ..memory import require_memory, working_bytes
from ..objective.objective import Lanes, Objective

SHIFT_BYTES = 512 * 10**6  # that the steps of all examples may take
MOST_OUTPUTS = 64  # C up to which Woodbury's identity is used
ITERATIONS = 50
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}  # relative residual of a step
RESOLVED = 1e3  # times ε: a smaller 1 − leverage is rounding
LONG = 1.5  # times the derivative, in norm or along ∇f_i: a longer step is tried out
TURNED = 1.0  # times the first slope: the opposite slope that a trusted step may end with
BISECTIONS = 7


def removal_steps(kind: str, o: Objective, full: Tensor, prepared, damping: float = 0.0) -> Tensor:
    """Each example's Newton step of leaving it out, ``(H − h_i/m)⁻¹ ∇f_i / m``, ``(N, P)``.

    Along the curvature's null directions, if the solver knows of any, there is no step: without an
    example F is flat along the symmetry as well, so it may be minimised across it.

    A step much longer than the derivative ``H⁻¹ ∇f_i / m`` is followed on the loss of the others.
    Where that rises at its end, and more steeply than it fell at first, the step is replaced by the
    point along it, or along the derivative, where that loss is smallest.

    Args:
        kind: ``"hessian"`` or ``"ggn"``, of H and of the example's own ``h_i``.
        o: the stage.
        full: all its parameters ``(D,)``.
        prepared: a solver's, of H.
        damping: the part of H that F does not have.

    Raises:
        MemoryBudgetError: the steps of all examples take too much memory.

    Warns:
        ConvergenceWarning: without some examples the curvature is not positive definite; their
            steps are the derivative. Or steps were replaced. Both are named.
    """
    size = o.size * len(o.data) * full.element_size()
    require_memory(
        size, SHIFT_BYTES, "leave_one_out=True", "leave it out, or use a smaller model or data set"
    )
    removal = _Removal(kind, o, full, prepared, damping)
    steps, flat, turned = [], [], []
    # about 24 + 4 C numbers of (B, P) at once
    copies = (24 + 4 * removal.outputs) * o.size * full.element_size()
    few = max(1, working_bytes(o.device) // copies)
    for part in torch.arange(len(o.data), device=full.device).split(few):
        for rows, gradients in per_example_gradients(o, full, rows=part):
            b = gradients / len(o.data)
            step, plain, good = removal.steps(rows, b)
            step[~good] = plain[~good]  # no nearby minimum without these
            ratios = (b * step).sum(1) / (b * plain).sum(1), step.norm(dim=1) / plain.norm(dim=1)
            long = (good & (torch.maximum(*ratios) > LONG)).nonzero().flatten()
            step[long], held = removal.tried(rows[long], b[long], step[long], plain[long])
            steps.append(step)
            ids = o.data.ids[rows.cpu()]
            flat += ids[~good.cpu()].tolist()
            turned += ids[long[~held].cpu()].tolist()
    _warn(o.where, flat, turned)
    return torch.cat(steps)


def _warn(where: str, flat: list, turned: list) -> None:
    if flat:
        warnings.warn(
            f"{where}: without examples {flat[:10]} ({len(flat)} in all) the curvature H − h_i/m "
            "is not positive definite, or not beyond rounding, so there may be no nearby minimum; "
            "their scores are the derivative. Use curvature='ggn' or more weight decay, or "
            "retrain: removal_effects",
            ConvergenceWarning,
            stacklevel=5,
        )
    if turned:
        warnings.warn(
            f"{where}: removing examples {turned[:10]} ({len(turned)} in all) moves the minimum "
            "too far for one Newton step: the loss of the others turns within it. Their scores "
            "are rough, from where that loss is smallest along this step or the derivative; "
            "retrain to be sure: removal_effects",
            ConvergenceWarning,
            stacklevel=5,
        )


class _Factors(NamedTuple):
    """What Woodbury's identity takes for B examples.

    Attributes:
        j: Jacobians J ``(B, C, P)``, null directions taken out.
        h_j: ``J H⁻¹``, ``(B, C, P)``.
        inner: ``(I − Λ K / m)⁻¹``, or I where that is not positive, ``(B, C, C)``.
        bend: ``Λ / m``, or 0 there, ``(B, C, C)``.
        slope: ``∇_z f_i / m``, ``(B, C)``.
        positive: whether ``H − Jᵀ Λ J / m`` is positive definite, ``(B,)``.
    """

    j: Tensor
    h_j: Tensor
    inner: Tensor
    bend: Tensor
    slope: Tensor
    positive: Tensor


def _back(u: Tensor, rows: Tensor) -> Tensor:
    """``Σ_c u_c rows_c`` of each example: (B, C) and (B, C, P) → (B, P)."""
    return torch.einsum("bc,bcp->bp", u, rows)


class _Removal:
    """The systems ``(H − h_i/m) x = ∇f_i / m`` of one stage, and trials of their answers.

    Args: as in `removal_steps`.

    Attributes:
        outputs: C, or 0 where there are too many for Woodbury's identity.
    """

    def __init__(self, kind: str, o: Objective, full: Tensor, prepared, damping: float):
        self.kind, self.o, self.full, self.prepared, self.damping = kind, o, full, prepared, damping
        self.null = getattr(prepared, "null", None)
        self.ggn = GGN(o, full)
        count = self.ggn.count_outputs()
        self.outputs = count if count <= MOST_OUTPUTS else 0
        self.eps = torch.finfo(full.dtype).eps

    def _solve(self, rows: Tensor) -> Tensor:
        """``H⁻¹`` of rows ``(B, P)`` that have no part along null directions."""
        try:
            return self.prepared.solve(rows.T)[0].T
        except IndefiniteCurvatureError as error:
            message = f"{self.o.where}, leave_one_out=True: {error}. Exact() finds null directions"
            raise IndefiniteCurvatureError(message, error.smallest) from None

    def _across(self, rows: Tensor) -> Tensor:
        """Rows ``(..., P)`` without their part along null directions."""
        return rows if self.null is None else rows - rows @ self.null.vectors @ self.null.vectors.T

    def steps(self, rows: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(H − h_i/m)⁻¹ b``, ``H⁻¹ b`` (B, P) and where the former is sound, for ``b`` (B, P)."""
        x, y = self.o.data.x[rows], self.o.data.y[rows]
        b = self._across(b)
        if not self.outputs:
            plain = self._solve(b)
            step, good = self._conjugate(x, y, b, plain, b, None)
            return step, plain, good
        f = self._factors(x, y)
        plain = _back(f.slope, f.h_j)
        u = torch.einsum("bcd,bd->bc", f.inner, f.slope)
        step, good = _back(u, f.h_j), f.positive
        if self.kind == "hessian":
            step, good = self._conjugate(x, y, b, step, _back(u, f.j), f)
        return step, plain, good

    def _factors(self, x: Tensor, y: Tensor) -> _Factors:
        j, bend = self.ggn.factors(x, y)
        with torch.enable_grad():
            z = self.o.outputs(self.full, x).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.o.loss(z, y).sum() / len(self.o.data), z)
        j = self._across(j)
        h_j = self._solve(j.flatten(0, 1)).view_as(j)
        k = h_j @ j.mT
        k = (k + k.mT) / 2
        eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
        values, vectors = torch.linalg.eigh(k)
        root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT
        left = torch.linalg.eigvalsh(eye - root @ bend @ root)[:, 0]  # 1 − leverage
        positive = left > RESOLVED * self.eps
        bend = torch.where(positive[:, None, None], bend, 0.0)
        inner = torch.linalg.inv(eye - bend @ k)
        return _Factors(j, h_j, inner, bend, slope.flatten(1), positive)

    def _conjugate(
        self, x: Tensor, y: Tensor, b: Tensor, step: Tensor, h_step: Tensor, f: _Factors | None
    ) -> tuple[Tensor, Tensor]:
        """Conjugate gradients on B systems, preconditioned by ``(H − Jᵀ Λ J / m)⁻¹``.

        What is left of ``h_i`` has few directions that matter, so a handful of iterations suffice,
        and none for a linear model. ``H p`` follows from the recursion, since ``H H⁻¹ r = r``.

        Args:
            x, y: the examples.
            b: right-hand sides ``(B, P)``.
            step: where to start, ``(B, P)``.
            h_step: H times it.
            f: for the preconditioner; None for ``H⁻¹``.

        Returns:
            the answers ``(B, P)``, and which systems were solved, ``(B,)``.
        """

        def own(p: Tensor) -> Tensor:
            products = own_products(self.kind, self.o, self.full, x, y, p)
            return self._across(products) / len(self.o.data)

        bent = own(step)
        r = b - (h_step - bent)
        tolerance = TOLERANCE.get(b.dtype, TOLERANCE[torch.float32]) * b.norm(dim=1)
        tolerance = torch.maximum(tolerance, 30 * self.eps * bent.norm(dim=1))
        alive = r.norm(dim=1) > tolerance
        good = torch.ones_like(alive)
        p, h_p = torch.zeros_like(b), torch.zeros_like(b)
        before = b.new_full((len(b),), torch.inf)
        for _ in range(ITERATIONS):
            if not bool(alive.any()):
                break
            z, h_z = self._preconditioned(r, f)
            square = (r * z).sum(1)
            zero = torch.zeros_like(square)
            beta = torch.where(alive, square / before, zero)[:, None]
            p = z + beta * p
            h_p = h_z + beta * h_p
            a_p = h_p - own(p)
            curvature = (p * a_p).sum(1)
            good &= ~alive | (curvature > RESOLVED * self.eps * (p * h_p).sum(1))
            alive = alive & good
            length = torch.where(alive, square / curvature, zero)[:, None]
            step = step + length * p
            r = r - length * a_p
            before = square
            alive = alive & (r.norm(dim=1) > tolerance)
        return step, good & ~alive

    def _preconditioned(self, r: Tensor, f: _Factors | None) -> tuple[Tensor, Tensor]:
        """``z = (H − Jᵀ Λ J / m)⁻¹ r`` and ``H z``, ``(B, P)`` each."""
        z = self._solve(r)
        if f is None:
            return z, r
        u = torch.einsum("bcd,bd->bc", f.inner @ f.bend, torch.einsum("bcp,bp->bc", f.j, z))
        return z + _back(u, f.h_j), r + _back(u, f.j)

    def tried(self, rows: Tensor, b: Tensor, steps: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
        """Follow some steps on the loss of the others, and replace those that overshoot.

        Args:
            rows: positions of the examples.
            b: ``∇f_i / m``, minus the slope at the start, ``(B, P)``.
            steps, plain: Newton's steps and the derivative's, ``(B, P)``.

        Returns:
            the steps ``(B, P)``, and which are trusted, ``(B,)``.
        """
        _, end = self._follow(rows, steps, torch.ones_like(steps[:, 0]))
        good = end <= TURNED * (b * steps).sum(1)  # false for NaN
        newton, newton_value = self._shortened(rows[~good], steps[~good])
        other, other_value = self._shortened(rows[~good], plain[~good])
        steps[~good] = torch.where((newton_value <= other_value)[:, None], newton, other)
        return steps, good

    def _shortened(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Steps up to where the loss of the others turns ``(B, P)``, and that loss there ``(B,)``.

        Found by bisection of its slope; a step along which it only falls is kept whole.
        """
        high = torch.ones_like(steps[:, 0])
        low = (self._follow(rows, steps, high)[1] <= 0).to(high)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            falls = self._follow(rows, steps, middle)[1] < 0
            low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
        share = torch.where(low == 1, low, (low + high) / 2)
        return share[:, None] * steps, self._follow(rows, steps, share)[0]

    def _follow(self, rows: Tensor, steps: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """``F − f_i/m`` at ``θ + t x_i``, t = ``shares``, up to a constant, and its t-derivative.

        ∇F(θ) counts as 0: ``_pull`` is minus the part of it that is not computed here.
        """
        o = self.o
        # damping and what pulls towards the stage before
        square = self.damping * steps.square().sum(1)
        square += 2 * o.alpha * o.coupled.take(steps).square().sum(1)
        linear = steps @ self._pull
        values, slopes = shares * linear + shares**2 / 2 * square, linear + shares * square
        few = max(1, min(64, working_bytes(o.device) // (8 * self.full.nbytes)))
        for start in range(0, len(rows), few):
            part = slice(start, start + few)
            weights = self.full.new_ones(len(rows[part]), len(o.data))
            weights.scatter_(1, rows[part, None], 0.0)
            theta = o.trained.take(self.full) + shares[part, None] * steps[part]
            lanes = Lanes(o, self.full.repeat(len(theta), 1), None, weights)
            value, gradient = lanes.value_and_grad(theta)
            values[part] += value
            slopes[part] += (gradient * steps[part]).sum(1)
        return values, slopes

    @functools.cached_property
    def _pull(self) -> Tensor:
        """Minus the gradient of the data and the weight decay at the minimum, ``(P,)``."""
        o = self.o
        lanes = Lanes(o, self.full[None], None, self.full.new_ones(1, len(o.data)))
        return -lanes.value_and_grad(o.trained.take(self.full)[None])[1][0]
