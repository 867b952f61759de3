"""Preconditioners: what they approximate, what they save, what they draw, and what they refuse."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from curvlinops import (
    CGInverseLinearOperator,
    Diagonal,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    IdentityLinearOperator,
    MINRESInverseLinearOperator,
    NystromPreconditioner,
    TensorLinearOperator,
    jacobi_preconditioner,
)
from tests.solvers.spd_problems import CountingMatrix, noise, relative_residual, spd_matrix, with_eigenvalues

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

NAN, INF = float("nan"), float("inf")


def low_rank(size: int, rank: int, seed: int = 0) -> Tensor:
    F = noise(size, rank, seed=seed)
    M = F @ F.T
    return (M + M.T) / 2


def formula(M: Tensor, rank: int, damping: float) -> Tensor:
    """U diag(1 / (λ + μ)) Uᵀ + (I - U Uᵀ) / (λ_r + μ) with the leading eigenpairs of M themselves."""
    eigenvalues, vectors = torch.linalg.eigh(M)
    values, U = eigenvalues.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    rest = torch.eye(len(M)).double() - U @ U.T
    return (U / (values + damping)) @ U.T + rest / (values[-1] + damping)


# -- the approximation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 0.06), (torch.bfloat16, 0.4)],
)
@pytest.mark.parametrize("rank", [4, 7, 20])
@pytest.mark.parametrize("size", [1.0, 1e-4, 100.0])
def test_low_rank_matrices_are_met_exactly(dtype: torch.dtype, tolerance: float, rank: int, size: float) -> None:
    """In half precision the matrix is rounded, and the sketch amplifies what that adds."""
    M = (size * low_rank(20, 4)).to(dtype)
    M = torch.triu(M) + torch.triu(M, 1).T
    P = NystromPreconditioner(TensorLinearOperator(M), rank, 0.1)
    dense = P.approximation.to_dense().double()
    assert (dense - M.double()).norm() <= tolerance * M.double().norm()
    values = P.eigenvalues()
    truth = torch.linalg.eigvalsh(M.double()).flip(0)[:rank].clamp(min=0)
    assert values.shape == (rank,) and values.dtype == dtype
    assert (values.double() - truth).abs().max() <= tolerance * truth[0]
    assert (values >= 0).all() and (values.diff() <= 0).all()


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_product_is_that_of_the_formula(damping: float) -> None:
    M = low_rank(15, 4)
    for rank in (4, 6):
        P = NystromPreconditioner(TensorLinearOperator(M), rank, damping)
        torch.testing.assert_close(P.to_dense(), formula(M, rank, damping), rtol=1e-8, atol=1e-8 / damping)
        assert P.H is P and P.POSITIVE_SEMIDEFINITE and torch.linalg.eigvalsh(P.to_dense())[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_the_damped_inverse(dtype: torch.dtype) -> None:
    M = spd_matrix(9, 50.0, 1, dtype)
    P = NystromPreconditioner(TensorLinearOperator(M), 9, 0.1)
    truth = torch.linalg.inv(M.double() + 0.1 * torch.eye(9).double())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(P.to_dense().double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decay", [0.5, 0.8])
@pytest.mark.parametrize("rank", [5, 15])
def test_decaying_spectra_are_met_nearly_as_well_as_possible(decay: float, rank: int) -> None:
    """Frangella, Tropp, Udell, proposition 2.2, bound the mean of the error for every 2 <= p <= r - 2."""
    eigenvalues = decay ** torch.arange(60, dtype=torch.float64)
    M = with_eigenvalues(eigenvalues, 3)
    errors = []
    for seed in range(10):
        P = NystromPreconditioner(TensorLinearOperator(M), rank, 0.1, seed=seed)
        error = M - P.approximation.to_dense()
        # The approximation never exceeds the matrix.
        assert torch.linalg.eigvalsh(error)[0] >= -1e-12
        assert (P.eigenvalues() <= eigenvalues[:rank] + 1e-12).all()
        errors.append(torch.linalg.matrix_norm(error, 2).item())
    best = eigenvalues[rank].item()
    assert best <= min(errors)
    bounds = [
        (1 + 2 * (rank - p) / (p - 1)) * eigenvalues[rank - p]
        + 2 * np.e**2 * rank / (p**2 - 1) * eigenvalues[rank - p :].sum()
        for p in range(2, rank - 1)
    ]
    assert np.mean(errors) <= min(bounds)


def test_zero_matrix() -> None:
    P = NystromPreconditioner(TensorLinearOperator(torch.zeros(5, 5)), 2, 0.5)
    assert P.eigenvalues().tolist() == [0.0, 0.0] and (P @ torch.ones(5)).tolist() == [2.0] * 5


def test_one_dimension() -> None:
    P = NystromPreconditioner(TensorLinearOperator(torch.tensor([[3.0]])), 1, 1.0)
    torch.testing.assert_close(P @ torch.ones(1), torch.tensor([0.25]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indefinite_matrices_are_refused(dtype: torch.dtype) -> None:
    for size, rank in ((6, 6), (30, 20)):
        eigenvalues = torch.linspace(-1, 2, size, dtype=torch.float64)
        M = with_eigenvalues(eigenvalues).to(dtype)
        P = NystromPreconditioner(TensorLinearOperator((M + M.T) / 2), rank, 0.5)
        with pytest.raises(RuntimeError, match=r"negative eigenvalue.*GGN"):
            P @ torch.ones(size, dtype=dtype)


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_is_refused(value: float) -> None:
    P = NystromPreconditioner(Diagonal(torch.tensor([1.0, value, 2.0])), 2, 0.5)
    with pytest.raises(RuntimeError, match="not finite"):
        P @ torch.ones(3)


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_saves_iterations() -> None:
    eigenvalues = torch.full((60,), 1e-4, dtype=torch.float64)
    eigenvalues[:8] = torch.logspace(3, 0, 8, dtype=torch.float64)
    eigenvalues[8:] *= torch.rand(52, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    M, B = with_eigenvalues(eigenvalues, 1), noise(60, 3, seed=2)
    A = TensorLinearOperator(M)
    P = NystromPreconditioner(A, 10, 1e-3)
    plain = CGInverseLinearOperator(A.damped(1e-3))
    helped = CGInverseLinearOperator(A.damped(1e-3), preconditioner=P)
    plain @ B
    X = helped @ B
    assert (relative_residual(M + 1e-3 * torch.eye(60).double(), X, B) <= 1e-8).all()
    assert plain.info is not None and helped.info is not None
    assert (helped.info.num_iterations <= 6).all() and (plain.info.num_iterations >= 12).all()
    by_minres = MINRESInverseLinearOperator(A.damped(1e-3), preconditioner=P)
    assert (relative_residual(M + 1e-3 * torch.eye(60).double(), by_minres @ B, B) <= 1e-8).all()


def test_products_are_made_once() -> None:
    M = low_rank(20, 4)
    A = CountingMatrix(M)
    P = NystromPreconditioner(A, 6, 0.1)
    assert A.count == 0, "the constructor computes"
    P @ noise(20, 3)
    P @ noise(20)
    P.eigenvalues()
    assert A.count == 6
    other = P.with_damping(1e-3)
    torch.testing.assert_close(other.to_dense(), formula(M, 6, 1e-3), rtol=1e-7, atol=1e-5)
    assert A.count == 6, "another damping needs no new products"
    torch.testing.assert_close(P.to_dense(), formula(M, 6, 0.1), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="damping"):
        P.with_damping(0.0)


def test_seed_and_global_random_state() -> None:
    A = TensorLinearOperator(spd_matrix(30, 100.0))
    before = torch.get_rng_state()
    same = [NystromPreconditioner(A, 5, 0.1, seed=seed).to_dense() for seed in (1, 1, 2)]
    default = [NystromPreconditioner(A, 5, 0.1).to_dense() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    assert torch.equal(*default)


def test_frozen_at_first_use() -> None:
    M = low_rank(8, 3)
    P = NystromPreconditioner(TensorLinearOperator(M), 4, 0.1)
    frozen = P.frozen()
    truth = P.to_dense()
    M.mul_(2)
    assert torch.equal(P.to_dense(), truth) and torch.equal(frozen.to_dense(), truth)
    assert P.frozen() is P
    late = NystromPreconditioner(TensorLinearOperator(M), 4, 0.1)
    assert not torch.equal(late.to_dense(), truth)
    assert torch.equal(pickle.loads(pickle.dumps(P)).to_dense(), truth)


def test_named_spaces_formats_and_inference_mode() -> None:
    A = Diagonal({"w": torch.tensor([[4.0, 2.0], [1.0, 0.5]]), "b": torch.tensor([3.0, 1.0])})
    P = NystromPreconditioner(A, 6, 0.1)
    answer = P @ {"w": torch.ones(2, 2), "b": torch.ones(2)}
    torch.testing.assert_close(answer["w"], 1 / torch.tensor([[4.1, 2.1], [1.1, 0.6]]), rtol=1e-4, atol=1e-4)
    assert [x.shape for x in P @ [torch.ones(2, 2, 3), torch.ones(2, 3)]] == [(2, 2, 3), (2, 3)]
    assert P.domain.names == ("w", "b") and "rank 6" in repr(P)
    fresh = NystromPreconditioner(A, 6, 0.1)
    with torch.inference_mode():
        inside = fresh @ torch.ones(6)
    torch.testing.assert_close(fresh @ torch.ones(6), inside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected an integer from 1 to 4"),
        ({"rank": 5}, "rank: expected an integer from 1 to 4"),
        ({"rank": 2.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"damping": 0.0}, "damping"),
        ({"damping": -1.0}, "damping"),
        ({"damping": NAN}, "damping"),
        ({"damping": INF}, "damping"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NystromPreconditioner(Diagonal(torch.ones(4)), **{"rank": 2, "damping": 0.1, **options})


def test_integers_of_numpy_are_taken() -> None:
    P = NystromPreconditioner(Diagonal(torch.ones(4)), np.int64(2), np.float64(0.1))  # type: ignore[arg-type]
    assert P.eigenvalues().shape == (2,)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="linear operator, got Tensor"):
        NystromPreconditioner(torch.eye(3), 1, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        NystromPreconditioner(TensorLinearOperator(noise(3, 4)), 1, 0.1)
    with pytest.raises(ValueError, match="self-adjoint"):
        NystromPreconditioner(TensorLinearOperator(noise(3, 3)), 1, 0.1)


# -- Jacobi ------------------------------------------------------------------------------------------------------------


def test_jacobi_from_entries_in_every_form() -> None:
    w, b = torch.tensor([[1.0, 3.0]]), torch.tensor([7.0])
    expected = [0.5, 0.25, 0.125]
    flat = torch.cat([w.flatten(), b])
    operators = (Diagonal({"w": w, "b": b}), TensorLinearOperator(torch.diag(flat)))
    for form in (flat, [w, b], {"w": w, "b": b}, *operators):
        P = jacobi_preconditioner(form, damping=1.0)
        assert P.diagonal().tolist() == expected and P.SELF_ADJOINT and P.POSITIVE_SEMIDEFINITE
        assert (P @ torch.ones(3)).tolist() == expected
    assert jacobi_preconditioner({"w": w, "b": b}).domain.names == ("w", "b")
    answer = jacobi_preconditioner(operators[0], 1.0) @ {"w": torch.ones(1, 2), "b": torch.ones(1)}
    assert answer["w"].tolist() == [[0.5, 0.25]]
    assert jacobi_preconditioner(IdentityLinearOperator([(2,)])).diagonal().tolist() == [1.0, 1.0]


def test_jacobi_holds_its_values() -> None:
    entries = torch.ones(3)
    P = jacobi_preconditioner(entries)
    entries.mul_(5)
    assert P.diagonal().tolist() == [1.0] * 3
    assert not jacobi_preconditioner(torch.ones(2, requires_grad=True)).diagonal().requires_grad


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, 1e-45])
def test_jacobi_refuses_entries_whose_inverse_is_not_positive(value: float) -> None:
    """Neither zero nor infinity makes a preconditioner that is positive definite."""
    with pytest.raises(ValueError, match="1 of 2 entries"):
        jacobi_preconditioner(torch.tensor([value, 1.0]))


@pytest.mark.parametrize("damping", [NAN, INF, -1.0])
def test_jacobi_refuses_dampings(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        jacobi_preconditioner(torch.ones(2), damping)


def test_jacobi_needs_a_diagonal() -> None:
    with pytest.raises(TypeError, match=r"CountingMatrix does not know its diagonal.*exact_diagonal"):
        jacobi_preconditioner(CountingMatrix(spd_matrix(3, 10.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_jacobi_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert jacobi_preconditioner(torch.ones(2, dtype=dtype), 1.0).diagonal().dtype == dtype


# -- on a network ------------------------------------------------------------------------------------------------------


def test_network() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(noise(*p.shape, seed=number))
    data = [(noise(30, 3, seed=7) * torch.tensor([1.0, 30.0, 0.1]).double(), noise(30, 2, seed=8))]
    arguments: tuple[Any, ...] = (model, nn.MSELoss(), dict(model.named_parameters()), data)
    G = GGNLinearOperator(*arguments, check_deterministic=False)
    B = noise(G.shape[0], 2, seed=9)
    dense = G.to_dense() + 1e-3 * torch.eye(G.shape[0]).double()
    iterations = {}
    diagonal = GGNDiagonalLinearOperator(*arguments, check_deterministic=False)
    preconditioners = {
        "none": None,
        "jacobi": jacobi_preconditioner(diagonal, 1e-3),
        "nystrom": NystromPreconditioner(G, 25, 1e-3),
    }
    for name, P in preconditioners.items():
        inverse = CGInverseLinearOperator(G.damped(1e-3), preconditioner=P)
        assert (relative_residual(dense, inverse @ B, B) <= 1.1e-8).all()
        assert inverse.info is not None
        iterations[name] = inverse.info.num_iterations.max().item()
    assert iterations["nystrom"] < 0.7 * iterations["none"], iterations


def test_jacobi_saves_iterations_where_rows_are_badly_scaled() -> None:
    scales = torch.logspace(0, 2, 30, dtype=torch.float64)
    M = scales[:, None] * spd_matrix(30, 10.0, 1) * scales
    M, B = (M + M.T) / 2, noise(30, 2, seed=2)
    plain = CGInverseLinearOperator(TensorLinearOperator(M), max_iter=3000)
    helped = CGInverseLinearOperator(TensorLinearOperator(M), preconditioner=jacobi_preconditioner(M.diagonal()))
    plain @ B
    assert (relative_residual(M, helped @ B, B) <= 1e-8).all()
    assert plain.info is not None and helped.info is not None
    assert (2 * helped.info.num_iterations < plain.info.num_iterations).all()
