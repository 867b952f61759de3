"""Roots of operators that know their own, times columns, and what rounding does to the answers."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.eigen_decomposed import EigenDecomposed
from curvlinops.operators.factor_sets import eigendecompositions
from curvlinops.operators.factors import DenseFactor, DiagonalFactor, Factor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.operators.low_rank_part import LowRankPart
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.structured import Diagonal
from curvlinops.solvers.functions import check_positive


def has_closed_root(A: LinearOperator, is_inverse: bool) -> bool:
    """Whether an operator knows its square root, or that of its inverse."""
    return hasattr(A, "sqrt") and (not is_inverse or hasattr(A, "inverse"))


@dataclass(frozen=True)
class ClosedRoot:
    """The square root of an operator that knows it, or that of its inverse.

    A dense matrix is decomposed in float64 and its root applied there: in float32, rounding would change the answer by
    about ε times the condition. Kronecker products are decomposed in the dtype of their factors.

    Args:
        is_inverse: Whether the root is that of the inverse.
        name: How errors call it.
    """

    is_inverse: bool
    name: str

    def apply(self, A: LinearOperator, X: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The root times columns, and estimates of what rounding does to the answers, relative to them ``[K]``.

        Args:
            A: The operator, with a closed root.
            X: The columns, in the shapes of its space.

        Raises:
            ValueError: If the root does not exist.
        """
        Y, error = self._applied(A, X)
        return Y, torch.where(error == 0, 0.0, error / _norms(Y))

    def _applied(self, A: LinearOperator, X: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The product, and estimates of its errors in norm ``[K]``."""
        if isinstance(A, TensorLinearOperator):
            return self._of_dense(A, X)
        if isinstance(A, Kronecker):
            return self._of_kronecker(A.frozen(), X, torch.finfo(A.left.dtype).eps)
        if isinstance(A, LowRankLinearOperator):
            return self._of_low_rank(A.frozen(), X)
        if not isinstance(A, (Diagonal, BlockDiagonal)):
            # A matrix that computes its blocks at first need is such a one by then.
            damped = A.damped(0.0)
            A = damped if isinstance(damped, BlockDiagonal) else A
        if isinstance(A, BlockDiagonal):
            return self._of_blocks(A, X)
        root: LinearOperator = (A.inverse() if self.is_inverse else A).sqrt()  # type: ignore[attr-defined, union-attr]
        Y = root._matmat(X)
        rounding = 0.0 if isinstance(A, Diagonal) else _of_product(root, X, Y)
        return Y, rounding + torch.finfo(A.dtype).eps * _norms(Y)

    def _of_blocks(self, A: BlockDiagonal, X: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        blocks = [block.frozen() if isinstance(block, Kronecker) else block for block in A.blocks]
        # Factors of one size together; the frozen ones keep what is found.
        eigendecompositions([f for block in blocks if isinstance(block, Kronecker) for f in (block.left, block.right)])
        found = [self._applied(block, part) for block, part in zip(blocks, A._parts(X), strict=True)]
        errors = torch.stack([error for _, error in found])
        return A._together([part for part, _ in found]), torch.linalg.vector_norm(errors, dim=0)

    def _of_dense(self, A: TensorLinearOperator, X: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        one = DiagonalFactor(torch.ones(1, 1, dtype=torch.float64, device=A.device), True)
        wide, eps = Kronecker(DenseFactor(A._matrix.double(), True), one), torch.finfo(A.dtype).eps
        columns, error = self._of_kronecker(wide, [x.double() for x in X], eps)
        Y = [column.to(A.dtype) for column in columns]
        return Y, error + (eps * _norms(Y) if A.dtype != torch.float64 else 0.0)

    def _of_kronecker(self, A: Kronecker, X: list[Tensor], eps: float) -> tuple[list[Tensor], Tensor]:
        """The same of a Kronecker product; an eigenvalue is zero or negative but for the rounding ε."""
        left, right = A.left.eigh().values, A.right.eigh().values
        values = A._products() + A.shift
        self._check(A, values, eps)
        roots = values.rsqrt() if self.is_inverse else values.clamp(min=0.0).sqrt()
        moved = _with_rounding(A.left, left).unsqueeze(-1) * _with_rounding(A.right, right).unsqueeze(-2) + A.shift
        moved = moved.abs().rsqrt() if self.is_inverse else moved.abs().sqrt()
        root = A._in_eigenbasis(roots)
        Y = root._matmat(X)
        error = _of_product(root, X, Y) + _norms(A._in_eigenbasis(moved - roots)._matmat(X))
        return Y, error + torch.finfo(A.dtype).eps * _norms(Y)

    def _of_low_rank(self, A: LowRankLinearOperator, X: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The same of a matrix of low rank: its Gram matrix is rounded, which changes the span of U alone."""
        root = (A.inverse() if self.is_inverse else A).sqrt()
        Y, found = root._matmat(X), A._part.spectrum()
        error = _of_product(root, X, Y) + torch.finfo(A.dtype).eps * _norms(Y)
        if len(found.values) == 0:
            return Y, error
        rounding = torch.finfo(working_dtype(A.dtype)).eps * float(found.values.abs().max())
        values = (found.values + A.c).clamp(min=0.0)
        change = self._root(values + rounding) - self._root(values)
        core = found.core(torch.where(found.values == 0, 0.0, change / found.values))
        moved = A._like(LowRankPart(A.U, core), 0.0, is_positive=False)
        return Y, error + _norms(moved._matmat(X))

    def _root(self, values: Tensor) -> Tensor:
        return values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt() if self.is_inverse else values.sqrt()

    def _check(self, A: Kronecker, values: Tensor, eps: float) -> None:
        smallest, largest = float(values.min()), float(values.abs().max())
        if not self.is_inverse and not smallest >= -10 * eps * largest:
            raise ValueError(
                f"{self.name} needs a positive semi-definite operator, but it has an eigenvalue of {smallest:.3g}, "
                f"where the largest is {largest:.3g}. Add damping: A.damped(1e-3)."
            )
        if self.is_inverse:
            check_positive(values, 0.0, self.name)
            # Without a shift, a product is as definite as its factors; a positive one with a shift is by that.
            checked = [A.left.eigh().values.abs(), A.right.eigh().values.abs()] if not A.shift else []
            for sizes in [values.flatten(1)] if A.shift and not A._is_positive else checked:
                check_positive(sizes / sizes.amax(-1, keepdim=True), eps, self.name)


def _with_rounding(factor: Factor, values: Tensor) -> Tensor:
    """Eigenvalues ``[G, n]`` changed by their rounding: that of the largest one, or, of a diagonal, each one's own."""
    sizes = values.abs()
    size = sizes if isinstance(factor, DiagonalFactor) else sizes.amax(-1, keepdim=True)
    return values + 4 * torch.finfo(values.dtype).eps * torch.where(values < 0, -size, size)


def _of_product(root: LinearOperator, X: list[Tensor], Y: list[Tensor]) -> Tensor:
    """Rounding of the product Y of a root with columns X, in norm ``[K]``."""
    if isinstance(root, EigenDecomposed):
        # Each sum of n numbers is off by about √n of its own rounding.
        return torch.finfo(root._values.dtype).eps * sqrt(max(root._values.shape)) * _norm(root, X, Y) * _norms(X)
    # BLAS sums the numbers of a long column in parts, so that its rounding hardly grows.
    return torch.finfo(root.dtype).eps * sqrt(min(root.shape[0], 64)) * _norm(root, X, Y) * _norms(X)


def _norm(root: LinearOperator, X: list[Tensor], Y: list[Tensor]) -> float:
    """The spectral norm of a root; where it does not know its eigenvalues, a bound of what it did to the columns."""
    if hasattr(root, "eigenvalues"):
        # A matrix of low rank tells those only that differ from c.
        return max(float(root.eigenvalues().abs().max()), float(getattr(root, "c", 0.0)))
    before, after = _norms(X), _norms(Y)
    return float(torch.where(before > 0, after / before, 0.0).sum())


def _norms(columns: list[Tensor]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(Space.merge(columns), dim=0, dtype=torch.float64)
    return norms
