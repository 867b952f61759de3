"""Operators as products of flat columns ``[D, K]``, in the precision that iterations need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import working_dtype as working_dtype

#: Maps columns ``[D, K]`` to the product with a matrix.
Product = Callable[[Tensor], Tensor]


def prepared(operator: LinearOperator) -> LinearOperator:
    """The operator ready for many products; itself where its model cannot be frozen (it closes over its parameters)."""
    try:
        return operator.linearize()
    except NotImplementedError:
        return operator


def flat_product(factor: LinearOperator | Product, dtype: torch.dtype, name: str = "A") -> Product:
    """The product with an operator, or with a user's function, from and to the working dtype.

    Args:
        factor: An operator, or a function of ``[D, K]``.
        dtype: The dtype that the factor wants.
        name: How errors call it.
    """
    multiply = factor.__matmul__ if isinstance(factor, LinearOperator) else factor
    rows = factor.shape[0] if isinstance(factor, LinearOperator) else None
    work = working_dtype(dtype)

    def product(X: Tensor) -> Tensor:
        result: Tensor = multiply(X.to(dtype))
        expected = [X.shape[0] if rows is None else rows, X.shape[1]]
        if not isinstance(result, Tensor) or list(result.shape) != expected:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{name}: expected a tensor of shape {expected}, got {got}.")
        return result.to(work)

    return product
