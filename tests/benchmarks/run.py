"""Run the benchmark: ``python -m tests.benchmarks.run --help``.

The parent asks its workers in turn, gradient, ours, peer, gradient, ours, peer, ..., so that whatever else happens on
the machine falls on all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.client import Answer, Client
from tests.benchmarks.items import ACTIONS, GRADIENT, GRADIENT_MATH, NETWORKS, Item, has_memory, items_for
from tests.benchmarks.report import write_report

MORE_THREADS_ACTIONS = ["product"]
SLOW_SECONDS = 20.0
"""A first call that takes longer than this is counted: what it loads and compiles no longer matters."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add("--items", nargs="+", choices=list(ACTIONS), default=list(ACTIONS), help="what to measure (default: all)")
    add("--threads", nargs="+", type=int, default=[1, 2], help="the first is for the ratios, others get a table each")
    add("--repeats", type=int, default=5, help="measured calls, after one that is not counted")
    add("--seconds", type=float, default=60, help="start no further round of an item after this time")
    add("--timeout", type=float, default=300, help="give up on a single call after this time")
    add("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    add("--limit-gib", type=float, default=16, help="address space of a worker on the CPU; 0 for no limit")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--ours", default=sys.executable, help="interpreter with this checkout installed")
    add("--peer", default=None, help="interpreter with the peer installed; left out by default")
    add("--output", type=Path, default=Path("docs/benchmarks"), help="folder for the JSON file and the table")
    return parser.parse_args(argv)


class Benchmark:
    """The options of a run, and how its clients are started and asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Keep the options."""
        self.options = options
        self.clock = "cpu" if options.device == "cpu" else "wall"
        self.pythons = {"ours": options.ours} | ({"peer": options.peer} if options.peer else {})
        self.environments: dict[str, Answer] = {}

    @contextlib.contextmanager
    def clients(self, labels: list[str], threads: int, for_memory: bool = False) -> Iterator[list[Client]]:
        """Start one worker for each label; those that cannot start are left out, and the run says so."""
        o = self.options
        limits = (o.limit_gib, o.timeout)
        started = [Client(name, self.pythons[name], o.device, threads, *limits, for_memory) for name in labels]
        try:
            for client in started:
                hello = {k: v for k, v in client.hello.items() if k not in ("ok", "location")}
                self.environments[client.label] = hello
                if not client.hello["ok"]:
                    print(f"{client.label} is left out: {client.hello['error']}", flush=True)
            yield [c for c in started if c.hello["ok"]]
        finally:
            for client in started:
                client.close()

    def measure_network(self, network: str) -> dict[str, Any]:
        """Measure all items of a network: times for each number of threads, then peak memory."""
        o, (title, num_data) = self.options, NETWORKS[network]
        result: dict[str, Any] = {"title": title, "num_data": num_data, "times": {}}
        for position, threads in enumerate(o.threads):
            actions = [a for a in o.items if position == 0 or a in MORE_THREADS_ACTIONS]
            with self.clients(list(self.pythons), threads) as clients:
                for client in clients:
                    facts = client.ask("setup", network=network, num_data=num_data)
                    result |= {k: v for k, v in facts.items() if k != "ok"}
                if clients:
                    print(f"{title}, threads: {threads}", flush=True)
                    times = self._time_items(items_for(network, actions), clients, bool(result["attention"]))
                    result["times"][str(threads)] = times
        if o.memory:
            result["memory"] = self._measure_memory(network, items_for(network, o.items), bool(result["attention"]))
        return result

    def _time_items(self, items: list[Item], clients: list[Client], attention: bool) -> dict[str, Any]:
        unit = clients[0]
        kernels = [GRADIENT, GRADIENT_MATH] if attention else [GRADIENT]
        times: dict[str, Any] = {"gradient": {}, "items": []}
        for item in kernels:
            math = item is GRADIENT_MATH
            rounds = [ask_time(unit, item, math) for _ in range(2 * self.options.repeats + 1)][1:]
            times["gradient"][item.matrix] = {k: median(r[k] for r in rounds) for k in ("cpu", "wall")}
        for item in items:
            times["items"].append(self._time_item(item, unit, clients, attention))
        return times

    def _time_item(self, item: Item, unit: Client, clients: list[Client], attention: bool) -> dict[str, Any]:
        """Measure one item in turn, after one call each that is not counted (unless it was slow)."""
        start = time.monotonic()
        entry: dict[str, Any] = {"action": item.action, "matrix": item.matrix}
        able: dict[Client, bool] = {}
        gradient = ask_time(unit, GRADIENT, False)
        for client in clients:
            first, math, entry[client.label] = ask_with_fallback(client, "time", item, attention)
            if first.pop("ok"):
                able[client] = math
                slow = first["wall"] > SLOW_SECONDS
                entry[client.label]["rounds"] = [{**first, "gradient": gradient}] if slow else []
        while any(len(entry[c.label]["rounds"]) < self.options.repeats for c in able):
            if time.monotonic() - start > self.options.seconds and all(entry[c.label]["rounds"] for c in able):
                break
            gradient = ask_time(unit, GRADIENT, False)
            for client, math in list(able.items()):
                answer = client.ask("time", action=item.action, matrix=item.matrix, math=math)
                if not answer.pop("ok"):
                    entry[client.label] |= answer
                    able.pop(client)
                    continue
                entry[client.label]["rounds"].append({**answer, "gradient": gradient})
        for client in clients:
            summarise(entry[client.label], self.clock)
        print(describe(entry, [c.label for c in clients]), flush=True)
        return entry

    def _measure_memory(self, network: str, items: list[Item], attention: bool) -> dict[str, Any]:
        """Measure peak memory, with a fresh process for each figure."""
        memory: dict[str, Any] = {"items": []}
        labels = [label for label in self.pythons if "error" not in self.environments[label]]
        memory["gradient"] = self._peak(network, labels[0], GRADIENT, attention=False) if labels else {}
        for item in filter(has_memory, items):
            entry: dict[str, Any] = {"action": item.action, "matrix": item.matrix}
            for label in labels:
                entry[label] = self._peak(network, label, item, attention)
            memory["items"].append(entry)
            print(describe(entry, labels), flush=True)
        return memory

    def _peak(self, network: str, label: str, item: Item, attention: bool) -> dict[str, Any]:
        with self.clients([label], self.options.threads[0], for_memory=True) as clients:
            for client in clients:
                client.ask("setup", network=network, num_data=NETWORKS[network][1])
                answer, _, entry = ask_with_fallback(client, "memory", item, attention)
                return entry | ({"peak_mib": round(answer["peak_mib"], 1)} if answer["ok"] else {})
        return {"error": "the worker did not start"}


def ask_time(client: Client, item: Item, math: bool) -> Answer:
    """Ask for a time that cannot be done without."""
    answer = client.ask("time", action=item.action, matrix=item.matrix, math=math)
    if not answer.pop("ok"):
        raise RuntimeError(f"{item} failed: {answer['error']}")
    return answer


def ask_with_fallback(client: Client, command: str, item: Item, attention: bool) -> tuple[Answer, bool, dict[str, Any]]:
    """Ask once; where the network has attention, ask again under its MATH kernel if that failed.

    Returns:
        The answer, whether the MATH kernel was forced, and the entry with an error or a note.
    """
    answer = client.ask(command, action=item.action, matrix=item.matrix, math=False)
    if answer["ok"]:
        return answer, False, {}
    if not attention or answer["error"] == "not offered":
        return answer, False, {"error": answer["error"]}
    again = client.ask(command, action=item.action, matrix=item.matrix, math=True)
    if again["ok"]:
        return again, True, {"note": f"run under the MATH kernel of attention; by default {answer['error']}"}
    return again, True, {"error": again["error"]}


def summarise(entry: dict[str, Any], clock: str) -> None:
    """Add the medians over the rounds: seconds, and ratios to the gradient of the same round."""
    rounds = entry.get("rounds")
    if not rounds:
        return
    for name in ("cpu", "wall"):
        entry[f"{name}_seconds"] = median(r[name] for r in rounds)
        entry[f"{name}_ratio"] = median(r[name] / r["gradient"][name] for r in rounds)
    entry["ratio"] = entry[f"{clock}_ratio"]


def describe(entry: dict[str, Any], labels: list[str]) -> str:
    """Say in one line what was measured."""
    words = []
    for label in labels:
        side = entry[label]
        figure = f"{side['ratio']:.2f} gradients" if "ratio" in side else side.get("error", "nothing")
        words.append(f"{label} " + (f"{side['peak_mib']:.0f} MiB" if "peak_mib" in side else figure))
    return f"  {entry['matrix']} {entry['action']}: " + ", ".join(words)


def machine_facts() -> dict[str, Any]:
    """Say what machine this is, without its network name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in lines}
        model = facts.get("model name", model)
        if "model" in facts:
            model += f", family {facts.get('cpu family')} model {facts['model']}"
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what is there after each network."""
    options = parse_arguments(argv)
    benchmark = Benchmark(options)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine_facts(),
        "device": options.device,
        "clock": benchmark.clock,
        "repeats": options.repeats,
        "threads": options.threads,
        "environments": benchmark.environments,
        "networks": {},
    }
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    options.output.mkdir(parents=True, exist_ok=True)
    for network in options.networks:
        results["networks"][network] = benchmark.measure_network(network)
        path = options.output / f"results{suffix}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_report(results, options.output / f"results{suffix}.inc")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
