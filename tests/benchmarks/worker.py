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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def prepare_path() -> str:
    """Import curvlinops without, then open the path to, the repository; return where curvlinops lies."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    import curvlinops

    sys.path.append(str(ROOT))
    return str(curvlinops.__file__)


class Worker:
    """Holds one network and the calls prepared for it."""

    def __init__(self, device: str) -> None:
        """Start without a network."""
        self.device = device
        self.network = ""
        self.num_data = 0
        self.calls: dict[tuple[str, str], Callable[[], Any]] = {}

    def setup(self, network: str, num_data: int) -> dict[str, Any]:
        """Build a network and forget the calls of the one before."""
        from tests.benchmarks import measure, networks

        self.network, self.num_data = network, num_data
        self.calls.clear()
        self.problem = networks.build(network, num_data, self.device)
        gc.collect()
        return {"num_params": self.problem.num_params, "attention": measure.attention_kernel(self.problem)}

    def time(self, action: str, matrix: str, math: bool) -> dict[str, Any]:
        """Measure the time of one item once. The first call of an item prepares it."""
        from tests.benchmarks import measure

        with measure.attention_context(math):
            if (action, matrix) not in self.calls:
                self._forget_items()
                self.calls[action, matrix] = measure.prepare(self.problem, action, matrix)
            return measure.timed(self.calls[action, matrix], self.device)

    def _forget_items(self) -> None:
        """Keep the gradients alone: one item at a time, lest vectors and operators pile up."""
        self.calls = {key: call for key, call in self.calls.items() if key[0] == "gradient"}
        gc.collect()

    def memory(self, action: str, matrix: str, math: bool) -> dict[str, Any]:
        """Measure the peak memory of one item, after the same call on one datum has loaded what loads late."""
        from tests.benchmarks import measure, networks

        with measure.attention_context(math):
            measure.prepare(networks.build(self.network, 1, self.device), action, matrix)()
            call = measure.prepare(self.problem, action, matrix)
            gc.collect()
            return {"peak_mib": measure.peak_memory(call, self.device)}


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request; an error becomes part of the answer."""
    from tests.benchmarks.measure import NotOffered

    command = request.pop("command")
    try:
        return {"ok": True, **getattr(worker, command)(**request)}
    except NotOffered:
        return {"ok": False, "error": "not offered"}
    except Exception as error:
        worker.calls.clear()
        gc.collect()
        first_line = (str(error).splitlines() or [""])[0].replace(str(ROOT), ".")
        return {"ok": False, "error": f"{type(error).__name__}: {first_line[:200]}"}


def main() -> None:
    """Read requests until the input ends. Arguments: device, threads, GiB of address space (0: no limit)."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what models or libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    device, threads, gib = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
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
    hello = {"ok": True, "location": location, "torch": torch.__version__, "python": sys.version.split()[0]}
    if device != "cpu":
        hello["gpu"] = torch.cuda.get_device_name()
    replies.write(json.dumps(hello) + "\n")
    worker = Worker(device)
    for line in sys.stdin:
        replies.write(json.dumps(answer(worker, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
