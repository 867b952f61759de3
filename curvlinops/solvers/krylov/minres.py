"""Minimal residuals for symmetric matrices, indefinite and singular ones too."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.krylov.open_columns import RowProduct, dots
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
    MOST_PRODUCTS = 2  # now and then one that verifies

    def __init__(self, product: RowProduct, precondition: RowProduct | None, R: Tensor) -> None:
        super().__init__(product, precondition, R)
        zeros, ones = torch.zeros_like(self.largest), torch.ones_like(self.largest)
        self._u, self._v, self._remainder = self._normalised(self.R)
        self._old_u, self._w, self._old_w = torch.zeros_like(R), torch.zeros_like(R), torch.zeros_like(R)
        self._beta = zeros
        self._cosine, self._sine, self._old_cosine, self._old_sine = ones, zeros, ones, zeros
        self.stalled |= self._remainder == 0
        self._length = zeros
        # The right-hand side, and the correction with the smallest residual of those that were looked at.
        self._B, self._best, self._best_size = R.clone(), torch.zeros_like(R), R.norm(dim=1)

    def _normalised(self, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U and P U with unit inner product, and what they were divided by."""
        Z = self._preconditioned(U)
        square = dots(U, Z)
        rounding = torch.finfo(U.dtype).eps * U.norm(dim=1) * Z.norm(dim=1)
        # Negative: the preconditioner is not positive definite. NaN ends a column as well.
        self.breakdown |= ~((square >= -rounding) & square.isfinite())
        length = square.clamp(min=0).sqrt()
        divisor = torch.where(length > 0, length, 1.0).unsqueeze(1)
        u = U / divisor
        return u, u if Z is U else Z / divisor, length

    def step(self) -> None:
        """One iteration of the open columns."""
        v, beta = self._v, self._beta
        alpha = self._lanczos()
        epsilon, rest = self._old_sine * beta, self._old_cosine * beta
        delta = self._cosine * rest + self._sine * alpha
        gamma_bar = self._cosine * alpha - self._sine * rest
        gamma = torch.hypot(gamma_bar, self._beta)
        # ‖A r‖ / ‖r‖ of the residual so far: zero where the rest cannot be reached by a singular matrix.
        slope = torch.hypot(gamma_bar, self._cosine * self._beta)
        tiny = 10 * torch.finfo(v.dtype).eps * self.largest
        good = (torch.minimum(slope, gamma) > tiny) & ~self.breakdown
        self.stalled |= ~good | (self._beta <= tiny)
        gamma = torch.where(good, gamma, 1.0)
        self._old_cosine, self._cosine = self._cosine, torch.where(good, gamma_bar / gamma, 1.0)
        self._old_sine, self._sine = self._sine, torch.where(good, self._beta / gamma, 0.0)
        self._old_w.mul_(-epsilon.unsqueeze(1)).add_(v).addcmul_(self._w, delta.unsqueeze(1), value=-1)
        self._old_w, self._w = self._w, self._old_w.div_(gamma.unsqueeze(1))
        self._correct(good)
        self._verify(good & ~self.stalled & self._is_due())

    def _correct(self, good: Tensor) -> None:
        before = self._remainder
        after = torch.where(good, -self._sine * before, before)
        length = torch.where(good, self._cosine * before, 0.0)
        w = self._w if bool(good.all()) else torch.where(good.unsqueeze(1), self._w, 0.0)
        D = torch.addcmul(self.D, w, length.unsqueeze(1))
        good = self._accepted(good, D, before.abs() - after.abs())
        if bool(good.all()):
            self.D = D
        else:
            self.D = torch.where(good.unsqueeze(1), D, self.D)
        kept = torch.where(good, self._sine.square(), 1.0)
        new = torch.where(good, after * self._cosine, 0.0)
        self.R.mul_(kept.unsqueeze(1)).addcmul_(self._u, new.unsqueeze(1))
        self._remainder = after
        self.iterations += good

    def _accepted(self, good: Tensor, D: Tensor, gain: Tensor) -> Tensor:
        """Refuse a step that blows the correction up for less than the rounding that this brings.

        So it is where a singular matrix has nothing left to reach, but for what rounding pretends.
        """
        length: Tensor = D.norm(dim=1)
        is_blown_up = (length > 2 * self._length) & (self._length > 0)
        refused = good & is_blown_up & (self._rounding(length) > gain)
        self.stalled |= refused
        self._length = torch.where(refused, self._length, length)
        return good & ~refused

    def _rounding(self, length: Tensor) -> Tensor:
        """Rounding of the product with a vector of this length."""
        return torch.finfo(self.D.dtype).eps * self.largest * length

    def _is_due(self) -> Tensor:
        """Whether to look at the true residuals: now and then, and more often where rounding is not far."""
        count = self.iterations
        is_near: Tensor = 1e4 * self._rounding(self._length) > self.R.norm(dim=1)
        is_power = (count >= 4) & ((count & (count - 1)) == 0)
        return (is_near & is_power) | (count % _PERIOD == 0)

    def _verify(self, k: Tensor) -> None:
        """End the columns whose true residuals are no longer those of the recurrence, back where they were best.

        The directions w amplify rounding by the condition, and with that the recurrence can promise what is not there.
        """
        if not bool(k.any()):
            return
        numbers = k.nonzero().squeeze(1)
        R = self._B[k] - self._product(self.D[k])
        size = R.norm(dim=1)
        self.stalled[numbers[~((R - self.R[k]).norm(dim=1) <= 0.1 * size)]] = True
        is_better = size < self._best_size[k]
        best, lost = numbers[is_better], numbers[~is_better]
        self._best[best], self._best_size[best] = self.D[best], size[is_better]
        self.D[lost] = self._best[lost]
        self.stalled[lost] = True

    def _lanczos(self) -> Tensor:
        """Take the next Lanczos vectors and their β; the α of the last ones."""
        Av = self._product(self._v)
        size = Av.norm(dim=1) / self._v.norm(dim=1)
        self.largest = torch.maximum(self.largest, size.nan_to_num(0.0, 0.0))
        U = torch.addcmul(Av, self._old_u, self._beta.unsqueeze(1), value=-1)
        alpha = dots(U, self._v)
        U.addcmul_(self._u, alpha.unsqueeze(1), value=-1)
        self._old_u = self._u
        self._u, self._v, self._beta = self._normalised(U)
        return alpha
