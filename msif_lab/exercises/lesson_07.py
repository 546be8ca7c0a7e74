"""Exercises of lesson 07."""

from torch.nn.functional import normalize as _unit

from .marking import Exercise


def _centred(rows):
    return _unit(rows - rows.mean(-1, keepdim=True), dim=-1)


def _ranks(rows):
    return rows.argsort(1).argsort(1).double()


def _correlations(a, b):
    """Pearson r of each row of a with the same row of b."""
    return (_centred(a) * _centred(b)).sum(-1)


EXERCISES = {
    "07-1": Exercise(
        expected=lambda predicted, actual: float(
            _correlations(_ranks(predicted), _ranks(actual)).mean()
        ),
        next=(
            "why are ranks the safer choice when two or three groups have much larger effects than "
            "the rest?"
        ),
        mistakes={
            "Pearson": (
                lambda right, given: float(
                    _correlations(given["predicted"], given["actual"]).mean()
                ),
                "that is Pearson's r; the LDS compares ranks",
            ),
            "pooled": (
                lambda right, given: float(
                    _correlations(*(_ranks(x.reshape(1, -1)) for x in given.values()))[0]
                ),
                "that ranks all pairs together; rank the subsets of each query, then take the "
                "mean over queries",
            ),
            "order": (
                lambda right, given: float(
                    _correlations(*(x.argsort(1).double() for x in given.values())).mean()
                ),
                "one argsort gives the order, not the ranks; apply argsort to that again",
            ),
        },
    ),
    "07-2": Exercise(
        expected=lambda runs: runs.mean(0),
        next=(
            "rank the images by it: how many of the ten worst are among the ten worst of a single "
            "seed?"
        ),
        mistakes={
            "sizes": (
                lambda right, given: given["runs"].abs().mean(0),
                "that averages sizes, so that scores whose sign differs from seed to seed no "
                "longer cancel, as they should",
            ),
            "one seed": (
                lambda right, given: given["runs"][0],
                "that is the first seed alone",
            ),
            "over queries": (
                lambda right, given: given["runs"].mean(1),
                "that averages over queries; average over seeds, and keep the queries apart",
            ),
        },
    ),
    "07-3": Exercise(
        expected=lambda r: float(1.96 * r.std() / len(r) ** 0.5),
        next=(
            "the bootstrap interval of `quick` is not symmetric; what does r ≤ 1 have to do with "
            "it?"
        ),
        mistakes={
            "spread": (
                lambda right, given: float(1.96 * given["r"].std()),
                "that is for single queries; the standard error of the mean of Q of them is √Q "
                "times smaller",
            ),
            "standard error": (
                lambda right, given: right / 1.96,
                "that is the standard error; a 95 % interval extends 1.96 of them to each side",
            ),
            "whole width": (
                lambda right, given: 2 * right,
                "that is the whole width; half of it was asked for",
            ),
        },
    ),
}
