"""Which block carries the curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from curvlinops import Estimate
from curvlinops.plotting.canvas import BLACK, COLOURS, axes_or_new, light_grid, not_negative, numbers

#: A logarithmic axis begins at this share of the smallest trace, and no lower than this share of the largest.
_BELOW_SMALLEST, _LOWEST = 0.3, 1e-8


def plot_block_traces(
    traces: Mapping[str, Tensor] | Mapping[str, Estimate] | Sequence[Tensor] | Sequence[Estimate],
    *,
    num_errors: float = 2.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the traces of diagonal blocks as bars of logarithmic length, with their shares of the whole.

    The share of a trace is that of the sum of all absolute values, which is the whole trace where none is negative. A
    negative trace, which the Hessian may have, shows as its absolute value in another colour, hatched.

    Args:
        traces: What :func:`~curvlinops.block_traces` returns: traces by name, or as a list, with or without errors.
        num_errors: Half the length of an error bar, in standard errors.
        ax: Axes to draw into; by default those of a new figure, as high as there are bars.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are no traces, if one is not finite, or if all are zero.

    >>> import torch
    >>> ax = plot_block_traces({"weight": torch.tensor(6.0), "bias": torch.tensor(2.0)})
    >>> [text.get_text() for text in ax.texts]
    ['75 %', '25 %']
    """
    if isinstance(traces, (str, Tensor, Estimate)) or not isinstance(traces, (Mapping, Sequence)):
        raise TypeError(f"traces: expected a dict or a list of traces, got {type(traces).__name__}.")
    if not traces:
        raise ValueError("traces: expected at least one, got none.")
    num_errors = not_negative("num_errors", num_errors)
    named: dict[str, Any] = (
        dict(traces) if isinstance(traces, Mapping) else {f"block {i}": trace for i, trace in enumerate(traces)}
    )
    values, errors = _read(named)
    whole = values.abs().sum()
    if whole == 0:
        raise ValueError("traces: all are zero, which a logarithmic axis cannot show.")
    ax = axes_or_new(ax, height=1.2 + 0.28 * len(named))
    begin = _begin(values)
    _draw_bars(ax, values, num_errors * errors, begin)
    for place, value in enumerate(values):
        end = max(float(value.abs() + num_errors * errors[place]), begin)
        text = _percent(float(100 * value / whole))
        ax.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize="small")
    _finish(ax, list(named), begin, float((values.abs() + num_errors * errors).max()))
    return ax


def _read(named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Values and errors ``[n]``, the errors zero where none are known."""
    values, errors = [], []
    for name, trace in named.items():
        value, error = trace if isinstance(trace, Estimate) else (trace, 0.0)
        values.append(numbers(f"traces[{name!r}]", value, 0))
        errors.append(numbers(f"error of traces[{name!r}]", error, 0))
    return torch.stack(values), torch.stack(errors)


def _begin(values: Tensor) -> float:
    """Where the axis begins."""
    sizes = values.abs()
    return float(max(_BELOW_SMALLEST * sizes[sizes > 0].min(), _LOWEST * sizes.max()))


def _draw_bars(ax: Axes, values: Tensor, errors: Tensor, begin: float) -> None:
    """Bars from the beginning of the axis, as long as the absolute values."""
    for is_negative in (False, True):
        rows = torch.nonzero((values < 0) == is_negative).flatten().tolist()
        if not rows:
            continue
        sizes = values.abs()[rows]
        look: dict[str, Any] = {"color": COLOURS[0], "edgecolor": "white"}
        if is_negative:
            look = {"color": COLOURS[1], "edgecolor": "white", "hatch": "////", "label": "negative"}
        ax.barh(rows, (sizes - begin).clamp(min=0).tolist(), left=begin, height=0.7, **look)
        with_error = [row for row in rows if errors[row] > 0]
        if with_error:
            size, error = values.abs()[with_error], errors[with_error]
            both = torch.stack([torch.minimum(error, (size - begin).clamp(min=0)), error])
            ax.errorbar(size.tolist(), with_error, xerr=both.tolist(), fmt="none", ecolor=BLACK, capsize=2)
    if bool((values < 0).any()):
        ax.legend()


def _percent(share: float) -> str:
    """Two digits, and no more than there are."""
    return f"{share:.0f} %" if abs(share) >= 9.95 else (f"{share:.1f} %" if abs(share) >= 0.05 else f"{share:.0e} %")


def _finish(ax: Axes, names: list[str], begin: float, end: float) -> None:
    ax.set_xscale("log")
    # Room for the shares to the right of the bars.
    ax.set_xlim(begin, end * (end / begin) ** 0.18)
    ax.set_yticks(range(len(names)), names)
    # From the top in the order of the network, also where bars were drawn here before.
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("trace of the block, and its share of the whole")
    light_grid(ax)
    ax.grid(False, axis="y")
