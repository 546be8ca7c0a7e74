"""`Examples`: labelled data that keep their identity, in memory or read when needed."""

import numbers
import operator
from collections.abc import Iterable, Sequence

import torch

from ..storage import digest

__all__ = ["Examples", "Inputs"]


class Inputs:
    """The inputs of a map-style `torch.utils.data.Dataset`, read when asked for: ``inputs[3:9]`` is
    a tensor.

    Has what the library needs of a tensor ``(N, ...)``: ``len``, ``shape``, ``dtype``, ``device``,
    indexing by an integer, a slice or positions, ``to``. Made by `Examples.from_dataset`.
    """

    def __init__(self, dataset, positions: torch.Tensor, like: torch.Tensor, targets: tuple = ()):
        self.dataset, self.positions, self._targets = dataset, positions, targets
        self._like = like
        moved = _move(like, targets)
        self.shape, self.dtype, self.device = (
            (len(positions), *like.shape),
            moved.dtype,
            moved.device,
        )
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.positions)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def element_size(self) -> int:
        return self._like.new_empty(0, dtype=self.dtype).element_size()

    def select(self, keep: torch.Tensor) -> "Inputs":
        """Only these positions, still unread."""
        return Inputs(self.dataset, self.positions[keep.cpu()], self._like, self._targets)

    def to(self, *targets) -> "Inputs":
        """Moved and / or converted as they are read."""
        return Inputs(self.dataset, self.positions, self._like, (*self._targets, *targets))

    def __getitem__(self, index) -> torch.Tensor:
        index = index.cpu() if isinstance(index, torch.Tensor) else index
        places = self.positions[index]
        if places.ndim == 0:
            return _move(read_item(self.dataset, int(places), self._like)[0], self._targets)
        items = [read_item(self.dataset, i, self._like)[0] for i in places.tolist()]
        return _move(
            torch.stack(items) if items else self._like.new_empty(0, *self._like.shape),
            self._targets,
        )


def _move(values, targets: Iterable):
    for target in targets:
        if not isinstance(target, torch.dtype) or values.is_floating_point():
            values = values.to(target)
    return values


def read_item(
    dataset, i: int, like: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The checked pair ``(x, y)`` of item i, its input of the shape and dtype of ``like``.

    Raises:
        TypeError: the item is no pair of tensors, arrays or numbers.
        ValueError: another shape or dtype than the first item's, NaN or inf.
    """
    item = dataset[i]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"dataset[{i}] is {type(item).__name__}, not a pair (input, target); wrap the data "
            "set so it is"
        )
    try:
        x, y = map(torch.as_tensor, item)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = ", ".join(type(part).__name__ for part in item)
        raise TypeError(
            f"dataset[{i}] is ({kinds}); input and target must be tensors, arrays or numbers, "
            "e.g. transform=torchvision.transforms.ToTensor()"
        ) from error
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype):
        raise ValueError(
            f"the input of dataset[{i}] is {tuple(x.shape)} {x.dtype}, that of dataset[0] "
            f"{tuple(like.shape)} {like.dtype}; resize or convert in the data set's transform"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"the input of dataset[{i}] holds NaN or inf; remove or repair it")
    return x, y


class Examples:
    """Inputs, targets and identities of a data set, all in memory and never shuffled.

    Behaves as a PyTorch map-style data set: ``examples[3]`` is the pair ``(x, y)``, a slice, a list
    or a boolean / integer tensor gives `Examples` again, and ``len`` counts.

    Args:
        x: inputs, ``(N, ...)``; a tensor or array. Floating inputs must be finite.
        y: targets, ``(N,)`` integer class labels, or ``(N, ...)`` floating targets for regression.
        ids: ``(N,)`` integers that name the examples through selections; default ``0 .. N-1``.
        classes: original name of each label, so ``classes[y]`` is what the label meant before
            `select` re-indexed it; default: the label itself.

    Raises:
        ValueError: lengths differ, nothing is in it, NaN or inf, negative labels, repeated ids.

    >>> Examples([[0.0], [1.0], [2.0]], [0, 1, 1]).select(classes=(1,)).ids
    tensor([1, 2])
    """

    def __init__(self, x, y, ids=None, *, classes: Sequence | None = None):
        self.x, self.y = x if isinstance(x, Inputs) else torch.as_tensor(x), torch.as_tensor(y)
        self.y = self.y if self.y.is_floating_point() else self.y.to(torch.int64)
        if self.x.ndim == 0 or self.y.ndim == 0 or len(self.x) == 0:
            raise ValueError(
                f"x {tuple(self.x.shape)} and y {tuple(self.y.shape)} must hold at least one "
                "example"
            )
        if len(self.x) != len(self.y):
            raise ValueError(
                f"x holds {len(self.x)} examples but y holds {len(self.y)}; they must be equal"
            )
        for name, values in (("x", self.x), ("y", self.y)):
            # In blocks: the check of all at once takes more memory than a large data set itself.
            if isinstance(values, Inputs):
                continue  # checked as they are read
            if values.is_floating_point() and not all(
                bool(torch.isfinite(v).all()) for v in values.split(4096)
            ):
                bad = (
                    (~torch.isfinite(values))
                    .reshape(len(values), -1)
                    .any(1)
                    .nonzero()[:5]
                    .flatten()
                    .tolist()
                )
                raise ValueError(
                    f"{name} holds NaN or inf, first at positions {bad}; remove or repair those "
                    "examples"
                )
        if self.has_labels and int(self.y.min()) < 0:
            raise ValueError(
                f"y holds the negative label {int(self.y.min())}; labels are 0 .. classes-1"
            )
        self.ids = torch.arange(len(self.x)) if ids is None else torch.as_tensor(ids).cpu()
        if self.ids.is_floating_point():
            raise ValueError(f"ids are {self.ids.dtype}, but must be integers, one per example")
        self.ids = self.ids.to(torch.int64)
        if self.ids.shape != (len(self.x),):
            raise ValueError(
                f"ids has shape {tuple(self.ids.shape)}, expected ({len(self.x)},), one per example"
            )
        if len(torch.unique(self.ids)) != len(self.ids):
            raise ValueError("ids must be unique; they name the examples in every result")
        self.named = classes is not None  # else the labels mean whatever the user says they mean
        self.classes = None if classes is None else tuple(classes)
        if self.has_labels:
            count = int(self.y.max()) + 1
            self.classes = tuple(range(count)) if self.classes is None else self.classes
            if count > len(self.classes):
                raise ValueError(
                    f"y holds the label {count - 1} but classes names only {len(self.classes)} "
                    "labels"
                )

    @classmethod
    def from_dataset(cls, dataset, targets=None, *, classes: Sequence | None = None) -> "Examples":
        """Examples of a map-style data set that need not fit in memory: inputs are read when
        needed, never kept.

        Every stage, score and baseline takes them chunk by chunk; ``.x`` is an `Inputs`. Subsets by
        index or `select`, and `to`, stay unread. Targets are small and stay in memory.

        Args:
            dataset: ``len(dataset)`` and ``dataset[i] -> (input, target)``, the same at every call:
                no random augmentation.
            targets: ``(N,)`` of all items, if they are at hand; otherwise every item is read once
                for its own.
            classes: as in `Examples`.

        Raises:
            TypeError: no length or no indexing (an iterable data set), or items that are no pairs
                of numbers.
            ValueError: empty, inputs of different shapes, NaN, or another input at the second
                reading.

        >>> images = torch.utils.data.TensorDataset(torch.zeros(5, 1, 8, 8), torch.tensor([0, 1, 1, 0, 1]))
        >>> Examples.from_dataset(images)
        Examples(5 × (1, 8, 8) float32, classes {0: 2, 1: 3}, read when needed)
        """
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"dataset={type(dataset).__name__} has no length or indexing; only map-style data "
                "sets keep the identity of their examples: define __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise ValueError("dataset is empty")
        like, again = read_item(dataset, 0)[0], read_item(dataset, 0)[0]
        if not torch.equal(like, again):
            raise ValueError(
                "dataset[0] is another input at the second reading; influence needs fixed "
                "examples, so take random augmentation out of the transform"
            )
        if targets is None:
            targets = torch.stack([read_item(dataset, i, like)[1] for i in range(len(dataset))])
        return cls(
            Inputs(dataset, torch.arange(len(dataset)), like.new_zeros(like.shape)),
            targets,
            classes=classes,
        )

    def digest(self) -> str:
        """SHA-256 of inputs, targets and ids: same digest, same examples."""
        if not isinstance(self.x, Inputs):
            return digest(self.x, self.y, self.ids)
        parts = [digest(self.x[i : i + 256]) for i in range(0, len(self), 256)]
        return digest(
            torch.frombuffer(bytearray("".join(parts).encode()), dtype=torch.uint8),
            self.y,
            self.ids,
        )

    @property
    def has_labels(self) -> bool:
        """True when the targets are class labels: one integer per example."""
        return self.y.ndim == 1 and not self.y.is_floating_point()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        if (
            not isinstance(index, slice)
            and getattr(index, "ndim", 0) == 0
            and hasattr(index, "__index__")
        ):
            return self.x[operator.index(index)], self.y[operator.index(index)]
        if isinstance(index, slice):
            keep = torch.arange(len(self))[index]
        else:
            keep = torch.as_tensor(index)
            keep = (
                keep.nonzero().flatten()
                if keep.dtype == torch.bool and keep.shape == (len(self),)
                else keep
            )
        if keep.dtype != torch.int64 or keep.ndim != 1 or len(keep) == 0:
            raise ValueError(
                f"index selects {tuple(keep.shape)} of {keep.dtype}: give a non-empty list of "
                "positions"
            )
        if int(keep.min()) < -len(self) or int(keep.max()) >= len(self):
            worst = int(keep.max()) if int(keep.max()) >= len(self) else int(keep.min())
            raise IndexError(f"index {worst} is out of range: there are {len(self)} examples")
        keep = keep.to(self.x.device)
        return self._with(self._pick(keep), self.y[keep], self.ids[keep.cpu()])

    def _pick(self, keep: torch.Tensor):
        return self.x.select(keep) if isinstance(self.x, Inputs) else self.x[keep]

    def _with(self, x, y, ids) -> "Examples":
        new = Examples(x, y, ids, classes=self.classes)
        new.named = self.named
        return new

    def select(
        self, classes: Sequence | None = None, n: int | None = None, seed: int = 0
    ) -> "Examples":
        """A stratified random part of the data; labels become ``0 .. len(classes)-1`` in the given
        order.

        Args:
            classes: which of `self.classes` to keep, numbers or names as they are there, e.g.
                ``(4, 9)`` or ``("bird", "frog")``; default all.
            n: how many examples in all, spread over the classes as evenly as they allow (the first
                classes get the remainder); default every example of these classes.
            seed: draws the examples; the same seed gives the same ones, in the order of the data.

        Raises:
            ValueError: an unknown or repeated class, or a class with too few examples.
        """
        if not self.has_labels:
            raise ValueError(
                f"select needs class labels, but y has shape {tuple(self.y.shape)} and "
                f"{self.y.dtype}"
            )
        if isinstance(classes, str) or (classes is not None and not isinstance(classes, Iterable)):
            raise TypeError(
                f"classes={classes!r} must be a sequence of {self.classes}, e.g. ({classes!r},)"
            )
        if n is not None and not isinstance(n, numbers.Integral):
            raise TypeError(f"n={n!r} must be a whole number")
        wanted = self.classes if classes is None else tuple(classes)
        unknown = [c for c in wanted if c not in self.classes]
        if unknown or not wanted or len(set(wanted)) != len(wanted):
            raise ValueError(
                f"classes={wanted} must be different ones of {self.classes}; unknown: {unknown}"
            )
        if n is not None and n < len(wanted):
            raise ValueError(
                f"n={n} leaves a class empty: at least {len(wanted)}, one per class, are needed"
            )
        generator = torch.Generator().manual_seed(seed)
        labels, kept, new_labels = self.y.cpu(), [], []
        for position, name in enumerate(wanted):
            members = (labels == self.classes.index(name)).nonzero().flatten()
            count = len(members) if n is None else n // len(wanted) + (position < n % len(wanted))
            if not len(members):
                raise ValueError(f"class {name!r} has no examples here; leave it out of classes=")
            if len(members) < count:
                raise ValueError(
                    f"class {name!r} has {len(members)} examples, {count} are wanted; lower n={n}"
                )
            kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
            new_labels.append(torch.full((count,), position))
        order = torch.argsort(torch.cat(kept))
        keep, new_y = torch.cat(kept)[order], torch.cat(new_labels)[order]
        device = self.x.device
        return Examples(
            self._pick(keep.to(device)), new_y.to(device), self.ids[keep], classes=wanted
        )

    def to(self, *targets: torch.device | torch.dtype | str) -> "Examples":
        """A copy on another device and / or with inputs (and floating targets) in another floating
        dtype.
        """

        x = self.x.to(*targets) if isinstance(self.x, Inputs) else _move(self.x, targets)
        return self._with(x, _move(self.y, targets), self.ids)

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
        return f"Examples({len(self)} × {tuple(self.x.shape[1:])} {str(self.x.dtype).removeprefix('torch.')}, {about})"

    def _repr_html_(self) -> str:
        if not self.has_labels:
            return f"<code>{self!r}</code>"
        cells = [(name, str(count)) for name, count in self.counts().items()][:10]
        head, row = (
            "".join(f"<t{k}>{c[i]}</t{k}>" for c in cells) for i, k in ((0, "h"), (1, "d"))
        )
        shape = " × ".join(map(str, self.x.shape[1:]))
        return f"<table><caption>{len(self)} examples, {shape}</caption><tr>{head}</tr><tr>{row}</tr></table>"
