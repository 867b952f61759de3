"""Turn the results of a run into tables in reStructuredText: ``python -m tests.benchmarks.report results.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.benchmarks.details import curve_tables, diagonal_table, linearised_table, pay_off_table, solve_table
from tests.benchmarks.figures import Figures
from tests.benchmarks.items import ACTIONS, Item
from tests.benchmarks.tables import LABELS, Notes, Results, cell, list_table, thread_words
from tests.benchmarks.targets import target_table

MAIN_ACTIONS = [
    "product",
    "lean",
    "kept",
    "columns16",
    "columns16_kept",
    "columns64",
    "construct",
    "construct_unchecked",
    "first",
]
"""Actions of the main table; the others have tables of their own."""


def write_reports(results: Results, path: Path) -> None:
    """Write files that a page includes, beside the JSON file: all tables, the targets, and the ways to linearise."""
    lines = [*_circumstances(results), ""]
    for network in results["networks"].values():
        lines += _network(network, results)
    targets, ways = target_table(results), linearised_table(results)
    for name, content in (("results", lines), ("targets", targets), ("linearised", ways)):
        file = path.with_name(path.stem.replace("results", name) + ".inc")
        file.write_text("\n".join(content).rstrip() + "\n")


def _circumstances(results: Results) -> list[str]:
    machine = results["machine"]
    environments = results["environments"]
    torch_version = next((side["torch"] for side in environments.values() if "torch" in side), "unknown")
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    gpu = next((side["gpu"] for side in environments.values() if "gpu" in side), None)
    absent = "".join(f" Without {label}: {side['error']}." for label, side in environments.items() if "error" in side)
    numbers = results.get("dtype", "float32") + (" with TF32" if results.get("tf32") else "")
    lines = [
        f"Measured on {results['date']} on {where}" + (f", {gpu}" if gpu else "") + f"; torch {torch_version}; "
        f"{numbers}; medians of at most {results['repeats']} calls.{absent}"
    ]
    if results.get("commands"):
        lines += ["", "The command lines, the last figures of each item being shown::", ""]
        lines += [f"    {run['command']}  # {run['date']}" for run in results["commands"]]
    return lines


def _network(network: Results, results: Results) -> list[str]:
    lines = [network["title"], "^" * len(network["title"]), ""]
    if not network["times"]:
        return [*lines, "Not measured.", ""]
    labels = [label for label, side in results["environments"].items() if "error" not in side]
    notes, figures = Notes(), Figures(network, results)
    lines += [_unit(network, results), ""]
    for threads, times in network["times"].items():
        first = threads == str(results["threads"][0])
        lines += _time_table(times, labels, threads, results["clock"], figures if first else None, notes)
        if first:
            lines += diagonal_table(figures, notes) + solve_table(figures, notes)
            lines += pay_off_table(figures) + curve_tables(figures, notes)
    return [*lines, *notes.lines()]


def _unit(network: Results, results: Results) -> str:
    """Say what one gradient costs, and under which attention kernel."""
    words = f"{network['num_params']:,} parameters, {network['num_data']:,} data in one batch. One gradient takes "
    gradients = {threads: times["gradient"] for threads, times in network["times"].items()}
    clock, name = results["clock"], {"cpu": "CPU time", "wall": "wall time"}[results["clock"]]
    digits = 0 if clock == "cpu" else 2
    words += " and ".join(
        f"{1000 * g['default'][clock]:.{digits}f} ms ({thread_words(t)})" for t, g in gradients.items()
    )
    words += f" of {name}"
    if "peak_mib" in network.get("memory", {}).get("gradient", {}):
        words += f", and {network['memory']['gradient']['peak_mib']:,.0f} MiB at its peak"
    if network["attention"]:
        first = next(iter(gradients.values()))
        ratio = first["math"][clock] / first["default"][clock]
        words += (
            f". Its attention kernel is ``{network['attention']}``; the MATH kernel takes {ratio:.2f} times as long"
        )
    return words + "."


def _time_table(
    times: Results, labels: list[str], threads: str, clock: str, figures: Figures | None, notes: Notes
) -> list[str]:
    """Build the table for one number of threads; the first has memory, the others wall time beside it.

    On a GPU, where time is wall time, there are absolute times as well.
    """
    more_wall = figures is None and clock == "cpu"
    absolute = clock != "cpu"
    header = ["what", "matrix", *(f"{LABELS[label]}, gradients" for label in labels)]
    header += [f"{LABELS[label]}, ms" for label in labels if absolute]
    header += [f"{LABELS[label]}, MiB" for label in labels if figures]
    header += [f"{LABELS[label]}, wall" for label in labels if more_wall]
    entries = {Item.of(entry): entry for entry in times["items"]}
    if figures is not None:
        entries |= {item: {} for item in figures.peak_items() if item not in entries}
    rows = []
    for item, entry in sorted(entries.items(), key=lambda pair: _position(pair[0])):
        if item.action not in MAIN_ACTIONS:
            continue
        row = [ACTIONS[item.action], item.title]
        row += [cell(entry.get(label, {}), "ratio", notes) for label in labels]
        row += [cell(entry.get(label, {}), f"{clock}_seconds", notes) for label in labels if absolute]
        row += [cell(figures.peak(item, label), "peak_mib", notes) for label in labels if figures]
        row += [cell(entry.get(label, {}), "wall_ratio", notes) for label in labels if more_wall]
        rows.append(row)
    return list_table(thread_words(threads), header, rows)


def _position(item: Item) -> int:
    return MAIN_ACTIONS.index(item.action) if item.action in MAIN_ACTIONS else len(MAIN_ACTIONS)


if __name__ == "__main__":  # write the tables anew from a JSON file
    source = Path(sys.argv[1])
    write_reports(json.loads(source.read_text()), source)
