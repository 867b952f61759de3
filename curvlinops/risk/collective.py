"""Several ranks, each with a shard of the data: one all-reduce brings sums, denominators and errors together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from curvlinops.risk.passes import Pass

#: Counts travel as two digits in this base, since float32 does not hold large ones exactly.
_BASE = 2**12


def rank_of(process_group: ProcessGroup | None) -> int:
    """Number of this process in the group; 0 without one."""
    return 0 if process_group is None else dist.get_rank(process_group)


def all_reduced(found: Pass, disagrees: bool, process_group: ProcessGroup | None) -> tuple[Pass, bool]:
    """The sums over all ranks. An error on one rank becomes one on all, so that none waits for ever.

    Args:
        found: What this rank found.
        disagrees: Whether its ways through the network disagree.
        process_group: The ranks, or ``None`` for this process alone.
    """
    if process_group is None:
        return found, disagrees
    first = found.sums[0]
    # A count can exceed what float32 holds exactly, hence two numbers.
    high = found.denominator.to(first.dtype)
    low = (found.denominator - high.double()).to(first.dtype)
    counts = [*divmod(found.num_data, _BASE), found.error is not None, disagrees]
    numbers = torch.tensor([float(c) for c in counts], dtype=first.dtype, device=first.device)
    packed = torch.cat([*(t.flatten() for t in found.sums), high.reshape(1), low.reshape(1), numbers])
    if found.error is not None:
        packed[:-2] = 0
    dist.all_reduce(packed, group=process_group)
    *parts, denominator, num_data, flags = torch.split(packed, [*(t.numel() for t in found.sums), 2, 2, 2])
    found.num_data = int(num_data[0]) * _BASE + int(num_data[1])
    found.sums = [part.reshape(t.shape) for part, t in zip(parts, found.sums, strict=True)]
    found.denominator = denominator.double().sum()
    if flags[0] > 0 and found.error is None:
        found.error = RuntimeError("Another rank of the process group failed in this pass; its own error says why.")
    return found, bool(flags[1] > 0)


def raise_together(error: Exception | None, device: torch.device, process_group: ProcessGroup | None) -> None:
    """Raise an error on all ranks if there is one on any."""
    if agreed(error is not None, device, process_group) and error is None:
        error = RuntimeError("Another rank of the process group failed in its checks; its own error says why.")
    if error is not None:
        raise error


def agreed(flag: bool, device: torch.device, process_group: ProcessGroup | None) -> bool:
    """Whether a flag is set on any rank."""
    if process_group is None:
        return flag
    number = torch.tensor([float(flag)], device=device)
    dist.all_reduce(number, group=process_group)
    return number.item() > 0


def any_of(flags: Tensor, device: torch.device, process_group: ProcessGroup | None) -> Tensor:
    """Which of several flags are set on any rank."""
    if process_group is None:
        return flags
    numbers = flags.to(device, torch.float32)
    dist.all_reduce(numbers, group=process_group)
    return numbers.cpu() > 0


def size_of(process_group: ProcessGroup | None) -> int:
    """Number of ranks; 1 without a group."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def summed(tensors: list[Tensor], process_group: ProcessGroup) -> list[Tensor]:
    """The sums of tensors over all ranks, in one call."""
    if not tensors:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, group=process_group)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
