"""Derivatives from what layers see: the same numbers as torch.func, and a way out wherever there is
more to a model.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import msif_lab as msif
from msif_lab.curvature.layers import find_layers, trace
from msif_lab.objective.objective import Objective

F64 = torch.float64


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Sequence(nn.Module):
    """The same dense layer at five places of an example, then at none: L = 5 and L = 1."""

    def __init__(self):
        super().__init__()
        self.word, self.head = nn.Linear(3, 4), nn.Linear(20, 2, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.word(x)).flatten(1))


class Residual(nn.Module):
    """In-place activations and a skip connection, without biases, with strides."""

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
    """One layer called twice: no single set of inputs."""

    def __init__(self):
        super().__init__()
        self.same = nn.Linear(3, 3)

    def forward(self, x):
        return self.same(torch.tanh(self.same(x)))


class Elsewhere(nn.Module):
    """A layer's weight also used behind its back."""

    def __init__(self):
        super().__init__()
        self.same = nn.Linear(3, 3)

    def forward(self, x):
        return self.same(x) + 0.1 * x @ self.same.weight


class Scaled(nn.Module):
    """A parameter of its own."""

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


def objective(make, shape, seed=0):
    torch.manual_seed(seed)
    model = (make() if make else msif.convnet(shape, channels=(2, 3), width=4, classes=3)).double()
    outputs = model(draw(1, *shape)).shape[1]
    data = msif.Examples(draw(9, *shape, seed=1), torch.arange(9) % outputs)
    o = Objective(model, data, msif.cross_entropy, 0.1)
    return o, o.layout.flatten(model) + 0.1 * draw(o.layout.size, seed=2)


def jacobians(o, full):
    return vmap(
        jacrev(lambda t, x: functional_call(o.model, o.layout.named(t), (x[None],))[0]), (None, 0)
    )(full, o.data.x)


@pytest.mark.parametrize("name", KNOWN)
def test_factors_are_the_jacobian(name):
    o, full = objective(*KNOWN[name])
    before = copy.deepcopy(o.model.state_dict())
    layers = find_layers(o)
    assert layers is not None
    expected = jacobians(o, full)  # (B, C, P)
    seen = trace(o, full, o.data.x, layers)
    s, v, u = seen.jacobians(), draw(o.size, 4), draw(9, 4, expected.shape[1], seed=3)
    assert torch.allclose(seen.jacobian(s, o.size), expected, rtol=0, atol=1e-12)
    assert torch.allclose(
        seen.push(s, v), torch.einsum("bcp,pk->bkc", expected, v), rtol=0, atol=1e-12
    )
    pulled = torch.zeros_like(v)
    seen.pull(s, u, pulled)
    assert torch.allclose(pulled, torch.einsum("bkc,bcp->pk", u, expected), rtol=0, atol=1e-11)
    assert all(torch.equal(before[key], value) for key, value in o.model.state_dict().items())
    assert not any(module._forward_hooks for module in o.model.modules())


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN, "hooked"])
def test_every_model_gets_the_same_numbers(name):
    o, full = objective(*({**KNOWN, **UNKNOWN, "hooked": (hooked, (3,))}[name]))
    j = jacobians(o, full)
    p = o.outputs(full, o.data.x).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("bap,bac,bcq->pq", j, inner, j) / 9
    gradients = torch.einsum("bc,bcp->bp", p - nn.functional.one_hot(o.data.y, p.shape[1]), j)
    for columns in (1, 6):
        v = draw(o.size, columns, seed=4)
        assert torch.allclose(msif.GGN(o, full, ridge=False) @ v, ggn @ v, rtol=0, atol=1e-11)
        for mode in ("auto", "forward", "gradients", "layers"):
            if mode == "layers" and find_layers(o) is None:
                continue
            found = msif.example_products(o, full, v, mode=mode)
            assert torch.allclose(found, (gradients @ v).T, rtol=0, atol=1e-11), mode
    assert torch.allclose(msif.GGN(o, full, ridge=False).dense(), ggn, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_layers_do_not_hold_is_left_to_autograd(name):
    o, full = objective(*UNKNOWN[name])
    assert find_layers(o) is None
    with pytest.raises(ValueError, match="mode='layers'"):
        msif.example_products(o, full, draw(o.size, 1), mode="layers")


def test_single_precision_agrees_with_double():
    """float32 convolutions take another way than float64 ones."""
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
        assert float((a.double() - b).norm()) <= 1e-5 * float(b.norm())


def test_a_linear_model_has_its_gauss_newton_matrix_as_hessian():
    """Told by its outputs, not by its name; one tanh and it is told apart."""
    from msif_lab.curvature.matrices import _is_linear

    data = msif.Examples(draw(12, 5), torch.arange(12) % 3)
    for model, linear in (
        (msif.softmax_regression(5, 3), True),
        (nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), False),  # bilinear in its parameters
        (msif.mlp(5, hidden=(3,), classes=3), False),
    ):
        o = Objective(model.double(), data, msif.cross_entropy, 0.1)
        hessian = msif.Hessian(o, o.layout.flatten(model))
        assert _is_linear(hessian) == linear
        full = o.layout.flatten(model)

        def risk(theta, o=o):
            return o.losses(theta, o.data.x, o.data.y).mean() + 0.05 * theta.square().sum()

        exact = torch.func.hessian(risk)(full)
        assert torch.allclose(hessian.dense(), exact, rtol=0, atol=1e-12)
        assert torch.allclose(hessian @ torch.eye(o.size, dtype=F64), exact, rtol=0, atol=1e-12)
