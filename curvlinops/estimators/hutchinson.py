"""Hutchinson's estimators: means of independent samples of traces, diagonals and squared norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from curvlinops.estimators.estimate import Estimate, SampleMean, independent
from curvlinops.estimators.probes import Sampler
from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.checks import checked_count
from curvlinops.solvers.random_vectors import DEFAULT_SEED

#: Maps probes V ``[D, k]`` and products A V to samples ``[..., k]``.
Kernel = Callable[[Tensor, Tensor], Tensor]


def trace_samples(V: Tensor, AV: Tensor) -> Tensor:
    """One sample vᵀA v of the trace for each probe ``[k]``."""
    return (V * AV).sum(0, dtype=torch.float64)


def diagonal_samples(V: Tensor, AV: Tensor) -> Tensor:
    """One sample v ∘ A v of the diagonal for each probe ``[D, k]``."""
    return V * AV


def squared_fro_samples(V: Tensor, AV: Tensor) -> Tensor:
    """One sample ‖A v‖² of the squared Frobenius norm for each probe ``[k]``."""
    # The square of a float32 may leave its range where the norm does not.
    norms: Tensor = torch.linalg.vector_norm(AV, dim=0, dtype=torch.float64)
    return norms.square()


def mean_of(kernel: Kernel, sampler: Sampler, num_matvecs: int, has_error: bool) -> SampleMean:
    """The mean of a kernel's samples over probes.

    Args:
        kernel: The samples of a chunk of probes.
        sampler: Draws and multiplies the probes.
        num_matvecs: Number of probes.
        has_error: Whether the standard error will be asked for.
    """
    mean = SampleMean(has_error)
    for V, AV in sampler.pairs(num_matvecs):
        mean.add(kernel(V, AV))
    return mean


def checked_num_probes(name: str, num_matvecs: int, return_stderr: bool) -> int:
    """The number of probes, of which a standard error needs two."""
    reason = " (return_stderr=True needs two)" if return_stderr else ""
    return checked_count(num_matvecs, 2 if return_stderr else 1, f"{name}: num_matvecs{reason}")


def hutchinson_trace(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> Tensor | Estimate:
    r"""Estimate the trace of a square matrix as the mean of :math:`v^\top A v` over random vectors v.

    Unbiased for every square matrix. The error falls as one over the root of the number of products; its variance for
    one Rademacher vector and a symmetric matrix is :math:`2 (\|A\|_F^2 - \sum_i A_{ii}^2)`.

    **Cost**: ``num_matvecs`` products, and the memory of one chunk.

    **Reference**: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines, doi:10.1080/03610919008812866.

    Args:
        A: A square operator, or a matrix ``[D, D]``.
        num_matvecs: Number of products with vectors.
        distribution: Of the vectors: ``"rademacher"`` (signs), ``"normal"``, or ``"sphere"`` (uniform on the sphere of
            radius √D).
        seed: Seed of the vectors; the same seed gives the same estimate.
        generator: Drawn from in place of a new one with this seed, so that successive calls are independent; it must
            live on the device of A.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`Estimate` with the standard error, for which two vectors are needed.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers. It changes the
            estimate by rounding only.

    Returns:
        The estimate, a tensor without axes in the dtype of A; with ``return_stderr`` the pair of it and its error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not square, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> hutchinson_trace(A, num_matvecs=2).item()
    6.0
    """
    num_matvecs = checked_num_probes("hutchinson_trace", num_matvecs, return_stderr)
    sampler = Sampler.of("hutchinson_trace", A, distribution, seed, generator, chunk_size, progressbar)
    mean = mean_of(trace_samples, sampler, num_matvecs, return_stderr)
    return independent(mean, sampler.A.dtype, return_stderr)


def hutchinson_diag(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> Tensor | Estimate:
    r"""Estimate the diagonal of a square matrix as the mean of :math:`v \circ A v` over random vectors v.

    Unbiased for every square matrix. With signs, the variance of an entry for one vector is the sum of squares of the
    other entries of its row; the other two distributions add the diagonal's own.

    **Cost**: ``num_matvecs`` products, and the memory of one chunk and of the estimate in float64.

    **Reference**: Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix,
    doi:10.1016/j.apnum.2007.01.003.

    Args:
        A: A square operator, or a matrix ``[D, D]``.
        num_matvecs: Number of products with vectors.
        distribution: Of the vectors: ``"rademacher"`` (signs), ``"normal"``, or ``"sphere"`` (uniform on the sphere of
            radius √D).
        seed: Seed of the vectors; the same seed gives the same estimate.
        generator: Drawn from in place of a new one with this seed, so that successive calls are independent; it must
            live on the device of A.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`Estimate` with the standard error of each entry, for which two
            vectors are needed.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers. It changes the
            estimate by rounding only.

    Returns:
        The estimate ``[D]`` in the dtype of A; with ``return_stderr`` the pair of it and its errors.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not square, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> hutchinson_diag(A, num_matvecs=2).tolist()
    [1.0, 2.0, 3.0]
    """
    num_matvecs = checked_num_probes("hutchinson_diag", num_matvecs, return_stderr)
    sampler = Sampler.of("hutchinson_diag", A, distribution, seed, generator, chunk_size, progressbar)
    mean = mean_of(diagonal_samples, sampler, num_matvecs, return_stderr)
    return independent(mean, sampler.A.dtype, return_stderr)


def hutchinson_squared_fro(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> Tensor | Estimate:
    r"""Estimate the squared Frobenius norm of any matrix as the mean of :math:`\|A v\|^2` over random vectors v.

    This is Hutchinson's estimate of the trace of :math:`A^\top A`. A may be rectangular.

    **Cost**: ``num_matvecs`` products, none with the adjoint, and the memory of one chunk.

    **Reference**: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines, doi:10.1080/03610919008812866.

    Args:
        A: An operator, or a matrix ``[rows, columns]``.
        num_matvecs: Number of products with vectors.
        distribution: Of the vectors: ``"rademacher"`` (signs), ``"normal"``, or ``"sphere"`` (uniform on the sphere
            whose squared radius is the number of columns).
        seed: Seed of the vectors; the same seed gives the same estimate.
        generator: Drawn from in place of a new one with this seed, so that successive calls are independent; it must
            live on the device of A.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`Estimate` with the standard error, for which two vectors are needed.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers. It changes the
            estimate by rounding only.

    Returns:
        The estimate, a tensor without axes in the dtype of A; with ``return_stderr`` the pair of it and its error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.
        FloatingPointError: If a product, or the squared norm in the dtype of A, is not finite.

    >>> A = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> hutchinson_squared_fro(A, num_matvecs=1).item()
    25.0
    """
    num_matvecs = checked_num_probes("hutchinson_squared_fro", num_matvecs, return_stderr)
    sampler = Sampler.of(
        "hutchinson_squared_fro", A, distribution, seed, generator, chunk_size, progressbar, square=False
    )
    mean = mean_of(squared_fro_samples, sampler, num_matvecs, return_stderr)
    return independent(mean, sampler.A.dtype, return_stderr)
