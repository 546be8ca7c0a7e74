"""Exercises of lesson 05."""

from torch import linalg
from torch.nn.functional import normalize as _unit

from .marking import Exercise

EXERCISES = {
    "05-1": Exercise(
        expected=lambda grad_q, grad_f: -grad_q @ grad_f.T / len(grad_f),
        next="divide by both norms: which examples fall in rank, and why might one want that?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: training moves down the gradient, so an example whose "
                "gradient agrees with the query's helps",
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
        next=(
            "do the same for the entropy: does a second unsigned score know anything that the loss "
            "does not?"
        ),
        mistakes={
            "signed": (
                lambda right, given: float(
                    given["predicted"].corr(given["actual"], method="spearman")
                ),
                "that compares signs too; take the absolute values of both first",
            ),
            "one side": (
                lambda right, given: float(
                    given["predicted"].abs().corr(given["actual"], method="spearman")
                ),
                "only the predictions are sizes here; the effects have signs as well",
            ),
            "Pearson": (
                lambda right, given: float(given["predicted"].abs().corr(given["actual"].abs())),
                "that is Pearson's r; compare ranks, since a loss and an effect have different "
                "scales",
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
                "that is the transpose: give one row per query, one column per parameter of W",
            ),
        },
    ),
}
