"""How an answer is marked: compared with the right one, then with known wrong ones."""

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
    """The result of marking an answer.

    Attributes:
        exercise: its number.
        state: "unattempted", "wrong" or "right".
        message: why it is wrong, or what to ask next.
    """

    exercise: str
    state: str
    message: str

    def __repr__(self) -> str:
        return f"{LOOK[self.state][0]} {self.exercise} {self.state}: {self.message}"

    def _repr_html_(self) -> str:
        # The message keeps the theme's own text colour; the colours of sign and bar can be seen on
        # white and on black.
        sign, colour = LOOK[self.state]
        rest = html.escape(f"{self.exercise} {self.state}: {self.message}")
        bar = f"border-left: 4px solid {colour}; padding-left: 0.6em"
        return f'<div style="{bar}"><b style="color: {colour}">{sign}</b> {rest}</div>'


@dataclass(frozen=True)
class Exercise:
    """What is right in one exercise, what often goes wrong, and what to ask next.

    Attributes:
        expected: returns the right answer from the quantities given: numbers, a bool, a word, or
            positions in any order.
        next: a question for a reader whose answer is right.
        mistakes: by name, a pair: what the mistake leads to, as a function of (right answer,
            quantities) that returns None where it cannot happen; and a hint. Flipped signs, the
            factors m, 1/m, 2 and 1/2, and transposition are known without an entry.
        tolerance: the largest error that still counts as right, relative to the right answer's
            largest number; whole numbers must be exact.
        judge: where many answers are right: returns what is wrong with one, "" for nothing, from
            (answer, quantities); the answer is a float64 tensor, a bool, a lower-case word or a
            set. `expected` then returns one right answer.

    >>> perimeter = (lambda right, given: 4 * given["side"], "that is the perimeter")
    >>> area = Exercise(lambda side: side**2, "and of a cube?", {"perimeter": perimeter})
    >>> area.mark("area", 9.0, {"side": 3.0})
    ✓ area right: and of a cube?
    >>> area.mark("area", 12.0, {"side": 3.0})
    ✗ area wrong: the largest difference is 3. Hint: that is the perimeter
    """

    expected: Callable[..., Any]
    next: str
    mistakes: Mapping[str, tuple[Callable[[Any, dict], Any], str]] = field(default_factory=dict)
    tolerance: float = 1e-4
    judge: Callable[[Any, dict], str] | None = None

    def wrong_answers(self, **given) -> dict[str, tuple[Any, str]]:
        """The known wrong answers for these quantities, with their hints, by name.

        First the exercise's own, then the usual ones that it does not list itself.
        """
        right = self.expected(**given)
        found = {
            name: (mistake(right, given), hint) for name, (mistake, hint) in self.mistakes.items()
        }
        if self.judge is None and _kind(right) is Tensor:
            right = _read(right, Tensor).double()
            for name, (wrong, hint) in _usual_mistakes(right, given.get("m") or 1).items():
                if name not in found and _difference(wrong, right, self.tolerance):
                    found[name] = wrong, hint
        return {name: (wrong, hint) for name, (wrong, hint) in found.items() if wrong is not None}

    def mark(self, name: str, answer, given: dict) -> Verdict:
        """The verdict on an answer to the exercise of this name; no answer makes it raise."""
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
        if self.judge:
            complaint = self.judge(read, given)
        else:
            complaint = _difference(read, right, self.tolerance)
        if not complaint:
            return Verdict(name, "right", self.next)
        for wrong, hint in self.wrong_answers(**given).values():
            if not _difference(read, _read(wrong, kind), self.tolerance):
                return Verdict(name, "wrong", f"{complaint}. Hint: {hint}")
        return Verdict(name, "wrong", complaint)


def _usual_mistakes(right: Tensor, m: int) -> dict[str, tuple[Tensor, str]]:
    """Wrong answers, with hints, that may come up in any exercise with numbers."""
    usual = {"sign": (-right, "the sign is flipped")}
    if right.ndim == 2:
        usual["transposed"] = (right.T, "rows and columns are swapped")
    for name, factor in {"m": m, "1/m": 1 / m, "2": 2, "1/2": 0.5}.items():
        at_m = f", with m = {m}" if "m" in name else ""
        hint = f"a factor: this is {name} times the right answer{at_m}"
        usual[f"factor {name}"] = (right * factor, hint)
    return usual


class _UnreadableError(ValueError):
    """An answer that cannot be compared with the right one."""


def _kind(right) -> type:
    """How an exercise's answers are read: as a bool, a word, a set of positions, or numbers."""
    if isinstance(right, bool | str):
        return type(right)
    return set if isinstance(right, set | frozenset | list | tuple | range) else Tensor


def _read(value, kind: type):
    """A value as a bool, a lower-case word, a set of positions or a finite tensor on the CPU."""
    wanted = f"{WANTED[kind]} asked for, "
    found = f"this is of type {type(value).__name__}"
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
    positions = set(numbers.tolist())
    if len(positions) < len(numbers):
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
    if not b.numel():
        return ""
    gap = (a.double() - b.double()).abs()
    allowed = 0.0  # whole numbers are exact
    if b.is_floating_point():
        allowed = tolerance * (float(b.double().abs().max()) or 1.0)
    if float(gap.max()) <= allowed:
        return ""
    text = f"the largest difference is {float(gap.max()):.2g}"
    if not gap.ndim:
        return text
    return f"{text}, at {[int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]}"
