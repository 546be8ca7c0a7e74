"""Pictures and sliders: what they show, and that they say what is wrong with their input."""

from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from oracles import random_model, random_pipeline, random_queries

import msif_lab as msif
from msif_lab import plots, widgets
from msif_lab.exercises import marking


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_figures_have_the_alt_texts_that_jupyterlab_sends_with_the_cell(monkeypatch):
    from IPython.core.formatters import DisplayFormatter

    parent = {
        "header": {"msg_id": "first run"},
        "metadata": {"alt": ['two <bars> & a "line"', "a circle"]},
    }
    shell = SimpleNamespace(get_parent=lambda: parent, display_formatter=DisplayFormatter())
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    before = dict(matplotlib.rcParams)
    plots.use_style()
    matplotlib.rcParams.update(before)
    figure, formatter = plt.figure(), shell.display_formatter.formatters["text/html"]
    said = [formatter(figure) for _ in range(3)]
    assert 'alt="two &lt;bars&gt; &amp; a &quot;line&quot;"' in said[0]
    assert 'alt="a circle"' in said[1]
    assert said[2] is None  # more figures than texts
    parent["header"], parent["metadata"] = {"msg_id": "second run"}, {"alt": "a circle"}
    assert formatter(figure) == said[1]
    parent["header"], parent["metadata"] = {"msg_id": "a cell without alt"}, {}
    assert formatter(figure) is None and formatter("no figure") is None


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


def test_diagram_names_the_link():
    for link, words in (
        (msif.Frozen(), "frozen"),
        (msif.Proximal(0.3), "held near, α = 0.3"),
        (msif.WarmStart(), "start here"),
    ):
        assert words in texts(plots.pipeline_diagram(random_pipeline(link=link, fit=False)))


def test_diagram_says_what_is_handed_over():
    shown = texts(plots.pipeline_diagram(random_pipeline(link=msif.Proximal(0.3), fit=False)))
    assert "W: 4×16 + 4\n68 shared" in shown and "all 78" in shown and "24 examples of 0–2" in shown
    deep = random_pipeline("cnn", link=msif.Frozen(), fit=False)
    shared = deep.functional(1).here["frozen"].size
    assert f"W: 4 blocks\n{shared} shared" in texts(plots.pipeline_diagram(deep))
    some = random_pipeline(link=msif.Frozen(shared=["embedding.1.weight"]), fit=False)
    assert "W: 4×16\n64 shared" in texts(plots.pipeline_diagram(some))


def test_diagram_shortens_the_names_of_classes():
    for names, said in (
        ((0, 1, 2, 3), "0–3"),
        ((4, 9), "4, 9"),
        ((1, 3, 5), "1, 3, 5"),
        (("bird", "frog"), "bird, frog"),
        (("automobile", "deer"), "2 classes"),
        (tuple(range(0, 40, 2)), "20 classes"),
    ):
        y = torch.arange(len(names)).repeat(20)
        x = torch.zeros(len(y), 1, 4, 4, dtype=torch.float64)
        model = random_model("mlp", len(names), seed=0)
        stage = msif.Stage("first", model, msif.Examples(x, y, classes=names))
        shown = texts(plots.pipeline_diagram(msif.Pipeline([stage])))
        assert f"{len(y)} examples of {said}\n" in shown


def large_pipeline():
    """A million parameters, a hundred thousand examples of many classes with long names."""
    names = tuple(f"kind {i} of automobile" for i in range(12))
    y = torch.arange(12).repeat(10_000)
    data = msif.Examples(torch.zeros(len(y), 1, dtype=torch.float64), y, classes=names)
    wide = [msif.mlp(1, hidden=(1200, 1200), classes=12).double() for _ in range(2)]
    stages = [msif.Stage(f"stage {k}", net, data) for k, net in enumerate(wide)]
    stages[1].link = msif.Proximal(0.0005)
    return msif.Pipeline(stages)


PIPELINES = {
    f"{k} stages": lambda k=k: random_pipeline(link=msif.Proximal(0.05), k=k, fit=False)
    for k in (1, 2, 3)
}


@pytest.mark.parametrize("make", [*PIPELINES.values(), large_pipeline], ids=[*PIPELINES, "large"])
def test_diagram_text_stays_in_its_place(make):
    """No text crosses another or leaves the picture, boxes hold theirs."""
    plots.use_style()
    ax = plots.pipeline_diagram(make())
    ax.figure.canvas.draw()
    places = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(places) for b in places[i + 1 :] if a.overlaps(b)]
    boxes = [patch.get_window_extent() for patch in ax.patches]
    for text in places:
        for box in boxes:
            inside = box.x0 < text.x0 and text.x1 < box.x1
            assert inside or not text.overlaps(box), "a text on the edge of a box"
    assert all(ax.figure.bbox.x0 <= text.x0 and text.x1 <= ax.figure.bbox.x1 for text in places)


# ---- For every reader: words besides colours, contrast, an opaque background ----


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour ``#rrggbb``, after WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


# The background of figures; of cells and outputs in JupyterLab's dark theme
WHITE, DARK = "#ffffff", ("#111111", "#212121")


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", WHITE) == pytest.approx(21.0)
    # the grey that is known to fail by a little
    assert contrast("#777777", WHITE) == pytest.approx(4.48, abs=0.01)
    assert contrast("#de8f05", WHITE) < 3, "seaborn's orange, which the rule must refuse"


def test_colours_can_be_read_as_text():
    for name in ("HELPFUL", "HARMFUL", "NEUTRAL"):
        assert contrast(getattr(plots, name), WHITE) >= 4.5, name


def test_lines_can_be_seen():
    plots.use_style()
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert len(colours) >= 4
    assert all(contrast(matplotlib.colors.to_hex(colour), WHITE) >= 3 for colour in colours)


# Linear (red, green, blue) as a dichromat sees it: Machado, Oliveira and Fernandes 2009, severity 1
DICHROMATS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LAB = torch.tensor([[0.0, 116, 0], [500, -500, 0], [0, 200, -200]])


def difference(a: str, b: str, seen_by: str) -> float:
    """Distance of two colours in CIE L*a*b* as a dichromat sees them; 100 is black from white."""
    colours = torch.tensor([matplotlib.colors.to_rgb(a), matplotlib.colors.to_rgb(b)])
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(DICHROMATS[seen_by]).T).clamp(0, 1)
    root = (seen @ (XYZ / XYZ.sum(1, keepdim=True)).T).clamp(min=0.008856) ** (1 / 3)
    return float(((root[0] - root[1]) @ LAB.T).norm())


def test_helpful_and_harmful_differ_for_colour_blind_readers():
    for seen_by in DICHROMATS:
        # the cube root is cut off near black
        assert difference("#ffffff", "#000000", seen_by) > 75, seen_by
        assert difference(plots.HELPFUL, plots.HARMFUL, seen_by) > 60, seen_by
        for colour in (plots.HELPFUL, plots.HARMFUL):
            assert difference(colour, plots.NEUTRAL, seen_by) > 20, (colour, seen_by)


def test_the_usual_red_and_green_look_alike_to_one_kind_of_them():
    assert difference("#c00000", "#607000", "deutan") < 25
    assert difference("#c00000", "#607000", "tritan") > 60


def test_verdict_signs_can_be_seen_in_both_themes():
    """Sign and bar are graphics, which need a contrast of 3; the message has the theme's colour."""
    for state, (_, colour) in marking.LOOK.items():
        for background in (WHITE, *DARK):
            assert contrast(colour, background) >= 3, (state, background)
    signs = {sign for sign, _ in marking.LOOK.values()}
    assert len(signs) == len(marking.LOOK), "signs differ without colour"


@pytest.fixture(scope="module")
def scored():
    pipeline = random_pipeline(link=msif.Proximal(0.3))
    queries = random_queries(pipeline)
    return pipeline, queries, msif.ImplicitInfluence().fit(pipeline).score(queries)


def test_grid_says_sign_and_kind_in_words(scored):
    pipeline, queries, scores = scored
    figure = plots.influence_grid(scores, pipeline.stages[0].data, queries, query=2, k=3)
    axes = figure.axes
    assert axes[0].get_title() == f"query: {queries.classes[int(queries.y[2])]}"
    assert [axes[1].get_ylabel(), axes[5].get_ylabel()] == ["helpful (−)", "harmful (+)"]
    for row, sign, ranking in ((1, "−", scores.helpful(3)), (5, "+", scores.harmful(3))):
        for column in range(3):
            value = float(ranking.values[2, column])
            assert axes[row + column].get_xlabel() == f"{sign}{abs(value) * 1e3:.1f}"
            label = pipeline.stages[0].data.y[ranking.positions[2, column]]
            assert axes[row + column].get_title() == f"label {int(label)}"


@pytest.fixture(scope="module")
def averaged():
    """Scores of 3 queries and 12 examples under 6 seeds; example i of query 0 is worth i − 5.5."""
    noise = torch.randn(6, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common = torch.arange(12) - 5.5
    ids = torch.arange(12) + 100
    about = ids, torch.arange(3), "pretrain", "loss", "by hand", ""
    per_seed = 1e-3 * (common + 2 * noise)
    return msif.InfluenceOverSeeds.of(per_seed, range(6), "mean", *about, origin={})


def test_bars_show_averages_intervals_and_single_seeds(averaged):
    ax = plots.score_bars(averaged, query=1, k=2)
    places = [
        *averaged.helpful(2).positions[1].tolist(),
        *averaged.harmful(2).positions[1].tolist(),
    ]
    assert set(places) & {0, 11}
    heights = torch.tensor([bar.get_height() for bar in ax.patches], dtype=torch.float64)
    assert torch.allclose(heights, 1e3 * averaged.values[1, places])
    low, high = (1e3 * end[1, places] for end in averaged.interval(0.95))
    ends = torch.stack([torch.tensor(part)[:, 1] for part in ax.collections[0].get_segments()])
    assert torch.allclose(ends.double(), torch.stack([low, high], 1))
    dots = torch.tensor(ax.lines[-1].get_ydata()).reshape(6, 4)
    assert torch.allclose(dots, 1e3 * averaged.per_seed[:, 1, places])
    colours = [
        matplotlib.colors.to_hex(bar.get_edgecolor(), keep_alpha=False) for bar in ax.patches
    ]
    assert colours == [plots.HELPFUL] * 2 + [plots.HARMFUL] * 2
    assert "helpful (−)" in ax.get_xlabel() and "thousandths of a nat" in ax.get_ylabel()


def test_bars_mark_the_signs_that_are_sure(averaged):
    sure = averaged.trusted()[0]
    assert bool(sure.any()) and not bool(sure.all())
    ax = plots.score_bars(averaged, k=6)
    named = {int(t.get_text()[:3]) - 100: "✓" in t.get_text() for t in ax.get_xticklabels()}
    assert len(named) == 12 and all(bool(sure[i]) == mark for i, mark in named.items())
    assert sorted(plots.extremes(averaged, 0, 12)) == list(range(12)), "none of them twice"
    bare = plots.score_bars(averaged.some([2]), k=6)  # one seed is sure of nothing
    assert not any("✓" in t.get_text() for t in bare.get_xticklabels())
    assert all(len({*part[:, 1]}) == 1 for part in bare.collections[0].get_segments())


def test_bars_have_pictures_below(averaged):
    data = msif.Examples(torch.rand(12, 1, 8, 8), torch.arange(12) % 2)
    ax = plots.score_bars(averaged, k=3, examples=data)
    ax.figure.canvas.draw()
    assert sum(isinstance(a, matplotlib.offsetbox.AnnotationBbox) for a in ax.artists) == 6
    names = [t.get_window_extent() for t in ax.get_xticklabels()]
    boxes = [a.get_window_extent() for a in ax.artists]
    assert not any(box.overlaps(name) for box in boxes for name in names)


def test_bars_say_what_is_wrong(averaged, scored):
    pipeline, _, one = scored
    with pytest.raises(TypeError, match=r"scores is Influence: .*AveragedInfluence"):
        plots.score_bars(one)
    for given, says in (
        ({"query": 3}, "query=3 must be a whole number between 0 and 2"),
        ({"k": 13}, "k=13"),
        ({"examples": pipeline.stages[0].data}, "examples are 24, the scores are of 12"),
        ({"examples": msif.Examples(torch.rand(12, 4), torch.zeros(12))}, "images"),
    ):
        with pytest.raises(ValueError, match=says):
            plots.score_bars(averaged, **given)


def test_reliability_curve_is_spearman_browns():
    found = {"scores": {1: 0.3, 4: 0.5}, "retraining": {2: 0.4}}
    ax = plots.reliability_curve(0.25, found, held_out=8, seeds=9)
    ideal, limited, scores, retraining = ax.lines
    count = torch.arange(1, 10, dtype=torch.float64)
    expected = (count * 0.25 / (1 + (count - 1) * 0.25)).sqrt()
    assert torch.allclose(torch.tensor(ideal.get_ydata()), expected)
    assert torch.allclose(torch.tensor(limited.get_ydata()), expected * expected[7])
    assert scores.get_xydata().tolist() == [[1, 0.3], [4, 0.5]]
    assert retraining.get_marker() != scores.get_marker() and ideal.get_linestyle() == "-"
    assert limited.get_linestyle() == "--"
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == [
        "predicted, against all seeds",
        "predicted, against 8 other seeds",
        "scores",
        "retraining",
    ]
    assert len(plots.reliability_curve(1.0).lines) == 1
    (mean,) = plots.reliability_curve(torch.tensor([0.25, 1.0, -0.1]), seeds=9).lines
    assert torch.allclose(torch.tensor(mean.get_ydata()), (expected + 1) / 3)
    for given, says in (
        (0.0, "=0.0"),
        (float("nan"), "=nan"),
        ([0.1, 2.0], r"=\[0.1, 2.0\]"),
        ("high", "='high'"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"reliability{says}"):
            plots.reliability_curve(given)
    with pytest.raises(ValueError, match="held_out=0"):
        plots.reliability_curve(0.5, held_out=0)


def test_scatter_says_r_and_slope(scored):
    pipeline, queries, scores = scored
    effects = msif.removal_effects(pipeline, queries, [[i] for i in range(8)], progress=False)
    report = msif.agreement(scores, effects)
    ax = plots.agreement_scatter(report, title="both")
    assert f"mean per-query r = {report.mean():.3f}" in texts(ax)
    assert f"slope = {report.mean('slope'):.2f}" in texts(ax)
    assert "nats" in ax.get_xlabel() and "nats" in ax.get_ylabel()
    assert ax.get_xlim() == ax.get_ylim() and ax.lines[0].get_linestyle() == "--"
    assert len(ax.collections[0].get_offsets()) == report.predicted.size


def test_pictures_are_opaque(scored, tmp_path):
    """In a dark theme black text on a transparent background is invisible."""
    plots.use_style()
    pipeline, queries, scores = scored
    figures = [
        plots.pipeline_diagram(pipeline).figure,
        plots.influence_grid(scores, pipeline.stages[0].data, queries, k=3),
        plots.v_curve([0.1, 0.01], [1e-2, 1e-4]).figure,
    ]
    for figure in figures:
        figure.savefig(tmp_path / "figure.png")
        picture = plt.imread(tmp_path / "figure.png")
        assert picture.shape[2] == 3 or (picture[..., 3] == 1).all()
        assert (picture[0, :, :3] == 1).all(), "white, and nothing cut off at the top"


def test_lines_of_v_curves_differ_without_colour():
    ax = plots.v_curve([0.1, 0.01], torch.full((2, 4), 0.5))
    styles = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(styles) == 4


def test_v_curve_draws_one_line_per_example():
    steps, errors = (1e-1, 1e-2, 1e-3), torch.tensor([[1e-2, 2e-2], [1e-4, 2e-4], [0.0, 1e-6]])
    ax = plots.v_curve(steps, errors, labels=["a", "b"])
    assert len(ax.lines) == 2 and ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert min(ax.lines[0].get_ydata()) > 0  # an exact zero still has a place on a logarithmic axis
    assert len(plots.v_curve(steps, errors[:, 0]).lines) == 1
    with pytest.raises(ValueError, match=r"errors \(2, 2\).*3 steps"):
        plots.v_curve(steps, errors[:2])


def test_filter_curves_are_the_two_formulas_and_stop_at_the_floor():
    ax = plots.filter_curves([-0.5, 0.01, 2.0], [0.1, 1.0], times=[5.0])
    spring, strong, descent, ticks = (torch.tensor(line.get_xydata()) for line in ax.lines)
    for line, alpha in ((spring, 0.1), (strong, 1.0)):
        assert torch.allclose(line[:, 1], 2 * alpha / (line[:, 0] + 2 * alpha))
    assert torch.allclose(descent[:, 1], torch.exp(-5 * descent[:, 0]))
    # below the floor there is no curve
    assert -0.2 < spring[:, 0].min() < 0 and strong[:, 0].min() < -0.45
    assert spring[:, 0].max() > 1.9 and ticks[:, 0].tolist() == [-0.5, 0.01, 2.0]
    styles = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(styles) == 4, "told apart without colours"
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] == "exp(−τs), τ = 5"
    assert ax.get_xscale() == "asinh"
    assert plots.filter_curves([0.1, 2.0], [1.0]).get_xscale() == "log"
    # one direction, no curve at all
    for eigenvalues, alphas in (([0.0], [0.1]), ([-1.0], [0.1]), ([0.1], [])):
        assert plots.filter_curves(eigenvalues, alphas).get_ylim()[0] > 0


def test_filter_curves_say_what_is_wrong():
    for given, times in (
        (([], [1.0]), ()),
        (([float("nan")], [1.0]), ()),
        (([1.0], [0.0]), ()),
        (([1.0], [1.0]), [-1.0]),
    ):
        with pytest.raises(ValueError, match="must be finite and at least one"):
            plots.filter_curves(*given, times=times)


def draw(value):
    figure, ax = plt.subplots()
    ax.set_title(f"value {value}")
    return figure


def test_figure_slider_without_a_kernel_and_with_one():
    slider = widgets.FigureSlider(draw, [1, 10, 100], "alpha", start=10)
    assert [f.axes[0].get_title() for f in slider.static()] == ["value 1", "value 10", "value 100"]
    assert [f.axes[0].get_title() for f in slider.static([100])] == ["value 100"]
    bundle = slider._repr_mimebundle_()
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert bundle["text/plain"] == repr(slider) == "FigureSlider: alpha, 3 settings from 1 to 100"
    control = slider.widget.children[0]
    assert (control.description, control.value) == ("alpha", 10)
    first = slider.plot.value
    assert 'alt="Figure for alpha 10"' in first and slider.code() == "figure = draw(10)"
    control.value = 100
    assert slider.plot.value != first and slider.code() == "figure = draw(100)"


def test_figure_slider_draws_each_setting_once():
    drawn = []

    def counted(value):
        drawn.append(value)
        return draw(value)

    slider = widgets.FigureSlider(
        counted, [1, 10, 100], "alpha", alt=lambda value: f"All about {value}"
    )
    slider._repr_mimebundle_()
    assert sorted(drawn) == [1, 10, 100], "all before the slider moves"
    for value in (10, 100, 1, 10):
        slider.control.value = value
        assert f'alt="All about {value}"' in slider.plot.value
    assert len(drawn) == 3 and plt.get_fignums() == []
    drawn.clear()
    widgets.FigureSlider(counted, [1, 10, 100], "alpha", precompute=False)._repr_mimebundle_()
    assert drawn == [1]


def test_figure_slider_shows_what_went_wrong():
    def fails(value):
        if value == 10:
            raise RuntimeError("no figure for ten")
        return draw(value)

    slider = widgets.FigureSlider(fails, [1, 10], "alpha", precompute=False)
    slider.widget.children[0].value = 10
    assert "no figure for ten" in slider.error.outputs[0]["text"]
    slider.control.value = 1
    assert slider.error.outputs == ()


def test_figure_slider_says_what_is_wrong():
    with pytest.raises(ValueError, match="values is empty"):
        widgets.FigureSlider(draw, [], "alpha")
    with pytest.raises(ValueError, match="start=3 is not one of"):
        widgets.FigureSlider(draw, [1, 2], "alpha", start=3)
