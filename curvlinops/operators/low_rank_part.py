"""What low-rank matrices share that differ by a multiple of the identity: the columns, the core, the spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.operators import woodbury
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.gram import gram
from curvlinops.operators.stack import HStack
from curvlinops.operators.woodbury import Spectrum


class LowRankPart:
    """U C Uᵀ with a small symmetric C: what operators that differ by a multiple of the identity share.

    Args:
        U: The operator of the columns.
        core: C in float64, as its diagonal ``[R]`` or as a matrix ``[R, R]``.
    """

    def __init__(self, U: LinearOperator, core: Tensor) -> None:
        self.U = U
        self.core = core
        self._spectrum: Spectrum | None = None

    def gram(self) -> Tensor:
        """UᵀU in float64."""
        return gram(self.U).double()

    def spectrum(self) -> Spectrum:
        """The spectrum, computed once; U must hold its values."""
        if self._spectrum is None:
            self._spectrum = woodbury.spectrum(self.core, self.gram(), self.U.shape[0])
        return self._spectrum

    def pinv_core(self, dtype: torch.dtype) -> Tensor:
        """The core of the pseudo-inverse, of columns that are exact to the rounding of a dtype."""
        found = self.spectrum()
        sizes = found.values.abs()
        rounding = len(sizes) * torch.finfo(dtype).eps * sizes.max() if len(sizes) else 0.0
        return found.core(torch.where(sizes > rounding, found.values**-2, 0.0))

    def strength(self) -> float:
        """The Frobenius norm of U C Uᵀ."""
        G = self.gram()
        if self.core.ndim == 1:
            square = self.core @ (G.square() @ self.core)
        else:
            product = self.core @ G
            square = (product * product.T).sum()
        return float(square.clamp(min=0.0).sqrt())

    def plus(self, other: LowRankPart) -> LowRankPart:
        """The sum, over the union of the columns: an operator that stands in both is taken once."""
        mine, others = (part.U.operators if isinstance(part.U, HStack) else [part.U] for part in (self, other))
        operators = list(mine)
        operators += [U for U in others if all(U is not known for known in mine)]
        starts, size = {}, 0
        for U in operators:
            starts[id(U)] = size
            size += U.shape[1]
        rows = [torch.arange(U.shape[1], device=U.device) + starts[id(U)] for U in others]
        stacked = self.U if len(operators) == len(mine) else HStack(operators)
        is_flat = self.core.ndim == other.core.ndim == 1
        core = self.core.new_zeros([size] if is_flat else [size, size])
        for part, index in ((self, torch.arange(len(self.core), device=core.device)), (other, torch.cat(rows))):
            # An operator may stand several times in one of the two, so that indices repeat.
            if is_flat:
                core.index_add_(0, index, part.core)
            else:
                core.index_put_((index.unsqueeze(-1), index), woodbury.as_matrix(part.core), accumulate=True)
        return LowRankPart(stacked, core)
