"""Pictures and sliders: what they show, and that they say what is wrong with their input."""

import pytest
import torch
from conftest import random_pipeline

import msif_lab as msif
from msif_lab import plots, widgets

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def texts(ax):
    return " ".join(text.get_text() for text in ax.texts)


@pytest.mark.parametrize(
    ("link", "words"),
    [(msif.Frozen(), "frozen"), (msif.Proximal(0.3), "held near, α = 0.3"), (msif.WarmStart(), "start here")],
    ids=["frozen", "proximal", "warm"],
)
def test_diagram_names_the_link(link, words):
    assert words in texts(plots.pipeline_diagram(random_pipeline(link=link, fit=False)))


def test_v_curve_draws_one_line_per_example():
    steps, errors = (1e-1, 1e-2, 1e-3), torch.tensor([[1e-2, 2e-2], [1e-4, 2e-4], [0.0, 1e-6]])
    ax = plots.v_curve(steps, errors, labels=["a", "b"])
    assert len(ax.lines) == 2 and ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert min(ax.lines[0].get_ydata()) > 0  # an exact zero still has a place on a logarithmic axis
    assert len(plots.v_curve(steps, errors[:, 0]).lines) == 1
    with pytest.raises(ValueError, match=r"errors \(2, 2\).*3 steps"):
        plots.v_curve(steps, errors[:2])


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

    slider = widgets.FigureSlider(counted, [1, 10, 100], "alpha", alt=lambda value: f"All about {value}")
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
