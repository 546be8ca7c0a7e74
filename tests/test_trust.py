"""How far scores will predict removals: the measured figure beside real removals."""

import copy
import warnings

import pytest
import torch
from oracles import digits_pipeline, random_pipeline, random_queries, same, states

import msif_lab as msif
from msif_lab.influence.trust import Reruns, Trust, estimate
from msif_lab.objective.checks import ask
from msif_lab.pipeline.pipeline import Pipeline

REMOVED = [[i] for i in range(30)]


def digits_run(digits, lr, activation=torch.nn.Tanh, schedule="linear"):
    recipe = msif.SGD(lr=lr, epochs=6, schedule=schedule)
    pipeline = digits_pipeline(digits, msif.WarmStart(), recipe=recipe, weight_decay=1e-3)
    for stage, classes in zip(pipeline.stages, (4, 6), strict=True):
        stage.model = msif.mlp(64, hidden=(16,), classes=classes, activation=activation).double()
    queries = digits[1].select(classes=range(4, 10), n=10)
    return msif.Pipeline(pipeline.stages).fit(progress=False), queries


@pytest.fixture(scope="module")
def calm(digits):
    return digits_run(digits, 0.05)


@pytest.fixture(scope="module")
def rough(digits):
    return digits_run(digits, 0.7, torch.nn.ReLU, "constant")


def scored(pipeline, queries, method=None, **asked):
    """Scores, and the warnings about them."""
    method = (method or msif.UnrolledInfluence(trust=4)).fit(pipeline, progress=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = method.score(queries, progress=False, **asked)
    return scores, [str(w.message) for w in seen if w.category is msif.UnsmoothTrainingWarning]


def real(pipeline, queries, scores, groups=REMOVED, **asked):
    effects = msif.removal_effects(pipeline, queries, groups, progress=False, **asked)
    return msif.agreement(scores, effects).mean("r")


# ---- The figure ----


METHODS = {
    "unrolled": msif.UnrolledInfluence,
    "leave one out": lambda **k: msif.UnrolledInfluence(leave_one_out=True, probes=16, **k),
    "segmented": lambda **k: msif.SegmentedInfluence(24, **k),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_calm_run_is_trusted_and_rightly(calm, name):
    scores, warned = scored(*calm, METHODS[name](trust=4))
    assert not warned
    assert scores.trust_.low > 0.9
    assert abs(scores.trust_.r - real(*calm, scores)) < 0.05


def test_a_rough_run_is_not_and_the_warning_names_the_figure(rough):
    scores, warned = scored(*rough)
    trust = scores.trust_
    assert real(*rough, scores) < 0.5
    assert trust.r < 0.5 and trust.warns
    assert len(warned) == 1, "one warning, of the measured figure, not another of growth"
    assert f"{trust.r:.2f}" in warned[0] and "amplifies small changes" in warned[0]
    assert "decay" in warned[0]


def test_groups_are_measured_by_groups(calm):
    scores, warned = scored(*calm, msif.UnrolledInfluence(group_fraction=0.1, trust=4))
    assert scores.trust_.kind == "groups" and not warned
    groups = msif.random_removals(len(scores.ids), 20, 0.1)
    assert abs(scores.trust_.r - real(*calm, scores, groups)) < 0.1


def test_later_stages_targets_and_aggregates(calm):
    pipeline, queries = calm
    for asked in (
        {"stage": 1},
        {"target": "margin"},
        {"aggregate": "mean"},
        {"aggregate": lambda losses: losses.logsumexp(0)},
    ):
        scores, warned = scored(pipeline, queries, **asked)
        assert scores.trust_.r > 0.9 and not warned, asked


def test_shuffled_scores_are_not_trusted(calm):
    """The control: the right scores of the wrong examples."""
    pipeline, queries = calm
    scores, _ = scored(pipeline, queries)
    reruns = Reruns(pipeline, 0)
    reruns.grow(8)
    question = ask(pipeline.objective(-1), queries, "loss")
    asked = (queries, "loss", None), (1.0, 1.0)
    order = torch.randperm(len(scores.ids), generator=torch.Generator().manual_seed(0))
    for values, low in ((scores.values, False), (scores.values[:, order], True)):
        assert reruns.trust(values, question, *asked).warns == low
    assert reruns.trust(-scores.values, question, *asked).r < 0.5
    assert reruns.trust(0 * scores.values, question, *asked) is None


def test_the_estimate_falls_with_noise_from_one_to_nothing():
    draw = torch.Generator().manual_seed(0)
    predicted, other = torch.randn(2, 20, 400, generator=draw, dtype=torch.float64)
    found = []
    for noise in (0.0, 0.3, 1.0, 3.0, 10.0):
        r, low, high = estimate(predicted, predicted + noise * other)
        assert low <= r <= high
        found.append(r)
    assert found == sorted(found, reverse=True) and found[0] > 0.99 and found[-1] < 0.3
    assert estimate(predicted, -predicted)[0] < 0.3, "the wrong sign"
    assert estimate(predicted, 0.01 * other)[0] < 0.5, "predicted to move, and does not"


# ---- Runs that serve again ----


def test_runs_are_made_once_and_serve_later_calls(calm, monkeypatch):
    pipeline, queries = calm
    made, retrain = [], Pipeline.retrain

    def counted(self, weights, **settings):
        made.append({k: len(w) for k, w in weights.items()})
        return retrain(self, weights, **settings)

    monkeypatch.setattr(Pipeline, "retrain", counted)
    method = msif.UnrolledInfluence().fit(pipeline, progress=False)
    first = method.score(queries, progress=False).trust_
    again = method.score(queries[:4], progress=False).trust_
    assert len(made) == 1 and first.seconds > 0 and again.seconds == 0
    assert again.runs == first.runs == made[0][0]
    method.score(queries, stage=1, progress=False)
    assert len(made) == 2, "another stage needs runs of its own"
    method.fit(pipeline, progress=False).score(queries, progress=False)
    assert len(made) == 3, "fit starts anew"
    monkeypatch.undo()
    alone = msif.UnrolledInfluence(trust=first.runs + 3).fit(pipeline, progress=False)
    grown = Reruns(pipeline, 0)
    for count in (first.runs, first.runs + 3):
        grown.grow(count)
    alone.score(queries, progress=False)
    (there,) = alone._reruns.values()
    assert torch.equal(there.weights, grown.weights), "growing gives the same runs"


def test_nothing_is_rerun_where_none_is_asked_for(rough, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no rerun was asked for")

    monkeypatch.setattr(Pipeline, "retrain", refuse)
    scores, warned = scored(*rough, msif.UnrolledInfluence(trust=0))
    assert scores.trust_ is None
    assert len(warned) == 1 and "amplifies small changes" in warned[0]


def test_models_stay_as_they_are():
    pipeline = random_pipeline(link=msif.WarmStart(), recipe=msif.SGD(0.1, epochs=2, batch_size=7))
    before = states(pipeline)
    msif.UnrolledInfluence(trust=2).fit(pipeline).score(random_queries(pipeline))
    assert same(states(pipeline), before)


def test_adopted_checkpoints_have_no_run_to_repeat(digits):
    data = digits[0][:60]
    net = msif.mlp(64, hidden=(4,), classes=10).double()
    stage = msif.Stage("only", net, data, recipe=msif.SGD(0.1, epochs=2, batch_size=20))
    start = copy.deepcopy(net.state_dict())
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    saved = [(0, start), (6, copy.deepcopy(net.state_dict()))]
    pipeline.adopt(checkpoints=[msif.Run(saved, [0.1] * 6, stage.recipe)])
    scores, _ = scored(pipeline, data[:5], msif.SegmentedInfluence(1))
    assert scores.trust_ is None


# ---- What results show and keep ----


def test_scores_print_keep_and_pass_on_their_trust(calm, tmp_path):
    scores, _ = scored(*calm)
    trust = scores.trust_
    assert f"r ≈ {trust.r:.2f}" in repr(scores) and f"r ≈ {trust.r:.2f}" in scores._repr_html_()
    assert "4 runs" in str(trust) and "%" in str(trust)
    scores.save(tmp_path / "scores")
    assert msif.Influence.load(tmp_path / "scores").trust_ == trust
    assert scores[:3].trust_ == trust
    assert scores.mean().trust_ is None, "of another quantity"
    joined = msif.Influence.concatenate([scores[:3], scores[3:]])
    assert joined.trust_.r == pytest.approx(trust.r)
    bare = msif.Influence(scores.values, scores.ids, scores.query_ids)
    assert "r ≈" not in repr(bare) + bare._repr_html_()
    bare.save(tmp_path / "bare")
    assert msif.Influence.load(tmp_path / "bare").trust_ is None
    assert Trust.together([(trust, 3), (None, 2)]) is None


def test_bad_input():
    for wrong in (-1, 2.5, True, "8"):
        for method in (msif.UnrolledInfluence, msif.SegmentedInfluence):
            with pytest.raises(ValueError, match=f"trust={wrong!r}"):
                method(trust=wrong)
    with pytest.raises(ValueError, match="no correlation"):
        Trust(0.5, 0.6, 0.7, 4)
