"""Roots of operators that know their own, times columns, and what rounding does to the answers."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.factors import DenseFactor, DiagonalFactor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal


def has_closed_root(A: LinearOperator, is_inverse: bool) -> bool:
    """Whether an operator knows its square root, or that of its inverse."""
    return hasattr(A, "sqrt") and (not is_inverse or hasattr(A, "inverse"))


def apply_closed_root(A: LinearOperator, X: list[Tensor], is_inverse: bool) -> tuple[list[Tensor], Tensor]:
    """The root times columns, and the relative error that rounding makes of each ``[K]``.

    Args:
        A: The operator, with a closed root.
        X: The columns, in the shapes of its space.
        is_inverse: Whether the root is that of the inverse.

    Raises:
        ValueError: If the root does not exist.
    """
    Y, error = _applied(A, X, is_inverse)
    size = _norms(Y)
    # Where nothing is rounded, nothing is lost, also where the answer is zero.
    return Y, torch.where(error == 0, 0.0, error / size)


def _applied(A: LinearOperator, X: list[Tensor], is_inverse: bool) -> tuple[list[Tensor], Tensor]:
    """The product, and estimates of its errors in norm ``[K]``."""
    if not isinstance(A, (BlockDiagonal, Diagonal)):
        # What computes its blocks at first need is then known by them; closed forms are as they were.
        A = A.damped(0.0) if isinstance(A.damped(0.0), BlockDiagonal) else A
    if isinstance(A, BlockDiagonal):
        # The rounding of a block is that of its own size.
        found = [_applied(block, part, is_inverse) for block, part in zip(A.blocks, A._parts(X), strict=True)]
        Y = A._together([part for part, _ in found])
        return Y, torch.linalg.vector_norm(torch.stack([error for _, error in found]), dim=0)
    A = _as_kronecker(A) if isinstance(A, TensorLinearOperator) else A.frozen()
    root: LinearOperator = (A.inverse() if is_inverse else A).sqrt()  # type: ignore[attr-defined]
    Y = root._matmat(X)
    eps = torch.finfo(A.dtype).eps
    if isinstance(A, Diagonal):
        return Y, eps * _norms(Y)
    error = eps * _norm(root, X, Y) * _norms(X)
    if isinstance(A, Kronecker):
        error = error + _norms(_change(A, is_inverse, eps)._matmat(X))
    return Y, error


def _as_kronecker(A: TensorLinearOperator) -> Kronecker:
    one = torch.ones(1, 1, dtype=A.dtype, device=A.device)
    left = DenseFactor(A.to_dense().unsqueeze(0), True)
    return Kronecker(left, DiagonalFactor(one, True), space=A.domain)


def _change(A: Kronecker, is_inverse: bool, eps: float) -> LinearOperator:
    """What the root of A changes by where each factor changes by its rounding, ε ‖L‖ and ε ‖R‖."""
    values, moved = A._products() + A.shift, _moved(A.left.eigh().values, eps), 
    raise NotImplementedError


def _norm(root: LinearOperator, X: list[Tensor], Y: list[Tensor]) -> float:
    """The spectral norm of a root; where it does not know its eigenvalues, the most that it stretches a column."""
    if hasattr(root, "eigenvalues"):
        others = abs(getattr(root, "c", 0.0))
        return max(float(root.eigenvalues().abs().max()), others)
    before, after = _norms(X), _norms(Y)
    return float(torch.where(before > 0, after / before, 0.0).sum())


def _norms(columns: list[Tensor]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(Space.merge(columns), dim=0, dtype=torch.float64)
    return norms
