"""The study of averages: datamodels against explicit regression, and the table of a small run."""

import numpy
import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab import lds
from msif_lab.evaluation.removals import random_removals
from msif_lab.experiments import Experiment

COUNT = 24


def experiment(link, size: str = "live", seed: int = 0) -> Experiment:
    """Digits in two stages, small enough to be retrained hundreds of times."""
    train, test = msif.load_digits(dtype=torch.float64)
    pre, fine = train.select(range(3), n=COUNT, seed=0), train.select((3, 4), n=20, seed=0)
    queries = test.select((3, 4), n=6, seed=0)

    def stage(name, data, k, link=None):
        net = msif.mlp(64, (6,), classes=len(data.classes), seed=seed, activation=nn.Tanh)
        recipe = msif.SGD(0.1, epochs=3, batch_size=8, seed=seed)
        return msif.Stage(name, net.double(), data, weight_decay=1e-2, link=link, recipe=recipe)

    stages = [stage("pre", pre, 0), stage("fine", fine, 1, link)]
    return Experiment("small", msif.Pipeline(stages), queries, test)


QUERIES = experiment(msif.WarmStart()).queries


@pytest.fixture(scope="module")
def runs():
    return msif.over_seeds(lambda seed: experiment(msif.WarmStart(), seed=seed).pipeline, 2)


def halves(runs, count):
    """Weights ``(R, N)`` without random halves, and the query losses they lead to, by run."""
    found = []
    for seed, run in zip(runs.seeds, runs, strict=True):
        weights = torch.ones(count, COUNT, dtype=torch.float64)
        for row, group in enumerate(random_removals(COUNT, count, 0.5, seed=1000 + seed)):
            weights[row, group] = 0
        retrained = run.retrain(weights, progress=False)
        found.append((weights, retrained.evaluate(QUERIES).T))
    return found


def by_leaving_out(x, y, ridge):
    """Ridge regression without intercept, and its error on each row that it has not seen."""

    def fit(x, y):
        return numpy.linalg.solve(x.T @ x + ridge * numpy.eye(x.shape[1]), x.T @ y)

    rows = numpy.arange(len(x))
    errors = [float(y[i] - x[i] @ fit(x[rows != i], y[rows != i])) for i in rows]
    return fit(x, y), numpy.square(errors).mean()


def test_a_datamodel_is_the_ridge_regression_that_predicts_retrainings_left_out(runs):
    found = lds.datamodel(runs, QUERIES, 16)
    assert found.shape == (len(QUERIES), COUNT)
    parts = halves(runs, 8)
    x = torch.cat([weights - 0.5 for weights, _ in parts]).numpy()
    y = torch.cat([losses - losses.mean(0) for _, losses in parts]).numpy()
    for q in range(len(QUERIES)):
        tried = [by_leaving_out(x, y[:, q], ridge) for ridge in lds.RIDGES]
        best = min(tried, key=lambda pair: pair[1])[0]
        numpy.testing.assert_allclose(found[q].numpy(), best, rtol=1e-6, atol=1e-10)


def test_a_datamodel_of_many_retrainings_finds_single_removals(runs):
    truth = msif.removal_effects(runs, QUERIES, [[i] for i in range(COUNT)], progress=False)
    found = lds.datamodel(runs, QUERIES, 400)

    def r(scores):
        # A positive score raises the loss, so that removing the example lowers it.
        pairs = zip(scores, -truth.values, strict=True)
        return numpy.mean([numpy.corrcoef(a, b)[0, 1] for a, b in pairs])

    assert r(found) > 0.5
    assert r(found.roll(1, 1)) < 0.25, "scores of other examples are no datamodel"


def test_the_table_of_a_small_study(monkeypatch, tmp_path):
    pandas = pytest.importorskip("pandas")
    monkeypatch.setitem(lds.SETTINGS, "digits", experiment)
    for name, value in {"COUNTS": (1, 2), "ENSEMBLE": 2, "RETRAININGS": (8, 16)}.items():
        monkeypatch.setattr(lds, name, value)
    command = ["digits", "--links", "warm start", "--removals", "12", "--fresh", "2"]
    lds.main([*command, "--out", str(tmp_path)])
    table = pandas.read_csv(tmp_path / "digits_average.csv")
    assert set(table.removals) == set(lds.KINDS) and set(table.fresh) == {2}
    ours = table.set_index(["removals", "method"]).loc["one"]
    assert float(ours.efficiency["unrolled, 2 seeds"]) == pytest.approx(1, abs=0.1)
    assert float(ours.r["unrolled, 2 seeds"]) > float(ours.r["similarity"])
    # The folder keeps what was retrained: another look at more fresh seeds goes on from it.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("seed-*-removals.safetensors")}
    lds.main([*command[:-1], "3", "--out", str(tmp_path)])
    kept = {p: p.stat().st_mtime_ns for p in before}
    assert kept == before and set(pandas.read_csv(tmp_path / "digits_average.csv").fresh) == {3}
