"""Conjugate gradients for many shifts of one matrix, from the products of one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product
from curvlinops.solvers.krylov.cg import ConjugateGradients
from curvlinops.solvers.watch import Watch


class MultiShift:
    r"""(A + λ_s I) X_s = B for all shifts λ_s, from the Krylov space that all of them share.

    Conjugate gradients run for the smallest shift λ_0. The residuals of the others point into the same directions,
    :math:`r^s_j = \zeta^s_j r_j`, where for :math:`\tau_{j+1} = \zeta_{j+1} / \zeta_j`

    .. math::
        1 / \tau_{j+1} = 1 + (\lambda_s - \lambda_0) \alpha_j
        + \frac{\alpha_j \beta_{j-1}}{\alpha_{j-1}} (1 - \tau_j), \qquad
        \alpha^s_j = \alpha_j \tau_{j+1}, \quad \beta^s_j = \beta_j \tau_{j+1}^2 .

    The larger the shift, the smaller ζ, so the shifts that are done are the last ones.

    **Cost**: one product an iteration; two vectors for each shift and column.

    **Reference**: Jegerlehner (1996), Krylov space solvers for shifted linear systems, arXiv:hep-lat/9612014.

    Args:
        product: X -> (A + λ_0 I) X.
        B: Right-hand sides ``[D, K]``.
        shifts: λ_s - λ_0, ascending, the first of them zero ``[S]``.
    """

    def __init__(self, product: Product, B: Tensor, shifts: Tensor) -> None:
        self._run = ConjugateGradients(product, None, B)
        self._shifts = shifts.to(B.dtype).unsqueeze(1)  # [S, 1]
        many = (len(shifts), B.shape[1])
        self.X = B.new_zeros(many[0], *B.shape)
        self._P = B.expand_as(self.X).clone()
        self._zeta, self._tau = B.new_ones(many), B.new_ones(many)
        self.iterations = torch.zeros(many, dtype=torch.long, device=B.device)

    def advance(self, rtol: float, max_iter: int, watch: Watch) -> None:
        """Iterate until the recurrences say that every system is solved, or the watch says that it is time."""
        scale = self._run.R.norm(dim=0)
        target = max(rtol, torch.finfo(scale.dtype).eps / 16) * scale
        verifying = self.iterations.numel()
        is_open = (self._residuals() > target) & (scale > 0)
        while bool(is_open.any()) and watch.num_iterations < max_iter:
            k = is_open[0].nonzero().squeeze(1)
            if not watch.allows(len(k) + verifying):
                return
            self._step(k, is_open)
            watch.tick(self._run.R.norm(dim=0) / torch.where(scale > 0, scale, 1.0))
            is_open = is_open & (self._residuals() > target) & ~self._run.breakdown & ~self._run.stalled

    @property
    def largest(self) -> Tensor:
        """A lower bound of the norm of the matrix with the smallest shift ``[K]``."""
        return self._run.largest

    def _residuals(self) -> Tensor:
        """Norms of the residuals by the recurrences ``[S, K]``."""
        norms: Tensor = self._run.R.norm(dim=0)
        return self._zeta * norms

    def _step(self, k: Tensor, is_open: Tensor) -> None:
        run = self._run
        before, old_alpha, old_beta = run.iterations.clone(), run.alpha.clone(), run.beta.clone()
        run.step(k)
        moved = is_open & (run.iterations > before)
        pull = torch.where(old_alpha > 0, run.alpha * old_beta / old_alpha, 0.0) * (1.0 - self._tau)
        tau = 1.0 / (1.0 + self._shifts * run.alpha + pull)
        tau = torch.where(moved, tau, self._tau)
        num_open = int(moved.any(1).sum())
        alpha = torch.where(moved, run.alpha * tau, 0.0)
        zeta = torch.where(moved, self._zeta * tau, self._zeta)
        for s in range(num_open):
            self.X[s].addcmul_(self._P[s], alpha[s])
            self._P[s].mul_(run.beta * tau[s].square()).addcmul_(run.R, zeta[s])
        self._tau, self._zeta = tau, zeta
        self.iterations += moved
