"""Numbers of any kind as tensors: lists, arrays, pandas; what holds none is refused in words."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["is_frame", "is_series", "require_finite", "to_tensor"]

WIDE = (torch.uint16, torch.uint32, torch.uint64)  # which few operations take
TAKEN = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *WIDE,
)


def to_tensor(value, name: str) -> Tensor:
    """Numbers as a dense tensor that needs no gradient: the examples are constants.

    Args:
        value: tensor, array, number, nested lists, list of equal tensors or arrays, pandas frame
            of numbers or series.
        name: what messages call it.

    Raises:
        TypeError, ValueError: it holds no numbers, or in a form that the library does not take.
    """
    if is_frame(value):
        value = _columns(value, name)
    elif is_series(value):
        value = _column(value, name)
    try:
        tensor = _converted(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} is {_kind(value)}; {_way_out(value, name)}") from error
    if tensor.is_nested or tensor.layout != torch.strided:
        way_out = f"list({name}.unbind())" if tensor.is_nested else f"{name}.to_dense()"
        raise ValueError(
            f"{name} is a {'nested' if tensor.is_nested else 'sparse'} tensor ({tensor.layout}); "
            f"give {way_out}"
        )
    if tensor.dtype not in TAKEN:
        way_out = "convert it, e.g. to torch.float32"
        if tensor.is_complex():
            way_out = "give its parts as real numbers: torch.view_as_real()"
        raise ValueError(f"{name} is {tensor.dtype}, which models here do not take; {way_out}")
    if tensor.is_meta:
        raise ValueError(f"{name} is on meta, which holds no numbers; give real ones")
    if tensor.dtype in WIDE:
        tensor = tensor.to(torch.int64)
        if bool((tensor < 0).any()):
            raise ValueError(f"{name} holds numbers of 2**63 or more; make them smaller")
    # Tensors of inference mode cannot take part in a backward pass, not even as constants.
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _converted(value) -> Tensor:
    """As `torch.as_tensor`, and for what it does not take: lists of tensors, odd arrays."""
    if isinstance(value, np.ndarray):
        # PyTorch takes neither negative strides nor another byte order than the machine's, and
        # warns of arrays that must not be written to, as pandas' are; files on disk are not copied.
        kept = value.flags.writeable or isinstance(value, np.memmap)
        if not kept or any(stride < 0 for stride in value.strides):
            value = value.copy()
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(part, Tensor) for part in value):
            return torch.stack(tuple(value))
        if all(isinstance(part, np.ndarray) for part in value):
            return torch.as_tensor(np.stack(value))
    return torch.as_tensor(value)


def _kind(value) -> str:
    """What a thing that holds no numbers is, in words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, (list, tuple)):
        inside = sorted({type(part).__name__ for part in value})
        return f"a {type(value).__name__} of {', '.join(inside[:3]) or 'nothing'}"
    return f"{value!r}" if isinstance(value, (str, type(None))) else f"a {type(value).__name__}"


def _way_out(value, name: str) -> str:
    """What to give instead of a thing that holds no numbers."""
    if isinstance(value, DataLoader):
        return "its order and batches are no identity; use Examples.from_dataset(loader.dataset)"
    if isinstance(value, IterableDataset):
        return "it has no positions that could name examples; collect its items into tensors"
    if isinstance(value, Dataset):
        return "use Examples.from_dataset(dataset)"
    if isinstance(value, Iterator):
        return f"make it a list first: list({name})"
    if hasattr(value, "toarray"):  # SciPy's sparse matrices
        return f"give {name}.toarray()"
    first = value
    while isinstance(first, (list, tuple, np.ndarray)) and len(first):
        first = first[0]
    if isinstance(first, (str, bytes)):
        if name == "y":
            return "text labels must be one string per example, (N,), such as y.astype(str)"
        return (
            "text must become numbers first, e.g. "
            'tokenizer(texts, padding=True, return_tensors="pt")'
        )
    if isinstance(value, (list, tuple)) and any(hasattr(part, "__len__") for part in value):
        return (
            "its rows must be numbers and have equal shapes: pad them, as "
            "tokenizer(texts, padding=True) does, or crop or resize"
        )
    return "give numbers: a tensor, an array or a list"


def is_frame(value) -> bool:
    """Whether it is a pandas frame; pandas is not imported for it."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def is_series(value) -> bool:
    """Whether it is a pandas series or index."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.Series, pandas.Index))


def _columns(frame, name: str) -> np.ndarray:
    """A frame's numbers ``(N, columns)``, in the order of the columns."""
    from pandas.api.types import is_numeric_dtype

    odd = [column for column, dtype in frame.dtypes.items() if not is_numeric_dtype(dtype)]
    if odd:
        raise TypeError(
            f"{name} has columns {odd} that hold no numbers; leave them out, "
            f"{name}.drop(columns={odd}), or encode them, e.g. by pandas.get_dummies"
        )
    columns = [_column(frame.iloc[:, i], name) for i in range(frame.shape[1])]
    return np.column_stack(columns) if columns else np.zeros((len(frame), 0))


def _column(series, name: str) -> np.ndarray:
    """A series as an array; pandas' own numbers become NumPy's."""
    lacking = np.flatnonzero(series.isna())
    if len(lacking):
        raise ValueError(
            f"{name} lacks values, column {series.name!r} at positions {lacking[:5].tolist()}; "
            "fill them or drop those examples"
        )
    dtype = getattr(series.dtype, "numpy_dtype", None)
    return np.array(series.to_numpy() if dtype is None else series.to_numpy(dtype=dtype))


def require_finite(name: str, values: Tensor) -> None:
    """Raise `ValueError` where floating values hold NaN or inf, with the positions."""
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
