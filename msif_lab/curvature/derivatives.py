"""Derivatives of single examples and mini-batches, and their products with many vectors."""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, func
from torch.func import grad, vmap

from ..arguments import check_function, check_instance, check_tensor, shown
from ..data.examples import Examples
from ..errors import UnsupportedModelError
from ..objective.exclusive import exclusive
from ..objective.objective import Objective
from ..objective.questions import Question
from ..objective.switches import exact_products
from .gate import Probe, agree
from .layers import find_layers, trace

__all__ = [
    "example_products",
    "gradient_transpose",
    "own_products",
    "per_example_gradients",
    "plain_routes",
    "product_chunks",
    "query_gradients",
]


@functools.cache
def _load_forward_mode() -> None:
    """Make PyTorch load its forward-mode rules, which warns about its own code in some versions."""
    one = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        func.jvp(torch.sin, (one,), (one,))


@exclusive
def jvp(function, primals, tangents):
    """`torch.func.jvp` without PyTorch's own deprecation notices.

    PyTorch counts the levels of forward mode for all threads together.
    """
    _load_forward_mode()
    return func.jvp(function, primals, tangents)


def pull_back(
    outputs: Tensor,
    inputs: Tensor | Sequence[Tensor],
    cotangents: Tensor,
    together: bool = True,
) -> tuple[Tensor, ...]:
    """``uᵀ ∂outputs/∂inputs`` for cotangents u ``(K, *outputs)``: ``(K, *input)`` for each input.

    The graph is kept. `torch.func.vjp` is avoided because its first use in a process imports
    torch._dynamo, 110 MB, and ``is_grads_batched`` because it takes convolutions one by one.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not outputs.requires_grad or not len(cotangents):
        return tuple(i.new_zeros(len(cotangents), *i.shape) for i in inputs)
    through = functools.partial(
        torch.autograd.grad, outputs, inputs, retain_graph=True, materialize_grads=True
    )
    if together and len(cotangents) > 2:
        return vmap(through)(cotangents)
    # For one or two cotangents vmap is pure overhead; for some operators it is wrong.
    by_cotangent = [through(cotangent) for cotangent in cotangents]
    return tuple(torch.stack(by_input) for by_input in zip(*by_cotangent, strict=True))


def push_forward(function: Callable, point: Tensor, tangents: Tensor) -> Tensor:
    """``J v`` of a function at a point for tangents v ``(K, *point)``: ``(K, *output)``."""

    def along(v):
        return jvp(function, (point,), (v,))[1]

    if len(tangents) > 2:
        return vmap(along)(tangents)
    # For one or two tangents vmap is pure overhead.
    return torch.stack([along(v) for v in tangents])


def rows_of_jacobian(outputs: Tensor, point: Tensor) -> Tensor:
    """``∂outputs/∂point`` by a backward pass for each output, ``(C, P)``; the graph is kept."""
    through = functools.partial(
        torch.autograd.grad, inputs=point, retain_graph=True, materialize_grads=True
    )
    return torch.stack([through(one)[0] for one in outputs.reshape(-1)])


def push_by_reverse(
    outputs: Tensor, point: Tensor, tangents: Tensor, together: bool = False
) -> Tensor:
    """``J v`` as `push_forward`, from the outputs' graph and by reverse mode alone.

    ``Jᵀ u`` is linear in u, so pulling v back through it by u gives ``J v``.
    """
    with torch.enable_grad():
        u = torch.ones_like(outputs, requires_grad=True)  # some backward passes take log u
        (pulled,) = torch.autograd.grad(outputs, point, u, create_graph=True)
    return pull_back(pulled, u, tangents, together)[0]


def forward_agrees(o: Objective, every: bool = False) -> bool:
    """Whether forward mode gives what reverse mode does for this model and its loss.

    Not for `Embedding(padding_idx)`, whose padding row has a tangent but no gradient, nor where
    PyTorch has no forward derivative.
    """
    return o.once(("forward", every), lambda: _forward_agrees(o, every))


def _forward_agrees(o: Objective, every: bool) -> bool:
    probe = Probe.of(o)
    with torch.no_grad():
        u = probe.draw(*o.outputs(probe.full, probe.x).shape)
    v = probe.draw(len(probe.theta(every)), seed=1)

    def fast() -> Tensor:
        pushed = jvp(lambda t: probe.outputs(t, probe.x, every), (probe.theta(every),), (v,))[1]
        return (pushed * u).flatten(1).sum(1, keepdim=True)

    def value(theta: Tensor, i: int) -> Tensor:
        return (probe.outputs(theta, probe.x[i : i + 1], every)[0] * u[i]).sum()

    return agree(fast, lambda: probe.gradients(value, every) @ v[:, None])


def forward_agrees_for_losses(o: Objective) -> bool:
    """Whether forward mode through model and loss gives each example's ``∇f_i·v``."""
    return o.once("forward losses", lambda: _forward_losses_agree(o))


def _forward_losses_agree(o: Objective) -> bool:
    probe = Probe.of(o)
    theta, v = probe.theta(False), probe.draw(o.size, seed=1)

    def losses(theta: Tensor) -> Tensor:
        return o.loss(probe.outputs(theta, probe.x, False), probe.y)

    def alone(theta: Tensor, i: int) -> Tensor:
        return o.loss(probe.outputs(theta, probe.x[i : i + 1], False), probe.y[i : i + 1]).sum()

    return agree(
        lambda: jvp(losses, (theta,), (v,))[1][:, None],
        lambda: probe.gradients(alone, False) @ v[:, None],
    )


def reverse_agrees(o: Objective, every: bool = False) -> bool:
    """Whether `push_by_reverse` gives ``J v``: not where a backward pass has no derivative."""
    return o.once(("reverse", every), lambda: _reverse_agrees(o, every))


def _reverse_agrees(o: Objective, every: bool) -> bool:
    probe = Probe.of(o)
    with torch.enable_grad():
        theta = probe.theta(every).detach().requires_grad_()
        z = probe.outputs(theta, probe.x, every)
    u = probe.draw(*z.shape)
    v = probe.draw(len(theta), seed=1)

    def value(theta: Tensor, i: int) -> Tensor:
        return (probe.outputs(theta, probe.x[i : i + 1], every)[0] * u[i]).sum()

    return agree(
        lambda: (push_by_reverse(z, theta, v[None])[0] * u).flatten(1).sum(1, keepdim=True),
        lambda: probe.gradients(value, every) @ v[:, None],
    )


def loss_together(o: Objective) -> bool:
    """Whether many tangents may go through the loss's own second derivative side by side."""
    return o.once("loss together", lambda: _loss_together(o))


def _loss_together(o: Objective) -> bool:
    probe = Probe.of(o)
    with torch.no_grad():
        z = probe.outputs(probe.theta(False), probe.x, False)
    u = probe.draw(3, *z.shape)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(o.loss(leaf, probe.y).sum(), leaf, create_graph=True)
    return agree(
        lambda: pull_back(slope, leaf, u)[0].flatten(1),
        lambda: pull_back(slope, leaf, u, False)[0].flatten(1),
    )


def together(o: Objective) -> bool:
    """Whether many cotangents may go back through the model's gradient side by side.

    Not where PyTorch's batched backward of an operator is missing or wrong, as `torch.cdist`'s is.
    """
    return o.once("together", lambda: _together_agrees(o))


def _together_agrees(o: Objective) -> bool:
    probe = Probe.of(o)
    theta = probe.theta(False).detach().requires_grad_()
    with torch.enable_grad():
        outputs = probe.outputs(theta, probe.x, False)
        total = o.loss(outputs, probe.y).sum()
        if not total.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(total, theta, create_graph=True)
    if not gradient.requires_grad:
        return True
    u = probe.draw(3, *outputs.shape)
    v = probe.draw(3, len(theta), seed=1)

    def products(side_by_side: bool) -> Tensor:
        first = pull_back(outputs, theta, u, side_by_side)[0]
        return torch.cat([first, pull_back(gradient, theta, v, side_by_side)[0]])

    try:
        return agree(lambda: products(True), lambda: products(False))
    except (RuntimeError, NotImplementedError):
        return False  # no second derivative at all; see `soundness`


def vectorised(o: Objective, every: bool = False) -> bool:
    """Whether the gradients of many examples may be computed side by side by `vmap`."""
    return o.once(("vmap", every), lambda: _vmap_agrees(Probe.of(o), o.loss, every))


def _vmap_agrees(probe: Probe, function: Callable, every: bool) -> bool:
    """Whether `vmap` of `grad` gives each example's gradient as it is alone."""

    def value(theta, x, y):
        return function(probe.outputs(theta, x[None], every), y[None])[0]

    def plain(theta: Tensor, i: int) -> Tensor:
        return value(theta, probe.x[i], probe.y[i])

    def fast() -> Tensor:
        return vmap(grad(value), in_dims=(None, 0, 0))(probe.theta(every), probe.x, probe.y)

    return agree(fast, lambda: probe.gradients(plain, every))


def _plain_gradient(value: Callable, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One example's gradient by plain reverse mode, ``(P,)``."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        result = value(leaf, x, y)
    if not result.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(result, leaf, materialize_grads=True)[0]


def _check_place(objective: Objective, full: Tensor, examples: Examples | None) -> None:
    """Refuse what is no objective, no vector of all its parameters, or no examples."""
    check_instance("objective", objective, Objective, "as pipeline.objective(stage) gives it")
    check_tensor("full", full, f"({objective.layout.size},)")
    if full.shape != (objective.layout.size,):
        raise ValueError(
            f"full has shape {tuple(full.shape)}, expected ({objective.layout.size},), all "
            "parameters of the model in one vector, as pipeline.trained() has them"
        )
    if examples is not None:
        check_instance("examples", examples, Examples, "wrap them: Examples(x, y)")


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
        every: derivatives in all D parameters instead of the trained P.
        rows: only these positions.
    """
    o = objective
    _check_place(o, full, examples)
    if function is not None:
        check_function("function", function, "(outputs, targets) -> (B,)")
    function = function or o.loss
    layers = find_layers(o, every)
    theta = full if every else o.trained.take(full)

    def value(theta, x, y):
        outputs = o.outputs(theta if every else o.parameters(theta, full), x[None])
        return function(outputs, y[None])[0]

    side_by_side = layers is None and (
        vectorised(o, every)
        if function is o.loss
        else _vmap_agrees(Probe(o, examples), function, every)
    )
    # Besides its activations, an example takes a few vectors of P numbers.
    gradient_bytes = (2 if layers else 8) * len(theta) * full.element_size()
    copies = 2 + gradient_bytes // o.bytes_per_example()
    for part, x, y in o.chunks(examples, copies, rows):
        if layers is None and side_by_side:
            yield part, vmap(grad(value), in_dims=(None, 0, 0))(theta, x, y)
        elif layers is None:
            alone = [_plain_gradient(value, theta, *one) for one in zip(x, y, strict=True)]
            yield part, torch.stack(alone)
        else:
            traced = trace(o, full, x, layers)
            yield part, traced.jacobian(traced.output_gradients(function, y), len(theta))[:, 0]


def query_gradients(
    objective: Objective, full: Tensor, question: Question, *, every: bool = True
) -> Tensor:
    """∇q of each row of a question at all parameters ``full`` (D,): ``(Q, D)``, or ``(1, D)``.

    Args:
        objective: the stage whose model answers.
        full: all its parameters.
        question: of each query, or one number of all queries.
        every: derivatives in all D parameters instead of the trained P.
    """
    if question.combine is not None:
        return question.gradient(objective, full, every)
    asked = question.queries, question.function
    gradients = full.new_empty(len(question), len(full) if every else objective.size)
    for rows, part in per_example_gradients(objective, full, *asked, every=every):
        gradients[rows] = part
    return gradients


def example_products(
    objective: Objective,
    full: Tensor,
    vectors: Tensor,
    examples: Examples | None = None,
    *,
    mode: str = "auto",
) -> Tensor:
    """``∇f_iᵀ v_q`` for every example and vector, ``vectors`` (P, Q) → ``(Q, N)``.

    See `product_chunks` for the modes.
    """
    _check_place(objective, full, examples)
    check_tensor("vectors", vectors, "(P, Q)")
    count = len(objective.data if examples is None else examples)
    result = vectors.new_empty(vectors.shape[-1], count)
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
    rows: Tensor | None = None,
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """``(positions, ∇f_iᵀ v_q (Q, B))`` chunk by chunk, so that any amount of data will do.

    Three modes give the same numbers. ``"layers"`` takes one backward pass for all vectors and then
    ``Σ_l s_lᵀ V a_l`` layer by layer, in whichever order needs fewer multiplications
    (`Layer.along`). ``"forward"`` takes one directional derivative per vector and forms no
    gradient. ``"gradients"`` multiplies per-example gradients by the (P, Q) matrix. ``"auto"``
    takes the cheapest.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        vectors: v ``(P, Q)``.
        examples: default the stage's own data.
        mode: one of the above.
        rows: only these positions.

    Raises:
        ValueError: an unknown mode, or vectors of another shape.
        UnsupportedModelError: ``mode="forward"`` gives wrong numbers for this model.
    """
    o = objective
    _check_place(o, full, examples)
    check_tensor("vectors", vectors, "(P, Q)")
    layers = find_layers(o)
    modes = ("auto", "forward", "gradients", "layers")
    if mode not in modes or (mode == "layers" and layers is None):
        raise ValueError(
            f"mode={shown(mode)} must be 'auto', 'forward', 'gradients', "
            "or 'layers' where `Linear` and `Conv2d` hold all that is trained"
        )
    if vectors.ndim != 2 or vectors.shape[0] != o.size:
        raise ValueError(
            f"vectors have shape {tuple(vectors.shape)}, expected (P, Q) with P = {o.size}"
        )
    if mode == "forward" and not forward_agrees_for_losses(o):
        raise UnsupportedModelError(
            f"{o.where}: mode='forward' disagrees with reverse mode for this model, as with "
            "Embedding(padding_idx=...), or PyTorch has no forward derivative of a layer or loss; "
            "use mode='gradients'"
        )
    if mode == "auto":
        mode = cheapest_products(o, vectors.shape[1])
    if mode == "gradients":
        for part, gradients in per_example_gradients(o, full, examples, rows=rows):
            yield part, (gradients @ vectors).T
    elif mode == "layers":
        most = max(layer.bytes(vectors.shape[1], vectors.element_size()) for layer in layers)
        copies = 2 + 2 * most // o.bytes_per_example()
        for part, x, y in o.chunks(examples, copies, rows):
            traced = trace(o, full, x, layers)
            yield part, traced.along(traced.output_gradients(o.loss, y), vectors).T
    else:
        theta = o.trained.take(full)
        for part, x, y in o.chunks(examples, 3, rows):

            def losses(theta, x=x, y=y):
                return o.losses(o.parameters(theta, full), x, y)

            slopes = [jvp(losses, (theta,), (v,))[1] for v in vectors.T]
            yield part, torch.stack(slopes) if slopes else vectors.new_empty(0, len(x))


def cheapest_products(o: Objective, queries: int) -> str:
    """The cheapest mode of `product_chunks`: layers where they hold all of θ.

    Elsewhere directional derivatives cost an epoch per query, and per-example gradients 2.6 epochs
    for all queries. That holds for 11 million parameters too: reading (P, Q) once for every few
    examples takes less time than Q derivatives.
    """
    if find_layers(o) is not None:
        return "layers"
    return "forward" if queries <= 2 and forward_agrees_for_losses(o) else "gradients"


def plain_routes(o: Objective) -> list[str]:
    """Where a fast route is wrong or missing for this model: what is done instead, in words."""
    found = []
    if find_layers(o) is None and not vectorised(o):
        found.append(
            "gradients one example at a time, since vmap over examples is wrong or not possible"
        )
    if not forward_agrees(o):
        found.append("reverse mode alone, since forward mode's derivatives are wrong or missing")
    if not together(o):
        found.append("products one vector at a time, since batched backward passes are wrong")
    if not o.known("lanes", True):
        found.append("retraining one weighting at a time, since vmap over weightings is wrong")
    return found


def own_products(
    kind: str, objective: Objective, full: Tensor, x: Tensor, y: Tensor, vectors: Tensor
) -> Tensor:
    """``h_i v_i``: each example's own curvature times its own vector, ``(B, P)`` → ``(B, P)``.

    ``kind`` is ``"hessian"`` for ``h_i = ∇²f_i`` or ``"ggn"`` for ``J_iᵀ Λ_i J_i``.
    """
    o = objective
    if not o.once(("own", kind), lambda: _own_agrees(kind, o)):
        return _own_one_by_one(kind, o, full, x, y, vectors)
    return _own_products(kind, o, full, x, y, vectors)


def _own_agrees(kind: str, o: Objective) -> bool:
    probe = Probe.of(o)
    given = kind, o, probe.full, probe.x, probe.y, probe.draw(len(probe.x), o.size)
    return agree(lambda: _own_products(*given), lambda: _own_one_by_one(*given))


def _own_one_by_one(
    kind: str, o: Objective, full: Tensor, x: Tensor, y: Tensor, vectors: Tensor
) -> Tensor:
    """`own_products` by plain reverse mode, one example at a time."""
    rows = []
    for i, v in enumerate(vectors):
        one = slice(i, i + 1)
        rows.append(own_curvature(kind, o, full, x[one], y[one], v[None])[0])
    return torch.stack(rows)


def own_curvature(
    kind: str,
    o: Objective,
    full: Tensor,
    x: Tensor,
    y: Tensor,
    vectors: Tensor,
    every: bool = False,
) -> Tensor:
    """One example's own curvature times vectors ``(K, P)``, by plain reverse mode, one by one.

    Args:
        kind: as in `own_products`.
        o: the stage.
        full: all its parameters ``(D,)``.
        x, y: the example, ``(1, ...)``.
        vectors: ``(K, P)``.
        every: derivatives in all D parameters instead of the trained P.
    """
    with torch.enable_grad(), exact_products():
        theta = (full if every else o.trained.take(full)).detach().requires_grad_()
        z = o.outputs(theta if every else o.parameters(theta, full), x)
        if kind == "hessian":
            risk = o.loss(z, y).sum()
            (gradient,) = torch.autograd.grad(risk, theta, create_graph=True)
            return pull_back(gradient, theta, vectors, together=False)[0]
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(o.loss(leaf, y).sum(), leaf, create_graph=True)
        if reverse_agrees(o, every):
            pushed = push_by_reverse(z, theta, vectors)
        else:
            pushed = (vectors @ rows_of_jacobian(z, theta).T).view(-1, *z.shape)
        bent = pull_back(slope, leaf, pushed, together=False)[0]
        return pull_back(z, theta, bent, together=False)[0]


def _own_products(
    kind: str, o: Objective, full: Tensor, x: Tensor, y: Tensor, vectors: Tensor
) -> Tensor:
    """`own_products` with all examples side by side."""
    with torch.enable_grad():
        # Each example gets its own copy of θ, to be differentiated along its own vector.
        theta = o.trained.take(full).repeat(len(x), 1).requires_grad_()
        z = vmap(lambda t, x: o.outputs(o.parameters(t, full), x[None])[0])(theta, x)
        if kind == "hessian":
            (gradient,) = torch.autograd.grad(o.loss(z, y).sum(), theta, create_graph=True)
            return pull_back(gradient, theta, vectors[None])[0][0]
        # Jᵀ u is linear in u, so pulling v back through it by u gives J v.
        u = torch.ones_like(z, requires_grad=True)  # some backward passes take log u
        (pulled,) = torch.autograd.grad(z, theta, u, create_graph=True)
        pushed = pull_back(pulled, u, vectors[None])[0]  # J v
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(o.loss(leaf, y).sum(), leaf, create_graph=True)
        bent = pull_back(slope, leaf, pushed)[0]  # Λ J v
        return pull_back(z, theta, bent)[0][0]  # Jᵀ Λ J v


def cross_products(
    o: Objective,
    full: Tensor,
    names: Sequence[str],
    vectors: Tensor,
    weights: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """``G_WT v = ∂_W (1/m) Σ_i w_i ∇_T f_i · v``: the W-derivative of the mean slope along v.

    Each chunk takes one gradient in T, and each v one backward pass through its graph, to W only.

    Args:
        o: the stage, which trains T.
        full: all its parameters ``(D,)``.
        names: the parameters W, none of them among T.
        vectors: v ``(Q, P)``.
        weights: w ``(m,)``, one by default.
        rows: only these positions; the others count as of weight zero.

    Returns:
        ``(Q, |W|)``, in the order of ``names``.
    """
    named = o.layout.named(full)
    theta = o.trained.take(full)
    sizes = [len(o.layout.spans[name]) for name in names]
    result = vectors.new_zeros(len(vectors), sum(sizes))
    parts = result.split(sizes, 1)
    for positions, x, y in o.chunks(copies=2, rows=rows):
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            shared = [named[name].detach().requires_grad_() for name in names]
            parameters = o.parameters(leaf, full) | dict(zip(names, shared, strict=True))
            losses = o.losses(parameters, x, y)
            risk = (losses if weights is None else weights[positions] * losses).sum() / len(o.data)
            (slope,) = torch.autograd.grad(risk, leaf, create_graph=True)
        if not slope.requires_grad:  # no part of the loss depends on W and T together
            continue
        for q, v in enumerate(vectors):
            mixed = torch.autograd.grad(slope, shared, v, retain_graph=True, materialize_grads=True)
            for part, product in zip(parts, mixed, strict=True):
                part[q] += product.flatten()
    return result


def forward_is_cheaper(o: Objective, dtype: torch.dtype) -> bool:
    """Whether forward-over-reverse mode is faster for many directions.

    Only for float64 convolutions, which PyTorch runs fast in the forward direction alone; elsewhere
    reverse mode is cheaper (bench_unrolled.py).
    """
    convolutions = any(len(shape) > 2 for shape in o.layout.shapes.values())
    return dtype == torch.float64 and convolutions and forward_over_reverse_agrees(o)


def forward_over_reverse_agrees(o: Objective) -> bool:
    """Whether forward mode through the gradient gives the products that reverse mode does."""
    return o.once("forward over reverse", lambda: _forward_over_reverse_agrees(o))


def _forward_over_reverse_agrees(o: Objective) -> bool:
    probe = Probe.of(o)
    theta, v = probe.theta(False), probe.draw(3, o.size, seed=1)

    def risk(theta: Tensor) -> Tensor:
        return o.losses(o.parameters(theta, probe.full), probe.x, probe.y).sum()

    def plain() -> Tensor:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(risk(leaf), leaf, create_graph=True)
        return pull_back(gradient, leaf, v, False)[0]

    return agree(lambda: vmap(lambda v: jvp(grad(risk), (theta,), (v,))[1])(v), plain)


# How many sets of activations one example costs in `gradient_transpose`.
TRANSPOSE_FIXED = 4
TRANSPOSE_PER_QUERY = 5
LANE_BYTES = 30 * 10**6  # of lanes side by side; on a CPU more of them are slower than one by one


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

    The derivative in θ is the Hessian-vector product ``∇²L_B ḡ``, the one in ``w_i`` the score
    ``∇f_i·ḡ / |B|``: one pass gives both.

    Args:
        o: the stage.
        full: all its parameters ``(D,)``.
        batch: positions of B in the stage's data.
        cotangents: ḡ ``(Q, P)``.
        weights: w ``(|B|,)``, one by default.
        every: derivatives in all D parameters, not only the trained P; the rest are G_WT ḡ.
        memory: bytes that the pass may take.

    Returns:
        ``(Q, P or D)`` products, without the penalty's part, and ``(Q, |B|)`` scores.
    """
    point = full if every else o.trained.take(full)
    if every:
        cotangents = o.trained.put(cotangents.new_zeros(len(cotangents), len(full)), cotangents)
    products = torch.zeros_like(cotangents)
    scores = []
    weights = full.new_ones(len(batch)) if weights is None else weights
    forward, side_by_side = _transpose_ways(o, every)
    copies = TRANSPOSE_FIXED + TRANSPOSE_PER_QUERY * len(cotangents)
    start = 0
    for _, x, y in o.chunks(copies=copies, rows=batch, memory=memory):

        def risk(theta, w, x=x, y=y):
            return (w * o.losses(theta if every else o.parameters(theta, full), x, y)).sum()

        shares = weights[start : start + len(x)] / len(batch)
        by_theta, by_weight = _transpose(risk, point, shares, cotangents, forward, side_by_side)
        start += len(x)
        products += by_theta
        scores.append(by_weight / len(batch))
    return products, torch.cat(scores, dim=1)


def transpose_lanes(
    o: Objective,
    fulls: Tensor,
    batches: Tensor,
    cotangents: Tensor,
    weights: Tensor,
    every: bool = False,
    memory: int = 10**9,
) -> tuple[Tensor, Tensor]:
    """`gradient_transpose` of R lanes, each with parameters, mini-batch and cotangents of its own.

    Args:
        fulls, batches, cotangents, weights: ``(R, D)``, ``(R, B)``, ``(R, Q, P)``, ``(R, B)``.
        o, every, memory: as there; lanes go side by side as far as `LANE_BYTES` allow.

    Returns:
        ``(R, Q, P or D)`` products and ``(R, Q, B)`` scores.
    """
    copies = TRANSPOSE_FIXED + TRANSPOSE_PER_QUERY * cotangents.shape[1]
    cost = o.bytes_per_example() * copies * batches.shape[1]
    side = min(memory, LANE_BYTES) // cost
    way = _lanes_way(o, every) if side > 1 else None
    if way is None:
        lanes = zip(fulls, batches, cotangents, weights, strict=True)
        pairs = [gradient_transpose(o, *lane, every, memory) for lane in lanes]
        products, scores = zip(*pairs, strict=True)
        return torch.stack(products), torch.stack(scores)
    if every:
        wide = cotangents.new_zeros(*cotangents.shape[:2], fulls.shape[1])
        cotangents = o.trained.put(wide, cotangents)
    count = batches.shape[1]
    parts = [
        way(
            o, fulls[i], o.data.x[batches[i]], o.data.y[batches[i]], cotangents[i], w / count, every
        )
        for i, w in zip(torch.arange(len(fulls)).split(side), weights.split(side), strict=True)
    ]
    products, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    return products, scores / count


def _lanes_way(o: Objective, every: bool) -> Callable | None:
    """How lanes go side by side; None if they had better not."""
    if _transpose_ways(o, every)[0]:
        return _lanes_forward
    # PyTorch's convolutions with other weights for each lane are slower than one after the other.
    flat = all(len(shape) <= 2 for shape in o.layout.shapes.values())
    if not flat or not o.known("lanes", True):
        return None
    agrees = o.once(("transpose lanes", every), lambda: _lanes_agree(o, every))
    return _lanes_in_reverse if agrees else None


def _lanes_forward(o, fulls, x, y, cotangents, shares, every) -> tuple[Tensor, Tensor]:
    """Pushes every lane's cotangents forward: ``(R, Q, P or D)`` and ``(R, Q, B)``."""

    def one(full, x, y, v, w):
        def risk(theta, w):
            return (w * o.losses(theta if every else o.parameters(theta, full), x, y)).sum()

        gradients = grad(risk, argnums=(0, 1))
        point = full if every else o.trained.take(full)
        return vmap(lambda v: jvp(lambda t: gradients(t, w), (point,), (v,))[1])(v)

    return vmap(one)(fulls, x, y, cotangents, shares)


def _lanes_in_reverse(o, fulls, x, y, cotangents, shares, every) -> tuple[Tensor, Tensor]:
    """Pulls every lane's cotangents back through the gradient of the sum of all lanes' risks."""

    def losses(theta, full, x, y):
        return o.losses(theta if every else o.parameters(theta, full), x, y)

    with torch.enable_grad():
        theta = (fulls if every else o.trained.take(fulls)).detach().requires_grad_()
        shares = shares.detach().requires_grad_()
        risk = (shares * vmap(losses)(theta, fulls, x, y)).sum()
        (gradient,) = torch.autograd.grad(risk, theta, create_graph=True)
    side_by_side = _transpose_ways(o, every)[1]
    pulled = pull_back(gradient, (theta, shares), cotangents.movedim(1, 0), side_by_side)
    return tuple(part.movedim(0, 1) for part in pulled)


def _lanes_agree(o: Objective, every: bool) -> bool:
    probe = Probe.of(o)
    order = torch.arange(len(probe.y), device=o.device)
    rows = torch.stack([order, order.flip(0)])
    fulls = probe.full + 0.1 * probe.draw(2, len(probe.full))
    shares = 1 + probe.draw(*rows.shape).sign() / 2
    cotangents = probe.draw(2, 3, o.layout.size if every else o.size, seed=1)

    def in_turn() -> Tensor:
        pairs = []
        for full, row, v, w in zip(fulls, rows, cotangents, shares, strict=True):

            def risk(theta, w, full=full, row=row):
                parameters = theta if every else o.parameters(theta, full)
                return (w * o.losses(parameters, probe.x[row], probe.y[row])).sum()

            point = full if every else o.trained.take(full)
            pairs.append(torch.cat(_transpose(risk, point, w, v, False, False), 1))
        return torch.stack(pairs)

    def at_once() -> Tensor:
        x, y = probe.x[rows], probe.y[rows]
        return torch.cat(_lanes_in_reverse(o, fulls, x, y, cotangents, shares, every), 2)

    return agree(at_once, in_turn)


def _transpose_ways(o: Objective, every: bool) -> tuple[bool, bool]:
    """Whether `_transpose` may go forward, and with the cotangents side by side."""

    def find() -> tuple[bool, bool]:
        ways = forward_is_cheaper(o, o.dtype), together(o)
        return ways if not any(ways) or _transpose_agrees(o, every, *ways) else (False, False)

    return o.once(("transpose", every), find)


def _transpose_agrees(o: Objective, every: bool, *ways: bool) -> bool:
    probe = Probe.of(o)
    weights = 1 + probe.draw(len(probe.y)).sign() / 2
    cotangents = probe.draw(3, len(probe.theta(every)), seed=1)

    def risk(theta, w):
        return (w * o.loss(probe.outputs(theta, probe.x, every), probe.y)).sum()

    def both(*ways: bool) -> Tensor:
        return torch.cat(_transpose(risk, probe.theta(every), weights, cotangents, *ways), 1)

    return agree(lambda: both(*ways), lambda: both(False, False))


def _transpose(
    risk: Callable,
    theta: Tensor,
    weights: Tensor,
    cotangents: Tensor,
    forward: bool,
    side_by_side: bool,
) -> tuple[Tensor, Tensor]:
    """Pull many cotangents back through ``(θ, w) ↦ ∂risk/∂θ``, to θ and to w."""
    if forward and len(cotangents) > 1:
        # Pushing forward gives the same numbers: the Hessian is symmetric, and ∇f_i·ḡ is the
        # derivative of f_i along ḡ.
        gradients = grad(risk, argnums=(0, 1))

        def along(v):
            return jvp(lambda t: gradients(t, weights), (theta,), (v,))[1]

        return vmap(along)(cotangents)
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        weights = weights.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(risk(theta, weights), theta, create_graph=True)
    return pull_back(gradient, (theta, weights), cotangents, side_by_side)
