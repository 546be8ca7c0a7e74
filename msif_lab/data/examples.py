"""`Examples`: data that keep their ids, with inputs in memory or read when needed."""

import html
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..arguments import check_seed, check_whole, numbers_of, shown
from ..storage import digest
from .conversion import (
    MOST_CLASSES,
    require_same_index,
    to_classes,
    to_ids,
    to_inputs,
    to_targets,
)
from .fields import Fields, check_targets, move
from .inputs import Inputs, check_dataset, fixed_like, read_many
from .tensors import require_finite

__all__ = ["Examples", "Inputs"]


def _tensors(x: Tensor | Fields) -> list[tuple[str, Tensor]]:
    """The tensors that inputs in memory consist of, with the names that messages call them."""
    return [("x", x)] if isinstance(x, Tensor) else [(f"x[{n!r}]", v) for n, v in x.items()]


class Examples:
    """Inputs, targets and identities of a data set, never shuffled.

    Inputs may be a tensor, an array, nested lists, or a list of equal tensors or arrays; a pandas
    frame of numbers, column by column; a list of PIL images (L or RGB, of one size), which become
    ``(N, C, H, W)`` in [0, 1] as torchvision's ToTensor makes them; a dictionary of these or a
    tokenizer's output, and a list of one dictionary per example (see `Fields`); a list of
    sequences of different lengths, which are padded with a mask (see `Fields.pad`).

    Behaves as a PyTorch map-style data set: ``examples[3]`` is the pair ``(x, y)``; a slice, a list
    or a boolean / integer tensor gives `Examples` again; ``len`` counts. Inputs are a tensor in
    memory or, from `from_dataset`, `Inputs` that are read when needed.

    Args:
        x: inputs, ``(N, ...)``. Floating inputs must be finite.
        y: targets, ``(N,)`` integer class labels, or ``(N, ...)`` floating targets for regression.
            Text labels, and pandas' categories, become the positions of their names in
            ``classes``.
        ids: ``(N,)`` integers that name the examples through selections; default ``0 .. N-1``,
            also for a pandas frame: pass ``ids=frame.index`` if its index shall count.
        classes: original name of each label, so ``classes[y]`` is what the label meant before
            `select` re-indexed it; default: the label itself, for text labels their names in
            sorted order.

    Raises:
        ValueError, TypeError: there are no examples, lengths differ, values are NaN or inf, labels
            are negative or lack a name, ids repeat, or something holds no numbers.

    >>> Examples([[0.0], [1.0], [2.0]], [0, 1, 1]).select(classes=(1,)).ids
    tensor([1, 2])
    >>> Examples([[0.0], [1.0], [2.0]], ["owl", "cat", "owl"])
    Examples(3 × (1,) float32, classes {'cat': 1, 'owl': 2})
    >>> Examples([[7, 8], [9]], [0, 1]).x["attention_mask"]
    tensor([[1, 1],
            [1, 0]])
    """

    def __init__(self, x, y, ids=None, *, classes: Sequence | None = None):
        require_same_index(x, y)
        self.x = x if isinstance(x, (Fields, Inputs)) else to_inputs(x)
        self.y, self.classes = to_targets(y, to_classes(classes))
        self.named = self.classes is not None  # else labels mean whatever the user says they mean
        for name, given, held in (("x", x, self.x), ("y", y, self.y)):
            if held.ndim == 0:
                raise ValueError(f"{name}={shown(given)} is one number; give one row per example")
        if len(self.x) == 0:
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
                require_finite(name, values)
        require_finite("y", self.y)
        if self.has_labels and int(self.y.min()) < 0:
            raise ValueError(
                f"y holds the negative label {int(self.y.min())}; labels are 0 .. classes-1. "
                "Leave out examples without a label (x[y >= 0], y[y >= 0]); if -1 is a number, "
                "as for a hinge loss, give floating targets: y.float()"
            )
        self.ids = to_ids(ids, len(self.x))
        if self.has_labels:
            count = int(self.y.max()) + 1
            if count > MOST_CLASSES:
                raise ValueError(
                    f"y holds the label {count - 1}; labels are 0 .. classes-1, so number them "
                    "anew: names, y = torch.unique(y, return_inverse=True)"
                )
            self.classes = tuple(range(count)) if self.classes is None else self.classes
            if count > len(self.classes):
                raise ValueError(
                    f"y holds the label {count - 1} "
                    f"but classes names only {len(self.classes)} labels"
                )

    @classmethod
    def from_dataset(
        cls, dataset, targets=None, *, ids=None, workers: int = 0, classes: Sequence | None = None
    ) -> "Examples":
        """Examples of a map-style data set whose inputs are read when needed and never kept.

        The data set need not fit in memory: every stage, score and baseline takes it chunk by
        chunk. ``.x`` is an `Inputs`; selecting by index or `select`, and `to`, read nothing.
        Targets are small and stay in memory. A pipeline notices when files that the data set names
        in its attributes are written to; of what it holds in memory or downloads, when the number
        of items changes or one of the few that checks look at (see `Inputs`).

        Args:
            dataset: has ``len(dataset)`` and ``dataset[i] -> (input, target)``, the same at every
                call: no random augmentation. An input is a tensor, an array, a PIL image or a
                dictionary of tensors (see `Fields`); all have one shape.
            targets: ``(N,)``, the targets of all items, if they are at hand; otherwise every item
                is read once for its target.
            ids, classes: as in `Examples`.
            workers: processes that read items where this takes longer than a moment, each with a
                copy of the data set; 0 for none.

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
        check_dataset(dataset, workers)
        if targets is not None:
            given, _ = to_targets(targets, to_classes(classes), "targets")
            if given.ndim == 0 or len(given) != len(dataset):
                raise ValueError(
                    f"targets={shown(targets)} must hold one target for each of the "
                    f"{len(dataset)} items of dataset"
                )
            require_finite("targets", given)
        like = fixed_like(dataset, targets is None)
        if targets is None:
            targets = read_many(dataset, list(range(len(dataset))), like, workers, part=1)
        like = like.new_zeros(like.shape) if isinstance(like, Tensor) else like
        inputs = Inputs(dataset, torch.arange(len(dataset)), like, workers)
        return cls(inputs, targets, ids, classes=classes)

    def digest(self) -> str:
        """SHA-256 of inputs, targets and ids: same digest, same examples."""
        if isinstance(self.x, Tensor):
            return digest(self.x, self.y, self.ids)
        step = len(self) if isinstance(self.x, Fields) else 256
        chunks = [self.x[i : i + step] for i in range(0, len(self), step)]
        parts = [
            digest(values) if name == "x" else name + digest(values)
            for chunk in chunks
            for name, values in _tensors(chunk)
        ]
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
            if not -len(self) <= i < len(self):
                raise IndexError(f"index {i} is out of range: there are {len(self)} examples")
            x = self.x[i]
            return (dict(x.items()) if isinstance(x, Fields) else x), self.y[i]
        if isinstance(index, slice):
            keep = torch.arange(len(self))[index]
        else:
            keep = numbers_of("index", index, "a position, a slice, or a list of positions")
            if keep.dtype == torch.bool and keep.shape == (len(self),):
                keep = keep.nonzero().flatten()
        if keep.dtype != torch.int64 or keep.ndim != 1 or len(keep) == 0:
            raise ValueError(
                f"index={shown(index)} selects {tuple(keep.shape)} of {keep.dtype}: "
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
        if n is not None and n != 0:
            n = check_whole("n", n, 0, why="one or more for each class")
        if n is not None and n < len(wanted):
            raise ValueError(
                f"n={n} leaves a class empty: at least {len(wanted)}, one per class, are needed"
            )
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
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

    def with_labels(self, y) -> "Examples":
        """The same inputs and ids with other class labels; the inputs are shared, not copied.

        Args:
            y: ``(N,)`` positions in `self.classes`; where the classes are text, also their names.

        Raises:
            ValueError, TypeError: not one label per example, or labels that are none of the
                classes.

        >>> Examples([[0.0], [1.0]], ["owl", "cat"]).with_labels(["owl", "owl"]).counts()
        {'cat': 0, 'owl': 2}
        """
        new = Examples(self.x, y, self.ids, classes=self.classes)
        if not (self.has_labels and new.has_labels):
            raise ValueError(
                f"with_labels needs class labels before and after, but targets are {self.y.dtype} "
                f"and y is {new.y.dtype} of shape {tuple(new.y.shape)}; for other targets make "
                "Examples(x, y, ids)"
            )
        new.y, new.named = new.y.to(self.y.device), self.named
        return new

    def to(self, *targets: torch.device | torch.dtype | str) -> "Examples":
        """A copy on another device and / or in another floating dtype; labels stay integers."""
        check_targets(targets)
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


def unequal(
    examples: Examples, count: int = 5, among: int = 32, holding: Iterable[int] = ()
) -> Tensor:
    """Positions of a few examples that differ as much as possible, in inputs and in targets.

    A check on equal examples sees nothing: mixing or swapping them gives the right numbers. First
    come integer inputs that hold the smallest and the largest value, then farthest first, among
    candidates spread over the data and, where it is in memory, its extreme rows.

    Args:
        examples: the data.
        count: how many positions at most.
        among: how many candidates are read, besides extreme ones.
        holding: integers of which an input that holds it is among the first, if there is one.

    >>> unequal(Examples([[0.0], [0.0], [0.0], [7.0]], [0, 0, 1, 0]), count=3)
    tensor([2, 3, 0])
    """
    last = len(examples) - 1
    spread = torch.linspace(0, last, min(among, last + 1), dtype=torch.float64).round().long()
    first, extreme = [], []
    if not isinstance(examples.x, Inputs):  # reading a whole data set is not for a check
        first, extreme = _extremes(examples.x, holding)
    candidates = list(dict.fromkeys([*first, *spread.tolist(), *extreme]))
    at = torch.tensor(candidates, device=examples.x.device)
    distance = _distances(examples.y[at])
    for _, values in _tensors(examples.x[at]):
        distance = distance + _distances(values)
    chosen = list(range(min(len(first), count))) or [int(distance.sum(1).argmax())]
    while len(chosen) < min(count, len(candidates)):
        gap = distance[:, chosen].amin(1)
        gap[chosen] = -1.0
        chosen.append(int(gap.argmax()))
    return torch.tensor(candidates)[chosen]


def _extremes(x: Tensor | Fields, holding: Iterable[int]) -> tuple[list[int], list[int]]:
    """Positions of integer inputs with extreme values or those asked for, and of extreme others."""
    first, others = [], []
    for _, values in _tensors(x):
        rows = values.detach().flatten(1)
        if not rows.shape[1] or values.dtype == torch.bool:
            continue
        low, high = rows.amin(1), rows.amax(1)
        ends = [int(low.argmin()), int(high.argmax()), int(high.argmin())]
        if values.is_floating_point() or values.dtype == torch.uint8:
            others += ends
            continue
        first += ends[:2]
        for token in holding:
            held = (rows == token).any(1)
            first += [int(held.to(torch.uint8).argmax())] if bool(held.any()) else []
    return list(dict.fromkeys(first))[:4], others


def _distances(values: Tensor) -> Tensor:
    """Distances between rows, in units of the largest, ``(N, N)``."""
    rows = values.detach().reshape(len(values), -1).cpu().to(torch.float32)
    gaps = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return gaps / gaps.max().clamp(min=torch.finfo(gaps.dtype).tiny)
