"""`Texts`: labelled texts that keep their ids, before a tokenizer makes `Examples` of them."""

import html
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import listed, numbers_of, shown
from .conversion import to_classes, to_targets
from .examples import Examples

__all__ = ["Texts"]

RATINGS = tuple(range(-4, 5))  # what a rater may answer, from extremely negative on


class Texts:
    """Texts, class labels and identities of a corpus, never shuffled.

    Behaves as `Examples` does: ``texts[3]`` is the pair ``(text, label)``; a slice, a list or a
    boolean / integer tensor gives `Texts` again; ``len`` counts; `select` draws and re-labels.

    Args:
        texts: strings, N of them; none may be blank.
        y: ``(N,)`` integer class labels, or the names of the classes.
        ids: ``(N,)`` integers that name the texts through selections; default ``0 .. N-1``.
        classes: name of each label; default as in `Examples`.
        document: ``(N,)`` integers: which document each text is a part of. Texts of one document
            resemble each other: keep them on one side of a split.
        ratings: ``(N, 9)``: how many people gave each text the rating −4, −3, ..., 4.

    Attributes:
        texts: list of N strings.
        y, ids: int64 tensors ``(N,)``.
        classes: tuple of names, so ``classes[y]`` is what a label means.
        document, ratings: int64 tensors, or None.

    Raises:
        TypeError: ``texts`` is no list of strings, or something else holds no numbers.
        ValueError: there are no texts, one is blank, lengths differ, labels are negative or lack a
            name, ids repeat, or a text has no rating.

    >>> texts = Texts(["a fine film", "dull", "bad"], ["good", "bad", "bad"])
    >>> texts
    Texts(3, classes {'bad': 2, 'good': 1})
    >>> texts.select(("bad",)).ids
    tensor([1, 2])
    """

    def __init__(
        self, texts, y, ids=None, *, classes: Sequence | None = None, document=None, ratings=None
    ):
        self.texts = _strings(texts)
        count = len(self.texts)
        y, classes = to_targets(y, to_classes(classes))
        if y.is_floating_point() or y.shape != (count,):
            raise ValueError(
                f"y has shape {tuple(y.shape)} and {y.dtype}; give one class label for each of "
                f"the {count} texts"
            )
        # The positions in place of inputs, so that labels, ids and selections are as in Examples.
        self._rows = Examples(torch.arange(count), y.cpu(), ids, classes=classes)
        self.document = None if document is None else _whole("document", document, (count,))
        self.ratings = None if ratings is None else _whole("ratings", ratings, (count, 9))
        if ratings is not None and not bool((self.ratings.sum(1) > 0).all()):
            row = int(self.ratings.sum(1).argmin())
            raise ValueError(f"ratings[{row}] counts no rating at all; leave that text out")

    @property
    def y(self) -> Tensor:
        """Class labels, int64 ``(N,)``."""
        return self._rows.y

    @property
    def ids(self) -> Tensor:
        """Identities, int64 ``(N,)``: positions in the original order, also after a selection."""
        return self._rows.ids

    @property
    def classes(self) -> tuple:
        """Name of each label."""
        return self._rows.classes

    @property
    def mean_rating(self) -> Tensor:
        """Mean of the people's ratings, float64 ``(N,)``, from −4 to 4.

        Raises:
            ValueError: the texts were not rated.

        >>> two = Texts(["fine", "odd"], [0, 0], ratings=[[0] * 7 + [3, 1], [5, 0, 0] + [1] * 6])
        >>> two.mean_rating
        tensor([ 3.2500, -1.0000], dtype=torch.float64)
        """
        ratings = self._rated()
        return ratings @ torch.tensor(RATINGS).double() / ratings.sum(1)

    @property
    def certainty(self) -> Tensor:
        """Share of the people whose rating has the sign of the mean rating, float64 ``(N,)``.

        Where the mean is exactly 0 the share that answered 0.

        Raises:
            ValueError: the texts were not rated.

        >>> two = Texts(["fine", "odd"], [0, 0], ratings=[[0] * 7 + [3, 1], [5, 0, 0] + [1] * 6])
        >>> two.certainty
        tensor([1.0000, 0.5455], dtype=torch.float64)
        """
        ratings = self._rated()
        shares = torch.stack([ratings[:, :4].sum(1), ratings[:, 4], ratings[:, 5:].sum(1)], 1)
        sign = (ratings @ torch.tensor(RATINGS).double()).sign().long()  # a sum of whole numbers
        return shares.gather(1, sign[:, None] + 1)[:, 0] / ratings.sum(1)

    def _rated(self) -> Tensor:
        if self.ratings is None:
            raise ValueError("ratings is None: nobody rated these texts; load_reviews() has such")
        return self.ratings.double()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index):
        kept = self._rows[index]
        if isinstance(kept, tuple):  # one position and its label
            return self.texts[int(kept[0])], kept[1]
        return self._part(kept)

    def select(
        self, classes: Sequence | None = None, n: int | None = None, seed: int = 0
    ) -> "Texts":
        """A stratified random part of the texts, re-labelled ``0 .. len(classes)-1`` in this order.

        Args, draws and errors are those of `Examples.select`: the same labels, ``n`` and seed keep
        the same positions.

        >>> Texts(["a", "b", "c", "d"], [0, 1, 1, 0]).select((1, 0), n=2).counts()
        {1: 1, 0: 1}
        """
        return self._part(self._rows.select(classes, n, seed))

    def _part(self, kept: Examples) -> "Texts":
        """The texts at the positions ``kept.x``, with the labels and ids of ``kept``."""
        document, ratings = (
            None if v is None else v[kept.x] for v in (self.document, self.ratings)
        )
        texts = [self.texts[i] for i in kept.x.tolist()]
        return Texts(
            texts, kept.y, kept.ids, classes=kept.classes, document=document, ratings=ratings
        )

    def counts(self) -> dict:
        """How many texts each class has, by its name."""
        return self._rows.counts()

    def __repr__(self) -> str:
        documents = ""
        if self.document is not None:
            documents = f" from {len(self.document.unique())} documents"
        return f"Texts({len(self)}{documents}, classes {self.counts()})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{int(self.ids[i])}</td><td>{html.escape(str(self.classes[self.y[i]]))}</td>"
            f"<td style='text-align:left'>{html.escape(_cut(self.texts[i]))}</td></tr>"
            for i in range(min(5, len(self)))
        )
        caption = f"<caption>{html.escape(repr(self))}</caption>"
        return f"<table>{caption}<tr><th>id</th><th>class</th><th>text</th></tr>{rows}</table>"


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _strings(texts) -> list[str]:
    found = listed("texts", texts, "a list of strings, one for each text")
    if not found:
        raise ValueError(f"texts={shown(texts)} is empty; give at least one text")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}]={shown(text)} is {type(text).__name__}, not a string")
        if not text.strip():
            raise ValueError(f"texts[{i}]={shown(text)} is blank; leave it and its label out")
    return found


def _whole(name: str, value, shape: tuple[int, ...]) -> Tensor:
    """Whole numbers from 0 on, int64 on the CPU."""
    found = numbers_of(name, value, f"whole numbers of shape {shape}").cpu()
    odd = found.is_floating_point() or found.is_complex() or found.dtype == torch.bool
    if odd or found.shape != shape:
        raise ValueError(
            f"{name}={shown(value)} has shape {tuple(found.shape)} and {found.dtype}; give whole "
            f"numbers of shape {shape}"
        )
    if found.numel() and int(found.min()) < 0:
        raise ValueError(f"{name}={shown(value)} holds the negative {int(found.min())}")
    return found.to(torch.int64)
