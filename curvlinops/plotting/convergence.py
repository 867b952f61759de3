"""How a solve went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from curvlinops import LeastSquaresInfo, SolveInfo
from curvlinops.plotting.canvas import BLACK, GREY, Style, axes_or_new, light_grid, next_style, not_negative

Info = SolveInfo | LeastSquaresInfo
#: Columns that get a style and a name of their own; more of them share one.
_MOST_NAMED = 6


def plot_convergence(
    info: Info | Mapping[str, Info],
    *,
    rtol: float | None = None,
    attainable: bool = True,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the relative residuals of a solve over its iterations, a curve for each column.

    The curves are the residuals by the recurrence. At the end of each, an open marker is the residual that was
    recomputed from the solution, a cross where that did not converge. A dotted line in the same colour, with the same
    marker at its right end, is about the smallest residual that the precision allows. For least squares the curves are
    of the normal equations' residual :math:`\|A^\top (b - A x)\|`, for which that is not known.

    Args:
        info: The ``info`` of a solver; or several to compare, by their names.
        rtol: The tolerance that was asked for, drawn as a horizontal line.
        attainable: Whether to draw what the precision allows.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: If ``info`` is none, as before the first solve.
        ValueError: If there is nothing to draw, or solves of the two kinds are mixed.

    >>> import torch
    >>> from curvlinops import CGInverseLinearOperator, Diagonal
    >>> inverse = CGInverseLinearOperator(Diagonal(torch.arange(1.0, 9.0)))
    >>> _ = inverse @ torch.ones(8)
    >>> plot_convergence(inverse.info, rtol=1e-5).get_xlabel()
    'iteration'
    """
    infos = _checked(info)
    tolerance = None if rtol is None else not_negative("rtol", rtol)
    is_least_squares = isinstance(next(iter(infos.values())), LeastSquaresInfo)
    ax = axes_or_new(ax)
    for name, one in infos.items():
        _draw_columns(ax, one, name, attainable)
    if tolerance:
        ax.axhline(tolerance, color=BLACK, linewidth=0.9, label=f"tolerance {tolerance:.0e}")
    if attainable and any(isinstance(one, SolveInfo) and bool((one.attainable > 0).any()) for one in infos.values()):
        ax.plot([], [], ":", color=GREY, linewidth=1.2, label="attainable")
    ax.set_yscale("log")
    ax.set_xlabel("iteration")
    relative = r"$\|A^\top (b - Ax)\| \,/\, \|A^\top b\|$" if is_least_squares else r"$\|b - Ax\| \,/\, \|b\|$"
    ax.set_ylabel(f"relative residual {relative}")
    light_grid(ax)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    return ax


def _checked(info: Any) -> dict[str, Info]:
    infos = dict(info) if isinstance(info, Mapping) else {"": info}
    if not infos:
        raise ValueError("info: expected at least one, got none.")
    for name, one in infos.items():
        if not isinstance(one, (SolveInfo, LeastSquaresInfo)):
            what = f"info[{name!r}]" if isinstance(info, Mapping) else "info"
            raise TypeError(
                f"{what}: expected the info of a solver, got {type(one).__name__}. A solver has one after a product."
            )
    if len({type(one) for one in infos.values()}) > 1:
        raise ValueError("info: the residuals of linear systems and of least squares are different things: draw two.")
    return infos


def _draw_columns(ax: Axes, info: Info, name: str, attainable: bool) -> None:
    """One curve a column, each up to its last iteration."""
    history = info.history.detach().to("cpu").double()
    K = history.shape[1]
    shared = next_style(ax) if K > _MOST_NAMED else None
    for k in range(K):
        style = shared or next_style(ax)
        end = int(info.num_iterations[k])
        # The shared run of a damping path keeps no history for each damping: then there is only an end.
        curve = history[: end + 1, k].tolist() if len(history) > end else []
        line = {"color": style.colour, "linestyle": style.line, "linewidth": 1.4 if shared is None else 0.7}
        ax.plot(range(len(curve)), curve, label=_label(name, k, K), **line)
        _draw_end(ax, info, k, end, style, curve)
        if attainable and isinstance(info, SolveInfo) and float(info.attainable[k]) > 0:
            _draw_attainable(ax, float(info.attainable[k]), style)


def _label(name: str, k: int, K: int) -> str | None:
    if K == 1:
        return name or None
    if K > _MOST_NAMED:
        return ", ".join(filter(None, [name, f"{K} columns"])) if k == 0 else None
    return ", ".join(filter(None, [name, f"column {k}"]))


def _draw_end(ax: Axes, info: Info, k: int, end: int, style: Style, curve: list[float]) -> None:
    if isinstance(info, LeastSquaresInfo) and not curve:
        return
    height = float(info.residual_norm[k]) if isinstance(info, SolveInfo) else curve[-1]
    marker = style.marker if bool(info.converged[k]) else "x"
    ax.plot([end], [height], marker, color=style.colour, markerfacecolor="white", markersize=6, zorder=3)


def _draw_attainable(ax: Axes, height: float, style: Style) -> None:
    place: dict[str, Any] = {"marker": style.marker, "markevery": [1], "markersize": 4, "markerfacecolor": "white"}
    line = ax.axhline(height, color=style.colour, linewidth=1.2, linestyle=":", **place)
    line.set_clip_on(False)  # half of the marker lies beyond the end of the axes
