"""Labelled examples and texts that keep their ids, public data sets, data spoilt on purpose."""

from .corpora import load_brown, load_newsgroups, load_reuters, load_reviews
from .corruption import Corrupted, duplicate, flip_labels, out_of_distribution, plant
from .datasets import load_cifar10, load_cifar10_labels, load_digits, load_mnist
from .examples import Examples, Inputs
from .fields import Fields
from .texts import Texts

__all__ = [
    "Corrupted",
    "Examples",
    "Fields",
    "Inputs",
    "Texts",
    "duplicate",
    "flip_labels",
    "load_brown",
    "load_cifar10",
    "load_cifar10_labels",
    "load_digits",
    "load_mnist",
    "load_newsgroups",
    "load_reuters",
    "load_reviews",
    "out_of_distribution",
    "plant",
]
