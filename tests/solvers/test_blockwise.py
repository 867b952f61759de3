"""Block-diagonal operators, some of whose blocks lack a closed inverse, are solved block by block."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import BlockDiagonal, ConvergenceWarning, Diagonal, InverseLinearOperator, Kronecker, LinearOperator
from tests.solvers.spd_problems import CountingMatrix, noise, relative_residual, spd_matrix, with_eigenvalues

pytestmark = pytest.mark.filterwarnings("error::curvlinops.ConvergenceWarning")

INDEFINITE = with_eigenvalues(torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]).double())


def kroneckers() -> LinearOperator:
    """A sum of two Kronecker products without a common factor, positive definite after damping."""
    A, B = (
        Kronecker(spd_matrix(3, 5.0, seed), spd_matrix(4, 5.0, seed + 1), is_positive=True).frozen() for seed in (0, 2)
    )
    return (A + B).damped(0.1)


def blocks() -> BlockDiagonal:
    """By a closed form, by conjugate gradients, by MINRES."""
    return BlockDiagonal([Diagonal(torch.full((2,), 3.0).double()), kroneckers(), CountingMatrix(INDEFINITE)])


def open_blocks(A: InverseLinearOperator) -> list[str]:
    assert A._of_blocks is not None
    return [inverse.method for inverse in A._of_blocks]


def test_each_block_has_its_method() -> None:
    A = blocks()
    inverse = InverseLinearOperator(A)
    assert inverse.method == "block by block" and "block by block" in repr(inverse)
    M, B = A.to_dense(), noise(19, 3, seed=5)
    X = inverse @ B
    assert open_blocks(inverse) == ["closed form", "conjugate gradients", "MINRES"]
    torch.testing.assert_close(X, torch.linalg.solve(M, B), rtol=1e-6, atol=1e-6)
    info = inverse.info
    assert info is not None and info.converged.all() and not info.breakdown.any() and info.ended_by is None
    torch.testing.assert_close(info.residual_norm, relative_residual(M, X, B), rtol=1e-2, atol=1e-14)
    infos = [block.info for block in inverse._of_blocks or []]
    iterations = torch.stack([i.num_iterations for i in infos if i is not None])
    assert torch.equal(info.num_iterations, iterations.amax(0)) and iterations[0].max() == 0
    assert info.num_matvecs == max(i.num_matvecs for i in infos if i is not None)
    assert info.history.shape == (max(len(i.history) for i in infos if i is not None), 3)
    torch.testing.assert_close(info.history[-1], info.residual_norm, rtol=0.5, atol=1e-9)
    assert inverse.SELF_ADJOINT and inverse.H is inverse


def test_tensors_apart() -> None:
    """Blocks of any tensors of the space, in any format."""
    left, right = spd_matrix(2, 5.0, 1), spd_matrix(3, 5.0, 2)
    A = BlockDiagonal([CountingMatrix(spd_matrix(3, 4.0)), Kronecker(left, right)], positions=[[1], [0]])
    b = [noise(6, seed=1), noise(3, seed=2)]
    x = InverseLinearOperator(A) @ b
    torch.testing.assert_close(x[0], torch.linalg.solve(torch.kron(left, right), b[0]))
    torch.testing.assert_close(x[1], torch.linalg.solve(spd_matrix(3, 4.0), b[1]), rtol=1e-6, atol=1e-6)


def test_an_easy_block_costs_what_it_needs() -> None:
    """Convergence is that of each block: the hard one is not asked of the easy one."""
    easy, hard = CountingMatrix(2 * torch.eye(50).double()), CountingMatrix(spd_matrix(50, 1e4))
    inverse = InverseLinearOperator(BlockDiagonal([easy, hard]))
    inverse @ noise(100)
    assert inverse.info is not None and inverse.info.converged.all()
    assert 0 < easy.count <= 4 < hard.count


def test_zero_and_partly_zero_right_hand_sides() -> None:
    A = blocks()
    B = noise(19, 2)
    B[:, 0] = 0
    B[2:, 1] = 0
    inverse = InverseLinearOperator(A)
    X = inverse @ B
    assert X[:, 0].abs().max() == 0 and X[2:, 1].abs().max() == 0
    assert inverse.info is not None and inverse.info.converged.all()


def test_what_does_not_converge_is_told() -> None:
    A = BlockDiagonal([Diagonal(torch.ones(2).double()), CountingMatrix(spd_matrix(50, 1e4))])
    inverse = InverseLinearOperator(A, max_iter=3)
    b = noise(52)
    with pytest.warns(ConvergenceWarning, match="3 iterations") as caught:
        x = inverse @ b
    assert len(caught) == 1 and inverse.info is not None and not inverse.info.converged.any()
    true = relative_residual(A.to_dense(), x[:, None], b[:, None])
    torch.testing.assert_close(inverse.info.residual_norm, true, rtol=1e-6, atol=0)
    limited = InverseLinearOperator(A, max_matvecs=4)
    with pytest.warns(ConvergenceWarning):
        limited @ b
    assert limited.info is not None and limited.info.ended_by == "max_matvecs"


def test_options_reach_the_blocks() -> None:
    A = blocks()
    M, b = A.to_dense(), noise(19, seed=3)
    solution = torch.linalg.solve(M, b)
    seen: list[Any] = []
    begun = InverseLinearOperator(A, x0=solution, callback=seen.append)
    begun @ b
    assert begun.info is not None and begun.info.num_iterations.max() <= 1
    warm = InverseLinearOperator(A, warm_start=True)
    warm @ b
    warm @ b
    assert warm.info is not None and warm.info.num_iterations.max() == 0
    with pytest.raises(ValueError, match="max_iter"):
        InverseLinearOperator(A, max_iter=0)


def test_preconditioners() -> None:
    """One that is cut in the same way goes to the blocks; any other is used for the whole."""
    M = spd_matrix(40, 1e4)
    A = BlockDiagonal([Diagonal(torch.full((2,), 3.0).double()), CountingMatrix(M)])
    inverse_blocks = [Diagonal(torch.full((2,), 0.3).double()), CountingMatrix(torch.linalg.inv(M))]
    cut = InverseLinearOperator(A, preconditioner=BlockDiagonal(inverse_blocks))
    b = noise(42)
    x = cut @ b
    assert cut.method == "block by block" and cut.info is not None and cut.info.num_iterations.item() <= 2
    torch.testing.assert_close(x, torch.linalg.solve(A.to_dense(), b), rtol=1e-5, atol=1e-5)
    whole: Tensor = torch.linalg.inv(A.to_dense())
    together = InverseLinearOperator(A, preconditioner=lambda X: whole @ X)
    assert together.method == "MINRES"
    together @ b
    assert together.info is not None and together.info.num_iterations.item() <= 2


def test_what_passes_through() -> None:
    inverse = InverseLinearOperator(blocks())
    b = noise(19)
    x = inverse @ b
    for other in (inverse.frozen(), inverse.linearize(), pickle.loads(pickle.dumps(inverse))):
        torch.testing.assert_close(other @ b, x, rtol=1e-6, atol=1e-6)
    entries = torch.ones(2).double()
    live = InverseLinearOperator(BlockDiagonal([Diagonal(entries), kroneckers()]))
    first = live @ noise(14)
    entries.mul_(2)
    torch.testing.assert_close((live @ noise(14))[:2], first[:2] / 2)


def test_all_blocks_closed_is_a_closed_form() -> None:
    A = BlockDiagonal([Kronecker(spd_matrix(3, 5.0), spd_matrix(2, 5.0)), Diagonal(torch.ones(2).double())])
    inverse = InverseLinearOperator(A)
    assert inverse.method == "closed form"
    b = noise(8)
    torch.testing.assert_close(inverse @ b, torch.linalg.solve(A.to_dense(), b))
