"""What changed after fit is noticed by every method, instead of old scores under new names."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from oracles import F64, draw
from torch import nn

import msif_lab as msif
from msif_lab import widgets


class Net(nn.Module):
    """Its activation is an attribute, and its loss is bent by a method that can be replaced."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.act, self.scale = torch.tanh, 1.0
        self.double()

    def forward(self, x):
        return self.scale * self.head(self.act(self.body(x)))


def examples(seed, n=12):
    labels = torch.arange(n) % 2
    return msif.Examples(draw(n, 3, seed=seed), labels)


class Fields(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(3, 2).double()

    def forward(self, batch):
        return self.net(batch["a"])


def made(recipe=None):
    recipe = recipe or msif.SGD(0.1, epochs=3, batch_size=4)
    stages = [
        msif.Stage("pre", Net(0), examples(0), weight_decay=0.1, recipe=recipe),
        msif.Stage(
            "fine", Net(1), examples(1), link=msif.Proximal(0.1), weight_decay=0.1, recipe=recipe
        ),
    ]
    return msif.Pipeline(stages).fit(progress=False)


def inputs(p):
    p.stages[0].data.x.mul_(0.5)


def labels(p):
    p.stages[1].data.y[0] = 1 - p.stages[1].data.y[0]


def through_numpy(p):
    p.stages[0].data.x.numpy()[3] *= 2


def ids(p):
    p.stages[0].data.ids.add_(100)


def other_data(p):
    p.stages[0].data = examples(7)


def equal_data(p):
    p.stages[0].data = msif.Examples(*(t.clone() for t in (p.stages[0].data.x, p.stages[0].data.y)))


def function(p):
    p.stages[0].model.act = torch.relu


def number(p):
    p.stages[1].model.scale = 2.0


def layer(p):
    p.stages[0].model.body = copy.deepcopy(p.stages[0].model.body)


def hook(p):
    p.stages[1].model.head.register_forward_hook(lambda module, given, z: 2 * z)


def loss(p):
    p.stages[1].loss = lambda z, y: 2 * msif.cross_entropy(z, y)


def decay(p):
    p.stages[0].weight_decay = 0.2


def link(p):
    p.stages[1].link = msif.Proximal(0.5)


def frozen(p):
    for stage in p.stages:
        stage.model.head.requires_grad_(False)


CHANGES = {
    "inputs": (inputs, "stage 'pre': data.x changed since fit"),
    "inputs through numpy": (through_numpy, "stage 'pre': data.x changed since fit"),
    "labels": (labels, "stage 'fine': data.y changed since fit"),
    "ids": (ids, "stage 'pre': data.ids changed since fit"),
    "other data": (other_data, "data of stage 'pre' changed since fit"),
    "equal data": (equal_data, "data of stage 'pre' changed since fit"),
    "activation": (function, "stage 'pre': the model or its loss computes something else"),
    "number": (number, "stage 'fine': the model or its loss computes something else"),
    "layer": (layer, "stage 'pre': modules, buffers or what is trained were exchanged"),
    "hook": (hook, "stage 'fine': the model or its loss computes something else"),
    "loss": (loss, "loss of stage 'fine' changed since fit"),
    "decay": (decay, "weight_decay of stage 'pre' changed since fit"),
    "link": (link, "link of stage 'fine' changed since fit"),
}
Q = examples(5, 4)
METHODS = {
    "implicit": lambda: msif.ImplicitInfluence(damping=0.1, curvature="ggn"),
    "unrolled": msif.UnrolledInfluence,
    "segmented": lambda: msif.SegmentedInfluence(2),
    "gradients": msif.GradientDot,
    "loss": msif.Loss,
    "single stage": lambda: msif.SingleStage(damping=0.1, curvature="ggn"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_fit_is_noticed_by_every_call(change):
    make, words = CHANGES[change]
    p = made()
    methods = {name: method().fit(p) for name, method in METHODS.items()}
    p.evaluate(Q)
    make(p)
    calls = {name: lambda m=m: m.score(Q) for name, m in methods.items()}
    calls |= {f"{name}, fit": lambda m=m: m().fit(p) for name, m in METHODS.items()}
    calls |= {
        "evaluate": lambda: p.evaluate(Q),
        "warm retraining": lambda: p.retrain(torch.ones(12, dtype=F64), warm_start=True),
        "retraining": lambda: p.retrain(torch.ones(12, dtype=F64)),
        "curvature": lambda: p.curvature(0, "ggn"),
        "removals": lambda: msif.removal_effects(p, Q, [[0]], progress=False),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value), name
    p.adopt()  # the way out that the messages name
    assert p.evaluate(Q).shape == (4,)


def test_what_is_as_before_is_not_refused():
    p = made()
    method = msif.GradientDot().fit(p)
    scores = method.score(Q).values
    decay = p.stages[0].weight_decay
    p.stages[0].weight_decay = 0.3
    p.stages[0].weight_decay = decay
    p.stages[0].data.x.mul_(2).div_(2)
    for stage in p.stages:
        stage.model.train()
        stage.model.eval()
    again = pickle.loads(pickle.dumps(p))
    apart = copy.deepcopy(p)
    for one in (p, again, apart):
        assert torch.equal(msif.GradientDot().fit(one).score(Q).values, scores)
    assert torch.equal(method.score(Q).values, scores)


def test_fields_that_changed_are_named():
    data = msif.Examples({"a": draw(8, 3, seed=1), "b": draw(8, 2, seed=2)}, torch.arange(8) % 2)
    recipe = msif.SGD(0.1, epochs=2, batch_size=4)
    p = msif.Pipeline([msif.Stage("one", Fields(), data, recipe=recipe)]).fit(progress=False)
    p.evaluate(data[:2])
    data.x["a"].mul_(2)
    with pytest.raises(ValueError, match=r"stage 'one': data\.x\['a'\] changed since fit"):
        p.evaluate(data[:2])


# ---- Results know where they come from ----


def both(p, queries=Q, target="loss"):
    scores = msif.GradientDot().fit(p).score(queries, target=target)
    effects = msif.removal_effects(p, queries, range(6), target=target, progress=False)
    return scores, effects


class Counting:
    """A target whose state changes, so that it is another one each time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z, y):
        self.calls += 1
        return z[:, 0]


def apart(z, y):
    return z[:, 0] - z[:, 1]


def test_results_of_one_pipeline_belong_together_in_any_precision(tmp_path):
    p = made()
    scores, effects = both(p)
    effects.save(tmp_path / "effects")
    scores.save(tmp_path / "scores")
    loaded = msif.Influence.load(tmp_path / "scores"), msif.Effects.load(tmp_path / "effects")
    for s, e in ((scores, effects), loaded, (scores[:], effects), (scores, loaded[1])):
        assert msif.agreement(s, e).r.shape == (4,)
    lazily = msif.Effects.from_values(effects.base, effects.values, effects.subsets, like=scores)
    assert msif.agreement(scores, lazily).r.shape == (4,)
    single = msif.GradientDot().fit(copy.deepcopy(p).float()).score(Q.to(torch.float32))
    assert msif.agreement(single, effects).r.shape == (4,)
    mean = msif.removal_effects(p, Q, range(6), aggregate="mean", progress=False)
    assert msif.agreement(scores.mean(), mean).r.shape == (1,)
    assert msif.agreement(scores[[2, 0]], replace(effects, **some(effects, [2, 0]))).r.shape == (2,)


def some(effects, rows):
    queries = [effects.origin["queries"][row] for row in rows]
    return {
        "values": effects.values[rows],
        "base": effects.base[rows],
        "query_ids": effects.query_ids[rows],
        "origin": effects.origin | {"queries": queries},
    }


def test_results_of_different_origins_are_refused_with_what_differs():
    p = made()
    scores, _ = both(p)
    numbered = msif.Examples(Q.x.flip(0), Q.y.flip(0), Q.ids)
    relabelled = made()
    relabelled.stages[0].data.y.copy_(1 - relabelled.stages[0].data.y)
    renamed = made()
    renamed.stages[0].data.ids.add_(5)
    others = {
        "the trained weights of stage 'pre'": made(msif.SGD(0.1, epochs=4, batch_size=4)),
        "the examples of stage 'pre'": relabelled.adopt(),
        "the ids of the examples of stage 'pre'": renamed.adopt(),
    }
    for words, other in others.items():
        effects = msif.Effects.from_values(
            *([0.0] * 4, torch.zeros(4, 6), range(6)), like=msif.GradientDot().fit(other).score(Q)
        )
        with pytest.raises(ValueError, match=f"different pipelines that differ in {words}"):
            msif.agreement(scores, effects)
    with pytest.raises(ValueError, match="queries that differ, first at row 0, under the same ids"):
        msif.agreement(scores, both(p, numbered)[1])
    ours, theirs = (both(p, target=t) for t in (lambda z, y: z[:, 0], lambda z, y: -z[:, 0]))
    with pytest.raises(ValueError, match=r"targets <lambda>@.* and <lambda>@"):
        msif.agreement(ours[0], theirs[1])
    assert msif.agreement(ours[0], ours[1]).r.shape == (4,)
    counting = Counting()
    with pytest.raises(ValueError, match="must keep no counter"):
        msif.agreement(*both(p, target=counting))
    with pytest.raises(ValueError, match="apart"):
        msif.agreement(both(p, target=apart)[0], ours[1])


def test_explorers_refuse_scores_of_another_pipeline():
    images = msif.Examples(draw(4, 1, 4, 4, seed=5), torch.arange(4) % 2)
    pipelines = []
    for epochs in (2, 3):
        stages = []
        for k, name in enumerate(("pre", "fine")):
            data = msif.Examples(draw(12, 1, 4, 4, seed=k), torch.arange(12) % 2)
            net = msif.mlp(16, (4,), classes=2, seed=k).double()
            recipe = msif.SGD(0.1, epochs=epochs, batch_size=4)
            link = msif.WarmStart() if k else None
            stages.append(msif.Stage(name, net, data, link=link, recipe=recipe))
        pipelines.append(msif.Pipeline(stages).fit(progress=False))
    ours, theirs = pipelines
    scores = msif.GradientDot().fit(ours).score(images)
    assert widgets.InfluenceExplorer(ours, scores, images, k=2).widget
    for explorer in (widgets.InfluenceExplorer, widgets.CleaningExplorer):
        with pytest.raises(ValueError, match="differ in the trained weights of stage 'pre'"):
            explorer(theirs, scores, images, k=2)
