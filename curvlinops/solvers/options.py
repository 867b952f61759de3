"""The options that iterative inverses share, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import checked_count, checked_number
from curvlinops.solvers.columns import working_dtype

Preconditioner = LinearOperator | Callable[[Tensor], Tensor]


class Start:
    """Where a solve begins: at a given iterate, or at the last solution.

    Args:
        x0: First iterate, in any format, or ``None`` for zero.
        warm_start: Whether to begin from the last solution, where it has as many columns.
    """

    def __init__(self, x0: Any, warm_start: bool) -> None:
        self._x0, self._warm_start = x0, warm_start
        self._last: Tensor | None = None

    def first(self, space: Space, num_columns: int) -> Tensor | None:
        """The first iterate as rows ``[K, D]`` in the working dtype; ``None`` for zero."""
        work = working_dtype(space.dtype)
        if self._last is not None and len(self._last) == num_columns:
            return self._last.to(work)
        if self._x0 is None:
            return None
        X = Space.merge(space.read(self._x0)[0]).to(work)
        if X.shape[1] not in (1, num_columns):
            raise ValueError(f"x0: expected 1 or {num_columns} columns, got {X.shape[1]}.")
        if not bool(X.isfinite().all()):
            raise ValueError("x0: expected finite numbers.")
        return X.T.expand(num_columns, -1)

    def anew(self) -> Start:
        """The same without a last solution."""
        return Start(self._x0, self._warm_start)

    def remember(self, solution: Tensor) -> Tensor:
        """Note a solution ``[K, D]``, if the next solve is to begin there."""
        if self._warm_start and bool(solution.isfinite().all()):
            self._last = solution.clone()  # the user gets the other one
        return solution


def default_rtol(dtype: torch.dtype) -> float:
    """The relative residual that is asked for where the user does not say; half precision cannot reach less."""
    return 1e-8 if dtype == torch.float64 else max(1e-5, 4 * torch.finfo(dtype).eps)


def checked_rtol(dtype: torch.dtype, rtol: float | None) -> float:
    """A relative residual that can be asked for."""
    return default_rtol(dtype) if rtol is None else checked_number(rtol, 0, 1, "rtol")


def checked_max_iter(shape: tuple[int, int], max_iter: int | None, what: str = "max_iter") -> int:
    """A number of iterations; by default ten times the smaller dimension, but at most 1000."""
    return max(1, min(10 * min(shape), 1000)) if max_iter is None else checked_count(max_iter, 1, what)


def check_preconditioner(preconditioner: Any, shape: tuple[int, int]) -> None:
    """Refuse what is neither an operator of this shape nor a function."""
    if preconditioner is None:
        return
    if isinstance(preconditioner, LinearOperator):
        if preconditioner.shape != shape:
            raise ValueError(f"preconditioner: expected shape {shape}, got {preconditioner.shape}.")
    elif not callable(preconditioner):
        raise TypeError(f"preconditioner: expected an operator or a function, got {type(preconditioner).__name__}.")
