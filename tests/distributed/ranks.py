"""Two processes, which hold shards of the data and talk to each other through gloo."""

import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()) or sys.platform == "win32", reason="needs gloo"
)

#: How long a rank may wait for the other before this counts as hanging.
TIMEOUT = timedelta(seconds=20)

Found = dict[str, Any]
#: What a rank does: its number and the group -> what it found.
Parts = Mapping[str, Callable[[int, Any], Found]]


def run_rank(rank: int, folder: str, parts: Parts) -> None:
    """What each of the two processes does; its findings go to files, as far as it gets."""
    torch.set_num_threads(1)
    store = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=TIMEOUT)
    for name, part in parts.items():
        torch.save(part(rank, dist.group.WORLD), f"{folder}/{name}-{rank}.pt")


def run_both(folder: Path, parts: Parts) -> dict[str, list[Found]]:
    """The findings of both ranks in each part that both came through."""
    try:
        mp.spawn(run_rank, args=(str(folder), parts), nprocs=2)
    except Exception:
        traceback.print_exc()
    paths = {part: [folder / f"{part}-{rank}.pt" for rank in range(2)] for part in parts}
    return {
        part: [torch.load(path, weights_only=False) for path in both]
        for part, both in paths.items()
        if all(path.exists() for path in both)
    }
