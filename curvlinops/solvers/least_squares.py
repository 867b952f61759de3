"""The least-squares inverse of any operator, rectangular ones too."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import checked_number
from curvlinops.solvers.columns import prepared, working_dtype
from curvlinops.solvers.info import LeastSquaresInfo, warn_of_convergence
from curvlinops.solvers.inverse_node import InverseNode
from curvlinops.solvers.krylov.least_squares import LeastSquaresOptions, LeastSquaresSolve
from curvlinops.solvers.options import Start, checked_max_iter
from curvlinops.solvers.watch import Limits, Progress, Watch


class LSMRInverseLinearOperator(InverseNode):
    r"""The least-squares inverse of any operator: :math:`b \mapsto \arg\min_x \|A x - b\|^2 + \mu^2 \|x\|^2`.

    For Jacobians, and for what is not symmetric. Without damping it gives the shortest of the solutions, as the
    pseudo-inverse does, unless a first iterate is given. The adjoint is that of A's adjoint. All columns are solved
    together, each stops on its own.

    **Cost**: a product with A and one with its adjoint an iteration, two of each to begin and to verify; four vectors a
    column in the domain of A and four in its codomain.

    **Reference**: Fong, Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems,
    doi:10.1137/10079687X.

    Args:
        A: The operator.
        damp: The number μ. As in SciPy its square is what ``damped`` would add to AᵀA.
        atol: A column stops where ‖Aᵀr‖ ≤ atol ‖A‖ ‖r‖ for its residual r, with an estimate of ‖A‖ from below.
        btol: A column stops where ‖r‖ ≤ btol ‖b‖ + atol ‖A‖ ‖x‖.
        conlim: Condition of A beyond which a column is given up; 0 for none.
        maxiter: Iterations at most; by default ten times the smaller dimension, but at most 1000.
        show: Other spelling of ``progressbar``.
        x0: First iterate, in any format.
        warm_start: Whether to begin from the last solution, where it has as many columns.
        max_matvecs: Products with A and its adjoint at most, each column counted.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each iteration; its residuals are those of the normal equations.

    Attributes:
        info: A :class:`LeastSquaresInfo` of the last solve. After Ctrl-C it holds the best iterate.

    Raises:
        TypeError: If A is no operator.
        ValueError: If an option is out of range.

    >>> import torch
    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[1.0], [1.0]]))
    >>> [round(x, 4) for x in (LSMRInverseLinearOperator(A) @ torch.tensor([1.0, 3.0])).tolist()]
    [2.0]
    """

    def __init__(
        self,
        A: LinearOperator,
        damp: float = 0.0,
        atol: float = 1e-6,
        btol: float = 1e-6,
        conlim: float = 1e8,
        maxiter: int | None = None,
        show: bool = False,
        x0: Any = None,
        *,
        warm_start: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        progressbar: bool = False,
        callback: Callable[[Progress], Any] | None = None,
    ) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(f"Expected a linear operator, got {type(A).__name__}.")
        for name, value in (("damp", damp), ("atol", atol), ("btol", btol), ("conlim", conlim)):
            checked_number(value, 0, inf, name)
        most = checked_max_iter(A.shape, maxiter, "maxiter")
        limits = Limits(max_matvecs, max_seconds, progressbar or show, callback)
        super().__init__(A, None, Start(x0, warm_start), limits)
        self.SELF_ADJOINT = A.SELF_ADJOINT
        self._options = LeastSquaresOptions(damp, atol, btol, conlim, most)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        first = self._start.first(self.codomain, X[0].shape[-1])
        solution = self._start.remember(self._least_squares(prepared(self._A), X, first))
        return self.codomain.split(solution.T.to(self.dtype))

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        # The last solution and the first iterate live in the other space.
        return self.domain.split(self._least_squares(prepared(self._A).H, X, None).T.to(self.dtype))

    def _least_squares(self, A: LinearOperator, X: list[Tensor], first: Tensor | None) -> Tensor:
        B = Space.merge(X).to(working_dtype(self.dtype)).T.contiguous()
        with Watch(self._limits, A, "LSMR", self._options.max_iter) as watch:
            solution = self._solved(LeastSquaresSolve(A, B, first, self._options, watch))
        self._warn(self.info)
        return solution

    def _warn(self, info: LeastSquaresInfo) -> None:
        failed = (~info.converged).nonzero().flatten()
        if len(failed):
            ended = f", ended by {info.ended_by}" if info.ended_by else ""
            warn_of_convergence(
                f"LSMR did not reach atol={self._options.atol:.2g} or btol={self._options.btol:.2g} in {len(failed)} "
                f"of {len(info.converged)} columns: the largest ‖Aᵀr‖ / (‖A‖ ‖r‖) is "
                f"{info.normal_residual[failed].max():.2g} after {int(info.num_iterations.max())} iterations, with a "
                f"condition of {info.condition[failed].max():.1g} or more{ended}. Pass damp, or raise maxiter."
            )
