"""Every method on every kind of architecture, against plain gradients and their differences.

The oracle calls the user's module itself on one example at a time, differentiates by plain reverse
mode, and takes second derivatives as differences of those gradients; runs are repeated by a plain
loop. It shares no code with the library.
"""

import copy
import warnings
from dataclasses import dataclass
from functools import cached_property

import hypothesis
import pytest
import torch
from families import (
    ACTIVATIONS,
    ARCHITECTURES,
    LOSSES,
    OUTSIDE,
    VARIANTS,
    assembled,
    examples,
    make,
)
from hypothesis import strategies as st
from oracles import F64, relative_error
from torch import nn

import msif_lab as msif

N, QUERIES, DECAY = 4, 2, 0.05
RECIPE = msif.SGD(lr=0.05, momentum=0.9, epochs=2, batch_size=2)
CLOSE = {F64: 1e-6, torch.float32: 5e-4}


# ---- The oracle ----


class Plain:
    """One stage by the module itself: a copy of it, its loss, its data, and what it trains."""

    def __init__(self, stage, trained):
        self.model = copy.deepcopy(stage.model).double()
        self.loss, self.weight_decay = stage.loss, stage.weight_decay
        self.data = stage.data.double()
        self.named = dict(self.model.named_parameters())
        self.trained = [self.named[name] for name in trained]
        self.names = list(trained)

    def loss_of(self, x, y):
        return self.loss(self.model(x[None].clone()), y[None])[0]

    def gradients_of(self, value, parameters):
        """One flat gradient of a number that was just computed."""
        if not value.requires_grad:
            return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    def rows(self, data=None, parameters=None):
        """``∇f_i`` one by one, ``(N, P)``."""
        data = data or self.data
        parameters = parameters or self.trained
        for parameter in parameters:
            parameter.requires_grad_(True)
        pairs = zip(data.x, data.y, strict=True)
        return torch.stack([self.gradients_of(self.loss_of(x, y), parameters) for x, y in pairs])

    def move(self, step, parameters=None):
        """Add a flat step to the parameters, in place."""
        parameters = parameters or self.trained
        parts = step.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.add_(part.view_as(parameter))

    @property
    def size(self):
        return sum(p.numel() for p in self.trained)

    def along(self, direction, what, h=3e-5):
        """Central difference of ``what()`` along a direction of the trained parameters."""
        self.move(h * direction)
        up = what()
        self.move(-2 * h * direction)
        down = what()
        self.move(h * direction)
        return (up - down) / (2 * h)

    @cached_property
    def hessians(self):
        """Each example's own ``∂∇f_i/∂θ`` by differences of its gradient, ``(N, P, P)``.

        Not made symmetric: nothing moves the padding row of an `Embedding`, though it moves others.
        """
        columns = [self.along(unit, self.rows) for unit in torch.eye(self.size, dtype=F64)]
        return torch.stack(columns, 2)

    @cached_property
    def gauss_newtons(self):
        """Each example's ``JᵀΛJ``; Λ by differences of the loss's gradient in the outputs."""
        found = []
        for x, y in zip(self.data.x, self.data.y, strict=True):
            z = self.model(x[None].clone())[0]
            jacobian = torch.stack([self.again(x, c) for c in range(len(z))])
            found.append(jacobian.T @ self.bend(z.detach(), y) @ jacobian)
        return torch.stack(found)

    def again(self, x, c):
        return self.gradients_of(self.model(x[None].clone())[0, c], self.trained)

    def bend(self, z, y, h=1e-5):
        def slope(outputs):
            leaf = outputs.clone().requires_grad_()
            return torch.autograd.grad(self.loss(leaf[None], y[None])[0], leaf)[0]

        units = h * torch.eye(len(z), dtype=F64)
        columns = [(slope(z + unit) - slope(z - unit)) / (2 * h) for unit in units]
        return torch.stack(columns, 1)


@dataclass
class Case:
    """A pipeline of one or two stages on a kind of architecture."""

    name: str
    seed: int = 0
    loss: str = "cross-entropy"
    variant: str = "plain"
    link: object = None
    dtype: torch.dtype = F64

    def __post_init__(self):
        inputs = (ARCHITECTURES | OUTSIDE)[self.name].inputs
        loss, outputs, _ = LOSSES[self.loss]
        stages = []
        self.initial = []
        for k in range(1 if self.link is None else 2):
            data = examples(inputs, N, self.loss, 10 * self.seed + k, self.variant)
            model = make(self.name, outputs, self.seed + k)
            if k:  # running statistics are constants, which a later stage has to share
                buffers = dict(stages[0].model.double().named_buffers())
                model.load_state_dict(buffers, strict=False)
                stages[0].model.to(self.dtype)
            self.initial.append(copy.deepcopy(model).to(self.dtype).double())
            stages.append(
                msif.Stage(
                    f"stage {k}",
                    model.to(self.dtype),
                    data.to(self.dtype),
                    loss,
                    DECAY,
                    self.link if k else None,
                    RECIPE,
                )
            )
        self.queries = examples(inputs, QUERIES, self.loss, 10 * self.seed + 7).to(self.dtype)
        with warnings.catch_warnings():  # of what has no second derivative; those are found below
            warnings.simplefilter("ignore")
            self.pipeline = msif.Pipeline(stages).fit(progress=False)

    @cached_property
    def plain(self):
        """The oracle's stages, at the trained weights."""
        stages = self.pipeline.stages
        return [Plain(s, self.trained_names(k)) for k, s in enumerate(stages)]

    def shared(self):
        names = [n for n, _ in self.pipeline.stages[-1].model.named_parameters()]
        return [n for n in names if not n.startswith("head.")]

    def trained_names(self, k):
        taken = self.shared() if k and isinstance(self.link, msif.Frozen) else []
        named = self.pipeline.stages[k].model.named_parameters()
        return [n for n, p in named if p.requires_grad and n not in taken]

    # -- what every method should give --

    def matrix(self, k, kind):
        plain = self.plain[k]
        own = plain.hessians if kind == "hessian" else plain.gauss_newtons
        matrix = own.mean(0) + DECAY * torch.eye(plain.size, dtype=F64)
        if k and isinstance(self.link, msif.Proximal):
            pairs = zip(plain.names, plain.trained, strict=True)
            pulled = [torch.full((p.numel(),), float(n in self.shared())) for n, p in pairs]
            matrix = matrix + 2 * self.link.alpha * torch.diag(torch.cat(pulled).double())
        return matrix

    @cached_property
    def damping(self):
        """Enough to make all matrices definite, and to be about as large as they are."""
        found = 0.2
        for k in range(len(self.plain)):
            matrix = self.matrix(k, "hessian")
            values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
            found = max(found, float(values.max() - 1.5 * values.min().clamp(max=0)))
        return round(found, 2)

    def damped(self, k, kind):
        matrix = self.matrix(k, kind)
        return matrix + self.damping * torch.eye(len(matrix), dtype=F64)

    def query_gradients(self):
        """``∇q`` in all parameters of the last stage, by name."""
        plain = self.plain[-1]
        every = list(plain.named.values())
        rows = plain.rows(self.queries.double(), every)
        parts = rows.split([p.numel() for p in every], 1)
        return dict(zip(plain.named, parts, strict=True))

    def cotangent(self, kind, adapt=True):
        """``∇q`` in what the first stage trains, ``(Q, P)``; ``adapt``: later stages respond."""
        q = self.query_gradients()
        first, last = self.plain[0], self.plain[-1]
        if first is last:
            return torch.cat([q[n] for n in first.names], 1)
        if adapt:
            right = torch.cat([q[n] for n in last.names], 1)
            v = torch.linalg.solve(self.damped(1, kind), right.T).T
            q = self.through_link(q, v)
        pieces = [
            q[n] if n in self.shared() else torch.zeros(QUERIES, first.named[n].numel(), dtype=F64)
            for n in first.names
        ]
        return torch.cat(pieces, 1)

    def through_link(self, q, v):
        last = self.plain[1]
        if isinstance(self.link, msif.Proximal):
            parts = v.split([p.numel() for p in last.trained], 1)
            return {n: 2 * self.link.alpha * p for n, p in zip(last.names, parts, strict=True)} | {
                n: torch.zeros_like(q[n]) for n in self.shared() if n not in last.names
            }
        shared = [last.named[n] for n in self.shared()]

        def slope():
            return last.rows(parameters=shared).mean(0)

        mixed = torch.stack([last.along(one, slope) for one in v])
        parts = mixed.split([p.numel() for p in shared], 1)
        return {n: q[n] - part for n, part in zip(self.shared(), parts, strict=True)}

    def implicit(self, kind="hessian", leave_one_out=False):
        plain, right = self.plain[0], self.cotangent(kind)
        matrix = self.damped(0, kind)
        if not leave_one_out:
            return -(right @ torch.linalg.solve(matrix, plain.rows().T)) / N
        own = plain.hessians if kind == "hessian" else plain.gauss_newtons
        columns = []
        for i, row in enumerate(plain.rows()):
            columns.append(right @ torch.linalg.solve(matrix - own[i] / N, row) / N)
        return -torch.stack(columns, 1)

    def run(self, weights=None, keep=None):
        """The queries' losses after plain runs of all stages, ``(Q,)``."""
        before = None
        for k, stage in enumerate(self.pipeline.stages):
            plain = Plain(stage, self.trained_names(k))
            plain.model.load_state_dict(self.initial[k].state_dict())
            coupled = {}
            if k:
                with torch.no_grad():
                    for name in self.shared():
                        plain.named[name].copy_(before.named[name])
                coupled = {n: before.named[n].detach() for n in self.shared() if n in plain.names}
            self._train(plain, weights if k == 0 else None, coupled, keep if k == 0 else None)
            before = plain
        with torch.no_grad():
            pairs = zip(self.queries.double().x, self.queries.double().y, strict=True)
            self.ended = before
            return torch.stack([before.loss_of(x, y) for x, y in pairs])

    def _train(self, plain, weights, coupled, keep):
        weights = torch.ones(N, dtype=F64) if weights is None else weights
        alpha = self.link.alpha if isinstance(self.link, msif.Proximal) else 0.0
        generator = torch.Generator().manual_seed(RECIPE.seed)
        velocity = [torch.zeros_like(p) for p in plain.trained]
        for parameter in plain.trained:
            parameter.requires_grad_(True)
        for _ in range(RECIPE.epochs):
            for batch in torch.randperm(N, generator=generator).split(RECIPE.batch_size):
                losses = [plain.loss_of(plain.data.x[i], plain.data.y[i]) for i in batch]
                total = sum(weights[i] * f for i, f in zip(batch, losses, strict=True)) / len(batch)
                found = torch.autograd.grad(total, plain.trained, allow_unused=True)
                with torch.no_grad():
                    triples = zip(plain.names, plain.trained, found, strict=True)
                    for j, (name, p, g) in enumerate(triples):
                        g = (torch.zeros_like(p) if g is None else g) + DECAY * p
                        if name in coupled:
                            g = g + 2 * alpha * (p - coupled[name])
                        velocity[j] = RECIPE.momentum * velocity[j] + g
                        p.sub_(RECIPE.lr * velocity[j])
                if keep is not None:
                    keep.append(copy.deepcopy(plain))

    def unrolled(self, some, h=3e-4):
        """``∂q/∂w_i`` of some examples by differences of plain runs, ``(Q, E)``."""
        columns = []
        for i in some:
            unit = torch.eye(N, dtype=F64)[i]
            one = torch.ones(N, dtype=F64)
            columns.append((self.run(one + h * unit) - self.run(one - h * unit)) / (2 * h))
        return torch.stack(columns, 1)

    def outputs(self, plain):
        with torch.no_grad():
            return torch.cat([plain.model(x[None].clone()) for x in plain.data.x])

    def features(self, plain, data):
        seen = []
        hook = plain.model.head.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        with torch.no_grad():
            for x in data.double().x:
                plain.model(x[None].clone())
        hook.remove()
        rows = torch.cat(seen).flatten(1)
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)  # some are blank

    def trac_in(self):
        """Two checkpoints, each for half of the four steps."""
        kept = []
        self.run(keep=kept)
        total = 0.0
        for plain in (kept[1], kept[3]):
            v = self.cotangent("hessian", adapt=False)
            if len(self.plain) == 1:
                v = plain.rows(self.queries.double())
            total = total - 2 * RECIPE.lr * v @ plain.rows().T / N
        return total


# ---- What is compared ----

TIGHT = {F64: 1e-8, torch.float32: 1e-5}


def implicit(case, solver, kind="hessian", leave_one_out=False):
    with warnings.catch_warnings():  # four steps end at no optimum; the damping makes up for it
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        attributor = msif.ImplicitInfluence(
            solver, curvature=kind, damping=case.damping, leave_one_out=leave_one_out
        ).fit(case.pipeline)
        return attributor.score(case.queries).values


def solved(make_solver, kind="hessian"):
    """The scores by one solver and by the oracle."""

    def both(case):
        return implicit(case, make_solver(TIGHT[case.dtype]), kind), case.implicit(kind)

    return both


def removed(kind):
    def both(case):
        return implicit(case, msif.Exact(), kind, True), case.implicit(kind, True)

    return both


def unrolled(case):
    attributor = msif.UnrolledInfluence(memory="8GB").fit(case.pipeline, progress=False)
    scores = attributor.score(case.queries, progress=False).values
    some = [0, N - 1]
    return scores[:, some], case.unrolled(some)


def ekfac(case):
    """As a preconditioner, so that the answer is exact; refused where it has no formula."""
    pytest.importorskip("curvlinops")
    o = case.pipeline.objective(0)
    layers = [o.model.get_submodule(name.rpartition(".")[0]) for name in o.trained_names]
    known = {type(layer) for layer in layers} <= {nn.Linear, nn.Conv2d}
    solver = msif.ConjugateGradient(tol=TIGHT[case.dtype], preconditioner=msif.EKFAC())
    try:
        return implicit(case, solver, "ggn"), case.implicit("ggn")
    except msif.UnsupportedModelError as error:
        assert "EKFAC" in str(error)
        ours = case.loss in ("cross-entropy", "squared error", "squared error of one output")
        others = ("group", "padding", "each called with every batch")
        assert not known or not ours or any(words in str(error) for words in others)
        return None, None


def derivatives(case):
    """Gradients, and products with the curvature, which all methods consist of."""
    o, full = case.pipeline.objective(0), case.pipeline.trained()[0]
    rows = torch.cat([g for _, g in msif.per_example_gradients(o, full)])
    v = torch.randn(o.size, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    truth, size = case.plain[0].rows(), case.plain[0].size
    eye = torch.eye(size, dtype=case.dtype)
    found, expected = [], []
    for kind in ("hessian", "ggn"):
        matrix = case.pipeline.curvature(0, kind)
        exact = case.matrix(0, kind)
        unmoved = (exact - exact.diag().diag()).abs().sum(1) == 0
        exact = torch.where(unmoved[None] & ~eye.bool(), 0.0, exact)  # a padding row
        found += [matrix.dense(), matrix @ eye, (matrix @ v.to(case.dtype)[:, :1])]
        expected += [exact, exact, exact @ v[:, :1]]
    for columns in (1, 3):
        found.append(msif.example_products(o, full, v[:, :columns].to(case.dtype)))
        expected.append((truth @ v[:, :columns]).T)
    scaled = [t / t.norm().clamp(min=1e-3) for t in expected]
    pairs = zip(found, expected, strict=True)
    ours = [f.double() / t.norm().clamp(min=1e-3) for f, t in pairs]
    ours = [*ours, rows.double() / truth.norm()]
    scaled = [*scaled, truth / truth.norm()]
    return torch.cat([t.flatten() for t in ours]), torch.cat([t.flatten() for t in scaled])


def baselines(case):
    """Every baseline by its definition, each scaled to norm one and side by side."""
    first, m = case.plain[0], N
    rows = first.rows()
    v = case.cotangent("ggn", adapt=False)
    z, y = case.outputs(first), first.data.y
    expected = {
        "random": torch.randn(QUERIES, m, generator=torch.Generator().manual_seed(0), dtype=F64),
        "loss": torch.stack([first.loss_of(a, b) for a, b in zip(first.data.x, y, strict=True)]),
        "gradient norm": rows.norm(dim=1),
        "gradient dot": -(v @ rows.T) / m,
        "single stage": -(v @ torch.linalg.solve(case.damped(0, "ggn"), rows.T)) / m,
        "similarity": case.features(first, case.queries) @ case.features(first, first.data).T,
        "TracIn": case.trac_in(),
    }
    some = v.abs().amax(0) > 0
    unit = torch.nn.functional.normalize(rows * some, dim=1)
    expected["gradient cosine"] = -torch.nn.functional.normalize(v, dim=1) @ unit.T
    if z.shape[1] > 1:
        p = z.softmax(1)
        expected["entropy"] = -(p * p.log()).sum(1)
        if y.ndim == 1:
            rest = p.clone()
            rest[range(m), y] = 0
            expected["margin"] = 1 - (p[range(m), y] - rest.amax(1))
    methods = msif.all_baselines() | {
        "TracIn": msif.TracIn(checkpoints=2),
        "single stage": msif.SingleStage(damping=case.damping),
    }
    ours, truth = [], []
    for name, values in expected.items():
        values = values.detach().expand(QUERIES, m)
        found = methods[name].fit(case.pipeline).score(case.queries).values.double()
        ours.append(found / values.norm().clamp(min=1e-12))
        truth.append(values / values.norm().clamp(min=1e-12))
    assert set(methods) - set(expected) <= {"margin", "entropy"}
    return torch.stack(ours), torch.stack(truth)


METHODS = {
    "derivatives": derivatives,
    "exact": solved(lambda tol: msif.Exact()),
    "conjugate gradients": solved(lambda tol: msif.ConjugateGradient(tol=tol)),
    "one by one": solved(lambda tol: msif.ConjugateGradient(tol=tol, block=1)),
    "nested": solved(lambda tol: msif.ConjugateGradient(tol=tol, shares=(0.4, 0.7))),
    "preconditioned": solved(
        lambda tol: msif.ConjugateGradient(tol=tol, preconditioner=msif.LowRank(rank=5))
    ),
    "jacobi": solved(lambda tol: msif.ConjugateGradient(tol=tol, preconditioner=msif.Jacobi())),
    "minres": solved(lambda tol: msif.MINRES(tol=tol)),
    "lissa": solved(lambda tol: msif.LiSSA(tol=tol, max_iter=5000)),
    "exact, ggn": solved(lambda tol: msif.Exact(), "ggn"),
    "low rank": solved(lambda tol: msif.LowRank(rank=10**4), "ggn"),
    "nystrom": solved(lambda tol: msif.LowRank(rank=10**4, method="nystrom"), "ggn"),
    "ekfac": ekfac,
    "leave one out": removed("hessian"),
    "leave one out, ggn": removed("ggn"),
    "unrolled": unrolled,
    "baselines": baselines,
}
# What a model without second derivatives is still good for; the rest is refused by name.
FIRST_ORDER = {"exact, ggn", "low rank", "nystrom", "leave one out, ggn", "ekfac", "baselines"}
NO_SECOND_DERIVATIVE = {"hardsigmoid"}
ALWAYS = (
    *("derivatives", "exact", "conjugate gradients", "minres", "lissa", "low rank", "ekfac"),
    *("leave one out", "unrolled", "baselines"),
)
SOMETIMES = (
    *("one by one", "nested", "preconditioned", "jacobi"),
    *("nystrom", "exact, ggn", "leave one out, ggn"),
)


def check(case, methods):
    """Assert that the relative error of each method is small; the errors by method."""
    errors = {}
    for name in methods:
        if case.name in NO_SECOND_DERIVATIVE and name not in FIRST_ORDER:
            with pytest.raises(msif.UnsupportedModelError, match="second derivative"):
                METHODS[name](case)
            continue
        found, truth = METHODS[name](case)
        if found is not None:
            errors[name] = relative_error(found.double(), truth)
    wrong = {name: error for name, error in errors.items() if not error <= CLOSE[case.dtype]}
    assert not wrong, (case.name, case.loss, case.variant, case.link, wrong)
    return errors


def case_of(number, name, **settings):
    """The losses and the oddities of data take turns."""
    loss = list(LOSSES)[number // 2 % len(LOSSES)] if number % 4 < 2 else "cross-entropy"
    return Case(name, number, loss, VARIANTS[number // 3 % len(VARIANTS)], **settings)


def turns(number, among, count):
    """Some of the methods, others for every number."""
    return [among[(number * count + i) % len(among)] for i in range(count)]


# Many steps, each with several operators: most of the time for few of the kinds.
LONG = {"gru", "gru, time first", "own recurrence", "transformer"}
NUMBERED = [
    pytest.param(
        number, name, id=name, marks=[pytest.mark.slow] if number % 2 or name in LONG else []
    )
    for number, name in enumerate(ARCHITECTURES)
]
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3), "warm": msif.WarmStart()}
LINKED = ("two layers", "conv2d, norms", "own attention", "padding and a layer", "tied weights")


def test_there_are_enough():
    assert len(ARCHITECTURES) >= 120
    assert sum(not p.marks for p in NUMBERED) >= 60


@pytest.mark.parametrize(("number", "name"), NUMBERED)
def test_every_method_is_right_in_float64(number, name):
    case = case_of(number, name)
    errors = check(case, [*ALWAYS, *turns(number // 2, SOMETIMES, 1)])
    assert errors


# Hessians of ReLU nets as large as these cannot be differenced: every step crosses kinks.
# tests/test_outside_models.py compares single products.
KINKED = {"resnet18", "mobilenet_v2"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_every_method_is_right_on_models_of_others(name):
    if name in ("GPT-2", "DistilBERT"):
        pytest.importorskip("transformers")
    case = Case(name, 1)
    if name in KINKED:
        case.damping = 0.5
    check(case, FIRST_ORDER | {"unrolled"} if name in KINKED else METHODS)


@pytest.mark.parametrize(("number", "name"), NUMBERED[::6])
def test_methods_are_right_in_float32(number, name):
    methods = turns(number // 6, [n for n in METHODS if n != "derivatives"], 4)
    check(case_of(number, name, dtype=torch.float32), methods)


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("link", LINKS)
def test_methods_are_right_across_links(link, name):
    number = LINKED.index(name)
    methods = ["unrolled", "baselines"]
    if link == "warm":
        with pytest.raises(ValueError, match="WarmStart"):
            implicit(Case(name, number, link=LINKS[link]), msif.Exact())
    else:
        methods += ["exact", "leave one out", "exact, ggn"]
        methods += turns(number, ["conjugate gradients", "minres", "lissa", "low rank"], 1)
    check(Case(name, number, variant=VARIANTS[number % 4], link=LINKS[link]), methods)


def test_the_comparison_can_fail():
    """Negative control: scores of slightly other data, weights or decay are told apart."""
    case = Case("two layers", 1)
    truth = case.implicit()
    assert relative_error(implicit(case, msif.Exact()), truth) < 1e-8
    wrong = Case("two layers", 1)
    wrong.damping = case.damping
    wrong.plain[0].move(1e-5 * torch.ones(wrong.plain[0].size, dtype=F64))
    assert relative_error(wrong.implicit(), truth) > CLOSE[F64]
    columns = case.unrolled([0])
    assert relative_error(case.unrolled([1]), columns) > 0.1


# ---- Drawn architectures ----

WIDTH = st.integers(2, 4)
PLAIN_ACTIVATIONS = sorted(ACTIVATIONS.keys() - NO_SECOND_DERIVATIVE)


@st.composite
def drawn(draw):
    """A description of a net: its blocks, what is frozen, the loss, the data, and the link."""
    inputs = draw(st.sampled_from(["flat", "steps", "map", "words"]))
    blocks = []
    for _ in range(draw(st.integers(1, 2))):
        blocks.append(
            (
                draw(st.sampled_from(["linear", "norm", "residual", "gate", "scaled", "tied"])),
                draw(st.sampled_from(PLAIN_ACTIVATIONS)),
                draw(st.booleans()),
            )
        )
    return {
        "inputs": inputs,
        "blocks": tuple(blocks),
        "frozen": draw(st.booleans()),
        "loss": draw(st.sampled_from(sorted(LOSSES))),
        "variant": draw(st.sampled_from(VARIANTS)),
        "link": draw(st.sampled_from([None, None, "frozen", "proximal", "warm"])),
        "seed": draw(st.integers(0, 1000)),
    }


@hypothesis.given(drawn(), st.integers(0, 100))
@hypothesis.settings(derandomize=True, max_examples=8, deadline=None, database=None)
def test_drawn_architectures(description, turn):
    name = repr(description)
    ARCHITECTURES[name] = assembled(description)
    try:
        link = LINKS.get(description["link"])
        case = Case(name, description["seed"], description["loss"], description["variant"], link)
        methods = ["unrolled", "baselines"]
        if description["link"] != "warm":
            methods += ["exact", "leave one out"]
            methods += turns(turn, ["conjugate gradients", "minres", "lissa", "low rank"], 1)
        check(case, methods)
    finally:
        del ARCHITECTURES[name]
