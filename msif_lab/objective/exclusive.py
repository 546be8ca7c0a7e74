"""One thread at a time inside users' modules.

PyTorch calls a module functionally by exchanging its tensors for the duration of the call, and our
layer-by-layer routes hang hooks into it. Another thread that called or read the module meanwhile
would see numbers that are not its own. What takes long, the backward passes, needs no lock.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Lock:
    """A re-entrant lock; a forked process, without the thread that may hold it, starts afresh."""

    def __init__(self):
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_) -> None:
        with contextlib.suppress(RuntimeError):  # forked inside
            self._lock.release()


# One for all modules: those of different models may share layers.
MODULES = _Lock()


def exclusive(function: Callable[P, T]) -> Callable[P, T]:
    """A function that only one thread runs at a time, of all that are marked so."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with MODULES:
            return function(*args, **kwargs)

    return alone
