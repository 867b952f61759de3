"""Least squares by runs of LSMR: damping, true residuals, restarts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.columns import flat_product
from curvlinops.solvers.info import LeastSquaresInfo, relative
from curvlinops.solvers.krylov.lsmr import LeastSquaresRun
from curvlinops.solvers.krylov.open_columns import on_rows
from curvlinops.solvers.krylov.solve import power_of_two
from curvlinops.solvers.watch import Watch


@dataclass(frozen=True)
class LeastSquaresOptions:
    """When a least-squares solve ends; see :class:`LSMRInverseLinearOperator`."""

    damp: float
    atol: float
    btol: float
    conlim: float
    max_iter: int


class LeastSquaresSolve:
    """Runs of LSMR on the operator with damping written below it, [A; μ I], until true residuals say it is enough.

    The operator is divided by a power of two near its size, so that squares neither vanish nor overflow.

    Args:
        A: The operator.
        B: Right-hand sides as rows ``[K, rows]``.
        X: First iterate ``[K, columns]``, or ``None`` for zero.
        options: When to end.
        watch: Counts products and says when to end.
    """

    def __init__(
        self, A: LinearOperator, B: Tensor, X: Tensor | None, options: LeastSquaresOptions, watch: Watch
    ) -> None:
        self._options, self._watch = options, watch
        self._A = on_rows(watch.counted(flat_product(A, A.dtype)))
        self._A_adjoint = on_rows(watch.counted(flat_product(A.H, A.dtype)))
        self._unit, self._size = power_of_two(B), 1.0
        self._num_rows = B.shape[1]
        rows = A.shape[1] if options.damp else 0
        self._B = torch.cat([B / self._unit, B.new_zeros(len(B), rows)], 1)
        self._scale = self._B.norm(dim=1)
        self._X = B.new_zeros(len(B), A.shape[1]) if X is None else X / self._unit
        self._X[self._scale == 0] = 0
        self._R, self._G = self._B.clone(), torch.full_like(self._X, torch.nan)
        self._largest, self._condition = torch.zeros_like(self._scale), torch.ones_like(self._scale)
        self._iterations = torch.zeros_like(self._scale, dtype=torch.long)
        self._converged = self._scale == 0
        self._history = [torch.ones_like(self._scale)]
        self._running: tuple[Tensor, LeastSquaresRun] | None = None

    def run(self) -> Tensor:
        """Iterate; the solutions ``[K, columns]``."""
        open_columns = self._begin() & ~self._converged & self._scale.isfinite()
        self._first = self._G.norm(dim=1)
        while bool(open_columns.any()):
            chosen = open_columns.nonzero().squeeze(1)
            if not self._watch.allows(4 * len(chosen)):
                break
            run = LeastSquaresRun(self._product, self._adjoint_product, self._R[chosen], self._G[chosen])
            self._running = chosen, run
            self._advance(chosen, run)
            open_columns = torch.zeros_like(open_columns)
            open_columns[chosen] = self._take(chosen, run)
        return self._solution(self._X)

    def _solution(self, X: Tensor) -> Tensor:
        return X / self._size * self._unit

    def _begin(self) -> Tensor:
        """Residual and gradient of the first iterate, and the size of the operator; which columns can go on."""
        if not self._watch.allows((2 if bool(self._X.any()) else 1) * len(self._X)):
            self._X = torch.zeros_like(self._X)
            return torch.zeros_like(self._converged)
        if bool(self._X.any()):
            self._R = self._B - self._product(self._X)
        G = self._A_adjoint(self._R[:, : self._num_rows])
        # The entries of Aᵀr are at most ‖A‖ ‖r‖.
        found = (G.abs().amax(1) / self._R.norm(dim=1)).nan_to_num(0.0, 0.0, 0.0)
        size = max(float(found.max()) if len(G) else 0.0, self._options.damp)
        self._size = float(power_of_two(torch.tensor([[size]], dtype=torch.float64)))
        self._X = self._X * self._size
        self._G = self._damped(G / self._size, self._R)
        self._converged |= (self._G == 0).all(1) & self._R.isfinite().all(1)
        self._largest = relative(self._G, self._R.norm(dim=1))
        return self._G.isfinite().all(1)

    def _advance(self, chosen: Tensor, run: LeastSquaresRun) -> None:
        budget = self._options.max_iter - self._iterations[chosen]
        run.retire((budget <= 0) | run.stalled)
        while len(run.numbers) and self._watch.allows(2 * len(run.numbers) + 2 * len(chosen)):
            run.step()
            numbers = chosen[run.numbers]
            self._note(numbers, run.normal / self._first[numbers])
            length = (self._X[numbers] + run.D).norm(dim=1)
            done = self._is_enough(run.R.norm(dim=1), run.normal, run.largest, length, self._scale[numbers])
            limit = self._options.conlim or torch.inf
            run.retire(done | (run.condition > limit) | run.stalled | (run.iterations >= budget[run.numbers]))

    def _note(self, numbers: Tensor, reached: Tensor) -> None:
        latest = self._history[-1].clone()
        latest[numbers] = reached
        self._history.append(latest)
        self._watch.tick(latest)

    def _is_enough(self, residual: Tensor, normal: Tensor, largest: Tensor, length: Tensor, scale: Tensor) -> Tensor:
        atol, btol = self._options.atol, self._options.btol
        is_minimum = (normal <= atol * largest * residual) & normal.isfinite() & (largest > 0)
        bound = btol * scale + atol * largest * length
        return is_minimum | ((residual <= bound) & bound.isfinite())

    def _take(self, chosen: Tensor, run: LeastSquaresRun) -> Tensor:
        """Correct the columns by a run, verify them, and say which of them may go on."""
        found = run.outcome()
        X = self._X[chosen] + found["D"]
        R = self._B[chosen] - self._product(X)
        G = self._adjoint_product(R)
        normal, residual = G.norm(dim=1), R.norm(dim=1)
        before: Tensor = self._G[chosen].norm(dim=1)
        # The residual never rises but by rounding; what a singular matrix blew up is thrown away.
        better: Tensor = residual <= (1 + 1e-3) * self._R[chosen].norm(dim=1)
        helped: Tensor = (normal < 0.5 * before) & (found["iterations"] > 0)
        kept = chosen[better]
        self._running = None  # an interrupt must not add the corrections twice
        self._X[kept], self._R[kept], self._G[kept] = X[better], R[better], G[better]
        self._iterations[chosen] += found["iterations"]
        self._largest[chosen] = torch.maximum(self._largest[chosen], found["largest"])
        self._condition[chosen] = torch.maximum(self._condition[chosen], found["condition"])
        lengths = self._X[chosen].norm(dim=1)
        enough = self._is_enough(residual, normal, self._largest[chosen], lengths, self._scale[chosen])
        self._converged[chosen] = better & (enough | (normal == 0))
        is_open: Tensor = ~self._converged[chosen] & (self._iterations[chosen] < self._options.max_iter)
        return is_open & better & helped

    def _product(self, X: Tensor) -> Tensor:
        AX: Tensor = self._A(X) / self._size
        return torch.cat([AX, self._options.damp / self._size * X], 1) if self._options.damp else AX

    def _adjoint_product(self, Y: Tensor) -> Tensor:
        return self._damped(self._A_adjoint(Y[:, : self._num_rows]) / self._size, Y)

    def _damped(self, G: Tensor, Y: Tensor) -> Tensor:
        """Aᵀy with what the damping adds to it."""
        return G + self._options.damp / self._size * Y[:, self._num_rows :] if self._options.damp else G

    @property
    def info(self) -> LeastSquaresInfo:
        """What was done."""
        return self._info(self._R, self._G.norm(dim=1), self._iterations, self._largest)

    def interrupted(self) -> LeastSquaresInfo:
        """What there is in the middle: with the corrections of the run under way."""
        X, R, normal = self._X.clone(), self._R.clone(), self._G.norm(dim=1)
        iterations, largest = self._iterations.clone(), self._largest.clone()
        if self._running is not None:
            chosen, run = self._running
            found = run.outcome()
            X[chosen] += found["D"]
            R[chosen], normal[chosen] = found["R"], found["normal"]
            iterations[chosen] += found["iterations"]
            largest[chosen] = torch.maximum(largest[chosen], found["largest"])
        return self._info(R, normal, iterations, largest, self._solution(X).T)

    def _info(
        self, R: Tensor, normal: Tensor, iterations: Tensor, largest: Tensor, solution: Tensor | None = None
    ) -> LeastSquaresInfo:
        slope = largest * R.norm(dim=1)
        return LeastSquaresInfo(
            num_iterations=iterations,
            residual_norm=relative(R[:, : self._num_rows], self._scale),
            normal_residual=torch.where(self._converged & (normal == 0), 0.0, normal / slope),
            converged=self._converged & (solution is None),
            condition=self._condition,
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by=self._watch.ended_by if solution is None else "interrupt",
            history=torch.stack(self._history),
            solution=solution,
        )
