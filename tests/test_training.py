"""Recipes against plain PyTorch and SciPy, many weightings at once, and what stays untouched."""

import copy
import math

import numpy
import pytest
import scipy.optimize
import torch
from oracles import (
    ALL_LINKS,
    F64,
    LINKS,
    draw,
    flat,
    implicit_scores,
    random_examples,
    random_pipeline,
    random_queries,
    relative_error,
    same,
    states,
)
from torch.nn import functional

import msif_lab as msif
from msif_lab.pipeline.lbfgs import strong_wolfe

SGD = msif.SGD(lr=0.1, momentum=0.9, epochs=4, batch_size=7, seed=3)
RECIPES = {
    "momentum": SGD,
    "nesterov": msif.SGD(
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        epochs=4,
        batch_size=5,
        seed=1,
        schedule="cosine",
        warmup=3,
    ),
    "plain": msif.SGD(lr=0.2, momentum=0.0, epochs=4, batch_size=50, schedule="linear"),
    "adam": msif.Adam(lr=0.02, epochs=4, batch_size=7, schedule="cosine"),
    "adamw": msif.AdamW(lr=0.02, betas=(0.8, 0.99), eps=1e-6, epochs=4, batch_size=5, warmup=4),
}


def unfitted(recipe, kind="mlp", link="frozen", k=2, regression=False):
    return random_pipeline(kind, regression, ALL_LINKS[link], k, recipe=recipe, fit=False)


def largest(difference):
    return float(difference.abs().max())


def gradient_norm(pipeline, k):
    """‖∇F‖ over what stage k trains, by plain autograd on the stage's own module."""
    stage, model = pipeline.stages[k], copy.deepcopy(pipeline.stages[k].model)
    frozen = k > 0 and isinstance(stage.link, msif.Frozen)
    trained = {n: p for n, p in model.named_parameters() if not frozen or "head" in n}
    previous = pipeline.stages[k - 1].model if k else None
    risk = plain_risk(model, stage, stage.data.x, stage.data.y, trained, previous)
    slopes = torch.autograd.grad(risk, list(trained.values()))
    return float(torch.cat([g.reshape(-1) for g in slopes]).norm())


def plain_risk(model, stage, x, y, trained, previous=None, kept=None, decay=0):
    """Mean loss and penalties, as a user would write them.

    Args:
        kept: which examples have a loss; the mean still divides by the number of all.
        decay: None where the optimiser decays the weights itself.
    """
    outputs = model(x)
    if y.ndim == 1:
        losses = functional.cross_entropy(outputs, y, reduction="none")
    else:
        losses = ((outputs - y) ** 2).mean(1)
    risk = (losses if kept is None else losses[kept]).sum() / len(x)
    if decay is not None:
        risk = risk + stage.weight_decay / 2 * sum((p**2).sum() for p in trained.values())
    if previous and isinstance(stage.link, msif.Proximal):
        old = dict(previous.named_parameters())
        risk = risk + stage.link.alpha * sum(
            ((p - old[n].detach()) ** 2).sum() for n, p in trained.items() if "head" not in n
        )
    return risk


def plain_optimiser(recipe, parameters, weight_decay):
    if isinstance(recipe, msif.SGD):
        return torch.optim.SGD(
            parameters, lr=1.0, momentum=recipe.momentum, nesterov=recipe.nesterov
        )
    kind = torch.optim.AdamW if recipe.decoupled else torch.optim.Adam
    decay = weight_decay if recipe.decoupled else 0.0
    return kind(parameters, lr=1.0, betas=recipe.betas, eps=recipe.eps, weight_decay=decay)


def plain_training(pipeline, recipe, removed=()):
    """All stages by torch.optim with the recipe's batches; yields the models.

    Args:
        removed: examples of the first stage that have no loss.
    """
    previous = None
    for stage in pipeline.stages:
        model = copy.deepcopy(stage.model)
        if previous is not None:
            shared = {n: v for n, v in previous.state_dict().items() if "head" not in n}
            model.load_state_dict(shared, strict=False)
        frozen = isinstance(stage.link, msif.Frozen)
        trained = {n: p for n, p in model.named_parameters() if not frozen or "head" in n}
        optimiser = plain_optimiser(recipe, trained.values(), stage.weight_decay)
        for batch, rate in recipe.steps(len(stage.data)):
            for group in optimiser.param_groups:
                group["lr"] = rate
            kept = torch.tensor([previous is not None or int(i) not in removed for i in batch])
            optimiser.zero_grad()
            decay = None if recipe.decoupled else stage.weight_decay
            x, y = stage.data.x[batch], stage.data.y[batch]
            plain_risk(model, stage, x, y, trained, previous, kept, decay).backward()
            optimiser.step()
        previous = model
        yield model


# ---- SGD ----


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_equal_torch_step_for_step(name):
    recipe = RECIPES[name]
    for link in ALL_LINKS:
        pipeline = unfitted(recipe, link=link)
        expected = list(plain_training(pipeline, recipe))
        pipeline.fit(progress=False)
        for stage, model in zip(pipeline.stages, expected, strict=True):
            assert largest(flat(stage.model) - flat(model)) <= 1e-12, (link, stage.name)
        steps = [sum(1 for _ in recipe.steps(n)) for n in (24, 20)]
        assert [r.iterations for r in pipeline.reports] == steps


@pytest.mark.parametrize("link", LINKS)
def test_weight_zero_drops_the_loss_and_keeps_the_divisor(link):
    pipeline = unfitted(SGD, link=link).fit(progress=False)
    weights = torch.ones(24)
    weights[[2, 9, 17]] = 0
    again = pipeline.retrain(weights, progress=False)
    fresh = unfitted(SGD, link=link)
    for k, model in enumerate(plain_training(fresh, SGD, removed=(2, 9, 17))):
        assert largest(again.parameters[k][0] - flat(model)) <= 1e-12, k
        # negative control: the removal matters
        assert largest(again.parameters[k][0] - flat(pipeline.stages[k].model)) > 1e-3, k


def test_sgd_is_reproducible_bit_for_bit():
    first, second = (unfitted(SGD, "convnet").fit(progress=False) for _ in range(2))
    assert same(states(first), states(second))
    torch.manual_seed(123)  # the global generator must not matter
    before = torch.get_rng_state()
    assert same(states(first.fit(progress=False)), states(second))
    assert torch.equal(torch.get_rng_state(), before)
    other = unfitted(msif.SGD(lr=0.1, epochs=4, batch_size=7, seed=4), "convnet").fit(
        progress=False
    )
    assert not same(states(first), states(other))


def test_batches_cover_every_epoch_once_whatever_the_weights():
    recipe = msif.SGD(lr=0.1, epochs=3, batch_size=7, seed=5)
    batches = [batch for batch, _ in recipe.steps(24)]
    assert [len(b) for b in batches] == 3 * [7, 7, 7, 3]
    epochs = [torch.cat(batches[i : i + 4]) for i in (0, 4, 8)]
    assert all(e.sort().values.tolist() == list(range(24)) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert all(torch.equal(a, b) for a, (b, _) in zip(batches, recipe.steps(24), strict=True))


def test_schedules_and_warmup():
    def rates(**settings):
        recipe = msif.SGD(lr=2.0, epochs=4, batch_size=5, **settings)
        return [rate for _, rate in recipe.steps(10)]  # 8 steps

    assert rates() == [2.0] * 8
    assert rates(schedule="linear") == pytest.approx([2 * (1 - t / 8) for t in range(8)])
    assert rates(schedule="cosine") == pytest.approx(
        [1 + math.cos(math.pi * t / 8) for t in range(8)]
    )
    assert rates(warmup=4) == pytest.approx([0.5, 1.0, 1.5, 2, 2, 2, 2, 2])
    falling = [2 * (1 - t / 6) for t in range(6)]  # the decay begins when the warm-up is over
    assert rates(warmup=2, schedule="linear") == pytest.approx([1.0, 2.0, *falling])
    assert rates(schedule=lambda step, steps: step / steps) == pytest.approx(
        [2 * t / 8 for t in range(8)]
    )


def test_diverging_training_says_so_and_writes_nothing():
    pipeline = unfitted(msif.SGD(lr=1e6, epochs=40, batch_size=5), regression=True)
    before = states(pipeline)
    with pytest.raises(msif.NotConvergedError, match="lower lr"):
        pipeline.fit(progress=False)
    assert same(before, states(pipeline))


# ---- L-BFGS ----


@pytest.mark.parametrize("regression", [False, True], ids=["cross-entropy", "squared-error"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_lbfgs_reaches_a_stationary_point(kind, regression):
    for link in LINKS:
        pipeline = unfitted(msif.LBFGS(), kind, link, regression=regression).fit(progress=False)
        for k, report in enumerate(pipeline.reports):
            assert bool(report.converged.all()), (link, k)
            assert float(report.gradient_norm.max()) < 1e-12, (link, k)
            assert gradient_norm(pipeline, k) < 1e-12, (link, k)
    single = unfitted(msif.LBFGS(), kind, "proximal", regression=regression).to(torch.float32)
    for k, report in enumerate(single.fit(progress=False).reports):
        assert report.gradient_norm.dtype == torch.float32
        assert gradient_norm(single, k) < 1e-4, k


def test_lbfgs_without_polish_stops_at_its_tolerance():
    norms = []
    for tol in (1e-2, 1e-6):
        pipeline = unfitted(msif.LBFGS(tol=tol, polish_up_to=0)).fit(progress=False)
        norms += [gradient_norm(pipeline, k) for k in (0, 1)]
        assert all(bool(r.converged.all()) for r in pipeline.reports)
    assert max(norms[:2]) <= 1e-2 and max(norms[2:]) <= 1e-6 < 1e-4 < max(norms[:2])
    short = unfitted(msif.LBFGS(max_iter=3, polish_up_to=0)).fit(progress=False)
    assert not bool(short.reports[0].converged.any())
    assert "stopped short" in str(short.reports[0])


def test_lbfgs_takes_a_whole_number_as_tolerance():
    pipeline = unfitted(msif.LBFGS(tol=1)).fit(progress=False)
    assert bool(pipeline.reports[0].converged.all())


def test_lbfgs_agrees_with_scipy_where_the_optimum_is_unique():
    data = random_examples(40, (6,), 3, False, seed=5)
    stage = msif.Stage("linear", msif.softmax_regression(6, 3).double(), data, weight_decay=1e-2)
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    x, y = data.x.numpy(), numpy.eye(3)[data.y.numpy()]

    def risk(theta, w):
        z = x @ theta[:18].reshape(3, 6).T + theta[18:]
        top = z.max(1, keepdims=True)
        log_p = z - top - numpy.log(numpy.exp(z - top).sum(1, keepdims=True))
        pull = w[:, None] * (numpy.exp(log_p) - y) / 40
        value = -(w * (log_p * y).sum(1)).sum() / 40 + 0.005 * theta @ theta
        return value, numpy.concatenate([(pull.T @ x).ravel(), pull.sum(0)]) + 0.01 * theta

    for name, weights in {"ones": torch.ones(40, dtype=F64), "random": draw(40).abs()}.items():
        ours = pipeline.retrain(weights, progress=False).parameters[0][0].numpy()
        w = weights.numpy()
        theirs = scipy.optimize.minimize(
            risk, numpy.zeros(21), w, jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        assert abs(ours - theirs.x).max() <= 1e-7, name
        value, gradient = risk(ours, w)
        assert value <= theirs.fun + 1e-14, name
        assert numpy.linalg.norm(gradient) < 1e-12, name


class Waves:
    """Random smooth functions, bounded below, one a lane: ``½ xᵀAx + Σ a cos(Bx + c)``."""

    def __init__(self, lanes, size, seed):
        root = draw(lanes, size, size, seed=seed) / size**0.5
        self.parts = (
            root @ root.transpose(1, 2) + 0.05 * torch.eye(size, dtype=F64),
            draw(lanes, 5, seed=seed + 1),
            2 * draw(lanes, 5, size, seed=seed + 2),
            draw(lanes, 5, seed=seed + 3),
        )

    def __len__(self):
        return len(self.parts[0])

    def select(self, lanes):
        chosen = object.__new__(Waves)
        chosen.parts = tuple(part[lanes] for part in self.parts)
        return chosen

    def value_and_grad(self, x):
        a, height, b, c = self.parts
        phase, bent = (b @ x[:, :, None])[..., 0] + c, (a @ x[:, :, None])[..., 0]
        value = (x * bent).sum(1) / 2 + (height * phase.cos()).sum(1)
        return value, bent - ((height * phase.sin())[:, :, None] * b).sum(1)


@pytest.mark.parametrize("size", [1, 6])
def test_line_search_satisfies_the_strong_wolfe_conditions(size):
    count, c1, c2 = 200, 1e-4, 0.9
    lanes, theta = Waves(count, size, seed=size), 3 * draw(count, size, seed=7)
    value, gradient = lanes.value_and_grad(theta)
    noise = 0.3 * draw(count, size, seed=8) * gradient.norm(dim=1, keepdim=True) / size**0.5
    direction = noise - gradient
    uphill = (direction * gradient).sum(1) >= 0
    direction[uphill] = -gradient[uphill]
    slope = (direction * gradient).sum(1)

    def fails(step, at_step, slope_there):
        too_high = at_step > value + c1 * step * slope + 1e-13 * value.abs()
        return too_high | (slope_there.abs() > c2 * slope.abs() * (1 + 1e-9))

    for first in (1e-4, 1e-2, 1.0, 30.0):
        steps = torch.full((count,), first, dtype=F64)
        new, new_value, new_gradient, moved = strong_wolfe(
            lanes, theta, value, gradient, direction, steps, c1, c2
        )
        assert bool(moved.all()), first
        step = ((new - theta) * direction).sum(1) / (direction**2).sum(1)
        assert bool((step > 0).all()), first
        assert torch.allclose(theta + step[:, None] * direction, new, atol=1e-12), first
        again, gradient_again = lanes.value_and_grad(new)
        assert torch.allclose(again, new_value, rtol=1e-13), first
        assert torch.allclose(gradient_again, new_gradient, atol=1e-12), first
        assert not bool(fails(step, new_value, (new_gradient * direction).sum(1)).any()), first
        # negative control: the first step alone would not do
        tried, slopes = lanes.value_and_grad(theta + steps[:, None] * direction)
        assert bool(fails(steps, tried, (slopes * direction).sum(1)).any()), first


# ---- Many weightings at once ----


def weightings(pipeline, count=4):
    weights = torch.ones(count, len(pipeline.stages[0].data), dtype=F64)
    for lane in range(1, count):
        weights[lane, [3 * lane, lane]] = 0
    weights[-1] += 0.3 * draw(weights.shape[1])
    return weights


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["lbfgs", "sgd"])
def test_all_at_once_equals_one_by_one(name, link):
    """Three stages, from the trained weights and from the initial ones."""
    recipe, tolerance = {"lbfgs": (msif.LBFGS(), 1e-5), "sgd": (SGD, 1e-10)}[name]
    pipeline = unfitted(recipe, link=link, k=3).fit(progress=False)
    before, weights = states(pipeline), weightings(pipeline)
    for warm in (True, False):
        together = pipeline.retrain(weights, warm_start=warm, progress=False).parameters
        for lane in range(len(weights)):
            alone = pipeline.retrain(weights[lane], warm_start=warm, progress=False).parameters
            for stage in range(3):
                difference = largest(together[stage][lane] - alone[stage][0])
                assert difference <= tolerance, (warm, lane, stage)
        assert same(before, states(pipeline)), "the models must stay as they were"
        if name == "lbfgs" or not warm:  # weight one is the fit itself
            for stage, trained in enumerate(pipeline.trained()):
                assert largest(together[stage][0] - trained) <= tolerance, (warm, stage)
        # negative control: the weights matter
        assert largest(together[-1][1] - together[-1][0]) > 100 * tolerance, warm


def test_later_stages_have_weights_of_their_own():
    pipeline = unfitted(SGD).fit(progress=False)
    weights = torch.ones(2, 20, dtype=F64)
    weights[1, 4] = 0
    again = pipeline.retrain({"stage1": weights}, progress=False)
    assert torch.equal(again.parameters[0][0], again.parameters[0][1])
    assert not torch.equal(again.parameters[1][0], again.parameters[1][1])
    assert torch.equal(
        again.parameters[1], pipeline.retrain({-1: weights}, progress=False).parameters[1]
    )
    named = again.state("stage1", 1)
    fresh = copy.deepcopy(pipeline.stages[1].model)
    fresh.load_state_dict(named)
    assert torch.equal(flat(fresh), again.parameters[1][1])


def test_a_stage_given_weights_twice_is_refused():
    pipeline = unfitted(SGD).fit(progress=False)
    with pytest.raises(ValueError, match="stage0"):
        pipeline.retrain({0: torch.ones(24), "stage0": torch.zeros(24)}, progress=False)


def test_a_lane_does_not_depend_on_its_neighbours(digits):
    """Real digits from scratch: the optimum a lane reaches is that of its own weights alone."""
    data = digits[0].select(classes=(0, 1, 2, 3), n=200)
    stage = msif.Stage(
        "pretrain", msif.mlp(64, hidden=(8,), classes=4).double(), data, weight_decay=1e-2
    )
    pipeline = msif.Pipeline([stage]).fit(progress=False)
    weights = torch.ones(2, 200, dtype=F64)
    weights[0, 0] = weights[1, 80] = 0
    together = pipeline.retrain(weights, progress=False).parameters[0]
    alone = torch.cat([pipeline.retrain(w, progress=False).parameters[0] for w in weights])
    assert largest(together - alone) <= 1e-5


# ---- The pipeline around them ----


@pytest.mark.parametrize("recipe", [msif.LBFGS(), SGD], ids=["lbfgs", "sgd"])
def test_fitting_again_gives_the_same_weights(recipe):
    pipeline = unfitted(recipe, link="proximal").fit(progress=False)
    before = states(pipeline)
    assert same(before, states(pipeline.fit(progress=False)))


def test_adopt_takes_foreign_weights():
    fitted = random_pipeline(link=LINKS["frozen"])
    other = random_pipeline(link=LINKS["frozen"], fit=False)
    with pytest.raises(ValueError, match="not trained"):
        other.trained()
    for mine, theirs in zip(other.stages, fitted.stages, strict=True):
        mine.model.load_state_dict(theirs.model.state_dict())
    queries = random_queries(fitted)
    expected = implicit_scores(fitted, queries)
    assert torch.equal(implicit_scores(other.adopt(), queries), expected)
    with pytest.raises(ValueError, match="warm_start=True"):
        other.retrain(torch.ones(24), progress=False)
    again = other.retrain(torch.ones(24), warm_start=True, progress=False)
    assert largest(again.parameters[1][0] - fitted.trained()[1]) <= 1e-12


def dtypes(pipeline):
    inputs = {stage.data.x.dtype for stage in pipeline.stages}
    return inputs | {p.dtype for stage in pipeline.stages for p in stage.model.parameters()}


def test_to_and_double_move_everything():
    double = random_pipeline(link=LINKS["proximal"])
    single = random_pipeline(link=LINKS["proximal"], fit=False).to("cpu", torch.float32)
    assert dtypes(single) == {torch.float32}
    single.fit(progress=False)
    queries = random_queries(double)
    scores = implicit_scores(single, queries.to(torch.float32))
    assert scores.dtype == torch.float32
    assert relative_error(scores, implicit_scores(double, queries)) < 1e-3
    with pytest.raises(ValueError, match="float64"):
        single.evaluate(queries)
    weights = [f.double() for f in single.trained()]
    single.double()
    assert same(weights, single.trained()), "converted, not retrained"
    assert dtypes(single) == {F64}
    single.fit(progress=False)
    assert all(float(r.gradient_norm.max()) < 1e-12 for r in single.reports)
    again = single.retrain(torch.ones(24), progress=False)
    assert largest(again.parameters[1][0] - single.trained()[1]) < 1e-10


def test_a_moved_fit_is_not_repeated_as_if_it_were_the_same_run():
    """Trained in float32, moved to float64: a same-seed rerun would be another run than the fit."""
    pipeline = unfitted(msif.SGD(lr=0.1, epochs=40, batch_size=7)).to(torch.float32)
    pipeline.fit(progress=False).double()
    queries = random_queries(pipeline)
    base = pipeline.evaluate(queries)
    try:
        again = pipeline.retrain(torch.ones(24), progress=False).evaluate(queries)[:, 0]
    except ValueError as error:
        assert "fit()" in str(error)
    else:
        assert largest(again - base) < 1e-12
