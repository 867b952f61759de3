"""Conjugate gradients where they cannot succeed: what is returned is finite or an error, and never called converged."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import CGInverseLinearOperator, ConvergenceWarning, Diagonal, TensorLinearOperator
from tests.solvers.spd_problems import (
    CountingOperator,
    noise,
    relative_residual,
    spd_matrix,
    with_eigenvalues,
)

NAN, INF = float("nan"), float("inf")


def check_honest(M: Tensor, B: Tensor, X: Tensor, inverse: CGInverseLinearOperator) -> None:
    """What is called converged is; the residuals are true; nothing is worse than the zero vector, or NaN.

    Conjugate gradients make xᵀAx/2 - bᵀx smaller with each step, though not the residual.
    """
    assert inverse.info is not None
    true = relative_residual(M, X, B)
    assert X.isfinite().all()
    rounding = torch.finfo(X.dtype).eps * X.double().norm(dim=0) / B.double().norm(dim=0)  # of A x, whose norm is 1
    M, B, Y = M.double(), B.double().reshape(len(M), -1), X.double().reshape(len(M), -1)
    energy = (Y * (M @ Y)).sum(0) / 2 - (B * Y).sum(0)
    assert (energy <= 1e-6 * B.norm(dim=0) * Y.norm(dim=0)).all(), f"worse than no solution at all: {energy}"
    assert ((inverse.info.residual_norm.double() - true).abs() <= 0.05 * true + 1e-5 + 0.2 * rounding).all()
    assert not (inverse.info.converged & inverse.info.breakdown).any()


# -- not enough iterations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [None, 3])
def test_warning_names_the_residual(K: int | None) -> None:
    M, B = spd_matrix(50, 1e5, 1), noise(50, *([] if K is None else [K]), seed=2)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=20)
    with pytest.warns(ConvergenceWarning) as caught:
        X = inverse @ B
    assert len(caught) == 1
    worst = relative_residual(M, X.reshape(50, -1), B.reshape(50, -1)).max().item()
    numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e[+-]?\d+)?", str(caught[0].message))]
    assert any(abs(n - worst) <= 0.06 * worst for n in numbers), f"{worst} is not in: {caught[0].message}"
    assert issubclass(ConvergenceWarning, UserWarning)


def test_converged_solves_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CGInverseLinearOperator(TensorLinearOperator(spd_matrix(20, 10.0))) @ noise(20, 2)


@settings(max_examples=25)
@given(st.sampled_from([1e4, 1e6, 1e8]), st.integers(1, 60), st.sampled_from([torch.float32, torch.float64]))
def test_any_number_of_iterations_is_honest(condition: float, max_iter: int, dtype: torch.dtype) -> None:
    M, B = spd_matrix(20, condition, 7, dtype), noise(20, 3, seed=8, dtype=dtype)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        X = inverse @ B
    check_honest(M, B, X, inverse)
    assert inverse.info is not None and (inverse.info.num_iterations <= max_iter).all()


@pytest.mark.parametrize("rtol", [1e-9, 0.0])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_tolerance_below_what_float32_can_reach(rtol: float, condition: float) -> None:
    """It ends after a bounded number of products, warns, and is as good as float32 can be."""
    M, B = spd_matrix(30, condition, 1, torch.float32), noise(30, 2, seed=2, dtype=torch.float32)
    A = CountingOperator(M)
    inverse = CGInverseLinearOperator(A, rtol=rtol, max_iter=500)
    with pytest.warns(ConvergenceWarning):
        X = inverse @ B
    assert inverse.info is not None and not inverse.info.converged.any()
    assert (inverse.info.num_iterations <= 500).all()
    assert sum(A.num_columns) <= inverse.info.num_iterations.sum() + 50, "iterations are not all counted"
    check_honest(M, B, X, inverse)
    floor = 2.0**-24 * X.norm(dim=0) / B.norm(dim=0)
    assert (inverse.info.residual_norm <= 30 * floor).all(), "far above the floor of float32"


@pytest.mark.parametrize("rtol", [0.0, 1e-25])
def test_residuals_that_vanish_are_no_breakdown(rtol: float) -> None:
    """Squares of what is left of the residual vanish in float32, which says nothing about the curvature."""
    for seed in range(20):
        M, b = spd_matrix(20, 10.0, seed, torch.float32), noise(20, seed=seed + 1, dtype=torch.float32)
        inverse = CGInverseLinearOperator(TensorLinearOperator(M), rtol=rtol)
        with pytest.warns(ConvergenceWarning):
            x = inverse @ b
        assert relative_residual(M, x[:, None], b[:, None]).item() <= 1e-5, f"seed {seed}"


def test_one_column_below_the_floor_does_not_hold_up_the_others() -> None:
    M = spd_matrix(30, 1e5, 1, torch.float32)
    vectors = torch.linalg.eigh(M)[1]
    B = torch.stack([vectors[:, -1], noise(30, seed=2, dtype=torch.float32)], dim=1)
    inverse = CGInverseLinearOperator(CountingOperator(M), rtol=1e-6, max_iter=300)
    with pytest.warns(ConvergenceWarning, match="1 of 2"):
        inverse @ B
    assert inverse.info is not None
    assert inverse.info.converged.tolist() == [True, False]
    assert inverse.info.num_iterations[0] <= 3


# -- negative curvature ------------------------------------------------------------------------------------------------


def indefinite(size: int = 6) -> Tensor:
    eigenvalues = torch.linspace(1, 2, size, dtype=torch.float64)
    eigenvalues[0] = -1.0
    return with_eigenvalues(eigenvalues, seed=3)


def test_negative_curvature_raises_for_one_right_hand_side() -> None:
    M = indefinite()
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    b = torch.linalg.eigh(M)[1][:, 0]
    for question in (b, b[:, None]):
        with pytest.raises(RuntimeError, match="negative curvature"):
            inverse @ question
    with pytest.raises(RuntimeError, match="negative curvature"):
        b @ inverse


def test_negative_curvature_stops_the_columns_that_meet_it() -> None:
    M = indefinite()
    vectors = torch.linalg.eigh(M)[1]
    B = torch.stack([vectors[:, 0], vectors[:, 1], noise(6, seed=4), vectors[:, 2:4].sum(1)], dim=1)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        X = inverse @ B
    assert inverse.info is not None
    assert inverse.info.breakdown.tolist()[0] and not inverse.info.breakdown[[1, 3]].any()
    assert inverse.info.converged[[1, 3]].all() and not inverse.info.converged[0]
    check_honest(M, B, X, inverse)
    torch.testing.assert_close(X[:, [1, 3]], torch.linalg.solve(M, B)[:, [1, 3]])


def test_on_breakdown_decides() -> None:
    M = indefinite()
    b = torch.linalg.eigh(M)[1][:, 0]
    A = TensorLinearOperator(M)
    stopping = CGInverseLinearOperator(A, on_breakdown="stop")
    with pytest.warns(ConvergenceWarning):
        x = stopping @ b
    assert x.isfinite().all() and stopping.info is not None and stopping.info.breakdown.tolist() == [True]
    raising = CGInverseLinearOperator(A, on_breakdown="raise")
    with pytest.raises(RuntimeError, match="column 1"):
        raising @ torch.stack([torch.linalg.eigh(M)[1][:, 1], b], dim=1)
    raising.set_cg_hyperparameters(on_breakdown="stop")
    with pytest.warns(ConvergenceWarning):
        raising @ b


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(1, 5))
def test_negative_definite_is_always_found(seed: int, size: int) -> None:
    M = -spd_matrix(size, 10.0, seed)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), on_breakdown="stop")
    with pytest.warns(ConvergenceWarning):
        inverse @ noise(size, 3, seed=seed)
    assert inverse.info is not None and inverse.info.breakdown.all() and not inverse.info.converged.any()


def test_indefinite_preconditioner_is_found() -> None:
    inverse = CGInverseLinearOperator(
        TensorLinearOperator(spd_matrix(6, 10.0)), preconditioner=lambda R: -R, on_breakdown="raise"
    )
    with pytest.raises(RuntimeError, match="preconditioner"):
        inverse @ noise(6)


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_useless_preconditioner_is_never_called_converged(value: float) -> None:
    A = TensorLinearOperator(spd_matrix(6, 10.0))
    inverse = CGInverseLinearOperator(A, preconditioner=lambda R: torch.full_like(R, value), on_breakdown="stop")
    with pytest.warns(ConvergenceWarning):
        inverse @ noise(6, 2)
    assert inverse.info is not None and not inverse.info.converged.any()


# -- singular ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
def test_singular_operator(seed: int, rank: int, dtype: torch.dtype) -> None:
    """Inside of the range it is solved; outside there is no solution, so no convergence, and no NaN."""
    F = noise(12, rank, seed=seed, dtype=dtype)
    M = F @ F.T
    M = (M + M.T) / 2
    B = noise(12, 4, seed=seed + 1, dtype=dtype)
    B[:, 0] = F @ noise(rank, seed=seed + 2, dtype=dtype)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), rtol=1e-3, on_breakdown="stop", max_iter=200)
    with pytest.warns(ConvergenceWarning, match="3 of 4"):
        X = inverse @ B
    check_honest(M, B, X, inverse)
    assert inverse.info is not None
    assert inverse.info.converged.tolist() == [True, False, False, False]


def test_zero_operator() -> None:
    inverse = CGInverseLinearOperator(Diagonal(torch.zeros(4)))
    with pytest.warns(ConvergenceWarning):
        x = inverse @ torch.ones(4)
    assert x.isfinite().all() and inverse.info is not None
    assert not inverse.info.converged.any() and not inverse.info.breakdown.any()


# -- not a number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("K", [None, 3])
def test_right_hand_side_that_is_not_finite(value: float, K: int | None) -> None:
    M = spd_matrix(8, 10.0)
    B = noise(8, *([] if K is None else [K]), seed=1)
    B[0] = value
    if K is not None:
        B[0, 1:] = 1.0
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), on_breakdown="stop")
    with pytest.warns(ConvergenceWarning):
        X = inverse @ B
    assert inverse.info is not None and not inverse.info.converged[0]
    if K is not None:
        assert inverse.info.converged[1:].all()
        torch.testing.assert_close(X[:, 1:], torch.linalg.solve(M, B[:, 1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("K", [None, 3])
def test_operator_that_is_not_finite(value: float, K: int | None) -> None:
    B = noise(4, *([] if K is None else [K]), seed=1)
    A = Diagonal(torch.tensor([1.0, 2.0, value, 3.0], dtype=torch.float64))
    inverse = CGInverseLinearOperator(A)
    with pytest.raises((RuntimeError, ConvergenceWarning)), warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        inverse @ B
    assert inverse.info is not None and not inverse.info.converged.any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_first_iterate_that_is_not_finite(value: float) -> None:
    M = spd_matrix(8, 10.0)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), x0=torch.full((8,), value).double(), on_breakdown="stop")
    with pytest.raises(ValueError, match="x0: expected finite"):
        inverse @ noise(8)
