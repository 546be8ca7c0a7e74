"""Derivatives from each layer's inputs and output gradients, and from autograd elsewhere."""

import copy

import pytest
import torch
from oracles import F64, Oracle, attributes, close, draw, relative_error, same
from torch import nn

import msif_lab as msif
from msif_lab.curvature.layers import find_layers, trace
from msif_lab.objective import Objective


class Sequence(nn.Module):
    """One dense layer applied at five places of an example, then one at a single place."""

    def __init__(self):
        super().__init__()
        self.word, self.head = nn.Linear(3, 4), nn.Linear(20, 2, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.word(x)).flatten(1))


class Residual(nn.Module):
    """In-place activations, a skip connection, strides, a layer without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.second, self.act = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), dilation=1), nn.Tanh()
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        z = self.relu(self.first(x))
        z = self.act(self.second(z)) + z
        return self.head(z.mean((2, 3)))


class Twice(nn.Module):
    """One layer called twice has no single set of inputs."""

    def __init__(self):
        super().__init__()
        self.same = nn.Linear(3, 3)

    def forward(self, x):
        return self.same(torch.tanh(self.same(x)))


class Elsewhere(nn.Module):
    """A layer's weight is also used outside of the layer."""

    def __init__(self):
        super().__init__()
        self.same = nn.Linear(3, 3)

    def forward(self, x):
        return self.same(x) + 0.1 * x @ self.same.weight


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * self.layer(x)


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def grouped():
    return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2))


def hooked():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, given, z: 2 * z)
    return model


KNOWN = {
    "sequence": (Sequence, (5, 3)),
    "residual": (Residual, (2, 6, 6)),
    "convnet": (None, (1, 8, 8)),
}
UNKNOWN = {
    "twice": (Twice, (3,)),
    "elsewhere": (Elsewhere, (3,)),
    "scaled": (Scaled, (3,)),
    "tied": (tied, (3,)),
    "grouped": (grouped, (2, 4, 4)),
}
MODELS = {**KNOWN, **UNKNOWN, "hooked": (hooked, (3,))}


def objective(make, shape, seed=0):
    torch.manual_seed(seed)
    model = (make() if make else msif.convnet(shape, channels=(2, 3), width=4, classes=3)).double()
    outputs = model(draw(1, *shape)).shape[1]
    data = msif.Examples(draw(9, *shape, seed=1), torch.arange(9) % outputs)
    o = Objective(model, data, msif.cross_entropy, 0.1)
    return o, o.layout.flatten(model) + 0.1 * draw(o.layout.size, seed=2)


@pytest.mark.parametrize("name", KNOWN)
def test_factors_are_the_jacobian(name):
    o, full = objective(*KNOWN[name])
    state, untouched = copy.deepcopy(o.model.state_dict()), attributes(o.model)
    layers = find_layers(o)
    assert layers is not None
    expected = Oracle(o, full).jacobians()  # (B, C, P)
    seen = trace(o, full, o.data.x, layers)
    s, v, u = seen.jacobians(), draw(o.size, 4), draw(9, 4, expected.shape[1], seed=3)
    close(seen.jacobian(s, o.size), expected, 1e-12)
    close(seen.push(s, v), torch.einsum("bcp,pk->bkc", expected, v), 1e-12)
    pulled = torch.zeros_like(v)
    seen.pull(s, u, pulled)
    close(pulled, torch.einsum("bkc,bcp->pk", u, expected), 1e-12)
    assert same(o.model.state_dict(), state)
    assert attributes(o.model) == untouched, "a hook was left behind"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_the_same_numbers(name):
    o, full = objective(*MODELS[name])
    oracle = Oracle(o, full)
    ggn, gradients = oracle.ggn() - torch.diag(oracle.penalty()), oracle.gradients()
    modes = ["auto", "forward", "gradients", "layers"]
    if name in UNKNOWN:  # what layers do not hold is left to autograd
        assert find_layers(o) is None
        with pytest.raises(ValueError, match="mode='layers'"):
            msif.example_products(o, full, draw(o.size, 1), mode=modes.pop())
    elif find_layers(o) is None:
        modes.pop()
    for columns in (1, 6):
        v = draw(o.size, columns, seed=4)
        close(msif.GGN(o, full, ridge=False) @ v, ggn @ v, 1e-11)
        for mode in modes:
            found = msif.example_products(o, full, v, mode=mode)
            close(found, (gradients @ v).T, 1e-11, mode)
    close(msif.GGN(o, full, ridge=False).dense(), ggn, 1e-11)


def test_single_precision_agrees_with_double():
    """float32 convolutions are computed by other code than float64 ones."""
    o, full = objective(*KNOWN["residual"])
    v = draw(o.size, 5)
    expected = msif.GGN(o, full) @ v, msif.Hessian(o, full) @ v
    model = copy.deepcopy(o.model).float()
    single = Objective(model, o.data.to(torch.float32), o.loss, 0.1)
    found = (
        msif.GGN(single, full.float()) @ v.float(),
        msif.Hessian(single, full.float()) @ v.float(),
    )
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.double(), b) <= 1e-5


def test_a_linear_model_has_its_gauss_newton_matrix_as_hessian():
    """Recognised by its outputs, not by its name: the products are then the very same bits."""
    data = msif.Examples(draw(12, 5), torch.arange(12) % 3)
    for model, linear in (
        (msif.softmax_regression(5, 3), True),
        (nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), False),  # bilinear in its parameters
        (msif.mlp(5, hidden=(3,), classes=3), False),
    ):
        o = Objective(model.double(), data, msif.cross_entropy, 0.1)
        full, v = o.layout.flatten(model), torch.eye(o.size, dtype=F64)
        hessian, exact = msif.Hessian(o, full), Oracle(o, full).hessian()
        assert torch.equal(hessian @ v, msif.GGN(o, full) @ v) == linear
        close(hessian.dense(), exact, 1e-12)
        close(hessian @ v, exact, 1e-12)
