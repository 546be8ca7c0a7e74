"""The lessons: how they are built (L0), that they run as shipped (L1), that the solutions of their
exercises are right (L2), and that known mistakes get their hints (L3).

Each lesson is executed once, for L1 to L3 together, two lessons at a time.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from lesson_runs import INSERTED, NOTEBOOKS, LessonRuns, Run, copied, runner, script
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import (
    MAX_BYTES,
    exercise_cells,
    index_problems,
    relative_links,
    structure_problems,
)
from PIL import Image

from msif_lab.exercises import EXERCISES

# Bytes. Binder guarantees 1 GB and kills at 2. A CUDA build of PyTorch, which loads 300 MB more,
# has to fit as well.
MAX_MEMORY = 1.2e9

links = script("links")

INDEX = NOTEBOOKS / "index.ipynb"
LESSONS = [p for p in runner.lessons() if p.name[:2].isdigit()]
NUMBERS = {p.name[:2] for p in LESSONS}
each_notebook = pytest.mark.parametrize("path", [*LESSONS, INDEX], ids=lambda p: p.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


WITH_EXERCISES = [p for p in LESSONS if exercise_cells(read(p))]
each_with_exercises = pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: p.stem)


# ---- L0: the files ----


def test_there_are_lessons():
    assert LESSONS, f"no notebooks named NN_*.ipynb in {NOTEBOOKS}"
    assert set(runner.lessons()) == {*LESSONS, INDEX}, "neither a lesson nor the contents"


@each_notebook
def test_structure(path):
    nb = read(path)
    problems = (index_problems if path == INDEX else structure_problems)(nb, NUMBERS)
    targets = relative_links(nb)
    assert targets, "no links to other lessons"
    problems += [f"the link to {t} is dead" for t in targets if not (NOTEBOOKS / t).exists()]
    assert not problems, "\n".join([path.name, *problems])


# ---- L1 to L3: one execution ----


@pytest.fixture(scope="session")
def executed(request, tmp_path_factory):
    """``executed(path)`` waits for a lesson's `Run`. Starts those of all selected tests at once."""
    needed = {
        item.callspec.params["path"]
        for item in request.session.items
        if "executed" in getattr(item, "fixturenames", ())
    }
    with LessonRuns(tmp_path_factory.mktemp("lessons")) as runs:
        # The longest first, or it would be the last to end, alone.
        for path in sorted(needed, key=lambda path: -links.read_lesson(path).run):
            runs.start(path, with_solutions(read(path)))
        yield runs.result


@pytest.mark.slow
@each_notebook
def test_runs_as_shipped(path, executed):
    run = executed(path)
    assert not run.error, run.error
    assert run.problems == [], "problems in the outputs"
    assert run.written == (), "the lesson wrote into its folder"
    # Includes the few MB that trying out the solutions takes. NaN where it cannot be measured.
    assert not run.memory > MAX_MEMORY, f"{path.name} needs {run.memory / 1e6:.0f} MB"


@pytest.mark.slow
@each_with_exercises
def test_solutions_are_right_and_mistakes_are_known(path, executed):
    lesson = read(path)
    registered = {name for name in EXERCISES if name.startswith(path.name[:2])}
    assert {e.name for e in exercise_cells(lesson)} == registered
    problems = marking_problems(lesson, executed(path))
    assert not problems, "\n".join(problems)


def with_solutions(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The lesson with a cell after each exercise that tries out its solution and known mistakes.

    A later cell that uses an answer (it calls `msif.check` again) is tried out with the solution.
    The inserted cells leave the lesson's names, arrays and random states as they are; see
    tests/solutions_in_kernel.py.
    """
    nb = deepcopy(nb)
    exercises = {e.index: e for e in exercise_cells(nb)}
    cells = []
    for i, cell in enumerate(nb.cells):
        cells.append(cell)
        if i in exercises:
            e = exercises[i]
            call = (solved(cell.source, e), e.name, e.given)
        elif cell.cell_type == "code" and "msif.check(" in cell.source:
            call = (cell.source,)
        else:
            continue
        source = f"__import__('solutions_in_kernel').report(globals(), *{call!r})"
        cells.append(new_code_cell(source, id=f"after-{i}", metadata={"tags": [INSERTED]}))
    nb.cells = cells
    return nb


def solved(source: str, e) -> str:
    """An exercise's cell with its solution in place of the lines to fill in."""
    lines = source.splitlines()
    for line in e.stubs.values():
        lines[line] = ""
    lines[min(e.stubs.values())] = e.solution
    return "\n".join(lines)


def marking_problems(lesson: nbformat.NotebookNode, run: Run) -> list[str]:
    """What is wrong with the verdicts of a lesson that was executed `with_solutions`."""
    if run.error:
        return [f"not executed to its end:\n{run.error}"]
    exercises = {f"after-{e.index}": e.name for e in exercise_cells(lesson)}
    problems = []
    for cell, printed in run.printed.items():
        report = json.loads(printed)
        name = exercises.get(cell, "")
        where = name or f"the cell before {cell!r}, with the solutions"
        problems += [f"{where} changes {variable} in place" for variable in report["changed"]]
        if report["error"]:
            problems.append(f"{where} fails:\n{report['error']}")
        elif name:
            problems += verdict_problems(name, report["verdict"], report["mistakes"])
    missing = exercises.keys() - run.printed.keys()
    return problems + [f"{exercises[cell]} was not tried out" for cell in sorted(missing)]


def verdict_problems(name: str, verdict: str, mistakes: dict[str, str]) -> list[str]:
    """What is wrong with the verdicts on one exercise's solution and on its known mistakes."""
    problems = []
    if not verdict.startswith(f"✓ {name} right: "):
        problems.append(f"the solution got {verdict}")
    own = {mistake: hint for mistake, (_, hint) in EXERCISES[name].mistakes.items()}
    problems += [
        f"{name}: this lesson cannot show {mistake!r}" for mistake in own.keys() - mistakes.keys()
    ]
    for mistake, verdict in mistakes.items():
        if not verdict.startswith(f"✗ {name} wrong: ") or ". Hint: " not in verdict:
            problems.append(f"{mistake!r} got {verdict}")
        elif not verdict.endswith(own.get(mistake, "")):
            problems.append(f"{mistake!r} got the hint of another mistake: {verdict}")
    return problems


# ---- The rules themselves: a good lesson passes, each breakage is reported ----

BADGE = "[![Binder](badge.svg)](https://mybinder.org/v2/gh/a/b/v1)"
TITLE = f"# 00 · Quickstart\n{BADGE}\n\nread 10 min / run 40 s / 400 MB"
OBJECTIVES = """## Objectives
* **see**, at $a/b$ and 1/2 (5 min),
* **say** what
  one sees (2 min),
* **do** it (3 min)."""
STUB = 'five = ...  # your line\nmsif.check("00-1", five, scores=s)'
SOLUTION = """<details><summary>Solution, and why</summary>

```python
five = [1, 2]
```

Because.
</details>"""
ALT = "A line that falls from upper left to lower right."


def png(width=2, alpha=255, mode="RGBA") -> str:
    picture = Image.new(mode, (width, 2), (255, 255, 255, alpha)[: len(mode)])
    picture.save(buffer := io.BytesIO(), "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def figure(alt=ALT, **picture):
    data = {"image/png": png(**picture)}
    return new_output("display_data", data, metadata={"image/png": {"alt": alt} if alt else {}})


def good_lesson() -> nbformat.NotebookNode:
    others = [(STUB.replace("00-1", f"00-{k}"), SOLUTION) for k in (2, 3)]
    cells = [
        new_markdown_cell(TITLE),
        new_markdown_cell(OBJECTIVES),
        new_code_cell(
            "import math", execution_count=1, metadata={"jupyter": {"source_hidden": True}}
        ),
        new_markdown_cell(
            "## In a hurry? One line\n## 1 · Claim\n### Detail\n```python\n# no heading\n```"
        ),
        new_code_cell("assert math.pi > 3", execution_count=2, outputs=[figure()]),
        new_markdown_cell("**Reading the figure.** It falls.\n\n## 2 · Other\n## 3 · Third"),
        new_code_cell("explorer.static()", execution_count=3),
        new_code_cell("explorer", execution_count=4, metadata={"tags": ["live-widget"]}),
        new_markdown_cell("## 4 · Your turn"),
        new_code_cell(STUB, execution_count=5),
        new_markdown_cell(SOLUTION),
        new_code_cell(
            'if msif.check("00-1", five, scores=s).state == "right":\n    print(five)',
            execution_count=6,
        ),
        new_code_cell(others[0][0], execution_count=7),
        new_markdown_cell(others[0][1]),
        new_code_cell(others[1][0], execution_count=8),
        new_markdown_cell(others[1][1]),
        new_markdown_cell("## Recap\n**What could fool you**: luck.\n## References\n## Next"),
    ]
    return new_notebook(cells=cells)


def put(**changes):
    """A breakage that sets fields of one cell: ``put(cell=3, source=...)``."""
    index = changes.pop("cell")
    return lambda nb: nb.cells[index].update(changes)


def replace(cell: int, old: str, new: str):
    return lambda nb: nb.cells[cell].update(source=nb.cells[cell].source.replace(old, new))


def out(cell: int, **output):
    return lambda nb: nb.cells[cell].outputs.append(new_output(**output))


def shown(text: str):
    return out(4, output_type="display_data", data={"text/html": text})


def show(*figures, cell=4):
    return lambda nb: nb.cells[cell].update(outputs=list(figures))


BREAKAGES = {
    "not a title": replace(0, "# 00", "00"),
    "no Binder badge": replace(0, "mybinder.org/v2/", "example.org/"),
    "no budget line": replace(0, "run 40 s", "runs"),
    "the title is not '# NN · Title'": replace(0, "00 · Quickstart", "Quickstart"),
    "0 cells with an Objectives heading": replace(1, "Objectives", "Aims"),
    "objectives are not three to five": replace(1, "* **do** it (3 min).", ""),
    "lines '* **verb** what (3 min)'": replace(1, "**say**", "say"),
    "are not three to five lines '* **verb** what (3 min)'": replace(1, " (5 min)", ""),
    "the objectives take 11 min, the budget line says read 10": replace(1, "5 min", "6 min"),
    "0 folded setup cells": put(cell=2, metadata={}),
    "2 folded setup cells": put(cell=4, metadata={"tags": ["hide-input"]}),
    "not the first code cell": lambda nb: nb.cells.insert(1, new_code_cell("1")),
    "does not follow the objectives": lambda nb: nb.cells.insert(5, nb.cells.pop(1)),
    "not exactly one # title": replace(3, "## 1 · Claim", "# Claim"),
    "skips a level": replace(3, "### Detail", "#### Detail"),
    "sections are not '## 1 · ...' to '## 4 · ...' or more: [1, 3, 3, 4]": replace(
        5, "2 · Other", "3 · Other"
    ),
    "or more: [1, 2, 3]": replace(8, "## 4 · Your turn", "### Your turn"),
    "the last numbered section is not 'Your turn'": replace(8, "Your turn", "Exercises"),
    "'## Claim' is none of the skeleton's sections": replace(3, "1 · Claim", "Claim"),
    "no Recap heading": replace(16, "Recap", "End"),
    "no References heading": replace(16, "References", "Papers"),
    "no Next heading": replace(16, "Next", "Onward"),
    "out of order": put(cell=16, source="## Next\n## Recap\nWhat could fool you\n## References"),
    "sections are out of order": lambda nb: nb.cells.insert(1, nb.cells.pop(8)),
    "what could fool you": replace(16, "fool", "help"),
    "words, over": replace(3, "Claim", "word " * 2001),
    "code cells, over": lambda nb: nb.cells.extend(new_code_cell("1") for _ in range(45)),
    "execution counts": put(cell=4, execution_count=7),
    "16 lines of code": put(cell=4, source="assert 1\n" * 16),
    "lesson 01 does not exist": replace(16, "luck.", "luck (lessons 00 and 01)."),
    "lesson 08 does not exist": replace(16, "luck.", "luck, see [08]."),
    "forbidden !pip": put(cell=4, source="!pip install x"),
    "forbidden %pip": put(cell=4, source="%pip install x"),
    "forbidden sys.path": put(cell=4, source="sys.path.append('..')"),
    "forbidden os.chdir": put(cell=4, source="os.chdir('..')"),
    "forbidden NotImplementedError": put(cell=4, source="raise NotImplementedError"),
    "absolute path /home": put(cell=4, source="open('/home/me/x')"),
    "absolute path C:\\": put(cell=4, source=r"open(r'C:\Users\me')"),
    "absolute path /root in the output": shown("saved to /root/x"),
    "timing 'Wall time' in the output": shown("Wall time: 3 s"),
    "metadata hold timings": put(cell=4, metadata={"execution": {"iopub.status.idle": "now"}}),
    "no claim is asserted": put(cell=4, source="print('assert')"),
    "hold widget state": lambda nb: nb.metadata.update(widgets={}),
    "kB, over": put(cell=3, source="x" * MAX_BYTES),
    "does not start with the lesson's number": replace(0, "# 00", "# 01"),
    "2 exercises, fewer than 3": put(cell=14, source="1"),
    "exercise 00-1 comes before 'Your turn'": lambda nb: nb.cells.insert(11, nb.cells.pop(8)),
    "exercise 00-77 is not registered": replace(9, "00-1", "00-77"),
    "no line to fill in": replace(9, "...", "[1]"),
    "exercise 00-1 is not followed by a folded": lambda nb: nb.cells.pop(10),
    "not followed by a folded solution": replace(10, "<details>", "<details open>"),
    "followed by a folded solution with python": replace(10, "```python", "```"),
    "solution with python code, and why": replace(10, "Because.", ""),
    "the solution does not assign five": replace(10, "five", "six"),
    "exercise 00-1 comes 2 times": lambda nb: nb.cells.insert(11, new_code_cell(STUB)),
    "cell 9: msif.check is not the last line": put(cell=9, source=STUB + "\nprint(five)"),
    "cell 7: msif.check is not the last line": put(cell=7, source='print(msif.check("00-1", 1))'),
    "output of a live widget": out(7, output_type="stream", text="slider"),
    "without .static()": put(cell=6, source="explorer"),
    "error output ValueError": out(
        4, output_type="error", ename="ValueError", evalue="", traceback=[]
    ),
    "image/png without alt": show(figure(alt="")),
    "<img> without alt": shown("<img src='x.png'>"),
    "widget view": out(
        4, output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}}
    ),
    "cell 4: the text below the figure has no '**Reading": replace(5, "Reading", "About"),
    "cell 6: the text below the figure has no": show(figure(), cell=6),
    "alt text 'A line.' is shorter than 40 letters": show(figure("A line.")),
    "the same alt text as the figure before": show(figure(), figure()),
    "a figure 1001 pixels wide, over 1000": show(figure(width=1001)),
    "a transparent figure": show(figure(alpha=254)),
}


def test_rules_accept_a_good_lesson():
    assert structure_problems(good_lesson(), {"00"}) == []
    also = good_lesson()
    # two figures, one text below
    also.cells[4].outputs = [figure(mode="RGB"), figure("Another " + ALT)]
    replace(3, "## In a hurry? One line\n", "")(also)
    assert structure_problems(also, {"00"}) == []


def test_rules_of_the_index():
    index = new_notebook(cells=[good_lesson().cells[i] for i in (0, 3, 4, 5)])
    index.cells[0].source = TITLE.replace("00 · ", "")
    index.cells[2].execution_count = 1
    assert index_problems(index, {"00"}) == []
    for expected, breakage in {
        "no budget line": replace(0, "run 40 s", "runs"),
        "skips a level": replace(1, "### Detail", "#### Detail"),
        "no claim is asserted": put(cell=2, source="1"),
        "has no '**Reading the figure.**'": replace(3, "Reading", "About"),
        "absolute path /root": put(cell=2, source="assert open('/root/x')"),
    }.items():
        nb = deepcopy(index)
        breakage(nb)
        problems = index_problems(nb, {"00"})
        assert len(problems) == 1 and expected in problems[0]


def test_rules_report_each_breakage():
    unreported = {}
    for expected, breakage in BREAKAGES.items():
        nb = good_lesson()
        breakage(nb)
        problems = structure_problems(nbformat.from_dict(nb), {"00"})
        if not any(expected in problem for problem in problems):
            unreported[expected] = problems
    assert not unreported


# ---- Flaws in exercises and runs are found ----


def exercise(number: int, stub: str, solution: str, given: str) -> list[nbformat.NotebookNode]:
    """An exercise's cell and its solution's."""
    name = stub.split(" = ")[0]
    code = f"{stub}\nmsif.check('09-{number}', {name}, {given})"
    return [new_code_cell(code), new_markdown_cell(SOLUTION.replace("five = [1, 2]", solution))]


SETUP = """
import torch, msif_lab as msif
gradients = torch.eye(2)
own = torch.Generator().manual_seed(0)
torch.manual_seed(0)
"""
# Prints, changes an array of the lesson and draws from both generators.
MEDDLING = """
print("not in the lesson")
helper = gradients.mul_(2) + 0 * torch.rand(1) + 0 * torch.rand(1, generator=own)
scores = gradients.sum(1) / 2
"""
AS_SHIPPED = """
assert alpha is ... and scores is ... and v is ... and "helper" not in globals()
drawn = torch.rand(1)
torch.manual_seed(0)
assert drawn == torch.rand(1)
"""
FLAWED = [
    new_code_cell(SETUP),
    # Without momentum it cannot be forgotten.
    *exercise(3, "alpha = ...", "alpha = 7", "rates=[1.0], momentum=0.0"),
    *exercise(1, "scores = ...", MEDDLING, "gradients=gradients, g_bar=torch.ones(2), m=9"),
    *exercise(2, "v = ...", "v = 1 / 0", "theta_bar=1, v_bar=1, hessian=torch.eye(1), rate=1"),
    new_code_cell("if msif.check('09-3', alpha, rates=[1.0], momentum=0.0).state == 'wrong': oops"),
    new_code_cell(AS_SHIPPED),
    new_code_cell("open('left_behind.txt', 'w').close()"),
    new_code_cell("from IPython.display import Image\nImage(b'', format='png')"),
]


def test_flaws_of_a_run_are_found(tmp_path):
    """Wrong and failing solutions are reported; without them the lesson runs as shipped."""
    lesson = new_notebook(cells=FLAWED)
    failing = new_notebook(cells=[new_code_cell("1 / 0")])
    with LessonRuns(tmp_path) as runs:
        runs.start(Path("90_flawed.ipynb"), with_solutions(lesson))
        runs.start(Path("91_failing.ipynb"), failing)
        run = runs.result(Path("90_flawed.ipynb"))
        assert "ZeroDivisionError" in runs.result(Path("91_failing.ipynb")).error
    assert not run.error and run.written == ("left_behind.txt",)
    assert len(run.problems) == 1 and "image without alt text" in run.problems[0]
    wrong, cannot, *changed, fails, later = marking_problems(lesson, run)
    assert wrong.startswith("the solution got ✗ 09-3 wrong")
    assert cannot.startswith("'no momentum' got ✓ 09-3 right")
    assert changed == ["09-1 changes gradients in place", "09-1 changes own in place"]
    assert fails.startswith("09-2 fails:") and "ZeroDivisionError" in fails
    assert "with the solutions fails" in later and "NameError" in later


def test_flaws_of_verdicts_are_found():
    right = "✓ 09-3 right: what next?"
    hints = {name: hint for name, (_, hint) in EXERCISES["09-3"].mistakes.items()}
    mistakes = {name: f"✗ 09-3 wrong: it is not so. Hint: {hint}" for name, hint in hints.items()}
    assert verdict_problems("09-3", right, mistakes) == []
    for flaw, verdicts in {
        "the solution got ○ 09-3 unattempted": ("○ 09-3 unattempted: ", mistakes),
        "this lesson cannot show 'no momentum'": (right, {"no 2": mistakes["no 2"]}),
        "'no 2' got ✓ 09-3 right": (right, mistakes | {"no 2": right}),
        "'no 2' got ✗ 09-3 wrong: no": (right, mistakes | {"no 2": "✗ 09-3 wrong: no"}),
        "the hint of another": (right, mistakes | {"no 2": mistakes["no momentum"]}),
    }.items():
        (problem,) = verdict_problems("09-3", *verdicts)
        assert flaw in problem
    lesson = new_notebook(cells=FLAWED)
    assert marking_problems(lesson, Run(error="1 / 0"))[0].endswith("1 / 0")
    assert len(marking_problems(lesson, Run())) == 3, "three exercises were not tried out"


# ---- The script that links them ----


def checkout(tmp_path) -> Path:
    """A copy of README and lessons, its notebooks folder."""
    shutil.copy(NOTEBOOKS.parent / "README.md", tmp_path)
    return copied(tmp_path)


def test_links_are_what_the_script_writes():
    assert links.update(check=True) == [], "stale; run: python notebooks/links.py"


def test_links_of_a_new_lesson(tmp_path):
    folder = checkout(tmp_path)
    new = folder / "98_new.ipynb"
    title = TITLE.replace("# 00 · Quickstart", "# 98 · New: a lesson").replace(
        "run 40 s", "run 3 min"
    )
    code = new_code_cell(
        "1",
        execution_count=1,
        outputs=[new_output("stream", text="1")],
        metadata={"tags": ["kept"]},
    )
    cells = [new_markdown_cell(title + "\n\nWhy."), code, new_markdown_cell("## Next\nNothing.")]
    nbformat.write(new_notebook(cells=cells), new)
    last = LESSONS[-1].name
    before = {p: nbformat.read(p, as_version=4) for p in folder.glob("*.ipynb")}
    assert links.update(folder, check=True) == [last, new.name, "index.ipynb", "README.md"]
    assert nbformat.read(new, as_version=4) == before[new], "a check writes nothing"
    links.update(folder)
    assert links.update(folder) == [], "a second run finds nothing to do"

    after = {p: nbformat.read(p, as_version=4) for p in before}
    line = f"[‹ {links.read_lesson(LESSONS[-1]).short}]({last}) | [contents](index.ipynb)"
    assert after[new].cells[0].source == f"{title}\n\n{line}\n\nWhy."
    assert after[new].cells[-1].source == f"## Next\nNothing.\n\n{line}"
    assert "[98 · New ›](98_new.ipynb)" in after[folder / last].cells[0].source
    assert (
        "| [98 · New](98_new.ipynb) | a lesson | 10 min | 3 min | 400 MB |"
        in after[folder / "index.ipynb"].cells[4].source
    )
    assert "| 98 | [New](notebooks/98_new.ipynb): a lesson | [![Binder]" in (
        tmp_path / "README.md"
    ).read_text("utf-8")
    for path, nb in after.items():  # nothing but markdown sources
        for cell in (*nb.cells, *before[path].cells):
            if cell.cell_type == "markdown":
                cell.source = ""
        assert nb == before[path]

    new.unlink()
    links.update(folder)
    for path in folder.glob("*.ipynb"):
        assert path.read_bytes() == (NOTEBOOKS / path.name).read_bytes(), "and back"


def test_links_say_what_is_missing(tmp_path):
    folder = checkout(tmp_path)
    new = folder / "98_new.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 98 · New")]), new)
    with pytest.raises(
        SystemExit, match=r"98_new.ipynb: the first cell needs a title and a line 'read 10 min"
    ):
        links.update(folder)
    new.unlink()
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text("utf-8").replace("<!-- lessons -->", ""), "utf-8")
    with pytest.raises(SystemExit, match=r"README.md: .*'<!-- lessons -->'"):
        links.update(folder)


# ---- The script that writes them ----

SCRIPT_CELLS = [
    new_code_cell("import matplotlib\nmatplotlib.use('module://matplotlib_inline.backend_inline')"),
    new_code_cell(
        "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])", metadata={"alt": "A line."}
    ),
    new_code_cell("import sys, warnings\nwarnings.warn('careful')\nprint(sys.prefix, object())"),
    new_code_cell("print('bar 10%\\rbar 100%\\r        \\r', end='', file=sys.stderr)"),
    new_code_cell("print('a slider')", metadata={"tags": ["live-widget"]}),
    new_code_cell("ballast = bytearray(300_000_000)"),
]


def save(path: Path, cells) -> Path:
    nbformat.write(new_notebook(cells=deepcopy(cells)), path)
    return path


def test_script_strips_machine_and_moment(tmp_path):
    path = save(tmp_path / "90_throwaway.ipynb", SCRIPT_CELLS)
    nb, seconds, memory = runner.execute(path)
    assert runner.tidy(nb) == []
    assert [c.execution_count for c in nb.cells] == [1, 2, 3, 4, 5, 6]
    assert nb.cells[1].outputs[-1].metadata["image/png"]["alt"] == "A line."
    text = "".join(o.get("text", "") for o in nb.cells[2].outputs)
    assert "<cell>:2: UserWarning: careful" in text and "<env> <object object>" in text
    assert sys.prefix not in nbformat.writes(nb) and "0x" not in text
    assert nb.cells[3].outputs == [] and nb.cells[4].outputs == []
    assert seconds > 0
    if sys.platform == "linux":
        assert 3e8 < memory < 6e8  # the ballast is seen; this process's own size is not
    ids = [c.id for c in nb.cells]
    runner.write(nb, path)
    assert [c.id for c in nbformat.read(path, as_version=4).cells] == ids
    assert list(tmp_path.iterdir()) == [path]  # no half-written file beside it


def test_script_wants_alt_texts(tmp_path):
    bare = deepcopy(SCRIPT_CELLS[:2])
    bare[1].metadata = {}
    nb, _, _ = runner.execute(save(tmp_path / "90_throwaway.ipynb", bare))
    assert "image without alt text" in runner.tidy(nb)[0]


def test_script_keeps_the_file_on_an_error(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "90_throwaway.ipynb", [new_code_cell("1 / 0")])
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        runner.execute(path)
    monkeypatch.setattr(sys, "argv", ["execute.py", str(path)])
    assert runner.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert path.read_bytes() == before
