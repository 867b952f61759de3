"""Operators along the diagonal, one for each group of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from curvlinops.operators.algebra import _recut, agreed
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_positions import checked_positions, joined_space
from curvlinops.operators.closed_forms import check_parts, needs
from curvlinops.operators.damping import InverseOptions, dampings_of_blocks
from curvlinops.operators.eigen_decomposed import EigenDecomposed
from curvlinops.operators.factor_sets import eigendecompositions
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.kronecker_inverse import kronecker_inverses
from curvlinops.operators.linearising import linearized, shared_memory
from curvlinops.operators.sampling import checked_generator
from curvlinops.operators.space import Space
from curvlinops.operators.structured import Diagonal, checked_logdet


class BlockDiagonal(LinearOperator):
    """Operators along the diagonal, one for each group of tensors.

    Closed under sums, scalings and products with block-diagonal operators of the same blocks and with diagonals, as
    far as the blocks are. It has the closed forms that all of its blocks have: ``hasattr(A, "inverse")`` says whether.

    Args:
        blocks: Square operators.
        positions: The tensors of the space that each block acts on, in the order of the block's own: each tensor of the
            space once. By default the blocks follow one another.
        space: The space; by default that of the blocks' tensors, with names where all have some. A flat block may act
            on tensors of any shapes.

    Attributes:
        blocks: The blocks.
        positions: The tensors that each acts on.

    Raises:
        ValueError: If there is no block, one is not square, or blocks, positions and space do not fit.

    >>> from curvlinops import TensorLinearOperator
    >>> A = BlockDiagonal([TensorLinearOperator(2 * torch.eye(2)), TensorLinearOperator(4 * torch.eye(1))])
    >>> A.inverse().trace().item()
    1.25
    >>> BlockDiagonal(A.blocks, positions=[[1], [0]]).diagonal().tolist()
    [4.0, 2.0, 2.0]
    """

    def __init__(
        self,
        blocks: Sequence[LinearOperator],
        *,
        positions: Sequence[Sequence[int]] | None = None,
        space: Space | None = None,
    ) -> None:
        if not blocks:
            raise ValueError("Expected at least one block, got none.")
        for block in blocks:
            block._require_square("BlockDiagonal")
        self.blocks = list(blocks)
        self.positions = checked_positions(positions, [len(block.domain.shapes) for block in blocks], space)
        joined = joined_space([block.domain for block in blocks], self.positions, space)
        super().__init__(joined, joined)
        self.SELF_ADJOINT = all(block.SELF_ADJOINT for block in blocks)
        self.POSITIVE_SEMIDEFINITE = all(block.POSITIVE_SEMIDEFINITE for block in blocks)

    # ------------------------------------------------------------------ products

    def _parts(self, X: list[Tensor]) -> list[list[Tensor]]:
        """The tensors of each block, in the shapes of the block's own space."""
        return [
            _recut([X[i] for i in chosen], space, block.domain)
            for block, chosen, space in zip(self.blocks, self.positions, self._spaces, strict=True)
        ]

    @cached_property
    def _spaces(self) -> list[Space]:
        """The part of the space that each block acts on."""
        return [self.domain.select(chosen) for chosen in self.positions]

    def _together(self, parts: Sequence[list[Tensor]]) -> list[Tensor]:
        """The tensors of the space from those of each block."""
        found: dict[int, Tensor] = {}
        for block, chosen, part, space in zip(self.blocks, self.positions, parts, self._spaces, strict=True):
            found.update(zip(chosen, _recut(part, block.domain, space), strict=True))
        return [found[i] for i in range(len(found))]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._together([b._matmat(part) for b, part in zip(self.blocks, self._parts(X), strict=True)])

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._together([b._rmatmat(part) for b, part in zip(self.blocks, self._parts(X), strict=True)])

    # -------------------------------------------------------------- closed forms

    def _check_closed(self, quantity: str) -> None:
        check_parts(self.blocks, quantity, "Block")

    def _of_blocks(self, quantity: str, *args: Any) -> list[Any]:
        return [getattr(block, quantity)(*args) for block in self.blocks]

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        """Vectors or columns of the blocks as one."""
        columns = [part.unsqueeze(-1) if part.ndim == 1 else part for part in parts]
        split = [block.domain.split(part) for block, part in zip(self.blocks, columns, strict=True)]
        flat = Space.merge(self._together(split))
        return flat.squeeze(-1) if parts[0].ndim == 1 else flat

    @needs("diagonal")
    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return self._flat(self._of_blocks("diagonal"))

    @needs("trace")
    def trace(self) -> Tensor:
        """The trace."""
        return torch.stack([trace.double() for trace in self._of_blocks("trace")]).sum().to(self.dtype)

    @needs("_slogdet")
    def det(self) -> Tensor:
        """The determinant; infinite or zero where it is beyond the range of the dtype."""
        sign, logabsdet = self._slogdet()
        return (sign * logabsdet.exp()).to(self.dtype)

    @needs("_slogdet")
    def logdet(self) -> Tensor:
        """The logarithm of the determinant: the sum over the blocks."""
        return checked_logdet(*self._slogdet()).to(self.dtype)

    @needs("_slogdet")
    def _slogdet(self) -> tuple[Tensor, Tensor]:
        self._decompose([b for b in self.blocks if isinstance(b, Kronecker) and b.shift])
        signs, logs = zip(*self._of_blocks("_slogdet"), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    @needs("frobenius_norm")
    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        norms = [norm.double() for norm in self._of_blocks("frobenius_norm")]
        return torch.stack(norms).square().sum().sqrt().to(self.dtype)

    @needs("inverse")
    def inverse(
        self,
        damping: float | Sequence[float] = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        retry_double_precision: bool = True,
    ) -> BlockDiagonal:
        """The operator (A + damping · I)⁻¹, block by block; Kronecker products are damped as the options say.

        Kronecker blocks with factors of one size are inverted together. Blocks of other kinds are damped exactly.

        Args:
            damping: Number added to the diagonal, or one for each block.
            use_heuristic_damping: Of Kronecker products; see :meth:`Kronecker.inverse`, as for what follows.
            min_damping: Likewise.
            use_exact_damping: Likewise.
            retry_double_precision: Likewise.

        Raises:
            ValueError: If a damped block is singular, the number of dampings is not that of the blocks, or the options
                exclude each other.
        """
        options = InverseOptions(use_heuristic_damping, min_damping, use_exact_damping, retry_double_precision)
        pairs = list(zip(self.blocks, dampings_of_blocks(damping, len(self.blocks)), strict=True))
        products = [(block, number) for block, number in pairs if isinstance(block, Kronecker)]
        inverted = iter(kronecker_inverses([b for b, _ in products], [number for _, number in products], options))
        return self._rebuilt([_inverse(b, number, options, inverted) for b, number in pairs])

    @needs("pinv")
    def pinv(self) -> BlockDiagonal:
        """The pseudo-inverse, block by block: what is zero but for rounding in a block stays zero."""
        self._decompose([b for b in self.blocks if isinstance(b, Kronecker)])
        return self._rebuilt(self._of_blocks("pinv"))

    @needs("sqrt")
    def sqrt(self) -> BlockDiagonal:
        """The symmetric positive semi-definite square root, block by block."""
        self._decompose([b for b in self.blocks if isinstance(b, Kronecker)])
        return self._rebuilt(self._of_blocks("sqrt"))

    @staticmethod
    def _decompose(blocks: Sequence[Kronecker]) -> None:
        """Decompose the factors of several blocks at once, those of one size together; the factors remember."""
        eigendecompositions([factor for block in blocks for factor in (block.left, block.right)])

    @needs("sample")
    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            ValueError: If a block is not positive semi-definite, num_samples is below 1, or the generator lives on
                another device.
        """
        # One generator for all: blocks that began from one seed would depend on each other.
        generator = checked_generator(self.device, num_samples, seed, generator)
        self._decompose([b for b in self.blocks if isinstance(b, Kronecker)])
        return self._flat([block.sample(num_samples, generator=generator) for block in self.blocks])  # type: ignore[attr-defined]

    def block(self, *patterns: str) -> LinearOperator:
        """The block of the parameters whose names match a pattern: block-diagonal where it cuts no block in two."""
        found = super().block(*patterns)
        chosen: list[int] = found.chosen  # type: ignore[attr-defined]
        inside = [number for number, own in enumerate(self.positions) if set(own) <= set(chosen)]
        if sum(len(self.positions[number]) for number in inside) < len(chosen):
            return found
        order = {position: i for i, position in enumerate(chosen)}
        return BlockDiagonal(
            [self.blocks[number] for number in inside],
            positions=[[order[i] for i in self.positions[number]] for number in inside],
            space=self.domain.select(chosen),
        )

    # ---------------------------------------------------------- what passes through

    def frozen(self) -> BlockDiagonal:
        """The same operator with frozen blocks."""
        return self if self._holds_values else self._rebuilt([block.frozen() for block in self.blocks])

    @property
    def _holds_values(self) -> bool:
        return all(block._holds_values for block in self.blocks)

    @property
    def _is_definite(self) -> bool:
        return all(block._is_definite for block in self.blocks)

    def _agreed(self, flag: bool) -> bool:
        return agreed(self.blocks, flag)

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> BlockDiagonal:
        """The same operator with linearised blocks."""
        share = shared_memory(max_memory, self.blocks)
        return self._rebuilt([linearized(block, share, engine) for block in self.blocks])

    def adjoint(self) -> LinearOperator:
        """The block-diagonal operator of the adjoints."""
        if self.SELF_ADJOINT:
            return self
        if self._adjoint_of is None:
            result = self._rebuilt([block.H for block in self.blocks])
            result._adjoint_of = self
            return result
        return self._adjoint_of

    _adjoint_of: BlockDiagonal | None = None

    # -------------------------------------------------------------------- algebra

    def damped(self, damping: float) -> BlockDiagonal:
        """The operator A + damping · I, block by block."""
        return self._rebuilt([block.damped(damping) for block in self.blocks])

    def _matching(self, other: LinearOperator) -> Sequence[LinearOperator] | None:
        """The blocks of the other operator, in the order of these, where it is cut as this one is."""
        if isinstance(other, BlockDiagonal):
            cut = {tuple(own): block for block, own in zip(other.blocks, other.positions, strict=True)}
            found = [cut.get(tuple(own)) for own in self.positions]
            sizes = [None if block is None else block.shape for block in found]
            if sizes != [block.shape for block in self.blocks]:
                return None
            return [block for block in found if block is not None]
        if isinstance(other, Diagonal):
            space = self.domain.join(other.domain, "block-diagonal and diagonal")
            if space.shapes != self.domain.shapes:
                return None
            columns = [entry.unsqueeze(-1) for entry in other._on(space)]
            parts = zip(self._parts(columns), self.blocks, strict=True)
            return [other._like([entry.squeeze(-1) for entry in part], block.domain) for part, block in parts]
        return None

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        from curvlinops.operators.block_sums import plus, sum_of_cuts

        blocks = self._matching(other)
        if blocks is None:
            return sum_of_cuts(self, other) if isinstance(other, BlockDiagonal) else None
        return self._of([plus(a, b) for a, b in zip(self.blocks, blocks, strict=True)], other)

    def _closed_conversion(self, dtype: torch.dtype, device: torch.device) -> BlockDiagonal:
        from curvlinops.operators.embedded import converted

        return self._rebuilt([converted(b, dtype, device) for b in self.blocks], self.domain.to(dtype, device))

    def _of(self, blocks: Sequence[LinearOperator], other: LinearOperator) -> BlockDiagonal:
        return self._rebuilt(blocks, self.domain.join(other.domain, "block-diagonal"))

    def _rebuilt(self, blocks: Sequence[LinearOperator], space: Space | None = None) -> BlockDiagonal:
        """Other blocks on the same space."""
        return BlockDiagonal(blocks, positions=self.positions, space=self.domain if space is None else space)

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return self._rebuilt([factor * block for block in self.blocks])

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        blocks = self._matching(other)
        if blocks is None:
            return None
        return self._of([a @ b for a, b in zip(self.blocks, blocks, strict=True)], other)

    def _multiplied_by_diagonal(self, diagonal: Diagonal) -> LinearOperator | None:
        """The product with a diagonal from the left."""
        blocks = self._matching(diagonal)
        if blocks is None:
            return None
        return self._of([d @ block for d, block in zip(blocks, self.blocks, strict=True)], diagonal)


def _inverse(block: LinearOperator, damping: float, options: InverseOptions, inverted: Any) -> LinearOperator:
    if isinstance(block, Kronecker):
        found: LinearOperator = next(inverted)
        return found
    if isinstance(block, (EigenDecomposed, BlockDiagonal)):
        return block.inverse(
            damping,
            options.use_heuristic_damping,
            options.min_damping,
            options.use_exact_damping,
            options.retry_double_precision,
        )
    return block.inverse(damping)  # type: ignore[attr-defined, no-any-return]
