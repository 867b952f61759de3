"""The second moment of a convolution's patches, without unfolding them along the first axis."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.risk.layers.convolution import ConvolutionPart
from curvlinops.risk.layers.parts import inner_products, slices
from curvlinops.risk.losses.base import at_least_float32

#: Numbers of patches that are unfolded at a time.
UNFOLDED_NUMEL = 2**24


class PatchMoment:
    r"""Σ_np p pᵀ ``[S, S]`` of the patches p of all positions, and their sum.

    Let :math:`y_q` be row q of a padded image, unfolded along all axes but the first. A patch that begins in row u
    consists of :math:`y_{u + i d}` for the kernel's rows i, so the block of rows i and i + Δ of the moment is
    :math:`\sum_u y_{u + i d} y_{u + (i + \Delta) d}^\top`. For each Δ these sums are one sum over all rows but for a
    few at the ends: for a kernel of three rows there are three large products instead of the six of the halved
    moment, and a third of the memory.

    Args:
        part: A convolution to which :meth:`applies`.
        roots: By what each datum's image is multiplied ``[N]``, or ``None``.
    """

    def __init__(self, part: ConvolutionPart, roots: Tensor | None) -> None:
        self._part, self._roots = part, roots
        self._dilation, self._rows = part.settings.dilation[0], part.shape[2]
        self._height = part.a.shape[3] + 2 * part.settings.padding[0]
        self._num_features = part.shape[1:].numel() // self._rows
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self._sums: Tensor | None = None
        step = max(1, UNFOLDED_NUMEL // max(1, self._num_features * self._height * self._rest_of(1)))
        for data in slices(part.num_data, step):
            self._add(data)

    @staticmethod
    def applies(part: ConvolutionPart) -> bool:
        """Whether it is defined, and most rows of the image belong to all sums."""
        s = part.settings
        if s.groups > 1 or s.transposed or s.stride[0] != 1:
            return False
        span = (part.shape[2] - 1) * s.dilation[0]
        return 0 < 2 * span <= part.g.shape[4]

    def _rest_of(self, num_data: int) -> int:
        """Positions in a row of the output of some data."""
        return num_data * self._part.a.shape[1] * self._part.g.shape[5:].numel()

    def _add(self, data: slice) -> None:
        images = at_least_float32(self._part.a[data])
        if self._roots is not None:
            images = images * self._roots[data].to(images.dtype).reshape(-1, *(1 for _ in images.shape[1:]))
        Y = self._part.unfolded_rows(images)
        sums = Y.sum(2)
        self._sums = sums if self._sums is None else self._sums.add_(sums)
        for shift in range(self._rows):
            for (start, stop), keys in self._ranges(shift).items():
                product = self._product(Y, start, stop, shift)
                for key, sign in keys:
                    known = self._blocks.get(key)
                    self._blocks[key] = sign * product if known is None else known.add_(product, alpha=sign)

    def _ranges(self, shift: int) -> dict[tuple[int, int], list[tuple[tuple[int, int], float]]]:
        """The ranges of rows to sum over, and to which blocks each is added or from which it is taken away."""
        d, padding = self._dilation, self._part.settings.padding[0]
        first, last = padding, self._height - padding - shift * d  # beyond, one of the two rows is zero
        out = self._height - (self._rows - 1) * d
        found: dict[tuple[int, int], list[tuple[tuple[int, int], float]]] = {}
        for i in range(self._rows - shift):
            key = i, i + shift
            found.setdefault((first, last), []).append((key, 1.0))
            for start, stop in ((first, min(i * d, last)), (max(i * d + out, first), last)):
                if start < stop:
                    found.setdefault((start, stop), []).append((key, -1.0))
        return found

    def _product(self, Y: Tensor, start: int, stop: int, shift: int) -> Tensor:
        """Σ_q y_q y_{q + shift}ᵀ over a range of rows."""
        left = Y[:, start:stop].flatten(1)
        if shift == 0:
            return inner_products(left, left)
        move = shift * self._dilation
        return left @ Y[:, start + move : stop + move].flatten(1).T

    def moment(self) -> Tensor:
        """The moment ``[1, S, S]``."""
        channels, rows, rest = self._part.shape[1], self._rows, self._num_features // self._part.shape[1]
        result = next(iter(self._blocks.values())).new_empty(channels, rows, rest, channels, rows, rest)
        for (i, j), block in self._blocks.items():
            result[:, i, :, :, j] = block.reshape(channels, rest, channels, rest)
            if i != j:
                result[:, j, :, :, i] = block.T.reshape(channels, rest, channels, rest)
        size = channels * rows * rest
        return result.reshape(1, size, size)

    def sums(self) -> Tensor:
        """The sum of the patches ``[1, S]``."""
        assert self._sums is not None
        out = self._height - (self._rows - 1) * self._dilation
        starts = [i * self._dilation for i in range(self._rows)]
        parts = [self._sums[:, start : start + out].sum(1) for start in starts]
        channels = self._part.shape[1]
        return torch.stack([part.reshape(channels, -1) for part in parts], 1).reshape(1, -1)
