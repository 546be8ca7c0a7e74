"""A pipeline as one file: facts that identify it, its weights, and what its training reported."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import SavedFileError
from ..fingerprints import describe, describe_modules, same_by_name
from ..objective.objective import Objective
from ..storage import digest, read_tensors, valid, write_tensors
from .recipes import FitReport
from .stages import FunctionalStage, Stage, decays

ADOPTED = "adopted"  # what stands for the recipe where none of ours trained the weights
REPORTED = ("value", "gradient_norm", "converged")  # of a `FitReport`, one number per lane


def facts(stages: Sequence[Stage], functional: Sequence[FunctionalStage]) -> dict:
    """What a file and a pipeline must agree in: names, shapes, settings, digests; JSON-able."""
    return {"stages": [_stage_facts(s, f) for s, f in zip(stages, functional, strict=True)]}


def _stage_facts(stage: Stage, functional: FunctionalStage) -> dict:
    o = functional.objective
    link = [type(stage.link).__name__, o.alpha, functional.coupled, functional.frozen]
    renamed = {here: there for here, there in functional.shared.items() if here != there}
    link += [renamed] if renamed else []  # files of 0.1.0 know equal names only
    return {
        "name": stage.name,
        "parameters": {name: list(shape) for name, shape in o.layout.shapes.items()},
        "weight_decay": _decay_facts(stage, o),
        "loss": describe(stage.loss),
        "model": str(o.model),
        "code": describe_modules(o.model),
        "buffer": digest(*o.model.buffers()),
        "link": None if stage.link is None else link,
        "recipe": describe(stage.recipe),
        "data": stage.data.digest(),
    }


def former_facts(facts: dict) -> dict:
    """The facts that version 0.1.0 looked at."""
    stages = [{k: v for k, v in stage.items() if k != "code"} for stage in facts["stages"]]
    return facts | {"stages": stages}


def _decay_facts(stage: Stage, o: Objective) -> float | dict[str, float]:
    """λ as one number, or by name where parameters differ."""
    found = decays(stage.weight_decay, o.layout, o.trained_names, o.where)
    if not isinstance(found, Mapping):
        return float(found)
    each = {name: float(found[name]) for name in o.trained_names}
    return each if len(set(each.values())) > 1 else next(iter(each.values()))


def write(
    path,
    facts: dict,
    initial: Sequence[Tensor],
    trained: Sequence[Tensor],
    reports: Sequence[FitReport],
) -> None:
    """Write one safetensors file, all or nothing."""
    tensors = {f"{k}.trained": full for k, full in enumerate(trained)}
    tensors |= {f"{k}.initial": full for k, full in enumerate(initial)}
    for k, report in enumerate(reports):
        tensors |= {f"{k}.{name}": getattr(report, name) for name in REPORTED}
    write_tensors(
        path, "pipeline", tensors, facts | {"iterations": [r.iterations for r in reports]}
    )


def read(
    path, ours: dict, initial: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[FitReport]]:
    """Initial and trained weights on the devices of ``initial``, and reports, if the facts fit.

    Raises:
        SavedFileError: cut off, changed or foreign file, or one of other stages, data or settings.
    """
    # Initial and trained weights in at most twice the precision, and a few numbers of reports.
    most = 10**6 + 4 * sum(full.numel() * full.element_size() for full in initial)
    tensors, theirs = read_tensors(path, "pipeline", most)
    with valid(path):
        _require_equal(
            path, ours["stages"], theirs["stages"], [full.dtype for full in initial], tensors
        )
        _require_weights(tensors, initial)

    def weights(name: str) -> list[Tensor]:
        return [tensors[f"{k}.{name}"].to(full.device) for k, full in enumerate(initial)]

    with valid(path):
        reports = [
            FitReport(
                ours["stages"][k]["recipe"], n, *(tensors[f"{k}.{name}"] for name in REPORTED), 0.0
            )
            for k, n in enumerate(theirs["iterations"])
        ]
        return weights("initial"), weights("trained"), reports


def _require_weights(tensors: dict[str, Tensor], initial: Sequence[Tensor]) -> None:
    """Weights are checked as those of a model are: their number, and no NaN or inf."""
    for k, full in enumerate(initial):
        for name in (f"{k}.initial", f"{k}.trained"):
            if tensors[name].shape != full.shape or not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{name} is not ({len(full)},) finite numbers")


def _same(ours, theirs) -> bool:
    return same_by_name(ours, theirs) if isinstance(ours, str) else ours == theirs


def _require_equal(
    path, ours: list[dict], theirs: list[dict], dtypes, tensors: dict[str, Tensor]
) -> None:
    if len(ours) != len(theirs):
        raise SavedFileError(
            f"{str(path)!r} holds {len(theirs)} stages, this pipeline has {len(ours)}"
        )
    differ = [
        f"stage {mine['name']!r}: {key} is {saved[key]!r} in the file, {mine[key]!r} here"
        for mine, saved in zip(ours, theirs, strict=True)
        for key in mine
        if key in saved or key != "code"  # which version 0.1.0 did not keep
        if not _same(mine[key], saved[key]) and not (key == "recipe" and saved[key] == ADOPTED)
    ]
    for k, (mine, dtype) in enumerate(zip(ours, dtypes, strict=True)):
        found = tensors[f"{k}.trained"].dtype
        if found != dtype:
            differ.append(
                f"stage {mine['name']!r}: weights are {found} in the file, {dtype} here "
                "(pipeline.to)"
            )
    if differ:
        raise SavedFileError(
            f"{str(path)!r} was saved from another pipeline:\n" + "\n".join(differ)
        )
