"""Baselines: each against its formula written out with plain autograd, and what they must not
claim.
"""

import pytest
import torch
from torch.func import functional_call

import msif_lab as msif
from msif_lab.influence.baselines import Baseline

LINKS = {"frozen": msif.Frozen(), "warm": msif.WarmStart(), "proximal": msif.Proximal(0.1)}


def blobs(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return msif.Examples(x, torch.arange(n) % classes, ids=torch.arange(n) + 100 * seed)


def net(classes, seed=0):
    return msif.mlp(5, hidden=(4,), classes=classes, seed=seed).double()


@pytest.fixture(scope="module", params=LINKS)
def pair(request):
    """A pretrained and finetuned pair trained by SGD, its examples, its queries."""
    stages = [
        msif.Stage("first", net(3), blobs(18, 3, 1), weight_decay=1e-2, recipe=msif.SGD(0.2, epochs=3, batch_size=6)),
        msif.Stage("second", net(2, 1), blobs(12, 2, 2), weight_decay=1e-2, link=LINKS[request.param],
                   recipe=msif.SGD(0.1, epochs=3, batch_size=6)),
    ]  # fmt: skip
    return msif.Pipeline(stages).fit(), blobs(4, 2, 3)


def gradient(model, examples, i, names=None, function=msif.cross_entropy):
    """∇ of one example's loss by the named parameters, flat, by plain autograd."""
    parameters = dict(model.named_parameters())
    value = function(model(examples.x[i : i + 1]), examples.y[i : i + 1])[0]
    chosen = [parameters[n] for n in names or parameters]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, chosen)])


SHARED = ["embedding.1.weight", "embedding.1.bias"]


def products(pipeline, queries, cosine=False):
    first, second = (s.model for s in pipeline.stages)
    data = pipeline.stages[0].data
    q = torch.stack([gradient(second, queries, i, SHARED) for i in range(len(queries))])
    f = torch.stack([gradient(first, data, i, SHARED) for i in range(len(data))])
    if cosine:
        return -(q / q.norm(dim=1, keepdim=True)) @ (f / f.norm(dim=1, keepdim=True)).T
    return -q @ f.T / len(data)


def test_those_from_the_pretrained_model_alone(pair):
    pipeline, queries = pair
    stage = pipeline.stages[0]
    z, y = stage.model(stage.data.x).detach(), stage.data.y
    p = z.softmax(1)
    rows = torch.arange(len(y))
    expected = {
        msif.Loss(): -p[rows, y].log(),
        msif.Entropy(): torch.distributions.Categorical(p).entropy(),
        msif.Margin(): 1 - p[rows, y] + p.scatter(1, y[:, None], 0.0).max(1).values,
        msif.GradientNorm(): torch.stack(
            [gradient(stage.model, stage.data, i).norm() for i in range(len(y))]
        ),
    }
    for baseline, values in expected.items():
        scores = baseline.fit(pipeline).score(queries)
        torch.testing.assert_close(
            scores.values, values.expand(len(queries), -1), rtol=1e-10, atol=1e-12
        )
        assert not baseline.signed and scores.stage == "first" and scores.method == repr(baseline)
        assert torch.equal(scores.ids, stage.data.ids) and torch.equal(
            scores.query_ids, queries.ids
        )


def test_gradient_products_hold_heads_fixed(pair):
    pipeline, queries = pair
    for cosine in (False, True):
        scores = msif.GradientDot(cosine=cosine).fit(pipeline).score(queries)
        torch.testing.assert_close(
            scores.values, products(pipeline, queries, cosine), rtol=1e-10, atol=1e-14
        )


def test_gradient_dot_is_the_effect_of_one_small_step():
    """The sign and the units: one step of full-batch descent of rate η is exactly η times the
    score, for small η.
    """
    data, queries, eta = blobs(12, 3, 1), blobs(3, 3, 2), 1e-6
    recipe = msif.SGD(eta, momentum=0.0, epochs=1, batch_size=12)
    pipeline = msif.Pipeline([msif.Stage("only", net(3), data, recipe=recipe)]).fit()
    scores = msif.GradientDot().fit(pipeline).score(queries)
    unrolled = msif.UnrolledInfluence().fit(pipeline).score(queries)
    torch.testing.assert_close(eta * scores.values, unrolled.values, rtol=1e-4, atol=1e-14)
    tracin = msif.TracIn(checkpoints=1).fit(pipeline).score(queries)
    torch.testing.assert_close(tracin.values, eta * scores.values, rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("checkpoints", [1, 3, 9])
def test_tracin_sums_over_the_run(pair, checkpoints):
    pipeline, queries = pair
    stage, steps = pipeline.stages[0], 9
    initial = net(3)
    theta = {n: p.detach().clone() for n, p in initial.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in theta.items()}
    second = pipeline.stages[1].model
    q = torch.stack([gradient(second, queries, i, SHARED) for i in range(len(queries))])
    expected, rates = torch.zeros(len(queries), len(stage.data), dtype=torch.float64), 0.0
    for t, (batch, rate) in enumerate(stage.recipe.steps(len(stage.data))):
        leaf = {n: p.clone().requires_grad_() for n, p in theta.items()}
        loss = msif.cross_entropy(
            functional_call(initial, leaf, (stage.data.x[batch],)), stage.data.y[batch]
        ).mean()
        loss = loss + 1e-2 / 2 * sum((p**2).sum() for p in leaf.values())
        for (n, p), g in zip(
            theta.items(), torch.autograd.grad(loss, list(leaf.values())), strict=True
        ):
            velocity[n] = 0.9 * velocity[n] + g
            theta[n] = p - rate * velocity[n]
        rates += rate
        if (t + 1) % (steps // checkpoints) == 0:
            initial.load_state_dict(theta)
            f = torch.stack(
                [gradient(initial, stage.data, i, SHARED) for i in range(len(stage.data))]
            )
            expected -= rates * q @ f.T / len(stage.data)
            rates = 0.0
    torch.testing.assert_close(
        msif.TracIn(checkpoints).fit(pipeline).score(queries).values, expected
    )


def test_tracin_of_the_last_stage_asks_its_own_checkpoints(pair):
    pipeline, queries = pair
    data = pipeline.stages[1].data
    tracin = msif.TracIn(3).fit(pipeline)
    scores = tracin.score(queries, stage="second").values
    expected = torch.zeros_like(scores)
    o = pipeline.objective(1)
    names = o.trained_names
    for full, rate in tracin._states[1]:
        model = net(2)
        model.load_state_dict(o.layout.named(full))
        q = torch.stack([gradient(model, queries, i, names) for i in range(len(queries))])
        f = torch.stack([gradient(model, data, i, names) for i in range(len(data))])
        expected -= rate * q @ f.T / len(data)
    torch.testing.assert_close(scores, expected)


def test_similarity_is_the_cosine_of_features(pair):
    pipeline, queries = pair
    stage = pipeline.stages[0]
    with torch.no_grad():
        q, f = stage.model.embedding(queries.x), stage.model.embedding(stage.data.x)
    expected = torch.nn.functional.cosine_similarity(q[:, None], f[None], dim=2)
    torch.testing.assert_close(
        msif.RepresentationSimilarity().fit(pipeline).score(queries).values, expected
    )
    inputs = msif.RepresentationSimilarity(layer="embedding.1").fit(pipeline).score(queries).values
    expected = torch.nn.functional.cosine_similarity(queries.x[:, None], stage.data.x[None], dim=2)
    torch.testing.assert_close(inputs, expected)
    assert not stage.model.head._forward_pre_hooks, "the user's module is left as it was"


def test_single_stage_influence(pair):
    pipeline, queries = pair
    for curvature in ("hessian", "ggn"):
        scores = (
            msif.SingleStage(curvature=curvature, damping=0.5).fit(pipeline).score(queries).values
        )
        operator, o, data = (
            pipeline.curvature(0, curvature),
            pipeline.objective(0),
            pipeline.stages[0].data,
        )
        inverse = torch.linalg.inv(operator.dense() + 0.5 * torch.eye(o.size, dtype=torch.float64))
        q = torch.zeros(len(queries), o.size, dtype=torch.float64)
        q[:, : o.size - 15] = torch.stack(
            [gradient(pipeline.stages[1].model, queries, i, SHARED) for i in range(len(queries))]
        )
        f = torch.stack([gradient(pipeline.stages[0].model, data, i) for i in range(len(data))])
        torch.testing.assert_close(scores, -q @ inverse @ f.T / len(data))


def test_single_stage_influence_of_one_stage_is_koh_and_liang():
    data, queries = blobs(30, 3, 1), blobs(4, 3, 2)
    stage = msif.Stage("only", msif.softmax_regression(5, 3).double(), data, weight_decay=1e-2)
    pipeline = msif.Pipeline([stage]).fit()
    one = msif.SingleStage(curvature="hessian").fit(pipeline).score(queries).values
    torch.testing.assert_close(one, msif.ImplicitInfluence().fit(pipeline).score(queries).values)


def test_random_is_seeded_and_means_nothing(pair):
    pipeline, queries = pair
    a, b, c = (msif.Random(seed).fit(pipeline).score(queries).values for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.std() > 0.5
    assert not torch.equal(a[0], a[1])


def test_every_baseline_shares_the_interface(pair):
    pipeline, queries = pair
    baselines = msif.all_baselines(msif.Exact())
    assert {type(b) for b in baselines.values()} == set(leaves(Baseline))
    for baseline in baselines.values():
        for stage, n in (("first", 18), (1, 12)):
            scores = baseline.fit(pipeline).score(queries, stage=stage, target="margin")
            assert scores.values.shape == (4, n) and scores.target == "margin"
            assert scores.values.dtype == torch.float64 and scores.method.startswith(
                type(baseline).__name__
            )
    signed = {name for name, b in baselines.items() if b.signed}
    assert signed == {"gradient dot", "gradient cosine", "TracIn", "single stage"}


def leaves(cls):
    children = cls.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [cls]


def test_misuse_is_refused(pair):
    pipeline, queries = pair
    with pytest.raises(ValueError, match=r"call fit\(pipeline\)"):
        msif.Loss().score(queries)
    with pytest.raises(TypeError, match="Pipeline"):
        msif.Loss().fit(pipeline.stages[0])
    with pytest.raises(ValueError, match="checkpoints=0"):
        msif.TracIn(0)
    with pytest.raises(ValueError, match="damping=-1"):
        msif.SingleStage(damping=-1)
    with pytest.raises(ValueError, match="'nose' is no module"):
        msif.RepresentationSimilarity("nose").fit(pipeline).score(queries)
    with pytest.raises(ValueError, match="not trained"):
        msif.Entropy().fit(msif.Pipeline([msif.Stage("s", net(3), blobs(9, 3, 0))]))


def test_tracin_needs_a_run():
    pipeline = msif.Pipeline([msif.Stage("s", net(3), blobs(9, 3, 0), weight_decay=0.1)]).fit()
    with pytest.raises(ValueError, match="LBFGS"):
        msif.TracIn().fit(pipeline)


def test_changed_weights_are_noticed(pair):
    pipeline, queries = pair
    baseline = msif.Loss().fit(pipeline)
    weight = pipeline.stages[0].model.head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight += 1
        with pytest.raises(ValueError, match="changed since"):
            baseline.score(queries)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_regression_has_no_classes():
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(5, 1)).double()
    data = msif.Examples(x, x[:, :1].clone())
    stage = msif.Stage("s", model, data, loss=msif.mean_squared_error, weight_decay=0.1)
    pipeline = msif.Pipeline([stage]).fit()
    for baseline in (msif.Entropy(), msif.Margin()):
        with pytest.raises(ValueError, match="class"):
            baseline.fit(pipeline).score(data[:2])
    assert msif.Loss().fit(pipeline).score(data[:2]).values.shape == (2, 9)
    with pytest.raises(ValueError, match=r"layer='head' is no module"):
        msif.RepresentationSimilarity().fit(pipeline).score(data[:2])
