"""The table of what each parameter got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from curvlinops.curvature.kronecker.blocks import Block
from curvlinops.operators.space import Space


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        parameters: Names of its parameters, or their positions where they have none.
        shapes: Their shapes.
        kind: ``"Kronecker"``, ``"embedding"``, ``"exact"``, ``"diagonal"`` or ``"identity"``.
        factors: Names and shapes of what it is made of.
        reason: Why it is of this kind, where that is not plain.
    """

    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: str
    factors: Mapping[str, tuple[int, ...]]
    reason: str

    def cells(self) -> list[str]:
        """What is printed."""
        shapes = " + ".join(str(list(shape)) for shape in self.shapes)
        factors = " x ".join(str(list(shape)) for shape in self.factors.values())
        return [" + ".join(self.parameters), shapes, self.kind, factors, self.reason]


class BlockTable(Sequence[BlockRow]):
    """The blocks of a Kronecker-factored matrix, in order.

    Args:
        rows: One for each block.
    """

    def __init__(self, rows: Sequence[BlockRow]) -> None:
        self._rows = list(rows)

    @staticmethod
    def of(blocks: Sequence[Block], space: Space, kept: Sequence[Mapping[str, Tensor]]) -> BlockTable:
        """The table of computed blocks."""
        return BlockTable(
            [
                BlockRow(
                    tuple(str(i) if space.names is None else space.names[i] for i in block.positions),
                    block.shapes,
                    block.kind,
                    _shapes_of(tensors),
                    block.reason,
                )
                for block, tensors in zip(blocks, kept, strict=True)
            ]
        )

    def __getitem__(self, index: int) -> BlockRow:  # type: ignore[override]
        """A block."""
        return self._rows[index]

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._rows)

    def __iter__(self) -> Iterator[BlockRow]:
        """The blocks."""
        return iter(self._rows)

    def __repr__(self) -> str:
        """The table, a line a block."""
        lines = [["parameters", "shapes", "block", "of", ""], *(row.cells() for row in self._rows)]
        widths = [max(len(line[k]) for line in lines) for k in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, gradients before inputs as in B ⊗ A, without an axis for a single group."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    in_order = sorted(tensors, key=lambda name: (not name.startswith("gradient"), not name.startswith("input")))
    shapes = {name: tuple(tensors[name].shape) for name in in_order}
    return {name: shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for name, shape in shapes.items()}
