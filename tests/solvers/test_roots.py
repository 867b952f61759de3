"""A^{1/2} B and A^{-1/2} B against dense square roots, and what `info` says of their errors."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops import (
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    IdentityLinearOperator,
    KFACLinearOperator,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    TensorLinearOperator,
)
from curvlinops.solvers.info import ConvergenceWarning
from curvlinops.solvers.roots import inverse_sqrt_matvec, sqrt_matvec
from tests.solvers.spd_problems import CountingOperator, noise, spd_matrix, with_eigenvalues

pytestmark = pytest.mark.filterwarnings("error::curvlinops.solvers.info.ConvergenceWarning")

ROOTS = {0.5: sqrt_matvec, -0.5: inverse_sqrt_matvec}
both = pytest.mark.parametrize("power", [0.5, -0.5])


def power_of(M: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M.double())
    values = values.clamp(min=0.0) if power > 0 else values
    return (vectors * values**power) @ vectors.T


def relative(X: Tensor, truth: Tensor) -> Tensor:
    return (X.double() - truth).norm(dim=0) / truth.norm(dim=0)


@both
@settings(max_examples=20, deadline=None)
@given(
    size=st.integers(1, 30),
    condition=st.sampled_from([1.0, 10.0, 1e3, 1e5]),
    K=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_small_ones_are_exact(power: float, size: int, condition: float, K: int, seed: int) -> None:
    M, B = spd_matrix(size, condition, seed), noise(size, K, seed=seed + 1)
    X, info = ROOTS[power](CountingOperator(M), B, return_info=True)
    error = relative(X, power_of(M, power) @ B)
    assert (error <= 1e-8).all() and info.converged.all()
    assert info.num_steps.shape == info.error_estimate.shape == info.converged.shape == (K,)
    assert (info.num_steps <= size).all()


SPECTRA = {
    "condition 10": torch.linspace(0.1, 1, 300),
    "condition 1e4": torch.logspace(-4, 0, 300),
    "damped": torch.logspace(-12, 1, 300) + 1e-2,
    "outliers": torch.cat([torch.linspace(1e-3, 2e-3, 290), torch.logspace(-1, 2, 10)]),
}


@both
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-8])
def test_estimates_bound_the_error(power: float, spectrum: str, rtol: float) -> None:
    """They hold, they are not far off, and the steps end when they are reached."""
    M, B = with_eigenvalues(SPECTRA[spectrum].double(), 1), noise(300, 3, seed=2)
    A = CountingOperator(M)
    X, info = ROOTS[power](A, B, rtol=rtol, return_info=True)
    error = relative(X, power_of(M, power) @ B)
    assert (error <= info.error_estimate).all() and (info.error_estimate <= rtol).all() and info.converged.all()
    assert (info.error_estimate <= 300 * error).all()
    assert (info.num_steps < 300).all() and sum(A.num_columns) == info.num_steps.sum()


def factor_of(M: Tensor) -> Kronecker:
    return Kronecker(M, torch.ones(1, dtype=M.dtype))


@both
@pytest.mark.parametrize("build", [CountingOperator, factor_of])
def test_rounding_of_float32_is_told(power: float, build: Callable[[Tensor], LinearOperator]) -> None:
    """Where float32 cannot give what was asked for, the estimate says so, and how much of it is rounding."""
    M, B = spd_matrix(200, 1e5, 1, torch.float32), noise(200, 3, seed=2, dtype=torch.float32)
    with pytest.warns(ConvergenceWarning, match="is rounding"):
        X, info = ROOTS[power](build(M), B, rtol=1e-6, return_info=True)
    error = relative(X, power_of(M, power) @ B.double())
    assert X.dtype == torch.float32 and not info.converged.any()
    assert (error <= info.error_estimate).all() and (info.rounding > 1e-6).all()


@both
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_default_tolerance_in_low_precision(power: float, dtype: torch.dtype, bound: float) -> None:
    M, B = spd_matrix(100, 5.0, 1, dtype), noise(100, 3, seed=2, dtype=dtype)
    options = {} if dtype == torch.float32 else {"rtol": 0.1}
    X, info = ROOTS[power](TensorLinearOperator(M), B, return_info=True, **options)
    assert X.dtype == dtype and info.converged.all()
    assert (relative(X, power_of(M, power) @ B.double()) <= bound).all()


# -- columns and formats -----------------------------------------------------------------------------------------------


@both
def test_identity_columns_give_the_root(power: float) -> None:
    M = spd_matrix(12, 100.0, 3)
    X = ROOTS[power](CountingOperator(M), torch.eye(12).double())
    torch.testing.assert_close(X, power_of(M, power), rtol=1e-7, atol=1e-7)
    expected = M if power > 0 else torch.linalg.inv(M)
    torch.testing.assert_close(X @ X.T, expected, rtol=1e-6, atol=1e-6)


def test_samples_have_the_inverse_as_covariance() -> None:
    M, num_samples = spd_matrix(5, 20.0, 4), 20_000
    X = inverse_sqrt_matvec(TensorLinearOperator(M), noise(5, num_samples, seed=5))
    covariance, expected = X @ X.T / num_samples, torch.linalg.inv(M)
    variances = torch.outer(expected.diagonal(), expected.diagonal()) + expected.square()
    assert ((covariance - expected).abs() <= 4.5 * (variances / num_samples).sqrt()).all()


@both
def test_columns_stop_on_their_own(power: float) -> None:
    M = spd_matrix(80, 1e3, 5)
    values, vectors = torch.linalg.eigh(M)
    B = torch.stack([vectors[:, 0], torch.zeros(80).double(), vectors[:, -3:].sum(1), noise(80), 1e9 * noise(80)], 1)
    A = CountingOperator(M)
    X, info = ROOTS[power](A, B, return_info=True)
    steps = info.num_steps.tolist()
    assert steps[0] == 1 and steps[1] == 0 and steps[2] == 3 and 20 < steps[3] == steps[4]
    assert X[:, 1].abs().max() == 0 and info.converged.all() and info.error_estimate[1] == 0
    assert sum(A.num_columns) == sum(steps)
    torch.testing.assert_close(X[:, 0], vectors[:, 0] * values[0] ** power)
    torch.testing.assert_close(X[:, 4], 1e9 * X[:, 3])


@both
def test_chunks_of_columns(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    M, B = spd_matrix(40, 30.0), noise(40, 7)
    together = ROOTS[power](CountingOperator(M), B)
    monkeypatch.setattr("curvlinops.solvers.krylov.runs._BASIS_NUMEL", 40 * 41 * 3)
    A = CountingOperator(M)
    torch.testing.assert_close(ROOTS[power](A, B), together, rtol=1e-6, atol=1e-8)
    assert max(A.num_columns) == 3


@both
def test_formats(power: float) -> None:
    M = spd_matrix(10, 10.0, 6)
    zero = Diagonal({"w": torch.zeros(3, 2).double(), "b": torch.zeros(4).double()})
    A, root = TensorLinearOperator(M) + zero, power_of(M, power)
    B = noise(10, 3)
    as_list = [B[:6].reshape(3, 2, 3), B[6:]]
    expected = [(root @ B)[:6].reshape(3, 2, 3), (root @ B)[6:]]
    apply = ROOTS[power]
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(apply(A, B), root @ B, **close)
    torch.testing.assert_close(apply(A, B[:, 0]), root @ B[:, 0], **close)
    torch.testing.assert_close(apply(A, as_list), expected, **close)
    torch.testing.assert_close(
        apply(A, dict(zip("wb", as_list, strict=True))), dict(zip("wb", expected, strict=True)), **close
    )
    vector, info = apply(A, [part[..., 0] for part in as_list], return_info=True)
    torch.testing.assert_close(vector, [part[..., 0] for part in expected], **close)
    assert info.num_steps.shape == (1,)
    assert apply(A, torch.zeros(10, 0).double()).shape == (10, 0)
    with pytest.raises(ValueError, match="Expected a tensor of shape"):
        apply(A, torch.ones(9).double())


# -- operators of every sign -------------------------------------------------------------------------------------------


def test_root_of_a_singular_matrix() -> None:
    spread = torch.cat([torch.linspace(0.5, 1, 30), torch.zeros(10)]).double()
    M, B = with_eigenvalues(spread, 1), noise(40, 3)
    X, info = sqrt_matvec(CountingOperator(M), B, rtol=1e-6, return_info=True)
    error = relative(X, power_of(M, 0.5) @ B)
    assert (error <= 1e-6).all() and (error <= info.error_estimate).all() and info.converged.all()
    assert sqrt_matvec(CountingOperator(torch.zeros(4, 4).double()), noise(4)).abs().max() == 0


@pytest.mark.parametrize("smallest", [-0.5, -1e-3])
@both
def test_indefinite_matrices_are_refused(power: float, smallest: float) -> None:
    spread = torch.linspace(0.5, 1, 20).double()
    spread[:3] = smallest
    with pytest.raises(ValueError, match=r"needs a positive (semi-)?definite operator.*Add damping"):
        ROOTS[power](CountingOperator(with_eigenvalues(spread)), noise(20, 2))


@pytest.mark.parametrize("zeros", [1, 20])
def test_inverse_root_of_a_singular_matrix_is_refused(zeros: int) -> None:
    spread = torch.linspace(0.5, 1, 20).double()
    spread[:zeros] = 0.0
    with pytest.raises(ValueError, match="needs a positive definite operator"):
        inverse_sqrt_matvec(CountingOperator(with_eigenvalues(spread)), noise(20, 2))


@both
def test_closed_forms(power: float) -> None:
    U, B = noise(9, 2), noise(9, 3)
    A = LowRankLinearOperator(TensorLinearOperator(U), c=0.5)
    X, info = ROOTS[power](A, B, return_info=True)
    torch.testing.assert_close(X, power_of(U @ U.T + 0.5 * torch.eye(9), power) @ B)
    assert info.converged.all() and info.num_steps.tolist() == [0, 0, 0]
    torch.testing.assert_close(ROOTS[power](A, B[:, 0]), X[:, 0])


@both
def test_identity_without_steps(power: float) -> None:
    B = noise(7, 2)
    X, info = ROOTS[power](4.0 * IdentityLinearOperator([(7,)], "cpu", torch.float64), B, return_info=True)
    torch.testing.assert_close(X, B * 4.0**power)
    assert info.num_steps.tolist() == [0, 0] and info.converged.all() and (info.rounding <= 1e-15).all()


Paired = tuple[LinearOperator, Tensor]


def kronecker(left: Tensor, right: Tensor, shift: float = 0.0) -> Paired:
    A = Kronecker(left, right, is_positive=True, shift=shift)
    L, R = (torch.diag(M.double()) if M.ndim == 1 else M.double() for M in (left, right))
    return A, torch.kron(L, R) + shift * torch.eye(len(L) * len(R))


def blocks(*pairs: Paired) -> Paired:
    return BlockDiagonal([A for A, _ in pairs]), torch.block_diag(*[M for _, M in pairs])


def diagonal(*entries: float) -> Paired:
    return Diagonal(torch.tensor(entries)), torch.diag(torch.tensor(entries).double())


def low_rank(U: Tensor, c: float) -> Paired:
    A = LowRankLinearOperator(TensorLinearOperator(U), c=c)
    return A, U.double() @ U.double().T + c * torch.eye(len(U))


def eigen(values: Tensor) -> Paired:
    """In a basis that is orthonormal to the bit."""
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    Q = torch.kron(torch.kron(half, half), torch.kron(half, half)) / 4
    A = EigenDecomposed(values.reshape(16, 4), Q, Q[:4, :4].clone() * 2)
    both = torch.kron(Q, Q[:4, :4] * 2).double()
    return A, both * values.double() @ both.T


ONE, OTHER = torch.ones(1), spd_matrix(3, 50.0, 9, torch.float32)
CLOSED: dict[str, Callable[[Tensor], Paired]] = {
    "dense": lambda M: (TensorLinearOperator(M), M.double()),
    "factor": lambda M: kronecker(M, ONE),
    "factor from the right": lambda M: kronecker(ONE, M),
    "factor and diagonal": lambda M: kronecker(torch.tensor([2.0, 1e-3]), M),
    "factors": lambda M: kronecker(OTHER, M),
    "factors and shift": lambda M: kronecker(OTHER, M, shift=1e-3),
    "blocks": lambda M: blocks(kronecker(1e-6 * M, ONE), diagonal(1e-9, 1.0), kronecker(M, ONE)),
    "low rank": lambda M: low_rank(M[:, :9].contiguous(), 1e-3),
    "many columns": lambda M: low_rank(M, 1e-3),
    "eigenvalues": lambda M: eigen(torch.linalg.eigvalsh(M).repeat(2)[:64]),
}


@both
@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4, 1e6])
def test_rounding_of_closed_forms_bounds_the_error(power: float, kind: str, condition: float) -> None:
    """In float32, also along the eigenvectors at both ends, where it is most."""
    A, M = CLOSED[kind](spd_matrix(40, condition, 1, torch.float32))
    vectors = torch.linalg.eigh(M).eigenvectors
    B = torch.cat([noise(len(M), 3, seed=2), vectors[:, [0, -1]]], 1).float()
    X, info = ROOTS[power](A, B, rtol=0.9, return_info=True)
    error = relative(X, power_of(M, power) @ B.double())
    assert (error <= info.error_estimate).all(), (error, info)
    assert torch.equal(info.error_estimate, info.rounding) and info.num_steps.abs().max() == 0
    if condition == 1.0 and kind != "many columns":
        assert (info.rounding <= 1e-3).all()


@pytest.mark.parametrize("kind", ["dense", "blocks", "low rank", "eigenvalues"])
@both
def test_closed_forms_of_good_matrices_do_not_warn(power: float, kind: str) -> None:
    A, M = CLOSED[kind](spd_matrix(40, 20.0, 1, torch.float32))
    B = noise(len(M), 3, seed=2).float()
    X, info = ROOTS[power](A, B, return_info=True)
    assert info.converged.all() and (relative(X, power_of(M, power) @ B.double()) <= 1e-5).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_roots_are_as_good_as_their_dtype(power: float, dtype: torch.dtype) -> None:
    """Whatever the condition, since they are decomposed in float64."""
    M, eps = spd_matrix(200, 1e5 if dtype == torch.float32 else 50.0, 1, dtype), torch.finfo(dtype).eps
    B = noise(200, 3, seed=2, dtype=dtype)
    X, info = ROOTS[power](TensorLinearOperator(M), B, rtol=2 * eps, return_info=True)
    error = relative(X, power_of(M, power) @ B.double())
    assert X.dtype == dtype and info.converged.all() and (error <= info.error_estimate).all()


@pytest.mark.parametrize("build", [TensorLinearOperator, factor_of])
def test_closed_roots_that_do_not_exist_are_refused(build: Callable[[Tensor], LinearOperator]) -> None:
    values = torch.linspace(0.5, 1, 8)
    for smallest in (-1e-3, 0.0, 1e-9):
        values[0] = smallest
        A, B = build(with_eigenvalues(values.double(), 3).float()), noise(8, 2).float()
        with pytest.raises(ValueError, match=r"inverse_sqrt_matvec needs a positive definite operator.*Add damping"):
            inverse_sqrt_matvec(A, B)
        if smallest < 0:
            with pytest.raises(ValueError, match=r"sqrt_matvec needs a positive semi-definite operator.*Add damping"):
                sqrt_matvec(A, B)
        else:
            X = sqrt_matvec(A, B, rtol=0.1)
            assert (relative(X, power_of(with_eigenvalues(values.double(), 3), 0.5) @ B.double()) <= 1e-3).all()
    with pytest.raises(ValueError, match="needs a positive definite operator"):
        inverse_sqrt_matvec(Kronecker(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), torch.ones(4))


def test_factors_may_be_worse_conditioned_together_than_their_dtype() -> None:
    left, right = torch.tensor([1e-5, 1.0]), torch.tensor([1.0, 1e5])
    X, info = inverse_sqrt_matvec(Kronecker(left, right, is_positive=True), torch.ones(4), return_info=True)
    torch.testing.assert_close(X, torch.kron(left, right).rsqrt())
    assert info.converged.all()
    shifted = Kronecker(left, right, is_positive=True, shift=1e-2)
    torch.testing.assert_close(inverse_sqrt_matvec(shifted, torch.ones(4)), (torch.kron(left, right) + 1e-2).rsqrt())


@both
def test_matrices_that_compute_their_blocks(power: float) -> None:
    """They are computed once, and each block is rounded by its own size."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    data = [(noise(30, 3, seed=7), noise(30, 2, seed=8))]
    K = KFACLinearOperator(model, nn.MSELoss(), list(model.parameters()), data, fisher_type="type-2")
    M, B = K.to_dense(), noise(K.shape[0], 2)
    X, info = ROOTS[power](K, B, return_info=True)
    error = relative(X, power_of(M, power) @ B)
    assert info.num_steps.tolist() == [0, 0] and (error <= info.error_estimate + 1e-12).all() and (error <= 1e-8).all()


# -- limits ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bound", [{"max_steps": 9}, {"max_matvecs": 29}, {"max_seconds": 1e-9}])
def test_limits_end_it_with_a_warning(power: float, bound: dict[str, Any]) -> None:
    M, B = spd_matrix(60, 1e4, 1), noise(60, 3)
    A = CountingOperator(M)
    with pytest.warns(ConvergenceWarning, match="3 of 3 columns"):
        X, info = ROOTS[power](A, B, return_info=True, **bound)
    steps = 0 if "max_seconds" in bound else 9
    assert info.num_steps.tolist() == [steps] * 3 and A.num_columns == [3] * steps
    assert not info.converged.any()
    if steps:
        assert (relative(X, power_of(M, power) @ B) <= info.error_estimate).all()
    else:
        assert (info.error_estimate == float("inf")).all() and X.abs().max() == 0


def test_bad_options() -> None:
    A, b = TensorLinearOperator(spd_matrix(5, 2.0)), noise(5)
    options: list[tuple[dict[str, Any], str]] = [
        ({"rtol": 0.0}, "rtol"), ({"rtol": 1.5}, "rtol"), ({"max_steps": 0}, "max_steps"),
        ({"max_matvecs": 0}, "max_matvecs"), ({"max_seconds": -1.0}, "max_seconds"),
    ]  # fmt: skip
    for chosen, message in options:
        for root in ROOTS.values():
            with pytest.raises(ValueError, match=message):
                root(A, b, **chosen)
    with pytest.raises(TypeError, match="linear operator"):
        sqrt_matvec(torch.eye(3), b)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="self-adjoint"):
        inverse_sqrt_matvec(TensorLinearOperator(torch.triu(torch.ones(3, 3))), torch.ones(3))


def test_random_state_and_arguments_are_left_alone() -> None:
    A, B = TensorLinearOperator(spd_matrix(30, 9.0)), noise(30, 2)
    before, copy = torch.get_rng_state(), B.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqrt_matvec(A, B, progressbar=True)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(B, copy)
