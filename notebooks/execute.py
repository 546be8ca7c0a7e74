"""Execute the lessons top to bottom and write them as they are committed.

    python notebooks/execute.py                  every lesson, in place
    python notebooks/execute.py 00 03            the lessons whose names start so
    python notebooks/execute.py --check          execute, report, write nothing

Lessons are committed with their outputs, since GitHub shows no others, but without anything that depends on the
machine or the moment: no timings, paths, object addresses or widget state. Two cell settings steer this script:

* metadata ``"alt": "..."`` (a list for several figures) becomes the alt text of the cell's images;
  an image without one is an error;
* tag ``live-widget``: the cell runs, its output is not kept (a saved slider is a dead slider).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
IMAGES = ("image/png", "image/jpeg")
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 900  # seconds; a whole lesson should take a third of that

# Run in the kernel, this prints its peak memory in bytes. ru_maxrss will not do on Linux: it survives exec, so that a
# kernel started by a large process (pytest, say) would report that process's peak. VmHWM belongs to the new program
# alone. Binder's limit counts worker processes too: the peaks of those alive are added, which gives an upper bound.
PROBE = """
def _peak_memory():
    import glob, re, sys
    def peak(pid):
        with open(f"/proc/{pid}/status") as status:
            own = int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) * 1024
        children = [c for t in glob.glob(f"/proc/{pid}/task/*/children") for c in open(t).read().split()]
        return own + sum(map(peak, children))
    if sys.platform == "linux":
        return peak("self")
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
print(_peak_memory())
"""


def lessons(names: list[str] = ()) -> list[Path]:
    """The committed notebooks, or those whose file names start with one of ``names`` (paths work too)."""
    # NN_name_run.ipynb is what a reader's own `jupyter execute` leaves: never a lesson.
    every = [p for p in sorted(HERE.glob("*.ipynb")) if not p.stem.endswith("_run")]
    if not names:
        return every
    chosen = []
    for name in names:
        found = [Path(name)] if Path(name).is_file() else [p for p in every if p.name.startswith(name)]
        if not found:
            raise SystemExit(f"no lesson starts with {name!r}; there are: {', '.join(p.stem for p in every)}")
        chosen += found
    return chosen


def execute(notebook: Path, cwd: Path | None = None) -> tuple[nbformat.NotebookNode, float, float]:
    """Run a notebook in a fresh kernel; returns it with outputs, the seconds and the peak memory in bytes.

    The memory is NaN where it cannot be measured. Raises nbclient's ``CellExecutionError``, whose text
    is the cell and its traceback. The file itself is not written.
    """
    nb = nbformat.read(notebook, as_version=4)
    for index, cell in enumerate(nb.cells):  # old formats have no cell ids; these are the same in each run
        cell.setdefault("id", f"cell-{index:02d}")
    nb.nbformat_minor = 5
    probe = nbformat.v4.new_code_cell(PROBE, id="memory-probe")
    nb.cells.append(probe)
    client = NotebookClient(
        nb,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,  # otherwise the chunks of printed text depend on timing
        resources={"metadata": {"path": str(cwd or notebook.resolve().parent)}},
    )
    start = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError:
        if not any(out.output_type == "error" for out in probe.get("outputs", [])):
            raise  # the lesson's own error; if the probe fails, only the memory stays unknown
    seconds = time.perf_counter() - start
    nb.cells.remove(probe)
    printed = "".join(out.get("text", "") for out in probe.outputs)
    return nb, seconds, float(printed) if printed else math.nan


def tidy(nb: nbformat.NotebookNode) -> list[str]:
    """Remove what depends on the machine or the moment, in place; returns what the author has to mend."""
    problems = []
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for number, cell in enumerate(nb.cells):
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        if "live-widget" in cell.metadata.get("tags", []):
            cell.outputs = []
        alts = cell.metadata.get("alt", [])
        alts = [alts] if isinstance(alts, str) else list(alts)
        for out in cell.outputs:
            out.pop("transient", None)
            if out.output_type == "stream":
                out.text = _clean(out.text)
                continue
            data = out.get("data", {})
            if WIDGET in data:
                problems.append(f"cell {number}: shows a widget; tag the cell live-widget")
            for mime in data:
                if mime.startswith("text/"):
                    data[mime] = _clean(data[mime])
            for mime in set(IMAGES) & set(data):
                described = out.metadata.setdefault(mime, nbformat.NotebookNode())
                if alts:
                    described["alt"] = alts.pop(0)
                if not described.get("alt"):
                    problems.append(f'cell {number}: image without alt text; set the cell\'s metadata "alt"')
        if alts:
            problems.append(f"cell {number}: more alt texts than images: {alts}")
        # A progress bar that wiped itself leaves an empty line of standard error behind.
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
    return problems


def _clean(text: str) -> str:
    text = re.sub(r"[^\r\n]*\r(?!\n)", "", text)  # what a progress bar overwrote
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)  # <Thing at 0x7f...>
    text = re.sub(r"\S*ipykernel_\d+[/\\]\d+\.py", "<cell>", text)  # where a warning came from
    for path, short in ((HERE, "."), (sys.prefix, "<env>"), (HERE.parent, ".."), (Path.home(), "~")):
        text = re.sub(re.escape(str(path)) + r"(?![\w.-])", lambda _, short=short: short, text)
    return text


def write(nb: nbformat.NotebookNode, path: Path) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    nbformat.validate(nb)
    content = (nbformat.writes(nb).rstrip("\n") + "\n").encode()
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return len(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the lessons' names start; all of them by default")
    parser.add_argument("--check", action="store_true", help="execute and report, write nothing")
    parser.add_argument("--output-dir", type=Path, help="write there instead of in place")
    args = parser.parse_args()

    failed = []
    chosen = lessons(args.names) or parser.error(f"no notebooks in {HERE}")
    for path in chosen:
        try:
            nb, seconds, memory = execute(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{path.name}: FAILED\n{error}", flush=True)
            failed.append(path.name)
            continue
        problems = tidy(nb)
        for problem in problems:
            print(f"{path.name}: {problem}", flush=True)
        if problems:
            failed.append(path.name)
        if problems or args.check:
            size = len(nbformat.writes(nb).encode())
        else:
            target = args.output_dir or path.parent
            target.mkdir(parents=True, exist_ok=True)
            size = write(nb, target / path.name)
        print(f"{path.name}: {seconds:.0f} s, {memory / 1e6:.0f} MB, {size / 1e3:.0f} kB", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
