"""Operators on some tensors of a larger space, and in another dtype or on another device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlinops.operators.algebra import Node
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal


def embed(operator: LinearOperator, space: Space, names: Sequence[str] | None) -> LinearOperator:
    """The operator on a larger space, zero elsewhere; see :meth:`LinearOperator.embedded`."""
    operator._require_square("embedded")
    chosen = _positions(operator, space, names)
    part = space.select(chosen)
    Space(part.shapes, operator.dtype, operator.device, part.names).join(operator.domain, "embedded")
    inside = converted(operator, space.dtype, space.device)
    if chosen == list(range(len(space.shapes))):
        return inside
    if isinstance(inside, Diagonal):
        return _diagonal_on(inside, space, chosen)
    if not isinstance(inside, BlockDiagonal):
        inside = BlockDiagonal([inside], positions=[range(len(chosen))], space=part)
    others = [i for i in range(len(space.shapes)) if i not in chosen]
    return BlockDiagonal(
        [*inside.blocks, *(zero_on(space.select([i])) for i in others)],
        positions=[*([chosen[i] for i in own] for own in inside.positions), *([i] for i in others)],
        space=space,
    )


def converted(operator: LinearOperator, dtype: torch.dtype, device: torch.device) -> LinearOperator:
    """The operator on vectors of another dtype or on another device; itself where these are its own."""
    if operator.dtype == dtype and operator.device == device:
        return operator
    if hasattr(operator, "_closed_conversion"):
        closed: LinearOperator = operator._closed_conversion(dtype, device)
        return closed
    return Converted(operator, dtype, device)


def zero_on(space: Space) -> Diagonal:
    """The zero matrix."""
    result = Diagonal([torch.zeros(shape, dtype=space.dtype, device=space.device) for shape in space.shapes])
    return result._like(result._entries, space, is_positive=True)


class Converted(Node):
    """An operator on vectors of another dtype or on another device; each product converts them there and back.

    Args:
        operator: The operator.
        dtype: Dtype of the vectors.
        device: Their device.
    """

    def __init__(self, operator: LinearOperator, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(operator.domain.to(dtype, device), operator.codomain.to(dtype, device))
        self.operator = operator
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return _moved(self.operator._matmat(_moved(X, self.operator.domain)), self.codomain)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return _moved(self.operator._rmatmat(_moved(X, self.operator.codomain)), self.domain)

    @property
    def _is_definite(self) -> bool:
        return self.operator._is_definite

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Converted(change(self.operator), self.dtype, self.device)


def _moved(X: Sequence[Tensor], space: Space) -> list[Tensor]:
    return [x.to(dtype=space.dtype, device=space.device) for x in X]


def _positions(operator: LinearOperator, space: Space, names: Sequence[str] | None) -> list[int]:
    """The tensors of the space that the operator acts on, in its own order."""
    names = operator.domain.names if names is None else names
    if names is None:
        return list(range(len(space.shapes)))
    known = space.names
    if known is None:
        raise ValueError("embedded: the larger space has no names, so that it does not tell its tensors apart.")
    missing = [name for name in names if name not in known]
    if missing or len(set(names)) != len(names):
        raise ValueError(f"embedded: expected names of the space, each once, got {list(names)}; unknown: {missing}.")
    return [known.index(name) for name in names]


def _diagonal_on(diagonal: Diagonal, space: Space, chosen: Sequence[int]) -> Diagonal:
    entries = {i: torch.zeros(shape, dtype=space.dtype, device=space.device) for i, shape in enumerate(space.shapes)}
    entries.update(zip(chosen, diagonal._on(space.select(chosen)), strict=True))
    result = diagonal._like(list(entries.values()), space, diagonal.POSITIVE_SEMIDEFINITE)
    result._owns_entries = diagonal._holds_values
    return result
