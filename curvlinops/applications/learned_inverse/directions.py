"""The directions that a learned inverse learns from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf, sqrt
from typing import Any

import torch
from torch import Generator, Tensor

from curvlinops import Space
from curvlinops.applications.checked_numbers import checked_count
from curvlinops.applications.learned_inverse.steps import Matrix


def directions_from(
    A: Matrix, kind: str, gradient: Callable[[], Any] | None, num: int, space: Space, generator: Generator
) -> Callable[[], Tensor]:
    """A function that returns the directions of the next step, flat.

    Args:
        A: The matrix, which may have a gradient of its own.
        kind: ``"gaussian"`` or ``"gradient"``.
        gradient: Function that returns the gradient.
        num: Number of directions.
        space: The space of the directions.
        generator: Where random numbers come from.

    Raises:
        TypeError: If there is no gradient.
        ValueError: If the kind is not known, or does not go with a gradient.
    """
    if kind not in ("gaussian", "gradient"):
        raise ValueError(f"directions: expected 'gaussian' or 'gradient', got {kind!r}.")
    checked_count(num, "num_directions")
    if kind == "gaussian":
        if gradient is not None:
            raise ValueError("gradient: it has no effect on directions='gaussian'; pass directions='gradient'.")
        return partial(_gaussian, space, num, generator)
    if num > 1:
        raise ValueError("num_directions: there is one gradient in each step; several need directions='gaussian'.")
    if gradient is not None:
        return lambda: _scaled(gradient(), space)
    if not hasattr(A, "gradient_and_loss"):
        raise TypeError(f"gradient: {type(A).__name__} has no gradient of its own; pass a function that returns it.")
    own = _scaled(A.gradient_and_loss()[0], space)
    return lambda: own


def _gaussian(space: Space, num: int, generator: Generator) -> Tensor:
    shape = (space.numel,) if num == 1 else (space.numel, num)
    dtype = torch.promote_types(space.dtype, torch.float32)
    return torch.randn(shape, generator=generator, device=space.device, dtype=dtype).to(space.dtype)


def _scaled(gradient: Any, space: Space) -> Tensor:
    """The gradient at the length of a standard normal vector, beside which Adam's eps is small."""
    columns, _ = space.read(gradient)
    flat = Space.merge(columns).squeeze(-1)
    if flat.ndim > 1:
        raise ValueError(f"gradient: expected one vector, got {flat.shape[1]} columns.")
    length = float(flat.norm(dtype=torch.float64))
    if not 0 < length < inf:
        raise FloatingPointError(f"gradient: expected one of positive, finite length, got length {length}.")
    return flat * (sqrt(space.numel) / length)
