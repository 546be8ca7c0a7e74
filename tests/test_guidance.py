"""Guided pretraining: derivatives at any weights, and weights that lower the loss of fresh runs."""

from dataclasses import replace

import pytest
import torch
from oracles import F64, relative_error

import msif_lab as msif

LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3), "warm": msif.WarmStart()}


def build(seed, link="warm", recipe=None, n=(60, 40)):
    """Two stages on digits, a third of whose pretraining labels are wrong."""
    train, _ = msif.load_digits(dtype=F64)
    stages = []
    for k, classes in enumerate((range(4), range(4, 7))):
        data = train.select(classes=classes, n=n[k], seed=5)
        if not k:
            wrong = torch.arange(len(data)) % 3 == 0
            data = msif.Examples(data.x, torch.where(wrong, (data.y + 1) % 4, data.y), data.ids)
        net = msif.mlp(64, (6,), classes=len(classes), seed=10 * seed + k).double()
        made = recipe or msif.SGD(0.05, epochs=4, batch_size=16, schedule="linear")
        made = replace(made, seed=10 * seed + k)
        stage = msif.Stage("pf"[k], net, data, weight_decay=1e-3, recipe=made)
        stages.append(replace(stage, link=LINKS[link] if k else None))
    return msif.Pipeline(stages)


@pytest.fixture(scope="module")
def held_out():
    held = msif.load_digits(dtype=F64)[1].select(classes=range(4, 7))
    return held[:60], held[60:]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("recipe", [None, msif.Adam(0.01, epochs=3, batch_size=16)])
def test_derivatives_at_given_weights_are_those_of_the_whole_run(link, recipe, held_out):
    pipeline, queries = build(0, link, recipe).fit(progress=False), held_out[0][:3]
    method = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
    for stage, m in enumerate((60, 40)):
        at = 2 * torch.rand(m, generator=torch.Generator().manual_seed(stage), dtype=F64)
        at[0] = 0  # a removed example has a derivative, too
        ours = method.score(queries, stage, weights=at, progress=False).values
        h, shifts = 1e-4, torch.eye(m, dtype=F64)[:4]
        ends = pipeline.retrain({stage: torch.cat([at + h * shifts, at - h * shifts])})
        plus, minus = ends.evaluate(queries).chunk(2, dim=1)
        assert relative_error(ours[:, :4], (plus - minus) / (2 * h)) < 1e-6
        elsewhere = method.score(queries, stage, progress=False).values
        assert relative_error(elsewhere[:, :4], ours[:, :4]) > 1e-2
        again = method.score(queries, stage, weights=torch.ones(m), progress=False).values
        assert relative_error(again, elsewhere) < 1e-12


def test_guided_weights_lower_the_loss_of_runs_that_they_have_not_seen(held_out):
    validation, test = held_out
    recipe = msif.SGD(0.05, epochs=8, batch_size=16, schedule="linear")

    def longer(seed):
        return build(seed, recipe=recipe, n=(120, 60))

    runs = msif.over_seeds(longer, range(4), lanes=4, progress=False)
    found = msif.guided(runs, validation, rounds=2, steps=(0.05, 0.5, 1), progress=False)
    assert found.weights.shape == (120,) and found.seeds == [0, 1, 2, 3]
    assert float(found.weights.min()) >= 0 and float(found.weights.max()) <= 4
    rounds = found.rounds
    assert list(rounds["round"]) == [0, 1, 1, 1, 2, 2, 2]
    taken = rounds[rounds.taken]
    assert (taken.loss.diff().dropna() < 0).all()
    # the smallest step does about what the derivatives promise, the largest does less
    first = rounds[rounds["round"] == 1]
    kept = (first.change / first.predicted).tolist()
    assert kept[0] > kept[-1] and kept[0] > 0.8
    # the table's losses are those of retraining
    ends = [p.retrain({0: found.weights}).evaluate(validation).mean() for p in runs.pipelines]
    assert float(torch.stack(ends).mean()) == pytest.approx(taken.loss.iloc[-1], rel=1e-9)

    fresh = msif.over_seeds(longer, range(50, 54), lanes=4, progress=False)

    def change(weights):
        ends = [p.retrain({0: weights}).evaluate(test).mean() for p in fresh.pipelines]
        kept = [p.evaluate(test).mean() for p in fresh.pipelines]
        return float((torch.stack(ends) - torch.stack(kept)).mean())

    ours = change(found.weights)
    turned = change(found.weights.roll(1))  # the same weights of other examples
    assert ours < -0.1 and turned > 0


def test_a_round_without_a_better_step_ends_the_search(held_out):
    runs = msif.over_seeds(build, range(2), progress=False)
    found = msif.guided(runs, held_out[0], rounds=5, steps=(1e3,), limit=1e6, progress=False)
    assert torch.equal(found.weights, torch.ones(60, dtype=F64))
    assert list(found.rounds["round"]) == [0, 1] and list(found.rounds.taken) == [True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"steps": ()}, r"steps=\(\) is empty"),
        ({"steps": (0.5, -1.0)}, "steps=-1.0"),
        ({"limit": 1.0}, "limit=1.0"),
        ({"stage": "other"}, "other"),
    ],
)
def test_bad_settings_are_refused(settings, words, held_out):
    runs = msif.SeedRuns([build(0).fit(progress=False)])
    with pytest.raises((ValueError, KeyError), match=words):
        msif.guided(runs, held_out[0], **settings)


def test_weights_that_fit_nothing_are_refused(held_out):
    pipeline = build(0).fit(progress=False)
    method = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
    for wrong, words in (
        (torch.ones(5), "must be 60 finite numbers"),
        (torch.full((60,), float("nan")), "must be 60 finite numbers"),
        ("ones", "weights"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            method.score(held_out[0], weights=wrong)
    other = msif.UnrolledInfluence(group_fraction=0.5).fit(pipeline, progress=False)
    with pytest.raises(ValueError, match="weights= says where"):
        other.score(held_out[0], weights=torch.ones(60))
