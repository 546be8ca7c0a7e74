"""Arguments checked where they come in: a message names the argument, the value and the way out."""

import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_damping",
    "check_flag",
    "check_function",
    "check_instance",
    "check_number",
    "check_path",
    "check_seed",
    "check_tensor",
    "check_whole",
    "is_number",
    "listed",
    "numbers_of",
    "shown",
]


def shown(value) -> str:
    """A value as a message shows it: short, and without the numbers of a large array."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def is_number(value) -> bool:
    """Whether it is one real number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _is_whole(value) -> bool:
    """Whether it is one whole number, of Python, NumPy or a tensor or array without dimensions."""
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        return value.ndim == 0 and kind.startswith(("int", "uint"))
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def check_whole(
    name: str, value, least: int = 1, most: int | None = None, *, why: str = "", none: str = ""
) -> Any:
    """A whole number within bounds, as Python's own.

    Args:
        name: of the argument.
        value: what was given for it.
        least, most: bounds, both included.
        why: what the upper bound is, or another way out.
        none: what None stands for, where it is allowed.

    Raises:
        ValueError: it is another number, or none.
    """
    if none and value is None:
        return None
    if not _is_whole(value) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"between {least} and {most}"
        way_out = f"{', ' if why else ''}{why}{f', or None for {none}' if none else ''}"
        raise ValueError(f"{name}={shown(value)} must be a whole number {allowed}{way_out}")
    return operator.index(value)


def check_number(name: str, value, holds: Callable[[float], bool], text: str) -> Any:
    """One real number for which ``holds``; NumPy's become Python's.

    Raises:
        ValueError: it is another number, or none; ``text`` says what is allowed.
    """
    if not is_number(value) or not holds(value):
        raise ValueError(f"{name}={shown(value)}: {name} must be {text}")
    return value if type(value) in (int, float) else float(value)


def check_damping(value, name: str = "damping") -> float:
    """What is added to a curvature: zero or a positive number.

    Raises:
        ValueError: it is negative, not finite, or no number.
    """
    if isinstance(value, Tensor) and not value.ndim and value.dtype != torch.bool:
        value = value.item()
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={shown(value)} must be zero or positive, one finite number")
    return float(value)


def check_seed(name: str, value, least: int = -(2**63)) -> int:
    """A seed as PyTorch's generators take it, or from ``least=0`` as NumPy's do.

    Raises:
        ValueError: it is something else.
    """
    if not _is_whole(value) or not least <= value < 2**64:
        from_zero = "from 0 to" if least == 0 else "below"
        raise ValueError(
            f"{name}={shown(value)} must be a whole number {from_zero} 2**64, such as 0"
        )
    return operator.index(value)


def check_flag(name: str, value) -> bool:
    """True or False; 1 and 0 of Python and NumPy count.

    Raises:
        ValueError: it is something else, such as the word "no", which Python would call true.
    """
    known = isinstance(value, (bool, np.bool_)) or (_is_whole(value) and value in (0, 1))
    if not known:
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return bool(value)


def check_choice(name: str, value, options: Iterable) -> None:
    """One of a few words.

    Raises:
        ValueError: it is none of them.
    """
    options = list(options)
    if not isinstance(value, str) or value not in options:
        words = f"{', '.join(map(repr, options[:-1]))} or {options[-1]!r}"
        raise ValueError(f"{name}={shown(value)} must be {words if options[1:] else options[0]!r}")


def check_instance(name: str, value, kinds: type | tuple[type, ...], way_out: str = "") -> None:
    """An object of this class, or of one of these.

    Raises:
        TypeError: it is of another class, or a class itself.
    """
    if isinstance(value, kinds):
        return
    first = kinds[0] if isinstance(kinds, tuple) else kinds
    home = first.__module__.partition(".")[0]
    found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise TypeError(
        f"{name} must be a {home}.{first.__name__}, not {found}{'; ' if way_out else ''}{way_out}"
    )


def check_function(name: str, value, form: str) -> None:
    """Something that can be called.

    Raises:
        TypeError: it cannot; ``form`` says how it will be called.
    """
    if not callable(value):
        raise TypeError(f"{name}={shown(value)} must be a function {form}")


def check_path(name: str, value) -> None:
    """The name of a file or folder.

    Raises:
        TypeError, ValueError: it is something else, empty, or no name that a file can have.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={shown(value)} must be a path: text or a pathlib.Path")
    text = os.fspath(value)
    if not text or "\0" in str(text):
        raise ValueError(f"{name}={shown(value)} names no file; give a path such as 'folder/file'")


def check_tensor(name: str, value, shape: str) -> None:
    """A tensor; its shape is the caller's to check.

    Raises:
        TypeError: it is something else; ``shape`` says what is expected.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={shown(value)} must be a tensor {shape}")


def listed(name: str, value, what: str) -> list:
    """The members of a list, tuple or another iterable of things.

    Raises:
        TypeError: it is text, a mapping, or no iterable; ``what`` says what is expected.
    """
    members = None
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        try:
            members = list(value)
        except TypeError:  # a tensor or array without dimensions
            members = None
    if members is None:
        raise TypeError(f"{name}={shown(value)} must be {what}")
    return members


def numbers_of(name: str, value, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of any kind as a tensor on its device, which needs no gradient.

    Raises:
        TypeError: there are none; ``what`` says what is expected.
    """
    try:
        if isinstance(value, Mapping | set | str | bytes):
            raise TypeError
        if isinstance(value, Sequence) and value and all(isinstance(v, Tensor) for v in value):
            value = torch.stack(tuple(value))
        return torch.as_tensor(value, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name}={shown(value)} must be {what}") from None
