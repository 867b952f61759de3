"""Run the benchmark of the solvers: ``python -m tests.benchmarks.solvers.run --help``."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.run import machine_facts
from tests.benchmarks.solvers import against_peer, beside_scipy, preconditioned, single
from tests.benchmarks.solvers.page import write_page
from tests.benchmarks.solvers.plan import Plan, quick
from tests.benchmarks.solvers.race import Answer, Effort

PARTS: dict[str, Callable[[Plan], Answer]] = {
    "peer": against_peer.run,
    "textbook": single.against_textbook,
    "path": single.path,
    "preconditioners": preconditioned.with_mlp,
    "preconditioners-conv": preconditioned.with_conv,
    "eigenpairs": beside_scipy.eigenpairs,
    "indefinite": beside_scipy.indefinite,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.solvers.run", description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="the others keep their figures")
    add("--repeats", type=int, default=3, help="measured rounds at most")
    add("--seconds", type=float, default=10, help="start no further round of an item after this time")
    add(
        "--quick", action="store_true", help="tiny sizes, to see that all runs; writes nothing unless --output is given"
    )
    add("--dampings", nargs="+", type=float, default=None, help="those of the preconditioned solves, both right sides")
    add("--ours", default=sys.executable, help="interpreter with this checkout installed")
    add("--peer", default=None, help="interpreter with the peer installed; left out by default")
    add("--output", type=Path, default=None, help="the JSON file (default: docs/benchmarks/solvers.json)")
    add(
        "--page",
        type=Path,
        default=None,
        help="the page (default: docs/solver_benchmarks.rst without --output)",
    )
    return parser.parse_args(argv)


def circumstances(argv: list[str] | None) -> Answer:
    """When, how and on what a part was measured."""
    names = ("torch", "scipy", "numpy", "scikit-learn")
    arguments = sys.argv[1:] if argv is None else argv
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tests.benchmarks.solvers.run", *arguments]),
        "machine": machine_facts(),
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, and write what is there after each part."""
    o = parse_arguments(argv)
    torch.set_num_threads(1)
    pythons = {"ours": o.ours} | ({"peer": o.peer} if o.peer else {})
    plan = quick(pythons) if o.quick else Plan(pythons, Effort(o.repeats, o.seconds))
    plan = replace(plan, effort=Effort(1 if o.quick else o.repeats, o.seconds))
    if o.dampings:
        plan = replace(plan, hard_dampings=tuple(o.dampings), random_dampings=tuple(o.dampings))
    is_kept = not o.quick or o.output is not None
    path = o.output or Path("docs/benchmarks/solvers.json")
    page = o.page or (Path("docs/solver_benchmarks.rst") if o.output is None else None)
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() and is_kept else {}
    for part in o.parts:
        print(part, flush=True)
        start = time.monotonic()
        measured = PARTS[part](plan)
        results[part] = {**circumstances(argv), "quick": o.quick, **measured}
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        if is_kept:
            results = {name: results[name] for name in PARTS if name in results}
            path.write_text(json.dumps(results, indent=1) + "\n")
            if page is not None:
                write_page(results, page)


if __name__ == "__main__":
    main()
