"""Random trees of the algebra equal the same arithmetic on dense matrices; symmetry is known where it is promised."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curvlinops.examples
from curvlinops import (
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    IdentityLinearOperator,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
)
from tests.operators.operator_pairs import (
    CPU,
    SHAPES,
    SIZES,
    MatrixOperator,
    Pair,
    expressions,
    flat_operator,
    named_space,
    noise,
    symmetric,
)

SPACES = sorted(SIZES)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, wanted {list(expected.shape)}"
    error, size = (actual - expected).norm().item(), expected.norm().item()
    assert error <= 1e-9 * size + 1e-9, f"{what}: error {error:.1e} against a norm of {size:.1e}"


def check(pair: Pair) -> None:
    """The operator, its adjoint, and its products from both sides are those of the matrix; its flags are true."""
    A, M, text = pair.operator, pair.matrix, pair.text
    assert A.shape == tuple(M.shape)
    v, W = noise(M.shape[1], seed=50), noise(2, M.shape[0], seed=51)
    assert_close(A.to_dense(), M, text)
    assert_close(A @ v, M @ v, f"{text} @ v")
    assert_close(W @ A, W @ M, f"W @ {text}")
    assert_close(A.H.to_dense(), M.T, f"{text}.H")
    assert_close(A.frozen().linearize().to_dense(), M, f"{text}.frozen().linearize()")
    if A.SELF_ADJOINT:
        assert_close(M, M.T, f"{text} says that it is self-adjoint")
    if A.POSITIVE_SEMIDEFINITE:
        assert A.SELF_ADJOINT, text
        smallest = torch.linalg.eigvalsh((M + M.T) / 2).min()
        assert smallest >= -1e-9 * (1 + M.norm()), f"{text} says that it is positive semi-definite"


def check_closed_forms(pair: Pair) -> None:
    """What a square operator says of itself, as far as it has closed forms, is true of the matrix."""
    A, M, text = pair.operator, pair.matrix, pair.text
    truths = {"diagonal": torch.diagonal, "trace": torch.trace, "frobenius_norm": torch.linalg.matrix_norm}
    for name, truth in truths.items():
        if hasattr(A, name):
            assert_close(getattr(A, name)(), truth(M), f"{text}.{name}()")
    if A.SELF_ADJOINT and torch.linalg.cond(M) < 1e4:
        B = noise(len(M), 2, seed=52)
        if hasattr(A, "inverse"):
            assert_close(A.inverse(damping=0.0) @ B, torch.linalg.solve(M, B), f"{text}.inverse()")
        if hasattr(A, "_slogdet"):
            sign, logabsdet = A._slogdet()
            expected = torch.linalg.slogdet(M)
            assert sign == expected.sign, f"{text}: sign of the determinant"
            assert_close(logabsdet, expected.logabsdet, f"{text}: logarithm of the determinant")
    if A.POSITIVE_SEMIDEFINITE and hasattr(A, "sqrt"):
        root = A.sqrt().to_dense()
        assert_close(root @ root, M, f"{text}.sqrt()")


@settings(max_examples=120)
@given(st.sampled_from(SPACES), st.data())
def test_closed_forms_of_expressions(space: str, data: st.DataObject) -> None:
    check_closed_forms(data.draw(expressions(space, space, depth=2)))


@settings(max_examples=160)
@given(st.data())
def test_expressions_equal_dense_arithmetic(data: st.DataObject) -> None:
    rows, columns = data.draw(st.sampled_from(SPACES)), data.draw(st.sampled_from(SPACES))
    check(data.draw(expressions(rows, columns)))


@settings(max_examples=40)
@given(expressions("params", "params", depth=2), st.sampled_from([None, 1, 3]))
def test_expressions_take_lists_in_their_own_shapes(pair: Pair, K: int | None) -> None:
    A, last = pair.operator, [] if K is None else [K]
    V = noise(5, *last, seed=60)
    parts = [p.reshape(*shape, *last) for p, shape in zip(V.split(A.domain.sizes), A.domain.shapes, strict=True)]
    answer = A @ parts
    assert isinstance(answer, list)
    assert [tuple(a.shape) for a in answer] == [(*shape, *last) for shape in A.codomain.shapes]
    assert_close(torch.cat([a.reshape(-1, *last) for a in answer]), pair.matrix @ V, pair.text)


def test_products_of_closed_forms_with_rectangles_are_chains() -> None:
    """A closed product asks about the spaces only where both are square."""
    square = symmetric(5, 1)
    spaces = named_space(SHAPES), Space.flat(3, torch.float64, CPU)
    tall = MatrixOperator(noise(5, 3, seed=2), spaces[1], spaces[0])
    wide = MatrixOperator(noise(3, 5, seed=3), *spaces)
    number = torch.ones(1, dtype=torch.float64)
    closed: list[LinearOperator] = [
        Kronecker(square, number),
        EigenDecomposed(noise(5, 1), torch.linalg.qr(square).Q.contiguous()),
        Diagonal(noise(5)),
        LowRankLinearOperator(TensorLinearOperator(square)),
        BlockDiagonal([TensorLinearOperator(square[:4, :4]), Diagonal(noise(1))], space=spaces[0]),
    ]
    for A in closed:
        assert_close((A @ tall).to_dense(), A.to_dense() @ tall.matrix, f"{A!r} @ tall")
        assert_close((wide @ A).to_dense(), wide.matrix @ A.to_dense(), f"wide @ {A!r}")
        twice = (2 * IdentityLinearOperator(spaces[0])) @ A
        assert_close(twice.to_dense(), 2 * A.to_dense(), f"2 I @ {A!r}")


# -- flags -------------------------------------------------------------------------------------------------------------


def curvature(seed: int = 0, is_positive: bool = False) -> MatrixOperator:
    """A self-adjoint operator on the named space, declared positive semi-definite on demand."""
    factor = noise(5, 5, seed=seed)
    M = factor @ factor.T if is_positive else symmetric(5, seed)
    A = MatrixOperator((M + M.T) / 2, *[named_space(SHAPES)] * 2, is_self_adjoint=True)
    A.POSITIVE_SEMIDEFINITE = is_positive
    return A


def jacobian(seed: int = 0) -> MatrixOperator:
    """An operator from the named space to flat outputs."""
    return MatrixOperator(noise(3, 5, seed=seed), named_space(SHAPES), Space.flat(3, torch.float64, CPU))


def flags(A: LinearOperator) -> tuple[bool, bool]:
    return A.SELF_ADJOINT, A.POSITIVE_SEMIDEFINITE


def test_sums_and_scalings_pass_flags_on() -> None:
    S, P, Q = curvature(1), curvature(2, is_positive=True), curvature(3, is_positive=True)
    general = MatrixOperator(noise(5, 5), *[named_space(SHAPES)] * 2)
    assert flags(P + Q) == flags(2.0 * P) == flags(P / 3) == flags(sum([P, Q, P])) == (True, True)
    assert flags(P.damped(0.1)) == flags((P + Q).damped(0.0)) == flags(0.0 * P) == (True, True)
    assert flags(P - (-Q)) == (True, True)
    assert flags(P - Q) == flags(-P) == flags(P.damped(-1.0)) == flags(P + S) == flags(-2 * (P + Q)) == (True, False)
    assert flags(P + general) == flags(2.0 * general) == (False, False)
    assert flags(IdentityLinearOperator([(3,)], "cpu", torch.float64)) == (True, True)


def test_congruences_are_recognised() -> None:
    J, S, P = jacobian(), flat_operator(symmetric(3, 1), is_self_adjoint=True), flat_operator(torch.eye(3).double())
    P.SELF_ADJOINT = P.POSITIVE_SEMIDEFINITE = True
    assert flags(J.T @ J) == flags(J @ J.T) == flags(J.T @ P @ J) == (True, True)
    assert flags(J.T @ S @ J) == flags(3 * (J.T @ S @ J)) == (True, False)
    assert flags(J.T @ jacobian(1)) == (False, False)
    A = curvature(4)
    assert flags(A @ A) == (True, True)
    assert flags(A @ A @ A) == (True, False)
    assert flags(A @ curvature(5)) == (False, False)
    assert flags((J.T @ J).linearize()) == flags((J.T @ P @ J).frozen()) == (True, True)


def test_congruence_with_a_chain_is_recognised() -> None:
    J = flat_operator(noise(2, 3, seed=1)) @ jacobian()
    P = flat_operator(torch.eye(2).double(), is_self_adjoint=True)
    assert flags(J.T @ J) == (True, True)
    assert flags(J.T @ P @ J) == (True, False)
    assert (J.T @ P @ J).H is not None


def test_congruence_with_blocks_is_recognised() -> None:
    w, b = named_space({"w": (2, 2)}), named_space({"b": (1,)})
    B = BlockDiagonal([MatrixOperator(noise(4, 4), w, w), MatrixOperator(noise(1, 1), b, b)])
    assert flags(B.T @ B) == (True, True)
    assert flags(B.T @ curvature(6, is_positive=True) @ B) == (True, True)


def test_sums_do_not_write_to_what_their_terms_return() -> None:
    class Same(MatrixOperator):
        """The identity, which hands back the tensors that it was given."""

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return X

    A, v = Same(torch.eye(3).double(), *[Space.flat(3, torch.float64, CPU)] * 2, True), noise(3)
    before = v.clone()
    torch.testing.assert_close((A + A) @ v, 2 * before)
    torch.testing.assert_close(sum([A, A, A]) @ v, 3 * before)  # type: ignore[operator]
    assert torch.equal(v, before)


def test_adjoints_undo_themselves() -> None:
    J, A = jacobian(), curvature()
    assert J.H.H is J
    assert J.T.shape == (5, 3)
    assert A.H is A and A.T is A and A.adjoint() is A
    assert (A + A).H.SELF_ADJOINT


# -- closed forms ------------------------------------------------------------------------------------------------------


def diagonal(seed: int, named: bool = True) -> Diagonal:
    entries = noise(5, seed=seed).abs() + 0.1
    tensors = [entries[:4].reshape(2, 2), entries[4:]]
    return Diagonal(dict(zip(SHAPES, tensors, strict=True)) if named else tensors)


def test_diagonals_are_closed() -> None:
    A, B, C = diagonal(1), diagonal(2), diagonal(3, named=False)
    a, b, c = (D.diagonal() for D in (A, B, C))
    eye = IdentityLinearOperator(list(SHAPES.values()), "cpu", torch.float64)
    cases: dict[str, tuple[LinearOperator, Tensor]] = {
        "sum of three": (sum([A, B, C]), a + b + c),
        "difference": (A - B, a - b),
        "scaled": (2 * A / 4, a / 2),
        "negated": (-A, -a),
        "product": (A @ B @ C, a * b * c),
        "with the identity": (A + eye, a + 1),
        "identity first": (eye + A, a + 1),
        "damped": (A.damped(0.5), a + 0.5),
        "adjoint": (A.H, a),
        "of one flat term": (A + Diagonal(b), a + b),
        "flat term first": (Diagonal(b) @ A, a * b),
        "two identities": (2 * eye - eye / 2, torch.full((5,), 1.5, dtype=torch.float64)),
    }
    for name, (operator, entries) in cases.items():
        assert isinstance(operator, Diagonal), name
        assert_close(operator.diagonal(), entries, name)
        assert_close(operator.inverse(damping=3.0).diagonal(), 1 / (entries + 3.0), name)
        if name != "two identities":
            assert operator.domain.names == tuple(SHAPES), name


def test_dense_operators_are_closed() -> None:
    M, N, d = noise(3, 3, seed=1), noise(3, 3, seed=2), noise(3, seed=3)
    A, B, D = TensorLinearOperator(M), TensorLinearOperator(N), Diagonal(d)
    eye = torch.eye(3, dtype=torch.float64)
    cases: dict[str, tuple[LinearOperator, Tensor]] = {
        "sum": (A + B, M + N),
        "difference": (A - B, M - N),
        "scaled": (-2 * A, -2 * M),
        "product": (A @ B, M @ N),
        "with a diagonal": (A + D, M + torch.diag(d)),
        "diagonal first": (D - A, torch.diag(d) - M),
        "damped": (A.damped(2.0), M + 2 * eye),
        "sum of three": (sum([A, B, D]), M + N + torch.diag(d)),
    }
    for name, (operator, matrix) in cases.items():
        assert isinstance(operator, TensorLinearOperator), name
        assert_close(operator.inverse(damping=10.0).to_dense(), torch.linalg.inv(matrix + 10 * eye), name)
        assert_close(operator.trace(), matrix.trace(), name)


def test_equal_blocks_are_closed() -> None:
    matrices = [[noise(2, 2, seed=s), noise(1, 1, seed=s + 1)] for s in (1, 5)]
    A, B = (BlockDiagonal([TensorLinearOperator(m) for m in ms]) for ms in matrices)
    M, N = (torch.block_diag(*ms) for ms in matrices)
    entries = noise(3, seed=9)
    D, E = Diagonal([entries[:2], entries[2:]]), torch.diag(entries)
    eye = torch.eye(3, dtype=torch.float64)
    cases: dict[str, tuple[LinearOperator, Tensor]] = {
        "sum": (A + B, M + N),
        "difference": (A - B, M - N),
        "scaled": (3 * A, 3 * M),
        "product": (A @ B, M @ N),
        "damped": (A.damped(1.5), M + 1.5 * eye),
        "with a diagonal": (A + D, M + E),
        "diagonal first": (D + A, M + E),
        "with a flat diagonal": (A + Diagonal(entries), M + E),
        "times a diagonal": (A @ D, M @ E),
        "diagonal times": (D @ A, E @ M),
        "adjoint": (A.H, M.T),
    }
    for name, (operator, matrix) in cases.items():
        assert isinstance(operator, BlockDiagonal), name
        assert_close(operator.to_dense(), matrix, name)
    for name in ("sum", "difference", "scaled", "product", "damped", "with a diagonal"):
        operator, matrix = cases[name]
        assert_close(operator.inverse(damping=10.0).to_dense(), torch.linalg.inv(matrix + 10 * eye), name)  # type: ignore[attr-defined]


def test_block_cut_otherwise_than_a_diagonal() -> None:
    """One block over a flat space of three, beside diagonals that cut these three in their own ways."""
    M = noise(3, 3)
    for shapes in ([(1,), (2,)], [(2,), (1,)], [(3, 1)], [(1,), (1,), (1,)]):
        entries = [torch.full(shape, float(i + 2), dtype=torch.float64) for i, shape in enumerate(shapes)]
        D = Diagonal(entries)
        E = torch.diag(torch.cat([e.flatten() for e in entries]))
        A = BlockDiagonal([TensorLinearOperator(M)])
        assert_close((A + D).to_dense(), M + E, f"{shapes}: sum")
        assert_close((D - A).to_dense(), E - M, f"{shapes}: difference")
        assert_close((A @ D).to_dense(), M @ E, f"{shapes}: product")
        assert_close((D @ A).to_dense(), E @ M, f"{shapes}: product from the left")


def test_nameless_blocks_adopt_the_names_of_a_diagonal() -> None:
    A, D = BlockDiagonal([TensorLinearOperator(noise(2, 2)), TensorLinearOperator(noise(1, 1))]), noise(3)
    named = Diagonal({"w": D[:2], "b": D[2:]})
    question = {"w": torch.ones(2).double(), "b": torch.ones(1).double()}
    for combined in (A + named, named + A, A - named, A @ named):
        assert combined.domain.names == combined.codomain.names == ("w", "b")
        assert list(combined @ question) == ["w", "b"]


def test_flat_spaces_adopt_structure() -> None:
    S, J = curvature(), jacobian()
    for A in (S + TensorLinearOperator(noise(5, 5)), TensorLinearOperator(noise(5, 5)) + S, S.damped(1.0)):
        assert A.domain == A.codomain == S.domain
        answer = A @ {"b": torch.ones(1).double(), "w": torch.ones(2, 2).double()}
        assert list(answer) == ["w", "b"] and answer["w"].shape == (2, 2)
    both = J + TensorLinearOperator(noise(3, 5))
    assert both.domain == J.domain and both.codomain == J.codomain
    chained = J.T @ TensorLinearOperator(noise(3, 3)) @ J
    assert chained.domain == chained.codomain == J.domain


def test_sum_keeps_the_format_of_its_terms_when_sizes_coincide() -> None:
    """Five parameters and five outputs are still two spaces: J + J answers as J does."""
    J = MatrixOperator(noise(5, 5), named_space(SHAPES), Space.flat(5, torch.float64, CPU))
    V = [torch.ones(2, 2).double(), torch.ones(1).double()]
    assert [a.shape for a in (J + J) @ V] == [a.shape for a in J @ V]


def test_identity_of_curvlinops_is_that_of_examples() -> None:
    assert curvlinops.examples.IdentityLinearOperator is curvlinops.IdentityLinearOperator
    assert curvlinops.examples.TensorLinearOperator is curvlinops.TensorLinearOperator


def test_diagonal_and_trace_of_a_lazy_sum() -> None:
    """They are the sums of those of its terms, where all have one."""
    factors = [torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)]
    A, B = Kronecker(*factors), Kronecker(factors[1], factors[0] @ factors[0])
    total = A + B
    assert not hasattr(total, "inverse")
    flat = A + TensorLinearOperator(factors[0].kron(factors[1]))
    for lazy in (2.0 * (flat + B), -1.0 * flat):
        torch.testing.assert_close(lazy.diagonal(), lazy.to_dense().diagonal())
        torch.testing.assert_close(lazy.trace(), lazy.to_dense().trace())
    torch.testing.assert_close(total.diagonal(), total.to_dense().diagonal())
    torch.testing.assert_close(total.trace(), total.to_dense().trace())
    assert not hasattr(A + A @ B @ A, "trace")
