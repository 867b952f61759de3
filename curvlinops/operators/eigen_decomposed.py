"""Matrices that are known by their eigenvalues in a Kronecker product of two orthonormal bases."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.operators.arranged import Arranged
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.damping import InverseOptions, checked_damping
from curvlinops.operators.dense import check_no_negative
from curvlinops.operators.grouped import multiply, multiply_from_right
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.structured import multiple_of_identity


class EigenDecomposed(Arranged):
    r"""The matrix :math:`(Q_L \otimes Q_R) \operatorname{diag}(\lambda) (Q_L \otimes Q_R)^\top` of given eigenvalues.

    On a matrix X it is :math:`Q_L (\lambda \circ (Q_L^\top X Q_R)) Q_R^\top`. Groups are blocks along the diagonal,
    each with bases and eigenvalues of its own. Multiples, sums with multiples of the identity, and sums and products of
    such matrices of the same bases (the same tensors) are such matrices again.

    **Cost**: four products with bases for a product, half of them for each basis that is None; everything else costs
    O(D), but the diagonal, which costs two.

    **Reference**: George, Laurent, Bouthillier, Ballas, Vincent (2018), Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis, arXiv:1806.03884.

    Args:
        eigenvalues: The eigenvalues ``[R, S]``, or ``[G, R, S]`` for G groups. Half precision is copied to float32.
        left_basis: Orthonormal columns ``[R, R]`` or ``[G, R, R]``; by default the unit vectors.
        right_basis: Orthonormal columns ``[S, S]`` or ``[G, S, S]``; by default the unit vectors.
        arrangement: How the tensors of the space form the matrices; by default one tensor, row by row.
        space: The space; by default that of the arrangement without names, or a flat one.

    Attributes:
        arrangement: The same.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the shapes do not fit, numbers are not finite, or a basis is not orthonormal.

    >>> A = EigenDecomposed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), left_basis=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> A.diagonal().tolist(), A.inverse(damping=1.0).trace().item()
    ([3.0, 4.0, 1.0, 2.0], 1.2833333015441895)
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        left_basis: Tensor | None = None,
        right_basis: Tensor | None = None,
        *,
        arrangement: Arrangement | None = None,
        space: Space | None = None,
    ) -> None:
        values = _checked_values(eigenvalues)
        groups, rows, columns = values.shape
        left, right = (
            _checked_basis(left_basis, values, rows, "left"),
            _checked_basis(right_basis, values, columns, "right"),
        )
        super().__init__(arrangement, space, (groups, rows, columns), eigenvalues.dtype, eigenvalues.device)
        self._set(values, left, right, is_owned=False)

    def _set(self, values: Tensor, left: Tensor | None, right: Tensor | None, is_owned: bool) -> None:
        self._values, self._left, self._right, self._is_owned = values, left, right, is_owned
        self.POSITIVE_SEMIDEFINITE = bool((values >= 0).all())

    def _like(self, values: Tensor, space: Space | None = None) -> EigenDecomposed:
        """Other eigenvalues in the same bases."""
        space = self.domain if space is None else space
        is_owned = self._is_owned or (self._left is None and self._right is None)
        return decomposed(values, self._left, self._right, self.arrangement, space, is_owned)

    # ------------------------------------------------------------------ products

    def _multiply(self, X: Tensor) -> Tensor:
        left, right = self._left, self._right
        Y = X if left is None else multiply(left.mT, X)
        Y = Y if right is None else multiply_from_right(Y, right)
        Y = Y * self._values
        Y = Y if left is None else multiply(left, Y)
        return Y if right is None else multiply_from_right(Y, right.mT)

    def frozen(self) -> EigenDecomposed:
        """The same operator with copies of the tensors that it was given."""
        if self._is_owned:
            return self
        left, right = (None if basis is None else basis.clone() for basis in (self._left, self._right))
        return decomposed(self._values.clone(), left, right, self.arrangement, self.domain, is_owned=True)

    @property
    def _holds_values(self) -> bool:
        return self._is_owned

    @property
    def _is_definite(self) -> bool:
        return bool((self._values > 0).all())

    # -------------------------------------------------------------- closed forms

    @property
    def values(self) -> Tensor:
        """The eigenvalues ``[G, R, S]`` in the order of the bases."""
        return self._values

    @property
    def left_basis(self) -> Tensor | None:
        """The basis of the rows ``[G, R, R]``; None for the unit vectors."""
        return self._left

    @property
    def right_basis(self) -> Tensor | None:
        """The basis of the columns ``[G, S, S]``; None for the unit vectors."""
        return self._right

    def _spectrum(self) -> Tensor:
        return self._values

    def _in_eigenbasis(self, values: Tensor) -> EigenDecomposed:
        return self._like(values)

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        entries = self._values.clone().unsqueeze(0)
        entries = entries if self._left is None else multiply(self._left.square(), entries)
        entries = entries if self._right is None else multiply_from_right(entries, self._right.square().mT)
        return self._flat(entries[0])

    def trace(self) -> Tensor:
        """The trace."""
        return self._values.sum(dtype=torch.float64).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        norm: Tensor = torch.linalg.vector_norm(self._values, dtype=torch.float64)
        return norm.to(self.dtype)

    def eigenvalues(self) -> Tensor:
        """The eigenvalues ``[D]``, ascending."""
        return self._values.flatten().sort().values.to(self.dtype)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        values = self._values.double()
        return values.sign().prod(), values.abs().log().sum()

    def inverse(
        self,
        damping: float = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = True,
        retry_double_precision: bool = True,
    ) -> EigenDecomposed:
        """The operator (A + damping · I)⁻¹, exactly.

        Args:
            damping: Number added to the eigenvalues.
            use_heuristic_damping: Has no meaning here; accepted as False, so that it can be called as
                :meth:`Kronecker.inverse`.
            min_damping: Likewise; without the heuristic it has no effect.
            use_exact_damping: The damping is exact whatever is said.
            retry_double_precision: There is nothing to decompose, so it has no effect.

        Raises:
            ValueError: If an eigenvalue is zero after damping, the damping is negative or not finite, or the heuristic
                is asked for.
        """
        if use_heuristic_damping:
            raise ValueError("use_heuristic_damping: this matrix has no factors to damp; its damping is exact.")
        InverseOptions(False, min_damping, use_exact_damping, retry_double_precision)
        return self._like(inverted_values(self._values + checked_damping(damping), damping))

    def sqrt(self) -> EigenDecomposed:
        """The symmetric positive semi-definite square root of a positive semi-definite matrix.

        Raises:
            ValueError: If an eigenvalue is negative.
        """
        check_no_negative(self._values)
        return self._like(self._values.clamp(min=0.0).sqrt())

    # -------------------------------------------------------------------- algebra

    def damped(self, damping: float) -> EigenDecomposed:
        """The matrix A + damping · I, in the same bases."""
        return self._like(self._values + float(damping))

    def _has_bases_of(self, other: EigenDecomposed) -> bool:
        same = _is_same(self._left, other._left) and _is_same(self._right, other._right)
        return same and self.arrangement.is_like(other.arrangement)

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        space = self.domain.join(other.domain, "sum")
        if isinstance(other, EigenDecomposed):
            return self._like(self._values + other._values, space) if self._has_bases_of(other) else None
        multiple = multiple_of_identity(other)
        return None if multiple is None else self._like(self._values + multiple, space)

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return self._like(self._values * factor)

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        factor: Tensor | float | None
        if isinstance(other, EigenDecomposed):
            factor = other._values if self._has_bases_of(other) else None
        else:
            factor = multiple_of_identity(other)
        return None if factor is None else self._like(self._values * factor, self.domain.join(other.domain, "product"))

    def _repr_extra(self) -> str:
        groups, rows, columns = self._values.shape
        return f", in bases of {rows} and {columns}" + (f", {groups} groups" if groups > 1 else "")


def decomposed(
    values: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    arrangement: Arrangement,
    space: Space,
    is_owned: bool,
) -> EigenDecomposed:
    """An operator of tensors that are known to fit.

    Args:
        values: The eigenvalues ``[G, R, S]``.
        left: The left basis ``[G, R, R]``, or None.
        right: The right basis ``[G, S, S]``, or None.
        arrangement: How the tensors of the space form the matrices.
        space: The space.
        is_owned: Whether nobody else holds the tensors.
    """
    result = object.__new__(EigenDecomposed)
    result._place(arrangement, space)
    result._set(values, left, right, is_owned)
    return result


def inverted_values(values: Tensor, damping: float) -> Tensor:
    """The inverses of eigenvalues.

    Raises:
        ValueError: If one is zero or not finite.
    """
    inverse = 1.0 / values
    bad = int((~inverse.isfinite() | ~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {values.numel()} eigenvalues are zero but for rounding, or not finite, with damping={damping}: "
            "the inverse does not exist. Pass a larger damping, or use float64."
        )
    return inverse


def _checked_values(eigenvalues: Tensor) -> Tensor:
    if not isinstance(eigenvalues, Tensor):
        raise TypeError(f"eigenvalues: expected a tensor, got {type(eigenvalues).__name__}.")
    if eigenvalues.ndim not in (2, 3) or not eigenvalues.is_floating_point() or 0 in eigenvalues.shape:
        raise ValueError(
            f"eigenvalues: expected real numbers [R, S] or [G, R, S], got {list(eigenvalues.shape)} in "
            f"{eigenvalues.dtype}."
        )
    if not bool(eigenvalues.isfinite().all()):
        raise ValueError(f"eigenvalues: {int((~eigenvalues.isfinite()).sum())} of them are not finite.")
    values = eigenvalues.detach().to(working_dtype(eigenvalues.dtype))
    return values.unsqueeze(0) if values.ndim == 2 else values


def _checked_basis(basis: Tensor | None, values: Tensor, size: int, side: str) -> Tensor | None:
    if basis is None:
        return None
    if not isinstance(basis, Tensor):
        raise TypeError(f"{side}_basis: expected a tensor or None, got {type(basis).__name__}.")
    rounding = 64 * size**0.5 * torch.finfo(basis.dtype).eps if basis.is_floating_point() else 0.0
    matrices = basis.detach().to(working_dtype(basis.dtype))
    matrices = matrices.unsqueeze(0) if matrices.ndim == 2 else matrices
    if matrices.shape != (len(values), size, size) or matrices.dtype != values.dtype or basis.device != values.device:
        raise ValueError(
            f"{side}_basis: expected {[len(values), size, size]} in {values.dtype} on {values.device}, got "
            f"{list(basis.shape)} in {basis.dtype} on {basis.device}."
        )
    error = (matrices.mT @ matrices - torch.eye(size, dtype=values.dtype, device=values.device)).abs().max()
    if not bool(error <= rounding):
        raise ValueError(f"{side}_basis: expected orthonormal columns; they are off by {float(error):.1e}.")
    return matrices


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two bases are the same memory."""
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
