"""The symmetric matrices that the two sides of a Kronecker product are: dense or diagonal, one for each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from curvlinops.operators.grouped import multiply, multiply_from_right
from curvlinops.operators.space import working_dtype


class Eigen(NamedTuple):
    """An eigendecomposition of each group's matrix.

    Attributes:
        values: The eigenvalues ``[G, n]``, in no order.
        basis: The eigenvectors ``[G, n, n]`` as columns; None for the unit vectors.
    """

    values: Tensor
    basis: Tensor | None


class Factor(ABC):
    """A symmetric matrix ``[n, n]`` for each of G groups, in float32 at least.

    Args:
        tensor: Its entries. Half precision is copied to float32, anything else is held as it is.
        is_owned: Whether nobody else holds the tensor, so that what follows from it may be kept.

    Attributes:
        is_owned: The same.
    """

    def __init__(self, tensor: Tensor, is_owned: bool) -> None:
        self._tensor = tensor.detach().to(working_dtype(tensor.dtype))
        self.is_owned = is_owned or self._tensor.dtype != tensor.dtype
        self._eigen: Eigen | None = None

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return len(self._tensor)

    @property
    def size(self) -> int:
        """Rows of each group's matrix, n."""
        return self._tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self._tensor.device

    def eigh(self, retry_double_precision: bool = True) -> Eigen:
        """The eigendecomposition; kept where the entries are owned. See ``factor_sets`` for several."""
        from curvlinops.operators.factor_sets import eigendecompositions

        return eigendecompositions([self], retry_double_precision)[0]

    def inverse(self, retry_double_precision: bool = True) -> Factor:
        """The inverse of a positive, or of a negative definite factor; see ``factor_sets`` for several."""
        from curvlinops.operators.factor_sets import inverses

        return inverses([self], retry_double_precision)[0]

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Signs and logarithms of the determinants ``[G]``, in float64."""
        values = self.eigh().values.double()
        return values.sign().prod(-1), values.abs().log().sum(-1)

    def frozen(self) -> Factor:
        """The same factor with entries of its own."""
        return self if self.is_owned else self._like(self._tensor.clone())

    def scaled(self, number: float) -> Factor:
        """The factor times a number."""
        result = self._like(self._tensor * number)
        if self._eigen is not None:
            result._eigen = Eigen(self._eigen.values * number, self._eigen.basis)
        return result

    def converted(self, dtype: torch.dtype, device: torch.device) -> Factor:
        """The factor in another dtype, float32 at least, or on another device."""
        return self._like(self._tensor.to(dtype=working_dtype(dtype), device=device, copy=True))

    def is_same(self, other: Factor) -> bool:
        """Whether the other has the same entries."""
        return self is other or (type(self) is type(other) and self.has_entries(other._tensor))

    def has_entries(self, tensor: Tensor) -> bool:
        """Whether it has these entries."""
        return tensor.shape == self._tensor.shape and torch.equal(tensor, self._tensor)

    @property
    def is_one(self) -> bool:
        """Whether it is a diagonal with the single entry 1, so that the other factor stands alone."""
        return False

    def _like(self, tensor: Tensor) -> Factor:
        """A factor of this kind that owns its entries."""
        return type(self)(tensor, True)

    @abstractmethod
    def times(self, X: Tensor) -> Tensor:
        """The factor times ``[K, G, n, S]``."""

    @abstractmethod
    def times_from_right(self, X: Tensor) -> Tensor:
        """``[K, G, R, n]`` times the factor."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The traces ``[G]``, in float64."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonals ``[G, n]``."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Squares of the Frobenius norms ``[G]``, in float64."""

    @abstractmethod
    def damped(self, damping: float | Tensor) -> Factor:
        """The factor plus a multiple of the identity, one for all groups or one for each ``[G]``."""

    @abstractmethod
    def plus(self, other: Factor) -> Factor:
        """The sum of two factors."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Factor:
        """The rows and columns from start up to stop."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrices ``[G, n, n]``."""

    @abstractmethod
    def with_eigenvalues(self, values: Tensor) -> Factor:
        """The factor with other eigenvalues ``[G, n]``, in the order of :meth:`eigh`."""


class DenseFactor(Factor):
    """A dense symmetric matrix for each group.

    Args:
        matrix: The matrices ``[G, n, n]``, or one of them ``[n, n]``.
        is_owned: Whether nobody else holds the tensor.

    >>> DenseFactor(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).damped(1.0).trace().tolist()
    [6.0]
    """

    def __init__(self, matrix: Tensor, is_owned: bool = False) -> None:
        matrix = matrix.unsqueeze(0) if matrix.ndim == 2 else matrix
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise ValueError(f"matrix: expected [G, n, n] or [n, n], got {list(matrix.shape)}.")
        super().__init__(matrix, is_owned)

    def times(self, X: Tensor) -> Tensor:
        """The factor times ``[K, G, n, S]``."""
        return multiply(self._tensor, X)

    def times_from_right(self, X: Tensor) -> Tensor:
        """``[K, G, R, n]`` times the factor."""
        return multiply_from_right(X, self._tensor)

    def trace(self) -> Tensor:
        """The traces ``[G]``, in float64."""
        return self.diagonal().sum(-1, dtype=torch.float64)

    def diagonal(self) -> Tensor:
        """The diagonals ``[G, n]``."""
        return self._tensor.diagonal(dim1=-2, dim2=-1).clone()

    def squared_norm(self) -> Tensor:
        """Squares of the Frobenius norms ``[G]``, in float64."""
        norm: Tensor = torch.linalg.vector_norm(self._tensor, dim=(-2, -1), dtype=torch.float64)
        return norm.square()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Signs and logarithms of the determinants ``[G]``, in float64."""
        if self._eigen is not None:
            return super().slogdet()
        sign, logabsdet = torch.linalg.slogdet(self._tensor)
        return sign.double(), logabsdet.double()

    def damped(self, damping: float | Tensor) -> Factor:
        """The factor plus a multiple of the identity, one for all groups or one for each ``[G]``."""
        matrix = self._tensor.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(_of_each_group(damping, matrix))
        result = DenseFactor(matrix, True)
        if self._eigen is not None:
            values, basis = self._eigen
            result._eigen = Eigen(values + _of_each_group(damping, values), basis)
        return result

    def plus(self, other: Factor) -> Factor:
        """The sum of two factors."""
        if isinstance(other, DenseFactor):
            return DenseFactor(self._tensor + other._tensor, True)
        matrix = self._tensor.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(other.diagonal())
        return DenseFactor(matrix, True)

    def part(self, start: int, stop: int) -> Factor:
        """The rows and columns from start up to stop."""
        return DenseFactor(self._tensor[:, start:stop, start:stop], self.is_owned)

    def to_dense(self) -> Tensor:
        """The matrices ``[G, n, n]``."""
        return self._tensor.clone()

    def with_eigenvalues(self, values: Tensor) -> Factor:
        """The factor with other eigenvalues ``[G, n]``, in the order of :meth:`eigh`."""
        basis = self.eigh().basis
        assert basis is not None
        matrix = basis * values.unsqueeze(-2) @ basis.mT
        result = DenseFactor((matrix + matrix.mT).div_(2), True)
        result._eigen = Eigen(values, basis)
        return result


class DiagonalFactor(Factor):
    """A diagonal matrix for each group; the identity is one.

    Args:
        entries: The diagonals ``[G, n]``, or one of them ``[n]``.
        is_owned: Whether nobody else holds the tensor.

    >>> DiagonalFactor(torch.tensor([2.0, 4.0])).inverse().diagonal().tolist()
    [[0.5, 0.25]]
    """

    def __init__(self, entries: Tensor, is_owned: bool = False) -> None:
        entries = entries.unsqueeze(0) if entries.ndim == 1 else entries
        if entries.ndim != 2:
            raise ValueError(f"entries: expected [G, n] or [n], got {list(entries.shape)}.")
        super().__init__(entries, is_owned)

    @property
    def is_one(self) -> bool:
        """Whether it is the number 1 in every group, so that the other factor stands alone."""
        return self.size == 1 and bool((self._tensor == 1).all())

    def times(self, X: Tensor) -> Tensor:
        """The factor times ``[K, G, n, S]``."""
        return self._tensor.unsqueeze(-1) * X

    def times_from_right(self, X: Tensor) -> Tensor:
        """``[K, G, R, n]`` times the factor."""
        return X * self._tensor.unsqueeze(-2)

    def trace(self) -> Tensor:
        """The traces ``[G]``, in float64."""
        return self._tensor.sum(-1, dtype=torch.float64)

    def diagonal(self) -> Tensor:
        """The diagonals ``[G, n]``."""
        return self._tensor.clone()

    def squared_norm(self) -> Tensor:
        """Squares of the Frobenius norms ``[G]``, in float64."""
        return self._tensor.double().square().sum(-1)

    def damped(self, damping: float | Tensor) -> Factor:
        """The factor plus a multiple of the identity, one for all groups or one for each ``[G]``."""
        return DiagonalFactor(self._tensor + _of_each_group(damping, self._tensor), True)

    def plus(self, other: Factor) -> Factor:
        """The sum of two factors."""
        if isinstance(other, DiagonalFactor):
            return DiagonalFactor(self._tensor + other._tensor, True)
        return other.plus(self)

    def part(self, start: int, stop: int) -> Factor:
        """The rows and columns from start up to stop."""
        return DiagonalFactor(self._tensor[:, start:stop], self.is_owned)

    def to_dense(self) -> Tensor:
        """The matrices ``[G, n, n]``."""
        return torch.diag_embed(self._tensor)

    def with_eigenvalues(self, values: Tensor) -> Factor:
        """The factor with other entries."""
        return DiagonalFactor(values, True)


def _of_each_group(damping: float | Tensor, like: Tensor) -> float | Tensor:
    return damping.to(like).unsqueeze(-1) if isinstance(damping, Tensor) else damping
