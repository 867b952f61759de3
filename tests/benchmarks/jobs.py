"""What each item does inside one environment: what is prepared, what is timed, and what else is worth knowing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact
from torch import Tensor, nn

import curvlinops
from tests.benchmarks import pushes, solves
from tests.benchmarks.items import DIAGONALS, MATRICES, NUM_PRODUCTS, Item
from tests.benchmarks.networks import Problem

MIB = 2**20
Facts = dict[str, Any]


class NotOffered(Exception):
    """The environment's curvlinops has no such class or method."""


@dataclass(frozen=True)
class Job:
    """An item, ready to be measured.

    Attributes:
        run: What is measured; it gets what ``begin`` returned.
        begin: Called anew before each measurement, and not measured.
        facts: What else there is to say about the item.
        is_series: Whether ``run`` returns points of time (CPU, wall) after its start.
    """

    run: Callable[[Any], Any]
    begin: Callable[[], Any] = lambda: None
    facts: Facts = field(default_factory=dict)
    is_series: bool = False


def gradient(problem: Problem) -> tuple[Tensor, ...]:
    """Compute one gradient over all data with plain autograd: the unit of all ratios."""
    total: tuple[Tensor, ...] | None = None
    for X, y in problem.data:
        grads = torch.autograd.grad(problem.loss(problem.model(X), y), problem.params)
        total = grads if total is None else tuple(a + b for a, b in zip(total, grads))
    assert total is not None
    return total


def prepare(problem: Problem, item: Item, facts: Facts, for_memory: bool = False) -> Job:
    """Build everything that is not part of the item.

    Args:
        problem: The network with its data.
        item: What to measure.
        facts: What another environment has found out about the same item.
        for_memory: Whether peak memory is to be measured: that of linearised products includes their preparation.
    """
    match item.action:
        case "gradient":
            return Job(lambda _: gradient(problem))
        case "diagonal":
            return _diagonal(problem, item.matrix)
        case "diagonal_backpack":
            return _backpack_diagonal(problem)
        case "push" | "push_first":
            return Job(*pushes.prepare(problem, item.matrix, is_first=item.action == "push_first"))
        case "cumulative_streamed" | "cumulative_kept":
            return _cumulative(problem, item)

    cls = find(MATRICES[item.matrix][1])
    head = (problem.model, problem.loss, problem.params, problem.data)
    match item.action:
        case "construct":
            return Job(lambda _: cls(*head))
        case "construct_unchecked":
            return Job(lambda _: cls(*head, check_deterministic=False))
        case "first":
            vector = random_vector(problem)
            return Job(lambda _: cls(*head) @ vector)
        case "solve":
            return Job(*solves.prepare(problem, lambda p: _operator(p, item.matrix), facts, for_memory))
    return _product(problem, item, for_memory)


def _product(problem: Problem, item: Item, for_memory: bool) -> Job:
    """A product with an operator that exists, streamed, lean or linearised."""
    num_columns = {"columns16": 16, "columns16_kept": 16, "columns64": 64}.get(item.action, item.num_columns)
    operand = random_vector(problem, () if num_columns is None else (num_columns,))
    operator = _operator(problem, item.matrix)
    if item.action == "lean":
        operator = operator.linearize(max_memory=0)
    elif item.action in ("kept", "columns16_kept"):
        linearized = operator.linearize(engine=MATRICES[item.matrix][2])
        if for_memory:
            return Job(lambda _: (linearized @ operand, linearized @ operand)[1])
        _ = linearized @ operand
        keeper = linearized._risk.keeper
        return Job(
            lambda _: linearized @ operand,
            facts={"engine": keeper.engine or "tangents", "kept_mib": round(keeper.num_bytes / MIB, 1)},
        )
    return Job(lambda _: operator @ operand)


def _cumulative(problem: Problem, item: Item) -> Job:
    """The first products of a new operator one after the other, with when each of them was done."""
    vector = random_vector(problem)
    is_kept, engine = item.action == "cumulative_kept", MATRICES[item.matrix][2]

    def run(operator: Any) -> list[tuple[float, float]]:
        times = [_now(problem)]
        if is_kept:
            operator = operator.linearize(engine=engine)
        for _ in range(NUM_PRODUCTS):
            _ = operator @ vector
            times.append(_now(problem))
        return [(cpu - times[0][0], wall - times[0][1]) for cpu, wall in times[1:]]

    return Job(run, lambda: _operator(problem, item.matrix), is_series=True)


def _diagonal(problem: Problem, matrix: str) -> Job:
    """Compute a new diagonal, at its first use."""
    _, name, options = DIAGONALS[matrix]
    cls = find(name)
    head = (problem.model, problem.loss, problem.params, problem.data)
    return Job(lambda D: D.diagonal(), lambda: cls(*head, check_deterministic=False, **options))


def _backpack_diagonal(problem: Problem) -> Job:
    """One backward of BackPACK, which computes the gradient as well."""
    model, loss = extend(copy.deepcopy(problem.model)), extend(nn.CrossEntropyLoss())
    ((X, y),) = problem.data

    def begin() -> None:
        for p in model.parameters():
            p.grad = None
            p.__dict__.pop("diag_ggn_exact", None)

    def run(_: Any) -> None:
        with backpack(DiagGGNExact()):
            loss(model(X), y).backward()

    run(None)
    mine = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
    ours = _diagonal(problem, "ggn")
    expected = ours.run(ours.begin())
    return Job(run, begin, {"relative_difference": float((mine - expected).norm() / mine.norm())})


def _operator(problem: Problem, matrix: str) -> Any:
    head = (problem.model, problem.loss, problem.params, problem.data)
    return find(MATRICES[matrix][1])(*head, check_deterministic=False)


def find(name: str) -> Callable[..., Any]:
    """A class of the environment's curvlinops."""
    if not hasattr(curvlinops, name):
        raise NotOffered(name)
    return getattr(curvlinops, name)


def random_vector(problem: Problem, shape: tuple[int, ...] = ()) -> Tensor:
    """A vector, or columns, for products; the same in all environments."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(problem.num_params, *shape, generator=generator).to(problem.params[0])


def _now(problem: Problem) -> tuple[float, float]:
    if problem.params[0].device.type != "cpu":
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()
