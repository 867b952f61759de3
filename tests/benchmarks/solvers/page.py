"""Write the figures into the page, between its fixed text: ``python -m tests.benchmarks.solvers.page``.

A line ``.. figures: NAME`` begins what is replaced, and a line ``.. end`` ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.solvers.plan import EIGEN_TOLERANCE, RESIDUAL
from tests.benchmarks.solvers.problems import NETWORKS
from tests.benchmarks.tables import list_table

Results = dict[str, Any]
RIGHT = {"gradient": "gradient", "random": "random vector", "columns": "4 random vectors at once"}
NOT_REACHED = "not reached"


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
    commands = {(part["date"], part["command"]) for part in results.values()}
    return [*lines, "The command lines::", "", *(f"    {command}  # {date}" for date, command in sorted(commands))]


def _network(part: Results) -> str:
    facts = part["facts"]
    return (
        f"{NETWORKS[part['network']][0]}: {facts['num_params']:,} parameters, {facts['num_data']:,} data in "
        f"{facts['num_batches']} mini-batches, accuracy {100 * facts['accuracy']:.1f} %, loss {facts['loss']:.3f}."
    )


def _peer(results: Results) -> list[str]:
    part = results.get("peer")
    if part is None:
        return []
    rows = []
    for row in part["rows"]:
        ours, peer, options = row["ours"], row.get("peer"), row["peer_options"]
        words = [RIGHT[row["right"]], f"{row['damping']:g}", f"{ours['products']:.0f}", f"{ours['cpu']:.2f}"]
        words.append(f"{ours['residual']:.1e}")
        sketched = row.get("nystrom")
        words += ["–", "–"] if sketched is None else [f"{sketched['products']:.0f}", f"{sketched['cpu']:.2f}"]
        if peer is None:
            words += [NOT_REACHED, "–", "–", "–", "–", "–"]
        else:
            words += [f"{peer['products']:.0f}", f"{peer['cpu']:.2f}", f"{peer['residual']:.1e}"]
            words += [", ".join(f"{k}={v:g}" for k, v in options.items() if k != "max_iter"), f"{peer['ratio']:.2f}"]
            words.append("–" if sketched is None else f"{peer['ratio'] / sketched['ratio']:.2f}")
        rows.append(words)
    header = ["right-hand side", "damping", "ours, products", "s", "residual", "with Nyström 40, products", "s"]
    header += ["peer, products", "s", "residual", "the peer's options", "times ours", "times ours with Nyström 40"]
    return [_network(part), "", *list_table(f"To the residual {RESIDUAL:g}", header, rows)]


def _own_eps(results: Results) -> list[str]:
    rows = []
    for row in results.get("peer", {}).get("rows", []):
        trial = next((t for t in row["peer_trials"] if "eps" not in t["options"] and "residual" in t), None)
        if trial is not None:
            figures = [f"{trial['products']:.0f}", f"{trial['cpu']:.2f}", f"{trial['residual']:.1e}"]
            rows.append([RIGHT[row["right"]], f"{row['damping']:g}", *figures])
    header = ["right-hand side", "damping", "peer, products", "s", "residual"]
    return list_table("The peer asked for tolerance=1e-6 alone, with up to twice our products", header, rows)


def _defaults(results: Results) -> list[str]:
    rows = []
    for row in results.get("peer", {}).get("rows", []):
        if "defaults" not in row:
            continue
        words = [RIGHT[row["right"]], f"{row['damping']:g}"]
        for side in (row["defaults"].get(label) for label in ("ours", "peer")):
            if side is None or "error" in side:
                words += ["–", "–", "–"]
            else:
                words += [f"{side['products']:.0f}", f"{side['cpu']:.2f}", f"{side['residual']:.1e}"]
        rows.append(words)
    header = ["right-hand side", "damping", "ours, products", "s", "residual", "peer, products", "s", "residual"]
    return list_table("By default", header, rows)


def _textbook(results: Results) -> list[str]:
    part = results.get("textbook")
    if part is None:
        return []
    rows = [
        [
            RIGHT[row["right"]],
            f"{row['damping']:g}",
            str(row["ours"]["iterations"]),
            str(row["textbook"]["iterations"]),
            f"{row['ours']['iterations'] / row['textbook']['iterations']:.3f}",
            f"{row['ours']['residual']:.1e}",
            f"{row['textbook']['residual']:.1e}",
        ]
        for row in part["rows"]
    ]
    header = ["right-hand side", "damping", "ours", "textbook", "ratio", "residual, ours", "residual, textbook"]
    return list_table("Iterations in float64", header, rows)


def _path(results: Results) -> list[str]:
    part = results.get("path")
    if part is None:
        return []
    titles = {"path": "``damping_path``", "single": "one solve after the other"}
    rows = [
        [title, str(part[label]["products"]), f"{part[label]['cpu']:.2f}", f"{part[label]['residual']:.1e}"]
        for label, title in titles.items()
    ]
    rows.append(["the hardest solve alone", str(part["hardest"]["products"]), "–", "–"])
    title = f"{len(part['dampings'])} dampings from {part['dampings'][0]:g} to {part['dampings'][-1]:g}"
    return list_table(title, ["what", "products", "s", "largest residual"], rows)


def _preconditioners(results: Results) -> list[str]:
    lines: list[str] = []
    for part in (results.get("preconditioners"), results.get("preconditioners-conv")):
        if part is None:
            continue
        lines += [_network(part), ""]
        for right, words in RIGHT.items():
            found = [row for row in part["rows"] if row["right"] == right]
            titles = part["titles"].items()
            rows = [[title, *(_solve_cell(row["sides"], label) for row in found)] for label, title in titles]
            header = ["preconditioner", *(f"{row['damping']:g}" for row in found)]
            lines += list_table(f"{words[0].upper()}{words[1:]}: iterations / products / time", header, rows)
    return lines


def _solve_cell(sides: Results, label: str) -> str:
    side, plain = sides[label], sides["none"]
    if not side["converged"]:
        return NOT_REACHED
    # A plain solve that was cut off would have taken longer still.
    bound = "" if plain["converged"] else "< "
    time = f"{side['cpu']:.2f} s" if label == "none" else f"{bound}{side['ratio']:.2f}"
    return f"{side['iterations']} / {side['products']} / {time}"


def _sides(title: str, rows: list[tuple[str, Results]], titles: dict[str, str], first: str) -> list[str]:
    cells = []
    for name, sides in rows:
        for label, what in titles.items():
            side = sides.get(label)
            figures = [NOT_REACHED, "–", "–", "–"]
            if side is not None:
                figures = [
                    f"{side['products']}",
                    f"{side['cpu']:.2f}",
                    f"{side['ratio']:.2f}",
                    f"{side['residual']:.1e}",
                ]
            cells.append([name, what, *figures])
    return list_table(title, [first, "by", "products", "s", "times ours", "largest residual"], cells)


def _eigenpairs(results: Results) -> list[str]:
    part = results.get("eigenpairs")
    if part is None:
        return []
    titles = {
        "ours": "``eigsh``",
        "streamed": "SciPy, ``G.to_scipy()``",
        "kept": "SciPy, ``G.linearize().to_scipy()``",
        "kept_large": "the same with a basis as large as ours, 50",
    }
    rows = [(row["dtype"], row["sides"]) for row in part["rows"]]
    return [_network(part), "", *_sides(f"Ten largest eigenpairs, tol={EIGEN_TOLERANCE:g}", rows, titles, "dtype")]


def _indefinite(results: Results) -> list[str]:
    part = results.get("indefinite")
    if part is None:
        return []
    titles = {
        "ours": "``MINRESInverseLinearOperator``",
        "streamed": "SciPy, ``to_scipy()``",
        "kept": "SciPy, ``linearize().to_scipy()``",
    }
    rows = [(f"{r['damping']:g} (from {r['smallest']:.2g} to {r['largest']:.2g})", r["sides"]) for r in part["rows"]]
    first = "damping (eigenvalues)"
    return [_network(part), "", *_sides(f"To the residual {RESIDUAL:g}", rows, titles, first)]


def _targets(results: Results) -> list[str]:
    rows = []
    for row in results.get("peer", {}).get("rows", []):
        if row["damping"] in (1e-3, 1e-4) and "peer" in row:
            what = f"the peer's time over ours, damping {row['damping']:g}, {RIGHT[row['right']]}"
            rows.append([what, *_verdict(row["peer"]["ratio"], 3.0, is_least=True)])
            if "nystrom" in row:
                ratio = row["peer"]["ratio"] / row["nystrom"]["ratio"]
                rows.append([f"{what}, ours with Nyström 40", *_verdict(ratio, 3.0, is_least=True)])
    ratios = [
        r["ours"]["iterations"] / r["textbook"]["iterations"] for r in results.get("textbook", {}).get("rows", [])
    ]
    if ratios:
        rows.append(["iterations over the textbook's, at most", *_verdict(max(ratios), 1.05)])
    if "path" in results:
        part = results["path"]
        own = part["path"]["products"] - len(part["dampings"])
        words = "products of the path, less one to verify each damping, over the hardest solve's"
        rows.append([words, *_verdict(own / part["hardest"]["products"], 1.1)])
    for row in results.get("eigenpairs", {}).get("rows", []):
        sides = row["sides"]
        fewest = min(sides[label]["products"] for label in ("streamed", "kept", "kept_large"))
        words = f"eigenpairs in {row['dtype']}: products over ARPACK's fewest"
        rows.append([words, *_verdict(sides["ours"]["products"] / fewest, 1.3)])
        for label, words in (("streamed", "streamed"), ("kept", "linearised")):
            what = f"eigenpairs in {row['dtype']}: time of SciPy's, {words}, over ours"
            rows.append([what, *_verdict(sides[label]["ratio"], 1.0, is_least=True)])
    return list_table("Targets", ["what", "figure", "asked", ""], rows)


def _verdict(figure: float, limit: float, is_least: bool = False) -> list[str]:
    is_met = figure >= limit if is_least else figure <= limit
    return [f"{figure:.2f}", f"{'≥' if is_least else '≤'} {limit:g}", "met" if is_met else "**missed**"]


BLOCKS: dict[str, Callable[[Results], list[str]]] = {
    "circumstances": _circumstances,
    "targets": _targets,
    "peer": _peer,
    "own_eps": _own_eps,
    "defaults": _defaults,
    "textbook": _textbook,
    "path": _path,
    "preconditioners": _preconditioners,
    "eigenpairs": _eigenpairs,
    "indefinite": _indefinite,
}


if __name__ == "__main__":  # write the figures anew from the JSON file
    write_page(json.loads(Path("docs/benchmarks/solvers.json").read_text()), Path("docs/solver_benchmarks.rst"))
