"""Inverses as operators: a symmetric matrix paired with an algorithm, which keeps what it did in `info`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.info import SolveInfo, warn_of_convergence
from curvlinops.solvers.inverse_node import InverseNode
from curvlinops.solvers.krylov.cg import ConjugateGradients
from curvlinops.solvers.krylov.minres import MinimalResiduals
from curvlinops.solvers.krylov.open_columns import on_rows
from curvlinops.solvers.krylov.solve import Run, Solve
from curvlinops.solvers.options import (
    Preconditioner,
    Start,
    check_preconditioner,
    checked_max_iter,
    checked_rtol,
)
from curvlinops.solvers.watch import Limits, Progress, Watch


class IterativeInverse(InverseNode):
    """The inverse of a self-adjoint operator by runs of a Krylov method."""

    SELF_ADJOINT = True
    #: How messages call the method, and its recurrences.
    _METHOD: ClassVar[str]
    _RUN: ClassVar[type[Run]]

    def __init__(
        self,
        A: LinearOperator,
        rtol: float | None,
        max_iter: int | None,
        preconditioner: Preconditioner | None,
        start: Start,
        limits: Limits,
    ) -> None:
        check_self_adjoint(A, self._METHOD)
        self._rtol, self._max_iter = checked_rtol(A.dtype, rtol), checked_max_iter(A.shape, max_iter)
        check_preconditioner(preconditioner, A.shape)
        super().__init__(A, preconditioner, start, limits)
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        B = Space.merge(X).to(working_dtype(self.dtype)).T.contiguous()
        A, P = prepared(self._A), self._preconditioner
        precondition = self._row_preconditioner(prepared(P) if isinstance(P, LinearOperator) else P)
        first = self._start.first(self.codomain, len(B))
        eps = torch.finfo(self.dtype).eps
        with Watch(self._limits, A, self._METHOD, self._max_iter) as watch:
            product = on_rows(watch.counted(flat_product(A, self.dtype)))
            begin = partial(self._RUN, product, precondition)
            solution = self._solved(Solve(begin, product, B, first, self._rtol, self._max_iter, eps, watch))
        self._start.remember(solution)
        self._report(self.info)
        return self.codomain.split(solution.T.to(self.dtype))

    def _report(self, info: SolveInfo) -> None:
        """Raise on a breakdown, warn of what did not converge."""
        raise NotImplementedError

    def _warn(self, info: SolveInfo, what_happened: str, advice: str) -> None:
        failed = (~info.converged).nonzero().flatten()
        if not len(failed):
            return
        worst = info.residual_norm[failed].max()
        if not bool(worst.isfinite()):
            what_happened, advice = (
                ", with numbers that are not finite",
                "Look at the right-hand side and the operator.",
            )
        too_near = ", too near to it for the rounding of a residual," if worst <= self._rtol else ""
        if info.ended_by:
            advice = f"It was ended by {info.ended_by}: raise that, or use a preconditioner."
        floor = info.attainable[failed]
        if bool((info.residual_norm[failed] <= 30 * floor).any()):
            advice = f"The precision of {self.dtype} allows about {float(floor.max()):.1g} here: use float64. {advice}"
        warn_of_convergence(
            f"{self._METHOD} did not reach the relative residual {self._rtol:.2g} in {len(failed)} of "
            f"{len(info.converged)} columns: the largest is {worst:.2g}{too_near} after "
            f"{int(info.num_iterations.max())} iterations{what_happened}. {advice}"
        )

    @property
    def _is_definite(self) -> bool:
        return self._A._is_definite


class CGInverseLinearOperator(IterativeInverse):
    r"""The inverse :math:`A^{-1}` of a symmetric positive definite operator, by conjugate gradients.

    All columns are solved together, each stops on its own. Residuals are recomputed from :math:`b - A x`; a column
    that stops early says so by a warning and in :attr:`info`.

    **Cost**: one product with A an iteration, over the columns that are still open, and one that verifies; four vectors
    a column.

    **Reference**: Hestenes, Stiefel (1952), Methods of conjugate gradients for solving linear systems,
    doi:10.6028/jres.049.044.

    Args:
        A: The operator, self-adjoint. Add damping first: ``A.damped(1e-3)``.
        rtol: Relative residual ‖b - A x‖ / ‖b‖ at which a column stops; by default 1e-5 in float32 and below, 1e-8 in
            float64.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000.
        preconditioner: Operator, or function of ``[D, K]``, close to the inverse of A.
        x0: First iterate, in any format.
        on_breakdown: ``"raise"`` or ``"stop"`` when a direction of negative curvature is met; by default a single
            right-hand side raises, several stop.
        tolerance: Other spelling of ``rtol``.
        eps: Accepted for scripts that pass it; has no effect.
        max_tridiag_iter: Accepted for scripts that pass it; has no effect.
        warm_start: Whether to begin from the last solution, where it has as many columns.
        max_matvecs: Products at most, each column counted, those that verify included.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` (``num_iterations``, ``num_matvecs``, ``residual_norm``) after each
            iteration.

    Attributes:
        info: A :class:`SolveInfo` of the last solve. After Ctrl-C it holds the best iterate, as ``info.solution``.

    Raises:
        ValueError: If A is not self-adjoint, or an option is out of range.
        RuntimeError: If a direction of negative curvature is met, see ``on_breakdown``.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    >>> inverse = CGInverseLinearOperator(A)
    >>> [round(x, 4) for x in (inverse @ torch.ones(2)).tolist()]
    [0.5, 0.25]
    >>> inverse.info.converged.tolist()
    [True]
    """

    _METHOD = "Conjugate gradients"
    _RUN = ConjugateGradients

    def __init__(
        self,
        A: LinearOperator,
        rtol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
        *,
        on_breakdown: str | None = None,
        tolerance: float | None = None,
        eps: float | None = None,
        max_tridiag_iter: int | None = None,
        warm_start: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        progressbar: bool = False,
        callback: Callable[[Progress], Any] | None = None,
    ) -> None:
        limits = Limits(max_matvecs, max_seconds, progressbar, callback)
        rtol = _one_spelling(rtol, tolerance)
        super().__init__(A, rtol, max_iter, preconditioner, Start(x0, warm_start), limits)
        self._on_breakdown = _checked_on_breakdown(on_breakdown)

    def set_cg_hyperparameters(
        self,
        rtol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
        *,
        on_breakdown: str | None = None,
        tolerance: float | None = None,
        eps: float | None = None,
        max_tridiag_iter: int | None = None,
        warm_start: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        progressbar: bool = False,
        callback: Callable[[Progress], Any] | None = None,
    ) -> None:
        """Set all options anew; what is not given takes its default. See the class for their meaning."""
        info = self.info
        # Nothing is changed where an option is refused.
        on_breakdown = _checked_on_breakdown(on_breakdown)
        limits = Limits(max_matvecs, max_seconds, progressbar, callback)
        rtol = _one_spelling(rtol, tolerance)
        super().__init__(self._A, rtol, max_iter, preconditioner, Start(x0, warm_start), limits)
        self._on_breakdown, self.info = on_breakdown, info

    def _report(self, info: SolveInfo) -> None:
        broken = info.breakdown.nonzero().flatten().tolist()
        action = self._on_breakdown or ("raise" if len(info.breakdown) == 1 else "stop")
        if broken and action == "raise":
            raise RuntimeError(
                f"Conjugate gradients met a direction of negative curvature in column {broken[0]} (relative residual "
                f"{info.residual_norm[broken[0]]:.2g}): the operator or the preconditioner is not positive definite. "
                "Add damping, use MINRESInverseLinearOperator, or pass on_breakdown='stop'."
            )
        self._warn(
            info,
            ", with negative curvature met" if broken else "",
            "Add damping, or use MINRESInverseLinearOperator."
            if broken
            else "Add damping if the operator may be singular; otherwise raise max_iter, or use a preconditioner.",
        )


def _one_spelling(rtol: float | None, tolerance: float | None) -> float | None:
    if rtol is not None and tolerance is not None:
        raise ValueError("rtol and tolerance are two spellings of one option: pass one of them.")
    return tolerance if rtol is None else rtol


def _checked_on_breakdown(on_breakdown: str | None) -> str | None:
    if on_breakdown not in (None, "raise", "stop"):
        raise ValueError(f"on_breakdown: expected 'raise' or 'stop', got {on_breakdown!r}.")
    return on_breakdown


class MINRESInverseLinearOperator(IterativeInverse):
    r"""The inverse :math:`A^{-1}` of a symmetric operator that may be indefinite, by minimal residuals.

    For Hessians, and for positive matrices where the residual rather than the error should fall with each step. A
    singular matrix is solved with as far as the right-hand side lies in its range; what is left is told by the
    residual. All columns are solved together, each stops on its own.

    **Cost**: one product with A an iteration, over the columns that are still open, and one that verifies; eight
    vectors a column.

    **Reference**: Paige, Saunders (1975), Solution of sparse indefinite systems of linear equations,
    doi:10.1137/0712047.

    Args:
        A: The operator, self-adjoint.
        rtol: Relative residual ‖b - A x‖ / ‖b‖ at which a column stops; by default 1e-5 in float32 and below, 1e-8 in
            float64.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000.
        preconditioner: Operator, or function of ``[D, K]``; symmetric positive definite, also where A is not.
        x0: First iterate, in any format.
        warm_start: Whether to begin from the last solution, where it has as many columns.
        max_matvecs: Products at most, each column counted, those that verify included.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each iteration.

    Attributes:
        info: A :class:`SolveInfo` of the last solve. After Ctrl-C it holds the best iterate, as ``info.solution``.

    Raises:
        ValueError: If A is not self-adjoint, or an option is out of range.
        RuntimeError: If the preconditioner is not positive definite, or a product is not finite.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[2.0, 0.0], [0.0, -4.0]]))
    >>> [round(x, 4) for x in (MINRESInverseLinearOperator(A) @ torch.ones(2)).tolist()]
    [0.5, -0.25]
    """

    _METHOD = "MINRES"
    _RUN = MinimalResiduals

    def __init__(
        self,
        A: LinearOperator,
        rtol: float | None = None,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
        *,
        warm_start: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        progressbar: bool = False,
        callback: Callable[[Progress], Any] | None = None,
    ) -> None:
        limits = Limits(max_matvecs, max_seconds, progressbar, callback)
        super().__init__(A, rtol, max_iter, preconditioner, Start(x0, warm_start), limits)

    def _report(self, info: SolveInfo) -> None:
        broken = info.breakdown.nonzero().flatten().tolist()
        if broken:
            raise RuntimeError(
                f"MINRES broke down in column {broken[0]}: the preconditioner is not positive definite, or a product "
                "is not finite."
            )
        self._warn(
            info,
            "",
            "A singular operator leaves what it cannot reach; otherwise raise max_iter, or use a preconditioner.",
        )
