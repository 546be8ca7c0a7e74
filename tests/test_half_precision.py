"""bfloat16, float16 and autocast: baselines work as far as the digits go, the rest is refused."""

import pytest
import torch
from oracles import draw, relative_error
from torch import nn

import msif_lab as msif
from msif_lab.objective.precision import computing_dtype

HALF = [torch.bfloat16, torch.float16]
RECIPE = msif.SGD(0.1, epochs=2, batch_size=10)
BASELINES = [
    msif.Loss(),
    msif.GradientNorm(),
    msif.GradientDot(),
    msif.GradientDot(cosine=True),
    msif.RepresentationSimilarity(layer="2"),
]


def examples(n, dtype, seed=0):
    x = draw(n, 5, seed=seed)
    return msif.Examples(x, (x[:, 0] > 0).long() + (x[:, 1] > 0)).to(dtype)


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def net(dtype, kind=nn.Sequential):
    torch.manual_seed(0)
    return kind(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def pipeline_of(model, dtype, recipe=RECIPE):
    data = examples(30, dtype)
    return msif.Pipeline([msif.Stage("fit", model, data, weight_decay=0.05, recipe=recipe)])


COARSE = [(dtype, nn.Sequential) for dtype in HALF] + [(torch.float32, Autocast)]


@pytest.fixture(params=COARSE, ids=["bfloat16", "float16", "autocast"])
def coarse(request):
    dtype, kind = request.param
    words = "computes in bfloat16 inside"
    if kind is not Autocast:
        words = f"its parameters are {dtype}".replace("torch.", "")
    with pytest.warns(msif.UnsupportedModelWarning, match=words):
        pipeline = pipeline_of(net(dtype, kind), dtype)
    return pipeline.fit(progress=False)


def test_baselines_are_right_to_the_last_digit_that_there_is(coarse):
    dtype = coarse.objective(0).dtype
    exact = pipeline_of(net(torch.float64), torch.float64)
    exact.stages[0].model.load_state_dict(coarse.stages[0].model.state_dict())
    exact.adopt()
    for baseline in BASELINES:
        ours = baseline.fit(coarse).score(examples(4, dtype, seed=1)).values
        truth = baseline.fit(exact).score(examples(4, torch.float64, seed=1)).values
        assert relative_error(ours.double(), truth) < 3e-2, baseline
    assert msif.TracIn(2).fit(coarse).score(examples(4, dtype, seed=1)).values.isfinite().all()


def test_what_needs_more_digits_is_refused_with_the_way_out(coarse):
    dtype = coarse.objective(0).dtype
    queries = examples(4, dtype, seed=1)
    way_out = "take autocast" if dtype == torch.float32 else r"use pipeline\.float\(\)"
    refused = [
        lambda: msif.ImplicitInfluence(curvature="ggn", damping=1.0).fit(coarse),
        lambda: msif.ImplicitInfluence(msif.LiSSA(), damping=1.0).fit(coarse),
        lambda: msif.SingleStage(damping=1.0).fit(coarse).score(queries),
        lambda: msif.UnrolledInfluence().fit(coarse, progress=False),
        lambda: msif.removal_effects(coarse, queries, [[0]], progress=False),
        lambda: pipeline_of(coarse.stages[0].model, dtype, msif.LBFGS()).fit(progress=False),
    ]
    for call in refused:
        with pytest.raises(msif.UnsupportedModelError, match=f"is refused, because .*{way_out}"):
            call()


@pytest.mark.parametrize("dtype", HALF)
def test_a_pipeline_made_float32_is_scored_by_every_method(dtype):
    with pytest.warns(msif.UnsupportedModelWarning):
        pipeline = pipeline_of(net(dtype), dtype)
    pipeline.fit(progress=False).float()
    exact = pipeline_of(net(torch.float64), torch.float64)
    exact.stages[0].model.load_state_dict(pipeline.stages[0].model.state_dict())
    scores = []
    for one in (pipeline, exact.adopt()):
        queries = examples(4, one.objective(0).dtype, seed=1)
        with pytest.warns(msif.ConvergenceWarning):  # two epochs are no optimum
            attributor = msif.ImplicitInfluence(curvature="ggn", damping=0.3).fit(one)
        scores.append(attributor.score(queries).values.double())
    assert relative_error(*scores) < 2e-2


class Cut(nn.Module):
    """Stops the gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.a(x)
        return self.h(torch.tanh(z / (1 + z.detach().norm(dim=1, keepdim=True))))


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_checked_in_half_precision_too(dtype):
    with pytest.raises(msif.UnsupportedModelError, match="not the derivative of the loss"):
        pipeline_of(Cut().to(dtype), dtype)


class Float32Norm(nn.Module):
    """Normalises in float32 and returns float32, as many language models do."""

    def __init__(self):
        super().__init__()
        self.a, self.h = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.a(x)
        z = z * torch.rsqrt(z.float().square().mean(-1, keepdim=True) + 1e-3).to(z.dtype)
        return self.h(torch.tanh(z)).float()


def test_float32_inside_float64_is_known_and_taken(recwarn):
    pipeline = pipeline_of(Float32Norm().double(), torch.float64).fit(progress=False)
    o = pipeline.objective(0)
    assert computing_dtype(o) == torch.float32
    assert o.outputs(pipeline.trained()[0], o.data.x).dtype == torch.float64
    assert not [w for w in recwarn if issubclass(w.category, msif.UnsupportedModelWarning)]
    exact = pipeline_of(net(torch.float64), torch.float64)
    assert computing_dtype(exact.objective(0)) == torch.float64
