"""Numbers that users hand over, checked."""

from __future__ import annotations

from math import isfinite, nan
from numbers import Real
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
