"""Positive definite systems of known condition, and conjugate gradients as the textbook has them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from curvlinops import ConvergenceWarning, Diagonal, LinearOperator, Space

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that leave the global random state alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_eigenvalues(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A random symmetric matrix with these eigenvalues."""
    Q = torch.linalg.qr(noise(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    M = (Q * eigenvalues) @ Q.T
    return (M + M.T) / 2


def spd_matrix(size: int, condition: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random symmetric positive definite matrix with eigenvalues spread from 1 down to 1 / condition."""
    spread = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    M = with_eigenvalues(spread, seed).to(dtype)
    return (M + M.T) / 2


class CountingOperator(LinearOperator):
    """A symmetric matrix on flat vectors that counts the columns it multiplies."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor) -> None:
        space = Space.flat(len(matrix), matrix.dtype, CPU)
        super().__init__(space, space)
        self.matrix = matrix
        self.num_columns: list[int] = []

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.num_columns.append(X[0].shape[-1])
        assert sum(self.num_columns) < 100_000, "the solver does not end"
        return [self.matrix @ X[0]]


def textbook_cg(
    A: Tensor, b: Tensor, rtol: float, max_iter: int, P: Callable[[Tensor], Tensor] = lambda r: r
) -> tuple[Tensor, int]:
    """Conjugate gradients for one right-hand side, stopped by the residual of the recurrence."""
    x, r = torch.zeros_like(b), b.clone()
    z = P(r)
    p, rho, n = z.clone(), r @ z, 0
    while r.norm() > rtol * b.norm() and n < max_iter:
        Ap = A @ p
        alpha = rho / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        z = P(r)
        rho, old = r @ z, rho
        p, n = z + (rho / old) * p, n + 1
    return x, n


def relative_residual(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """‖b - A x‖ / ‖b‖ for each column, in float64."""
    A, x, b = A.double(), x.double(), b.double()
    return (b - A @ x).norm(dim=0) / b.norm(dim=0)


def jacobi(matrix: Tensor) -> Diagonal:
    """The inverse of the matrix's diagonal, a preconditioner."""
    return Diagonal(1 / matrix.diagonal())


class CountingMatrix(LinearOperator):
    """Any matrix on flat vectors that counts the columns that it and its transpose multiply."""

    def __init__(self, matrix: Tensor) -> None:
        rows, columns = matrix.shape
        super().__init__(Space.flat(columns, matrix.dtype, CPU), Space.flat(rows, matrix.dtype, CPU))
        self.SELF_ADJOINT = rows == columns and torch.equal(matrix, matrix.T)
        self.matrix, self.count = matrix, 0

    def _multiplied(self, M: Tensor, X: Tensor) -> list[Tensor]:
        self.count += X.shape[1]
        assert self.count < 20_000, "the solver does not end"
        return [M @ X]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._multiplied(self.matrix, X[0])

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._multiplied(self.matrix.T, X[0])


@contextmanager
def noting_warnings() -> Iterator[list[str]]:
    """The messages of the convergence warnings inside; any other warning is an error."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        assert issubclass(warning.category, ConvergenceWarning), f"{warning.category.__name__}: {warning.message}"
        messages.append(str(warning.message))
