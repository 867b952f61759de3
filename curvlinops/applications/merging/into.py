"""Merging models into a module: parameters and buffers, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops import LinearOperator
from curvlinops.applications.merging.merge import MergeInfo, Model, merged_values
from curvlinops.applications.merging.models import weighted_mean
from curvlinops.applications.merging.solve import Solver

#: Integer buffers that count, of which the largest is taken where they differ.
_COUNTS = ("num_batches_tracked",)


def merge_into(
    model: nn.Module,
    models: Sequence[Model],
    fishers: Sequence[LinearOperator | Mapping[str, Tensor] | Sequence[Tensor]] | None = None,
    *,
    buffers: str | Mapping[str, Tensor] | None = None,
    strict: bool = True,
    weights: Iterable[float] | None = None,
    damping: float = 0.0,
    anchor: str | Model = "zero",
    solver: Solver | None = None,
    x0: str | Model = "mean",
    normalize: bool = False,
    floor: float = 0.0,
    unmerged: str = "average",
) -> MergeInfo:
    """Merge models and write the result into a module, in place: its parameters and, if asked for, its buffers.

    The parameters keep their identity, dtype, device and ``requires_grad``; values are rounded once, to the module's
    dtype, which must hold them. Weights that the module ties stay tied. The
    module may be one of the models. It is changed only when everything else has succeeded.

    Averaged running statistics of batch normalisation are not those of the merged network. Where there are data,
    compute them anew: call ``reset_running_stats()`` of these layers, set their ``momentum=None``, and run the network
    over the data in training mode.

    **Cost**: that of :func:`merge` with ``return_info``.

    Args:
        model: The module that is changed.
        models: See :func:`merge`, as for all arguments but the next two.
        fishers: The Fisher matrices.
        buffers: What becomes of the module's buffers: ``"keep"``; ``"first"``, those of the first model;
            ``"average"``, the weighted mean over the models that have them; or new values by name, others being kept.
            Averages of integers, which must agree, do not exist, but ``num_batches_tracked`` becomes the largest. By
            default they are kept, and an error where any of the models has others.
        strict: Whether parameters of the result that the module lacks, such as the heads of other tasks, are an error;
            otherwise they are left out. A parameter of the module that the result lacks always is one.
        weights: A number for each model.
        damping: λ.
        anchor: a.
        solver: Makes the inverse of an operator.
        x0: Where iterations begin.
        normalize: Whether to divide each Fisher matrix by its norm.
        floor: Least entry of diagonals.
        unmerged: What becomes of parameters that no Fisher matrix covers.

    Returns:
        What was done.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If names, shapes, dtypes or buffers do not fit, or :func:`merge` refuses.

    >>> layers = [nn.Linear(2, 1) for _ in range(3)]
    >>> info = merge_into(layers[0], layers[1:])
    >>> torch.allclose(layers[0].weight, (layers[1].weight + layers[2].weight) / 2)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}.")
    weights = None if weights is None else [float(weight) for weight in weights]
    _, merged, info = merged_values(
        models,
        fishers,
        weights=weights,
        damping=damping,
        anchor=anchor,
        solver=solver,
        x0=x0,
        normalize=normalize,
        floor=floor,
        unmerged=unmerged,
        return_info=True,
    )
    own = dict(model.named_parameters())
    writes = _writes(own, merged, "parameter")
    unknown = [name for name in merged if name not in own]
    if unknown and strict:
        raise ValueError(
            f"The result has parameters that the module lacks: {unknown}. Leave them out of the models, or pass "
            "strict=False to leave them out of the module."
        )
    writes += _buffer_writes(model, models, buffers, weights)
    assert info is not None
    with torch.inference_mode(False), torch.no_grad():
        for target, value in writes:
            target.copy_(value)
    return info


def _writes(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
    """Each tensor that is written, with its new value."""
    missing = [name for name in targets if name not in values]
    if missing:
        raise ValueError(f"The module has {what}s that none of the models has: {missing}.")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise ValueError(
                f"{what} '{name}': the module has shape {list(target.shape)}, the result {list(values[name].shape)}."
            )
    return [(target, _rounded(values[name], target, f"{what} '{name}'")) for name, target in targets.items()]


def _rounded(value: Tensor, target: Tensor, what: str) -> Tensor:
    """A copy in the target's dtype and on its device, since a module may be one of the models."""
    result = value.detach().to(dtype=target.dtype, device=target.device, copy=True)
    # Some buffers hold infinite entries, such as masks, and may keep them.
    if not torch.equal(result.isfinite(), value.to(result.device).isfinite()):
        raise ValueError(f"{what}: the result is beyond {target.dtype}, the module's dtype, which makes it infinite.")
    if not (target.is_floating_point() or target.is_complex() or torch.equal(result.to(value), value)):
        raise ValueError(f"{what}: the module has {target.dtype}, which cannot hold the new {value.dtype}.")
    return result


def _buffer_writes(
    model: nn.Module, models: Sequence[Model], choice: Any, weights: Sequence[float] | None
) -> list[tuple[Tensor, Tensor]]:
    own = dict(model.named_buffers())
    given = [dict(m.named_buffers()) if isinstance(m, nn.Module) else {} for m in models]
    if isinstance(choice, Mapping):
        values = _given_buffers(choice, own)
    elif choice == "first":
        values = given[0]
        if not values and own:
            raise ValueError("buffers: the first model has none. Pass 'keep', or tensors by name.")
    elif choice == "average":
        values = {name: _averaged(name, given, weights) for name in own if any(name in found for found in given)}
    elif choice in (None, "keep"):
        if choice is None:
            _check_agreement(own, given)
        values = {}
    else:
        raise ValueError(f"buffers: expected 'keep', 'first', 'average', or tensors by name, got {choice!r}.")
    chosen = {name: tensor for name, tensor in own.items() if name in values}
    return _writes(chosen, values, "buffer")


def _given_buffers(choice: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    unknown = [name for name in choice if name not in own]
    if unknown:
        raise ValueError(f"buffers: the module has no buffers {unknown}; it has {list(own)}.")
    for name, value in choice.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"buffers, '{name}': expected a tensor, got {type(value).__name__}.")
    return choice


def _check_agreement(own: Mapping[str, Tensor], given: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse to choose between buffers that differ."""
    for number, found in enumerate(given):
        for name, tensor in own.items():
            if name in found and not _are_equal(tensor, found[name]):
                raise ValueError(
                    f"buffers: '{name}' of models[{number}] differs from the module's. Say what becomes of the "
                    "buffers: 'keep', 'first', 'average', or tensors by name."
                )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _averaged(name: str, given: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None) -> Tensor:
    """The weighted mean of a buffer over the models that have it."""
    having = [t for t, found in enumerate(given) if name in found]
    tensors = [given[t][name] for t in having]
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(f"buffers: '{name}' has different shapes, {[list(tensor.shape) for tensor in tensors]}.")
    if first.is_floating_point():
        dtype = torch.promote_types(first.dtype, torch.float32)
        used = [1.0 if weights is None else weights[t] for t in having]
        return weighted_mean(tensors, used, lambda tensor: tensor.detach().to(dtype=dtype, device=first.device))
    if name.rsplit(".", 1)[-1] in _COUNTS:
        return torch.stack([tensor.to(first.device) for tensor in tensors]).amax(0)
    if not all(_are_equal(first, tensor) for tensor in tensors):
        raise ValueError(f"buffers: '{name}' holds {first.dtype} that differ and have no average: pass it by name.")
    return first
