"""Minimal residuals for symmetric matrices, indefinite and singular ones too."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product
from curvlinops.solvers.krylov.solve import Run

#: Iterations after which the true residual is looked at.
_PERIOD = 50


class MinimalResiduals(Run):
    r"""One run of (preconditioned) MINRES.

    Lanczos vectors v make A tridiagonal, with entries :math:`\beta_j, \alpha_j, \beta_{j+1}` in column j. Plane
    rotations turn that column into :math:`\epsilon_j, \delta_j, \gamma_j` of a triangle, and the directions w follow
    by a recurrence of three terms. With a preconditioner P the vectors are orthonormal in its inner product; u is v
    before P.

    **Reference**: Paige, Saunders (1975), Solution of sparse indefinite systems of linear equations,
    doi:10.1137/0712047.
    """

    RESTARTS_BELOW = 0.9

    def __init__(self, product: Product, precondition: Product | None, R: Tensor) -> None:
        super().__init__(product, precondition, R)
        zeros, ones = torch.zeros_like(self.largest), torch.ones_like(self.largest)
        every = torch.arange(R.shape[1], device=R.device)
        self._u, self._v, self._beta = self._normalised(self.R, every)
        self._old_u, self._w, self._old_w = torch.zeros_like(R), torch.zeros_like(R), torch.zeros_like(R)
        self._remainder = self._beta.clone()
        self._beta = zeros.clone()
        # The last two rotations; the later one comes first.
        self._cosines, self._sines = [ones.clone(), ones.clone()], [zeros.clone(), zeros.clone()]
        self.stalled |= self._remainder == 0
        self._start, self._verified, self._verified_size = self.R.clone(), torch.zeros_like(R), R.norm(dim=0)

    def _normalised(self, U: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U and P U with unit inner product, and what they were divided by."""
        Z = self._preconditioned(U)
        square = (U * Z).sum(0)
        rounding: Tensor = torch.finfo(U.dtype).eps * U.norm(dim=0) * Z.norm(dim=0)
        # Negative: the preconditioner is not positive definite. NaN ends a column as well.
        self.breakdown[k[~((square >= -rounding) & square.isfinite())]] = True
        length = square.clamp(min=0).sqrt()
        divisor = torch.where(length > 0, length, 1.0)
        return U / divisor, Z / divisor, length

    def step(self, k: Tensor) -> None:
        """One iteration of the columns of these numbers."""
        alpha, beta, next_beta, v = self._lanczos(k)
        (cosine, older_cosine), (sine, older_sine) = [[t[k] for t in pair] for pair in (self._cosines, self._sines)]
        epsilon, rest = older_sine * beta, older_cosine * beta
        delta, gamma_bar = cosine * rest + sine * alpha, cosine * alpha - sine * rest
        gamma = torch.hypot(gamma_bar, next_beta)
        # ‖A r‖ / ‖r‖ of the residual so far: zero where the rest cannot be reached by a singular matrix.
        slope = torch.hypot(gamma_bar, cosine * next_beta)
        tiny = 10 * torch.finfo(v.dtype).eps * self.largest[k]
        good = (torch.minimum(slope, gamma) > tiny) & ~self.breakdown[k]
        self.stalled[k[~good]] = True
        self.stalled[k[next_beta <= tiny]] = True
        new_cosine, new_sine = gamma_bar / gamma, next_beta / gamma
        for kept, latest in ((self._cosines, new_cosine), (self._sines, new_sine)):
            kept[1][k], kept[0][k] = kept[0][k], latest
        w = (v - epsilon * self._old_w[:, k] - delta * self._w[:, k]) / gamma
        self._old_w[:, k], self._w[:, k] = self._w[:, k], w
        self._correct(k[good], w[:, good], new_cosine[good], new_sine[good])
        self._verify(k[good & self._is_due(k)])

    def _correct(self, k: Tensor, w: Tensor, cosine: Tensor, sine: Tensor) -> None:
        before = self._remainder[k]
        after = -sine * before
        self.D[:, k] += cosine * before * w
        self.R[:, k] = sine.square() * self.R[:, k] + after * cosine * self._u[:, k]
        self._remainder[k] = after
        self.iterations[k] += 1

    def _is_due(self, k: Tensor) -> Tensor:
        """Whether to look at the true residuals: now and then, and more often where rounding is not far."""
        count = self.iterations[k]
        rounding: Tensor = torch.finfo(self.D.dtype).eps * self.largest[k] * self.D[:, k].norm(dim=0)
        is_near: Tensor = (1e4 * rounding > self.R[:, k].norm(dim=0)) & (count >= 4) & ((count & (count - 1)) == 0)
        return is_near | (count % _PERIOD == 0)

    def _verify(self, k: Tensor) -> None:
        """End the columns whose true residuals are no longer those of the recurrence, back where they were best.

        The directions w amplify rounding by the condition, and with that the recurrence can promise what is not there.
        """
        if len(k) == 0:
            return
        R = self._start[:, k] - self._product(self.D[:, k])
        size = R.norm(dim=0)
        self.stalled[k[~((R - self.R[:, k]).norm(dim=0) <= 0.1 * size)]] = True
        is_better = size < self._verified_size[k]
        best, lost = k[is_better], k[~is_better]
        self._verified[:, best], self._verified_size[best] = self.D[:, best], size[is_better]
        self.D[:, lost] = self._verified[:, lost]
        self.stalled[lost] = True

    def _lanczos(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next column of the tridiagonal matrix, and the vector that it belongs to."""
        u, v, beta = self._u[:, k], self._v[:, k], self._beta[k]
        Av = self._product(v)
        size = Av.norm(dim=0) / v.norm(dim=0)
        self.largest[k] = torch.maximum(self.largest[k], size.nan_to_num(0.0, 0.0))
        U = Av - beta * self._old_u[:, k]
        alpha = (U * v).sum(0)
        U = U - alpha * u
        self._old_u[:, k] = u
        self._u[:, k], self._v[:, k], self._beta[k] = self._normalised(U, k)
        return alpha, beta, self._beta[k], v
