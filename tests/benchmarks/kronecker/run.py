"""Run the benchmark of Kronecker-factored curvature: ``python -m tests.benchmarks.kronecker.run --help``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks.client import Answer
from tests.benchmarks.kronecker import rounds
from tests.benchmarks.kronecker.page import write_page
from tests.benchmarks.kronecker.plan import NETWORKS, PARTS, Plan
from tests.benchmarks.run import machine_facts

PAGE = Path("docs/kronecker_benchmarks.rst")
RESULTS = Path("docs/benchmarks/kronecker.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kronecker.run", description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="the others keep their figures")
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="the others keep their figures")
    add("--repeats", type=int, default=3, help="measured rounds at most")
    add("--seconds", type=float, default=8, help="start no further round of an item after this time")
    add("--quick", action="store_true", help="tiny sizes; writes nothing unless --output is given")
    add("--ours", default=sys.executable, help="interpreter with this checkout installed")
    add("--peer", default=None, help="interpreter with the peer installed; left out by default")
    add("--output", type=Path, default=None, help=f"the JSON file (default: {RESULTS})")
    add("--page", type=Path, default=None, help=f"the page (default: {PAGE} without --output)")
    return parser.parse_args(argv)


def circumstances(argv: list[str] | None, before: float) -> Answer:
    """When, how and on what a part was measured, and what else the machine had to do."""
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tests.benchmarks.kronecker.run", *arguments]),
        "machine": machine_facts(),
        "versions": {"python": sys.version.split()[0], "torch": metadata.version("torch")},
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
    }


def measure(part: str, plan: Plan) -> Answer:
    """Measure one part."""
    if part == "memory":
        return rounds.memory(plan)
    if part == "agreement":
        from tests.benchmarks.kronecker import agreement  # which needs torch

        return agreement.compare(plan)
    return rounds.times(plan, part)


def merged(old: Answer, new: Answer) -> Answer:
    """A part's results with those of an earlier run for networks that were not measured again."""
    key = "rows" if "rows" in new else "entries"
    measured = {entry["network"] for entry in new[key]}
    return {**new, key: [e for e in old.get(key, []) if e["network"] not in measured] + new[key]}


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what is there after each part."""
    o = parse_arguments(argv)
    pythons = {"ours": o.ours} | ({"peer": o.peer} if o.peer else {})
    plan = Plan(pythons, o.networks, 1 if o.quick else o.repeats, o.seconds, o.quick)
    is_kept = not o.quick or o.output is not None
    path, page = o.output or RESULTS, o.page or (PAGE if o.output is None else None)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() and is_kept else {}
    for part in o.parts:
        print(part, flush=True)
        start, load = time.monotonic(), os.getloadavg()[0]
        measured = measure(part, plan)
        old = results.get(part, {})
        results[part] = {**circumstances(argv, load), "quick": o.quick, **merged(old, measured)}
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        if is_kept:
            results = {name: results[name] for name in PARTS if name in results}
            path.write_text(json.dumps(results, indent=1) + "\n")
            if page is not None:
                write_page(results, page)


if __name__ == "__main__":
    main()
