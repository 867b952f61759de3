"""Sums of squared per-datum gradients, which diagonals are made of: from layer notes, under vmap, or by masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvlinops.risk.batches import has_rows, map_tensors
from curvlinops.risk.layers.factors import LayerFactors, LayerNotes
from curvlinops.risk.layers.parts import CHUNK_NUMEL, slices
from curvlinops.risk.linearization import Linearization, is_out_of_memory
from curvlinops.risk.losses.base import at_least_float32
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.verification import coarsest_dtype, tolerance

#: Yields the columns of a loss factor.
Columns = Callable[[], Iterator[Tensor]]


def squares_from_notes(notes: LayerNotes, columns: Columns) -> dict[int, Tensor]:
    r"""The diagonal :math:`\sum_n \sum_r (J_n^\top s_{nr})^2` of one mini-batch, for the parameters of noted layers.

    Cost: a backward a column; the per-datum gradients of one layer at a time.

    Args:
        notes: Notes of the layers in the prediction's graph.
        columns: Gives the columns of the loss factor in the prediction's shape ``[N, *out]``, one of each datum at a
            time; called anew for each pass over them.

    Returns:
        A tensor for each parameter that the notes cover, in its shape.
    """
    squares: dict[int, Tensor] = {}
    if not notes.numel:
        return squares
    for factors in factors_of_columns(notes, columns):
        for i, found in factors.squares().items():
            squares[i] = squares[i] + found if i in squares else found
    return squares


def factors_of_columns(
    notes: LayerNotes, columns: Columns, columns_at_once: int | None = None
) -> Iterator[LayerFactors]:
    """The columns of F for the parameters of noted layers, as many at a time as memory allows.

    Args:
        notes: Notes of the layers in the prediction's graph.
        columns: Gives the columns of the loss factor, see :func:`squares_from_notes`.
        columns_at_once: How many of a datum go through the network together, at most as many as memory allows.
    """
    allowed = max(1, CHUNK_NUMEL // max(1, notes.numel))
    some_columns = _chunks(columns(), min(allowed, columns_at_once or allowed))
    first, second = next(some_columns, None), next(some_columns, None)
    if first is not None and second is not None:
        notes.prove()  # a part of the columns may not reach every layer
    return (notes.factors(U) for U in chain((U for U in (first, second) if U is not None), some_columns))


def _chunks(columns: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    while some := list(islice(columns, size)):
        yield some[0].unsqueeze(0) if len(some) == 1 else torch.stack(some)


# ---------------------------------------------------------------- datum by datum


def squares_datum_by_datum(
    model: FunctionalModel, X: Any, linearization: Linearization, chosen: Sequence[int], columns: Columns
) -> list[Tensor]:
    """The same for other parameters, from per-datum gradients of a few data at a time under vmap.

    Where the model does not take data one by one, each datum's column is pulled back through the whole mini-batch,
    which costs N times as much.

    Args:
        model: The model.
        X: Inputs of the mini-batch.
        linearization: The model at these inputs.
        chosen: Positions of the parameters.
        columns: The columns of the loss factor.

    Returns:
        A tensor for each chosen parameter, in its shape.
    """
    if has_rows(X, len(linearization.output)) and not model.is_closure:
        try:
            return _by_vmap(model, X, linearization, chosen, columns)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
    return _by_masks(linearization, chosen, columns)


def _zeros(value: Tensor) -> Tensor:
    return at_least_float32(torch.zeros_like(value)).detach()


def _by_vmap(
    model: FunctionalModel, X: Any, linearization: Linearization, chosen: Sequence[int], columns: Columns
) -> list[Tensor]:
    values = [v.detach() for v in linearization.values]
    wanted = [values[i] for i in chosen]
    numel = sum(v.numel() for v in wanted)
    columns_at_once = max(1, CHUNK_NUMEL // numel)
    squares, sums = [_zeros(v) for v in wanted], [_zeros(v) for v in wanted]

    def gradients(x: Any, u: Tensor) -> Any:
        def predict(*p: Tensor) -> Tensor:
            replaced = dict(zip(chosen, p, strict=True))
            every = [replaced.get(i, v) for i, v in enumerate(values)]
            return model(every, map_tensors(lambda t: t.unsqueeze(0), x)).squeeze(0)

        return vmap(vjp(predict, *wanted)[1])(u)

    total_column = torch.zeros_like(linearization.output)
    every_column = columns()
    while some := list(islice(every_column, columns_at_once)):
        data_at_once = max(1, CHUNK_NUMEL // (numel * len(some)))
        for data in slices(len(total_column), data_at_once):
            part = map_tensors(lambda t, d=data: t[d], X)  # type: ignore[misc]
            U = torch.stack([column[data] for column in some], 1)
            for square, total, g in zip(squares, sums, vmap(gradients)(part, U), strict=True):
                total += g.sum((0, 1))
                square += at_least_float32(g).square().sum((0, 1))
        total_column = total_column + torch.stack(some).sum(0)
    _check_sums(linearization, chosen, total_column, sums)
    return squares


def _check_sums(
    linearization: Linearization, chosen: Sequence[int], total_column: Tensor, sums: Sequence[Tensor]
) -> None:
    """Per-datum gradients must add up to the mini-batch's: proves which axis of X is the datum."""
    pulled = linearization.pull(total_column.unsqueeze(-1))
    pairs = [(pulled[i].squeeze(-1), s) for i, s in zip(chosen, sums, strict=True)]
    error = torch.stack([(whole - s).square().sum() for whole, s in pairs]).sum().sqrt()
    size = torch.stack([s.square().sum() for _, s in pairs]).sum().sqrt()
    coarsest = coarsest_dtype(linearization.output, *linearization.values)
    if error > tolerance(coarsest, size.device) * size + torch.finfo(coarsest).eps:
        raise RuntimeError("Per-datum gradients do not add up to the gradient of the mini-batch.")


def _by_masks(linearization: Linearization, chosen: Sequence[int], columns: Columns) -> list[Tensor]:
    squares = [_zeros(linearization.values[i]) for i in chosen]
    for column in columns():
        for n in range(len(column)):
            masked = torch.zeros_like(column)
            masked[n] = column[n]
            pulled = linearization.pull(masked.unsqueeze(-1))
            for square, i in zip(squares, chosen, strict=True):
                square += at_least_float32(pulled[i].squeeze(-1)).square()
    return squares
