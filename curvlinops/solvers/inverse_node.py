"""What all inverses by iteration share: the matrix and the preconditioner inside, the options, and interrupts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from torch import Tensor

from curvlinops.operators.algebra import Node
from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.columns import flat_product
from curvlinops.solvers.krylov.open_columns import RowProduct, on_rows
from curvlinops.solvers.options import Preconditioner, Start
from curvlinops.solvers.watch import Limits


class Solving(Protocol):
    """A solve under way."""

    def run(self) -> Tensor:
        """Iterate; the solutions as rows ``[K, D]``."""
        ...

    def interrupted(self) -> Any:
        """What there is in the middle."""
        ...

    @property
    def info(self) -> Any:
        """What was done."""
        ...


class InverseNode(Node):
    """The inverse of an operator by iteration.

    Args:
        A: The operator.
        preconditioner: Operator, or function of ``[D, K]``, or ``None``.
        start: Where a solve begins.
        limits: Budgets and progress.

    Attributes:
        info: What the last solve did; ``None`` before the first.
    """

    def __init__(self, A: LinearOperator, preconditioner: Preconditioner | None, start: Start, limits: Limits) -> None:
        super().__init__(A.codomain, A.domain)
        self._A, self._preconditioner = A, preconditioner
        self._start, self._limits = start, limits
        self.info: Any = None

    def _solved(self, solve: Solving) -> Tensor:
        """Run a solve, and keep what it did, also where it is interrupted."""
        self.info = None
        try:
            solution = solve.run()
        except KeyboardInterrupt:
            self.info = solve.interrupted()
            raise
        self.info = solve.info
        return solution

    def _row_preconditioner(self, preconditioner: Preconditioner | None) -> RowProduct | None:
        if preconditioner is None:
            return None
        return on_rows(flat_product(preconditioner, self.dtype, "preconditioner"))

    def _inside(self) -> Sequence[LinearOperator]:
        return [self._A, *([self._preconditioner] if isinstance(self._preconditioner, LinearOperator) else [])]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> Self:
        result = copy.copy(self)
        result._A, *others = map(change, self._inside())
        if others:
            result._preconditioner = others[0]
        result._start, result.info = self._start.anew(), None
        return result
