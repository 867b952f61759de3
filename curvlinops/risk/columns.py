"""Columns that go through the network a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvlinops.risk.linearization import is_out_of_memory

#: Which columns a part of a result belongs to (``None``: all of it at once), and its tensors.
Piece = tuple[slice | None, Sequence[Tensor]]


def in_chunks(
    product: Callable[[list[Tensor]], list[Tensor]], M: list[Tensor], chunk_size: Callable[[], int]
) -> Iterator[Piece]:
    """Apply a product to a few columns at a time, fewer when memory runs out.

    Args:
        product: The product of columns-last tensors.
        M: Columns-last tensors ``[*shape, K]``.
        chunk_size: Tells how many columns to take; asked before each chunk, since the first product teaches it.

    Yields:
        The columns and their part of the result.
    """
    num_columns = M[0].shape[-1]
    at_most, start = num_columns, 0
    while start < num_columns:
        columns = slice(start, min(start + min(chunk_size(), at_most), num_columns))
        try:
            part = product([m[..., columns] for m in M])
        except RuntimeError as error:
            if not is_out_of_memory(error) or columns.stop - start == 1:
                raise
            at_most = (columns.stop - start) // 2
            continue
        yield columns, part
        start = columns.stop


def gathered(pieces: Iterator[Piece]) -> list[Tensor]:
    """The whole of a result that comes in pieces."""
    parts = [part for _, part in pieces]
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat([p.movedim(-1, 0) for p in same]).movedim(0, -1) for same in zip(*parts, strict=True)]


def column_by_column(M: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors ``[*shape, K]``, laid out in memory as the network wants them: one column after the other."""
    return [m if _is_by_column(m) else _transposed(m) for m in M]


def _is_by_column(m: Tensor) -> bool:
    return m.shape[-1] == 1 or m[..., 0].is_contiguous()


def _transposed(m: Tensor) -> Tensor:
    # PyTorch transposes matrices in blocks that fit into the cache, and tensors of more axes entry by entry.
    rows = m.reshape(-1, m.shape[-1]) if m.is_contiguous() else m.movedim(-1, 0).flatten(1).T
    return rows.T.contiguous().view(m.shape[-1], *m.shape[:-1]).movedim(0, -1)


def checked_chunk_size(chunk_size: int | str) -> int | None:
    """Columns a chunk as the user wants them; ``None`` for what suits the model."""
    if chunk_size == "auto":
        return None
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected 'auto' or a positive number of columns, got {chunk_size!r}.")
    return chunk_size
