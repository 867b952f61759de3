"""Two hundred random problems for each solver: what it says of its solution is true, and nearly all that can be solved
is solved.

Conditions reach from 1 to 1e10, columns differ in size by sixteen decades and in difficulty from the zero vector over
eigenvectors to what a singular matrix cannot reach.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import CGInverseLinearOperator, LSMRInverseLinearOperator, MINRESInverseLinearOperator
from tests.solvers.spd_problems import CountingMatrix, noise, noting_warnings, relative_residual, with_eigenvalues

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
KINDS = ("definite", "indefinite", "singular", "singular indefinite")
PER_KIND = 50


class Dice:
    """Random choices that leave the global random state alone."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def choice(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def shuffled(self, values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=self.generator)]

    def sizes(self, K: int) -> Tensor:
        return self.shuffled(torch.logspace(-8, 8, K, dtype=torch.float64))


@dataclass(frozen=True)
class Problem:
    """A symmetric system of several columns."""

    matrix: Tensor
    B: Tensor
    rtol: float | None

    @property
    def tolerance(self) -> float:
        default = 1e-5 if self.B.dtype == torch.float32 else 1e-8
        return default if self.rtol is None else self.rtol


def symmetric_problem(kind: str, seed: int) -> Problem:
    dice = Dice(seed)
    size, K, dtype = dice.choice(1, 2, 5, 10, 16, 24), dice.choice(1, 2, 3, 8, 16), dice.choice(*EPS)
    eigenvalues = dice.shuffled(torch.logspace(0, -dice.choice(0, 1, 2, 4, 6, 8, 10), size, dtype=torch.float64))
    if "indefinite" in kind:
        eigenvalues = eigenvalues * torch.sign(dice.normal(size))
    if "singular" in kind:
        eigenvalues[: max(1, size // 4)] = 0
    M = (with_eigenvalues(eigenvalues, seed) * 10.0 ** dice.choice(-6, 0, 0, 5)).to(dtype)
    M = (M + M.T) / 2
    B, vectors = dice.normal(size, K), torch.linalg.eigh(M.double())[1]
    for k in range(K):
        how = dice.choice("random", "random", "eigenvector", "in range", "zero")
        if how == "eigenvector":
            B[:, k] = vectors[:, dice.choice(*range(size))]
        elif how == "in range":
            B[:, k] = M.double() @ B[:, k]
        elif how == "zero":
            B[:, k] = 0
    rtol = dice.choice(None, 1e-3, *((1e-6, 1e-10) if dtype == torch.float64 else (1e-4, 1e-6)))
    return Problem(M, (B * dice.sizes(K)).to(dtype), rtol)


def check_counts(info: Any, A: CountingMatrix, K: int, max_iter: int, where: str) -> None:
    for field in (info.num_iterations, info.residual_norm, info.converged):
        assert field.shape == (K,), where
    assert info.num_matvecs == A.count, f"{where}: {info.num_matvecs} products noted, {A.count} made"
    assert (info.num_iterations <= max_iter).all(), where
    assert info.history.shape[1] == K and len(info.history) > int(info.num_iterations.max()), where
    assert info.ended_by is None and info.solution is None, where


def true_residuals(M: Tensor, X: Tensor, B: Tensor) -> Tensor:
    zero = (B == 0).all(0)
    return torch.where(zero, X.double().norm(dim=0), relative_residual(M, X, B))


def floor(M: Tensor, B: Tensor) -> Tensor:
    """About the residual that rounding leaves of the exact solution ``[K]``."""
    X = torch.linalg.solve(M.double(), B.double())
    size = B.double().norm(dim=0)
    largest = torch.linalg.matrix_norm(M.double(), 2)
    return EPS[B.dtype] * largest * X.norm(dim=0) / torch.where(size > 0, size, 1.0)


SYMMETRIC: dict[str, Callable[..., Any]] = {
    "CG": lambda A, rtol, most: CGInverseLinearOperator(A, rtol, most, on_breakdown="stop"),
    "MINRES": MINRESInverseLinearOperator,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SYMMETRIC)
def test_symmetric_problems(method: str, kind: str) -> None:
    is_solvable = kind == "definite" or (kind == "indefinite" and method == "MINRES")
    solvable, failed = 0, []
    for seed in range(PER_KIND):
        problem = symmetric_problem(kind, seed)
        M, B, tolerance, where = problem.matrix, problem.B, problem.tolerance, f"{kind} problem {seed}"
        size, K = B.shape
        A = CountingMatrix(M)
        inverse = SYMMETRIC[method](A, problem.rtol, 20 * size)
        with noting_warnings() as messages:
            X = inverse @ B
        info, zero = inverse.info, (B == 0).all(0)
        check_counts(info, A, K, 20 * size, where)
        assert X.isfinite().all(), where
        true = true_residuals(M, X, B)
        assert (true[info.converged] <= tolerance).all(), f"{where}: {true} called {info.converged} at {tolerance}"
        assert len(messages) == int(not info.converged.all()), f"{where}: {messages}"
        assert info.converged[zero].all() and (X[:, zero] == 0).all(), where
        if method == "MINRES":
            assert (true <= 1 + 1e-4).all(), f"{where}: worse than no solution: {true}"
        if is_solvable:
            fair = ~zero & (tolerance > 10 * torch.maximum(floor(M, B), info.attainable.double()))
            solvable += int(fair.sum())
            failed += [(seed, k) for k in (fair & ~info.converged).nonzero().flatten().tolist()]
    assert not is_solvable or (solvable > 150 and len(failed) <= 0.02 * solvable), f"{failed} of {solvable}"


# -- least squares -----------------------------------------------------------------------------------------------------


def least_squares_problem(seed: int) -> tuple[Tensor, Tensor, float, float]:
    """A matrix, right-hand sides, damping and tolerance."""
    dice = Dice(seed)
    rows, columns, K = dice.choice(1, 3, 10, 20, 30), dice.choice(1, 2, 10, 16, 24), dice.choice(1, 2, 3, 8, 16)
    dtype, most = dice.choice(*EPS), min(rows, columns)
    rank = dice.choice(most, most, most, max(1, most // 2), 0)
    U, V = (torch.linalg.qr(dice.normal(n, n))[0][:, :most] for n in (rows, columns))
    values = torch.logspace(0, -dice.choice(0, 1, 2, 4, 6, 10), most, dtype=torch.float64)
    values[rank:] = 0
    J = ((U * values) @ V.T * 10.0 ** dice.choice(-6, 0, 0, 5)).to(dtype)
    B = dice.normal(rows, K)
    for k in range(K):
        how = dice.choice("random", "in range", "zero", "orthogonal")
        if how == "in range":
            B[:, k] = J.double() @ dice.normal(columns)
        elif how == "zero":
            B[:, k] = 0
        elif how == "orthogonal":
            B[:, k] -= U[:, :rank] @ (U[:, :rank].T @ B[:, k])
    tolerance = dice.choice(1e-3, 1e-6, *((1e-6, 1e-10) if dtype == torch.float64 else (1e-5, 1e-5)))
    return J, (B * dice.sizes(K)).to(dtype), dice.choice(0.0, 0.0, 1e-3, 1.0), tolerance


def test_least_squares_problems() -> None:
    """Converged means one of the two criteria, evaluated in float64 with the true norm of the matrix."""
    solvable, failed = 0, []
    for seed in range(200):
        J, B, damp, tolerance = least_squares_problem(seed)
        A, most, eps, where = CountingMatrix(J), 20 * min(J.shape), EPS[J.dtype], f"problem {seed}"
        inverse = LSMRInverseLinearOperator(A, damp, tolerance, tolerance, 0.0, most)
        with noting_warnings() as messages:
            X = (inverse @ B).double()
        info = inverse.info
        assert info is not None and X.isfinite().all(), where
        assert info.num_matvecs == A.count and (info.num_iterations <= most).all(), where
        assert len(messages) == int(not info.converged.all()), where
        damped = torch.cat([J.double(), damp * torch.eye(J.shape[1], dtype=torch.float64)])
        R = torch.cat([B.double(), torch.zeros(J.shape[1], B.shape[1])]) - damped @ X
        largest, residual, size = torch.linalg.matrix_norm(damped, 2), R.norm(dim=0), B.double().norm(dim=0)
        normal, length = (damped.T @ R).norm(dim=0), largest * X.norm(dim=0)
        rounding = 4 * eps * (size + length)
        by_normal = normal <= 1.05 * tolerance * largest * residual + largest * rounding
        by_residual = residual <= 1.05 * tolerance * (size + length) + rounding
        false = info.converged & ~by_normal & ~by_residual
        assert not false.any(), f"{where}: {normal / (largest * residual)}, {residual / size} at {tolerance}"
        true = (B.double() - J.double() @ X).norm(dim=0)
        assert (
            (info.residual_norm.double() * torch.where(size > 0, size, 1) - true).abs() <= 1e-5 * size + rounding
        ).all()
        Y = torch.linalg.lstsq(damped, R + damped @ X, driver="gelsd").solution if J.numel() else X
        noise_floor = eps * (size + largest * Y.norm(dim=0)) / torch.where(residual > 0, residual, 1.0)
        fair = (size > 0) & (tolerance > 10 * noise_floor)
        solvable += int(fair.sum())
        failed += [(seed, k) for k in (fair & ~info.converged).nonzero().flatten().tolist()]
    assert solvable > 250 and len(failed) <= 0.01 * solvable, f"{failed} of {solvable}"


def test_history_has_a_row_for_the_beginning() -> None:
    """For every method: one row before the first iteration, one for each iteration."""
    B = noise(12, 3, seed=1)
    J = noise(12, 5, seed=2)
    inverse = LSMRInverseLinearOperator(CountingMatrix(J))
    inverse @ B
    assert inverse.info is not None
    assert inverse.info.history.shape == (int(inverse.info.num_iterations.max()) + 1, 3)
    torch.testing.assert_close(inverse.info.history[0], torch.ones(3).double())
