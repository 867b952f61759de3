"""How much memory there is, and how much tensors hold."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

#: Share of the total memory that kept products may take up when the user does not say.
_KEPT_SHARE = 0.25
#: Where Linux says how much memory a control group may use, by version: mount point and file.
_LIMITS = (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))


@cache
def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; on the CPU those that this process may use. Fixed for the life of the process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_physical_memory(), *_container_limits()])


def default_budget(device: torch.device) -> int:
    """Bytes that kept products may take up on a device: a share of all memory, so that it does not depend on load."""
    return int(_KEPT_SHARE * total_memory(device))


def num_bytes(tensors: Iterable[Tensor], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes that tensors hold, each memory counted once, apart from what other tensors hold anyway."""
    known = {t.untyped_storage()._cdata for t in apart_from}
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in found.items() if storage not in known)


def _physical_memory() -> int:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 8 * 2**30  # a system that does not say


def _container_limits() -> list[int]:
    groups = {"", *(line.rsplit(":", 1)[1].strip("/") for line in _text("/proc/self/cgroup").splitlines())}
    paths = [Path(mount, group, file) for mount, file in _LIMITS for group in groups]
    return [int(text) for text in (_text(path).strip() for path in paths) if text.isdigit()]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def checked_budget(max_memory: int | None, device: torch.device) -> int:
    """Bytes that may be kept, by default a share of all memory."""
    if max_memory is None:
        return default_budget(device)
    if not isinstance(max_memory, int) or isinstance(max_memory, bool) or max_memory < 0:
        raise ValueError(f"max_memory: expected bytes as an integer of at least 0, got {max_memory!r}.")
    return max_memory
