"""Rates by name, clipping, label smoothing, class weights, own batches, an early stop: all exact.

The oracles are central differences of the whole run, whose forward pass a plain loop of torch.optim
confirms, and `vjp` of that loop's own clipping.
"""

import copy
import functools
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import (
    ALL_LINKS,
    F64,
    central_differences,
    draw,
    flat,
    random_pipeline,
    random_queries,
    relative_error,
    unrolled_scores,
    worst_error,
)
from torch import nn
from torch.func import jacrev, vjp

import msif_lab as msif
from msif_lab.fingerprints import describe
from msif_lab.influence import adjoint
from msif_lab.influence.baselines import SelfInfluence
from msif_lab.pipeline import recipes
from msif_lab.pipeline.recipes import clip_factor, clip_transpose

GROUPS = {"bias": 0.02, "head.*": 0.2, "*": 0.08}
NO_DECAY = {"1d": 0.0, "*": 0.1}


def ragged(epoch, m, generator):
    """Batches of 5, 2 and 9 examples, one of them twice in a batch, others not at all."""
    order = torch.randperm(m, generator=generator).tolist()
    return [order[:5], order[5:7], [*order[6:14], order[6]]]


SMOOTH = functools.partial(msif.cross_entropy, label_smoothing=0.2)
WEIGHTED = functools.partial(msif.cross_entropy, weight=[0.5, 1.7])
BOTH = functools.partial(msif.cross_entropy, label_smoothing=0.1, weight=[0.5, 1.7])
TORCHS = nn.CrossEntropyLoss(
    reduction="none", label_smoothing=0.1, weight=torch.tensor([0.5, 1.7], dtype=F64)
)
PLAIN = {"epochs": 3, "batch_size": 7, "seed": 3}
# name: (recipe, weight decay, loss)
SETTINGS = {
    "rates": (msif.SGD(GROUPS, **PLAIN), 0.05, msif.cross_entropy),
    "rates of adam": (msif.Adam({"bias": 0.0, "*": 0.02}, **PLAIN), 0.05, msif.cross_entropy),
    "decay": (msif.AdamW(0.02, eps=1e-4, **PLAIN), NO_DECAY, msif.cross_entropy),
    "clip": (msif.SGD(0.1, clip=0.4, schedule="cosine", **PLAIN), 0.3, msif.cross_entropy),
    "clip with decay": (
        msif.SGD(GROUPS, clip=0.4, nesterov=True, **PLAIN),
        NO_DECAY,
        msif.cross_entropy,
    ),
    "clip of adam": (msif.Adam(0.02, eps=1e-3, clip=0.55, **PLAIN), 0.3, msif.cross_entropy),
    "smoothing": (msif.SGD(0.1, **PLAIN), 0.05, SMOOTH),
    "class weights": (msif.SGD(0.1, **PLAIN), 0.05, WEIGHTED),
    "loss of torch": (msif.SGD(0.1, **PLAIN), 0.05, TORCHS),
    "batches": (msif.SGD(0.1, epochs=4, batches=ragged), 0.05, msif.cross_entropy),
    "stop": (msif.SGD(0.1, schedule="linear", stop=5, **PLAIN), 0.05, msif.cross_entropy),
    "all": (
        msif.AdamW(
            {"head.*": 0.03, "*": 0.01},
            eps=1e-3,
            epochs=4,
            schedule="cosine",
            warmup=2,
            clip=0.7,
            batches=ragged,
            stop=10,
        ),
        NO_DECAY,
        BOTH,
    ),
}


def build(name="all", link="warm", k=3, **changed):
    """Binary tasks only, so that class weights fit all stages."""
    recipe, decay, loss = SETTINGS[name]
    pipeline = random_pipeline(link=ALL_LINKS[link], k=k, fit=False)
    for i, stage in enumerate(pipeline.stages):
        stage.model = msif.mlp(16, hidden=(4,), classes=2, seed=i).double()
        stage.data = msif.Examples(stage.data.x, stage.data.y % 2)
        stage.recipe, stage.weight_decay, stage.loss = replace(recipe, **changed), decay, loss
    return msif.Pipeline(pipeline.stages)


def factors(pipeline, k=0):
    """What clipping multiplied each gradient of a stage by."""
    run = msif.SegmentedInfluence(2).fit(pipeline, progress=False)._runs[k]
    return torch.tensor(run.factors)


# ---- The derivative ----


@pytest.mark.parametrize("link", ALL_LINKS)
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_equal_central_differences_of_the_whole_run(name, link):
    for k in (2, 3) if name == "all" else (3,):
        pipeline = build(name, link, k).fit(progress=False)
        if SETTINGS[name][0].clip:
            each = factors(pipeline)
            assert 0 < int((each < 1).sum()) < len(each), "both kinds of steps"
        assert worst_error(pipeline) <= 1e-7, f"{k} stages"


@pytest.mark.parametrize("name", ["clip", "clip with decay", "all"])
def test_a_factor_held_constant_fails(name, monkeypatch):
    def constant(g_bar, gradient, most):
        return clip_factor(gradient, most) * g_bar

    pipeline = build(name).fit(progress=False)
    monkeypatch.setattr(recipes, "clip_transpose", constant)
    assert worst_error(pipeline, [0]) > 1e-3


def test_decay_within_the_clipped_gradient_fails(monkeypatch):
    """As if the optimiser's own decay were clipped along."""
    pipeline = build("clip").fit(progress=False)
    whole = property(lambda self: self.objective.ridge, lambda *_: None)
    monkeypatch.setattr(adjoint.Adjoint, "ridge", whole, raising=False)
    assert worst_error(pipeline, [0]) > 1e-3


def test_decay_on_biases_by_mistake_fails():
    right = build("decay", k=2).fit(progress=False)
    wrong = build("decay", k=2).fit(progress=False)
    for k in range(2):
        wrong.objective(k).weight_decay = 0.1
    queries = random_queries(right)
    truth = central_differences(right, queries, 0, [0, 3], 1e-4, optimum=False)
    method = msif.UnrolledInfluence(trust=0)
    method.fit(right, progress=False)
    assert relative_error(method.score(queries).values[:, [0, 3]], truth) < 1e-7
    for run in method._runs:
        run.lanes.objective.weight_decay = 0.1
    assert relative_error(method.score(queries).values[:, [0, 3]], truth) > 1e-4


@pytest.mark.parametrize("most", [0.5, 4.0, 1e9])
def test_clipping_and_its_transpose_are_torchs(most):
    gradient, g_bar = draw(3, 11), draw(3, 11, seed=1)
    for g, bar in zip(gradient, g_bar, strict=True):
        parameters = [nn.Parameter(torch.zeros(n, dtype=F64)) for n in (4, 7)]
        for parameter, part in zip(parameters, g.split([4, 7]), strict=True):
            parameter.grad = part.clone()
        nn.utils.clip_grad_norm_(parameters, most)
        theirs = torch.cat([p.grad for p in parameters])
        assert torch.allclose(clip_factor(g, most) * g, theirs, rtol=1e-14)
        (expected,) = vjp(lambda g: clip_factor(g, most) * g, g)[1](bar)
        assert torch.allclose(clip_transpose(bar, g, most), expected, rtol=1e-12, atol=1e-14)
    zero = torch.zeros(1, 3)
    assert torch.equal(clip_transpose(zero + 1, zero, 1e-9), (zero + 1) * clip_factor(zero, 1e-9))


# ---- Lanes, segments, memory ----


def test_recomputation_and_parts_give_the_same_bits():
    pipeline = build(link="proximal").fit(progress=False)
    queries = random_queries(pipeline)
    expected = unrolled_scores(pipeline, queries, trust=0)
    for segments in (2, 8, 100):
        again = unrolled_scores(pipeline, queries, segments=segments, trust=0)
        assert torch.equal(again, expected)
    small = msif.UnrolledInfluence(memory="150kB", trust=0).fit(pipeline, progress=False)
    values = small.score(queries, progress=False).values
    assert small.plan_.sweeps > 1 and max(small.plan_.segments.values()) > 1
    assert relative_error(values, expected) < 1e-12


def test_many_lanes_are_the_lanes_alone():
    pipeline = build().fit(progress=False)
    weights = 1 + 0.3 * draw(32, 24)
    together = pipeline.retrain(weights, progress=False).parameters
    for lane in (0, 17, 31):
        alone = pipeline.retrain(weights[lane], progress=False).parameters
        for stage in range(3):
            assert relative_error(together[stage][lane], alone[stage][0]) < 1e-12


def test_seeds_side_by_side_are_those_alone():
    def seeded(seed):
        pipeline = build(k=2)
        stages = [
            replace(stage, recipe=replace(stage.recipe, seed=seed + k))
            for k, stage in enumerate(pipeline.stages)
        ]
        return msif.Pipeline(stages)

    runs = msif.over_seeds(seeded, seeds=range(3), progress=False)
    for seed, pipeline in enumerate(runs.pipelines):
        alone = seeded(seed).fit(progress=False)
        for ours, theirs in zip(pipeline.trained(), alone.trained(), strict=True):
            assert relative_error(ours, theirs) < 1e-12, seed
    assert relative_error(runs.pipelines[0].trained()[0], runs.pipelines[1].trained()[0]) > 1e-3


def test_batches_whose_sizes_go_by_the_seed_train_one_by_one():
    def sizes(epoch, m, generator):
        cut = int(torch.randint(5, 15, (), generator=generator))
        return torch.randperm(m, generator=generator).tensor_split([cut])

    def seeded(seed):
        pipeline = build("batches", k=1, batches=sizes)
        stage = pipeline.stages[0]
        return msif.Pipeline([replace(stage, recipe=replace(stage.recipe, seed=seed))])

    runs = msif.over_seeds(seeded, seeds=range(3), progress=False)
    for seed, pipeline in enumerate(runs.pipelines):
        assert torch.equal(pipeline.trained()[0], seeded(seed).fit(progress=False).trained()[0])


# ---- Beside a plain loop ----


def plain_loop(stage, model, names, previous=None):
    """A stage trained as people write it; the batches are the recipe's."""
    recipe, o = stage.recipe, msif.Pipeline([replace(stage, link=None)]).objective(0)
    given = dict(model.named_parameters())
    decay = stage.weight_decay if isinstance(stage.weight_decay, dict) else {}
    groups = [
        {
            "params": [given[name]],
            "lr": 1.0,
            "weight_decay": decay["1d" if given[name].ndim < 2 else "*"]
            if decay
            else stage.weight_decay,
        }
        for name in names
    ]
    if isinstance(recipe, msif.SGD):
        settings = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        optimizer = torch.optim.SGD(groups, **settings)
    else:
        kind = torch.optim.AdamW if recipe.decoupled else torch.optim.Adam
        optimizer = kind(groups, betas=recipe.betas, eps=recipe.eps)
    loss = stage.loss
    if isinstance(loss, functools.partial):
        weight = loss.keywords.get("weight")
        loss = nn.CrossEntropyLoss(
            weight=None if weight is None else torch.tensor(weight, dtype=F64),
            label_smoothing=loss.keywords.get("label_smoothing", 0.0),
            reduction="none",
        )
    fastest = 1.0 if not isinstance(recipe.lr, dict) else max(recipe.lr.values())
    for batch, rate in recipe.steps(len(o.data)):
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = rate
            if isinstance(recipe.lr, dict):
                group["lr"] = rate * rate_of(name, recipe.lr) / fastest
        optimizer.zero_grad()
        risk = loss(model(stage.data.x[batch]), stage.data.y[batch]).mean()
        if isinstance(stage.link, msif.Proximal):
            old = dict(previous.named_parameters())
            risk = risk + stage.link.alpha * sum(
                ((p - old[n].detach()) ** 2).sum() for n, p in given.items() if "head" not in n
            )
        risk.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_([given[name] for name in names], recipe.clip)
        optimizer.step()


def rate_of(name, rates):
    """A parameter's learning rate by the keys that are used here, in their order."""
    fits = {"bias": name.endswith("bias"), "head.*": "head" in name, "*": True}
    return next(rate for key, rate in rates.items() if fits[key])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plain_loop_of_torch_gives_the_same_weights(name):
    for link in ALL_LINKS:
        pipeline, previous, models = build(name, link), None, []
        for stage in pipeline.stages:
            model = copy.deepcopy(stage.model)
            if previous is not None:
                shared = {n: v for n, v in previous.state_dict().items() if "head" not in n}
                model.load_state_dict(shared, strict=False)
            frozen = isinstance(stage.link, msif.Frozen)
            names = [n for n, _ in model.named_parameters() if not frozen or "head" in n]
            plain_loop(stage, model, names, previous)
            models.append(previous := model)
        pipeline.fit(progress=False)
        for stage, model in zip(pipeline.stages, models, strict=True):
            assert float((flat(stage.model) - flat(model)).abs().max()) <= 1e-12, link
    assert relative_error(flat(pipeline.stages[-1].model), flat(build(name).stages[-1].model)) > 0.1


def test_cross_entropy_is_torchs():
    logits, labels, weight = draw(7, 4), torch.arange(7) % 4, draw(4, seed=1).abs()
    for settings in ({}, {"weight": weight}, {"label_smoothing": 0.3}):
        settings = {"weight": weight, "label_smoothing": 0.6} | settings
        theirs = nn.functional.cross_entropy(logits, labels, reduction="none", **settings)
        assert torch.allclose(msif.cross_entropy(logits, labels, **settings), theirs, rtol=1e-13)


@pytest.mark.parametrize("loss", [SMOOTH, WEIGHTED, BOTH, TORCHS])
def test_implicit_influence_knows_such_losses(loss):
    """At an optimum both are the same number, whichever curvature products are taken."""
    pipeline = build("stop", "proximal", k=2)
    for stage in pipeline.stages:
        stage.loss, stage.recipe, stage.weight_decay = loss, msif.LBFGS(), 0.1
    pipeline = msif.Pipeline(pipeline.stages).fit(progress=False)
    queries = random_queries(pipeline)
    scores = msif.ImplicitInfluence().fit(pipeline).score(queries).values[:, [0, 3]]
    truth = central_differences(pipeline, queries, 0, [0, 3], optimum=True)
    assert relative_error(scores, truth) < 1e-4


# ---- From checkpoints ----


def segmented(pipeline, queries, segments, **settings):
    method = msif.SegmentedInfluence(segments, trust=0, **settings).fit(pipeline, progress=False)
    return method.score(queries, progress=False).values


@pytest.mark.parametrize("name", ["rates", "decay", "clip with decay", "batches", "all"])
def test_step_by_step_it_is_the_unrolled_derivative(name):
    """With a stretch for each step; a single one comes close."""
    pipeline = build(name, "warm", k=2).fit(progress=False)
    queries = random_queries(pipeline)
    truth = unrolled_scores(pipeline, queries, trust=0)
    assert relative_error(segmented(pipeline, queries, 99), truth) < 1e-9
    assert 1e-7 < relative_error(segmented(pipeline, queries, 1), truth) < 0.7


@dataclass(frozen=True)
class Steady(msif.SGD):
    """Differentiated with the factor of clipping held fixed in each step."""

    def retreat(self, objective, theta_bar, state_bar, saved, step, rate):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipes, "clip_transpose", lambda g_bar, g, c: clip_factor(g, c) * g_bar)
            return super().retreat(objective, theta_bar, state_bar, saved, step, rate)


@pytest.mark.parametrize("link", ALL_LINKS)
@pytest.mark.parametrize("decay", [0.3, NO_DECAY])
def test_krylov_spaces_are_exact_but_for_the_factors_derivative(decay, link):
    recipe = Steady(GROUPS, clip=0.4, nesterov=True, **PLAIN)
    pipeline = build("clip", link)
    for stage in pipeline.stages:
        stage.recipe, stage.weight_decay = recipe, decay
    pipeline = msif.Pipeline(pipeline.stages).fit(progress=False)
    queries = random_queries(pipeline)
    truth = unrolled_scores(pipeline, queries, trust=0)
    ours = segmented(pipeline, queries, 99, krylov=60)
    assert relative_error(ours, truth) < 1e-8
    assert relative_error(segmented(pipeline, queries, 3, krylov=60), truth) < 0.5
    for stage in pipeline.stages:
        stage.recipe = replace(recipe, clip=None)
    free = msif.Pipeline(pipeline.stages).fit(progress=False)
    assert relative_error(segmented(free, queries, 99, krylov=60), truth) > 0.1


def test_rates_by_name_scale_the_gradients_of_tracin():
    pipeline = build("rates", k=1).fit(progress=False)
    queries, o = random_queries(pipeline), pipeline.objective(0)
    run = msif.SegmentedInfluence(3).fit(pipeline, progress=False)._runs[0]
    rates = torch.cat(
        [
            torch.full((span.stop - span.start,), rate_of(name, GROUPS), dtype=F64)
            for name, span in o.layout.spans.items()
        ]
    )
    expected, own = torch.zeros(len(queries), 24, dtype=F64), torch.zeros(24, dtype=F64)
    for full in run.fulls[1:]:
        of_queries, of_examples = (
            jacrev(lambda full, some=some: o.losses(full, some.x, some.y))(full)
            for some in (queries, o.data)
        )
        expected -= 4 * (rates * of_queries) @ of_examples.T / 24
        own += 4 * (rates * of_examples**2).sum(1) / 24
    ours = msif.TracIn(3).fit(pipeline).score(queries).values
    assert relative_error(ours, expected) < 1e-10
    ours = SelfInfluence(3).fit(pipeline).score(queries).values[0]
    assert relative_error(ours, own) < 1e-10


# ---- A loop of one's own ----


def own_loop(clip):
    """A net trained in a plain loop with two groups, and all that such a loop can keep."""
    pipeline = build("clip", k=1)
    stage = pipeline.stages[0]
    net, data = stage.model, stage.data
    head = {id(p) for p in net.head.parameters()}
    groups = [
        {"params": list(net.head.parameters()), "lr": 0.1, "weight_decay": 0.0},
        {"params": [p for p in net.parameters() if id(p) not in head], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.04, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    saved, rates, norms, batches = [], [], [], []
    generator = torch.Generator().manual_seed(5)

    def keep(step):
        saved.append((step, copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())))

    for step in range(12):
        keep(step)
        batch = torch.randperm(len(data), generator=generator)[:7]
        optimizer.zero_grad()
        msif.cross_entropy(net(data.x[batch]), data.y[batch]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip)))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        batches.append(batch.tolist())
    keep(12)
    stage.weight_decay = {"head.*": 0.0, "*": 0.2}
    run = msif.Run(saved, rates, optimizer, batches=batches, clip=clip, norms=norms)
    return stage, run


def test_a_plain_loop_with_groups_and_clipping_is_the_recipes_run():
    """Adopted from its checkpoints it scores as the same run of ours, unrolled."""
    stage, run = own_loop(clip=0.3)
    adopted = msif.Pipeline([stage]).adopt([run])
    queries = random_queries(adopted)
    ours = segmented(adopted, queries, 99)
    recipe = msif.SGD(
        {"head.*": 0.1, "*": 0.04},
        clip=0.3,
        batches=run.batches,
        schedule=lambda step, steps: run.rates[step] / 0.1,
    )
    start = copy.deepcopy(stage.model)
    start.load_state_dict(run.checkpoints[0][1])
    pipeline = msif.Pipeline([replace(stage, model=start, recipe=recipe)]).fit(progress=False)
    assert relative_error(pipeline.trained()[0], adopted.trained()[0]) < 1e-13
    truth = unrolled_scores(pipeline, queries, trust=0)
    assert relative_error(ours, truth) < 1e-9
    # In Krylov spaces the norms tell each step's factor, and nothing its derivative.
    unclipped = replace(run, clip=None, norms=None)
    for known, least in ((True, 0.25), (False, 0.6)):
        near, far = (
            relative_error(segmented(adopted.adopt([each]), queries, 99, krylov=60), truth)
            for each in (replace(r, batches=r.batches if known else None) for r in (run, unclipped))
        )
        assert near < least < 0.9 < far, (known, near, far)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"norms": None}, "norms=None, but clip=0.5 needs them"),
        ({"clip": None}, "norms without clip"),
        ({"norms": [1.0]}, "norms=.* must be 12 finite numbers"),
        ({"norms": [float("nan")] * 12}, "must be 12 finite numbers"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"optimizer": msif.SGD(0.1)}, "clip=0.5 beside a recipe"),
    ],
)
def test_runs_whose_clipping_is_not_known_are_refused(changed, words):
    stage, run = own_loop(clip=0.5)
    with pytest.raises(ValueError, match=words):
        msif.Pipeline([stage]).adopt([replace(run, **changed)])


# ---- Refused before training ----


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (msif.SGD({"nope": 0.1, "*": 0.1}), "lr key 'nope' matches no parameter"),
        (msif.SGD({"*": 0.1, "bias": 0.2}), "lr key 'bias' decides nothing"),
        (msif.SGD({"bias": 0.1}), "no key of lr matches the trained parameters"),
        (msif.SGD(0.1, stop=41), "stop=41 is after the last of the run's 40 steps"),
        (msif.SGD(0.1, batches=[[0], [24]]), r"batches\[1\] must be whole numbers from 0 to 23"),
        (msif.SGD(0.1, batches=lambda e, m, g: []), "gives no batch in epoch 0"),
        (msif.SGD(0.1, batches=lambda e, m, g: [[]]), r"batches\(epoch 0\)\[0\] must be whole"),
        (msif.SGD(0.1, batches=lambda e: [[0]]), "fails in epoch 0: TypeError"),
        (msif.SGD(0.1, batches=lambda e, m, g: [[True]]), "of torch.bool"),
        (
            msif.SGD(0.1, batches=lambda e, m, g: torch.rand(1, m).argsort()),
            "gives other batches when it is called again",
        ),
    ],
)
def test_recipes_that_do_not_fit_the_stage_are_refused(recipe, words):
    stage = build("stop", k=1).stages[0]
    recipe = replace(recipe, batch_size=6)
    with pytest.raises(ValueError, match=f"(?s)stage 'stage0'.*{words}"):
        msif.Pipeline([replace(stage, recipe=recipe)])


def test_what_is_not_used_leaves_no_trace():
    """Files of earlier versions hold such texts, of recipes as of what they print."""
    recipe = msif.SGD(0.1)
    words = "SGD(lr=0.1, momentum=0.9, epochs=10, batch_size=50, seed=0, schedule='constant', "
    words += "warmup=0, nesterov=False)"
    assert describe(recipe) == repr(recipe) == words
    assert recipe.clip is recipe.stop is recipe.batches is None
    assert describe(msif.SGD(0.1, clip=1.0, stop=3)) == words[:-1] + ", clip=1.0, stop=3)"
    lists = [msif.SGD(0.1, batches=[[0, 1], [k]]) for k in (2, 2, 3)]
    assert lists[0] == lists[1] != lists[2]
    texts = [describe(recipe) for recipe in lists]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) < 300
    assert repr(lists[0]).endswith("nesterov=False, batches=<2 batches>)")
    assert len(set(lists)) == 2 and pickle.loads(pickle.dumps(lists[0])) == lists[0]
