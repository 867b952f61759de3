"""A process of one environment that measures what it is told: JSON lines in, JSON lines out.

It is started by its path, with the interpreter of the environment to measure. `curvlinops` is imported before the
repository is put on the path, so that each environment measures its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.items import Item
    from tests.benchmarks.jobs import Job
    from tests.benchmarks.networks import Problem

ROOT = Path(__file__).resolve().parents[2]


def prepare_path() -> str:
    """Import curvlinops without, then open the path to, the repository; return where curvlinops lies."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    import curvlinops

    sys.path.append(str(ROOT))
    return str(curvlinops.__file__)


class Worker:
    """Holds one network and the jobs prepared for it."""

    def __init__(self, device: str, dtype: str) -> None:
        """Start without a network."""
        self.device, self.dtype = device, dtype
        self.network = ""
        self.num_data = 0
        self.problems: dict[int, Problem] = {}
        self.jobs: dict[tuple[Item, bool], Job] = {}

    def setup(self, network: str, num_data: int) -> dict[str, Any]:
        """Build a network and forget the jobs of the one before."""
        from tests.benchmarks import measure

        self.network, self.num_data = network, num_data
        self.problems.clear()
        self.forget()
        problem = self._problem(num_data)
        return {"num_params": problem.num_params, "attention": measure.attention_kernel(problem)}

    def forget(self) -> dict[str, Any]:
        """Make room: keep the network with its own number of data alone, lest vectors and operators pile up."""
        self.problems = {size: problem for size, problem in self.problems.items() if size == self.num_data}
        self.jobs = {key: job for key, job in self.jobs.items() if key[0].action == "gradient" and not key[0].num_data}
        gc.collect()
        return {}

    def time(self, item: dict[str, Any], math: bool, facts: dict[str, Any]) -> dict[str, Any]:
        """Measure the time of one item once. The first call of an item prepares it and tells the facts."""
        from tests.benchmarks import jobs, measure
        from tests.benchmarks.items import Item

        which = Item.of(item)
        with measure.attention_context(math):
            is_new = (which, math) not in self.jobs
            if is_new:
                self.jobs[which, math] = jobs.prepare(self._problem(which.num_data), which, facts)
            job = self.jobs[which, math]
            return measure.timed(job, self.device) | ({"facts": job.facts} if is_new and job.facts else {})

    def memory(self, item: dict[str, Any], math: bool) -> dict[str, Any]:
        """Measure the peak memory of one item, after the same job on one datum has loaded what loads late."""
        from tests.benchmarks import jobs, measure
        from tests.benchmarks.items import Item

        which = Item.of(item)
        with measure.attention_context(math):
            small = jobs.prepare(self._build(1), which, {}, for_memory=True)
            small.run(small.begin())
            del small
            job = jobs.prepare(self._problem(which.num_data), which, {}, for_memory=True)
            gc.collect()
            return {"peak_mib": measure.peak_memory(job, self.device)}

    def _problem(self, num_data: int | None) -> Problem:
        size = num_data or self.num_data
        if size not in self.problems:
            self.problems[size] = self._build(size)
        return self.problems[size]

    def _build(self, num_data: int) -> Problem:
        from tests.benchmarks import networks

        return networks.build(self.network, num_data, self.device, self.dtype)


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request; an error becomes part of the answer."""
    from tests.benchmarks.jobs import NotOffered

    command = request.pop("command")
    try:
        return {"ok": True, **getattr(worker, command)(**request)}
    except NotOffered:
        return {"ok": False, "error": "not offered"}
    except Exception as error:
        worker.jobs.clear()
        gc.collect()
        first_line = (str(error).splitlines() or [""])[0].replace(str(ROOT), ".")
        return {"ok": False, "error": f"{type(error).__name__}: {first_line[:200]}"}


def main() -> None:
    """Read requests until the input ends. Arguments: device, dtype, threads, GiB of address space, 1 for TF32."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what models or libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    device, dtype, threads, gib, tf32 = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
    try:
        location = prepare_path()
        import torch

        from tests.benchmarks.measure import limit_address_space
    except ImportError as error:
        replies.write(json.dumps({"ok": False, "error": f"ImportError: {error}"}) + "\n")
        return

    if gib and device == "cpu":
        limit_address_space(gib)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32 == "1"
    hello = {"ok": True, "location": location, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device != "cpu":
        hello["gpu"] = torch.cuda.get_device_name()
    replies.write(json.dumps(hello) + "\n")
    worker = Worker(device, dtype)
    for line in sys.stdin:
        replies.write(json.dumps(answer(worker, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
