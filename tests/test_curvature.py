"""Curvature products and per-example derivatives against dense oracles."""

import pytest
import torch
from oracles import (
    F64,
    LINKS,
    Oracle,
    close,
    draw,
    library_gradients,
    linear_objective,
    random_examples,
    random_model,
    random_pipeline,
    random_queries,
    same,
    states,
)
from torch.func import jacrev
from torch.nn import functional

import msif_lab as msif
from msif_lab import memory
from msif_lab.curvature import own_products
from msif_lab.objective import Lanes


def objective_at_random(kind, regression, link=None):
    """A stage's objective and a random point: an untrained net, where the Hessian is indefinite."""
    pipeline = random_pipeline(kind, regression, LINKS[link or "frozen"], fit=False)
    stage = 0 if link is None else 1
    o = pipeline.objective(stage)
    return o, o.layout.flatten(pipeline.stages[stage].model) + 0.3 * draw(o.layout.size)


# ---- Losses ----


def test_cross_entropy_and_its_derivatives_are_those_of_torch():
    y = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    tokens = torch.tensor([[0, 3, 1], [2, 2, 0]])

    def ours(z):
        return msif.cross_entropy(z, y)

    def theirs(z):
        return functional.cross_entropy(z, y, reduction="none")

    for scale in (1.0, 1e4):
        z = scale * draw(7, 4)
        close(ours(z), theirs(z), 1e-12, scale)
        close(jacrev(ours)(z), jacrev(theirs)(z), 1e-12, scale)
        close(jacrev(jacrev(ours))(z), jacrev(jacrev(theirs))(z), 1e-12, scale)
        logits = scale * draw(2, 3, 4)
        each = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        close(msif.next_token_loss(logits, tokens), each.mean(1), 1e-12, scale)


def test_cross_entropy_of_a_masked_output():
    """A logit of −inf means probability zero, as in masked vocabularies; it is no NaN."""
    z, y = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=F64), torch.tensor([0])
    close(msif.cross_entropy(z, y), functional.cross_entropy(z, y, reduction="none"), 1e-12)


# ---- Products ----


@pytest.mark.parametrize("link", [None, "frozen", "proximal"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_products_equal_dense_oracles(kind, link):
    for regression in (False, True):
        o, full = objective_at_random(kind, regression, link)
        some = draw(len(o.data), seed=1).abs()
        some[3] = 0
        vectors = draw(o.size, 5)
        for weights in (None, some):
            case = "squared error" if regression else "cross-entropy", weights is not None
            oracle = Oracle(o, full, weights)
            hessian, ggn = msif.Hessian(o, full, weights), msif.GGN(o, full, weights)
            for operator, expected in ((hessian, oracle.hessian()), (ggn, oracle.ggn())):
                close(operator @ vectors, expected @ vectors, case=case)
                close(operator.dense(), expected, case=case)
                assert torch.equal(operator.dense(), operator.dense().T), case
            if link != "frozen":  # negative control: a net is not linear, so the two differ
                apart = (hessian.dense() - ggn.dense()).norm()
                assert float(apart) > 1e-2 * float(ggn.dense().norm()), case


def test_every_parameter_without_penalty():
    """``every=True``: the data term over all D parameters, whose off-diagonal block is G_WT."""
    o, full = objective_at_random("mlp", False, "frozen")

    def risk(theta):
        outputs = torch.func.functional_call(o.model, o.layout.named(theta), (o.data.x,))
        return functional.cross_entropy(outputs, o.data.y)

    expected = torch.autograd.functional.hessian(risk, full)
    close(msif.Hessian(o, full, every=True).dense(), expected)
    own = o.trained_positions
    close(msif.Hessian(o, full, ridge=False).dense(), expected[own][:, own])


def test_linear_and_symmetric():
    for kind in ("mlp", "convnet"):
        for operator in (msif.Hessian, msif.GGN):
            o, full = objective_at_random(kind, False)
            a, u, v = operator(o, full), draw(o.size, 4, seed=1), draw(o.size, 4, seed=2)
            case = kind, operator.__name__
            close(a @ (2.5 * u - 3 * v), 2.5 * (a @ u) - 3 * (a @ v), 1e-12, case)
            close(u.T @ (a @ v), (a @ u).T @ v, 1e-12, case)
            close((a @ u)[:, 2], a @ u[:, 2], 1e-12, case)  # a column alone and among others


def test_ggn_is_positive_semi_definite():
    for kind in ("mlp", "convnet"):
        for regression in (False, True):
            o, full = objective_at_random(kind, regression)
            ggn = msif.GGN(o, full, ridge=False).dense()
            assert float(torch.linalg.eigvalsh(ggn)[0]) >= -1e-12, (kind, regression)
            # negative control: the Hessian here is not
            hessian = msif.Hessian(o, full, ridge=False).dense()
            assert float(torch.linalg.eigvalsh(hessian)[0]) < -1e-3, (kind, regression)


def test_ggn_is_the_hessian_of_softmax_regression():
    """Against the oracle, weighted too: both operators share code here, so neither is evidence."""
    o, full = linear_objective()
    for weights in (torch.ones(20, dtype=F64), draw(20, seed=8).abs()):
        exact = Oracle(o, full, weights).hessian()
        for operator in (msif.GGN(o, full, weights), msif.Hessian(o, full, weights)):
            close(operator.dense(), exact, 1e-12)
            for columns in (1, 4):
                v = draw(o.size, columns, seed=9)
                close(operator @ v, exact @ v, 1e-12)


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


def test_algebra_refuses_what_is_no_number_or_diagonal():
    o, full = linear_objective()
    a, v = msif.Hessian(o, full), draw(o.size)
    for name, wrong in {
        "vector times A": lambda: a * v,
        "A times A": lambda: a * a,
        "A plus None": lambda: a + None,
        "a short shift": lambda: a + v[:3],
        "a short shift on a shift": lambda: (a + v) + v[:3],
    }.items():
        with pytest.raises((TypeError, ValueError), match="number"):
            pytest.fail(f"{name} gave {wrong()}")


@pytest.mark.parametrize("operator", [msif.Hessian, msif.GGN])
def test_dense_refuses_before_any_work(operator):
    o, full = linear_objective()
    size = o.size
    worked = o.model.register_forward_pre_hook(lambda *_: pytest.fail("worked before checking"))
    for call in (operator(o, full).dense, (operator(o, full) + 0.1).dense):
        with pytest.raises(msif.MemoryBudgetError, match=f"{size} × {size}.*budget"):
            call(memory="1KB")
    with pytest.raises(msif.MemoryBudgetError):
        msif.Exact(memory=1000).prepare(operator(o, full))
    worked.remove()
    assert operator(o, full).dense(memory="1MB").shape == (size, size)


# ---- Single examples ----


@pytest.mark.parametrize("link", [None, "frozen"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_per_example_gradients_and_products(kind, link):
    o, full = objective_at_random(kind, False, link)
    expected, vectors = Oracle(o, full).gradients(), draw(o.size, 4)
    close(library_gradients(o, full), expected)
    # forward mode never forms a gradient, and still gives the same numbers
    for mode in ("forward", "gradients", "auto"):
        for v in (vectors, vectors[:, :1]):
            close(msif.example_products(o, full, v, mode=mode), (expected @ v).T, case=mode)
    with pytest.raises(ValueError, match="mode='reverse'"):
        msif.example_products(o, full, vectors, mode="reverse")

    def square(z, y):
        return z[:, 0] ** 2

    close(
        library_gradients(o, full, function=square),
        Oracle(o, full).gradients(function=square),
    )


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_own_products(kind):
    """``h_i v_i`` against the dense curvature with weight m on example i and 0 on the others."""
    for regression in (False, True):
        o, full = objective_at_random("mlp", regression)
        m = len(o.data)
        vectors = draw(m, o.size)
        actual = own_products(kind, o, full, o.data.x, o.data.y, vectors)
        for i in (0, 5, 11):
            alone = torch.zeros(m, dtype=F64)
            alone[i] = m
            oracle = Oracle(o, full, alone)
            matrix = oracle.hessian() if kind == "hessian" else oracle.ggn()
            expected = (matrix - torch.diag(oracle.penalty())) @ vectors[i]
            close(actual[i], expected, case=(regression, i))


# ---- Chunks ----


class Step(int):
    """A memory budget for this many rows (or columns) a chunk, whatever one of them costs."""

    def __floordiv__(self, other):
        return int(self)


def chunk_by(monkeypatch, rows):
    monkeypatch.setattr(memory, "WORKING_BYTES", Step(rows))  # an override is exact


def everything(pipeline, queries, corrected):
    """All that is computed in chunks, by name."""
    pipeline.adopt()  # forgets the curvature operators made so far
    o, full = pipeline.objective(0), pipeline.trained()[0]
    vectors, weights = draw(o.size, 9), draw(3, len(o.data)).abs()
    batch = torch.tensor([5, 1, 9, 22, 17, 3, 8, 2])
    point = full[o.trained_positions].repeat(3, 1) + 0.1
    one, three = Lanes(o, full[None], None, weights[:1]), Lanes(o, full.repeat(3, 1), None, weights)
    found = {
        "gradient": one.value_and_grad(point[:1])[1],
        "gradients of three lanes": three.value_and_grad(point)[1],
        "mini-batch gradients": three.value_and_grad(point, rows=batch)[1],
        "Hessian products": msif.Hessian(o, full, weights[0]) @ vectors,
        "GGN products": msif.GGN(o, full, weights[0]) @ vectors,
        "per-example gradients": library_gradients(o, full),
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


@pytest.mark.parametrize(("kind", "link"), [("mlp", "proximal"), ("convnet", "frozen")])
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


def test_unweighted_mean_of_chunk_means_fails_that_check():
    """Negative control: averaging the means of chunks 7, 7, 7, 3 over-weights the last examples."""
    o, full = objective_at_random("mlp", False)
    vectors, parts = draw(o.size, 3), torch.arange(24).split(7)
    gradients = Oracle(o, full).gradients()

    def product(rows):  # the mean curvature of some examples alone
        weights = torch.zeros(24, dtype=F64)
        weights[rows] = 24 / len(rows)
        return msif.Hessian(o, full, weights, ridge=False) @ vectors

    def gradient(rows):
        return gradients[rows].mean(0)

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
    before = states(pipeline)
    pointers = [[p.data_ptr() for p in m.parameters()] for m in models]
    for solver in (msif.Exact(), msif.ConjugateGradient(tol=1e-9)):
        for kind in ("hessian", "ggn"):
            attributor = msif.ImplicitInfluence(
                solver, curvature=kind, leave_one_out=kind == "ggn"
            ).fit(pipeline)
            attributor.score(queries, stage=0)
            attributor.score(queries, stage=1)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    msif.example_products(o, full, draw(o.size, 1))
    library_gradients(o, full, every=True)
    pipeline.gradient(0)
    pipeline.evaluate(queries)
    assert same(states(pipeline), before)
    for model, places in zip(models, pointers, strict=True):
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
    close(library_gradients(o, full), oracle.gradients())


@pytest.mark.parametrize("kind", [msif.Hessian, msif.GGN])
@pytest.mark.parametrize("linear", [True, False])
def test_parts_sum_to_the_whole(kind, linear):
    """Over any split of the examples, with the penalty counted once."""
    net = msif.softmax_regression(6, 3) if linear else msif.mlp(6, hidden=(5,), classes=3)
    stage = msif.Stage(
        "part", net.double(), random_examples(20, (6,), 3, False, seed=5), weight_decay=1e-2
    )
    o = msif.Pipeline([stage]).objective(0)
    w, v = draw(20, seed=1).abs(), draw(o.size, 7, seed=2)
    whole = kind(o, o.layout.flatten(o.model), w)
    whole @ v  # what it keeps must not reach the parts
    order = whole.importance().argsort()
    parts = [whole.part(order[a:b]) for a, b in ((0, 3), (3, 11), (11, 11), (11, 20))]
    close(sum(p @ v for p in parts) + whole.ridge[:, None] * v, whole @ v, 1e-12)
    close(sum(p.dense() for p in parts) + torch.diag(whole.ridge), whole.dense(), 1e-12)
    slopes = torch.autograd.functional.jacobian(
        lambda z: o.loss(z, o.data.y), o.model(o.data.x).detach()
    )
    assert torch.allclose(whole.importance(), w * slopes.norm(dim=2).diagonal(), atol=1e-12)
