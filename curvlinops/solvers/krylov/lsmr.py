"""Least squares with rectangular matrices, by products with the matrix and its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.krylov.open_columns import OpenColumns, RowProduct


class LeastSquaresRun(OpenColumns):
    r"""One run of LSMR for min ‖r - A d‖, which makes ‖Aᵀ(r - A d)‖ smaller with each step.

    Vectors u and v make A bidiagonal, with entries α and β. One sequence of plane rotations makes AᵀA's factor
    triangular, a second one the triangle of the normal equations; the corrections follow by short recurrences, and
    their products with A from the products that are made anyway, which gives the residual as a vector.

    **Reference**: Fong, Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems,
    doi:10.1137/10079687X.

    Args:
        product: The product with A.
        adjoint_product: The product with Aᵀ.
        R: Right-hand sides as rows ``[K, rows]``; written to.
        G: Their gradients Aᵀr ``[K, columns]``.

    Attributes:
        D: The corrections so far ``[K, columns]``.
        R: Their residuals ``[K, rows]``.
        normal: ‖Aᵀ(r - A d)‖ by the recurrence ``[K]``.
        largest: A lower bound of ‖A‖ ``[K]``.
        condition: A lower bound of the condition of A ``[K]``.
        iterations: Iterations of each column ``[K]``.
        stalled: Columns for which there is nothing left to reach ``[K]``.
    """

    _OUTCOME = ("D", "R", "normal", "largest", "condition", "iterations")

    def __init__(self, product: RowProduct, adjoint_product: RowProduct, R: Tensor, G: Tensor) -> None:
        super().__init__(len(R), R.device)
        self._product, self._adjoint_product = product, adjoint_product
        self.R = R
        self._u, beta = _normalised(R)
        self._v, self._alpha = _normalised(G / torch.where(beta > 0, beta, 1.0).unsqueeze(1))
        zeros, ones = torch.zeros_like(beta), torch.ones_like(beta)
        self.D = torch.zeros_like(self._v)
        self._h, self._h_bar = self._v.clone(), torch.zeros_like(self._v)
        # Products of the two directions with A.
        self._Ah, self._Ah_bar = torch.zeros_like(R), torch.zeros_like(R)
        self._alpha_bar, self._zeta_bar = self._alpha, self._alpha * beta
        self._theta_over_rho = zeros
        self._rho, self._rho_bar = ones, ones
        self._cosine, self._sine = ones, zeros
        self.normal = self._zeta_bar
        self.largest, self.condition = zeros, ones
        self._most, self._least = zeros, torch.full_like(beta, torch.inf)
        self.iterations = torch.zeros_like(self.numbers)
        self.stalled = self.normal == 0

    def step(self) -> None:
        """One iteration of the open columns: a product with A, and one with its adjoint."""
        Av = self._product(self._v)
        self._Ah = Av - self._theta_over_rho.unsqueeze(1) * self._Ah
        u, beta = _normalised(torch.addcmul(Av, self._u, self._alpha.unsqueeze(1), value=-1))
        v, alpha = _normalised(torch.addcmul(self._adjoint_product(u), self._v, beta.unsqueeze(1), value=-1))
        self.largest = torch.maximum(self.largest, torch.hypot(self._alpha, beta))
        rho, theta = self._first_rotation(alpha, beta)
        old = self._rho * self._rho_bar
        theta_bar = self._sine * rho
        rho_bar, zeta = self._second_rotation(rho, theta)
        good = (rho > 0) & (rho_bar > 0) & rho_bar.isfinite()
        divisor = torch.where(good, rho * rho_bar, 1.0)
        self._correct(good, theta_bar * rho / old, zeta / divisor)
        self._rho, self._rho_bar = torch.where(good, rho, 1.0), torch.where(good, rho_bar, 1.0)
        self._u, self._v, self._alpha = u, v, alpha
        self._theta_over_rho = torch.where(good, theta / self._rho, 0.0)
        self._h = torch.addcmul(v, self._h, self._theta_over_rho.unsqueeze(1), value=-1)
        self.stalled |= ~good | (alpha == 0) | (beta == 0)
        self.iterations += 1

    def _first_rotation(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        rho = torch.hypot(self._alpha_bar, beta)
        theta = beta / rho * alpha
        self._alpha_bar = self._alpha_bar / rho * alpha
        return rho, theta

    def _second_rotation(self, rho: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = self._cosine * rho
        rho_bar = torch.hypot(diagonal, theta)
        self._cosine, self._sine = diagonal / rho_bar, theta / rho_bar
        zeta = self._cosine * self._zeta_bar
        self._zeta_bar = -self._sine * self._zeta_bar
        self.normal = self._zeta_bar.abs()
        is_later = self.iterations > 0
        self._most = torch.maximum(self._most, torch.where(is_later, self._rho_bar, 0.0))
        self._least = torch.minimum(self._least, torch.where(is_later, self._rho_bar, torch.inf))
        self.condition = torch.maximum(self._most, diagonal) / torch.minimum(self._least, diagonal)
        return rho_bar, zeta

    def _correct(self, good: Tensor, share: Tensor, length: Tensor) -> None:
        share, length = (torch.where(good, t, 0.0).unsqueeze(1) for t in (share, length))
        self._h_bar = torch.addcmul(self._h, self._h_bar, share, value=-1)
        self._Ah_bar = torch.addcmul(self._Ah, self._Ah_bar, share, value=-1)
        self.D.addcmul_(self._h_bar, length)
        self.R.addcmul_(self._Ah_bar, length, value=-1)


def _normalised(U: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with unit norm, and their norms."""
    norms = U.norm(dim=1)
    return U / torch.where(norms > 0, norms, 1.0).unsqueeze(1), norms
