"""Exercises of lesson 10."""

import math

import torch

from .marking import Exercise


def _accepted(p, wrong: float) -> int:
    """Benjamini and Hochberg: the largest k whose k-th smallest p is at most k·wrong/N."""
    ranked = torch.as_tensor(p).double().reshape(-1).sort().values
    places = torch.arange(1, len(ranked) + 1)
    passed = places[ranked <= places * wrong / len(ranked)]
    return int(passed[-1]) if len(passed) else 0


def _unless_right(count: int, right: int) -> int | None:
    return None if count == right else count


EXERCISES = {
    "10-1": Exercise(
        expected=lambda rho, r: r**2 * (1 - rho) / (rho * (1 - r**2)),
        next="from r = 0.9 to 0.95, by which factor does S grow, whatever ρ is?",
        mistakes={
            "r for r²": (
                lambda right, given: (
                    given["r"] * (1 - given["rho"]) / (given["rho"] * (1 - given["r"]))
                ),
                "the curve is a square root; square both sides first, so that r² stands alone",
            ),
            "upside down": (
                lambda right, given: 1 / right,
                "a larger r must take more seeds and a larger ρ fewer; your fraction does the "
                "opposite",
            ),
        },
    ),
    "10-2": Exercise(
        expected=lambda per_seed, t: t * per_seed.std(0) / math.sqrt(len(per_seed)),
        next="which of the two factors that shrink with S matters more from 2 to 4 seeds?",
        mistakes={
            "single seeds": (
                lambda right, given: given["t"] * given["per_seed"].std(0),
                "that is the spread of single seeds; an average of S of them varies √S times less",
            ),
            "no t": (
                lambda right, given: (
                    1.96 * given["per_seed"].std(0) / math.sqrt(len(given["per_seed"]))
                ),
                "1.96 is for a spread that is known; yours is estimated from a few seeds, hence t",
            ),
            "population": (
                lambda right, given: (
                    given["t"]
                    * given["per_seed"].std(0, correction=0)
                    / math.sqrt(len(given["per_seed"]))
                ),
                "the mean was fitted to the same seeds, so the squares are divided by S − 1",
            ),
            "divided by S": (
                lambda right, given: given["t"] * given["per_seed"].std(0) / len(given["per_seed"]),
                "variances are divided by S, so the standard deviation is divided by √S",
            ),
        },
    ),
    "10-3": Exercise(
        expected=_accepted,
        next="how many wrong signs do you expect among those you accepted?",
        mistakes={
            "each alone": (
                lambda right, given: _unless_right(
                    int((torch.as_tensor(given["p"]) <= given["wrong"]).sum()), right
                ),
                "each pair alone at this level: of many pairs without any effect that share would "
                "pass",
            ),
            "Bonferroni": (
                lambda right, given: _unless_right(
                    int((torch.as_tensor(given["p"]) <= given["wrong"] / len(given["p"])).sum()),
                    right,
                ),
                "that is Bonferroni's bound, which allows hardly a single error anywhere; the k-th "
                "smallest may be k times as large",
            ),
        },
    ),
}
