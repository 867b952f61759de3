"""Exact quantities of any square operator, by products with all unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator, unit_columns


def exact_diagonal(A: LinearOperator) -> Tensor:
    """The diagonal of a square operator, by products with all unit vectors, chunked.

    Cost: D products, at most 2²⁶ numbers of unit vectors at once. Closed forms answer at once.

    Args:
        A: A square operator.

    Returns:
        The diagonal ``[D]``.

    >>> from curvlinops import TensorLinearOperator
    >>> exact_diagonal(TensorLinearOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))).tolist()
    [1.0, 4.0]
    """
    A._require_square("exact_diagonal")
    if hasattr(A, "diagonal"):
        try:
            return A.diagonal()  # type: ignore[no-any-return]
        except NotImplementedError:
            pass  # a block without a closed form
    parts, start = [], 0
    for units in unit_columns(A.domain):
        stop = start + units.shape[1]
        parts.append((A @ units)[start:stop].diagonal().clone())
        start = stop
    return torch.cat(parts)


def exact_trace(A: LinearOperator) -> Tensor:
    """The trace of a square operator, by products with all unit vectors; see :func:`exact_diagonal`.

    Args:
        A: A square operator.

    Returns:
        The trace, a tensor without axes.

    >>> from curvlinops import IdentityLinearOperator
    >>> exact_trace(IdentityLinearOperator([(2, 3), (4,)], "cpu", torch.float64)).item()
    10.0
    """
    return exact_diagonal(A).sum()
