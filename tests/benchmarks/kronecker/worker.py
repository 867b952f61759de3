"""A process of one environment that measures what it is told: JSON lines in, JSON lines out.

It is started by its path, with the interpreter of the environment to measure; what it imports as `curvlinops` is that
environment's. Commands: ``time``, ``memory``, ``forget`` and ``products``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.jobs import Job
    from tests.benchmarks.networks import Problem

ROOT = Path(__file__).resolve().parents[3]
WARM_DATA = 32
"""Of the same job before: with very few data the peer's decompositions may fail."""
SHORTEST = 0.1
"""Seconds that one measurement takes at least: what is shorter is run several times."""


class Worker:
    """Holds what has been prepared."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.problems: dict[tuple[Any, ...], Problem] = {}
        self.computed: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.jobs: dict[tuple[Any, ...], tuple[Job, int]] = {}

    def forget(self) -> dict[str, Any]:
        """Make room."""
        for kept in (self.problems, self.computed, self.jobs):
            kept.clear()
        gc.collect()
        return {}

    def time(self, network: str, action: str, selection: str, num_data: int) -> dict[str, Any]:
        """Measure one item once; the first call prepares it."""
        from tests.benchmarks import measure
        from tests.benchmarks.jobs import Job
        from tests.benchmarks.kronecker import actions

        where = (network, selection, num_data)
        key = (*where, action)
        if key not in self.jobs:
            job = actions.prepare(self._problem(*where), action, self.computed.setdefault(where, {}))
            first = measure.timed(job, "cpu")
            is_repeated = "invert" not in action  # of which nothing may be kept
            self.jobs[key] = job, max(1, ceil(SHORTEST / max(first["cpu"], 1e-4))) if is_repeated else 1
            return first
        job, number = self.jobs[key]
        if number == 1:
            return measure.timed(job, "cpu")
        seconds = measure.timed(Job(lambda _: [job.run(None) for _ in range(number)][-1]), "cpu")
        return {name: value / number for name, value in seconds.items()}

    def memory(self, network: str, action: str, selection: str, num_data: int) -> dict[str, Any]:
        """Measure the peak memory of one item, after the same with two layers has loaded what loads late."""
        from tests.benchmarks import measure
        from tests.benchmarks.kronecker import actions, problems

        small = actions.prepare(problems.build(network, min(num_data, WARM_DATA), "few"), action, {})
        small.run(None)
        del small
        job = actions.prepare(self._problem(network, selection, num_data), action, {})
        gc.collect()
        return {"peak_mib": round(measure.peak_memory(job, "cpu"), 1)}

    def products(
        self, network: str, selection: str, num_data: int, name: str, options: dict[str, str], path: str
    ) -> dict[str, Any]:
        """Write to a file what both packages should agree on."""
        import torch

        from tests.benchmarks.kronecker import actions

        torch.save(actions.products(self._problem(network, selection, num_data), name, options), path)
        return {}

    def _problem(self, network: str, selection: str, num_data: int) -> Problem:
        from tests.benchmarks.kronecker import problems

        where = (network, selection, num_data)
        if where not in self.problems:
            self.problems[where] = problems.build(network, num_data, selection)
        return self.problems[where]


def main() -> None:
    """Read requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    try:
        import torch

        import curvlinops

        sys.path.append(str(ROOT))
        from tests.benchmarks.worker import answer
    except ImportError as error:
        replies.write(json.dumps({"ok": False, "error": f"ImportError: {error}"}) + "\n")
        return
    torch.set_num_threads(1)
    hello = {"ok": True, "location": str(curvlinops.__file__), "torch": torch.__version__}
    for name in ("curvlinops", "curvlinops-for-pytorch"):
        try:
            hello[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    replies.write(json.dumps(hello) + "\n")
    worker = Worker()
    for line in sys.stdin:
        replies.write(json.dumps(answer(worker, json.loads(line))) + "\n")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
