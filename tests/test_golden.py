"""The implicit formulas against finite differences, closed forms and limits.

Finite differences retrain the whole pipeline. In the limit of a large alpha the proximal case is
the frozen one, in the limit of a small alpha the first stage has no influence.
"""

import pytest
import torch
from oracles import (
    F64,
    LINKS,
    Oracle,
    central_differences,
    close,
    implicit_scores,
    random_examples,
    random_pipeline,
    random_queries,
    relative_error,
)

import msif_lab as msif


def worst_error(scores, reference):
    """Largest relative error over examples, each one's taken over the queries.

    A middle stage between frozen links has no influence: there the scores must be zero as well.
    """
    sizes = reference.norm(dim=0).clamp(min=1e-9)
    return float(((scores - reference).norm(dim=0) / sizes).max())


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_scores_equal_finite_differences_of_the_whole_pipeline(kind, regression, link):
    """With three stages the first is two links away from the queries; a single one has no link."""
    examples = [0, 3, 7, 11, 13]
    for k in (1, 3) if link == "frozen" else (3,):
        pipeline = random_pipeline(kind, regression, LINKS[link], k)
        queries = random_queries(pipeline)
        attributor = msif.ImplicitInfluence().fit(pipeline)
        for stage in range(k):
            scores = attributor.score(queries, stage=stage).values[:, examples]
            truth = central_differences(pipeline, queries, stage, examples, optimum=True)
            assert worst_error(scores, truth) <= 1e-4, f"stage {stage} of {k}"


def test_unpolished_optimum_fails_the_same_check():
    """Negative control: the strict check tells a loose optimum from a stationary point."""
    pipeline = random_pipeline(k=1)
    queries = random_queries(pipeline)
    truth = central_differences(pipeline, queries, 0, [0, 3], optimum=True)
    with torch.no_grad():
        for p in pipeline.stages[0].model.parameters():
            p.mul_(1.02)
    with pytest.warns(msif.ConvergenceWarning, match="not at a stationary point"):
        scores = implicit_scores(pipeline.adopt(), queries)[:, [0, 3]]
    assert worst_error(scores, truth) > 1e-2


def test_other_targets_than_the_loss():
    pipeline = random_pipeline(link=LINKS["proximal"])
    queries = random_queries(pipeline)
    for target in ("margin", lambda z, y: z[:, 0] ** 2):
        scores = implicit_scores(pipeline, queries, target=target)[:, :3]
        truth = central_differences(pipeline, queries, 0, [0, 1, 2], optimum=True, target=target)
        assert worst_error(scores, truth) <= 1e-4, target


def with_alpha(alpha, pipeline):
    """A proximal pipeline at the trained weights of another one: W' = W* where that is frozen."""
    stages = [
        msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay, s.link and msif.Proximal(alpha))
        for s in pipeline.stages
    ]
    return msif.Pipeline(stages).adopt()


def test_large_alpha_gives_the_frozen_case():
    frozen, proximal = (random_pipeline(link=link) for link in (msif.Frozen(), msif.Proximal(1e6)))
    queries = random_queries(frozen)
    expected = implicit_scores(frozen, queries)
    assert relative_error(implicit_scores(proximal, queries), expected) <= 1e-5


def test_small_alpha_goes_to_zero():
    sizes = []
    for alpha in (1e-2, 1e-4, 1e-6):
        pipeline = random_pipeline(link=msif.Proximal(alpha))
        sizes.append(float(implicit_scores(pipeline, random_queries(pipeline)).norm()))
    assert sizes[1] < 0.1 * sizes[0] and sizes[2] < 0.011 * sizes[1]  # linear in alpha


def test_schur_bridge_between_the_cases():
    """The proximal case hands 2α (S + 2αI)⁻¹ c to pretraining at the same point.

    S is the Schur complement of G_TT, and c = a_W − G_WT G_TT⁻¹ a_T what the frozen case hands on.
    """
    alpha = 0.4
    pipeline = random_pipeline(link=msif.Proximal(alpha))
    queries = random_queries(pipeline)
    first, o = pipeline.objective(0), pipeline.objective(1)
    a = Oracle(o, pipeline.trained()[1]).gradients(queries)
    hessian = Oracle(o, pipeline.trained()[1]).hessian()
    shared = o.coupled_positions
    own = torch.tensor([i for i in range(o.size) if i not in set(shared.tolist())])
    hessian[shared, shared] -= 2 * alpha
    g_wt, g_tt = hessian[shared][:, own], hessian[own][:, own]
    c = a[:, shared].T - g_wt @ torch.linalg.solve(g_tt, a[:, own].T)
    spectrum = msif.Spectrum(*torch.linalg.eigh(msif.schur_complement(hessian, shared)))
    bridged = spectrum.apply(lambda s: 2 * alpha / (s + 2 * alpha), c)

    handed = torch.zeros(len(queries), first.layout.size, dtype=F64)
    pipeline.functional(1).there["coupled"].put(handed, bridged.T)
    before = Oracle(first, pipeline.trained()[0])
    solved = torch.linalg.solve(before.hessian(), before.gradients().T)
    expected = -handed @ solved / len(first.data)
    assert relative_error(implicit_scores(pipeline, queries), expected) <= 1e-9


def test_one_stage_is_koh_and_liang():
    pipeline = random_pipeline(k=1)
    queries = random_queries(pipeline)
    oracle = Oracle(pipeline.objective(0), pipeline.trained()[0])
    solved = torch.linalg.solve(oracle.hessian(), oracle.gradients().T)
    expected = -oracle.gradients(queries) @ solved / 24
    assert relative_error(implicit_scores(pipeline, queries), expected) <= 1e-10


def test_ridge_leave_one_out_is_exact():
    data = random_examples(30, (6,), 1, True, seed=3)
    queries = random_examples(7, (6,), 1, True, seed=4)
    model = msif.softmax_regression(6, classes=1).double()
    stage = msif.Stage("ridge", model, data, msif.mean_squared_error, weight_decay=0.1)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    corrected = msif.ImplicitInfluence(leave_one_out=True).fit(pipeline)
    scores = corrected.score(queries, target="output")
    ones = torch.ones(30, 1, dtype=F64)
    a, b = torch.cat([data.x, ones], 1), torch.cat([queries.x, ones[:7]], 1)

    def solve(keep):  # closed form; the 1/m stays
        gram = 2 / 30 * a[keep].T @ a[keep] + 0.1 * torch.eye(7, dtype=F64)
        return torch.linalg.solve(gram, 2 / 30 * a[keep].T @ data.y[keep])

    everyone = list(range(30))
    for i in range(30):
        actual = b @ (solve([j for j in everyone if j != i]) - solve(everyone))
        assert relative_error(scores.removal_effect([i])[:, None], actual) <= 1e-8
    # negative control: the correction matters
    plain = implicit_scores(pipeline, queries, target="output")
    assert relative_error(plain, scores.values) > 1e-2


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_leave_one_out_equals_a_dense_solve_per_example(curvature):
    """With enough weight decay that no step overshoots; see test_leave_one_out.py for others."""
    pipeline = random_pipeline(k=1, weight_decay=0.2)
    queries = random_queries(pipeline)
    scores = implicit_scores(pipeline, queries, curvature=curvature, leave_one_out=True)
    o, full = pipeline.objective(0), pipeline.trained()[0]
    train, asked = Oracle(o, full).gradients(), Oracle(o, full).gradients(queries)
    for i in range(len(o.data)):
        without = torch.ones(len(o.data), dtype=F64)
        without[i] = 0
        oracle = Oracle(o, full, without)
        matrix = oracle.hessian() if curvature == "hessian" else oracle.ggn()
        expected = -asked @ torch.linalg.solve(matrix, train[i] / len(o.data))
        close(scores[:, i], expected, 1e-8, i)


@pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning")
def test_below_the_alpha_floor_is_refused():
    """With a small alpha the given point is no minimum; the error says the smallest eigenvalue."""
    pipeline = random_pipeline(link=msif.Frozen(), weight_decay=1e-3)
    proximal = with_alpha(1e-6, pipeline)
    proximal.stages[1].model.embedding[1].weight.data += 0.5 * torch.randn(
        4, 16, generator=torch.Generator().manual_seed(0), dtype=F64
    )
    proximal.adopt()
    smallest = float(torch.linalg.eigvalsh(proximal.curvature(1).dense())[0])
    assert smallest < 0
    with pytest.raises(msif.IndefiniteCurvatureError, match="stage1") as caught:
        msif.ImplicitInfluence().fit(proximal)
    assert f"{smallest:.3e}" in str(caught.value)
    assert abs(caught.value.smallest - smallest) < 1e-12
    queries, solver = random_queries(proximal), msif.ConjugateGradient(max_iter=3000)
    with pytest.raises(msif.IndefiniteCurvatureError, match="conjugate"):
        implicit_scores(proximal, queries, solver)
    enough = with_alpha(2 * abs(smallest), pipeline)
    assert bool(implicit_scores(enough, queries, curvature="ggn").isfinite().all())
