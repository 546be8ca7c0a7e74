"""LiSSA: the Neumann series of the inverse, its scale estimated and divergence caught."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_number, check_whole
from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from ..errors import IndefiniteCurvatureError, NotConvergedError
from .report import (
    WAYS_OUT,
    Prepared,
    Settings,
    SolveReport,
    check_columns,
    ratio,
    relative_residuals,
)

__all__ = ["LiSSA"]


def largest_eigenvalue(operator: Operator, iterations: int = 20, seed: int = 0) -> float:
    """The largest absolute eigenvalue, estimated from below by power iteration."""
    generator = torch.Generator(device=operator.device).manual_seed(seed)
    v = torch.randn(
        operator.shape[0], generator=generator, dtype=operator.dtype, device=operator.device
    )
    size = 0.0
    for _ in range(iterations):
        v = operator @ (v / v.norm())
        size = float(v.norm())
        if not size > 0:
            return 0.0
    return size


@dataclass(frozen=True, repr=False)
class LiSSA(Settings):
    """``x ← x + (b − A x) / σ``: the Neumann series ``Σ_j (I − A/σ)ʲ b / σ`` of the inverse.

    Each step takes all examples or a fresh mini-batch. The series converges when ``0 < A < 2σ``, at
    the rate ``1 − λ_min/σ``: far more slowly than `ConjugateGradient`, which needs no scale either.
    It is here because much published work uses it, usually with a scale found by trial and error.
    Here σ comes from a power iteration, and a series that grows is an error, never an answer.

    Args:
        tol, max_iter, strict, callback: as in `ConjugateGradient`. With mini-batches all
            ``max_iter`` steps are taken, the answer is the mean over their second half, and only
            the final residual is known.
        scale: σ; default 1.1 times the estimated largest eigenvalue.
        batch_size: examples per step, default all.
        seed: of the mini-batches.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> model = msif.softmax_regression(64, 10)
    >>> stage = msif.Stage("digits", model, train[:200], weight_decay=1e-1)
    >>> pipeline = msif.Pipeline([stage]).fit(progress=False)
    >>> msif.ImplicitInfluence(msif.LiSSA(tol=1e-3)).fit(pipeline).score(test[:2]).values.shape
    torch.Size([2, 200])

    Reference: Agarwal, Bullins & Hazan (2017); Koh & Liang (2017).
    """

    tol: float = 1e-3
    scale: float | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.scale is not None:
            text = "positive and finite, or None for an estimate"
            check_number("scale", self.scale, lambda scale: 0 < scale < math.inf, text)
        check_whole("batch_size", self.batch_size, none="all")

    def prepare(self, operator: Operator) -> Prepared:
        """Nothing to prepare: each solve estimates the scale and starts from zero."""
        return Prepared(self, operator)

    def solve(self, operator: Operator, b: Tensor) -> tuple[Tensor, SolveReport]:
        """``A⁻¹ b`` for a positive definite operator and ``b`` (P, K), and the report.

        Raises:
            IndefiniteCurvatureError: the series grows along a direction of negative curvature.
            NotConvergedError: the series grows because σ is too small; in strict mode also short of
                the tolerance.
        """
        check_columns(operator, b)
        start = time.perf_counter()
        norm = b.norm(dim=0)
        some = (norm > 0).nonzero().flatten()
        unit = b[:, some] / norm[some]
        x = torch.zeros_like(b)
        relative = (norm > 0).to(b.dtype)
        held = 4 * b.numel() * b.element_size()
        probes = 20 if self.scale is None and len(some) else 0
        scale = self.scale or (1.1 * largest_eigenvalue(operator, probes) if probes else 1.0)
        run = self._series if self.batch_size is None else self._stochastic
        answer, iterations, smallest, spent = run(operator, unit, scale or 1.0, relative, some)
        x[:, some] = answer * norm[some]
        products = 0
        if len(some):
            relative[some] = relative_residuals(operator, answer, unit)
            products = probes + spent + len(some)
        way_out = f"raise max_iter, add damping, or use ConjugateGradient (scale was {scale:.2e})"
        return x, self.report(iterations, relative, smallest, products, held, start, way_out)

    def _series(
        self, operator: Operator, b: Tensor, scale: float, relative: Tensor, places: Tensor
    ) -> tuple[Tensor, int, float, int]:
        """All examples in each step: answers, iterations, smallest curvature, products."""
        x = torch.zeros_like(b)
        r = b.clone()
        iterations = products = 0
        smallest = float("inf")
        alive = torch.arange(b.shape[1], device=b.device)
        while len(alive) and iterations < self.max_iter:
            iterations += 1
            a_r = operator @ r[:, alive]
            products += len(alive)
            curvature = ratio((r[:, alive] * a_r).sum(0), r[:, alive].square().sum(0))
            smallest = min(smallest, float(curvature.min()))
            x[:, alive] += r[:, alive] / scale
            r[:, alive] -= a_r / scale
            size = r[:, alive].norm(dim=0)
            relative[places[alive]] = size
            largest = float(curvature.max())
            self._refuse_growth(float(size.max()), smallest, largest, scale, iterations)
            if self.callback is not None:
                self.callback(iterations, relative.clone())
            alive = alive[size > self.tol]
        return x, iterations, smallest, products

    def _stochastic(
        self, operator: Operator, b: Tensor, scale: float, relative: Tensor, places: Tensor
    ) -> tuple[Tensor, int, float, int]:
        """A mini-batch in each step: answers, iterations, smallest curvature, products."""
        base, _ = operator.unshifted()
        if not isinstance(base, DataCurvature):
            raise ValueError(
                f"batch_size={self.batch_size}: {base!r} has no examples; leave batch_size out"
            )
        total = len(base.objective.data)
        count = min(self.batch_size, total)
        generator = torch.Generator().manual_seed(self.seed)
        x = b / scale
        summed = torch.zeros_like(b)
        kept = 0
        smallest = float("inf")
        steps = self.max_iter if b.shape[1] else 0
        for iteration in range(1, steps + 1):
            rows = torch.randperm(total, generator=generator)[:count].to(b.device)
            a_x = on_examples(operator, rows) @ x
            curvature = (x * a_x).sum(0) / x.square().sum(0)
            smallest = min(smallest, float(curvature.min()))
            left = b - a_x
            # The noise of mini-batches alone can make the residual larger than ‖b‖ for a while; a
            # thousand times ‖b‖ is divergence.
            size = float(left.norm(dim=0).max()) / 100
            self._refuse_growth(size, smallest, float(curvature.max()), scale, iteration)
            x = x + left / scale
            if self.callback is not None:
                self.callback(iteration, relative.index_copy(0, places, left.norm(dim=0)))
            if 2 * iteration > steps:
                summed = summed + x
                kept += 1
        products = round(steps * b.shape[1] * count / total)
        return summed / max(kept, 1), steps, smallest, products

    def _refuse_growth(
        self, size: float, smallest: float, largest: float, scale: float, iteration: int
    ) -> None:
        """Raise once the residual's ``size``, in units of ‖b‖, shows divergence."""
        if size <= 10.0:  # a convergent series of a symmetric matrix never grows at all
            return
        message = (
            f"LiSSA diverged: the residual is {size:.1e} times ‖b‖ after {iteration} iterations"
        )
        if smallest < 0:
            raise IndefiniteCurvatureError(
                f"{message}, along curvature {smallest:.3e}; {WAYS_OUT}, or MINRES", smallest
            )
        raise NotConvergedError(
            f"{message}: scale={scale:.2e} is below half the largest curvature, {largest:.2e}; "
            "leave scale out"
        )


def on_examples(operator: Operator, rows: Tensor) -> Operator:
    """The same curvature estimated as the mean over some examples, with penalty and damping."""
    base, shift = operator.unshifted()
    if base is not operator:
        return on_examples(base, rows) + shift
    objective = base.objective.on(base.objective.data[rows.tolist()])
    made = type(base)(objective, base.full, base.weights[rows], ridge=False, every=base.every)
    made.ridge = base.ridge
    return made
