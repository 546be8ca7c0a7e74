"""Hessians and Gauss-Newton matrices as operators with algebra; derivatives of single examples."""

from .derivatives import (
    example_products,
    gradient_transpose,
    own_products,
    per_example_gradients,
    product_chunks,
)
from .matrices import GGN, DataCurvature, Hessian, curvature
from .operators import Operator, Shifted

__all__ = [
    "GGN",
    "DataCurvature",
    "Hessian",
    "Operator",
    "Shifted",
    "curvature",
    "example_products",
    "gradient_transpose",
    "own_products",
    "per_example_gradients",
    "product_chunks",
]
