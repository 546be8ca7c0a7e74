"""Mini-batch recipes: how a stage is trained, and how one step of it is run backwards.

A recipe trains under many example weightings at once, the same way every time; `UnrolledInfluence`
differentiates the whole run by the reverse of each step.
"""

import itertools
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_number, check_seed, check_whole, is_number, listed, numbers_of, shown
from ..errors import NotConvergedError
from ..objective.layout import by_name
from ..objective.objective import Lanes, Objective
from ..objective.switches import twice_differentiable

__all__ = ["Adam", "AdamW", "FitReport", "MiniBatch", "SGD"]


@dataclass
class FitReport:
    """What a recipe did, per lane ``(R,)``.

    Attributes:
        recipe: its settings, as text.
        iterations: steps taken (the most of any lane).
        value: F at the end.
        gradient_norm: ``‖∇F‖`` at the end.
        converged: whether the gradient norm is within the recipe's tolerance.
        seconds: wall-clock time.
    """

    recipe: str
    iterations: int
    value: Tensor
    gradient_norm: Tensor
    converged: Tensor
    seconds: float = field(compare=False)

    def lane(self, at: Tensor) -> "FitReport":
        """The report of some lanes."""
        parts = {name: getattr(self, name)[at] for name in ("value", "gradient_norm", "converged")}
        return replace(self, **parts)

    def __str__(self) -> str:
        state = "converged" if bool(self.converged.all()) else "stopped short of an optimum"
        largest = float(self.gradient_norm.max())
        return f"{self.recipe}: {state} after {self.iterations} steps, ‖∇F‖ = {largest:.1e}"


def progress_bar(total: int, text: str, show: bool = True) -> tqdm:
    """A text bar that appears after two seconds and leaves nothing behind."""
    # Notebooks paint standard error red, and the stripe stays when the bar has gone. In a terminal
    # standard error is right: it keeps the bar out of pipes.
    stream = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    return tqdm(total=total, desc=text, leave=False, delay=2.0, disable=not show, file=stream)


def check_finite(value: Tensor, gradient: Tensor | None, step: int, advice: str) -> None:
    """Raise `NotConvergedError` where a step's risk, or gradient if given, is NaN or inf."""
    finite = torch.isfinite(value)
    if gradient is not None:
        finite = finite & torch.isfinite(gradient).flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        which = f" of weightings {bad[:5]} of {len(finite)}" if len(finite) > 1 else ""
        raise NotConvergedError(
            f"training produced NaN or inf at step {step}: the risk{which} is "
            f"{value[~finite].tolist()[:3]}; {advice}"
        )


def noise_floor(lanes: Lanes, theta: Tensor) -> Tensor:
    """Gradient norm below which rounding hides every further step, ``(R,)``."""
    return 20 * torch.finfo(theta.dtype).eps * (1 + theta.norm(dim=1))


Schedule = str | Callable[[int, int], float]
State = tuple[Tensor, ...]


def keep_whole(settings, **least: int) -> None:
    """Refuse settings that are no whole numbers of at least this size; NumPy's become Python's.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, lowest in least.items():
        value = check_whole(name, getattr(settings, name), lowest)
        object.__setattr__(settings, name, value)


def keep_number(settings, name: str, holds: Callable[[float], bool], text: str) -> None:
    """Refuse a setting that is not one number for which ``holds``; NumPy's become Python's.

    Raises:
        ValueError: naming the setting and its value; ``text`` says what is allowed.
    """
    object.__setattr__(settings, name, check_number(name, getattr(settings, name), holds, text))


class LinearStep(NamedTuple):
    """``u ← a u + b g``, ``θ ← θ − η D (c u + d g)``: a step with momentum u and gradient g.

    D is the recipe's `preconditioner`, constant along a stretch of the run.
    """

    a: float
    b: float
    c: float
    d: float = 0.0


class Batches:
    """The examples of each step of a run, as they were given; equal if all positions are.

    Attributes:
        positions: of all steps in a row, int64.
        sizes: how many belong to each step ``(T,)``.
    """

    def __init__(self, steps: Sequence[Tensor]):
        self.positions = torch.cat(list(steps))
        self.sizes = torch.tensor([len(step) for step in steps])

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.positions.split(self.sizes.tolist()))

    def __eq__(self, other) -> bool:
        mine = self.sizes, self.positions
        return isinstance(other, Batches) and all(
            map(torch.equal, mine, (other.sizes, other.positions))
        )

    def __hash__(self) -> int:
        return hash((len(self), int(self.positions.sum())))

    def __repr__(self) -> str:
        return f"<{len(self)} batches>"


def positions_of(batches, name: str, count: int | None = None) -> list[Tensor]:
    """Lists of positions of examples as int64 tensors ``(B,)`` on the CPU, none of them empty.

    Args:
        batches: what was given for the argument ``name``.
        count: how many examples there are, if known.

    Raises:
        TypeError, ValueError: no lists of whole numbers from 0 to ``count − 1``.
    """
    what = "lists of positions of examples, whole numbers"
    found = []
    for step, batch in enumerate(listed(name, batches, what)):
        at = numbers_of(f"{name}[{step}]", batch, what).cpu()
        whole = at.ndim == 1 and len(at) and at.dtype == torch.int64
        if not whole or not 0 <= int(at.min()) <= int(at.max()) < (count or math.inf):
            up_to = f"from 0 to {count - 1}" if count else "from 0 on"
            raise ValueError(
                f"{name}[{step}] must be whole numbers {up_to}, positions in the stage's data, "
                f"not {at.reshape(-1)[:5].tolist()} of {at.dtype}"
            )
        found.append(at)
    return found


BatchOrder = Callable[[int, int, torch.Generator], Iterable[Sequence[int]]]

# What `torch.nn.utils.clip_grad_norm_` adds to the norm that it divides by.
CLIP_EPS = 1e-6


def clip_factor(gradient: Tensor, most: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies gradients ``(..., P)`` by, ``(..., 1)``."""
    return (most / (gradient.norm(dim=-1, keepdim=True) + CLIP_EPS)).clamp(max=1.0)


def clip_transpose(g_bar: Tensor, gradient: Tensor, most: float) -> Tensor:
    """``(∂(k g)/∂g)ᵀ ḡ`` of the clipped gradient k g: ``k ḡ − k g (g·ḡ) / (‖g‖ (‖g‖ + ε))``.

    The second term is the factor's own derivative, and only there where it clips.
    """
    factor, norm = clip_factor(gradient, most), gradient.norm(dim=-1, keepdim=True)
    along = (gradient * g_bar).sum(-1, keepdim=True) / (norm * (norm + CLIP_EPS))
    bends = (factor < 1) & (norm > 0)
    return factor * (g_bar - torch.where(bends, along * gradient, 0.0))


class MiniBatch(ABC):
    """What mini-batch recipes share: batches, schedule, clipping, and the loop.

    Batch order and schedule depend on the seed alone, not on example weights, so removing an
    example changes nothing else. Runs are reproducible bit for bit on one machine's CPU.

    A recipe adds the optimiser itself as pure functions on ``(R, P)`` tensors: `start`, `update`,
    and the transpose `pull_back` of one update. Your own recipe, a frozen dataclass with these
    three and the settings that it wants to have, needs nothing more to be trained, vectorised over
    weightings, and unrolled. Adagrad, for one, with all of its derivative:

    >>> import msif_lab as msif
    >>> @dataclass(frozen=True)
    ... class Adagrad(msif.MiniBatch):
    ...     lr: float
    ...     epochs: int = 3
    ...     clip: float | None = None
    ...     def start(self, theta):
    ...         return (torch.full_like(theta, 0.1),)
    ...     def update(self, theta, state, gradient, step, rate, decay):
    ...         total = state[0] + gradient**2
    ...         return theta - rate * gradient / total.sqrt(), (total,), (gradient, total)
    ...     def pull_back(self, theta_bar, state_bar, saved, step, rate, decay):
    ...         gradient, total = saved
    ...         total_bar = state_bar[0] + rate * theta_bar * gradient / (2 * total**1.5)
    ...         g_bar = 2 * gradient * total_bar - rate * theta_bar / total.sqrt()
    ...         return g_bar, theta_bar, (total_bar,)
    >>> train, test = msif.load_digits(dtype=torch.float64)
    >>> net = msif.mlp(64, (8,), classes=10).double()
    >>> stage = msif.Stage("digits", net, train[:200], recipe=Adagrad(lr=0.05, clip=0.3))
    >>> method = msif.UnrolledInfluence().fit(msif.Pipeline([stage]).fit())
    >>> bool(method.check(n=2, queries=test[:3], steps=[1e-4]).error < 1e-6)
    True

    What a recipe does not name is as in `SGD`: ``epochs=10``, ``batch_size=50``, ``seed=0``, a
    constant rate, no clipping, batches in random order, all steps.
    """

    decoupled: ClassVar[bool] = False  # weight decay acts on θ directly, not through the gradient

    epochs = 10
    batch_size = 50
    seed = 0
    schedule = "constant"
    warmup = 0
    clip = batches = stop = None

    def __post_init__(self):
        self._keep_rate()
        keep_whole(self, epochs=1, batch_size=1, warmup=0)
        object.__setattr__(self, "seed", check_seed("seed", self.seed))
        known = ("constant", "linear", "cosine")
        if isinstance(self.schedule, type) or not (
            callable(self.schedule) or (isinstance(self.schedule, str) and self.schedule in known)
        ):
            raise ValueError(
                f"schedule={self.schedule!r} must be 'constant', 'linear', 'cosine' or a function "
                "f(step, steps) of the factor on lr, such as lambda step, steps: 0.5 ** (step // 9)"
            )
        if self.clip is not None:
            keep_number(self, "clip", lambda c: 0 < c < math.inf, "positive and finite, or None")
        if self.stop is not None:
            object.__setattr__(self, "stop", check_whole("stop", self.stop, none="all steps"))
        self._keep_batches()
        for name in ("clip", "batches", "stop"):
            # An option that is not used leaves no trace, so that the recipe's fingerprint in files
            # is what it was before there were such options.
            if vars(self).get(name, self) is None:
                del vars(self)[name]

    def _keep_rate(self) -> None:
        """Refuse a learning rate that is neither a number nor numbers by name."""
        way_out = 'one number, or numbers by name such as {"head.*": 0.1, "*": 0.01}'
        if not isinstance(self.lr, Mapping):
            text = f"positive and finite, {way_out}; schedule= lets it change"
            keep_number(self, "lr", lambda lr: 0 < lr < math.inf, text)
            return
        given = dict(self.lr)
        bad = {k: v for k, v in given.items() if not isinstance(k, str) or not is_number(v)}
        bad = bad or {k: v for k, v in given.items() if not 0 <= v < math.inf}
        if bad or not any(given.values()):
            raise ValueError(
                f"lr={shown(self.lr)} must be {way_out}, finite, none negative and not all zero"
            )
        object.__setattr__(self, "lr", {name: float(rate) for name, rate in given.items()})

    def _keep_batches(self) -> None:
        """Refuse batches that are neither a function nor lists of positions; keep them as one."""
        given = self.batches
        if given is None or isinstance(given, Batches):
            return
        if isinstance(given, type):
            raise ValueError(f"batches={given.__name__} is a class; give lists, or a function")
        if not callable(given):
            found = positions_of(given, "batches")
            if not found:
                raise ValueError("batches=[] holds no step; give a list of positions for each")
            object.__setattr__(self, "batches", Batches(found))

    def __repr__(self) -> str:
        shown_ones = (f for f in fields(self) if f.name in vars(self))
        settings = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown_ones)
        return f"{type(self).__qualname__}({settings})"

    def check(self, m: int) -> None:
        """Refuse batches, a stop or a schedule that do not fit a run on ``m`` examples.

        Raises:
            ValueError, TypeError: batches beyond the data or other ones when asked again; a stop
                after the last step; a schedule that does not give one fixed factor for each step.
        """
        if isinstance(self.batches, Batches):
            positions_of(self.batches, "batches", m)
        elif self.batches is not None:
            found = [Batches(list(self._order(m))) for _ in range(2)]
            if found[0] != found[1]:
                raise ValueError(
                    f"batches={shown(self.batches)} gives other batches when it is called again; "
                    "f(epoch, m, generator) must draw from the generator that it is given"
                )
        total = self._planned(m)
        if self.stop is not None and self.stop > total:
            raise ValueError(
                f"stop={self.stop} is after the last of the run's {total} steps; lower it, or "
                "leave it out"
            )
        if callable(self.schedule):
            self._check_schedule(total)

    def _check_schedule(self, total: int) -> None:
        for step in range(0, total, -(-total // 1000)):
            way_out = "f(step, steps) must give one number, zero or positive, the same every time"
            try:
                factors = [self.schedule(step, total) for _ in range(2)]
                fine = factors[0] == factors[1] and 0 <= float(factors[0]) < math.inf
            except Exception as error:  # whatever a function of other arguments raises
                raise ValueError(
                    f"schedule={self.schedule!r} fails at step {step} of {total}: "
                    f"{type(error).__name__}: {error}; {way_out}"
                ) from error
            if not fine:
                raise ValueError(
                    f"schedule={self.schedule!r} gives {factors} at step {step} of {total}; "
                    f"{way_out}"
                )

    # --- the optimiser, defined by each recipe ----------------------------------------------------

    @abstractmethod
    def start(self, theta: Tensor) -> State:
        """The optimiser's memory before the first step."""

    @abstractmethod
    def update(
        self,
        theta: Tensor,
        state: State,
        gradient: Tensor,
        step: int,
        rate: float,
        decay: float | Tensor,
    ):
        """One step: ``(θ, state, ∇L_B) → (θ, state, saved)``, with what `pull_back` will need."""

    @abstractmethod
    def pull_back(
        self,
        theta_bar: Tensor,
        state_bar: State,
        saved: State,
        step: int,
        rate: float,
        decay: float | Tensor,
    ):
        """The transpose of `update`: from derivatives of q after the step to those before it.

        ``(θ̄, state̅) → (ḡ, θ̄, state̅)``, all ``(Q, P)``, with ``ḡ = ∂q/∂∇L_B``. The dependence of
        ∇L_B on θ is left to the caller, who adds ``∇²L_B ḡ`` to θ̄.
        """

    def linear_step(self, step: int) -> "LinearStep":
        """One step as a linear recurrence, for `SegmentedInfluence`.

        Raises:
            TypeError: a recipe of one's own that does not say so.
        """
        raise TypeError(
            f"{type(self).__name__} does not define linear_step, so its run can be differentiated "
            "step by step only: use UnrolledInfluence"
        )

    def preconditioner(self, state: State, step: int) -> Tensor | None:
        """What the direction of a step is multiplied by, ``(R, P)``; None for all ones."""
        return None

    # --- the run ----------------------------------------------------------------------------------

    def _order(self, m: int) -> Iterator[Tensor]:
        """The batches of the whole run as planned, of ``m`` examples; `stop` ends it earlier."""
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(self.batches, Batches):
            yield from self.batches
            return
        for epoch in range(self.epochs):
            if self.batches is None:
                yield from torch.randperm(m, generator=generator).split(self.batch_size)
            else:
                yield from self._own(epoch, generator, m)

    def _own(self, epoch: int, generator: torch.Generator, m: int) -> list[Tensor]:
        """What a function of one's own gives as an epoch's batches, checked."""
        try:
            given = list(self.batches(epoch, m, generator))
        except Exception as error:  # whatever a function of other arguments raises
            raise ValueError(
                f"batches={shown(self.batches)} fails in epoch {epoch}: {type(error).__name__}: "
                f"{error}; f(epoch, m, generator) must give lists of positions of m examples"
            ) from error
        if not given:
            raise ValueError(f"batches={shown(self.batches)} gives no batch in epoch {epoch}")
        return positions_of(given, f"batches(epoch {epoch})", m)

    def _planned(self, m: int) -> int:
        """How many steps the run has if nothing stops it; what schedules go by."""
        if self.batches is None:
            return self.epochs * -(-m // self.batch_size)
        if isinstance(self.batches, Batches):
            return len(self.batches)
        return sum(1 for _ in self._order(m))

    def steps(self, m: int) -> Iterator[tuple[Tensor, float]]:
        """The whole run as ``(batch positions, learning rate)`` pairs for ``m`` examples.

        Where learning rates go by name it is the largest of them; see `shares`.
        """
        total, largest = self._planned(m), self.lr
        if isinstance(largest, Mapping):
            largest = max(largest.values())
        for step, batch in enumerate(itertools.islice(self._order(m), self.stop)):
            yield batch, largest * self._factor(step, total)

    def lane_steps(self, lanes: Lanes) -> Iterator[tuple[Tensor, float]]:
        """`steps` of these lanes: batches ``(R, B)`` where each has a batch order of its own."""
        m = len(lanes.objective.data)
        if lanes.seeds is None:
            yield from self.steps(m)
            return
        orders = [replace(self, seed=seed).steps(m) for seed in lanes.seeds]
        for each in zip(*orders, strict=True):
            batches, rates = zip(*each, strict=True)
            yield torch.stack(batches), rates[0]

    def _factor(self, step: int, total: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if callable(self.schedule):
            return rise * float(self.schedule(step, total))
        passed = max(0, step - self.warmup) / max(1, total - self.warmup)
        if self.schedule == "cosine":
            angle = torch.tensor(passed, dtype=torch.float64) * torch.pi
            return rise * float((1 + torch.cos(angle)) / 2)
        return rise * (1 - passed if self.schedule == "linear" else 1.0)

    def shares(self, objective: Objective) -> float | Tensor:
        """Each parameter's learning rate as a share of the largest: 1, or ``(P,)`` by name.

        Raises:
            ValueError: a name that matches nothing, or a trained parameter without a rate.
        """
        if not isinstance(self.lr, Mapping):
            return 1.0
        return objective.once(("shares", *self.lr.items()), lambda: self._shares(objective))

    def _shares(self, o: Objective) -> float | Tensor:
        found = by_name("lr", self.lr, o.layout, o.trained_names, o.where)
        largest = max(self.lr.values())
        return o.spread({name: rate / largest for name, rate in found.items()})

    def decay(self, objective: Objective) -> float | Tensor:
        """λ of decoupled weight decay, one number or ``(P,)``; 0 where the gradient holds it."""
        return objective.weight_decay if self.decoupled else 0.0

    def decay_apart(self, objective: Objective) -> float | Tensor:
        """λ of weight decay that is no part of the gradient of a batch, as it is clipped."""
        apart = self.decoupled or self.clip is not None
        return objective.weight_decay if apart else 0.0

    def advance(
        self, lanes: Lanes, theta: Tensor, state: State, step: int, batch: Tensor, rate: float
    ):
        """One step on one mini-batch: ``(θ, state, saved)`` after it.

        Training and its replay both use it.

        Raises:
            NotConvergedError: NaN or inf.
        """
        o = lanes.objective
        # NaN in a gradient shows in the next step's risk, and at the end both are looked at.
        risk, gradient = lanes.risk_and_grad(theta, rows=batch.to(theta.device))
        check_finite(risk, None, step, f"lower lr={self.lr}")
        apart, decay = self.decay_apart(o), self.decay(o)
        if isinstance(apart, Tensor) or apart:
            gradient = gradient - apart * theta
        before = ()
        if self.clip is not None:  # as `loss.backward()` leaves it, before the optimiser adds decay
            before = (gradient,)
            gradient = clip_factor(gradient, self.clip) * gradient + (apart - decay) * theta
        rate = rate * self.shares(o)
        theta, state, saved = self.update(theta, state, gradient, step, rate, decay)
        return theta, state, (*before, *saved)

    def retreat(
        self,
        objective: Objective,
        theta_bar: Tensor,
        state_bar: State,
        saved: State,
        step: int,
        rate: float,
    ):
        """The transpose of `advance`, as `pull_back` is that of `update`.

        ḡ belongs to the gradient of the batch before it was clipped, in which weight decay has no
        part that is `decay_apart`.
        """
        decay, rate = self.decay(objective), rate * self.shares(objective)
        if self.clip is None:
            return self.pull_back(theta_bar, state_bar, saved, step, rate, decay)
        gradient, *saved = saved
        bars = self.pull_back(theta_bar, state_bar, tuple(saved), step, rate, decay)
        g_bar, theta_bar, state_bar = bars
        theta_bar = theta_bar + (self.decay_apart(objective) - decay) * g_bar
        return clip_transpose(g_bar, gradient, self.clip), theta_bar, state_bar

    def run(self, lanes: Lanes, theta: Tensor, progress: bool = True) -> tuple[Tensor, FitReport]:
        """Train from ``theta`` (R, P); returns the final parameters and the report."""
        start = time.perf_counter()
        m = len(lanes.objective.data)
        theta, state = theta.clone(), self.start(theta)
        total = min(self._planned(m), self.stop or math.inf)
        ready = twice_differentiable(lanes.objective.model)
        with progress_bar(total, type(self).__name__, progress) as bar, ready:
            for step, (batch, rate) in enumerate(self.lane_steps(lanes)):
                theta, state, _ = self.advance(lanes, theta, state, step, batch, rate)
                bar.update()
        value, gradient = lanes.value_and_grad(theta)
        check_finite(value, torch.cat([theta, gradient], 1), total, f"lower lr={self.lr}")
        norm = gradient.norm(dim=1)
        return theta, FitReport(
            str(self),
            step + 1,
            value,
            norm,
            norm <= noise_floor(lanes, theta),
            time.perf_counter() - start,
        )


@dataclass(frozen=True, repr=False)
class SGD(MiniBatch):
    """Mini-batch gradient descent with heavy-ball momentum, as ``torch.optim.SGD`` does it.

    ``v ← μ v + ∇L_B(θ)``, ``θ ← θ − η_t v`` with ``L_B`` the mini-batch mean plus the stage's
    penalties.

    Parameter groups are numbers by name: ``lr={"head.*": 0.1, "*": 0.01}`` here, and ``{"1d": 0.0,
    "*": 1e-3}`` as the stage's ``weight_decay``; `Stage` says how names are matched. A schedule
    scales them all.

    Args:
        lr: learning rate η, one for all parameters or by name.
        momentum: μ in [0, 1).
        epochs: passes over the data.
        batch_size: examples per step; the last batch of an epoch holds what is left.
        seed: of the batch order.
        schedule: factor on η: ``"constant"``, ``"linear"`` (to zero), ``"cosine"``, or
            ``f(step, steps)``.
        warmup: steps over which η first rises linearly.
        nesterov: Nesterov's look-ahead, ``θ ← θ − η_t (∇L_B + μ v)``.
        clip: largest norm c of a step's gradient over all trained parameters, as
            ``torch.nn.utils.clip_grad_norm_`` sees to it between ``loss.backward()`` and
            ``optimizer.step()``: ``g ← g min(1, c / (‖g‖ + 1e-6))``. A proximal term is part of
            that gradient, weight decay is not: it comes after.
        batches: an order of one's own, in batches of any size: a list with the positions of the
            examples of each step of the whole run (``epochs`` and ``batch_size`` then mean
            nothing), or a function ``f(epoch, m, generator)`` of such lists of m examples for each
            epoch, which draws from that generator alone. An example may come several times, or
            never.
        stop: end the run after so many steps; the schedule stays that of the whole run.

    >>> def whole(epoch, m, generator):  # leave out what is left of an epoch
    ...     order = torch.randperm(m, generator=generator)
    ...     return order[: m // 50 * 50].split(50)
    >>> len(list(SGD(lr=0.1, epochs=3, batches=whole).steps(120)))
    6
    >>> SGD(lr={"head.*": 0.1, "*": 0.01}, clip=1.0, epochs=3, stop=40)
    SGD(lr={'head.*': 0.1, '*': 0.01}, momentum=0.9, epochs=3, batch_size=50, seed=0, \
schedule='constant', warmup=0, nesterov=False, clip=1.0, stop=40)
    """

    lr: float | Mapping[str, float]
    momentum: float = 0.9
    epochs: int = 10
    batch_size: int = 50
    seed: int = 0
    schedule: Schedule = "constant"
    warmup: int = 0
    nesterov: bool = False
    _: KW_ONLY
    clip: float | None = None
    batches: Sequence[Sequence[int]] | BatchOrder | None = None
    stop: int | None = None

    def __post_init__(self):
        super().__post_init__()
        keep_number(self, "momentum", lambda m: 0 <= m < 1, "in [0, 1)")
        if not isinstance(self.nesterov, bool):
            raise ValueError(f"nesterov={self.nesterov!r} must be True or False")

    def start(self, theta):
        return (torch.zeros_like(theta),)

    def update(self, theta, state, gradient, step, rate, decay):
        velocity = self.momentum * state[0] + gradient
        theta = theta - rate * (gradient + self.momentum * velocity if self.nesterov else velocity)
        return theta, (velocity,), ()

    def pull_back(self, theta_bar, state_bar, saved, step, rate, decay):
        if self.nesterov:
            v_bar = state_bar[0] - rate * self.momentum * theta_bar
            return v_bar - rate * theta_bar, theta_bar, (self.momentum * v_bar,)
        v_bar = state_bar[0] - rate * theta_bar
        return v_bar, theta_bar, (self.momentum * v_bar,)

    def linear_step(self, step):
        if self.nesterov:
            return LinearStep(self.momentum, 1.0, self.momentum, 1.0)
        return LinearStep(self.momentum, 1.0, 1.0)

    def equivalent_alpha(self, m: int) -> float:
        """The α whose `Proximal` link acts like this run from W* on ``m`` examples.

        ``2α = (1 − μ) / Σ_t η_t``: gradient descent for a time ``τ = Σ η_t / (1 − μ)`` filters
        curvature s by ``exp(−τ s)``, the proximal optimum by ``2α / (s + 2α)``; they agree for
        small s at ``2α = 1/τ``. Of rates by name the largest counts.

        >>> round(SGD(lr=0.1, momentum=0.0, epochs=10, batch_size=5).equivalent_alpha(m=10), 6)
        0.25
        """
        check_whole("m", m)
        return (1 - self.momentum) / (2 * sum(rate for _, rate in self.steps(m)))


@dataclass(frozen=True, repr=False)
class Adam(MiniBatch):
    """Adam (Kingma & Ba 2015) as ``torch.optim.Adam``, the penalties part of the gradient.

    ``m ← β₁ m + (1 − β₁) g``, ``s ← β₂ s + (1 − β₂) g²``, ``θ ← θ − η_t m̂ / (√ŝ + ε)`` with the
    bias-corrected ``m̂ = m / (1 − β₁ᵗ)``, ``ŝ = s / (1 − β₂ᵗ)``. Each stage starts both at 0.

    Args:
        lr: learning rate η.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε > 0.
        epochs, batch_size, seed, schedule, warmup, clip, batches, stop: as in `SGD`, and rates by
            name.
    """

    lr: float | Mapping[str, float] = 1e-3
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    epochs: int = 10
    batch_size: int = 50
    seed: int = 0
    schedule: Schedule = "constant"
    warmup: int = 0
    _: KW_ONLY
    clip: float | None = None
    batches: Sequence[Sequence[int]] | BatchOrder | None = None
    stop: int | None = None

    def __post_init__(self):
        super().__post_init__()
        betas = self.betas if isinstance(self.betas, (tuple, list)) else ()
        if len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
            raise ValueError(
                f"betas={self.betas!r}: betas must be two numbers in [0, 1), such as (0.9, 0.999)"
            )
        keep_number(self, "eps", lambda eps: 0 < eps < math.inf, "positive and finite")

    def start(self, theta):
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def _corrected(self, first, second, step):
        """m̂, √ŝ and the two divisors that correct the bias."""
        c1, c2 = (1 - beta ** (step + 1) for beta in self.betas)
        return first / c1, (second / c2).sqrt(), c1, c2

    def update(self, theta, state, gradient, step, rate, decay):
        b1, b2 = self.betas
        first = b1 * state[0] + (1 - b1) * gradient
        second = b2 * state[1] + (1 - b2) * gradient**2
        mean, root, _, _ = self._corrected(first, second, step)
        theta = (1 - rate * decay) * theta - rate * mean / (root + self.eps)
        return theta, (first, second), (gradient, first, second)

    def pull_back(self, theta_bar, state_bar, saved, step, rate, decay):
        b1, b2 = self.betas
        gradient, first, second = saved
        mean, root, c1, c2 = self._corrected(first, second, step)
        # ∂(m̂ / (√ŝ + ε))/∂s. Where s is 0, so were all gradients, and with them m̂ and the product.
        by_second = torch.where(root > 0, mean / (2 * c2 * root * (root + self.eps) ** 2), 0.0)
        # What no gradient has reached yet stays put: the rule has a kink of slope 1/ε there,
        # but none of its examples leads off it.
        reached = torch.where(root > 0, rate / c1 / (root + self.eps), 0.0)
        first_bar = state_bar[0] - reached * theta_bar
        second_bar = state_bar[1] + rate * by_second * theta_bar
        g_bar = (1 - b1) * first_bar + 2 * (1 - b2) * gradient * second_bar
        return g_bar, (1 - rate * decay) * theta_bar, (b1 * first_bar, b2 * second_bar)

    def linear_step(self, step):
        first = self.betas[0]
        return LinearStep(first, 1 - first, 1 / (1 - first ** (step + 1)))

    def preconditioner(self, state, step):
        _, root, _, _ = self._corrected(*state, step - 1)
        return torch.where(root > 0, 1 / (root + self.eps), 0.0)


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """`Adam` with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``.

    The stage's ``weight_decay`` λ shrinks θ by ``1 − η_t λ`` each step and stays out of the
    moments; a proximal term remains part of the gradient.
    """

    decoupled: ClassVar[bool] = True
