"""Sums of block-diagonal operators that act on different tensors of one space."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.space import Space
from curvlinops.operators.structured import multiple_of_identity


def sum_of_cuts(one: BlockDiagonal, other: BlockDiagonal) -> BlockDiagonal | None:
    """The sum by the finest blocks that are unions of blocks of both; None where that is one block for all.

    None, too, where neither has a block that is known to be zero, as :meth:`LinearOperator.embedded` makes them: two
    operators that are cut in different ways make a lazy sum.

    Args:
        one: The one.
        other: The other, on the same space.
    """
    groups = joined_cuts([*one.positions, *other.positions])
    if len(groups) == 1 or not any(is_zero(block) for block in (*one.blocks, *other.blocks)):
        return None
    space = one.domain.join(other.domain, "block-diagonal")
    return BlockDiagonal([_sum_on(group, space, (one, other)) for group in groups], positions=groups, space=space)


def joined_cuts(cuts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The finest cut of which each of several sets lies in one piece; a piece that is one of them keeps its order."""
    pieces: list[list[int]] = []
    for own in cuts:
        touching = [piece for piece in pieces if set(piece) & set(own)]
        pieces = [piece for piece in pieces if piece not in touching]
        pieces.append(list(dict.fromkeys(i for piece in (own, *touching) for i in piece)))
    return sorted(pieces, key=min)


def _sum_on(group: Sequence[int], space: Space, operators: Sequence[BlockDiagonal]) -> LinearOperator:
    """The block of a sum for tensors that no block of its terms cuts in two."""
    order = {position: i for i, position in enumerate(group)}
    terms = []
    for A in operators:
        inside = [number for number, own in enumerate(A.positions) if set(own) <= set(group)]
        blocks, positions = [A.blocks[n] for n in inside], [[order[i] for i in A.positions[n]] for n in inside]
        alone = positions == [list(range(len(group)))]
        terms.append(blocks[0] if alone else BlockDiagonal(blocks, positions=positions, space=space.select(group)))
    return plus(*terms)


def plus(one: LinearOperator, other: LinearOperator) -> LinearOperator:
    """The sum of two blocks, of which one that is known to be zero leaves the other as it is."""
    if is_zero(other):
        return one
    return other if is_zero(one) else one + other


def is_zero(block: LinearOperator) -> bool:
    """Whether a block is known to be zero."""
    if isinstance(block, BlockDiagonal):
        return all(is_zero(inner) for inner in block.blocks)
    return multiple_of_identity(block) == 0.0
