"""The lessons' exercises: what is right, what often goes wrong; `check` is how a lesson asks.

How to get the right answer is written once, folded, in the lesson itself.
"""

import inspect

from torch import diag, einsum, linalg, outer
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


def _centred(rows):
    return _unit(rows - rows.mean(-1, keepdim=True), dim=-1)


def _ranks(rows):
    return rows.argsort(1).argsort(1).double()


def _correlations(a, b):
    """Pearson r of each row of a with the same row of b."""
    return (_centred(a) * _centred(b)).sum(-1)


def _mean_correlation(runs, same: bool) -> float:
    """Mean Pearson r between seeds of ``runs`` (S, Q, R), per query; with or without each seed against itself."""
    z = _centred(runs)
    r = einsum("aqr,bqr->abq", z, z).mean(2)
    return float(r.mean() if same else (r.sum() - r.trace()) / (len(r) * (len(r) - 1)))


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
    "04-1": Exercise(
        expected=lambda r, p, A_p: float((p @ r) / (p @ A_p)),
        next="what does the quadratic do along p when p @ A_p is negative, and what should a solver then say?",
        mistakes={
            "no curvature": (
                lambda right, given: float((given["p"] @ given["r"]) / (given["p"] @ given["p"])),
                "divided by p·p, as if the curvature were 1; along p it is p·Hp",
            ),
            "upside down": (
                lambda right, given: 1 / right,
                "upside down: a stronger curvature makes the step shorter",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: r = b − Hx is minus the gradient, so it points downhill",
            ),
        },
    ),
    "04-2": Exercise(
        expected=lambda s, E, a, delta: E @ ((E.T @ a) / (s + delta)),
        next="which δ makes a direction of eigenvalue s count half of what it did?",
        mistakes={
            "no damping": (
                lambda right, given: given["E"] @ ((given["E"].T @ given["a"]) / given["s"]),
                "that is H⁻¹a; δ is added to every eigenvalue before you divide",
            ),
            "product": (
                lambda right, given: given["E"] @ ((given["E"].T @ given["a"]) * (given["s"] + given["delta"])),
                "that is (H + δI) a, the product; the inverse divides",
            ),
            "eigenvectors as rows": (
                lambda right, given: given["E"].T @ ((given["E"] @ given["a"]) / (given["s"] + given["delta"])),
                "eigenvectors are the columns of E, so E.T @ a are the coordinates",
            ),
        },
    ),
    "04-3": Exercise(
        expected=lambda J, prob: J.T @ (diag(prob) - outer(prob, prob)) @ J,
        next="how large is it for an example predicted with certainty, and what does that do to H⁻¹?",
        mistakes={
            "diagonal": (
                lambda right, given: given["J"].T @ diag(given["prob"]) @ given["J"],
                "softmax couples the logits: the second derivative also holds −p pᵀ",
            ),
            "no loss": (
                lambda right, given: given["J"].T @ given["J"],
                "that is JᵀJ, right for squared error; in between belongs the loss's Hessian in the logits",
            ),
            "plus": (
                lambda right, given: 2 * given["J"].T @ diag(given["prob"]) @ given["J"] - right,
                "the sign of p pᵀ: softmax's derivative is diag(p) − p pᵀ, a covariance",
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
    "06-1": Exercise(
        expected=lambda scores, group: -scores[:, group].sum(1),
        next="what would doubling the weight of the group do, to first order?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: the score is for more weight, and removing takes weight away",
            ),
            "mean": (
                lambda right, given: right / len(given["group"]),
                "to first order changes add up; this is their mean",
            ),
            "over queries": (
                lambda right, given: -given["scores"][:, given["group"]].sum(0),
                "summed over the queries; each query changes on its own, by the sum over the group",
            ),
        },
    ),
    "06-2": Exercise(
        expected=lambda predicted, actual: float(
            ((predicted - predicted.mean()) * actual).sum() / ((predicted - predicted.mean()) ** 2).sum()
        ),
        next="a slope of 1.5 with r = 0.99: which correction of lesson 01 would you try?",
        mistakes={
            "predicted on actual": (
                lambda right, given: float(
                    ((given["actual"] - given["actual"].mean()) * given["predicted"]).sum()
                    / ((given["actual"] - given["actual"].mean()) ** 2).sum()
                ),
                "that is the slope of predicted on actual; divide by the variance of the prediction",
            ),
            "through the origin": (
                lambda right, given: float(
                    (given["predicted"] * given["actual"]).sum() / (given["predicted"] ** 2).sum()
                ),
                "that line goes through the origin; take the mean of the predictions off first",
            ),
            "correlation": (
                lambda right, given: right * float(given["predicted"].std() / given["actual"].std()),
                "that is r; a slope keeps the units, so only the prediction's spread belongs below",
            ),
        },
    ),
    "06-3": Exercise(
        expected=lambda runs: _mean_correlation(runs, same=False),
        next="with ten seeds, would you rather average effects first, and what would that ceiling mean?",
        mistakes={
            "itself": (
                lambda right, given: _mean_correlation(given["runs"], same=True),
                "a seed compared with itself gives 1 and lifts the ceiling; leave those pairs out",
            ),
            "pooled": (
                lambda right, given: _mean_correlation(given["runs"].flatten(1)[:, None], same=False),
                "that pools queries; correlate query by query, then take the mean",
            ),
        },
    ),
    "07-1": Exercise(
        expected=lambda predicted, actual: float(_correlations(_ranks(predicted), _ranks(actual)).mean()),
        next="why are ranks the safer choice when two or three groups have much larger effects than the rest?",
        mistakes={
            "Pearson": (
                lambda right, given: float(_correlations(given["predicted"], given["actual"]).mean()),
                "that is Pearson's r; the LDS compares ranks",
            ),
            "pooled": (
                lambda right, given: float(_correlations(*(_ranks(x.reshape(1, -1)) for x in given.values()))[0]),
                "all pairs in one ranking; rank the subsets of each query, then take the mean over queries",
            ),
            "order": (
                lambda right, given: float(_correlations(*(x.argsort(1).double() for x in given.values())).mean()),
                "argsort once gives the order, not the ranks; argsort that again",
            ),
        },
    ),
    "07-2": Exercise(
        expected=lambda runs: runs.mean(0),
        next="rank the images by it: how many of the ten worst are among the ten worst of a single seed?",
        mistakes={
            "sizes": (
                lambda right, given: given["runs"].abs().mean(0),
                "averaging sizes keeps what differs in sign from seed to seed, which is what should cancel",
            ),
            "one seed": (
                lambda right, given: given["runs"][0],
                "that is the first seed alone",
            ),
            "over queries": (
                lambda right, given: given["runs"].mean(1),
                "averaged over the queries; what belongs to the data is asked for each query, over seeds",
            ),
        },
    ),
    "07-3": Exercise(
        expected=lambda r: float(1.96 * r.std() / len(r) ** 0.5),
        next="the bootstrap interval of `quick` is not symmetric; what does r ≤ 1 have to do with it?",
        mistakes={
            "spread": (
                lambda right, given: float(1.96 * given["r"].std()),
                "that is the spread of single queries; the mean of Q of them is √Q times more certain",
            ),
            "standard error": (
                lambda right, given: right / 1.96,
                "that is the standard error; a 95 % interval reaches 1.96 of them to each side",
            ),
            "whole width": (lambda right, given: 2 * right, "that is the whole width; half was asked"),
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
