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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..data.examples import unequal
from ..errors import UnsupportedModelError
from ..objective.objective import Objective
from ..objective.precision import HALF, computing_dtype
from ..objective.switches import exact_products, twice_differentiable
from .gate import FEW, LARGE, shifted

STEPS = {
    torch.float64: (1e-4, 1e-5, 1e-6, 1e-7, 1e-3, 1e-2),
    torch.float32: (1e-2, 3e-3, 3e-2, 1e-3),
}
GRADIENT_CLOSE = {torch.float64: 5e-3, torch.float32: 3e-1}
HESSIAN_CLOSE = 1e-2
SHIFTS = (0.2, 0.01, 0.0)  # of the weights; the first at which loss and gradient are finite
COPIED = 10**8  # parameters of a model up to which a float64 copy is made
FAILURES = (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError)

Value = Callable[[Tensor], Tensor]


def check_gradient(o: Objective) -> None:
    """Refuse a stage whose gradient is not the derivative of its loss.

    Raises:
        UnsupportedModelError: with the layer, as far as it can be told.
    """
    probed = _probed(o)
    if probed is None:
        return
    try:
        risk = _risk(probed)
        with torch.enable_grad():
            if not risk.value(risk.theta.detach().requires_grad_()).requires_grad:
                raise RuntimeError("it is constant, or made of steps, in every trained parameter")
        first = risk.gradient
        again = _slope(risk.value, risk.theta)[1]
        error = _gradient_error(risk.value, risk.theta, first, risk.rounding)
    except FAILURES as problem:
        where = _culprit(probed, lambda *given: _fails(_gradient_error, *given))
        raise UnsupportedModelError(
            f"{o.where}: the loss has no gradient in {where}: {_first(problem)}"
        ) from problem
    if not bool(torch.isfinite(first).all()):
        raise UnsupportedModelError(
            f"{o.where}: the gradient of the loss is NaN or inf; the reason lies in "
            f"{_culprit(probed, _not_finite)}. A square root or logarithm at 0 or below does that, "
            "also in a branch that torch.where leaves out"
        )
    close = GRADIENT_CLOSE[probed.dtype]
    limit = 1e-3 if probed.dtype == torch.float32 else 1e-9
    if not float((first - again).norm()) <= limit * float(first.norm()):
        raise UnsupportedModelError(
            f"{o.where}: a second call gives another gradient at the same weights, so model or "
            "loss draws random numbers or remembers its calls; influence needs fixed functions"
        )
    if error > close:
        where = _culprit(probed, lambda *given: _exceeds(_gradient_error, close, *given))
        raise UnsupportedModelError(
            f"{o.where}: the gradient is not the derivative of the loss, off by {error:.0%}; the "
            f"reason lies in {where}. A stop-gradient (detach), a straight-through estimator, a "
            "gradient reversal, a backward function of one's own or activation checkpointing does "
            "that; there is then no Hessian, so nothing here could predict its retraining. "
            "Replace it, or leave it out"
        )


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
    o.forget("probed", "risk")
    if probed is None:
        return ""
    with torch.no_grad():
        z = probed.outputs(shifted(probed, SHIFTS[1]), probed.data.x[: len(probed.data)])
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
    o.forget("probed", "risk")  # nobody asks for them again, and they hold a copy of the model
    if probed is None:
        return ""
    try:
        risk = _risk(probed)
        error = _hessian_error(risk.value, risk.theta)
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
    """The stage on a few examples, in float64 where it is small enough to be copied.

    In float32 rounding leaves no step size at which the kinks of a ReLU net do not count.
    """
    return o.once("probed", lambda: _make_probed(o))


def _make_probed(o: Objective) -> Objective | None:
    coarse = computing_dtype(o) in HALF
    few = unequal(o.data, FEW if o.layout.size < LARGE else 2).tolist()
    if not coarse and (o.dtype == torch.float64 or o.layout.size > COPIED):
        return o.on(o.data[few])
    # Autocast leaves float64 alone, so the copy of a model that uses it does not round either.
    precise = torch.float32 if o.dtype in HALF and o.layout.size > COPIED else torch.float64
    try:
        model = copy.deepcopy(o.model).to(precise)
        double = Objective(model, o.data[few].to(precise), o.loss, trained=o.trained_names)
        double.losses(double.layout.flatten(model), double.data.x, double.data.y)
    except Exception:  # cannot be copied, or insists on its dtype: whatever it says, we do without
        return None if coarse else o.on(o.data[few])
    return double


@dataclass(frozen=True)
class _Risk:
    """A weighted loss of the examples as a function of θ.

    Attributes:
        value: the function.
        theta: where it is differentiated.
        gradient: its gradient there.
        rounding: of the loss, from that of the outputs: a confident classifier's loss is far
            smaller than the rounding of what it is computed from.
    """

    value: Value
    theta: Tensor
    gradient: Tensor
    rounding: float


def _risk(o: Objective) -> _Risk:
    return o.once("risk", lambda: _make_risk(o))


def _make_risk(o: Objective) -> _Risk:
    generator = torch.Generator().manual_seed(0)
    x, y = o.data.x[: len(o.data)], o.data.y
    weights = 1 + 0.5 * torch.randn(len(y), generator=generator, dtype=o.dtype).sign().to(o.device)
    for size in SHIFTS:
        full = shifted(o, size)

        def value(theta: Tensor, full=full) -> Tensor:
            return (weights * o.losses(o.parameters(theta, full), x, y)).sum()

        theta = o.trained.take(full)
        _, gradient = _slope(value, theta)
        if bool(torch.isfinite(gradient).all()):
            break
    with torch.no_grad():
        outputs = o.outputs(o.parameters(theta, full), x)
    largest = float(outputs.abs().max()) if outputs.is_floating_point() else 0.0
    return _Risk(value, theta, gradient, 8 * torch.finfo(o.dtype).eps * largest * len(y))


def _rounding(value: Value, theta: Tensor, gradient: Tensor) -> float:
    """How far the loss jumps, beyond what its gradient says, when θ hardly moves.

    In float64 θ moves by far more than a unit of its last place, since a model or loss may compute
    in float32 inside, where less would not show.
    """
    step = 1e-7 if theta.dtype == torch.float64 else 2 * torch.finfo(theta.dtype).eps
    here, moved = value(theta), []
    generator = torch.Generator().manual_seed(4)
    for _ in range(4 if len(theta) < LARGE else 2):
        signs = torch.randn(len(theta), generator=generator, dtype=theta.dtype).sign()
        nearby = theta * (1 + step * signs.to(theta.device))
        moved.append(abs(float(value(nearby) - here - gradient @ (nearby - theta))))
    return 4 * max(moved)


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
    value: Value, theta: Tensor, gradient: Tensor | None = None, rounding: float = 0.0
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
        noise = rounding + _rounding(value, theta, gradient)
        for h in STEPS[theta.dtype]:
            if noise / h > 0.2 * close * size:  # rounding alone could look like a fault
                continue
            difference = float(value(theta + h * v) - value(theta - h * v)) / (2 * h)
            best = min(best, abs(difference - size) / size)
            if best < 0.1 * close:
                break
    return best if math.isfinite(best) else 0.0


def _hessian_error(value: Value, theta: Tensor) -> float:
    """The relative error of one Hessian product against differences of gradients."""
    leaf, gradient = _slope(value, theta, create_graph=True)
    size = float(gradient.detach().norm())
    if not 0 < size < math.inf:
        return 0.0
    v = _direction(gradient.detach(), torch.Generator().manual_seed(1))
    if gradient.requires_grad:
        with exact_products():
            (product,) = torch.autograd.grad(gradient, leaf, v, materialize_grads=True)
    else:
        product = torch.zeros_like(theta)
    if theta.dtype != torch.float64:  # that it exists is all that float32 can tell
        return 0.0
    scale = float(product.norm()) + 1e-3 * size / math.sqrt(len(theta))
    if not math.isfinite(scale):
        return 0.0
    best = math.inf
    for h in STEPS[theta.dtype]:
        up, down = (_slope(value, theta + s * h * v)[1] for s in (1, -1))
        gap = float(((up - down) / (2 * h) - product).norm())
        best = min(best, gap / scale)
        if best < 0.1 * HESSIAN_CLOSE:
            break
    return best


def _direction(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector among the parameters that have a gradient at all.

    No example moves the others, however the loss depends on them: the padding row of an
    `Embedding`, or what stands behind a whole detached branch.
    """
    v = torch.randn(len(gradient), generator=generator, dtype=gradient.dtype).to(gradient.device)
    v = v * (gradient != 0)
    return v / v.norm()


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
            o.outputs(o.layout.flatten(o.model), o.data.x[: len(o.data)])
    finally:
        for hook in hooks:
            hook.remove()
    for name in sorted(given, key=lambda name: -name.count(".")):
        with torch.no_grad(), contextlib.suppress(Exception):  # only what runs alone can be blamed
            value, theta = _alone(modules[name], *given[name])
            value(theta)
            if len(theta) and faulty(value, theta):
                return f"layer {name!r} ({type(modules[name]).__name__})"
    return "the model's own forward pass or its loss"


def _alone(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Value, Tensor]:
    """A bent combination of a module's outputs as a function of its parameters and inputs."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    named = {name: p.detach() for name, p in module.named_parameters()}
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
        state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
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
