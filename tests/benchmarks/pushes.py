"""Ways to compute J v again and again at one mini-batch: what `linearize()` was chosen from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from tests.benchmarks.networks import Problem

Push = Callable[[tuple[Tensor, ...]], Tensor]


class LooksAtValues(nn.Module):
    """A model whose forward depends on values of its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 3]`` to ``[N, 2]``."""
        hidden = self.first(x)
        return self.second(hidden if hidden.sum() > 0 else -hidden)


def prepare(
    problem: Problem, way: str, is_first: bool
) -> tuple[Callable[[Any], Any], Callable[[], Any], dict[str, Any]]:
    """Prepare a push.

    Args:
        problem: The network with its data.
        way: One of `items.PUSHES`.
        is_first: Whether preparation and first push are measured, else a further push.

    Returns:
        What is measured, what goes before it, and whether the way serves models that look at values, and is right.
    """
    generator = torch.Generator().manual_seed(3)
    v = tuple(torch.rand(p.shape, generator=generator).to(p) for p in problem.params)

    def first(_: Any) -> tuple[Push, Tensor]:
        push = _WAYS[way](problem)
        return push, push(v)

    facts = {"looks_at_values": _serves(way)}
    if is_first:
        return first, lambda: None, facts
    push, pushed = first(None)
    repeated, expected = push(v), _dual(problem)(v)
    error = max(float((p - expected).norm() / expected.norm()) for p in (pushed, repeated))
    return lambda _: push(v), lambda: None, facts | {"relative_difference": error}


def _serves(way: str) -> str:
    """Whether a way serves a model that looks at values: "yes", or the kind of error."""
    torch.manual_seed(0)
    model = LooksAtValues()
    small = Problem(model, nn.MSELoss(), list(model.parameters()), [(torch.rand(2, 3), torch.rand(2, 2))])
    v = tuple(torch.ones_like(p) for p in small.params)
    try:
        push = _WAYS[way](small)
        push(v)
        return "yes" if torch.allclose(push(v), _dual(small)(v)) else "wrong result"
    except Exception as error:
        return type(error).__name__


def _function(problem: Problem) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The prediction as a function of the parameters, and their values."""
    ((X, _),) = problem.data
    names = [name for name, _ in problem.model.named_parameters()]

    def predict(*values: Tensor) -> Tensor:
        return functional_call(problem.model, dict(zip(names, values, strict=True)), (X,))

    return predict, tuple(p.detach() for p in problem.params)


def _func_linearize(problem: Problem) -> Push:
    predict, values = _function(problem)
    _, push = torch.func.linearize(predict, *values)
    return lambda v: push(*v)


def _dual(problem: Problem) -> Push:
    predict, values = _function(problem)
    return lambda v: jvp(predict, values, v)[1]


def _double_backward(problem: Problem) -> Push:
    predict, values = _function(problem)
    leaves = [value.requires_grad_() for value in values]
    prediction = predict(*leaves)
    u = torch.zeros_like(prediction, requires_grad=True)
    pulled = torch.autograd.grad(prediction, leaves, u, create_graph=True)
    return lambda v: torch.autograd.grad(pulled, u, v, retain_graph=True)[0]


def _tape(problem: Problem) -> Push:
    from curvlinops.risk.linearization import Engine, Use, linearize
    from curvlinops.risk.model import FunctionalModel

    ((X, _),) = problem.data
    model = FunctionalModel(problem.model, problem.params)
    lin = linearize(model, X, Engine(), replace(Use(), is_reused=True))
    return lambda v: lin.push([column.unsqueeze(-1) for column in v]).squeeze(-1)


_WAYS: dict[str, Callable[[Problem], Push]] = {
    "tape": _tape,
    "func_linearize": _func_linearize,
    "dual": _dual,
    "double_backward": _double_backward,
}
