"""Calls that are rewritten for kept Hessians have the values and both derivatives of PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from curvlinops import HessianLinearOperator
from curvlinops.risk.second_order_rules import SecondOrderRules


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _layer_norm(x: Tensor, *affine: Tensor) -> Tensor:
    return F.layer_norm(x, [x.shape[-1]], *affine, eps=0.1)


def _batch_norm(x: Tensor, *affine: Tensor) -> Tensor:
    mean, variance = _normal(x.shape[1], seed=3), _normal(x.shape[1], seed=4).square() + 0.5
    return F.batch_norm(x, mean, variance, *affine)


CALLS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "gelu": (F.gelu, [_normal(3, 4)]),
    "gelu-tanh": (partial(F.gelu, approximate="tanh"), [_normal(3, 4)]),
    "silu": (F.silu, [_normal(3, 4)]),
    "mish": (F.mish, [_normal(3, 4)]),
    "layer-norm": (_layer_norm, [_normal(3, 2, 4), _normal(4, seed=1), _normal(4, seed=2)]),
    "layer-norm-without-shift": (_layer_norm, [_normal(3, 4), _normal(4, seed=1)]),
    "batch-norm": (_batch_norm, [_normal(3, 4), _normal(4, seed=1), _normal(4, seed=2)]),
    "batch-norm-2d": (_batch_norm, [_normal(2, 3, 2, 2), _normal(3, seed=1), _normal(3, seed=2)]),
    "batch-norm-without-shift": (_batch_norm, [_normal(3, 4), _normal(4, seed=1)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_value_and_derivatives(name: str) -> None:
    call, tensors = CALLS[name]
    inputs = tuple(t.clone().requires_grad_() for t in tensors)

    def with_rules(*values: Tensor) -> Tensor:
        with SecondOrderRules():
            return call(*values)

    result = with_rules(*inputs)
    assert type(result.grad_fn).__module__ != type(call(*inputs).grad_fn).__module__, "no rule was applied"
    torch.testing.assert_close(result, call(*inputs))
    assert gradcheck(with_rules, inputs)
    assert gradgradcheck(with_rules, inputs)


@pytest.mark.parametrize("name", CALLS)
def test_several_vectors_at_once(name: str) -> None:
    call, tensors = CALLS[name]
    inputs = [t.clone().requires_grad_() for t in tensors]
    with SecondOrderRules():
        (gradient,) = torch.autograd.grad(call(*inputs).square().sum(), inputs[0], create_graph=True)
    V = _normal(3, *gradient.shape, seed=5)
    (together,) = torch.autograd.grad(gradient, inputs[0], V, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(gradient, inputs[0], v, retain_graph=True)[0] for v in V]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.silu(x.clone(), inplace=True),
        lambda x: F.layer_norm(x, [3, 4]),
        lambda x: F.layer_norm(x, [4]),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.gelu(x.detach()),
        lambda x: F.gelu(x.half()),
        lambda x: torch.func.vmap(F.gelu)(x),
        lambda x: torch.func.vmap(lambda w: F.gelu(x) * w)(torch.ones(2)),
        lambda x: F.layer_norm(x[0, 0], [4], x[0, 1], x[0, 2]),
    ],
)
def test_other_calls_are_left_alone(call: Callable[[Tensor], Tensor]) -> None:
    x = _normal(2, 3, 4).requires_grad_()
    with SecondOrderRules():
        result = call(x)
    torch.testing.assert_close(result, call(x))
    assert "curvlinops" not in type(result.grad_fn).__module__


class _Checkpointed(nn.Module):
    """A block that runs again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_checkpointed_model() -> None:
    torch.manual_seed(0)
    model = _Checkpointed().double()
    data = [(_normal(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    kept, v = H.linearize(), _normal(H.shape[1])
    for _ in range(3):
        torch.testing.assert_close(kept @ v, H @ v)


class _Force(nn.Module):
    """The gradient of an energy with respect to its inputs, as networks for molecules have it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Forces of a batch."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh()], ids=lambda a: type(a).__name__)
def test_models_that_differentiate(activation: nn.Module) -> None:
    """Their Hessian asks for a third derivative, which the rules do not have."""
    torch.manual_seed(0)
    model, X, y = _Force(activation).double(), _normal(5, 3), _normal(5, 3, seed=1)
    params = dict(model.named_parameters())
    H = HessianLinearOperator(model, nn.MSELoss(), params, [(X, y)])

    def loss(flat: Tensor) -> Tensor:
        sizes = [p.numel() for p in params.values()]
        parts = {k: part.view_as(p) for (k, p), part in zip(params.items(), flat.split(sizes), strict=True)}
        return F.mse_loss(torch.func.functional_call(model, parts, (X,)), y)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    truth = torch.autograd.functional.hessian(loss, flat)
    for operator in (H, H.linearize(), H.linearize(max_memory=0)):
        torch.testing.assert_close(operator.to_dense(), truth)


def test_models_that_differentiate_a_layer_norm_are_refused() -> None:
    """PyTorch's third derivative of a layer norm is wrong."""
    torch.manual_seed(0)
    model = _Force(nn.Sequential(nn.LayerNorm(4), nn.Tanh())).double()
    H = HessianLinearOperator(model, nn.MSELoss(), list(model.parameters()), [(_normal(5, 3), _normal(5, 3, seed=1))])
    for operator in (H, H.linearize()):
        with pytest.raises(NotImplementedError, match="NativeLayerNormBackwardBackward"):
            operator @ _normal(H.shape[1])
