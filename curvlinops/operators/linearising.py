"""Linearising what nodes are made of: which engine, and how they share the memory."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops.memory import default_budget
from curvlinops.operators.base import LinearOperator


def linearized(operator: LinearOperator, max_memory: int | None, engine: str) -> LinearOperator:
    """The operator, linearised; one that a user wrote need not know engines."""
    return operator.linearize(max_memory) if engine == "auto" else operator.linearize(max_memory, engine=engine)


def shared_memory(max_memory: int | None, operators: Sequence[LinearOperator]) -> int | None:
    """What each of several operators may keep when all are linearised; those with nothing to prepare keep nothing."""
    prepared = [o for o in operators if type(o).linearize is not LinearOperator.linearize]
    if len(prepared) < 2:
        return max_memory
    return (default_budget(prepared[0].device) if max_memory is None else max_memory) // len(prepared)
