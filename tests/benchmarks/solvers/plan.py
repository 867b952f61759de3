"""What is measured, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.solvers.race import Effort

RESIDUAL = 1e-6
"""The true relative residual ‖b - (A + c I) x‖ / ‖b‖ that solves are to reach."""
EIGEN_TOLERANCE = 1e-5
"""The same for eigenpairs, ‖A v - λ v‖ / λ."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        pythons: An interpreter for each environment, ``ours`` and, where it is measured, ``peer``.
        effort: How often all is measured.
        network: The network of the solves.
        conv: The network with convolutions.
        wide: The network whose eigenvalues are found.
        dampings: Those of single solves; the largest and the smallest bound the path.
        num_path: Dampings on the path.
        hard_dampings: Those of the preconditioned solves with the gradient.
        random_dampings: Those with a random vector.
        shared_dampings: Those of several right-hand sides at once.
        indefinite_dampings: Those of the Hessian.
        num_data: Data of the preconditioned solves; the Hessian has half as many.
        ranks: Ranks of the Nyström preconditioners.
        max_iter: Iterations at most.
        max_preconditioned: The same with preconditioners, and for what is compared with them.
    """

    pythons: dict[str, str]
    effort: Effort
    network: str = "mlp"
    conv: str = "conv"
    wide: str = "wide"
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    num_path: int = 16
    hard_dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    random_dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    shared_dampings: tuple[float, ...] = (1e-3,)
    indefinite_dampings: tuple[float, ...] = (1e-1, 3e-2, 1e-2)
    num_data: int = 600
    ranks: tuple[int, ...] = (10, 40, 160)
    max_iter: int = 3000
    max_preconditioned: int = 1500


def quick(pythons: dict[str, str]) -> Plan:
    """Small enough to see in a minute that everything runs; the figures mean nothing."""
    return Plan(
        pythons,
        Effort(1, 5),
        network="tiny",
        conv="tiny",
        wide="tiny",
        dampings=(1e-1, 1e-3),
        num_path=4,
        hard_dampings=(1e-1, 1e-3),
        random_dampings=(1e-3,),
        indefinite_dampings=(1e-1, 1e-2),
        num_data=120,
        ranks=(10, 40),
        max_iter=500,
    )
