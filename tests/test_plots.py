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


def test_filter_curves_are_the_two_formulas_and_stop_at_the_floor():
    ax = plots.filter_curves([-0.5, 0.01, 2.0], [0.1, 1.0], times=[5.0])
    spring, strong, descent, ticks = (torch.tensor(line.get_xydata()) for line in ax.lines)
    for line, alpha in ((spring, 0.1), (strong, 1.0)):
        assert torch.allclose(line[:, 1], 2 * alpha / (line[:, 0] + 2 * alpha))
    assert torch.allclose(descent[:, 1], torch.exp(-5 * descent[:, 0]))
    assert -0.2 < spring[:, 0].min() < 0 and strong[:, 0].min() < -0.45, "below the floor there is no curve"
    assert spring[:, 0].max() > 1.9 and ticks[:, 0].tolist() == [-0.5, 0.01, 2.0]
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 4, "told apart without colours"
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] == "exp(−τs), τ = 5"
    assert ax.get_xscale() == "asinh" and plots.filter_curves([0.1, 2.0], [1.0]).get_xscale() == "log"
    for eigenvalues, alphas in (([0.0], [0.1]), ([-1.0], [0.1]), ([0.1], [])):  # one direction, no curve at all
        assert plots.filter_curves(eigenvalues, alphas).get_ylim()[0] > 0


@pytest.mark.parametrize(
    ("given", "times"),
    [(([], [1.0]), ()), (([float("nan")], [1.0]), ()), (([1.0], [0.0]), ()), (([1.0], [1.0]), [-1.0])],
)
def test_filter_curves_say_what_is_wrong(given, times):
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
    control.value = 100


def test_figure_slider_says_what_is_wrong():
    with pytest.raises(ValueError, match="values is empty"):
        widgets.FigureSlider(draw, [], "alpha")
    with pytest.raises(ValueError, match="start=3 is not one of"):
        widgets.FigureSlider(draw, [1, 2], "alpha", start=3)
