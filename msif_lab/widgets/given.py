"""What an explorer was given, checked once and arranged by case, method and stage."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..arguments import check_instance
from ..data.examples import Examples
from ..influence.result import Influence
from ..objective.checks import ask
from ..pipeline.origin import difference
from ..pipeline.pipeline import Pipeline

__all__ = [
    "Given",
    "check_scores",
    "one_pipeline",
    "pipelines",
    "predicted_class",
    "quoted",
    "score_table",
]


class Given(NamedTuple):
    """One set of scores, and its ``path``: how the reader's code gets it, ``scores`` + path."""

    scores: Influence
    path: str


def pipelines(
    pipeline: Pipeline | Mapping[str, Pipeline], queries: Examples, name: str = "queries"
) -> dict[str, Pipeline]:
    """The pipelines by case, trained and able to answer the queries; a single one has case ``""``.

    Raises:
        TypeError, ValueError: no pipeline, not trained, queries of another shape or task.
    """
    check_instance(name, queries, Examples, "wrap them: Examples(x, y)")
    named = dict(pipeline) if isinstance(pipeline, Mapping) else {"": pipeline}
    if not named:
        raise ValueError(
            "pipeline is empty; give a Pipeline, or several by case: {'frozen': ..., 'full': ...}"
        )
    for case, one in named.items():
        if not isinstance(one, Pipeline):
            where = f"pipeline[{case!r}]" if case else "pipeline"
            raise TypeError(f"{where} is {type(one).__name__}, not msif_lab.Pipeline")
        one.trained()
        ask(one.objective(-1), queries, "loss")
    return named


def one_pipeline(pipeline: Pipeline, queries: Examples, name: str = "queries") -> Pipeline:
    """The pipeline, trained and able to answer the queries, which messages call ``name``."""
    if isinstance(pipeline, Mapping):
        raise TypeError(
            f"pipeline holds the cases {list(pipeline)}; this explorer takes one: pipeline[...]"
        )
    return pipelines(pipeline, queries, name)[""]


def check_scores(
    scores, pipeline: Pipeline, queries: Examples, name: str = "scores", *, mean: bool = False
) -> int:
    """Position of the stage whose examples are scored.

    Args:
        scores: an `Influence`.
        pipeline, queries: that it must be of.
        name: what messages call it.
        mean: whether one row about the mean query will do.

    Raises:
        TypeError: ``scores`` is no `Influence`.
        ValueError: it is not of that stage's examples and these queries.
    """
    if not isinstance(scores, Influence):
        raise TypeError(
            f"{name} is {type(scores).__name__}, not msif_lab.Influence: give what "
            "attributor.fit(pipeline).score(queries) returns, without top="
        )
    stage = pipeline.index(scores.stage) if scores.stage else 0
    data = pipeline.stages[stage].data
    one_row = mean and scores.aggregate.startswith("mean")
    if tuple(scores.values.shape) != (1 if one_row else len(queries), len(data)):
        raise ValueError(
            f"{name} is {tuple(scores.values.shape)}, expected ({len(queries)}, {len(data)}): one "
            "row for each query, one column for each example of stage "
            f"{pipeline.stages[stage].name!r}"
        )
    for what, ours, theirs in (
        ("queries", scores.query_ids, queries.ids),
        ("examples", scores.ids, data.ids),
    ):
        if not torch.equal(ours.cpu(), theirs.cpu()) and not (one_row and what == "queries"):
            raise ValueError(
                f"{name} is of other {what}: the ids differ; score the ones you give here"
            )
    if scores.origin and not scores.aggregate:
        question = ask(pipeline.objective(-1), queries, "loss")
        ours = pipeline.origin(question) | {"target": scores.origin["target"]}
        if differ := difference(scores.origin, ours):
            raise ValueError(
                f"{name} and the pipeline or queries given here are of different {differ}"
            )
    return stage


def score_table(
    named: Mapping[str, Pipeline], scores, queries: Examples
) -> dict[tuple[str, str, int], Given]:
    """Scores by (case, method, position of the stage), in the order given.

    Args:
        named: pipelines by case, from `pipelines`.
        scores: an `Influence`, or methods by name; for several cases, one of these by case. Any
            `Influence` may be a list of them instead, one for each stage.
        queries: of all scores.

    Raises:
        ValueError, TypeError: an unknown case, no scores for a case, the same stage twice, or
            scores that do not fit.
    """
    several = set(named) != {""}
    if several and (not isinstance(scores, Mapping) or set(scores) != set(named)):
        found = list(scores) if isinstance(scores, Mapping) else type(scores).__name__
        raise ValueError(
            f"scores are of cases {found}, the pipelines of {list(named)}; give scores for each "
            "case by name"
        )
    table: dict[tuple[str, str, int], Given] = {}
    for case, pipeline in named.items():
        of_case = scores[case] if several else scores
        path = f"[{quoted(case)}]" if several else ""
        by_method = of_case if isinstance(of_case, Mapping) else {"": of_case}
        if not by_method:
            raise ValueError(f"scores{path} is empty; give at least one Influence")
        for method, given in by_method.items():
            where = f"{path}[{quoted(method)}]" if isinstance(of_case, Mapping) else path
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            if listed and not given:
                raise ValueError(f"scores{where} is empty; give at least one Influence")
            for i, one in enumerate(given if listed else [given]):
                here = f"{where}[{i}]" if listed else where
                stage = check_scores(one, pipeline, queries, f"scores{here}")
                key = (case, str(method), stage)
                if key in table:
                    name = pipeline.stages[stage].name
                    raise ValueError(f"scores{here} is of stage {name!r} again; give one per stage")
                table[key] = Given(one, here)
    return table


def quoted(value) -> str:
    """A constant as this project writes it, strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def predicted_class(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The class of the largest output, as a target to evaluate."""
    return outputs.argmax(-1).to(outputs)
