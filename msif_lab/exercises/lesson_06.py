"""Exercises of lesson 06."""

from torch import einsum
from torch.nn.functional import normalize as _unit

from .marking import Exercise


def _centred(rows):
    return _unit(rows - rows.mean(-1, keepdim=True), dim=-1)


def _mean_correlation(runs, same: bool) -> float:
    """Mean Pearson r between the seeds of ``runs`` (S, Q, R), per query.

    With ``same`` each seed is also compared with itself.
    """
    z = _centred(runs)
    r = einsum("aqr,bqr->abq", z, z).mean(2)
    return float(r.mean() if same else (r.sum() - r.trace()) / (len(r) * (len(r) - 1)))


EXERCISES = {
    "06-1": Exercise(
        expected=lambda scores, group: -scores[:, group].sum(1),
        next="what would doubling the weight of the group do, to first order?",
        mistakes={
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: a score is about more weight, and a removal takes it away",
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
            ((predicted - predicted.mean()) * actual).sum()
            / ((predicted - predicted.mean()) ** 2).sum()
        ),
        next="a slope of 1.5 with r = 0.99: which correction of lesson 01 would you try?",
        mistakes={
            "predicted on actual": (
                lambda right, given: float(
                    ((given["actual"] - given["actual"].mean()) * given["predicted"]).sum()
                    / ((given["actual"] - given["actual"].mean()) ** 2).sum()
                ),
                "that is the slope of predicted on actual; divide by the variance of the "
                "prediction",
            ),
            "through the origin": (
                lambda right, given: float(
                    (given["predicted"] * given["actual"]).sum() / (given["predicted"] ** 2).sum()
                ),
                "that line goes through the origin; subtract the mean of the predictions first",
            ),
            "correlation": (
                lambda right, given: (
                    right * float(given["predicted"].std() / given["actual"].std())
                ),
                "that is r; a slope keeps the units, so divide by the predictions' variance alone",
            ),
        },
    ),
    "06-3": Exercise(
        expected=lambda runs: _mean_correlation(runs, same=False),
        next=(
            "with ten seeds, would you rather average effects first, and what would that ceiling "
            "mean?"
        ),
        mistakes={
            "itself": (
                lambda right, given: _mean_correlation(given["runs"], same=True),
                "a seed compared with itself gives 1 and raises the ceiling; leave those pairs out",
            ),
            "pooled": (
                lambda right, given: _mean_correlation(
                    given["runs"].flatten(1)[:, None], same=False
                ),
                "that pools queries; correlate query by query, then take the mean",
            ),
        },
    ),
}
