"""How an answer is marked: held against the right one, and against those that known mistakes lead
to.
"""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["Exercise", "Verdict"]

LOOK = {"right": ("✓", "#029e73"), "wrong": ("✗", "#d55e00"), "unattempted": ("○", "#808080")}
WANTED = {
    bool: "True or False",
    str: "a word",
    set: "a row of positions (whole numbers)",
    Tensor: "real numbers",
}


@dataclass(frozen=True, repr=False)
class Verdict:
    """What marking an answer came to: ``state`` is "unattempted", "wrong" or "right", ``message``
    why or what next.
    """

    exercise: str
    state: str
    message: str

    def __repr__(self) -> str:
        return f"{LOOK[self.state][0]} {self.exercise} {self.state}: {self.message}"

    def _repr_html_(self) -> str:
        # The message keeps the theme's own text colour; these tones of sign and bar show on white
        # and on black.
        (sign, colour), rest = (
            LOOK[self.state],
            html.escape(f"{self.exercise} {self.state}: {self.message}"),
        )
        bar = f"border-left: 4px solid {colour}; padding-left: 0.6em"
        return f'<div style="{bar}"><b style="color: {colour}">{sign}</b> {rest}</div>'


@dataclass(frozen=True)
class Exercise:
    """What is right in one exercise, what often goes wrong, and what to ask next.

    Attributes:
        expected: the right answer from the quantities given: numbers, a bool, a word, or positions
            in any order.
        next: a question to the reader who has it right.
        mistakes: by name, what one gets by it from (right answer, quantities), None where it cannot
            happen; a hint. Flipped signs, factors m, 1/m, 2 and 1/2 and transposition are known
            without an entry.
        tolerance: how far off is still right, in units of the right answer's largest number; whole
            ones are exact.
        judge: if many answers are right: what is wrong with this one, "" for nothing, from (answer
            as float64 tensor, bool, lower-case word or set, quantities); `expected` then gives one
            right answer.

    >>> area = Exercise(lambda side: side**2, "and of a cube?", {"sum": (lambda right, given: 4 * given["side"], "+")})
    >>> area.mark("area", 9.0, {"side": 3.0})
    ✓ area right: and of a cube?
    >>> area.mark("area", 12.0, {"side": 3.0})
    ✗ area wrong: the largest difference is 3. Hint: +
    """

    expected: Callable[..., Any]
    next: str
    mistakes: Mapping[str, tuple[Callable[[Any, dict], Any], str]] = field(default_factory=dict)
    tolerance: float = 1e-4
    judge: Callable[[Any, dict], str] | None = None

    def wrong_answers(self, **given) -> dict[str, tuple[Any, str]]:
        """The known wrong answers for these quantities with their hints: the exercise's own, then
        the usual ones.
        """
        right = self.expected(**given)
        found = {
            name: (mistake(right, given), hint) for name, (mistake, hint) in self.mistakes.items()
        }
        if self.judge is None and _kind(right) is Tensor:
            right = _read(right, Tensor).double()
            usual = {"sign": (-right, "the sign is flipped")}
            if right.ndim == 2:
                usual["transposed"] = right.T, "rows and columns are swapped"
            m = given.get("m") or 1
            for name, factor in {"m": m, "1/m": 1 / m, "2": 2, "1/2": 0.5}.items():
                at_m = f", with m = {m}" if "m" in name else ""
                usual[f"factor {name}"] = (
                    right * factor,
                    f"a factor: this is {name} times the right answer{at_m}",
                )
            different = {
                name: x for name, x in usual.items() if _difference(x[0], right, self.tolerance)
            }
            found = found | {name: x for name, x in different.items() if name not in found}
        return {name: (wrong, hint) for name, (wrong, hint) in found.items() if wrong is not None}

    def mark(self, name: str, answer, given: dict) -> Verdict:
        """The verdict on an answer to the exercise of this name; never raises because of what the
        answer is.
        """
        parts = answer if isinstance(answer, list | tuple) else [answer]
        if any(part is ... for part in [*parts, *given.values()]):
            return Verdict(name, "unattempted", "replace the dots and run the cell again")
        right = self.expected(**given)
        kind = _kind(right)
        right = _read(right, kind)
        try:
            read = _read(answer, kind)
        except _UnreadableError as complaint:
            return Verdict(name, "wrong", str(complaint))
        if kind is Tensor:
            read = read.double()
            if right.ndim == 0 and read.numel() == 1:
                read = read.reshape(())  # one number is one number, however it is wrapped
        complaint = (
            self.judge(read, given) if self.judge else _difference(read, right, self.tolerance)
        )
        if not complaint:
            return Verdict(name, "right", self.next)
        known = self.wrong_answers(**given).values()
        hints = [
            hint
            for wrong, hint in known
            if not _difference(read, _read(wrong, kind), self.tolerance)
        ]
        return Verdict(name, "wrong", ". Hint: ".join([complaint, *hints[:1]]))


class _UnreadableError(ValueError):
    """An answer that cannot be compared with the right one."""


def _kind(right) -> type:
    if isinstance(right, bool | str):
        return type(right)
    return set if isinstance(right, set | frozenset | list | tuple | range) else Tensor


def _read(value, kind: type):
    """A value as a bool, a lower-case word, a set of positions or a finite tensor on the CPU."""
    wanted, found = f"{WANTED[kind]} asked for, ", f"this is of type {type(value).__name__}"
    try:
        if kind in (bool, str):
            value = value.item() if hasattr(value, "item") else value  # of NumPy and torch
            if isinstance(value, kind):
                return value if kind is bool else value.strip().lower()
            raise TypeError(found)
        if isinstance(value, set | frozenset):
            value = list(value)
        elif isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
            value = torch.stack(value)
        elif hasattr(value, "__array__") and not isinstance(value, Tensor):
            value = numpy.array(value)  # a copy: torch refuses views with negative strides
        numbers = torch.as_tensor(value).detach().cpu().to_dense()
    except (TypeError, ValueError, RuntimeError):
        raise _UnreadableError(wanted + found) from None
    fractions = kind is set and numbers.is_floating_point() and numbers.numel() > 0
    if numbers.dtype is torch.bool or numbers.is_complex() or fractions:
        raise _UnreadableError(f"{wanted}these are {str(numbers.dtype).removeprefix('torch.')}")
    if kind is Tensor:
        bad = int((~torch.isfinite(numbers)).sum())
        if bad:
            raise _UnreadableError(
                f"{bad} of {numbers.numel()} numbers are NaN or inf; look for a division by zero"
            )
        return numbers
    if numbers.ndim != 1:
        raise _UnreadableError(f"{wanted}this has the shape {tuple(numbers.shape)}")
    if len(positions := set(numbers.tolist())) < len(numbers):
        raise _UnreadableError("a position comes twice")
    return positions


def _difference(a, b, tolerance: float) -> str:
    """How a differs from the right b, in words, both as `_read` returns them; "" if it does not."""
    if isinstance(b, set):
        return "" if a == b else f"{len(a & b)} of {len(b)} positions are right, of {len(a)} given"
    if not isinstance(b, Tensor):
        return "" if a == b else "it is not so"
    if a.shape != b.shape:
        return f"the shape is {tuple(a.shape)}, it should be {tuple(b.shape)}"
    gap, size = (a.double() - b.double()).abs(), b.double().abs()
    allowed = tolerance * (float(size.max()) or 1.0) if b.numel() and b.is_floating_point() else 0.0
    if not b.numel() or float(gap.max()) <= allowed:
        return ""
    place = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)] if gap.ndim else ""
    return f"the largest difference is {float(gap.max()):.2g}{f', at {place}' if gap.ndim else ''}"
