"""The forms in which parameters, models and inputs can be passed."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.problems.table import Instance, Params, Table, ids, listed, mlp, named, real

TABLE = Table()
problem = TABLE.problem


@problem("subset-shuffled-list", (2, 4), "classes")
def _() -> Instance:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].requires_grad_(False)
    params = [model[4].bias, model[0].weight, model[4].weight]
    return Instance(model, nn.CrossEntropyLoss(), params, real(6, 3), ids(3, 6))


@problem("subset-shuffled-dict", (5, 1))
def _() -> Instance:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params: Params = {"2.bias": model[2].bias, "0.weight": model[0].weight}
    return Instance(model, nn.MSELoss(), params, real(6, 3), real(6, 2))


@problem("callable-of-x", (2, 3), "core", "classes", "closure")
def _() -> Instance:
    W, b = real(3, 3).requires_grad_(), nn.Parameter(real(3))

    def model(X: Tensor) -> Tensor:
        return torch.tanh(X @ W) @ W.T + b

    return Instance(model, nn.CrossEntropyLoss(), [b, W], real(5, 3), ids(3, 5))


@problem("callable-of-params-and-x", (2, 3), "classes")
def _() -> Instance:
    params: Params = {"W": real(3, 4).requires_grad_(), "b": real(4).requires_grad_(), "V": real(4, 3).requires_grad_()}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.tanh(X @ params["W"] + params["b"]) @ params["V"]

    return Instance(model, nn.CrossEntropyLoss(), params, real(5, 3), ids(3, 5), forward=lambda X: model(params, X))


@problem("callable-of-params-without-gradients", (4,))
def _() -> Instance:
    params: Params = {"scale": real(), "W": real(2, 3)}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.sin(params["scale"] * X @ params["W"])

    return Instance(model, nn.MSELoss(), params, real(4, 2), real(4, 3), forward=lambda X: model(params, X))


@problem("functional-call", (4, 2))
def _() -> Instance:
    model = mlp(3, 3, 2)
    params = named(model)

    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (X,))

    return Instance(call, nn.BCEWithLogitsLoss(), params, real(6, 3), torch.rand(6, 2).double(), forward=model)


class TwoInputs(nn.Module):
    """A network of one tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        left, right = X
        return torch.tanh(self.left(left)) * self.right(right)


@problem("tuple-input", (3, 2), "classes")
def _() -> Instance:
    model = TwoInputs().double()
    return Instance(model, nn.CrossEntropyLoss(), listed(model), (real(5, 2), real(5, 4)), ids(3, 5))


class MappingInput(TwoInputs):
    """A network of one mapping whose keys are not arguments of its forward."""

    def forward(self, X: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward((X["left"], X["right"]))


@problem("mapping-input", (3, 2))
def _() -> Instance:
    model = MappingInput().double()
    return Instance(model, nn.MSELoss(), named(model), {"left": real(5, 2), "right": real(5, 4)}, real(5, 3))


class KeywordInput(TwoInputs):
    """A network whose arguments are the keys of the mapping."""

    def forward(self, right: Tensor, left: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((left, right))


def keywords(one_mapping: bool) -> Instance:
    """Use a mapping as keyword arguments, with the labels inside or beside it."""
    model = KeywordInput().double()
    X = {"left": real(5, 2), "right": real(5, 4)}
    return Instance(
        model,
        nn.CrossEntropyLoss(),
        named(model),
        X,
        ids(3, 5),
        forward=lambda X: model(**X),
        one_mapping=one_mapping,
    )


problem("keyword-input-pairs", (4, 1), "classes")(partial(keywords, False))
problem("keyword-input-one-mapping", (2, 3), "classes")(partial(keywords, True))
