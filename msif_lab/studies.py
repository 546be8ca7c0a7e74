"""Every method compared with real retraining, over links and seeds: the results tables.

    python -m msif_lab.studies mnist cifar --jobs 2 --out notebooks/results

remakes the tables that the README and the lessons show.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib

from .arguments import check_choice, check_function, check_instance, check_whole, listed
from .errors import ConvergenceWarning
from .evaluation.comparison import compare_methods, noise_ceiling
from .evaluation.removals import Effects, random_removals, removal_effects
from .experiments import AT_OPTIMUM, LINKS, SETTINGS, Experiment
from .influence.baselines import TracIn, all_baselines
from .influence.implicit import ImplicitInfluence
from .influence.result import Influence
from .influence.segmented import SegmentedInfluence
from .influence.unrolled import UnrolledInfluence
from .parallel import check_jobs
from .pipeline.pipeline import Pipeline
from .pipeline.recipes import SGD
from .pipeline.stages import Proximal, WarmStart
from .solvers.exact import Exact
from .storage import digest, write_bytes

__all__ = ["run", "study"]

OPTIMUM_METHODS = {
    "implicit, leave one out": {"leave_one_out": True},
    "implicit": {},
    "implicit, GGN": {"curvature": "ggn"},
}
SEGMENTS = (3, 6, 12, 24)
REMOVALS = {"one": None, "2 %": 0.02, "10 %": 0.1}


def implicit(experiment: Experiment, solver=None) -> Influence:
    """The paper's formula at the weights where SGD stopped, a warm start read as proximal.

    With the GGN and without damping: where a stage is not at a minimum, the Hessian may be
    indefinite. `SGD.equivalent_alpha` is the coupling that resembles the number of steps.
    """
    pipeline = experiment.pipeline
    if any(isinstance(stage.link, WarmStart) for stage in pipeline.stages):
        pipeline = _as_proximal(pipeline)
    method = ImplicitInfluence(solver or Exact("4GB"), curvature="ggn")
    with warnings.catch_warnings():
        # The stages are not at a minimum; what the formula gives there is the very question.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return method.fit(pipeline, progress=False).score(experiment.queries, progress=False)


def _as_proximal(pipeline: Pipeline) -> Pipeline:
    """The same trained weights, adopted by stages with `Proximal` links for warm starts."""
    stages = [replace(stage) for stage in pipeline.stages]
    for stage in stages:
        if isinstance(stage.link, WarmStart):
            stage.link = Proximal(stage.recipe.equivalent_alpha(len(stage.data)), stage.link.shared)
    return Pipeline(stages).adopt()


def scorers(
    experiment: Experiment, kinds: Sequence[str], progress: bool
) -> Mapping[str | tuple, Callable]:
    """The methods that suit how the experiment was trained, as functions without arguments.

    Each makes its method when it is called, so that the matrices of one are freed before the next.

    Args:
        experiment: fitted.
        kinds: of removals, for the methods that are made for one kind.
        progress: show bars.

    Returns:
        functions that return scores, by method, or ``(method, kind)`` where they are for one kind.
    """
    pipeline = experiment.pipeline
    queries = experiment.queries
    solver = Exact("4GB")

    def scored(method) -> Influence:
        return method.fit(pipeline, progress).score(queries, progress=progress)

    def unrolled(group_fraction: float = 0.0) -> Influence:
        # Agreement is measured for real, so no runs for trust.
        return scored(UnrolledInfluence(group_fraction=group_fraction, trust=0))

    def at_optimum(settings: dict) -> Influence:
        return scored(ImplicitInfluence(solver, **settings))

    ways: dict[str | tuple, Callable] = {}
    baselines = all_baselines(solver)
    if all(isinstance(stage.recipe, SGD) for stage in pipeline.stages):
        ways["unrolled"] = unrolled
        for kind in kinds:
            fraction = REMOVALS.get(kind)
            if fraction is not None:
                ways["unrolled, for groups", kind] = partial(unrolled, fraction)
        ways["implicit, GGN"] = partial(implicit, experiment, solver)
    else:
        for name, settings in OPTIMUM_METHODS.items():
            ways[name] = partial(at_optimum, settings)
        del baselines["TracIn"]  # LBFGS leaves no run to trace
    for name, method in baselines.items():
        ways[name] = partial(scored, method)
    return ways


def checkpoint_scorers(
    experiment: Experiment, kinds: Sequence[str], progress: bool
) -> Mapping[str | tuple, Callable]:
    """Methods that read a run from its checkpoints, beside those that see all of it or its end.

    Arguments and result as in `scorers`. "Details": which examples each step had and the mean
    weights between checkpoints are known too. SOURCE is for one stage; across stages its reading
    (Gauss-Newton, gradient flow) takes our way over the links.
    """
    pipeline, queries = experiment.pipeline, experiment.queries

    def scored(method) -> Influence:
        return method.fit(pipeline, progress).score(queries, progress=progress)

    known = scorers(experiment, (), progress)
    ways = {name: known[name] for name in ("unrolled", "implicit, GGN")}
    for count in SEGMENTS:
        of = SegmentedInfluence(count, trust=0)
        ways[f"{count} segments, details"] = partial(scored, of)
        plain = SegmentedInfluence(count, details=False, trust=0)
        ways[f"{count} segments"] = partial(scored, plain)
    source = {"curvature": "ggn", "details": False}
    ways["GGN, 12 segments"] = partial(scored, SegmentedInfluence(12, trust=0, **source))
    ways["SOURCE, 12 segments"] = partial(
        scored, SegmentedInfluence(12, dynamics="flow", trust=0, **source)
    )
    ways["TracIn, 12 checkpoints"] = partial(scored, TracIn(12))
    return ways


def _known(name: str, given, options: Mapping) -> list[str]:
    """Some of the names, checked."""
    found = listed(name, given, f"a list of {list(options)}")
    if not found:
        raise ValueError(f"{name} is empty; give some of {list(options)}")
    for one in found:
        check_choice(name, one, options)
    return found


def run(
    experiment: Experiment,
    *,
    removals: int = 40,
    kinds: Sequence[str] = tuple(REMOVALS),
    methods: Sequence[str] | None = None,
    ways: Callable = scorers,
    folder=None,
    progress: bool = True,
) -> tuple[dict, dict[str, Effects]]:
    """Fit one experiment, remove examples for real, and score them by every method.

    Args:
        experiment: from one of the builders.
        removals: how many of each kind, drawn at random, the same for every seed of training.
        kinds: of `REMOVALS`: single examples and random groups of 2 % and 10 %.
        methods: names; default all that suit how the experiment is trained, baselines included.
        ways: `scorers` or `checkpoint_scorers`.
        folder: keep retrainings here and resume from it.
        progress: show bars.

    Returns:
        scores by method (``(method, kind)`` where they are for one kind of removal) and effects by
        kind, as `compare_methods` takes them.
    """
    check_instance("experiment", experiment, Experiment, "from a builder in msif_lab.experiments")
    kinds = _known("kinds", kinds, REMOVALS)
    check_whole("removals", removals)
    check_function("ways", ways, "such as scorers or checkpoint_scorers")
    pipeline = experiment.pipeline.fit(progress)
    found = ways(experiment, kinds, progress)
    known = {name if isinstance(name, str) else name[0] for name in found}
    if not set(methods or ()) <= known:
        raise ValueError(f"methods {sorted(set(methods) - known)} are none of {sorted(known)}")
    m = len(pipeline.stages[0].data)
    key = digest(*pipeline.trained())[:12]
    effects = {}
    for kind in kinds:
        groups = random_removals(m, removals, REMOVALS[kind])
        store = None
        if folder is not None:
            store = Path(folder) / f"{key}-{kind.replace(' %', '')}.safetensors"
        effects[kind] = removal_effects(
            pipeline, experiment.queries, groups, store=store, progress=progress
        )
    scores = {}
    for name, way in found.items():
        method = name if isinstance(name, str) else name[0]
        if methods is None or method in methods:
            scores[name] = way()
    return scores, effects


def study(
    setting: str,
    *,
    links: Sequence[str] | None = None,
    seeds: int = 3,
    removals: int = 40,
    kinds: Sequence[str] = tuple(REMOVALS),
    size: str = "large",
    ways: Callable = scorers,
    folder=None,
    n_jobs: int = 1,
    **changes,
):
    """Compare every method with real retraining in one setting, for some links, over seeds.

    Args:
        setting: a name in `experiments.SETTINGS`.
        links: names in `experiments.LINKS`; default frozen and warm start, or for stages trained to
            an optimum frozen and proximal.
        seeds: how many seeds of initial weights and batches; data, queries and removals stay the
            same, so that the noise ceiling compares like with like.
        removals, kinds, ways, folder: as in `run`.
        size, changes: as in the builders.
        n_jobs: processes, one for each link and seed.

    Returns:
        the table of `compare_methods` with the noise ceiling, pooled over seeds, with columns for
        the setting, the link, sizes, seeds and mean accuracy.
    """
    import pandas

    check_choice("setting", setting, SETTINGS)
    links = None if links is None else _known("links", links, LINKS)
    kinds = _known("kinds", kinds, REMOVALS)
    seeds, removals = check_whole("seeds", seeds), check_whole("removals", removals)
    check_function("ways", ways, "such as scorers or checkpoint_scorers")
    n_jobs = check_jobs(n_jobs)
    links = links or (("frozen", "proximal") if setting in AT_OPTIMUM else ("frozen", "warm start"))

    def one(link, seed):
        experiment = SETTINGS[setting](LINKS[link], size=size, seed=seed, **changes)
        scores, effects = run(
            experiment, removals=removals, kinds=kinds, ways=ways, folder=folder, progress=False
        )
        counts = [len(stage.data) for stage in experiment.pipeline.stages]
        return scores, effects, experiment.accuracy(), counts

    jobs = (joblib.delayed(one)(link, seed) for link in links for seed in range(seeds))
    done = joblib.Parallel(n_jobs)(jobs)
    tables = []
    for i, link in enumerate(links):
        scores, effects, accuracies, counts = zip(*done[i * seeds : (i + 1) * seeds], strict=True)
        by_kind = {kind: [e[kind] for e in effects] for kind in effects[0]}
        by_method = {name: [s[name] for s in scores] for name in scores[0]}
        table = compare_methods(by_method, by_kind)
        if seeds > 1:
            table = pandas.concat([table, noise_ceiling(by_kind)])
        facts = {
            "setting": setting,
            "link": link,
            "seeds": seeds,
            "count": removals,
            "accuracy": sum(accuracies) / seeds,
            "pretraining": counts[0][0],
            "finetuning": counts[0][1],
        }
        tables.append(table.assign(**facts))
    return pandas.concat(tables, ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: one CSV file for each setting."""
    parser = argparse.ArgumentParser(
        prog="python -m msif_lab.studies", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("settings", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--removals", type=int, default=40, help="of each kind: single examples, 2 %%, 10 %%"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(REMOVALS), default=list(REMOVALS))
    parser.add_argument(
        "--links", nargs="+", choices=list(LINKS), help="default: the two that suit the training"
    )
    parser.add_argument("--size", default="large", help="live or large")
    parser.add_argument("--jobs", type=int, default=1, help="processes; a gigabyte or two each")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for SETTING.csv; retrainings resume from here",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="compare methods that read checkpoints instead; writes SETTING_checkpoints.csv",
    )
    given = parser.parse_args(arguments)
    for setting in given.settings:
        store = given.out / "retrainings" / setting
        store.mkdir(parents=True, exist_ok=True)
        table = study(
            setting,
            links=given.links,
            seeds=given.seeds,
            removals=given.removals,
            kinds=given.kinds,
            size=given.size,
            ways=checkpoint_scorers if given.checkpoints else scorers,
            folder=store,
            n_jobs=given.jobs,
        )
        path = given.out / f"{setting}{'_checkpoints' * given.checkpoints}.csv"
        write_bytes(path, table.to_csv(index=False, float_format="%.4g").encode())
        print(f"{path}: {len(table)} rows")


if __name__ == "__main__":
    main()
