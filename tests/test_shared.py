"""What a stage takes over: wrapped models against the same pipeline with plain names.

For each wrapper, as the second stage and as the first, the scores are those of plain names; with
one parameter renamed the pipeline refuses. One mapped pipeline is also rerun by a plain loop.
"""

import ast
import copy
import functools
import re
import threading
from collections import OrderedDict

import pytest
import torch
from oracles import (
    F64,
    central_differences,
    close,
    draw,
    implicit_scores,
    random_examples,
    relative_error,
    same,
    unrolled_scores,
)
from torch import nn
from torch.nn import functional

import msif_lab as msif
from msif_lab.objective import Objective
from msif_lab.objective.last_layer import find_last_layer
from msif_lab.objective.wrapping import plain_module, seen_through
from msif_lab.pipeline.sharing import shared_parameters
from msif_lab.widgets.background import Stopped, stoppable_copy

CLASSES = 3  # in both stages, so that names and shapes alone would share the classifier too
SGD = msif.SGD(0.2, momentum=0.5, epochs=3, batch_size=8)
LINKS = {"frozen": msif.Frozen, "proximal": lambda **s: msif.Proximal(0.3, **s)}
LINKS["warm"] = msif.WarmStart

# ---- Models ----


class Adapted(nn.Linear):
    """A layer with a low-rank correction, all of it under plain names."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(draw(1, inputs, seed=7)), nn.Parameter(draw(outputs, 1))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class LoraLayer(nn.Module):
    """The same with the names that peft gives."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = nn.Linear(layer.in_features, layer.out_features).double()
        self.base_layer.load_state_dict(layer.state_dict(), strict=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, layer.out_features, bias=False)})
        self.lora_A["default"].weight = nn.Parameter(layer.a.detach().clone())
        self.lora_B["default"].weight = nn.Parameter(layer.b.detach().clone())

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Renamed(nn.Linear):
    """A layer whose weight is called otherwise."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.kernel = nn.Parameter(self.weight.detach().clone())
        del self.weight

    def forward(self, x):
        return functional.linear(x, self.kernel, self.bias)


class Net(nn.Module):
    def __init__(self, seed, second=nn.Linear, first=nn.Linear):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = first(5, 4), nn.Tanh(), second(4, 4), nn.Tanh()
            self.body, self.fc = nn.Sequential(*layers), nn.Linear(4, CLASSES)
        self.double()

    def forward(self, x):
        return self.fc(self.body(x))


class Outer(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


class Model(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class PeftLike(nn.Module):
    def __init__(self, net):
        super().__init__()
        if isinstance(net.body[0], Adapted):
            net.body[0] = LoraLayer(net.body[0])
        self.base_model = Model(net)

    def forward(self, x):
        return self.base_model(x)


WRAPPERS = {
    "class": Outer,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "parallel": nn.DataParallel,
    "peft": PeftLike,
    "sequential": lambda net: nn.Sequential(net.body, net.fc),
    "compiled inside": lambda net: compiled_body(net),
    "compiled in place": lambda net: net.compile(backend="eager") or net,
    "parallel, compiled": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}
# Asked for by name, as the second stage and as the first; the others are seen through.
ASKED = {
    "class": ({"base.body.": "body."}, {"body.": "base.body."}),
    "sequential": ({"0.": "body."}, {"body.": "0."}),
}


def compiled_body(net):
    net.body = torch.compile(net.body, backend="eager")
    return net


def task(n, seed):
    return random_examples(n, (5,), CLASSES, False, seed)


QUERIES = task(4, 30)


def two_stages(first, second, link, recipe=None):
    recipe = recipe or msif.LBFGS()
    settings = {"weight_decay": 0.05, "recipe": recipe}
    return msif.Pipeline(
        [
            msif.Stage("one", first, task(20, 10), **settings),
            msif.Stage("two", second, task(16, 20), link=link, **settings),
        ]
    )


def scores(pipeline, link):
    """Of the first stage's examples, by the method that fits the link."""
    pipeline.fit(progress=False)
    if link == "warm":
        return unrolled_scores(pipeline, QUERIES)
    return implicit_scores(pipeline, QUERIES)


def run(link):
    return SGD if link == "warm" else None


@functools.cache
def plain_scores(first, second, link):
    models = Net(0, first=first), Net(1, first=second)
    return scores(two_stages(*models, LINKS[link](), run(link)), link)


def asked_for(build):
    """The mapping that the error prints, as one would paste it."""
    with pytest.raises(ValueError, match=r"by shared=\{") as caught:
        build()
    assert "'two'" in str(caught.value) and "'one'" in str(caught.value)
    return ast.literal_eval(re.search(r"by shared=(\{.*?\})", str(caught.value))[1])


# ---- Wrappers ----


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_second_stage_gives_the_scores_of_plain_names(wrapper, link):
    layer = Adapted if wrapper == "peft" else nn.Linear
    expected = plain_scores(nn.Linear, layer, link)

    def build(**shared):
        model = WRAPPERS[wrapper](Net(1, first=layer))
        return two_stages(Net(0), model, LINKS[link](**shared), run(link))

    shared = {}
    if wrapper in ASKED:
        shared = {"shared": asked_for(build)}
        assert shared["shared"] == ASKED[wrapper][0]
    close(scores(build(**shared), link), expected, 1e-10)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_first_stage_gives_the_scores_of_plain_names(wrapper, link):
    layer = Adapted if wrapper == "peft" else nn.Linear
    expected = plain_scores(layer, nn.Linear, link)

    def build(**shared):
        model = WRAPPERS[wrapper](Net(0, first=layer))
        return two_stages(model, Net(1), LINKS[link](**shared), run(link))

    shared = {}
    if wrapper == "peft":  # what it has learned is in the adapters too
        asked = asked_for(build)
        shared = {"shared": asked}
    elif wrapper in ASKED:
        shared = {"shared": asked_for(build)}
        assert shared["shared"] == ASKED[wrapper][1]
    close(scores(build(**shared), link), expected, 1e-10)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_renamed_parameter_is_refused(wrapper):
    """It would start afresh: the scores would be others, and nobody told."""

    def build(**shared):
        return two_stages(Net(0), WRAPPERS[wrapper](Net(1, Renamed)), msif.Frozen(**shared))

    def turned(**shared):
        return two_stages(WRAPPERS[wrapper](Net(0, Renamed)), Net(1), msif.Frozen(**shared))

    for make in (build, turned):
        mapping = asked_for(make)
        assert any("kernel" in name for pair in mapping.items() for name in pair)
        assert len(make(shared=mapping).functional(1).shared) == 4
    if wrapper in ASKED:  # the mapping of the intact one does not hide it either
        with pytest.raises(ValueError, match=r"look the same; add \{'.*kernel'"):
            build(shared=ASKED[wrapper][0])
    pipeline = build(shared=asked_for(build))
    expected = plain_scores(nn.Linear, nn.Linear, "frozen")
    close(scores(pipeline, "frozen"), expected, 1e-10)
    # Named one by one, a mapping is taken at its word; this is what silence would have given.
    known = {h: t for h, t in pipeline.functional(1).shared.items() if "kernel" not in h}
    assert relative_error(scores(build(shared=known), "frozen"), expected) > 1e-2


def test_fit_writes_into_the_wrapper_and_the_module_inside():
    for name in ("compiled", "averaged", "parallel"):
        inner = Net(1)
        wrapper = WRAPPERS[name](inner)
        pipeline = two_stages(Net(0), wrapper, msif.Frozen(), SGD).fit(progress=False)
        assert pipeline.stages[1].model is wrapper
        inside = plain_module(wrapper)
        assert (inside is inner) == (name != "averaged")  # which holds a copy
        with torch.no_grad():
            assert relative_error(inside(QUERIES.x), Net(1)(QUERIES.x)) > 1e-2
            close(wrapper(QUERIES.x), inside(QUERIES.x), 0.0)
        again = pipeline.retrain(torch.ones(20), progress=False)
        assert same(again.state("two", 0), dict(wrapper.named_parameters()))
        stop = threading.Event()
        o = stoppable_copy(pipeline, stop).objective(1)  # that an explorer works on
        stop.set()
        with pytest.raises(Stopped):
            o.outputs(o.layout.flatten(o.model), QUERIES.x)


@pytest.mark.filterwarnings("ignore:EKFAC:msif_lab.ConvergenceWarning")
@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_compiled_inside_is_never_compiled_and_can_be_sent(in_place):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    net = Net(1)
    if in_place:
        net.compile(backend=backend)
    else:
        net.body = torch.compile(net.body, backend=backend)
    pipeline = two_stages(Net(0), net, msif.Proximal(0.3)).fit(progress=False)
    plain = two_stages(Net(0), Net(1), msif.Proximal(0.3)).fit(progress=False)
    for solver in (msif.EKFAC(samples=None), msif.Exact()):
        rows = [implicit_scores(p, QUERIES, solver, curvature="ggn") for p in (pipeline, plain)]
        close(*rows, 1e-10, solver)
    assert not compiled
    net(QUERIES.x)  # outside, the compiler is on as before
    assert compiled
    pipeline = two_stages(Net(0), compiled_body(Net(1)), msif.Frozen(), SGD).fit(progress=False)
    cloudpickle = pytest.importorskip("cloudpickle")  # by which joblib sends to other processes
    sent = cloudpickle.loads(cloudpickle.dumps(pipeline))
    assert same(sent.trained(), pipeline.trained())


def test_modules_inside_wrappers():
    net = Net(0)
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # without the processes that it would talk to
    distributed.module = nn.DataParallel(net)
    assert plain_module(distributed) is net
    for call in (msif.wrap(WRAPPERS["compiled"](net), calling), msif.wrap(net, calling)):
        assert set(two_stages(Net(1), call, msif.Frozen()).functional(1).shared.values()) == {
            f"body.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
        }


def calling(model, batch):
    return model(batch)


def test_names_seen_through():
    for name in ("_orig_mod.module.body.0.bias", "base_model.model.body.0.base_layer.bias"):
        assert seen_through(name) == "body.0.bias"
    assert seen_through("fc.modules_to_save.default.weight") == "fc.weight"
    for name in ("my_module.weight", "module", "base_model.body.w", "fc.original_module.weight"):
        assert seen_through(name) == name
    assert seen_through("base_model.model.") == ""


def test_a_name_that_two_parameters_would_have_is_not_seen_through():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.module = nn.Linear(5, 4), nn.ModuleDict({"body": nn.Linear(5, 4)})
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.fc(torch.tanh(self.body(x) + self.module["body"](x)))

    class Other(Both):
        def __init__(self):
            super().__init__()
            del self.body, self.module
            self._orig = nn.Linear(5, 4)
            self.base = nn.ModuleDict({"body": nn.Linear(5, 4)})

        def forward(self, x):
            return self.fc(torch.tanh(self._orig(x) + self.base["body"](x)))

    both = two_stages(Both().double(), Both().double(), msif.Frozen()).functional(1)
    assert all(here == there for here, there in both.shared.items()) and len(both.shared) == 4
    with pytest.raises(ValueError, match="by shared="):
        two_stages(Both().double(), Other().double(), msif.Frozen())


# ---- The run by a plain loop, and differences ----

MAPPED = {"base.body.": "body."}


@pytest.mark.parametrize("link", ["frozen", "warm"])
def test_a_mapped_run_equals_a_plain_loop_and_its_differences(link):
    """The loop knows nothing of names: it copies the tensors by hand."""
    recipe = msif.SGD(0.2, momentum=0.0, epochs=3, batch_size=8)
    pipeline = two_stages(Net(0), Outer(Net(1)), LINKS[link](shared=MAPPED), recipe)
    pipeline.fit(progress=False)

    def train(model, data, weights, trained):
        for batch, rate in recipe.steps(len(data)):
            losses = functional.cross_entropy(model(data.x[batch]), data.y[batch], reduction="none")
            risk = (weights[batch] * losses).mean()
            risk = risk + 0.05 / 2 * sum((p**2).sum() for p in trained)
            steps = torch.autograd.grad(risk, trained)
            with torch.no_grad():
                for parameter, step in zip(trained, steps, strict=True):
                    parameter -= rate * step

    def loop(i, h):
        one, two = Net(0), Net(1)
        weights = torch.ones(20, dtype=F64)
        weights[i] += h
        train(one, pipeline.stages[0].data, weights, list(one.parameters()))
        two.body.load_state_dict(one.body.state_dict())
        trained = list(two.fc.parameters() if link == "frozen" else two.parameters())
        train(two, pipeline.stages[1].data, torch.ones(16, dtype=F64), trained)
        with torch.no_grad():
            return functional.cross_entropy(two(QUERIES.x), QUERIES.y, reduction="none")

    close(pipeline.evaluate(QUERIES), loop(0, 0.0), 1e-12)
    found = unrolled_scores(pipeline, QUERIES)[:, :3]
    truth = torch.stack([(loop(i, 1e-4) - loop(i, -1e-4)) / 2e-4 for i in range(3)], 1)
    close(found, truth, 1e-6)


@pytest.mark.parametrize("link", ["frozen", "proximal"])
def test_implicit_scores_under_a_mapping_equal_finite_differences(link):
    pipeline = two_stages(Net(0), Outer(Net(1)), LINKS[link](shared=MAPPED)).fit(progress=False)
    truth = central_differences(pipeline, QUERIES, 0, [0, 5, 11], optimum=True)
    assert relative_error(implicit_scores(pipeline, QUERIES)[:, [0, 5, 11]], truth) < 1e-4


def test_three_stages_hand_back_through_both_mappings():
    """Frozen twice: only the first stage trains what all use."""

    def build(second, third, links):
        pipeline = two_stages(Net(0), second, links[0])
        last = msif.Stage("three", third, task(12, 25), weight_decay=0.05, link=links[1])
        return msif.Pipeline([*pipeline.stages, last])

    plain = build(Net(1), Net(2), [msif.Frozen(), msif.Frozen()])
    links = [msif.Frozen(shared=MAPPED), msif.Frozen(shared={"0.": "base.body."})]
    mapped = build(Outer(Net(1)), WRAPPERS["sequential"](Net(2)), links)
    close(scores(mapped, "frozen"), scores(plain, "frozen"), 1e-10)
    assert len(mapped.functional(2).live & set(mapped.functional(2).frozen)) == 4
    for attributor in (msif.GradientDot(), msif.SingleStage()):
        rows = [attributor.fit(p).score(QUERIES).values for p in (mapped, plain)]
        close(*rows, 1e-10)


# ---- Mappings ----


def pair(shared, first=None, second=None):
    second = Outer(Net(1)) if second is None else second
    return two_stages(first or Net(0), second, msif.Frozen(shared=shared))


def test_mappings_by_name_and_by_prefix():
    name = "base.body.0.weight"
    assert pair({name: "body.0.weight"}).functional(1).shared == {name: "body.0.weight"}
    every = two_stages(Net(0), Outer(Net(1)), msif.Proximal(1.0, shared={"base.": ""}))
    assert len(every.functional(1).coupled) == 6  # at its word: the classifier too
    both = pair({"base.body.2.": "body.2.", "base.body.": "body."}).functional(1)
    assert list(both.shared) == [f"base.body.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
    swapped = {"base.body.2.bias": "body.0.bias", "base.body.0.bias": "body.2.bias"}
    assert pair(swapped).functional(1).shared == dict(reversed(swapped.items()))
    wrapped = WRAPPERS["compiled"](Net(1))  # by the names that the wrapper shows
    assert len(pair({"_orig_mod.body.": "body."}, second=wrapped).functional(1).shared) == 4
    assert len(pair("_orig_mod.body.", second=wrapped).functional(1).shared) == 4
    with pytest.raises(ValueError, match="no parameter is shared"):
        pair("_orig_mod.", second=wrapped)  # not everything, as an empty prefix would be
    one = {"_orig_mod.body.0.bias": "module.body.0.bias"}
    assert pair(one, second=wrapped).functional(1).shared == {"body.0.bias": "body.0.bias"}


REFUSED = {
    "unknown here": ({"body.0.weight": "body.0.weight"}, "'body.0.weight' here | base.body"),
    "unknown there": ({"base.body.0.weight": "body.w"}, "'body.w' in stage 'one' | body.0.weight"),
    "half a prefix": (
        {"base.": "body"},
        "'base.' here | 'body' in stage 'one' | dot on both sides",
    ),
    "empty prefix": ({"body.": "body."}, "{'body.': 'body.'} reaches no parameter | base.body.0"),
    "numbers": ({"base.body.0.weight": 3}, "names to names | ('base.body.0.weight', 3)"),
    "shapes": (
        {"base.body.0.weight": "body.2.weight"},
        "'base.body.0.weight' (there 'body.2.weight') | (4, 5) here but (4, 4) | leave it out",
    ),
    "two to one": (
        {"base.body.0.bias": "body.0.bias", "base.body.2.bias": "body.0.bias"},
        "'base.body.0.bias' and 'base.body.2.bias' to one parameter 'body.0.bias' | map one",
    ),
    "nothing": ({}, "no parameter is shared | shared={} | a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_mappings_are_refused_by_name(case):
    shared, says = REFUSED[case]
    with pytest.raises(ValueError, match="stage 'two'") as caught:
        pair(shared)
    assert all(piece in str(caught.value) for piece in says.split(" | ")), str(caught.value)


# ---- Neither trained nor taken over, and what is only not used ----


def test_a_frozen_parameter_that_is_not_taken_over_is_refused():
    second = Net(1)
    second.body[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 parameter\(s\) .*'body\.2\.weight'.*buffers"):
        pair("body.0.", second=second)
    assert pair("body.", second=second).functional(1).frozen  # taken over
    second.fc.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'fc\.weight', 'fc\.bias'"):
        pair(None, second=second)
    # In the first stage it is a constant of the user's own.
    first = Net(0)
    first.body[0].requires_grad_(False)
    assert pair(MAPPED, first=first).functional(1).live.isdisjoint({"base.body.0.weight"})


def test_what_peft_keeps_of_a_copied_layer_is_no_loss():
    class Copied(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.original_module = copy.deepcopy(layer).requires_grad_(False)
            self.modules_to_save = nn.ModuleDict({"default": layer})

        def forward(self, x):
            return self.modules_to_save["default"](x)

    net = Net(1, first=Adapted)
    net.fc = Copied(net.fc)
    peft = PeftLike(net)
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora" in name or "modules_to_save" in name)
    found = pair(None, second=peft).functional(1)
    assert [seen_through(n) for n in found.frozen] == list(found.shared.values())
    assert list(found.shared.values()) == [
        f"body.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    ]
    trained = found.objective.trained_names
    assert [n for n in trained if "lora" not in n] == [
        f"base_model.model.fc.modules_to_save.default.{n}" for n in ("weight", "bias")
    ]


def test_a_decoder_that_is_not_used_later_is_no_loss():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
            self.decoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))
            self.double()

        def forward(self, x):
            return self.decoder(self.encoder(x))

    class Classifier(Coder):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(4, CLASSES, dtype=F64)

    data = task(20, 10)
    stages = [
        msif.Stage("one", Coder(), msif.Examples(data.x, data.x), msif.mean_squared_error),
        msif.Stage("two", Classifier(), data, link=msif.Frozen()),
    ]
    assert set(msif.Pipeline(stages).functional(1).shared) == {
        f"encoder.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }


def necked(name, behind):
    """A body, a layer of this name, and ``behind`` for what comes before the classifier."""
    parts = {"body": nn.Linear(5, 4), name: nn.Linear(4, 4), **behind, "fc": nn.Linear(4, CLASSES)}
    return nn.Sequential(OrderedDict(parts)).double()


def test_a_layer_called_alike_is_asked_about_and_both_answers_can_be_pasted():
    def build(shared=None):
        models = (necked(name, {"top": nn.Linear(4, 4)}) for name in ("neck", "throat"))
        return pair(shared, *models)

    with pytest.raises(ValueError, match=r"'throat\.weight' .there 'neck\.weight'") as caught:
        build()
    found = [ast.literal_eval(m) for m in re.findall(r"shared=(\{.*?\})", str(caught.value))]
    assert [len(build(mapping).functional(1).shared) for mapping in found] == [6, 4]
    # Behind all that is shared it is a new layer.
    shared = pair(None, necked("neck", {}), necked("throat", {})).functional(1).shared
    assert list(shared) == ["body.weight", "body.bias"]
    # Where more is called alike than is shared, the backbone itself may have other names.
    models = necked("neck", {"top": nn.Linear(4, 4)}), necked("throat", {"cap": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"'cap\.weight' .there 'top\.weight'"):
        pair(None, *models)


# ---- Rebuilt of the children of a model: only their order is left ----


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.tanh(x + self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """With the names of a ResNet: the stem's are those of a block, and all blocks are alike."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.tanh = nn.Tanh()
            self.layer1, self.layer2 = nn.Sequential(Block(), Block()), nn.Sequential(Block())
            self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, CLASSES)
        self.double().eval()

    def forward(self, x):
        x = self.layer2(self.layer1(self.tanh(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def children(net):
    return list(net.children())[:-1]


def deeper(net):
    hidden = nn.Linear(4, 4).double()
    return nn.Sequential(nn.Sequential(*children(net)), nn.Flatten(), hidden, nn.Tanh(), net.fc)


REBUILT = {
    "nested": lambda net: nn.Sequential(nn.Sequential(*children(net)), nn.Flatten(), net.fc),
    "flat": lambda net: nn.Sequential(*children(net), nn.Flatten(), net.fc),
}


def pictures(n, seed):
    data = task(n, seed)
    return msif.Examples(draw(n, 1, 4, 4, seed=seed), data.y)


def residual_stages(first, second, link):
    settings = {"weight_decay": 0.05, "recipe": SGD}
    stages = [
        msif.Stage("one", first.eval(), pictures(12, 1), **settings),
        msif.Stage("two", second.eval(), pictures(10, 2), link=link, **settings),
    ]
    return msif.Pipeline(stages)


def true_partners(net, rebuilt):
    """By the parameters themselves, which both hold; the classifier's are none."""
    names = {id(p): name for name, p in net.named_parameters() if not name.startswith("fc.")}
    every = rebuilt.named_parameters()
    return {name: names[id(p)] for name, p in every if id(p) in names}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("how", REBUILT)
def test_a_model_rebuilt_of_children_gives_the_scores_of_plain_names(how, turned):
    first, second = Residual(0), Residual(1)
    plain = residual_stages(Residual(0), Residual(1), msif.WarmStart()).fit(progress=False)
    truth = true_partners(second, REBUILT[how](second))
    if turned:
        truth = {plain: name for name, plain in truth.items()}
        first = REBUILT[how](first)
    else:
        second = REBUILT[how](second)

    def build(link=msif.WarmStart, **shared):
        return residual_stages(first, second, link(**shared))

    asked = asked_for(build)
    assert len(asked) == 4 and all(name.endswith(".") for name in asked)
    pipeline = build(shared=asked)
    assert len(truth) == 21 and pipeline.functional(1).shared == truth
    queries = pictures(3, 3)
    pipeline.fit(progress=False)
    close(unrolled_scores(pipeline, queries), unrolled_scores(plain, queries), 1e-10)
    build(msif.Frozen, shared=asked).fit(progress=False)
    here, there = dict(second.named_parameters()), dict(first.named_parameters())
    assert all(torch.equal(here[name], there[other]) for name, other in truth.items())
    for name in asked:  # without one of its prefixes it is refused
        with pytest.raises(ValueError, match="look the same; add"):
            build(shared={n: other for n, other in asked.items() if n != name})


def test_a_mapping_that_takes_the_stem_into_a_block_is_refused():
    """All shapes agree; the stem itself is left out on one side and a block's norm on the other."""
    wrong = {"0.3.0.bn1.": "bn1.", "0.3.0.conv1.": "layer1.0.conv1.", "0.3.1.": "layer1.1."}
    wrong |= {f"0.3.0.{n}2.": f"layer1.0.{n}2." for n in ("conv", "bn")} | {"0.4.": "layer2."}

    def build(shared):
        second = REBUILT["nested"](Residual(1))
        return residual_stages(Residual(0), second, msif.Frozen(shared=shared))

    with pytest.raises(ValueError, match=r"look the same; '0\.0.*'conv1\.weight'.*one by one"):
        build(wrong)
    there = dict(Residual(0).named_parameters())
    full = {k + n.removeprefix(v): n for k, v in wrong.items() for n in there if n.startswith(v)}
    shared = build(full).functional(1).shared  # full names are taken at their word
    assert shared == full and len(shared) == 18


@pytest.mark.parametrize("how", [deeper, lambda net: nn.Sequential(*deeper(net))])
def test_a_rebuilt_model_with_a_new_hidden_layer_is_paired_by_prefixes(how):
    first, net = Residual(0), Residual(1)
    second = how(net)
    asked = asked_for(lambda: residual_stages(first, second, msif.Frozen()))
    shared = residual_stages(first, second, msif.Frozen(shared=asked)).functional(1).shared
    assert shared == true_partners(net, second)


# ---- New heads beside a backbone that keeps its names ----


class Scaled(nn.LayerNorm):
    """A norm whose weight is called otherwise."""

    def __init__(self, norm):
        super().__init__(norm.normalized_shape, eps=norm.eps, dtype=norm.weight.dtype)
        self.gamma = nn.Parameter(norm.weight.detach().clone())
        del self.weight

    def forward(self, x):
        return functional.layer_norm(x, self.normalized_shape, self.gamma, self.bias, self.eps)


def rename_a_norm(model):
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    outer, _, own = name.rpartition(".")
    setattr(model.get_submodule(outer), own, Scaled(model.get_submodule(name)))
    return name


def backboned(name, last):
    """An encoder, and a head of two layers of this name."""
    encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4))
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, last))
    return nn.Sequential(OrderedDict({"encoder": encoder, name: head})).double()


@pytest.mark.parametrize(("before", "last"), [("projector", 2), ("decoder", 5)])
def test_a_head_of_several_layers_after_another_one_is_new(before, last):
    data = task(8, 10)
    target = draw(8, last, seed=4)

    def build(second, **shared):
        first = msif.Examples(data.x, target)
        stages = [
            msif.Stage("one", backboned(before, last), first, msif.mean_squared_error),
            msif.Stage("two", second, data, link=msif.Frozen(**shared)),
        ]
        return msif.Pipeline(stages)

    second = backboned("classifier", CLASSES)
    backbone = [n for n, _ in second.named_parameters() if n.startswith("encoder.")]
    assert len(backbone) == 6
    assert build(second).functional(1).shared == {n: n for n in backbone}
    # One parameter of the backbone renamed, or all of it.
    name = f"{rename_a_norm(second)}.gamma"
    asked = asked_for(lambda: build(second))
    shared = build(second, shared=asked).functional(1).shared
    assert shared[name] == "encoder.2.weight" and len(shared) == 6
    parts = {"body": second.encoder, "classifier": second.classifier}
    with pytest.raises(ValueError, match=r"'body\..*there 'encoder\."):
        build(nn.Sequential(OrderedDict(parts)))


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_a_classifier_after_a_masked_language_model_is_new(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 12, "max_position_embeddings": 8, "pad_token_id": 0, "num_labels": 3}
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 4
    if kind == "DistilBert":
        sizes = {"dim": 4, "n_layers": 1, "n_heads": 2, "hidden_dim": 4}
    config = getattr(transformers, f"{kind}Config")(**small, **sizes)
    ids = torch.randint(3, 12, (6, 5), generator=torch.Generator().manual_seed(0))
    first, second = (
        getattr(transformers, f"{kind}For{task}")(config).eval()
        for task in ("MaskedLM", "SequenceClassification")
    )

    def build(**shared):
        def model(module):
            return msif.wrap(module, lambda m, x: m(x).logits)

        def each(outputs, y):
            losses = functional.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none")
            return losses.view(y.shape).mean(1)

        stages = [
            msif.Stage("one", model(first), msif.Examples(ids, ids), each),
            msif.Stage(
                "two",
                model(second),
                msif.Examples(ids, torch.arange(6) % 3),
                link=msif.Proximal(0.1, **shared),
            ),
        ]
        return msif.Pipeline(stages)

    backbone = first.base_model_prefix
    both = dict(first.named_parameters()).keys() & dict(second.named_parameters()).keys()
    expected = {n: n for n, _ in second.named_parameters() if n in both}
    assert all(n.startswith(f"{backbone}.") for n in expected) and len(expected) > 15
    assert build().functional(1).shared == expected
    name = rename_a_norm(second)  # in the backbone: asked about, and nothing else
    asked = asked_for(build)
    assert build(shared=asked).functional(1).shared == {
        n.replace(f"{name}.weight", f"{name}.gamma"): n for n in expected
    }


# ---- The layer that feeds the loss ----


def stage_of(model, x=None, y=None, loss=msif.cross_entropy):
    x = draw(6, 5) if x is None else x
    data = msif.Examples(x, torch.arange(len(x)) % CLASSES if y is None else y)
    return Objective(model.to(x.dtype if x.is_floating_point() else F64).eval(), data, loss)


def vision(name):
    from torchvision import models

    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
    if name == "resnet":
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    return getattr(models, name)(num_classes=CLASSES)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet", "fc"),
        ("vit", "heads.head"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),
    ],
)
def test_the_classifier_of_torchvision_models_is_not_shared(name, last):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stages = [stage_of(vision(name), x) for _ in range(2)]
    before = copy.deepcopy(stages[1].model.state_dict())
    shared = shared_parameters(None, *stages)
    every = dict(stages[1].model.named_parameters())
    assert shared == {n: n for n in every if not n.startswith(f"{last}.")}
    after = stages[1].model.state_dict()
    assert all(torch.equal(after[n], value) for n, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stages[1].model.modules())


class Own(nn.Module):
    """A body, and outputs made by a function of the features and the model."""

    def __init__(self, outputs, **parts):
        super().__init__()
        self.body, self.outputs = nn.Linear(5, 4), outputs
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.outputs(self, torch.tanh(self.body(x)))


def matrix(rows=CLASSES, columns=4):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


def vector(size=CLASSES):
    return nn.Parameter(torch.zeros(size))


LAST = {
    "functional": (
        Own(lambda m, z: functional.linear(z, m.weight, m.bias), weight=matrix(), bias=vector()),
        "weight bias",
    ),
    "prototypes": (
        Own(lambda m, z: functional.normalize(z) @ functional.normalize(m.w).T, w=matrix()),
        "w",
    ),
    "all by hand": (
        Own(
            lambda m, z: torch.tanh(z @ m.a.T + m.b) @ m.c.T + m.d,
            a=matrix(4),
            b=vector(4),
            c=matrix(),
            d=vector(),
        ),
        "c d",
    ),
    "temperature": (
        Own(lambda m, z: m.t * m.fc(z), fc=nn.Linear(4, 3), t=nn.Parameter(torch.tensor(2.0))),
        "fc.weight fc.bias t",
    ),
    "norm": (
        Own(lambda m, z: m.n(m.fc(z)), fc=nn.Linear(4, 3), n=nn.LayerNorm(3)),
        "fc.weight fc.bias n.weight n.bias",
    ),
    "two heads": (
        Own(lambda m, z: torch.cat([m.p(z), m.q(z)], 1), p=nn.Linear(4, 1), q=nn.Linear(4, 2)),
        "p.weight p.bias q.weight q.bias",
    ),
    "hidden layer": (
        Own(
            lambda m, z: m.classifier(z),
            classifier=nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        ),
        "classifier.2.weight classifier.2.bias",
    ),
    "called side by side": (
        Own(lambda m, z: m.fc(z) + m.fc(z**2), fc=nn.Linear(4, 3)),
        "fc.weight fc.bias",
    ),
    "called again": (Own(lambda m, z: m.a(torch.tanh(m.a(z))), a=nn.Linear(4, 4)), ""),
    "weight norm": (
        Own(lambda m, z: m.fc(z), fc=nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        "fc.bias fc.parametrizations.weight.original0 fc.parametrizations.weight.original1",
    ),
    "recurrent": (
        Own(lambda m, z: m.r(z[:, None])[0][:, 0], r=nn.RNN(4, 3, batch_first=True)),
        "r.weight_ih_l0 r.weight_hh_l0 r.bias_ih_l0 r.bias_hh_l0",
    ),
}


@pytest.mark.parametrize("case", LAST)
def test_the_last_layer_is_found_by_the_model(case):
    model, names = LAST[case]
    assert find_last_layer(stage_of(model)).parameters == set(names.split())


@pytest.mark.parametrize("by_module", [True, False])
def test_a_weight_tied_to_the_embedding_is_taken_over(by_module):
    class Language(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.embedding, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.lm = nn.Linear(4, 7, bias=False)
            if tied:
                self.lm.weight = self.embedding.weight

        def forward(self, x):
            z = torch.tanh(self.body(self.embedding(x)))
            return self.lm(z) if by_module else functional.linear(z, self.lm.weight)

    tokens = torch.randint(0, 7, (6, 4), generator=torch.Generator().manual_seed(0))
    text = tokens, tokens, msif.next_token_loss
    assert find_last_layer(stage_of(Language(), *text)).parameters == set()
    assert find_last_layer(stage_of(Language(False), *text)).parameters == {"lm.weight"}
    wrapped = msif.wrap(Language(), call=lambda m, batch: m(batch))
    stages = [stage_of(wrapped, *text) for _ in range(2)]
    assert set(shared_parameters(None, *stages)) == {"embedding.weight", "body.weight", "body.bias"}


def test_a_top_level_head_is_left_out_as_a_whole():
    deep = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    stages = [stage_of(Own(lambda m, z: m.head(z), head=copy.deepcopy(deep))) for _ in range(2)]
    assert set(shared_parameters(None, *stages)) == {"body.weight", "body.bias"}


def test_similarity_takes_the_inputs_of_the_last_layer():
    pipeline = two_stages(Net(0), Net(1), msif.Frozen()).fit(progress=False)
    with torch.no_grad():
        q, f = (pipeline.stages[0].model.body(d.x) for d in (QUERIES, pipeline.stages[0].data))
    expected = functional.cosine_similarity(q[:, None], f[None], dim=2)
    close(msif.RepresentationSimilarity().fit(pipeline).score(QUERIES).values, expected, 1e-12)
    model = LAST["functional"][0]
    data = task(9, 1)
    one = msif.Pipeline([msif.Stage("only", model.double(), data, weight_decay=0.1)])
    with pytest.raises(ValueError, match=r"no single module feeds .*layer=one of body"):
        msif.RepresentationSimilarity().fit(one.fit(progress=False)).score(QUERIES)


def test_a_model_whose_layers_cannot_be_told_apart_is_asked_about():
    class Hidden(Net):
        """Refuses to run with gradients of all its parameters."""

        def forward(self, x):
            if self.body[0].weight.requires_grad and self.fc.weight.requires_grad:
                raise RuntimeError("no")
            return super().forward(x)

    second = Hidden(1)
    second.body.requires_grad_(False)
    with pytest.raises(ValueError, match=r"cannot be told \(RuntimeError: no\); say what"):
        pair(None, second=second)
    with pytest.raises(msif.UnsupportedModelError, match=r"has no gradient in .*: no"):
        pair(
            "body.", second=second
        )  # what is shared is settled, but not how the loss depends on it


# ---- Buffers, words, files ----


def test_running_statistics_of_a_wrapped_backbone_are_compared():
    def net(c):
        body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
        model = nn.Sequential(body, nn.BatchNorm1d(4, affine=False), nn.Linear(4, c))
        return model.double().eval()

    first, second = net(3), Outer(net(3)).eval()
    second.base[0][1].running_mean += 1
    link = msif.Frozen(shared={"base.0.": "0."})
    with pytest.raises(ValueError, match=r"'base\.0\.1\.running_mean' differs .*copy_") as caught:
        two_stages(first, second, link).fit(progress=False)
    after, before = second, first
    exec(re.search(r"(after\.get_buffer.*?\)\))", str(caught.value))[1])
    assert two_stages(before, after, link).fit(progress=False).reports


def test_what_is_shared_is_printed():
    shown = str(two_stages(Net(0), Net(1), msif.Frozen()))
    assert "\n    shares 44 parameters (body.*) with 'one', not fc.*\n" in shown
    shown = str(pair(MAPPED))
    assert "\n    shares 44 parameters (base.body.* from body.*) with 'one'\n" in shown
    shown = str(pair(["body.0.weight", "body.2.bias"], second=Net(1)))
    assert "\n    shares 24 parameters (body.0.weight, body.2.bias) with 'one'\n" in shown
    many = nn.Sequential(*(nn.Linear(5, 5) for _ in range(9)), nn.Linear(5, CLASSES)).double()
    weights = str(pair(lambda n: "weight" in n and n[0] != "9", many, copy.deepcopy(many)))
    assert "(0.weight, 1.weight, 2.weight, 3.weight, ... 9 in all)" in weights


def test_one_prefix_with_two_partners_is_printed_in_full():
    def outputs(m, z):
        return functional.linear(z, m.a.weight, m.b["bias"])

    parts = {"a": nn.Linear(4, CLASSES, bias=False), "b": nn.ParameterDict({"bias": vector()})}
    first = Own(outputs, **parts).double()
    second = Own(lambda m, z: m.x(z), x=nn.Linear(4, CLASSES)).double()
    shown = str(pair({"x.weight": "a.weight", "x.bias": "b.bias"}, first, second))
    assert "(x.* from a.*, x.bias from b.bias)" in shown


def test_files_know_the_mapping_and_nothing_of_wrappers(tmp_path):
    plain = two_stages(Net(0), Net(1), msif.Frozen(), SGD).fit(progress=False)
    assert len(plain.facts()["stages"][1]["link"]) == 4  # as in files of 0.1.0
    plain.save(tmp_path / "plain")
    for name in ("compiled", "averaged", "parallel"):
        again = two_stages(Net(0), WRAPPERS[name](Net(1)), msif.Frozen(), SGD)
        assert torch.equal(again.load(tmp_path / "plain").trained()[1], plain.trained()[1])
    swapped = {"body.0.bias": "body.2.bias", "body.2.bias": "body.0.bias"}
    straight = {name: name for name in swapped}
    pair(swapped, second=Net(1)).fit(progress=False).save(tmp_path / "mapped")
    assert pair(swapped, second=Net(1)).load(tmp_path / "mapped").reports
    with pytest.raises(msif.SavedFileError, match="link is"):
        pair(straight, second=Net(1)).load(tmp_path / "mapped")
