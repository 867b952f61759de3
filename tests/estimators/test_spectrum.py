"""Spectral densities against Gaussian-smoothed spectra that are computed densely."""

import warnings
from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvlinops import Diagonal, LinearOperator, TensorLinearOperator
from curvlinops.estimators.cached_spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
)
from curvlinops.estimators.spectrum import lanczos_approximate_log_spectrum, lanczos_approximate_spectrum
from curvlinops.solvers.info import ConvergenceWarning
from tests.solvers.spd_problems import CountingOperator, noise, with_eigenvalues

PLAIN, LOG = lanczos_approximate_spectrum, lanczos_approximate_log_spectrum
each_kind = pytest.mark.parametrize("function", [PLAIN, LOG], ids=["plain", "log"])

EIGENVALUES = torch.tensor([-10.0, -3.0, -1.0, -0.5, -0.1, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]).double()


def smoothed(
    eigenvalues: Tensor, grid: Tensor, ncv: int, kappa: float, epsilon: float | None = None, weights: Any = None
) -> Tensor:
    """The spectrum's density with Gaussians of the documented width, each normalised on the grid (NumPy)."""
    points, values = grid.double().numpy(), eigenvalues.numpy()
    axis = points if epsilon is None else np.log(points)
    where = values if epsilon is None else np.log(np.abs(values) + epsilon)
    sigma = (axis[-1] - axis[0]) / ((ncv - 1) * sqrt(8 * log(kappa)))
    bumps = np.exp(-((axis - where[:, None]) ** 2) / (2 * sigma**2)) / (sigma * sqrt(2 * pi))
    bumps = bumps if epsilon is None else bumps / points
    bumps /= np.trapezoid(bumps, points, axis=1)[:, None]
    shares = np.full(len(values), 1 / len(values)) if weights is None else weights
    return torch.from_numpy((shares[:, None] * bumps).sum(0))


def dense(eigenvalues: Tensor, dtype: torch.dtype = torch.float64) -> LinearOperator:
    return TensorLinearOperator(with_eigenvalues(eigenvalues, 3).to(dtype))


# -- against the truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1.5, 3.0, 20.0])
def test_full_runs_agree_with_the_spectrum(kappa: float) -> None:
    """With as many steps as dimensions the Ritz values are exact, and only their weights are random."""
    grid, density, stderr = PLAIN(dense(EIGENVALUES), 12, 200, 2000, kappa, return_stderr=True)
    torch.testing.assert_close(grid, torch.linspace(-11, 11, 200, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    truth = smoothed(EIGENVALUES, grid, 12, kappa)
    assert ((density - truth).abs() <= 4.5 * stderr + 1e-9).all()
    assert (stderr <= 0.06 * truth.max()).all()


@pytest.mark.parametrize(("kappa", "epsilon"), [(1.04, 1e-5), (2.0, 1e-5), (2.0, 0.3)])
def test_full_log_runs_agree_with_the_spectrum(kappa: float, epsilon: float) -> None:
    A = dense(EIGENVALUES)
    grid, density, stderr = LOG(A, 12, 200, 2000, kappa, epsilon=epsilon, return_stderr=True)
    low, high = log(0.1 + epsilon), log(10 + epsilon)
    wide = 0.05 * (high - low)
    expected = torch.linspace(low - wide, high + wide, 200, dtype=torch.float64).exp()
    torch.testing.assert_close(grid, expected, rtol=1e-7, atol=0)
    truth = smoothed(EIGENVALUES, grid, 12, kappa, epsilon)
    assert ((density - truth).abs() <= 4.5 * stderr + 1e-9).all()


def test_one_run_is_the_start_vectors_own_density() -> None:
    """A repeat weighs each eigenvalue with the squared component of its start vector: those of a diagonal are seen."""
    values = torch.linspace(-2, 5, 8).double()
    grid, density = PLAIN(Diagonal(values), 8, kappa=1e12, num_points=2000)
    weights = [torch.trapezoid(density * ((grid - v).abs() < 0.5), grid).item() for v in values]
    assert sum(weights) == pytest.approx(1.0, abs=1e-6) and max(weights) > 2 * min(weights)
    torch.testing.assert_close(density, smoothed(values, grid, 8, 1e12, weights=np.array(weights)), rtol=0, atol=1e-6)


def test_moments_are_unbiased() -> None:
    """The mean over runs of few steps has the first moments of the spectrum: quadratures are exact for them."""
    values = torch.cat([torch.linspace(-1, 1, 60), torch.tensor([5.0, 8.0])]).double()
    spectrum = LanczosApproximateSpectrumCached(dense(values), 5)
    spectrum.approximate_spectrum(500)
    nodes, weights = spectrum._runs.quadrature()
    for power in range(1, 10):
        found = (weights * nodes**power).sum(1)
        error = (found.mean() - (values**power).mean()).abs()
        assert error <= 4 * found.std() / 500**0.5


def test_semicircle() -> None:
    size = 1000
    noisy = noise(size, size, seed=1)
    A = TensorLinearOperator((noisy + noisy.T) / sqrt(2 * size))
    grid, density = PLAIN(A, 40, 512, 20, 1.02)
    theory = (4 - grid.square()).clamp(min=0).sqrt() / (2 * pi)
    # The theory, smoothed as the density is.
    sigma = (grid[-1] - grid[0]) / (39 * sqrt(8 * log(1.02)))
    kernel = (-0.5 * ((grid[:, None] - grid) / sigma).square()).exp()
    theory = (kernel / kernel.sum(0)) @ theory
    assert (density - theory).abs().max() <= 0.02
    second = torch.trapezoid(density * grid.square(), grid) - sigma**2
    assert abs(second - 1) <= 0.06  # normalised at the ends, the smoothing adds less than σ²
    assert abs(torch.trapezoid(density * grid, grid)) <= 0.02


def test_log_semicircle_splits_evenly() -> None:
    size = 400
    noisy = noise(size, size, seed=2)
    M = (noisy + noisy.T) / sqrt(2 * size)
    values = torch.linalg.eigvalsh(M)
    grid, density, stderr = LOG(
        TensorLinearOperator(M), 60, 300, 20, boundaries=(1e-2, None), split_signs=True, return_stderr=True
    )
    assert density.shape == stderr.shape == (2, 300)
    masses = torch.trapezoid(density, grid)
    # What lies below the boundary that was given is lost but for a tail, likewise for both signs.
    assert abs(masses.sum() - 1) <= 0.02 and abs(masses[0] - masses[1]) <= 0.05
    truth = smoothed(values[values.abs() > 5e-3], grid, 60, 1.04, 1e-5)
    # Nearer to zero, 60 steps do not resolve single eigenvalues on a logarithmic axis.
    in_bulk = (grid > 0.5) & (grid < 1.5)
    errors = (density.sum(0) - truth).abs()[in_bulk]
    assert errors.max() <= 0.1 * truth[in_bulk].max()


# -- normalisation -----------------------------------------------------------------------------------------------------

MATRICES = {
    "indefinite": EIGENVALUES,
    "singular": torch.cat([torch.zeros(9), torch.tensor([1.0, 2.0])]).double(),
    "zero": torch.zeros(6).double(),
    "identity": torch.ones(6).double(),
    "minus identity": -3 * torch.ones(6).double(),
    "1x1": torch.tensor([-2.0]).double(),
    "1x1 zero": torch.tensor([0.0]).double(),
    "tiny": 1e-9 * EIGENVALUES,
    "large": 1e9 * EIGENVALUES,
}


@each_kind
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_integral_is_one(function: Callable[..., Any], name: str, margin: float, dtype: torch.dtype) -> None:
    A = dense(MATRICES[name], dtype)
    for ncv, num_points, kappa in ((2, 50, 3.0), (8, 1024, 1.04), (40, 33, 100.0)):
        grid, density = function(A, ncv, num_points, 3, kappa, margin=margin)
        assert grid.shape == density.shape == (num_points,) and grid.dtype == density.dtype == dtype
        assert density.isfinite().all() and (density >= 0).all() and (grid.diff() > 0).all()
        # Points that float32 can barely tell apart make the rule itself inexact.
        atol = 1e-10 if dtype == torch.float64 else 1e-6
        assert abs(torch.trapezoid(density.double(), grid.double()).item() - 1) <= atol


@each_kind
def test_split_signs_add_up(function: Callable[..., Any]) -> None:
    if function is PLAIN:
        with pytest.raises(TypeError):
            function(dense(EIGENVALUES), 5, split_signs=True)
        return
    A = dense(torch.cat([EIGENVALUES, torch.tensor([7.0, 8.0, 9.0]).double()]))
    grid, split, errors = function(A, 15, num_repeats=300, split_signs=True, return_stderr=True)
    same_grid, whole = function(A, 15, num_repeats=300)
    assert torch.equal(grid, same_grid) and split.shape == errors.shape == (2, 1024)
    torch.testing.assert_close(split.sum(0), whole, rtol=1e-9, atol=1e-12)
    masses = torch.trapezoid(split, grid)
    assert abs(masses[0] - 5 / 15) <= 0.05 and abs(masses[1] - 10 / 15) <= 0.05
    negative = smoothed(EIGENVALUES[:5], grid, 15, 1.04, 1e-5) / 3
    assert ((split[0] - negative).abs() <= 4.5 * errors[0] + 1e-9).all()


def test_zero_eigenvalues_lie_at_epsilon() -> None:
    A = dense(MATRICES["singular"])
    for epsilon in (1e-5, 1e-2):
        grid, density = LOG(A, 40, 2000, 200, epsilon=epsilon)
        parts = density * grid
        assert abs(log(grid[parts.argmax()]) - log(epsilon)) <= 0.2
        assert abs(torch.trapezoid(density * (grid < sqrt(epsilon)), grid) - 9 / 11) <= 0.05


# -- boundaries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ncv", [2, 5, 20, 60])
def test_found_boundaries_contain_the_spectrum(ncv: int) -> None:
    for seed in range(5):
        values = noise(300, seed=seed) ** 3
        A = CountingOperator(with_eigenvalues(values, seed))
        spectrum = LanczosApproximateSpectrumCached(A, ncv, seed=seed)
        spectrum.approximate_spectrum(3)
        low, high = spectrum._boundaries or (0.0, 0.0)
        width = (values.max() - values.min()).item()
        assert low <= values.min().item() + 1e-3 * width and values.max().item() - 1e-3 * width <= high
        assert low >= values.min().item() - 0.011 * width and high <= values.max().item() + 0.011 * width
        assert len(A.num_columns) <= ncv + 40, "boundaries cost too many products"


def test_resolved_boundaries_cost_nothing() -> None:
    A = CountingOperator(with_eigenvalues(torch.linspace(0, 1, 200).double() ** 4))
    PLAIN(A, 60, num_repeats=3)
    assert A.num_columns == [3] * 60
    A.num_columns.clear()
    PLAIN(A, 4, num_repeats=3, boundaries=(0, 1))
    assert A.num_columns == [3] * 4
    PLAIN(A, 4, boundaries=(None, 1))
    LOG(A, 4, boundaries=(1e-3, None))
    assert len(A.num_columns) < 60


@pytest.mark.parametrize("sign", [1, -1])
def test_log_boundaries_of_definite_matrices(sign: int) -> None:
    values = sign * torch.linspace(0.1, 10, 200).double()
    for ncv in (4, 30, 80):
        grid, _ = LOG(dense(values), ncv, margin=0.0)
        assert 0.04 <= grid[0] <= 0.1001 and 10 <= grid[-1] <= 10.3
    # Where the smallest absolute value is an interior eigenvalue, or zero, the grid begins below.
    for other in (noise(200), values.abs() - 0.1):
        grid, _ = LOG(dense(other), 10, margin=0.0)
        assert 1e-5 * 0.99 <= grid[0] <= other.abs().min() + 1.1e-5


@each_kind
def test_given_boundaries(function: Callable[..., Any]) -> None:
    is_log = function is LOG
    low, high = (0.05, 20.0) if is_log else (-20.0, 30.0)
    A = dense(EIGENVALUES)

    def ends(**options: Any) -> list[float]:
        grid = function(A, 12, margin=0.0, **options)[0]
        return [round(x, 3) for x in (grid - 1e-5 * is_log)[[0, -1]].tolist()]

    found = [0.1, 10.0] if is_log else [-10.0, 10.0]
    assert ends() == found
    assert ends(boundaries=(low, high)) == [low, high]
    assert ends(boundaries=(low, None)) == [low, found[1]]
    assert ends(boundaries=[None, high]) == [found[0], high]
    grid, density = function(A, 12, boundaries=(low, high))
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-10)


def test_given_boundaries_cut_the_spectrum() -> None:
    """The share of the eigenvalues that the user looks at; nothing is stretched to one."""
    values = torch.linspace(0, 1, 101).double()
    grid, density, stderr = PLAIN(dense(values), 101, 400, 400, 1.016, (0.251, 0.751), 0.0, return_stderr=True)
    assert abs(torch.trapezoid(density, grid) - 50 / 101) <= 0.02
    inner = (grid > 0.32) & (grid < 0.68)
    assert ((density - 1.0).abs() <= 0.02 + 4.5 * stderr)[inner].all()


def test_unresolved_boundaries_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvlinops.estimators.boundaries._MAX_STEPS", 10)
    values = torch.linspace(0, 1, 1000).double()
    with pytest.warns(ConvergenceWarning, match="ends of the spectrum are not resolved"):
        grid, density = PLAIN(Diagonal(values), 4, boundaries_tol=1e-3)
    assert grid[0] < 0 and grid[-1] > 1 and torch.trapezoid(density, grid).item() == pytest.approx(1.0)


# -- repeats -----------------------------------------------------------------------------------------------------------


def test_more_repeats_refine_and_bands_cover() -> None:
    """Errors fall as 1/√R, and the standard error is their size."""
    truth_of: dict[int, Tensor] = {}
    errors, bands = {}, {}
    for repeats in (10, 160):
        found = [PLAIN(dense(EIGENVALUES), 12, 60, repeats, seed=seed, return_stderr=True) for seed in range(20)]
        truth_of[repeats] = smoothed(EIGENVALUES, found[0][0], 12, 3.0)
        deviations = torch.stack([density - truth_of[repeats] for _, density, _ in found])
        errors[repeats] = deviations.square().mean().sqrt()
        bands[repeats] = torch.stack([stderr for _, _, stderr in found]).square().mean().sqrt()
        assert 0.8 <= bands[repeats] / errors[repeats] <= 1.25
    assert 3.2 <= errors[10] / errors[160] <= 5


@each_kind
def test_chunks_of_repeats(function: Callable[..., Any]) -> None:
    M = with_eigenvalues(noise(40))
    grid, density = function(CountingOperator(M), 10, num_repeats=7)
    A = CountingOperator(M)
    other_grid, other = function(A, 10, num_repeats=7, chunk_size=3)
    torch.testing.assert_close(other_grid, grid, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other, density, rtol=1e-6, atol=1e-9)
    assert A.num_columns[:30] == [3] * 20 + [1] * 10


@each_kind
def test_random_numbers(function: Callable[..., Any]) -> None:
    A = dense(EIGENVALUES)
    before = torch.get_rng_state()
    first = function(A, 6)[1]
    assert torch.equal(function(A, 6)[1], first) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(function(A, 6, seed=1)[1], first)
    generator = torch.Generator().manual_seed(3)
    one, two = function(A, 6, generator=generator)[1], function(A, 6, generator=generator)[1]
    assert not torch.equal(one, two)
    assert torch.equal(function(A, 6, generator=torch.Generator().manual_seed(3))[1], one)


# -- options -----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ncv": 1}, "ncv"), ({"num_points": 1}, "num_points"), ({"num_repeats": 0}, "num_repeats"),
        ({"num_repeats": 1, "return_stderr": True}, "num_repeats: expected at least 2 for a standard error"),
        ({"kappa": 1.0}, "kappa"), ({"kappa": float("nan")}, "kappa"), ({"margin": -0.1}, "margin"),
        ({"boundaries": 3.0}, "boundaries"), ({"boundaries": (2, 1)}, "boundaries"),
        ({"boundaries": (1,)}, "boundaries"),
        ({"boundaries": (1, float("inf"))}, "boundaries"), ({"boundaries": (100.0, None)}, "boundaries"),
        ({"boundaries_tol": 0.0}, "boundaries_tol"), ({"chunk_size": 0}, "chunk_size"),
        ({"max_matvecs": 0}, "max_matvecs"), ({"max_seconds": -1}, "max_seconds"),
    ],
)  # fmt: skip
def test_bad_options(function: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(dense(EIGENVALUES), **{"ncv": 6, **options})


def test_bad_log_options() -> None:
    with pytest.raises(ValueError, match="absolute values"):
        LOG(dense(EIGENVALUES), 6, boundaries=(-1.0, 2.0))
    with pytest.raises(ValueError, match="epsilon"):
        LOG(dense(EIGENVALUES), 6, epsilon=0.0)


@each_kind
def test_bad_operators(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="linear operator"):
        function(torch.eye(3), 2)
    with pytest.raises(ValueError, match="self-adjoint"):
        function(TensorLinearOperator(torch.triu(torch.ones(3, 3))), 2)
    M = torch.eye(3)
    M[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"not finite|self-adjoint"):
        function(TensorLinearOperator(M), 2)


@each_kind
def test_half_precision_and_progress_bar(function: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid, density = function(dense(EIGENVALUES, torch.bfloat16), 12, num_repeats=2, progressbar=True)
    assert grid.dtype == density.dtype == torch.float32
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-4)
    assert "spectrum" in capsys.readouterr().err


def test_names_and_arguments() -> None:
    """Scripts rely on their order."""
    import inspect

    common = ["A", "ncv", "num_points", "num_repeats", "kappa", "boundaries", "margin", "boundaries_tol"]
    for function, positional, kappa in ((PLAIN, common, 3.0), (LOG, [*common, "epsilon"], 1.04)):
        parameters = inspect.signature(function).parameters
        assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert [parameters[n].default for n in common[2:]] == [1024, 1, kappa, None, 0.05, 1e-2]
    for cls in (LanczosApproximateSpectrumCached, LanczosApproximateLogSpectrumCached):
        assert list(inspect.signature(cls).parameters)[:4] == ["A", "ncv", "boundaries", "boundaries_tol"]
    for method, more in (
        (LanczosApproximateSpectrumCached.approximate_spectrum, []),
        (LanczosApproximateLogSpectrumCached.approximate_log_spectrum, ["epsilon"]),
    ):
        names = list(inspect.signature(method).parameters)
        assert names[1 : 5 + len(more)] == ["num_repeats", "num_points", "kappa", "margin", *more]
