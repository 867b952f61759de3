"""Krylov methods on flat columns ``[D, K]``, each column with a life of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Maps columns ``[D, K]`` to the product with a matrix.
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolveInfo:
    """What a solve did, per column.

    Attributes:
        num_iterations: Iterations ``[K]``.
        residual_norm: ‖b - A x‖ / ‖b‖, recomputed from the solution ``[K]``.
        converged: Whether that is at most the tolerance asked for ``[K]``.
        breakdown: Whether a direction of negative curvature ended the column ``[K]``.
    """

    num_iterations: Tensor
    residual_norm: Tensor
    converged: Tensor
    breakdown: Tensor


def conjugate_gradients(
    product: Product, B: Tensor, X: Tensor | None, precondition: Product | None, rtol: float, max_iter: int
) -> tuple[Tensor, SolveInfo]:
    """Solve A X = B for a symmetric positive definite A by (preconditioned) conjugate gradients.

    The residual of the recurrence drifts from the true one in finite precision. When a column looks converged, its
    true residual is computed, and the column starts again from there as long as that helps.

    Args:
        product: X -> A X.
        B: Right-hand sides ``[D, K]``.
        X: First iterate, or ``None`` for zero.
        precondition: R -> P R with P ≈ A⁻¹ symmetric positive definite.
        rtol: Relative residual at which a column stops.
        max_iter: Iterations at most, counted per column.

    Returns:
        The solutions ``[D, K]``, and what happened.
    """
    num_columns = B.shape[1]
    largest = B.abs().amax(0)
    unit = torch.where((largest > 0) & largest.isfinite(), torch.exp2(largest.log2().round()), 1.0)
    B = B / unit
    X = None if X is None else X / unit
    scale = B.norm(dim=0)
    X = torch.zeros_like(B) if X is None else X.clone()
    X[:, scale == 0] = 0
    R = B - product(X) if bool(X.any()) else B.clone()
    iterations = torch.zeros(num_columns, dtype=torch.long, device=B.device)
    breakdown = torch.zeros(num_columns, dtype=torch.bool, device=B.device)
    residual = _relative(R, scale)
    open_columns = residual > rtol
    is_first_run = True
    while bool(open_columns.any()):
        chosen = open_columns.nonzero().squeeze(1)
        run = _Run(product, precondition, X[:, chosen], R[:, chosen], scale[chosen], rtol)
        run.advance(max_iter - iterations[chosen])
        iterations[chosen] += run.iterations
        breakdown[chosen] |= run.breakdown
        true_R = B[:, chosen] - product(run.X)
        now = _relative(true_R, scale[chosen])
        # What a restart made worse is thrown away, and what a singular matrix blew up. A run that was merely short
        # is kept: the error falls with each step even where the residual rises.
        nearer = _energy(run.X, B[:, chosen], true_R) < _energy(X[:, chosen], B[:, chosen], R[:, chosen])
        better = now.isfinite() & ((now <= residual[chosen]) | (is_first_run & nearer & ~run.stalled))
        is_first_run = False
        kept = chosen[better]
        X[:, kept], R[:, kept] = run.X[:, better], true_R[:, better]
        helped = now < 0.5 * residual[chosen]
        residual[kept] = now[better]
        may_go_on = helped & ~run.breakdown & (iterations[chosen] < max_iter) & (now > rtol)
        open_columns = torch.zeros_like(open_columns)
        open_columns[chosen] = may_go_on
    converged = residual <= rtol
    return X * unit, SolveInfo(iterations, residual, converged, breakdown & ~converged)


def _energy(X: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """xᵀAx/2 - bᵀx of each column with A x = b - r, which conjugate gradients make smaller with each step."""
    return -(X * (B + R)).sum(0) / 2


def _relative(R: Tensor, scale: Tensor) -> Tensor:
    norms = R.norm(dim=0)
    return torch.where(scale > 0, norms / torch.where(scale > 0, scale, 1.0), norms)


class _Run:
    """One run of the recurrences; columns that are done leave the products."""

    def __init__(
        self, product: Product, precondition: Product | None, X: Tensor, R: Tensor, scale: Tensor, rtol: float
    ) -> None:
        self._product, self._precondition = product, precondition
        self._scale, self._rtol = scale, rtol
        self.X, self._R = X.clone(), R.clone()
        self.iterations = torch.zeros(X.shape[1], dtype=torch.long, device=X.device)
        self.breakdown = torch.zeros(X.shape[1], dtype=torch.bool, device=X.device)
        self.stalled = torch.zeros_like(self.breakdown)
        self._largest = torch.zeros_like(scale)
        Z = self._preconditioned(self._R)
        self._P, self._rho = Z.clone(), (self._R * Z).sum(0)

    def _preconditioned(self, R: Tensor) -> Tensor:
        return R if self._precondition is None else self._precondition(R)

    def advance(self, budget: Tensor) -> None:
        """Iterate until every column has converged, broken down or used its budget."""
        active = budget > 0
        while bool(active.any()):
            self._step(active.nonzero().squeeze(1))
            floor = max(self._rtol, torch.finfo(self._R.dtype).eps / 16)
            done = self._R.norm(dim=0) <= floor * self._scale
            active = active & ~done & ~self.breakdown & ~self.stalled & (self.iterations < budget)

    def _step(self, k: Tensor) -> None:
        P = self._P[:, k]
        AP = self._product(P)
        curvature = (P * AP).sum(0)
        rho = self._rho[k]
        # rho <= 0 means that the preconditioner, not the matrix, is indefinite. NaN ends a column as well.
        good = (curvature > 0) & (rho > 0)
        squared = P.square().sum(0)
        self._largest[k] = torch.maximum(self._largest[k], AP.norm(dim=0) / squared.sqrt())
        # In a direction that the matrix maps to zero, rounding alone decides the sign.
        noise = 8 * torch.finfo(P.dtype).eps * self._largest[k] * squared
        is_rounding = (curvature.abs() <= noise) & ~(rho < 0)
        self.stalled[k[~good & is_rounding]] = True
        self.breakdown[k[~good & ~is_rounding]] = True
        k, P, AP = k[good], P[:, good], AP[:, good]
        if len(k) == 0:
            return
        alpha = rho[good] / curvature[good]
        self.X[:, k] += alpha * P
        R = self._R[:, k] - alpha * AP
        Z = self._preconditioned(R)
        new_rho = (R * Z).sum(0)
        self._R[:, k] = R
        self._P[:, k] = Z + (new_rho / rho[good]) * P
        self._rho[k] = new_rho
        self.iterations[k] += 1
