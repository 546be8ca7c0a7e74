"""A stage as a pure function of flat parameters: the user's module is called, never changed.

Letters as in the lessons: ``θ`` the ``P`` parameters a stage trains, ``w`` the example weights,
``F(θ; w) = (1/m) Σ_i w_i f_i(θ) + λ/2 ‖θ‖² + α ‖θ_S − c‖²`` with the shared part ``θ_S`` held near the
previous stage's ``c`` (α = 0 without a proximal link). Many weightings at once are *lanes*, ``(R, P)``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .data.examples import Examples
from .memory import working_bytes

__all__ = ["cross_entropy", "mean_squared_error", "next_token_loss"]


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """On CUDA PyTorch's float32 convolutions are TF32 unless told otherwise, 10 bits: two kernels differ by 1e-3, too
    much to tell whether two ways give the same."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``log Σ_c exp z_c − z_y`` in elementwise steps: under forward mode and over lanes, where PyTorch's own
    cross_entropy falls back to Python decompositions, this is several times faster."""
    largest = logits.detach().amax(-1, keepdim=True)
    correct = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    picked = logits.where(correct, 0.0).sum(-1).where(correct.any(-1), torch.nan)  # no output for the label: no number
    return (logits - largest).exp().sum(-1).log() + largest[..., 0] - picked


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats: logits ``(B, C)``, labels ``(B,)`` → ``(B,)``.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    return _negative_log_likelihood(outputs, targets)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each example averaged over its outputs: ``(B, ...)``, ``(B, ...)`` → ``(B,)``.

    >>> mean_squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    if outputs.shape != targets.shape and outputs.shape[0] == outputs.numel() == targets.numel():
        outputs = outputs.reshape(targets.shape)  # a single output, with or without its own dimension
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must have equal shapes")
    return ((outputs - targets) ** 2).reshape(len(outputs), -1).mean(1)


def next_token_loss(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, in nats: ``(B, T, V)``, ``(B, T)`` → ``(B,)``.

    >>> next_token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]))
    tensor([0.6931])
    """
    return _negative_log_likelihood(outputs[:, :-1], tokens[:, 1:]).mean(1)


def _margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds of the correct class: z_y − log Σ_{c≠y} exp z_c = −log(exp(loss) − 1)."""
    correct = torch.arange(outputs.shape[-1], device=outputs.device) == targets[..., None]
    others = outputs.masked_fill(correct, -torch.inf)
    return (outputs * correct).sum(-1) - others.logsumexp(-1)


def _single_output(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs[0].numel() != 1:
        raise ValueError(
            f"target='output' needs one output per example, the model gives {tuple(outputs.shape[1:])}; "
            "use target='loss', 'margin' or a function of (outputs, targets)"
        )
    return outputs.reshape(len(outputs))


def target_function(target: str | Callable, loss: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """The quantity q asked about, as ``(outputs, targets) -> (B,)``."""
    named = {"loss": loss, "margin": _margin, "output": _single_output}
    if callable(target):
        return target
    if target not in named:
        raise ValueError(f"target={target!r} must be one of {sorted(named)} or a function (outputs, targets) -> (B,)")
    return named[target]


class Places:
    """Positions in a flat vector as a few spans: a table of millions of them would take twice what it points to."""

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
        for part, value in zip(self._parts(flat), values.split([len(span) for span in self.spans], -1), strict=True):
            part.copy_(value)
        return flat

    def add(self, flat: Tensor, values: Tensor | float) -> Tensor:
        """Add ``values`` there in ``flat`` itself, which comes back."""
        whole = isinstance(values, float)
        values = itertools.repeat(values) if whole else values.split([len(span) for span in self.spans], -1)
        for part, value in zip(self._parts(flat), values, strict=not whole):
            part += value
        return flat

    def table(self, device: torch.device) -> Tensor:
        """The positions one by one, int64 ``(S,)``."""
        return torch.cat([torch.arange(0), *(torch.arange(span.start, span.stop) for span in self.spans)]).to(device)


def target_name(target: str | Callable) -> str:
    """How results name their target."""
    return target if isinstance(target, str) else getattr(target, "__name__", "custom")


class Layout:
    """Where each named parameter of a module lies in one flat vector of ``D`` numbers.

    Raises:
        ValueError: no parameters, or parameters of several dtypes or devices.
    """

    def __init__(self, model: nn.Module, where: str):
        parameters = dict(model.named_parameters())
        kinds = {(p.dtype, str(p.device)) for p in parameters.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none at all"
            raise ValueError(f"{where}: the model's parameters must share one dtype and device; found {found}")
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.trainable = [name for name, p in parameters.items() if p.requires_grad]
        starts = torch.tensor([0, *(p.numel() for p in parameters.values())]).cumsum(0).tolist()
        self.spans = {name: range(a, b) for name, a, b in zip(self.shapes, starts, starts[1:], strict=False)}
        self.size = starts[-1]

    def places(self, names: Sequence[str]) -> Places:
        """Where the named parameters lie, in the order of ``names``."""
        return Places([self.spans[name] for name in names])

    def flatten(self, model: nn.Module) -> Tensor:
        """The module's parameters as a new flat vector ``(D,)``."""
        return torch.cat([p.detach().reshape(-1) for p in dict(model.named_parameters()).values()]).clone()

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector ``(..., D)`` under their names and shapes."""
        parts = flat.split([len(span) for span in self.spans.values()], dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Objective:
    """The regularised risk F(θ; w) of one stage as a pure function.

    Args:
        model: any module; called functionally, so its own parameters are never touched.
        data: the examples of the mean.
        loss: ``(outputs, targets) -> (B,)``.
        weight_decay: λ, on every trained parameter, biases included.
        trained: names of the parameters θ; default all that require a gradient.
        alpha, shared: the proximal term ``α ‖θ_S − c‖²`` and the names S it holds.
        where: how messages name this stage.
    """

    def __init__(self, model, data, loss, weight_decay=0.0, trained=None, alpha=0.0, shared=(), where="stage"):
        self.model, self.data, self.loss, self.where = model, data, loss, where
        self.layout = Layout(model, where)
        self.weight_decay, self.alpha = float(weight_decay), float(alpha)
        self.trained = list(self.layout.trainable if trained is None else trained)
        self.own, self.device = self.layout.places(self.trained), data.x.device  # where θ lies among all D
        trained_spans = {}
        for name in self.trained:
            start = sum(len(span) for span in trained_spans.values())
            trained_spans[name] = range(start, start + len(self.layout.spans[name]))
        self.held = Places([trained_spans[n] for n in shared])  # where the coupled S lie in θ
        self._all = self.trained == list(self.layout.shapes)
        # Constants of the function; copies, so that a module that writes into them cannot change itself.
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._bytes = None
        self.outputs_: int | None = None  # C, numbers the model gives for one example
        self.layers: dict[bool, list | None] = {}  # `layers.find_layers`, once

    @property
    def size(self) -> int:
        """P, how many numbers are trained."""
        return self.own.size

    @property
    def rows(self) -> Tensor:
        """Positions of θ among all D, one by one ``(P,)``; `own` has them as spans."""
        return self.own.table(self.device)

    @property
    def coupled(self) -> Tensor:
        """Positions of the coupled S in θ, one by one; `held` has them as spans."""
        return self.held.table(self.device)

    @property
    def ridge(self) -> Tensor:
        """Curvature of the penalty, ``(P,)``: λ everywhere plus 2α on the coupled part."""
        diagonal = torch.full((self.size,), self.weight_decay, dtype=self.dtype, device=self.device)
        return self.held.add(diagonal, 2.0 * self.alpha)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def join(self, theta: Tensor, base: Tensor) -> Tensor:
        """All D parameters: ``theta`` (P,) in its places, the rest from ``base`` (D,)."""
        return theta if self._all else self.own.put(base.clone(), theta)

    def parameters(self, theta: Tensor, base: Tensor) -> dict[str, Tensor]:
        """All parameters by name: ``theta`` (P,) in its places, the rest constants from ``base`` (D,), so that no
        derivative by them is formed on the way."""
        named = {} if self._all else self.layout.named(base.detach())
        parts = theta.split([len(self.layout.spans[name]) for name in self.trained])
        return named | {n: part.reshape(self.layout.shapes[n]) for n, part in zip(self.trained, parts, strict=True)}

    def outputs(self, full: Tensor | dict[str, Tensor], x: Tensor) -> Tensor:
        """Model outputs ``(B, ...)`` at all parameters, ``full`` (D,) or by name."""
        named = full if isinstance(full, dict) else self.layout.named(full)
        return functional_call(self.model, named | self.buffers, (x,))

    def losses(self, full: Tensor | dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Per-example losses ``f_i``, ``(B,)``."""
        return self.loss(self.outputs(full, x), y)

    def bytes_per_example(self) -> int:
        """Measured memory that one example's backward pass keeps, in bytes."""
        if self._bytes is None:
            kept = {}

            def count(n):
                sizes = []

                def pack(tensor):
                    sizes.append(tensor.numel() * tensor.element_size())
                    return tensor

                full = self.layout.flatten(self.model).requires_grad_()
                with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    self.losses(full, self.data.x[[0] * n], self.data.y[[0] * n]).sum()
                kept[n] = sum(sizes)

            count(1), count(3)
            self._bytes = max((kept[3] - kept[1]) // 2, self.data.x[0].numel() * self.data.x.element_size(), 64)
        return self._bytes

    def chunks(
        self,
        examples: Examples | None = None,
        copies: int = 1,
        rows: Tensor | None = None,
        memory: int | None = None,
    ) -> Iterator:
        """``(positions, x, y)`` over examples, in parts so small that ``copies`` of their activations fit.

        Args:
            examples: default the stage's own data.
            copies: how many activation sets one example costs (lanes, tangents).
            rows: only these positions, in this order (a mini-batch).
            memory: bytes all copies of a part may take, default `working_bytes`.
        """
        examples = self.data if examples is None else examples
        count = len(examples) if rows is None else len(rows)
        cost = self.bytes_per_example() * copies
        step = max(1, (memory or working_bytes(self.device, cost)) // cost)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
            yield part, examples.x[part], examples.y[part]


@dataclass
class Lanes:
    """F for R weightings at once; what the recipes minimise.

    Attributes:
        objective: the stage.
        base: ``(R, D)`` all parameters; the trained places are overwritten by θ.
        centre: ``(R, S)`` the previous stage's values c of the coupled parameters, or None.
        weights: ``(R, m)`` example weights; the 1/m stays whatever they are.
    """

    objective: Objective
    base: Tensor
    centre: Tensor | None
    weights: Tensor

    def __len__(self) -> int:
        return len(self.base)

    def select(self, lanes: Tensor) -> "Lanes":
        """Only these lanes."""
        centre = None if self.centre is None else self.centre[lanes]
        return replace(self, base=self.base[lanes], centre=centre, weights=self.weights[lanes])

    def full(self, theta: Tensor) -> Tensor:
        """All parameters of each lane, ``(R, D)``."""
        return self.objective.own.put(self.base.clone(), theta)

    def value_and_grad(self, theta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """F ``(R,)`` and ∇F ``(R, P)`` at ``theta`` (R, P), over all data or the mini-batch ``rows``."""
        o = self.objective
        count = len(o.data) if rows is None else len(rows)
        value, gradient = self._penalty(theta)
        for part, x, y in o.chunks(copies=len(self), rows=rows):
            with torch.enable_grad():
                leaf = theta.detach().requires_grad_()
                risk = (self.weights[:, part] * self._losses(leaf, x, y)).sum(1) / count  # (R,)
                (gradient_part,) = torch.autograd.grad(risk.sum(), leaf)
            value, gradient = value + risk.detach(), gradient.add_(gradient_part)
        return value, gradient

    def _losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        o = self.objective
        if len(self) == 1:  # vmap over one lane would only cost
            return o.losses(o.parameters(theta[0], self.base[0]), x, y)[None]
        return vmap(lambda t, b: o.losses(o.parameters(t, b), x, y))(theta, self.base)

    def _penalty(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        o = self.objective
        value, gradient = o.weight_decay / 2 * (theta**2).sum(1), o.weight_decay * theta
        if self.centre is not None and o.alpha:
            apart = o.held.take(theta) - self.centre
            value = value + o.alpha * (apart**2).sum(1)
            gradient = o.held.add(gradient, 2 * o.alpha * apart)
        return value, gradient
