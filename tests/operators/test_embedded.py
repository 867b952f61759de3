"""Operators on a part of a larger space, in other dtypes, their sums by blocks, pseudo-inverses; against matrices."""

import pytest
import torch
from torch import Tensor

from curvlinops import (
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
)
from curvlinops.operators.algebra import Sum
from curvlinops.operators.block_sums import joined_cuts
from curvlinops.operators.embedded import Converted
from tests.operators.operator_pairs import CPU, MatrixOperator, named_space, noise

SHAPES = {"head": (3,), "w": (2, 2), "b": (2,)}
SPACE = named_space(SHAPES)
ROWS = {"head": [0, 1, 2], "w": [3, 4, 5, 6], "b": [7, 8]}


def positive(size: int, rank: int, seed: int = 0) -> Tensor:
    """A symmetric positive semi-definite matrix."""
    N = noise(size, rank, seed=seed)
    return N @ N.T


def placed(matrix: Tensor, *names: str) -> Tensor:
    """The matrix on all parameters that is this one on some, in this order, and zero elsewhere."""
    rows = torch.tensor([row for name in names for row in ROWS[name]])
    result = torch.zeros(9, 9, dtype=torch.float64)
    result[rows.unsqueeze(1), rows] = matrix.double()
    return result


def parts(dtype: torch.dtype = torch.float64) -> dict[str, tuple[LinearOperator, list[str] | None, Tensor]]:
    """Operators of each kind on some tensors, the names to give, and the matrix on all."""
    L, R, M = positive(2, 2, 1), positive(2, 2, 2), positive(6, 4, 3)
    some = named_space({"b": (2,), "w": (2, 2)}, dtype)
    w, entries = named_space({"w": (2, 2)}, dtype), noise(6).abs().to(dtype)
    U = noise(4, 2, seed=4).to(dtype)
    kronecker = Kronecker(L.to(dtype), R.to(dtype), space=w, is_positive=True)
    blocks = BlockDiagonal([Diagonal(entries[:2]), kronecker], positions=[[0], [1]], space=some)
    return {
        "by products": (MatrixOperator(M.to(dtype), some, some, True), None, placed(M, "b", "w")),
        "dense": (TensorLinearOperator(M.to(dtype)), ["b", "w"], placed(M, "b", "w")),
        "diagonal": (
            Diagonal({"b": entries[:2], "w": entries[2:].reshape(2, 2)}),
            None,
            placed(torch.diag(entries), "b", "w"),
        ),
        "Kronecker": (kronecker, None, placed(torch.kron(L, R), "w")),
        "low rank": (LowRankLinearOperator(TensorLinearOperator(U)), ["w"], placed(U @ U.T, "w")),
        "blocks": (blocks, None, placed(torch.block_diag(torch.diag(entries[:2]), torch.kron(L, R)), "b", "w")),
    }


def test_zero_elsewhere_and_closed_forms_stay() -> None:
    for kind, (A, names, M) in parts().items():
        found = A.embedded(SPACE, names)
        assert found.domain == SPACE and found.SELF_ADJOINT == A.SELF_ADJOINT, kind
        assert found.POSITIVE_SEMIDEFINITE == A.POSITIVE_SEMIDEFINITE, kind
        torch.testing.assert_close(found.to_dense(), M, msg=lambda m, kind=kind: f"{kind}: {m}")
        assert hasattr(found.damped(1.0), "inverse") == (kind != "by products"), kind
        assert A.embedded(A.domain) is A, "nothing to do"
    with pytest.raises(ValueError, match=r"unknown: \['x'\]"):
        Diagonal({"x": torch.ones(3).double()}).embedded(SPACE)
    with pytest.raises(ValueError, match="spaces differ"):
        Diagonal({"w": torch.ones(3).double()}).embedded(SPACE)
    with pytest.raises(ValueError, match="no names"):
        Diagonal({"w": torch.ones(3).double()}).embedded(Space(((3,), (2,)), torch.float64, CPU))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype: torch.dtype, rtol: float) -> None:
    for kind, (A, names, M) in parts(dtype).items():
        found = A.embedded(SPACE, names)
        assert found.dtype == torch.float64, kind
        torch.testing.assert_close(found.to_dense(), M, rtol=rtol, atol=rtol * float(M.abs().max()), msg=kind)
        # A sum that would be closed in its own dtype is closed in the other one.
        assert hasattr(found.damped(1.0), "inverse") == (kind not in ("by products", "low rank")), kind
    A = parts(dtype)["by products"][0].embedded(SPACE)
    assert isinstance(A, BlockDiagonal) and isinstance(A.blocks[0], Converted)
    column = noise(9)
    torch.testing.assert_close(A.H @ column, A @ column)


def test_entries_that_others_hold_are_not_called_ones_own() -> None:
    entries = torch.ones(4, dtype=torch.float64)
    live = Diagonal({"w": entries.reshape(2, 2)}).embedded(SPACE)
    frozen = live.frozen()
    entries.mul_(2)
    assert float(live.to_dense().sum()) == 8 and float(frozen.to_dense().sum()) == 4


def test_sums_are_cut_as_finely_as_both_allow() -> None:
    every = parts()
    for kind, (A, names, M) in every.items():
        for other, (B, others, N) in every.items():
            found = A.embedded(SPACE, names) + B.embedded(SPACE, others)
            torch.testing.assert_close(found.to_dense(), M + N, msg=f"{kind} + {other}")
            if kind != "diagonal" or other != "diagonal":
                assert isinstance(found, BlockDiagonal), f"{kind} + {other}: the head stands alone"
    head = TensorLinearOperator(positive(3, 3))
    body, names, M = every["dense"]
    found = body.embedded(SPACE, names) + head.embedded(SPACE, ["head"])
    assert hasattr(found, "inverse"), "what is zero on one side leaves the other as it is"
    torch.testing.assert_close(found.to_dense(), M + placed(head.to_dense(), "head"))
    assert joined_cuts([[0], [1], [2, 3], [3, 1], [4]]) == [[0], [3, 1, 2], [4]]


def test_multiples_of_products_with_an_identity_still_share_it() -> None:
    """RegMean: Σ w_t (I ⊗ A_t) = I ⊗ Σ w_t A_t, for any weights."""
    A, B, one = positive(4, 3), positive(4, 3, 5), torch.ones(3, dtype=torch.float64)
    found = 0.3 * Kronecker(one, A) + 1.7 * Kronecker(one, B)
    assert isinstance(found, Kronecker)
    torch.testing.assert_close(found.to_dense(), torch.kron(torch.eye(3).double(), 0.3 * A + 1.7 * B))


def test_multiples_of_inverses() -> None:
    """A factor that is kept as a decomposition of its inverse has multiples, too."""
    M = positive(3, 3) + torch.eye(3).double()
    inverse = Kronecker(M, torch.ones(1).double(), is_positive=True).inverse()
    torch.testing.assert_close((2 * inverse).to_dense(), 2 * torch.linalg.inv(M))


def test_pseudo_inverses() -> None:
    L, R, M, U = positive(3, 2), positive(2, 1, 1), positive(5, 3, 2), noise(5, 7, seed=3)
    U[:, 3:] = U[:, :1]  # dependent
    entries = torch.tensor([0.0, 2.0, 1e-320, -4.0], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    values = torch.tensor([[0.0, 1.0], [3.0, 1e-18]], dtype=torch.float64)
    Q = torch.linalg.qr(noise(2, 2))[0].contiguous()
    groups = torch.stack([L, 1e6 * positive(3, 1, 4)])
    weights = torch.tensor([1.0, -2.0, 0.5, 0, 0, 3.0, 1.0], dtype=torch.float64)
    low = LowRankLinearOperator(TensorLinearOperator(U), weights)
    pairs: dict[str, tuple[LinearOperator, Tensor]] = {
        "diagonal": (Diagonal(entries), torch.diag(torch.where(entries.abs() > 1e-300, entries, 0.0))),
        "dense": (TensorLinearOperator(M), M),
        "not symmetric": (TensorLinearOperator(noise(4, 4)), noise(4, 4)),
        "Kronecker": (Kronecker(L, R, is_positive=True), torch.kron(L, R)),
        "Kronecker with a shift": (
            Kronecker(torch.diag(torch.tensor([-2.0, 1.0]).double()), R, shift=0.7),
            torch.kron(torch.diag(torch.tensor([-2.0, 1.0]).double()), R) + 0.7 * torch.eye(4).double(),
        ),
        "groups": (
            Kronecker(groups, torch.stack([R, R]), is_positive=True),
            torch.block_diag(*[torch.kron(G, R) for G in groups]),
        ),
        "eigenvalues": (
            EigenDecomposed(values, Q),
            torch.kron(Q, eye) * values.flatten() @ torch.kron(Q, eye).T,
        ),
        "low rank": (low, U * weights @ U.T),
        "low rank and identity": (low.damped(0.3), U * weights @ U.T + 0.3 * torch.eye(5).double()),
    }
    for kind, (A, matrix) in pairs.items():
        truth = torch.linalg.pinv(matrix, rtol=1e-11)
        torch.testing.assert_close(A.pinv().to_dense(), truth, rtol=1e-8, atol=1e-8, msg=f"{kind}")  # type: ignore[attr-defined]
    blocks = BlockDiagonal([pairs["Kronecker"][0], pairs["low rank"][0]])
    truth = torch.block_diag(torch.linalg.pinv(torch.kron(L, R)), torch.linalg.pinv(pairs["low rank"][1], rtol=1e-11))
    torch.testing.assert_close(blocks.pinv().to_dense(), truth)
    assert not hasattr(BlockDiagonal([blocks, Sum([blocks, blocks])]), "pinv")
