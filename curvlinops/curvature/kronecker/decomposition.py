"""Eigenbases of factors, shared out over the ranks of a process group by cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from curvlinops.operators.factorisations import symmetric_eigen
from curvlinops.risk.collective import raise_together, rank_of, size_of, summed


def shared_bases(matrices: Sequence[Tensor], process_group: ProcessGroup | None) -> list[Tensor]:
    """The eigenvectors ``[G, n, n]`` of symmetric matrices, each computed by one rank and sent to all others.

    Args:
        matrices: The same on all ranks.
        process_group: The ranks, or ``None`` for this process alone.
    """
    if process_group is None:
        return [basis for _, basis in symmetric_eigen(matrices)]
    owner = owners([len(m) * m.shape[-1] ** 3 for m in matrices], size_of(process_group))
    mine = [i for i, rank in enumerate(owner) if rank == rank_of(process_group)]
    bases = [torch.zeros_like(m) for m in matrices]
    error = None
    try:
        for i, (_, basis) in zip(mine, symmetric_eigen([matrices[i] for i in mine]), strict=True):
            bases[i] = basis
    except Exception as found:  # the others wait
        error = found
    if matrices:
        raise_together(error, matrices[0].device, process_group)
    return summed(bases, process_group)


def owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Which rank does which task: the dearest first, each to the rank that has least to do."""
    loads = [0.0] * num_ranks
    found = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[task] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[found[task]] += costs[task]
    return found
