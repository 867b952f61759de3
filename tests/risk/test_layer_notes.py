"""Notes of linear layers are relied on only where they say all there is about a parameter."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn

from curvlinops import EFDiagonalLinearOperator, EFLinearOperator, GGNDiagonalLinearOperator, GGNLinearOperator
from tests.risk.small import inputs, targets


class Energy(nn.Module):
    """A derivative of a network: its graph reads each weight again, through the same node."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        with torch.enable_grad():
            X = X.detach().requires_grad_()
            energy = self.outer(self.inner(X).tanh()).sum()
            return torch.autograd.grad(energy, X, create_graph=True)[0]


class Logged(nn.Module):
    """A noted call that leads nowhere, beside a use that is not noted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        self.log = self.linear(X).detach()
        return X @ self.linear.weight.T + self.linear.bias


class Twice(nn.Module):
    """A weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        return self.linear(self.linear(X).tanh())


class Flattened(nn.Module):
    """Rows of the layer that are not the data: two for each datum, second halves first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        rows = torch.cat([X, 2 * X])
        return self.linear(rows).tanh().reshape(2, len(X), 3).sum(0)


class TimeMajor(nn.Module):
    """As many positions as data, and the positions come first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        steps = torch.arange(1.0, 8.0, dtype=X.dtype).reshape(-1, 1, 1)
        return self.linear(steps * X).tanh().sum(0)


@pytest.mark.parametrize("model", [Energy, Logged, Twice, Flattened, TimeMajor])
@pytest.mark.parametrize(
    ("diagonal", "whole"),
    [(GGNDiagonalLinearOperator, GGNLinearOperator), (EFDiagonalLinearOperator, EFLinearOperator)],
)
def test_diagonal_is_that_of_the_matrix(model: type, diagonal: type, whole: type) -> None:
    torch.manual_seed(0)
    network = model()
    arguments = (network, nn.MSELoss(), dict(network.named_parameters()), [(inputs(), targets())])
    expected = whole(*arguments).to_dense().diagonal()
    torch.testing.assert_close(diagonal(*arguments).diagonal(), expected, rtol=1e-9, atol=1e-12)


def test_overwritten_input_is_refused_by_autograd() -> None:
    class Overwriting(Logged):
        def forward(self, X: Tensor) -> Tensor:
            h = X.clone()
            output: Tensor = self.linear(h)
            h.zero_()
            return output

    network = Overwriting()
    D = GGNDiagonalLinearOperator(
        network, nn.MSELoss(), list(network.parameters()), [(inputs(), targets())], check_deterministic=False
    )
    with pytest.raises(RuntimeError, match="inplace"):
        D.diagonal()


def test_half_precision_parameters_with_float_predictions() -> None:
    """As in many language models: tolerances follow the coarsest dtype."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()

        def forward(self, X: Tensor) -> Tensor:
            output: Tensor = self.inner(X).float()
            return output

    network = Cast()
    arguments = (nn.MSELoss(), list(network.parameters()), [(inputs().bfloat16(), targets().float())])
    D = GGNDiagonalLinearOperator(network, *arguments).diagonal().float()
    expected = GGNLinearOperator(network, *arguments).to_dense().diagonal().float()
    assert (D - expected).norm() < 0.05 * expected.norm()


def test_mappings_keep_their_kind() -> None:
    class Record(UserDict):  # type: ignore[type-arg]
        def __getattr__(self, name: str) -> Tensor:
            try:
                value: Tensor = self.data[name]
            except KeyError as error:
                raise AttributeError(name) from error
            return value

    class Reading(Logged):
        def forward(self, X: Record) -> Tensor:  # type: ignore[override]
            return super().forward(X.features)

    network = Reading()
    G = GGNLinearOperator(network, nn.MSELoss(), list(network.parameters()), [(Record(features=inputs()), targets())])
    assert (G @ torch.ones(12, dtype=torch.float64)).isfinite().all()
