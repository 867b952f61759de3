"""Decompositions of several matrices: together, exactly symmetric, repeated where they fail, or refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops.operators import factorisations
from curvlinops.operators.factorisations import inverses_of_positive, symmetric_eigen
from tests.operators.kronecker_pairs import assert_close, positive

NAN = float("nan")


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=6), st.sampled_from([1, 30, 2**26]))
def test_any_mixture_of_sizes(sizes: Sequence[tuple[int, int]], cap: int) -> None:
    matrices = [positive(groups, size, seed) for seed, (groups, size) in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorisations, "_STACK_NUMEL", {"cpu": cap})
        decomposed, inverted = symmetric_eigen(matrices), inverses_of_positive(matrices)
    assert len(decomposed) == len(inverted) == len(matrices)
    for M, (values, Q), inverse in zip(matrices, decomposed, inverted, strict=True):
        assert_close(Q * values.unsqueeze(-2) @ Q.mT, M, "eigenvalues and vectors")
        assert_close(Q.mT @ Q, torch.eye(M.shape[-1]).double().expand(M.shape), "orthonormal")
        assert (values.diff(dim=-1) >= 0).all()
        assert_close(inverse, torch.linalg.inv(M), "inverse")
        assert torch.equal(inverse, inverse.mT)


def test_matrices_of_one_size_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    eigh = torch.linalg.eigh

    def counted(M: Tensor) -> Any:
        shapes.append(tuple(M.shape))
        return eigh(M)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    matrices = [positive(g, n, g) for g, n in ((1, 3), (2, 2), (4, 3), (1, 3))] + [positive(1, 3, 5).float()]
    found = symmetric_eigen(matrices)
    assert sorted(shapes) == [(1, 3, 3), (2, 2, 2), (6, 3, 3)]
    assert [values.dtype for values, _ in found] == [torch.float64] * 4 + [torch.float32]
    bytes_held = found[0][1].untyped_storage().nbytes()
    assert bytes_held == 9 * 8, "one result does not hold the others"
    shapes.clear()
    monkeypatch.setattr(factorisations, "_STACK_NUMEL", {"cpu": 18})
    symmetric_eigen([positive(1, 3, i) for i in range(5)])
    assert shapes == [(2, 3, 3), (2, 3, 3), (1, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_float32(dtype: torch.dtype) -> None:
    M = positive(2, 4, 0).to(dtype)
    [(values, Q)], [inverse] = symmetric_eigen([M]), inverses_of_positive([M])
    assert values.dtype == Q.dtype == inverse.dtype == torch.float32
    assert_close(values, torch.linalg.eigvalsh(M.double()), "values", 1e-5)
    assert_close(inverse, torch.linalg.inv(M.double()), "inverse", 1e-4)


@pytest.mark.parametrize("decompose", [symmetric_eigen, inverses_of_positive])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_numbers_that_are_not_finite(decompose: Any, bad: float) -> None:
    broken = positive(2, 3, 0)
    broken[1, 0, 2] = broken[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"Matrix 1 of shape \[2, 3, 3\] has 2 entries that are not finite"):
        decompose([positive(1, 3, 0), broken])
    with pytest.raises(ValueError, match=r"Matrix 0: expected a stack.*\[3, 3\]"):
        decompose([torch.eye(3)])


def failing(dtypes: set[torch.dtype], how: str, function: Any) -> Any:
    """A decomposition that fails in some precisions."""

    def decompose(M: Tensor, *args: Any) -> Any:
        if M.dtype not in dtypes:
            return function(M, *args)
        if how == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        values, vectors = function(M, *args)
        return values * NAN, vectors

    return decompose


@pytest.mark.parametrize("how", ["raises", "not finite"])
def test_failed_eigendecompositions_are_repeated_in_float64(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, M = torch.linalg.eigh, positive(2, 3, 0).float()
    monkeypatch.setattr(torch.linalg, "eigh", failing({torch.float32}, how, eigh))
    [(values, Q)] = symmetric_eigen([M])
    assert values.dtype == Q.dtype == torch.float32
    assert_close(Q * values.unsqueeze(-2) @ Q.mT, M, "repeated", 1e-5)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\[2, 3, 3\] in torch.float32 does not converge"):
        symmetric_eigen([M], retry_double_precision=False)
    monkeypatch.setattr(torch.linalg, "eigh", failing({torch.float32, torch.float64}, how, eigh))
    for matrix in (M, M.double()):
        with pytest.raises(torch.linalg.LinAlgError, match="does not converge"):
            symmetric_eigen([matrix])


def test_ill_conditioned_inverses_are_repeated_in_float64() -> None:
    """A condition that float32 cannot invert, of a matrix whose entries it holds exactly."""
    M = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 2**-23]]])
    [inverse] = inverses_of_positive([M])
    assert inverse.dtype == torch.float32
    assert_close(inverse, torch.linalg.inv(M.double()), "repeated", 1e-6)
    with pytest.raises(ValueError, match=r"singular or not positive definite in torch.float32.*larger damping"):
        inverses_of_positive([0.5 * M, positive(1, 2, 0).float()], retry_double_precision=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_without_such_an_inverse(dtype: torch.dtype) -> None:
    bad = torch.tensor([[[1.0, 0.0], [0.0, -0.25]]], dtype=dtype)
    with pytest.raises(ValueError, match=r"size 2.*smallest eigenvalue is -2.50e-01, its largest 1.00e\+00.*damping"):
        inverses_of_positive([positive(1, 2, 0).to(dtype), bad])
    for singular in (torch.ones(1, 3, 3, dtype=dtype), torch.zeros(1, 2, 2, dtype=dtype)):
        with pytest.raises(ValueError, match="singular"):
            inverses_of_positive([singular])
    tiny = torch.full((1, 1, 1), 1e-44 if dtype == torch.float32 else 1e-320, dtype=dtype)
    with pytest.raises(ValueError, match="singular"):
        inverses_of_positive([tiny])


class OnGpu:
    """A stack that says that it is on a GPU."""

    device = torch.device("cuda")
    dtype = torch.float64

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def cpu(self) -> Tensor:
        return self.matrix


def test_memory_of_the_cpu_after_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit on a GPU is decomposed on the CPU and moved back; the CPU's own error is raised."""
    moved: list[torch.device] = []

    def attempt(stack: Any) -> Any:
        if isinstance(stack, OnGpu):
            raise torch.OutOfMemoryError("full")
        return (stack * 2,)

    monkeypatch.setattr(Tensor, "to", lambda tensor, where: moved.append(where) or tensor)
    M = positive(1, 2, 0)
    doubling = factorisations.Decomposition(attempt, lambda stack: ValueError())
    (found,) = factorisations._robust(OnGpu(M), doubling, True)  # type: ignore[arg-type]
    assert torch.equal(found, 2 * M) and OnGpu.device in moved

    def full(stack: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        factorisations._robust(M, factorisations.Decomposition(full, lambda stack: ValueError()), True)


def test_nothing_at_all() -> None:
    assert symmetric_eigen([]) == [] and inverses_of_positive([]) == []


def test_inputs_stay_as_they_are() -> None:
    M = positive(2, 3, 0)
    before = M.clone()
    symmetric_eigen([M]), inverses_of_positive([M, M])
    assert torch.equal(M, before)
