"""A stage as a pure function of flat parameters: the user's module is called, never changed.

The letters are those of the lessons: ``θ`` for the ``P`` parameters that a stage trains, ``w`` for
the example weights, and ``F(θ; w) = (1/m) Σ_i w_i f_i(θ) + λ/2 ‖θ‖² + α ‖θ_S − c‖²``, where the
last term holds the shared part ``θ_S`` near the previous stage's ``c`` (α = 0 without a proximal
link). A stage trained under R weightings at once has R *lanes*, ``(R, P)``.
"""

import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.examples import Examples, Inputs
from ..data.fields import Fields, as_model_input
from ..errors import UnsupportedModelError
from ..memory import working_bytes
from .layout import Layout, Places
from .wrapping import is_compiled, no_tensor


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions in full precision on CUDA.

    By default PyTorch computes them in TF32, with 10 bits of mantissa. Two kernels then differ by
    1e-3, too much to tell whether two ways of computing a number agree.
    """
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


class _Switch:
    """A switch of the whole process, turned by the first thread that enters.

    The last thread that leaves turns it back.

    Args:
        turn: makes a context manager that turns it, and back.
    """

    def __init__(self, turn: Callable):
        self.turn = turn
        self.lock, self.inside, self.turned = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.turned = self.turn()
                self.turned.__enter__()
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.turned.__exit__(None, None, None)


@contextmanager
def _fused_attention_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _cudnn_off() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_FUSED_OFF, _CUDNN_OFF = _Switch(_fused_attention_off), _Switch(_cudnn_off)
_COMPILER_OFF = _Switch(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by plain matrix products: fused kernels have no second derivative."""
    with _FUSED_OFF:
        yield


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """A forward pass without the kernels that have no second derivative.

    These are fused attention, what `torch.compile` made of a layer and, on CUDA, the recurrent
    layers of cuDNN.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    eager = _COMPILER_OFF if is_compiled(model) else nullcontext()
    with _FUSED_OFF, eager, _CUDNN_OFF if recurrent else nullcontext():
        yield


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
        weight_decay: λ, on every trained parameter, biases included.
        trained: names of the parameters θ; default all that require a gradient.
        alpha, shared: the proximal term ``α ‖θ_S − c‖²`` and the names S it holds.
        where: what messages call this stage.
    """

    def __init__(
        self, model, data, loss, weight_decay=0.0, trained=None, alpha=0.0, shared=(), where="stage"
    ):
        self.model = model
        self.data = data
        self.loss = loss
        self.where = where
        self.device = data.x.device
        self.layout = Layout(model, where)
        self.weight_decay = float(weight_decay)
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
        # The function's constants: copies, so that a module that writes into its buffers during a
        # call does not change its own.
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._found: dict = {}  # see `once`
        self._made_of = self._parts()

    def once(self, name: Hashable, measure: Callable[[], object]):
        """A fact about model and loss by name: ``measure()`` is called only the first time."""
        if name not in self._found:
            self._found[name] = measure()
        return self._found[name]

    def known(self, name: Hashable, default):
        """What `once` has found under this name, or the default if nobody asked yet."""
        return self._found.get(name, default)

    def forget(self, *names: Hashable) -> None:
        """Drop what `once` has found under these names."""
        for name in names:
            self._found.pop(name, None)

    def recall(self, other: "Objective") -> bool:
        """Take over what `once` found for another stage, if it is this very function and data.

        The values of the weights do not count: facts are about the function of them.
        """
        ours, theirs = self._made_of, other._made_of
        same = len(ours) == len(theirs) and all(map(_same, ours, theirs))
        same = same and all(torch.equal(b, other.buffers[n]) for n, b in self.buffers.items())
        if same:
            self._found = other._found
        return same

    def _parts(self) -> list:
        """Everything but numbers that the function consists of.

        Kept as objects, since the address of one that is gone may be given to another.
        """
        tensors = [self.data.y]
        if not isinstance(self.data.x, Inputs):
            tensors += self.data.x.values() if isinstance(self.data.x, Fields) else [self.data.x]
        parts = [self.loss, self.data.x, self.dtype, str(self.device), *self.trained_names]
        for tensor in tensors:
            parts += [tensor, tensor._version]
        for name, module in self.model.named_modules():
            parts += [name, module, module.training, len(module._buffers)]
            parts += [len(module._forward_hooks), len(module._forward_pre_hooks)]
            if "_orig_mod" in module._modules:  # compiled: the module inside is the function
                continue
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    parts += [key, value]
        return parts

    def on(self, data: Examples) -> "Objective":
        """The same function on other examples, with its own buffers; facts of `once` are shared."""
        other = copy.copy(self)
        other.data = data
        other.buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
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
        diagonal = torch.full((self.size,), self.weight_decay, dtype=self.dtype, device=self.device)
        return self.coupled.add(diagonal, 2.0 * self.alpha)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.model.parameters()).dtype

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
        with twice_differentiable(self.model):
            outputs = functional_call(self.model, named | self.buffers, (as_model_input(x),))
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
            rows: only these positions, in this order (a mini-batch).
            memory: bytes that all copies of a chunk may take, default `working_bytes`.
        """
        examples = self.data if examples is None else examples
        count = len(examples) if rows is None else len(rows)
        cost = self.bytes_per_example() * copies
        step = max(1, (memory or working_bytes(self.device, cost)) // cost)
        for start in range(0, count, step):
            stop = min(start + step, count)
            part = slice(start, stop) if rows is None else rows[start:stop]
            yield part, examples.x[part], examples.y[part]


def _same(a, b) -> bool:
    """Whether two settings are one object, or equal and simple enough that this says it all."""
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, tuple)) and a == b)


@dataclass
class Lanes:
    """F for R weightings at once: what the recipes minimise.

    Attributes:
        objective: the stage.
        base: ``(R, D)`` all parameters; the trained places are overwritten by θ.
        centre: ``(R, S)`` the previous stage's values c of the coupled parameters, or None.
        weights: ``(R, m)`` example weights; the 1/m does not depend on them.
    """

    objective: Objective
    base: Tensor
    centre: Tensor | None
    weights: Tensor

    def __len__(self) -> int:
        return len(self.base)

    def select(self, lanes: Tensor) -> "Lanes":
        """Only these lanes."""
        centre = None if self.centre is None else self.centre[lanes]
        return replace(self, base=self.base[lanes], centre=centre, weights=self.weights[lanes])

    def full(self, theta: Tensor) -> Tensor:
        """All parameters of each lane, ``(R, D)``."""
        return self.objective.trained.put(self.base.clone(), theta)

    def value_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """F ``(R,)`` and ∇F ``(R, P)`` at ``theta`` (R, P), on all data or a batch ``rows``."""
        o = self.objective
        count = len(o.data) if rows is None else len(rows)
        value, gradient = self._penalty(theta)
        for part, x, y in o.chunks(copies=len(self), rows=rows):
            with torch.enable_grad():
                leaf = theta.detach().requires_grad_()
                risk = (self.weights[:, part] * self._losses(leaf, x, y)).sum(1) / count  # (R,)
                (gradient_part,) = torch.autograd.grad(risk.sum(), leaf)
            value = value + risk.detach()
            gradient = gradient.add_(gradient_part)
        return value, gradient

    def _losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Per-example losses of each lane, ``(R, B)``."""
        o = self.objective
        if len(self) == 1:  # vmap over a single lane is pure overhead
            return o.losses(o.parameters(theta[0], self.base[0]), x, y)[None]
        if o.known("lanes", True):  # `gate.lanes_agree`, which a pipeline asks for first
            return vmap(lambda t, b: o.losses(o.parameters(t, b), x, y))(theta, self.base)
        pairs = zip(theta, self.base, strict=True)
        return torch.stack([o.losses(o.parameters(t, b), x, y) for t, b in pairs])

    def _penalty(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weight decay and proximal term of each lane ``(R,)``, and their gradient ``(R, P)``."""
        o = self.objective
        value = o.weight_decay / 2 * (theta**2).sum(1)
        gradient = o.weight_decay * theta
        if self.centre is not None and o.alpha:
            apart = o.coupled.take(theta) - self.centre
            value = value + o.alpha * (apart**2).sum(1)
            gradient = o.coupled.add(gradient, 2 * o.alpha * apart)
        return value, gradient
