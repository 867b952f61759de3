"""How the weights that stay make up for those that are set to zero."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops import (
    BlockDiagonal,
    CGInverseLinearOperator,
    ConvergenceWarning,
    Diagonal,
    LinearOperator,
    SubmatrixLinearOperator,
    jacobi_preconditioner,
)

#: Blocks of at most this size are solved by Cholesky in float64, the others by conjugate gradients.
DENSE_SIZE = 1024
#: With a larger relative residual a step makes up for nothing.
LARGEST_RESIDUAL = 0.1


@dataclass(frozen=True, eq=False)
class Tolerance:
    """How well systems are solved.

    Args:
        rtol: Relative residual to reach.
        max_iter: Iterations at most, or ``None`` for what conjugate gradients take by default.
    """

    rtol: float
    max_iter: int | None


@dataclass(frozen=True, eq=False)
class Compensation:
    """The step δ that sets some entries to zero at the least cost ½ δᵀQ⁻¹δ.

    Args:
        step: δ ``[D]``, which at the entries to be zero is as near to -θ as the system is solved.
        cost: ½ δᵀQ⁻¹δ = ½ θ_Sᵀ (Q_SS)⁻¹ θ_S.
        residual: The largest relative residual of the systems.
    """

    step: Tensor
    cost: float
    residual: float


def compensation(
    Q: LinearOperator, values: Tensor, diagonal: Tensor, pruned: Tensor, tolerance: Tolerance
) -> Compensation:
    r"""The minimum of ½ δᵀQ⁻¹δ under (θ + δ)_S = 0, which is :math:`-Q_{:S} (Q_{SS})^{-1} θ_S`, block by block.

    Args:
        Q: The symmetric positive definite matrix.
        values: θ ``[D]``.
        diagonal: The diagonal of Q ``[D]``.
        pruned: Mask of S ``[D]``.
        tolerance: Of the systems.

    Raises:
        ValueError: If a Q_SS is not positive definite.
        RuntimeError: If a system is not solved.
    """
    step, cost, residual = torch.zeros_like(values), 0.0, 0.0
    for block, where in _blocks(Q):
        inside = pruned[where]
        if not bool(values[where][inside].any()):
            continue
        part = _of_block(block, values[where], diagonal[where], inside, tolerance)
        step[where] = part.step.to(step.dtype)
        cost, residual = cost + part.cost, max(residual, part.residual)
    return Compensation(step, cost, residual)


def _blocks(Q: LinearOperator) -> Iterator[tuple[LinearOperator, Tensor]]:
    """The innermost blocks, and where in the vector their entries are."""
    positions = torch.arange(Q.shape[0], device=Q.device)
    if hasattr(Q, "to_block_diagonal"):
        Q = Q.to_block_diagonal()
    if not isinstance(Q, BlockDiagonal):
        yield Q, positions
        return
    tensors = positions.split(Q.domain.sizes)
    for block, own in zip(Q.blocks, Q.positions, strict=True):
        where = torch.cat([tensors[i] for i in own])
        for inner, within in _blocks(block):
            yield inner, where[within]


def _of_block(
    Q: LinearOperator, values: Tensor, diagonal: Tensor, inside: Tensor, tolerance: Tolerance
) -> Compensation:
    cut = values * inside
    if isinstance(Q, Diagonal):
        return Compensation(-cut, float(0.5 * (cut.double().square() / diagonal.double()).sum()), 0.0)
    if Q.shape[0] <= DENSE_SIZE:
        found = _by_cholesky(Q, cut, inside, tolerance)
    elif hasattr(Q, "inverse"):
        found = _by_curvature(Q, cut.to(Q.dtype), inside, tolerance)
    else:
        found = _by_submatrix(Q, cut.to(Q.dtype), diagonal.to(Q.dtype), inside, tolerance)
    if not (found.residual <= LARGEST_RESIDUAL and bool(found.step.isfinite().all())):
        raise RuntimeError(
            f"The system of {int(inside.sum())} entries to be zero in a block of {Q.shape[0]} is solved to a relative "
            f"residual of {found.residual:.2g} only, so no parameter was changed. Q is too ill-conditioned for "
            f"{Q.dtype}: invert with a larger damping, use float64, raise max_iter, or pass compensate=False."
        )
    return found


def _by_cholesky(Q: LinearOperator, cut: Tensor, inside: Tensor, tolerance: Tolerance) -> Compensation:
    """By Q_SS λ = θ_S with the dense matrix in float64."""
    columns, target = Q.to_dense().double()[:, inside], cut[inside].double()
    L, failed = torch.linalg.cholesky_ex(columns[inside])
    if failed:
        raise _indefinite(f"on the {len(target)} entries to be set to zero in a block of {Q.shape[0]}")
    multipliers = torch.cholesky_solve(target.unsqueeze(1), L).squeeze(1)
    # Against the product itself, which tells how well Q is known in its precision.
    product: Tensor = Q @ _scattered(multipliers.to(Q.dtype), inside)
    residual = float((product[inside].double() - target).norm() / target.norm())
    if tolerance.rtol < residual <= LARGEST_RESIDUAL:
        warnings.warn(
            f"A compensation is known to a relative residual of {residual:.2g} in {Q.dtype}, more than "
            f"{tolerance.rtol:.2g}: invert with a larger damping, use float64, or pass rtol.",
            ConvergenceWarning,
            stacklevel=5,
        )
    return Compensation(-(columns @ multipliers), float(0.5 * target.dot(multipliers)), residual)


def _indefinite(where: str) -> ValueError:
    return ValueError(
        f"Q: expected a positive definite matrix, but {where} it is not, so no parameter was changed. Invert with a "
        "larger damping, or in float64."
    )


def _by_curvature(Q: LinearOperator, cut: Tensor, inside: Tensor, tolerance: Tolerance) -> Compensation:
    """By H_KK δ_K = H_KS θ_S with H = Q⁻¹ and K what is kept.

    It is the same step. But the iterations get the stiff directions of H right first, which decide on the loss, while
    Q_SS has them last.
    """
    H, diagonal = _curvature(Q)
    moved, residual = _solved(H, H @ cut, diagonal, ~inside, tolerance)
    step = moved - cut
    return Compensation(step, float(0.5 * step.double().dot((H @ step).double())), residual)


def _curvature(Q: LinearOperator) -> tuple[LinearOperator, Tensor]:
    """H = Q⁻¹, and its diagonal ``[D]``, which is positive.

    Raises:
        ValueError: If Q is not positive definite.
    """
    where = f"in a block of {Q.shape[0]}"
    try:
        H: LinearOperator = Q.inverse()  # type: ignore[attr-defined]
        diagonal: Tensor = H.diagonal()  # type: ignore[attr-defined]
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise _indefinite(where) from error
    if not bool(((diagonal > 0) & diagonal.isfinite()).all()):
        raise _indefinite(where)
    return H, diagonal


def _by_submatrix(
    Q: LinearOperator, cut: Tensor, diagonal: Tensor, inside: Tensor, tolerance: Tolerance
) -> Compensation:
    """By Q_SS λ = θ_S, with products."""
    multipliers, residual = _solved(Q, cut, diagonal, inside, tolerance)
    return Compensation(-(Q @ multipliers), float(0.5 * cut.double().dot(multipliers.double())), residual)


def _solved(
    A: LinearOperator, target: Tensor, diagonal: Tensor, inside: Tensor, tolerance: Tolerance
) -> tuple[Tensor, float]:
    """The solution x of A_SS x_S = b_S, zero elsewhere, and its relative residual; the solver warns itself."""
    indices = inside.nonzero().flatten().tolist()
    if not indices:
        return torch.zeros_like(target), 0.0
    inverse = CGInverseLinearOperator(
        SubmatrixLinearOperator(A, indices, indices),
        tolerance.rtol,
        tolerance.max_iter,
        jacobi_preconditioner(diagonal[inside]),
    )
    solution = _scattered(inverse @ target[inside], inside)
    assert inverse.info is not None
    return solution, float(inverse.info.residual_norm.max())


def _scattered(part: Tensor, inside: Tensor) -> Tensor:
    """A vector with these entries inside, and zeros elsewhere."""
    return part.new_zeros(len(inside)).masked_scatter(inside, part)
