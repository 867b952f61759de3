"""Cross-entropy: ℓ = -Σ_c q_c log p_c with p = softmax(f); class weights, masks and smoothing all sit in q ≥ 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from curvlinops.risk.losses.base import Loss, Terms, at_least_float32, check_probability, total_weight


class CrossEntropy(Loss):
    """``nn.CrossEntropyLoss``: predictions ``[N, C]`` or ``[N, C, d...]``, class indices or probabilities."""

    name = "CrossEntropyLoss"

    def __init__(self, module: nn.CrossEntropyLoss) -> None:
        self.reduction = module.reduction
        self._class_weight = module.weight
        self._ignore_index = module.ignore_index
        self._smoothing = module.label_smoothing

    def _mean_denominator(self, y: Any, weight: Tensor | None, num_data: int | None) -> Tensor:
        self._check_target(y)
        if y.is_floating_point():
            return total_weight(weight, len(y)) * float(y.shape[2:].numel())
        counted = self._label_weights(y, torch.float64)
        if weight is None:
            return counted.sum()
        return (weight.double() * counted.reshape(len(counted), -1).sum(1)).sum()

    def num_positions(self, y: Any) -> int | None:
        """Positions of a datum; see :meth:`Loss.num_positions`."""
        self._check_target(y)
        return int(y.shape[2:].numel() if y.is_floating_point() else y.shape[1:].numel())

    def terms(self, prediction: Tensor, y: Any, weight: Tensor | None) -> Terms:
        """Terms of one mini-batch; see :meth:`Loss.terms`."""
        self._check_target(y)
        if prediction.ndim < 2:
            raise ValueError(
                f"{self.name}: expected a prediction [N, C] or [N, C, d...], got shape {list(prediction.shape)}."
            )
        expected = prediction.shape if y.is_floating_point() else prediction.shape[:1] + prediction.shape[2:]
        if y.shape != expected:
            kind = "class probabilities" if y.is_floating_point() else "class indices"
            raise ValueError(
                f"{self.name}: expected {kind} of shape {list(expected)} for predictions of shape "
                f"{list(prediction.shape)}, got {list(y.shape)}."
            )
        return _CrossEntropyTerms(self, prediction, y, weight)

    def _check_target(self, y: Any) -> None:
        if not isinstance(y, Tensor) or y.ndim == 0 or y.dtype == torch.bool:
            raise ValueError(
                f"{self.name}: expected a tensor of class indices or probabilities, datum on axis 0, got {y!r:.80}."
            )

    def weights_of_classes(self, num_classes: int, like: Tensor) -> Tensor:
        """Weight of each class ``[C]``, ones without an option of that name."""
        if self._class_weight is None:
            return torch.ones(num_classes, dtype=like.dtype, device=like.device)
        if self._class_weight.shape != (num_classes,):
            raise ValueError(
                f"{self.name}: weight has shape {list(self._class_weight.shape)}, the prediction {num_classes} classes."
            )
        return self._class_weight.to(like.device, like.dtype)

    def _label_weights(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight of each target's class, 0 where the target is ignored."""
        kept = y != self._ignore_index
        if self._class_weight is None:
            return kept.to(dtype)
        return self._class_weight.to(y.device, dtype)[torch.where(kept, y, 0).long()] * kept

    def target_mass(self, y: Tensor, rows: Tensor) -> TargetMass:
        """The mass that targets put on the classes, in rows."""
        class_weights = self.weights_of_classes(rows.shape[-1], rows)
        spread = self._smoothing / rows.shape[-1]
        if y.is_floating_point():
            soft = y.flatten(2).movedim(1, -1) if y.ndim > 2 else y.unsqueeze(1)
            dense = class_weights * ((1 - self._smoothing) * soft.to(rows.dtype) + spread)
            return TargetMass(dense=dense)
        y = y.reshape(rows.shape[:-1])
        kept = y != self._ignore_index
        label = torch.where(kept, y, 0).long()
        outside = kept & ((label < 0) | (label >= rows.shape[-1]))
        if outside.any():
            raise ValueError(
                f"{self.name}: class index {int(label[outside][0])} is outside of 0..{rows.shape[-1] - 1} "
                f"and is not ignore_index={self._ignore_index}."
            )
        on_label = (1 - self._smoothing) * class_weights[label] * kept
        smooth = (spread * class_weights).expand_as(rows) * kept.unsqueeze(-1) if self._smoothing > 0 else None
        return TargetMass(dense=smooth, label=label, on_label=on_label)


class TargetMass:
    """q ``[N, T, C]``, kept as a number on the label where that says it all."""

    def __init__(
        self, dense: Tensor | None = None, label: Tensor | None = None, on_label: Tensor | None = None
    ) -> None:
        self._dense, self._label, self._on_label = dense, label, on_label

    def weighted(self, weight: Tensor | None) -> TargetMass:
        """The mass times the weight of each datum ``[N]``."""
        if weight is None:
            return self
        dense = None if self._dense is None else self._dense * weight.to(self._dense.dtype).reshape(-1, 1, 1)
        on_label = None if self._on_label is None else self._on_label * weight.to(self._on_label.dtype).unsqueeze(-1)
        return TargetMass(dense, self._label, on_label)

    def total(self) -> Tensor:
        """M = Σ_c q_c ``[N, T]``."""
        parts = [self._on_label] if self._dense is None else [self._dense.sum(-1), self._on_label]
        return torch.stack([part for part in parts if part is not None]).sum(0)

    def subtract_from(self, rows: Tensor) -> Tensor:
        """Rows minus q."""
        result = rows.clone() if self._dense is None else rows - self._dense
        if self._label is not None and self._on_label is not None:
            result.scatter_add_(-1, self._label.unsqueeze(-1), -self._on_label.unsqueeze(-1))
        return result

    def inner(self, rows: Tensor) -> Tensor:
        """Σ q · rows, differentiable in the rows."""
        total = rows.new_zeros(())
        if self._dense is not None:
            total = total + (self._dense * rows).sum()
        if self._label is not None and self._on_label is not None:
            # where() keeps an infinite log-probability of an ignored row out of the sum.
            picked = rows.gather(-1, self._label.unsqueeze(-1)).squeeze(-1)
            total = total + torch.where(self._on_label != 0, self._on_label * picked, 0.0).sum()
        return total


class _CrossEntropyTerms(Terms):
    def __init__(self, loss: CrossEntropy, prediction: Tensor, y: Tensor, weight: Tensor | None) -> None:
        super().__init__(prediction, channels_axis=1)
        mass = loss.target_mass(y, self.rows.detach())
        self._mass = mass.weighted(weight)
        self._total = self._mass.total()
        if (self._total < 0).any():
            raise ValueError(f"{loss.name}: weights or targets give a term a negative mass, so it is not convex.")
        # Published Monte-Carlo figures draw from the softmax of the prediction as it stands.
        self._probability = at_least_float32(prediction.detach()).softmax(1)
        # The numbers that multinomial draws depend on the order in memory, hence one order for all.
        self._probability = self.to_rows(self._probability.unsqueeze(-1)).squeeze(-1).contiguous()

    def masses(self) -> Tensor | None:
        return self._total.unsqueeze(-1)

    def value(self) -> Tensor:
        return -self._mass.inner(self.rows.log_softmax(-1))

    def gradient(self) -> Tensor:
        return self._mass.subtract_from(self._total.unsqueeze(-1) * self._probability)

    def hessian_matmat(self, U: Tensor) -> Tensor:
        p = self._probability.unsqueeze(-1)
        pU = p * U
        return self._total[..., None, None] * (pU - p * pU.sum(2, keepdim=True))

    def hessian_sqrt(self, channel: int) -> Tensor:
        p = self._probability
        root = (self._total * p[..., channel]).sqrt().unsqueeze(-1)
        column = -root * p
        column[..., channel] += root.squeeze(-1)
        return column

    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        p = check_probability(self._probability)
        num_data, positions, channels = p.shape
        labels = torch.multinomial(p.reshape(-1, channels), num_samples, replacement=True, generator=generator)
        labels = labels.reshape(num_data, positions, 1, num_samples)
        samples = p.unsqueeze(-1).repeat(1, 1, 1, num_samples)
        samples.scatter_add_(2, labels, torch.full_like(labels, -1.0, dtype=p.dtype))
        return self._total.sqrt()[..., None, None] * samples
