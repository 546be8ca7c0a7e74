"""The same numbers on a GPU as on the CPU, in float64; nothing but `pipeline.to("cuda")` changes.
Skips without one.
"""

import importlib.util

import pytest
import torch
from conftest import random_pipeline, random_queries

import msif_lab as msif

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::msif_lab.ConvergenceWarning"),
]

SGD = msif.SGD(0.1, epochs=2, batch_size=8)
SOLVERS = {
    "exact": msif.Exact(),
    "cg": msif.ConjugateGradient(tol=1e-10),
    "cg, low rank": msif.ConjugateGradient(tol=1e-10, preconditioner=msif.LowRank(rank=20)),
    "cg, nystrom": msif.ConjugateGradient(
        tol=1e-10, preconditioner=msif.LowRank(rank=5, method="nystrom")
    ),
    "cg, jacobi": msif.ConjugateGradient(tol=1e-10, preconditioner=msif.Jacobi(samples=4)),
    "minres": msif.MINRES(tol=1e-10),
    "lissa": msif.LiSSA(tol=1e-8, max_iter=20_000),
    "low rank": msif.LowRank(rank=1000),
    "ekfac": msif.EKFAC(samples=None),
    "auto": "auto",
}


def both(kind, link, score, **settings):
    """``score(pipeline, queries)`` on the CPU and on the GPU."""
    values = []
    for device in ("cpu", "cuda"):
        pipeline = random_pipeline(kind, link=link, **settings).to(device)
        values.append(score(pipeline, random_queries(pipeline).to(device)))
        assert pipeline.stages[0].data.x.device.type == device
    return values


def close(values, rtol=1e-6):
    cpu, cuda = (v.values if isinstance(v, msif.Influence) else v for v in values)
    assert cuda.device.type == "cuda"
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=rtol, atol=rtol * float(cpu.abs().max()))


@pytest.mark.parametrize("link", [msif.Frozen(), msif.Proximal(0.3)], ids=["frozen", "proximal"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit(solver, kind, link):
    if solver == "ekfac" and importlib.util.find_spec("curvlinops") is None:
        pytest.skip("curvlinops is not installed")

    def score(pipeline, queries):
        return (
            msif.ImplicitInfluence(SOLVERS[solver], curvature="ggn", damping=0.1)
            .fit(pipeline)
            .score(queries)
        )

    close(both(kind, link, score), rtol=1e-4 if solver == "lissa" else 1e-6)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_hessian_leave_one_out_and_top(kind):
    method = msif.ImplicitInfluence(leave_one_out=True)
    close(both(kind, msif.Proximal(0.3), lambda p, q: method.fit(p).score(q)))
    tops = both(
        kind,
        msif.Proximal(0.3),
        lambda p, q: msif.ImplicitInfluence().fit(p).score(q, top=3).harmful().ids,
    )
    assert torch.equal(tops[0].cpu(), tops[1].cpu())


@pytest.mark.parametrize("link", [msif.Frozen(), msif.WarmStart()], ids=["frozen", "warm start"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_unrolled_baselines_and_retraining(kind, link):
    def run(pipeline):
        stages = [
            msif.Stage(s.name, s.model, s.data, s.loss, s.weight_decay, s.link, recipe=SGD)
            for s in pipeline.stages
        ]
        return msif.Pipeline(stages).fit(progress=False)

    def unrolled(pipeline, queries):
        return (
            msif.UnrolledInfluence()
            .fit(run(pipeline), progress=False)
            .score(queries, progress=False)
        )

    close(both(kind, link, unrolled, fit=False))
    for name, baseline in msif.all_baselines().items():
        if name != "random":
            scored = both(kind, link, lambda p, q, b=baseline: b.fit(run(p)).score(q), fit=False)
            close(scored)
    effects = both(
        kind,
        link,
        lambda p, q: msif.removal_effects(run(p), q, [[0], [1, 2]], progress=False).values,
        fit=False,
    )
    torch.testing.assert_close(*effects, rtol=1e-6, atol=1e-9)
