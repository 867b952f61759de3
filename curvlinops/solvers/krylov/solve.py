"""Solving A X = B by runs of a Krylov method: true residuals, restarts, budgets, and what is told of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from curvlinops.solvers.info import SolveInfo, relative
from curvlinops.solvers.krylov.open_columns import OpenColumns, RowProduct, dots
from curvlinops.solvers.watch import Watch

#: By how much recurrences aim below the tolerance, so that rounding does not put the true residual above it: at most,
#: and in units of the rounding.
_MARGIN, _MARGIN_IN_EPS = 0.05, 1e12
#: Rounding of a recomputed residual, as a share of what is attainable: at most, and at least.
_ROUNDING, _LEAST_ROUNDING = 0.3, 0.1


class Run(OpenColumns, ABC):
    """One run of a method's recurrences for A d = r.

    Args:
        product: The product with A.
        precondition: The product with P ≈ A⁻¹, symmetric positive definite, or ``None``.
        R: Right-hand sides as rows ``[K, D]``, the residuals of the iterates that are to be corrected; written to.

    Attributes:
        D: The corrections so far ``[K, D]``.
        R: The residuals that the recurrences give for them ``[K, D]``.
        iterations: Iterations of each column ``[K]``.
        breakdown: Whether the matrix or the preconditioner turned out not to be what the method needs ``[K]``.
        stalled: Whether only rounding would move the column ``[K]``.
        largest: A lower bound of ‖A‖, from the products made ``[K]``.
    """

    _OUTCOME = ("D", "R", "iterations", "breakdown", "stalled", "largest")
    #: Whether each step makes xᵀAx/2 - bᵀx smaller, though maybe not the residual.
    REDUCES_ENERGY: ClassVar[bool] = False
    #: Products of a column in one step at most.
    MOST_PRODUCTS: ClassVar[int] = 1
    #: What share of its residual a run must leave at most for another one to be worth it.
    RESTARTS_BELOW: ClassVar[float] = 0.5

    def __init__(self, product: RowProduct, precondition: RowProduct | None, R: Tensor) -> None:
        super().__init__(len(R), R.device)
        self._product, self._precondition = product, precondition
        self.R, self.D = R, torch.zeros_like(R)
        self.iterations = torch.zeros_like(self.numbers)
        self.breakdown = torch.zeros_like(self.numbers, dtype=torch.bool)
        self.stalled = torch.zeros_like(self.breakdown)
        self.largest = R.new_zeros(len(R))

    def _preconditioned(self, R: Tensor) -> Tensor:
        return R if self._precondition is None else self._precondition(R)

    @abstractmethod
    def step(self) -> None:
        """One iteration of the open columns."""


class Solve:
    """A X = B for several columns, each of which stops on its own.

    The residual of a recurrence drifts from the true one in finite precision. When a column looks converged, its true
    residual is computed, and the column starts again from there as long as that helps.

    Args:
        start: Makes a run for residuals ``[K, D]``.
        product: The product with A, counted by the watch.
        B: Right-hand sides as rows ``[K, D]``.
        X: First iterate ``[K, D]``, or ``None`` for zero.
        rtol: Relative residual at which a column stops.
        max_iter: Iterations at most, counted per column.
        eps: Relative accuracy of the products.
        watch: Counts products and says when to end.
        largest: A lower bound of ‖A‖ where one is known ``[K]``.

    Attributes:
        info: What was done.
    """

    def __init__(
        self,
        start: Callable[[Tensor], Run],
        product: RowProduct,
        B: Tensor,
        X: Tensor | None,
        rtol: float,
        max_iter: int,
        eps: float,
        watch: Watch,
        largest: Tensor | None = None,
    ) -> None:
        self._start, self._product, self._watch = start, product, watch
        self._rtol, self._max_iter, self._eps = rtol, max_iter, eps
        self._unit = power_of_two(B)
        self._B = B / self._unit
        self._scale = self._B.norm(dim=1)
        self._X = torch.zeros_like(self._B) if X is None else X / self._unit
        self._X[self._scale == 0] = 0
        self._R = self._B.clone()
        # What a first iterate leaves is not known before a product.
        has_begun = (self._X != 0).any(1)
        self._residual = torch.where(has_begun, torch.nan, relative(self._R, self._scale))
        self._iterations = torch.zeros_like(self._scale, dtype=torch.long)
        self._breakdown = torch.zeros_like(self._scale, dtype=torch.bool)
        self._largest = torch.zeros_like(self._scale) if largest is None else largest.clone()
        self._size = torch.zeros_like(self._scale)
        # How far recomputed residuals are from those of the recurrences: they are no more exact than that.
        self._drift = torch.full_like(self._scale, torch.inf)
        self._is_polished = torch.zeros_like(self._breakdown)
        self._history: list[Tensor] = []
        self._running: tuple[Tensor, Run] | None = None

    def run(self) -> Tensor:
        """Iterate; the solutions ``[K, D]``."""
        if bool(self._X.any()):
            self._begin()
        self._history.append(self._residual.clone())
        open_columns = ~self._converged() & self._residual.isfinite() & (self._max_iter > 0)
        is_first_run = True
        while bool(open_columns.any()):
            chosen = open_columns.nonzero().squeeze(1)
            if not self._watch.allows(2 * len(chosen)):
                break
            run = self._start(self._R[chosen])
            self._running = chosen, run
            self._advance(chosen, run)
            open_columns = torch.zeros_like(open_columns)
            open_columns[chosen] = self._take(chosen, run, is_first_run)
            is_first_run = False
        return self._X * self._unit

    def _begin(self) -> None:
        """The residuals of a first iterate, if the budget allows for them; else it is not used."""
        if self._watch.has_room(len(self._X)):
            self._R = self._B - self._product(self._X)
        else:
            self._X = torch.zeros_like(self._X)
        self._residual = relative(self._R, self._scale)

    def _advance(self, chosen: Tensor, run: Run) -> None:
        """Iterate until every column has converged by its recurrence, broken down or used its budget."""
        budget = self._max_iter - self._iterations[chosen]
        # Below rounding the recurrence says nothing: without this, a tolerance of zero would never be checked.
        eps = torch.finfo(run.R.dtype).eps
        # Once a column was too near to the tolerance, it aims well below.
        margin = torch.where(self._is_polished[chosen], 0.5, min(_MARGIN, _MARGIN_IN_EPS * eps))
        target = ((1 - margin) * self._rtol).clamp(min=eps / 16) * self._scale[chosen]
        run.retire((budget <= 0) | run.stalled | run.breakdown)
        while len(run.numbers) and self._watch.allows(run.MOST_PRODUCTS * len(run.numbers) + len(chosen)):
            run.step()
            norms = run.R.norm(dim=1)
            self._note(chosen[run.numbers], norms)
            is_short = (norms > target[run.numbers]) & (run.iterations < budget[run.numbers])
            run.retire(~is_short | run.breakdown | run.stalled)

    def _note(self, numbers: Tensor, norms: Tensor) -> None:
        latest = self._history[-1].clone()
        latest[numbers] = norms / self._scale[numbers]
        self._history.append(latest)
        self._watch.tick(latest)

    def _take(self, chosen: Tensor, run: Run, is_first_run: bool) -> Tensor:
        """Correct the columns by a run where that helps, and say which of them may go on."""
        found = run.outcome()
        X, R, B = self._X[chosen], self._R[chosen], self._B[chosen]
        new_X = X + found["D"]
        new_R = B - self._product(new_X)
        before, now = self._residual[chosen], relative(new_R, self._scale[chosen])
        size = relative(new_X, self._scale[chosen])
        self._largest[chosen] = torch.maximum(self._largest[chosen], found["largest"])
        # What a restart made worse is thrown away, and what a singular matrix blew up. A run of conjugate gradients
        # that was merely short is kept: the error falls with each step even where the residual rises.
        drift = relative(new_R - found["R"], self._scale[chosen]).nan_to_num(torch.inf)
        better = now.isfinite() & (now + self._rounding(now, self._largest[chosen] * size, drift) <= before)
        if run.REDUCES_ENERGY and is_first_run:
            nearer = _energy(new_X, B, new_R) < _energy(X, B, R)
            better |= now.isfinite() & nearer & ~found["stalled"]
        # Also a solution that is thrown away tells how large it is, and with that what precision allows.
        self._size[chosen] = torch.where(better, self._size[chosen], size)
        kept = chosen[better]
        self._running = None  # an interrupt must not add the corrections twice
        self._X[kept], self._R[kept], self._drift[kept] = new_X[better], new_R[better], drift[better]
        self._residual[kept] = now[better]
        self._iterations[chosen] += found["iterations"]
        self._breakdown[chosen] |= found["breakdown"]
        is_near = (now <= 2 * self._rtol) & ~self._is_polished[chosen]
        self._is_polished[chosen] |= is_near
        is_worth_it = (now < run.RESTARTS_BELOW * before) | is_near
        has_time = self._iterations[chosen] < self._max_iter
        return is_worth_it & ~found["breakdown"] & has_time & ~self._converged()[chosen]

    @property
    def _magnitude(self) -> Tensor:
        """‖A‖ ‖x‖ / ‖b‖."""
        return self._largest * torch.maximum(self._size, relative(self._X, self._scale))

    def _rounding(self, residual: Tensor, magnitude: Tensor, drift: Tensor) -> Tensor:
        """By how much a recomputed residual may be wrong; hardly by more than it shows itself."""
        attainable = self._eps * magnitude
        seen = torch.maximum(torch.minimum(residual, drift), _LEAST_ROUNDING * attainable).clamp(min=self._eps / 4)
        return torch.minimum(_ROUNDING * attainable, seen)

    def _converged(self) -> Tensor:
        return self._residual + self._rounding(self._residual, self._magnitude, self._drift) <= self._rtol

    @property
    def info(self) -> SolveInfo:
        """What was done."""
        return self._info(self._residual, self._iterations)

    def interrupted(self) -> SolveInfo:
        """What there is in the middle: the corrections of the run under way where its own residuals are smaller."""
        X, residual, iterations = self._X.clone(), self._residual.clone(), self._iterations.clone()
        if self._running is None:
            return self._info(residual, iterations, (X * self._unit).T)
        chosen, run = self._running
        found = run.outcome()
        now = relative(found["R"], self._scale[chosen])
        better = now.isfinite() & ((now < residual[chosen]) | run.REDUCES_ENERGY) & found["D"].isfinite().all(1)
        X[chosen[better]] += found["D"][better]
        residual[chosen[better]] = now[better]
        iterations[chosen] += found["iterations"]
        return self._info(residual, iterations, (X * self._unit).T)

    def _info(self, residual: Tensor, iterations: Tensor, solution: Tensor | None = None) -> SolveInfo:
        converged = self._converged() & (solution is None)
        return SolveInfo(
            num_iterations=iterations,
            residual_norm=residual,
            converged=converged,
            breakdown=self._breakdown & ~converged,
            attainable=self._eps * self._magnitude,
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by=self._watch.ended_by if solution is None else "interrupt",
            history=torch.stack(self._history) if self._history else residual.unsqueeze(0),
            solution=solution,
        )


def power_of_two(B: Tensor) -> Tensor:
    """A power of two near the largest entry of each row ``[K, 1]``; 1 for rows of zeros and ones that are not finite.

    Divided by it, neither squares of small numbers vanish nor those of large ones overflow, and nothing is rounded.
    """
    size = B.abs().amax(1, keepdim=True)
    return torch.where((size > 0) & size.isfinite(), torch.exp2(size.log2().round()), 1.0)


def _energy(X: Tensor, B: Tensor, R: Tensor) -> Tensor:
    """xᵀAx/2 - bᵀx of each column with A x = b - r, which conjugate gradients make smaller with each step."""
    return -dots(X, B + R) / 2
