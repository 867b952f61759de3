"""Estimators are right on average, sample by sample as the formulas say, and exact where nothing is left to chance."""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import TensorLinearOperator
from curvlinops.estimators.blocks import block_traces
from curvlinops.estimators.estimate import SampleMean, inner
from curvlinops.estimators.hutchinson import hutchinson_diag, hutchinson_squared_fro, hutchinson_trace
from curvlinops.estimators.hutchpp import hutchpp_trace
from curvlinops.estimators.leave_one_out import (
    xdiag,
    xdiag_samples,
    xnystrace,
    xnystrace_samples,
    xtrace,
    xtrace_samples,
)
from curvlinops.estimators.probes import Sampler
from curvlinops.solvers.random_vectors import DISTRIBUTIONS, draw_columns
from tests.solvers.spd_problems import noise, with_eigenvalues

Estimator = Callable[..., Any]
TRACES: list[Estimator] = [hutchinson_trace, hutchpp_trace, xtrace, xnystrace]
NUM_RUNS = 400
NONSYMMETRIC = ("nonsymmetric", "low rank nonsymmetric")


def matrix(kind: str, size: int = 10) -> Tensor:
    """Test matrices: symmetric ones, one of no symmetry, and some that leave sketches without full rank."""
    if kind == "nonsymmetric":
        return noise(size, size, seed=3) + torch.diag(torch.arange(size).double())
    if kind == "indefinite":
        return with_eigenvalues(torch.linspace(-2, 3, size, dtype=torch.float64))
    if kind == "low rank nonsymmetric":
        return noise(size, 2, seed=1) @ noise(2, size, seed=2)
    spectra = {
        "positive": 0.6 ** torch.arange(size),
        "low rank": torch.tensor([3.0, 1.0] + [0.0] * (size - 2)),
        "rank one": torch.tensor([3.0] + [0.0] * (size - 1)),
        "zero": torch.zeros(size),
    }
    return with_eigenvalues(spectra[kind].double())


def truth_of(estimator: Estimator, A: Tensor) -> Tensor:
    if estimator in (hutchinson_diag, xdiag):
        return A.diagonal()
    return A.square().sum() if estimator is hutchinson_squared_fro else A.trace()


def allowed(estimators: list[Estimator], kinds: list[str]) -> list[Any]:
    """Pairs of an estimator and a matrix that it is meant for."""
    pairs = [(e, kind) for e in estimators for kind in kinds]
    fits = [pair for pair in pairs if pair[0] is not xnystrace or pair[1] not in ("indefinite", *NONSYMMETRIC)]
    return [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in fits]


def check_mean(runs: Tensor, truth: Tensor) -> None:
    """The mean of runs ``[..., R]`` lies within four of its standard errors."""
    error = (runs.mean(-1) - truth).abs()
    assert (error <= 4 * runs.std(-1) / runs.shape[-1] ** 0.5 + 1e-12 * truth.abs().max()).all(), error


# -- on average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("estimator", "kind"),
    allowed([*TRACES, hutchinson_diag, hutchinson_squared_fro], ["positive", "indefinite", "nonsymmetric"]),
)
def test_unbiased(estimator: Estimator, kind: str, distribution: str) -> None:
    A = matrix(kind)
    runs = torch.stack([estimator(A, 6, distribution, seed=seed) for seed in range(NUM_RUNS)], -1)
    assert runs.std(-1).max() > 0
    check_mean(runs, truth_of(estimator, A))


@pytest.mark.parametrize("kind", ["positive", "nonsymmetric"])
def test_xdiag_is_unbiased(kind: str) -> None:
    A = matrix(kind)
    check_mean(torch.stack([xdiag(A, 6, seed=seed) for seed in range(NUM_RUNS)], -1), A.diagonal())


@pytest.mark.parametrize("estimator", [xtrace, xnystrace, xdiag], ids=lambda f: f.__name__)
def test_unbiased_where_probes_repeat(estimator: Estimator) -> None:
    """In five dimensions there are 16 signs up to the sign: sketches have equal columns in many of the runs."""
    A = matrix("positive", 5)
    check_mean(torch.stack([estimator(A, 4, seed=seed) for seed in range(NUM_RUNS)], -1), truth_of(estimator, A))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_squared_norm_of_a_rectangular_matrix(shape: tuple[int, int], distribution: str) -> None:
    A = noise(*shape, seed=7)
    runs = [hutchinson_squared_fro(A, 5, distribution, seed=seed) for seed in range(NUM_RUNS)]
    check_mean(torch.stack(runs), A.square().sum())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes_have_the_identity_as_covariance(distribution: str) -> None:
    V = draw_columns(6, distribution, repeat(torch.Generator().manual_seed(1), 20_000), torch.float64)
    assert (V @ V.T / 20_000 - torch.eye(6)).abs().max() < 0.05 and V.mean(1).abs().max() < 0.03
    fourth = {"rademacher": 1.0, "normal": 3.0, "sphere": 3.0 * 6 / 8}[distribution]
    torch.testing.assert_close(V.pow(4).mean(), torch.tensor(fourth).double(), rtol=0.04, atol=0)
    if distribution == "rademacher":
        assert set(V.flatten().tolist()) == {-1.0, 1.0}
    if distribution == "sphere":
        torch.testing.assert_close(V.square().sum(0), torch.full([20_000], 6.0).double())


# -- sample by sample --------------------------------------------------------------------------------------------------


def projection(Y: Tensor) -> Tensor:
    return Y @ torch.linalg.pinv(Y, rtol=1e-10)


def textbook_xtrace(A: Tensor, probes: Tensor, rescale: bool) -> Tensor:
    """The definition, with a sketch of its own for each probe that is left out."""
    samples = []
    for i, w in enumerate(probes.T):
        others = torch.cat([probes[:, :i], probes[:, i + 1 :]], 1)
        P = projection(A @ others)
        u = w - P @ w
        scale = (len(A) - P.trace()) / (u @ u) if rescale else 1.0
        samples.append((P @ A @ P).trace() + scale * u @ A @ u)
    return torch.stack(samples)


def textbook_xdiag(A: Tensor, probes: Tensor) -> Tensor:
    samples = []
    for i, w in enumerate(probes.T):
        P = projection(A @ torch.cat([probes[:, :i], probes[:, i + 1 :]], 1))
        samples.append((P @ A).diagonal() + w * (A @ w - P @ A @ w))
    return torch.stack(samples, -1)


def textbook_xnystrace(A: Tensor, probes: Tensor, rescale: bool) -> Tensor:
    samples = []
    for i, w in enumerate(probes.T):
        others = torch.cat([probes[:, :i], probes[:, i + 1 :]], 1)
        core = torch.linalg.pinv(others.T @ A @ others, rtol=1e-10, hermitian=True)
        rest = A - A @ others @ core @ others.T @ A
        u = w - projection(others) @ w
        scale = (len(A) - others.shape[1]) / (u @ u) if rescale else 1.0
        samples.append((A - rest).trace() + scale * w @ rest @ w)
    return torch.stack(samples)


def sampler_of(A: Tensor, distribution: str, seed: int) -> Sampler:
    return Sampler.of("test", A, distribution, seed, None, None, False)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "kind", ["positive", "indefinite", "nonsymmetric", "low rank nonsymmetric", "low rank", "zero"]
)
@pytest.mark.parametrize("num_probes", [2, 4, 7])
def test_xtrace_and_xdiag_are_their_definitions(kind: str, distribution: str, num_probes: int) -> None:
    A = matrix(kind)
    for seed in range(5):
        probes = sampler_of(A, distribution, seed).probes(num_probes)
        expected = textbook_xtrace(A, probes, rescale=distribution != "rademacher")
        actual = xtrace_samples(sampler_of(A, distribution, seed), num_probes)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
        actual = xdiag_samples(sampler_of(A, distribution, seed), num_probes)
        torch.testing.assert_close(actual, textbook_xdiag(A, probes), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_probes", [2, 4, 7])
def test_xnystrace_is_its_definition(distribution: str, num_probes: int) -> None:
    A = matrix("positive")
    for seed in range(5):
        probes = sampler_of(A, distribution, seed).probes(num_probes)
        expected = textbook_xnystrace(A, probes, rescale=distribution != "rademacher")
        actual = xnystrace_samples(sampler_of(A, distribution, seed), num_probes)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_definitions_where_probes_repeat() -> None:
    """Signs in four dimensions: equal, opposite and dependent columns."""
    A, deficient = matrix("positive", 4), 0
    for seed in range(60):
        probes = sampler_of(A, "rademacher", seed).probes(3)
        deficient += int(torch.linalg.matrix_rank(probes)) < 3
        pairs = [
            (xtrace_samples, textbook_xtrace(A, probes, rescale=False)),
            (xdiag_samples, textbook_xdiag(A, probes)),
            (xnystrace_samples, textbook_xnystrace(A, probes, rescale=False)),
        ]
        for samples, expected in pairs:
            torch.testing.assert_close(samples(sampler_of(A, "rademacher", seed), 3), expected, rtol=1e-7, atol=1e-7)
    assert deficient > 10


# -- exactly -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_matvecs", [10, 16, 40])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("estimator", "kind"), allowed([*TRACES[1:], xdiag], ["positive", "nonsymmetric", "zero"]))
def test_exact_when_exhausted(estimator: Estimator, kind: str, distribution: str, num_matvecs: int) -> None:
    A = matrix(kind)
    chosen = () if estimator is xdiag else (distribution,)
    value, error = estimator(A, num_matvecs, *chosen, return_stderr=True)
    torch.testing.assert_close(value, truth_of(estimator, A), rtol=1e-12, atol=1e-12)
    assert error.abs().max() == 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [30, 60])
@pytest.mark.parametrize(
    ("estimator", "kind"),
    allowed([*TRACES[1:], xdiag], ["low rank nonsymmetric", "low rank", "rank one", "zero"]),
)
def test_exact_on_low_rank(estimator: Estimator, kind: str, size: int, distribution: str) -> None:
    A = matrix(kind, size)
    chosen = () if estimator is xdiag else (distribution,)
    for seed in range(8):
        for num_matvecs in (6, 8):
            value, error = estimator(A, num_matvecs, *chosen, seed=seed, return_stderr=True)
            torch.testing.assert_close(value, truth_of(estimator, A), rtol=1e-9, atol=1e-9)
            assert error.max() <= 1e-9


def test_exact_on_diagonal_matrices_with_signs() -> None:
    A = torch.diag(torch.arange(1.0, 6.0))
    assert hutchinson_trace(A, 1).item() == 15.0
    assert hutchinson_diag(A, 2).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert hutchinson_squared_fro(A, 2).item() == 55.0
    (block,) = block_traces(A, 2, return_stderr=True)
    assert block == (15.0, 0.0)


def test_low_rank_takes_fewer_products() -> None:
    """A basis of the range is all that is multiplied again."""
    A = TensorLinearOperator(matrix("low rank", 60))
    widths: list[int] = []
    multiply = A._matmat
    A._matmat = lambda X: widths.append(X[0].shape[1]) or multiply(X)  # type: ignore[method-assign, func-returns-value]
    xtrace(A, 20)
    assert widths == [10, 2]


# -- averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30,), (3, 30)])
def test_running_mean_is_the_mean(shape: tuple[int, ...]) -> None:
    samples = 1e3 + noise(*shape, seed=5)
    for sizes in ([30], [1] * 30, [7, 20, 3]):
        mean = SampleMean()
        for chunk in samples.split(sizes, -1):
            mean.add(chunk)
        torch.testing.assert_close(mean.value, samples.mean(-1))
        torch.testing.assert_close(mean.stderr, samples.std(-1) / 30**0.5, rtol=1e-10, atol=0)


def test_mean_of_nothing_is_refused() -> None:
    mean = SampleMean()
    with pytest.raises(ValueError, match="no samples"):
        _ = mean.value
    mean.add(torch.ones(1))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        _ = mean.stderr


def test_inner_products_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = noise(50, 3, seed=1), noise(50, 4, seed=2)
    monkeypatch.setattr("curvlinops.estimators.estimate._INNER_NUMEL", 28)
    torch.testing.assert_close(inner(X, Y), X.T @ Y)
    assert inner(X.float(), Y.float()).dtype == torch.float64 and inner(X[:, :0], Y).shape == (0, 4)
