"""Exercises of lesson 11."""

from .marking import Exercise


def _share(order, truth, k):
    """How many of the first k of a ranking are marked."""
    return float(truth[order[:k]].sum())


EXERCISES = {
    "11-1": Exercise(
        expected=lambda scores, group: float(-scores[:, group].sum(1).mean()),
        next=(
            "retrain without the group: is the real change larger or smaller, and what does a sum "
            "leave out?"
        ),
        mistakes={
            "one image": (
                lambda right, given: right / len(given["group"]),
                "that is the mean over the images; the effects of a group add up",
            ),
            "all queries": (
                lambda right, given: right * len(given["scores"]),
                "you summed over the queries too; the question is about the mean query",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: a score is about more weight, a removal means less",
            ),
        },
    ),
    "11-2": Exercise(
        expected=lambda s: float(s / 2),
        next="and at which α does it let nine tenths through?",
        mistakes={
            "no factor 2": (
                lambda right, given: float(given["s"]),
                "the filter is 2α / (s + 2α): it is 2α, not α, that must equal s",
            ),
            "twice": (
                lambda right, given: float(2 * given["s"]),
                "2α = s, so α is half of s, not twice",
            ),
        },
    ),
    "11-3": Exercise(
        expected=lambda order, truth, k: _share(order, truth, k) / float(truth.sum()),
        next=(
            "how many images must be removed before the recall is 1, and how many clean ones go "
            "with them?"
        ),
        mistakes={
            "precision": (
                lambda right, given: _share(**given) / given["k"],
                "that is the precision; recall is a share of the flipped ones",
            ),
            "the other end": (
                lambda right, given: (
                    _share(given["order"].flip(0), given["truth"], given["k"])
                    / float(given["truth"].sum())
                ),
                "those are the least suspicious; the ranking starts with the most suspicious",
            ),
        },
    ),
}
