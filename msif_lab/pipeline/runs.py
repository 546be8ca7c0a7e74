"""`Run`: what is kept of a training run by code of one's own, for methods that read checkpoints."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import is_number, listed, numbers_of, shown
from ..objective.wrapping import plain_module, seen_through
from .recipes import CLIP_EPS, SGD, Adam, AdamW, MiniBatch, State, positions_of
from .stages import FunctionalStage, Stage

__all__ = ["KeptRun", "Run"]


@dataclass
class KeptRun:
    """A stage's run as far as it is known: weights at some of its steps, and all learning rates.

    Attributes:
        recipe: what one step does; its own rates, batches and length are not used.
        steps: how many steps came before each checkpoint ``(K,)``, from 0 to T.
        fulls: all parameters ``(D,)`` at each checkpoint.
        states: the optimiser's memory at each checkpoint, ``(1, P)`` each; None where unknown.
        rates: learning rate of each step ``(T,)``.
        batches: positions of the examples of each step; None where unknown.
        means: the mean of the weights before each step between two checkpoints ``(D,)``, ``(K −
            1,)`` of them; None where unknown.
        factors: what clipping multiplied the gradient of each step by ``(T,)``; None without.
    """

    recipe: MiniBatch
    steps: list[int]
    fulls: list[Tensor]
    states: list[State | None]
    rates: list[float]
    batches: list[Tensor] | None = None
    means: list[Tensor] | None = None
    factors: list[float] | None = None

    @property
    def lengths(self) -> list[int]:
        """How many steps there are from each checkpoint to the next ``(K − 1,)``."""
        return [b - a for a, b in itertools.pairwise(self.steps)]

    def thinned(self, most: int) -> "KeptRun":
        """The same run with at most this many stretches, of similar sums of learning rates."""
        if len(self.steps) - 1 <= most:
            return self
        passed = _passed(self.rates)[self.steps]
        kept = _nearest(passed, most)
        parts = ([part[i] for i in kept] for part in (self.steps, self.fulls, self.states))
        means = None
        if self.means is not None:
            means = [self.mean(a, b) for a, b in itertools.pairwise(kept)]
        return KeptRun(self.recipe, *parts, self.rates, self.batches, means, self.factors)

    def mean(self, first: int, last: int) -> Tensor:
        """The mean weights from one checkpoint to another that need not be the next."""
        counts = [self.steps[i + 1] - self.steps[i] for i in range(first, last)]
        parts = zip(counts, self.means[first:last], strict=True)
        return sum(count * mean for count, mean in parts) / sum(counts)


def _passed(rates: Sequence[float]) -> Tensor:
    """Sum of the learning rates before each step and at the end ``(T + 1,)``."""
    return torch.tensor([0.0, *rates], dtype=torch.float64).cumsum(0)


def _nearest(passed: Tensor, stretches: int) -> list[int]:
    """Which entries of a rising sequence cut it into so many stretches of about equal rise."""
    wanted = torch.linspace(float(passed[0]), float(passed[-1]), stretches + 1).to(passed)
    return sorted({0, len(passed) - 1, *(int((passed - w).abs().argmin()) for w in wanted)})


def bounds_by_rates(rates: Sequence[float], stretches: int) -> list[int]:
    """Cut a run into stretches over which learning rates sum up to about the same."""
    return (
        list(range(len(rates) + 1))
        if stretches >= len(rates)
        else _nearest(_passed(rates), stretches)
    )


@dataclass(frozen=True)
class Run:
    """Checkpoints of a stage that your own code has trained, for `Pipeline.adopt`.

    No order of the data is asked for, and nothing is replayed.

    >>> import copy
    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> net = msif.mlp(64, (8,), classes=10)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> saved = []
    >>> for step in range(12):
    ...     saved.append((step, copy.deepcopy(net.state_dict())))
    ...     optimizer.zero_grad()
    ...     msif.cross_entropy(net(train.x), train.y).mean().backward()
    ...     optimizer.step()
    >>> saved.append((12, copy.deepcopy(net.state_dict())))
    >>> run = msif.Run(saved, rates=0.1, optimizer=optimizer)
    >>> pipeline = msif.Pipeline([msif.Stage("digits", net, train)]).adopt(checkpoints=[run])
    >>> msif.SegmentedInfluence(segments=4).fit(pipeline).score(test[:2]).values.shape
    torch.Size([2, 1201])

    Args:
        checkpoints: ``(steps taken before, state dict)`` of each, from step 0 to the end, and the
            optimiser's ``state_dict()`` as third entry; not needed at step 0, nor for SGD, whose
            momentum tells more of the way from one checkpoint to the next.
        rates: the learning rate of each step, or one number for all. Where the optimiser's groups
            have rates of their own it is that of the fastest group, and the others keep their
            shares of it.
        optimizer: the `torch.optim.SGD`, `Adam` or `AdamW` that made the steps, or a recipe such as
            ``msif.SGD(lr=0.1, momentum=0.9)``, of which only what a step does is read. Its groups
            may differ in learning rate and in weight decay, which must be the stage's by name.
        batches: positions in the stage's data of the examples of each step, where known: each
            step is then taken with its own examples. Give ``means`` and the optimiser's state too:
            they tell where the weights were in between.
        means: state dicts with the mean of the weights before each step from one checkpoint to the
            next, where known.
        clip: largest norm of a step's gradient, where your code called
            ``torch.nn.utils.clip_grad_norm_(net.parameters(), clip)``.
        norms: what that returned in each step, the norm before clipping.
    """

    checkpoints: Sequence[tuple]
    rates: Sequence[float] | float
    optimizer: object
    batches: Sequence | None = None
    means: Sequence[Mapping] | None = None
    clip: float | None = None
    norms: Sequence[float] | None = None

    def of(self, stage: Stage, functional: FunctionalStage) -> KeptRun:
        """The run as a stage's, checked.

        Raises:
            ValueError, TypeError: checkpoints that are out of order or do not fit the model, rates
                of another number, an optimiser that is not known or has other settings.
        """
        where = functional.objective.where
        recipe = self._clipping(_recipe(self.optimizer, stage, functional), where)
        steps, weights, memories = _unpacked(self.checkpoints, where)
        rates = [self.rates] * steps[-1] if is_number(self.rates) else self.rates
        rates = listed("rates", rates, "a learning rate for each step, or one number for all")
        if isinstance(self.rates, torch.Tensor):
            rates = self.rates.tolist()
        if not all(map(is_number, rates)):
            raise TypeError(f"{where}: rates={shown(self.rates)} must be numbers, one per step")
        rates = [float(rate) for rate in rates]
        if len(rates) != steps[-1] or not all(0 <= rate < math.inf for rate in rates):
            raise ValueError(
                f"{where}: rates={shown(self.rates)} hold {len(rates)} numbers, expected a "
                f"learning rate for each of the {steps[-1]} steps up to the last checkpoint, zero "
                "or positive"
            )
        fulls = [
            _flat(w, functional, f"the state dict in checkpoints at step {step}")
            for step, w in zip(steps, weights, strict=True)
        ]
        states = [
            _memory(memory, self.optimizer, recipe, stage, functional, step)
            for step, memory in zip(steps, memories, strict=True)
        ]
        batches = _batches(self.batches, steps[-1], len(stage.data), where)
        means, factors = self._means(functional, steps), self._factors(recipe, steps[-1], where)
        return KeptRun(recipe, steps, fulls, states, rates, batches, means, factors)

    def _clipping(self, recipe: MiniBatch, where: str) -> MiniBatch:
        """The recipe with `clip`, which an optimiser of torch does not know."""
        if self.clip is None:
            return recipe
        if isinstance(self.optimizer, MiniBatch):
            raise ValueError(
                f"{where}: clip={shown(self.clip)} beside a recipe, which says itself how "
                "gradients are clipped: optimizer=msif.SGD(lr=0.1, clip=1.0)"
            )
        return replace(recipe, clip=self.clip)

    def _factors(self, recipe: MiniBatch, count: int, where: str) -> list[float] | None:
        """What clipping multiplied the gradient of each step by."""
        if recipe.clip is None:
            if self.norms is not None:
                raise ValueError(f"{where}: norms without clip: give the largest norm, clip=1.0")
            return None
        what = "what torch.nn.utils.clip_grad_norm_ returned in each step"
        if self.norms is None:
            raise ValueError(f"{where}: norms=None, but clip={recipe.clip} needs them: {what}")
        norms = numbers_of(f"{where}: norms", self.norms, what, torch.float64).cpu()
        if norms.shape != (count,) or not bool((norms.isfinite() & (norms >= 0)).all()):
            raise ValueError(
                f"{where}: norms={shown(self.norms)} must be {count} finite numbers, one for each "
                f"step up to the last checkpoint: {what}"
            )
        return (recipe.clip / (norms + CLIP_EPS)).clamp(max=1.0).tolist()

    def _means(self, functional: FunctionalStage, steps: list[int]) -> list[Tensor] | None:
        if self.means is None:
            return None
        listed("means", self.means, "a list of state dicts, one between two checkpoints each")
        if len(self.means) != len(steps) - 1:
            raise ValueError(
                f"{functional.objective.where}: means hold {len(self.means)} state dicts, expected "
                f"one for each of the {len(steps) - 1} stretches between checkpoints"
            )
        after = zip(self.means, steps, strict=False)
        return [_flat(w, functional, f"the mean in means after step {step}") for w, step in after]


def _batches(batches, count: int, examples: int, where: str) -> list[Tensor] | None:
    """The positions of each step's examples, checked."""
    if batches is None:
        return None
    found = positions_of(batches, f"{where}: batches", examples)
    if len(found) != count:
        raise ValueError(
            f"{where}: batches hold {len(found)} entries, expected the positions of the examples "
            f"of each of the {count} steps up to the last checkpoint"
        )
    return found


def _unpacked(checkpoints, where: str) -> tuple[list[int], list, list]:
    """Steps, weights and optimisers' memories of all checkpoints."""
    known = isinstance(checkpoints, Sequence) and not isinstance(checkpoints, str)
    entries = [c for c in checkpoints if isinstance(c, tuple | list)] if known else []
    odd = not known or len(entries) < len(checkpoints)
    if odd or len(entries) < 2 or any(len(entry) not in (2, 3) for entry in entries):
        raise ValueError(
            f"{where}: checkpoints={shown(checkpoints)} must be a list of two or more (step, "
            "state_dict) pairs, the first before the first step and the last after the last one"
        )
    steps = [entry[0] for entry in entries]
    rising = (
        all(isinstance(s, int) and s is not True for s in steps) and sorted(set(steps)) == steps
    )
    if not rising or steps[0] != 0:
        raise ValueError(
            f"{where}: checkpoints are at the steps {steps[:8]}; they must be whole numbers that "
            "rise from 0, how many steps came before each"
        )
    return steps, [entry[1] for entry in entries], [(*entry, None)[2] for entry in entries]


def _flat(weights, functional: FunctionalStage, what: str) -> Tensor:
    """A state dict's parameters as one vector ``(D,)``."""
    o = functional.objective
    what = f"{o.where}: {what}"
    if not isinstance(weights, Mapping):
        raise TypeError(f"{what} is {type(weights).__name__}, expected a state dict")
    named = {seen_through(name): value for name, value in weights.items()} | dict(weights)
    parts = []
    for name, shape in o.layout.shapes.items():
        value = named.get(name, named.get(seen_through(name)))
        if not isinstance(value, Tensor) or value.shape != shape:
            found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is missing"
            raise ValueError(f"{what}: {name!r} {found}, the model's has {tuple(shape)}")
        parts.append(value.detach().reshape(-1).to(o.device, o.dtype))
    full = torch.cat(parts)
    if not bool(torch.isfinite(full).all()):
        raise ValueError(f"{what} holds NaN or inf")
    return full


def _kind(optimizer) -> str:
    """What an optimiser is, in words."""
    if isinstance(optimizer, type):
        return f"the class {optimizer.__name__}"
    return type(optimizer).__name__


def _recipe(optimizer, stage: Stage, functional: FunctionalStage) -> MiniBatch:
    """What one step of an optimiser does, as a recipe."""
    where = functional.objective.where
    if isinstance(optimizer, MiniBatch):
        return optimizer
    kinds = {torch.optim.AdamW: AdamW, torch.optim.Adam: Adam, torch.optim.SGD: SGD}
    kind = next((ours for theirs, ours in kinds.items() if type(optimizer) is theirs), None)
    if kind is None:
        raise TypeError(
            f"{where}: optimizer={_kind(optimizer)} is not known; give torch.optim.SGD, "
            "Adam or AdamW, or a recipe of this library that does the same step"
        )
    groups = optimizer.param_groups
    if kind is Adam and groups[0].get("decoupled_weight_decay"):
        kind = AdamW
    names = ("momentum", "nesterov") if kind is SGD else ("betas", "eps")
    for name in names:
        if any(group[name] != groups[0][name] for group in groups):
            raise ValueError(
                f"{where}: the optimizer's groups have different {name}; one for all is needed"
            )
    for name in ("dampening", "amsgrad", "maximize"):
        if any(group.get(name) for group in groups):
            raise ValueError(f"{where}: an optimizer with {name} is not known here")
    _require_same_training(optimizer, stage, functional)
    return kind(_rates(optimizer, stage), **{name: groups[0][name] for name in names})


def _rates(optimizer, stage: Stage) -> float | dict[str, float]:
    """The learning rates of an optimiser's groups as a recipe has them, by the names they train.

    They are those before any schedule, which may end at zero.
    """
    first = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
    if len(set(first)) == 1 or not any(first):
        return first[0] or 1.0
    known = _trained_by(optimizer, stage)
    # A name without dots is also the last part of others, which come first.
    names = sorted(known, key=lambda name: -name.count("."))
    by_group = {id(g): rate for g, rate in zip(optimizer.param_groups, first, strict=True)}
    return {name: by_group[id(known[name][1])] for name in names}


def _trained_by(optimizer, stage: Stage) -> dict[str, tuple[int, dict]]:
    """The optimiser's number and group of each parameter of the model, by name."""
    names = {id(p): name for name, p in plain_module(stage.model).named_parameters()}
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: (i, g) for i, (p, g) in enumerate(pairs) if id(p) in names}


def _require_same_training(optimizer, stage: Stage, functional: FunctionalStage) -> None:
    """Refuse an optimiser that trains less than the stage does, or with other weight decay."""
    o = functional.objective
    decay = torch.as_tensor(o.weight_decay, dtype=torch.float64).expand(o.size)
    sizes = [len(o.layout.spans[name]) for name in o.trained_names]
    known = _trained_by(optimizer, stage)
    if missing := [name for name in o.trained_names if name not in known]:
        raise ValueError(
            f"{o.where}: the optimizer does not hold the parameters {missing[:5]} of the stage's "
            "model; give the one that trained this very model, and let parameters that it left "
            "alone be: requires_grad_(False). Of a copy of the model give a recipe that does the "
            "same step instead, such as msif.SGD(lr=0.1, momentum=0.9)"
        )
    for name, part in zip(o.trained_names, decay.split(sizes), strict=True):
        theirs, ours = known[name][1]["weight_decay"], float(part[0])
        if not math.isclose(theirs, ours, rel_tol=1e-6):  # the stage's may be in float32
            raise ValueError(
                f"{o.where}: the optimizer's weight decay of {name!r} is {theirs}, the stage's is "
                f"{ours}; give the stage the same: weight_decay=a number, or a mapping by name"
            )


def _memory(
    memory, optimizer, recipe: MiniBatch, stage: Stage, functional: FunctionalStage, step: int
) -> State | None:
    """The optimiser's memory as the recipe has it, ``(1, P)`` each, from its state dict.

    None at the first step, and where none was kept.
    """
    o, adam = functional.objective, isinstance(recipe, Adam)
    if step == 0 or (memory is None and not adam):
        return None
    if memory is None or isinstance(optimizer, MiniBatch):
        kept = "Adam's moments" if adam else "the optimiser's state in a form that is known here"
        raise ValueError(
            f"{o.where}: the checkpoint at step {step} lacks {kept}; keep (step, net.state_dict(), "
            "optimizer.state_dict()) with deep copies, and give the optimizer itself, of this very "
            "model"
        )
    known, state = _trained_by(optimizer, stage), memory["state"]
    moments = []
    for kind in ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",):
        parts = [state.get(known[name][0], {}).get(kind) for name in o.trained_names]
        if any(part is None for part in parts):
            if adam:
                raise ValueError(
                    f"{o.where}: the optimizer's state at step {step} lacks {kind!r} of "
                    f"{o.trained_names[:5]}; keep optimizer.state_dict() as it is after a step"
                )
            return None  # plain gradient descent has no momentum
        moments.append(torch.cat([part.reshape(-1) for part in parts]).to(o.device, o.dtype)[None])
    return tuple(moments)
