"""Executes lessons in the background, two at a time, for tests/test_notebooks.py.

Each lesson gets a process of its own, which is this file run as a script: nbclient's event loop
then never meets that of Playwright, and a lesson can be stopped at any time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
IN_KERNEL = Path(__file__).with_name("solutions_in_kernel.py")
AT_A_TIME = 2  # each needs about 1 GB
INSERTED = "inserted"  # the tag of cells that are not the lesson's


def script(name: str):
    """A script of ``notebooks/`` as a module, so that the tests run what the authors run."""
    spec = importlib.util.spec_from_file_location(name, NOTEBOOKS / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


runner = script("execute")


def copied(folder: Path) -> Path:
    """A copy of the lessons in ``folder``, so that no run can write into the checkout."""
    ignored = shutil.ignore_patterns(".*", "*_run.ipynb", "__pycache__")
    return shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=ignored)


class Run(NamedTuple):
    """What a lesson's execution came to; the figures are of the lesson without inserted cells."""

    error: str = ""  # of the cell that failed, with its traceback
    problems: tuple[str, ...] = ()  # what `execute.tidy` found in the outputs
    printed: dict[str, str] = {}  # by id, what the inserted cells printed  # noqa: RUF012
    seconds: float = 0.0
    memory: float = 0.0  # bytes, NaN where it cannot be measured; inserted cells included
    written: tuple[str, ...] = ()  # the files that the lesson wrote into its folder


class LessonRuns:
    """Lessons that are executed in the background; a context manager that ends what still runs."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._futures = {}
        self._processes = []
        self._lock = Lock()
        self._closed = False

    def start(self, lesson: Path, nb: nbformat.NotebookNode) -> None:
        """Queue ``nb``, the lesson at this path with or without inserted cells."""
        self._futures[lesson] = self._pool.submit(self._execute, lesson, nb)

    def result(self, lesson: Path) -> Run:
        """Waits until the lesson was executed."""
        return self._futures[lesson].result()

    def _execute(self, lesson: Path, nb: nbformat.NotebookNode) -> Run:
        folder = self._folder / lesson.stem
        folder.mkdir()
        copy = copied(folder) / lesson.name
        nbformat.write(nb, copy)
        shutil.copy(IN_KERNEL, copy.parent)  # inserted cells import it
        before = _files(copy.parent)
        result = folder / "run.json"
        command = [sys.executable, __file__, str(copy), str(result)]
        with (folder / "log").open("w") as log:
            with self._lock:
                if self._closed:
                    return Run(error="not executed: the tests were interrupted")
                # A session of its own: Ctrl-C reaches pytest, which then ends this process.
                process = subprocess.Popen(
                    command,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self._processes.append(process)
            process.wait()
        if not result.exists():
            return Run(error=(folder / "log").read_text(errors="replace"))
        run = Run(**json.loads(result.read_text("utf-8")))
        after = _files(copy.parent)
        written = sorted(name for name in after if after[name] != before.get(name))
        return run._replace(written=tuple(written))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.kill()  # its kernel notices that it is an orphan, and exits
        self._pool.shutdown()


def _files(folder: Path) -> dict[str, int]:
    """When each file below ``folder`` was last written, for those that git would show."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main(lesson: Path, result: Path) -> None:
    """Execute ``lesson`` and write the fields of its `Run` into ``result``, as JSON."""
    try:
        nb, seconds, memory = runner.execute(lesson)
    except Exception as error:  # a failing cell, a timeout, a dead kernel
        result.write_text(json.dumps({"error": str(error) or repr(error)}), "utf-8")
        return
    inserted = [cell for cell in nb.cells if INSERTED in cell.metadata.get("tags", [])]
    printed = {cell.id: "".join(out.get("text", "") for out in cell.outputs) for cell in inserted}
    nb.cells = [cell for cell in nb.cells if cell not in inserted]
    run = {"problems": runner.tidy(nb), "printed": printed, "seconds": seconds, "memory": memory}
    result.write_text(json.dumps(run), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
