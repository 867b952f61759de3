"""How often each product runs the model, since that is what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.risk.small import SQUARE, Counted, CountedData, build, classes, mlp, vector

SIZES = (3, 4)

Action = Callable[[Any], Any]

#: Forwards for each mini-batch: one column, three together, sixteen in two chunks.
PRODUCTS = {
    "Hessian": (1, 1, 1),
    "GGN": (1, 2, 3),
    "MC": (1, 2, 3),
    "EF": (1, 2, 3),
    "Jacobian": (1, 2, 3),
    "TransposedJacobian": (1, 1, 1),
}


def counted(kind: str, form: str = "module") -> tuple[Any, Counted, CountedData]:
    """An operator without the check, its model and its data."""
    model, data = Counted(mlp()), CountedData(classes(SIZES))
    func = model if form == "module" else lambda X: model(X)
    A = build(kind, func, data, params=list(model.parameters()), check_deterministic=False)
    return A, model, data


def forwards(model: Counted, data: CountedData, action: Callable[[], Any]) -> int:
    """Forwards of whole mini-batches, which must be as many for each."""
    model.reset()
    data.passes = 0
    action()
    assert data.passes == 1, "one pass over the data"
    assert set(model.calls) == set(SIZES), "only whole mini-batches"
    counts = {model.calls.count(size) for size in SIZES}
    assert len(counts) == 1
    return counts.pop()


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(kind: str) -> None:
    A, model, data = counted(kind)
    _ = A.shape  # a Jacobian looks at the predictions once
    A @ vector(A)  # some compare the two directions through the network once
    for columns, expected in zip(((), (3,), (16,)), PRODUCTS[kind], strict=True):
        V = vector(A, *columns)
        for time in ("first", "second"):
            assert forwards(model, data, lambda V=V: A @ V) == expected, f"{columns}, {time} product"


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_from_the_left(kind: str) -> None:
    """Those of a Jacobian are those of its transpose."""
    A, model, data = counted(kind)
    torch.ones(3, A.shape[0], dtype=A.dtype) @ A
    other = {"Jacobian": "TransposedJacobian", "TransposedJacobian": "Jacobian"}.get(kind, kind)
    V = torch.ones(3, A.shape[0], dtype=A.dtype)
    assert forwards(model, data, lambda: V @ A) == PRODUCTS[other][1]


@pytest.mark.parametrize("kind", ["Jacobian", "TransposedJacobian"])
def test_shape_of_a_jacobian(kind: str) -> None:
    A, model, data = counted(kind)
    assert forwards(model, data, lambda: A.shape) == 1
    model.reset()
    assert A.shape == A.T.shape[::-1]
    assert model.calls == []


@pytest.mark.parametrize("kind", SQUARE)
def test_gradient_and_loss(kind: str) -> None:
    A, model, data = counted(kind)
    assert forwards(model, data, A.gradient_and_loss) == 1


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
def test_diagonals_of_linear_layers(kind: str) -> None:
    """Read off one forward, once; one more on the first mini-batch compares the two directions through the network."""
    A, model, data = counted(kind)
    A.diagonal()
    assert data.passes == 1
    assert sorted(model.calls) == sorted([*SIZES, SIZES[0]])
    model.reset()
    data.passes = 0
    A.diagonal()
    A @ vector(A, 3)
    A.inverse(damping=1.0)
    A.trace()
    assert (model.calls, data.passes) == ([], 0)


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
def test_diagonals_of_other_layers(kind: str) -> None:
    """One forward of the mini-batch, and one for all its data side by side."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, X: Tensor) -> Tensor:
            return X * self.scale

    model, data = Counted(Scaled()), CountedData(classes(SIZES))
    A = build(kind, model, data, check_deterministic=False)
    A.diagonal()
    assert data.passes == 1
    assert sorted(model.calls) == sorted([1, 1, *SIZES, SIZES[0]])


@pytest.mark.parametrize("kind", ["Hessian", "GGN", "Jacobian"])
def test_callables_of_x_are_checked_once(kind: str) -> None:
    """Double backward needs one forward a product, however many columns, after a check by differences."""
    A, model, data = counted(kind, "callable of X")
    _ = A.shape
    A @ vector(A)
    for columns in ((), (3,), (16,)):
        assert forwards(model, data, lambda c=columns: A @ vector(A, *c)) == 1


def test_no_pass_without_need() -> None:
    """Algebra, views and representations do not run the model."""
    for kind in ("Hessian", "GGN", "MC", "EF"):
        A, model, data = counted(kind)
        B = (2.0 * A + A).damped(0.1)
        repr(B)
        A.frozen()
        assert (model.calls, data.passes) == ([], 0)
        B @ vector(A)
        assert data.passes <= 2


@pytest.mark.parametrize("kind", ["Hessian", "TransposedJacobian"])
def test_the_directions_are_compared_once(kind: str) -> None:
    """What goes one way only through the network costs one more forward of the first mini-batch, at first."""
    A, model, _ = counted(kind)
    _ = A.shape
    for expected in ([*SIZES, SIZES[0]], list(SIZES)):
        model.reset()
        A @ vector(A)
        assert sorted(model.calls) == sorted(expected)
