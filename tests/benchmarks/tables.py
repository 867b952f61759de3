"""Tables in reStructuredText, and how figures are written in them."""

from __future__ import annotations

from typing import Any

Results = dict[str, Any]
LABELS = {"ours": "ours", "peer": "peer", "backpack": "BackPACK", "streamed": "streamed", "kept": "linearised"}


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


def cell(side: Results, key: str, notes: Notes) -> str:
    """A figure of one side, or why there is none."""
    if side.get("error") == "not offered":
        return "not offered"
    if "error" in side:
        return "fails" + notes.mark(literal(side["error"]))
    if key not in side:
        return "–"
    return number(side[key], key) + (notes.mark(literal(side["note"])) if "note" in side else "")


def number(value: float, key: str) -> str:
    """A number as it suits its kind."""
    if key == "peak_mib":
        return f"{value:,.0f}"
    if key.endswith("_seconds"):
        return f"{1000 * value:,.2f}"
    return f"{value:.2f}"


def literal(text: str) -> str:
    """Make a message safe in reStructuredText."""
    return "".join("\\" + c if c in "\\*_`|" else c for c in text)


def list_table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """A table with a title; nothing without rows."""
    if not rows:
        return []
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {text}" for i, text in enumerate(row)]
    return [*lines, ""]


def thread_words(count: str) -> str:
    """A number of threads in words."""
    return "1 thread" if count == "1" else f"{count} threads"
