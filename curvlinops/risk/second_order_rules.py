"""Calls that are written so that a graph which is kept costs little to differentiate again and again.

PyTorch computes the second derivatives of activations and of layer norm anew in each backward through a backward, one
elementary operation after the other. Where the graph of a gradient is kept, what does not depend on the vector can be
kept as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad
from torch.overrides import TorchFunctionMode

from curvlinops.risk.graph import nodes_of


class SecondOrderRules(TorchFunctionMode):
    """Replaces calls by ones of the same value and derivatives, while it is active.

    Under hooks for saved tensors nothing is replaced: a block that checkpointing runs again must save the same again.
    Nor is anything inside of a function transform, which would need rules of its own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = None if rule is None else rule(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _can_be_replaced(x: Any) -> bool:
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.dtype in (torch.float32, torch.float64)
    is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return is_plain and x.requires_grad and torch.is_grad_enabled() and not is_hooked and not is_transformed


# ----------------------------------------------------------------- entry by entry


def _activation(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """A function that is applied to each entry."""
    if kwargs.pop("inplace", False) or not _can_be_replaced(input):
        return None
    result: Tensor = _Entrywise.apply(input, lambda x: func(x, *args, **kwargs))  # type: ignore[no-untyped-call]
    return result


class _Entrywise(Function):
    """y = f(x); its gradient is g ⊙ f'(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x, _derivative(f, x))
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, slope = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return g * slope, None
        return _EntrywiseBackward.apply(g, x, slope, ctx.f), None  # type: ignore[no-untyped-call]


class _EntrywiseBackward(Function):
    """(g, x) -> g ⊙ f'(x), whose own gradient for h is (h ⊙ f'(x), h ⊙ g ⊙ f''(x))."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        bend = _derivative(lambda at: _derivative(f, at, g, create_graph=True), x)
        ctx.save_for_backward(slope, bend)
        return g * slope

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        slope, bend = ctx.saved_tensors
        return h * slope, h * bend, None, None


def _derivative(
    f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor | None = None, create_graph: bool = False
) -> Tensor:
    """The product g ⊙ f'(x), with ones for g where it is missing."""
    with torch.enable_grad():
        at = x if create_graph else x.detach().requires_grad_()
        y = f(at)
        (found,) = grad(y, at, torch.ones_like(y) if g is None else g.detach(), create_graph=create_graph)
    return found


# ---------------------------------------------------------------------- layer norm


def _layer_norm(
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Layer norm over the last axis with a scale."""
    if len(normalized_shape) != 1 or input.ndim < 2 or weight is None or input.dtype != weight.dtype:
        return None
    if not _can_be_replaced(input):
        return None
    result: Tensor = _LayerNorm.apply(input, weight, bias, eps)  # type: ignore[no-untyped-call]
    return result


class _LayerNorm(Function):
    """y = z ⊙ w + b with z = s (x - mean); its gradients are s P(g ⊙ w), Σ g ⊙ z and Σ g.

    P(u) = u - mean(u) - z mean(u ⊙ z) is symmetric, s P is the Jacobian of x -> z, and s is one over the deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
        y, mean, s = torch.native_layer_norm(x, [x.shape[-1]], w, b, eps)
        ctx.has_bias = b is not None
        ctx.save_for_backward(x, w, mean, s)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, mean, s = ctx.saved_tensors
        dx, dw, db = (
            _LayerNormBackward.apply(g, x, w, mean, s)  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled()
            else _layer_norm_backward(g, x, w, mean, s)
        )
        return dx, dw, db if ctx.has_bias else None, None


def _layer_norm_backward(g: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, s: Tensor) -> Any:
    mask = [True, w is not None, w is not None]
    return torch.ops.aten.native_layer_norm_backward(g, x, [x.shape[-1]], mean, s, w, w, mask)


class _LayerNormBackward(Function):
    """The gradients of layer norm as functions of g, x and w.

    For cotangents (a, α, β) and q = g ⊙ w, their own gradients are, with means along each row,

    * for g: w ⊙ s P(a) + α ⊙ z + β,
    * for w: Σ g ⊙ s P(a),
    * for x: s P(α ⊙ g - s mean(q ⊙ z) a - s mean(a ⊙ z) q) - s² mean(a ⊙ P(q)) z.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, s: Tensor) -> Any:
        z, q = (x - mean) * s, g * w
        mean_of_qz = (q * z).mean(-1, keepdim=True)
        pq = q - q.mean(-1, keepdim=True) - z * mean_of_qz
        ctx.save_for_backward(g, x, w, mean, s, z, pq, s * mean_of_qz, s * q)
        return _layer_norm_backward(g, x, w, mean, s)

    @staticmethod
    def backward(ctx: Any, a: Tensor, alpha: Tensor, beta: Tensor) -> Any:
        g, x, w, mean, s, z, pq, s_mean_of_qz, sq = ctx.saved_tensors
        spa = _layer_norm_backward(a.contiguous(), x, None, mean, s)[0]
        # Nothing is done in place, since vmap may have made columns of some of these and not of others.
        inner = torch.addcmul(torch.addcmul(alpha * g, s_mean_of_qz, a, value=-1), _row_mean(a, z), sq, value=-1)
        for_x = _layer_norm_backward(inner, x, None, mean, s)[0]
        for_x = torch.addcmul(for_x, _row_mean(a, pq) * s.square(), z, value=-1)
        for_g = torch.addcmul(torch.addcmul(beta, spa, w), alpha, z)
        for_w = (g * spa).sum(list(range(g.ndim - 1)))
        return for_g, for_x, for_w, None, None


def _row_mean(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b).unsqueeze(-1) / a.shape[-1]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- batch norm


def _batch_norm(
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch norm with running statistics and a scale."""
    if training or running_mean is None or running_var is None or weight is None or not _can_be_replaced(input):
        return None
    if len({t.dtype for t in (input, weight, running_mean, running_var)}) > 1:
        return None
    result: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)  # type: ignore[no-untyped-call]
    return result


class _BatchNorm(Function):
    """y = z ⊙ w + b with z = s ⊙ (x - mean) for constant s and mean; its gradients are g ⊙ w ⊙ s, Σ g ⊙ z and Σ g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        s = (variance + eps).rsqrt()
        z = (x - _on_channels(mean, x)).mul_(_on_channels(s, x))
        ctx.has_bias = b is not None
        ctx.save_for_backward(x, z, w, s)
        shift = torch.zeros_like(w) if b is None else b
        return torch.addcmul(_on_channels(shift, x), z, _on_channels(w, x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, z, w, s = ctx.saved_tensors
        backward = _BatchNormBackward.apply if torch.is_grad_enabled() else _batch_norm_backward
        dx, dw, db = backward(g, x, z, w, s)
        return dx, dw, db if ctx.has_bias else None, None, None, None


def _batch_norm_backward(g: Tensor, x: Tensor, z: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return g * _on_channels(w * s, g), _channel_sum(g, z), _channel_sum(g)


class _BatchNormBackward(Function):
    """The gradients of batch norm as functions of g, z and w, where z stands for x.

    For cotangents (a, α, β), their own gradients are a ⊙ w ⊙ s + α ⊙ z + β for g, s ⊙ α ⊙ g for x, and
    s ⊙ Σ a ⊙ g for w.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, z: Tensor, w: Tensor, s: Tensor) -> Any:
        ctx.save_for_backward(g, z, w, s)
        return _batch_norm_backward(g, x, z, w, s)

    @staticmethod
    def backward(ctx: Any, a: Tensor, alpha: Tensor, beta: Tensor) -> Any:
        g, z, w, s = ctx.saved_tensors
        for_g = torch.addcmul(_on_channels(beta, a), a, _on_channels(w * s, a))
        for_g = torch.addcmul(for_g, z, _on_channels(alpha, a))
        return for_g, g * _on_channels(alpha * s, a), None, s * _channel_sum(a, g), None


def _on_channels(v: Tensor, like: Tensor) -> Tensor:
    """A tensor ``[C]`` that is broadcast along ``[N, C, ...]``."""
    return v.reshape(-1, *(1 for _ in like.shape[2:]))


def _channel_sum(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Sums over all axes but the second, of a tensor or of an entrywise product."""
    return (a if b is None else a * b).sum([0, *range(2, a.ndim)])


def are_differentiated(prediction: Tensor) -> bool:
    """Whether the model itself differentiated a call that was replaced: a Hessian then asks for a third derivative.

    What is kept in place of the second derivative is a constant to autograd, so that it would come out wrong.
    """
    second = (_EntrywiseBackward, _LayerNormBackward, _BatchNormBackward)
    return any(getattr(node, "_forward_cls", None) in second for node in nodes_of(prediction))


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.gelu: _activation,
    F.silu: _activation,
    F.mish: _activation,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
}
