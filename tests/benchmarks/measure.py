"""How one item is measured inside one environment: the call, its time and its peak memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlinops
from tests.benchmarks.items import DIAGONALS, MATRICES, NUM_COLUMNS
from tests.benchmarks.networks import Problem, TransformerBlock

MIB = 2**20


class NotOffered(Exception):
    """The environment's curvlinops has no such class."""


def gradient(problem: Problem) -> tuple[Tensor, ...]:
    """Compute one gradient over all data with plain autograd: the unit of all ratios."""
    total: tuple[Tensor, ...] | None = None
    for X, y in problem.data:
        grads = torch.autograd.grad(problem.loss(problem.model(X), y), problem.params)
        total = grads if total is None else tuple(a + b for a, b in zip(total, grads))
    assert total is not None
    return total


def prepare(problem: Problem, action: str, matrix: str) -> Callable[[], Any]:
    """Build everything that is not part of the item and return the call that is."""
    if action == "gradient":
        return lambda: gradient(problem)
    if action == "diagonal":
        return _prepare_diagonal(problem, matrix)

    cls = _find(MATRICES[matrix][1])
    head = (problem.model, problem.loss, problem.params, problem.data)
    if action == "construct":
        return lambda: cls(*head)
    if action == "construct_unchecked":
        return lambda: cls(*head, check_deterministic=False)
    vector = _random(problem, ())
    if action == "first":
        return lambda: cls(*head) @ vector
    operator = cls(*head, check_deterministic=False)
    operand = vector if action == "product" else _random(problem, (NUM_COLUMNS,))
    return lambda: operator @ operand


def _prepare_diagonal(problem: Problem, matrix: str) -> Callable[[], Any]:
    """Return the call that makes a new diagonal and uses it once: it is computed at its first use."""
    _, name, options = DIAGONALS[matrix]
    cls = _find(name)
    vector = _random(problem, ())
    head = (problem.model, problem.loss, problem.params, problem.data)
    return lambda: cls(*head, check_deterministic=False, **options) @ vector


def _find(name: str) -> Callable[..., Any]:
    if not hasattr(curvlinops, name):
        raise NotOffered(name)
    return getattr(curvlinops, name)


def _random(problem: Problem, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(problem.num_params, *shape, generator=generator)
    return values.to(problem.params[0].device)


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


def timed(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Run a call once: CPU seconds of this process over all its threads, and wall seconds."""
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    _synchronize(device)
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    del result
    return seconds


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Run a call once and return the MiB by which memory in use rose at most."""
    if device != "cpu":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    _reset_peak()
    baseline = _max_resident()
    call()
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
