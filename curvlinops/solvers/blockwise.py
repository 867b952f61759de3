"""What a block-diagonal operator's blocks need to be solved one by one, and what was done, as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.space import Space
from curvlinops.solvers.columns import working_dtype
from curvlinops.solvers.info import SolveInfo
from curvlinops.solvers.options import Preconditioner


def preconditioners_of_blocks(
    A: BlockDiagonal, preconditioner: Preconditioner | None
) -> Sequence[LinearOperator | None] | None:
    """A preconditioner for each block; None where the preconditioner is not cut as the operator is."""
    if preconditioner is None:
        return [None] * len(A.blocks)
    return A._matching(preconditioner) if isinstance(preconditioner, LinearOperator) else None


def starts_of_blocks(A: BlockDiagonal, x0: Any) -> Sequence[list[Tensor] | None]:
    """The first iterate of each block, columns last."""
    return [None] * len(A.blocks) if x0 is None else A._parts(A.domain.read(x0)[0])


def combined(infos: Sequence[SolveInfo], parts: Sequence[list[Tensor]], rtol: float, seconds: float) -> SolveInfo:
    """What the solves of all blocks did, as that of the whole operator.

    The most iterations and products that a block took; residuals relative to the whole right-hand side.

    Args:
        infos: Of each block.
        parts: The right-hand side of each block.
        rtol: The relative residual that was asked for.
        seconds: Wall-clock time of all.
    """
    scales = torch.stack([_norms(part) for part in parts])
    residual = _whole([info.residual_norm for info in infos], scales)
    num_rows = max(len(info.history) for info in infos)
    history = [_whole([info.history[min(i, len(info.history) - 1)] for info in infos], scales) for i in range(num_rows)]
    return SolveInfo(
        num_iterations=torch.stack([info.num_iterations for info in infos]).amax(0),
        residual_norm=residual,
        converged=torch.stack([info.converged for info in infos]).all(0) | (residual <= rtol),
        breakdown=torch.stack([info.breakdown for info in infos]).any(0),
        attainable=_whole([info.attainable for info in infos], scales),
        num_matvecs=max(info.num_matvecs for info in infos),
        seconds=seconds,
        ended_by=next((info.ended_by for info in infos if info.ended_by), None),
        history=torch.stack(history),
    )


def _norms(part: list[Tensor]) -> Tensor:
    columns = Space.merge(part)
    norms: Tensor = torch.linalg.vector_norm(columns.to(working_dtype(columns.dtype)), dim=0)
    return norms


def _whole(relative: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Norms of the whole relative to its scale, from those of blocks ``[K]``; absolute ones where it is zero."""
    parts = torch.stack(list(relative))
    whole = torch.linalg.vector_norm(torch.where(scales > 0, parts * scales, parts), dim=0)
    total = torch.linalg.vector_norm(scales, dim=0)
    result: Tensor = whole / torch.where(total > 0, total, 1.0)
    return result
