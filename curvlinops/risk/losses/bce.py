"""Binary cross-entropy with logits: ℓ = Σ_c -a_c log σ(f_c) - b_c log σ(-f_c) with a = w·pos·y, b = w·(1 - y)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from curvlinops.risk.losses.base import Terms, check_probability, check_same_shape, per_row
from curvlinops.risk.losses.mse import Elementwise, channels_last_axis


class BCEWithLogits(Elementwise):
    """``nn.BCEWithLogitsLoss``: predictions ``[N]``, ``[N, C]`` or ``[N, d..., C]``."""

    name = "BCEWithLogitsLoss"

    def __init__(self, module: nn.BCEWithLogitsLoss) -> None:
        self.reduction = module.reduction
        self._weight = module.weight
        self._pos_weight = module.pos_weight

    def terms(self, prediction: Tensor, y: Any, weight: Tensor | None) -> Terms:
        """Terms of one mini-batch; see :meth:`Loss.terms`."""
        y = check_same_shape(self.name, prediction, y)
        positive, negative = y, 1 - y
        if self._pos_weight is not None:
            positive = positive * self._spread("pos_weight", self._pos_weight, prediction)
        if self._weight is not None:
            per_element = self._spread("weight", self._weight, prediction)
            positive, negative = positive * per_element, negative * per_element
        if (positive + negative < 0).any():
            raise ValueError(f"{self.name}: weights or targets give a term a negative mass, so it is not convex.")
        return _BCETerms(prediction, positive, negative, weight)

    def _spread(self, option: str, values: Tensor, prediction: Tensor) -> Tensor:
        """The values of an option over the prediction, which they must not tell apart by datum."""
        values = values.to(prediction.device, torch.float32 if prediction.dtype != torch.float64 else torch.float64)
        if values.ndim >= prediction.ndim and values.ndim > 0 and values.shape[0] != 1:
            raise NotImplementedError(
                f"{self.name}: a {option} of shape {list(values.shape)} differs from datum to datum, so it has no "
                "meaning when data are cut into other batches. Weigh data with weight_fn."
            )
        try:
            return values.broadcast_to(prediction.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self.name}: {option} of shape {list(values.shape)} does not fit predictions of shape "
                f"{list(prediction.shape)}."
            ) from error


class _BCETerms(Terms):
    def __init__(self, prediction: Tensor, positive: Tensor, negative: Tensor, weight: Tensor | None) -> None:
        super().__init__(prediction, channels_last_axis(prediction))
        scale = per_row(weight, self.rows)
        self._positive = self.to_rows(positive.unsqueeze(-1)).squeeze(-1) * scale
        self._mass = self._positive + self.to_rows(negative.unsqueeze(-1)).squeeze(-1) * scale

    def masses(self) -> Tensor | None:
        return self._mass

    def _probability(self) -> Tensor:
        return self.rows.detach().sigmoid()

    def value(self) -> Tensor:
        negative = self._mass - self._positive
        return -(self._positive * F.logsigmoid(self.rows) + negative * F.logsigmoid(-self.rows)).sum()

    def gradient(self) -> Tensor:
        return self._mass * self._probability() - self._positive

    def _curvature(self) -> Tensor:
        p = self._probability()
        return self._mass * p * (1 - p)

    def hessian_matmat(self, U: Tensor) -> Tensor:
        return self._curvature().unsqueeze(-1) * U

    def hessian_sqrt(self, channel: int) -> Tensor:
        column = torch.zeros_like(self._mass)
        column[..., channel] = self._curvature()[..., channel].sqrt()
        return column

    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        p = check_probability(self._probability()).unsqueeze(-1)
        labels = torch.bernoulli(p.expand(*p.shape[:-1], num_samples), generator=generator)
        return self._mass.sqrt().unsqueeze(-1) * (p - labels)
