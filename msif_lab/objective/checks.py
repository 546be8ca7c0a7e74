"""Checks made up front: what would otherwise fail late, or be silently wrong."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.examples import Examples, unequal
from ..errors import UnsupportedModelError
from .losses import cross_entropy, target_function
from .objective import Objective, exact_convolutions

__all__ = ["ask", "check_examples", "check_layers"]


def check_examples(objective: Objective, examples: Examples, name: str) -> None:
    """Check by a forward pass over a few examples that the model and its loss can treat them.

    Args:
        objective: the stage.
        examples: data or queries.
        name: what messages call the examples.

    Raises:
        ValueError, TypeError: dtype, device, shape or labels do not fit the model and its loss.
        UnsupportedModelError: the model is random or mixes the examples of a batch.
    """
    _check_inputs(objective, examples, name)
    check_layers(objective.model, objective.where)
    _check_targets(objective, examples, name)
    few = unequal(examples).to(examples.x.device)
    x = examples.x[few]
    y = examples.y[few]
    outputs = _checked_outputs(objective, examples, x, name)
    if objective.loss is cross_entropy:
        _check_labels(objective, examples, outputs, name)
    _check_losses(objective, outputs, y, name)


def _check_inputs(o: Objective, examples: Examples, name: str) -> None:
    """Check the type of the examples, and the device and dtype of their inputs."""
    if not isinstance(examples, Examples):
        raise TypeError(
            f"{name} must be msif_lab.Examples, not {type(examples).__name__}; "
            "wrap it: Examples(x, y)"
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


def _check_targets(o: Objective, examples: Examples, name: str) -> None:
    """Check what the labels mean, and the dtype of floating targets."""
    named = examples.has_labels and o.data.has_labels and examples.named and o.data.named
    if named and examples.classes != o.data.classes[: len(examples.classes)]:
        raise ValueError(
            f"{name} have classes {examples.classes}, {o.where} has {o.data.classes}: "
            "labels would mean something else; "
            "select the queries with the same classes in the same order"
        )
    dtype = next(o.model.parameters()).dtype
    if examples.y.is_floating_point() and examples.y.dtype != dtype:
        raise ValueError(
            f"{name}.y is {examples.y.dtype}, the model is {dtype}; use {name}.to({dtype})"
        )


def _checked_outputs(o: Objective, examples: Examples, x: Tensor, name: str) -> Tensor:
    """The outputs for ``x``, checked to be a fixed function of each example alone."""
    full = o.layout.flatten(o.model)
    probe = o.on(o.data)
    try:
        with torch.no_grad(), exact_convolutions():
            outputs = probe.outputs(full, x)
            again = probe.outputs(full, x)
            alone = torch.cat([probe.outputs(full, x[i : i + 1]) for i in range(len(x))])
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{name}.x of shape {tuple(examples.x.shape)} "
            f"does not fit the model of {o.where}: {error}"
        ) from error
    for buffer, before in o.buffers.items():
        if not torch.equal(before, probe.buffers[buffer]):
            raise UnsupportedModelError(
                f"{o.where}: calling the model writes into its buffer {buffer!r}, "
                "so it is not a fixed function; call model.eval() first, or replace that layer"
            )
    if outputs.is_floating_point() and not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            f"{o.where}: the model's outputs are NaN or inf on some {name}; look for a logarithm "
            "or root of a negative number, or for weights that diverged"
        )
    close = _tolerance(outputs)
    fixed = torch.equal(outputs, again)
    single = outputs.shape == alone.shape and torch.allclose(outputs, alone, close, close)
    if not fixed or not single:
        raise UnsupportedModelError(
            f"{o.where}: the model's outputs change from call to call "
            "or with the batch around an example; influence needs a deterministic function "
            "of each example (call model.eval(), drop batch statistics)"
        )
    return outputs


def _check_labels(o: Objective, examples: Examples, outputs: Tensor, name: str) -> None:
    """Check that labels for cross-entropy are integers, each with its own output."""
    if not examples.has_labels:
        raise ValueError(
            f"{name}.y {tuple(examples.y.shape)} {examples.y.dtype}: "
            "cross_entropy needs integer labels (N,)"
        )
    if outputs.ndim != 2 or int(examples.y.max()) >= outputs.shape[1]:
        raise ValueError(
            f"{name}.y holds the label {int(examples.y.max())}, the model of {o.where} has "
            f"outputs {tuple(outputs.shape[1:])}: labels must be 0 .. {outputs.shape[-1] - 1}; "
            "use select() or more outputs"
        )


def _check_losses(o: Objective, outputs: Tensor, y: Tensor, name: str) -> None:
    """Check that the loss gives one number per example, from that example alone."""
    count = len(y)
    try:
        with torch.no_grad():
            losses = o.loss(outputs, y)
            singly = [o.loss(outputs[i : i + 1], y[i : i + 1]) for i in range(count)]
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"{o.where}: loss(outputs, targets) fails on {name}: {error}") from error
    if losses.shape != (count,):
        raise ValueError(
            f"{o.where}: loss(outputs, targets) gives {tuple(losses.shape)}, "
            f"expected one per example ({count},)"
        )
    alone = torch.cat([loss.reshape(-1) for loss in singly])
    close = _tolerance(outputs)
    if not torch.allclose(losses, alone, rtol=close, atol=close, equal_nan=True):
        raise ValueError(
            f"{o.where}: loss(outputs, targets) mixes the examples of a batch; "
            "it must give one per example"
        )


def _tolerance(outputs: Tensor) -> float:
    """How far apart results in a batch and alone may be through rounding in this dtype."""
    return 1e-3 if outputs.dtype in (torch.float32, torch.float16, torch.bfloat16) else 1e-8


def ask(
    objective: Objective, queries: Examples, target: str | Callable
) -> Callable[[Tensor, Tensor], Tensor]:
    """The quantity q asked about, checked on these queries.

    Args:
        objective: the stage whose model answers.
        queries: the test examples.
        target: a name or a function, see `target_function`.

    Raises:
        ValueError, TypeError: the queries do not fit the model, or the target is not one finite
            number per query.
    """
    check_examples(objective, queries, "queries")
    function = target_function(target, objective.loss)
    if target == "margin" and not queries.has_labels:
        raise ValueError(
            "target='margin' needs class labels, "
            f"queries.y is {tuple(queries.y.shape)} {queries.y.dtype}"
        )
    few = unequal(queries).to(queries.x.device)
    y = queries.y[few]
    with torch.no_grad():
        outputs = objective.outputs(objective.layout.flatten(objective.model), queries.x[few])
        values = function(outputs, y)
    if not isinstance(values, Tensor) or values.shape != (len(outputs),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"target(outputs, targets) gives {given}, "
            f"expected one number per query, (B,) = ({len(outputs)},)"
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"target gives NaN or inf on some queries: {values.tolist()}")
    with torch.no_grad():
        singly = [function(outputs[i : i + 1], y[i : i + 1]).reshape(-1) for i in range(len(y))]
    close = _tolerance(outputs)
    alone = torch.cat(singly)
    if values.shape != alone.shape or not torch.allclose(values, alone, rtol=close, atol=close):
        raise ValueError(
            "target(outputs, targets) mixes the queries of a batch; it must give one number per "
            "query, from that query's outputs alone"
        )
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
            f"{where}: layer {name!r} ({type(layer).__name__}) has {problem}, "
            "so an example's loss depends on more than that example; "
            "call model.eval() first, or replace the layer (GroupNorm instead of BatchNorm)"
        )
