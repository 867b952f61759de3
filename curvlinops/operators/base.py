"""The contract of a linear operator: implement `_matmat`, and everything else is derived."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlinops.operators.space import Space

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

#: Entries of the identity's columns that are held at once when an operator is made dense.
_DENSE_CHUNK_NUMEL = 2**26


class LinearOperator(ABC):
    """A linear map between two spaces, known through its products.

    A subclass sets :attr:`domain` and :attr:`codomain` (through ``__init__``) and writes ``_matmat``; if it is not
    self-adjoint, also ``_rmatmat``.

    Args:
        domain: Space of the vectors it takes.
        codomain: Space of the vectors it gives.

    Attributes:
        SELF_ADJOINT: Whether the operator equals its adjoint.
        POSITIVE_SEMIDEFINITE: Whether all its eigenvalues are known to be non-negative.
    """

    SELF_ADJOINT: bool = False
    POSITIVE_SEMIDEFINITE: bool = False
    #: NumPy arrays and scalars leave the arithmetic to this class.
    __array_ufunc__ = None

    def __new__(cls, *args: Any, **kwargs: Any) -> LinearOperator:
        """Refuse unknown keywords with the nearest known one."""
        known = _keywords(cls)
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
                raise TypeError(f"{cls.__name__} got an unknown argument '{name}'. {hint}")
        return super().__new__(cls)

    def __init__(self, domain: Space, codomain: Space) -> None:
        self._domain = domain
        self._codomain = codomain

    # ------------------------------------------------------------------ contract

    @property
    def domain(self) -> Space:
        """Space of the vectors that the operator takes."""
        return self._domain

    @property
    def codomain(self) -> Space:
        """Space of the vectors that the operator gives."""
        return self._codomain

    @abstractmethod
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        """Apply to columns-last tensors ``[*shape, K]`` of the domain."""

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        """Apply the adjoint to columns-last tensors of the codomain."""
        if self.SELF_ADJOINT:
            return self._matmat(X)
        raise NotImplementedError(f"{type(self).__name__} has no adjoint: implement _rmatmat.")

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LinearOperator:
        """The same operator, prepared for many products; itself where there is nothing to prepare.

        Args:
            max_memory: Bytes that may be kept between products.
            engine: How curvature matrices go through their networks.
        """
        return self

    def frozen(self) -> LinearOperator:
        """The same operator at copies of the values it depends on; itself where it depends on none."""
        return self

    @property
    def _holds_values(self) -> bool:
        """Whether nothing that others hold can change it: true of what :meth:`frozen` returns."""
        return True

    @property
    def _is_definite(self) -> bool:
        """Whether all its eigenvalues are known to be positive."""
        return False

    def _agreed(self, flag: bool) -> bool:
        """Whether a flag is set on any of the ranks that the products are summed over, which must act alike."""
        return flag

    # ------------------------------------------------------------------- derived

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.codomain.numel, self.domain.numel

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self.domain.dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.domain.device

    @property
    def H(self) -> LinearOperator:
        """The adjoint, which is the operator itself when it is self-adjoint."""
        return self.adjoint()

    @property
    def T(self) -> LinearOperator:
        """The transpose, which is the adjoint since all matrices here are real."""
        return self.adjoint()

    def adjoint(self) -> LinearOperator:
        """The operator itself when it is self-adjoint, else one that swaps the two products."""
        from curvlinops.operators.algebra import Adjoint

        return self if self.SELF_ADJOINT else Adjoint(self)

    def __matmul__(self, other: Any) -> Any:
        """Multiply by a vector or matrix in any format, or chain with another operator."""
        if isinstance(other, LinearOperator):
            from curvlinops.operators.algebra import chain

            return chain(self, other)
        return self._apply(other, columns_first=False)

    def __rmatmul__(self, other: Any) -> Any:
        """``M @ A``: the columns of M come first."""
        return self._apply(other, columns_first=True)

    def _apply(self, M: Any, columns_first: bool) -> Any:
        source, target = (self.codomain, self.domain) if columns_first else (self.domain, self.codomain)
        with torch.inference_mode(False), torch.no_grad():
            columns, form = source.read(M, columns_first)
            form.check(target)
            if columns[0].shape[-1] == 0:
                result = [torch.zeros(*shape, 0, dtype=target.dtype, device=target.device) for shape in target.shapes]
            else:
                result = self._rmatmat(columns) if columns_first else self._matmat(columns)
            return form.write([r.detach() for r in result], target)

    def __add__(self, other: Any) -> LinearOperator:
        """The sum with another operator; 0 is allowed so that ``sum([A, B])`` works."""
        from curvlinops.operators.algebra import add

        if isinstance(other, LinearOperator):
            return add(self, other)
        return self if _is_scalar(other) and other == 0 else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearOperator:
        """The difference of two operators."""
        return self + (-other) if isinstance(other, LinearOperator) else self.__add__(other)

    def __rsub__(self, other: Any) -> LinearOperator:
        """``0 - A``."""
        return (-self).__add__(other)

    def __mul__(self, scalar: Any) -> LinearOperator:
        """The operator times a number."""
        from curvlinops.operators.algebra import scale

        return scale(self, float(scalar)) if _is_scalar(scalar) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        """The operator divided by a number."""
        return self * (1.0 / float(scalar)) if _is_scalar(scalar) else NotImplemented

    def __neg__(self) -> LinearOperator:
        """The operator times -1."""
        return self * -1.0

    def damped(self, damping: float) -> LinearOperator:
        """The square operator A + damping · I.

        Args:
            damping: The number added to the diagonal.
        """
        from curvlinops.operators.structured import IdentityLinearOperator

        self._require_square("damped")
        space = self.domain.join(self.codomain, "damped")
        return self + damping * IdentityLinearOperator(space.shapes, space.device, space.dtype)

    def block(self, *patterns: str) -> LinearOperator:
        """The diagonal block of the parameters whose names match a pattern.

        Cost: a product with the whole operator each. A curvature matrix that is built with these parameters alone is
        the same matrix and costs less.

        Args:
            patterns: Names with shell wildcards, such as ``"layer3.*"``.

        Raises:
            ValueError: If the space has no names, or nothing matches.
        """
        from curvlinops.operators.parts import Block

        self._require_square("block")
        names = self.domain.names
        if names is None:
            raise ValueError(f"{type(self).__name__} has no parameter names: pass params as a dict to get blocks.")
        chosen = [i for i, name in enumerate(names) if any(fnmatchcase(name, p) for p in patterns)]
        if not chosen:
            raise ValueError(f"No parameter matches {list(patterns)}; the names are {list(names)}.")
        return Block(self, chosen)

    def embedded(self, space: Space, names: Sequence[str] | None = None) -> LinearOperator:
        """The square operator on a larger space: zero on its other tensors, in its dtype and on its device.

        Diagonal, block-diagonal and dense matrices and Kronecker products keep their closed forms.

        Args:
            space: The larger space, with names.
            names: Its tensors that the operator acts on, in order; by default its own names, or all if it has none.

        Raises:
            ValueError: If the tensors do not fit.
        """
        from curvlinops.operators.embedded import embed

        return embed(self, space, names)

    def to_dense(self) -> Tensor:
        """The matrix ``[rows, columns]`` as a tensor, by products with the columns of the identity."""
        return torch.cat([self @ units for units in unit_columns(self.domain)], dim=1)

    def to_scipy(self, dtype: Any = None) -> ScipyLinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` that multiplies NumPy arrays.

        Args:
            dtype: NumPy dtype of the answers; by default that of the operator (float32 for half precision).
        """
        from curvlinops.operators.scipy_adapter import to_scipy

        return to_scipy(self, dtype)

    def _require_square(self, what: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{what} needs a square operator, got shape {self.shape}.")

    def __repr__(self) -> str:
        """Class, shape, dtype and device."""
        return f"<{type(self).__name__} of shape {self.shape}, {self.dtype}, {self.device}{self._repr_extra()}>"

    def _repr_extra(self) -> str:
        return ""


def _keywords(cls: type) -> list[str]:
    """Names of the arguments of a class, those that it passes on to its bases included."""
    known: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if base is cls and not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(known))


def unit_columns(space: Space, chunk: int | None = None) -> Iterator[Tensor]:
    """Yield the columns of the identity ``[D, k]``, at most ``chunk`` at a time; by default as memory allows."""
    if chunk is None:
        chunk = max(1, min(space.numel, _DENSE_CHUNK_NUMEL // max(space.numel, 1)))
    for start in range(0, space.numel, chunk):
        rows = torch.arange(start, min(start + chunk, space.numel), device=space.device)
        units = torch.zeros(space.numel, len(rows), dtype=space.dtype, device=space.device)
        units[rows, rows - start] = 1.0
        yield units


def _is_scalar(value: Any) -> bool:
    is_number = isinstance(value, Number) and not isinstance(value, complex)
    return is_number or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())
