"""Streamed operators follow the parameters; what is kept or frozen does not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import CurvatureLinearOperator, GGNLinearOperator
from tests.risk.small import KINDS, SQUARE, STREAMED, build, classes, mlp, normal, relative_error, vector


def with_buffers() -> nn.Sequential:
    """A model in eval mode with statistics that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    model[1].running_mean += normal(4, seed=5)
    return model


def change(model: nn.Module) -> None:
    """New values of parameters and buffers, in place."""
    with torch.no_grad():
        for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
            if tensor.is_floating_point():
                tensor += 0.2 * normal(*tensor.shape, seed=20 + index).abs()


@pytest.mark.parametrize("kind", [*STREAMED, "Jacobian", "TransposedJacobian"])
def test_products_follow_the_parameters(kind: str) -> None:
    model = with_buffers()
    A = build(kind, model, classes())
    V = vector(A, 2)
    before = A @ V
    change(model)
    after = A @ V
    assert relative_error(after, before) > 1e-3
    assert torch.equal(after, build(kind, model, classes()) @ V)


@pytest.mark.parametrize("write", ["data", "optimiser", "numpy", "vector_to_parameters"])
def test_products_follow_any_way_of_writing(write: str) -> None:
    """Some leave no trace in a tensor's version."""
    model = mlp()
    A = build("GGN", model, classes())
    v = vector(A)
    before = A @ v
    if write == "data":
        model[0].weight.data = model[0].weight.data + 1.0
    elif write == "numpy":
        model[0].weight.detach().numpy()[:] += 1.0
    elif write == "optimiser":
        A.gradient_and_loss()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
        nn.functional.cross_entropy(model(classes()[0][0]), classes()[0][1]).backward()
        optimizer.step()
    else:
        nn.utils.vector_to_parameters(normal(31, seed=9), model.parameters())
    after = A @ v
    assert relative_error(after, before) > 1e-3
    assert torch.equal(after, build("GGN", model, classes()) @ v)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_operators_do_not(kind: str) -> None:
    model = with_buffers()
    A = build(kind, model, classes())
    F = A.frozen()
    V = vector(A, 2)
    before = build(kind, model, classes()) @ V
    change(model)
    assert torch.equal(F @ V, before)
    assert relative_error(A @ V, before) > 1e-3 or "Diagonal" in kind
    assert F.shape == A.shape
    assert F.domain == A.domain


@pytest.mark.parametrize("kind", SQUARE)
def test_gradients_of_frozen_operators(kind: str) -> None:
    model = with_buffers()
    F = build(kind, model, classes()).frozen()
    (before, loss), _ = build(kind, model, classes()).gradient_and_loss(), change(model)
    gradients, value = F.gradient_and_loss()
    assert torch.equal(value, loss)
    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("form", ["dict", "subset", "foreign", "frozen parameters", "params and X"])
def test_frozen_in_all_forms(form: str) -> None:
    model = with_buffers()
    params: Any = dict(model.named_parameters())
    func: Any = model
    if form == "subset":
        params = [model[3].bias, model[0].weight]
    elif form == "foreign":
        params = {n: p.detach() + 0.1 for n, p in params.items()}
    elif form == "frozen parameters":
        model.requires_grad_(False)
    elif form == "params and X":
        model = mlp()
        params = dict(model.named_parameters())
        inner = copy.deepcopy(model)

        def func(p: dict[str, Tensor], X: Tensor) -> Tensor:
            result: Tensor = functional_call(inner, p, (X,))
            return result

    A = build("GGN", func, classes(), params=params)
    F, V = A.frozen(), vector(A, 2)
    before = A @ V
    assert torch.equal(F @ V, before)
    change(model)
    if form == "foreign":
        for p in params.values():
            p += 0.3
    assert relative_error(A @ V, before) > 1e-3
    assert torch.equal(F @ V, before)
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [form != "frozen parameters"] * len(flags)


def test_frozen_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
            self.other.weight = self.one.weight

        def forward(self, X: Tensor) -> Tensor:
            f: Tensor = self.other(self.one(X).tanh())
            return f

    model = Tied()
    A = build("Hessian", model, classes())
    V = vector(A, 2)
    before = A @ V
    F = A.frozen()
    change(model)
    assert torch.equal(F @ V, before)


def test_frozen_of_frozen() -> None:
    model = with_buffers()
    A = build("EF", model, classes())
    before, F = A @ vector(A), A.frozen().frozen()
    change(model)
    assert torch.equal(F @ vector(A), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_of_x_cannot_be_frozen(kind: str) -> None:
    model = mlp()
    A = build(kind, lambda X: model(X), classes(), params=list(model.parameters()))
    with pytest.raises(NotImplementedError, match="closes over its parameters cannot be frozen"):
        A.frozen()


def test_nodes_pass_it_on() -> None:
    model = with_buffers()
    A, J = build("GGN", model, classes()), build("Jacobian", model, classes())
    nodes = [A + 2.0 * A, A @ A, A.damped(0.1), J @ J.T, J.T]
    expected = [B @ vector(B) for B in nodes]
    frozen = [B.frozen() for B in nodes]
    change(model)
    for B, F, e in zip(nodes, frozen, expected, strict=True):
        assert torch.equal(F @ vector(B), e)
        assert relative_error(B @ vector(B), e) > 1e-3


class Identity(CurvatureLinearOperator):
    """The squared norm of the prediction times the identity: easy to see what it read."""

    def _matmat_batch(self, X: Any, y: Any, M: list[Tensor]) -> list[Tensor]:
        assert all(p.requires_grad for p in self._params)
        scale = self._predict(X).detach().square().sum(1).mean() + self._model_func(X).detach().square().sum(1).mean()
        return [scale * m for m in M]


def test_own_operators_can_be_frozen() -> None:
    model = with_buffers()
    A = Identity(model, nn.CrossEntropyLoss(), list(model.parameters()), classes())
    before, F = A @ vector(A), A.frozen()
    change(model)
    assert torch.equal(F @ vector(A), before)
    assert relative_error(A @ vector(A), before) > 1e-3
    assert type(F) is Identity


# -- diagonals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
def test_diagonals_are_computed_once(kind: str) -> None:
    model = with_buffers()
    A = build(kind, model, classes())
    assert "frozen" not in repr(A)
    before = A.diagonal()
    assert "frozen" in repr(A)
    change(model)
    assert torch.equal(A.diagonal(), before)
    assert torch.equal(A @ torch.ones(A.shape[1], dtype=A.dtype), before)
    assert A.frozen() is A
    assert relative_error(build(kind, model, classes()).diagonal(), before) > 1e-3


@pytest.mark.parametrize("kind", ["GGNDiagonal", "EFDiagonal"])
def test_what_is_made_of_diagonals_is_frozen_too(kind: str) -> None:
    model = with_buffers()
    A = build(kind, model, classes())
    before, total, inverse = A.diagonal(), A + A, A.inverse(damping=0.5)
    change(model)
    assert torch.equal(total.diagonal(), 2 * before)
    assert relative_error(inverse.diagonal(), 1 / (before + 0.5)) < 1e-12


@pytest.mark.parametrize("kind", STREAMED)
def test_representations(kind: str) -> None:
    A = build(kind, mlp(), classes())
    assert "frozen" not in repr(A)
    assert "frozen" in repr(A.frozen())
    assert type(A).__name__ in repr(A.frozen())


@pytest.mark.parametrize("kind", STREAMED)
def test_linearize_keeps_the_values(kind: str) -> None:
    """It is frozen when it is called, though the first product is what prepares it."""
    model = mlp()
    A = build(kind, model, classes())
    kept, V = A.linearize(), vector(A, 2)
    expected = A @ V
    change(model)
    for _ in range(2):
        assert relative_error(kept @ V, expected) < 1e-12
    assert relative_error(A @ V, expected) > 1e-3
    assert torch.equal(pickle.loads(pickle.dumps(A.linearize())) @ V, A.linearize() @ V)


# -- copies ------------------------------------------------------------------------------------------------------------


def through_pickle(A: Any) -> Any:
    """There and back."""
    return pickle.loads(pickle.dumps(A))


@pytest.mark.parametrize(
    ("duplicate", "used"), [(through_pickle, False), (through_pickle, True), (copy.deepcopy, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str, used: bool, duplicate: Callable[[Any], Any]) -> None:
    """The copy is a matrix of its own, with the same products."""
    model = with_buffers()
    A = build(kind, model, classes())
    V = vector(A, 2)
    if used:
        A @ V
        if kind in SQUARE:
            A.gradient_and_loss()
    B = duplicate(A)
    assert type(B) is type(A)
    assert B.domain == A.domain
    assert torch.equal(B @ V, A @ V)
    assert torch.equal(B @ V[:, 0], A @ V[:, 0])
    before = A @ V
    change(model)
    assert torch.equal(B @ V, before)


def test_copies_of_nodes_and_options() -> None:
    model = mlp()
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, classes(), mc_samples=2, seed=4, l2=0.3, num_data=7)
    J = build("Jacobian", model, classes())
    for B in (A, A.frozen(), A.damped(0.1), 2.0 * A, J @ J.T, J.T @ J, A.block("2.*")):
        copied = pickle.loads(pickle.dumps(B))
        assert torch.equal(copied @ vector(B), B @ vector(B))
    assert pickle.loads(pickle.dumps(A)).domain.names == tuple(params)


def test_callables_that_hide_tensors_are_not_frozen() -> None:
    """A copy would go on reading the buffers of the user's module."""
    inner = with_buffers()

    def func(p: dict[str, Tensor], X: Tensor) -> Tensor:
        result: Tensor = functional_call(inner, p, (X,))
        return result

    A = build("GGN", func, classes(), params=dict(inner.named_parameters()))
    with pytest.raises(NotImplementedError, match="running_mean"):
        A.frozen()
