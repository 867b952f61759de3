"""Forward-mode rules of our own, where PyTorch's are missing, disagree with reverse mode, or cost more than they need.

Between the layers, PyTorch pushes tangents by its own formulas. While the same forward records the graph for `pull`,
these formulas are recorded as well, although nobody differentiates them. The rules here compute the tangents of the
expensive layers outside of the graph, which cuts every recorded chain of tangents short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from curvlinops.risk.surroundings import any_attention_kernel


class TooLargeError(RuntimeError):
    """A forward that holds more than it may."""


class TangentRules(TorchFunctionMode):
    """Applies the rules to the calls they are for, while it is active inside of a dual level.

    Args:
        max_bytes: Bytes that what the calls return may add up to.

    Raises:
        TooLargeError: If it adds up to more.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        super().__init__()
        self._bytes_left = max_bytes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = None if rule is None else rule(func, *args, **(kwargs or {}))
        if result is None:
            result = func(*args, **(kwargs or {}))
        if self._bytes_left is not None and isinstance(result, Tensor) and not result._is_view():
            self._bytes_left -= result.numel() * result.element_size()
            if self._bytes_left < 0:
                raise TooLargeError("The activations of this mini-batch are too large to be held with their tangents.")
        return result


def _unpack(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A tensor and its tangent, either of which may be missing."""
    if tensor is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(tensor, level=0)
    return primal, tangent


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(primal, tangent, level=0)
    return dual


def _embedding(
    func: Any, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """Rows at `padding_idx` are constants, as they are in reverse mode."""
    if padding_idx is None:
        return None
    result: Tensor = func(input, weight, padding_idx, *args, **kwargs)
    primal, tangent = _unpack(result)
    if primal is None or tangent is None:
        return result
    is_padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return _dual(primal, tangent.masked_fill(is_padding, 0.0))


def _torch_embedding(
    func: Any, weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any
) -> Tensor | None:
    """The function behind `F.embedding`, where -1 stands for no padding."""
    if padding_idx < 0:
        return None
    return _embedding(lambda i, w, p: func(w, i, p, *args, **kwargs), indices, weight, padding_idx)


def _affine(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """Layers that are linear in the input and affine in (weight, bias): fully connected and convolutional."""
    (x, dx), (W, dW), (b, db) = _unpack(input), _unpack(weight), _unpack(bias)
    assert x is not None and W is not None
    if dx is None and dW is None:
        return None
    primal: Tensor = func(x, W, b, *args, **kwargs)
    with torch.no_grad():
        tangent: Tensor | None = None
        if dW is not None:
            tangent = func(x, dW, db, *args, **kwargs)
        if dx is not None:
            through_input = func(dx, W, db if tangent is None else None, *args, **kwargs)
            tangent = through_input if tangent is None else tangent.add_(through_input)
    assert tangent is not None
    return _dual(primal, tangent)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """As `_affine`, with the second product added onto the first in one go."""
    (x, dx), (W, dW), (b, db) = _unpack(input), _unpack(weight), _unpack(bias)
    assert x is not None and W is not None
    if dx is None or dW is None or W.ndim != 2:
        return _affine(func, input, weight, bias)
    primal: Tensor = func(x, W, b)
    with torch.no_grad():
        tangent: Tensor = func(x, dW, db)
        tangent.view(-1, W.shape[0]).addmm_(dx.reshape(-1, W.shape[1]), W.mT)
    return _dual(primal, tangent)


def _layer_norm(
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Y = z ⊙ w + b with z = (x - mean) / deviation, whose tangent is that of x less its parts along 1 and z."""
    (x, dx), (w, dw), (b, db) = _unpack(input), _unpack(weight), _unpack(bias)
    assert x is not None
    if dx is None and dw is None:
        return None
    primal: Tensor = func(x, normalized_shape, w, b, eps)
    with torch.no_grad():
        z, mean, inverse_deviation = torch.native_layer_norm(x, list(normalized_shape), None, None, eps)
        tangent = torch.zeros_like(z)
        if dx is not None:
            # The Jacobian of x -> z is symmetric, so that the kernel for its transpose serves.
            tangent = torch.ops.aten.native_layer_norm_backward(
                dx, x, list(normalized_shape), mean, inverse_deviation, None, None, [True, False, False]
            )[0]
        if w is not None:
            tangent = tangent * w if db is None else torch.addcmul(db, tangent, w)
        elif db is not None:
            tangent = tangent + db
        if dw is not None:
            tangent = torch.addcmul(tangent, z, dw)  # not in place, which vmap would do column by column
    return _dual(primal, tangent)


def _attention(
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention by any kernel; its tangent dP V + P dV with P = softmax(Q Kᵀ) formed once, outside of the graph."""
    mask, dmask = _unpack(attn_mask)
    if dropout_p > 0 or enable_gqa or dmask is not None:
        return None
    (q, dq), (k, dk), (v, dv) = _unpack(query), _unpack(key), _unpack(value)
    assert q is not None and k is not None and v is not None
    if dq is None and dk is None and dv is None:
        return None
    factor = 1 / sqrt(q.shape[-1]) if scale is None else scale
    with any_attention_kernel():
        primal: Tensor = func(q, k, v, mask, 0.0, is_causal, scale=scale)
    with torch.no_grad():
        scaled = q * factor
        P = _attention_weights(scaled, k, mask, is_causal)
        scores = _sum_of_products(None if dq is None else (dq * factor, k.mT), None if dk is None else (scaled, dk.mT))
        # The Jacobian of softmax is symmetric, so that the kernel for its transpose serves.
        dP = None if scores is None else torch.ops.aten._softmax_backward_data(scores, P, -1, P.dtype)
        tangent = _sum_of_products(None if dv is None else (P, dv), None if dP is None else (dP, v))
    assert tangent is not None
    return _dual(primal, tangent)


def _attention_weights(scaled_query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    scores = scaled_query @ key.mT
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill_(future, -torch.inf).softmax(-1)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query that may look nowhere gets zeros, as in PyTorch's kernels.
    return scores.softmax(-1).masked_fill(scores == -torch.inf, 0.0)


def _sum_of_products(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """A B + C D, where either product may be missing, with the second added onto the first in one go."""
    if one is None or other is None:
        A, B = one or other or (None, None)
        return None if A is None or B is None else A @ B
    (A, B), (C, D) = one, other
    if A.ndim < 3 or any(t.shape[:-2] != A.shape[:-2] for t in (B, C, D)):
        return A @ B + C @ D
    total = A @ B
    total.view(-1, *total.shape[-2:]).baddbmm_(C.reshape(-1, *C.shape[-2:]), D.reshape(-1, *D.shape[-2:]))
    return total


def _gelu(func: Any, input: Tensor, approximate: str = "none") -> Tensor | None:
    """A product with the derivative, which is expensive and which a tape so finds only once."""
    x, dx = _unpack(input)
    if x is None or dx is None:
        return None
    primal: Tensor = func(x, approximate=approximate)
    derivative = torch.ops.aten.gelu_backward(_one(x), x.detach(), approximate=approximate)
    return _dual(primal, dx * derivative)


def _one(x: Tensor) -> Tensor:
    """Ones like x, made from nothing that depends on tangents, so that what is made of them is a tape's constant."""
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)


def _silu(func: Any, input: Tensor, inplace: bool = False) -> Tensor | None:
    """As `_gelu`."""
    x, dx = _unpack(input)
    if x is None or dx is None or inplace:
        return None
    primal: Tensor = func(x)
    derivative = torch.ops.aten.silu_backward(_one(x), x.detach())
    return _dual(primal, dx * derivative)


_RULES: Mapping[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    F.linear: _linear,
    F.conv1d: _affine,
    F.conv2d: _affine,
    F.conv3d: _affine,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    F.gelu: _gelu,
    F.silu: _silu,
}
