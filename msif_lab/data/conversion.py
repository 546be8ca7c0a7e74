"""What people bring as inputs, targets and identities, in the forms that `Examples` holds."""

import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .fields import Fields
from .tensors import is_frame, is_series, to_tensor

__all__ = ["to_classes", "to_ids", "to_input", "to_inputs", "to_targets"]

MOST_CLASSES = 10**6  # a larger label is an identity or a mistake, and a name each takes memory


def to_inputs(x) -> Tensor | Fields:
    """Inputs ``(N, ...)`` from whatever `Examples` takes; see there."""
    if getattr(getattr(x, "dtype", None), "kind", "") == "O":  # of NumPy and pandas
        x = list(x)
    if is_mapping(x):
        if not len(x):
            raise TypeError("x is an empty dictionary, with the fields []; name them by strings")
        return Fields(x)
    if isinstance(x, (list, tuple)) and x:
        if is_picture(x[0]):
            return _pictures(x)
        if all(is_mapping(row) for row in x):
            return _rows(x)
        if _differ_in_length(x):
            return Fields.pad(x)
    return to_tensor(x, "x")


def require_same_index(x, y) -> None:
    """Refuse a pandas frame and a series whose rows are named otherwise or stand otherwise.

    Raises:
        ValueError: rows would be paired by position, against what pandas users expect.
    """
    ours, theirs = (getattr(v, "index", None) for v in (x, y))
    if all(hasattr(index, "equals") for index in (ours, theirs)) and not ours.equals(theirs):
        raise ValueError(
            "x and y are from pandas and their indices differ, but rows are paired by position; "
            "align them first (y = y.loc[x.index]), or give arrays: x.to_numpy(), y.to_numpy()"
        )


def to_input(x, name: str) -> Tensor | Fields:
    """One example's input: a tensor, or `Fields` whose tensors are this example's alone."""
    if is_picture(x):
        return _pictures([x])[0]
    if not is_mapping(x):
        return to_tensor(x, name)
    return Fields({key: to_tensor(v, f"{name}[{key!r}]")[None] for key, v in x.items()})[0]


def is_mapping(x) -> bool:
    """Whether it has named parts, as dictionaries and the outputs of tokenizers have."""
    alike = hasattr(x, "keys") and hasattr(x, "items") and hasattr(x, "__getitem__")
    return isinstance(x, Mapping) or (alike and not is_frame(x) and not is_series(x))


def _rows(rows: Sequence[Mapping]) -> Fields:
    """`Fields` from one dictionary per example."""
    names = list(rows[0].keys())
    for i, row in enumerate(rows):
        if set(row.keys()) != set(names):
            raise ValueError(
                f"x[{i}] has the fields {list(row.keys())}, x[0] has {names}; give all examples "
                "the same"
            )
    return Fields({name: [row[name] for row in rows] for name in names})


def _differ_in_length(rows: Sequence) -> bool:
    """Whether these are sequences of different lengths."""
    if not all(isinstance(row, (list, tuple, np.ndarray, Tensor)) for row in rows):
        return False
    return all(np.ndim(row) for row in rows[:1]) and len({len(row) for row in rows}) > 1


def is_picture(value) -> bool:
    """Whether it is a PIL image; PIL is not imported for it."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _pictures(images: Sequence) -> Tensor:
    """PIL images as ``(N, C, H, W)`` in [0, 1], as torchvision's ToTensor makes them."""
    for i, image in enumerate(images):
        if not is_picture(image):
            raise TypeError(f"x[{i}] is {type(image).__name__}, x[0] a PIL image; give one kind")
        if image.mode not in ("L", "RGB"):
            raise ValueError(
                f"x[{i}] is a PIL image of mode {image.mode!r}; "
                'convert it: image.convert("RGB") or image.convert("L")'
            )
        if image.size != images[0].size or image.mode != images[0].mode:
            raise ValueError(
                f"x[{i}] is a PIL image {image.size} {image.mode}, x[0] one "
                f"{images[0].size} {images[0].mode}; make them alike: "
                f"image.convert({images[0].mode!r}).resize({images[0].size})"
            )
    pixels = torch.as_tensor(np.stack([np.array(image) for image in images]))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous().to(torch.get_default_dtype()) / 255


def to_targets(y, classes: tuple | None, what: str = "y") -> tuple[Tensor, tuple | None]:
    """Targets ``(N,)`` or ``(N, ...)``, and the names of the labels if they have any.

    Args:
        y: numbers, or text that names each example's class.
        classes: the names in the order of the labels; default for text: sorted.
        what: how messages call the targets.
    """
    dtype = getattr(y, "dtype", None)
    if hasattr(dtype, "categories"):  # pandas' categories have an order of their own
        classes = tuple(dtype.categories) if classes is None else classes
        y = list(y)
    elif getattr(dtype, "kind", "") in ("O", "U"):  # text, of NumPy and pandas
        y = y.tolist()
    named = isinstance(y, (list, tuple)) and any(isinstance(name, str) for name in y)
    if not named and not hasattr(dtype, "categories"):
        targets = to_tensor(y, what)
        return (targets if targets.is_floating_point() else targets.to(torch.int64)), classes
    if classes is None:
        odd = [i for i, name in enumerate(y) if not isinstance(name, str)]
        if odd:
            raise TypeError(
                f"y mixes text with {type(y[odd[0]]).__name__}, first at positions {odd[:5]}; "
                "name every class by a string, and drop examples without one"
            )
        classes = tuple(sorted(set(y)))
    place = {name: label for label, name in enumerate(classes)}
    odd = [i for i, name in enumerate(y) if name not in place]
    if odd:
        raise ValueError(
            f"y holds {y[odd[0]]!r} at positions {odd[:5]}, which is none of classes={classes}; "
            "add it there, or drop those examples"
        )
    return torch.tensor([place[name] for name in y]), classes


def to_classes(classes: Iterable | None) -> tuple | None:
    """Names of the labels, which must differ and can be looked up."""
    if classes is None:
        return None
    try:
        names = tuple(classes)
        different = len(set(names)) == len(names)
    except TypeError as error:
        raise TypeError(
            f"classes={classes!r} must be a sequence with one name per label, such as "
            '("cat", "dog")'
        ) from error
    if not different:
        raise ValueError(f"classes={names} must differ; they name the labels in every result")
    return names


def to_ids(ids, count: int) -> Tensor:
    """Identities as int64 ``(count,)`` on the CPU, by default positions.

    Raises:
        TypeError, ValueError: no integers, not one per example, or not unique. Strings are refused
            too: ids stand in every result and every file as integers.
    """
    if ids is None:
        return torch.arange(count)
    kept = list(ids) if is_series(ids) or isinstance(ids, (list, tuple, np.ndarray)) else []
    if any(isinstance(name, (str, bytes)) for name in kept):
        raise TypeError(
            f"ids hold text such as {kept[0]!r}, but must be integers; leave ids out, keep the "
            "names in a list of your own, and look them up by position: names[i] for i in "
            "scores.ids"
        )
    ids = to_tensor(list(ids) if isinstance(ids, range) else ids, "ids").cpu()
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype}, but must be integers, one per example")
    if ids.shape != (count,):
        held = f"is {int(ids)}" if ids.ndim == 0 else f"has shape {tuple(ids.shape)}"
        raise ValueError(f"ids {held}, expected ({count},), one per example")
    ids = ids.to(torch.int64)
    values, counts = torch.unique(ids, return_counts=True)
    if len(values) != count:
        raise ValueError(
            f"ids must be unique; they name the examples in every result, but "
            f"{values[counts > 1][:5].tolist()} repeat"
        )
    return ids
