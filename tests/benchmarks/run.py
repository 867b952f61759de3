"""Run the benchmark: ``python -m tests.benchmarks.run --help``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.client import Setting
from tests.benchmarks.items import ACTIONS, NETWORKS, Item
from tests.benchmarks.report import write_reports
from tests.benchmarks.rounds import Benchmark, Effort


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add("--items", nargs="+", choices=list(ACTIONS), default=list(ACTIONS), help="what to measure (default: all)")
    add("--threads", nargs="+", type=int, default=[1, 2], help="the first is for the ratios, others get a table each")
    add("--repeats", type=int, default=5, help="measured calls, after one that is not counted")
    add("--seconds", type=float, default=60, help="start no further round of an item after this time")
    add("--timeout", type=float, default=900, help="give up on a single call after this time")
    add("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    add("--limit-gib", type=float, default=16, help="address space of a worker on the CPU; 0 for no limit")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "float64", "bfloat16"], default="float32", help="of parameters and data")
    add("--tf32", action="store_true", help="let matrix products and convolutions of a GPU use TF32")
    add("--update", action="store_true", help="keep the figures of an earlier run that are not measured again")
    add("--ours", default=sys.executable, help="interpreter with this checkout installed")
    add("--peer", default=None, help="interpreter with the peer installed; left out by default")
    add("--output", type=Path, default=Path("docs/benchmarks"), help="folder for the JSON file and the tables")
    return parser.parse_args(argv)


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


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A network's results with those of an earlier run where nothing new was measured."""
    result = old | new
    result["times"] = {**old.get("times", {})}
    for threads, times in new["times"].items():
        result["times"][threads] = _merged_items(old.get("times", {}).get(threads, {}), times)
    if "memory" in old or "memory" in new:
        result["memory"] = _merged_items(old.get("memory", {}), new.get("memory", {}))
    return result


def _merged_items(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    entries = {Item.of(entry): entry for entry in old.get("items", [])}
    entries |= {Item.of(entry): entry for entry in new.get("items", [])}
    return {**old, **new, "items": list(entries.values())}


def write_command(argv: list[str] | None) -> str:
    """The command line of this run."""
    return shlex.join(["python", "-m", "tests.benchmarks.run", *(sys.argv[1:] if argv is None else argv)])


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what is there after each network."""
    o = parse_arguments(argv)
    special = [part for part in (o.device, o.dtype) if part not in ("cpu", "float32")] + (["tf32"] if o.tf32 else [])
    path = o.output / ("-".join(["results", *special]) + ".json")
    earlier = json.loads(path.read_text()) if o.update and path.exists() else {}

    pythons = {"ours": o.ours} | ({"peer": o.peer} if o.peer else {})
    setting = Setting(o.device, o.dtype, o.tf32, o.limit_gib, o.timeout)
    benchmark = Benchmark(pythons, setting, Effort(o.repeats, o.seconds, o.memory))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    results: dict[str, Any] = {
        "date": date,
        "commands": [*earlier.get("commands", []), {"date": date, "command": write_command(argv)}],
        "machine": machine_facts(),
        "device": o.device,
        "dtype": o.dtype,
        "tf32": o.tf32,
        "clock": benchmark.clock,
        "repeats": o.repeats,
        "threads": earlier.get("threads", o.threads),
        "environments": benchmark.environments,
        "networks": earlier.get("networks", {}),
    }
    o.output.mkdir(parents=True, exist_ok=True)
    for network in o.networks:
        measured = benchmark.measure_network(network, o.items, o.threads)
        results["networks"][network] = merged(results["networks"].get(network, {}), measured)
        ordered = {name: results["networks"][name] for name in NETWORKS if name in results["networks"]}
        results["networks"] = ordered
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_reports(results, path)
    print(f"written to {o.output}")


if __name__ == "__main__":
    main()
