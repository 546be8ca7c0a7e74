"""A plan's figures against what the work then takes; no clock is asked."""

import pytest
import torch
from oracles import LINKS, implicit_scores, random_pipeline, random_queries

import msif_lab as msif


def within(estimate, measured, factor=3):
    assert measured / factor <= estimate <= factor * measured, (estimate, measured)


@pytest.fixture(scope="module")
def pipeline():
    return random_pipeline("mlp", link=LINKS["proximal"])


def test_a_small_pipeline_is_solved_exactly(pipeline, capsys):
    queries = random_queries(pipeline, n=20)
    scores = msif.ImplicitInfluence("auto", curvature="ggn").fit(pipeline)
    said = capsys.readouterr().out
    assert "stage0" in said
    assert "Exact" in said
    values = scores.score(queries).values
    expected = implicit_scores(pipeline, queries, curvature="ggn")
    assert torch.allclose(values, expected, rtol=0, atol=1e-8)
    for stage in scores.plan_.stages:
        assert stage.parameters == pipeline.objective(stage.stage).size
        assert stage.examples == len(pipeline.objective(stage.stage).data)
        if isinstance(stage.solver, msif.Exact):
            activations = 24 * pipeline.objective(stage.stage).bytes_per_example()
            within(stage.bytes, scores.report_[stage.stage].bytes + activations, 6)


def test_products_of_conjugate_gradients_are_foreseen(pipeline):
    # in a kilobyte nothing dense fits
    planned = msif.plan(pipeline, queries=10, memory="1KB", kind="ggn", damping=0.01)
    assert all(isinstance(s.solver, msif.ConjugateGradient) for s in planned.stages)
    attributor = msif.ImplicitInfluence(
        msif.ConjugateGradient(), curvature="ggn", damping=0.01
    ).fit(pipeline)
    attributor.score(random_queries(pipeline, n=10))
    for stage in planned.stages:
        report = attributor.report_[stage.stage]
        within(stage.products, report.products)
        assert report.bytes <= stage.bytes
    assert "dense matrices would take" in str(planned)
    assert planned.seconds > 0
    assert planned.bytes == max(s.bytes for s in planned.stages)


def test_an_indefinite_hessian_is_told():
    pipeline = random_pipeline("mlp", link=msif.Proximal(1e-6), weight_decay=1e-6, fit=False)
    planned = msif.plan(pipeline.adopt(), memory="1KB")  # untrained: far from a minimum
    assert any("curvature='ggn'" in stage.reason for stage in planned.stages)


def test_plan_refuses():
    pipeline = random_pipeline("mlp", link=LINKS["proximal"], fit=False)
    with pytest.raises(ValueError, match="not trained"):
        msif.plan(pipeline)
    with pytest.raises(ValueError, match="queries=0"):
        msif.plan(pipeline.adopt(), 0)
    with pytest.raises(TypeError, match="Pipeline"):
        msif.plan(pipeline.stages[0])
    with pytest.raises(TypeError, match="'auto'"):
        msif.ImplicitInfluence("exact")
