"""The terms of a Neumann series, which is Richardson's iteration from zero."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.columns import Product
from curvlinops.solvers.info import SolveInfo, relative
from curvlinops.solvers.watch import Watch

#: Growth of a residual beyond which a series is given up before its last term.
_HOPELESS = 1e6


class NeumannSeries:
    """The partial sums x of the series, and the residuals b - A x, term by term.

    Attributes:
        X: The sums ``[D, K]``.
        growing: Whether the residual is larger than at first, and grows ``[K]``.
        growth: What the last term multiplied the residual by ``[K]``.
    """

    def __init__(
        self,
        product: Product,
        precondition: Product | None,
        B: Tensor,
        X: Tensor | None,
        scale: float,
        rtol: float,
        watch: Watch,
    ) -> None:
        self._product, self._precondition, self._watch = watch.counted(product), precondition, watch
        self._B, self._factor, self._rtol = B, scale, rtol
        self._norms = B.norm(dim=0)
        self.X = torch.zeros_like(B) if X is None else X.clone()
        self._R = B - self._product(self.X) if X is not None else B.clone()
        self._first = self._R.norm(dim=0)
        self.growth = torch.zeros_like(self._first)
        self._largest = torch.zeros_like(self._first)
        self._iterations = torch.zeros(B.shape[1], dtype=torch.long, device=B.device)
        self._history = [relative(self._R, self._norms)]

    def run(self, num_terms: int, stops_early: bool) -> None:
        """Add terms until the last one, or until the residuals are small enough."""
        is_open = self._first > 0
        for number in range(num_terms):
            k = is_open.nonzero().squeeze(1)
            if not len(k) or not self._watch.allows(len(k)):
                return
            self._add(k, is_last=number == num_terms - 1)
            residual = self._history[-1]
            done = (residual <= self._rtol) & stops_early
            is_open = is_open & ~done & residual.isfinite() & (residual < _HOPELESS)

    def _add(self, k: Tensor, is_last: bool) -> None:
        before = self._R[:, k]
        Z = before if self._precondition is None else self._precondition(before)
        self.X[:, k] += self._factor * Z
        if is_last:  # by one product, too, but without the rounding of the recurrence
            R = self._B[:, k] - self._product(self.X[:, k])
        else:
            AZ = self._product(Z)
            R = before - self._factor * AZ
            size = relative(AZ, Z.norm(dim=0)).nan_to_num(0.0, 0.0)
            self._largest[k] = torch.maximum(self._largest[k], size)
        self._R[:, k] = R
        self.growth[k] = relative(R, before.norm(dim=0))
        self._iterations[k] += 1
        self._history.append(relative(self._R, self._norms))
        self._watch.tick(self._history[-1])

    @property
    def growing(self) -> Tensor:
        """Whether the residual is larger than at first, and grows ``[K]``."""
        rounding = 1 + 1e3 * torch.finfo(self._B.dtype).eps
        is_larger: Tensor = self._R.norm(dim=0) > rounding * self._first
        return is_larger & (self.growth > 1)

    def info(self, eps: float, interrupted: bool = False) -> SolveInfo:
        """What was done.

        Args:
            eps: Relative accuracy of the products.
            interrupted: Whether it was not done to the end.
        """
        residual = self._history[-1]
        return SolveInfo(
            num_iterations=self._iterations,
            residual_norm=residual,
            converged=(residual <= self._rtol) & (not interrupted),
            breakdown=self.growing,
            attainable=eps * self._largest * relative(self.X, self._norms),
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by="interrupt" if interrupted else self._watch.ended_by,
            history=torch.stack(self._history),
            solution=self.X if interrupted else None,
        )
