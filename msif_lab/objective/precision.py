"""How precisely a stage computes: in the least precise dtype that its model or loss uses inside."""

import contextlib

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .objective import Objective

__all__ = ["computing_dtype", "half_precision", "require_precision"]

HALF = (torch.float16, torch.bfloat16)


def computing_dtype(o: Objective) -> torch.dtype:
    """The least precise dtype among all results of one call of model and loss.

    Many models normalise in float32 whatever their weights are, and autocast multiplies in
    bfloat16: derivatives and comparisons are only as precise as that.
    """
    return o.once("computes in", lambda: _computing_dtype(o))


def _computing_dtype(o: Objective) -> torch.dtype:
    apart = o.on(o.data)  # with buffers of its own
    found = {o.dtype}
    # A loss that fails is refused elsewhere, in words of its own.
    with torch.enable_grad(), contextlib.suppress(Exception):
        full = o.layout.flatten(o.model).requires_grad_()
        found |= _dtypes(apart.losses(full, o.data.x[:1], o.data.y[:1]))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _dtypes(result: Tensor) -> set[torch.dtype]:
    """Floating dtypes of all that a result was computed from and that depends on parameters.

    Read from the graph: a dispatch mode would see them too, but makes PyTorch load its compiler.
    """
    found = {result.dtype}
    nodes = [result.grad_fn]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        found |= {metadata.dtype for metadata in node._input_metadata}
        nodes += [before for before, _ in node.next_functions]
    return {dtype for dtype in found if dtype.is_floating_point}


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
