"""Inner products of the columns of operators, and sums of squares of their rows, without making them dense.

An operator that knows more about its columns than their products answers by methods of its own, each of which may
return None where it cannot: ``_gram()`` gives UᵀU, ``_cross_gram(V)`` gives UᵀV, and ``_row_squares(weights)`` the
diagonal of U diag(weights) Uᵀ in the shapes of the codomain. What follows from the parts of a node is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvlinops.operators import base
from curvlinops.operators.algebra import Chain, Reshaped, Scaled
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.stack import HStack

#: UᵀV of operators that hold their values, for as long as both are alive.
_KEPT: WeakKeyDictionary[LinearOperator, WeakKeyDictionary[LinearOperator, Tensor]] = WeakKeyDictionary()


def gram(U: LinearOperator) -> Tensor:
    """The Gram matrix UᵀU of the columns of an operator; kept with an operator that holds its values.

    Cost: what U says if it knows its own; else a product with U for each of its R columns, and one with its adjoint
    unless all columns fit into 2²⁶ numbers.

    Args:
        U: The operator, with a domain of R numbers.

    Returns:
        The matrix ``[R, R]``, in float32 at least.

    >>> gram(TensorLinearOperator(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))).tolist()
    [[1.0, 2.0], [2.0, 8.0]]
    """
    return cross_gram(U, U)


def cross_gram(U: LinearOperator, V: LinearOperator) -> Tensor:
    """The matrix UᵀV of inner products between the columns of two operators; see :func:`gram`.

    Args:
        U: The operator from the left, with a domain of R numbers.
        V: The operator from the right, on the same codomain, with a domain of Q numbers.

    Returns:
        The matrix ``[R, Q]``, in float32 at least.

    Raises:
        ValueError: If the codomains differ.

    >>> ones = TensorLinearOperator(torch.ones(2, 1))
    >>> cross_gram(ones, TensorLinearOperator(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))).tolist()
    [[1.0, 4.0]]
    """
    U.codomain.join(V.codomain, "Gram matrix")
    kept = _kept(U, V)
    if kept is not None:
        return kept
    with torch.inference_mode(False), torch.no_grad():
        found = _known_gram(U) if U is V else _known_cross_gram(U, V)
        result = _by_products(U, V) if found is None else found
        # A transposed copy is made block by block, and so is faster than a sum with the transposed view.
        result = result.mT.clone(memory_format=torch.contiguous_format).add_(result).div_(2) if U is V else result
        result = result.to(working_dtype(result.dtype)).detach()
    if U._holds_values and V._holds_values:
        _KEPT.setdefault(U, WeakKeyDictionary())[V] = result
    return result


def row_squares(U: LinearOperator, weights: Tensor) -> list[Tensor]:
    """The diagonal of U diag(w) Uᵀ, or of U W Uᵀ: weighted sums of squares along the rows.

    Cost: what U says if it knows its own; else a product with U for each of its columns, chunked.

    Args:
        U: The operator, with a domain of R numbers.
        weights: The weights ``[R]``, of any sign, or a symmetric matrix ``[R, R]``.

    Returns:
        One tensor for each tensor of the codomain, in its shape, in float32 at least.

    >>> U = TensorLinearOperator(torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
    >>> row_squares(U, torch.tensor([1.0, 0.5]))[0].tolist()
    [3.0, 2.0]
    """
    with torch.inference_mode(False), torch.no_grad():
        found = _known_row_squares(U, weights)
        squares = _row_squares_by_products(U, weights) if found is None else found
        return [square.to(working_dtype(U.dtype)) for square in squares]


# -- what follows from the parts of an operator ------------------------------------------------------------------------


def _kept(U: LinearOperator, V: LinearOperator) -> Tensor | None:
    if U in _KEPT and V in _KEPT[U]:
        return _KEPT[U][V]
    return _KEPT[V][U].T if V in _KEPT and U in _KEPT[V] else None


def _known_gram(U: LinearOperator) -> Tensor | None:
    if isinstance(U, HStack):
        operators = U.operators
        # Blocks below the diagonal are those above, which are computed once.
        blocks = {(i, j): cross_gram(operators[i], operators[j]) for j in range(len(operators)) for i in range(j + 1)}
        order = range(len(operators))
        return torch.cat([torch.cat([blocks[i, j] if i <= j else blocks[j, i].T for j in order], 1) for i in order])
    if isinstance(U, (Scaled, Reshaped)):
        factor = U.factor if isinstance(U, Scaled) else 1.0
        return factor**2 * gram(U.operator)
    combined = _combination(U)
    if combined is not None and _pays_inside(*combined):
        inner, T = combined
        T = T.to(working_dtype(T.dtype))
        return T.T @ gram(inner) @ T
    return U._gram() if hasattr(U, "_gram") else None


def _known_cross_gram(U: LinearOperator, V: LinearOperator) -> Tensor | None:
    found = _from_left(U, V)
    if found is None:
        mirrored = _from_left(V, U)
        found = None if mirrored is None else mirrored.T
    return found


def _from_left(U: LinearOperator, V: LinearOperator) -> Tensor | None:
    """UᵀV as far as it follows from what U is."""
    if isinstance(U, HStack):
        return torch.cat([cross_gram(operator, V) for operator in U.operators])
    if isinstance(U, (Scaled, Reshaped)):
        factor = U.factor if isinstance(U, Scaled) else 1.0
        return factor * cross_gram(U.operator, V)
    combined = _combination(U)
    if combined is not None and (_kept(combined[0], V) is not None or _pays_inside(*combined)):
        inner, T = combined
        return T.T.to(working_dtype(T.dtype)) @ cross_gram(inner, V)
    return U._cross_gram(V) if hasattr(U, "_cross_gram") else None


def _combination(U: LinearOperator) -> tuple[LinearOperator, Tensor] | None:
    """The operator and the small dense matrix that a chain multiplies it with from the right."""
    if not isinstance(U, Chain) or not isinstance(U.factors[-1], TensorLinearOperator):
        return None
    rest = U.factors[:-1]
    return rest[0] if len(rest) == 1 else Chain(rest), U.factors[-1].to_dense()


def _pays_inside(inner: LinearOperator, T: Tensor) -> bool:
    """Whether the Gram matrix of the inner operator costs less than products with each combination of its columns."""
    return T.shape[1] >= T.shape[0] or _knows_its_own(inner)


def _knows_its_own(U: LinearOperator) -> bool:
    if isinstance(U, HStack):
        return all(_knows_its_own(operator) for operator in U.operators)
    if isinstance(U, (Scaled, Reshaped)):
        return _knows_its_own(U.operator)
    return hasattr(U, "_gram") or _kept(U, U) is not None


def _known_row_squares(U: LinearOperator, weights: Tensor) -> list[Tensor] | None:
    if isinstance(U, HStack) and weights.ndim == 1:
        parts = weights.split([operator.shape[1] for operator in U.operators])
        flat = [_flat(row_squares(operator, part)) for operator, part in zip(U.operators, parts, strict=True)]
        return U.codomain.shaped(torch.stack(flat).sum(0))
    if isinstance(U, (Scaled, Reshaped)):
        factor = U.factor if isinstance(U, Scaled) else 1.0
        return U.codomain.shaped(factor**2 * _flat(row_squares(U.operator, weights)))
    combined = _combination(U)
    if combined is not None:
        T = combined[1].to(weights.dtype)
        U, weights = combined[0], T * weights @ T.T if weights.ndim == 1 else T @ weights @ T.T
    return U._row_squares(weights) if hasattr(U, "_row_squares") else None


def _flat(entries: list[Tensor]) -> Tensor:
    return torch.cat([entry.flatten() for entry in entries])


# -- by products -------------------------------------------------------------------------------------------------------


def _columns(U: LinearOperator, T: Tensor | None = None) -> Iterator[Tensor]:
    """The columns of U, or of U T, as flat chunks ``[D, k]`` within the cap on held numbers."""
    chunk = max(1, base._DENSE_CHUNK_NUMEL // max(*U.shape, 1))
    units = base.unit_columns(U.domain, chunk) if T is None else T.to(U.dtype).split(chunk, 1)
    for columns in units:
        yield Space.merge(U._matmat(U.domain.split(columns))).to(working_dtype(U.dtype))


def _by_products(U: LinearOperator, V: LinearOperator) -> Tensor:
    if 0 in (U.shape[1], V.shape[1]):
        return torch.zeros(U.shape[1], V.shape[1], dtype=working_dtype(U.dtype), device=U.device)
    if U is V and U.shape[0] * U.shape[1] <= base._DENSE_CHUNK_NUMEL:
        (Y,) = _columns(U)
        return Y.T @ Y
    return torch.cat([_transposed_product(U, Y) for Y in _columns(V)], 1)


def _transposed_product(U: LinearOperator, Y: Tensor) -> Tensor:
    """UᵀY; in half precision from the columns of U, since the adjoint would round each inner product."""
    if working_dtype(U.dtype) != U.dtype:
        return torch.cat([Z.T @ Y for Z in _columns(U)])
    return Space.merge(U._rmatmat(U.codomain.split(Y)))


def _row_squares_by_products(U: LinearOperator, weights: Tensor) -> list[Tensor]:
    total = torch.zeros(U.shape[0], dtype=working_dtype(U.dtype), device=U.device)
    if weights.numel() == 0:
        return U.codomain.shaped(total)
    T = None
    if weights.ndim == 2:
        weights, T = torch.linalg.eigh(weights.double())
    start = 0
    for Y in _columns(U, T):
        total += Y.square() @ weights[start : start + Y.shape[1]].to(Y.dtype)
        start += Y.shape[1]
    return U.codomain.shaped(total)
