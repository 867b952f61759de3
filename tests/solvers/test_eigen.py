"""Eigenpairs and singular triplets: against dense ones and ARPACK, with residuals that are true."""

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as scipy_linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops import (
    ConvergenceWarning,
    Diagonal,
    Eigenpairs,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TensorLinearOperator,
    eigsh,
    svds,
)
from tests.solvers.spd_problems import CountingOperator, noise, with_eigenvalues

ORDERS = ["LM", "LA", "SA", "BE"]


def spectrum(kind: str, size: int) -> Tensor:
    """Eigenvalues of one kind, ascending."""
    steps = torch.arange(size, dtype=torch.float64)
    found = {
        "even": torch.linspace(-1.0, 2.1, size, dtype=torch.float64),
        "decay": 0.7**steps,
        "both signs": torch.where(steps % 2 == 0, 0.8**steps, -(0.81**steps)),
        "large": 1e12 * 0.9**steps,
        "few": torch.where(steps < 3, 3.0 - steps, 0.0),
    }[kind]
    return found.sort().values


def wanted(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """What SciPy means by the four words."""
    if which == "LM":
        return eigenvalues[eigenvalues.abs().argsort(descending=True)[:k]].sort().values
    low = {"LA": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([eigenvalues[:low], eigenvalues[len(eigenvalues) - (k - low) :]])


def check_pairs(M: Tensor, found: Eigenpairs, eps: float) -> None:
    """Vectors are orthonormal, residuals true, and what converged is."""
    V, values = found.vectors.double(), found.values.double()
    norm = torch.linalg.matrix_norm(M.double(), 2)
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]).double(), rtol=0, atol=1e3 * eps)
    true = (M.double() @ V - V * values).norm(dim=0)
    assert ((true - found.residual_norms.double()).abs() <= 0.01 * true + 100 * eps * norm).all()
    assert (found.values.diff() >= 0).all()


@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("kind", ["even", "decay", "both signs", "large"])
@pytest.mark.parametrize("size", [3, 12, 50, 150])
def test_against_dense_eigenvalues(size: int, kind: str, which: str) -> None:
    eigenvalues = spectrum(kind, size)
    M = with_eigenvalues(eigenvalues, seed=size)
    k = min(5, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = eigsh(TensorLinearOperator(M), k, which, tol=1e-9, max_matvecs=1500)
    check_pairs(M, found, 2.0**-52)
    truth = wanted(eigenvalues, k, which)
    # Each value lies within its residual of an eigenvalue; of those that converged, it is the right one.
    error = (found.values - truth).abs()
    assert (error <= 1e-8 * truth.abs() + 1e-12 * eigenvalues.abs().max())[found.converged].all()
    is_hard = kind in ("decay", "both signs", "large") and which in ("SA", "BE") and size > 50
    assert found.converged.all() or is_hard, found.residual_norms


@pytest.mark.parametrize("which", ORDERS)
def test_agrees_with_arpack(which: str) -> None:
    M = with_eigenvalues(spectrum("both signs", 80), 3)
    A = TensorLinearOperator(M)
    found = eigsh(A, 7, which, tol=1e-10)
    values, vectors = scipy_linalg.eigsh(A.to_scipy(), k=7, which=which, tol=1e-12)
    order = np.argsort(values)
    np.testing.assert_allclose(found.values, values[order], rtol=1e-8)
    overlap = (found.vectors.T @ torch.from_numpy(vectors[:, order])).abs().diagonal()
    torch.testing.assert_close(overlap, torch.ones(7).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "k"), [("decay", 6), ("even", 4)])
def test_takes_about_the_products_of_arpack(kind: str, k: int) -> None:
    M = with_eigenvalues(spectrum(kind, 300), 3)
    A, B = CountingOperator(M), CountingOperator(M)
    found = eigsh(A, k, "LA", tol=1e-5)
    assert found.converged.all() and found.num_matvecs == sum(A.num_columns)
    scipy_linalg.eigsh(B.to_scipy(), k=k, which="LA", tol=1e-5)
    assert sum(A.num_columns) <= 1.3 * sum(B.num_columns)


@settings(max_examples=30)
@given(
    size=st.integers(1, 14),
    k=st.integers(1, 14),
    which=st.sampled_from(ORDERS),
    block=st.integers(1, 4),
    seed=st.integers(0, 99),
    rank=st.integers(0, 14),
)
def test_small_matrices_are_exact(size: int, k: int, which: str, block: int, seed: int, rank: int) -> None:
    """The whole space is searched: no value is missed, however often it is there."""
    k, block, rank = min(k, size), min(block, size), min(rank, size)
    eigenvalues = torch.cat([torch.arange(rank) % 3 - 1.0, torch.zeros(size - rank)]).double().sort().values
    M = with_eigenvalues(eigenvalues, seed)
    found = eigsh(TensorLinearOperator(M), k, which, block_size=block, ncv=30)
    check_pairs(M, found, 2.0**-52)
    assert found.converged.all()
    truth = wanted(eigenvalues, k, which)
    if which == "LM":  # 1 and -1 are as large
        torch.testing.assert_close(found.values.abs().sort().values, truth.abs().sort().values, rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(found.values, truth, rtol=0, atol=1e-9)


def test_blocks_find_multiple_eigenvalues() -> None:
    eigenvalues = torch.cat([torch.linspace(0, 4, 96), torch.full((4,), 5.0)]).double()
    found = eigsh(TensorLinearOperator(with_eigenvalues(eigenvalues, 3)), 5, "LA", block_size=4)
    torch.testing.assert_close(found.values, eigenvalues[-5:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("ncv", [12, 20, 60])
@pytest.mark.parametrize("block", [1, 3])
def test_restarts_change_nothing(ncv: int, block: int) -> None:
    eigenvalues = spectrum("even", 120)
    M = with_eigenvalues(eigenvalues, 5)
    found = eigsh(TensorLinearOperator(M), 4, "LA", tol=1e-9, ncv=ncv, block_size=block, max_matvecs=5000)
    assert found.converged.all() and found.num_matvecs > ncv
    torch.testing.assert_close(found.values, eigenvalues[-4:], rtol=1e-9, atol=0)
    check_pairs(M, found, 2.0**-52)


@pytest.mark.parametrize("matrix", ["zero", "identity", "rank one"])
def test_degenerate_matrices(matrix: str) -> None:
    eigenvalues = {
        "zero": torch.zeros(40),
        "identity": torch.ones(40),
        "rank one": torch.eye(40)[-1],
    }[matrix].double()
    found = eigsh(TensorLinearOperator(with_eigenvalues(eigenvalues)), 3, "LA")
    assert found.converged.all()
    torch.testing.assert_close(found.values, eigenvalues.sort().values[-3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    eigenvalues = spectrum("decay", 60)
    M = with_eigenvalues(eigenvalues, 1).to(dtype)
    M = (M + M.T) / 2
    truth = torch.linalg.eigvalsh(M.double())[-3:]
    tol = 1e-4 if dtype == torch.float32 else 0.05
    found = eigsh(TensorLinearOperator(M), 3, "LA", tol=tol)
    assert found.vectors.dtype == dtype and found.values.dtype == torch.float32
    torch.testing.assert_close(
        found.values.double(), truth, rtol=4 * tol**2 + 1e-2 * (dtype == torch.bfloat16), atol=2e-6
    )


def test_not_converged_is_told() -> None:
    M = with_eigenvalues(spectrum("even", 200), 2)
    A = CountingOperator(M)
    with pytest.warns(ConvergenceWarning, match=r"5 eigenpairs did not converge.*max_matvecs"):
        found = eigsh(A, 5, "LA", tol=1e-12, max_matvecs=30)
    assert not found.converged.all() and found.ended_by == "max_matvecs"
    assert found.num_matvecs == sum(A.num_columns) <= 30
    check_pairs(M, found, 2.0**-52)


def test_residuals_are_recomputed_where_the_recurrence_is_wrong() -> None:
    """A product that is wrong at first makes pairs of another matrix."""

    class Unsteady(CountingOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            (result,) = super()._matmat(X)
            return [result * (1.0 + 1e-3 * (len(self.num_columns) < 5))]

    M = with_eigenvalues(spectrum("decay", 40), 2)
    with pytest.warns(ConvergenceWarning):
        found = eigsh(Unsteady(M), 3, "LA", tol=1e-9)
    check_pairs(M, found, 2.0**-52)


# -- formats, options, networks ----------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    X = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=generator)
    return model, list(zip(X.split(12), y.split(12), strict=True))


@pytest.mark.parametrize("which", ORDERS)
def test_hessian_of_a_network(which: str) -> None:
    model, data = network()
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    truth = torch.linalg.eigvalsh(H.to_dense())
    found = eigsh(H, 4, which, format="dict")
    torch.testing.assert_close(found.values, wanted(truth, 4, which), rtol=1e-7, atol=1e-12)
    assert list(found.vectors) == [name for name, _ in model.named_parameters()]
    image = H @ found.vectors
    for name, p in model.named_parameters():
        assert found.vectors[name].shape == (*p.shape, 4)
        torch.testing.assert_close(image[name], found.vectors[name] * found.values, rtol=1e-5, atol=1e-8)


def test_formats() -> None:
    M = with_eigenvalues(spectrum("decay", 10), 2)
    A = TensorLinearOperator(M) + Diagonal([torch.zeros(2, 3).double(), torch.zeros(4).double()])
    flat = eigsh(A, 2).vectors
    first, second = eigsh(A, 2, format="list").vectors
    assert torch.equal(torch.cat([first.reshape(6, 2), second]), flat)
    with pytest.raises(ValueError, match="names"):
        eigsh(A, 2, format="dict")


def test_seed_start_and_random_state() -> None:
    M = with_eigenvalues(spectrum("even", 90), 2)
    A = TensorLinearOperator(M)
    state = torch.get_rng_state()
    first, again = eigsh(A, 3), eigsh(A, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    other = eigsh(A, 3, seed=1)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), state)
    known = eigsh(A, 3, v0=first.vectors.sum(1))
    assert known.num_matvecs < first.num_matvecs / 2
    torch.testing.assert_close(known.values, first.values)


def test_callback_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    A = TensorLinearOperator(with_eigenvalues(spectrum("even", 60), 2))
    found = eigsh(A, 2, progressbar=True, callback=lambda p: seen.append(p.num_matvecs))
    assert seen == sorted(seen) and seen[-1] < found.num_matvecs
    assert "eigsh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected"),
        ({"k": 11}, "k: expected"),
        ({"k": 2.0}, "k: expected"),
        ({"which": "SM"}, "which: expected one of"),
        ({"tol": -1.0}, "tol: expected"),
        ({"tol": float("nan")}, "tol: expected"),
        ({"block_size": 0}, "block_size: expected"),
        ({"ncv": 2}, "ncv: expected"),
        ({"max_matvecs": 1}, "max_matvecs"),
        ({"format": "tuple"}, "format: expected"),
        ({"v0": torch.zeros(10).double()}, "v0: expected"),
        ({"v0": torch.ones(10, 2).double()}, "v0: expected"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    A = TensorLinearOperator(with_eigenvalues(spectrum("decay", 10)))
    with pytest.raises((TypeError, ValueError), match=message):
        eigsh(A, **{"k": 2, **options})


def test_operators_that_are_refused() -> None:
    with pytest.raises(ValueError, match="self-adjoint"):
        eigsh(TensorLinearOperator(noise(4, 4)), 1)
    with pytest.raises(ValueError, match="square"):
        eigsh(TensorLinearOperator(noise(4, 3)), 1)
    with pytest.raises(TypeError, match="linear operator"):
        eigsh(noise(4, 4), 1)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="not finite"):
        eigsh(Diagonal(torch.tensor([1.0, float("nan")])), 1)


# -- singular values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 30), (9, 9), (1, 7), (7, 1)])
def test_singular_triplets(rows: int, columns: int) -> None:
    M = noise(rows, columns, seed=1)
    k = min(4, rows, columns)
    A = TensorLinearOperator(M)
    found = svds(A, k)
    truth = torch.linalg.svdvals(M)[:k]
    torch.testing.assert_close(found.values, truth, rtol=1e-7, atol=0)
    assert found.converged.all() and found.left.shape == (rows, k) and found.right.shape == (columns, k)
    torch.testing.assert_close(M @ found.right, found.left * found.values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(M.T @ found.left, found.right * found.values, rtol=1e-6, atol=1e-6)


def test_singular_values_below_rounding_are_not_called_converged() -> None:
    M = noise(20, 2, seed=1) @ noise(2, 10, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = svds(TensorLinearOperator(M), 4)
    assert found.converged.tolist() == [True, True, False, False]
    assert found.left.isfinite().all() and found.right.isfinite().all()
    torch.testing.assert_close(found.values[:2], torch.linalg.svdvals(M)[:2])
    assert (found.values[2:] <= 1e-7 * found.values[0]).all()


def test_singular_values_of_a_jacobian() -> None:
    model, data = network()
    J = JacobianLinearOperator(model, dict(model.named_parameters()), data)
    dense = J.to_dense()
    found = svds(J, 3, format="dict")
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense)[:3], rtol=1e-7, atol=0)
    assert set(found.right) == {name for name, _ in model.named_parameters()}
    flat = torch.cat([v.reshape(-1, 3) for v in found.right.values()])
    left = found.left["prediction"].reshape(-1, 3)
    torch.testing.assert_close(dense @ flat, left * found.values, rtol=1e-6, atol=1e-6)


def test_singular_values_on_a_budget() -> None:
    A = TensorLinearOperator(noise(60, 50, seed=1))
    with pytest.warns(ConvergenceWarning):
        found = svds(A, 3, tol=1e-12, max_matvecs=40)
    assert found.num_matvecs <= 40 and not found.converged.all()


def test_ggn_is_the_square_of_the_jacobian() -> None:
    model, data = network()
    params = dict(model.named_parameters())
    X, y = torch.cat([X for X, _ in data]), torch.zeros(30, 3, dtype=torch.float64)
    G = GGNLinearOperator(model, nn.MSELoss(reduction="sum"), params, [(X, y)])
    J = JacobianLinearOperator(model, params, [(X, y)])
    torch.testing.assert_close(eigsh(G, 3, "LA").values.flip(0), 2 * svds(J, 3).values.square(), rtol=1e-6, atol=0)
