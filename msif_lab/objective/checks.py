"""What would fail later, or worse, would not fail: found before the work, with the way out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.examples import Examples
from ..errors import UnsupportedModelError
from .losses import cross_entropy, target_function
from .objective import Objective, exact_convolutions

__all__ = ["ask", "check_examples", "check_layers"]


def check_examples(objective: Objective, examples: Examples, name: str) -> None:
    """One forward pass over a few examples that finds what would fail later, or worse, would not
    fail.

    Raises:
        ValueError, TypeError: dtype, device, shape or labels do not fit the model and its loss.
        UnsupportedModelError: the model is random or mixes the examples of a batch.
    """
    o = objective
    if not isinstance(examples, Examples):
        raise TypeError(
            f"{name} must be msif_lab.Examples, not {type(examples).__name__}; wrap it: "
            "Examples(x, y)"
        )
    parameter = next(o.model.parameters())
    if examples.x.device != parameter.device:
        raise ValueError(
            f"{name}.x is on {examples.x.device}, the model of {o.where} on {parameter.device}; "
            "use .to()"
        )
    if examples.x.is_floating_point() and examples.x.dtype != parameter.dtype:
        raise ValueError(
            f"{name}.x is {examples.x.dtype}, the model of {o.where} is {parameter.dtype}; "
            f"convert one of them, e.g. {name}.to({parameter.dtype})"
        )
    if examples.x.dtype == torch.uint8:
        raise ValueError(
            f"{name}.x is uint8; scale it yourself, e.g. x.to(torch.get_default_dtype()) / 255"
        )
    check_layers(o.model, o.where)
    named = examples.has_labels and o.data.has_labels and examples.named and o.data.named
    if named and examples.classes != o.data.classes[: len(examples.classes)]:
        raise ValueError(
            f"{name} have classes {examples.classes}, {o.where} has {o.data.classes}: labels "
            "would mean something else; select the queries with the same classes in the same "
            "order"
        )
    if examples.y.is_floating_point() and examples.y.dtype != parameter.dtype:
        raise ValueError(
            f"{name}.y is {examples.y.dtype}, the model is {parameter.dtype}; use "
            f"{name}.to({parameter.dtype})"
        )
    few = torch.unique(torch.tensor([0, len(examples) // 2, len(examples) - 1]))
    x, y = examples.x[few], examples.y[few]
    full, probe = o.layout.flatten(o.model), o.on(o.data)
    try:
        with torch.no_grad(), exact_convolutions():
            outputs, again = probe.outputs(full, x), probe.outputs(full, x)
            alone = torch.cat([probe.outputs(full, x[i : i + 1]) for i in range(len(x))])
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{name}.x of shape {tuple(examples.x.shape)} does not fit the model of {o.where}: "
            f"{error}"
        ) from error
    for buffer, before in o.buffers.items():
        if not torch.equal(before, probe.buffers[buffer]):
            raise UnsupportedModelError(
                f"{o.where}: calling the model writes into its buffer {buffer!r}, so it is no "
                "fixed function; call model.eval() first, or replace that layer"
            )
    close = 1e-3 if outputs.dtype in (torch.float32, torch.float16, torch.bfloat16) else 1e-8
    if not torch.equal(outputs, again) or not torch.allclose(
        outputs, alone, rtol=close, atol=close
    ):
        raise UnsupportedModelError(
            f"{o.where}: the model's outputs change from call to call or with the batch around an "
            "example; influence needs a deterministic function of each example (call "
            "model.eval(), drop batch statistics)"
        )
    if o.loss is cross_entropy:
        if not examples.has_labels:
            raise ValueError(
                f"{name}.y {tuple(examples.y.shape)} {examples.y.dtype}: cross_entropy needs "
                "integer labels (N,)"
            )
        if outputs.ndim != 2 or int(examples.y.max()) >= outputs.shape[1]:
            raise ValueError(
                f"{name}.y holds the label {int(examples.y.max())}, the model of {o.where} has "
                f"outputs {tuple(outputs.shape[1:])}: labels must be 0 .. "
                f"{outputs.shape[-1] - 1}; use select() or more outputs"
            )
    try:
        with torch.no_grad():
            losses = o.loss(outputs, y)
            singly = [o.loss(outputs[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"{o.where}: loss(outputs, targets) fails on {name}: {error}") from error
    if losses.shape != (len(x),):
        raise ValueError(
            f"{o.where}: loss(outputs, targets) gives {tuple(losses.shape)}, expected one per "
            f"example ({len(x)},)"
        )
    if not torch.allclose(
        losses, torch.cat([s.reshape(-1) for s in singly]), rtol=close, atol=close, equal_nan=True
    ):
        raise ValueError(
            f"{o.where}: loss(outputs, targets) mixes the examples of a batch; it must give one "
            "per example"
        )


def ask(
    objective: Objective, queries: Examples, target: str | Callable
) -> Callable[[Tensor, Tensor], Tensor]:
    """The checked quantity q for these queries.

    Raises:
        ValueError, TypeError: the queries do not fit the model, or the target is no finite number
            per query.
    """
    check_examples(objective, queries, "queries")
    function = target_function(target, objective.loss)
    if target == "margin" and not queries.has_labels:
        raise ValueError(
            f"target='margin' needs class labels, queries.y is {tuple(queries.y.shape)} "
            f"{queries.y.dtype}"
        )
    with torch.no_grad():
        outputs = objective.outputs(objective.layout.flatten(objective.model), queries.x[:3])
        values = function(outputs, queries.y[:3])
    if not isinstance(values, Tensor) or values.shape != (len(outputs),):
        shape = (
            tuple(getattr(values, "shape", ()))
            if isinstance(values, Tensor)
            else type(values).__name__
        )
        raise ValueError(
            f"target(outputs, targets) gives {shape}, expected one number per query, (B,) = "
            f"({len(outputs)},)"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"target gives NaN or inf on the first queries: {values.tolist()}")
    return function


def check_layers(model: nn.Module, where: str) -> None:
    """Refuse dropout and batch statistics that are switched on."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
            problem = "dropout in train mode"
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and (
            layer.training or not layer.track_running_stats
        ):
            problem = "batch statistics in use"
        elif (
            isinstance(layer, nn.modules.instancenorm._InstanceNorm)
            and layer.training
            and layer.track_running_stats
        ):
            problem = "running statistics being updated"
        else:
            continue
        raise UnsupportedModelError(
            f"{where}: layer {name!r} ({type(layer).__name__}) has {problem}, so an example's "
            "loss is no function of that example; call model.eval() first, or replace the layer "
            "(GroupNorm instead of BatchNorm)"
        )
