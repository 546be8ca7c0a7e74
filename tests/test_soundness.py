"""Models whose gradients, or second derivatives, are not what they seem are refused by name."""

import copy
import warnings

import pytest
import torch
import torch.utils.checkpoint
from oracles import F64, draw, relative_error
from torch import nn

import msif_lab as msif
from msif_lab.curvature.soundness import missing_second_derivative

DATA = msif.Examples(draw(30, 5), torch.arange(30) % 3)
QUERIES = msif.Examples(draw(4, 5, seed=1), torch.arange(4) % 3)
WORDS = msif.Examples(
    torch.randint(0, 9, (30, 4), generator=torch.Generator().manual_seed(2)), DATA.y
)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(5, 4), nn.Linear(4, 3)


class StopGradient(TwoLayers):
    def forward(self, x):
        z = self.a(x)
        return self.h(torch.tanh(z / (1 + z.detach().norm(dim=1, keepdim=True))))


class StraightThrough(TwoLayers):
    def forward(self, x):
        z = torch.tanh(self.a(x))
        return self.h(z + (torch.sign(z) - z).detach())


class Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class ReversalLayer(nn.Module):
    def forward(self, x):
        return Reversed.apply(x)


class GradientReversal(TwoLayers):
    def __init__(self):
        super().__init__()
        self.turn = ReversalLayer()

    def forward(self, x):
        return self.h(self.turn(torch.tanh(self.a(x))))


class Recomputed(TwoLayers):
    """Activation checkpointing: the recomputation sees the module's own weights, not ours."""

    def forward(self, x):
        def inner(t):
            return torch.tanh(self.a(t))

        return self.h(torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False))


class Squared(torch.autograd.Function):
    """tanh², whose backward keeps an intermediate on ctx: its second derivative is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        t = torch.tanh(x)
        return t * t, t

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.t = output[1].detach()
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient * 2 * ctx.t * (1 - ctx.t**2)


class SquaredLayer(nn.Module):
    def forward(self, x):
        return Squared.apply(x)[0]


class OwnFunction(TwoLayers):
    def __init__(self):
        super().__init__()
        self.squared = SquaredLayer()

    def forward(self, x):
        return self.h(self.squared(self.a(x)))


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.h = nn.Parameter(torch.randn(6, 5)), nn.Linear(6, 3)

    def forward(self, x):
        return self.h(torch.exp(-(torch.cdist(x, self.c) ** 2) / 5))


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.h = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(torch.tanh(self.words(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.into, self.h = nn.Linear(5, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.h(self.encoder(self.into(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.h = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.cells(x)[0][:, -1])


def seeded(make, dtype=F64, seed=1):
    torch.manual_seed(seed)
    return make().to(dtype).eval()


def pipeline_of(model, data=DATA, **settings):
    settings = {"weight_decay": 0.05} | settings
    return msif.Pipeline([msif.Stage("fit", model, data, **settings)])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("make", "where"),
    [
        (StopGradient, "forward pass"),
        (StraightThrough, "forward pass"),
        (GradientReversal, "layer 'turn' \\(ReversalLayer\\)"),
        (Recomputed, "forward pass"),
    ],
)
def test_a_gradient_that_is_no_derivative_is_refused_at_construction(make, where, dtype):
    with pytest.raises(
        msif.UnsupportedModelError, match=f"not the derivative of the loss.*{where}"
    ):
        pipeline_of(seeded(make, dtype), DATA.to(dtype))


@pytest.mark.parametrize(
    ("make", "data", "reason"),
    [
        (OwnFunction, DATA, r"layer 'squared' \(SquaredLayer\) are wrong by"),
        (BagOfWords, WORDS, r"PyTorch has none for layer 'words' \(EmbeddingBag\)"),
        (
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Hardsigmoid(), nn.Linear(4, 3)),
            DATA,
            r"PyTorch has none for layer '1' \(Hardsigmoid\)",
        ),
    ],
)
def test_without_second_derivatives_first_order_methods_work_and_the_others_are_refused(
    make, data, reason
):
    recipe = msif.SGD(lr=0.05, epochs=2, batch_size=10)
    with pytest.warns(msif.UnsupportedModelWarning, match=reason):  # said before any training
        pipeline = pipeline_of(seeded(make), data, recipe=recipe)
    pipeline.fit(progress=False)
    queries = data[:3]
    assert msif.GradientDot().fit(pipeline).score(queries).values.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        ggn = msif.ImplicitInfluence(curvature="ggn", damping=0.1).fit(pipeline)
        assert ggn.score(queries).values.isfinite().all()
        with pytest.raises(msif.UnsupportedModelError, match=f"needs second derivatives.*{reason}"):
            msif.ImplicitInfluence().fit(pipeline)
    with pytest.raises(msif.UnsupportedModelError, match=f"needs second derivatives.*{reason}"):
        msif.UnrolledInfluence().fit(pipeline)


def test_lbfgs_trains_a_net_without_second_derivatives():
    with pytest.warns(msif.UnsupportedModelWarning):
        net = nn.Sequential(nn.Linear(5, 4), nn.Hardsigmoid(), nn.Linear(4, 3))
        pipeline = pipeline_of(net.double())
    pipeline.fit(progress=False)
    assert float(pipeline.gradient(0).norm()) < 1e-5


@pytest.mark.parametrize("count", [10, 30])
def test_a_batched_backward_that_is_wrong_is_not_used(count):
    """`torch.cdist` on few rows: right one cotangent at a time, a third off side by side.

    Other versions of PyTorch have no second derivative of it.
    """
    model = seeded(Prototypes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.UnsupportedModelWarning)
        pipeline = pipeline_of(model, DATA[:count]).adopt()
    o, full = pipeline.objective(0), pipeline.trained()[0]
    if missing_second_derivative(o):
        with pytest.raises(msif.UnsupportedModelError, match="cdist"):
            pipeline.curvature(0)
        return

    def gradient(theta):
        named = o.layout.named(theta.detach().requires_grad_())
        leaves = [named[name].detach().requires_grad_() for name in named]
        values = dict(zip(named, leaves, strict=True))
        loss = o.losses(values, o.data.x, o.data.y).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    h, eye = 1e-5, torch.eye(len(full), dtype=F64)
    columns = [(gradient(full + h * e) - gradient(full - h * e)) / (2 * h) for e in eye]
    truth = torch.stack(columns, 1) + 0.05 * eye
    matrix = pipeline.curvature(0)
    assert relative_error(matrix.dense(), truth) < 1e-7
    assert relative_error(matrix @ eye, truth) < 1e-7


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Attention, (4, 5)),
        (Recurrent, (4, 5)),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (5,)),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(), nn.Linear(8, 3)), (5,)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, groups=2),
                nn.Hardswish(),
                nn.Flatten(),
                nn.Linear(16, 3),
            ),
            (1, 8, 8),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sound_models_are_not_refused(make, shape, dtype, recwarn):
    data = msif.Examples(draw(12, *shape), torch.arange(12) % 3).to(dtype)
    for seed in range(3):
        model = seeded(make, dtype, seed)
        before = copy.deepcopy(model.state_dict())
        pipeline_of(model, data).adopt().curvature(0)
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert [str(w.message) for w in recwarn if "derivative" in str(w.message)] == []


def test_sparse_gradients_and_parameters_without_a_shape_are_refused_by_name():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.h = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.h(torch.tanh(self.words(x)).mean(1))

    with pytest.raises(msif.UnsupportedModelError, match=r"layer 'words' \(Embedding\)"):
        pipeline_of(seeded(Sparse), WORDS)
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        pipeline_of(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))


def test_attention_is_as_the_user_left_it_afterwards():
    before = torch.backends.mha.get_fastpath_enabled()
    flash = torch.backends.cuda.flash_sdp_enabled()
    pipeline_of(seeded(Attention), msif.Examples(draw(12, 4, 5), torch.arange(12) % 3)).adopt()
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert torch.backends.cuda.flash_sdp_enabled() == flash


def saturated():
    """Sure of every label: differences of its loss are below float32's rounding."""
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 3))
    with torch.no_grad():
        net[2].bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    return net


class RootOfAParameter(TwoLayers):
    """Not a number once its small positive parameter is shifted below zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1e-3]))

    def forward(self, x):
        return self.h(torch.tanh(self.a(x))) * self.scale.sqrt()


class Insists(TwoLayers):
    def forward(self, x):
        assert x.dtype == torch.float32
        return self.h(torch.tanh(self.a(x)))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, *, x):
        z = self.a(x)
        return {"features": torch.tanh(z / (1 + z.detach().norm(dim=1, keepdim=True)))}


class Nested(nn.Module):
    """A fault inside a module that takes keywords and returns a dict."""

    def __init__(self):
        super().__init__()
        self.inner, self.h = Inner(), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.inner(x=x)["features"])


def float32_inside(outputs, targets):
    return nn.functional.cross_entropy(outputs.float(), targets, reduction="none").to(outputs.dtype)


def test_rounding_is_no_fault(recwarn):
    images = msif.Examples(draw(12, 784).float(), torch.zeros(12).long(), classes=(0, 1, 2))
    for seed in range(3):
        pipeline_of(seeded(saturated, torch.float32, seed), images)
        deep = nn.Sequential(nn.Linear(5, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU())
        net = seeded(lambda deep=deep: nn.Sequential(deep, nn.Linear(200, 3)), F64, seed)
        pipeline_of(net, loss=float32_inside)
    pipeline_of(seeded(RootOfAParameter))
    pipeline_of(seeded(Insists, torch.float32), DATA.to(torch.float32))
    constant = msif.Examples(DATA.x, torch.zeros(30, 1, dtype=F64))
    pipeline_of(nn.Linear(5, 1).double(), constant, loss=msif.mean_squared_error)
    pipeline_of(seeded(lambda: nn.Linear(5, 3)), DATA[:1])
    assert [str(w.message) for w in recwarn if "derivative" in str(w.message)] == []


def test_a_fault_inside_a_module_with_keywords_and_a_dict_is_still_refused():
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss"):
        pipeline_of(seeded(Nested))
