"""A stage as a pure function of flat parameters: the user's module is called, never changed.

The letters are those of the lessons: ``θ`` for the ``P`` parameters that a stage trains, ``w`` for
the example weights, and ``F(θ; w) = (1/m) Σ_i w_i f_i(θ) + λ/2 ‖θ‖² + α ‖θ_S − c‖²``, where the
last term holds the shared part ``θ_S`` near the previous stage's ``c`` (α = 0 without a proximal
link). Where parameters have λ of their own, ``λ/2 ‖θ‖²`` is read as ``½ Σ_j λ_j θ_j²``. A stage
trained under R weightings at once has R *lanes*, ``(R, P)``.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.examples import Examples
from ..data.fields import as_model_input
from ..errors import UnsupportedModelError
from ..memory import working_bytes
from .exclusive import MODULES, exclusive
from .layout import Layout, Places
from .switches import twice_differentiable
from .wrapping import no_tensor


class _CountBytes(TorchDispatchMode):
    """Counts the bytes of every tensor made."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if isinstance(result, Tensor):
                self.total += result.numel() * result.element_size()
        return results


class Objective:
    """The regularised risk F(θ; w) of one stage as a pure function.

    Args:
        model: any module; called functionally, so its own parameters are never touched.
        data: the examples of the mean.
        loss: ``(outputs, targets) -> (B,)``.
        weight_decay: λ, one for all trained parameters, or by their names.
        trained: names of the parameters θ; default all that require a gradient.
        alpha, shared: the proximal term ``α ‖θ_S − c‖²`` and the names S it holds.
        where: what messages call this stage.

    Attributes:
        weight_decay: λ as one number, or ``(P,)`` where parameters differ.
    """

    @exclusive
    def __init__(
        self, model, data, loss, weight_decay=0.0, trained=None, alpha=0.0, shared=(), where="stage"
    ):
        self.model = model
        self.data = data
        self.loss = loss
        self.where = where
        self._cast: torch.dtype | None = None
        self.device = data.x.device
        self.layout = Layout(model, where)
        self.alpha = float(alpha)
        self.trained_names = list(self.layout.trainable if trained is None else trained)
        self.trained = self.layout.places(self.trained_names)  # where θ lies among all D
        trained_spans = {}
        start = 0
        for name in self.trained_names:
            stop = start + len(self.layout.spans[name])
            trained_spans[name] = range(start, stop)
            start = stop
        self.coupled = Places([trained_spans[n] for n in shared])  # where the coupled S lie in θ
        self._all = self.trained_names == list(self.layout.shapes)
        self.weight_decay = self.spread(weight_decay)
        # The function's constants: copies, so that a module that writes into its buffers during a
        # call does not change its own.
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._found: dict = {}  # see `once`

    def spread(self, given: float | Mapping[str, float]) -> float | Tensor:
        """Numbers by name as one where all trained parameters have the same, else ``(P,)``."""
        if not isinstance(given, Mapping):
            return float(given)
        each = [float(given[name]) for name in self.trained_names]
        if len(set(each)) == 1:
            return each[0]
        counts = torch.tensor([len(self.layout.spans[name]) for name in self.trained_names])
        values = torch.tensor(each, dtype=torch.float64).repeat_interleave(counts)
        return values.to(self.device, self.dtype)

    def once(self, name: Hashable, measure: Callable[[], object]):
        """A fact about model and loss by name: ``measure()`` is called only the first time."""
        if name not in self._found:
            self._found[name] = measure()
        return self._found[name]

    def known(self, name: Hashable, default):
        """What `once` has found under this name, or the default if nobody asked yet."""
        return self._found.get(name, default)

    def recall(self, other: "Objective") -> None:
        """Share what `once` has found and will find with another objective of the same function."""
        self._found = other._found

    def on(self, data: Examples) -> "Objective":
        """The same function on other examples, with its own buffers; facts of `once` are shared."""
        other = copy.copy(self)
        other.data = data
        other.buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return other

    def cast(self, dtype: torch.dtype) -> "Objective":
        """The same function on the same examples with parameters, buffers and data of this dtype.

        The module itself stays as it is.
        """
        other = self.on(self.data.to(dtype))
        other._cast, other._found = dtype, {}
        floating = {name: b for name, b in other.buffers.items() if b.is_floating_point()}
        other.buffers |= {name: buffer.to(dtype) for name, buffer in floating.items()}
        return other

    @property
    def size(self) -> int:
        """P, the number of trained parameters."""
        return self.trained.size

    @property
    def trained_positions(self) -> Tensor:
        """Positions of θ among all D, one by one ``(P,)``; `trained` has them as spans."""
        return self.trained.table(self.device)

    @property
    def coupled_positions(self) -> Tensor:
        """Positions of the coupled S in θ, one by one; `coupled` has them as spans."""
        return self.coupled.table(self.device)

    @property
    def ridge(self) -> Tensor:
        """Curvature of the penalty, ``(P,)``: λ everywhere plus 2α on the coupled part."""
        diagonal = torch.empty(self.size, dtype=self.dtype, device=self.device)
        diagonal[:] = self.weight_decay
        return self.coupled.add(diagonal, 2.0 * self.alpha)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self._cast or next(self.model.parameters()).dtype

    @exclusive
    def shifted(self, size: float) -> Tensor:
        """All parameters, each moved at random by ``size`` times its tensor's spread, ``(D,)``.

        Tensors of equal numbers, as biases and scales are at first, move by a quarter of ``size``.
        """
        draw = torch.Generator().manual_seed(0)
        parts = []
        for parameter in self.model.parameters():
            values = parameter.detach().reshape(-1).to(self.dtype)
            spread = float(values.std()) if len(values) > 1 else 0.0
            noise = torch.randn(len(values), generator=draw, dtype=values.dtype).to(values.device)
            parts.append(values + size * (spread or 0.25) * noise)
        return torch.cat(parts)

    def join(self, theta: Tensor, base: Tensor) -> Tensor:
        """All D parameters: ``theta`` (P,) in its places, the rest from ``base`` (D,)."""
        return theta if self._all else self.trained.put(base.clone(), theta)

    def parameters(self, theta: Tensor, base: Tensor) -> dict[str, Tensor]:
        """All parameters by name: ``theta`` (P,) in its places, the rest from ``base`` (D,).

        The rest are constants, so that no derivative in them is formed along the way.
        """
        named = {} if self._all else self.layout.named(base.detach())
        parts = theta.split([len(self.layout.spans[name]) for name in self.trained_names])
        for name, part in zip(self.trained_names, parts, strict=True):
            named[name] = part.reshape(self.layout.shapes[name])
        return named

    def outputs(self, full: Tensor | dict[str, Tensor], x: Tensor) -> Tensor:
        """Model outputs ``(B, ...)`` at all parameters, ``full`` (D,) or by name."""
        named = full if isinstance(full, dict) else self.layout.named(full)
        with MODULES, twice_differentiable(self.model):
            given = named | self.buffers, (as_model_input(x),)
            outputs = functional_call(self.model, *given, tie_weights=self.layout.tied)
        if not isinstance(outputs, Tensor) or outputs.is_nested or not outputs.ndim:
            raise UnsupportedModelError(f"{self.where}: {no_tensor(self.model, outputs)}")
        # Some models return float32 whatever they are, and autocast returns its own dtype.
        dtype = next(iter(named.values())).dtype
        return outputs.to(dtype) if outputs.is_floating_point() else outputs

    def losses(self, full: Tensor | dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Per-example losses ``f_i``, ``(B,)``."""
        return self.loss(self.outputs(full, x), y)

    def bytes_per_example(self) -> int:
        """Bytes that one example's backward pass keeps, measured."""
        return self.once("bytes", self._measure_bytes)

    def _measure_bytes(self) -> int:
        def kept(count: int) -> int:
            sizes = []

            def pack(tensor):
                sizes.append(tensor.numel() * tensor.element_size())
                return tensor

            full = self.layout.flatten(self.model).requires_grad_()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                self.losses(full, self.data.x[[0] * count], self.data.y[[0] * count]).sum()
            return sum(sizes)

        try:
            one, three = kept(1), kept(3)
        except RuntimeError:  # `torch.func.grad` inside the model allows no such hooks
            one, three = self._forward_bytes(1), self._forward_bytes(3)
        input_bytes = self.data.x[0].numel() * self.data.x.element_size()
        return max((three - one) // 2, input_bytes, 64)

    def _forward_bytes(self, count: int) -> int:
        """Bytes of all results of a forward pass, of which a backward pass keeps about as many."""
        counted = _CountBytes()
        with torch.no_grad(), counted:
            full = self.layout.flatten(self.model)
            self.losses(full, self.data.x[[0] * count], self.data.y[[0] * count])
        return counted.total

    def chunks(
        self,
        examples: Examples | None = None,
        copies: int = 1,
        rows: Tensor | None = None,
        memory: int | None = None,
    ) -> Iterator:
        """``(positions, x, y)`` chunk by chunk, small enough that activations fit in memory.

        Args:
            examples: default the stage's own data.
            copies: how many sets of activations one example costs (lanes, tangents).
            rows: only these positions, in this order (a mini-batch); ``(R, B)`` for a mini-batch
                of each lane, whose x and y then have a lane axis first.
            memory: bytes that all copies of a chunk may take, default `working_bytes`.
        """
        examples = self.data if examples is None else examples
        count = len(examples) if rows is None else rows.shape[-1]
        cost = self.bytes_per_example() * copies
        step = max(1, (memory or working_bytes(self.device, cost)) // cost)
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = slice(start, stop) if rows is None else rows[..., start:stop]
            yield part, examples.x[part], examples.y[part]


@dataclass
class Lanes:
    """F for R weightings at once: what the recipes minimise.

    Attributes:
        objective: the stage.
        base: ``(R, D)`` all parameters; the trained places are overwritten by θ.
        centre: ``(R, S)`` the previous stage's values c of the coupled parameters, or None.
        weights: ``(R, m)`` example weights; the 1/m does not depend on them.
        seeds: of each lane's own batch order; None where all lanes have the recipe's.
    """

    objective: Objective
    base: Tensor
    centre: Tensor | None
    weights: Tensor
    seeds: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.base)

    def select(self, lanes: Tensor) -> "Lanes":
        """Only these lanes."""
        centre = None if self.centre is None else self.centre[lanes]
        seeds = None if self.seeds is None else tuple(self.seeds[i] for i in lanes.tolist())
        parts = {"base": self.base[lanes], "weights": self.weights[lanes]}
        return replace(self, centre=centre, seeds=seeds, **parts)

    def full(self, theta: Tensor) -> Tensor:
        """All parameters of each lane, ``(R, D)``."""
        return self.objective.trained.put(self.base.clone(), theta)

    def value_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """F ``(R,)`` and ∇F ``(R, P)`` at ``theta`` (R, P), on all data or a batch ``rows``.

        ``rows`` holds positions ``(B,)``, or ``(R, B)`` where each lane has a batch of its own.
        """
        risk, gradient = self.risk_and_grad(theta, rows)
        return risk + self._penalty(theta), gradient

    def risk_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `value_and_grad`, but the value ``(R,)`` is without the penalties."""
        o = self.objective
        count = len(o.data) if rows is None else rows.shape[-1]
        own = rows is not None and rows.ndim == 2
        value, gradient = theta.new_zeros(len(theta)), self._penalty_gradient(theta)
        for part, x, y in o.chunks(copies=len(self), rows=rows):
            with torch.enable_grad():
                leaf = theta.detach().requires_grad_()
                weights = self.weights.gather(1, part) if own else self.weights[:, part]
                risk = (weights * self._losses(leaf, x, y, own)).sum(1) / count  # (R,)
                (gradient_part,) = torch.autograd.grad(risk.sum(), leaf)
            value = value + risk.detach()
            gradient = gradient.add_(gradient_part)
        return value, gradient

    def _losses(self, theta: Tensor, x: Tensor, y: Tensor, own: bool = False) -> Tensor:
        """Per-example losses of each lane, ``(R, B)``; ``own``: of x and y with a lane axis."""
        o = self.objective

        def losses(theta, base, x, y):
            return o.losses(o.parameters(theta, base), x, y)

        if len(self) == 1:  # vmap over a single lane is pure overhead
            x, y = (x[0], y[0]) if own else (x, y)
            return losses(theta[0], self.base[0], x, y)[None]
        if o.known("lanes", True):  # `gate.lanes_agree`, which a pipeline asks for first
            axis = 0 if own else None
            return vmap(losses, in_dims=(0, 0, axis, axis))(theta, self.base, x, y)
        pairs = enumerate(zip(theta, self.base, strict=True))
        rows = [losses(t, b, *((x[i], y[i]) if own else (x, y))) for i, (t, b) in pairs]
        return torch.stack(rows)

    def _penalty(self, theta: Tensor) -> Tensor:
        """Weight decay and proximal term of each lane ``(R,)``."""
        o = self.objective
        if isinstance(o.weight_decay, Tensor):
            value = theta**2 @ (o.weight_decay / 2)
        else:
            value = o.weight_decay / 2 * (theta**2).sum(1)
        if self.centre is not None and o.alpha:
            value = value + o.alpha * ((o.coupled.take(theta) - self.centre) ** 2).sum(1)
        return value

    def _penalty_gradient(self, theta: Tensor) -> Tensor:
        """Its gradient ``(R, P)``."""
        o = self.objective
        gradient = o.weight_decay * theta
        if self.centre is not None and o.alpha:
            apart = o.coupled.take(theta) - self.centre
            gradient = o.coupled.add(gradient, 2 * o.alpha * apart)
        return gradient
