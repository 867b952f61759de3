"""The inverse by minimal residuals: solutions, iterations as SciPy's, singular matrices, preconditioners."""

import pickle
import warnings
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
    GGNLinearOperator,
    HessianLinearOperator,
    LinearOperator,
    MINRESInverseLinearOperator,
    TensorLinearOperator,
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


def indefinite_matrix(size: int, condition: float, seed: int = 0) -> Tensor:
    """Eigenvalues of both signs, of sizes from 1 down to 1 / condition."""
    sizes = torch.logspace(0, -np.log10(condition), size, dtype=torch.float64)
    signs = torch.ones(size, dtype=torch.float64)
    signs[seed % 2 :: 2] = -1
    return with_eigenvalues(sizes * signs, seed)


# -- solutions ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    size=st.integers(1, 25),
    condition=st.sampled_from([1.0, 1e1, 1e2, 1e4, 1e6]),
    K=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
    definite=st.booleans(),
)
def test_solves_indefinite_systems(size: int, condition: float, K: int | None, seed: int, definite: bool) -> None:
    M = spd_matrix(size, condition, seed) if definite else indefinite_matrix(size, condition, seed)
    B = noise(size, *([] if K is None else [K]), seed=seed + 1)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), max_iter=40 * size)
    X, truth = inverse @ B, torch.linalg.solve(M, B)
    assert inverse.info is not None and inverse.info.converged.all() and not inverse.info.breakdown.any()
    assert (X - truth).norm() <= 1.1e-8 * condition * truth.norm() + 1e-12
    true = relative_residual(M, X.reshape(size, -1), B.reshape(size, -1))
    torch.testing.assert_close(inverse.info.residual_norm, true, rtol=1e-3, atol=1e-13 * condition)


def test_float32_reaches_what_it_can() -> None:
    M = indefinite_matrix(20, 30.0).float()
    M = (M + M.T) / 2
    B = noise(20, 3, seed=1, dtype=torch.float32)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M))
    assert (relative_residual(M, inverse @ B, B) <= 1e-5).all()
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=1e-9)
    with pytest.warns(ConvergenceWarning, match=r"float32 allows about .*float64"):
        X = inverse @ B
    assert inverse.info is not None and not inverse.info.converged.any()
    assert (relative_residual(M, X, B) <= 30 * inverse.info.attainable).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The products are as rough as the matrix, the recurrences are not; the residual is the true one."""
    M = indefinite_matrix(12, 5.0).to(dtype)
    M = torch.triu(M) + torch.triu(M, 1).T
    B = noise(12, 2, seed=1).to(dtype)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=0.1)
    X = inverse @ B
    assert X.dtype == dtype and (relative_residual(M, X, B) <= 0.12).all()


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_iterations_are_those_of_scipy(condition: float, definite: bool, rtol: float) -> None:
    """SciPy stops by a residual relative to ‖A‖‖x‖ and is stepped by a callback here until ours is reached."""
    M = spd_matrix(40, condition, 1) if definite else indefinite_matrix(40, condition, 1)
    b = noise(40, seed=2)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=rtol, max_iter=2000)
    x = inverse @ b
    residuals: list[float] = []

    def note(y: np.ndarray) -> None:
        residuals.append(float(relative_residual(M, torch.from_numpy(y)[:, None], b[:, None])))

    solution, _ = scipy.sparse.linalg.minres(M.numpy(), b.numpy(), rtol=1e-15, maxiter=2000, callback=note)
    expected = 1 + next(n for n, residual in enumerate(residuals) if residual <= rtol)
    assert inverse.info is not None
    actual = inverse.info.num_iterations.item()
    assert abs(actual - expected) <= max(2, 0.1 * expected), f"{actual} iterations, SciPy needs {expected}"
    assert (x - torch.from_numpy(solution)).norm() <= 3 * rtol * condition * x.norm()
    shared = min(10, actual, expected)  # rounding parts the two later
    theirs = torch.tensor(residuals[:shared], dtype=torch.float64)
    torch.testing.assert_close(inverse.info.history[1 : shared + 1, 0], theirs, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("size", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_never_rise(size: int, dtype: torch.dtype) -> None:
    M = indefinite_matrix(size, 1e3, 4).to(dtype)
    M = (M + M.T) / 2
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=1e-3, max_iter=1000)
    inverse @ noise(size, 4, seed=5, dtype=dtype)
    assert inverse.info is not None
    history = inverse.info.history
    assert history.shape == (int(inverse.info.num_iterations.max()) + 1, 4)
    assert (history[0] == 1).all() and (history.diff(dim=0) <= 1e-6 * history[:-1]).all()


@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_as_many_iterations_as_distinct_eigenvalues(num_values: int) -> None:
    eigenvalues = torch.linspace(-2, 3, num_values, dtype=torch.float64).repeat_interleave(6)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(with_eigenvalues(eigenvalues)))
    inverse @ noise(6 * num_values, 2, seed=1)
    assert inverse.info is not None and inverse.info.num_iterations.tolist() == [num_values] * 2


def test_columns_stop_on_their_own() -> None:
    """An eigenvector, the zero vector, an easy and a hard one: each as if it were alone."""
    M = indefinite_matrix(40, 1e3, 5)
    eigenvalues, vectors = torch.linalg.eigh(M)
    easy = vectors[:, [0, 1, -1]].sum(1)
    B = torch.stack([vectors[:, 0], torch.zeros(40).double(), easy, noise(40, seed=6), 1e6 * easy], dim=1)
    A = CountingMatrix(M)
    inverse = MINRESInverseLinearOperator(A)
    X = inverse @ B
    assert inverse.info is not None
    together, count = inverse.info.num_iterations.tolist(), A.count
    assert together[:3] == [1, 0, 3] and together[4] == 3 and together[3] > 30
    assert count < sum(together) + 30, "columns that are done are still multiplied"
    assert inverse.info.num_matvecs == count
    torch.testing.assert_close(X[:, 0], vectors[:, 0] / eigenvalues[0])
    assert X[:, 1].abs().max() == 0
    for k in range(5):
        alone = inverse @ B[:, k]
        assert abs(inverse.info.num_iterations.item() - together[k]) <= 1 + 0.05 * together[k]
        torch.testing.assert_close(X[:, k], alone, rtol=1e-4, atol=1e-7 * alone.norm().item())


@pytest.mark.parametrize(("dtype", "powers"), [(torch.float32, [-27, -10, 10, 22]), (torch.float64, [-170, 160])])
def test_size_of_the_right_hand_side_does_not_matter(dtype: torch.dtype, powers: list[int]) -> None:
    M, b = indefinite_matrix(6, 10.0, 1).to(dtype), noise(6, seed=2, dtype=dtype)
    M = (M + M.T) / 2
    inverse, truth = MINRESInverseLinearOperator(TensorLinearOperator(M)), torch.linalg.solve(M, b)
    for power in powers:
        x = inverse @ (b * 10.0**power)
        torch.testing.assert_close(x / 10.0**power, truth, rtol=1e-3, atol=1e-3, msg=f"b times 1e{power}: {x}")


def test_no_columns_one_dimension_and_other_layouts() -> None:
    M = indefinite_matrix(8, 10.0)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M))
    assert (inverse @ torch.zeros(8, 0).double()).shape == (8, 0)
    one = MINRESInverseLinearOperator(TensorLinearOperator(torch.tensor([[-4.0]])))
    assert (one @ torch.tensor([2.0])).tolist() == [-0.5]
    B = noise(3, 16, seed=1)[:, ::2].T
    assert not B.is_contiguous()
    torch.testing.assert_close(inverse @ B, torch.linalg.solve(M, B), rtol=1e-6, atol=1e-6)
    assert not (inverse @ noise(8).requires_grad_()).requires_grad
    with torch.inference_mode():
        b = noise(8)
        torch.testing.assert_close(inverse @ b, torch.linalg.solve(M, b), rtol=1e-6, atol=1e-6)


# -- singular ----------------------------------------------------------------------------------------------------------


def singular_matrix(size: int, rank: int, seed: int) -> Tensor:
    """Well separated eigenvalues of both signs, and zeros."""
    eigenvalues = torch.zeros(size, dtype=torch.float64)
    eigenvalues[:rank] = (
        torch.linspace(1, 3, rank, dtype=torch.float64) * torch.tensor([1.0, -1.0])[torch.arange(rank) % 2].double()
    )
    return with_eigenvalues(eigenvalues, seed)


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 10), st.sampled_from([torch.float32, torch.float64]))
def test_singular_and_consistent_is_solved(seed: int, rank: int, dtype: torch.dtype) -> None:
    M = singular_matrix(14, rank, seed).to(dtype)
    M = (M + M.T) / 2
    B = M @ noise(14, 3, seed=seed + 1, dtype=dtype)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=1e-4)
    X = inverse @ B
    assert (relative_residual(M, X, B) <= 1e-4).all()
    # From zero the iterates stay in the range, which makes the solution the shortest one.
    truth = torch.linalg.pinv(M.double(), rtol=1e-4) @ B.double()
    assert (X.double() - truth).norm() <= 1e-2 * truth.norm()


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 10), st.sampled_from([torch.float32, torch.float64]))
def test_singular_and_inconsistent_leaves_the_least(seed: int, rank: int, dtype: torch.dtype) -> None:
    M = singular_matrix(14, rank, seed).to(dtype)
    M = (M + M.T) / 2
    B = noise(14, 3, seed=seed + 1, dtype=dtype)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=1e-4)
    with pytest.warns(ConvergenceWarning, match=r"3 of 3.*singular"):
        X = inverse @ B
    true = relative_residual(M, X, B)
    least = relative_residual(M, torch.linalg.pinv(M.double(), rtol=1e-4) @ B.double(), B)
    assert X.isfinite().all() and (true <= 1 + 1e-5).all()
    assert (true <= 1.01 * least + 1e-3).all(), f"{true}, {least} would be possible"
    assert inverse.info is not None and not inverse.info.converged.any()
    assert (inverse.info.residual_norm.double() - true).abs().max() <= 1e-4


def test_singular_matrix_that_is_nothing_else() -> None:
    inverse = MINRESInverseLinearOperator(Diagonal(torch.zeros(4)))
    with pytest.warns(ConvergenceWarning):
        x = inverse @ torch.ones(4)
    assert x.tolist() == [0.0] * 4 and inverse.info is not None and not inverse.info.converged.any()


# -- not a number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_right_hand_side_that_is_not_finite(value: float) -> None:
    M, B = indefinite_matrix(8, 10.0), noise(8, 3, seed=1)
    B[0, 0] = value
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M))
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        X = inverse @ B
    assert inverse.info is not None and inverse.info.converged.tolist() == [False, True, True]
    torch.testing.assert_close(X[:, 1:], torch.linalg.solve(M, B[:, 1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("K", [None, 3])
def test_operator_that_is_not_finite(value: float, K: int | None) -> None:
    inverse = MINRESInverseLinearOperator(Diagonal(torch.tensor([1.0, -2.0, value, 3.0], dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="not finite"):
        inverse @ noise(4, *([] if K is None else [K]), seed=1)
    assert inverse.info is not None and not inverse.info.converged.any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_first_iterate_that_is_not_finite(value: float) -> None:
    x0 = torch.full((8,), value).double()
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(indefinite_matrix(8, 10.0)), x0=x0)
    with pytest.raises((ValueError, RuntimeError, ConvergenceWarning)):
        inverse @ noise(8)


# -- preconditioner and first iterate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["operator", "function"])
@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_preconditioned(form: str, condition: float) -> None:
    """Badly scaled rows and columns, which the preconditioner undoes; right for any that is positive definite."""
    scales = torch.logspace(0, 2, 30, dtype=torch.float64)
    core = indefinite_matrix(30, condition, 2)
    M = scales[:, None] * core * scales
    M = (M + M.T) / 2
    P = Diagonal(scales**-2)
    preconditioner: Any = {"operator": P, "function": lambda R: P @ R}[form]
    B = noise(30, 3, seed=3)
    plain = MINRESInverseLinearOperator(TensorLinearOperator(M), max_iter=3000)
    helped = MINRESInverseLinearOperator(TensorLinearOperator(M), max_iter=3000, preconditioner=preconditioner)
    with noting_warnings():
        plain @ B
    X = helped @ B
    assert (relative_residual(M, X, B) <= 1e-8).all()
    assert plain.info is not None and helped.info is not None
    assert (helped.info.num_iterations < plain.info.num_iterations).all()
    other = MINRESInverseLinearOperator(
        TensorLinearOperator(core), preconditioner=TensorLinearOperator(spd_matrix(30, 10.0, 9)), max_iter=3000
    )
    assert (relative_residual(core, other @ B, B) <= 1e-8).all()


def test_preconditioner_of_absolute_eigenvalues_needs_two_iterations() -> None:
    M = indefinite_matrix(20, 1e3, 2)
    eigenvalues, vectors = torch.linalg.eigh(M)
    P = TensorLinearOperator((vectors / eigenvalues.abs()) @ vectors.T)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), preconditioner=P)
    B = noise(20, 2, seed=3)
    torch.testing.assert_close(inverse @ B, torch.linalg.solve(M, B), rtol=1e-5, atol=1e-5)
    assert inverse.info is not None and (inverse.info.num_iterations <= 2).all()


@pytest.mark.parametrize("name", ["negative", "indefinite", "nan"])
def test_preconditioner_that_is_not_positive_is_refused(name: str) -> None:
    entries = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    P: Any = {"negative": lambda R: -R, "indefinite": Diagonal(entries), "nan": lambda R: R * NAN}[name]
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(indefinite_matrix(6, 10.0)), preconditioner=P)
    with pytest.raises(RuntimeError, match="preconditioner is not positive definite"):
        inverse @ noise(6, 2)
    assert inverse.info is not None and not inverse.info.converged.any()


SHAPES = {"w": (3, 2), "b": (4,)}


def structured() -> tuple[LinearOperator, Tensor]:
    """An indefinite operator with names and its matrix."""
    M = indefinite_matrix(10, 30.0, 8)
    zero = Diagonal({name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()})
    return TensorLinearOperator(M) + zero, M


def as_format(x: Tensor, kind: str) -> Any:
    parts = [p.reshape(*s, *x.shape[1:]) for p, s in zip(x.split([6, 4]), SHAPES.values(), strict=True)]
    return {"flat": x, "list": parts, "dict": dict(zip(SHAPES, parts, strict=True))}[kind]


@pytest.mark.parametrize("kind", ["flat", "list", "dict"])
@pytest.mark.parametrize("K", [None, 3])
def test_formats_and_first_iterate(kind: str, K: int | None) -> None:
    A, M = structured()
    B = noise(10, *([] if K is None else [K]), seed=3)
    X = torch.linalg.solve(M, B)
    for x0, num_iterations in ((None, 10), (as_format(X, kind), 0)):
        inverse = MINRESInverseLinearOperator(A, x0=x0)
        answer = inverse @ as_format(B, kind)
        for actual, expected in zip(
            answer.values() if kind == "dict" else [answer] if kind == "flat" else answer,
            [X] if kind == "flat" else as_format(X, "list"),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert inverse.info is not None and (inverse.info.num_iterations == num_iterations).all()


def test_first_iterate_is_not_written_to_and_its_size_is_checked() -> None:
    A, M = structured()
    start = noise(10, seed=5)
    inverse = MINRESInverseLinearOperator(A, x0=start)
    before = start.clone()
    B = noise(10, 2, seed=3)
    torch.testing.assert_close(inverse @ B, torch.linalg.solve(M, B), rtol=1e-5, atol=1e-5)
    assert torch.equal(start, before)
    with pytest.raises(ValueError, match=r"x0.*3 columns, got 2"):
        MINRESInverseLinearOperator(A, x0=noise(10, 2)) @ noise(10, 3)


def test_warm_start_begins_from_the_last_solution() -> None:
    _, M = structured()
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), warm_start=True)
    B = noise(10, 2, seed=3)
    inverse @ B
    inverse @ (B * (1 + 1e-12))
    assert inverse.info is not None and inverse.info.num_iterations.tolist() == [0, 0]
    torch.testing.assert_close(inverse @ noise(10, 2, seed=4), torch.linalg.solve(M, noise(10, 2, seed=4)))
    x = inverse @ B[:, 0]  # another number of columns: from zero
    torch.testing.assert_close(x, torch.linalg.solve(M, B[:, 0]), rtol=1e-5, atol=1e-5)
    cold = MINRESInverseLinearOperator(TensorLinearOperator(M))
    cold @ B
    cold @ B
    assert cold.info is not None and (cold.info.num_iterations > 0).all()


# -- as an operator ----------------------------------------------------------------------------------------------------


def test_adjoint_and_scipy_form() -> None:
    M = indefinite_matrix(8, 30.0, 4)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=1e-12)
    truth, V = torch.linalg.inv(M), noise(8, 2, seed=5)
    assert inverse.SELF_ADJOINT and inverse.H is inverse and not inverse.POSITIVE_SEMIDEFINITE
    torch.testing.assert_close(inverse.to_dense(), truth)
    torch.testing.assert_close(V.T @ inverse, V.T @ truth)
    S = inverse.to_scipy()
    for product in (S.matvec, S.rmatvec):
        np.testing.assert_allclose(product(V[:, 0].numpy()), truth @ V[:, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(S.matmat(V.numpy()), truth @ V, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((TensorLinearOperator(M) @ inverse).to_dense(), torch.eye(8).double())


def test_pickles_and_frozen_keep_the_options() -> None:
    M = indefinite_matrix(12, 1e3, 4)
    P = Diagonal(torch.full((12,), 2.0).double())
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), 1e-3, 5, P, torch.ones(12).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = inverse @ noise(12)
        for copy in (pickle.loads(pickle.dumps(inverse)), inverse.frozen()):
            assert torch.equal(copy @ noise(12), truth)
        frozen = inverse.frozen()
        M.mul_(2)
        assert torch.equal(frozen @ noise(12), truth) and not torch.equal(inverse @ noise(12), truth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1e-3}, "rtol"),
        ({"rtol": NAN}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"max_iter": 0}, "max_iter"),
        ({"preconditioner": TensorLinearOperator(torch.eye(3))}, r"preconditioner.*\(4, 4\).*\(3, 3\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MINRESInverseLinearOperator(Diagonal(torch.ones(4)), **options)


@pytest.mark.parametrize("value", [3.7, NAN, True, "3"])
@pytest.mark.parametrize("name", ["max_iter", "max_matvecs"])
def test_counts_that_are_no_integers_are_refused(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        MINRESInverseLinearOperator(Diagonal(torch.ones(4)), **{name: value})


def test_numbers_of_numpy_are_taken() -> None:
    M, b = indefinite_matrix(12, 1e2, 4), noise(12)
    inverse = MINRESInverseLinearOperator(TensorLinearOperator(M), rtol=np.float32(1e-3), max_iter=np.int64(3))
    with pytest.warns(ConvergenceWarning):
        inverse @ b
    assert inverse.info is not None and inverse.info.num_iterations.item() == 3


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="operator"):
        MINRESInverseLinearOperator(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        MINRESInverseLinearOperator(TensorLinearOperator(noise(3, 4)))
    with pytest.raises(ValueError, match=r"self-adjoint.*LSMR"):
        MINRESInverseLinearOperator(TensorLinearOperator(noise(3, 3)))
    with pytest.raises(TypeError, match="preconditioner"):
        MINRESInverseLinearOperator(Diagonal(torch.ones(3)), preconditioner=torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on_breakdown"):
        MINRESInverseLinearOperator(Diagonal(torch.ones(3)), on_breakdown="stop")  # type: ignore[call-arg]


# -- on a network ------------------------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    return model, dict(model.named_parameters()), [(noise(10, 3, seed=7), noise(10, 2, seed=8))]


def dense_hessian(model: nn.Module, params: dict[str, Tensor], data: list[tuple[Tensor, Tensor]]) -> Tensor:
    shapes, sizes = [p.shape for p in params.values()], [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.reshape(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
        prediction = torch.func.functional_call(model, dict(zip(params, parts, strict=True)), (data[0][0],))
        return nn.functional.mse_loss(prediction, data[0][1])

    hessian: Tensor = torch.autograd.functional.hessian(
        loss, torch.cat([p.detach().flatten() for p in params.values()])
    )  # type: ignore[assignment]
    return (hessian + hessian.T) / 2


def test_hessian_damped_by_a_negative_number() -> None:
    model, params, data = network()
    H = HessianLinearOperator(model, nn.MSELoss(), params, data, check_deterministic=False)
    dense = dense_hessian(model, params, data) - 0.05 * torch.eye(H.shape[0], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert eigenvalues[0] < -0.05 < 0 < eigenvalues[-1]
    inverse = MINRESInverseLinearOperator(H.damped(-0.05), max_iter=2000)
    B = noise(H.shape[0], 3, seed=9)
    torch.testing.assert_close(inverse @ B, torch.linalg.solve(dense, B), rtol=1e-4, atol=1e-4)


def test_live_operators_follow_their_parameters() -> None:
    model, params, data = network()
    G = GGNLinearOperator(model, nn.MSELoss(), params, data, check_deterministic=False)
    b = noise(G.shape[0], seed=9)
    inverse = MINRESInverseLinearOperator(G.damped(0.1), max_iter=2000)
    frozen, first = inverse.frozen(), inverse @ b
    with torch.no_grad():
        for p in params.values():
            p.mul_(1.5)
    second = inverse @ b
    assert (second - first).norm() > 0.1 * first.norm()
    assert relative_residual(G.damped(0.1).to_dense(), second[:, None], b[:, None]).item() <= 1e-7
    torch.testing.assert_close(frozen @ b, first)
