"""Scores for random groups against the best linear predictor, found by retraining every subset."""

import itertools

import pytest
import torch

import msif_lab as msif

F64 = torch.float64
M = 7  # examples: all 2⁷ removals are retrained


def quadratic_run(seed):
    """Linear regression, two steps of plain gradient descent, and a query's output.

    The first step is linear in the weights and the second is bilinear in weights and parameters,
    so the output is a quadratic in the weights, and not a linear one.
    """
    draw = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(M, 3, generator=draw, dtype=F64),
        torch.randn(M, 1, generator=draw, dtype=F64),
    )
    recipe = msif.SGD(lr=0.4, momentum=0.0, epochs=2, batch_size=M)
    model = msif.softmax_regression(3, 1, seed=seed).double()
    stage = msif.Stage("fit", model, msif.Examples(x, y), msif.mean_squared_error, recipe=recipe)
    queries = msif.Examples(torch.randn(4, 3, generator=draw, dtype=F64), y[:4])
    return msif.Pipeline([stage]).fit(progress=False), queries


def best_linear_predictor(pipeline, queries, p):
    """Least squares over all removals, where every example goes with probability p.

    Returns:
        scores (Q, M), so that −Σ of a group's scores, and a constant, predict the change of q.
    """
    removed = torch.tensor(list(itertools.product((0.0, 1.0), repeat=M)), dtype=F64)
    q = pipeline.retrain(1 - removed, progress=False).evaluate(queries, "output")  # (Q, 2^M)
    likely = torch.where(removed == 1, p, 1 - p).prod(1)
    x = torch.cat([torch.ones(len(removed), 1, dtype=F64), -removed], 1)
    normal = x.T @ (likely[:, None] * x)
    return torch.linalg.solve(normal, x.T @ (likely * q).T)[1:].T


def apart(scores, best):
    """Relative distance but for the level that all scores of a query share, which is set apart."""
    a, b = (s - s.mean(1, keepdim=True) for s in (scores, best))
    return float((a - b).norm() / b.norm())


def score(pipeline, queries, **settings):
    attributor = msif.UnrolledInfluence(**settings).fit(pipeline, progress=False)
    return attributor.score(queries, target="output", progress=False).values


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7])
def test_half_the_diagonal_makes_the_mean_gradient_the_best_linear_predictor(p):
    pipeline, queries = quadratic_run(seed=0)
    best = best_linear_predictor(pipeline, queries, p)
    gradient = score(pipeline, queries, group_fraction=p)
    corrected = score(pipeline, queries, group_fraction=p, leave_one_out=True, probes=4096)
    assert apart(corrected, best) < 0.1 * apart(gradient, best)
    assert apart(gradient, best) > 0.1  # negative control: without it the claim would be false


def test_at_one_half_the_mean_gradient_is_the_best_linear_predictor():
    pipeline, queries = quadratic_run(seed=1)
    best = best_linear_predictor(pipeline, queries, 0.5)
    gradient = score(pipeline, queries, group_fraction=0.5)
    assert apart(gradient, best) < 1e-9
    assert torch.equal(gradient, score(pipeline, queries, group_fraction=0.5, leave_one_out=True))


def test_settings_changed_between_two_calls_take_effect():
    """The runs that are kept belong to the settings they were made with."""
    pipeline, queries = quadratic_run(seed=3)
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    for settings in (
        {},
        {"group_fraction": 0.3},
        {"group_fraction": 0.2},
        {"leave_one_out": True},
        {"leave_one_out": True, "probes": 8},
    ):
        plain = {"group_fraction": 0.0, "leave_one_out": False, "probes": 32}
        for name, value in (plain | settings).items():
            setattr(attributor, name, value)
        changed = attributor.score(queries, target="output", progress=False).values
        assert torch.equal(changed, score(pipeline, queries, **settings)), settings


def test_where_nothing_is_corrected_no_memory_is_kept_for_it():
    pipeline, _ = quadratic_run(seed=4)
    settings = {"group_fraction": 0.5, "memory": "4KB"}
    plain = msif.UnrolledInfluence(**settings).plan(pipeline, 1)
    asked = msif.UnrolledInfluence(**settings, leave_one_out=True).plan(pipeline, 1)
    assert asked.stored == plain.stored
    with pytest.raises(msif.MemoryBudgetError):
        msif.UnrolledInfluence(memory="4KB", leave_one_out=True).plan(pipeline, 1)


def test_the_level_of_the_scores_is_that_of_the_average_removal():
    """−p Σ of all scores is the change of q at the mean weights, with the diagonal or without."""
    pipeline, queries = quadratic_run(seed=2)
    p = 0.3
    mean = pipeline.retrain(torch.full((M,), 1 - p, dtype=F64), progress=False)
    change = (mean.evaluate(queries, "output") - pipeline.evaluate(queries, "output")[:, None])[
        :, 0
    ]
    for settings in ({}, {"leave_one_out": True}):
        scores = score(pipeline, queries, group_fraction=p, **settings)
        assert torch.allclose(-p * scores.sum(1), change, atol=1e-12)
