"""Low-rank matrices: every quantity against the same one of the dense matrix in float64, and what is shared or kept."""

import math
import pickle
from typing import Any

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
    LowRankLinearOperator,
    Space,
    TensorLinearOperator,
)
from curvlinops.operators import base
from curvlinops.operators.algebra import Chain, Reshaped, Scaled, Sum
from curvlinops.operators.gram import cross_gram, gram, row_squares
from curvlinops.operators.stack import HStack
from tests.operators.operator_pairs import CPU, SHAPES, MatrixOperator, named_space, noise

D = 5
EYE = torch.eye(D, dtype=torch.float64)


def columns(matrix: Tensor, shapes: dict[str, tuple[int, ...]] | None = SHAPES) -> MatrixOperator:
    """Columns that are known by products only and count them."""
    flat = Space.flat(matrix.shape[1], matrix.dtype, CPU)
    space = Space.flat(len(matrix), matrix.dtype, CPU) if shapes is None else named_space(shapes, matrix.dtype)
    return MatrixOperator(matrix, flat, space)


def assert_close(actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=rtol, msg=lambda m: f"{what}: {m}")


SIGNS = {
    "positive": lambda s: s.abs() + 0.1,
    "some zero": lambda s: torch.where(torch.arange(len(s)) % 2 == 0, s.abs(), 0.0),
    "negative": lambda s: -s.abs() - 0.1,
    "negative and zero": lambda s: torch.where(torch.arange(len(s)) % 2 == 0, -s.abs(), 0.0),
    "both": lambda s: s,
    "all zero": lambda s: 0 * s,
}


@st.composite
def low_ranks(draw: st.DrawFn) -> tuple[LowRankLinearOperator, Tensor]:
    """Fewer, as many and more columns than dimensions; independent, dependent or none; weights of all signs."""
    R, seed, c = draw(st.integers(0, 8)), draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.7, 6.0, -0.3]))
    U, s = noise(D, R, seed=seed), SIGNS[draw(st.sampled_from(sorted(SIGNS)))](noise(R, seed=seed + 1))
    if R > 1 and draw(st.booleans()):
        U = U[:, torch.arange(R) // 2]
    M = U * s @ U.T + c * EYE
    kind = draw(st.sampled_from(["dense", "products", "stack", "chain", "scaled"]))
    T = noise(R, R, seed=seed + 2) + 3 * torch.eye(R, dtype=torch.float64)
    made: dict[str, LinearOperator] = {
        "dense": TensorLinearOperator(U),
        "products": columns(U),
        "stack": HStack([columns(U[:, : R // 2]), TensorLinearOperator(U[:, R // 2 :])]),
        "chain": Chain([columns(U @ torch.linalg.inv(T)), TensorLinearOperator(T)]),
        "scaled": Scaled(columns(U / 3), 3.0),
    }
    return LowRankLinearOperator(made[kind], s, c), M


@given(low_ranks(), st.sampled_from([0.4, 12.0]))
def test_quantities_equal_those_of_the_matrix(pair: tuple[LowRankLinearOperator, Tensor], damping: float) -> None:
    A, M = pair
    assert_close(A.to_dense(), M, "to_dense")
    assert_close(A.diagonal(), M.diagonal(), "diagonal")
    assert_close(A.trace(), M.trace(), "trace")
    assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(M), "frobenius_norm")
    values = torch.cat([A.eigenvalues(), torch.full([D - len(A.eigenvalues())], A.c, dtype=torch.float64)])
    assert_close(values.sort().values, torch.linalg.eigvalsh(M), "eigenvalues")
    assert len(A.eigenvalues()) == min(A.U.shape)
    damped = M + damping * EYE
    inverse = A.inverse(damping=damping)
    check_inverse(inverse, damped)
    assert_close(inverse.inverse().to_dense(), damped, "inverse of the inverse")
    assert_close(A.damped(damping).inverse().to_dense(), inverse.to_dense(), "damped and inverted")
    if torch.linalg.det(damped) > 0:
        assert_close(A.damped(damping).logdet(), torch.logdet(damped), "logdet")
    if A.POSITIVE_SEMIDEFINITE:
        assert torch.linalg.eigvalsh(M).min() > -1e-9
    if A.c >= 0 and torch.linalg.eigvalsh(M).min() > 1e-9:
        root = A.sqrt()
        assert root.POSITIVE_SEMIDEFINITE
        assert_close(root.to_dense() @ root.to_dense(), M, "sqrt")


def check_inverse(inverse: LowRankLinearOperator, M: Tensor) -> None:
    """The inverse of a matrix has all closed forms of its own."""
    truth = torch.linalg.inv(M)
    assert_close(inverse.to_dense(), truth, "inverse")
    assert_close(inverse.diagonal(), truth.diagonal(), "diagonal of the inverse")
    assert_close(inverse.trace(), truth.trace(), "trace of the inverse")
    assert_close(inverse.frobenius_norm(), torch.linalg.matrix_norm(truth), "norm of the inverse")
    assert_close((-0.5 * inverse).to_dense(), -0.5 * truth, "multiple of the inverse")
    assert_close((2 * inverse).inverse().to_dense(), M / 2, "inverse of a multiple of the inverse")
    assert_close((0 * inverse).to_dense(), 0 * truth, "zero")
    values = torch.cat(
        [inverse.eigenvalues(), inverse.eigenvalues().new_full([D - len(inverse.eigenvalues())], inverse.c)]
    )
    assert_close(values.sort().values, torch.linalg.eigvalsh(truth), "eigenvalues of the inverse")
    if torch.linalg.eigvalsh(truth).min() > 0:
        root = inverse.sqrt().to_dense()
        assert_close(root @ root, truth, "sqrt of the inverse")
        assert_close(inverse.inverse(2.0).to_dense(), torch.linalg.inv(truth + 2 * EYE), "inverse, damped and inverted")
        assert_close(inverse.logdet(), torch.logdet(truth), "logdet of the inverse")


def test_full_rank_needs_no_damping() -> None:
    U = noise(D, 7, seed=1)
    for s in (torch.ones(7).double(), noise(7, seed=2)):
        M = U * s @ U.T
        A = LowRankLinearOperator(columns(U), s)
        assert_close(A.inverse().to_dense(), torch.linalg.inv(M), "inverse")
        if torch.linalg.det(M) > 0:
            assert_close(A.inverse().logdet(), -torch.logdet(M), "logdet")


# -- algebra -----------------------------------------------------------------------------------------------------------


def test_closed_sums() -> None:
    U, V = noise(D, 2, seed=1), noise(D, 3, seed=2)
    s, t = noise(2, seed=3), noise(3, seed=4)
    A = LowRankLinearOperator(columns(U), s, 0.5)
    B = LowRankLinearOperator(TensorLinearOperator(V), t, 1.0)
    M, N = U * s @ U.T + 0.5 * EYE, V * t @ V.T + EYE
    eye = IdentityLinearOperator(list(SHAPES.values()), "cpu", torch.float64)
    inverse, inverted = A.inverse(9.0), torch.linalg.inv(M + 9 * EYE)
    cases: dict[str, tuple[LinearOperator, Tensor, int]] = {
        "sum": (A + B, M + N, 5),
        "difference": (A - B, M - N, 5),
        "flat term first": (B - A, N - M, 5),
        "with itself": (A + A, 2 * M, 2),
        "sum of three": (sum([A, B, A]), 2 * M + N, 5),
        "taken away again": (A + B - B, M, 5),
        "its inverse": (A + inverse, M + inverted, 2),
        "its inverse and another": (B + inverse + A, M + N + inverted, 5),
        "scaled": (-2 * A / 4, -M / 2, 2),
        "with the identity": (A + 3 * eye, M + 3 * EYE, 2),
        "identity first": (3 * eye - A, 3 * EYE - M, 2),
        "damped": (A.damped(2.0), M + 2 * EYE, 2),
        "times a number": (A @ (3 * eye), 3 * M, 2),
    }
    for name, (operator, matrix, rank) in cases.items():
        assert isinstance(operator, LowRankLinearOperator), name
        assert operator.U.shape[1] == rank, name
        assert operator.domain.names == tuple(SHAPES), name
        assert_close(operator.to_dense(), matrix, name)
        assert_close(operator.inverse(20.0).to_dense(), torch.linalg.inv(matrix + 20 * EYE), name)
        assert_close(operator.diagonal(), matrix.diagonal(), name)
        assert_close(operator.H.to_dense(), matrix, name)


def test_other_sums_and_products_are_lazy() -> None:
    U, entries = noise(D, 2), noise(D, seed=1)
    A = LowRankLinearOperator(columns(U))
    E = Diagonal({"w": entries[:4].reshape(2, 2), "b": entries[4:]})
    general = MatrixOperator(noise(D, D), *[named_space(SHAPES)] * 2)
    for other, matrix in ((E, torch.diag(entries)), (general, noise(D, D)), (TensorLinearOperator(EYE), EYE)):
        for operator, truth in (
            (A + other, U @ U.T + matrix),
            (other - A, matrix - U @ U.T),
            (A @ other, U @ U.T @ matrix),
        ):
            assert not hasattr(operator, "inverse")
            assert_close(operator.to_dense(), truth, type(other).__name__)
    assert isinstance(A + E, Sum) and isinstance(A @ A, Chain)


def test_flags() -> None:
    U = columns(noise(D, 2))
    positive, both = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, -1.0]).double()
    P, S = LowRankLinearOperator(U, positive, 1.0), LowRankLinearOperator(U, both)
    assert all(A.SELF_ADJOINT and A.H is A for A in (P, S, P + S, P.inverse(), P.sqrt()))
    for A in (
        P,
        2 * P,
        P + P,
        P.damped(1.0),
        P.inverse(),
        P.inverse(1.0),
        3 * P.inverse(),
        P.sqrt(),
        P.frozen(),
        S + P - S,
    ):
        assert A.POSITIVE_SEMIDEFINITE
    for A in (S, -P, P - 2 * P, P.damped(-2.0), LowRankLinearOperator(U, positive, -1.0), -P.inverse(), P + S - P):
        assert not A.POSITIVE_SEMIDEFINITE


def test_lists_dicts_and_names() -> None:
    U, v = noise(D, 2), noise(D, seed=7)
    A = LowRankLinearOperator(columns(U), c=1.0)
    for operator, matrix in ((A, U @ U.T + EYE), (A.inverse(0.5), torch.linalg.inv(U @ U.T + 1.5 * EYE))):
        answer = operator @ {"b": v[4:], "w": v[:4].reshape(2, 2)}
        assert list(answer) == ["w", "b"] and answer["w"].shape == (2, 2)
        assert_close(torch.cat([a.flatten() for a in answer.values()]), matrix @ v, "dict")
        answer = operator @ [v[:4].reshape(2, 2), v[4:]]
        assert_close(torch.cat([a.flatten() for a in answer]), matrix @ v, "list")
        assert_close(v @ operator, matrix @ v, "from the left")
    other = LowRankLinearOperator(columns(U, {"w": (2, 2), "c": (1,)}))
    with pytest.raises(ValueError, match=r"spaces differ[\s\S]*w.*b[\s\S]*w.*c"):
        A + other


def test_columns_from_a_structured_space() -> None:
    """As those of a transposed Jacobian, whose domain has the shape of the prediction."""
    U = noise(D, 6)
    transposed = MatrixOperator(U, Space(((3, 2),), torch.float64, CPU), named_space(SHAPES))
    A = LowRankLinearOperator(transposed, noise(6, seed=1), 9.0)
    B = A + LowRankLinearOperator(transposed)
    M = U * noise(6, seed=1) @ U.T + 9 * EYE
    assert_close(A.inverse().to_dense(), torch.linalg.inv(M), "inverse")
    assert_close(B.inverse().to_dense(), torch.linalg.inv(M + U @ U.T), "inverse of a sum")  # type: ignore[attr-defined]
    assert_close(A.diagonal(), M.diagonal(), "diagonal")
    assert A.domain.names == tuple(SHAPES) and A.U.domain.is_flat


def test_block_diagonals_and_pickles() -> None:
    U = noise(D, 2)
    A = LowRankLinearOperator(TensorLinearOperator(U), c=1.0)
    M = U @ U.T + EYE
    B = BlockDiagonal([A, Diagonal(torch.full((2,), 2.0).double())])
    assert_close(B.logdet(), torch.logdet(M) + 2 * math.log(2.0), "logdet")
    assert_close(B.inverse(1.0).diagonal()[:D], torch.linalg.inv(M + EYE).diagonal(), "diagonal of the inverse")
    for operator in (A, A.inverse()):
        copy = pickle.loads(pickle.dumps(operator))
        assert torch.equal(copy.to_dense(), operator.to_dense()) and repr(copy) == repr(operator)
    assert "rank at most 2" in repr(A) and "c=1" in repr(A)


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_the_gram_matrix_is_computed_once() -> None:
    U, V = columns(noise(D, 3, seed=1)), columns(noise(D, 2, seed=2))
    A, B = LowRankLinearOperator(U, noise(3), 1.0), LowRankLinearOperator(V)

    def use(*operators: LowRankLinearOperator) -> None:
        for operator in operators:
            for damping in (10.0, 20.0):
                operator.inverse(damping), operator.damped(damping).logdet(), operator.damped(damping).sqrt()
            operator.eigenvalues(), operator.trace(), operator.frobenius_norm()

    use(A)
    first = U.num_products
    assert first <= 2
    use(A, 2 * A, A.damped(1.0), A - A.inverse(10.0), LowRankLinearOperator(U), A.frozen(), A.linearize())
    assert U.num_products == first
    use(A + B)
    first = U.num_products, V.num_products
    use(A + B, A - 3 * B, B + A.damped(1.0), A + B - A)  # type: ignore[arg-type]
    assert (U.num_products, V.num_products) == first


def test_values_that_change_are_not_kept() -> None:
    class Live(MatrixOperator):
        """Columns that change with a tensor, as those of a model with its parameters."""

        def frozen(self) -> MatrixOperator:
            return columns(self.matrix.clone())

    U = noise(D, 2)
    live = Live(U, Space.flat(2, torch.float64, CPU), named_space(SHAPES))
    for A in (LowRankLinearOperator(live, c=1.0), LowRankLinearOperator(HStack([live, TensorLinearOperator(EYE)]))):
        frozen, inverse, before = A.frozen(), A.inverse(1.0), A.to_dense()
        assert frozen is not A and frozen.frozen() is frozen
        logdet = frozen.damped(1.0).logdet()
        U += 1.0
        assert_close(A.damped(1.0).logdet(), torch.logdet(A.to_dense() + EYE), "live")
        assert_close(A.inverse(1.0).to_dense(), torch.linalg.inv(A.to_dense() + EYE), "live")
        assert_close(frozen.to_dense(), before, "frozen")
        assert_close(frozen.damped(1.0).logdet(), logdet, "frozen")
        assert_close(inverse.to_dense(), torch.linalg.inv(before + EYE), "an inverse is frozen")
        assert isinstance(A.frozen().U, type(A.U.frozen()))


def test_weights_are_copied() -> None:
    s = torch.ones(2).double()
    A = LowRankLinearOperator(columns(noise(D, 2)), s)
    before = A.to_dense()
    s.fill_(7.0)
    assert torch.equal(A.to_dense(), before)


# -- Gram matrices -----------------------------------------------------------------------------------------------------


def operators_of_columns(dtype: torch.dtype = torch.float64) -> dict[str, tuple[LinearOperator, Tensor]]:
    U, V, T = (noise(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(D, 4), (D, 2), (4, 3)]))
    X, Y = columns(U), columns(V)
    return {
        "products": (X, U),
        "dense": (TensorLinearOperator(V), V),
        "stack": (HStack([X, Y, X]), torch.cat([U, V, U], 1)),
        "scaled": (-2.0 * X, -2 * U),
        "chain": (X @ TensorLinearOperator(T), U @ T),
        "wide chain": (Y @ TensorLinearOperator(noise(2, 6, dtype=dtype)), V @ noise(2, 6, dtype=dtype)),
        "sum": (X + TensorLinearOperator(U), 2 * U),
        "reshaped": (Reshaped(TensorLinearOperator(U), Space.flat(4, dtype, CPU), named_space(SHAPES, dtype)), U),
        "nested": (HStack([2.0 * HStack([X, Y]), X @ TensorLinearOperator(T)]), torch.cat([2 * U, 2 * V, U @ T], 1)),
        "none": (columns(noise(D, 0, dtype=dtype)), noise(D, 0, dtype=dtype)),
    }


@pytest.mark.parametrize("cap", [1, 8, 2**26])
def test_gram_matrices(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of operators with each other, whatever the cap on held numbers."""
    monkeypatch.setattr(base, "_DENSE_CHUNK_NUMEL", cap)
    made = operators_of_columns()
    for name, (X, U) in made.items():
        weights, W = noise(U.shape[1], seed=8), noise(U.shape[1], U.shape[1], seed=9)
        for w, matrix in ((weights, torch.diag(weights)), (W + W.T, W + W.T)):
            squares = row_squares(X, w)
            assert [s.shape for s in squares] == [torch.Size(shape) for shape in X.codomain.shapes]
            assert_close(torch.cat([s.flatten() for s in squares]), (U @ matrix @ U.T).diagonal(), name)
        for other, (Y, V) in made.items():
            assert_close(cross_gram(X, Y), U.T @ V, f"{name}, {other}")
        assert_close(gram(X), U.T @ U, name)
        assert torch.equal(gram(X), gram(X).T), name


@pytest.mark.parametrize("cap", [1, 2**26])
def test_gram_matrices_of_half_precision(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of bfloat16 are exact; their inner products are not rounded to it."""
    monkeypatch.setattr(base, "_DENSE_CHUNK_NUMEL", cap)
    U, V = noise(64, 4, dtype=torch.bfloat16), noise(64, 3, seed=1, dtype=torch.bfloat16)
    X, Y = TensorLinearOperator(U), columns(V, None)
    for actual, truth in (
        (gram(X), U.double().T @ U.double()),
        (cross_gram(X, Y), U.double().T @ V.double()),
        (gram(HStack([X, Y])), torch.cat([U, V], 1).double().T @ torch.cat([U, V], 1).double()),
        (row_squares(X, torch.ones(4))[0], U.double().square().sum(1)),
    ):
        assert actual.dtype == torch.float32
        assert_close(actual, truth, "half precision", rtol=1e-5)


def test_operators_that_know_their_own() -> None:
    asked: list[str] = []

    class Structured(MatrixOperator):
        """Columns with methods of their own, which refuse others."""

        def _gram(self) -> Tensor:
            asked.append("gram")
            return self.matrix.T @ self.matrix

        def _cross_gram(self, other: LinearOperator) -> Tensor | None:
            asked.append("cross_gram")
            return self.matrix.T @ other.matrix if isinstance(other, Structured) else None

        def _row_squares(self, weights: Tensor) -> list[Tensor] | None:
            asked.append("row_squares")
            return None if weights.ndim == 2 else [self.matrix.square() @ weights]

    spaces = Space.flat(3, torch.float64, CPU), Space.flat(D, torch.float64, CPU)
    X, Y = (Structured(noise(D, 3, seed=i), *spaces) for i in range(2))
    stack = LowRankLinearOperator(HStack([X, Y]), c=1.0)
    M = X.matrix @ X.matrix.T + Y.matrix @ Y.matrix.T + EYE
    assert_close(stack.logdet(), torch.logdet(M), "logdet")
    assert_close(stack.diagonal(), M.diagonal(), "diagonal")
    assert X.num_products == Y.num_products == 0
    assert sorted(asked) == ["cross_gram", "gram", "gram", "row_squares", "row_squares"]
    T = noise(3, 2)
    assert_close(gram(X @ TensorLinearOperator(T)), T.T @ X.matrix.T @ X.matrix @ T, "chain")
    assert X.num_products == 0
    assert_close(cross_gram(X, TensorLinearOperator(Y.matrix)), X.matrix.T @ Y.matrix, "refused")
    assert_close(stack.inverse().diagonal(), torch.linalg.inv(M).diagonal(), "refused")


# -- accuracy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", ["decaying", "with duplicates", "one dominant", "both signs"])
def test_residuals_in_float32(spectrum: str) -> None:
    """Right-hand sides in the range of U, as gradients are, magnify rounding by the condition unless it is refined."""
    rows, R = 2000, 60
    U = noise(rows, R) / torch.arange(1, R + 1).sqrt()
    if spectrum == "decaying":
        U = noise(rows, R) * torch.logspace(0, -6, R, dtype=torch.float64)
    U = U[:, torch.arange(R) % 15] if spectrum == "with duplicates" else U
    U = U + (10 * noise(rows, 1, seed=1) if spectrum == "one dominant" else 0)
    s = torch.ones(R)
    s[1::3] = -5e-3 if spectrum == "both signs" else 1.0
    U = U.float().double()
    M = U * s @ U.T
    # M's eigenvalues other than zero are those of the small matrix diag(s) UᵀU.
    c = 1e-2 * torch.linalg.eigvals(s.double().unsqueeze(1) * (U.T @ U)).abs().max().item()
    B = torch.cat([noise(rows, 2, seed=2), U @ noise(R, 2, seed=3), U[:, :2]], 1).float()
    inverse = LowRankLinearOperator(TensorLinearOperator(U.float()), s).inverse(c)
    X = (inverse @ B).double()
    residuals = (B.double() - M @ X - c * X).norm(dim=0) / B.double().norm(dim=0)
    assert (residuals[2:] <= 1e-6).all(), residuals
    # Elsewhere the rounding of the inner products UᵀB themselves is the limit.
    assert (residuals[:2] <= 5e-6).all(), residuals


def test_products_of_an_inverse() -> None:
    """One product with U, and one with its adjoint, in float64; two with a step of refinement."""
    for dtype, damping, expected in ((torch.float64, 1.0, 1), (torch.float64, 1e-9, 2), (torch.float32, 1.0, 2)):
        U = columns(noise(D, 2, dtype=dtype))
        inverse = LowRankLinearOperator(U).inverse(damping)
        before = U.num_products
        inverse @ torch.ones(D, dtype=dtype)
        assert U.num_products - before == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_has_all_quantities(dtype: torch.dtype) -> None:
    """Powers of two are exact: U Uᵀ + I has the eigenvalues 5, 2 and 1."""
    U = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=dtype)
    A = LowRankLinearOperator(TensorLinearOperator(U), c=1.0)
    answers = {
        "trace": (A.trace(), 8.0),
        "logdet": (A.logdet(), math.log(10.0)),
        "norm": (A.frobenius_norm(), math.sqrt(30.0)),
        "diagonal": (A.diagonal()[0], 5.0),
        "eigenvalues": (A.eigenvalues()[0], 2.0),
        "inverse": (A.inverse().to_dense()[0, 0], 0.2),
        "product": ((A @ torch.ones(3, dtype=dtype))[0], 5.0),
        "sqrt": (A.sqrt().to_dense()[0, 0], math.sqrt(5.0)),
        "sample": (A.sample(1)[0, 0].sign().abs(), 1.0),
    }
    for name, (actual, truth) in answers.items():
        assert actual.dtype == dtype, name
        assert actual.item() == pytest.approx(truth, rel=4 * torch.finfo(dtype).eps), name


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["positive", "without identity", "both signs", "inverse", "sum"])
def test_samples_have_the_covariance(kind: str) -> None:
    """All second moments within five standard errors, which for a normal distribution are known."""
    U, V = noise(D, 2, seed=1), noise(D, 2, seed=2)
    A = LowRankLinearOperator(columns(U), torch.tensor([1.0, 0.3]), 0.0 if kind == "without identity" else 0.5)
    if kind == "both signs":
        A = LowRankLinearOperator(columns(U), torch.tensor([1.0, -0.01]), 0.5)
    if kind in ("inverse", "sum"):
        A = A.inverse() if kind == "inverse" else A + LowRankLinearOperator(columns(V))  # type: ignore[assignment]
    num_samples, M = 20000, A.to_dense()
    X = A.sample(num_samples, seed=3)
    assert X.shape == (D, num_samples)
    diagonal = M.diagonal()
    error = ((diagonal.unsqueeze(1) * diagonal + M.square()) / num_samples).sqrt()
    assert ((X @ X.T / num_samples - M).abs() <= 5 * error).all()
    assert (X.mean(1).abs() <= 5 * (diagonal / num_samples).sqrt()).all()


def test_samples_repeat_with_their_seed() -> None:
    A = LowRankLinearOperator(columns(noise(D, 2)), c=1.0)
    state = torch.get_rng_state()
    assert torch.equal(A.sample(3), A.sample(3))
    assert not torch.equal(A.sample(3, seed=1), A.sample(3, seed=2))
    generator = torch.Generator().manual_seed(1)
    first, second = A.sample(3, generator=generator), A.sample(3, generator=generator)
    assert torch.equal(first, A.sample(3, seed=1)) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"num_samples.*at least 1, got 0"):
        A.sample(0)
    with pytest.raises(TypeError, match=r"num_samples.*integer.*got 2\.0"):
        A.sample(2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.Generator, got int"):
        A.sample(2, generator=7)  # type: ignore[arg-type]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_singular_matrices_have_no_inverse() -> None:
    U = columns(noise(D, 2))
    for A, damping in (
        (LowRankLinearOperator(U), 0.0),
        (LowRankLinearOperator(U, c=1.0), -1.0),
        (LowRankLinearOperator(columns(noise(D, 2) @ noise(2, 7))), 0.0),
        (LowRankLinearOperator(columns(noise(D, 0))), 0.0),
    ):
        with pytest.raises(ValueError, match=r"singular.*damped"):
            A.inverse(damping)
        with pytest.raises(ValueError, match="not positive"):
            LowRankLinearOperator(U).logdet()
    unit = columns(EYE[:, :1].clone())
    with pytest.raises(ValueError, match=r"damping=2\.0 is singular"):
        LowRankLinearOperator(unit, torch.tensor([-3.0]), 1.0).inverse(2.0)


def test_negative_matrices_have_no_root() -> None:
    U = columns(noise(D, 2))
    for A in (LowRankLinearOperator(U, torch.tensor([1.0, -1.0])), LowRankLinearOperator(U, c=-1.0)):
        for method in (A.sqrt, lambda A=A: A.sample(1)):
            with pytest.raises(ValueError, match="positive semi-definite"):
                method()
    with pytest.raises(ValueError, match="not positive"):
        LowRankLinearOperator(U, torch.tensor([-9.0, 1.0]), 1.0).logdet()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 2),), TypeError, r"U.*Tensor"),
        ((columns(noise(D, 2)), [1.0, 2.0]), TypeError, r"s: expected a tensor \[2\], got list"),
        ((columns(noise(D, 2)), torch.ones(3)), ValueError, r"s.*\[2\].*\[3\]"),
        ((columns(noise(D, 2)), torch.ones(2, dtype=torch.complex64)), ValueError, "real"),
        ((columns(noise(D, 2)), torch.tensor([1.0, math.nan])), ValueError, "1 of 2 weights are not finite"),
        ((columns(noise(D, 2)), None, math.inf), ValueError, "c.*finite"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LowRankLinearOperator(*arguments)


def test_a_matrix_that_is_changed_later() -> None:
    """Gram matrices of a matrix that somebody else holds are not kept."""
    U = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = LowRankLinearOperator(TensorLinearOperator(U), c=0.5)
    frozen, before = A.frozen(), A.to_dense()
    for operator in (A, frozen):
        assert_close(operator.trace(), before.trace(), "trace")
    U.mul_(3)
    now = U @ U.T + 0.5 * torch.eye(6, dtype=torch.float64)
    assert_close(A.trace(), now.trace(), "trace after the change")
    assert_close(A.inverse() @ now, torch.eye(6, dtype=torch.float64), "inverse after the change")
    assert_close(frozen.to_dense(), before, "frozen matrix")
    assert_close(frozen.inverse() @ before, torch.eye(6, dtype=torch.float64), "frozen inverse")


def test_a_sum_over_columns_that_stand_twice() -> None:
    """An operator may be in a stack twice, in either term of a sum."""
    U = TensorLinearOperator(torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    twice, once = LowRankLinearOperator(HStack([U, U])), LowRankLinearOperator(U)
    other = LowRankLinearOperator(TensorLinearOperator(torch.ones(5, 1, dtype=torch.float64)))
    for one, two in ((twice, twice), (twice, once), (once, twice), (other, twice)):
        assert_close((one + two).to_dense(), one.to_dense() + two.to_dense(), "sum")


def test_no_columns() -> None:
    """Without columns a matrix is a multiple of the identity, of either sign."""
    for c in (0.4, -0.4):
        A = LowRankLinearOperator(TensorLinearOperator(torch.zeros(4, 0)), c=c)
        assert_close(A.inverse().to_dense(), torch.eye(4) / c, "inverse", rtol=1e-6)


def test_dampings_that_are_not_finite() -> None:
    A = LowRankLinearOperator(TensorLinearOperator(torch.ones(3, 1)), c=1.0)
    for change in (A.damped, A.inverse):
        with pytest.raises(ValueError, match="finite number, got nan"):
            change(float("nan"))
