"""Solving (Σ w F + λI) x = b by what suits the matrix; what no matrix sees stays zero where λ = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops import BlockDiagonal, CGInverseLinearOperator, Diagonal, LinearOperator, MINRESInverseLinearOperator

#: Makes the inverse of an operator.
Solver = Callable[[LinearOperator], LinearOperator]

#: The relative residual of a pseudo-inverse, which drops what is rounding on purpose.
_PSEUDO = 1e-3

#: The bound of the relative error of a closed form with damping.
_ERROR = 1e-2


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


def solve(A: LinearOperator, b: Tensor, x0: Tensor, damping: float, rtol: float | None) -> Solution:
    """The solution of A x = b: block by block, by a closed form, or by iteration from x0.

    A matrix that is not damped may be singular. Where it has a closed form, that is the pseudo-inverse; else the
    iteration leaves what the matrix does not see as it is in x0. Where a closed form is spoilt by rounding, as with
    little damping in single precision, the iteration takes over.

    Args:
        A: The matrix.
        b: The right-hand side ``[D]``.
        x0: Where iterations begin ``[D]``.
        damping: λ, the multiple of the identity that is part of A.
        rtol: The relative residual to reach; None for what suits the dtype.
    """
    if isinstance(A, BlockDiagonal) and len(A.blocks) > 1:
        return _solve_blocks(A, b, x0, damping, rtol)
    closed = _closed(A, b, damping > 0)
    if closed is None:
        return _iterate(A, b, x0, damping, rtol)
    rtol = (1e-8 if A.dtype == torch.float64 else 1e-5) if rtol is None else rtol
    residual = relative_residual(A, closed, b)
    # With damping the error is ‖b - A x‖ / λ at most, which rounding makes large where λ is next to nothing.
    error = residual * float(b.norm()) / damping if damping and not isinstance(A, Diagonal) else 0.0
    if residual <= (rtol if damping else max(rtol, _PSEUDO)) and error <= _ERROR * float(closed.norm()):
        return Solution(closed, 0, "closed form")
    iterated = _iterate(A, b, x0, damping, rtol)
    reached = relative_residual(A, iterated.x, b)
    is_better = reached <= 10 * rtol or not residual <= reached  # also where it is NaN
    return iterated if is_better else Solution(closed, iterated.iterations, "closed form")


def relative_residual(A: LinearOperator, x: Tensor, b: Tensor) -> float:
    """‖b - A x‖ / ‖b‖; ‖A x‖ where b is zero."""
    return float((b - A @ x).double().norm()) / (float(b.double().norm()) or 1.0)


def _closed(A: Any, b: Tensor, is_damped: bool) -> Tensor | None:
    """The solution by a closed form; None where there is none, or it finds the matrix singular."""
    if not hasattr(A, "inverse" if is_damped else "pinv"):
        return None
    try:
        inverse = A.inverse() if is_damped else A.pinv()
    except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return None
    x: Tensor = inverse @ b
    return x


def _iterate(A: LinearOperator, b: Tensor, x0: Tensor, damping: float, rtol: float | None) -> Solution:
    is_definite = damping > 0 and A.POSITIVE_SEMIDEFINITE
    inverse = (CGInverseLinearOperator if is_definite else MINRESInverseLinearOperator)(A, rtol=rtol, x0=x0)
    return Solution(inverse @ b, _iterations(inverse), "conjugate gradients" if is_definite else "MINRES")


def _solve_blocks(A: BlockDiagonal, b: Tensor, x0: Tensor, damping: float, rtol: float | None) -> Solution:
    sizes = A.domain.sizes
    parts, starts = b.split(sizes), x0.split(sizes)
    found: dict[int, Tensor] = {}
    solutions = []
    for block, own in zip(A.blocks, A.positions, strict=True):
        right, start = (torch.cat([vector[i] for i in own]) for vector in (parts, starts))
        solutions.append(solve(block, right, start, damping, rtol))
        found.update(zip(own, solutions[-1].x.split([sizes[i] for i in own]), strict=True))
    is_closed = {solution.method for solution in solutions} == {"closed form"}
    return Solution(
        torch.cat([found[i] for i in range(len(sizes))]),
        max(solution.iterations for solution in solutions),
        "closed form" if is_closed else "block by block",
    )


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
    if not callable(solver):
        raise TypeError(f"solver: expected a function of an operator to its inverse, got {type(solver).__name__}.")
    inverse = solver(A)
    if not isinstance(inverse, LinearOperator):
        raise TypeError(f"solver: expected a function of an operator to its inverse, it gave {type(inverse).__name__}.")
    has_start = bool(x0.any())
    correction: Tensor = inverse @ (b - A @ x0 if has_start else b)
    return Solution(
        x0 + correction if has_start else correction,
        _iterations(inverse),
        getattr(inverse, "method", type(inverse).__name__),
    )


def _iterations(inverse: Any) -> int:
    """The iterations that an inverse says it made; none where it does not say."""
    made = getattr(getattr(inverse, "info", None), "num_iterations", None)
    return 0 if made is None else int(torch.as_tensor(made).max())
