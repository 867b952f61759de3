"""Calls of users' functions that leave random states and buffers alone, and batches that can be taken up again."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

_END = object()


def drawn_seed(generator: Generator) -> int:
    """A seed for random states of its own, from a generator."""
    return int(torch.randint(2**62, (), generator=generator))


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random states of torch, NumPy and Python for a while, and put them back.

    Args:
        seed: The seed.
        device: The accelerator whose random state takes part, or the CPU.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    is_cpu = device.type == "cpu"
    fork = torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type)
    try:
        with fork:
            # torch.manual_seed would seed all accelerators, of which only one is put back.
            torch.default_generator.manual_seed(seed)
            if not is_cpu:
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers of a model back at the end, those too that were exchanged for others."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            if buffer is not None and values is not None and not torch.equal(buffer, values):
                buffer.data.copy_(values)
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, in lists, tuples and mappings too."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [moved(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


class EndlessBatches:
    """The batches of a loader, pass after pass, each read under random states of its own.

    Batch k of a pass depends on the loader, the seed of the pass and k alone, so that these two numbers are its state.

    Args:
        data: Iterable of batches that can be read again.
        generator: Where the seeds of the passes come from.
        device: Where the batches go.
    """

    def __init__(self, data: Iterable[Any], generator: Generator, device: torch.device) -> None:
        if not isinstance(data, Iterable) or isinstance(data, Tensor | str | Mapping):
            raise TypeError(f"Expected a loader or list of batches, got {type(data).__name__}.")
        if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):
            raise TypeError(
                "Expected a loader or list of batches, got a tuple of tensors. Write [(X, y)] for one batch."
            )
        self._data, self._generator, self._device = _own_copy(data), generator, device
        # A loader that draws from a generator of the user's leaves it as it was.
        drawn_from = (getattr(data, "generator", None), getattr(getattr(data, "sampler", None), "generator", None))
        self._generators = list({id(g): g for g in drawn_from if isinstance(g, Generator)}.values())
        self._iterator: Iterator[Any] | None = None
        self._seed = self._position = 0

    def next(self) -> Any:
        """The next batch; after the last one comes the first of another pass.

        Raises:
            ValueError: If there are no batches, or none a second time.
        """
        batch = _END if self._iterator is None else self._read()
        if batch is _END:
            self._begin(drawn_seed(self._generator))
            batch = self._read()
        if batch is _END:
            self._iterator = None
            raise ValueError(
                "There are no batches (any more): pass a list, a DataLoader, or another iterable that gives its "
                "batches each time it is read, not an iterator that ends."
            )
        return moved(batch, self._device)

    def state_dict(self) -> dict[str, int]:
        """Seed of the pass, and the number of batches read in it, or -1 before the first."""
        return {"seed": self._seed, "position": -1 if self._iterator is None else self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where a walk over the same batches stood, by reading those before it."""
        self._iterator = None
        if state["position"] >= 0:
            self._begin(state["seed"])
            for _ in range(state["position"]):
                self._read()

    def _begin(self, seed: int) -> None:
        with self._own_randomness(seed):
            self._iterator = iter(self._data)
        self._seed, self._position = seed, 0

    def _read(self) -> Any:
        assert self._iterator is not None
        self._position += 1
        with self._own_randomness(self._seed + self._position):
            return next(self._iterator, _END)

    @contextmanager
    def _own_randomness(self, seed: int) -> Iterator[None]:
        kept = [(generator, generator.get_state()) for generator in self._generators]
        try:
            with own_randomness(seed, self._device):
                for generator in self._generators:
                    generator.manual_seed(seed)
                yield
        finally:
            for generator, state in kept:
                generator.set_state(state)


def _own_copy(data: Iterable[Any]) -> Iterable[Any]:
    """A loader that shares no iterator with the user's, which persistent workers would make it do."""
    if not isinstance(data, DataLoader):
        return data
    result = copy.copy(data)
    vars(result).update(persistent_workers=False, _iterator=None)
    return result
