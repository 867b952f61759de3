"""Settings and saved states of a learned inverse, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from curvlinops.applications.checked_numbers import checked_number


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
    expected, found = _names(own["factors"]), _names(state["factors"])
    if expected != found:
        raise ValueError(
            f"state: expected the factors of this operator, but {sorted(expected - found)} are missing, and "
            f"{sorted(found - expected)} not known: build it for the same parameters."
        )
    for name, factors in own["factors"].items():
        for letter, mine in factors.items():
            theirs = state["factors"][name][letter]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(
                    f"state: factor {letter} of layer '{name}' is {theirs.dtype} {list(theirs.shape)}, that of this "
                    f"operator {mine.dtype} {list(mine.shape)}: build it for the same parameters."
                )


def _names(factors: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {f"{letter} of '{name}'" for name, letters in factors.items() for letter in letters}


def checked_numbers(damping: float, scale: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """Damping and scale as numbers; the scale is by default one over the damping, and normal in the dtype.

    Raises:
        ValueError: If one is out of range, or the damping is zero and there is no scale.
    """
    damping = checked_number(damping, "damping")
    if scale is None:
        if damping == 0:
            raise ValueError("scale: with damping=0 there is no default 1 / damping: pass the scale to begin at.")
        scale = 1 / damping
    range_of = torch.finfo(dtype)
    if not range_of.tiny <= scale <= range_of.max:
        raise ValueError(
            f"scale: expected a positive number, and from {range_of.tiny:.1e} to {range_of.max:.1e} as {dtype} has "
            f"them, got {scale!r}; by default it is 1 / damping."
        )
    return damping, float(scale)
