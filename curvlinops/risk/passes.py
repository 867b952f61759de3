"""One pass over the data: what may be passed over, and what a pass finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
        is_whole: Whether it is between two mini-batches, not within one.
    """

    sums: list[Tensor]
    denominator: Tensor
    use: Use = field(default_factory=Use)
    num_data: int = 0
    num_batches: int = 0
    batch_index: int = 0
    are_ours: bool = False
    disagreements: list[Tensor] = field(default_factory=list)
    error: BaseException | None = None
    is_whole: bool = True

    @staticmethod
    def empty(shapes: Sequence[Sequence[int]], like: Tensor, use: Use) -> Pass:
        """A pass that has not begun: its sums are zeros of at least float32, which take no memory.

        Without shapes, the first mini-batch says what is summed.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        sums = [torch.zeros((), dtype=dtype, device=like.device).expand(tuple(shape)) for shape in shapes]
        return Pass(sums, torch.zeros((), dtype=torch.float64, device=like.device), use)

    def add(self, batch: int, piece: Piece) -> None:
        """Add a mini-batch's result, or some columns of it.

        Raises:
            ValueError: If it has not the shapes of the sums.
        """
        columns, tensors = piece
        if not self.sums:
            self.sums = [t.detach() for t in tensors]
            return
        is_whole = columns is None or all(columns == slice(0, s.shape[-1]) for s in self.sums)
        expected = [s.shape if columns is None else s[..., columns].shape for s in self.sums]
        if [t.shape for t in tensors] != expected:
            raise ValueError(
                f"Mini-batch {batch}: expected tensors of shapes {[list(e) for e in expected]}, got "
                f"{[list(t.shape) for t in tensors]}."
            )
        tensors = [t.detach().to(s.dtype) for t, s in zip(tensors, self.sums, strict=True)]
        if tensors and is_whole:
            self._add_whole(tensors)
        elif tensors:
            self._add_columns(columns, tensors)

    def _add_whole(self, tensors: list[Tensor]) -> None:
        if self.num_batches == 0:
            # Not copied; it can be the user's own vector (the gradient of an identity is).
            self.sums, self.are_ours = tensors, False
        elif self.are_ours:
            torch._foreach_add_(self.sums, tensors)
        else:
            self.sums, self.are_ours = list(torch._foreach_add(self.sums, tensors)), True

    def _add_columns(self, columns: slice | None, tensors: list[Tensor]) -> None:
        is_first = self.num_batches == 0
        if not self.are_ours:
            self.sums = _column_memory(self.sums) if is_first else [s.clone() for s in self.sums]
            self.are_ours = True
        (torch._foreach_copy_ if is_first else torch._foreach_add_)([s[..., columns] for s in self.sums], tensors)

    def scaled(self, denominator: float | None) -> list[Tensor]:
        """The sums, divided by a number if there is one."""
        if self.are_ours:
            if denominator is not None and self.sums:
                torch._foreach_div_(self.sums, denominator)
            return self.sums
        return [s.clone() if denominator is None else s / denominator for s in self.sums]


def _column_memory(like: Sequence[Tensor]) -> list[Tensor]:
    """Memory for tensors ``[*shape, K]`` whose columns lie one after the other, whole; nothing is written to it yet."""
    num_columns, first = like[0].shape[-1], like[0]
    sizes = [tensor[..., 0].numel() for tensor in like]
    parts = torch.empty(num_columns, sum(sizes), dtype=first.dtype, device=first.device).split(sizes, 1)
    return [part.view(num_columns, *t.shape[:-1]).movedim(0, -1) for part, t in zip(parts, like, strict=True)]


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
