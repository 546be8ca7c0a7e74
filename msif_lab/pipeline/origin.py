"""Where a result comes from, in a few numbers that it carries: which pipeline, queries and target.

Results of different pipelines look alike: the same shapes, names and numbered ids. Numbers rather
than digests, so that a pipeline in another precision is still the same one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data.examples import Examples
from ..data.fields import Fields
from ..fingerprints import same_by_name
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


def of_queries(question: Question) -> list[list[float]]:
    """A sketch of each query; one of all of them of an aggregate; none where read lazily."""
    rows = _rows(question.queries)
    return (_all(rows) if question.combine is not None else rows).tolist()


def _rows(queries: Examples) -> Tensor:
    """Norm of each query, and its product with a fixed vector, ``(Q, 2)``."""
    x = queries.x
    parts = [*(x.values() if isinstance(x, Fields) else [x]), queries.y]
    if not all(isinstance(part, Tensor) for part in parts):
        return torch.zeros(0, 2)
    flat = [part.detach().cpu().double().reshape(len(queries), -1) for part in parts]
    joined = torch.cat(flat, 1)
    return torch.stack([joined.norm(dim=1), joined @ _fixed(joined.shape[1])], 1)


def _all(rows: Tensor) -> Tensor:
    """One sketch of all queries, from those of each."""
    if not len(rows):
        return rows
    return torch.stack([rows[:, 0].norm(), rows[:, 1] @ _fixed(len(rows)).to(rows)])[None]


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
        known = ours["weights"] and theirs["weights"]  # an average of runs has none of its own
        if known and not _same(ours["weights"], theirs["weights"]):
            return f"pipelines that differ in the trained weights of stage {name!r}"
    if not same_by_name(left["target"], right["target"]):
        return (
            f"targets {left['target']} and {right['target']} (by their code and all that it uses: "
            "a target must keep no counter or cache)"
        )
    if left["queries"] and right["queries"]:
        pairs = zip(left["queries"], right["queries"], strict=True)
        for i, (ours, theirs) in enumerate(pairs):
            if not _same(ours, theirs):
                return f"queries that differ, first at row {i}, under the same ids"
    return ""


def asked_about(origin: Origin, ids: Tensor, examples: Examples) -> bool:
    """Whether a result's queries are among these examples, or its aggregate is of just them.

    Args:
        origin: of the result.
        ids: of the result's rows; −1 for an aggregate.
        examples: in memory; of others nothing is known.
    """
    rows = _rows(examples)
    if not origin or not len(rows):
        return False
    if ids.tolist() == [-1]:
        return any(_same(asked, _all(rows).tolist()[0]) for asked in origin["queries"])
    held = dict(zip(examples.ids.tolist(), rows.tolist(), strict=True))
    pairs = zip(ids.tolist(), origin["queries"], strict=False)
    return any(i in held and _same(asked, held[i]) for i, asked in pairs)


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
    kept = torch.tensor(origin["queries"], dtype=torch.float64)[rows].reshape(-1, 2).tolist()
    return dict(origin) | {"queries": kept}


def all_rows(origin: Origin) -> Origin:
    """The origin of the mean of all rows."""
    if not origin or not origin["queries"]:
        return origin
    rows = torch.tensor(origin["queries"], dtype=torch.float64)
    return dict(origin) | {"queries": _all(rows).tolist()}


def averaged(origins: Sequence[Origin]) -> Origin:
    """The origin of an average over runs, which belongs to none of their weights.

    Raises:
        ValueError: the runs differ in more than their weights.
    """
    if not all(origins):
        return {}
    first, stages = origins[0], {}
    for name, stage in first["stages"].items():
        each = [origin["stages"].get(name, {}).get("weights") for origin in origins]
        stages[name] = stage | {"weights": [], "runs": each}
    joined = first | {"stages": stages}
    for i, origin in enumerate(origins):
        if differ := difference(joined, origin):
            raise ValueError(f"runs 0 and {i} are of different {differ}")
    return joined


def some_runs(origin: Origin, places: Sequence[int]) -> Origin:
    """The origin of an average over some of the runs of another average."""
    if not origin:
        return origin
    stages = {
        name: stage | {"runs": [stage["runs"][i] for i in places]}
        for name, stage in origin["stages"].items()
    }
    return dict(origin) | {"stages": stages}


def share_runs(left: Origin, right: Origin) -> bool:
    """Whether results, each of a run or an average of several, have a run in common."""
    if not left or not right:
        return False
    ours, theirs = (_runs(origin) for origin in (left, right))
    return any(all(map(_same, mine, other)) for mine in ours for other in theirs)


def _runs(origin: Origin) -> list[tuple]:
    """The weights of all stages in each run that a result is of."""
    stages = origin["stages"].values()
    return list(zip(*(stage.get("runs") or [stage["weights"]] for stage in stages), strict=True))


def checked(given) -> Origin:
    """An origin as read from a file.

    Raises:
        TypeError, KeyError: it is none.
    """
    if not isinstance(given, Mapping):
        raise TypeError("origin is no mapping")
    if given:
        for stage in given["stages"].values():
            _same(stage["weights"], stage["weights"])
            _same(stage["examples"], stage["examples"])
            for weights in stage.get("runs", ()):
                _same(weights, weights)
            str(stage["ids"])
        torch.tensor(given["queries"], dtype=torch.float64).reshape(-1, 2)
        if not isinstance(given["target"], str):
            raise TypeError("the target of an origin is no text")
    return dict(given)
