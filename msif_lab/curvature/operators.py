"""Symmetric matrices known only by their products, with algebra as in ``(A + damping) @ V``."""

import math

import torch
from torch import Tensor

from ..arguments import check_whole, is_number, shown
from ..memory import parse_bytes, require_memory

__all__ = ["Operator", "Shifted"]


class Operator:
    """A symmetric ``(P, P)`` matrix known only by its products with vectors.

    Supports ``A @ v`` for ``(P,)`` or ``(P, K)``, ``A + B``, ``A + number`` (times the identity),
    ``A + diagonal`` for a ``(P,)`` tensor, ``number * A``, and ``A.dense()``.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        check_whole("size", size)
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    def _product(self, vectors: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _product")

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if (
            not isinstance(vectors, Tensor)
            or vectors.ndim not in (1, 2)
            or vectors.shape[0] != self.shape[0]
        ):
            shape = tuple(getattr(vectors, "shape", ())) or type(vectors).__name__
            raise ValueError(
                f"operator of shape {self.shape} times {shape}: give a (P,) or (P, K) tensor"
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"operator of {self.dtype} on {self.device} "
                f"times {vectors.dtype} on {vectors.device}: convert one"
            )
        columns = vectors[:, None] if vectors.ndim == 1 else vectors
        product = self._product(columns) if columns.shape[1] else torch.zeros_like(columns)
        return product[:, 0] if vectors.ndim == 1 else product

    def unshifted(self) -> "tuple[Operator, Tensor | float]":
        """``(base, shift)`` with ``A = base + diag(shift)``.

        Work done on the base can be reused for other shifts.
        """
        return self, 0.0

    def __add__(self, other: "Operator | Tensor | float") -> "Operator":
        if isinstance(other, Operator):
            return _Sum(self, other)
        base, shift = self.unshifted()
        if isinstance(other, Tensor) and other.ndim and other.shape != (self.shape[0],):
            raise ValueError(
                f"cannot add {tuple(other.shape)} to an operator of shape {self.shape}: "
                "give a number or (P,)"
            )
        plain = is_number(other) and math.isfinite(other)
        if is_number(other) and not plain:
            raise ValueError(f"cannot add {other} to an operator: give a finite number")
        if not plain and not isinstance(other, Tensor):
            raise TypeError(
                f"cannot add {type(other).__name__} to an operator: "
                "give a number, a (P,) tensor or an operator"
            )
        return Shifted(base, shift + other)

    __radd__ = __add__

    def __mul__(self, factor: float) -> "Operator":
        scalar = isinstance(factor, Tensor) and factor.ndim == 0
        if not scalar and not (is_number(factor) and math.isfinite(factor)):
            raise TypeError(
                f"an operator can be multiplied by a finite number, not {shown(factor)}; "
                "products are A @ v"
            )
        return _Scaled(self, factor)

    __rmul__ = __mul__

    def dense(self, memory: str | int = "1GB") -> Tensor:
        """The matrix itself, ``(P, P)``, exactly symmetric.

        Raises:
            MemoryBudgetError: before any work, when making the matrix would exceed ``memory``.
        """
        size = self.shape[0]
        # Four matrices: this one, its transpose while it is made symmetric, and what a
        # factorisation adds.
        needed = 4 * size * size * torch.empty((), dtype=self.dtype).element_size()
        require_memory(
            needed,
            parse_bytes(memory),
            f"a dense {size} × {size} curvature",
            "use ConjugateGradient or give more memory=",
        )
        matrix = self._dense()
        return (matrix + matrix.T).div_(2)

    def _dense(self) -> Tensor:
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device})"
        )


class Shifted(Operator):
    """``base + diag(shift)``."""

    def __init__(self, base: Operator, shift: Tensor | float):
        super().__init__(base.shape[0], base.dtype, base.device)
        self.base = base
        self.shift = torch.as_tensor(shift, dtype=base.dtype, device=base.device)

    def unshifted(self) -> tuple[Operator, Tensor | float]:
        return self.base, self.shift

    def _product(self, vectors: Tensor) -> Tensor:
        shift = self.shift[:, None] if self.shift.ndim else self.shift
        return self.base @ vectors + shift * vectors

    def _dense(self) -> Tensor:
        return self.base._dense() + torch.diag(self.shift.expand(self.shape[0]))


class _Sum(Operator):
    def __init__(self, left: Operator, right: Operator):
        if left.shape != right.shape:
            raise ValueError(f"cannot add operators of shapes {left.shape} and {right.shape}")
        super().__init__(left.shape[0], left.dtype, left.device)
        self.left = left
        self.right = right

    def _product(self, vectors: Tensor) -> Tensor:
        return self.left @ vectors + self.right @ vectors


class _Scaled(Operator):
    def __init__(self, base: Operator, factor: float):
        super().__init__(base.shape[0], base.dtype, base.device)
        self.base = base
        self.factor = factor

    def _product(self, vectors: Tensor) -> Tensor:
        return self.factor * (self.base @ vectors)
