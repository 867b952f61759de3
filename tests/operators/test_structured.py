"""Closed forms of dense, diagonal and block-diagonal operators against the same quantities of dense matrices."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import (
    BlockDiagonal,
    Diagonal,
    IdentityLinearOperator,
    LinearOperator,
    TensorLinearOperator,
    exact_diagonal,
    exact_trace,
)
from tests.operators.operator_pairs import MatrixOperator, flat_operator, named_space, noise, symmetric

Closed = TensorLinearOperator | Diagonal | BlockDiagonal


@st.composite
def positive_pairs(draw: st.DrawFn) -> tuple[Closed, Tensor]:
    """A closed form whose eigenvalues have positive real parts, and its matrix."""
    seed, size = draw(st.integers(0, 99)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["dense", "symmetric", "flat", "list", "dict", "identity", "blocks"]))
    eye = torch.eye(size, dtype=torch.float64)
    if kind in ("dense", "symmetric"):
        N = noise(size, size, seed=seed)
        M = N @ N.T + (N - N.T if kind == "dense" else 0 * N) + 0.1 * eye
        M = M if kind == "dense" else (M + M.T) / 2
        return TensorLinearOperator(M), M
    if kind == "blocks":
        blocks = [draw(positive_pairs()) for _ in range(draw(st.integers(1, 3)))]
        return BlockDiagonal([b for b, _ in blocks]), torch.block_diag(*[m for _, m in blocks])
    if kind == "identity":
        return IdentityLinearOperator([(size, 2), ()], "cpu", torch.float64), torch.eye(2 * size + 1).double()
    tensors = [noise(size, seed=seed).abs() + 0.1, noise(2, 2, seed=seed + 1).abs() + 0.1, torch.tensor(0.5).double()]
    entries = torch.cat([t.flatten() for t in tensors])
    if kind == "flat":
        return Diagonal(entries), torch.diag(entries)
    return Diagonal(tensors if kind == "list" else dict(zip("abc", tensors, strict=True))), torch.diag(entries)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


@given(positive_pairs(), st.sampled_from([0.0, 0.3, 10.0]))
def test_quantities_equal_those_of_the_matrix(pair: tuple[Closed, Tensor], damping: float) -> None:
    A, M = pair
    eye = torch.eye(len(M), dtype=M.dtype)
    assert_close(A.to_dense(), M, "to_dense")
    assert_close(A.diagonal(), M.diagonal(), "diagonal")
    assert_close(A.trace(), M.trace(), "trace")
    assert_close(A.logdet(), torch.logdet(M), "logdet")
    assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(M), "frobenius_norm")
    inverse = A.inverse(damping=damping)
    assert_close(inverse.to_dense(), torch.linalg.inv(M + damping * eye), "inverse")
    assert inverse.domain == A.domain and inverse.codomain == A.codomain
    assert inverse.SELF_ADJOINT == A.SELF_ADJOINT
    assert_close(inverse.inverse().to_dense(), M + damping * eye, "inverse of the inverse")
    assert_close((A.damped(damping)).inverse().to_dense(), inverse.to_dense(), "damped and inverted")  # type: ignore[attr-defined]
    assert_close(exact_diagonal(A), M.diagonal(), "exact_diagonal")
    assert_close(exact_trace(A), M.trace(), "exact_trace")


@given(positive_pairs())
def test_pickles_hold_the_same_matrix(pair: tuple[Closed, Tensor]) -> None:
    A = pair[0]
    copy = pickle.loads(pickle.dumps(A))
    assert type(copy) is type(A) and copy.domain == A.domain and repr(copy) == repr(A)
    assert torch.equal(copy.to_dense(), A.to_dense())


def test_dense_operator_knows_symmetry() -> None:
    assert TensorLinearOperator(symmetric(3)).SELF_ADJOINT
    assert not TensorLinearOperator(noise(3, 3)).SELF_ADJOINT
    assert not TensorLinearOperator(noise(3, 2)).SELF_ADJOINT
    inverse = TensorLinearOperator(symmetric(5, 3)).inverse(damping=20.0)
    assert torch.equal(inverse.to_dense(), inverse.to_dense().T)


def test_positive_flags_of_inverses() -> None:
    eye = IdentityLinearOperator([(3,)], "cpu", torch.float64)
    assert eye.inverse(1.0).POSITIVE_SEMIDEFINITE
    assert not eye.inverse(-3.0).POSITIVE_SEMIDEFINITE
    assert not Diagonal(-torch.ones(2)).inverse().POSITIVE_SEMIDEFINITE


@pytest.mark.parametrize("damping", [0.0, -2.0])
def test_zeros_on_the_diagonal_have_no_inverse(damping: float) -> None:
    A = Diagonal({"w": torch.tensor([[1.0, -damping], [-damping, 3.0]]), "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"2 of 6 .* zero"):
        A.inverse(damping)
    with pytest.raises(ValueError, match="zero"):
        BlockDiagonal([A]).inverse(damping)
    assert torch.isfinite(A.inverse(damping + 0.5).diagonal()).all()


def test_singular_dense_operators_have_no_inverse() -> None:
    A = TensorLinearOperator(torch.ones(3, 3))
    with pytest.raises(torch.linalg.LinAlgError):
        A.inverse()
    with pytest.raises(torch.linalg.LinAlgError):
        BlockDiagonal([TensorLinearOperator(torch.eye(2)), A]).inverse()
    assert torch.isfinite(A.inverse(damping=1.0).to_dense()).all()


@pytest.mark.parametrize(
    "A",
    [
        TensorLinearOperator(torch.diag(torch.tensor([1.0, -2.0]))),
        TensorLinearOperator(torch.ones(2, 2)),
        Diagonal(torch.tensor([1.0, -2.0])),
        Diagonal(torch.tensor([1.0, 0.0])),
        BlockDiagonal([Diagonal(torch.tensor([-2.0])), TensorLinearOperator(torch.eye(2))]),
    ],
    ids=["dense negative", "dense zero", "diagonal negative", "diagonal zero", "block negative"],
)
def test_determinants_that_are_not_positive_have_no_logarithm(A: Closed) -> None:
    with pytest.raises(ValueError, match="not positive"):
        A.logdet()


def test_two_negative_factors_make_a_positive_determinant() -> None:
    A = BlockDiagonal([TensorLinearOperator(torch.tensor([[-2.0]])), Diagonal(torch.tensor([-3.0]))])
    assert Diagonal(torch.tensor([-2.0, -3.0])).logdet().item() == pytest.approx(1.791759, abs=1e-5)
    assert A.logdet().item() == pytest.approx(1.791759, abs=1e-5)


def test_rectangular_matrices_have_no_square_quantities() -> None:
    A = TensorLinearOperator(noise(2, 3))
    for name in ("diagonal", "trace", "logdet", "inverse"):
        with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
            getattr(A, name)()
    with pytest.raises(ValueError, match="square"):
        A.damped(1.0)
    with pytest.raises(ValueError, match="square"):
        BlockDiagonal([A])
    assert_close(A.frobenius_norm(), noise(2, 3).square().sum().sqrt(), "frobenius_norm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_has_all_quantities(dtype: torch.dtype) -> None:
    """Factorised in float32, answered in the operator's dtype: powers of two are exact."""
    M = torch.diag(torch.tensor([2.0, 4.0], dtype=dtype))
    for A in (TensorLinearOperator(M), Diagonal(M.diagonal()), BlockDiagonal([TensorLinearOperator(M)])):
        inverse = A.inverse()
        assert inverse.dtype == dtype
        assert inverse.to_dense().tolist() == [[0.5, 0.0], [0.0, 0.25]]
        assert A.trace().item() == 6.0
        assert A.logdet().item() == pytest.approx(2.0794, rel=1e-2)
        assert A.frobenius_norm().item() == pytest.approx(4.4721, rel=1e-2)


# -- construction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2)])
def test_dense_operator_wants_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrix"):
        TensorLinearOperator(torch.ones(shape))


def test_nothing_at_all_is_refused() -> None:
    for empty in ([], {}, ()):
        with pytest.raises(ValueError, match="none"):
            Diagonal(empty)
    with pytest.raises(ValueError, match="none"):
        BlockDiagonal([])


def test_mixed_entries_are_refused_by_name() -> None:
    for other in (torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match="'b'"):
            Diagonal({"w": torch.ones(3), "b": other})
        with pytest.raises(ValueError, match="Block 1"):
            BlockDiagonal([Diagonal(torch.ones(3)), Diagonal(other)])


def test_blocks_keep_names_when_all_have_some() -> None:
    w, b = Diagonal({"w": torch.ones(2, 2)}), Diagonal({"b": torch.ones(2)})
    assert BlockDiagonal([w, b]).domain.names == ("w", "b")
    assert BlockDiagonal([w, Diagonal(torch.ones(2))]).domain.names is None
    answer = BlockDiagonal([2 * w, 3 * b]) @ {"w": torch.ones(2, 2, 1), "b": torch.ones(2, 1)}
    assert answer["w"].flatten().tolist() == [2.0] * 4 and answer["b"].flatten().tolist() == [3.0] * 2


def test_block_without_a_closed_form_is_named() -> None:
    A = BlockDiagonal([TensorLinearOperator(noise(2, 2)), flat_operator(noise(2, 2))])
    for name in ("logdet", "frobenius_norm", "inverse"):
        with pytest.raises(NotImplementedError, match=rf"Block 1 \(MatrixOperator\).*{name}"):
            getattr(A, name)()


def test_exact_quantities_of_blocks_without_closed_forms() -> None:
    """A block-diagonal operator is a square operator, whatever its blocks are."""
    parts = [noise(2, 2), noise(3, 3)]
    A = BlockDiagonal([TensorLinearOperator(parts[0]), flat_operator(parts[1])])
    assert_close(exact_diagonal(A), torch.cat([p.diagonal() for p in parts]), "exact_diagonal")
    assert_close(exact_trace(A), parts[0].trace() + parts[1].trace(), "exact_trace")


def test_nested_blocks() -> None:
    inner = BlockDiagonal([TensorLinearOperator(noise(2, 2, seed=1)), Diagonal(noise(1, seed=2))])
    outer = BlockDiagonal([inner, TensorLinearOperator(noise(3, 3, seed=3))])
    M = torch.block_diag(noise(2, 2, seed=1), noise(1, 1, seed=2), noise(3, 3, seed=3))
    assert_close(outer.to_dense(), M, "nested")
    assert_close(outer.H.to_dense(), M.T, "nested, adjoint")
    assert_close((outer + outer).inverse(9.0).to_dense(), torch.linalg.inv(2 * M + 9 * torch.eye(6).double()), "sum")  # type: ignore[attr-defined]


def test_results_do_not_share_memory() -> None:
    M = torch.eye(2)
    A, D = TensorLinearOperator(M), Diagonal(M.diagonal())
    for result in (A.to_dense(), A.diagonal(), D.diagonal(), D.to_dense(), D @ torch.ones(2), A @ torch.ones(2)):
        result.fill_(7.0)
    assert torch.equal(A.to_dense(), torch.eye(2)) and torch.equal(D.to_dense(), torch.eye(2))


def test_closed_forms_are_only_where_they_exist() -> None:
    """Scripts ask ``hasattr(A, "inverse")``."""
    space = named_space({"w": (2, 2)})
    lazy: LinearOperator = MatrixOperator(symmetric(4), space, space, is_self_adjoint=True)
    for A in (lazy, lazy.damped(1.0), 2 * lazy, lazy @ lazy):
        for name in ("inverse", "logdet", "trace", "diagonal"):
            assert not hasattr(A, name), f"{A!r} has {name}"
    for B in (TensorLinearOperator(torch.eye(2)), Diagonal(torch.ones(2)), BlockDiagonal([Diagonal(torch.ones(2))])):
        for name in ("inverse", "logdet", "trace", "diagonal", "frobenius_norm"):
            assert hasattr(B, name)


def test_the_identity_of_a_space() -> None:
    """An identity is built from an operator's space as well, with its names."""
    A = Diagonal({"weight": torch.full((2, 2), 3.0, dtype=torch.float64)})
    identity = IdentityLinearOperator(A.domain)
    assert identity.domain == A.domain
    assert (A + 2.0 * identity).diagonal().tolist() == [5.0] * 4
