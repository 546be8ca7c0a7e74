"""The lessons and explorers in a real JupyterLab, driven by its menus, by keys and by clicks.

MSIF_EVERY_LESSON=1 runs every notebook, not only the quick ones; MSIF_SCREENSHOTS=folder saves
pictures of the notebooks there.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import lab
import nbformat
import pytest
from lesson_runs import copied, runner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

import msif_lab as msif

pytest.importorskip(
    "playwright.sync_api", reason='no Playwright; install it with pip install -e ".[test]"'
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        lab.chromium() is None, reason="no Chromium; install it with apt-get install chromium"
    ),
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
    nbformat.write(BROKEN, folder / "broken.ipynb")
    return folder


@pytest.fixture(scope="module")
def chrome():
    # Closed after this file: nbclient, in other files, cannot run beside Playwright's event loop.
    with lab.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(notebooks, chrome, tmp_path_factory):
    """``opened(name)`` opens a notebook of one server for all tests here."""
    with lab.server(notebooks, tmp_path_factory.mktemp("server")) as address:
        yield lambda name: lab.Student(
            chrome.new_page(viewport={"width": 1300, "height": 1000}), address, name
        )


@pytest.fixture(scope="module")
def running(opened, request):
    """``running(name)`` gives a notebook with all its cells started, by the menu.

    The next one that the tests need is started as well: two kernels for two cores.
    """
    names = []
    for item in request.session.items:
        if "running" in getattr(item, "fixturenames", ()):
            lesson = item.callspec.params.get("path") if hasattr(item, "callspec") else None
            names.append(lesson.name if lesson else "explorers.ipynb")
    names = list(dict.fromkeys(names))
    started = {}

    def student(name: str):
        place = names.index(name)
        for needed in names[place : place + 2]:
            if needed not in started:
                started[needed] = opened(needed)
                screenshot(started[needed], "as_committed")
                started[needed].start()
        return started[name]

    return student


def screenshot(student, label: str):
    """Save a picture if they are asked for: drawing a page of 16,000 pixels takes seconds."""
    if folder := os.environ.get("MSIF_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        student.screenshot(Path(folder) / f"{Path(student.name).stem}-{label}.png")


@pytest.fixture
def report(record_property, capsys):
    """Say a measured figure in the log, even where pytest captures, and in the results file."""

    def say(what: str, value):
        record_property(what, value)
        with capsys.disabled():
            print(f"\n    {what}: {value}", end="")

    return say


# ---- What these tests look for is found ----

FLAWED = """
from IPython.display import HTML
HTML("<div id='flawed'>"
     "<p style='color:#999; background:#fff'>pale</p>"
     "<p style='color:#000; background:#fff'>dark</p>"
     "<button></button><button disabled></button><label>Age <input></label>"
     "<img src='data:image/png;base64,AAAA'></div>")
"""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDE = f"$${'x+' * 60}x$$"
BROKEN = new_notebook(
    cells=[
        new_markdown_cell(f"# One\n### Three\n{WIDE}"),
        *map(new_code_cell, (FLAWED, 'print("model not found")', "1 / 0", "2")),
    ],
    metadata={"kernelspec": KERNEL},
)


def test_flaws_are_found(opened, tmp_path):
    student = opened("broken.ipynb").start().wait()
    try:
        student.page.locator("mjx-math").wait_for()
        error, *others = student.problems()
        assert "ZeroDivisionError" in error
        assert others[:2] == ["the page says 'model not found'", "1 code cells did not run"]
        assert others[2].startswith("a formula is cut off in the cell 'One")
        assert others[3:] == ["1 pictures are empty"] and student.silent() == 1
        assert skipped_levels(student.page.locator(lab.NOTEBOOK)) == ["Three"]
        student.screenshot(tmp_path / "broken.png")
        with Image.open(tmp_path / "broken.png") as picture:
            assert picture.height > 1000, "the whole notebook, not only what the window shows"
        flawed = student.page.locator("#flawed")
        ratios = {text: ratio for ratio, text in flawed.evaluate(lab.CONTRASTS)}
        assert ratios["pale"] == pytest.approx(2.85, abs=0.01)
        assert ratios["dark"] == pytest.approx(21)
        assert [(c["what"], c["name"]) for c in flawed.evaluate(lab.CONTROLS)] == [
            ("button", ""),
            ("input", "Age"),
        ]
    finally:
        student.close()


# ---- Lessons ----


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_lesson_runs_from_the_menu(path, running):
    cells = nbformat.read(path, as_version=4).cells
    live = sum("live-widget" in cell.metadata.get("tags", []) for cell in cells)
    student = running(path.name)
    try:
        student.wait()
        screenshot(student, "after_run")
        assert student.problems() == [] and student.silent() == 0
        shown = student.page.locator(lab.CODE_CELL, has=student.page.locator(".jupyter-widgets"))
        assert shown.count() >= live
        assert skipped_levels(student.page.locator(lab.NOTEBOOK)) == []
    finally:
        student.close()


def skipped_levels(root) -> list[str]:
    """Headings that are more than one level below the one before."""
    headings = root.locator(":is(h1, h2, h3, h4, h5, h6)")
    levels = headings.evaluate_all("all => all.map(h => [+h.tagName[1], h.innerText])")
    return [title for (before, _), (level, title) in pairwise(levels) if level > before + 1]


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_exported_page_shows_pictures(path, chrome, tmp_path):
    """As the template "lab", which looks like JupyterLab, and as "classic" for the alt texts."""
    cells = nbformat.read(path, as_version=4).cells
    figures = [out for cell in cells for out in cell.get("outputs", []) if is_figure(out)]
    for template in ("lab", "classic"):
        page, errors = exported(path, template, chrome, tmp_path)
        pictures = page.locator("body img[src^='data:']").evaluate_all(
            "all => all.map(i => [i.naturalWidth, i.alt])"
        )
        text = page.locator("body").inner_text()
        skipped = skipped_levels(page.locator("body"))
        page.close()

        assert len(pictures) >= len(figures), template
        assert all(width > 0 for width, _ in pictures), template
        assert [words for words in lab.BROKEN if words in text] == [], template
        assert errors == [], template
        assert skipped == [], template
        # Only "classic" passes on the alt text of a PNG output.
        missing = sum(not alt or alt.startswith("No description") for _, alt in pictures)
        assert missing <= (len(figures) if template == "lab" else 0), template
        if template == "classic":
            alts = {alt for _, alt in pictures}
            assert {out.metadata["image/png"]["alt"] for out in figures} <= alts


def exported(path: Path, template: str, chrome, folder: Path):
    """A notebook's HTML page, opened without a network, and the list of its errors."""
    from nbconvert import HTMLExporter

    html = folder / f"{path.stem}_{template}.html"
    html.write_text(HTMLExporter(template_name=template).from_filename(path)[0], encoding="utf-8")
    page = chrome.new_page()
    errors = []

    def keep(error):
        # MathJax and RequireJS would come from the network.
        if not any(name in str(error) for name in ("require", "MathJax")):
            errors.append(str(error))

    page.on("pageerror", keep)
    page.route("http**", lambda route: route.abort())
    page.goto(html.as_uri())
    page.wait_for_load_state()
    return page, errors


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
pretraining = train.select(classes=range(4), n=120, seed=0)
finetuning = train.select(classes=range(4, 10), n=80, seed=0)


def trained(link, **recipe):
    nets = msif.mlp(64, hidden=(8,), classes=4), msif.mlp(64, hidden=(8,), classes=6)
    before = msif.Stage("pretrain", nets[0], pretraining, weight_decay=1e-2, **recipe)
    after = msif.Stage("finetune", nets[1], finetuning, weight_decay=1e-2, link=link, **recipe)
    return msif.Pipeline([before, after]).double().fit(progress=False)


pipelines = {"frozen": trained(msif.Frozen()), "full": trained(msif.Proximal(alpha=0.05))}
influence = msif.ImplicitInfluence(leave_one_out=True)
scores = {case: influence.fit(pipeline).score(queries) for case, pipeline in pipelines.items()}
corrupted = range(12)
full, full_scores = pipelines["full"], scores["full"]
methods = {"loss": msif.Loss().fit(full).score(queries), "implicit": full_scores}
short = trained(msif.WarmStart(), recipe=msif.SGD(lr=0.1, epochs=2))
runs = msif.over_seeds(short, 6, progress=False)
averaged = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs)
averaged = averaged.score(queries, progress=False)
slow = trained(msif.Frozen(), recipe=msif.SGD(lr=0.1, epochs=1500))
slow_scores = influence.fit(slow).score(queries)
"""

DRAW = """
def draw(value):
    if value == 7:
        raise ValueError("seven is not drawn")
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([0, value])
    return figure
"""

LIVE = {
    "slider": 'widgets.FigureSlider(draw, [1, 2, 3, 4, 5, 6], "Value")',
    "influence": "widgets.InfluenceExplorer(pipelines, scores, queries)",
    "damping": "widgets.AlphaDampingExplorer(full, queries)",
    "methods": "widgets.MethodComparison(full, methods, queries)",
    "cleaning": "widgets.CleaningExplorer(full, full_scores, queries, corrupted=range(12))",
    "seeds": "widgets.SeedExplorer(runs, averaged, queries).pick(seeds=2)",
    "failing": 'widgets.FigureSlider(draw, [6, 7], "Value", precompute=False)',
    "slow": "widgets.InfluenceExplorer(slow, slow_scores, queries)",
}
EXPLORERS = new_notebook(
    cells=[new_code_cell(source.strip()) for source in (SETUP, DRAW, *LIVE.values(), "# room")],
    metadata={"kernelspec": KERNEL},
)
each_explorer = pytest.mark.parametrize(
    "kind", [kind for kind in LIVE if kind not in ("failing", "slow")]
)


@pytest.fixture(scope="module")
def explorers(running):
    student = running("explorers.ipynb").wait()
    assert student.problems() == []
    yield student
    screenshot(student, "at_the_end")
    student.close()


@pytest.fixture
def explorer(explorers):
    """Find an explorer in the page by its kind."""
    return lambda kind: explorers.page.locator(".msif-explorer").nth(list(LIVE).index(kind))


SLIDERS = {
    "slider": ["value"],
    "influence": ["query"],
    "damping": ["alpha", "damping", "query"],
    "methods": ["query", "rank"],
    "cleaning": ["flagged"],
    "seeds": ["seeds", "query"],
}


@each_explorer
def test_sliders_redraw(explorer, report, kind):
    root = explorer(kind)
    for name in SLIDERS[kind]:
        handle = root.locator(f".msif-{name}").get_by_role("slider")
        root.evaluate(lab.WATCH)
        for key in ["End", *["ArrowLeft"] * 3]:
            handle.press(key)
            wait_for(root, lab.REDRAWN)
        redraws = root.evaluate("e => e.redraws")
        median = round(statistics.median(redraws))
        report(f"{kind}, {name}: redraw, median ms of {len(redraws)}", median)
        assert error_of(root) == "", name


def wait_for(root, condition: str, given=None):
    """Wait until ``condition``, a JavaScript function of the element and of ``given``, is true."""
    element = root.element_handle()
    root.page.wait_for_function(condition, arg=element if given is None else [element, given])


def pictures(root) -> list[str]:
    return root.locator("img").evaluate_all("all => all.map(i => i.src)")


def error_of(root) -> str:
    return root.locator(".msif-error").inner_text().strip()


def test_error_stays_in_sight_until_the_next_success(explorer):
    root = explorer("failing")
    handle = root.get_by_role("slider")
    handle.press("End")
    root.locator(".msif-error", has_text="ValueError: seven is not drawn").wait_for()
    handle.press("ArrowLeft")
    wait_for(root.locator(".msif-error"), "e => !e.innerText.trim()")


def film_of(root):
    """The row of queries."""
    return root.locator(".msif-cards", has=root.page.locator(".msif-query-image"))


# The row shows a page of the members; the view, which follows it, the query that is marked there.
# A click before that would hit whatever comes to stand there.
ARRIVED = """([e, members]) => {
  const film = [...e.querySelectorAll('.msif-cards')]
    .find(cards => cards.querySelector('.msif-query-image'));
  const buttons = [...film.querySelectorAll('.msif-query-image')].filter(b => b.checkVisibility());
  const shown = buttons.map(b => Number(b.textContent.match(/\\d+/)[0]));
  const start = members.indexOf(shown[0]);
  const marked = film.querySelectorAll('img')[buttons.findIndex(b => b.textContent.endsWith('✓'))];
  return start % 8 === 0 && shown.join() === members.slice(start, start + 8).join()
    && marked?.alt === e.querySelector('.msif-view img').alt;
}"""


def show_queries(root, group: str) -> list[int]:
    """Choose a group from the list and wait for all of the view; returns the group's queries."""
    # As in SETUP.
    labels = msif.load_digits()[1].select(classes=range(4, 10), n=30).y.tolist()
    members = [q for q, y in enumerate(labels) if group in ("all", f"label {y + 4}")]
    groups = root.locator(".msif-queries select")
    # They are written with no-break spaces.
    options = [" ".join(text.split()) for text in groups.locator("option").all_text_contents()]
    groups.select_option(index=options.index(f"{group} ({len(members)})"))
    wait_for(root, ARRIVED, members)
    return members


def wait_for_query(root, query: int, members: list[int]) -> None:
    """Wait until this query is marked in the row of ``members`` and shown in the view."""
    film_of(root).locator(".msif-query-image", has_text=f"query {query} ✓").wait_for()
    wait_for(root, ARRIVED, members)


def test_query_is_picked_by_list_and_by_picture(explorer):
    root = explorer("influence")
    sevens = show_queries(root, "label 7")
    shown = film_of(root).locator(".msif-query-image", has_text="✓").inner_text()
    other = next(q for q in sevens if shown != f"query {q} ✓")
    film_of(root).get_by_text(f"query {other}", exact=True).click()
    wait_for_query(root, other, sevens)
    show_queries(root, "all")
    assert error_of(root) == ""


def test_case_changes_the_examples_there_and_back(explorer):
    root = explorer("influence")
    examples = "[...e.querySelectorAll('.msif-example')].map(b => b.textContent).join()"
    before = ",".join(root.locator(".msif-example").all_text_contents())
    for case, relation in (("full", "!=="), ("frozen", "===")):
        root.locator(".msif-case select").select_option(label=case)
        wait_for(root, f"([e, old]) => {examples} {relation} old", before)
    assert error_of(root) == ""


def click_picture(page, picture) -> None:
    """Click where the picture is, whatever lies over it."""
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_click_on_a_picture_picks_the_query(explorer):
    root = explorer("influence")
    queries = show_queries(root, "all")
    root.locator(".msif-query").get_by_role("slider").press("Home")
    wait_for_query(root, 0, queries)
    for place in (3, 0, 7):
        click_picture(root.page, film_of(root).locator("img").nth(place))
        wait_for_query(root, place, queries)
    assert error_of(root) == ""


def test_image_is_clicked_removed_and_retrained(explorer, report):
    root = explorer("influence")
    harmful = root.locator(".msif-cards", has=root.page.locator(".msif-example")).last
    click_picture(root.page, harmful.locator("img").nth(1))
    chosen = harmful.locator(".msif-example").nth(1)
    root.locator(".msif-answer", has_text="not retrained yet").wait_for()
    name, mark = chosen.inner_text().rsplit(" ", 1)
    assert mark == "✓" and name in root.locator(".msif-answer").inner_text()
    start = time.perf_counter()
    root.locator(".msif-retrain").click()
    root.locator(".msif-status", has_text="done in").wait_for()
    report(
        "one example removed and both stages retrained, s", round(time.perf_counter() - start, 1)
    )
    predicted, actual = numbers(root.locator(".msif-answer tr", has_text="this query"))
    assert "not retrained yet" not in root.locator(".msif-answer").inner_text()
    # Removing one of 120 examples is a large step. The tests of influence are stricter.
    assert 1 / 3 < predicted / actual < 3
    assert "actual" in root.locator(".msif-plot img").get_attribute("alt")
    assert error_of(root) == ""


def numbers(row) -> list[float]:
    """The numbers in the cells of a table's row, with real minus signs."""
    return [float(text.replace("−", "-")) for text in row.locator("td").all_inner_texts()]


def test_stop_takes_effect_and_leaves_the_explorer_usable(explorer, report):
    root = explorer("slow")
    root.locator(".msif-example:visible").first.click()
    stop, retrain = root.locator(".msif-stop"), root.locator(".msif-retrain")
    assert stop.is_disabled()
    retrain.click()
    root.locator(".msif-status", has_text="retraining").wait_for()  # the busy indicator
    start = time.perf_counter()
    stop.click()
    root.locator(".msif-status", has_text="stopped: nothing was changed").wait_for()
    report("stop takes effect after, s", round(time.perf_counter() - start, 2))
    assert "not retrained yet" in root.locator(".msif-answer").inner_text()
    assert stop.is_disabled() and retrain.is_enabled()
    assert error_of(root) == ""


def test_methods_are_picked(explorer):
    root = explorer("methods")
    before = pictures(root)
    root.locator(".msif-method-a select").select_option(label="implicit")
    root.locator(".msif-method-b select").select_option(label="loss")
    wait_for(
        root,
        "([e, old]) => [...e.querySelectorAll('img')].map(i => i.src).join() !== old",
        ",".join(before),
    )
    assert error_of(root) == ""


def test_cleaning_refits(explorer):
    root = explorer("cleaning")
    root.locator(".msif-flagged").get_by_role("slider").press("ArrowRight")
    root.locator(".msif-retrain").click()
    root.locator(".msif-status", has_text="done in").wait_for()
    assert "not retrained yet" not in root.locator(".msif-answer").inner_text()
    tried = root.locator(".msif-history tr", has_text="(in view)")
    predicted, actual, *_ = numbers_with_errors(tried)
    assert predicted and actual and root.locator(".msif-history tr").count() == 2
    root.locator(".msif-flagged").get_by_role("slider").press("ArrowRight")
    root.locator(".msif-answer", has_text="not retrained yet").wait_for()
    tried.wait_for(state="detached")
    assert error_of(root) == ""


def numbers_with_errors(row) -> list[float]:
    """As `numbers`, without what follows the first number of a cell."""
    texts = row.locator("td").all_inner_texts()
    return [float(text.replace("−", "-").split()[0].rstrip("%")) for text in texts]


def test_waiting_for_the_kernel_is_seen(explorers, explorer):
    """While a cell runs, and only then."""
    waiting = explorer("cleaning").locator(".msif-waiting i")
    assert waiting.count() == 1 and not waiting.is_visible()
    explorers.start_code("import time; time.sleep(6)")
    waiting.wait_for(state="visible")
    waiting.wait_for(state="hidden")
    explorers.run_code("# room")


def test_code_of_the_view_runs_where_it_is_pasted(explorers, explorer):
    problems = {}
    for kind in ("influence", "damping", "methods", "cleaning"):
        root = explorer(kind).locator(".msif-code")
        text = root.locator("textarea")
        root.get_by_role("button").click()
        wait_for(text, "e => e.value")
        explorers.run_code(text.input_value())
        root.get_by_role("button").click()
        text.wait_for(state="hidden")
        if found := explorers.problems():
            problems[kind] = found
    assert not problems


# ---- For everyone ----


@each_explorer
def test_explorer_is_accessible(explorer, kind):
    """Controls have names, pictures alt texts; Tab reaches every control, and leads out."""
    root = explorer(kind)
    controls = root.evaluate(lab.CONTROLS)
    assert controls and [c for c in controls if not c["name"] or not c["focusable"]] == []
    alts = root.locator("img").evaluate_all("all => all.map(i => i.alt)")
    assert alts and all(alts), alts
    assert skipped_levels(root) == []

    missed = set(range(root.evaluate(lab.STOPS)))
    root.evaluate("e => e.stops[0].focus()")
    for _ in range(2 * len(missed)):
        missed.discard(root.evaluate("e => e.stops.indexOf(document.activeElement)"))
        root.page.keyboard.press("Tab")
        if not root.evaluate("e => e.contains(document.activeElement)"):
            break
    else:
        pytest.fail("Tab does not lead out")
    assert missed == set()


def test_text_can_be_read_in_both_themes(explorers):
    page = explorers.page
    for theme in ("Dark", "Light"):
        explorers.menu("Settings", "Theme", f"JupyterLab {theme}")
        light = str(theme == "Light").lower()
        page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{light}'")
        texts = [
            text
            for root in page.locator(".msif-explorer").all()
            for text in root.evaluate(lab.CONTRASTS)
        ]
        assert len(texts) > 50
        pale = sorted((round(ratio, 1), text) for ratio, text in texts if ratio < READABLE)
        assert pale == [], theme
        screenshot(explorers, theme.lower())
