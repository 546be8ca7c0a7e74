"""Small smooth networks in two named parts, ``embedding`` and ``head``; any ``nn.Module`` works as
well.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

__all__ = ["EmbeddingHead", "convnet", "mlp", "softmax_regression"]


class EmbeddingHead(nn.Module):
    """``head(embedding(x))``: the embedding is what a later stage takes over, the head is its own.

    Args:
        embedding: maps inputs ``(B, ...)`` to features ``(B, width)``.
        head: maps features to outputs ``(B, classes)``.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module):
        super().__init__()
        self.embedding, self.head = embedding, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


def _build(make: Callable[[], EmbeddingHead], seed: int, zero_head: bool) -> EmbeddingHead:
    with torch.random.fork_rng(devices=[]):  # PyTorch's initialisers know only the global generator
        torch.manual_seed(seed)
        model = make()
    if zero_head:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    return model


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive whole number")


def mlp(
    in_features: int,
    hidden: Sequence[int] = (16,),
    *,
    classes: int,
    activation: Callable[[], nn.Module] = nn.Tanh,
    zero_head: bool = False,
    seed: int = 0,
) -> EmbeddingHead:
    """A fully connected net, tanh by default so that curvature exists everywhere.

    Args:
        in_features: inputs of any shape are flattened to this many numbers.
        hidden: widths of the embedding's layers.
        classes: outputs of the head.
        activation: makes one activation module.
        zero_head: start the head at zero, the usual choice for finetuning.
        seed: of the initial weights (the global generator is left as it was).

    >>> [name for name, _ in mlp(64, hidden=(16,), classes=4).named_parameters()]
    ['embedding.1.weight', 'embedding.1.bias', 'head.weight', 'head.bias']
    """
    if isinstance(hidden, int):
        raise TypeError(f"hidden={hidden} must be a sequence of widths, e.g. ({hidden},)")
    widths = [in_features, *hidden]
    _positive(
        in_features=in_features,
        classes=classes,
        **{f"hidden[{i}]": w for i, w in enumerate(hidden)},
    )

    def make():
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        return EmbeddingHead(nn.Sequential(*layers), nn.Linear(widths[-1], classes))

    return _build(make, seed, zero_head)


def softmax_regression(
    in_features: int, classes: int, *, zero_head: bool = False, seed: int = 0
) -> EmbeddingHead:
    """A linear model: the embedding only flattens, so the objective with weight decay is strictly
    convex.
    """
    return mlp(in_features, hidden=(), classes=classes, zero_head=zero_head, seed=seed)


def convnet(
    in_shape: Sequence[int],
    channels: Sequence[int] = (8, 16),
    width: int = 32,
    *,
    classes: int,
    activation: Callable[[], nn.Module] = nn.Tanh,
    norm_groups: int | None = None,
    zero_head: bool = False,
    seed: int = 0,
) -> EmbeddingHead:
    """A small convolutional net: 3 × 3 convolution, activation, 2 × 2 average pool for each of
    ``channels``, then one hidden layer of ``width`` features and the head.

    Args:
        in_shape: ``(channels, height, width)`` of one input.
        channels: feature maps after each convolution.
        width: size of the feature vector the head sees.
        norm_groups: if given, GroupNorm with this many groups after each convolution: normalisation
            that, unlike BatchNorm, leaves an example's loss a function of that example.
        classes, activation, zero_head, seed: as in `mlp`.

    Raises:
        ValueError: ``in_shape`` is not three numbers, or too small for this many poolings; groups
            that do not divide the channels.

    >>> sum(p.numel() for p in convnet((1, 14, 14), classes=4).parameters())
    6020
    """
    if len(in_shape) != 3 or in_shape[0] < 1 or min(in_shape[1:]) < 2 ** len(channels):
        raise ValueError(
            f"in_shape={tuple(in_shape)} must be (channels, height, width) with sides of at least "
            f"{2 ** len(channels)} for {len(channels)} poolings"
        )
    _positive(width=width, classes=classes, **{f"channels[{i}]": c for i, c in enumerate(channels)})
    if norm_groups is not None and (norm_groups < 1 or any(c % norm_groups for c in channels)):
        raise ValueError(
            f"norm_groups={norm_groups} must divide each of channels={tuple(channels)}"
        )

    def make():
        layers: list[nn.Module] = []
        (maps, height, side) = in_shape
        for after in channels:
            norm = [] if norm_groups is None else [nn.GroupNorm(norm_groups, after)]
            layers += [nn.Conv2d(maps, after, 3, padding=1), *norm, activation(), nn.AvgPool2d(2)]
            maps, height, side = after, height // 2, side // 2
        layers += [nn.Flatten(), nn.Linear(maps * height * side, width), activation()]
        return EmbeddingHead(nn.Sequential(*layers), nn.Linear(width, classes))

    return _build(make, seed, zero_head)
