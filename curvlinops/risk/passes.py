"""One pass over the data: what may be passed over, and what a pass finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pass:
    """What one rank found in one pass over its data."""

    sums: list[Tensor]
    denominator: Tensor
    num_data: int = 0
    num_batches: int = 0
    disagreements: list[Tensor] = field(default_factory=list)
    error: BaseException | None = None


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
