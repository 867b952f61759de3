"""Parts of an operator: diagonal blocks and submatrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlinops.operators.algebra import Node
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space


class Block(Node):
    """The diagonal block of some of the tensors of a square operator's space."""

    def __init__(self, operator: LinearOperator, chosen: Sequence[int]) -> None:
        space = operator.domain.select(chosen)
        super().__init__(space, space)
        self.operator = operator
        self.chosen = list(chosen)
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE

    def _padded(self, X: list[Tensor]) -> list[Tensor]:
        whole = self.operator.domain
        inside = dict(zip(self.chosen, X, strict=True))
        return [
            inside[i] if i in inside else X[0].new_zeros(*shape, X[0].shape[-1]) for i, shape in enumerate(whole.shapes)
        ]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        result = self.operator._matmat(self._padded(X))
        return [result[i] for i in self.chosen]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        result = self.operator._rmatmat(self._padded(X))
        return [result[i] for i in self.chosen]

    @property
    def _is_definite(self) -> bool:
        return self.operator._is_definite

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Block(change(self.operator), self.chosen)


class SubmatrixLinearOperator(Node):
    """The matrix ``A[row_idxs, :][:, col_idxs]`` of an operator, on flat vectors.

    Cost: one product with A each.

    Args:
        A: The operator.
        row_idxs: Rows to keep, as flat indices without repetition.
        col_idxs: Columns to keep, likewise.

    Raises:
        ValueError: If an index repeats or lies outside of A.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.arange(9.0).reshape(3, 3))
    >>> SubmatrixLinearOperator(A, [0, 2], [1]).to_dense().tolist()
    [[1.0], [7.0]]
    """

    def __init__(self, A: LinearOperator, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        super().__init__(A.domain, A.codomain)
        self.operator = A
        self.set_submatrix(row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        """Choose other rows and columns.

        Args:
            row_idxs: Rows to keep, as flat indices without repetition.
            col_idxs: Columns to keep, likewise.
        """
        A = self.operator
        rows = _checked_indices(row_idxs, A.shape[0], "row_idxs", A.device)
        self._cols = _checked_indices(col_idxs, A.shape[1], "col_idxs", A.device)
        self._rows = rows
        self._domain = Space.flat(len(self._cols), A.dtype, A.device)
        self._codomain = Space.flat(len(self._rows), A.dtype, A.device)
        same = torch.equal(self._rows, self._cols)
        self.SELF_ADJOINT = A.SELF_ADJOINT and same
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE and same

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [Space.merge(self.operator._matmat(_scatter(X[0], self._cols, self.operator.domain)))[self._rows]]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [Space.merge(self.operator._rmatmat(_scatter(X[0], self._rows, self.operator.codomain)))[self._cols]]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return SubmatrixLinearOperator(change(self.operator), self._rows.tolist(), self._cols.tolist())


def _scatter(X: Tensor, indices: Tensor, space: Space) -> list[Tensor]:
    whole = X.new_zeros(space.numel, X.shape[-1])
    whole[indices] = X
    return space.split(whole)


def _checked_indices(indices: Sequence[int], size: int, name: str, device: torch.device) -> Tensor:
    values = [int(i) for i in indices]
    outside = [i for i in values if not 0 <= i < size]
    if outside or len(set(values)) != len(values):
        problem = f"{outside[:5]} lie outside of 0..{size - 1}" if outside else "an index repeats"
        raise ValueError(f"{name}: {problem}.")
    return torch.tensor(values, dtype=torch.long, device=device)
