"""Products with the Fisher matrix of one auxiliary batch, exact and at the scale of a mean over its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvlinops import GGNLinearOperator, HessianLinearOperator
from curvlinops.applications.fishleg.likelihoods import Likelihood
from curvlinops.applications.fishleg.surroundings import own_randomness

Tensors = dict[str, Tensor]
Product = Callable[[Tensors], Tensors]


class BatchCurvature(Protocol):
    """A curvature matrix that is told on which batch.

    Attributes:
        is_positive: Whether it is positive semi-definite on every batch.
    """

    is_positive: bool

    def on(self, X: Any, y: Any, seed: int) -> Product:
        """Its products on a batch of inputs and drawn labels; they hold until the next call.

        Args:
            X: Inputs.
            y: Labels.
            seed: Seed of the model's own random numbers, such as dropout: the same in all products.
        """


class GaussNewton:
    r"""The Fisher matrix :math:`\frac1N \sum_n J_n^\top F_n J_n` with the likelihood's own :math:`F_n`.

    **Cost** of a product: that of one with a ``GGNLinearOperator``.

    Args:
        model: The network.
        likelihood: The likelihood of its predictions.
        params: The parameters.
    """

    is_positive = True

    def __init__(self, model: nn.Module, likelihood: Likelihood, params: Mapping[str, Tensor]) -> None:
        self._likelihood = likelihood
        self._device = next(iter(params.values())).device
        self._batches: list[Any] = []
        self._sum_over_data = GGNLinearOperator(
            model, likelihood.loss_func, dict(params), self._batches, check_deterministic=False
        )

    def on(self, X: Any, y: Any, seed: int) -> Product:
        """Its products on a batch; of the labels only the shape matters."""
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) == 0:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"draw: expected labels as a tensor with a row for each datum, got {got}.")
        self._batches[:] = [(X, y)]
        with torch.no_grad():
            scale = float(self._likelihood.loss_scale) / len(y)

        def product(v: Tensors) -> Tensors:
            with own_randomness(seed, self._device):
                return {name: scale * entry for name, entry in (self._sum_over_data @ v).items()}

        return product


class DrawnHessian:
    r"""The Hessian B of the negative log-likelihood of drawn labels, whose mean over draws is the Fisher matrix.

    **Cost** of a product: that of one with a ``HessianLinearOperator``.

    Args:
        model: The network.
        nll: The negative log-likelihood ``nll(model, (X, y))``, a mean over data.
        params: The parameters.
    """

    is_positive = False

    def __init__(self, model: nn.Module, nll: Callable[..., Tensor], params: Mapping[str, Tensor]) -> None:
        self._batches: list[Any] = []
        self._seed = 0
        device = next(iter(params.values())).device

        def value(data: Any) -> Tensor:
            # Each forward draws the same numbers: products that compare several are of one function.
            with own_randomness(self._seed, device):
                return scalar_of(nll(model, data), "nll").reshape(1)

        self._value, self._params, self._is_checked = value, list(params.values()), False
        self._hessian = HessianLinearOperator(
            value, _total, dict(params), self._batches, check_deterministic=False, batch_size_fn=_one
        )

    def on(self, X: Any, y: Any, seed: int) -> Product:
        """Its products on a batch."""
        self._batches[:] = [((X, y), torch.zeros(1))]
        self._seed = seed
        if not self._is_checked:
            self._check_dependence((X, y))
            self._is_checked = True
        return lambda v: self._hessian @ v

    def _check_dependence(self, data: Any) -> None:
        """Refuse a function of other parameters, such as those of a copy of the model, whose Hessian here is zero."""
        with torch.enable_grad():
            value = self._value(data)
            of_params = torch.autograd.grad(value, self._params, allow_unused=True) if value.requires_grad else [None]
        if all(gradient is None for gradient in of_params):
            raise ValueError(
                "nll: its value does not depend on the parameters of the model. Compute it from the model that nll is "
                "called with, not from another or a copy, and without .detach() or torch.no_grad()."
            )


def scalar_of(value: Any, what: str) -> Tensor:
    """What a user's loss returned, if it is a tensor of one number."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what}: expected a tensor of one number, the mean over the data, got {got}.")
    return value


def _total(value: Tensor, _: Tensor) -> Tensor:
    return value.sum()


def _one(_: Any) -> int:
    """The batch is one datum to the operator, since its mean has been taken."""
    return 1
