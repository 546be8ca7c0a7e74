"""Approximate inverses: a few directions of the curvature plus its diagonal; solvers or
preconditioners.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.derivatives import per_example_gradients
from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from ..data.examples import Examples
from ..memory import parse_bytes, require_memory
from .approximation import Approximation, Parts, parts
from .report import Settings

__all__ = ["Jacobi", "LowRank"]


def output_directions(base: DataCurvature, most: int) -> tuple[Tensor, Tensor]:
    """The loss's strongest curvatures in the outputs: ``w_i Λ_i / m = Σ_c μ_ic e_ic e_icᵀ``.

    Returns:
        The examples ``(r,)`` of the ``most`` largest μ over all examples, and ``√μ e`` ``(r, C)``.
    """
    o, found = base.objective, []
    for rows, x, y in o.chunks(copies=2):
        with torch.no_grad():
            z = o.outputs(base.full, x)
        # (B, C), (B, C, C)
        values, vectors = torch.linalg.eigh(base.bend(z, y, base.weights[rows]))
        best = values.flatten().topk(min(most, values.numel())).indices
        example, c = best // values.shape[1], best % values.shape[1]
        size = values[example, c].clamp(min=0)
        found.append((rows.start + example, size.sqrt()[:, None] * vectors[example, :, c]))
    examples, directions = (torch.cat(part) for part in zip(*found, strict=True))
    best = directions.square().sum(1).topk(min(most, len(directions))).indices.sort().values
    return examples[best], directions[best]


def jacobian_rows(base: DataCurvature, examples: Tensor, directions: Tensor) -> Tensor:
    """``J_iᵀ d`` for each example and output direction, ``(r, P)``, by one backward pass each."""
    o = base.objective
    once, places = examples.unique(return_inverse=True)  # an example may give several rows
    chosen = Examples(o.data[once].x[places], directions)

    def along(outputs, directions):
        return (outputs.flatten(1) * directions).sum(1)

    return torch.cat(
        [g for _, g in per_example_gradients(o, base.full, chosen, along, every=base.every)]
    )


@dataclass(frozen=True, repr=False)
class LowRank(Settings):
    """``(SᵀS + diag)⁻¹`` with ``r`` rows S and the penalty and damping on the diagonal, by
    Woodbury's formula.

    As a solver it is an approximation: it ranks well and its residual, which the report states,
    says how far the numbers can be trusted. As ``ConjugateGradient(preconditioner=LowRank())`` it
    makes exact answers cheap.

    Args:
        tol: residual below which the approximation is called good enough; by default a mere
            improvement on 0.
        max_iter: how many columns' residuals are measured, at a product each.
        strict, callback: as in `ConjugateGradient`; the callback comes once.
        rank: r; memory is about ``2 r P`` numbers.
        method: ``"jacobians"``: Gauss-Newton rows ``√μ Jᵀe`` of those outputs of examples in which
            the loss bends most, one backward pass each, no products; ``"nystrom"``: randomised,
            from ``rank`` products; works with any operator, and drops negative curvature.
        seed: of the random directions of ``"nystrom"``.
        memory: budget for the rows.

    Raises:
        ValueError: neither penalty nor damping on some parameter, so that the inverse does not
            exist.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, weight_decay=1e-2)
    >>> pipeline = msif.Pipeline([stage]).fit(progress=False)
    >>> solver = msif.ConjugateGradient(tol=1e-3, preconditioner=msif.LowRank(rank=300))
    >>> msif.ImplicitInfluence(solver, curvature="ggn").fit(pipeline).score(test[:5]).values.shape
    torch.Size([5, 1201])

    Reference: Frangella, Tropp & Udell (2023) for Nyström; Roosta-Khorasani & Mahoney (2019) for
    subsampled curvature.
    """

    tol: float = 1.0
    max_iter: int = 2
    rank: int = 500
    method: str = "jacobians"
    seed: int = 0
    memory: str | int = "1GB"

    def __post_init__(self):
        if not self.tol > 0 or self.max_iter < 1 or self.rank < 1:
            raise ValueError(
                f"tol={self.tol} must be positive, max_iter={self.max_iter} and rank={self.rank} "
                "at least 1"
            )
        if self.method not in ("jacobians", "nystrom"):
            raise ValueError(f"method={self.method!r} must be 'jacobians' or 'nystrom'")
        parse_bytes(self.memory)

    def prepare(self, operator: Operator) -> "Woodbury":
        """Make the rows and factorise their Gram matrix, once.

        Raises:
            MemoryBudgetError: before any work, if the rows exceed the budget.
        """
        size, p = operator.shape[0], parts(operator)
        rank = min(self.rank, size)
        if self.method == "jacobians":
            if not isinstance(p.base, DataCurvature):
                raise ValueError(f"{p.base!r} has no examples: use LowRank(method='nystrom')")
            o = p.base.objective
            rank = min(self.rank, len(o.data) * o.outputs(p.base.full, o.data[:1].x).numel())
        if not bool((p.diagonal > 0).all()):
            raise ValueError(
                "LowRank needs penalty or damping on every parameter: set weight_decay or damping"
            )
        needed = (3 * rank * size + 2 * rank * rank) * p.diagonal.element_size()
        require_memory(
            needed,
            parse_bytes(self.memory),
            f"a rank-{rank} curvature",
            "lower rank or give more memory=",
        )
        if self.method == "nystrom":
            return Woodbury(
                self, operator, _nystrom_rows(p, rank, self.seed), p.diagonal, products=rank
            )
        examples, directions = output_directions(p.base, rank)
        return Woodbury(self, operator, jacobian_rows(p.base, examples, directions), p.diagonal)


def _nystrom_rows(p: Parts, rank: int, seed: int) -> Tensor:
    """``AΩ (ΩᵀAΩ)⁻¹ ΩᵀA = SᵀS``: the best that ``rank`` products with random directions Ω tell."""
    generator = torch.Generator(device=p.diagonal.device).manual_seed(seed)
    size, like = len(p.diagonal), {"dtype": p.diagonal.dtype, "device": p.diagonal.device}
    directions, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, **like))
    seen = p.data(directions)
    values, vectors = torch.linalg.eigh(directions.T @ seen)
    keep = values > torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
    return ((seen @ vectors[:, keep]) / values[keep].sqrt()).T.contiguous()


class Woodbury(Approximation):
    """``(SᵀS + D)⁻¹ = D⁻¹ − D⁻¹Sᵀ (I + S D⁻¹ Sᵀ)⁻¹ S D⁻¹``; made by `LowRank.prepare`."""

    def __init__(
        self, solver: LowRank, operator: Operator, rows: Tensor, diagonal: Tensor, products: int = 0
    ):
        super().__init__(solver, operator)
        self.root, self.diagonal, self.products = rows, diagonal, products
        gram = (rows / diagonal) @ rows.T
        gram.diagonal().add_(1.0)
        self.factor = torch.linalg.cholesky(gram)
        self.bytes = (rows.numel() + gram.numel()) * rows.element_size()

    def apply(self, columns: Tensor) -> Tensor:
        scaled = columns / self.diagonal[:, None]
        inner = torch.cholesky_solve(self.root @ scaled, self.factor)
        return scaled - (self.root.T @ inner) / self.diagonal[:, None]


@dataclass(frozen=True, repr=False)
class Jacobi(Settings):
    """Division by the diagonal, estimated from products with random signs:
    ``diag A ≈ mean z ∘ Az``.

    Cheap and weak; where parameters live on very different scales it helps `ConjugateGradient`.

    Args:
        tol, max_iter, strict, callback: as in `LowRank`.
        samples: products for the estimate.
        seed: of the random signs.

    Reference: Bekas, Kokiopoulou & Saad (2007).
    """

    tol: float = 1.0
    max_iter: int = 2
    samples: int = 20
    seed: int = 0

    def __post_init__(self):
        if not self.tol > 0 or self.max_iter < 1 or self.samples < 1:
            raise ValueError(
                f"tol={self.tol} must be positive, max_iter={self.max_iter} and "
                f"samples={self.samples} at least 1"
            )

    def prepare(self, operator: Operator) -> "Diagonal":
        """Estimate the diagonal, once."""
        return Diagonal(self, operator)


class Diagonal(Approximation):
    """An estimated diagonal; made by `Jacobi.prepare`."""

    def __init__(self, solver: Jacobi, operator: Operator):
        super().__init__(solver, operator)
        p = parts(operator)
        generator = torch.Generator(device=operator.device).manual_seed(solver.seed)
        size = (operator.shape[0], solver.samples)
        signs = (
            torch.randint(0, 2, size, generator=generator, device=operator.device).to(
                operator.dtype
            )
            * 2
            - 1
        )
        estimate = (signs * p.data(signs)).mean(1).clamp(min=0)
        # The estimate is noisy: never trust an entry below a hundredth of the average.
        self.diagonal = (estimate + p.diagonal).clamp(
            min=float((estimate + p.diagonal).mean()) / 100
        )
        self.products, self.bytes = (
            solver.samples,
            self.diagonal.numel() * self.diagonal.element_size(),
        )

    def apply(self, columns: Tensor) -> Tensor:
        return columns / self.diagonal[:, None]
