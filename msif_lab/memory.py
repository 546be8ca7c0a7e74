"""Memory budgets: sizes as text, checks made before the work, and the size of one chunk."""

import math
import os

import torch

from .errors import MemoryBudgetError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(size: str | int | float, name: str = "memory") -> int:
    """Number of bytes in a size such as ``"1GB"``, ``"250 MB"`` or ``10**9``.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < math.inf:
        return int(size)
    if isinstance(size, str):
        text = size.strip().upper()
        for unit in sorted(_UNITS, key=len, reverse=True):
            number = text.removesuffix(unit).strip()
            if text.endswith(unit) and number.replace(".", "", 1).isdigit():
                return int(float(number) * _UNITS[unit])
    raise ValueError(
        f"{name}={size!r} is not a size; write it like '500MB' or '1GB', or as a number of bytes"
    )


def require_memory(needed: int, budget: int, what: str, way_out: str) -> None:
    """Raise `MemoryBudgetError` before the work when ``needed`` bytes exceed ``budget``."""
    if needed > budget:
        raise MemoryBudgetError(
            f"{what} needs about {needed / 1e6:,.0f} MB, the budget is {budget / 1e6:,.0f} MB; "
            f"{way_out}"
        )


# Set it, or MSIF_WORKING_BYTES="2GB" in the environment, and chunks take exactly that much.
WORKING_BYTES: int | None = None


def working_bytes(device: torch.device, example: int = 0) -> int:
    """How many bytes one chunk of activations may take.

    On a CPU 32 MB: with less, Python's overhead dominates, with more the chunk leaves the caches,
    and Binder guarantees only 1 GB in all. Where examples are large it is enough for 16 of them,
    up to 256 MB. On a GPU an eighth of its memory, but at most half of what is free: smaller chunks
    would leave it waiting for Python.

    Args:
        device: where the work is done.
        example: bytes that one example takes.
    """
    if given := WORKING_BYTES or os.environ.get("MSIF_WORKING_BYTES"):
        return parse_bytes(given, "MSIF_WORKING_BYTES") if isinstance(given, str) else given
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(total // 8, free // 2)
    return max(32 * 10**6, min(16 * example, 256 * 10**6))
