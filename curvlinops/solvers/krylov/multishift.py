"""Conjugate gradients for many shifts of one matrix, from the products of one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.krylov.cg import ConjugateGradients
from curvlinops.solvers.krylov.open_columns import RowProduct
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
        product: The product with A + λ_0 I.
        B: Right-hand sides as rows ``[K, D]``.
        shifts: λ_s - λ_0, ascending, the first of them zero ``[S]``.

    Attributes:
        X: The solutions so far ``[S, K, D]``.
        iterations: Iterations of each ``[S, K]``.
    """

    def __init__(self, product: RowProduct, B: Tensor, shifts: Tensor) -> None:
        self._run = ConjugateGradients(product, None, B)
        self._shifts = shifts.to(B.dtype).unsqueeze(1)
        many = (len(shifts), len(B))
        self.X = B.new_zeros(*many, B.shape[1])
        self.iterations = torch.zeros(many, dtype=torch.long, device=B.device)
        # The state of the open columns, which are the second axis here.
        self._P = B.expand_as(self.X).clone()
        self._zeta, self._tau = B.new_ones(many), B.new_ones(many)

    def advance(self, rtol: float, max_iter: int, watch: Watch) -> None:
        """Iterate until the recurrences say that every system is solved, or the watch says that it is time."""
        run = self._run
        scale = run.R.norm(dim=1)
        target = max(rtol, torch.finfo(scale.dtype).eps / 16) * scale
        verifying, residual = self.iterations.numel(), torch.zeros_like(scale)
        is_open = (scale > 0) & scale.isfinite() & torch.ones_like(self._zeta, dtype=torch.bool)
        self._retire(is_open)
        is_open = is_open[:, run.numbers]
        while len(run.numbers) and watch.num_iterations < max_iter:
            if not watch.allows(len(run.numbers) + verifying):
                return
            self._step(is_open)
            norms = run.R.norm(dim=1)
            residual[run.numbers] = norms / scale[run.numbers]
            watch.tick(residual)
            is_open &= (self._zeta * norms > target[run.numbers]) & ~run.breakdown & ~run.stalled
            is_open = is_open[:, self._retire(is_open)]

    @property
    def largest(self) -> Tensor:
        """A lower bound of the norm of the matrix with the smallest shift ``[K]``."""
        return self._run.outcome()["largest"]

    def _retire(self, is_open: Tensor) -> Tensor:
        """Take out the columns for which every shift is done; which of the open ones remain."""
        remaining = is_open.any(0)
        if not bool(remaining.all()):
            self._P, self._zeta, self._tau = (t[:, remaining] for t in (self._P, self._zeta, self._tau))
            self._run.retire(~remaining)
        return remaining

    def _step(self, is_open: Tensor) -> None:
        run = self._run
        before, old_alpha, old_beta = run.iterations.clone(), run.alpha, run.beta
        run.step()
        moved = is_open & (run.iterations > before)
        pull = torch.where(old_alpha > 0, run.alpha * old_beta / old_alpha, 0.0) * (1.0 - self._tau)
        self._tau = torch.where(moved, 1.0 / (1.0 + self._shifts * run.alpha + pull), self._tau)
        alpha = torch.where(moved, run.alpha * self._tau, 0.0)
        self._zeta = torch.where(moved, self._zeta * self._tau, self._zeta)
        beta = run.beta * self._tau.square()
        is_whole = len(run.numbers) == self.X.shape[1]
        for s in range(int(moved.any(1).sum())):
            if is_whole:
                self.X[s].addcmul_(self._P[s], alpha[s].unsqueeze(1))
            else:
                self.X[s, run.numbers] += alpha[s].unsqueeze(1) * self._P[s]
            self._P[s].mul_(beta[s].unsqueeze(1)).addcmul_(run.R, self._zeta[s].unsqueeze(1))
        self.iterations[:, run.numbers] += moved
