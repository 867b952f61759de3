"""Networks trained on scikit-learn's digits, right-hand sides, and products that share no code with the package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional

from tests.benchmarks.networks import Problem

SEED = 0


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


NETWORKS: dict[str, tuple[str, Callable[[], nn.Sequential], int]] = {
    "mlp": ("MLP 64-128-64-10 with tanh", lambda: _mlp(64, 128, 64, 10), 15),
    "wide": ("MLP 64-256-256-64-10 with tanh", lambda: _mlp(64, 256, 256, 64, 10), 10),
    "conv": ("two convolutions (8 and 16 channels) with ReLU and a linear layer", _conv, 15),
    "tiny": ("MLP 64-8-10 with tanh", lambda: _mlp(64, 8, 10), 5),
}
"""A network's title, its architecture and the epochs it is trained for; the last is for trying the benchmark."""


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 8x8 pixels, in float64 between 0 and 1, and their labels."""
    from sklearn.datasets import load_digits  # which the peer's environment lacks

    bunch = load_digits()
    return torch.tensor(bunch.data / 16), torch.tensor(bunch.target)


def trained(name: str, num_data: int | None = None, num_batches: int = 3) -> Problem:
    """A network trained on all digits in float64, as a problem on the first ``num_data`` of them.

    Args:
        name: Which network.
        num_data: Data of the matrices; all by default.
        num_batches: Mini-batches they come in.
    """
    _, architecture, epochs = NETWORKS[name]
    X, y = digits()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = architecture().double()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(X), generator=generator).split(100):
            optimizer.zero_grad()
            functional.cross_entropy(model(X[chosen]), y[chosen]).backward()
            optimizer.step()
    optimizer.zero_grad()
    X, y = X[:num_data], y[:num_data]
    size = -(-len(X) // num_batches)
    return Problem(
        model.eval(), nn.CrossEntropyLoss(), list(model.parameters()), list(zip(X.split(size), y.split(size)))
    )


def right_sides(problem: Problem) -> dict[str, Tensor]:
    """The gradient of a mini-batch of other data, digits that are moved by one pixel, and a random vector."""
    X, y = digits()
    moved = X[:128].reshape(-1, 8, 8).roll(1, dims=2).reshape(-1, 64).to(problem.params[0].dtype)
    parts = torch.autograd.grad(problem.loss(problem.model(moved), y[:128]), problem.params)
    return {"gradient": torch.cat([part.flatten() for part in parts]), "random": random_columns(problem, 1)[:, 0]}


def random_columns(problem: Problem, num_columns: int) -> Tensor:
    """Normal random columns ``[D, K]``."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(num_columns, problem.num_params, dtype=torch.float64, generator=generator).T


def converted(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same with model and data converted."""
    model = copy.deepcopy(problem.model).to(dtype)
    return Problem(model, problem.loss, list(model.parameters()), [(X.to(dtype), y) for X, y in problem.data])


def save(problem: Problem, right: dict[str, Tensor], path: Path) -> None:
    """Write what another environment needs to have the same problem."""
    torch.save({"state": problem.model.state_dict(), "data": problem.data, "right": right}, path)


def load(name: str, path: str) -> tuple[Problem, dict[str, Tensor]]:
    """Read what :func:`save` wrote."""
    found = torch.load(path)
    model = NETWORKS[name][1]().double()
    model.load_state_dict(found["state"])
    return Problem(model.eval(), nn.CrossEntropyLoss(), list(model.parameters()), found["data"]), found["right"]


def facts(problem: Problem) -> dict[str, float | int]:
    """Sizes, and how well the network does."""
    with torch.no_grad():
        logits = torch.cat([problem.model(X) for X, _ in problem.data])
    y = torch.cat([y for _, y in problem.data])
    return {
        "num_params": problem.num_params,
        "num_data": len(y),
        "num_batches": len(problem.data),
        "accuracy": float((logits.argmax(1) == y).double().mean()),
        "loss": float(functional.cross_entropy(logits, y)),
    }


def ggn_product(problem: Problem, v: Tensor) -> Tensor:
    """The GGN times a vector by ``torch.func``, to judge solutions."""
    params, tangents = _named(problem), _split(problem, v)
    total = torch.zeros_like(v)
    for X, _ in problem.data:
        f, Jv = jvp(lambda p, X=X: functional_call(problem.model, p, (X,)), (params,), (tangents,))
        p = f.softmax(1)
        HJv = p * Jv - p * (p * Jv).sum(1, keepdim=True)
        _, pull = vjp(lambda p, X=X: functional_call(problem.model, p, (X,)), params)
        total += torch.cat([part.flatten() for part in pull(HJv)[0].values()])
    return total / _num_data(problem)


def hessian_product(problem: Problem, v: Tensor) -> Tensor:
    """The Hessian times a vector by ``torch.func``, forward over reverse."""
    params, tangents = _named(problem), _split(problem, v)
    total = torch.zeros_like(v)
    for X, y in problem.data:

        def loss(p: dict[str, Tensor], X: Tensor = X, y: Tensor = y) -> Tensor:
            return functional.cross_entropy(functional_call(problem.model, p, (X,)), y, reduction="sum")

        _, Hv = jvp(grad(loss), (params,), (tangents,))
        total += torch.cat([part.flatten() for part in Hv.values()])
    return total / _num_data(problem)


def residual(
    product: Callable[[Problem, Tensor], Tensor], problem: Problem, damping: float, x: Tensor, b: Tensor
) -> float:
    """The largest ‖b - (A + c I) x‖ / ‖b‖ over the columns."""
    pairs = zip(x.reshape(len(x), -1).T, b.reshape(len(b), -1).T)
    return max(float((b - product(problem, x) - damping * x).norm() / b.norm()) for x, b in pairs)


def _named(problem: Problem) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in problem.model.named_parameters()}


def _split(problem: Problem, v: Tensor) -> dict[str, Tensor]:
    named = _named(problem)
    parts = v.split([p.numel() for p in named.values()])
    return {name: part.reshape(p.shape) for (name, p), part in zip(named.items(), parts)}


def _num_data(problem: Problem) -> int:
    return sum(len(y) for _, y in problem.data)
