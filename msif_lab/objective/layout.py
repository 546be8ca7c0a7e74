"""Named parameters of a module as places in one flat vector."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Places:
    """Positions in a flat vector as a few spans: a table of millions of them would take twice what
    it points to.
    """

    def __init__(self, spans: Sequence[range]):
        self.spans: list[range] = []
        for span in spans:
            if self.spans and self.spans[-1].stop == span.start:
                span = range(self.spans.pop().start, span.stop)
            self.spans.append(span)
        self.size = sum(len(span) for span in self.spans)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [flat[..., span.start : span.stop] for span in self.spans]

    def take(self, flat: Tensor) -> Tensor:
        """What lies there: ``(..., D)`` → ``(..., S)``; not a copy where it is one span."""
        parts = self._parts(flat)
        return parts[0] if len(parts) == 1 else torch.cat([flat[..., :0], *parts], -1)

    def put(self, flat: Tensor, values: Tensor) -> Tensor:
        """Write ``values`` (..., S) there, into ``flat`` (..., D) itself, which comes back."""
        for part, value in zip(
            self._parts(flat), values.split([len(span) for span in self.spans], -1), strict=True
        ):
            part.copy_(value)
        return flat

    def add(self, flat: Tensor, values: Tensor | float) -> Tensor:
        """Add ``values`` there in ``flat`` itself, which comes back."""
        whole = isinstance(values, float)
        values = (
            itertools.repeat(values)
            if whole
            else values.split([len(span) for span in self.spans], -1)
        )
        for part, value in zip(self._parts(flat), values, strict=not whole):
            part += value
        return flat

    def table(self, device: torch.device) -> Tensor:
        """The positions one by one, int64 ``(S,)``."""
        return torch.cat(
            [torch.arange(0), *(torch.arange(span.start, span.stop) for span in self.spans)]
        ).to(device)


class Layout:
    """Where each named parameter of a module lies in one flat vector of ``D`` numbers.

    Raises:
        ValueError: no parameters, or parameters of several dtypes or devices.
    """

    def __init__(self, model: nn.Module, where: str):
        parameters = dict(model.named_parameters())
        kinds = {(p.dtype, str(p.device)) for p in parameters.values()}
        if len(kinds) != 1:
            found = (
                ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
                or "none at all"
            )
            raise ValueError(
                f"{where}: the model's parameters must share one dtype and device; found {found}"
            )
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.trainable = [name for name, p in parameters.items() if p.requires_grad]
        starts = torch.tensor([0, *(p.numel() for p in parameters.values())]).cumsum(0).tolist()
        self.spans = {
            name: range(a, b) for name, a, b in zip(self.shapes, starts, starts[1:], strict=False)
        }
        self.size = starts[-1]

    def places(self, names: Sequence[str]) -> Places:
        """Where the named parameters lie, in the order of ``names``."""
        return Places([self.spans[name] for name in names])

    def flatten(self, model: nn.Module) -> Tensor:
        """The module's parameters as a new flat vector ``(D,)``."""
        return torch.cat(
            [p.detach().reshape(-1) for p in dict(model.named_parameters()).values()]
        ).clone()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``(..., D)`` under their names and shapes."""
        parts = flat.split([len(span) for span in self.spans.values()], dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
