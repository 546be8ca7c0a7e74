"""Ground truth by retraining, and the agreement statistics; the issue's figures on real digits."""

import re

import numpy
import pytest
import torch
from conftest import digits_pipeline, random_pipeline, random_queries
from scipy import stats

import msif_lab as msif
from msif_lab.evaluation import comparison

F64 = torch.float64
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3)}
SGD = msif.SGD(lr=0.1, epochs=5, batch_size=7, seed=3)
SUBSETS = [[3], [17], [5, 9], [0, 1, 2, 23]]


def with_recipe(recipe, link=None):
    pipeline = random_pipeline(link=link or LINKS["proximal"], fit=False)
    for stage in pipeline.stages:
        stage.recipe = recipe
    return pipeline.fit(progress=False)


def effects_of(pipeline, queries=None, subsets=SUBSETS, **settings):
    queries = random_queries(pipeline) if queries is None else queries
    return msif.removal_effects(pipeline, queries, subsets, progress=False, **settings)


def fitted_without(pipeline, stage, group):
    """The same optimum found another way: the examples really gone, penalties scaled by m / (m −
    removed).
    """
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


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("protocol", ["same-seed", "warm-start"])
def test_effects_are_after_minus_before(protocol, link, stage):
    """Against pipelines fitted on data that lack the examples."""
    pipeline = random_pipeline(link=LINKS[link])
    queries, groups = random_queries(pipeline), [[3], [5, 9]]
    effects = effects_of(pipeline, queries, groups, stage=stage, protocol=protocol)
    assert (
        effects.values.shape == (5, 2) and effects.stage == stage and effects.protocol == protocol
    )
    outputs = pipeline.stages[1].model(queries.x).detach()
    before = torch.nn.functional.cross_entropy(outputs, queries.y, reduction="none")
    assert torch.allclose(effects.base, before, atol=1e-12)
    for r, group in enumerate(groups):
        again = fitted_without(pipeline, pipeline.index(stage), group)
        after = torch.nn.functional.cross_entropy(
            again.stages[1].model(queries.x).detach(), queries.y, reduction="none"
        )
        assert float((effects.values[:, r] - (after - before)).abs().max()) <= 1e-8
        assert float(effects.values[:, r].abs().max()) > 1e-4


def test_sign_by_hand():
    """A lone point pulls a ridge line to itself, so removing it raises its own loss: a closed form,
    and positive.
    """
    data = msif.Examples(
        torch.tensor([[0.0], [1.0], [2.0]], dtype=F64),
        torch.tensor([[0.0], [1.0], [5.0]], dtype=F64),
    )
    model = msif.softmax_regression(1, classes=1).double()
    pipeline = msif.Pipeline(
        [msif.Stage("line", model, data, msif.mean_squared_error, weight_decay=0.1)]
    ).fit(False)

    def loss_at_last(keep):
        a = torch.cat([data.x, torch.ones(3, 1, dtype=F64)], 1)
        line = torch.linalg.solve(
            2 / 3 * a[keep].T @ a[keep] + 0.1 * torch.eye(2, dtype=F64),
            2 / 3 * a[keep].T @ data.y[keep],
        )
        return float((a[2] @ line - 5.0) ** 2)

    effects = effects_of(pipeline, data[[2]], [[2], [0]])
    assert float(effects.values[0, 0]) == pytest.approx(
        loss_at_last([0, 1]) - loss_at_last([0, 1, 2]), rel=1e-9
    )
    assert float(effects.values[0, 1]) == pytest.approx(
        loss_at_last([1, 2]) - loss_at_last([0, 1, 2]), rel=1e-9
    )
    assert float(effects.values[0, 0]) > 1
    scores = msif.ImplicitInfluence().fit(pipeline).score(data[[2]])
    # helpful to itself
    assert float(scores.values[0, 2]) < 0 < float(scores.removal_effect([2])[0])


@pytest.mark.parametrize("recipe", [msif.LBFGS(), SGD], ids=["lbfgs", "sgd"])
def test_lanes_and_jobs_do_not_change_the_numbers(recipe):
    pipeline = with_recipe(recipe)
    before = [p.detach().clone() for s in pipeline.stages for p in s.model.parameters()]
    together = effects_of(pipeline)
    # starting them is what takes time
    processes = [{"n_jobs": 2, "lanes": 2}] if recipe is SGD else []
    for settings in ({"lanes": 1}, {"lanes": 3}, *processes):
        again = effects_of(pipeline, **settings)
        assert float((again.values - together.values).abs().max()) <= 1e-10, settings
        assert torch.equal(again.base, together.base)
    after = [p for s in pipeline.stages for p in s.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_protocols_differ_where_training_stops_early():
    pipeline = with_recipe(SGD)
    same_seed, warm = (effects_of(pipeline, protocol=p).values for p in ("same-seed", "warm-start"))
    assert float((same_seed - warm).norm() / same_seed.norm()) > 0.1


@pytest.mark.parametrize("target", ["margin", lambda z, y: z[:, 0]])
def test_other_targets(target):
    pipeline = random_pipeline(link=LINKS["frozen"])
    queries = random_queries(pipeline)
    effects = effects_of(pipeline, queries, [[3]], target=target)
    z = fitted_without(pipeline, 0, [3]).stages[1].model(queries.x).detach()
    before = pipeline.stages[1].model(queries.x).detach()
    if target == "margin":  # two classes: the log-odds are a difference of logits
        sign = 2.0 * queries.y - 1
        expected = sign * ((z[:, 1] - z[:, 0]) - (before[:, 1] - before[:, 0]))
    else:
        expected = (z - before)[:, 0]
    assert float((effects.values[:, 0] - expected).abs().max()) <= 1e-8


def test_a_recipe_changed_since_the_fit_is_not_a_same_seed_rerun():
    """Effects would hold the difference between the recipes, not of a removal."""
    pipeline = with_recipe(SGD)
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
    assert float((effects.values - expected).norm() / expected.norm()) < 1e-2
    scores = msif.ImplicitInfluence().fit(single).score(queries.to(torch.float32))
    assert numpy.isfinite(msif.agreement(scores, effects).r).all()


def test_short_retraining_warns():
    pipeline = random_pipeline(link=LINKS["frozen"])
    for stage in pipeline.stages:
        stage.recipe = msif.LBFGS(max_iter=1, polish_up_to=0)
    with pytest.warns(msif.ConvergenceWarning, match=r"largest ‖∇F‖"):
        effects_of(pipeline, protocol="warm-start")


# ---- Digits: the figures ----


@pytest.mark.parametrize("link", [msif.Frozen(), msif.Proximal(0.05)], ids=["frozen", "proximal"])
@pytest.mark.parametrize("hidden", [8, 12, 16])
def test_digits_agree_with_real_retraining(digits, hidden, link):
    pipeline = digits_pipeline(digits, link, hidden=hidden, seed=0).fit(progress=False)
    queries = digits[1].select(classes=(4, 5, 6, 7, 8, 9), n=50, seed=0)
    removed = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:60].tolist()
    effects = effects_of(pipeline, queries, [[i] for i in removed], protocol="warm-start")
    solver, reports = msif.Exact(), {}  # one solver: both share the dense matrices
    for corrected in (False, True):
        scores = (
            msif.ImplicitInfluence(solver, leave_one_out=corrected).fit(pipeline).score(queries)
        )
        reports[corrected] = msif.agreement(scores, effects)
    plain, loo = reports[False], reports[True]
    print(
        f"hidden {hidden}, {type(link).__name__}: r {plain.mean('r'):.4f}, slope "
        f"{plain.mean('slope'):.3f}; leave-one-out r {loo.mean('r'):.4f} (worst query "
        f"{loo.r.min():.3f}), slope {loo.mean('slope'):.3f}"
    )
    assert float(effects.gradient_norm.max()) < 1e-12
    assert plain.mean("r") >= 0.97
    assert loo.mean("r") >= 0.99 and 0.9 <= loo.mean("slope") <= 1.1
    assert loo.mean("slope") < plain.mean("slope")
    shuffled = msif.Influence(scores.values.flip(1), scores.ids, scores.query_ids, scores.stage)
    assert abs(msif.agreement(shuffled, effects).mean("r")) < 0.5  # negative control


# ---- Agreement ----


def made_up(queries=6, examples=30, removals=12, noise=0.5, seed=0):
    """Scores, and effects that are minus the sums of scores times 1.3, plus noise."""
    generator = numpy.random.default_rng(seed)
    values = torch.as_tensor(generator.normal(size=(queries, examples)))
    subsets = [
        generator.choice(examples, size=1 + r % 3, replace=False).tolist() for r in range(removals)
    ]
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
    assert [
        msif.agreement(scores, effects).mean(n) for n in ("r", "rho", "slope")
    ] == pytest.approx([-1, -1, -2])


def test_bootstrap_interval_covers_the_true_mean():
    """Slopes drawn around 1: the 95 % interval over 30 queries holds 1 about 95 times in 100."""
    generator, hits, widths = numpy.random.default_rng(0), 0, []
    for repeat in range(100):
        predicted = generator.normal(size=(30, 4))
        actual = (1 + 0.3 * generator.normal(size=(30, 1))) * predicted
        low, high = comparison.compare(predicted, actual, resamples=400, seed=repeat).intervals[
            "slope"
        ]
        hits += low <= 1 <= high
        widths.append(high - low)
    assert 86 <= hits <= 99
    assert numpy.mean(widths) == pytest.approx(2 * 1.96 * 0.3 / 30**0.5, rel=0.1)


def test_constant_queries_are_left_out_with_a_warning():
    scores, effects, _ = made_up()
    clean = msif.agreement(scores[[0, 2, 3, 5]], _only(effects, [0, 2, 3, 5]))
    effects.values[1] = 0.25
    scores.values[4] = 0.0
    with pytest.warns(UserWarning, match="2 of 6 queries"):
        report = msif.agreement(scores, effects)
    assert numpy.isnan(report.r).tolist() == [False, True, False, False, True, False]
    assert numpy.isnan(report.slope).sum() == numpy.isnan(report.rho).sum() == 2
    assert (
        report.mean("r") == pytest.approx(clean.mean("r")) and report.intervals == clean.intervals
    )
    scores.values[:] = 0.0
    with pytest.raises(ValueError, match="no query"):
        msif.agreement(scores, effects)


def _only(effects, queries):
    return msif.Effects(
        effects.values[queries], effects.subsets, effects.base[queries], effects.query_ids[queries],
        effects.gradient_norm, effects.stage, effects.target, effects.protocol,
    )  # fmt: skip


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
    assert frame["query_id"].tolist() == list(range(100, 106)) and numpy.allclose(
        frame["slope"], report.slope
    )


@pytest.mark.parametrize(
    ("target", "helpful"), [("loss", ["-3.00e-01"]), ("margin", ["+2.00e-01", "+1.00e-01"])]
)
def test_table_of_few_scores_calls_none_helpful_that_is_not(target, helpful):
    values = torch.tensor([[0.1, -0.3, 0.0, 0.2]])
    html = msif.Influence(values, torch.arange(4), torch.tensor([7]), "<a>", target)._repr_html_()
    rows = re.findall(r"<td>(helpful|harmful)</td><td>\d</td><td>([^<]*)</td>", html)
    assert [value for word, value in rows if word == "helpful"] == helpful
    assert len(rows) == 3, "the one without influence is neither"
    assert "1 query × 4 examples" in html and "<a>" not in html
