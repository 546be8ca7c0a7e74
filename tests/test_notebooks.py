"""The lessons: how they are built (L0) and that they run as shipped (L1)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import MAX_BYTES, structure_problems

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
MAX_MEMORY = 1.2e9  # bytes; Binder guarantees 1 GB and kills at 2

_spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
runner = importlib.util.module_from_spec(_spec)  # the script that makes the committed files, not a second one
_spec.loader.exec_module(runner)

LESSONS = [p for p in runner.lessons() if p.name[:2].isdigit()]
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def test_there_are_lessons():
    assert LESSONS, f"no notebooks named NN_*.ipynb in {NOTEBOOKS}"


@each_lesson
def test_structure(path):
    problems = structure_problems(nbformat.read(path, as_version=4))
    assert not problems, "\n".join([path.name, *problems])


@each_lesson
def test_runs_as_shipped(path, tmp_path):
    folder = tmp_path / "notebooks"  # a copy, so that a lesson cannot write into the checkout
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".*", "*_run.ipynb"))
    nb, _, memory = runner.execute(folder / path.name)
    assert runner.tidy(nb) == []
    assert not memory > MAX_MEMORY, f"{path.name} needs {memory / 1e6:.0f} MB"  # NaN where not measurable


# ---- The rules themselves: a good lesson passes, each breakage is reported ----

BADGE = "[![Binder](badge.svg)](https://mybinder.org/v2/gh/a/b/v1)"
TITLE = f"# 00 Quickstart\n{BADGE}\n\nread 10 min / run 40 s / 400 MB"


def good_lesson() -> nbformat.NotebookNode:
    figure = new_output("display_data", {"image/png": "aGVsbG8="}, metadata={"image/png": {"alt": "A line."}})
    cells = [
        new_markdown_cell(TITLE),
        new_markdown_cell("## Objectives\n* see, at $a/b$ and 1/2"),
        new_code_cell("import math", execution_count=1, metadata={"jupyter": {"source_hidden": True}}),
        new_markdown_cell("## Claim\n### Detail\n```python\n# no heading\n```"),
        new_code_cell("assert math.pi > 3", execution_count=2, outputs=[figure]),
        new_code_cell("explorer.static()", execution_count=3),
        new_code_cell("explorer", execution_count=4, metadata={"tags": ["live-widget"]}),
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


BREAKAGES = {
    "not a title": replace(0, "# 00", "00"),
    "no Binder badge": replace(0, "mybinder.org/v2/", "example.org/"),
    "no budget line": replace(0, "run 40 s", "runs"),
    "0 cells with an Objectives heading": replace(1, "Objectives", "Aims"),
    "0 folded setup cells": put(cell=2, metadata={}),
    "2 folded setup cells": put(cell=4, metadata={"tags": ["hide-input"]}),
    "not the first code cell": lambda nb: nb.cells.insert(1, new_code_cell("1")),
    "does not follow the objectives": lambda nb: nb.cells.insert(5, nb.cells.pop(1)),
    "not exactly one # title": replace(3, "## Claim", "# Claim"),
    "skips a level": replace(3, "### Detail", "#### Detail"),
    "no Recap heading": replace(7, "Recap", "End"),
    "no References heading": replace(7, "References", "Papers"),
    "no Next heading": replace(7, "Next", "Onward"),
    "out of order": put(cell=7, source="## Next\n## Recap\nWhat could fool you\n## References"),
    "what could fool you": replace(7, "fool", "help"),
    "words, over": replace(3, "Claim", "word " * 2001),
    "code cells, over": lambda nb: nb.cells.extend(new_code_cell("1") for _ in range(45)),
    "execution counts": put(cell=4, execution_count=7),
    "16 lines of code": put(cell=4, source="assert 1\n" * 16),
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
    "output of a live widget": out(6, output_type="stream", text="slider"),
    "without .static()": put(cell=5, source="explorer"),
    "error output ValueError": out(4, output_type="error", ename="ValueError", evalue="", traceback=[]),
    "image/png without alt": out(4, output_type="display_data", data={"image/png": "aGVsbG8="}),
    "<img> without alt": shown("<img src='x.png'>"),
    "widget view": out(4, output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
}


def test_rules_accept_a_good_lesson():
    assert structure_problems(good_lesson()) == []


@pytest.mark.parametrize("expected", BREAKAGES)
def test_rules_report(expected):
    nb = deepcopy(good_lesson())
    BREAKAGES[expected](nb)
    problems = structure_problems(nbformat.from_dict(nb))
    assert any(expected in problem for problem in problems), problems


# ---- The script that writes them ----

SCRIPT_CELLS = [
    new_code_cell("import matplotlib\nmatplotlib.use('module://matplotlib_inline.backend_inline')"),
    new_code_cell("import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])", metadata={"alt": "A line."}),
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
