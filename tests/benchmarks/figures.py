"""Figures looked up in the results of a run: None where they were not measured."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.items import Item
from tests.benchmarks.tables import Results


class Figures:
    """The figures of one network under the first number of threads."""

    def __init__(self, network: Results, results: Results) -> None:
        """Find the items by what they measure."""
        self.network = network
        self.clock: str = results["clock"]
        first = str(results["threads"][0])
        self._times = {Item.of(e): e for e in network.get("times", {}).get(first, {}).get("items", [])}
        memory = network.get("memory", {})
        self._peaks = {Item.of(e): e for e in memory.get("items", [])}
        self.gradient_mib: float | None = memory.get("gradient", {}).get("peak_mib")

    def entries(self, *actions: str) -> list[Results]:
        """The entries of some actions, in the order in which they were measured."""
        return [entry for item, entry in self._times.items() if item.action in actions]

    def time(self, item: Item, label: str = "ours") -> Results:
        """One side of an entry, empty where it was not measured."""
        return self._times.get(item, {}).get(label, {})

    def ratio(self, item: Item, label: str = "ours") -> float | None:
        """Time in gradients."""
        return self.time(item, label).get("ratio")

    def peak(self, item: Item, label: str = "ours") -> Results:
        """Peak memory of one side, empty where it was not measured."""
        return self._peaks.get(item, {}).get(label, {})

    def peak_items(self) -> list[Item]:
        """The items whose peak memory was measured."""
        return list(self._peaks)

    def per_gradient_memory(self, item: Item) -> float | None:
        """Peak memory as a multiple of that of a gradient."""
        peak = self.peak(item).get("peak_mib")
        return None if peak is None or not self.gradient_mib else float(peak / self.gradient_mib)

    def columns_memory(self) -> float | None:
        """What 64 columns take more than one, in multiples of 3 · 64 vectors."""
        many, one = (self.peak(Item(action, "ggn")).get("peak_mib") for action in ("columns64", "product"))
        if many is None or one is None:
            return None
        return float((many - one) * 2**20 / (3 * 64 * self.network["num_params"] * 4))

    def residual(self, item: Item) -> float | None:
        """The largest relative residual of a solve, over right-hand sides and kinds of products."""
        return worst_residual(self.time(item))

    def break_even(self, matrix: str) -> float | None:
        """After how many products linearising has paid off; infinity where it has not yet."""
        found = self._times.get(Item("break_even", matrix))
        return None if found is None else first_cheaper(found)


def worst_residual(side: dict[str, Any]) -> float | None:
    """The largest relative residual of a solve."""
    kinds = side.get("facts", {}).get("residual", {})
    return max((value for kind in kinds.values() for value in kind.values()), default=None)


def first_cheaper(entry: Results) -> float | None:
    """The first number of products after which the linearised ones took no longer; infinity if none."""
    if any("cumulative" not in entry.get(label, {}) for label in ("kept", "streamed")):
        return None
    pairs = zip(entry["kept"]["cumulative"], entry["streamed"]["cumulative"])
    return next((float(n) for n, (kept, streamed) in enumerate(pairs, start=1) if kept <= streamed), float("inf"))
