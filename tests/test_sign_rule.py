"""Every view and table calls helpful what helps, whatever the target, and names its sign and unit.

The oracle is the predicted removal: without a helpful example a query's loss is higher, and so is
any q of the reader's own; only a margin, which should be large, is lower.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from oracles import random_pipeline, random_queries

import msif_lab as msif
from msif_lab import plots, widgets
from msif_lab.influence import AlphaSweep

plt = pytest.importorskip("matplotlib.pyplot")
colours = pytest.importorskip("matplotlib.colors")

BORDERS = {"helpful": plots.HELPFUL, "harmful": plots.HARMFUL}
QUERY, K = 2, 4


def first_logit(outputs, targets):
    """A target of the reader's own."""
    return outputs[:, 0]


TARGETS = {"loss": "loss", "margin": "margin", "first_logit": first_logit}
UNITS = {"loss": "nats", "margin": "log-odds", "first_logit": "units of q"}


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pipeline():
    return random_pipeline(link=msif.Proximal(0.3))


@pytest.fixture(scope="module")
def queries(pipeline):
    return random_queries(pipeline, n=6)


@pytest.fixture(scope="module", params=TARGETS)
def scores(request, pipeline, queries):
    target = TARGETS[request.param]
    return msif.ImplicitInfluence().fit(pipeline).score(queries, target=target)


def harm(scores, query=None):
    """How much better a query, or their mean, gets without each example, ``(N,)``: the oracle."""
    removed = torch.stack([scores.removal_effect([i]) for i in range(len(scores.ids))], 1)
    gain = removed if scores.target == "margin" else -removed
    return gain.mean(0) if query is None else gain[query]


def word(scores, position, query=QUERY):
    """What an example is by the oracle."""
    return "harmful" if harm(scores, query)[position] > 0 else "helpful"


def sign(scores, of):
    """The sign of the scores of all examples that the oracle calls helpful, or harmful."""
    chosen = harm(scores, QUERY) > 0 if of == "harmful" else harm(scores, QUERY) < 0
    signs = set(scores.values[QUERY][chosen].sign().tolist())
    assert len(signs) == 1
    return "+" if signs == {1.0} else "−"


def worst(scores, query=None):
    """Positions, the most harmful first."""
    return harm(scores, query).argsort(descending=True).tolist()


def cards(html):
    """Word, score and id in the alt text of each card, and the colour around its picture."""
    found = re.findall(
        r'border:3px solid (#\w+)"><img[^>]*alt="(\w+) example, score (\S+) thousandths, id (\d+)',
        html,
    )
    return [(kind.lower(), score, int(i), colour) for colour, kind, score, i in found]


def check_cards(shown, places, scores):
    assert [i for _, _, i, _ in shown] == scores.ids[places].tolist()
    for (kind, score, _, colour), place in zip(shown, places, strict=True):
        assert kind == word(scores, place)
        assert score[0] == sign(scores, kind)
        assert colour == BORDERS[kind]


def check_grid(figure, scores):
    """One figure of `plots.influence_grid` for QUERY with K examples a row."""
    best = worst(scores, QUERY)[::-1]
    for row, kind in enumerate(("helpful", "harmful")):
        axes = figure.axes[row * (K + 1) + 1 : (row + 1) * (K + 1)]
        assert axes[0].get_ylabel() == f"{kind} ({sign(scores, kind)})"
        expected = best[:K] if kind == "helpful" else worst(scores, QUERY)[:K]
        for ax, place in zip(axes, expected, strict=True):
            value = float(scores.values[QUERY, place])
            assert ax.get_xlabel() == f"{'+' if value > 0 else '−'}{abs(value) * 1e3:.1f}"
            border = colours.to_hex(ax.spines["left"].get_edgecolor())
            assert border == BORDERS[word(scores, place)]
    below = figure.get_supxlabel()
    assert f"query {scores.target}" in below
    assert ("nat" in below) == (scores.target == "loss")
    assert UNITS[scores.target].removesuffix("s") in below


def test_rankings_and_the_rule(scores):
    for query in range(len(scores)):
        order = worst(scores, query)
        assert scores.harmful(K).positions[query].tolist() == order[:K]
        assert scores.helpful(K).positions[query].tolist() == order[::-1][:K]
    for place in range(len(scores.ids)):
        assert scores.kind(float(scores.values[QUERY, place])) == word(scores, place)
    assert scores.kind(0.0) == "neutral"
    assert scores.unit == UNITS[scores.target]
    for kind in ("helpful", "harmful"):
        assert scores.signs[kind] == sign(scores, kind)
    assert scores.harm_sign == (1 if sign(scores, "harmful") == "+" else -1)


def test_the_top_k_follow_the_same_rule(scores, pipeline, queries):
    target = TARGETS[scores.target]
    solver = msif.ConjugateGradient(tol=1e-10)
    top = msif.ImplicitInfluence(solver).fit(pipeline).score(queries, target=target, top=K)
    for query in range(len(top)):
        order = worst(scores, query)
        assert top.harmful().positions[query].tolist() == order[:K]
        assert top.helpful(2).positions[query].tolist() == order[::-1][:2]
    assert (top.harm_sign, top.unit) == (scores.harm_sign, scores.unit)


def test_table_of_a_result(scores):
    html = scores._repr_html_()
    rows = re.findall(r"<td>(helpful|harmful)</td><td>(\d+)</td>", html)
    mean = harm(scores)
    assert len(rows) == 8
    for kind, i in rows:
        assert kind == ("harmful" if mean[scores.ids.tolist().index(int(i))] > 0 else "helpful")


def explore(scores, pipeline, queries, k=K):
    pytest.importorskip("ipywidgets")
    target = first_logit if scores.target == "first_logit" else None
    made = widgets.InfluenceExplorer(pipeline, scores, queries, k=k, target=target)
    assert made.widget is made.widget
    return made.pick(query=QUERY)


def test_influence_explorer_pictures(scores, pipeline, queries):
    made = explore(scores, pipeline, queries)
    for row in made.rows:
        check_cards(cards(row.pictures.value), row.places, scores)


def test_influence_explorer_words(scores, pipeline, queries):
    made = explore(scores, pipeline, queries)
    unit = UNITS[scores.target]
    for title, kind in zip(made.titles, ("helpful", "harmful"), strict=True):
        does = {"−": "lower", "+": "raise"}[sign(scores, kind)]
        assert f"Most {kind}</b> ({sign(scores, kind)}): they {does} this query's" in title.value
        assert title.value.endswith(f"score × 1000, {unit}")
    made.rows[0].buttons[0].click()
    assert f"change in {scores.target}, {unit}<" in made.answer.value
    assert made._figure.artists[0].get_ylabel() == f"change in {scores.target}, {unit}"


def test_influence_explorer_static_and_code(scores, pipeline, queries):
    made = explore(scores, pipeline, queries)
    check_grid(made.static()[0], scores)
    space = {"pipeline": pipeline, "scores": scores, "queries": queries}
    exec(made.code(), space)
    check_grid(space["figure"], scores)


def test_influence_explorer_names_the_kind_of_every_picture_in_a_row(scores, pipeline, queries):
    """With as many pictures as examples a row shows both kinds."""
    made = explore(scores, pipeline, queries, k=len(scores.ids))
    for row in made.rows:
        shown = cards(row.pictures.value)
        check_cards(shown, row.places, scores)
        assert {kind for kind, *_ in shown} == {"helpful", "harmful"}


def test_damping_explorer(scores, pipeline, queries, monkeypatch):
    """It asks for the loss; were it another target, it would follow."""
    pytest.importorskip("ipywidgets")
    sweep = functools.partial(AlphaSweep, target=TARGETS[scores.target])
    monkeypatch.setattr("msif_lab.widgets.damping.AlphaSweep", sweep)
    made = widgets.AlphaDampingExplorer(pipeline, queries, k=K)
    assert made.widget is made.widget
    made.query_control.value = QUERY
    titles = re.findall(r"<b>Most (\w+)</b> \((.)\), score × 1000", made.view.value)
    assert titles == [(kind, sign(scores, kind)) for kind in ("helpful", "harmful")]
    order = worst(scores, QUERY)
    check_cards(cards(made.view.value), [*order[::-1][:K], *order[:K]], scores)


def test_method_comparison(scores, pipeline, queries):
    pytest.importorskip("ipywidgets")
    target = TARGETS[scores.target]
    other = msif.GradientDot().fit(pipeline).score(queries, target=target)
    table = {"implicit": scores, "gradient": other}
    made = widgets.MethodComparison(pipeline, table, queries, k=K)
    assert made.widget is made.widget
    made.query_control.value = QUERY
    for row, one in zip(made.rows, table.values(), strict=False):
        assert row.places == worst(one, QUERY)[:K]
    for rank in (1, len(scores.ids)):
        made.rank_control.value = rank
        assert made.example == worst(scores, QUERY)[rank - 1]
        said = re.findall(r"(.)\d\.\d\de\S+ \((\w+)\)", made.answer.value)
        kinds = [word(one, made.example) for one in table.values()]
        assert said == [
            (sign(one, kind), kind) for one, kind in zip(table.values(), kinds, strict=True)
        ]
    axes = [ax for ax in made.static()[0].axes if ax.images]
    assert [axes[0].get_ylabel(), axes[K].get_ylabel()] == [
        "harmful by\nimplicit",
        "harmful by\ngradient",
    ]
    for first, one in ((0, scores), (K, other)):
        shown = [ax.get_xlabel() for ax in axes[first : first + K]]
        assert shown == [f"id {int(one.ids[place])}" for place in worst(one, QUERY)[:K]]
    space = {"pipeline": pipeline, "scores": table, "queries": queries}
    exec(made.code(), space)
    check_grid(space["figures"][0], scores)


def test_cleaning_explorer(scores, pipeline, queries):
    pytest.importorskip("ipywidgets")
    made = widgets.CleaningExplorer(pipeline, scores, queries, corrupted=[1, 4, 5], k=K)
    assert made.widget is made.widget
    made.flagged_control.value = 7
    order = worst(scores)
    assert made.removed == order[:7]
    first = next(ax for ax in made.static()[0].axes if ax.images)
    picture = plots.picture(pipeline.stages[0].data.x[order[0]])
    assert (first.images[0].get_array() == picture).all()
    space = {"pipeline": pipeline, "scores": scores, "queries": queries, "corrupted": [1, 4, 5]}
    exec(made.code(), space)
    assert space["removed"].tolist() == made.removed


def test_scatter_names_target_and_unit(scores, pipeline, queries):
    target = TARGETS[scores.target]
    subsets = [[i] for i in range(4)]
    effects = msif.removal_effects(pipeline, queries, subsets, target=target, progress=False)
    ax = plots.agreement_scatter(msif.agreement(scores, effects, resamples=2))
    unit = UNITS[scores.target]
    assert ax.get_xlabel() == f"predicted change in query {scores.target}, {unit}"
    assert ax.get_ylabel() == f"actual change after retraining, {unit}"


def test_the_rule_is_written_once():
    package = Path(msif.__file__).parent
    asks = re.compile(r"""[!=]= *["']margin["']""")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py")
             if asks.search(path.read_text(encoding="utf-8"))}  # fmt: skip
    assert found == {"influence/result.py", "objective/checks.py"}  # checks: a margin needs labels
