"""Low-rank matrices plus a multiple of the identity, with exact inverses, determinants, spectra and samples."""

from __future__ import annotations

from math import isfinite, sqrt

import torch
from torch import Generator, Tensor

from curvlinops.operators import woodbury
from curvlinops.operators.algebra import _recut, adopt
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.gram import row_squares
from curvlinops.operators.linearising import linearized
from curvlinops.operators.low_rank_part import LowRankPart
from curvlinops.operators.sampling import checked_generator
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.structured import checked_logdet, multiple_of_identity


class LowRankLinearOperator(LinearOperator):
    r"""The matrix :math:`U \operatorname{diag}(s) U^\top + c I` of few columns U, with exact closed forms.

    Sums, differences and multiples of such matrices, of ones of other columns too, and sums with multiples of the
    identity are such matrices again. The weights s and c may have any sign.

    **Cost**: one product with U and one with its adjoint for a product. All but products, ``diagonal`` and samples of a
    matrix with s >= 0 need the Gram matrix UᵀU of the R columns, and O(R³) in float64. The Gram matrix is computed once
    for an operator U that holds its values; an operator U whose values change with a model is frozen for each answer,
    so call :meth:`frozen` before asking for several.

    **Reference**: Hager (1989), Updating the inverse of a matrix, doi:10.1137/1031049.

    Args:
        U: The columns, an operator from R numbers to the space of the matrix. R may exceed D.
        s: The weights ``[R]``; by default ones.
        c: The multiple of the identity.

    Attributes:
        U: The operator of the columns, with a flat domain. A sum's are those of its terms, side by side.
        c: The multiple of the identity.

    Raises:
        TypeError: If U is no operator or s no tensor.
        ValueError: If s or c does not fit.

    >>> from curvlinops import TensorLinearOperator
    >>> U = TensorLinearOperator(torch.tensor([[1.0], [1.0], [1.0]]))
    >>> A = LowRankLinearOperator(U, c=1.0)
    >>> (A.inverse() @ torch.tensor([1.0, 0.0, 0.0])).tolist()
    [0.75, -0.25, -0.25]
    >>> A.damped(1.0).eigenvalues().tolist()
    [5.0]
    """

    SELF_ADJOINT = True

    def __init__(self, U: LinearOperator, s: Tensor | None = None, c: float = 0.0) -> None:
        if not isinstance(U, LinearOperator):
            raise TypeError(f"U: expected a linear operator, got {type(U).__name__}. Wrap a matrix [D, R] as one.")
        if not isfinite(c):
            raise ValueError(f"c: expected a finite number, got {c}.")
        columns = adopt(U, Space.flat(U.shape[1], U.dtype, U.device), U.codomain)
        self._set(LowRankPart(columns, _checked_weights(s, U)), float(c), U.codomain)

    def _set(self, part: LowRankPart, c: float, space: Space, is_positive: bool = False) -> None:
        LinearOperator.__init__(self, space, space)
        self._part, self.c = part, c
        has_positive_core = part.core.ndim == 1 and bool((part.core >= 0).all())
        self.POSITIVE_SEMIDEFINITE = is_positive or (c >= 0 and has_positive_core)

    @property
    def U(self) -> LinearOperator:
        """The operator of the columns."""
        return self._part.U

    def _like(
        self, part: LowRankPart, c: float, is_positive: bool, space: Space | None = None
    ) -> LowRankLinearOperator:
        """Another low-rank matrix, on the same space if no other is given."""
        result = object.__new__(LowRankLinearOperator)
        result._set(part, c, self.domain if space is None else space, is_positive)
        return result

    # ------------------------------------------------------------------ products

    def _down(self, X: list[Tensor]) -> Tensor:
        """UᵀX in float64, ``[R, K]``."""
        return Space.merge(self.U._rmatmat(_recut(X, self.domain, self.U.codomain))).double()

    def _up(self, y: Tensor) -> Tensor:
        """U y, flat ``[D, K]``, in float32 at least."""
        return Space.merge(self.U._matmat([y.to(self.dtype)])).to(working_dtype(self.dtype))

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        result = self._up(woodbury.times(self._part.core, self._down(X)))
        if self.c != 0:
            result = torch.add(result, Space.merge(X).to(result.dtype), alpha=self.c)
        return self.domain.split(result.to(self.dtype))

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LowRankLinearOperator:
        """The same matrix over linearised columns."""
        return self._over(linearized(self.U, max_memory, engine))

    def frozen(self) -> LowRankLinearOperator:
        """The same matrix over columns that hold their values; itself where they do."""
        return self._over(self.U.frozen())

    @property
    def _holds_values(self) -> bool:
        return self.U._holds_values

    @property
    def _is_definite(self) -> bool:
        return self.POSITIVE_SEMIDEFINITE and self.c > 0

    def _over(self, U: LinearOperator) -> LowRankLinearOperator:
        if U is self.U:
            return self
        return self._like(LowRankPart(U, self._part.core), self.c, self.POSITIVE_SEMIDEFINITE)

    # --------------------------------------------------------------- closed forms

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``, at one product with U for each column, or what U's own row sums cost."""
        squares = row_squares(self.U, self._part.core)
        return (torch.cat([square.flatten() for square in squares]) + self.c).to(self.dtype)

    def trace(self) -> Tensor:
        """The trace."""
        part = self.frozen()._part
        return (torch.trace(woodbury.times(part.core, part.gram())) + self.c * self.shape[0]).to(self.dtype)

    def eigenvalues(self) -> Tensor:
        """The min(R, D) eigenvalues ``[min(R, D)]`` of largest distance from c, ascending; the other D - R are c."""
        values, _ = self.frozen()._eigenvalues()
        num_missing = min(self.U.shape) - len(values)
        return torch.cat([values, values.new_full([num_missing], self.c)]).sort().values.to(self.dtype)

    def _eigenvalues(self) -> tuple[Tensor, int]:
        """Eigenvalues in float64, and how many others there are, which are c."""
        values = self._part.spectrum().values
        return values + self.c, self.shape[0] - len(values)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        return checked_logdet(*self._slogdet()).to(self.dtype)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        values, num_others = self.frozen()._eigenvalues()
        others = values.new_full([1 if num_others else 0], self.c)
        sign = values.sign().prod() * (others.sign() ** num_others).prod()
        return sign, values.abs().log().sum() + num_others * others.abs().log().sum()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        values, num_others = self.frozen()._eigenvalues()
        return (values.square().sum() + num_others * self.c**2).sqrt().to(self.dtype)

    def inverse(self, damping: float = 0.0) -> LowRankLinearOperator:
        """The operator (A + damping · I)⁻¹, by Woodbury's identity.

        A product with it costs one with U and one with its adjoint; twice that in float32 and below, or where the
        condition asks for it, for a step of iterative refinement (Higham, 1997, doi:10.1093/imanum/17.4.495). Its
        multiples are refined likewise, its sums are not.

        A solution in ``float32`` is as good as its rounding lets it be: the residual grows with the condition, from
        1e-7 for a damping of 1e-2 of the largest eigenvalue to 1e-2 for 1e-8 of it. Small dampings need ``float64``.

        Args:
            damping: Number added to the diagonal.

        Raises:
            ValueError: If that matrix is singular.
        """
        from curvlinops.operators.low_rank_inverse import LowRankInverse

        A = self.damped(damping).frozen()
        if A.c == 0.0:
            return A._inverse_of_full_rank()
        core = woodbury.inverse_core(A._part.core, A._part.gram(), A.c, torch.finfo(working_dtype(A.dtype)).eps)
        if core is None:
            raise ValueError(
                f"The matrix with damping={damping} is singular; c + damping is {A.c:g}. Pass another damping."
            )
        return LowRankInverse(A, core)

    def _inverse_of_full_rank(self) -> LowRankLinearOperator:
        size = self.shape[0]
        if min(self.U.shape) == size:
            found = self._part.spectrum()
            smallest, largest = (found.values.abs().min(), found.values.abs().max()) if size else (1.0, 1.0)
            if len(found.values) == size and smallest > size * torch.finfo(working_dtype(self.dtype)).eps * largest:
                part = LowRankPart(self.U, found.core(found.values**-2))
                return self._like(part, 0.0, self.POSITIVE_SEMIDEFINITE)
        raise ValueError(
            f"A matrix of {self.U.shape[1]} columns in {size} dimensions without a multiple of the identity is "
            "singular. Pass a positive damping, or add it first: A.damped(1e-3)."
        )

    def pinv(self) -> LowRankLinearOperator:
        """The pseudo-inverse, which is the inverse where there is a multiple of the identity.

        Else eigenvalues that are zero but for rounding stay zero.

        Raises:
            ValueError: If the multiple of the identity is not zero and the matrix is singular.
        """
        if self.c != 0:
            return self.inverse()
        A = self.frozen()
        return A._like(LowRankPart(A.U, A._part.pinv_core(working_dtype(A.dtype))), 0.0, A.POSITIVE_SEMIDEFINITE)

    def sqrt(self) -> LowRankLinearOperator:
        """The symmetric positive semi-definite square root of a positive semi-definite matrix.

        Raises:
            ValueError: If the matrix has a negative eigenvalue, or c is negative.
        """
        A = self.frozen()
        values, found = A._checked_positive(), A._part.spectrum()
        both = values.sqrt() + sqrt(A.c)
        core = found.core(torch.where(both > 0, 1.0 / both, 0.0))
        return A._like(LowRankPart(A.U, core), sqrt(A.c), is_positive=True)

    def _checked_positive(self) -> Tensor:
        """The eigenvalues, those that only rounding made negative being zero."""
        values, _ = self._eigenvalues()
        every = torch.cat([values, values.new_full([1], self.c)])
        smallest, rounding = float(every.min()), torch.finfo(working_dtype(self.dtype)).eps * float(every.abs().max())
        if self.c < 0 or smallest < -len(every) * rounding:
            raise ValueError(
                f"Expected a positive semi-definite matrix, but its smallest eigenvalue is {smallest:.2e} and c is "
                f"{self.c:.2e}. Add damping first."
            )
        return values.clamp(min=0.0)

    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        One product with U where all weights are non-negative, else one with :meth:`sqrt`. Samples with the inverse as
        covariance are ``A.inverse().sample(...)``.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            ValueError: If the matrix is not positive semi-definite, num_samples is below 1, or the generator lives on
                another device.
        """
        generator = checked_generator(self.device, num_samples, seed, generator)

        def noise(size: int) -> Tensor:
            work = working_dtype(self.dtype)
            return torch.randn(size, num_samples, dtype=work, device=self.device, generator=generator)

        core = self._part.core
        if core.ndim == 2 or not bool((core >= 0).all()) or self.c < 0:
            root: Tensor = self.sqrt() @ noise(self.shape[0]).to(self.dtype)
            return root
        result = self._up(core.sqrt().unsqueeze(-1) * noise(len(core)))
        if self.c != 0:
            result = torch.add(result, noise(self.shape[0]), alpha=sqrt(self.c))
        return result.to(self.dtype)

    # -------------------------------------------------------------------- algebra

    def damped(self, damping: float) -> LowRankLinearOperator:
        """The low-rank matrix A + damping · I.

        Raises:
            ValueError: If the damping is not finite.
        """
        if not isfinite(damping):
            raise ValueError(f"damping: expected a finite number, got {damping}.")
        return self._like(self._part, self.c + float(damping), self.POSITIVE_SEMIDEFINITE and damping >= 0)

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        space = self.domain.join(other.domain, "sum")
        is_positive = self.POSITIVE_SEMIDEFINITE and other.POSITIVE_SEMIDEFINITE
        if isinstance(other, LowRankLinearOperator):
            return self._like(self._part.plus(other._part), self.c + other.c, is_positive, space)
        multiple = multiple_of_identity(other)
        return None if multiple is None else self._like(self._part, self.c + multiple, is_positive, space)

    def _closed_scaling(self, factor: float) -> LinearOperator:
        part = LowRankPart(self.U, self._part.core * factor)
        return self._like(part, self.c * factor, self.POSITIVE_SEMIDEFINITE and factor >= 0)

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        multiple = multiple_of_identity(other)
        return None if multiple is None else self._closed_scaling(multiple)

    def _repr_extra(self) -> str:
        return f", rank at most {min(self.U.shape)}, c={self.c:g}, of {type(self.U).__name__}"


def _checked_weights(s: Tensor | None, U: LinearOperator) -> Tensor:
    size = U.shape[1]
    if s is None:
        return torch.ones(size, dtype=torch.float64, device=U.device)
    if not isinstance(s, Tensor):
        raise TypeError(f"s: expected a tensor [{size}], got {type(s).__name__}.")
    if s.shape != (size,) or s.device != U.device or s.is_complex():
        raise ValueError(
            f"s: expected a real tensor [{size}] on {U.device}, got {list(s.shape)}, {s.dtype}, on {s.device}."
        )
    weights = s.detach().double().clone()
    if not bool(weights.isfinite().all()):
        raise ValueError(f"s: {int((~weights.isfinite()).sum())} of {size} weights are not finite.")
    return weights
