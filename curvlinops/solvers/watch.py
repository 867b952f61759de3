"""What bounds an iteration and shows its progress: products, seconds, a progress bar, a callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.checks import checked_count, checked_number
from curvlinops.solvers.columns import Product


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each iteration.

    Attributes:
        num_iterations: Iterations so far.
        num_matvecs: Products so far, each column counted.
        residual_norm: Relative residuals by the recurrences ``[K]``.
    """

    num_iterations: int
    num_matvecs: int
    residual_norm: Tensor


@dataclass(frozen=True)
class Limits:
    """Bounds of an iteration, and who hears of it.

    Args:
        max_matvecs: Products at most, each column counted, those that verify included.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a :class:`Progress` after each iteration.

    Raises:
        ValueError: If a bound is not positive.
        TypeError: If the callback cannot be called.
    """

    max_matvecs: int | None = None
    max_seconds: float | None = None
    progressbar: bool = False
    callback: Callable[[Progress], Any] | None = None

    def __post_init__(self) -> None:
        if self.max_matvecs is not None:
            checked_count(self.max_matvecs, 1, "max_matvecs")
        if self.max_seconds is not None and checked_number(self.max_seconds, 0, inf, "max_seconds") == 0:
            raise ValueError("max_seconds: expected a positive number, got 0.")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback: expected a function, got {type(self.callback).__name__}.")


class Watch:
    """Counts the products of one run, and says when it must end.

    Args:
        limits: The bounds.
        operator: Whose ranks must agree on the time.
        description: What the progress bar is called.
        total: Iterations at most, for the bar.

    Attributes:
        num_matvecs: Products so far, each column counted.
        num_iterations: Iterations so far.
        reserved: Products that are needed later, and may not be used up before.
        ended_by: ``"max_matvecs"`` or ``"max_seconds"`` once that bound is reached.
    """

    def __init__(self, limits: Limits, operator: LinearOperator, description: str, total: int | None = None) -> None:
        self._limits, self._operator = limits, operator
        self._begin = time.monotonic()
        self._bar = tqdm(total=total, desc=description, disable=not limits.progressbar, leave=False)
        self.num_matvecs = 0
        self.num_iterations = 0
        self.reserved = 0
        self.ended_by: str | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Wall-clock time since the beginning."""
        return time.monotonic() - self._begin

    def counted(self, product: Product) -> Product:
        """The same product, each column of which is noted."""

        def noted(X: Tensor) -> Tensor:
            self.num_matvecs += X.shape[1]
            return product(X)

        return noted

    def has_room(self, num_columns: int) -> bool:
        """Whether so many more products with a column may be made, whatever the time: for those that verify."""
        most = self._limits.max_matvecs
        return most is None or self.num_matvecs + self.reserved + num_columns <= most

    def allows(self, num_columns: int) -> bool:
        """Whether products with so many more columns may be made, in the time that is left."""
        limits = self._limits
        if not self.has_room(num_columns):
            self.ended_by = "max_matvecs"
        elif limits.max_seconds is not None and self._operator._agreed(self.seconds > limits.max_seconds):
            self.ended_by = "max_seconds"
        return self.ended_by is None

    def tick(self, residual_norm: Tensor) -> None:
        """Note an iteration, and tell of it."""
        self.num_iterations += 1
        if self._limits.progressbar:
            self._bar.set_postfix_str(f"residual {float(residual_norm.max()):.1e}", refresh=False)
            self._bar.update()
        if self._limits.callback is not None:
            self._limits.callback(Progress(self.num_iterations, self.num_matvecs, residual_norm.clone()))
