"""Small smooth networks in two named parts, ``embedding`` and ``head``.

The library takes any ``nn.Module``; these are the ones of the lessons.
"""

import contextlib
import itertools
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..arguments import (
    check_flag,
    check_instance,
    check_seed,
    check_whole,
    is_number,
    listed,
    shown,
)

__all__ = ["EmbeddingHead", "convnet", "mlp", "softmax_regression"]


class EmbeddingHead(nn.Module):
    """``head(embedding(x))``: a later stage takes over the embedding and has its own head.

    Args:
        embedding: maps inputs ``(B, ...)`` to features ``(B, width)``.
        head: maps features to outputs ``(B, classes)``.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module):
        super().__init__()
        for name, part in (("embedding", embedding), ("head", head)):
            check_instance(name, part, nn.Module, "give a module, such as torch.nn.Linear(4, 2)")
        self.embedding = embedding
        self.head = head

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
        try:
            check_whole(name, size)
        except ValueError:
            raise ValueError(f"{name}={shown(size)} must be a positive whole number") from None


def _checked(activation, zero_head, seed) -> None:
    """Refuse what does not make activation modules, and what is no switch or seed."""
    check_flag("zero_head", zero_head)
    check_seed("seed", seed)
    made = None
    if callable(activation) and not isinstance(activation, nn.Module):
        with contextlib.suppress(TypeError):
            made = activation()
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"activation={shown(activation)} must make a module when it is called without "
            "arguments, such as torch.nn.Tanh, the class itself"
        )


def _widths(name: str, given) -> list:
    """Sizes of layers as a list."""
    if is_number(given):
        raise TypeError(f"{name}={given} must be a sequence of widths, e.g. ({given},)")
    return listed(name, given, "a sequence of widths, e.g. (16,)")


def mlp(
    in_features: int,
    hidden: Sequence[int] = (16,),
    *,
    classes: int,
    activation: Callable[[], nn.Module] = nn.Tanh,
    zero_head: bool = False,
    seed: int = 0,
) -> EmbeddingHead:
    """A fully connected network; tanh by default, so that curvature exists everywhere.

    Args:
        in_features: numbers in one input; inputs of any shape are flattened.
        hidden: widths of the embedding's layers.
        classes: outputs of the head.
        activation: makes one activation module; called once per layer.
        zero_head: start the head at zero, the usual choice for finetuning.
        seed: of the initial weights; the global generator is left as it was.

    >>> [name for name, _ in mlp(64, hidden=(16,), classes=4).named_parameters()]
    ['embedding.1.weight', 'embedding.1.bias', 'head.weight', 'head.bias']
    """
    hidden = _widths("hidden", hidden)
    _checked(activation, zero_head, seed)
    widths = [in_features, *hidden]
    named = {f"hidden[{i}]": width for i, width in enumerate(hidden)}
    _positive(in_features=in_features, classes=classes, **named)

    def make():
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        return EmbeddingHead(nn.Sequential(*layers), nn.Linear(widths[-1], classes))

    return _build(make, seed, zero_head)


def softmax_regression(
    in_features: int, classes: int, *, zero_head: bool = False, seed: int = 0
) -> EmbeddingHead:
    """A linear model, whose embedding only flattens.

    With cross-entropy and weight decay its objective is strictly convex.
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
    """A small convolutional network with one hidden layer between its convolutions and the head.

    For each of ``channels`` a 3 × 3 convolution, the activation and a 2 × 2 average pool; then the
    hidden layer of ``width`` features, and the head.

    Args:
        in_shape: ``(channels, height, width)`` of one input.
        channels: feature maps after each convolution.
        width: size of the feature vector, the input of the head.
        norm_groups: if given, GroupNorm with this many groups after each convolution: normalisation
            that, unlike BatchNorm, leaves an example's loss a function of that example.
        classes, activation, zero_head, seed: as in `mlp`.

    Raises:
        ValueError: ``in_shape`` is not three numbers, or too small for this many poolings; groups
            that do not divide the channels.

    >>> sum(p.numel() for p in convnet((1, 14, 14), classes=4).parameters())
    6020
    """
    channels = _widths("channels", channels)
    _checked(activation, zero_head, seed)
    sides = listed("in_shape", in_shape, "(channels, height, width) of one input")
    whole = all(isinstance(side, numbers.Integral) and side is not True for side in sides)
    fine = len(sides) == 3 and whole and sides[0] >= 1
    if not fine or min(sides[1:]) < 2 ** len(channels):
        raise ValueError(
            f"in_shape={tuple(sides)} must be whole numbers (channels, height, width) with "
            f"sides of at least {2 ** len(channels)} for {len(channels)} poolings"
        )
    named = {f"channels[{i}]": maps for i, maps in enumerate(channels)}
    _positive(width=width, classes=classes, **named)
    norm_groups = check_whole("norm_groups", norm_groups, none="no normalisation")
    if norm_groups is not None and any(c % norm_groups for c in channels):
        raise ValueError(
            f"norm_groups={norm_groups} must divide each of channels={tuple(channels)}"
        )

    def make():
        layers: list[nn.Module] = []
        maps, height, breadth = in_shape
        for after in channels:
            norm = [] if norm_groups is None else [nn.GroupNorm(norm_groups, after)]
            layers += [nn.Conv2d(maps, after, 3, padding=1), *norm, activation(), nn.AvgPool2d(2)]
            maps = after
            height //= 2
            breadth //= 2
        layers += [nn.Flatten(), nn.Linear(maps * height * breadth, width), activation()]
        return EmbeddingHead(nn.Sequential(*layers), nn.Linear(width, classes))

    return _build(make, seed, zero_head)
