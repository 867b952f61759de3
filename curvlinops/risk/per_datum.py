"""Sums of squared per-datum gradients, which diagonals are made of: from layer notes, under vmap, or by masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvlinops.risk.batches import has_rows, map_tensors
from curvlinops.risk.layers.recorder import LinearNote, output_gradients
from curvlinops.risk.linearization import Linearization, is_out_of_memory
from curvlinops.risk.losses.base import at_least_float32
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.verification import coarsest_dtype, tolerance

#: Yields the columns of a loss factor.
Columns = Callable[[], Iterator[Tensor]]

#: Numbers that per-datum gradients may take up at a time.
_CHUNK_NUMEL = 2**26


def sums_of_squares(
    model: FunctionalModel,
    X: Any,
    linearization: Linearization,
    notes: Sequence[LinearNote],
    columns: Columns,
) -> list[Tensor]:
    r"""The diagonal :math:`\sum_n \sum_r (J_n^\top s_{nr})^2` of one mini-batch.

    The parameters of noted layers take one backward a column. For the others, per-datum gradients are computed for a
    few data at a time under vmap; where the model does not take data one by one, each datum's column is pulled back
    through the whole mini-batch, which costs N times as much.

    Args:
        model: The model.
        X: Inputs of the mini-batch.
        linearization: The model at these inputs.
        notes: Notes of linear layers in the linearisation's graph.
        columns: Gives the columns of the loss factor in the prediction's shape ``[N, *out]``, one of each datum at a
            time; called anew for each pass over them.

    Returns:
        A tensor for each parameter, in its shape.
    """
    squares = _from_notes(linearization, notes, columns)
    rest = [i for i in range(len(linearization.values)) if i not in squares]
    if rest:
        found = _of_each_datum(model, X, linearization, rest, columns)
        squares.update(zip(rest, found, strict=True))
    return [squares[i] for i in range(len(linearization.values))]


def _zeros(value: Tensor) -> Tensor:
    return at_least_float32(torch.zeros_like(value)).detach()


# ------------------------------------------------------------------- from notes


def _from_notes(linearization: Linearization, notes: Sequence[LinearNote], columns: Columns) -> dict[int, Tensor]:
    squares = {i: _zeros(linearization.values[i]) for note in notes for i in note.parameters}
    rows = [torch.zeros(()) for _ in notes]
    if not notes:
        return squares
    for column in columns():
        gradients = output_gradients(notes, linearization.prediction, column)
        for k, g in enumerate(map(at_least_float32, gradients)):
            if g.ndim == 2:
                # One position a datum: Σ_r (g_r a)² = (Σ_r g_r²) a², so that one product serves all columns.
                rows[k] = g.square() if rows[k].ndim == 0 else rows[k].addcmul_(g, g)
            else:
                _add_squares_over_positions(notes[k], g, squares)
    for note, g_squared in zip(notes, rows, strict=True):
        if g_squared.ndim and note.weight is not None:
            squares[note.weight] += g_squared.T @ at_least_float32(note.input).square()
        if g_squared.ndim and note.bias is not None:
            squares[note.bias] += g_squared.sum(0)
    return squares


def _add_squares_over_positions(note: LinearNote, g: Tensor, squares: dict[int, Tensor]) -> None:
    """Add (Σ_t g_t a_tᵀ)² for each datum, a few data at a time."""
    a, g = at_least_float32(note.input).flatten(1, -2), g.flatten(1, -2)
    if note.bias is not None:
        squares[note.bias] += g.sum(1).square().sum(0)
    if note.weight is not None:
        for data in _slices(len(a), max(1, _CHUNK_NUMEL // squares[note.weight].numel())):
            squares[note.weight] += torch.bmm(g[data].mT, a[data]).square_().sum(0)


# ---------------------------------------------------------------- datum by datum


def _of_each_datum(
    model: FunctionalModel, X: Any, linearization: Linearization, chosen: Sequence[int], columns: Columns
) -> list[Tensor]:
    if has_rows(X, len(linearization.output)) and not model.is_closure:
        try:
            return _by_vmap(model, X, linearization, chosen, columns)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
    return _by_masks(linearization, chosen, columns)


def _by_vmap(
    model: FunctionalModel, X: Any, linearization: Linearization, chosen: Sequence[int], columns: Columns
) -> list[Tensor]:
    values = [v.detach() for v in linearization.values]
    wanted = [values[i] for i in chosen]
    numel = sum(v.numel() for v in wanted)
    columns_at_once = max(1, _CHUNK_NUMEL // numel)
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
        data_at_once = max(1, _CHUNK_NUMEL // (numel * len(some)))
        for data in _slices(len(total_column), data_at_once):
            part = map_tensors(lambda t, d=data: t[d], X)  # type: ignore[misc]
            U = torch.stack([column[data] for column in some], 1)
            for square, total, g in zip(squares, sums, vmap(gradients)(part, U), strict=True):
                total += g.sum((0, 1))
                square += at_least_float32(g).square().sum((0, 1))
        total_column = total_column + torch.stack(some).sum(0)
    _check_sums(linearization, chosen, total_column, sums)
    return squares


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


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
