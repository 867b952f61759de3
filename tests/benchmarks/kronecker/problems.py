"""The networks with the parameters to measure, in the form that an environment takes."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tests.benchmarks import networks
from tests.benchmarks.kronecker.plan import LARGEST_EIGEN_FACTOR
from tests.benchmarks.networks import Problem


class FlatOutputs(nn.Module):
    """A network of tokens whose positions are rows: ``[N T, C]`` in place of ``[N, C, T]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers to a matrix of logits."""
        return self.model(tokens).transpose(1, 2).flatten(0, 1)


def build(network: str, num_data: int, selection: str) -> Problem:
    """Build a network and data from a fixed seed, with some of its parameters."""
    problem = networks.build(network, num_data)
    if selection == "all":
        return problem
    layers = [module for module in problem.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if selection == "small":
        layers = [layer for layer in layers if max(len(layer.weight), layer.weight[0].numel()) <= LARGEST_EIGEN_FACTOR]
    elif selection == "weights":
        return replace(problem, params=[layer.weight for layer in layers])
    elif selection == "few":  # enough to load all that loads late
        layers = [layers[0], layers[-1]]
    return replace(problem, params=[p for layer in layers for p in layer.parameters()])


def with_flat_outputs(problem: Problem) -> Problem:
    """The same with a matrix as output, where it is not one yet."""
    if problem.data[0][1].ndim == 1:
        return problem
    return replace(problem, model=FlatOutputs(problem.model), data=[(X, y.flatten()) for X, y in problem.data])
