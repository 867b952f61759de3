"""Sums, scalings, chains and adjoints: small lazy nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.closed_forms import check_parts, needs
from curvlinops.operators.linearising import linearized, shared_memory
from curvlinops.operators.space import Space


def add(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """The sum: a closed form where both have one, else a lazy node."""
    if left.shape != right.shape:
        raise ValueError(f"Cannot add operators of shapes {left.shape} and {right.shape}.")
    left.domain.join(right.domain, "sum")
    left.codomain.join(right.codomain, "sum")
    closed = _closed(left, right, "_closed_sum", mirrored=True)
    return closed if closed is not None else Sum([*_terms(left), *_terms(right)])


def scale(operator: LinearOperator, factor: float) -> LinearOperator:
    """The operator times a number; nested scalings merge."""
    if hasattr(operator, "_closed_scaling"):
        closed: LinearOperator = operator._closed_scaling(factor)
        return closed
    if isinstance(operator, Scaled):
        return Scaled(operator.operator, factor * operator.factor)
    return Scaled(operator, factor)


def chain(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """The product of two operators: a closed form where both have one, else a lazy node."""
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"Cannot chain operators of shapes {left.shape} and {right.shape}.")
    left.domain.join(right.codomain, "chain")
    closed = _closed(left, right, "_closed_product", mirrored=False)
    return closed if closed is not None else Chain([*_factors(left), *_factors(right)])


def _closed(left: LinearOperator, right: LinearOperator, method: str, mirrored: bool) -> LinearOperator | None:
    for one, other in ((left, right), (right, left)) if mirrored else ((left, right),):
        closed: LinearOperator | None = getattr(one, method)(other) if hasattr(one, method) else None
        if closed is not None:
            return closed
    return None


def _terms(operator: LinearOperator) -> list[LinearOperator]:
    return operator.terms if isinstance(operator, Sum) else [operator]


def _factors(operator: LinearOperator) -> list[LinearOperator]:
    return operator.factors if isinstance(operator, Chain) else [operator]


class Reshaped(LinearOperator):
    """An operator on flat vectors, seen as one on structured vectors of the same size."""

    def __init__(self, operator: LinearOperator, domain: Space, codomain: Space) -> None:
        super().__init__(domain, codomain)
        self.operator = operator
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        source = self.operator.domain
        return self.codomain.split(Space.merge(self.operator._matmat(source.split(Space.merge(X)))))

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        source = self.operator.codomain
        return self.domain.split(Space.merge(self.operator._rmatmat(source.split(Space.merge(X)))))

    def _check_closed(self, quantity: str) -> None:
        check_parts([self.operator], quantity, "Part")

    @needs("diagonal")
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self.operator.diagonal()  # type: ignore[attr-defined, no-any-return]

    @needs("trace")
    def trace(self) -> Tensor:
        """The trace."""
        return self.operator.trace()  # type: ignore[attr-defined, no-any-return]

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LinearOperator:
        """Linearise what is inside."""
        return Reshaped(linearized(self.operator, max_memory, engine), self.domain, self.codomain)

    def frozen(self) -> LinearOperator:
        """Freeze what is inside."""
        return self if self._holds_values else Reshaped(self.operator.frozen(), self.domain, self.codomain)

    @property
    def _holds_values(self) -> bool:
        return self.operator._holds_values

    @property
    def _is_definite(self) -> bool:
        return self.operator._is_definite

    def _agreed(self, flag: bool) -> bool:
        return self.operator._agreed(flag)


def adopt(operator: LinearOperator, domain: Space, codomain: Space) -> LinearOperator:
    """The operator on the given spaces, which have its sizes: itself when the shapes already agree."""
    if operator.domain.shapes == domain.shapes and operator.codomain.shapes == codomain.shapes:
        return operator
    return Reshaped(operator, domain, codomain)


class Node(LinearOperator):
    """A node over other operators: linearising and freezing pass through it."""

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        raise NotImplementedError

    #: What a node over one operator holds.
    operator: LinearOperator

    def _inside(self) -> Sequence[LinearOperator]:
        return [self.operator]

    def _repr_extra(self) -> str:
        return f", of {', '.join(type(operator).__name__ for operator in self._inside())}"

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LinearOperator:
        """The node over linearised operators, which share the memory."""
        share = shared_memory(max_memory, self._inside())
        return self._rebuilt(lambda operator: linearized(operator, share, engine))

    def frozen(self) -> LinearOperator:
        """The node over frozen operators."""
        return self if self._holds_values else self._rebuilt(lambda operator: operator.frozen())

    @property
    def _holds_values(self) -> bool:
        return all(operator._holds_values for operator in self._inside())

    def _agreed(self, flag: bool) -> bool:
        return agreed(self._inside(), flag)


def agreed(operators: Sequence[LinearOperator], flag: bool) -> bool:
    """Whether a flag is set on any rank of any of the operators; all of them are asked, on every rank."""
    flags = [operator._agreed(flag) for operator in operators]
    return any(flags)


class Sum(Node):
    """The sum of operators on one space."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        domain, codomain = terms[0].domain, terms[0].codomain
        for term in terms[1:]:
            domain = domain.join(term.domain, "sum")
            codomain = codomain.join(term.codomain, "sum")
        super().__init__(domain, codomain)
        self.terms = [adopt(term, domain, codomain) for term in terms]
        self.SELF_ADJOINT = all(term.SELF_ADJOINT for term in terms)
        self.POSITIVE_SEMIDEFINITE = all(term.POSITIVE_SEMIDEFINITE for term in terms)

    @property
    def _is_definite(self) -> bool:
        return self.POSITIVE_SEMIDEFINITE and any(term._is_definite for term in self.terms)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return _accumulate(term._matmat(X) for term in self.terms)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return _accumulate(term._rmatmat(X) for term in self.terms)

    def _check_closed(self, quantity: str) -> None:
        check_parts(self.terms, quantity, "Term")

    @needs("diagonal")
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``, where every term has one."""
        diagonals: list[Tensor] = [term.diagonal() for term in self.terms]  # type: ignore[attr-defined]
        return torch.stack(diagonals).sum(0)

    @needs("trace")
    def trace(self) -> Tensor:
        """The trace, where every term has one."""
        traces: list[Tensor] = [term.trace().double() for term in self.terms]  # type: ignore[attr-defined]
        return torch.stack(traces).sum().to(self.dtype)

    def _inside(self) -> Sequence[LinearOperator]:
        return self.terms

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Sum([change(term) for term in self.terms])

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return Sum([scale(term, factor) for term in self.terms])


def _accumulate(products: Iterator[list[Tensor]]) -> list[Tensor]:
    """Sum the products one after the other, so that only two results are held."""
    total = [t.clone() for t in next(products)]
    for product in products:
        for t, p in zip(total, product, strict=True):
            t.add_(p)
    return total


class Scaled(Node):
    """An operator times a number."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__(operator.domain, operator.codomain)
        self.operator = operator
        self.factor = factor
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE and factor >= 0

    def _check_closed(self, quantity: str) -> None:
        check_parts([self.operator], quantity, "Part")

    @needs("diagonal")
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self.factor * self.operator.diagonal()  # type: ignore[attr-defined, no-any-return]

    @needs("trace")
    def trace(self) -> Tensor:
        """The trace."""
        return self.factor * self.operator.trace()  # type: ignore[attr-defined, no-any-return]

    @property
    def _is_definite(self) -> bool:
        return self.factor > 0 and self.operator._is_definite

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [t * self.factor for t in self.operator._matmat(X)]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [t * self.factor for t in self.operator._rmatmat(X)]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Scaled(change(self.operator), self.factor)


class Chain(Node):
    """The product of operators, applied from the right."""

    def __init__(self, factors: Sequence[LinearOperator]) -> None:
        for left, right in itertools.pairwise(factors):
            left.domain.join(right.codomain, "chain")
        super().__init__(factors[-1].domain, factors[0].codomain)
        self.factors = list(factors)
        self.SELF_ADJOINT, self.POSITIVE_SEMIDEFINITE = _symmetry(factors)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        for left, factor in zip([None, *reversed(self.factors[1:])], reversed(self.factors), strict=True):
            X = _recut(X, self.domain if left is None else left.codomain, factor.domain)
            X = factor._matmat(X)
        return X

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        space = self.codomain
        for factor in self.factors:
            X = factor._rmatmat(_recut(X, space, factor.codomain))
            space = factor.domain
        return X

    def _inside(self) -> Sequence[LinearOperator]:
        return self.factors

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        # A palindrome such as Jᵀ A J keeps its shared ends shared, so that it stays recognisably symmetric.
        done: dict[int, LinearOperator] = {}

        def once(operator: LinearOperator) -> LinearOperator:
            if isinstance(operator, Adjoint):
                return once(operator.operator).H
            if id(operator) not in done:
                done[id(operator)] = change(operator)
            return done[id(operator)]

        return Chain([once(factor) for factor in self.factors])

    def adjoint(self) -> LinearOperator:
        """The chain of the adjoints in reverse, so that Jᵀ A J is recognised where J is a chain itself."""
        return self if self.SELF_ADJOINT else Chain([factor.H for factor in reversed(self.factors)])


def _recut(X: list[Tensor], source: Space, target: Space) -> list[Tensor]:
    return X if source.shapes == target.shapes else target.split(Space.merge(X))


def _symmetry(factors: Sequence[LinearOperator]) -> tuple[bool, bool]:
    """Whether the product is self-adjoint and positive because it reads Bᵀ A B."""
    pairs = zip(factors, reversed(factors), strict=True)
    half = len(factors) // 2
    if not all(_are_adjoint(left, right) for left, right in list(pairs)[:half]):
        return False, False
    if len(factors) % 2 == 0:
        return True, True
    middle = factors[half]
    return middle.SELF_ADJOINT, middle.POSITIVE_SEMIDEFINITE


def _are_adjoint(left: LinearOperator, right: LinearOperator) -> bool:
    if isinstance(left, Adjoint):
        return left.operator is right
    if isinstance(right, Adjoint):
        return right.operator is left
    if getattr(left, "_adjoint_of", None) is right or getattr(right, "_adjoint_of", None) is left:
        return True
    return left is right and left.SELF_ADJOINT


class Adjoint(Node):
    """The adjoint of an operator: its two products swapped."""

    def __init__(self, operator: LinearOperator) -> None:
        # The spaces are asked for at first use: those of a Jacobian take a forward to find.
        self.operator = operator

    @property
    def domain(self) -> Space:
        """The codomain of the operator."""
        return self.operator.codomain

    @property
    def codomain(self) -> Space:
        """The domain of the operator."""
        return self.operator.domain

    def adjoint(self) -> LinearOperator:
        """The operator itself."""
        return self.operator

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.operator._rmatmat(X)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.operator._matmat(X)

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return change(self.operator).H
