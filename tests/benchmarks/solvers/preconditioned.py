"""Which preconditioners pay: iterations, products with set-up, and CPU time with set-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from curvlinops import (
    EFDiagonalLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    NystromPreconditioner,
    jacobi_preconditioner,
)
from curvlinops.operators.base import LinearOperator
from tests.benchmarks.networks import Problem
from tests.benchmarks.solvers import problems
from tests.benchmarks.solvers.plan import RESIDUAL, Plan
from tests.benchmarks.solvers.race import Answer, Effort, contender, race
from tests.benchmarks.solvers.single import ggn, solve

Builder = Callable[[Problem, LinearOperator, float], LinearOperator | None]
SHARED_COLUMNS = 4


def _head(problem: Problem) -> tuple[Any, ...]:
    return problem.model, problem.loss, problem.params, problem.data


def _jacobi(cls: type[LinearOperator]) -> Builder:
    return lambda problem, _, c: jacobi_preconditioner(cls(*_head(problem), check_deterministic=False), c)


def _nystrom(rank: int) -> Builder:
    return lambda problem, G, c: NystromPreconditioner(G, rank, c)


def _sampled_fisher(num_data: int | None) -> Builder:
    """The exact inverse of a Monte-Carlo Fisher with one sample a datum, of the first data or of all."""

    def build(problem: Problem, _: LinearOperator, c: float) -> LinearOperator:
        some = problem if num_data is None else replace(problem, data=_first(problem, num_data))
        return FisherMCLinearOperator(*_head(some), check_deterministic=False).to_low_rank().damped(c).inverse()

    return build


def _first(problem: Problem, num_data: int) -> list[tuple[Tensor, Tensor]]:
    X, y = problem.data[0]
    if len(y) < num_data:
        raise ValueError(f"The first mini-batch has {len(y)} data, fewer than {num_data}.")
    return [(X[:num_data], y[:num_data])]


def builders(plan: Plan) -> dict[str, tuple[str, Builder, int]]:
    """Each preconditioner's title, how it is made, and the products that takes."""
    half = plan.num_data // 2
    return {
        "none": ("none", lambda *_: None, 0),
        "jacobi_ggn": ("Jacobi, diagonal of the GGN", _jacobi(GGNDiagonalLinearOperator), 0),
        "jacobi_ef": ("Jacobi, diagonal of the empirical Fisher", _jacobi(EFDiagonalLinearOperator), 0),
        **{f"nystrom{rank}": (f"Nyström, rank {rank}", _nystrom(rank), rank) for rank in plan.ranks},
        "fisher_half": (f"MC-Fisher of {half} data, exact inverse", _sampled_fisher(half), 0),
        "fisher_all": (f"MC-Fisher of all {plan.num_data} data, exact inverse", _sampled_fisher(None), 0),
    }


def run(plan: Plan, network: str) -> Answer:
    """The dampings of each right-hand side, and of several at once."""
    problem = problems.trained(network, plan.num_data, num_batches=2)
    right = {**problems.right_sides(problem), "columns": problems.random_columns(problem, SHARED_COLUMNS)}
    dampings = {"gradient": plan.hard_dampings, "random": plan.random_dampings, "columns": plan.shared_dampings}
    solve(ggn(problem).damped(1.0), right["gradient"], 5)  # what loads late shall not count
    rows = []
    for name, B in right.items():
        for damping in dampings[name]:
            rows.append({"right": name, "damping": damping, **_compare(plan, problem, damping, B)})
            print(_describe(network, rows[-1]), flush=True)
    titles = {label: title for label, (title, _, _) in builders(plan).items()}
    return {
        "titles": titles,
        "network": network,
        "facts": problems.facts(problem),
        "rows": rows,
        "max_iter": plan.max_preconditioned,
    }


def with_mlp(plan: Plan) -> Answer:
    """The network of the other solves."""
    return run(plan, plan.network)


def with_conv(plan: Plan) -> Answer:
    """The network with convolutions."""
    return run(plan, plan.conv)


def _compare(plan: Plan, problem: Problem, damping: float, B: Tensor) -> Answer:
    G = ggn(problem)

    def told(found: tuple[Tensor, Any, int]) -> Answer:
        x, info, setup = found
        return {
            "iterations": int(info.num_iterations.max()),
            "products": info.num_matvecs + setup,
            "converged": bool(info.converged.all()),
            "residual": problems.residual(problems.ggn_product, problem, damping, x, B),
        }

    def one(build: Builder, setup: int) -> Callable[[], tuple[Tensor, Any, int]]:
        def work() -> tuple[Tensor, Any, int]:
            P = build(problem, G, damping)
            return *solve(G.damped(damping), B, plan.max_preconditioned, preconditioner=P), setup

        return work

    contenders = {label: contender(one(build, setup), told) for label, (_, build, setup) in builders(plan).items()}
    return {"sides": race(contenders, Effort(plan.effort.repeats, min(plan.effort.seconds, 3)))}


def _describe(network: str, row: Answer) -> str:
    words = [f"{label} {side['iterations']} ({side['ratio']:.2f})" for label, side in row["sides"].items()]
    return f"  {network} {row['right']} {row['damping']:g}: " + ", ".join(words) + f"; to {RESIDUAL:g}"
