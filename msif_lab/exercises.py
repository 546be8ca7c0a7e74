"""The lessons' exercises: what is right, what often goes wrong; `check` is how a lesson asks.

How to get the right answer is written once, folded, in the lesson itself.
"""

import inspect

from torch import linalg
from torch.nn.functional import normalize as _unit

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
    "05-1": Exercise(
        expected=lambda grad_q, grad_f: -grad_q @ grad_f.T / len(grad_f),
        next="divide by both norms; which examples lose rank, and why might that be wanted?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: training moves down the gradient, so gradients that agree mean help",
            ),
            "sum": (
                lambda right, given: right * len(given["grad_f"]),
                "the training loss is a mean over m examples, so each one's weight enters with 1/m",
            ),
            "cosine": (
                lambda right, given: -_unit(given["grad_q"]) @ _unit(given["grad_f"]).T,
                "that is the cosine; how hard an example pulls is part of its influence",
            ),
        },
    ),
    "05-2": Exercise(
        expected=lambda predicted, actual: float(
            predicted.abs().corr(actual.abs(), method="spearman")  # pandas series
        ),
        next="do the same for the entropy: does a second unsigned score know anything that the loss does not?",
        mistakes={
            "signed": (
                lambda right, given: float(given["predicted"].corr(given["actual"], method="spearman")),
                "that compares signs too; take absolute values of both first",
            ),
            "one side": (
                lambda right, given: float(given["predicted"].abs().corr(given["actual"], method="spearman")),
                "only the predictions are sizes here; the effects have signs as well",
            ),
            "Pearson": (
                lambda right, given: float(given["predicted"].abs().corr(given["actual"].abs())),
                "that is Pearson's; compare ranks, since the units of a loss are not those of an effect",
            ),
        },
    ),
    "05-3": Exercise(
        expected=lambda g_T, G_WT, G_TT: -(G_WT @ linalg.solve(G_TT, g_T.T)).T,
        next="when is this term small: what must be true of the head, or of the query?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: G_TT dT + G_TW dW = 0, so dT = −G_TT⁻¹ G_TW dW",
            ),
            "no inverse": (
                lambda right, given: -(given["G_WT"] @ given["g_T"].T).T,
                "G_TT⁻¹ is missing: how far the head moves depends on how stiff it is",
            ),
            "transposed": (
                lambda right, given: right.T,
                "that is the transpose: one row a query, as many columns as W has parameters",
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
