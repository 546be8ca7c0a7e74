"""Rankings: what they detect, how stable they are, what to expect of them, and the controls."""

from __future__ import annotations

import functools
import sys

import numpy
import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab.evaluation.rankings import _detected
from msif_lab.influence.averaged import InfluenceOverSeeds
from msif_lab.influence.baselines import SelfInfluence
from msif_lab.influence.ensembles import PROJECTION, trak

DRAW = torch.Generator().manual_seed(0)
TRUTH = torch.rand(60, generator=DRAW) < 0.3
SCORES = torch.randn(60, generator=DRAW, dtype=torch.float64) + TRUTH


# ---- Detection ----


def test_areas_are_counted_pair_by_pair():
    found = msif.detection(SCORES, TRUTH, resamples=20)
    pairs = SCORES[TRUTH][:, None] - SCORES[~TRUTH]
    assert found.roc_auc == pytest.approx(float((pairs > 0).double().mean()))
    order = sorted(range(60), key=lambda i: -float(SCORES[i]))
    hits = numpy.cumsum([bool(TRUTH[i]) for i in order])
    assert found.recall.tolist() == pytest.approx((hits / hits[-1]).tolist())
    precision = hits / numpy.arange(1, 61)
    assert found.precision.tolist() == pytest.approx(precision.tolist())
    at = [i for i in range(60) if TRUTH[order[i]]]
    assert found.pr_auc == pytest.approx(precision[at].mean()), "mean precision at each find"
    assert found.k == found.truths == int(TRUTH.sum())
    assert found.precision_at_k == pytest.approx(precision[found.k - 1])
    assert msif.detection(SCORES, TRUTH, k=5, resamples=5).precision_at_k == precision[4]
    positions = TRUTH.nonzero().flatten()
    assert msif.detection(SCORES, positions, resamples=20).roc_auc == found.roc_auc
    assert "ROC AUC" in str(found) and "<table" in found._repr_html_()


def test_repeated_examples_count_as_in_scikit_learn():
    """Ties and multiplicities, as the bootstrap draws them."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = numpy.random.default_rng(1)
    x = -numpy.sort(-rng.integers(0, 8, 40).astype(float))
    y, times = rng.random(40) < 0.4, rng.integers(0, 4, 40).astype(float)
    found = _detected(x, y, times, 7)
    flat = numpy.repeat(y, times.astype(int))
    assert found[0] == pytest.approx(flat[:7].mean())
    assert found[1] == pytest.approx(roc_auc_score(y, x, sample_weight=times))
    assert found[2] == pytest.approx(average_precision_score(y, x, sample_weight=times))
    assert found[1] != pytest.approx(roc_auc_score(y, x))


def test_intervals_are_as_wide_as_the_spread_over_other_examples():
    rng = numpy.random.default_rng(0)
    y = numpy.arange(120) < 40
    inside, areas, widths = [], [], []
    for i in range(120):
        found = msif.detection(rng.normal(size=120) + y, y, resamples=100, seed=i)
        low, high = found.intervals["roc_auc"]
        inside.append(low < 0.7602 < high)  # Φ(1/√2), the chance that N(1, 1) exceeds N(0, 1)
        areas.append(found.roc_auc)
        widths.append(high - low)
    assert 0.88 < numpy.mean(inside) < 0.99
    assert numpy.mean(widths) == pytest.approx(2 * 1.96 * numpy.std(areas), rel=0.25)


def test_detection_keeps_the_sign_rule():
    ids, query = torch.arange(60), torch.tensor([0, 1])
    values = torch.stack([SCORES, SCORES])
    loss = msif.Influence(values, ids, query, "pretrain", "loss")
    margin = msif.Influence(-values, ids, query, "pretrain", "margin")
    expected = msif.detection(SCORES, TRUTH, resamples=5).roc_auc
    assert expected > 0.6
    for scores in (loss, margin, loss.mean()):
        assert msif.detection(scores, TRUTH, resamples=5).roc_auc == pytest.approx(expected)


def test_detection_refuses():
    for truth in (TRUTH[:5], torch.zeros(60), torch.zeros(60, dtype=torch.bool), [60], [-1]):
        with pytest.raises(ValueError, match="truth"):
            msif.detection(SCORES, truth)
    with pytest.raises(ValueError, match="marks all"):
        msif.detection(SCORES, ~torch.zeros(60, dtype=torch.bool))
    with pytest.raises(ValueError, match="scores holds nan"):
        msif.detection(SCORES.clone().fill_(torch.nan), TRUTH)


# ---- What to expect ----


def averaged(per_seed: torch.Tensor, target: str = "loss") -> InfluenceOverSeeds:
    """Scores of seeds ``(S, N)`` as one row."""
    seeds, m = per_seed.shape
    about = torch.arange(m), torch.tensor([-1]), "pretrain", target, "", "mean of 9 queries #1"
    return InfluenceOverSeeds.of(per_seed[:, None], range(seeds), "mean", *about, origin={})


def test_the_gain_is_free_of_the_winners_curse():
    """Over many draws of noisy scores, against the true effect of what they choose."""
    draw = torch.Generator().manual_seed(0)
    m, seeds, k = 100, 6, 10
    errors, naive, wide = [], [], []
    for _ in range(300):
        true = 0.5 * torch.randn(m, generator=draw, dtype=torch.float64)
        noise = torch.randn(seeds, m, generator=draw, dtype=torch.float64)
        row = msif.predicted_gain(averaged(true + noise), k / m).iloc[0]
        chosen = (true + noise).mean(0).argsort(descending=True)[:k]
        errors.append(row.gain - float(true[chosen].sum()))
        naive.append(row.gain_in_sample - float(true[chosen].sum()))
        wide.append(row.standard_error)
    errors, naive = numpy.array(errors), numpy.array(naive)
    # A choice by one seed fewer is a little worse, so the estimate is low rather than high.
    assert -0.4 < errors.mean() < 0.05
    assert naive.mean() > 1.5, "the control: the scores that chose also judge"
    assert errors.std() < numpy.mean(wide) < 2 * errors.std(), "a cautious standard error"


def test_predicted_gain_by_hand():
    per_seed = torch.randn(3, 20, generator=DRAW, dtype=torch.float64)

    def by_hand(seeds):
        gains = []
        for s in seeds:
            others = per_seed[[i for i in seeds if i != s]].mean(0).tolist()
            first = sorted(range(20), key=lambda i: -others[i])[:4]
            gains.append(sum(float(per_seed[s, i]) for i in first))
        return numpy.mean(gains)

    left = [by_hand(seeds) for seeds in ((1, 2), (0, 2), (0, 1))]
    losses = [1.0, 1.5, 1.7, 1.2]
    row = msif.predicted_gain(averaged(per_seed), [0.2, 0.5], losses=losses).iloc[0]
    assert row.gain == pytest.approx(by_hand((0, 1, 2)))
    assert row.standard_error == pytest.approx(numpy.std(left) * 2**0.5)
    assert row.spread == pytest.approx(numpy.std(losses, ddof=1))
    assert row.gain_to_spread == pytest.approx(row.gain / row.spread)
    turned = msif.predicted_gain(averaged(-per_seed, "margin"), 0.2).iloc[0]
    assert turned.gain == pytest.approx(row.gain), "what lowers a margin harms"
    with pytest.raises(ValueError, match="two or more seeds"):
        msif.predicted_gain(averaged(per_seed[:1]))


# ---- Stability ----


def test_stability_is_spearman_and_overlap_of_what_both_rank():
    from scipy.stats import spearmanr

    a, b = SCORES, SCORES + 0.5 * torch.randn(60, generator=DRAW, dtype=torch.float64)
    holes = b.clone()
    holes[:15] = torch.nan
    table = msif.stability({"method": {"a": a, "b": b}, "resample": torch.stack([a, holes])}, 0.2)
    assert table.varies.tolist() == ["method", "resample"] and table.left.tolist() == ["a", 0]
    assert table.spearman[0] == pytest.approx(spearmanr(a, b).statistic)
    assert table.spearman[1] == pytest.approx(spearmanr(a[15:], b[15:]).statistic)
    tops = [set(x[15:].argsort(descending=True)[:9].tolist()) for x in (a, b)]
    assert table.overlap[1] == pytest.approx(len(tops[0] & tops[1]) / 9)
    assert table.examples.tolist() == [60, 45] and table.chance[1] == pytest.approx(0.2)
    seeds = msif.stability({"seed": averaged(torch.stack([a, b, -a]))}, 0.2)
    assert len(seeds) == 3 and seeds.spearman[1] == pytest.approx(-1)
    assert seeds.overlap[1] == 0, "the control: opposite rankings share no top"
    for bad in ({"a": {"b": a}}, {"a": {"b": a, "c": a[:5]}}, {"a": a}):
        with pytest.raises(ValueError, match="rankings"):
            msif.stability(bad)


# ---- With pipelines ----


@functools.cache
def data():
    train, test = msif.load_digits(dtype=torch.float64)
    return train.select(range(3), n=30, seed=0), test.select(range(3), n=20, seed=0)


# All of the data in each batch, so that their order does not matter.
RECIPE = msif.SGD(0.3, epochs=10, batch_size=1000)


def net(classes: int = 3):
    return msif.mlp(64, (6,), classes=classes, seed=0, activation=nn.Tanh).double()


def pipeline(pre=None, loss=msif.cross_entropy, recipe=RECIPE):
    pre = data()[0] if pre is None else pre
    stage = msif.Stage("digits", net(), pre, loss, weight_decay=1e-2, recipe=recipe)
    return msif.Pipeline([stage])


def test_bootstrap_scores_are_those_of_the_resample():
    rows = msif.bootstrap_scores(pipeline(), msif.GradientDot(), data()[1], resamples=2, seed=4)
    draw = torch.Generator().manual_seed(4)
    for row in rows:
        drawn = torch.randint(30, (30,), generator=draw).sort().values  # in another order
        some = msif.Examples(data()[0].x[drawn], data()[0].y[drawn])
        fitted = pipeline(some).fit(progress=False)
        scores = msif.GradientDot().fit(fitted).score(data()[1], aggregate="mean").values[0]
        for i in range(30):
            copies = scores[drawn == i]
            if len(copies):
                assert float(row[i]) == pytest.approx(float(copies[0]), abs=1e-12)
            else:
                assert bool(row[i].isnan())
    whole = msif.GradientDot().fit(pipeline().fit(progress=False)).score(data()[1]).mean()
    assert not torch.allclose(rows[0][~rows[0].isnan()], whole.values[0][~rows[0].isnan()])


def test_out_of_fold_is_training_on_the_other_folds():
    from sklearn.model_selection import StratifiedKFold

    pre = data()[0]
    found = msif.out_of_fold(pipeline(), folds=3, seed=1)
    for kept, out in StratifiedKFold(3, shuffle=True, random_state=1).split(pre.y, pre.y):
        share = len(kept) / 30  # weights of zero keep the 1/m of all examples

        def loss(z, y, share=share):
            return share * nn.functional.cross_entropy(z, y, reduction="none")

        fitted = pipeline(msif.Examples(pre.x[kept], pre.y[kept]), loss).fit(progress=False)
        with torch.no_grad():
            p = fitted.stages[0].model(pre.x[out]).softmax(1)
        torch.testing.assert_close(found[out], p, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="folds=11"):
        msif.out_of_fold(pipeline(), folds=11)


def test_controls_put_first_what_they_would_remove():
    runs = [pipeline().fit(progress=False)]
    pre, truth = data()[0], [2, 5]
    found = msif.controls(runs[0], data()[1], truth=truth)
    assert list(found) == [
        *("random", "loss", "margin", "entropy", "gradient norm", "self-influence"),
        *("similarity", "gradient dot", "TRAK", "loss, out of fold", "oracle"),
    ]
    model = runs[0].stages[0].model
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(pre.x), pre.y, reduction="none")
    torch.testing.assert_close(found["loss"], losses)
    folded = msif.out_of_fold(runs[0])
    expected = -folded[range(30), pre.y].log()
    torch.testing.assert_close(found["loss, out of fold"], expected)
    assert found["oracle"].nonzero().flatten().tolist() == truth
    like = msif.RepresentationSimilarity().fit(runs[0]).score(data()[1]).mean().values[0]
    torch.testing.assert_close(found["similarity"], -like)
    dot = msif.GradientDot().fit(runs[0]).score(data()[1]).mean().values[0]
    torch.testing.assert_close(found["gradient dot"], dot)
    several = msif.over_seeds(pipeline(), 2, progress=False)
    each = [msif.controls(run, data()[1], ["loss"])["loss"] for run in several]
    both = msif.controls(several, data()[1], ["loss"])["loss"]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    with pytest.raises(ValueError, match="needs truth="):
        msif.controls(runs[0], data()[1], ["oracle"])
    optimum = pipeline(recipe=msif.LBFGS()).fit(progress=False)
    assert "self-influence" not in msif.controls(optimum, data()[1])


def test_cleanlab_is_asked_by_name(monkeypatch):
    run = pipeline().fit(progress=False)
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    with pytest.raises(ImportError, match="pip install cleanlab"):
        msif.controls(run, data()[1], ["cleanlab"])


def test_cleanlab_finds_what_was_flipped():
    pytest.importorskip("cleanlab")
    train, test = msif.load_digits(dtype=torch.float64)
    train = train.select(range(3), n=90, seed=0)
    y = train.y.clone()
    y[:9] = (y[:9] + 1) % 3
    run = pipeline(msif.Examples(train.x, y)).fit(progress=False)
    found = msif.controls(run, test.select(range(3)), ["cleanlab", "random"])
    areas = {k: msif.detection(v, range(9), resamples=5).roc_auc for k, v in found.items()}
    assert areas["cleanlab"] > 0.9 > areas["random"]


def test_self_influence_sums_squared_gradients_along_the_run():
    recipe = msif.SGD(0.1, epochs=4, batch_size=1000, momentum=0.0)
    run = pipeline(recipe=recipe).fit(progress=False)
    scores = SelfInfluence(checkpoints=4).fit(run).score(data()[1][:2]).values
    model, pre = net(), data()[0]
    total = torch.zeros(30, dtype=torch.float64)
    for _ in range(4):  # plain gradient descent, a checkpoint after each step
        mean = 0.0
        for one in ("step", "checkpoint"):
            model.zero_grad()
            z = model(pre.x)
            if one == "step":
                decay = sum(p.square().sum() for p in model.parameters())
                (nn.functional.cross_entropy(z, pre.y) + 0.5e-2 * decay).backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.1 * p.grad
                continue
            for i in range(30):
                model.zero_grad()
                nn.functional.cross_entropy(model(pre.x[i : i + 1]), pre.y[i : i + 1]).backward()
                mean = sum(float(p.grad.square().sum()) for p in model.parameters())
                total[i] += 0.1 * mean / 30
    torch.testing.assert_close(scores, total.expand(2, -1), rtol=1e-6, atol=0)


def test_trak_by_plain_derivatives():
    run = pipeline().fit(progress=False)
    model, pre, queries = run.stages[0].model, data()[0], data()[1]
    names = list(model.parameters())

    def flat(value):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, names)])

    rows, doubts = [], []
    for x, y in zip(pre.x, pre.y, strict=True):
        p = model(x[None]).softmax(1)[0, y]
        rows.append(flat((p / (1 - p)).log()))
        doubts.append(1 - float(p.detach()))
    draw = torch.Generator().manual_seed(0)
    project = torch.randn(len(rows[0]), PROJECTION, generator=draw, dtype=torch.float64)
    features = torch.stack(rows) @ project / PROJECTION**0.5
    asked = flat(nn.functional.cross_entropy(model(queries.x), queries.y)) @ project
    gram = features.T @ features
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(PROJECTION, dtype=torch.float64)
    expected = asked / PROJECTION**0.5 @ torch.linalg.solve(gram, features.T)
    expected = expected * torch.tensor(doubts, dtype=torch.float64)
    found = trak([run], queries, aggregate="mean")[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
