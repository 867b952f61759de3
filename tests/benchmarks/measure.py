"""Time and peak memory of one job, and which attention kernel is at work."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.jobs import MIB, Job
from tests.benchmarks.networks import Problem, TransformerBlock


def attention_context(math: bool) -> contextlib.AbstractContextManager[None]:
    """Choose the MATH kernel of attention, or leave the choice to torch."""
    return sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext()


def attention_kernel(problem: Problem) -> str | None:
    """Name the attention kernel of a forward that will be differentiated; None without attention.

    A fused kernel shows as a node of the graph; the MATH kernel consists of ordinary operations.
    """
    if not any(isinstance(module, TransformerBlock) for module in problem.model.modules()):
        return None
    pending = [problem.model(problem.data[0][0]).grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "ScaledDotProduct" in node.name():
            return str(node.name())
        pending += [parent for parent, _ in node.next_functions]
    return "MATH"


def timed(job: Job, device: str) -> dict[str, Any]:
    """Run a job once: CPU seconds of this process over all its threads, and wall seconds; for a series, lists."""
    prepared = job.begin()
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = job.run(prepared)
    _synchronize(device)
    seconds: dict[str, Any] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if job.is_series:
        seconds["series"] = {"cpu": [cpu for cpu, _ in result], "wall": [wall for _, wall in result]}
    del result, prepared
    return seconds


def peak_memory(job: Job, device: str) -> float:
    """Run a job once and return the MiB by which memory in use rose at most."""
    prepared = job.begin()
    if device != "cpu":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job.run(prepared)
        _synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    _reset_peak()
    baseline = _max_resident()
    job.run(prepared)
    return _max_resident() - baseline


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _max_resident() -> float:
    """Return the largest resident set of this process so far, in MiB; on Linux since the last reset."""
    for line in _status_lines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def _status_lines() -> Iterator[str]:
    # ru_maxrss would do, were it not that it starts at the size of the parent and cannot be reset.
    status = Path("/proc/self/status")
    if status.exists():
        yield from status.read_text().splitlines()


def _reset_peak() -> None:
    """Let the peak start from what is in use now, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def limit_address_space(gib: float) -> None:
    """Make allocations beyond this many GiB fail with an error instead of filling the machine."""
    size = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
