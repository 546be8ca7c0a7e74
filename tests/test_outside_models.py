"""Models from torchvision and torch.nn as people bring them: scored rightly, or refused by name."""

import copy
import pickle

import pytest
import torch
import torchvision
from oracles import draw, relative_error
from outside import Case, check_curvature, check_gradients, check_run, check_scores, plain
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import msif_lab as msif

models = torchvision.models
VOCABULARY = 12


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().double().eval()


def images(n, side=32, seed=0):
    return msif.Examples(draw(n, 3, side, side, seed=seed), torch.arange(n) % 3)


def vision(make, trained=None, side=32):
    """A model of images whose running statistics are those of images, as after training.

    Args:
        trained: beginnings of the names of the parameters that are trained; default all.
    """
    model = seeded(make).train()
    with torch.no_grad():
        for seed in range(5):
            model(draw(8, 3, side, side, seed=100 + seed))
    for name, p in model.named_parameters():
        p.requires_grad_(trained is None or name.startswith(trained))
    return Case(model.eval(), plain, images(4, side), images(2, side, seed=1))


def resnet():
    return vision(lambda: models.resnet18(num_classes=3), ("bn1", "layer1.0.conv1", "fc"))


def transformer():
    return vision(lambda: models.VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3), side=16)


def mobilenet():
    make = models.mobilenet_v2
    last = ("features.17", "classifier")
    return vision(lambda: make(num_classes=3, width_mult=0.1), last)


def token_rows(n, seed=0):
    """Sentences padded by 0 to different lengths."""
    ids = torch.randint(1, VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        ids[i, 6 - i % 4 :] = 0
    return msif.Examples(ids, (ids == 3).any(1).long() + (ids[:, 0] > VOCABULARY // 2))


class Encoder(nn.Module):
    """Self-attention that leaves padding out."""

    def __init__(self, nested=True, **settings):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        padding = ids == 0
        h = self.encoder(self.words(ids), src_key_padding_mask=padding)
        kept = (~padding).to(h.dtype)[..., None]
        return self.head((h * kept).sum(1) / kept.sum(1))


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, **settings):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 4)
        self.cells = kind(4, 5, batch_first=True, **settings)
        self.head = nn.Linear(10 if settings.get("bidirectional") else 5, 3)
        self.packed = packed

    def forward(self, ids):
        lengths = (ids != 0).sum(1)
        words = self.words(ids)
        if self.packed:
            words = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        h = self.cells(words)[0]
        if self.packed:
            h = pad_packed_sequence(h, batch_first=True)[0]
        return self.head(h.sum(1) / lengths[:, None])


def text(make):
    return Case(seeded(make), plain, token_rows(6), token_rows(2, seed=1))


CASES = {
    "resnet18": resnet,
    "VisionTransformer": transformer,
    "mobilenet_v2": mobilenet,
    "encoder with nested tensors": lambda: text(Encoder),
    "encoder without": lambda: text(lambda: Encoder(nested=False, activation="gelu")),
    "encoder, norm first": lambda: text(lambda: Encoder(norm_first=True)),
    "LSTM": lambda: text(lambda: Recurrent(nn.LSTM)),
    "GRU": lambda: text(lambda: Recurrent(nn.GRU, num_layers=2)),
    "packed LSTM": lambda: text(lambda: Recurrent(nn.LSTM, packed=True, bidirectional=True)),
    "packed GRU": lambda: text(lambda: Recurrent(nn.GRU, packed=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_models_are_scored_as_plain_autograd_says(name):
    one = CASES[name]()
    pipeline = one.pipeline().fit(progress=False)
    check_gradients(one, pipeline)
    check_curvature(one, pipeline)
    check_scores(one, pipeline)
    check_run(one, pipeline)


def test_the_fast_path_of_the_encoder_is_the_function_that_is_scored():
    one = text(Encoder)
    one.model.requires_grad_(True)
    with torch.no_grad():
        fast = one.model(one.train.x)  # nested tensors, a fused kernel
    pipeline = one.pipeline().adopt()
    ours = pipeline.objective(0).outputs(pipeline.trained()[0], one.train.x)
    assert relative_error(ours, fast) < 1e-9
    unmasked = one.train.x.clamp(min=1)
    assert relative_error(one.model(unmasked), fast) > 1e-2


def test_mobilenet_v3_has_no_hessian_but_all_the_rest():
    def make():
        return models.mobilenet_v3_small(num_classes=3, width_mult=0.1)

    one = vision(make, ("features.11", "features.12", "classifier"))
    one.model.eval()
    words = r"PyTorch has none for layer 'features\.\d+\.block.*' \(Hardsigmoid\)"
    with pytest.warns(msif.UnsupportedModelWarning, match=words):
        pipeline = one.pipeline()
    pipeline.fit(progress=False)
    check_gradients(one, pipeline)
    check_curvature(one, pipeline, kinds=("ggn",))
    check_scores(one, pipeline)
    assert msif.TracIn(2).fit(pipeline).score(one.queries).values.isfinite().all()
    for refused in (msif.ImplicitInfluence(damping=1.0), msif.UnrolledInfluence()):
        with pytest.raises(msif.UnsupportedModelError, match=words):
            refused.fit(pipeline)


class Nested(nn.Module):
    """Sentences of different lengths as a nested tensor."""

    def __init__(self, layout=torch.strided, out=False):
        super().__init__()
        self.words, self.layer = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 5)
        self.head, self.layout, self.out = nn.Linear(5, 3), layout, out

    def forward(self, ids):
        rows = [self.words(row[row != 0]) for row in ids]
        z = self.layer(torch.nested.as_nested_tensor(rows, layout=self.layout))
        if self.out:
            return z
        return self.head(torch.nested.to_padded_tensor(torch.tanh(z), 0.0).sum(1))


REFUSED = {
    "dropout": (lambda: Encoder().train(), r"layer 'encoder\.layers\.0\.dropout' .*eval\(\)"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.BatchNorm1d(6)).train(),
        r"layer '1' \(BatchNorm1d\) has batch statistics in use.*GroupNorm",
    ),
    "states of an LSTM": (
        lambda: nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.LSTM(4, 5)),
        r"returns tuple, not a tensor \(B, \.\.\.\); use msif\.wrap",
    ),
    "nested outputs": (
        lambda: Nested(out=True),
        "returns a nested tensor, .*to_padded_tensor",
    ),
    "nested tensors inside": (Nested, "the loss has no gradient in .*NestedTensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_at_construction(name):
    make, words = REFUSED[name]
    torch.manual_seed(0)
    model = make().double()
    with pytest.raises(msif.UnsupportedModelError, match=words):
        msif.Pipeline([msif.Stage("fit", model, token_rows(6))])


def test_jagged_tensors_inside_have_no_hessian():
    one = text(lambda: Nested(layout=torch.jagged))
    with pytest.warns(msif.UnsupportedModelWarning, match="PyTorch has none for"):
        pipeline = one.pipeline()
    check_gradients(one, pipeline.fit(progress=False))


# ---- wrap ----


class Pair(nn.Module):
    """Takes two arguments, and returns its features along with its outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, left, *, right):
        features = torch.tanh(self.left(left) + self.right(right))
        return features, self.head(features)


def second(model, batch):
    return model(batch["left"], right=batch["right"])[1]


def pairs(n, seed=0):
    inputs = {"left": draw(n, 4, seed=seed), "right": draw(n, 3, seed=seed + 1)}
    return msif.Examples(inputs, torch.arange(n) % 3)


def test_a_wrapped_model_is_a_view_under_its_own_names():
    model = seeded(Pair)
    wrapped = msif.wrap(model, second)
    assert [*wrapped.state_dict()] == [*model.state_dict()]
    assert dict(wrapped.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(p is q for p, q in zip(wrapped.parameters(), model.parameters(), strict=True))
    assert wrapped.train().unwrapped.training and wrapped.left.training
    assert not wrapped.eval().unwrapped.training
    assert wrapped.float().unwrapped.left.weight.dtype == torch.float32
    model.head = nn.Linear(5, 2).double()
    assert wrapped.double()(pairs(2).x).shape == (2, 2)


def test_a_wrapped_model_is_copied_and_pickled_whole():
    wrapped = msif.wrap(seeded(Pair), second)
    x = dict(pairs(4).x.items())
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(other(x), wrapped(x))
        with torch.no_grad():
            other.head.bias += 1.0
        assert torch.equal(other(x), wrapped(x) + 1.0)


def test_a_wrapped_model_is_scored_and_saved(tmp_path):
    one = Case(seeded(Pair), second, pairs(20), pairs(3, seed=5))
    pipeline = one.pipeline().fit(progress=False)
    check_gradients(one, pipeline)
    check_curvature(one, pipeline)
    check_run(one, pipeline)
    pipeline.save(tmp_path / "p")
    again = Case(seeded(Pair, seed=3), second, pairs(20), pairs(3, seed=5)).pipeline()
    assert torch.equal(again.load(tmp_path / "p").trained()[0], pipeline.trained()[0])
    one.call = lambda model, batch: 2 * second(model, batch)
    with pytest.raises(msif.SavedFileError, match=r"model is .*call=.*second"):
        one.pipeline().load(tmp_path / "p")


@pytest.mark.parametrize("samples", [1, None])
def test_ekfac_takes_models_of_several_inputs(samples):
    pytest.importorskip("curvlinops")

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(x)))

    def joined(batch):
        assert type(batch) is dict
        return torch.cat([batch["left"], batch["right"]], 1)

    def scores(model, data, queries):
        stage = msif.Stage("fit", model, data, weight_decay=0.05)
        pipeline = msif.Pipeline([stage]).fit(progress=False)
        attributor = msif.ImplicitInfluence(msif.EKFAC(samples=samples), curvature="ggn")
        return attributor.fit(pipeline).score(queries).values

    parts, asked = pairs(30), pairs(3, seed=5)
    wrapped = msif.wrap(seeded(Joined), lambda model, batch: model(joined(batch)))
    ours = scores(wrapped, parts, asked)
    whole = [msif.Examples(joined(dict(d.x.items())), d.y) for d in (parts, asked)]
    assert relative_error(ours, scores(seeded(Joined), *whole)) < 1e-9


@pytest.mark.parametrize(
    ("model", "call", "words"),
    [
        (Pair, second, "model is type, not a torch.nn.Module"),
        (Pair(), "logits", "call='logits' is no function"),
    ],
)
def test_wrap_takes_a_module_and_a_function(model, call, words):
    with pytest.raises(TypeError, match=words):
        msif.wrap(model, call)
