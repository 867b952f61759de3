"""The Lanczos process by what it promises: A Q = Q T + β q eᵀ at every truncation, for every column."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlinops.solvers.krylov.lanczos import Lanczos
from tests.solvers.spd_problems import noise, with_eigenvalues

STEP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def made(M: Tensor, V: Tensor, num_steps: int, **options: int) -> Lanczos:
    run = Lanczos(lambda X: M @ X, V, **options)
    for _ in range(num_steps):
        run.step()
    return run


def check_recurrence(M: Tensor, run: Lanczos, V: Tensor, slack: float = 100.0) -> None:
    """The recurrence with its remainder and orthonormality, at each truncation of each column."""
    eps, size = STEP[M.dtype], float(torch.linalg.matrix_norm(M.double(), 2))
    for k, length in enumerate(run.lengths.tolist()):
        basis = run.basis[k].double().T
        assert basis.isfinite().all()
        start = V[:, k].double()
        torch.testing.assert_close(
            basis[:, 0] * run.norms[k], start, rtol=10 * eps, atol=10 * eps * start.norm().item()
        )
        for m in range(1, length + 1):
            Q, T = basis[:, :m], run.tridiagonal(m)[k]
            assert T.dtype == torch.float64 and torch.equal(T, T.T)
            assert (T - torch.triu(torch.tril(T, 1), -1)).abs().max() == 0
            remainder = torch.zeros_like(Q)
            remainder[:, -1] = run.betas[k, m - 1] * basis[:, m]
            assert (M.double() @ Q - Q @ T - remainder).norm() <= slack * eps * size * m**0.5
            with_next = basis[:, : m + 1] if m < length else Q
            gram = with_next.T @ with_next
            assert (gram - torch.eye(gram.shape[0]).double()).abs().max() <= slack * eps
            torch.testing.assert_close(run.alphas[k, :m], T.diagonal())
            torch.testing.assert_close(run.betas[k, : m - 1], T.diagonal(1))
        assert basis[:, length + 1 :].abs().sum() == 0, "there is nothing beyond the end of a run"


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 30), K=st.integers(1, 4), num_steps=st.integers(1, 35), seed=st.integers(0, 99))
def test_recurrence_at_every_truncation(size: int, K: int, num_steps: int, seed: int) -> None:
    M = with_eigenvalues(noise(size, seed=seed), seed)
    V = noise(size, K, seed=seed + 1) * torch.logspace(-3, 3, K).double()
    run = made(M, V, num_steps)
    assert run.lengths.tolist() == [min(size, num_steps)] * K
    assert run.num_steps == min(size, num_steps)
    check_recurrence(M, run, V)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recurrence_where_orthogonality_would_be_lost(dtype: torch.dtype) -> None:
    """Large isolated eigenvalues converge early, after which the plain recurrence finds them again and again."""
    spread = torch.cat([torch.linspace(0, 1, 90), torch.tensor([10.0, 100.0, 1e3, 1e4])]).double()
    M, V = with_eigenvalues(spread, 2).to(dtype), noise(94, 2, seed=3, dtype=dtype)
    run = made(M, V, 60)
    check_recurrence(M, run, V)
    values = torch.linalg.eigvalsh(run.tridiagonal())
    assert ((values > 5).sum(1) == 4).all(), "an eigenvalue was found more than once"


def test_all_steps_give_the_spectrum() -> None:
    spread = noise(25, seed=4).sort().values
    M = with_eigenvalues(spread, 5)
    run = made(M, noise(25, 3, seed=6), 40)
    assert run.num_steps == 25 and not run.is_open.any() and run.is_invariant.all()
    values, vectors = torch.linalg.eigh(run.tridiagonal())
    torch.testing.assert_close(values, spread.expand(3, -1), rtol=0, atol=1e-12)
    # The weights are the start vector's squared components in the eigenbasis.
    Q = torch.linalg.eigh(M)[1]
    V = noise(25, 3, seed=6)
    torch.testing.assert_close(vectors[:, 0].square(), (Q.T @ (V / V.norm(dim=0))).square().T, rtol=1e-6, atol=1e-10)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_invariant_subspaces_end_their_columns_only(dtype: torch.dtype) -> None:
    """An eigenvector, a sum of three, zero and a random vector: each ends where it must, and no later."""
    M = with_eigenvalues(torch.linspace(-1, 2, 40).double(), 7).to(dtype)
    vectors = torch.linalg.eigh(M.double())[1].to(dtype)
    V = torch.stack([vectors[:, 3], vectors[:, [0, 20, 39]].sum(1), torch.zeros(40), noise(40).to(dtype)], 1).to(dtype)
    columns: list[int] = []

    def product(X: Tensor) -> Tensor:
        columns.append(X.shape[1])
        return M @ X

    run = Lanczos(product, V)
    for _ in range(6):
        run.step()
    assert run.lengths.tolist() == [1, 3, 0, 6]
    assert run.is_invariant.tolist() == [True, True, True, False]
    assert run.is_open.tolist() == [False, False, False, True]
    assert columns == [3, 2, 2, 1, 1, 1], "columns that have ended are still multiplied"
    check_recurrence(M, run, V)
    eigenvalues = torch.linalg.eigvalsh(M.double())
    found = torch.linalg.eigvalsh(run.tridiagonal(3)[1])
    torch.testing.assert_close(found, eigenvalues[[0, 20, 39]], rtol=0, atol=10 * STEP[dtype])


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1e-150, 1e150])
def test_multiples_of_the_identity(factor: float) -> None:
    run = made(factor * torch.eye(6).double(), noise(6, 2), 3)
    assert run.lengths.tolist() == [1, 1] and run.is_invariant.all()
    torch.testing.assert_close(run.alphas[:, 0], torch.full((2,), factor, dtype=torch.float64))
    assert run.betas.tolist() == [[0.0], [0.0]]


def test_one_dimension() -> None:
    run = made(torch.tensor([[-2.0]]).double(), torch.tensor([[3.0, -5.0]]).double(), 4)
    assert run.tridiagonal().flatten().tolist() == [-2.0, -2.0] and run.norms.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_length_of_the_start_does_not_matter(scale: float) -> None:
    M, V = with_eigenvalues(torch.linspace(1, 2, 9).double()), noise(9, 2)
    torch.testing.assert_close(made(M, V * scale, 5).tridiagonal(), made(M, V, 5).tridiagonal(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("low_rank", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_rank_ends_soon(low_rank: int, dtype: torch.dtype) -> None:
    U = noise(300, low_rank, dtype=dtype)
    run = made(U @ U.T, noise(300, 3, seed=1, dtype=dtype), 20)
    # In exact arithmetic rank + 1; one more where the remainder is a little above what rounding must leave.
    assert all(low_rank + 1 <= length <= low_rank + 2 for length in run.lengths.tolist())
    assert run.is_invariant.all()


def test_columns_can_be_ended() -> None:
    M, V = with_eigenvalues(torch.linspace(1, 2, 20).double()), noise(20, 3)
    run = made(M, V, 4)
    run.end(torch.tensor([True, False, True]))
    for _ in range(3):
        run.step()
    assert run.lengths.tolist() == [4, 7, 4] and not run.is_invariant.any()
    check_recurrence(M, run, V)
    # What pads the shorter ones is within their spectrum and has no weight.
    values, vectors = torch.linalg.eigh(run.tridiagonal())
    inside = torch.linalg.eigvalsh(made(M, V, 4).tridiagonal())
    assert values.min() >= 1 and values.max() <= 2
    means = (values * vectors[:, 0].square()).sum(1)
    torch.testing.assert_close(means, run.alphas[:, 0])
    assert inside.shape == (3, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="product with A: 1 of 2 columns are not finite, the first is column 1"):
        Lanczos(lambda X: X * torch.tensor([1.0, bad]), torch.ones(2, 2)).step()
    with pytest.raises(ValueError, match="start vectors"):
        Lanczos(lambda X: X, torch.tensor([[bad], [1.0]]))


# -- memory and resuming -----------------------------------------------------------------------------------------------


def test_capacity_changes_nothing() -> None:
    M, V = with_eigenvalues(torch.linspace(1, 2, 90).double()), noise(90, 3)
    grown, at_once = made(M, V, 50), made(M, V, 50, capacity=50)
    assert torch.equal(grown.tridiagonal(), at_once.tridiagonal())
    assert at_once.basis.shape == (3, 51, 90) and at_once._basis.shape[1] == 51
    assert at_once.basis[:, 7].is_contiguous() or at_once.basis[0, 7].is_contiguous()


@pytest.mark.parametrize("stop", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("capacity", [0, 45])
def test_resuming_is_bitwise(stop: int, capacity: int) -> None:
    M, V = with_eigenvalues(torch.linspace(-1, 2, 70).double()), noise(70, 3)
    V[:, 1] = torch.linalg.eigh(M)[1][:, :4].sum(1)
    whole, first = made(M, V, 45, capacity=capacity), made(M, V, stop, capacity=capacity)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = Lanczos(lambda X: M @ X, torch.zeros_like(V), capacity=capacity)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    first.step()  # does not reach what was saved
    for _ in range(45 - stop):
        resumed.step()
    for name in ("alphas", "betas", "basis", "norms", "lengths"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name


def test_interrupted_step_can_be_made_again() -> None:
    M, V = with_eigenvalues(torch.linspace(-1, 2, 30).double()), noise(30, 2)
    calls = 0

    def product(X: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return M @ X

    run = Lanczos(product, V)
    with pytest.raises(KeyboardInterrupt):
        while run.step():
            pass
    assert run.num_steps == 4
    while run.step():
        pass
    assert torch.equal(run.tridiagonal(), made(M, V, 30).tridiagonal())


def test_state_of_other_runs_is_refused() -> None:
    run = made(torch.eye(4), noise(4, 2, dtype=torch.float32), 1)
    for V in (torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(4, 2).double()):
        with pytest.raises(ValueError, match="Expected a state of"):
            Lanczos(lambda X: X, V).load_state_dict(run.state_dict())
