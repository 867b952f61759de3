"""How many columns go through the network together, and that it does not show in the result."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops.risk.columns import column_by_column, gathered, in_chunks
from tests.risk.small import STREAMED, build, classes, mlp, normal, relative_error, vector


def doubled(sizes: list[int]) -> Any:
    """A product that notes how many columns it gets."""

    def product(M: list[Tensor]) -> list[Tensor]:
        sizes.append(M[0].shape[-1])
        return [2 * m for m in M]

    return product


def shrinking(at_most: int, sizes: list[int], error: RuntimeError) -> Any:
    """A product that has no memory for many columns."""

    def product(M: list[Tensor]) -> list[Tensor]:
        sizes.append(M[0].shape[-1])
        if sizes[-1] > at_most:
            raise error
        return [2 * m for m in M]

    return product


@given(st.integers(1, 20), st.lists(st.integers(1, 9), min_size=20, max_size=20))
def test_chunks_are_put_together_in_order(num_columns: int, chunks: list[int]) -> None:
    M, sizes, asked = [normal(2, 3, num_columns), normal(num_columns)], [], iter(chunks)  # type: ignore[var-annotated]
    result = gathered(in_chunks(doubled(sizes), M, lambda: next(asked)))
    assert all(torch.equal(r, 2 * m) for r, m in zip(result, M, strict=True))
    assert sum(sizes) == num_columns
    assert sizes[:-1] == chunks[: len(sizes) - 1]


def test_chunks_come_one_after_the_other() -> None:
    """None is held while the next is made."""
    pieces = in_chunks(doubled(sizes := []), [normal(2, 5)], lambda: 2)
    assert sizes == []
    assert [(columns.start, columns.stop) for columns, _ in pieces if columns is not None] == [(0, 2), (2, 4), (4, 5)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte")],
)
@pytest.mark.parametrize(("at_most", "expected"), [(7, [16, 8, 4, 4, 4, 4, 4]), (1, [16, 8, 4, 2, *[1] * 20])])
def test_out_of_memory_halves_the_chunk(error: RuntimeError, at_most: int, expected: list[int]) -> None:
    M, sizes = [normal(3, 20)], []  # type: ignore[var-annotated]
    result = gathered(in_chunks(shrinking(at_most, sizes, error), M, lambda: 16))
    assert torch.equal(result[0], 2 * M[0])
    assert sizes == expected


def test_errors_that_smaller_chunks_do_not_mend() -> None:
    for error, at_most in ((torch.OutOfMemoryError("CUDA out of memory"), 0), (RuntimeError("shapes"), 3)):
        sizes: list[int] = []
        with pytest.raises(RuntimeError, match=str(error)):
            gathered(in_chunks(shrinking(at_most, sizes, error), [normal(3, 5)], lambda: 4))
        assert sizes == ([4, 2, 1] if at_most == 0 else [4])


@pytest.mark.parametrize("columns", [1, 3])
def test_columns_lie_one_after_the_other(columns: int) -> None:
    flat = normal(columns, 6)
    M = [normal(2, 3, columns), flat.T.reshape(2, 3, columns), normal(columns, 3, 2).T]
    laid = column_by_column(M)
    assert all(torch.equal(a, b) for a, b in zip(laid, M, strict=True))
    assert columns == 1 or all(m[..., k].is_contiguous() for m in laid for k in range(columns))


# -- chosen by size ----------------------------------------------------------------------------------------------------


class Wide(nn.Sequential):
    """A network with as many activations as are asked for."""

    def __init__(self, width: int, convolution: bool = False) -> None:
        torch.manual_seed(0)
        first: list[nn.Module] = [nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)]
        if convolution:
            first = [nn.Unflatten(1, (1, 3)), nn.Conv1d(1, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)]
        super().__init__(*first)
        self.double()


def learnt(model: nn.Module, **options: Any) -> int | None:
    """How many columns the first product with several chose."""
    A = build("GGN", model, classes(), **options)
    A @ vector(A)
    assert A._risk.engine.chunk_size is None, "one column teaches nothing"
    A @ vector(A, 2)
    size: int | None = A._risk.engine.chunk_size
    return size


def test_large_activations_go_in_small_chunks() -> None:
    sizes = [learnt(Wide(width)) for width in (4, 2**15, 2**19)]
    assert sizes[0] == 16
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)  # type: ignore[type-var]


def test_convolutions_go_in_smaller_chunks() -> None:
    one, other = learnt(Wide(2**14)), learnt(Wide(2**14, convolution=True))
    assert one is not None and other is not None and 1 <= other < one <= 16


def network_sizes(A: Any, columns: int) -> list[int]:
    """How many columns each call of the per-batch product got."""
    sizes: list[int] = []
    real = type(A)._linearize_batch

    class Noting(type(A)):  # type: ignore[misc]
        def _linearize_batch(self, X: Any, y: Any) -> Any:
            product = real(self, X, y)
            return lambda M: (sizes.append(M[0].shape[-1]), product(M))[1]

    A.__class__ = Noting
    A @ vector(A, columns)
    return sizes


@pytest.mark.parametrize("kind", STREAMED)
def test_the_first_column_goes_alone(kind: str) -> None:
    A = build(kind, mlp(), classes((3, 4)))
    assert network_sizes(A, 20) == [1, 16, 3] * 2


@pytest.mark.parametrize("kind", STREAMED)
def test_chunks_as_the_user_says(kind: str) -> None:
    A = build(kind, mlp(), classes((3, 4)), chunk_size=6)
    assert network_sizes(A, 20) == [6, 6, 6, 2] * 2


@pytest.mark.parametrize("linearised", [False, True])
@pytest.mark.parametrize("kind", [*STREAMED, "Jacobian", "TransposedJacobian"])
def test_the_result_does_not_depend_on_chunks(kind: str, linearised: bool) -> None:
    def prepared(**options: Any) -> Any:
        A = build(kind, mlp(), classes(), **options)
        return A.linearize() if linearised else A

    auto = prepared()
    V = vector(auto, 21)
    expected = torch.stack([auto @ v for v in V.T], 1)
    for A in (auto, *(prepared(chunk_size=size) for size in (1, 2, 5, 64))):
        for columns in (V, V.T.contiguous().T, torch.stack([V, V], 2)[..., 0]):
            assert relative_error(A @ columns, expected) < 1e-12


@pytest.mark.parametrize("kind", STREAMED)
def test_the_same_question_gets_the_same_answer_to_the_bit(kind: str) -> None:
    """The first time, when much is still to be learnt, and later; from another operator, too."""
    A, B = (build(kind, mlp(), classes()) for _ in range(2))
    V = vector(A, 21)
    first = A @ V
    A @ vector(A)
    B @ vector(B, 2)
    assert torch.equal(A @ V, first)
    assert torch.equal(B @ V, first)
