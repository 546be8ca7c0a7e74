"""A stage, and the links that say what it takes over from the stage before."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy
import torch
from torch import Tensor, nn

from ..data.examples import Examples
from ..objective.layout import Layout
from ..objective.losses import cross_entropy
from ..objective.objective import Lanes, Objective
from .lbfgs import LBFGS

__all__ = ["Frozen", "Proximal", "Stage", "WarmStart"]

Shared = str | Sequence[str] | Callable[[str], bool] | None


def shared_names(shared: Shared, before: Layout, after: Layout, where: str) -> list[str]:
    """The parameters a stage takes over, in its own order; see `Frozen` for what ``shared`` may be."""
    offered = [name for name in after.shapes if name in before.shapes]
    if shared is None:
        names = [
            n for n in offered if n.split(".")[0] != "head" and before.shapes[n] == after.shapes[n]
        ]
    elif isinstance(shared, str):
        names = [n for n in offered if n.startswith(shared)]
    elif callable(shared):
        names = [n for n in offered if shared(n)]
    else:
        unknown = [n for n in shared if n not in offered]
        if unknown:
            raise ValueError(
                f"{where}: shared names {unknown} are not parameters of both models; those are "
                f"{offered}"
            )
        names = [n for n in offered if n in set(shared)]
    if not names:
        raise ValueError(
            f"{where}: no parameter is shared with the previous stage (shared={shared!r}); "
            f"parameters of both models: {offered or 'none'}; give equal names and shapes, or "
            "shared=a prefix, a list, or a function of the name"
        )
    for name in names:
        if before.shapes[name] != after.shapes[name]:
            raise ValueError(
                f"{where}: shared parameter {name!r} has shape {tuple(after.shapes[name])} here "
                f"but {tuple(before.shapes[name])} in the previous stage; leave it out of shared="
            )
    return names


@dataclass(frozen=True)
class Frozen:
    """The shared parameters are taken from the previous stage and stay as they are (the paper's
    first case).

    Args:
        shared: which parameters: None for every equal name and shape outside ``head``, a prefix, a
            list of names, or a function of the name (``lambda n: not n.startswith("fc.")``).
    """

    shared: Shared = None


@dataclass(frozen=True)
class Proximal:
    """Everything is trained, ``α ‖W' − W*‖²`` holds the shared part W' near the previous stage's W*
    (second case).

    Args:
        alpha: strength α > 0. Large: frozen. Plain gradient descent for K steps of rate η acts like
            ``2α = 1/(ηK)``.
        shared: as in `Frozen`.
    """

    alpha: float
    shared: Shared = None

    def __post_init__(self):
        if not isinstance(self.alpha, (int, float, numpy.floating)) or not 0 < self.alpha < float(
            "inf"
        ):
            raise ValueError(
                f"alpha={self.alpha!r} must be positive and finite; for the limit α → ∞ use "
                "Frozen()"
            )


@dataclass(frozen=True)
class WarmStart:
    """Everything is trained, starting from the previous stage's W* and simply going on: plain full
    finetuning.

    What the finetuned model keeps of W* it keeps only because training stops early, so this link
    means something with `SGD` or `Adam`, and its influence is `UnrolledInfluence`'s.
    `SGD.equivalent_alpha` gives the `Proximal` link that resembles it.

    Args:
        shared: as in `Frozen`.
    """

    shared: Shared = None


Link = Frozen | Proximal | WarmStart


@dataclass
class Stage:
    """One training stage: ``F(θ; w) = (1/m) Σ_i w_i f_i(θ) + (weight_decay/2) ‖θ‖²`` over what it
    trains.

    Args:
        name: unique in the pipeline.
        model: any module that is a deterministic function of each example; `Pipeline.fit` writes
            into it.
        data: the `Examples` it is trained on.
        loss: ``(outputs, targets) -> (B,)``; cross-entropy by default.
        weight_decay: λ ≥ 0 on every parameter this stage trains, biases included.
        link: how it takes over from the previous stage: `Frozen`, `Proximal` or `WarmStart`; None
            for the first.
        recipe: how it is trained; `LBFGS` by default.
    """

    name: str
    model: nn.Module
    data: Examples
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    weight_decay: float = 0.0
    link: Link | None = None
    recipe: LBFGS | object = field(default_factory=LBFGS)

    def problems(self, first: bool) -> list[str]:
        problems = []
        if not isinstance(self.model, nn.Module):
            problems.append(f"model is {type(self.model).__name__}, not a torch.nn.Module")
        if not isinstance(self.data, Examples):
            problems.append(
                f"data is {type(self.data).__name__}, not msif_lab.Examples; wrap it: Examples(x, "
                "y)"
            )
        if not callable(self.loss):
            problems.append(f"loss={self.loss!r} is not a function (outputs, targets) -> (B,)")
        if not isinstance(
            self.weight_decay, (int, float, numpy.floating)
        ) or not 0 <= self.weight_decay < float("inf"):
            problems.append(f"weight_decay={self.weight_decay!r} must be zero or positive")
        if not hasattr(self.recipe, "run") or isinstance(self.recipe, type):
            problems.append(
                f"recipe={self.recipe!r} is not a recipe such as LBFGS() or SGD(lr=0.1)"
            )
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


class FunctionalStage:
    """A stage made functional: its objective and how its parameters hang on the previous stage's."""

    def __init__(self, stage: Stage, before: "FunctionalStage | None"):
        where = f"stage {stage.name!r}"
        layout = Layout(stage.model, where)
        for name, parameter in stage.model.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"{where}: parameter {name!r} holds NaN or inf; start from finite weights"
                )
        shared = (
            []
            if before is None
            else shared_names(stage.link.shared, before.objective.layout, layout, where)
        )
        free = not isinstance(stage.link, Frozen)
        # trained from W*, held near by alpha
        self.coupled = [n for n in shared if free and n in layout.trainable]
        self.frozen = [n for n in shared if n not in self.coupled]  # taken over as they are
        trained = [n for n in layout.trainable if n not in self.frozen]
        if not trained:
            raise ValueError(
                f"{where}: nothing is left to train; share fewer parameters or unfreeze some"
            )
        alpha = stage.link.alpha if isinstance(stage.link, Proximal) else 0.0
        self.objective = Objective(
            stage.model,
            stage.data,
            stage.loss,
            stage.weight_decay,
            trained,
            alpha,
            self.coupled,
            where,
        )
        # What any stage so far has trained; derivatives by the rest are never asked for.
        self.live = {*trained, *(n for n in self.frozen if n in before.live)}
        # places of the shared parameters in this model and in the previous one
        self.here, self.there = (
            {
                k: side.places(names)
                for k, names in (("coupled", self.coupled), ("frozen", self.frozen))
            }
            for side in (layout, layout if before is None else before.objective.layout)
        )

    def start(self, lanes: Lanes) -> Lanes:
        """The lanes of a fresh run: what is taken over and trained on starts at W*."""
        if lanes.centre is None:
            return lanes
        return replace(lanes, base=self.here["coupled"].put(lanes.base.clone(), lanes.centre))

    def lanes(self, base: Tensor, previous: Tensor | None, weights: Tensor | None) -> Lanes:
        """The objective of R weightings: ``base`` (R, D), ``previous`` (R, D') the stage before,
        ``weights`` (R, m).
        """
        centre = None
        if previous is not None:
            base = self.here["frozen"].put(base.clone(), self.there["frozen"].take(previous))
            centre = self.there["coupled"].take(previous)
        weights = base.new_ones(len(base), len(self.objective.data)) if weights is None else weights
        return Lanes(self.objective, base, centre, weights)


def check_buffers(stages: Sequence[Stage]) -> None:
    """Refuse buffers (constants here) that a stage would silently not take over."""
    for before, after in itertools.pairwise(stages):
        old = dict(before.model.named_buffers())
        for name, buffer in after.model.named_buffers():
            if (
                name in old
                and old[name].shape == buffer.shape
                and not torch.equal(old[name], buffer)
            ):
                raise ValueError(
                    f"stage {after.name!r}: buffer {name!r} differs from that of stage "
                    f"{before.name!r}; buffers are constants here, so copy them: "
                    "after.load_state_dict(before.state_dict(), strict=False)"
                )
