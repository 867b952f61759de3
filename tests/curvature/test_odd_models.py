"""Linearised products, low rank and costs where models, batches or operators are unusual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvlinops
from curvlinops.operators.base import LinearOperator
from curvlinops.risk.graph import saved_tensors
from tests import laws


class Square(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * g * x


class WithoutForwardMode(nn.Module):
    """Only its double backward can push."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.linear(x))  # type: ignore[no-any-return,no-untyped-call]


def regression() -> list[tuple[Tensor, Tensor]]:
    return [(laws.noise(5, 4, seed=1), laws.noise(5, 3, seed=2))]


def classification(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(laws.noise(n, 4, seed=n), torch.arange(n) % 3) for n in sizes]


@pytest.mark.parametrize("name", ["GGN", "EF", "FisherMC", "Hessian"])
def test_lean_products_by_double_backward(name: str) -> None:
    """A lean linearisation frees its graph at the first pull; checks must not need it again."""
    model = WithoutForwardMode().double()
    A = getattr(curvlinops, f"{name}LinearOperator")(model, nn.MSELoss(), list(model.parameters()), regression())
    for columns in (1, 3):
        V = laws.noise(A.shape[1], columns, seed=3)
        lean = A.linearize(max_memory=0)
        for _ in range(2):
            laws.assert_close(lean @ V, A @ V, name)


class Hooked(nn.Module):
    """Doubles gradients, so that the two directions disagree; its first forward may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fails = nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("for once")
        f = torch.tanh(self.linear(x))
        if f.requires_grad:
            f.register_hook(lambda g: 2 * g)
        return f


def test_a_check_that_failed_is_made_again() -> None:
    """An error in the middle of a check does not count as its success."""
    model = Hooked().double()
    J = curvlinops.JacobianLinearOperator(model, list(model.parameters()), regression(), check_deterministic=False)
    u = laws.noise(J.shape[0], seed=4)
    model.fails = True
    with pytest.raises(RuntimeError, match="for once"):
        J.T @ u
    model.fails = False
    with pytest.raises(NotImplementedError):
        J.T @ u


class Doubled(LinearOperator):
    """A user's operator, with a `linearize` of one argument."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.domain, operator.codomain)
        self.operator = operator

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [2 * x for x in self.operator._matmat(X)]

    def linearize(self, max_memory: int | None = None) -> LinearOperator:  # type: ignore[override]
        """The same over a linearised operator."""
        return Doubled(self.operator.linearize(max_memory))


def test_users_operators_need_not_know_engines() -> None:
    model = nn.Linear(4, 3).double()
    G = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), classification(5))
    v = laws.noise(G.shape[1], seed=3)
    for operator in (G + Doubled(G), 3.0 * Doubled(G), Doubled(G) @ Doubled(G)):
        laws.assert_close(operator.linearize() @ v, operator @ v, repr(operator))


@pytest.mark.parametrize("name", ["GGN", "EF"])
def test_a_mini_batch_without_data(name: str) -> None:
    """It adds nothing to closed forms."""
    model = nn.Linear(4, 3).double()
    params = list(model.parameters())
    make = getattr(curvlinops, f"{name}LinearOperator")
    A = make(model, nn.CrossEntropyLoss(), params, classification(3, 0, 2))
    B = make(model, nn.CrossEntropyLoss(), params, classification(3, 2))
    low_rank = A.to_low_rank()
    laws.assert_close(low_rank.trace(), B.to_dense().trace(), "trace")
    laws.assert_close(low_rank.damped(0.1).inverse().to_dense(), B.damped(0.1).to_dense().inverse(), "inverse")


class Step(nn.Module):
    """Takes a step against the gradient of its own head before the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = torch.tanh(self.body(x))
            (step,) = torch.autograd.grad(self.head(h).square().sum(), h, create_graph=True)
            return self.head(torch.tanh(h - 0.1 * step))


def test_models_whose_parameters_cannot_be_taken_apart() -> None:
    """What no layer note covers goes through the network alone; a model that does not allow it is refused by name."""
    model = Step().double()
    G = curvlinops.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), regression())
    v = laws.noise(G.shape[1], seed=3)
    laws.assert_close(G.linearize() @ v, G @ v, "tangents")
    for refused in (lambda: G.linearize(engine="factors") @ v, G.to_low_rank):
        with pytest.raises(NotImplementedError, match="engine='tangents'"):
            refused()


def test_costs_again() -> None:
    """A report can be asked for again, also after products, and leaves random states alone."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    params = list(model.parameters())
    J = curvlinops.JacobianLinearOperator(model.eval(), params, classification(4, 3))
    assert J.cost() == J.cost()
    G = curvlinops.GGNLinearOperator(
        model.train(), nn.CrossEntropyLoss(), params, classification(4, 3), check_deterministic=False
    )
    state = torch.get_rng_state()
    G.cost()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ["auto", "tangents", "factors"])
def test_the_way_is_known_before_the_first_product(engine: str) -> None:
    model = nn.Linear(4, 3).double()
    F = curvlinops.FisherMCLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), classification(4, 3)
    ).linearize(engine=engine)
    before = F.cost().chosen
    F @ laws.noise(F.shape[1], seed=3)
    assert before == F.cost().chosen == ("tangents" if engine == "tangents" else "factors")


def test_counting_runs_no_checkpointed_block() -> None:
    """What checkpointing does not hold is not read, since reading would compute it."""
    calls: list[int] = []

    def block(h: Tensor) -> Tensor:
        h = torch.tanh(h)
        calls.append(1)  # after the first kernel
        return h.square()

    x = torch.rand(3, requires_grad=True)
    plain, hidden = torch.tanh(x).exp(), checkpoint(block, x, use_reentrant=False)
    calls.clear()
    assert {t.data_ptr() for t in saved_tensors(plain)} >= {plain.data_ptr()}
    assert not calls
    list(saved_tensors(hidden))
    assert not calls
    hidden.sum().backward()
    assert calls
