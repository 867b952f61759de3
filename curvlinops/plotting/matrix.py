"""The entries of a matrix."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from torch import Tensor

from curvlinops import LinearOperator, Space
from curvlinops.plotting.canvas import axes_or_new, numbers

#: Entries of an operator that are computed at most, one product a column.
_MOST_ENTRIES = 2**24
#: Blocks narrower than this share of an axis have no name on it.
_NAMED_SHARE = 0.03


def plot_matrix(
    A: LinearOperator | Tensor,
    space: Space | None = None,
    *,
    decades: float = 4.0,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the entries of a matrix in colours, blue below and red above zero, by the logarithm of their size.

    The colours span as many decades below the largest entry as asked for; what is smaller is nearly white. Lines
    separate the blocks that belong to the tensors of a space.

    **Cost**: for an operator, as many products as it has columns.

    Args:
        A: A matrix ``[M, N]``, or an operator, of at most 2²⁴ entries.
        space: The space of the rows, of the columns, or of both, whichever has its size; an operator knows its own.
        decades: Powers of ten between the largest entry and the beginning of the linear part of the colours.
        colorbar: Whether to draw a colour bar beside the axes, which takes part of their place.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the matrix is too large or has entries that are not finite, or the space has another size.

    >>> from curvlinops import Diagonal
    >>> D = Diagonal({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    >>> [label.get_text() for label in plot_matrix(D).get_yticklabels()]
    ['weight', 'bias']
    """
    if not 0 < decades < float("inf"):
        raise ValueError(f"decades: expected a positive number, got {decades}.")
    if space is not None and not isinstance(space, Space):
        raise TypeError(f"space: expected a Space, such as A.domain, got {type(space).__name__}.")
    entries, rows, columns = _read(A, space)
    largest = float(entries.abs().max()) or 1.0
    ax = axes_or_new(ax, 5.6, 4.6)
    norm = SymLogNorm(largest * 10**-decades, linscale=0.3, vmin=-largest, vmax=largest)
    # As an array, since tensors do not know the arguments with which matplotlib would make them one.
    image = ax.imshow(entries.__array__(), norm=norm, cmap="RdBu_r", interpolation="nearest", aspect="auto")
    if entries.shape[0] == entries.shape[1]:
        ax.set_aspect("equal")
    _separate(ax, rows, is_vertical=True)
    _separate(ax, columns, is_vertical=False)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, label="entry")
        first = floor(log10(largest))
        ticks = [10.0**exponent for exponent in range(first, first - ceil(decades) - 1, -1)]
        # Next to zero there is no place for more labels; and with many decades, every other one will do.
        ticks = [tick for tick in ticks if tick > 3 * norm.linthresh][:: ceil(decades / 5)]
        bar.set_ticks([*(-tick for tick in ticks), 0.0, *reversed(ticks)])
        bar.minorticks_off()
    return ax


def _read(A: Any, space: Space | None) -> tuple[Tensor, Space | None, Space | None]:
    """Entries in float64, and the spaces of rows and columns where they are known."""
    if isinstance(A, LinearOperator):
        if A.shape[0] * A.shape[1] > _MOST_ENTRIES:
            raise ValueError(
                f"A: expected at most {_MOST_ENTRIES} entries, got {A.shape[0]} x {A.shape[1]}: draw a block of it."
            )
        if space is not None:
            raise ValueError("space: an operator knows its own; leave it out.")
        return numbers("A", A.to_dense(), 2), A.codomain, A.domain
    entries = numbers("A", A, 2)
    fits = [space if space is not None and space.numel == length else None for length in entries.shape]
    if space is not None and fits == [None, None]:
        raise ValueError(f"space: its {space.numel} numbers fit neither axis of the shape {list(entries.shape)}.")
    return entries, fits[0], fits[1]


def _separate(ax: Axes, space: Space | None, is_vertical: bool) -> None:
    """Lines between the tensors of a space, and their names in the middle."""
    axis = ax.yaxis if is_vertical else ax.xaxis
    what = "row" if is_vertical else "column"
    if space is None or len(space.shapes) == 1:
        axis.set_label_text(what)
        return
    sizes = torch.tensor(space.sizes, dtype=torch.float64)
    ends = sizes.cumsum(0) - 0.5
    for end in ends[:-1].tolist():
        (ax.axhline if is_vertical else ax.axvline)(end, color="black", linewidth=0.6)
    named = [i for i, size in enumerate(sizes.tolist()) if size >= _NAMED_SHARE * space.numel]
    names = space.names or tuple(f"tensor {i}" for i in range(len(sizes)))
    axis.set_ticks((ends - sizes / 2)[named].tolist(), [names[i] for i in named])
    axis.set_tick_params(length=0)
    axis.set_label_text(f"{what}, by tensor")
    if not is_vertical:
        for label in ax.get_xticklabels():
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
