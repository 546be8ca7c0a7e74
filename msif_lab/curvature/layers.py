"""Derivatives of networks of linear, convolution and norm layers, from inputs and output gradients.

A layer ``z = W a + b`` has ``∂q/∂W = Σ_l s_l a_lᵀ``, where ``a`` is its input at L positions and
``s = ∂q/∂z``. One forward pass, and one backward pass that forms no weight gradient, therefore give
for every example at once ``∇q·v = Σ_l s_lᵀ V a_l`` for any v, the gradients themselves, and ``J v``
and ``Jᵀ u`` of the outputs; no tangent passes through activations or pooling. A norm layer is a
`Scale`, ``z = γ a + β``. Networks with trained parameters in other layers are left to `torch.func`
(`find_layers` gives None).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..objective.exclusive import MODULES, exclusive
from ..objective.objective import Objective
from .gate import Probe, agree

__all__ = ["Layer", "Trace", "find_layers", "trace"]

TOGETHER = 64  # vectors that a layer multiplies its inputs by at once


@dataclass
class Layer:
    """A linear or convolution layer ``z = W a + b``, and where its parameters lie in θ.

    Attributes:
        name: of the module in the model.
        module: the layer itself; of its parameters only the shapes are used.
        weight: where W lies in θ; None if it is not trained.
        bias: where b lies in θ; None if there is none, or it is not trained.
        size: shape of one example's z.
    """

    name: str
    module: nn.Module
    weight: range | None
    bias: range | None
    size: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """n, the number of entries in one example's z."""
        return math.prod(self.size)

    @property
    def positions(self) -> int:
        """L, the number of positions in an example at which the same weights are used."""
        return self.numel // len(self.module.weight)

    @property
    def conv(self) -> bool:
        """Whether it is a convolution."""
        return isinstance(self.module, nn.Conv2d)

    @property
    def dense(self) -> bool:
        """Whether it is a `Linear` applied at a single position."""
        return isinstance(self.module, nn.Linear) and len(self.size) == 1

    def inputs(self, x: Tensor) -> Tensor:
        """``a``, from what the module was called with."""
        return x

    def bytes(self, columns: int, element: int) -> int:
        """Bytes that `along` takes for one example, with ``element`` bytes a number."""
        if self.pushes(columns):
            return min(columns, TOGETHER) * self.numel * element
        patches = self.positions * self.parameters // len(self.module.weight)
        return (self.parameters + patches) * element

    def pushes(self, columns: int) -> bool:
        """Whether ``s·(V a)`` is cheaper than the gradient and its products with all K columns.

        That is ``L P K`` multiplications against ``L P + P K``; the latter are in products of small
        matrices, one per example, and take twice as long each (bench_scoring.py).
        """
        return self.positions * columns <= 2 * (self.positions + columns)

    def along(self, a: Tensor, s: Tensor, vectors: Tensor) -> Tensor:
        """Each example's ``Σ_l s_lᵀ V a_l`` with ``s`` (B, 1, n): ``vectors`` (P, K) → (B, K)."""
        if self.pushes(vectors.shape[1]):
            s = s.transpose(1, 2)
            parts = [(self.push(a, some) @ s)[..., 0] for some in vectors.split(TOGETHER, 1)]
            return torch.cat(parts, 1)
        parts = zip(self.spans, self.gradients(a, s), strict=True)
        return sum(part[:, 0] @ vectors[span] for span, part in parts)

    @property
    def spans(self) -> list[slice]:
        """Where its weight and bias lie in θ, if they are trained."""
        return [slice(s.start, s.stop) for s in (self.weight, self.bias) if s is not None]

    @property
    def parameters(self) -> int:
        """The number of its parameters in θ."""
        return sum(len(s) for s in (self.weight, self.bias) if s is not None)

    @functools.cached_property
    def places(self) -> Tensor:
        """Where in θ each unit's weights and bias lie, ``(out, J)``; for dense layers."""
        parts = [
            torch.arange(s.start, s.stop).view(*self.size, -1)
            for s in (self.weight, self.bias)
            if s is not None
        ]
        return torch.cat(parts, 1).to(self.module.weight.device)

    def ones(self, a: Tensor) -> Tensor:
        """The factors of a unit's weights and bias, ``a`` and 1: ``(B, J)``; for dense layers."""
        parts = []
        if self.weight is not None:
            parts.append(a)
        if self.bias is not None:
            parts.append(a.new_ones(len(a), 1))
        return torch.cat(parts, 1)

    def _geometry(self) -> dict:
        return {key: getattr(self.module, key) for key in ("stride", "padding", "dilation")}

    def patches(self, a: Tensor) -> Tensor:
        """The numbers that the weights multiply, J at each of L positions: ``(B, L, J)``."""
        if not self.conv:
            return a.reshape(len(a), -1, a.shape[-1])
        return nn.functional.unfold(a, self.module.kernel_size, **self._geometry()).transpose(1, 2)

    def push(self, a: Tensor, vectors: Tensor) -> Tensor:
        """``V a + v`` for each column of ``vectors`` (P, K): ``(B, K, n)``."""
        width = vectors.shape[1]
        out, *kernel = self.module.weight.shape
        if self.weight is not None:
            weight = vectors[self.spans[0]].T.reshape(width * out, *kernel)
        else:
            weight = vectors.new_zeros(width * out, *kernel)
        bias = None if self.bias is None else vectors[self.spans[-1]].T.reshape(-1)
        if self.conv:
            return nn.functional.conv2d(a, weight, bias, **self._geometry()).reshape(
                len(a), width, -1
            )
        z = nn.functional.linear(a.reshape(len(a), -1, a.shape[-1]), weight, bias)  # (B, L, K out)
        return z.unflatten(-1, (width, -1)).transpose(1, 2).reshape(len(a), width, -1)

    def pull(self, a: Tensor, cotangents: Tensor, result: Tensor) -> None:
        """Add ``Σ_i s_i a_iᵀ`` to the layer's rows of ``result`` (P, K); cotangents s (B, K, n)."""
        width = cotangents.shape[1]
        out, *kernel = self.module.weight.shape
        split = (width, out, -1) if self.conv else (width, -1, out)
        s = cotangents.reshape(len(a), *split)
        if self.weight is not None:
            # oneDNN has no float64 convolutions, and PyTorch's own are slower than a product.
            if self.conv and a.dtype == torch.float32:
                maps = s.reshape(len(a), -1, *self.size[1:])
                kernels = (width * out, *kernel)
                product = torch.nn.grad.conv2d_weight(a, kernels, maps, **self._geometry())
            else:
                by_unit = s.permute(1, 2, 0, 3) if self.conv else s.permute(1, 3, 0, 2)
                by_unit = by_unit.reshape(width * out, -1)  # (K out, B L)
                product = by_unit @ self.patches(a).reshape(-1, math.prod(kernel))
            result[self.spans[0]] += product.reshape(width, -1).T
        if self.bias is not None:
            result[self.spans[-1]] += (s.sum((0, 3)) if self.conv else s.sum((0, 2))).T

    def outer(self, a: Tensor, s: Tensor, result: Tensor) -> None:
        """Write the `gradients` for ``s`` (B, C, n) to the layer's part of ``result`` (B, C, P)."""
        for span, part in zip(self.spans, self.gradients(a, s), strict=True):
            result[..., span] = part

    def gradients(self, a: Tensor, s: Tensor) -> list[Tensor]:
        """Each example's gradients for ``s`` (B, C, n), in the order of `spans`: ``(B, C, ...)``.

        That is ``Σ_l s_l a_lᵀ`` for the weight and ``Σ_l s_l`` for the bias, if θ holds them.
        """
        out = self.module.weight.shape[0]
        s = s.unflatten(2, (out, -1) if self.conv else (-1, out))
        s = s if self.conv else s.transpose(2, 3)  # (B, C, out, L)
        parts = []
        if self.weight is not None:
            parts.append((s @ self.patches(a)[:, None]).flatten(2))
        if self.bias is not None:
            parts.append(s.sum(3))
        return parts


class Scale(Layer):
    """A norm layer, ``z_c = γ_c a_c + β_c`` at L positions, with ``a`` the normalised inputs.

    BatchNorm normalises by its running statistics, GroupNorm by those of the example itself.
    """

    def inputs(self, x: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.GroupNorm):
            a = nn.functional.group_norm(x, m.num_groups, eps=m.eps)
        else:
            a = nn.functional.batch_norm(x, m.running_mean, m.running_var, eps=m.eps)
        return a.reshape(*a.shape[:2], -1)  # (B, C, L)

    def push(self, a: Tensor, vectors: Tensor) -> Tensor:
        z = a.new_zeros(())
        if self.weight is not None:
            z = z + vectors[self.spans[0]].T[..., None] * a[:, None]
        if self.bias is not None:
            z = z + vectors[self.spans[-1]].T[..., None]
        return z.expand(len(a), -1, -1, a.shape[2]).flatten(2)

    def pull(self, a: Tensor, cotangents: Tensor, result: Tensor) -> None:
        for span, part in zip(self.spans, self.gradients(a, cotangents), strict=True):
            result[span] += part.sum(0).T

    def gradients(self, a: Tensor, s: Tensor) -> list[Tensor]:
        s = s.unflatten(2, a.shape[1:])  # (B, K, C, L)
        parts = []
        if self.weight is not None:
            parts.append((s * a[:, None]).sum(3))
        if self.bias is not None:
            parts.append(s.sum(3))
        return parts


SCALES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


@dataclass
class Trace:
    """A chunk's outputs, and each layer's inputs ``a`` and outputs ``z`` on the way to them.

    The graph from z to the outputs is kept, so that the outputs can be differentiated in z.
    """

    layers: list[Layer]
    outputs: Tensor
    a: list[Tensor]
    z: list[Tensor]
    side_by_side: bool = True  # whether many cotangents may go back at once

    def output_gradients(self, function: Callable, y: Tensor) -> list[Tensor]:
        """``∂ function(outputs, y)_i / ∂z`` of each layer: ``(B, 1, n)``.

        Args:
            function: ``(outputs, targets) -> (B,)``.
            y: the chunk's targets.
        """
        with torch.enable_grad():
            values = function(self.outputs, y)
        gradients = torch.autograd.grad(values.sum(), self.z, materialize_grads=True)
        return [s.flatten(1)[:, None] for s in gradients]

    def jacobians(self) -> list[Tensor]:
        """``∂ outputs_ic / ∂z`` of each layer, ``(B, C, n)``, by C backward passes."""
        flat = self.outputs.flatten(1)
        eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        units = eye[:, None].expand(-1, len(flat), -1)  # (C, B, C)
        return [s.transpose(0, 1).contiguous() for s in self.pull_units(units, self.side_by_side)]

    def pull_units(self, units: Tensor, side_by_side: bool) -> list[Tensor]:
        """``uᵀ ∂ outputs / ∂z`` of each layer for cotangents u ``(K, B, C)``: ``(K, B, n)``."""
        flat = self.outputs.flatten(1)
        # Outputs that depend on no z have no gradient to be batched.
        settings = {"retain_graph": True, "allow_unused": True}
        if side_by_side:
            found = torch.autograd.grad(flat, self.z, units, is_grads_batched=True, **settings)
        else:
            alone = [torch.autograd.grad(flat, self.z, unit, **settings) for unit in units]
            found = [
                None if by_layer[0] is None else torch.stack(by_layer)
                for by_layer in zip(*alone, strict=True)
            ]
        rows = []
        for z, s in zip(self.z, found, strict=True):
            rows.append((z.new_zeros(len(units), *z.shape) if s is None else s).flatten(2))
        return rows

    def push(self, s: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """``J v``: ``vectors`` (P, K) → ``(B, K, C)``."""
        parts = zip(self.layers, self.a, s, strict=True)
        return sum(layer.push(a, vectors) @ s.transpose(1, 2) for layer, a, s in parts)

    def along(self, s: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """``∇q_iᵀ v`` from the layers' `output_gradients` of q: ``vectors`` (P, K) → ``(B, K)``.

        No gradient is kept.
        """
        parts = zip(self.layers, self.a, s, strict=True)
        return sum(layer.along(a, s, vectors) for layer, a, s in parts)

    def pull(self, s: Sequence[Tensor], cotangents: Tensor, result: Tensor) -> None:
        """Add ``Σ_i J_iᵀ u_i`` of ``cotangents`` (B, K, C) to ``result`` (P, K)."""
        for layer, a, gradients in zip(self.layers, self.a, s, strict=True):
            layer.pull(a, cotangents @ gradients, result)

    def jacobian(self, s: Sequence[Tensor], size: int) -> Tensor:
        """``J`` itself: ``(B, C, P)``."""
        result = s[0].new_empty(*s[0].shape[:2], size)
        for layer, a, gradients in zip(self.layers, self.a, s, strict=True):
            layer.outer(a, gradients, result)
        return result


def find_layers(o: Objective, every: bool = False) -> list[Layer] | None:
    """The layers that hold all of θ, or None if part of it lies in layers of other kinds.

    The kinds are `Linear`, `Conv2d`, `BatchNorm` and `GroupNorm`. The layers are found once per
    objective, and trusted only after a check against plain reverse mode at random weights.

    Args:
        o: the stage.
        every: all D parameters instead of the trained P.
    """

    def find() -> list[Layer] | None:
        found = _list(o, every)
        return found if found and _agrees(o, found, every) else None

    return o.once(("layers", every), find)


def _list(o: Objective, every: bool) -> list[Layer] | None:
    """The layers of known kinds, or None if they do not hold all of θ."""
    names = list(o.layout.shapes) if every else o.trained_names
    spans: dict[str, range] = {}
    start = 0
    for name in names:
        stop = start + len(o.layout.spans[name])
        spans[name] = range(start, stop)
        start = stop
    layers = []
    left = set(names)
    for name, module in o.model.named_modules():
        own = {key: f"{name}.{key}".lstrip(".") for key in ("weight", "bias")}
        if type(module) not in (nn.Linear, nn.Conv2d, *SCALES) or left.isdisjoint(own.values()):
            continue
        if isinstance(module, nn.Conv2d) and (
            module.groups > 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
        ):
            return None
        kind = Scale if type(module) in SCALES else Layer
        layers.append(kind(name, module, spans.get(own["weight"]), spans.get(own["bias"])))
        left -= set(own.values())
    return None if left else layers


def trace(o: Objective, full: Tensor, x: Tensor, layers: list[Layer]) -> Trace | None:
    """Run the model on a chunk ``x`` and keep the inputs and outputs of its layers.

    The user's module is left as it was. None if some layer is not called exactly once with the
    whole chunk.

    Args:
        o: the stage.
        full: all its parameters ``(D,)``.
        x: inputs ``(B, ...)``.
        layers: those of `find_layers`.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    full = full.detach()
    inplace = o.once("inplace", lambda: _works_in_place(o, x[:2]))

    def keep(layer):
        def hook(module, given, z):
            # Parameters are constants here, so the first layers' outputs are leaves.
            z = z if z.requires_grad else z.detach().requires_grad_()
            seen[layer.name].append((layer.inputs(given[0].detach()), z))
            return z.clone() if inplace else z  # an in-place activation must not overwrite z

        return hook

    with MODULES:
        hooks = [layer.module.register_forward_hook(keep(layer)) for layer in layers]
        try:
            with torch.enable_grad():
                outputs = o.outputs(full, x)
        finally:
            for hook in hooks:
                hook.remove()
    if any(len(calls) != 1 or len(calls[0][1]) != len(x) for calls in seen.values()):
        return None
    a = [calls[0][0] for calls in seen.values()]
    z = [calls[0][1] for calls in seen.values()]
    return Trace(layers, outputs, a, z, o.known(_side_by_side(layers), True))


def _side_by_side(layers: list[Layer]) -> tuple:
    """The name under which `Objective.once` knows whether these layers' rows can be batched."""
    return ("rows side by side", *(layer.name for layer in layers))


def _rows_agree(probe: Probe, found: Trace) -> bool:
    units = probe.draw(3, *found.outputs.flatten(1).shape, seed=2)

    def rows(side_by_side: bool) -> Tensor:
        return torch.cat(found.pull_units(units, side_by_side), dim=2)

    return agree(lambda: rows(True), lambda: rows(False))


@exclusive
def _works_in_place(o: Objective, x: Tensor) -> bool:
    """Whether something in the model, a module or a function, writes into a layer's output."""
    outputs: list[tuple[Tensor, int]] = []

    def note(module, given, z):
        if isinstance(z, Tensor):
            outputs.append((z, z._version))

    hooks = [m.register_forward_hook(note) for m in o.model.modules() if not list(m.children())]
    try:
        with torch.no_grad():
            o.outputs(o.layout.flatten(o.model), x)
    finally:
        for hook in hooks:
            hook.remove()
    return any(z._version != version for z, version in outputs)


def _agrees(o: Objective, layers: list[Layer], every: bool) -> bool:
    """Whether the layers account for all of each example's gradient, one example at a time.

    They do not where a weight is used elsewhere too, twice, or behind a hook, nor where the model
    reorders its batch or holds it in another dimension than the first.
    """
    probe = Probe.of(o)
    with torch.no_grad():
        cotangent = probe.draw(*o.outputs(probe.full, probe.x).shape)
    vectors = probe.draw(len(probe.theta(every)), 1, seed=1) / len(probe.theta(every)) ** 0.5

    def fast() -> Tensor:
        found = trace(o, probe.full, probe.x, layers)
        if found is None or not found.outputs.requires_grad:
            raise ValueError("the layers cannot follow this model")
        for layer, z in zip(layers, found.z, strict=True):
            layer.size = tuple(z.shape[1:])
        o.once(_side_by_side(layers), lambda: _rows_agree(probe, found))
        gradients = found.output_gradients(lambda z, u: (z * u).flatten(1).sum(1), cotangent)
        rows = found.jacobian(gradients, len(vectors))[:, 0]
        return torch.cat([rows, found.along(gradients, vectors)], 1)

    def value(theta: Tensor, i: int) -> Tensor:
        return (probe.outputs(theta, probe.x[i : i + 1], every)[0] * cotangent[i]).sum()

    def plain() -> Tensor:
        rows = probe.gradients(value, every)
        return torch.cat([rows, rows @ vectors], 1)

    return agree(fast, plain)
