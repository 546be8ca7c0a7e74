"""Which fast routes to derivatives can be trusted for this very model, loss and data.

PyTorch has several ways to the same derivative: many examples at once by `vmap`, directions by
forward mode, layers by hooks. For some models they silently give other numbers, or none. Each route
is compared once with plain reverse mode, one example at a time, on a few unequal examples and at
slightly shifted weights, since ReLU nets often start exactly at kinks. A route that disagrees, or
fails, is not used.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from ..data.examples import unequal
from ..objective.objective import Objective
from ..objective.switches import exact_products

FEW = 5
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
LARGE = 10**6  # parameters from which two examples must do: their gradients take as many numbers


class Probe:
    """A few unequal examples, shifted weights, and plain derivatives there.

    Attributes:
        objective: the stage.
        full: all its parameters, slightly shifted, ``(D,)``.
        x, y: inputs and targets of the examples, ``(B, ...)``.
    """

    def __init__(self, o: Objective):
        self.objective = o
        self.full = shifted(o, 0.2)
        few = unequal(o.data, FEW if o.layout.size < LARGE else 2).to(o.data.x.device)
        self.x = o.data.x[few]
        self.y = o.data.y[few]

    @classmethod
    def of(cls, o: Objective) -> "Probe":
        """The stage's probe, made once."""
        return o.once("probe", lambda: cls(o))

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal random numbers in the stage's dtype, on its device."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(*shape, generator=generator, dtype=self.objective.dtype)
        return values.to(self.objective.device)

    def theta(self, every: bool) -> Tensor:
        """The parameters that are differentiated by, ``(P,)`` or all ``(D,)``."""
        return self.full if every else self.objective.trained.take(self.full)

    def outputs(self, theta: Tensor, x: Tensor, every: bool) -> Tensor:
        """The model's outputs as a function of ``theta``."""
        o = self.objective
        return o.outputs(theta if every else o.parameters(theta, self.full), x)

    def gradients(self, value: Callable[[Tensor, int], Tensor], every: bool) -> Tensor:
        """``∂ value(θ, i)/∂θ`` by plain reverse mode, one example i at a time, ``(B, P)``."""
        rows = []
        for i in range(len(self.x)):
            with torch.enable_grad(), exact_products():
                theta = self.theta(every).detach().requires_grad_()
                result = value(theta, i)
            if not result.requires_grad:  # a target that no parameter changes
                rows.append(torch.zeros_like(theta))
                continue
            rows.append(torch.autograd.grad(result, theta, materialize_grads=True)[0])
        return torch.stack(rows)


def shifted(o: Objective, size: float) -> Tensor:
    """All parameters, each moved at random by ``size`` times the spread of its tensor, ``(D,)``.

    Tensors of equal numbers, as biases and scales are at first, move by a quarter of ``size``.
    """
    generator = torch.Generator().manual_seed(0)
    parts = []
    for parameter in o.model.parameters():
        values = parameter.detach().reshape(-1)
        spread = float(values.std()) if len(values) > 1 else 0.0
        noise = torch.randn(len(values), generator=generator, dtype=values.dtype).to(values.device)
        parts.append(values + size * (spread or 0.25) * noise)
    return torch.cat(parts)


def lanes_agree(o: Objective) -> bool:
    """Whether `vmap` over weightings gives the gradients of each alone, as `Lanes` relies on."""
    probe = Probe.of(o)
    base = torch.stack([probe.full, o.layout.flatten(o.model)])
    thetas = o.trained.take(base)
    weights = 1 + probe.draw(len(base), len(probe.x)).sign() / 2  # else swapped lanes would pass

    def losses(theta: Tensor, full: Tensor) -> Tensor:
        return o.losses(o.parameters(theta, full), probe.x, probe.y)

    def gradient(values: Callable[[Tensor], Tensor], theta: Tensor, weights: Tensor) -> Tensor:
        with torch.enable_grad(), exact_products():
            leaf = theta.detach().requires_grad_()
            total = (weights * values(leaf)).sum()
        if not total.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(total, leaf, materialize_grads=True)[0]

    def plain() -> Tensor:
        rows = []
        for theta, full, own in zip(thetas, base, weights, strict=True):
            rows.append(gradient(functools.partial(losses, full=full), theta, own))
        return torch.stack(rows)

    return agree(lambda: gradient(lambda t: vmap(losses)(t, base), thetas, weights), plain)


def agree(fast: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Whether a fast route gives the plain route's rows ``(B, ...)``, one by one.

    A fast route that raises does not agree; whatever the plain one raises is the model's own.
    """
    truth = plain()
    try:
        with exact_products():
            found = fast()
    except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError):
        return False
    if found.shape != truth.shape:
        return False
    close = CLOSE.get(truth.dtype, 0.1)
    gaps = (found - truth).flatten(1).norm(dim=1)
    size = truth.flatten(1).norm(dim=1).max()
    return bool((gaps <= close * size).all())
