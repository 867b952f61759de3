"""How damping enters the inverse of a Kronecker product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.factors import Factor


@dataclass(frozen=True)
class InverseOptions:
    """The options that inverses of Kronecker products share.

    Args:
        use_heuristic_damping: Whether to balance the damping of the two factors.
        min_damping: Least damping of a factor under the heuristic.
        use_exact_damping: Whether to damp the product rather than its factors.
        retry_double_precision: Whether to repeat in float64 what fails in float32.

    Raises:
        ValueError: If both ways of damping are asked for, or ``min_damping`` is negative or not finite.
    """

    use_heuristic_damping: bool = False
    min_damping: float = 1e-8
    use_exact_damping: bool = False
    retry_double_precision: bool = True

    def __post_init__(self) -> None:
        if self.use_heuristic_damping and self.use_exact_damping:
            raise ValueError("use_heuristic_damping and use_exact_damping exclude each other: pass one of them.")
        checked_damping(self.min_damping, "min_damping")


def checked_damping(damping: float, name: str = "damping") -> float:
    """A number that can be added to a positive matrix.

    Raises:
        ValueError: If it is negative or not finite.
    """
    number = float(damping)
    if not (isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {number}.")
    return number


class DampedFactors:
    """Damped factors, each made once where several products share it, so that it is inverted once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, float | tuple[float, ...]], tuple[Factor, Factor]] = {}

    def of(self, factor: Factor, damping: float | Tensor) -> Factor:
        """The factor plus a multiple of the identity, one for all groups or one for each ``[G]``."""
        key = id(factor), tuple(damping.tolist()) if isinstance(damping, Tensor) else damping
        if key not in self._known:
            # The factor is held, too, lest another one gets its identity.
            self._known[key] = factor, factor.damped(damping)
        return self._known[key][1]


def damped_factors(
    left: Factor, right: Factor, damping: float, options: InverseOptions, damped: DampedFactors
) -> tuple[Factor, Factor]:
    r"""The two factors with the damping added to each.

    With the heuristic, :math:`\pi = \sqrt{\frac{\operatorname{tr} L / \dim L}{\operatorname{tr} R / \dim R}}` for each
    group, 1 where a trace is not positive; then L gets :math:`\max(\pi \sqrt{\lambda}, \lambda_{\min})` and R gets
    :math:`\max(\sqrt{\lambda} / \pi, \lambda_{\min})`.

    **Reference**: Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    section 6.3, arXiv:1503.05671.
    """
    if not options.use_heuristic_damping:
        return (damped.of(left, damping), damped.of(right, damping)) if damping else (left, right)
    means = [factor.trace() / factor.size for factor in (left, right)]
    are_positive = (means[0] > 0) & (means[1] > 0)
    pi = torch.where(are_positive, means[0] / torch.where(are_positive, means[1], 1.0), 1.0).sqrt()
    root = damping**0.5
    least = options.min_damping
    return damped.of(left, (pi * root).clamp(min=least)), damped.of(right, (root / pi).clamp(min=least))


def dampings_of_blocks(damping: Any, num_blocks: int) -> list[float]:
    """A damping for each block, from one for all or from one for each."""
    if isinstance(damping, Tensor) and damping.ndim < 2:
        damping = damping.tolist()
    if isinstance(damping, Number) and not isinstance(damping, complex):
        return [float(damping)] * num_blocks  # type: ignore[arg-type]
    if not isinstance(damping, Sequence) or isinstance(damping, str):
        raise TypeError(
            f"damping: expected a number, or a sequence or tensor of {num_blocks} numbers, one for each block, got "
            f"{type(damping).__name__}."
        )
    dampings = [float(number) for number in damping]
    if len(dampings) != num_blocks:
        raise ValueError(f"damping: expected a number or {num_blocks} of them, got {len(dampings)}.")
    return dampings
