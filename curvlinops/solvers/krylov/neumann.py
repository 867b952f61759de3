"""The terms of a Neumann series, which is Richardson's iteration from zero."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.solvers.info import SolveInfo, relative
from curvlinops.solvers.krylov.open_columns import OpenColumns, RowProduct
from curvlinops.solvers.watch import Watch

#: Growth of a residual beyond which a series is given up before its last term.
_HOPELESS = 1e6


class NeumannSeries(OpenColumns):
    """The partial sums x of the series, and the residuals b - A x, term by term.

    Args:
        product: The product with A.
        precondition: The product with P, or ``None``.
        B: Right-hand sides as rows ``[K, D]``.
        X: First iterate ``[K, D]``, or ``None`` for zero.
        scale: The number s.
        rtol: Relative residual at which a column counts as converged.
        watch: Counts products and says when to end.
    """

    _OUTCOME = ("X", "size", "residual", "largest", "growth", "iterations")

    def __init__(
        self,
        product: RowProduct,
        precondition: RowProduct | None,
        B: Tensor,
        X: Tensor | None,
        scale: float,
        rtol: float,
        watch: Watch,
    ) -> None:
        super().__init__(len(B), B.device)
        self._product, self._precondition, self._watch = product, precondition, watch
        self._scale, self._rtol = scale, rtol
        self._B = B
        self.X = torch.zeros_like(B) if X is None else X.clone()
        self._R, self._norms = B.clone(), B.norm(dim=1)
        # What a first iterate leaves is not known before a product.
        self.residual = torch.where((self.X != 0).any(1), torch.nan, relative(self._R, self._norms))
        self.largest, self.growth = torch.zeros_like(self._norms), torch.zeros_like(self._norms)
        self.size = relative(self.X, self._norms)
        self.iterations = torch.zeros_like(self.numbers)
        self._history = [self.residual.clone()]

    def run(self, num_terms: int, stops_early: bool) -> None:
        """Add terms until the last one, or until the residuals are small enough."""
        if bool(self.X.any()):
            self._begin()
        self.retire(self.residual == 0)
        for number in range(num_terms):
            if not len(self.numbers) or not self._watch.allows(len(self.numbers)):
                return
            self._add(is_last=number == num_terms - 1)
            done = (self.residual <= self._rtol) & stops_early
            self.retire(done | ~(self.residual < _HOPELESS))

    def _begin(self) -> None:
        """The residuals of a first iterate, if the budget allows for them; else it is not used."""
        if self._watch.allows(len(self.X)):
            self._R = self._B - self._product(self.X)
        else:
            self.X = torch.zeros_like(self.X)
        self.residual = relative(self._R, self._norms)
        self._history = [self.residual.clone()]

    def _add(self, is_last: bool) -> None:
        before = self._R
        Z = before if self._precondition is None else self._precondition(before)
        X = torch.add(self.X, Z, alpha=self._scale)
        if is_last:  # by one product, too, but without the rounding of the recurrence
            R = self._B - self._product(X)
        else:
            AZ = self._product(Z)
            R = torch.sub(before, AZ, alpha=self._scale)
            size = relative(AZ, Z.norm(dim=1)).nan_to_num(0.0, 0.0)
            self.largest = torch.maximum(self.largest, size)
        self.X, self._R = X, R  # together, lest an interrupt finds one without the other
        self.growth = relative(self._R, before.norm(dim=1))
        self.residual = relative(self._R, self._norms)
        self.size = relative(self.X, self._norms)
        self.iterations += 1
        latest = self._history[-1].clone()
        latest[self.numbers] = self.residual
        self._history.append(latest)
        self._watch.tick(latest)

    def info(self, eps: float, interrupted: bool = False) -> SolveInfo:
        """What was done; a column whose residual has grown, and still grows, counts as broken down.

        Args:
            eps: Relative accuracy of the products.
            interrupted: Whether it was not done to the end.
        """
        found = self.outcome()
        residual, first = found["residual"], self._history[0]
        has_grown = residual > (1 + 1e3 * torch.finfo(residual.dtype).eps) * first
        return SolveInfo(
            num_iterations=found["iterations"],
            residual_norm=residual,
            converged=(residual <= self._rtol) & (not interrupted),
            breakdown=has_grown & (found["growth"] > 1),
            attainable=eps * found["largest"] * found["size"],
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by="interrupt" if interrupted else self._watch.ended_by,
            history=torch.stack(self._history),
            solution=found["X"].T if interrupted else None,
        )
