"""Sums of squared per-datum gradients, which diagonals are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvlinops.risk.batches import map_tensors, tensors_of
from curvlinops.risk.linearization import Linearization, is_out_of_memory
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.verification import tolerance

#: Numbers that per-datum gradients may take up at a time.
_CHUNK_NUMEL = 2**26


def sums_of_squares(
    model: FunctionalModel, X: Any, linearization: Linearization, columns: Sequence[Tensor]
) -> list[Tensor]:
    r"""The diagonal :math:`\sum_n \sum_r (J_n^\top s_{nr})^2` of one mini-batch.

    Where the model takes data one by one, per-datum gradients are computed for a few data at a time under vmap.
    Otherwise each datum's column is pulled back through the whole mini-batch, which costs N times as much.

    Args:
        model: The model.
        X: Inputs of the mini-batch.
        linearization: The model at these inputs.
        columns: Columns of the loss factor in the prediction's shape ``[N, *out]``, one of each datum at a time.

    Returns:
        A tensor for each parameter, in its shape.
    """
    num_data = len(columns[0])
    if all(t.ndim > 0 and len(t) == num_data for t in tensors_of(X)) and not model.is_closure:
        try:
            return _by_vmap(model, X, linearization, columns)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
    return _by_masks(linearization, columns)


def _by_vmap(model: FunctionalModel, X: Any, linearization: Linearization, columns: Sequence[Tensor]) -> list[Tensor]:
    values = [v.detach() for v in linearization.values]
    numel = sum(v.numel() for v in values)
    num_data = len(columns[0])
    at_once = max(1, min(len(columns), _CHUNK_NUMEL // numel))
    data_at_once = max(1, _CHUNK_NUMEL // (numel * at_once))
    squares = [torch.zeros_like(v) for v in values]
    sums = [torch.zeros_like(v) for v in values]

    def gradients(x: Any, u: Tensor) -> Any:
        def predict(*p: Tensor) -> Tensor:
            return model(p, map_tensors(lambda t: t.unsqueeze(0), x)).squeeze(0)

        return vmap(vjp(predict, *values)[1])(u)

    for data in _slices(num_data, data_at_once):
        part = map_tensors(lambda t, d=data: t[d], X)  # type: ignore[misc]
        for chosen in _slices(len(columns), at_once):
            U = torch.stack([column[data] for column in columns[chosen]], 1).to(linearization.output.dtype)
            for square, total, g in zip(squares, sums, vmap(gradients)(part, U), strict=True):
                total += g.sum((0, 1))
                square += g.square_().sum((0, 1))
    _check_sums(linearization, columns, sums)
    return squares


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _check_sums(linearization: Linearization, columns: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Per-datum gradients must add up to the mini-batch's: proves which axis of X is the datum."""
    whole = linearization.pull(torch.stack(list(columns)).sum(0).unsqueeze(-1))
    error = torch.stack([(w.squeeze(-1) - s).square().sum() for w, s in zip(whole, sums, strict=True)]).sum().sqrt()
    size = torch.stack([s.square().sum() for s in sums]).sum().sqrt()
    if error > tolerance(size.dtype, size.device) * size + torch.finfo(size.dtype).eps:
        raise RuntimeError("Per-datum gradients do not add up to the gradient of the mini-batch.")


def _by_masks(linearization: Linearization, columns: Sequence[Tensor]) -> list[Tensor]:
    squares: list[Tensor] = []
    for column in columns:
        for n in range(len(column)):
            masked = torch.zeros_like(column)
            masked[n] = column[n]
            pulled = [g.squeeze(-1) for g in linearization.pull(masked.unsqueeze(-1))]
            squares = squares or [torch.zeros_like(g) for g in pulled]
            for square, g in zip(squares, pulled, strict=True):
                square.addcmul_(g, g)
    return squares
