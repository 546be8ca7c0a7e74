"""How a lesson must be built, checked on its file alone, without a kernel (level L0)."""

from __future__ import annotations

import ast
import base64
import io
import re
from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

import nbformat
from PIL import Image

from msif_lab.exercises import EXERCISES

MAX_CODE_CELLS = 45
MAX_WORDS = 2000
MAX_LINES = 15  # of one code cell
MAX_BYTES = 600_000
MAX_PIXELS = 1000  # the width of a figure
MIN_SECTIONS = 4  # with the exercises
MIN_EXERCISES = 3
MIN_ALT = 40  # letters
IMAGES = ("image/png", "image/jpeg")
WIDGET = "application/vnd.jupyter.widget-view+json"

BUDGET = re.compile(r"read\s+(\d+)\s*min\s*/\s*run\s+\d+\s*(s|min)\s*/\s*[\d.]+\s*(MB|GB)")
FORBIDDEN_CODE = ("!pip", "%pip", "sys.path", "os.chdir", "NotImplementedError")
# Home and work folders, unless the character before makes them part of a URL, a word or a closing
# HTML tag.
MACHINE_PATH = re.compile(r"(?<![\w.<])/(?:root|home|work|tmp|Users)\b|\bC:\\(?=[A-Z])")
# Folded, with the code and then the reason.
SOLUTION = re.compile(
    r"<details>\s*<summary>Solution, and why</summary>\s*```python\n(.*?)\n```\n(.*)</details>\s*",
    re.DOTALL,
)
OBJECTIVE = re.compile(r"^\* +\*\*[a-z][\w -]*\*\*.*?\((\d+) min\)[.,]?$", re.MULTILINE | re.DOTALL)
READING = re.compile(r"\*\*Reading the (figure|picture)")
# "lesson 05", "lessons 01, 02 and 04 to 07", "[05]" with or without a target.
NAMED = re.compile(
    r"\blessons? \[?\d\d\b\]?(?:(?:, | and | or | to )\[?\d\d\b\]?)*|\[\d\d\]", re.IGNORECASE
)
TIMING = re.compile(r"Wall time|CPU times|\d\s?(?:it/s|s/it)\b")


def structure_problems(nb: nbformat.NotebookNode, lessons: Collection[str]) -> list[str]:
    """The rules for a lesson that a notebook breaks, one line each.

    Args:
        nb: the notebook.
        lessons: the numbers of the lessons that exist, such as "05".
    """
    return _setup(nb) + _skeleton(nb) + _exercises(nb) + index_problems(nb, lessons)


def index_problems(nb: nbformat.NotebookNode, lessons: Collection[str]) -> list[str]:
    """The same for the contents page, which needs no objectives, exercises or recap."""
    problems = _header(nb) + _text(nb) + _code(nb) + _figures(nb) + _outputs(nb)
    return problems + _lessons_named(nb, lessons)


def _lessons_named(nb, lessons: Collection[str]) -> list[str]:
    """The lessons that the text names, or a comment in the code, exist."""
    problems = []
    for i, cell in enumerate(nb.cells):
        found = NAMED.findall(cell.source)
        if cell.cell_type == "code":
            found = [name for name in found if not name.startswith("[")]  # an index such as x[10]
        numbers = {number for name in found for number in re.findall(r"\d\d", name)}
        problems += [
            f"cell {i}: lesson {number} does not exist"
            for number in sorted(numbers.difference(lessons))
        ]
    return problems


def _header(nb) -> list[str]:
    first = nb.cells[0].source if nb.cells and nb.cells[0].cell_type == "markdown" else ""
    problems = []
    if not first.startswith("# "):
        problems.append("first cell is not a title (# ...)")
    if "mybinder.org/v2/" not in first:
        problems.append("first cell has no Binder badge")
    if not BUDGET.search(first):
        problems.append("first cell has no budget line (read 10 min / run 40 s / 400 MB)")
    return problems


def _setup(nb) -> list[str]:
    """One folded setup cell right after the objectives, the lesson's first code."""
    objectives = [i for i, cell in enumerate(nb.cells) if _has_heading(cell, "objectives")]
    hidden = [i for i, cell in enumerate(nb.cells) if _hidden(cell)]
    code = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    problems = []
    if len(objectives) != 1:
        problems.append(f"{len(objectives)} cells with an Objectives heading, not 1")
    if len(hidden) != 1:
        problems.append(
            f"{len(hidden)} folded setup cells, not 1 (jupyter.source_hidden or hide-input)"
        )
    elif code[0] != hidden[0]:
        problems.append("the setup cell is not the first code cell")
    elif objectives and not 0 < hidden[0] - objectives[0] <= 2:
        problems.append("the setup cell does not follow the objectives")
    return problems


def _text(nb) -> list[str]:
    problems = []
    headings = [h for cell in nb.cells for h in _headings(cell)]
    if sum(level == 1 for level, _ in headings) != 1:
        problems.append("not exactly one # title")
    for (above, _), (level, title) in pairwise(headings):
        if level > above + 1:
            problems.append(f"heading {title!r} skips a level")
    words = _words("\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown"))
    if words > MAX_WORDS:
        problems.append(f"{words} words, over {MAX_WORDS}")
    return problems


def _skeleton(nb) -> list[str]:
    """The title, the objectives, and the sections in their order."""
    problems = []
    first = nb.cells[0].source if nb.cells else ""
    if not re.match(r"# \d\d · \S", first):
        problems.append("the title is not '# NN · Title'")
    budget = BUDGET.search(first)
    for cell in nb.cells:
        if not _has_heading(cell, "objectives"):
            continue
        minutes = [int(m) for m in OBJECTIVE.findall(cell.source)]
        bullets = len(re.findall(r"^\* ", cell.source, re.MULTILINE))
        if not 3 <= bullets <= 5 or bullets != len(minutes):
            problems.append("objectives are not three to five lines '* **verb** what (3 min)'")
        elif budget and sum(minutes) != int(budget[1]):
            problems.append(
                f"the objectives take {sum(minutes)} min, the budget line says read {budget[1]} min"
            )
    titles = [title for cell in nb.cells for level, title in _headings(cell) if level == 2]
    numbered = [title for title in titles if re.match(r"\d+ · ", title)]
    places = [int(title.split()[0]) for title in numbered]
    if places != list(range(1, len(places) + 1)) or len(places) < MIN_SECTIONS:
        problems.append(
            f"sections are not '## 1 · ...' to '## {MIN_SECTIONS} · ...' or more: {places}"
        )
    if not numbered or not numbered[-1].endswith("· Your turn"):
        problems.append("the last numbered section is not 'Your turn', the exercises")
    hurry = [title for title in titles if title.startswith("In a hurry?")]
    wanted = ["Objectives", *hurry, *numbered, "Recap", "References", "Next"]
    for word in wanted[-3:]:
        if word not in titles:
            problems.append(f"no {word} heading")
    if sorted(titles) == sorted(wanted) and titles != wanted:
        problems.append(f"sections are out of order: {', '.join(titles)}")
    problems += [
        f"'## {title}' is none of the skeleton's sections"
        for title in titles
        if title not in wanted
    ]
    markdown = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    if "what could fool you" not in markdown.lower():
        problems.append("recap does not say what could fool you")
    return problems


def _code(nb) -> list[str]:
    problems = []
    code = [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    # Run All does not count empty cells
    numbered = [(i, cell) for i, cell in code if cell.source.strip()]
    if len(numbered) > MAX_CODE_CELLS:
        problems.append(f"{len(numbered)} code cells, over {MAX_CODE_CELLS}")
    counts = [cell.execution_count for _, cell in numbered]
    if counts != list(range(1, len(numbered) + 1)):
        problems.append(f"execution counts are not 1, 2, ...: {counts}")
    for i, cell in numbered:
        lines = sum(bool(line.strip()) for line in cell.source.splitlines())
        if lines > MAX_LINES and not _hidden(cell):
            problems.append(f"cell {i}: {lines} lines of code, over {MAX_LINES}")
        problems += [
            f"cell {i}: forbidden {word}" for word in FORBIDDEN_CODE if word in cell.source
        ]
    for i, cell in enumerate(nb.cells):
        if found := MACHINE_PATH.search(cell.source):
            problems.append(f"cell {i}: absolute path {found[0]}")
        if "execution" in cell.metadata:
            problems.append(f"cell {i}: metadata hold timings")
    if not any(re.search(r"^\s*assert\b", cell.source, re.MULTILINE) for _, cell in numbered):
        problems.append("no claim is asserted")
    return problems


def _exercises(nb) -> list[str]:
    found = exercise_cells(nb)
    starts = [i for i, cell in enumerate(nb.cells) if _has_heading(cell, "your turn")]
    number = re.match(r"# (\d\d)\b", nb.cells[0].source if nb.cells else "")
    problems = []
    if len(found) < MIN_EXERCISES:
        problems.append(f"{len(found)} exercises, fewer than {MIN_EXERCISES}")
    for e in found:
        where = f"cell {e.index}: exercise {e.name}"
        if not number or not e.name.startswith(f"{number[1]}-"):
            problems.append(f"{where} does not start with the lesson's number")
        if not starts or e.index < starts[0]:
            problems.append(f"{where} comes before 'Your turn'")
        if e.name not in EXERCISES:
            problems.append(f"{where} is not registered in msif_lab/exercises/lesson_NN.py")
        if not e.stubs:
            problems.append(f"{where} has no line to fill in (name = ...)")
        if not e.solution:
            problems.append(
                f"{where} is not followed by a folded solution with python code, and why"
            )
        elif missing := e.stubs.keys() - _assigned(e.solution):
            problems.append(f"{where}: the solution does not assign {', '.join(sorted(missing))}")
    times = Counter(e.name for e in found)
    problems += [f"exercise {name} comes {n} times" for name, n in times.items() if n > 1]
    first = {e.name: e.index for e in reversed(found)}
    for i, cell in enumerate(nb.cells):
        asked = {_name(call) for call in _checks(cell)}
        # A cell may check one exercise: its own, in the last line, or one further up, anywhere.
        if any(first.get(name, i + 1) > i for name in asked) or len(asked) > 1:
            problems.append(
                f"cell {i}: msif.check is not the last line, and no exercise above has this name"
            )
    return problems


class ExerciseCell(NamedTuple):
    """A cell that ends in ``msif.check("NN-k", answer, ...)``; lines are counted from 0."""

    index: int
    name: str
    stubs: dict[str, int]  # the line of each ``name = ...``
    given: str  # its keyword arguments, as source
    solution: str  # the Python code of the solution in the next cell, "" if there is none


def exercise_cells(nb) -> list[ExerciseCell]:
    """The cells whose last line is ``msif.check(...)``."""
    found = []
    for i, cell in enumerate(nb.cells):
        body = ast.parse(cell.source).body if _checks(cell) else []
        call = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
        if not _is_check(call):
            continue
        stubs = {
            line.targets[0].id: line.lineno - 1
            for line in body
            if isinstance(line, ast.Assign)
            and isinstance(line.value, ast.Constant)
            and line.value.value is ...
        }
        after = nb.cells[i + 1] if i + 1 < len(nb.cells) else None
        text = after.source if after and after.cell_type == "markdown" else ""
        shown = SOLUTION.fullmatch(text)
        solution = shown[1] if shown and shown[2].strip() else ""  # code and reason
        given = ", ".join(ast.unparse(keyword) for keyword in call.keywords)
        found.append(ExerciseCell(i, _name(call), stubs, given, solution))
    return found


def _checks(cell) -> list[ast.Call]:
    if cell.cell_type != "code" or "msif.check(" not in cell.source:
        return []  # not parsed: its code may hold what is not Python, such as %magic
    return [node for node in ast.walk(ast.parse(cell.source)) if _is_check(node)]


def _is_check(node) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "msif.check"


def _name(call: ast.Call) -> str:
    return str(call.args[0].value) if call.args and isinstance(call.args[0], ast.Constant) else ""


def _assigned(code: str) -> set[str]:
    return {
        node.id
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _figures(nb) -> list[str]:
    """Each figure has an alt text of its own, and its reading in words below."""
    problems = []
    before = ""
    for i, cell in enumerate(nb.cells):
        pictures = _pictures(cell)
        if not pictures:
            continue
        after = next((c.source for c in nb.cells[i + 1 :] if c.cell_type == "markdown"), "")
        if not READING.search(after):
            problems.append(
                f"cell {i}: the text below the figure has no '**Reading the figure.**' in plain "
                "words"
            )
        for picture, alt in pictures:
            if alt and len(alt) < MIN_ALT:
                problems.append(
                    f"cell {i}: alt text {alt!r} is shorter than {MIN_ALT} letters; describe "
                    "what the figure shows"
                )
            if alt and alt == before:
                problems.append(f"cell {i}: the same alt text as the figure before")
            before = alt
            if picture.width > MAX_PIXELS:
                problems.append(
                    f"cell {i}: a figure {picture.width} pixels wide, over {MAX_PIXELS}"
                )
            if "A" in picture.getbands() and picture.getchannel("A").getextrema()[0] < 255:
                problems.append(
                    f"cell {i}: a transparent figure, black on black in a dark theme; call "
                    "plots.use_style()"
                )
    return problems


def _pictures(cell) -> list[tuple[Image.Image, str]]:
    """The images that a cell shows, with their alt texts."""
    found = []
    for out in cell.get("outputs", []):
        for mime in set(IMAGES) & set(out.get("data", {})):
            picture = Image.open(io.BytesIO(base64.b64decode(out.data[mime])))
            found.append((picture, out.metadata.get(mime, {}).get("alt", "").strip()))
    return found


def _outputs(nb) -> list[str]:
    problems = []
    if "widgets" in nb.metadata:
        problems.append("notebook metadata hold widget state")
    size = len(nbformat.writes(nb).encode())
    if size > MAX_BYTES:
        problems.append(f"{size / 1e3:.0f} kB, over {MAX_BYTES / 1e3:.0f}")
    before = ""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        if "live-widget" in _tags(cell):
            if cell.outputs:
                problems.append(f"cell {i}: output of a live widget is kept")
            if ".static(" not in before:
                problems.append(f"cell {i}: live widget without .static() in the code cell before")
        before = cell.source
        for out in cell.outputs:
            problems += [f"cell {i}: {problem}" for problem in _output(out)]
    return problems


def _output(out) -> list[str]:
    if out.output_type == "error":
        return [f"error output {out.ename}"]
    problems = []
    data = out.get("data", {})
    for mime in IMAGES:
        if mime in data and not out.metadata.get(mime, {}).get("alt", "").strip():
            problems.append(f"{mime} without alt text")
    if WIDGET in data:
        problems.append("widget view in the output")
    text = out.get("text", "") + "\n".join(
        str(v) for mime, v in data.items() if mime.startswith("text/")
    )
    if re.search(r"<img(?![^>]*\balt=)", text):
        problems.append("<img> without alt text")
    text = re.sub(r"base64,[\w+/=]+", "", text)  # image bytes may spell anything
    if found := MACHINE_PATH.search(text):
        problems.append(f"absolute path {found[0]} in the output")
    if found := TIMING.search(text):
        problems.append(f"timing {found[0]!r} in the output")
    return problems


def relative_links(nb) -> list[str]:
    """The targets of the text's links within this repository, without their #sections."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    targets = [(inline or reference).partition("#")[0] for inline, reference in targets]
    return [target for target in targets if target and "://" not in target]


def _headings(cell) -> list[tuple[int, str]]:
    if cell.cell_type != "markdown":
        return []
    # A # in shown code is a comment.
    source = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#{1,6}) +(.+)$", source, re.MULTILINE)]


def _has_heading(cell, word: str) -> bool:
    return any(word in title.lower() for _, title in _headings(cell))


def _hidden(cell) -> bool:
    folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return cell.cell_type == "code" and (folded or "hide-input" in _tags(cell))


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def _words(markdown: str) -> int:
    """The number of words to read: no HTML, link targets or navigation; a formula is one word."""
    markdown = re.sub(r"^.*\[contents\]\(index\.ipynb\).*$", "", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "formula", markdown, flags=re.DOTALL)
    markdown = re.sub(r"\]\([^)]*\)|<[^>\n]+>", " ", markdown)
    return len(re.findall(r"\w[\w'’-]*", markdown))
