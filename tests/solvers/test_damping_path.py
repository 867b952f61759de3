"""Solutions for many dampings: each with the residual asked for, for the products of the hardest one."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    DampingPath,
    Diagonal,
    GGNLinearOperator,
    TensorLinearOperator,
    damping_path,
)
from tests.solvers.spd_problems import (
    CountingMatrix,
    noise,
    noting_warnings,
    relative_residual,
    spd_matrix,
    with_eigenvalues,
)

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

NAN, INF = float("nan"), float("inf")


def true_residuals(M: Tensor, B: Tensor, dampings: Any, path: DampingPath) -> list[Tensor]:
    """‖b - (A + λ I) x‖ / ‖b‖ for each damping; for a zero column the size of its solution."""
    B = B.double().reshape(len(M), -1)
    residuals = []
    for damping, X in zip(dampings, path.solutions, strict=True):
        X = X.double().reshape(len(M), -1)
        residual = relative_residual(M.double() + float(damping) * torch.eye(len(M)).double(), X, B)
        residuals.append(torch.where((B == 0).all(0), X.norm(dim=0), residual))
    return residuals


# -- solutions ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    size=st.integers(1, 25),
    condition=st.sampled_from([1.0, 1e2, 1e5]),
    K=st.sampled_from([None, 1, 4]),
    dampings=st.lists(st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 1.0, 1e3]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_every_solution_has_the_residual(
    size: int, condition: float, K: int | None, dampings: list[float], seed: int
) -> None:
    """In any order, repeated ones too."""
    M, B = spd_matrix(size, condition, seed), noise(size, *([] if K is None else [K]), seed=seed + 1)
    A = CountingMatrix(M)
    path = damping_path(A, B, dampings, max_iter=40 * size)
    assert len(path.solutions) == len(path.info) == len(dampings)
    for damping, X, info, true in zip(
        dampings, path.solutions, path.info, true_residuals(M, B, dampings, path), strict=True
    ):
        assert X.shape == B.shape and (true <= 1e-8).all() and info.converged.all()
        torch.testing.assert_close(info.residual_norm, true, rtol=1e-3, atol=1e-14 * condition)
        truth = torch.linalg.solve(M + damping * torch.eye(size).double(), B)
        assert (X - truth).norm() <= 1.1e-8 * condition * truth.norm() + 1e-12
        assert info.num_iterations.shape == ((1,) if K is None else (K,))
        assert (info.num_iterations <= 40 * size).all()
    assert path.num_matvecs == A.count
    assert sum(info.num_matvecs for info in path.info) <= path.num_matvecs


def test_order_does_not_matter() -> None:
    M, B = spd_matrix(20, 1e3), noise(20, 2)
    dampings = [1.0, 1e-3, 1e-1, 1e-3, 0.0]
    path = damping_path(TensorLinearOperator(M), B, dampings)
    ordered = damping_path(TensorLinearOperator(M), B, sorted(dampings))
    for damping, X in zip(dampings, path.solutions, strict=True):
        assert torch.equal(X, ordered.solutions[sorted(dampings).index(damping)])
    assert torch.equal(path.solutions[1], path.solutions[3])
    assert path.num_matvecs == ordered.num_matvecs
    iterations = [info.num_iterations.max().item() for info in ordered.info]
    assert iterations == sorted(iterations, reverse=True), "larger dampings are easier"


@pytest.mark.parametrize("form", ["tensor", "array", "tuple"])
def test_dampings_as_tensor_array_and_tuple(form: str) -> None:
    M, b, values = spd_matrix(8, 30.0), noise(8), [1e-2, 1.0]
    dampings: Any = {"tensor": torch.tensor(values), "array": np.array(values), "tuple": tuple(values)}[form]
    path = damping_path(TensorLinearOperator(M), b, dampings)
    assert all((true <= 1.1e-8).all() for true in true_residuals(M, b, dampings, path))


def test_columns_of_different_difficulty() -> None:
    M = spd_matrix(30, 1e4, 5)
    vectors = torch.linalg.eigh(M)[1]
    B = torch.stack(
        [vectors[:, 0], torch.zeros(30).double(), 1e-9 * noise(30, seed=6), 1e9 * vectors[:, -3:].sum(1)], dim=1
    )
    dampings = [1e-3, 1e-1, 10.0]
    path = damping_path(TensorLinearOperator(M), B, dampings)
    for true in true_residuals(M, B, dampings, path):
        assert (true <= 1e-8).all()
    for info in path.info:
        iterations = info.num_iterations.tolist()
        assert iterations[0] <= 1 and iterations[1] == 0 and iterations[3] <= 3 and info.converged.all()
    assert path.info[0].num_iterations[2] > 15


def test_zero_right_hand_side() -> None:
    path = damping_path(CountingMatrix(spd_matrix(6, 10.0)), torch.zeros(6, 2).double(), [0.1, 1.0])
    assert all(X.abs().max() == 0 for X in path.solutions) and all(info.converged.all() for info in path.info)
    assert path.num_matvecs == 0


def test_no_columns() -> None:
    path = damping_path(CountingMatrix(spd_matrix(6, 10.0)), torch.zeros(6, 0).double(), [0.1, 1.0])
    assert [X.shape for X in path.solutions] == [(6, 0), (6, 0)]


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, [-27, -10, 10, 22]), (torch.float64, [-170, 160])])
def test_size_of_the_right_hand_side_does_not_matter(dtype: torch.dtype, powers: list[int]) -> None:
    M, b = spd_matrix(6, 10.0, 1, dtype), noise(6, seed=2, dtype=dtype)
    truth = [torch.linalg.solve(M + damping * torch.eye(6, dtype=dtype), b) for damping in (0.1, 1.0)]
    for power in powers:
        path = damping_path(TensorLinearOperator(M), b * 10.0**power, [0.1, 1.0])
        for x, expected in zip(path.solutions, truth, strict=True):
            torch.testing.assert_close(x / 10.0**power, expected, rtol=1e-3, atol=1e-3)


def test_dampings_far_apart() -> None:
    M, B = spd_matrix(12, 10.0), noise(12, 2)
    dampings = [1e-12, 1e12]
    path = damping_path(TensorLinearOperator(M), B, dampings)
    assert all((true <= 1e-8).all() for true in true_residuals(M, B, dampings, path))
    torch.testing.assert_close(path.solutions[1], B / 1e12, rtol=1e-8, atol=0)


def test_negative_damping_of_a_definite_matrix() -> None:
    M, B = 2 * torch.eye(12).double() + spd_matrix(12, 10.0), noise(12, 2)
    dampings = [-1.5, 0.0, 1.0]
    path = damping_path(TensorLinearOperator(M), B, dampings)
    assert all((true <= 1e-8).all() for true in true_residuals(M, B, dampings, path))


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "list", "dict"])
@pytest.mark.parametrize("K", [None, 3])
def test_formats(kind: str, K: int | None) -> None:
    shapes = {"w": (2, 2), "b": (3,)}
    zero = Diagonal({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
    M, B = spd_matrix(7, 20.0), noise(7, *([] if K is None else [K]), seed=1)

    def form(X: Tensor) -> Any:
        parts = [p.reshape(*s, *X.shape[1:]) for p, s in zip(X.split([4, 3]), shapes.values(), strict=True)]
        return {"flat": X, "list": parts, "dict": dict(zip(shapes, parts, strict=True))}[kind]

    path = damping_path(TensorLinearOperator(M) + zero, form(B), [0.5, 1.0])
    for damping, answer in zip([0.5, 1.0], path.solutions, strict=True):
        expected = form(torch.linalg.solve(M + damping * torch.eye(7).double(), B))
        assert type(answer) is type(expected)
        torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-6)


def test_other_layouts_gradients_and_inference_mode() -> None:
    M = spd_matrix(8, 20.0)
    B = noise(3, 16, seed=1)[:, ::2].T
    path = damping_path(TensorLinearOperator(M), B.clone().requires_grad_(), [0.5])
    assert not path.solutions[0].requires_grad
    truth = torch.linalg.solve(M + 0.5 * torch.eye(8).double(), B)
    torch.testing.assert_close(path.solutions[0], truth, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        path = damping_path(TensorLinearOperator(M), B.clone(), [0.5])
    torch.testing.assert_close(path.solutions[0], truth, rtol=1e-6, atol=1e-6)


# -- cost --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("K", [1, 5])
def test_costs_what_the_smallest_damping_costs(smallest: float, K: int) -> None:
    M, B = spd_matrix(50, 1e8, 1), noise(50, K, seed=2)
    dampings = [smallest * 10**power for power in range(5)]
    A, alone = CountingMatrix(M), CountingMatrix(M)
    path = damping_path(A, B, dampings, max_iter=3000)
    assert all((true <= 1e-8).all() for true in true_residuals(M, B, dampings, path))
    CGInverseLinearOperator(alone.damped(smallest), max_iter=3000) @ B
    assert path.num_matvecs == A.count
    assert A.count - K * len(dampings) <= 1.1 * alone.count, f"{A.count} products, {alone.count} for the hardest"


def test_float32_is_finished_by_solves_of_its_own() -> None:
    """Rounding makes the shared recurrence promise too much; products of its own say where it was corrected."""
    corrected = 0
    for seed in range(5):
        M, B = spd_matrix(50, 1e6, seed, torch.float32), noise(50, 3, seed=seed + 1, dtype=torch.float32)
        dampings = [0.03, 0.1, 0.3, 1.0]
        with noting_warnings():  # the smallest damping is near what float32 can reach
            path = damping_path(TensorLinearOperator(M), B, dampings, rtol=3e-6, max_iter=2000)
        for info, true in zip(path.info, true_residuals(M, B, dampings, path), strict=True):
            assert (true <= 3e-6).all() and (info.converged | (info.residual_norm > 2e-6)).all()
            corrected += int(info.num_matvecs > 3 and bool(info.converged.all()))
    assert corrected > 0, "these problems test nothing"


# -- where it cannot succeed -------------------------------------------------------------------------------------------


def test_out_of_reach_warns_once_and_names_the_dampings() -> None:
    M, B = spd_matrix(40, 1e8, 1, torch.float32), noise(40, 2, seed=2, dtype=torch.float32)
    dampings = [1.0, 1e-6, 1e-5]
    with pytest.warns(ConvergenceWarning) as caught:
        path = damping_path(TensorLinearOperator(M), B, dampings)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "2 of 3 dampings (1e-06, 1e-05)" in message, message
    residuals = true_residuals(M, B, dampings, path)
    for info, true in zip(path.info, residuals, strict=True):
        assert (true[info.converged] <= 1e-5).all()
        assert ((info.residual_norm.double() - true).abs() <= 0.05 * true + 1e-5 + info.attainable).all()
    assert [bool(info.converged.all()) for info in path.info] == [True, False, False]


def test_too_few_iterations() -> None:
    M, B = spd_matrix(40, 1e4, 1), noise(40, 2, seed=2)
    with pytest.warns(ConvergenceWarning, match=r"2 of 3 dampings \(0.0001, 0.001\).*max_iter"):
        path = damping_path(TensorLinearOperator(M), B, [1e-4, 10.0, 1e-3], max_iter=12)
    assert path.info[1].converged.all()
    assert all((info.num_iterations <= 12).all() for info in path.info)


def test_negative_curvature() -> None:
    """What is definite is solved all the same, and the rest is never called converged."""
    M = with_eigenvalues(torch.linspace(-1, 3, 10).double(), 1)
    B, dampings = noise(10, 3, seed=2), [0.5, 2.0, 0.0, 5.0]
    with pytest.warns(ConvergenceWarning) as caught:
        path = damping_path(TensorLinearOperator(M), B, dampings)
    assert len(caught) == 1 and "negative curvature" in str(caught[0].message)
    for damping, X, info, true in zip(
        dampings, path.solutions, path.info, true_residuals(M, B, dampings, path), strict=True
    ):
        assert X.isfinite().all() and (true[info.converged] <= 1e-8).all()
        assert info.converged.all() or damping < 1


@pytest.mark.parametrize("value", [NAN, INF])
def test_column_that_is_not_finite(value: float) -> None:
    M, B = spd_matrix(8, 20.0), noise(8, 3, seed=1)
    B[0, 0] = value
    with pytest.warns(ConvergenceWarning, match="2 of 2"):
        path = damping_path(TensorLinearOperator(M), B, [0.5, 1.0])
    for damping, X, info in zip([0.5, 1.0], path.solutions, path.info, strict=True):
        assert info.converged.tolist() == [False, True, True]
        truth = torch.linalg.solve(M + damping * torch.eye(8).double(), B[:, 1:])
        torch.testing.assert_close(X[:, 1:], truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF])
def test_operator_that_is_not_finite(value: float) -> None:
    A = Diagonal(torch.tensor([1.0, value, 2.0]))
    with pytest.raises((RuntimeError, ConvergenceWarning)):
        damping_path(A, torch.ones(3), [0.5, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    M, B = spd_matrix(8, 4.0).to(dtype), noise(8, 2).to(dtype)
    M = torch.triu(M) + torch.triu(M, 1).T
    path = damping_path(TensorLinearOperator(M), B, [0.5, 1.0], rtol=0.05)
    for X, true in zip(path.solutions, true_residuals(M, B, [0.5, 1.0], path), strict=True):
        assert X.dtype == dtype and (true <= 0.06).all()


# -- budgets and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budget_is_never_exceeded(K: int, dtype: torch.dtype) -> None:
    M, B, dampings = spd_matrix(30, 1e4, 1, dtype), noise(30, K, dtype=dtype), [1e-3, 1.0, 1e-2]
    ended = set()
    for max_matvecs in [*range(1, 30), 50, 75, 100, 200, 400]:
        A = CountingMatrix(M)
        with noting_warnings() as messages:
            path = damping_path(A, B, dampings, max_matvecs=max_matvecs)
        assert A.count == path.num_matvecs <= max_matvecs
        done = [bool(info.converged.all()) for info in path.info]
        assert len(messages) == int(not all(done))
        for X, info, true in zip(path.solutions, path.info, true_residuals(M, B, dampings, path), strict=True):
            assert X.isfinite().all()
            tolerance = 1e-8 if dtype == torch.float64 else 1e-5
            assert (true[info.converged] <= tolerance).all()
            # A residual that is told is true, also where there was no product left to verify it.
            assert ((info.residual_norm.double() - true).abs() <= 1e-3 * true + 1e-4).all()
            ended.add(info.ended_by if not info.converged.all() else "converged")
    # What float32 cannot reach is given up without the budget.
    assert ended - {None} == {"max_matvecs", "converged"} and (None not in ended or dtype == torch.float32)


def test_callback_sees_the_shared_run_and_time_ends_it() -> None:
    M, B, seen = spd_matrix(20, 1e3), noise(20, 2), []
    path = damping_path(TensorLinearOperator(M), B, [0.01, 1.0], callback=seen.append)
    assert [progress.num_iterations for progress in seen] == list(range(1, len(seen) + 1))
    assert len(seen) == path.info[0].num_iterations.max()
    with pytest.warns(ConvergenceWarning):
        path = damping_path(TensorLinearOperator(M), B, [0.01, 1.0], max_seconds=1e-9)
    assert [info.ended_by for info in path.info] == ["max_seconds"] * 2
    assert not any(info.converged.any() for info in path.info)


@pytest.mark.parametrize(
    ("dampings", "message"),
    [([], "at least one"), ([1.0, NAN], "finite.*nan"), ([INF], "finite.*inf"), (1.0, "dampings: expected")],
)
def test_dampings_out_of_range_are_refused(dampings: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        damping_path(Diagonal(torch.ones(3)), torch.ones(3), dampings)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="linear operator, got Tensor"):
        damping_path(torch.eye(3), torch.ones(3), [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        damping_path(TensorLinearOperator(noise(3, 4)), noise(4), [1.0])
    with pytest.raises(ValueError, match="self-adjoint"):
        damping_path(TensorLinearOperator(noise(3, 3)), noise(3), [1.0])
    with pytest.raises(ValueError, match=re.escape("[3] or [3, K]")):
        damping_path(Diagonal(torch.ones(3)), torch.ones(4), [1.0])
    with pytest.raises(ValueError, match="rtol"):
        damping_path(Diagonal(torch.ones(3)), torch.ones(3), [1.0], rtol=-1.0)


def test_network() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    data = [(noise(10, 3, seed=7), noise(10, 2, seed=8))]
    G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False)
    B, dampings = noise(G.shape[0], 2, seed=9), [1e-2, 1.0, 0.1]
    path = damping_path(G, B, dampings)
    assert all((true <= 1.01e-8).all() for true in true_residuals(G.to_dense(), B, dampings, path))
