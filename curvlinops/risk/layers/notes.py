"""Notes of calls: which parameter was used how, and on which axis of the output the datum may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvlinops.risk.layers.convolution import ConvolutionPart, ConvolutionSettings
from curvlinops.risk.layers.dense import DirectPart, LinearPart, LookupPart
from curvlinops.risk.layers.parts import Part
from curvlinops.risk.losses.base import at_least_float32


@dataclass(frozen=True)
class Layout:
    """Rows counted as ``[before, N, after]``: the datum's place among the leading axes of a layer's output."""

    before: int
    num_data: int
    after: int

    def datum_first(self, tensor: Tensor, num_leading: int) -> Tensor:
        """Leading axes that hold the rows as ``[N, T]``, a view where the datum is first or last of them."""
        features = tensor.shape[num_leading:]
        split = tensor.reshape(self.before, self.num_data, self.after, *features)
        return split.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Use(ABC):
    """How one parameter enters a call.

    Attributes:
        position: Position of the parameter.
        shape: Its shape.
    """

    position: int
    shape: torch.Size

    @property
    def signature(self) -> Hashable:
        """What must be the same for a proof to hold again."""
        return type(self).__name__, self.position

    @abstractmethod
    def part(self, g: Tensor, num_leading: int, layout: Layout) -> Part | None:
        """The columns of F, from output gradients ``[M, *output]``; ``None`` if the layout does not allow it."""


def _rows(g: Tensor, num_leading: int, layout: Layout) -> Tensor:
    """Output gradients ``[M, *output]`` as ``[N, M, T, *features]``."""
    split = g.reshape(len(g), layout.before, layout.num_data, layout.after, *g.shape[1 + num_leading :])
    return split.movedim(2, 0).flatten(2, 3)


@dataclass(frozen=True)
class LinearUse(Use):
    """The weight of a linear layer; ``transposed`` for ``x @ W`` in place of ``x @ W.T``."""

    input: Tensor
    transposed: bool

    def part(self, g: Tensor, num_leading: int, layout: Layout) -> Part | None:
        """Rows of the input and of the output gradient."""
        a = layout.datum_first(self.input, num_leading)
        return LinearPart(self.shape, a, _rows(g, num_leading, layout), self.transposed)


@dataclass(frozen=True)
class ConvolutionUse(Use):
    """The weight of a convolution."""

    input: Tensor
    settings: ConvolutionSettings

    def part(self, g: Tensor, num_leading: int, layout: Layout) -> Part | None:
        """Images of the input and of the output gradient."""
        a = layout.datum_first(self.input, num_leading)
        return ConvolutionPart(self.shape, a, _rows(g, num_leading, layout), self.settings)


@dataclass(frozen=True)
class LookupUse(Use):
    """The table of an embedding."""

    indices: Tensor
    padding_idx: int | None

    def part(self, g: Tensor, num_leading: int, layout: Layout) -> Part | None:
        """Indices and output gradients, which the padding row does not get."""
        indices = layout.datum_first(self.indices, num_leading)
        rows = _rows(g, num_leading, layout)
        if self.padding_idx is not None:
            rows = rows.masked_fill((indices == self.padding_idx)[:, None, :, None], 0)
        return LookupPart(self.shape, indices, rows, self.padding_idx)


@dataclass(frozen=True)
class BroadcastUse(Use):
    """A parameter, or entries of it, broadcast along the data and added, or multiplied by a factor.

    Attributes:
        aligned: Its shape with as many axes as the output; the size is 1 where it is broadcast.
        factor: Gives what it is multiplied by in the output's shape, or broadcast to it; ``None`` for an addend.
        index: Gives which of its flattened entries are used, ``None`` for all in order.
        is_lookup: Whether these are rows of a table that all data look up.
    """

    aligned: tuple[int, ...]
    factor: Callable[[], Tensor] | None = None
    index: Callable[[], Tensor] | None = None
    is_lookup: bool = False

    @property
    def signature(self) -> Hashable:
        """Also how it is broadcast."""
        return *super().signature, self.aligned, self.factor is None  # type: ignore[misc]

    def part(self, g: Tensor, num_leading: int, layout: Layout) -> Part | None:
        """Output gradients, times the factor, summed over all axes along which a datum broadcasts the parameter."""
        place = _axis_of_datum(g.shape[1:], self.aligned, layout)
        if place is None:
            return None
        axis, before, after = place
        split = (before, layout.num_data, after)
        num_positions = g.shape[1:].numel() // max(1, layout.num_data * prod(self.aligned))
        if self.factor is None or len(g) == 0:
            h = self._sums(g, axis, split)
        else:
            factor = self.factor().expand(g.shape[1:])
            columns = [self._sums((at_least_float32(u) * factor).unsqueeze(0), axis, split) for u in g.unbind(0)]
            h = torch.stack([column.squeeze(1) for column in columns]).transpose(0, 1)
        if self.index is None:
            return DirectPart(self.shape, h, None, num_positions)
        return DirectPart(self.shape, *_distinct(h, self.index().flatten()), num_positions, self.is_lookup)

    def _sums(self, product: Tensor, axis: int, split: tuple[int, int, int]) -> Tensor:
        """Sums for each datum and column ``[N, M, P]`` of ``[M, *output]``; a view where there is nothing to sum."""
        product = product.reshape(*product.shape[: axis + 1], *split, *product.shape[axis + 2 :])
        sizes = [0, *self.aligned[:axis], 1, 0, 1, *self.aligned[axis + 1 :]]
        axes = [k for k, size in enumerate(sizes) if size == 1 and product.shape[k] > 1]
        if axes:
            product = product.sum(axes, keepdim=True, dtype=at_least_float32(product).dtype)
        return product.movedim(axis + 2, 0).flatten(2)


def _axis_of_datum(output: torch.Size, aligned: tuple[int, ...], layout: Layout) -> tuple[int, int, int] | None:
    """Which axis of the output holds the datum, and how it is split: one that the parameter is broadcast along."""
    done = 1
    for axis, size in enumerate(output):
        before, rest = divmod(layout.before, done)
        if rest == 0 and size % (before * layout.num_data) == 0 and aligned[axis] == 1:
            return axis, before, size // (before * layout.num_data)
        done *= size
    return None


def _distinct(h: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``[N, M, P]`` with entries of the same index added up."""
    entries, inverse = torch.unique(index, return_inverse=True)
    if len(entries) == len(index):
        return h, index
    return h.new_zeros(*h.shape[:2], len(entries)).index_add_(2, inverse, h), entries


@dataclass(frozen=True)
class Note:
    """One call whose parameters are tracked.

    Attributes:
        uses: Its parameters.
        edge: The gradient edge of its output, as it was before any in-place activation.
        output: The output's shape.
        num_leading: How many leading axes of the output can hold the datum.
        kept: Tensors that the gradients are computed from, with their versions.
    """

    uses: tuple[Use, ...]
    edge: GradientEdge
    output: torch.Size
    num_leading: int
    kept: tuple[tuple[Tensor, int], ...] = field(default=())

    @property
    def signature(self) -> Hashable:
        """What must be the same for a proof to hold again."""
        return tuple(self.output), self.num_leading, tuple(use.signature for use in self.uses)

    @property
    def num_rows(self) -> int:
        """The product of the leading axes."""
        return self.output[: self.num_leading].numel()

    @property
    def is_intact(self) -> bool:
        """Whether nothing it keeps was changed in place since."""
        return all(tensor._version == version for tensor, version in self.kept)


def versions_of(*tensors: Any) -> tuple[tuple[Tensor, int], ...]:
    """Tensors with the number of times that they were changed in place."""
    return tuple((t, t._version) for t in tensors if isinstance(t, Tensor))
