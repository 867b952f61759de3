"""Operators side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from curvlinops.operators.algebra import Node, _accumulate, _recut
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space


class HStack(Node):
    """Operators side by side, [U₁ U₂ ...]: one codomain, and a flat domain that concatenates theirs."""

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        codomain = operators[0].codomain
        for operator in operators[1:]:
            codomain = codomain.join(operator.codomain, "stack")
        numel = sum(operator.shape[1] for operator in operators)
        super().__init__(Space.flat(numel, codomain.dtype, codomain.device), codomain)
        self.operators = list(operators)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        parts = X[0].split([operator.shape[1] for operator in self.operators])
        pairs = zip(self.operators, parts, strict=True)
        return _accumulate(_recut(U._matmat(U.domain.split(x)), U.codomain, self.codomain) for U, x in pairs)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [Space.merge([Space.merge(U._rmatmat(_recut(X, self.codomain, U.codomain))) for U in self.operators])]

    def _inside(self) -> Sequence[LinearOperator]:
        return self.operators

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return HStack([change(operator) for operator in self.operators])
