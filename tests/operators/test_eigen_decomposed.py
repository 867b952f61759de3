"""Matrices of given eigenvalues: every quantity against the same one of the dense matrix in float64."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import EigenDecomposed, IdentityLinearOperator, LinearOperator
from curvlinops.operators.algebra import Chain, Sum
from curvlinops.operators.arrangement import Arrangement
from tests.operators.kronecker_pairs import (
    LAYOUTS,
    Layout,
    assert_close,
    check_quantities,
    check_samples,
    eigen_pair,
    eye_like,
    kinds,
    kronecker_pair,
    layouts,
    orthonormal,
)
from tests.operators.operator_pairs import noise


@given(layouts, kinds, st.sampled_from([0.0, 0.4, 5.0]), st.integers(0, 99))
def test_quantities_equal_those_of_the_matrix(layout: Layout, kinds: str, damping: float, seed: int) -> None:
    A, M = eigen_pair(layout, kinds, seed)
    assert A.POSITIVE_SEMIDEFINITE and A._is_definite
    check_quantities(A, M)
    inverse = A.inverse(damping)
    damped = M + damping * eye_like(M)
    check_quantities(inverse, torch.linalg.inv(damped))
    assert_close(inverse.inverse().to_dense(), damped, "inverse of the inverse")
    assert_close(A.damped(damping).inverse().to_dense(), inverse.to_dense(), "damped and inverted")
    assert_close(A.inverse(damping, False, 1e-3, True, False).to_dense(), inverse.to_dense(), "all options")
    assert_close((-2 * A).to_dense(), -2 * M, "negative multiple")
    assert not (-2 * A).POSITIVE_SEMIDEFINITE
    for K in (1, 3):
        X = noise(len(M), K, seed=seed)
        assert_close(A @ X, M @ X, f"product with {K} columns")


@pytest.mark.parametrize("kinds", ["dd", "id"])
def test_samples(kinds: str) -> None:
    A, M = eigen_pair(LAYOUTS["transposed groups and bias"], kinds)
    check_samples(A, M)
    check_samples(A.inverse(0.2), torch.linalg.inv(M + 0.2 * eye_like(M)))


def test_sums_and_products_of_the_same_bases() -> None:
    layout = LAYOUTS["groups and bias"]
    A, M = eigen_pair(layout)
    inverse, eye = A.inverse(0.5), IdentityLinearOperator(A.domain)
    N = torch.linalg.inv(M + 0.5 * eye_like(M))
    closed: dict[str, tuple[LinearOperator, Tensor]] = {
        "sum": (A + inverse, M + N),
        "difference": (A - A, 0 * M),
        "product": (A @ inverse, M @ N),
        "with the identity": (A + 2 * eye, M + 2 * eye_like(M)),
        "identity first": (2 * eye - A, 2 * eye_like(M) - M),
        "product with the identity": (A @ (2 * eye), 2 * M),
        "scaled": (-2 * A / 4, -M / 2),
    }
    for what, (found, expected) in closed.items():
        assert isinstance(found, EigenDecomposed) and found.domain == A.domain, what
        assert_close(found.to_dense(), expected, what)
    B, Q = eigen_pair(layout, seed=7)
    for found, expected, kind in ((A + B, M + Q, Sum), (A @ B, M @ Q, Chain)):
        assert type(found) is kind
        assert_close(found.to_dense(), expected, kind.__name__)
    K, T = kronecker_pair(layout)
    assert_close((A + K).to_dense(), M + T, "with a Kronecker product")


def test_sums_after_exact_inverses_share_bases() -> None:
    """The inverses of shifted versions of one Kronecker product have the same bases."""
    K, M = kronecker_pair(LAYOUTS["matrix"])
    K = K.frozen()
    first, second = K.inverse(0.1, use_exact_damping=True), K.damped(0.2).inverse(0.3)
    assert isinstance(first + second, EigenDecomposed)
    eye = eye_like(M)
    assert_close((first + second).to_dense(), torch.linalg.inv(M + 0.1 * eye) + torch.linalg.inv(M + 0.5 * eye), "sum")


def test_defaults_and_positions() -> None:
    values, Q = noise(2, 3).abs(), orthonormal(1, 3, 0)[0]
    A = EigenDecomposed(values, right_basis=Q)
    assert A.domain.is_flat and A.shape == (6, 6)
    R = torch.kron(torch.eye(2).double(), Q)
    assert_close(A.to_dense(), R @ torch.diag(values.flatten()) @ R.T, "flat")
    B = EigenDecomposed(values, arrangement=Arrangement(((3, 2),), transposed=True))
    assert_close(B.diagonal(), values.T.flatten(), "transposed")
    A, _ = eigen_pair(LAYOUTS["matrix and bias"])
    assert A.block("*") is A and not hasattr(A.block("bias"), "inverse")
    assert_close(A.block("bias").to_dense(), A.to_dense()[12:, 12:], "block")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"eigenvalues: expected real numbers \[R, S\]"),
        ((torch.ones(2, 2).long(),), "real numbers"),
        ((torch.tensor([[1.0, float("nan")]]),), "eigenvalues: 1 of them"),
        ((torch.ones(2, 3), torch.eye(3)), r"left_basis: expected \[1, 2, 2\]"),
        ((torch.ones(2, 3), None, torch.eye(3).double()), "right_basis: expected"),
        ((torch.ones(2, 3), torch.ones(2, 2)), "left_basis: expected orthonormal"),
        ((torch.ones(2, 2), torch.eye(2) * float("nan")), "left_basis: expected orthonormal"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EigenDecomposed(*arguments)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="eigenvalues: expected a tensor"):
        EigenDecomposed([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="left_basis: expected a tensor"):
        EigenDecomposed(torch.ones(1, 1), [[1.0]])  # type: ignore[arg-type]


def test_singular_and_negative_ones() -> None:
    A = EigenDecomposed(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    with pytest.raises(ValueError, match="2 of 4 eigenvalues are zero"):
        A.inverse()
    with pytest.raises(ValueError, match="not positive"):
        A.logdet()
    assert A.det() == 0 and A.sqrt().trace().item() == pytest.approx(1 + 2**0.5)
    assert A.inverse(1.0).trace().item() == pytest.approx(0.5 + 2 + 1 / 3)
    with pytest.raises(ValueError, match="at least 0"):
        A.inverse(-1.0)
    with pytest.raises(ValueError, match="use_heuristic_damping"):
        A.inverse(1.0, use_heuristic_damping=True)
    B = EigenDecomposed(torch.tensor([[1.0, -3.0]]))
    assert not B.POSITIVE_SEMIDEFINITE and B.det().item() == -3.0
    assert_close(B.inverse().diagonal(), torch.tensor([1.0, -1 / 3]), "inverse")
    for name in ("sqrt", "logdet"):
        with pytest.raises(ValueError, match="positive"):
            getattr(B, name)()


def test_determinants_beyond_the_range() -> None:
    A = EigenDecomposed(torch.full((100, 100), 1e-6))
    assert A.det() == 0 and A.logdet().item() == pytest.approx(-138155.1, rel=1e-6)


def test_tensors_that_others_hold_are_followed() -> None:
    values, Q = noise(2, 3).abs() + 0.1, orthonormal(1, 3, 0)[0]
    A = EigenDecomposed(values, right_basis=Q)
    frozen, before = A.frozen(), A.to_dense()
    values.mul_(2)
    assert_close(A.to_dense(), 2 * before, "followed")
    assert_close(frozen.to_dense(), before, "frozen")
    assert not A._holds_values and frozen._holds_values and frozen.frozen() is frozen
    assert frozen.inverse()._holds_values and not A.inverse()._holds_values


def test_results_do_not_share_memory() -> None:
    A, M = eigen_pair(LAYOUTS["vector"], "ii")
    for result in (A.to_dense(), A.diagonal(), A.eigenvalues(), A @ torch.ones(5).double()):
        result.fill_(7.0)
    assert_close(A.to_dense(), M, "untouched")


def test_pickles() -> None:
    A, _ = eigen_pair(LAYOUTS["groups and bias"])
    copy = pickle.loads(pickle.dumps(A))
    assert repr(copy) == repr(A) and torch.equal(copy.to_dense(), A.to_dense())
    assert "in bases of 2 and 3, 3 groups" in repr(A)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype: torch.dtype, rtol: float) -> None:
    values, Q = (noise(4, 3).abs() + 0.5).to(dtype), orthonormal(1, 4, 0)[0].to(dtype)
    A = EigenDecomposed(values, Q)
    B = torch.kron(Q.double(), torch.eye(3).double())
    M = B @ torch.diag(values.double().flatten()) @ B.T
    x = noise(12, 2, dtype=dtype)
    for actual, expected in (
        (A @ x, M @ x.double()),
        (A.diagonal(), M.diagonal()),
        (A.trace(), values.double().sum()),
        (A.logdet(), values.double().log().sum()),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@given(layouts, kinds, st.integers(0, 99))
def test_its_bases_and_values_make_it_again(layout: Layout, kinds: str, seed: int) -> None:
    A, M = eigen_pair(layout, kinds, seed)
    again = EigenDecomposed(A.values, A.left_basis, A.right_basis, arrangement=A.arrangement, space=A.domain)
    assert_close(again.to_dense(), M, "made again")
