"""Exercises of lesson 00."""

from ..marking import Exercise

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
}
