"""The lessons' exercises: what is right, what often goes wrong; `check` is how a lesson asks.

How to get the right answer is written once, folded, in the lesson itself.
"""

import inspect

from .marking import Exercise, Verdict

__all__ = ["EXERCISES", "check"]


def check(exercise: str, answer, /, **given) -> Verdict:
    """Whether an answer to a lesson's exercise is right; the last line of its cell, so that Jupyter shows it.

    Args:
        exercise: its number, such as "09-3".
        answer: the reader's; still ``...`` is unattempted and no error, so that Run All passes.
        given: the quantities that the question starts from.

    Returns:
        `Verdict`: unattempted; wrong, with the largest difference and a hint where the mistake is a known one;
        or right, with a question to go on with.

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
        raise ValueError(f"exercise={str(exercise)[:40]!r} is none of {', '.join(EXERCISES)}")
    task = EXERCISES[exercise]
    quantities = inspect.signature(task.expected)
    try:
        quantities.bind(**given)
    except TypeError as error:
        raise TypeError(f"check({exercise!r}, answer, ...): {error}; it takes {list(quantities.parameters)}") from None
    return task.mark(exercise, answer, given)


EXERCISES = {
    "00-1": Exercise(
        expected=lambda scores: scores.mean().harmful(5).positions[0].tolist(),
        next="are the same five the worst when everything is finetuned?",
        mistakes={
            "helpful": (
                lambda right, given: given["scores"].mean().helpful(5).positions[0],
                "these are the most helpful; harmful means a positive score, more weight and more loss",
            ),
            "ids": (
                lambda right, given: given["scores"].mean().harmful(5).ids[0],
                "these are ids, who the images are in the whole data set; positions count within the pretraining data",
            ),
            "first query": (
                lambda right, given: given["scores"].harmful(5).positions[0],
                "these are the worst for the first query alone; average over the queries before you rank",
            ),
        },
    ),
    "09-1": Exercise(
        expected=lambda gradients, g_bar, m=None: gradients @ g_bar / len(gradients),
        next="an example sits in one batch of each epoch; how do its scores of all epochs combine?",
        mistakes={
            "no mean": (
                lambda right, given: given["gradients"] @ given["g_bar"],
                "the step follows the mean over the mini-batch, so each example's share is 1/|B| of it",
            ),
            "divided by m": (
                lambda right, given: given["gradients"] @ given["g_bar"] / given["m"] if given.get("m") else None,
                "divided by m, the size of the data set; this step sees the |B| examples of its mini-batch only",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped; that the step goes downhill is already in ḡ",
            ),
        },
    ),
    "09-2": Exercise(
        expected=lambda theta_bar, v_bar, hessian, rate: theta_bar + hessian @ (v_bar - rate * theta_bar),
        next="what would the next step back get as its v̄?",
        mistakes={
            "old v_bar": (
                lambda right, given: given["theta_bar"] + given["hessian"] @ given["v_bar"],
                "that is v̄ as it comes from later steps; first add what v receives through θ ← θ − ηv",
            ),
            "no Hessian": (
                lambda right, given: given["theta_bar"],
                "θ̄ is passed on unchanged; but θ also decides the gradient of this step",
            ),
            "minus": (
                lambda right, given: 2 * given["theta_bar"] - right,
                "the Hessian term has the wrong sign; the minus of θ ← θ − ηv is already in v̄",
            ),
        },
    ),
    "09-3": Exercise(
        expected=lambda rates, momentum: (1 - momentum) / (2 * float(sum(rates))),
        next="what happens to α when you finetune twice as long, and does that fit what you know of early stopping?",
        mistakes={
            "no 2": (
                lambda right, given: 2 * right,
                "the penalty is α‖W − W*‖² without a ½, so its curvature is 2α",
            ),
            "no momentum": (
                lambda right, given: 1 / (2 * float(sum(given["rates"]))),
                "momentum repeats each gradient: all in all a step is 1/(1 − momentum) times as long",
            ),
        },
    ),
}
