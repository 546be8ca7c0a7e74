"""A stage's run, replayed from checkpoints: exact states of every step without keeping every step."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .curvature.derivatives import TRANSPOSE_FIXED as FIXED
from .curvature.derivatives import TRANSPOSE_PER_QUERY as PER_QUERY
from .errors import MemoryBudgetError
from .memory import require_memory
from .objective.objective import Lanes
from .pipeline.pipeline import Pipeline
from .pipeline.recipes import MiniBatch

__all__ = ["Trajectory", "UnrolledPlan"]


@dataclass
class Trajectory:
    """One stage's run as `Pipeline.fit` did it, kept at checkpoints; what lies between is computed again on demand.

    Attributes:
        recipe, lanes: what is run, on one lane or several.
        bounds: first step of each segment, and T. A single segment keeps every step instead,
        keep: unless this is False.
        steps: batch and rate of each of the T steps.
        final: all parameters after the run ``(R, D)``.
    """

    recipe: MiniBatch
    lanes: Lanes
    bounds: list[int]
    keep: bool = True
    steps: list[tuple[Tensor, float]] = field(init=False)
    final: Tensor = field(init=False)

    def run(self, bar=None) -> "Trajectory":
        """The whole stage once."""
        self.steps = list(self.recipe.steps(len(self.lanes.objective.data)))
        theta = self.lanes.objective.own.take(self.lanes.base)
        state = self.recipe.start(theta)
        self._checkpoints, self._kept = [], None
        for segment in range(len(self.bounds) - 1):
            self._checkpoints.append((theta, state))
            records, theta, state = self._walk(segment, keep=self.keep and len(self.bounds) == 2, bar=bar)
            self._kept = records or None
        self.final = self.lanes.full(theta)
        return self

    def segment(self, index: int) -> list[tuple[Tensor, tuple]]:
        """``(θ (R, P) before the step, what the recipe saved in it)`` of each step of a segment."""
        return list(self._kept) if self._kept else self._walk(index, keep=True)[0]

    def ends(self) -> list[tuple[Tensor, float]]:
        """All parameters ``(R, D)`` at the end of each segment, and the sum of the learning rates in it."""
        rates = [sum(rate for _, rate in self.steps[a:b]) for a, b in itertools.pairwise(self.bounds)]
        fulls = [self.lanes.full(theta) for theta, _ in self._checkpoints[1:]] + [self.final]
        return list(zip(fulls, rates, strict=True))

    def _walk(self, segment: int, keep: bool, bar=None):
        theta, state = self._checkpoints[segment]
        records = []
        for step in range(*self.bounds[segment : segment + 2]):
            before = theta
            theta, state, saved = self.recipe.advance(self.lanes, theta, state, step, *self.steps[step])
            if keep:
                records.append((before, saved))
            if bar is not None:
                bar.update()
        return records, theta, state


@dataclass(frozen=True)
class UnrolledPlan:
    """What unrolling a pipeline takes, before it is done; prints as a table.

    Attributes:
        steps: per stage, T.
        segments: per stage, into how many stretches its run is cut; 1 keeps every step.
        stored: bytes of the checkpoints and of the longest stretch between two.
        swept: bytes of the adjoints and of one mini-batch's derivatives during a sweep.
        budget: bytes allowed.
        queries, part: Q, and how many of them one sweep carries.
        seconds: estimates for fit and for score, from one measured step of each stage; NaN if not measured.
    """

    steps: dict[str, int]
    segments: dict[str, int]
    stored: int
    swept: int
    budget: int
    queries: int
    part: int
    seconds: tuple[float, float] = (math.nan, math.nan)

    @property
    def sweeps(self) -> int:
        return -(-self.queries // self.part)

    def __repr__(self) -> str:
        used = f"{(self.stored + self.swept) / 1e6:,.1f} of {self.budget / 1e6:,.1f} MB"
        lines = [f"{self.queries} queries, {self.part} a sweep, {self.sweeps} sweep(s); {used}"]
        for name, count in self.segments.items():
            how = "every step kept" if count == 1 else f"{count} checkpoints, recomputed once a sweep"
            lines.append(f"  {name}: {self.steps[name]} steps, {how}")
        if not math.isnan(self.seconds[0]):
            lines.append("  estimated: {:.1f} s to fit, {:.1f} s to score".format(*self.seconds))
        return "\n".join(lines)


def even_bounds(steps: int, segments: int) -> list[int]:
    """Cut ``range(steps)`` into stretches of equal length, give or take one."""
    segments = min(segments, steps)
    return [round(i * steps / segments) for i in range(segments + 1)]


def make_plan(
    pipeline: Pipeline, queries: int, memory: int, segments: int | None = None, runs: int = 1
) -> UnrolledPlan:
    """Half of the budget for the states of so many runs, a quarter each for adjoints and for one batch's derivatives.

    Raises:
        ValueError: no queries.
        MemoryBudgetError: not even a single query and √T checkpoints fit.
    """
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1")
    steps, segments, stored = _segments(pipeline, memory, segments, runs)
    quarter, adjoint, example = memory // 4, 0, 0
    for k in range(len(pipeline.stages)):
        o = pipeline.objective(k)
        # θ̄, the optimiser's share, ḡ, the product, and their temporaries
        adjoint = max(adjoint, 12 * o.layout.size * pipeline.initial(k).element_size())
        example = max(example, o.bytes_per_example())
    together = min(16, *(len(s.data) for s in pipeline.stages), quarter // (example * (FIXED + PER_QUERY)))
    if quarter < adjoint or together < 1:
        needed = 4 * max(adjoint, example * (FIXED + PER_QUERY))
        raise MemoryBudgetError(
            f"sweeping with a single query needs a budget of about {needed / 1e6:,.1f} MB, memory= gives "
            f"{memory / 1e6:,.1f} MB; give more"
        )
    part = min(queries, quarter // adjoint, (quarter // (example * together) - FIXED) // PER_QUERY)
    return UnrolledPlan(steps, segments, stored * runs, part * adjoint + quarter, memory, queries, part)


def _segments(pipeline: Pipeline, memory: int, segments: int | None, runs: int):
    """Steps and segments per stage, and the bytes of one run's states, for ``runs`` of them in half the memory.

    Keeps every step where that fits; else √T checkpoints a stage, which with one recomputation is the least
    memory: checkpoints and the stretch between two are then equally large.

    Raises:
        MemoryBudgetError: not even that fits.
    """
    steps, checkpoint, record = {}, {}, {}
    for k, stage in enumerate(pipeline.stages):
        lanes = pipeline.fresh_lanes(k, pipeline.initial(k - 1)[None] if k else None)
        theta = lanes.objective.own.take(lanes.base)
        walk = list(stage.recipe.steps(len(stage.data)))
        state = stage.recipe.start(theta)
        _, _, saved = stage.recipe.advance(lanes, theta, state, 0, *walk[0])
        steps[stage.name] = len(walk)
        checkpoint[stage.name] = _bytes(theta, *state)
        record[stage.name] = _bytes(theta, *saved)

    def needed(counts):
        if all(c == 1 for c in counts.values()):
            return sum(steps[n] * record[n] for n in steps)
        kept = [steps[n] * record[n] for n in steps if counts[n] == 1]
        stretch = [-(-steps[n] // c) * record[n] for n, c in counts.items() if c > 1]
        return sum(kept) + sum(c * checkpoint[n] for n, c in counts.items()) + max(stretch)

    every = dict.fromkeys(steps, 1)
    root = {n: max(2, math.ceil(math.sqrt(t * record[n] / checkpoint[n]))) for n, t in steps.items()}
    chosen = {n: min(segments, t) for n, t in steps.items()} if segments else every
    if not segments and needed(every) * runs > memory // 2:
        chosen = {n: min(c, steps[n]) for n, c in root.items()}
    require_memory(
        2 * needed(chosen) * runs,
        memory,
        f"replaying {runs} × {sum(steps.values())} steps from {sum(chosen.values())} checkpoints and sweeping back",
        "give more memory=" + ("" if not segments else ", or leave segments= to the plan"),
    )
    return steps, chosen, needed(chosen)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def require_run(pipeline: Pipeline) -> None:
    """Refuse pipelines whose training cannot be replayed and run backwards, with the way out."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"pipeline must be a msif_lab.Pipeline, not {type(pipeline).__name__}")
    for stage in pipeline.stages:
        if not isinstance(stage.recipe, MiniBatch):
            raise ValueError(
                f"stage {stage.name!r} was trained by {type(stage.recipe).__name__}, whose steps cannot be run "
                "backwards here; train it with recipe=SGD(...) or Adam(...), or use ImplicitInfluence, made for optima"
            )
    pipeline.trained()
    if pipeline.reports is None:
        raise ValueError(
            "the pipeline's weights were adopted, so there is no run to differentiate; train with pipeline.fit() and a "
            "recipe such as SGD(...), or use ImplicitInfluence, which needs only the final weights"
        )
    pipeline.require_repeatable()


def require_same_end(name: str, ours: Tensor, trained: Tensor) -> None:
    """Refuse a replay that does not end where training did."""
    apart = float((ours - trained).norm() / trained.norm().clamp(min=1e-30))
    if not apart <= torch.finfo(trained.dtype).eps ** 0.5:
        raise ValueError(
            f"stage {name!r}: replaying its training ends {apart:.1e} (relative) away from the trained weights, so the "
            "run is not deterministic: a loss or model that draws random numbers or counts its calls, or GPU kernels "
            "that add in changing order (torch.use_deterministic_algorithms(True) before fit())"
        )


def seconds(function: Callable, *args, **kwargs) -> float:
    """Wall-clock time of the faster of two calls after one to warm up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
