"""Kronecker products: every quantity against the same one of the dense matrix in float64."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import Diagonal, EigenDecomposed, IdentityLinearOperator, Kronecker, Space, TensorLinearOperator
from curvlinops.operators import factor_sets
from curvlinops.operators.algebra import Chain, Sum
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.factors import DenseFactor, DiagonalFactor, Factor
from tests.operators.kronecker_pairs import (
    LAYOUTS,
    Layout,
    assert_close,
    check_quantities,
    check_samples,
    eye_like,
    kinds,
    kronecker_pair,
    layouts,
    positive,
)
from tests.operators.operator_pairs import CPU, flat_operator, named_space, noise, symmetric

PLAIN = LAYOUTS["matrix"]


@given(layouts, kinds, st.sampled_from([0.0, 0.4, 5.0]), st.integers(0, 99))
def test_quantities_equal_those_of_the_matrix(layout: Layout, kinds: str, shift: float, seed: int) -> None:
    A, M = kronecker_pair(layout, kinds, shift, seed)
    check_quantities(A, M)
    inverse = A.inverse()
    assert inverse.domain == A.domain and inverse.POSITIVE_SEMIDEFINITE
    check_quantities(inverse, torch.linalg.inv(M))
    assert_close(inverse.inverse().to_dense(), M, "inverse of the inverse")
    check_quantities(A.damped(0.7), M + 0.7 * eye_like(M))
    assert_close((-2 * A).to_dense(), -2 * M, "negative multiple")
    assert_close((-2 * A).inverse().to_dense(), torch.linalg.inv(-2 * M), "inverse of a negative multiple")
    assert not (-2 * A).POSITIVE_SEMIDEFINITE


@given(layouts, kinds, st.integers(0, 99))
def test_formats(layout: Layout, kinds: str, seed: int) -> None:
    A, M = kronecker_pair(layout, kinds, 0.3, seed)
    for K in (None, 1, 3):
        X = noise(len(M), *([] if K is None else [K]), seed=seed)
        parts = torch.split(X, [int(torch.tensor(s).prod()) for s in layout.shapes])
        tensors = [part.reshape([*shape, *X.shape[1:]]) for part, shape in zip(parts, layout.shapes, strict=True)]
        for given_as in (
            tensors,
            dict(zip(("weight", "bias"), tensors)),
            X,
            X.mT.contiguous().mT if X.ndim == 2 else X,
        ):
            Y = A @ given_as
            flat = (
                Y
                if isinstance(Y, Tensor)
                else torch.cat([y.reshape(-1, *X.shape[1:]) for y in (Y.values() if isinstance(Y, dict) else Y)])
            )
            assert_close(flat, M @ X, f"product with {K} columns")
    assert_close(noise(2, len(M)) @ A, noise(2, len(M)) @ M, "columns first")


@given(layouts, kinds, st.sampled_from([0.05, 2.0]), st.integers(0, 99))
def test_dampings(layout: Layout, kinds: str, damping: float, seed: int) -> None:
    """Of the factors, balanced, and of the product."""
    A, M = kronecker_pair(layout, kinds, 0.0, seed)
    left, right = A.left.to_dense(), A.right.to_dense()
    groups, rows, columns = layout.indices().shape

    def of_factors(one: list[float], two: list[float]) -> Tensor:
        pairs = [
            torch.kron(L + a * eye_like(L), R + b * eye_like(R))
            for L, R, a, b in zip(left, right, one, two, strict=True)
        ]
        return torch.linalg.inv(layout.matrix(pairs))

    exact = torch.linalg.inv(M + damping * eye_like(M))
    assert_close(A.inverse(damping).to_dense(), of_factors([damping] * groups, [damping] * groups), "of the factors")
    assert_close(A.inverse(damping, use_exact_damping=True).to_dense(), exact, "exact")
    assert_close(A.damped(damping).inverse().to_dense(), exact, "damped and inverted")
    assert_close(A.damped(damping / 2).inverse(damping / 2).to_dense(), exact, "both")
    pis = [float(((L.trace() / rows) / (R.trace() / columns)).sqrt()) for L, R in zip(left, right, strict=True)]
    for least in (1e-8, 0.3):
        expected = of_factors(
            [max(pi * damping**0.5, least) for pi in pis], [max(damping**0.5 / pi, least) for pi in pis]
        )
        found = A.inverse(damping, use_heuristic_damping=True, min_damping=least)
        assert_close(found.to_dense(), expected, f"heuristic, at least {least}")


@pytest.mark.parametrize("options", [{}, {"use_heuristic_damping": True}, {"use_exact_damping": True}])
def test_a_single_factor_is_damped_exactly(options: dict[str, Any]) -> None:
    L, one, eye = positive(1, 4, 0)[0], torch.ones(1).double(), torch.eye(4, dtype=torch.float64)
    A = Kronecker(L, one, is_positive=True)
    found = A.inverse(0.5, **options)
    assert isinstance(found, Kronecker)
    assert_close(found.to_dense(), torch.linalg.inv(L + 0.5 * eye), "damped once")
    shifted = (2 * A).damped(0.2).inverse(0.3)
    assert_close(shifted.to_dense(), torch.linalg.inv(2 * L + 0.5 * eye), "with a shift")
    A = Kronecker(L, torch.full((1,), 2.0).double())
    twice = torch.linalg.inv((L + 0.5 * eye) * 2.5)
    assert_close(A.inverse(0.5).to_dense(), twice, "another number is a factor")
    assert_close(Kronecker(symmetric(4), one, shift=0.1).inverse(0.2).to_dense(),
                 torch.linalg.inv(symmetric(4) + 0.3 * eye), "indefinite")  # fmt: skip


def test_heuristic_without_a_positive_trace() -> None:
    """The ratio is 1 where it is not defined, group by group."""
    left, right = torch.tensor([[2.0], [0.0]]).double(), torch.tensor([[8.0], [3.0]]).double()
    A = Kronecker(DiagonalFactor(left), DiagonalFactor(right))
    found = A.inverse(0.25, use_heuristic_damping=True)
    expected = [1 / ((2 + 0.25) * (8 + 1.0)), 1 / ((0 + 0.5) * (3 + 0.5))]
    assert_close(found.diagonal(), torch.tensor(expected, dtype=torch.float64), "heuristic")
    only_least = A.inverse(0.0, use_heuristic_damping=True, min_damping=0.5)
    expected = [1 / ((2 + 0.5) * (8 + 0.5)), 1 / (0.5 * 3.5)]
    assert_close(only_least.diagonal(), torch.tensor(expected, dtype=torch.float64), "least damping")


def test_indefinite_products() -> None:
    L, R = symmetric(3, 1), symmetric(4, 2)
    M = torch.kron(L, R)
    A = Kronecker(L, R)
    assert not A.POSITIVE_SEMIDEFINITE
    sign, logabsdet = torch.linalg.slogdet(M)
    assert_close(A.det(), sign * logabsdet.exp(), "det")
    assert_close(A.eigenvalues(), torch.linalg.eigvalsh(M), "eigenvalues")
    for shift in (0.5, -0.5):
        N = M + shift * torch.eye(12)
        assert_close(A.damped(shift).inverse().to_dense(), torch.linalg.inv(N), "inverse", 1e-8)
        assert_close(A.damped(shift).det(), torch.linalg.det(N), "det with a shift")
        assert_close(A.damped(shift).frobenius_norm(), torch.linalg.matrix_norm(N), "norm")
    with pytest.raises(ValueError, match=r"positive semi-definite.*smallest eigenvalue"):
        A.sqrt()
    with pytest.raises(ValueError, match=r"not positive definite.*larger damping"):
        A.inverse()
    both_negative = Kronecker(-positive(1, 3, 0)[0], -positive(1, 4, 1)[0])
    truth = torch.kron(positive(1, 3, 0)[0], positive(1, 4, 1)[0])
    root = both_negative.sqrt()
    assert_close(root.to_dense() @ root.to_dense(), truth, "sqrt of two negative factors")
    assert_close(both_negative.inverse().to_dense(), torch.linalg.inv(truth), "their inverse")


@pytest.mark.parametrize("kinds", ["dd", "id"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_samples(kinds: str, shift: float) -> None:
    A, M = kronecker_pair(LAYOUTS["transposed groups and bias"], kinds, shift)
    check_samples(A, M)
    check_samples(A.inverse(), torch.linalg.inv(M))


# -- construction ------------------------------------------------------------------------------------------------------


def test_default_space_is_flat() -> None:
    L, R = positive(3, 2, 0), positive(3, 4, 1)
    A = Kronecker(L, R)
    assert A.domain == Space.flat(24, torch.float64, CPU)
    M = torch.block_diag(*[torch.kron(one, two) for one, two in zip(L, R, strict=True)])
    check_quantities(A, M)
    arranged = Kronecker(L[0], R[0], arrangement=Arrangement(((2, 4),)))
    assert arranged.domain.shapes == ((2, 4),) and arranged.domain.names is None
    flat = Space.flat(15, torch.float64, CPU)
    layout = LAYOUTS["matrix and bias"]
    A, M = kronecker_pair(layout, space=flat)
    check_quantities(A, M)


@pytest.mark.parametrize(
    ("left", "right", "options", "message"),
    [
        (noise(3, 3), noise(2), {}, "left: expected symmetric"),
        (noise(3), noise(2, 3), {}, "right: expected symmetric"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), {}, "left: 1 of 2 entries are not finite"),
        (torch.ones(2), torch.ones(2).double(), {}, "one number of groups, dtype and device"),
        (torch.ones(2, 2, 2), torch.ones(2), {}, "one number of groups"),
        (torch.ones(2).long(), torch.ones(2), {}, "real numbers"),
        (torch.ones(2), torch.ones(2, 1, 1, 1), {}, "real numbers"),
        (torch.ones(2), torch.ones(2), {"shift": float("inf")}, "shift"),
        (torch.ones(2), torch.ones(2), {"arrangement": Arrangement(((3, 2),))}, "arrangement: expected matrices"),
        (torch.ones(2), torch.ones(2), {"space": Space(((3, 2),), torch.float32, CPU)}, "space: expected tensors"),
        (torch.ones(2), torch.ones(2), {"space": Space.flat(4, torch.float64, CPU)}, "does not go with"),
    ],
)
def test_what_does_not_fit_is_refused(left: Tensor, right: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kronecker(left, right, **options)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="left: expected a tensor"):
        Kronecker([1.0], torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Did you mean 'shift'"):
        Kronecker(torch.ones(1), torch.ones(1), shfit=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"\[G, n, n\]"):
        DenseFactor(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[G, n\]"):
        DiagonalFactor(torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("shapes", "groups", "transposed", "message"),
    [
        (((3, 2), (2,)), 1, False, r"shape \[3\], got \[2\]"),
        (((3, 2), (3,)), 1, True, r"transposed.*shape \[2\], got \[3\]"),
        (((3, 2),), 2, False, "2 groups do not divide"),
        (((3, 2),), 0, False, "0 groups"),
        ((), 1, False, "a weight"),
        (((3,), (3,), (3,)), 1, False, "a weight"),
    ],
)
def test_arrangements_that_do_not_fit(shapes: Any, groups: int, transposed: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrangement(shapes, groups, transposed)


def test_arranging_one_tensor_copies_nothing() -> None:
    for name in ("matrix", "groups", "transposed", "vector", "number"):
        arrangement = LAYOUTS[name].arrangement
        shape = arrangement.shapes[0]
        x = noise(*shape, 1)
        Y = arrangement.gather([x])
        assert Y.shape == (1, *arrangement.matrix_shape) and Y.data_ptr() == x.data_ptr()
        (back,) = arrangement.scatter(Y)
        assert torch.equal(back, x) and back.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping: expected a finite number of at least 0, got -1"),
        ({"damping": float("nan")}, "damping: expected a finite"),
        ({"damping": float("inf")}, "damping: expected a finite"),
        ({"min_damping": -1e-3}, "min_damping"),
        ({"use_heuristic_damping": True, "use_exact_damping": True}, "exclude each other"),
    ],
)
def test_inverse_options_out_of_range(options: dict[str, Any], message: str) -> None:
    A, _ = kronecker_pair(PLAIN)
    with pytest.raises(ValueError, match=message):
        A.inverse(**options)


def test_heuristic_with_a_shift_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use_heuristic_damping.*multiple of the identity"):
        kronecker_pair(PLAIN, shift=0.1)[0].inverse(0.1, use_heuristic_damping=True)
    with pytest.raises(ValueError, match="finite"):
        kronecker_pair(PLAIN)[0].damped(float("nan"))


@pytest.mark.parametrize("kinds", ["dd", "di", "id", "ii"])
def test_singular_products(kinds: str) -> None:
    v = torch.tensor([1.0, 0.0]).double()
    A = Kronecker(*[torch.diag(v) if kind == "d" else v for kind in kinds], is_positive=True)
    for options in ({}, {"use_exact_damping": True}):
        with pytest.raises(ValueError, match=r"[Ss]ingular|inverse does not exist"):
            A.inverse(**options)
        assert torch.isfinite(A.inverse(1e-6, **options).to_dense()).all()
    with pytest.raises(ValueError, match="inverse does not exist"):
        A.damped(-1.0).inverse()
    with pytest.raises(ValueError, match="not positive"):
        A.logdet()
    assert A.det().item() == 0.0
    root = A.sqrt().to_dense()
    assert_close(root @ root, A.to_dense(), "sqrt of a singular matrix")


def test_exact_damping_of_what_rounding_made_negative() -> None:
    """A positive semi-definite product of low rank, in float32, with a damping far below its rounding."""
    N = noise(20, 3, dtype=torch.float32)
    A = Kronecker(1e3 * N @ N.T, N @ N.T, is_positive=True)
    inverse = A.inverse(1e-4, use_exact_damping=True)
    assert inverse.eigenvalues().min() > 0 and inverse.POSITIVE_SEMIDEFINITE
    assert inverse.eigenvalues().max().item() == pytest.approx(1e4)
    assert A.eigenvalues().min() == 0.0


def test_determinants_beyond_the_range() -> None:
    A = Kronecker(1e-3 * torch.eye(100), 1e-3 * torch.eye(100))
    assert A.logdet().item() == pytest.approx(10_000 * -13.815511, rel=1e-5)
    assert A.det().item() == 0.0
    assert (1e9 * A).det().item() == float("inf")
    assert (1e9 * A).damped(0.5).logdet().item() == pytest.approx(10_000 * 6.9082551, rel=1e-5)


# -- algebra -----------------------------------------------------------------------------------------------------------


def test_closed_sums() -> None:
    layout = LAYOUTS["groups and bias"]
    shape = layout.indices().shape
    L, L2, R, R2 = positive(3, shape[1], 0), positive(3, shape[1], 1), positive(3, shape[2], 2), positive(3, 3, 3)
    A, M = kronecker_pair(layout, "dd", 0.5, factors=(L, R))
    same_left, N = kronecker_pair(layout, "di", 0.25, factors=(L, R2))
    same_right, O = kronecker_pair(layout, "id", 0.0, factors=(L2, R))  # noqa: E741
    other, Q = kronecker_pair(layout, "dd", 0.0, factors=(L2, R2))
    eye = IdentityLinearOperator(A.domain)
    closed = {
        "same left": (A + same_left, M + N),
        "same right": (A + same_right, M + O),
        "diagonal first": (same_right + A, M + O),
        "twice": (A + A, 2 * M),
        "with the identity": (A + 2 * eye, M + 2 * eye_like(M)),
        "identity first": (3 * eye - A, 3 * eye_like(M) - M),
        "with a flat identity": (A + IdentityLinearOperator([(len(M),)], "cpu", torch.float64), M + eye_like(M)),
        "scaled": (-2 * A / 4, -M / 2),
        "zero": (0 * A, 0 * M),
        "product with the identity": (A @ (3 * eye), 3 * M),
    }
    for what, (found, expected) in closed.items():
        assert isinstance(found, Kronecker), what
        assert found.domain.names == A.domain.names, what
        assert_close(found.to_dense(), expected, what)
    assert (A + same_left).POSITIVE_SEMIDEFINITE and not (3 * eye - A).POSITIVE_SEMIDEFINITE
    lazy = {"sum": (A + other, M + Q, Sum), "product": (A @ other, M @ Q, Chain),
            "diagonal": (A + Diagonal(dict(zip(("weight", "bias"), [noise(6, 2), noise(6)]))),
                         M + torch.diag(torch.cat([noise(6, 2).flatten(), noise(6)])), Sum)}  # fmt: skip
    for what, (found, expected, kind) in lazy.items():
        assert type(found) is kind and not hasattr(found, "inverse"), what
        assert_close(found.to_dense(), expected, what)


def test_products_of_diagonal_factors_are_closed() -> None:
    A, M = kronecker_pair(LAYOUTS["transposed and bias"], "ii", seed=1)
    B, N = kronecker_pair(LAYOUTS["transposed and bias"], "ii", seed=2)
    assert isinstance(A @ B, Kronecker) and (A @ B).POSITIVE_SEMIDEFINITE
    assert_close((A @ B).to_dense(), M @ N, "product")
    assert type(A.damped(1.0) @ B) is Chain
    assert_close((A.damped(1.0) @ B).to_dense(), (M + eye_like(M)) @ N, "product with a shift")


def test_flat_and_arranged_products_add() -> None:
    A, M = kronecker_pair(Layout(((2, 3, 2),), 1, False), seed=1)
    flat = Kronecker(A.left.to_dense(), positive(1, 6, 7))
    for found in (A + flat, flat + A):
        assert isinstance(found, Kronecker) and found.domain == A.domain
        assert_close(found.to_dense(), M + flat.to_dense(), "flat and arranged")
    transposed, N = kronecker_pair(Layout(((6, 2),), 1, True), factors=(A.left.to_dense(), positive(1, 6, 7)))
    flat = Kronecker(A.left.to_dense(), positive(1, 6, 7))
    assert not isinstance(flat + transposed, Kronecker), "its order is another"
    assert_close((flat + transposed).to_dense(), flat.to_dense() + N, "transposed")
    with pytest.raises(ValueError, match="Cannot add"):
        flat + kronecker_pair(PLAIN, seed=1)[0].block("weight") + Kronecker(torch.ones(2), torch.ones(2).float())


@pytest.mark.parametrize("name", ["groups and bias", "transposed groups and bias", "matrix and bias", "matrix"])
def test_blocks_of_weight_and_bias(name: str) -> None:
    layout = LAYOUTS[name]
    A, M = kronecker_pair(layout, "dd", 0.3)
    numel = A.domain.sizes[0]
    assert A.block("*") is A
    weight = A.block("weight")
    assert isinstance(weight, Kronecker) and weight.domain.names == ("weight",)
    assert_close(weight.to_dense(), M[:numel, :numel], "weight")
    if len(layout.shapes) == 2:
        bias = A.block("b*")
        assert isinstance(bias, Kronecker) and bias.domain.names == ("bias",)
        assert_close(bias.to_dense(), M[numel:, numel:], "bias")
        assert_close(bias.inverse().to_dense(), torch.linalg.inv(M[numel:, numel:]), "inverse of the bias")
    with pytest.raises(ValueError, match="No parameter"):
        A.block("other")


def test_blocks_of_a_space_of_other_tensors() -> None:
    """A flat product that adopted a space of tensors which its arrangement does not know."""
    L, R = positive(1, 2, 0)[0], positive(1, 3, 1)[0]
    space = named_space({"a": (4,), "b": (2,)})
    A = Kronecker(L, R) + IdentityLinearOperator(space)
    M = torch.kron(L, R) + torch.eye(6).double()
    assert isinstance(A, Kronecker) and A.domain == space
    assert_close((A @ {"a": torch.ones(4).double(), "b": torch.ones(2).double()})["b"], M.sum(1)[4:], "product")
    assert_close(A.diagonal(), M.diagonal(), "diagonal")
    assert_close(A.inverse().to_dense(), torch.linalg.inv(M), "inverse")
    for name, rows in (("a", slice(0, 4)), ("b", slice(4, 6))):
        assert_close(A.block(name).to_dense(), M[rows, rows], name)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_decompositions_are_kept_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []
    whole = factor_sets.symmetric_eigen

    def counted(matrices: list[Tensor], retry: bool = True) -> list[tuple[Tensor, Tensor]]:
        sizes.append([m.shape[-1] for m in matrices])
        return whole(matrices, retry)

    monkeypatch.setattr(factor_sets, "symmetric_eigen", counted)
    A = kronecker_pair(PLAIN)[0].frozen()
    assert A.frozen() is A
    A.eigenvalues()
    assert sizes == [[3, 4]]
    B = A.damped(0.3)
    for operator in (A, B, -2 * B, A.inverse()):
        operator.eigenvalues()
    B.logdet(), B.inverse(), A.inverse(0.1, use_exact_damping=True), B.sqrt(), A.sqrt().eigenvalues()
    (A.sqrt().damped(1.0)).inverse()
    assert [s for s in sizes if s] == [[3, 4]]


def test_tensors_that_others_hold_are_followed() -> None:
    L, R = positive(1, 2, 0)[0], positive(1, 3, 1)[0]
    A = Kronecker(L, R, shift=0.5)
    frozen, before = A.frozen(), A.to_dense()
    A.eigenvalues(), A.logdet()
    L.mul_(2)
    truth = torch.kron(L, R) + 0.5 * torch.eye(6)
    check_quantities(A, truth)
    assert_close(A.inverse().to_dense(), torch.linalg.inv(truth), "inverse")
    assert_close(frozen.to_dense(), before, "frozen")
    assert not A._holds_values and frozen._holds_values


def test_pickles() -> None:
    A = kronecker_pair(LAYOUTS["groups and bias"], shift=0.2)[0]
    copy = pickle.loads(pickle.dumps(A))
    assert repr(copy) == repr(A) and copy.domain == A.domain and torch.equal(copy.to_dense(), A.to_dense())
    assert "factors of 2 and 3, 3 groups, shift=0.2" in repr(A)


def test_results_do_not_share_memory() -> None:
    A, M = kronecker_pair(PLAIN, "ii")
    for result in (A.to_dense(), A.diagonal(), A.eigenvalues(), A @ torch.ones(12).double(), A.left.diagonal()):
        result.fill_(7.0)
    assert_close(A.to_dense(), M, "untouched")
    x = noise(12)
    before = x.clone()
    A.damped(2.0) @ x
    assert torch.equal(x, before)


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_low_precision(dtype: torch.dtype, rtol: float, shift: float) -> None:
    layout = LAYOUTS["groups and bias"]
    L, R = (positive(3, n, n).to(dtype) for n in (2, 3))
    A = Kronecker(L, R, arrangement=layout.arrangement, space=layout.space(dtype), shift=shift)
    eye = torch.eye(6).double()
    M = layout.matrix([torch.kron(x, y) + shift * eye for x, y in zip(L.double(), R.double(), strict=True)])
    x = noise(18, 2, dtype=dtype)
    inverse = A.inverse()
    assert A.dtype == dtype and (A @ x).dtype == dtype and inverse.dtype == dtype

    def close(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))

    close(A @ x, M @ x.double())
    close(inverse @ x, torch.linalg.solve(M, x.double()))
    close(inverse.inverse() @ x, M @ x.double())
    close(A.trace(), M.trace())
    close(A.logdet(), M.logdet())
    close(A.frobenius_norm(), torch.linalg.matrix_norm(M))
    close(A.diagonal(), M.diagonal())
    close(A.eigenvalues(), torch.linalg.eigvalsh(M))
    close(A.sqrt() @ (A.sqrt() @ x), M @ x.double())
    assert A.sample(3).dtype == dtype


def test_factors_finer_than_the_space() -> None:
    space = Space.flat(6, torch.bfloat16, CPU)
    L, R = positive(1, 2, 0)[0].float(), positive(1, 3, 1)[0].float()
    A = Kronecker(DenseFactor(L), DenseFactor(R), space=space)
    x = noise(6, dtype=torch.bfloat16)
    exact = torch.kron(L, R).double() @ x.double()
    assert torch.equal(A @ x, exact.to(torch.bfloat16))


# -- factors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DenseFactor, DiagonalFactor])
def test_factors(kind: type[Factor]) -> None:
    dense = positive(3, 4, 0)
    dense = dense if kind is DenseFactor else torch.diag_embed(dense.diagonal(dim1=1, dim2=2))
    F: Factor = DenseFactor(dense) if kind is DenseFactor else DiagonalFactor(dense.diagonal(dim1=1, dim2=2))
    assert (F.num_groups, F.size, F.dtype, F.device) == (3, 4, torch.float64, CPU)
    for K in (1, 2):
        X = noise(K, 3, 4, 5)
        assert_close(F.times(X), dense @ X, "times")
        assert_close(F.times_from_right(X.mT.contiguous()), X.mT @ dense, "times from the right")
    assert_close(F.trace(), dense.diagonal(dim1=1, dim2=2).sum(-1), "trace")
    assert_close(F.diagonal(), dense.diagonal(dim1=1, dim2=2), "diagonal")
    assert_close(F.squared_norm(), dense.square().sum((1, 2)), "squared norm")
    assert_close(F.slogdet()[1], torch.logdet(dense), "slogdet")
    assert_close(F.inverse().to_dense(), torch.linalg.inv(dense), "inverse")
    delta = torch.tensor([0.1, 0.2, 0.3]).double()
    eye = torch.eye(4, dtype=torch.float64)
    assert_close(F.damped(delta).to_dense(), dense + delta.reshape(3, 1, 1) * eye, "damped by group")
    other = DenseFactor(positive(3, 4, 9))
    assert_close(F.plus(other).to_dense(), dense + other.to_dense(), "plus")
    assert_close(other.plus(F).to_dense(), dense + other.to_dense(), "plus")
    assert_close(F.plus(F).to_dense(), 2 * dense, "plus itself")
    values, basis = F.eigh()
    Q = eye.expand(3, 4, 4) if basis is None else basis
    assert_close(Q * values.unsqueeze(-2) @ Q.mT, dense, "eigh")
    assert F.is_same(F.frozen()) and not F.is_same(F.scaled(2.0)) and not F.is_same(F.part(0, 3))
    assert_close(F.part(1, 3).to_dense(), dense[:, 1:3, 1:3], "part")
    kept = F.frozen()
    kept.eigh()
    for changed, truth in ((kept.scaled(-2.0), -2 * dense), (kept.damped(delta), dense + delta.reshape(3, 1, 1) * eye)):
        values, basis = changed.eigh()
        Q = eye.expand(3, 4, 4) if basis is None else basis
        assert_close(Q * values.unsqueeze(-2) @ Q.mT, truth, "kept eigenvalues")
    assert_close(kept.inverse().slogdet()[1], -torch.logdet(dense), "kept eigenvalues of the inverse")


def test_other_operators_go_along() -> None:
    A, M = kronecker_pair(PLAIN)
    T, N = TensorLinearOperator(symmetric(12)), symmetric(12)
    assert_close((A + T).to_dense(), M + N, "dense")
    assert_close((T @ A).to_dense(), N @ M, "dense product")
    assert_close((A @ flat_operator(N)).to_dense(), M @ N, "lazy product")
    assert isinstance(A.damped(1.0).inverse(), EigenDecomposed)
