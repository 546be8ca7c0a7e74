"""Mini-batch recipes: how a stage is trained, and how one step of it is run backwards.

A recipe trains under many example weightings at once, the same way every time; `UnrolledInfluence`
differentiates the whole run by the reverse of each step.
"""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_number, check_seed, check_whole, is_number
from ..errors import NotConvergedError
from ..objective.objective import Lanes

__all__ = ["Adam", "AdamW", "FitReport", "SGD"]


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


def check_finite(value: Tensor, gradient: Tensor, step: int, advice: str) -> None:
    """Raise `NotConvergedError` where a step's risk or gradient is NaN or inf."""
    finite = torch.isfinite(value) & torch.isfinite(gradient).flatten(1).all(1)
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


class MiniBatch(ABC):
    """What mini-batch recipes share: batches, schedule, and the loop.

    Batch order and schedule depend on the seed alone, not on example weights, so removing an
    example changes nothing else. Runs are reproducible bit for bit on one machine's CPU.

    A recipe adds the optimiser itself as pure functions on ``(R, P)`` tensors: `start`, `update`,
    and the transpose `pull_back` of one update. Your own recipe needs nothing more to be trained,
    vectorised over weightings, and unrolled.
    """

    decoupled: ClassVar[bool] = False  # weight decay acts on θ directly, not through the gradient

    def _check(self) -> None:
        keep_number(
            self,
            "lr",
            lambda lr: 0 < lr < math.inf,
            "positive and finite, one number for all parameters; schedule= lets it change",
        )
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

    def check(self, m: int) -> None:
        """Refuse a schedule that does not give one fixed factor for each step on ``m`` examples.

        Raises:
            ValueError: naming the step and what the schedule gives there.
        """
        if not callable(self.schedule):
            return
        total = self.epochs * -(-m // self.batch_size)
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

    def steps(self, m: int) -> Iterator[tuple[Tensor, float]]:
        """The whole run as ``(batch positions, learning rate)`` pairs for ``m`` examples."""
        generator = torch.Generator().manual_seed(self.seed)
        total = self.epochs * -(-m // self.batch_size)
        step = 0
        for _ in range(self.epochs):
            for batch in torch.randperm(m, generator=generator).split(self.batch_size):
                yield batch, self.lr * self._factor(step, total)
                step += 1

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
        angle = torch.tensor(passed, dtype=torch.float64) * torch.pi
        cosine = float((1 + torch.cos(angle)) / 2)
        return rise * {"constant": 1.0, "linear": 1 - passed, "cosine": cosine}[self.schedule]

    def decay(self, lanes: Lanes) -> float | Tensor:
        """λ of decoupled weight decay, one number or ``(P,)``; 0 where the gradient holds it."""
        return lanes.objective.weight_decay if self.decoupled else 0.0

    def advance(
        self, lanes: Lanes, theta: Tensor, state: State, step: int, batch: Tensor, rate: float
    ):
        """One step on one mini-batch: ``(θ, state, saved)`` after it.

        Training and its replay both use it.

        Raises:
            NotConvergedError: NaN or inf.
        """
        value, gradient = lanes.value_and_grad(theta, rows=batch.to(theta.device))
        check_finite(value, gradient, step, f"lower lr={self.lr}")
        decay = self.decay(lanes)
        if isinstance(decay, Tensor) or decay:  # `update` applies the penalty itself
            gradient = gradient - decay * theta
        return self.update(theta, state, gradient, step, rate, decay)

    def run(self, lanes: Lanes, theta: Tensor, progress: bool = True) -> tuple[Tensor, FitReport]:
        """Train from ``theta`` (R, P); returns the final parameters and the report."""
        start = time.perf_counter()
        m = len(lanes.objective.data)
        theta, state = theta.clone(), self.start(theta)
        total = self.epochs * -(-m // self.batch_size)
        with progress_bar(total, type(self).__name__, progress) as bar:
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


@dataclass(frozen=True)
class SGD(MiniBatch):
    """Mini-batch gradient descent with heavy-ball momentum, as ``torch.optim.SGD`` does it.

    ``v ← μ v + ∇L_B(θ)``, ``θ ← θ − η_t v`` with ``L_B`` the mini-batch mean plus the stage's
    penalties.

    Args:
        lr: learning rate η.
        momentum: μ in [0, 1).
        epochs: passes over the data.
        batch_size: examples per step; the last batch of an epoch holds what is left.
        seed: of the batch order.
        schedule: factor on η: ``"constant"``, ``"linear"`` (to zero), ``"cosine"``, or
            ``f(step, steps)``.
        warmup: steps over which η first rises linearly.
        nesterov: Nesterov's look-ahead, ``θ ← θ − η_t (∇L_B + μ v)``.
    """

    lr: float
    momentum: float = 0.9
    epochs: int = 10
    batch_size: int = 50
    seed: int = 0
    schedule: Schedule = "constant"
    warmup: int = 0
    nesterov: bool = False

    def __post_init__(self):
        self._check()
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
        small s at ``2α = 1/τ``.

        >>> round(SGD(lr=0.1, momentum=0.0, epochs=10, batch_size=5).equivalent_alpha(m=10), 6)
        0.25
        """
        check_whole("m", m)
        return (1 - self.momentum) / (2 * sum(rate for _, rate in self.steps(m)))


@dataclass(frozen=True)
class Adam(MiniBatch):
    """Adam (Kingma & Ba 2015) as ``torch.optim.Adam``, the penalties part of the gradient.

    ``m ← β₁ m + (1 − β₁) g``, ``s ← β₂ s + (1 − β₂) g²``, ``θ ← θ − η_t m̂ / (√ŝ + ε)`` with the
    bias-corrected ``m̂ = m / (1 − β₁ᵗ)``, ``ŝ = s / (1 − β₂ᵗ)``. Each stage starts both at 0.

    Args:
        lr: learning rate η.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε > 0.
        epochs, batch_size, seed, schedule, warmup: as in `SGD`.
    """

    lr: float = 1e-3
    betas: Sequence[float] = (0.9, 0.999)
    eps: float = 1e-8
    epochs: int = 10
    batch_size: int = 50
    seed: int = 0
    schedule: Schedule = "constant"
    warmup: int = 0

    def __post_init__(self):
        self._check()
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


@dataclass(frozen=True)
class AdamW(Adam):
    """`Adam` with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``.

    The stage's ``weight_decay`` λ shrinks θ by ``1 − η_t λ`` each step and stays out of the
    moments; a proximal term remains part of the gradient.
    """

    decoupled: ClassVar[bool] = True
