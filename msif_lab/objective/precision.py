"""How precisely a stage computes: in the least precise dtype that its model or loss uses inside."""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedModelError
from .objective import Objective

__all__ = ["computing_dtype", "half_precision", "require_precision"]

HALF = (torch.float16, torch.bfloat16)


class _Dtypes(TorchDispatchMode):
    """Notes the dtypes of all floating results, those under autocast included."""

    def __init__(self):
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and result.is_floating_point():
                self.found.add(result.dtype)
        return results


def computing_dtype(o: Objective) -> torch.dtype:
    """The least precise dtype among all results of one call of model and loss.

    Many models normalise in float32 whatever their weights are, and autocast multiplies in
    bfloat16: derivatives and comparisons are only as precise as that.
    """
    return o.once("computes in", lambda: _computing_dtype(o))


def _computing_dtype(o: Objective) -> torch.dtype:
    seen = _Dtypes()
    apart = o.on(o.data)  # with buffers of its own
    # A loss that fails is refused elsewhere, in words of its own.
    with torch.no_grad(), seen, contextlib.suppress(Exception):
        apart.losses(o.layout.flatten(o.model), o.data.x[:1], o.data.y[:1])
    return max({o.dtype, *seen.found}, key=lambda dtype: torch.finfo(dtype).eps)


def half_precision(o: Objective) -> str:
    """Why a stage is too coarse for curvature and retraining, in words; empty if it is not."""
    dtype = computing_dtype(o)
    if dtype not in HALF:
        return ""
    name = str(dtype).removeprefix("torch.")
    how = f"its parameters are {name}" if o.dtype in HALF else f"it computes in {name} inside"
    way_out = "use pipeline.float() or pipeline.double()"
    if o.dtype not in HALF:
        way_out = "take autocast and .to() out of model and loss"
    return (
        f"{how}, whose rounding of {torch.finfo(dtype).eps:.0e} is larger than what curvature, "
        f"replayed steps and removed examples change; {way_out}"
    )


def require_precision(o: Objective, what: str) -> None:
    """Refuse what half precision cannot give; ``what``: its name for the message.

    Raises:
        UnsupportedModelError: saying what to do; baselines of first derivatives do without.
    """
    if reason := half_precision(o):
        raise UnsupportedModelError(
            f"{o.where}: {what} is refused, because {reason}. Baselines such as GradientDot() work"
        )
