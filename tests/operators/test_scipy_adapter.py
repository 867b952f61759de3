"""SciPy multiplies what the operator multiplies, from both sides, in the dtype asked for."""

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvlinops import CGInverseLinearOperator, Diagonal, TensorLinearOperator
from tests.operators.operator_pairs import MatrixOperator, Pair, expressions, flat_operator, named_space, noise


def check_products(S: Any, M: np.ndarray[Any, Any], rtol: float = 1e-9) -> None:
    rng = np.random.default_rng(0)
    rows, columns = M.shape
    v, V, u, U = (rng.normal(size=size) for size in (columns, (columns, 3), rows, (rows, 2)))
    scale = 1 + np.abs(M).sum()
    cases = {
        "matvec": (S.matvec(v), M @ v),
        "matvec of a column": (S.matvec(v[:, None]), (M @ v)[:, None]),
        "matmat": (S.matmat(V), M @ V),
        "rmatvec": (S.rmatvec(u), M.T @ u),
        "rmatmat": (S.rmatmat(U), M.T @ U),
        "@": (S @ v, M @ v),
        "adjoint": (S.H @ u, M.T @ u),
        "transpose": (S.T @ U, M.T @ U),
    }
    for name, (actual, expected) in cases.items():
        assert isinstance(actual, np.ndarray), name
        assert actual.shape == expected.shape and actual.dtype == S.dtype, name
        np.testing.assert_allclose(actual, expected, rtol=0, atol=10 * rtol * scale, err_msg=name)


@given(st.sampled_from(["params", "outputs"]), st.sampled_from(["params", "outputs"]), st.data())
def test_products(rows: str, columns: str, data: st.DataObject) -> None:
    pair: Pair = data.draw(expressions(rows, columns, depth=1))
    S = pair.operator.to_scipy()
    assert S.shape == tuple(pair.matrix.shape) and S.dtype == np.float64
    check_products(S, pair.matrix.numpy())


@pytest.mark.parametrize(
    ("own", "asked", "answer", "rtol"),
    [
        (torch.float64, None, np.float64, 1e-12),
        (torch.float32, None, np.float32, 1e-6),
        (torch.bfloat16, None, np.float32, 1e-2),
        (torch.float16, None, np.float32, 1e-2),
        (torch.float32, np.float64, np.float64, 1e-6),
        (torch.float64, np.float32, np.float32, 1e-6),
        (torch.float64, "float32", np.float32, 1e-6),
        (torch.bfloat16, np.float64, np.float64, 1e-2),
    ],
)
def test_dtypes(own: torch.dtype, asked: Any, answer: Any, rtol: float) -> None:
    M = noise(4, 3).to(own)
    S = TensorLinearOperator(M).to_scipy(dtype=asked)
    assert S.dtype == answer
    check_products(S, M.double().numpy(), rtol)


def test_inverse() -> None:
    N = noise(6, 6)
    M = N @ N.T + torch.eye(6).double()
    for A in (TensorLinearOperator((M + M.T) / 2).inverse(), CGInverseLinearOperator(flat_operator(M, True), 1e-12)):
        check_products(A.to_scipy(), torch.linalg.inv(M).numpy())
    check_products(Diagonal([M[0].abs(), M[1:3].abs()]).inverse().to_scipy(), np.diag(1 / M[:3].abs().flatten()))


def test_eigensolvers() -> None:
    N = noise(12, 12)
    space = named_space({"w": (3, 3), "b": (3,)})
    M = N @ N.T
    A = MatrixOperator((M + M.T) / 2, space, space, is_self_adjoint=True)
    truth = np.linalg.eigvalsh(A.matrix.numpy())
    values, vectors = sla.eigsh(A.to_scipy(), k=3)
    np.testing.assert_allclose(values, truth[-3:], rtol=1e-9)
    np.testing.assert_allclose(A.matrix.numpy() @ vectors, vectors * values, atol=1e-8)
    inverse = CGInverseLinearOperator(A, rtol=1e-13, max_iter=500)
    nearest = sla.eigsh(A.to_scipy(), k=2, sigma=0, OPinv=inverse.to_scipy(), return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(nearest), truth[:2], rtol=1e-6)
    rectangular = flat_operator(noise(8, 5))
    singular = sla.svds(rectangular.to_scipy(), k=2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(singular), np.linalg.svd(noise(8, 5).numpy())[1][1::-1], rtol=1e-9)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(3),
        np.arange(3, dtype=np.float32),
        np.arange(6.0)[::2],
        np.arange(3.0)[::-1],
        np.array([True, False, True]),
        np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        np.arange(6.0).reshape(2, 3).T,
    ],
    ids=["int", "float32", "strided", "reversed", "bool", "fortran", "transposed"],
)
def test_every_layout_of_arrays(array: np.ndarray[Any, Any]) -> None:
    M, before = noise(3, 3), array.copy()
    np.testing.assert_allclose(TensorLinearOperator(M).to_scipy() @ array, M.numpy() @ array, atol=1e-12)
    np.testing.assert_array_equal(array, before)


def test_read_only_arrays_do_not_warn() -> None:
    array = np.ones(3)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = Diagonal(torch.full((3,), 2.0, dtype=torch.float64)).to_scipy() @ array
    assert answer.tolist() == [2.0, 2.0, 2.0]


def test_complex_arrays_are_refused() -> None:
    S = TensorLinearOperator(torch.eye(2)).to_scipy()
    for ask in (S.matvec, S.rmatvec):
        with pytest.raises(TypeError, match="complex"):
            ask(np.array([1j, 2.0]))
