"""Whether both packages compute the same matrix where no samples are drawn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks.client import Answer
from tests.benchmarks.kronecker.plan import TOLERANCE, Plan
from tests.benchmarks.kronecker.rounds import clients

TYPE2, EMPIRICAL = {"fisher_type": "type-2"}, {"fisher_type": "empirical"}
SUMMED = {**EMPIRICAL, "terms": "datum"}
CASES = [
    ("mlp", "covered", 64, "KFAC", TYPE2, True),
    ("mlp", "covered", 64, "KFAC", EMPIRICAL, True),
    ("mlp", "covered", 64, "EKFAC", TYPE2, True),
    ("mlp", "covered", 64, "EKFAC", EMPIRICAL, True),
    ("resnet18", "few", 4, "KFAC", TYPE2, True),
    ("resnet18", "few", 4, "KFAC", EMPIRICAL, True),
    ("resnet18", "few", 4, "EKFAC", TYPE2, True),
    ("gpt", "weights", 2, "KFAC", SUMMED, True),
    ("gpt", "weights", 2, "EKFAC", SUMMED, True),
    ("gpt", "weights", 2, "KFAC", EMPIRICAL, False),
    ("gpt", "covered", 2, "KFAC", SUMMED, False),
    ("gpt", "covered", 2, "EKFAC", SUMMED, False),
]
"""Network, parameters, number of data, operator, options of ours, and whether both must agree.

The peer sums the gradients of a datum's positions before it squares them, and has no option ``terms``.
"""


def compare(plan: Plan) -> Answer:
    """The relative differences of both packages' products by the same vector.

    Raises:
        RuntimeError: If they differ by more than rounding where they must not.
    """
    if "peer" not in plan.pythons:
        raise RuntimeError("agreement: there is nothing to compare with; give the peer's interpreter by --peer.")
    rows = []
    with clients(plan, list(plan.pythons)) as workers, tempfile.TemporaryDirectory() as folder:
        for network, selection, num_data, name, options, is_required in CASES:
            if network not in plan.networks:
                continue
            found: dict[str, dict[str, torch.Tensor]] = {}
            row: Answer = {"network": network, "selection": selection, "num_data": num_data, "operator": name}
            row |= {"options": options, "is_required": is_required}
            for label, client in workers.items():
                path = str(Path(folder) / f"{label}.pt")
                asked = {"network": network, "selection": selection, "num_data": num_data, "name": name}
                given = {k: v for k, v in options.items() if label == "ours" or k != "terms"}
                answer = client.ask("products", **asked, options=given, path=path)
                if answer["ok"]:
                    found[label] = torch.load(path)
                else:
                    row["error"] = f"{label}: {answer['error']}"
            if len(found) == 2:
                pairs = {what: (found["ours"][what], found["peer"][what]) for what in found["ours"]}
                row["differences"] = {what: float((a - b).norm() / b.norm()) for what, (a, b) in pairs.items()}
            print(f"  {row}", flush=True)
            rows.append(row)
    _require_agreement([row for row in rows if row["is_required"]])
    return {"tolerance": TOLERANCE, "rows": rows}


def _require_agreement(rows: list[Answer]) -> None:
    for row in rows:
        largest = max(row.get("differences", {"": float("inf")}).values())
        if not largest <= TOLERANCE:
            raise RuntimeError(f"Both packages' matrices differ by more than {TOLERANCE:g}: {row}.")
