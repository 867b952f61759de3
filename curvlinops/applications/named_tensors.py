"""What users hand over, in one form: parameters as a dict of tensors, a Fisher matrix as an operator on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops import Diagonal, LinearOperator, Space


def named_tensors(source: Any, what: str) -> dict[str, Tensor]:
    """The tensors of a module, a dict or a list, by name; nothing is copied.

    Args:
        source: A module (its parameters, tied ones once), a dict name -> tensor, or a list of tensors, whose names are
            their positions.
        what: How messages call it.

    Raises:
        TypeError: If it is none of these, or an entry is no tensor.
        ValueError: If it is empty.
    """
    if isinstance(source, nn.Module):
        found: dict[Any, Any] = dict(source.named_parameters())
    elif isinstance(source, Mapping):
        found = dict(source)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        found = {str(position): tensor for position, tensor in enumerate(source)}
    else:
        raise TypeError(f"{what}: expected a module, or a dict or list of tensors, got {type(source).__name__}.")
    if not found:
        raise ValueError(f"{what}: there are no parameters.")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"{what}: expected tensors by name, got {type(tensor).__name__} under {name!r} ({type(name).__name__})."
            )
    return found


def space_of(tensors: Mapping[str, Tensor], what: str) -> Space:
    """The space of named tensors.

    Raises:
        ValueError: If they have different dtypes or devices, or one is not of floating point.
    """
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
    if len(kinds) > 1 or not all(dtype.is_floating_point for dtype, _ in kinds):
        found = ", ".join(f"'{name}' {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{what}: expected one dtype of floating point and one device, got {found}.")
    ((dtype, device),) = kinds
    return Space(tuple(tuple(tensor.shape) for tensor in tensors.values()), dtype, device, tuple(tensors))


def as_operator(fisher: Any, space: Space, what: str) -> LinearOperator:
    """A Fisher matrix on a space: an operator as it is, a dict or list of diagonals as a diagonal operator.

    Args:
        fisher: Operator, or its diagonal as dict name -> tensor or list of tensors in the shapes of the parameters.
        space: The space of the parameters.
        what: How messages call the Fisher.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is not symmetric, does not fit the space, or a diagonal has an entry that is negative or not
            finite.
    """
    if isinstance(fisher, LinearOperator):
        if not fisher.SELF_ADJOINT:
            raise ValueError(f"{what}: expected a symmetric operator, got {type(fisher).__name__} {fisher.shape}.")
        space.join(fisher.domain, what)
        return fisher
    if isinstance(fisher, nn.Module):
        raise TypeError(f"{what}: expected an operator, or a diagonal as a dict or list of tensors, got a module.")
    entries = named_tensors(fisher, what)
    names = space.names or tuple(str(position) for position in range(len(space.shapes)))
    if not isinstance(fisher, Mapping) and len(entries) == len(names):
        entries = dict(zip(names, entries.values(), strict=True))
    missing, unknown = [n for n in names if n not in entries], [n for n in entries if n not in names]
    if missing or unknown:
        raise ValueError(f"{what}: the names do not fit the parameters: missing {missing}, unknown {unknown}.")
    for name, shape in zip(names, space.shapes, strict=True):
        check_diagonal(entries[name], shape, f"{what}, '{name}'")
    moved = {name: entries[name].detach().to(dtype=space.dtype, device=space.device, copy=True) for name in names}
    result = Diagonal(moved if space.names is not None else list(moved.values()))
    result.POSITIVE_SEMIDEFINITE = True
    return result


def check_diagonal(entry: Tensor, shape: Sequence[int], what: str) -> None:
    """Refuse the diagonal of a Fisher matrix that does not have the parameter's shape, or cannot be one."""
    if tuple(entry.shape) != tuple(shape):
        raise ValueError(f"{what}: expected the shape of the parameter, {list(shape)}, got {list(entry.shape)}.")
    if not bool(torch.isfinite(entry).all()):
        raise ValueError(f"{what}: the diagonal has entries that are not finite.")
    if bool((entry < 0).any()):
        raise ValueError(f"{what}: a Fisher matrix has no negative diagonal entry, got {float(entry.min()):.3g}.")
