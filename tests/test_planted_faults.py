"""A fault planted in a fast route is noticed, the plain route is taken, and the numbers stay right.

Each fault has its control: without the comparisons of the gate the numbers would be wrong.
"""

import families
import pytest
import torch
from families import Architecture, Do, LowRankProduct, Net, conv, mean, seq
from oracles import F64, relative_error
from test_families import Case, N
from torch import nn

import msif_lab as msif
from msif_lab.curvature import derivatives, gate, layers, matrices
from msif_lab.objective import objective

NETS = {
    "dense layers": Architecture("flat", lambda n: Net(seq(nn.Linear(5, 4), nn.Tanh()), 4, n)),
    "layers": Architecture("map", lambda n: Net(seq(conv(), nn.Tanh(), mean), 4, n)),
    "no layers": Architecture("flat", lambda n: Net(LowRankProduct(), 4, n)),
    "convolution": Architecture(
        "map", lambda n: Net(seq(conv(groups=2), Do(torch.tanh), mean), 4, n)
    ),
}


class Fault:
    """A function whose results are spoilt, and which knows how often it was called."""

    def __init__(self, function, spoil):
        self.function, self.spoil, self.calls = function, spoil, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return spoilt(self.function(*args, **kwargs), self.spoil)

    def __get__(self, owner, kind=None):  # as a method of a class
        return lambda *args, **kwargs: self(owner, *args, **kwargs)


def spoilt(result, spoil):
    if isinstance(result, (tuple, list)):
        return type(result)(spoilt(part, spoil) for part in result)
    return spoil(result)


def first_doubled(values):
    """One example's row is twice too long."""
    values = values.clone()
    values[0] *= 2
    return values


def neighbours(values):
    """Each row is the neighbour's."""
    return values.roll(1, 0)


def wrapped(function, spoil):
    """For `vmap` and the like, which give functions."""
    fault = Fault(None, spoil)

    def outer(*args, **kwargs):
        inner = function(*args, **kwargs)

        def call(*values):
            fault.calls += 1
            return spoilt(inner(*values), spoil)

        return call

    fault.outer = outer
    return fault


def plant(monkeypatch, place, name, spoil):
    fault = Fault(getattr(place, name), spoil)
    monkeypatch.setattr(place, name, fault)
    return fault


def plant_around(monkeypatch, places, name, spoil):
    fault = wrapped(getattr(places[0], name), spoil)
    for place in places:
        monkeypatch.setattr(place, name, fault.outer)
    return fault


def dropped(monkeypatch):
    """The first layer's part of every gradient is missing."""
    real = layers.Trace.jacobian
    fault = Fault(None, None)

    def jacobian(self, s, size):
        fault.calls += 1
        result = real(self, s, size)
        for span in self.layers[0].spans:
            result[..., span] = 0
        return result

    monkeypatch.setattr(layers.Trace, "jacobian", jacobian)
    return fault


def pulled(monkeypatch):
    """Products with the transposed Jacobian are added twice."""
    real = layers.Layer.pull
    fault = Fault(None, None)

    def pull(self, *args):
        fault.calls += 1
        real(self, *args)
        real(self, *args)

    monkeypatch.setattr(layers.Layer, "pull", pull)
    return fault


def linear(monkeypatch):
    """Every model is taken for a linear one."""
    fault = Fault(lambda operator: True, lambda verdict: verdict)
    monkeypatch.setattr(matrices, "_is_linear", fault)
    return fault


FAULTS = {
    "gradients of a layer": (
        "layers",
        lambda m: plant(m, layers.Layer, "gradients", first_doubled),
    ),
    "a layer is dropped": ("layers", dropped),
    "products with a layer's gradients": (
        "layers",
        lambda m: plant(m, layers.Layer, "along", first_doubled),
    ),
    "inputs of a layer": ("layers", lambda m: plant(m, layers.Layer, "inputs", neighbours)),
    "push through a layer": ("layers", lambda m: plant(m, layers.Layer, "push", first_doubled)),
    "pull through a layer": ("layers", pulled),
    "batched backward passes": (
        "layers",
        lambda m: plant(m, layers.Trace, "jacobians", neighbours),
    ),
    "blocks of dense layers": (
        "dense layers",
        lambda m: plant(m, matrices.GGN, "_add_blocks", first_doubled),
    ),
    "vmap of gradients": (
        "no layers",
        lambda m: plant_around(m, [derivatives], "vmap", neighbours),
    ),
    "forward mode": ("no layers", lambda m: plant(m, derivatives, "jvp", lambda t: 1.5 * t)),
    "forward over reverse mode": (
        "convolution",
        lambda m: plant(m, matrices, "jvp", lambda t: 1.5 * t),
    ),
    "vmap of products": (
        "convolution",
        lambda m: plant_around(m, [matrices], "vmap", neighbours),
    ),
    "jacobians by vmap": (
        "no layers",
        lambda m: plant_around(m, [matrices], "jacrev", first_doubled),
    ),
    "own curvatures": (
        "no layers",
        lambda m: plant(m, derivatives, "_own_products", first_doubled),
    ),
    "the shortcut of linear models": ("no layers", linear),
    "lanes": (
        "no layers",
        lambda m: plant_around(m, [gate, objective], "vmap", neighbours),
    ),
}


def errors(case):
    """The relative error of everything that all methods are made of."""
    o, full = case.pipeline.objective(0), case.pipeline.trained()[0]
    plain = case.plain[0]
    rows, size = plain.rows(), plain.size
    v = torch.randn(size, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    pairs = {"gradients": (torch.cat([g for _, g in msif.per_example_gradients(o, full)]), rows)}
    for columns in (1, 4):
        ours = msif.example_products(o, full, v[:, :columns])
        pairs[f"products {columns}"] = ours, (rows @ v[:, :columns]).T
    for kind in ("hessian", "ggn"):
        exact = case.matrix(0, kind)
        matrix = case.pipeline.curvature(0, kind)
        pairs[f"{kind} dense"] = matrix.dense(), exact
        for columns in (1, 4):
            pairs[f"{kind} {columns}"] = matrix @ v[:, :columns], exact @ v[:, :columns]
        own = plain.hessians if kind == "hessian" else plain.gauss_newtons
        ours = derivatives.own_products(kind, o, full, o.data.x, o.data.y, v.T)
        pairs[f"own {kind}"] = ours, torch.einsum("ipq,qi->ip", own, v[:, :N])
    products, scores = derivatives.gradient_transpose(o, full, torch.arange(N), v.T)
    pairs["transpose"] = products, (plain.hessians.mean(0) @ v).T
    pairs["scores"] = scores, (rows @ v).T / N
    batches, ones = torch.arange(N).expand(2, -1), torch.ones(2, N, dtype=F64)
    two = torch.stack([v.T, v.T.flip(0)])
    products, scores = derivatives.transpose_lanes(o, full.expand(2, -1), batches, two, ones)
    pairs["transpose lanes"] = products[1].flip(0), pairs["transpose"][1]
    pairs["scores of lanes"] = scores[1].flip(0), pairs["scores"][1]
    weights = 1 + 0.3 * torch.randn(3, N, generator=torch.Generator().manual_seed(2), dtype=F64)
    q = case.pipeline.retrain(weights, progress=False).evaluate(case.queries)
    pairs["retrained"] = q, torch.stack([case.run(one) for one in weights], 1)
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def case_for(monkeypatch, net):
    monkeypatch.setitem(families.ARCHITECTURES, net, NETS[net])
    return Case(net)


@pytest.mark.parametrize("name", FAULTS)
def test_the_gate_notices_and_the_numbers_stay_right(name, monkeypatch):
    net, make_fault = FAULTS[name]
    fault = make_fault(monkeypatch)
    found = errors(case_for(monkeypatch, net))
    assert fault.calls, "the fault was never met"
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("name", FAULTS)
def test_without_the_gate_the_numbers_would_be_wrong(name, monkeypatch):
    """Negative control: each fast route believed at once."""
    for place in (layers, derivatives, matrices, gate):
        monkeypatch.setattr(place, "agree", lambda fast, plain: fast() is not None)
    net, make_fault = FAULTS[name]
    make_fault(monkeypatch)
    assert max(errors(case_for(monkeypatch, net)).values()) > 1e-2


@pytest.mark.parametrize("net", NETS)
def test_without_faults_the_fast_routes_are_taken(net, monkeypatch):
    """The other control: a gate that refuses everything would pass the tests above."""
    slow = [
        plant(monkeypatch, matrices.DataCurvature, "_plain_product", lambda t: t),
        plant(monkeypatch, derivatives, "_plain_gradient", lambda t: t),
        plant(monkeypatch, derivatives, "_own_one_by_one", lambda t: t),
    ]
    case = case_for(monkeypatch, net)
    assert max(errors(case).values()) < 1e-6
    asked = [fault.calls for fault in slow]  # by the gate, once for each way
    assert max(errors(case).values()) < 1e-6
    assert [fault.calls for fault in slow] == asked
    assert (layers.find_layers(case.pipeline.objective(0)) is None) == (
        net in ("no layers", "convolution")
    )
