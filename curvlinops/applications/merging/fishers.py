"""The Fisher matrices of the models: read, checked, normalised and floored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from curvlinops import Diagonal, IdentityLinearOperator, LinearOperator, Space
from curvlinops.applications.checked_numbers import checked_number
from curvlinops.applications.merging.models import Models
from curvlinops.applications.named_tensors import as_operator, named_tensors

#: By how much a Fisher matrix may fail to be positive: dᵀFd relative to ‖d‖ ‖Fd‖.
_NEGATIVE = 1e-3


@dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher matrix of one model.

    Args:
        operator: The matrix.
        names: The parameters that it acts on, in its order.
    """

    operator: LinearOperator
    names: tuple[str, ...]

    def quadratic_form(self, delta: Mapping[str, Tensor], what: str, energy: float) -> float:
        """δᵀ F δ, in the dtype and on the device of δ.

        Args:
            delta: δ by name, of which the parameters of the matrix are taken.
            what: How messages call the matrix.
            energy: See :func:`checked_form`.

        Raises:
            ValueError: If it shows that the matrix is not positive semi-definite.
        """
        flat = torch.cat([delta[name].flatten() for name in self.names])
        space = _space(delta, self.names, flat.dtype, flat.device)
        return checked_form(flat, self.operator.embedded(space, self.names) @ flat, what, "the result", energy)


def checked_form(d: Tensor, Fd: Tensor, what: str, other: str, energy: float = 0.0) -> float:
    """dᵀFd, which must not be negative but for rounding.

    Args:
        d: The difference between a model and another point ``[D]``.
        Fd: Its product ``[D]``.
        what: How messages call the matrix F.
        other: How messages call the other point.
        energy: What dᵀFd is of the order of at the anchor: where Fd is all rounding, its sign says nothing.

    Raises:
        ValueError: If it is negative.
    """
    form = float(d.double() @ Fd.double())
    if form < -_NEGATIVE * max(float(d.double().norm() * Fd.double().norm()), energy):
        raise ValueError(
            f"{what}: expected a positive semi-definite matrix F, but dᵀFd = {form:.3g} for the difference d between "
            f"its model and {other}. A generalised Gauss-Newton matrix is one, a Hessian need not be."
        )
    return form


def read_fishers(fishers: Sequence[Any] | None, models: Models, normalize: bool, floor: float) -> list[Fisher]:
    """One Fisher matrix for each model, as operators.

    Args:
        fishers: Operators, or dicts or lists of diagonals; None for identities.
        models: The models.
        normalize: Whether to divide each by its Frobenius norm.
        floor: Least entry of diagonals.

    Raises:
        TypeError: If a Fisher is of another kind.
        ValueError: If numbers, names, shapes or values do not fit, or an option cannot be followed.
    """
    floor = checked_number(floor, "floor")
    if fishers is None:
        if normalize or floor:
            raise ValueError("normalize and floor are for Fisher matrices, and there are none: pass weights.")
        return [_identity(models, tensors) for tensors in models.tensors]
    if isinstance(fishers, (Mapping, LinearOperator, str)) or not isinstance(fishers, Sequence):
        raise TypeError(f"fishers: expected a list, one for each model, got {type(fishers).__name__}.")
    if len(fishers) != len(models.tensors):
        raise ValueError(f"fishers: expected one for each of {len(models.tensors)} models, got {len(fishers)}.")
    result = []
    for number, (given, tensors) in enumerate(zip(fishers, models.tensors, strict=True)):
        what = f"fishers[{number}]"
        fisher = _read(given, tensors, models.space, what)
        result.append(_floored(_normalised(fisher, what) if normalize else fisher, floor, what))
    return result


def _identity(models: Models, tensors: Mapping[str, Tensor]) -> Fisher:
    space, names = models.space, tuple(tensors)
    return Fisher(IdentityLinearOperator(_space(tensors, names, space.dtype, space.device)), names)


def _space(tensors: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype, device: torch.device) -> Space:
    return Space(tuple(tuple(tensors[name].shape) for name in names), dtype, device, tuple(names))


def _read(given: Any, tensors: Mapping[str, Tensor], space: Space, what: str) -> Fisher:
    """A Fisher matrix on some parameters of a model, or on all where it has no names."""
    if given is None:
        raise TypeError(f"{what}: expected a Fisher matrix, got None. Leave out fishers=, or pass a diagonal of zeros.")
    if isinstance(given, LinearOperator):
        names, dtype, device = given.domain.names or tuple(tensors), given.dtype, given.device
    else:
        names = tuple(named_tensors(given, what)) if isinstance(given, Mapping) else tuple(tensors)
        dtype, device = space.dtype, space.device
    unknown = [name for name in names if name not in tensors]
    if unknown:
        hint = " A list has positions for names: pass the model as a module or a dict." if "0" in tensors else ""
        raise ValueError(f"{what}: its model has no parameters {unknown}; it has {list(tensors)}.{hint}")
    space = _space(tensors, names, dtype, device)
    operator = as_operator(given, space, what)
    if operator is given and isinstance(operator, Diagonal):
        operator = _diagonal(operator.diagonal(), space, what)
    return Fisher(operator, names)


def _diagonal(entries: Tensor, space: Space, what: str) -> LinearOperator:
    """A checked diagonal of entries ``[D]``."""
    return as_operator(space.shaped(entries), space, what)


def _normalised(fisher: Fisher, what: str) -> Fisher:
    """The matrix divided by its Frobenius norm; one that is zero as it is."""
    if not hasattr(fisher.operator, "frobenius_norm"):
        raise ValueError(
            f"normalize: {what}, {type(fisher.operator).__name__}, has no closed form of its Frobenius norm. Pass "
            "weights=[...] in its place, for instance one over the root of an estimate by hutchinson_squared_fro."
        )
    norm = float(fisher.operator.frobenius_norm())
    if not isfinite(norm):
        raise ValueError(f"normalize: the Frobenius norm of {what} is {norm}.")
    return fisher if norm == 0 else Fisher(fisher.operator / norm, fisher.names)


def _floored(fisher: Fisher, floor: float, what: str) -> Fisher:
    """The diagonal with entries of at least the floor."""
    if not floor:
        return fisher
    operator = fisher.operator
    if not isinstance(operator, Diagonal):
        raise ValueError(f"floor: {what} is a {type(operator).__name__} and no diagonal. Use damping in its place.")
    return Fisher(_diagonal(operator.diagonal().clamp(min=floor), operator.domain, what), fisher.names)
