"""Models and losses on which a fast route is wrong: the plain one is used, or the input is refused.

The oracle is plain reverse mode on one example at a time, by the module itself.
"""

import pytest
import torch
import torch.nn.functional as F
from oracles import F64, draw, relative_error
from torch import nn
from torch.func import functional_call

import msif_lab as msif
from msif_lab.curvature import derivatives, layers, matrices
from msif_lab.data.examples import unequal
from msif_lab.pipeline import pipeline as pipelines


def seeded(make, seed=1):
    torch.manual_seed(seed)
    return make().double()


def pipeline_of(model, data, weight_decay=0.05, fit=True, **settings):
    stage = msif.Stage("fit", model, data, weight_decay=weight_decay, **settings)
    pipeline = msif.Pipeline([stage])
    return pipeline.fit(progress=False) if fit else pipeline.adopt()


def loss_alone(model, theta, x, y, loss=msif.cross_entropy):
    parts = theta.split([p.numel() for p in model.parameters()])
    named = dict(model.named_parameters())
    values = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
    return loss(functional_call(model, values | dict(model.named_buffers()), (x[None],)), y[None])


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradients(model, data):
    rows = []
    for x, y in zip(data.x, data.y, strict=True):
        theta = flat(model).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_alone(model, theta, x, y).sum(), theta)
        rows.append(gradient)
    return torch.stack(rows)


def hessian(model, data, weight_decay):
    def risk(theta):
        pairs = zip(data.x, data.y, strict=True)
        total = sum(loss_alone(model, theta, x, y).sum() for x, y in pairs)
        return total / len(data) + weight_decay / 2 * theta.square().sum()

    return torch.autograd.functional.hessian(risk, flat(model))


def expected_scores(model, train, queries, weight_decay, damping=0.0):
    matrix = hessian(model, train, weight_decay)
    matrix = matrix + damping * torch.eye(len(matrix), dtype=F64)
    solved = torch.linalg.solve(matrix, gradients(model, train).T)
    return -(gradients(model, queries) @ solved) / len(train)


def labelled(n, *shape, seed=0, classes=3):
    return msif.Examples(draw(n, *shape, seed=seed), torch.arange(n) % classes)


class Sorted(nn.Module):
    """Sorts its batch by the first input, and puts the outputs back in order."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return self.head(torch.tanh(self.layer(x[order])))[order.argsort()]


class TimeFirst(nn.Module):
    """Its layers see (time, batch, features)."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


class InPlace(nn.Module):
    """An in-place activation as a function, which no module announces."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.constant_(self.b.bias, 0.5)

    def forward(self, x):
        return self.c(F.relu(self.b(torch.tanh(self.a(x))), inplace=True))


class Scaled(nn.Module):
    """A parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(5, 4), nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.logit_scale * self.h(torch.tanh(self.a(x)))


class Prelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.h = nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return self.h(self.n(self.a(x)))


class Bag(nn.Module):
    """A padding row that has no gradient, though forward mode would give it a tangent."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8, 3, padding_idx=0)
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(self.words(x).mean(1))))


class TextConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(8, 3, padding_idx=0)
        self.conv, self.head = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        features = torch.tanh(self.conv(torch.tanh(self.words(x)).transpose(1, 2)))
        return self.head(features.mean(2))


def sentences(n, seed=0):
    tokens = torch.randint(1, 8, (n, 6), generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        tokens[i, 6 - i % 5 :] = 0
    return msif.Examples(tokens, ((tokens == 3) | (tokens == 5)).any(1).long())


MODELS = {
    "sorted batch": (Sorted, labelled(40, 6), labelled(6, 6, seed=1)),
    "time first, as many steps as examples": (
        TimeFirst,
        labelled(5, 5, 4),
        labelled(2, 5, 4, seed=1),
    ),
    "time first": (TimeFirst, labelled(30, 2, 4), labelled(2, 2, 4, seed=1)),
    "in place": (InPlace, labelled(40, 5), labelled(6, 5, seed=1)),
    "no dimensions": (Scaled, labelled(30, 5), labelled(4, 5, seed=1)),
    "prelu, as many examples as outputs": (Prelu, labelled(3, 5), labelled(3, 5, seed=1)),
    "prelu": (Prelu, labelled(20, 5), labelled(4, 5, seed=1)),
    "padding": (Bag, sentences(60), sentences(5, seed=1)),
    "padding and convolution": (TextConvolution, sentences(60), sentences(5, seed=1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_route_gives_what_plain_autograd_gives(name):
    make, train, queries = MODELS[name]
    model = seeded(make)
    pipeline = pipeline_of(model, train, fit=False)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    rows = gradients(model, train)
    ours = torch.cat([g for _, g in msif.per_example_gradients(o, full)])
    assert relative_error(ours, rows) < 1e-9
    for count in (1, 4):
        vectors = draw(o.size, count, seed=count)
        products = msif.example_products(o, full, vectors)
        assert relative_error(products, (rows @ vectors).T) < 1e-9
    truth = hessian(model, train, 0.05)
    eye = torch.eye(len(truth), dtype=F64)
    for kind in ("hessian", "ggn"):
        matrix = pipeline.curvature(0, kind)
        assert relative_error(matrix.dense(), matrix @ eye) < 1e-9, kind
    assert relative_error(pipeline.curvature(0, "hessian").dense(), truth) < 1e-9
    damping = 1.0  # so that the matrix is definite wherever training has not led
    with pytest.warns(msif.ConvergenceWarning):  # nothing was trained
        attributor = msif.ImplicitInfluence(damping=damping).fit(pipeline)
    scores = attributor.score(queries).values
    assert relative_error(scores, expected_scores(model, train, queries, 0.05, damping)) < 1e-8


@pytest.mark.parametrize("name", ["sorted batch", "in place", "padding"])
def test_without_the_gate_these_would_be_wrong(name, monkeypatch):
    """Negative control: each fast route believed at once."""
    monkeypatch.setattr(layers, "agree", lambda fast, plain: fast() is not None)
    monkeypatch.setattr(layers, "_works_in_place", lambda o, x: False)
    monkeypatch.setattr(derivatives, "forward_agrees", lambda o, every=False: True)
    monkeypatch.setattr(matrices, "forward_agrees", lambda o, every=False: True)
    monkeypatch.setattr(matrices, "agree", lambda fast, plain: True)
    make, train, _ = MODELS[name]
    worst = 0.0
    for seed in range(4):
        model = seeded(make, seed)
        pipeline = pipeline_of(model, train, fit=False)
        o, full = pipeline.objective(0), pipeline.trained()[0]
        rows = gradients(model, train)
        ours = torch.cat([g for _, g in msif.per_example_gradients(o, full)])
        pushed = pipeline.curvature(0, "ggn") @ torch.eye(o.size, dtype=F64)
        dense = pipeline.curvature(0, "ggn").dense()
        worst = max(worst, relative_error(ours, rows), relative_error(pushed, dense))
    assert worst > 1e-3


def test_a_net_without_bias_on_blank_examples_is_not_linear():
    x = draw(31, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    x[[0, 15, 30]] = 0
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    torch.manual_seed(1)
    model = model.double()
    train = msif.Examples(x, y)
    pipeline = pipeline_of(model, train, fit=False)
    truth = hessian(model, train, 0.05)
    assert relative_error(pipeline.curvature(0).dense(), truth) < 1e-9


def test_a_loss_that_mixes_the_batch_is_refused_whatever_the_targets():
    def mixing(z, y):
        return ((z - y) ** 2).mean(1)  # (B, 1) − (B,) is (B, B)

    for seed in range(20):
        y = draw(60, seed=seed)
        y[torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.8] = 0
        data = msif.Examples(draw(60, 3), y)
        with pytest.raises(ValueError, match="mixes the examples of a batch"):
            msif.Pipeline([msif.Stage("fit", nn.Linear(3, 1).double(), data, loss=mixing)])


def test_a_target_that_mixes_the_batch_is_refused():
    pipeline = pipeline_of(msif.softmax_regression(5, 3).double(), labelled(40, 5))
    queries = labelled(6, 5, seed=1)
    methods = [msif.ImplicitInfluence(), msif.GradientDot()]
    for method in methods:
        with pytest.raises(ValueError, match="mixes the examples of a batch"):
            method.fit(pipeline).score(queries, target=lambda z, y: z[:, 1] - z[:, 1].mean())
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        msif.removal_effects(
            pipeline, queries, [[0], [1]], target=lambda z, y: z[:, 1] - z[:, 1].mean()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_adam_never_reached_does_not_count_as_chaos(dtype, recwarn):
    """Pixels that are dark in all of training, weights at exactly zero, and a penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 6, generator=generator)
    x[:, 4:] = 0
    train = msif.Examples(x, (x[:, 0] > 0.3).long()).to(dtype)
    queries = msif.Examples(torch.rand(3, 6, generator=generator), [0, 1, 1]).to(dtype)
    recipe = msif.Adam(lr=0.01, epochs=5, batch_size=7)
    model = msif.softmax_regression(6, 2, zero_head=True).to(dtype)
    pipeline = pipeline_of(model, train, 1e-2, recipe=recipe)
    h = 1e-2
    weights = torch.ones(80, 40, dtype=dtype)
    weights[range(40), range(40)] += h
    weights[range(40, 80), range(40)] -= h
    q = pipeline.retrain(weights, progress=False).evaluate(queries)
    differences = (q[:, :40] - q[:, 40:]) / (2 * h)
    attributor = msif.UnrolledInfluence().fit(pipeline, progress=False)
    scores = attributor.score(queries, progress=False).values
    assert relative_error(scores, differences) < 1e-2
    assert not [w for w in recwarn if issubclass(w.category, msif.UnsmoothTrainingWarning)]


class Circular(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, **settings)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"padding_mode": "circular"}, "circular padding"), ({"groups": 2}, "in 2 groups")],
)
def test_ekfac_refuses_convolutions_that_it_would_take_for_others(settings, words):
    pytest.importorskip("curvlinops")
    pipeline = pipeline_of(seeded(lambda: Circular(**settings)), labelled(12, 2, 5, 5), fit=False)
    attributor = msif.ImplicitInfluence(msif.EKFAC(), curvature="ggn")
    with pytest.raises(msif.UnsupportedModelError, match=f"conv.weight .*{words}"):
        attributor.fit(pipeline)


def test_ekfac_takes_one_target_with_or_without_its_dimension():
    pytest.importorskip("curvlinops")
    x, y = draw(30, 4), draw(30, seed=1)
    scores = []
    for targets in (y, y[:, None]):
        data = msif.Examples(x, targets)
        model = seeded(lambda: nn.Linear(4, 1))
        pipeline = pipeline_of(model, data, loss=msif.mean_squared_error)
        attributor = msif.ImplicitInfluence(msif.EKFAC(samples=None), curvature="ggn")
        scores.append(attributor.fit(pipeline).score(data[:5]).values)
    assert relative_error(scores[0], scores[1]) < 1e-9


class Activated(nn.Module):
    """Its activation is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.activation = torch.tanh

    def forward(self, x):
        return self.head(self.activation(self.layer(x)))


CHANGES = {
    "activation": lambda s: setattr(s.model, "activation", torch.sigmoid),
    "data in place": lambda s: s.data.x.mul_(0.5),
    "data": lambda s: setattr(s, "data", labelled(30, 5, seed=4)),
    "loss": lambda s: setattr(s, "loss", lambda z, y: 2 * msif.cross_entropy(z, y)),
    "what the loss closes over": lambda s: SCALE.append(2.0),
    "private attribute": lambda s: setattr(s.model, "_sign", -1.0),
    "hook for hook": lambda s: swap_hooks(s.model, lambda m, x, z: z.detach()),
    "backward hook": lambda s: s.model.head.register_full_backward_pre_hook(scale_slope),
    "what is trained": lambda s: s.model.layer.bias.requires_grad_(False),
    "layer": lambda s: setattr(s.model, "head", nn.Linear(4, 3).double()),
    "mode": lambda s: s.model.eval(),
}
SCALE = []


def closing_over(z, y):
    return msif.cross_entropy(z, y) * (SCALE or [1.0])[0]


def scale_slope(module, slope):
    return tuple(0.3 * part for part in slope)


def swap_hooks(model, hook):
    model.layer._forward_hooks.clear()
    model.layer.register_forward_hook(hook)


class Moded(Activated):
    """Computes something else in train mode, and after a private attribute changes."""

    _sign = 1.0

    def forward(self, x):
        return self._sign * super().forward(x if self.training else 2 * x)


@pytest.mark.parametrize("change", CHANGES)
def test_checks_are_made_again_where_something_changed(change, monkeypatch):
    checked = []
    plain = pipelines.check_gradient

    def counted(o, inherited):
        checked.append(o.where)
        return plain(o, inherited) if len(checked) == 1 else ~inherited

    monkeypatch.setattr(pipelines, "check_gradient", counted)
    model = Moded().double().train()
    model.layer.register_forward_hook(lambda m, x, z: 1.5 * z)
    stage = msif.Stage("fit", model, labelled(30, 5), closing_over, weight_decay=0.05)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    pipeline.fit(progress=False).adopt()
    assert len(checked) == 1
    try:
        CHANGES[change](stage)
        pipeline._prepare()
    finally:
        SCALE.clear()
    assert len(checked) == 2


def test_a_mode_that_changes_nothing_is_no_change_and_another_is_refused():
    for kind, refused in ((Activated, False), (Moded, True)):
        stage = msif.Stage("fit", kind().double().eval(), labelled(30, 5), weight_decay=0.05)
        pipeline = msif.Pipeline([stage]).fit(progress=False)
        stage.model.train()
        if refused:
            with pytest.raises(ValueError, match="switched between train and eval mode"):
                pipeline.curvature(0)
        else:
            pipeline.curvature(0)


def test_checks_of_another_dtype_are_not_believed():
    """Integer inputs stay the same object when a pipeline changes its dtype."""
    stage = msif.Stage("fit", Bag().float(), sentences(20), weight_decay=0.05)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    before = pipeline.objective(0)
    assert pipeline.double().fit(progress=False).objective(0)._found is not before._found


def test_plan_names_what_is_done_the_slow_way():
    padded = msif.plan(pipeline_of(seeded(Bag), sentences(60), fit=False))
    assert "reverse mode alone" in str(padded)
    mixed = msif.plan(pipeline_of(seeded(Routed), labelled(30, 5), fit=False))
    assert "gradients one example at a time" in str(mixed)
    usual = msif.plan(pipeline_of(seeded(Activated), labelled(30, 5), fit=False))
    assert usual.stages[0].plain == ()


class Routed(nn.Module):
    """A mixture of two experts, each of which sees only its own rows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        features = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0).long() == i).nonzero().flatten()
            features = features.index_add(0, rows, expert(x[rows]))
        return self.head(torch.tanh(features))


def test_unequal_examples_differ():
    x = torch.zeros(100, 3)
    x[77, 1] = 1.0
    assert 77 in unequal(msif.Examples(x, torch.zeros(100).long()), among=100).tolist()
    labels = torch.zeros(100).long()
    labels[40] = 1
    assert 40 in unequal(msif.Examples(x, labels), among=100).tolist()
    copies = msif.Examples(torch.ones(50, 2), torch.zeros(50).long())
    assert len(unequal(copies).unique()) == 5
    sparse = torch.zeros(6, 20000)
    sparse[range(6), range(1, 12, 2)] = 1.0
    assert len(unequal(msif.Examples(sparse, torch.zeros(6).long())).unique()) == 5
    assert unequal(msif.Examples(torch.ones(1, 2), [0])).tolist() == [0]
