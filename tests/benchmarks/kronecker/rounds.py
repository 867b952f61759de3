"""How the parent asks its workers: in turn, gradient, ours, peer, gradient, ours, peer, ...

So whatever else happens on the machine falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.benchmarks.client import Answer, Client, Setting
from tests.benchmarks.kronecker.plan import NETWORKS, TITLES, WITHOUT_PEER, Item, Plan

SETTING = Setting(device="cpu", dtype="float32", tf32=False, gib=0, timeout=600)
SLOW_SECONDS = 20.0
"""A first round that takes longer than this is counted: what it loads no longer matters."""
VERY_SLOW_SECONDS = 60.0
"""What takes longer than this is measured once, all else twice at least."""


class KroneckerClient(Client):
    """Talks with this folder's worker in place of the other benchmark's."""

    def _start(self) -> Answer:
        self._command[1] = str(Path(__file__).with_name("worker.py"))
        return super()._start()


@contextlib.contextmanager
def clients(plan: Plan, labels: list[str], for_memory: bool = False) -> Iterator[dict[str, Client]]:
    """Start one worker for each label, and end it."""
    started: dict[str, Client] = {}
    try:
        for label in labels:
            client = started[label] = KroneckerClient(label, plan.pythons[label], SETTING, 1, for_memory)
            if not client.hello["ok"]:
                raise RuntimeError(f"{label}: {client.hello['error']}")
        yield started
    finally:
        for client in started.values():
            client.close()


def times(plan: Plan, part: str) -> Answer:
    """The times of a part, for all networks."""
    entries = []
    with clients(plan, list(plan.pythons)) as workers:
        for network in plan.networks:
            for client in workers.values():
                client.ask("forget")
            for item in plan.items(part, network):
                entries.append(_timed(plan, workers, item))
                print(f"  {describe(entries[-1])}", flush=True)
    return {"entries": entries}


def _timed(plan: Plan, workers: dict[str, Client], item: Item) -> Answer:
    """Measure one item and its gradient in turn; a first round is not counted, unless it was slow."""
    sides = {"gradient": (workers["ours"], item.unit), "ours": (workers["ours"], item)}
    if "peer" in workers and item.selection != "all" and item.action not in WITHOUT_PEER:
        sides["peer"] = workers["peer"], item
    entry: Answer = {**item.entry(), "errors": {}, "rounds": []}
    start, is_first = time.monotonic(), True
    while is_first or (len(entry["rounds"]) < plan.repeats and _has_time(plan, entry, start)):
        answers = {label: client.ask("time", **asked.entry()) for label, (client, asked) in sides.items()}
        for label, answer in answers.items():
            if not answer["ok"]:
                entry["errors"][label] = answer["error"]
                sides.pop(label)
        found = {label: answer["cpu"] for label, answer in answers.items() if answer["ok"]}
        if not is_first or plan.repeats == 1 or sum(found.values()) > SLOW_SECONDS:
            entry["rounds"].append(found)
        is_first = False
    return entry


def _has_time(plan: Plan, entry: Answer, start: float) -> bool:
    if time.monotonic() - start < plan.seconds or not entry["rounds"]:
        return True
    return len(entry["rounds"]) == 1 and sum(entry["rounds"][0].values()) < VERY_SLOW_SECONDS


def memory(plan: Plan) -> Answer:
    """Peak memory, with a fresh process for each figure."""
    entries = []
    for network in plan.networks:
        for item in plan.memory_items(network):
            entry: Answer = {**item.entry(), "errors": {}, "peaks": {}}
            for label in ["ours"] if item.action == "gradient" else list(plan.pythons):
                with clients(plan, [label], for_memory=True) as workers:
                    answer = workers[label].ask("memory", **item.entry())
                if answer["ok"]:
                    entry["peaks"][label] = answer["peak_mib"]
                else:
                    entry["errors"][label] = answer["error"]
            entries.append(entry)
            print(f"  {network} {item.action}: {entry['peaks']} MiB {entry['errors'] or ''}", flush=True)
    return {"entries": entries}


def ratio(entry: Answer, label: str, base: str) -> float | None:
    """The median over the rounds of one side's CPU time in units of another's."""
    found = [r[label] / r[base] for r in entry["rounds"] if label in r and base in r]
    return median(found) if found else None


def seconds(entry: Answer, label: str) -> float | None:
    """The median over the rounds of one side's CPU time."""
    found = [r[label] for r in entry["rounds"] if label in r]
    return median(found) if found else None


def describe(entry: Answer) -> str:
    """Say in one line what was measured."""
    words = [f"{NETWORKS[entry['network']][0]}, {entry['selection']}, {entry['num_data']}: {TITLES[entry['action']]}:"]
    for label in ("ours", "peer"):
        time_, gradients = seconds(entry, label), ratio(entry, label, "gradient")
        if time_ is not None:
            words.append(f"{label} {time_:.3f} s" + (f" ({gradients:.2f} gradients)" if gradients else ""))
        elif label in entry["errors"]:
            words.append(f"{label} {entry['errors'][label]}")
    of_peers = ratio(entry, "ours", "peer")
    return " ".join(words + ([f"ours/peer {of_peers:.2f}"] if of_peers else []))
