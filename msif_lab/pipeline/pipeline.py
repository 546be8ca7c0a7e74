"""The pipeline of stages: fit, adopt, retrain under example weights, save, load."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from ..arguments import (
    check_choice,
    check_flag,
    check_instance,
    check_whole,
    numbers_of,
    shown,
)
from ..curvature.gate import fingerprint, lanes_agree
from ..curvature.matrices import DataCurvature, curvature
from ..curvature.soundness import (
    check_gradient,
    missing_loss_curvature,
    missing_second_derivative,
    require_loss_curvature,
    require_second_derivative,
)
from ..data.examples import Examples
from ..data.fields import check_targets
from ..errors import NotConvergedError, UnsupportedModelWarning
from ..objective.checks import ask, check_examples, check_layers, require_derivatives
from ..objective.exclusive import exclusive
from ..objective.layout import Layout, same_numbers
from ..objective.objective import Lanes, Objective
from ..objective.precision import half_precision, require_precision
from ..objective.questions import Question, require_finite
from ..objective.wrapping import plain_module
from . import saved
from .origin import Origin, of_queries, of_stage
from .recipes import FitReport
from .runs import KeptRun, Run
from .stages import FunctionalStage, Stage, WarmStart, check_buffers

__all__ = ["Pipeline", "Retrained"]


class Pipeline:
    """A chain of training stages, each starting from what the one before learned.

    Args:
        stages: one or more `Stage`; the first without link, the others with one.

    Raises:
        ValueError, TypeError: everything wrong with the stages, all at once where possible.
        UnsupportedModelError: a model with dropout or batch statistics switched on.
    """

    @exclusive
    def __init__(self, stages: Sequence[Stage]):
        known = isinstance(stages, Iterable) and not isinstance(stages, str)
        self.stages = list(stages) if known else []
        if not self.stages or not all(isinstance(s, Stage) for s in self.stages):
            raise TypeError(f"stages={shown(stages)} must be a non-empty list of msif_lab.Stage")
        problems = [p for k, s in enumerate(self.stages) for p in s.problems(first=k == 0)]
        names = [s.name for s in self.stages if isinstance(s.name, str)]
        if len(set(names)) != len(names):
            problems.append(f"stage names {names} must differ")
        if problems:
            raise ValueError("\n".join(problems))
        owners: dict[int, str] = {}
        for stage in self.stages:
            for parameter in stage.model.parameters():
                if owners.setdefault(id(parameter), stage.name) != stage.name:
                    raise ValueError(
                        f"stages {owners[id(parameter)]!r} and {stage.name!r} hold the same "
                        "parameter object; each stage needs a model of its own "
                        "(copy.deepcopy(model)), the link carries values across. Where it was "
                        "frozen for the later stage, let the earlier one train it again: "
                        "requires_grad_(True)"
                    )
        models = [plain_module(s.model) for s in self.stages]
        self._initial = [
            Layout(m, s.name).flatten(m) for m, s in zip(models, self.stages, strict=True)
        ]
        self.reports: list[FitReport] | None = None
        self._take(None)
        self._functional: list[FunctionalStage] = []
        self._prepare()
        for functional in self._functional:
            o = functional.objective
            if reason := half_precision(o):
                rest = "Curvature, UnrolledInfluence and retraining are refused; baselines work"
            elif reason := missing_second_derivative(o):
                rest = "Hessians and UnrolledInfluence are refused for it; "
                rest += (
                    "so is curvature='ggn'; baselines work"
                    if missing_loss_curvature(o)
                    else "curvature='ggn' and baselines work"
                )
            else:
                continue
            message = f"{o.where}: {reason}. {rest}"
            warnings.warn(message, UnsupportedModelWarning, stacklevel=3)

    @exclusive
    def _prepare(self) -> None:
        """Make functions of the stages, with their present settings, data and buffers."""
        if len(self.stages) != len(self._initial):
            raise ValueError(
                "stages were added or taken out after the pipeline was made; make a new one: "
                "Pipeline(stages)"
            )
        functional: list[FunctionalStage] = []
        moved, known = None, bool(self._functional)
        for k, stage in enumerate(self.stages):
            functional.append(FunctionalStage(stage, functional[-1] if functional else None))
            objective = functional[-1].objective
            check_examples(objective, stage.data, f"stage {stage.name!r} data")
            inherited = functional[-1].inherited(moved)
            known = known and fingerprint(self._functional[k].objective).fits(objective)
            if known:  # what was found out about it still holds
                objective.recall(self._functional[k].objective)
            moved = objective.once("moved", functools.partial(check_gradient, objective, inherited))
            objective.once("lanes", functools.partial(lanes_agree, objective))
            fingerprint(objective)
        self._functional = functional

    def index(self, stage: int | str) -> int:
        """Position of a stage given by name or (negative) index."""
        names = [s.name for s in self.stages]
        if isinstance(stage, str) and stage in names:
            return names.index(stage)
        if (
            isinstance(stage, int)
            and not isinstance(stage, bool)
            and -len(names) <= stage < len(names)
        ):
            return stage % len(names)
        raise ValueError(
            f"stage={shown(stage)} is neither one of {names} nor an index below {len(names)}"
        )

    # --- training ---------------------------------------------------------------------------------

    def fit(self, progress: bool = True) -> "Pipeline":
        """Train the stages one after the other, and write the result into the models.

        Starts from the weights the models had when the pipeline was made, so calling it again gives
        the same result. Nothing is written until every stage is done: an interrupt leaves the
        models as they were.
        """
        check_flag("progress", progress)
        self._prepare()
        check_buffers(self._functional)
        for stage, functional in zip(self.stages, self._functional, strict=True):
            if hasattr(stage.recipe, "tol"):
                require_precision(functional.objective, f"training to an optimum by {stage.recipe}")
        weights = [None] * len(self.stages)
        done, reports = self._run(weights, [i[None] for i in self._initial], False, progress)
        self._write([full[0] for full in done])
        self.reports = reports
        return self

    def fit_lanes(self, starts: Sequence[Tensor], seeds: Sequence) -> list[tuple[list, list]]:
        """What `fit` would give from other initial weights and batch orders, all at once.

        Args:
            starts: by stage, the initial parameters of each lane ``(R, D)``.
            seeds: by stage, of each lane's batches; None for a recipe without.

        Returns:
            for each lane all parameters and reports, as `take_fit` takes them.
        """
        fulls, reports = self._run([None] * len(self.stages), starts, False, False, seeds)
        one = [torch.tensor([lane]) for lane in range(len(starts[0]))]
        return [
            ([full[i] for full in fulls], [report.lane(at) for report in reports])
            for i, at in enumerate(one)
        ]

    def share_data(self, other: "Pipeline") -> None:
        """Hold the equal data of another pipeline, so that the same numbers are kept once.

        It counts as not trained afterwards.
        """
        for ours, theirs in zip(self.stages, other.stages, strict=True):
            ours.data = theirs.data
        self._take(None)
        self._prepare()

    def take_fit(self, fulls: Sequence[Tensor], reports: Sequence[FitReport]) -> None:
        """Take what `fit` of an equal pipeline gave elsewhere: all parameters and reports."""
        self._prepare()
        self._write(fulls)
        pairs = zip(reports, self.stages, strict=True)
        self.reports = [replace(report, recipe=str(s.recipe)) for report, s in pairs]

    @exclusive
    def adopt(self, checkpoints: Sequence[Run | None] | None = None) -> "Pipeline":
        """Take the models' present weights as the trained ones, after your own training code.

        The stages' losses and weight decay must be those of your code; their recipes only say how
        to retrain. Where your code did not end at an optimum, `Effects.from_values` takes the
        effects that it measures itself.

        Args:
            checkpoints: what your code kept of each stage's run, a `Run` per stage; for
                `SegmentedInfluence` and `TracIn`.

        Raises:
            ValueError: a frozen parameter or a buffer differs from the previous stage's, or NaN or
                inf in the weights; checkpoints that do not belong to the stages, or do not end at
                the models' present weights.
        """
        self._prepare()
        check_buffers(self._functional)
        present = [p.objective.layout.flatten(p.objective.model) for p in self._functional]
        for k in range(1, len(present)):
            p = self._functional[k]
            ours, theirs = p.here["frozen"].take(present[k]), p.there["frozen"].take(present[k - 1])
            if not torch.equal(ours, theirs):
                raise ValueError(
                    f"{p.objective.where}: frozen parameters {p.frozen} differ from those of "
                    f"stage {self.stages[k - 1].name!r}; copy them over, or, if this stage trained "
                    "them too, link=Proximal(alpha=...)"
                )
        runs = self._checked_runs(checkpoints, present)
        self._take(present)
        self.reports, self.runs = None, runs
        return self

    def _checked_runs(
        self, given: Sequence[Run | None] | None, present: Sequence[Tensor]
    ) -> list[KeptRun | None]:
        """What is known of each stage's run, checked to lead to the present weights."""
        if given is None:
            return [None] * len(self.stages)
        listing = isinstance(given, Sequence) and not isinstance(given, str)
        what, given = shown(given), [given] if not listing else list(given)
        if len(given) != len(self.stages) or not all(isinstance(r, Run | None) for r in given):
            raise ValueError(
                f"checkpoints={what} must be one msif.Run for each of the {len(self.stages)} "
                "stages, or None where there are none"
            )
        runs: list[KeptRun | None] = []
        for k, (stage, p, run) in enumerate(zip(self.stages, self._functional, given, strict=True)):
            runs.append(None if run is None else run.of(stage, p))
            if run is None:
                continue
            if not torch.equal(runs[-1].fulls[-1], present[k]):
                raise ValueError(
                    f"{p.objective.where}: the last checkpoint is not what the model holds now; "
                    "load it, model.load_state_dict(...), or keep one more at the end"
                )
            warm = isinstance(stage.link, WarmStart)
            for how in ("frozen", "coupled") if warm else ("frozen",) if k else ():
                ours = p.here[how].take(runs[-1].fulls[0])
                if not torch.equal(ours, p.there[how].take(present[k - 1])):
                    raise ValueError(
                        f"{p.objective.where}: the first checkpoint does not start from what stage "
                        f"{self.stages[k - 1].name!r} ended with; keep it after loading those"
                    )
        return runs

    @property
    def adopted(self) -> bool:
        """Whether the weights were not trained here, by the stages' recipes, but taken over."""
        return self._trained is not None and self.reports is None

    def _run(
        self,
        weights,
        starts,
        warm: bool,
        progress: bool,
        seeds: Sequence | None = None,
        before: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[FitReport]]:
        """Train every stage of every lane, from ``starts`` (R, D) each.

        Shared parts that are trained start at the W* of their own lane, unless ``warm``.
        ``seeds``: by stage, of each lane's own batches. ``before``: the final parameters of the
        first stages where these are done already; only the others have reports.
        """
        done, reports = list(before), []
        previous = done[-1] if done else None
        for k in range(len(done), len(self.stages)):
            stage, p = self.stages[k], self._functional[k]
            lanes = p.lanes(starts[k], previous, weights[k])
            if not warm:
                lanes = p.start(lanes)
            if seeds is not None:
                lanes = replace(lanes, seeds=seeds[k])
            theta = p.objective.trained.take(lanes.base)
            theta, report = stage.recipe.run(lanes, theta, progress=progress)
            if not bool(torch.isfinite(theta).all() & torch.isfinite(report.value).all()):
                raise NotConvergedError(
                    f"stage {stage.name!r}: training by {stage.recipe} ended with NaN or inf"
                )
            previous = lanes.full(theta)
            done.append(previous)
            reports.append(report)
        return done, reports

    def require_repeatable(self) -> None:
        """Raise `ValueError` where a rerun would not repeat the run of `fit`."""
        if self.adopted:
            raise ValueError(
                "the pipeline's weights were adopted, or converted by to(), so the run behind them "
                "is not known; use warm_start=True, or fit()"
            )
        if changed := self._changed():
            raise ValueError(
                f"{'; '.join(changed)} changed since fit(), so this is another run; "
                "call fit() again"
            )
        self._require_same_functions()

    def require_unchanged(self, full: Sequence[Tensor]) -> None:
        """Raise `ValueError` where the trained parameters are no longer ``full``, by stage."""
        for stage, then, now in zip(self.stages, full, self.trained(), strict=True):
            if then.dtype != now.dtype or then.device != now.device or not torch.equal(then, now):
                raise ValueError(
                    f"stage {stage.name!r} changed since fit: {then.dtype} on {then.device} then, "
                    f"{now.dtype} on {now.device} now, or other weights; call fit(pipeline) again"
                )

    def initial(self, stage: int) -> Tensor:
        """All parameters ``(D,)`` of a stage before training, nothing taken over yet."""
        return self._initial[stage]

    def fresh_lanes(self, stage: int, previous: Tensor | None) -> Lanes:
        """A stage as `fit` starts it, all weights one, after a stage that ended at ``previous``."""
        p = self._functional[stage]
        return p.start(p.lanes(self._initial[stage][None], previous, None))

    @exclusive
    def _write(self, fulls: Sequence[Tensor]) -> None:
        named = [
            p.objective.layout.named(full) for p, full in zip(self._functional, fulls, strict=True)
        ]
        pairs = [
            (q, new[n])
            for s, new in zip(self.stages, named, strict=True)
            for n, q in plain_module(s.model).named_parameters()
        ]
        old = [q.detach().clone() for q, _ in pairs]
        with torch.no_grad():
            try:
                for parameter, new in pairs:
                    parameter.copy_(new)
            except BaseException:  # an interrupt between two parameters
                for (parameter, _), before in zip(pairs, old, strict=True):
                    parameter.copy_(before)
                raise
            self._take([full.clone() for full in fulls])

    def _take(self, trained: list[Tensor] | None) -> None:
        self._trained = trained
        self.runs: list[KeptRun | None] = [None] * len(self.stages)
        # A mapping may be changed in place, so it is copied.
        self._settings = [
            vars(s) | {"weight_decay": copy.copy(s.weight_decay)} for s in self.stages
        ]
        self._curvatures: dict[tuple[int, str], DataCurvature] = {}
        self._sketches: dict[str, dict] | None = None

    def _changed(self) -> list[str]:
        """Which settings of which stages are no longer those of the fit."""

        def same(key: str, value, before) -> bool:
            return value is before or (key not in ("model", "data") and value == before)

        return [
            f"{key} of stage {stage.name!r}"
            for stage, settings in zip(self.stages, self._settings, strict=True)
            for key, value in vars(stage).items()
            if not same(key, value, settings[key])
        ]

    # --- the trained state ------------------------------------------------------------------------

    @exclusive
    def trained(self) -> list[Tensor]:
        """Every stage's trained parameters, flat ``(D,)`` each.

        Raises:
            ValueError: not trained yet, or the models were changed since.
        """
        if self._trained is None:
            raise ValueError(
                "the pipeline is not trained: call pipeline.fit(), or pipeline.adopt() after "
                "your own training"
            )
        self._require_same_settings()
        for stage in self.stages:
            check_layers(plain_module(stage.model), f"stage {stage.name!r}")
        self._require_same_functions()
        for stage, p, full in zip(self.stages, self._functional, self._trained, strict=True):
            model = plain_module(stage.model)
            for name, buffer in model.named_buffers():
                if not same_numbers(buffer, p.objective.buffers[name]):
                    raise ValueError(
                        f"stage {stage.name!r}: buffer {name!r} changed since fit(); call "
                        "pipeline.adopt() to take it"
                    )
            if not torch.equal(p.objective.layout.flatten(model), full):
                raise ValueError(
                    f"stage {stage.name!r}: the model's weights changed since fit(); call "
                    "pipeline.adopt() to take them"
                )
        return self._trained

    def _require_same_settings(self) -> None:
        """Raise `ValueError` where stages were given other data, losses or settings since fit."""
        changed = [c for c in self._changed() if not c.startswith("recipe ")]
        if changed:
            raise ValueError(
                f"{'; '.join(changed)} changed since fit(), so the results would be of another "
                "pipeline; call fit() again, or pipeline.adopt() to take it with these weights"
            )

    @exclusive
    def _require_same_functions(self) -> None:
        """Raise `ValueError` where a stage's data or model are not what they were at fit."""
        for stage, p in zip(self.stages, self._functional, strict=True):
            require_derivatives(p.objective.where)
            change = fingerprint(p.objective).change(p.objective)
            if change and p.modes() != p.checked_modes:
                raise ValueError(
                    f"stage {stage.name!r}: the model was switched between train and eval mode "
                    "since fit(), and computes something else now; switch it back"
                )
            if change:
                raise ValueError(
                    f"stage {stage.name!r}: {change} since fit(); call fit() again, or "
                    "pipeline.adopt() to take it with these weights"
                )

    def objective(self, stage: int | str) -> Objective:
        """The stage's F as a pure function."""
        return self._functional[self.index(stage)].objective

    def functional(self, stage: int) -> FunctionalStage:
        """The stage's objective and its ties to the previous stage."""
        return self._functional[stage]

    def origin(self, question: Question) -> Origin:
        """What results of this pipeline carry, to tell whether two of them belong together."""
        trained = self.trained()
        if self._sketches is None:
            objectives = [p.objective for p in self._functional]
            self._sketches = {
                stage.name: of_stage(o, full)
                for stage, o, full in zip(self.stages, objectives, trained, strict=True)
            }
        rows = of_queries(question)
        return {"stages": self._sketches, "queries": rows, "target": question.asked}

    def curvature(self, stage: int | str, kind: str = "hessian") -> DataCurvature:
        """Curvature operator of a stage at the trained parameters, penalty included.

        It is kept until they change.
        """
        check_choice("kind", kind, ("hessian", "ggn"))
        k, trained = self.index(stage), self.trained()
        require_precision(self._functional[k].objective, f"curvature={kind!r}")
        if kind == "hessian":
            require_second_derivative(self._functional[k].objective, "curvature='hessian'")
        elif kind == "ggn":
            require_loss_curvature(self._functional[k].objective)
        if (k, kind) not in self._curvatures:
            made = curvature(kind, self._functional[k].objective, trained[k])
            made.gradient_norm = float(self.gradient(k).norm())
            self._curvatures[k, kind] = made
        return self._curvatures[k, kind]

    def gradient(self, stage: int | str) -> Tensor:
        """∇F of a stage at the trained parameters, ``(P,)``; zero at an optimum."""
        k, trained = self.index(stage), self.trained()
        functional, previous = self._functional[k], trained[k - 1][None] if k else None
        lanes = functional.lanes(trained[k][None], previous, None)
        _, gradient = lanes.value_and_grad(functional.objective.trained.take(trained[k])[None])
        return gradient[0]

    def evaluate(
        self, queries: Examples, target: str | Callable = "loss", *, aggregate=None
    ) -> Tensor:
        """The quantity q of each query at the trained parameters, ``(Q,)``, in nats for losses.

        With ``aggregate``, as in `ImplicitInfluence.score`, one number of all of them, ``(1,)``.
        """
        question = ask(self.objective(-1), queries, target, aggregate)
        with torch.no_grad():
            values = question.values(self.objective(-1), self.trained()[-1])
        require_finite(question, values)
        return question.answer(values)

    def retrain(
        self, weights: Tensor | Mapping, *, warm_start: bool = False, progress: bool = True
    ) -> "Retrained":
        """Rerun every stage under example weights, many weightings at once.

        The models stay as they are.

        Args:
            weights: ``(R, N)`` or ``(N,)`` weights of the first stage's examples, or a mapping from
                stage (name or index) to such tensors; stages left out keep weight one. Weight 0
                removes an example: the 1/m and the batches stay.
            warm_start: start each stage from its trained weights instead of its initial ones.
            progress: show a bar when it takes more than two seconds.

        Raises:
            ValueError: wrong shapes, NaN, unknown stage, or a same-seed rerun of adopted weights.
        """
        check_flag("warm_start", warm_start)
        for functional in self._functional:
            require_precision(functional.objective, "retraining")
        if not warm_start:
            self.require_repeatable()
        by_stage = self._weights(weights if isinstance(weights, Mapping) else {0: weights})
        counts = {len(w) for w in by_stage if w is not None}
        if len(counts) != 1:
            raise ValueError(
                f"weights hold {sorted(counts)} weightings; every stage must be given the same "
                "number"
            )
        count = counts.pop()
        starts = [s.expand(count, -1) for s in (self.trained() if warm_start else self._initial)]
        return Retrained(self, *self._run(by_stage, starts, warm_start, progress))

    def _weights(self, given: Mapping) -> list[Tensor | None]:
        """The weights of `retrain` by stage, ``(R, N)`` each, checked; None where left out."""
        if not given:
            raise ValueError(
                f"weights={given} are empty: give (R, N) weights of a stage, or a mapping from "
                "stages to weights"
            )
        by_stage: list[Tensor | None] = [None] * len(self.stages)
        for key, value in given.items():
            k = self.index(key)
            which, m = f"weights of stage {self.stages[k].name!r}", len(self.stages[k].data)
            if by_stage[k] is not None:
                raise ValueError(f"{which} are given twice, by name and by index")
            initial = self._initial[k]
            what = f"numbers, (R, {m}) or ({m},)"
            value = numbers_of(which, value, what, initial.dtype).to(initial.device)
            value = value[None] if value.ndim == 1 else value
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{which} hold NaN or inf")
            if value.ndim != 2 or not len(value) or value.shape[1] != m:
                raise ValueError(
                    f"{which} have shape {tuple(value.shape)}: expected (R, {m}) or ({m},)"
                )
            by_stage[k] = value
        return by_stage

    # --- moving, saving and loading ---------------------------------------------------------------

    @exclusive
    def to(self, *targets: torch.device | torch.dtype | str) -> "Pipeline":
        """Move every model and its data to a device and / or floating dtype, in place.

        A move that fails leaves everything as it was.

        Raises:
            ValueError: the device ``"meta"``, where tensors have no numbers.
        """
        check_targets(targets)
        data = [stage.data.to(*targets) for stage in self.stages]
        before, held = dict(vars(self)), [stage.data for stage in self.stages]
        tensors = [_Tensors(stage.model) for stage in self.stages]
        try:
            self._move(data, targets)
        except BaseException:
            for stage, old, kept in zip(self.stages, held, tensors, strict=True):
                stage.data = old
                kept.put_back()
            vars(self).update(before)
            raise
        return self

    def _move(self, data: Sequence[Examples], targets: tuple) -> None:
        """Move the models, take the moved data, and follow with all that is known of them."""
        for stage, moved in zip(self.stages, data, strict=True):
            for target in targets:
                stage.model.to(target)
            stage.data = moved
        homes = [(s.data.x.device, next(s.model.parameters()).dtype) for s in self.stages]
        if any(f.dtype != dtype for f, (_, dtype) in zip(self._initial, homes, strict=True)):
            self.reports = None  # in another precision the run would be another one

        def move(flats: Sequence[Tensor]) -> list[Tensor]:
            return [flat.to(*home) for flat, home in zip(flats, homes, strict=True)]

        self._initial = move(self._initial)
        self._take(None if self._trained is None else move(self._trained))
        self._prepare()

    def double(self) -> "Pipeline":
        """Everything in float64, the precision for stages of up to a few thousand parameters."""
        return self.to(torch.float64)

    def float(self) -> "Pipeline":
        """Everything in float32, for stages that came in half precision."""
        return self.to(torch.float32)

    @exclusive
    def facts(self) -> dict:
        """What identifies this pipeline: names, shapes, settings, digests of data; JSON-able."""
        return saved.facts(self.stages, self._functional)

    def save(self, path) -> None:
        """Write `facts`, initial and trained weights to a safetensors file, all or nothing."""
        trained = self.trained()
        if changed := self._changed():
            raise ValueError(
                f"{'; '.join(changed)} changed since fit(); call fit() or adopt() before save()"
            )
        facts = self.facts()
        if self.adopted:
            for stage in facts["stages"]:
                stage["recipe"] = saved.ADOPTED
        saved.write(path, facts, self._initial, trained, self.reports or [])

    def load(self, path) -> "Pipeline":
        """Take the weights of a saved pipeline of the same stages.

        The models are changed only if all of it fits.

        Raises:
            SavedFileError: cut off, changed or foreign file, or one of other stages, data or
                settings.
        """
        self._prepare()
        initial, trained, reports = saved.read(path, self.facts(), self._initial)
        self._write(trained)
        self._initial = initial
        self.reports = reports or None
        return self

    def __repr__(self) -> str:
        lines = []
        for s, p in zip(self.stages, self._functional, strict=True):
            link = "" if s.link is None else f", {type(s.link).__name__}({p.objective.alpha or ''})"
            lines.append(
                f"  {s.name}: {p.objective.size} of {p.objective.layout.size} parameters trained "
                f"on {len(s.data)} examples{link}"
            )
            lines += [f"    {p.sharing}"] if p.sharing else []
        state = " not trained yet" if self._trained is None else " adopted" if self.adopted else ""
        lines.append(f"){state}")
        return "\n".join(["Pipeline(", *lines])


class _Tensors:
    """All tensors of a model's modules, to be put back."""

    def __init__(self, model: nn.Module):
        self.held = [
            (table, name, tensor, tensor.data, getattr(tensor.grad, "data", None))
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]

    def put_back(self) -> None:
        """The same objects with the same numbers, in the same places."""
        for table, name, tensor, values, slope in self.held:
            tensor.data = values
            if slope is not None:
                tensor.grad.data = slope
            table[name] = tensor


@dataclass
class Retrained:
    """The outcome of `Pipeline.retrain`: R complete pipelines that differ in example weights.

    Attributes:
        pipeline: the one they come from.
        parameters: per stage ``(R, D)``, flat.
        reports: per stage a `FitReport` over lanes.
    """

    pipeline: Pipeline
    parameters: list[Tensor]
    reports: list[FitReport]

    @exclusive
    def state(self, stage: int | str, lane: int) -> dict[str, Tensor]:
        """Named parameters of one stage in one lane, for ``load_state_dict(..., strict=False)``."""
        k = self.pipeline.index(stage)
        lanes = len(self.parameters[k])
        lane = check_whole("lane", lane, -lanes, lanes - 1, why="the weightings")
        values = self.pipeline.objective(k).layout.named(self.parameters[k][lane])
        model = self.pipeline.stages[k].model
        known = {id(p): name for name, p in model.named_parameters()}  # as a wrapper calls them
        inside = plain_module(model).named_parameters()
        return {known[id(p)]: values[name] for name, p in inside}

    def outputs(self, examples: Examples, stage: int | str = -1) -> Tensor:
        """What the model of one stage says of examples of its task, ``(R, N, ...)``.

        Raises:
            ValueError, TypeError: an unknown stage, or examples that do not fit its model.
        """
        k = self.pipeline.index(stage)
        o, fulls = self.pipeline.objective(k), self.parameters[k]
        check_examples(o, examples, "examples")
        with torch.no_grad():
            chunks = o.chunks(examples, copies=len(fulls))
            return torch.cat([_outputs(o, fulls, x) for _, x, _ in chunks], 1)

    def with_last(self, pipeline: Pipeline) -> "Retrained":
        """The same retrainings up to the last stage, followed by that of another pipeline.

        So a second finetuning task costs no second pretraining. Its examples keep weight one.

        Args:
            pipeline: of the same stages but for the last one.

        Raises:
            ValueError: its earlier stages have other models.
        """
        check_instance("pipeline", pipeline, Pipeline)
        done, stages = self.parameters[:-1], pipeline.stages
        sizes = [full.shape[1] for full in done]
        if sizes != [len(pipeline.initial(k)) for k in range(len(stages) - 1)] or not sizes:
            raise ValueError(
                f"pipeline has stages {[s.name for s in stages]}, which must be those of these "
                f"retrainings, {[s.name for s in self.pipeline.stages]}, but for the last"
            )
        starts = [pipeline.initial(-1).expand(len(done[0]), -1)] * len(stages)
        nothing = [None] * len(stages)
        fulls, reports = pipeline._run(nothing, starts, False, False, before=done)
        return Retrained(pipeline, fulls, [*self.reports[:-1], *reports])

    def evaluate(
        self, queries: Examples, target: str | Callable = "loss", *, aggregate=None
    ) -> Tensor:
        """The quantity q of each query under each weighting, ``(Q, R)``.

        With ``aggregate``, as in `ImplicitInfluence.score`, one number of all of them, ``(1, R)``.
        """
        o, fulls = self.pipeline.objective(-1), self.parameters[-1]
        question = ask(o, queries, target, aggregate)
        with torch.no_grad():
            parts = [
                torch.stack([question.function(outputs, y) for outputs in _outputs(o, fulls, x)])
                for _, x, y in o.chunks(queries, copies=len(fulls))
            ]
            return torch.stack([question.answer(q) for q in torch.cat(parts, dim=1)], 1)


def _outputs(o: Objective, fulls: Tensor, x: Tensor) -> Tensor:
    """The outputs at the parameters of each lane ``(R, D)``: ``(R, B, ...)``."""
    if len(fulls) > 1 and o.known("lanes", True):
        return vmap(lambda full: o.outputs(full, x))(fulls)
    return torch.stack([o.outputs(full, x) for full in fulls])
