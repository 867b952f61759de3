"""The inverse by a truncated Neumann series: equal to the explicit sum, linear, and honest where it diverges."""

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops import (
    ConvergenceWarning,
    Diagonal,
    GGNLinearOperator,
    LinearOperator,
    NeumannInverseLinearOperator,
    TensorLinearOperator,
)
from tests.solvers.spd_problems import (
    CountingMatrix,
    jacobi,
    noise,
    noting_warnings,
    relative_residual,
    spd_matrix,
    with_eigenvalues,
)

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

NAN, INF = float("nan"), float("inf")


def series(A: Tensor, P: Tensor | None, scale: float, num_terms: int) -> Tensor:
    """s Σ_{j=0}^{J} (I - s P A)^j P, power by power."""
    identity = torch.eye(len(A), dtype=A.dtype)
    P = identity if P is None else P
    step, power, total = identity - scale * P @ A, identity, torch.zeros_like(A)
    for _ in range(num_terms + 1):
        total, power = total + power, power @ step
    return scale * total @ P


def pair(symmetric: bool, size: int = 7) -> tuple[Tensor, Tensor]:
    """A matrix and a preconditioner."""
    if symmetric:
        return spd_matrix(size, 20.0, 1), spd_matrix(size, 3.0, 2)
    eye = torch.eye(size).double()
    return eye + 0.2 * noise(size, size, seed=3), eye + 0.1 * noise(size, size, seed=4)


# -- the sum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_terms", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("preconditioner", [None, "operator", "function"])
def test_equals_the_explicit_sum(num_terms: int, scale: float, symmetric: bool, preconditioner: str | None) -> None:
    A, M = pair(symmetric)
    P: Any = {None: None, "operator": TensorLinearOperator(M), "function": lambda R: M @ R}[preconditioner]
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), num_terms, scale, preconditioner=P)
    truth = series(A, None if P is None else M, scale, num_terms)
    torch.testing.assert_close(inverse.to_dense(), truth, rtol=1e-10, atol=1e-10)
    b = noise(7, seed=5)
    torch.testing.assert_close(inverse @ b, truth @ b, rtol=1e-10, atol=1e-10)
    if preconditioner != "function":
        torch.testing.assert_close(inverse.H.to_dense(), truth.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(b @ inverse, b @ truth, rtol=1e-10, atol=1e-10)
        assert (inverse.H is inverse) == symmetric


@settings(max_examples=20)
@given(size=st.integers(1, 12), seed=st.integers(0, 99), num_terms=st.integers(0, 30))
def test_is_linear_and_its_residual_is_true(size: int, seed: int, num_terms: int) -> None:
    A = spd_matrix(size, 50.0, seed)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), num_terms)
    B = noise(size, 3, seed=seed + 1)
    X = inverse @ B
    assert inverse.info is not None
    torch.testing.assert_close(inverse.info.residual_norm, relative_residual(A, X, B), rtol=1e-8, atol=1e-12)
    assert inverse.info.num_iterations.tolist() == [num_terms + 1] * 3
    assert inverse.info.history.shape == (num_terms + 2, 3)
    torch.testing.assert_close(inverse @ (B[:, 0] - 2 * B[:, 1]), X[:, 0] - 2 * X[:, 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_terms", [0, 1, 10])
@pytest.mark.parametrize("x0", [False, True])
def test_products_are_counted(num_terms: int, x0: bool) -> None:
    A = CountingMatrix(spd_matrix(6, 10.0))
    inverse = NeumannInverseLinearOperator(A, num_terms, x0=noise(6) if x0 else None)
    inverse @ noise(6, 3, seed=1)
    assert inverse.info is not None
    assert inverse.info.num_matvecs == A.count == 3 * (num_terms + 1 + int(x0))


def test_preconditioner_makes_it_converge_sooner() -> None:
    scales = torch.logspace(0, 2, 12, dtype=torch.float64)
    M = torch.diag(scales) + 0.01 * with_eigenvalues(torch.ones(12).double())
    B = noise(12, 2, seed=1)
    helped = NeumannInverseLinearOperator(TensorLinearOperator(M), 30, preconditioner=jacobi(M), rtol=1e-8)
    assert (relative_residual(M, helped @ B, B) <= 1e-8).all()
    plain = NeumannInverseLinearOperator(TensorLinearOperator(M), 30, scale=0.015)
    assert (relative_residual(M, plain @ B, B) > 1e-2).all()


@pytest.mark.parametrize("scale", [-1.0, -0.5])
def test_negative_scale_serves_negative_definite_matrices(scale: float) -> None:
    A = -spd_matrix(6, 5.0)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), 300, scale)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(A), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    A = spd_matrix(6, 5.0, 1).to(dtype)
    A = torch.triu(A) + torch.triu(A, 1).T
    B = noise(6, 3, seed=1).to(dtype)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), 10)
    X = inverse @ B
    truth = series(A.double(), None, 1.0, 10) @ B.double()
    assert X.dtype == dtype and (X.double() - truth).norm() <= tolerance * truth.norm()
    assert inverse.info is not None
    true = relative_residual(A, X, B)
    torch.testing.assert_close(inverse.info.residual_norm.double(), true, rtol=10 * tolerance, atol=3 * tolerance)


# -- divergence --------------------------------------------------------------------------------------------------------


def suggested_scale(message: str) -> float:
    found = re.search(r"scale of about ([0-9.e+-]+)", message)
    assert found, message
    return float(found[1])


@pytest.mark.parametrize("num_terms", [0, 1, 5, 100])
@pytest.mark.parametrize(("largest", "scale"), [(2.5, 1.0), (50.0, 1.0), (50.0, 3.0), (1e6, 1.0)])
def test_divergence_suggests_a_scale_that_converges(num_terms: int, largest: float, scale: float) -> None:
    """A tenth below what is suggested, also where only few terms have been seen."""
    A = TensorLinearOperator(largest * spd_matrix(10, 5.0, 1))
    B = noise(10, 3, seed=2)
    try:
        NeumannInverseLinearOperator(A, num_terms, scale) @ B
    except RuntimeError as error:
        assert "diverges in 3 of 3 columns" in str(error)
        better = suggested_scale(str(error))
        assert 0 < better < scale
        X = NeumannInverseLinearOperator(A, 500, 0.9 * better) @ B
        assert (relative_residual(A.to_dense(), X, B) <= 1e-6).all()
    else:
        assert num_terms < 5 and largest < 3, "the residual of a few terms may be below the first one"


def test_divergence_of_an_indefinite_matrix_and_of_one_column() -> None:
    A = Diagonal(torch.tensor([1.0, -0.5, 0.5]).double())
    B = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    inverse = NeumannInverseLinearOperator(A, 50)
    with pytest.raises(RuntimeError, match="diverges in 1 of 2 columns"):
        inverse @ B
    assert inverse.info is not None and inverse.info.breakdown.tolist() == [False, True]
    torch.testing.assert_close(inverse @ B[:, 0], torch.tensor([1.0, 0.0, 2.0]).double())


def test_divergence_is_noticed_before_all_terms_are_spent() -> None:
    A = CountingMatrix(100 * spd_matrix(6, 5.0))
    with pytest.raises(RuntimeError, match="diverges"):
        NeumannInverseLinearOperator(A, 10_000) @ noise(6)
    assert A.count < 100


def test_convergence_that_starts_badly_is_no_divergence() -> None:
    """A matrix that is not normal lets residuals grow before they fall."""
    A = torch.eye(4, dtype=torch.float64) + 3 * torch.diag(torch.ones(3, dtype=torch.float64), 1)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), 6)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(A))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["operator", "right-hand side", "first iterate"])
def test_what_is_not_finite(value: float, where: str) -> None:
    entries, b, x0 = torch.tensor([1.0, 0.5]), torch.ones(2), torch.ones(2)
    {"operator": entries, "right-hand side": b, "first iterate": x0}[where][1] = value
    inverse = NeumannInverseLinearOperator(Diagonal(entries), 5, x0=x0)
    with pytest.raises((RuntimeError, ValueError), match=r"not finite|x0: expected finite"):
        inverse @ b
    unchecked = NeumannInverseLinearOperator(Diagonal(entries), 5, check_nan=False, x0=x0)
    try:
        x = unchecked @ b
    except (RuntimeError, ValueError) as error:  # as a divergence, or a first iterate that is refused
        assert "diverges" in str(error) or "x0" in str(error)
    else:
        assert unchecked.info is not None and not unchecked.info.converged.any()
        assert not x.isfinite().all(), "a number was made of what is none"


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_stops_where_the_residual_is_small_enough(rtol: float) -> None:
    M = spd_matrix(8, 20.0, 1)
    easy = torch.linalg.eigh(M)[1][:, -1]
    B = torch.stack([easy, noise(8, seed=2), torch.zeros(8).double()], dim=1)
    A = CountingMatrix(M)
    inverse = NeumannInverseLinearOperator(A, 2000, rtol=rtol)
    X = inverse @ B
    info = inverse.info
    assert info is not None and info.converged.all()
    iterations = info.num_iterations.tolist()
    assert iterations[0] <= 2 and iterations[2] == 0 and 5 < iterations[1] < 1000
    assert A.count == sum(iterations) + 2, "columns that are done are still multiplied, but for verifying"
    residuals = relative_residual(M, X[:, :2], B[:, :2])
    assert (residuals <= rtol * (1 + 1e-6)).all() and info.history[-2, 1] > rtol
    all_terms = NeumannInverseLinearOperator(A, 50)
    all_terms @ B
    assert all_terms.info is not None and all_terms.info.num_iterations.tolist()[:2] == [51, 51]


def test_out_of_reach_warns_only_where_it_was_asked_for() -> None:
    M, b = spd_matrix(8, 1e4, 1), noise(8, seed=2)
    NeumannInverseLinearOperator(TensorLinearOperator(M), 10) @ b
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(M), 10, rtol=1e-6)
    with pytest.warns(ConvergenceWarning, match=r"1e-06.*1 of 1.*num_terms=10"):
        inverse @ b
    assert inverse.info is not None and not inverse.info.converged.any()


def test_first_iterate_and_warm_start() -> None:
    M, b = spd_matrix(8, 20.0, 1), noise(8, seed=2)
    x0 = noise(8, seed=3)
    before = x0.clone()
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(M), 6, x0=x0)
    truth = x0 + series(M, None, 1.0, 6) @ (b - M @ x0)
    torch.testing.assert_close(inverse @ b, truth)
    assert torch.equal(x0, before)
    warm = NeumannInverseLinearOperator(TensorLinearOperator(M), 6, warm_start=True)
    one = warm @ b
    torch.testing.assert_close(one, series(M, None, 1.0, 6) @ b)
    torch.testing.assert_close(warm @ b, one + series(M, None, 1.0, 6) @ (b - M @ one))


def test_first_iterate_stays_out_of_the_adjoint() -> None:
    A, _ = pair(False)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), 6, x0=noise(7, seed=3), warm_start=True)
    inverse @ noise(7)
    torch.testing.assert_close(noise(7) @ inverse, noise(7) @ series(A, None, 1.0, 6))


def test_function_has_no_adjoint() -> None:
    A, M = pair(False)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(A), 6, preconditioner=lambda R: M @ R)
    with pytest.raises(NotImplementedError, match="operator"):
        noise(7) @ inverse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_terms": -1}, "num_terms"),
        ({"num_terms": 2.5}, "num_terms"),
        ({"num_terms": True}, "num_terms"),
        ({"scale": 0.0}, "scale"),
        ({"scale": NAN}, "scale"),
        ({"scale": INF}, "scale"),
        ({"rtol": -1.0}, "rtol"),
        ({"rtol": NAN}, "rtol"),
        ({"preconditioner": TensorLinearOperator(torch.eye(3))}, r"preconditioner.*\(4, 4\).*\(3, 3\)"),
        ({"x0": torch.ones(5)}, r"\[4\]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NeumannInverseLinearOperator(Diagonal(torch.ones(4)), **options) @ torch.ones(4)


def test_integers_of_numpy_are_taken() -> None:
    inverse = NeumannInverseLinearOperator(Diagonal(torch.full((2,), 0.5)), np.int64(2))
    assert (inverse @ torch.ones(2)).tolist() == [1.75, 1.75]


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="linear operator, got Tensor"):
        NeumannInverseLinearOperator(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        NeumannInverseLinearOperator(TensorLinearOperator(noise(3, 4)))
    with pytest.raises(TypeError, match="preconditioner"):
        NeumannInverseLinearOperator(Diagonal(torch.ones(3)), preconditioner=torch.eye(3))  # type: ignore[arg-type]


# -- as an operator ----------------------------------------------------------------------------------------------------


def test_formats_scipy_pickles_and_frozen() -> None:
    A = Diagonal({"w": torch.tensor([[0.5, 1.0]]), "b": torch.tensor([0.25])})
    inverse: LinearOperator = NeumannInverseLinearOperator(A, 1, preconditioner=Diagonal(torch.ones(3)))
    answer = inverse @ {"w": torch.ones(1, 2), "b": torch.ones(1)}
    assert answer["w"].tolist() == [[1.5, 1.0]] and answer["b"].tolist() == [1.75]
    assert [x.shape for x in inverse @ [torch.ones(1, 2, 4), torch.ones(1, 4)]] == [(1, 2, 4), (1, 4)]
    assert (inverse @ torch.zeros(3, 0)).shape == (3, 0)
    np.testing.assert_allclose(inverse.to_scipy().matvec(np.ones(3, np.float32)), [1.5, 1.0, 1.75])
    entries = torch.tensor([0.5])
    live = NeumannInverseLinearOperator(Diagonal(entries), 1)
    copies = [live.frozen(), pickle.loads(pickle.dumps(live))]
    entries.mul_(2)
    assert [(copy @ torch.ones(1)).item() for copy in copies] == [1.5, 1.5] and (live @ torch.ones(1)).item() == 1.0


def test_network() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    data = [(noise(10, 3, seed=7), noise(10, 2, seed=8))]
    G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data, check_deterministic=False)
    A = G.damped(0.1)
    B = noise(G.shape[0], 2, seed=9)
    dense = A.to_dense()
    scale = 1.0 / torch.linalg.eigvalsh(dense)[-1].item()
    inverse = NeumannInverseLinearOperator(A, 20, scale)
    with noting_warnings():
        torch.testing.assert_close(inverse @ B, series(dense, None, scale, 20) @ B)
