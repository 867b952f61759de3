"""Operators with closed forms that keep their structure: diagonal, block-diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.algebra import agreed, linearized, shared_memory
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space


class Diagonal(LinearOperator):
    """A diagonal matrix; closed under sums, scalings, products and damping.

    Cost: O(D) each.

    Args:
        entries: The diagonal as a flat tensor, or as a list or dict of tensors in the shapes of the parameters.

    >>> A = Diagonal({"weight": torch.ones(2, 2), "bias": torch.full((2,), 3.0)})
    >>> (A + A).inverse(damping=2.0).diagonal().tolist()
    [0.25, 0.25, 0.25, 0.25, 0.125, 0.125]
    """

    SELF_ADJOINT = True

    def __init__(self, entries: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        names = tuple(entries) if isinstance(entries, Mapping) else None
        tensors = list(entries.values()) if isinstance(entries, Mapping) else entries
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not tensors:
            raise ValueError("Expected at least one tensor of diagonal entries, got none.")
        first = tensors[0]
        space = Space(tuple(tuple(t.shape) for t in tensors), first.dtype, first.device, names)
        for index, tensor in enumerate(tensors):
            space._check_kind(tensor, space.label(index))
        self._kept_entries: list[Tensor] | None = [t.detach() for t in tensors]
        self._owns_entries = False
        LinearOperator.__init__(self, space, space)

    @property
    def _entries(self) -> list[Tensor]:
        assert self._kept_entries is not None
        return self._kept_entries

    def _like(self, entries: Sequence[Tensor], space: Space | None = None) -> Diagonal:
        """A plain diagonal operator on the same space."""
        result = Diagonal(entries)
        result._domain = result._codomain = self.domain if space is None else space
        result.POSITIVE_SEMIDEFINITE = False
        result._owns_entries = True
        return result

    def frozen(self) -> Diagonal:
        """The same operator with copies of the entries that it was given."""
        if self._holds_values:
            return self
        result = self._like([entry.clone() for entry in self._entries])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE
        return result

    @property
    def _holds_values(self) -> bool:
        return self._owns_entries

    @property
    def _is_definite(self) -> bool:
        return self.POSITIVE_SEMIDEFINITE and all(bool((entry > 0).all()) for entry in self._entries)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [entry.unsqueeze(-1) * x for entry, x in zip(self._entries, X, strict=True)]

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return torch.cat([entry.flatten() for entry in self._entries])

    def trace(self) -> Tensor:
        """The trace."""
        return self.diagonal().sum()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        return checked_logdet(*self._slogdet())

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        diagonal = self.diagonal()
        return diagonal.sign().prod(), diagonal.abs().log().sum()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        return self.diagonal().square().sum().sqrt()

    def inverse(self, damping: float = 0.0) -> Diagonal:
        """The operator (A + damping · I)⁻¹.

        Args:
            damping: Number added to the diagonal.

        Raises:
            ValueError: If an entry is zero after damping.
        """
        damped = [entry + damping for entry in self._entries]
        zeros = sum(int((entry == 0).sum()) for entry in damped)
        if zeros:
            raise ValueError(
                f"{zeros} of {self.shape[0]} diagonal entries are zero with damping={damping}: the inverse does not "
                "exist. Pass a positive damping."
            )
        result = self._like([1.0 / entry for entry in damped])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and damping >= 0
        return result

    def block(self, *patterns: str) -> LinearOperator:
        """The entries of the parameters whose names match a pattern; see :meth:`LinearOperator.block`."""
        chosen = super().block(*patterns).chosen  # type: ignore[attr-defined]
        result = self._like([self._entries[i] for i in chosen], self.domain.select(chosen))
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE
        return result

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Diagonal):
            return None
        space = self.domain.join(other.domain, "sum of diagonals")
        result = self._like([a + b for a, b in zip(self._on(space), other._on(space), strict=True)], space)
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and other.POSITIVE_SEMIDEFINITE
        return result

    def _closed_scaling(self, factor: float) -> LinearOperator:
        result = self._like([entry * factor for entry in self._entries])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and factor >= 0
        return result

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        if isinstance(other, BlockDiagonal):
            parts = other._matching(self)
            if parts is None:
                return None
            return other._of([d @ block for d, block in zip(parts, other.blocks, strict=True)], self)
        if not isinstance(other, Diagonal):
            return None
        space = self.domain.join(other.domain, "product of diagonals")
        result = self._like([a * b for a, b in zip(self._on(space), other._on(space), strict=True)], space)
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and other.POSITIVE_SEMIDEFINITE
        return result

    def _on(self, space: Space) -> list[Tensor]:
        """The entries in the shapes of a space of the same size."""
        if self.domain.shapes == space.shapes:
            return self._entries
        return [part.squeeze(-1) for part in space.split(self.diagonal().unsqueeze(-1))]


class IdentityLinearOperator(Diagonal):
    """The identity on tensors of the given shapes.

    Args:
        shapes: Shapes of the tensors, or a space: ``A.domain`` for the identity that goes with an operator A.
        device: Their device; a space has its own.
        dtype: Their dtype, likewise.

    >>> G = 0.5 * IdentityLinearOperator([(2, 3), (3,)], "cpu", torch.float32)
    >>> G.trace().item()
    4.5
    """

    POSITIVE_SEMIDEFINITE = True

    def __init__(
        self,
        shapes: Sequence[Sequence[int]] | Space,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(shapes, Space):
            sizes = tuple(tuple(shape) for shape in shapes)
            super().__init__([torch.ones(size, device=torch.device(device), dtype=dtype) for size in sizes])
            return
        super().__init__([torch.ones(shape, device=shapes.device, dtype=shapes.dtype) for shape in shapes.shapes])
        self._domain = self._codomain = shapes


class BlockDiagonal(LinearOperator):
    """Operators along the diagonal, one for each group of tensors.

    Closed under sums, scalings and products with block-diagonal operators of the same blocks and with diagonals, as
    far as the blocks are.

    Args:
        blocks: Square operators, in the order of the tensors.

    >>> from curvlinops import TensorLinearOperator
    >>> A = BlockDiagonal([TensorLinearOperator(2 * torch.eye(2)), TensorLinearOperator(4 * torch.eye(1))])
    >>> A.inverse().trace().item()
    1.25
    """

    def __init__(self, blocks: Sequence[LinearOperator]) -> None:
        if not blocks:
            raise ValueError("Expected at least one block, got none.")
        for block in blocks:
            block._require_square("BlockDiagonal")
        self.blocks = list(blocks)
        space = _concatenated([block.domain for block in blocks])
        super().__init__(space, space)
        self.SELF_ADJOINT = all(block.SELF_ADJOINT for block in blocks)
        self.POSITIVE_SEMIDEFINITE = all(block.POSITIVE_SEMIDEFINITE for block in blocks)

    def _parts(self, X: list[Tensor]) -> list[list[Tensor]]:
        counts = [len(block.domain.shapes) for block in self.blocks]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [X[start : start + count] for start, count in zip(starts, counts, strict=True)]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [r for block, part in zip(self.blocks, self._parts(X), strict=True) for r in block._matmat(part)]

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return [r for block, part in zip(self.blocks, self._parts(X), strict=True) for r in block._rmatmat(part)]

    def _of_blocks(self, quantity: str, *args: Any) -> list[Any]:
        for number, block in enumerate(self.blocks):
            if not hasattr(block, quantity):
                raise NotImplementedError(
                    f"Block {number} ({type(block).__name__}) has no closed form of '{quantity.strip('_')}'."
                )
        return [getattr(block, quantity)(*args) for block in self.blocks]

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return torch.cat(self._of_blocks("diagonal"))

    def trace(self) -> Tensor:
        """The trace."""
        return torch.stack(self._of_blocks("trace")).sum()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant: the sum over the blocks."""
        return checked_logdet(*self._slogdet()).to(self.dtype)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        signs, logs = zip(*self._of_blocks("_slogdet"), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        return torch.stack(self._of_blocks("frobenius_norm")).square().sum().sqrt()

    def inverse(self, damping: float = 0.0) -> BlockDiagonal:
        """The operator (A + damping · I)⁻¹, block by block."""
        return self._rebuilt(self._of_blocks("inverse", damping))

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

    def _matching(self, other: LinearOperator) -> Sequence[LinearOperator] | None:
        """The blocks of the other operator, where it is cut as this one is."""
        if isinstance(other, BlockDiagonal):
            same = [b.domain.shapes for b in self.blocks] == [b.domain.shapes for b in other.blocks]
            return other.blocks if same else None
        if isinstance(other, Diagonal):
            space = self.domain.join(other.domain, "block-diagonal and diagonal")
            if space.shapes != self.domain.shapes:
                return None
            entries = self._parts(other._on(space))
            return [other._like(part, block.domain) for part, block in zip(entries, self.blocks, strict=True)]
        return None

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        blocks = self._matching(other)
        if blocks is None:
            return None
        return self._of([a + b for a, b in zip(self.blocks, blocks, strict=True)], other)

    def _of(self, blocks: Sequence[LinearOperator], other: LinearOperator) -> BlockDiagonal:
        return self._rebuilt(blocks, self.domain.join(other.domain, "block-diagonal"))

    def _rebuilt(self, blocks: Sequence[LinearOperator], space: Space | None = None) -> BlockDiagonal:
        """Other blocks on the same space."""
        result = BlockDiagonal(blocks)
        result._domain = result._codomain = self.domain if space is None else space
        return result

    def _closed_scaling(self, factor: float) -> LinearOperator:
        return self._rebuilt([factor * block for block in self.blocks])

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        blocks = self._matching(other)
        if blocks is None:
            return None
        return self._of([a @ b for a, b in zip(self.blocks, blocks, strict=True)], other)


def _concatenated(spaces: Sequence[Space]) -> Space:
    first = spaces[0]
    for number, space in enumerate(spaces):
        if space.dtype != first.dtype or space.device != first.device:
            raise ValueError(
                f"Block {number} is {space.dtype} on {space.device}, block 0 is {first.dtype} on {first.device}: "
                "all blocks need one dtype and device."
            )
    shapes = tuple(shape for space in spaces for shape in space.shapes)
    if any(space.names is None for space in spaces):
        return Space(shapes, first.dtype, first.device)
    return Space(shapes, first.dtype, first.device, tuple(n for space in spaces for n in space.names or ()))


def checked_logdet(sign: Tensor, logabsdet: Tensor) -> Tensor:
    """The logarithm of a determinant, where it exists."""
    if not sign > 0:
        raise ValueError("The determinant is not positive, so its logarithm does not exist. Add damping first.")
    return logabsdet
