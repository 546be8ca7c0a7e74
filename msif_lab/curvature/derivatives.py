"""Derivatives of single examples and of mini-batches: gradients, their products with many vectors,
own curvature.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, func
from torch.func import grad, vmap

from ..data.examples import Examples
from ..objective.objective import Objective
from .layers import find_layers, trace

__all__ = [
    "example_products",
    "gradient_transpose",
    "own_products",
    "per_example_gradients",
    "product_chunks",
]


@functools.cache
def _load_forward_mode() -> None:
    """PyTorch loads its forward-mode rules at first use and, in some versions, warns about its own
    code.
    """
    one = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        func.jvp(torch.sin, (one,), (one,))


def jvp(function, primals, tangents):
    """`torch.func.jvp` without PyTorch's own deprecation notices."""
    _load_forward_mode()
    return func.jvp(function, primals, tangents)


def pull_back(
    outputs: Tensor, inputs: Tensor | Sequence[Tensor], cotangents: Tensor
) -> tuple[Tensor, ...]:
    """``uᵀ ∂outputs/∂inputs`` for cotangents u ``(K, *outputs)``: ``(K, *input)`` for each input;
    the graph stays.

    Not by `torch.func.vjp`, whose first use in a process imports torch._dynamo, 110 MB; nor by
    ``is_grads_batched``, which takes convolutions one by one.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not outputs.requires_grad or not len(cotangents):
        return tuple(i.new_zeros(len(cotangents), *i.shape) for i in inputs)
    through = functools.partial(
        torch.autograd.grad, outputs, inputs, retain_graph=True, materialize_grads=True
    )
    if len(cotangents) > 2:
        return vmap(through)(cotangents)
    # vmap would only cost
    return tuple(map(torch.stack, zip(*map(through, cotangents), strict=True)))


def push_forward(function: Callable, point: Tensor, tangents: Tensor) -> Tensor:
    """``J v`` of a function at a point for tangents v ``(K, *point)``: ``(K, *output)``."""
    if len(tangents) > 2:
        return vmap(lambda v: jvp(function, (point,), (v,))[1])(tangents)
    return torch.stack([jvp(function, (point,), (v,))[1] for v in tangents])  # vmap would only cost


def per_example_gradients(
    objective: Objective,
    full: Tensor,
    examples: Examples | None = None,
    function=None,
    *,
    every: bool = False,
    rows: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """``(positions, ∇f_i)`` chunk by chunk, ``(B, P)`` each.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        examples: default the stage's own data.
        function: ``(outputs, targets) -> (B,)``; default the stage's loss.
        every: derivatives by all D parameters instead of the trained P.
        rows: only these positions.
    """
    o, function, layers = objective, function or objective.loss, find_layers(objective, every)
    theta = full if every else o.trained.take(full)

    def value(theta, x, y):
        return function(o.outputs(theta if every else o.parameters(theta, full), x[None]), y[None])[
            0
        ]

    # a few (B, P) beside the activations
    copies = 2 + (2 if layers else 8) * len(theta) * full.element_size() // o.bytes_per_example()
    for part, x, y in o.chunks(examples, copies, rows):
        if layers is None:
            yield part, vmap(grad(value), in_dims=(None, 0, 0))(theta, x, y)
        else:
            traced = trace(o, full, x, layers)
            yield part, traced.jacobian(traced.output_gradients(function, y), len(theta))[:, 0]


def example_products(
    objective: Objective,
    full: Tensor,
    vectors: Tensor,
    examples: Examples | None = None,
    *,
    mode: str = "auto",
) -> Tensor:
    """``∇f_iᵀ v_q`` for every example and vector: ``vectors`` (P, Q) → ``(Q, N)``; see
    `product_chunks`.
    """
    result = vectors.new_empty(
        vectors.shape[-1], len(objective.data if examples is None else examples)
    )
    for rows, products in product_chunks(objective, full, vectors, examples, mode=mode):
        result[:, rows] = products
    return result


def product_chunks(
    objective: Objective,
    full: Tensor,
    vectors: Tensor,
    examples: Examples | None = None,
    *,
    mode: str = "auto",
) -> Iterator[tuple[slice, Tensor]]:
    """``(positions, ∇f_iᵀ v_q (Q, B))`` chunk by chunk, so that data of any length pass through.

    Three ways to the same numbers: ``"layers"``, one backward pass for all queries and layer by
    layer ``Σ_l s_lᵀ V a_l`` by whatever takes fewer multiplications (`Layer.along`); ``"forward"``,
    one directional derivative per vector and no gradient at all; ``"gradients"``, per-example
    gradients times the (P, Q) matrix.
    """
    o, layers = objective, find_layers(objective)
    if mode not in ("auto", "forward", "gradients", "layers") or (
        mode == "layers" and layers is None
    ):
        known = "'auto', 'forward', 'gradients', or 'layers' where `Linear` and `Conv2d` hold all that is trained"
        raise ValueError(f"mode={mode!r} must be {known}")
    if vectors.ndim != 2 or vectors.shape[0] != o.size:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)}, expected (P, Q) with P = {o.size}"
        )
    if mode == "auto":
        mode = cheapest_products(o, vectors.shape[1])
    if mode == "gradients":
        for rows, gradients in per_example_gradients(o, full, examples):
            yield rows, (gradients @ vectors).T
    elif mode == "layers":
        most = max(layer.bytes(vectors.shape[1], vectors.element_size()) for layer in layers)
        for rows, x, y in o.chunks(examples, copies=2 + 2 * most // o.bytes_per_example()):
            traced = trace(o, full, x, layers)
            yield rows, traced.along(traced.output_gradients(o.loss, y), vectors).T
    else:
        theta = o.trained.take(full)
        for rows, x, y in o.chunks(examples, copies=3):
            at = functools.partial(lambda x, y, t: o.losses(o.parameters(t, full), x, y), x, y)
            slopes = [jvp(at, (theta,), (v,))[1] for v in vectors.T]
            yield rows, torch.stack(slopes) if slopes else vectors.new_empty(0, len(x))


def cheapest_products(o: Objective, queries: int) -> str:
    """The mode of `product_chunks` that is cheapest: layers where they hold θ.

    Elsewhere a directional derivative costs an epoch a query, and per-example gradients 2.6 for all
    of them. That holds for 11 million parameters too: reading (P, Q) for every few examples takes
    less than Q derivatives.
    """
    if find_layers(o) is not None:
        return "layers"
    return "forward" if queries <= 2 else "gradients"


def own_products(
    kind: str, objective: Objective, full: Tensor, x: Tensor, y: Tensor, vectors: Tensor
) -> Tensor:
    """``h_i v_i``: each example's own curvature times a vector of its own, ``vectors`` (B, P) → (B,
    P).

    ``kind`` is ``"hessian"`` for ``h_i = ∇²f_i`` or ``"ggn"`` for ``J_iᵀ Λ_i J_i``.
    """
    o = objective
    with torch.enable_grad():
        # a copy each, to meet a vector of its own
        theta = o.trained.take(full).repeat(len(x), 1).requires_grad_()
        z = vmap(lambda t, x: o.outputs(o.parameters(t, full), x[None])[0])(theta, x)
        if kind == "hessian":
            (gradient,) = torch.autograd.grad(o.loss(z, y).sum(), theta, create_graph=True)
            return pull_back(gradient, theta, vectors[None])[0][0]
        free, leaf = torch.zeros_like(z, requires_grad=True), z.detach().requires_grad_()
        # Jᵀ u, linear in u: its transpose is J
        (back,) = torch.autograd.grad(z, theta, free, create_graph=True)
        (slope,) = torch.autograd.grad(o.loss(leaf, y).sum(), leaf, create_graph=True)
        pushed = pull_back(back, free, vectors[None])[0]
        return pull_back(z, theta, pull_back(slope, leaf, pushed)[0])[0][0]


def cross_products(
    o: Objective, full: Tensor, names: Sequence[str], vectors: Tensor, weights: Tensor | None = None
) -> Tensor:
    """``G_WT v``: the derivative by W of the mean loss's slope along v,
    ``∂_W (1/m) Σ_i w_i ∇_T f_i · v``.

    One gradient by T a chunk, whose graph each v goes back through once, to W only.

    Args:
        o: the stage, which trains T.
        full: all its parameters ``(D,)``.
        names: the parameters W, none of them among T.
        vectors: v ``(Q, P)``.
        weights: w ``(m,)``, one by default.

    Returns:
        ``(Q, |W|)``, in the order of ``names``.
    """
    named, theta = o.layout.named(full), o.trained.take(full)
    result = vectors.new_zeros(len(vectors), sum(len(o.layout.spans[name]) for name in names))
    parts = result.split([len(o.layout.spans[name]) for name in names], 1)
    for rows, x, y in o.chunks(copies=2):
        with torch.enable_grad():
            leaf, shared = (
                theta.detach().requires_grad_(),
                [named[n].detach().requires_grad_() for n in names],
            )
            losses = o.losses(
                o.parameters(leaf, full) | dict(zip(names, shared, strict=True)), x, y
            )
            risk = (losses if weights is None else weights[rows] * losses).sum() / len(o.data)
            (slope,) = torch.autograd.grad(risk, leaf, create_graph=True)
        if not slope.requires_grad:  # a loss that W and T do not share
            continue
        for q, v in enumerate(vectors):
            found = torch.autograd.grad(slope, shared, v, retain_graph=True, materialize_grads=True)
            for part, by in zip(parts, found, strict=True):
                part[q] += by.flatten()
    return result


def forward_is_cheaper(o: Objective, dtype: torch.dtype) -> bool:
    """Whether many directions go faster forward over reverse: PyTorch has fast float64 convolutions
    forwards only, and everywhere else reverse mode is cheaper (bench_unrolled.py).
    """
    return dtype == torch.float64 and any(len(shape) > 2 for shape in o.layout.shapes.values())


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

    By θ that is the Hessian-vector product ``∇²L_B ḡ``, by ``w_i`` the score ``∇f_i·ḡ / |B|``: one
    pass gives both.

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
    point = full if every else o.trained.take(full)
    if every:
        cotangents = o.trained.put(cotangents.new_zeros(len(cotangents), len(full)), cotangents)
    products, scores = torch.zeros_like(cotangents), []
    weights = full.new_ones(len(batch)) if weights is None else weights
    forward = forward_is_cheaper(o, full.dtype)
    start = 0
    for _, x, y in o.chunks(
        copies=TRANSPOSE_FIXED + TRANSPOSE_PER_QUERY * len(cotangents), rows=batch, memory=memory
    ):

        def risk(theta, w, x=x, y=y):
            return (w * o.losses(theta if every else o.parameters(theta, full), x, y)).sum()

        by_theta, by_weight = _transpose(
            risk, point, weights[start : start + len(x)] / len(batch), cotangents, forward
        )
        start += len(x)
        products += by_theta
        scores.append(by_weight / len(batch))
    return products, torch.cat(scores, dim=1)


def _transpose(risk: Callable, theta: Tensor, weights: Tensor, cotangents: Tensor, forward: bool):
    """Many cotangents through ``(θ, w) ↦ ∂risk/∂θ``, by θ and by w; two ways to the same numbers."""
    # the Hessian is symmetric, and ∇f_i·ḡ is f_i's derivative along ḡ
    if forward and len(cotangents) > 1:
        gradients = grad(risk, argnums=(0, 1))
        return vmap(lambda v: jvp(lambda t: gradients(t, weights), (theta,), (v,))[1])(cotangents)
    with torch.enable_grad():
        theta, weights = theta.detach().requires_grad_(), weights.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(risk(theta, weights), theta, create_graph=True)
    return pull_back(gradient, (theta, weights), cotangents)
