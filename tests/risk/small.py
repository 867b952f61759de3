"""Tiny risks, every operator under one way to build it, and truths by plain reverse mode."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops import (
    CurvatureLinearOperator,
    EFDiagonalLinearOperator,
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    LinearOperator,
    TransposedJacobianLinearOperator,
)

NUM_FEATURES, NUM_CLASSES, NUM_DATA = 3, 3, 7
SIZES = (3, 2, 2)

Batches = list[tuple[Tensor, Tensor]]

#: Operators that are sums over data, with a loss.
SQUARE: dict[str, type[CurvatureLinearOperator]] = {
    "Hessian": HessianLinearOperator,
    "GGN": GGNLinearOperator,
    "MC": FisherMCLinearOperator,
    "EF": EFLinearOperator,
    "GGNDiagonal": GGNDiagonalLinearOperator,
    "EFDiagonal": EFDiagonalLinearOperator,
}
#: Those without a loss, in which the data are stacked.
STACKED: dict[str, type[LinearOperator]] = {
    "Jacobian": JacobianLinearOperator,
    "TransposedJacobian": TransposedJacobianLinearOperator,
}
KINDS = [*SQUARE, *STACKED]
STREAMED = ["Hessian", "GGN", "MC", "EF"]
#: Operators that depend on the order of the data.
ORDERED = ["MC", *STACKED]
#: Operators of known losses only.
FISHERS = ["MC", "EF", "EFDiagonal"]


def build(kind: str, model: Any, data: Any, loss: Any = None, params: Any = None, **options: Any) -> Any:
    """An operator of any kind; cross-entropy and all parameters of the module unless others are given."""
    params = list(model.parameters()) if params is None else params
    if kind in STACKED:
        return STACKED[kind](model, params, data, **options)
    return SQUARE[kind](model, nn.CrossEntropyLoss() if loss is None else loss, params, data, **options)


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A network with 31 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.Tanh(), nn.Linear(4, NUM_CLASSES)).to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that do not touch the global random state."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(num_data: int = NUM_DATA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs of the whole data set."""
    return normal(num_data, NUM_FEATURES, seed=1, dtype=dtype)


def labels(num_data: int = NUM_DATA) -> Tensor:
    """Classes of the whole data set."""
    return (torch.arange(num_data) * 2 + 1) % NUM_CLASSES


def targets(num_data: int = NUM_DATA, dtype: torch.dtype = torch.float64) -> Tensor:
    """Real targets of the whole data set."""
    return normal(num_data, NUM_CLASSES, seed=2, dtype=dtype)


def cut(X: Tensor, y: Tensor, sizes: Sequence[int] = SIZES) -> Batches:
    """Mini-batches of the given sizes."""
    return list(zip(X.split(list(sizes)), y.split(list(sizes)), strict=True))


def classes(sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64) -> Batches:
    """Mini-batches with classes as targets."""
    return cut(inputs(sum(sizes), dtype), labels(sum(sizes)), sizes)


def numbers(sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float64) -> Batches:
    """Mini-batches with real targets."""
    return cut(inputs(sum(sizes), dtype), targets(sum(sizes), dtype), sizes)


def vector(A: LinearOperator, *columns: int, seed: int = 3) -> Tensor:
    """A vector or a matrix that A can be applied to."""
    return normal(A.shape[1], *columns, seed=seed).to(A.dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Error in the Frobenius norm, relative to what was expected."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-12))


class CountedData:
    """An iterable of mini-batches that counts how often it is read."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = list(data)
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.data)


class Counted(nn.Module):
    """A model that counts its forwards, and the rows that went through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []

    def forward(self, X: Tensor) -> Tensor:
        """The inner model."""
        self.calls.append(len(X))
        result: Tensor = self.inner(X)
        return result

    def reset(self) -> None:
        """Forget what was counted."""
        self.calls.clear()


class Failing(nn.Module):
    """A model that raises from a given forward on."""

    def __init__(self, inner: nn.Module, error: BaseException, at: int = 2) -> None:
        super().__init__()
        self.inner = inner
        self.error = error
        self.remaining = [at]

    def forward(self, X: Tensor) -> Tensor:
        """The inner model, unless it is time to fail."""
        self.remaining[0] -= 1
        if self.remaining[0] <= 0:
            raise self.error
        result: Tensor = self.inner(X)
        return result


# -- truths by plain reverse mode --------------------------------------------------------------------------------------


def flat_gradient(value: Tensor, params: Sequence[Tensor], **options: Any) -> Tensor:
    """The gradient as one vector, with zeros where a parameter is not used."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params), dtype=value.dtype)
    gradients = torch.autograd.grad(value, params, allow_unused=True, **options)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, params, strict=True)]
    )


def reverse_jacobian(forward: Callable[[Any], Tensor], params: Sequence[Tensor], Xs: Sequence[Any]) -> Tensor:
    """The stacked Jacobian, one backward for each entry of the predictions."""
    rows = [flat_gradient(f, params, retain_graph=True) for X in Xs for f in forward(X).flatten()]
    return torch.stack(rows).detach()


def reverse_ggn(forward: Callable[[Any], Tensor], params: Sequence[Tensor], Xs: Sequence[Any]) -> Tensor:
    """The GGN of ``nn.MSELoss(reduction="sum")``."""
    J = reverse_jacobian(forward, params, Xs)
    return 2 * J.T @ J


def reverse_hessian(forward: Callable[[Any], Tensor], params: Sequence[Tensor], data: Batches) -> Tensor:
    """The Hessian of ``nn.MSELoss(reduction="sum")`` by two backwards."""
    value = torch.stack([(forward(X) - y).square().sum() for X, y in data]).sum()
    gradient = flat_gradient(value, params, create_graph=True)
    return torch.stack([flat_gradient(g, params, retain_graph=True) for g in gradient]).detach()


# -- what is the user's ------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module, data: Any = None) -> dict[str, Any]:
    """Everything of the user's that an operator could change by accident."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    hooks = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    generator = getattr(data, "generator", None)
    return {
        "identities": {n: id(t) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items()},
        "requires_grad": {n: t.requires_grad for n, t in tensors.items()},
        "grad": {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()},
        "identities of grad": {n: id(t.grad) for n, t in tensors.items()},
        "tensor hooks": {n: len(t._backward_hooks or {}) for n, t in tensors.items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "module hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:3],
        "python": random.getstate(),
        "loader": None if generator is None else generator.get_state(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
    }


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Where two snapshots differ."""
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        return [d for key in before for d in differences(before[key], after[key], f"{where}/{key}")]
    if isinstance(before, (tuple, list)):
        if len(before) != len(after):
            return [where]
        return [d for a, b in zip(before, after, strict=True) for d in differences(a, b, where)][:1]
    if isinstance(before, (Tensor, np.ndarray)):
        return [] if bool((torch.as_tensor(before) == torch.as_tensor(after)).all()) else [where]
    return [] if before == after else [where]
