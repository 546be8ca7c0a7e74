"""The code that explorers print for the reader uses public names only."""

import ast
import importlib
from dataclasses import replace

import pytest
from oracles import random_pipeline, random_queries

import msif_lab as msif
from msif_lab import widgets

pytest.importorskip("ipywidgets")

PUBLIC_MODULES = {"experiments", "plots", "widgets"}
PUBLIC_FOLDERS = {"msif_lab", "msif_lab.evaluation", "msif_lab.influence", "msif_lab.widgets"}


def private_names(code):
    """Imports from, and attributes of, msif_lab that are not public."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name not in {"msif_lab", "torch"}]
        elif isinstance(node, ast.ImportFrom) and node.module not in PUBLIC_FOLDERS:
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom):
            known = set(importlib.import_module(node.module).__all__)
            known |= PUBLIC_MODULES if node.module == "msif_lab" else set()
            found += [f"{node.module}.{a.name}" for a in node.names if a.name not in known]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found.append(node.attr)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "msif":
            found += [] if node.attr in msif.__all__ else [node.attr]
    return found


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("from msif_lab.influence import AlphaSweep", []),
        ("from msif_lab import plots, agreement", []),
        ("from msif_lab.influence.result import Influence", ["msif_lab.influence.result"]),
        ("from msif_lab.ranking import detection", ["msif_lab.ranking"]),
        ("from msif_lab.influence import rank_stream", ["msif_lab.influence.rank_stream"]),
        ("from msif_lab import figures", ["msif_lab.figures"]),
        ("import msif_lab.storage", ["msif_lab.storage"]),
        ("import msif_lab as msif\nmsif.plots_of", ["plots_of"]),
        ("explorer._order", ["_order"]),
    ],
)
def test_private_names_are_found(line, private):
    assert private_names(line) == private


def test_explorers_print_public_names_only():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    effects = msif.removal_effects(pipeline, queries, [[0], [1], [2]], progress=False)
    scores = msif.GradientDot().fit(pipeline).score(queries)
    table = {"a": scores, "b": scores}
    recipe = msif.SGD(0.1, epochs=1)
    stages = [replace(stage, recipe=recipe) for stage in pipeline.stages]
    runs = msif.over_seeds(msif.Pipeline(stages), 2, redraw=("batches",), progress=False)
    averaged = msif.AveragedInfluence(msif.GradientDot()).fit(runs).score(queries, progress=False)
    explorers = (
        widgets.InfluenceExplorer(pipeline, scores, queries).pick(example=3),
        widgets.AlphaDampingExplorer(pipeline, queries, effects=effects),
        widgets.MethodComparison(pipeline, table, queries),
        widgets.SeedExplorer(runs, averaged, queries),
        widgets.CleaningExplorer(pipeline, scores, queries, corrupted=[1, 2]),
        widgets.CleaningExplorer(runs, averaged, queries, judges=random_queries(pipeline, n=5)),
        widgets.FigureSlider(lambda value: None, [1, 2], "n"),
    )
    assert {type(made).__name__ for made in explorers} == set(widgets.__all__)
    for made in explorers:
        assert private_names(made.code()) == [], type(made).__name__
