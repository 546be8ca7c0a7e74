"""`Fields`: the inputs of models that take a dictionary of tensors, as Hugging Face's do."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import register_pytree_node

from ..arguments import listed, shown
from .tensors import to_tensor

__all__ = ["Fields"]


class Fields:
    """Several named tensors ``(N, ...)``, a row of each per example.

    Read by name like a dictionary, and by position like one tensor ``(N, ...)``: ``fields["mask"]``
    is a tensor, ``fields[3:9]`` are six examples. The model is called with a plain dictionary.

    Args:
        tensors: by name, or arrays or lists; all of one length and on one device, the floating ones
            of one dtype.

    Raises:
        ValueError, TypeError: no fields, names that are no strings, different lengths, devices or
            floating dtypes.

    >>> fields = Fields({"tokens": [[1, 2], [3, 0]], "mask": [[True, True], [True, False]]})
    >>> fields[0]["tokens"]
    tensor([1, 2])
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        if not hasattr(tensors, "keys"):
            raise TypeError(f"tensors={shown(tensors)} must be a dictionary: tensors by name")
        names = list(tensors.keys())
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"fields need names that are strings, but tensors have {names}")
        values = {name: to_tensor(tensors[name], f"x[{name!r}]") for name in names}
        lengths = {name: len(value) if value.ndim else None for name, value in values.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(f"fields must hold one row per example each, but have {lengths} rows")
        kinds = {str(value.dtype) for value in values.values() if value.is_floating_point()}
        devices = {str(value.device) for value in values.values()}
        if len(kinds) > 1 or len(devices) > 1:
            raise ValueError(
                f"fields must share one device and one floating dtype, but have {sorted(devices)} "
                f"and {sorted(kinds)}; convert them"
            )
        self._tensors = values

    @classmethod
    def pad(cls, sequences: Sequence) -> "Fields":
        """Sequences of different lengths as a padded tensor and a mask, both ``(N, T, ...)``.

        Integers become the field ``"input_ids"`` and floating sequences the field ``"inputs"``; the
        padding is 0. ``"attention_mask"`` is 1 where the sequence is and 0 where the padding is.
        These are the names that Hugging Face's models take.

        Args:
            sequences: one per example, ``(T,)`` or ``(T, D)``.

        Raises:
            TypeError, ValueError: a sequence is empty, or of another width than the first.

        >>> Fields.pad([[7, 8], [9]])["input_ids"]
        tensor([[7, 8],
                [9, 0]])
        """
        given = listed("sequences", sequences, "a list of sequences, (T,) or (T, D) each")
        if not given:
            raise ValueError("sequences is empty; give one sequence per example")
        rows = [to_tensor(row, f"x[{i}]") for i, row in enumerate(given)]
        for i, row in enumerate(rows):
            if row.ndim not in (1, 2) or row.shape[1:] != rows[0].shape[1:] or not len(row):
                raise ValueError(
                    f"x[{i}] is {tuple(row.shape)}, x[0] is {tuple(rows[0].shape)}; inputs of "
                    "different sizes must be sequences (T,) or (T, D) of at least one step and of "
                    "one width D; crop or resize others, such as pictures"
                )
        floating = [row.dtype for row in rows if row.is_floating_point()]
        kind = functools.reduce(torch.promote_types, floating, torch.int64)
        ones = [torch.ones(len(row), dtype=torch.int64, device=row.device) for row in rows]
        values = pad_sequence([row.to(kind) for row in rows], batch_first=True)
        name = "inputs" if floating else "input_ids"
        return cls({name: values, "attention_mask": pad_sequence(ones, batch_first=True)})

    @classmethod
    def _of(cls, tensors: dict[str, Tensor]) -> "Fields":
        """Without checks, which `vmap`'s batched tensors would not pass."""
        fields = cls.__new__(cls)
        fields._tensors = tensors
        return fields

    @property
    def field_names(self) -> list[str]:
        """The names, in a list."""
        return list(self._tensors)

    def keys(self):
        """The names."""
        return self._tensors.keys()

    def values(self):
        """The tensors."""
        return self._tensors.values()

    def items(self):
        """Pairs of name and tensor."""
        return self._tensors.items()

    def __getitem__(self, index):
        if isinstance(index, str):
            return self._tensors[index]
        return Fields._of({name: value[index] for name, value in self.items()})

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    def __iter__(self) -> Iterator["Fields"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        about = (
            f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for name, value in self.items()
        )
        return f"Fields({', '.join(about)})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``, with K numbers per example in all fields."""
        return len(self), self.numel() // max(1, len(self))

    @property
    def ndim(self) -> int:
        """As if the fields were one tensor ``(N, K)``."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """That of the floating fields, or of the first field where there is none."""
        floating = [value for value in self.values() if value.is_floating_point()]
        return [*floating, *self.values()][0].dtype

    @property
    def device(self) -> torch.device:
        """That of all fields."""
        return next(iter(self.values())).device

    def is_floating_point(self) -> bool:
        """Whether any field is."""
        return any(map(Tensor.is_floating_point, self.values()))

    def numel(self) -> int:
        """Numbers in all fields."""
        return sum(value.numel() for value in self.values())

    def element_size(self) -> int:
        """Bytes of the largest number."""
        return max(value.element_size() for value in self.values())

    def to(self, *targets) -> "Fields":
        """Moved to a device and / or converted; integers keep their dtype."""
        return Fields._of({name: move(value, targets) for name, value in self.items()})


def check_targets(targets: Iterable) -> None:
    """Refuse what is neither a device nor a floating dtype.

    Raises:
        TypeError, ValueError: naming it.
    """
    for target in targets:
        if isinstance(target, torch.dtype) and not target.is_floating_point:
            raise ValueError(f"targets: {target} is no floating dtype, such as torch.float64")
        if not isinstance(target, torch.dtype | torch.device | str):
            raise TypeError(
                f"targets: {shown(target)} is neither a device, such as 'cpu', nor a dtype, such "
                "as torch.float64"
            )
        if isinstance(target, str):
            try:
                torch.device(target)
            except RuntimeError:
                raise ValueError(
                    f"targets: {target!r} is no device that PyTorch knows, such as 'cpu' or 'cuda'"
                ) from None
        if str(target).partition(":")[0] == "meta":
            raise ValueError("targets: on 'meta' tensors have no numbers, so all would be lost")


def move(values, targets: Iterable):
    """``values`` on these devices and in these dtypes; integers keep their dtype."""
    for target in targets:
        if not isinstance(target, torch.dtype) or values.is_floating_point():
            values = values.to(target)
    return values


def as_model_input(x):
    """What the model is called with: `Fields` as a plain dictionary, all else as it is."""
    return dict(x.items()) if isinstance(x, Fields) else x


# So that `vmap` and the other transforms of torch.func take fields as they take a tensor.
register_pytree_node(
    Fields,
    lambda fields: ([*fields.values()], [*fields.keys()]),
    lambda tensors, names: Fields._of(dict(zip(names, tensors, strict=True))),
)
