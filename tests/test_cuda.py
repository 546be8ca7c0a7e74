"""The same float64 numbers on a GPU as on the CPU, with `pipeline.to("cuda")` the only change.

Skipped where there is no GPU.
"""

import importlib.util

import pytest
import torch
from oracles import ALL_LINKS, implicit_scores, random_pipeline, random_queries, unrolled_scores

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
        pipeline = random_pipeline(kind, link=ALL_LINKS[link], **settings).to(device)
        values.append(score(pipeline, random_queries(pipeline).to(device)))
        assert pipeline.stages[0].data.x.device.type == device
    return values


def agree(values, case, rtol=1e-6):
    cpu, cuda = values
    assert cuda.device.type == "cuda", case
    atol = rtol * float(cpu.abs().max())
    torch.testing.assert_close(
        cuda.cpu(), cpu, rtol=rtol, atol=atol, msg=lambda text: f"{case}: {text}"
    )


@pytest.mark.parametrize("link", ["frozen", "proximal"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit(solver, link):
    if solver == "ekfac" and importlib.util.find_spec("curvlinops") is None:
        pytest.skip("curvlinops is not installed")

    def score(pipeline, queries):
        return implicit_scores(pipeline, queries, SOLVERS[solver], curvature="ggn", damping=0.1)

    for kind in ("mlp", "convnet"):
        agree(both(kind, link, score), kind, rtol=1e-4 if solver == "lissa" else 1e-6)


def test_hessian_leave_one_out_and_top():
    def corrected(pipeline, queries):
        return implicit_scores(pipeline, queries, leave_one_out=True)

    def most_harmful(pipeline, queries):
        return msif.ImplicitInfluence().fit(pipeline).score(queries, top=3).harmful().ids

    for kind in ("mlp", "convnet"):
        agree(both(kind, "proximal", corrected), kind)
        cpu, cuda = both(kind, "proximal", most_harmful)
        assert torch.equal(cpu.cpu(), cuda.cpu()), kind


@pytest.mark.parametrize("link", ["frozen", "warm"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_unrolled_baselines_and_retraining(kind, link):
    def ran(score):  # trained on the device where it is scored
        return both(kind, link, lambda p, q: score(p.fit(progress=False), q), fit=False, recipe=SGD)

    agree(ran(unrolled_scores), "unrolled")
    for name, baseline in msif.all_baselines().items():
        if name != "random":
            agree(ran(lambda p, q, b=baseline: b.fit(p).score(q).values), name)
    cpu, cuda = ran(lambda p, q: msif.removal_effects(p, q, [[0], [1, 2]], progress=False).values)
    torch.testing.assert_close(cuda.cpu(), cpu.cpu(), rtol=1e-6, atol=1e-9)


class Recurrent(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(9, 4)
        self.layer = kind(4, 5, batch_first=True)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(self.layer(self.words(tokens))[0].mean(1))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_have_second_derivatives(kind):
    """cuDNN's own have none, so it is off inside the library's calls, and on again afterwards."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (20, 6), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        data = msif.Examples(tokens, torch.arange(20) % 3).to(device)
        model = Recurrent(kind).double().to(device)
        stage = msif.Stage("fit", model, data, weight_decay=0.1, recipe=SGD)
        pipeline = msif.Pipeline([stage]).fit(progress=False)
        scores = msif.UnrolledInfluence().fit(pipeline, progress=False).score(data[:3])
        found.append([scores.values, pipeline.curvature(0).dense()])
        assert torch.backends.cudnn.enabled
    for what, pair in zip(("unrolled", "hessian"), zip(*found, strict=True), strict=True):
        agree(pair, what)
