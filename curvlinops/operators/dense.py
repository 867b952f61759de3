"""A dense matrix as an operator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.sampling import normal_columns
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal, checked_logdet


class TensorLinearOperator(LinearOperator):
    """A dense matrix as an operator on flat vectors.

    Cost: O(rows · columns) a product; O(D³) for ``inverse`` and ``logdet``.

    Args:
        A: The matrix ``[rows, columns]``.

    Raises:
        ValueError: If A does not have two axes.

    >>> A = TensorLinearOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> (A.inverse(damping=1.0) @ torch.ones(2)).tolist()
    [0.3333333432674408, 0.20000000298023224]
    """

    def __init__(self, A: Tensor) -> None:
        if A.ndim != 2:
            raise ValueError(f"Expected a matrix, got a tensor of shape {list(A.shape)}.")
        self._matrix = A.detach()
        self._owns_matrix = False
        rows, columns = A.shape
        super().__init__(Space.flat(columns, A.dtype, A.device), Space.flat(rows, A.dtype, A.device))
        self.SELF_ADJOINT = rows == columns and is_symmetric(self._matrix)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._matrix @ X[0]]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._matrix.T @ X[0]]

    def to_dense(self) -> Tensor:
        """A copy of the matrix."""
        return self._matrix.clone()

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        self._require_square("diagonal")
        return self._matrix.diagonal().clone()

    def trace(self) -> Tensor:
        """The trace."""
        return self.diagonal().sum()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        self._require_square("logdet")
        return checked_logdet(*self._slogdet()).to(self.dtype)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabsdet = torch.linalg.slogdet(_factorisable(self._matrix))
        return sign, logabsdet

    def det(self) -> Tensor:
        """The determinant; infinite or zero where it is beyond the range of the dtype."""
        self._require_square("det")
        sign, logabsdet = self._slogdet()
        return (sign * logabsdet.exp()).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        norm: Tensor = torch.linalg.matrix_norm(self._matrix)
        return norm

    def inverse(self, damping: float = 0.0) -> TensorLinearOperator:
        """The operator (A + damping · I)⁻¹.

        Raises:
            torch.linalg.LinAlgError: If that matrix is singular.
        """
        self._require_square("inverse")
        matrix = _factorisable(self._matrix)
        inverse = torch.linalg.inv(matrix + damping * _eye_like(matrix)).to(self.dtype)
        return _owning((inverse + inverse.T) / 2 if self.SELF_ADJOINT else inverse)

    def pinv(self) -> TensorLinearOperator:
        """The pseudo-inverse: eigenvalues (singular values) that are zero but for rounding stay zero."""
        inverse = torch.linalg.pinv(_factorisable(self._matrix), hermitian=self.SELF_ADJOINT).to(self.dtype)
        return _owning((inverse + inverse.T) / 2 if self.SELF_ADJOINT else inverse)

    def sqrt(self) -> TensorLinearOperator:
        """The symmetric positive semi-definite square root of such a matrix.

        Raises:
            ValueError: If the matrix is not symmetric, or has a negative eigenvalue.
        """
        self._require_square("sqrt")
        if not self.SELF_ADJOINT:
            raise ValueError("sqrt: expected a symmetric matrix.")
        values, vectors = torch.linalg.eigh(_factorisable(self._matrix))
        check_no_negative(values)
        root = (vectors * values.clamp(min=0.0).sqrt() @ vectors.mT).to(self.dtype)
        result = _owning((root + root.mT) / 2)
        result.POSITIVE_SEMIDEFINITE = True
        return result

    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            ValueError: If the matrix is not symmetric positive semi-definite, num_samples is below 1, or the generator
                lives on another device.
        """
        root = self.sqrt()
        noise, _ = normal_columns(self, num_samples, seed, generator)
        samples: Tensor = root @ noise
        return samples

    def frozen(self) -> TensorLinearOperator:
        """The same operator with a copy of the matrix that it was given."""
        return self if self._holds_values else _owning(self._matrix.clone())

    @property
    def _holds_values(self) -> bool:
        return self._owns_matrix

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, TensorLinearOperator):
            return _owning(self._matrix + other._matrix)
        if isinstance(other, Diagonal) and other.domain.is_flat:
            return _owning(self._matrix + torch.diag(other.diagonal()))
        return None

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return _owning(self._matrix * factor)

    def _closed_conversion(self, dtype: torch.dtype, device: torch.device) -> TensorLinearOperator:
        return _owning(self._matrix.to(dtype=dtype, device=device))

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        return _owning(self._matrix @ other._matrix) if isinstance(other, TensorLinearOperator) else None


def _owning(matrix: Tensor) -> TensorLinearOperator:
    """The operator of a matrix that nobody else holds."""
    result = TensorLinearOperator(matrix)
    result._owns_matrix = True
    return result


def is_symmetric(matrix: Tensor) -> bool:
    """Whether a matrix is symmetric as far as the rounding of a product lets it be."""
    if matrix.numel() == 0 or torch.equal(matrix, matrix.mT):
        return True
    rounding = 64 * torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0
    return bool((matrix - matrix.mT).abs().max() <= rounding * matrix.abs().max())


def _eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _factorisable(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix


def check_no_negative(values: Tensor) -> None:
    """Refuse eigenvalues that are negative beyond rounding.

    Raises:
        ValueError: If there is one.
    """
    smallest, largest = float(values.min()), float(values.abs().max())
    rounding = sum(values.shape[-2:]) * torch.finfo(values.dtype).eps * largest
    if not smallest >= -rounding:
        raise ValueError(
            f"Expected a positive semi-definite matrix, but its smallest eigenvalue is {smallest:.2e}, where the "
            f"largest in magnitude is {largest:.2e}. Add damping first."
        )
