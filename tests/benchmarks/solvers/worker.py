"""A process of one environment that solves by conjugate gradients: JSON lines in, JSON lines out.

It is started by its path, with the interpreter of the environment to measure; what it imports as `curvlinops` is that
environment's. Commands: ``setup`` and ``solve``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.benchmarks.networks import Problem

ROOT = Path(__file__).resolve().parents[3]


class Worker:
    """Holds one problem, its GGN, and right-hand sides."""

    problem: Problem

    def __init__(self) -> None:
        """Start without a problem."""
        self.jobs: dict[str, Any] = {}
        self.right: dict[str, Any] = {}
        self.num_forwards = 0

    def setup(self, network: str, path: str) -> dict[str, Any]:
        """Read a problem, and find how many forwards a product takes."""
        import curvlinops
        from tests.benchmarks.solvers import problems

        self.problem, self.right = problems.load(network, path)
        problem = self.problem
        problem.model.register_forward_pre_hook(self._count)
        head = (problem.model, problem.loss, problem.params, problem.data)
        self.operator = curvlinops.GGNLinearOperator(*head, check_deterministic=False)
        _ = self.operator @ self.right["random"]
        self.num_forwards = 0
        _ = self.operator @ self.right["random"]
        self.forwards_a_product = self.num_forwards
        return {"forwards_a_product": self.forwards_a_product}

    def solve(self, right: str, damping: float, options: dict[str, Any], path: str) -> dict[str, Any]:
        """Solve once, and write the solution to a file."""
        import torch

        import curvlinops
        from curvlinops.examples import IdentityLinearOperator
        from tests.benchmarks import measure
        from tests.benchmarks.jobs import Job

        p = self.problem.params[0]
        identity = IdentityLinearOperator([tuple(q.shape) for q in self.problem.params], p.device, p.dtype)
        rank = int(options.pop("nystrom_rank", 0))
        if rank:  # its products are part of the solve
            options["preconditioner"] = curvlinops.NystromPreconditioner(self.operator, rank, damping)
        inverse = curvlinops.CGInverseLinearOperator(self.operator + damping * identity, **options)
        found: list[torch.Tensor] = []
        self.num_forwards = 0
        seconds = measure.timed(Job(lambda _: found.append(inverse @ self.right[right])), "cpu")
        # One with products that keep the forward says itself how many there were.
        info = getattr(inverse, "info", None)
        products = self.num_forwards / self.forwards_a_product if info is None else info.num_matvecs + rank
        torch.save(found[0].detach(), path)
        return {**seconds, "products": products}

    def _count(self, *_: Any) -> None:
        self.num_forwards += 1


def main() -> None:
    """Read requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    warnings.simplefilter("ignore")
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    try:
        import torch

        import curvlinops

        sys.path.append(str(ROOT))
        from tests.benchmarks.worker import answer
    except ImportError as error:
        replies.write(json.dumps({"ok": False, "error": f"ImportError: {error}"}) + "\n")
        return
    torch.set_num_threads(1)
    hello = {"ok": True, "location": str(curvlinops.__file__), "torch": torch.__version__}
    for name in ("curvlinops", "curvlinops-for-pytorch", "linear_operator"):
        try:
            hello[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    replies.write(json.dumps(hello) + "\n")
    worker = Worker()
    for line in sys.stdin:
        replies.write(json.dumps(answer(worker, json.loads(line))) + "\n")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
