"""Data in the forms that users have them in, as mini-batches: all of them, or some chosen at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from curvlinops.applications.checked_numbers import checked_count


class CountedData:
    """Mini-batches that are counted, datum by datum, as they are read.

    Args:
        data: Iterable of mini-batches (X, y), or of mappings with ``labels``.

    Attributes:
        num_data: Number of data of the last pass.

    >>> data = CountedData([(torch.rand(3, 2), torch.rand(3)), (torch.rand(2, 2), torch.rand(2))])
    >>> _ = list(data)
    >>> data.num_data
    5
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self.num_data = 0

    def __iter__(self) -> Iterator[Any]:
        num_data = 0
        for item in self._data:
            num_data += num_data_of(item)
            yield item
        self.num_data = num_data

    def __getattr__(self, name: str) -> Any:
        # A loader's samplers and generators are looked for, so that their random states can be put back.
        if name == "_data":
            raise AttributeError(name)  # not set yet, when a copy is made
        return getattr(self._data, name)


def num_data_of(item: Any) -> int:
    """Number of data of a mini-batch: the rows of its inputs, which are those of its targets.

    Raises:
        ValueError: If they have different numbers of rows.
    """
    try:
        y = item["labels"] if isinstance(item, Mapping) else item[1]
        size = len(y)
    except (TypeError, KeyError, IndexError):
        return 0  # an item that is not understood: whoever reads it says so
    X = [value for key, value in item.items() if key != "labels"] if isinstance(item, Mapping) else item[0]
    rows = {len(tensor) for tensor in _tensors_of(X) if tensor.ndim}
    if isinstance(y, Tensor) and rows and size not in rows:
        raise ValueError(
            f"data: expected a target for each datum, got {size} targets for inputs of {sorted(rows)} rows. If each "
            "position of a sequence has its target, give targets as [N, T] and let the model predict [N, C, T], with "
            "classes on axis 1."
        )
    return size


def _tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors_of(part)


def batches_of(data: Any, batch_size: int = 256, max_data: int | None = None, seed: int = 2147483647) -> Iterable[Any]:
    """Mini-batches that can be read again and again, of all data or of some.

    Args:
        data: DataLoader or other iterable of mini-batches, map-style ``Dataset`` of single data, or pair (X, y) of
            tensors.
        batch_size: Data of a mini-batch, where the data do not come in some.
        max_data: Number of data to choose at random without replacement, where there are more.
        seed: Seed of the choice.

    Raises:
        TypeError: If the data are of another kind, or cannot be read twice.
        ValueError: If a number is out of range, or data are to be chosen that have no fixed order.

    >>> batches = batches_of((torch.rand(10, 3), torch.arange(10)), batch_size=4, max_data=6)
    >>> [len(y) for X, y in batches]
    [4, 2]
    """
    for what, number in (("batch_size", batch_size), ("max_data", max_data)):
        if number is not None:
            checked_count(number, what)
    if isinstance(data, DataLoader):
        return data if max_data is None else _of_loader(data, max_data, seed)
    if isinstance(data, Dataset):
        return _loader(_some_of(data, max_data, seed), batch_size, seed)
    if isinstance(data, (Tensor, Iterator)) or not isinstance(data, Iterable):
        raise TypeError(
            "data: expected a DataLoader or another iterable of mini-batches (X, y) that can be read again, a Dataset, "
            f"or a pair (X, y) of tensors, got {type(data).__name__}."
        )
    if isinstance(data, Sequence) and any(isinstance(part, np.ndarray) for part in data):
        raise TypeError("data: expected tensors, got NumPy arrays. Pass (torch.from_numpy(X), torch.from_numpy(y)).")
    if isinstance(data, Sequence) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return _of_pair(data[0], data[1], batch_size, max_data, seed)
    if max_data is None:
        return data
    if not isinstance(data, Sequence):
        raise TypeError(f"max_data: expected data that can be counted, got {type(data).__name__}. Pass list(data).")
    return _of_batches(data, max_data, seed)


def chosen_indices(num_data: int, max_data: int | None, seed: int) -> Tensor | None:
    """Indices of data chosen at random without replacement, ascending; None for all of them."""
    if max_data is None or max_data >= num_data:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_data, generator=generator)[:max_data].sort().values


def _of_pair(X: Tensor, y: Tensor, batch_size: int, max_data: int | None, seed: int) -> list[tuple[Tensor, Tensor]]:
    if X.ndim == 0 or y.ndim == 0 or len(X) != len(y) or len(y) == 0:
        raise ValueError(f"data: expected as many inputs as targets, got shapes {list(X.shape)} and {list(y.shape)}.")
    indices = chosen_indices(len(y), max_data, seed)
    if indices is not None:
        X, y = X[indices.to(X.device)], y[indices.to(y.device)]
    return list(zip(X.split(batch_size), y.split(batch_size), strict=True))


def _of_batches(data: Sequence[Any], max_data: int, seed: int) -> Sequence[Any]:
    """The chosen rows of mini-batches; those of which no row is chosen are left out."""
    sizes = [num_data_of(item) for item in data]
    indices = chosen_indices(sum(sizes), max_data, seed)
    if indices is None:
        return data
    starts = torch.tensor([0, *sizes]).cumsum(0)
    parts = [indices[(indices >= start) & (indices < stop)] - start for start, stop in pairwise(starts.tolist())]
    return [_rows(item, part, size) for item, part, size in zip(data, parts, sizes, strict=True) if len(part)]


def _rows(tree: Any, indices: Tensor, size: int) -> Any:
    """Rows of the tensors of nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        if tree.ndim == 0 or len(tree) != size:
            raise ValueError(
                f"max_data: expected the datum on axis 0, {size} of them in this mini-batch, got {list(tree.shape)}."
            )
        return tree[indices.to(tree.device)]
    if isinstance(tree, Mapping):
        return {key: _rows(value, indices, size) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [_rows(value, indices, size) for value in tree]
    raise TypeError(f"max_data: cannot choose rows of {type(tree).__name__}. Pass a Dataset of single data.")


def _of_loader(loader: DataLoader[Any], max_data: int, seed: int) -> Iterable[Any]:
    sampler = loader.sampler
    is_plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    if loader.batch_size is None or not is_plain:
        raise ValueError(
            "max_data: the loader has a sampler of its own, so which data there are is not known. Pass the dataset."
        )
    chosen = _some_of(loader.dataset, max_data, seed)
    return loader if chosen is loader.dataset else _loader(chosen, loader.batch_size, seed, loader)


def _some_of(dataset: Dataset[Any], max_data: int | None, seed: int) -> Dataset[Any]:
    try:
        num_data = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"data: expected a dataset whose data can be counted, got {type(dataset).__name__}. Pass a DataLoader over "
            "it, without max_data."
        ) from None
    indices = chosen_indices(num_data, max_data, seed)
    return dataset if indices is None else Subset(dataset, indices.tolist())


def _loader(dataset: Dataset[Any], batch_size: int, seed: int, like: DataLoader[Any] | None = None) -> DataLoader[Any]:
    """Mini-batches in the order of the dataset, put together as another loader does."""
    return DataLoader(
        dataset,
        batch_size,
        collate_fn=None if like is None else like.collate_fn,
        num_workers=0 if like is None else like.num_workers,
        # Any pass over a loader draws a number: it gets a generator of its own for this.
        generator=torch.Generator().manual_seed(seed),
    )
