"""How the tensors of a space form the matrices that structured operators multiply from two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """How a weight, or a weight and its bias, forms matrices ``[G, R, S]``: groups, rows and columns.

    A weight ``[d0, d1, ...]`` is cut along its first axis into G groups ``[d0 / G, d1 · d2 · ...]``, each of which is a
    matrix or, where ``transposed``, the transpose of one. A bias ``[G · R]`` is the last column of these matrices. A
    vector ``[P]`` forms the matrix ``[1, P, 1]``.

    Cost: views where one tensor forms the matrices, a copy where a bias is joined.

    Args:
        shapes: Shape of the weight, or of the weight and its bias.
        groups: Number of groups, G.
        transposed: Whether the weight holds the transposes.
        is_column: Whether all entries of the weight, whatever its shape, form one column ``[G, R, 1]``.

    Raises:
        ValueError: If the shapes do not form such matrices.

    >>> Arrangement(((6, 5, 3), (6,)), groups=2).matrix_shape
    (2, 3, 16)
    """

    shapes: tuple[tuple[int, ...], ...]
    groups: int = 1
    transposed: bool = False
    is_column: bool = False

    def __post_init__(self) -> None:
        if len(self.shapes) not in (1, 2):
            raise ValueError(f"shapes: expected those of a weight, or of a weight and a bias, got {self.shapes}.")
        first = self._first_axis
        if self.groups < 1 or first % self.groups:
            raise ValueError(f"groups: {self.groups} groups do not divide the first axis of {list(self.shapes[0])}.")
        if len(self.shapes) == 2 and self.shapes[1] != (self.groups * self.num_rows,):
            raise ValueError(
                f"shapes: a bias beside a weight {list(self.shapes[0])} in {self.groups} groups"
                f"{', transposed,' if self.transposed else ''} has shape [{self.groups * self.num_rows}], got "
                f"{list(self.shapes[1])}."
            )

    @property
    def _first_axis(self) -> int:
        if self.is_column:
            return prod(self.shapes[0])
        return self.shapes[0][0] if self.shapes[0] else 1

    @property
    def _weight_matrix(self) -> tuple[int, int]:
        """Rows and columns of a group of the weight as it is stored."""
        return self._first_axis // self.groups, 1 if self.is_column else prod(self.shapes[0][1:])

    @property
    def has_bias(self) -> bool:
        """Whether the last column is a bias."""
        return len(self.shapes) == 2

    @property
    def num_rows(self) -> int:
        """Rows of each matrix, R."""
        return self._weight_matrix[1 if self.transposed else 0]

    @property
    def num_columns(self) -> int:
        """Columns of each matrix, S, the bias included."""
        return self._weight_matrix[0 if self.transposed else 1] + int(self.has_bias)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Groups, rows and columns."""
        return self.groups, self.num_rows, self.num_columns

    def is_like(self, other: Arrangement) -> bool:
        """Whether the same vector, flat, forms the same matrices."""
        plain = not (self.transposed or other.transposed or self.has_bias or other.has_bias)
        return self == other or (plain and self.matrix_shape == other.matrix_shape)

    def gather(self, X: Sequence[Tensor]) -> Tensor:
        """The matrices ``[K, G, R, S]`` that columns-last tensors ``[*shape, K]`` form."""
        num = X[0].shape[-1]
        weight = X[0].movedim(-1, 0).reshape(num, self.groups, *self._weight_matrix)
        weight = weight.mT if self.transposed else weight
        if not self.has_bias:
            return weight
        return torch.cat([weight, X[1].movedim(-1, 0).reshape(num, self.groups, self.num_rows, 1)], dim=-1)

    def scatter(self, Y: Tensor) -> list[Tensor]:
        """The columns-last tensors ``[*shape, K]`` that form the matrices ``[K, G, R, S]``."""
        weight = Y[..., :-1] if self.has_bias else Y
        parts = [weight.mT if self.transposed else weight]
        if self.has_bias:
            parts.append(Y[..., -1])
        return [part.reshape(len(Y), *shape).movedim(0, -1) for part, shape in zip(parts, self.shapes, strict=True)]
