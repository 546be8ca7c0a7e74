"""The most influential subset: its derivatives, its order, the true best subset, bad arguments."""

import itertools

import pytest
import torch
from oracles import (
    ALL_LINKS,
    F64,
    draw,
    random_pipeline,
    random_queries,
    relative_error,
    same,
    states,
)

import msif_lab as msif
from msif_lab.influence.subsets import RunUnderWeights
from msif_lab.objective.checks import ask

RECIPES = {
    "momentum": msif.SGD(lr=0.1, epochs=3, batch_size=7, seed=3, schedule="linear"),
    "adam": msif.Adam(lr=0.02, epochs=3, batch_size=7),
}


def trained(recipe="momentum", link="warm"):
    return random_pipeline(link=ALL_LINKS[link], recipe=RECIPES[recipe])


def choose(pipeline, queries, k, **settings):
    return msif.most_influential(pipeline, queries, k, progress=False, **settings)


def mean_scores(pipeline, queries, stage=0):
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    return attributor.score(queries, stage=stage, aggregate="mean", progress=False).values[0]


def removed(pipeline, queries, groups, stage=0):
    """The change of the mean query, by `removal_effects`."""
    effects = msif.removal_effects(
        pipeline, queries, groups, stage=stage, aggregate="mean", progress=False
    )
    return effects.values[0]


# ---- The derivative without the examples that are out ----


def differences_at(pipeline, queries, stage, weights, step=1e-3):
    """``∂q/∂w`` (Q, N) at these weights, by fourth-order differences of reruns."""
    m = len(weights)
    offsets = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=F64)
    moved = weights + step * offsets[:, None, None] * torch.eye(m, dtype=F64)
    q = pipeline.retrain({stage: moved.reshape(-1, m)}, progress=False).evaluate(queries)
    factors = torch.tensor([2 / 3, -2 / 3, -1 / 12, 1 / 12], dtype=F64)
    return torch.einsum("qon,o->qn", q.reshape(len(queries), 4, m), factors) / step


@pytest.mark.parametrize("link", ALL_LINKS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", [0, 1])
def test_the_derivative_without_some_examples_equals_differences_of_the_run(recipe, link, stage):
    """Of examples of weight 0 too; that with all of them in, the control, must be far off."""
    pipeline = trained(recipe, link)
    queries, m = random_queries(pipeline), len(pipeline.stages[stage].data)
    weights = torch.ones(m, dtype=F64)
    weights[[0, 2, 5, 11, 14]] = 0
    truths = [differences_at(pipeline, queries, stage, weights, h) for h in (1e-3, 1e-4)]
    question = ask(pipeline.objective(-1), queries, "loss", derivative=True)
    attributor = RunUnderWeights().fit(pipeline, progress=False)
    values, change = attributor.at(question, stage, weights)
    assert min(relative_error(values, truth) for truth in truths) <= 1e-6
    at_one = attributor.score(queries, stage=stage, progress=False).values
    assert min(relative_error(at_one, truth) for truth in truths) > 1e-2
    again = pipeline.retrain({stage: weights}, progress=False).evaluate(queries)[:, 0]
    assert relative_error(change, again - pipeline.evaluate(queries)) <= 1e-9


# ---- The choice ----


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("stage", [0, "stage1"])
def test_one_round_is_the_plain_list(raises, stage):
    pipeline = trained()
    queries = random_queries(pipeline)
    scores = mean_scores(pipeline, queries, stage)
    expected = scores.topk(4, largest=not raises).indices.tolist()
    subset = choose(pipeline, queries, 4, stage=stage, raises=raises, rounds=1)
    assert subset.positions == subset.plain == expected
    assert subset.effect == subset.plain_effect
    assert subset.ids.tolist() == pipeline.stages[pipeline.index(stage)].data.ids[expected].tolist()
    assert subset.predicted == pytest.approx(-float(scores[expected].sum()), rel=1e-12)
    assert len(subset.rounds) == 1 and len(subset) == 4


def test_each_round_takes_the_first_by_the_derivative_without_those_before():
    pipeline = trained("adam")
    queries = random_queries(pipeline)
    subset = choose(pipeline, queries, 5, rounds=3)
    out = []
    for record, count in zip(subset.rounds, (2, 1, 2), strict=True):
        weights = torch.ones(24, dtype=F64)
        weights[out] = 0
        slopes = differences_at(pipeline, queries, 0, weights).mean(0)
        slopes[out] = torch.inf
        assert record.added == slopes.topk(count, largest=False).indices.tolist()
        assert record.predicted == pytest.approx(-float(slopes[record.added].sum()), rel=1e-5)
        out += record.added
        assert record.effect == pytest.approx(float(removed(pipeline, queries, [out])[0]), abs=1e-9)
    assert len(set(out)) == 5


@pytest.mark.parametrize("raises", [True, False])
def test_effects_are_those_of_real_removals_and_never_less_than_the_plain_list(raises):
    pipeline = trained()
    queries, before = random_queries(pipeline), states(pipeline)
    for k in (1, 4, 9):
        subset = choose(pipeline, queries, k, raises=raises)
        truth = removed(pipeline, queries, [subset.positions, subset.plain])
        assert [subset.effect, subset.plain_effect] == pytest.approx(truth.tolist(), abs=1e-9)
        gain = subset.effect - subset.plain_effect
        assert (gain if raises else -gain) >= 0
        assert len(set(subset.positions)) == k == len(subset)
    assert same(before, states(pipeline))


def test_one_weighting_of_the_queries_and_other_targets():
    pipeline = trained()
    queries = random_queries(pipeline)
    first = choose(pipeline, queries, 3, aggregate=[1.0, 0, 0, 0, 0], target="margin")
    alone = choose(pipeline, queries[:1], 3, aggregate=None, target="margin")
    assert first.positions == alone.positions
    assert first.effect == pytest.approx(alone.effect, rel=1e-9)
    assert "margin" in repr(first) and "raises" in repr(first)


def test_a_small_budget_changes_nothing():
    pipeline = trained()
    queries = random_queries(pipeline)
    small = msif.UnrolledInfluence(segments=4)
    assert choose(pipeline, queries, 6, method=small).positions == (
        choose(pipeline, queries, 6).positions
    )
    with pytest.raises(msif.MemoryBudgetError):
        choose(pipeline, queries, 6, method=msif.UnrolledInfluence(memory="1KB"))


# ---- Where the best subset is known ----


def regression(seed, twins=True):
    """Ridge regression on 14 points, trained to convergence; with twins, some points come in pairs.

    A pair that lies far out keeps its pull when only one of it has gone, so effects do not add up.
    """
    x, noise = draw(14, 2, seed=seed), draw(14, 1, seed=100 + seed)
    if twins:
        x[1:6:2] = x[0:6:2] * 1.05
        noise[1:6:2] = noise[0:6:2] * 0.95
        x[:6] *= 2
    data = msif.Examples(x, x.sum(1, keepdim=True) + noise)
    recipe = msif.SGD(lr=0.1, momentum=0.9, epochs=150, batch_size=14)
    model = msif.softmax_regression(2, 1, seed=0).double()
    stage = msif.Stage("fit", model, data, msif.mean_squared_error, 1e-2, recipe=recipe)
    queries = msif.Examples(draw(3, 2, seed=200 + seed), draw(3, 1, seed=300 + seed))
    return msif.Pipeline([stage]).fit(progress=False), queries


def exact_effects(pipeline, queries, groups):
    """The change of the mean query at the minimum without each group, by the normal equations."""
    data, ridge = pipeline.stages[0].data, pipeline.stages[0].weight_decay
    x, q = (torch.cat([e.x, torch.ones(len(e.x), 1, dtype=F64)], 1) for e in (data, queries))
    weights = torch.ones(len(groups) + 1, len(x), dtype=F64)
    for row, group in enumerate(groups):
        weights[row + 1, group] = 0
    normal = 2 * torch.einsum("rn,ni,nj->rij", weights, x, x) / len(x)
    right = 2 * torch.einsum("rn,ni,no->rio", weights, x, data.y) / len(x)
    theta = torch.linalg.solve(normal + ridge * torch.eye(x.shape[1], dtype=F64), right)
    losses = (q @ theta - queries.y).square().mean((1, 2))
    return losses[1:] - losses[0]


def shares_of_the_best(seed, k=3):
    """Effects of the plain list, of the greedy choice and of the answer, as shares of the best."""
    pipeline, queries = regression(seed)
    subset = choose(pipeline, queries, k, rounds=k)
    every = [list(group) for group in itertools.combinations(range(14), k)]
    best = float(exact_effects(pipeline, queries, every).max())
    exact = exact_effects(pipeline, queries, [subset.positions])
    assert subset.effect == pytest.approx(float(exact), rel=1e-2)
    return subset.plain_effect / best, subset.rounds[-1].effect / best, subset.effect / best


def test_of_least_squares_the_best_subset_by_brute_force():
    """Of all 364 subsets, exactly: new scores find more of the best effect than sums."""
    shares = torch.tensor([shares_of_the_best(seed) for seed in range(4)])
    plain, greedy, chosen = shares.mean(0).tolist()
    assert float(shares.max()) <= 1.01
    assert chosen >= greedy > plain + 0.05
    assert chosen > 0.9 > plain  # a plain list that were best too would show nothing


# ---- Bad arguments ----


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"k": 0}, ValueError, "k=0.*24"),
        ({"k": 24}, ValueError, "k=24.*24 examples of stage 'stage0'"),
        ({"k": 2.5}, TypeError, "k=2.5"),
        ({"k": True}, TypeError, "k=True"),
        ({"rounds": 0}, ValueError, "rounds=0"),
        ({"rounds": "8"}, TypeError, "rounds='8'"),
        ({"raises": "lower"}, TypeError, "raises='lower'"),
        ({"stage": "third"}, ValueError, "third"),
        ({"aggregate": None}, ValueError, "aggregate=None.*5 numbers.*aggregate='mean'"),
        ({"aggregate": "median"}, ValueError, "aggregate='median'"),
        ({"target": "accuracy"}, ValueError, "accuracy"),
        ({"method": msif.ImplicitInfluence()}, TypeError, "method=ImplicitInfluence"),
        ({"method": msif.UnrolledInfluence(group_fraction=0.1)}, ValueError, "method=.*group_f"),
        ({"method": msif.UnrolledInfluence(leave_one_out=True)}, ValueError, "method=.*leave_one"),
    ],
)
def test_bad_arguments_are_named(settings, error, words):
    pipeline = trained()
    arguments = {"k": 3} | settings
    with pytest.raises(error, match=f"(?s){words}"):
        choose(pipeline, random_queries(pipeline), **arguments)


def test_pipelines_without_a_run_are_refused():
    optimum = random_pipeline(link=ALL_LINKS["proximal"])
    with pytest.raises(ValueError, match=r"'stage0' was trained by LBFGS.*ImplicitInfluence"):
        choose(optimum, random_queries(optimum), 3)
    adopted = trained().adopt()
    with pytest.raises(ValueError, match="adopted"):
        choose(adopted, random_queries(adopted), 3)
    with pytest.raises(TypeError, match="pipeline"):
        choose("run", random_queries(adopted), 3)
