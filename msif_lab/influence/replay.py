"""A stage's run replayed from checkpoints: the exact state at every step, not all of them kept."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..curvature.soundness import require_second_derivative
from ..objective.objective import Lanes
from ..objective.precision import require_precision
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import MiniBatch, clip_factor, progress_bar
from ..pipeline.runs import KeptRun, bounds_by_rates
from ..pipeline.stages import Stage, WarmStart

__all__ = ["Trajectory"]


@dataclass
class Trajectory:
    """One stage's run as `Pipeline.fit` did it, kept at checkpoints and recomputed between them.

    Attributes:
        recipe, lanes: what is run, on one lane or several.
        bounds: first step of each segment, and T.
        keep: whether a run of a single segment keeps the state of every step, so that nothing is
            recomputed.
        steps: batch and rate of each of the T steps; see `MiniBatch.lane_steps`.
        final: all parameters after the run ``(R, D)``.
    """

    recipe: MiniBatch
    lanes: Lanes
    bounds: list[int]
    keep: bool = True
    steps: list[tuple[Tensor, float]] = field(init=False)
    final: Tensor = field(init=False)

    def run(self, bar=None) -> "Trajectory":
        """Run the whole stage once."""
        self.steps = list(self.recipe.lane_steps(self.lanes))
        theta = self.lanes.objective.trained.take(self.lanes.base)
        state = self.recipe.start(theta)
        self._checkpoints, self._kept, self._means, self._factors = [], None, [], []
        for segment in range(len(self.bounds) - 1):
            self._checkpoints.append((theta, state))
            every_step = self.keep and len(self.bounds) == 2
            records, theta, state = self._walk(segment, keep=every_step, bar=bar)
            self._kept = records or None
        self.final = self.lanes.full(theta)
        self._state = state
        return self

    def segment(self, index: int) -> list[tuple[Tensor, tuple]]:
        """``(θ (R, P) before the step, what the recipe saved in it)`` of each step of a segment."""
        return list(self._kept) if self._kept else self._walk(index, keep=True)[0]

    def kept(self) -> KeptRun:
        """The run of the first lane as its checkpoints at the bounds."""
        fulls = [self.lanes.full(theta)[0] for theta, _ in self._checkpoints] + [self.final[0]]
        states = [*(state for _, state in self._checkpoints), self._state]
        batches, rates = (list(each) for each in zip(*self.steps, strict=True))
        means = [self.lanes.full(mean)[0] for mean in self._means]
        factors = self._factors or None
        return KeptRun(self.recipe, self.bounds, fulls, states, rates, batches, means, factors)

    def _walk(self, segment: int, keep: bool, bar=None):
        theta, state = self._checkpoints[segment]
        records, total = [], torch.zeros_like(theta)
        first, last = self.bounds[segment : segment + 2]
        for step in range(first, last):
            before = theta
            total += theta
            batch, rate = self.steps[step]
            theta, state, saved = self.recipe.advance(self.lanes, theta, state, step, batch, rate)
            if self.recipe.clip is not None and len(self._factors) == step:
                self._factors.append(float(clip_factor(saved[0][0], self.recipe.clip)))
            if keep:
                records.append((before, saved))
            if bar is not None:
                bar.update()
        self._means = [*self._means[:segment], total / (last - first), *self._means[segment + 1 :]]
        return records, theta, state


def kept_runs(
    pipeline: Pipeline, stretches: int, progress: bool = False, *, by_rates: bool = True
) -> list[KeptRun]:
    """Every stage's run as at most so many stretches: adopted with the weights, or replayed.

    A replayed run is cut by equal sums of learning rates, or else by equal numbers of steps.

    Raises:
        ValueError: weights were adopted without checkpoints, or a stage was trained to an optimum.
    """
    if any(pipeline.runs):
        pairs = zip(pipeline.stages, pipeline.runs, strict=True)
        if missing := [stage.name for stage, run in pairs if run is None]:
            raise ValueError(
                f"stages {missing} were adopted without checkpoints; give a msif.Run for each: "
                "pipeline.adopt(checkpoints=[...])"
            )
        return [run.thinned(stretches) for run in pipeline.runs]
    require_run(pipeline, backwards=False)
    rates = [[r for _, r in stage.recipe.steps(len(stage.data))] for stage in pipeline.stages]
    runs, previous, trained = [], None, pipeline.trained()
    with progress_bar(sum(map(len, rates)), "replay", progress) as bar:
        for k, stage in enumerate(pipeline.stages):
            lanes, bounds = pipeline.fresh_lanes(k, previous), even_bounds(len(rates[k]), stretches)
            if by_rates:
                bounds = bounds_by_rates(rates[k], stretches)
            run = Trajectory(stage.recipe, lanes, bounds, keep=False).run(bar)
            previous = run.final
            require_same_end(stage.name, previous[0], trained[k])
            runs.append(run.kept())
    return runs


def step_counts(pipeline: Pipeline, stretches: int) -> list[list[int]]:
    """How many steps each stretch of every stage will have, as `kept_runs` cuts them."""
    if any(pipeline.runs):
        bounds = [run.thinned(stretches).steps for run in kept_runs(pipeline, stretches)]
    else:
        require_run(pipeline, backwards=False)
        stages = ((stage.recipe, len(stage.data)) for stage in pipeline.stages)
        rates = ([rate for _, rate in recipe.steps(m)] for recipe, m in stages)
        bounds = [bounds_by_rates(each, stretches) for each in rates]
    return [[b - a for a, b in itertools.pairwise(each)] for each in bounds]


def even_bounds(steps: int, segments: int) -> list[int]:
    """Cut ``range(steps)`` into stretches of equal length, give or take one."""
    segments = min(segments, steps)
    return [round(i * steps / segments) for i in range(segments + 1)]


def require_run(pipeline: Pipeline, backwards: bool = True) -> None:
    """Refuse pipelines whose training cannot be replayed, or run ``backwards``, with a way out."""
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"pipeline must be a msif_lab.Pipeline, not {type(pipeline).__name__}")
    if backwards:  # first, since no training would mend that
        _require_derivatives(pipeline)
    if pipeline.adopted:
        raise ValueError(
            "the pipeline's weights were adopted, or converted by to(), so there is no run to "
            "differentiate; train with pipeline.fit() and a recipe such as SGD(...), keep "
            "checkpoints of your own run for SegmentedInfluence and TracIn, "
            f"adopt(checkpoints=[msif.Run(...)]), or {_implicit(pipeline)}"
        )
    for stage in pipeline.stages:
        if not isinstance(stage.recipe, MiniBatch):
            raise ValueError(
                f"stage {stage.name!r} was trained by {type(stage.recipe).__name__}, whose steps "
                "cannot be run backwards here; train it with recipe=SGD(...) or Adam(...), or "
                f"{_implicit(pipeline)}"
            )
    pipeline.trained()
    pipeline.require_repeatable()


def _implicit(pipeline: Pipeline) -> str:
    """How the final weights alone have influence, in words."""
    warm = [stage for stage in pipeline.stages if isinstance(stage.link, WarmStart)]
    if warm:
        return f"{as_proximal(warm[0])}, and ImplicitInfluence(curvature='ggn')"
    return "use ImplicitInfluence, which needs only the final weights"


def as_proximal(stage: Stage) -> str:
    """How final weights of a `WarmStart` stage have implicit influence, in words."""
    alpha = "...), about (1 − momentum) / (2 Σ learning rates) of your run,"
    if hasattr(stage.recipe, "equivalent_alpha"):
        alpha = f"{stage.recipe.equivalent_alpha(len(stage.data)):.3g})"
    return (
        "read the finetuning as proximal: the same stages with link=Proximal(alpha="
        f"{alpha} in a Pipeline of their own, then adopt()"
    )


def _require_derivatives(pipeline: Pipeline) -> None:
    """Refuse runs whose steps cannot be differentiated, or too coarsely to be of use."""
    for k in range(len(pipeline.stages)):
        require_precision(pipeline.objective(k), "differentiating its run")
        require_second_derivative(pipeline.objective(k), "differentiating its run")


def require_same_end(name: str, ours: Tensor, trained: Tensor) -> None:
    """Refuse a replay that does not end where training did."""
    apart = float((ours - trained).norm() / trained.norm().clamp(min=1e-30))
    if not apart <= torch.finfo(trained.dtype).eps ** 0.5:
        raise ValueError(
            f"stage {name!r}: replaying its training ends {apart:.1e} (relative) away from the "
            "trained weights, so the run is not deterministic: a loss or model that draws random "
            "numbers or counts its calls, or GPU kernels that add in changing order "
            "(torch.use_deterministic_algorithms(True) before fit())"
        )
