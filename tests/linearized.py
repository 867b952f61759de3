"""What linearisations by an engine are asked of: kinds and engines, and what happens to a risk meanwhile."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.laws import modules_of
from tests.problems import PROBLEMS, Instance, Problem

ENGINES = ("tangents", "factors")
FACTORED = ("ggn", "ggn-sampled", "fisher", "ef", "ef-datum")
TANGENTS_ONLY = ("hessian", "jacobian", "jacobian-transposed")


def engines_of(problem: Problem, name: str) -> tuple[str, ...]:
    """Return the engines that can keep a kind of matrix."""
    if name in TANGENTS_ONLY or "generic" in problem.tags:
        return ("tangents",)
    return ENGINES


def train(instance: Instance) -> None:
    """Change parameters and buffers in the ways that users do; some leave no trace in a tensor's version."""
    for number, p in enumerate(instance.tensors):
        if number % 2:
            p.data.mul_(0.5)
        else:
            p.detach().numpy()[...] += 0.25
    for module in modules_of(instance):
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5)


def shuffled(name: str, batch_size: int = 2) -> Instance:
    """Replace the mini-batches of a problem by a loader that gives the data in another order each time."""
    instance = PROBLEMS[name].make()
    X, y = (torch.cat(parts) for parts in zip(*instance.data, strict=True))
    instance.data = DataLoader(TensorDataset(X, y), batch_size=batch_size, shuffle=True)  # type: ignore[assignment]
    return instance
