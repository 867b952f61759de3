"""Conjugate gradients for symmetric positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.krylov.open_columns import RowProduct, dots
from curvlinops.solvers.krylov.solve import Run


class ConjugateGradients(Run):
    """One run of (preconditioned) conjugate gradients.

    **Reference**: Hestenes, Stiefel (1952), doi:10.6028/jres.049.044.

    Attributes:
        alpha: The step lengths of the last iteration ``[K]``.
        beta: How much of the last directions the new ones keep ``[K]``.
    """

    REDUCES_ENERGY = True

    def __init__(self, product: RowProduct, precondition: RowProduct | None, R: Tensor) -> None:
        super().__init__(product, precondition, R)
        Z = self._preconditioned(self.R)
        self._P, self._rho = Z.clone(), dots(self.R, Z)
        self.alpha, self.beta = torch.zeros_like(self._rho), torch.zeros_like(self._rho)

    def step(self) -> None:
        """One iteration of the open columns."""
        AP = self._product(self._P)
        curvature = dots(self._P, AP)
        good = (curvature > 0) & (self._rho > 0)
        self._judge(AP, curvature, good)
        self.alpha = torch.where(good, self._rho / torch.where(good, curvature, 1.0), 0.0)
        if not bool(good.all()):
            AP = torch.where(good.unsqueeze(1), AP, 0.0)
        self.D.addcmul_(self._P, self.alpha.unsqueeze(1))
        self.R.addcmul_(AP, self.alpha.unsqueeze(1), value=-1)
        Z = self._preconditioned(self.R)
        rho = dots(self.R, Z)
        self.beta = rho / torch.where(self._rho == 0, 1.0, self._rho)
        self._P.mul_(self.beta.unsqueeze(1)).add_(Z)
        self._rho = rho
        self.iterations += good

    def _judge(self, AP: Tensor, curvature: Tensor, good: Tensor) -> None:
        """Note which columns are not good, and why."""
        squared = dots(self._P, self._P)
        size = (dots(AP, AP) / squared).sqrt()
        self.largest = torch.maximum(self.largest, size.nan_to_num(0.0, 0.0))
        # In a direction that the matrix maps to zero, rounding alone decides the sign.
        noise = 8 * torch.finfo(AP.dtype).eps * self.largest * squared
        # rho < 0 means that the preconditioner, not the matrix, is indefinite. NaN ends a column as well.
        is_rounding = (curvature.abs() <= noise) & ~(self._rho < 0)
        self.stalled |= ~good & is_rounding
        self.breakdown |= ~good & ~is_rounding
