"""Exercises of lesson 08."""

from torch import Tensor

from .marking import Exercise


def _auc(suspicion: Tensor, wrong: Tensor) -> float:
    """Share of pairs in which the wrong label is ranked before the right one."""
    return float((suspicion[wrong][:, None] > suspicion[~wrong]).double().mean())


def _precision(suspicion: Tensor, wrong: Tensor) -> float:
    """Share of wrong labels among as many of the first as there are."""
    first = suspicion.argsort(descending=True)[: int(wrong.sum())]
    return float(wrong[first].double().mean())


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std() / len(values) ** 0.5)


def _gain(choosers: Tensor, judges: Tensor, k: int) -> float:
    """Mean over judges ``(S, N)`` of the k examples that each one's chooser puts first."""
    chosen = choosers.argsort(dim=1, descending=True)[:, :k]
    return float(judges.gather(1, chosen).sum(1).mean())


def _others(per_seed: Tensor) -> Tensor:
    """For each seed the mean of all others."""
    return (per_seed.sum(0) - per_seed) / (len(per_seed) - 1)


def _step(w: Tensor, g: Tensor, eta: float, limit: float, scale: Tensor | None = None) -> Tensor:
    """Clipped step downhill, by default in root mean squares of g."""
    scale = g.square().mean().sqrt() if scale is None else scale
    return (w - eta * g / scale).clamp(0, limit)


EXERCISES = {
    "08-1": Exercise(
        expected=_auc,
        next="which AUC has a coin, and which one a ranking that is exactly upside down?",
        mistakes={
            "upside down": (
                lambda right, given: 1 - right,
                "those are the pairs in which the right label comes first; larger is more "
                "suspicious",
            ),
            "precision": (
                lambda right, given: None if right == 1 else _precision(**given),
                "that is the precision at as many as there are; the AUC compares pairs and flags "
                "nothing",
            ),
        },
    ),
    "08-2": Exercise(
        expected=lambda before, after: _error(after - before),
        next="for which of the two does it matter that all arms share their seeds?",
        mistakes={
            "not paired": (
                lambda right, given: (
                    (_error(given["before"]) ** 2 + _error(given["after"]) ** 2) ** 0.5
                ),
                "that is for two groups that share no seed; subtract seed by seed first",
            ),
            "single seeds": (
                lambda right, given: right * len(given["before"]) ** 0.5,
                "that is the spread of single changes; their mean varies √S times less",
            ),
            "divided by S": (
                lambda right, given: right / len(given["before"]) ** 0.5,
                "variances are divided by S, so the standard deviation is divided by √S",
            ),
        },
    ),
    "08-3": Exercise(
        expected=lambda per_seed, k: _gain(_others(per_seed), per_seed, k),
        next="with two seeds instead of eight: does the honest gain fall, and why?",
        mistakes={
            "in sample": (
                lambda right, given: _gain(
                    given["per_seed"].mean(0, keepdim=True),
                    given["per_seed"].mean(0, keepdim=True),
                    given["k"],
                ),
                "here every seed helped to choose what it judges; that is the gain in sample",
            ),
            "own choice": (
                lambda right, given: _gain(given["per_seed"], given["per_seed"], given["k"]),
                "each seed judges its own list; leave it out of the mean that chooses",
            ),
            "the other end": (
                lambda right, given: _gain(
                    -_others(given["per_seed"]), given["per_seed"], given["k"]
                ),
                "those are the most helpful; removed are the largest scores",
            ),
            "judged by the others": (
                lambda right, given: _gain(
                    given["per_seed"], _others(given["per_seed"]), given["k"]
                ),
                "one seed chooses and the others judge; it is the other way round",
            ),
        },
    ),
    "08-4": Exercise(
        expected=_step,
        next="which images does a second round need new scores for, and why?",
        mistakes={
            "uphill": (
                lambda right, given: _step(given["w"], -given["g"], given["eta"], given["limit"]),
                "this gives harmful images more weight; go against the score",
            ),
            "not clipped": (
                lambda right, given: (
                    given["w"] - given["eta"] * given["g"] / given["g"].square().mean().sqrt()
                ),
                "some weights are negative, which nobody can train with; clip to 0 and limit",
            ),
            "norm": (
                lambda right, given: _step(**given, scale=given["g"].norm()),
                "that is the norm, √m times the root mean square, so a typical step is far below η",
            ),
        },
    ),
}
