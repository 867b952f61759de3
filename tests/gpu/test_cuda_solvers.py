"""On a GPU: solvers, eigenvalues, spectra and estimators, against dense float64 on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import curvlinops
from tests.gpu.test_cuda import DEVICE, problem
from tests.risk.small import build, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DAMPING = 1e-2
Matrix = tuple[Any, Tensor]


def matrix(kind: str) -> Matrix:
    """An operator on the device, and its dense form on the CPU."""
    model, data = problem("MLP", torch.float64, DEVICE)
    A = build(kind, model, data)
    return A, A.to_dense().cpu()


def right_hand_sides(A: Any, K: int) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(A.shape[0], K, dtype=torch.float64, generator=generator).to(A.device)


def damped(M: Tensor) -> Tensor:
    """With the damping of all tests."""
    return M + DAMPING * torch.eye(len(M), dtype=M.dtype)


INVERSES: dict[str, Callable[[Any], Any]] = {
    "cg": lambda A: curvlinops.CGInverseLinearOperator(A.damped(DAMPING), rtol=1e-10),
    "minres": lambda A: curvlinops.MINRESInverseLinearOperator(A.damped(DAMPING), rtol=1e-10),
    "automatic": lambda A: curvlinops.InverseLinearOperator(A.damped(DAMPING), rtol=1e-10),
    "lsmr": lambda A: curvlinops.LSMRInverseLinearOperator(A.damped(DAMPING), atol=1e-12, btol=1e-12),
    "nystrom": lambda A: curvlinops.CGInverseLinearOperator(
        A.damped(DAMPING), rtol=1e-10, preconditioner=curvlinops.NystromPreconditioner(A, 8, DAMPING)
    ),
}


def test_neumann_series() -> None:
    A, M = matrix("GGN")
    B = right_hand_sides(A, 2)
    X = curvlinops.NeumannInverseLinearOperator(A.damped(1.0), 500, 0.4, rtol=1e-10) @ B
    truth = torch.linalg.solve(M + torch.eye(len(M), dtype=M.dtype), B.cpu())
    assert relative_error(X.cpu(), truth) < 1e-8


@pytest.mark.parametrize("name", INVERSES)
def test_inverses(name: str) -> None:
    A, M = matrix("GGN")
    B = right_hand_sides(A, 3)
    inverse = INVERSES[name](A)
    X = inverse @ B
    assert X.device.type == DEVICE and inverse.info.converged.all()
    assert relative_error(X.cpu(), torch.linalg.solve(damped(M), B.cpu())) < 1e-6


def test_damping_path() -> None:
    A, M = matrix("GGN")
    B = right_hand_sides(A, 2)
    found = curvlinops.damping_path(A, B, [1.0, DAMPING], rtol=1e-10)
    assert relative_error(found.solutions[1].cpu(), torch.linalg.solve(damped(M), B.cpu())) < 1e-6


@pytest.mark.parametrize(("kind", "which"), [("GGN", "LA"), ("Hessian", "BE")])
def test_eigenvalues(kind: str, which: str) -> None:
    A, M = matrix(kind)
    found = curvlinops.eigsh(A, 4, which)
    values = torch.linalg.eigvalsh(M)
    truth = values[-4:] if which == "LA" else torch.cat([values[:2], values[-2:]])
    assert found.vectors.device.type == DEVICE and found.converged.all()
    torch.testing.assert_close(found.values.cpu(), truth, rtol=1e-7, atol=1e-12)


def test_singular_values() -> None:
    J, M = matrix("Jacobian")
    found = curvlinops.svds(J, 3)
    torch.testing.assert_close(found.values.cpu(), torch.linalg.svdvals(M)[:3], rtol=1e-7, atol=0)


def test_roots_and_determinants() -> None:
    A, M = matrix("GGN")
    B = right_hand_sides(A, 2)
    values, vectors = torch.linalg.eigh(damped(M))
    truth = vectors @ (values.rsqrt().unsqueeze(1) * (vectors.T @ B.cpu()))
    assert relative_error(curvlinops.inverse_sqrt_matvec(A.damped(DAMPING), B).cpu(), truth) < 1e-6
    found = curvlinops.logdet(A.damped(DAMPING), 20, return_stderr=True)
    assert found.value.device.type == DEVICE
    assert (found.value.cpu() - values.log().sum()).abs() < 5 * found.stderr.cpu() + 1e-6


@pytest.mark.parametrize("name", ["hutchinson_trace", "hutchpp_trace", "xtrace", "xnystrace"])
def test_traces(name: str) -> None:
    A, M = matrix("GGN")
    found = getattr(curvlinops, name)(A, 30, return_stderr=True)
    assert found.value.device.type == DEVICE
    assert (found.value.cpu() - M.trace()).abs() < 6 * found[1].cpu() + 1e-9


def test_diagonals_and_layers() -> None:
    A, M = matrix("GGN")
    assert relative_error(curvlinops.xdiag(A, 2 * len(M)).cpu(), M.diagonal()) < 1e-8
    generator = torch.Generator(DEVICE).manual_seed(0)
    parts = curvlinops.block_traces(A, 10, generator=generator)
    assert all(part.device.type == DEVICE for part in (parts.values() if isinstance(parts, dict) else parts))


def test_spectrum_resumes_with_the_same_bits() -> None:
    A, _ = matrix("GGN")
    whole = curvlinops.LanczosApproximateSpectrumCached(A, 6)
    grid, density = whole.approximate_spectrum(3, 64)
    assert density.device.type == DEVICE
    torch.testing.assert_close(torch.trapezoid(density, grid).cpu(), torch.ones(()).double(), rtol=1e-6, atol=0)
    resumed = curvlinops.LanczosApproximateSpectrumCached(A, 6)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.approximate_spectrum(3, 64)[1], density)
