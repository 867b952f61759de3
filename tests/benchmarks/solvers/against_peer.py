"""Conjugate gradients against the peer's, to the same true residual."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.benchmarks.client import Answer as Reply
from tests.benchmarks.client import Client, Setting
from tests.benchmarks.solvers import problems
from tests.benchmarks.solvers.plan import RESIDUAL, Plan
from tests.benchmarks.solvers.race import Answer, Contender, race

SETTING = Setting(device="cpu", dtype="float64", tf32=False, gib=0, timeout=300)
TOLERANCES = [1e-6, 1e-7, 1e-8, 1e-9, 1e-10]
"""What the peer is asked for, until its true residual is small enough."""
TINY_EPS = 1e-30
"""What its ``eps``, a number added to denominators, is set to: by its own, 1e-10, it stops above the residual."""
SMALLEST_WITH_OWN_EPS = 1e-3
SMALLEST_BY_DEFAULT = 1e-4
NYSTROM_RANK = 40
"""Of the preconditioner that ours is measured with as well; the peer offers none."""


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
            self.solve(client.label, "random", 1.0, tolerance=0.1)  # what loads late shall not count

    def solve(self, label: str, right: str, damping: float, **options: float) -> Answer:
        """One solve, with its true residual."""
        path = self.folder / f"{label}.pt"
        answer = self.clients[label].ask("solve", right=right, damping=damping, options=options, path=str(path))
        if not answer.pop("ok"):
            return answer
        b = self.right[right]
        answer["residual"] = problems.residual(problems.ggn_product, self.problem, damping, torch.load(path), b)
        return answer

    def peer_options(self, right: str, damping: float, products: int) -> tuple[dict[str, float] | None, list[Answer]]:
        """The first options by which the peer gets there, or None; and all trials.

        Its own ``eps`` is tried where that is cheap, with up to twice our products.
        """
        most = 2 * products + 20
        own: list[dict[str, float]] = [{"tolerance": RESIDUAL}] if damping >= SMALLEST_WITH_OWN_EPS else []
        trials: list[Answer] = []
        for asked in own + [{"tolerance": tolerance, "eps": TINY_EPS} for tolerance in TOLERANCES]:
            options = {**asked, "max_iter": most}
            answer = self.solve("peer", right, damping, **options)
            trials.append({"options": options, **answer})
            if "error" not in answer and answer["residual"] <= RESIDUAL:
                return options, trials
            if "eps" in asked and ("error" in answer or answer["products"] >= most):
                break  # asking for more changes nothing
        return None, trials

    def compare(self, right: str, damping: float) -> Answer:
        """Race to the same residual, then what both reach by default."""
        options = {"tolerance": RESIDUAL, "max_iter": self.plan.max_iter}
        contenders: dict[str, Contender] = {"ours": lambda: self.solve("ours", right, damping, **options)}
        first, trials = contenders["ours"](), []
        contenders["nystrom"] = lambda: self.solve("ours", right, damping, nystrom_rank=NYSTROM_RANK, **options)
        peer = None
        if "peer" in self.clients:
            peer, trials = self.peer_options(right, damping, first["products"])
            if peer is not None:
                contenders["peer"] = lambda: self.solve("peer", right, damping, **peer)
        row: Answer = {"right": right, "damping": damping, "peer_options": peer, "peer_trials": trials}
        found = {
            "ours": first,
            "nystrom": contenders["nystrom"](),
            **({"peer": _timed(trials[-1])} if peer is not None else {}),
        }
        row |= race(contenders, self.plan.effort, found)
        if right == "gradient" and damping >= SMALLEST_BY_DEFAULT:
            row["defaults"] = {label: self.solve(label, right, damping) for label in self.clients}
        return row


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
        environments = {
            c.label: {k: v for k, v in c.hello.items() if k not in ("ok", "location")} for c in clients.values()
        }
    return {"network": plan.network, "facts": problems.facts(duel.problem), "environments": environments, "rows": rows}


def _timed(trial: Answer) -> Answer:
    return {key: value for key, value in trial.items() if key != "options"}


def describe(row: Answer) -> str:
    """Say in one line what was measured."""
    words = [f"  {row['right']} {row['damping']:g}:"]
    for label in ("ours", "nystrom", "peer"):
        side = row.get(label)
        figures = "not reached" if side is None else f"{side['products']:.0f} products, {side['cpu']:.2f} s"
        words.append(f"{label} {figures};")
    return " ".join([*words, f"the peer's options {row['peer_options']}"])
