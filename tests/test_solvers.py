"""Solvers against dense linear algebra, and what they say when they cannot answer."""

import warnings

import pytest
import torch
from conftest import random_examples, random_pipeline, random_queries

import msif_lab as msif
from msif_lab.curvature import Operator

F64 = torch.float64
EXACT, TIGHT = msif.Exact(), msif.ConjugateGradient(tol=1e-11, max_iter=2000)
SEPARATE = msif.ConjugateGradient(tol=1e-11, max_iter=2000, block=1)
ITERATIVE = {
    "cg": TIGHT,
    "cg-separate": SEPARATE,
    "cg-groups": msif.ConjugateGradient(tol=1e-11, block=4),
    "cg-lowrank": msif.ConjugateGradient(tol=1e-11, preconditioner=msif.LowRank(rank=12)),
    "cg-nystrom": msif.ConjugateGradient(
        tol=1e-11, preconditioner=msif.LowRank(rank=8, method="nystrom"), block=1
    ),
    "cg-jacobi": msif.ConjugateGradient(tol=1e-11, preconditioner=msif.Jacobi()),
    "cg-nested": msif.ConjugateGradient(tol=1e-11, max_iter=2000, shares=(0.2, 0.5)),
    "cg-nested-lowrank": msif.ConjugateGradient(
        1e-11, preconditioner=msif.LowRank(rank=12), block=4, shares=(0.4,)
    ),
    "minres": msif.MINRES(tol=1e-11),
    "lissa": msif.LiSSA(tol=1e-11, max_iter=20_000),
}


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Matrix(Operator):
    """An operator from a dense matrix that counts its products."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.columns = matrix, 0

    def _product(self, vectors):
        self.columns += vectors.shape[1]
        return self.matrix @ vectors


def with_eigenvalues(values, seed=0):
    vectors, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return vectors @ torch.diag(torch.as_tensor(values, dtype=F64)) @ vectors.T


def convex():
    """Hessian of softmax regression at a random point."""
    data = random_examples(20, (6,), 3, False, seed=5)
    stage = msif.Stage("linear", msif.softmax_regression(6, 3).double(), data, weight_decay=1e-2)
    o = msif.Pipeline([stage]).objective(0)
    return msif.Hessian(o, draw(o.size, seed=6))


def gauss_newton():
    """Damped GGN of an untrained net, where the Hessian itself is indefinite."""
    pipeline = random_pipeline(link=msif.Frozen(), fit=False)
    o = pipeline.objective(0)
    return msif.GGN(o, o.layout.flatten(pipeline.stages[0].model), ridge=False) + 0.05


@pytest.mark.parametrize("operator", [convex, gauss_newton])
@pytest.mark.parametrize("solver", [EXACT, *ITERATIVE.values()], ids=["exact", *ITERATIVE])
def test_solutions_equal_dense_algebra(solver, operator):
    """More right-hand sides than parameters, among them a zero one and duplicates."""
    a = operator()
    size = a.shape[0]
    b = draw(size, size + 9)
    b[:, 3] = 0
    b[:, 7] = b[:, 11]
    x, report = solver.prepare(a).solve(b)
    expected = torch.linalg.solve(a.dense(), b)
    assert float((x - expected).norm() / expected.norm()) <= 1e-9
    assert bool((x[:, 3] == 0).all()) and float(report.residuals[3]) == 0.0
    assert float((x[:, 7] - x[:, 11]).abs().max()) <= 1e-10 * float(x.abs().max())
    residuals = (a.dense() @ x - b).norm(dim=0) / b.norm(dim=0).clamp(min=1e-300)
    assert report.residuals.shape == report.converged.shape == (size + 9,) and bool(
        report.converged.all()
    )
    assert torch.allclose(report.residuals, residuals, rtol=0.5, atol=1e-13)
    smallest = float(torch.linalg.eigvalsh(a.dense())[0])
    assert (
        report.smallest_curvature >= smallest * (1 - 1e-9)
        and report.seconds > 0
        and report.bytes > 0
    )
    if solver is EXACT:
        assert report.smallest_curvature == pytest.approx(smallest, rel=0.02)


@pytest.mark.parametrize("solver", [EXACT, *ITERATIVE.values()], ids=["exact", *ITERATIVE])
def test_all_zero_and_empty_right_hand_sides(solver):
    a = Matrix(with_eigenvalues([1.0, 2.0, 3.0]))
    if isinstance(getattr(solver, "preconditioner", None), msif.LowRank) or getattr(
        solver, "shares", ()
    ):
        a = convex()
    x, report = solver.prepare(a).solve(torch.zeros(a.shape[0], 2, dtype=F64))
    assert (
        bool((x == 0).all())
        and report.residuals.tolist() == [0.0, 0.0]
        and bool(report.converged.all())
    )
    x, report = solver.prepare(a).solve(torch.zeros(a.shape[0], 0, dtype=F64))
    assert x.shape == (a.shape[0], 0) and "0 of 0 columns" in str(report)


# ---- Conjugate gradients ----


def test_cg_tolerance_is_respected_and_a_loose_solve_fails_the_strict_check():
    a, b = convex(), draw(21, 5)
    expected = torch.linalg.solve(a.dense(), b)
    errors, iterations = [], []
    for tol in (1e-2, 1e-5, 1e-10):
        x, report = msif.ConjugateGradient(tol=tol, block=1).solve(a, b)
        assert float(((a.dense() @ x - b).norm(dim=0) / b.norm(dim=0)).max()) <= 1.01 * tol
        errors.append(float((x - expected).norm() / expected.norm()))
        iterations.append(report.iterations)
    assert errors[2] <= 1e-9 < 1e-4 < errors[0]  # negative control: the loose one is told apart
    assert iterations == sorted(set(iterations))


def test_cg_columns_stop_on_their_own():
    """An eigenvector needs one product, the others all; finished columns cost nothing."""
    a = Matrix(with_eigenvalues(torch.linspace(1, 50, 12)))
    b = torch.cat([torch.linalg.eigh(a.matrix)[1][:, :1], draw(12, 1)], 1)
    a.columns = 0
    _, report = msif.ConjugateGradient(tol=1e-10, block=1).solve(a, b)
    # and one that checks residuals
    assert report.iterations in (12, 13) and report.products == report.iterations + 2
    assert a.columns == report.products
    assert report.smallest_curvature >= 1 - 1e-9


def test_cg_calls_back_with_falling_residuals():
    seen = []
    solver = msif.ConjugateGradient(tol=1e-8, callback=lambda i, r: seen.append((i, r)))
    _, report = solver.solve(convex(), draw(21, 4))
    assert [i for i, _ in seen] == list(range(1, report.iterations + 1))
    assert all(r.shape == (4,) for _, r in seen)
    assert float(seen[-1][1].max()) <= 1e-8 < float(seen[0][1].max())
    # copies, not one buffer
    assert seen[0][1] is not seen[1][1] and not torch.equal(seen[0][1], seen[-1][1])


def test_cg_short_of_its_tolerance_warns_or_raises_with_the_residual():
    a, b = convex(), draw(21, 3)
    with pytest.warns(msif.ConvergenceWarning, match="3 of 3 columns.*residual up to") as caught:
        x, report = msif.ConjugateGradient(tol=1e-10, max_iter=3).solve(a, b)
    assert (
        not bool(report.converged.any())
        and report.iterations == 3
        and bool(torch.isfinite(x).all())
    )
    assert f"{float(report.residuals.max()):.1e}" in str(caught[0].message)
    with pytest.raises(msif.NotConvergedError, match=f"{float(report.residuals.max()):.1e}"):
        msif.ConjugateGradient(tol=1e-10, max_iter=3, strict=True).solve(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        msif.ConjugateGradient(tol=1e-10, strict=True).solve(a, b)


def test_cg_just_short_of_its_tolerance_is_not_converged():
    """A solve that stops between tol and 10 tol has not reached tol."""
    a, b, history = convex(), draw(21, 1), []
    msif.ConjugateGradient(tol=1e-8, callback=lambda i, r: history.append(float(r))).solve(a, b)
    steps = 6
    tol = history[steps - 1] / 3
    with pytest.warns(msif.ConvergenceWarning):
        _, report = msif.ConjugateGradient(tol=tol, max_iter=steps).solve(a, b)
    assert not bool(report.converged.any())


# ---- Indefinite matrices ----


@pytest.mark.parametrize("solver", [EXACT, TIGHT], ids=["exact", "cg"])
@pytest.mark.parametrize("values", [[-0.5, 1.0, 2.0, 3.0], [-1e-3, 1.0, 2.0, 50.0]])
def test_indefinite_is_refused_with_the_curvature(solver, values):
    matrix = with_eigenvalues(values)
    with pytest.raises(msif.IndefiniteCurvatureError, match="not positive definite") as caught:
        solver.prepare(Matrix(matrix)).solve(draw(4, 6))
    assert values[0] * (1 + 1e-6) <= caught.value.smallest < 0
    assert f"{caught.value.smallest:.3e}" in str(caught.value) and "ggn" in str(caught.value)
    # enough damping is a way out
    x, _ = solver.prepare(Matrix(matrix) + (0.1 - values[0])).solve(draw(4, 6))
    assert torch.allclose(
        x, torch.linalg.solve(matrix + (0.1 - values[0]) * torch.eye(4, dtype=F64), draw(4, 6))
    )


# ---- Exact keeps its work ----


def test_exact_makes_matrix_and_spectrum_once(monkeypatch):
    a, solver, eigh, calls = (
        Matrix(with_eigenvalues([0.1, 1.0, 2.0, 5.0])),
        msif.Exact(),
        torch.linalg.eigh,
        [],
    )
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(1) or eigh(m))
    b, eye = draw(4, 3), torch.eye(4, dtype=F64)
    for damping in (0.0, 0.3, 1.0, 0.3, 0.0):  # going back shows that nothing has piled up
        operator = a + damping if damping else a
        for _ in range(2):
            x, _ = solver.prepare(operator).solve(b)
            assert torch.allclose(x, torch.linalg.solve(a.matrix + damping * eye, b), rtol=1e-12)
        expected = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=F64) + damping
        assert torch.allclose(solver.spectrum(operator).values, expected, rtol=1e-12)
    assert a.columns == 4 and len(calls) == 1  # one dense matrix, one decomposition, for ten solves
    diagonal = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=F64)
    x, _ = solver.prepare(a + diagonal).solve(b)
    assert (
        torch.allclose(x, torch.linalg.solve(a.matrix + torch.diag(diagonal), b)) and a.columns == 4
    )
    values = solver.spectrum(a + diagonal).values
    assert (
        torch.allclose(values, torch.linalg.eigvalsh(a.matrix + torch.diag(diagonal)))
        and a.columns == 4
    )


def test_exact_follows_a_refitted_pipeline():
    """The cache belongs to the curvature operator, so new weights never meet an old matrix."""
    pipeline, solver = random_pipeline(link=msif.Frozen()), msif.Exact()
    queries = random_queries(pipeline)
    before = msif.ImplicitInfluence(solver).fit(pipeline).score(queries).values
    with torch.no_grad():
        pipeline.stages[1].model.head.weight.mul_(1.01)
    pipeline.adopt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msif.ConvergenceWarning)
        after = msif.ImplicitInfluence(solver).fit(pipeline).score(queries).values
        fresh = msif.ImplicitInfluence(msif.Exact()).fit(pipeline).score(queries).values
    assert torch.equal(after, fresh) and not torch.allclose(after, before)


def test_damping_of_scores_does_not_accumulate():
    pipeline, solver = random_pipeline(link=msif.Proximal(0.3)), msif.Exact()
    queries = random_queries(pipeline)

    def scores(damping):
        return msif.ImplicitInfluence(solver, damping=damping).fit(pipeline).score(queries).values

    first = scores(0.0)
    damped = scores(0.5)
    assert torch.equal(scores(0.0), first) and torch.equal(scores(0.5), damped)
    assert float(damped.norm()) < 0.5 * float(first.norm())


def test_nearly_singular_direct_solve_warns():
    with pytest.warns(msif.ConvergenceWarning, match="nearly singular"):
        _, report = (
            msif.Exact()
            .prepare(Matrix(with_eigenvalues([1e-6, 1.0, 2.0]).float()))
            .solve(draw(3, 40).float())
        )
    assert not bool(report.converged.all())


# ---- Spectrum and Schur complement ----


def test_spectrum_applies_functions_of_the_matrix():
    matrix, columns = with_eigenvalues([0.2, 1.0, 3.0, 7.0]), draw(4, 5)
    spectrum = msif.Exact().spectrum(Matrix(matrix))
    eye = torch.eye(4, dtype=F64)
    cases = [
        (lambda s: s, matrix @ columns),
        (lambda s: 1 / (s + 0.3), torch.linalg.solve(matrix + 0.3 * eye, columns)),
        (lambda s: 0.6 / (s + 0.6), 0.6 * torch.linalg.solve(matrix + 0.6 * eye, columns)),
        (lambda s: torch.exp(-s), torch.linalg.matrix_exp(-matrix) @ columns),
    ]
    for function, expected in cases:
        assert torch.allclose(spectrum.apply(function, columns), expected, rtol=1e-12, atol=1e-14)


def test_schur_complement():
    """Its inverse is the kept block of the inverse; keeping everything returns the matrix."""
    matrix, keep = with_eigenvalues(torch.linspace(0.5, 9, 7)), torch.tensor([5, 0, 3])
    expected = torch.linalg.inv(torch.linalg.inv(matrix)[keep][:, keep])
    assert torch.allclose(msif.schur_complement(matrix, keep), expected, rtol=1e-12)
    assert torch.equal(msif.schur_complement(matrix, torch.arange(7)), matrix)
    matrix[1, 1] -= 100
    with pytest.raises(msif.IndefiniteCurvatureError, match="the block that adapts"):
        msif.schur_complement(matrix, keep)


# ---- On the pipeline ----


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("link", [msif.Frozen(), msif.Proximal(0.3)], ids=["frozen", "proximal"])
def test_exact_and_cg_give_the_same_scores(link, curvature):
    pipeline = random_pipeline(link=link)
    queries = random_queries(pipeline)
    found = {}
    for name, solver in {
        "exact": EXACT,
        "tight": TIGHT,
        "loose": msif.ConjugateGradient(tol=0.3, block=1),
    }.items():
        attributor = msif.ImplicitInfluence(solver, curvature=curvature).fit(pipeline)
        found[name] = [attributor.score(queries, stage=k).values for k in (0, 1)]
        assert set(attributor.report_) == {"stage1"}
        attributor.score(queries)
        assert set(attributor.report_) == {"stage0", "stage1"}
        assert all(len(report.residuals) == len(queries) for report in attributor.report_.values())
    for exact, tight, loose in zip(found["exact"], found["tight"], found["loose"], strict=True):
        assert float((tight - exact).norm() / exact.norm()) <= 1e-8
        assert float((loose - exact).norm() / exact.norm()) > 1e-3  # negative control
