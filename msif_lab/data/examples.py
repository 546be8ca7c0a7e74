"""`Examples`: data that keep their ids, with inputs in memory or read when needed."""

import html
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..storage import digest
from .fields import Fields, move
from .randomness import draws_from

__all__ = ["Examples", "Inputs"]


class Inputs:
    """The inputs of a map-style `torch.utils.data.Dataset`, read only when they are indexed.

    Offers what the library needs of a tensor ``(N, ...)``: ``len``, ``shape``, ``dtype``,
    ``device``, ``to``, and indexing by an integer, a slice or positions, so ``inputs[3:9]`` is a
    tensor. Made by `Examples.from_dataset`.
    """

    def __init__(self, dataset, positions: Tensor, like: Tensor, targets: tuple = ()):
        self.dataset = dataset
        self.positions = positions
        self._like = like
        self._targets = targets  # of `to`, applied to whatever is read
        moved = move(like, targets)
        self.shape = (len(positions), *like.shape)
        self.dtype = moved.dtype
        self.device = moved.device
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.positions)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def element_size(self) -> int:
        return self._like.new_empty(0, dtype=self.dtype).element_size()

    def select(self, keep: Tensor) -> "Inputs":
        """The inputs at these positions, still unread."""
        return Inputs(self.dataset, self.positions[keep.cpu()], self._like, self._targets)

    def to(self, *targets) -> "Inputs":
        """The same inputs, moved and / or converted when they are read."""
        return Inputs(self.dataset, self.positions, self._like, (*self._targets, *targets))

    def __getitem__(self, index) -> Tensor:
        index = index.cpu() if isinstance(index, Tensor) else index
        places = self.positions[index]
        if places.ndim == 0:
            return move(read_item(self.dataset, int(places), self._like)[0], self._targets)
        items = [read_item(self.dataset, i, self._like)[0] for i in places.tolist()]
        stacked = torch.stack(items) if items else self._like.new_empty(0, *self._like.shape)
        return move(stacked, self._targets)


def read_item(dataset, i: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The checked pair ``(x, y)`` of item i; x must have the shape and dtype of ``like``.

    Raises:
        TypeError: the item is not a pair of tensors, arrays or numbers.
        ValueError: the input differs from the first in shape or dtype, or holds NaN or inf.
    """
    item = dataset[i]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"dataset[{i}] is {type(item).__name__}, not a pair (input, target); "
            "wrap the data set so it is"
        )
    try:
        x, y = map(torch.as_tensor, item)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(type(part).__name__ for part in item)
        raise TypeError(
            f"dataset[{i}] is ({kinds}); input and target must be tensors, arrays or numbers, "
            "e.g. with transform=torchvision.transforms.ToTensor()"
        ) from error
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype):
        raise ValueError(
            f"the input of dataset[{i}] is {tuple(x.shape)} {x.dtype}, "
            f"that of dataset[0] {tuple(like.shape)} {like.dtype}; "
            "resize or convert in the data set's transform"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"the input of dataset[{i}] holds NaN or inf; remove or repair it")
    return x, y


def _fixed_like(dataset, with_targets: bool) -> Tensor:
    """The first input; refuses data sets whose items change from reading to reading, or draw."""
    last = len(dataset) - 1
    few = sorted({round(i * last / 4) for i in range(5)})
    readings: list[list[tuple[Tensor, Tensor]]] = []

    def read() -> None:
        first = read_item(dataset, 0)
        readings.append([first, *(read_item(dataset, i, first[0]) for i in few[1:])])

    drawn = draws_from(read, [dataset])
    way_out = "influence needs fixed examples, so take random augmentation out of the transform"
    for pairs in readings[1:]:
        for i, (x, y), (x_again, y_again) in zip(few, readings[0], pairs, strict=True):
            if not _equal(x, x_again):
                raise ValueError(f"dataset[{i}] is another input at the second reading; {way_out}")
            if with_targets and not _equal(y, y_again):
                raise ValueError(f"dataset[{i}] is another target at the second reading; {way_out}")
    if drawn:
        raise ValueError(
            f"reading an item draws from {' and '.join(drawn)}, so items may change from reading "
            f"to reading; {way_out}, or draw it once and keep what it gave"
        )
    return readings[0][0][0]


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _require_finite(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        return
    # In blocks: a check of everything at once takes more memory than a large data set itself.
    if all(bool(torch.isfinite(block).all()) for block in values.split(4096)):
        return
    not_finite = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
    bad = not_finite.nonzero()[:5].flatten().tolist()
    raise ValueError(
        f"{name} holds NaN or inf, first at positions {bad}; remove or repair those examples"
    )


def _tensors(x: Tensor | Fields) -> list[tuple[str, Tensor]]:
    """The tensors that inputs in memory consist of, with the names that messages call them."""
    return [("x", x)] if isinstance(x, Tensor) else [(f"x[{n!r}]", v) for n, v in x.items()]


def _checked_ids(ids, count: int) -> Tensor:
    """Identities as int64 ``(count,)`` on the CPU, by default positions."""
    ids = torch.arange(count) if ids is None else torch.as_tensor(ids).cpu()
    if ids.is_floating_point():
        raise ValueError(f"ids are {ids.dtype}, but must be integers, one per example")
    ids = ids.to(torch.int64)
    if ids.shape != (count,):
        raise ValueError(f"ids has shape {tuple(ids.shape)}, expected ({count},), one per example")
    if len(torch.unique(ids)) != len(ids):
        raise ValueError("ids must be unique; they name the examples in every result")
    return ids


class Examples:
    """Inputs, targets and identities of a data set, never shuffled.

    Behaves as a PyTorch map-style data set: ``examples[3]`` is the pair ``(x, y)``; a slice, a list
    or a boolean / integer tensor gives `Examples` again; ``len`` counts. Inputs are a tensor in
    memory or, from `from_dataset`, `Inputs` that are read when needed.

    Args:
        x: inputs, ``(N, ...)``; a tensor, an array, a dictionary of them (see `Fields`) or
            `Inputs`. Floating inputs must be finite.
        y: targets, ``(N,)`` integer class labels, or ``(N, ...)`` floating targets for regression.
        ids: ``(N,)`` integers that name the examples through selections; default ``0 .. N-1``.
        classes: original name of each label, so ``classes[y]`` is what the label meant before
            `select` re-indexed it; default: the label itself.

    Raises:
        ValueError: there are no examples, lengths differ, values are NaN or inf, labels are
            negative or lack a name, or ids repeat.

    >>> Examples([[0.0], [1.0], [2.0]], [0, 1, 1]).select(classes=(1,)).ids
    tensor([1, 2])
    """

    def __init__(self, x, y, ids=None, *, classes: Sequence | None = None):
        x = Fields(x) if isinstance(x, Mapping) else x
        self.x = x if isinstance(x, (Fields, Inputs)) else torch.as_tensor(x)
        self.y = torch.as_tensor(y)
        self.y = self.y if self.y.is_floating_point() else self.y.to(torch.int64)
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) == 0:
            raise ValueError(
                f"x {tuple(self.x.shape)} and y {tuple(self.y.shape)} "
                "must hold at least one example"
            )
        if len(self.x) != len(self.y):
            raise ValueError(
                f"x holds {len(self.x)} examples but y holds {len(self.y)}; they must be equal"
            )
        if not isinstance(self.x, Inputs):  # those are checked as they are read
            for name, values in _tensors(self.x):
                _require_finite(name, values)
        _require_finite("y", self.y)
        if self.has_labels and int(self.y.min()) < 0:
            raise ValueError(
                f"y holds the negative label {int(self.y.min())}; labels are 0 .. classes-1"
            )
        self.ids = _checked_ids(ids, len(self.x))
        self.named = classes is not None  # else the labels mean whatever the user says they mean
        self.classes = None if classes is None else tuple(classes)
        if self.has_labels:
            count = int(self.y.max()) + 1
            self.classes = tuple(range(count)) if self.classes is None else self.classes
            if count > len(self.classes):
                raise ValueError(
                    f"y holds the label {count - 1} "
                    f"but classes names only {len(self.classes)} labels"
                )

    @classmethod
    def from_dataset(cls, dataset, targets=None, *, classes: Sequence | None = None) -> "Examples":
        """Examples of a map-style data set whose inputs are read when needed and never kept.

        The data set need not fit in memory: every stage, score and baseline takes it chunk by
        chunk. ``.x`` is an `Inputs`; selecting by index or `select`, and `to`, read nothing.
        Targets are small and stay in memory.

        Args:
            dataset: has ``len(dataset)`` and ``dataset[i] -> (input, target)``, the same at every
                call: no random augmentation.
            targets: ``(N,)``, the targets of all items, if they are at hand; otherwise every item
                is read once for its target.
            classes: as in `Examples`.

        Raises:
            TypeError: no length or no indexing (an iterable data set), or items that are not pairs
                of numbers.
            ValueError: the data set is empty, inputs differ in shape or hold NaN, or some of a few
                items are different when read again or draw random numbers.

        >>> labels = torch.tensor([0, 1, 1, 0, 1])
        >>> images = torch.utils.data.TensorDataset(torch.zeros(5, 1, 8, 8), labels)
        >>> Examples.from_dataset(images)
        Examples(5 × (1, 8, 8) float32, classes {0: 2, 1: 3}, read when needed)
        """
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset={type(dataset).__name__} has no length or indexing; "
                "only map-style data sets keep the identity of their examples: "
                "define __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise ValueError("dataset is empty")
        like = _fixed_like(dataset, targets is None)
        if targets is None:
            targets = torch.stack([read_item(dataset, i, like)[1] for i in range(len(dataset))])
        inputs = Inputs(dataset, torch.arange(len(dataset)), like.new_zeros(like.shape))
        return cls(inputs, targets, classes=classes)

    def digest(self) -> str:
        """SHA-256 of inputs, targets and ids: same digest, same examples."""
        if isinstance(self.x, Tensor):
            return digest(self.x, self.y, self.ids)
        if isinstance(self.x, Fields):
            parts = [name + digest(values) for name, values in self.x.items()]
        else:
            parts = [digest(self.x[i : i + 256]) for i in range(0, len(self), 256)]
        inputs = torch.frombuffer(bytearray("".join(parts).encode()), dtype=torch.uint8)
        return digest(inputs, self.y, self.ids)

    @property
    def has_labels(self) -> bool:
        """True when the targets are class labels: one integer per example."""
        return self.y.ndim == 1 and not self.y.is_floating_point()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        # Tensors of one element have __index__ too, whatever their shape.
        if getattr(index, "ndim", 0) == 0 and hasattr(index, "__index__"):
            i = operator.index(index)
            return self.x[i], self.y[i]
        if isinstance(index, slice):
            keep = torch.arange(len(self))[index]
        else:
            keep = torch.as_tensor(index)
            if keep.dtype == torch.bool and keep.shape == (len(self),):
                keep = keep.nonzero().flatten()
        if keep.dtype != torch.int64 or keep.ndim != 1 or len(keep) == 0:
            raise ValueError(
                f"index selects {tuple(keep.shape)} of {keep.dtype}: "
                "give a non-empty list of positions"
            )
        lowest = int(keep.min())
        highest = int(keep.max())
        if lowest < -len(self) or highest >= len(self):
            worst = highest if highest >= len(self) else lowest
            raise IndexError(f"index {worst} is out of range: there are {len(self)} examples")
        keep = keep.to(self.x.device)
        return self._with(self._pick(keep), self.y[keep], self.ids[keep.cpu()])

    def _pick(self, keep: Tensor):
        return self.x.select(keep) if isinstance(self.x, Inputs) else self.x[keep]

    def _with(self, x, y, ids) -> "Examples":
        new = Examples(x, y, ids, classes=self.classes)
        new.named = self.named
        return new

    def select(
        self, classes: Sequence | None = None, n: int | None = None, seed: int = 0
    ) -> "Examples":
        """A stratified random part of the data, re-labelled ``0 .. len(classes)-1`` in this order.

        Args:
            classes: which of `self.classes` to keep, numbers or names as they are there, e.g.
                ``(4, 9)`` or ``("bird", "frog")``; default all.
            n: how many examples in all, the same number of each class, and one more of the first
                classes where that leaves a remainder; default every example of these classes.
            seed: draws the examples; the same seed gives the same ones, in the order of the data.

        Raises:
            ValueError: an unknown or repeated class, or a class with too few examples.
        """
        wanted = self._checked_classes(classes)
        if n is not None and not isinstance(n, numbers.Integral):
            raise TypeError(f"n={n!r} must be a whole number")
        if n is not None and n < len(wanted):
            raise ValueError(
                f"n={n} leaves a class empty: at least {len(wanted)}, one per class, are needed"
            )
        generator = torch.Generator().manual_seed(seed)
        labels = self.y.cpu()
        kept: list[Tensor] = []
        new_labels: list[Tensor] = []
        for position, name in enumerate(wanted):
            members = (labels == self.classes.index(name)).nonzero().flatten()
            # The first classes get the remainder.
            count = len(members) if n is None else n // len(wanted) + (position < n % len(wanted))
            if not len(members):
                raise ValueError(f"class {name!r} has no examples here; leave it out of classes=")
            if len(members) < count:
                raise ValueError(
                    f"class {name!r} has {len(members)} examples, {count} are wanted; lower n={n}"
                )
            drawn = torch.randperm(len(members), generator=generator)[:count]
            kept.append(members[drawn])
            new_labels.append(torch.full((count,), position))
        order = torch.argsort(torch.cat(kept))
        keep = torch.cat(kept)[order]
        new_y = torch.cat(new_labels)[order]
        device = self.x.device
        x = self._pick(keep.to(device))
        return Examples(x, new_y.to(device), self.ids[keep], classes=wanted)

    def _checked_classes(self, classes: Sequence | None) -> tuple:
        """The classes that `select` is to keep, as they are in ``self.classes``."""
        if not self.has_labels:
            raise ValueError(
                "select needs class labels, "
                f"but y has shape {tuple(self.y.shape)} and {self.y.dtype}"
            )
        if isinstance(classes, str) or (classes is not None and not isinstance(classes, Iterable)):
            raise TypeError(
                f"classes={classes!r} must be a sequence of {self.classes}, e.g. ({classes!r},)"
            )
        wanted = self.classes if classes is None else tuple(classes)
        unknown = [c for c in wanted if c not in self.classes]
        if unknown or not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(
                f"classes={wanted} must be different ones of {self.classes}; unknown: {unknown}"
            )
        return wanted

    def to(self, *targets: torch.device | torch.dtype | str) -> "Examples":
        """A copy on another device and / or in another floating dtype; labels stay integers."""
        x = move(self.x, targets) if isinstance(self.x, Tensor) else self.x.to(*targets)
        return self._with(x, move(self.y, targets), self.ids)

    def double(self) -> "Examples":
        """A copy with float64 inputs."""
        return self.to(torch.float64)

    def counts(self) -> dict:
        """How many examples each class has, by its original name."""
        found = torch.bincount(self.y.cpu(), minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, found, strict=False))

    def __repr__(self) -> str:
        about = (
            f"classes {self.counts()}" if self.has_labels else f"targets {tuple(self.y.shape[1:])}"
        )
        about += ", read when needed" if isinstance(self.x, Inputs) else ""
        dtype = str(self.x.dtype).removeprefix("torch.")
        inputs = f"{tuple(self.x.shape[1:])} {dtype}"
        if isinstance(self.x, Fields):
            inputs = repr(self.x[0])
        return f"Examples({len(self)} × {inputs}, {about})"

    def _repr_html_(self) -> str:
        if not self.has_labels:
            return f"<code>{html.escape(repr(self))}</code>"
        counts = list(self.counts().items())[:10]
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name, _ in counts)
        row = "".join(f"<td>{count}</td>" for _, count in counts)
        shape = " × ".join(map(str, self.x.shape[1:]))
        caption = f"<caption>{len(self)} examples, {shape}</caption>"
        return f"<table>{caption}<tr>{head}</tr><tr>{row}</tr></table>"


def unequal(examples: Examples, count: int = 5, among: int = 32) -> Tensor:
    """Positions of a few examples that differ as much as possible, in inputs and in targets.

    A check on equal examples sees nothing: mixing or swapping them gives the right numbers.
    Farthest first, among candidates spread over the data.

    Args:
        examples: the data.
        count: how many positions at most.
        among: how many candidates are read.

    >>> unequal(Examples([[0.0], [0.0], [0.0], [7.0]], [0, 0, 1, 0]), count=3)
    tensor([2, 3, 0])
    """
    last = len(examples) - 1
    spread = torch.linspace(0, last, min(among, last + 1), dtype=torch.float64).round().long()
    at = spread.to(examples.x.device)
    distance = _distances(examples.y[at])
    for _, values in _tensors(examples.x[at]):
        distance = distance + _distances(values)
    chosen = [int(distance.sum(1).argmax())]
    while len(chosen) < min(count, len(spread)):
        gap = distance[:, chosen].amin(1)
        gap[chosen] = -1.0
        chosen.append(int(gap.argmax()))
    return spread[chosen]


def _distances(values: Tensor) -> Tensor:
    """Distances between rows, in units of the largest, ``(N, N)``."""
    rows = values.detach().reshape(len(values), -1).cpu().to(torch.float32)
    gaps = torch.stack([(rows - row).norm(dim=1) for row in rows])
    return gaps / gaps.max().clamp(min=torch.finfo(gaps.dtype).tiny)
