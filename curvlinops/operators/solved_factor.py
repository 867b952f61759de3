"""The inverse of a factor that stands alone in its block, by its Cholesky decomposition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlinops.operators.factorisations import choleskys
from curvlinops.operators.factors import DenseFactor, Factor


class SolvedFactor(DenseFactor):
    """The inverse of a positive definite matrix for each group, as its Cholesky decomposition.

    A product solves two triangular systems, which costs what a product with the inverse does; the inverse itself, at
    twice the cost of the decomposition, is computed when its entries are asked for.

    Args:
        lower: The Cholesky factors ``[G, n, n]`` of the matrices that are inverted.
    """

    def __init__(self, lower: Tensor) -> None:
        self._lower = lower
        self._entries: Tensor | None = None
        self.is_owned = True
        self._eigen = None

    @property
    def _tensor(self) -> Tensor:  # type: ignore[override]
        if self._entries is None:
            self._entries = torch.cholesky_inverse(self._lower)
        return self._entries

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return len(self._lower)

    @property
    def size(self) -> int:
        """Rows of each group's matrix, n."""
        return self._lower.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self._lower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self._lower.device

    def _like(self, tensor: Tensor) -> Factor:
        """A dense factor: multiples are not kept as decompositions."""
        return DenseFactor(tensor, True)

    def times(self, X: Tensor) -> Tensor:
        """The factor times ``[K, G, n, S]``."""
        num, groups, size, columns = X.shape
        wide = X.permute(1, 2, 0, 3).reshape(groups, size, num * columns)
        solved = torch.cholesky_solve(wide, self._lower)
        return solved.reshape(groups, size, num, columns).permute(2, 0, 1, 3)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Signs and logarithms of the determinants ``[G]``, in float64."""
        logs = -2 * self._lower.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return torch.ones_like(logs), logs


def solved_factors(factors: Sequence[Factor], retry_double_precision: bool = True) -> list[Factor]:
    """The inverses of positive definite dense factors that are multiplied by few columns at a time.

    Raises:
        ValueError: If a factor is not positive definite.
    """
    found = choleskys([factor._tensor for factor in factors], retry_double_precision)
    return [SolvedFactor(lower) for lower in found]
