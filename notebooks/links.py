"""Write what links the lessons: previous | contents | next, the index's map and README's table.

    python notebooks/links.py            write what is not as it should be
    python notebooks/links.py --check    name it, write nothing

Run it after a lesson was added, renamed or measured anew. Everything comes from the files: the order from their
names, titles from their ``# NN · Short: long`` lines, times and memory from their budget lines. Outputs, metadata
and cell ids stay as they are. It writes

* one line in the first and in the last cell of each lesson;
* in ``index.ipynb`` the whole cell ``map``, and the link targets of each ``[01]`` in the other cells;
* in README.md the table below ``<!-- lessons -->``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
from execute import HERE, write

BADGE = "[![Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/{})"
BUDGET = re.compile(r"read\s+(\d+)\s*min\s*/\s*run\s+(\d+)\s*(s|min)\s*/\s*([\d.]+)\s*(MB|GB)")
LINKS = re.compile(r"\n*^.*\[contents\]\(index\.ipynb\).*$\n*", re.MULTILINE)
REFERENCES = re.compile(r"\n*^\[\d\d\]: .*$", re.MULTILINE)
README_TABLE = re.compile(r"(?<=<!-- lessons -->\n\n).*?(?=\n\n)", re.DOTALL)

# What a reader who has not opened the lesson would ask. For a lesson without a line here the map shows the second
# part of its title.
QUESTIONS = {
    "00": "Which pretraining images hurt this prediction, and what happens if we take them out?",
    "01": "What does one training example do to one prediction, and when is the answer exact?",
    "02": "How does a pretraining example reach a prediction if the embedding stays frozen?",
    "03": "And if everything is finetuned, held near the pretrained weights by α?",
    "04": "How do I divide by a Hessian that is too large to write down?",
    "05": "Would the loss, the entropy or a similarity have told me the same?",
    "06": "Does it hold for the paper's own experiment, against real retraining?",
    "07": "Does it hold for photographs, and for whole groups of them?",
    "08": "I may drop pretraining data for my task. Which, and who pays for it?",
    "09": "What if training stopped long before a minimum?",
    "10": "Are my scores still true for the next run, with another seed?",
    "11": "What about my own model and my own question?",
}


CUDA = "(With pip's PyTorch on Linux, whose CUDA libraries are part of that; Binder's does without them.)"


class Lesson(NamedTuple):
    """What the other notebooks say about one lesson."""

    file: str
    title: str  # "06 · MNIST: 0–3 → 4–9"
    read: int  # minutes
    run: int  # seconds
    memory: int  # MB

    @property
    def number(self) -> str:
        return self.file[:2]

    @property
    def short(self) -> str:
        return self.title.partition(":")[0]

    @property
    def long(self) -> str:
        return self.title.partition(":")[2].strip()


def read_lesson(path: Path) -> Lesson:
    first = nbformat.read(path, as_version=4).cells[0].source
    title, budget = re.match(r"# (.+)", first), BUDGET.search(first)
    if not title or not budget:
        raise SystemExit(f"{path.name}: the first cell needs a title and a line 'read 10 min / run 40 s / 400 MB'")
    read, run, unit, memory, size = budget.groups()
    seconds, megabytes = int(run) * (60 if unit == "min" else 1), float(memory) * (1000 if size == "GB" else 1)
    return Lesson(path.name, title[1].strip(), int(read), seconds, int(megabytes))


def course(folder: Path) -> list[Lesson]:
    """The lessons in their order, without ``NN_name_run.ipynb``, a reader's own run of one."""
    paths = sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb") if not path.stem.endswith("_run"))
    return [read_lesson(path) for path in paths]


# ---- The text to write ----


def links_line(lessons: list[Lesson], place: int) -> str:
    parts = ["[contents](index.ipynb)"]
    if place > 0:
        parts.insert(0, f"[‹ {lessons[place - 1].short}]({lessons[place - 1].file})")
    if place + 1 < len(lessons):
        parts.append(f"[{lessons[place + 1].short} ›]({lessons[place + 1].file})")
    return " | ".join(parts)


def linked(source: str, line: str, at_end: bool) -> str:
    """A cell's text with the line of links as a paragraph of its own: below the budget line, or at the end."""
    source = LINKS.sub("\n\n", source).strip()
    if at_end:
        return f"{source}\n\n{line}"
    head = source[: BUDGET.search(source).end()]
    return f"{head}\n\n{line}\n\n{source[len(head) :].strip()}".strip()


def duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"


def course_map(lessons: list[Lesson]) -> str:
    rows = ["## The lessons", "", "| lesson | the question it answers | read | run | memory |", "|---|---|---|---|---|"]
    for x in lessons:
        question = QUESTIONS.get(x.number, x.long)
        cost = f"{x.read} min | {duration(x.run)} | {x.memory:,} MB"
        rows.append(f"| [{x.short}]({x.file}) | {question} | {cost} |")
    read, run, memory = sum(x.read for x in lessons), sum(x.run for x in lessons), max(x.memory for x in lessons)
    total = f"about {read / 60:.1f} hours of reading and {duration(run)} of computing on two cores"
    most = f"none needs more than {memory:,} MB. {CUDA}"
    return "\n".join([*rows, "", f"**All {len(lessons)} lessons**: {total}; {most}"])


def with_references(source: str, lessons: list[Lesson]) -> str:
    """A cell's text with a link definition at its end for each lesson that it names as ``[01]``."""
    source = REFERENCES.sub("", source).rstrip()
    used = [f"[{x.number}]: {x.file}" for x in lessons if re.search(rf"\[{x.number}\](?!\()", source)]
    return source + ("\n\n" + "\n".join(used) if used else "")


def readme_table(lessons: list[Lesson], binder: str) -> str:
    rows = []
    for x in lessons:
        name = x.short.removeprefix(x.number).strip(" ·")
        badge = BADGE.format(f"{binder}?urlpath=lab/tree/notebooks/{x.file}")
        rows.append(f"| {x.number} | [{name}](notebooks/{x.file}){f': {x.long}' if x.long else ''} | {badge} |")
    return "\n".join(["| | lesson | |", "|---|---|---|", *rows])


# ---- Into the files ----


def update_notebook(path: Path, lessons: list[Lesson]) -> nbformat.NotebookNode | None:
    """The notebook as it should be, or None if it is so already. Only the text of markdown cells changes."""
    nb = nbformat.read(path, as_version=4)
    before = [cell.source for cell in nb.cells]
    if path.name == "index.ipynb":
        for cell in nb.cells:
            if cell.get("id") == "map":
                cell.source = course_map(lessons)
            elif cell.cell_type == "markdown":
                cell.source = with_references(cell.source, lessons)
    else:
        line = links_line(lessons, [x.file for x in lessons].index(path.name))
        nb.cells[0].source = linked(nb.cells[0].source, line, at_end=False)
        if nb.cells[-1].cell_type == "markdown":
            nb.cells[-1].source = linked(nb.cells[-1].source, line, at_end=True)
    return nb if [cell.source for cell in nb.cells] != before else None


def update(folder: Path = HERE, check: bool = False) -> list[str]:
    """Bring all files up to date, or with ``check`` none; returns the names of those that were not."""
    lessons, stale = course(folder), []
    for path in [folder / x.file for x in lessons] + [folder / "index.ipynb"]:
        if path.is_file() and (nb := update_notebook(path, lessons)):
            stale.append(path.name)
            if not check:
                write(nb, path)
    readme = folder.parent / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        binder = re.search(r"mybinder\.org/v2/gh/([^?\s)]+)", text)  # repository and tag, said once by hand
        if not binder or not README_TABLE.search(text):
            raise SystemExit("README.md: a Binder link, a line '<!-- lessons -->' and a table below it are needed")
        table = readme_table(lessons, binder[1])
        changed = README_TABLE.sub(lambda _: table, text, count=1)
        if changed != text:
            stale.append(readme.name)
            if not check:
                readme.write_text(changed, encoding="utf-8")
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="name the files that are not up to date, write nothing")
    args = parser.parse_args()
    stale = update(check=args.check)
    for name in stale:
        print(f"{name}: {'not up to date' if args.check else 'written'}")
    return bool(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
