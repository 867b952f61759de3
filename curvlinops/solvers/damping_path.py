"""The solutions for many dampings from one Krylov run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.info import SolveInfo, warn_of_convergence
from curvlinops.solvers.krylov.cg import ConjugateGradients
from curvlinops.solvers.krylov.multishift import MultiShift
from curvlinops.solvers.krylov.open_columns import RowProduct, on_rows
from curvlinops.solvers.krylov.solve import Solve, power_of_two
from curvlinops.solvers.options import checked_max_iter, checked_rtol
from curvlinops.solvers.watch import Limits, Progress, Watch


class DampingPath(NamedTuple):
    """The solutions for many dampings.

    Attributes:
        solutions: For each damping, in the order asked for, a solution in the format of the right-hand sides.
        info: For each damping, what its solve did; iterations are those of the run that all share until this damping
            was done, and what it needed of its own. Products and history are those of its own.
        num_matvecs: All products, each column counted.
    """

    solutions: list[Any]
    info: list[SolveInfo]
    num_matvecs: int


def damping_path(
    A: LinearOperator,
    B: Any,
    dampings: Sequence[float] | Tensor,
    rtol: float | None = None,
    max_iter: int | None = None,
    *,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    progressbar: bool = False,
    callback: Callable[[Progress], Any] | None = None,
) -> DampingPath:
    r"""Solve :math:`(A + \lambda I) x = b` for many dampings λ by one run of conjugate gradients.

    All dampings share the Krylov space of the smallest, which is the hardest. Every solution is verified by its true
    residual; one that is not good enough, for the shared run cannot correct its rounding, is finished by conjugate
    gradients of its own.

    **Cost**: the products of the smallest damping alone, and one to verify each damping. Memory of two vectors for each
    damping and column.

    **Reference**: Jegerlehner (1996), Krylov space solvers for shifted linear systems, arXiv:hep-lat/9612014.

    Args:
        A: A self-adjoint operator, undamped; with the smallest damping it must be positive definite.
        B: Right-hand sides in any format.
        dampings: The numbers λ, in any order.
        rtol: Relative residual at which a system counts as solved; by default 1e-5 in float32 and below, 1e-8 in
            float64.
        max_iter: Iterations at most, for each damping; by default ten times the dimension, but at most 1000.
        max_matvecs: Products at most, each column counted, those that verify included.
        max_seconds: Wall-clock time after which no iteration begins.
        progressbar: Whether to show a progress bar.
        callback: Called with a ``Progress`` after each iteration, of the shared run and of what each damping needs
            of its own.

    Returns:
        Solutions and what was done, see :class:`DampingPath`.

    Raises:
        ValueError: If A is not self-adjoint, or an option is out of range.

    >>> from curvlinops import TensorLinearOperator
    >>> A = TensorLinearOperator(torch.diag(torch.tensor([0.0, 1.0])))
    >>> path = damping_path(A, torch.ones(2), [0.5, 1.0])
    >>> [[round(x, 4) for x in solution.tolist()] for solution in path.solutions]
    [[2.0, 0.6667], [1.0, 0.5]]
    """
    check_self_adjoint(A, "A damping path")
    values = _checked_dampings(dampings)
    limits = Limits(max_matvecs, max_seconds, progressbar, callback)
    rtol, most = checked_rtol(A.dtype, rtol), checked_max_iter(A.shape, max_iter)
    with torch.inference_mode(False), torch.no_grad():
        columns, form = A.domain.read(B)
        form.check(A.domain)
        flat = Space.merge(columns).to(working_dtype(A.dtype)).T.contiguous()
        A = prepared(A)
        order = sorted(range(len(values)), key=values.__getitem__)
        with Watch(limits, A, "Damping path", most) as watch:
            shared = _shared_run(A, flat, [values[i] for i in order], rtol, most, watch)
            finished = _finished(A, flat, [values[i] for i in order], shared, rtol, most, watch)
        answers = [form.write(A.domain.split(X.T.to(A.dtype)), A.domain) for X, _ in finished]
    place = sorted(range(len(values)), key=order.__getitem__)
    info = [finished[position][1] for position in place]
    _warn(values, info, rtol)
    return DampingPath([answers[position] for position in place], info, watch.num_matvecs)


def _checked_dampings(dampings: Sequence[float] | Tensor) -> list[float]:
    try:
        values = [float(value) for value in dampings]
    except TypeError:
        raise TypeError(f"dampings: expected a sequence of numbers, got {dampings!r}.") from None
    if not values:
        raise ValueError("dampings: expected at least one, got none.")
    wrong = [value for value in values if not isfinite(value)]
    if wrong:
        raise ValueError(f"dampings: expected finite numbers, got {wrong}.")
    return values


def _shared_run(
    A: LinearOperator, B: Tensor, values: Sequence[float], rtol: float, max_iter: int, watch: Watch
) -> MultiShift:
    unit = power_of_two(B)
    shifts = torch.tensor([value - values[0] for value in values], dtype=torch.float64, device=B.device)
    run = MultiShift(_damped_product(A, values[0], watch), B / unit, shifts)
    run.advance(rtol, max_iter, watch)
    run.X *= unit
    return run


def _finished(
    A: LinearOperator,
    B: Tensor,
    values: Sequence[float],
    shared: MultiShift,
    rtol: float,
    max_iter: int,
    watch: Watch,
) -> list[tuple[Tensor, SolveInfo]]:
    """Verify each solution, and go on with it where it is not good enough."""
    results = []
    for number, (value, X) in enumerate(zip(values, shared.X, strict=True)):
        watch.reserved = (len(values) - number - 1) * len(B)  # the others are still to be verified
        before, num_matvecs = shared.iterations[number], watch.num_matvecs
        product = _damped_product(A, value, watch)
        start = partial(ConjugateGradients, product, None)
        left = max_iter - int(before.max()) if len(B) else 0
        eps = torch.finfo(A.dtype).eps
        solve = Solve(start, product, B, X, rtol, left, eps, watch, largest=shared.largest)
        solution = solve.run()
        info = solve.info
        iterations, matvecs = info.num_iterations + before, info.num_matvecs - num_matvecs
        results.append((solution, replace(info, num_iterations=iterations, num_matvecs=matvecs)))
    return results


def _damped_product(A: LinearOperator, damping: float, watch: Watch) -> RowProduct:
    return on_rows(watch.counted(flat_product(A.damped(damping), A.dtype)))


def _warn(values: Sequence[float], info: Sequence[SolveInfo], rtol: float) -> None:
    failed = [(value, i) for value, i in zip(values, info, strict=True) if not bool(i.converged.all())]
    if not failed:
        return
    worst = max(float(i.residual_norm.max()) for _, i in failed)
    too_near = ", too near to it for the rounding of a residual" if worst <= rtol else ""
    broken = ", with negative curvature met" if any(bool(i.breakdown.any()) for _, i in failed) else ""
    dampings = ", ".join(f"{value:.2g}" for value, _ in failed)
    advice = "Raise max_iter, or leave out the smallest dampings"
    if broken:
        advice = "The operator is not positive definite: leave out the smallest dampings, or solve by MINRES"
    warn_of_convergence(
        f"The damping path did not reach the relative residual {rtol:.2g} at {len(failed)} of {len(values)} dampings "
        f"({dampings}): the largest is {worst:.2g}{too_near}{broken}. {advice}; "
        "info.attainable says what the precision allows."
    )
