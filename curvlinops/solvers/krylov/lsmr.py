"""Least squares with rectangular matrices, by products with the matrix and its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product


class LeastSquaresRun:
    r"""One run of LSMR for min ‖R - A d‖, which makes ‖Aᵀ(R - A d)‖ smaller with each step.

    Vectors u and v make A bidiagonal, with entries α and β. One sequence of plane rotations makes AᵀA's factor
    triangular, a second one the triangle of the normal equations; the corrections follow by short recurrences, and
    their products with A from the products that are made anyway, which gives the residual as a vector.

    **Reference**: Fong, Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems,
    doi:10.1137/10079687X.

    Args:
        product: X -> A X.
        adjoint_product: Y -> Aᵀ Y.
        R: Right-hand sides ``[rows, K]``.

    Attributes:
        D: The corrections so far ``[columns, K]``.
        R: Their residuals ``[rows, K]``.
        normal: ‖Aᵀ(R - A d)‖ by the recurrence ``[K]``.
        largest: A lower bound of ‖A‖ ``[K]``.
        condition: A lower bound of the condition of A ``[K]``.
        iterations: Iterations of each column ``[K]``.
        stalled: Columns for which there is nothing left to reach ``[K]``.
    """

    def __init__(self, product: Product, adjoint_product: Product, R: Tensor) -> None:
        self._product, self._adjoint_product = product, adjoint_product
        self.R = R.clone()
        self._u, beta = _normalised(R)
        self._v, self._alpha = _normalised(adjoint_product(self._u))
        zeros, ones = torch.zeros_like(beta), torch.ones_like(beta)
        self.D = torch.zeros_like(self._v)
        self._h, self._h_bar = self._v.clone(), torch.zeros_like(self._v)
        # Products of the two directions with A.
        self._Ah, self._Ah_bar = torch.zeros_like(R), torch.zeros_like(R)
        self._alpha_bar, self._zeta_bar = self._alpha.clone(), self._alpha * beta
        self._theta_over_rho = zeros.clone()
        self._rho, self._rho_bar = ones.clone(), ones.clone()
        self._cosine, self._sine = ones.clone(), zeros.clone()
        self.normal = self._zeta_bar.clone()
        self.largest, self.condition = zeros.clone(), ones.clone()
        self._most, self._least = zeros.clone(), torch.full_like(beta, torch.inf)
        self.iterations = torch.zeros(R.shape[1], dtype=torch.long, device=R.device)
        self.stalled = self.normal == 0

    def step(self, k: Tensor) -> None:
        """One iteration of the columns of these numbers: a product with A, and one with its adjoint."""
        Av = self._product(self._v[:, k])
        self._Ah[:, k] = Av - self._theta_over_rho[k] * self._Ah[:, k]
        u, beta = _normalised(Av - self._alpha[k] * self._u[:, k])
        v, alpha = _normalised(self._adjoint_product(u) - beta * self._v[:, k])
        self.largest[k] = torch.maximum(self.largest[k], torch.hypot(self._alpha[k], beta))
        rho, theta = self._first_rotation(k, alpha, beta)
        old = self._rho[k] * self._rho_bar[k]
        theta_bar = self._sine[k] * rho
        rho_bar, zeta = self._second_rotation(k, rho, theta)
        good = (rho > 0) & (rho_bar > 0) & rho_bar.isfinite()
        self.stalled[k[~good]] = True
        self._correct(k[good], (theta_bar * rho / old)[good], (zeta / (rho * rho_bar))[good])
        self._u[:, k], self._v[:, k], self._alpha[k] = u, v, alpha
        self._theta_over_rho[k] = torch.where(good, theta / rho, 0.0)
        self._h[:, k] = v - self._theta_over_rho[k] * self._h[:, k]
        self._rho[k], self._rho_bar[k] = torch.where(good, rho, 1.0), torch.where(good, rho_bar, 1.0)
        self.stalled[k[(alpha == 0) | (beta == 0)]] = True
        self.iterations[k] += 1

    def _first_rotation(self, k: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        rho = torch.hypot(self._alpha_bar[k], beta)
        theta = beta / rho * alpha
        self._alpha_bar[k] = self._alpha_bar[k] / rho * alpha
        return rho, theta

    def _second_rotation(self, k: Tensor, rho: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = self._cosine[k] * rho
        rho_bar = torch.hypot(diagonal, theta)
        self._cosine[k], self._sine[k] = diagonal / rho_bar, theta / rho_bar
        zeta = self._cosine[k] * self._zeta_bar[k]
        self._zeta_bar[k] = -self._sine[k] * self._zeta_bar[k]
        self.normal[k] = self._zeta_bar[k].abs()
        is_later = self.iterations[k] > 0
        self._most[k] = torch.maximum(self._most[k], torch.where(is_later, self._rho_bar[k], 0.0))
        self._least[k] = torch.minimum(self._least[k], torch.where(is_later, self._rho_bar[k], torch.inf))
        self.condition[k] = torch.maximum(self._most[k], diagonal) / torch.minimum(self._least[k], diagonal)
        return rho_bar, zeta

    def _correct(self, k: Tensor, share: Tensor, length: Tensor) -> None:
        self._h_bar[:, k] = self._h[:, k] - share * self._h_bar[:, k]
        self._Ah_bar[:, k] = self._Ah[:, k] - share * self._Ah_bar[:, k]
        self.D[:, k] += length * self._h_bar[:, k]
        self.R[:, k] -= length * self._Ah_bar[:, k]


def _normalised(U: Tensor) -> tuple[Tensor, Tensor]:
    """The columns with unit norm, and their norms."""
    norms = U.norm(dim=0)
    return U / torch.where(norms > 0, norms, 1.0), norms
