"""What every loss gives: a denominator, and terms over the rows of a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Generator, Tensor


class Loss(ABC):
    """A loss of a whole data set: Σ_n ℓ_n, divided by a denominator when its reduction is 'mean'.

    Attributes:
        name: What error messages call it.
        reduction: ``"mean"`` or ``"sum"``.
        is_known: Whether its terms are known one by one, so that Fisher matrices exist.
        is_convex: Whether ∇²_f ℓ is positive semi-definite.
    """

    name: str
    reduction: str
    is_known: bool = True
    is_convex: bool = True

    def require_known(self, what: str) -> None:
        """Refuse what needs the loss's terms one by one, where they are not known."""
        if not self.is_known:
            raise NotImplementedError(
                f"{what} needs a loss whose terms are known; {self.name} is not one, but CrossEntropyLoss, MSELoss and "
                "BCEWithLogitsLoss are. HessianLinearOperator and GGNLinearOperator take any loss."
            )

    def denominator(self, y: Any, weight: Tensor | None, num_data: int | None) -> Tensor:
        """By what a mini-batch's sum is divided under 'mean'; 1 under 'sum'.

        Args:
            y: Targets of the mini-batch.
            weight: Weight of each datum ``[N]``, or ``None``.
            num_data: Number of data in the mini-batch; only losses with unknown terms need it.

        Returns:
            A float64 tensor without axes.
        """
        if self.reduction == "sum":
            return torch.ones((), dtype=torch.float64)
        return self._mean_denominator(y, weight, num_data)

    @abstractmethod
    def _mean_denominator(self, y: Any, weight: Tensor | None, num_data: int | None) -> Tensor: ...

    def num_positions(self, y: Any) -> int | None:
        """Positions of a datum, where they can be told from the targets."""
        return None

    def num_channels(self, y: Any) -> int | None:
        """Channels of a position, where they can be told from the targets."""
        return None

    @abstractmethod
    def terms(self, prediction: Tensor, y: Any, weight: Tensor | None) -> Terms:
        """The terms of one mini-batch.

        Args:
            prediction: Output of the model; its graph is kept for :meth:`Terms.value`.
            y: Targets.
            weight: Weight of each datum ``[N]``, or ``None``.
        """


class Terms(ABC):
    """The loss terms of one mini-batch as functions of the rows f ``[N, T, C]``: datum, position, channel.

    Attributes:
        rows: The prediction's rows, in at least float32.

    Args:
        prediction: The prediction.
        channels_axis: Its axis that holds the channels, ``None`` for one channel.
    """

    def __init__(self, prediction: Tensor, channels_axis: int | None) -> None:
        self._shape = prediction.shape
        self._dtype = prediction.dtype
        self._channels_axis = channels_axis
        self.rows = self.to_rows(prediction.unsqueeze(-1)).squeeze(-1)

    @property
    def num_positions(self) -> int:
        """Positions of a datum, T."""
        return self.rows.shape[1]

    def to_rows(self, U: Tensor) -> Tensor:
        """Columns in the prediction's shape ``[*out, K]`` as rows ``[N, T, C, K]`` in at least float32."""
        num_columns = U.shape[-1]
        U = U.unsqueeze(-2) if self._channels_axis is None else U.movedim(self._channels_axis, -2)
        channels = U.shape[-2]
        positions = U.shape[1:-2].numel()
        return at_least_float32(U.reshape(U.shape[0], positions, channels, num_columns))

    def from_rows(self, R: Tensor) -> Tensor:
        """Rows ``[N, T, C, K]`` as columns in the prediction's shape and dtype ``[*out, K]``."""
        axis = self._channels_axis
        num_columns = R.shape[-1]
        if axis is None:
            return R.reshape(*self._shape, num_columns).to(self._dtype)
        moved = (*self._shape[:axis], *self._shape[axis + 1 :], self._shape[axis], num_columns)
        return R.reshape(moved).movedim(-2, axis).to(self._dtype)

    @abstractmethod
    def masses(self) -> Tensor | None:
        """By what options and weights multiply each entry's curvature ``[N, T or 1, C or 1]``; ``None`` for one."""

    @abstractmethod
    def value(self) -> Tensor:
        """Σ_n ℓ_n, differentiable in the prediction."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """∇ℓ of each term in its row ``[N, T, C]``."""

    @abstractmethod
    def hessian_matmat(self, U: Tensor) -> Tensor:
        """∇²ℓ U with U ``[N, T, C, K]``."""

    @abstractmethod
    def hessian_sqrt(self, channel: int) -> Tensor:
        """Column number ``channel`` of the S_n with S_n S_nᵀ = ∇²ℓ_n, in each row ``[N, T, C]``."""

    @abstractmethod
    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        """Would-be gradients s ``[N, T, C, M]`` with E[s sᵀ] = ∇²ℓ_n, from one draw for the whole mini-batch."""


def check_probability(p: Tensor) -> Tensor:
    """Probabilities to draw from, which a prediction that is not finite does not have."""
    if not p.isfinite().all():
        raise FloatingPointError("the prediction is not finite, so there is nothing to draw from.")
    return p


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; the rest stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def per_row(weight: Tensor | None, rows: Tensor) -> Tensor | float:
    """Weights ``[N]`` ready to multiply rows ``[N, T, C]``."""
    return 1.0 if weight is None else weight.to(rows.dtype).reshape(-1, 1, 1)


def total_weight(weight: Tensor | None, num_data: int) -> Tensor:
    """Σ_n w_n, or the number of data, as a float64 tensor without axes."""
    return torch.tensor(float(num_data), dtype=torch.float64) if weight is None else weight.double().sum()


def check_same_shape(name: str, prediction: Tensor, y: Any) -> Tensor:
    """The target as a tensor of the prediction's shape; broadcasting would change the loss unnoticed."""
    if not isinstance(y, Tensor) or y.shape != prediction.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{name}: expected targets of the prediction's shape {list(prediction.shape)}, got {got}.")
    return y.to(at_least_float32(prediction).dtype)
