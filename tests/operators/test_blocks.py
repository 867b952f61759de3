"""Parts of a matrix: submatrices, blocks of named parameters, diagonals and traces by products."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import (
    Diagonal,
    LinearOperator,
    Space,
    SubmatrixLinearOperator,
    TensorLinearOperator,
    exact_diagonal,
    exact_trace,
)
from curvlinops.operators import base
from tests.operators.operator_pairs import CPU, MatrixOperator, flat_operator, named_space, noise, symmetric

SHAPES = {"layer1.weight": (2, 2), "layer1.bias": (2,), "layer2.weight": (1, 3), "head": ()}
D = 10


def whole(is_symmetric: bool = False) -> MatrixOperator:
    space = named_space(SHAPES)
    return MatrixOperator(symmetric(D) if is_symmetric else noise(D, D), space, space, is_symmetric)


# -- submatrices -------------------------------------------------------------------------------------------------------


@given(st.permutations(range(6)), st.permutations(range(D)), st.integers(1, 6), st.integers(1, D), st.booleans())
def test_submatrix(rows: list[int], columns: list[int], num_rows: int, num_columns: int, structured: bool) -> None:
    M = noise(6, D)
    domain = named_space(SHAPES) if structured else Space.flat(D, torch.float64, CPU)
    A = MatrixOperator(M, domain, Space(((2, 3),), torch.float64, CPU))
    rows, columns = rows[:num_rows], columns[:num_columns]
    sub = SubmatrixLinearOperator(A, rows, columns)
    truth = M[rows][:, columns]
    assert sub.shape == (num_rows, num_columns)
    torch.testing.assert_close(sub.to_dense(), truth)
    torch.testing.assert_close(sub.T.to_dense(), truth.T)
    torch.testing.assert_close(noise(2, num_rows) @ sub, noise(2, num_rows) @ truth)
    torch.testing.assert_close(sub.frozen().linearize().to_dense(), truth)


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_submatrix_takes_every_kind_of_sequence(convert: Any) -> None:
    M = noise(3, 3)
    sub = SubmatrixLinearOperator(TensorLinearOperator(M), convert([2, 0]), range(3))
    assert torch.equal(sub.to_dense(), M[[2, 0]])


def test_submatrix_flags() -> None:
    A = whole(is_symmetric=True)
    assert SubmatrixLinearOperator(A, [0, 4], [0, 4]).SELF_ADJOINT
    assert not SubmatrixLinearOperator(A, [0, 4], [4, 0]).SELF_ADJOINT
    assert not SubmatrixLinearOperator(A, [0, 4], [0, 3]).SELF_ADJOINT
    assert not SubmatrixLinearOperator(whole(), [0, 4], [0, 4]).SELF_ADJOINT
    gram = whole().T @ whole()
    assert not SubmatrixLinearOperator(gram, [0, 1], [0, 1]).POSITIVE_SEMIDEFINITE
    B = whole()
    assert SubmatrixLinearOperator(B.T @ B, [0, 1], [0, 1]).POSITIVE_SEMIDEFINITE


def test_set_submatrix_moves_the_window() -> None:
    A = whole()
    sub = SubmatrixLinearOperator(A, [0, 1], [0, 1])
    sub.set_submatrix([3, 2, 1], [7])
    assert sub.shape == (3, 1)
    torch.testing.assert_close(sub.to_dense(), A.matrix[[3, 2, 1]][:, [7]])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0, 0], [1], "row_idxs.*repeats"),
        ([0], [1, 2, 1], "col_idxs.*repeats"),
        ([D], [1], "row_idxs.*10.*outside"),
        ([0], [-1], "col_idxs.*-1.*outside"),
    ],
)
def test_wrong_indices_are_refused(rows: list[int], columns: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubmatrixLinearOperator(whole(), rows, columns)


def test_refused_indices_change_nothing() -> None:
    A = whole()
    sub = SubmatrixLinearOperator(A, [0, 1], [2, 3])
    for rows, columns in (([5], [99]), ([99], [5])):
        with pytest.raises(ValueError):
            sub.set_submatrix(rows, columns)
        assert sub.shape == (2, 2)
        torch.testing.assert_close(sub.to_dense(), A.matrix[[0, 1]][:, [2, 3]])


# -- blocks by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "chosen", "names"),
    [
        (["layer1.*"], range(6), ["layer1.weight", "layer1.bias"]),
        (["*.bias"], range(4, 6), ["layer1.bias"]),
        (["head", "layer1.weight"], [0, 1, 2, 3, 9], ["layer1.weight", "head"]),
        (["layer?.weight"], [0, 1, 2, 3, 6, 7, 8], ["layer1.weight", "layer2.weight"]),
        (["*"], range(D), list(SHAPES)),
    ],
)
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_block(patterns: list[str], chosen: Any, names: list[str], is_symmetric: bool) -> None:
    A = whole(is_symmetric)
    block = A.block(*patterns)
    idx = list(chosen)
    truth = A.matrix[idx][:, idx]
    torch.testing.assert_close(block.to_dense(), truth)
    torch.testing.assert_close(block.T.to_dense(), truth.T)
    torch.testing.assert_close(block.frozen().linearize().to_dense(), truth)
    assert block.SELF_ADJOINT is is_symmetric
    answer = block @ {name: torch.ones(SHAPES[name], dtype=torch.float64) for name in names}
    assert {n: tuple(t.shape) for n, t in answer.items()} == {n: SHAPES[n] for n in names}


def test_block_of_a_diagonal_is_a_diagonal() -> None:
    A = Diagonal({n: noise(*s) for n, s in SHAPES.items()})
    block = A.block("layer1.*")
    assert isinstance(block, Diagonal)
    assert torch.equal(block.diagonal(), A.diagonal()[:6])
    assert block.inverse(2.0).domain.names == ("layer1.weight", "layer1.bias")
    assert isinstance(A.damped(1.0).block("head"), Diagonal)


def test_block_of_a_sum_and_of_a_block() -> None:
    A = whole()
    torch.testing.assert_close((A + A).block("head").to_dense(), 2 * A.matrix[9:, 9:])
    torch.testing.assert_close(A.block("layer1.*").block("*.bias").to_dense(), A.matrix[4:6, 4:6])


def test_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer9.*layer1\.weight"):
        whole().block("layer9.*")
    with pytest.raises(ValueError, match="No parameter"):
        whole().block()
    with pytest.raises(ValueError, match="names"):
        TensorLinearOperator(torch.eye(2)).block("*")
    with pytest.raises(ValueError, match="square"):
        MatrixOperator(noise(3, D), named_space(SHAPES), Space.flat(3, torch.float64, CPU)).block("*")


# -- diagonal, trace and matrix by products ----------------------------------------------------------------------------


@pytest.fixture(params=[1, 3, 100])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hand out the columns of the identity a few at a time."""
    chunk = int(request.param)
    monkeypatch.setattr(base, "_DENSE_CHUNK_NUMEL", chunk * D)
    return chunk


def square_operators() -> list[tuple[LinearOperator, Tensor]]:
    A, N = whole(), noise(5, 5)
    return [
        (A, A.matrix),
        (A.damped(2.0), A.matrix + 2 * torch.eye(D).double()),
        (flat_operator(N).T, N.T),
        (A.block("layer1.*"), A.matrix[:6, :6]),
        (SubmatrixLinearOperator(A, [0, 5, 9], [1, 5, 8]), A.matrix[[0, 5, 9]][:, [1, 5, 8]]),
    ]


def test_exact_quantities_in_chunks(chunked: int) -> None:
    for A, M in square_operators():
        torch.testing.assert_close(exact_diagonal(A), M.diagonal())
        torch.testing.assert_close(exact_trace(A), M.trace())
        torch.testing.assert_close(A.to_dense(), M)
    A = whole()
    exact_diagonal(A)
    assert A.num_products == -(-D // chunked)


def test_rectangular_matrices_in_chunks(chunked: int) -> None:
    M = noise(3, D)
    A = MatrixOperator(M, named_space(SHAPES), Space.flat(3, torch.float64, CPU))
    torch.testing.assert_close(A.to_dense(), M)
    torch.testing.assert_close(A.T.to_dense(), M.T)
    for quantity in (exact_diagonal, exact_trace):
        with pytest.raises(ValueError, match=r"square.*\(3, 10\)"):
            quantity(A)
    assert A.num_products == -(-D // chunked)


def test_to_dense_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of the identity at once than the limit allows."""
    monkeypatch.setattr(base, "_DENSE_CHUNK_NUMEL", 4 * D)
    A = whole()
    torch.testing.assert_close(A.to_dense(), A.matrix)
    assert A.num_products == 3
