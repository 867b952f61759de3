"""The function ½ δᵀ F δ with gradient F δ, for an operator F."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from curvlinops import Diagonal, LinearOperator


def half_quadratic(delta: Tensor, F: LinearOperator) -> Tensor:
    r"""The number :math:`\tfrac{1}{2} \delta^\top F \delta`, differentiable in δ as often as one likes.

    Forward mode and ``vmap`` need a :class:`Diagonal`.

    **Cost**: one product with F, which its gradient uses again; each derivative beyond that one more.

    Args:
        delta: A flat vector ``[D]``.
        F: A symmetric operator, in the dtype of δ or in half precision; it is not differentiated.

    Returns:
        A tensor without axes, in the dtype of δ.

    >>> from curvlinops import TensorLinearOperator
    >>> delta = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> value = half_quadratic(delta, TensorLinearOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]])))
    >>> value.item(), torch.autograd.grad(value, delta)[0].tolist()
    (3.0, [3.0, 3.0])
    """
    if isinstance(F, Diagonal):  # plain arithmetic, which forward mode and compilers take, too
        return 0.5 * (F.diagonal() * delta.square()).sum()
    value: Tensor = _HalfQuadratic.apply(delta, F)[0]  # type: ignore[no-untyped-call]
    return value


def _times(F: LinearOperator, delta: Tensor) -> Tensor:
    # A loss is often computed under autocast, whose half precision is not for this.
    with torch.autocast(delta.device.type, enabled=False):
        product: Tensor = F @ delta.detach().to(F.dtype)
    return product.to(delta.dtype)


class _HalfQuadratic(Function):
    """½ δᵀ F δ, and F δ for its gradient."""

    @staticmethod
    def forward(delta: Tensor, F: LinearOperator) -> tuple[Tensor, Tensor]:
        product = _times(F, delta)
        return 0.5 * (delta * product).sum(), product  # `@` would be rounded under autocast, as in _times

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, LinearOperator], output: tuple[Tensor, Tensor]) -> None:
        delta, ctx.F = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(delta, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        delta, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to differentiate the gradient
            product = _Product.apply(delta, ctx.F)  # type: ignore[no-untyped-call]
        return gradient * product, None


class _Product(Function):
    """F δ for a symmetric F."""

    @staticmethod
    def forward(delta: Tensor, F: LinearOperator) -> Tensor:
        return _times(F, delta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, LinearOperator], output: Tensor) -> None:
        ctx.F = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result: Tensor = _Product.apply(gradient, ctx.F)  # type: ignore[no-untyped-call]
        return result, None
