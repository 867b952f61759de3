"""The models that are merged: checked, with the union of their parameters, and means of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops import Space
from curvlinops.applications.checked_numbers import checked_number
from curvlinops.applications.named_tensors import named_tensors


class Models:
    """Several models on the union of their parameters, in the order in which names appear.

    Args:
        models: Modules, or dicts or lists of tensors.
        weights: One non-negative number a model, or None for ones.

    Attributes:
        tensors: The parameters of each model by name.
        weights: The weights.
        first: Each parameter as the first model has it that has one of that name: its shape, dtype and device.
        space: The space of all of them, in the widest dtype (float32 at least), on the device of the first.

    Raises:
        TypeError: If a model is neither a module nor made of tensors.
        ValueError: If there is no model, numbers do not fit, shapes differ, or entries are not finite.
    """

    def __init__(self, models: Sequence[Any], weights: Iterable[Any] | None) -> None:
        if isinstance(models, (Mapping, torch.nn.Module, str)) or not isinstance(models, Sequence):
            raise TypeError(f"models: expected a list of models, got {type(models).__name__}.")
        if not models:
            raise ValueError("models: expected at least one, got none.")
        self.tensors = [named_tensors(model, f"models[{t}]") for t, model in enumerate(models)]
        self.weights = _checked_weights(weights, len(models))
        self.first: dict[str, Tensor] = {}
        for number, tensors in enumerate(self.tensors):
            for name, tensor in tensors.items():
                _check(tensor, self.first.setdefault(name, tensor), f"models[{number}], '{name}'")
        _check_common_names(self.tensors)
        dtype = torch.float32
        for tensors in self.tensors:
            for tensor in tensors.values():
                dtype = torch.promote_types(dtype, tensor.dtype)
        shapes = tuple(tuple(tensor.shape) for tensor in self.first.values())
        device = next(iter(self.first.values())).device
        self.space = Space(shapes, dtype, device, tuple(self.first))

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor without its graph, in the dtype and on the device of the space."""
        return tensor.detach().to(dtype=self.space.dtype, device=self.space.device)

    def mean(self, name: str) -> Tensor:
        """The weighted mean of a parameter over the models that have it."""
        having = [t for t, tensors in enumerate(self.tensors) if name in tensors]
        return weighted_mean([self.tensors[t][name] for t in having], [self.weights[t] for t in having], self.moved)

    def written(self, name: str, value: Tensor) -> Tensor:
        """A value of a parameter as its own tensor, of the dtype and on the device of the first model that has it.

        Raises:
            ValueError: If it is not finite there.
        """
        like = self.first[name]
        result = value.reshape(like.shape).to(dtype=like.dtype, device=like.device, copy=True)
        if not bool(result.isfinite().all()):
            raise ValueError(f"The merged '{name}' is not finite in {like.dtype}. Pass a larger damping, or float64.")
        return result


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float], moved: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted mean of tensors, the plain one where all weights are zero.

    Args:
        tensors: The tensors.
        weights: Their weights.
        moved: Brings a tensor to the dtype and the device of the result.
    """
    used = weights if any(weights) else [1.0] * len(tensors)
    total = sum(used)
    result = moved(tensors[0]) * (used[0] / total)
    for tensor, weight in zip(tensors[1:], used[1:], strict=True):
        result.add_(moved(tensor), alpha=weight / total)
    return result


def _checked_weights(weights: Iterable[Any] | None, num_models: int) -> list[float]:
    if weights is None:
        return [1.0] * num_models
    found = [checked_number(weight, "weights") for weight in weights]
    if len(found) != num_models:
        raise ValueError(f"weights: expected one for each of {num_models} models, got {len(found)}.")
    if not any(found):
        raise ValueError("weights: expected finite numbers of at least 0, not all of them 0.")
    return found


def _check_common_names(models: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse a model that has no parameter in common with any other: nothing of it would be merged."""
    for number, own in enumerate(models):
        others = {name for other in models if other is not own for name in other}
        if len(models) > 1 and others.isdisjoint(own):
            raise ValueError(
                f"models[{number}] has no parameter name in common with any other model: it has {_some(own)}, the "
                f"others {_some(others)}. Are there prefixes such as 'module.' (of parallel modules) or '_orig_mod.' "
                "(of compiled ones)? Pass the module inside, model.module or model._orig_mod, or rename the tensors."
            )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return f"{shown[:3]}" if len(shown) <= 3 else f"{shown[:3]} and {len(shown) - 3} more"


def _check(tensor: Tensor, first: Tensor, what: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{what}: expected real numbers, got {tensor.dtype}. Leave out what is not a parameter.")
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: expected a tensor with values.")
    if tensor.shape != first.shape:
        raise ValueError(
            f"{what} has shape {list(tensor.shape)}, but {list(first.shape)} in a model before it. Rename one of them, "
            "so that both are kept, or leave them out."
        )
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{what}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} entries are not finite.")
