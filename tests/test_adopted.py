"""Weights trained elsewhere: by scikit-learn, by a plain PyTorch loop, with weight decay by name.

The right numbers come from scikit-learn's own refits, from ``torch.optim`` with parameter groups,
and from plain autograd on the objective as its definition says.
"""

import copy
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from oracles import (
    LINKS,
    central_differences,
    close,
    draw,
    flat,
    implicit_scores,
    random_examples,
    random_pipeline,
    random_queries,
    relative_error,
    same,
    unrolled_scores,
)
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional

import msif_lab as msif
from msif_lab import widgets
from msif_lab.evaluation import removals
from msif_lab.influence import AlphaSweep
from msif_lab.pipeline.saved import ADOPTED
from msif_lab.storage import read_tensors

README = Path(__file__).parents[1] / "README.md"
GROUPS = [[0], [3], [17], [5, 9], [30, 31, 32]]
BY_NAME = {"bias": 0.0, "head.weight": 0.2, "*": 0.05}


# ---- scikit-learn ----


def binary(outputs, y):
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


class Ours:
    """A scikit-learn model on m examples: its refits, its losses, and it as a stage.

    Args:
        kind: ``"ridge"``, ``"binary"`` or ``"multinomial"``.
        m: examples of the stage, for the conversion of α and C to λ.
    """

    def __init__(self, kind, m):
        self.kind = kind
        strength = 2 * 0.7 / m if kind == "ridge" else 1 / (0.5 * m)
        self.decay = {"weight": strength, "bias": 0.0}
        self.loss = {"ridge": msif.mean_squared_error, "binary": binary}.get(
            kind, msif.cross_entropy
        )

    def fit(self, x, y, weights=None):
        if self.kind == "ridge":
            model = Ridge(alpha=0.7, solver="cholesky")
        else:
            settings = {"C": 0.5, "tol": 1e-12, "max_iter": 1000}
            model = LogisticRegression(solver="newton-cholesky", **settings)
        return model.fit(x.numpy(), y.numpy(), sample_weight=weights)

    def layer(self, model):
        """The model as a torch layer."""
        coefficients = torch.tensor(numpy.atleast_2d(model.coef_))
        layer = nn.Linear(*coefficients.shape[::-1]).double()
        layer.load_state_dict(
            {"weight": coefficients, "bias": torch.tensor(numpy.atleast_1d(model.intercept_))}
        )
        return layer

    def losses(self, model, x, y):
        """Loss of each query by scikit-learn's own predictions."""
        if self.kind == "ridge":
            return (torch.tensor(model.predict(x.numpy())) - y) ** 2
        chances = torch.tensor(model.predict_proba(x.numpy()))
        return -chances[range(len(x)), y.long()].log()


def task(kind, n, seed):
    """Examples of ten features: numbers, or two or three classes that overlap."""
    x, noise = draw(n, 10, seed=seed), draw(n, 3, seed=seed + 50)
    z = 0.7 * x @ draw(10, 3, seed=99) + noise
    y = {"ridge": z[:, 0], "binary": (z[:, 0] > 0).double(), "multinomial": z.argmax(1)}[kind]
    return msif.Examples(x, y, 100 * seed + torch.arange(n))


def without(m, group):
    return [i for i in range(m) if i not in group]


@pytest.mark.parametrize("kind", ["ridge", "binary", "multinomial"])
def test_real_refits_of_scikit_learn(kind):
    data, queries = task(kind, 60, 1), task(kind, 7, 2)
    ours = Ours(kind, len(data))
    whole = ours.fit(data.x, data.y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage = msif.Stage("only", ours.layer(whole), data, ours.loss, ours.decay)
        pipeline = msif.Pipeline([stage]).adopt()
        effects = msif.removal_effects(pipeline, queries, GROUPS, progress=False)
    before = ours.losses(whole, queries.x, queries.y)
    kept = [without(60, group) for group in GROUPS]
    refits = [ours.fit(data.x[rows], data.y[rows]) for rows in kept]
    own = torch.stack([ours.losses(refit, queries.x, queries.y) for refit in refits], 1)
    close(effects.base, before, 1e-9)
    close(effects.values, own - before[:, None], 1e-7)

    # Negative control: with the intercept penalised too, these weights are another model's.
    other = msif.Stage("only", ours.layer(whole), data, ours.loss, ours.decay["weight"])
    weights = torch.ones(len(GROUPS), 60)
    for lane, group in enumerate(GROUPS):
        weights[lane, group] = 0
    again = msif.Pipeline([other]).adopt().retrain(weights, warm_start=True, progress=False)
    penalised = again.evaluate(queries) - before[:, None]
    assert relative_error(penalised, own - before[:, None]) > 1e-3


@pytest.mark.parametrize("kind", ["ridge", "binary", "multinomial"])
def test_scores_are_derivatives_of_scikit_learns_weighted_fits(kind):
    data, queries = task(kind, 40, 3), task(kind, 5, 4)
    ours = Ours(kind, len(data))
    stage = msif.Stage("only", ours.layer(ours.fit(data.x, data.y)), data, ours.loss, ours.decay)
    pipeline = msif.Pipeline([stage]).adopt()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "multinomial":  # whose classes share a free intercept
            with pytest.warns(msif.SymmetryWarning, match="1 null direction"):
                scores = implicit_scores(pipeline, queries)
        else:
            scores = implicit_scores(pipeline, queries)
    for i, h in ((0, 1e-3), (7, 1e-3)):
        at = []
        for sign in (1, -1):
            weights = numpy.ones(40)
            weights[i] += sign * h
            at.append(ours.losses(ours.fit(data.x, data.y, weights), queries.x, queries.y))
        close(scores[:, i], (at[0] - at[1]) / (2 * h), 1e-5, i)


def test_leave_one_out_is_a_refit_of_ridge():
    """The model is linear and the loss quadratic, so one Newton step is the whole refit."""
    data, queries = task("ridge", 40, 5), task("ridge", 6, 6)
    ours = Ours("ridge", 40)
    whole = ours.fit(data.x, data.y)
    stage = msif.Stage("only", ours.layer(whole), data, ours.loss, ours.decay)
    scores = implicit_scores(
        msif.Pipeline([stage]).adopt(), queries, leave_one_out=True, target="output"
    )
    for i in (0, 11, 39):
        rows = without(40, [i])
        refit = ours.fit(data.x[rows], data.y[rows])
        change = refit.predict(queries.x.numpy()) - whole.predict(queries.x.numpy())
        close(-scores[:, i], torch.tensor(change), 1e-9, i)


def test_training_reaches_the_optimum_where_classes_share_a_free_bias(digits):
    """That direction has no curvature; rounding makes it negative in some of these."""
    for seed in range(6):
        for classes in ((0, 1, 2), (0, 7)):
            data = digits[0].select(classes=classes, n=60, seed=seed)
            net = msif.softmax_regression(64, len(classes)).double()
            stage = msif.Stage("only", net, data, weight_decay={"weight": 0.02, "bias": 0.0})
            report = msif.Pipeline([stage]).fit(progress=False).reports[0]
            assert float(report.gradient_norm) < 1e-12, (seed, classes)


def stacked(first, second):
    """The nets of both stages: the second one's classifier reads the first one's outputs."""
    head = copy.deepcopy(second)
    return (
        nn.Sequential(OrderedDict(embedding=copy.deepcopy(first))),
        nn.Sequential(OrderedDict(embedding=copy.deepcopy(first), head=head)),
    )


@pytest.mark.parametrize("kinds", [("ridge", "binary"), ("binary", "ridge")], ids="-".join)
def test_two_stages_of_scikit_learn(kinds):
    """Stacking: the second model is fitted to the decision values of the first."""
    data = [task(kind, n, seed) for kind, n, seed in zip(kinds, (60, 40), (7, 8), strict=True)]
    queries = task(kinds[1], 6, 9)
    ours = [Ours(kind, len(d)) for kind, d in zip(kinds, data, strict=True)]

    def values(model, x):
        """What the first model hands on, ``(N, 1)``."""
        return torch.tensor(x.numpy() @ numpy.atleast_2d(model.coef_).T + model.intercept_)

    def refit(stage, group):
        rows = [without(len(d), group if k == stage else []) for k, d in enumerate(data)]
        first = ours[0].fit(data[0].x[rows[0]], data[0].y[rows[0]])
        second = ours[1].fit(values(first, data[1].x[rows[1]]), data[1].y[rows[1]])
        return first, second, ours[1].losses(second, values(first, queries.x), queries.y)

    first, second, before = refit(0, [])
    nets = stacked(ours[0].layer(first), ours[1].layer(second))
    pipeline = msif.Pipeline(
        [
            msif.Stage("first", nets[0], data[0], ours[0].loss, ours[0].decay),
            msif.Stage("second", nets[1], data[1], ours[1].loss, ours[1].decay, msif.Frozen()),
        ]
    ).adopt()
    for stage in (0, 1):
        effects = msif.removal_effects(pipeline, queries, GROUPS, stage=stage, progress=False)
        own = torch.stack([refit(stage, group)[2] for group in GROUPS], 1)
        close(effects.values, own - before[:, None], 1e-7, stage)
        scores = msif.ImplicitInfluence(leave_one_out=True).fit(pipeline).score(queries, stage)
        assert msif.agreement(scores, effects).mean("rho") > 0.8, stage


# ---- Weight decay by name ----


def named_decay(name):
    """What `BY_NAME` means."""
    if name.endswith("bias"):
        return 0.0
    return 0.2 if name == "head.weight" else 0.05


def two(weight_decay, link=None, recipe=None):
    return random_pipeline(
        link=link or msif.Proximal(0.3), weight_decay=weight_decay, recipe=recipe, fit=False
    )


@pytest.mark.parametrize("decay", [BY_NAME, named_decay], ids=["mapping", "function"])
@pytest.mark.parametrize("link", LINKS)
def test_every_parameter_has_its_own_penalty(link, decay):
    pipeline = two(decay, LINKS[link])
    o = pipeline.objective(1)
    full = 0.3 * draw(1, o.layout.size, seed=3)
    lanes = pipeline.functional(1).lanes(
        full, 0.3 * draw(1, pipeline.objective(0).layout.size), None
    )
    theta = o.trained.take(lanes.base)

    def risk(theta):
        """F as its definition says."""
        named = o.parameters(theta, lanes.base[0])
        value = o.losses(named, o.data.x, o.data.y).mean()
        for name in o.trained_names:
            value = value + named_decay(name) / 2 * (named[name] ** 2).sum()
        return value + o.alpha * ((o.coupled.take(theta) - lanes.centre[0]) ** 2).sum()

    value, gradient = lanes.value_and_grad(theta)
    close(value[0], risk(theta[0]), 1e-13)
    close(gradient[0], torch.func.grad(risk)(theta[0]), 1e-12)
    here = lanes.base[0]
    close(msif.Hessian(o, here).dense(), torch.func.hessian(risk)(theta[0]), 1e-12)


def test_a_mapping_of_equal_numbers_is_the_number():
    """Bit for bit, in scores, facts and files."""
    pipelines = [two(decay).fit(progress=False) for decay in (0.05, {"bias": 0.05, "*": 0.05})]
    queries = random_queries(pipelines[0])
    assert same(*([full.clone() for full in p.trained()] for p in pipelines))
    assert same(*(implicit_scores(p, queries) for p in pipelines))
    assert pipelines[0].facts() == pipelines[1].facts()
    assert pipelines[0].facts()["stages"][0]["weight_decay"] == 0.05


OPTIMISERS = {
    "sgd": (msif.SGD(lr=0.1, epochs=3, batch_size=7), torch.optim.SGD, {"momentum": 0.9}),
    "adam": (msif.Adam(lr=0.02, epochs=3, batch_size=7), torch.optim.Adam, {}),
    "adamw": (msif.AdamW(lr=0.02, epochs=3, batch_size=7), torch.optim.AdamW, {}),
}


def groups_of(model, decay):
    """Parameter groups as people write them: a weight decay for each."""
    return [
        {"params": [p], "weight_decay": decay(n)}
        for n, p in model.named_parameters()
        if p.requires_grad
    ]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_recipes_equal_torch_with_parameter_groups(name):
    recipe, kind, settings = OPTIMISERS[name]
    pipeline = random_pipeline(k=1, weight_decay=BY_NAME, recipe=recipe, fit=False)
    stage = pipeline.stages[0]
    model = copy.deepcopy(stage.model)
    optimiser = kind(groups_of(model, named_decay), lr=recipe.lr, **settings)
    for batch, _ in recipe.steps(len(stage.data)):
        optimiser.zero_grad()
        functional.cross_entropy(model(stage.data.x[batch]), stage.data.y[batch]).backward()
        optimiser.step()
    pipeline.fit(progress=False)
    close(flat(stage.model), flat(model), 1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_unrolled_scores_with_decay_by_name(name):
    recipe = OPTIMISERS[name][0]
    if name == "adamw":
        recipe = msif.AdamW(lr=0.02, eps=1e-4, epochs=3, batch_size=7)
    pipeline = two(BY_NAME, msif.WarmStart(), recipe).fit(progress=False)
    queries, examples = random_queries(pipeline), [0, 3, 11]
    for stage in (0, 1):
        expected = central_differences(pipeline, queries, stage, examples, optimum=False)
        found = unrolled_scores(pipeline, queries, stage=stage)[:, examples]
        assert relative_error(found, expected) < 1e-6, stage


SOLVERS = {
    "cg": msif.ConjugateGradient(tol=1e-10),
    "preconditioned": msif.ConjugateGradient(tol=1e-10, preconditioner=msif.LowRank(rank=20)),
    "ekfac": msif.ConjugateGradient(tol=1e-10, preconditioner=msif.EKFAC()),
    "nested": msif.ConjugateGradient(
        tol=1e-10, preconditioner=msif.LowRank(rank=20), shares=(0.3,)
    ),
    "minres": msif.MINRES(tol=1e-10),
    "lowrank": msif.LowRank(rank=1000),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_decay_by_name(solver):
    pipeline = two(BY_NAME).fit(progress=False)
    queries = random_queries(pipeline)
    settings = {"curvature": "ggn", "damping": 1e-2}
    expected = implicit_scores(pipeline, queries, **settings)
    found = implicit_scores(pipeline, queries, SOLVERS[solver], **settings)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("solver", [msif.LowRank(), msif.EKFAC()], ids=["lowrank", "ekfac"])
def test_solvers_that_need_a_penalty_everywhere_say_so(solver):
    pipeline = two(BY_NAME).fit(progress=False)
    method = msif.ImplicitInfluence(solver, curvature="ggn")
    with pytest.raises(ValueError, match="on every parameter: set weight_decay or damping"):
        method.fit(pipeline)


def test_derivatives_at_an_optimum_with_decay_by_name():
    pipeline = random_pipeline(regression=True, link=msif.Proximal(0.3), weight_decay=BY_NAME)
    queries, examples = random_queries(pipeline), [0, 3, 11]
    expected = central_differences(pipeline, queries, 0, examples, optimum=True)
    assert relative_error(implicit_scores(pipeline, queries)[:, examples], expected) < 1e-4


def test_decay_by_name_is_kept_in_files(tmp_path):
    pipeline = two(BY_NAME).fit(progress=False)
    pipeline.save(tmp_path / "p")
    loaded = two(named_decay).load(tmp_path / "p")
    assert same(loaded.trained(), pipeline.trained())
    with pytest.raises(msif.SavedFileError, match="weight_decay"):
        two(BY_NAME | {"bias": 0.1}).load(tmp_path / "p")


def test_a_mapping_changed_in_place_is_noticed():
    decay = dict(BY_NAME)
    pipeline = two(decay, recipe=OPTIMISERS["sgd"][0]).fit(progress=False)
    decay["bias"] = 1.0
    with pytest.raises(ValueError, match="weight_decay of stage 'stage0'"):
        pipeline.retrain(torch.ones(24))


@pytest.mark.parametrize(
    ("decay", "says"),
    [
        ({"bias": 0.0}, r"no key .* trained parameters \['embedding.1.weight', 'head.weight'\]"),
        ({"gamma": 0.0, "*": 0.1}, "'gamma' matches no parameter"),
        ({"*": 0.1, "bias": 0.0}, "'bias' decides nothing.*put it before"),
        ({"*": -0.1}, r"'\*': -0.1.*zero or positive"),
        ({"*": True}, r"'\*': True.*zero or positive"),
        ({0: 0.1}, "0: 0.1"),
        ({}, r"weight_decay=\{\}.*by name"),
        ("0.1", "weight_decay='0.1'.*function of the name"),
        (float, "weight_decay=.*function of the name"),
        (lambda name: None, "gives None for 'embedding.1.weight'"),
    ],
)
def test_decay_that_cannot_be_right_is_refused(decay, says):
    with pytest.raises(ValueError, match=says) as caught:
        two(decay)
    assert "'stage0'" in str(caught.value)


def test_keys_match_names_last_parts_and_patterns():
    settings = {
        "bias": {"bias": 1.0, "*": 0.0},
        "embedding.1.bias head.bias": {"embedding.1.bias": 1.0, "head.bias": 1.0, "*": 0.0},
        "head.weight head.bias": {"head.*": 1.0, "*": 0.0},
        "embedding.1.weight head.weight": {"*bias": 0.0, "weight": 1.0},
    }
    for names, decay in settings.items():
        o = two(decay).objective(0)
        parts = o.weight_decay.split([len(o.layout.spans[n]) for n in o.trained_names])
        found = {n for n, part in zip(o.trained_names, parts, strict=True) if part[0] == 1}
        assert found == {n for n in o.trained_names if any(n.endswith(k) for k in names.split())}


# ---- Removing nobody ----


def early(stages=1, recipe=None):
    """A net that a loop of one's own trained for a few epochs, adopted by stages for `LBFGS`."""
    pipeline = random_pipeline(
        k=stages, link=msif.Proximal(0.3), recipe=msif.SGD(lr=0.1, epochs=10, batch_size=8)
    )
    for stage in pipeline.stages:
        stage.recipe = recipe or msif.LBFGS()
    return msif.Pipeline(pipeline.stages).adopt()


@pytest.mark.parametrize("stages", [1, 2])
def test_removing_nobody_has_no_effect_at_an_optimum(stages):
    """The base is the very retraining that removes nobody; as a lane beside others it is it too."""
    pipeline = random_pipeline(k=stages, link=msif.Proximal(0.3)).adopt()
    queries = random_queries(pipeline)
    effects = msif.removal_effects(pipeline, queries, [[0], [1]], progress=False)
    nobody = pipeline.retrain(torch.ones(24), warm_start=True, progress=False)
    assert torch.equal(nobody.evaluate(queries)[:, 0], effects.base)
    beside, _, _ = removals._retrain_without(
        pipeline, 0, [[0], [], [1]], queries, "loss", None, "warm-start"
    )
    assert float((beside[:, 1] - effects.base).abs().max()) <= 1e-12
    close(beside[:, [0, 2]] - effects.base[:, None], effects.values, 1e-9)


def test_going_on_from_a_fit_is_not_counted_as_removal():
    """A warm start asked for by hand: the control is what version 0.1.0 subtracted."""
    pipeline = random_pipeline(recipe=msif.SGD(lr=0.1, epochs=5, batch_size=8), k=1)
    queries = random_queries(pipeline)
    effects = msif.removal_effects(
        pipeline, queries, [[0], [1]], protocol="warm-start", progress=False
    )
    nobody = pipeline.retrain(torch.ones(24), warm_start=True, progress=False)
    assert torch.equal(nobody.evaluate(queries)[:, 0], effects.base)
    moved = effects.base - pipeline.evaluate(queries)
    assert float(moved.abs().max()) > 0.01
    assert float(effects.values.abs().mean()) < float(moved.abs().mean())


@pytest.mark.parametrize("stages", [1, 2])
def test_adopted_weights_that_are_no_optimum_are_refused_before_the_long_work(
    stages, monkeypatch, tmp_path
):
    pipeline, lanes = early(stages), []
    retrain = msif.Pipeline.retrain

    def counted(self, weights, **settings):
        lanes.append(len(next(iter(weights.values()))))
        return retrain(self, weights, **settings)

    monkeypatch.setattr(msif.Pipeline, "retrain", counted)
    says = r"no optimum.*by LBFGS with nobody.*losses by \d.*where they are \d.*from_values"
    for store in (None, tmp_path / "store"):
        with pytest.raises(ValueError, match=says):
            msif.removal_effects(
                pipeline, random_queries(pipeline), range(24), store=store, progress=False
            )
    assert lanes == [1, 1], "nobody removed, each time"
    assert {path.name for path in tmp_path.iterdir()} <= {".store.lock"}


@pytest.mark.parametrize("tolerance", [1e-7, 1e-4])
def test_an_optimum_of_ones_own_is_measured(tolerance):
    """To the gradient norm that other libraries stop at; effects are those of the optimum."""
    exact = random_pipeline(k=1)
    model = copy.deepcopy(exact.stages[0].model)
    data = exact.stages[0].data
    with torch.no_grad():  # somewhere near, then down
        for p in model.parameters():
            p += 0.05 * draw(*p.shape)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=tolerance, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        penalty = sum((p**2).sum() for p in model.parameters())
        risk = functional.cross_entropy(model(data.x), data.y) + 5e-2 / 2 * penalty
        risk.backward()
        return risk

    optimiser.step(closure)
    stage = msif.Stage("stage0", model, data, weight_decay=5e-2)
    queries = random_queries(exact)
    effects = msif.removal_effects(
        msif.Pipeline([stage]).adopt(), queries, [[0], [5]], progress=False
    )
    expected = msif.removal_effects(exact, queries, [[0], [5]], progress=False)
    close(effects.values, expected.values, 1e-6)


def complaint(explorer):
    return "".join(out["text"] for out in explorer.error.outputs)


def test_explorers_show_the_refusal():
    pipeline = early()
    queries = random_queries(pipeline)
    scores = msif.GradientDot().fit(pipeline).score(queries)
    influence = widgets.InfluenceExplorer(pipeline, scores, queries, k=3)
    cleaning = widgets.CleaningExplorer(pipeline, scores, queries, k=3)
    assert influence.widget and cleaning.widget
    influence.rows[0].buttons[0].click()
    for explorer in (influence, cleaning):
        explorer.retrain.click()
        assert explorer.job.wait(120)
        assert "no optimum" in complaint(explorer) and "from_values" in complaint(explorer)
        assert "failed: see the error below" in explorer.status.value
    assert cleaning.after is None


def test_cleaning_compares_with_going_on():
    """At an optimum of its own tolerance "before" is the retraining that removes nobody."""
    pipeline = random_pipeline(k=1, recipe=msif.LBFGS(tol=1e-4, polish_up_to=0)).adopt()
    pipeline.stages[0].recipe = msif.LBFGS()
    queries = random_queries(pipeline)
    scores = msif.GradientDot().fit(pipeline).score(queries)
    explorer = widgets.CleaningExplorer(pipeline, scores, queries, k=3)
    assert explorer.widget
    explorer.retrain.click()
    assert explorer.job.wait(120) and complaint(explorer) == ""
    nobody = pipeline.retrain(torch.ones(24), warm_start=True, progress=False)
    close(explorer.before["loss"], nobody.evaluate(queries)[:, 0], 1e-12)
    space = {"pipeline": pipeline, "queries": queries, "scores": scores}
    exec(explorer.code(), space)
    close(space["before"], explorer.before["loss"], 1e-12)
    close(space["after"], explorer.after["loss"], 1e-12)


# ---- What adoption says of itself ----


def test_the_recipe_of_adopted_weights_is_adopted(tmp_path):
    pipeline = random_pipeline(link=msif.Frozen())
    assert not pipeline.adopted and repr(pipeline).endswith(")")
    pipeline.adopt().save(tmp_path / "p")
    assert pipeline.adopted and repr(pipeline).endswith(") adopted")
    facts = read_tensors(tmp_path / "p", "pipeline")[1]
    assert [stage["recipe"] for stage in facts["stages"]] == [ADOPTED] * 2
    loaded = random_pipeline(link=msif.Frozen(), recipe=msif.SGD(0.1), fit=False)
    assert not loaded.adopted
    assert loaded.load(tmp_path / "p").adopted and loaded.reports is None
    for method in (msif.UnrolledInfluence(), msif.TracIn()):
        with pytest.raises(ValueError, match="adopted") as caught:
            method.fit(pipeline)
        assert "LBFGS" not in str(caught.value), "it did not train them"
    pipeline.fit(progress=False).save(tmp_path / "p")  # the control: another recipe's run
    with pytest.raises(msif.SavedFileError, match="recipe"):
        random_pipeline(link=msif.Frozen(), recipe=msif.SGD(0.1), fit=False).load(tmp_path / "p")


class Scaled(nn.Module):
    """A net with a constant."""

    def __init__(self, scale):
        super().__init__()
        self.embedding, self.head = nn.Linear(16, 3), nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x.flatten(1)) * self.scale))


def test_adopt_refuses_buffers_that_differ_as_fit_does():
    data = random_examples(12, (1, 4, 4), 3, False, 1)
    nets = [Scaled(scale).double() for scale in (1.0, 2.0)]
    nets[1].embedding.load_state_dict(nets[0].embedding.state_dict())
    stages = [
        msif.Stage(str(k), net, data, weight_decay=0.1, link=msif.Frozen() if k else None)
        for k, net in enumerate(nets)
    ]
    pipeline = msif.Pipeline(stages)
    for start in (pipeline.fit, pipeline.adopt):
        with pytest.raises(ValueError, match="buffer 'scale' differs"):
            start()
    nets[1].scale.copy_(nets[0].scale)
    assert pipeline.adopt().adopted


# ---- Advice that leads somewhere ----


def proximal_as_advised(pipeline, message):
    """The pipeline that the message describes, from copies of the stages."""
    alpha = re.search(r"link=Proximal\(alpha=([\d.e+-]+|\.\.\.)\)", message)[1]
    if alpha == "...":
        assert "(1 − momentum) / (2 Σ learning rates)" in message
        alpha = 0.1 / (2 * 0.1 * 9)
    stages = [copy.copy(stage) for stage in pipeline.stages]
    stages[1].link = msif.Proximal(float(alpha))
    return msif.Pipeline(stages).adopt()


@pytest.mark.parametrize("recipe", [msif.SGD(0.1, epochs=3, batch_size=8), msif.LBFGS()])
def test_an_adopted_warm_start_reaches_scores(recipe):
    """What implicit and unrolled influence say to it, followed word by word."""
    pipeline = random_pipeline(link=msif.WarmStart(), recipe=OPTIMISERS["sgd"][0])
    for stage in pipeline.stages:
        stage.recipe = recipe
    pipeline = msif.Pipeline(pipeline.stages).adopt()
    queries = random_queries(pipeline)
    for method in (msif.ImplicitInfluence(), msif.UnrolledInfluence(), msif.TracIn()):
        with pytest.raises(ValueError) as caught:
            method.fit(pipeline)
        said = str(caught.value)
        assert "curvature='ggn'" in said and "use UnrolledInfluence" not in said
        advised = proximal_as_advised(pipeline, said)
        with pytest.warns(msif.ConvergenceWarning):
            scores = msif.ImplicitInfluence(curvature="ggn").fit(advised).score(queries)
        assert bool(torch.isfinite(scores.values).all())


def test_an_adopted_warm_start_can_be_trained_here_instead():
    pipeline = random_pipeline(link=msif.WarmStart(), recipe=OPTIMISERS["sgd"][0], fit=False)
    pipeline.adopt()
    with pytest.raises(ValueError, match=r"pipeline.fit\(\) and a recipe such as SGD"):
        msif.UnrolledInfluence().fit(pipeline)
    assert unrolled_scores(pipeline.fit(progress=False), random_queries(pipeline)).abs().max() > 0


def test_lbfgs_before_a_warm_start_is_not_sent_in_a_circle():
    pipeline = random_pipeline(link=msif.WarmStart())
    with pytest.raises(ValueError) as caught:
        msif.UnrolledInfluence().fit(pipeline)
    advised = proximal_as_advised(pipeline, str(caught.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        implicit_scores(advised, random_queries(pipeline), curvature="ggn")


def test_adopted_weights_of_a_recipe_reach_effects():
    """SGD stages: no rerun; at an optimum LBFGS measures them, elsewhere one's own code does."""
    pipeline = random_pipeline(k=1).adopt()
    pipeline.stages[0].recipe = msif.SGD(lr=0.1, epochs=2)
    queries, subsets = random_queries(pipeline), [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"recipe=LBFGS\(\).*'warm-start'.*fit\(\).*from_values"):
        msif.removal_effects(pipeline, queries, subsets, progress=False)
    pipeline.stages[0].recipe = msif.LBFGS()
    effects = msif.removal_effects(
        pipeline, queries, subsets, protocol="warm-start", progress=False
    )
    again = msif.Effects.from_values(
        effects.base, effects.base[:, None] + effects.values, subsets, stage="stage0"
    )
    close(again.values, effects.values, 1e-12)


def test_other_methods_take_adopted_weights():
    pipeline = random_pipeline(link=msif.Proximal(0.3)).adopt()
    queries = random_queries(pipeline)
    assert AlphaSweep(pipeline, queries).scores(0.3).values.shape == (5, 24)
    for method in (msif.GradientDot(), msif.SingleStage(), msif.RepresentationSimilarity()):
        assert bool(torch.isfinite(method.fit(pipeline).score(queries).values).all())


# ---- Effects of one's own retraining ----


BEFORE, AFTER = [0.5, 0.25], [[0.75, 0.5, 0.0], [0.25, 0.5, 0.125]]
SUBSETS = [[3], [1], [0, 2]]


def test_own_values_are_differences_and_survive_a_file(tmp_path):
    for kind in (list, numpy.array, torch.tensor):
        effects = msif.Effects.from_values(
            kind(BEFORE), kind(AFTER), SUBSETS, stage="pre", query_ids=[7, 9], target="margin"
        )
        expected = torch.tensor([[0.25, 0.0, -0.5], [0.0, 0.25, -0.125]], dtype=torch.float64)
        assert torch.equal(effects.values, expected), kind
    effects.save(tmp_path / "effects")
    loaded = msif.Effects.load(tmp_path / "effects")
    for name in ("values", "base", "query_ids"):
        assert same(getattr(loaded, name), getattr(effects, name)), name
    assert loaded.subsets == SUBSETS and bool(loaded.gradient_norm.isnan().all())
    assert (loaded.stage, loaded.target, loaded.protocol) == ("pre", "margin", "own")


def test_agreement_takes_own_values():
    values = torch.tensor([[0.5, 0.125, 0.25, -0.25], [0.25, -0.5, 0.125, 0.0]])
    scores = msif.Influence(values, torch.arange(4), torch.arange(2), "pre")
    after = (
        torch.stack([scores.removal_effect(g) for g in SUBSETS], 1) + torch.tensor(BEFORE)[:, None]
    )
    effects = msif.Effects.from_values(BEFORE, after, SUBSETS, stage="pre")
    report = msif.agreement(scores, effects)
    assert report.r == pytest.approx([1.0, 1.0]) and report.slope == pytest.approx([1.0, 1.0])
    for settings, says in (
        ({"stage": "fine"}, "stage"),
        ({"target": "margin"}, "margin"),
        ({"query_ids": [4, 5]}, "different queries"),
    ):
        other = msif.Effects.from_values(BEFORE, after, SUBSETS, **{"stage": "pre"} | settings)
        with pytest.raises(ValueError, match=says):
            msif.agreement(scores, other)
    beyond = msif.Effects.from_values(BEFORE, after, [[3], [1], [4]], stage="pre")
    with pytest.raises(ValueError, match="between 0 and 3"):
        msif.agreement(scores, beyond)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"after": torch.tensor(AFTER).T}, r"before \(2,\) and after \(3, 2\).*R = 3.*after.T"),
        ({"after": [0.5, 0.25]}, r"after \(2,\): expected \(Q,\) and \(Q, R\)"),
        ({"before": 0.5}, r"before \(\) and"),
        ({"before": [0.5, numpy.nan]}, r"before holds NaN or inf, first at \[1\]"),
        ({"after": [[0, 1, numpy.inf], [0, 1, 2]]}, r"after holds NaN or inf, first at \[0, 2\]"),
        ({"subsets": [[3], [1]]}, "R = 2 groups"),
        ({"subsets": [[3], [], [1]]}, r"subset \[\] must hold different positions from 0 on"),
        ({"subsets": [[3], [-1], [1]]}, r"subset \[-1\]"),
        ({"subsets": [[3], [0.5], [1]]}, r"subset \[0.5\] must hold positions"),
        ({"query_ids": [1]}, r"query_ids=\[1\] \(1,\)"),
        ({"query_ids": [1.0, 2.0]}, "float32"),
        ({"stage": 0}, "stage=0 must be the stage's name"),
    ],
)
def test_own_values_that_cannot_be_right_are_refused(given, says):
    usual = {"before": BEFORE, "after": AFTER, "subsets": SUBSETS, "stage": "pre"}
    with pytest.raises((ValueError, TypeError), match=says):
        msif.Effects.from_values(**usual | given)


# ---- A plain PyTorch loop ----


RUN = msif.SGD(lr=0.2, momentum=0.9, epochs=30, batch_size=16)


def loop(model, data, decay, removed=()):
    """A user's own training: ``torch.optim.SGD`` with parameter groups, the recipe's batches."""
    weights = torch.ones(len(data), dtype=torch.float64)
    weights[list(removed)] = 0
    optimiser = torch.optim.SGD(groups_of(model, decay), lr=RUN.lr, momentum=RUN.momentum)
    for batch, _ in RUN.steps(len(data)):
        losses = functional.cross_entropy(model(data.x[batch]), data.y[batch], reduction="none")
        optimiser.zero_grad()
        (weights[batch] * losses).mean().backward()
        optimiser.step()
    return model


def own_training(pretraining, finetuning, link, without=()):
    """Both stages in plain PyTorch: a net, then a new head on it, the rest frozen or not."""
    first = msif.mlp(16, hidden=(4,), classes=3, seed=0).double()
    loop(first, pretraining, decays["pretrain"], without)
    second = msif.mlp(16, hidden=(4,), classes=2, seed=1).double()
    second.embedding.load_state_dict(first.embedding.state_dict())
    second.embedding.requires_grad_(not isinstance(link, msif.Frozen))
    loop(second, finetuning, decays["finetune"])
    second.embedding.requires_grad_(True)
    return first, second


decays = {
    "pretrain": lambda name: 0.0 if name.endswith("bias") else 1e-3,
    "finetune": lambda name: 1e-3,
}


def stages_of(nets, data, link, recipe):
    settings = [{"weight_decay": {"bias": 0.0, "*": 1e-3}}, {"weight_decay": 1e-3, "link": link}]
    return [
        msif.Stage(name, net, examples, recipe=recipe, **given)
        for name, net, examples, given in zip(decays, nets, data, settings, strict=True)
    ]


def two_tasks():
    data = [random_examples(n, (1, 4, 4), k, False, k) for n, k in ((60, 3), (40, 2))]
    return data, random_examples(8, (1, 4, 4), 2, False, 9)


@pytest.mark.parametrize("link", [msif.Frozen(), msif.WarmStart()], ids=["frozen", "warm"])
def test_a_plain_loop_adopted_is_the_same_pipeline_trained_inside(link):
    data, queries = two_tasks()
    nets = [msif.mlp(16, hidden=(4,), classes=3 - k, seed=k).double() for k in (0, 1)]
    inside = msif.Pipeline(stages_of(nets, data, link, RUN)).fit(progress=False)
    own = own_training(*data, link)
    close(flat(own[1]), flat(inside.stages[1].model), 1e-12)
    read = msif.Proximal(0.1) if isinstance(link, msif.WarmStart) else link
    adopted = msif.Pipeline(stages_of(own, data, read, msif.LBFGS())).adopt()
    if isinstance(link, msif.WarmStart):
        inside = msif.Pipeline(stages_of([s.model for s in inside.stages], data, read, RUN)).adopt()
    solved = msif.ImplicitInfluence(curvature="ggn", damping=1e-2)
    baselines = (msif.GradientDot(), msif.GradientDot(cosine=True), msif.SingleStage(damping=1e-2))
    for stage in (0, 1):
        for method in (solved, *baselines, msif.RepresentationSimilarity()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", msif.ConvergenceWarning)
                a, b = (method.fit(p).score(queries, stage).values for p in (adopted, inside))
            close(a, b, 1e-9, (method, stage))


def test_the_example_in_the_readme(capsys):
    """Eight lines, run as they stand; `removal_effects` of the same run gives the same effects."""
    block = re.search(
        r"```python\n((?:(?!```).)*from_values.*?)```", README.read_text(encoding="utf-8"), re.S
    )[1]
    assert len(block.strip().splitlines()) == 8
    (pretraining, finetuning), queries = two_tasks()
    queries = queries[[7, 2, 5, 0, 1, 3, 4, 6]]

    def my_retraining(without):
        _, second = own_training(pretraining, finetuning, msif.Frozen(), without)
        return functional.cross_entropy(second(queries.x), queries.y, reduction="none").detach()

    first, second = own_training(pretraining, finetuning, msif.Frozen())
    space = {
        **{"msif": msif, "torch": torch, "first": first, "second": second, "queries": queries},
        **{"pretraining": pretraining, "finetuning": finetuning, "my_retraining": my_retraining},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        exec(block, space)
    assert "8 queries × 12 removals" in capsys.readouterr().out
    nets = [msif.mlp(16, hidden=(4,), classes=3 - k, seed=k).double() for k in (0, 1)]
    inside = msif.Pipeline(stages_of(nets, (pretraining, finetuning), msif.Frozen(), RUN))
    effects = msif.removal_effects(
        inside.fit(progress=False), queries, space["groups"], progress=False
    )
    close(space["effects"].values, effects.values, 1e-9)
    assert msif.agreement(space["scores"], effects).mean("rho") > 0.2


# ---- What an outside look found at the seams ----


def unscaled(count=150):
    """Features a thousand times the intercept's, labels, and 6 queries."""
    x, y = load_breast_cancer(return_X_y=True)
    order = numpy.random.default_rng(0).permutation(len(x))
    return [(x[i], y[i]) for i in (order[:count], order[count : count + 6])]


def binary_loss(outputs, targets):
    return functional.binary_cross_entropy_with_logits(
        outputs[:, 0], targets[:, 0], reduction="none"
    )


def test_an_intercept_beside_large_features_is_no_symmetry():
    """Its eigenvalue is 1e-9 of the largest; the fit stops at scikit-learn's default tolerance."""
    (x, y), (queries, answers) = unscaled()

    def fit(weights=None):
        model = LogisticRegression(C=10, max_iter=20000, tol=1e-10)
        model.solver = "newton-cholesky"
        return model.fit(x, y, sample_weight=weights)

    def examples(x, y):
        return msif.Examples(torch.tensor(x), torch.tensor(y, dtype=torch.float64)[:, None])

    loose = LogisticRegression(C=10, max_iter=20000).fit(x, y)
    layer = torch.nn.Linear(30, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(loose.coef_))
        layer.bias.copy_(torch.tensor(loose.intercept_))
    decay = {"weight": 1 / (10 * len(x)), "bias": 0.0}
    stage = msif.Stage("only", layer, examples(x, y), binary_loss, decay)
    pipeline = msif.Pipeline([stage]).adopt()
    asked = {"target": lambda z, y: z[:, 0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", msif.SymmetryWarning)
        scores = implicit_scores(pipeline, examples(queries, answers), **asked)
    truth = []
    for i in (0, 3):
        at = []
        for sign in (1, -1):
            weights = numpy.ones(len(x))
            weights[i] += 1e-2 * sign
            at.append(torch.tensor(fit(weights).decision_function(queries)))
        truth.append((at[0] - at[1]) / 2e-2)
    close(scores[:, [0, 3]], torch.stack(truth, 1), 2e-2)


def test_scores_do_not_depend_on_who_asked_first():
    (x, y), (queries, answers) = unscaled()
    model = LogisticRegression(C=10, max_iter=20000).fit(x, y)

    def scores(first):
        layer = torch.nn.Linear(30, 1).double()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(model.coef_))
            layer.bias.copy_(torch.tensor(model.intercept_))
        data = msif.Examples(torch.tensor(x), torch.tensor(y, dtype=torch.float64)[:, None])
        decay = {"weight": 1 / (10 * len(x)), "bias": 0.0}
        pipeline = msif.Pipeline([msif.Stage("only", layer, data, binary_loss, decay)]).adopt()
        if first:
            msif.ImplicitInfluence().fit(pipeline)
        asked = msif.Examples(
            torch.tensor(queries), torch.tensor(answers, dtype=torch.float64)[:, None]
        )
        return msif.SingleStage(curvature="hessian").fit(pipeline).score(asked).values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(scores(False), scores(True))


@pytest.mark.parametrize("seed", range(5))
def test_a_question_along_a_flat_direction_is_refused_whatever_its_eigenvalue(seed):
    """Logits that all move by one number: which of them was reached is nobody's effect."""
    torch.manual_seed(seed)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 3, (40,))
    layer, decay = torch.nn.Linear(3, 3).double(), {"weight": 1e-2, "bias": 0.0}
    stage = msif.Stage("only", layer, msif.Examples(x, y), weight_decay=decay)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    queries = msif.Examples(x[:2], y[:2])
    with pytest.warns(msif.SymmetryWarning):
        attributor = msif.ImplicitInfluence().fit(pipeline)
    with pytest.raises(msif.IndefiniteCurvatureError, match="which of many equal minima"):
        attributor.score(queries, target=lambda z, y: z[:, 0])
    assert attributor.score(queries).values.abs().max() > 0


def test_a_backbone_that_nobody_trains_is_no_link():
    """As after freezing it for the later stage and copying both models."""
    stages = stages_of(
        [msif.mlp(16, hidden=(4,), classes=3 - k, seed=k).double() for k in (0, 1)],
        two_tasks()[0],
        msif.Frozen(),
        msif.LBFGS(),
    )
    stages[0].model.embedding.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing that stage .* trains is taken over"):
        msif.Pipeline(stages)
    stages[0].model.embedding.requires_grad_(True)
    msif.Pipeline(stages)


def test_buffers_that_differ_are_not_to_be_loaded_over_trained_weights():
    def net(seed):
        torch.manual_seed(seed)
        body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        norm = torch.nn.BatchNorm1d(4)
        return torch.nn.Sequential(body, norm, torch.nn.Linear(4, 2)).double().eval()

    nets = [net(0), net(1)]
    nets[1][1].running_mean.fill_(0.5)
    data = [random_examples(n, (1, 4, 4), 2, False, k) for k, n in enumerate((30, 20))]
    pipeline = msif.Pipeline(stages_of(nets, data, msif.Proximal(0.1), msif.LBFGS()))
    with pytest.raises(ValueError, match="get_buffer") as caught:
        pipeline.adopt()
    assert "load_state_dict" not in str(caught.value)
    advice = re.search(r"(after\.get_buffer.*?\)\))", str(caught.value))[1]
    head = nets[1][2].weight.detach().clone()
    exec(advice, {"after": nets[1], "before": nets[0]})
    pipeline.adopt()
    assert torch.equal(nets[1][2].weight, head)


def test_effects_of_ones_own_take_their_names_from_the_scores():
    data, queries = two_tasks()
    nets = [msif.mlp(16, hidden=(4,), classes=3 - k, seed=k).double() for k in (0, 1)]
    stages = stages_of(nets, data, msif.Proximal(0.1), msif.LBFGS())
    pipeline = msif.Pipeline(stages).fit(progress=False)
    queries = queries[[6, 2, 4]]
    groups = [[0], {1, 2}, [3], [4]]
    gap = torch.tensor([0.5, 0.5, -1.0])
    for asked in ({}, {"aggregate": gap}, {"target": "margin"}):
        effects = msif.removal_effects(pipeline, queries, groups, progress=False, **asked)
        scores = msif.ImplicitInfluence().fit(pipeline).score(queries, **asked)
        after = effects.values + effects.base[:, None]
        own = msif.Effects.from_values(effects.base, after, groups, like=scores)
        ours = msif.agreement(scores, own).mean("r")
        assert ours == pytest.approx(msif.agreement(scores, effects).mean("r"), abs=1e-9)
    numbered = msif.Effects.from_values(effects.base, after, groups, stage=scores.stage)
    with pytest.raises(ValueError, match="like=scores"):
        msif.agreement(scores, numbered)
