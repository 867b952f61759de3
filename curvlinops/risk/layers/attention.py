"""Multi-head attention taken apart into linear layers that can be noted."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def multi_head_attention(
    linear: Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """`F.multi_head_attention_forward` with its projections made by the given function.

    Returns:
        The output and the attention weights, or ``None`` for options that are left to the original.
    """
    unusual = (bias_k, bias_v, static_k, static_v)
    if any(t is not None for t in unusual) or add_zero_attn or (training and dropout_p > 0):
        return None
    if use_separate_proj_weight or in_proj_weight is None or not (query is key and key is value) or query.ndim != 3:
        return None
    if is_causal and attn_mask is None:
        return None  # an error in the original
    length, num_data, width = query.shape
    # Without weights to show, the original takes the hint's word for what the mask is.
    by_hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if by_hint else _mask(attn_mask, key_padding_mask, num_data, num_heads, query.dtype)
    projected = linear(query, in_proj_weight, in_proj_bias)
    heads = projected.reshape(length, num_data, 3, num_heads, width // num_heads)
    q, k, v = heads.permute(2, 1, 3, 0, 4)
    if need_weights:
        weights = q * sqrt(1.0 / q.shape[-1]) @ k.mT
        weights = torch.softmax(weights if mask is None else weights + mask, -1)
        mixed, shown = weights @ v, weights.mean(1) if average_attn_weights else weights
    else:
        mixed, shown = F.scaled_dot_product_attention(q, k, v, mask, 0.0, by_hint), None
    rows = mixed.permute(2, 0, 1, 3).reshape(length * num_data, width)
    output = linear(rows, out_proj_weight, out_proj_bias).reshape(length, num_data, -1)
    return output, shown


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_data: int, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one addend that broadcasts to ``[N, heads, length, length]``."""
    mask = None
    if attn_mask is not None:
        mask = _as_addend(attn_mask, dtype)
        mask = mask if mask.ndim == 2 else mask.reshape(num_data, num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _as_addend(key_padding_mask, dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _as_addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
