"""How estimates approach the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from curvlinops import Estimate, EstimateWithError
from curvlinops.plotting.canvas import BLACK, axes_or_new, light_grid, next_style, not_negative, numbers

#: Factor between the places of estimates that were asked for at the same cost.
_APART = 1.05

Estimated = Estimate | EstimateWithError | Tensor | float


def plot_estimates(
    num_matvecs: Sequence[int] | Tensor,
    estimates: Mapping[str, Sequence[Estimated]],
    truth: float | Tensor | None = None,
    *,
    num_errors: float = 2.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimates of one number over what they cost, with error bars, against the truth where it is known.

    The bars reach ``num_errors`` errors up and down: standard errors of an :class:`~curvlinops.Estimate`, or the error
    estimates of an :class:`~curvlinops.EstimateWithError`, which are optimistic. Bare numbers get none. Where there
    are several estimators, their markers stand a little apart, so that no bar hides another.

    Args:
        num_matvecs: Products that the estimates took ``[n]``.
        estimates: For each estimator, by its name, its estimates at these costs ``[n]``.
        truth: The exact number.
        num_errors: Half the length of a bar, in errors.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If lengths do not agree, or numbers are not finite.

    >>> import torch
    >>> from curvlinops import hutchinson_trace
    >>> A, counts = torch.ones(5, 5), [4, 16, 64]
    >>> found = [hutchinson_trace(A, num_matvecs=n, return_stderr=True) for n in counts]
    >>> ax = plot_estimates(counts, {"Hutchinson": found}, truth=5.0)
    >>> ax.get_xlabel()
    'number of products'
    """
    places = numbers("num_matvecs", num_matvecs, 1)
    if not bool((places > 0).all()):
        raise ValueError("num_matvecs: expected positive numbers, since their axis is logarithmic.")
    if not isinstance(estimates, Mapping) or not estimates:
        raise TypeError("estimates: expected a dict from names of estimators to lists of their estimates.")
    num_errors = not_negative("num_errors", num_errors)
    exact = None if truth is None else float(numbers("truth", truth, 0))
    read = {name: _read(name, found, len(places)) for name, found in estimates.items()}
    ax = axes_or_new(ax)
    if exact is not None:
        ax.axhline(exact, color=BLACK, linewidth=1.0, linestyle=(0, (5, 2)), label="exact", zorder=1)
    has_bars = False
    for index, (name, (values, errors)) in enumerate(read.items()):
        style = next_style(ax)
        x = places * _APART ** (index - (len(read) - 1) / 2)
        bars = None if errors is None else (num_errors * errors).tolist()
        has_bars = has_bars or bars is not None
        look: dict[str, Any] = {
            "fmt": style.marker,
            "color": style.colour,
            "markersize": 5,
            "capsize": 3,
            "elinewidth": 1.2,
        }
        ax.errorbar(x.tolist(), values.tolist(), yerr=bars, label=name, **look)
    ax.set_xscale("log")
    ax.set_xticks(places.tolist(), [f"{place:g}" for place in places.tolist()])
    ax.minorticks_off()
    ax.set_xlabel("number of products")
    ax.set_ylabel(f"estimate ± {num_errors:g} errors" if has_bars else "estimate")
    light_grid(ax)
    ax.legend()
    return ax


def _read(name: str, found: Any, n: int) -> tuple[Tensor, Tensor | None]:
    """Values and errors ``[n]``; no errors where none of the estimates has one."""
    if not isinstance(found, (list, tuple, Tensor)) or isinstance(found, (Estimate, EstimateWithError)):
        raise TypeError(f"estimates[{name!r}]: expected a list with one estimate for each cost.")
    if len(found) != n:
        raise ValueError(f"estimates[{name!r}]: expected {n} estimates, one for each cost, got {len(found)}.")
    pairs = [_value_and_error(f"estimates[{name!r}][{i}]", one) for i, one in enumerate(found)]
    values = torch.stack([value for value, _ in pairs])
    if all(error is None for _, error in pairs):
        return values, None
    return values, torch.stack([torch.zeros_like(value) if error is None else error for value, error in pairs])


def _value_and_error(name: str, estimate: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(estimate, (Estimate, EstimateWithError)):
        return numbers(name, estimate[0], 0), numbers(f"error of {name}", estimate[1], 0)
    return numbers(name, estimate, 0), None
