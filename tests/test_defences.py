"""Nothing half-moved, nothing NaN, and no name that breaks a page or a figure."""

import copy

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
from oracles import F64, draw
from torch import nn

import msif_lab as msif
from msif_lab import plots, widgets


class Rows(torch.utils.data.Dataset):
    """Read lazily, one row at a time."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def made(classes=None, names=("pre", "fine"), n=24, recipe=None):
    recipe = recipe or msif.SGD(0.1, epochs=2, batch_size=8)
    stages = []
    for k, name in enumerate(names):
        x = draw(n, 1, 4, 4, seed=k)
        data = msif.Examples(x, torch.arange(n) % 3, classes=classes)
        net = msif.mlp(16, (4,), classes=3, seed=k).double()
        link = msif.WarmStart() if k else None
        stages.append(msif.Stage(name, net, data, link=link, recipe=recipe))
    return msif.Pipeline(stages).fit(progress=False)


def test_lazily_read_queries_can_be_asked_about_by_retraining(tmp_path):
    p = made(names=("one",))
    x, y = draw(4, 1, 4, 4, seed=9), torch.arange(4) % 3
    lazy = msif.Examples.from_dataset(Rows(x, y))
    kept, at_once = (
        msif.removal_effects(p, q, [[0], [1]], store=tmp_path / name, progress=False)
        for name, q in (("lazy", lazy), ("plain", msif.Examples(x, y)))
    )
    assert torch.equal(kept.values, at_once.values)
    again = msif.removal_effects(p, lazy, [[1], [0]], store=tmp_path / "lazy", progress=False)
    assert torch.equal(again.values, kept.values.flip(1))
    with pytest.raises(msif.SavedFileError, match="other queries"):
        other = msif.Examples.from_dataset(Rows(2 * x, y))
        msif.removal_effects(p, other, [[0]], store=tmp_path / "lazy", progress=False)


# ---- Moving ----


class Stubborn(nn.Module):
    """A buffer of it refuses to be moved, after other tensors have been."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.register_buffer("kept", torch.ones(3, dtype=F64))
        self.last = nn.Linear(3, 2).double()
        self.stubborn = False

    def forward(self, x):
        return self.last(torch.tanh(self.first(x * self.kept)))

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        if self.stubborn:
            raise RuntimeError("this module does not move")
        return self


def state(p):
    tensors = [
        (id(t), t.dtype, t.clone())
        for s in p.stages
        for t in s.model.state_dict(keep_vars=True).values()
    ]
    return tensors, [id(s.data) for s in p.stages], [t.clone() for t in p.trained()]


@pytest.mark.parametrize("target", ["cuda:63", "meta", "stubborn"])
def test_a_move_that_fails_leaves_everything_as_it_was(target):
    stages = []
    for k in range(2):
        data = msif.Examples(draw(8, 3, seed=k), torch.arange(8) % 2)
        link = msif.WarmStart() if k else None
        recipe = msif.SGD(0.1, epochs=2)
        stages.append(msif.Stage("ab"[k], Stubborn(), data, link=link, recipe=recipe))
    p = msif.Pipeline(stages).fit(progress=False)
    queries = stages[1].data[:3]
    before, loss = state(p), p.evaluate(queries)
    stages[1].model.stubborn = target == "stubborn"
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        p.to(torch.float32 if target == "stubborn" else target)
    stages[1].model.stubborn = False
    after = state(p)
    for (i, dtype, values), (j, kind, now) in zip(before[0], after[0], strict=True):
        assert i == j and dtype == kind and torch.equal(values, now)
    assert before[1] == after[1]
    assert torch.equal(p.evaluate(queries), loss)
    assert p.reports is not None
    assert p.to(torch.float32).trained()[0].dtype == torch.float32  # and it can still be moved


# ---- NaN ----


def test_fit_never_writes_nan():
    """An overflow in the very last step, which no later step would see."""
    data = msif.Examples(torch.full((4, 2), 1e150, dtype=F64), torch.zeros(4, 1, dtype=F64))
    net = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(net.weight)
    before = net.weight.detach().clone()
    recipe = msif.SGD(1e20, momentum=0.0, epochs=1, batch_size=4)
    p = msif.Pipeline([msif.Stage("one", net, data, msif.mean_squared_error, recipe=recipe)])
    with pytest.raises(msif.NotConvergedError, match="NaN or inf at step 1"):
        p.fit(progress=False)
    assert torch.equal(net.weight, before)
    with pytest.raises(ValueError, match="not trained"):
        p.trained()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_that_are_nan_for_a_late_query_are_refused_by_name(bad):
    p = made()
    queries = msif.Examples(draw(30, 1, 4, 4, seed=5), torch.arange(30) % 3, torch.arange(100, 130))

    def target(z, y):
        return torch.where((z - last).abs().amax(1) < 1e-9, bad, z[:, 0])

    with torch.no_grad():
        last = p.stages[-1].model(queries.x[29:])
    words = r"target=target gives NaN or inf on the queries with ids \[129\]"
    for call in (
        lambda: msif.GradientDot().fit(p).score(queries, target=target),
        lambda: msif.UnrolledInfluence().fit(p, False).score(queries, target=target),
        lambda: msif.removal_effects(p, queries, [[0]], target=target, progress=False),
        lambda: p.evaluate(queries, target=target),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert p.evaluate(queries[:29], target=target).isfinite().all()


# ---- Names ----

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    r"$\frac{1$",
    "\ud800 half",
    "'\"><script>alert(1)</script>",
    "$$ & <b>",
]


def texts(widget):
    """All HTML in a widget and what it holds; other widgets show their values as plain text."""
    found = [widget.value] if isinstance(widget, ipywidgets.HTML | ipywidgets.HTMLMath) else []
    for child in getattr(widget, "children", ()):
        found += texts(child)
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_break_no_page_and_no_figure(name):
    p = made(classes=(name, "b", "c"), names=(name, "fine"))
    queries = copy.copy(p.stages[-1].data[:4])

    def target(z, y):
        return z[:, 0]

    target.__name__ = name
    scores = {
        name: msif.GradientDot().fit(p).score(queries, target=target),
        "other": msif.Loss().fit(p).score(queries, target=target),
    }
    effects = msif.removal_effects(p, queries, range(5), target=target, progress=False)
    pages = [
        queries._repr_html_(),
        scores[name]._repr_html_(),
        msif.agreement(scores[name], effects)._repr_html_(),
    ]
    one = widgets.InfluenceExplorer(p, scores[name], queries, k=2, target=target)
    cleaning = widgets.CleaningExplorer(p, scores, queries, k=2)
    methods = widgets.MethodComparison(p, scores, queries, k=2)
    for explorer in (one, cleaning, methods):
        pages += texts(explorer.widget)
        pages.append(explorer._repr_html_() if hasattr(explorer, "_repr_html_") else "")
    for page in pages:
        for raw in ("<img src=x", "<script>alert", "& <b>"):
            assert raw not in page
    plots.agreement_scatter(msif.agreement(scores[name], effects))
    plots.pipeline_diagram(p)
    plots.influence_grid(scores[name], p.stages[0].data, queries, 0, k=2)
    plots.method_intervals(msif.compare_methods(scores, {name: effects}))
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")
