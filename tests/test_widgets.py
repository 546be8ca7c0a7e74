"""Explorers without a browser: controls are set, buttons clicked, and what is shown is read."""

import re
import sys
import time

import matplotlib.pyplot as plt
import pytest
import torch
from oracles import random_pipeline, random_queries

import msif_lab as msif
from msif_lab import experiments, widgets
from msif_lab.widgets import background

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cases():
    """Two small pipelines on 4 × 4 images."""
    return {
        "frozen": random_pipeline(link=msif.Frozen()),
        "full": random_pipeline(link=msif.Proximal(0.3)),
    }


@pytest.fixture(scope="module")
def queries(cases):
    return random_queries(cases["full"], n=12)


@pytest.fixture(scope="module")
def scores(cases, queries):
    """By case, then by method; of both stages where the method has them."""
    table = {}
    for case, pipeline in cases.items():
        implicit = msif.ImplicitInfluence().fit(pipeline)
        table[case] = {
            "implicit": [implicit.score(queries, stage=k) for k in (0, 1)],
            "gradient": msif.GradientDot().fit(pipeline).score(queries),
        }
    return table


@pytest.fixture
def explorer(cases, scores, queries):
    made = widgets.InfluenceExplorer(cases, scores, queries, k=3)
    assert made.widget is made.widget
    return made


def photograph(pipeline):
    """Name, identity and a copy of the values of every parameter of the models."""
    return [
        (name, id(parameter), parameter.detach().clone())
        for stage in pipeline.stages
        for name, parameter in stage.model.named_parameters()
    ]


def same(before, after):
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True)
    )


def signed(value, digits):
    """A number as explorers write it, with its sign and a real minus."""
    return f"{float(value):+.{digits}}".replace("-", "−")


def complaint(explorer):
    return "".join(out["text"] for out in explorer.error.outputs)


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def all_images_have_alt(widget):
    """Every <img> in the tree says what it shows; returns how many there are."""
    texts = [part.value for part in walk(widget) if isinstance(getattr(part, "value", None), str)]
    pictures = [picture for text in texts for picture in re.findall(r"<img[^>]*>", text)]
    assert all(re.search(r'alt="[^"]{5,}"', picture) for picture in pictures)
    return len(pictures)


def with_an_example(explorer):
    """The explorer with its widget built and an example chosen, ready to retrain."""
    assert explorer.widget is explorer.widget and complaint(explorer) == ""
    explorer.rows[0].buttons[0].click()
    return explorer


def run_code(explorer, **known):
    """The variables after the code of the view ran with only what the explorer was given."""
    space = dict(known)
    exec(explorer.code(), space)
    return space


# ---- InfluenceExplorer ----


def test_influence_shows_the_ranking(explorer, cases, scores):
    one, data = scores["frozen"]["implicit"][0], cases["frozen"].stages[0].data
    explorer.query_control.value = 7
    for row, ranking in zip(explorer.rows, (one.helpful(3), one.harmful(3)), strict=True):
        assert row.places == ranking.positions[7].tolist()
        labels = [data.classes[y] for y in data.y[row.places].tolist()]
        ids = data.ids[row.places].tolist()
        shown = re.findall(r"id (\d+), label (\d+)", row.pictures.value)
        assert shown == [(str(i), str(label)) for i, label in zip(ids, labels, strict=True)]
        for place, value, button in zip(
            row.places, ranking.values[7].tolist(), row.buttons, strict=True
        ):
            assert signed(1e3 * value, "2f") in row.pictures.value
            assert button.description == f"id {int(one.ids[place])}"
    assert "Most helpful" in explorer.titles[0].value and "lower" in explorer.titles[0].value
    assert "Most harmful" in explorer.titles[1].value and "raise" in explorer.titles[1].value
    assert "query 7" in explorer.view.value and complaint(explorer) == ""
    assert all_images_have_alt(explorer.widget) >= 7


def test_influence_picks_by_group_and_by_picture(explorer, cases, queries):
    missed = cases["frozen"].evaluate(queries, lambda z, y: (z.argmax(1) != y).double())
    wrong = missed.nonzero().flatten().tolist()
    offered = {value: text for text, value in explorer.queries_control.options}
    if wrong:
        assert offered["misclassified"] == f"misclassified ({len(wrong)})"
        explorer.queries_control.value = "misclassified"
        assert [value for _, value in explorer.query_control.options] == wrong
        assert explorer.query_control.value == wrong[0] == explorer.query
        assert "(wrong)" in explorer.view.value
    else:
        assert "misclassified" not in offered
    explorer.queries_control.value = "label 1"
    ones = (queries.y == 1).nonzero().flatten().tolist()
    assert [value for _, value in explorer.query_control.options] == ones
    explorer.film.buttons[1].click()
    assert explorer.query == explorer.query_control.value == explorer.film.places[1] == ones[1]
    assert explorer.film.buttons[1].description == f"query {ones[1]} ✓"


def test_influence_switches_case_method_and_stage(explorer, scores, queries):
    explorer.case_control.value = "full"
    assert explorer.scores is scores["full"]["implicit"][0]
    explorer.stage_control.value = 1
    assert explorer.scores is scores["full"]["implicit"][1]
    explorer.rows[0].buttons[0].click()
    assert explorer.example is not None
    explorer.method_control.value = "gradient"  # of the first stage only
    assert explorer.scores is scores["full"]["gradient"]
    assert explorer.example is None, "it was an example of the other stage"
    assert [value for _, value in explorer.stage_control.options] == [0]
    ranking = scores["full"]["gradient"].helpful(3)
    assert explorer.rows[0].places == ranking.positions[explorer.query].tolist()


def test_influence_removes_for_real(explorer, cases, scores, queries):
    before = {case: photograph(pipeline) for case, pipeline in cases.items()}
    assert explorer.retrain.disabled and explorer.stop.disabled
    explorer.rows[1].buttons[0].click()
    assert not explorer.retrain.disabled
    assert "not retrained yet" in explorer.answer.value
    assert 'alt="Change of 12 queries' in explorer.plot.value
    explorer.retrain.click()
    assert explorer.job.wait(60)
    expected = msif.removal_effects(cases["frozen"], queries, [[explorer.example]]).values[:, 0]
    assert torch.equal(explorer.actual, expected)
    assert "done in" in explorer.status.value and 'role="status"' in explorer.status.value
    assert signed(expected.mean(), "5f") in explorer.answer.value
    assert "actual" in explorer.plot.value and complaint(explorer) == ""
    assert explorer.stop.disabled and not explorer.retrain.disabled
    assert all(same(before[case], photograph(pipeline)) for case, pipeline in cases.items())
    explorer.rows[0].buttons[0].click()
    assert explorer.actual is None and "not retrained yet" in explorer.answer.value
    explorer.rows[1].buttons[0].click()
    assert torch.equal(explorer.actual, expected), "an answer is kept"


def test_influence_as_code(explorer, cases, scores, queries):
    known = {"pipeline": cases, "scores": scores, "queries": queries}
    explorer.case_control.value = "full"
    explorer.query_control.value = 3
    space = run_code(explorer, **known)
    assert space["view"] is explorer.scores and "predicted" not in space
    assert len(space["figure"].axes) == 8
    explorer.rows[0].buttons[1].click()
    explorer.retrain.click()
    assert explorer.job.wait(60)
    space = run_code(explorer, **known)
    assert torch.equal(space["actual"], explorer.actual)
    assert torch.equal(space["predicted"], explorer.scores.removal_effect([explorer.example]))
    named = {getattr(w, "description", ""): w for w in walk(explorer.widget)}
    text, expected = named["Code of this view (select all, copy)"], explorer.code()
    assert text.layout.display == "none"
    named["Copy as code"].click()
    assert text.layout.display is None and text.value == expected
    explorer.query_control.value = 5
    assert "query=5" in text.value


def test_influence_picks_from_code(explorer, cases, scores, queries):
    explorer.queries_control.value = "label 1"
    assert explorer.pick(query=3, example=7, case="full") is explorer
    assert explorer.query_control.value == 3 and explorer.case_control.value == "full"
    assert explorer.queries_control.value == "all"
    assert "not retrained yet" in explorer.answer.value
    plain = widgets.InfluenceExplorer(cases, scores, queries, k=3).pick(example=7)
    assert "removal_effect([7])" in plain.code() and "widget" not in vars(plain)
    for wrong, says in (
        ({"query": 12}, "query=12.*between 0 and 11"),
        ({"example": -1}, "example=-1"),
        ({"case": ""}, "case=''"),
    ):
        with pytest.raises(ValueError, match=says):
            explorer.pick(**wrong)


# ---- AlphaDampingExplorer ----


@pytest.fixture(scope="module")
def effects(cases, queries):
    return msif.removal_effects(cases["full"], queries, [[i] for i in range(8)], progress=False)


@pytest.fixture
def damping(cases, queries, effects):
    made = widgets.AlphaDampingExplorer(cases["full"], queries, effects=effects, k=3)
    assert made.widget is made.widget and complaint(made) == ""
    return made


def test_damping_starts_at_the_exact_scores(damping, scores):
    exact = scores["full"]["implicit"][0]
    assert torch.allclose(damping.scores.values, exact.values, rtol=1e-9, atol=1e-12)
    best = exact.harmful(3)
    for value in best.values[0].tolist():
        assert signed(1e3 * value, "2f") in damping.view.value
    assert "its own" in damping.answer.value and all_images_have_alt(damping.widget) == 8


def test_damping_sliders_change_order_filter_and_agreement(damping, effects):
    def shown():
        return damping.view.value, damping.plot.value, damping.answer.value

    first = shown()
    damping.alpha_control.value = float("inf")
    assert torch.equal(damping.scores.values, damping.frozen.values)
    assert "∞, frozen" in damping.answer.value and "0 of" in damping.plot.value
    found = damping.agreements(damping.scores)
    assert found["Spearman with α = ∞ (frozen)"] == pytest.approx(1)
    assert found["Pearson r with real removals"] == pytest.approx(
        msif.agreement(damping.scores, effects).mean()
    )
    damping.damping_control.value = damping.dampings[-1]
    assert damping.scores.values.abs().max() < damping.frozen.values.abs().max()
    damping.query_control.value = 5
    assert "query 5" in damping.view.value
    assert all(before != now for before, now in zip(first, shown(), strict=True))
    assert complaint(damping) == ""


def test_damping_as_code_and_static(damping, cases, queries, effects):
    damping.alpha_control.value = damping.alphas[3]
    damping.damping_control.value = damping.dampings[10]
    space = run_code(damping, pipeline=cases["full"], queries=queries, effects=effects)
    assert torch.allclose(space["view"].values, damping.scores.values)
    r = damping.agreements(damping.scores)["Pearson r with real removals"]
    assert space["report"].mean() == pytest.approx(r)
    (figure,) = damping.static()
    curves = figure.axes[0].lines
    assert len(curves) >= 3 and len(figure.axes[1].lines) == 4
    assert {WIDGET, "image/png", "text/plain"} <= set(damping._repr_mimebundle_())


def test_damping_below_the_floor_is_not_offered(damping):
    assert damping.alphas[0] > damping.sweep.floor
    assert min(damping.sweep.filter(damping.alphas[0])) > 0


def test_damping_says_what_is_wrong(cases, queries, effects):
    make = widgets.AlphaDampingExplorer
    with pytest.raises(ValueError, match="Proximal"):
        make(cases["frozen"], queries)
    with pytest.raises(TypeError, match=r"cases \['frozen', 'full'\]"):
        make(cases, queries)
    with pytest.raises(ValueError, match="different queries"):
        make(cases["full"], queries[[0, 1]], effects=effects)
    with pytest.raises(ValueError, match="k=0"):
        make(cases["full"], queries, k=0)


# ---- MethodComparison ----


@pytest.fixture
def methods(cases, queries, scores):
    table = {
        "implicit": scores["full"]["implicit"][0],
        "gradient": scores["full"]["gradient"],
        "loss": msif.Loss().fit(cases["full"]).score(queries),
    }
    made = widgets.MethodComparison(cases["full"], table, queries, k=3)
    made.table_given = table
    assert made.widget is made.widget and complaint(made) == ""
    return made


def test_methods_links_pictures_scores_and_places(methods):
    a, b = methods.table["implicit"], methods.table["gradient"]
    assert methods.rows[0].places == a.harmful(3).positions[0].tolist()
    assert methods.rows[1].places == b.harmful(3).positions[0].tolist()
    assert methods.example == methods.rows[0].places[0] and methods.rank_control.value == 1
    before = methods.plot.value
    methods.rows[1].buttons[2].click()
    chosen = methods.rows[1].places[2]
    assert methods.example == chosen and methods.plot.value != before
    rank = int((a.values[0] > a.values[0, chosen]).sum()) + 1
    assert methods.rank_control.value == rank and f"{rank} of 24" in methods.answer.value
    assert "3 of 24" in methods.answer.value
    assert signed(b.values[0, chosen], "2e") in methods.answer.value
    methods.rank_control.value = 24
    assert methods.example == int(a.values[0].argmin())
    assert "helpful" in methods.answer.value
    assert all_images_have_alt(methods.widget) == 12


def test_methods_switch_by_dropdown(methods):
    methods.b_control.value = "loss"
    methods.query_control.value = 4
    assert "B: loss" in methods.titles[1].value
    assert methods.rows[1].places == methods.table["loss"].harmful(3).positions[4].tolist()
    methods.b_control.value = "implicit"
    assert "Spearman of A and B: +1.00 for this query, +1.00 on average" in methods.view.value


def test_methods_as_code_and_static(methods, cases, queries):
    methods.query_control.value = 2
    methods.rank_control.value = 5
    space = run_code(methods, pipeline=cases["full"], queries=queries, scores=methods.table_given)
    a, b = methods.table["implicit"], methods.table["gradient"]
    assert space["pair"] == (a.values[2, methods.example], b.values[2, methods.example])
    assert torch.allclose(torch.from_numpy(space["correlation"]), methods.correlation())
    assert len(methods.static([0, 1, 2])) == 3
    assert {WIDGET, "image/png", "text/plain"} <= set(methods._repr_mimebundle_())


def test_methods_says_what_is_wrong(cases, queries, scores):
    one, other = scores["full"]["implicit"]
    make = widgets.MethodComparison
    for table, says in (
        ({"a": one}, "two or more"),
        ([one, one], "two or more"),
        ({"a": one, "b": other}, "different stages"),
        ({"a": one, "b": one[:3]}, r"scores\['b'\] is \(3, 24\)"),
    ):
        with pytest.raises(ValueError, match=says):
            make(cases["full"], table, queries)


# ---- SeedExplorer ----


@pytest.fixture(scope="module")
def seed_runs():
    small = {"pretraining": 40, "finetuning": 40, "queries": 6, "epochs": (2, 2)}

    def build(seed):
        return experiments.digits(msif.WarmStart(), seed=seed, **small).pipeline

    runs = msif.over_seeds(build, 5, progress=False)
    queries = experiments.digits(msif.WarmStart(), **small).queries
    averaged = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
    return runs, averaged.score(queries, progress=False), queries


@pytest.fixture
def by_seeds(seed_runs):
    made = widgets.SeedExplorer(*seed_runs, k=3)
    assert made.widget is made.widget and complaint(made) == ""
    return made


def test_seeds_show_the_average_of_the_first(by_seeds, seed_runs):
    scores = seed_runs[1]
    assert by_seeds.seeds_control.value == by_seeds.seeds_control.max == 5
    before = by_seeds.plot.value
    by_seeds.query_control.value, by_seeds.seeds_control.value = 2, 3
    assert by_seeds.plot.value != before and "Average of 3 of 5 seeds" in by_seeds.answer.value
    some = scores.some(range(3))
    first = int(some.values[2].argmin())
    ids = re.findall(r"<div>id (\d+)<br>label", by_seeds.pictures.value)
    helpful, harmful = (one(3).ids[2].tolist() for one in (some.helpful, some.harmful))
    assert [int(i) for i in ids] == helpful + harmful
    assert signed(1e3 * some.values[2, first], "2f") in by_seeds.pictures.value
    assert f"{int(some.trusted()[2].sum())} of 40" in by_seeds.answer.value
    assert f"{scores.expected_r(3):.2f}" in by_seeds.answer.value
    assert f">{scores.seeds_needed(0.9)}<" in by_seeds.answer.value
    assert all_images_have_alt(by_seeds.widget) == 1 + 1 + 6


def test_seeds_one_run_is_sure_of_nothing(by_seeds):
    by_seeds.pick(query=1, seeds=1)
    assert (by_seeds.query_control.value, by_seeds.seeds_control.value) == (1, 1)
    assert "One seed" in by_seeds.answer.value and "0 of 40" in by_seeds.answer.value
    assert "✓" not in by_seeds.pictures.value and complaint(by_seeds) == ""


def test_seeds_as_code_and_static(by_seeds, seed_runs):
    runs, scores, _ = seed_runs
    by_seeds.pick(query=4, seeds=4)
    space = run_code(by_seeds, runs=runs, scores=scores)
    assert torch.equal(space["average"].values, scores.per_seed[:4].mean(0))
    assert torch.equal(space["sure"], by_seeds.sure()) and len(space["ax"].patches) == 6
    by_seeds.pick(seeds=1)
    assert "sure" not in run_code(by_seeds, runs=runs, scores=scores)
    figures = by_seeds.static([1, 2, 5], query=0)
    titles = [figure.axes[0].get_title() for figure in figures]
    assert [title.rpartition(", ")[2] for title in titles] == [
        "one seed",
        "average of 2 seeds",
        "average of 5 seeds",
    ]
    assert {WIDGET, "image/png", "text/plain"} <= set(by_seeds._repr_mimebundle_())


def test_seeds_say_what_is_wrong(seed_runs):
    runs, scores, queries = seed_runs
    make = widgets.SeedExplorer
    one = msif.Influence(scores.values, scores.ids, scores.query_ids, scores.stage)
    flat = msif.Examples(queries.x.flatten(1), queries.y, queries.ids)
    for given, error, says in (
        ((runs[0], scores, queries), TypeError, "runs is one Pipeline"),
        ((runs, one, queries), TypeError, "scores is Influence, not of several seeds"),
        ((runs[:3], scores, queries), ValueError, r"scores are of seeds \[0, 1, 2, 3, 4\], runs"),
        ((runs[:1], scores.some([0]), queries), ValueError, "two or more runs"),
        ((runs, scores, queries[:5]), ValueError, r"scores is \(6, 40\), expected \(5, 40\)"),
        ((runs, scores, flat), ValueError, "reshape"),
    ):
        with pytest.raises(error, match=says):
            make(*given)
    for k in (0, 21, 2.0):
        with pytest.raises(ValueError, match=f"k={k} must be a whole number between 1 and 20"):
            make(runs, scores, queries, k=k)
    made = make(runs, scores, queries)
    for wrong in ({"seeds": 6}, {"seeds": 0}, {"query": 6}):
        with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
            made.pick(**wrong)


# ---- CleaningExplorer ----


@pytest.fixture
def cleaning(cases, queries, scores):
    loss = msif.Loss().fit(cases["full"]).score(queries).values[0]
    table = {"influence": scores["full"]["implicit"][0], "loss": loss}
    made = widgets.CleaningExplorer(cases["full"], table, queries, corrupted=[1, 4, 5, 9], k=4)
    made.table_given = table
    assert made.widget is made.widget and complaint(made) == ""
    return made


def test_cleaning_counts(cleaning, scores):
    order = scores["full"]["implicit"][0].mean().values[0].argsort(descending=True)
    assert cleaning.flagged_control.value == 4
    cleaning.flagged_control.value = 10
    found = len({1, 4, 5, 9} & set(order[:10].tolist()))
    assert cleaning.removed == order[:10].tolist()
    says = f"10 of 24 examples flagged (42%); {found} of them are among the 4 corrupted"
    assert says in cleaning.view.value
    assert f"precision {found / 10:.2f}, recall {found / 4:.2f}" in cleaning.view.value
    assert cleaning.row.places == order[8:12].tolist() and "Place 9" in cleaning.row.pictures.value
    cleaning.row.buttons[0].click()
    assert cleaning.flagged == cleaning.flagged_control.value == 9
    cleaning.flagged_control.value = 0
    assert cleaning.retrain.disabled and "0 of 24" in cleaning.view.value
    assert complaint(cleaning) == ""
    cleaning.ranking_control.value = "loss"
    cleaning.flagged_control.value = 23
    assert "23 of 24" in cleaning.view.value and all_images_have_alt(cleaning.widget) == 5
    assert complaint(cleaning) == ""


def test_cleaning_refits(cleaning, cases, queries, scores):
    before = photograph(cases["full"])
    cleaning.flagged_control.value = 3
    cleaning.retrain.click()
    assert cleaning.job.wait(60) and complaint(cleaning) == ""
    effect = msif.removal_effects(cases["full"], queries, [cleaning.removed]).values[:, 0]
    change = cleaning.after["loss"] - cleaning.before["loss"]
    assert torch.allclose(change, effect, atol=1e-12)
    assert f"{float(cleaning.after['loss'].mean()):.4f}" in cleaning.answer.value
    assert f"{float(cleaning.after['accuracy'].mean()):.4f}" in cleaning.answer.value
    assert same(before, photograph(cases["full"]))
    weights = torch.ones(1, 24)
    weights[0, cleaning.removed] = 0
    outputs = cases["full"].retrain(weights, progress=False).outputs(queries)[0]
    with torch.no_grad():
        old = cases["full"].stages[-1].model(queries.x)
    flips = float((outputs.argmax(1) != old.argmax(1)).double().mean())
    row = cleaning.history.iloc[0]
    assert (row.ranking, row.removed, row.flips) == ("influence", 3, pytest.approx(flips))
    predicted = -scores["full"]["implicit"][0].values[:, cleaning.removed].sum(1).mean()
    assert row.predicted == pytest.approx(float(predicted)) == float(cleaning.predicted().mean())
    assert f"{flips:.1%}" in cleaning.tried.value and "3 by influence (in view)" in shown(cleaning)


def shown(cleaning):
    return cleaning.tried.value


def test_cleaning_never_shows_an_old_result_beside_a_new_setting(cleaning):
    cleaning.flagged_control.value = 3
    cleaning.retrain.click()
    assert cleaning.job.wait(60)
    now = f"{float(cleaning.after['loss'].mean()):.4f}"
    assert now in cleaning.answer.value and "First 3 by influence" in cleaning.answer.value
    for control, value in ((cleaning.flagged_control, 2), (cleaning.ranking_control, "loss")):
        control.value = value
        assert cleaning.after is None and "not retrained yet" in cleaning.answer.value
        assert now not in cleaning.answer.value and "(in view)" not in shown(cleaning)
        assert "3 by influence" in shown(cleaning), "what was tried stays in the table"
    assert "no prediction" in cleaning.answer.value
    cleaning.retrain.click()
    assert cleaning.job.wait(60)
    assert cleaning.history[["ranking", "removed"]].values.tolist() == [
        ["influence", 3],
        ["loss", 2],
    ]
    cleaning.ranking_control.value, cleaning.flagged_control.value = "influence", 3
    assert now in cleaning.answer.value and complaint(cleaning) == ""


def test_cleaning_files_a_result_under_what_was_asked(monkeypatch):
    """The slider may move while a copy retrains."""
    pipeline = trained_by_sgd()
    queries = random_queries(pipeline)
    one = msif.GradientDot().fit(pipeline).score(queries)
    made = widgets.CleaningExplorer(pipeline, one, queries, k=3)
    assert made.widget
    slow_down(monkeypatch, 0.02)
    made.flagged_control.value = 4
    made.retrain.click()
    made.flagged_control.value = 6
    assert made.job.running and made.job.wait(60) and complaint(made) == ""
    assert made.after is None and "not retrained yet" in made.answer.value
    assert made.history.removed.tolist() == [4] and "(in view)" not in shown(made)


@pytest.fixture(scope="module")
def cleaned_runs():
    """Runs, scores about the mean query, queries, and judges apart from them."""
    small = {"pretraining": 40, "finetuning": 40, "queries": 6, "epochs": (6, 6), "lr": 0.3}
    experiment = experiments.digits(msif.WarmStart(), **small)
    runs = msif.over_seeds(experiment.pipeline, 5, progress=False)
    queries = experiment.queries
    judges = msif.load_digits()[1].select(range(4, 10))
    judges = judges[~torch.isin(judges.ids, queries.ids)][:30].to(queries.x.dtype)
    method = msif.AveragedInfluence(msif.UnrolledInfluence())
    scores = method.fit(runs).score(queries, aggregate="mean", progress=False)
    return runs, scores, queries, judges


def test_cleaning_runs_on_fresh_seeds(cleaned_runs):
    runs, scores, queries, judges = cleaned_runs
    made = widgets.CleaningExplorer(runs, scores, queries, judges=judges, seeds=3, k=3)
    assert made.widget and made.seeds == [5, 6, 7] and made.before is None
    made.flagged_control.value = 8
    made.retrain.click()
    assert made.job.wait(120) and complaint(made) == ""
    weights, changes, flips = torch.ones(1, 40), [], []
    weights[0, scores.values[0].argsort(descending=True)[:8]] = 0
    for run in msif.over_seeds(runs[0], [5, 6, 7], progress=False):
        again = run.retrain(weights, progress=False)
        changes.append(float((again.evaluate(judges)[:, 0] - run.evaluate(judges)).mean()))
        kept = run.retrain(torch.ones(1, 40), progress=False)
        classes = (one.outputs(judges)[0].argmax(1) for one in (again, kept))
        flips.append(float(torch.ne(*classes).double().mean()))
    changes = torch.tensor(changes)
    row = made.history.iloc[0]
    assert abs(row.change) > 1e-3 and row.flips > 0
    assert row.change == pytest.approx(float(changes.mean()), abs=1e-6)
    assert row.standard_error == pytest.approx(float(changes.std()) / 3**0.5, abs=1e-6)
    assert row.flips == pytest.approx(sum(flips) / 3)
    gain = msif.predicted_gain(scores, 8 / 40)
    assert row.predicted == pytest.approx(-float(gain.gain[0]))
    assert f"± {row.standard_error:.4f}" in made.answer.value
    other = made.try_out("", 9).history.iloc[1]
    assert abs(other.change - row.change) > 1e-4 and made.flagged_control.value == 9
    counts, changes, errors = made.curve("")
    assert counts[-1] == 39 and len(counts) == len(changes) == len(errors)
    assert changes == [-gain for gain in msif.predicted_gain(scores, [n / 40 for n in counts]).gain]
    space = run_code(made, runs=runs, scores=scores, judges=judges)
    assert space["removed"].tolist() == made.removed
    report = space["report"].summary()
    assert report.change[1] == pytest.approx(other.change)
    assert len(made.static()) == 2 and made.plot.value.count("<img") == 1


def test_cleaning_runs_stop(cleaned_runs, monkeypatch):
    runs, scores, queries, judges = cleaned_runs
    made = widgets.CleaningExplorer(runs, scores, queries, judges=judges, k=3)
    assert made.widget
    slow_down(monkeypatch, 0.05)
    made.retrain.click()
    time.sleep(0.2)
    made.stop.click()
    assert made.job.wait(10) and "stopped: nothing was changed" in made.status.value
    assert made.history.empty and made.tried.value == "" and complaint(made) == ""


def test_cleaning_runs_say_what_is_wrong(cleaned_runs):
    runs, scores, queries, judges = cleaned_runs
    make = widgets.CleaningExplorer
    with pytest.raises(ValueError, match="judges=None: runs are judged by other examples"):
        make(runs, scores, queries)
    with pytest.raises(ValueError, match="seeds=0 must be a whole number"):
        make(runs, scores, queries, judges=judges, seeds=0)
    with pytest.raises(ValueError, match=r"scores is \(1, 40\)"):
        widgets.InfluenceExplorer(runs[0], scores, queries)
    made = make(runs, scores, queries, judges=judges)
    with pytest.raises(ValueError, match="ranking='other' is none of"):
        made.try_out("other", 3)
    with pytest.raises(ValueError, match="count=40 must be a whole number between 1 and 39"):
        made.try_out("", 40)
    made.judges = queries  # as a reader might set it: those who chose may not judge
    with pytest.raises(ValueError, match="which then judge their own choice"):
        made.try_out("", 3)


def test_waiting_for_the_kernel_is_said(explorer, cleaning):
    for made in (explorer, cleaning):
        said = [w for w in walk(made.widget) if "msif-waiting" in getattr(w, "_dom_classes", ())]
        assert len(said) == 1 and "waiting for the kernel" in said[0].value


def test_cleaning_as_code_and_static(cleaning, cases, queries):
    cleaning.flagged_control.value = 3
    cleaning.retrain.click()
    assert cleaning.job.wait(60)
    known = {
        "pipeline": cases["full"],
        "queries": queries,
        "scores": cleaning.table_given,
        "corrupted": [1, 4, 5, 9],
    }
    space = run_code(cleaning, **known)
    assert space["removed"].tolist() == cleaning.removed
    found = float(space["precision"]), float(space["recall"])
    assert found == pytest.approx(cleaning.precision_recall())
    assert torch.allclose(space["after"], cleaning.after["loss"], atol=1e-12)
    assert torch.allclose(space["before"], cleaning.before["loss"])
    cleaning.ranking_control.value = "loss"
    assert run_code(cleaning, **known)["removed"].tolist() == cleaning.removed
    assert len(cleaning.static()) == len(cleaning.static("loss")) == 2
    assert {WIDGET, "image/png", "text/plain"} <= set(cleaning._repr_mimebundle_())


def test_cleaning_judged_by_others(cases, queries, scores):
    others = random_queries(cases["full"], n=7)
    one = scores["full"]["implicit"][0]
    made = widgets.CleaningExplorer(cases["full"], one, queries, judges=others, k=3)
    assert made.widget is made.widget
    made.retrain.click()
    assert made.job.wait(60) and complaint(made) == ""
    effect = msif.removal_effects(cases["full"], others, [made.removed]).values[:, 0]
    assert torch.allclose(made.after["loss"] - made.before["loss"], effect, atol=1e-12)
    assert "7 examples of the target task, other than the queries" in made.answer.value
    assert "predicted for the queries" in made.answer.value


def test_cleaning_without_the_truth(cases, queries, scores):
    one = scores["full"]["implicit"][0]
    made = widgets.CleaningExplorer(cases["full"], one, queries, k=3)
    assert made.widget is made.widget
    made.flagged_control.value = 6
    assert "6 of 24 examples flagged" in made.view.value and "precision" not in made.view.value
    assert "<img" in made.plot.value and complaint(made) == ""
    space = run_code(made, pipeline=cases["full"], queries=queries, scores=one)
    assert space["removed"].tolist() == made.removed and "precision" not in space
    assert len(made.static()) == 1


def test_cleaning_says_what_is_wrong(cases, queries, scores):
    one, pipeline = scores["full"]["implicit"][0], cases["full"]
    bad = torch.zeros(24)
    bad[3] = float("nan")
    for table, corrupted, says in (
        ({}, None, "scores is empty"),
        (torch.zeros(23), None, r"scores has shape \(23,\).*\(24,\)"),
        ({"loss": bad}, None, r"scores\['loss'\] holds NaN"),
        (one, torch.zeros(24, dtype=torch.bool), "marks no example"),
        (one, [3, 24], "between 0 and 23"),
        (one, torch.zeros(23, dtype=torch.bool), r"corrupted is torch.bool of shape \(23,\)"),
        (one, [0.5, 1.0], "positions"),
        ({"a": one, "b": scores["full"]["implicit"][1]}, None, "different stages"),
    ):
        with pytest.raises(ValueError, match=says):
            widgets.CleaningExplorer(pipeline, table, queries, corrupted=corrupted, k=3)


# ---- What all explorers share ----


def trained_by_sgd():
    """A pipeline of 18 steps of SGD, each of which can be slowed down."""
    stages = random_pipeline(link=msif.Proximal(0.3), fit=False).stages
    for stage in stages:
        stage.recipe = msif.SGD(0.1, epochs=2, batch_size=5)
    return msif.Pipeline(stages).fit(progress=False)


def slow_down(patch, seconds):
    """Let every step of SGD take so many seconds more."""
    advance = msif.SGD.advance

    def slowly(self, *given):
        time.sleep(seconds)
        return advance(self, *given)

    patch.setattr(msif.SGD, "advance", slowly)


def test_stop_leaves_everything_whole(monkeypatch):
    pipeline = trained_by_sgd()
    queries = random_queries(pipeline)
    one = msif.GradientDot().fit(pipeline).score(queries)
    explorer = with_an_example(widgets.InfluenceExplorer(pipeline, one, queries, k=2))
    before, answers = photograph(pipeline), pipeline.evaluate(queries)
    slow_down(monkeypatch, 0.05)  # about a second in all
    explorer.retrain.click()
    assert explorer.retrain.disabled and not explorer.stop.disabled
    assert "retraining both stages" in explorer.status.value
    time.sleep(0.2)
    assert explorer.job.running
    start = time.perf_counter()
    explorer.stop.click()
    assert "stopping" in explorer.status.value or "stopped" in explorer.status.value
    assert explorer.job.wait(5) and time.perf_counter() - start < 0.5
    assert "stopped: nothing was changed" in explorer.status.value
    assert explorer.stop.disabled and not explorer.retrain.disabled
    assert same(before, photograph(pipeline)) and explorer.actual is None
    assert torch.equal(pipeline.evaluate(queries), answers), "the models cannot be stopped any more"
    monkeypatch.undo()
    explorer.retrain.click()  # and it can be tried again
    assert explorer.job.wait(60) and explorer.actual is not None


def test_the_pipeline_is_free_while_a_copy_retrains(monkeypatch):
    """Training swaps parameters in and out of its modules; the reader's must not be among them."""
    pipeline = trained_by_sgd()
    queries = random_queries(pipeline)
    one = msif.GradientDot().fit(pipeline).score(queries)
    explorer = with_an_example(widgets.InfluenceExplorer(pipeline, one, queries, k=2))
    expected, before = pipeline.evaluate(queries), photograph(pipeline)
    slow_down(monkeypatch, 0.02)
    explorer.retrain.click()
    rounds = 0
    while explorer.job.running:
        assert torch.equal(pipeline.evaluate(queries), expected)
        assert same(before, photograph(pipeline))
        explorer.query_control.value = rounds % len(queries)
        rounds += 1
    assert explorer.job.wait(60) and rounds > 5
    monkeypatch.undo()
    effects = msif.removal_effects(pipeline, queries, [[explorer.example]], progress=False)
    assert torch.equal(explorer.actual, effects.values[:, 0])
    assert complaint(explorer) == ""


def test_errors_stay_in_sight(explorer, cases, monkeypatch):
    explorer.rows[0].buttons[0].click()
    with monkeypatch.context() as patch:
        patch.setattr("msif_lab.widgets.influence.removal_effects", lambda *_, **__: 1 / 0)
        explorer.retrain.click()
        assert explorer.job.wait(10)
    assert "ZeroDivisionError" in complaint(explorer)
    assert "failed: see the error below" in explorer.status.value
    assert explorer.stop.disabled and not explorer.retrain.disabled
    with monkeypatch.context() as patch:
        patch.setattr(msif.Influence, "removal_effect", lambda *_: 1 / 0)
        explorer.query_control.value = 4
        assert "ZeroDivisionError" in complaint(explorer)
    explorer.query_control.value = 5
    assert complaint(explorer) == "", "a step that succeeds clears the error"


def test_failure_before_the_click_returns_stays_in_sight(explorer, monkeypatch):
    def at_once(*given, **settings):
        job = background.Job(*given, **settings)
        assert job.wait(10)
        return job

    explorer.rows[0].buttons[0].click()
    with monkeypatch.context() as patch:
        patch.setattr("msif_lab.widgets.influence.removal_effects", lambda *_, **__: 1 / 0)
        patch.setattr("msif_lab.widgets.frame.Job", at_once)
        explorer.retrain.click()
    assert "ZeroDivisionError" in complaint(explorer)
    assert "failed: see the error below" in explorer.status.value
    assert explorer.stop.disabled and not explorer.retrain.disabled


def test_retraining_of_changed_weights_says_so(queries):
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    one = msif.GradientDot().fit(pipeline).score(queries)
    explorer = with_an_example(widgets.InfluenceExplorer(pipeline, one, queries, k=2))
    with torch.no_grad():
        next(pipeline.stages[0].model.parameters()).add_(1.0)
    explorer.retrain.click()
    assert explorer.job.wait(10)
    assert "changed since fit()" in complaint(explorer)


def test_controls_have_labels(explorer):
    controls = [
        w for w in walk(explorer.widget) if hasattr(w, "description") and type(w).__name__ != "HTML"
    ]
    shown = [w for w in controls if w.layout.display != "none"]
    assert len(shown) > 10 and all(w.description for w in shown)


def test_bundle_has_view_picture_and_text(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {WIDGET, "image/png", "text/plain"} <= set(bundle)
    assert bundle["text/plain"].startswith("InfluenceExplorer: 12 queries")
    assert len(explorer.static([0, 3], case="full", method="gradient")) == 2
    assert len(explorer.static([1], stage="stage1")) == 1
    for wrong, says in (
        ({"case": "none"}, "case='none' is none of"),
        ({"method": "loss"}, "method='loss' is none of"),
        ({"method": "gradient", "stage": 1}, "stage=1 is none of"),
    ):
        with pytest.raises(ValueError, match=says):
            explorer.static([0], **wrong)


def test_without_ipywidgets_there_is_still_a_picture(cases, scores, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorer = widgets.InfluenceExplorer(cases, scores, queries, k=2)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"}


def test_bad_input_is_named(cases, scores, queries):
    pipeline, one = cases["full"], scores["full"]["implicit"][0]
    make = widgets.InfluenceExplorer
    flat = msif.Examples(queries.x.flatten(1), queries.y, queries.ids)
    other = msif.Examples(queries.x, queries.y, queries.ids + 1)
    raw = msif.Influence(one.values, one.ids, one.query_ids, one.stage, "surprise")
    for given, error, says in (
        ((pipeline, one, queries[:5]), ValueError, r"scores is \(12, 24\), expected \(5, 24\)"),
        ((pipeline, one, other), ValueError, "other queries"),
        ((pipeline, one, flat), ValueError, r"\(12, 16\).*reshape"),
        ((pipeline, one.values, queries), TypeError, "scores is Tensor"),
        ((pipeline, {}, queries), ValueError, "scores is empty"),
        ((pipeline, [one, one], queries), ValueError, r"scores\[1\] is of stage 'stage0' again"),
        (
            (cases, {"frozen": one}, queries),
            ValueError,
            r"cases \['frozen'\].*\['frozen', 'full'\]",
        ),
        ((cases, one, queries), ValueError, "cases Influence"),
        (({}, one, queries), ValueError, "pipeline is empty"),
        ((one, pipeline, queries), TypeError, "pipeline is Influence"),
        ((pipeline, raw, queries), ValueError, "target 'surprise'"),
        ((random_pipeline(link=msif.Frozen(), fit=False), one, queries), ValueError, "not trained"),
    ):
        with pytest.raises(error, match=says):
            make(*given, k=3)
    with pytest.raises(ValueError, match="k=25 must be"):
        make(pipeline, one, queries, k=25)


def test_every_step_of_every_control_redraws(explorer, damping, methods, by_seeds, cleaning):
    explorer.rows[0].buttons[0].click()
    for made, control, values in (
        (explorer, explorer.query_control, range(12)),
        (damping, damping.alpha_control, damping.alphas),
        (damping, damping.damping_control, damping.dampings),
        (methods, methods.query_control, range(12)),
        (methods, methods.rank_control, range(2, 20)),
        (by_seeds, by_seeds.query_control, range(6)),
        (by_seeds, by_seeds.seeds_control, range(1, 6)),
        (cleaning, cleaning.flagged_control, range(1, 20)),
    ):
        for value in values:
            control.value = value
            assert complaint(made) == "", (control.description, value)
