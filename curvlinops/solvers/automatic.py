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
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.space import Space
from curvlinops.solvers.blockwise import combined, preconditioners_of_blocks, starts_of_blocks
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

    A closed form where A has one (diagonal, block-diagonal, Kronecker product, low rank, dense); conjugate gradients
    where A is known to be positive definite, as ``G.damped(1e-3)`` is; else MINRES. A block-diagonal operator of which
    some blocks lack a closed form is solved block by block, each as it suits that block. Whichever it is, the solution
    is verified by its residual.

    **Cost**: of a closed form, its own and one product with A that verifies; else that of the method.

    Args:
        A: The operator, self-adjoint.
        rtol: Relative residual ‖b - A x‖ / ‖b‖ to reach; by default 1e-5 in float32 and below, 1e-8 in float64.
        max_iter: Iterations at most; by default ten times the dimension, but at most 1000. Block by block, these and
            the bounds below are those of each block.
        preconditioner: Operator, or function of ``[D, K]``, close to the inverse of A; closed forms need none. One that
            is not block-diagonal like A prevents that A is solved block by block.
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
        self._options: dict[str, Any] = {
            "rtol": rtol,
            "max_iter": max_iter,
            "warm_start": warm_start,
            "max_matvecs": max_matvecs,
            "max_seconds": max_seconds,
            "progressbar": progressbar,
            "callback": callback,
        }
        self._x0 = x0
        self._of_blocks: list[InverseLinearOperator] | None = None
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE
        self.info: SolveInfo | None = None

    @property
    def _A(self) -> LinearOperator:
        return self._iterative._A

    @property
    def method(self) -> str:
        """``"closed form"``, ``"block by block"``, ``"conjugate gradients"`` or ``"MINRES"``."""
        if hasattr(self._A, "inverse"):
            return "closed form"
        if self._is_blockwise:
            return "block by block"
        return "MINRES" if isinstance(self._iterative, MINRESInverseLinearOperator) else "conjugate gradients"

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        if hasattr(self._A, "inverse"):
            return self._by_closed_form(X)
        self.info = None
        if self._is_blockwise:
            return self._by_blocks(X)
        try:
            return self._iterative._matmat(X)
        finally:
            self.info = self._iterative.info

    @property
    def _is_blockwise(self) -> bool:
        if not isinstance(self._A, BlockDiagonal) or len(self._A.blocks) < 2:
            return False
        return preconditioners_of_blocks(self._A, self._iterative._preconditioner) is not None

    def _by_blocks(self, X: list[Tensor]) -> list[Tensor]:
        A, begin = self._A, time.monotonic()
        assert isinstance(A, BlockDiagonal)
        if self._of_blocks is None:
            starts = starts_of_blocks(A, self._x0)
            chosen = preconditioners_of_blocks(A, self._iterative._preconditioner) or []
            self._of_blocks = [
                InverseLinearOperator(block, preconditioner=P, x0=x0, **self._options)
                for block, P, x0 in zip(A.blocks, chosen, starts, strict=True)
            ]
        parts = A._parts(X)
        solutions = [inverse._matmat(part) for inverse, part in zip(self._of_blocks, parts, strict=True)]
        infos = [inverse.info for inverse in self._of_blocks if inverse.info is not None]
        self.info = combined(infos, parts, self._rtol, time.monotonic() - begin)
        return A._together(solutions)

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
        result._closed = result.info = result._of_blocks = None
        return result

    def _repr_extra(self) -> str:
        return f", of {type(self._A).__name__}, by {self.method}"


def _method_for(A: LinearOperator) -> type[CGInverseLinearOperator] | type[MINRESInverseLinearOperator]:
    # A closed form is not asked for its entries before they are needed.
    is_definite = not hasattr(A, "inverse") and A._is_definite
    return CGInverseLinearOperator if is_definite else MINRESInverseLinearOperator
