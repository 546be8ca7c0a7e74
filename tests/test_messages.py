"""Bad values of every argument: refused by this library's own words, which name the argument.

One row a use: ``"callable: argument": (use, values)``; each value is one bad call. The message must
name the argument and say what was found, and be raised here, not somewhere inside PyTorch.
"""

import copy
import functools
import math
import re
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

import msif_lab as msif
from msif_lab import experiments, plots, studies, widgets
from msif_lab.errors import MsifError

PACKAGE = Path(msif.__file__).parent
NAN, INF = float("nan"), float("inf")

# What may come instead of a number, a switch, a name or an object.
WHOLE = (1.5, True, "3", None, [2], NAN)  # no whole numbers
COUNT = (0, -1, *WHOLE)  # no whole numbers from 1 on
COUNT_OR_NONE = (0, -1, 1.5, True, "3", [2])
SEED = (1.5, True, "0", None, [0], 2**64)
NUMPY_SEED = (*SEED[:-1], -1)
POSITIVE = (0.0, -1.0, NAN, INF, True, "1", None, [0.1])
DAMPING = (-1.0, NAN, INF, True, "1", None, [0.1], 1j)
SWITCH = ("no", 2, None, [], 0.5)
NAME = ("other", None, 3, ["a"])
MEMORY = ("much", 0, -1, True, None, NAN, [1])
STAGE = ("other", 2, -3, None, 0.5, True, [0])
PIPELINE = (None, 3, "p", [], nn.Linear(2, 2))
EXAMPLES = (None, 3, "q", [], torch.ones(2, 4))
FRACTION = (-0.1, 1.1, NAN, INF, True, "0.1", None, [0.1], 0.01)
HALF = {"fraction": 0.5, "seed": 0}
TARGET = (None, 3, "los", [])
AGGREGATE = ("median", 3, [1.0], torch.full((6,), NAN), torch.zeros(6), {}, True)
RANKING = (None, 3, "a", [], [1.0], [[1.0] * 6], [NAN] * 6, {}, {"keep all": [1.0] * 6}, {3: [1.0]})
SUBSETS = (None, 3, [], [[]], [[0, 0]], [[99]], [[-1]], [[0.5]], "ab", [["a"]], [[True]], [None])


@functools.cache
def made():
    """All that the uses need, made once: six images, three classes, two stages trained by SGD."""
    draw = torch.Generator().manual_seed(0)
    data = msif.Examples(torch.randn(6, 1, 2, 2, generator=draw), torch.arange(6) % 3)
    nets = [msif.mlp(4, (2,), classes=3, seed=seed) for seed in (0, 1)]
    settings = {"weight_decay": 1.0, "recipe": msif.SGD(0.05, epochs=1, batch_size=6)}
    one = msif.Stage("one", nets[0], data, **settings)
    two = msif.Stage("two", nets[1], data, link=msif.Proximal(0.5), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = msif.Pipeline([one, two]).fit(progress=False)
        implicit = msif.ImplicitInfluence(curvature="ggn").fit(pipeline)
        scores = implicit.score(data)
        top = implicit.score(data, top=2)
    after = torch.rand(6, 4, generator=draw)
    effects = msif.Effects.from_values(torch.rand(6), after, [0, 1, 2, 3], like=scores)
    retrained = pipeline.retrain(torch.ones(2, 6), progress=False)
    saved = [(step, nets[0].state_dict()) for step in (0, 1)]
    table = msif.compare_methods({"ours": scores}, {"one": effects}, resamples=10)
    slider = widgets.FigureSlider(lambda value: None, [1, 2], "value")
    interventions = msif.intervene(
        pipeline, torch.arange(6.0), fraction=0.5, test=data, seeds=1, progress=False
    )
    per_seed = torch.randn(3, 1, 6, generator=draw)
    about = data.ids, torch.tensor([-1]), "one", "loss", "", "mean"
    return SimpleNamespace(
        interventions=interventions,
        averaged=msif.InfluenceOverSeeds.of(per_seed, range(3), "mean", *about, origin={}),
        data=data,
        animals=msif.Examples(torch.eye(2), [0, 1], classes=("cat", "dog")),
        net=nets[0],
        pipeline=pipeline,
        untrained=msif.Pipeline([msif.Stage("one", copy.deepcopy(nets[0]), data)]),
        implicit=implicit,
        unrolled=msif.UnrolledInfluence().fit(pipeline, progress=False),
        segmented=msif.SegmentedInfluence(2).fit(pipeline, progress=False),
        dot=msif.GradientDot().fit(pipeline),
        scores=scores,
        top=top,
        effects=effects,
        report=msif.agreement(scores, effects, resamples=10),
        table=table,
        retrained=retrained,
        saved=saved,
        operator=pipeline.curvature(0, "ggn"),
        objective=pipeline.objective(0),
        full=pipeline.trained()[0],
        explorer=widgets.InfluenceExplorer(pipeline, scores, data, k=2),
        cleaning=widgets.CleaningExplorer(pipeline, scores, data, k=2),
        slider=slider,
    )


def run(m, checkpoints=None, rates=0.1, optimizer=None, **given):
    """Adopt a pipeline of one stage with this run."""
    checkpoints = m.saved if checkpoints is None else checkpoints
    one = msif.Run(checkpoints, rates, optimizer or msif.SGD(0.1), **given)
    return m.untrained.adopt([one])


def trained_by(m):
    """The optimizer of a loop of one's own."""
    return torch.optim.SGD(m.untrained.stages[0].model.parameters(), 0.1)


def removals(m, **given):
    usual = {"pipeline": m.pipeline, "queries": m.data, "subsets": [0]}
    return msif.removal_effects(**usual | given, progress=False)


def intervene(m, **given):
    """Act on the first of two stages, judged by test examples that differ from validation."""
    usual = {"ranking": torch.arange(6.0), "fraction": 0.5, "seeds": 1, "test": m.data[:3]}
    usual["validation"] = m.data[3:]
    return msif.intervene(m.pipeline, **usual | given, progress=False)


def values(m, before=None, after=None, subsets=(0, 1, 2), **given):
    before = [0.0] * 2 if before is None else before
    after = torch.zeros(2, 3) if after is None else after
    return msif.Effects.from_values(before, after, subsets, **{"stage": "one"} | given)


def stage(m, name="one", model=None, data=None, **given):
    model, data = m.net if model is None else model, m.data if data is None else data
    return msif.Pipeline([msif.Stage(name, model, data, **given)])


def linked(m, link):
    nets = [msif.mlp(4, (2,), classes=3, seed=seed) for seed in (0, 1)]
    first = msif.Stage("one", nets[0], m.data)
    return msif.Pipeline([first, msif.Stage("two", nets[1], m.data, link=link)])


def settings(kind, name, **usual):
    """A constructor as a function of one of its arguments."""
    return lambda m, v: kind(**usual | {name: v})


USES = {
    # ---- data ----
    "Examples: x": (lambda m, v: msif.Examples(v, [0]), (None, 3, "a", [], {}, [[NAN]], [["a"]])),
    "Examples: y": (lambda m, v: msif.Examples([[0.0]], v), (None, 3, [], [0, 1], [NAN], [-1])),
    "Examples: ids": (
        lambda m, v: msif.Examples([[0.0], [1.0]], [0, 1], v),
        (3, "ab", [0], [0, 0], [0.5, 1.5], [True, False], [None, 1]),
    ),
    "Examples: classes": (
        lambda m, v: msif.Examples([[0.0], [1.0]], [0, 1], classes=v),
        (3, "a", ("a",), ("a", "a"), [[1], [2]]),
    ),
    "Examples[index]: index": (
        lambda m, v: m.data[v],
        (6, -7, 1.5, "a", None, [], [0.5], [[0]], [True], {0}, [9], torch.zeros(2, 2)),
    ),
    "Examples.select: classes": (
        lambda m, v: m.data.select(v),
        (3, "01", (), (7,), (0, 0), [[0]], ({},)),
    ),
    "Examples.select: n": (lambda m, v: m.data.select(n=v), (0, -1, 2, 1.5, True, "3", [2], NAN)),
    "Examples.select: seed": (lambda m, v: m.data.select(n=3, seed=v), SEED),
    "Examples.with_labels: y": (
        lambda m, v: m.data.with_labels(v),
        (None, 3, "abc", [], [0], [0.5] * 6, [3] * 6, [-1] * 6, [[0]] * 6),
    ),
    "Examples.to: targets": (
        lambda m, v: m.data.to(v),
        ("other", None, 3, torch.int64, "meta", [torch.float64]),
    ),
    "from_dataset: dataset": (
        lambda m, v: msif.Examples.from_dataset(v),
        (None, 3, [], [1], [(1, 2, 3)], list, [("a", 0)]),
    ),
    "from_dataset: targets": (
        lambda m, v: msif.Examples.from_dataset([(torch.ones(2), 0)] * 2, v),
        (3, "ab", [0], [NAN, 0]),
    ),
    "from_dataset: workers": (
        lambda m, v: msif.Examples.from_dataset([(torch.ones(2), 0)], workers=v),
        (-1, 1.5, True, "1", None),
    ),
    "Fields: tensors": (lambda m, v: msif.Fields(v), (None, 3, "a", [1], {}, {1: [0]})),
    "Fields.pad: sequences": (lambda m, v: msif.Fields.pad(v), (None, 3, [], "")),
    "load_digits: dtype": (
        settings(msif.load_digits, "dtype"),
        (torch.int64, "float32", 3, float, torch.complex64),
    ),
    **{
        f"{load.__name__}: {name}": (settings(load, name, **usual), bad)
        for load in (msif.load_mnist, msif.load_cifar10)
        for name, bad, usual in (
            ("dtype", (torch.int64, "float32", 3), {}),
            ("pool", (0, 3, -1, 1.5, True, "2", None, NAN), {}),
            ("classes", (3, "4", (99,), (), [[0]]), {}),
            ("n", (0, -1, 5, 1.5, True, "9", [2]), {}),
            ("seed", SEED, {}),
            ("root", ("/nowhere", 3, b"a\0b", [1]), {}),
        )
    },
    "load_cifar10: labels": (settings(msif.load_cifar10, "labels"), NAME),
    "load_cifar10_labels: examples": (lambda m, v: msif.load_cifar10_labels(v), EXAMPLES),
    "load_cifar10_labels: labels": (lambda m, v: msif.load_cifar10_labels(m.data, v), NAME),
    "load_cifar10_labels: root": (
        lambda m, v: msif.load_cifar10_labels(m.animals, root=v),
        ("/nowhere", 3, b"a\0b", [1]),
    ),
    "load_reviews: name": (lambda m, v: msif.load_reviews(v), NAME),
    **{
        f"load_{corpus}: {name}": (settings(load, name), bad)
        for corpus, load in (
            ("brown", msif.load_brown),
            ("reviews", functools.partial(msif.load_reviews, "amazon")),
            ("newsgroups", msif.load_newsgroups),
            ("reuters", msif.load_reuters),
        )
        for name, bad in (
            ("classes", (3, "news", ("spam",), (), [[0]])),
            ("n", (0, -1, 2, 1.5, True, "9", [2])),
            ("seed", SEED),
            ("root", ("/nowhere", 3, b"a\0b", [1])),
        )
    },
    "Texts: texts": (lambda m, v: msif.Texts(v, [0]), (None, 3, "a", [], [3], [""], {})),
    "Texts: y": (
        lambda m, v: msif.Texts(["a", "b"], v),
        (None, 3, [], [0], [0.5, 1.0], [0, -1], [[0, 1]]),
    ),
    "Texts: ids": (lambda m, v: msif.Texts(["a", "b"], [0, 1], v), (3, "ab", [0], [0, 0])),
    "Texts: classes": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1], classes=v),
        (3, "a", ("a",), ("a", "a")),
    ),
    "Texts: document": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1], document=v),
        (3, "ab", [0], [0, -1], [0.5, 1.0], [True, False]),
    ),
    "Texts: ratings": (
        lambda m, v: msif.Texts(["a"], [0], ratings=v),
        (3, "ab", [[1] * 8], [[-1] * 9], [[0.5] * 9], [[0] * 9]),
    ),
    "Texts[index]: index": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1])[v],
        (2, -3, 1.5, "a", None, [], [0.5], [9]),
    ),
    "Texts.select: classes": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1]).select(v),
        (3, "01", (), (7,), (0, 0), [[0]]),
    ),
    "Texts.select: n": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1]).select(n=v),
        (0, -1, 1, 1.5, True, "3", [2], NAN),
    ),
    "Texts.select: seed": (
        lambda m, v: msif.Texts(["a", "b"], [0, 1]).select(n=2, seed=v),
        SEED,
    ),
    **{
        f"{spoil.__name__}: {name}": (settings(spoil, name, **usual | more), bad)
        for spoil, more in (
            (msif.flip_labels, {}),
            (msif.duplicate, {}),
            (msif.out_of_distribution, {"other": msif.Examples(torch.eye(3), [0, 1, 0])}),
        )
        for usual in ({"examples": msif.Examples(torch.eye(3), [0, 1, 0])} | HALF,)
        for name, bad in (("examples", EXAMPLES), ("fraction", FRACTION), ("seed", SEED))
    },
    "flip_labels: transition": (
        lambda m, v: msif.flip_labels(m.data, 0.5, 0, transition=v),
        (
            3,
            "ab",
            [],
            {},
            {0: 3},
            {0: 0},
            {3: 0},
            [[0.5, 0.5]] * 2,
            torch.ones(3, 3),
            [[NAN] * 3] * 3,
        ),
    ),
    "flip_labels: examples?": (
        lambda m, v: msif.flip_labels(v, 0.5, 0),
        (msif.Examples(torch.eye(3), [0, 0, 0]), msif.Examples(torch.eye(3), [0.5] * 3)),
    ),
    "duplicate: copies": (lambda m, v: msif.duplicate(m.data, 0.5, 0, copies=v), COUNT),
    "duplicate: ids": (
        lambda m, v: msif.duplicate(msif.Examples(torch.eye(2), [0, 1], v), 0.5, 0),
        ([-1, 0], [0, 2**62]),
    ),
    "out_of_distribution: other": (
        lambda m, v: msif.out_of_distribution(m.data, v, 0.5, 0),
        EXAMPLES,
    ),
    "plant: examples": (lambda m, v: msif.plant(v, [0], label=0), EXAMPLES),
    "plant: group": (
        lambda m, v: msif.plant(m.data, v, label=0),
        (
            None,
            3,
            "a",
            [],
            [6],
            [-1],
            [1, 1],
            [0.5],
            [True],
            [[1]],
        ),
    ),
    "plant: label": (
        lambda m, v: msif.plant(m.data, [1, 2], label=v),
        (3, "a", [0], {}, {0: 3}, {1: 1}, NAN),
    ),
    "plant: patch": (
        lambda m, v: msif.plant(m.data, [0], label=1, patch=v),
        (3, "a", [], [0.0], torch.ones(3, 3), torch.ones(2, 1, 1), torch.ones(1, 1, 1, 1)),
    ),
    # ---- models and losses ----
    "EmbeddingHead: embedding": (
        lambda m, v: msif.EmbeddingHead(v, nn.Linear(2, 2)),
        (None, 3, torch.tanh, nn.Linear),
    ),
    "EmbeddingHead: head": (
        lambda m, v: msif.EmbeddingHead(nn.Linear(2, 2), v),
        (None, 3, torch.tanh, nn.Linear),
    ),
    "mlp: in_features": (settings(msif.mlp, "in_features", classes=2), COUNT),
    "mlp: hidden": (
        lambda m, v: msif.mlp(4, v, classes=2),
        (3, 1.5, None, "8", (0,), (1.5,), (True,), ("8",), (None,), {}),
    ),
    "mlp: classes": (settings(msif.mlp, "classes", in_features=4), COUNT),
    "mlp: activation": (
        settings(msif.mlp, "activation", in_features=4, classes=2),
        ("tanh", None, 3, torch.tanh, nn.Tanh(), lambda: None, nn.Linear),
    ),
    "mlp: zero_head": (settings(msif.mlp, "zero_head", in_features=4, classes=2), SWITCH),
    "mlp: seed": (settings(msif.mlp, "seed", in_features=4, classes=2), SEED),
    "softmax_regression: in_features": (lambda m, v: msif.softmax_regression(v, 2), COUNT),
    "softmax_regression: classes": (lambda m, v: msif.softmax_regression(4, v), COUNT),
    "softmax_regression: seed": (lambda m, v: msif.softmax_regression(4, 2, seed=v), SEED),
    "convnet: in_shape": (
        settings(msif.convnet, "in_shape", classes=2),
        (None, 3, "abc", (1, 8), (1, 2, 2), (0, 8, 8), (1.5, 8, 8), (1, 8, "8"), (1, True, 8)),
    ),
    "convnet: channels": (
        settings(msif.convnet, "channels", in_shape=(1, 8, 8), classes=2),
        (3, None, "8", (0,), (1.5,), (True,), (None,)),
    ),
    "convnet: width": (settings(msif.convnet, "width", in_shape=(1, 8, 8), classes=2), COUNT),
    "convnet: classes": (settings(msif.convnet, "classes", in_shape=(1, 8, 8)), COUNT),
    "convnet: activation": (
        settings(msif.convnet, "activation", in_shape=(1, 8, 8), classes=2),
        ("tanh", None, torch.tanh, lambda: None),
    ),
    "convnet: norm_groups": (
        settings(msif.convnet, "norm_groups", in_shape=(1, 8, 8), classes=2),
        (0, -1, 3, 1.5, True, "2", [2], NAN),
    ),
    "convnet: seed": (settings(msif.convnet, "seed", in_shape=(1, 8, 8), classes=2), SEED),
    "wrap: model": (lambda m, v: msif.wrap(v, lambda m, b: m(b)), (None, 3, nn.Linear, "net")),
    "wrap: call": (lambda m, v: msif.wrap(m.net, v), (None, 3, "call", [])),
    "cross_entropy: outputs": (
        lambda m, v: msif.cross_entropy(v, torch.tensor([0])),
        (None, [1.0], torch.tensor(1.0), torch.ones(2, 3), torch.ones(3)),
    ),
    "cross_entropy: targets": (
        lambda m, v: msif.cross_entropy(torch.ones(1, 2), v),
        (None, [0], torch.tensor([0, 1]), torch.tensor([[0, 1]])),
    ),
    "cross_entropy: weight": (
        lambda m, v: msif.cross_entropy(torch.ones(1, 2), torch.tensor([0]), weight=v),
        (3, "ab", [1.0], [1.0, -1.0], [1.0, NAN], [[1.0, 1.0]], torch.ones(2) > 0, {}),
    ),
    "cross_entropy: label_smoothing": (
        lambda m, v: msif.cross_entropy(torch.ones(1, 2), torch.tensor([0]), label_smoothing=v),
        (-0.1, 1.1, NAN, True, "0.1", None, [0.1]),
    ),
    "mean_squared_error: outputs": (
        lambda m, v: msif.mean_squared_error(v, torch.ones(2)),
        (None, [1.0], torch.ones(3), torch.tensor(1.0)),
    ),
    "mean_squared_error: targets": (
        lambda m, v: msif.mean_squared_error(torch.ones(2), v),
        (None, [1.0], torch.ones(3), torch.tensor(1.0)),
    ),
    "next_token_loss: outputs": (
        lambda m, v: msif.next_token_loss(v, torch.tensor([[0, 1]])),
        (None, torch.ones(1, 2), torch.ones(2, 2, 2), torch.ones(1, 3, 2)),
    ),
    "next_token_loss: tokens": (
        lambda m, v: msif.next_token_loss(torch.ones(1, 2, 2), v),
        (None, torch.tensor([0, 1]), torch.tensor([[0]])),
    ),
    # ---- stages, links, recipes, pipeline ----
    "Stage: name": (lambda m, v: stage(m, name=v), (None, 3, "", ["a"])),
    "Stage: model": (lambda m, v: stage(m, model=v), (3, "net", nn.Linear, {}, lambda x: x)),
    "Stage: data": (lambda m, v: stage(m, data=v), (3, [], torch.ones(2), ([[1.0]], [0]))),
    "Stage: loss": (
        lambda m, v: stage(m, loss=v),
        (None, 3, "mse", nn.MSELoss, nn.CrossEntropyLoss(), lambda z, y: 1.0),
    ),
    "Stage: weight_decay": (
        lambda m, v: stage(m, weight_decay=v),
        (None, -1.0, NAN, INF, True, "1", [0.1], {}, {"*": -1}, {"x": 1.0}, {3: 1.0}),
    ),
    "Stage: recipe": (lambda m, v: stage(m, recipe=v), (None, 3, "sgd", msif.SGD, msif.LBFGS)),
    "Stage: link": (linked, (None, 3, "frozen", msif.Frozen, 0.5)),
    "Frozen: shared": (
        lambda m, v: linked(m, msif.Frozen(v)),
        (3, "none", [], ["nope"], {}, {"a": 3}, [3], lambda n: False),
    ),
    "Proximal: shared": (lambda m, v: linked(m, msif.Proximal(1.0, v)), (3, "none", ["nope"])),
    "WarmStart: shared": (lambda m, v: linked(m, msif.WarmStart(v)), (3, "none", ["nope"])),
    "Proximal: alpha": (settings(msif.Proximal, "alpha"), POSITIVE),
    "LBFGS: tol": (settings(msif.LBFGS, "tol"), (0, -1.0, NAN, INF, True, "1", [1])),
    "LBFGS: max_iter": (settings(msif.LBFGS, "max_iter"), COUNT),
    "LBFGS: history": (settings(msif.LBFGS, "history"), COUNT),
    "LBFGS: polish_up_to": (settings(msif.LBFGS, "polish_up_to"), (-1, 1.5, True, "3", None)),
    **{
        f"{kind.__name__}: {name}": (settings(kind, name, **({"lr": 0.1} | usual)), bad)
        for kind in (msif.SGD, msif.Adam, msif.AdamW)
        for name, bad, usual in (
            ("lr", (*POSITIVE, {}, {"*": -1.0}, {"*": 0.0}, {"*": NAN}, {"*": "1"}, {3: 0.1}), {}),
            ("epochs", COUNT, {}),
            ("batch_size", COUNT, {}),
            ("warmup", (-1, 0.5, True, "3", None), {}),
            ("seed", SEED, {}),
            ("schedule", (None, 3, "step", [0.1], type), {}),
            ("clip", (0.0, -1.0, NAN, INF, True, "1", [1.0]), {}),
            ("batches", (3, "a", [], [3], [[]], [[0.5]], [[True]], [[-1]], [["a"]], type), {}),
            ("stop", COUNT_OR_NONE, {}),
        )
    },
    "SGD: momentum": (settings(msif.SGD, "momentum", lr=0.1), (-0.1, 1.0, NAN, True, "0", None)),
    "SGD: nesterov": (settings(msif.SGD, "nesterov", lr=0.1), ("yes", None, 2, 0.5)),
    "SGD.equivalent_alpha: m": (lambda m, v: msif.SGD(0.1).equivalent_alpha(v), COUNT),
    "Adam: betas": (settings(msif.Adam, "betas"), (0.9, None, (0.9,), (0.9, 1.0), ("a", 0))),
    "Adam: eps": (settings(msif.Adam, "eps"), POSITIVE),
    "Pipeline: stages": (lambda m, v: msif.Pipeline(v), (None, 3, [], [3], "ab", {}, (None,))),
    "Pipeline.fit: progress": (lambda m, v: m.untrained.fit(v), ("no", None, 2)),
    "Pipeline.adopt: checkpoints": (
        lambda m, v: m.untrained.adopt(v),
        (3, "a", [], [3], [None, None], {}),
    ),
    "Pipeline.index: stage": (lambda m, v: m.pipeline.index(v), STAGE),
    "Pipeline.objective: stage": (lambda m, v: m.pipeline.objective(v), STAGE),
    "Pipeline.curvature: stage": (lambda m, v: m.pipeline.curvature(v), STAGE),
    "Pipeline.curvature: kind": (lambda m, v: m.pipeline.curvature(0, v), NAME),
    "Pipeline.gradient: stage": (lambda m, v: m.pipeline.gradient(v), STAGE),
    "Pipeline.evaluate: queries": (lambda m, v: m.pipeline.evaluate(v), EXAMPLES),
    "Pipeline.evaluate: target": (lambda m, v: m.pipeline.evaluate(m.data, v), TARGET),
    "Pipeline.evaluate: aggregate": (
        lambda m, v: m.pipeline.evaluate(m.data, aggregate=v),
        AGGREGATE,
    ),
    "Pipeline.retrain: weights": (
        lambda m, v: m.pipeline.retrain(v, progress=False),
        (None, 3, "a", [], {}, [1.0], [NAN] * 6, torch.ones(2, 5), [["a"] * 6], {0: None}),
    ),
    "Pipeline.retrain: stage": (
        lambda m, v: m.pipeline.retrain({v: torch.ones(6)}, progress=False),
        ("other", 2, -3, None, 0.5),
    ),
    "Pipeline.retrain: warm_start": (
        lambda m, v: m.pipeline.retrain(torch.ones(6), warm_start=v, progress=False),
        SWITCH,
    ),
    "Pipeline.to: targets": (
        lambda m, v: m.pipeline.to(v),
        ("other", None, 3, torch.int64, "meta", [torch.float64], torch.complex64),
    ),
    "Pipeline.save: path": (lambda m, v: m.pipeline.save(v), (None, 3, [], "")),
    "Pipeline.load: path": (lambda m, v: m.pipeline.load(v), (None, 3, [], "")),
    "Retrained.evaluate: queries": (lambda m, v: m.retrained.evaluate(v), EXAMPLES),
    "Retrained.evaluate: target": (lambda m, v: m.retrained.evaluate(m.data, v), TARGET),
    "Retrained.state: stage": (lambda m, v: m.retrained.state(v, 0), STAGE),
    "Retrained.state: lane": (lambda m, v: m.retrained.state(0, v), (2, -3, *WHOLE)),
    "Run: checkpoints": (
        run,
        (3, "ab", [], [(0, {})], [1, 2], [(0, None), (1, None)], [("a", {}), ("b", {})]),
    ),
    "Run: rates": (
        lambda m, v: run(m, rates=v),
        (None, "a", [], [0.1, 0.1], -0.1, NAN, [NAN], ["a"], True, {}),
    ),
    "Run: optimizer": (lambda m, v: run(m, optimizer=v), (3, "sgd", msif.SGD, torch.optim.SGD)),
    "Run: batches": (lambda m, v: run(m, batches=v), (3, "a", [], [[9]], [[0.5]], [["a"]], [None])),
    "Run: clip": (
        lambda m, v: run(m, optimizer=trained_by(m), clip=v, norms=[1.0]),
        (0.0, -1.0, NAN, INF, True, "1", [1.0]),
    ),
    "Run: norms": (
        lambda m, v: run(m, optimizer=trained_by(m), clip=1.0, norms=v),
        (None, "a", [], [NAN], [-1.0], [1.0, 1.0], ["a"], {}),
    ),
    "Run: means": (lambda m, v: run(m, means=v), (3, "a", [], [3], [{}])),
    # ---- influence ----
    "ImplicitInfluence: solver": (
        settings(msif.ImplicitInfluence, "solver"),
        ("exact", 3, msif.Exact, [], True),
    ),
    "ImplicitInfluence: curvature": (settings(msif.ImplicitInfluence, "curvature"), NAME),
    "ImplicitInfluence: damping": (settings(msif.ImplicitInfluence, "damping"), DAMPING),
    "ImplicitInfluence: leave_one_out": (
        settings(msif.ImplicitInfluence, "leave_one_out"),
        SWITCH,
    ),
    "ImplicitInfluence.fit: pipeline": (lambda m, v: msif.ImplicitInfluence().fit(v), PIPELINE),
    "ImplicitInfluence.score: top": (lambda m, v: m.implicit.score(m.data, top=v), COUNT_OR_NONE),
    **{
        f"{name}.score: {argument}": (
            functools.partial(
                lambda m, v, name, argument: getattr(m, name).score(
                    **{"queries": m.data} | {argument: v}
                ),
                name=name,
                argument=argument,
            ),
            bad,
        )
        for name in ("implicit", "unrolled", "segmented", "dot")
        for argument, bad in (
            ("queries", EXAMPLES),
            ("stage", STAGE),
            ("target", TARGET),
            ("aggregate", AGGREGATE),
        )
    },
    "UnrolledInfluence: memory": (settings(msif.UnrolledInfluence, "memory"), MEMORY),
    "UnrolledInfluence: segments": (settings(msif.UnrolledInfluence, "segments"), COUNT_OR_NONE),
    "UnrolledInfluence: group_fraction": (
        settings(msif.UnrolledInfluence, "group_fraction"),
        (-0.1, 1.0, NAN, True, "0.1", None, [0.1]),
    ),
    "UnrolledInfluence: leave_one_out": (
        settings(msif.UnrolledInfluence, "leave_one_out"),
        SWITCH,
    ),
    "UnrolledInfluence: probes": (settings(msif.UnrolledInfluence, "probes"), COUNT),
    "UnrolledInfluence.fit: pipeline": (lambda m, v: msif.UnrolledInfluence().fit(v), PIPELINE),
    "UnrolledInfluence.plan: pipeline": (lambda m, v: m.unrolled.plan(v, 3), PIPELINE),
    "UnrolledInfluence.plan: queries": (
        lambda m, v: m.unrolled.plan(m.pipeline, v),
        (0, -1, 1.5, True, "3", None),
    ),
    "UnrolledInfluence.check: n": (lambda m, v: m.unrolled.check(v), (7, *COUNT)),
    "UnrolledInfluence.check: queries": (lambda m, v: m.unrolled.check(1, v), EXAMPLES[1:]),
    "UnrolledInfluence.check: stage": (lambda m, v: m.unrolled.check(1, stage=v), STAGE),
    "UnrolledInfluence.check: steps": (
        lambda m, v: m.unrolled.check(1, steps=v),
        (0.1, "a", [0.0], [-0.1], [NAN], [INF], ["a"], [True], []),
    ),
    "UnrolledInfluence.check: seed": (lambda m, v: m.unrolled.check(1, seed=v), SEED),
    "SegmentedInfluence: segments": (settings(msif.SegmentedInfluence, "segments"), COUNT),
    "SegmentedInfluence: krylov": (settings(msif.SegmentedInfluence, "krylov"), COUNT_OR_NONE),
    "SegmentedInfluence: curvature": (settings(msif.SegmentedInfluence, "curvature"), NAME),
    "SegmentedInfluence: curvature_examples": (
        settings(msif.SegmentedInfluence, "curvature_examples"),
        COUNT_OR_NONE,
    ),
    "SegmentedInfluence: dynamics": (settings(msif.SegmentedInfluence, "dynamics"), NAME),
    "SegmentedInfluence: details": (settings(msif.SegmentedInfluence, "details"), SWITCH),
    "SegmentedInfluence: memory": (settings(msif.SegmentedInfluence, "memory"), MEMORY),
    "SegmentedInfluence: n_jobs": (settings(msif.SegmentedInfluence, "n_jobs"), (0, *WHOLE)),
    "SegmentedInfluence.fit: pipeline": (lambda m, v: msif.SegmentedInfluence().fit(v), PIPELINE),
    "SegmentedInfluence.plan: pipeline": (lambda m, v: m.segmented.plan(v, 3), PIPELINE),
    "SegmentedInfluence.plan: queries": (
        lambda m, v: m.segmented.plan(m.pipeline, v),
        (0, -1, 1.5, True, "3", None),
    ),
    "SegmentedInfluence.check: queries": (lambda m, v: m.segmented.check(v), EXAMPLES[1:]),
    "SegmentedInfluence.check: stage": (lambda m, v: m.segmented.check(stage=v), STAGE),
    "Influence: values": (
        lambda m, v: msif.Influence(v, torch.arange(2), torch.arange(1)),
        (None, 3, [[1.0, 2.0]], torch.ones(2, 1), torch.tensor([[1.0, NAN]]), torch.tensor(1.0)),
    ),
    "Influence: ids": (
        lambda m, v: msif.Influence(torch.ones(1, 2), v, torch.arange(1)),
        (None, 3, [0, 1], torch.arange(3), torch.ones(2)),
    ),
    "Influence: query_ids": (
        lambda m, v: msif.Influence(torch.ones(1, 2), torch.arange(2), v),
        (None, 3, [0], torch.arange(3), torch.ones(1)),
    ),
    "Influence[queries]: queries": (
        lambda m, v: m.scores[v],
        (6, -7, 1.5, "a", None, [], [9], [0.5], [[0]], [True], {}),
    ),
    "Influence.helpful: k": (lambda m, v: m.scores.helpful(v), (7, *COUNT)),
    "Influence.harmful: k": (lambda m, v: m.scores.harmful(v), (7, *COUNT)),
    "Influence.removal_effect: indices": (
        lambda m, v: m.scores.removal_effect(v),
        (None, "a", [], [9], [-1], [0, 0], [0.5], [True], 1.5, ["a"], {}),
    ),
    "Influence.concatenate: parts": (
        lambda m, v: msif.Influence.concatenate(v),
        (None, 3, [], [3], "ab", {}),
    ),
    "Influence.save: path": (lambda m, v: m.scores.save(v), (None, 3, [], "")),
    "Influence.load: path": (lambda m, v: msif.Influence.load(v), (None, 3, [], "")),
    "TopInfluence.helpful: k": (
        lambda m, v: m.top.helpful(v),
        (7, 0, -1, 1.5, True, "3", [2], NAN),
    ),
    "TopInfluence.harmful: k": (lambda m, v: m.top.harmful(v), (7, 0, 1.5, True, "3")),
    "plan: pipeline": (lambda m, v: msif.plan(v), PIPELINE),
    "plan: queries": (lambda m, v: msif.plan(m.pipeline, v), COUNT),
    "plan: memory": (lambda m, v: msif.plan(m.pipeline, memory=v), MEMORY),
    "plan: kind": (lambda m, v: msif.plan(m.pipeline, kind=v), NAME),
    "plan: damping": (lambda m, v: msif.plan(m.pipeline, damping=v), DAMPING),
    "Plan.solver: stage": (
        lambda m, v: msif.Plan((), 1, 1).solver(v),
        ("other", None, 0),
    ),
    "reduced_precision: kind": (
        lambda m, v: msif.reduced_precision(v, m.pipeline).__enter__(),
        NAME,
    ),
    "reduced_precision: pipeline": (
        lambda m, v: msif.reduced_precision("tf32", v).__enter__(),
        PIPELINE,
    ),
    "reduced_precision: curvature": (
        lambda m, v: msif.reduced_precision("tf32", m.pipeline, v).__enter__(),
        NAME,
    ),
    # ---- baselines ----
    **{
        f"{kind.__name__}.fit: pipeline": (
            functools.partial(lambda m, v, kind: kind().fit(v), kind=kind),
            PIPELINE,
        )
        for kind in (msif.Loss, msif.Entropy, msif.TracIn, msif.SingleStage)
    },
    "Random: seed": (settings(msif.Random, "seed"), SEED),
    "GradientDot: cosine": (settings(msif.GradientDot, "cosine"), SWITCH),
    "TracIn: checkpoints": (settings(msif.TracIn, "checkpoints"), COUNT),
    "RepresentationSimilarity: layer": (
        lambda m, v: msif.RepresentationSimilarity(v).fit(m.pipeline).score(m.data),
        (3, "nope", ["head"], True),
    ),
    "SingleStage: solver": (settings(msif.SingleStage, "solver"), ("exact", 3, msif.Exact, [])),
    "SingleStage: curvature": (settings(msif.SingleStage, "curvature"), NAME),
    "SingleStage: damping": (settings(msif.SingleStage, "damping"), DAMPING),
    "all_baselines: solver": (settings(msif.all_baselines, "solver"), ("exact", 3, msif.Exact)),
    # ---- curvature and solvers ----
    **{
        f"{kind.__name__}: {name}": (
            functools.partial(
                lambda m, v, kind, name: kind(
                    **{"objective": m.objective, "full": m.full} | {name: v}
                ),
                kind=kind,
                name=name,
            ),
            bad,
        )
        for kind in (msif.Hessian, msif.GGN)
        for name, bad in (
            ("objective", (None, 3, nn.Linear(2, 2))),
            ("full", (None, 3, [1.0], torch.ones(3))),
            ("weights", (3, [1.0], torch.ones(3), torch.full((6,), NAN), "a")),
        )
    },
    "Operator: size": (
        lambda m, v: msif.Operator(v, torch.float32, torch.device("cpu")),
        COUNT,
    ),
    "operator @ v: tensor": (
        lambda m, v: m.operator @ v,
        (None, 3, [1.0], torch.ones(3), torch.tensor(1.0), torch.ones(25).double()),
    ),
    "operator + v: add": (
        lambda m, v: m.operator + v,
        (None, "a", [1.0], torch.ones(3), torch.ones(2, 2), True, NAN, INF),
    ),
    "v * operator: multiplied": (
        lambda m, v: v * m.operator,
        (None, [1.0], torch.ones(3), True, NAN),
    ),
    "dense: memory": (lambda m, v: m.operator.dense(v), MEMORY),
    "per_example_gradients: objective": (
        lambda m, v: list(msif.per_example_gradients(v, m.full)),
        (None, 3),
    ),
    "per_example_gradients: full": (
        lambda m, v: list(msif.per_example_gradients(m.objective, v)),
        (None, [1.0], torch.ones(3)),
    ),
    "per_example_gradients: examples": (
        lambda m, v: list(msif.per_example_gradients(m.objective, m.full, v)),
        EXAMPLES[1:],
    ),
    "per_example_gradients: function": (
        lambda m, v: list(msif.per_example_gradients(m.objective, m.full, function=v)),
        (3, "loss"),
    ),
    "example_products: objective": (
        lambda m, v: msif.example_products(v, m.full, torch.ones(25, 1)),
        (None, 3),
    ),
    "example_products: full": (
        lambda m, v: msif.example_products(m.objective, v, torch.ones(len(m.full), 1)),
        (None, [1.0], torch.ones(3)),
    ),
    "example_products: vectors": (
        lambda m, v: msif.example_products(m.objective, m.full, v),
        (None, 3, [1.0], torch.ones(3), torch.ones(3, 2)),
    ),
    "example_products: examples": (
        lambda m, v: msif.example_products(m.objective, m.full, torch.ones(len(m.full), 1), v),
        EXAMPLES[1:],
    ),
    "example_products: mode": (
        lambda m, v: msif.example_products(m.objective, m.full, torch.ones(len(m.full), 1), mode=v),
        NAME,
    ),
    "Exact: memory": (settings(msif.Exact, "memory"), MEMORY),
    **{
        f"{kind.__name__}.prepare: operator": (
            functools.partial(lambda m, v, kind: kind().prepare(v), kind=kind),
            (None, 3, wrong),
        )
        for kind, wrong in (
            *((kind, torch.ones(2, 3)) for kind in (msif.ConjugateGradient, msif.MINRES)),
            (msif.LiSSA, torch.ones(3)),
            # what takes the stage's examples apart needs more than a matrix
            *((kind, torch.eye(2)) for kind in (msif.Exact, msif.LowRank, msif.Jacobi, msif.EKFAC)),
        )
    },
    **{
        f"{kind.__name__}.solve: right-hand sides": (
            functools.partial(
                lambda m, v, kind: kind().prepare(m.operator + 1.0).solve(v), kind=kind
            ),
            (None, 3, [1.0], torch.ones(3), torch.ones(3, 1), "a"),
        )
        for kind in (msif.Exact, msif.ConjugateGradient, msif.MINRES, msif.LowRank, msif.Jacobi)
    },
    **{
        f"{kind.__name__}: {name}": (settings(kind, name), bad)
        for kind in (msif.ConjugateGradient, msif.MINRES, msif.LiSSA)
        for name, bad in (
            ("tol", (0.0, 1.0, -1.0, NAN, True, "1", None, [0.1])),
            ("max_iter", COUNT),
            ("strict", SWITCH),
            ("callback", (3, "print", [])),
        )
    },
    **{
        f"{kind.__name__}: {name}": (settings(kind, name), bad)
        for kind in (msif.LowRank, msif.Jacobi, msif.EKFAC)
        for name, bad in (
            ("tol", (0.0, -1.0, NAN, True, "1", None, [0.1])),
            ("max_iter", COUNT),
            ("seed", SEED),
            ("strict", SWITCH),
            ("callback", (3, "print")),
        )
    },
    "ConjugateGradient: block": (settings(msif.ConjugateGradient, "block"), COUNT),
    "ConjugateGradient: shares": (
        settings(msif.ConjugateGradient, "shares"),
        (0.1, None, "a", (0.3, 0.1), (0.0,), (1.0,), (NAN,), ("a",), (None,), (True,)),
    ),
    "ConjugateGradient: preconditioner": (
        settings(msif.ConjugateGradient, "preconditioner"),
        (3, "jacobi", msif.Jacobi, []),
    ),
    "LiSSA: scale": (settings(msif.LiSSA, "scale"), (0.0, -1.0, NAN, INF, True, "1", [1])),
    "LiSSA: batch_size": (settings(msif.LiSSA, "batch_size"), COUNT_OR_NONE),
    "LiSSA: seed": (settings(msif.LiSSA, "seed"), SEED),
    "LowRank: rank": (settings(msif.LowRank, "rank"), COUNT),
    "LowRank: method": (settings(msif.LowRank, "method"), NAME),
    "LowRank: memory": (settings(msif.LowRank, "memory"), MEMORY),
    "Jacobi: samples": (settings(msif.Jacobi, "samples"), COUNT),
    "EKFAC: samples": (settings(msif.EKFAC, "samples"), COUNT_OR_NONE),
    "EKFAC: batch_size": (settings(msif.EKFAC, "batch_size"), COUNT),
    "schur_complement: matrix": (
        lambda m, v: msif.schur_complement(v, torch.tensor([0])),
        (None, 3, [[1.0]], torch.ones(3), torch.ones(2, 3), torch.eye(2) * NAN),
    ),
    "schur_complement: keep": (
        lambda m, v: msif.schur_complement(torch.eye(3), v),
        (None, "a", [], [9], [0.5], [0, 0], [[0]], [True]),
    ),
    "Spectrum.apply: columns": (
        lambda m, v: msif.Spectrum(torch.ones(2), torch.eye(2)).apply(lambda s: s, v),
        (None, 3, torch.ones(2), torch.ones(3, 1)),
    ),
    # ---- ground truth ----
    "removal_effects: pipeline": (lambda m, v: removals(m, pipeline=v), PIPELINE),
    "removal_effects: queries": (lambda m, v: removals(m, queries=v), EXAMPLES),
    "removal_effects: subsets?": (lambda m, v: removals(m, subsets=v), SUBSETS),
    "removal_effects: stage": (lambda m, v: removals(m, stage=v), STAGE),
    "removal_effects: target": (lambda m, v: removals(m, target=v), TARGET),
    "removal_effects: aggregate": (lambda m, v: removals(m, aggregate=v), AGGREGATE),
    "removal_effects: protocol": (lambda m, v: removals(m, protocol=v), ("cold", 3, True, [])),
    "removal_effects: n_jobs": (lambda m, v: removals(m, n_jobs=v), (0, *WHOLE)),
    "removal_effects: lanes": (lambda m, v: removals(m, lanes=v), COUNT),
    "removal_effects: store": (lambda m, v: removals(m, store=v), (3, [], "")),
    "random_removals: m": (lambda m, v: msif.random_removals(v, 1), COUNT),
    "random_removals: count": (lambda m, v: msif.random_removals(9, v), (10, *COUNT)),
    "random_removals: fraction": (
        lambda m, v: msif.random_removals(9, 1, v),
        (0.0, 1.0, -0.5, NAN, INF, True, "0.1", [0.1], 0.01),
    ),
    "random_removals: seed": (lambda m, v: msif.random_removals(9, 1, seed=v), SEED),
    "Effects.from_values: before": (
        lambda m, v: values(m, before=v),
        (3, "a", [], [NAN, 0.0], [[0.0, 0.0]], ["a", "b"]),
    ),
    "Effects.from_values: after": (
        lambda m, v: values(m, after=v),
        (3, "a", [], torch.zeros(3, 2), torch.full((2, 3), INF), [["a"] * 3] * 2),
    ),
    "Effects.from_values: subsets?": (lambda m, v: values(m, subsets=v), SUBSETS[:3] + SUBSETS[4:]),
    "Effects.from_values: like": (lambda m, v: values(m, like=v), (3, "a", torch.ones(2, 3))),
    "Effects.from_values: stage": (lambda m, v: values(m, stage=v), (None, 3, [])),
    "Effects.from_values: query_ids": (
        lambda m, v: values(m, query_ids=v),
        (3, "a", [0], [0.5, 1.5], [True, False], ["a", "b"]),
    ),
    "Effects.from_values: target": (lambda m, v: values(m, target=v), (None, 3, [])),
    "Effects.from_values: protocol": (lambda m, v: values(m, protocol=v), (None, 3, [])),
    "Effects.save: path": (lambda m, v: m.effects.save(v), (None, 3, [], "")),
    "Effects.load: path": (lambda m, v: msif.Effects.load(v), (None, 3, [], "")),
    "agreement: scores": (lambda m, v: msif.agreement(v, m.effects), (None, 3, torch.ones(2, 2))),
    "agreement: effects": (lambda m, v: msif.agreement(m.scores, v), (None, 3, [1.0])),
    "agreement: resamples": (lambda m, v: msif.agreement(m.scores, m.effects, resamples=v), COUNT),
    "agreement: seed": (lambda m, v: msif.agreement(m.scores, m.effects, seed=v), NUMPY_SEED),
    "Agreement.mean: statistic": (
        lambda m, v: m.report.mean(v),
        ("other", None, 3, "predicted", "pooled"),
    ),
    # ---- acting on scores ----
    "intervene: pipeline": (
        lambda m, v: msif.intervene(v, torch.arange(6.0), test=m.data, progress=False),
        (None, 3, "p", []),
    ),
    "intervene: ranking": (lambda m, v: intervene(m, ranking=v), RANKING),
    **{
        f"intervene: {name}": (lambda m, v, name=name: intervene(m, **{name: v}), bad)
        for name, bad in (
            ("test", EXAMPLES),
            ("validation", (3, "q", [], torch.ones(2, 4))),
            ("held_out", (3, "q", [], torch.ones(2, 4))),
            ("action", NAME),
            ("fraction", (0.0, -1.0, 1.5, 1.0, 0.01, NAN, True, "1", None, [], [0.5, 0.51])),
            ("weight", (2.0, "a", [1.0])),
            ("labels", (2, "a", [0] * 6)),
            ("seeds", (0, -1, 1.5, True, "3", None, [], [1, 1], [0.5], [-1])),
            ("stage", STAGE),
            ("other_tasks", (3, "a", [], {"a": 3}, {"a": (1, 2)})),
            ("n_jobs", (0, *WHOLE)),
            ("lanes", COUNT),
            ("store", (3, "", ["a"])),
        )
    },
    "intervene, reweight: weight": (
        lambda m, v: intervene(m, action="reweight", weight=v),
        (None, -1.0, NAN, INF, True, "1", [1.0], torch.full((6,), -1.0)),
    ),
    "intervene, repeat: weight": (
        lambda m, v: intervene(m, action="repeat", weight=v),
        (0, 1, 1.5, True, "2", [2]),
    ),
    "intervene, relabel: labels": (
        lambda m, v: intervene(m, action="relabel", labels=v),
        (3, "a", [0], [3] * 6, [-1] * 6, [0.5] * 6, [True] * 6),
    ),
    "detection: scores": (lambda m, v: msif.detection(v, [1]), (None, 3, "a", [], [[1.0]], [NAN])),
    "detection: truth": (
        lambda m, v: msif.detection(torch.arange(6.0), v),
        (None, 3, "a", [], [6], [-1], [0.5], [True], torch.zeros(6, dtype=torch.bool)),
    ),
    "detection: k": (
        lambda m, v: msif.detection(torch.arange(6.0), [1], k=v),
        (0, -1, 7, 1.5, True, "3", [2]),
    ),
    "detection: resamples": (
        lambda m, v: msif.detection(torch.arange(6.0), [1], resamples=v),
        COUNT,
    ),
    "detection: seed": (lambda m, v: msif.detection(torch.arange(6.0), [1], seed=v), NUMPY_SEED),
    "predicted_gain: scores": (lambda m, v: msif.predicted_gain(v), (None, 3, "a", [1.0])),
    "predicted_gain: fraction": (
        lambda m, v: msif.predicted_gain(m.averaged, v),
        (0.0, -1.0, 1.5, 0.01, NAN, True, "1", None, [], [0.5, 0.51]),
    ),
    "predicted_gain: losses": (
        lambda m, v: msif.predicted_gain(m.averaged, 0.5, losses=v),
        (3, "a", [], [1.0], [NAN, 1.0], [INF, 1.0]),
    ),
    "stability: rankings": (
        lambda m, v: msif.stability(v),
        (None, 3, "a", [], {}, {"a": 3}, {"a": {}}, {"a": {"b": [1.0, 2.0]}}, {"a": [1.0, 2.0]}),
    ),
    "stability: top": (
        lambda m, v: msif.stability({"a": torch.eye(3)}, v),
        (0.0, 1.0, -1, NAN, True, "1", None, 0.01),
    ),
    "bootstrap_scores: pipeline": (
        lambda m, v: msif.bootstrap_scores(v, msif.GradientDot(), m.data),
        PIPELINE,
    ),
    "bootstrap_scores: method": (
        lambda m, v: msif.bootstrap_scores(m.pipeline, v, m.data, progress=False),
        (None, 3, "dot"),
    ),
    "bootstrap_scores: queries": (
        lambda m, v: msif.bootstrap_scores(m.pipeline, msif.GradientDot(), v, progress=False),
        EXAMPLES,
    ),
    "bootstrap_scores: resamples": (
        lambda m, v: msif.bootstrap_scores(m.pipeline, msif.GradientDot(), m.data, resamples=v),
        COUNT,
    ),
    "bootstrap_scores: seed": (
        lambda m, v: msif.bootstrap_scores(m.pipeline, msif.GradientDot(), m.data, seed=v),
        SEED,
    ),
    "out_of_fold: pipeline": (lambda m, v: msif.out_of_fold(v), PIPELINE),
    "out_of_fold: stage": (lambda m, v: msif.out_of_fold(m.pipeline, v), STAGE),
    "out_of_fold: folds": (
        lambda m, v: msif.out_of_fold(m.pipeline, folds=v),
        (0, 1, -1, 3, 1.5, True, "3", None, [2]),
    ),
    "out_of_fold: seed": (
        lambda m, v: msif.out_of_fold(m.pipeline, folds=2, seed=v),
        NUMPY_SEED,
    ),
    "controls: runs": (lambda m, v: msif.controls(v, m.data), (None, 3, "p", [], [3])),
    "controls: validation": (lambda m, v: msif.controls(m.pipeline, v, ["loss"]), EXAMPLES),
    "controls: names": (
        lambda m, v: msif.controls(m.pipeline, m.data, v),
        (3, "loss", [], ["other"], [3], ["oracle"]),
    ),
    "controls: stage": (
        lambda m, v: msif.controls(m.pipeline, m.data, ["loss"], stage=v),
        STAGE,
    ),
    "controls: truth": (
        lambda m, v: msif.controls(m.pipeline, m.data, ["oracle"], truth=v),
        (3, "a", [], [6], [-1], [0.5]),
    ),
    "controls: seed": (
        lambda m, v: msif.controls(m.pipeline, m.data, ["random"], seed=v),
        NUMPY_SEED,
    ),
    **{
        f"Interventions.summary: {name}": (
            lambda m, v, name=name: m.interventions.summary(**{name: v}),
            bad,
        )
        for name, bad in (
            ("task", NAME),
            ("measure", NAME),
            ("against", NAME),
            ("level", (0.0, 1.0, -1, NAN, True, "1", None)),
        )
    },
    "intervention_changes: report": (
        lambda m, v: plots.intervention_changes(v),
        (None, 3, []),
    ),
    "Retrained.outputs: stage": (lambda m, v: m.retrained.outputs(m.data, v), STAGE),
    "Retrained.outputs: examples": (lambda m, v: m.retrained.outputs(v), EXAMPLES),
    "Retrained.with_last: pipeline": (lambda m, v: m.retrained.with_last(v), PIPELINE),
    "compare_methods: scores": (
        lambda m, v: msif.compare_methods(v, {"one": m.effects}),
        (None, 3, {}, [], {"a": 3}, {"a": []}, {"a": [3]}),
    ),
    "compare_methods: effects": (
        lambda m, v: msif.compare_methods({"a": m.scores}, v),
        (None, 3, {}, [], {"one": 3}, {"one": []}, {"one": [3]}),
    ),
    "compare_methods: resamples": (
        lambda m, v: msif.compare_methods({"a": m.scores}, {"one": m.effects}, resamples=v),
        COUNT,
    ),
    "compare_methods: seed": (
        lambda m, v: msif.compare_methods({"a": m.scores}, {"one": m.effects}, seed=v),
        NUMPY_SEED,
    ),
    "method_table: table": (lambda m, v: msif.method_table(v), (None, 3, [])),
    "method_table: statistic": (lambda m, v: msif.method_table(m.table, v), NAME),
    "method_table: columns": (
        lambda m, v: msif.method_table(m.table, columns=v),
        ("other", None, 3, ["other"]),
    ),
    "noise_ceiling: effects": (
        lambda m, v: msif.noise_ceiling(v),
        (None, 3, {}, [], {"one": 3}, {"one": []}, {"one": [3, 3]}),
    ),
    "noise_ceiling: resamples": (
        lambda m, v: msif.noise_ceiling({"one": [m.effects, m.effects]}, resamples=v),
        COUNT,
    ),
    "noise_ceiling: seed": (
        lambda m, v: msif.noise_ceiling({"one": [m.effects, m.effects]}, seed=v),
        NUMPY_SEED,
    ),
    "check: exercise": (lambda m, v: msif.check(v, 1.0), (None, 3, "99-9", [])),
    # ---- pictures and explorers ----
    "pipeline_diagram: pipeline": (lambda m, v: plots.pipeline_diagram(v), PIPELINE),
    "influence_grid: scores": (
        lambda m, v: plots.influence_grid(v, m.data, m.data),
        (None, 3, torch.ones(6, 6)),
    ),
    "influence_grid: examples": (
        lambda m, v: plots.influence_grid(m.scores, v, m.data),
        EXAMPLES,
    ),
    "influence_grid: queries": (lambda m, v: plots.influence_grid(m.scores, m.data, v), EXAMPLES),
    "influence_grid: query": (
        lambda m, v: plots.influence_grid(m.scores, m.data, m.data, v, k=2),
        (6, -7, *WHOLE),
    ),
    "influence_grid: k": (
        lambda m, v: plots.influence_grid(m.scores, m.data, m.data, k=v),
        (7, *COUNT),
    ),
    "agreement_scatter: report": (lambda m, v: plots.agreement_scatter(v), (None, 3, [])),
    "method_intervals: table": (lambda m, v: plots.method_intervals(v), (None, 3, [])),
    "method_intervals: statistics": (
        lambda m, v: plots.method_intervals(m.table, v),
        (3, (), ("other",), "r", None),
    ),
    "method_intervals: removals": (
        lambda m, v: plots.method_intervals(m.table, removals=v),
        ("other", 3),
    ),
    "v_curve: steps": (lambda m, v: plots.v_curve(v, [0.1]), (None, 0.1, [], ["a"], [0.0], [-1])),
    "v_curve: errors": (
        lambda m, v: plots.v_curve([0.1, 0.2], v),
        (None, 0.1, [], ["a", "b"], [0.1], torch.ones(2, 2, 2)),
    ),
    "v_curve: labels": (lambda m, v: plots.v_curve([0.1], [0.1], labels=v), (3, ["a", "b"])),
    "filter_curves: eigenvalues": (
        lambda m, v: plots.filter_curves(v, [0.1]),
        (None, "a", [], [NAN], ["a"]),
    ),
    "filter_curves: alphas": (
        lambda m, v: plots.filter_curves([1.0], v),
        (None, 0.1, "a", [0.0], [-1], [NAN], [INF], ["a"], [True]),
    ),
    "filter_curves: times": (
        lambda m, v: plots.filter_curves([1.0], [0.1], v),
        (None, 0.1, "a", [0.0], [NAN], ["a"]),
    ),
    **{
        f"{kind.__name__}: {name}": (
            functools.partial(
                lambda m, v, kind, name, scored: kind(
                    **{"pipeline": m.pipeline, "queries": m.data}
                    | ({"scores": scored(m)} if scored else {})
                    | {"k": 2, name: v}
                ),
                kind=kind,
                name=name,
                scored=scored,
            ),
            bad,
        )
        for kind, scored, more in (
            (
                widgets.InfluenceExplorer,
                lambda m: m.scores,
                (("scores", (None, 3, {}, [], [3])), ("target", (3, "loss"))),
            ),
            (
                widgets.MethodComparison,
                lambda m: {"a": m.scores, "b": m.scores},
                (("scores", (None, 3, {}, [])),),
            ),
            (
                widgets.CleaningExplorer,
                lambda m: m.scores,
                (
                    ("scores", (None, 3, {}, "a", [NAN] * 6, [1.0])),
                    ("corrupted", (3, "a", [], [9], [-1], [0.5], [True], torch.zeros(6).bool())),
                    ("judges", EXAMPLES[1:]),
                ),
            ),
            (
                widgets.AlphaDampingExplorer,
                None,
                (("curvature", NAME), ("effects", (3, "a", []))),
            ),
        )
        for name, bad in (
            ("pipeline", (*PIPELINE, {})),
            ("queries", EXAMPLES),
            ("k", (7, *COUNT)),
            *more,
        )
    },
    "CleaningExplorer: stage": (
        lambda m, v: widgets.CleaningExplorer(m.pipeline, [1.0] * 6, m.data, stage=v, k=2),
        STAGE,
    ),
    "CleaningExplorer: seeds": (
        lambda m, v: widgets.CleaningExplorer(m.pipeline, [1.0] * 6, m.data, seeds=v, k=2),
        COUNT,
    ),
    "CleaningExplorer.try_out: ranking": (lambda m, v: m.cleaning.try_out(v, 1), ("other", 3, [])),
    "CleaningExplorer.try_out: count": (lambda m, v: m.cleaning.try_out("", v), (6, *COUNT)),
    "CleaningExplorer.curve: ranking": (lambda m, v: m.cleaning.curve(v), ("other", 3, [])),
    "InfluenceExplorer.pick: query": (lambda m, v: m.explorer.pick(query=v), (6, -1, *WHOLE[:3])),
    "InfluenceExplorer.pick: example": (lambda m, v: m.explorer.pick(example=v), (6, -1, 1.5, "a")),
    "InfluenceExplorer.pick: case": (lambda m, v: m.explorer.pick(case=v), ("other", 3, [])),
    "FigureSlider: draw": (lambda m, v: widgets.FigureSlider(v, [1], "x"), (None, 3, "draw")),
    "FigureSlider: values": (
        lambda m, v: widgets.FigureSlider(lambda v: None, v, "x"),
        (None, 3, []),
    ),
    "FigureSlider: description": (
        lambda m, v: widgets.FigureSlider(lambda v: None, [1], v),
        (None, 3, []),
    ),
    "FigureSlider: start": (
        lambda m, v: widgets.FigureSlider(lambda v: None, [1], "x", v),
        (2, "a", []),
    ),
    "FigureSlider: alt": (
        lambda m, v: widgets.FigureSlider(lambda v: None, [1], "x", alt=v),
        (3, "words"),
    ),
    # ---- experiments and studies ----
    "experiments.digits: link": (lambda m, v: experiments.digits(v), (None, 3, msif.Frozen)),
    **{
        f"experiments.digits: {name}": (settings(experiments.digits, name, link=msif.Frozen()), bad)
        for name, bad in (
            ("size", NAME),
            ("seed", SEED[:-1]),
            ("data_seed", SEED),
            ("net", NAME),
            ("pretraining", COUNT),
            ("finetuning", COUNT),
            ("queries", COUNT),
            ("lr", POSITIVE),
            ("epochs", (3, (1,), (0, 1), (1.5, 1), None, "ab")),
            ("batch_size", (3, (1,), (0, 1), (1.5, 1), None)),
            ("weight_decay", (-1.0, NAN, None, "1", [0.1])),
        )
    },
    "experiments.mnist: net": (settings(experiments.mnist, "net", link=msif.Frozen()), NAME),
    "mnist_at_optimum: net": (
        settings(experiments.mnist_at_optimum, "net", link=msif.Frozen()),
        NAME,
    ),
    "studies.run: experiment": (lambda m, v: studies.run(v), (None, 3, "digits")),
    **{
        f"studies.study: {name}": (settings(studies.study, name, **{"setting": "digits"}), bad)
        for name, bad in (
            ("setting", NAME),
            ("links", ("frozen", 3, ["other"], [3])),
            ("seeds", COUNT),
            ("removals", COUNT),
            ("kinds", ("one", 3, [], ["other"], None)),
            ("size", NAME),
            ("n_jobs", (0, *WHOLE)),
            ("ways", (None, 3, "scorers")),
        )
    },
}
CALLS = [(use, i) for use, (_, values) in USES.items() for i in range(len(values))]


def words(value):
    """What a message may say of a value: itself, its type, its shape, or what is wrong in it."""
    found = {repr(value), str(value), type(value).__name__}
    if isinstance(value, type) or callable(value):
        found |= {getattr(value, "__name__", ""), "a class", "gives"}
    if isinstance(value, torch.Tensor | numpy.ndarray):
        found |= {str(tuple(value.shape)), str(value.dtype), "nan", "NaN", "only zeros"}
        found |= {str(len(value))} if value.ndim else set()
    elif isinstance(value, int | float):
        found |= {"()", "NaN or inf"} if not math.isfinite(value) else {"shape ()", "() must"}
    elif isinstance(value, list | tuple | dict | set | str):
        parts = list(value.values() if isinstance(value, dict) else value)
        parts += [inner for part in parts if isinstance(part, list | tuple) for inner in part]
        found |= {str(len(value)), f"({len(value)},"} | (set() if value else {"empty", "[]"})
        found |= {repr(part) for part in parts} | {type(part).__name__ for part in parts}
        found |= {"NaN or inf", "negative"}
    return found - {""}


def complaint(use, i):
    """What is wrong with how a bad call is refused; empty if nothing is."""
    call, values = USES[use]
    value = values[i]
    argument = use.partition(": ")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(made(), value)
    except (ValueError, TypeError, MsifError, OSError) as error:
        text, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
        if Path(last.filename).is_relative_to(PACKAGE) is False:
            return f"raised by {last.filename}, {type(error).__name__}: {text}"
        if not re.search(rf"(?<!\w){argument}(?!\w)", text):
            return f"does not name {argument}, {type(error).__name__}: {text}"
        if not any(word in text for word in words(value)):
            return f"does not say what was found, {type(error).__name__}: {text}"
        return ""
    except IndexError as error:  # the protocol of sequences, on which loops over them rely
        return "" if "[" in use and argument in str(error) else f"IndexError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(("use", "i"), CALLS, ids=[f"{u} {USES[u][1][i]!r:.40}" for u, i in CALLS])
def test_a_bad_argument_is_named_with_what_was_found(use, i):
    assert complaint(use, i) == "", USES[use][1][i]


def test_the_table_is_not_a_sample():
    assert len(CALLS) >= 330
    named = {use.partition(":")[0].partition(".")[0].partition("[")[0] for use in USES}
    for name in ("Examples", "Pipeline", "Run", "Influence", "Effects", "agreement", "plan"):
        assert name in named
