"""Curvature products and per-example derivatives against dense oracles written without the
library's operators.
"""

import copy

import pytest
import torch
from conftest import random_examples, random_model, random_pipeline, random_queries
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import msif_lab as msif
from msif_lab import memory
from msif_lab.curvature import own_products
from msif_lab.objective.objective import Lanes

F64 = torch.float64
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3)}


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def objective_at_random(kind, regression, link=None):
    """A stage's objective and a random point: an untrained net, where the Hessian is indefinite."""
    pipeline = random_pipeline(kind, regression, LINKS.get(link, msif.Frozen()), k=2, fit=False)
    stage = 0 if link is None else 1
    o = pipeline.objective(stage)
    return o, o.layout.flatten(pipeline.stages[stage].model) + 0.3 * draw(o.layout.size)


class Oracle:
    """F written out from its definition, with its own flattening and closed-form losses."""

    def __init__(self, o, full, weights=None):
        self.o, self.weights = o, torch.ones(len(o.data), dtype=F64) if weights is None else weights
        shapes = {name: p.shape for name, p in o.model.named_parameters()}
        parts = full.split([shape.numel() for shape in shapes.values()])
        self.values = {
            name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)
        }
        self.theta = torch.cat([self.values[name].reshape(-1) for name in o.trained_names])
        self.shared = torch.cat(
            [torch.full((shapes[name].numel(),), "head" not in name) for name in o.trained_names]
        )

    def outputs(self, theta, x):
        values, start = dict(self.values), 0
        for name in self.o.trained_names:
            size = values[name].numel()
            values[name] = theta[start : start + size].view(values[name].shape)
            start += size
        return functional_call(self.o.model, values, (x,))

    def losses(self, theta, x, y):
        z = self.outputs(theta, x)
        if y.ndim == 1:
            return functional.cross_entropy(z, y, reduction="none")
        return ((z - y) ** 2).mean(1)

    def risk(self, theta):
        data = (self.weights * self.losses(theta, self.o.data.x, self.o.data.y)).sum() / len(
            self.o.data
        )
        apart = theta[self.shared] - 1.0  # any centre: it does not matter to the curvature
        return data + self.o.weight_decay / 2 * (theta**2).sum() + self.o.alpha * (apart**2).sum()

    def hessian(self):
        return torch.autograd.functional.hessian(self.risk, self.theta)

    def ggn(self):
        """(1/m) Σ w_i J_iᵀ Λ_i J_i with the loss's output Hessian in closed form, plus the penalty."""
        o, x, y = self.o, self.o.data.x, self.o.data.y
        jacobians = vmap(jacrev(lambda t, xi: self.outputs(t, xi[None])[0]), (None, 0))(
            self.theta, x
        )
        z = self.outputs(self.theta, x)
        if y.ndim == 1:
            p = z.softmax(1)
            inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        else:
            inner = 2 / y.shape[1] * torch.eye(y.shape[1], dtype=F64).expand(len(y), -1, -1)
        matrix = torch.einsum(
            "i,iap,iab,ibq->pq", self.weights / len(y), jacobians, inner, jacobians
        )
        penalty = o.weight_decay + 2 * o.alpha * self.shared.to(F64)
        return matrix + torch.diag(penalty)


def close(actual, expected, tol=1e-10):
    scale = float(expected.abs().max()) or 1.0
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tol * scale


# ---- Losses ----


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_and_its_derivatives_are_those_of_torch(scale):
    z, y = scale * draw(7, 4), torch.tensor([0, 3, 1, 1, 2, 0, 3])
    for derivative in (lambda f: f, jacrev, lambda f: jacrev(jacrev(f))):
        ours = derivative(lambda t: msif.cross_entropy(t, y))(z)
        close(
            ours, derivative(lambda t: functional.cross_entropy(t, y, reduction="none"))(z), 1e-12
        )
    tokens, logits = torch.tensor([[0, 3, 1], [2, 2, 0]]), scale * draw(2, 3, 4)
    expected = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    ).mean(1)
    close(msif.next_token_loss(logits, tokens), expected, 1e-12)


def test_cross_entropy_of_a_masked_output():
    """A logit of −inf means probability zero, as in masked vocabularies; it is no NaN."""
    z, y = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=F64), torch.tensor([0])
    close(msif.cross_entropy(z, y), functional.cross_entropy(z, y, reduction="none"), 1e-12)


# ---- Products ----


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("link", [None, "frozen", "proximal"])
@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_products_equal_dense_oracles(kind, regression, link, weighted):
    o, full = objective_at_random(kind, regression, link)
    weights = draw(len(o.data), seed=1).abs() if weighted else None
    if weighted:
        weights[3] = 0
    oracle, vectors = Oracle(o, full, weights), draw(o.size, 5)
    hessian, ggn = msif.Hessian(o, full, weights), msif.GGN(o, full, weights)
    for operator, expected in ((hessian, oracle.hessian()), (ggn, oracle.ggn())):
        close(operator @ vectors, expected @ vectors)
        close(operator.dense(), expected)
        assert torch.equal(operator.dense(), operator.dense().T)
    if link != "frozen":  # a net is not linear: the two must be told apart (negative control)
        assert float((hessian.dense() - ggn.dense()).norm()) > 1e-2 * float(ggn.dense().norm())


def test_every_parameter_without_penalty():
    """``every=True``: the data term over all D parameters, whose off-diagonal block is G_WT."""
    o, full = objective_at_random("mlp", False, "frozen")

    def risk(theta):
        return functional.cross_entropy(
            functional_call(o.model, o.layout.named(theta), (o.data.x,)), o.data.y
        )

    expected = torch.autograd.functional.hessian(risk, full)
    close(msif.Hessian(o, full, every=True).dense(), expected)
    own = o.trained_positions
    close(msif.Hessian(o, full, ridge=False).dense(), expected[own][:, own])


@pytest.mark.parametrize("operator", [msif.Hessian, msif.GGN])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_linear_and_symmetric(kind, operator):
    o, full = objective_at_random(kind, False)
    a, u, v = operator(o, full), draw(o.size, 4, seed=1), draw(o.size, 4, seed=2)
    close(a @ (2.5 * u - 3 * v), 2.5 * (a @ u) - 3 * (a @ v), 1e-12)
    close(u.T @ (a @ v), (a @ u).T @ v, 1e-12)
    columns = a @ torch.eye(o.size, dtype=F64)
    assert float((columns - columns.T).abs().max()) <= 1e-12
    close((a @ u)[:, 2], a @ u[:, 2], 1e-12)  # a column alone and among others


@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_ggn_is_positive_semi_definite(kind, regression):
    o, full = objective_at_random(kind, regression)
    ggn, hessian = (
        msif.GGN(o, full, ridge=False).dense(),
        msif.Hessian(o, full, ridge=False).dense(),
    )
    assert float(torch.linalg.eigvalsh(ggn)[0]) >= -1e-12
    # negative control: the Hessian here is not
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -1e-3


def test_ggn_is_the_hessian_of_softmax_regression():
    """Both against torch.func, weighted too: the operators share code here, so neither can vouch
    for the other.
    """
    o, full = linear_objective()
    for weights in (torch.ones(20, dtype=F64), draw(20, seed=8).abs()):

        def risk(theta, weights=weights):
            return (
                weights * o.losses(theta, o.data.x, o.data.y)
            ).sum() / 20 + o.weight_decay / 2 * theta.square().sum()

        exact = torch.func.hessian(risk)(full)
        for operator in (msif.GGN(o, full, weights), msif.Hessian(o, full, weights)):
            close(operator.dense(), exact, 1e-12)
            for columns in (1, 4):
                v = draw(o.size, columns, seed=9)
                close(operator @ v, exact @ v, 1e-12)


def linear_objective(weight_decay=1e-2):
    data = random_examples(20, (6,), 3, False, seed=5)
    stage = msif.Stage(
        "linear", msif.softmax_regression(6, 3).double(), data, weight_decay=weight_decay
    )
    o = msif.Pipeline([stage]).objective(0)
    return o, draw(o.size, seed=6)


# ---- Algebra ----


def test_operator_algebra():
    o, full = linear_objective()
    a, b = msif.Hessian(o, full), msif.GGN(o, full, draw(20).abs())
    da, db, eye = a.dense(), b.dense(), torch.eye(o.size, dtype=F64)
    diagonal, vectors = draw(o.size, seed=2), draw(o.size, 3, seed=3)
    cases = {
        "A + B": (a + b, da + db),
        "A + number": (a + 0.1, da + 0.1 * eye),
        "number + A": (0.1 + a, da + 0.1 * eye),
        "A + diagonal": (a + diagonal, da + torch.diag(diagonal)),
        "diagonal + A": (diagonal + a, da + torch.diag(diagonal)),
        "2 A": (2 * a, 2 * da),
        "A 2": (a * 2, 2 * da),
        "shifts add up": ((a + 0.1) + 0.2 + diagonal, da + 0.3 * eye + torch.diag(diagonal)),
        "all together": (
            0.5 * (a + 2 * b + 0.3) + diagonal,
            0.5 * da + db + 0.15 * eye + torch.diag(diagonal),
        ),
    }
    for name, (operator, expected) in cases.items():
        assert operator.shape == (o.size, o.size), name
        close(operator @ vectors, expected @ vectors, 1e-12)
        close(operator @ vectors[:, 0], expected @ vectors[:, 0], 1e-12)
        close(operator.dense(), expected, 1e-12)
        assert (operator @ vectors[:, :0]).shape == (o.size, 0), name
    close(a.dense(), da, 0.0)  # none of it changed the operator


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda a, v: a * v, id="vector times A"),
        pytest.param(lambda a, v: a * a, id="A times A"),
        pytest.param(lambda a, v: (a + v) + v[:3], id="short shift on a shift"),
        pytest.param(lambda a, v: a + None, id="A plus None"),
        pytest.param(lambda a, v: a + v[:3], id="short shift"),
    ],
)
def test_algebra_refuses_what_is_no_number_or_diagonal(wrong):
    o, full = linear_objective()
    with pytest.raises((TypeError, ValueError), match="a number"):
        wrong(msif.Hessian(o, full), draw(o.size))


@pytest.mark.parametrize("operator", [msif.Hessian, msif.GGN])
def test_dense_refuses_before_any_work(operator, monkeypatch):
    o, full = linear_objective()
    monkeypatch.setattr(operator, "_chunk", lambda *_: pytest.fail("worked before checking memory"))
    size = o.size
    for call in (operator(o, full).dense, (operator(o, full) + 0.1).dense):
        with pytest.raises(msif.MemoryBudgetError, match=f"{size} × {size}.*budget"):
            call(memory="1KB")
    with pytest.raises(msif.MemoryBudgetError):
        msif.Exact(memory=1000).prepare(operator(o, full))
    monkeypatch.undo()
    assert operator(o, full).dense(memory="1MB").shape == (size, size)


# ---- Single examples ----


def gradients_one_by_one(o, full, function=None):
    """Each example's gradient by plain reverse mode, alone."""
    rows = []
    for x, y in zip(o.data.x, o.data.y, strict=True):
        oracle = Oracle(o, full)
        theta = oracle.theta.clone().requires_grad_()
        z, y = oracle.outputs(theta, x[None]), y[None]
        value = function(z, y) if function else functional.cross_entropy(z, y, reduction="none")
        rows.append(torch.autograd.grad(value[0], theta)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("link", [None, "frozen"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_per_example_gradients_and_products(kind, link):
    o, full = objective_at_random(kind, False, link)
    expected, vectors = gradients_one_by_one(o, full), draw(o.size, 4)
    close(torch.cat([g for _, g in msif.per_example_gradients(o, full)]), expected)
    # forward mode never forms a gradient: the same numbers
    for mode in ("forward", "gradients", "auto"):
        close(msif.example_products(o, full, vectors, mode=mode), (expected @ vectors).T)
        close(
            msif.example_products(o, full, vectors[:, :1], mode=mode), (expected @ vectors[:, :1]).T
        )
    with pytest.raises(ValueError, match="mode='reverse'"):
        msif.example_products(o, full, vectors, mode="reverse")

    def square(z, y):
        return z[:, 0] ** 2

    actual = torch.cat([g for _, g in msif.per_example_gradients(o, full, function=square)])
    close(actual, gradients_one_by_one(o, full, square))


@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_own_products(kind, regression):
    """``h_i v_i`` against the dense curvature of example i alone (weight m on it, none on the
    others).
    """
    o, full = objective_at_random("mlp", regression)
    m, examples = len(o.data), [0, 5, 11]
    vectors = draw(m, o.size)
    actual = own_products(kind, o, full, o.data.x, o.data.y, vectors)
    for i in examples:
        alone = torch.zeros(m, dtype=F64)
        alone[i] = m
        oracle = Oracle(o, full, alone)
        matrix = oracle.hessian() if kind == "hessian" else oracle.ggn()
        close(actual[i], (matrix - o.weight_decay * torch.eye(o.size, dtype=F64)) @ vectors[i])


# ---- Chunks ----


class Step(int):
    """A memory budget that gives this many rows (or columns) a chunk, whatever one of them costs."""

    def __floordiv__(self, other):
        return int(self)


def chunk_by(monkeypatch, rows):
    monkeypatch.setattr(memory, "WORKING_BYTES", Step(rows))  # an override is exact


def everything(pipeline, queries, corrected):
    """All that is computed in chunks, by name."""
    pipeline.adopt()  # forgets the curvature operators made so far
    o, full = pipeline.objective(0), pipeline.trained()[0]
    vectors, weights = draw(o.size, 9), draw(3, len(o.data)).abs()
    batch, point = (
        torch.tensor([5, 1, 9, 22, 17, 3, 8, 2]),
        full[o.trained_positions].repeat(3, 1) + 0.1,
    )
    one, three = Lanes(o, full[None], None, weights[:1]), Lanes(o, full.repeat(3, 1), None, weights)
    found = {
        "gradient": one.value_and_grad(point[:1])[1],
        "gradients of three lanes": three.value_and_grad(point)[1],
        "mini-batch gradients": three.value_and_grad(point, rows=batch)[1],
        "Hessian products": msif.Hessian(o, full, weights[0]) @ vectors,
        "GGN products": msif.GGN(o, full, weights[0]) @ vectors,
        "per-example gradients": torch.cat([g for _, g in msif.per_example_gradients(o, full)]),
        "forward products": msif.example_products(o, full, vectors, mode="forward"),
        "gradient products": msif.example_products(o, full, vectors, mode="gradients"),
        "layer products": msif.example_products(o, full, vectors, mode="layers"),
        "dense GGN": msif.GGN(o, full, weights[0]).dense(),
        "queries": pipeline.evaluate(queries),
    }
    attributor = msif.ImplicitInfluence(leave_one_out=corrected).fit(pipeline)
    return found | {
        f"scores of stage {k}": attributor.score(queries, stage=k).values for k in (0, 1)
    }


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_any_split_of_the_data_gives_the_same_numbers(kind, link, monkeypatch):
    pipeline = random_pipeline(kind, link=LINKS[link])
    queries = random_queries(pipeline, n=9)
    results = {}
    for rows in (1, 7, 10**6):
        chunk_by(monkeypatch, rows)
        sizes = [len(x) for _, x, _ in pipeline.objective(0).chunks()]
        assert sizes == {1: [1] * 24, 7: [7, 7, 7, 3], 10**6: [24]}[rows]  # 7: a ragged last chunk
        results[rows] = everything(pipeline, queries, corrected=kind == "mlp")
    for rows in (1, 7):
        for name, expected in results[10**6].items():
            difference = float((results[rows][name] - expected).abs().max())
            assert difference <= 1e-10 * max(1.0, float(expected.abs().max())), (rows, name)


def test_unweighted_mean_of_batch_means_fails_that_check():
    """Negative control: averaging the means of chunks 7, 7, 7, 3 over-weights the last examples."""
    o, full = objective_at_random("mlp", False)
    vectors, parts = draw(o.size, 3), torch.arange(24).split(7)

    def product(rows):  # the mean curvature of some examples alone
        weights = torch.zeros(24, dtype=F64)
        weights[rows] = 24 / len(rows)
        return msif.Hessian(o, full, weights, ridge=False) @ vectors

    def gradient(rows):
        return gradients_one_by_one(o, full)[rows].mean(0)

    for mean in (product, gradient):
        right, means = mean(torch.arange(24)), [mean(rows) for rows in parts]
        assert float((torch.stack(means).mean(0) - right).abs().max()) > 1e-6
        close(sum(len(rows) * each for rows, each in zip(parts, means, strict=True)) / 24, right)


# ---- The user's module ----


@pytest.mark.parametrize("link", LINKS)
def test_modules_are_never_mutated(link):
    pipeline = random_pipeline("convnet", link=LINKS[link])
    queries, models = random_queries(pipeline), [s.model for s in pipeline.stages]
    for model in models:
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
    before = [copy.deepcopy(m.state_dict()) for m in models]
    pointers = [[p.data_ptr() for p in m.parameters()] for m in models]
    for solver in (msif.Exact(), msif.ConjugateGradient(tol=1e-9)):
        for kind in ("hessian", "ggn"):
            attributor = msif.ImplicitInfluence(
                solver, curvature=kind, leave_one_out=kind == "ggn"
            ).fit(pipeline)
            attributor.score(queries, stage=0), attributor.score(queries, stage=1)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    (
        msif.example_products(o, full, draw(o.size, 1)),
        list(msif.per_example_gradients(o, full, every=True)),
    )
    pipeline.gradient(0), pipeline.evaluate(queries)
    for model, state, places in zip(models, before, pointers, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert [p.data_ptr() for p in model.parameters()] == places
        assert all(
            bool((p.grad == 7).all()) and p.requires_grad and p.grad_fn is None
            for p in model.parameters()
        )


def test_parameters_without_gradient_stay_out():
    """``requires_grad=False`` leaves a parameter out of θ and in its place."""
    model = random_model("mlp", 3, seed=0)
    model.embedding[1].bias.requires_grad_(False)
    data = random_examples(20, (1, 4, 4), 3, False, seed=1)
    o = msif.Pipeline([msif.Stage("only", model, data, weight_decay=0.1)]).objective(0)
    full = o.layout.flatten(model)
    assert o.trained_names == ["embedding.1.weight", "head.weight", "head.bias"]
    oracle = Oracle(o, full)
    close(msif.Hessian(o, full).dense(), oracle.hessian())
    close(msif.GGN(o, full).dense(), oracle.ggn())
    close(
        torch.cat([g for _, g in msif.per_example_gradients(o, full)]),
        gradients_one_by_one(o, full),
    )


@pytest.mark.parametrize("kind", [msif.Hessian, msif.GGN])
@pytest.mark.parametrize("linear", [True, False])
def test_parts_sum_to_the_whole(kind, linear):
    """Over any split of the examples, the penalty once; also where a linear model's Hessian is its
    GGN.
    """
    net = msif.softmax_regression(6, 3) if linear else msif.mlp(6, hidden=(5,), classes=3)
    stage = msif.Stage(
        "part", net.double(), random_examples(20, (6,), 3, False, seed=5), weight_decay=1e-2
    )
    o = msif.Pipeline([stage]).objective(0)
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(20, generator=generator, dtype=torch.float64)
    v = torch.randn(o.size, 7, generator=generator, dtype=torch.float64)
    whole = kind(o, o.layout.flatten(o.model), w)
    whole @ v  # what it keeps must not reach the parts
    order = whole.importance().argsort()
    parts = [whole.part(order[a:b]) for a, b in ((0, 3), (3, 11), (11, 11), (11, 20))]
    assert torch.allclose(
        sum(p @ v for p in parts) + whole.ridge[:, None] * v, whole @ v, atol=1e-12
    )
    assert torch.allclose(
        sum(p.dense() for p in parts) + torch.diag(whole.ridge), whole.dense(), atol=1e-12
    )
    slopes = torch.autograd.functional.jacobian(
        lambda z: o.loss(z, o.data.y), o.model(o.data.x).detach()
    )
    assert torch.allclose(whole.importance(), w * slopes.norm(dim=2).diagonal(), atol=1e-12)
