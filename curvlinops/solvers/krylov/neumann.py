"""The terms of a Neumann series, which is Richardson's iteration from zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops.solvers.info import SolveInfo, relative
from curvlinops.solvers.krylov.open_columns import OpenColumns, RowProduct
from curvlinops.solvers.krylov.solve import power_of_two
from curvlinops.solvers.watch import Watch

#: Growth of a residual beyond which a series is given up before its last term.
_HOPELESS = 1e6


@dataclass(frozen=True)
class Terms:
    """Which series it is.

    Attributes:
        count: Terms at most.
        scale: The number s.
        rtol: Relative residual at which a column counts as converged.
        stops_early: Whether such a column takes no more terms.
    """

    count: int
    scale: float
    rtol: float
    stops_early: bool


class NeumannSeries(OpenColumns):
    """The partial sums x of the series, and the residuals b - A x, term by term.

    Args:
        product: The product with A, counted by the watch.
        precondition: The product with P, or ``None``.
        B: Right-hand sides as rows ``[K, D]``.
        X: First iterate ``[K, D]``, or ``None`` for zero.
        terms: Which series it is.
        eps: Relative accuracy of the products.
        watch: Counts products and says when to end.
    """

    _OUTCOME = ("X", "R", "norms", "first", "largest", "growth", "iterations")

    def __init__(
        self,
        product: RowProduct,
        precondition: RowProduct | None,
        B: Tensor,
        X: Tensor | None,
        terms: Terms,
        eps: float,
        watch: Watch,
    ) -> None:
        super().__init__(len(B), B.device)
        self._product, self._precondition, self._watch = product, precondition, watch
        self._terms, self._eps = terms, eps
        self._units = (power_of_two(B),)  # of all columns, open or not
        self._B = B / self._units[0]
        self.X = torch.zeros_like(B) if X is None else X / self._units[0]
        self.norms = self._B.norm(dim=1)
        # What a first iterate leaves is not known before a product.
        self.R = torch.where((self.X != 0).any(1, keepdim=True), torch.nan, self._B)
        self.first = self._residual()
        self.largest, self.growth = torch.zeros_like(self.norms), torch.zeros_like(self.norms)
        self.iterations = torch.zeros_like(self.numbers)
        self._history: list[Tensor] = []

    def _residual(self) -> Tensor:
        return relative(self.R, self.norms)

    def run(self) -> Tensor:
        """Add terms until the last one, or until the residuals are small enough; the sums ``[K, D]``."""
        if bool(self.X.any()):
            self._begin()
        self._history.append(self._residual())
        self.retire(self._residual() == 0)
        reserve = 2 if self._terms.stops_early else 1
        for number in range(self._terms.count):
            if not len(self.numbers) or not self._watch.allows(reserve * len(self.numbers)):
                break
            self._add(is_last=number == self._terms.count - 1)
            self.retire(~(self._residual() < _HOPELESS * self.first.clamp(min=1)))
            if self._terms.stops_early:
                self._retire_converged()
        return self._solution(self.outcome()["X"])

    def _begin(self) -> None:
        """The residuals of a first iterate, if the budget allows for them; else it is not used."""
        if self._watch.allows(len(self.X)):
            self.R = self._B - self._product(self.X)
        else:
            self.X, self.R = torch.zeros_like(self.X), self._B.clone()
        self.first = self._residual()

    def _add(self, is_last: bool) -> None:
        before = self.R
        Z = before if self._precondition is None else self._precondition(before)
        X = torch.add(self.X, Z, alpha=self._terms.scale)
        if is_last:  # by one product, too, but without the rounding of the recurrence
            R = self._B - self._product(X)
        else:
            AZ = self._product(Z)
            R = torch.sub(before, AZ, alpha=self._terms.scale)
            size = relative(AZ, Z.norm(dim=1)).nan_to_num(0.0, 0.0)
            self.largest = torch.maximum(self.largest, size)
        self.growth = relative(R, before.norm(dim=1))
        self.X, self.R = X, R  # together, lest an interrupt finds one without the other
        self.iterations += 1
        self._note()

    def _note(self) -> None:
        latest = self._history[-1].clone()
        latest[self.numbers] = self._residual()
        self._history.append(latest)
        self._watch.tick(latest)

    def _retire_converged(self) -> None:
        """Verify the columns that look done, and take out those that are."""
        done = self._residual() <= self._terms.rtol
        if bool(done.any()):
            self.R[done] = self._B[done] - self._product(self.X[done])
            self.retire(self._residual() <= self._terms.rtol)

    def _solution(self, X: Tensor) -> Tensor:
        return X * self._units[0]

    @property
    def growth_of_all(self) -> Tensor:
        """What the last term multiplied the residual by ``[K]``."""
        return self.outcome()["growth"]

    @property
    def info(self) -> SolveInfo:
        """What was done; a column whose residual has grown, and still grows, counts as broken down."""
        return self._info(is_done=True)

    def interrupted(self) -> SolveInfo:
        """What there is in the middle."""
        return self._info(is_done=False)

    def _info(self, is_done: bool) -> SolveInfo:
        found = self.outcome()
        residual = relative(found["R"], found["norms"])
        has_grown = residual > (1 + 1e3 * torch.finfo(residual.dtype).eps) * found["first"]
        return SolveInfo(
            num_iterations=found["iterations"],
            residual_norm=residual,
            converged=(residual <= self._terms.rtol) & is_done,
            breakdown=has_grown & (found["growth"] > 1),
            attainable=self._eps * found["largest"] * relative(found["X"], found["norms"]),
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by=self._watch.ended_by if is_done else "interrupt",
            history=torch.stack(self._history) if self._history else residual.unsqueeze(0),
            solution=None if is_done else self._solution(found["X"]).T,
        )
