"""Hutch++: the trace on the range of a sketch exactly, the trace of the rest by Hutchinson's estimator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvlinops.estimators.estimate import EstimateWithError, SampleMean, dependent, exact
from curvlinops.estimators.hutchinson import trace_samples
from curvlinops.estimators.probes import Sampler
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.exact import exact_diagonal
from curvlinops.solvers.checks import checked_count
from curvlinops.solvers.random_vectors import DEFAULT_SEED


def hutchpp_trace(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> Tensor | EstimateWithError:
    r"""Estimate the trace of a square matrix, exactly on the range of a sketch and by random vectors off it.

    With Q an orthonormal basis of the range of A S, where S holds k random vectors, the estimate is
    :math:`\operatorname{tr}(Q^\top A Q)` plus Hutchinson's estimate for :math:`(I - Q Q^\top) A (I - Q Q^\top)`. A
    third of the products goes into S, a third into A Q, and the rest into Hutchinson's estimate. Unbiased for every
    square matrix, and exact where k reaches the rank. For positive semi-definite matrices the relative error falls as
    one over the number of products.

    **Cost**: ``num_matvecs`` products, O(D k²) for the basis, and memory for 2 k vectors and one chunk. Where
    ``num_matvecs`` reaches D, the exact trace by D products.

    **Reference**: Meyer, Musco, Musco, Woodruff (2021), Hutch++: optimal stochastic trace estimation, arXiv:2010.09649.

    Args:
        A: A square operator, or a matrix ``[D, D]``.
        num_matvecs: Number of products with vectors, at least 3.
        distribution: Of the vectors: ``"rademacher"`` (signs), ``"normal"``, or ``"sphere"`` (uniform on the sphere of
            radius √D).
        seed: Seed of the vectors; the same seed gives the same estimate.
        generator: Drawn from in place of a new one with this seed, so that successive calls are independent; it must
            live on the device of A.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`EstimateWithError`; it takes at least 4 products. The error is the
            standard error of Hutchinson's part.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers. It changes the
            estimate by rounding only.

    Returns:
        The estimate, a tensor without axes in the dtype of A; with ``return_stderr`` the pair of it and its error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not square, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> u = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> round(hutchpp_trace(u.T @ u, num_matvecs=3).item(), 3)
    55.0
    """
    reason = " (return_stderr=True needs two for the rest)" if return_stderr else ""
    num_matvecs = checked_count(num_matvecs, 4 if return_stderr else 3, f"hutchpp_trace: num_matvecs{reason}")
    sampler = Sampler.of("hutchpp_trace", A, distribution, seed, generator, chunk_size, progressbar)
    if num_matvecs >= sampler.A.shape[0]:
        return exact(exact_diagonal(sampler.A).double().sum(), sampler.A.dtype, return_stderr)
    num_sketch = num_matvecs // 3
    Q, _ = torch.linalg.qr(sampler.product(sampler.probes(num_sketch)))
    known = trace_samples(Q, sampler.product(Q)).sum()
    rest = _residual_mean(sampler, Q, num_matvecs - 2 * num_sketch, return_stderr)
    return dependent(known + rest.value, rest.stderr if return_stderr else None, sampler.A.dtype)


def _residual_mean(sampler: Sampler, Q: Tensor, num_probes: int, has_error: bool) -> SampleMean:
    """The mean of vᵀ(I - QQᵀ) A (I - QQᵀ) v over probes v."""
    mean = SampleMean(has_error)
    for start in range(0, num_probes, sampler.chunk_size):
        V = sampler.probes(min(sampler.chunk_size, num_probes - start))
        V = V - Q @ (Q.T @ V)
        mean.add(trace_samples(V, sampler.product(V)))
    return mean
