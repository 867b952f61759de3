"""Samples of normal distributions whose covariance is an operator, and the generators that numbers come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from curvlinops.operators.space import working_dtype

if TYPE_CHECKING:
    from curvlinops.operators.base import LinearOperator


def normal_columns(
    A: LinearOperator, num_samples: int, seed: int, generator: Generator | None
) -> tuple[Tensor, Generator]:
    """Standard normal columns on the space of an operator, in its dtype, and the generator that they came from.

    Args:
        A: The operator.
        num_samples: Number of columns, K.
        seed: Seed of a new generator.
        generator: Drawn from in place of a new one; it must live on the operator's device.

    Returns:
        The columns ``[D, K]``, drawn in float32 where the operator is in half precision, and the generator.

    Raises:
        TypeError: If the generator is none, or the number of samples is no integer.
        ValueError: If the generator lives on another device, or the number of samples is below 1.
    """
    generator = checked_generator(A.device, num_samples, seed, generator)
    noise = torch.randn(A.shape[1], num_samples, dtype=working_dtype(A.dtype), device=A.device, generator=generator)
    return noise.to(A.dtype), generator


def checked_generator(device: torch.device, num_samples: int, seed: int, generator: Generator | None) -> Generator:
    """The generator of a number of samples that is checked; see :func:`normal_columns`."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples: expected an integer of at least 1, got {num_samples!r}.")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}.")
    return generator_for(device, seed, generator)


def generator_for(device: torch.device, seed: int, generator: Generator | None) -> Generator:
    """The generator that was given, or a new one with this seed; see :func:`check_generator`."""
    if generator is None:
        return torch.Generator(device).manual_seed(seed)
    check_generator(generator, device)
    return generator


def check_generator(generator: Any, device: torch.device) -> None:
    """Refuse what is no generator on a device.

    Raises:
        TypeError: If it is no generator.
        ValueError: If it lives on another device.
    """
    if not isinstance(generator, Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}.")
    given = generator.device
    # One of CUDA without an index serves the current device.
    if given.type != device.type or (None not in (given.index, device.index) and given.index != device.index):
        raise ValueError(
            f"generator: expected one on {device}, where A is, got one on {given}. Pass torch.Generator('{device}')."
        )
