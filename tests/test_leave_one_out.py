"""Removal steps where a leverage is near one, and minima that are flat along a symmetry."""

import warnings

import numpy
import pytest
import torch
from oracles import (
    F64,
    Matrix,
    Oracle,
    central_differences,
    close,
    draw,
    implicit_scores,
    random_pipeline,
    random_queries,
    relative_error,
    with_eigenvalues,
)
from torch import nn

import msif_lab as msif
from msif_lab.influence import leave_one_out


def first_output(outputs, targets):
    return outputs[:, 0]


@pytest.fixture
def no_convergence_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", msif.ConvergenceWarning)
        yield


# ---- Ridge regression ----


def ridge(n, weight_decay, outputs=1, bias=True, dtype=F64, x=None):
    """A fitted ridge regression with 16 parameters an output, and queries."""
    width = 15 if bias else 16
    x = draw(n, width, seed=n) if x is None else x
    data = msif.Examples(x.to(dtype), draw(n, outputs, seed=n + 1).to(dtype))
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], outputs, bias=bias).to(dtype)
    stage = msif.Stage("ridge", model, data, msif.mean_squared_error, weight_decay=weight_decay)
    queries = msif.Examples(draw(4, x.shape[1], seed=2).to(dtype), draw(4, outputs).to(dtype))
    return msif.Pipeline([stage]).fit(progress=False), queries


def refits(pipeline, queries, weight_decay, bias=True, damping=0.0):
    """Change of each query's first output by each removal, ``(Q, N)``, by refitting.

    Least squares on the rows ``√s a_i`` and ``√λ I``, whose condition number is the root of that of
    the normal equations.
    """
    data = pipeline.stages[0].data
    x, y, q = (t.double().numpy() for t in (data.x, data.y, queries.x))
    if bias:
        x, q = (numpy.column_stack([a, numpy.ones(len(a))]) for a in (x, q))
    scale = (2 / y.size) ** 0.5
    below = weight_decay**0.5 * numpy.eye(x.shape[1])

    def fit(keep):
        rows = numpy.vstack([scale * x[keep], below])
        target = numpy.vstack([scale * y[keep], numpy.zeros((x.shape[1], y.shape[1]))])
        return numpy.linalg.lstsq(rows, target, rcond=None)[0][:, 0]

    everyone = numpy.arange(len(x))
    change = [q @ (fit(everyone[everyone != i]) - fit(everyone)) for i in everyone]
    return torch.as_tensor(numpy.stack(change, 1))


def worst(scores, change):
    """Largest relative error of a removal's effects over the queries."""
    return float(((-scores.double() - change).norm(dim=0) / change.norm(dim=0)).max())


@pytest.mark.usefixtures("no_convergence_warning")
@pytest.mark.parametrize("n", [6, 12, 40])
@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (3, False), (3, True)])
def test_ridge_equals_refits_whatever_the_leverage(n, outputs, bias):
    """Six examples on 16 parameters: with λ = 1e-5 the leverages are 1 − 3e-6 or so.

    The error is about ``6 ε ‖H‖ / λ``, 1e-9 there: a residual ``r_i`` at the minimum is as small as
    λ, and as a difference of numbers near one it is known to ε.
    """
    for weight_decay in (1e-2, 1e-4, 1e-5):
        pipeline, queries = ridge(n, weight_decay, outputs, bias)
        change = refits(pipeline, queries, weight_decay, bias)
        for kind in ("hessian", "ggn"):
            scores = implicit_scores(
                pipeline, queries, target=first_output, leave_one_out=True, curvature=kind
            )
            assert worst(scores, change) <= 1e-8, (weight_decay, kind)
        # negative control: the derivative is far off
        plain = implicit_scores(pipeline, queries, target=first_output)
        assert worst(plain, change) > (0.9 if n < 16 else 0.2)


@pytest.mark.usefixtures("no_convergence_warning")
def test_ridge_without_a_matrix_and_with_too_many_outputs_for_a_small_system(monkeypatch):
    pipeline, queries = ridge(6, 1e-2, 3)
    change = refits(pipeline, queries, 1e-2)
    given = {"target": first_output, "leave_one_out": True}
    solver = msif.ConjugateGradient(tol=1e-12)
    assert worst(implicit_scores(pipeline, queries, solver, **given), change) <= 1e-8
    monkeypatch.setattr(leave_one_out, "MOST_OUTPUTS", 2)
    assert worst(implicit_scores(pipeline, queries, **given), change) <= 1e-8


def test_single_precision_is_right_to_its_own_or_says_so():
    for weight_decay, most in ((1e-1, 1e-3), (1e-2, 1e-2), (1e-3, 5e-2)):
        pipeline, queries = ridge(6, weight_decay, dtype=torch.float32)
        scores = implicit_scores(pipeline, queries, target=first_output, leave_one_out=True)
        assert worst(scores, refits(pipeline, queries, weight_decay)) <= most
    pipeline, queries = ridge(6, 1e-4, dtype=torch.float32)
    with pytest.warns(msif.ConvergenceWarning, match=r"without examples \[.*beyond rounding"):
        implicit_scores(pipeline, queries, leave_one_out=True)


def test_repeated_examples_and_one_that_is_alone_in_a_direction():
    """Without weight decay nothing is left of a direction that only one example has."""
    x = draw(30, 15, seed=5)
    x[:, 14] = 0.0
    x[7, 14] = x[8, 14] = 1.0
    x[8] = x[7]  # these two hold the direction together
    pipeline, queries = ridge(30, 0.0, x=x)
    scores = implicit_scores(pipeline, queries, target=first_output, leave_one_out=True)
    assert worst(scores, refits(pipeline, queries, 0.0)) <= 1e-8
    x[8, 14] = 0.0  # now example 7 holds it alone
    pipeline, queries = ridge(30, 0.0, x=x)
    given = {"target": first_output, "curvature": "ggn"}
    with pytest.warns(msif.ConvergenceWarning, match=r"without examples \[7\] \(1 in all\)"):
        scores = implicit_scores(pipeline, queries, leave_one_out=True, **given)
    close(scores[:, 7], implicit_scores(pipeline, queries, **given)[:, 7])
    others = [i for i in range(30) if i != 7]
    change = refits(pipeline, queries, 0.0)
    assert worst(scores[:, others], change[:, others]) <= 1e-8


@pytest.mark.usefixtures("no_convergence_warning")
def test_proximal_and_damped_ridge_steps_are_trusted():
    """F without an example is quadratic here too, so no step may overshoot on it."""
    pipeline, queries = ridge(6, 1e-3)
    last = msif.Stage(
        "last",
        nn.Linear(15, 1).double(),
        msif.Examples(draw(5, 15, seed=8), draw(5, 1, seed=9)),
        msif.mean_squared_error,
        weight_decay=1e-3,
        link=msif.Proximal(0.01, shared=""),
    )
    both = msif.Pipeline([pipeline.stages[0], last]).fit(progress=False)
    scores = implicit_scores(both, queries, stage=1, target=first_output, leave_one_out=True)
    weights = torch.ones(5, 5, dtype=F64) - torch.eye(5, dtype=F64)
    refitted = both.retrain({"last": weights}, progress=False).evaluate(queries, first_output)
    actual = refitted - both.evaluate(queries, first_output)[:, None]
    assert worst(scores, actual) <= 1e-8
    implicit_scores(pipeline, queries, leave_one_out=True, damping=0.1)


# ---- Steps that overshoot ----


def refit_errors(pipeline, queries, scores):
    """Relative error of the scores of each example against a refit, ``(N,)``, q linearised."""
    o, full = pipeline.objective(0), pipeline.trained()[0]
    n = len(o.data)
    weights = torch.ones(n, n, dtype=F64) - torch.eye(n, dtype=F64)
    refitted = pipeline.retrain(weights, warm_start=True, progress=False).parameters[0]
    moved = o.trained.take(refitted) - o.trained.take(full)
    change = Oracle(o, full).gradients(queries) @ moved.T
    return (-scores - change).norm(dim=0) / change.norm(dim=0)


def test_steps_that_overshoot_are_named_and_replaced(monkeypatch):
    pipeline = random_pipeline("mlp", True, k=1, weight_decay=1e-2)
    queries = random_queries(pipeline)
    with pytest.warns(msif.ConvergenceWarning, match=r"removing examples .* too far for one") as w:
        scores = implicit_scores(pipeline, queries, leave_one_out=True)
    errors = refit_errors(pipeline, queries, scores)
    plain = refit_errors(pipeline, queries, implicit_scores(pipeline, queries))
    assert float(errors.median()) < 0.5 * float(plain.median())
    assert float(errors.max()) < 1.1
    with monkeypatch.context() as patch:  # negative control: trusted blindly
        patch.setattr(leave_one_out, "TURNED", float("inf"))
        blind = implicit_scores(pipeline, queries, leave_one_out=True)
    assert float(refit_errors(pipeline, queries, blind).max()) > 2
    changed = ((blind - scores).norm(dim=0) > 1e-9 * scores.norm(dim=0)).nonzero().flatten()
    named = next(str(m.message) for m in w if "removing" in str(m.message))
    assert f"removing examples {changed.tolist()}" in named


# ---- Null directions of matrices ----

FLAT = [0.0, 0.0, 0.3, 1.0, 2.0, 50.0]


def flat_matrix(negative=0.0):
    """A matrix with two null directions, their eigenvalues a little off, and those directions."""
    matrix = with_eigenvalues([negative, *FLAT[1:]])
    return matrix, torch.linalg.eigh(with_eigenvalues(FLAT))[1][:, :2]


SOLVERS = {
    "exact": msif.Exact(),
    "cg": msif.ConjugateGradient(tol=1e-11),
    "one space each": msif.ConjugateGradient(tol=1e-11, block=1),
    "minres": msif.MINRES(tol=1e-11),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("negative", [0.0, -2e-15, 2e-15])
def test_right_sides_without_a_part_in_null_directions_are_answered(solver, negative):
    matrix, null = flat_matrix(negative)
    b = draw(6, 3)
    b = b - null @ (null.T @ b)
    x, report = solver.prepare(Matrix(matrix)).solve(b)
    assert bool(report.converged.all())
    close(x - null @ (null.T @ x), torch.linalg.pinv(with_eigenvalues(FLAT), rtol=1e-9) @ b, 1e-9)
    if isinstance(solver, msif.Exact):
        assert report.null_directions == 2 and "2 null directions left out" in str(report)
        assert report.smallest_curvature == pytest.approx(0.3)
        close(null.T @ x, torch.zeros(2, 3, dtype=F64), 1e-12)


def test_exact_refuses_right_sides_with_a_part_there():
    matrix, null = flat_matrix(-2e-15)
    prepared = msif.Exact().prepare(Matrix(matrix))
    b = draw(6, 2) + null[:, :1]
    with pytest.raises(msif.IndefiniteCurvatureError, match=r"2 null directions.*a part of") as e:
        prepared.solve(b)
    assert f"{e.value.smallest:.3e}" in str(e.value) and abs(e.value.smallest) < 1e-14
    with pytest.raises(msif.IndefiniteCurvatureError):
        msif.ConjugateGradient(tol=1e-6).solve(Matrix(matrix), b)


def test_directions_that_only_weight_decay_bends_are_no_null_directions():
    """Their curvature is λ, however small beside the rounding of the rest."""
    for dtype, weight_decay in ((F64, 1e-13), (torch.float32, 1e-5)):
        pipeline, _ = ridge(6, weight_decay, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", msif.SymmetryWarning)
            for damping in (0.0, weight_decay):
                msif.Exact().prepare(pipeline.curvature(0) + damping)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_small_eigenvalues_are_no_null_directions(dtype):
    """Controls: negative ones are refused, positive ones are solved with."""
    small = 1e-4 if dtype == torch.float32 else 1e-8
    matrix = with_eigenvalues([small, 0.3, 1.0, 10.0]).to(dtype)
    b = draw(4, 2).to(dtype)
    for solver in (msif.Exact(), msif.ConjugateGradient(tol=1e-5)):
        x, report = solver.prepare(Matrix(matrix)).solve(b)
        exact = torch.linalg.solve(matrix.double(), b.double())
        assert report.null_directions == 0 and relative_error(x.double(), exact) <= 1e-2
    negative = with_eigenvalues([-1e-4, 0.3, 1.0, 10.0]).to(dtype)
    with pytest.raises(msif.IndefiniteCurvatureError, match=r"-[19]\.[0-9]+e-0[45]"):
        msif.Exact().prepare(Matrix(negative))


# ---- Low-rank layers ----


class LowRank(nn.Module):
    """``(W + B A) x + c``, of which W is frozen unless it is asked for."""

    def __init__(self, width=8, outputs=5, rank=3, train_weight=False):
        super().__init__()
        self.weight = nn.Parameter(draw(outputs, width) / width**0.5, train_weight)
        self.lora_A = nn.Parameter(draw(rank, width, seed=1) / width**0.5)
        self.lora_B = nn.Parameter(draw(outputs, rank, seed=2) / 2)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=F64))

    def forward(self, x):
        return x @ (self.weight + self.lora_B @ self.lora_A).T + self.bias


class Dense(nn.Module):
    """The stage before, whose ``weight`` a `LowRank` takes over."""

    def __init__(self, width=8, outputs=5):
        super().__init__()
        self.weight = nn.Parameter(draw(outputs, width, seed=3) / width**0.5)

    def forward(self, x):
        return x @ self.weight.T


def task(n, seed, regression=False):
    x = draw(n, 8, seed=seed)
    y = x @ draw(8, 5, seed=6) + 0.5 * draw(n, 5, seed=seed + 1)
    return msif.Examples(x, y if regression else y.argmax(1))


def low_rank_pipeline(kind="ce", recipe=None, **decay):
    """One stage, or after a `Dense` one, at the optimum."""
    regression = kind == "mse"
    loss = msif.mean_squared_error if regression else msif.cross_entropy
    settings = {"weight_decay": 1e-2, "recipe": recipe or msif.LBFGS()} | decay
    model, data = LowRank(), task(40, 20, regression)
    if kind != "two stages":
        return msif.Pipeline([msif.Stage("lora", model, data, loss, **settings)]).fit(
            progress=False
        )
    first = msif.Stage("first", Dense(), task(50, 30), weight_decay=1e-2)
    link = msif.Frozen(shared=["weight"])
    last = msif.Stage("lora", model, data, loss, link=link, **settings)
    return msif.Pipeline([first, last]).fit(progress=False)


NAMED = r"3 null directions .*in 'lora_[AB]', 'lora_[AB]'; no example's gradient"


@pytest.mark.parametrize("kind", ["ce", "mse", "two stages"])
def test_low_rank_stages_equal_finite_differences_and_name_the_symmetry(kind):
    pipeline = low_rank_pipeline(kind)
    queries, examples = task(4, 50, kind == "mse"), [0, 3, 7]
    assert float(pipeline.gradient(-1).norm()) < 1e-13  # the polish sees through the symmetry
    with pytest.warns(msif.SymmetryWarning, match=f"stage 'lora': the curvature has {NAMED}"):
        attributor = msif.ImplicitInfluence().fit(pipeline)
    for stage in range(len(pipeline.stages)):
        scores = attributor.score(queries, stage=stage).values[:, examples]
        truth = central_differences(pipeline, queries, stage, examples, optimum=True)
        assert relative_error(scores, truth) <= 1e-6
        assert relative_error(1.001 * scores, truth) > 1e-6  # negative control
        assert attributor.report_["lora"].null_directions == 3
        for solver in (msif.ConjugateGradient(tol=1e-10), msif.MINRES(tol=1e-10)):
            found = implicit_scores(pipeline, queries, solver, stage=stage)[:, examples]
            assert relative_error(found, truth) <= 1e-6


def test_a_symmetry_is_seen_where_the_gradient_is_not_yet_rounding():
    """At ‖∇F‖ = 1e-8 its eigenvalues are of that size and either sign, not 1e-16."""
    rough = msif.LBFGS(tol=1e-7, polish_up_to=0)
    pipeline, queries = low_rank_pipeline(recipe=rough), task(4, 50)
    lowest = torch.linalg.eigvalsh(pipeline.curvature(0).dense())
    assert float(lowest[:3].abs().max()) > 1e-12
    with pytest.warns(msif.SymmetryWarning, match=NAMED):
        scores = implicit_scores(pipeline, queries)
    fine = low_rank_pipeline()
    with pytest.warns(msif.SymmetryWarning):
        assert relative_error(scores, implicit_scores(fine, queries)) <= 1e-4
    data = fine.stages[0].data.to(torch.float32)
    stage = msif.Stage("lora", LowRank().float(), data, weight_decay=1e-2)
    single = msif.Pipeline([stage]).fit(progress=False)
    with pytest.warns(msif.SymmetryWarning, match=NAMED):
        found = implicit_scores(single, queries.to(torch.float32))
    assert relative_error(found.double(), scores) <= 1e-3


@pytest.mark.filterwarnings("ignore::msif_lab.SymmetryWarning")
def test_without_decay_the_symmetry_is_larger_and_far_from_a_minimum_there_is_none():
    pipeline, queries = low_rank_pipeline("mse", weight_decay=0.0), task(4, 50, True)
    attributor = msif.ImplicitInfluence().fit(pipeline)
    scores = attributor.score(queries).values[:, [0, 3]]
    assert attributor.report_["lora"].null_directions == 9  # any invertible R
    truth = central_differences(pipeline, queries, 0, [0, 3], optimum=True)
    assert relative_error(scores, truth) <= 1e-6
    with torch.no_grad():
        pipeline.stages[0].model.lora_A.add_(0.1 * draw(3, 8, seed=4))
    with (
        pytest.warns(msif.ConvergenceWarning, match="not at a stationary point"),
        pytest.raises(msif.IndefiniteCurvatureError, match=r"-\d\.\d+e-0[123]"),
    ):
        msif.ImplicitInfluence().fit(pipeline.adopt())


@pytest.mark.filterwarnings("ignore::msif_lab.SymmetryWarning")
def test_a_question_of_which_minimum_was_reached_is_refused():
    """A proximal stage stays near the A and B it was given, of many that are as good.

    Rotations turn both stages alike, so nothing asked of the last one depends on which; without
    weight decay R may be any matrix, and it does.
    """
    queries, loss = task(4, 50, True), msif.mean_squared_error
    for decay in (1e-2, 0.0):
        first = msif.Stage("first", LowRank(), task(40, 20, True), loss, weight_decay=decay)
        last = msif.Stage(
            "last",
            LowRank(),
            task(30, 60, True),
            loss,
            weight_decay=1e-2,
            link=msif.Proximal(0.1, shared=""),
        )
        pipeline = msif.Pipeline([first, last]).fit(progress=False)
        attributor = msif.ImplicitInfluence().fit(pipeline)
        assert bool(attributor.score(queries, stage="last").values.isfinite().all())
        if decay:
            scores = attributor.score(queries, stage="first").values[:, [0, 3]]
            assert attributor.report_["first"].null_directions == 3
            truth = central_differences(pipeline, queries, 0, [0, 3], optimum=True)
            assert relative_error(scores, truth) <= 1e-6
        else:
            refusal = r"'first': .* \d+ null directions.*which of many"
            with pytest.raises(msif.IndefiniteCurvatureError, match=refusal):
                attributor.score(queries, stage="first")


@pytest.mark.filterwarnings("ignore::msif_lab.SymmetryWarning")
@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_leave_one_out_steps_across_the_symmetry(monkeypatch):
    """Without example i, H − h_i/m is not 0 along the symmetry; the step is Newton's across it."""
    pipeline, queries = low_rank_pipeline(), task(4, 50)
    scores = implicit_scores(pipeline, queries, leave_one_out=True)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    null = torch.linalg.eigh(Oracle(o, full).hessian())[1][:, :3]
    across = torch.linalg.eigh(torch.eye(o.size, dtype=F64) - null @ null.T)[1][:, 3:]
    asked, train = Oracle(o, full).gradients(queries), Oracle(o, full).gradients()
    errors, unlike = [], 0.0
    for i in range(len(o.data)):
        weights = torch.ones(len(o.data), dtype=F64)
        weights[i] = 0
        without = Oracle(o, full, weights).hessian()
        unlike = max(unlike, float((without @ null).norm()))
        small = torch.linalg.solve(across.T @ without @ across, across.T @ train[i])
        expected = -asked @ across @ small / len(o.data)
        errors.append(relative_error(scores[:, i], expected))
    assert sum(error <= 1e-8 for error in errors) >= 0.8 * len(errors)  # the rest overshoots
    assert unlike > 1e-3
    plain = refit_errors(pipeline, queries, implicit_scores(pipeline, queries))
    assert float(refit_errors(pipeline, queries, scores).median()) < 0.5 * float(plain.median())
