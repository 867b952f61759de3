"""What each action does inside one environment: what is prepared and what is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import curvlinops
from tests.benchmarks.jobs import Job, find, gradient
from tests.benchmarks.kronecker import problems
from tests.benchmarks.kronecker.plan import DAMPING
from tests.benchmarks.networks import Problem

IS_OURS = not hasattr(curvlinops, "KFACInverseLinearOperator")
"""The peer's inverse is a class, ours a method."""


def prepare(problem: Problem, action: str, computed: dict[str, Any]) -> Job:
    """Build everything that is not part of the action.

    Args:
        problem: The network with its data and parameters.
        action: What to measure.
        computed: Operators of the same problem that exist, by name; filled here.
    """
    vector = random_vector(problem)
    name = {"ekfac": "EKFAC", "kfoc": "KFOC"}.get(action.partition("_")[0], "KFAC")
    match action:
        case "gradient":
            return Job(lambda _: gradient(problem))
        case "kfac":
            return Job(lambda _: compute(operator(problem, name, check_deterministic=False)))
        case "kfac_first" | "ekfac" | "kfoc":
            cls = find(f"{name}LinearOperator")  # which an environment may lack
            return Job(lambda _: operator(problem, name, cls) @ vector)
    if name not in computed:
        computed[name] = operator(problem, name, check_deterministic=False)
        _ = computed[name] @ vector
    matrix = computed[name]
    if action in ("product", "ekfac_product"):
        return Job(lambda _: matrix @ vector)
    is_exact = action.endswith("_exact") or name == "EKFAC"
    if "invert" in action:
        return Job(lambda _: inverse(matrix, is_exact) @ vector, lambda: forget_decompositions(matrix))
    found = inverse(matrix, is_exact)
    _ = found @ vector
    return Job(lambda _: found @ vector)


def operator(problem: Problem, name: str, cls: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A new operator, by default KFAC's, of the environment."""
    cls = find(f"{name}LinearOperator") if cls is None else cls
    if name == "EKFAC" and not IS_OURS:  # which takes a matrix as output only
        problem = problems.with_flat_outputs(problem)
    return cls(problem.model, problem.loss, problem.params, problem.data, **options)


def compute(matrix: Any) -> Any:
    """Let KFAC compute its factors."""
    return matrix.compute() if IS_OURS else matrix.compute_kronecker_factors()


def inverse(matrix: Any, is_exact: bool) -> Any:
    """The inverse with a damping on each factor, or on the matrix."""
    options = {"damping": DAMPING, "use_exact_damping": is_exact}
    return matrix.inverse(**options) if IS_OURS else curvlinops.KFACInverseLinearOperator(matrix, **options)


def forget_decompositions(matrix: Any) -> None:
    """Leave nothing of an earlier inverse: ours keeps decompositions with the computed matrix, the peer does not."""
    if IS_OURS:
        matrix.load_state_dict(matrix.state_dict())


def random_vector(problem: Problem) -> Tensor:
    """A vector for products; the same in all environments."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(problem.num_params, generator=generator)


def products(problem: Problem, name: str, options: dict[str, str]) -> dict[str, Tensor]:
    """What both packages should agree on, given the options of the matrix."""
    matrix = operator(problem, name, check_deterministic=False, **options)
    vector = random_vector(problem)
    found = {"product": matrix @ vector, "inverse, exact damping": inverse(matrix, True) @ vector}
    if name == "KFAC":
        found["inverse"] = inverse(matrix, False) @ vector
    return {what: tensor.detach() for what, tensor in found.items()}
