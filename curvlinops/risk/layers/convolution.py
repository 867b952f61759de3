"""Columns of F for convolutions and transposed convolutions of any dimension: linear layers on patches."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops.risk.layers.parts import (
    Part,
    Rows,
    add_squares_of_positions,
    combined,
    gram_of_positions,
    inner,
    positions_are_cheaper,
    slices,
)
from curvlinops.risk.losses.base import at_least_float32


@dataclass(frozen=True)
class ConvolutionSettings:
    """Options of a convolution, one number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool


class ConvolutionPart(Part):
    """The weight of a convolution: the column is Σ_t g_t p_tᵀ, with the patches p_t of the input.

    In a transposed convolution, inputs and output gradients swap their roles.

    Args:
        shape: Shape of the parameter.
        a: Inputs ``[N, T, I, *space]``, with T images for each datum.
        g: Output gradients ``[N, M, T, C, *space]``.
        settings: Options of the layer.
    """

    def __init__(self, shape: torch.Size, a: Tensor, g: Tensor, settings: ConvolutionSettings) -> None:
        super().__init__(shape, g.shape[0], g.shape[1])
        self.a, self.g, self.settings = a, g, settings

    def tensors(self) -> list[Tensor]:
        """Inputs and output gradients."""
        return [self.a, self.g]

    def rmatmat(self, V: Tensor) -> Tensor:
        """The layer with V in place of its weight, summed against g."""
        s, g, a = self.settings, self.g.flatten(2), self.a.flatten(0, 1)
        options = (s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups)
        outputs = (torch.convolution(a, V[..., k].contiguous(), None, *options) for k in range(V.shape[-1]))
        return torch.stack([inner(g, y.reshape(self.num_data, -1)) for y in outputs], -1)

    def matmat(self, Z: Tensor) -> Tensor:
        """The weight gradient with Σ_m z_nm g_nm as output gradient."""
        columns = [self._weight_gradient(combined(self.g, Z[..., k]).flatten(0, 1)) for k in range(Z.shape[-1])]
        return torch.stack(columns).movedim(0, -1) if len(columns) > 1 else columns[0].unsqueeze(-1)

    def _weight_gradient(self, g: Tensor) -> Tensor:
        s, a = self.settings, self.a.flatten(0, 1)
        weight = a.new_empty(1).expand(self.shape)  # only its shape is read
        options = (s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups)
        found = torch.ops.aten.convolution_backward(g, a, weight, None, *options, [False, True, False])
        gradient: Tensor = found[1]
        return gradient

    def gradients(self, data: slice) -> Tensor:
        """Weight gradients, datum by datum."""
        a, g = at_least_float32(self.a[data]), at_least_float32(self.g[data])
        if self.settings.transposed:
            rows, columns = self._rows(a), [self._patches(x, a.shape[3:]) for x in g.unbind(1)]
            found = [rows @ p.mT for p in columns]
        else:
            patches = self._patches(a, g.shape[4:]).mT
            found = [self._rows(x) @ patches for x in g.unbind(1)]
        return torch.stack(found, 1).reshape(len(a), self.num_columns, *self.shape)

    def rows(self, data: slice) -> Rows:
        """Patches of the inputs and the output gradients of some data; in a transposed convolution the other way."""
        a = self.a[data]
        inputs = self._pixels(a) if self.settings.transposed else self._patched(a, self.g.shape[4:])
        return Rows(inputs, self.output_rows(data))

    def output_rows(self, data: slice) -> Tensor:
        """The output gradients of :meth:`rows`."""
        g = self.g[data]
        columns = g.transpose(0, 1).flatten(0, 1)
        outputs = self._patched(columns, self.a.shape[3:]) if self.settings.transposed else self._pixels(columns)
        return outputs.reshape(*outputs.shape[:2], self.num_columns, len(g), outputs.shape[3])

    def _pixels(self, images: Tensor) -> Tensor:
        """The channels of each pixel ``[G, C / G, n, T positions]`` of images ``[n, T, C, *space]``."""
        n, T, C, *space = images.shape
        grouped = images.reshape(n, T, self.settings.groups, C // self.settings.groups, prod(space))
        return grouped.permute(2, 3, 0, 1, 4).flatten(3)

    def _patched(self, images: Tensor, space: torch.Size) -> Tensor:
        """Patches ``[G, C / G * kernel, n, T positions]`` of images ``[n, T, C, *space]``."""
        view, dim = self._windows(images, space), len(space)
        in_order = view.permute(2, 3, *range(4, 4 + dim), 0, 1, *range(4 + dim, view.ndim))
        return in_order.flatten(dim + 3).flatten(1, dim + 1)

    def unfolded_rows(self, images: Tensor) -> Tensor:
        """Rows of padded images ``[n, T, C, *space]``, unfolded along all axes but the first ``[F, rows, positions]``.

        The features are channels and the kernel's other axes.
        """
        s, kernel = self.settings, self.shape[2:]
        n, T, C = images.shape[:3]
        padded = F.pad(images, [p for size in reversed(s.padding) for p in (size, size)])
        n_step, T_step, C_step, row_step, *steps = padded.stride()
        space, rows = self.g.shape[5:], padded.shape[3]
        strides = [step * d for step, d in zip(steps, s.dilation[1:], strict=True)]
        moves = [step * d for step, d in zip(steps, s.stride[1:], strict=True)]
        view = padded.as_strided(
            (C, *kernel[1:], rows, n, T, *space), (C_step, *strides, row_step, n_step, T_step, *moves)
        )
        return view.reshape(C * kernel[1:].numel(), rows, n * T * space.numel())

    def _rows(self, images: Tensor) -> Tensor:
        """Images ``[n, T, C, *space]`` as rows of channels ``[n, groups, C / groups, T positions]``."""
        n, T, C = images.shape[:3]
        grouped = images.reshape(n, T, self.settings.groups, C // self.settings.groups, -1)
        return grouped.permute(0, 2, 3, 1, 4).flatten(3)

    def _patches(self, images: Tensor, space: torch.Size) -> Tensor:
        """Patches ``[n, groups, C / groups * kernel, T positions]`` of images ``[n, T, C, *space]``."""
        n, T = images.shape[:2]
        view = self._windows(images, space).movedim(1, 3 + len(self.shape[2:]))
        return view.reshape(n, self.settings.groups, -1, T * space.numel())

    def _windows(self, images: Tensor, space: torch.Size) -> Tensor:
        """A view ``[n, T, groups, C / groups, *kernel, *space]`` of padded images ``[n, T, C, *space]``."""
        s, kernel = self.settings, self.shape[2:]
        n, T, C = images.shape[:3]
        padded = F.pad(images, [p for size in reversed(s.padding) for p in (size, size)])
        steps = padded.stride()[3:]
        strides = [step * d for step, d in zip(steps, s.dilation, strict=True)]
        moves = [step * d for step, d in zip(steps, s.stride, strict=True)]
        shape = (n, T, s.groups, C // s.groups, *kernel, *space)
        n_step, T_step, C_step = padded.stride()[:3]
        return padded.as_strided(shape, (n_step, T_step, C_step * (C // s.groups), C_step, *strides, *moves))

    def squares(self) -> Tensor:
        """Patches are unfolded for a few data at a time."""
        if not self._is_linear_on_patches:
            return super().squares()
        total = at_least_float32(self.a.new_zeros(self.shape[0], self.shape[1:].numel()))
        for data in slices(self.num_data, max(1, 2**22 // self.numel_of_rows())):
            add_squares_of_positions(*self._positions(data), total)
        return total.reshape(self.shape)

    def numel_of_rows(self) -> int:
        """Numbers in the patches of one datum."""
        inputs, outputs = self.a.shape[1:], self.g.shape[2:]
        patched, other = (outputs, inputs) if self.settings.transposed else (inputs, outputs)
        return patched[0] * patched[1] * self.shape[2:].numel() * other[2:].numel()

    def gram(self, other: Part) -> Tensor:
        """Where that takes less work, by inner products of patches; else by per-datum gradients."""
        if isinstance(other, ConvolutionPart) and self._is_linear_on_patches and other._is_linear_on_patches:
            shapes = [x for part in (self, other) for x in part._shapes_of_positions()]
            if positions_are_cheaper(*shapes) and self.num_data * self.numel_of_rows() <= 2**26:
                whole, others = slice(0, self.num_data), slice(0, other.num_data)
                return gram_of_positions(*self._positions(whole), *other._positions(others))
        return super().gram(other)

    @property
    def _is_linear_on_patches(self) -> bool:
        return self.settings.groups == 1 and not self.settings.transposed

    def _shapes_of_positions(self) -> tuple[Tensor, Tensor]:
        """Tensors without memory in the shapes that `_positions` has."""
        N, M, T, C, *space = self.g.shape
        positions = T * torch.Size(space).numel()
        a = torch.empty(N, positions, self.shape[1:].numel(), device="meta")
        return a, torch.empty(N, M, positions, C, device="meta")

    def _positions(self, data: slice) -> tuple[Tensor, Tensor]:
        """Patches ``[n, T, I]`` and output gradients ``[n, M, T, C]`` of the linear layer on patches."""
        patches = self._patches(at_least_float32(self.a[data]), self.g.shape[4:])
        g = torch.stack([self._rows(x)[:, 0] for x in at_least_float32(self.g[data]).unbind(1)], 1).mT
        return patches[:, 0].mT, g
