"""Exercises of lesson 00."""

from torch.nn.functional import cosine_similarity

from .marking import Exercise


def _mean_r(predicted, actual) -> float:
    """Mean over rows of the Pearson correlation."""
    centred = (x - x.mean(1, keepdim=True) for x in (predicted, actual))
    return float(cosine_similarity(*centred, dim=1).mean())


EXERCISES = {
    "00-1": Exercise(
        expected=lambda scores: scores.mean().harmful(5).positions[0].tolist(),
        next="are the same five the most harmful when everything is finetuned?",
        mistakes={
            "helpful": (
                lambda right, given: given["scores"].mean().helpful(5).positions[0],
                "these are the most helpful; a harmful example has a positive score: more weight "
                "on it, more loss",
            ),
            "ids": (
                lambda right, given: given["scores"].mean().harmful(5).ids[0],
                "these are ids, which identify the images in the whole data set; positions count "
                "within the pretraining data",
            ),
            "first query": (
                lambda right, given: given["scores"].harmful(5).positions[0],
                "these are the most harmful for the first query alone; average over the queries "
                "before you rank",
            ),
        },
    ),
    "00-2": Exercise(
        expected=_mean_r,
        next="which query has the lowest r, and are its effects large or small?",
        mistakes={
            "pooled": (
                lambda right, given: _mean_r(*(x.reshape(1, -1) for x in given.values())),
                "that pools all pairs; correlate the removals of each query, then take the mean "
                "over queries",
            ),
            "over queries": (
                lambda right, given: _mean_r(*(x.T for x in given.values())),
                "that compares queries for each removal; compare removals for each query",
            ),
            "sign": (
                lambda right, given: -right,
                "the sign is flipped: a score is about more weight, a removal means less; the "
                "prediction is minus the score",
            ),
        },
    ),
    "00-3": Exercise(
        expected=lambda frozen, full: float((frozen.sign() == full.sign()).double().mean()),
        next=(
            "you delete what the frozen case calls harmful and then finetune everything: how often "
            "do you do harm?"
        ),
        mistakes={
            "disagree": (
                lambda right, given: 1 - right,
                "that is how often they disagree",
            ),
            "harmful only": (
                lambda right, given: float(
                    ((given["frozen"] > 0) & (given["full"] > 0)).double().mean()
                ),
                "that counts pairs harmful in both cases; helpful in both is agreement as well",
            ),
            "correlation": (
                lambda right, given: _mean_r(given["frozen"], given["full"]),
                "that is a correlation, which depends on sizes too; only signs were asked for",
            ),
        },
    ),
}
