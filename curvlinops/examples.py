"""Small operators and helpers that scripts import as ``curvlinops.examples``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import IdentityLinearOperator
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.losses import as_loss
from curvlinops.risk.model import FunctionalModel, Parameters

__all__ = ["IdentityLinearOperator", "OuterProductLinearOperator", "TensorLinearOperator", "gradient_and_loss"]


class OuterProductLinearOperator(LinearOperator):
    r"""The low-rank matrix :math:`\sum_k c_k a_k a_k^\top`.

    Cost: O(D · K) a product.

    Args:
        c: Coefficients ``[K]``.
        A: Vectors as columns ``[D, K]``.

    >>> A = OuterProductLinearOperator(torch.tensor([2.0]), torch.tensor([[1.0], [3.0]]))
    >>> A.to_dense().tolist()
    [[2.0, 6.0], [6.0, 18.0]]
    """

    SELF_ADJOINT = True

    def __init__(self, c: Tensor, A: Tensor) -> None:
        if A.ndim != 2 or c.shape != A.shape[1:]:
            raise ValueError(f"Expected c [K] and A [D, K], got {list(c.shape)} and {list(A.shape)}.")
        space = Space.flat(A.shape[0], A.dtype, A.device)
        super().__init__(space, space)
        self._c, self._A = c.detach(), A.detach()
        self.POSITIVE_SEMIDEFINITE = bool((c >= 0).all())

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._A @ (self._c.unsqueeze(-1) * (self._A.T @ X[0]))]


def gradient_and_loss(
    model_func: Callable[..., Any],
    loss_func: Callable[[Tensor, Any], Tensor],
    params: Parameters,
    data: Iterable[Any],
    batch_size_fn: Callable[[Any], int] | None = None,
    num_data: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The gradient and the value of the loss over the whole data set.

    Cost: one forward and one backward.

    Args:
        model_func: The model.
        loss_func: The loss.
        params: The parameters.
        data: Mini-batches (X, y).
        batch_size_fn: Number of data in X, where it cannot be seen.
        num_data: Number of data; a mismatch is an error.

    Returns:
        List of tensors in the shapes of the parameters, and a tensor without axes.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> gradient, loss = gradient_and_loss(
    ...     model, torch.nn.MSELoss(), list(model.parameters()), [(torch.zeros(3, 2), torch.ones(3, 1))]
    ... )
    >>> loss.item(), gradient[0].tolist()
    (1.0, [[0.0, 0.0]])
    """
    with torch.inference_mode(False):
        risk = EmpiricalRisk(
            FunctionalModel(model_func, params),
            as_loss(loss_func),
            data,
            name="gradient_and_loss",
            batch_size_fn=batch_size_fn,
            num_data=num_data,
        )
        return risk.gradient_and_loss()
