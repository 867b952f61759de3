"""The tables beside the main one: diagonals, solves, when linearising pays off, curves, ways to linearise."""

from __future__ import annotations

from tests.benchmarks.figures import Figures, first_cheaper, worst_residual
from tests.benchmarks.items import NETWORKS, PUSHES, Item
from tests.benchmarks.tables import LABELS, Notes, Results, cell, list_table


def diagonal_table(figures: Figures, notes: Notes) -> list[str]:
    """Diagonals, beside BackPACK's where it has them."""
    rows = []
    for entry in figures.entries("diagonal"):
        item = Item.of(entry)
        row = [item.title, _num_data(item, figures)]
        row += [cell(entry.get(label, {}), "ratio", notes) for label in ("ours", "backpack")]
        row += [cell(figures.peak(item, label), "peak_mib", notes) for label in ("ours", "backpack")]
        rows.append(row)
    header = ["matrix", "data", "ours, gradients", "BackPACK, gradients", "ours, MiB", "BackPACK, MiB"]
    return list_table("Diagonals", header, rows)


def solve_table(figures: Figures, notes: Notes) -> list[str]:
    """Damped solves, with the largest relative residual."""
    rows = []
    for entry in figures.entries("solve"):
        item = Item.of(entry)
        row = [item.title, _num_data(item, figures)]
        for label in ("ours", "peer"):
            side = entry.get(label, {})
            residual = worst_residual(side)
            row += [cell(side, "ratio", notes), "–" if residual is None else f"{residual:.1e}"]
        rows.append([*row, cell(figures.peak(item), "peak_mib", notes)])
    header = ["matrix", "data", "ours, gradients", "residual", "peer, gradients", "residual", "ours, MiB"]
    return list_table("Damped solves", header, rows)


def pay_off_table(figures: Figures) -> list[str]:
    """Cumulative cost of the first products, and from which product on linearising is cheaper."""
    rows = []
    for entry in figures.entries("break_even"):
        found = first_cheaper(entry)
        if found is None:
            continue
        verdict = "more than 6" if found == float("inf") else f"{found:.0f}"
        for label in ("streamed", "kept"):
            values = [f"{value:.2f}" for value in entry[label]["cumulative"]]
            rows.append([Item.of(entry).title, LABELS[label], *values, verdict if label == "kept" else ""])
    header = ["matrix", "", *(f"{n}" for n in range(1, 7)), "cheaper from"]
    return list_table("The first products of a new operator, gradients in all", header, rows)


def curve_tables(figures: Figures, notes: Notes) -> list[str]:
    """Time over the number of data and over the number of columns, for the GGN."""
    rows = []
    for entry in figures.entries("scaling_data"):
        row = [f"{entry['num_data']:,}", f"{1e6 * entry['gradient'].get(figures.clock, 0) / entry['num_data']:.0f}"]
        rows.append(row + [cell(entry.get(label, {}), "ratio", notes) for label in ("streamed", "kept", "peer")])
    header = ["data", "gradient, µs per datum", "streamed, gradients", "linearised, gradients", "peer, gradients"]
    lines = list_table("GGN product over the number of data, in batches of 1,024", header, rows)

    rows = []
    for entry in figures.entries("scaling_columns"):
        row = [str(entry["num_columns"])]
        for label in ("streamed", "kept"):
            side = entry.get(label, {})
            per_column = {**side, "ratio": side["ratio"] / entry["num_columns"]} if "ratio" in side else side
            row.append(cell(per_column, "ratio", notes))
        rows.append(row)
    header = ["columns", "streamed, gradients per column", "linearised, gradients per column"]
    return lines + list_table("GGN product over the number of columns", header, rows)


def linearised_table(results: Results) -> list[str]:
    """Ways to compute J v again and again, for all networks."""
    figures = {name: Figures(results["networks"][name], results) for name in NETWORKS if name in results["networks"]}
    notes, rows = Notes(), []
    for way, title in PUSHES.items():
        row = [title]
        for name in NETWORKS:
            again, first = (
                figures[name].time(Item(action, way)) if name in figures else {} for action in ("push", "push_first")
            )
            row += [cell(again, "ratio", notes), cell(first, "ratio", notes)]
        facts = [f.time(Item("push", way)).get("facts", {}) for f in figures.values()]
        row.append(next((fact["looks_at_values"] for fact in facts if "looks_at_values" in fact), "–"))
        rows.append(row)
    networks = [f"{name}, {what}" for name in ("MLP", "GPT", "ResNet-18") for what in ("again", "first")]
    header = ["J v by", *networks, "models that look at values"]
    return list_table("One J v in gradients, again and for the first time", header, rows) + notes.lines()


def _num_data(item: Item, figures: Figures) -> str:
    return f"{item.num_data or figures.network['num_data']:,}"
