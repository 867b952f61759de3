"""The small operators and the helper that scripts import from ``curvlinops.examples``."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from curvlinops.examples import (
    IdentityLinearOperator,
    OuterProductLinearOperator,
    TensorLinearOperator,
    gradient_and_loss,
)
from tests.operators.operator_pairs import noise

# -- operators ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_outer_products(D: int, K: int, seed: int) -> None:
    c, A = noise(K, seed=seed), noise(D, K, seed=seed + 1)
    truth = sum((c[k] * torch.outer(A[:, k], A[:, k]) for k in range(K)), torch.zeros(D, D).double())
    operator = OuterProductLinearOperator(c, A)
    torch.testing.assert_close(operator.to_dense(), truth)
    torch.testing.assert_close(noise(2, D) @ operator, noise(2, D) @ truth)
    assert operator.SELF_ADJOINT and operator.H is operator
    assert operator.POSITIVE_SEMIDEFINITE is bool((c >= 0).all())
    torch.testing.assert_close(operator.damped(0.5).to_dense(), truth + 0.5 * torch.eye(D).double())


@pytest.mark.parametrize(("c", "A"), [((2,), (3, 4)), ((3,), (3, 2)), ((2, 1), (3, 2)), ((2,), (2,))])
def test_outer_products_of_wrong_shapes_are_refused(c: tuple[int, ...], A: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        OuterProductLinearOperator(torch.ones(c), torch.ones(A))
    assert str(list(c)) in str(caught.value) and str(list(A)) in str(caught.value)


@given(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=3))
def test_identity(shapes: list[tuple[int, ...]]) -> None:
    operator = IdentityLinearOperator(shapes, torch.device("cpu"), torch.float64)
    D = sum(torch.Size(shape).numel() for shape in shapes)
    assert operator.shape == (D, D) and operator.dtype == torch.float64
    assert torch.equal(operator.to_dense(), torch.eye(D, dtype=torch.float64))
    tensors = [noise(*shape) if shape else noise(1)[0] for shape in shapes]
    assert all(torch.equal(a, b) for a, b in zip(operator @ tensors, tensors, strict=True))
    assert operator.trace().item() == D and operator.logdet().item() == 0


def test_identity_takes_the_orders_of_scripts() -> None:
    by_position = IdentityLinearOperator([(2,)], torch.device("cpu"), torch.bfloat16)
    by_keyword = IdentityLinearOperator(shapes=[torch.Size([2])], dtype=torch.bfloat16, device="cpu")
    for operator in (by_position, by_keyword):
        assert operator.dtype == torch.bfloat16 and operator.device == torch.device("cpu")


def test_dense_operator_is_detached() -> None:
    A = noise(3, 2).requires_grad_()
    operator = TensorLinearOperator(A)
    assert not (operator @ torch.ones(2).double()).requires_grad
    assert torch.equal(operator.to_dense(), A.detach())


# -- gradient and loss -------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def truth(model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
    value = loss(model(X), y)
    return list(torch.autograd.grad(value, list(model.parameters()))), value.detach()


def assert_same(actual: Any, expected: tuple[list[Tensor], Tensor]) -> None:
    gradient, loss = actual
    assert isinstance(gradient, list) and isinstance(loss, Tensor) and loss.ndim == 0
    torch.testing.assert_close(loss, expected[1], rtol=1e-12, atol=0)
    assert not loss.requires_grad and not any(g.requires_grad for g in gradient)
    for g, e in zip(gradient, expected[0], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["mse", "cross-entropy", "weighted"])
@pytest.mark.parametrize("cuts", [[8], [5, 3], [1, 6, 1]])
def test_gradient_and_loss_are_those_of_all_data(reduction: str, kind: str, cuts: list[int]) -> None:
    model, X = network(), noise(8, 3, seed=1)
    y = noise(8, 3, seed=2) if kind == "mse" else torch.tensor([0, 1, 2, -100, 1, 1, 0, 2])
    weight = torch.tensor([0.5, 1.0, 3.0]).double() if kind == "weighted" else None
    loss = nn.MSELoss(reduction=reduction) if kind == "mse" else nn.CrossEntropyLoss(weight, reduction=reduction)
    data = list(zip(X.split(cuts), y.split(cuts), strict=True))
    expected = truth(model, loss, X, y)
    assert_same(gradient_and_loss(model, loss, list(model.parameters()), data), expected)
    named = dict(model.named_parameters())
    assert_same(gradient_and_loss(model, loss, named, data, None, 8), expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradient_of_a_callable_and_of_a_subset() -> None:
    model, loss, X, y = network(), nn.MSELoss(), noise(8, 3, seed=1), noise(8, 3, seed=2)
    gradient, value = truth(model, loss, X, y)
    params = dict(model.named_parameters())

    def predict(values: dict[str, Tensor], X: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (X,))
        return result

    assert_same(gradient_and_loss(predict, loss, params, [(X, y)]), (gradient, value))
    names = ["2.bias", "0.weight"]
    subset = {name: params[name] for name in names}
    assert_same(gradient_and_loss(model, loss, subset, [(X, y)]), ([gradient[3], gradient[0]], value))


def test_number_of_data_is_checked_and_counted_as_asked() -> None:
    model, loss, X, y = network(), nn.MSELoss(), noise(8, 3, seed=1), noise(8, 3, seed=2)
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"(?s)9.*8|8.*9"):
        gradient_and_loss(model, loss, params, [(X, y)], num_data=9)
    with pytest.raises(ValueError):
        gradient_and_loss(model, loss, params, [])
    sizes: list[int] = []

    def count(X: Tensor) -> int:
        sizes.append(len(X))
        return len(X)

    assert_same(gradient_and_loss(model, loss, params, [(X, y)], count, 8), truth(model, loss, X, y))
    assert set(sizes) == {8}


def test_works_without_gradients_and_in_inference_mode() -> None:
    model, loss, X, y = network(), nn.MSELoss(), noise(8, 3, seed=1), noise(8, 3, seed=2)
    expected = truth(model, loss, X, y)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = gradient_and_loss(model, loss, list(model.parameters()), [(X, y)])
        assert_same(found, expected)
