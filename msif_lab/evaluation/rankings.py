"""Rankings of examples to act on: what they detect, how stable they are, what to expect of them.

A ranking is one number for each example, larger first: the example to be suspected, or acted on,
before others. An `Influence` becomes one by the sign rule of `Influence.harm_sign`: its most
harmful example on the mean query comes first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy
import torch
from torch import Tensor

from ..arguments import (
    check_instance,
    check_number,
    check_seed,
    check_whole,
    is_number,
    listed,
    numbers_of,
    shown,
)
from ..data.examples import Examples, Inputs
from ..influence.averaged import InfluenceOverSeeds, averages
from ..influence.baselines import (
    Baseline,
    Entropy,
    GradientDot,
    GradientNorm,
    Loss,
    Margin,
    RepresentationSimilarity,
    SelfInfluence,
)
from ..influence.ensembles import trak
from ..influence.result import Influence
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import MiniBatch, progress_bar
from ..pipeline.seeds import SeedRuns, redrawn_stage
from .comparison import precision_recall

__all__ = [
    "Detection",
    "bootstrap_scores",
    "controls",
    "detection",
    "out_of_fold",
    "predicted_gain",
    "stability",
]

RANKING = "an Influence, or one number for each example (N,), larger first"
BASELINES = {
    "loss": Loss,
    "margin": Margin,
    "entropy": Entropy,
    "gradient norm": GradientNorm,
    "self-influence": SelfInfluence,
    "similarity": RepresentationSimilarity,
    "gradient dot": GradientDot,
}
CONTROLS = ("random", *BASELINES, "TRAK", "loss, out of fold", "cleanlab", "oracle")
BY_CLASS = {"margin", "entropy", "TRAK", "loss, out of fold", "cleanlab"}


def ranking_of(name: str, given, data: Examples | None = None, stage: str = "") -> Tensor:
    """A ranking ``(N,)`` in float64, larger first; ``name`` is what messages call it.

    Args:
        name: of the argument.
        given: an `Influence` or numbers.
        data: the examples that it must rank; default any.
        stage: whose they are.

    Raises:
        ValueError, TypeError: it is none, NaN, or of other examples.
    """
    if isinstance(given, Influence):
        other = data is not None and not torch.equal(given.ids, data.ids)
        if other or (stage and given.stage and given.stage != stage):
            raise ValueError(
                f"{name} ranks {len(given.ids)} examples of stage {given.stage!r}, but the "
                f"examples acted on are the {len(data)} of stage {stage!r}, with other ids or name"
            )
        values = given.harm_sign * given.mean().values[0]
    else:
        values = numbers_of(name, given, RANKING)
    values = values.detach().cpu().double()
    if values.ndim != 1 or not len(values) or (data is not None and len(values) != len(data)):
        count = "(N,)" if data is None else f"({len(data)},)"
        raise ValueError(
            f"{name}={shown(given)} must be one number for each example, {count}; of several "
            "queries give an Influence, or its mean"
        )
    if bool(torch.isnan(values).any()):
        first = int(values.isnan().nonzero()[0])
        raise ValueError(f"{name} holds nan, first at {first}; every example needs a number")
    return values


def ordered(values: Tensor) -> Tensor:
    """All positions ``(N,)``, the first to be acted on first; ties in the order of the data."""
    return values.argsort(descending=True, stable=True)


def weighted(order: Tensor, k: int, weight: float | Tensor) -> Tensor:
    """Example weights ``(N,)``: ``weight`` for the first k of an order, one for all others."""
    weights = torch.ones(len(order), dtype=torch.float64)
    first = order[:k]
    weights[first] = weight[first] if isinstance(weight, Tensor) else float(weight)
    return weights


def fractions_of(given, m: int, below: float = 1.0) -> list[float]:
    """One or several shares of m examples, each of at least one example.

    Raises:
        ValueError: another number, or two of one size.
    """
    fractions = [given] if is_number(given) else listed("fraction", given, "a share, or several")
    text = f"a share above 0 and up to {below:g} that gives one or more of {m} examples"
    for fraction in fractions:
        check_number("fraction", fraction, lambda f: 0 < f <= below and round(f * m) > 0, text)
    if not fractions or len({round(f * m) for f in fractions}) != len(fractions):
        raise ValueError(f"fraction={shown(given)} must be one or more, of different size")
    return [float(f) for f in fractions]


# ---- What a ranking detects ----


@dataclass
class Detection:
    """How well a ranking finds the examples of a known truth.

    Attributes:
        precision, recall: ``(N,)`` of flagging the first 1, 2, ... N.
        k: how many are flagged for ``precision_at_k``.
        truths: how many there are to find.
        precision_at_k: share of the first k that are to be found; by chance ``truths / N``.
        roc_auc: chance that one to be found is ranked before another one; 0.5 by chance.
        pr_auc: average precision, area under precision over recall; by chance ``truths / N``.
        intervals: bootstrap 95 % interval of each of the three.
    """

    precision: Tensor
    recall: Tensor
    k: int
    truths: int
    precision_at_k: float
    roc_auc: float
    pr_auc: float
    intervals: dict[str, tuple[float, float]]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        base = self.truths / len(self.precision)
        names = {
            "precision_at_k": (f"precision at {self.k}", base),
            "roc_auc": ("ROC AUC", 0.5),
            "pr_auc": ("PR AUC", base),
        }
        rows = []
        for name, (label, chance) in names.items():
            low, high = self.intervals[name]
            value = f"{getattr(self, name):.3f}"
            rows.append((label, value, f"{low:.3f} – {high:.3f}", f"{chance:.3f}"))
        return rows

    def __str__(self) -> str:
        lines = [f"{self.truths} to find among {len(self.precision)}; 95 % interval, by chance"]
        lines += [f"  {n:<18} {v:>6}  ({i})  {c:>6}" for n, v, i, c in self._rows()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th></th><th>95 % interval</th><th>by chance</th></tr>"
        body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in self._rows())
        caption = f"<caption>{self.truths} to find among {len(self.precision)}</caption>"
        return f"<table style='white-space: nowrap'>{caption}{head}{body}</table>"


def detection(scores, truth, *, k: int | None = None, resamples=1000, seed: int = 0) -> Detection:
    """How well a ranking finds examples known to be bad, such as wrong labels.

    That is another question than what removing them brings, which `intervene` answers.

    Args:
        scores: an `Influence`, whose most harmful examples on the mean query are suspected first,
            or one number for each example ``(N,)``, larger is more suspicious.
        truth: which are to be found: a mask ``(N,)``, or positions.
        k: how many are flagged for precision at k; default as many as there are to find.
        resamples, seed: of the bootstrap over examples, which draws as many of either kind as
            there are.

    Raises:
        ValueError, TypeError: no ranking, or a truth without examples of both kinds.

    >>> detection([3.0, 0.1, 2.0, 0.3], [True, False, False, True]).roc_auc
    0.75
    """
    values = ranking_of("scores", scores)
    mask = mask_of("truth", truth, len(values))
    truths = int(mask.sum())
    if truths == len(mask):
        raise ValueError(f"truth marks all {truths} examples, so none can be ranked after them")
    k = check_whole("k", k, most=len(mask), why="the examples", none="as many as truth") or truths
    check_whole("resamples", resamples)
    rng = numpy.random.default_rng(check_seed("seed", seed, least=0))
    x, y = values.numpy(), mask.numpy()
    order = numpy.argsort(-x, kind="stable")
    x, y, times = x[order], y[order], numpy.empty(len(x))
    draws = []
    for _ in range(resamples):  # how often each example is drawn
        for kind in (y, ~y):
            count = int(kind.sum())
            times[kind] = rng.multinomial(count, numpy.full(count, 1 / count))
        draws.append(_detected(x, y, times, k))
    spans = numpy.percentile(draws, [2.5, 97.5], axis=0).T.tolist()
    names = ("precision_at_k", "roc_auc", "pr_auc")
    intervals = {name: tuple(span) for name, span in zip(names, spans, strict=True)}
    curves = precision_recall(ordered(values), mask)
    return Detection(*curves, k, truths, *_detected(x, y, numpy.ones(len(x)), k), intervals)


def _detected(scores, truth, times, k: int) -> tuple[float, float, float]:
    """Precision at k, ROC AUC and PR AUC of falling scores, each counted so many times.

    As scikit-learn's ``roc_auc_score`` and ``average_precision_score`` with ``sample_weight``,
    which check and sort their arguments anew at each of a bootstrap's thousand calls.
    """
    last = numpy.append(scores[1:] != scores[:-1], True)  # ties are flagged together
    flagged, found = times.cumsum(), (times * truth).cumsum()
    precision = numpy.interp(k, numpy.append(0, flagged), numpy.append(0, found)) / k
    flagged, found = (numpy.append(0, part[last]) for part in (flagged, found))
    wrong, steps = flagged - found, numpy.diff(found)
    area = (numpy.diff(wrong) * (found[1:] + found[:-1])).sum() / (2 * wrong[-1] * found[-1])
    shares = numpy.divide(found, flagged, out=numpy.zeros_like(found), where=flagged > 0)
    return float(precision), float(area), float((steps * shares[1:]).sum() / found[-1])


def mask_of(name: str, given, count: int) -> Tensor:
    """A mask ``(N,)`` that marks something, from a mask or positions.

    Raises:
        ValueError, TypeError: something else.
    """
    values = numbers_of(name, given, f"a mask ({count},), or positions").cpu()
    if values.dtype == torch.bool and values.shape == (count,) and bool(values.any()):
        return values
    whole = not values.is_floating_point() and values.dtype != torch.bool and values.ndim == 1
    if not whole or not len(values) or int(values.min()) < 0 or int(values.max()) >= count:
        raise ValueError(
            f"{name}={shown(given)} must mark one or more of {count} examples: a mask ({count},) "
            f"of booleans, or positions between 0 and {count - 1}"
        )
    return torch.zeros(count, dtype=torch.bool).index_fill(0, values.long(), True)


# ---- What to expect before anything is retrained ----


def cross_fitted(
    scores: InfluenceOverSeeds, act: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """First-order change of the mean query by an action on the ranking, and its standard error.

    Each seed's scores judge what the other seeds' average has chosen, so that the noise that
    brought an example to the top does not count as its effect. Since every seed both judges and
    chooses, these judgements are not independent. The error is the jackknife's over seeds, which
    is never too small on average (Efron & Stein 1981); NaN for two seeds.

    Args:
        scores: of two or more seeds.
        act: from an order ``(N,)`` of positions to the example weights ``(N,)`` of the action.
    """
    rows = scores.mean().per_seed.detach().cpu().double()  # (S, 1, N)

    def judged(places: Sequence[int]) -> float:
        total = 0.0
        for s in places:
            others = [i for i in places if i != s]
            trust = [scores.run_trust[i] for i in others] if scores.run_trust else ()
            rest = scores.harm_sign * averages(rows[others], scores.average, trust)[0][0]
            total += float((act(ordered(rest)) - 1) @ rows[s, 0])
        return total / len(places)

    count = len(rows)
    if count < 3:
        return judged(range(count)), float("nan")
    left = torch.tensor([judged([i for i in range(count) if i != s]) for s in range(count)])
    error = ((count - 1) / count * (left - left.mean()).square().sum()).sqrt()
    return judged(range(count)), float(error)


def predicted_gain(
    scores: InfluenceOverSeeds, fraction: float | Sequence[float] = (0.05, 0.1, 0.2), *, losses=None
):
    """What removing the most harmful examples will bring, to first order, and whether it will show.

    ``gain = Σ_{i chosen} s̄_i``, in the unit of q. Summed over the examples that the scores
    themselves rank first it is too large, since noise helps an example to the top (winner's curse):
    that is ``gain_in_sample``. ``gain`` lets each seed judge what all others have chosen; its
    standard error is a jackknife over seeds (`cross_fitted`), rather too large than too small. A
    removal promises something where ``gain`` is several standard errors above zero, and shows in a
    single run where it also exceeds the spread of the loss from seed to seed. It is the gain on
    the queries, which other examples of their task share in part, and first order knows nothing of
    what the removed examples do together.

    Args:
        scores: of two or more seeds, of three or more for the error, as `AveragedInfluence` gives
            them, best of ``aggregate="mean"``.
        fraction: of the examples to be removed, one share or several.
        losses: ``(S,)`` mean validation loss of each run, for the spread over seeds:
            ``runs.evaluate(validation, aggregate="mean")``.

    Returns:
        a pandas table, a row for each fraction: fraction, count, gain_in_sample, gain,
        standard_error, gain_to_error; with ``losses`` also spread and gain_to_spread.

    Raises:
        ValueError, TypeError: scores of a single seed, a fraction that is none, losses that are no
            numbers.

    >>> per_seed = torch.tensor([[[3.0, -1.0, 0.0, 0.2]], [[1.0, -1.0, 0.0, 2.2]]])
    >>> about = torch.arange(4), torch.tensor([-1]), "pretrain", "loss", "", "mean"
    >>> scores = InfluenceOverSeeds.of(per_seed, (0, 1), "mean", *about, origin={})
    >>> predicted_gain(scores, 0.25)[["gain_in_sample", "gain"]].round(2).to_numpy().tolist()
    [[2.0, 0.6]]
    """
    import pandas

    check_instance("scores", scores, InfluenceOverSeeds, "as AveragedInfluence gives them")
    m = len(scores.ids)
    if len(scores.seeds) < 2:
        raise ValueError("scores are of one seed; how sure they are takes two or more seeds")
    spread = None
    if losses is not None:
        found = numbers_of("losses", losses, "one mean validation loss for each run, (S,)")
        found = found.cpu().double().reshape(-1)
        if len(found) < 2 or not bool(torch.isfinite(found).all()):
            raise ValueError(f"losses={shown(losses)} must be two or more finite numbers, (S,)")
        spread = float(found.std())
    one, rows = scores.mean(), []
    harm = one.harm_sign * one.values[0].detach().cpu().double()
    for share in fractions_of(fraction, m):
        k = round(share * m)
        change, error = cross_fitted(scores, partial(weighted, k=k, weight=0.0))
        gain = -one.harm_sign * change
        row = {
            "fraction": share,
            "count": k,
            "gain_in_sample": float(harm[ordered(harm)[:k]].sum()),
            "gain": gain,
            "standard_error": error,
            "gain_to_error": gain / error if error else float("nan"),
        }
        if spread is not None:
            row |= {"spread": spread, "gain_to_spread": gain / spread if spread else float("nan")}
        rows.append(row)
    return pandas.DataFrame(rows)


# ---- How stable rankings are ----


def stability(rankings: Mapping[str, object], top: float = 0.1):
    """How far rankings agree that should be alike: over seeds, resamples, methods, dampings, α.

    Args:
        rankings: by the name of what varies, the rankings to compare pair by pair: a dictionary
            from its levels to rankings (``{"damping": {0.01: scores, 0.1: others}}``), an
            `InfluenceOverSeeds`, whose seeds are compared, or ``(B, N)`` numbers as
            `bootstrap_scores` gives them. Examples that are NaN in either of a pair are left out.
        top: share of the examples that are at the top, the ones that would be acted on.

    Returns:
        a tidy pandas table, a row for each pair: varies, left, right, spearman, overlap (share of
        left's top that is in right's), chance (the overlap of random rankings), examples.

    Raises:
        ValueError, TypeError: fewer than two rankings, other examples, or no share.

    >>> alike = {"a": [1.0, 2.0, 3.0, 4.0], "b": [4.0, 3.0, 2.0, 1.0]}
    >>> stability({"method": alike}, top=0.25)[["spearman", "overlap", "chance"]].values.tolist()
    [[-1.0, 0.0, 0.25]]
    """
    import pandas
    from scipy.stats import spearmanr

    if not isinstance(rankings, Mapping) or not rankings:
        raise TypeError(f"rankings={shown(rankings)} must be a dictionary, by what varies")
    check_number("top", top, lambda t: 0 < t < 1, "a share between 0 and 1")
    rows = []
    for varies, given in rankings.items():
        for (left, a), (right, b) in combinations(_levels(varies, given), 2):
            if a.shape != b.shape:
                raise ValueError(f"rankings[{varies!r}] rank {len(a)} and {len(b)} examples")
            both = ~(a.isnan() | b.isnan())
            a, b = a[both], b[both]
            if (k := round(top * len(a))) < 1:
                raise ValueError(f"top={top} of {len(a)} examples is less than one; raise it")
            shared = len(set(ordered(a)[:k].tolist()) & set(ordered(b)[:k].tolist()))
            rho = float(spearmanr(a, b).statistic)
            rows.append((varies, left, right, rho, shared / k, k / len(a), len(a)))
    names = ["varies", "left", "right", "spearman", "overlap", "chance", "examples"]
    return pandas.DataFrame(rows, columns=names)


def _levels(varies: str, given) -> list[tuple[object, Tensor]]:
    """Each level and its ranking ``(N,)``, which may hold NaN."""
    name = f"rankings[{varies!r}]"
    if isinstance(given, InfluenceOverSeeds):
        rows = given.harm_sign * given.mean().per_seed[:, 0].detach().cpu().double()
        found = list(zip(given.seeds, rows, strict=True))
    elif isinstance(given, Mapping):
        found = [
            (level, ranking_of(f"{name}[{level!r}]", one))
            if isinstance(one, Influence)
            else (level, numbers_of(f"{name}[{level!r}]", one, RANKING).cpu().double())
            for level, one in given.items()
        ]
    else:
        rows = numbers_of(name, given, "rankings by level").cpu().double()
        found = list(enumerate(rows if rows.ndim else [rows]))
    if len(found) < 2 or any(row.ndim != 1 for _, row in found):
        raise ValueError(
            f"{name}={shown(given)} must hold two or more rankings (N,), to be compared in pairs"
        )
    return found


def bootstrap_scores(
    pipeline: Pipeline,
    method,
    queries: Examples,
    *,
    resamples: int = 4,
    stage: int | str = 0,
    target: str | Callable = "loss",
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Harm of each example on the mean query in pipelines trained on bootstrap resamples.

    Each resample draws as many of the stage's examples as there are, with replacement; all stages
    are trained on it from the same initial weights, and scored anew. So `stability` shows what the
    ranking owes to the company of the other examples.

    Args:
        pipeline: trained by its recipes, or not fitted yet; it stays as it is.
        method: the attributor, as `UnrolledInfluence()`.
        queries, stage, target: as in ``score``.
        resamples: how many.
        seed: of the draws.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        ``(B, N)``, `Influence.harm_sign` times the score of a copy of the example, mean over its
        copies; NaN where it was not drawn.

    Raises:
        ValueError, TypeError: as the method's own ``score``.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> model = msif.mlp(64, (8,), classes=10)
    >>> stage = msif.Stage("digits", model, train[:100], recipe=msif.SGD(0.1, epochs=2))
    >>> rows = bootstrap_scores(msif.Pipeline([stage]), msif.GradientDot(), test[:20], resamples=2)
    >>> rows.shape, 0.3 < float(rows.isnan().double().mean()) < 0.45
    (torch.Size([2, 100]), True)
    """
    check_instance("pipeline", pipeline, Pipeline)
    if not callable(getattr(method, "fit", None)) or not callable(getattr(method, "score", None)):
        raise TypeError(f"method={shown(method)} must be an attributor, as UnrolledInfluence()")
    k, count = pipeline.index(stage), check_whole("resamples", resamples)
    draw = torch.Generator().manual_seed(check_seed("seed", seed))
    data, m = pipeline.stages[k].data, len(pipeline.stages[k].data)
    rows = torch.full((count, m), torch.nan, dtype=torch.float64)
    with progress_bar(count, "resamples", progress) as bar:
        for row in rows:
            drawn = torch.randint(m, (m,), generator=draw)
            at = drawn.to(data.y.device)
            x = data.x.select(at) if isinstance(data.x, Inputs) else data.x[at]
            stages = [
                redrawn_stage(s, 0, (), pipeline.initial(j)) for j, s in enumerate(pipeline.stages)
            ]
            stages[k].data = Examples(x, data.y[at], classes=data.classes)
            fitted = method.fit(Pipeline(stages).fit(progress=False))
            asked = {"target": target, "aggregate": "mean", "progress": False}
            scores = fitted.score(queries, stage=k, **asked)
            harm = scores.harm_sign * scores.values[0].detach().cpu().double()
            copies = torch.bincount(drawn, minlength=m)
            total = torch.zeros(m, dtype=torch.float64).index_add(0, drawn, harm)
            row[copies > 0] = (total / copies)[copies > 0]
            bar.update()
    return rows


# ---- What influence is to be compared with ----


def out_of_fold(
    pipeline: Pipeline, stage: int | str = 0, *, folds: int = 5, seed: int = 0
) -> Tensor:
    """Predicted class probabilities of a stage's examples by models that were not trained on them.

    The examples are split into stratified folds; for each the stages are trained without it, from
    the pipeline's own initial weights with its own batches, all folds side by side.

    Args:
        pipeline: trained by its recipes, or not fitted yet; it stays as it is.
        stage: whose examples.
        folds: how many.
        seed: of the split.

    Returns:
        ``(N, C)``.

    Raises:
        ValueError: no class labels, more folds than examples of a class, or adopted weights.

    >>> import msif_lab as msif
    >>> train, _ = msif.load_digits()
    >>> model = msif.mlp(64, (8,), classes=10)
    >>> stage = msif.Stage("digits", model, train[:300], recipe=msif.SGD(0.1, epochs=2))
    >>> out_of_fold(msif.Pipeline([stage]), folds=3).shape
    torch.Size([300, 10])
    """
    from sklearn.model_selection import StratifiedKFold

    check_instance("pipeline", pipeline, Pipeline)
    k = pipeline.index(stage)
    data = pipeline.stages[k].data
    require_classes(data, f"stage {pipeline.stages[k].name!r}", "out-of-fold predictions need")
    least = int(torch.bincount(data.y.cpu())[data.y.unique().cpu()].min())
    folds = check_whole("folds", folds, 2, least, why="the examples of the smallest class")
    split = StratifiedKFold(folds, shuffle=True, random_state=check_seed("seed", seed, least=0))
    y = data.y.cpu().numpy()
    left_out = [torch.from_numpy(rows) for _, rows in split.split(y, y)]
    weights = torch.ones(folds, len(data))
    for lane, rows in enumerate(left_out):
        weights[lane, rows] = 0
    outputs = pipeline.retrain({k: weights}, progress=False).outputs(data, k).softmax(-1)
    found = torch.empty_like(outputs[0])
    for lane, rows in enumerate(left_out):
        found[rows] = outputs[lane, rows]
    return found


def require_classes(examples: Examples, name: str, what: str) -> None:
    """Raise `ValueError` where examples have no class labels."""
    if not examples.has_labels:
        raise ValueError(f"{what} class labels, and those of {name} are {examples.y.dtype} numbers")


def controls(
    runs: Pipeline | SeedRuns,
    validation: Examples,
    names: Sequence[str] | None = None,
    *,
    stage: int | str = 0,
    truth=None,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Rankings that one would try without influence, to be compared with it by `intervene`.

    Each puts first what it would remove first. ``"loss"``, ``"margin"``, ``"entropy"``,
    ``"gradient norm"`` are those of the trained models on their own training examples, as in Chen
    et al. (2020); ``"loss, out of fold"`` is that of models trained without the example
    (`out_of_fold`). ``"similarity"`` removes first what looks least like the validation examples,
    ``"gradient dot"`` what raises their mean loss, ``"TRAK"`` (`trak`) likewise. ``"cleanlab"`` is
    one minus cleanlab's label quality by out-of-fold self-confidence, adjusted for the classes'
    thresholds as in confident learning (without that it ranks as the out-of-fold loss).
    ``"oracle"`` removes the truth. Doing nothing is in every result of `intervene`.

    Args:
        runs: a trained pipeline, or several, whose rankings are averaged.
        validation: of the last stage's task.
        names: which; default all for which there is what they need, but ``"cleanlab"``, a package
            to be installed separately.
        stage: whose examples are ranked.
        truth: for ``"oracle"``: a mask ``(N,)`` or positions.
        folds: of out-of-fold predictions, which are made by the first of the runs.
        seed: of ``"random"``, of TRAK's projection and of the folds.

    Returns:
        by name a ranking ``(N,)``, larger first.

    Raises:
        ValueError, TypeError: an unknown name, or one that lacks what it needs: class labels, a
            truth, a mini-batch run.
        ImportError: cleanlab is not installed.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> model = msif.mlp(64, (8,), classes=10)
    >>> stage = msif.Stage("digits", model, train[:100], recipe=msif.SGD(0.1, epochs=2))
    >>> found = controls(msif.Pipeline([stage]).fit(), test[:20], ["random", "loss"])
    >>> {name: tuple(ranking.shape) for name, ranking in found.items()}
    {'random': (100,), 'loss': (100,)}
    """
    pipelines = [runs] if isinstance(runs, Pipeline) else runs
    if not isinstance(runs, Pipeline | SeedRuns):
        raise TypeError(f"runs={shown(runs)} must be a Pipeline, or SeedRuns as over_seeds' are")
    check_instance("validation", validation, Examples, "wrap it: Examples(x, y)")
    first = pipelines[0]
    k, seed = first.index(stage), check_seed("seed", seed, least=0)
    data, recipe = first.stages[k].data, first.stages[k].recipe
    absent = {"cleanlab"} if truth is not None else {"cleanlab", "oracle"}
    absent |= set() if data.has_labels else BY_CLASS
    absent |= set() if isinstance(recipe, MiniBatch) else {"self-influence"}
    if names is None:
        names = [name for name in CONTROLS if name not in absent]
    names = listed("names", names, f"some of {CONTROLS}")
    if not names or any(name not in CONTROLS for name in names):
        raise ValueError(f"names={shown(names)} must be one or more of {CONTROLS}")
    if "oracle" in names and truth is None:
        raise ValueError("names holds 'oracle', which needs truth=: a mask (N,) or positions")
    folded = None
    if {"loss, out of fold", "cleanlab"} & set(names):
        quality = _cleanlab() if "cleanlab" in names else None
        folded = out_of_fold(first, k, folds=folds, seed=seed).cpu().double()
    found = {}
    for name in names:
        if name == "random":
            draw = torch.Generator().manual_seed(seed)
            found[name] = torch.rand(len(data), generator=draw, dtype=torch.float64)
        elif name == "oracle":
            found[name] = mask_of("truth", truth, len(data)).double()
        elif name == "TRAK":
            found[name] = trak(pipelines, validation, seed, stage=k, aggregate="mean")[0]
        elif name == "loss, out of fold":
            found[name] = -folded.gather(1, data.y.cpu()[:, None])[:, 0].log()
        elif name == "cleanlab":
            kept = quality(data.y.cpu().numpy(), folded.numpy(), adjust_pred_probs=True)
            found[name] = 1 - torch.from_numpy(kept)
        else:
            found[name] = _averaged(BASELINES[name], pipelines, validation, k)
    return {name: ranking.detach().cpu().double() for name, ranking in found.items()}


def _averaged(
    kind: type[Baseline], pipelines: Sequence[Pipeline], validation: Examples, k: int
) -> Tensor:
    """A baseline's ranking, averaged over runs, ``(N,)``."""
    fitted = (kind().fit(pipeline, progress=False) for pipeline in pipelines)
    rows = [one.score(validation, k, aggregate="mean").values[0] for one in fitted]
    sign = -1 if kind is RepresentationSimilarity else 1
    return sign * torch.stack(rows).mean(0)


def _cleanlab() -> Callable:
    """cleanlab's score of a label's quality."""
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise ImportError(
            "names holds 'cleanlab', a package that is not installed: pip install cleanlab; or "
            "leave it out, 'loss, out of fold' is nearest to it"
        ) from error
    return get_label_quality_scores
