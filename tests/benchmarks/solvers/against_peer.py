"""Conjugate gradients against the peer's, to the same true residual."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.benchmarks.client import Client, Setting
from tests.benchmarks.client import Answer as Reply
from tests.benchmarks.solvers import problems
from tests.benchmarks.solvers.plan import RESIDUAL, Plan
from tests.benchmarks.solvers.race import Answer, Contender, race

SETTING = Setting(device="cpu", dtype="float64", tf32=False, gib=0, timeout=300)
TOLERANCES = [10.0**-digits for digits in range(6, 15)]
"""What the peer is asked for, until its true residual is small enough."""


class SolverClient(Client):
    """Talks with this folder's worker in place of the other benchmark's."""

    def _start(self) -> Reply:
        self._command[1] = str(Path(__file__).with_name("worker.py"))
        return super()._start()


class Duel:
    """Two workers with the same problem; solutions come back in files."""

    def __init__(self, plan: Plan, clients: dict[str, Client], folder: Path) -> None:
        """Train the network and hand it to both."""
        self.plan, self.clients, self.folder = plan, clients, folder
        self.problem = problems.trained(plan.network)
        self.right = problems.right_sides(self.problem)
        problems.save(self.problem, self.right, folder / "problem.pt")
        for client in clients.values():
            answer = client.ask("setup", network=plan.network, path=str(folder / "problem.pt"))
            if not answer["ok"]:
                raise RuntimeError(f"{client.label}: {answer['error']}")

    def solve(self, label: str, right: str, damping: float, **options: float) -> Answer:
        """One solve, with its true residual."""
        path = self.folder / f"{label}.pt"
        answer = self.clients[label].ask("solve", right=right, damping=damping, options=options, path=str(path))
        if not answer.pop("ok"):
            return answer
        b = self.right[right]
        answer["residual"] = problems.residual(problems.ggn_product, self.problem, damping, torch.load(path), b)
        return answer

    def peer_tolerance(self, right: str, damping: float) -> tuple[float | None, list[Answer]]:
        """The first tolerance by which the peer gets there, or None; and all trials."""
        trials: list[Answer] = []
        for tolerance in TOLERANCES:
            answer = self.solve("peer", right, damping, tolerance=tolerance, max_iter=self.plan.max_iter)
            trials.append({"tolerance": tolerance, **answer})
            if "error" in answer or answer["residual"] <= RESIDUAL:
                return (None if "error" in answer else tolerance), trials
            if len(trials) > 1 and answer["products"] == trials[-2]["products"]:
                break  # asking for more changes nothing
        return None, trials

    def compare(self, right: str, damping: float) -> Answer:
        """Race to the same residual, then what both reach by default."""
        most = self.plan.max_iter
        contenders: dict[str, Contender] = {
            "ours": lambda: self.solve("ours", right, damping, tolerance=RESIDUAL, max_iter=most)
        }
        trials: list[Answer] = []
        tolerance = None
        if "peer" in self.clients:
            tolerance, trials = self.peer_tolerance(right, damping)
            if tolerance is not None:
                contenders["peer"] = lambda: self.solve("peer", right, damping, tolerance=tolerance, max_iter=most)
        found = race(contenders, self.plan.effort)
        defaults = {label: self.solve(label, right, damping) for label in self.clients}
        return {
            "right": right,
            "damping": damping,
            **found,
            "peer_tolerance": tolerance,
            "peer_trials": trials,
            "defaults": defaults,
        }


@contextmanager
def started(pythons: dict[str, str]) -> Iterator[dict[str, Client]]:
    """One worker for each environment."""
    clients: list[Client] = []
    try:
        for label, python in pythons.items():
            clients.append(SolverClient(label, python, SETTING, threads=1))
            if not clients[-1].hello["ok"]:
                raise RuntimeError(f"{label}: {clients[-1].hello['error']}")
        yield {client.label: client for client in clients}
    finally:
        for client in clients:
            client.close()


def run(plan: Plan) -> Answer:
    """All right-hand sides and dampings."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, started(plan.pythons) as clients:
        duel = Duel(plan, clients, Path(folder))
        for right in duel.right:
            for damping in plan.dampings:
                rows.append(duel.compare(right, damping))
                print(describe(rows[-1]), flush=True)
        environments = {c.label: {k: v for k, v in c.hello.items() if k not in ("ok", "location")} for c in clients.values()}
    return {"network": plan.network, "facts": problems.facts(duel.problem), "environments": environments, "rows": rows}


def describe(row: Answer) -> str:
    """Say in one line what was measured."""
    words = [f"  {row['right']} {row['damping']:g}:"]
    for label in ("ours", "peer"):
        side = row.get(label)
        figures = "not reached" if side is None else f"{side['products']:.0f} products, {side['cpu']:.2f} s"
        words.append(f"{label} {figures};")
    return " ".join([*words, f"the peer's tolerance {row['peer_tolerance']}"])
