"""Which block each parameter gets: a Kronecker product where a weight meets inputs, else a whole one or a diagonal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops.curvature.kronecker.blocks import Block
from curvlinops.curvature.kronecker.factored_blocks import EmbeddingBlock, KroneckerBlock
from curvlinops.curvature.kronecker.other_blocks import DiagonalBlock, ExactBlock, IdentityBlock
from curvlinops.operators.arrangement import Arrangement
from curvlinops.risk.layers.convolution import ConvolutionPart
from curvlinops.risk.layers.dense import DirectPart, LinearPart
from curvlinops.risk.layers.factors import LayerFactors
from curvlinops.risk.layers.parts import Part
from curvlinops.risk.layers.weights import table_of

#: Entries of a parameter up to which its block is kept whole, where no input factors it.
MAX_EXACT_SIZE = 1024

_TIED = "is used in ways of different kinds"
_UNKNOWN = "is not used, or in a way that is not known or not the same in all mini-batches"

#: Reasons for which a parameter has no block of its own kind.
UNSUPPORTED = (_TIED, _UNKNOWN)


@dataclass(frozen=True)
class Options:
    """What the blocks depend on.

    Attributes:
        joins_biases: Whether a weight and its bias are one block.
        reduces: Whether inputs are averaged over positions.
        has_gradients: Whether there are output gradients; without, blocks are made of inputs.
        is_strict: Whether parameters without a block of their own are refused.
    """

    joins_biases: bool
    reduces: bool
    has_gradients: bool
    is_strict: bool


def planned(
    params: Sequence[Tensor],
    labels: Sequence[str],
    factors: LayerFactors,
    biases: Mapping[int, int],
    uncovered: Collection[int],
    options: Options,
) -> list[Block]:
    """The blocks, in the order of their first parameters.

    Args:
        params: The parameters.
        labels: What error messages call them.
        factors: The columns of a mini-batch.
        biases: The bias of each weight that has one to itself.
        uncovered: Parameters that turned out not to be covered in some mini-batch.
        options: What the blocks depend on.

    Raises:
        NotImplementedError: If a parameter has no block of its own, and the options ask for one.
    """
    covered = [i for i in factors.positions if i not in uncovered]
    joined = _joined(factors, biases, covered) if options.joins_biases else {}
    blocks = []
    for i, parameter in enumerate(params):
        if i in joined.values():
            continue
        positions = [i, joined[i]] if i in joined else [i]
        shapes = [params[k].shape for k in positions]
        block = _factored(factors.parts(i), positions, shapes, options) if i in covered else None
        if block is None:
            reason = _TIED if i in covered and not _is_direct(factors.parts(i)) else "" if i in covered else _UNKNOWN
            if reason and options.is_strict:
                raise NotImplementedError(
                    f"Parameter {labels[i]} {list(parameter.shape)} {reason}, so that no Kronecker product or small "
                    "block describes it. Leave it out of params, or pass unsupported='diagonal'."
                )
            block = _other(positions, shapes, reason, i in covered, options)
        blocks.append(block)
    return blocks


def _joined(factors: LayerFactors, biases: Mapping[int, int], covered: Collection[int]) -> dict[int, int]:
    """The biases of weights whose blocks they can join: not of transposed convolutions, nor shared by two layers."""
    found = {w: b for w, b in biases.items() if w in covered and b in covered}
    shared = {b for b in found.values() if list(found.values()).count(b) > 1}
    return {w: b for w, b in found.items() if b not in shared and not _is_transposed_convolution(factors.parts(w))}


def _is_transposed_convolution(parts: Sequence[Part]) -> bool:
    return any(isinstance(part, ConvolutionPart) and part.settings.transposed for part in parts)


def _is_direct(parts: Sequence[Part]) -> bool:
    return all(isinstance(part, DirectPart) for part in parts)


def _factored(parts: Sequence[Part], positions: list[int], shapes: list[torch.Size], options: Options) -> Block | None:
    """A block with an input, if all uses of the parameter are of one such kind."""
    sizes = tuple(tuple(shape) for shape in shapes)
    first = parts[0]
    if isinstance(first, LinearPart) and len(parts) == 1:
        arrangement = Arrangement(sizes, transposed=first.transposed)
        return KroneckerBlock(positions, shapes, arrangement, options.reduces)
    if isinstance(first, ConvolutionPart) and all(isinstance(part, ConvolutionPart) for part in parts):
        kinds = {(part.settings.groups, part.settings.transposed) for part in parts}  # type: ignore[attr-defined]
        if len(kinds) == 1:
            arrangement = Arrangement(sizes, groups=first.settings.groups, transposed=first.settings.transposed)
            return KroneckerBlock(positions, shapes, arrangement, options.reduces)
    if table_of(parts) is not None:
        return EmbeddingBlock(positions, shapes, Arrangement(sizes))
    return None


def _other(positions: list[int], shapes: list[torch.Size], reason: str, is_covered: bool, options: Options) -> Block:
    if not options.has_gradients:
        return IdentityBlock(positions, shapes, options.reduces, reason)
    if is_covered and not reason and shapes[0].numel() <= MAX_EXACT_SIZE:
        return ExactBlock(positions, shapes)
    return DiagonalBlock(positions, shapes, reason or f"has more than {MAX_EXACT_SIZE} entries")
