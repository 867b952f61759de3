"""Settings and saved states of a learned inverse, checked."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any


def checked_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a state that does not go with the state of the operator that is to load it.

    Raises:
        ValueError: If something is missing, or settings, shapes or dtypes differ.
    """
    missing = [key for key in own if key not in state]
    if missing:
        raise ValueError(f"state: expected that of a learned inverse, but {missing} are missing.")
    for key in ("damping", "scale", "structure"):
        if state[key] != own[key]:
            raise ValueError(f"state: it has {key} {state[key]!r}, this operator {own[key]!r}: build it with the same.")
    for name, factors in own["factors"].items():
        for letter, mine in factors.items():
            theirs = state["factors"][name][letter]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(
                    f"state: factor {letter} of layer '{name}' is {theirs.dtype} {list(theirs.shape)}, that of this "
                    f"operator {mine.dtype} {list(mine.shape)}: build it for the same parameters."
                )


def checked_numbers(damping: float, scale: float | None) -> tuple[float, float]:
    """Damping and scale as numbers; the scale is by default one over the damping.

    Raises:
        ValueError: If one is out of range, or the damping is zero and there is no scale.
    """
    if not 0 <= damping < inf:
        raise ValueError(f"damping: expected a number of at least 0, got {damping!r}.")
    if scale is None:
        if damping == 0:
            raise ValueError("scale: with damping=0 there is no default 1 / damping: pass the scale to begin at.")
        scale = 1 / damping
    if not 0 < scale < inf:
        raise ValueError(f"scale: expected a positive number, got {scale!r}.")
    return float(damping), float(scale)
