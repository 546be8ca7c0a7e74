"""Sign rate, sizes, tables over methods and seeds, and the noise ceiling."""

import itertools

import numpy
import pytest
import torch
from scipy import stats

import msif_lab as msif
from msif_lab.evaluation import compare

RNG = numpy.random.default_rng


def truth(values, subsets=None):
    values = torch.as_tensor(values)
    queries, removals = values.shape
    subsets = [[i] for i in range(removals)] if subsets is None else subsets
    ids = torch.arange(queries)
    return msif.Effects(
        values, subsets, torch.zeros(queries), ids, torch.zeros(removals), "s", "loss", "same-seed"
    )


def guess(removal_effects):
    values = -torch.as_tensor(removal_effects)
    return msif.Influence(values, torch.arange(values.shape[1]), torch.arange(len(values)), "s")


def world(seeds=3, queries=12, removals=30, noise=0.0):
    """Effects of several seeds around a common one."""
    rng = RNG(5)
    common = rng.normal(size=(queries, removals))
    return [common + noise * rng.normal(size=common.shape) for _ in range(seeds)]


def test_sign_rate_and_sizes():
    (actual,) = world(1)
    predicted = actual.copy()
    predicted[:, :6] *= -1  # 6 of 30 signs are wrong, the sizes are right
    report = compare(predicted, actual)
    assert report.sign == pytest.approx(numpy.full(12, 0.8))
    assert report.magnitude == pytest.approx(numpy.ones(12))
    assert report.mean("sign") == pytest.approx(0.8) and report.mean("r") < 0.8
    noisy = compare(abs(actual) + RNG(0).normal(size=actual.shape), actual)
    for q in range(12):
        expected = stats.spearmanr(abs(noisy.predicted[q]), abs(actual[q])).statistic
        assert noisy.magnitude[q] == pytest.approx(expected)


def test_effects_of_zero_have_no_sign():
    predicted = numpy.array([[1.0, -1.0, 2.0, 0.0, 3.0]])
    actual = numpy.array([[2.0, 1.0, 0.0, 5.0, 1.0]])
    assert compare(predicted, actual).sign == pytest.approx([2 / 3])


def test_predictions_of_equal_size_have_no_order_of_sizes():
    (actual,) = world(1)
    report = compare(numpy.sign(actual), actual)
    assert numpy.isnan(report.magnitude).all() and not numpy.isnan(report.r).any()
    assert report.sign == pytest.approx(numpy.ones(12))


def test_one_table_of_methods_and_removals():
    actual = world(3, noise=0.5)
    effects = {"one": [truth(a) for a in actual], "many": [truth(2 * a) for a in actual]}
    scores = {
        "perfect": [guess(a) for a in actual],
        "common": [guess(actual[0])] * 3,
        ("made for many", "many"): [guess(2 * a) for a in actual],
    }
    table = msif.compare_methods(scores, effects)
    assert list(table.columns) == ["removals", "method", "statistic", "mean", "low", "high"]
    assert len(table) == 5 * (2 + 3)
    assert set(table["statistic"]) == {"r", "rho", "slope", "sign", "magnitude"}
    rows = table.set_index(["removals", "method", "statistic"])
    assert rows.loc[("one", "perfect", "r")].tolist() == pytest.approx([1, 1, 1])
    assert rows.loc[("many", "perfect", "slope"), "mean"] == pytest.approx(2)
    assert rows.loc[("many", "made for many", "slope"), "mean"] == pytest.approx(1)
    mean, low, high = rows.loc[("one", "common", "rho")]
    by_hand = [stats.spearmanr(actual[0][q], a[q]).statistic for a in actual for q in range(12)]
    assert mean == pytest.approx(numpy.mean(by_hand)) and low < mean < high


def test_a_single_seed_needs_no_list_and_agrees_with_agreement():
    (actual,) = world(1)
    predicted = actual + RNG(1).normal(size=actual.shape)
    table = msif.compare_methods({"m": guess(predicted)}, {"one": truth(actual)}).set_index(
        "statistic"
    )
    report = msif.agreement(guess(predicted), truth(actual))
    for name in ("r", "rho", "slope", "sign", "magnitude"):
        expected = [report.mean(name), *report.intervals[name]]
        assert table.loc[name, ["mean", "low", "high"]].tolist() == pytest.approx(expected)


def test_intervals_over_seeds_hold_seeds_that_differ():
    """Seeds of sign rates 0 and 1: two say little about their mean, however many queries agree."""
    actual = world(2, queries=50)
    scores, effects = [guess(-actual[0]), guess(actual[1])], [truth(a) for a in actual]
    for runs, interval in ((2, [0.0, 1.0]), (1, [0.0, 0.0])):
        table = msif.compare_methods({"m": scores[:runs]}, {"one": effects[:runs]})
        rows = table.set_index("statistic")
        assert rows.loc["sign", ["low", "high"]].tolist() == interval, runs


def test_the_noise_ceiling_is_one_without_noise_and_falls_with_it():
    for noise, low, high in ((0.0, 1.0, 1.0), (0.5, 0.7, 0.9), (10.0, -0.1, 0.1)):
        table = msif.noise_ceiling({"one": [truth(a) for a in world(3, noise=noise)]}).set_index(
            "statistic"
        )
        assert set(table["method"]) == {"another seed"}
        assert low - 1e-9 <= table.loc["r", "mean"] <= high + 1e-9
    actual = world(3, noise=0.5)
    by_hand = [
        stats.pearsonr(one[q], other[q]).statistic
        for one, other in itertools.permutations(actual, 2)
        for q in range(12)
    ]
    table = msif.noise_ceiling({"one": [truth(a) for a in actual]}).set_index("statistic")
    assert table.loc["r", "mean"] == pytest.approx(numpy.mean(by_hand))


def test_what_cannot_be_compared_is_refused():
    a, b = world(2)
    with pytest.raises(ValueError, match=r"'m' has scores of 1 seeds, 'one' effects of 2"):
        msif.compare_methods({"m": guess(a)}, {"one": [truth(a), truth(b)]})
    for runs in (truth(a), [truth(a)]):
        with pytest.raises(ValueError, match="at least two seeds"):
            msif.noise_ceiling({"one": runs})
    other = [[i + 1] for i in range(30)]
    with pytest.raises(ValueError, match="removed different examples"):
        msif.noise_ceiling({"one": [truth(a), truth(b, other)]})
    with pytest.raises(ValueError, match="different queries"):
        msif.compare_methods({"m": guess(a[:5])}, {"one": truth(a)})


def test_random_removals():
    singles = msif.random_removals(10, 10, seed=3)
    assert sorted(i for (i,) in singles) == list(range(10))
    assert singles != [[i] for i in range(10)], "in a random order"
    groups = msif.random_removals(50, 7, fraction=0.1)
    assert len(groups) == 7
    assert all(len(set(g)) == 5 and max(g) < 50 for g in groups)
    assert msif.random_removals(50, 7, fraction=0.1) == groups
    assert msif.random_removals(50, 7, fraction=0.1, seed=1) != groups
    for bad in (
        {"m": 10, "count": 11},
        {"m": 10, "count": 3, "fraction": 0.01},
        {"m": 9, "count": 1, "fraction": 1.0},
    ):
        with pytest.raises(ValueError, match="cannot be drawn"):
            msif.random_removals(**bad)
