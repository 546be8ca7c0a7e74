"""Whether a call draws random numbers: the generators' states before and after it are compared.

Comparing values is not enough, since a layer that drops one example in a hundred gives equal values
nearly always.
"""

import copy
import inspect
import random
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["States", "draws_from"]

TRIES = 3  # another thread may draw meanwhile, but hardly during each of them
OBJECTS = 5000  # in which generators are looked for
MANY = 64  # entries of a container that are looked at


@dataclass
class Source:
    """A generator: what messages call it, a copy of its state, and how to set it again."""

    name: str
    get: Callable[[], object]
    put: Callable[[object], None]


def _same(left: object, right: object) -> bool:
    if isinstance(left, dict):
        return all(_same(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, tuple) and any(isinstance(part, np.ndarray) for part in left):
        return all(map(_same, left, right))
    return left == right


def _shared_sources() -> Iterator[Source]:
    """The generators that a function can draw from without being given one."""
    yield Source("torch's CPU generator", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            yield Source(
                f"torch's generator of cuda:{i}",
                lambda i=i: torch.cuda.get_rng_state(i),
                lambda state, i=i: torch.cuda.set_rng_state(state, i),
            )
    yield Source("Python's random", random.getstate, random.setstate)
    yield Source("numpy.random", np.random.get_state, np.random.set_state)


def _own_sources(owners: Iterable[object]) -> Iterator[Source]:
    """Generators that objects hold in their attributes, nearest first and as far as can be seen."""
    queue = list(owners)
    seen: set[int] = set()
    for owner in queue:
        if id(owner) in seen or len(seen) >= OBJECTS:
            continue
        seen.add(id(owner))
        name = f"a {type(owner).__module__}.{type(owner).__name__} of its own"
        if isinstance(owner, torch.Generator):
            yield Source(name, owner.get_state, owner.set_state)
        elif isinstance(owner, random.Random):
            yield Source(name, owner.getstate, owner.setstate)
        elif isinstance(owner, np.random.RandomState):
            yield Source(name, owner.get_state, owner.set_state)
        elif isinstance(owner, np.random.Generator):
            yield _bits(name, owner.bit_generator)
        else:
            queue += _held_by(owner)


def _bits(name: str, bits: np.random.BitGenerator) -> Source:
    return Source(name, lambda: bits.state, lambda state: setattr(bits, "state", state))


def _held_by(owner: object) -> Iterable:
    """What an object holds: attributes, entries unless there are many, what a function reads."""
    if isinstance(owner, (torch.Tensor, np.ndarray, type, types.ModuleType)):
        return []
    if isinstance(owner, (list, tuple, dict)):
        entries = owner.values() if isinstance(owner, dict) else owner
        return list(entries) if len(owner) <= MANY else []
    if isinstance(owner, types.MethodType):
        return [owner.__self__, owner.__func__]
    if isinstance(owner, types.FunctionType):
        read = inspect.getclosurevars(owner)
        return [*read.nonlocals.values(), *read.globals.values(), *vars(owner).values()]
    forward = getattr(type(owner), "forward", None)  # of a module: it may read globals
    reads = [forward] if isinstance(forward, types.FunctionType) else []
    return [*reads, *getattr(owner, "__dict__", {}).values()]


class States:
    """The present states of the generators that a call may draw from.

    Args:
        owners: objects in whose attributes generators are looked for, besides the shared ones.
    """

    def __init__(self, owners: Iterable[object] = ()):
        self.sources = [*_shared_sources(), *_own_sources(owners)]
        self.keep()

    def keep(self) -> None:
        """Take the states as they are now."""
        self.states = [source.get() for source in self.sources]

    def _changed(self) -> list[tuple[Source, object]]:
        pairs = zip(self.sources, self.states, strict=True)
        return [(source, state) for source, state in pairs if not _same(source.get(), state)]

    def moved(self) -> list[str]:
        """Names of the generators that are in another state now."""
        return list(dict.fromkeys(source.name for source, _ in self._changed()))

    def restore(self) -> None:
        """Put the generators back into the states that were kept."""
        for source, state in self._changed():
            source.put(state)


def draws_from(function: Callable[[], object], owners: Iterable[object] = ()) -> list[str]:
    """Names of the random generators that every call of a function moves; all are put back.

    A first call may draw constants that it keeps, or set a seed of its own, so the later ones
    count.

    Args:
        function: what is called, two to four times.
        owners: as in `States`.
    """
    start = States(owners)
    now = copy.copy(start)
    try:
        function()
        names = [source.name for source in start.sources]
        for _ in range(TRIES):
            now.keep()
            function()
            moved = now.moved()
            names = [name for name in moved if name in names]
            if not names:
                break
        return names
    finally:
        start.restore()
