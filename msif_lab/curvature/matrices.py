"""Hessian and generalised Gauss-Newton of a stage as operators with algebra.

``H = Hessian(objective, full)`` is used as ``(H + damping) @ V``: it knows shape, dtype and device,
and multiplies many vectors at once. Averages are weighted by the data, so any chunking gives the
same product.
"""

import copy
import functools
import itertools

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ..memory import working_bytes
from ..objective.objective import Objective
from .derivatives import forward_is_cheaper, jvp, pull_back, push_forward
from .layers import Layer, find_layers, trace
from .operators import Operator

__all__ = ["GGN", "Hessian"]


class DataCurvature(Operator):
    """Curvature of the mean loss ``(1/m) Σ w_i f_i`` plus, unless ``ridge=False``, of the stage's
    penalty.

    Args:
        objective: the stage.
        full: all its parameters ``(D,)``.
        weights: example weights ``(m,)``; default one each.
        every: over all D parameters instead of the trained P (without the penalty); its
            off-diagonal block is the ``G_WT`` of the frozen case.
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
        super().__init__(
            objective.layout.size if every else objective.size, full.dtype, full.device
        )
        for name, tensor, size in (
            ("full", full, objective.layout.size),
            ("weights", weights, len(objective.data)),
        ):
            if tensor is not None and tensor.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({size},)")
        self.objective, self.full, self.every = objective, full, every
        self.theta = full if every else objective.trained.take(full)
        self.weights = full.new_ones(len(objective.data)) if weights is None else weights
        self.ridge = objective.ridge if ridge and not every else None
        self.rows: Tensor | None = None  # only these examples

    def part(self, rows: Tensor) -> "DataCurvature":
        """What the examples at ``rows`` add to the mean over all, without the penalty: parts sum to
        the whole.
        """
        part = copy.copy(self)
        part.__dict__.pop("_twin", None)  # a Hessian's, of all rows
        part.rows, part.ridge = rows, None
        return part

    def importance(self) -> Tensor:
        """``|w_i| ‖∂f_i/∂z_i‖`` of each example ``(m,)``, z the outputs: it weighs the model's own
        second derivatives; small where a classifier is sure of the label, so that the loss does not
        bend either.
        """
        o, slopes = self.objective, []
        for _, x, y in o.chunks(copies=2):
            with torch.no_grad():
                z = o.outputs(self.full, x)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(o.loss(z.requires_grad_(), y).sum(), z)
            slopes.append(slope.flatten(1).norm(dim=1))
        return self.weights.abs() * torch.cat(slopes)

    def bend(self, outputs: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """``(w_i / m) Λ_i``: the Hessian of each example's weighted loss in its outputs,
        ``(B, C, C)``.
        """
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            risk = (weights * self.objective.loss(z, y)).sum() / len(self.objective.data)
            (slope,) = torch.autograd.grad(risk, z, create_graph=True)
            slope = slope.flatten(1)
        eye = torch.eye(slope.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(
            -1, len(z), -1
        )
        return pull_back(slope, z, eye)[0].flatten(2).transpose(0, 1)

    def _chunks(self, copies: int):
        return self.objective.chunks(copies=copies, rows=self.rows)

    def _full(self, theta: Tensor) -> Tensor | dict[str, Tensor]:
        return theta if self.every else self.objective.parameters(theta, self.full)

    def _width(self, column: int, columns: int) -> int:
        """How many columns go side by side where one takes so many bytes an example: room for 8
        examples remains, and all pieces are equally wide (11 + 9 columns of a conv net cost a sixth
        more than 10 + 10).
        """
        most = max(1, min(columns, 256, working_bytes(self.device, column) // (8 * column)))
        return -(-columns // -(-columns // most))

    def _product(self, vectors: Tensor) -> Tensor:
        # Columns share one linearisation, as large as three; both they and the examples are cut so
        # that tangents fit.
        vectors = vectors.T.contiguous().T  # each in one piece, and so the results
        result = torch.zeros_like(vectors) if self.ridge is None else self.ridge[:, None] * vectors
        o, count = self.objective, len(self.objective.data)
        width = self._width(o.bytes_per_example() * max(1, min(64, count) // 16), vectors.shape[1])
        for part, sum_ in zip(vectors.split(width, 1), result.split(width, 1), strict=True):
            for rows, x, y in self._chunks(self._copies(part.shape[1])):
                sum_ += self._chunk(part, x, y, self.weights[rows] / count)
        return result

    def _copies(self, columns: int) -> int:
        """How many activation sets so many columns cost an example."""
        return max(3, columns)

    def dense_multiplications(self, examples: int) -> float:
        """What making the dense matrix from so many examples takes if not by products; inf if it is
        by products.
        """
        return float("inf")

    def _chunk(self, vectors: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _chunk")


class Hessian(DataCurvature):
    """``∇²F``: exact second derivatives, by differentiating ``∇F`` once more.

    Reverse over reverse: the gradient's graph is made once a chunk and all columns go back through
    it; or forward over reverse, where `forward_is_cheaper`.
    """

    def _forward(self, columns: int) -> bool:
        return columns > 2 and forward_is_cheaper(self.objective, self.dtype)

    def _copies(self, columns):
        # tangents of both passes
        return 2 * columns if self._forward(columns) else super()._copies(columns)

    def _chunk(self, vectors, x, y, weights):
        o = self.objective

        def risk(theta):
            return (weights * o.losses(self._full(theta), x, y)).sum()

        if self._forward(vectors.shape[1]):
            return vmap(lambda v: jvp(grad(risk), (self.theta,), (v,))[1], in_dims=1, out_dims=1)(
                vectors
            )
        with torch.enable_grad():
            theta = self.theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(risk(theta), theta, create_graph=True)
        return pull_back(gradient, theta, vectors.T)[0].T  # the Hessian is symmetric

    @functools.cached_property
    def _twin(self) -> "GGN | None":
        """The Gauss-Newton matrix where the outputs are linear in θ: then it is the Hessian, and
        far cheaper.
        """
        if not _is_linear(self):
            return None
        twin = GGN(self.objective, self.full, self.weights, every=self.every)
        twin.ridge, twin.rows = self.ridge, self.rows
        return twin

    def _product(self, vectors: Tensor) -> Tensor:
        return super()._product(vectors) if self._twin is None else self._twin._product(vectors)

    def _dense(self) -> Tensor:
        return super()._dense() if self._twin is None else self._twin._dense()

    def dense_multiplications(self, examples: int) -> float:
        return float("inf") if self._twin is None else self._twin.dense_multiplications(examples)


def _is_linear(operator: DataCurvature) -> bool:
    """Whether outputs are affine in θ: ``z(θ+v) + z(θ−v) = 2 z(θ)`` to rounding at large random v,
    3 examples.
    """
    o, theta = operator.objective, operator.theta
    few = sorted({0, len(o.data) // 2, len(o.data) - 1})
    x, generator = o.data.x[few], torch.Generator().manual_seed(0)
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
    """Generalised Gauss-Newton ``(1/m) Σ w_i J_iᵀ Λ_i J_i`` with ``Λ_i`` the loss's Hessian in the
    outputs: the Hessian of the model linearised at the parameters; positive semi-definite for
    convex losses.

    Where layers hold all of θ (`layers`), C backward passes give every example's J in factors, and
    a column costs less than half an epoch; that pays from C/2 columns on. Otherwise J v is pushed
    forward and Jᵀ Λ J v pulled back.
    """

    def _product(self, vectors: Tensor) -> Tensor:
        o, layers = self.objective, find_layers(self.objective, self.every)
        count = self._outputs()
        if layers is None or count > 2 * vectors.shape[1]:
            return super()._product(vectors)
        vectors = vectors.T.contiguous().T
        result = torch.zeros_like(vectors) if self.ridge is None else self.ridge[:, None] * vectors
        numbers = count * sum(layer.numel for layer in layers)
        most, element = max(layer.numel for layer in layers), vectors.element_size()
        width = self._width(2 * most * element, vectors.shape[1])
        for part, added in zip(vectors.split(width, 1), result.split(width, 1), strict=True):
            copies = 2 + (numbers + 2 * most * part.shape[1]) * element // o.bytes_per_example()
            for rows, x, y in self._chunks(copies):
                traced = trace(o, self.full, x, layers)
                s = traced.jacobians()
                bend = self.bend(traced.outputs, y, self.weights[rows])
                traced.pull(s, traced.push(s, part) @ bend, added)
        return result

    def _outputs(self) -> int:
        """C, how many numbers the model gives for an example."""
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
            (slope,) = torch.autograd.grad(
                (weights * self.objective.loss(leaf, y)).sum(), leaf, create_graph=True
            )
        pushed = push_forward(model, self.theta, vectors.T)  # J v
        return pull_back(z, theta, pull_back(slope, leaf, pushed)[0])[0].T  # Jᵀ Λ J v

    def dense_multiplications(self, examples: int) -> float:
        size, count, layers = (
            self.shape[0],
            self._outputs(),
            find_layers(self.objective, self.every),
        )
        if 4 * count > size:
            return float("inf")
        flat = layers and all(layer.dense for layer in layers)
        return float(examples * size**2 * (0.5 if flat else count))

    def _dense(self) -> Tensor:
        """``Σ w_i J_iᵀ Λ_i J_i / m`` from each example's Jacobian: C backward passes and one matrix
        product where P products would each take a forward and a backward pass; several times faster
        for C ≪ P.
        """
        o, size, count = self.objective, self.shape[0], self._outputs()
        if 4 * count > size:
            return super()._dense()
        result = torch.diag(self.full.new_zeros(size) if self.ridge is None else self.ridge)
        layers = find_layers(o, self.every)
        if layers and all(layer.dense for layer in layers):
            return self._add_blocks(result, layers)
        for rows, x, y in self._chunks(2 + 4 * 8 * count * size // o.bytes_per_example()):
            outputs, jacobian = self._jacobian(x, layers)  # (B, C, P)
            bent = self.bend(outputs, y, self.weights[rows]) @ jacobian
            result += bent.flatten(0, 1).T @ jacobian.flatten(0, 1)
        return result

    def _jacobian(self, x: Tensor, layers: list[Layer] | None) -> tuple[Tensor, Tensor]:
        """Outputs ``(B, ...)`` and J ``(B, C, P)``."""
        if layers:
            traced = trace(self.objective, self.full, x, layers)
            return traced.outputs, traced.jacobian(traced.jacobians(), self.shape[0])

        def outputs(theta, x):
            return self.objective.outputs(self._full(theta), x[None]).reshape(-1)

        with torch.no_grad():
            z = self.objective.outputs(self.full, x)
        return z, vmap(jacrev(outputs), in_dims=(None, 0))(self.theta, x)

    def _add_blocks(self, result: Tensor, layers: list[Layer]) -> Tensor:
        """A dense layer's J is ``s ⊗ (a, 1)``, so a block is ``Σ_i (s_iᵀ Λ_i t_i) ⊗ a_i b_iᵀ``:
        weighted Gram matrices of the layers' inputs, 2C times less work than the product of
        Jacobians.
        """
        o, size = self.objective, self.shape[0]
        for rows, x, y in self._chunks(2 + 4 * size // o.bytes_per_example()):
            traced = trace(o, self.full, x, layers)
            s = traced.jacobians()
            bend = self.bend(traced.outputs, y, self.weights[rows])
            # (B, J): inputs, and 1 for the bias
            a = [layer.ones(a) for layer, a in zip(layers, traced.a, strict=True)]
            for i, j in itertools.combinations_with_replacement(range(len(layers)), 2):
                between = s[i].transpose(1, 2) @ bend @ s[j]  # (B, out, out')
                for unit in range(between.shape[1]):
                    first = unit if i == j else 0  # what is left follows by symmetry
                    block = a[i].T @ (between[:, unit, first:, None] * a[j][:, None]).flatten(1)
                    block[:, a[j].shape[1] * (i == j) :] *= 2
                    result[layers[i].places[unit][:, None], layers[j].places[first:].flatten()] += (
                        block
                    )
        return (result + result.T) / 2


def curvature(
    kind: str, objective: Objective, full: Tensor, weights: Tensor | None = None
) -> DataCurvature:
    """The stage's curvature by name, ``"hessian"`` or ``"ggn"``, penalty included."""
    kinds = {"hessian": Hessian, "ggn": GGN}
    if kind not in kinds:
        raise ValueError(f"curvature={kind!r} must be one of {sorted(kinds)}")
    return kinds[kind](objective, full, weights)
