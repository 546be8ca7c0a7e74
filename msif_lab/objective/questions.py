"""What is asked: q of each query, or one number made of all of them."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import shown
from ..data.examples import Examples
from ..data.randomness import draws_from
from ..fingerprints import describe
from ..storage import digest
from .losses import target_name
from .objective import Objective

__all__ = [
    "CUT",
    "MEASURE",
    "SLOPE_CLOSE",
    "Question",
    "about_all",
    "check_aggregate",
    "is_step",
    "make_question",
    "slope_error",
]

AGGREGATES = ("mean", "sum")
SLOPE_CLOSE = 1e-2
CUT = (
    "its gradient is not its derivative, off by {:.0%}: a detach(), no_grad() or item() in it cuts "
    "the graph; take it out"
)
MEASURE = (
    "ask for the influence on target='margin' or 'loss' instead, and measure it by retraining: "
    "removal_effects(pipeline, queries, subsets, target=..., aggregate=...) takes any function"
)


def about_all(kind: str, ids: Tensor, *parts: str) -> str:
    """An aggregate in words, and a fingerprint of the queries and weights or function in it."""
    print_of = hashlib.sha256(" ".join([digest(ids), *parts]).encode()).hexdigest()[:8]
    return f"{kind} of {len(ids)} queries #{print_of}"


@dataclass(frozen=True)
class Question:
    """q of each of Q queries, or with ``combine`` one number A made of all of them.

    A's gradient is ``Σ_q c_q ∇q`` with ``c_q = ∂A/∂q``, so whatever is linear in the gradient of q
    costs as much for A as for one query.

    Attributes:
        queries: Q examples of the last stage's task.
        function: ``(outputs, targets) -> (B,)``; for a function of all queries also ``(B, K)``.
        target: what is asked, as results name it.
        combine: None for q of each query; weights ``(Q,)``, so ``A = Σ_q w_q q``; or a function
            from all q, ``(Q,)`` or ``(Q, K)``, to one number.
        aggregate: in words, for results; empty for q of each query.
        asked: the target told apart by content where it is a function.
    """

    queries: Examples
    function: Callable[[Tensor, Tensor], Tensor]
    target: str
    combine: Tensor | Callable[[Tensor], Tensor] | None = None
    aggregate: str = ""
    asked: str = "loss"

    def __len__(self) -> int:
        """The number of rows of the answer: Q or 1."""
        return len(self.queries) if self.combine is None else 1

    @property
    def ids(self) -> Tensor:
        """Identities of the rows: those of the queries, or −1 for all of them together."""
        ids = self.queries.ids
        return ids if self.combine is None else ids.new_full((1,), -1)

    @property
    def each(self) -> "Question":
        """The same question of each query on its own."""
        return replace(self, combine=None, aggregate="")

    def split(self, rows: int) -> Iterator["Question"]:
        """Questions with at most this many rows each, which together are this one."""
        if self.combine is not None:
            yield self
            return
        for group in torch.arange(len(self.queries)).split(rows):
            yield replace(self, queries=self.queries[group])

    def answer(self, values: Tensor) -> Tensor:
        """From q of all queries, ``(Q,)`` or ``(Q, K)``, to q of each row, ``(Q,)`` or ``(1,)``."""
        if self.combine is None:
            return values
        if isinstance(self.combine, Tensor):
            return (self.combine.to(values) @ values)[None]
        return self.combine(values.clone()).reshape(1)

    def values(self, o: Objective, full: Tensor) -> Tensor:
        """q of all queries at parameters ``full`` (D,): ``(Q,)`` or ``(Q, K)``."""
        with torch.no_grad():
            parts = [self.function(o.outputs(full, x), y) for _, x, y in o.chunks(self.queries)]
        return torch.cat(parts)

    def weights(self, o: Objective, full: Tensor) -> Tensor:
        """``c = ∂A/∂q`` at parameters ``full`` (D,), ``(Q,)`` or ``(Q, K)``.

        Raises:
            ValueError: a derivative of the function is NaN or inf there.
        """
        if isinstance(self.combine, Tensor):
            return self.combine
        values = self.values(o, full)
        slopes = _slopes(self.combine, values)
        if not bool(torch.isfinite(slopes).all()):
            at = (~torch.isfinite(slopes)).nonzero()[0].tolist()
            raise ValueError(
                f"aggregate={_name(self.combine)}(values) has the derivative "
                f"{float(slopes[tuple(at)])} in values[{at[0]}] = {values[at[0]].tolist()}; make "
                "it smooth there"
            )
        return slopes

    def gradient(self, o: Objective, full: Tensor, every: bool = True) -> Tensor:
        """∇A at parameters ``full`` (D,), as one row: ``(1, D)``, or ``(1, P)`` if not ``every``.

        One backward pass through the queries, chunk by chunk; those without weight are left out.

        Raises:
            ValueError: q is NaN or inf for some query.
        """
        c = self.weights(o, full)
        counted = (c.reshape(len(c), -1) != 0).any(1).nonzero().flatten()
        theta = full if every else o.trained.take(full)
        total = torch.zeros_like(theta)
        for rows, x, y in o.chunks(self.queries, rows=counted):
            with torch.enable_grad():
                leaf = theta.detach().requires_grad_()
                values = self.function(o.outputs(leaf if every else o.parameters(leaf, full), x), y)
                part = (c[rows] * values).sum()
            if not bool(torch.isfinite(part)):
                ids = self.queries.ids[rows.cpu()].tolist()
                raise ValueError(
                    f"target gives NaN or inf on some of the queries {ids[:8]}; check the target "
                    "and those queries, or give them weight 0"
                )
            if part.requires_grad:
                total += torch.autograd.grad(part, leaf, materialize_grads=True)[0]
        return total[None]


def make_question(
    o: Objective, queries: Examples, function: Callable, target: str | Callable, aggregate
) -> Question:
    """The question of these queries; ``aggregate`` is checked as far as it can be without them.

    Args:
        o: the stage whose model answers.
        queries, function: as in `Question`.
        target: what the user gave for it.
        aggregate: None, ``"mean"``, ``"sum"``, ``(Q,)`` weights, or a function of all q.

    Raises:
        ValueError: an unknown name, or weights of another length, not finite, or all zero.
        TypeError: no numbers.
    """
    name, ids = target_name(target), queries.ids
    asked = target if isinstance(target, str) else describe(target)
    if aggregate is None:
        return Question(queries, function, name, asked=asked)
    if callable(aggregate):
        words = about_all(_name(aggregate), ids, describe(aggregate))
        name = f"{_name(aggregate)} of {name}"
        return Question(queries, function, name, aggregate, words, asked)
    if isinstance(aggregate, str):
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"aggregate={aggregate!r} must be one of {AGGREGATES}, one weight per query "
                f"({len(ids)},), a function of the values of all queries, or None for a row each"
            )
        share = 1 / len(ids) if aggregate == "mean" else 1.0
        weights = torch.full((len(ids),), share, dtype=o.dtype, device=o.device)
        return Question(queries, function, name, weights, about_all(aggregate, ids), asked)
    weights = _weights(aggregate, len(ids))
    if bool((weights < 0).any()):
        name = f"weighted {name}"
    words = about_all("weighted sum", ids, digest(weights))
    return Question(queries, function, name, weights.to(o.device, o.dtype), words, asked)


def _weights(given, count: int) -> Tensor:
    """One finite weight per query ``(Q,)``, some of them not zero."""
    try:
        if isinstance(given, bool):
            raise TypeError("a switch")
        weights = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"aggregate={shown(given)} holds no numbers; give 'mean', 'sum', one weight per query "
            f"({count},), or a function of the values of all queries"
        ) from error
    if weights.shape != (count,):
        raise ValueError(
            f"aggregate={shown(given)} has shape {tuple(weights.shape)}, expected one weight "
            f"per query, ({count},); or give 'mean', 'sum' or a function of the values of all "
            "queries"
        )
    if not bool(torch.isfinite(weights).all()):
        at = int((~torch.isfinite(weights)).nonzero()[0])
        raise ValueError(
            f"aggregate holds {float(weights[at])} as the weight of query {at}; weights must be "
            "finite, 0 leaves a query out"
        )
    if not bool(weights.any()):
        raise ValueError(
            "aggregate holds only zeros, so nothing is asked; 'mean' weighs all queries alike"
        )
    return weights


def require_finite(question: Question, values: Tensor) -> None:
    """Raise `ValueError` where q of some query, ``(Q, ...)``, is NaN or inf."""
    if not bool(torch.isfinite(values).all()):
        ids = question.queries.ids[(~torch.isfinite(values)).nonzero()[:8, 0].cpu()].tolist()
        raise ValueError(
            f"target={question.target} gives NaN or inf on the queries with ids {ids}; leave them "
            "out"
        )


def check_aggregate(question: Question, o: Objective, derivative: bool) -> None:
    """Check the queries' values at the model's present weights, and a function of all of them.

    Args:
        question: what is asked.
        o: the stage whose model answers.
        derivative: whether the function must have one.

    Raises:
        ValueError: NaN or inf among the values; or the function fails, draws random numbers, does
            not give one finite number, or has no derivative.
    """
    values = question.values(o, o.layout.flatten(o.model))
    require_finite(question, values)
    if question.combine is None or isinstance(question.combine, Tensor):
        return
    what = f"aggregate={_name(question.combine)}(values)"
    shape, answers = tuple(values.shape), []
    try:
        with torch.no_grad():
            drawn = draws_from(
                lambda: answers.append(question.combine(values.clone())), [question.combine]
            )
    except Exception as error:  # whatever a function raises that was made for other arguments
        raise ValueError(
            f"{what} fails on the values {shape} of all queries: {type(error).__name__}: {error}"
        ) from error
    if drawn:
        raise ValueError(
            f"{what} draws from {' and '.join(drawn)}; influence needs a fixed function: draw the "
            "numbers once, beforehand"
        )
    answer = answers[0]
    if not isinstance(answer, Tensor) or answer.numel() != 1 or not answer.is_floating_point():
        found = type(answer).__name__
        if isinstance(answer, Tensor):
            found = f"{tuple(answer.shape)} {answer.dtype}"
        raise ValueError(
            f"{what} gives {found} from values {shape}, expected a tensor of one floating number; "
            "use torch operations, and values.mean() or the like at the end"
        )
    if not bool(torch.isfinite(answer).all()):
        raise ValueError(f"{what} gives {float(answer)} at the present weights; check it")
    if derivative and is_step(question.combine, values):
        raise ValueError(
            f"{what} has no derivative, or one that is zero everywhere, like all that counts or "
            f"cuts the graph by argmax, a comparison, round, detach(), item() or NumPy; {MEASURE}"
        )
    if derivative and (error := slope_error(question.combine, values)) > SLOPE_CLOSE:
        raise ValueError(f"{what}: {CUT.format(error)}")


def _name(function: Callable) -> str:
    return getattr(function, "__name__", "custom function")


def _slopes(function: Callable, point: Tensor, *given: Tensor) -> Tensor:
    """The gradient of the sum of what a function gives, in its first argument."""
    with torch.enable_grad():
        leaf = point.detach().clone().requires_grad_()
        total = function(leaf.clone(), *given).sum()
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(total, leaf, materialize_grads=True)[0]


def slope_error(function: Callable, point: Tensor, *given: Tensor) -> float:
    """How far a function's gradient in its first argument is from its differences, relative.

    Along the gradient and in a random direction, in float64; 0 where the function does not take it.
    """
    point = point.detach().to(torch.float64)
    given = tuple(g.to(torch.float64) if g.is_floating_point() else g for g in given)
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(point.shape, generator=draw).to(point)
    worst = 0.0
    with contextlib.suppress(Exception), torch.no_grad():
        weights = torch.rand(function(point.clone(), *given).shape, generator=draw).to(point)

        def weighted(point: Tensor) -> Tensor:
            return weights * function(point.clone(), *given)

        slope = _slopes(weighted, point)
        for v in (slope, noise):
            v = v / v.norm().clamp(min=1e-300)
            expected = float((slope * v).sum())
            size = abs(expected) + float(slope.norm()) / point.numel() ** 0.5
            gaps = []
            for h in (1e-4, 1e-5, 1e-6, 1e-3):
                up, down = (float(weighted(point + s * h * v).sum()) for s in (1, -1))
                rounding = 1e-15 * (abs(up) + abs(down)) / h
                gaps.append(max(0.0, abs((up - down) / (2 * h) - expected) - rounding))
            worst = max(worst, min(gaps) / size if size > 0 else 0.0)
    return worst


def is_step(function: Callable, point: Tensor, *given: Tensor) -> bool:
    """Whether a function is piecewise constant, as far as can be seen.

    Its gradient in the first argument is exactly zero at ``point`` and at random points near and
    far. A loss that is only saturated here, or a hinge that all examples satisfy, is not so
    everywhere.
    """
    try:
        if bool(_slopes(function, point, *given).any()):  # NaN counts too
            return False
    except Exception:  # as `numpy()` raises on what requires a gradient
        return True
    draw = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0, 1e3):
        for centre in (point, torch.zeros_like(point)):
            noise = torch.randn(point.shape, generator=draw).to(point)
            try:
                if bool(_slopes(function, centre + scale * noise, *given).any()):
                    return False
            except Exception:  # it checks its arguments: what it does elsewhere is unknown
                return False
    return True
