"""Turn the results of a run into tables in reStructuredText."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.items import ACTIONS, Item

Results = dict[str, Any]


class Notes:
    """Numbered notes below a table; the same words get the same number."""

    def __init__(self) -> None:
        """Start without notes."""
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the mark that refers to a note."""
        if text not in self.texts:
            self.texts.append(text)
        return f" ({self.texts.index(text) + 1})"

    def lines(self) -> list[str]:
        """Return the list of notes."""
        return [f"({number}) {text}\n" for number, text in enumerate(self.texts, start=1)]


def write_report(results: Results, path: Path) -> None:
    """Write the tables of all networks to a file that a page includes."""
    lines = [_circumstances(results), ""]
    for network in results["networks"].values():
        lines += _network(network, results)
    path.write_text("\n".join(lines).rstrip() + "\n")


def _circumstances(results: Results) -> str:
    machine = results["machine"]
    sides = results["environments"]
    torch_version = next((side["torch"] for side in sides.values() if "torch" in side), "unknown")
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    gpu = next((side["gpu"] for side in sides.values() if "gpu" in side), None)
    absent = "".join(f" Without {label}: {side['error']}." for label, side in sides.items() if "error" in side)
    return (
        f"Measured on {results['date']} on {where}" + (f", {gpu}" if gpu else "") + f"; torch {torch_version}; "
        f"medians of at most {results['repeats']} calls.{absent}"
    )


def _network(network: Results, results: Results) -> list[str]:
    lines = [network["title"], "^" * len(network["title"]), ""]
    if not network["times"]:
        return [*lines, "Not measured.", ""]
    labels = [label for label, side in results["environments"].items() if "error" not in side]
    notes = Notes()
    lines += [_unit(network, results), ""]
    for threads, times in network["times"].items():
        first = threads == str(results["threads"][0])
        lines += _time_table(times, labels, threads, results["clock"], network if first else None, notes)
    return [*lines, *notes.lines()]


def _unit(network: Results, results: Results) -> str:
    """Say what one gradient costs, and under which attention kernel."""
    words = f"{network['num_params']:,} parameters, {network['num_data']:,} data in one batch. One gradient takes "
    gradients = {threads: times["gradient"] for threads, times in network["times"].items()}
    clock, name = results["clock"], {"cpu": "CPU time", "wall": "wall time"}[results["clock"]]
    words += " and ".join(f"{1000 * g['default'][clock]:.0f} ms ({_threads(t)})" for t, g in gradients.items())
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
    times: Results, labels: list[str], threads: str, clock: str, network: Results | None, notes: Notes
) -> list[str]:
    """Build the table for one number of threads; the first has memory, the others wall time beside it."""
    memory = (network or {}).get("memory")
    peaks = {(e["action"], e["matrix"]): e for e in memory["items"]} if memory else {}
    header = ["what", "matrix", *(f"{label}, gradients" for label in labels)]
    header += [f"{label}, MiB" for label in labels if memory]
    if network is None and clock == "cpu":
        header += [f"{label}, wall" for label in labels]
    rows = []
    for entry in times["items"]:
        row = [ACTIONS[entry["action"]], Item(entry["action"], entry["matrix"]).title]
        row += [_cell(entry.get(label, {}), "ratio", notes) for label in labels]
        peak = peaks.get((entry["action"], entry["matrix"]), {})
        row += [_cell(peak.get(label, {}), "peak_mib", notes) for label in labels if memory]
        if network is None and clock == "cpu":
            row += [_cell(entry.get(label, {}), "wall_ratio", notes) for label in labels]
        rows.append(row)
    return _list_table(_threads(threads), header, rows)


def _cell(side: Results, key: str, notes: Notes) -> str:
    if side.get("error") == "not offered":
        return "not offered"
    if "error" in side:
        return "fails" + notes.mark(_literal(side["error"]))
    if key not in side:
        return "–"
    number = f"{side[key]:,.0f}" if key == "peak_mib" else f"{side[key]:.2f}"
    return number + (notes.mark(_literal(side["note"])) if "note" in side else "")


def _threads(number: str) -> str:
    return "1 thread" if number == "1" else f"{number} threads"


def _literal(text: str) -> str:
    """Make a message safe in reStructuredText."""
    return "".join("\\" + c if c in "\\*_`|" else c for c in text)


def _list_table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


if __name__ == "__main__":  # write the table anew from a JSON file
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text()), source.with_suffix(".inc"))
