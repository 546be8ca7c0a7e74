"""Checks made up front: what would otherwise fail late, or be silently wrong."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..data.examples import Examples, unequal
from ..data.fields import Fields
from ..data.randomness import States, draws_from
from ..errors import UnsupportedModelError
from .exclusive import exclusive
from .layout import same_numbers
from .losses import is_cross_entropy, next_token_loss, target_function
from .objective import Objective
from .precision import computing_dtype
from .questions import (
    CUT,
    MEASURE,
    SLOPE_CLOSE,
    Question,
    check_aggregate,
    is_step,
    make_question,
    slope_error,
)
from .switches import exact_products
from .wrapping import Wrapped

__all__ = ["ask", "check_examples", "check_layers", "require_derivatives"]


@exclusive
def check_examples(objective: Objective, examples: Examples, name: str) -> tuple[Tensor, Tensor]:
    """Check by a forward pass over a few examples that the model and its loss can treat them.

    Args:
        objective: the stage.
        examples: data or queries.
        name: what messages call the examples.

    Returns:
        the positions of those that were looked at ``(B,)``, and the outputs for them ``(B, ...)``.

    Raises:
        ValueError, TypeError: dtype, device, shape or labels do not fit the model and its loss.
        UnsupportedModelError: the model is random or mixes the examples of a batch.
    """
    _check_inputs(objective, examples, name)
    require_derivatives(objective.where)
    check_layers(objective.model, objective.where)
    _check_targets(objective, examples, name)
    few = unequal(examples).to(examples.x.device)
    x = examples.x[few]
    y = examples.y[few]
    outputs = _checked_outputs(objective, examples, x, name)
    for buffer, value in objective.model.named_buffers():  # some are made in the first call
        objective.buffers.setdefault(buffer, value.detach().clone())
    if is_cross_entropy(objective.loss):
        _check_labels(objective, examples, outputs, name)
    if objective.loss is next_token_loss:
        _check_tokens(objective, examples, outputs, name)
    _check_losses(objective, outputs, y, name)
    if examples is objective.data:
        _check_training(objective, x, y, name)
    return few, outputs


def require_derivatives(where: str) -> None:
    """Raise `ValueError` inside `torch.inference_mode`, where tensors keep no derivatives."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{where}: PyTorch keeps no derivatives inside torch.inference_mode(); leave it, or "
            "use torch.no_grad()"
        )


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
    here, there = (getattr(e.x, "field_names", None) for e in (examples, o.data))
    if here != there:
        kinds = [f"the fields {names}" if names else "one tensor" for names in (here, there)]
        raise ValueError(
            f"{name}.x is {kinds[0]}, the data of {o.where} {kinds[1]}; give both alike "
            "(msif.Fields.pad makes fields of sequences that happen to be equally long)"
        )


def _check_targets(o: Objective, examples: Examples, name: str) -> None:
    """Check what the labels mean, and the dtype of floating targets."""
    named = examples.has_labels and o.data.has_labels and examples.named and o.data.named
    if named and examples.classes != o.data.classes[: len(examples.classes)]:
        raise ValueError(
            f"{name} have classes {examples.classes}, {o.where} has {o.data.classes}: "
            "labels would mean something else; "
            "select the queries with the same classes in the same order, or name their text "
            "labels in the stage's order: Examples(x, y, classes=data.classes)"
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
    given = tree_map(torch.clone, x)
    calls: list[Tensor] = []
    try:
        with torch.no_grad(), exact_products():
            drawn = draws_from(lambda: calls.append(probe.outputs(full, x)), o.model.modules())
            _refuse_draws(probe, full, x, drawn)
            _check_writes(probe, full, x, given)
            alone = _one_by_one(probe, full, x)
            elsewhere = _outputs_elsewhere(probe, x) if examples is o.data else (alone, alone)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model raises that was made for other inputs
        raise ValueError(
            f"{name}.x of shape {tuple(examples.x.shape)} "
            f"does not fit the model of {o.where}: {type(error).__name__}: {error}"
            f"{_hint(o, x, name)}"
        ) from error
    outputs, again = calls[:2]
    if not outputs.is_floating_point():
        raise UnsupportedModelError(
            f"{o.where}: the model gives {outputs.dtype}, which has no derivative; "
            "return the floating numbers that it was computed from, such as logits"
        )
    # NaN where the loss does not look, as behind padding, is the model's own business.
    fixed = torch.allclose(outputs, again, rtol=0, atol=0, equal_nan=True)
    close = _tolerance(o)
    if not fixed or not _close(outputs, alone, close, 1e-2) or not _close(*elsewhere, close, 1e-2):
        raise UnsupportedModelError(
            f"{o.where}: the model's outputs change from call to call "
            "or with the batch around an example; influence needs a deterministic function "
            "of each example (call model.eval(), drop batch statistics)"
        )
    return outputs


def _hint(o: Objective, x: Tensor | Fields, name: str) -> str:
    """What the inputs are and the likely way out, where a model fails on them."""
    if isinstance(x, Fields):
        if isinstance(o.model, Wrapped):
            return ""
        return (
            f"; it was called with a dictionary of {x.field_names}: if it takes them one by one, "
            "use msif.wrap(model, call=lambda m, batch: m(**batch).logits) or the like"
        )
    rows = [m.num_embeddings for m in o.model.modules() if isinstance(m, nn.Embedding)]
    dtype = str(x.dtype).removeprefix("torch.")
    if x.is_floating_point():
        return f"; {name}.x is {dtype}, and tokens must be integers: x.long()" if rows else ""
    if rows:
        found = f"{int(x.min())} .. {int(x.max())}"
        return f"; {name}.x holds {found}, the embedding has the rows 0 .. {min(rows) - 1}"
    scaled = " / 255" if x.dtype == torch.uint8 else ""
    return f"; {name}.x is {dtype}, so convert it yourself: x.to({o.dtype}){scaled}"


def _check_writes(o: Objective, full: Tensor, x: Tensor, given: Tensor) -> None:
    """Refuse a model whose call has changed its buffers, its parameters or its inputs.

    Args:
        o: the stage, with buffers of its own for the call.
        full: what the parameters are after the call.
        x, given: what the inputs are after the call, and what they were.
    """
    for name, buffer in o.model.named_buffers():
        if name in o.buffers and not same_numbers(buffer, o.buffers[name]):
            raise UnsupportedModelError(
                f"{o.where}: calling the model writes into its buffer {name!r}, "
                "so it is not a fixed function; call model.eval() first, or replace that layer"
            )
    now = o.layout.named(full)
    for name, parameter in o.model.named_parameters():
        if not same_numbers(parameter, now[name]):
            raise UnsupportedModelError(
                f"{o.where}: calling the model writes into its parameter {name!r}, so it is not a "
                "fixed function; compute with a changed copy instead (weight / weight.norm())"
            )
    if not all(map(torch.equal, tree_leaves(x), tree_leaves(given))):
        raise UnsupportedModelError(
            f"{o.where}: calling the model writes into its inputs, which are the examples "
            "themselves; work on a copy (x = x.clone()), or make its first layer not in-place"
        )


def _refuse_draws(o: Objective, full: Tensor, x: Tensor, drawn: list[str]) -> None:
    """Refuse a model that moves the generators of these names, if any."""
    if drawn:
        raise UnsupportedModelError(
            f"{o.where}: {_drawing(o, full, x)} draws from {' and '.join(drawn)}, so the model's "
            "outputs change from call to call, if only on some examples; influence needs a "
            "deterministic function of each example: call model.eval(), or leave that part out"
        )


def _drawing(o: Objective, full: Tensor, x: Tensor) -> str:
    """The innermost module whose call moves a random generator, in words."""
    inside: list[States] = []
    found: list[str] = []

    def enter(module, given):
        inside.append(States([module]))

    def leave(name):
        def hook(module, given, outputs):
            if inside.pop().moved() and not found:
                found.append(f"layer {name!r} ({type(module).__name__})")

        return hook

    hooks = []
    for name, module in o.model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave(name)))
    start = States(o.model.modules())
    try:
        with torch.no_grad():
            o.outputs(full, x)
    finally:
        start.restore()
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the model's own forward pass"


def _check_labels(o: Objective, examples: Examples, outputs: Tensor, name: str) -> None:
    """Check that labels for cross-entropy are integers, each with its own output."""
    y = examples.y
    if not examples.has_labels:
        raise ValueError(
            f"{name}.y {tuple(y.shape)} {y.dtype}: cross_entropy needs integer labels (N,); "
            f"{_as_labels(y)}"
        )
    highest = int(y.max())
    if outputs.ndim != 2 or highest >= outputs.shape[1]:
        from_one = " (y - 1 where they start at 1)" if int(y.min()) == 1 else ""
        raise ValueError(
            f"{name}.y holds the label {highest}, the model of {o.where} has "
            f"outputs {tuple(outputs.shape[1:])}: labels must be 0 .. {outputs.shape[-1] - 1}"
            f"{from_one}; use select() or more outputs"
        )


def _as_labels(y: Tensor) -> str:
    """How targets of another form become labels, in words."""
    if y.ndim == 1:
        return "use y.long() if they are labels, mean_squared_error if they are numbers"
    if y.ndim == 2 and y.shape[1] == 1:
        return "use y[:, 0]"
    one_hot = y.ndim == 2 and bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
    return "they look one-hot: use y.argmax(1)" if one_hot else "use another loss for others"


def _check_tokens(o: Objective, examples: Examples, outputs: Tensor, name: str) -> None:
    """Check that every token for next-token loss has its own output."""
    y = examples.y
    if y.is_floating_point() or y.ndim != 2 or outputs.shape[1:2] != y.shape[1:2]:
        raise ValueError(
            f"{name}.y {tuple(y.shape)} {y.dtype}: next_token_loss needs integer tokens (N, T) "
            f"and outputs (N, T, V), the model of {o.where} gives {tuple(outputs.shape)}"
        )
    if int(y.min()) < 0 or int(y.max()) >= outputs.shape[-1]:
        raise ValueError(
            f"{name}.y holds tokens {int(y.min())} .. {int(y.max())}, the model of {o.where} has "
            f"outputs for 0 .. {outputs.shape[-1] - 1}; where positions shall not count, as -100 "
            "says elsewhere, give a loss of your own that leaves them out"
        )


def _check_losses(o: Objective, outputs: Tensor, y: Tensor, name: str) -> None:
    """Check that the loss gives one number per example, from that example alone."""
    _per_example(o, o.loss, outputs, y, f"{o.where}: loss(outputs, targets)", f"example of {name}")


def _check_training(o: Objective, x: Tensor, y: Tensor, name: str) -> None:
    """Check that the loss is finite at the start, and that the trained parameters change it."""
    full = o.layout.flatten(o.model)
    theta = o.trained.take(full).detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = o.losses(o.parameters(theta, full), x, y)
    if not bool(torch.isfinite(losses).all()):
        at = (~torch.isfinite(losses)).nonzero().flatten()
        raise ValueError(
            f"{o.where}: loss(outputs, targets) gives NaN or inf on {name} at the model's present "
            f"weights, {losses[at[0]].item()} for the target {y[at[0]].tolist()}; check the loss, "
            "the targets and the scale of the inputs"
        )
    if not losses.requires_grad:
        raise ValueError(
            f"{o.where}: no trained parameter changes the loss, so nothing can be learned; model "
            "or loss cuts the graph by detach(), no_grad(), item(), NumPy or argmax: take it out"
        )


def _per_example(
    o: Objective,
    function: Callable,
    outputs: Tensor,
    y: Tensor,
    what: str,
    each: str,
    wide: bool = False,
) -> Tensor:
    """Values of a loss or target, checked to be one fixed number per example, from it alone.

    Args:
        o: the stage.
        function: ``(outputs, targets) -> (B,)``.
        outputs, y: what it is called with.
        what, each: how messages call the function and an example.
        wide: whether K numbers per example will do as well, ``(B, K)``.
    """
    count = len(y)
    given = outputs.clone(), y.clone()
    calls: list[Tensor] = []
    try:
        with torch.no_grad():
            drawn = draws_from(lambda: calls.append(function(outputs, y)), [function])
            singly = [function(outputs[i : i + 1], y[i : i + 1]) for i in range(count)]
    except Exception as error:  # whatever a function raises that was made for other arguments
        raise ValueError(
            f"{what} fails on outputs {tuple(outputs.shape)} and targets {tuple(y.shape)}, one row "
            f"per {each}: {type(error).__name__}: {error}"
        ) from error
    if drawn:
        raise ValueError(
            f"{what} draws from {' and '.join(drawn)}, so it may change from call to call; "
            "influence needs a fixed function: draw the numbers once, beforehand"
        )
    if not _alike(outputs, given[0]) or not _alike(y, given[1]):
        raise ValueError(
            f"{what} writes into the outputs or targets that it is given; "
            "let it work on a copy (outputs.clone())"
        )
    values = calls[0]
    _require_row(values, count, what, each, wide)
    one = values[:1]
    if not all(isinstance(value, Tensor) and value.numel() == one.numel() for value in singly):
        number = "one number" if values.ndim == 1 else "numbers"
        raise ValueError(
            f"{what} gives something else than {number} {tuple(one.shape)} for one {each}"
        )
    alone = torch.cat([value.reshape(one.shape) for value in singly])
    if not _close(values, alone, _tolerance(o)):
        raise ValueError(
            f"{what} mixes the examples of a batch; it must give one per {each}, from it alone"
        )
    return values


def _require_row(values, count: int, what: str, each: str, wide: bool) -> None:
    """Refuse what is no tensor of one real number per example; or of several, if ``wide``."""
    expected = f"expected a tensor (B,), here one per {each.partition(' ')[0]} ({count},)"
    if not isinstance(values, Tensor):
        raise ValueError(f"{what} gives {type(values).__name__}, {expected}")
    if values.shape != (count,) and not (wide and values.ndim == 2 and len(values) == count):
        way_out = "take the mean or sum over all dimensions but the first"
        if values.ndim == 0:
            way_out = 'use reduction="none" instead of a mean over the batch'
        elif values.numel() == count:
            way_out = "use .reshape(-1)"
        elif values.shape == (count, count):
            way_out = "outputs and targets were broadcast: give them equal shapes"
        raise ValueError(f"{what} gives {tuple(values.shape)}, {expected}; {way_out}")
    if not values.is_floating_point():
        raise ValueError(f"{what} gives {values.dtype}, {expected} of floating numbers")


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are the same, NaN too."""
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _outputs_elsewhere(o: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs together and one by one at other weights: a head of zeros hides all the rest."""
    with contextlib.suppress(Exception):  # which need not be weights that the model can have
        full = o.shifted(0.2)
        return o.outputs(full, x), _one_by_one(o, full, x)
    return torch.zeros(0), torch.zeros(0)


def _one_by_one(o: Objective, full: Tensor, x: Tensor) -> Tensor:
    return torch.cat([o.outputs(full, x[i : i + 1]) for i in range(len(x))])


def _close(left: Tensor, right: Tensor, close: float, floor: float = 0.0) -> bool:
    """Whether numbers agree relative to the largest, or to ``floor`` where all are smaller."""
    size = float(left.detach().nan_to_num().abs().max()) if left.numel() else 0.0
    scale = close * min(1.0, max(size, floor))
    return left.shape == right.shape and torch.allclose(
        left, right, rtol=close, atol=scale, equal_nan=True
    )


def _tolerance(o: Objective) -> float:
    """How far apart results in a batch and alone may be through rounding in this stage."""
    dtype = computing_dtype(o)
    if dtype == torch.float32 and o.dtype == torch.float64:  # only parts of it, such as norms
        return 1e-5
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 3e-2)


def ask(
    objective: Objective,
    queries: Examples,
    target: str | Callable,
    aggregate=None,
    *,
    derivative: bool = False,
) -> Question:
    """The quantity q asked about, checked on these queries.

    Args:
        objective: the stage whose model answers.
        queries: the test examples.
        target: a name or a function, see `target_function`.
        aggregate: None, or how one number is made of all queries, see `make_question`.
        derivative: whether the answer will be differentiated.

    Raises:
        ValueError, TypeError: the queries do not fit the model, the target is not one finite
            number per query, the aggregate does not fit, or a derivative is needed and there is
            none.
    """
    few, outputs = check_examples(objective, queries, "queries")
    function = target_function(target, objective.loss)
    if target == "margin" and not queries.has_labels:
        raise ValueError(
            "target='margin' needs class labels, "
            f"queries.y is {tuple(queries.y.shape)} {queries.y.dtype}"
        )
    question = make_question(objective, queries, function, target, aggregate)
    what, wide, y = "target(outputs, targets)", callable(aggregate), queries.y[few]
    _per_example(objective, function, outputs, y, what, "query", wide)
    if derivative or callable(aggregate):
        check_aggregate(question, objective, derivative)
    if derivative and is_step(function, outputs, y):
        raise ValueError(
            f"{what} has no derivative in the outputs, or one that is zero everywhere, like all "
            "that counts or cuts the graph by argmax, a comparison, round, detach(), item() or "
            f"NumPy; {MEASURE}"
        )
    if derivative and (error := slope_error(function, outputs, y)) > SLOPE_CLOSE:
        raise ValueError(f"{what}: {CUT.format(error)}")
    return question


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
