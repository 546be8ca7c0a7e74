"""What holds for any data, drawn by hypothesis: the same cases at every run."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import F64, relative_error
from torch import nn

import msif_lab as msif
from msif_lab.objective import objective as objective_module

FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

FEWER = settings(FEW, max_examples=4)  # where every method scores, several times


class Net(nn.Module):
    """Two linear layers, or with ``bare`` a product that no layer route follows."""

    def __init__(self, inputs, classes, seed, bare):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Linear(inputs, 3), nn.Linear(3, classes)
        self.scale = nn.Parameter(torch.ones(3)) if bare else None
        self.double()

    def forward(self, x):
        features = torch.tanh(self.embedding(x))
        return self.head(features if self.scale is None else self.scale * features)


@st.composite
def settings_of_two_stages(draw):
    """Data of two stages and queries, and nets of random sizes."""
    inputs, seed = draw(st.integers(2, 4)), draw(st.integers(0, 1000))
    classes = draw(st.integers(2, 3)), draw(st.integers(2, 3))
    counts = draw(st.integers(6, 10)), draw(st.integers(5, 8)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(seed)
    data = []
    for n, c in zip(counts, (*classes, classes[1]), strict=True):
        x = torch.randn(n, inputs, generator=generator, dtype=F64)
        data.append((x, torch.arange(n) % c))
    link = draw(st.sampled_from([msif.WarmStart(), msif.Proximal(0.2), msif.Frozen()]))
    return data, inputs, classes, seed, link, draw(st.booleans())


def made(case, order=None):
    """The pipeline, briefly trained, with its first stage's examples in another order."""
    data, inputs, classes, seed, link, bare = case
    stages = []
    for k in range(2):
        x, y = data[k] if k or order is None else (part[order] for part in data[0])
        net = Net(inputs, classes[k], seed + k, bare)
        recipe = msif.SGD(0.1, momentum=0.5, epochs=4, batch_size=len(x))
        found = msif.Examples(x, y)
        stages.append(
            msif.Stage(
                "pf"[k], net, found, weight_decay=0.1, link=link if k else None, recipe=recipe
            )
        )
    return msif.Pipeline(stages).fit(progress=False)


METHODS = {
    "implicit": lambda: msif.ImplicitInfluence(
        msif.ConjugateGradient(tol=1e-12), damping=0.1, curvature="ggn"
    ),
    "exact": lambda: msif.ImplicitInfluence("auto", damping=0.1, curvature="ggn"),
    "unrolled": msif.UnrolledInfluence,
    "segmented": lambda: msif.SegmentedInfluence(2, krylov=60),
    "gradients": msif.GradientDot,
}


def scores(pipeline, queries, rows=slice(None)):
    """By method, of some queries ``(Q, N)``; after a warm start no minimum tells anything."""
    found = {}
    warm = isinstance(pipeline.stages[1].link, msif.WarmStart)
    for name, make in METHODS.items():
        if warm and name in ("implicit", "exact"):
            continue
        fitted = make().fit(pipeline)
        found[name] = fitted.score(msif.Examples(*queries)[rows]).values
    return found


def equal(left, right, tolerance=1e-7):
    """Whether all methods' scores agree."""
    return all(relative_error(values, right[name]) < tolerance for name, values in left.items())


@FEWER
@given(settings_of_two_stages(), st.randoms(use_true_random=False))
def test_the_order_of_examples_and_queries_is_nothing(case, dice):
    whole = scores(made(case), case[0][2])
    order, rows = ([*range(len(case[0][k][0]))] for k in (0, 2))
    dice.shuffle(order)
    dice.shuffle(rows)
    permuted = scores(made(case, order), case[0][2])
    assert equal(permuted, {name: values[:, order] for name, values in whole.items()})
    turned = scores(made(case), case[0][2], rows)
    assert equal(turned, {name: values[rows] for name, values in whole.items()})


@FEWER
@given(settings_of_two_stages())
def test_duplicates_share_their_score(case):
    twice = [*range(len(case[0][0][0])), 0, 1, 0]
    for values in scores(made(case, twice), case[0][2]).values():
        close = 1e-7 * values.abs().max()
        assert (values[:, -3:] - values[:, [0, 1, 0]]).abs().max() <= close


@FEW
@given(settings_of_two_stages(), st.lists(st.floats(-2, 2), min_size=2, max_size=2))
def test_the_risk_is_linear_in_example_weights(case, factors):
    p = made(case)
    o, full = p.objective(0), p.trained()[0]
    draw = torch.Generator().manual_seed(1)
    weights = torch.rand(2, len(o.data), generator=draw, dtype=F64)
    a, b = factors
    mixed = torch.cat([weights, (a * weights[0] + b * weights[1])[None], 0 * weights[:1]])
    lanes = p.functional(0).lanes(full.expand(4, -1), None, mixed)
    theta = o.trained.take(full).expand(4, -1)
    value, gradient = lanes.value_and_grad(theta)
    for found in (value[:, None], gradient):
        first, second, both, nobody = found
        expected = a * (first - nobody) + b * (second - nobody) + nobody
        assert (both - expected).abs().max() < 1e-10


@FEW
@given(settings_of_two_stages(), st.data())
def test_groups_add_up_and_results_come_back_from_files(case, data):
    p = made(case)
    queries = msif.Examples(*case[0][2])
    result = msif.GradientDot().fit(p).score(queries)
    members = data.draw(st.permutations(range(len(result.ids))))
    cut = data.draw(st.integers(1, len(members) - 1))
    parts = [result.removal_effect(group) for group in (members[:cut], members[cut:])]
    assert torch.allclose(sum(parts), result.removal_effect(members), atol=1e-12)
    groups = [members[:cut], [0], [1]]
    effects = msif.removal_effects(p, queries, groups, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        for saved, path in ((result, Path(folder, "scores")), (effects, Path(folder, "effects"))):
            saved.save(path)
            loaded = type(saved).load(path)
            assert torch.equal(loaded.values, saved.values)
            assert loaded.origin == saved.origin
        assert loaded.subsets == effects.subsets


@FEWER
@given(settings_of_two_stages())
def test_chunks_and_lanes_change_nothing(case):
    p = made(case)
    queries = msif.Examples(*case[0][2])
    groups = [[0], [1, 2], [3]]
    whole = scores(p, case[0][2])
    at_once = msif.removal_effects(p, queries, groups, lanes=3, progress=False).values
    before = objective_module.working_bytes
    objective_module.working_bytes = lambda *_: 1
    try:
        assert equal(scores(p, case[0][2]), whole)
        one_by_one = msif.removal_effects(p, queries, groups, lanes=1, progress=False).values
    finally:
        objective_module.working_bytes = before
    assert (one_by_one - at_once).abs().max() < 1e-10
