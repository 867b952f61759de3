"""Spectral densities."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from curvlinops.plotting.canvas import Style, axes_or_new, light_grid, next_style, not_negative, numbers

#: Peaks lower than this share of the highest are rounding; below a tenth of the lowest real one nothing is shown.
_ROUNDING, _BELOW_PEAKS = 1e-12, 0.1
#: Height of the stems of eigenvalues, as a share of the axes.
_STEM = 0.08


def plot_spectral_density(
    grid: Tensor,
    density: Tensor,
    stderr: Tensor | None = None,
    *,
    eigenvalues: Tensor | None = None,
    log_x: bool | None = None,
    log_y: bool = True,
    num_errors: float = 2.0,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw a spectral density with its error band, and stems where eigenvalues are known.

    On a linear axis the curve is the density itself. On a logarithmic one it is ``density * grid``, the density per
    unit of :math:`\ln |\lambda|`, so that equal areas are equal numbers of eigenvalues. Densities of negative and of
    other eigenvalues, as of ``split_signs=True``, become two curves over absolute values.

    Args:
        grid: What :func:`~curvlinops.lanczos_approximate_spectrum` or its logarithmic version returns ``[P]``.
        density: Density at these points ``[P]``, or that of negative and of other eigenvalues ``[2, P]``.
        stderr: Its standard error, in the same shape.
        eigenvalues: Eigenvalues to be marked by stems ``[k]``; where signs are lost, those of negative ones are shorter
            and have another head.
        log_x: Whether the axis of eigenvalues is logarithmic; by default if the grid is geometric.
        log_y: Whether the axis of the density is. It then ends below the lowest peak.
        num_errors: Half the width of the band, in standard errors.
        label: Name of the curve in the legend.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If shapes do not fit, numbers are not finite, or a logarithmic axis has no place for them.

    >>> from curvlinops import Diagonal, lanczos_approximate_spectrum
    >>> result = lanczos_approximate_spectrum(Diagonal(torch.arange(9.0)), 9, num_repeats=4, return_stderr=True)
    >>> ax = plot_spectral_density(*result, eigenvalues=torch.arange(9.0))
    >>> ax.get_xlabel()
    'eigenvalue $\\lambda$'
    """
    grid = numbers("grid", grid, 1)
    is_split = getattr(density, "ndim", 1) == 2
    curves = _rows("density", density, grid, is_split)
    errors = None if stderr is None else _rows("stderr", stderr, grid, is_split)
    num_errors = not_negative("num_errors", num_errors)
    log_x = _is_geometric(grid) if log_x is None else log_x
    stems = None if eigenvalues is None else _stems(eigenvalues, log_x or is_split, log_x)
    if log_x and not bool((grid > 0).all()):
        raise ValueError("log_x: a logarithmic axis needs a positive grid, as lanczos_approximate_log_spectrum has it.")
    factor = grid if log_x else torch.ones_like(grid)
    curves, errors = curves * factor, None if errors is None else errors * factor
    bottom = _bottom(curves) if log_y else 0.0
    ax = axes_or_new(ax)
    is_first, highest = not ax.lines, float((curves if errors is None else curves + num_errors * errors).max())
    names = _names(label, is_split)
    styles = []
    for row, (curve, name) in enumerate(zip(curves, names, strict=True)):
        styles.append(next_style(ax))
        band = None if errors is None else num_errors * errors[row]
        _draw(ax, grid, curve, band, bottom, styles[-1], name)
    for is_negative, places in stems or []:
        _draw_stems(ax, places, styles[0] if is_negative or not is_split else styles[-1], is_negative)
    _finish(ax, log_x, log_y, is_split, (bottom, 2 * highest), is_first)
    return ax


def _rows(name: str, values: Any, grid: Tensor, is_split: bool) -> Tensor:
    """Curves as rows ``[1, P]`` or ``[2, P]``."""
    found = numbers(name, values, 2 if is_split else 1)
    expected = [2, len(grid)] if is_split else [len(grid)]
    if list(found.shape) != expected:
        raise ValueError(f"{name}: expected the shape {expected} that goes with the grid, got {list(found.shape)}.")
    if bool((found < 0).any()):
        raise ValueError(f"{name}: expected numbers that are not negative, got {float(found.min()):.2g}.")
    return found if is_split else found.unsqueeze(0)


def _is_geometric(grid: Tensor) -> bool:
    """Whether ratios of neighbours are more alike than their differences."""
    if len(grid) < 3 or not bool((grid > 0).all()):
        return False
    steps, ratios = grid.diff(), grid.log().diff()
    return bool(ratios.std() / ratios.mean().abs() < steps.std() / steps.mean().abs())


def _stems(eigenvalues: Any, is_absolute: bool, log_x: bool) -> list[tuple[bool, Tensor]]:
    """Whether they are of negative eigenvalues, and places on the axis; the two signs apart where that shows them."""
    values = numbers("eigenvalues", eigenvalues, 1)
    if log_x and bool((values == 0).any()):
        raise ValueError("eigenvalues: a logarithmic axis has no place for zero: leave it out, or pass log_x=False.")
    if not is_absolute:
        return [(False, values)]
    groups = [(True, -values[values < 0]), (False, values[values >= 0])]
    return [(is_negative, places) for is_negative, places in groups if len(places) > 0]


def _names(label: str | None, is_split: bool) -> list[str | None]:
    if not is_split:
        return [label]
    before = "" if label is None else f"{label}, "
    return [f"{before}$\\lambda < 0$", f"{before}$\\lambda \\geq 0$"]


def _bottom(curves: Tensor) -> float:
    """Where a logarithmic axis begins: below the lowest peak that is none of rounding."""
    highest = curves.max()
    if highest == 0:
        raise ValueError("density: it is zero everywhere, which a logarithmic axis cannot show: pass log_y=False.")
    padded = torch.nn.functional.pad(curves, (1, 1))
    is_peak = (curves >= padded[:, :-2]) & (curves > padded[:, 2:]) & (curves > _ROUNDING * highest)
    return _BELOW_PEAKS * float(curves[is_peak].min())


def _draw(ax: Axes, x: Tensor, y: Tensor, band: Tensor | None, bottom: float, style: Style, label: str | None) -> None:
    ax.plot(x.tolist(), y.tolist(), linestyle=style.line, color=style.colour, linewidth=1.4, label=label)
    if band is not None:
        # A logarithmic axis has no place for what is not positive: there the band goes on below the end of the axis.
        lower, upper = (y - band).clamp(min=bottom / 100), (y + band).clamp(min=bottom / 100)
        ax.fill_between(x.tolist(), lower.tolist(), upper.tolist(), color=style.colour, alpha=0.25, linewidth=0)


def _draw_stems(ax: Axes, places: Tensor, style: Style, is_negative: bool) -> None:
    """Short lines from the bottom of the axes, with heads that tell the sign."""
    heights = ax.get_xaxis_transform()
    x, height = places.tolist(), _STEM / 2 if is_negative else _STEM
    ax.vlines(x, 0, height, transform=heights, colors=style.colour, linewidth=0.8)
    head: dict[str, Any] = {"marker": "v" if is_negative else "o", "markersize": 4, "markerfacecolor": "white"}
    ax.plot(x, [height] * len(x), transform=heights, linestyle="none", color=style.colour, **head)


def _finish(ax: Axes, log_x: bool, log_y: bool, is_split: bool, ends: tuple[float, float], is_first: bool) -> None:
    if log_x:
        ax.set_xscale("log")
    if log_y:
        bottom, top = ends
        old = (bottom, top) if is_first else ax.get_ylim()
        ax.set_yscale("log")
        ax.set_ylim(min(bottom, old[0]), max(top, old[1]))
    value = r"|\lambda|" if log_x or is_split else r"\lambda"
    ax.set_xlabel(rf"absolute eigenvalue ${value}$" if log_x or is_split else rf"eigenvalue ${value}$")
    ax.set_ylabel(rf"spectral density per unit of $\ln {value}$" if log_x else rf"spectral density $p({value})$")
    light_grid(ax)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
