"""Spectral densities of symmetric operators by stochastic Lanczos quadrature."""

from __future__ import annotations

from torch import Generator, Tensor

from curvlinops.estimators.boundaries import Boundaries
from curvlinops.estimators.cached_spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
)
from curvlinops.operators.base import LinearOperator
from curvlinops.solvers.random_vectors import DEFAULT_SEED


def lanczos_approximate_spectrum(
    A: LinearOperator,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    r"""The spectral density of a symmetric operator, smoothed by Gaussians, on an equidistant grid.

    .. math::
        p(\lambda) = \frac{1}{R} \sum_{r=1}^R \sum_{i=1}^{n} w_{ri} \, N(\lambda; \theta_{ri}, \sigma^2) , \qquad
        \sigma = \frac{b - a}{(n - 1) \sqrt{8 \ln \kappa}}

    Each repeat makes n = ncv Lanczos steps from a random unit vector; θ are its Ritz values, w the squared first
    components of the eigenvectors of T, and [a, b] is the grid: the boundaries, with the margin on either side. The
    density is over λ, and integrates to one over the grid by the trapezoid rule: a Gaussian is normalised on the
    grid. Only the eigenvalues beyond boundaries that were *given* are missing from the integral, but for the margin.

    **Cost**: num_repeats · ncv products; and where boundaries are to be found, and the first repeat's steps do not
    resolve them, one product for each step until they are, at most 300. The bases of the repeats that run together
    take chunk_size · (ncv + 1) · D numbers.

    **Reference**: Lin, Saad, Yang (2016), Approximating spectral densities of large matrices, doi:10.1137/130934283;
    Ghorbani, Krishnan, Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue density,
    arXiv:1901.10159; Papyan (2019), arXiv:1811.07062.

    Args:
        A: The operator, self-adjoint.
        ncv: Lanczos steps of each repeat, at least 2.
        num_points: Points of the grid, P.
        num_repeats: Repeats to average over.
        kappa: Precision of the Gaussians, above 1: the larger, the narrower.
        boundaries: Least and largest eigenvalue, where they are known; either may be ``None``.
        margin: Share of the spectrum's width that the grid extends on either side.
        boundaries_tol: How accurately boundaries are found, relative to the width of the spectrum.
        seed: Seed of the start vectors.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        progressbar: Whether to show a progress bar.
        return_stderr: Whether to return the standard error over repeats, which needs two at least.
        max_matvecs: Products at most, each repeat counted.
        max_seconds: Wall-clock time after which no Lanczos step begins.
        chunk_size: Repeats that run together; by default as many as keep their bases below 2²⁶ numbers.

    Returns:
        Grid ``[P]`` and density ``[P]``; with ``return_stderr`` also the density's standard error ``[P]``.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.
        RuntimeError: If a budget is spent before there is a density.

    >>> import torch
    >>> from curvlinops import Diagonal
    >>> grid, density = lanczos_approximate_spectrum(Diagonal(torch.arange(10.0)), ncv=10, num_points=100)
    >>> round(torch.trapezoid(density, grid).item(), 4)
    1.0
    """
    spectrum = LanczosApproximateSpectrumCached(
        A, ncv, boundaries, boundaries_tol, seed=seed, generator=generator, chunk_size=chunk_size
    )
    return spectrum.approximate_spectrum(
        num_repeats,
        num_points,
        kappa,
        margin,
        progressbar=progressbar,
        return_stderr=return_stderr,
        max_matvecs=max_matvecs,
        max_seconds=max_seconds,
    )


def lanczos_approximate_log_spectrum(
    A: LinearOperator,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
    *,
    split_signs: bool = False,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    r"""The spectral density of a symmetric operator over absolute values, on a geometric grid.

    As :func:`lanczos_approximate_spectrum`, but the Gaussians and the margin live on the axis ``t = log(|λ| + ε)``,
    from the logarithms of the boundaries. The points of the grid are ``s = |λ| + ε``, so that zeros lie at ε.
    The density is over s: it has the factor 1/s that goes with the logarithm, and integrates to one over the grid by
    the trapezoid rule. ``density * grid`` is the density over t, which is what a logarithmic axis shows.

    The least absolute value is found where the matrix is definite and not too ill-conditioned. Else the grid begins
    lower than the spectrum, at ε in the extreme.

    **Cost**: as :func:`lanczos_approximate_spectrum`.

    **Reference**: Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra,
    arXiv:2008.11865; Lin, Saad, Yang (2016), doi:10.1137/130934283.

    Args:
        A: The operator, self-adjoint.
        ncv: Lanczos steps of each repeat, at least 2.
        num_points: Points of the grid, P.
        num_repeats: Repeats to average over.
        kappa: Precision of the Gaussians, above 1: the larger, the narrower.
        boundaries: Least and largest absolute value of the eigenvalues, where known; either may be ``None``.
        margin: Share of the logarithmic width that the grid extends on either side.
        boundaries_tol: How accurately the largest is found, relative to itself.
        epsilon: Added to absolute values.
        split_signs: Whether to return the densities of negative and of other eigenvalues, which add up to that of all,
            as ``[2, P]``.
        seed: Seed of the start vectors.
        generator: One number is drawn from it in place of the seed; it must live on the operator's device.
        progressbar: Whether to show a progress bar.
        return_stderr: Whether to return the standard error over repeats, which needs two at least.
        max_matvecs: Products at most, each repeat counted.
        max_seconds: Wall-clock time after which no Lanczos step begins.
        chunk_size: Repeats that run together; by default as many as keep their bases below 2²⁶ numbers.

    Returns:
        Grid ``[P]`` and density ``[P]`` or ``[2, P]``; with ``return_stderr`` also the density's standard error.

    Raises:
        TypeError: If A is no operator.
        ValueError: If A is not self-adjoint, or an option is out of range.
        RuntimeError: If a budget is spent before there is a density.

    >>> import torch
    >>> from curvlinops import Diagonal
    >>> A = Diagonal(torch.tensor([-4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0, 16.0]))
    >>> grid, density = lanczos_approximate_log_spectrum(A, ncv=8, num_repeats=100, split_signs=True)
    >>> [round(torch.trapezoid(part, grid).item(), 1) for part in density]
    [0.4, 0.6]
    """
    spectrum = LanczosApproximateLogSpectrumCached(
        A, ncv, boundaries, boundaries_tol, seed=seed, generator=generator, chunk_size=chunk_size
    )
    return spectrum.approximate_log_spectrum(
        num_repeats,
        num_points,
        kappa,
        margin,
        epsilon,
        split_signs=split_signs,
        progressbar=progressbar,
        return_stderr=return_stderr,
        max_matvecs=max_matvecs,
        max_seconds=max_seconds,
    )
