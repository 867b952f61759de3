"""The inverse of a symmetric operator by whatever suits it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.algebra import Node
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import BlockDiagonal
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.columns import flat_product, working_dtype
from curvlinops.solvers.info import SolveInfo, relative, warn_of_convergence
from curvlinops.solvers.inverse import (
    CGInverseLinearOperator,
    IterativeInverse,
    MINRESInverseLinearOperator,
)
from curvlinops.solvers.krylov.open_columns import on_rows
from curvlinops.solvers.options import Preconditioner
from curvlinops.solvers.watch import Progress, Watch


class InverseLinearOperator(Node):
    r"""The inverse :math:`A^{-1}` of a symmetric operator, by what suits it.

    A closed form where A has one (diagonal, block-diagonal, low rank, dense); conjugate gradients where A is known to
    be positive definite, as ``G.damped(1e-3)`` is; else MINRES. Whichever it is, the solution is verified by its
    residual.

    **Cost**: of a closed form, its own and one product with A that verifies; else that of the method.

    Args:
        A: The operator, self-adjoint.
        rtol: Relative residual ‖b - A x‖ / ‖b‖ to reach; by default 1e-5 in float32 and below, 1e-8 in float64.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000.
        preconditioner: Operator, or function of ``[D, K]``, close to the inverse of A; closed forms need none.
        x0: First iterate, in any format; closed forms need none.
        warm_start: Whether to begin from the last solution, where it has as many columns.
        max_matvecs: Products at most, each column counted, those that verify included.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each iteration.

    Attributes:
        info: A :class:`SolveInfo` of the last solve. The residual of a closed form is NaN where ``max_matvecs`` leaves
            no product to verify it.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint or its closed form is singular, or an option is out of range.

    >>> from curvlinops import Diagonal
    >>> inverse = InverseLinearOperator(Diagonal(torch.tensor([1.0, 4.0])))
    >>> (inverse @ torch.ones(2)).tolist(), inverse.method
    ([1.0, 0.25], 'closed form')
    """

    SELF_ADJOINT = True

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
        check_self_adjoint(A, "InverseLinearOperator")
        super().__init__(A.codomain, A.domain)
        # Also made where a closed form will do, since it checks the options.
        self._iterative: IterativeInverse = _method_for(A)(
            A,
            rtol,
            max_iter,
            preconditioner,
            x0,
            warm_start=warm_start,
            max_matvecs=max_matvecs,
            max_seconds=max_seconds,
            progressbar=progressbar,
            callback=callback,
        )
        self._closed: LinearOperator | None = None
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE
        self.info: SolveInfo | None = None

    @property
    def _A(self) -> LinearOperator:
        return self._iterative._A

    @property
    def method(self) -> str:
        """``"closed form"``, ``"conjugate gradients"`` or ``"MINRES"``."""
        if _has_closed_form(self._A):
            return "closed form"
        return "MINRES" if isinstance(self._iterative, MINRESInverseLinearOperator) else "conjugate gradients"

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        if _has_closed_form(self._A):
            return self._by_closed_form(X)
        self.info = None
        try:
            return self._iterative._matmat(X)
        finally:
            self.info = self._iterative.info

    def _by_closed_form(self, X: list[Tensor]) -> list[Tensor]:
        self.info, begin = None, time.monotonic()
        inverse = self._closed if self._closed is not None else self._A.inverse()  # type: ignore[attr-defined]
        # What others can change is inverted anew for each product.
        self._closed = inverse if self._A._holds_values else None
        columns = inverse._matmat(X)
        self.info = self._verified(Space.merge(columns), Space.merge(X), begin)
        self._warn(self.info)
        return columns

    def _verified(self, X: Tensor, B: Tensor, begin: float) -> SolveInfo:
        work = working_dtype(self.dtype)
        X, B = X.to(work).T.contiguous(), B.to(work).T
        with Watch(self._iterative._limits, self._A, "Closed form") as watch:
            product = on_rows(watch.counted(flat_product(self._A, self.dtype)))
            AX = product(X) if watch.allows(len(X)) else torch.full_like(X, torch.nan)
        scale = B.norm(dim=1)
        residual = relative(B - AX, scale)
        largest = relative(AX, X.norm(dim=1))
        nothing = torch.zeros(len(residual), dtype=torch.long, device=B.device)
        return SolveInfo(
            num_iterations=nothing,
            residual_norm=residual,
            converged=residual <= self._rtol,
            breakdown=nothing.bool(),
            attainable=torch.finfo(self.dtype).eps * largest * relative(X, scale),
            num_matvecs=watch.num_matvecs,
            seconds=time.monotonic() - begin,
            ended_by=watch.ended_by,
            history=residual.unsqueeze(0),
        )

    def _warn(self, info: SolveInfo) -> None:
        if info.ended_by:
            warn_of_convergence(f"The closed form of {type(self._A).__name__} is not verified: {info.ended_by}.")
        elif not bool(info.converged.all()):
            warn_of_convergence(
                f"The closed form of {type(self._A).__name__} leaves a relative residual of "
                f"{float(info.residual_norm.max()):.2g} in {self.dtype}, more than {self._rtol:.2g}. Use float64, a "
                "larger damping, or pass rtol."
            )

    @property
    def _rtol(self) -> float:
        return self._iterative._rtol

    @property
    def _is_definite(self) -> bool:
        return self._A._is_definite

    def _inside(self) -> Sequence[LinearOperator]:
        return [self._iterative]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> InverseLinearOperator:
        result = copy.copy(self)
        result._iterative = change(self._iterative)  # type: ignore[assignment]
        result._closed = result.info = None
        return result

    def _repr_extra(self) -> str:
        return f", of {type(self._A).__name__}, by {self.method}"


def _method_for(A: LinearOperator) -> type[CGInverseLinearOperator] | type[MINRESInverseLinearOperator]:
    # A closed form is not asked for its entries before they are needed.
    is_definite = not _has_closed_form(A) and A._is_definite
    return CGInverseLinearOperator if is_definite else MINRESInverseLinearOperator


def _has_closed_form(A: LinearOperator) -> bool:
    if isinstance(A, BlockDiagonal):
        return all(_has_closed_form(block) for block in A.blocks)
    return hasattr(A, "inverse")
