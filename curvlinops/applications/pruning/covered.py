"""The parameters that an inverse curvature acts on, as one vector next to its diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from curvlinops import CurvatureLinearOperator, LinearOperator, Space
from curvlinops.applications.named_tensors import named_tensors


class CoveredParameters:
    """The parameters that an inverse curvature Q acts on, in its order.

    Args:
        params: What the user passed.
        Q: The inverse curvature.

    Attributes:
        values: The parameters as one vector ``[D]``, in the largest precision of them, Q and float32.
        diagonal: The diagonal of Q ``[D]``, which is positive.

    Raises:
        TypeError: If Q is no operator or has no diagonal, or the parameters are none.
        ValueError: If Q and the parameters do not fit, or an entry of either cannot be used.
    """

    def __init__(self, params: Any, Q: LinearOperator) -> None:
        _check_operator(Q)
        self._is_list = isinstance(params, Sequence)
        named = _in_order(named_tensors(params, "params"), Q.domain, self._is_list)
        self._names, self._tensors = list(named), list(named.values())
        self.values = self._flat(Q.dtype)
        self.diagonal: Tensor = Q.diagonal().to(self.values.dtype)  # type: ignore[attr-defined]
        self._check_numbers()

    def _flat(self, dtype: torch.dtype) -> Tensor:
        for known in (torch.float32, *(tensor.dtype for tensor in self._tensors)):
            dtype = torch.promote_types(dtype, known)
        return torch.cat([tensor.detach().flatten().to(dtype) for tensor in self._tensors])

    def _check_numbers(self) -> None:
        num_wrong = int((~self.values.isfinite()).sum())
        if num_wrong:
            raise ValueError(f"params: {num_wrong} of {len(self.values)} entries are not finite.")
        num_wrong = int((~(self.diagonal > 0) | self.diagonal.isinf()).sum())
        if num_wrong:
            raise ValueError(
                f"Q: expected a positive diagonal, but {num_wrong} of its {len(self.diagonal)} entries are not, the "
                f"least being {float(self.diagonal.min()):.3g}. Q is the inverse of a curvature: invert with a larger "
                "damping, or in float64."
            )

    def matching(self, patterns: Sequence[str] | None) -> Tensor:
        """Which entries ``[D]`` belong to parameters whose names match a pattern; all where there is none.

        Raises:
            ValueError: If a pattern matches no parameter, or there is no entry.
        """
        wanted = ["*"] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
        idle = [pattern for pattern in wanted if not any(fnmatchcase(name, pattern) for name in self._names)]
        parts = []
        for name, tensor in zip(self._names, self._tensors, strict=True):
            matches = any(fnmatchcase(name, pattern) for pattern in wanted)
            parts.append(torch.full([tensor.numel()], matches, device=tensor.device))
        found = torch.cat(parts)
        if idle or not bool(found.any()):
            raise ValueError(f"prunable: nothing matches {idle or wanted}; the parameters of Q are {self._names}.")
        return found

    def in_shape(self, flat: Tensor) -> dict[str, Tensor] | list[Tensor]:
        """A vector ``[D]`` in the shapes of the parameters: a list where they are one, else a dict."""
        shaped = self._parts(flat)
        return shaped if self._is_list else dict(zip(self._names, shaped, strict=True))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([tensor.numel() for tensor in self._tensors])
        return [part.reshape(tensor.shape).clone() for part, tensor in zip(parts, self._tensors, strict=True)]

    def check_writable(self) -> None:
        """Refuse parameters that cannot be overwritten each by its own values.

        Raises:
            ValueError: If one is of inference mode, or entries share memory.
        """
        sharing: dict[int, list[int]] = {}
        for index, (name, tensor) in enumerate(zip(self._names, self._tensors, strict=True)):
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError(f"params: '{name}' is a tensor of inference mode, which cannot be written: clone it.")
            sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(index)
        for indices in sharing.values():
            if len(indices) == 1 and self._tensors[indices[0]].is_contiguous():
                continue
            addresses = torch.cat([_addresses(self._tensors[i]) for i in indices])
            if len(addresses.unique()) < len(addresses):
                raise ValueError(f"params: entries of {[self._names[i] for i in indices]} share memory: clone them.")

    def write(self, values: Tensor) -> None:
        """Overwrite the parameters with a vector ``[D]``.

        Raises:
            ValueError: If a number does not fit into the dtype of its parameter; then none is changed.
        """
        parts = [part.to(tensor.dtype) for part, tensor in zip(self._parts(values), self._tensors, strict=True)]
        for name, part in zip(self._names, parts, strict=True):
            if not bool(part.isfinite().all()):
                raise ValueError(f"params: the new values of '{name}' are beyond the range of {part.dtype}.")
        with torch.no_grad():
            for tensor, part in zip(self._tensors, parts, strict=True):
                tensor.copy_(part)


def _addresses(tensor: Tensor) -> Tensor:
    """Where in memory each entry is; nothing is read."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=tensor.device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offsets = torch.arange(span, device=tensor.device).as_strided(tensor.shape, tensor.stride())
    return offsets.flatten() * tensor.element_size() + tensor.data_ptr()


def _check_operator(Q: Any) -> None:
    if not isinstance(Q, LinearOperator):
        raise TypeError(f"Q: expected a linear operator, got {type(Q).__name__}. Wrap a diagonal as Diagonal(...).")
    if not Q.SELF_ADJOINT:
        raise ValueError(f"Q: expected a symmetric operator, got {type(Q).__name__} of shape {Q.shape}.")
    if isinstance(Q, CurvatureLinearOperator) and hasattr(Q, "inverse"):
        raise TypeError(f"Q: {type(Q).__name__} is the curvature; pass its inverse: Q.inverse(damping).")
    if not hasattr(Q, "diagonal"):
        raise TypeError(
            f"Q: {type(Q).__name__} has no diagonal(), and finding it takes {Q.shape[0]} products (exact_diagonal). "
            "Pass an inverse in closed form: K.inverse(damping) of KFAC, A.to_low_rank().damped(c).inverse(), or a "
            "LearnedInverseLinearOperator."
        )


def _in_order(tensors: dict[str, Tensor], space: Space, is_list: bool) -> dict[str, Tensor]:
    """The parameters that Q acts on, in its order."""
    if space.names is not None and not is_list:
        missing = [name for name in space.names if name not in tensors]
        if missing:
            raise ValueError(f"params: Q acts on {missing}, which are not among {list(tensors)}.")
        tensors = {name: tensors[name] for name in space.names}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.device != space.device:
            raise ValueError(
                f"params: expected floating point numbers on {space.device}, where Q is, got {tensor.dtype} on "
                f"{tensor.device} under '{name}'."
            )
    if len({id(tensor) for tensor in tensors.values()}) < len(tensors):
        raise ValueError("params: one tensor stands under several names. Pass it, and build Q, under one.")
    names = None if is_list else tuple(tensors)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
    Space(shapes, space.dtype, space.device, names).join(space, "params and Q")
    return tensors
