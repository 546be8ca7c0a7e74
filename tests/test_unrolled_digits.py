"""Unrolled predictions against real two-stage retraining of SGD-trained nets on digits."""

import numpy
import pytest
import torch

import msif_lab as msif

LINKS = {"frozen": msif.Frozen(), "warm": msif.WarmStart()}


def sgd_pipeline(digits, link, seed, net, epochs):
    """Pretrain on 400 of the digits 0-3, finetune on 200 of 4-9 from a head at zero; 20 queries."""
    train, test = digits
    stages = []
    tasks = ("pretrain", range(4), 400), ("finetune", range(4, 10), 200)
    for k, (name, classes, n) in enumerate(tasks):
        recipe = msif.SGD(
            0.1, epochs=epochs, batch_size=50, schedule="linear", warmup=20, seed=2 * seed + k
        )
        model = net(len(classes), seed=seed, zero_head=k == 1)
        data = train.select(classes=classes, n=n, seed=seed)
        settings = {"weight_decay": 1e-3, "recipe": recipe, "link": link if k else None}
        stages.append(msif.Stage(name, model, data, **settings))
    queries = test.select(classes=range(4, 10), n=20, seed=seed)
    return msif.Pipeline(stages).fit(progress=False), queries


def mlp(classes, **settings):
    return msif.mlp(64, hidden=(16,), classes=classes, **settings).double()


def convnet(classes, **settings):
    return msif.convnet((1, 8, 8), channels=(4, 8), width=16, classes=classes, **settings).double()


def removals(seed, size, m=400):
    generator = torch.Generator().manual_seed(seed)
    if size == 1:
        return [[int(i)] for i in torch.randperm(m, generator=generator)[:40]]
    return [torch.randperm(m, generator=generator)[:size].tolist() for _ in range(40)]


def agreements(digits, net, link, seeds, epochs=10):
    """Per size of removal and method, ``(seeds, 2)``: mean per-query r, and slope."""
    found = {}
    for seed in seeds:
        pipeline, queries = sgd_pipeline(digits, LINKS[link], seed, net, epochs)
        scores = msif.UnrolledInfluence().fit(pipeline).score(queries, progress=False)
        group = msif.UnrolledInfluence(group_fraction=0.1).fit(pipeline)
        group = group.score(queries, progress=False)
        for size in (1, 8, 40):
            effects = msif.removal_effects(
                pipeline, queries, removals(seed, size), lanes=40, progress=False
            )
            for name, values in {"unrolled": scores, "group": group}.items():
                report = msif.agreement(values, effects)
                found.setdefault((size, name), []).append((report.mean("r"), report.mean("slope")))
    found = {key: numpy.array(pairs) for key, pairs in found.items()}
    for key, pairs in found.items():
        print(
            net.__name__,
            link,
            *key,
            "r, slope per seed:",
            *(f"{r:.3f}, {s:.2f};" for r, s in pairs),
        )
    return found


@pytest.mark.parametrize("link", LINKS)
def test_mlp_agrees_with_retraining(digits, link):
    found = agreements(digits, mlp, link, seeds=(0, 1, 2), epochs=8)
    assert found[1, "unrolled"][:, 0].mean() >= 0.97
    assert 0.8 <= found[1, "unrolled"][:, 1].mean() <= 1.25
    assert found[8, "unrolled"][:, 0].mean() >= 0.93
    assert found[40, "unrolled"][:, 0].mean() >= 0.80
    assert (found[40, "group"][:, 0] > found[40, "unrolled"][:, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("link", LINKS)
def test_conv_net_agrees_with_retraining(digits, link):
    found = agreements(digits, convnet, link, seeds=(0,), epochs=15)
    assert found[1, "unrolled"][:, 0].mean() >= 0.97
    assert 0.8 <= found[1, "unrolled"][:, 1].mean() <= 1.25
    assert found[8, "unrolled"][:, 0].mean() >= 0.93
    assert found[40, "unrolled"][:, 0].mean() >= 0.80


def test_longer_training_bends_and_leave_one_out_follows(digits):
    """After 15 epochs single removals are large steps: the slope is off, and is corrected."""
    pipeline, queries = sgd_pipeline(digits, LINKS["frozen"], 2, mlp, epochs=15)
    effects = msif.removal_effects(pipeline, queries, removals(2, 1), lanes=40, progress=False)

    def compared(leave_one_out):
        attributor = msif.UnrolledInfluence(leave_one_out=leave_one_out).fit(pipeline)
        return msif.agreement(attributor.score(queries, progress=False), effects)

    plain, corrected = compared(False), compared(True)
    for report in (plain, corrected):
        print(f"slope {report.mean('slope'):.2f}, r {report.mean():.3f}")
    assert plain.mean("slope") > 1.25
    assert 0.85 <= corrected.mean("slope") <= 1.2
    assert corrected.mean() > plain.mean() + 0.02


def test_implicit_influence_is_lost_on_a_run_that_stopped_early(digits):
    """Why runs are unrolled: on the same weights the classic formula predicts next to nothing."""
    pipeline, queries = sgd_pipeline(digits, LINKS["frozen"], 0, mlp, epochs=8)
    effects = msif.removal_effects(pipeline, queries, removals(0, 1), lanes=40, progress=False)
    with pytest.warns(msif.ConvergenceWarning, match="not at a stationary point"):
        classic = msif.ImplicitInfluence(curvature="ggn").fit(pipeline).score(queries)
    unrolled = msif.UnrolledInfluence().fit(pipeline).score(queries)
    lost, found = (msif.agreement(scores, effects).mean() for scores in (classic, unrolled))
    print(f"implicit {lost:.2f}, unrolled {found:.3f}")
    assert lost < 0.6 < 0.97 < found
