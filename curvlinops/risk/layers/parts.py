"""What one use of a parameter contributes to the columns of F = Jᵀ S: the contract, and helpers that kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops.risk.losses.base import at_least_float32

#: Numbers that intermediate results may take up at a time.
CHUNK_NUMEL = 2**26

#: Rows of a matrix up to which a product that is known to be symmetric is computed whole.
SYMMETRIC_ROWS = 128

#: Rows and columns of the tiles in which matrices are transposed.
_TILE = 256

#: Numbers of per-datum gradients that are squared and summed at once, so that they stay in the processor's cache.
_CACHED_NUMEL = 2**18


@dataclass(frozen=True)
class Rows:
    """Inputs and output gradients of a weight ``[G, R, S]``: the column of datum n is Σ_t g_mnt a_ntᵀ in each group.

    Attributes:
        a: Inputs ``[G, S, n, T]``.
        g: Output gradients ``[G, R, M, n, T]``.
    """

    a: Tensor
    g: Tensor


class Part(ABC):
    """The columns of F that one use of a parameter gives: a block ``[D_i, N M]`` in structured form.

    Columns are counted by datum n and by column m of the loss factor.

    Attributes:
        shape: Shape of the parameter.
        num_data: N.
        num_columns: M.
    """

    def __init__(self, shape: torch.Size, num_data: int, num_columns: int) -> None:
        self.shape = shape
        self.num_data = num_data
        self.num_columns = num_columns

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What it keeps in memory."""

    @abstractmethod
    def rmatmat(self, V: Tensor) -> Tensor:
        """Fᵀ V ``[N, M, K]`` for V ``[*shape, K]``; about a forward of the layer for each of the K columns."""

    @abstractmethod
    def matmat(self, Z: Tensor) -> Tensor:
        """F Z ``[*shape, K]`` for Z ``[N, M, K]``; about a weight gradient of the layer for each of the K columns."""

    @abstractmethod
    def gradients(self, data: slice) -> Tensor:
        """The columns of some data, in at least float32 ``[n, M, *shape]``."""

    def squares(self) -> Tensor:
        """The row sums of squares Σ_nm F_nm², in at least float32."""
        step = max(1, _CACHED_NUMEL // (self.num_columns * self.shape.numel()))
        some = (self.gradients(data).flatten(0, 1).square_().sum(0) for data in slices(self.num_data, step))
        total = next(some)
        for term in some:
            total += term
        return total

    def column_squares(self) -> Tensor:
        """The squared norms of the columns ``[N, M]``, in at least float32."""
        step = max(1, CHUNK_NUMEL // (self.num_columns * self.shape.numel()))
        parts = [self.gradients(data).flatten(2).square_().sum(2) for data in slices(self.num_data, step)]
        return torch.cat(parts)

    def gram(self, other: Part) -> Tensor:
        """The inner products FᵀF' ``[N, M, N', M']`` with another part of the same shape, in at least float32."""
        return gram_of_gradients([self], [other])

    def merged(self, other: Part) -> Part | None:
        """One part for two uses of the same parameter, where their positions can be put side by side."""
        return None


def slices(length: int, step: int) -> Iterator[slice]:
    """Cut a range into slices of at most the given length."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def summed_gradients(parts: list[Part], data: slice) -> Tensor:
    """Per-datum gradients of a parameter that is used several times ``[n, M, *shape]``."""
    total = parts[0].gradients(data)
    for part in parts[1:]:
        total = total + part.gradients(data)
    return total


def gram_of_gradients(parts: list[Part], others: list[Part]) -> Tensor:
    """The Gram matrix ``[N, M, N', M']`` of the summed parts, by per-datum gradients of a few data at a time."""
    (N, M), (N2, M2) = [(p[0].num_data, p[0].num_columns) for p in (parts, others)]
    numel = 2 * parts[0].shape.numel()
    rows = []
    for data in slices(N, max(1, CHUNK_NUMEL // (numel * M))):
        G = summed_gradients(parts, data).reshape((data.stop - data.start) * M, -1)
        blocks = []
        for data2 in slices(N2, max(1, CHUNK_NUMEL // (numel * M2))):
            G2 = summed_gradients(others, data2).reshape((data2.stop - data2.start) * M2, -1)
            blocks.append(G @ G2.T)
        rows.append(torch.cat(blocks, 1))
    return torch.cat(rows).reshape(N, M, N2, M2)


def combined(g: Tensor, z: Tensor) -> Tensor:
    """Σ_m z_nm g_nm: output gradients ``[N, M, *rest]`` and coefficients ``[N, M]`` as ``[N, *rest]``."""
    if g.shape[1] == 1:
        return g[:, 0] * z.reshape(-1, *(1 for _ in g.shape[2:]))
    return torch.bmm(z.unsqueeze(1), g.flatten(2)).reshape(g.shape[0], *g.shape[2:])


def sum_of_squares(g: Tensor) -> Tensor:
    """Σ_m g_nm² as ``[N, *rest]``, of ``[N, M, *rest]``, without a second tensor of that size."""
    total = g[:, 0].square()
    for m in range(1, g.shape[1]):
        total.addcmul_(g[:, m], g[:, m])
    return total


def inner(g: Tensor, y: Tensor) -> Tensor:
    """⟨g_nm, y_n⟩ for each datum and column ``[N, M]``, of ``[N, M, L]`` and ``[N, L]``."""
    if g.shape[1] == 1:
        return torch.linalg.vecdot(g[:, 0], y).unsqueeze(1)  # type: ignore[no-any-return]
    return torch.bmm(g, y.unsqueeze(-1)).squeeze(-1)


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """X yᵀ, of matrices with a vector in each row; half of it is computed where both are the same."""
    if x.data_ptr() != y.data_ptr() or x.shape != y.shape or x.stride() != y.stride() or len(x) <= SYMMETRIC_ROWS:
        return x @ y.T
    result = x.new_empty(len(x), len(x))
    _fill_symmetric(x, result)
    return result


def _fill_symmetric(x: Tensor, result: Tensor) -> None:
    """Write X Xᵀ: the blocks on the diagonal by halves, of the others one and its mirror image."""
    half = len(x) // 2
    if len(x) <= SYMMETRIC_ROWS:
        torch.mm(x, x.T, out=result)
        return
    torch.mm(x[half:], x[:half].T, out=result[half:, :half])
    mirror(result[half:, :half], result[:half, half:])
    _fill_symmetric(x[:half], result[:half, :half])
    _fill_symmetric(x[half:], result[half:, half:])


def mirror(source: Tensor, target: Tensor) -> None:
    """Write the transpose of a matrix, in tiles that stay in the processor's cache."""
    for rows in slices(len(source), _TILE):
        for columns in slices(source.shape[1], _TILE):
            target[columns, rows] = source[rows, columns].T


def outer_gradients(g: Tensor, a: Tensor) -> Tensor:
    """Σ_t g_nmt a_ntᵀ for each datum and column: ``[n, M, T, C]`` and ``[n, T, I]`` as ``[n, M, C, I]``."""
    n, M, T, C = g.shape
    if T == 1:
        return g.reshape(n, M, C, 1) * a.reshape(n, 1, 1, -1)
    G = torch.bmm(g.permute(0, 1, 3, 2).reshape(n, M * C, T), a) if M > 1 else torch.bmm(g[:, 0].mT, a)
    return G.reshape(n, M, C, a.shape[-1])


def add_squares_of_positions(a: Tensor, g: Tensor, total: Tensor) -> None:
    """Add (Σ_t g_nmt a_ntᵀ)² for each datum and column to ``total`` ``[C, I]``, a block that stays in cache at a time.

    Args:
        a: Inputs ``[N, T, I]``.
        g: Output gradients ``[N, M, T, C]``.
        total: What is added to.
    """
    num_rows, width = total.shape
    rows_at_once = max(1, _CACHED_NUMEL // width)
    data_at_once = max(1, rows_at_once // num_rows)
    for rows in slices(num_rows, rows_at_once):
        buffer = total.new_empty(data_at_once, rows.stop - rows.start, width)
        for data in slices(len(a), data_at_once):
            out = buffer[: data.stop - data.start]
            for column in g[data, :, :, rows].unbind(1):
                torch.bmm(column.mT, a[data], out=out)
                if len(out) == 1:
                    total[rows].addcmul_(out[0], out[0])
                else:
                    total[rows] += out.square_().sum(0)


def gram_of_positions(a: Tensor, g: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """The Gram matrix ``[N, M, N', M']`` of per-datum gradients Σ_t g_t a_tᵀ.

    For one position a datum it is (A A'ᵀ)∘(G G'ᵀ), otherwise Σ_ts (a_t·a_s)(g_t·g_s).
    """
    (N, M, T, C), (N2, M2, T2, _) = g.shape, g2.shape
    a, g, a2, g2 = (at_least_float32(t) for t in (a, g, a2, g2))
    if T == T2 == 1:
        GG = inner_products(g.reshape(N * M, C), g2.reshape(N2 * M2, C)).reshape(N, M, N2, M2)
        return GG.mul_(inner_products(a.flatten(1), a2.flatten(1)).reshape(N, 1, N2, 1))
    result = g.new_empty(N, M, N2, M2)
    for data in slices(N, max(1, CHUNK_NUMEL // (2 * T * N2 * T2))):
        AA = a[data].flatten(0, 1) @ a2.reshape(-1, a2.shape[-1]).T
        for m in range(M):
            left = g[data, m].reshape(-1, C)
            for m2 in range(M2):
                product = (left @ g2[:, m2].reshape(-1, C).T).mul_(AA)
                result[data, m, :, m2] = product.reshape(-1, T, N2, T2).sum((1, 3))
    return result


def positions_are_cheaper(a: Tensor, g: Tensor, a2: Tensor, g2: Tensor) -> bool:
    """Whether `gram_of_positions` takes less work than per-datum gradients."""
    (N, M, T, C), (N2, M2, T2, _) = g.shape, g2.shape
    width = a.shape[-1]
    by_positions = N * T * N2 * T2 * (width + M * M2 * C)
    by_gradients = C * width * (N * M * T + N2 * M2 * T2 + N * M * N2 * M2)
    return by_positions <= by_gradients
