"""Baselines: each against its formula by plain autograd, and what they must not claim."""

import copy
import inspect
import warnings

import pytest
import torch
from oracles import ALL_LINKS, Oracle, attributes, flat, implicit_scores
from torch.func import functional_call

import msif_lab as msif
from msif_lab.influence import Baseline

SHARED = ["embedding.1.weight", "embedding.1.bias"]


def blobs(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return msif.Examples(x, torch.arange(n) % classes, ids=torch.arange(n) + 100 * seed)


def net(classes, seed=0):
    return msif.mlp(5, hidden=(4,), classes=classes, seed=seed).double()


def make_pair(link, epochs=3):
    """A pretrained and finetuned pair; ``epochs`` are those of the finetuning."""
    stages = [
        msif.Stage(
            "first",
            net(3),
            blobs(18, 3, 1),
            weight_decay=1e-2,
            recipe=msif.SGD(0.2, epochs=3, batch_size=6),
        ),
        msif.Stage(
            "second",
            net(2, 1),
            blobs(12, 2, 2),
            weight_decay=1e-2,
            link=ALL_LINKS[link],
            recipe=msif.SGD(0.1, epochs=epochs, batch_size=6),
        ),
    ]
    return msif.Pipeline(stages).fit(progress=False)


@pytest.fixture(scope="module")
def pairs():
    """A pair trained by SGD for every link; they share the first stage."""
    return {link: make_pair(link) for link in ALL_LINKS}


@pytest.fixture
def pair(pairs):
    return pairs["warm"], blobs(4, 2, 3)


def gradient(model, examples, i, names=None, function=msif.cross_entropy):
    """∇ of one example's loss by the named parameters, flat, by plain autograd."""
    parameters = dict(model.named_parameters())
    value = function(model(examples.x[i : i + 1]), examples.y[i : i + 1])[0]
    chosen = [parameters[n] for n in names or parameters]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, chosen)])


def gradients(model, examples, names=None):
    return torch.stack([gradient(model, examples, i, names) for i in range(len(examples))])


def products(pipeline, queries, cosine=False):
    first, second = (s.model for s in pipeline.stages)
    data = pipeline.stages[0].data
    q = gradients(second, queries, SHARED)
    f = gradients(first, data, SHARED)
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
        msif.GradientNorm(): gradients(stage.model, stage.data).norm(dim=1),
    }
    for baseline, values in expected.items():
        scores = baseline.fit(pipeline).score(queries)
        torch.testing.assert_close(
            scores.values, values.expand(len(queries), -1), rtol=1e-10, atol=1e-12
        )
        assert not baseline.signed, baseline
        assert (scores.stage, scores.method) == ("first", repr(baseline))
        assert torch.equal(scores.ids, stage.data.ids)
        assert torch.equal(scores.query_ids, queries.ids)


@pytest.mark.parametrize("link", ALL_LINKS)
def test_gradient_products_hold_heads_fixed(pairs, link):
    pipeline, queries = pairs[link], blobs(4, 2, 3)
    for cosine in (False, True):
        scores = msif.GradientDot(cosine=cosine).fit(pipeline).score(queries)
        torch.testing.assert_close(
            scores.values, products(pipeline, queries, cosine), rtol=1e-10, atol=1e-14
        )


def test_gradient_dot_is_the_effect_of_one_small_step():
    """Sign and units: one small step of gradient descent changes q by its rate times the score."""
    data, queries, eta = blobs(12, 3, 1), blobs(3, 3, 2), 1e-6
    recipe = msif.SGD(eta, momentum=0.0, epochs=1, batch_size=12)
    pipeline = msif.Pipeline([msif.Stage("only", net(3), data, recipe=recipe)]).fit()
    scores = msif.GradientDot().fit(pipeline).score(queries)
    unrolled = msif.UnrolledInfluence().fit(pipeline).score(queries)
    torch.testing.assert_close(eta * scores.values, unrolled.values, rtol=1e-4, atol=1e-14)
    tracin = msif.TracIn(checkpoints=1).fit(pipeline).score(queries)
    torch.testing.assert_close(tracin.values, eta * scores.values, rtol=1e-10, atol=1e-18)


def test_tracin_sums_over_the_run(pair):
    """The run replayed in plain PyTorch: momentum and penalty, checkpoints at equal distances."""
    pipeline, queries = pair
    stage, steps = pipeline.stages[0], 9
    q = gradients(pipeline.stages[1].model, queries, SHARED)
    for checkpoints in (1, 3, 9):
        model = net(3)
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        velocity = {n: torch.zeros_like(p) for n, p in theta.items()}
        expected, rates = torch.zeros(len(queries), len(stage.data), dtype=torch.float64), 0.0
        for t, (batch, rate) in enumerate(stage.recipe.steps(len(stage.data))):
            leaf = {n: p.clone().requires_grad_() for n, p in theta.items()}
            outputs = functional_call(model, leaf, (stage.data.x[batch],))
            loss = msif.cross_entropy(outputs, stage.data.y[batch]).mean()
            loss = loss + 1e-2 / 2 * sum((p**2).sum() for p in leaf.values())
            slopes = torch.autograd.grad(loss, list(leaf.values()))
            for name, slope in zip(leaf, slopes, strict=True):
                velocity[name] = 0.9 * velocity[name] + slope
                theta[name] = theta[name] - rate * velocity[name]
            rates += rate
            if (t + 1) % (steps // checkpoints) == 0:
                model.load_state_dict(theta)
                expected -= rates * q @ gradients(model, stage.data, SHARED).T / len(stage.data)
                rates = 0.0
        scores = msif.TracIn(checkpoints).fit(pipeline).score(queries).values
        torch.testing.assert_close(scores, expected, msg=f"{checkpoints} checkpoints")


@pytest.mark.parametrize("link", ALL_LINKS)
def test_tracin_of_the_last_stage_asks_its_own_checkpoints(pairs, link):
    """Queries and examples at the same weights, which runs of fewer epochs end with."""
    queries = blobs(4, 2, 3)
    expected = 0.0
    for epochs in (1, 2, 3):
        stage = make_pair(link, epochs).stages[1]
        names = [n for n in dict(stage.model.named_parameters()) if "head" in n or link != "frozen"]
        q, f = (gradients(stage.model, asked, names) for asked in (queries, stage.data))
        expected = expected - 2 * 0.1 * q @ f.T / 12  # two steps of rate 0.1 an epoch
    scores = msif.TracIn(3).fit(pairs[link]).score(queries, stage="second").values
    torch.testing.assert_close(scores, expected)


def test_similarity_is_the_cosine_of_features(pair):
    pipeline, queries = pair
    stage = pipeline.stages[0]
    untouched = attributes(stage.model)
    with torch.no_grad():
        q, f = stage.model.embedding(queries.x), stage.model.embedding(stage.data.x)
    expected = torch.nn.functional.cosine_similarity(q[:, None], f[None], dim=2)
    torch.testing.assert_close(
        msif.RepresentationSimilarity().fit(pipeline).score(queries).values, expected
    )
    inputs = msif.RepresentationSimilarity(layer="embedding.1").fit(pipeline).score(queries).values
    expected = torch.nn.functional.cosine_similarity(queries.x[:, None], stage.data.x[None], dim=2)
    torch.testing.assert_close(inputs, expected)
    assert attributes(stage.model) == untouched, "a hook was left behind"


def test_single_stage_influence(pair):
    pipeline, queries = pair
    first, data = pipeline.stages[0].model, pipeline.stages[0].data
    f = gradients(first, data)
    q = torch.zeros(len(queries), f.shape[1], dtype=torch.float64)
    q[:, :-15] = gradients(pipeline.stages[1].model, queries, SHARED)  # all but the head
    oracle = Oracle(pipeline.objective(0), flat(first))
    for curvature, matrix in (("hessian", oracle.hessian()), ("ggn", oracle.ggn())):
        damped = matrix + 0.5 * torch.eye(len(matrix), dtype=torch.float64)
        expected = -q @ torch.linalg.solve(damped, f.T) / len(data)
        single = msif.SingleStage(curvature=curvature, damping=0.5).fit(pipeline)
        torch.testing.assert_close(single.score(queries).values, expected, msg=curvature)


def test_single_stage_influence_of_one_stage_is_koh_and_liang():
    data, queries = blobs(30, 3, 1), blobs(4, 3, 2)
    stage = msif.Stage("only", msif.softmax_regression(5, 3).double(), data, weight_decay=1e-2)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    one = msif.SingleStage(curvature="hessian").fit(pipeline).score(queries).values
    torch.testing.assert_close(one, implicit_scores(pipeline, queries))


def test_random_is_seeded_and_means_nothing(pair):
    pipeline, queries = pair
    a, b, c = (msif.Random(seed).fit(pipeline).score(queries).values for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.std() > 0.5
    assert not torch.equal(a[0], a[1])


def test_every_baseline_shares_the_interface(pair):
    pipeline, queries = pair
    baselines = msif.all_baselines(msif.Exact())
    assert {type(b) for b in baselines.values()} == set(leaves(Baseline)) - {msif.SelfInfluence}
    baselines["self-influence"] = msif.SelfInfluence()
    for baseline in baselines.values():
        for stage, n in (("first", 18), (1, 12)):
            scores = baseline.fit(pipeline).score(queries, stage=stage, target="margin")
            assert scores.values.shape == (4, n), baseline
            assert scores.values.dtype == torch.float64, baseline
            assert scores.target == "margin"
            assert scores.method.startswith(type(baseline).__name__)
    signed = {name for name, b in baselines.items() if b.signed}
    assert signed == {"gradient dot", "gradient cosine", "TracIn", "single stage"}


def test_one_loop_calls_every_method():
    """Each takes stage, target, progress and aggregate by name, and progress in fit."""
    pipeline, queries = make_pair("proximal"), blobs(4, 2, 3)
    methods = {
        "implicit": msif.ImplicitInfluence(curvature="ggn", damping=0.1),
        "unrolled": msif.UnrolledInfluence(),
        "segmented": msif.SegmentedInfluence(3),
        **msif.all_baselines(),
    }
    asked = {"stage": "first", "target": "margin", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        for name, method in methods.items():
            fitted = method.fit(pipeline, progress=False)
            assert fitted is method, name
            assert fitted.score(queries, **asked).values.shape == (4, 18), name
            assert fitted.score(queries, **asked, aggregate="mean").values.shape == (1, 18), name
    for method in methods.values():
        fit, score = (inspect.signature(f).parameters for f in (method.fit, method.score))
        assert list(fit) == ["pipeline", "progress"] and fit["progress"].default is True, method
        taken = {name: p.default for name, p in list(score.items())[1:5]}
        defaults = {"stage": 0, "target": "loss", "progress": True, "aggregate": None}
        assert taken == defaults and list(taken) == list(defaults), method


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
    pipeline = msif.Pipeline(copy.deepcopy(pipeline.stages)).adopt()
    baseline = msif.Loss().fit(pipeline)
    with torch.no_grad():
        pipeline.stages[0].model.head.weight.add_(1)
    with pytest.raises(ValueError, match="changed since"):
        baseline.score(queries)


def test_regression_has_no_classes():
    x = blobs(9, 3, 1).x
    model = torch.nn.Sequential(torch.nn.Linear(5, 1)).double()
    data = msif.Examples(x, x[:, :1].clone())
    stage = msif.Stage("s", model, data, loss=msif.mean_squared_error, weight_decay=0.1)
    pipeline = msif.Pipeline([stage]).fit()
    for baseline in (msif.Entropy(), msif.Margin()):
        with pytest.raises(ValueError, match="class"):
            baseline.fit(pipeline).score(data[:2])
    assert msif.Loss().fit(pipeline).score(data[:2]).values.shape == (2, 9)
    with pytest.raises(ValueError, match=r"layer='head' is no module"):
        msif.RepresentationSimilarity("head").fit(pipeline).score(data[:2])
    assert msif.RepresentationSimilarity().fit(pipeline).score(data[:2]).values.shape == (2, 9)
