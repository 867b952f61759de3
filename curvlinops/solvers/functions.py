"""Traces of functions of symmetric operators, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.checks import check_self_adjoint
from curvlinops.solvers.columns import working_dtype
from curvlinops.solvers.info import warn_of_convergence
from curvlinops.solvers.krylov.runs import LanczosRuns
from curvlinops.solvers.random_vectors import DEFAULT_SEED
from curvlinops.solvers.watch import Limits, Watch


class FunctionTrace(NamedTuple):
    """The estimated trace of a function of a matrix, and how far it may be off.

    Attributes:
        value: The estimate, without axes.
        stderr: Its standard error over the probes; zero where the value is exact.
        truncation: How much the estimate changes when a quarter of the Lanczos steps is left out: the size of the
            bias that more steps would remove. Zero where the steps were enough to be exact.
    """

    value: Tensor
    stderr: Tensor
    truncation: Tensor


def trace_of_function(
    A: LinearOperator,
    f: Callable[[Tensor], Tensor],
    num_probes: int = 10,
    num_steps: int = 50,
    *,
    distribution: str = "rademacher",
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
) -> Tensor | FunctionTrace:
    r"""The trace of f(A) for a symmetric operator, by stochastic Lanczos quadrature.

    .. math::
        \operatorname{tr} f(A) \approx
            \frac{1}{R} \sum_{r=1}^R \| v_r \|^2 \sum_{i=1}^m w_{ri} f(\theta_{ri})

    where θ and w are the nodes and weights of the Gauss quadrature that m Lanczos steps from the r-th probe v give. It
    is exact for each probe where f is a polynomial of degree 2m - 1.

    **Cost**: num_probes · num_steps products, as many probes together as keep the basis, which takes
    (num_steps + 1) · D numbers for each of them, below 2²⁶ numbers; one probe at least.

    **Reference**: Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature,
    doi:10.1137/16M1104974.

    Args:
        A: The operator, self-adjoint.
        f: Maps a float64 tensor of eigenvalues to a tensor of the same shape, entry by entry.
        num_probes: Number of probes, R.
        num_steps: Lanczos steps for each probe, m.
        distribution: Of the probes: ``"rademacher"``, ``"normal"`` or ``"sphere"``, which is uniform on the sphere of
            radius √D.
        seed: Seed of the probes.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        progressbar: Whether to show a progress bar.
        return_stderr: Whether to return a :class:`FunctionTrace`, which needs two probes and two steps at least.

    Returns:
        The estimate, a tensor without axes; or value, standard error and truncation error.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, an option is out of range, or f is not finite at a Ritz value.

    >>> from curvlinops import Diagonal
    >>> A = Diagonal(torch.tensor([1.0, 4.0, 9.0]))
    >>> round(trace_of_function(A, torch.sqrt).item(), 4)
    6.0
    """
    least = 2 if return_stderr else 1
    if num_probes < least:
        raise ValueError(f"num_probes: expected at least {least}{' for errors' * (least - 1)}, got {num_probes}.")
    if num_steps < least:
        raise ValueError(f"num_steps: expected at least {least}{' for errors' * (least - 1)}, got {num_steps}.")
    runs = LanczosRuns(A, num_steps, distribution=distribution, seed=seed, generator=generator)
    with Watch(Limits(progressbar=progressbar), A, "trace of function") as watch, torch.no_grad():
        runs.extend(num_probes, watch)
    full = _quadrature(runs, f, num_steps)
    value = full.mean().to(working_dtype(A.dtype))
    if num_steps < 2:
        return value
    fewer = _quadrature(runs, f, num_steps - -(-num_steps // 4))
    change = torch.where(runs.is_invariant(), 0.0, full - fewer).mean().abs()
    _warn_of_truncation(float(change), float(value), num_steps)
    if not return_stderr:
        return value
    stderr = full.std() / num_probes**0.5
    return FunctionTrace(value, stderr.to(value.dtype), change.to(value.dtype))


def _warn_of_truncation(change: float, value: float, num_steps: int) -> None:
    if change > 0.02 * abs(value):
        warn_of_convergence(
            f"{num_steps} Lanczos steps are too few for this function: with a quarter fewer, the trace {value:.3g} "
            f"changes by {change:.2g}. Raise num_steps, add damping, or, in float32, use float64."
        )


def _quadrature(runs: LanczosRuns, f: Callable[[Tensor], Tensor], num_steps: int) -> Tensor:
    """vᵀ f(A) v for the vector v that each run started from ``[R]``."""
    nodes, weights = runs.quadrature(num_steps=num_steps)
    values = f(nodes)
    if not isinstance(values, Tensor) or values.shape != nodes.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"f: expected a tensor of the shape of its argument, {list(nodes.shape)}, got {got}.")
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"f: expected finite values, got {values[bad][0].item()} at {nodes[bad][0].item():.3g}, which is an "
            "approximate eigenvalue of A. Add damping if f is singular there."
        )
    return runs.squared_norms() * (weights * values.double()).sum(1)


def logdet(
    A: LinearOperator,
    num_probes: int = 10,
    num_steps: int = 50,
    *,
    distribution: str = "rademacher",
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
) -> Tensor | FunctionTrace:
    r"""The logarithm of the determinant of a positive definite operator, :math:`\operatorname{tr} \log A`.

    Closed forms, which have a method ``logdet``, answer exactly. Else it is :func:`trace_of_function` of the
    logarithm, with its cost, its arguments and its errors. The smaller the smallest eigenvalue, the more steps it
    takes: about √κ for a condition number κ.

    **Reference**: Ubaru, Chen, Saad (2017), doi:10.1137/16M1104974.

    Args:
        A: The operator, positive definite. Add damping first: ``A.damped(1e-3)``.
        num_probes: Number of probes.
        num_steps: Lanczos steps for each probe.
        distribution: Of the probes: ``"rademacher"``, ``"normal"`` or ``"sphere"``.
        seed: Seed of the probes.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        progressbar: Whether to show a progress bar.
        return_stderr: Whether to return a :class:`FunctionTrace`; its errors are zero for closed forms.

    Returns:
        The estimate, a tensor without axes; or value, standard error and truncation error.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, an option is out of range, or a Ritz value is not positive.

    >>> from curvlinops import Diagonal
    >>> round(logdet(Diagonal(torch.tensor([1.0, 4.0, 9.0]))).item(), 4)
    3.5835
    """
    check_self_adjoint(A, "logdet")
    if hasattr(A, "logdet"):
        try:
            exact: Tensor = A.logdet()
        except NotImplementedError:
            pass  # a block without a closed form
        else:
            zero = torch.zeros_like(exact)
            return FunctionTrace(exact, zero, zero) if return_stderr else exact

    def log(values: Tensor) -> Tensor:
        check_positive(values, torch.finfo(A.dtype).eps, "logdet")
        return values.log()

    return trace_of_function(
        A,
        log,
        num_probes,
        num_steps,
        distribution=distribution,
        seed=seed,
        generator=generator,
        progressbar=progressbar,
        return_stderr=return_stderr,
    )


def check_positive(values: Tensor, eps: float, what: str) -> None:
    """Refuse Ritz values ``[R, m]`` which are not positive beyond rounding.

    Raises:
        ValueError: If there is one.
    """
    smallest, largest = float(values.min()), float(values.abs().max())
    if smallest <= eps * largest:
        raise ValueError(
            f"{what} needs a positive definite operator, but it has a Ritz value of {smallest:.3g}, where the largest "
            f"is {largest:.3g} and rounding is {eps * largest:.1g}. Add damping, A.damped(...), or use float64."
        )
