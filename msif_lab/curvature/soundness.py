"""The derivatives that autograd gives, checked against finite differences before any training.

Backward passes can be written by hand, cut (`detach`), or wrong in PyTorch itself, and nothing
downstream would notice. So for a few unequal examples, at slightly shifted weights since many nets
start exactly at kinks, the gradient is compared with differences of the loss, and one Hessian
product with differences of the gradient. Several step sizes are tried and the best counts, because
kinks spoil the large ones and rounding the small ones; what rounding alone explains is no fault.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UnsupportedModelError
from ..objective.exclusive import exclusive
from ..objective.objective import Objective
from ..objective.precision import HALF, computing_dtype
from ..objective.switches import exact_products, twice_differentiable
from .gate import LARGE, few_unequal

STEPS = {
    torch.float64: (1e-4, 1e-5, 1e-6, 1e-7, 1e-3, 1e-2),
    torch.float32: (1e-2, 3e-3, 3e-2, 1e-3),
}
GRADIENT_CLOSE = {torch.float64: 5e-3, torch.float32: 3e-1}
HESSIAN_CLOSE = 1e-2
SHIFTS = (0.2, 0.01, 0.0)  # of the weights; the first at which loss and gradient are finite
COPIED = 10**8  # parameters of a model up to which it is checked in float64
FAILURES = (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError)

Value = Callable[[Tensor], Tensor]


def check_gradient(o: Objective, inherited: Tensor | None = None) -> Tensor:
    """Refuse a stage whose gradient is not the derivative of its loss.

    Args:
        o: the stage.
        inherited: which of its parameters ``(D,)`` take over what an earlier stage has trained:
            derivatives in those are needed too.

    Returns:
        which of its parameters ``(D,)`` depend on example weights, its own or earlier ones.

    Raises:
        UnsupportedModelError: with the layer, as far as it can be told.
    """
    inherited = torch.zeros(o.layout.size, dtype=torch.bool) if inherited is None else inherited
    probed, names = _probed(o), _live(o, inherited)
    live = o.layout.places(names)
    if probed is None:
        return live.put(inherited.clone(), torch.ones(live.size, dtype=torch.bool))
    taken = live.take(inherited).to(o.device)
    try:
        risk = _Risk(probed, names)
        with torch.enable_grad():
            if not risk.value(risk.theta.detach().requires_grad_()).requires_grad:
                raise RuntimeError("it is constant, or made of steps, in every trained parameter")
        again = _slope(risk.value, risk.theta)[1]
        noise = risk.rounding + _rounding(risk.value, risk.theta, risk.gradient)
        error = _gradient_error(risk.value, risk.theta, risk.gradient, noise)
        aside = _error_aside(risk, taken, noise)
    except FAILURES as problem:
        where = _culprit(probed, lambda *given: _fails(_gradient_error, *given))
        raise UnsupportedModelError(
            f"{o.where}: the loss has no gradient in {where}: {_first(problem)}"
        ) from problem
    _require_finite(o, probed, risk)
    _require_repeated(o, risk.gradient, again)
    close = GRADIENT_CLOSE[probed.dtype]
    if error <= close < aside:
        _refuse_cut(o, names, risk.gradient, taken)
    if max(error, aside) > close:
        where = _culprit(probed, lambda *given: _exceeds(_gradient_error, close, *given))
        raise UnsupportedModelError(
            f"{o.where}: the gradient is not the derivative of the loss, off by "
            f"{max(error, min(aside, 1.0)):.0%}; the reason lies in {where}. A stop-gradient "
            "(detach), a straight-through estimator, a gradient reversal, a backward function of "
            "one's own or activation checkpointing does that; there is then no Hessian, so nothing "
            "here could predict its retraining. Replace it, or leave it out"
        )
    moved = ((risk.gradient != 0) | taken).cpu()
    return live.put(inherited.clone(), moved)


def _live(o: Objective, inherited: Tensor) -> list[str]:
    """Names of the parameters that the stage trains or an earlier one has trained."""
    own, spans = set(o.trained_names), o.layout.spans.items()
    return [n for n, s in spans if n in own or bool(inherited[s.start : s.stop].any())]


def _require_finite(o: Objective, probed: Objective, risk: "_Risk") -> None:
    if not bool(torch.isfinite(risk.gradient).all()):
        raise UnsupportedModelError(
            f"{o.where}: the gradient of the loss is NaN or inf; the reason lies in "
            f"{_culprit(probed, _not_finite)}. A square root or logarithm at 0 or below does that, "
            "also in a branch that torch.where leaves out"
        )


def _require_repeated(o: Objective, first: Tensor, again: Tensor) -> None:
    limit = 1e-3 if first.dtype == torch.float32 else 1e-9
    if not float((first - again).norm()) <= limit * float(first.norm()):
        raise UnsupportedModelError(
            f"{o.where}: a second call gives another gradient at the same weights, so model or "
            "loss draws random numbers or remembers its calls; influence needs fixed functions"
        )


def _refuse_cut(o: Objective, names: list[str], gradient: Tensor, taken: Tensor) -> None:
    """Refuse parameters of an earlier stage that the loss depends on without a gradient in them."""
    sizes = [len(o.layout.spans[name]) for name in names]
    parts = zip(names, gradient.split(sizes), taken.split(sizes), strict=True)
    cut = [name for name, own, from_before in parts if from_before.any() and not own.any()]
    if cut:
        shown = ", ".join(map(repr, cut[:3])) + (f" and {len(cut) - 3} more" * (len(cut) > 3))
        raise UnsupportedModelError(
            f"{o.where}: the loss depends on {shown}, taken over from an earlier stage, but has no "
            "gradient there: detach() or no_grad() in the model cuts it off, and with it all "
            "influence of that stage. Take it out; link=Frozen() keeps parameters as they are "
            "anyway"
        )


def _error_aside(risk: "_Risk", taken: Tensor, noise: float) -> float:
    """The relative error of the loss's slope in a random direction of the parameters that move.

    Those that no example moves are left out, however the loss depends on them: the padding row of
    an `Embedding`. Where nothing has a gradient, all count.

    Args:
        risk: the loss.
        taken: which parameters an earlier stage moves, ``(P,)``.
        noise: how far the loss may be off by rounding.
    """
    theta, gradient = risk.theta, risk.gradient
    moved = (gradient != 0) | taken
    moved = moved if bool(moved.any()) else torch.ones_like(moved)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(len(theta), generator=generator, dtype=theta.dtype).to(theta.device) * moved
    v = v / v.norm()
    expected = float(gradient @ v)
    size = abs(expected) + float(gradient.norm()) / math.sqrt(int(moved.sum()))
    if not math.isfinite(size):
        return 0.0
    close, best = GRADIENT_CLOSE[theta.dtype], math.inf
    with torch.no_grad(), exact_products():
        for h in STEPS[theta.dtype]:
            if noise / h > 0.2 * close * size and size > 0:
                continue
            up, down = (float(risk.value(theta + s * h * v)) for s in (1, -1))
            gap = max(0.0, abs((up - down) / (2 * h) - expected) - noise / h)
            if size == 0:  # no gradient at all: then there must be no slope either
                return math.inf if gap > 0 else 0.0
            best = min(best, gap / size)
            if best < 0.1 * close:
                break
    return best if math.isfinite(best) else 0.0


def missing_second_derivative(o: Objective) -> str:
    """Why this stage's Hessian cannot be trusted, in words; empty if it can."""
    return o.once("second derivative", lambda: _missing_second_derivative(o))


def require_second_derivative(o: Objective, what: str) -> None:
    """Refuse what needs a Hessian where there is none; ``what``: the method's name for the message.

    Raises:
        UnsupportedModelError: naming the layer and the methods that do without.
    """
    if reason := missing_second_derivative(o):
        raise UnsupportedModelError(
            f"{o.where}: {what} needs second derivatives, but {reason}. Use "
            + ("" if missing_loss_curvature(o) else "curvature='ggn', ")
            + "a baseline such as GradientDot(), or another layer or loss"
        )


def require_loss_curvature(o: Objective) -> None:
    """Refuse a Gauss-Newton matrix where the loss has no second derivative in the outputs.

    Raises:
        UnsupportedModelError: naming the methods that do without.
    """
    if reason := missing_loss_curvature(o):
        raise UnsupportedModelError(
            f"{o.where}: curvature='ggn' needs the loss's second derivatives in the outputs, but "
            f"{reason}. Use a baseline such as GradientDot(), or another loss"
        )


def missing_loss_curvature(o: Objective) -> str:
    """Why the loss has no Hessian in the model's outputs, in words; empty if it has one."""
    return o.once("loss curvature", lambda: _missing_loss_curvature(o))


def _missing_loss_curvature(o: Objective) -> str:
    probed = _probed(o)
    if probed is None:
        return ""
    with torch.no_grad():
        z = probed.outputs(probed.shifted(SHIFTS[1]), probed.data.x[: len(probed.data)])
    if not z.is_floating_point():
        return ""

    def value(theta: Tensor) -> Tensor:
        return probed.loss(theta.view_as(z), probed.data.y).sum()

    try:
        error = _hessian_error(value, z.reshape(-1))
    except FAILURES as problem:
        return f"PyTorch has none for the loss: {_first(problem)}"
    return f"the loss's are wrong by {error:.0%}" if error > HESSIAN_CLOSE else ""


def _missing_second_derivative(o: Objective) -> str:
    probed = _probed(o)
    if probed is None:
        return ""
    sizes = [len(o.layout.spans[name]) for name in o.trained_names]
    try:
        risk = _Risk(probed, o.trained_names)
        error = _hessian_error(risk.value, risk.theta, sizes)
    except FAILURES as problem:
        where = _culprit(probed, lambda *given: _fails(_hessian_error, *given))
        return f"PyTorch has none for {where}: {_first(problem)}"
    if error > HESSIAN_CLOSE:
        where = _culprit(probed, lambda *given: _exceeds(_hessian_error, HESSIAN_CLOSE, *given))
        return f"those of {where} are wrong by {error:.0%}"
    return ""


def _not_finite(value: Value, theta: Tensor) -> bool:
    return not bool(torch.isfinite(_slope(value, theta)[1]).all())


def _fails(error: Callable, value: Value, theta: Tensor) -> bool:
    try:
        error(value, theta)
    except FAILURES:
        return True
    return False


def _exceeds(error: Callable, close: float, value: Value, theta: Tensor) -> bool:
    try:
        return error(value, theta) > close
    except FAILURES:
        return False


def _probed(o: Objective) -> Objective | None:
    """The stage on a few examples, in float64 where it can be; None where it is too coarse.

    In float32 rounding leaves no step size at which the kinks of a ReLU net do not count.
    """
    coarse = computing_dtype(o) in HALF
    few = o.on(o.data[few_unequal(o, o.data).tolist()])
    if not coarse and (o.dtype == torch.float64 or o.layout.size > COPIED):
        return few
    # Autocast leaves float64 alone, so what uses it does not round there either.
    precise = torch.float32 if o.dtype in HALF and o.layout.size > COPIED else torch.float64
    for cast in (_called_with, _copied):
        with contextlib.suppress(Exception):  # it insists on its dtype: whatever it says
            double = cast(few, precise)
            _Risk(double, o.trained_names)
            return double
    return None if coarse else few


def _called_with(o: Objective, dtype: torch.dtype) -> Objective:
    return o.cast(dtype)


@exclusive
def _copied(o: Objective, dtype: torch.dtype) -> Objective:
    """Activation checkpointing reads the module's own weights, so these must have the dtype too."""
    model = copy.deepcopy(o.model).to(dtype)
    return Objective(model, o.data.to(dtype), o.loss, trained=o.trained_names)


class _Risk:
    """A weighted loss of the examples as a function of the parameters of these names.

    Attributes:
        value: the function.
        theta: where it is differentiated.
        gradient: its gradient there.
        rounding: of the loss, from that of the outputs: a confident classifier's loss is far
            smaller than the rounding of what it is computed from.
    """

    def __init__(self, o: Objective, names: list[str]):
        self.objective, self.names = o, names
        self.x, self.y = o.data.x[: len(o.data)], o.data.y
        draw = torch.Generator().manual_seed(0)
        signs = torch.randn(len(self.y), generator=draw, dtype=o.dtype).sign()
        self.weights = (1 + 0.5 * signs).to(o.device)
        for size in SHIFTS:
            self.full = o.shifted(size)
            self.theta = o.layout.places(names).take(self.full)
            self.gradient = _slope(self.value, self.theta)[1]
            if bool(torch.isfinite(self.gradient).all()):
                break
        with torch.no_grad():
            outputs = o.outputs(self.full, self.x)
        largest = float(outputs.abs().max()) if outputs.is_floating_point() else 0.0
        self.rounding = 8 * torch.finfo(o.dtype).eps * largest * len(self.y)

    def value(self, theta: Tensor) -> Tensor:
        layout = self.objective.layout
        named = layout.named(self.full)
        parts = theta.split([len(layout.spans[name]) for name in self.names])
        for name, part in zip(self.names, parts, strict=True):
            named[name] = part.reshape(layout.shapes[name])
        return (self.weights * self.objective.losses(named, self.x, self.y)).sum()


def _rounding(value: Value, theta: Tensor, gradient: Tensor) -> float:
    """How far the loss jumps, beyond what its gradient says, when θ hardly moves.

    In float64 θ moves by far more than a unit of its last place, since a model or loss may compute
    in float32 inside, where less would not show.
    """
    step = 1e-7 if theta.dtype == torch.float64 else 2 * torch.finfo(theta.dtype).eps
    with torch.no_grad(), exact_products():
        return 4 * max(_jumps(value, theta, gradient, step))


def _jumps(value: Value, theta: Tensor, gradient: Tensor, step: float) -> list[float]:
    here, moved = value(theta), []
    generator = torch.Generator().manual_seed(4)
    for _ in range(4 if len(theta) < LARGE else 2):
        signs = torch.randn(len(theta), generator=generator, dtype=theta.dtype).sign()
        nearby = theta * (1 + step * signs.to(theta.device))
        moved.append(abs(float(value(nearby) - here - gradient @ (nearby - theta))))
    return moved


def _slope(value: Value, theta: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), exact_products():
        leaf = theta.detach().requires_grad_()
        result = value(leaf)
        if not result.requires_grad:
            return leaf, torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(
            result, leaf, create_graph=create_graph, materialize_grads=True
        )
    return leaf, gradient


def _gradient_error(
    value: Value, theta: Tensor, gradient: Tensor | None = None, noise: float | None = None
) -> float:
    """The relative error of the gradient's length as the loss's slope along it.

    Along itself a gradient stands out most from rounding; 0 where even there it does not.
    """
    gradient = _slope(value, theta)[1] if gradient is None else gradient
    size = float(gradient.norm())
    if not 0 < size < math.inf:
        return 0.0
    v, close, best = gradient / size, GRADIENT_CLOSE[theta.dtype], math.inf
    with torch.no_grad(), exact_products():
        noise = _rounding(value, theta, gradient) if noise is None else noise
        for h in STEPS[theta.dtype]:
            if noise / h > 0.2 * close * size:  # rounding alone could look like a fault
                continue
            difference = float(value(theta + h * v) - value(theta - h * v)) / (2 * h)
            best = min(best, abs(difference - size) / size)
            if best < 0.1 * close:
                break
    return best if math.isfinite(best) else 0.0


def _hessian_error(value: Value, theta: Tensor, sizes: list[int] | None = None) -> float:
    """The relative error of one Hessian product against differences of gradients.

    Args:
        value: the function.
        theta: where, ``(P,)``.
        sizes: of the tensors that θ consists of: the one that is most wrong counts.
    """
    leaf, gradient = _slope(value, theta, create_graph=True)
    size = float(gradient.detach().norm())
    if not 0 < size < math.inf:
        return 0.0
    v = _direction(gradient.detach(), torch.Generator().manual_seed(1))
    product = torch.zeros_like(theta)
    if gradient.requires_grad:
        with exact_products():
            (product,) = torch.autograd.grad(gradient, leaf, v, materialize_grads=True)
    floor = 1e-3 * size / math.sqrt(len(theta))
    if not math.isfinite(float(product.norm())):
        return 0.0

    def slopes() -> Iterator[Tensor]:
        for h in STEPS[theta.dtype]:
            up, down = (_slope(value, theta + s * h * v)[1] for s in (1, -1))
            yield (up - down) / (2 * h)

    return _smallest_error(slopes(), product, floor, sizes or [len(theta)])


def _smallest_error(
    slopes: Iterable[Tensor], product: Tensor, floor: float, sizes: list[int]
) -> float:
    """How far a product is from differences, at the step where they come closest.

    A single tensor of the parameters counts only if the differences agree with each other there,
    and in float32 everything: at kinks each step gives something else.
    """
    whole, single, before = math.inf, math.inf, None
    coarse = product.dtype != torch.float64
    norm = float(product.norm())
    for slope in slopes:
        gaps = [float(g.norm()) for g in (slope - product).split(sizes)]
        norms = [float(p.norm()) + floor + 1e-3 * norm for p in product.split(sizes)]
        single = min(single, max(g / n for g, n in zip(gaps, norms, strict=True)))
        whole = min(whole, float((slope - product).norm()) / (norm + floor))
        if before is not None:
            apart = [float(d.norm()) for d in (slope - before).split(sizes)]
            steady = [g / n for g, d, n in zip(gaps, apart, norms, strict=True) if d < 0.1 * g]
            if max(steady, default=0.0) > (0.3 if coarse else HESSIAN_CLOSE):
                return max(steady)
        if whole < 0.1 * HESSIAN_CLOSE and (single < 0.1 * HESSIAN_CLOSE or before is not None):
            break
        before = slope
    return 0.0 if coarse else whole


def _direction(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector among the parameters that have a gradient at all.

    No example moves the others, however the loss depends on them: the padding row of an
    `Embedding`, or what stands behind a whole detached branch.
    """
    v = torch.randn(len(gradient), generator=generator, dtype=gradient.dtype).to(gradient.device)
    v = v * (gradient != 0)
    return v / v.norm()


@exclusive
def _culprit(o: Objective, faulty: Callable[[Value, Tensor], bool]) -> str:
    """The innermost module that alone shows the fault, in words."""
    given: dict[str, tuple[tuple, dict]] = {}

    def keep(name):
        def hook(module, args, kwargs):
            given.setdefault(name, (args, kwargs))

        return hook

    modules = {name: module for name, module in o.model.named_modules() if name}
    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad():
            o.outputs(o.layout.flatten(o.model).to(o.dtype), o.data.x[: len(o.data)])
    finally:
        for hook in hooks:
            hook.remove()
    for name in sorted(given, key=lambda name: -name.count(".")):
        with torch.no_grad(), contextlib.suppress(Exception):  # only what runs alone can be blamed
            value, theta = _alone(modules[name], o.dtype, *given[name])
            value(theta)
            if len(theta) and faulty(value, theta):
                return f"layer {name!r} ({type(modules[name]).__name__})"
    return "the model's own forward pass or its loss"


def _alone(
    module: nn.Module, dtype: torch.dtype, args: tuple, kwargs: dict
) -> tuple[Value, Tensor]:
    """A bent combination of a module's outputs as a function of its parameters and inputs."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    named = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
    buffers = {n: b.to(dtype) if b.is_floating_point() else b for n, b in module.named_buffers()}
    tensors = [*named.values(), *(args[i].detach() for i in places)]
    sizes = [t.numel() for t in tensors]
    theta = torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.zeros(0)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(len(theta), generator=generator, dtype=theta.dtype).to(theta.device)

    def value(theta: Tensor) -> Tensor:
        parts = theta.split(sizes)
        views = [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
        inputs = list(args)
        for i, view in zip(places, views[len(named) :], strict=True):
            inputs[i] = view.clone()  # which an in-place layer may overwrite
        state = dict(zip(named, views, strict=False))
        state |= {name: buffer.clone() for name, buffer in buffers.items()}
        with twice_differentiable(module):
            outputs = functional_call(module, state, tuple(inputs), kwargs)
        outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
        draw = torch.Generator().manual_seed(3)
        cotangent = torch.randn(outputs.shape, generator=draw, dtype=theta.dtype).to(theta.device)
        # Bent, so that the second derivative of a linear layer is asked for too.
        return (outputs.sin() * cotangent).sum()

    return value, theta + 0.05 * noise


def _first(problem: Exception) -> str:
    """The first sentence of PyTorch's own words."""
    return str(problem).strip().splitlines()[0].split(". ")[0].rstrip(".")
