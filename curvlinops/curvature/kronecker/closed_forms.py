"""The closed forms that a block-diagonal matrix has once it is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Generator, Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.structured import Diagonal


class ClosedForms:
    """Trace, determinant, inverse and so on, by the matrix's blocks; each computes the matrix if that is to be done."""

    @property
    @abstractmethod
    def _computed(self) -> BlockDiagonal:
        """The matrix as a block-diagonal operator."""

    def to_block_diagonal(self) -> BlockDiagonal:
        """The matrix as a plain block-diagonal operator, which needs neither the model nor the data any more."""
        return self._computed

    def trace(self) -> Tensor:
        """The trace."""
        return self._computed.trace()

    def det(self) -> Tensor:
        """The determinant; see :meth:`logdet` for large matrices, of which it over- or underflows."""
        return self._computed.det()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        return self._computed.logdet()

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        return self._computed._slogdet()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        return self._computed.frobenius_norm()

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self._computed.diagonal()

    def sqrt(self) -> BlockDiagonal:
        """The symmetric square root."""
        return self._computed.sqrt()

    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Normal samples with this matrix as covariance; ``K.inverse(...).sample(...)`` for the inverse.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.
        """
        return self._computed.sample(num_samples, seed=seed, generator=generator)

    def inverse(
        self,
        damping: float | Sequence[float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> BlockDiagonal:
        r"""The inverse, block by block; by default with each Kronecker factor damped, not their product.

        That is :math:`(B + \lambda I)^{-1} \otimes (A + \lambda I)^{-1}`, which differs from
        :math:`(K + \lambda I)^{-1}`; the latter is given by ``use_exact_damping=True`` and by
        ``K.damped(damping).inverse()``.

        EKFAC's eigenvalues take the damping exactly in any case, so that the heuristic has no meaning there.

        **Cost**: a Cholesky decomposition and an inverse of each factor; with exact damping an eigendecomposition; of
        EKFAC O(D), apart from its blocks without an input.

        Args:
            damping: λ, one number, or one for each block in the order of :attr:`blocks`.
            use_heuristic_damping: Whether to split the damping over the factors by their mean eigenvalues: B gets
                π √λ and A √λ / π (Martens & Grosse 2015, section 6.3, arXiv:1503.05671).
            min_damping: The least that a factor gets under the heuristic.
            use_exact_damping: Whether to invert K + λI.
            retry_double_precision: Whether a decomposition that fails is repeated in float64.

        Returns:
            A block-diagonal operator on the same space.

        Raises:
            ValueError: If a factor is singular, options contradict each other, or a damping is negative.
        """
        return self._computed.inverse(
            damping,
            use_heuristic_damping=use_heuristic_damping,
            min_damping=min_damping,
            use_exact_damping=use_exact_damping,
            retry_double_precision=retry_double_precision,
        )

    def pinv(self) -> BlockDiagonal:
        """The pseudo-inverse, block by block; see :meth:`BlockDiagonal.pinv`."""
        return self._computed.pinv()

    def damped(self, damping: float) -> LinearOperator:
        """The matrix K + damping · I, exactly, with exact closed forms."""
        return self._computed.damped(damping)

    def block(self, *patterns: str) -> LinearOperator:
        """The diagonal block of the parameters whose names match a pattern; see :meth:`LinearOperator.block`."""
        return self._computed.block(*patterns)

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        return self._computed._closed_sum(_of_blocks(other)) if _has_blocks(other) else None

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return self._computed._closed_scaling(factor)

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        return self._computed._closed_product(_of_blocks(other)) if _has_blocks(other) else None


def _has_blocks(other: LinearOperator) -> bool:
    """Whether a sum or product with it is closed; if not, nothing need be computed yet."""
    return isinstance(other, (ClosedForms, BlockDiagonal, Diagonal))


def _of_blocks(other: LinearOperator) -> LinearOperator:
    return other._computed if isinstance(other, ClosedForms) else other
