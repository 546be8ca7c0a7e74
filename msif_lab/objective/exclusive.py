"""One thread at a time inside users' modules.

PyTorch calls a module functionally by exchanging its tensors for the duration of the call, and our
layer-by-layer routes hang hooks into it. Another thread that called or read the module meanwhile
would see numbers that are not its own. What takes long, the backward passes, needs no lock.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# One for all modules: those of different models may share layers.
MODULES = threading.RLock()

if hasattr(os, "register_at_fork"):  # a forked process has no other thread that could release it
    os.register_at_fork(
        before=MODULES.acquire, after_in_parent=MODULES.release, after_in_child=MODULES.release
    )


def exclusive(function: Callable[P, T]) -> Callable[P, T]:
    """A function that only one thread runs at a time, of all that are marked so."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with MODULES:
            return function(*args, **kwargs)

    return alone
