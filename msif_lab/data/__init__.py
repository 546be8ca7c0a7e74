"""Labelled examples that keep their identity, and the real data sets of the lessons."""

from .datasets import load_cifar10, load_digits, load_mnist
from .examples import Examples, Inputs

__all__ = ["Examples", "Inputs", "load_cifar10", "load_digits", "load_mnist"]
