"""Iterative solvers beyond their answers: cost, preconditioners, indefiniteness, divergence."""

import pytest
import torch
from oracles import (
    F64,
    Matrix,
    convex,
    draw,
    gauss_newton,
    random_pipeline,
    relative_error,
    true_residuals,
    with_eigenvalues,
)

import msif_lab as msif
from msif_lab.solvers import minres
from msif_lab.solvers.nested import split


def products(solver, operator, b):
    _, report = solver.prepare(operator).solve(b)
    assert bool(report.converged.all())
    return report.products


# ---- Block conjugate gradients ----


def test_one_shared_space_needs_fewer_products_than_separate_ones():
    a, b = Matrix(with_eigenvalues(torch.logspace(-2, 1, 120))), draw(120, 12)
    together, separate = (msif.ConjugateGradient(tol=1e-6, block=k) for k in (64, 1))
    assert products(together, a, b) <= 0.5 * products(separate, a, b)
    # a single column is plain conjugate gradients either way
    one = b[:, :1]
    assert abs(products(together, a, one) - products(separate, a, one)) <= 4


def test_duplicate_columns_cost_nothing_in_a_shared_space():
    """Their space is large: in one that three columns exhaust, rounding decides the last steps."""
    a, b = Matrix(with_eigenvalues(torch.logspace(-2, 1, 200))), draw(200, 3)
    solver = msif.ConjugateGradient(tol=1e-6)
    once = products(solver, a, b)
    assert products(solver, a, torch.cat([b, -2 * b, b], 1)) <= 1.1 * once
    dependent = torch.cat([b, b @ draw(3, 4)], 1)
    x, report = solver.solve(a, dependent)
    assert report.products <= 1.1 * once
    assert torch.allclose(a.matrix @ x, dependent, atol=1e-4)


def test_products_are_counted_where_they_are_spent():
    for solver in (
        msif.ConjugateGradient(tol=1e-6),
        msif.MINRES(tol=1e-6),
        msif.LiSSA(tol=1e-4, max_iter=5000),
    ):
        a = Matrix(with_eigenvalues(torch.linspace(1, 9, 20)))
        assert products(solver, a, draw(20, 4)) == a.columns


def test_rounding_that_fools_the_recursion_is_seen():
    """In float32 the recursion claims 1e-7 too early; the report gives the true residuals."""
    a, b = Matrix(with_eigenvalues(torch.logspace(-2, 1, 80)).float()), draw(80, 3).float()
    for solver in (
        msif.ConjugateGradient(tol=1e-7, max_iter=400),
        msif.ConjugateGradient(tol=1e-7, max_iter=400, block=1),
        msif.MINRES(tol=1e-7, max_iter=400),
    ):
        with pytest.warns(msif.ConvergenceWarning):
            x, report = solver.solve(a, b)
        assert torch.allclose(report.residuals, true_residuals(a, x, b), rtol=0.3), solver
        assert not bool(report.converged.any()), solver


# ---- Preconditioners ----


def test_preconditioners_reduce_products(digits):
    train, _ = digits
    stage = msif.Stage(
        "digits", msif.mlp(64, hidden=(6,), classes=10).double(), train[:150], weight_decay=1e-3
    )
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    a, b = pipeline.curvature(0, "ggn") + 1e-3, draw(460, 4)
    for block in (1, 64):
        plain, low, nystrom = (
            products(msif.ConjugateGradient(tol=1e-6, preconditioner=helper, block=block), a, b)
            for helper in (None, msif.LowRank(rank=150), msif.LowRank(rank=60, method="nystrom"))
        )
        assert low <= 0.5 * plain and nystrom <= 0.8 * plain
    badly_scaled = Matrix(
        torch.diag(torch.logspace(-3, 3, 40, dtype=F64)) + with_eigenvalues([1e-4] * 40)
    )
    plain, jacobi = (
        products(
            msif.ConjugateGradient(tol=1e-6, preconditioner=helper, block=1),
            badly_scaled,
            draw(40, 3),
        )
        for helper in (None, msif.Jacobi())
    )
    assert jacobi <= 0.3 * plain


# ---- Nested conjugate gradients ----


@pytest.fixture(scope="module")
def mislabelled(digits):
    """Hessian of a net trained on some wrong labels: few examples make it differ from its GGN."""
    train, _ = digits
    labels = train.y[:300].clone()
    labels[::15] = (labels[::15] + 1) % 10
    net, recipe = msif.mlp(64, hidden=(6,), classes=10).double(), msif.SGD(lr=0.1, epochs=60)
    stage = msif.Stage("digits", net, msif.Examples(train.x[:300], labels), recipe=recipe)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    return pipeline.curvature(0, "hessian")


def test_nested_solves_spare_products_and_count_what_they_spend(mislabelled, monkeypatch):
    smallest = float(torch.linalg.eigvalsh(mislabelled.dense())[0])
    a, b = mislabelled + (0.05 - smallest), draw(460, 6)
    for columns in (6, 1):  # the checks of these routes, which are made once, are not counted
        a @ b[:, :columns]
    # No public interface counts examples times columns: a hook of the model sees neither.
    spent, chunk = [], msif.Hessian._chunk

    def counted(self, vectors, x, y, weights):
        spent.append(len(x) * vectors.shape[1] / 300)
        return chunk(self, vectors, x, y, weights)

    monkeypatch.setattr(msif.Hessian, "_chunk", counted)
    plain = products(msif.ConjugateGradient(tol=1e-4), a, b)
    assert sum(spent) == pytest.approx(plain)
    spent.clear()
    x, report = msif.ConjugateGradient(tol=1e-4, shares=(0.1, 0.3)).solve(a, b)
    assert sum(spent) <= report.products < sum(spent) + 1
    assert report.products <= 0.85 * plain
    # each column and level keeps eight directions and their products
    assert report.bytes == (6 + 3 * 2 * 8) * 460 * 6 * 8
    true = true_residuals(a, x, b)
    assert float(true.max()) <= 1e-4
    assert torch.allclose(report.residuals, true, rtol=1e-3)


def test_a_share_may_be_indefinite_but_not_the_whole(mislabelled):
    smallest = float(torch.linalg.eigvalsh(mislabelled.dense())[0])
    a = mislabelled + (0.002 - smallest)
    solver = msif.ConjugateGradient(1e-6, 200, shares=(0.3,))
    diagonal, (few, _) = split(a, (0.3,))
    assert float(torch.linalg.eigvalsh(few.dense() + torch.diag(diagonal))[0]) < 0
    b = draw(460, 5)
    x, report = solver.solve(a, b)
    assert bool(report.converged.all())
    assert torch.allclose(a.dense() @ x, b, atol=1e-4)
    # the indefinite share is passed over
    assert report.products <= 1.2 * products(msif.ConjugateGradient(1e-6), a, b)
    with pytest.raises(msif.IndefiniteCurvatureError, match="MINRES"):
        solver.solve(mislabelled + (-0.002 - smallest), b)


def test_shares_must_rise_and_have_examples():
    for shares in ((0.3, 0.3), (0.0,), (0.5, 1.0), (-0.1, 0.5)):
        with pytest.raises(ValueError, match=r"shares=.* must rise between 0 and 1"):
            msif.ConjugateGradient(shares=shares)
    bare = Matrix(with_eigenvalues([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"no examples to take shares=\(0.5,\)"):
        msif.ConjugateGradient(shares=(0.5,)).solve(bare, draw(2, 1))


# ---- MINRES ----


def test_minres_solves_indefinite_systems():
    for values in ([-3.0, -0.5, 1, 2, 4, 9], [-5.0, -4, -3, -2, -1, -0.5]):
        a, b = Matrix(with_eigenvalues(values)), draw(6, 9)
        x, report = msif.MINRES(tol=1e-10).solve(a, b)
        assert torch.allclose(x, torch.linalg.solve(a.matrix, b), atol=1e-8), values
        assert bool(report.converged.all())
        assert report.smallest_curvature == pytest.approx(values[0], rel=1e-6)


def test_minres_on_the_indefinite_hessian_of_a_net():
    pipeline = random_pipeline(link=msif.Frozen(), fit=False)
    o = pipeline.objective(0)
    hessian = msif.Hessian(o, o.layout.flatten(pipeline.stages[0].model))
    spectrum = torch.linalg.eigvalsh(hessian.dense())
    assert float(spectrum[0]) < -1e-3
    b = draw(o.size, 3)
    x, report = msif.MINRES(tol=1e-9, max_iter=5000).solve(hessian, b)
    assert bool(report.converged.all())
    assert report.smallest_curvature == pytest.approx(float(spectrum[0]), rel=1e-3)
    assert torch.allclose(hessian.dense() @ x, b, atol=1e-7)
    with pytest.raises(msif.IndefiniteCurvatureError, match="MINRES"):
        msif.ConjugateGradient().solve(hessian, b)


# ---- LiSSA ----


def test_lissa_finds_its_scale_and_its_divergence_is_caught():
    a, b = Matrix(with_eigenvalues([0.5, 1.0, 3.0, 50.0])), draw(4, 3)
    x, _ = msif.LiSSA(tol=1e-8, max_iter=5000).solve(a, b)
    assert torch.allclose(a.matrix @ x, b, atol=1e-6)
    with pytest.raises(
        msif.NotConvergedError, match=r"scale=1.00e\+01 is below half the largest curvature"
    ):
        msif.LiSSA(scale=10.0).solve(a, b)
    with pytest.raises(msif.IndefiniteCurvatureError, match="diverged") as caught:
        msif.LiSSA(max_iter=10_000).solve(Matrix(with_eigenvalues([-1.0, 2.0, 3.0])), draw(3, 2))
    assert caught.value.smallest == pytest.approx(-1, rel=1e-2)


def test_lissa_on_mini_batches():
    a = convex() + 0.5
    b = draw(21, 3)
    solver = msif.LiSSA(tol=0.2, max_iter=400, batch_size=10)
    x, report = solver.prepare(a).solve(b)
    assert bool(report.converged.all())
    assert relative_error(x, torch.linalg.solve(a.dense(), b)) < 0.2
    # the scale, half the data each step, the true residuals
    assert report.products == 20 + 400 * 3 // 2 + 3
    assert torch.equal(solver.prepare(a).solve(b)[0], x)


# ---- What all share ----


@pytest.mark.parametrize("kind", [msif.ConjugateGradient, msif.MINRES, msif.LiSSA])
def test_tolerance_strictness_callback_and_report(kind):
    a, seen = gauss_newton(), []
    b = draw(a.shape[0], 3)
    x, report = kind(tol=1e-4, max_iter=3000, callback=lambda i, r: seen.append((i, r))).solve(a, b)
    true = true_residuals(a, x, b)
    assert float(true.max()) <= 1.01e-4
    assert torch.allclose(report.residuals, true, rtol=0.05)
    assert [i for i, _ in seen] == list(range(1, report.iterations + 1))
    assert seen[-1][1].shape == (3,)
    smallest = float(torch.linalg.eigvalsh(a.dense())[0])
    assert report.smallest_curvature >= smallest * (1 - 1e-6)
    assert report.seconds > 0 and report.bytes > 0 and report.products > 0
    assert kind.__name__ in str(report)
    with pytest.warns(msif.ConvergenceWarning, match="3 of 3 columns.*residual up to"):
        kind(tol=1e-12, max_iter=2).solve(a, b)
    with pytest.raises(msif.NotConvergedError, match="residual up to"):
        kind(tol=1e-12, max_iter=2, strict=True).solve(a, b)
    for bad in ({"tol": 0.0}, {"tol": 1.5}, {"max_iter": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(**bad)


def test_minres_names_the_smallest_curvature_past_the_steps_it_remembers(monkeypatch):
    """Columns that end at different steps; a single one; fewer steps remembered than taken."""
    a = with_eigenvalues([-0.5, *torch.linspace(0.5, 4, 39)])
    easy = torch.linalg.eigh(a)[1][:, :1]  # an eigenvector: done after one step
    for b in (torch.cat([draw(40, 2), easy, torch.zeros(40, 1, dtype=F64)], 1), easy):
        for kept in (200, 12):
            monkeypatch.setattr(minres, "RITZ", kept)
            _, report = msif.MINRES(tol=1e-8).solve(Matrix(a), b)
            assert bool(report.converged.all())
            assert report.smallest_curvature == pytest.approx(
                -0.5, abs=1e-3 if kept == 200 else 0.1
            )
