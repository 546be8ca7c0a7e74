"""A stage, the links that say what it takes over from the stage before, and both as functions."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..arguments import is_number, shown
from ..data.examples import Examples
from ..objective.layout import Layout, by_name, same_numbers
from ..objective.losses import cross_entropy
from ..objective.objective import Lanes, Objective
from ..objective.wrapping import plain_module
from .lbfgs import LBFGS
from .recipes import MiniBatch
from .sharing import Shared, buffer_pairs, left_out, shared_parameters, summary

__all__ = ["Frozen", "Proximal", "Stage", "WarmStart"]

WeightDecay = float | Mapping[str, float] | Callable[[str], float]


@dataclass(frozen=True)
class Frozen:
    """The shared parameters come from the previous stage and stay fixed: the paper's first case.

    Args:
        shared: which parameters:

            * None for every equal name and shape, except in the layer that feeds the loss, whatever
              it is called, and in all of a top-level ``head``. Of a head of several layers under
              another name only the last is left out; a layer tied to the embedding is taken over.
              Parameters that look like some of the stage before but are called otherwise, as those
              of a wrapped backbone, are an error that asks for a mapping and prints it.
            * a mapping from names here to names there, ``{"mid.base.weight": "mid.weight"}``, or
              from prefixes to prefixes, which end in a dot or are empty: ``{"base.": ""}``.
            * a prefix (``""`` for all), a list of names, or a function of the name
              (``lambda n: not n.startswith("fc.")``), among the names of both models.

            What `torch.compile`, `DataParallel`, `AveragedModel` and peft add to names is seen
            through: ``_orig_mod.``, ``module.``, ``base_model.model.``, ``base_layer.``. All but
            None are taken at their word, except for prefixes in a mapping that leave out what
            looks the same. ``print(pipeline)`` says what is shared.

    Raises, with the pipeline:
        ValueError: unknown names, unequal shapes, nothing shared, or a parameter that is neither
            trained nor taken over.

    >>> import msif_lab as msif
    >>> from torch import nn
    >>> train, _ = msif.load_digits()
    >>> backbone = msif.mlp(64, hidden=(8,), classes=3)
    >>> wrapped = nn.Sequential(msif.mlp(64, hidden=(8,), classes=3).embedding, nn.Linear(8, 2))
    >>> link = msif.Frozen(shared={"0.": "embedding."})
    >>> msif.Pipeline([
    ...     msif.Stage("pretrain", backbone, train.select((0, 1, 2), n=30)),
    ...     msif.Stage("finetune", wrapped, train.select((3, 4), n=20), link=link),
    ... ])
    Pipeline(
      pretrain: 547 of 547 parameters trained on 30 examples
      finetune: 18 of 538 parameters trained on 20 examples, Frozen()
        shares 520 parameters (0.* from embedding.*) with 'pretrain'
    ) not trained yet
    """

    shared: Shared = None


@dataclass(frozen=True)
class Proximal:
    """Everything is trained, and the shared part stays near the previous stage's: the second case.

    ``α ‖W' − W*‖²`` is added to the objective, W' being the shared part and W* its value after the
    previous stage.

    Args:
        alpha: strength α > 0; a large one acts like `Frozen`, plain gradient descent for K
            steps of rate η like ``2α = 1/(ηK)``.
        shared: as in `Frozen`.
    """

    alpha: float
    shared: Shared = None

    def __post_init__(self):
        if not is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"alpha={self.alpha!r} must be one number, positive and finite; for the limit "
                "α → ∞ use Frozen()"
            )


@dataclass(frozen=True)
class WarmStart:
    """Everything is trained, starting from the previous stage's W*: plain full finetuning.

    The finetuned model keeps something of W* only because training stops early. So this link needs
    `SGD` or `Adam`, and `UnrolledInfluence` for its scores.
    `SGD.equivalent_alpha` gives the `Proximal` link that resembles it.

    Args:
        shared: as in `Frozen`.
    """

    shared: Shared = None


Link = Frozen | Proximal | WarmStart


def decays(given: WeightDecay, layout: Layout, trained: Sequence[str], where: str):
    """λ as `Objective` takes it: one number, or by name; see `Stage` for how names are matched."""
    if is_number(given):
        return given
    if callable(given):
        found = {name: given(name) for name in trained}
        for name, value in found.items():
            if not _is_decay(value):
                raise ValueError(
                    f"{where}: weight_decay gives {value!r} for {name!r}; it must give zero or a "
                    "positive number for every name"
                )
        return found
    return by_name("weight_decay", given, layout, trained, where)


def _is_decay(value) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _decay_problem(given) -> str:
    """What is wrong with a weight decay as such, in words; empty if nothing is."""
    if _is_decay(given) or (callable(given) and not isinstance(given, type)):
        return ""
    if isinstance(given, Mapping) and given:
        bad = {k: v for k, v in given.items() if not isinstance(k, str) or not _is_decay(v)}
        return f"weight_decay holds {bad}; it maps names to zero or positive numbers" if bad else ""
    return (
        f"weight_decay={given!r} must be zero or positive: one number for all that the stage "
        'trains, numbers by name such as {"bias": 0.0, "*": 1e-2}, or a function of the name; '
        "leave parameters out of training by requires_grad_(False)"
    )


@dataclass
class Stage:
    """One training stage: ``F(θ; w) = (1/m) Σ_i w_i f_i(θ) + (λ/2) ‖θ‖²`` over what it trains.

    ``weight_decay`` may differ between parameters: the penalty is then ``½ Σ_j λ_j θ_j²``. In a
    mapping a key matches a parameter by its whole name (``"head.bias"``), by the last part of it
    (``"bias"``), or as a pattern of the whole name with ``*`` (``"*.norm.*"``). The first key that
    matches counts, so ``"*"`` comes last. ``"1d"`` stands for all parameters of at most one
    dimension: ``{"1d": 0.0, "*": 1e-3}`` is no decay on biases and norms. Learning rates of a
    recipe go by the same keys, ``SGD(lr={"head.*": 0.1, "*": 0.01})``.

    scikit-learn sums its losses and leaves the intercept free: for ``LogisticRegression(C)`` on m
    examples ``weight_decay={"weight": 1 / (C * m), "bias": 0.0}``, for ``Ridge(alpha)`` under
    `mean_squared_error` on one output ``{"weight": 2 * alpha / m, "bias": 0.0}``.

    Args:
        name: unique in the pipeline.
        model: any module that is a deterministic function of each example; `Pipeline.fit` writes
            into it. Of a compiled, data-parallel or averaged one it is the module inside, whose
            weights the wrapper shares and whose names count.
        data: the `Examples` it is trained on.
        loss: ``(outputs, targets) -> (B,)``; cross-entropy by default.
        weight_decay: λ ≥ 0 on every parameter this stage trains, biases included; or λ by name, as
            a mapping or a function of the name.
        link: how it takes over from the previous stage: `Frozen`, `Proximal` or `WarmStart`; None
            for the first.
        recipe: how it is trained; `LBFGS` by default.

    >>> import msif_lab as msif
    >>> train, _ = msif.load_digits()
    >>> model = msif.mlp(64, hidden=(8,), classes=10)
    >>> stage = Stage("digits", model, train, weight_decay={"bias": 0.0, "*": 1e-3})
    >>> print(msif.Pipeline([stage]))
    Pipeline(
      digits: 610 of 610 parameters trained on 1201 examples
    ) not trained yet
    """

    name: str
    model: nn.Module
    data: Examples
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    weight_decay: WeightDecay = 0.0
    link: Link | None = None
    recipe: LBFGS | object = field(default_factory=LBFGS)

    def problems(self, first: bool) -> list[str]:
        """Everything wrong with the settings; ``first``: whether no stage comes before."""
        problems = []
        if not isinstance(self.name, str) or not self.name:
            problems.append(f"name={shown(self.name)} must be text, such as 'pretrain'")
        own = (_model_problem(self.model), _loss_problem(self.loss))
        problems += filter(None, (*own, _decay_problem(self.weight_decay)))
        if not isinstance(self.data, Examples):
            problems.append(_no_examples(self.data))
        if not hasattr(self.recipe, "run") or isinstance(self.recipe, type):
            given = " ".join(repr(self.recipe).split())
            problems.append(
                f"recipe={given if len(given) < 60 else type(self.recipe).__name__} is not a "
                "recipe such as LBFGS() or SGD(lr=0.1); after a training loop of your own, call "
                "pipeline.adopt()"
            )
        elif isinstance(self.data, Examples) and hasattr(self.recipe, "check"):
            try:
                self.recipe.check(len(self.data))
            except ValueError as error:
                problems.append(str(error))
        if first and self.link is not None:
            problems.append(
                f"link={self.link!r}, but the first stage has nothing to take over; leave it out"
            )
        if not first and not isinstance(self.link, Link):
            problems.append(
                f"link={self.link!r}: a later stage needs link=Frozen(), link=Proximal(alpha=...) "
                "or link=WarmStart()"
            )
        return [f"stage {self.name!r}: {p}" for p in problems]


def _model_problem(model) -> str:
    """What is wrong with a model as such, in words; empty if nothing is."""
    if isinstance(model, type):
        return f"model={model.__name__} is a class, not a torch.nn.Module; make one: model()"
    if not isinstance(model, nn.Module):
        return (
            f"model is {type(model).__name__}, not a torch.nn.Module; weights alone go into one "
            "by model.load_state_dict()"
        )
    model = plain_module(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"layer {name!r}" if name else "model"
            return (
                f"{where} is a {type(module).__name__} of torch.jit, which cannot be called with "
                "other weights; give the module that it was made from, with the same state dict"
            )
    complex_ones = [name for name, p in model.named_parameters() if p.is_complex()]
    if complex_ones:
        return (
            f"parameter {complex_ones[0]!r} of the model is complex, and derivatives here are of "
            "real numbers; hold its real and imaginary part as two parameters"
        )
    return ""


def _loss_problem(loss) -> str:
    """What is wrong with a loss as such, in words; empty if nothing is."""
    if isinstance(loss, type):
        return f'loss={loss.__name__} is a class; make one: {loss.__name__}(reduction="none")'
    if not callable(loss):
        return (
            f"loss={loss!r} is not a function (outputs, targets) -> (B,), such as "
            "msif.cross_entropy or msif.mean_squared_error"
        )
    own = loss.named_parameters() if isinstance(loss, nn.Module) else []
    trained = [name for name, parameter in own if parameter.requires_grad]
    if trained:
        return (
            f"loss={type(loss).__name__} has parameters {trained} of its own, which no stage "
            "trains; move them into the model, or freeze them: loss.requires_grad_(False)"
        )
    return ""


def _no_examples(data) -> str:
    """What data are that are no examples, and how they become some, in words."""
    way_out = "Examples(x, y)"
    if isinstance(data, DataLoader):
        way_out = "Examples.from_dataset(loader.dataset)"
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        way_out = "Examples.from_dataset(dataset)"
    return f"data is {type(data).__name__}, not msif_lab.Examples; wrap it: {way_out}"


class FunctionalStage:
    """A stage as a function: its objective, and where its shared parameters lie in both models.

    Attributes:
        objective: F of the stage.
        coupled: names of the shared parameters that it trains, starting at W* or held near it.
        frozen: names of those it takes over as they are.
        shared: its names of both, each with the name in the previous model.
        sharing: the same in a few words.
        live: names of what this or any stage before has trained; derivatives in the rest are never
            needed.
        here, there: `Places` of ``"coupled"`` and ``"frozen"`` in its and the previous model.
    """

    def __init__(self, stage: Stage, before: "FunctionalStage | None"):
        where = f"stage {stage.name!r}"
        model = plain_module(stage.model)
        layout = Layout(model, where)
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"{where}: parameter {name!r} holds NaN or inf; start from finite weights"
                )
        earlier = layout if before is None else before.objective.layout
        self.shared: dict[str, str] = {}
        self.sharing = ""
        if before is not None:
            self._take_over(
                stage.link.shared, before, Objective(model, stage.data, stage.loss, where=where)
            )
        free = not isinstance(stage.link, Frozen)
        self.coupled = [n for n in self.shared if free and n in layout.trainable]
        self.frozen = [n for n in self.shared if n not in self.coupled]
        trained = [n for n in layout.trainable if n not in self.frozen]
        if not trained:
            raise ValueError(
                f"{where}: nothing is left to train; share fewer parameters or unfreeze some"
            )
        alpha = stage.link.alpha if isinstance(stage.link, Proximal) else 0.0
        self.objective = Objective(
            model,
            stage.data,
            stage.loss,
            decays(stage.weight_decay, layout, trained, where),
            trained,
            alpha,
            self.coupled,
            where,
        )
        if isinstance(stage.recipe, MiniBatch):
            stage.recipe.shares(self.objective)  # refuses names that the model does not have
        self.live = {*trained, *(n for n in self.frozen if self.shared[n] in before.live)}
        names = {"coupled": self.coupled, "frozen": self.frozen}
        self.here = {how: layout.places(some) for how, some in names.items()}
        self.there = {how: earlier.places(self.partners(some)) for how, some in names.items()}
        self.checked_modes = self.modes()
        if before is not None:
            self._require_live(before)

    def modes(self) -> list[bool]:
        """Which modules are in train mode."""
        return [module.training for module in self.objective.model.modules()]

    def inherited(self, moved: Tensor | None) -> Tensor:
        """Which parameters ``(D,)`` take over one that depends on earlier example weights.

        Args:
            moved: which of the previous stage's ``(D',)`` do; None for the first.
        """
        mask = torch.zeros(self.objective.layout.size, dtype=torch.bool)
        if moved is not None:
            for how, places in self.here.items():
                places.put(mask, self.there[how].take(moved))
        return mask

    def _take_over(self, shared: Shared, before: "FunctionalStage", after: Objective) -> None:
        """Settle what is shared; refuse what is neither that nor trained."""
        self.shared = shared_parameters(shared, before.objective, after)
        apart = left_out(after) if shared is None else ()
        self.sharing = summary(self.shared, apart, before.objective, after)
        # peft keeps the original of a layer that it copies for training, and never calls it.
        kept = [n for n in after.layout.shapes if "original_module" not in n.split(".")]
        trained = after.layout.trainable
        if lost := [n for n in kept if n not in trained and n not in self.shared]:
            raise ValueError(
                f"{after.where}: {len(lost)} parameter(s) are neither trained (requires_grad is "
                f"False) nor taken over from {before.objective.where}, which would lose what it "
                f"taught them: {lost[:5]}. Take them over by name, shared={{{lost[0]!r}: <name "
                "there>, ...}, or train them, requires_grad_(True); true constants belong into "
                "buffers: del layer.name, then layer.register_buffer('name', value)"
            )

    def _require_live(self, before: "FunctionalStage") -> None:
        """Refuse a stage that takes over nothing that an earlier one has trained."""
        if before.live.isdisjoint(self.shared.values()):
            raise ValueError(
                f"{self.objective.where}: nothing that {before.objective.where} trains is taken "
                f"over, only {list(self.shared)[:3]} with requires_grad=False there, so its "
                "examples have no influence; train them there: requires_grad_(True) on that "
                "stage's model"
            )

    def partners(self, names: Sequence[str]) -> list[str]:
        """What shared parameters are called in the previous model."""
        return [self.shared[name] for name in names]

    def start(self, lanes: Lanes) -> Lanes:
        """The lanes of a fresh run: shared parameters that it trains start at W*."""
        if lanes.centre is None:
            return lanes
        return replace(lanes, base=self.here["coupled"].put(lanes.base.clone(), lanes.centre))

    def lanes(self, base: Tensor, previous: Tensor | None, weights: Tensor | None) -> Lanes:
        """The objective of R weightings.

        Args:
            base: all parameters ``(R, D)``.
            previous: the final parameters of the stage before, ``(R, D')``; None for the first.
            weights: of the examples, ``(R, m)``; default one.
        """
        centre = None
        if previous is not None:
            base = self.here["frozen"].put(base.clone(), self.there["frozen"].take(previous))
            centre = self.there["coupled"].take(previous)
        if weights is None:
            weights = base.new_ones(len(base), len(self.objective.data))
        return Lanes(self.objective, base, centre, weights)


def check_buffers(functional: Sequence[FunctionalStage]) -> None:
    """Refuse buffers (constants here) that a stage would silently not take over."""
    for before, after in itertools.pairwise(functional):
        ours, theirs = after.objective, before.objective
        held = [dict(o.model.named_buffers()) for o in (ours, theirs)]
        for name, partner in buffer_pairs(after.shared, theirs, ours).items():
            here, there = held[0][name], held[1][partner]
            if here.shape == there.shape and not same_numbers(there, here):
                raise ValueError(
                    f"{ours.where}: buffer {name!r} differs from {partner!r} of {theirs.where}, "
                    "but buffers are constants here. Before training, copy each of them: "
                    f"after.get_buffer({name!r}).copy_(before.get_buffer({partner!r})). Weights "
                    "that were trained with other ones fit those only: train again with "
                    "model.eval(), or with GroupNorm instead of batch statistics"
                )
