"""Segmented influence: exact where its reading of a run is, close to real removals elsewhere."""

import copy
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from oracles import F64, draw, relative_error
from torch import nn

import msif_lab as msif
from msif_lab.curvature.matrices import Hessian
from msif_lab.influence import segmented as segmented_module
from msif_lab.influence.path import RunPath
from msif_lab.influence.replay import kept_runs as kept_runs_of
from msif_lab.influence.stretches import by_flow, krylov, spread

README = Path(__file__).parents[1] / "README.md"
N = 10


class Net(nn.Module):
    """A tanh net, or with ``bent=False`` a linear map, whose squared error is quadratic."""

    def __init__(self, outputs, seed, bent=True):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, outputs)
        self.bent = bent
        self.double()

    def forward(self, x):
        z = self.body(x)
        return self.head(torch.tanh(z)) if self.bent else z


RECIPES = {
    "descent": msif.SGD(0.1, momentum=0.0, epochs=12, batch_size=N),
    "momentum": msif.SGD(0.05, epochs=12, batch_size=N, schedule="cosine", warmup=3),
    "nesterov": msif.SGD(0.05, epochs=12, batch_size=N, nesterov=True, schedule="linear"),
}
LINKS = {"frozen": msif.Frozen(), "proximal": msif.Proximal(0.3), "warm": msif.WarmStart()}


def examples(seed, outputs=2, n=N):
    return msif.Examples(draw(n, 4, seed=seed), draw(n, outputs, seed=seed + 50))


def chain(recipe, *links):
    """Squared-error stages in full batches, one per link after the first."""
    stages = []
    for k, link in enumerate((None, *links)):
        net, data = Net(2, k), examples(k)
        loss, decay = msif.mean_squared_error, 0.05
        stages.append(msif.Stage(f"stage {k}", net, data, loss, decay, link, recipe))
    return msif.Pipeline(stages).fit(progress=False)


def segmented(pipeline, queries, segments, stage=0, **settings):
    attributor = msif.SegmentedInfluence(segments, **{"trust": 0} | settings).fit(pipeline)
    return attributor.score(queries, stage=stage, progress=False).values


def unrolled(pipeline, queries, stage=0):
    attributor = msif.UnrolledInfluence(trust=0).fit(pipeline, progress=False)
    return attributor.score(queries, stage=stage, progress=False).values


# ---- Where the reading is exact ----


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("links", [(), ("frozen",), ("proximal",), ("warm",), ("warm", "frozen")])
def test_a_stretch_for_each_step_of_full_batches_is_the_unrolled_derivative(recipe, links):
    pipeline = chain(RECIPES[recipe], *(LINKS[link] for link in links))
    queries = examples(9, n=3)
    for stage in range(len(links) + 1):
        truth = unrolled(pipeline, queries, stage)
        ours = segmented(pipeline, queries, 12, stage, krylov=40)
        assert relative_error(ours, truth) < 1e-9, stage
    assert relative_error(segmented(pipeline, queries, 4, krylov=40), truth) > 1e-6


@dataclass(frozen=True)
class Steady(msif.AdamW):
    """AdamW differentiated with its squared gradients held fixed, step by step."""

    def pull_back(self, theta_bar, state_bar, saved, step, rate, decay):
        kept = super().pull_back(theta_bar, state_bar, saved, step, rate, decay)
        g_bar = (1 - self.betas[0]) * kept[2][0] / self.betas[0]
        return g_bar, kept[1], (kept[2][0], torch.zeros_like(saved[2]))


class SteadyAdam(Steady):
    decoupled = False


@pytest.mark.parametrize("kind", [Steady, SteadyAdam])
@pytest.mark.parametrize("link", LINKS)
def test_adam_is_exact_but_for_its_squared_gradients(kind, link):
    pipeline = chain(kind(0.02, epochs=8, batch_size=N, schedule="linear"), LINKS[link])
    queries = examples(9, n=3)
    ours = segmented(pipeline, queries, 8, krylov=40)
    assert relative_error(ours, unrolled(pipeline, queries)) < 1e-9


MINI = {
    "momentum": msif.SGD(0.05, epochs=3, batch_size=4, schedule="cosine", warmup=3),
    "nesterov": msif.SGD(0.05, epochs=3, batch_size=3, nesterov=True),
    "adam": SteadyAdam(0.02, epochs=2, batch_size=4),
    "adamw": Steady(0.02, epochs=2, batch_size=4, schedule="linear"),
}


@pytest.mark.parametrize("recipe", [*RECIPES, *MINI, "true adam", "true adamw"])
@pytest.mark.parametrize("links", [(), ("frozen",), ("proximal",), ("warm", "frozen")])
def test_step_by_step_with_a_stretch_for_each_it_is_the_unrolled_derivative(recipe, links):
    """Of Adam with all that its squared gradients pass on; longer stretches come close."""
    true = {"true adam": msif.Adam, "true adamw": msif.AdamW}
    known = RECIPES | MINI
    recipe = known[recipe] if recipe in known else true[recipe](0.02, epochs=3, batch_size=4)
    pipeline = chain(recipe, *(LINKS[link] for link in links))
    queries = examples(9, n=3)
    for stage in range(len(links) + 1):
        truth = unrolled(pipeline, queries, stage)
        assert relative_error(segmented(pipeline, queries, 99, stage), truth) < 1e-9, stage
    near = [relative_error(segmented(pipeline, queries, n, stage), truth) for n in (1, 3)]
    assert near[1] < near[0] and near[0] > 1e-7


@pytest.mark.parametrize("recipe", MINI)
@pytest.mark.parametrize("links", [("frozen",), ("proximal",), ("warm", "frozen")])
def test_with_each_steps_examples_it_is_the_unrolled_derivative_in_mini_batches(recipe, links):
    """Batches of unequal sizes, too; without knowing who was in them it is another number."""
    pipeline = chain(MINI[recipe], *(LINKS[link] for link in links))
    queries = examples(9, n=3)
    for stage in range(len(links) + 1):
        truth = unrolled(pipeline, queries, stage)
        ours = segmented(pipeline, queries, 99, stage, krylov=40)
        assert relative_error(ours, truth) < 1e-9, stage
    blind = segmented(pipeline, queries, 99, stage, krylov=40, details=False)
    assert relative_error(blind, truth) > 1e-2


class Sequences(nn.Module):
    """The mean, over four steps of two numbers, of what ``body`` makes of them."""

    def __init__(self, body):
        super().__init__()
        self.lift, self.body, self.head = nn.Linear(2, 4), body, nn.Linear(4, 2)

    def forward(self, x):
        z = self.body(self.lift(x.unflatten(1, (-1, 2))))
        return self.head((z[0] if isinstance(z, tuple) else z).mean(1))


class LowRank(nn.Module):
    """A frozen layer with a trained correction of rank one beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(8, 4), nn.Linear(4, 2)
        self.a, self.b = nn.Linear(8, 1, bias=False), nn.Linear(1, 4, bias=False)
        for layer in (self.base, self.head):
            layer.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.b(self.a(x))))


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return Sequences(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def batch_normed():
    """In eval mode, with running statistics that are not what they start as."""
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(8, 4), norm, nn.Tanh(), nn.Linear(4, 2))
    norm.running_mean.copy_(draw(4, seed=5) / 2)
    norm.running_var.copy_(draw(4, seed=6).square() + 0.5)
    return net.eval()


NETS = {
    "lstm": lambda: Sequences(nn.LSTM(4, 4, batch_first=True)),
    "transformer": transformer,
    "batch norm": batch_normed,
    "group norm": lambda: nn.Sequential(
        nn.Linear(8, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 2)
    ),
    "low rank": LowRank,
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("link", [None, msif.WarmStart(shared="")], ids=["one", "warm"])
def test_a_stretch_for_each_step_is_the_unrolled_derivative_of_other_nets(net, link):
    stages = []
    for k in range(1 if link is None else 2):
        torch.manual_seed(k)
        recipe = msif.SGD(0.1, momentum=0.8, epochs=5, batch_size=N)
        data = msif.Examples(draw(N, 8, seed=k), torch.arange(N) % 2)
        model = NETS[net]().double()
        stage = msif.Stage(f"stage {k}", model, data, weight_decay=0.01, recipe=recipe)
        stages.append(replace(stage, link=link if k else None))
    pipeline = msif.Pipeline(stages).fit(progress=False)
    queries = msif.Examples(draw(3, 8, seed=9), torch.arange(3) % 2)
    truth = unrolled(pipeline, queries)
    assert relative_error(segmented(pipeline, queries, 5, krylov=6), truth) < 1e-9
    assert relative_error(segmented(pipeline, queries, 5), truth) < 1e-9  # step by step
    assert relative_error(segmented(pipeline, queries, 2, krylov=20), truth) > 1e-5


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("count", "dtype", "most"), [(1, F64, 1e-9), (N, torch.float32, 1e-4)])
def test_step_by_step_of_one_example_and_in_single_precision(net, count, dtype, most):
    """In mini-batches, and two threads at once get what one gets."""
    stages = []
    for k in range(2):
        torch.manual_seed(k)
        recipe = msif.SGD(0.1, momentum=0.8, epochs=3, batch_size=4)
        data = msif.Examples(
            draw(count, 8, seed=k).to(dtype), torch.arange(count) % 2, classes=(0, 1)
        )
        stage = msif.Stage(f"stage {k}", NETS[net]().to(dtype), data, recipe=recipe)
        stages.append(replace(stage, link=msif.WarmStart(shared="") if k else None))
    pipeline = msif.Pipeline(stages).fit(progress=False)
    queries = msif.Examples(draw(3, 8, seed=9).to(dtype), torch.arange(3) % 2)
    truth = unrolled(pipeline, queries)
    ours = segmented(pipeline, queries, 99)
    assert ours.dtype == dtype and relative_error(ours, truth) < most
    coarse = segmented(pipeline, queries, 2)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda n: segmented(pipeline, queries, n), (99, 2)))
    assert torch.equal(both[0], ours) and torch.equal(both[1], coarse)


def test_batch_norm_in_train_mode_is_refused():
    net = batch_normed().double().train()
    recipe = msif.SGD(0.1, epochs=5, batch_size=N)
    data = msif.Examples(draw(N, 8), torch.arange(N) % 2)
    with pytest.raises(msif.UnsupportedModelError, match=r"BatchNorm1d.*batch statistics"):
        msif.Pipeline([msif.Stage("one", net, data, recipe=recipe)]).fit(progress=False)


def linear_loss(outputs, targets):
    """Its gradient is the same at all weights of a linear model, and it has no curvature."""
    return (outputs * targets).sum(1)


def shifted(stretch, by):
    """As if each step had had the examples of another one of its stretch."""
    return replace(stretch, batches=stretch.batches[by:] + stretch.batches[:by])


@pytest.mark.parametrize("count", [1, 2])
def test_details_count_each_example_in_its_own_steps(count, monkeypatch):
    """Stretches of many steps, exact: all curvature is the penalty's, all gradients are constant.

    Which examples each step had is then all that can go wrong, and it does if it is ignored or
    taken from a neighbouring step.
    """
    stages = []
    for k in range(count):
        recipe = msif.SGD(0.1, epochs=3, batch_size=4, schedule="linear", seed=k)
        net, decay = nn.Linear(4, 2).double(), {"bias": 0.3, "*": 1.0}
        stage = msif.Stage(f"stage {k}", net, examples(k), linear_loss, decay, recipe=recipe)
        stages.append(replace(stage, link=msif.WarmStart(shared="") if k else None))
    pipeline, queries = msif.Pipeline(stages).fit(progress=False), examples(9, n=3)
    read = segmented_module.stretches_of
    for stage in range(count):
        truth = unrolled(pipeline, queries, stage)

        def error(truth=truth, stage=stage, **settings):
            ours = segmented(pipeline, queries, 2, stage, krylov=40, **settings)
            return relative_error(ours, truth)

        assert error() < 1e-9
        assert error(details=False) > 0.1
        for by in (1, -1):
            with monkeypatch.context() as patch:
                patch.setattr(
                    segmented_module,
                    "stretches_of",
                    lambda *run, by=by: [shifted(s, by) for s in read(*run)],
                )
                assert error() > 0.1, by


def test_gradient_flow_against_the_exponential_of_the_matrix():
    a = draw(5, 5)
    matrix = a @ a.T / 5
    values, vectors = torch.linalg.eigh(matrix)
    theta_bar = draw(1, 5, seed=1)
    steps = [(msif.SGD(0.1, momentum=0.5).linear_step(t), 0.1, 0.0) for t in range(7)]
    turned = theta_bar @ vectors
    shares, start, _ = (part * turned for part in by_flow(values, steps))
    time = 7 * 0.1 / (1 - 0.5)
    decayed = torch.linalg.matrix_exp(-time * matrix)
    assert relative_error(start[:1] @ vectors.T, theta_bar @ decayed) < 1e-12
    assert not bool(start[1:].any() | shares[:, 1].any())
    whole = -theta_bar @ (torch.eye(5, dtype=F64) - decayed) @ torch.linalg.inv(matrix)
    assert relative_error(shares[:, :1].sum(0) @ vectors.T, whole) < 1e-10


def test_decay_by_name_is_nearly_exact_in_adamw():
    """Half of it before and half after a stretch: second order in rate times decay."""
    decay = {"bias": 0.0, "*": 0.2}
    data, queries = examples(0), examples(9, n=3)
    recipe = Steady(0.02, epochs=8, batch_size=N)
    stage = msif.Stage("one", Net(2, 0), data, msif.mean_squared_error, decay, recipe=recipe)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    ours = segmented(pipeline, queries, 8, krylov=40)
    assert relative_error(ours, unrolled(pipeline, queries)) < 2e-3


def test_one_stretch_of_a_run_that_stays_at_its_optimum_is_the_implicit_formula():
    net, data, queries = Net(3, 0, bent=False), examples(0, 3), examples(9, 3, n=3)
    net.head.requires_grad_(False)
    loss = msif.mean_squared_error
    at = msif.Pipeline([msif.Stage("one", net, data, loss, 0.3)]).fit(progress=False)
    implicit = msif.ImplicitInfluence().fit(at).score(queries).values
    recipe = msif.SGD(0.2, epochs=1500, batch_size=N)
    stage = msif.Stage("one", copy.deepcopy(net), data, loss, 0.3, recipe=recipe)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    assert relative_error(segmented(pipeline, queries, 1, krylov=40), implicit) < 1e-6
    short = replace(recipe, epochs=3)
    stage = msif.Stage("one", copy.deepcopy(net), data, loss, 0.3, recipe=short)
    again = msif.Pipeline([stage]).fit(progress=False)
    assert relative_error(segmented(again, queries, 1, krylov=40), implicit) > 0.1


def test_ritz_vectors_hold_the_start_and_its_images():
    a = draw(20, 20)
    matrix = a @ a.T / 20
    start = draw(20, 2, seed=1)
    spaces = list(krylov(lambda block: matrix @ block, start, 10))
    assert [basis.shape[1] for basis, _, _ in spaces] == [2, 4, 6, 8, 10]
    basis, values, rotation = spaces[-1]
    vectors = basis @ rotation
    assert relative_error(vectors.T @ vectors, torch.eye(10, dtype=F64)) < 1e-12
    assert torch.equal(spaces[1][0], basis[:, :4])
    for power in range(4):  # polynomials of degree below five in the matrix are exact
        image = torch.linalg.matrix_power(matrix, power) @ start
        ours = vectors @ (values[:, None] ** power * (vectors.T @ start))
        assert relative_error(ours, image) < 1e-10


def test_krylov_spaces_that_end_early_are_exact():
    start = draw(20, 1, seed=1)
    few = torch.diag(torch.arange(20, dtype=F64) // 7)  # three eigenvalues: exhausted at once
    for block in (torch.cat([start, 2 * start, 0 * start], 1), torch.cat([start, start + 1e-9], 1)):
        *_, (basis, values, rotation) = krylov(lambda block: few @ block, block, 20)
        vectors = basis @ rotation
        assert relative_error(vectors.T @ vectors, torch.eye(len(values), dtype=F64)) < 1e-12
        ours = vectors @ (values[:, None] * (vectors.T @ block))
        assert relative_error(ours, few @ block) < 1e-10
        assert len(values) <= 6
    ((basis, values, rotation),) = krylov(lambda block: few @ block, 0 * start, 10)
    assert basis.shape == (20, 0) and values.shape == (0,) and rotation.shape == (0, 0)


# ---- Weights between checkpoints ----


def path_of(recipe, segments, links=()):
    """A path beside the weights that it stands for, of each stretch of the first stage."""
    pipeline = chain(recipe, *links)
    run = kept_runs_of(pipeline, segments)[0]
    path = RunPath(run, pipeline.fresh_lanes(0, None))
    every = kept_runs_of(pipeline, 10**6)[0]
    truth = [path._trained(full) for full in every.fulls]
    for index, (a, b) in enumerate(zip(run.steps, run.steps[1:], strict=False)):
        ours = torch.cat([theta for theta, _ in path.segment(index)])
        yield run, index, ours, torch.stack(truth[a:b])


@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        (msif.SGD(0.05, epochs=4, batch_size=4, schedule="linear", warmup=2), 3),
        (msif.SGD(0.05, momentum=0.0, epochs=4, batch_size=4), 2),
        (msif.SGD(0.05, epochs=4, batch_size=4, nesterov=True), 2),
        (msif.Adam(0.01, epochs=4, batch_size=4), 3),
        (msif.AdamW(0.01, epochs=4, batch_size=4), 3),
    ],
    ids=["momentum", "plain", "nesterov", "adam", "adamw"],
)
def test_short_stretches_of_a_path_are_the_run_itself(recipe, exact):
    """Both ends and the mean fix two steps, and the momentum at the end a third one."""
    steps = 4 * -(-N // 4)
    for segments in (steps, -(-steps // 2), -(-steps // 3), 2):
        for run, index, ours, truth in path_of(recipe, segments):
            length = run.lengths[index]
            error = relative_error(ours, truth)
            assert relative_error(ours.mean(0), truth.mean(0)) < 1e-12
            assert relative_error(ours[0], truth[0]) < 1e-12
            if length <= exact:
                assert error < 1e-9, (length, index)
            else:
                assert 1e-6 < error < 0.1, (length, index)


# ---- Beside the unrolled derivative ----


@pytest.fixture(scope="module")
def runs():
    train, test = msif.load_digits(dtype=F64)
    queries = test.select(classes=range(4, 10), n=8, seed=1)
    pipelines = {}
    for link in ("frozen", "warm"):
        stages = []
        for k, (classes, n) in enumerate(((range(4), 200), (range(4, 10), 100))):
            recipe = msif.SGD(0.05, epochs=6, batch_size=50, schedule="linear", seed=k)
            net = msif.mlp(64, (8,), classes=len(classes), seed=k).double()
            data = train.select(classes=classes, n=n, seed=5)
            stage = msif.Stage("pf"[k], net, data, weight_decay=1e-3, recipe=recipe)
            stages.append(replace(stage, link=LINKS[link] if k else None))
        pipelines[link] = msif.Pipeline(stages).fit(progress=False)
    return pipelines, queries


def correlation(left, right):
    return float(
        torch.stack(
            [torch.corrcoef(torch.stack(p))[0, 1] for p in zip(left, right, strict=True)]
        ).mean()
    )


@pytest.mark.parametrize("link", ["frozen", "warm"])
def test_more_stretches_come_closer(runs, link):
    pipelines, queries = runs
    truth = unrolled(pipelines[link], queries)
    found = [correlation(segmented(pipelines[link], queries, n), truth) for n in (1, 3, 12)]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.98
    ggn = segmented(pipelines[link], queries, 12, curvature="ggn")
    assert correlation(ggn, truth) < found[2] - 0.02


def test_half_as_many_stretches_tell_the_error(runs):
    pipelines, queries = runs
    fine, coarse = (msif.SegmentedInfluence(n).fit(pipelines["warm"]) for n in (12, 2))
    report = fine.check(queries, progress=False)
    assert report.r.shape == report.change.shape == (8,)
    half = segmented(pipelines["warm"], queries, 6)
    whole = segmented(pipelines["warm"], queries, 12)
    assert float(report.r.mean()) == pytest.approx(correlation(whole, half), abs=1e-9)
    assert float(report.r.median()) > 0.95
    assert float(coarse.check(queries, progress=False).r.median()) < float(report.r.median())
    assert list(fine.adjoint_norms_) == ["p", "f"]
    assert len(fine.adjoint_norms_["p"]) == 13


def rough(lr, schedule):
    train, test = msif.load_digits(dtype=F64)
    data, queries = train.select(classes=range(4), n=200, seed=5), test.select(range(4), n=4)
    recipe = msif.SGD(lr, epochs=6, batch_size=20, schedule=schedule)
    stage = msif.Stage("one", msif.mlp(64, (8,), classes=4, seed=0).double(), data, recipe=recipe)
    return msif.Pipeline([stage]).fit(progress=False), queries


def test_stretches_of_changing_curvature_are_named():
    """Where the scores are poor; not where they are good, nor where each step is a stretch."""
    pipeline, queries = rough(0.2, "constant")
    truth = unrolled(pipeline, queries)
    method = msif.SegmentedInfluence(4, trust=0).fit(pipeline)
    with pytest.warns(msif.UnsmoothTrainingWarning, match=r"curvature changes.*segments="):
        poor = method.score(queries, progress=False).values
    assert correlation(poor, truth) < 0.8
    method = msif.SegmentedInfluence(10**6, trust=0).fit(pipeline)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "curvature changes")
        assert relative_error(method.score(queries, progress=False).values, truth) < 1e-2
        assert float(method.changes_.max()) == 0
        pipeline, queries = rough(0.02, "linear")
        method = msif.SegmentedInfluence(12, trust=0).fit(pipeline)
        good = method.score(queries, progress=False).values
    assert correlation(good, unrolled(pipeline, queries)) > 0.95


def test_changes_are_those_of_two_curvatures():
    """Of two stretches, by the matrices themselves, in Krylov spaces that hold everything."""
    pipeline = chain(msif.SGD(0.05, epochs=12, batch_size=N))
    queries = examples(9, n=3)
    method = msif.SegmentedInfluence(2, krylov=60).fit(pipeline)
    method.score(queries, progress=False)
    run = method._runs[0]
    o = pipeline.objective(0)
    matrices = [Hessian(o, mean).dense() for mean in run.means]
    coarse = segmented_module.stretches_of(run, True)
    model = copy.deepcopy(pipeline.stages[0].model)
    nn.utils.vector_to_parameters(run.fulls[-1], model.parameters())
    losses = msif.mean_squared_error(model(queries.x), queries.y)
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        theta, v = torch.cat([g.flatten() for g in grads]), 0.0
        for _, rate in reversed(coarse[1].steps):
            v = v - rate * theta
            theta, v = theta + matrices[1] @ v, 0.9 * v
        change = (matrices[0] - matrices[1]) @ theta
        time = sum(0.5 * spread(len(s.steps)) * sum(r for _, r in s.steps) / 0.1 for s in coarse)
        found.append(time * change.norm() / theta.norm())
    assert relative_error(method.changes_, torch.stack(found)) < 1e-9


def test_changes_step_by_step_are_those_at_a_checkpoint_not_known():
    """By the matrices themselves, at weights that the path gives."""
    pipeline = chain(msif.SGD(0.05, epochs=24, batch_size=N))
    queries = examples(9, n=3)
    method = msif.SegmentedInfluence(2, trust=0).fit(pipeline)
    method.score(queries, progress=False)
    run, o = method._runs[0], pipeline.objective(0)
    path = RunPath(run, pipeline.fresh_lanes(0, None))
    model = copy.deepcopy(pipeline.stages[0].model)
    nn.utils.vector_to_parameters(run.fulls[-1], model.parameters())
    found = []
    for loss in msif.mean_squared_error(model(queries.x), queries.y):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        theta, v = torch.cat([g.flatten() for g in grads]), 0.0
        for (weights, _), rate in reversed(list(zip(path.segment(1), run.rates[12:], strict=True))):
            v = v - rate * theta
            theta, v = theta + Hessian(o, weights[0]).dense() @ v, 0.9 * v
        known, unknown = (Hessian(o, weights).dense() for weights in path.at(1))
        time = 12 * 0.05 / 0.1 * spread(12)
        found.append(time / 2 * ((known - unknown) @ theta).norm() / theta.norm())
    assert relative_error(method.changes_, torch.stack(found)) < 1e-9
    ends = torch.stack(run.fulls)
    left = torch.linalg.norm(path.at(1)[1] - ends[1])
    assert 1e-6 < float(left) < float(torch.linalg.norm(ends[2] - ends[0]))


def test_a_run_that_amplifies_is_named():
    pipeline = chain(msif.SGD(1.2, epochs=25, batch_size=N), LINKS["warm"])
    queries = examples(9, n=3)
    with pytest.warns(msif.UnsmoothTrainingWarning, match="amplifies small changes"):
        unrolled(pipeline, queries)
    with pytest.warns(msif.UnsmoothTrainingWarning, match="amplifies small changes"):
        segmented(pipeline, queries, 12)


def test_settings_change_what_they_say(runs):
    pipelines, queries = runs
    pipeline = pipelines["warm"]
    whole = segmented(pipeline, queries, 6, details=False)
    larger = segmented(pipeline, queries, 6, details=False, krylov=20)
    assert correlation(larger, whole) > 0.999
    few = segmented(pipeline, queries, 6, curvature_examples=60, details=False)
    assert 0.8 < correlation(few, whole) < 0.9999
    for settings in ({"memory": "1MB"}, {"n_jobs": 2}):  # parts with Krylov spaces of their own
        parts = segmented(pipeline, queries, 6, details=False, **settings)
        assert 0 < relative_error(parts, whole) < 5e-3
    flow = segmented(pipeline, queries, 6, dynamics="flow", details=False)
    assert correlation(flow, whole) < 0.99
    attributor = msif.SegmentedInfluence(6, details=False).fit(pipeline)
    mean = attributor.score(queries, progress=False, aggregate="mean").values
    # A Krylov space of its own: equal up to what both leave out.
    assert relative_error(mean, whole.mean(0, keepdim=True)) < 1e-2
    exact = segmented(pipeline, queries, 6, krylov=60)
    attributor = msif.SegmentedInfluence(6, krylov=60).fit(pipeline)
    mean = attributor.score(queries, progress=False, aggregate="mean").values
    assert relative_error(mean, exact.mean(0, keepdim=True)) < 1e-8


def columns_multiplied(method, pipeline, queries, monkeypatch):
    """How many vectors the curvature is multiplied by."""
    columns, before = [], Hessian.__matmul__
    method.fit(pipeline, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            Hessian, "__matmul__", lambda s, v: columns.append(v.shape[1]) or before(s, v)
        )
        method.score(queries, progress=False)
    return sum(columns)


def test_the_plan_counts_what_will_be_done(runs, monkeypatch):
    pipelines, queries = runs
    for link, pipeline in pipelines.items():
        for krylov_size, least in ((4, 1.0), (None, 0.3)):
            method = msif.SegmentedInfluence(6, krylov_size, details=krylov_size is not None)
            plan = method.plan(pipeline, queries)
            assert plan.stretches == {"p": 6, "f": 6}, link
            assert all(seconds > 0 for seconds in plan.seconds)
            most = sum(plan.products.values()) * len(queries)
            done = columns_multiplied(method, pipeline, queries, monkeypatch)
            assert least * most <= done <= most
        steps = {stage.name: 6 * -(-len(stage.data) // 50) for stage in pipeline.stages}
        plan = msif.SegmentedInfluence(6).plan(pipeline, queries)
        assert plan.products == steps
        assert all(seconds > 0 for seconds in plan.seconds)
    with pytest.raises(msif.MemoryBudgetError, match="single query"):
        msif.SegmentedInfluence(6, memory="10kB").plan(pipeline, 1)
    with pytest.raises(ValueError, match="queries=0"):
        method.plan(pipeline, 0)


def test_many_queries_of_long_stretches_stay_within_the_memory(runs):
    """Each step of each query has coordinates in a space of all queries."""
    pipelines, queries = runs
    asked = pipelines["warm"], 0, [[4] * 6, [2] * 6]
    assert msif.SegmentedInfluence(6, memory="1MB")._side_by_side(*asked) < len(queries)
    assert msif.SegmentedInfluence(6)._side_by_side(*asked) == 32
    method = msif.SegmentedInfluence(6, memory="50MB")
    together = method._side_by_side(*asked)
    longer = method._side_by_side(*asked[:2], [[4000] * 6] * 2)
    assert 1 <= longer < together


def test_krylov_spaces_grow_until_the_scores_settle(runs, monkeypatch):
    """Close to large spaces in a long run, where few dimensions are not; fewer for many queries."""
    pipelines, queries = runs
    stages = [
        replace(stage, recipe=replace(stage.recipe, epochs=30), model=copy.deepcopy(stage.model))
        for stage in pipelines["frozen"].stages
    ]
    pipeline = msif.Pipeline(stages).fit(progress=False)
    full = segmented(pipeline, queries, 6, krylov=40, details=False)
    assert relative_error(segmented(pipeline, queries, 6, details=False), full) < 5e-3
    assert relative_error(segmented(pipeline, queries, 6, krylov=2, details=False), full) > 0.1
    method = msif.SegmentedInfluence(6, details=False)
    alone, together = (
        columns_multiplied(method, pipeline, queries[:n], monkeypatch) / n for n in (1, 8)
    )
    assert together < 0.9 * alone


# ---- Trained elsewhere ----


def own_loop(net, data, weights, optimizer, seed, saved=None):
    """A plain loop, with its own shuffling; keeps a checkpoint every five steps if asked to."""
    generator = torch.Generator().manual_seed(seed)
    total = 8 * -(-len(data) // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    rates, step = [], 0
    for _ in range(8):
        for batch in torch.randperm(len(data), generator=generator).split(25):
            if saved is not None and step % 5 == 0:
                saved.append(kept(step, net, optimizer))
            optimizer.zero_grad()
            losses = msif.cross_entropy(net(data.x[batch]), data.y[batch])
            (weights[batch] * losses).mean().backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
            step += 1
    if saved is not None:
        saved.append(kept(step, net, optimizer))
    return rates


def kept(step, net, optimizer):
    return step, copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-3),
}


class Loops:
    """Two stages in a plain loop: a backbone, then the same with a new head."""

    def __init__(self, kind):
        train, test = msif.load_digits(dtype=F64)
        self.kind = kind
        self.pre = train.select(classes=range(4), n=150, seed=5)
        self.fine = train.select(classes=range(4, 10), n=100, seed=5)
        self.queries = test.select(classes=range(4, 10), n=8, seed=1)

    def __call__(self, weights, saved=(None, None)):
        nets = [msif.mlp(64, (8,), classes=c, seed=c).double() for c in (4, 6)]
        optimizers = [OPTIMIZERS[self.kind](net.parameters()) for net in nets]
        rates = [own_loop(nets[0], self.pre, weights, optimizers[0], 0, saved[0])]
        nets[1].embedding.load_state_dict(nets[0].embedding.state_dict())
        ones = torch.ones(100, dtype=F64)
        rates.append(own_loop(nets[1], self.fine, ones, optimizers[1], 1, saved[1]))
        return nets, rates, optimizers

    def adopted(self):
        saved = [], []
        nets, rates, optimizers = self(torch.ones(150, dtype=F64), saved)
        runs = [msif.Run(*each) for each in zip(saved, rates, optimizers, strict=True)]
        link = msif.WarmStart()
        stages = [
            msif.Stage("pre", nets[0], self.pre, weight_decay=1e-3),
            msif.Stage("fine", nets[1], self.fine, weight_decay=1e-3, link=link),
        ]
        return msif.Pipeline(stages), runs


@pytest.mark.parametrize(("kind", "least"), [("sgd", 0.95), ("adam", 0.4), ("adamw", 0.4)])
def test_checkpoints_of_a_plain_loop_predict_its_own_removals(kind, least):
    loops = Loops(kind)
    pipeline, runs = loops.adopted()
    pipeline.adopt(checkpoints=runs)
    removed = msif.random_removals(150, 24, seed=0)
    values = []
    for group in [[], *removed]:
        weights = torch.ones(150, dtype=F64)
        weights[group] = 0
        last = loops(weights)[0][1]
        with torch.no_grad():
            values.append(msif.cross_entropy(last(loops.queries.x), loops.queries.y))
    after = torch.stack(values[1:], 1)
    effects = msif.Effects.from_values(
        values[0], after, removed, stage="pre", query_ids=loops.queries.ids
    )
    scores = msif.SegmentedInfluence().fit(pipeline).score(loops.queries, progress=False)
    ours = correlation(-scores.values[:, [g[0] for g in removed]], effects.values)
    assert ours > least
    assert msif.agreement(scores, effects).mean("r") == pytest.approx(ours, abs=1e-6)
    traced = msif.TracIn(12).fit(pipeline).score(loops.queries)
    assert correlation(-traced.values[:, [g[0] for g in removed]], effects.values) < ours - 0.2


def as_runs(stages, runs):
    """What is kept of our own runs, as somebody else would hand it over."""
    found = []
    for stage, run in zip(stages, runs, strict=True):
        names = [name for name, _ in stage.model.named_parameters()]
        dicts = [dict(zip(names, _parts(stage.model, full), strict=True)) for full in run.fulls]
        memories = [
            {
                "state": {
                    i: {"momentum_buffer": v} for i, v in enumerate(_parts(stage.model, s[0][0]))
                }
            }
            for s in run.states
        ]
        saved = list(zip(run.steps, dicts, memories, strict=True))
        means = [dict(zip(names, _parts(stage.model, m), strict=True)) for m in run.means]
        optimizer = torch.optim.SGD(stage.model.parameters(), 0.05, 0.9, weight_decay=1e-3)
        run_ = msif.Run(saved, run.rates, optimizer, [b.tolist() for b in run.batches], means)
        found.append(run_)
    return found


def test_adopted_checkpoints_of_our_own_run_give_the_same_scores(runs):
    pipelines, queries = runs
    fitted = pipelines["warm"]
    attributor = msif.SegmentedInfluence(6).fit(fitted)
    ours = attributor.score(queries, progress=False).values
    stages = [replace(stage, model=copy.deepcopy(stage.model)) for stage in fitted.stages]
    kept_runs = as_runs(stages, attributor._runs)
    adopted = msif.Pipeline(stages).adopt(checkpoints=kept_runs)
    again = msif.SegmentedInfluence(6).fit(adopted).score(queries, progress=False).values
    assert relative_error(again, ours) < 1e-12
    few = [msif.SegmentedInfluence(3).fit(p) for p in (adopted, fitted)]
    assert [len(run.steps) for run in few[0]._runs] == [4, 4]
    thinned, replayed = few[0]._runs[0], few[1]._runs[0]
    assert thinned.steps == replayed.steps
    assert relative_error(thinned.means[1], replayed.means[1]) < 1e-12
    assert relative_error(few[0].score(queries, progress=False).values, ours) > 1e-3
    bare = [
        msif.Run(*(getattr(r, n) for n in ("checkpoints", "rates", "optimizer"))) for r in kept_runs
    ]
    adopted.adopt(checkpoints=bare)
    blind = msif.SegmentedInfluence(6).fit(adopted).score(queries, progress=False).values
    plain = segmented(fitted, queries, 6, details=False)
    assert relative_error(blind, plain) < 1e-12
    assert relative_error(blind, ours) > 1e-3
    adopted.adopt(checkpoints=as_runs(stages, kept_runs_of(fitted, 6, by_rates=False)))
    traced = msif.TracIn(6).fit(adopted).score(queries).values
    assert relative_error(traced, msif.TracIn(6).fit(fitted).score(queries).values) < 1e-12


def _parts(model, full):
    shapes = [p.shape for p in model.parameters()]
    parts = full.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_the_example_in_the_readme():
    block = re.search(
        r"```python\n(saved, rates = .*?)```", README.read_text(encoding="utf-8"), re.S
    )[1]
    loops = Loops("sgd")
    net = msif.mlp(64, (8,), classes=4, seed=4).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    batches = [b for _ in range(10) for b in torch.randperm(150, generator=order).split(25)]
    queries = msif.load_digits(dtype=F64)[1].select(classes=range(4), n=5)
    space = {"copy": copy, "msif": msif, "net": net, "data": loops.pre, "queries": queries}
    exec(block, space | {"optimizer": optimizer, "batches": batches}, found := {})
    assert len(found["saved"]) == 13
    assert found["scores"].values.shape == (5, 150)
    same = msif.SegmentedInfluence(12).fit(found["pipeline"]).score(queries, progress=False)
    assert relative_error(found["scores"].values, same.values) < 1e-12


# ---- Refused ----


def changed(run, **settings):
    return replace(run, **settings)


WRONG = {
    "checkpoints | list of two or more": lambda r: changed(r, checkpoints=r.checkpoints[:1]),
    "at the steps [5 | rise from 0": lambda r: changed(r, checkpoints=r.checkpoints[1:]),
    "hold 3 numbers | each of the 48": lambda r: changed(r, rates=[0.1] * 3),
    "rates | zero or positive": lambda r: changed(r, rates=-1.0),
    "optimizer=RMSprop | torch.optim.SGD": lambda r: changed(
        r, optimizer=torch.optim.RMSprop([nn.Parameter(torch.ones(1))])
    ),
    "weight' is missing": lambda r: changed(r, checkpoints=[(s, {}) for s, *_ in r.checkpoints]),
    "the last checkpoint is not what the model holds": lambda r: changed(
        r, checkpoints=[*r.checkpoints[:-1], (48, r.checkpoints[0][1])]
    ),
    "with dampening is not known": lambda r: changed(
        r, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1, dampening=0.5)
    ),
    "batches hold 2 entries | each of the 48 steps": lambda r: changed(r, batches=[[0], [1]]),
    "batches[0] must be whole numbers from 0 to": lambda r: changed(r, batches=[[9999]] * 48),
    "means hold 1 state dicts | each of the": lambda r: changed(r, means=[{}]),
    "the mean in means after step 0: | is missing": lambda r: changed(
        r, means=[{}] * (len(r.checkpoints) - 1)
    ),
    "does not hold the parameters | requires_grad_(False) | msif.SGD(": lambda r: changed(
        r, optimizer=torch.optim.SGD(r.optimizer.param_groups[0]["params"][:1], 0.1)
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_runs_that_do_not_fit_are_refused(words):
    pipeline, runs = Loops("sgd").adopted()
    with pytest.raises((ValueError, TypeError)) as caught:
        pipeline.adopt(checkpoints=[WRONG[words](runs[0]), runs[1]])
    assert all(part in str(caught.value) for part in words.split(" | "))


def test_runs_of_other_settings_or_other_stages_are_refused():
    pipeline, runs = Loops("sgd").adopted()
    with pytest.raises(ValueError, match=r"one msif\.Run for each of the 2 stages"):
        pipeline.adopt(checkpoints=runs[:1])
    pipeline.stages[0].weight_decay = 0.5
    with pytest.raises(ValueError, match=r"weight decay of .* is 0\.001, the stage's is 0\.5"):
        pipeline.adopt(checkpoints=runs)
    pipeline.stages[0].weight_decay = 1e-3
    saved = list(runs[1].checkpoints)
    saved[0] = (0, {name: 1.1 * value for name, value in saved[0][1].items()})
    with pytest.raises(ValueError, match="first checkpoint does not start from what stage 'pre'"):
        pipeline.adopt(checkpoints=[runs[0], changed(runs[1], checkpoints=saved)])
    pipeline.adopt(checkpoints=[runs[0], None])
    with pytest.raises(ValueError, match=r"stages \['fine'\] were adopted without checkpoints"):
        msif.SegmentedInfluence().fit(pipeline)
    pipeline.adopt()
    with pytest.raises(ValueError, match="adopted"):
        msif.SegmentedInfluence().fit(pipeline)


def test_adam_without_its_moments_is_refused():
    pipeline, runs = Loops("adam").adopted()
    short = [changed(run, checkpoints=[c[:2] for c in run.checkpoints]) for run in runs]
    with pytest.raises(ValueError, match=r"lacks Adam's moments; keep \(step"):
        pipeline.adopt(checkpoints=short)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"segments": 0}, "segments=0"),
        ({"krylov": 2.5}, "krylov=2.5"),
        ({"curvature": "fisher"}, "curvature='fisher'"),
        ({"curvature_examples": 0}, "curvature_examples=0"),
        ({"dynamics": "exp"}, "dynamics='exp'"),
        ({"n_jobs": 0}, "n_jobs=0"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        msif.SegmentedInfluence(**settings)


MEMORY = """
import pathlib, re, torch, msif_lab as msif
torch.set_num_threads(1)
def status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+)", text)[1]) / 1e3
def added(work):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = work()
    return status("VmHWM") - before
def scored(n):
    data = msif.Examples(torch.rand(n, 2000), torch.arange(n) % 3)
    recipe = msif.SGD(0.01, epochs=1, batch_size=200)
    stage = msif.Stage("one", msif.mlp(2000, (4,), classes=3), data, recipe=recipe)
    method = msif.SegmentedInfluence(2, trust=0).fit(msif.Pipeline([stage]).fit(False), False)
    half = torch.arange(0, n, 2)
    copied = added(lambda: data[half])
    return added(lambda: method.score(data[:1], progress=False)), copied
scored(1000)  # what PyTorch loads on first use
print(*scored(2000), *scored(16_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_data():
    """In MB: 16,000 examples take 128, of which each of the two stretches sees a half."""
    command = [sys.executable, "-W", "ignore", "-c", MEMORY]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few, _, many, copied = map(float, out)
    assert many - few < 30
    assert copied > 50  # the control: what a copy of one stretch's examples would add
