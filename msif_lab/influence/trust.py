"""How far scores will predict removals: measured on a few more runs of the training itself.

A derivative of a run may be exact and still say little about removing an example, where training
amplifies small changes or crosses kinks. So some runs are made under other example weights w, and
what they do to the queries is held against what the scores s say, ``(w − 1)·s``. Half of them
remove one example. The others, where the scores are plain derivatives, change all weights at once,
each up or down by ``1/√m``: together that moves q about as far as a removal does, and tells of all
m examples instead of one.
"""

import math
import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import check_whole
from ..errors import NotConvergedError, UnsmoothTrainingWarning
from ..objective.questions import Question
from ..pipeline.pipeline import Pipeline, Retrained

__all__ = ["Trust"]

# Queries from which on so many runs are made, where their number is left open: 31 % of the sweep's
# time at 10 queries and 26 % at 20 in conv nets of 1,572 parameters on MNIST; in smaller nets more,
# since there one training alone takes 30 % (bench_trust.py cost).
MANY, USUAL, FEW = (50, 8), (20, 4), (1, 2)
# From so many runs on, by the three quarters of bench_trust.py's settings that are not held out:
# level and power of noise / signal in `estimate`, and the r below which `score` warns.
CALIBRATED = {1: (0.30, 0.86, 0.86), 4: (0.00, 1.04, 0.91), 8: (-0.17, 1.14, 0.94)}
WIDTH = 1.0  # of the interval, from four runs on
REMEDIES = (
    "What helped 15 rough runs (median r before and after, bench_trust.py): a quarter of the "
    "learning rate 0.16 to 0.94, half of it 0.16 to 0.78; smooth activations (tanh, GELU) instead "
    "of ReLU 0.40 to 0.97; average instead of max pooling 0.36 to 0.98; linear decay of the rate "
    "0.15 to 0.53. Warm-up and the mean of 4 runs alone did not"
)


@dataclass(frozen=True)
class Trust:
    """How well scores will predict real removals, estimated from a few real runs.

    Attributes:
        r: Pearson's r of predicted and real same-seed effects over random removals, mean over
            queries: of single examples, or of groups as ``group_fraction`` asked.
        low, high: where r is expected in nine of ten settings like those it was calibrated on.
        runs: how many runs it comes from.
        kind: what they did: ``"removals"`` of single examples, ``"groups"``, or ``"mixed"``:
            removals, and changes of all weights in turn.
        seconds: what the runs took in this call; 0 where those of a former one served again.
        share: that, over what the scores themselves took.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2)
    >>> stage = msif.Stage("digits", msif.softmax_regression(64, 10), train, recipe=recipe)
    >>> fitted = msif.UnrolledInfluence(trust=4).fit(msif.Pipeline([stage]).fit())
    >>> trust = fitted.score(test[:10]).trust_
    >>> trust.r > 0.95, trust.runs, trust.warns
    (True, 4, False)

    Calibrated in ``tests/benchmarks/bench_trust.py`` on nets of a few thousand parameters.
    """

    r: float
    low: float
    high: float
    runs: int
    kind: str = "mixed"
    seconds: float = 0.0
    share: float = 0.0

    def __post_init__(self):
        fine = -1 <= self.low <= self.r <= self.high <= 1
        if not (fine and isinstance(self.runs, int) and self.runs > 0):
            raise ValueError(
                f"r={self.r} between low={self.low} and high={self.high} from runs={self.runs} is "
                "no correlation with its interval"
            )

    @property
    def warns(self) -> bool:
        """Whether r is so low that `score` warns."""
        return self.r < calibrated(self.runs)[2]

    @staticmethod
    def together(parts: list[tuple["Trust | None", int]]) -> "Trust | None":
        """Of all queries, from those of some each with their number; None where one is missing."""
        if any(trust is None for trust, _ in parts):
            return None
        trusts, counts = zip(*parts, strict=True)
        mean = {
            name: sum(getattr(t, name) * n for t, n in parts) / sum(counts)
            for name in ("low", "r", "high", "share")
        }
        seconds = sum(t.seconds for t in trusts)
        return replace(trusts[0], **mean, runs=min(t.runs for t in trusts), seconds=seconds)

    def brief(self) -> str:
        """r and its interval in a few words."""
        return f"r ≈ {self.r:.2f} ({self.low:.2f} to {self.high:.2f})"

    def __str__(self) -> str:
        what = {
            "mixed": "without one example, or with all weights changed a little",
            "removals": "without one example each",
            "groups": "without a random group each",
        }[self.kind]
        runs = f"{self.runs} run{'s' * (self.runs > 1)} {what}"
        cost = f", at {self.share:.0%} of the scores' time" if self.seconds else ", made before"
        return f"{self.brief()}, from {runs}{cost}"


def calibrated(runs: int) -> tuple[float, float, float]:
    """The line of `CALIBRATED` for so many runs."""
    return CALIBRATED[max(n for n in CALIBRATED if n <= runs)]


def run_count(asked: int | None, queries: int) -> int:
    """How many runs to make for so many queries, where it is not ``asked`` for."""
    return asked or next(runs for least, runs in (MANY, USUAL, FEW) if queries >= least)


def check_count(trust: int | None) -> int | None:
    """Refuse a ``trust`` that is no number of runs."""
    return check_whole("trust", trust, 0, 1000, none="a number that suits the queries")


class Reruns:
    """Runs of a pipeline under other weights of one stage's examples, made once and kept.

    Args:
        pipeline: trained, and repeatable.
        stage: whose weights are changed.
        fraction: > 0 removes random groups of this fraction.
        single: removes single examples only; else every other run changes all weights by ``± 1/√m``
            instead, which is for derivatives only.
        memory: bytes, half of which the runs at work may take, and half those that are kept.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        stage: int,
        fraction: float = 0.0,
        single: bool = False,
        memory: int = 10**9,
    ):
        sizes = [pipeline.objective(k).layout.size for k in range(len(pipeline.stages))]
        item = pipeline.objective(-1).dtype.itemsize
        # parameters, gradient, the optimiser's memory and their temporaries
        self._together = max(1, memory // 2 // (8 * max(sizes) * item))
        self._most = max(FEW[1], memory // 2 // (sizes[-1] * item))
        self.pipeline, self.stage, self.m = pipeline, stage, len(pipeline.stages[stage].data)
        self.kind = "groups" if fraction else "removals" if single else "mixed"
        size = max(1, round(fraction * self.m))
        # predicted effects of one run: so many times the variance of the scores
        self.variance = {"groups": size * (1 - size / self.m)}.get(self.kind, 1.0)
        self._size = size
        self.weights = torch.zeros(0, self.m)
        self._ends: Tensor | None = None  # (R, D): the last stage's parameters
        self.diverged = False

    def _row(self, i: int) -> Tensor:
        draw, w = torch.Generator().manual_seed(i), torch.ones(self.m, dtype=torch.float64)
        if self.kind == "mixed" and i % 2:
            signs = 2 * torch.randint(0, 2, (self.m,), generator=draw) - 1
            return w + signs / math.sqrt(self.m)
        w[torch.randperm(self.m, generator=draw)[: self._size]] = 0
        return w

    def grow(self, count: int, progress: bool = False) -> float:
        """Make what is missing to this many runs; returns the seconds that took."""
        have, start = len(self.weights), time.perf_counter()
        count = min(count, self._most)
        if count <= have or self.diverged:
            return 0.0
        rows = torch.stack([self._row(i) for i in range(have, count)])
        kept = [] if self._ends is None else [self._ends]
        try:
            for part in rows.split(self._together):
                again = self.pipeline.retrain({self.stage: part}, progress=progress)
                kept.append(again.parameters[-1])
        except NotConvergedError:  # a change this small makes training overflow
            self.diverged = True
            return time.perf_counter() - start
        self._ends = torch.cat(kept)
        self.weights = torch.cat([self.weights.to(rows), rows])
        return time.perf_counter() - start

    def changes(self, question: Question, asked: tuple) -> Tensor:
        """``(Q, R)``: q after each run minus q at the trained parameters.

        Args:
            question: what is asked.
            asked: the same as queries, target and aggregate.
        """
        full = self.pipeline.trained()[-1]
        queries, target, aggregate = asked
        after = Retrained(self.pipeline, [self._ends], []).evaluate(
            queries, target, aggregate=aggregate
        )
        with torch.no_grad():
            before = question.answer(question.values(self.pipeline.objective(-1), full))
        return after - before[:, None]

    def trust(self, values: Tensor, question: Question, asked: tuple, spent: tuple) -> Trust | None:
        """The figure for scores ``(Q, m)``; None where they are all zero.

        Args:
            values: the scores.
            question, asked: as in `changes`.
            spent: seconds of the runs, and of the scores.
        """
        share = spent[0] / max(spent[1], 1e-9)
        runs = max(1, len(self.weights))
        about = runs, self.kind, spent[0], share
        if self.diverged:
            return Trust(0.0, 0.0, 0.0, *about)
        spread = (self.variance * values.var(1, correction=0)).sqrt()
        some = spread > 0
        if not bool(some.any()):
            return None
        predicted = values @ (self.weights.to(values) - 1).T
        actual = self.changes(question, asked)
        if not bool(torch.isfinite(actual).all()):
            return Trust(0.0, 0.0, 0.0, *about)
        if self.kind == "groups" and runs > 1:  # what every group has in common is no agreement
            predicted, actual = (x - x.mean(1, keepdim=True) for x in (predicted, actual))
        scale = spread[some, None]
        return Trust(*estimate(predicted[some] / scale, actual[some] / scale), *about)


def width(runs: int) -> float:
    """Half the width of a 90 % interval on the scale of ``log(noise / signal)``."""
    return WIDTH * math.sqrt(max(1.0, 4 / runs))


def estimate(predicted: Tensor, actual: Tensor) -> tuple[float, float, float]:
    """r over random removals from a few runs, and the interval around it.

    With effects ``a = p + e``, where e has nothing to do with p, ``r = 1 / √(1 + ρ²)`` with
    ``ρ² = Var e / Var p``. A few runs would say little of each query, so ρ comes from the cosine of
    a and p over all queries and runs, and log ρ is put right by what real removals in
    ``bench_trust.py`` made of it.

    Args:
        predicted, actual: changes of each query in each run, ``(Q, R)``, in units of the standard
            deviation of its predicted effects.

    Returns:
        r, low, high.
    """
    p, a = predicted.double(), actual.double()
    cosine = float((a * p).sum() / (a.norm() * p.norm()).clamp(min=1e-30))
    ratio = math.sqrt(max(max(cosine, 0.1) ** -2 - 1, 1e-6))
    runs = p.shape[1]
    level, power, _ = calibrated(runs)
    log_rho, wide = level + power * math.log(ratio), width(runs)
    r, low, high = (
        (1 + math.exp(2 * log)) ** -0.5 for log in (log_rho, log_rho + wide, log_rho - wide)
    )
    return r, low, high


def measured_trust(
    reruns: Reruns,
    count: int | None,
    values: Tensor,
    question: Question,
    asked: tuple,
    spent: float,
    growth: str = "",
    progress: bool = False,
) -> Trust | None:
    """`Reruns.trust` of scores with as many runs as asked for, and a warning where it is low.

    Args:
        reruns: those so far.
        count: how many there should be; None: by the number of queries.
        values, question, asked: as in `Reruns.trust`.
        spent: seconds that the scores took.
        growth: what else is known to be wrong with the run, in words.
        progress: show a bar where it takes longer.
    """
    seconds = reruns.grow(run_count(count, len(values)), progress)
    trust = reruns.trust(values, question, asked, (seconds, spent))
    if trust is not None and trust.warns:
        also = f" ({growth})" if growth else ""
        warnings.warn(
            f"these scores will predict removals badly: {trust}{also}. {REMEDIES}",
            UnsmoothTrainingWarning,
            stacklevel=4,
        )
    return trust
