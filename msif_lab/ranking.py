"""Who comes first: rankings of examples, and the two ends of rankings too long to keep."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ranking", "TopInfluence", "detection", "rank_stream"]


class Ranking(NamedTuple):
    """The first k examples of each query, ``(Q, k)`` each: scores, positions in the stage's data, and ids."""

    values: Tensor
    positions: Tensor
    ids: Tensor


@dataclass
class TopInfluence:
    """The k lowest and k highest scores of each query: what `ImplicitInfluence.score` gives with ``top=k``.

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
            raise ValueError(f"k={k} must be between 1 and the {most} that were kept; score with top={k}")
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
            f"TopInfluence({len(self)} queries × {k} most helpful and {k} most harmful of {self.examples} examples of "
            f"{self.stage!r} on {self.target}; {self.method})"
        )


def rank_stream(chunks: Iterable[tuple[slice, Tensor]], k: int, ids: Tensor) -> tuple[Ranking, Ranking]:
    """Lowest and highest k of each row of ``(Q, N)`` values that come as ``(positions, (Q, B))``; holds 4k a row.

    Raises:
        ValueError: NaN or inf among them.
    """
    kept: dict[bool, tuple[Tensor, Tensor]] = {}
    for rows, values in chunks:
        if not bool(torch.isfinite(values).all()):
            query, place = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(f"the score of query {query} and example {rows.start + place} is NaN or inf; check data")
        here = torch.arange(rows.start, rows.stop, device=values.device).expand(len(values), -1)
        for largest in (False, True):
            before = kept.get(largest, (values[:, :0], here[:, :0]))
            both = torch.cat([before[0], values], 1), torch.cat([before[1], here], 1)
            best, order = both[0].topk(min(k, both[0].shape[1]), dim=1, largest=largest)
            kept[largest] = best, both[1].gather(1, order)
    return tuple(Ranking(*kept[largest], ids[kept[largest][1].cpu()]) for largest in (False, True))


def detection(order: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of flagging the first 1, 2, ... N of a ranking, ``(N,)`` each.

    Args:
        order: all N positions, the most suspicious first.
        truth: ``(N,)`` mask of those that should be found.

    Raises:
        ValueError: not a ranking of all, or nothing to find.

    >>> detection(torch.tensor([2, 0, 1]), torch.tensor([False, True, True]))
    (tensor([1.0000, 0.5000, 0.6667]), tensor([0.5000, 0.5000, 1.0000]))
    """
    order, truth = torch.as_tensor(order).cpu(), torch.as_tensor(truth).cpu()
    if truth.dtype != torch.bool or truth.ndim != 1 or not bool(truth.any()):
        raise ValueError(
            f"truth is {truth.dtype} of shape {tuple(truth.shape)}: a mask with something to find is needed"
        )
    if not torch.equal(order.sort().values, torch.arange(len(truth))):
        raise ValueError(f"order of shape {tuple(order.shape)} must rank the {len(truth)} examples, each once")
    found = truth[order].cumsum(0).to(torch.get_default_dtype())
    return found / torch.arange(1, len(truth) + 1), found / int(truth.sum())
