"""Guided pretraining: example weights that descend a validation loss, through all stages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_instance, check_number, check_whole, listed, shown
from ..data.examples import Examples
from ..errors import NotConvergedError
from ..influence.unrolled import UnrolledInfluence
from ..parallel import check_jobs, each_result
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from ..pipeline.seeds import SeedRuns

__all__ = ["Guidance", "guided"]


@dataclass
class Guidance:
    """Example weights found by `guided`; prints as a table of its rounds.

    Attributes:
        weights: of the stage's examples ``(N,)``, for ``intervene(action="reweight")``.
        rounds: pandas table, a row for each step tried: ``round``, ``step``, ``loss`` (mean
            validation loss of all seeds), ``standard_error`` of its change from the round before,
            ``predicted`` (the change that the derivatives promise), ``change``, and ``taken``.
        seeds: the runs that were looked at; judge the weights on others.
    """

    weights: Tensor
    rounds: object
    seeds: list[int]

    def __repr__(self) -> str:
        kept = int((self.weights > 0).sum())
        text = self.rounds.to_string(index=False, float_format=lambda x: f"{x:.4g}")
        return (
            f"{kept} of {len(self.weights)} examples keep weight, {len(self.seeds)} seeds\n{text}"
        )


def guided(
    runs: SeedRuns,
    validation: Examples,
    *,
    stage: int | str = 0,
    rounds: int = 3,
    steps: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    limit: float = 4.0,
    lanes: int = 8,
    n_jobs: int = 1,
    progress: bool = True,
) -> Guidance:
    """Weights of a stage's examples under which all stages end at a lower validation loss.

    In each round the mean over seeds of ``g = ∂(mean validation loss)/∂w`` is taken at the weights
    so far, through every step of all stages; then ``w ← clip(w − η g / rms(g), 0, limit)`` for each
    of ``steps`` η is trained under all seeds, and the one with the lowest validation loss is taken.
    A round without any that is lower ends the search. That is metagradient descent (Engstrom et al.
    2025, arXiv 2503.13751) on the weights of an earlier stage's data.

    One round takes, for each seed, about 4 trainings and one for each step.

    Args:
        runs: trained under several seeds by mini-batch recipes, as `over_seeds` makes them.
        validation: examples of the last stage's task. They choose; other ones must judge.
        stage: whose examples are weighted.
        rounds: at most so many.
        steps: sizes η, in root mean squares of the change in weight.
        limit: largest weight.
        lanes: weightings trained side by side.
        n_jobs: processes through joblib, which share the seeds.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        TypeError, ValueError: no `SeedRuns`, settings that are none, or runs that cannot be
            replayed.
        NotConvergedError: no step of the first round gives a finite loss.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2, schedule="linear")
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10), train[:200], recipe=recipe)
    >>> runs = msif.over_seeds(msif.Pipeline([stage]), seeds=2)
    >>> guided(runs, test[:50], rounds=1).weights.shape
    torch.Size([200])
    """
    check_instance("runs", runs, SeedRuns)
    rounds, lanes = check_whole("rounds", rounds), check_whole("lanes", lanes)
    limit = check_number("limit", limit, lambda x: 1 < x < float("inf"), "finite and above 1")
    sizes = [
        check_number("steps", size, lambda x: 0 < x < float("inf"), "positive and finite, each")
        for size in listed("steps", steps, "sizes of a step, such as (0.5, 1.0)")
    ]
    if not sizes:
        raise ValueError(f"steps={shown(steps)} is empty; give one or more sizes of a step")
    jobs, k = check_jobs(n_jobs), runs[0].index(stage)
    weights = torch.ones(len(runs[0].stages[k].data), dtype=runs[0].trained()[k].dtype)
    before = runs.evaluate(validation, aggregate="mean")[:, 0].cpu()  # (S,)
    rows = [(0, 0.0, before, 0.0 * before, torch.tensor(0.0))]
    with progress_bar(rounds * 2 * len(runs), "guided", progress) as bar:
        for number in range(1, rounds + 1):
            gradient = torch.stack(
                _each(_gradient, [(p, validation, k, weights) for p in runs.pipelines], jobs, bar)
            ).mean(0)
            size = gradient.square().mean().sqrt()
            if not float(size) > 0:
                break
            tried = torch.stack([weights - eta * gradient / size for eta in sizes])
            tried = tried.clamp(0.0, limit)
            calls = [(p, validation, k, tried, lanes) for p in runs.pipelines]
            after = torch.stack(_each(_losses, calls, jobs, bar))  # (S, steps)
            promised = (tried - weights) @ gradient
            each = zip(sizes, after.T, promised, strict=True)
            rows += [(number, eta, loss, loss - before, p) for eta, loss, p in each]
            means = torch.where(after.isfinite().all(0), after.mean(0), torch.inf)
            best = int(means.argmin())
            if number == 1 and not bool(means.isfinite().any()):
                raise NotConvergedError(
                    f"no step of {sizes} gives a finite validation loss under all seeds; give "
                    "smaller steps= or a smaller limit="
                )
            if not float(means[best]) < float(before.mean()):
                break
            weights, before = tried[best], after[:, best]
    return Guidance(weights, _table(rows), list(runs.seeds))


def _each(function, calls: list[tuple], n_jobs: int, bar) -> list[Tensor]:
    """Results of all calls, in order."""
    found: list = [None] * len(calls)
    for place, result in each_result(function, calls, n_jobs):
        found[place] = result
        bar.update()
    return found


def _gradient(pipeline: Pipeline, validation: Examples, stage: int, weights: Tensor) -> Tensor:
    """``∂(mean validation loss)/∂w`` at given weights ``(N,)``."""
    method = UnrolledInfluence(trust=0).fit(pipeline, progress=False)
    asked = {"aggregate": "mean", "weights": weights, "progress": False}
    return method.score(validation, stage, **asked).values[0].cpu()


def _losses(
    pipeline: Pipeline, validation: Examples, stage: int, tried: Tensor, lanes: int
) -> Tensor:
    """The mean validation loss after training with each of the weightings ``(C,)``."""
    parts = [
        pipeline.retrain({stage: some}, progress=False).evaluate(validation, aggregate="mean")[0]
        for some in tried.split(lanes)
    ]
    return torch.cat(parts).cpu()


def _table(rows: Sequence[tuple]):
    """What `Guidance.rounds` shows."""
    import pandas

    frame = pandas.DataFrame(
        {
            "round": number,
            "step": eta,
            "loss": float(loss.mean()),
            "change": float(change.mean()),
            "standard_error": float(change.std() / len(change) ** 0.5) if len(change) > 1 else 0.0,
            "predicted": float(promised),
        }
        for number, eta, loss, change, promised in rows
    )
    lowest = frame.groupby("round")["loss"].idxmin()
    falls = frame.loc[lowest, "change"] < 0
    return frame.assign(taken=frame.index.isin(lowest[falls.to_numpy()]) | (frame["round"] == 0))
