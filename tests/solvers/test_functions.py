"""Traces of functions and log-determinants, against eigenvalues computed densely."""

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import BlockDiagonal, Diagonal, IdentityLinearOperator, LowRankLinearOperator, TensorLinearOperator
from curvlinops.solvers.functions import FunctionTrace, logdet, trace_of_function
from tests.solvers.spd_problems import CountingOperator, noise, spd_matrix, with_eigenvalues

FUNCTIONS = {"exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "identity": lambda x: x, "one": torch.ones_like}


def truth(M: Tensor, f: Any) -> Tensor:
    return f(torch.linalg.eigvalsh(M.double())).sum()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("distribution", ["rademacher", "normal", "sphere"])
def test_within_standard_errors(name: str, distribution: str) -> None:
    M, f = spd_matrix(60, 50.0, 1), FUNCTIONS[name]
    A = CountingOperator(M)
    value, stderr, truncation = trace_of_function(A, f, 40, 30, distribution=distribution, return_stderr=True)
    assert value.ndim == 0 and value.dtype == torch.float64
    assert sum(A.num_columns) == 40 * 30
    expected = truth(M, f)
    assert (value - expected).abs() <= 4 * stderr + 1e-8 * expected.abs()
    assert truncation <= 1e-4 * expected.abs()
    assert torch.equal(value, trace_of_function(A, f, 40, 30, distribution=distribution))


def test_standard_error_is_that_of_repetition() -> None:
    M = spd_matrix(20, 20.0, 2)
    A = TensorLinearOperator(M)
    found = [trace_of_function(A, torch.log, 5, 20, seed=seed, return_stderr=True) for seed in range(100)]
    values, errors = torch.stack([f.value for f in found]), torch.stack([f.stderr for f in found])
    expected = truth(M, torch.log)
    assert (values.mean() - expected).abs() <= 4 * values.std() / 100**0.5
    torch.testing.assert_close(errors.square().mean().sqrt(), values.std(), rtol=0.25, atol=0)


def test_exact_for_a_diagonal_with_signs() -> None:
    """Rademacher vectors see nothing but the diagonal of f(A)."""
    entries = torch.linspace(0.1, 7, 20).double()
    value, stderr, truncation = trace_of_function(Diagonal(entries), torch.log, 3, 20, return_stderr=True)
    torch.testing.assert_close(value, entries.log().sum(), rtol=1e-10, atol=0)
    assert stderr <= 1e-9 and truncation == 0


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_polynomials_are_exact_up_to_their_degree(degree: int) -> None:
    """m steps are exact, probe by probe, for degree 2m - 1: more steps change nothing."""
    A = TensorLinearOperator(with_eigenvalues(noise(40, seed=1), 2))
    few = trace_of_function(A, lambda x: x**degree, 6, (degree + 1) // 2)
    many = trace_of_function(A, lambda x: x**degree, 6, 40)
    assert isinstance(few, Tensor) and isinstance(many, Tensor)
    torch.testing.assert_close(few, many, rtol=1e-9, atol=1e-9)
    too_few = trace_of_function(A, lambda x: x ** (degree + 1), 6, (degree + 1) // 2)
    assert isinstance(too_few, Tensor)
    assert (too_few - trace_of_function(A, lambda x: x ** (degree + 1), 6, 40)).abs() > 1e-6


def test_truncation_says_when_steps_are_too_few() -> None:
    M = spd_matrix(200, 1e5, 3)
    A = TensorLinearOperator(M)
    exact = trace_of_function(A, torch.log, 4, 200)
    for num_steps in (8, 16, 32, 64):
        value, _, truncation = trace_of_function(A, torch.log, 4, num_steps, return_stderr=True)
        error = (value - exact).abs()
        assert error / 10 <= truncation and truncation <= 10 * error + 1e-6


def test_probes_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    M = spd_matrix(50, 30.0)
    together = trace_of_function(CountingOperator(M), torch.log, 7, 12)
    monkeypatch.setattr("curvlinops.solvers.krylov.runs._BASIS_NUMEL", 50 * 13 * 3)
    A = CountingOperator(M)
    apart = trace_of_function(A, torch.log, 7, 12)
    assert set(A.num_columns) == {3, 1}
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=0)
    monkeypatch.setattr("curvlinops.solvers.krylov.runs._BASIS_NUMEL", 1)
    torch.testing.assert_close(trace_of_function(CountingOperator(M), torch.log, 7, 12), together, rtol=1e-12, atol=0)


def test_lengths_of_probes() -> None:
    """Signs and points of the sphere have the squared length D, normal vectors have it on average."""
    A = TensorLinearOperator(torch.eye(7).double())
    for distribution in ("rademacher", "sphere"):
        value, stderr, _ = trace_of_function(A, torch.ones_like, 50, 2, distribution=distribution, return_stderr=True)
        torch.testing.assert_close(value, torch.tensor(7.0).double())
        assert stderr <= 1e-12
    value, stderr, _ = trace_of_function(A, torch.ones_like, 500, 2, distribution="normal", return_stderr=True)
    torch.testing.assert_close(stderr, torch.tensor(14.0 / 500).double().sqrt(), rtol=0.2, atol=0)
    assert 0 < abs(value - 7) <= 4 * stderr


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_and_special(size: int) -> None:
    eye = torch.eye(size).double()
    torch.testing.assert_close(
        trace_of_function(TensorLinearOperator(3 * eye), torch.exp), size * torch.tensor(3.0).double().exp()
    )
    assert trace_of_function(TensorLinearOperator(0 * eye), torch.cos) == size
    M = with_eigenvalues(-torch.arange(1.0, size + 1).double())
    value, stderr, truncation = trace_of_function(TensorLinearOperator(M), torch.square, 50, return_stderr=True)
    assert (value - truth(M, torch.square)).abs() <= 4 * stderr + 1e-10 and truncation == 0


def test_random_numbers() -> None:
    A = CountingOperator(spd_matrix(20, 10.0))
    before = torch.get_rng_state()
    first = trace_of_function(A, torch.log, 3, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trace_of_function(A, torch.log, 3, 10), first)
    assert not torch.equal(trace_of_function(A, torch.log, 3, 10, seed=1), first)
    generator = torch.Generator().manual_seed(5)
    one = trace_of_function(A, torch.log, 3, 10, generator=generator)
    two = trace_of_function(A, torch.log, 3, 10, generator=generator)
    assert not torch.equal(one, two)
    again = trace_of_function(A, torch.log, 3, 10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    M = spd_matrix(40, 10.0, 1, dtype)
    value, stderr, _ = trace_of_function(TensorLinearOperator(M), torch.log, 30, 20, return_stderr=True)
    assert value.dtype == torch.float32
    error = (value.double() - truth(M, torch.log)).abs()
    assert error <= 4 * stderr + (1e-4 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes: expected at least 1"),
        ({"num_probes": 1, "return_stderr": True}, "num_probes: expected at least 2 for errors"),
        ({"num_steps": 0}, "num_steps: expected at least 1"),
        ({"num_steps": 1, "return_stderr": True}, "num_steps: expected at least 2 for errors"),
        ({"distribution": "cauchy"}, "distribution: expected one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    A = TensorLinearOperator(spd_matrix(5, 2.0))
    with pytest.raises(ValueError, match=message):
        trace_of_function(A, torch.log, **options)


def test_bad_operators_and_functions() -> None:
    good = TensorLinearOperator(spd_matrix(5, 2.0))
    with pytest.raises(TypeError, match="Expected a linear operator"):
        trace_of_function(torch.eye(3), torch.log)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="self-adjoint"):
        trace_of_function(TensorLinearOperator(torch.triu(torch.ones(3, 3))), torch.log)
    with pytest.raises(ValueError, match="square"):
        trace_of_function(TensorLinearOperator(torch.ones(3, 2)), torch.log)
    with pytest.raises(ValueError, match="f: expected a tensor of the shape"):
        trace_of_function(good, lambda x: x.sum())
    with pytest.raises(ValueError, match="f: expected finite values, got nan"):
        trace_of_function(TensorLinearOperator(-spd_matrix(5, 2.0)), torch.log)


# -- log-determinants --------------------------------------------------------------------------------------------------


def test_logdet_is_within_its_errors() -> None:
    for size, condition in ((10, 10.0), (80, 1e3)):
        M = spd_matrix(size, condition, 4)
        found = logdet(CountingOperator(M), 60, 80, return_stderr=True)
        assert isinstance(found, FunctionTrace)
        error = (found.value - torch.logdet(M)).abs()
        assert error <= 4 * found.stderr + found.truncation and found.stderr < 0.1 * torch.logdet(M).abs()
        assert torch.equal(logdet(CountingOperator(M), 60, 80), found.value)


def test_closed_forms_answer_exactly() -> None:
    U = noise(8, 2)
    matrices = {
        "diagonal": (Diagonal(torch.tensor([1.0, 4.0]).double()), torch.diag(torch.tensor([1.0, 4.0]).double())),
        "dense": (TensorLinearOperator(spd_matrix(6, 9.0)), spd_matrix(6, 9.0)),
        "low rank": (LowRankLinearOperator(TensorLinearOperator(U), c=0.5), U @ U.T + 0.5 * torch.eye(8)),
        "identity": (IdentityLinearOperator([(2, 2)], "cpu", torch.float64), torch.eye(4).double()),
    }
    for A, M in matrices.values():
        value, stderr, truncation = logdet(A, return_stderr=True)
        torch.testing.assert_close(value, torch.logdet(M), rtol=1e-10, atol=1e-12)
        assert stderr == 0 and truncation == 0
        assert torch.equal(logdet(A), value)


def test_blocks_without_a_closed_form_are_estimated() -> None:
    M = spd_matrix(6, 9.0)
    A = BlockDiagonal([CountingOperator(M), CountingOperator(2 * M)])
    A.SELF_ADJOINT = True
    value, stderr, _ = logdet(A, 50, return_stderr=True)
    assert stderr > 0 and (value - 2 * torch.logdet(M) - 6 * torch.tensor(2.0).log()).abs() <= 4 * stderr


@pytest.mark.parametrize("smallest", [-1.0, -1e-3, 0.0])
def test_logdet_of_what_is_not_positive_definite(smallest: float) -> None:
    spread = torch.linspace(0.5, 1, 20).double()
    spread[:4] = smallest
    A = CountingOperator(with_eigenvalues(spread))
    with pytest.raises(ValueError, match=r"logdet needs a positive definite operator.*Add damping"):
        logdet(A)
    damped = A.damped(1.5)
    value, stderr, _ = logdet(damped, 40, return_stderr=True)
    assert (value - (spread + 1.5).log().sum()).abs() <= 4 * stderr + 1e-9


def test_generators() -> None:
    A = TensorLinearOperator(spd_matrix(5, 2.0))
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator"):
        trace_of_function(A, torch.log, generator=3)  # type: ignore[arg-type]
