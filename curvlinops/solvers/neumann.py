"""The inverse by a truncated Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import checked_count, checked_number
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.info import SolveInfo, warn_of_convergence
from curvlinops.solvers.inverse_node import InverseNode
from curvlinops.solvers.krylov.neumann import NeumannSeries, Terms
from curvlinops.solvers.krylov.open_columns import on_rows
from curvlinops.solvers.options import Preconditioner, Start, check_preconditioner, default_rtol
from curvlinops.solvers.watch import Limits, Progress, Watch


class NeumannInverseLinearOperator(InverseNode):
    r"""The inverse by a truncated series, :math:`s \sum_{j=0}^{J} (I - s P A)^j P` with preconditioner P.

    It converges where all eigenvalues of :math:`s P A` lie between 0 and 2. It is linear in the right-hand side, unlike
    the inverse by conjugate gradients, but needs many more products for the same residual. The residual of the
    truncated series comes with its last product; with ``rtol``, columns that look done are verified by one more.

    **Cost**: J + 1 products with A, J + 1 with the preconditioner; three vectors a column.

    **Reference**: Lorraine, Vicol, Duvenaud (2020), Optimizing millions of hyperparameters by implicit
    differentiation, arXiv:1911.02590.

    Args:
        A: A square operator.
        num_terms: The last power, J.
        scale: The number s; less than 2 over the largest eigenvalue of P A.
        check_nan: Whether to end with an error when a product is not finite.
        preconditioner: Operator, or function of ``[D, K]``, close to the inverse of A. The adjoint needs an operator,
            unless A is self-adjoint: then the function is taken to be symmetric.
        rtol: Relative residual at which a column takes no more terms; by default none, and all are taken.
        x0: First iterate, in any format; the series is then that of the residual.
        warm_start: Whether to begin from the last solution, where it has as many columns.
        max_matvecs: Products at most, each column counted.
        max_seconds: Wall-clock time after which no term is added.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each term.

    Attributes:
        info: A :class:`SolveInfo` of the last product. Where no rtol was asked for, ``converged`` refers to 1e-5 in
            float32 and below, 1e-8 in float64, and nothing warns. After Ctrl-C it holds the best iterate.

    Raises:
        TypeError: If A is no operator.
        ValueError: If an option is out of range.
        RuntimeError: If the series diverges, or meets what is not finite.

    >>> import torch
    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    >>> (NeumannInverseLinearOperator(A, num_terms=2) @ torch.ones(2)).tolist()
    [1.0, 1.75]
    """

    def __init__(
        self,
        A: LinearOperator,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
        preconditioner: Preconditioner | None = None,
        *,
        rtol: float | None = None,
        x0: Any = None,
        warm_start: bool = False,
        max_matvecs: int | None = None,
        max_seconds: float | None = None,
        progressbar: bool = False,
        callback: Callable[[Progress], Any] | None = None,
    ) -> None:
        if not isinstance(A, LinearOperator):
            raise TypeError(f"Expected a linear operator, got {type(A).__name__}.")
        A._require_square("NeumannInverseLinearOperator")
        num_terms = checked_count(num_terms, 0, "num_terms")
        if checked_number(scale, -inf, inf, "scale") == 0:
            raise ValueError("scale: expected a number other than zero.")
        if rtol is not None:
            checked_number(rtol, 0, 1, "rtol")
        check_preconditioner(preconditioner, A.shape)
        limits = Limits(max_matvecs, max_seconds, progressbar, callback)
        super().__init__(A, preconditioner, Start(x0, warm_start), limits)
        self._num_terms, self._scale, self._check_nan, self._rtol = num_terms, float(scale), check_nan, rtol
        is_symmetric = not isinstance(preconditioner, LinearOperator) or preconditioner.SELF_ADJOINT
        self.SELF_ADJOINT = A.SELF_ADJOINT and is_symmetric

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        first = self._start.first(self.codomain, X[0].shape[-1])
        A, P = prepared(self._A), self._preconditioner
        P = prepared(P) if isinstance(P, LinearOperator) else P
        solution = self._start.remember(self._summed(A, P, Space.merge(X), first))
        return self.codomain.split(solution.T.to(self.dtype))

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        if self.SELF_ADJOINT:
            return self._matmat(X)
        P = self._preconditioner
        if P is not None and not isinstance(P, LinearOperator):
            raise NotImplementedError("The adjoint needs a preconditioner that is an operator; a function has none.")
        # The last solution and the first iterate are those of A itself.
        adjoint = None if P is None else prepared(P).H
        solution = self._summed(prepared(self._A).H, adjoint, Space.merge(X), None)
        return self.domain.split(solution.T.to(self.dtype))

    def _summed(self, A: LinearOperator, P: Preconditioner | None, B: Tensor, first: Tensor | None) -> Tensor:
        precondition = self._row_preconditioner(P)
        B = B.to(working_dtype(self.dtype)).T.contiguous()
        rtol = default_rtol(self.dtype) if self._rtol is None else self._rtol
        eps = torch.finfo(self.dtype).eps
        with Watch(self._limits, A, "Neumann series", self._num_terms + 1) as watch:
            product = on_rows(watch.counted(flat_product(A, self.dtype)))
            terms = Terms(self._num_terms + 1, self._scale, rtol, stops_early=self._rtol is not None)
            series = NeumannSeries(product, precondition, B, first, terms, eps, watch)
            solution = self._solved(series)
        self._report(self.info, series.growth_of_all)
        return solution

    def _report(self, info: SolveInfo, growths: Tensor) -> None:
        if self._check_nan and not bool(info.residual_norm.isfinite().all()):
            raise RuntimeError("The Neumann series met a number that is not finite: look at A and the right-hand side.")
        growing = info.breakdown.nonzero().flatten().tolist()
        if growing:
            growth = float(growths[growing].max())
            raise RuntimeError(
                f"The Neumann series diverges in {len(growing)} of {len(info.converged)} columns: residuals grow by "
                f"{growth:.3g} a term. If A is positive definite, a scale of about {self._scale / (1 + growth):.2g} "
                "helps; else add damping, or solve by MINRES."
            )
        if not bool(info.converged.all()) and (self._rtol is not None or info.ended_by):
            asked = f"the relative residual {self._rtol:.2g}" if self._rtol is not None else "its last term"
            ended = info.ended_by or f"num_terms={self._num_terms}"
            warn_of_convergence(
                f"The Neumann series did not reach {asked} in {int((~info.converged).sum())} of {len(info.converged)} "
                f"columns before {ended}: the largest residual is {info.residual_norm.max():.2g}. Raise that bound, or "
                "use conjugate gradients."
            )

    def _repr_extra(self) -> str:
        return f", of {type(self._A).__name__}, {self._num_terms + 1} terms"
