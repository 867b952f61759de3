"""How the parameters of a layer are laid out as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor


class Layout(Protocol):
    """How the tensors of a layer form a matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Columns-last tensors ``[*shape, K]`` as matrices ``[K, rows, columns]``."""

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The way back."""


@dataclass(frozen=True, eq=False)
class OneColumn:
    """All tensors below one another, as a matrix of one column.

    Args:
        shapes: Their shapes.
    """

    shapes: Sequence[Sequence[int]]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of entries, and one."""
        return sum(prod(shape) for shape in self.shapes), 1

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Columns-last tensors ``[*shape, K]`` as matrices ``[K, D, 1]``."""
        return torch.cat([t.reshape(prod(t.shape[:-1]), t.shape[-1]) for t in tensors]).T.unsqueeze(-1)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The way back."""
        parts = matrix.squeeze(-1).T.split([prod(shape) for shape in self.shapes])
        return [part.reshape(*shape, matrix.shape[0]) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True, eq=False)
class OutputsByInputs:
    """A weight as a matrix with a row for each output, and the bias as its last column.

    Args:
        weight: Shape of the weight ``[out, in / groups, ...]``, or ``[in, out / groups, ...]`` if transposed.
        has_bias: Whether there is a bias.
        is_transposed: Whether the outputs are on the weight's second axis.
        groups: Number of groups of a convolution; they lie below one another and share the factor of their inputs.
    """

    weight: Sequence[int]
    has_bias: bool
    is_transposed: bool
    groups: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs, and of inputs of one of them, the bias included."""
        outputs, inputs = self.weight[0], self.weight[1]
        if self.is_transposed:
            outputs, inputs = inputs * self.groups, self._inputs_of_group
        return outputs, inputs * prod(self.weight[2:]) + self.has_bias

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Columns-last tensors ``[*shape, K]`` as matrices ``[K, out, in]``."""
        weight = tensors[0].movedim(-1, 0)
        if self.is_transposed:
            weight = weight.unflatten(1, (self.groups, self._inputs_of_group)).transpose(2, 3).flatten(1, 2)
        matrix = weight.flatten(2)
        return torch.cat([matrix, tensors[1].T.unsqueeze(-1)], 2) if self.has_bias else matrix

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The way back."""
        weight = matrix[..., : matrix.shape[-1] - self.has_bias]
        if self.is_transposed:
            weight = weight.unflatten(2, (self._inputs_of_group, -1)).unflatten(1, (self.groups, -1)).transpose(2, 3)
        weight = weight.reshape(matrix.shape[0], *self.weight).movedim(0, -1)
        return [weight, matrix[..., -1].T] if self.has_bias else [weight]

    @property
    def _inputs_of_group(self) -> int:
        return self.weight[0] // self.groups
