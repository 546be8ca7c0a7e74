"""Every layer of torch.nn, many operators and losses: right by every route, or refused by name.

The oracle is plain autograd by the module itself, and differences of its gradients.
"""

import inspect
import warnings

import pytest
import torch
from operator_table import (
    FIRST,
    GRADIENTS,
    LAYERS,
    LOSSES,
    OPERATORS,
    REFUSED,
    RIGHT,
    Entry,
    Plain,
)
from oracles import F64, draw
from torch import nn

import msif_lab as msif
from msif_lab.curvature import derivatives, matrices
from msif_lab.curvature.derivatives import (
    cross_products,
    forward_over_reverse_agrees,
    gradient_transpose,
    own_products,
    transpose_lanes,
)
from msif_lab.objective.objective import Lanes, Objective

CLOSE = 1e-6
TABLE = {f"layer {name}": entry for name, entry in LAYERS.items()}
TABLE |= {f"operator {name}": entry for name, entry in OPERATORS.items()}
TABLE |= {f"loss {name}": entry for name, entry in LOSSES.items()}


class Case:
    """One entry's pipeline, its oracle, and the errors of every route."""

    def __init__(self, entry: Entry):
        self.model, self.data, self.loss = entry.model(), entry.data(), entry.loss
        settings = {"weight_decay": 0.0, "recipe": msif.SGD(lr=0.1, epochs=1, batch_size=3)}
        stage = msif.Stage("net", self.model, self.data, self.loss, **settings)
        self.pipeline = msif.Pipeline([stage]).adopt()
        self.o, self.full = self.pipeline.objective(0), self.pipeline.trained()[0]
        self.plain = Plain(self.model, self.data, self.loss)
        self.rows = self.plain.gradients()
        self.floor = 1e-6 * float(self.rows.norm())  # for matrices that are zero
        self.vectors = draw(self.o.size, 3, seed=1)
        self.own = draw(len(self.data), self.o.size, seed=2)
        self.eye = torch.eye(self.o.size, dtype=F64)
        self.errors: dict[str, float] = {}

    def note(self, route: str, found, truth, scale: float = 0.0) -> None:
        assert found.shape == truth.shape, route
        scale = max(scale, float(truth.norm())) + self.floor
        self.errors[route] = float((found - truth).norm()) / scale

    def first_derivatives(self) -> None:
        found = torch.cat([g for _, g in msif.per_example_gradients(self.o, self.full)])
        self.note("gradients", found, self.rows)
        for mode in ("gradients", "forward", "layers", "auto"):
            try:
                products = msif.example_products(self.o, self.full, self.vectors, mode=mode)
            except ValueError as error:  # UnsupportedModelError is one too
                assert mode in ("forward", "layers") and f"mode='{mode}'" in str(error)
                continue
            self.note(f"products {mode}", products, (self.rows @ self.vectors).T)
        one = msif.example_products(self.o, self.full, self.vectors[:, :1])
        self.note("product auto", one, (self.rows @ self.vectors[:, :1]).T)
        thetas = torch.stack([self.full, self.full])
        lanes = Lanes(self.o, thetas, None, torch.ones(2, len(self.data), dtype=F64))
        _, gradient = lanes.value_and_grad(thetas)
        self.note("lanes", gradient, self.rows.mean(0).expand(2, -1))

    def gauss_newton(self) -> None:
        alone = self.plain.ggns()
        self.curvature("ggn", alone.mean(0))
        found = own_products("ggn", self.o, self.full, self.data.x, self.data.y, self.own)
        self.note("ggn own", found, torch.einsum("bij,bj->bi", alone, self.own))

    def curvature(self, kind, truth) -> None:
        matrix = self.pipeline.curvature(0, kind)
        self.note(f"{kind} dense", matrix.dense(), truth)
        self.note(f"{kind} @", matrix @ self.eye, truth)
        one = self.vectors[:, :1]
        self.note(f"{kind} @ one", matrix @ one, truth @ one)

    def hessian(self, monkeypatch) -> None:
        truth, o, full = self.plain.hessian(), self.o, self.full
        self.curvature("hessian", truth)
        moved = self.plain.moved()
        alone = [self.plain.difference(v * moved, [i]) for i, v in enumerate(self.own)]
        found = own_products("hessian", o, full, self.data.x, self.data.y, self.own)
        self.note("hessian own", found, torch.stack(alone))
        self.unrolled("unrolled", truth)
        names = list(o.layout.shapes)
        head = Objective(self.model, self.data, self.loss, trained=names[-2:])
        v = self.vectors[-head.size :].T
        scale = float((truth @ self.vectors).norm())
        mixed = cross_products(head, full, names[:-2], v)
        self.note("cross", mixed, v @ truth[-head.size :, : -head.size], scale)
        if forward_over_reverse_agrees(o):  # as for float64 convolutions
            with monkeypatch.context() as patch:
                for module in (matrices, derivatives):
                    patch.setattr(module, "forward_is_cheaper", lambda o, dtype: True)
                self.note("hessian forward", msif.Hessian(o, full) @ self.eye, truth)
                self.unrolled("unrolled forward", truth)

    def unrolled(self, route, truth) -> None:
        batch = torch.arange(len(self.data))
        found, scores = gradient_transpose(self.o, self.full, batch, self.vectors.T)
        self.note(route, found, (truth @ self.vectors).T)
        share = (self.rows @ self.vectors).T / len(batch)
        self.note(f"{route} scores", scores, share)
        fulls, v = self.full.expand(2, -1), self.vectors.T
        batches, ones = torch.stack([batch, batch.flip(0)]), torch.ones(2, len(batch), dtype=F64)
        found, scores = transpose_lanes(self.o, fulls, batches, torch.stack([v, 2 * v]), ones)
        product = (truth @ self.vectors).T
        self.note(f"{route} lanes", found, torch.stack([product, 2 * product]))
        self.note(f"{route} lanes' scores", scores, torch.stack([share, 2 * share.flip(1)]))


def outcome(entry: Entry, monkeypatch) -> tuple[str, str, dict[str, float]]:
    """What became of an entry, in which words, and the errors of its routes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case = Case(entry)
        except (msif.MsifError, ValueError) as refusal:
            return REFUSED, str(refusal), {}
        said = [str(w.message) for w in caught if w.category is msif.UnsupportedModelWarning]
        case.first_derivatives()
        if not said:
            case.gauss_newton()
            case.hessian(monkeypatch)
            return RIGHT, "", case.errors
    with pytest.raises(msif.UnsupportedModelError, match="needs second derivatives"):
        case.pipeline.curvature(0)
    with pytest.raises(msif.UnsupportedModelError, match="needs second derivatives"):
        msif.UnrolledInfluence().fit(case.pipeline, progress=False)
    if "so is curvature='ggn'" in said[0]:
        with pytest.raises(msif.UnsupportedModelError, match="loss's second derivatives"):
            case.pipeline.curvature(0, "ggn")
        return GRADIENTS, said[0], case.errors
    case.gauss_newton()
    return FIRST, said[0], case.errors


COUNTS: dict[tuple[str, str], int] = {}


@pytest.mark.parametrize("name", TABLE)
def test_right_by_every_route_or_refused_by_name(name, monkeypatch):
    entry = TABLE[name]
    found, words, errors = outcome(entry, monkeypatch)
    wrong = {route: error for route, error in errors.items() if not error < CLOSE}
    assert not wrong, wrong
    assert found == entry.expected, words
    assert entry.named in words
    kind = name.split()[0]
    COUNTS[kind, found] = COUNTS.get((kind, found), 0) + 1


def test_counts():
    """The table is as large as it should be; its outcomes are printed."""
    print({" ".join(key): count for key, count in sorted(COUNTS.items())})
    assert len(OPERATORS) >= 60 and len(LOSSES) >= 20 and len(LAYERS) >= 100


def test_the_oracle_sees_a_wrong_gradient():
    """Negative control: gradients of another model do not pass for this one's."""
    entry = TABLE["layer GELU"]
    case = Case(entry)
    with torch.no_grad():
        next(case.model.parameters()).add_(1e-3)
    case.rows = Plain(case.model, case.data, case.loss).gradients()
    case.first_derivatives()
    assert min(case.errors.values()) > CLOSE


# Classes of torch.nn that no entry needs.
LEFT_OUT = {
    "holds other modules and computes nothing": {
        "Module", "Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict",
        "Container",
    },
    "abstract": {"RNNBase", "RNNCellBase"},
    "has no shape before its first call, which test_soundness.py has refused": {
        name for name in vars(nn) if name.startswith("Lazy")
    },
    "an old name of NLLLoss": {"NLLLoss2d"},
    "needs several processes or devices": {"SyncBatchNorm", "DataParallel"},
}  # fmt: skip


def test_every_layer_and_loss_of_torch_has_an_entry():
    classes = {name for name, c in vars(nn).items() if inspect.isclass(c)}
    classes = {name for name in classes if issubclass(getattr(nn, name), nn.Module)}
    covered = {name.split()[0] for name in [*LAYERS, *LOSSES]}
    left_out = set().union(*LEFT_OUT.values())
    assert classes - covered - left_out == set()
    assert not covered & left_out


@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_is_off_for_recurrent_layers_only_during_our_calls(enabled, monkeypatch):
    """cuDNN's recurrent layers have no second derivative."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    seen = []
    for kind in ("LSTM", "Linear"):
        entry = LAYERS[kind]
        call = entry.call

        def noted(layer, z, call=call):
            seen.append(torch.backends.cudnn.enabled)
            return call(layer, z)

        case = Case(Entry(entry.make, entry.shape, noted))
        seen.clear()
        case.pipeline.curvature(0) @ case.eye
        assert set(seen) == ({False} if kind == "LSTM" else {enabled})
        assert torch.backends.cudnn.enabled == enabled
