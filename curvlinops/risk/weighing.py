"""How much each datum and each mini-batch counts: denominators, batch sizes, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops.risk.batches import visible_size
from curvlinops.risk.losses import Loss, Terms


class Weighing:
    """What a loss and its weights make of a mini-batch.

    Attributes:
        loss: The loss, or ``None`` for quantities of the model alone.
        batch_size_fn: Number of data in X, where it cannot be seen.
        weight_fn: Weight of each datum ``[N]`` as a function of (X, y).
    """

    loss: Loss | None
    batch_size_fn: Callable[[Any], int] | None
    weight_fn: Callable[[Any, Any], Tensor] | None

    @property
    def device(self) -> torch.device:
        """Device on which weights are given."""
        raise NotImplementedError

    @property
    def is_mean(self) -> bool:
        """Whether the loss is divided by a denominator."""
        return self.loss is not None and self.loss.reduction == "mean"

    def denominator(self, X: Any, y: Any) -> Tensor:
        """By what the mini-batch's own loss divides its sum: 1 under 'sum'."""
        if not self.is_mean or self.loss is None:
            return torch.ones((), dtype=torch.float64)
        size = None if self.loss.is_known else self.batch_size(X, y)
        return self.loss.denominator(y, self.weights(X, y), size)

    def batch_size(self, X: Any, y: Any) -> int:
        """Number of data in a mini-batch.

        Raises:
            ValueError: If it cannot be seen.
        """
        size = visible_size(X, y) if self.batch_size_fn is None else int(self.batch_size_fn(X))
        if size is None:
            raise ValueError(
                "The number of data in X cannot be seen, since its tensors and those of y do not agree on their first "
                "axis: pass batch_size_fn, a function from X to the number of data."
            )
        return size

    def weights(self, X: Any, y: Any) -> Tensor | None:
        """Weight of each datum ``[N]``, or ``None``.

        Raises:
            ValueError: If a weight is negative or not finite, or there is not one number a datum.
        """
        if self.weight_fn is None:
            return None
        weight = self.weight_fn(X, y)
        if not isinstance(weight, Tensor) or weight.ndim != 1:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"weight_fn: expected a tensor [N] with one weight a datum, got {got}.")
        if not weight.isfinite().all() or (weight < 0).any():
            raise ValueError("weight_fn: expected finite weights of at least zero.")
        return weight.detach().to(self.device)

    def terms(self, prediction: Tensor, X: Any, y: Any) -> Terms:
        """The loss terms of a mini-batch."""
        assert self.loss is not None
        weight = self.weights(X, y)
        if weight is not None and len(weight) != len(prediction):
            raise ValueError(f"weight_fn gave {len(weight)} weights for {len(prediction)} data.")
        if self.is_mean and not self.loss.is_known and (size := self.batch_size(X, y)) != len(prediction):
            raise ValueError(
                f"Axis 0 of a prediction is the datum, but the prediction has shape {list(prediction.shape)} and the "
                f"mini-batch {size} data: pass batch_size_fn, or bring the prediction's axes in order."
            )
        return self.loss.terms(prediction, y, weight)
