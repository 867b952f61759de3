"""Which layers get a learned inverse of which structure, from what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops import Space
from curvlinops.applications.learned_inverse.blocks import FACTORS, LearnedBlock, LearnedBlocks
from curvlinops.applications.learned_inverse.layers import NamedLayer, named_layers
from curvlinops.applications.learned_inverse.layouts import Layout, OneColumn, OutputsByInputs
from curvlinops.applications.named_tensors import named_tensors

#: A Kronecker product with a factor of more rows is not chosen unless asked for.
MAX_FACTOR_SIZE = 5000
#: Nor is one with a factor of more than so many times the entries of the weight, as for an embedding of many words;
MAX_FACTOR_RATIO = 16
#: but one of at most so many rows costs little whatever the weight, as for the one output of a regression.
SMALL_FACTOR_SIZE = 1024


def trainable_tensors(source: Any, what: str) -> tuple[dict[str, Tensor], dict[str, NamedLayer]]:
    """The parameters by name, and the layers that they form.

    Args:
        source: A module, of which the trainable parameters count, or a dict or list of tensors, which all count.
        what: How messages call it.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there are no parameters.
    """
    if not isinstance(source, nn.Module):
        tensors = named_tensors(source, what)
        return tensors, _layers_by_name(tensors)
    tensors = {name: p for name, p in source.named_parameters() if p.requires_grad}
    if not tensors:
        raise ValueError(f"{what}: {type(source).__name__} has no parameter that requires a gradient.")
    return tensors, named_layers(source)


def _layers_by_name(tensors: Mapping[str, Tensor]) -> dict[str, NamedLayer]:
    """Tensors without a model: ``x.weight`` with ``x.bias`` where the sizes fit; whatever has two axes is a matrix."""
    partners = {name: f"{name.removesuffix('weight')}bias" for name in tensors if name.endswith("weight")}
    paired = {
        name: bias
        for name, bias in partners.items()
        if bias in tensors and tensors[name].ndim > 0 and tuple(tensors[bias].shape) == tuple(tensors[name].shape[:1])
    }
    layers = {}
    for name, tensor in tensors.items():
        if name in paired.values():
            continue
        stem = name.removesuffix(".weight")
        kind = "linear" if tensor.ndim > 1 else "other"
        layers[name if stem in tensors else stem] = NamedLayer(kind, name, paired.get(name))
    return layers


def blocks_of(space: Space, layers: Mapping[str, NamedLayer], structure: Any, scale: float) -> LearnedBlocks:
    """The blocks by the names of their layers; one of the name ``"full"`` if there is one for all.

    Args:
        space: The space of the parameters.
        layers: The layers.
        structure: What the user asks for, for all layers or for some by name.
        scale: The multiple of the identity that they begin at.

    Raises:
        TypeError: If the structure is neither a string nor a dict.
        ValueError: If a structure or a layer is not known, or a layer has no matrix.
    """
    if structure == "full":
        block = _block(OneColumn(space.shapes), "full", space, scale)
        return LearnedBlocks({"full": block}, {"full": range(len(space.shapes))})
    places = {name: position for position, name in enumerate(space.names or ())}
    positions = {name: [places[parameter] for parameter in layer.parameters] for name, layer in layers.items()}
    blocks = {
        name: _block_of(name, layers[name], wanted, space.select(positions[name]), scale)
        for name, wanted in _wanted(layers, structure).items()
    }
    return LearnedBlocks(blocks, positions)


def _wanted(layers: Mapping[str, NamedLayer], structure: Any) -> dict[str, str]:
    """The structure that is asked for, by layer."""
    if isinstance(structure, Mapping):
        unknown = [name for name in structure if name not in layers]
        if unknown:
            raise ValueError(f"structure: there are no layers {unknown}; the layers are {list(layers)}.")
        wanted = {name: structure.get(name, "auto") for name in layers}
    else:
        # Of all layers, a Kronecker product is asked for where there is a matrix.
        wanted = {
            name: "diagonal" if structure == "kronecker" and not layer.has_matrix else structure
            for name, layer in layers.items()
        }
    for value in wanted.values():
        if value not in ("auto", *FACTORS):
            known = ", ".join(("auto", *FACTORS))
            raise ValueError(f"structure: expected one of {known}, or a dict of them by layer, got {value!r}.")
    return wanted


def _block_of(name: str, layer: NamedLayer, wanted: str, space: Space, scale: float) -> LearnedBlock:
    """The block of one layer, whose parameters the space holds in the layer's order."""
    matrix = None
    if layer.weight is not None and len(space.shapes[0]) > 1:
        matrix = OutputsByInputs(space.shapes[0], layer.bias is not None, layer.is_transposed, layer.groups)
    if wanted == "auto":
        is_chosen = layer.has_matrix and matrix is not None and _has_small_factors(*matrix.shape)
        wanted = "kronecker" if is_chosen else "diagonal"
    if wanted != "kronecker":
        return _block(OneColumn(space.shapes), wanted, space, scale)
    if matrix is None:
        raise ValueError(
            f"structure: layer '{name}' ({space.describe()}) has no weight of two or more axes, hence no "
            "Kronecker product: use 'diagonal'."
        )
    return _block(matrix, wanted, space, scale)


def _has_small_factors(rows: int, columns: int) -> bool:
    """Whether both factors of a matrix are small, by themselves or beside it."""
    size = max(rows, columns)
    return size <= SMALL_FACTOR_SIZE or (size <= MAX_FACTOR_SIZE and size**2 <= MAX_FACTOR_RATIO * rows * columns)


def _block(layout: Layout, structure: str, space: Space, scale: float) -> LearnedBlock:
    dtype = torch.float32 if space.dtype in (torch.bfloat16, torch.float16) else space.dtype
    return LearnedBlock(layout, structure, scale, dtype, space.device)
