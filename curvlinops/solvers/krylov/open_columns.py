"""Iterations on several columns at once, of which those that are done leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product

#: Maps rows ``[K, D]``, which are the columns of a right-hand side, to their products.
RowProduct = Callable[[Tensor], Tensor]


def on_rows(product: Product) -> RowProduct:
    """The product of a matrix with columns, for columns that are kept as rows: each in one piece of memory."""
    return lambda V: product(V.T).T.contiguous()


def dots(U: Tensor, V: Tensor) -> Tensor:
    """Inner products of the rows ``[K, D]`` of two matrices ``[K]``."""
    return torch.bmm(U.unsqueeze(1), V.unsqueeze(2)).flatten()


class OpenColumns:
    """The state of an iteration: every attribute that is a tensor has one row for each column that is still open.

    Attributes:
        numbers: Numbers of the open columns.
    """

    #: Attributes that are remembered of columns that are done.
    _OUTCOME: ClassVar[tuple[str, ...]]

    def __init__(self, num_columns: int, device: torch.device) -> None:
        self._num_columns = num_columns
        self._ended: dict[str, Tensor] = {}
        self.numbers = torch.arange(num_columns, device=device)

    def retire(self, done: Tensor) -> None:
        """Take some of the open columns out.

        Args:
            done: Which ones, of the open columns.
        """
        if not bool(done.any()):
            return
        self._ended = self._merged(done)
        # At once, lest an interrupt finds some with more columns than others.
        vars(self).update({name: value[~done] for name, value in vars(self).items() if isinstance(value, Tensor)})

    def outcome(self) -> dict[str, Tensor]:
        """What is known of all columns, open or not, by name of the attribute."""
        everything = torch.ones_like(self.numbers, dtype=torch.bool)
        return self._ended if self._ended and not len(self.numbers) else self._merged(everything)

    def _merged(self, chosen: Tensor) -> dict[str, Tensor]:
        numbers = self.numbers[chosen]
        if len(numbers) == self._num_columns:
            return {name: getattr(self, name) for name in self._OUTCOME}
        merged = {}
        for name in self._OUTCOME:
            values = getattr(self, name)
            known = self._ended.get(name)
            known = values.new_zeros(self._num_columns, *values.shape[1:]) if known is None else known
            known[numbers] = values[chosen]
            merged[name] = known
        return merged
