"""The least-squares inverse against dense solvers and SciPy's LSMR: all shapes, damping, first iterates."""

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops import (
    ConvergenceWarning,
    Diagonal,
    JacobianLinearOperator,
    LSMRInverseLinearOperator,
    TensorLinearOperator,
)
from tests.solvers.spd_problems import CountingMatrix, noise, noting_warnings, spd_matrix

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

NAN, INF = float("nan"), float("inf")
SHAPES = [(12, 5), (5, 12), (8, 8), (1, 4), (4, 1), (1, 1)]


def matrix(rows: int, columns: int, condition: float = 10.0, rank: int | None = None, seed: int = 0) -> Tensor:
    """A matrix of known condition, and rank."""
    most = min(rows, columns)
    U, V = (torch.linalg.qr(noise(n, n, seed=seed + i))[0][:, :most] for i, n in enumerate((rows, columns)))
    values = torch.logspace(0, -np.log10(condition), most, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    return (U * values) @ V.T


def minimiser(J: Tensor, B: Tensor, damp: float = 0.0) -> Tensor:
    """The shortest minimiser of ‖J x - b‖² + damp² ‖x‖², by a dense solver."""
    J, B, columns = J.double(), B.double().reshape(len(B), -1), J.shape[1]
    stacked = torch.cat([J, damp * torch.eye(columns, dtype=torch.float64)])
    padded = torch.cat([B, torch.zeros(columns, B.shape[1], dtype=torch.float64)])
    return torch.linalg.pinv(stacked, rtol=1e-10) @ padded


# -- against dense solvers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("damp", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimiser_of_every_shape(shape: tuple[int, int], rank: int | None, damp: float, dtype: torch.dtype) -> None:
    J, B = matrix(*shape, rank=rank).to(dtype), noise(shape[0], 3, seed=5, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), damp, tolerance, tolerance)
    X = inverse @ B
    truth = torch.linalg.pinv(J.double(), rtol=1e-4) @ B.double() if damp == 0 else minimiser(J, B, damp)
    assert X.dtype == dtype and inverse.info is not None and inverse.info.converged.all()
    torch.testing.assert_close(X.double(), truth, rtol=200 * tolerance, atol=200 * tolerance)
    for k in range(3):
        alone = inverse @ B[:, k]
        torch.testing.assert_close(alone.double(), truth[:, k], rtol=200 * tolerance, atol=200 * tolerance)


@settings(max_examples=30)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    damp=st.sampled_from([0.0, 1e-3, 0.3]),
    seed=st.integers(0, 99),
    started=st.booleans(),
)
def test_normal_equations_hold(rows: int, columns: int, damp: float, seed: int, started: bool) -> None:
    J, B = matrix(rows, columns, 30.0, seed=seed), noise(rows, 2, seed=seed + 2)
    x0 = noise(columns, 2, seed=seed + 3) if started else None
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), damp, 1e-10, 1e-10, maxiter=40 * rows, x0=x0)
    X = inverse @ B
    R = B - J @ X
    gradient = J.T @ R - damp**2 * X
    assert (gradient.norm(dim=0) <= 1e-8 * B.norm(dim=0)).all()
    info = inverse.info
    assert info is not None and info.converged.all() and info.num_matvecs > 0
    torch.testing.assert_close(info.residual_norm, R.norm(dim=0) / B.norm(dim=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("damp", [1e-2, 1.0])
def test_first_iterate_does_not_move_the_damped_minimiser(shape: tuple[int, int], damp: float) -> None:
    """As opposed to damping the correction to it alone."""
    J, B = matrix(*shape), noise(shape[0], 2, seed=5)
    truth = minimiser(J, B, damp)
    for x0 in (None, 10 * noise(shape[1], seed=6), noise(shape[1], 2, seed=7), truth):
        inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), damp, 1e-12, 1e-12, x0=x0)
        with noting_warnings():
            X = inverse @ B
        torch.testing.assert_close(X, truth, rtol=1e-8, atol=1e-8)
    assert inverse.info is not None and (inverse.info.num_iterations <= 2).all(), "began at the solution"


def test_first_iterate_stays_in_the_kernel() -> None:
    """Without damping a wide matrix keeps what it maps to zero, as SciPy's does."""
    J, b, x0 = matrix(4, 9), noise(4, seed=5), noise(9, seed=6)
    x = LSMRInverseLinearOperator(TensorLinearOperator(J), atol=1e-12, btol=1e-12, x0=x0) @ b
    kernel = torch.eye(9).double() - torch.linalg.pinv(J) @ J
    torch.testing.assert_close(x, torch.linalg.pinv(J) @ b + kernel @ x0)


# -- against SciPy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 15), (15, 40), (25, 25)])
@pytest.mark.parametrize("condition", [1e1, 1e3])
@pytest.mark.parametrize("damp", [0.0, 1e-2])
@pytest.mark.parametrize("started", [False, True])
def test_agrees_with_scipy(shape: tuple[int, int], condition: float, damp: float, started: bool) -> None:
    J, b = matrix(*shape, condition), noise(shape[0], seed=5)
    # SciPy damps the correction to the first iterate, so the two agree with one of them.
    x0 = noise(shape[1], seed=6) if started and damp == 0 else None
    options = {"damp": damp, "atol": 1e-8, "btol": 1e-8, "conlim": 1e8, "maxiter": 1000}
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), **options, x0=x0)
    x = inverse @ b
    theirs = scipy.sparse.linalg.lsmr(J.numpy(), b.numpy(), **options, x0=None if x0 is None else x0.numpy())
    # Both leave a gradient of 1e-8, which the square of the condition turns into an error.
    assert (x - torch.from_numpy(theirs[0])).norm() <= max(1e-6, 1e-7 * condition**2) * x.norm()
    assert inverse.info is not None
    ours, expected = inverse.info.num_iterations.item(), theirs[2]
    assert abs(ours - expected) <= max(3, 0.2 * expected), f"{ours} iterations, SciPy needs {expected}"


def test_defaults_are_those_of_scipy() -> None:
    ours = inspect.signature(LSMRInverseLinearOperator).parameters
    theirs = inspect.signature(scipy.sparse.linalg.lsmr).parameters
    names = ["damp", "atol", "btol", "conlim", "maxiter", "show", "x0"]
    assert list(ours)[1:8] == names == list(theirs)[2:9]
    assert [ours[name].default for name in names] == [theirs[name].default for name in names]
    J, b = matrix(30, 10, 30.0), noise(30, seed=5)
    x = LSMRInverseLinearOperator(TensorLinearOperator(J)) @ b
    r = b - J @ x
    assert (J.T @ r).norm() <= 1e-6 * r.norm()


# -- right-hand sides --------------------------------------------------------------------------------------------------


def test_orthogonal_to_the_range_and_zero() -> None:
    J = matrix(12, 5)
    b = noise(12, seed=1)
    outside = b - J @ (torch.linalg.pinv(J) @ b)
    B = torch.stack([outside, torch.zeros(12).double(), b, 1e6 * b, J @ noise(5)], dim=1)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), atol=1e-10, btol=1e-10)
    X = inverse @ B
    truth = torch.linalg.pinv(J) @ B
    assert (X[:, 0].norm() <= 1e-9) and X[:, 1].abs().max() == 0
    torch.testing.assert_close(X[:, 2:], truth[:, 2:], rtol=1e-6, atol=1e-6)
    info = inverse.info
    assert info is not None and info.converged.all()
    assert info.num_iterations[1] == 0 and info.residual_norm[1] == 0
    assert info.residual_norm[0] == pytest.approx(1.0)
    started = LSMRInverseLinearOperator(TensorLinearOperator(J), x0=torch.ones(5).double())
    assert (started @ torch.zeros(12).double()).abs().max() == 0


def test_orthogonal_to_the_range_but_for_rounding_ends() -> None:
    """A run that has no step to make is not begun again."""
    for seed in range(40):
        J, b = 1e5 * noise(20, 1, seed=seed), noise(20, seed=seed + 999)
        b = b - J[:, 0] * (J[:, 0] @ b) / (J[:, 0] @ J[:, 0])
        A = CountingMatrix(J)
        with noting_warnings():
            x = LSMRInverseLinearOperator(A, 1.0) @ b
        assert x.abs().max() <= 1e-15 and A.count < 100


def test_zero_operator() -> None:
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(torch.zeros(4, 3).double()))
    assert (inverse @ noise(4, 2)).abs().max() == 0
    assert inverse.info is not None and inverse.info.converged.all()


def test_columns_stop_on_their_own() -> None:
    J = matrix(30, 20, 1e3)
    V = torch.linalg.svd(J)[0]
    B = torch.stack([V[:, 0], V[:, :3].sum(1), noise(30, seed=2), torch.zeros(30).double()], dim=1)
    A = CountingMatrix(J)
    inverse = LSMRInverseLinearOperator(A, atol=1e-8, btol=1e-8, conlim=0)
    X = inverse @ B
    assert inverse.info is not None
    iterations = inverse.info.num_iterations.tolist()
    assert iterations[:2] == [1, 3] and iterations[2] > 15 and iterations[3] == 0
    assert inverse.info.num_matvecs == A.count <= 2 * sum(iterations) + 30
    for k in range(4):
        torch.testing.assert_close(X[:, k], inverse @ B[:, k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [NAN, INF])
def test_right_hand_side_that_is_not_finite(value: float) -> None:
    J, B = matrix(12, 5), noise(12, 3, seed=1)
    B[0, 0] = value
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J))
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        X = inverse @ B
    assert inverse.info is not None and inverse.info.converged.tolist() == [False, True, True]
    torch.testing.assert_close(X[:, 1:], torch.linalg.pinv(J) @ B[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [NAN, INF])
def test_operator_that_is_not_finite(value: float) -> None:
    inverse = LSMRInverseLinearOperator(Diagonal(torch.tensor([1.0, -2.0, value, 3.0], dtype=torch.float64)))
    with pytest.raises((RuntimeError, ConvergenceWarning)):
        inverse @ noise(4, 2)
    assert inverse.info is not None and not inverse.info.converged.any()
    assert not (inverse.info.normal_residual == 0).any(), "zero would say that this is a minimum"


@pytest.mark.parametrize("value", [NAN, INF])
def test_first_iterate_that_is_not_finite(value: float) -> None:
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(matrix(8, 8)), x0=torch.full((8,), value).double())
    with pytest.raises((ValueError, RuntimeError, ConvergenceWarning)):
        inverse @ noise(8)


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, [-27, -10, 10, 22]), (torch.float64, [-170, 160])])
def test_size_of_the_right_hand_side_does_not_matter(dtype: torch.dtype, powers: list[int]) -> None:
    J, b = matrix(9, 6).to(dtype), noise(9, seed=2, dtype=dtype)
    inverse, truth = LSMRInverseLinearOperator(TensorLinearOperator(J)), torch.linalg.pinv(J) @ b
    for power in powers:
        x = inverse @ (b * 10.0**power)
        torch.testing.assert_close(x / 10.0**power, truth, rtol=1e-3, atol=1e-3, msg=f"b times 1e{power}: {x}")


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, [-25, -22, 22, 25]), (torch.float64, [-180, 180])])
def test_size_of_the_operator_does_not_make_it_lie(dtype: torch.dtype, powers: list[int]) -> None:
    """Squares of small numbers vanish and of large ones overflow: what is called converged has to be."""
    J, b = matrix(6, 6), noise(6, seed=2)
    for power in powers:
        inverse = LSMRInverseLinearOperator(TensorLinearOperator((J * 10.0**power).to(dtype)))
        with noting_warnings():
            x = inverse @ b.to(dtype)
        residual = (b - (J * 10.0**power) @ x.double()).norm() / b.norm()
        assert inverse.info is not None
        assert residual <= 1e-3 or not inverse.info.converged.any(), f"A times 1e{power}: {residual}"


def test_no_columns_and_other_layouts() -> None:
    J = matrix(8, 5)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J))
    assert (inverse @ torch.zeros(8, 0).double()).shape == (5, 0)
    B = noise(3, 16, seed=1)[:, ::2].T
    torch.testing.assert_close(inverse @ B, torch.linalg.pinv(J) @ B, rtol=1e-5, atol=1e-5)
    assert not (inverse @ noise(8).requires_grad_()).requires_grad
    with torch.inference_mode():
        b = noise(8)
        torch.testing.assert_close(inverse @ b, torch.linalg.pinv(J) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    J, B = matrix(12, 5, 4.0).to(dtype), noise(12, 2, seed=1).to(dtype)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), atol=0.02, btol=0.02)
    X = inverse @ B
    R = B.double() - J.double() @ X.double()
    assert X.dtype == dtype and ((J.double().T @ R).norm(dim=0) <= 0.03 * R.norm(dim=0)).all()


# -- info --------------------------------------------------------------------------------------------------------------


def test_info() -> None:
    J, B = matrix(20, 8, 100.0), noise(20, 3, seed=1)
    A = CountingMatrix(J)
    inverse = LSMRInverseLinearOperator(A, atol=1e-9, btol=1e-9)
    X = inverse @ B
    info = inverse.info
    assert info is not None
    R = B - J @ X
    slope = (J.T @ R).norm(dim=0) / R.norm(dim=0)
    torch.testing.assert_close(info.residual_norm, R.norm(dim=0) / B.norm(dim=0))
    # The estimate of ‖A‖ is one from below.
    assert (info.normal_residual >= 0.99 * slope).all() and (info.normal_residual <= 1e-9).all()
    assert (info.condition > 30).all() and (info.condition <= 101).all()
    assert info.num_matvecs == A.count and info.ended_by is None and info.solution is None


def test_history_is_relative_to_the_first_iterate() -> None:
    """One row before the first iteration."""
    J, B = matrix(20, 8, 30.0), noise(20, 3, seed=1)
    for x0 in (None, 5 * noise(8, seed=2)):
        inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), x0=x0, maxiter=4)
        with noting_warnings():
            X = inverse @ B
        assert inverse.info is not None
        start = torch.zeros(8, 1).double() if x0 is None else x0[:, None]
        history, unit = inverse.info.history, (J.T @ (B - J @ start)).norm(dim=0)
        assert history.shape == (5, 3) and (history[0] == 1).all()
        torch.testing.assert_close(history[-1], (J.T @ (B - J @ X)).norm(dim=0) / unit, rtol=1e-6, atol=1e-9)
        assert (history.diff(dim=0) <= 1e-9).all(), "LSMR makes the gradient smaller with each step"


def test_what_is_out_of_reach_warns() -> None:
    J = matrix(30, 20, 1e6)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), maxiter=3)
    with pytest.warns(ConvergenceWarning, match=r"2 of 2.*3 iterations") as caught:
        inverse @ noise(30, 2)
    assert len(caught) == 1 and inverse.info is not None
    assert not inverse.info.converged.any() and inverse.info.num_iterations.tolist() == [3, 3]


@pytest.mark.parametrize("conlim", [1e2, 0.0])
def test_condition_limit(conlim: float) -> None:
    J, b = matrix(30, 20, 1e5), noise(30, seed=1)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), atol=1e-10, btol=1e-10, conlim=conlim, maxiter=2000)
    if conlim:
        with pytest.warns(ConvergenceWarning, match="condition"):
            inverse @ b
        assert inverse.info is not None and inverse.info.condition.item() > conlim
        assert inverse.info.num_iterations.item() < 100
    else:
        x = inverse @ b
        assert (x - torch.linalg.pinv(J) @ b).norm() <= 1e-2 * x.norm()


# -- as an operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_adjoint_and_scipy_form(shape: tuple[int, int], damp: float) -> None:
    J = matrix(*shape)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), damp, 1e-13, 1e-13)
    rows, columns = shape
    truth = minimiser(J, torch.eye(rows).double(), damp)
    with noting_warnings():
        assert inverse.shape == (columns, rows)
        torch.testing.assert_close(inverse.to_dense(), truth, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(inverse.H.to_dense(), truth.T, rtol=1e-8, atol=1e-8)
        Y = noise(columns, 2, seed=3)
        torch.testing.assert_close(Y.T @ inverse, Y.T @ truth, rtol=1e-8, atol=1e-8)
        S = inverse.to_scipy()
        np.testing.assert_allclose(S.matvec(np.ones(rows)), truth.numpy().sum(1), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(S.rmatvec(np.ones(columns)), truth.numpy().sum(0), rtol=1e-8, atol=1e-8)


def test_first_iterate_and_warm_start_stay_out_of_the_adjoint() -> None:
    J = matrix(9, 6)
    inverse = LSMRInverseLinearOperator(
        TensorLinearOperator(J), atol=1e-12, btol=1e-12, x0=torch.ones(6).double(), warm_start=True
    )
    truth = torch.linalg.pinv(J)
    b, y = noise(9, seed=1), noise(6, seed=2)
    with noting_warnings():
        for _ in range(2):
            torch.testing.assert_close(inverse @ b, truth @ b)
            torch.testing.assert_close(inverse.H @ y, truth.T @ y)


def test_pickles_and_frozen_keep_the_options() -> None:
    J, b = matrix(9, 6), noise(9, seed=1)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), 0.3, 1e-3, 1e-3, maxiter=3, x0=torch.ones(6).double())
    with noting_warnings():
        truth = inverse @ b
        frozen = inverse.frozen()
        for copy in (pickle.loads(pickle.dumps(inverse)), frozen):
            assert torch.equal(copy @ b, truth)
        J.mul_(2)
        assert torch.equal(frozen @ b, truth) and not torch.equal(inverse @ b, truth)


@pytest.mark.parametrize("name", ["damp", "atol", "btol", "conlim"])
@pytest.mark.parametrize("value", [-1.0, NAN])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        LSMRInverseLinearOperator(TensorLinearOperator(matrix(4, 3)), **{name: value})


def test_infinite_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="damp"):
        LSMRInverseLinearOperator(TensorLinearOperator(matrix(4, 3)), INF)


@pytest.mark.parametrize("value", [0, -1, 2.5, NAN, "3"])
def test_iterations_that_are_no_positive_integer_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="maxiter: expected"):
        LSMRInverseLinearOperator(TensorLinearOperator(matrix(4, 3)), maxiter=value)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="linear operator, got Tensor"):
        LSMRInverseLinearOperator(matrix(4, 3))  # type: ignore[arg-type]
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(matrix(4, 3)), x0=torch.ones(4).double())
    with pytest.raises(ValueError, match=r"\[3\]"):
        inverse @ torch.ones(4).double()
    two = LSMRInverseLinearOperator(TensorLinearOperator(matrix(4, 3)), x0=torch.ones(3, 2).double())
    with pytest.raises(ValueError, match=r"x0.*3 columns, got 2"):
        two @ torch.ones(4, 3).double()


def test_warm_start() -> None:
    J, B = matrix(12, 5, 100.0), noise(12, 2, seed=1)
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(J), atol=1e-8, btol=1e-8, warm_start=True)
    inverse @ B
    assert inverse.info is not None
    cold = inverse.info.num_iterations.clone()
    X = inverse @ B
    assert (inverse.info.num_iterations < cold).all() and (inverse.info.num_iterations <= 2).all()
    torch.testing.assert_close(X, torch.linalg.pinv(J) @ B, rtol=1e-5, atol=1e-5)


def test_symmetric_operators_give_symmetric_inverses() -> None:
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(spd_matrix(6, 10.0)))
    assert inverse.SELF_ADJOINT and inverse.H is inverse
    assert not LSMRInverseLinearOperator(TensorLinearOperator(noise(6, 6))).SELF_ADJOINT


# -- on a network ------------------------------------------------------------------------------------------------------


def test_jacobian_of_a_network() -> None:
    """A Gauss-Newton step: from residuals of all data to parameters, and its adjoint."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    params = dict(model.named_parameters())
    data = [(noise(8, 3, seed=7), noise(8, 2, seed=8)), (noise(6, 3, seed=9), noise(6, 2, seed=10))]
    J = JacobianLinearOperator(model, params, data, check_deterministic=False)
    X = torch.cat([x for x, _ in data])
    rows = []
    for output in model(X).flatten():
        parts = torch.autograd.grad(output, list(params.values()), retain_graph=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    dense = torch.stack(rows)
    assert J.shape == dense.shape
    B = noise(J.shape[0], 2, seed=11)
    truth = minimiser(dense, B, 0.1)
    inverse = LSMRInverseLinearOperator(J, 0.1, 1e-10, 1e-10)
    torch.testing.assert_close(inverse @ B, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        noise(J.shape[1], seed=12) @ inverse,
        noise(J.shape[1], seed=12) @ minimiser(dense, torch.eye(J.shape[0]).double(), 0.1),
        rtol=1e-6,
        atol=1e-6,
    )
    step = inverse @ [B[:, 0].reshape(J.codomain.shapes[0])]
    assert [tuple(part.shape) for part in step] == [tuple(p.shape) for p in params.values()]
