"""Blocks of parameters without an input: whole ones, diagonals, and multiples of the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from curvlinops.curvature.kronecker.blocks import Block, Columns, FactorPool
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.factors import DiagonalFactor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal
from curvlinops.risk.layers.dense import DirectPart
from curvlinops.risk.layers.weights import moment_of_entries


class ExactBlock(Block):
    """A bias, a normalisation's scale or shift, or a bare parameter: the whole block, since it is small."""

    kind = "exact"
    of_gradients = ("matrix",)

    def gradient_sums(self, columns: Columns) -> list[Tensor]:
        """Σ h hᵀ."""
        return [moment_of_entries(columns.factors.parts(self.positions[0]), columns.moments)]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name."""
        return {"matrix": (prod(self.shapes[0]), prod(self.shapes[0]))}[name]

    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """The matrix, as a Kronecker product with one factor."""
        matrix = kept["matrix"].unsqueeze(0)
        one = DiagonalFactor(matrix.new_ones(1, 1), is_owned=True)
        arrangement = Arrangement(self.shapes, is_column=True)
        return Kronecker(pool.dense(matrix), one, arrangement=arrangement, space=space, is_positive=True)


class DiagonalBlock(Block):
    """The exact diagonal, where nothing better is known or the block is large."""

    kind = "diagonal"
    of_gradients = ("diagonal",)

    def gradient_sums(self, columns: Columns) -> list[Tensor]:
        """Row sums of squares."""
        (position,) = self.positions
        if position in columns.squares:
            return [columns.squares[position]]
        if position in columns.factors.positions:
            return [columns.factors.squares_of(position)]
        return [columns.like.new_zeros(self.shapes[0])]  # all of it came with the first piece

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name."""
        return {"diagonal": self.shapes[0]}[name]

    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """The diagonal."""
        return diagonal_on(space, kept["diagonal"])


class IdentityBlock(Block):
    """Forward-only, for parameters without an input: the number of positions times the identity."""

    kind = "identity"
    of_inputs = ("num_positions",)

    def __init__(
        self, positions: Sequence[int], shapes: Sequence[torch.Size], reduces: bool = False, reason: str = ""
    ) -> None:
        super().__init__(positions, shapes, reason)
        self._reduces = reduces

    @property
    def layout(self) -> list[int]:
        """Whether positions are reduced."""
        return [int(self._reduces)]

    @classmethod
    def restored(cls, positions: Sequence[int], shapes: Sequence[torch.Size], layout: Sequence[int]) -> Block:
        """The block of a saved layout."""
        return cls(positions, shapes, bool(layout[0]))

    def input_sums(self, columns: Columns) -> list[Tensor]:
        """The number of positions."""
        (position,) = self.positions
        count = columns.total_weight
        if not self._reduces and position in columns.factors.positions:
            parts = columns.factors.parts(position)
            count = count * sum(part.num_positions for part in parts if isinstance(part, DirectPart))
        return [count]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name."""
        shapes: dict[str, tuple[int, ...]] = {"num_positions": ()}
        return shapes[name]

    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """The number of positions on the diagonal."""
        (shape,) = space.shapes
        return diagonal_on(space, kept["num_positions"].expand(shape))


def diagonal_on(space: Space, entries: Tensor) -> Diagonal:
    """A diagonal that nobody else holds, with non-negative entries."""
    own = entries.to(space.dtype)
    result = Diagonal([own])._like([own.clone() if own is entries else own], space)
    result.POSITIVE_SEMIDEFINITE = True
    return result
