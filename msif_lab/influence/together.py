"""Unrolled influence of several seeds' runs in one pass, where that is the same function."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..curvature.derivatives import query_gradients
from ..data.examples import Examples
from ..objective.checks import ask
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import MiniBatch, progress_bar
from ..pipeline.seeds import one_function
from .adjoint import Adjoint
from .cost import make_plan
from .replay import Trajectory, even_bounds, require_run, require_same_end
from .result import Influence
from .unrolled import UnrolledInfluence, warn_of_growth

__all__ = ["scored_each", "scores_together"]


def suits(method, pipelines: Sequence[Pipeline]) -> bool:
    """Whether `scores_together` gives what the method gives of each run, if they are alike."""
    if type(method) is not UnrolledInfluence or method.leave_one_out or method.group_fraction:
        return False
    recipes = [stage.recipe for stage in pipelines[0].stages]
    return len(pipelines) > 1 and all(isinstance(recipe, MiniBatch) for recipe in recipes)


def scores_together(
    method: UnrolledInfluence,
    pipelines: Sequence[Pipeline],
    alike: tuple[list, list],
    queries: Examples,
    *,
    stage: int | str = 0,
    target: str | Callable = "loss",
    aggregate=None,
    progress: bool = False,
) -> list[Influence]:
    """``method.fit(pipeline).score(queries, ...)`` of each pipeline, all runs side by side.

    Args:
        method: without `group_fraction` and `leave_one_out`.
        pipelines: S of them, which `suits` the method.
        alike: what `one_function` says of them.
        queries, stage, target, aggregate, progress: as in `UnrolledInfluence.score`.

    Raises:
        ValueError, MemoryBudgetError: as there; the states of all runs share the budget.

    Warns:
        UnsmoothTrainingWarning: as there, of the mean growth of the runs.
    """
    for pipeline in pipelines:
        require_run(pipeline)
    lead, first = pipelines[0], pipelines[0].index(stage)
    questions = [
        ask(p.objective(-1), queries, target, aggregate, derivative=True) for p in pipelines
    ]
    asked = len(questions[0])
    plan = make_plan(lead, asked * len(pipelines), method.memory, method.segments, len(pipelines))
    runs = _replay(pipelines, alike, plan)
    ends = zip(pipelines, runs[-1].final, questions, strict=True)
    # (S, Q, D), and Q of them in parts that fit for all seeds
    gradients = torch.stack([query_gradients(p.objective(-1), end, q) for p, end, q in ends])
    norms = {k: gradients.new_zeros(len(run.steps) + 1) for k, run in enumerate(runs)}
    parts, values = gradients.split(max(1, plan.part // len(pipelines)), dim=1), []
    steps = sum(len(run.steps) for run in runs[first:])
    with progress_bar(len(parts) * steps, "sweep", progress) as bar:
        for cotangent in parts:
            for k in range(len(runs) - 1, first - 1, -1):
                adjoint = Adjoint(
                    lead.functional(k), runs[k], cotangent, onwards=k > first, memory=method.memory
                )
                adjoint.sweep(norms[k], bar)
                if k > first:
                    cotangent = adjoint.before(lead.objective(k - 1).layout.size)
            values.append(adjoint.scores)
    names = [s.name for s in lead.stages]
    warn_of_growth({names[k]: norms[k] for k in range(first, len(runs))}, stacklevel=4)
    found = []
    for pipeline, scores, question in zip(pipelines, torch.cat(values, 1), questions, strict=True):
        about = names[first], question.target, repr(method), question.aggregate
        ids, origin = pipeline.stages[first].data.ids, pipeline.origin(question)
        found.append(Influence(scores, ids, question.ids, *about, origin))
    return found


def _replay(pipelines: Sequence[Pipeline], alike: tuple, plan) -> list[Trajectory]:
    """Every stage's runs from the initial weights, a lane for each pipeline."""
    lead, (starts, seeds) = pipelines[0], alike
    runs, previous = [], None
    for k, stage in enumerate(lead.stages):
        p = lead.functional(k)
        lanes = replace(p.start(p.lanes(starts[k], previous, None)), seeds=seeds[k])
        bounds = even_bounds(plan.steps[stage.name], plan.segments[stage.name])
        runs.append(Trajectory(stage.recipe, lanes, bounds).run())
        previous = runs[-1].final
        for pipeline, end in zip(pipelines, previous, strict=True):
            require_same_end(stage.name, end, pipeline.trained()[k])
    return runs


def scored_each(
    method, pipelines: Sequence[Pipeline], queries: Examples, asked: dict, with_trust: bool = False
) -> list:
    """The method's scores of each run; ``asked``: the other arguments of ``score``."""
    if not with_trust and suits(method, pipelines) and (alike := one_function(pipelines)):
        return scores_together(method, pipelines, alike, queries, **asked)
    methods = [copy.copy(method) for _ in pipelines]
    for one in methods:
        if hasattr(one, "trust") and not with_trust:
            one.trust = 0  # an average is judged by its seeds, not by more runs of each
    pairs = zip(methods, pipelines, strict=True)
    return [m.fit(p, progress=False).score(queries, **asked) for m, p in pairs]
