"""What every method returns: scores of examples on queries, and rankings by them."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_tensor, check_whole, listed, numbers_of, shown
from ..objective.questions import about_all
from ..pipeline.origin import Origin, all_rows, checked, difference, some_rows
from ..storage import read_tensors, valid, write_tensors
from .trust import Trust

__all__ = ["Influence", "Ranking", "TopInfluence", "rank_stream"]


class Ranking(NamedTuple):
    """The first k examples of each query, ``(Q, k)`` each.

    Attributes:
        values: their scores.
        positions: their positions in the stage's data.
        ids: their identities.
    """

    values: Tensor
    positions: Tensor
    ids: Tensor


class AboutTarget:
    """What follows from ``target``, the name of the quantity q: the sign of harm, and the unit.

    The sign rule of the whole package. A positive score means that more weight on the example
    raises q. For a loss (and for every q that is not named here) that is harmful; a margin, the
    log-odds of the correct class, should be large, so there it is helpful. A mean or sum of all
    queries keeps the name of its target, and with it the rule; a sum with negative weights is
    "weighted loss" or the like, and what raises it is called harmful whatever the target.
    """

    target: str
    aggregate: str

    @property
    def harm_sign(self) -> int:
        """1 where a positive score is harmful, −1 where it is helpful (``target="margin"``)."""
        return -1 if self.target == "margin" else 1

    @property
    def signs(self) -> dict[str, str]:
        """The printed sign of helpful and of harmful scores: ``"−"`` or ``"+"``."""
        helpful, harmful = ("−", "+") if self.harm_sign > 0 else ("+", "−")
        return {"helpful": helpful, "harmful": harmful}

    @property
    def unit(self) -> str:
        """The unit of q in words: ``"nats"``, ``"log-odds"`` or ``"units of q"``."""
        target = self.target.removeprefix("weighted ")
        return {"loss": "nats", "margin": "log-odds"}.get(target, "units of q")

    def _rows(self, count: int) -> str:
        """What the rows of a result are, in words."""
        return self.aggregate or f"{count} {'query' if count == 1 else 'queries'}"

    def kind(self, score: float) -> str:
        """What a score says of its example: ``"helpful"``, ``"harmful"``, or ``"neutral"`` at 0."""
        if score == 0:
            return "neutral"
        return "harmful" if score * self.harm_sign > 0 else "helpful"


@dataclass
class TopInfluence(AboutTarget):
    """The k lowest and k highest scores of each query, from `ImplicitInfluence.score` with ``top``.

    Attributes:
        lowest, highest: `Ranking` ``(Q, k)`` each, the extreme first.
        query_ids: identities of the queries ``(Q,)``.
        examples: N, how many were scored.
        stage, target, method, aggregate: as in `Influence`.
    """

    lowest: Ranking
    highest: Ranking
    query_ids: Tensor
    examples: int
    stage: str = ""
    target: str = "loss"
    method: str = ""
    aggregate: str = ""

    def __len__(self) -> int:
        return len(self.query_ids)

    def _first(self, ranking: Ranking, k: int | None) -> Ranking:
        most = ranking.values.shape[1]
        why = f"the {most} that were kept; score with a larger top="
        k = check_whole("k", k, most=most, why=why, none="all of them")
        return Ranking(*(part[:, :k] for part in ranking))

    def helpful(self, k: int | None = None) -> Ranking:
        """Each query's k most helpful examples (default: all kept); see `Influence.helpful`."""
        return self._first(self.lowest if self.harm_sign > 0 else self.highest, k)

    def harmful(self, k: int | None = None) -> Ranking:
        """Each query's k most harmful examples (default: all kept); see `Influence.harmful`."""
        return self._first(self.highest if self.harm_sign > 0 else self.lowest, k)

    def __repr__(self) -> str:
        k = self.lowest.values.shape[1]
        return (
            f"TopInfluence({self._rows(len(self))} × {k} most helpful and {k} most harmful of "
            f"{self.examples} examples of {self.stage!r} on {self.target}; {self.method})"
        )


def rank_stream(
    chunks: Iterable[tuple[slice, Tensor]], k: int, ids: Tensor
) -> tuple[Ranking, Ranking]:
    """The lowest and the highest k of each row of ``(Q, N)`` values that arrive in chunks.

    Args:
        chunks: ``(positions, values (Q, B))``, one after the other; at most 4k values of a row are
            held besides the present chunk.
        k: how many to keep at either end.
        ids: identities of the N examples.

    Raises:
        ValueError: NaN or inf among the values.
    """
    kept: dict[bool, tuple[Tensor, Tensor]] = {}
    for rows, values in chunks:
        if not bool(torch.isfinite(values).all()):
            query, place = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(
                f"the score of query {query} and example {rows.start + place} is NaN or inf; "
                "check data"
            )
        here = torch.arange(rows.start, rows.stop, device=values.device).expand(len(values), -1)
        for largest in (False, True):
            kept_values, kept_positions = kept.get(largest, (values[:, :0], here[:, :0]))
            all_values = torch.cat([kept_values, values], 1)
            all_positions = torch.cat([kept_positions, here], 1)
            best, order = all_values.topk(min(k, all_values.shape[1]), dim=1, largest=largest)
            kept[largest] = best, all_positions.gather(1, order)
    lowest, highest = (
        Ranking(values, positions, ids[positions.cpu()])
        for values, positions in (kept[False], kept[True])
    )
    return lowest, highest


@dataclass
class Influence(AboutTarget):
    """Scores ``∂q/∂w_i`` of examples on queries, in the `unit` of q per unit of example weight.

    Positive: the example raises q, so for a loss it is harmful (`harm_sign`); removing it changes q
    by minus the score, to first order. ``m ·`` score is the paper's I(z, x_t).

    Attributes:
        values: ``(Q, N)``.
        ids, query_ids: identities of the examples ``(N,)`` and queries ``(Q,)``.
        stage, target, method: whose examples, what q is, how the scores were computed.
        aggregate: empty for a row per query; else what the only row, of query id −1, is made of:
            "mean of 50 queries" and a fingerprint of these queries.
        origin: of which pipeline, queries and target, to tell whether effects belong to it.
        trust_: how far the scores will predict removals, where their method has measured it; of
            some of the queries it stays that of all.
    """

    values: Tensor
    ids: Tensor
    query_ids: Tensor
    stage: str = ""
    target: str = "loss"
    method: str = ""
    aggregate: str = ""
    origin: Origin = field(default_factory=dict, repr=False, compare=False)
    trust_: Trust | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        check_tensor("values", self.values, "(Q, N)")
        for name, ids in (("ids", self.ids), ("query_ids", self.query_ids)):
            check_tensor(name, ids, "of whole numbers, as Examples.ids")
            if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(
                    f"{name} {tuple(ids.shape)} {ids.dtype}: expected one whole number each, as "
                    "Examples.ids"
                )
        if self.values.shape != (len(self.query_ids), len(self.ids)):
            raise ValueError(
                f"values {tuple(self.values.shape)} must be ({len(self.query_ids)} queries, "
                f"{len(self.ids)} ids), of which query_ids and ids hold one each"
            )
        if not bool(torch.isfinite(self.values).all()):
            bad = (~torch.isfinite(self.values)).nonzero()[0].tolist()
            raise ValueError(
                f"values: the score of query {bad[0]} and example {bad[1]} is NaN or inf; check "
                "curvature and data"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, queries) -> "Influence":
        """Some queries' scores: an index, a slice or a list of positions."""
        queries = self._places(queries)
        return Influence(
            self.values[queries],
            self.ids,
            self.query_ids[queries],
            self.stage,
            self.target,
            self.method,
            self.aggregate,
            some_rows(self.origin, queries),
            self.trust_,
        )

    def _places(self, queries) -> slice | Tensor:
        """Positions of queries, checked: from one, a slice, a list of them, or a mask."""
        count, what = len(self), "a position, a slice, a list of positions, or a mask"
        if isinstance(queries, slice):
            return queries
        places = numbers_of("queries", queries, what).cpu()
        if places.dtype == torch.bool and places.shape == (count,):
            places = places.nonzero().flatten()
        if places.ndim > 1 or places.is_floating_point() or places.dtype == torch.bool:
            raise ValueError(f"queries={shown(queries)} must be {what} ({count},)")
        places = places.reshape(-1).long()
        if len(places) and (int(places.min()) < -count or int(places.max()) >= count):
            raise IndexError(f"queries={shown(queries)} is out of range: there are {count} queries")
        return places % count

    def _ranked(self, k: int, largest: bool) -> Ranking:
        k = check_whole("k", k, most=len(self.ids), why="the number of examples")
        values, positions = self.values.topk(k, dim=1, largest=largest)
        return Ranking(values, positions, self.ids[positions.cpu()])

    def helpful(self, k: int = 5) -> Ranking:
        """Each query's k most helpful examples: they lower q most, or raise it most if a margin."""
        return self._ranked(k, largest=self.harm_sign < 0)

    def harmful(self, k: int = 5) -> Ranking:
        """Each query's k most harmful examples: they raise q most, or lower it most if a margin."""
        return self._ranked(k, largest=self.harm_sign > 0)

    def removal_effect(self, indices: Sequence[int]) -> Tensor:
        """Predicted change of each query when these examples are removed, ``(Q,)``: −Σ scores.

        Args:
            indices: positions of the examples in the stage's data.

        Raises:
            ValueError: no positions, unknown ones, or the same one twice.
        """
        what = f"positions between 0 and {len(self.ids) - 1}"
        positions = numbers_of("indices", indices, what).reshape(-1).to(self.values.device)
        whole = not positions.is_floating_point() and positions.dtype != torch.bool
        if (
            len(positions) == 0
            or not whole
            or int(positions.min()) < 0
            or int(positions.max()) >= len(self.ids)
        ):
            raise ValueError(
                f"indices={indices!r} must be positions between 0 and {len(self.ids) - 1}"
            )
        if len(torch.unique(positions)) != len(positions):
            raise ValueError(f"indices={indices!r} must be different positions")
        return -self.values[:, positions].sum(1)

    def mean(self) -> "Influence":
        """The mean over queries as one row: influence on the average query.

        ``score(queries, aggregate="mean")`` gives the same at the price of one query. Of a row that
        is an aggregate already, it is that row.
        """
        if self.aggregate:
            return self[:]
        row = self.values.mean(0, keepdim=True)
        about = self.stage, self.target, self.method, about_all("mean", self.query_ids)
        ids = self.query_ids.new_full((1,), -1)
        return Influence(row, self.ids, ids, *about, all_rows(self.origin))

    @classmethod
    def concatenate(cls, parts: Iterable["Influence"]) -> "Influence":
        """Scores of all queries from those of some each, as separate jobs give them.

        Args:
            parts: rows of the same examples, from one pipeline, target and method.

        Raises:
            ValueError: none, aggregates, or parts that do not belong together.

        >>> import joblib, msif_lab as msif
        >>> train, test = msif.load_digits()
        >>> stage = msif.Stage("digits", msif.mlp(64, (8,), classes=10), train[:100])
        >>> fitted = msif.GradientDot().fit(msif.Pipeline([stage]).adopt())
        >>> score = joblib.delayed(fitted.score)
        >>> parts = joblib.Parallel(2)(score(test[rows]) for rows in (slice(0, 3), slice(3, 5)))
        >>> msif.Influence.concatenate(parts).values.shape
        torch.Size([5, 100])
        """
        given = parts
        parts = listed("parts", parts, "a list of Influence, each of some of the queries")
        if not parts or not all(isinstance(part, cls) for part in parts):
            raise ValueError(
                f"parts={shown(given)} must be one or more Influence, each of some of the queries"
            )
        first = parts[0]
        for i, part in enumerate(parts):
            names = ("stage", "target", "method")
            differ = [n for n in names if getattr(part, n) != getattr(first, n)]
            differ += ["ids of the examples"] * (not torch.equal(part.ids, first.ids))
            other = ""
            if first.origin and part.origin:
                other = difference(first.origin | {"queries": []}, part.origin | {"queries": []})
            if part.aggregate or differ or other:
                what = ", ".join(differ) or other or f"an aggregate ({part.aggregate})"
                raise ValueError(f"parts[{i}] does not continue parts[0]: {what}")
        values = torch.cat([part.values for part in parts])
        query_ids = torch.cat([part.query_ids for part in parts])
        origin = {}
        if all(part.origin for part in parts):
            rows = [q for part in parts for q in part.origin["queries"]]
            origin = first.origin | {"queries": rows if len(rows) == len(values) else []}
        about = first.stage, first.target, first.method, "", origin
        trust = Trust.together([(part.trust_, len(part)) for part in parts])
        return cls(values, first.ids, query_ids, *about, trust)

    def to_frame(self):
        """A tidy pandas table: one row for each query and example."""
        import pandas

        queries, examples = self.values.shape
        return pandas.DataFrame(
            {
                "query_id": self.query_ids.repeat_interleave(examples).numpy(),
                "id": self.ids.repeat(queries).numpy(),
                "score": self.values.detach().cpu().reshape(-1).numpy(),
            }
        )

    def save(self, path) -> None:
        """Write to one safetensors file, all or nothing."""
        tensors = {"values": self.values, "ids": self.ids, "query_ids": self.query_ids}
        names = ("stage", "target", "method", "aggregate", "origin")
        facts = {name: getattr(self, name) for name in names}
        if self.trust_ is not None:
            facts["trust_"] = asdict(self.trust_)
        write_tensors(path, "influence", tensors, facts)

    @classmethod
    def load(cls, path) -> "Influence":
        """Read what `save` wrote; a cut-off, changed or foreign file raises `SavedFileError`."""
        tensors, facts = read_tensors(path, "influence")
        with valid(path):
            facts["origin"] = checked(facts.get("origin", {}))
            if "trust_" in facts:
                facts["trust_"] = Trust(**facts["trust_"])
            return cls(tensors["values"], tensors["ids"], tensors["query_ids"], **facts)

    def __repr__(self) -> str:
        queries, examples = self.values.shape
        positive = float((self.values > 0).double().mean())
        trust = f"; removals: {self.trust_.brief()}" if self.trust_ else ""
        return (
            f"Influence({self._rows(queries)} × {examples} examples of {self.stage!r} on "
            f"{self.target}; {self.method}; {positive:.0%} positive{trust})"
        )

    def _repr_html_(self) -> str:
        mean = self.mean()
        k = min(4, len(self.ids))
        rows = [
            f"<tr><td>{word}</td><td>{int(i)}</td><td>{float(score):+.2e}</td></tr>"
            for word, ranking in (("helpful", mean.helpful(k)), ("harmful", mean.harmful(k)))
            for score, i in zip(ranking.values[0], ranking.ids[0], strict=True)
            if self.kind(float(score)) == word  # of few examples the last may not be
        ]
        title = (
            f"{html.escape(self._rows(len(self)))} × {len(self.ids)} examples of stage "
            f"{html.escape(repr(self.stage))}; {'' if self.aggregate else 'mean '}effect on "
            f"{html.escape(str(self.target))}"
        )
        caption = f"<caption style='white-space: nowrap'>{title}</caption>"
        head = "<tr><th></th><th>id</th><th>score</th></tr>"
        if self.trust_ is not None:
            text = f"{'badly ' * self.trust_.warns}predicts removals: {self.trust_.brief()}"
            rows.append(f"<tr><td colspan='3'>{text}</td></tr>")
        return f"<table>{caption}{head}{''.join(rows)}</table>"
