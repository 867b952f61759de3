"""Nothing of the user's changes: not by construction, products and gradients, nor by an exception in them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from curvlinops.examples import gradient_and_loss
from tests.risk.small import (
    KINDS,
    SQUARE,
    Failing,
    build,
    classes,
    differences,
    inputs,
    labels,
    mlp,
    snapshot,
    vector,
)

Action = Callable[[Any], Any]


def trained(training: bool = True) -> nn.Sequential:
    """A model with batch norm, a frozen parameter, gradients, hooks and counts of what went through."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[3].register_forward_hook(lambda module, args, output: output)
    model[3].weight.register_hook(lambda gradient: gradient)
    model.train(training)
    model[2].eval()  # a mode of its own
    return model


def shuffled() -> DataLoader[Any]:
    """A shuffling loader with a generator of its own."""
    dataset = TensorDataset(inputs(9), labels(9))
    return DataLoader(dataset, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))


def apply_all(A: Any) -> None:
    """Everything that goes over the data."""
    A @ vector(A)
    A @ vector(A, 3)
    torch.ones(2, A.shape[0], dtype=A.dtype) @ A
    if type(A) in SQUARE.values():
        A.gradient_and_loss()
        A.frozen()
    if hasattr(A, "diagonal"):
        A.diagonal()
    A.to_dense()


@pytest.fixture(autouse=True)
def random_states() -> Iterator[None]:
    """Random states that no reset to a fixed seed would meet by chance."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    for draw in (torch.rand, np.random.rand):
        draw(3)
    random.random()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.mark.parametrize("kind", KINDS)
def test_after_success(kind: str) -> None:
    """Batch norm in training mode and a shuffling loader, both unchecked."""
    model, data = trained(), shuffled()
    before = snapshot(model, data)
    A = build(kind, model, data, check_deterministic=False)
    assert differences(before, snapshot(model, data)) == []
    apply_all(A)
    assert differences(before, snapshot(model, data)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_check(kind: str) -> None:
    model, data = trained(training=False), shuffled()
    before = snapshot(model, data)
    if kind in ("MC", "Jacobian", "TransposedJacobian"):
        with pytest.raises(RuntimeError, match="order"):
            build(kind, model, data)
    else:
        build(kind, model, data)
    assert differences(before, snapshot(model, data)) == []


def test_after_a_check_that_fails() -> None:
    model, data = trained(), shuffled()
    before = snapshot(model, data)
    with pytest.raises(RuntimeError, match="BatchNorm1d '1'"):
        build("GGN", model, data)
    assert differences(before, snapshot(model, data)) == []


def test_generator_inside_of_a_batch_sampler() -> None:
    dataset, generator = TensorDataset(inputs(9), labels(9)), torch.Generator().manual_seed(5)
    sampler = BatchSampler(RandomSampler(dataset, generator=generator), 3, drop_last=False)
    data, state = DataLoader(dataset, batch_sampler=sampler), generator.get_state()
    A = build("GGN", mlp(), data)
    assert torch.equal(generator.get_state(), state), "by the check"
    A @ vector(A)
    assert torch.equal(generator.get_state(), state), "by a product"


ACTIONS: dict[str, Action] = {
    "vector": lambda A: A @ vector(A),
    "matrix": lambda A: A @ vector(A, 3),
    "left": lambda A: torch.ones(2, A.shape[0], dtype=A.dtype) @ A,
    "gradient": lambda A: A.gradient_and_loss(),
    "diagonal": lambda A: A.diagonal(),
}


def actions_of(kind: str) -> list[str]:
    """What an operator of this kind can do."""
    skipped = {"diagonal"} if "Diagonal" not in kind else set()
    return [a for a in ACTIONS if a not in skipped | ({"gradient"} if kind not in SQUARE else set())]


@pytest.mark.parametrize("error", [RuntimeError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize(("kind", "action"), [(k, a) for k in KINDS for a in actions_of(k)])
def test_after_the_model_raises(kind: str, action: str, error: BaseException) -> None:
    """At the second mini-batch, if not within the first."""
    model, data = Failing(trained(), error), shuffled()
    A = build(kind, model, data, check_deterministic=False)
    before = snapshot(model, data)
    with pytest.raises(type(error), match="now"):
        ACTIONS[action](A)
    assert differences(before, snapshot(model, data)) == []
    model.remaining[0] = 10**6
    result = ACTIONS[action](A)  # and the operator still works
    other = build(kind, model, data, check_deterministic=False)
    assert same(result, ACTIONS[action](other))


def same(a: Any, b: Any) -> bool:
    """Compare nested results within rounding."""
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("error", [ZeroDivisionError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("kind", ["GGN", "TransposedJacobian", "EFDiagonal"])
def test_after_the_model_raises_in_the_check(kind: str, at: int, error: BaseException) -> None:
    model, data = Failing(trained(training=False), error, at), shuffled()
    before = snapshot(model, data)
    with pytest.raises(type(error), match="now"):
        build(kind, model, data)
    assert differences(before, snapshot(model, data)) == []


class FailingLoss:
    """A loss that raises from a given call on."""

    reduction = "sum"

    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.remaining = error, at

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        """Softplus of the entry at the label."""
        self.remaining -= 1
        if self.remaining <= 0:
            raise self.error
        return nn.functional.softplus(f.gather(1, y.unsqueeze(1))).sum()


@pytest.mark.parametrize("error", [ZeroDivisionError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize("action", ["vector", "matrix", "gradient"])
@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_after_the_loss_raises(kind: str, action: str, error: BaseException) -> None:
    model, data = trained(), shuffled()
    A = build(kind, model, data, FailingLoss(error, 2), check_deterministic=False)
    before = snapshot(model, data)
    with pytest.raises(type(error), match="now"):
        ACTIONS[action](A)
    assert differences(before, snapshot(model, data)) == []


@pytest.mark.parametrize("kind", SQUARE)
def test_after_a_target_is_refused(kind: str) -> None:
    """In the last mini-batch, after the others have been summed."""
    model, data = trained(), classes((3, 3, 3))
    data[2][1][0] = 17
    A = build(kind, model, data, check_deterministic=False)
    before = snapshot(model, data)
    for action in actions_of(kind):
        with pytest.raises(ValueError, match="class index 17"):
            ACTIONS[action](A)
        assert differences(before, snapshot(model, data)) == []


class FailingData:
    """Mini-batches that end in an exception, drawn with the global random states."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        """Two mini-batches, then the exception."""
        for X, y in classes((3, 3)):
            yield X + 0.1 * torch.rand(()) + 0.1 * np.random.rand() + 0.1 * random.random(), y
        raise self.error


@pytest.mark.parametrize("error", [OSError("now"), KeyboardInterrupt("now")], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_after_the_loader_raises(kind: str, error: BaseException) -> None:
    model, data = trained(training=False), FailingData(error)
    before = snapshot(model)
    with pytest.raises(type(error), match="now"):
        build(kind, model, data)
    A = build(kind, model, data, check_deterministic=False)
    for action in actions_of(kind):
        with pytest.raises(type(error), match="now"):
            ACTIONS[action](A) if kind in SQUARE else A @ torch.ones(1, dtype=A.dtype)
    assert differences(before, snapshot(model)) == []


def test_modes_of_the_surroundings() -> None:
    """Grad mode, inference mode and the fast path stay as they were, whatever they were."""
    model = trained()
    A = build("GGN", model, classes((3, 3)), check_deterministic=False)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
                with mode():
                    before = snapshot(model)
                    apply_all(A)
                    assert differences(before, snapshot(model)) == []
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def test_modes_of_the_surroundings_after_an_exception() -> None:
    model = Failing(trained(), KeyboardInterrupt("now"))
    A = build("Hessian", model, classes((3, 3)), check_deterministic=False)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            before = snapshot(model)
            with pytest.raises(KeyboardInterrupt):
                A @ vector(A)
            assert differences(before, snapshot(model)) == []


def test_the_data_are_not_changed() -> None:
    data = classes((3, 4))
    copies = [(X.clone(), y.clone()) for X, y in data]
    for kind in KINDS:
        apply_all(build(kind, mlp(), data))
    assert all(torch.equal(a, b) for one, other in zip(data, copies, strict=True) for a, b in zip(one, other))
    assert not any(X.requires_grad for X, _ in data)


def test_vectors_are_not_changed() -> None:
    for kind in KINDS:
        A = build(kind, mlp(), classes())
        V = vector(A, 3).requires_grad_()
        copy = V.detach().clone()
        result = A @ V
        assert torch.equal(V, copy)
        assert V.requires_grad
        assert V.grad is None
        assert not result.requires_grad
        result.zero_()
        assert torch.equal(V, copy)


class Table(nn.Module):
    """Adds a parameter in the shape of the prediction, so that its gradient is what came from behind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))

    def forward(self, X: Tensor) -> Tensor:
        """The sum."""
        return X + self.table


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_not_changed_where_results_share_their_memory(kind: str) -> None:
    """Autograd gives the gradient of a sum as the very tensor that came in, and that of ``sum()`` as one number."""
    model = Table()
    A = build(kind, model, classes((3, 3, 3)), check_deterministic=False)
    for columns in ((), (1,), (2,)):
        V = vector(A, *columns)
        copy = V.clone()
        first = A @ V
        assert torch.equal(V, copy)
        assert torch.equal(A @ V, first)
    if kind == "Hessian":
        A = build(kind, model, classes((3, 3, 3)), lambda f, y: f.mean())
        gradients, _ = A.gradient_and_loss()
        assert torch.allclose(gradients[0], torch.full((3, 3), 1 / 9, dtype=torch.float64))


def test_buffers_that_a_forward_replaces() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=torch.float64)
            self.register_buffer("added", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, X: Tensor) -> Tensor:
            self.added += 1
            self.replaced = self.replaced + 1
            f: Tensor = self.linear(X)
            return f

    model = Counting()
    before = snapshot(model)
    for kind in KINDS:
        apply_all(build(kind, model, classes()))
        assert differences(before, snapshot(model)) == [], kind


def test_gradient_and_loss_of_a_script() -> None:
    model, data = trained(), shuffled()
    before = snapshot(model, data)
    gradients, loss = gradient_and_loss(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    assert differences(before, snapshot(model, data)) == []
    assert not any(g.requires_grad for g in [*gradients, loss])


def test_a_callable_that_closes_over_a_module() -> None:
    """Parameters that need no gradients are switched for a while only."""
    model = mlp().requires_grad_(False)
    before = snapshot(model)
    for kind in KINDS:
        A = build(kind, lambda X: model(X), classes(), params=list(model.parameters()))
        assert differences(before, snapshot(model)) == [], kind
        apply_closure(A)
        assert differences(before, snapshot(model)) == [], kind


def apply_closure(A: Any) -> None:
    """All but ``frozen``, which a closure cannot be."""
    for kind in ("vector", "matrix", "left"):
        ACTIONS[kind](A)


@pytest.mark.parametrize("form", ["X", "params and X"])
def test_buffers_of_callables(form: str) -> None:
    """A callable hides the module whose buffers it updates."""
    model = trained()
    names = [n for n, _ in model.named_parameters()]
    before = snapshot(model)
    if form == "X":
        A = build(
            "GGN", lambda X: model(X), classes((3, 3)), params=list(model.parameters()), check_deterministic=False
        )
    else:
        A = build(
            "GGN",
            lambda params, X: torch.func.functional_call(model, params, (X,)),
            classes((3, 3)),
            params={n: model.get_parameter(n) for n in names},
            check_deterministic=False,
        )
    A @ vector(A)
    A.gradient_and_loss()
    assert differences(before, snapshot(model)) == []


def test_data_in_order_need_no_random_numbers() -> None:
    """A sequential loader draws a seed for its workers at every pass, even without workers."""
    data = DataLoader(
        TensorDataset(inputs(), labels()), batch_sampler=BatchSampler(SequentialSampler(range(7)), 3, False)
    )
    state = torch.get_rng_state()
    A = build("MC", mlp(), data)
    first = A @ vector(A)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(A @ vector(A), first)
