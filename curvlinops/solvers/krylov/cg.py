"""Conjugate gradients for symmetric positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product
from curvlinops.solvers.krylov.solve import Run


class ConjugateGradients(Run):
    """One run of (preconditioned) conjugate gradients.

    **Reference**: Hestenes, Stiefel (1952), doi:10.6028/jres.049.044.

    Attributes:
        alpha: The step lengths of the last iteration ``[K]``.
        beta: How much of the last directions the new ones keep ``[K]``.
    """

    REDUCES_ENERGY = True

    def __init__(self, product: Product, precondition: Product | None, R: Tensor) -> None:
        super().__init__(product, precondition, R)
        Z = self._preconditioned(self.R)
        self._P, self._rho = Z.clone(), (self.R * Z).sum(0)
        self.alpha, self.beta = torch.zeros_like(self._rho), torch.zeros_like(self._rho)

    def step(self, k: Tensor) -> None:
        """One iteration of the columns of these numbers."""
        P = self._P[:, k]
        AP = self._product(P)
        curvature = (P * AP).sum(0)
        rho = self._rho[k]
        good = (curvature > 0) & (rho > 0)
        self._judge(k, P, AP, curvature, good)
        k, P, AP = k[good], P[:, good], AP[:, good]
        if len(k) == 0:
            return
        alpha = rho[good] / curvature[good]
        self.D[:, k] += alpha * P
        R = self.R[:, k] - alpha * AP
        Z = self._preconditioned(R)
        new_rho = (R * Z).sum(0)
        beta = new_rho / rho[good]
        self.R[:, k] = R
        self._P[:, k] = Z + beta * P
        self._rho[k], self.alpha[k], self.beta[k] = new_rho, alpha, beta
        self.iterations[k] += 1

    def _judge(self, k: Tensor, P: Tensor, AP: Tensor, curvature: Tensor, good: Tensor) -> None:
        """Note which columns are not good, and why."""
        squared = P.square().sum(0)
        self.largest[k] = torch.maximum(self.largest[k], (AP.norm(dim=0) / squared.sqrt()).nan_to_num(0.0, 0.0))
        # In a direction that the matrix maps to zero, rounding alone decides the sign.
        noise = 8 * torch.finfo(P.dtype).eps * self.largest[k] * squared
        # rho < 0 means that the preconditioner, not the matrix, is indefinite. NaN ends a column as well.
        is_rounding = (curvature.abs() <= noise) & ~(self._rho[k] < 0)
        self.stalled[k[~good & is_rounding]] = True
        self.breakdown[k[~good & ~is_rounding]] = True
