"""One pass over the data: what may be passed over, and what a pass finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvlinops.risk.columns import Piece
from curvlinops.risk.linearization import Use


@dataclass
class Pass:
    """What one rank found in one pass over its data.

    Attributes:
        sums: What is summed over mini-batches.
        denominator: The sum of their denominators.
        use: What linearisations are for in this pass.
        num_data: Number of data, where somebody asks for it.
        num_batches: Number of mini-batches.
        batch_index: Which one is at hand.
        are_ours: Whether the sums share no memory with the mini-batches' own results.
        disagreements: Outcomes of comparisons of the two ways through the network.
        error: What went wrong, where other ranks wait for it.
    """

    sums: list[Tensor]
    denominator: Tensor
    use: Use = field(default_factory=Use)
    num_data: int = 0
    num_batches: int = 0
    batch_index: int = 0
    are_ours: bool = True
    disagreements: list[Tensor] = field(default_factory=list)
    error: BaseException | None = None

    @staticmethod
    def empty(shapes: Sequence[Sequence[int]], like: Tensor, use: Use) -> Pass:
        """A pass that has not begun; sums are in at least float32 and have each column in one piece of memory."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        counts = {tuple(shape)[-1:] for shape in shapes}
        in_pieces = len(counts) == 1 and counts != {()} and counts != {(1,)}
        sums = (_column_zeros if in_pieces else _zeros)([tuple(s) for s in shapes], dtype, like.device)
        denominator = torch.zeros((), dtype=torch.float64, device=like.device)
        return Pass(sums, denominator, use, are_ours=in_pieces)

    def add(self, batch: int, piece: Piece) -> None:
        """Add a mini-batch's result, or some columns of it.

        Raises:
            ValueError: If it has not the shapes of the sums.
        """
        columns, tensors = piece
        is_whole = columns is None or all(columns == slice(0, s.shape[-1]) for s in self.sums)
        sums = self.sums if is_whole else [s[..., columns] for s in self.sums]
        if [t.shape for t in tensors] != [s.shape for s in sums]:
            raise ValueError(
                f"Mini-batch {batch}: expected tensors of shapes {[list(s.shape) for s in sums]}, got "
                f"{[list(t.shape) for t in tensors]}."
            )
        tensors = [t.detach().to(s.dtype) for t, s in zip(tensors, sums, strict=True)]
        if not tensors:
            return
        if is_whole and self.num_batches == 0:
            # Not copied; it can be the user's own vector (the gradient of an identity is).
            self.sums, self.are_ours = tensors, False
        elif self.num_batches == 0 and self.are_ours:
            torch._foreach_copy_(sums, tensors)
        elif is_whole and not self.are_ours:
            self.sums, self.are_ours = list(torch._foreach_add(sums, tensors)), True
        else:
            torch._foreach_add_(sums, tensors)

    def scaled(self, denominator: float | None) -> list[Tensor]:
        """The sums, divided by a number if there is one."""
        if self.are_ours:
            if denominator is not None and self.sums:
                torch._foreach_div_(self.sums, denominator)
            return self.sums
        return [s.clone() if denominator is None else s / denominator for s in self.sums]


def _zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeros that take no memory, to be replaced by the first mini-batch's result."""
    return [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape in shapes]


def _column_zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeros ``[*shape, K]`` whose columns lie in memory one after the other, whole."""
    num_columns = shapes[0][-1]
    sizes = [prod(shape[:-1]) for shape in shapes]
    parts = torch.zeros(num_columns, sum(sizes), dtype=dtype, device=device).split(sizes, 1)
    return [part.reshape(num_columns, *shape[:-1]).movedim(0, -1) for part, shape in zip(parts, shapes, strict=True)]


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite."""
    # One pass over the numbers says that all is well; only large ones, whose squares overflow, take a second.
    if not tensors or bool(torch.nn.utils.get_total_norm(tensors).isfinite()):
        return True
    return all(bool(t.isfinite().all()) for t in tensors)


def check_data(data: Any) -> None:
    """Refuse what cannot be read again and again.

    Raises:
        TypeError: If the data are no iterable, a one-shot iterator, or a tensor.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"Expected an iterable of mini-batches, got {type(data).__name__}.")
    if isinstance(data, Iterator):
        raise TypeError(
            f"The data are a one-shot iterator ({type(data).__name__}), which is empty at the second product. Pass a "
            "list or a DataLoader."
        )
    if isinstance(data, Tensor):
        raise TypeError("Expected an iterable of mini-batches (X, y), got a tensor: pass [(X, y)].")
