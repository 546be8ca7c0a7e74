"""Explorers without a browser: controls are set, buttons clicked, and what is shown is read."""

import re
import statistics
import time

import pytest
import torch
from oracles import random_pipeline, random_queries

import msif_lab as msif
from msif_lab import widgets
from msif_lab.widgets import background

plt = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("ipywidgets")

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
    """Every tensor of the models, and the objects that hold them."""
    return [
        (name, id(parameter), parameter.detach().clone())
        for stage in pipeline.stages
        for name, parameter in stage.model.named_parameters()
    ]


def same(before, after):
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True)
    )


def complaint(explorer):
    return "".join(out["text"] for out in explorer.error.outputs)


def all_images_have_alt(widget):
    """Every <img> in the tree says what it shows; returns how many there are."""
    found = 0
    for part in [widget, *getattr(widget, "children", ())]:
        if part is not widget:
            found += all_images_have_alt(part)
        elif isinstance(getattr(part, "value", None), str):
            pictures = re.findall(r"<img[^>]*>", part.value)
            assert all(re.search(r'alt="[^"]{5,}"', picture) for picture in pictures)
            found += len(pictures)
    return found


def run_code(explorer, **known):
    """What the code of the view computes, in a namespace that holds only what the explorer was
    given.
    """
    space = dict(known)
    exec(explorer.code(), space)
    return space


# ---- InfluenceExplorer ----


def test_influence_shows_the_ranking(explorer, scores, queries):
    one = scores["frozen"]["implicit"][0]
    explorer.query_control.value = 7
    for row, ranking in zip(explorer.rows, (one.helpful(3), one.harmful(3)), strict=True):
        assert row.places == ranking.positions[7].tolist()
        for place, value, button in zip(
            row.places, ranking.values[7].tolist(), row.buttons, strict=True
        ):
            assert f"{1e3 * value:+.2f}".replace("-", "−") in row.pictures.value
            assert button.description == f"id {int(one.ids[place])}"
    assert "Most helpful" in explorer.titles[0].value and "lower" in explorer.titles[0].value
    assert "Most harmful" in explorer.titles[1].value and "raise" in explorer.titles[1].value
    assert "query 7" in explorer.view.value and complaint(explorer) == ""
    assert all_images_have_alt(explorer.widget) >= 7


def test_influence_picks_by_group_and_by_picture(explorer, cases, queries):
    wrong = (
        (cases["frozen"].evaluate(queries, lambda z, y: (z.argmax(1) != y).double()))
        .nonzero()
        .flatten()
        .tolist()
    )
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
    assert (
        explorer.rows[0].places
        == scores["full"]["gradient"].helpful(3).positions[explorer.query].tolist()
    )


def test_influence_removes_for_real(explorer, cases, scores, queries):
    before = {case: photograph(pipeline) for case, pipeline in cases.items()}
    assert explorer.retrain.disabled and explorer.stop.disabled
    explorer.rows[1].buttons[0].click()
    assert not explorer.retrain.disabled
    assert (
        "not retrained yet" in explorer.answer.value
        and 'alt="Change of 12 queries' in explorer.plot.value
    )
    explorer.retrain.click()
    assert explorer.job.wait(60)
    expected = msif.removal_effects(cases["frozen"], queries, [[explorer.example]]).values[:, 0]
    assert torch.equal(explorer.actual, expected)
    assert "done in" in explorer.status.value and 'role="status"' in explorer.status.value
    assert f"{float(expected.mean()):+.5f}".replace("-", "−") in explorer.answer.value
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
    button, text = explorer._code_text, explorer.code()
    assert button.layout.display == "none"
    code_box = next(w for w in explorer.widget.children if "msif-code" in w._dom_classes)
    code_box.children[0].click()
    assert button.layout.display is None and button.value == text
    explorer.query_control.value = 5
    assert "query=5" in button.value


def test_influence_picks_from_code(explorer, cases, scores, queries):
    explorer.queries_control.value = "label 1"
    assert explorer.pick(query=3, example=7, case="full") is explorer
    assert (
        explorer.query_control.value,
        explorer.case_control.value,
        explorer.queries_control.value,
    ) == (
        3,
        "full",
        "all",
    )
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
        assert f"{1e3 * value:+.2f}".replace("-", "−") in damping.view.value
    assert "its own" in damping.answer.value and all_images_have_alt(damping.widget) == 8


def test_damping_sliders_change_order_filter_and_agreement(damping, effects):
    first = damping.view.value, damping.plot.value, damping.answer.value
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
    assert all(
        a != b
        for a, b in zip(
            first, (damping.view.value, damping.plot.value, damping.answer.value), strict=True
        )
    )
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
    assert (
        "3 of 24" in methods.answer.value
        and f"{float(b.values[0, chosen]):+.2e}".replace("-", "−") in methods.answer.value
    )
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
    assert (
        f"10 of 24 examples flagged (42%); {found} of them are among the 4 corrupted"
        in cleaning.view.value
    )
    assert f"precision {found / 10:.2f}, recall {found / 4:.2f}" in cleaning.view.value
    assert cleaning.row.places == order[8:12].tolist() and "Place 9" in cleaning.row.pictures.value
    cleaning.row.buttons[0].click()
    assert cleaning.flagged == cleaning.flagged_control.value == 9
    cleaning.flagged_control.value = 0
    assert (
        cleaning.retrain.disabled and "0 of 24" in cleaning.view.value and complaint(cleaning) == ""
    )
    cleaning.ranking_control.value = "loss"
    cleaning.flagged_control.value = 23
    assert "23 of 24" in cleaning.view.value and all_images_have_alt(cleaning.widget) == 5
    assert complaint(cleaning) == ""


def test_cleaning_refits(cleaning, cases, queries):
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
    cleaning.flagged_control.value = 2
    assert cleaning.after is None and "not retrained yet" in cleaning.answer.value


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
    assert (float(space["precision"]), float(space["recall"])) == pytest.approx(
        cleaning.precision_recall()
    )
    assert torch.allclose(space["after"], cleaning.after["loss"], atol=1e-12)
    assert torch.allclose(space["before"], cleaning.before["loss"])
    cleaning.ranking_control.value = "loss"
    assert run_code(cleaning, **known)["removed"].tolist() == cleaning.removed
    assert len(cleaning.static()) == len(cleaning.static("loss")) == 1
    assert {WIDGET, "image/png", "text/plain"} <= set(cleaning._repr_mimebundle_())


def test_cleaning_judged_by_others(cases, queries, scores):
    others = random_queries(cases["full"], n=7)
    made = widgets.CleaningExplorer(
        cases["full"], scores["full"]["implicit"][0], queries, judges=others, k=3
    )
    made.widget  # noqa: B018
    made.retrain.click()
    assert made.job.wait(60) and complaint(made) == ""
    effect = msif.removal_effects(cases["full"], others, [made.removed]).values[:, 0]
    assert torch.allclose(made.after["loss"] - made.before["loss"], effect, atol=1e-12)
    assert "7 examples of the target task, other than the queries" in made.answer.value
    assert made.predicted() is None and "no prediction" in made.answer.value


def test_cleaning_without_the_truth(cases, queries, scores):
    one = scores["full"]["implicit"][0]
    made = widgets.CleaningExplorer(cases["full"], one, queries, k=3)
    made.widget  # noqa: B018
    made.flagged_control.value = 6
    assert "6 of 24 examples flagged" in made.view.value and "precision" not in made.view.value
    assert made.plot.value == "" and complaint(made) == ""
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


# ---- what all share ----


def slow_pipeline():
    """A pipeline that would train for minutes, were it not stopped."""
    pipeline = random_pipeline(link=msif.Proximal(0.3), fit=False)
    stages = [
        msif.Stage(
            s.name, s.model, s.data, s.loss, 0.05, s.link, msif.SGD(0.1, epochs=2, batch_size=5)
        )
        for s in pipeline.stages
    ]
    pipeline = msif.Pipeline(stages).fit(progress=False)
    return pipeline


def test_stop_leaves_everything_whole(monkeypatch):
    pipeline = slow_pipeline()
    queries = random_queries(pipeline)
    one = msif.GradientDot().fit(pipeline).score(queries)
    explorer = widgets.InfluenceExplorer(pipeline, one, queries, k=2)
    explorer.widget  # noqa: B018
    explorer.rows[0].buttons[0].click()
    before = photograph(pipeline)
    advance = msif.SGD.advance

    def slowly(self, *given):
        time.sleep(0.05)
        return advance(self, *given)

    monkeypatch.setattr(msif.SGD, "advance", slowly)  # 18 steps: about a second
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
    assert not any(stage.model._forward_pre_hooks for stage in pipeline.stages)
    monkeypatch.setattr(msif.SGD, "advance", advance)
    explorer.retrain.click()  # and it can be tried again
    assert explorer.job.wait(60) and explorer.actual is not None


def test_the_pipeline_is_free_while_a_copy_retrains(monkeypatch):
    """Training swaps parameters in and out of its modules; the reader's must not be among them."""
    pipeline = slow_pipeline()
    queries = random_queries(pipeline)
    explorer = widgets.InfluenceExplorer(
        pipeline, msif.GradientDot().fit(pipeline).score(queries), queries, k=2
    )
    explorer.widget  # noqa: B018
    explorer.rows[0].buttons[0].click()
    expected, before = pipeline.evaluate(queries), photograph(pipeline)
    advance = msif.SGD.advance
    monkeypatch.setattr(msif.SGD, "advance", lambda *given: (time.sleep(0.02), advance(*given))[1])
    explorer.retrain.click()
    rounds = 0
    while explorer.job.running:
        assert torch.equal(pipeline.evaluate(queries), expected) and same(
            before, photograph(pipeline)
        )
        explorer.query_control.value = rounds % len(queries)
        rounds += 1
    assert explorer.job.wait(60) and rounds > 5
    monkeypatch.setattr(msif.SGD, "advance", advance)
    assert torch.equal(
        explorer.actual, msif.removal_effects(pipeline, queries, [[explorer.example]]).values[:, 0]
    )
    assert complaint(explorer) == ""


def test_errors_stay_in_sight(explorer, cases, monkeypatch):
    explorer.rows[0].buttons[0].click()
    with monkeypatch.context() as patch:
        patch.setattr("msif_lab.widgets.influence.removal_effects", lambda *_, **__: 1 / 0)
        explorer.retrain.click()
        assert explorer.job.wait(10)
    assert (
        "ZeroDivisionError" in complaint(explorer)
        and "failed: see the error below" in explorer.status.value
    )
    assert explorer.stop.disabled and not explorer.retrain.disabled
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "_show_example", lambda: 1 / 0)
        explorer.query_control.value = 4
        assert "ZeroDivisionError" in complaint(explorer)
    explorer.query_control.value = 5
    assert complaint(explorer) == "", "what goes well again wipes the error"


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
    assert (
        "ZeroDivisionError" in complaint(explorer)
        and "failed: see the error below" in explorer.status.value
    )
    assert explorer.stop.disabled and not explorer.retrain.disabled


def test_retraining_of_changed_weights_says_so(cases, scores, queries):
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    one = msif.GradientDot().fit(pipeline).score(queries)
    explorer = widgets.InfluenceExplorer(pipeline, one, queries, k=2)
    explorer.widget  # noqa: B018
    explorer.rows[0].buttons[0].click()
    with torch.no_grad():
        next(pipeline.stages[0].model.parameters()).add_(1.0)
    explorer.retrain.click()
    assert explorer.job.wait(10)
    assert "changed since fit()" in complaint(explorer)


def test_controls_have_labels(explorer):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [
        w for w in walk(explorer.widget) if hasattr(w, "description") and type(w).__name__ != "HTML"
    ]
    shown = [w for w in controls if w.layout.display != "none"]
    assert len(shown) > 10 and all(w.description for w in shown)


def test_bundle_has_view_picture_and_text(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {WIDGET, "image/png", "text/plain"} <= set(bundle)
    assert bundle["text/plain"].startswith("InfluenceExplorer: 12 queries")
    assert "msif-explorer" in explorer.widget._dom_classes
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
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
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


# ---- how fast a step is ----


def test_step_times_are_printed(explorer, damping, methods, cleaning):
    """Not a bar: the browser run measures the whole way. Here only Python's share."""
    explorer.rows[0].buttons[0].click()
    for control, values in (
        (explorer.query_control, range(12)),
        (damping.alpha_control, damping.alphas),
        (damping.damping_control, damping.dampings),
        (methods.query_control, range(12)),
        (methods.rank_control, range(2, 20)),
        (cleaning.flagged_control, range(1, 20)),
    ):
        seconds = []
        for value in values:
            start = time.perf_counter()
            control.value = value
            seconds.append(time.perf_counter() - start)
        print(f"{control.description:45} {1e3 * statistics.median(seconds):4.0f} ms a step")
    assert all(complaint(made) == "" for made in (explorer, damping, methods, cleaning))
