"""Explorers without a browser: controls are set, buttons clicked, and what is shown is read."""

import re
import statistics
import time

import pytest
import torch
from conftest import random_pipeline, random_queries

import msif_lab as msif
from msif_lab import widgets

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
    return {"frozen": random_pipeline(link=msif.Frozen()), "full": random_pipeline(link=msif.Proximal(0.3))}


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
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))


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
    """What the code of the view computes, in a namespace that holds only what the explorer was given."""
    space = dict(known)
    exec(explorer.code(), space)
    return space


# ---- InfluenceExplorer ----


def test_influence_shows_the_ranking(explorer, scores, queries):
    one = scores["frozen"]["implicit"][0]
    explorer.query_control.value = 7
    for row, ranking in zip(explorer.rows, (one.helpful(3), one.harmful(3)), strict=True):
        assert row.places == ranking.positions[7].tolist()
        for place, value, button in zip(row.places, ranking.values[7].tolist(), row.buttons, strict=True):
            assert f"{1e3 * value:+.2f}".replace("-", "−") in row.pictures.value
            assert button.description == f"id {int(one.ids[place])}"
    assert "Most helpful" in explorer.titles[0].value and "lower" in explorer.titles[0].value
    assert "Most harmful" in explorer.titles[1].value and "raise" in explorer.titles[1].value
    assert "query 7" in explorer.view.value and complaint(explorer) == ""
    assert all_images_have_alt(explorer.widget) >= 7


def test_influence_picks_by_group_and_by_picture(explorer, cases, queries):
    wrong = (cases["frozen"].evaluate(queries, lambda z, y: (z.argmax(1) != y).double())).nonzero().flatten().tolist()
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
    assert explorer.rows[0].places == scores["full"]["gradient"].helpful(3).positions[explorer.query].tolist()


def test_influence_removes_for_real(explorer, cases, scores, queries):
    before = {case: photograph(pipeline) for case, pipeline in cases.items()}
    assert explorer.retrain.disabled and explorer.stop.disabled
    explorer.rows[1].buttons[0].click()
    assert not explorer.retrain.disabled
    assert "not retrained yet" in explorer.answer.value and 'alt="Change of 12 queries' in explorer.plot.value
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


# ---- what all share ----


def slow_pipeline():
    """A pipeline that would train for minutes, were it not stopped."""
    pipeline = random_pipeline(link=msif.Proximal(0.3), fit=False)
    stages = [
        msif.Stage(s.name, s.model, s.data, s.loss, 0.05, s.link, msif.SGD(0.1, epochs=2, batch_size=5))
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


def test_errors_stay_in_sight(explorer, cases, monkeypatch):
    explorer.rows[0].buttons[0].click()
    with monkeypatch.context() as patch:
        patch.setattr("msif_lab.widgets.influence.removal_effects", lambda *_, **__: 1 / 0)
        explorer.retrain.click()
        assert explorer.job.wait(10)
    assert "ZeroDivisionError" in complaint(explorer) and "failed: see the error below" in explorer.status.value
    assert explorer.stop.disabled and not explorer.retrain.disabled
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "_show_example", lambda: 1 / 0)
        explorer.query_control.value = 4
        assert "ZeroDivisionError" in complaint(explorer)
    explorer.query_control.value = 5
    assert complaint(explorer) == "", "what goes well again wipes the error"


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

    controls = [w for w in walk(explorer.widget) if hasattr(w, "description") and type(w).__name__ != "HTML"]
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
        ((cases, {"frozen": one}, queries), ValueError, r"cases \['frozen'\].*\['frozen', 'full'\]"),
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


def test_step_times_are_printed(explorer, queries):
    """Not a bar: the browser run measures the whole way. Here only Python's share."""
    seconds = []
    for query in [*range(12)] * 2:
        start = time.perf_counter()
        explorer.query_control.value = query
        seconds.append(time.perf_counter() - start)
    explorer.rows[0].buttons[0].click()
    with_plot = []
    for query in [*range(12)]:
        start = time.perf_counter()
        explorer.query_control.value = query
        with_plot.append(time.perf_counter() - start)
    print(f"InfluenceExplorer: {1e3 * statistics.median(seconds):.0f} ms a step, "
          f"{1e3 * statistics.median(with_plot):.0f} ms with the plot of an example")  # fmt: skip
    assert complaint(explorer) == ""
