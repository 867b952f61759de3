"""What solves must not let through: columns that spoil each other, stale state, tensors that users write to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    Diagonal,
    InverseLinearOperator,
    LanczosApproximateSpectrumCached,
    LSMRInverseLinearOperator,
    MINRESInverseLinearOperator,
    NeumannInverseLinearOperator,
    TensorLinearOperator,
    damping_path,
    eigsh,
    logdet,
    svds,
)
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from tests.solvers.spd_problems import CPU, CountingMatrix, noise, noting_warnings, relative_residual, spd_matrix

CLASSES: list[Any] = [
    CGInverseLinearOperator,
    MINRESInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
    InverseLinearOperator,
]
each = pytest.mark.parametrize("build", CLASSES, ids=lambda cls: cls.__name__)


@pytest.mark.parametrize("power", [-10, -20, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_of_another_size_spoils_no_other(power: int, dtype: torch.dtype) -> None:
    """Least squares from a first iterate, whose residual may be any multiple of the right-hand side."""
    M, B = spd_matrix(8, 10.0, 1, dtype), noise(8, 3, seed=2, dtype=dtype)
    B[:, 2] *= 10.0**power
    inverse = LSMRInverseLinearOperator(TensorLinearOperator(M), x0=torch.ones(8, dtype=dtype))
    with noting_warnings():
        X = inverse @ B
    true = relative_residual(M, X, B)
    assert inverse.info is not None
    assert (true[inverse.info.converged] <= 1e-4).all() and inverse.info.converged[:2].all()


@pytest.mark.parametrize("condition", [10.0, 100.0])
def test_series_that_stop_early_are_verified(condition: float) -> None:
    M, b = spd_matrix(12, condition, 1, torch.float32), noise(12, seed=2, dtype=torch.float32)
    inverse = NeumannInverseLinearOperator(TensorLinearOperator(M), 3000, rtol=3e-7)
    with noting_warnings():
        x = inverse @ b
    assert inverse.info is not None
    true = relative_residual(M, x[:, None], b[:, None])
    assert true.item() <= 1e-6 or not inverse.info.converged.item()
    assert abs(inverse.info.residual_norm.item() - true.item()) <= 1e-6 * condition


@each
@pytest.mark.parametrize("power", [-24, 20])
def test_tiny_and_huge_right_hand_sides(build: Any, power: int) -> None:
    entries = torch.tensor([1.0, 0.5, 0.8])
    inverse = build(Diagonal(entries))
    x = inverse @ torch.full((3,), 10.0**power)
    torch.testing.assert_close(x / 10.0**power, 1 / entries, rtol=1e-4, atol=1e-4)


@each
def test_the_last_solution_is_not_the_users_tensor(build: Any) -> None:
    M, b = spd_matrix(8, 10.0, 1), noise(8, seed=2)
    inverse = build(CountingMatrix(M), warm_start=True)
    x = inverse @ b
    kept = x.clone()
    x.fill_(float("nan"))
    torch.testing.assert_close(inverse @ b, kept, rtol=1e-4, atol=1e-6)


@each
def test_info_is_not_that_of_an_earlier_solve(build: Any) -> None:
    class Failing(CountingMatrix):
        fails = False

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            if self.fails:
                raise ZeroDivisionError("as asked")
            return super()._matmat(X)

    A = Failing(spd_matrix(8, 10.0, 1))
    inverse = build(A)
    inverse @ noise(8)
    assert inverse.info is not None
    A.fails = True
    with pytest.raises(ZeroDivisionError):
        inverse @ noise(8)
    assert inverse.info is None


def test_a_path_on_half_the_products_is_better_than_nothing() -> None:
    A, B = CountingMatrix(spd_matrix(40, 1e4, 1)), noise(40, 2, seed=2)
    whole = damping_path(A, B, [1e-3, 1e-2, 1.0])
    with noting_warnings():
        half = damping_path(A, B, [1e-3, 1e-2, 1.0], max_matvecs=whole.num_matvecs // 2)
    assert half.info[2].converged.all(), "the largest damping was solved long before"
    assert all((info.residual_norm < 1).all() and info.num_matvecs > 0 for info in half.info)


class Preparing(LinearOperator):
    """An operator that notes how often it is prepared for many products."""

    SELF_ADJOINT = POSITIVE_SEMIDEFINITE = True

    def __init__(self, matrix: Tensor, counts: list[int]) -> None:
        space = Space.flat(len(matrix), matrix.dtype, CPU)
        super().__init__(space, space)
        self.matrix, self.counts, self.is_prepared = matrix, counts, False

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.matrix @ X[0]]

    def linearize(self, max_memory: int | None = None, *, engine: str = "auto") -> LinearOperator:
        """The same, noted."""
        if self.is_prepared:
            return self
        self.counts.append(1)
        result = Preparing(self.matrix, self.counts)
        result.is_prepared = True
        return result


@each
def test_inverses_inside_of_solvers_are_prepared_once(build: Any) -> None:
    counts: list[int] = []
    A = Preparing(spd_matrix(8, 10.0, 1), counts)
    inverse = build(A)
    if inverse.SELF_ADJOINT:
        eigsh(inverse, 2, tol=1e-3)
        assert len(counts) == 1
    counts.clear()
    with noting_warnings():
        CGInverseLinearOperator(A, preconditioner=inverse) @ noise(8)
    assert len(counts) == 2, "once as the matrix, once inside of the preconditioner"


def test_a_diagonal_is_not_computed_to_choose_a_method() -> None:
    class Lazy(Diagonal):
        @property
        def _entries(self) -> list[Tensor]:
            raise AssertionError("asked for its entries")

    InverseLinearOperator(Lazy(torch.ones(3)))


def test_start_vectors_that_depend_on_each_other_are_refused() -> None:
    A = TensorLinearOperator(spd_matrix(20, 10.0))
    v = noise(20, 1)
    with pytest.raises(ValueError, match="v0: the columns are linearly dependent"):
        eigsh(A, 2, v0=torch.cat([v, 2 * v], 1), block_size=2)
    assert eigsh(A, 2, v0=1e-200 * v[:, 0]).converged.all()


def test_eigenvalues_of_small_matrices() -> None:
    M = spd_matrix(30, 10.0, dtype=torch.float32)
    found = eigsh(TensorLinearOperator(1e-22 * M), 2, "LA", tol=1e-4)
    torch.testing.assert_close(found.values * 1e22, torch.linalg.eigvalsh(M)[-2:], rtol=1e-3, atol=0)


def test_singular_values_name_their_own_budget() -> None:
    with pytest.raises(ValueError, match=r"max_matvecs: 6 triplets take at least \d+, got 20"):
        svds(TensorLinearOperator(noise(40, 30)), 6, max_matvecs=20)


def test_what_was_done_is_told_in_a_line() -> None:
    inverse = CGInverseLinearOperator(TensorLinearOperator(spd_matrix(30, 1e3)))
    inverse @ noise(30, 2)
    assert "converged=[True, True]" in repr(inverse.info) and len(repr(inverse.info)) < 300


@pytest.mark.parametrize("seed", range(6))
def test_well_conditioned_systems_in_float32_do_not_warn(seed: int) -> None:
    """Their residuals are far more exact than the worst that rounding could do."""
    M = spd_matrix(300, 100.0, seed, torch.float32)
    inverse = CGInverseLinearOperator(TensorLinearOperator(M))
    B = noise(300, 3, seed=seed, dtype=torch.float32)
    X = inverse @ B
    assert inverse.info is not None and inverse.info.converged.all()
    assert (relative_residual(M, X, B) <= 1e-5).all()


def test_a_saved_spectrum_belongs_to_its_matrix() -> None:
    A, B = TensorLinearOperator(spd_matrix(20, 10.0, 1)), TensorLinearOperator(spd_matrix(20, 10.0, 2))
    whole = LanczosApproximateSpectrumCached(A, 5)
    whole.approximate_spectrum(2)
    LanczosApproximateSpectrumCached(A, 5).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="another matrix"):
        LanczosApproximateSpectrumCached(B, 5).load_state_dict(whole.state_dict())


def test_too_few_steps_of_a_trace_warn() -> None:
    A = CountingMatrix(spd_matrix(60, 1e6, 1))
    with pytest.warns(ConvergenceWarning, match="4 Lanczos steps are too few"):
        logdet(A, 5, 4)
