"""How many products solvers take on the GGN of a network that was trained on digits, counted and not timed."""

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import CGInverseLinearOperator, GGNLinearOperator, NystromPreconditioner, damping_path, eigsh
from tests.solvers.spd_problems import CountingOperator, relative_residual, textbook_cg

DAMPINGS = [1e-2, 1e-3, 1e-4, 1e-5]


@cache
def problem() -> tuple[GGNLinearOperator, Tensor, Tensor]:
    """The matrix as an operator and as a tensor, and the gradient of other data."""
    X, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    X = X / 16
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)).double()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimiser = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(X[:1200]), y[:1200]).backward()
        optimiser.step()
    accuracy = (model(X[1200:]).argmax(1) == y[1200:]).double().mean()
    assert accuracy > 0.8, "the network was not trained"
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    data = list(zip(X[:1200].split(500), y[:1200].split(500), strict=True))
    G = GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    other = GGNLinearOperator(model, loss, params, [(X[1200:], y[1200:])], check_deterministic=False)
    gradient = torch.cat([g.flatten() for g in other.gradient_and_loss()[0]])
    return G, G.to_dense(), gradient


@pytest.mark.parametrize("damping", DAMPINGS)
def test_iterations_are_those_of_the_textbook(damping: float) -> None:
    G, M, b = problem()
    A = M + damping * torch.eye(len(M), dtype=torch.float64)
    inverse = CGInverseLinearOperator(G.damped(damping), rtol=1e-6, max_iter=5000)
    x = inverse @ b
    _, expected = textbook_cg(A, b, 1e-6, 5000)
    assert inverse.info is not None and inverse.info.converged.all()
    assert abs(inverse.info.num_iterations.item() - expected) <= 0.05 * expected + 1
    assert relative_residual(A, x[:, None], b[:, None]).item() <= 1e-6
    assert inverse.info.num_matvecs == inverse.info.num_iterations.item() + 1


def test_sixteen_dampings_cost_what_the_smallest_does() -> None:
    _, M, b = problem()
    path, alone = CountingOperator(M), CountingOperator(M)
    found = damping_path(path, b, torch.logspace(-1, -5, 16), rtol=1e-6, max_iter=5000)
    CGInverseLinearOperator(alone.damped(1e-5), rtol=1e-6, max_iter=5000) @ b
    assert all(info.converged.all() for info in found.info)
    assert sum(path.num_columns) == found.num_matvecs
    assert sum(path.num_columns) - 16 <= 1.1 * sum(alone.num_columns)


def test_sketches_save_products() -> None:
    G, _, b = problem()
    plain = CGInverseLinearOperator(G.damped(1e-4), rtol=1e-6)
    plain @ b
    helped = CGInverseLinearOperator(G.damped(1e-4), rtol=1e-6, preconditioner=NystromPreconditioner(G, 100, 1e-4))
    helped @ b
    assert plain.info is not None and helped.info is not None
    assert helped.info.num_iterations.item() < 0.5 * plain.info.num_iterations.item()


def test_eigenvalues() -> None:
    G, M, _ = problem()
    found = eigsh(G, 10, "LA", tol=1e-5)
    truth = torch.linalg.eigvalsh(M)[-10:]
    assert found.converged.all() and (found.residual_norms <= 1e-5 * truth).all()
    torch.testing.assert_close(found.values, truth, rtol=1e-8, atol=0)
