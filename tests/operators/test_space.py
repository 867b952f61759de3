"""The four formats of vectors: what goes in comes out alike, and what does not fit is refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import Diagonal, LinearOperator, Space, TensorLinearOperator
from tests.operators.operator_pairs import CPU, MatrixOperator, named_space, noise

DTYPES = (torch.float32, torch.float64)
COLUMNS = st.sampled_from([None, 1, 2, 4])
SHAPE = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def spaces(draw: st.DrawFn, named: bool | None = None, min_tensors: int = 1) -> Space:
    """Spaces of a few small tensors, scalars among them, with or without names."""
    shapes = draw(st.lists(SHAPE, min_size=min_tensors, max_size=4))
    has_names = draw(st.booleans()) if named is None else named
    names = tuple(f"layer{i}.weight" for i in range(len(shapes))) if has_names else None
    return Space(tuple(shapes), draw(st.sampled_from(DTYPES)), CPU, names)


def sample(space: Space, K: int | None, seed: int = 0) -> Tensor:
    """A flat vector [D], or a matrix [D, K]."""
    return noise(space.numel, *([] if K is None else [K]), seed=seed, dtype=space.dtype)


def parts_of(M: Tensor, space: Space) -> list[Tensor]:
    """A flat vector or matrix as a list, columns last."""
    return [p.reshape((*shape, *M.shape[1:])) for p, shape in zip(M.split(space.sizes), space.shapes, strict=True)]


def formatted(M: Tensor, space: Space, kind: str, columns_first: bool) -> Any:
    """A flat vector or matrix in one of the formats."""
    if kind == "flat":
        return M.T if columns_first and M.ndim == 2 else M
    parts = parts_of(M, space)
    if columns_first and M.ndim == 2:
        parts = [p.movedim(-1, 0) for p in parts]
    if kind == "dict":
        assert space.names is not None
        return dict(zip(space.names, parts, strict=True))
    return tuple(parts) if kind == "tuple" else parts


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal in value, and of one format."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected), f"{list(actual.shape)} against {list(expected.shape)}"
    elif isinstance(expected, dict):
        assert isinstance(actual, dict) and list(actual) == list(expected)
        assert_equal(list(actual.values()), list(expected.values()))
    else:
        assert isinstance(actual, list) and len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)


# -- round trips -------------------------------------------------------------------------------------------------------


@given(spaces(), COLUMNS, st.booleans(), st.data())
def test_reading_and_writing_are_inverse(space: Space, K: int | None, columns_first: bool, data: st.DataObject) -> None:
    kinds = ["flat", "list", "tuple"] + (["dict"] if space.names else [])
    M = sample(space, K)
    truth = parts_of(M if K is not None else M.unsqueeze(-1), space)
    for kind in data.draw(st.permutations(kinds)):
        question = formatted(M, space, kind, columns_first)
        columns, form = space.read(question, columns_first)
        assert_equal(columns, truth)
        assert_equal(form.write(columns, space), question)


@given(spaces(named=True), spaces(named=True), COLUMNS, st.booleans())
def test_products_answer_in_the_format_of_the_question(
    domain: Space, codomain: Space, K: int | None, from_left: bool
) -> None:
    codomain = Space(codomain.shapes, domain.dtype, CPU, tuple(f"out.{n}" for n in codomain.names or ()))
    # Whole numbers, so that the order of summation does not matter.
    matrix = torch.round(3 * noise(codomain.numel, domain.numel)).to(domain.dtype)
    A = MatrixOperator(matrix, domain, codomain)
    source, target = (codomain, domain) if from_left else (domain, codomain)
    M = torch.round(3 * sample(source, K))
    answer = (matrix.T if from_left else matrix) @ M
    for kind in ("flat", "list", "dict"):
        question = formatted(M, source, kind, from_left)
        result = question @ A if from_left else A @ question
        assert_equal(result, formatted(answer, target, kind, from_left))


@given(spaces(named=True, min_tensors=2), COLUMNS)
def test_dicts_may_come_in_any_order(space: Space, K: int | None) -> None:
    M = sample(space, K)
    question = formatted(M, space, "dict", columns_first=False)
    backwards = dict(reversed(question.items()))
    columns, form = space.read(backwards)
    assert_equal(columns, space.read(question)[0])
    assert list(form.write(columns, space)) == list(space.names or ())


@given(spaces(), st.booleans())
def test_no_columns_are_a_matrix_too(space: Space, columns_first: bool) -> None:
    entries = [torch.ones(shape, dtype=space.dtype) for shape in space.shapes]
    A = Diagonal(dict(zip(space.names, entries, strict=True)) if space.names else entries)
    M = torch.zeros(space.numel, 0, dtype=space.dtype)
    for kind in ("flat", "list"):
        question = formatted(M, space, kind, columns_first)
        assert_equal(question @ A if columns_first else A @ question, question)


@pytest.mark.parametrize("K", [1, 3])
def test_merging_keeps_the_graph_of_each_part(K: int) -> None:
    """Columns that lie side by side in one memory, as merging leaves them."""
    space = named_space({"w": (2, 3), "b": (4,)})
    rows, weights = noise(K, 10).requires_grad_(), noise(10, K, seed=1)
    (Space.merge(space.split(rows.T)) * weights).sum().backward()
    torch.testing.assert_close(rows.grad, weights.T)


def test_answers_are_detached_and_inputs_are_left_alone() -> None:
    A = Diagonal({"w": torch.full((2, 2), 3.0), "b": torch.ones(2)})
    v = torch.nn.Parameter(torch.ones(6))
    answer = A @ v
    assert not answer.requires_grad
    answer.zero_()
    assert torch.equal(v.detach(), torch.ones(6))
    with torch.inference_mode():
        assert torch.equal(A @ torch.ones(6), torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0, 1.0]))
        assert torch.equal(torch.ones(6) @ A, torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0, 1.0]))


# -- refusals ----------------------------------------------------------------------------------------------------------


def label_of(space: Space, index: int) -> str:
    return f"'{space.names[index]}'" if space.names else f"number {index}"


def refuse(space: Space, question: Any, kind: type[Exception], *fragments: str, columns_first: bool = False) -> None:
    """Both through the Space and through an operator, with a message that has all the fragments."""
    A = MatrixOperator(torch.eye(space.numel, dtype=space.dtype), space, space)
    for ask in (lambda: space.read(question, columns_first), lambda: question @ A if columns_first else A @ question):
        with pytest.raises(kind) as caught:
            ask()
        for fragment in fragments:
            assert fragment in str(caught.value), f"{fragment!r} is missing from: {caught.value}"
    assert A.num_products == 0, "the product ran before the input was checked"


@given(spaces(), COLUMNS, st.booleans(), st.data())
def test_wrong_shapes_are_named(space: Space, K: int | None, columns_first: bool, data: st.DataObject) -> None:
    kind = "dict" if space.names else "list"
    question = formatted(sample(space, K), space, kind, columns_first)
    index = data.draw(st.integers(0, len(space.shapes) - 1))
    key = (space.names or range(len(space.shapes)))[index]
    shape = space.shapes[index]
    wrong = data.draw(st.sampled_from([(*shape, 2, 2), (shape[0] + 1, *shape[1:]) if shape else (1, 1, 1)]))
    question[key] = torch.zeros(wrong, dtype=space.dtype)
    refuse(
        space, question, ValueError, label_of(space, index), str(list(shape)), str(list(wrong)),
        columns_first=columns_first,
    )  # fmt: skip


@given(spaces(min_tensors=2), st.booleans(), st.data())
def test_unequal_columns_are_named(space: Space, columns_first: bool, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(space.shapes) - 1))
    question = formatted(sample(space, 3), space, "list", columns_first)
    other = formatted(sample(space, 2), space, "list", columns_first)
    question[index] = other[index]
    shapes = str(list(space.shapes[index])), str(list(other[index].shape))
    refuse(space, question, ValueError, label_of(space, index), *shapes, columns_first=columns_first)


@given(spaces(min_tensors=2), st.data())
def test_vector_beside_matrices_is_named(space: Space, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(space.shapes) - 1))
    question = formatted(sample(space, None), space, "list", columns_first=False)
    question[index] = question[index].unsqueeze(-1)
    refuse(space, question, ValueError, label_of(space, index), str(list(question[index].shape)))


@given(spaces(), COLUMNS, st.booleans(), st.data())
def test_wrong_dtype_device_or_type_is_named(
    space: Space, K: int | None, columns_first: bool, data: st.DataObject
) -> None:
    kind = "dict" if space.names else "list"
    question = formatted(sample(space, K), space, kind, columns_first)
    index = data.draw(st.integers(0, len(space.shapes) - 1))
    key = (space.names or range(len(space.shapes)))[index]
    right, label = question[key], label_of(space, index)
    question[key] = right.half()
    refuse(space, question, ValueError, label, str(space.dtype), "torch.float16", columns_first=columns_first)
    question[key] = right.to("meta")
    refuse(space, question, ValueError, label, "cpu", "meta", columns_first=columns_first)
    question[key] = right.numpy()
    refuse(space, question, TypeError, label, "ndarray", columns_first=columns_first)
    question[key] = None
    refuse(space, question, TypeError, label, "NoneType", columns_first=columns_first)


@given(spaces(), st.booleans())
def test_wrong_flat_tensors_are_refused(space: Space, columns_first: bool) -> None:
    D = space.numel
    matrix = [2, D + 1] if columns_first else [D + 1, 2]
    for shape in ([D + 1], matrix, [D, 1, 1], []):
        M = torch.zeros(shape, dtype=space.dtype)
        refuse(space, M, ValueError, f"[{D}]", str(shape), columns_first=columns_first)
    half, meta = torch.zeros(D, dtype=torch.half), torch.zeros(D, dtype=space.dtype, device="meta")
    refuse(space, half, ValueError, str(space.dtype), "torch.float16", columns_first=columns_first)
    refuse(space, meta, ValueError, "cpu", "meta", columns_first=columns_first)


@given(spaces(named=True))
def test_wrong_names_are_named(space: Space) -> None:
    question = formatted(sample(space, None), space, "dict", columns_first=False)
    missing = dict(question)
    name = (space.names or ())[0]
    missing.pop(name)
    refuse(space, missing, ValueError, name)
    refuse(space, question | {"stranger": torch.ones(1)}, ValueError, "stranger")


@given(spaces(), st.integers(0, 6))
def test_wrong_number_of_tensors_is_told(space: Space, count: int) -> None:
    expected = len(space.shapes)
    if count == expected:
        count += 1
    refuse(space, [torch.ones(1, dtype=space.dtype)] * count, ValueError, f"{expected} tensors", f"got {count}")


def test_dict_without_names_is_refused_before_any_work() -> None:
    nameless = Space(((2,), (1,)), torch.float64, CPU)
    refuse(nameless, {"w": torch.ones(2).double()}, ValueError, "no names")
    jacobian = MatrixOperator(noise(4, 3), named_space({"w": (2,), "b": (1,)}), Space.flat(4, torch.float64, CPU))
    with pytest.raises(ValueError, match="no names"):
        _ = jacobian @ {"w": torch.ones(2).double(), "b": torch.ones(1).double()}
    assert jacobian.num_products == 0


@pytest.mark.parametrize("question", [np.ones(3), np.ones((3, 3)), 2.0, "w", None])
def test_what_is_no_tensor_is_refused(question: Any) -> None:
    A = TensorLinearOperator(torch.eye(3))
    for ask in (lambda: A @ question, lambda: question @ A):
        with pytest.raises(TypeError, match=f"(?s)tensor.*{type(question).__name__}"):
            ask()


@pytest.mark.parametrize("array", [np.ones(3), np.ones((3, 3)), np.ones((2, 3)), np.float64(1.0)])
def test_numpy_arrays_point_to_scipy(array: Any) -> None:
    for A in (TensorLinearOperator(torch.eye(3)), Diagonal({"w": torch.ones(3)})):
        for ask in (lambda A=A: A @ array, lambda A=A: array @ A):
            with pytest.raises(TypeError, match="to_scipy"):
                ask()


# -- two spaces --------------------------------------------------------------------------------------------------------


def refuse_to_combine(A: LinearOperator, B: LinearOperator, *fragments: str) -> None:
    for combine in (lambda: A + B, lambda: A - B, lambda: sum([A, B]), lambda: A @ B, lambda: B @ A, lambda: B + A):
        with pytest.raises(ValueError) as caught:
            combine()
        for fragment in fragments:
            assert fragment in str(caught.value), f"{fragment!r} is missing from: {caught.value}"


def on(space: Space) -> LinearOperator:
    return MatrixOperator(noise(space.numel, space.numel, dtype=space.dtype), space, space)


def test_spaces_that_differ_are_shown() -> None:
    A = named_space({"w": (2, 3), "b": (3,)})
    refuse_to_combine(on(A), on(named_space({"w": (3, 2), "b": (3,)})), "w[2, 3]", "w[3, 2]")
    refuse_to_combine(on(A), on(named_space({"w": (2, 3), "c": (3,)})), "b[3]", "c[3]")
    refuse_to_combine(on(A), on(Space(((3,), (2, 3)), torch.float64, CPU)), "b[3]", "[2, 3]")
    refuse_to_combine(on(A), on(named_space({"b": (3,), "w": (2, 3)})), "w[2, 3], b[3]", "b[3], w[2, 3]")
    refuse_to_combine(on(A), on(named_space({"w": (2, 2), "b": (3,)})))


def test_diagonals_on_other_spaces_are_refused() -> None:
    A = Diagonal({"w": torch.ones(2, 3), "b": torch.ones(3)})
    refuse_to_combine(A, Diagonal({"w": torch.ones(3, 2), "b": torch.ones(3)}), "w[2, 3]", "w[3, 2]")
    refuse_to_combine(A, Diagonal({"w": torch.ones(2, 3), "c": torch.ones(3)}), "b[3]", "c[3]")


def operators_in(dtype: torch.dtype) -> dict[str, LinearOperator]:
    space = named_space({"w": (2,), "b": (1,)}, dtype)
    return {
        "dense": TensorLinearOperator(torch.eye(3, dtype=dtype)),
        "flat diagonal": Diagonal(torch.ones(3, dtype=dtype)),
        "named diagonal": Diagonal({"w": torch.ones(2, dtype=dtype), "b": torch.ones(1, dtype=dtype)}),
        "general": on(space),
    }


@pytest.mark.parametrize("left", list(operators_in(torch.float32)))
@pytest.mark.parametrize("right", list(operators_in(torch.float32)))
def test_dtypes_that_differ_are_shown(left: str, right: str) -> None:
    A, B = operators_in(torch.float32)[left], operators_in(torch.float64)[right]
    refuse_to_combine(A, B, "torch.float32", "torch.float64")


@given(spaces(named=True))
def test_flat_and_nameless_spaces_adopt(space: Space) -> None:
    flat = Space.flat(space.numel, space.dtype, CPU)
    nameless = Space(space.shapes, space.dtype, CPU)
    for other in (flat, nameless, space):
        assert space.join(other, "test") == other.join(space, "test") == space
