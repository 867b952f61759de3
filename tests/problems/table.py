"""What a problem is: one empirical risk, its data cut into mini-batches, and the table that problems are kept in."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles import Oracle

Params = list[Tensor] | dict[str, Tensor]


@dataclass
class Instance:
    """One empirical risk, ready to be passed to an operator.

    Attributes:
        model: What is passed as ``model_func``.
        loss: What is passed as ``loss_func``.
        params: What is passed as ``params``.
        X: The inputs of the whole data set.
        y: The targets of the whole data set.
        forward: Maps X to the prediction, at the tensors in ``params``; calls ``model(X)`` when None.
        weight_fn: Example weights, or None.
        options: Further keyword arguments of every operator.
        l2: The factor of the ridge term of Hessian and GGN.
        axis: The axis of data in X.
        one_mapping: Whether the loader yields one mapping with ``labels`` instead of pairs.
        data: The mini-batches, set by ``Problem.make``.
    """

    model: Any
    loss: Callable[[Tensor, Tensor], Tensor]
    params: Params
    X: Any
    y: Tensor
    forward: Callable[[Any], Tensor] | None = None
    weight_fn: Callable[[Any, Tensor], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    l2: float = 0.0
    axis: int = 0
    one_mapping: bool = False
    data: list[Any] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters as a list."""
        return list(self.params.values()) if isinstance(self.params, Mapping) else list(self.params)

    def cut(self, sizes: Sequence[int]) -> None:
        """Cut the data into mini-batches of the given sizes."""
        assert sum(sizes) == len(self.y)
        self.data, start = [], 0
        for size in sizes:
            X, y = narrow(self.X, self.axis, start, size), self.y[start : start + size]
            self.data.append({**X, "labels": y} if self.one_mapping else (X, y))
            start += size

    def oracle(self) -> Oracle:
        """Return the dense truth of this risk."""
        return Oracle(self.forward or self.model, self.loss, self.tensors, self.data, self.weight_fn, self.l2)


def narrow(X: Any, axis: int, start: int, size: int) -> Any:
    """Cut a tensor, a tuple or a mapping of tensors."""
    if isinstance(X, Tensor):
        return X.narrow(axis, start, size)
    if isinstance(X, Mapping):
        return {key: narrow(value, axis, start, size) for key, value in X.items()}
    return type(X)(narrow(value, axis, start, size) for value in X)


@dataclass(frozen=True)
class Problem:
    """One row of the table.

    Attributes:
        name: Identifier of the row.
        build: Builds the risk; called with the random state seeded by the name.
        sizes: The sizes of the mini-batches, in order.
        tags: See the module's docstring.
    """

    name: str
    build: Callable[[], Instance]
    sizes: tuple[int, ...]
    tags: frozenset[str]

    def make(self, sizes: Sequence[int] | None = None) -> Instance:
        """Build the risk anew, with its own sizes of mini-batches or with others."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            instance = self.build()
        instance.cut(self.sizes if sizes is None else sizes)
        return instance


Build = Callable[[], Instance]


class Table(dict[str, Problem]):
    """Problems by name: each module of this package has one, and they are joined in the package itself."""

    def problem(self, name: str, sizes: tuple[int, ...], *tags: str) -> Callable[[Build], Build]:
        """Register a function that builds a risk as a row of the table."""

        def register(build: Build) -> Build:
            assert name not in self
            self[name] = Problem(name, build, sizes, frozenset(tags))
            return build

        return register


def real(*shape: int) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    """Return numbers between 0.3 and 1.3 in float64."""
    return torch.rand(shape, dtype=torch.float64) + 0.3


def ids(high: int, *shape: int) -> Tensor:
    """Return random indices below ``high``."""
    return torch.randint(high, shape)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a small smooth network."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def listed(model: nn.Module) -> list[Tensor]:
    """Return the parameters that require gradients, as a list."""
    return [p for p in model.parameters() if p.requires_grad]
