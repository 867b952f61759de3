"""Columns of F for linear layers, broadcast parameters and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.risk.layers.parts import (
    Part,
    Rows,
    add_squares_of_positions,
    combined,
    gram_of_positions,
    inner,
    outer_gradients,
    positions_are_cheaper,
    slices,
    sum_of_squares,
)
from curvlinops.risk.losses.base import at_least_float32


class LinearPart(Part):
    """A weight ``[C, I]`` that maps rows a_t to W a_t: the column is Σ_t g_t a_tᵀ.

    Args:
        shape: Shape of the parameter.
        a: Inputs ``[N, T, I]``.
        g: Output gradients ``[N, M, T, C]``.
        transposed: Whether the parameter is ``[I, C]`` and maps a_t to Wᵀ a_t.
    """

    def __init__(self, shape: torch.Size, a: Tensor, g: Tensor, transposed: bool) -> None:
        super().__init__(shape, g.shape[0], g.shape[1])
        self.a, self.g, self.transposed = a, g, transposed

    def tensors(self) -> list[Tensor]:
        """Inputs and output gradients."""
        return [self.a, self.g]

    def _oriented(self, weight: Tensor, first: int = 0) -> Tensor:
        """Swap between the parameter's axes and ``[C, I]``."""
        return weight.transpose(first, first + 1) if self.transposed else weight

    def rmatmat(self, V: Tensor) -> Tensor:
        """The layer with V in place of its weight, summed against g."""
        g, V = self.g.flatten(2), self._oriented(V)
        a = self.a.flatten(0, 1)
        outputs = ((a @ V[..., k].T).reshape(self.num_data, -1) for k in range(V.shape[-1]))
        return torch.stack([inner(g, y) for y in outputs], -1)

    def matmat(self, Z: Tensor) -> Tensor:
        """The weight gradient with Σ_m z_nm g_nm as output gradient; where M is 1 the smaller factor is scaled."""
        a, g = self.a, self.g
        scale_inputs = self.num_columns == 1 and a.shape[-1] < g.shape[-1]
        if scale_inputs:
            pairs = ((g[:, 0], combined(a.unsqueeze(1), Z[..., k])) for k in range(Z.shape[-1]))
        else:
            pairs = ((combined(g, Z[..., k]), a) for k in range(Z.shape[-1]))
        columns = [self._oriented(c.flatten(0, 1).T @ b.flatten(0, 1)) for c, b in pairs]
        return torch.stack(columns).movedim(0, -1) if len(columns) > 1 else columns[0].unsqueeze(-1)

    def gradients(self, data: slice) -> Tensor:
        """Σ_t g_t a_tᵀ, datum by datum."""
        G = outer_gradients(at_least_float32(self.g[data]), at_least_float32(self.a[data]))
        return self._oriented(G, 2)

    def rows(self, data: slice) -> Rows:
        """Views of the inputs and output gradients of some data."""
        return Rows(self.a[data].permute(2, 0, 1).unsqueeze(0), self.output_rows(data))

    def output_rows(self, data: slice) -> Tensor:
        """The output gradients of :meth:`rows`."""
        return self.g[data].permute(3, 1, 0, 2).unsqueeze(0)

    def squares(self) -> Tensor:
        """For one position a datum Σ_m (g_m a)² = (Σ_m g_m²) a², so that one product serves all columns."""
        a, g = at_least_float32(self.a), at_least_float32(self.g)
        if a.shape[1] == 1:
            return self._oriented(sum_of_squares(g).flatten(1).T @ a.flatten(1).square())
        total = a.new_zeros(g.shape[-1], a.shape[-1])
        add_squares_of_positions(a, g, total)
        return self._oriented(total)

    def column_squares(self) -> Tensor:
        """‖g‖²‖a‖² for one position, else by Σ_ts (a_t·a_s)(g_t·g_s) or by gradients."""
        a, g = at_least_float32(self.a), at_least_float32(self.g)
        (_, M, T, C), width = g.shape, a.shape[-1]
        if T == 1:
            return a.flatten(1).square().sum(1, keepdim=True) * g.flatten(2).square().sum(2)
        if T * (width + M * C) > M * C * width:
            return super().column_squares()
        AA = torch.bmm(a, a.mT)
        return torch.stack([(torch.bmm(g[:, m], g[:, m].mT) * AA).sum((1, 2)) for m in range(M)], 1)

    def gram(self, other: Part) -> Tensor:
        """By inner products of positions or by per-datum gradients, whichever takes less work."""
        if isinstance(other, LinearPart) and positions_are_cheaper(self.a, self.g, other.a, other.g):
            return gram_of_positions(self.a, self.g, other.a, other.g)
        return super().gram(other)

    def has_bias(self, other: Part) -> bool:
        """Whether the other part is this layer's bias: of one position a datum, so with these output gradients."""
        if not isinstance(other, DirectPart) or other.index is not None or self.g.shape[2] != 1:
            return False
        same = other.h.data_ptr() == self.g.data_ptr() and other.h.shape == self.g[:, :, 0].shape
        return same and other.h.stride() == self.g[:, :, 0].stride()

    def with_bias(self) -> LinearPart:
        """The weight and the bias in one, for inner products of columns."""
        a = torch.cat([self.a, self.a.new_ones(*self.a.shape[:2], 1)], 2)
        shape = torch.Size([self.g.shape[3], a.shape[2]])
        return LinearPart(shape, a, self.g, transposed=False)

    def merged(self, other: Part) -> Part | None:
        """Two uses, one after the other along the positions."""
        if not isinstance(other, LinearPart) or other.transposed != self.transposed:
            return None
        a, g = torch.cat([self.a, other.a], 1), torch.cat([self.g, other.g], 2)
        return LinearPart(self.shape, a, g, self.transposed)


class DirectPart(Part):
    """Per-datum gradients as they are, of a parameter (a bias, a scale) that is broadcast along the data.

    Args:
        shape: Shape of the parameter.
        h: Per-datum gradients of its entries ``[N, M, P]``.
        index: Which entries of the flattened parameter these are ``[P]``, all different; ``None`` for all in order.
        num_positions: At how many positions of a datum it is used.
        is_lookup: Whether the entries are rows of a table that all data look up.
    """

    def __init__(
        self,
        shape: torch.Size,
        h: Tensor,
        index: Tensor | None = None,
        num_positions: int = 1,
        is_lookup: bool = False,
    ) -> None:
        super().__init__(shape, h.shape[0], h.shape[1])
        self.h, self.index, self.num_positions, self.is_lookup = h, index, num_positions, is_lookup

    def as_lookup(self) -> LookupPart | None:
        """The same columns as those of a table, where the entries are whole rows of one."""
        if not self.is_lookup or self.index is None or len(self.shape) != 2 or len(self.index) % self.shape[1]:
            return None
        width = self.shape[1]
        entries = self.index.reshape(-1, width)
        rows = entries[:, 0] // width
        if not torch.equal(entries, rows.unsqueeze(1) * width + torch.arange(width, device=entries.device)):
            return None
        g = self.h.unflatten(2, (len(rows), width))
        return LookupPart(self.shape, rows.expand(self.num_data, -1), g)

    def tensors(self) -> list[Tensor]:
        """The gradients."""
        return [self.h] if self.index is None else [self.h, self.index]

    def rmatmat(self, V: Tensor) -> Tensor:
        """Inner products with the per-datum gradients."""
        v = V.reshape(-1, V.shape[-1]) if self.index is None else V.reshape(-1, V.shape[-1])[self.index]
        found = self._rows @ v.to(self.h.dtype)
        return found.reshape(self.num_columns, self.num_data, -1).transpose(0, 1).to(V.dtype)

    @property
    def _rows(self) -> Tensor:
        """The gradients ``[M N, P]``, in the order in which a backward leaves them in memory."""
        return self.h.transpose(0, 1).flatten(0, 1)

    def matmat(self, Z: Tensor) -> Tensor:
        """Combinations of the per-datum gradients."""
        found = (self._rows.T @ Z.transpose(0, 1).flatten(0, 1).to(self.h.dtype)).to(Z.dtype)
        return self._placed(found.T).T.reshape(*self.shape, -1)

    def _placed(self, entries: Tensor) -> Tensor:
        """Entries ``[..., P]`` in their places of the flattened parameter ``[..., D]``."""
        if self.index is None:
            return entries
        return entries.new_zeros(*entries.shape[:-1], self.shape.numel()).index_copy_(-1, self.index, entries)

    def gradients(self, data: slice) -> Tensor:
        """The per-datum gradients."""
        h = at_least_float32(self.h[data])
        return self._placed(h).reshape(*h.shape[:2], *self.shape).clone()

    def squares(self) -> Tensor:
        """Row sums of squares."""
        h = at_least_float32(self.h)
        return self._placed(sum_of_squares(h).sum(0)).reshape(self.shape)

    def column_squares(self) -> Tensor:
        """Column sums of squares."""
        return at_least_float32(self.h).square().sum(2)

    def gram(self, other: Part) -> Tensor:
        """Inner products of the per-datum gradients."""
        if not isinstance(other, DirectPart) or not _same(self.index, other.index):
            return super().gram(other)
        h, h2 = at_least_float32(self.h), at_least_float32(other.h)
        return (h.flatten(0, 1) @ h2.flatten(0, 1).T).reshape(*h.shape[:2], *h2.shape[:2])

    def merged(self, other: Part) -> Part | None:
        """Sums of gradients of the same entries."""
        if not isinstance(other, DirectPart) or not _same(self.index, other.index):
            return None
        is_lookup = self.is_lookup and other.is_lookup
        return DirectPart(self.shape, self.h + other.h, self.index, self.num_positions + other.num_positions, is_lookup)


def _same(index: Tensor | None, other: Tensor | None) -> bool:
    if index is None or other is None:
        return index is other
    return torch.equal(index, other)


class LookupPart(Part):
    """Rows of a table that each datum looks up: g_t is added to row number t's index.

    Args:
        shape: Shape of the parameter ``[R, I]``.
        indices: Which row each position takes ``[N, T]``.
        g: Output gradients ``[N, M, T, I]``, zero where the padding row is taken.
        padding_idx: The row that gets no gradient, or ``None``.
    """

    def __init__(self, shape: torch.Size, indices: Tensor, g: Tensor, padding_idx: int | None = None) -> None:
        super().__init__(shape, g.shape[0], g.shape[1])
        self.indices, self.g, self.padding_idx = indices, g, padding_idx

    def tensors(self) -> list[Tensor]:
        """Indices and output gradients."""
        return [self.indices, self.g]

    def rmatmat(self, V: Tensor) -> Tensor:
        """The rows of V that are looked up, summed against g."""
        g = self.g.flatten(2)
        return torch.stack([inner(g, V[..., k][self.indices].flatten(1)) for k in range(V.shape[-1])], -1)

    def matmat(self, Z: Tensor) -> Tensor:
        """Output gradients, combined and added to their rows."""
        rows, num_columns = self.indices.flatten(), Z.shape[-1]
        result = Z.new_zeros(num_columns, *self.shape)
        for k in range(num_columns):
            result[k].index_add_(0, rows, combined(self.g, Z[..., k]).flatten(0, 1))
        return result.movedim(0, -1)

    def gradients(self, data: slice) -> Tensor:
        """Tables of gradients, datum by datum."""
        g = at_least_float32(self.g[data])
        (n, M, _, width), num_rows = g.shape, self.shape[0]
        table = torch.arange(n * M, device=g.device).reshape(n, M, 1) * num_rows + self.indices[data].unsqueeze(1)
        result = g.new_zeros(n * M * num_rows, width)
        return result.index_add_(0, table.flatten(), g.flatten(0, 2)).reshape(n, M, *self.shape)

    def squares(self) -> Tensor:
        """Positions of a datum that take the same row are added before they are squared."""
        num_rows, width = self.shape
        data = torch.arange(self.num_data, device=self.g.device).unsqueeze(1)
        table, inverse = torch.unique(data * num_rows + self.indices, return_inverse=True)
        total = torch.zeros(self.shape, dtype=at_least_float32(self.g).dtype, device=self.g.device)
        for m in range(self.num_columns):
            g = at_least_float32(self.g[:, m]).flatten(0, 1)
            sums = g.new_zeros(len(table), width).index_add_(0, inverse.flatten(), g)
            total.index_add_(0, table % num_rows, sums.square_())
        return total

    def column_squares(self) -> Tensor:
        """Σ_ts [same row] g_t·g_s."""
        same = self.indices.unsqueeze(2) == self.indices.unsqueeze(1)
        g = at_least_float32(self.g)
        return torch.stack([(torch.bmm(x, x.mT) * same).sum((1, 2)) for x in g.unbind(1)], 1)

    def gram(self, other: Part) -> Tensor:
        """Σ_ts [same row] g_t·g_s."""
        if not isinstance(other, LookupPart):
            return super().gram(other)
        (N, M, T, width), (N2, M2, T2, _) = self.g.shape, other.g.shape
        rows2, columns2 = other.indices.flatten(), at_least_float32(other.g)
        result = columns2.new_empty(N, M, N2, M2)
        for data in slices(N, max(1, 2**24 // (T * N2 * T2))):
            same = self.indices[data].reshape(-1, 1) == rows2
            for m in range(M):
                left = at_least_float32(self.g[data, m]).reshape(-1, width)
                for m2 in range(M2):
                    products = (left @ columns2[:, m2].reshape(-1, width).T).mul_(same)
                    result[data, m, :, m2] = products.reshape(-1, T, N2, T2).sum((1, 3))
        return result

    def merged(self, other: Part) -> Part | None:
        """Two uses, one after the other along the positions."""
        if not isinstance(other, LookupPart) or other.padding_idx != self.padding_idx:
            return None
        indices, g = torch.cat([self.indices, other.indices], 1), torch.cat([self.g, other.g], 2)
        return LookupPart(self.shape, indices, g, self.padding_idx)
