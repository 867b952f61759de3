"""What a diagonal block is: what is summed of a mini-batch, and what is made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.factors import DenseFactor
from curvlinops.operators.space import Space
from curvlinops.risk.layers.factors import LayerFactors
from curvlinops.risk.layers.weights import Moments


@dataclass(frozen=True)
class Columns:
    """The columns of one mini-batch, or some of them, with what blocks need beside them.

    Attributes:
        factors: The columns in structured form.
        weight: Weight of each datum ``[N]`` in the curvature, ``None`` for one.
        like: A tensor of the dtype and the device of sums.
        moments: Moments that are known of them.
        squares: Row sums of squares of parameters that layer notes do not cover, by position.
    """

    factors: LayerFactors
    weight: Tensor | None
    like: Tensor
    moments: Moments = field(default_factory=Moments)
    squares: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def total_weight(self) -> Tensor:
        """The sum of the weights of the data."""
        if self.weight is None:
            return self.like.new_tensor(float(self.factors.num_data))
        return self.weight.to(self.like).sum()


class Block(ABC):
    """One diagonal block.

    Args:
        positions: Position of the parameter, or of a weight and its bias.
        shapes: Their shapes.
        reason: Why it is of this kind, where that is not plain.
    """

    #: What it is called in tables.
    kind: ClassVar[str]
    #: Names of what is summed, of inputs and of gradients.
    of_inputs: ClassVar[tuple[str, ...]] = ()
    of_gradients: ClassVar[tuple[str, ...]] = ()

    def __init__(self, positions: Sequence[int], shapes: Sequence[torch.Size], reason: str = "") -> None:
        self.positions = tuple(positions)
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.reason = reason

    def input_sums(self, columns: Columns) -> list[Tensor]:
        """What is summed of the inputs of a mini-batch."""
        return []

    def gradient_sums(self, columns: Columns) -> list[Tensor]:
        """What is summed of the columns of a mini-batch, or some of them."""
        return []

    def finished(self, sums: Mapping[str, Tensor], scaling: Scaling) -> dict[str, Tensor]:
        """What is kept, of the sums over all data and the scale of the loss."""
        return {name: scaling.times(tensor) for name, tensor in sums.items()}

    @abstractmethod
    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """The block as an operator."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name, by which saved states are checked."""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same in all mini-batches."""
        return self.kind, self.positions, tuple(self.layout)

    @property
    def layout(self) -> list[int]:
        """Numbers that, with positions and shapes, make the block again."""
        return []

    @classmethod
    def restored(cls, positions: Sequence[int], shapes: Sequence[torch.Size], layout: Sequence[int]) -> Block:
        """The block of a saved layout."""
        return cls(positions, shapes)


class Scaling:
    """Scales sums in place, those that several blocks share once.

    Args:
        scale: The scale of the loss, c.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._done: dict[tuple[int, int], tuple[Tensor, float]] = {}

    def times(self, sums: Tensor, factor: float | None = None) -> Tensor:
        """The sums times a factor, by default the scale of the loss."""
        factor = self.scale if factor is None else factor
        key = sums.data_ptr(), sums.numel()
        if key not in self._done:
            self._done[key] = sums, factor  # held, lest other sums come to lie there
            return sums.mul_(factor)
        earlier = self._done[key][1]
        return sums if earlier == factor else sums * (factor / earlier)

    def mean(self, sums: Tensor, count: Tensor) -> Tensor:
        """The sums divided by the weight of their terms; zero where there are none."""
        number = float(count)
        return self.times(sums, 1.0 / number if number > 0 else 1.0)


class FactorPool:
    """Factors of the tensors that blocks keep: those of the same entries are one, and are decomposed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[DenseFactor]] = {}

    def dense(self, matrix: Tensor) -> DenseFactor:
        """The factor of matrices ``[G, n, n]``."""
        key = tuple(matrix.shape), *matrix[0].diagonal()[:8].tolist()
        for factor in self._known.setdefault(key, []):
            if factor.has_entries(matrix):
                return factor
        self._known[key].append(DenseFactor(matrix, is_owned=True))
        return self._known[key][-1]
