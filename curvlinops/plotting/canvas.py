"""What the figures share: where to draw, in which colours, and numbers that can be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from torch import Tensor

#: Colours of Okabe and Ito (2008), Color universal design; their yellow is left out, too faint for lines on white.
BLACK, GREY = "#000000", "#666666"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Style:
    """How one of several curves is drawn."""

    colour: str
    line: Any
    marker: str


def style(index: int) -> Style:
    """The style of the curve with this number; they repeat after six."""
    index %= len(COLOURS)
    return Style(COLOURS[index], _LINES[index], _MARKERS[index])


def next_style(ax: Axes) -> Style:
    """The first style whose colour no line in the axes has, or, where all are taken, that of the next number."""
    taken = [to_hex(line.get_color()) for line in ax.lines]
    free = [index for index, colour in enumerate(COLOURS) if colour not in taken]
    return style(free[0] if free else len(taken))


def axes_or_new(ax: Axes | None, width: float = 6.5, height: float = 4.2) -> Axes:
    """The axes that were given, or those of a new figure, whose size is in inches.

    Raises:
        TypeError: If something else was given.
    """
    if ax is None:
        # Imported here alone: who passes axes may well draw without pyplot.
        from matplotlib import pyplot as plt

        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib Axes, such as plt.subplots()[1], got {type(ax).__name__}.")
    return ax


def numbers(name: str, values: Any, ndim: int) -> Tensor:
    """A tensor, or nested numbers, in float64 on the CPU, with so many axes.

    Raises:
        TypeError: If they are no numbers.
        ValueError: If there are none, if the number of axes is another, or if one is not finite.
    """
    try:
        found = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}.") from error
    if found.ndim != ndim:
        raise ValueError(f"{name}: expected a tensor with {ndim} axes, got one of shape {list(found.shape)}.")
    if found.numel() == 0:
        raise ValueError(f"{name}: expected at least one number, got none.")
    wrong = int((~found.isfinite()).sum())
    if wrong:
        raise ValueError(f"{name}: expected finite numbers, got {wrong} that are not.")
    return found


def not_negative(name: str, values: Any) -> float:
    """A number, at least zero, as a float.

    Raises:
        ValueError: If it is negative or not finite.
    """
    value = float(values)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}.")
    return value


def light_grid(ax: Axes) -> None:
    """Lines in the background that print does not lose and eyes do not follow."""
    ax.grid(True, which="major", color="0.85", linewidth=0.6)
    ax.set_axisbelow(True)
