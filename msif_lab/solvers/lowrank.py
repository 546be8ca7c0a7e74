"""Approximate inverses: from a few directions of the curvature, or from its diagonal alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_choice
from ..curvature.derivatives import per_example_gradients
from ..curvature.matrices import DataCurvature
from ..curvature.operators import Operator
from ..data.examples import Examples
from ..memory import parse_bytes, require_memory
from .approximation import Approximation, Parts, parts
from .report import Settings

__all__ = ["Jacobi", "LowRank"]


def output_directions(base: DataCurvature, most: int) -> tuple[Tensor, Tensor]:
    """The directions in examples' outputs in which the loss curves most.

    These are the eigenvectors e in ``w_i Λ_i / m = Σ_c μ_ic e_ic e_icᵀ``.

    Returns:
        The examples ``(r,)`` of the ``most`` largest μ over all examples, and ``√μ e`` ``(r, C)``.
    """
    o = base.objective
    found = []
    for rows, x, y in o.chunks(copies=2):
        with torch.no_grad():
            z = o.outputs(base.full, x)
        bend = base.bend(z, y, base.weights[rows])
        values, vectors = torch.linalg.eigh(bend)  # (B, C), (B, C, C)
        best = values.flatten().topk(min(most, values.numel())).indices
        example = best // values.shape[1]
        c = best % values.shape[1]
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

    chunks = per_example_gradients(o, base.full, chosen, along, every=base.every)
    return torch.cat([rows for _, rows in chunks])


@dataclass(frozen=True, repr=False)
class LowRank(Settings):
    """``(SᵀS + D)⁻¹`` with r rows S and the penalty and damping on the diagonal D, by Woodbury.

    As a solver it is an approximation: it ranks well, and the residual in its report says how far
    the numbers can be trusted. As ``ConjugateGradient(preconditioner=LowRank())`` it makes exact
    answers cheap.

    Args:
        tol: residual up to which the approximation counts as good enough; the default only asks
            that it be no worse than answering 0.
        max_iter: how many columns' residuals are measured, at the cost of one product each.
        strict, callback: as in `ConjugateGradient`; the callback is called once.
        rank: r; memory is about ``2 r P`` numbers.
        method: ``"jacobians"`` takes Gauss-Newton rows ``√μ Jᵀe`` for the outputs of examples in
            which the loss has most curvature, by one backward pass each and no products.
            ``"nystrom"`` is randomised, takes ``rank`` products, works with any operator, and drops
            negative curvature.
        seed: of the random directions of ``"nystrom"``.
        memory: budget for the rows.

    Raises:
        ValueError: some parameter has neither penalty nor damping, so the inverse does not exist.

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
        self._check(lambda tol: tol > 0, "positive", rank=1)
        check_choice("method", self.method, ("jacobians", "nystrom"))
        parse_bytes(self.memory)

    def prepare(self, operator: Operator) -> "Woodbury":
        """Make the rows and factorise their Gram matrix, once.

        Raises:
            MemoryBudgetError: before any work, if the rows exceed the budget.
        """
        p = parts(operator)
        size = operator.shape[0]
        rank = min(self.rank, size)
        if self.method == "jacobians":
            if not isinstance(p.base, DataCurvature):
                raise ValueError(f"{p.base!r} has no examples: use LowRank(method='nystrom')")
            o = p.base.objective
            outputs = o.outputs(p.base.full, o.data[:1].x).numel()
            rank = min(self.rank, len(o.data) * outputs)
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
            rows = _nystrom_rows(p, rank, self.seed)
            return Woodbury(self, operator, rows, p.diagonal, products=rank)
        examples, directions = output_directions(p.base, rank)
        rows = jacobian_rows(p.base, examples, directions)
        return Woodbury(self, operator, rows, p.diagonal)


def _nystrom_rows(p: Parts, rank: int, seed: int) -> Tensor:
    """S with ``SᵀS = AΩ (ΩᵀAΩ)⁻¹ ΩᵀA``, from products of A with ``rank`` random directions Ω."""
    like = p.diagonal
    generator = torch.Generator(device=like.device).manual_seed(seed)
    random = torch.randn(len(like), rank, generator=generator, dtype=like.dtype, device=like.device)
    directions, _ = torch.linalg.qr(random)
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
        self.root = rows
        self.diagonal = diagonal
        self.products = products
        gram = (rows / diagonal) @ rows.T
        gram.diagonal().add_(1.0)
        self.factor = torch.linalg.cholesky(gram)
        self.bytes = (rows.numel() + gram.numel()) * rows.element_size()

    def apply(self, columns: Tensor) -> Tensor:
        """``M⁻¹ B`` for ``B`` (P, K)."""
        scaled = columns / self.diagonal[:, None]
        inner = torch.cholesky_solve(self.root @ scaled, self.factor)
        return scaled - (self.root.T @ inner) / self.diagonal[:, None]


@dataclass(frozen=True, repr=False)
class Jacobi(Settings):
    """Division by the diagonal, estimated from products with random signs z.

    ``diag A ≈ mean z ∘ Az``. It is cheap but weak; it helps `ConjugateGradient` where parameters
    live on very different scales.

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
        self._check(lambda tol: tol > 0, "positive", samples=1)

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
        bits = torch.randint(0, 2, size, generator=generator, device=operator.device)
        signs = bits.to(operator.dtype) * 2 - 1
        estimate = (signs * p.data(signs)).mean(1).clamp(min=0)
        diagonal = estimate + p.diagonal
        # The estimate is noisy: no entry below a hundredth of the mean is trusted.
        self.diagonal = diagonal.clamp(min=float(diagonal.mean()) / 100)
        self.products = solver.samples
        self.bytes = self.diagonal.numel() * self.diagonal.element_size()

    def apply(self, columns: Tensor) -> Tensor:
        """``M⁻¹ B`` for ``B`` (P, K)."""
        return columns / self.diagonal[:, None]
