"""Scores averaged over seeds, and how sure the average is."""

import copy
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from ..arguments import check_choice, check_whole
from ..data.examples import Examples
from ..objective.questions import about_all
from ..parallel import check_jobs, each_result
from ..pipeline.origin import Origin, all_rows, averaged, checked, some_runs
from ..pipeline.pipeline import Pipeline
from ..pipeline.recipes import progress_bar
from ..pipeline.seeds import SeedRuns
from ..storage import read_tensors, valid, write_tensors
from .result import Influence
from .together import scored_each

__all__ = ["AveragedInfluence", "InfluenceOverSeeds"]

AVERAGES = ("mean", "normalised", "median", "weighted")
PROBES = 4  # runs that measure each run's trust for a weighted mean, where none are asked for
MOST_FREEDOM = 1e4
MEDIAN_NOISE = math.sqrt(math.pi / 2)  # of a median over that of a mean, for normal numbers


@dataclass
class InfluenceOverSeeds(Influence):
    """Scores of the average run: `values` are an average over seeds, with its standard error.

    Attributes:
        per_seed: ``(S, Q, N)``, the scores of each run.
        seeds: of the S runs.
        average: ``"mean"``, ``"normalised"``, ``"median"`` or ``"weighted"``, see
            `AveragedInfluence`.
        run_trust: ``(S,)``, for a weighted mean each run's estimated r with real removals.
        standard_error: ``(Q, N)``, of `values` over other seeds; NaN for a single seed.
        reliability: ``(Q,)``, correlation of one seed's scores with another's over the examples,
            mean over all pairs of seeds; NaN for a single seed.
    """

    per_seed: Tensor = field(default=None, repr=False)
    seeds: Sequence[int] = ()
    average: str = "mean"
    run_trust: Sequence[float] = ()
    standard_error: Tensor = field(init=False, repr=False)
    reliability: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        shape = (len(self.seeds), len(self.query_ids), len(self.ids))
        if self.per_seed is None or tuple(self.per_seed.shape) != shape:
            raise ValueError(f"per_seed must be {shape}: seeds × queries × ids")
        if len(self.run_trust) != (len(self.seeds) if self.average == "weighted" else 0):
            raise ValueError("run_trust must hold a number for each seed of a weighted mean")
        super().__post_init__()
        self.standard_error = averages(self.per_seed, self.average, self.run_trust)[1]
        self.reliability = reliability(self.per_seed)

    @classmethod
    def of(
        cls,
        per_seed: Tensor,
        seeds: Sequence[int],
        average: str,
        *about,
        origin: Origin,
        run_trust: Sequence[float] = (),
    ):
        """The average of ``per_seed``; ``about``: from ``ids`` to ``aggregate`` in `Influence`."""
        values = averages(per_seed, average, run_trust)[0]
        more = {"per_seed": per_seed, "seeds": list(seeds), "average": average}
        return cls(values, *about, origin, **more, run_trust=list(run_trust))

    def _like(self, per_seed: Tensor, *about, origin: Origin) -> "InfluenceOverSeeds":
        """Other rows of the same seeds, averaged in the same way."""
        how = self.seeds, self.average
        return self.of(per_seed, *how, *about, origin=origin, run_trust=self.run_trust)

    def _about(self) -> tuple:
        return self.stage, self.target, self.method

    def __getitem__(self, queries) -> "InfluenceOverSeeds":
        some = super().__getitem__(queries)
        per_seed = self.per_seed[:, self._places(queries)]
        about = self.ids, some.query_ids, *self._about(), self.aggregate
        return self._like(per_seed, *about, origin=some.origin)

    def mean(self) -> "InfluenceOverSeeds":
        """The mean over queries as one row, with its own standard error over seeds."""
        if self.aggregate:
            return self[:]
        row = self.per_seed.mean(1, keepdim=True)
        ids = self.query_ids.new_full((1,), -1)
        about = self.ids, ids, *self._about(), about_all("mean", self.query_ids)
        return self._like(row, *about, origin=all_rows(self.origin))

    def some(self, places: Sequence[int]) -> "InfluenceOverSeeds":
        """The average over some of the seeds, by their places among them."""
        places = list(places)
        seeds = [self.seeds[i] for i in places]
        about = self.ids, self.query_ids, *self._about(), self.aggregate
        more = {"origin": some_runs(self.origin, places)}
        more |= {"run_trust": [self.run_trust[i] for i in places] if self.run_trust else ()}
        return self.of(self.per_seed[places], seeds, self.average, *about, **more)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends ``(Q, N)`` of Student's interval for the average of all seeds.

        Raises:
            ValueError: a level that is none, or a single seed.
        """
        from scipy.stats import t

        self._require_several("an interval")
        half = float(t.ppf((1 + _level(level)) / 2, self._freedom())) * self.standard_error
        return self.values - half, self.values + half

    def trusted(self, level: float = 0.95) -> Tensor:
        """Pairs of query and example whose sign is sure, a mask ``(Q, N)``.

        Of all pairs that it marks, a share of at most 1 − level is expected to have the wrong sign:
        two-sided t-tests over the seeds, with the false discovery rate of all Q·N held there by
        Benjamini and Hochberg's procedure. Since a handful of seeds hardly knows the spread of a
        single pair, each query's pairs share what they know of it (`moderated`).

        Raises:
            ValueError: a level that is none, or a single seed.
        """
        from scipy.stats import false_discovery_control, t

        self._require_several("a sign that is sure")
        wrong = 1 - _level(level)
        error, freedom = moderated(self.standard_error.cpu().double(), self._freedom())
        size = self.values.cpu().double().abs() / error.clamp(min=1e-300)
        p = 2 * t.sf(size.numpy(), freedom.numpy())
        sure = false_discovery_control(p.reshape(-1)).reshape(p.shape) <= wrong
        return torch.from_numpy(sure).to(self.values.device)

    def expected_r(self, seeds: int | None = None) -> float:
        """Expected correlation of an average of so many seeds with that of infinitely many.

        ``√(Sρ / (1 + (S − 1)ρ))`` (Spearman and Brown), ρ the mean `reliability` of the queries.
        """
        count = check_whole("seeds", seeds, none="their number") or len(self.seeds)
        return math.sqrt(spearman_brown(self._rho(), count))

    def seeds_needed(self, r: float = 0.9) -> int | float:
        """How many seeds an average needs to correlate by r with that of infinitely many.

        Infinity where one seed's scores say nothing about another's.

        Raises:
            ValueError: r outside (0, 1), or a single seed.
        """
        if not isinstance(r, (int, float)) or not 0 < r < 1:
            raise ValueError(f"r={r!r} must be a correlation between 0 and 1")
        rho = self._rho()
        if rho <= 0:
            return math.inf
        return max(1, math.ceil(r * r * (1 - rho) / (rho * (1 - r * r)) - 1e-9))

    def _freedom(self) -> float:
        """Degrees of freedom of the standard error: seeds − 1, fewer where some weigh little."""
        if self.average != "weighted":
            return len(self.seeds) - 1
        return max(1.0, 1 / float(trust_weights(self.run_trust).square().sum()) - 1)

    def _rho(self) -> float:
        self._require_several("a reliability")
        if bool(self.reliability.isnan().all()):
            raise ValueError(
                "the scores do not vary over the examples, so their reliability is not known"
            )
        return float(self.reliability.nanmean().clamp(0.0, 1.0))

    def _require_several(self, what: str) -> None:
        if len(self.seeds) < 2:
            raise ValueError(f"{what} takes two or more seeds, and these scores are of one")

    def to_frame(self):
        """A tidy pandas table: one row for each query and example, with the standard error."""
        errors = self.standard_error.detach().cpu().reshape(-1).numpy()
        return super().to_frame().assign(standard_error=errors)

    @classmethod
    def concatenate(cls, parts) -> "InfluenceOverSeeds":
        """As `Influence.concatenate`; the parts must be of the same seeds and average."""
        parts = list(parts)
        joined = Influence.concatenate.__func__(Influence, parts)
        same = {(tuple(part.seeds), part.average, tuple(part.run_trust)) for part in parts}
        if len(same) > 1:
            raise ValueError(f"parts are of different seeds, averages or trust: {sorted(same)}")
        per_seed = torch.cat([part.per_seed for part in parts], 1)
        about = joined.ids, joined.query_ids, *parts[0]._about(), ""
        return parts[0]._like(per_seed, *about, origin=joined.origin)

    def save(self, path) -> None:
        """Write to one safetensors file, all or nothing."""
        names = ("stage", "target", "method", "aggregate", "origin", "average")
        facts = {name: getattr(self, name) for name in names} | {"seeds": list(self.seeds)}
        facts |= {"run_trust": list(self.run_trust)} if self.run_trust else {}
        tensors = {name: getattr(self, name) for name in ("per_seed", "ids", "query_ids")}
        write_tensors(path, "influence over seeds", tensors, facts)

    @classmethod
    def load(cls, path) -> "InfluenceOverSeeds":
        """Read what `save` wrote; a cut-off, changed or foreign file raises `SavedFileError`."""
        tensors, facts = read_tensors(path, "influence over seeds")
        with valid(path):
            origin = checked(facts.get("origin", {}))
            names = ("stage", "target", "method", "aggregate")
            about = tensors["ids"], tensors["query_ids"], *(facts[name] for name in names)
            if facts["average"] not in AVERAGES:
                raise ValueError(f"average {facts['average']!r} is none of {AVERAGES}")
            more = {"origin": origin, "run_trust": facts.get("run_trust", [])}
            return cls.of(tensors["per_seed"], facts["seeds"], facts["average"], *about, **more)

    def __repr__(self) -> str:
        queries, examples = self.values.shape
        sure = f"; {self._sure()}" if len(self.seeds) > 1 else ""
        return (
            f"InfluenceOverSeeds({self._rows(queries)} × {examples} examples of {self.stage!r} on "
            f"{self.target}, {self.average} of {len(self.seeds)} seeds; {self.method}{sure})"
        )

    def _sure(self) -> str:
        sure = f"{float(self.trusted().double().mean()):.0%} of signs sure"
        known = not bool(self.reliability.isnan().all())
        return sure + (f", one seed with another r {self._rho():.2f}" if known else "")

    def _repr_html_(self) -> str:
        one = self.mean()
        k, rows = min(4, len(self.ids)), []
        for word, ranking in (("helpful", one.helpful(k)), ("harmful", one.harmful(k))):
            for score, place, i in zip(*(part[0].tolist() for part in ranking), strict=True):
                if one.kind(score) == word:  # of few examples the last may not be
                    error = float(one.standard_error[0, place])
                    cells = (word, str(i), f"{score:+.2e}", f"± {error:.1e}")
                    rows.append(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>")
        title = html.escape(
            f"{self._rows(len(self))} × {len(self.ids)} examples of stage {self.stage!r}; "
            f"{'' if self.aggregate else 'mean '}effect on {self.target}, {self.average} of "
            f"{len(self.seeds)} seeds"
        )
        caption = f"<caption style='white-space: nowrap'>{title}</caption>"
        head = "<tr><th></th><th>id</th><th>score</th><th>standard error</th></tr>"
        return f"<table>{caption}{head}{''.join(rows)}</table>"


class AveragedInfluence:
    """Any method's scores, averaged over the runs of several seeds.

    What an example does under one seed says little about the next run where training is noisy; the
    mean over seeds is what to expect of any run.

    Args:
        method: the attributor, as `UnrolledInfluence()`; it is fitted to each run anew.
        average: ``"mean"`` of the scores, whose standard error is known best; ``"normalised"``, the
            mean of each seed's row divided by its norm, times the mean norm: rough runs, whose
            scores differ in size by orders, count as much as calm ones; ``"median"``;
            ``"weighted"``, the mean weighted by r², r each run's ``trust_``: the share of real
            effects' variance that its scores explain. Where a few of the runs are rough this keeps
            them from drowning the others. It takes `UnrolledInfluence`, and costs the runs that
            measure trust: 4 for each seed unless the method says another number.
        n_jobs: processes through joblib; ``joblib.parallel_config`` moves them to a cluster.
        lanes: how many runs a process scores at once, vectorised over models, by
            `UnrolledInfluence` on its own; they share its memory budget. With small MLPs eight take
            about half of the time, with conv nets hardly less. Other methods, and weighted means,
            score one run after the other.

    >>> import msif_lab as msif
    >>> train, test = msif.load_digits()
    >>> recipe = msif.SGD(lr=0.1, epochs=2, schedule="linear")
    >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10), train[:200], recipe=recipe)
    >>> runs = msif.over_seeds(msif.Pipeline([stage]), seeds=4)
    >>> scores = msif.AveragedInfluence(msif.UnrolledInfluence()).fit(runs).score(test[:3])
    >>> scores.values.shape, scores.standard_error.shape, scores.per_seed.shape
    (torch.Size([3, 200]), torch.Size([3, 200]), torch.Size([4, 3, 200]))
    """

    def __init__(self, method, average: str = "mean", *, n_jobs: int = 1, lanes: int = 1):
        if not callable(getattr(method, "fit", None)) or not callable(
            getattr(method, "score", None)
        ):
            raise TypeError(
                f"method is {type(method).__name__}; give an attributor such as "
                "msif.UnrolledInfluence()"
            )
        check_choice("average", average, AVERAGES)
        if average == "weighted":
            method = _measuring_trust(method)
        self.method, self.average = method, average
        self.n_jobs, self.lanes = check_jobs(n_jobs), check_whole("lanes", lanes)

    def __repr__(self) -> str:
        return f"AveragedInfluence({self.method!r}, average={self.average!r})"

    def fit(
        self, runs: SeedRuns | Sequence[Pipeline], progress: bool = True
    ) -> "AveragedInfluence":
        """Remember the runs; each is replayed when it is scored, so that one at a time is held.

        Raises:
            TypeError, ValueError: no runs, or runs that differ in more than their seeds.
        """
        if isinstance(runs, Pipeline):
            raise TypeError("runs is one Pipeline; several are averaged: over_seeds(pipeline, 8)")
        self._runs = runs if isinstance(runs, SeedRuns) else SeedRuns(runs)
        return self

    def score(
        self,
        queries: Examples,
        stage: int | str = 0,
        target: str | Callable = "loss",
        progress: bool = True,
        *,
        aggregate=None,
    ) -> InfluenceOverSeeds:
        """Average influence of one stage's examples on each query, as `UnrolledInfluence.score`.

        Raises:
            ValueError, TypeError: as the method's own ``score``.
        """
        if not hasattr(self, "_runs"):
            raise ValueError("call fit(runs) before score(queries)")
        asked = {"stage": stage, "target": target, "progress": False}
        if aggregate is not None:
            asked["aggregate"] = aggregate
        runs = self._runs.pipelines
        groups = [runs[i : i + self.lanes] for i in range(0, len(runs), self.lanes)]
        weighted = self.average == "weighted"
        calls = [(self.method, group, queries, asked, weighted) for group in groups]
        parts: list[Influence] = []
        with progress_bar(len(runs), "runs scored", progress) as bar:
            for _, some in each_result(scored_each, calls, self.n_jobs):
                parts += some
                bar.update(len(some))
        first = parts[0]
        about = first.ids, first.query_ids, first.stage, first.target, repr(self), first.aggregate
        per_seed = torch.stack([part.values for part in parts])
        more = {"origin": averaged([part.origin for part in parts])}
        # Where no effect varies over the examples, as of a single one, there is no r to measure.
        each = [1.0 if part.trust_ is None else part.trust_.r for part in parts if weighted]
        more |= {"run_trust": each}
        return InfluenceOverSeeds.of(per_seed, self._runs.seeds, self.average, *about, **more)


def _measuring_trust(method):
    """The method, made to measure each run's trust; `ValueError` if it cannot."""
    trust = getattr(method, "trust", 0)
    if trust == 0:
        raise ValueError(
            f"average='weighted' takes runs' measured trust, and {method!r} measures none; give "
            "UnrolledInfluence() without trust=0, or another average"
        )
    if trust is None:
        method = copy.copy(method)
        method.trust = PROBES
    return method


def trust_weights(run_trust: Sequence[float]) -> Tensor:
    """Shares ``(S,)`` of runs in a weighted mean: r², none where r < 0; alike if all are."""
    weights = torch.tensor(list(run_trust), dtype=torch.float64).clamp(min=0).square()
    if not bool(weights.any()):
        weights += 1
    return weights / weights.sum()


def averages(
    per_seed: Tensor, average: str, run_trust: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Average over the first dimension and its standard error, ``(Q, N)`` each."""
    count = len(per_seed)
    if average == "weighted":
        share = trust_weights(run_trust).to(per_seed)[:, None, None]
        middle = (share * per_seed).sum(0)
        if count < 2 or float(share.max()) > 1 - 1e-6:
            return middle, torch.full_like(middle, torch.nan)
        squares = (share * (per_seed - middle)).square().sum(0)
        return middle, (squares / (1 - share.square().sum())).sqrt()
    if average == "normalised":
        norms = per_seed.norm(dim=2, keepdim=True)
        per_seed = per_seed / norms.clamp(min=torch.finfo(norms.dtype).tiny) * norms.mean(0)
    middle = per_seed.mean(0)
    error = (per_seed - middle).square().sum(0).div(max(1, count - 1) * count).sqrt()
    if average == "median":  # with heavy tails its error is smaller than that
        middle, error = _median(per_seed), MEDIAN_NOISE * error
    return middle, error if count > 1 else torch.full_like(error, torch.nan)


def _median(values: Tensor) -> Tensor:
    """Of the first dimension; the mean of the two in the middle of an even number."""
    ranked, count = values.sort(0).values, len(values)
    return (ranked[(count - 1) // 2] + ranked[count // 2]) / 2


def moderated(errors: Tensor, freedom: int) -> tuple[Tensor, Tensor]:
    """Standard errors ``(Q, N)`` drawn towards those of their row, and degrees of freedom (Q, 1).

    The variances of a row are read as one common variance times inverse chi-squared noise, whose
    degrees of freedom are fitted to the spread of their logarithms (Smyth 2004, doi
    10.2202/1544-6115.1027): ``s̃² = (d₀ s₀² + d s²) / (d₀ + d)`` with d₀ + d degrees of freedom.

    Args:
        errors: of means over d + 1 seeds.
        freedom: d.
    """
    from scipy.optimize import brentq
    from scipy.special import polygamma, psi

    def freedom_of(spread: float) -> float:  # where trigamma(d₀/2) is the spread beyond chi-squared
        if spread <= float(polygamma(1, MOST_FREEDOM / 2)):
            return MOST_FREEDOM  # one variance for all, as far as the logarithms tell
        return 2 * brentq(lambda x: float(polygamma(1, x)) - spread, 1e-3, MOST_FREEDOM)

    pooled, degrees = errors.clone(), errors.new_full((len(errors), 1), float(freedom))
    for row, error in enumerate(errors):
        logs = 2 * error[error > 0].log()
        if len(logs) < 3:
            continue
        spread = float(logs.var()) - float(polygamma(1, freedom / 2))
        level = float(logs.mean()) - float(psi(freedom / 2)) + math.log(freedom / 2)
        prior = freedom_of(spread)
        common = math.exp(level + float(psi(prior / 2)) - math.log(prior / 2))
        pooled[row] = ((prior * common + freedom * error**2) / (prior + freedom)).sqrt()
        degrees[row] = prior + freedom
    return pooled, degrees


def reliability(per_seed: Tensor) -> Tensor:
    """Mean correlation between two seeds' rows ``(S, Q, N)`` over all pairs of seeds, ``(Q,)``.

    NaN for a single seed; pairs with a row that does not vary are left out.
    """
    rows = per_seed.detach().cpu().double()
    rows = rows - rows.mean(2, keepdim=True)
    rows = rows / rows.norm(dim=2, keepdim=True)  # NaN where a row does not vary
    pairs = [(rows[i] * rows[j]).sum(1) for i, j in combinations(range(len(rows)), 2)]
    if not pairs:
        return torch.full((per_seed.shape[1],), torch.nan, dtype=torch.float64)
    return torch.stack(pairs).nanmean(0)


def spearman_brown(rho, seeds):
    """Share of an average's variance that is no noise: ``Sρ / (1 + (S − 1)ρ)``."""
    return seeds * rho / (1 + (seeds - 1) * rho)


def _level(level: float) -> float:
    if not isinstance(level, float) or not 0 < level < 1:
        raise ValueError(f"level={level!r} must be a number between 0 and 1, such as 0.95")
    return level
