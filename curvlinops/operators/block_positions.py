"""Which tensors of a space the blocks of a block-diagonal operator act on."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops.operators.space import Space


def checked_positions(
    positions: Sequence[Sequence[int]] | None, counts: Sequence[int], space: Space | None
) -> list[list[int]]:
    """The positions of each block's tensors, every tensor of the space being one of them; see ``BlockDiagonal``."""
    if positions is None:
        starts = [sum(counts[:i]) for i in range(len(counts))]
        return [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
    found = [[int(i) for i in own] for own in positions]
    every = sorted(i for own in found for i in own)
    num_tensors = len(every) if space is None else len(space.shapes)
    if len(found) != len(counts) or every != list(range(num_tensors)) or [] in found:
        raise ValueError(
            f"positions: expected, for each of {len(counts)} blocks, some of 0..{num_tensors - 1}, each of them once, "
            f"got {found}."
        )
    return found


def joined_space(spaces: Sequence[Space], positions: Sequence[Sequence[int]], space: Space | None) -> Space:
    """The space of all tensors, of which the blocks have some."""
    first = spaces[0] if space is None else space
    for number, own in enumerate(spaces):
        if own.dtype != first.dtype or own.device != first.device:
            raise ValueError(
                f"Block {number} is {own.dtype} on {own.device}, {'block 0' if space is None else 'the space'} is "
                f"{first.dtype} on {first.device}: all blocks need one dtype and device."
            )
    if space is not None:
        for number, (own, chosen) in enumerate(zip(spaces, positions, strict=True)):
            space.select(chosen).join(own, f"block {number} and its tensors")
        return space
    placed: dict[int, tuple[tuple[int, ...], str | None]] = {}
    for number, (own, chosen) in enumerate(zip(spaces, positions, strict=True)):
        if len(chosen) != len(own.shapes):
            raise ValueError(
                f"positions: block {number} acts on {len(own.shapes)} tensors ({own.describe()}), got {list(chosen)}."
            )
        placed.update(zip(chosen, zip(own.shapes, own.names or [None] * len(chosen), strict=True), strict=True))
    shapes, names = zip(*(placed[i] for i in range(len(placed))), strict=True)
    known = tuple(name for name in names if name is not None)
    return Space(shapes, first.dtype, first.device, known if len(known) == len(names) else None)
