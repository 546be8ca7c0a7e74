"""Switches of the whole process that PyTorch has, turned inside our own calls and turned back.

Threads may overlap, and an interrupt may come between any two lines: a switch counts the calls that
are inside, and forgets a call that has died.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakSet

import torch
from torch import nn

from .wrapping import is_compiled

Values = dict[str, object]


class _Token:
    """One call inside a switch, and the model that it is about."""

    def __init__(self, model: nn.Module | None = None):
        self.model = model


class Switch:
    """Settings of the process that the first call to enter turns, and the last to leave turns back.

    Args:
        read: the present values.
        write: sets values.
        wanted: the values inside, for the names that `read` gives.
    """

    def __init__(
        self,
        read: Callable[[], Values],
        write: Callable[[Values], None],
        wanted: Callable[[str], object],
    ):
        self.read, self.write, self.wanted = read, write, wanted
        self.lock = threading.Lock()
        self.inside: WeakSet[_Token] = WeakSet()
        self.before: Values | None = None

    @contextmanager
    def turned(self) -> Iterator[None]:
        """The wanted values inside."""
        token = _Token()
        try:
            self._enter(token)
            yield
        finally:
            try:
                self._leave(token)
            except BaseException:  # an interrupt on the way out
                self._leave(token)
                raise

    def _enter(self, token: _Token) -> None:
        with self.lock:
            if not self.inside:
                self._turn_back()  # what an interrupted call has left
                self.before = self.read()
            self.inside.add(token)
            self.write({name: self.wanted(name) for name in self.before})

    def _leave(self, token: _Token) -> None:
        with self.lock:
            self.inside.discard(token)
            if not self.inside:
                self._turn_back()

    def _turn_back(self) -> None:
        if self.before is not None:
            self.write(self.before)
            self.before = None


ATTENTION = {
    "flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "mem_efficient": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "cudnn": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    "math": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "fast path": (
        torch.backends.mha.get_fastpath_enabled,
        torch.backends.mha.set_fastpath_enabled,
    ),
}


def _write_attention(values: Values) -> None:
    for name, value in values.items():
        read, write = ATTENTION[name]
        if read() != value:
            write(value)


def _write_cudnn(values: Values) -> None:
    torch.backends.cudnn.enabled = values["enabled"]


# Since PyTorch 2.9 each kind of operator has its own setting; the older ones cannot be read once
# somebody has used these.
ROUNDED = [
    f"{backend}.{kind}"
    for backend, kinds in (("cudnn", "conv rnn"), ("cuda", "matmul"), ("mkldnn", "conv matmul"))
    for kind in kinds.split()
    if hasattr(getattr(getattr(torch.backends, backend), kind, None), "fp32_precision")
]


def _settings(name: str):
    backend, kind = name.split(".")
    return getattr(getattr(torch.backends, backend), kind)


def _read_precision() -> Values:
    if not ROUNDED:
        precision = torch.get_float32_matmul_precision()
        return {"conv": torch.backends.cudnn.allow_tf32, "matmul": precision}
    return {name: _settings(name).fp32_precision for name in ROUNDED}


def _write_precision(values: Values) -> None:
    if not ROUNDED:
        torch.backends.cudnn.allow_tf32 = values["conv"]
        torch.set_float32_matmul_precision(values["matmul"])
        return
    for name, value in values.items():
        _settings(name).fp32_precision = value


FUSED_OFF = Switch(
    lambda: {name: read() for name, (read, _) in ATTENTION.items()},
    _write_attention,
    lambda name: name == "math",
)
CUDNN_OFF = Switch(
    lambda: {"enabled": torch.backends.cudnn.enabled}, _write_cudnn, lambda name: False
)
EXACT = Switch(
    _read_precision,
    _write_precision,
    lambda name: {"conv": False, "matmul": "highest"}.get(name, "ieee"),
)


class _Compiler:
    """Whether compiled layers run as the plain ones that they were made from."""

    def __init__(self):
        self.stance = None

    def read(self) -> Values:
        return {"eager": self.stance is not None}

    def write(self, values: Values) -> None:
        if values["eager"] and self.stance is None:
            self.stance = torch.compiler.set_stance("force_eager")
        elif not values["eager"] and self.stance is not None:
            stance, self.stance = self.stance, None
            stance.__exit__(None, None, None)


_compiler = _Compiler()
COMPILER_OFF = Switch(_compiler.read, _compiler.write, lambda name: True)


class _Prepared(threading.local):
    """The calls of `twice_differentiable` that this thread is in."""

    def __init__(self):
        self.calls: WeakSet[_Token] = WeakSet()


_prepared = _Prepared()


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Forward passes without the kernels that have no second derivative.

    These are fused attention, what `torch.compile` made of a layer and, on CUDA, the recurrent
    layers of cuDNN. Within such a block further ones for the same model cost next to nothing, so
    that a long loop can put one around all its steps.
    """
    if any(call.model is model for call in _prepared.calls):
        yield
        return
    token = _Token(model)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    eager = COMPILER_OFF.turned() if is_compiled(model) else nullcontext()
    with FUSED_OFF.turned(), eager, CUDNN_OFF.turned() if recurrent else nullcontext():
        _prepared.calls.add(token)
        try:
            yield
        finally:
            _prepared.calls.discard(token)


def exact_products() -> AbstractContextManager[None]:
    """Compute float32 convolutions and matrix products in full precision.

    By default PyTorch computes convolutions on CUDA in TF32, with 10 bits of mantissa. Two kernels
    then differ by 1e-3, too much to tell whether two ways of computing a number agree.
    """
    return EXACT.turned()
