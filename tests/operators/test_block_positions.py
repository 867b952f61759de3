"""Block-diagonal operators whose blocks act on any tensors of a space, and what the blocks lend them."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import (
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    IdentityLinearOperator,
    Kronecker,
    LinearOperator,
    Space,
    TensorLinearOperator,
)
from curvlinops.operators import factor_sets
from curvlinops.operators.algebra import Sum
from curvlinops.operators.arrangement import Arrangement
from tests.operators.kronecker_pairs import (
    LAYOUTS,
    assert_close,
    check_quantities,
    check_samples,
    eigen_pair,
    eye_like,
    kronecker_pair,
    positive,
)
from tests.operators.operator_pairs import CPU, MatrixOperator, named_space, noise, symmetric

#: A space in which the tensors of a layer do not follow one another.
SHAPES = {"b": (3,), "norm": (2,), "w": (3, 4), "v": (4, 3), "free": (2, 2)}
SIZES = [3, 2, 12, 12, 4]
POSITIONS = [[2, 0], [1], [3], [4]]
STARTS = [sum(SIZES[:i]) for i in range(5)]


def placed(blocks: list[Tensor], positions: list[list[int]] = POSITIONS) -> Tensor:
    """The matrix of blocks on tensors of the space, written without the package."""
    order = torch.cat([torch.arange(STARTS[i], STARTS[i] + SIZES[i]) for own in positions for i in own])
    M = torch.zeros(sum(SIZES), sum(SIZES), dtype=torch.float64)
    M[order.unsqueeze(1), order] = torch.block_diag(*blocks)
    return M


def parts(seed: int = 0, shift: float = 0.0) -> list[tuple[LinearOperator, Tensor]]:
    """A joint Kronecker product, a diagonal, eigenvalues in bases, and a dense matrix on flat vectors."""
    joint = kronecker_pair(LAYOUTS["matrix and bias"], "dd", shift, seed, space=None)
    diagonal = noise(2, seed=seed).abs() + 0.2
    layout = LAYOUTS["matrix"]._replace(shapes=((4, 3),))
    eigen = eigen_pair(layout, seed=seed + 1)
    dense = positive(1, 4, seed + 2)[0]
    return [
        joint,
        (Diagonal({"norm": diagonal}), torch.diag(diagonal)),
        (EigenDecomposed(eigen[0]._values, eigen[0]._left, eigen[0]._right, arrangement=layout.arrangement), eigen[1]),
        (TensorLinearOperator(dense), dense),
    ]


def pair(seed: int = 0, shift: float = 0.0) -> tuple[BlockDiagonal, Tensor]:
    operators, matrices = zip(*parts(seed, shift), strict=True)
    return BlockDiagonal(operators, positions=POSITIONS, space=named_space(SHAPES)), placed(list(matrices))


@given(st.integers(0, 99), st.sampled_from([0.0, 0.5]), st.permutations(range(4)))
def test_quantities_equal_those_of_the_matrix(seed: int, shift: float, order: list[int]) -> None:
    """Whatever the order of the blocks."""
    A, M = pair(seed, shift)
    A = BlockDiagonal([A.blocks[i] for i in order], positions=[POSITIONS[i] for i in order], space=A.domain)
    check_quantities(A, M)
    check_quantities(A.inverse(), torch.linalg.inv(M))
    check_quantities(A.damped(0.3), M + 0.3 * eye_like(M))
    damped = torch.linalg.inv(M + 0.3 * eye_like(M))
    assert_close(A.inverse(0.3, use_exact_damping=True).to_dense(), damped, "exactly damped")
    X = {name: noise(*shape, 2, seed=seed) for name, shape in SHAPES.items()}
    flat = torch.cat([x.reshape(-1, 2) for x in X.values()])
    assert_close(torch.cat([y.reshape(-1, 2) for y in (A @ X).values()]), M @ flat, "dict")
    assert_close(noise(2, 33) @ A, noise(2, 33) @ M, "columns first")


def test_samples() -> None:
    A, M = pair()
    check_samples(A, M)
    twins = BlockDiagonal([Diagonal(torch.ones(3)), Diagonal(torch.ones(3))]).sample(2000)
    assert abs(float(torch.corrcoef(twins)[0, 3])) < 0.1, "blocks of one size draw other numbers"
    with pytest.raises(ValueError, match="num_samples"):
        A.sample(0)
    with pytest.raises(TypeError, match="generator"):
        A.sample(1, generator=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_samples"):
        A.sample(1.5)  # type: ignore[arg-type]


def test_dampings_of_each_block() -> None:
    A, _ = pair()
    dampings = [0.1, 0.2, 0.3, 0.4]
    blocks = [M for _, M in parts()]
    eyes = [torch.eye(len(M)).double() for M in blocks]
    exact = [torch.linalg.inv(M + d * eye) for M, d, eye in zip(blocks, dampings, eyes, strict=True)]
    assert_close(A.inverse(dampings, use_exact_damping=True).to_dense(), placed(exact), "exact")
    K = A.blocks[0]
    assert isinstance(K, Kronecker)
    L, R = K.left.to_dense()[0], K.right.to_dense()[0]
    by_factors = Kronecker(L + 0.1 * torch.eye(3).double(), R + 0.1 * torch.eye(5).double(),
                           arrangement=K.arrangement).inverse().to_dense()  # fmt: skip
    assert_close(A.inverse(dampings).to_dense(), placed([by_factors, *exact[1:]]), "of the factors")
    assert_close(A.inverse(torch.tensor(dampings)).to_dense(), A.inverse(dampings).to_dense(), "tensor", 1e-6)
    for number in (np.float32(0.25), torch.tensor(0.25)):
        assert torch.equal(A.inverse(number).to_dense(), A.inverse(0.25).to_dense())
    with pytest.raises(ValueError, match="a number or 4 of them, got 3"):
        A.inverse(dampings[:3])
    with pytest.raises(ValueError, match="exclude each other"):
        A.inverse(0.1, True, 1e-8, True)


def test_options_reach_kronecker_blocks_only() -> None:
    """Also inside of nested blocks; blocks of other kinds are damped exactly."""
    K, _ = kronecker_pair(LAYOUTS["matrix"])
    D, T = Diagonal(torch.ones(2).double()), TensorLinearOperator(positive(1, 3, 1)[0])
    A = BlockDiagonal([BlockDiagonal([K, D]), T])
    for options in ({}, {"use_heuristic_damping": True, "min_damping": 0.2}, {"use_exact_damping": True}):
        found = A.inverse(0.3, **options).to_dense()
        blocks = [K.inverse(0.3, **options), D.inverse(0.3), T.inverse(0.3)]
        assert_close(found, torch.block_diag(*[b.to_dense() for b in blocks]), str(options))
    eigen = BlockDiagonal([eigen_pair(LAYOUTS["matrix"])[0]])
    with pytest.raises(ValueError, match="use_heuristic_damping"):
        eigen.inverse(0.3, use_heuristic_damping=True)


@pytest.mark.parametrize("exact", [False, True])
def test_kronecker_blocks_are_inverted_together(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    name = "symmetric_eigen" if exact else "inverses_of_positive"
    whole = getattr(factor_sets, name)

    def counted(matrices: list[Tensor], retry: bool = True) -> Any:
        calls.append(len(matrices))
        return whole(matrices, retry)

    monkeypatch.setattr(factor_sets, name, counted)
    pairs = [kronecker_pair(LAYOUTS["matrix"], seed=seed) for seed in range(4)]
    A = BlockDiagonal([K for K, _ in pairs])
    inverse = A.inverse(0.2, use_exact_damping=exact)
    assert [c for c in calls if c] == [8]
    if exact:
        truth = [torch.linalg.inv(M + 0.2 * eye_like(M)) for _, M in pairs]
        assert_close(inverse.to_dense(), torch.block_diag(*truth), "inverse")


# -- algebra -----------------------------------------------------------------------------------------------------------


def test_sums_and_products_keep_the_blocks() -> None:
    A, M = pair()
    B, N = pair(seed=5)
    order = [3, 1, 0, 2]
    turned = BlockDiagonal([B.blocks[i] for i in order], positions=[POSITIONS[i] for i in order], space=B.domain)
    entries = noise(33)
    D, I = Diagonal(entries), IdentityLinearOperator(A.domain)  # noqa: E741
    eye = eye_like(M)
    found: dict[str, tuple[LinearOperator, Tensor]] = {
        "sum": (A + B, M + N),
        "in another order": (A + turned, M + N),
        "product": (A @ turned, M @ N),
        "product with a diagonal": (A @ D, M @ torch.diag(entries)),
        "product of a diagonal": (D @ A, torch.diag(entries) @ M),
        "with a diagonal": (A + D, M + torch.diag(entries)),
        "with the identity": (A + 2 * I, M + 2 * eye),
        "identity first": (2 * I - A, 2 * eye - M),
        "scaled": (-2 * A / 4, -M / 2),
        "damped": (A.damped(0.2), M + 0.2 * eye),
    }
    for what, (operator, expected) in found.items():
        assert isinstance(operator, BlockDiagonal) and operator.positions == POSITIONS, what
        assert operator.domain.names == A.domain.names, what
        assert_close(operator.to_dense(), expected, what)
        assert_close(operator.H.to_dense(), expected.T, f"{what}, adjoint")
    kinds = [Kronecker, Diagonal, EigenDecomposed, TensorLinearOperator]
    for operator in (A + 2 * I, 2 * I - A, -3 * A, A.damped(0.2)):
        assert isinstance(operator, BlockDiagonal)
        assert [type(block) for block in operator.blocks] == kinds, "closed"
        assert hasattr(operator, "inverse")
    for operator in (A + B, A + D):
        assert isinstance(operator, BlockDiagonal)
        assert type(operator.blocks[0]) is Sum and not hasattr(operator, "inverse") and not hasattr(operator, "sqrt")


def test_blocks_cut_otherwise_make_a_sum() -> None:
    A, M = pair()
    B = BlockDiagonal(
        [TensorLinearOperator(symmetric(17)), TensorLinearOperator(symmetric(16))],
        positions=[[0, 1, 2], [3, 4]],
        space=A.domain,
    )
    N = torch.block_diag(symmetric(17), symmetric(16))
    assert type(A + B) is Sum
    assert_close((A + B).to_dense(), M + N, "sum")
    assert_close((A @ B).to_dense(), M @ N, "product")


@given(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
def test_blocks_by_name(names: list[str]) -> None:
    A, M = pair()
    rows = torch.cat([torch.arange(STARTS[i], STARTS[i] + SIZES[i]) for i, name in enumerate(SHAPES) if name in names])
    found = A.block(*names)
    assert found.domain.names == tuple(name for name in SHAPES if name in names)
    assert_close(found.to_dense(), M[rows][:, rows], "block")
    cuts_in_two = ("b" in names) != ("w" in names)
    assert hasattr(found, "inverse") != cuts_in_two
    if not cuts_in_two:
        assert_close(found.inverse().to_dense(), torch.linalg.inv(M[rows][:, rows]), "inverse")  # type: ignore[attr-defined]


# -- closed forms where they exist -------------------------------------------------------------------------------------

QUANTITIES = ("diagonal", "trace", "logdet", "det", "frobenius_norm", "inverse", "sqrt", "sample")


def test_closed_forms_are_only_where_all_blocks_have_them() -> None:
    """Scripts ask ``hasattr(A, "inverse")``; who does not ask is told which block lacks it."""
    A, _ = pair()
    space = named_space({"w": (2, 2)})
    lazy = BlockDiagonal([A, BlockDiagonal([MatrixOperator(symmetric(4), space, space, is_self_adjoint=True)])])
    for name in QUANTITIES:
        assert hasattr(A, name) and not hasattr(lazy, name), name
        with pytest.raises(NotImplementedError, match=r"Block 1 \(BlockDiagonal\) has no closed form"):
            getattr(lazy, name)
        assert callable(getattr(BlockDiagonal, name)) and getattr(BlockDiagonal, name).__doc__


def test_nested_blocks_know_their_inverse() -> None:
    A, M = pair()
    outer = BlockDiagonal([A, Diagonal(torch.full((2,), 2.0).double())])
    truth = torch.block_diag(torch.linalg.inv(M), 0.5 * torch.eye(2).double())
    assert_close(outer.inverse().to_dense(), truth, "nested")


# -- construction ------------------------------------------------------------------------------------------------------


def test_space_of_positions() -> None:
    blocks = [Diagonal({"w": torch.ones(2, 3), "b": torch.ones(2)}), Diagonal({"c": torch.full((4,), 2.0)})]
    A = BlockDiagonal(blocks, positions=[[2, 0], [1]])
    assert A.domain.names == ("b", "c", "w") and A.domain.shapes == ((2,), (4,), (2, 3))
    assert A.diagonal().tolist() == [1.0] * 2 + [2.0] * 4 + [1.0] * 6
    nameless = BlockDiagonal([blocks[0], Diagonal(torch.ones(4))], positions=[[2, 0], [1]])
    assert nameless.domain.names is None


@pytest.mark.parametrize(
    ("positions", "space", "message"),
    [
        ([[0], [0]], None, "positions: expected, for each of 2 blocks"),
        ([[0], [2]], None, "positions: expected"),
        ([[0, 1]], None, "positions: expected"),
        ([[0, 1], []], None, "positions: expected"),
        ([[0, 1], [2]], None, "block 0 acts on 1 tensors"),
        ([[0], [1]], Space(((3,), (2, 2)), torch.float32, CPU), "block 1 and its tensors: the spaces differ"),
        ([[0], [1]], Space(((3,),), torch.float32, CPU), "positions: expected"),
        ([[0], [1]], Space(((3,), (2, 3)), torch.float64, CPU), "Block 0 is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(positions: Any, space: Space | None, message: str) -> None:
    blocks = [TensorLinearOperator(torch.eye(3)), Diagonal([torch.ones(2, 3)])]
    with pytest.raises(ValueError, match=message):
        BlockDiagonal(blocks, positions=positions, space=space)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="Did you mean 'positions'"):
        BlockDiagonal([Diagonal(torch.ones(1))], position=[[0]])  # type: ignore[call-arg]


def test_what_passes_through() -> None:
    A, M = pair()
    copy = pickle.loads(pickle.dumps(A))
    assert torch.equal(copy.to_dense(), A.to_dense()) and copy.positions == POSITIONS and repr(copy) == repr(A)
    frozen = A.frozen()
    assert frozen._holds_values and frozen.frozen() is frozen and not A._holds_values
    assert_close(frozen.to_dense(), M, "frozen")
    assert_close(A.linearize().to_dense(), M, "linearised")
    assert A.SELF_ADJOINT and A.H is A


def test_single_numbers_and_vectors_as_exact_blocks() -> None:
    """An exact dense block is a Kronecker product with the number 1, damped exactly."""
    H = positive(1, 3, 0)[0]
    block = Kronecker(H, torch.ones(1).double(), arrangement=Arrangement(((3,),)), is_positive=True)
    A = BlockDiagonal([block, kronecker_pair(LAYOUTS["matrix"], space=None)[0]])
    found = A.inverse(0.1).blocks[0].to_dense()
    assert_close(found, torch.linalg.inv(H + 0.1 * torch.eye(3).double()), "exact block")


# -- the other closed forms --------------------------------------------------------------------------------------------


def test_diagonal_and_dense_matrices_have_roots_and_samples() -> None:
    entries, M = noise(4).abs() + 0.1, positive(1, 4, 3)[0]
    for A, truth in ((Diagonal(entries), torch.diag(entries)), (TensorLinearOperator(M), M)):
        check_quantities(A, truth)
        check_samples(A, truth)
    for bad in (Diagonal(torch.tensor([1.0, -1.0])), TensorLinearOperator(torch.diag(torch.tensor([1.0, -1.0])))):
        assert bad.det().item() == -1.0
        for ask in (bad.sqrt, lambda bad=bad: bad.sample(1)):
            with pytest.raises(ValueError, match=r"negative|positive semi-definite"):
                ask()
    with pytest.raises(ValueError, match="symmetric"):
        TensorLinearOperator(noise(3, 3)).sqrt()
    with pytest.raises(ValueError, match="square"):
        TensorLinearOperator(noise(3, 2)).det()
    low_rank = TensorLinearOperator(torch.ones(3, 3)).sqrt().to_dense()
    assert_close(low_rank @ low_rank, torch.ones(3, 3), "root of a singular matrix", 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roots_in_low_precision(dtype: torch.dtype) -> None:
    M = positive(1, 4, 3)[0].to(dtype)
    for A, truth in ((TensorLinearOperator(M), M), (Diagonal(M.diagonal()), torch.diag(M.diagonal()))):
        root = A.sqrt().to_dense().double()
        assert A.sqrt().dtype == A.sample(2).dtype == A.det().dtype == dtype
        assert_close(root @ root, truth.double(), "sqrt", 1e-5 if dtype == torch.float32 else 3e-2)
