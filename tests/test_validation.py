"""Ground truth by retraining, and the agreement statistics."""

import re
from dataclasses import replace

import numpy
import pytest
import torch
from oracles import (
    F64,
    LINKS,
    digits_pipeline,
    random_pipeline,
    random_queries,
    relative_error,
    same,
    states,
)
from scipy import stats

import msif_lab as msif
from msif_lab.evaluation import compare

SGD = msif.SGD(lr=0.1, epochs=5, batch_size=7, seed=3)
SUBSETS = [[3], [17], [5, 9], [0, 1, 2, 23]]


def effects_of(pipeline, queries=None, subsets=SUBSETS, **settings):
    queries = random_queries(pipeline) if queries is None else queries
    return msif.removal_effects(pipeline, queries, subsets, progress=False, **settings)


def fitted_without(pipeline, stage, group):
    """The same optimum with the examples really gone: penalties scaled by m / (m − removed)."""
    stages = []
    for k, s in enumerate(pipeline.stages):
        data, link, scale = s.data, s.link, 1.0
        if k == stage:
            data = data[[i for i in range(len(data)) if i not in group]]
            scale = len(s.data) / len(data)
            link = msif.Proximal(link.alpha * scale) if isinstance(link, msif.Proximal) else link
        fresh = random_pipeline(fit=False, link=LINKS["frozen"]).stages[k].model
        stages.append(msif.Stage(s.name, fresh, data, s.loss, s.weight_decay * scale, link))
    return msif.Pipeline(stages).fit(progress=False)


# ---- Removal effects ----


@pytest.mark.parametrize("link", LINKS)
def test_effects_are_after_minus_before(link):
    """Against pipelines fitted on data that lack the examples."""
    pipeline = random_pipeline(link=LINKS[link])
    queries, groups = random_queries(pipeline), [[3], [5, 9]]

    def losses(pipeline):
        outputs = pipeline.stages[1].model(queries.x).detach()
        return torch.nn.functional.cross_entropy(outputs, queries.y, reduction="none")

    for stage in ("stage0", "stage1"):
        again = [fitted_without(pipeline, pipeline.index(stage), group) for group in groups]
        expected = torch.stack([losses(other) - losses(pipeline) for other in again], 1)
        for protocol in ("same-seed", "warm-start"):
            effects = effects_of(pipeline, queries, groups, stage=stage, protocol=protocol)
            assert (effects.stage, effects.protocol) == (stage, protocol)
            assert torch.allclose(effects.base, losses(pipeline), atol=1e-12)
            assert effects.values.shape == expected.shape == (5, 2)
            worst = float((effects.values - expected).abs().max())
            assert worst <= 1e-8, (stage, protocol)
            assert float(effects.values.abs().amax(0).min()) > 1e-4, (stage, protocol)


def test_sign_by_hand():
    """A lone point pulls a ridge line to itself: removing it raises its loss, by a closed form."""
    x, y = [[0.0], [1.0], [2.0]], [[0.0], [1.0], [5.0]]
    data = msif.Examples(torch.tensor(x, dtype=F64), torch.tensor(y, dtype=F64))
    model = msif.softmax_regression(1, classes=1).double()
    stage = msif.Stage("line", model, data, msif.mean_squared_error, weight_decay=0.1)
    pipeline = msif.Pipeline([stage]).fit(progress=False)

    def loss_at_last(keep):
        a = torch.cat([data.x, torch.ones(3, 1, dtype=F64)], 1)
        gram = 2 / 3 * a[keep].T @ a[keep] + 0.1 * torch.eye(2, dtype=F64)
        line = torch.linalg.solve(gram, 2 / 3 * a[keep].T @ data.y[keep])
        return float((a[2] @ line - 5.0) ** 2)

    effects, before = effects_of(pipeline, data[[2]], [[2], [0]]), loss_at_last([0, 1, 2])
    expected = [loss_at_last([0, 1]) - before, loss_at_last([1, 2]) - before]
    assert effects.values[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert expected[0] > 1
    scores = msif.ImplicitInfluence().fit(pipeline).score(data[[2]])
    # helpful to itself
    assert float(scores.values[0, 2]) < 0 < float(scores.removal_effect([2])[0])


@pytest.mark.parametrize("recipe", [msif.LBFGS(), SGD], ids=["lbfgs", "sgd"])
def test_lanes_and_jobs_do_not_change_the_numbers(recipe):
    pipeline = random_pipeline(link=LINKS["proximal"], recipe=recipe)
    before = states(pipeline)
    together = effects_of(pipeline)
    # processes take seconds to start: once is enough
    processes = [{"n_jobs": 2, "lanes": 2}] if recipe is SGD else []
    for settings in ({"lanes": 1}, {"lanes": 3}, *processes):
        again = effects_of(pipeline, **settings)
        assert float((again.values - together.values).abs().max()) <= 1e-10, settings
        assert torch.equal(again.base, together.base)
    assert same(states(pipeline), before)


def test_protocols_differ_where_training_stops_early():
    pipeline = random_pipeline(link=LINKS["proximal"], recipe=SGD)
    same_seed, warm = (effects_of(pipeline, protocol=p).values for p in ("same-seed", "warm-start"))
    assert relative_error(warm, same_seed) > 0.1


def test_other_targets():
    pipeline = random_pipeline(link=LINKS["frozen"])
    queries = random_queries(pipeline)
    z = fitted_without(pipeline, 0, [3]).stages[1].model(queries.x).detach()
    change = z - pipeline.stages[1].model(queries.x).detach()
    sign = 2.0 * queries.y - 1  # two classes: the log-odds are a difference of logits
    for target, expected in (
        ("margin", sign * (change[:, 1] - change[:, 0])),
        (lambda z, y: z[:, 0], change[:, 0]),
    ):
        effects = effects_of(pipeline, queries, [[3]], target=target)
        assert float((effects.values[:, 0] - expected).abs().max()) <= 1e-8, target


def test_a_recipe_changed_since_the_fit_is_not_a_same_seed_rerun():
    """Its effects would be those of the other recipe, not of a removal."""
    pipeline = random_pipeline(link=LINKS["proximal"], recipe=SGD)
    pipeline.stages[0].recipe = msif.SGD(lr=0.01, epochs=1)
    with pytest.raises(ValueError, match="recipe"):
        effects_of(pipeline)


def test_float32_pipelines():
    """The default dtype of PyTorch and of load_digits()."""
    double, single = (random_pipeline(link=LINKS["proximal"], fit=False) for _ in range(2))
    queries = random_queries(double.fit(progress=False))
    single.to(torch.float32).fit(progress=False)
    expected = effects_of(double, queries, protocol="warm-start").values
    effects = effects_of(single, queries.to(torch.float32), protocol="warm-start")
    assert relative_error(effects.values, expected) < 1e-2
    scores = msif.ImplicitInfluence().fit(single).score(queries.to(torch.float32))
    assert numpy.isfinite(msif.agreement(scores, effects).r).all()


def test_short_retraining_warns():
    pipeline = random_pipeline(link=LINKS["frozen"])
    for stage in pipeline.stages:
        stage.recipe = msif.LBFGS(max_iter=1, polish_up_to=0)
    with pytest.warns(msif.ConvergenceWarning, match=r"largest ‖∇F‖"):
        effects_of(pipeline, protocol="warm-start")


# ---- Digits ----


@pytest.mark.parametrize("link", [msif.Frozen(), msif.Proximal(0.05)], ids=["frozen", "proximal"])
@pytest.mark.parametrize("hidden", [8, 16])
def test_digits_agree_with_real_retraining(digits, hidden, link):
    pipeline = digits_pipeline(digits, link, hidden=hidden, seed=0).fit(progress=False)
    queries = digits[1].select(classes=(4, 5, 6, 7, 8, 9), n=50, seed=0)
    removed = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:40].tolist()
    effects = effects_of(pipeline, queries, [[i] for i in removed], protocol="warm-start")
    solver, reports = msif.Exact(), {}  # one solver: both share the dense matrices
    for corrected in (False, True):
        attributor = msif.ImplicitInfluence(solver, leave_one_out=corrected).fit(pipeline)
        scores = attributor.score(queries)
        reports[corrected] = msif.agreement(scores, effects)
    plain, loo = reports[False], reports[True]
    assert float(effects.gradient_norm.max()) < 1e-12
    assert plain.mean("r") >= 0.97
    assert loo.mean("r") >= 0.99
    assert 0.9 <= loo.mean("slope") <= 1.1
    assert loo.mean("slope") < plain.mean("slope")
    shuffled = msif.Influence(scores.values.flip(1), scores.ids, scores.query_ids, scores.stage)
    assert abs(msif.agreement(shuffled, effects).mean("r")) < 0.5  # negative control


# ---- Agreement ----


def made_up(queries=6, examples=30, removals=12, noise=0.5, seed=0):
    """Scores, and effects that are minus the sums of scores times 1.3, plus noise."""
    generator = numpy.random.default_rng(seed)
    values = torch.as_tensor(generator.normal(size=(queries, examples)))
    sizes = [1 + r % 3 for r in range(removals)]
    subsets = [generator.choice(examples, size=n, replace=False).tolist() for n in sizes]
    predicted = torch.stack([-values[:, s].sum(1) for s in subsets], 1)
    actual = 1.3 * predicted + noise * torch.as_tensor(generator.normal(size=predicted.shape))
    ids = torch.arange(queries) + 100
    scores = msif.Influence(values, torch.arange(examples), ids, "pretrain", "loss", "made up")
    effects = msif.Effects(
        actual,
        subsets,
        torch.zeros(queries),
        ids,
        torch.zeros(removals),
        "pretrain",
        "loss",
        "same-seed",
    )
    return scores, effects, predicted.numpy()


def test_statistics_equal_scipy():
    scores, effects, predicted = made_up()
    report, actual = msif.agreement(scores, effects), effects.values.numpy()
    assert numpy.allclose(report.predicted, predicted) and numpy.allclose(report.actual, actual)
    for q in range(6):
        assert report.r[q] == pytest.approx(stats.pearsonr(predicted[q], actual[q]).statistic)
        assert report.rho[q] == pytest.approx(stats.spearmanr(predicted[q], actual[q]).statistic)
        assert report.slope[q] == pytest.approx(stats.linregress(predicted[q], actual[q]).slope)
    pooled = (predicted.ravel(), actual.ravel())
    assert report.pooled["r"] == pytest.approx(stats.pearsonr(*pooled).statistic)
    assert report.pooled["rho"] == pytest.approx(stats.spearmanr(*pooled).statistic)
    assert report.pooled["slope"] == pytest.approx(stats.linregress(*pooled).slope)
    for name in ("r", "rho", "slope"):
        assert report.mean(name) == pytest.approx(getattr(report, name).mean())
        low, high = report.intervals[name]
        assert low < report.mean(name) < high
    again = msif.agreement(scores, effects)
    assert again.intervals == report.intervals
    assert msif.agreement(scores, effects, seed=1).intervals != report.intervals


def test_perfect_and_opposite_predictions():
    scores, effects, predicted = made_up()
    effects.values = torch.as_tensor(predicted)
    report = msif.agreement(scores, effects)
    assert [report.mean(n) for n in ("r", "rho", "slope")] == pytest.approx([1, 1, 1])
    assert report.intervals["slope"] == pytest.approx((1, 1))
    effects.values = -2 * effects.values
    report = msif.agreement(scores, effects)
    assert [report.mean(n) for n in ("r", "rho", "slope")] == pytest.approx([-1, -1, -2])


def test_bootstrap_interval_covers_the_true_mean():
    """Slopes drawn around 1: the 95 % interval over 30 queries holds 1 about 95 times in 100."""
    generator, hits, widths = numpy.random.default_rng(0), 0, []
    for repeat in range(100):
        predicted = generator.normal(size=(30, 4))
        actual = (1 + 0.3 * generator.normal(size=(30, 1))) * predicted
        report = compare(predicted, actual, resamples=400, seed=repeat)
        low, high = report.intervals["slope"]
        hits += low <= 1 <= high
        widths.append(high - low)
    assert 86 <= hits <= 99
    assert numpy.mean(widths) == pytest.approx(2 * 1.96 * 0.3 / 30**0.5, rel=0.1)


def test_constant_queries_are_left_out_with_a_warning():
    scores, effects, _ = made_up()
    kept = [0, 2, 3, 5]
    some = replace(
        effects,
        values=effects.values[kept],
        base=effects.base[kept],
        query_ids=effects.query_ids[kept],
    )
    clean = msif.agreement(scores[kept], some)
    effects.values[1] = 0.25
    scores.values[4] = 0.0
    with pytest.warns(UserWarning, match="2 of 6 queries"):
        report = msif.agreement(scores, effects)
    assert numpy.isnan(report.r).tolist() == [False, True, False, False, True, False]
    assert numpy.isnan(report.slope).sum() == numpy.isnan(report.rho).sum() == 2
    assert report.mean("r") == pytest.approx(clean.mean("r"))
    assert report.intervals == clean.intervals
    scores.values[:] = 0.0
    with pytest.raises(ValueError, match="no query"):
        msif.agreement(scores, effects)


def test_nan_effects_do_not_pass_silently():
    scores, effects, _ = made_up()
    effects.values[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        msif.agreement(scores, effects)


def test_mismatches_are_refused():
    scores, effects, _ = made_up()
    with pytest.raises(ValueError, match="different queries"):
        msif.agreement(scores[[1, 0, 2, 3, 4, 5]], effects)
    with pytest.raises(ValueError, match="different queries"):
        msif.agreement(scores[:3], effects)
    for name, other in (("stage", "finetune"), ("target", "margin")):
        changed = msif.Influence(
            scores.values, scores.ids, scores.query_ids, **{"stage": "pretrain", name: other}
        )
        with pytest.raises(ValueError, match=other):
            msif.agreement(changed, effects)
    few = msif.Influence(scores.values[:, :5], scores.ids[:5], scores.query_ids, "pretrain")
    with pytest.raises(ValueError, match="0 and 4"):
        msif.agreement(few, effects)
    effects.subsets, effects.values = effects.subsets[:2], effects.values[:, :2]
    with pytest.raises(ValueError, match="at least 3"):
        msif.agreement(scores, effects)


def test_printing_and_table():
    scores, effects, _ = made_up()
    report = msif.agreement(scores, effects)
    text, html, frame = str(report), report._repr_html_(), report.to_frame()
    assert "6 queries × 12 removals" in text and "95 %" in text
    for name in ("r", "rho", "slope"):
        assert f"{report.mean(name):.3f}" in text and f"{report.mean(name):.3f}" in html
        assert f"{report.intervals[name][0]:.3f}" in text and f"{report.pooled[name]:.3f}" in text
    assert list(frame.columns) == ["query_id", "r", "rho", "slope", "sign", "magnitude"]
    assert frame["query_id"].tolist() == list(range(100, 106))
    assert numpy.allclose(frame["slope"], report.slope)


def test_table_of_few_scores_calls_none_helpful_that_is_not():
    values, ids = torch.tensor([[0.1, -0.3, 0.0, 0.2]]), torch.arange(4)
    for target, helpful in (("loss", ["-3.00e-01"]), ("margin", ["+2.00e-01", "+1.00e-01"])):
        html = msif.Influence(values, ids, torch.tensor([7]), "<a>", target)._repr_html_()
        rows = re.findall(r"<td>(helpful|harmful)</td><td>\d</td><td>([^<]*)</td>", html)
        assert [value for word, value in rows if word == "helpful"] == helpful, target
        assert len(rows) == 3, "the one without influence is neither"
        assert "1 query × 4 examples" in html
        assert "<a>" not in html
