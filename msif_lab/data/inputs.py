"""`Inputs`: the inputs of a data set that are read when needed, here or in other processes."""

import functools
import math
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .conversion import to_input
from .fields import Fields, move
from .randomness import draws_from
from .tensors import to_tensor

__all__ = ["Inputs", "check_dataset", "fixed_like", "read_many"]

MOST_FILES = 10_000  # of a data set that `Inputs.stamp` looks at
PATIENCE = 0.1  # seconds of reading after which other processes are asked for the rest


class Inputs:
    """The inputs of a map-style `torch.utils.data.Dataset`, read only when they are indexed.

    Offers what the library needs of a tensor ``(N, ...)``: ``len``, ``shape``, ``dtype``,
    ``device``, ``to``, and indexing by an integer, a slice or positions, so ``inputs[3:9]`` is a
    tensor, or `Fields` where items are dictionaries. Made by `Examples.from_dataset`.

    That an item has become another one is noticed by `stamp`: by the files that the data set names
    in its attributes. Of what it holds in memory, downloads or computes only the number is known;
    call `Pipeline.adopt` after changing it.

    Args:
        dataset: the data set.
        positions: of these examples in it.
        like: an input of one example, ``(1, ...)``, for its shape and dtype.
        workers: processes that read where it takes long; 0 for none.
        targets: of `to`, applied to whatever is read.
    """

    def __init__(
        self,
        dataset,
        positions: Tensor,
        like: Tensor | Fields,
        workers: int = 0,
        targets: tuple = (),
    ):
        self.dataset = dataset
        self.positions = positions
        self.workers = workers
        self._like = like
        self._targets = targets
        moved = self._moved(like)
        self._item_size = moved.element_size()
        self.shape = (len(positions), *like.shape[1:])
        self.dtype = moved.dtype
        self.device = moved.device
        self.ndim = len(self.shape)
        self.field_names = like.field_names if isinstance(like, Fields) else None  # of the fields

    def __getstate__(self) -> dict:
        # A copy in another process reads by itself: that one's siblings have the other cores.
        return vars(self) | {"workers": 0}

    def __len__(self) -> int:
        return len(self.positions)

    def stamp(self) -> tuple:
        """What changes when an item does: how many there are, and the `files_of` the data set.

        Of each file its size and when it was last written to; of very many some, evenly spaced.
        """
        step = -(-len(self._files) // MOST_FILES) or 1
        return len(self), len(self._files), tuple(map(_written, self._files[::step]))

    @functools.cached_property
    def _files(self) -> list[str]:
        return files_of(self.dataset)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def element_size(self) -> int:
        return self._item_size

    def select(self, keep: Tensor) -> "Inputs":
        """The inputs at these positions, still unread."""
        places = self.positions[keep.cpu()]
        return Inputs(self.dataset, places, self._like, self.workers, self._targets)

    def to(self, *targets) -> "Inputs":
        """The same inputs, moved and / or converted when they are read."""
        targets = (*self._targets, *targets)
        return Inputs(self.dataset, self.positions, self._like, self.workers, targets)

    def __getitem__(self, index) -> Tensor | Fields:
        index = index.cpu() if isinstance(index, Tensor) else index
        places = self.positions[index]
        items = read_many(self.dataset, places.reshape(-1).tolist(), self._like, self.workers)
        read = _stacked(items) if items else self._like[:0]
        return self._moved(read)[0] if places.ndim == 0 else self._moved(read)

    def _moved(self, values: Tensor | Fields) -> Tensor | Fields:
        # In turn: `to` of a half and then of a double rounds.
        return move(values, self._targets)


def files_of(dataset) -> list[str]:
    """Paths that a data set holds: in its attributes, in lists, tuples and dictionaries of them.

    Data sets inside it count too, as of `torch.utils.data.Subset`, and arrays that are mapped
    files. Names that are not files from here, or inside ``dataset.root``, are left out.
    """
    found: dict[str, None] = {}
    seen, waiting = set(), [(dataset, None)]
    while waiting:
        thing, root = waiting.pop()
        if isinstance(thing, (str, os.PathLike)):
            for path in (thing, *([os.path.join(root, thing)] if root else [])):
                if isinstance(os.fspath(path), str) and os.path.isfile(path):
                    found[os.path.abspath(path)] = None
            continue
        if isinstance(thing, (int, float, type(None), Tensor, type)) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            waiting += [(getattr(thing, "filename", None), root)]
        elif isinstance(thing, dict):
            waiting += [(value, root) for value in thing.values()]
        elif isinstance(thing, (list, tuple)):
            waiting += [(value, root) for value in thing]
        elif hasattr(thing, "__getitem__") and hasattr(thing, "__dict__"):
            own = getattr(thing, "root", root)
            root = own if isinstance(own, (str, os.PathLike)) else root
            waiting += [(value, root) for value in vars(thing).values()]
    return sorted(found)


def _written(path: str) -> tuple[int, int] | None:
    """When a file was last written to, in nanoseconds, and its size; None where it is gone."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def check_dataset(dataset, workers: int) -> None:
    """Refuse what is no map-style data set, and workers that cannot have a copy of it.

    Raises:
        TypeError, ValueError: naming the way out.
    """
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise TypeError(
            "dataset is a DataLoader, whose batches may come in any order; give its data set: "
            "loader.dataset"
        )
    has_both = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    iterable = isinstance(dataset, (torch.utils.data.IterableDataset, type))
    if not has_both or iterable:
        kind = "a class" if isinstance(dataset, type) else type(dataset).__name__
        raise TypeError(
            f"dataset={kind} has no length or indexing; "
            "only map-style data sets keep the identity of their examples: "
            "define __len__ and __getitem__, and give an instance"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers={workers!r} must be a whole number, 0 for reading here")
    if workers:
        from joblib.externals.loky.backend.reduction import dumps

        try:
            dumps(dataset)
        except Exception as error:  # whatever an attribute raises that cannot be copied
            raise TypeError(
                f"dataset={type(dataset).__name__} cannot be copied to workers={workers} "
                f"processes: {error}; open files in __getitem__, or use workers=0"
            ) from error


def read_item(dataset, i: int, like: Tensor | Fields | None = None) -> tuple:
    """The checked pair ``(x, y)`` of item i; x must have the shape and dtype of ``like[0]``.

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
        x = to_input(item[0], f"the input of dataset[{i}]")
        y = item[1] if isinstance(item[1], str) else to_tensor(item[1], f"the target of item {i}")
    except TypeError as error:
        kinds = ", ".join(type(part).__name__ for part in item)
        raise TypeError(
            f"dataset[{i}] is ({kinds}); input and target must be tensors, arrays or numbers, "
            f"e.g. with transform=torchvision.transforms.ToTensor(): {error}"
        ) from error
    if like is not None and _form(x) != _form(like[0]):
        raise ValueError(
            f"the input of dataset[{i}] is {_form(x)}, that of dataset[0] {_form(like[0])}; "
            "resize or convert in the data set's transform"
        )
    finite = [bool(torch.isfinite(values).all()) for values in tree_leaves(x)]
    if not all(finite):
        raise ValueError(f"the input of dataset[{i}] holds NaN or inf; remove or repair it")
    return x, y


def _form(x: Tensor | Fields) -> str:
    """Shape and dtype in words, by name for fields."""
    return repr(x) if isinstance(x, Fields) else f"{tuple(x.shape)} {x.dtype}"


def _stacked(items: Sequence[Tensor | Fields]) -> Tensor | Fields:
    """A batch of inputs."""
    if isinstance(items[0], Tensor):
        return torch.stack(list(items))
    fields = {name: torch.stack([item[name] for item in items]) for name in items[0].field_names}
    return Fields._of(fields)


def read_many(
    dataset, places: list[int], like: Tensor | Fields | None, workers: int = 0, part: int = 0
) -> list:
    """Inputs (part 0) or targets (part 1) of the items at these places, in this order.

    In other processes where the reading takes long. Processes and not threads: a data set made for
    `DataLoader` may keep a file open and move in it, so that threads would read each other's items.
    """
    found = []
    end = time.perf_counter() + PATIENCE if workers else math.inf
    while len(found) < len(places) and time.perf_counter() < end:
        found.append(read_item(dataset, places[len(found)], like)[part])
    rest = places[len(found) :]
    if not rest:
        return found
    from joblib import Parallel, delayed

    size = -(-len(rest) // workers)
    parts = [rest[start : start + size] for start in range(0, len(rest), size)]
    # joblib would lay large arrays of the data set out as files, which cannot be written to.
    parallel = Parallel(workers, backend="loky", max_nbytes=None)
    for more in parallel(delayed(read_many)(dataset, p, like, 0, part) for p in parts):
        found += more
    return found


def fixed_like(dataset, with_targets: bool) -> Tensor | Fields:
    """The first input, ``(1, ...)``; refuses data sets whose items change when read again, or draw.

    Raises:
        ValueError: naming the item, or the generator that reading moves.
    """
    last = len(dataset) - 1
    few = sorted({round(i * last / 4) for i in range(5)})
    readings: list[list[tuple]] = []

    def read() -> None:
        first = read_item(dataset, 0)
        like = _stacked([first[0]])
        readings.append([first, *(read_item(dataset, i, like) for i in few[1:])])

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
    return _stacked([readings[0][0][0]])


def _equal(left, right) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    if _form(left) != _form(right):
        return False
    return all(map(torch.equal, tree_leaves(left), tree_leaves(right)))
