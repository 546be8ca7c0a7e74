"""The lessons' exercises: right answers and common mistakes; a lesson calls `check`.

One module for each lesson. How to get the right answer is written once, folded, in the lesson.
"""

import inspect

from ..arguments import shown
from . import (
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
)
from .marking import Verdict

__all__ = ["EXERCISES", "check"]

LESSONS = (
    lesson_00,
    lesson_01,
    lesson_02,
    lesson_03,
    lesson_04,
    lesson_05,
    lesson_06,
    lesson_07,
    lesson_08,
    lesson_09,
    lesson_10,
    lesson_11,
)
EXERCISES = {name: task for lesson in LESSONS for name, task in lesson.EXERCISES.items()}


def check(exercise: str, answer, /, **given) -> Verdict:
    """Whether an answer to a lesson's exercise is right.

    It is the last line of the exercise's cell, so that Jupyter shows what it returns.

    Args:
        exercise: its number, such as "09-3".
        answer: the reader's; while it is ``...`` the exercise counts as unattempted, which is not
            an error, so that Run All passes.
        given: the quantities that the question starts from.

    Returns:
        `Verdict`: unattempted; wrong, with the largest difference, and with a hint if the mistake
        is a known one; or right, with a question that leads on.

    Raises:
        ValueError: no such exercise.
        TypeError: a quantity is missing or unknown.

    >>> check("09-3", ..., rates=[0.1, 0.1], momentum=0.5)
    ○ 09-3 unattempted: replace the dots and run the cell again
    >>> check("09-3", 2.5, rates=[0.1, 0.1], momentum=0.5)
    ✗ 09-3 wrong: the largest difference is 1.2. Hint: ...
    >>> check("09-3", 1.25, rates=[0.1, 0.1], momentum=0.5)
    ✓ 09-3 right: ...
    """
    if not isinstance(exercise, str) or exercise not in EXERCISES:
        raise ValueError(f"exercise={shown(exercise)} is none of {', '.join(EXERCISES)}")
    task = EXERCISES[exercise]
    quantities = inspect.signature(task.expected)
    try:
        quantities.bind(**given)
    except TypeError as error:
        raise TypeError(
            f"check({exercise!r}, answer, ...): {error}; it takes {list(quantities.parameters)}"
        ) from None
    return task.mark(exercise, answer, given)
