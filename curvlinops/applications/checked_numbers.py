"""Numbers that users hand over, checked."""

from __future__ import annotations

from math import isfinite, nan
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def checked_number(number: Any, name: str, *, is_positive: bool = False) -> float:
    """A finite number of at least 0, or above it, as a float: one of Python or NumPy, or a tensor of one element.

    Args:
        number: What the user gave.
        name: How messages call it.
        is_positive: Whether zero is refused, too.

    Raises:
        ValueError: If it is something else.

    >>> checked_number(3, "strength")
    3.0
    """
    is_tensor = isinstance(number, Tensor) and number.numel() == 1 and not number.is_complex()
    is_number = is_tensor or (isinstance(number, Real) and not isinstance(number, bool))
    value = float(number.item() if is_tensor else number) if is_number else nan
    if not isfinite(value) or value < 0 or (is_positive and value == 0):
        expected = "a positive finite number" if is_positive else "a finite number of at least 0"
        raise ValueError(f"{name}: expected {expected}, got {number!r:.80}.")
    return value


def checked_count(count: Any, name: str, *, least: int = 1) -> int:
    """An integer of at least so much.

    Args:
        count: What the user gave.
        name: How messages call it.
        least: The least that is allowed.

    Raises:
        ValueError: If it is something else.

    >>> checked_count(3, "steps")
    3
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {count!r:.80}.")
    return int(count)
