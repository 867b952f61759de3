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
    """Runs of LSMR on the operator with damping written below it, [A; μ I], until true residuals say it is enough."""

    def __init__(
        self, A: LinearOperator, B: Tensor, X: Tensor | None, options: LeastSquaresOptions, watch: Watch
    ) -> None:
        self._options, self._watch = options, watch
        self._A = on_rows(watch.counted(flat_product(A, A.dtype)))
        self._A_adjoint = on_rows(watch.counted(flat_product(A.H, A.dtype)))
        self._unit = power_of_two(B)
        self._num_rows = B.shape[1]
        rows = A.shape[1] if options.damp else 0
        self._B = torch.cat([B / self._unit, B.new_zeros(len(B), rows)], 1)
        self._scale = self._B.norm(dim=1)
        self._X = B.new_zeros(len(B), A.shape[1]) if X is None else X / self._unit
        self._X[self._scale == 0] = 0
        self._R = self._B.clone()
        counts = torch.zeros_like(self._scale)
        self._normal, self._largest, self._condition = counts.clone(), counts.clone(), torch.ones_like(counts)
        self._iterations = counts.long()
        self._converged = self._scale == 0
        self._history: list[Tensor] = []
        self._running: tuple[Tensor, LeastSquaresRun] | None = None

    def run(self) -> Tensor:
        """Iterate; the solutions ``[K, D]``."""
        if bool(self._X.any()):
            self._R = self._B - self._product(self._X)
        open_columns = ~self._converged & self._scale.isfinite()
        while bool(open_columns.any()):
            chosen = open_columns.nonzero().squeeze(1)
            if not self._watch.allows(5 * len(chosen)):
                break
            run = LeastSquaresRun(self._product, self._adjoint_product, self._R[chosen])
            self._running = chosen, run
            self._advance(chosen, run)
            open_columns = torch.zeros_like(open_columns)
            open_columns[chosen] = self._take(chosen, run)
            self._running = None
        return self._X * self._unit

    def _advance(self, chosen: Tensor, run: LeastSquaresRun) -> None:
        budget = self._options.max_iter - self._iterations[chosen]
        first = torch.where(run.normal > 0, run.normal, 1.0)
        run.retire((budget <= 0) | run.stalled)
        while len(run.numbers) and self._watch.allows(2 * len(run.numbers) + 2 * len(chosen)):
            run.step()
            numbers = chosen[run.numbers]
            self._note(numbers, run.normal / first[run.numbers])
            length = (self._X[numbers] + run.D).norm(dim=1)
            done = self._is_enough(run.R.norm(dim=1), run.normal, run.largest, length, self._scale[numbers])
            limit = self._options.conlim or torch.inf
            run.retire(done | (run.condition > limit) | run.stalled | (run.iterations >= budget[run.numbers]))

    def _note(self, numbers: Tensor, reached: Tensor) -> None:
        latest = self._history[-1].clone() if self._history else torch.ones_like(self._scale)
        latest[numbers] = reached
        self._history.append(latest)
        self._watch.tick(latest)

    def _is_enough(self, residual: Tensor, normal: Tensor, largest: Tensor, length: Tensor, scale: Tensor) -> Tensor:
        atol, btol = self._options.atol, self._options.btol
        return (normal <= atol * largest * residual) | (residual <= btol * scale + atol * largest * length)

    def _take(self, chosen: Tensor, run: LeastSquaresRun) -> Tensor:
        """Correct the columns by a run, verify them, and say which of them may go on."""
        found = run.outcome()
        X = self._X[chosen] + found["D"]
        R = self._B[chosen] - self._product(X)
        normal, residual = self._adjoint_product(R).norm(dim=1), R.norm(dim=1)
        # The residual never rises but by rounding; what a singular matrix blew up is thrown away.
        better: Tensor = residual <= (1 + 1e-3) * self._R[chosen].norm(dim=1)
        helped: Tensor = (normal < 0.5 * self._normal[chosen]) | (self._iterations[chosen] == 0)
        kept = chosen[better]
        self._X[kept], self._R[kept], self._normal[kept] = X[better], R[better], normal[better]
        self._iterations[chosen] += found["iterations"]
        self._largest[chosen] = torch.maximum(self._largest[chosen], found["largest"])
        self._condition[chosen] = torch.maximum(self._condition[chosen], found["condition"])
        lengths = self._X[chosen].norm(dim=1)
        enough = self._is_enough(residual, normal, self._largest[chosen], lengths, self._scale[chosen])
        self._converged[chosen] = better & (enough | (normal == 0))
        is_open: Tensor = ~self._converged[chosen] & (self._iterations[chosen] < self._options.max_iter)
        return is_open & better & helped

    def _product(self, X: Tensor) -> Tensor:
        AX: Tensor = self._A(X)
        return torch.cat([AX, self._options.damp * X], 1) if self._options.damp else AX

    def _adjoint_product(self, Y: Tensor) -> Tensor:
        result: Tensor = self._A_adjoint(Y[:, : self._num_rows])
        return result + self._options.damp * Y[:, self._num_rows :] if self._options.damp else result

    @property
    def info(self) -> LeastSquaresInfo:
        """What was done so far; in the middle of a run, with its corrections so far."""
        X, R, normal, iterations = self._X, self._R, self._normal, self._iterations
        if self._running is not None:
            chosen, run = self._running
            found = run.outcome()
            X, R, normal, iterations = X.clone(), R.clone(), normal.clone(), iterations.clone()
            X[chosen] += found["D"]
            R[chosen], normal[chosen] = found["R"], found["normal"]
            iterations[chosen] += found["iterations"]
        slope = self._largest * R.norm(dim=1)
        return LeastSquaresInfo(
            num_iterations=iterations,
            residual_norm=relative(R[:, : self._num_rows], self._scale),
            normal_residual=normal / torch.where(slope > 0, slope, 1.0),
            converged=self._converged & (self._running is None),
            condition=self._condition,
            num_matvecs=self._watch.num_matvecs,
            seconds=self._watch.seconds,
            ended_by=self._watch.ended_by if self._running is None else "interrupt",
            history=torch.stack(self._history) if self._history else torch.ones_like(self._scale).unsqueeze(0),
            solution=None if self._running is None else (X * self._unit).T,
        )
