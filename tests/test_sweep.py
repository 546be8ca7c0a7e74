"""Scores over alpha and damping against the exact solver's and, in the limit, the frozen case's."""

import numpy
import pytest
import torch
from oracles import LINKS, implicit_scores, random_pipeline, random_queries
from scipy import stats

import msif_lab as msif
from msif_lab.evaluation import precision_recall, row_correlations, row_ranks
from msif_lab.influence import AlphaSweep


@pytest.fixture(scope="module")
def proximal():
    """A fitted pipeline with α = 0.3, and queries."""
    pipeline = random_pipeline(link=LINKS["proximal"])
    return pipeline, random_queries(pipeline)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_own_alpha_gives_the_exact_scores(proximal, kind):
    pipeline, queries = proximal
    sweep = AlphaSweep(pipeline, queries, curvature=kind)
    exact = msif.ImplicitInfluence(curvature=kind).fit(pipeline).score(queries)
    ours = sweep.scores(0.3)
    atol = 1e-12 * float(exact.values.abs().max())
    assert torch.allclose(ours.values, exact.values, rtol=1e-9, atol=atol)
    assert torch.equal(ours.ids, exact.ids)
    assert (ours.stage, ours.target) == (exact.stage, exact.target)
    # negative control: another α gives other scores
    assert not torch.allclose(sweep.scores(0.6).values, exact.values, rtol=1e-2)


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_alpha_is_the_proximal_alpha_at_the_same_weights(proximal):
    """At another α the formula is checked, not the retraining: the trained weights are kept."""
    pipeline, queries = proximal
    others = [
        msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay, s.link and msif.Proximal(2.0))
        for s in pipeline.stages
    ]
    there = implicit_scores(msif.Pipeline(others).adopt(), queries)
    ours = AlphaSweep(pipeline, queries).scores(2.0).values
    assert torch.allclose(ours, there, rtol=1e-8, atol=1e-11)


def test_infinite_alpha_is_the_frozen_case_at_the_same_weights(proximal):
    sweep = AlphaSweep(*proximal)
    far, limit = sweep.scores(1e9).values, sweep.scores(float("inf")).values
    assert torch.allclose(far, limit, rtol=1e-6, atol=1e-10)
    assert bool((sweep.filter(float("inf")) == 1).all())
    gains = sweep.filter(1.1 * sweep.floor)
    assert bool((gains[:-1] >= gains[1:]).all())
    assert 0 < float(gains[-1]) < float(gains[0])


class FirstDamped:
    """An exact solver that damps the first operator it is given, which is the first stage's."""

    def __init__(self, damping):
        self.damping = damping

    def prepare(self, operator):
        damping, self.damping = self.damping, 0.0
        return msif.Exact().prepare(operator + damping)


def test_damping_is_of_pretraining_only(proximal):
    pipeline, queries = proximal
    ours = AlphaSweep(pipeline, queries).scores(0.3, 0.7).values
    there = implicit_scores(pipeline, queries, FirstDamped(0.7))
    assert torch.allclose(ours, there, rtol=1e-9, atol=1e-12)
    # negative control: damping both stages gives other scores
    both = implicit_scores(pipeline, queries, damping=0.7)
    assert not torch.allclose(ours, both, rtol=1e-2)


def test_what_it_refuses(proximal):
    frozen = random_pipeline(link=LINKS["frozen"])
    with pytest.raises(ValueError, match=r"links \['Frozen'\].*Proximal"):
        AlphaSweep(frozen, random_queries(frozen))
    pipeline, queries = proximal
    with pytest.raises(TypeError, match=r"queries must be msif_lab\.Examples"):
        AlphaSweep(pipeline, queries.x)
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
    assert numpy.isnan(row_correlations(a, b)).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"a \(4, 30\) and b \(4, 29\)"):
        row_correlations(a, b[:, 1:])


def test_precision_and_recall_count():
    truth = torch.tensor([True, False, True, False, False])
    precision, recall = precision_recall(torch.tensor([2, 1, 0, 4, 3]), truth)
    assert torch.allclose(
        precision, torch.tensor([1, 1 / 2, 2 / 3, 2 / 4, 2 / 5], dtype=precision.dtype)
    )
    assert recall.tolist() == [0.5, 0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="something to find"):
        precision_recall(torch.arange(5), torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="must rank the 5 examples"):
        precision_recall(torch.tensor([0, 0, 1, 2, 3]), truth)
