"""How predicted effects agree with actual ones: per query, over seeds, and by method."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy
import torch
from torch import Tensor

from ..arguments import (
    check_choice,
    check_instance,
    check_seed,
    check_whole,
    listed,
    shown,
)
from ..influence.result import AboutTarget, Influence
from ..pipeline.origin import difference, share_runs
from .removals import Effects, EffectsOverSeeds

__all__ = [
    "Agreement",
    "Noise",
    "agreement",
    "compare_methods",
    "precision_recall",
    "method_table",
    "noise_ceiling",
]

# name in code: name in tables
STATISTICS = {
    "r": "Pearson r",
    "rho": "Spearman",
    "slope": "slope actual / predicted",
    "sign": "sign rate",
    "magnitude": "Spearman of |effects|",
}
CEILING = "another seed"


@dataclass
class Noise:
    """What the randomness of training leaves of an `Agreement` with effects over seeds.

    With the reliability ρ of one seed's effects, means of S and of F other seeds correlate by
    ``√(SF) ρ / √((1 + (S − 1)ρ)(1 + (F − 1)ρ))``, and a mean of F with that of all seeds by
    ``√(Fρ / (1 + (F − 1)ρ))`` (Spearman and Brown).

    Attributes:
        reliability: ρ, correlation of one seed's actual effects with another's, mean over queries.
        seeds: S of the scores, F of the effects.
        ceiling: the r that S retrainings of every removal reach: measured where they were given,
            else estimated from ρ.
        measured: whether it was.
        efficiency: score efficiency, r of the scores ÷ ``ceiling``.
        corrected: r with the mean of infinitely many seeds, from the r with the mean of F.
        intervals: bootstrap 95 % intervals of ``efficiency`` and ``corrected``, over queries; NaN
            where the reliability is too low to know them.
    """

    reliability: float
    seeds: tuple[int, int]
    ceiling: float
    measured: bool
    efficiency: float
    corrected: float
    intervals: dict[str, tuple[float, float]]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """As the rows of `Agreement`: name, value, interval, and nothing pooled."""
        ours, truth = self.seeds
        means = f"{ours} retraining{'s' if ours > 1 else ''}"
        spans = {
            name: "not known" if numpy.isnan(low) else f"{low:.3f} – {high:.3f}"
            for name, (low, high) in self.intervals.items()
        }
        return [
            (f"r of {means}", f"{self.ceiling:.3f}", "measured" if self.measured else "est.", ""),
            ("score efficiency", f"{self.efficiency:.3f}", spans["efficiency"], ""),
            (f"r, noise of {truth} out", f"{self.corrected:.3f}", spans["corrected"], ""),
        ]


@dataclass
class Agreement(AboutTarget):
    """How predictions of removal agree with retraining, per query.

    Attributes:
        predicted, actual: ``(Q, R)`` changes of q.
        r, rho, slope: ``(Q,)`` Pearson, Spearman (its mean is the LDS when the removals are random
            subsets), and slope of actual on predicted (1: the units are right); NaN for a query
            without variation.
        sign: ``(Q,)`` share of removals whose effect has the predicted sign.
        magnitude: ``(Q,)`` Spearman of ``|predicted|`` and ``|actual|``, the only statistic that is
            fair to unsigned scores.
        pooled: the same five over all pairs of query and removal.
        intervals: bootstrap 95 % interval of each mean over queries.
        query_ids: identities of the queries ``(Q,)``.
        target: what q is.
        noise: where the effects are over several seeds, what the noise of training leaves of r;
            None where the scores share seeds with them, for then they share noise.
    """

    predicted: numpy.ndarray
    actual: numpy.ndarray
    r: numpy.ndarray
    rho: numpy.ndarray
    slope: numpy.ndarray
    sign: numpy.ndarray
    magnitude: numpy.ndarray
    pooled: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    query_ids: numpy.ndarray
    target: str = "loss"
    noise: Noise | None = None

    def mean(self, statistic: str = "r") -> float:
        """Mean over queries of ``"r"``, ``"rho"``, ``"slope"``, ``"sign"`` or ``"magnitude"``."""
        check_choice("statistic", statistic, STATISTICS)
        return float(numpy.nanmean(getattr(self, statistic)))

    def to_frame(self):
        """One row per query: id and the five statistics."""
        import pandas

        return pandas.DataFrame(
            {"query_id": self.query_ids} | {name: getattr(self, name) for name in STATISTICS}
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Name, mean, interval and pooled value of each statistic that is printed."""
        rows = []
        for name, label in STATISTICS.items():
            if name == "magnitude":  # of interest only for unsigned scores
                continue
            low, high = self.intervals[name]
            interval = f"{low:.3f} – {high:.3f}"
            rows.append((label, f"{self.mean(name):.3f}", interval, f"{self.pooled[name]:.3f}"))
        return rows + (self.noise.rows() if self.noise else [])

    def __str__(self) -> str:
        queries, removals = self.actual.shape
        lines = [
            f"{queries} queries × {removals} removals; "
            "mean per query, 95 % interval over queries, pooled"
        ]
        for label, mean, interval, pooled in self._rows():
            lines.append(f"  {label:<25} {mean:>7}  ({interval})  {pooled:>7}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>mean per query</th><th>95 % interval</th><th>pooled</th></tr>"
        body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in self._rows())
        queries, removals = self.actual.shape
        caption = f"<caption>{queries} queries × {removals} removals</caption>"
        return f"<table style='white-space: nowrap'>{caption}{head}{body}</table>"


def agreement(
    scores: Influence,
    effects: Effects,
    *,
    retrained: EffectsOverSeeds | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Compare predicted removal effects with actual ones, query by query.

    Effects over seeds that the scores have not seen tell how well the scores predict the average
    run, and, since the effects are noisy themselves, how far from perfect that is: `Noise`.

    Args:
        scores: predictions; the change for a group is ``−Σ`` of its scores.
        effects: the ground truth for the same queries, stage and target.
        retrained: effects of the same removals under the scores' own seeds, what the scores stand
            in for; default: what they would reach is estimated.
        resamples, seed: of the bootstrap over queries.

    Raises:
        ValueError: scores and effects are of different queries, stages or targets, or fewer than 3
            removals.

    Warns:
        UserWarning: queries whose predictions or effects do not vary, left out of the means.
    """
    check_instance("scores", scores, Influence, "as an attributor's score(queries) gives them")
    check_instance("effects", effects, Effects, "as removal_effects gives them")
    _check_bootstrap(resamples, seed)
    predicted, actual = _pairs(scores, effects)
    ids = effects.query_ids.numpy()
    report = compare(predicted, actual, ids, resamples=resamples, seed=seed)
    noise, several = None, isinstance(effects, EffectsOverSeeds) and len(effects.seeds) > 1
    if several and not share_runs(scores.origin, effects.origin):
        own = None if retrained is None else _pairs(scores, retrained)[1]
        count = len(getattr(scores, "seeds", ())) or 1
        noise = _noise(report.r, effects, count, own, resamples, seed)
    return replace(report, target=scores.target, noise=noise)


def _noise(r, effects: EffectsOverSeeds, count: int, own, resamples: int, seed: int) -> Noise:
    """`Noise` of the scores' correlations ``r`` (Q,) with ``effects``; ``own``: S retrainings."""
    truth = len(effects.seeds)
    rho = effects.reliability.numpy()
    measured = row_correlations(own, effects.values.numpy()) if own is not None else rho
    known = ~(numpy.isnan(r) | numpy.isnan(rho) | numpy.isnan(measured))
    rows = numpy.array([r, rho, measured])[:, known]
    if not known.any():
        raise ValueError("no query's effects vary under each seed, so their noise is not known")

    def found(means):  # mean r, reliability and r of retraining → ceiling, efficiency, corrected
        # without reliability nobody knows what retraining would reach
        share = numpy.where(means[1] > 0, numpy.minimum(means[1], 1.0), numpy.nan)
        others = [n * share / (1 + (n - 1) * share) for n in (count, truth)]
        ceiling = means[2] if own is not None else numpy.sqrt(others[0] * others[1])
        return numpy.array([ceiling, means[0] / ceiling, means[0] / numpy.sqrt(others[1])])

    draws = numpy.random.default_rng(seed).integers(rows.shape[1], size=(resamples, rows.shape[1]))
    drawn = found(rows[:, draws].mean(2))
    ends = numpy.nanpercentile if numpy.isnan(drawn).mean() <= 0.01 else numpy.percentile
    spread = ends(drawn, [2.5, 97.5], axis=1).T
    ceiling, efficiency, corrected = found(rows.mean(1)).tolist()
    intervals = {
        name: tuple(spread[i].tolist()) for i, name in ((1, "efficiency"), (2, "corrected"))
    }
    return Noise(
        float(rows[1].mean()),
        (count, truth),
        ceiling,
        own is not None,
        efficiency,
        corrected,
        intervals,
    )


def _check_bootstrap(resamples: int, seed: int) -> None:
    check_whole("resamples", resamples)
    check_seed("seed", seed, least=0)


def _runs(name: str, given, kind: type) -> dict[object, list]:
    """Results by name, a list of one or more for each: one for each seed.

    Raises:
        TypeError, ValueError: no mapping, an empty one, or something else in it.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name}={shown(given)} must be a dictionary: by name one {kind.__name__}, or a list "
            "of them, one for each seed"
        )
    if not given:
        raise ValueError(f"{name} is empty; give at least one {kind.__name__} by name")
    found = {}
    for key, value in given.items():
        what = f"one {kind.__name__}, or a list of them, one for each seed"
        runs = [value] if isinstance(value, kind) else listed(f"{name}[{key!r}]", value, what)
        if not runs or not all(isinstance(run, kind) for run in runs):
            raise TypeError(f"{name}[{key!r}]={shown(value)} must be {what}")
        found[key] = runs
    return found


def _pairs(scores: Influence, effects: Effects) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Predicted and actual changes ``(Q, R)`` of the same queries and removals."""
    if not torch.equal(scores.query_ids, effects.query_ids) or _differ(scores, effects):
        raise ValueError(
            "scores and effects are of different queries; compute both on the same Examples, and "
            "name them in effects of your own: Effects.from_values(..., like=scores)"
        )
    if (scores.stage, scores.target) != (effects.stage, effects.target):
        raise ValueError(
            f"scores are of stage {scores.stage!r} on {scores.target}, effects of "
            f"{effects.stage!r} on {effects.target}"
        )
    if differ := difference(scores.origin, effects.origin):
        raise ValueError(
            f"scores and effects are of different {differ}; compute both from one pipeline and the "
            "same queries and target"
        )
    if len(effects.subsets) < 3:
        raise ValueError(
            f"{len(effects.subsets)} removals are too few to correlate; at least 3 are needed"
        )
    predicted = torch.stack([scores.removal_effect(group) for group in effects.subsets], 1)
    return predicted.detach().cpu().double().numpy(), effects.values.double().numpy()


def _differ(left: Influence | Effects, right: Influence | Effects) -> bool:
    """Whether two rows are of different aggregates, as far as both say of which."""
    return bool(left.aggregate and right.aggregate) and left.aggregate != right.aggregate


def compare(
    predicted, actual, query_ids=None, *, resamples: int = 2000, seed: int = 0
) -> Agreement:
    """`agreement` of two ``(Q, R)`` arrays of predicted and actual changes."""
    predicted = numpy.asarray(predicted, float)
    actual = numpy.asarray(actual, float)
    for name, values in (("predictions", predicted), ("effects", actual)):
        if not numpy.isfinite(values).all():
            first = numpy.argwhere(~numpy.isfinite(values))[0]
            raise ValueError(f"{name} hold NaN or inf, first at (query, removal) {first}")
    per_query = numpy.array([_statistics(p, a) for p, a in zip(predicted, actual, strict=True)])
    undefined = int(numpy.isnan(per_query[:, 0]).sum())
    if undefined == len(per_query):
        raise ValueError(
            "no query has predictions and effects that vary, so nothing can be correlated"
        )
    if undefined:
        warnings.warn(
            f"{undefined} of {len(per_query)} queries do not vary and are left out of the means",
            stacklevel=2,
        )
    pooled = _statistics(predicted.ravel(), actual.ravel())
    intervals = _intervals(per_query[None], resamples, seed)
    return Agreement(
        predicted,
        actual,
        *per_query.T,
        pooled=dict(zip(STATISTICS, pooled, strict=True)),
        intervals=dict(zip(STATISTICS, intervals, strict=True)),
        query_ids=numpy.arange(len(actual)) if query_ids is None else query_ids,
    )


def _statistics(predicted, actual) -> tuple[float, ...]:
    """The five `STATISTICS` of one row of changes; NaN where they are not defined."""
    from scipy import stats  # takes half a second, so only when it is needed

    if numpy.ptp(predicted) == 0 or numpy.ptp(actual) == 0:
        return (float("nan"),) * len(STATISTICS)
    r = float(stats.pearsonr(predicted, actual).statistic)
    rho = float(stats.spearmanr(predicted, actual).statistic)
    slope = r * float(actual.std() / predicted.std())
    sign = magnitude = float("nan")
    signed = (predicted != 0) & (actual != 0)
    if signed.any():
        sign = float(((predicted > 0) == (actual > 0))[signed].mean())
    sizes = [abs(predicted), abs(actual)]
    if all(numpy.ptp(size) > 0 for size in sizes):
        magnitude = float(stats.spearmanr(*sizes).statistic)
    return r, rho, slope, sign, magnitude


def row_ranks(values) -> numpy.ndarray:
    """Ranks within each row of ``(Q, R)`` values, ties at their mean."""
    from scipy.stats import rankdata

    return rankdata(numpy.asarray(values, float), axis=1)


def row_correlations(a, b) -> numpy.ndarray:
    """Pearson r of each row of ``a`` with the same row of ``b``; of `row_ranks` it is Spearman's.

    Two statistics of `Agreement` for all queries at once, fast enough for a slider.

    Args:
        a, b: ``(Q, R)`` each.

    Returns:
        ``(Q,)``; NaN for a row that does not vary.

    Raises:
        ValueError: different shapes.
    """
    a = numpy.asarray(a, float)
    b = numpy.asarray(b, float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a {a.shape} and b {b.shape} must be two arrays of the same (Q, R)")
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    sizes = numpy.sqrt((a * a).sum(1) * (b * b).sum(1))
    return numpy.divide((a * b).sum(1), sizes, out=numpy.full(len(a), numpy.nan), where=sizes > 0)


def _intervals(values: numpy.ndarray, resamples: int, seed: int) -> list[tuple[float, float]]:
    """Bootstrap 95 % intervals of the mean over runs and queries of ``values`` (S, Q, statistics).

    Queries are redrawn, the same ones for every run; several runs are redrawn too, so that the
    interval allows for another set of queries *and* other seeds.
    """
    values = values[:, ~numpy.isnan(values).all((0, 2))]
    runs, queries, _ = values.shape
    rng = numpy.random.default_rng(seed)
    # How often each run (resamples, S) and each query (resamples, Q) is drawn; a single run always.
    by_run = rng.multinomial(runs, numpy.full(runs, 1 / runs), resamples).astype(float)
    by_query = rng.multinomial(queries, numpy.full(queries, 1 / queries), resamples).astype(float)
    known = ~numpy.isnan(values)

    def total(x):  # (S, Q, statistics) → (resamples, statistics)
        return numpy.einsum("rq,rqk->rk", by_query, numpy.tensordot(by_run, x, 1))

    count = total(known.astype(float))
    sums = total(numpy.where(known, values, 0.0))
    means = numpy.divide(sums, count, out=numpy.full_like(sums, numpy.nan), where=count > 0)
    return [tuple(map(float, pair)) for pair in numpy.percentile(means, [2.5, 97.5], axis=0).T]


def _mean(values: numpy.ndarray) -> numpy.ndarray:
    """Mean over runs and queries without NaN; NaN, without NumPy's warning, if none are left."""
    count = (~numpy.isnan(values)).sum((0, 1))
    return numpy.where(count > 0, numpy.nansum(values, (0, 1)) / numpy.maximum(count, 1), numpy.nan)


def compare_methods(
    scores: Mapping[str, Influence | Sequence[Influence]],
    effects: Mapping[str, Effects | Sequence[Effects]],
    *,
    resamples: int = 2000,
    seed: int = 0,
):
    """One table of every method's agreement with every kind of removal, over one or more seeds.

    Args:
        scores: by the name of the method; one `Influence`, or one for each seed.
        effects: by the name of the removals (``"one"``, ``"10 %"``), one for each seed.
            Scores for one kind of removal only are named ``(method, removals)``.
        resamples, seed: of the bootstrap, over queries and seeds together.

    Returns:
        tidy pandas table: removals, method, statistic, mean, low, high; ``mean`` over queries and
        seeds, ``low`` and ``high`` its 95 % interval. Statistics as in `Agreement`.

    Raises:
        ValueError: as `agreement`; or different numbers of seeds.
    """
    _check_bootstrap(resamples, seed)
    by_method, by_removals = _runs("scores", scores, Influence), _runs("effects", effects, Effects)
    rows = []
    for removals, truth in by_removals.items():
        for name, given in by_method.items():
            method, only = name if isinstance(name, tuple) else (name, removals)
            if only != removals:
                continue
            if len(given) != len(truth):
                raise ValueError(
                    f"{method!r} has scores of {len(given)} seeds, {removals!r} effects of "
                    f"{len(truth)}"
                )
            pairs = [_pairs(s, e) for s, e in zip(given, truth, strict=True)]
            rows += _rows(removals, method, pairs, resamples, seed)
    return _frame(rows)


def noise_ceiling(
    effects: Mapping[str, Sequence[Effects]], *, resamples: int = 2000, seed: int = 0
):
    """How well retraining under one seed predicts retraining under another.

    No method that ignores the seed can be expected to agree better.

    Args:
        effects: by the name of the removals, one for each of two or more seeds: same data, queries
            and subsets.
        resamples, seed: of the bootstrap.

    Returns:
        rows for the table of `compare_methods`, as method ``"another seed"``; every ordered pair of
        seeds counts.

    Raises:
        ValueError: fewer than two seeds, or other queries or subsets.
    """
    _check_bootstrap(resamples, seed)
    rows = []
    for removals, runs in _runs("effects", effects, Effects).items():
        if len(runs) < 2:
            raise ValueError(
                f"{removals!r}: effects of at least two seeds are needed to compare them"
            )
        first = runs[0]
        for run in runs:
            other = not torch.equal(run.query_ids, first.query_ids) or _differ(run, first)
            if run.subsets != first.subsets or other:
                raise ValueError(
                    f"{removals!r}: the seeds removed different examples or asked different queries"
                )
        pairs = permutations([run.values.double().numpy() for run in runs], 2)
        rows += _rows(removals, CEILING, pairs, resamples, seed)
    return _frame(rows)


def method_table(table, statistic: str = "r", columns: str = "removals"):
    """The table of `compare_methods` for reading: methods by kinds of removal.

    Args:
        table: its rows, perhaps of several settings or links, with a column that says which.
        statistic: which one to show, each cell as ``mean [low, high]``.
        columns: name of the column to spread out, or a list of names.
    """
    check_table(table)
    known = isinstance(statistic, str) and statistic in set(table["statistic"])
    if not known:
        raise ValueError(
            f"statistic={shown(statistic)} is none of {sorted(set(table['statistic']))}"
        )
    some = table[table["statistic"] == statistic]
    for column in [columns] if isinstance(columns, str) else listed("columns", columns, "names"):
        if column not in table:
            raise ValueError(f"columns={shown(columns)} must be of {list(table)}")
    numbers = zip(some["mean"], some["low"], some["high"], strict=True)
    # non-breaking spaces keep each cell on one line
    cells = [f"{m:.2f}\u00a0[{low:.2f},\u00a0{high:.2f}]" for m, low, high in numbers]
    cells = some.assign(cell=cells)
    return cells.pivot_table("cell", "method", columns, aggfunc="first", sort=False).fillna("")


def check_table(table) -> None:
    """Refuse what is no table of `compare_methods`.

    Raises:
        TypeError: it lacks columns, or is no table.
    """
    needed = {"removals", "method", "statistic", "mean", "low", "high"}
    if not needed <= set(getattr(table, "columns", ())):
        raise TypeError(f"table={shown(table)} must be a table of compare_methods, with {needed}")


def _rows(removals: str, method: str, pairs, resamples: int, seed: int) -> list[tuple]:
    """Rows of a table: every statistic of one method, from predicted and actual changes per run."""
    tables = [compare(*pair, resamples=1).to_frame()[list(STATISTICS)] for pair in pairs]
    values = numpy.array([table.to_numpy() for table in tables])
    means = _mean(values)
    spans = _intervals(values, resamples, seed)
    return [
        (removals, method, name, float(mean), *span)
        for name, mean, span in zip(STATISTICS, means, spans, strict=True)
    ]


def _frame(rows: list[tuple]):
    import pandas

    return pandas.DataFrame(
        rows, columns=["removals", "method", "statistic", "mean", "low", "high"]
    )


def precision_recall(order: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of flagging the first 1, 2, ... N of a ranking, ``(N,)`` each.

    Args:
        order: all N positions, the most suspicious first.
        truth: ``(N,)`` mask of the examples that should be found.

    Raises:
        ValueError: not every example is ranked once, or there is nothing to find.

    >>> precision_recall(torch.tensor([2, 0, 1]), torch.tensor([False, True, True]))
    (tensor([1.0000, 0.5000, 0.6667]), tensor([0.5000, 0.5000, 1.0000]))
    """
    order = torch.as_tensor(order).cpu()
    truth = torch.as_tensor(truth).cpu()
    if truth.dtype != torch.bool or truth.ndim != 1 or not bool(truth.any()):
        raise ValueError(
            f"truth is {truth.dtype} of shape {tuple(truth.shape)}: a mask with something to find "
            "is needed"
        )
    if not torch.equal(order.sort().values, torch.arange(len(truth))):
        raise ValueError(
            f"order of shape {tuple(order.shape)} must rank the {len(truth)} examples, each once"
        )
    found = truth[order].cumsum(0).to(torch.get_default_dtype())
    return found / torch.arange(1, len(truth) + 1), found / int(truth.sum())
