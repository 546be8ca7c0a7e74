"""Where a result comes from, in a few numbers that it carries: which pipeline, queries and target.

Results of different pipelines look alike: the same shapes, names and numbered ids. Numbers rather
than digests, so that a pipeline in another precision is still the same one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data.examples import Examples
from ..data.fields import Fields
from ..objective.objective import Objective
from ..objective.questions import Question
from ..storage import digest

CLOSE = 1e-4  # relative; another precision changes less, another run more
MOST = 10**6  # numbers of a tensor that are looked at

Origin = dict  # JSON-able: "stages" by name, "queries", "target"


def sketch(tensor: Tensor) -> list[float]:
    """Norm of a tensor, and its product with a fixed vector; of a part of it if it is large."""
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, len(flat) // MOST)].cpu().double()
    return [float(flat.norm()), float(flat @ _fixed(len(flat)))]


def _fixed(length: int) -> Tensor:
    return torch.cos(0.7 * torch.arange(length, dtype=torch.float64))


def of_stage(o: Objective, full: Tensor) -> dict:
    """Of a stage's weights and examples."""
    x = o.data.x
    named = dict(x.items()) if isinstance(x, Fields) else {"x": x}
    parts = [sketch(t) for t in (*named.values(), o.data.y) if isinstance(t, Tensor)]
    return {"weights": sketch(full), "examples": parts, "ids": digest(o.data.ids)[:12]}


def of_queries(question: Question) -> list[float]:
    """A number for each query; one for all of them of an aggregate; none where read lazily."""
    rows = _rows(question.queries)
    if question.combine is not None and len(rows):
        return [float(rows @ _fixed(len(rows)))]
    return rows.tolist()


def _rows(queries: Examples) -> Tensor:
    x = queries.x
    parts = [*(x.values() if isinstance(x, Fields) else [x]), queries.y]
    if not all(isinstance(part, Tensor) for part in parts):
        return torch.zeros(0)
    flat = [part.detach().cpu().double().reshape(len(queries), -1) for part in parts]
    return sum((i + 1) * (part @ _fixed(part.shape[1])) for i, part in enumerate(flat))


def difference(left: Origin, right: Origin) -> str:
    """What two results that should belong together do not share, in words; empty if nothing.

    Of results without an origin nothing is known: of older files, and of one's own training.
    """
    if not left or not right:
        return ""
    if left["stages"].keys() != right["stages"].keys():
        return f"pipelines with stages {list(left['stages'])} and {list(right['stages'])}"
    for name, ours in left["stages"].items():
        theirs = right["stages"][name]
        for key, words in (("ids", "ids of the examples"), ("examples", "examples")):
            if not _same(ours[key], theirs[key]):
                return f"pipelines that differ in the {words} of stage {name!r}"
        if not _same(ours["weights"], theirs["weights"]):
            return f"pipelines that differ in the trained weights of stage {name!r}"
    if left["target"] != right["target"]:
        return f"targets {left['target']} and {right['target']}"
    if left["queries"] and right["queries"]:
        pairs = zip(left["queries"], right["queries"], strict=True)
        for i, pair in enumerate(pairs):
            if not _close(*pair, max(map(abs, pair))):
                return f"queries that differ, first at row {i}, under the same ids"
    return ""


def _same(left, right) -> bool:
    """Whether two digests, sketches or lists of sketches agree."""
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    if len(left) != len(right):
        return False
    if left and isinstance(left[0], Sequence):
        return all(map(_same, left, right))
    return all(_close(a, b, max(left[0], right[0])) for a, b in zip(left, right, strict=True))


def _close(left: float, right: float, size: float) -> bool:
    return abs(left - right) <= CLOSE * size


def some_rows(origin: Origin, rows) -> Origin:
    """The origin of some of a result's rows."""
    if not origin or not origin["queries"]:
        return origin
    kept = torch.tensor(origin["queries"], dtype=torch.float64)[rows].reshape(-1).tolist()
    return dict(origin) | {"queries": kept}


def all_rows(origin: Origin) -> Origin:
    """The origin of the mean of all rows."""
    if not origin or not origin["queries"]:
        return origin
    rows = torch.tensor(origin["queries"], dtype=torch.float64)
    return dict(origin) | {"queries": [float(rows @ _fixed(len(rows)))]}


def checked(given) -> Origin:
    """An origin as read from a file.

    Raises:
        TypeError, KeyError: it is none.
    """
    if not isinstance(given, Mapping):
        raise TypeError("origin is no mapping")
    return dict(given) if not given else {k: given[k] for k in ("stages", "queries", "target")}
