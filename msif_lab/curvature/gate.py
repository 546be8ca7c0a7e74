"""Which fast routes to derivatives can be trusted for this very model, loss and data.

PyTorch has several ways to the same derivative: many examples at once by `vmap`, directions by
forward mode, layers by hooks. For some models they silently give other numbers, or none. Each route
is compared once with plain reverse mode, one example at a time, on a few unequal examples and at
slightly shifted weights, since ReLU nets often start exactly at kinks. A route that disagrees, or
fails, is not used.
"""

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from ..data.examples import Examples, unequal
from ..data.fields import Fields
from ..objective.objective import Objective
from ..objective.switches import exact_products
from ..storage import checksum

FEW = 5
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
LARGE = 10**6  # parameters from which two examples must do: their gradients take as many numbers


class Probe:
    """A few unequal examples, shifted weights, and plain derivatives there.

    Attributes:
        objective: the stage.
        full: all its parameters, slightly shifted, ``(D,)``.
        x, y: inputs and targets of the examples, ``(B, ...)``.

    Args:
        o: the stage.
        examples: of which some are taken, by default its own.
    """

    def __init__(self, o: Objective, examples: Examples | None = None):
        examples = o.data if examples is None else examples
        few = few_unequal(o, examples).to(examples.x.device)
        self.objective = o
        self.full = o.shifted(0.2)
        self.x = examples.x[few]
        self.y = examples.y[few]

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


def few_unequal(o: Objective, examples: Examples) -> Tensor:
    """Positions of the few examples that a check looks at."""
    padding = {getattr(module, "padding_idx", None) for module in o.model.modules()}
    count = FEW if o.layout.size < LARGE else 2
    return unequal(examples, count, holding=[i for i in padding if isinstance(i, int)])


class Fingerprint:
    """What tells whether an objective is still the function of the data that was checked.

    Settings, hooks, closures and modes may all change, so what counts is what it computes for a few
    examples at fixed weights, besides the tensors and modules that facts may hold on to.
    """

    def __init__(self, o: Objective):
        self.probe = Probe.of(o)
        self.data, self.modules, self.kinds = self._of(o)
        self.values = self._computed(o)

    def fits(self, o: Objective) -> bool:
        """Whether this objective is the one that was checked."""
        return not self.change(o)

    def change(self, o: Objective) -> str:
        """What about an objective is not as it was checked, in words; empty where all of it is."""
        data, modules, kinds = self._of(o)
        changed = [n for n in (self.data | data) if self.data.get(n) != data.get(n)]
        if changed:
            return f"{', '.join(changed)} changed"
        if kinds != self.kinds or not all(map(operator.is_, modules, self.modules)):
            return "modules, buffers or what is trained were exchanged"
        values = self._computed(o)
        close = CLOSE.get(values.dtype, 0.1)
        size = float(self.values.nan_to_num().abs().max())
        same = values.shape == self.values.shape and torch.allclose(
            values, self.values, rtol=close, atol=close * size, equal_nan=True
        )
        return "" if same else "the model or its loss computes something else"

    @staticmethod
    def _of(o: Objective) -> tuple[dict, list, list]:
        x = o.data.x
        named = {f"data.x[{name!r}]": t for name, t in x.items()} if isinstance(x, Fields) else {}
        named = {"data.y": o.data.y, "data.ids": o.data.ids} | (named or {"data.x": x})
        data = {
            name: (t.shape, t.dtype, checksum(t)) if isinstance(t, Tensor) else t.stamp()
            for name, t in named.items()
        }
        modules = list(o.model.modules())
        return data, modules, [len(modules), o.dtype, o.device, o.trained_names, list(o.buffers)]

    def _computed(self, o: Objective) -> Tensor:
        """The losses of the probe's examples, and some projections of their gradient."""
        probe = self.probe
        weights = 1.5 + probe.draw(len(probe.x), seed=2).sign() / 2
        with torch.enable_grad(), exact_products():
            theta = o.trained.take(probe.full).clone().requires_grad_()
            losses = o.losses(o.parameters(theta, probe.full), probe.x, probe.y)
            if not losses.requires_grad:
                return losses
            (slope,) = torch.autograd.grad(losses @ weights, theta, materialize_grads=True)
        projections = [slope @ probe.draw(len(theta), seed=seed) for seed in (3, 4)]
        return torch.cat([losses.detach(), torch.stack([slope.norm(), *projections])])


def fingerprint(o: Objective) -> Fingerprint:
    """The fingerprint of a stage when it was checked, made once."""
    return o.once("fingerprint", lambda: Fingerprint(o))


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
