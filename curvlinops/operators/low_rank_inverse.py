"""The inverse of a low-rank matrix plus a multiple of the identity, with refined products."""

from __future__ import annotations

from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from curvlinops.operators import woodbury
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.low_rank import LowRankLinearOperator
from curvlinops.operators.low_rank_part import LowRankPart
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.woodbury import InverseCore


class LowRankInverse(LowRankLinearOperator):
    """(U C Uᵀ + c I)⁻¹ = U C' Uᵀ + I / c, which knows what it is the inverse of.

    Rounding in UᵀB is magnified by the condition where B lies along U, as gradients do. The residual of a first
    solution X = B / c + U Y is -c U Δ with Δ = Y + C UᵀX / c, up to what rounding leaves without magnification, and its
    own solution is -U (I + c C' G) Δ: the step of refinement needs UᵀX and one product with U, half of what a product
    with the matrix followed by another solve would.
    """

    def __init__(self, source: LowRankLinearOperator, core: InverseCore) -> None:
        LinearOperator.__init__(self, source.domain, source.domain)
        self.source = source
        self.c = 1.0 / source.c
        self.POSITIVE_SEMIDEFINITE = source.POSITIVE_SEMIDEFINITE
        self._core = core
        condition = 1.0 + source._part.strength() / abs(source.c)
        # The rounding of C' grows with the square of the condition: in float64 most matrices need no refinement.
        self._is_refined = torch.finfo(self.dtype).eps * condition**2 > 1e-9

    @cached_property
    def _part(self) -> LowRankPart:  # type: ignore[override]
        return LowRankPart(self.source.U, self._core.to_dense())

    @property
    def U(self) -> LinearOperator:
        """The operator of the columns."""
        return self.source.U

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        core, c = self._core, self.source.c
        # What goes through U is rounded to its dtype, so the correction must see the rounded numbers.
        Y = core.times(self._down(X)).to(self.dtype)
        solution = torch.add(self._up(Y), Space.merge(X).to(working_dtype(self.dtype)), alpha=self.c)
        if self._is_refined:
            first = self.domain.split(solution.to(self.dtype))
            remainder = Y.double() + woodbury.times(self.source._part.core, self._down(first)) / c
            solution -= self._up(remainder + c * core.times(self.source._part.gram() @ remainder))
        return self.domain.split(solution.to(self.dtype))

    def inverse(self, damping: float = 0.0) -> LowRankLinearOperator:
        """The operator (A + damping · I)⁻¹; what this is the inverse of where the damping is zero."""
        return self.source if damping == 0 else super().inverse(damping)

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LowRankLinearOperator:
        """The same matrix over linearised columns."""
        source = self.source.linearize(max_memory, engine=engine)
        return self if source is self.source else LowRankInverse(source, self._core)

    def _eigenvalues(self) -> tuple[Tensor, int]:
        values, num_others = self.source._eigenvalues()
        return 1.0 / values, num_others

    def sqrt(self) -> LowRankLinearOperator:
        """The symmetric square root, from the spectrum of the matrix that this is the inverse of."""
        source = self.source
        roots, root = source._checked_positive().sqrt(), sqrt(source.c)
        core = source._part.spectrum().core(-1.0 / (roots * root * (roots + root)))
        return self._like(LowRankPart(self.U, core), 1.0 / root, is_positive=True)

    def _closed_scaling(self, factor: float) -> LinearOperator:
        if factor == 0:
            return super()._closed_scaling(factor)
        source = self.source._like(
            LowRankPart(self.U, self.source._part.core / factor),
            self.source.c / factor,
            self.POSITIVE_SEMIDEFINITE and factor > 0,
        )
        return LowRankInverse(source, self._core.scaled(factor))
