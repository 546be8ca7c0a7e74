"""Solvers against dense linear algebra, and what they say when they cannot answer."""

import warnings

import pytest
import torch
from oracles import (
    F64,
    LINKS,
    Matrix,
    convex,
    draw,
    gauss_newton,
    implicit_scores,
    random_pipeline,
    random_queries,
    relative_error,
    true_residuals,
    with_eigenvalues,
)

import msif_lab as msif

EXACT = msif.Exact()
TIGHT = msif.ConjugateGradient(tol=1e-11, max_iter=2000)
ITERATIVE = {
    "cg": TIGHT,
    "cg-separate": msif.ConjugateGradient(tol=1e-11, max_iter=2000, block=1),
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


SOLVERS = {"exact": EXACT, **ITERATIVE}


NEED_EXAMPLES = {"cg-lowrank", "cg-nystrom", "cg-nested", "cg-nested-lowrank"}


@pytest.mark.parametrize("name", SOLVERS)
def test_solutions_equal_dense_algebra(name):
    """More right-hand sides than parameters (fewer where it takes long), a zero one, duplicates."""
    solver = SOLVERS[name]
    for operator in (convex, gauss_newton):
        a = operator()
        size = a.shape[0]
        count = 12 if name in NEED_EXAMPLES and operator is gauss_newton else size + 9
        if name not in NEED_EXAMPLES:
            a = Matrix(a.dense())
        b = draw(size, count)
        b[:, 3] = 0
        b[:, 7] = b[:, 11]
        x, report = solver.prepare(a).solve(b)
        assert relative_error(x, torch.linalg.solve(a.dense(), b)) <= 1e-9, operator
        assert bool((x[:, 3] == 0).all())
        assert float(report.residuals[3]) == 0.0
        assert float((x[:, 7] - x[:, 11]).abs().max()) <= 1e-10 * float(x.abs().max())
        assert report.residuals.shape == report.converged.shape == (count,)
        assert bool(report.converged.all())
        assert torch.allclose(report.residuals, true_residuals(a, x, b), rtol=0.5, atol=1e-13)
        smallest = float(torch.linalg.eigvalsh(a.dense())[0])
        assert report.smallest_curvature >= smallest * (1 - 1e-9)
        assert report.seconds > 0 and report.bytes > 0
        if solver is EXACT:
            assert report.smallest_curvature == pytest.approx(smallest, rel=0.02)


def test_all_zero_and_empty_right_hand_sides():
    a = convex()
    size = a.shape[0]
    for name, solver in SOLVERS.items():
        x, report = solver.prepare(a).solve(torch.zeros(size, 2, dtype=F64))
        assert bool((x == 0).all()), name
        assert report.residuals.tolist() == [0.0, 0.0], name
        assert bool(report.converged.all()), name
        x, report = solver.prepare(a).solve(torch.zeros(size, 0, dtype=F64))
        assert x.shape == (size, 0), name
        assert "0 of 0 columns" in str(report), name


# ---- Conjugate gradients ----


def test_cg_tolerance_is_respected_and_a_loose_solve_fails_the_strict_check():
    a, b = convex(), draw(21, 5)
    expected = torch.linalg.solve(a.dense(), b)
    errors, iterations = [], []
    for tol in (1e-2, 1e-5, 1e-10):
        x, report = msif.ConjugateGradient(tol=tol, block=1).solve(a, b)
        assert float(true_residuals(a, x, b).max()) <= 1.01 * tol
        errors.append(relative_error(x, expected))
        iterations.append(report.iterations)
    assert errors[2] <= 1e-9 < 1e-4 < errors[0]  # negative control: the loose one is told apart
    assert iterations == sorted(set(iterations))


def test_cg_columns_stop_on_their_own():
    """An eigenvector needs one product, the others all; finished columns cost nothing."""
    a = Matrix(with_eigenvalues(torch.linspace(1, 50, 12)))
    b = torch.cat([torch.linalg.eigh(a.matrix)[1][:, :1], draw(12, 1)], 1)
    _, report = msif.ConjugateGradient(tol=1e-10, block=1).solve(a, b)
    assert report.iterations in (12, 13)
    # one product for the eigenvector, and one that checks the residuals
    assert a.columns == report.products == report.iterations + 2
    assert report.smallest_curvature >= 1 - 1e-9


def test_cg_calls_back_with_falling_residuals():
    seen = []
    solver = msif.ConjugateGradient(tol=1e-8, callback=lambda i, r: seen.append((i, r)))
    _, report = solver.solve(convex(), draw(21, 4))
    assert [i for i, _ in seen] == list(range(1, report.iterations + 1))
    assert all(r.shape == (4,) for _, r in seen)
    assert float(seen[-1][1].max()) <= 1e-8 < float(seen[0][1].max())
    # copies, not one buffer that every call writes into
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_cg_short_of_its_tolerance_warns_or_raises_with_the_residual():
    a, b = convex(), draw(21, 3)
    with pytest.warns(msif.ConvergenceWarning, match="3 of 3 columns.*residual up to") as caught:
        x, report = msif.ConjugateGradient(tol=1e-10, max_iter=3).solve(a, b)
    assert not bool(report.converged.any())
    assert report.iterations == 3
    assert bool(torch.isfinite(x).all())
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
def test_indefinite_is_refused_with_the_curvature(solver):
    b = draw(4, 6)
    for values in ([-0.5, 1.0, 2.0, 3.0], [-1e-3, 1.0, 2.0, 50.0]):
        matrix = with_eigenvalues(values)
        with pytest.raises(msif.IndefiniteCurvatureError, match="not positive definite") as caught:
            solver.prepare(Matrix(matrix)).solve(b)
        assert values[0] * (1 + 1e-6) <= caught.value.smallest < 0
        assert f"{caught.value.smallest:.3e}" in str(caught.value)
        assert "ggn" in str(caught.value)
        damping = 0.1 - values[0]  # enough of it is a way out
        x, _ = solver.prepare(Matrix(matrix) + damping).solve(b)
        assert torch.allclose(x, torch.linalg.solve(matrix + damping * torch.eye(4, dtype=F64), b))


# ---- Exact keeps its work ----


def test_exact_makes_matrix_and_spectrum_once(monkeypatch):
    a, solver = Matrix(with_eigenvalues([0.1, 1.0, 2.0, 5.0])), msif.Exact()
    eigh, calls = torch.linalg.eigh, []
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
    shifted = a.matrix + torch.diag(diagonal)
    x, _ = solver.prepare(a + diagonal).solve(b)
    assert torch.allclose(x, torch.linalg.solve(shifted, b))
    assert torch.allclose(solver.spectrum(a + diagonal).values, torch.linalg.eigvalsh(shifted))
    assert a.columns == 4


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_exact_follows_a_refitted_pipeline():
    """The cache belongs to the curvature operator, so new weights never meet an old matrix."""
    pipeline, solver = random_pipeline(link=LINKS["frozen"]), msif.Exact()
    queries = random_queries(pipeline)
    before = implicit_scores(pipeline, queries, solver)
    with torch.no_grad():
        pipeline.stages[1].model.head.weight.mul_(1.01)
    pipeline.adopt()
    after = implicit_scores(pipeline, queries, solver)
    assert torch.equal(after, implicit_scores(pipeline, queries, msif.Exact()))
    assert not torch.allclose(after, before)


def test_damping_of_scores_does_not_accumulate():
    pipeline, solver = random_pipeline(link=LINKS["proximal"]), msif.Exact()
    queries = random_queries(pipeline)

    def scores(damping):
        return implicit_scores(pipeline, queries, solver, damping=damping)

    first = scores(0.0)
    damped = scores(0.5)
    assert torch.equal(scores(0.0), first) and torch.equal(scores(0.5), damped)
    assert float(damped.norm()) < 0.5 * float(first.norm())


def test_nearly_singular_direct_solve_warns():
    a = Matrix(with_eigenvalues([1e-6, 1.0, 2.0]).float())
    with pytest.warns(msif.ConvergenceWarning, match="nearly singular"):
        _, report = msif.Exact().prepare(a).solve(draw(3, 40, dtype=torch.float32))
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
@pytest.mark.parametrize("link", LINKS)
def test_exact_and_cg_give_the_same_scores(link, curvature):
    pipeline = random_pipeline(link=LINKS[link])
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
        assert relative_error(tight, exact) <= 1e-8
        assert relative_error(loose, exact) > 1e-3  # negative control


@pytest.mark.parametrize("kind", [msif.ConjugateGradient, msif.MINRES, msif.LiSSA])
def test_solvers_by_products_take_a_matrix(kind):
    matrix = 2 * torch.eye(3, dtype=torch.float64) + 0.1
    columns = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    found, _ = kind().prepare(matrix).solve(columns)
    assert torch.allclose(found, torch.linalg.solve(matrix, columns), atol=1e-2)
