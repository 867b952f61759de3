"""Solving (Σ w F + λI) x = b by what suits the matrix; what no matrix sees stays zero where λ = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops import BlockDiagonal, InverseLinearOperator, LinearOperator

#: Makes the inverse of an operator.
Solver = Callable[[LinearOperator], LinearOperator]


class Solution(NamedTuple):
    """A solution, and how it was found.

    Attributes:
        x: The solution ``[D]``.
        iterations: Iterations that were made, the most of any block.
        method: How.
    """

    x: Tensor
    iterations: int
    method: str


def solve(A: LinearOperator, b: Tensor, x0: Tensor, is_damped: bool, rtol: float | None) -> Solution:
    """The solution of A x = b: a closed form, else block by block, else by iteration from x0.

    A matrix that is not damped may be singular. Where it has a closed form, that is the pseudo-inverse; else the
    iteration leaves what the matrix does not see as it is in x0.

    Args:
        A: The matrix.
        b: The right-hand side ``[D]``.
        x0: Where iterations begin ``[D]``.
        is_damped: Whether a multiple of the identity is part of A.
        rtol: The relative residual of iterations; None for what suits the dtype.
    """
    if is_damped:
        inverse = InverseLinearOperator(A, rtol=rtol, x0=x0)
        x: Tensor = inverse @ b
        return Solution(x, _iterations(inverse), inverse.method)
    if hasattr(A, "pinv"):
        return Solution(A.pinv() @ b, 0, "closed form")
    if isinstance(A, BlockDiagonal) and len(A.blocks) > 1:
        return _solve_blocks(A, b, x0, rtol)
    return solve(A, b, x0, True, rtol)


def _solve_blocks(A: BlockDiagonal, b: Tensor, x0: Tensor, rtol: float | None) -> Solution:
    sizes = A.domain.sizes
    parts, starts = b.split(sizes), x0.split(sizes)
    found: dict[int, Tensor] = {}
    iterations = 0
    for block, own in zip(A.blocks, A.positions, strict=True):
        right, start = (torch.cat([vector[i] for i in own]) for vector in (parts, starts))
        solution = solve(block, right, start, False, rtol)
        found.update(zip(own, solution.x.split([sizes[i] for i in own]), strict=True))
        iterations = max(iterations, solution.iterations)
    return Solution(torch.cat([found[i] for i in range(len(sizes))]), iterations, "block by block")


def solve_by(solver: Solver, A: LinearOperator, b: Tensor, x0: Tensor) -> Solution:
    """The solution by a user's solver, which finds the correction of x0.

    Args:
        solver: Makes an operator with the products of the inverse.
        A: The matrix.
        b: The right-hand side ``[D]``.
        x0: Where it begins ``[D]``.

    Raises:
        TypeError: If the solver does not make an operator.
    """
    inverse = solver(A)
    if not isinstance(inverse, LinearOperator):
        raise TypeError(f"solver: expected a function of an operator to its inverse, it gave {type(inverse).__name__}.")
    has_start = bool(x0.any())
    correction: Tensor = inverse @ (b - A @ x0 if has_start else b)
    return Solution(x0 + correction if has_start else correction, _iterations(inverse), type(inverse).__name__)


def _iterations(inverse: Any) -> int:
    """The iterations that an inverse says it made; none where it does not say."""
    made = getattr(getattr(inverse, "info", None), "num_iterations", None)
    return 0 if made is None else int(torch.as_tensor(made).max())
