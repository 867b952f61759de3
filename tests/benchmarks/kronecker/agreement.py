"""Whether both packages compute the same matrix where no samples are drawn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.benchmarks.client import Answer
from tests.benchmarks.kronecker.plan import TOLERANCE, Plan
from tests.benchmarks.kronecker.rounds import clients

CASES = [
    ("mlp", "covered", 64, "KFAC", "type-2"),
    ("mlp", "covered", 64, "KFAC", "empirical"),
    ("mlp", "covered", 64, "EKFAC", "type-2"),
    ("mlp", "covered", 64, "EKFAC", "empirical"),
    ("gpt", "covered", 2, "KFAC", "empirical"),
    ("gpt", "covered", 2, "EKFAC", "empirical"),
    ("resnet18", "few", 2, "KFAC", "type-2"),
    ("resnet18", "few", 2, "KFAC", "empirical"),
    ("resnet18", "few", 2, "EKFAC", "type-2"),
]
"""Network, parameters, number of data, operator, kind. On the MLP both must agree; elsewhere it is shown."""


def compare(plan: Plan) -> Answer:
    """The relative differences of both packages' products by the same vector.

    Raises:
        RuntimeError: If they differ on the MLP by more than rounding.
    """
    if "peer" not in plan.pythons:
        raise RuntimeError("agreement: there is nothing to compare with; give the peer's interpreter by --peer.")
    rows = []
    with clients(plan, list(plan.pythons)) as workers, tempfile.TemporaryDirectory() as folder:
        for network, selection, num_data, name, fisher_type in CASES:
            if network not in plan.networks:
                continue
            found, row = {}, {"network": network, "num_data": num_data, "operator": name, "fisher_type": fisher_type}
            for label, client in workers.items():
                path = str(Path(folder) / f"{label}.pt")
                asked = {"network": network, "selection": selection, "num_data": num_data, "name": name}
                answer = client.ask("products", **asked, fisher_type=fisher_type, path=path)
                if answer["ok"]:
                    found[label] = torch.load(path)
                else:
                    row["error"] = f"{label}: {answer['error']}"
            if len(found) == 2:
                pairs = {what: (found["ours"][what], found["peer"][what]) for what in found["ours"]}
                row["differences"] = {what: float((a - b).norm() / b.norm()) for what, (a, b) in pairs.items()}
            print(f"  {row}", flush=True)
            rows.append(row)
    _require_agreement([row for row in rows if row["network"] == "mlp"])
    return {"tolerance": TOLERANCE, "rows": rows}


def _require_agreement(rows: list[Answer]) -> None:
    for row in rows:
        largest = max(row.get("differences", {"": float("inf")}).values())
        if not largest <= TOLERANCE:
            raise RuntimeError(f"Both packages' matrices differ by more than {TOLERANCE:g}: {row}.")
