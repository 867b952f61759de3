"""Write the figures into the page, between its fixed text: ``python -m tests.benchmarks.kronecker.page``.

A line ``.. figures: NAME`` begins what is replaced, and a line ``.. end`` ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.kronecker.plan import NETWORKS, PARTS, TITLES
from tests.benchmarks.kronecker.rounds import ratio, seconds
from tests.benchmarks.tables import Notes, Results, list_table, literal

SELECTIONS = {
    "covered": "linear, convolution",
    "small": "of these, factors up to 2304",
    "all": "all",
    "weights": "weights of these",
    "few": "of the first and the last layer",
}
BUSY = 1.6
"""A load average beyond this says that others worked beside the benchmark, which keeps one core busy."""


def write_page(results: Results, page: Path) -> None:
    """Replace the figures of the page."""
    if page.exists():
        page.write_text(filled(page.read_text(), results))


def filled(text: str, results: Results) -> str:
    """The text of the page with the figures of a run.

    Raises:
        ValueError: If the page asks for figures that are not known.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"The page asks for figures {name!r}; expected one of {', '.join(BLOCKS)}.")
        lines = BLOCKS[name](results) or ["Not measured."]
        return "\n".join([f".. figures: {name}", "", *lines]).rstrip() + "\n\n.. end\n"

    return re.sub(r"^\.\. figures: (?P<name>\w+)\n.*?^\.\. end\n", block, text, flags=re.MULTILINE | re.DOTALL)


def _circumstances(results: Results) -> list[str]:
    if not results:
        return []
    newest = max(results.values(), key=lambda part: part["date"])
    machine, versions = newest["machine"], newest["versions"]
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"Measured on {machine['cpu']}, {machine['cores']} cores, {machine['system']}, one thread; {words}."]
    if any(part["quick"] for part in results.values()):
        lines.append("**Some parts were measured with tiny sizes, for trying: their figures mean nothing.**")
    busiest = max(max(part["load"]) for part in results.values())
    if busiest > BUSY:
        lines.append(
            f"The machine had other work to do meanwhile (load average up to {busiest:.1f} on {machine['cores']} "
            "cores), which disturbs ratios as well."
        )
    commands = {(part["date"], part["command"]) for part in results.values()}
    return [*lines, "The command lines::", "", *(f"    {command}  # {date}" for date, command in sorted(commands))]


def _times(part: str) -> Callable[[Results], list[str]]:
    def table(results: Results) -> list[str]:
        notes, rows = Notes(), []
        for entry in results.get(part, {}).get("entries", []):
            row = [NETWORKS[entry["network"]][0], SELECTIONS[entry["selection"]], str(entry["num_data"])]
            row.append(TITLES[entry["action"]])
            for label in ("ours", "peer"):
                error = entry["errors"].get(label)
                failed = "–" if error is None else "fails" + notes.mark(literal(error))
                row += [_number(seconds(entry, label), ".3f", failed), _number(ratio(entry, label, "gradient"))]
            rows.append([*row, _number(ratio(entry, "ours", "peer"))])
        sides = ["ours, s", "gradients", "peer, s", "gradients", "ours / peer"]
        header = ["network", "parameters", "data", "what", *sides]
        title = PARTS[part]
        return list_table(f"{title[0].upper()}{title[1:]}", header, rows) + notes.lines()

    return table


def _memory(results: Results) -> list[str]:
    notes, rows = Notes(), []
    for entry in results.get("memory", {}).get("entries", []):
        title = TITLES.get(entry["action"], "a gradient")
        row = [NETWORKS[entry["network"]][0], SELECTIONS[entry["selection"]], str(entry["num_data"]), title]
        for label in ("ours", "peer"):
            error = entry["errors"].get(label)
            failed = "–" if error is None else "fails" + notes.mark(literal(error))
            row.append(_number(entry["peaks"].get(label), ",.0f", failed))
        rows.append([*row, _number(_memory_ratio(entry))])
    header = ["network", "parameters", "data", "what", "ours, MiB", "peer, MiB", "ours / peer"]
    return list_table("Peak memory", header, rows) + notes.lines()


def _agreement(results: Results) -> list[str]:
    rows, names = [], ("product", "inverse", "inverse, exact damping")
    for row in results.get("agreement", {}).get("rows", []):
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        cells = [NETWORKS[row["network"]][0], SELECTIONS[row["selection"]], row["operator"], options]
        found = row.get("differences", {})
        rows.append(cells + [f"{found[name]:.1e}" if name in found else "–" for name in names])
    header = ["network", "parameters", "operator", "options of ours", *names]
    return list_table("Relative differences between ours and the peer's", header, rows)


def _targets(results: Results) -> list[str]:
    rows = []
    for entry in [entry for part in PARTS for entry in results.get(part, {}).get("entries", [])]:
        if entry["selection"] == "all" or entry["action"] == "gradient":
            continue
        what = [NETWORKS[entry["network"]][0], TITLES[entry["action"]]]
        if "peaks" in entry:
            rows.append([*what, "memory, of the peer's", *_verdict(_memory_ratio(entry), 1.0)])
            continue
        if entry["action"] == "kfac":
            limit = 3.0 if entry["network"] == "resnet18" else 1.6
            rows.append([*what, "gradients", *_verdict(ratio(entry, "ours", "gradient"), limit)])
        if entry["action"] in LIMITS:
            rows.append([*what, "of the peer's", *_verdict(ratio(entry, "ours", "peer"), LIMITS[entry["action"]])])
    return list_table("Targets", ["network", "what", "unit", "figure", "asked", ""], rows)


def _memory_ratio(entry: Results) -> float | None:
    peaks = entry["peaks"]
    return peaks["ours"] / peaks["peer"] if "ours" in peaks and peaks.get("peer") else None


def _number(value: float | None, form: str = ".2f", absent: str = "–") -> str:
    return absent if value is None else format(value, form)


def _verdict(figure: float | None, limit: float) -> list[str]:
    if figure is None:
        return ["–", f"≤ {limit:g}", ""]
    return [f"{figure:.2f}", f"≤ {limit:g}", "met" if figure <= limit else "**missed**"]


LIMITS: dict[str, float] = {"kfac": 0.7, "ekfac": 0.9} | dict.fromkeys(
    ("product", "invert", "inverse", "invert_exact", "inverse_exact", "ekfac_product", "ekfac_invert", "ekfac_inverse"),
    1.0,
)
"""Time at most, of the peer's."""

BLOCKS: dict[str, Callable[[Results], list[str]]] = {
    "circumstances": _circumstances,
    "targets": _targets,
    **{part: _times(part) for part in ("factors", "products", "ekfac", "kfoc")},
    "memory": _memory,
    "agreement": _agreement,
}


if __name__ == "__main__":  # write the figures anew from the JSON file
    write_page(json.loads(Path("docs/benchmarks/kronecker.json").read_text()), Path("docs/kronecker_benchmarks.rst"))
