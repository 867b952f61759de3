"""Products of one matrix for each group with columns of matrices for each group."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(M: Tensor, X: Tensor) -> Tensor:
    """M X for matrices ``[G, n, n]`` and ``[K, G, n, S]``, without a copy of M for each of the K."""
    num, groups, size, columns = X.shape
    if num == groups == 1:
        return torch.mm(M[0], X[0, 0]).reshape(1, 1, size, columns)
    if groups == 1:
        return torch.matmul(M[0], X[:, 0]).unsqueeze(1)
    if num == 1:
        return torch.bmm(M, X[0]).unsqueeze(0)
    wide = X.permute(1, 2, 0, 3).reshape(groups, size, num * columns)
    return torch.bmm(M, wide).reshape(groups, size, num, columns).permute(2, 0, 1, 3)


def multiply_from_right(X: Tensor, M: Tensor) -> Tensor:
    """X M for ``[K, G, R, n]`` and matrices ``[G, n, n]``, without a copy of M for each of the K."""
    num, groups, rows, size = X.shape
    if num == groups == 1:
        return torch.mm(X[0, 0], M[0]).reshape(1, 1, rows, size)
    if groups == 1:
        return torch.matmul(X[:, 0], M[0]).unsqueeze(1)
    if num == 1:
        return torch.bmm(X[0], M).unsqueeze(0)
    tall = X.transpose(0, 1).reshape(groups, num * rows, size)
    return torch.bmm(tall, M).reshape(groups, num, rows, size).transpose(0, 1)
