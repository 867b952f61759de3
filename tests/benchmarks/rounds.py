"""How the parent asks its workers: in turn, gradient, ours, peer, gradient, ours, peer, ...

So whatever else happens on the machine falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.benchmarks.client import Answer, Client, Setting
from tests.benchmarks.items import GRADIENT, GRADIENT_MATH, NETWORKS, Item, has_time, items_for, memory_sides, sides

MORE_THREADS_ACTIONS = ["product", "kept"]
SLOW_SECONDS = 20.0
"""A first call that takes longer than this is counted: what it loads and compiles no longer matters."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: Measured rounds of an item, after one that is not counted.
        seconds: Time after which no further round of an item starts.
        memory: Whether to measure peak memory.
    """

    repeats: int
    seconds: float
    memory: bool


class Benchmark:
    """Starts workers, asks them, and gathers what they answer."""

    def __init__(self, pythons: dict[str, str], setting: Setting, effort: Effort) -> None:
        """Start without workers; ``pythons`` has an interpreter for each environment."""
        self.pythons = pythons
        self.setting = setting
        self.effort = effort
        self.clock = "cpu" if setting.device == "cpu" else "wall"
        self.environments: dict[str, Answer] = {}

    @contextlib.contextmanager
    def clients(self, labels: list[str], threads: int, for_memory: bool = False) -> Iterator[dict[str, Client]]:
        """Start one worker for each label; those that cannot start are left out, and the run says so."""
        started = [Client(name, self.pythons[name], self.setting, threads, for_memory) for name in labels]
        try:
            for client in started:
                hello = {k: v for k, v in client.hello.items() if k not in ("ok", "location")}
                self.environments[client.label] = hello
                if not client.hello["ok"]:
                    print(f"{client.label} is left out: {client.hello['error']}", flush=True)
            yield {c.label: c for c in started if c.hello["ok"]}
        finally:
            for client in started:
                client.close()

    def measure_network(self, network: str, actions: list[str], threads: list[int]) -> dict[str, Any]:
        """Measure all items of a network: times for each number of threads, then peak memory."""
        title, num_data = NETWORKS[network]
        result: dict[str, Any] = {"title": title, "num_data": num_data, "times": {}}
        for position, number in enumerate(threads):
            chosen = [a for a in actions if position == 0 or a in MORE_THREADS_ACTIONS]
            items = [item for item in items_for(network, chosen) if has_time(item)]
            if not items and position > 0:
                continue
            with self.clients(list(self.pythons), number) as clients:
                for client in clients.values():
                    facts = client.ask("setup", network=network, num_data=num_data)
                    result |= {k: v for k, v in facts.items() if k != "ok"}
                if clients:
                    print(f"{title}, threads: {number}", flush=True)
                    result["times"][str(number)] = self._time_items(items, clients, bool(result["attention"]))
        if self.effort.memory:
            attention = bool(result.get("attention"))
            result["memory"] = self._measure_memory(network, items_for(network, actions), attention, threads[0])
        return result

    def _time_items(self, items: list[Item], clients: dict[str, Client], attention: bool) -> dict[str, Any]:
        unit = next(iter(clients.values()))
        times: dict[str, Any] = {"gradient": {}, "items": []}
        for item in [GRADIENT, GRADIENT_MATH] if attention else [GRADIENT]:
            math = item is GRADIENT_MATH
            rounds = [ask_time(unit, item, math) for _ in range(2 * self.effort.repeats + 1)][1:]
            times["gradient"][item.matrix] = {k: median(r[k] for r in rounds) for k in ("cpu", "wall")}
        for item in items:
            times["items"].append(self._time_item(item, unit, clients, attention))
        return times

    def _time_item(self, item: Item, unit: Client, clients: dict[str, Client], attention: bool) -> dict[str, Any]:
        """Measure one item in turn, after one call each that is not counted (unless it was slow)."""
        start = time.monotonic()
        entry: dict[str, Any] = item.entry()
        able: dict[str, tuple[Client, Item, bool]] = {}
        for client in clients.values():
            client.ask("forget")
        unit_item = Item("gradient", "default", num_data=item.num_data)
        gradient = [ask_time(unit, unit_item, False) for _ in range(2)][1]
        facts: dict[str, Any] = {}
        for label, (environment, asked) in sides(item).items():
            if environment not in clients:
                continue
            client = clients[environment]
            first, math, entry[label] = ask_with_fallback(client, "time", asked, attention, facts=facts)
            if first.pop("ok"):
                able[label] = client, asked, math
                if "facts" in first:
                    entry[label]["facts"] = first.pop("facts")
                    facts = facts or entry[label]["facts"]
                slow = first["wall"] > SLOW_SECONDS
                entry[label]["rounds"] = [{**first, "gradient": gradient}] if slow else []
        while any(len(entry[label]["rounds"]) < self.effort.repeats for label in able):
            if time.monotonic() - start > self.effort.seconds and all(entry[label]["rounds"] for label in able):
                break
            gradient = ask_time(unit, unit_item, False)
            for label, (client, asked, math) in list(able.items()):
                answer = client.ask("time", item=asked.entry(), math=math, facts=facts)
                if not answer.pop("ok"):
                    entry[label] |= answer
                    able.pop(label)
                    continue
                answer.pop("facts", None)
                entry[label]["rounds"].append({**answer, "gradient": gradient})
        for side in entry.values():
            if isinstance(side, dict):
                summarise(side, self.clock)
        entry["gradient"] = {k: median(r[k] for r in gradients_of(entry)) for k in ("cpu", "wall")} if able else {}
        print(describe(entry), flush=True)
        return entry

    def _measure_memory(self, network: str, items: list[Item], attention: bool, threads: int) -> dict[str, Any]:
        """Measure peak memory, with a fresh process for each figure."""
        memory: dict[str, Any] = {"items": []}
        labels = [label for label in self.pythons if "error" not in self.environments.get(label, {})]
        memory["gradient"] = self._peak(network, labels[0], GRADIENT, False, threads) if labels else {}
        for item in items:
            chosen = {k: side for k, side in memory_sides(item).items() if side[0] in labels}
            if not chosen:
                continue
            entry = item.entry()
            for label, (environment, asked) in chosen.items():
                entry[label] = self._peak(network, environment, asked, attention, threads)
            memory["items"].append(entry)
            print(describe(entry), flush=True)
        return memory

    def _peak(self, network: str, label: str, item: Item, attention: bool, threads: int) -> dict[str, Any]:
        with self.clients([label], threads, for_memory=True) as clients:
            for client in clients.values():
                client.ask("setup", network=network, num_data=NETWORKS[network][1])
                answer, _, entry = ask_with_fallback(client, "memory", item, attention)
                return entry | ({"peak_mib": round(answer["peak_mib"], 1)} if answer["ok"] else {})
        return {"error": "the worker did not start"}


def ask_time(client: Client, item: Item, math: bool) -> Answer:
    """Ask for a time that cannot be done without."""
    answer = client.ask("time", item=item.entry(), math=math, facts={})
    if not answer.pop("ok"):
        raise RuntimeError(f"{item} failed: {answer['error']}")
    return answer


def ask_with_fallback(
    client: Client, command: str, item: Item, attention: bool, **arguments: Any
) -> tuple[Answer, bool, dict[str, Any]]:
    """Ask once; where the network has attention, ask again under its MATH kernel if that failed.

    Returns:
        The answer, whether the MATH kernel was forced, and the entry with an error or a note.
    """
    answer = client.ask(command, item=item.entry(), math=False, **arguments)
    if answer["ok"]:
        return answer, False, {}
    if not attention or answer["error"] == "not offered":
        return answer, False, {"error": answer["error"]}
    again = client.ask(command, item=item.entry(), math=True, **arguments)
    if again["ok"]:
        return again, True, {"note": f"run under the MATH kernel of attention; by default {answer['error']}"}
    return again, True, {"error": again["error"]}


def gradients_of(entry: dict[str, Any]) -> list[dict[str, float]]:
    """The gradients that the rounds of an entry were measured against."""
    return [r["gradient"] for side in entry.values() if isinstance(side, dict) for r in side.get("rounds", [])]


def summarise(side: dict[str, Any], clock: str) -> None:
    """Add the medians over the rounds: seconds, and ratios to the gradient of the same round."""
    rounds = side.get("rounds")
    if not rounds:
        return
    for name in ("cpu", "wall"):
        side[f"{name}_seconds"] = median(r[name] for r in rounds)
        side[f"{name}_ratio"] = median(r[name] / r["gradient"][name] for r in rounds)
    side["ratio"] = side[f"{clock}_ratio"]
    if "series" in rounds[0]:
        columns = zip(*([t / r["gradient"][clock] for t in r["series"][clock]] for r in rounds))
        side["cumulative"] = [median(column) for column in columns]


def describe(entry: dict[str, Any]) -> str:
    """Say in one line what was measured."""
    words = []
    for label, side in entry.items():
        if not isinstance(side, dict) or label == "gradient":
            continue
        figure = f"{side['ratio']:.2f} gradients" if "ratio" in side else side.get("error", "nothing")
        words.append(f"{label} " + (f"{side['peak_mib']:.0f} MiB" if "peak_mib" in side else figure))
    sizes = "".join(f" {key}={entry[key]}" for key in ("num_data", "num_columns") if key in entry)
    return f"  {entry['matrix']} {entry['action']}{sizes}: " + ", ".join(words)
