"""The same stages trained under many seeds: initial weights and batches are drawn anew for each."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..arguments import check_path, check_whole, listed
from ..fingerprints import describe, same_by_name
from ..objective.exclusive import exclusive
from ..objective.layout import Layout
from ..objective.wrapping import plain_module
from ..parallel import check_jobs, each_result
from ..storage import check_writable, digest
from .pipeline import Pipeline
from .recipes import FitReport, progress_bar
from .stages import Stage

__all__ = ["SeedRuns", "over_seeds"]

PARTS = ("weights", "batches")
# By how much the spread of redrawn weights may differ from that of the given ones, besides the
# noise of a small tensor; PyTorch's own ways of drawing a linear layer are 1.7-fold apart.
SPREAD = 1.25
NO_CHANGE = (
    "so the seed changes nothing: build(seed) must pass it on to the models (initial weights) and "
    "recipes (batches)"
)


class SeedRuns(Sequence):
    """Pipelines of the same stages and data that differ in their seeds, all of them trained.

    `over_seeds` makes them; your own runs do too, each a pipeline with `Pipeline.adopt`.

    Args:
        pipelines: one or more, trained.
        seeds: what each is known by; default 0, 1, ....

    Raises:
        ValueError, TypeError: no trained pipelines, other stages, losses or data than the first, or
            two runs that ended at the same weights, bit for bit.
    """

    def __init__(self, pipelines: Iterable[Pipeline], seeds: Iterable[int] | None = None):
        self.pipelines = list(pipelines)
        self.seeds = list(range(len(self.pipelines))) if seeds is None else _seeds(seeds)
        if not self.pipelines or not all(isinstance(p, Pipeline) for p in self.pipelines):
            raise TypeError("pipelines must be one or more msif_lab.Pipeline, one for each seed")
        if len(self.seeds) != len(self.pipelines):
            raise ValueError(f"{len(self.pipelines)} pipelines have {len(self.seeds)} seeds")
        for seed, pipeline in zip(self.seeds, self.pipelines, strict=True):
            _require_alike(self.pipelines[0], pipeline, f"the run of seed {seed}")
        ends = [torch.cat(pipeline.trained()) for pipeline in self.pipelines]
        for i, end in enumerate(ends):
            for j in range(i):
                if torch.equal(ends[j], end):
                    raise ValueError(
                        f"the runs of seeds {self.seeds[j]} and {self.seeds[i]} end at the same "
                        f"weights, {NO_CHANGE}"
                    )

    def __len__(self) -> int:
        return len(self.pipelines)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return SeedRuns(self.pipelines[index], self.seeds[index])
        return self.pipelines[index]

    def __repr__(self) -> str:
        names = [stage.name for stage in self.pipelines[0].stages]
        return f"SeedRuns({len(self)} seeds {_shown(self.seeds)} of stages {names})"

    def evaluate(self, queries, target: str | Callable = "loss", *, aggregate=None) -> Tensor:
        """q of each query under each seed, ``(S, Q)``; see `Pipeline.evaluate`."""
        rows = [p.evaluate(queries, target, aggregate=aggregate) for p in self.pipelines]
        return torch.stack(rows)


def over_seeds(
    build: Callable[[int], Pipeline] | Pipeline,
    seeds: int | Iterable[int] = 8,
    *,
    redraw: Sequence[str] = PARTS,
    n_jobs: int = 1,
    lanes: int = 1,
    store=None,
    progress: bool = True,
) -> SeedRuns:
    """Train the same stages once for each seed.

    One run says what its own next run under the same seed would do without an example; what to
    expect of *any* run is the mean over seeds: `AveragedInfluence`, and `removal_effects` of these
    runs.

    Args:
        build: makes the pipeline of a seed, not fitted yet, which passes the seed on to its models
            and recipes; its data must not depend on it. Or a pipeline, of which each seed draws
            new initial weights and batches: every module is initialised again as PyTorch does it
            (`reset_parameters`), but for parameters that all start at one number, as a head at
            zero, and those that are not trained.
        seeds: whole numbers; or how many, from 0 on.
        redraw: of a pipeline: ``"weights"``, ``"batches"`` or both. ``("batches",)`` for weights
            that were pretrained elsewhere.
        n_jobs: processes through joblib; ``joblib.parallel_config`` moves them to a cluster.
        lanes: how many seeds a process trains at once, vectorised over models. Eight take a third
            to a half of the time; the last bits differ from those of `Pipeline.fit`. Not of stages
            that differ in more than weights and batches, nor of data read lazily.
        store: a folder that keeps each run once it is there; the same call goes on from it.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        ValueError, TypeError: no pipelines, seeds that are none or repeated, data that depend on
            the seed, a seed that changes nothing, or weights that were not drawn by
            `reset_parameters`.
        SavedFileError: ``store`` holds runs of other stages, or damaged files.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2)
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10), train, recipe=recipe)
    >>> msif.over_seeds(msif.Pipeline([stage]), seeds=3)
    SeedRuns(3 seeds 0, 1, 2 of stages ['digits'])
    """
    given = isinstance(seeds, Iterable)
    seeds = _seeds(seeds if given else range(check_whole("seeds", seeds, why="or several")))
    lanes, n_jobs = check_whole("lanes", lanes), check_jobs(n_jobs)
    if store is not None:
        check_path("store", store)
    redraw = listed("redraw", redraw, f"one or more of {PARTS}")
    if not redraw or any(part not in PARTS for part in redraw):
        raise ValueError(f"redraw={redraw!r} must hold one or more of {PARTS}")
    pipelines = not_fitted(build, seeds, redraw)
    paths = seed_paths(store, seeds)
    left = [i for i, path in enumerate(paths) if path is None or not path.exists()]
    for i in set(range(len(seeds))) - set(left):
        pipelines[i].load(paths[i])
    kept = "nothing is kept; give store=" if store is None else f"finished runs are in {store!s}"
    parts = [left[i : i + lanes] for i in range(0, len(left), lanes)]
    calls = [([pipelines[i] for i in part],) for part in parts]
    with progress_bar(len(seeds), "seeds", progress) as bar:
        bar.update(len(seeds) - len(left))
        for place, fits in each_result(_fitted, calls, n_jobs, lambda: kept):
            for i, fit in zip(parts[place], fits, strict=True):
                pipelines[i].take_fit(*fit)
                if paths[i] is not None:
                    pipelines[i].save(paths[i])
                bar.update()
    return SeedRuns(pipelines, seeds)


def not_fitted(
    build: Callable[[int], Pipeline] | Pipeline, seeds: Sequence[int], redraw: Sequence = PARTS
) -> list[Pipeline]:
    """The pipeline of each seed, as `over_seeds` trains it.

    Raises:
        ValueError, TypeError: as `over_seeds`.
    """
    pipelines = [_made(build, seed, redraw) for seed in seeds]
    for seed, pipeline in zip(seeds, pipelines, strict=True):
        _require_alike(pipelines[0], pipeline, f"build({seed})")
        pipeline.share_data(pipelines[0])
    _require_different(pipelines, seeds)
    return pipelines


def _fitted(pipelines: Sequence[Pipeline]) -> list[tuple[list[Tensor], list[FitReport]]]:
    """What fits, perhaps in another process, gave: all parameters and reports of each."""
    if len(pipelines) > 1 and (alike := one_function(pipelines)):
        return pipelines[0].fit_lanes(*alike)
    for pipeline in pipelines:
        pipeline.fit(progress=False)
    return [(pipeline.trained(), pipeline.reports) for pipeline in pipelines]


def one_function(pipelines: Sequence[Pipeline]) -> tuple[list[Tensor], list] | None:
    """Initial parameters ``(S, D)`` and seeds of the batches by stage, if that is all that differs.

    None where it is not, or where data are no tensors, which alone can be indexed for all at once.
    """
    first = pipelines[0]
    for stage in first.stages:
        if not all(isinstance(part, Tensor) for part in (stage.data.x, stage.data.y)):
            return None
    known = _without_seeds(first)
    if any(_without_seeds(pipeline) != known for pipeline in pipelines[1:]):
        return None
    places = range(len(first.stages))
    starts = [torch.stack([p.initial(k) for p in pipelines]) for k in places]
    recipes = [[p.stages[k].recipe for p in pipelines] for k in places]
    seeds = [tuple(r.seed for r in each) if _seeded(each[0]) else None for each in recipes]
    for stage, each in zip(first.stages, recipes, strict=True):
        if callable(getattr(each[0], "batches", None)):  # which may differ in size from run to run
            sizes = [[len(batch) for batch, _ in r.steps(len(stage.data))] for r in each]
            if any(one != sizes[0] for one in sizes):
                return None
    return starts, seeds


def _seeded(recipe) -> bool:
    """Whether a recipe has a seed that can be exchanged."""
    return is_dataclass(recipe) and any(f.name == "seed" for f in fields(recipe))


def _without_seeds(pipeline: Pipeline) -> list:
    """All that identifies a pipeline but for its initial weights and seeds."""
    found = []
    for stage, facts in zip(pipeline.stages, pipeline.facts()["stages"], strict=True):
        recipe = stage.recipe
        if _seeded(recipe):
            recipe = replace(recipe, seed=0)
        home = stage.data.x.dtype, str(stage.data.x.device), pipeline.initial(len(found)).dtype
        found.append(facts | {"recipe": describe(recipe), "home": home})
    return found


def _seeds(given: Iterable[int]) -> list[int]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"seeds={given!r} must be whole numbers, such as range(8), or how many")
    seeds = list(given)
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={seeds!r} must be one or more different whole numbers from 0 on")
    return seeds


def _shown(seeds: Sequence[int]) -> str:
    if len(seeds) <= 4:
        return ", ".join(map(str, seeds))
    return f"{seeds[0]}, {seeds[1]}, … {seeds[-1]}"


def seed_paths(store, seeds: Sequence[int], what: str = "") -> list[Path | None]:
    """A file for each seed in a folder, which is made; None for all where nothing is kept."""
    if store is None:
        return [None] * len(seeds)
    check_path("store", store)
    folder = Path(store)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"seed-{seed}{what}.safetensors" for seed in seeds]
    for path in paths:
        check_writable(path)
    return paths


def _require_alike(first: Pipeline, pipeline: Pipeline, name: str) -> None:
    """Refuse runs that differ in more than their seeds."""
    names = [[stage.name for stage in p.stages] for p in (first, pipeline)]
    if names[0] != names[1]:
        raise ValueError(f"{name} has stages {names[1]}, the first run {names[0]}")
    for ours, theirs in zip(pipeline.stages, first.stages, strict=True):
        differ = []
        if ours.data is not theirs.data and ours.data.digest() != theirs.data.digest():
            differ.append("data; draw the examples by a seed of their own")
        if not same_by_name(describe(ours.loss), describe(theirs.loss)):
            differ.append("loss")
        if type(ours.link) is not type(theirs.link):
            differ.append("link")
        if differ:
            raise ValueError(f"{name}: stage {ours.name!r} has another {differ[0]}")


def _require_different(pipelines: Sequence[Pipeline], seeds: Sequence[int]) -> None:
    """Refuse seeds that give the same initial weights and recipes, before any training."""
    found: dict[tuple, int] = {}
    for seed, pipeline in zip(seeds, pipelines, strict=True):
        weights = digest(*(pipeline.initial(k) for k in range(len(pipeline.stages))))
        recipes = tuple(describe(stage.recipe) for stage in pipeline.stages)
        other = found.setdefault((weights, recipes), seed)
        if other != seed:
            raise ValueError(f"seeds {other} and {seed} give the same run, {NO_CHANGE}")


def _made(build, seed: int, redraw: Sequence[str]) -> Pipeline:
    if isinstance(build, Pipeline):
        return _redrawn(build, seed, redraw)
    if not callable(build):
        raise TypeError(
            f"build is {type(build).__name__}: give a function of the seed that makes a Pipeline, "
            "or a Pipeline whose weights and batches are to be redrawn"
        )
    pipeline = build(seed)
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"build({seed}) gives {type(pipeline).__name__}, not msif_lab.Pipeline (of an "
            "experiment: lambda seed: experiments.digits(link, seed=seed).pipeline)"
        )
    return pipeline


def _redrawn(pipeline: Pipeline, seed: int, redraw: Sequence[str]) -> Pipeline:
    """The same stages with initial weights and batches of this seed."""
    count = len(pipeline.stages)
    return Pipeline(
        [
            redrawn_stage(stage, seed * count + k, redraw, pipeline.initial(k))
            for k, stage in enumerate(pipeline.stages)
        ]
    )


def redrawn_stage(
    stage: Stage, seed: int, redraw: Sequence[str] = PARTS, initial: Tensor | None = None
) -> Stage:
    """A stage with initial weights and batches of this seed, and a model of its own.

    Args:
        stage: whose model holds its initial weights, unless they are given.
        seed, redraw: as in `over_seeds`.
        initial: all parameters ``(D,)`` before training.
    """
    model, recipe = copy.deepcopy(stage.model), stage.recipe
    if initial is not None:
        _put(model, stage.name, initial)
    if "weights" in redraw:
        _draw(plain_module(model), seed, f"stage {stage.name!r}")
    if "batches" in redraw and _seeded(recipe):
        recipe = replace(recipe, seed=seed)
    return replace(stage, model=model, recipe=recipe)


@exclusive
def _put(model: nn.Module, name: str, full: Tensor) -> None:
    inside = plain_module(model)
    values = Layout(inside, name).named(full)
    with torch.no_grad():
        for key, parameter in inside.named_parameters():
            parameter.copy_(values[key])


def _draw(model: nn.Module, seed: int, where: str) -> None:
    """Initialise a model again, but for parameters that start at one number or are not trained."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = set()
    with torch.random.fork_rng(devices=[]):  # PyTorch's initialisers know the global generator only
        torch.manual_seed(seed)
        for module in reversed(list(model.modules())):  # a parent may draw its children's
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(reset):
                reset()
                drawn |= {id(p) for p in module.parameters()}
    other = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = before[name]
            if not parameter.requires_grad or bool((old == old.reshape(-1)[0]).all()):
                parameter.copy_(old)
            elif id(parameter) not in drawn or _differ_in_spread(old, parameter):
                other.append(name)
    if other:
        raise ValueError(
            f"{where}: the initial weights of {other[:5]} were not drawn by reset_parameters(), so "
            "they cannot be drawn again; give build(seed) instead, a function that makes the "
            "pipeline, or redraw=('batches',) to keep all initial weights"
        )


def _differ_in_spread(old: Tensor, new: Tensor) -> bool:
    """Whether two draws of a tensor are of different spread, beyond the noise of small ones."""
    n = old.numel()
    sizes = [float(t.detach().double().square().mean().sqrt()) for t in (old, new)]
    allowed = math.log(SPREAD) + 4 / math.sqrt(2 * n)
    return n > 8 and abs(math.log(max(sizes[0], 1e-30) / max(sizes[1], 1e-30))) > allowed
