"""How often each product runs the model, since that is what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.risk.small import SQUARE, Counted, CountedData, build, classes, mlp, vector

SIZES = (3, 4)

PRODUCTS = ["Hessian", "GGN", "MC", "EF", "Jacobian", "TransposedJacobian"]


class Record(list[int]):
    """A list that copies of a model share."""

    def __deepcopy__(self, memo: Any) -> "Record":
        return self


def counted(kind: str, form: str = "module") -> tuple[Any, Counted, CountedData]:
    """An operator without the check, its model and its data."""
    model, data = Counted(mlp()), CountedData(classes(SIZES))
    model.calls = Record()
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
    """One forward of each mini-batch, however many columns, which follow the tape that the first one leaves."""
    A, model, data = counted(kind)
    _ = A.shape  # a Jacobian looks at the predictions once
    A @ vector(A)  # some compare the two directions through the network once
    for columns in ((), (1,), (3,), (40,)):
        V = vector(A, *columns)
        for time in ("first", "second"):
            assert forwards(model, data, lambda V=V: A @ V) == 1, f"{columns}, {time} product"


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_from_the_left(kind: str) -> None:
    """Those of a Jacobian are those of its transpose."""
    A, model, data = counted(kind)
    V = torch.ones(3, A.shape[0], dtype=A.dtype)
    V @ A
    assert forwards(model, data, lambda: V @ A) == 1


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
    """Read off one forward, once: notes of layers are proved without another."""
    A, model, data = counted(kind)
    A.diagonal()
    assert data.passes == 1
    assert sorted(model.calls) == sorted(SIZES)
    model.reset()
    data.passes = 0
    A.diagonal()
    A @ vector(A, 3)
    A.inverse(damping=1.0)
    A.trace()
    assert (model.calls, data.passes) == ([], 0)


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
def test_diagonals_of_other_layers(kind: str) -> None:
    """One forward of the mini-batch, and one for all its data side by side; the first compares both directions."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, X: Tensor) -> Tensor:
            return X - self.shift

    model, data = Counted(Shifted()), CountedData(classes(SIZES))
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


# -- linearised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRODUCTS)
def test_linearised_products(kind: str) -> None:
    """The first costs what a streamed one does; the others neither run the model nor read the data."""
    A, model, data = counted(kind)
    _ = A.shape
    A @ vector(A)
    for columns in ((), (3,)):
        kept = A.linearize(engine="tangents")
        model.reset()
        data.passes = 0
        repr(kept)
        assert (model.calls, data.passes) == ([], 0), "the first product prepares"
        assert forwards(model, data, lambda kept=kept, columns=columns: kept @ vector(A, *columns)) == 1
        model.reset()
        data.passes = 0
        for later in ((), (3,), (16,)):
            kept @ vector(A, *later)
        assert (model.calls, data.passes) == ([], 0)


@pytest.mark.parametrize(("kind", "engine"), [("MC", "factors"), ("EF", "factors"), ("GGN", "factors"), ("EF", "auto")])
def test_linearised_by_factors(kind: str, engine: str) -> None:
    A, model, data = counted(kind)
    kept = A.linearize(engine=engine)
    assert forwards(model, data, lambda: kept @ vector(A, 3)) == 1
    model.reset()
    kept @ vector(A)
    assert (model.calls, data.passes) == ([], 1)
    assert "factors" in repr(kept)


@pytest.mark.parametrize("kind", ["GGN", "MC", "EF", "Jacobian"])
def test_lean_products(kind: str) -> None:
    """Nothing is held beside the graph for the backward, so tangents take a forward of their own."""
    A, model, data = counted(kind)
    _ = A.shape
    A @ vector(A)
    lean = A.linearize(max_memory=0)
    lean @ vector(A)
    expected = 1 if kind == "Jacobian" else 2
    for _ in range(2):
        assert forwards(model, data, lambda: lean @ vector(A)) == expected


@pytest.mark.parametrize("kind", ["GGN", "MC", "EF"])
def test_low_rank(kind: str) -> None:
    """One forward; what follows from the columns takes none."""
    A, model, data = counted(kind)
    low = A.to_low_rank()
    assert sorted(model.calls) == sorted(SIZES)
    assert data.passes == 1
    inverse = low.damped(0.1).inverse()
    inverse @ vector(A, 2)
    low.logdet() if low.c else low.eigenvalues()
    low.diagonal()
    assert sorted(model.calls) == sorted(SIZES)
