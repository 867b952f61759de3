"""What the figures are to be, beside what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.figures import Figures
from tests.benchmarks.items import NETWORKS, Item
from tests.benchmarks.tables import Results, list_table

REPORT = "report"
"""In place of a limit: the figure is shown, and nothing is asked of it."""


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        title: What is measured, and its unit.
        figure: Looks it up.
        limits: The limit for MLP, GPT and ResNet-18; None where there is nothing to measure.
        digits: How the figure is written.
    """

    title: str
    figure: Callable[[Figures], float | None]
    limits: tuple[float | str | None, float | str | None, float | str | None]
    digits: str = ".2f"


def _ratio(
    action: str, matrix: str, columns: int = 1, num_data: int | None = None
) -> Callable[[Figures], float | None]:
    item = Item(action, matrix, num_data=num_data)

    def figure(figures: Figures) -> float | None:
        found = figures.ratio(item)
        return None if found is None else found / columns

    return figure


def _to_backpack(num_data: int | None) -> Callable[[Figures], float | None]:
    item = Item("diagonal", "ggn", num_data=num_data)

    def figure(figures: Figures) -> float | None:
        ours, theirs = figures.ratio(item), figures.ratio(item, "backpack")
        return None if ours is None or theirs is None else ours / theirs

    return figure


def _solves(matrix: str, title: str) -> list[Target]:
    found = []
    for num_data, limits in ((256, (4.0, None, None)), (None, (4.0, REPORT, REPORT))):
        item = Item("solve", matrix, num_data=num_data)
        words = f"damped {title} solve, {'256 data' if num_data else 'standard data'}"
        residual = tuple(1e-6 if isinstance(limit, float) else limit for limit in limits)
        found += [
            Target(f"{words}, gradients", _ratio("solve", matrix, num_data=num_data), limits),
            Target(f"{words}, relative residual", lambda f, i=item: f.residual(i), residual, ".1e"),
        ]
    return found


def _break_evens() -> list[Target]:
    titles = {"ggn": "GGN", "fisher_mc": "MC-Fisher", "ef": "empirical Fisher", "hessian": "Hessian"}
    return [
        Target(
            f"linearised {title}: cheaper from this product on", lambda f, m=matrix: f.break_even(m), (3, 3, 3), ".0f"
        )
        for matrix, title in titles.items()
    ]


TARGETS = [
    Target("linearised GGN product, gradients", _ratio("kept", "ggn"), (1.3, 1.3, 1.35)),
    Target("linearised exact GGN product by factors, gradients", _ratio("kept", "ggn_factors"), (1.0, None, None)),
    Target("linearised MC-Fisher product, gradients", _ratio("kept", "fisher_mc"), (0.85, 0.75, 0.75)),
    Target("linearised empirical Fisher product, gradients", _ratio("kept", "ef"), (0.85, 1.4, 0.75)),
    Target("linearised Hessian product, gradients", _ratio("kept", "hessian"), (2.2, 2.2, 2.4)),
    Target("16 columns of the GGN, gradients per column", _ratio("columns16", "ggn", 16), (1.2, 1.1, 1.35)),
    Target("streamed GGN product, gradients", _ratio("product", "ggn"), (2.0, 2.1, 1.9)),
    Target("exact GGN diagonal, of BackPACK's time", _to_backpack(None), (1.1, None, None)),
    Target("exact GGN diagonal, 64 data, of BackPACK's time", _to_backpack(64), (1.1, None, None)),
    Target("exact GGN diagonal, gradients", _ratio("diagonal", "ggn"), (REPORT, None, REPORT)),
    Target("MC-Fisher diagonal, gradients", _ratio("diagonal", "ggn_mc"), (1.4, 2.0, 2.5)),
    *_solves("fisher_mc", "MC-Fisher"),
    *_solves("ef", "empirical Fisher"),
    Target(
        "peak memory of a lean GGN product, of a gradient's",
        lambda f: f.per_gradient_memory(Item("lean", "ggn")),
        (2.5, 2.5, 2.5),
    ),
    Target(
        "peak memory of 64 columns less that of one, of 3 · 64 vectors", lambda f: f.columns_memory(), (1.0, 1.0, 1.0)
    ),
    *_break_evens(),
]


def target_table(results: Results) -> list[str]:
    """The table of all targets: each cell has the figure, the limit and the verdict."""
    figures = {name: Figures(results["networks"][name], results) for name in NETWORKS if name in results["networks"]}
    rows = []
    for target in TARGETS:
        row = [target.title]
        for name, limit in zip(NETWORKS, target.limits, strict=True):
            row.append(_verdict(target, limit, target.figure(figures[name]) if name in figures else None))
        rows.append(row)
    return list_table("Targets", ["what", "MLP", "GPT", "ResNet-18"], rows)


def _verdict(target: Target, limit: float | str | None, figure: float | None) -> str:
    if limit is None:
        return "–"
    asked = "" if isinstance(limit, str) else f"≤ {limit:{'g' if target.digits != '.1e' else '.0e'}}"
    if figure is None:
        return f"– ({asked})" if asked else "–"
    measured = "more than 6" if figure == float("inf") else f"{figure:{target.digits}}"
    if isinstance(limit, str):
        return measured
    return f"{measured} ({asked}, met)" if figure <= limit else f"**{measured}** ({asked}, missed)"
