"""Checks of arguments that solvers and estimators share."""

from __future__ import annotations

import operator
from math import isfinite
from typing import Any

from curvlinops.operators.base import LinearOperator


def check_self_adjoint(A: Any, what: str) -> None:
    """Refuse what a method for symmetric matrices cannot take.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not square or not self-adjoint.
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(f"Expected a linear operator, got {type(A).__name__}. Wrap a matrix as TensorLinearOperator.")
    A._require_square(what)
    if not A.SELF_ADJOINT:
        raise ValueError(
            f"{what} needs a self-adjoint operator, got {A!r}. A.H @ A is one, and LSMRInverseLinearOperator solves "
            "with any."
        )


def checked_count(value: Any, at_least: int, what: str, even: bool = False, at_most: int | None = None) -> int:
    """A number of things, if it is an integer, large enough, and even where it must be.

    Args:
        value: The number.
        at_least: The smallest that is allowed.
        what: How errors call it, and for what it is needed.
        even: Whether it must be even.
        at_most: The largest that is allowed.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small, too large, or odd.
    """
    kind = f"an even integer of at least {at_least}" if even else f"an integer of at least {at_least}"
    if at_most is not None:
        kind = f"an integer from {at_least} to {at_most}"
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{what}: expected {kind}, got {value!r}.")
    if count < at_least or (even and count % 2) or (at_most is not None and count > at_most):
        raise ValueError(f"{what}: expected {kind}, got {count}.")
    return count


def checked_number(value: Any, at_least: float, below: float, what: str) -> float:
    """A number in a half-open interval.

    Raises:
        TypeError: If it is no number.
        ValueError: If it lies outside, or is not finite.
    """
    try:
        number = float(value) if not isinstance(value, (bool, str)) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{what}: expected a number, got {value!r}.")
    if not (at_least <= number < below and isfinite(number)):
        bounds = f"in [{at_least:g}, {below:g})" if isfinite(below) else f"of at least {at_least:g}, and finite"
        raise ValueError(f"{what}: expected a number {bounds}, got {number}.")
    return number
