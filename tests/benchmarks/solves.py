"""Damped solves: by what each environment offers, and how exact they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import curvlinops
from curvlinops.examples import IdentityLinearOperator
from tests.benchmarks.items import DAMPING
from tests.benchmarks.networks import Problem

Prepared = tuple[Callable[[Any], Tensor], Callable[[], Any], dict[str, Any]]


def prepare(
    problem: Problem, operator_of: Callable[[Problem], Any], facts: dict[str, Any], for_memory: bool
) -> Prepared:
    """Prepare a solve with the gradient as right-hand side, by Woodbury where there is low rank and by CG elsewhere.

    The damping is known before; construction, columns, Gram matrix, factorisation and solve are measured.

    Args:
        problem: The network with its data.
        operator_of: Makes the matrix for a problem.
        facts: The damping, where another environment has found it.
        for_memory: Whether only memory is measured, which no damping changes: nothing else is found out.

    Returns:
        What is measured, what goes before it, and the damping and residuals.
    """
    damping = DAMPING if for_memory else facts.get("damping")
    if damping is None:
        damping = DAMPING * _largest_eigenvalue(operator_of(problem))
    right = {"gradient": _gradient(problem), "random": _random(problem)}

    def solve(b: Tensor) -> Tensor:
        operator = operator_of(problem)
        if hasattr(operator, "to_low_rank"):
            return operator.to_low_rank().damped(damping).inverse() @ b
        p = problem.params[0]
        identity = IdentityLinearOperator([tuple(q.shape) for q in problem.params], p.device, p.dtype)
        return curvlinops.CGInverseLinearOperator(operator + damping * identity) @ b

    if for_memory:
        return lambda _: solve(right["gradient"]), lambda: None, {}
    doubled = problem.doubled() if problem.params[0].dtype == torch.float32 else None
    found: dict[str, Any] = {"damping": damping, "residual": {}}
    for name, b in right.items():
        x = solve(b)
        product = (operator_of(problem) @ x).double()
        residuals = {"own": _residual(product, damping, x, b)}
        if doubled is not None:
            product_doubled = operator_of(doubled) @ x.double()
            # Samples that were drawn from probabilities in float64 may be others, and make another matrix.
            if (product - product_doubled).norm() < 1e-3 * product.norm():
                residuals["float64"] = _residual(product_doubled, damping, x, b)
        found["residual"][name] = residuals
    return lambda _: solve(right["gradient"]), lambda: None, found


def _residual(product: Tensor, damping: float, x: Tensor, b: Tensor) -> float:
    """‖b - (A + c I) x‖ / ‖b‖ in float64, from the product A x."""
    b = b.double()
    return float((b - product - damping * x.double()).norm() / b.norm())


def _largest_eigenvalue(operator: Any) -> float:
    if hasattr(operator, "to_low_rank"):
        return float(operator.to_low_rank().eigenvalues().max())
    x = torch.ones(operator.shape[1], dtype=operator.dtype, device=operator.device)
    for _ in range(10):
        x = operator @ (x / x.norm())
    return float(x.norm())


def _gradient(problem: Problem) -> Tensor:
    ((X, y),) = problem.data
    parts = torch.autograd.grad(problem.loss(problem.model(X), y), problem.params)
    return torch.cat([g.flatten() for g in parts])


def _random(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(problem.num_params, generator=generator).to(problem.params[0])
