"""What a loader yields: one mini-batch as (X, y), on the right device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Batch:
    """One mini-batch and its position in the pass."""

    index: int
    X: Any
    y: Any

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of X and y."""
        yield from tensors_of(self.X)
        yield from tensors_of(self.y)


def read_batch(index: int, item: Any, device: torch.device) -> Batch:
    """A loader's item as a mini-batch on a device.

    Raises:
        ValueError: If the item is neither a pair (X, y) nor a mapping with labels.
    """
    if isinstance(item, Mapping):
        if "labels" not in item:
            raise ValueError(
                f"Mini-batch {index} is a mapping without 'labels' (its keys: {list(item)}): yield (X, y) pairs, or "
                "add the targets as 'labels'."
            )
        X: Any = {key: value for key, value in item.items() if key != "labels"}
        y = item["labels"]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        X, y = item
    else:
        got = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ValueError(f"Mini-batch {index}: expected a pair (X, y) or a mapping with 'labels', got {got}.")
    return Batch(index, moved(X, device), moved(y, device))


def owned(batch: Batch) -> Batch:
    """A copy of a mini-batch that outlives the pass: a loader may fill the same memory anew, a user change the data."""
    return Batch(batch.index, copied(batch.X), copied(batch.y))


def copied(tree: Any) -> Any:
    """A nested tuple, list or mapping with copies of its tensors."""
    if isinstance(tree, PackedSequence):
        return PackedSequence(*(part.clone() if isinstance(part, Tensor) else part for part in tree))
    return map_tensors(Tensor.clone, tree)


def moved(tree: Any, device: torch.device) -> Any:
    """The tensors of a nested tuple, list or mapping on a device; pinned memory is copied asynchronously."""
    if isinstance(tree, PackedSequence):
        return tree.to(device=device)  # type: ignore[call-arg]
    if all(t.device == device and not t.is_inference() for t in tensors_of(tree)):
        return tree  # as the loader gave it
    return map_tensors(lambda t: _moved(t, device), tree)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = _plain(tensor)
    return tensor if tensor.device == device else tensor.to(device, non_blocking=tensor.is_pinned())


def _plain(tensor: Tensor) -> Tensor:
    # Autograd cannot save tensors that were made in inference mode.
    return tensor.clone() if tensor.is_inference() else tensor


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to the tensors of a nested tuple, list or mapping."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return _like_mapping(tree, {key: map_tensors(function, value) for key, value in tree.items()})
    if isinstance(tree, PackedSequence):
        return tree  # its tensors make sense together only
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def _like_mapping(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """The items in a mapping of the same kind, since models can read more from it than its items."""
    if type(tree) is dict or not isinstance(tree, MutableMapping):
        return items
    result = copy.copy(tree)
    result.update(items)
    return result


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested tuple, list or mapping."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return iter(found)


def has_rows(tree: Any, size: int) -> bool:
    """Whether there are tensors, and all of them have the datum on their first axis as far as can be seen."""
    tensors = list(tensors_of(tree))
    return bool(tensors) and all(t.ndim > 0 and len(t) == size for t in tensors)


def visible_size(X: Any, y: Any) -> int | None:
    """Number of data of a mini-batch, where X and y agree on their first axis; otherwise ``None``."""
    sizes = {t.shape[0] if t.ndim else None for t in (*tensors_of(X), *tensors_of(y))}
    return sizes.pop() if len(sizes) == 1 else None
