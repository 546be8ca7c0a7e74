"""Hessian and generalised Gauss-Newton as operators with algebra; derivatives of single examples.

``H = Hessian(objective, full)`` is used as ``(H + damping) @ V``: it knows shape, dtype and device, and
multiplies many vectors at once. Averages are weighted by the data, so any chunking gives the same product.
"""

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, func
from torch.func import grad, hessian, jacrev, vjp, vmap

from .data import Examples
from .objective import WORKING_BYTES, Objective
from .storage import parse_bytes, require_memory

__all__ = ["GGN", "Hessian", "Operator", "example_products", "per_example_gradients"]


@functools.cache
def _load_forward_mode() -> None:
    """PyTorch loads its forward-mode rules at first use and, in some versions, warns about its own code."""
    one = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        func.jvp(torch.sin, (one,), (one,))


def jvp(function, primals, tangents):
    """`torch.func.jvp` without PyTorch's own deprecation notices."""
    _load_forward_mode()
    return func.jvp(function, primals, tangents)


class Operator:
    """A symmetric ``(P, P)`` matrix known by its products.

    Supports ``A @ v`` for ``(P,)`` or ``(P, K)``, ``A + B``, ``A + number`` (times the identity),
    ``A + diagonal`` for a ``(P,)`` tensor, ``number * A``, and ``A.dense()``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = (size, size), dtype, device

    def _product(self, vectors: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _product")

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or vectors.shape[0] != self.shape[0]:
            shape = tuple(getattr(vectors, "shape", ())) or type(vectors).__name__
            raise ValueError(f"operator of shape {self.shape} times {shape}: give a (P,) or (P, K) tensor")
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"operator of {self.dtype} on {self.device} times {vectors.dtype} on {vectors.device}: convert one"
            )
        columns = vectors[:, None] if vectors.ndim == 1 else vectors
        product = self._product(columns) if columns.shape[1] else torch.zeros_like(columns)
        return product[:, 0] if vectors.ndim == 1 else product

    def __add__(self, other: "Operator | Tensor | float") -> "Operator":
        if isinstance(other, Operator):
            return _Sum(self, other)
        base, shift = (self.base, self.shift) if isinstance(self, Shifted) else (self, 0.0)
        if isinstance(other, Tensor) and other.ndim and other.shape != (self.shape[0],):
            raise ValueError(f"cannot add {tuple(other.shape)} to an operator of shape {self.shape}: a number or (P,)")
        if not isinstance(other, (int, float, Tensor)):
            raise TypeError(f"cannot add {type(other).__name__} to an operator: a number, a (P,) tensor or an operator")
        return Shifted(base, shift + other)

    __radd__ = __add__

    def __mul__(self, factor: float) -> "Operator":
        if not isinstance(factor, (int, float)) and not (isinstance(factor, Tensor) and factor.ndim == 0):
            raise TypeError(
                f"an operator can be multiplied by a number, not {type(factor).__name__}; products are A @ v"
            )
        return _Scaled(self, factor)

    __rmul__ = __mul__

    def dense(self, memory: str | int = "1GB") -> Tensor:
        """The matrix itself, ``(P, P)``, exactly symmetric.

        Raises:
            MemoryBudgetError: before any work, when the matrix and its making exceed ``memory``.
        """
        size = self.shape[0]
        # the matrix, its transpose while it is made symmetric, and what a factorisation adds
        needed = 4 * size * size * torch.empty((), dtype=self.dtype).element_size()
        require_memory(
            needed,
            parse_bytes(memory),
            f"a dense {size} × {size} curvature",
            "use ConjugateGradient or give more memory=",
        )
        matrix = self._dense()
        return (matrix + matrix.T).div_(2)

    def _dense(self) -> Tensor:
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device})"


class Shifted(Operator):
    """``base + diag(shift)``; solvers look inside to reuse the work done on ``base``."""

    def __init__(self, base: Operator, shift: Tensor | float):
        super().__init__(base.shape[0], base.dtype, base.device)
        self.base, self.shift = base, torch.as_tensor(shift, dtype=base.dtype, device=base.device)

    def _product(self, vectors: Tensor) -> Tensor:
        return self.base @ vectors + (self.shift[:, None] if self.shift.ndim else self.shift) * vectors

    def _dense(self) -> Tensor:
        return self.base._dense() + torch.diag(self.shift.expand(self.shape[0]))


class _Sum(Operator):
    def __init__(self, left: Operator, right: Operator):
        if left.shape != right.shape:
            raise ValueError(f"cannot add operators of shapes {left.shape} and {right.shape}")
        super().__init__(left.shape[0], left.dtype, left.device)
        self.left, self.right = left, right

    def _product(self, vectors: Tensor) -> Tensor:
        return self.left @ vectors + self.right @ vectors


class _Scaled(Operator):
    def __init__(self, base: Operator, factor: float):
        super().__init__(base.shape[0], base.dtype, base.device)
        self.base, self.factor = base, factor

    def _product(self, vectors: Tensor) -> Tensor:
        return self.factor * (self.base @ vectors)


class DataCurvature(Operator):
    """Curvature of the mean loss ``(1/m) Σ w_i f_i`` plus, unless ``ridge=False``, of the stage's penalty.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        weights: example weights ``(m,)``; default one each.
        every: over all D parameters instead of the trained P (without the penalty); its off-diagonal
            block is the ``G_WT`` of the frozen case.
    """

    def __init__(
        self,
        objective: Objective,
        full: Tensor,
        weights: Tensor | None = None,
        *,
        ridge: bool = True,
        every: bool = False,
    ):
        super().__init__(objective.layout.size if every else objective.size, full.dtype, full.device)
        for name, tensor, size in (("full", full, objective.layout.size), ("weights", weights, len(objective.data))):
            if tensor is not None and tensor.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({size},)")
        self.objective, self.full, self.every = objective, full, every
        self.theta = full if every else full[objective.rows]
        self.weights = full.new_ones(len(objective.data)) if weights is None else weights
        self.ridge = objective.ridge if ridge and not every else None

    def _full(self, theta: Tensor) -> Tensor:
        return theta if self.every else self.objective.join(theta, self.full)

    def _product(self, vectors: Tensor) -> Tensor:
        # Columns share one linearisation; both they and the examples are cut so that tangents fit.
        result = torch.zeros_like(vectors) if self.ridge is None else self.ridge[:, None] * vectors
        per_column = 4 * max(1, self.objective.bytes_per_example()) * min(64, len(self.objective.data))
        width = max(1, min(vectors.shape[1], 256, WORKING_BYTES // per_column))
        for columns in torch.arange(vectors.shape[1], device=vectors.device).split(width):
            part = vectors[:, columns]
            for rows, x, y in self.objective.chunks(copies=4 * len(columns)):
                result[:, columns] += self._chunk(part, x, y, self.weights[rows] / len(self.objective.data))
        return result

    def _chunk(self, vectors: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _chunk")


class Hessian(DataCurvature):
    """``∇²F``: exact second derivatives, by forward-over-reverse differentiation of ``∇F``."""

    def _chunk(self, vectors, x, y, weights):
        gradient = grad(lambda theta: (weights * self.objective.losses(self._full(theta), x, y)).sum())
        return vmap(lambda v: jvp(gradient, (self.theta,), (v,))[1], in_dims=1, out_dims=1)(vectors)


class GGN(DataCurvature):
    """Generalised Gauss-Newton ``(1/m) Σ w_i J_iᵀ Λ_i J_i`` with ``Λ_i`` the loss's Hessian in the outputs:
    the Hessian of the model linearised at the parameters; positive semi-definite for convex losses."""

    def _chunk(self, vectors, x, y, weights):
        def model(theta):
            return self.objective.outputs(self._full(theta), x)

        outputs, pull_back = vjp(model, self.theta)
        gradient = grad(lambda z: (weights * self.objective.loss(z, y)).sum())

        def product(v):
            pushed = jvp(model, (self.theta,), (v,))[1]  # J v
            return pull_back(jvp(gradient, (outputs,), (pushed,))[1])[0]  # Jᵀ Λ J v

        return vmap(product, in_dims=1, out_dims=1)(vectors)

    def _dense(self) -> Tensor:
        """``Σ w_i J_iᵀ Λ_i J_i / m`` from each example's Jacobian: C backward passes and one matrix product where
        P products would each take a forward and a backward pass; several times faster for C ≪ P."""
        _load_forward_mode()
        o, size = self.objective, self.shape[0]
        count = o.outputs(self.full, o.data.x[:1]).numel()
        if 4 * count > size:
            return super()._dense()

        def outputs(theta, x):
            return o.outputs(self._full(theta), x[None]).reshape(-1)

        def loss(z, y, like):
            return o.loss(z.reshape(like.shape)[None], y[None])[0]

        like = o.outputs(self.full, o.data.x[:1])[0].detach()
        result = torch.diag(self.full.new_zeros(size) if self.ridge is None else self.ridge)
        for rows, x, y in o.chunks(copies=2 + 4 * 8 * count * size // o.bytes_per_example()):
            z = vmap(outputs, in_dims=(None, 0))(self.theta, x)
            jacobian = vmap(jacrev(outputs), in_dims=(None, 0))(self.theta, x)  # (B, C, P)
            bend = vmap(lambda z, y: hessian(loss)(z, y, like))(z, y)  # (B, C, C)
            weights = self.weights[rows] / len(o.data)
            result += ((weights[:, None, None] * bend) @ jacobian).flatten(0, 1).T @ jacobian.flatten(0, 1)
        return result


def curvature(kind: str, objective: Objective, full: Tensor, weights: Tensor | None = None) -> DataCurvature:
    """The stage's curvature by name, ``"hessian"`` or ``"ggn"``, penalty included."""
    kinds = {"hessian": Hessian, "ggn": GGN}
    if kind not in kinds:
        raise ValueError(f"curvature={kind!r} must be one of {sorted(kinds)}")
    return kinds[kind](objective, full, weights)


def example_chunks(objective: Objective, examples: Examples | None = None) -> Iterator:
    """`Objective.chunks` so small that a few ``(B, P)`` matrices fit beside the activations."""
    copies = 2 + 4 * 8 * objective.layout.size // objective.bytes_per_example()
    return objective.chunks(examples, copies=copies)


def per_example_gradients(
    objective: Objective,
    full: Tensor,
    examples: Examples | None = None,
    function=None,
    *,
    every: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """``(positions, ∇f_i)`` chunk by chunk, ``(B, P)`` each.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        examples: default the stage's own data.
        function: ``(outputs, targets) -> (B,)``; default the stage's loss.
        every: derivatives by all D parameters instead of the trained P.
    """
    o, function = objective, function or objective.loss
    theta = full if every else full[o.rows]

    def value(theta, x, y):
        return function(o.outputs(theta if every else o.join(theta, full), x[None]), y[None])[0]

    for rows, x, y in example_chunks(o, examples):
        yield rows, vmap(grad(value), in_dims=(None, 0, 0))(theta, x, y)


def example_products(
    objective: Objective,
    full: Tensor,
    vectors: Tensor,
    examples: Examples | None = None,
    *,
    mode: str = "auto",
) -> Tensor:
    """``∇f_iᵀ v_q`` for every example and vector: ``vectors`` (P, Q) → ``(Q, N)``.

    Forward mode (one directional derivative per vector, no gradient is ever formed) is cheaper for one
    or two vectors, per-example gradients beyond; ``mode`` is ``"auto"``, ``"forward"`` or ``"gradients"``.
    """
    if mode not in ("auto", "forward", "gradients"):
        raise ValueError(f"mode={mode!r} must be 'auto', 'forward' or 'gradients'")
    o = objective
    if vectors.ndim != 2 or vectors.shape[0] != o.size:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}, expected (P, Q) with P = {o.size}")
    result = vectors.new_empty(vectors.shape[1], len(o.data if examples is None else examples))
    if mode == "gradients" or (mode == "auto" and vectors.shape[1] > 2):
        for rows, gradients in per_example_gradients(o, full, examples):
            result[:, rows] = (gradients @ vectors).T
        return result
    theta = full[o.rows]
    for rows, x, y in o.chunks(examples, copies=3):
        for q, v in enumerate(vectors.T):
            result[q, rows] = jvp(lambda t, x=x, y=y: o.losses(o.join(t, full), x, y), (theta,), (v,))[1]
    return result


def own_products(kind: str, objective: Objective, full: Tensor, x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    """``h_i v_i``: each example's own curvature times a vector of its own, ``vectors`` (B, P) → (B, P).

    ``kind`` is ``"hessian"`` for ``h_i = ∇²f_i`` or ``"ggn"`` for ``J_iᵀ Λ_i J_i``.
    """
    o, theta = objective, full[objective.rows]

    def outputs(theta, x):
        return o.outputs(o.join(theta, full), x[None])

    def product(x, y, v):
        def loss(z):
            return o.loss(z, y[None])[0]

        if kind == "hessian":
            return jvp(grad(lambda t: loss(outputs(t, x))), (theta,), (v,))[1]
        z, pull_back = vjp(lambda t: outputs(t, x), theta)
        pushed = jvp(lambda t: outputs(t, x), (theta,), (v,))[1]
        return pull_back(jvp(grad(loss), (z,), (pushed,))[1])[0]

    return vmap(product)(x, y, vectors)


TRANSPOSE_FIXED, TRANSPOSE_PER_QUERY = 4, 5  # activation sets one example costs below


def gradient_transpose(
    o: Objective,
    full: Tensor,
    batch: Tensor,
    cotangents: Tensor,
    weights: Tensor | None = None,
    every: bool = False,
    memory: int = 10**9,
) -> tuple[Tensor, Tensor]:
    """Pull ``ḡ`` back through ``(θ, w) ↦ (1/|B|) Σ_{i∈B} w_i ∇f_i(θ)``.

    By θ that is the Hessian-vector product ``∇²L_B ḡ``, by ``w_i`` the score ``∇f_i·ḡ / |B|``: one pass gives both.

    Args:
        o: the stage.
        full: all its parameters ``(D,)``.
        batch: positions of B in the stage's data.
        cotangents: ḡ ``(Q, P)``.
        weights: w ``(|B|,)``, one by default.
        every: derivatives by all D parameters, not only the trained P: the other rows hold G_WT ḡ.
        memory: bytes that the pass may take.

    Returns:
        ``(Q, P or D)`` products, the penalty's left out, and ``(Q, |B|)`` scores.
    """
    point = full if every else full[o.rows]
    if every:
        cotangents = cotangents.new_zeros(len(cotangents), len(full)).index_copy(1, o.rows, cotangents)
    products, scores = torch.zeros_like(cotangents), []
    weights = full.new_ones(len(batch)) if weights is None else weights
    # PyTorch has fast float64 convolutions forwards only; everywhere else reverse mode is cheaper (bench_unrolled.py).
    forward = full.dtype == torch.float64 and any(len(shape) > 2 for shape in o.layout.shapes.values())
    start = 0
    for _, x, y in o.chunks(copies=TRANSPOSE_FIXED + TRANSPOSE_PER_QUERY * len(cotangents), rows=batch, memory=memory):

        def risk(theta, w, x=x, y=y):
            return (w * o.losses(theta if every else o.join(theta, full), x, y)).sum()

        by_theta, by_weight = _transpose(risk, point, weights[start : start + len(x)] / len(batch), cotangents, forward)
        start += len(x)
        products += by_theta
        scores.append(by_weight / len(batch))
    return products, torch.cat(scores, dim=1)


def _transpose(risk: Callable, theta: Tensor, weights: Tensor, cotangents: Tensor, forward: bool):
    """Many cotangents through ``(θ, w) ↦ ∂risk/∂θ``, by θ and by w; three ways to the same numbers."""
    if len(cotangents) == 1:  # PyTorch's own double backward has the least overhead
        with torch.enable_grad():
            theta, weights = theta.detach().requires_grad_(), weights.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(risk(theta, weights), theta, create_graph=True)
            by = torch.autograd.grad(gradient @ cotangents[0], (theta, weights), materialize_grads=True)
        return by[0][None], by[1][None]
    if forward:  # the Hessian is symmetric, and ∇f_i·ḡ is f_i's derivative along ḡ
        gradients = grad(risk, argnums=(0, 1))
        return vmap(lambda v: jvp(lambda t: gradients(t, weights), (theta,), (v,))[1])(cotangents)
    return vmap(vjp(grad(risk), theta, weights)[1])(cotangents)
