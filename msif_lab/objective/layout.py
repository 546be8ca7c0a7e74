"""Named parameters of a module as places in one flat vector."""

import itertools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .exclusive import exclusive


class Places:
    """Positions in a flat vector, kept as a few spans.

    A table of millions of positions would take twice the memory of the numbers it points to.
    """

    def __init__(self, spans: Sequence[range]):
        self.spans: list[range] = []
        for span in spans:
            if self.spans and self.spans[-1].stop == span.start:  # adjacent: one longer span
                span = range(self.spans.pop().start, span.stop)
            self.spans.append(span)
        self.size = sum(len(span) for span in self.spans)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [flat[..., span.start : span.stop] for span in self.spans]

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([len(span) for span in self.spans], -1)

    def take(self, flat: Tensor) -> Tensor:
        """The numbers at these places: ``(..., D)`` → ``(..., S)``; a view if they are one span."""
        parts = self._parts(flat)
        return parts[0] if len(parts) == 1 else torch.cat([flat[..., :0], *parts], -1)

    def put(self, flat: Tensor, values: Tensor) -> Tensor:
        """Write ``values`` (..., S) to these places of ``flat`` (..., D), and return ``flat``."""
        for part, value in zip(self._parts(flat), self._split(values), strict=True):
            part.copy_(value)
        return flat

    def add(self, flat: Tensor, values: Tensor | float) -> Tensor:
        """Add ``values`` at these places of ``flat`` (..., D), and return ``flat``."""
        if isinstance(values, float):
            added = itertools.repeat(values, len(self.spans))
        else:
            added = self._split(values)
        for part, value in zip(self._parts(flat), added, strict=True):
            part += value
        return flat

    def table(self, device: torch.device) -> Tensor:
        """The positions one by one, int64 ``(S,)``."""
        spans = [torch.arange(span.start, span.stop) for span in self.spans]
        return torch.cat([torch.arange(0), *spans]).to(device)


def same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers, of which some may be NaN."""
    if torch.equal(left, right) or left.shape != right.shape or not left.is_floating_point():
        return torch.equal(left, right)
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


class Layout:
    """Where each named parameter of a module lies in one flat vector of ``D`` numbers.

    Raises:
        ValueError: no parameters, or parameters of several dtypes or devices.
    """

    @exclusive
    def __init__(self, model: nn.Module, where: str):
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"{where}: parameter {name!r} has no shape yet; run the model once on a batch, "
                    "as lazy layers need"
                )
        kinds = {(p.dtype, str(p.device)) for p in parameters.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(
                f"{where}: the model's parameters must share one dtype and device; "
                f"found {found or 'none at all'}"
            )
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.trainable = [name for name, p in parameters.items() if p.requires_grad]
        self.spans: dict[str, range] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            start = self.size
            self.size += shape.numel()
            self.spans[name] = range(start, self.size)
        # Whether some tensor has a second name, which PyTorch takes long to look for at each call.
        every = (model.named_parameters, model.named_buffers)
        self.tied = any(
            len(list(named())) < len(list(named(remove_duplicate=False))) for named in every
        )

    def places(self, names: Sequence[str]) -> Places:
        """Where the named parameters lie, in the order of ``names``."""
        return Places([self.spans[name] for name in names])

    @exclusive
    def flatten(self, model: nn.Module) -> Tensor:
        """The module's parameters as a new flat vector ``(D,)``."""
        parameters = dict(model.named_parameters()).values()
        return torch.cat([p.detach().reshape(-1) for p in parameters]).clone()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``(..., D)`` under their names and shapes."""
        parts = flat.split([len(span) for span in self.spans.values()], dim=-1)
        return {
            name: part.reshape((*flat.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def by_name(
    what: str, given: Mapping[str, float], layout: Layout, trained: Sequence[str], where: str
) -> dict[str, float]:
    """Numbers that were given by patterns, as ``what`` of each parameter; see `Stage`.

    Raises:
        ValueError: a key matches no parameter or decides nothing, or a trained one has no key.
    """
    found: dict[str, float] = {}
    for key, value in given.items():
        matched = [n for n, shape in layout.shapes.items() if _decides(key, n, len(shape))]
        new = [n for n in matched if n not in found]
        if not matched:
            raise ValueError(
                f"{where}: {what} key {key!r} matches no parameter; a key is a whole name, its "
                "last part, a pattern such as 'head.*', or '1d' for biases and norms, and the "
                f"names are {list(layout.shapes)}"
            )
        if not new:
            raise ValueError(
                f"{where}: {what} key {key!r} decides nothing, since the first key that "
                "matches a parameter counts; put it before the more general ones, or leave it out"
            )
        found |= dict.fromkeys(new, value)
    if missing := [name for name in trained if name not in found]:
        raise ValueError(
            f"{where}: no key of {what} matches the trained parameters {missing}; add them, "
            'or "*": a number as the last key for all others'
        )
    return found


def _decides(key: str, name: str, dimensions: int) -> bool:
    if key == "1d":
        return dimensions <= 1
    return key in (name, name.rpartition(".")[2]) or fnmatchcase(name, key)
