"""Operators paired with the dense matrices they stand for, and random expressions made of them.

The matrices are computed by plain tensor arithmetic beside the operators, never by the operators themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import (
    BlockDiagonal,
    Diagonal,
    EigenDecomposed,
    IdentityLinearOperator,
    Kronecker,
    LinearOperator,
    LowRankLinearOperator,
    Space,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)
from curvlinops.operators.arrangement import Arrangement

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that leave the global random state alone."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def symmetric(size: int, seed: int = 0) -> Tensor:
    """A random symmetric matrix, exactly equal to its transpose."""
    M = noise(size, size, seed=seed)
    return M + M.T


def named_space(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Space:
    """A space with names."""
    return Space(tuple(shapes.values()), dtype, CPU, tuple(shapes))


class MatrixOperator(LinearOperator):
    """A dense matrix between any two spaces, without closed forms: stands for a curvature matrix or a Jacobian."""

    def __init__(self, matrix: Tensor, domain: Space, codomain: Space, is_self_adjoint: bool = False) -> None:
        super().__init__(domain, codomain)
        self.matrix = matrix
        self.SELF_ADJOINT = is_self_adjoint
        self.num_products = 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.num_products += 1
        return self._multiply(self.matrix, X, self.codomain)

    def _rmatmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._multiply(self.matrix.T, X, self.domain)

    @staticmethod
    def _multiply(matrix: Tensor, X: list[Tensor], target: Space) -> list[Tensor]:
        K = X[0].shape[-1]
        result = matrix @ torch.cat([x.reshape(-1, K) for x in X])
        parts = torch.split(result, target.sizes)
        return [part.reshape(*shape, K) for part, shape in zip(parts, target.shapes, strict=True)]


def flat_operator(matrix: Tensor, is_self_adjoint: bool = False) -> MatrixOperator:
    """A dense matrix on flat vectors, without closed forms."""
    rows, columns = matrix.shape
    spaces = Space.flat(columns, matrix.dtype, CPU), Space.flat(rows, matrix.dtype, CPU)
    return MatrixOperator(matrix, *spaces, is_self_adjoint)


# -- random expressions ------------------------------------------------------------------------------------------------

#: The space of parameters, of size 5, the flat space of outputs, of size 3, and that of one layer's weight and bias.
SHAPES = {"w": (2, 2), "b": (1,)}
LAYER = {"weight": (2, 2), "bias": (2,)}
SIZES = {"params": 5, "outputs": 3, "layer": 6}


@dataclass(frozen=True)
class Pair:
    """An operator, and the matrix that it must equal; the text says how it was built."""

    operator: LinearOperator
    matrix: Tensor
    text: str


def _space(name: str) -> Space:
    shapes = {"params": SHAPES, "layer": LAYER}.get(name)
    return Space.flat(SIZES[name], torch.float64, CPU) if shapes is None else named_space(shapes)


def _block_diagonal(seed: int) -> Pair:
    parts = [
        MatrixOperator(noise(4, 4, seed=seed), *[named_space({"w": (2, 2)})] * 2),
        MatrixOperator(noise(1, 1, seed=seed + 1), *[named_space({"b": (1,)})] * 2),
    ]
    return Pair(BlockDiagonal(parts), torch.block_diag(*[p.matrix for p in parts]), f"blocks{seed}")


def _mixed_blocks(seed: int) -> Pair:
    entries, matrix = noise(2, 2, seed=seed), noise(1, 1, seed=seed + 1)
    blocks = [Diagonal({"w": entries}), MatrixOperator(matrix, *[named_space({"b": (1,)})] * 2)]
    return Pair(BlockDiagonal(blocks), torch.block_diag(torch.diag(entries.flatten()), matrix), f"mixed_blocks{seed}")


def _low_rank(space: str, seed: int) -> Pair:
    """Fewer or more columns than dimensions, dense or known by products only; weights of both signs or of one."""
    D, R = SIZES[space], 2 + 4 * (seed % 2)
    U, s, c = noise(D, R, seed=seed), noise(R, seed=seed + 1), float(seed % 3)
    s = s.abs() if seed % 4 < 2 else s
    flat = Space.flat(R, torch.float64, CPU)
    columns = TensorLinearOperator(U) if seed % 5 == 0 else MatrixOperator(U, flat, _space(space))
    matrix = U @ torch.diag(s) @ U.T + c * torch.eye(D, dtype=torch.float64)
    return Pair(LowRankLinearOperator(columns, s, c), matrix, f"low_rank{seed}")


def _named_leaf(name: str, kind: str, seed: int) -> Pair:
    space, size = _space(name), SIZES[name]
    entries = noise(size, seed=seed)
    tensors = [part.reshape(shape) for part, shape in zip(entries.split(space.sizes), space.shapes, strict=True)]
    if kind == "named diagonal":
        named = dict(zip(space.names or (), tensors, strict=True))
        return Pair(Diagonal(named), torch.diag(entries), f"diagonal{seed}")
    if kind == "list diagonal":
        return Pair(Diagonal(tensors), torch.diag(entries), f"nameless_diagonal{seed}")
    if kind == "identity":
        identity = IdentityLinearOperator(list(space.shapes), "cpu", torch.float64)
        return Pair(identity, torch.eye(size, dtype=torch.float64), "identity")
    if kind == "curvature":
        M = symmetric(size, seed)
        return Pair(MatrixOperator(M, space, space, is_self_adjoint=True), M, f"curvature{seed}")
    return _block_diagonal(seed) if kind == "blocks" else _mixed_blocks(seed)


# Few tensors, so that sums meet factors and bases that they share.


@cache
def _factor(size: int, is_dense: bool, is_positive: bool, number: int) -> Tensor:
    N = noise(size, size, seed=number)
    M = N @ N.T + 0.1 * torch.eye(size, dtype=torch.float64) if is_positive else N + N.T
    return M if is_dense else M.diagonal().clone()


@cache
def _basis(size: int, number: int) -> Tensor | None:
    return torch.linalg.qr(noise(size, size, seed=number)).Q.contiguous() if number else None


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.ndim == 1 else factor


@dataclass(frozen=True)
class _Matrices:
    """Where a space's vectors have the entries of a matrix, written without the package."""

    places: list[list[int]]
    arrangement: Arrangement | None
    space: Space

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.places), len(self.places[0])

    def on_vectors(self, M: Tensor) -> Tensor:
        order = torch.tensor(self.places).flatten()
        result = torch.empty_like(M)
        result[order.unsqueeze(1), order] = M
        return result


def _matrices(name: str, choice: int) -> _Matrices:
    """Of the outputs, of the parameters' weight alone, or of a layer's weight and bias; the right way up or not."""
    if name == "outputs":
        return _Matrices([[0, 1, 2]] if choice else [[0], [1], [2]], None, _space(name))
    if name == "weight":
        space, places = named_space({"w": SHAPES["w"]}), [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    else:
        space, places = _space(name), [[[0, 1, 4], [2, 3, 5]], [[0, 2, 4], [1, 3, 5]]]
    return _Matrices(places[choice], Arrangement(space.shapes, 1, bool(choice)), space)


@st.composite
def _kronecker(draw: st.DrawFn, name: str) -> Pair:
    """A product of two factors of few, each dense or diagonal, with a shift or without."""
    matrices = _matrices(name, draw(st.integers(0, 1)))
    is_positive, shift = draw(st.booleans()), draw(st.sampled_from([0.0, 0.5]))
    left, right = (_factor(size, draw(st.booleans()), is_positive, draw(st.integers(0, 1))) for size in matrices.shape)
    options = {} if matrices.arrangement is None else {"arrangement": matrices.arrangement}
    A = Kronecker(left, right, space=matrices.space, shift=shift, is_positive=is_positive, **options)
    M = torch.kron(_dense(left), _dense(right)) + shift * torch.eye(A.shape[0], dtype=torch.float64)
    return Pair(A, matrices.on_vectors(M), f"kronecker({A!r})")


@st.composite
def _eigen_decomposed(draw: st.DrawFn, name: str) -> Pair:
    """Eigenvalues of any sign or of one, in few bases or none."""
    matrices = _matrices(name, draw(st.integers(0, 1)))
    values = noise(*matrices.shape, seed=draw(st.integers(0, 9)))
    values = values.abs() if draw(st.booleans()) else values
    bases = [_basis(size, draw(st.integers(0, 2))) for size in matrices.shape]
    options = {} if matrices.arrangement is None else {"arrangement": matrices.arrangement}
    A = EigenDecomposed(values, *bases, space=matrices.space, **options)
    left, right = (
        torch.eye(size, dtype=torch.float64) if Q is None else Q for Q, size in zip(bases, matrices.shape, strict=True)
    )
    Q = torch.kron(left, right)
    return Pair(A, matrices.on_vectors(Q @ torch.diag(values.flatten()) @ Q.T), f"eigen({A!r})")


@st.composite
def _factored(draw: st.DrawFn, name: str) -> Pair:
    """A Kronecker product or an eigendecomposed matrix; on the parameters, as the block of the weight."""
    kind = draw(st.sampled_from([_kronecker, _eigen_decomposed]))
    if name != "params":
        return draw(kind(name))
    weight, bias = draw(kind("weight")), noise(1, seed=draw(st.integers(0, 9)))
    blocks = [weight.operator, Diagonal({"b": bias})]
    # Also the wrong way round, which the positions put right.
    if draw(st.booleans()):
        A = BlockDiagonal(blocks[::-1], positions=[[1], [0]], space=_space("params"))
    else:
        A = BlockDiagonal(blocks)
    return Pair(A, torch.block_diag(weight.matrix, torch.diag(bias)), f"blocks({weight.text}, diagonal)")


def _outputs_leaf(kind: str, seed: int) -> Pair:
    if kind == "flat diagonal":
        entries = noise(3, seed=seed)
        return Pair(Diagonal(entries), torch.diag(entries), f"flat_diagonal{seed}")
    M = noise(5, 5, seed=seed)
    rows, columns = [0, 2, 4], [3, 1, 2]
    whole = MatrixOperator(M, *[named_space(SHAPES)] * 2)
    return Pair(SubmatrixLinearOperator(whole, rows, columns), M[rows][:, columns], f"submatrix{seed}")


@st.composite
def leaves(draw: st.DrawFn, rows: str, columns: str) -> Pair:
    """One operator between two of the spaces."""
    seed = draw(st.integers(0, 9))
    general = ["dense", "general"]
    named = ["named diagonal", "list diagonal", "identity", "curvature", "low rank", "factored", "factored"]
    square = {
        "params": [*named, "blocks", "mixed blocks"],
        "layer": named,
        "outputs": ["flat diagonal", "submatrix", "low rank", "factored"],
    }
    kind = draw(st.sampled_from(general + (square[rows] if rows == columns else [])))
    if kind == "low rank":
        return _low_rank(rows, seed)
    if kind == "factored":
        return draw(_factored(rows))
    if kind not in general:
        return _outputs_leaf(kind, seed) if rows == "outputs" else _named_leaf(rows, kind, seed)
    is_symmetric = rows == columns and draw(st.booleans())
    M = symmetric(SIZES[rows], seed) if is_symmetric else noise(SIZES[rows], SIZES[columns], seed=seed)
    if kind == "dense":
        return Pair(TensorLinearOperator(M), M, f"dense{seed}")
    return Pair(MatrixOperator(M, _space(columns), _space(rows), is_symmetric), M, f"general{seed}")


SCALARS: list[Callable[[float], object]] = [
    float,
    lambda c: round(c) or 1,
    torch.tensor,
    lambda c: torch.tensor(round(c) or 1),
    np.float64,
    np.float32,
    lambda c: np.int64(round(c) or 1),
]


@st.composite
def expressions(draw: st.DrawFn, rows: str, columns: str, depth: int = 3) -> Pair:
    """A random tree of the algebra from one space to another."""
    kinds = ["leaf"] if depth == 0 else ["leaf", "add", "subtract", "sum", "scale", "divide", "negate", "adjoint"]
    if depth:
        kinds += ["chain", "chain"] + (["damped", "gram"] if rows == columns else [])
    kind = draw(st.sampled_from(kinds))

    def child(r: str = rows, c: str = columns) -> Pair:
        return draw(expressions(r, c, depth - 1))

    if kind == "leaf":
        return draw(leaves(rows, columns))
    if kind in ("add", "subtract", "sum"):
        return _combined(kind, [child() for _ in range(3 if kind == "sum" else 2)])
    if kind in ("scale", "divide"):
        return _scaled(kind, child(), draw(st.sampled_from([-2.5, -1.0, 0.5, 3.0])), draw(st.sampled_from(SCALARS)))
    if kind == "chain":
        middle = draw(st.sampled_from(sorted(SIZES)))
        a, b = child(rows, middle), child(middle, columns)
        return Pair(a.operator @ b.operator, a.matrix @ b.matrix, f"({a.text} @ {b.text})")
    if kind == "gram":
        middle = draw(st.sampled_from(sorted(SIZES)))
        a, b = child(middle, columns), child(middle, middle)
        text = f"gram({a.text}, {b.text})"
        return Pair(a.operator.T @ b.operator @ a.operator, a.matrix.T @ b.matrix @ a.matrix, text)
    if kind == "adjoint":
        a, how = child(columns, rows), draw(st.sampled_from(["H", "T", "adjoint()"]))
        turned = a.operator.adjoint() if how == "adjoint()" else getattr(a.operator, how)
        return Pair(turned, a.matrix.T, f"{a.text}.{how}")
    a = child()
    if kind == "damped":
        eye = torch.eye(SIZES[rows], dtype=torch.float64)
        return Pair(a.operator.damped(0.7), a.matrix + 0.7 * eye, f"{a.text}.damped")
    return Pair(-a.operator, -a.matrix, f"-{a.text}")


def _combined(kind: str, children: Sequence[Pair]) -> Pair:
    operators, matrices, texts = zip(*[(c.operator, c.matrix, c.text) for c in children], strict=True)
    if kind == "subtract":
        return Pair(operators[0] - operators[1], matrices[0] - matrices[1], f"({' - '.join(texts)})")
    total = sum(operators) if kind == "sum" else operators[0] + operators[1]
    assert isinstance(total, LinearOperator)
    return Pair(total, torch.stack(matrices).sum(0), f"{kind}({', '.join(texts)})")


def _scaled(kind: str, child: Pair, number: float, form: Callable[[float], object]) -> Pair:
    scalar = form(number)
    value = float(scalar)  # type: ignore[arg-type]
    text = f"{kind}({child.text}, {scalar!r})"
    if kind == "divide":
        return Pair(child.operator / scalar, child.matrix / value, text)  # type: ignore[operator]
    left, right = scalar * child.operator, child.operator * scalar  # type: ignore[operator]
    assert torch.equal(left.to_dense(), right.to_dense()), text
    return Pair(left, child.matrix * value, text)
