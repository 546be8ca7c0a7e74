"""LowRank and EKFAC as solvers: where they are exact, how close they come, what they report."""

import sys
from dataclasses import replace

import pytest
import torch
from oracles import (
    LINKS,
    Matrix,
    attributes,
    convex,
    draw,
    library_gradients,
    random_examples,
    random_pipeline,
    relative_error,
    same,
    states,
    true_residuals,
    with_eigenvalues,
)

import msif_lab as msif

# approximations are not meant to reach the default tolerance
pytestmark = pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")

SOLVERS = [msif.LowRank(rank=40), msif.LowRank(rank=20, method="nystrom"), msif.EKFAC(samples=None)]


@pytest.fixture(scope="module")
def digits_net(digits):
    """A trained net of 1,210 parameters, its damped GGN, right-hand sides (P, 12), solutions."""
    train, test = digits
    stage = msif.Stage(
        "digits", msif.mlp(64, hidden=(16,), classes=10).double(), train[:300], weight_decay=1e-3
    )
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    o = pipeline.objective(0)
    queries = library_gradients(o, pipeline.trained()[0], test[:12]).T
    a = pipeline.curvature(0, "ggn") + 1e-2
    return pipeline, a, queries, torch.linalg.solve(a.dense(), queries)


def correlations(pipeline, x, exact):
    """Correlation of each query's scores with the exact ones."""
    o, full = pipeline.objective(0), pipeline.trained()[0]
    scores, true = (msif.example_products(o, full, v) for v in (x, exact))
    return torch.tensor(
        [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(scores, true, strict=True)]
    )


@pytest.mark.parametrize(
    ("solver", "least", "most"),
    [
        (msif.LowRank(rank=100), 0.85, 1.0),
        (msif.LowRank(rank=60, method="nystrom"), 0.85, 1.0),
        (msif.EKFAC(samples=None), 0.6, 0.999),
        (msif.EKFAC(), 0.6, 0.999),
    ],
    ids=["lowrank", "nystrom", "ekfac", "ekfac-sampled"],
)
def test_score_correlation_to_exact(digits_net, solver, least, most):
    pipeline, a, b, exact = digits_net
    found = float(correlations(pipeline, solver.prepare(a).solve(b)[0], exact).median())
    plain = float(correlations(pipeline, b, exact).median())
    assert least <= found <= most and found > plain, (
        f"{found:.3f}, gradient products alone {plain:.3f}"
    )


def test_low_rank_with_every_row_is_exact():
    """As many rows as examples × (classes − 1): nothing is left out."""
    a = convex() + 1e-2
    b = draw(a.shape[0], 4)
    for solver in (msif.LowRank(rank=10_000), msif.LowRank(rank=10_000, method="nystrom")):
        x, report = solver.prepare(a).solve(b)
        assert torch.allclose(x, torch.linalg.solve(a.dense(), b), rtol=1e-6), solver
        assert float(report.residuals.max()) < 1e-6, solver


def test_ekfac_is_exact_for_linear_regression():
    data = random_examples(40, (6,), 3, True, seed=5)
    model = msif.softmax_regression(6, 3).double()
    pipeline = msif.Pipeline([msif.Stage("l", model, data, msif.mean_squared_error, 0.02)])
    pipeline.fit(progress=False)
    a, b = pipeline.curvature(0, "ggn") + 0.05, draw(21, 4)
    before, untouched = states(pipeline), attributes(model)
    x, _ = msif.EKFAC(samples=None).prepare(a).solve(b)
    assert torch.allclose(x, torch.linalg.solve(a.dense(), b), rtol=1e-9)
    assert same(states(pipeline), before)
    assert attributes(model) == untouched, "a hook was left behind"


@pytest.mark.parametrize("link", LINKS)
def test_ekfac_puts_the_proximal_term_where_it_belongs(link):
    """Penalty and proximal term rule here, so 2α in a wrong place would be seen."""
    pipeline = random_pipeline("conv", link=LINKS[link])
    a = pipeline.curvature(1, "ggn") + 0.01
    exact = torch.linalg.inv(a.dense())
    approximate = msif.EKFAC(samples=None).prepare(a).apply(torch.eye(len(exact), dtype=a.dtype))
    assert torch.allclose(approximate, approximate.T, atol=1e-12)
    assert relative_error(approximate, exact) < 0.12
    b = draw(len(exact), 3)
    x, report = msif.ConjugateGradient(tol=1e-9, preconditioner=msif.EKFAC()).prepare(a).solve(b)
    assert bool(report.converged.all())
    assert torch.allclose(x, exact @ b, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=["lowrank", "nystrom", "ekfac"])
def test_reports_are_honest(digits_net, solver):
    _, a, b, _ = digits_net
    x, report = solver.prepare(a).solve(b)
    _, exact = replace(solver, max_iter=12).prepare(a).solve(b)
    true = true_residuals(a, x, b)
    assert torch.allclose(exact.residuals, true)
    assert exact.products == 12
    measured = true[[0, 6]]  # evenly spaced; the others get their root mean square
    assert report.products == 2
    assert torch.allclose(report.residuals[[0, 6]], measured)
    assert torch.allclose(report.residuals[[1, 11]], measured.square().mean().sqrt())
    assert report.bytes > 0 and report.seconds > 0 and report.smallest_curvature > 0
    with pytest.raises(msif.NotConvergedError, match=type(solver).__name__):
        replace(solver, max_iter=12, tol=1e-6, strict=True).prepare(a).solve(b)
    zero, report = solver.prepare(a).solve(torch.zeros_like(b))
    assert bool((zero == 0).all()) and report.residuals.tolist() == [0.0] * 12
    assert solver.prepare(a).solve(b[:, :0])[0].shape == (len(b), 0)


def test_approximations_say_what_they_cannot_do(digits_net, monkeypatch):
    pipeline, a, _, _ = digits_net
    matrix = Matrix(with_eigenvalues([1.0, 2.0])) + 1.0
    for solver in (msif.LowRank(), msif.EKFAC()):
        with pytest.raises(ValueError, match="examples"):
            solver.prepare(matrix)
        bare = msif.GGN(pipeline.objective(0), pipeline.trained()[0], ridge=False)
        with pytest.raises(ValueError, match="penalty or damping on every parameter"):
            solver.prepare(bare)
    with pytest.raises(msif.MemoryBudgetError, match="rank-300"):
        msif.LowRank(rank=300, memory="1MB").prepare(a)
    normed = msif.convnet((1, 4, 4), channels=(2,), width=4, classes=3, norm_groups=1).double()
    stage = msif.Stage(
        "normed", normed, random_examples(20, (1, 4, 4), 3, False, seed=1), weight_decay=0.1
    )
    o = msif.Pipeline([stage]).objective(0)
    with pytest.raises(msif.UnsupportedModelError, match=r"weight \(GroupNorm\)"):
        msif.EKFAC().prepare(msif.GGN(o, o.layout.flatten(normed)))
    with pytest.raises(ValueError, match="per parameter tensor"):
        msif.EKFAC().prepare(
            pipeline.curvature(0, "ggn") + torch.linspace(0.1, 1, a.shape[0], dtype=a.dtype)
        )
    for bad in ({"rank": 0}, {"method": "lanczos"}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            msif.LowRank(**bad)
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match="pip install 'curvlinops-for-pytorch"):
        msif.EKFAC().prepare(a)
