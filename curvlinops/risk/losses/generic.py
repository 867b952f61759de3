"""Any other loss (prediction, y) -> scalar, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor
from torch.autograd import grad

from curvlinops.risk.losses.base import Loss, Terms


class GenericLoss(Loss):
    """A loss whose terms are unknown: mini-batches are weighed by their number of data under 'mean'."""

    is_known = False
    is_convex = False

    def __init__(self, loss_func: Callable[[Tensor, Any], Tensor], reduction: str) -> None:
        self._loss_func = loss_func
        self.reduction = reduction
        self.name = getattr(loss_func, "__name__", type(loss_func).__name__)

    def _mean_denominator(self, y: Any, weight: Tensor | None, num_data: int | None) -> Tensor:
        assert num_data is not None
        return torch.tensor(float(num_data), dtype=torch.float64)

    def terms(self, prediction: Tensor, y: Any, weight: Tensor | None) -> Terms:
        """The loss of one mini-batch as a single function of the prediction."""
        if weight is not None:
            self.require_known("weight_fn")
        return _GenericTerms(self, prediction, y)


class _GenericTerms(Terms):
    """All rows are one term, since nothing says that they do not interact."""

    def __init__(self, loss: GenericLoss, prediction: Tensor, y: Any) -> None:
        self._loss = loss
        self._prediction = prediction
        self._y = y
        # A batch-mean times the number of data is the sum that all other losses give.
        self._factor = prediction.shape[0] if loss.reduction == "mean" else 1
        self._gradient: tuple[Tensor, Tensor] | None = None

    @property
    def num_positions(self) -> int:
        return 1

    def to_rows(self, U: Tensor) -> Tensor:
        return U

    def from_rows(self, R: Tensor) -> Tensor:
        return R.to(self._prediction.dtype)

    def _evaluate(self, prediction: Tensor) -> Tensor:
        value = self._loss._loss_func(prediction, self._y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"Loss {self._loss.name}: expected a scalar, got {got}.")
        return value.reshape(()) * self._factor

    def masses(self) -> Tensor | None:
        return None

    def value(self) -> Tensor:
        return self._evaluate(self._prediction)

    def hessian_matmat(self, U: Tensor) -> Tensor:
        with torch.enable_grad():
            if self._gradient is None:
                f = self._prediction.detach().requires_grad_()
                value = self._evaluate(f)
                self._gradient = f, grad(value, f, create_graph=True)[0] if value.requires_grad else torch.zeros_like(f)
            f, gradient = self._gradient
            if not gradient.requires_grad:
                return torch.zeros_like(U)
            columns = [grad(gradient, f, u.to(f.dtype), retain_graph=True, allow_unused=True)[0] for u in U.unbind(-1)]
        return torch.stack([torch.zeros_like(f) if c is None else c for c in columns], -1)

    def _refuse(self, what: str) -> NoReturn:
        self._loss.require_known(what)
        raise AssertionError("A generic loss is never known.")

    def gradient(self) -> Tensor:
        self._refuse("The empirical Fisher")

    def hessian_sqrt(self, channel: int) -> Tensor:
        self._refuse("A diagonal")

    def sample_gradients(self, num_samples: int, generator: Generator) -> Tensor:
        self._refuse("Monte-Carlo sampling")
