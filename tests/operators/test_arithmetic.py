"""The Python operators: which numbers and operators they take, and what they say about all else."""

from fractions import Fraction
from itertools import product
from operator import add, mul, sub, truediv
from typing import Any

import numpy as np
import pytest
import torch

from curvlinops import (
    BlockDiagonal,
    CGInverseLinearOperator,
    Diagonal,
    IdentityLinearOperator,
    LinearOperator,
    SubmatrixLinearOperator,
    TensorLinearOperator,
)
from curvlinops.examples import OuterProductLinearOperator
from tests.operators.operator_pairs import flat_operator, noise, symmetric


def operators() -> dict[str, LinearOperator]:
    """One operator of each class, all square of size three."""
    general = flat_operator(noise(3, 3))
    return {
        "dense": TensorLinearOperator(noise(3, 3)),
        "diagonal": Diagonal([noise(2), noise(1)]),
        "identity": IdentityLinearOperator([(3,)], "cpu", torch.float64),
        "blocks": BlockDiagonal([TensorLinearOperator(noise(2, 2)), Diagonal(noise(1))]),
        "outer": OuterProductLinearOperator(noise(2), noise(3, 2)),
        "general": general,
        "sum": general + general,
        "scaled": 2 * general,
        "chain": general @ general,
        "adjoint": general.T,
        "submatrix": SubmatrixLinearOperator(flat_operator(noise(4, 4)), [0, 1, 3], [2, 1, 0]),
        "inverse": CGInverseLinearOperator(TensorLinearOperator(symmetric(3)).damped(20.0)),
    }


NAMES = list(operators())


SCALARS: list[Any] = [
    2, -0.5, 0.0, Fraction(1, 4), np.float32(0.25), np.float64(-3), np.int64(2), np.float16(0.5), torch.tensor(2),
    torch.tensor(-0.5), torch.tensor(0.25, dtype=torch.float64), torch.tensor(2.0, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_scaling_by_every_kind_of_number(name: str) -> None:
    A = operators()[name]
    M = A.to_dense()
    for scalar in SCALARS:
        what, value = f"{type(scalar).__name__} {scalar}", float(scalar)
        for scaled in (scalar * A, A * scalar):
            assert isinstance(scaled, LinearOperator), what
            assert scaled.dtype == A.dtype, what
            torch.testing.assert_close(scaled.to_dense(), value * M, msg=what)
        if value:
            torch.testing.assert_close((A / scalar).to_dense(), M / value, msg=what)


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_neutral(name: str) -> None:
    A = operators()[name]
    assert A + 0 is A and 0 + A is A and A - 0 is A and A + torch.tensor(0.0) is A
    assert sum([A]) is A
    torch.testing.assert_close((0 - A).to_dense(), -A.to_dense())  # type: ignore[operator]


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_added_is_refused(name: str) -> None:
    A = operators()[name]
    others: list[Any] = [1.0, "two", None, [1.0], torch.ones(3), torch.ones(3, 3), np.ones((3, 3)), 1j]
    for other, combine in product(others, (add, sub)):
        for pair in ((A, other), (other, A)):
            with pytest.raises(TypeError):
                combine(*pair)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_real_number_does_not_scale(name: str) -> None:
    A = operators()[name]
    others: list[Any] = ["two", None, [1.0], torch.ones(1), torch.ones(3), np.ones(3), 1j, torch.tensor(1j), A]
    for other, combine in product(others, (mul, truediv)):
        for pair in ((A, other), (other, A)):
            with pytest.raises(TypeError):
                combine(*pair)
    with pytest.raises(TypeError):
        1.0 / A


def test_shapes_that_do_not_fit_are_shown() -> None:
    A, B = flat_operator(noise(2, 3)), flat_operator(noise(4, 2))
    for combine in (lambda: A + B, lambda: A - B):
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 2\)"):
            combine()
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 2\)"):
        A @ B
    assert (B @ A).shape == (4, 3)


@pytest.mark.parametrize("name", NAMES)
def test_repr_shows_class_shape_dtype_and_device(name: str) -> None:
    A = operators()[name]
    text = repr(A)
    for part in (type(A).__name__, "(3, 3)", "torch.float64", "cpu"):
        assert part in text


@pytest.mark.parametrize("name", NAMES)
def test_attributes(name: str) -> None:
    A = operators()[name]
    assert A.shape == (3, 3) and A.dtype == torch.float64 and A.device == torch.device("cpu")
    assert isinstance(type(A).SELF_ADJOINT, bool)


@pytest.mark.parametrize(
    ("cls", "args", "wrong", "right"),
    [
        (CGInverseLinearOperator, [Diagonal(torch.ones(2))], "tolerence", "tolerance"),
        (CGInverseLinearOperator, [Diagonal(torch.ones(2))], "maxiter", "max_iter"),
        (CGInverseLinearOperator, [Diagonal(torch.ones(2))], "precondtioner", "preconditioner"),
        (Diagonal, [], "entrys", "entries"),
        (BlockDiagonal, [], "block", "blocks"),
        (IdentityLinearOperator, [[(2,)]], "dtpye", "dtype"),
        (SubmatrixLinearOperator, [Diagonal(torch.ones(2)), [0]], "col_idx", "col_idxs"),
    ],
)
def test_unknown_keywords_get_a_hint(cls: type, args: list[Any], wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*'{wrong}'.*Did you mean '{right}'"):
        cls(*args, **{wrong: 1})


def test_unknown_keyword_without_a_neighbour_lists_the_known() -> None:
    with pytest.raises(TypeError, match=r"'zzz'.*entries"):
        Diagonal(zzz=1)  # type: ignore[call-arg]


def test_unknown_cg_hyperparameter_is_refused() -> None:
    inverse = CGInverseLinearOperator(Diagonal(torch.ones(2)))
    with pytest.raises(TypeError, match="tolerence"):
        inverse.set_cg_hyperparameters(tolerence=1e-3)  # type: ignore[call-arg]


def test_subclass_without_adjoint_says_so() -> None:
    class OneWay(LinearOperator):
        def _matmat(self, X: list[torch.Tensor]) -> list[torch.Tensor]:
            return X

    A = OneWay(*[TensorLinearOperator(torch.eye(2)).domain] * 2)
    assert (A @ torch.ones(2)).tolist() == [1.0, 1.0]
    with pytest.raises(NotImplementedError, match="OneWay"):
        torch.ones(2) @ A
    with pytest.raises(TypeError, match="_matmat"):
        LinearOperator(A.domain, A.codomain)  # type: ignore[abstract]
