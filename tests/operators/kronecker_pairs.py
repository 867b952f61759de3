"""Kronecker products and eigendecomposed matrices, paired with the dense matrices they stand for."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import EigenDecomposed, Kronecker, Space
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.factors import DenseFactor, DiagonalFactor
from tests.operators.operator_pairs import CPU, noise


class Layout(NamedTuple):
    """How the tensors of a space form matrices: shapes, groups, and whether they are transposed."""

    shapes: tuple[tuple[int, ...], ...]
    groups: int
    transposed: bool

    @property
    def arrangement(self) -> Arrangement:
        return Arrangement(self.shapes, self.groups, self.transposed)

    def indices(self) -> Tensor:
        """Where each entry of the matrices ``[G, R, S]`` lies in a vector; written without the package."""
        shape, G = self.shapes[0], self.groups
        numel = int(torch.tensor(shape).prod()) if shape else 1
        weight = torch.arange(numel).reshape(G, (shape[0] if shape else 1) // G, -1)
        weight = weight.transpose(1, 2) if self.transposed else weight
        if len(self.shapes) == 1:
            return weight
        bias = numel + torch.arange(self.shapes[1][0]).reshape(G, -1, 1)
        return torch.cat([weight, bias], 2)

    def matrix(self, blocks: list[Tensor]) -> Tensor:
        """The matrix on vectors, of blocks ``[R · S, R · S]`` on the matrices of each group."""
        order = self.indices().flatten()
        M = torch.zeros(len(order), len(order), dtype=blocks[0].dtype)
        M[order.unsqueeze(1), order] = torch.block_diag(*blocks)
        return M

    def space(self, dtype: torch.dtype = torch.float64) -> Space:
        return Space(self.shapes, dtype, CPU, ("weight", "bias")[: len(self.shapes)])


LAYOUTS = {
    "matrix": Layout(((3, 4),), 1, False),
    "matrix and bias": Layout(((3, 4), (3,)), 1, False),
    "convolution": Layout(((2, 2, 3), (2,)), 1, False),
    "groups": Layout(((6, 2, 2),), 3, False),
    "groups and bias": Layout(((6, 2), (6,)), 3, False),
    "transposed": Layout(((3, 4),), 1, True),
    "transposed and bias": Layout(((3, 2, 2), (4,)), 1, True),
    "transposed groups and bias": Layout(((6, 3), (9,)), 3, True),
    "vector": Layout(((5,),), 1, False),
    "number": Layout(((),), 1, False),
}


def positive(groups: int, size: int, seed: int) -> Tensor:
    """Symmetric positive definite matrices of condition below 100 or so."""
    N = noise(groups, size, size, seed=seed)
    return N @ N.mT / size + 0.3 * torch.eye(size, dtype=torch.float64)


def kronecker_pair(
    layout: Layout,
    kinds: str = "dd",
    shift: float = 0.0,
    seed: int = 0,
    factors: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Kronecker, Tensor]:
    """A Kronecker product, ``d`` for a dense and ``i`` for a diagonal factor, on a space with names, and its matrix."""
    groups, rows, columns = layout.indices().shape
    if factors is None:
        factors = positive(groups, rows, seed), positive(groups, columns, seed + 1)
    left, right = (
        M if kind == "d" else torch.diag_embed(M.diagonal(dim1=1, dim2=2))
        for M, kind in zip(factors, kinds, strict=True)
    )
    eye = torch.eye(rows * columns, dtype=torch.float64)
    truth = layout.matrix([torch.kron(L, R) + shift * eye for L, R in zip(left, right, strict=True)])
    given = [
        DenseFactor(M) if kind == "d" else DiagonalFactor(M.diagonal(dim1=1, dim2=2))
        for M, kind in zip((left, right), kinds, strict=True)
    ]
    options = {"arrangement": layout.arrangement, "space": layout.space(), "is_positive": True} | options
    return Kronecker(given[0], given[1], shift=shift, **options), truth


def orthonormal(groups: int, size: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(groups, size, size, seed=seed)).Q.contiguous()


def eigen_pair(layout: Layout, kinds: str = "dd", seed: int = 0) -> tuple[EigenDecomposed, Tensor]:
    """A matrix of given eigenvalues, ``d`` for a basis and ``i`` for none, and the same one dense."""
    groups, rows, columns = layout.indices().shape
    values = noise(groups, rows, columns, seed=seed).abs() + 0.1
    bases = [orthonormal(groups, size, seed + 1) if k == "d" else None for size, k in zip((rows, columns), kinds)]
    eyes = [torch.eye(size, dtype=torch.float64).repeat(groups, 1, 1) for size in (rows, columns)]
    left, right = (eye if Q is None else Q for Q, eye in zip(bases, eyes, strict=True))
    blocks = []
    for g in range(groups):
        Q = torch.kron(left[g], right[g])
        blocks.append(Q @ torch.diag(values[g].flatten()) @ Q.T)
    A = EigenDecomposed(values, bases[0], bases[1], arrangement=layout.arrangement, space=layout.space())
    return A, layout.matrix(blocks)


layouts = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.__getitem__)
kinds = st.sampled_from(["dd", "di", "id", "ii"])


def eye_like(M: Tensor) -> Tensor:
    return torch.eye(len(M), dtype=M.dtype)


def assert_close(actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=rtol, msg=lambda m: f"{what}: {m}")


def check_quantities(A: Any, M: Tensor) -> None:
    """Every closed form of a symmetric positive definite matrix."""
    assert_close(A.to_dense(), M, "to_dense")
    assert A.SELF_ADJOINT and A.H is A
    assert_close(A.diagonal(), M.diagonal(), "diagonal")
    assert_close(A.trace(), M.trace(), "trace")
    assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(M), "frobenius_norm")
    assert_close(A.logdet(), torch.logdet(M), "logdet")
    assert_close(A.det(), torch.linalg.det(M), "det")
    if hasattr(A, "eigenvalues"):
        assert_close(A.eigenvalues(), torch.linalg.eigvalsh(M), "eigenvalues")
    root = A.sqrt()
    assert root.POSITIVE_SEMIDEFINITE and root.domain == A.domain
    assert_close(root.to_dense() @ root.to_dense(), M, "sqrt")
    assert_close(root.to_dense(), root.to_dense().T, "symmetric root")
    assert torch.linalg.eigvalsh(root.to_dense()).min() > 0


def check_samples(A: Any, M: Tensor, num: int = 4000) -> None:
    """Mean and covariance of samples, which depend on the seed alone."""
    X = A.sample(num, seed=3)
    assert X.shape == (len(M), num) and X.dtype == A.dtype
    standard = torch.linalg.solve(torch.linalg.cholesky(M), X.double())
    covariance = standard @ standard.T / num
    assert (covariance - eye_like(M)).abs().max() < 6 * (2 / num) ** 0.5
    assert standard.mean(1).abs().max() < 5 / num**0.5
    assert torch.equal(X, A.sample(num, seed=3)) and not torch.equal(X, A.sample(num, seed=4))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(X, A.sample(num, generator=generator))
    assert not torch.equal(X, A.sample(num, generator=generator)), "a generator goes on"
