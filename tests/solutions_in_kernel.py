"""Runs in a lesson's kernel: tries out an exercise's solution without changing the lesson.

`test_notebooks.with_solutions` calls it from a cell of its own, right after the exercise. The
solution runs in a copy of the lesson's namespace, with its output captured and the random states
put back, so that the cells that follow find what a reader who skipped the exercise would find.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import traceback
import zlib
from contextlib import contextmanager

import numpy
import torch
from IPython.utils.capture import capture_output

from msif_lab.exercises import EXERCISES, check

# What the solutions so far have assigned: name, new value, the lesson's own value at that time.
# A reader who solves all exercises has these values until a cell of the lesson assigns others.
ASSIGNED = {}
MISSING = object()


def report(lesson: dict, source: str, exercise: str = "", given: str = ""):
    """Run ``source`` beside the lesson; print, as one line of JSON, what became of it.

    Args:
        lesson: the lesson's namespace, ``globals()``; it is not written to.
        source: a cell, with the solution in place of the dots.
        exercise: its exercise, "" for a cell that only builds on the answers of others.
        given: the keyword arguments of the exercise's `check`, as source.
    """
    beside = dict(lesson)
    for name, (value, own) in ASSIGNED.items():
        if lesson.get(name, MISSING) is own:
            beside[name] = value
    before = _contents(lesson)
    found = {"error": "", "verdict": "", "mistakes": {}}
    with _unnoticed():
        try:
            found["verdict"] = repr(_run(source, beside))
            if exercise:
                quantities = eval(f"dict({given})", beside)
                wrong = EXERCISES[exercise].wrong_answers(**quantities)
                found["mistakes"] = {
                    name: repr(check(exercise, answer, **quantities))
                    for name, (answer, _) in wrong.items()
                }
        except Exception:
            found["error"] = traceback.format_exc()
    after = _contents(lesson)
    found["changed"] = sorted(name for name in before if after[name] != before[name])
    for name, value in beside.items():
        own = lesson.get(name, MISSING)
        if value is not own:
            ASSIGNED[name] = (value, own)
    print(json.dumps(found))


def _run(source: str, namespace: dict):
    """Run a cell's code; returns the value of its last line, if that is an expression."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body.append(last)
    exec(compile(ast.Module(body, []), "<solution>", "exec"), namespace)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "<solution>", "eval"), namespace)
    return None


@contextmanager
def _unnoticed():
    """Captures what is printed or shown, closes figures, and puts the random states back."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        with capture_output():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if "matplotlib.pyplot" in sys.modules:
            # Jupyter shows open figures after the cell. It has closed the lesson's own by now.
            sys.modules["matplotlib.pyplot"].close("all")


def _contents(namespace: dict) -> dict[str, int]:
    """A checksum of each array and generator: a copied namespace still shares their contents."""
    found = {}
    for name, value in namespace.items():
        if isinstance(value, torch.Generator):
            value = value.get_state()
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            value = value.float() if value.dtype is torch.bfloat16 else value  # NumPy has none
            value = value.numpy(force=True)
        if isinstance(value, numpy.ndarray) and value.dtype.kind != "O":
            found[name] = zlib.crc32(numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8))
    return found
