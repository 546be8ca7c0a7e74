"""The lessons and explorers in a real JupyterLab: run by the menu, moved by keys and clicks, read from the page.

MSIF_EVERY_LESSON=1 runs every notebook, not only the quick ones; MSIF_SCREENSHOTS=folder keeps the pictures.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import lab
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_notebooks import copied, runner

pytest.importorskip("playwright.sync_api", reason='no Playwright; install it with pip install -e ".[test]"')
pytestmark = [
    pytest.mark.skipif(lab.chromium() is None, reason="no Chromium; install it with apt-get install chromium"),
    pytest.mark.skipif(sys.platform == "win32", reason="the server's process group is a POSIX one"),
]

EVERY = runner.lessons()
QUICK = [p for p in EVERY if p.name.startswith(("00", "11", "index"))]
RUN = EVERY if os.environ.get("MSIF_EVERY_LESSON") else QUICK
READABLE = 4.5  # WCAG AA for text of ordinary size

# ---- One server and one browser for all tests here ----


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory) -> Path:
    folder = copied(tmp_path_factory.mktemp("lab"))
    nbformat.write(EXPLORERS, folder / "explorers.ipynb")
    return folder


@pytest.fixture(scope="module")
def chrome():
    with lab.browser() as browser:  # closed after this file: nbclient, in others, cannot run beside it
        yield browser


@pytest.fixture(scope="module")
def opened(notebooks, chrome, tmp_path_factory):
    """Open a notebook by name; all are closed at the end."""
    folder = tmp_path_factory.mktemp("server")
    with lab.server(notebooks, folder) as address:
        shots = Path(os.environ.get("MSIF_SCREENSHOTS") or folder / "screenshots")
        yield lambda name: lab.Student(chrome.new_page(viewport={"width": 1300, "height": 1000}), address, name, shots)


@pytest.fixture
def report(record_property, capsys):
    """Say a measured figure: in the log, whatever pytest captures, and in the results file."""

    def say(what: str, value):
        record_property(what, value)
        with capsys.disabled():
            print(f"\n    {what}: {value}", end="")

    return say


# ---- Lessons ----


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_lesson_runs_from_the_menu(path, opened, report):
    live = sum("live-widget" in c.metadata.get("tags", []) for c in nbformat.read(path, as_version=4).cells)
    student = opened(path.name)
    try:
        student.screenshot("as_committed")
        start = time.perf_counter()
        student.run_all(minutes=15)
        report(f"{path.stem} run from the menu, s", round(time.perf_counter() - start))
        student.screenshot("after_run")
        assert student.problems() == []
        assert student.page.locator(".msif-explorer").count() >= live
        assert skipped_levels(student.page.locator(".jp-Notebook")) == []
    finally:
        student.close()


def skipped_levels(root) -> list[str]:
    """Headings that are more than one level below the one before."""
    levels = root.locator(":is(h1, h2, h3, h4, h5, h6)").evaluate_all(
        "all => all.map(h => [+h.tagName[1], h.innerText])"
    )
    pairs = zip(levels, levels[1:], strict=False)
    return [title for (before, _), (level, title) in pairs if level > before + 1]


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_exported_page_shows_pictures(path, chrome, tmp_path):
    from nbconvert import HTMLExporter

    html = tmp_path / f"{path.stem}.html"
    html.write_text(HTMLExporter().from_filename(path)[0], encoding="utf-8")
    page, errors = chrome.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("http**", lambda route: route.abort())  # the same with a network as without
    try:
        page.goto(html.as_uri())
        page.wait_for_load_state()
        pictures = page.locator("main img[src^='data:']").evaluate_all("all => all.map(i => [i.naturalWidth, i.alt])")
        figures = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", []) if is_figure(o)]
        assert len(pictures) >= len(figures)
        assert all(width > 0 for width, _ in pictures)
        # Neither nbconvert nor JupyterLab passes on the alt text of a PNG output; those in HTML are ours to give.
        assert all(out.metadata["image/png"]["alt"] for out in figures)
        assert sum(not alt or alt.startswith("No description") for _, alt in pictures) <= len(figures)
        text = page.locator("main").inner_text()
        assert [words for words in lab.BROKEN if words in text] == []
        # MathJax and RequireJS come from the network.
        assert [e for e in errors if "require" not in e and "MathJax" not in e] == []
        assert skipped_levels(page.locator("main")) == []
    finally:
        page.close()


def is_figure(out) -> bool:
    data = out.get("data", {})
    return "image/png" in data and "text/html" not in data


# ---- Explorers ----

SETUP = """
import matplotlib.pyplot as plt
import msif_lab as msif
from msif_lab import widgets

train, test = msif.load_digits()
queries = test.select(classes=range(4, 10), n=30).double()

def trained(link, recipe=msif.LBFGS()):
    pretraining = train.select(classes=range(4), n=120, seed=0)
    finetuning = train.select(classes=range(4, 10), n=80, seed=0)
    stages = [
        msif.Stage("pretrain", msif.mlp(64, hidden=(8,), classes=4), pretraining, weight_decay=1e-2, recipe=recipe),
        msif.Stage("finetune", msif.mlp(64, hidden=(8,), classes=6), finetuning, weight_decay=1e-2, link=link, recipe=recipe),
    ]
    return msif.Pipeline(stages).double().fit(progress=False)

pipelines = {"frozen": trained(msif.Frozen()), "full": trained(msif.Proximal(alpha=0.05))}
scores = {case: msif.ImplicitInfluence().fit(p).score(queries) for case, p in pipelines.items()}
"""

DRAW = """
def draw(value):
    if value == 5:
        raise ValueError("five is not drawn")
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([0, value])
    return figure
"""


def notebook(*cells: str) -> nbformat.NotebookNode:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=[new_code_cell(c.strip()) for c in cells], metadata={"kernelspec": kernel})


EXPLORERS = notebook(
    SETUP,
    DRAW,
    'widgets.FigureSlider(draw, [1, 2, 3, 4, 5, 6], "Value")',
    "widgets.InfluenceExplorer(pipelines, scores, queries)",
)


@pytest.fixture(scope="module")
def explorers(opened):
    student = opened("explorers.ipynb").run_all()
    assert student.problems() == []
    yield student
    student.screenshot("at_the_end")
    student.close()


def test_slider_by_keys(explorers, report):
    explorer = explorers.page.locator(".msif-slider")
    report("FigureSlider redraw, median ms", median_redraw(explorer, explorer.get_by_role("slider"), 3))


def median_redraw(explorer, control, steps: int, key: str = "ArrowRight") -> float:
    """Milliseconds from pressing ``key`` on ``control`` to the new picture; each step must bring one."""
    explorer.evaluate(lab.WATCH)
    for done in range(steps):
        control.press(key)
        explorer.page.wait_for_function("([e, n]) => e.redraws.length > n", arg=[explorer.element_handle(), done])
    return round(statistics.median(explorer.evaluate("e => e.redraws")))
