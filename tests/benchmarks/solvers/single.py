"""Conjugate gradients against a textbook's in float64, and paths of dampings against single solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops import CGInverseLinearOperator, GGNLinearOperator, damping_path
from curvlinops.operators.base import LinearOperator
from tests.benchmarks.networks import Problem
from tests.benchmarks.solvers import problems
from tests.benchmarks.solvers.plan import RESIDUAL, Plan
from tests.benchmarks.solvers.race import Answer, contender, race


def ggn(problem: Problem) -> GGNLinearOperator:
    """The GGN of a problem, streamed."""
    return GGNLinearOperator(problem.model, problem.loss, problem.params, problem.data, check_deterministic=False)


def textbook(product: Callable[[Tensor], Tensor], b: Tensor, rtol: float, max_iter: int) -> tuple[Tensor, int]:
    """Conjugate gradients as Hestenes and Stiefel write them, for one vector; and the number of iterations."""
    x, r = torch.zeros_like(b), b.clone()
    p, squares = r.clone(), r @ r
    end = rtol**2 * squares
    for iteration in range(max_iter):
        if squares <= end:
            return x, iteration
        Ap = product(p)
        step = squares / (p @ Ap)
        x += step * p
        r -= step * Ap
        before, squares = squares, r @ r
        p = r + squares / before * p
    return x, max_iter


def solve(A: LinearOperator, b: Tensor, max_iter: int, **options: Any) -> tuple[Tensor, Any]:
    """Ours, with its info."""
    inverse = CGInverseLinearOperator(A, rtol=RESIDUAL, max_iter=max_iter, **options)
    return inverse @ b, inverse.info


def against_textbook(plan: Plan) -> Answer:
    """Iterations of ours and of the textbook's, to the same residual by the recurrence."""
    problem, rows = problems.trained(plan.network), []
    G = ggn(problem)
    for right, b in problems.right_sides(problem).items():
        for damping in plan.dampings[1:]:
            _, info = solve(G.damped(damping), b, plan.max_iter)
            kept = G.linearize().damped(damping)
            x, iterations = textbook(lambda v, A=kept: A @ v, b, RESIDUAL, plan.max_iter)
            rows.append(
                {
                    "right": right,
                    "damping": damping,
                    "ours": {"iterations": int(info.num_iterations), "residual": float(info.residual_norm)},
                    "textbook": {
                        "iterations": iterations,
                        "residual": problems.residual(problems.ggn_product, problem, damping, x, b),
                    },
                }
            )
            print(
                f"  {right} {damping:g}: {int(info.num_iterations)} iterations, the textbook's {iterations}", flush=True
            )
    return {"network": plan.network, "facts": problems.facts(problem), "rows": rows}


def path(plan: Plan) -> Answer:
    """All dampings at once against one by one."""
    problem, rows = problems.trained(plan.network), []
    G, b = ggn(problem), problems.right_sides(problem)["gradient"]
    largest, smallest = plan.dampings[0], plan.dampings[-1]
    ratio = smallest / largest
    dampings = [largest * ratio ** (i / (plan.num_path - 1)) for i in range(plan.num_path)]

    def told(solutions: list[Tensor], products: list[int]) -> Answer:
        pairs = zip(dampings, solutions, strict=True)
        worst = max(problems.residual(problems.ggn_product, problem, damping, x, b) for damping, x in pairs)
        return {"products": sum(products), "most": max(products), "residual": worst}

    def by_path() -> Any:
        return damping_path(G, b, dampings, rtol=RESIDUAL, max_iter=plan.max_iter)

    def one_by_one() -> Any:
        return [solve(G.damped(damping), b, plan.max_iter) for damping in dampings]

    rows = race(
        {
            "path": contender(by_path, lambda found: told(found.solutions, [found.num_matvecs])),
            "single": contender(one_by_one, lambda f: told([x for x, _ in f], [i.num_matvecs for _, i in f])),
        },
        plan.effort,
    )
    rows["hardest"] = {"products": rows["single"]["most"]}
    print(f"  path: {rows['path']['products']} products, hardest {rows['hardest']['products']}", flush=True)
    return {"network": plan.network, "facts": problems.facts(problem), "dampings": dampings, **rows}
