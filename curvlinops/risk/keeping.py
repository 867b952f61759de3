"""What is kept of a pass over the data, within a budget, so that the next one need not begin anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, TypeVar

from torch import Generator, Tensor

from curvlinops.memory import num_bytes
from curvlinops.risk.batches import Batch, owned
from curvlinops.risk.surroundings import RandomStates


class Keepable(Protocol):
    """What a mini-batch leaves behind, and may be kept."""

    def held(self) -> Iterator[Tensor]:
        """The tensors it holds."""


T = TypeVar("T")


@dataclass
class _Kept:
    batch: Batch
    what: Keepable


class Keeper:
    """Keeps what the first mini-batches leave behind, as many as fit into a budget; the others are streamed.

    Attributes:
        num_bytes: Bytes that are kept.
        num_batches: How many mini-batches there are, once that is known.
        engine: The way through the network that was chosen, where there is a choice.

    Args:
        max_bytes: The budget.
        params: What is not counted, since it exists anyway.
        states: Random states under which the loader is read: whenever some mini-batches are streamed, the same data
            must come in the same order as when the others were kept.
    """

    def __init__(self, max_bytes: int, params: Iterable[Tensor], states: RandomStates) -> None:
        self.max_bytes = max_bytes
        self.num_bytes: int
        self.num_batches: int | None
        self.engine: str | None = None
        self._params = list(params)
        self._states = states
        self._kept: list[_Kept]
        self._is_full: bool
        self._current: Any
        self._generator_states: dict[int, Tensor]
        self.forget()

    def __len__(self) -> int:
        """How many mini-batches are kept."""
        return len(self._kept)

    @property
    def keeps_all(self) -> bool:
        """Whether all mini-batches are kept, so that the data need not be read again."""
        return self.num_batches is not None and len(self._kept) == self.num_batches

    def describe(self) -> str:
        """What is kept, in words."""
        if self.max_bytes <= 0:
            return "lean, all mini-batches are streamed"
        if not self._kept and self.num_batches is None:
            return "nothing yet, the first product prepares"
        of_all = "" if self.num_batches is None else f" of {self.num_batches}"
        engine = "" if self.engine is None else f"by {self.engine}, "
        return f"{engine}{len(self)}{of_all} mini-batches kept, {self.num_bytes / 2**20:.1f} MiB"

    def wants(self, index: int) -> bool:
        """Whether a mini-batch is kept, or may be."""
        return index < len(self._kept) or not self._is_full

    def batches(self) -> Iterator[Batch]:
        """The mini-batches that are kept."""
        return (kept.batch for kept in self._kept)

    def products(self) -> Iterator[Any]:
        """What they left behind."""
        return (kept.what for kept in self._kept)

    def prepare(self) -> None:
        """Called before the data are read."""
        self._states.restore()

    def own(self, batch: Batch) -> Batch:
        """The kept form of a mini-batch that the loader gave again, or a copy of one that may be kept.

        Raises:
            RuntimeError: If it has other data than the one that is kept.
        """
        if batch.index >= len(self._kept):
            return owned(batch) if self.wants(batch.index) else batch
        kept = self._kept[batch.index].batch
        if not _are_equal(list(batch.tensors()), list(kept.tensors())):
            raise RuntimeError(
                f"Mini-batch {batch.index} has other data than when it was linearised, so that the kept and the "
                "streamed mini-batches would not make one matrix. Fix the order of the data, or raise max_memory until "
                "all of them are kept."
            )
        return kept

    def obtain(self, index: int, make: Callable[[], T]) -> T:
        """What is kept of a mini-batch, or something new."""
        if index < len(self._kept):
            return self._kept[index].what  # type: ignore[return-value]
        self._current = made = make()
        return made

    def rewind(self, index: int, generator: Generator) -> None:
        """Set a generator to the state in which the mini-batch found it first."""
        if index in self._generator_states:
            generator.set_state(self._generator_states[index])
        else:
            self._generator_states[index] = generator.get_state()

    def settle(self, batch: Batch) -> None:
        """Called when a mini-batch is done: keep what it left behind, if it fits."""
        what, self._current = self._current, None
        if what is None or batch.index != len(self._kept) or self._is_full:
            return
        size = num_bytes([*what.held(), *batch.tensors()], apart_from=self._params) if hasattr(what, "held") else inf
        if self.num_bytes + size > self.max_bytes:
            self._is_full = True
            return
        self._kept.append(_Kept(batch, what))
        self.num_bytes += int(size)

    def drop(self) -> None:
        """Called when a pass ends before its time: let go of what is unfinished.

        Unless all mini-batches are kept, everything is prepared anew: those that are kept would draw no more random
        numbers, and the next ones would draw theirs.
        """
        self._current = None
        if not self.keeps_all:
            self.forget()

    def finish(self, num_batches: int) -> None:
        """Called after a pass that went well."""
        self.num_batches = num_batches

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept, since graphs cannot be copied: the first product of a copy prepares anew."""
        return {**self.__dict__, **self._empty()}

    def forget(self) -> None:
        """Begin anew."""
        self.__dict__.update(self._empty())

    def _empty(self) -> dict[str, Any]:
        is_full = self.max_bytes <= 0
        counts = {"num_bytes": 0, "num_batches": None, "_is_full": is_full}
        return {"_kept": [], "_current": None, "_generator_states": {}, **counts}


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether tensors have the same numbers, missing ones (NaN) being the same."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(one, other, strict=True)
    )
