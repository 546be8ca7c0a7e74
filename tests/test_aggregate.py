"""One row for a mean, a weighted sum or any function of all queries: the same as from their rows.

The oracles: the rows themselves, combined here; pipelines retrained as a whole, whose queries are
combined here; plain autograd.
"""

import dataclasses
import functools

import numpy
import pytest
import torch
from oracles import (
    F64,
    LINKS,
    close,
    digits_pipeline,
    draw,
    random_pipeline,
    random_queries,
    relative_error,
)
from torch.func import functional_call

import msif_lab as msif
from msif_lab import memory
from msif_lab.curvature import derivatives
from msif_lab.influence import AlphaSweep, baselines, implicit, unrolled
from msif_lab.objective import questions

Q = 12
RUN = msif.SGD(0.1, epochs=3, batch_size=8)
STEPS = (msif.TracIn, msif.UnrolledInfluence)  # these need a run, all others an optimum or nothing


def second_logit(outputs, targets):
    """A target of the reader's own."""
    return outputs[:, 1] * outputs[:, 0].cos()


TARGETS = {"loss": "loss", "margin": "margin", "own": second_logit}


def log_sum_exp(values):
    """Not additive: the worst queries count most."""
    return (3 * values).logsumexp(0)


def methods():
    """Every method by name, made anew: those for an optimum first, then those for a run."""
    exact = msif.ConjugateGradient(tol=1e-13, max_iter=500)
    found = {
        "implicit": msif.ImplicitInfluence(),
        "implicit, cg": msif.ImplicitInfluence(exact),
        "implicit, ggn": msif.ImplicitInfluence(curvature="ggn", damping=1e-3),
        "implicit, loo": msif.ImplicitInfluence(leave_one_out=True),
        "unrolled": msif.UnrolledInfluence(),
        "unrolled, groups": msif.UnrolledInfluence(group_fraction=0.3),
        "unrolled, loo": msif.UnrolledInfluence(leave_one_out=True, probes=4),
    }
    return found | msif.all_baselines() | {"single stage, cg": msif.SingleStage(exact)}


@pytest.fixture(scope="module", params=["one stage", "frozen", "proximal", "warm"])
def fitted(request):
    """By whether a run is needed: the fitted methods of one pipeline, and its queries."""
    link = (LINKS | {"warm": msif.WarmStart()}).get(request.param)
    k = 1 if link is None else 2
    run = random_pipeline(link=link, k=k, recipe=RUN)
    optimum = run if request.param == "warm" else random_pipeline(link=link, k=k)
    found = {}
    for name, method in methods().items():
        if request.param != "warm" or not isinstance(method, msif.ImplicitInfluence):
            found[name] = method.fit(run if isinstance(method, STEPS) else optimum)
    return found, random_queries(optimum, Q)


@pytest.mark.parametrize("target", TARGETS)
def test_one_row_is_the_combination_of_the_rows(fitted, target):
    found, queries = fitted
    signed = draw(Q, seed=3)
    for name, method in found.items():
        rows = method.score(queries, target=TARGETS[target])
        for aggregate, weights in (
            ("mean", torch.full((Q,), 1 / Q, dtype=F64)),
            (signed, signed),
        ):
            row = method.score(queries, target=TARGETS[target], aggregate=aggregate)
            close(row.values, weights[None] @ rows.values, 1e-10, (name, target))
        # the weights of other queries give other scores, but where all rows are alike
        if target == "loss" and name not in ("loss", "entropy", "margin", "gradient norm"):
            turned = method.score(queries, target=TARGETS[target], aggregate=signed.roll(1))
            assert relative_error(turned.values, row.values) > 1e-3, name
        assert row.query_ids.tolist() == [-1]
        assert (row.stage, row.method) == (rows.stage, rows.method)
        assert torch.equal(row.ids, rows.ids)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_function_of_all_queries_is_their_combination_by_its_derivatives(stage):
    """Every method, where the derivatives are those at the trained weights."""
    pipeline = random_pipeline(link=msif.Proximal(0.3), recipe=RUN)
    queries = random_queries(pipeline, Q)
    c = (3 * pipeline.evaluate(queries)).softmax(0) * 3
    for name, method in methods().items():
        if name.startswith("implicit") or name == "unrolled, groups":
            continue  # no optimum here; below
        if stage == 1 and name == "TracIn":
            continue  # derivatives at its checkpoints; below
        rows = method.fit(pipeline).score(queries, stage).values
        row = method.score(queries, stage, aggregate=log_sum_exp).values
        close(row, c[None] @ rows, 1e-10, name)


def test_the_sweep_over_alpha():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries, signed = random_queries(pipeline, Q), draw(Q, seed=3)
    rows = AlphaSweep(pipeline, queries).scores(0.7, damping=1e-3)
    row = AlphaSweep(pipeline, queries, aggregate=signed).scores(0.7, damping=1e-3)
    close(row.values, signed[None] @ rows.values)
    assert (row.target, row.query_ids.tolist()) == ("weighted loss", [-1])
    assert row.aggregate.startswith(f"weighted sum of {Q} queries #")


@pytest.mark.parametrize("solver", [None, msif.ConjugateGradient(tol=1e-10)])
def test_top_k(solver):
    pipeline = random_pipeline(link=msif.Frozen())
    queries = random_queries(pipeline, Q)
    attributor = msif.ImplicitInfluence(solver).fit(pipeline)
    top = attributor.score(queries, aggregate="mean", top=4)
    mean = attributor.score(queries).mean()
    assert (top.query_ids.tolist(), top.aggregate) == ([-1], mean.aggregate)
    assert torch.equal(top.harmful().ids, mean.harmful(4).ids)
    close(top.lowest.values, mean.helpful(4).values, 1e-8)


# ---- Functions of all queries, against pipelines retrained as a whole ----


def spread(values):
    return values.var() + values.mean() ** 2


def differences(pipeline, queries, combine, examples, h, target="loss", centre=1.0, **settings):
    """``∂A/∂w_i`` of some pretraining examples, by reruns with one weight moved, ``(E,)``."""
    m = len(pipeline.stages[0].data)
    weights = torch.full((2, len(examples), m), centre, dtype=F64)
    for lane, i in enumerate(examples):
        weights[:, lane, i] += torch.tensor([h, -h], dtype=F64)
    again = pipeline.retrain(weights.reshape(-1, m), progress=False, **settings)
    q = again.evaluate(queries, target)
    values = torch.stack([combine(column) for column in q.T])
    up, down = values.reshape(2, -1)
    return (up - down) / (2 * h)


@pytest.mark.parametrize("link", LINKS)
def test_implicit_against_retraining(link):
    pipeline = random_pipeline(link=LINKS[link])
    queries, some = random_queries(pipeline, Q), [0, 5, 11, 23]
    attributor = msif.ImplicitInfluence().fit(pipeline)
    for combine in (log_sum_exp, spread):
        row = attributor.score(queries, aggregate=combine).values[0, some]
        expected = differences(pipeline, queries, combine, some, 1e-3, warm_start=True)
        assert relative_error(row, expected) < 1e-4


@pytest.mark.parametrize("link", LINKS | {"warm": msif.WarmStart()})
def test_unrolled_against_reruns(link):
    pipeline = random_pipeline(link=(LINKS | {"warm": msif.WarmStart()})[link], recipe=RUN)
    queries, some = random_queries(pipeline, Q), [0, 5, 11, 23]
    attributor = msif.UnrolledInfluence().fit(pipeline)
    for combine in (log_sum_exp, spread):
        row = attributor.score(queries, aggregate=combine).values[0, some]
        expected = differences(pipeline, queries, combine, some, 1e-4)
        assert relative_error(row, expected) < 1e-6


def test_unrolled_for_groups_takes_the_derivatives_where_it_differentiates(monkeypatch):
    """At the run with weights 1 − p, not at the trained weights; and the level is right."""
    p, pipeline = 0.4, random_pipeline(link=msif.Proximal(0.3), recipe=RUN)
    queries, every = random_queries(pipeline, Q), range(24)
    row = msif.UnrolledInfluence(group_fraction=p).fit(pipeline).score(queries, aggregate=spread)
    slopes = differences(pipeline, queries, spread, every, 1e-4, centre=1 - p)
    assert relative_error(row.values[0] - row.values.mean(), slopes - slopes.mean()) < 1e-6
    there = pipeline.retrain(torch.full((24,), 1 - p, dtype=F64), progress=False).evaluate(queries)[
        :, 0
    ]
    moved = spread(there) - spread(pipeline.evaluate(queries))
    close(-p * row.values.sum(), moved)

    at_the_end = questions.Question.weights  # planted: the derivatives at the trained weights
    full = pipeline.trained()[-1]
    monkeypatch.setattr(questions.Question, "weights", lambda q, o, _: at_the_end(q, o, full))
    row = msif.UnrolledInfluence(group_fraction=p).fit(pipeline).score(queries, aggregate=spread)
    assert relative_error(row.values[0] - row.values.mean(), slopes - slopes.mean()) > 1e-3


def test_tracin_takes_the_derivatives_at_each_checkpoint():
    pipeline = random_pipeline(k=1, recipe=RUN)
    queries, stage = random_queries(pipeline, Q), pipeline.stages[0]
    method = msif.TracIn(checkpoints=3).fit(pipeline)
    shapes = {name: p.shape for name, p in stage.model.named_parameters()}

    def gradient(full, value):
        leaf = full.clone().requires_grad_()
        parts = leaf.split([shape.numel() for shape in shapes.values()])
        named = {n: t.view(shapes[n]) for n, t in zip(shapes, parts, strict=True)}
        return torch.autograd.grad(value(named), leaf)[0]

    def losses(named, x, y):
        return msif.cross_entropy(functional_call(stage.model, named, (x,)), y)

    expected = torch.zeros(len(stage.data), dtype=F64)
    for full, rate in method._states[0]:
        own = gradient(full, lambda named: spread(losses(named, queries.x, queries.y)))
        for i, (x, y) in enumerate(zip(stage.data.x, stage.data.y, strict=True)):
            f = gradient(full, lambda named, x=x, y=y: losses(named, x[None], y[None])[0])
            expected[i] -= rate * (own @ f) / len(stage.data)
    close(method.score(queries, aggregate=spread).values[0], expected)


# ---- Several numbers for each query ----


def probabilities(outputs, targets):
    return outputs.softmax(-1)


def class_calibration(labels):
    """Squared gaps between probabilities and outcomes, in soft bins of every class's probability.

    Zero where among the queries that get the probability p of a class the share p is of it.
    """
    outcomes = torch.nn.functional.one_hot(labels).double()

    def calibration(p):  # (Q, C)
        centres = torch.linspace(0.1, 0.9, 5, dtype=p.dtype)
        bins = torch.softmax(-(((p[..., None] - centres) / 0.2) ** 2), -1)
        return ((bins * (p - outcomes)[..., None]).mean(0) ** 2).sum()

    return calibration


def test_several_numbers_for_each_query():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries, some = random_queries(pipeline, 30), [0, 5, 11, 23]
    asked = {"target": probabilities, "aggregate": class_calibration(queries.y)}
    row = msif.ImplicitInfluence().fit(pipeline).score(queries, **asked)
    assert row.target == "calibration of probabilities"
    logits = pipeline.stages[-1].model(queries.x).detach()
    close(pipeline.evaluate(queries, **asked), asked["aggregate"](logits.softmax(-1))[None])

    weights = torch.ones(2, len(some), 24, dtype=F64)
    for lane, i in enumerate(some):
        weights[:, lane, i] += torch.tensor([1e-3, -1e-3], dtype=F64)
    again = pipeline.retrain(weights.reshape(-1, 24), warm_start=True, progress=False)
    up, down = again.evaluate(queries, **asked)[0].reshape(2, -1)
    assert relative_error(row.values[0, some], (up - down) / 2e-3) < 1e-4

    for method in msif.all_baselines().values():
        if not isinstance(method, msif.TracIn) and not getattr(method, "cosine", False):
            assert method.fit(pipeline).score(queries, **asked).values.shape == (1, 24)
    with pytest.raises(ValueError, match="one number for each query"):
        msif.GradientDot(cosine=True).fit(pipeline).score(queries, **asked)
    with pytest.raises(ValueError, match=r"gives \(\d, 2\), expected a tensor \(B,\)"):
        msif.GradientDot().fit(pipeline).score(queries, target=probabilities, aggregate="mean")


# ---- Against real removal ----


def group_gap(queries):
    """Mean loss of the first half of the classes minus that of the others, as weights."""
    first = queries.y < len(queries.classes) // 2
    return first / first.sum() - ~first / (~first).sum()


def test_a_fairness_gap_and_a_calibration_error_are_checked_by_removal(digits, digits_pair):
    pipeline = digits_pair["proximal"]
    queries = digits[1].select(classes=range(4, 10), n=200)
    removed = msif.random_removals(400, 20, seed=1)
    attributor = msif.ImplicitInfluence().fit(pipeline)
    mean = attributor.score(queries, aggregate="mean")
    for asked in (
        {"aggregate": group_gap(queries)},
        {"target": probabilities, "aggregate": class_calibration(queries.y)},
    ):
        effects = msif.removal_effects(pipeline, queries, removed, progress=False, **asked)
        scores = attributor.score(queries, **asked)
        report = msif.agreement(scores, effects)
        assert report.mean() > 0.95
        assert 0.7 < report.mean("slope") < 1.4
        other = dataclasses.replace(scores, values=mean.values)  # the wrong question: the mean loss
        assert msif.agreement(other, effects).mean() < 0.95


def test_unrolled_on_a_gap_is_checked_by_removal(digits):
    recipe = msif.SGD(0.1, epochs=3, batch_size=50)
    pipeline = digits_pipeline(digits, msif.WarmStart(), recipe=recipe).fit(progress=False)
    queries = digits[1].select(classes=range(4, 10), n=200)
    asked = {"aggregate": group_gap(queries)}
    effects = msif.removal_effects(
        pipeline, queries, msif.random_removals(400, 20, seed=1), progress=False, **asked
    )
    scores = msif.UnrolledInfluence().fit(pipeline, progress=False).score(queries, **asked)
    assert msif.agreement(scores, effects).mean() > 0.95


# ---- The price, counted ----


def count(monkeypatch, module, name, of):
    """The sizes ``of(arguments)`` of the calls of a function of a module, as they come."""
    sizes, plain = [], getattr(module, name)

    @functools.wraps(plain)
    def counting(*args, **settings):
        sizes.append(of(*args))
        return plain(*args, **settings)

    monkeypatch.setattr(module, name, counting)
    return sizes


def test_one_column_is_solved_and_one_adjoint_is_swept(monkeypatch):
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline, 40)
    attributor = msif.ImplicitInfluence(msif.ConjugateGradient()).fit(pipeline)
    solved = [count(monkeypatch, p, "solve", lambda right: right.shape[1])
              for p in attributor._prepared]  # fmt: skip
    scored = count(monkeypatch, implicit, "example_products", lambda o, full, v: v.shape[1])
    attributor.score(queries, aggregate=log_sum_exp)
    assert (solved, scored) == ([[1], [1]], [1])
    products = {name: report.products for name, report in attributor.report_.items()}
    attributor.score(queries[:1])
    assert all(products[n] <= 1.5 * r.products for n, r in attributor.report_.items())

    run = random_pipeline(link=msif.Proximal(0.3), recipe=RUN)
    method = msif.UnrolledInfluence().fit(run)
    swept = count(monkeypatch, unrolled, "Adjoint", lambda functional, run, rows: len(rows))
    method.score(queries, aggregate="mean")
    assert swept == [1, 1]
    assert method.plan_.part == 1

    scored = count(monkeypatch, baselines, "example_products", lambda o, full, v: v.shape[1])
    for baseline in (msif.GradientDot(), msif.SingleStage(), msif.TracIn(checkpoints=2)):
        baseline.fit(run).score(queries, aggregate="mean")
    assert set(scored) == {1}


def test_no_gradient_of_a_single_query_is_formed(monkeypatch):
    """Nor are all queries held: in chunks of one query the numbers are the same."""
    pipeline = random_pipeline(link=msif.Frozen())
    queries, plain = random_queries(pipeline, 40), derivatives.per_example_gradients
    methods = [msif.ImplicitInfluence(), msif.GradientDot(), msif.SingleStage()]
    expected = [m.fit(pipeline).score(queries, aggregate=log_sum_exp).values for m in methods]

    def watched(o, full, examples=None, *rest, **settings):
        assert examples is not queries, "formed"
        return plain(o, full, examples, *rest, **settings)

    monkeypatch.setattr(derivatives, "per_example_gradients", watched)
    monkeypatch.setattr(memory, "WORKING_BYTES", 1)
    for method, values in zip(methods, expected, strict=True):
        close(method.score(queries, aggregate=log_sum_exp).values, values)
    with pytest.raises(AssertionError, match="formed"):
        msif.GradientDot().fit(pipeline).score(queries)


# ---- Results ----


@pytest.fixture(scope="module")
def pair():
    """A fitted two-stage pipeline and its queries."""
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    return pipeline, random_queries(pipeline, Q)


def test_names_signs_and_units(pair):
    pipeline, queries = pair
    method = msif.GradientDot().fit(pipeline)
    positive, mixed = torch.arange(Q) + 1.0, draw(Q)

    def asked(**settings):
        found = method.score(queries, **settings)
        return found.target, found.unit, found.harm_sign

    assert asked(aggregate="mean") == ("loss", "nats", 1)
    assert asked(aggregate="mean", target="margin") == ("margin", "log-odds", -1)
    assert asked(aggregate=positive, target="margin") == ("margin", "log-odds", -1)
    assert asked(aggregate=mixed, target="margin") == ("weighted margin", "log-odds", 1)
    assert asked(aggregate=mixed) == ("weighted loss", "nats", 1)
    assert asked(aggregate=spread) == ("spread of loss", "units of q", 1)
    assert asked(aggregate=lambda v: v.max()) == ("<lambda> of loss", "units of q", 1)
    row = method.score(queries, aggregate="mean")
    assert repr(row).startswith(f"Influence(mean of {Q} queries #")
    assert f"mean of {Q} queries #" in row._repr_html_()
    assert "; effect on loss" in row._repr_html_()
    assert torch.equal(row.mean().values, row.values)
    assert row.mean().aggregate == row.aggregate
    assert row.to_frame()["query_id"].unique().tolist() == [-1]


def test_the_mean_of_the_rows_says_what_it_is(pair):
    pipeline, queries = pair
    method = msif.ImplicitInfluence().fit(pipeline)
    mean, row = method.score(queries).mean(), method.score(queries, aggregate="mean")
    close(row.values, mean.values)
    for name in ("stage", "target", "method", "aggregate"):
        assert getattr(mean, name) == getattr(row, name)
    assert mean.aggregate != method.score(queries[1:]).mean().aggregate


def test_saved_and_loaded(pair, tmp_path):
    pipeline, queries = pair
    row = msif.GradientDot().fit(pipeline).score(queries, aggregate=draw(Q))
    row.save(tmp_path / "row")
    again = msif.Influence.load(tmp_path / "row")
    assert torch.equal(again.values, row.values)
    assert (again.target, again.aggregate) == (row.target, row.aggregate)
    effects = msif.removal_effects(pipeline, queries, [[0], [1]], aggregate=draw(Q), progress=False)
    effects.save(tmp_path / "effects")
    assert msif.Effects.load(tmp_path / "effects").aggregate == effects.aggregate == row.aggregate
    assert repr(effects).startswith(f"Effects(weighted sum of {Q} queries #")


def test_effects_are_of_the_same_aggregate(pair, tmp_path):
    pipeline, queries = pair
    subsets, weights = [[0], [3], [5, 7]], draw(Q)
    effects = functools.partial(msif.removal_effects, pipeline, progress=False)
    each = effects(queries, subsets)
    store = tmp_path / "store"
    row = effects(queries, subsets, aggregate=weights.tolist(), n_jobs=2, lanes=2, store=store)
    close(row.values, weights[None] @ each.values, 1e-7)  # other lanes, to the recipe's tolerance
    close(row.base, weights[None] @ each.base)
    assert (row.target, row.query_ids.tolist()) == ("weighted loss", [-1])
    same = effects(queries, subsets, aggregate=weights.numpy(), store=store)
    assert torch.equal(same.values, row.values)
    with pytest.raises(msif.SavedFileError, match="other aggregate"):
        effects(queries, subsets, aggregate=-weights, store=store)

    worst = effects(queries, subsets, aggregate=log_sum_exp)
    after = each.base[:, None] + each.values
    expected = torch.stack([log_sum_exp(q) for q in after.T]) - log_sum_exp(each.base)
    close(worst.values[0], expected, 1e-9)

    method = msif.ImplicitInfluence(leave_one_out=True).fit(pipeline)
    assert msif.agreement(method.score(queries, aggregate=weights), row).r.shape == (1,)
    mean = effects(queries, subsets, aggregate="mean")
    msif.agreement(method.score(queries).mean(), mean)
    for scores in (
        method.score(queries),
        method.score(queries[1:]).mean(),
        method.score(queries, aggregate=-weights),
        method.score(queries, aggregate=log_sum_exp),
    ):
        with pytest.raises(ValueError, match="scores and effects are of different queries"):
            msif.agreement(scores, row if scores.aggregate.startswith("w") else mean)


def test_accuracy_is_measured_by_removal(pair):
    pipeline, queries = pair
    asked = {"target": lambda z, y: (z.argmax(-1) == y).to(z.dtype), "aggregate": "mean"}
    effects = msif.removal_effects(pipeline, queries, [[0], [3, 5]], progress=False, **asked)
    right = pipeline.stages[-1].model(queries.x).argmax(1) == queries.y
    close(effects.base, right.double().mean()[None])
    steps = effects.values * Q
    close(steps, steps.round(), 1e-12)


def test_evaluate(pair):
    pipeline, queries = pair
    each = pipeline.evaluate(queries)
    close(pipeline.evaluate(queries, aggregate="mean"), each.mean()[None])
    close(pipeline.evaluate(queries, aggregate="sum"), each.sum()[None])
    weights = torch.ones(3, 24)
    weights[0, 2] = weights[1, 4] = 0
    again = pipeline.retrain(weights, warm_start=True, progress=False)
    each = again.evaluate(queries)
    close(again.evaluate(queries, aggregate=spread), torch.stack([spread(q) for q in each.T])[None])
    close(again.evaluate(queries, aggregate=[1.0] + [0.0] * (Q - 1)), each[:1])


# ---- Refusals ----

SCORE = "margin | removal_effects"
NOT_SMOOTH = {
    "accuracy": "target='accuracy' | step function | z.argmax(-1) == y | " + SCORE,
    "error": "target='error' | step function | z.argmax(-1) != y | " + SCORE,
}
STEPS_OF_OUTPUTS = {
    "argmax": lambda z, y: (z.argmax(-1) == y).to(z.dtype),
    "round": lambda z, y: z.softmax(-1)[:, 0].round(),
    "detach": lambda z, y: z.detach()[:, 0],
    "sign": lambda z, y: (z[:, 0] - z[:, 1]).sign(),
}
STEPS_OF_VALUES = {
    "count": lambda v: (v > 0.5).double().mean(),
    "round": lambda v: (10 * v).round().mean() + 0 * v.mean(),
    "numpy": lambda v: torch.tensor(numpy.median(v.numpy())),
}
WRONG = [
    ("median", "aggregate='median' | ('mean', 'sum') | (12,) | a function"),
    (torch.ones(5), "has shape (5,) | one weight per query, (12,)"),
    (torch.ones(12, 1), "has shape (12, 1) | (12,)"),
    (0.5, "has shape () | (12,)"),
    ([1.0] * 11 + [float("nan")], "aggregate holds nan as the weight of query 11 | finite"),
    (numpy.zeros(12), "aggregate holds only zeros | 'mean'"),
    ({"a": 1}, "aggregate={'a': 1} holds no numbers | 'mean'"),
    (lambda v: v, "gives (12,) torch.float64 | one floating number | .mean()"),
    (lambda v: float(v.mean()), "gives float | a tensor of one floating number"),
    (lambda v: v.argmax(), "torch.int64 | one floating number"),
    (lambda v: v.nosuch(), "fails on the values (12,) | AttributeError"),
    (lambda v: (v.min() - 99).log(), "gives nan at the present weights"),
    (lambda v: v.mean() + torch.rand(()).double(), "draws from | fixed function"),
]


def refuses(work, says):
    with pytest.raises((ValueError, TypeError)) as caught:
        work()
    missing = [piece for piece in says.split(" | ") if piece not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"


@pytest.mark.parametrize(("aggregate", "says"), WRONG, ids=[says[:40] for _, says in WRONG])
def test_a_wrong_aggregate_is_refused_everywhere(pair, aggregate, says):
    pipeline, queries = pair
    asked = {"aggregate": aggregate}
    refuses(lambda: msif.ImplicitInfluence().fit(pipeline).score(queries, **asked), says)
    refuses(lambda: msif.Loss().fit(pipeline).score(queries, **asked), says)
    refuses(lambda: AlphaSweep(pipeline, queries, **asked), says)
    refuses(lambda: pipeline.evaluate(queries, **asked), says)
    refuses(lambda: msif.removal_effects(pipeline, queries, [[0]], **asked), says)


def test_steps_are_refused_by_scores_with_advice(pair):
    pipeline, queries = pair
    methods = [msif.ImplicitInfluence(), msif.GradientDot(), msif.Loss()]
    for score in [m.fit(pipeline).score for m in methods]:
        for target, says in NOT_SMOOTH.items():
            refuses(lambda s=score, t=target: s(queries, target=t), says)
        for step in STEPS_OF_OUTPUTS.values():
            says = "target(outputs, targets) has no derivative | " + SCORE
            refuses(lambda s=score, t=step: s(queries, target=t), says)
        for step in STEPS_OF_VALUES.values():
            says = "(values) has no derivative | " + SCORE
            refuses(lambda s=score, a=step: s(queries, aggregate=a), says)
        root = "has the derivative inf in values | smooth"  # at the smallest of all, which is 0
        smallest = "aggregate=root(values) " + root

        def root(v):
            return (v - v.detach().min()).sqrt().mean()

        if not isinstance(score.__self__, msif.Loss):
            refuses(lambda s=score, a=root: s(queries, aggregate=a), smallest)
    for target, says in NOT_SMOOTH.items():
        refuses(lambda t=target: pipeline.evaluate(queries, t), says)


def test_a_flat_part_of_a_loss_is_no_step(pair):
    """A hinge that all queries satisfy has the derivative zero, and so have all scores."""
    pipeline, queries = pair

    def hinge(z, y):
        return (z.amax(-1) - z.gather(1, y[:, None])[:, 0] - 50).relu()

    def over(values):
        return (values.mean() - 50).relu()

    method = msif.ImplicitInfluence().fit(pipeline)
    for asked in ({"target": hinge}, {"target": hinge, "aggregate": "mean"}, {"aggregate": over}):
        assert not method.score(queries, **asked).values.any()
    assert not questions.is_step(hinge, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    assert questions.is_step(torch.round, torch.zeros(3))
