"""How errors fall with the number of products, and whether the reported errors are those that are made."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops.estimators.estimate import Estimate, EstimateWithError
from curvlinops.estimators.hutchinson import hutchinson_diag, hutchinson_squared_fro, hutchinson_trace
from curvlinops.estimators.hutchpp import hutchpp_trace
from curvlinops.estimators.leave_one_out import xdiag, xnystrace, xtrace
from curvlinops.solvers.random_vectors import DISTRIBUTIONS
from tests.solvers.spd_problems import with_eigenvalues

Estimator = Callable[..., Any]
SIZE = 200
NUM_RUNS = 24


@cache
def decaying(kind: str) -> Tensor:
    """A matrix with a flat, polynomially or exponentially decaying spectrum."""
    i = torch.arange(1, SIZE + 1, dtype=torch.float64)
    spectra = {"flat": 3 - 2 * (i - 1) / (SIZE - 1), "polynomial": i**-2, "slow": 0.9**i, "fast": 0.7**i}
    return with_eigenvalues(spectra[kind])


@cache
def runs(estimator: Estimator, kind: str, num_matvecs: int, distribution: str = "rademacher") -> tuple[float, float]:
    """The relative root mean square error, and the median of the reported errors beside it."""
    A = decaying(kind)
    found = [estimator(A, num_matvecs, distribution, seed=seed, return_stderr=True) for seed in range(NUM_RUNS)]
    error = (torch.stack([value for value, _ in found]) - A.trace()).square().mean().sqrt()
    reported = torch.stack([error for _, error in found]).median()
    return (error / A.trace()).item(), (reported / A.trace()).item()


def error_of(estimator: Estimator, kind: str, num_matvecs: int, distribution: str = "rademacher") -> float:
    return runs(estimator, kind, num_matvecs, distribution)[0]


# -- convergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["flat", "polynomial", "fast"])
def test_hutchinson_converges_like_the_root(kind: str, distribution: str) -> None:
    """64 times the products for an eighth of the error, and the error is that of the formula."""
    A, num_matvecs = decaying(kind), 64
    ratio = error_of(hutchinson_trace, kind, 4, distribution) / error_of(hutchinson_trace, kind, 256, distribution)
    assert 5 < ratio < 13
    squares = A.square().sum()
    variance = {
        "rademacher": 2 * (squares - A.diagonal().square().sum()),
        "normal": 2 * squares,
        "sphere": 2 * (squares - A.trace() ** 2 / SIZE) * SIZE / (SIZE + 2),
    }[distribution]
    expected = ((variance / num_matvecs).sqrt() / A.trace()).item()
    assert 0.6 < error_of(hutchinson_trace, kind, num_matvecs, distribution) / expected < 1.5


def test_hutchpp_converges_faster() -> None:
    """For a positive semi-definite matrix at least as 1 / m: twenty times the products, a twentieth of the error."""
    small, large = (error_of(hutchpp_trace, "polynomial", num_matvecs) for num_matvecs in (9, 180))
    assert small / large > 20
    assert error_of(hutchpp_trace, "polynomial", 48) < error_of(hutchinson_trace, "polynomial", 48) / 20


def test_hutchpp_on_the_hardest_spectrum() -> None:
    """The spectrum 1 / i, on which the projection helps least: the error still falls as 1 / m."""
    A = with_eigenvalues(1 / torch.arange(1, 401, dtype=torch.float64), seed=1)
    sizes = torch.tensor([12.0, 48.0, 192.0])
    found = []
    for num_matvecs in sizes.int().tolist():
        values = torch.stack([hutchpp_trace(A, num_matvecs, seed=seed) for seed in range(30)])
        found.append((values - A.trace()).square().mean().sqrt().item())
    slope = (torch.tensor(found[0] / found[-1]).log() / (sizes[-1] / sizes[0]).log()).item()
    assert 0.8 < slope < 1.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("kind", "num_matvecs", "gain"), [("polynomial", 48, 30), ("slow", 96, 20), ("fast", 48, 500), ("fast", 96, 1e5)]
)
def test_leaving_one_out_beats_hutchinson(kind: str, num_matvecs: int, gain: float, distribution: str) -> None:
    plain = error_of(hutchinson_trace, kind, num_matvecs, distribution)
    sketched = error_of(xtrace, kind, num_matvecs, distribution)
    nystrom = error_of(xnystrace, kind, num_matvecs, distribution)
    assert sketched < plain / gain and nystrom < 1.2 * sketched


@pytest.mark.parametrize("num_matvecs", [12, 24, 48, 96])
@pytest.mark.parametrize("kind", ["polynomial", "slow", "fast"])
def test_xtrace_at_or_below_hutchpp(kind: str, num_matvecs: int) -> None:
    assert error_of(xtrace, kind, num_matvecs) < 1.15 * error_of(hutchpp_trace, kind, num_matvecs)


@pytest.mark.parametrize("estimator", [xtrace, xnystrace], ids=lambda f: f.__name__)
def test_rescaling_helps_on_flat_spectra(estimator: Estimator) -> None:
    """What is left of the matrix is nearly a multiple of a projection, of which rescaled vectors see no variance."""
    for num_matvecs in (48, 96):
        assert error_of(estimator, "flat", num_matvecs, "normal") < 0.7 * error_of(estimator, "flat", num_matvecs)
    values = [estimator(decaying("flat"), 24, d).item() for d in ("normal", "sphere")]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_xdiag_beats_the_plain_diagonal() -> None:
    A = decaying("fast")
    for num_matvecs, gain in ((24, 5), (48, 100), (96, 1e5)):
        errors = [
            torch.stack([f(A, num_matvecs, seed=seed) - A.diagonal() for seed in range(5)]).norm()
            for f in (hutchinson_diag, xdiag)
        ]
        assert errors[1] < errors[0] / gain


# -- reported errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["flat", "polynomial"])
@pytest.mark.parametrize("estimator", [hutchinson_trace, hutchinson_squared_fro], ids=lambda f: f.__name__)
def test_two_standard_errors_cover_the_truth(estimator: Estimator, kind: str, distribution: str) -> None:
    A = decaying(kind)
    truth = A.trace() if estimator is hutchinson_trace else A.square().sum()
    found = [estimator(A, 30, distribution, seed=seed, return_stderr=True) for seed in range(300)]
    assert all(isinstance(f, Estimate) for f in found)
    covered = sum(abs(f.value - truth) <= 2 * f.stderr for f in found) / len(found)
    assert 0.90 <= covered <= 0.99


def test_two_standard_errors_cover_the_diagonal() -> None:
    A = decaying("polynomial")
    found = [hutchinson_diag(A, 30, seed=seed, return_stderr=True) for seed in range(300)]
    covered = torch.stack([(f.value - A.diagonal()).abs() <= 2 * f.stderr for f in found]).double().mean()
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_matvecs", [12, 24, 48])
@pytest.mark.parametrize("kind", ["flat", "polynomial", "slow", "fast"])
@pytest.mark.parametrize("estimator", [hutchpp_trace, xtrace, xnystrace], ids=lambda f: f.__name__)
def test_error_estimates_within_a_factor_three(
    estimator: Estimator, kind: str, num_matvecs: int, distribution: str
) -> None:
    made, reported = runs(estimator, kind, num_matvecs, distribution)
    assert made / 3 < reported < 3 * made


@pytest.mark.parametrize("num_matvecs", [12, 24, 48])
@pytest.mark.parametrize("kind", ["flat", "polynomial", "slow", "fast"])
def test_error_estimates_of_xdiag_within_a_factor_three(kind: str, num_matvecs: int) -> None:
    A = decaying(kind)
    found = [xdiag(A, num_matvecs, seed=seed, return_stderr=True) for seed in range(NUM_RUNS)]
    assert all(isinstance(f, EstimateWithError) for f in found)
    made = (torch.stack([f.value for f in found]) - A.diagonal()).square().mean(0).sqrt()
    ratio = torch.stack([f.error_estimate for f in found]).median(0).values / made
    assert 1 / 3 < ratio.median() < 3
    assert ((ratio > 1 / 3) & (ratio < 3)).double().mean() > 0.95
