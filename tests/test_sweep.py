"""Scores over α and damping: those of the exact solver at the pipeline's own α, the frozen case's
in the limit.
"""

import numpy
import pytest
import torch
from conftest import random_pipeline, random_queries
from scipy import stats

import msif_lab as msif
from msif_lab.evaluation.comparison import detection, row_correlations, row_ranks
from msif_lab.influence.sweep import AlphaSweep


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_own_alpha_gives_the_exact_scores(kind):
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    sweep = AlphaSweep(pipeline, queries, curvature=kind)
    exact = msif.ImplicitInfluence(curvature=kind).fit(pipeline).score(queries)
    ours = sweep.scores(0.3)
    assert torch.allclose(
        ours.values, exact.values, rtol=1e-9, atol=1e-12 * exact.values.abs().max()
    )
    assert torch.equal(ours.ids, exact.ids) and (ours.stage, ours.target) == (
        exact.stage,
        exact.target,
    )
    assert not torch.allclose(sweep.scores(0.6).values, exact.values, rtol=1e-2), (
        "another α gives other scores"
    )


def test_alpha_is_the_proximal_alpha_at_the_same_weights():
    """Another α at the same weights: the pipeline adopted with that link. The formula, not the
    retraining, is held.
    """
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    others = [
        msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay, s.link and msif.Proximal(2.0))
        for s in pipeline.stages
    ]
    with pytest.warns(msif.ConvergenceWarning):  # these weights are no optimum for that α
        there = msif.ImplicitInfluence().fit(msif.Pipeline(others).adopt()).score(queries)
    ours = AlphaSweep(pipeline, queries).scores(2.0)
    assert torch.allclose(ours.values, there.values, rtol=1e-8, atol=1e-11)


def test_infinite_alpha_is_the_frozen_case_at_the_same_weights():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    sweep = AlphaSweep(pipeline, random_queries(pipeline))
    far, limit = sweep.scores(1e9).values, sweep.scores(float("inf")).values
    assert torch.allclose(far, limit, rtol=1e-6, atol=1e-10)
    assert bool((sweep.filter(float("inf")) == 1).all())
    gains = sweep.filter(1.1 * sweep.floor)
    assert bool((gains[:-1] >= gains[1:]).all()) and 0 < float(gains[-1]) < float(gains[0])


def test_damping_is_of_pretraining_only():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    attributor = msif.ImplicitInfluence().fit(pipeline)
    attributor._prepared[0] = msif.Exact().prepare(pipeline.curvature(0) + 0.7)
    there = attributor.score(queries).values
    ours = AlphaSweep(pipeline, queries).scores(0.3, 0.7).values
    assert torch.allclose(ours, there, rtol=1e-9, atol=1e-12)
    both = msif.ImplicitInfluence(damping=0.7).fit(pipeline).score(queries).values
    assert not torch.allclose(ours, both, rtol=1e-2), "the other attributor damps both stages"


def test_what_it_refuses():
    frozen = random_pipeline(link=msif.Frozen())
    with pytest.raises(ValueError, match=r"links \['Frozen'\].*Proximal"):
        AlphaSweep(frozen, random_queries(frozen))
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    with pytest.raises(ValueError, match="curvature='fisher'"):
        AlphaSweep(pipeline, queries, curvature="fisher")
    sweep = AlphaSweep(pipeline, queries)
    for alpha in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            sweep.scores(alpha)
    with pytest.raises(ValueError, match="damping=-1"):
        sweep.scores(0.3, -1.0)
    sweep.eigenvalues = sweep.eigenvalues - sweep.eigenvalues[0] - 1.0  # a saddle: smallest −1
    assert sweep.floor == pytest.approx(0.5)
    with pytest.raises(msif.IndefiniteCurvatureError, match=r"S \+ 2αI.*larger alpha") as caught:
        sweep.scores(0.3)
    assert caught.value.smallest == pytest.approx(-0.4)


def test_row_correlations_are_scipys():
    generator = numpy.random.default_rng(0)
    a, b = generator.normal(size=(4, 30)), generator.normal(size=(4, 30))
    b[1] = numpy.round(b[1])  # ties
    for ours, theirs in (((a, b), stats.pearsonr), ((row_ranks(a), row_ranks(b)), stats.spearmanr)):
        expected = [theirs(x, y).statistic for x, y in zip(a, b, strict=True)]
        assert numpy.allclose(row_correlations(*ours), expected, atol=1e-12)
    b[2] = 1.0
    assert numpy.isnan(row_correlations(a, b)[2]) and not numpy.isnan(row_correlations(a, b)[3])
    with pytest.raises(ValueError, match=r"a \(4, 30\) and b \(4, 29\)"):
        row_correlations(a, b[:, 1:])


def test_detection_counts():
    truth = torch.tensor([True, False, True, False, False])
    precision, recall = detection(torch.tensor([2, 1, 0, 4, 3]), truth)
    assert torch.allclose(
        precision, torch.tensor([1, 1 / 2, 2 / 3, 2 / 4, 2 / 5], dtype=precision.dtype)
    )
    assert recall.tolist() == [0.5, 0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="something to find"):
        detection(torch.arange(5), torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must rank the 5 examples"):
        detection(torch.tensor([0, 0, 1, 2, 3]), truth)
