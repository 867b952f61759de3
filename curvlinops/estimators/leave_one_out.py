"""XTrace, XDiag and XNysTrace: each random vector tests the sketch that is made of all the others."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvlinops.estimators.estimate import EstimateWithError, averaged, exact, inner
from curvlinops.estimators.hutchinson import trace_samples
from curvlinops.estimators.probes import Sampler
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.exact import exact_diagonal
from curvlinops.solvers.checks import checked_count
from curvlinops.solvers.random_vectors import DEFAULT_SEED

#: Stands in for zero where it would divide.
_TINY = torch.finfo(torch.float64).tiny


def xtrace(
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
    r"""Estimate the trace of a square matrix with a sketch from which each random vector is left out once.

    With m = ``num_matvecs`` / 2 vectors :math:`\omega_i`, and :math:`P_i` the projection on the range of A times all of
    them but :math:`\omega_i`, the estimate is the mean of
    :math:`\operatorname{tr}(P_i A P_i) + \omega_i^\top (I - P_i) A (I - P_i) \omega_i`. For normal and spherical
    vectors the last term is divided by the squared norm of :math:`(I - P_i) \omega_i` and multiplied by its mean.
    Unbiased for every square matrix, exact where m exceeds the rank, and as fast as the spectrum decays.

    **Cost**: ``num_matvecs`` products (fewer for a matrix of low rank), O(D m² + m³), and memory for 4 m vectors. Where
    ``num_matvecs`` reaches D, the exact trace by D products.

    **Reference**: Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic trace
    estimation, arXiv:2301.07825.

    Args:
        A: A square operator, or a matrix ``[D, D]``.
        num_matvecs: Number of products with vectors, even and at least 4.
        distribution: Of the vectors, as in :func:`hutchinson_trace`; ``"sphere"`` gives the estimate of ``"normal"``.
        seed: Seed of the vectors, as in :func:`hutchinson_trace`.
        generator: Drawn from in place of a new one with this seed, as there.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`EstimateWithError`: the standard error as if the m samples were
            independent.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers.

    Returns:
        The estimate, a tensor without axes in the dtype of A; with ``return_stderr`` the pair of it and its error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not square, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> u = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> round(xtrace(u.T @ u, num_matvecs=4).item(), 3)
    55.0
    """
    num_matvecs = checked_count(num_matvecs, 4, "xtrace: num_matvecs", even=True)
    sampler = Sampler.of("xtrace", A, distribution, seed, generator, chunk_size, progressbar)
    if num_matvecs >= sampler.A.shape[0]:
        return exact(exact_diagonal(sampler.A).double().sum(), sampler.A.dtype, return_stderr)
    return averaged(xtrace_samples(sampler, num_matvecs // 2), sampler.A.dtype, return_stderr)


def xdiag(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> Tensor | EstimateWithError:
    r"""Estimate the diagonal of a square matrix with a sketch from which each random vector is left out once.

    With m = ``num_matvecs`` / 2 vectors of signs :math:`\omega_i`, and :math:`P_i` the projection on the range of A
    times all of them but :math:`\omega_i`, the estimate is the mean of :math:`\operatorname{diag}(P_i A) + \omega_i
    \circ (I - P_i) A \omega_i`. Unbiased for every square matrix, and exact where m exceeds the rank.

    **Cost**: m products with A and m with its adjoint (fewer for a matrix of low rank), O(D m² + m³), and memory for
    7 m vectors. Where ``num_matvecs`` reaches D, the exact diagonal by D products.

    **Reference**: Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic trace
    estimation, arXiv:2301.07825.

    Args:
        A: A square operator that has an adjoint, or a matrix ``[D, D]``.
        num_matvecs: Number of products with vectors, even and at least 4.
        seed: Seed of the vectors, as in :func:`hutchinson_trace`.
        generator: Drawn from in place of a new one with this seed, as there.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`EstimateWithError`: for each entry the standard error as if the m
            samples were independent.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers.

    Returns:
        The estimate ``[D]`` in the dtype of A; with ``return_stderr`` the pair of it and its errors.

    Raises:
        TypeError, ValueError, FloatingPointError: As :func:`xtrace`.

    >>> u = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> [round(x, 3) for x in xdiag(u.T @ u, num_matvecs=4).tolist()]
    [1.0, 4.0, 9.0, 16.0, 25.0]
    """
    num_matvecs = checked_count(num_matvecs, 4, "xdiag: num_matvecs", even=True)
    sampler = Sampler.of("xdiag", A, "rademacher", seed, generator, chunk_size, progressbar)
    if num_matvecs >= sampler.A.shape[0]:
        return exact(exact_diagonal(sampler.A).double(), sampler.A.dtype, return_stderr)
    return averaged(xdiag_samples(sampler, num_matvecs // 2), sampler.A.dtype, return_stderr)


def xnystrace(
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
    r"""Estimate the trace of a positive semi-definite matrix with a Nyström approximation, each vector left out once.

    With m = ``num_matvecs`` vectors :math:`\omega_i`, and :math:`A_i = A \Omega_i (\Omega_i^\top A \Omega_i)^+
    \Omega_i^\top A` for the columns :math:`\Omega_i` that are all of them but :math:`\omega_i`, the estimate is the
    mean of :math:`\operatorname{tr}(A_i) + \omega_i^\top (A - A_i) \omega_i`. For normal and spherical vectors the last
    term is divided by the squared norm of the part of :math:`\omega_i` off the columns :math:`\Omega_i` and multiplied
    by its mean. Unbiased, and exact where m exceeds the rank. Since a vector takes one product only, it is the most
    accurate estimator here for matrices whose spectrum decays.

    **Cost**: ``num_matvecs`` products, O(D m² + m³), and memory for 3 m vectors. Where ``num_matvecs`` reaches D, the
    exact trace by D products.

    **Reference**: Epperly, Tropp, Webber (2024), XTrace: making the most of every sample in stochastic trace
    estimation, arXiv:2301.07825.

    Args:
        A: A self-adjoint operator, or a symmetric matrix ``[D, D]``; it must be positive semi-definite.
        num_matvecs: Number of products with vectors, at least 2.
        distribution: Of the vectors, as in :func:`hutchinson_trace`.
        seed: Seed of the vectors, as in :func:`hutchinson_trace`.
        generator: Drawn from in place of a new one with this seed, as there.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`EstimateWithError`: the standard deviation of the m samples, divided
            by the fourth root of m.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers.

    Returns:
        The estimate, a tensor without axes in the dtype of A; with ``return_stderr`` the pair of it and its error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not symmetric, or found to be indefinite, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> u = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> round(xnystrace(u.T @ u, num_matvecs=4).item(), 3)
    55.0
    """
    num_matvecs = checked_count(num_matvecs, 2, "xnystrace: num_matvecs")
    sampler = Sampler.of("xnystrace", A, distribution, seed, generator, chunk_size, progressbar)
    if not sampler.A.SELF_ADJOINT:
        raise ValueError("xnystrace: A: expected a symmetric matrix. Use xtrace for one that is not.")
    if num_matvecs >= sampler.A.shape[0]:
        return exact(exact_diagonal(sampler.A).double().sum(), sampler.A.dtype, return_stderr)
    # Samples share all columns but one, so the faster the decay, the less independent they are. Half way between both
    # extremes the error was right within a factor of 2.5 for every decay that was tried.
    return averaged(xnystrace_samples(sampler, num_matvecs), sampler.A.dtype, return_stderr, share=0.25)


# -- samples, one for each vector that is left out ---------------------------------------------------------------------


def xtrace_samples(sampler: Sampler, num_probes: int) -> Tensor:
    """One sample of the trace for each probe ``[m]``."""
    probes = sampler.probes(num_probes)
    Y = sampler.product(probes)
    B, S = _range_of(Y)
    Z = sampler.product(B)
    H = inner(B, Z)
    X = _kept_part(S, inner(B, probes)).to(Y.dtype)
    # From differences of vectors: a difference of their inner products would lose what is small beside the trace.
    U, AU = probes - B @ X, Y - Z @ X
    scale = _mean_over_square(U, len(H) - S.any(0).double()) if sampler.distribution != "rademacher" else 1.0
    return trace_samples(U, AU) * scale + H.trace() - (S * (H @ S)).sum(0)


def xdiag_samples(sampler: Sampler, num_probes: int) -> Tensor:
    """One sample of the diagonal for each probe ``[D, m]``."""
    probes = sampler.probes(num_probes)
    Y = sampler.product(probes)
    B, S = _range_of(Y)
    G = sampler.product(B, adjoint=True)
    X = _kept_part(S, inner(B, Y)).to(Y.dtype)
    removed = S.to(Y.dtype)
    return (B * G).sum(1, keepdim=True) - (B @ removed) * (G @ removed) + probes * (Y - B @ X)


def xnystrace_samples(sampler: Sampler, num_probes: int) -> Tensor:
    """One sample of the trace for each probe ``[m]``."""
    probes = sampler.probes(num_probes)
    Y = sampler.product(probes)
    gram, eps = inner(probes, probes), torch.finfo(sampler.A.dtype).eps
    noise = eps * float(torch.linalg.vector_norm(Y, dtype=torch.float64))
    # The estimate is made for A + shift · I: what that adds to the core is larger than the rounding of its products.
    shift = 8 * noise / len(probes)
    core = inner(probes, Y) + shift * gram
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    values, Vh = values.flip(0), vectors.T.flip(0)
    _check_positive(values, min(64 * num_probes * eps, 0.25))
    rank, S = _left_out(values.clamp(min=0.0).sqrt(), Vh, (2 * noise / max(float(values[0]), noise, _TINY)) ** 0.5)
    roots, V = values[:rank, None].sqrt(), Vh[:rank]
    F = (Y @ V.T.to(Y.dtype) + shift * (probes @ V.T.to(Y.dtype))) / roots.T.to(Y.dtype)
    # ωᵀ(A - A_i)ω: what the vector adds to the others, and what is too small for any of them to be seen.
    residual = (S * roots * V).sum(0).square() + (values[rank:, None] * Vh[rank:].square()).sum(0)
    if sampler.distribution != "rademacher":
        residual = residual * _nystrom_scale(gram, V, S.any(0), len(probes))
    samples: Tensor = F.square().sum(dtype=torch.float64) - (S * (inner(F, F) @ S)).sum(0) + residual
    return samples - shift * len(probes)


# -- small matrices, in float64 ----------------------------------------------------------------------------------------


def _left_out(sigma: Tensor, Vh: Tensor, rtol: float) -> tuple[int, Tensor]:
    """What the range of a matrix C = diag(σ) Vh ``[m, m]`` loses when one of its columns is left out.

    With C of full rank, column i of C⁻ᵀ is orthogonal to all other columns of C. Where the rank is r < m, a column
    that the others make up for takes nothing with it.

    Returns:
        The rank r, and the direction that goes with each column: unit vectors or zeros ``[r, m]``, in the coordinates
        of the r leading left singular vectors.
    """
    relative = sigma / sigma[0].clamp(min=_TINY)
    rank = int((relative > rtol).sum())
    V, null = Vh[:rank], Vh[rank:]
    inverse = V / relative[:rank, None]
    norms = torch.linalg.vector_norm(inverse, dim=0)
    # 1 / norm is the distance of the column from the others. Scaled by its share in the null space it is how far the
    # columns must be perturbed to make it indispensable: no further than rounding already does, and it is.
    is_needed = torch.linalg.vector_norm(null, dim=0) <= rtol * norms
    return rank, torch.where(is_needed, inverse / norms, 0.0)


def _range_of(Y: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis B of the range of Y ``[D, m]``, and in it the direction that goes with each column of Y."""
    Q, R = torch.linalg.qr(Y)
    left, sigma, Vh = torch.linalg.svd(R.double())
    rank, S = _left_out(sigma, Vh, len(sigma) * torch.finfo(Y.dtype).eps)
    return Q @ left[:, :rank].to(Y.dtype), S


def _kept_part(S: Tensor, X: Tensor) -> Tensor:
    """Each column of X ``[r, m]`` without its component along the same column of S."""
    return X - S * (S * X).sum(0)


def _mean_over_square(U: Tensor, num_removed: Tensor) -> Tensor:
    """The mean of ‖u‖² divided by its value, for random u ``[D, m]`` off so many dimensions; 0 for u = 0."""
    squares = torch.linalg.vector_norm(U, dim=0, dtype=torch.float64).square()
    return torch.where(squares > 0, (U.shape[0] - num_removed) / squares, 0.0)


def _nystrom_scale(gram: Tensor, V: Tensor, is_needed: Tensor, D: int) -> Tensor:
    """The mean of ‖u‖² divided by its value, for u the part of each probe off the others.

    Args:
        gram: Inner products of the probes ``[m, m]``.
        V: The combinations of probes that the approximation is made of ``[r, m]``.
        is_needed: Which probes are lost to it when they are left out ``[m]``.
        D: Number of entries of a probe.
    """
    L = torch.linalg.cholesky(V @ gram @ V.T)
    coordinates = torch.linalg.solve_triangular(L, V @ gram, upper=False)
    along = torch.linalg.solve_triangular(L, V, upper=False)
    along = torch.where(is_needed, along / torch.linalg.vector_norm(along, dim=0), 0.0)
    seen = coordinates.square().sum(0) - (along * coordinates).sum(0).square()
    squares: Tensor = gram.diagonal() - seen
    return (D - len(V) + is_needed.double()) / squares.clamp(min=D * torch.finfo(gram.dtype).eps)


def _check_positive(values: Tensor, rtol: float) -> None:
    smallest, largest = float(values[-1]), float(values.abs().max())
    if smallest < -rtol * largest:
        raise ValueError(
            "xnystrace: A: expected a positive semi-definite matrix, but the random vectors found the eigenvalue "
            f"{smallest:.2e} beside {largest:.2e} in ΩᵀAΩ. Use xtrace for an indefinite matrix."
        )
