"""Hessian and generalised Gauss-Newton matrix of a stage as operators with algebra.

``H = Hessian(objective, full)`` is used as ``(H + damping) @ V``: it knows its shape, dtype and
device, and multiplies many vectors at once. Means are over all data, so the product does not depend
on how the data are cut into chunks.
"""

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ..arguments import check_instance, check_tensor
from ..data.examples import Examples
from ..memory import working_bytes
from ..objective.objective import Objective
from .derivatives import (
    forward_agrees,
    forward_is_cheaper,
    jvp,
    loss_together,
    own_curvature,
    pull_back,
    push_by_reverse,
    push_forward,
    reverse_agrees,
    rows_of_jacobian,
    together,
)
from .gate import Probe, agree
from .layers import Layer, find_layers, trace
from .operators import Operator

__all__ = ["GGN", "Hessian"]


def _require_length(name: str, tensor: Tensor, size: int) -> None:
    check_tensor(name, tensor, f"({size},)")
    if tensor.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({size},)")


class DataCurvature(Operator):
    """Curvature of a stage's mean loss ``(1/m) Σ_i w_i f_i`` and of its penalty.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        weights: example weights ``(m,)``; default one each.
        ridge: add the penalty's curvature, see `Objective.ridge`.
        every: over all D parameters instead of the trained P, and without the penalty; the
            off-diagonal block is the ``G_WT`` of the frozen case.
    """

    kind: str  # what `own_curvature` calls it

    def __init__(
        self,
        objective: Objective,
        full: Tensor,
        weights: Tensor | None = None,
        *,
        ridge: bool = True,
        every: bool = False,
    ):
        check_instance("objective", objective, Objective, "as pipeline.objective(stage) gives it")
        size = objective.layout.size if every else objective.size
        _require_length("full", full, objective.layout.size)
        super().__init__(size, full.dtype, full.device)
        if weights is not None:
            _require_length("weights", weights, len(objective.data))
            if not bool(torch.isfinite(weights).all()):
                raise ValueError("weights hold NaN or inf; 0 leaves an example out")
        self.objective = objective
        self.full = full
        self.every = every
        self.theta = full if every else objective.trained.take(full)
        self.weights = full.new_ones(len(objective.data)) if weights is None else weights
        self.ridge = objective.ridge if ridge and not every else None
        self.rows: Tensor | None = None  # only these examples
        # ‖∇F‖ here, where known: a symmetry's eigenvalues are of its size instead of 0
        self.gradient_norm = 0.0

    def part(self, rows: Tensor) -> "DataCurvature":
        """What the examples at ``rows`` add to the mean over all, without the penalty.

        Disjoint parts sum to the whole.
        """
        part = copy.copy(self)
        part.__dict__.pop("_twin", None)  # a Hessian's cached twin belongs to all rows
        part.rows = rows
        part.ridge = None
        return part

    def importance(self) -> Tensor:
        """How much each example matters for the curvature: ``|w_i| ‖∂f_i/∂z_i‖``, ``(m,)``.

        With z the outputs, this is the weight of the model's own second derivatives. It is small
        where a classifier is sure of the right label; the loss has little curvature there too.
        """
        o = self.objective
        slopes = []
        for _, x, y in o.chunks(copies=2):
            with torch.no_grad():
                z = o.outputs(self.full, x)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(o.loss(z.requires_grad_(), y).sum(), z)
            slopes.append(slope.flatten(1).norm(dim=1))
        return self.weights.abs() * torch.cat(slopes)

    def bend(self, outputs: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """``(w_i / m) Λ_i``, ``(B, C, C)``: Hessians of the weighted losses in the outputs.

        Args:
            outputs: of the model for a chunk, ``(B, ...)``.
            y: its targets.
            weights: w of its examples, ``(B,)``.
        """
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            risk = (weights * self.objective.loss(z, y)).sum() / len(self.objective.data)
            (slope,) = torch.autograd.grad(risk, z, create_graph=True)
            slope = slope.flatten(1)
        eye = torch.eye(slope.shape[1], dtype=z.dtype, device=z.device)
        units = eye[:, None].expand(-1, len(z), -1)  # (C, B, C)
        bent = pull_back(slope, z, units, loss_together(self.objective))[0]
        return bent.flatten(2).transpose(0, 1)

    def _chunks(self, copies: int):
        return self.objective.chunks(copies=copies, rows=self.rows)

    def _full(self, theta: Tensor) -> Tensor | dict[str, Tensor]:
        return theta if self.every else self.objective.parameters(theta, self.full)

    def _width(self, column: int, columns: int) -> int:
        """How many of ``columns`` to take at once if each costs ``column`` bytes per example.

        Few enough that 8 examples fit in memory, in pieces of equal width: for a conv net 11 + 9
        columns cost a sixth more than 10 + 10.
        """
        most = max(1, min(columns, 256, working_bytes(self.device, column) // (8 * column)))
        return -(-columns // -(-columns // most))

    def _product(self, vectors: Tensor) -> Tensor:
        columns = self._telling(vectors.shape[1])
        if self._trusted("product", columns):
            return self._fast_product(vectors)
        return self._plain_product(vectors)

    def _dense(self) -> Tensor:
        if self._makes_dense() and self._trusted("dense", 3):
            return self._fast_dense()
        return super()._dense()

    def _makes_dense(self) -> bool:
        """Whether there is a faster way to the matrix than products with unit vectors."""
        return False

    def _trusted(self, what: str, columns: int) -> bool:
        """Whether a fast way gives what plain reverse mode does, one example and vector at a time.

        Found out once for each way, on a few examples.
        """
        way = (what, type(self).__name__, self.every, self._way(columns))
        return self.objective.once(way, lambda: self._agrees(what, columns))

    def _way(self, columns: int) -> tuple:
        """What decides how products with this many columns are computed."""
        return (columns > 2,)

    def _telling(self, columns: int) -> int:
        """How many columns are enough to tell whether products with so many are right."""
        return min(columns, 3)

    def _agrees(self, what: str, columns: int) -> bool:
        probe = Probe.of(self.objective)
        small = self._at(probe)
        vectors = probe.draw(len(self.theta), columns, seed=2)

        def fast() -> Tensor:
            if what == "dense":
                return (small._fast_dense() @ vectors).T
            return small._fast_product(vectors).T

        return agree(fast, lambda: small._plain_product(vectors).T)

    def _at(self, probe: Probe) -> "DataCurvature":
        """The same curvature of a few examples, without the penalty."""
        o = self.objective.on(Examples(probe.x, probe.y))
        return type(self)(o, probe.full, ridge=False, every=self.every)

    def _plain_product(self, vectors: Tensor) -> Tensor:
        """The product by plain reverse mode, one example and one vector at a time."""
        vectors, result = self._start(vectors)
        o = self.objective
        for rows, x, y in self._chunks(4):
            for i, weight in enumerate(self.weights[rows] / len(o.data)):
                one = slice(i, i + 1)
                given = self.full, x[one], y[one], vectors.T, self.every
                result += weight * own_curvature(self.kind, o, *given).T
        return result

    def _fast_product(self, vectors: Tensor) -> Tensor:
        # The columns share one linearisation, which takes as much memory as three of them. Both the
        # columns and the examples are cut so that the tangents fit in memory.
        vectors, result = self._start(vectors)
        o = self.objective
        count = len(o.data)
        width = self._width(o.bytes_per_example() * max(1, min(64, count) // 16), vectors.shape[1])
        for part, added in zip(vectors.split(width, 1), result.split(width, 1), strict=True):
            for rows, x, y in self._chunks(self._copies(part.shape[1])):
                added += self._chunk(part, x, y, self.weights[rows] / count)
        return result

    def _start(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors, each contiguous in memory, and the penalty's part of their products."""
        vectors = vectors.T.contiguous().T
        if self.ridge is None:
            return vectors, torch.zeros_like(vectors)
        return vectors, self.ridge[:, None] * vectors

    def _copies(self, columns: int) -> int:
        """How many sets of activations one example costs with this many columns."""
        return max(3, columns)

    def dense_multiplications(self, examples: int) -> float:
        """Multiplications needed to make the dense matrix from this many examples.

        Infinity if the matrix is made by products with unit vectors.
        """
        return float("inf")

    def _chunk(self, vectors: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """What a chunk adds to the product; its weights are already divided by m."""
        raise TypeError(f"{type(self).__name__} must define _chunk")


class Hessian(DataCurvature):
    """``∇²F``: exact second derivatives, by differentiating ``∇F`` once more.

    By reverse over reverse mode: the gradient's graph is made once per chunk, and all columns are
    pulled back through it. Where `forward_is_cheaper`, by forward over reverse mode.
    """

    kind = "hessian"

    def _forward(self, columns: int) -> bool:
        return columns > 2 and forward_is_cheaper(self.objective, self.dtype)

    def _copies(self, columns):
        if self._forward(columns):
            return 2 * columns  # tangents of the forward and the backward pass
        return super()._copies(columns)

    def _chunk(self, vectors, x, y, weights):
        o = self.objective

        def risk(theta):
            return (weights * o.losses(self._full(theta), x, y)).sum()

        if self._forward(vectors.shape[1]):

            def product(v):
                return jvp(grad(risk), (self.theta,), (v,))[1]

            return vmap(product, in_dims=1, out_dims=1)(vectors)
        with torch.enable_grad():
            theta = self.theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(risk(theta), theta, create_graph=True)
        # The Hessian is symmetric.
        return pull_back(gradient, theta, vectors.T, together(o))[0].T

    @functools.cached_property
    def _twin(self) -> "GGN | None":
        """The Gauss-Newton matrix where the outputs are linear in θ, else None.

        There it equals the Hessian and is far cheaper.
        """
        if not self.objective.once(("linear", self.every), lambda: _is_linear(self)):
            return None
        twin = GGN(self.objective, self.full, self.weights, every=self.every)
        twin.ridge = self.ridge
        twin.rows = self.rows
        return twin

    def _way(self, columns):
        own = self._forward(columns), columns > 2
        return own if self._twin is None else ("linear", *self._twin._way(columns))

    def _telling(self, columns):
        return super()._telling(columns) if self._twin is None else self._twin._telling(columns)

    def _at(self, probe):
        small = super()._at(probe)
        small.__dict__["_twin"] = None if self._twin is None else self._twin._at(probe)
        return small

    def _makes_dense(self):
        return self._twin is not None and self._twin._makes_dense()

    def _fast_product(self, vectors: Tensor) -> Tensor:
        if self._twin is None:
            return super()._fast_product(vectors)
        return self._twin._fast_product(vectors)

    def _fast_dense(self) -> Tensor:
        return self._twin._fast_dense()

    def dense_multiplications(self, examples: int) -> float:
        return float("inf") if self._twin is None else self._twin.dense_multiplications(examples)


def _is_linear(operator: DataCurvature) -> bool:
    """Whether the outputs are affine in θ: ``z(θ+v) + z(θ−v) = 2 z(θ)`` up to rounding.

    Tried on a few unequal examples and two large random steps v.
    """
    o = operator.objective
    theta = operator.theta
    x = Probe.of(o).x
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in (1.0, 0.1):
            step = torch.randn(len(theta), generator=generator, dtype=torch.float64).to(theta)
            step = scale * step * (1 + theta.abs())
            up, here, down = (o.outputs(operator._full(theta + s * step), x) for s in (1, 0, -1))
            rounding = 30 * torch.finfo(theta.dtype).eps * float(up.abs().max() + down.abs().max())
            if not float((up + down - 2 * here).abs().max()) <= rounding:
                return False
    return True


class GGN(DataCurvature):
    """Generalised Gauss-Newton ``(1/m) Σ_i w_i J_iᵀ Λ_i J_i``, ``Λ_i`` the loss's output Hessian.

    It is the Hessian of the model linearised at the parameters, and positive semi-definite for
    convex losses.

    Where layers hold all of θ (`find_layers`), C backward passes give every example's J in factors,
    and a column costs less than half an epoch; that pays from C/2 columns on. Otherwise J v is
    pushed forward and Jᵀ Λ J v pulled back.
    """

    kind = "ggn"

    def _by_layers(self, columns: int) -> bool:
        layers = find_layers(self.objective, self.every)
        return layers is not None and self.count_outputs() <= 2 * columns

    def _way(self, columns):
        return self._by_layers(columns), columns > 2

    def _telling(self, columns):
        return min(columns, max(3, -(-self.count_outputs() // 2)))

    def _fast_product(self, vectors: Tensor) -> Tensor:
        o = self.objective
        layers = find_layers(o, self.every)
        count = self.count_outputs()
        if not self._by_layers(vectors.shape[1]):
            return super()._fast_product(vectors)
        vectors, result = self._start(vectors)
        numbers = count * sum(layer.numel for layer in layers)
        most = max(layer.numel for layer in layers)
        element = vectors.element_size()
        width = self._width(2 * most * element, vectors.shape[1])
        for part, added in zip(vectors.split(width, 1), result.split(width, 1), strict=True):
            copies = 2 + (numbers + 2 * most * part.shape[1]) * element // o.bytes_per_example()
            for rows, x, y in self._chunks(copies):
                traced = trace(o, self.full, x, layers)
                s = traced.jacobians()
                bend = self.bend(traced.outputs, y, self.weights[rows])
                traced.pull(s, traced.push(s, part) @ bend, added)
        return result

    def _copies(self, columns):
        o = self.objective
        if forward_agrees(o, self.every) or reverse_agrees(o, self.every):
            return super()._copies(columns)
        numbers = self.count_outputs() * (self.shape[0] + columns)  # each example's J itself
        return 2 + 2 * numbers * self.full.element_size() // o.bytes_per_example()

    def count_outputs(self) -> int:
        """C, the number of outputs per example."""
        o = self.objective

        def count() -> int:
            with torch.no_grad():
                return o.outputs(self.full, o.data.x[[0]]).numel()

        return o.once("outputs", count)

    def _chunk(self, vectors, x, y, weights):
        def model(theta):
            return self.objective.outputs(self._full(theta), x)

        with torch.enable_grad():
            theta = self.theta.detach().requires_grad_()
            z = model(theta)
            leaf = z.detach().requires_grad_()
            risk = (weights * self.objective.loss(leaf, y)).sum()
            (slope,) = torch.autograd.grad(risk, leaf, create_graph=True)
        if forward_agrees(self.objective, self.every):
            pushed = push_forward(model, self.theta, vectors.T)  # J v
        elif reverse_agrees(self.objective, self.every):
            pushed = push_by_reverse(z, theta, vectors.T)
        else:
            outputs, jacobian = self._jacobian(x, None)
            pushed = (jacobian @ vectors).permute(2, 0, 1).reshape(-1, *outputs.shape)
        bent = pull_back(slope, leaf, pushed, loss_together(self.objective))[0]  # Λ J v
        return pull_back(z, theta, bent, together(self.objective))[0].T  # Jᵀ Λ J v

    def dense_multiplications(self, examples: int) -> float:
        size = self.shape[0]
        count = self.count_outputs()
        layers = find_layers(self.objective, self.every)
        if not self._makes_dense():
            return float("inf")
        dense = layers and all(layer.dense for layer in layers)
        return float(examples * size**2 * (0.5 if dense else count))

    def _makes_dense(self):
        return 4 * self.count_outputs() <= self.shape[0]

    def _fast_dense(self) -> Tensor:
        """``Σ_i w_i J_iᵀ Λ_i J_i / m`` from each example's Jacobian.

        That takes C backward passes and one matrix product, where P products with unit vectors
        would each take a forward and a backward pass: several times faster for C ≪ P.
        """
        o = self.objective
        size = self.shape[0]
        count = self.count_outputs()
        result = torch.diag(self.full.new_zeros(size) if self.ridge is None else self.ridge)
        layers = find_layers(o, self.every)
        if layers and all(layer.dense for layer in layers):
            return self._add_blocks(result, layers)
        for rows, x, y in self._chunks(2 + 4 * 8 * count * size // o.bytes_per_example()):
            outputs, jacobian = self._jacobian(x, layers)  # (B, C, P)
            bent = self.bend(outputs, y, self.weights[rows]) @ jacobian
            result += bent.flatten(0, 1).T @ jacobian.flatten(0, 1)
        return result

    def factors(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Some examples' own J ``(B, C, P)`` and ``Λ_i / m``, ``(B, C, C)``, weights left out."""
        layers = find_layers(self.objective, self.every)
        if not self.objective.once(("factors", self.every), lambda: self._factors_agree(layers)):
            layers = None
        outputs, jacobian = self._jacobian(x, layers)
        return jacobian, self.bend(outputs, y, self.full.new_ones(len(x)))

    def _factors_agree(self, layers: list[Layer] | None) -> bool:
        """Whether the Jacobians by layers are those of plain reverse mode."""
        probe = Probe.of(self.objective)
        small = self._at(probe)

        def outputs(theta, x):
            return probe.outputs(theta, x[None], self.every).reshape(-1)

        def plain() -> Tensor:
            theta = probe.theta(self.every)
            return torch.stack([plain_jacobian(outputs, theta, one) for one in probe.x])

        return agree(lambda: small._jacobian(probe.x, layers)[1], plain)

    def _jacobian(self, x: Tensor, layers: list[Layer] | None) -> tuple[Tensor, Tensor]:
        """Outputs ``(B, ...)`` and J ``(B, C, P)``."""
        if layers:
            traced = trace(self.objective, self.full, x, layers)
            return traced.outputs, traced.jacobian(traced.jacobians(), self.shape[0])

        def outputs(theta, x):
            return self.objective.outputs(self._full(theta), x[None]).reshape(-1)

        with torch.no_grad():
            z = self.objective.outputs(self.full, x)
        if self.objective.once(("jacrev", self.every), lambda: _jacrev_agrees(self)):
            return z, vmap(jacrev(outputs), in_dims=(None, 0))(self.theta, x)
        return z, torch.stack([plain_jacobian(outputs, self.theta, one) for one in x])

    def _add_blocks(self, result: Tensor, layers: list[Layer]) -> Tensor:
        """Add each pair of dense layers' block to the penalty's ``result``.

        A dense layer's J is ``s ⊗ (a, 1)``, so two layers share ``Σ_i (s_iᵀ Λ_i t_i) ⊗ a_i b_iᵀ``:
        weighted Gram matrices of their inputs, 2C times less work than the product of Jacobians.
        """
        o = self.objective
        size = self.shape[0]
        for rows, x, y in self._chunks(2 + 4 * size // o.bytes_per_example()):
            traced = trace(o, self.full, x, layers)
            s = traced.jacobians()
            bend = self.bend(traced.outputs, y, self.weights[rows])
            # Each (B, J): the layer's inputs, and 1 for its bias.
            a = [layer.ones(a) for layer, a in zip(layers, traced.a, strict=True)]
            for i, j in itertools.combinations_with_replacement(range(len(layers)), 2):
                between = s[i].transpose(1, 2) @ bend @ s[j]  # (B, out, out')
                for unit in range(between.shape[1]):
                    first = unit if i == j else 0  # the rest follows by symmetry
                    block = a[i].T @ (between[:, unit, first:, None] * a[j][:, None]).flatten(1)
                    # Doubled for the symmetric mean below; a unit's block with itself is not.
                    block[:, a[j].shape[1] * (i == j) :] *= 2
                    rows_of_unit = layers[i].places[unit][:, None]
                    result[rows_of_unit, layers[j].places[first:].flatten()] += block
        return (result + result.T) / 2


def plain_jacobian(outputs: Callable, theta: Tensor, x: Tensor) -> Tensor:
    """``∂ outputs(θ, x)/∂θ`` of one example by a backward pass for each output, ``(C, P)``."""
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        z = outputs(leaf, x)
    return rows_of_jacobian(z, leaf)


def _jacrev_agrees(operator: GGN) -> bool:
    """Whether `vmap` of `jacrev` gives each example's Jacobian as it is alone."""
    every, probe = operator.every, Probe.of(operator.objective)

    def outputs(theta, x):
        return probe.outputs(theta, x[None], every).reshape(-1)

    theta = probe.theta(every)
    return agree(
        lambda: vmap(jacrev(outputs), in_dims=(None, 0))(theta, probe.x),
        lambda: torch.stack([plain_jacobian(outputs, theta, x) for x in probe.x]),
    )


def curvature(
    kind: str, objective: Objective, full: Tensor, weights: Tensor | None = None
) -> DataCurvature:
    """The stage's curvature by name, ``"hessian"`` or ``"ggn"``, penalty included."""
    kinds = {"hessian": Hessian, "ggn": GGN}
    if kind not in kinds:
        raise ValueError(f"curvature={kind!r} must be one of {sorted(kinds)}")
    return kinds[kind](objective, full, weights)
