"""What every method returns: scores of examples on queries, and rankings by them."""

import html
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..storage import read_tensors, write_tensors

__all__ = ["Influence", "Ranking", "TopInfluence", "rank_stream"]


class Ranking(NamedTuple):
    """The first k examples of each query, ``(Q, k)`` each: scores, positions in the stage's data,
    and ids.
    """

    values: Tensor
    positions: Tensor
    ids: Tensor


@dataclass
class TopInfluence:
    """The k lowest and k highest scores of each query: what `ImplicitInfluence.score` gives with
    ``top=k``.

    Attributes:
        lowest, highest: `Ranking` ``(Q, k)`` each, the extreme first.
        query_ids: identities of the queries ``(Q,)``.
        examples: N, how many were scored.
        stage, target, method: as in `Influence`.
    """

    lowest: Ranking
    highest: Ranking
    query_ids: Tensor
    examples: int
    stage: str = ""
    target: str = "loss"
    method: str = ""

    def __len__(self) -> int:
        return len(self.query_ids)

    def _first(self, ranking: Ranking, k: int | None) -> Ranking:
        most = ranking.values.shape[1]
        if k is not None and not 1 <= k <= most:
            raise ValueError(
                f"k={k} must be between 1 and the {most} that were kept; score with top={k}"
            )
        return Ranking(*(part[:, :k] for part in ranking))

    def helpful(self, k: int | None = None) -> Ranking:
        """Each query's k most helpful examples, all kept ones by default; see `Influence.helpful`."""
        return self._first(self.highest if self.target == "margin" else self.lowest, k)

    def harmful(self, k: int | None = None) -> Ranking:
        """Each query's k most harmful examples, all kept ones by default; see `Influence.harmful`."""
        return self._first(self.lowest if self.target == "margin" else self.highest, k)

    def __repr__(self) -> str:
        k = self.lowest.values.shape[1]
        return (
            f"TopInfluence({len(self)} queries × {k} most helpful and {k} most harmful of "
            f"{self.examples} examples of {self.stage!r} on {self.target}; {self.method})"
        )


def rank_stream(
    chunks: Iterable[tuple[slice, Tensor]], k: int, ids: Tensor
) -> tuple[Ranking, Ranking]:
    """Lowest and highest k of each row of ``(Q, N)`` values that come as ``(positions, (Q, B))``;
    holds 4k a row.

    Raises:
        ValueError: NaN or inf among them.
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
            before = kept.get(largest, (values[:, :0], here[:, :0]))
            both = torch.cat([before[0], values], 1), torch.cat([before[1], here], 1)
            best, order = both[0].topk(min(k, both[0].shape[1]), dim=1, largest=largest)
            kept[largest] = best, both[1].gather(1, order)
    return tuple(Ranking(*kept[largest], ids[kept[largest][1].cpu()]) for largest in (False, True))


@dataclass
class Influence:
    """Scores ``∂q/∂w_i`` of examples on queries, in nats (or units of q) per unit of example
    weight.

    Positive: the example raises q, so for a loss it is harmful; removing it changes q by minus the
    score, to first order. ``m ·`` score is the paper's I(z, x_t).

    Attributes:
        values: ``(Q, N)``.
        ids, query_ids: identities of the examples ``(N,)`` and queries ``(Q,)``.
        stage, target, method: where the examples live, what q is, how it was computed.
    """

    values: Tensor
    ids: Tensor
    query_ids: Tensor
    stage: str = ""
    target: str = "loss"
    method: str = ""

    def __post_init__(self):
        if self.values.shape != (len(self.query_ids), len(self.ids)):
            raise ValueError(
                f"values {tuple(self.values.shape)} must be ({len(self.query_ids)} queries, "
                f"{len(self.ids)} ids)"
            )
        if not bool(torch.isfinite(self.values).all()):
            bad = (~torch.isfinite(self.values)).nonzero()[0].tolist()
            raise ValueError(
                f"the score of query {bad[0]} and example {bad[1]} is NaN or inf; check curvature "
                "and data"
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, queries) -> "Influence":
        """Some queries' scores: an index, a slice or a list of positions."""
        queries = [int(queries)] if isinstance(queries, numbers.Integral) else queries
        return Influence(
            self.values[queries],
            self.ids,
            self.query_ids[queries],
            self.stage,
            self.target,
            self.method,
        )

    def _ranked(self, k: int, largest: bool) -> Ranking:
        if not 1 <= k <= len(self.ids):
            raise ValueError(f"k={k} must be between 1 and the number of examples, {len(self.ids)}")
        values, positions = self.values.topk(k, dim=1, largest=largest)
        return Ranking(values, positions, self.ids[positions.cpu()])

    def helpful(self, k: int = 5) -> Ranking:
        """Each query's k most helpful examples: those that lower q most (raise it, for a margin)."""
        return self._ranked(k, largest=self.target == "margin")

    def harmful(self, k: int = 5) -> Ranking:
        """Each query's k most harmful examples: those that raise q most (lower it, for a margin)."""
        return self._ranked(k, largest=self.target != "margin")

    def removal_effect(self, indices: Sequence[int]) -> Tensor:
        """Predicted change of each query when the examples at these positions are removed,
        ``(Q,)``: −Σ scores.
        """
        positions = torch.as_tensor(indices).reshape(-1).to(self.values.device)
        whole = (
            len(positions) > 0
            and not positions.is_floating_point()
            and positions.dtype != torch.bool
        )
        if not whole or int(positions.min()) < 0 or int(positions.max()) >= len(self.ids):
            raise ValueError(
                f"indices={indices!r} must be positions between 0 and {len(self.ids) - 1}"
            )
        if len(torch.unique(positions)) != len(positions):
            raise ValueError(f"indices={indices!r} must be different positions")
        return -self.values[:, positions].sum(1)

    def mean(self) -> "Influence":
        """The mean over queries as one row: influence on the average query."""
        row = self.values.mean(0, keepdim=True)
        return Influence(
            row, self.ids, self.query_ids.new_full((1,), -1), self.stage, self.target, self.method
        )

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
        write_tensors(
            path,
            "influence",
            tensors,
            {"stage": self.stage, "target": self.target, "method": self.method},
        )

    @classmethod
    def load(cls, path) -> "Influence":
        """Read what `save` wrote; a cut-off, changed or foreign file raises `SavedFileError`."""
        tensors, facts = read_tensors(path, "influence")
        return cls(tensors["values"], tensors["ids"], tensors["query_ids"], **facts)

    def __repr__(self) -> str:
        queries, examples = self.values.shape
        return (
            f"Influence({queries} queries × {examples} examples of {self.stage!r} on "
            f"{self.target}; {self.method}; {float((self.values > 0).double().mean()):.0%} "
            "positive)"
        )

    def _repr_html_(self) -> str:
        mean, k, more = self.mean(), min(4, len(self.ids)), 1 if self.target == "margin" else -1
        rows = "".join(
            f"<tr><td>{word}</td><td>{int(i)}</td><td>{float(v):+.2e}</td></tr>"
            for word, sign, ranking in (
                ("helpful", more, mean.helpful(k)),
                ("harmful", -more, mean.harmful(k)),
            )
            for v, i in zip(ranking.values[0], ranking.ids[0], strict=True)
            if sign * float(v) > 0  # of few examples, those ranked last are none of the kind
        )
        counted = (
            f"{len(self)} {'query' if len(self) == 1 else 'queries'} × {len(self.ids)} examples"
        )
        title = f"{counted} of stage {html.escape(repr(self.stage))}; mean effect on {html.escape(str(self.target))}"
        caption = f"<caption style='white-space: nowrap'>{title}</caption>"
        return f"<table>{caption}<tr><th></th><th>id</th><th>score</th></tr>{rows}</table>"
