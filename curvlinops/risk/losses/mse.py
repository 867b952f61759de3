"""Squared error: ℓ = Σ_c (f_c - y_c)²."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor, nn

from curvlinops.risk.losses.base import Loss, Terms, check_same_shape, per_row, total_weight


class Elementwise(Loss):
    """A loss with a term for each element of predictions ``[N]``, ``[N, C]`` or ``[N, d..., C]``."""

    def num_positions(self, y: Any) -> int | None:
        """Positions of a datum; see :meth:`Loss.num_positions`."""
        return int(y.shape[1:-1].numel()) if isinstance(y, Tensor) else None

    def num_channels(self, y: Any) -> int | None:
        """Channels of a position; see :meth:`Loss.num_channels`."""
        return int(y.shape[1:][-1:].numel()) if isinstance(y, Tensor) else None

    def _mean_denominator(self, y: Any, weight: Tensor | None, num_data: int | None) -> Tensor:
        return elements_of(self.name, y, weight)


class SquaredError(Elementwise):
    """``nn.MSELoss``: predictions ``[N]``, ``[N, C]`` or ``[N, d..., C]``."""

    name = "MSELoss"

    def __init__(self, module: nn.MSELoss) -> None:
        self.reduction = module.reduction

    def terms(self, prediction: Tensor, y: Any, weight: Tensor | None) -> Terms:
        """Terms of one mini-batch; see :meth:`Loss.terms`."""
        return _SquaredErrorTerms(prediction, check_same_shape(self.name, prediction, y), weight)


def elements_of(name: str, y: Any, weight: Tensor | None) -> Tensor:
    """Number of elements of the targets, each datum's counted with its weight."""
    if not isinstance(y, Tensor) or y.ndim == 0:
        raise ValueError(f"{name}: expected a tensor of targets with the datum on axis 0, got {y!r:.80}.")
    return total_weight(weight, y.shape[0]) * y.shape[1:].numel()


def channels_last_axis(prediction: Tensor) -> int | None:
    """The last axis, unless the prediction has one channel and no axis for it."""
    return None if prediction.ndim == 1 else prediction.ndim - 1


class _SquaredErrorTerms(Terms):
    def __init__(self, prediction: Tensor, y: Tensor, weight: Tensor | None) -> None:
        super().__init__(prediction, channels_last_axis(prediction))
        self._y = self.to_rows(y.unsqueeze(-1)).squeeze(-1)
        self._weight = per_row(weight, self.rows)

    def masses(self) -> Tensor | None:
        return self._weight if isinstance(self._weight, Tensor) else None

    def value(self) -> Tensor:
        return (self._weight * (self.rows - self._y).square()).sum()

    def gradient(self) -> Tensor:
        return 2 * self._weight * (self.rows - self._y)

    def hessian_matmat(self, U: Tensor) -> Tensor:
        weight = self._weight
        return 2 * (weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight) * U

    def hessian_sqrt(self, channel: int) -> Tensor:
        column = torch.zeros_like(self.rows)
        column[..., channel] = sqrt(2.0)
        return column * _root(self._weight)

    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        # 2 (f - ŷ) with ŷ ~ N(f, ½) is √2 times a standard normal number.
        noise = torch.randn(
            *self.rows.shape, num_samples, dtype=self.rows.dtype, device=self.rows.device, generator=generator
        )
        root = _root(self._weight)
        return sqrt(2.0) * noise * (root.unsqueeze(-1) if isinstance(root, Tensor) else root)


def _root(weight: Tensor | float) -> Tensor | float:
    return weight.sqrt() if isinstance(weight, Tensor) else sqrt(weight)
