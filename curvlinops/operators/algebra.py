"""Sums, scalings, chains, adjoints, blocks and submatrices: small lazy nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator, unit_columns
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

    def linearize(self, max_memory: int | None = None) -> LinearOperator:
        """Linearise what is inside."""
        return Reshaped(self.operator.linearize(max_memory), self.domain, self.codomain)

    def frozen(self) -> LinearOperator:
        """Freeze what is inside."""
        return Reshaped(self.operator.frozen(), self.domain, self.codomain)


def adopt(operator: LinearOperator, domain: Space, codomain: Space) -> LinearOperator:
    """The operator on the given spaces, which have its sizes: itself when the shapes already agree."""
    if operator.domain.shapes == domain.shapes and operator.codomain.shapes == codomain.shapes:
        return operator
    return Reshaped(operator, domain, codomain)


class _Node(LinearOperator):
    """A node over other operators: linearising and freezing pass through it."""

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        raise NotImplementedError

    #: What a node over one operator holds.
    operator: LinearOperator

    def _inside(self) -> Sequence[LinearOperator]:
        return [self.operator]

    def _repr_extra(self) -> str:
        return f", of {', '.join(type(operator).__name__ for operator in self._inside())}"

    def linearize(self, max_memory: int | None = None) -> LinearOperator:
        """The node over linearised operators."""
        return self._rebuilt(lambda operator: operator.linearize(max_memory))

    def frozen(self) -> LinearOperator:
        """The node over frozen operators."""
        return self._rebuilt(lambda operator: operator.frozen())


class Sum(_Node):
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

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return _accumulate(term._matmat(X) for term in self.terms)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return _accumulate(term._rmatmat(X) for term in self.terms)

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


class Scaled(_Node):
    """An operator times a number."""

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        super().__init__(operator.domain, operator.codomain)
        self.operator = operator
        self.factor = factor
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE and factor >= 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [t * self.factor for t in self.operator._matmat(X)]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [t * self.factor for t in self.operator._rmatmat(X)]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Scaled(change(self.operator), self.factor)


class Chain(_Node):
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


class Adjoint(_Node):
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


class Block(_Node):
    """The diagonal block of some of the tensors of a square operator's space."""

    def __init__(self, operator: LinearOperator, chosen: Sequence[int]) -> None:
        space = operator.domain.select(chosen)
        super().__init__(space, space)
        self.operator = operator
        self.chosen = list(chosen)
        self.SELF_ADJOINT = operator.SELF_ADJOINT
        self.POSITIVE_SEMIDEFINITE = operator.POSITIVE_SEMIDEFINITE

    def _padded(self, X: list[Tensor]) -> list[Tensor]:
        whole = self.operator.domain
        inside = dict(zip(self.chosen, X, strict=True))
        return [
            inside[i] if i in inside else X[0].new_zeros(*shape, X[0].shape[-1]) for i, shape in enumerate(whole.shapes)
        ]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        result = self.operator._matmat(self._padded(X))
        return [result[i] for i in self.chosen]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        result = self.operator._rmatmat(self._padded(X))
        return [result[i] for i in self.chosen]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return Block(change(self.operator), self.chosen)


class SubmatrixLinearOperator(_Node):
    """The matrix ``A[row_idxs, :][:, col_idxs]`` of an operator, on flat vectors.

    Cost: one product with A each.

    Args:
        A: The operator.
        row_idxs: Rows to keep, as flat indices without repetition.
        col_idxs: Columns to keep, likewise.

    Raises:
        ValueError: If an index repeats or lies outside of A.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.arange(9.0).reshape(3, 3))
    >>> SubmatrixLinearOperator(A, [0, 2], [1]).to_dense().tolist()
    [[1.0], [7.0]]
    """

    def __init__(self, A: LinearOperator, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        super().__init__(A.domain, A.codomain)
        self.operator = A
        self.set_submatrix(row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: Sequence[int], col_idxs: Sequence[int]) -> None:
        """Choose other rows and columns.

        Args:
            row_idxs: Rows to keep, as flat indices without repetition.
            col_idxs: Columns to keep, likewise.
        """
        A = self.operator
        rows = _checked_indices(row_idxs, A.shape[0], "row_idxs", A.device)
        self._cols = _checked_indices(col_idxs, A.shape[1], "col_idxs", A.device)
        self._rows = rows
        self._domain = Space.flat(len(self._cols), A.dtype, A.device)
        self._codomain = Space.flat(len(self._rows), A.dtype, A.device)
        same = torch.equal(self._rows, self._cols)
        self.SELF_ADJOINT = A.SELF_ADJOINT and same
        self.POSITIVE_SEMIDEFINITE = A.POSITIVE_SEMIDEFINITE and same

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [Space.merge(self.operator._matmat(_scatter(X[0], self._cols, self.operator.domain)))[self._rows]]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [Space.merge(self.operator._rmatmat(_scatter(X[0], self._rows, self.operator.codomain)))[self._cols]]

    def _rebuilt(self, change: Callable[[LinearOperator], LinearOperator]) -> LinearOperator:
        return SubmatrixLinearOperator(change(self.operator), self._rows.tolist(), self._cols.tolist())


def _scatter(X: Tensor, indices: Tensor, space: Space) -> list[Tensor]:
    whole = X.new_zeros(space.numel, X.shape[-1])
    whole[indices] = X
    return space.split(whole)


def _checked_indices(indices: Sequence[int], size: int, name: str, device: torch.device) -> Tensor:
    values = [int(i) for i in indices]
    outside = [i for i in values if not 0 <= i < size]
    if outside or len(set(values)) != len(values):
        problem = f"{outside[:5]} lie outside of 0..{size - 1}" if outside else "an index repeats"
        raise ValueError(f"{name}: {problem}.")
    return torch.tensor(values, dtype=torch.long, device=device)


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
    size = A.shape[0]
    chunk = max(1, min(size, 2**26 // max(size, 1)))
    parts, start = [], 0
    for units in unit_columns(A.domain, chunk):
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
