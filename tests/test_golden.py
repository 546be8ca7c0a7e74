"""The formulas against finite differences of the whole retrained pipeline, and against the limits
of MATH.md.
"""

import pytest
import torch
from conftest import random_examples, random_pipeline, random_queries

import msif_lab as msif
from msif_lab.curvature import per_example_gradients

LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3)}


def finite_differences(pipeline, queries, stage, examples, step=1e-3):
    """(Q, E) central differences of the queries by example weights, every stage retrained and
    polished.
    """
    m = len(pipeline.stages[stage].data)
    weights = torch.ones(2 * len(examples), m, dtype=torch.float64)
    for lane, i in enumerate(examples):
        weights[2 * lane, i] += step
        weights[2 * lane + 1, i] -= step
    again = pipeline.retrain({stage: weights}, warm_start=True, progress=False)
    assert all(float(r.gradient_norm.max()) < 1e-12 for r in again.reports), (
        "the optimum must be polished"
    )
    q = again.evaluate(queries)
    return (q[:, 0::2] - q[:, 1::2]) / (2 * step)


def relative_errors(scores, reference):
    """Per example, over queries."""
    return (scores - reference).norm(dim=0) / reference.norm(dim=0)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_scores_equal_finite_differences_of_the_whole_pipeline(kind, regression, link, k):
    if k == 1 and link == "proximal":
        pytest.skip("one stage has no link")
    pipeline = random_pipeline(kind, regression, LINKS[link], k)
    queries = random_queries(pipeline)
    attributor = msif.ImplicitInfluence().fit(pipeline)
    worst = 0.0
    for stage in range(k):
        examples = [0, 3, 7, 11, 13]
        scores = attributor.score(queries, stage=stage).values[:, examples]
        errors = relative_errors(scores, finite_differences(pipeline, queries, stage, examples))
        worst = max(worst, float(errors.max()))
    print(f"{kind} {link} k={k}: worst relative error {worst:.1e}")
    assert worst <= 1e-4


def test_unpolished_optimum_fails_the_same_check():
    """Negative control: the strict check tells a loose optimum from a stationary point."""
    pipeline = random_pipeline(k=1)
    queries = random_queries(pipeline)
    truth = finite_differences(pipeline, queries, 0, [0, 3])
    with torch.no_grad():
        for p in pipeline.stages[0].model.parameters():
            p.mul_(1.02)
    with pytest.warns(msif.ConvergenceWarning, match="not at a stationary point"):
        scores = msif.ImplicitInfluence().fit(pipeline.adopt()).score(queries).values[:, [0, 3]]
    assert float(relative_errors(scores, truth).max()) > 1e-2


@pytest.mark.parametrize("target", ["margin", lambda z, y: z[:, 0] ** 2])
def test_other_targets_than_the_loss(target):
    pipeline = random_pipeline(link=LINKS["proximal"])
    queries = random_queries(pipeline)
    scores = msif.ImplicitInfluence().fit(pipeline).score(queries, target=target).values[:, :3]
    weights = torch.ones(6, len(pipeline.stages[0].data), dtype=torch.float64)
    for i in range(3):
        weights[2 * i, i] += 1e-3
        weights[2 * i + 1, i] -= 1e-3
    q = pipeline.retrain(weights, warm_start=True, progress=False).evaluate(queries, target)
    assert float(relative_errors(scores, (q[:, 0::2] - q[:, 1::2]) / 2e-3).max()) <= 1e-4


def at_same_point(alpha, frozen, finetune_decay=0.0):
    """A proximal pipeline whose weights are those of a fitted frozen one, so W' = W* exactly."""
    stages = [
        msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay, s.link and msif.Proximal(alpha))
        for s in frozen.stages
    ]
    return msif.Pipeline(stages).adopt()


def test_large_alpha_gives_the_frozen_case():
    frozen = random_pipeline(link=msif.Frozen())
    queries = random_queries(frozen)
    expected = msif.ImplicitInfluence().fit(frozen).score(queries).values
    proximal = random_pipeline(link=msif.Proximal(1e6))
    scores = msif.ImplicitInfluence().fit(proximal).score(queries).values
    assert float((scores - expected).norm() / expected.norm()) <= 1e-5


def test_small_alpha_goes_to_zero():
    sizes = []
    for alpha in (1e-2, 1e-4, 1e-6):
        pipeline = random_pipeline(link=msif.Proximal(alpha))
        sizes.append(
            float(
                msif.ImplicitInfluence().fit(pipeline).score(random_queries(pipeline)).values.norm()
            )
        )
    assert sizes[1] < 0.1 * sizes[0] and sizes[2] < 0.011 * sizes[1]  # linear in alpha


def test_schur_bridge_between_the_cases():
    """cotangent_full = 2α (S + 2αI)⁻¹ cotangent_frozen at the same point, S the Schur complement of
    G_TT.
    """
    alpha = 0.4
    proximal = random_pipeline(link=msif.Proximal(alpha))
    queries, full = random_queries(proximal), msif.ImplicitInfluence().fit(proximal)
    o, point = proximal.objective(1), proximal.trained()[1]
    gradients = torch.cat([g for _, g in per_example_gradients(o, point, queries, every=True)])
    solution, _ = full._prepared[1].solve(gradients[:, o.trained_positions].T)
    p = proximal.functional(1)
    cotangent_full = p.there["coupled"].take(full._pull_back(1, gradients, solution.T))

    hessian = proximal.curvature(1).dense()
    hessian[o.coupled_positions, o.coupled_positions] -= 2 * alpha
    shared, own = (
        o.coupled_positions,
        torch.tensor([i for i in range(o.size) if i not in set(o.coupled_positions.tolist())]),
    )
    g_wt, g_tt = hessian[shared][:, own], hessian[own][:, own]
    cotangent_frozen = gradients[:, shared].T - g_wt @ torch.linalg.solve(g_tt, gradients[:, own].T)
    schur = msif.schur_complement(hessian, shared)
    spectrum = msif.Spectrum(*torch.linalg.eigh(schur))
    bridged = spectrum.apply(lambda s: 2 * alpha / (s + 2 * alpha), cotangent_frozen)
    assert float((bridged.T - cotangent_full).norm() / cotangent_full.norm()) <= 1e-10


def test_one_stage_is_koh_and_liang():
    pipeline = random_pipeline(k=1)
    queries = random_queries(pipeline)
    o, full = pipeline.objective(0), pipeline.trained()[0]

    def risk(theta, weights=None):  # written out again, independently of the library's operators
        losses = torch.func.functional_call(
            pipeline.stages[0].model, o.layout.named(theta), (o.data.x,)
        )
        return torch.nn.functional.cross_entropy(losses, o.data.y) + 0.05 / 2 * theta @ theta

    hessian = torch.autograd.functional.hessian(risk, full)

    def gradient(x, y):
        theta = full.clone().requires_grad_()
        z = torch.func.functional_call(pipeline.stages[0].model, o.layout.named(theta), (x[None],))
        return torch.autograd.grad(torch.nn.functional.cross_entropy(z, y[None]), theta)[0]

    train = torch.stack([gradient(x, y) for x, y in zip(o.data.x, o.data.y, strict=True)])
    test = torch.stack([gradient(x, y) for x, y in zip(queries.x, queries.y, strict=True)])
    expected = -test @ torch.linalg.solve(hessian, train.T) / len(o.data)
    scores = msif.ImplicitInfluence().fit(pipeline).score(queries).values
    assert float((scores - expected).norm() / expected.norm()) <= 1e-10


def test_ridge_leave_one_out_is_exact():
    data = random_examples(30, (6,), 1, True, seed=3)
    queries = random_examples(7, (6,), 1, True, seed=4)
    model = msif.softmax_regression(6, classes=1).double()
    pipeline = msif.Pipeline(
        [msif.Stage("ridge", model, data, msif.mean_squared_error, weight_decay=0.1)]
    ).fit(False)
    scores = (
        msif.ImplicitInfluence(leave_one_out=True).fit(pipeline).score(queries, target="output")
    )
    ones = torch.ones(30, 1, dtype=torch.float64)
    a, b = torch.cat([data.x, ones], 1), torch.cat([queries.x, ones[:7]], 1)

    def solve(keep):  # closed form; the 1/m stays
        gram = 2 / 30 * a[keep].T @ a[keep] + 0.1 * torch.eye(7, dtype=torch.float64)
        return torch.linalg.solve(gram, 2 / 30 * a[keep].T @ data.y[keep])

    everyone = list(range(30))
    for i in range(30):
        actual = b @ (solve([j for j in everyone if j != i]) - solve(everyone))
        assert float((scores.removal_effect([i])[:, None] - actual).norm() / actual.norm()) <= 1e-8
    plain = msif.ImplicitInfluence().fit(pipeline).score(queries, target="output")
    # the correction matters
    assert float((plain.values - scores.values).norm() / scores.values.norm()) > 1e-2


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_leave_one_out_equals_a_dense_solve_per_example(curvature):
    pipeline = random_pipeline(k=1)
    queries = random_queries(pipeline)
    scores = (
        msif.ImplicitInfluence(curvature=curvature, leave_one_out=True)
        .fit(pipeline)
        .score(queries)
        .values
    )
    o, full = pipeline.objective(0), pipeline.trained()[0]
    kind = {"hessian": msif.Hessian, "ggn": msif.GGN}[curvature]
    gradients = torch.cat([g for _, g in per_example_gradients(o, full)])
    asked = torch.cat([g for _, g in per_example_gradients(o, full, queries)])
    for i in range(len(o.data)):
        without = torch.ones(len(o.data), dtype=torch.float64)
        without[i] = 0
        matrix = kind(o, full, without).dense()
        expected = -asked @ torch.linalg.solve(matrix, gradients[i] / len(o.data))
        assert torch.allclose(scores[:, i], expected, rtol=1e-8, atol=1e-13)


def test_below_the_alpha_floor_is_refused():
    """With alpha too small the given point is no minimum; the error names the smallest eigenvalue."""
    pipeline = random_pipeline(link=msif.Frozen(), weight_decay=1e-3)
    proximal = at_same_point(1e-6, pipeline)
    proximal.stages[1].model.embedding[1].weight.data += 0.5 * torch.randn(
        4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    proximal.adopt()
    smallest = float(torch.linalg.eigvalsh(proximal.curvature(1).dense())[0])
    assert smallest < 0
    with (
        pytest.warns(msif.ConvergenceWarning),
        pytest.raises(msif.IndefiniteCurvatureError, match="stage1") as caught,
    ):
        msif.ImplicitInfluence().fit(proximal)
    assert f"{smallest:.3e}" in str(caught.value) and abs(caught.value.smallest - smallest) < 1e-12
    with (
        pytest.warns(msif.ConvergenceWarning),
        pytest.raises(msif.IndefiniteCurvatureError, match="conjugate"),
    ):
        msif.ImplicitInfluence(msif.ConjugateGradient(max_iter=3000)).fit(proximal).score(
            random_queries(proximal)
        )
    enough = at_same_point(2 * abs(smallest), pipeline)
    with pytest.warns(msif.ConvergenceWarning):
        msif.ImplicitInfluence(curvature="ggn").fit(enough).score(random_queries(enough))
