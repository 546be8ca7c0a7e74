"""Labelled examples that keep their identity, the lessons' data sets, data spoilt on purpose."""

from .corruption import Corrupted, duplicate, flip_labels, out_of_distribution, plant
from .datasets import load_cifar10, load_cifar10_labels, load_digits, load_mnist
from .examples import Examples, Inputs
from .fields import Fields

__all__ = [
    "Corrupted",
    "Examples",
    "Fields",
    "Inputs",
    "duplicate",
    "flip_labels",
    "load_cifar10",
    "load_cifar10_labels",
    "load_digits",
    "load_mnist",
    "out_of_distribution",
    "plant",
]
