"""Conjugate gradients where they should succeed: the solution, the number of iterations, and what `info` says."""

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import CGInverseLinearOperator, ConvergenceWarning, Diagonal, LinearOperator, TensorLinearOperator
from tests.solvers.spd_problems import (
    CountingOperator,
    jacobi,
    noise,
    relative_residual,
    spd_matrix,
    textbook_cg,
    with_eigenvalues,
)

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

STEP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def check_info(A: Tensor, B: Tensor, X: Tensor, inverse: CGInverseLinearOperator, rtol: float) -> None:
    """`info` has one entry a column, and its residuals are those of the solution that was handed out."""
    info, K = inverse.info, 1 if B.ndim == 1 else B.shape[1]
    assert info is not None
    for field in (info.num_iterations, info.residual_norm, info.converged, info.breakdown):
        assert isinstance(field, Tensor) and field.shape == (K,)
    assert info.converged.dtype == info.breakdown.dtype == torch.bool
    assert not info.num_iterations.is_floating_point()
    true = relative_residual(A, X.reshape(-1, K), B.reshape(-1, K))
    # Computing b - A x rounds A x, whose terms may be larger than b.
    size = A.double().norm() * X.double().reshape(-1, K).norm(dim=0) / B.double().reshape(-1, K).norm(dim=0)
    assert ((info.residual_norm.double() - true).abs() <= 4 * STEP[B.dtype] * (1 + size)).all()
    assert torch.equal(info.converged, info.residual_norm <= rtol)


@settings(max_examples=25)
@given(
    size=st.integers(1, 25),
    condition=st.sampled_from([1.0, 1e1, 1e2, 1e4, 1e6]),
    K=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_exact_in_float64(size: int, condition: float, K: int | None, seed: int) -> None:
    M = spd_matrix(size, condition, seed)
    B = noise(size, *([] if K is None else [K]), seed=seed + 1)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=40 * size)
    X = inverse @ B
    check_info(M, B, X, inverse, 1e-8)
    assert inverse.info is not None and inverse.info.converged.all() and not inverse.info.breakdown.any()
    truth = torch.linalg.solve(M, B)
    assert (X - truth).norm() <= 1.1e-8 * condition * truth.norm() + 1e-12


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"),
    [
        (torch.float64, 1e8, 1e-7),
        (torch.float32, 1.0, 1e-5),
        (torch.float32, 1e1, 1e-5),
        (torch.float32, 1e2, 1e-5),
        (torch.float32, 1e4, 1e-3),
        (torch.bfloat16, 1.0, 1e-2),
        (torch.bfloat16, 1e1, 5e-2),
    ],
)
def test_exact_as_far_as_the_dtype_goes(dtype: torch.dtype, condition: float, rtol: float) -> None:
    M, B = spd_matrix(20, condition, 3, dtype), noise(20, 3, seed=4, dtype=dtype)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), rtol=rtol, max_iter=800)
    X = inverse @ B
    assert X.dtype == dtype
    check_info(M, B, X, inverse, rtol)
    assert inverse.info is not None and inverse.info.converged.all()
    true = relative_residual(M, X, B)
    # What is returned is rounded once more, which is seen in half precision only.
    assert (true <= rtol + 4 * STEP[dtype] * (1 + M.double().norm() * X.double().norm(dim=0))).all()


def test_default_tolerances() -> None:
    for dtype, rtol in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        M, b = spd_matrix(30, 50.0, 1, dtype), noise(30, seed=2, dtype=dtype)
        inverse = CGInverseLinearOperator(TensorLinearOperator(M))
        residual = relative_residual(M, (inverse @ b)[:, None], b[:, None]).item()
        assert 1e-3 * rtol < residual <= 1.1 * rtol


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterations_are_those_of_the_textbook(condition: float, preconditioned: bool) -> None:
    scales = torch.logspace(0, 1, 30, dtype=torch.float64)
    M = scales[:, None] * spd_matrix(30, condition, 1) * scales
    M = (M + M.T) / 2
    b = noise(30, seed=2)
    P = jacobi(M) if preconditioned else None
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=2000, preconditioner=P)
    inverse @ b
    _, expected = textbook_cg(M, b, 1e-8, 2000, *([] if P is None else [lambda r: P @ r]))
    assert inverse.info is not None
    assert abs(inverse.info.num_iterations.item() - expected) <= max(1, 0.05 * expected)


@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_as_many_iterations_as_distinct_eigenvalues(num_values: int) -> None:
    eigenvalues = torch.linspace(1, 3, num_values, dtype=torch.float64).repeat_interleave(6)
    inverse = CGInverseLinearOperator(TensorLinearOperator(with_eigenvalues(eigenvalues)))
    inverse @ noise(6 * num_values, 2, seed=1)
    assert inverse.info is not None and inverse.info.num_iterations.tolist() == [num_values] * 2


# -- columns -----------------------------------------------------------------------------------------------------------


def test_columns_of_different_difficulty_stop_on_their_own() -> None:
    """An eigenvector, the zero vector, an easy and a hard one: each as if it were alone."""
    M = spd_matrix(40, 1e4, 5)
    eigenvalues, vectors = torch.linalg.eigh(M)
    easy = vectors[:, -3:].sum(1)
    B = torch.stack([vectors[:, 0], torch.zeros(40).double(), easy, noise(40, seed=6), 1e6 * easy], dim=1)
    A = CountingOperator(M)
    inverse = CGInverseLinearOperator(A, max_iter=2000)
    X = inverse @ B
    assert inverse.info is not None
    together = inverse.info.num_iterations.tolist()
    assert together[0] == 1 and together[1] == 0 and together[2] == together[4] == 3 and together[3] > 40
    torch.testing.assert_close(X[:, 0], vectors[:, 0] / eigenvalues[0])
    assert X[:, 1].abs().max() == 0
    assert sum(A.num_columns) < sum(together) + 12, "columns that are done are still multiplied"
    for k in range(5):
        alone = inverse @ B[:, k]
        assert abs(inverse.info.num_iterations.item() - together[k]) <= 1 + 0.05 * together[k]
        torch.testing.assert_close(X[:, k], alone, rtol=1e-4, atol=1e-7 * alone.norm().item())


def test_converged_columns_beside_one_that_is_not() -> None:
    M = spd_matrix(40, 1e4, 5)
    vectors = torch.linalg.eigh(M)[1]
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=10)
    B = torch.stack([vectors[:, 0], noise(40, seed=6)], dim=1)
    with pytest.warns(ConvergenceWarning, match="1 of 2"):
        X = inverse @ B
    assert inverse.info is not None
    assert inverse.info.converged.tolist() == [True, False]
    assert inverse.info.num_iterations.tolist() == [1, 10]
    torch.testing.assert_close(inverse.info.residual_norm, relative_residual(M, X, B), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("x0", [None, "ones"])
def test_zero_gives_zero(x0: str | None) -> None:
    M = spd_matrix(10, 10.0)
    start = None if x0 is None else torch.ones(10).double()
    A = CountingOperator(M)
    inverse = CGInverseLinearOperator(A, x0=start)
    assert torch.equal(inverse @ torch.zeros(10).double(), torch.zeros(10).double())
    assert inverse.info is not None
    assert inverse.info.converged.item() and inverse.info.num_iterations.item() == 0
    assert inverse.info.residual_norm.item() == 0.0 and not inverse.info.breakdown.item()
    X = inverse @ torch.stack([torch.zeros(10).double(), noise(10)], dim=1)
    assert X[:, 0].abs().max() == 0 and X[:, 1].abs().max() > 0


def test_no_columns() -> None:
    inverse = CGInverseLinearOperator(TensorLinearOperator(spd_matrix(4, 10.0)))
    assert (inverse @ torch.zeros(4, 0).double()).shape == (4, 0)
    assert (torch.zeros(0, 4).double() @ inverse).shape == (0, 4)


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, [-27, -22, -10, 10, 22]), (torch.float64, [-170, 160])])
def test_size_of_the_right_hand_side_does_not_matter(dtype: torch.dtype, powers: list[int]) -> None:
    """Squares of small numbers vanish and of large ones overflow; A⁻¹ (c b) = c A⁻¹ b all the same."""
    M, b = spd_matrix(6, 10.0, 1, dtype), noise(6, seed=2, dtype=dtype)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    truth = torch.linalg.solve(M, b)
    for power in powers:
        x = inverse @ (b * 10.0**power)
        torch.testing.assert_close(x / 10.0**power, truth, rtol=1e-3, atol=1e-3, msg=f"b times 1e{power}: {x}")


# -- first iterate and preconditioner ----------------------------------------------------------------------------------

SHAPES = {"w": (3, 2), "b": (4,)}


def structured() -> tuple[LinearOperator, Tensor]:
    """A positive definite operator with names and its matrix."""
    M = spd_matrix(10, 100.0, 8)
    zero = Diagonal({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()})
    return TensorLinearOperator(M) + zero, M


def as_format(x: Tensor, kind: str) -> Any:
    parts = [p.reshape(*s, *x.shape[1:]) for p, s in zip(x.split([6, 4]), SHAPES.values(), strict=True)]
    return {"flat": x, "list": parts, "dict": dict(zip(SHAPES, parts, strict=True))}[kind]


@pytest.mark.parametrize("kind", ["flat", "list", "dict"])
@pytest.mark.parametrize("K", [None, 1, 3])
def test_first_iterate_in_every_format(kind: str, K: int | None) -> None:
    A, M = structured()
    B = noise(10, 3, seed=9)
    X = torch.linalg.solve(M, B)
    start = X[:, 0] if K is None else X[:, :K]
    inverse = CGInverseLinearOperator(A, x0=as_format(start, kind))
    torch.testing.assert_close(inverse @ B, X, rtol=1e-5, atol=1e-5)
    assert inverse.info is not None
    iterations = inverse.info.num_iterations.tolist()
    assert iterations[0] == 0 and all((n == 0) == (K == 3) for n in iterations[1:])
    before = start.clone()
    inverse @ B
    assert torch.equal(start, before), "the first iterate was written to"


def test_first_iterate_of_another_size_is_refused() -> None:
    A, _ = structured()
    with pytest.raises(ValueError, match=r"x0.*3 columns, got 2"):
        CGInverseLinearOperator(A, x0=torch.ones(10, 2).double()) @ torch.ones(10, 3).double()
    with pytest.raises(ValueError, match=r"\[9\]"):
        CGInverseLinearOperator(A, x0=torch.ones(9).double()) @ torch.ones(10).double()


def test_answers_in_the_format_of_the_question() -> None:
    A, M = structured()
    inverse = CGInverseLinearOperator(A)
    b = noise(10, seed=3)
    x = torch.linalg.solve(M, b)
    answer = inverse @ as_format(b, "dict")
    assert list(answer) == list(SHAPES)
    for actual, expected in zip(answer.values(), as_format(x, "list"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b @ inverse, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["operator", "function", "named operator"])
def test_preconditioner_saves_iterations(kind: str) -> None:
    scales = torch.logspace(0, 4, 40, dtype=torch.float64)
    M = torch.diag(scales) + 0.01 * with_eigenvalues(torch.ones(40).double())
    B = noise(40, 3, seed=1)
    P = jacobi(M)
    form: Any = {"operator": P, "function": lambda R: P @ R, "named operator": Diagonal({"w": P.diagonal()})}[kind]
    A = TensorLinearOperator(M)
    plain, helped = CGInverseLinearOperator(A), CGInverseLinearOperator(A, preconditioner=form)
    torch.testing.assert_close(helped @ B, torch.linalg.solve(M, B), rtol=1e-6, atol=1e-8)
    plain @ B
    assert plain.info is not None and helped.info is not None
    assert (helped.info.num_iterations * 3 < plain.info.num_iterations).all()
    assert (relative_residual(M, helped @ B, B) <= 1e-8).all()


def test_exact_preconditioner_needs_one_iteration() -> None:
    M = spd_matrix(20, 1e3, 2)
    A = TensorLinearOperator(M)
    inverse = CGInverseLinearOperator(A, preconditioner=A.inverse())
    inverse @ noise(20, 2, seed=3)
    assert inverse.info is not None and inverse.info.num_iterations.tolist() == [1, 1]


# -- as an operator ----------------------------------------------------------------------------------------------------


def test_adjoint_and_scipy_form() -> None:
    M = spd_matrix(8, 100.0, 4)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), rtol=1e-12)
    truth, V = torch.linalg.inv(M), noise(8, 2, seed=5)
    assert inverse.SELF_ADJOINT and inverse.H is inverse and inverse.T is inverse
    torch.testing.assert_close(inverse.to_dense(), truth)
    torch.testing.assert_close(V.T @ inverse, V.T @ truth)
    S = inverse.to_scipy()
    for product in (S.matvec, S.rmatvec):
        np.testing.assert_allclose(product(V[:, 0].numpy()), truth @ V[:, 0], rtol=1e-9, atol=1e-9)
    for product in (S.matmat, S.rmatmat):
        np.testing.assert_allclose(product(V.numpy()), truth @ V, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((2 * inverse + inverse).to_dense(), 3 * truth)
    torch.testing.assert_close((TensorLinearOperator(M) @ inverse).to_dense(), torch.eye(8).double())


def test_info_is_of_the_last_solve() -> None:
    M = spd_matrix(8, 100.0, 4)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    assert inverse.info is None
    inverse @ noise(8)
    first = inverse.info
    inverse @ noise(8, 3)
    assert first is not None and inverse.info is not None
    assert len(first.converged) == 1 and len(inverse.info.converged) == 3


def test_works_without_gradients_and_in_inference_mode() -> None:
    M = spd_matrix(8, 100.0, 4)
    truth = torch.linalg.solve(M, noise(8))
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(inverse @ noise(8), truth, rtol=1e-5, atol=1e-5)
    b = noise(8).requires_grad_()
    assert not (inverse @ b).requires_grad


def test_pickles_and_frozen_keep_the_options() -> None:
    M = spd_matrix(12, 1e3, 4)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M), 1e-3, 5, jacobi(M), torch.ones(12).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = inverse @ noise(12)
        for copy in (pickle.loads(pickle.dumps(inverse)), inverse.frozen()):
            assert torch.equal(copy @ noise(12), truth)
