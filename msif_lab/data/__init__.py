"""Labelled examples that keep their identity, and the real data sets of the lessons."""

from .datasets import load_cifar10, load_digits, load_mnist
from .examples import Examples, Inputs
from .fields import Fields

__all__ = ["Examples", "Fields", "Inputs", "load_cifar10", "load_digits", "load_mnist"]
