"""Losses with one number per example, and the quantities q whose influence can be asked for."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import check_number, check_tensor, numbers_of, shown

__all__ = ["cross_entropy", "mean_squared_error", "next_token_loss"]


def _negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``log Σ_c exp z_c − z_y``, in elementwise steps.

    Under forward mode and over lanes this is several times faster than PyTorch's own cross_entropy,
    which falls back to Python decompositions there.
    """
    largest = logits.detach().amax(-1, keepdim=True)
    correct = torch.arange(logits.shape[-1], device=logits.device) == labels[..., None]
    # NaN for a label without an output
    picked = logits.where(correct, 0.0).sum(-1).where(correct.any(-1), torch.nan)
    return (logits - largest).exp().sum(-1).log() + largest[..., 0] - picked


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each label in nats: logits ``(B, C)``, labels ``(B,)`` → ``(B,)``.

    As ``torch.nn.functional.cross_entropy(..., reduction="none")``: with class weights c and label
    smoothing ε

        ``f = −(1 − ε) c_y log p_y − (ε/C) Σ_k c_k log p_k``

    A stage's loss with either is ``functools.partial(msif.cross_entropy, label_smoothing=0.1)``.
    The stage divides their sum by the number of examples, where PyTorch's ``reduction="mean"``
    divides by ``Σ_i c_{y_i}`` of the batch: class weights of mean one over the data come closest to
    it. ``target="loss"`` asks about this very loss of a query.

    Args:
        outputs, targets: logits and labels; more dimensions before C are fine.
        weight: of each class ``(C,)``, none negative; default one.
        label_smoothing: ε in [0, 1].

    Raises:
        TypeError, ValueError: shapes that do not fit; settings out of range.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    >>> cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), label_smoothing=0.1)
    tensor([0.2269])
    """
    check_tensor("outputs", outputs, "(B, C)")
    check_tensor("targets", targets, "(B,)")
    if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must be (B, C) "
            "and (B,), a label for each row of logits"
        )
    check_number("label_smoothing", label_smoothing, lambda e: 0 <= e <= 1, "in [0, 1]")
    losses = _negative_log_likelihood(outputs, targets)
    if weight is None and not label_smoothing:
        return losses
    classes = outputs.shape[-1]
    each = outputs.new_ones(classes) if weight is None else _class_weights(weight, outputs)
    # Σ_k c_k (log Σ_j exp z_j − z_k)
    spread = outputs.logsumexp(-1) * each.sum() - (outputs * each).sum(-1)
    kept = (1 - label_smoothing) * each[targets.clamp(0, classes - 1).long()] * losses
    return kept + label_smoothing / classes * spread


def _class_weights(weight: Tensor | Sequence[float], outputs: Tensor) -> Tensor:
    """The weights of the classes ``(C,)``, checked, as the outputs are."""
    what = f"{outputs.shape[-1]} weights, zero or positive, one for each class"
    dtype = None if isinstance(weight, Tensor) else outputs.dtype
    each = numbers_of("weight", weight, what, dtype)
    # Of weights on a GPU the sign would cost a synchronisation at every step.
    wrong = each.device.type == "cpu" and not bool(((each >= 0) & each.isfinite()).all())
    if wrong or each.dtype == torch.bool or each.shape != outputs.shape[-1:]:
        raise ValueError(f"weight={shown(weight)} must be {what}")
    return each.to(outputs.device, outputs.dtype)


def is_cross_entropy(loss: Callable) -> bool:
    """Whether a loss is `cross_entropy`, with settings of its own or without."""
    return (loss.func if isinstance(loss, functools.partial) else loss) is cross_entropy


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each example, averaged over its outputs.

    Outputs ``(B, ...)`` and targets ``(B, ...)`` → ``(B,)``; a single output may have its own
    dimension or none.

    >>> mean_squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([2.])
    """
    check_tensor("outputs", outputs, "(B, ...)")
    check_tensor("targets", targets, "(B, ...)")
    if outputs.ndim == 0 or targets.ndim == 0:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} must have a row "
            "per example"
        )
    if outputs.shape != targets.shape and outputs.shape[0] == outputs.numel() == targets.numel():
        outputs = outputs.reshape(targets.shape)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} "
            "must have equal shapes"
        )
    return ((outputs - targets) ** 2).reshape(len(outputs), -1).mean(1)


def next_token_loss(outputs: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each sequence's next tokens in nats, averaged over the tokens.

    Logits ``(B, T, V)`` and tokens ``(B, T)`` → ``(B,)``.

    >>> next_token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]))
    tensor([0.6931])
    """
    check_tensor("outputs", outputs, "(B, T, V)")
    check_tensor("tokens", tokens, "(B, T)")
    fits = outputs.ndim == 3 and tokens.shape == outputs.shape[:2] and outputs.shape[1] > 1
    if not fits:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and tokens {tuple(tokens.shape)} must be "
            "(B, T, V) and (B, T), T of 2 or more"
        )
    return _negative_log_likelihood(outputs[:, :-1], tokens[:, 1:]).mean(1)


def _margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds of the correct class: ``z_y − log Σ_{c≠y} exp z_c = −log(exp(loss) − 1)``."""
    correct = torch.arange(outputs.shape[-1], device=outputs.device) == targets[..., None]
    others = outputs.masked_fill(correct, -torch.inf)
    return (outputs * correct).sum(-1) - others.logsumexp(-1)


def _single_output(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs[0].numel() != 1:
        raise ValueError(
            "target='output' needs one output per example, "
            f"the model gives {tuple(outputs.shape[1:])}; "
            "use target='loss', 'margin' or a function of (outputs, targets)"
        )
    return outputs.reshape(len(outputs))


def target_function(target: str | Callable, loss: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """The quantity q asked about, as ``(outputs, targets) -> (B,)``."""
    named = {"loss": loss, "margin": _margin, "output": _single_output}
    if callable(target):
        return target
    if isinstance(target, str) and target in ("accuracy", "error"):
        hit = "==" if target == "accuracy" else "!="
        raise ValueError(
            f"target={target!r} is a step function of the parameters: its derivative is zero "
            "almost everywhere, so no example has influence on it. Ask for target='margin' or "
            f"'loss', and measure {target} itself by retraining: removal_effects(pipeline, "
            "queries, subsets, aggregate='mean', "
            f"target=lambda z, y: (z.argmax(-1) {hit} y).to(z.dtype))"
        )
    if not isinstance(target, str) or target not in named:
        raise ValueError(
            f"target={shown(target)} must be one of {sorted(named)} "
            "or a function (outputs, targets) -> (B,)"
        )
    return named[target]


def target_name(target: str | Callable) -> str:
    """The name of a target in results: its own, the function's, or ``"custom"``."""
    return target if isinstance(target, str) else getattr(target, "__name__", "custom")
