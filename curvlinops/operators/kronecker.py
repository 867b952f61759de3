"""Kronecker products of two symmetric matrices, with exact inverses, determinants, spectra and samples."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from curvlinops.operators.arranged import Arranged
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.damping import InverseOptions
from curvlinops.operators.dense import check_no_negative
from curvlinops.operators.eigen_decomposed import EigenDecomposed, decomposed, inverted_values
from curvlinops.operators.factor_sets import as_factor, eigendecompositions
from curvlinops.operators.factors import DiagonalFactor, Factor
from curvlinops.operators.space import Space
from curvlinops.operators.structured import multiple_of_identity


class Kronecker(Arranged):
    r"""The Kronecker product :math:`L \otimes R + c I` of two symmetric matrices, with exact closed forms.

    On a matrix X it is :math:`L X R + c X`, X being the vector row by row. Groups are blocks along the diagonal, each
    with factors of its own. Multiples, sums with multiples of the identity, and sums with products that share a factor
    are such matrices again.

    **Cost**: two products of matrices for a product, of which a diagonal factor costs next to nothing. The
    eigendecompositions of the factors are computed at first need and are kept with the factors, so that shifted and
    scaled versions share them; a factor that somebody else holds the tensor of is decomposed anew: call
    :meth:`frozen` before asking for several answers.

    **Reference**: Martens, Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    arXiv:1503.05671.

    Args:
        left: L, a tensor ``[R]`` for a diagonal, ``[R, R]``, or ``[G, R, R]`` for G groups; or a factor. Tensors of
            half precision are copied to float32.
        right: R, likewise ``[S]``, ``[S, S]`` or ``[G, S, S]``.
        arrangement: How the tensors of the space form the matrices X; by default one tensor, row by row.
        space: The space; by default that of the arrangement without names, or a flat one.
        shift: The multiple of the identity, c.
        is_positive: Whether L ⊗ R is known to be positive semi-definite.

    Attributes:
        left: The left factor.
        right: The right factor.
        shift: The same.
        arrangement: The same.

    Raises:
        TypeError: If a factor is no tensor.
        ValueError: If a factor is not symmetric or not finite, or the shapes do not fit.

    >>> A = Kronecker(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0]))
    >>> (A @ torch.ones(4)).tolist(), A.trace().item()
    ([3.0, 9.0, 3.0, 9.0], 16.0)
    >>> round(A.inverse().logdet().item() + A.logdet().item(), 4)
    0.0
    """

    def __init__(
        self,
        left: Tensor | Factor,
        right: Tensor | Factor,
        *,
        arrangement: Arrangement | None = None,
        space: Space | None = None,
        shift: float = 0.0,
        is_positive: bool = False,
    ) -> None:
        first, second = as_factor(left, "left"), as_factor(right, "right")
        if not isfinite(shift):
            raise ValueError(f"shift: expected a finite number, got {shift}.")
        kinds = [(f.num_groups, f.dtype, f.device) for f in (first, second)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"left and right: expected one number of groups, dtype and device, got {kinds[0]} and {kinds[1]}."
            )
        dtype = next((g.dtype for g in (left, right) if isinstance(g, Tensor)), first.dtype)
        super().__init__(arrangement, space, (first.num_groups, first.size, second.size), dtype, first.device)
        self._set(first, second, float(shift), is_positive)

    def _set(self, left: Factor, right: Factor, shift: float, is_positive: bool) -> None:
        self.left, self.right, self.shift, self._is_positive = left, right, shift, is_positive
        self.POSITIVE_SEMIDEFINITE = is_positive and shift >= 0
        self._is_left_alone = right.is_owned and right.is_one

    def _like(
        self, left: Factor, right: Factor, shift: float, is_positive: bool, space: Space | None = None
    ) -> Kronecker:
        """Another Kronecker product of the same arrangement, on the same space if no other is given."""
        result = object.__new__(Kronecker)
        result._place(self.arrangement, self.domain if space is None else space)
        result._set(left, right, shift, is_positive)
        return result

    # ------------------------------------------------------------------ products

    def _multiply(self, X: Tensor) -> Tensor:
        product = self.left.times(X)
        if not self._is_left_alone:
            product = self.right.times_from_right(product)
        return product.add_(X, alpha=self.shift) if self.shift else product

    def frozen(self) -> Kronecker:
        """The same operator with copies of the tensors that it was given."""
        if self._holds_values:
            return self
        return self._like(self.left.frozen(), self.right.frozen(), self.shift, self._is_positive)

    @property
    def _holds_values(self) -> bool:
        return self.left.is_owned and self.right.is_owned

    @property
    def _is_definite(self) -> bool:
        return self._is_positive and self.shift > 0

    # -------------------------------------------------------------- closed forms

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self._flat(_outer(self.left.diagonal(), self.right.diagonal()).add_(self.shift))

    def trace(self) -> Tensor:
        """The trace."""
        return ((self.left.trace() * self.right.trace()).sum() + self.shift * self.shape[0]).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        squares = (self.left.squared_norm() * self.right.squared_norm()).sum()
        mixed = 2 * self.shift * (self.left.trace() * self.right.trace()).sum()
        return (squares + mixed + self.shift**2 * self.shape[0]).clamp(min=0.0).sqrt().to(self.dtype)

    def eigenvalues(self) -> Tensor:
        """The eigenvalues ``[D]``, ascending."""
        return self._spectrum().flatten().sort().values.to(self.dtype)

    def _products(self) -> Tensor:
        """The eigenvalues of L ⊗ R ``[G, R, S]``, those that only rounding made negative being zero."""
        left, right = eigendecompositions([self.left, self.right])
        products = _outer(left.values, right.values)
        return products.clamp_(min=0.0) if self._is_positive else products

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        if self.shift:
            values = self._spectrum().double()
            return values.sign().prod(), values.abs().log().sum()
        # |L ⊗ R| = |L|^S |R|^R for each group.
        signs, logs = zip(self.left.slogdet(), self.right.slogdet(), strict=True)
        num_columns, num_rows = self.right.size, self.left.size
        sign = (signs[0] ** num_columns * signs[1] ** num_rows).prod()
        return sign, (num_columns * logs[0] + num_rows * logs[1]).sum()

    def inverse(
        self,
        damping: float = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> Kronecker | EigenDecomposed:
        r"""The inverse, with the damping λ added to the factors or to the product.

        By default it is :math:`(L + \lambda I)^{-1} \otimes (R + \lambda I)^{-1}`. With the heuristic,
        :math:`(L + \max(\pi \sqrt{\lambda}, \lambda_{\min}) I)^{-1} \otimes
        (R + \max(\sqrt{\lambda} / \pi, \lambda_{\min}) I)^{-1}`, where π² is the ratio of the mean eigenvalues of L and
        R, for each group (Martens, Grosse, 2015, section 6.3). With exact damping it is
        :math:`(L \otimes R + (c + \lambda) I)^{-1}`, by eigendecomposition; so it is, without being asked for, where
        the matrix has a shift c, or where R is a diagonal with the single entry 1.

        Args:
            damping: λ.
            use_heuristic_damping: Whether to balance the damping of the two factors.
            min_damping: Least damping of a factor under the heuristic.
            use_exact_damping: Whether to damp the product.
            retry_double_precision: Whether to repeat in float64 what fails in float32.

        Raises:
            ValueError: If the damped matrix is singular, a damped factor is not definite, the damping is negative or
                not finite, or the options exclude each other.
        """
        from curvlinops.operators.kronecker_inverse import kronecker_inverses

        options = InverseOptions(use_heuristic_damping, min_damping, use_exact_damping, retry_double_precision)
        return kronecker_inverses([self], [damping], options)[0]

    def sqrt(self) -> Kronecker | EigenDecomposed:
        """The symmetric positive semi-definite square root of a positive semi-definite matrix.

        Raises:
            ValueError: If an eigenvalue is negative.
        """
        A = self.frozen()
        values = A._spectrum()
        check_no_negative(values)
        if A.shift:
            return A._in_eigenbasis(values.clamp_(min=0.0).sqrt_())
        roots = []
        for factor in (A.left, A.right):
            # Both factors may be negative.
            sign = torch.where(factor.trace() < 0, -1.0, 1.0).to(factor.dtype).unsqueeze(-1)
            roots.append(factor.with_eigenvalues((factor.eigh().values * sign).clamp_(min=0.0).sqrt_()))
        return self._like(roots[0], roots[1], 0.0, is_positive=True)

    def _spectrum(self) -> Tensor:
        return self._products() + self.shift

    def _exact_inverse(self, damping: float) -> EigenDecomposed:
        values, shift = self._products(), self.shift + damping
        rounding = torch.finfo(values.dtype).eps * values.abs().max()
        damped = values + shift
        if not self._is_positive or shift < 0:
            damped = torch.where(damped.abs() > rounding, damped, 0.0)
        return self._in_eigenbasis(inverted_values(damped, damping))

    def _in_eigenbasis(self, values: Tensor) -> EigenDecomposed:
        """The matrix of the same eigenvectors and other eigenvalues ``[G, R, S]``."""
        left, right = eigendecompositions([self.left, self.right])
        # Decompositions are copies, whoever holds the factors.
        return decomposed(values, left.basis, right.basis, self.arrangement, self.domain, is_owned=True)

    # -------------------------------------------------------------------- algebra

    def damped(self, damping: float) -> Kronecker:
        """The matrix A + damping · I, which keeps the factors.

        Raises:
            ValueError: If the damping is not finite.
        """
        if not isfinite(damping):
            raise ValueError(f"damping: expected a finite number, got {damping}.")
        return self._like(self.left, self.right, self.shift + float(damping), self._is_positive)

    def block(self, *patterns: str) -> LinearOperator:
        """The block of the parameters whose names match a pattern; that of a weight or of its bias alone is closed."""
        found = super().block(*patterns)
        if found is self or self.domain.shapes != self.arrangement.shapes:
            return found
        chosen: int = found.chosen[0]  # type: ignore[attr-defined]
        shape, size = self.arrangement.shapes[chosen], self.right.size
        is_transposed = self.arrangement.transposed and chosen == 0
        right = self.right.part(0, size - 1) if chosen == 0 else self.right.part(size - 1, size)
        result = object.__new__(Kronecker)
        result._place(Arrangement((shape,), self.arrangement.groups, is_transposed), self.domain.select([chosen]))
        result._set(self.left, right, self.shift, self._is_positive)
        return result

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        space = self.domain.join(other.domain, "sum")
        if not isinstance(other, Kronecker):
            multiple = multiple_of_identity(other)
            if multiple is None:
                return None
            return self._like(self.left, self.right, self.shift + multiple, self._is_positive, space)
        if not self.arrangement.is_like(other.arrangement):
            return None
        is_positive, shift = self._is_positive and other._is_positive, self.shift + other.shift
        if self.left.is_same(other.left):
            return self._like(self.left, self.right.plus(other.right), shift, is_positive, space)
        if self.right.is_same(other.right):
            return self._like(self.left.plus(other.left), self.right, shift, is_positive, space)
        return None

    def _closed_scaling(self, factor: float) -> LinearOperator:
        # An identity on the left stays one, so that multiples of products that share it still do.
        of_right = isinstance(self.left, DiagonalFactor) and not self.right.is_one
        left, right = (self.left, self.right.scaled(factor)) if of_right else (self.left.scaled(factor), self.right)
        return self._like(left, right, self.shift * factor, self._is_positive and factor >= 0)

    def _closed_conversion(self, dtype: torch.dtype, device: torch.device) -> Kronecker:
        left, right = (factor.converted(dtype, device) for factor in (self.left, self.right))
        return self._like(left, right, self.shift, self._is_positive, self.domain.to(dtype, device))

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        multiple = multiple_of_identity(other)
        if multiple is not None:
            space, is_positive = self.domain.join(other.domain, "product"), self._is_positive and multiple >= 0
            return self._like(self.left.scaled(multiple), self.right, self.shift * multiple, is_positive, space)
        if not isinstance(other, Kronecker) or not self.arrangement.is_like(other.arrangement):
            return None
        factors = [self.left, other.left, self.right, other.right]
        if self.shift or other.shift or not all(isinstance(factor, DiagonalFactor) for factor in factors):
            return None
        left, right = [DiagonalFactor(one.diagonal() * two.diagonal(), True) for one, two in (factors[:2], factors[2:])]
        space = self.domain.join(other.domain, "product")
        return self._like(left, right, 0.0, self._is_positive and other._is_positive, space)

    def _repr_extra(self) -> str:
        groups = f", {self.left.num_groups} groups" if self.left.num_groups > 1 else ""
        shift = f", shift={self.shift:g}" if self.shift else ""
        return f", of factors of {self.left.size} and {self.right.size}{groups}{shift}"


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """The products ``[G, R, S]`` of ``[G, R]`` and ``[G, S]``."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)
