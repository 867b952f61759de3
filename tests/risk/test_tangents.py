"""Each forward-mode rule of the package against the Jacobian that reverse mode gives, for every subset of tangents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlinops.risk.tangents import _RULES, TangentRules


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


QKV = [normal(2, 3, 5, 4, seed=0), normal(2, 3, 6, 4, seed=1), normal(2, 3, 6, 7, seed=2)]
SQUARE = [normal(2, 5, 4, seed=s) for s in range(3)]
BLIND = torch.tensor([[True, False, True, True, False, True], [False] * 6, *[[True] * 6] * 3])

CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "linear": (F.linear, [normal(5, 3, seed=0), normal(4, 3, seed=1), normal(4, seed=2)]),
    "linear of sequences without bias": (F.linear, [normal(2, 5, 3, seed=0), normal(4, 3, seed=1)]),
    "linear of one datum": (F.linear, [normal(3, seed=0), normal(4, 3, seed=1), normal(4, seed=2)]),
    "linear with a vector": (F.linear, [normal(5, 3, seed=0), normal(3, seed=1)]),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1),
        [normal(2, 4, 9, seed=0), normal(6, 4, 3, seed=1), normal(6, seed=2)],
    ),
    "conv2d with groups and padding by name": (
        lambda x, w: F.conv2d(x, w, padding="same", dilation=2, groups=2),
        [normal(2, 4, 6, 5, seed=0), normal(6, 2, 3, 3, seed=1)],
    ),
    "conv3d": (F.conv3d, [normal(1, 2, 4, 4, 3, seed=0), normal(3, 2, 2, 2, 2, seed=1), normal(3, seed=2)]),
    "layer norm": (
        lambda x, w, b: F.layer_norm(x, (4,), w, b, eps=1e-3),
        [normal(3, 5, 4, seed=0), normal(4, seed=1), normal(4, seed=2)],
    ),
    "layer norm over two axes": (
        lambda x, w: F.layer_norm(x, (5, 4), w),
        [normal(3, 5, 4, seed=0), normal(5, 4, seed=1)],
    ),
    "layer norm without scale": (lambda x: F.layer_norm(x, [4]), [normal(3, 4, seed=0)]),
    "embedding": (lambda w: F.embedding(torch.tensor([[1, 0], [2, 2]]), w), [normal(4, 3, seed=0)]),
    "embedding with padding": (
        lambda w: F.embedding(torch.tensor([[1, 0], [3, 2]]), w, padding_idx=-1),
        [normal(4, 3, seed=0)],
    ),
    "torch.embedding with padding": (
        lambda w: torch.embedding(w, torch.tensor([[1, 0], [3, 2]]), 0),
        [normal(4, 3, seed=0)],
    ),
    "attention": (F.scaled_dot_product_attention, QKV),
    "attention with a scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), QKV),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), SQUARE),
    "attention that may look nowhere": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=BLIND),
        QKV,
    ),
    "attention with a bias": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=normal(5, 6, seed=9)),
        QKV,
    ),
    "attention with infinite bias": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.zeros(5, 6).double().masked_fill(~BLIND, -torch.inf)
        ),
        QKV,
    ),
    "attention with a bias that has a tangent": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        [*QKV, normal(5, 6, seed=9)],
    ),
    "grouped attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [normal(1, 4, 3, 2, seed=0), normal(1, 2, 3, 2, seed=1), normal(1, 2, 3, 2, seed=2)],
    ),
}


def pushed(function: Callable[..., Tensor], inputs: list[Tensor], tangents: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The result and its tangent under the package's rules, while the graph is recorded."""
    with forward_ad.dual_level(), TangentRules(), sdpa_kernel(SDPBackend.MATH):
        leaves = [x.clone().requires_grad_() for x in inputs]
        duals = [forward_ad.make_dual(x, tangents[i]) if i in tangents else x for i, x in enumerate(leaves)]
        primal, tangent = forward_ad.unpack_dual(function(*duals))
    return primal, tangent


@pytest.mark.parametrize("name", CASES)
def test_tangents_equal_those_of_reverse_mode(name: str) -> None:
    function, inputs = CASES[name]
    with sdpa_kernel(SDPBackend.MATH):
        result = function(*inputs)
        jacobians: Any = torch.autograd.functional.jacobian(function, tuple(inputs))
    for size in range(1, len(inputs) + 1):
        for chosen in combinations(range(len(inputs)), size):
            tangents = {i: normal(*inputs[i].shape, seed=10 + i) for i in chosen}
            expected = sum((jacobians[i].flatten(result.ndim) @ tangents[i].flatten()) for i in chosen)
            primal, tangent = pushed(function, inputs, tangents)
            torch.testing.assert_close(primal, result, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_beside_the_tangents_is_right(name: str) -> None:
    """What `pull` differentiates is the function itself."""
    function, inputs = CASES[name]
    tangents = {i: normal(*x.shape, seed=10 + i) for i, x in enumerate(inputs)}
    with forward_ad.dual_level(), TangentRules(), sdpa_kernel(SDPBackend.MATH):
        leaves = [x.clone().requires_grad_() for x in inputs]
        duals = [forward_ad.make_dual(x, tangents[i]) for i, x in enumerate(leaves)]
        primal, _ = forward_ad.unpack_dual(function(*duals))
    u = normal(*primal.shape, seed=99)
    plain = [x.clone().requires_grad_() for x in inputs]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(function(*plain), plain, u)
    for actual, wanted in zip(torch.autograd.grad(primal, leaves, u), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def test_every_rule_is_tested() -> None:
    """Each function that has a rule is called by some case."""
    called = set()

    class Spy(TangentRules):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func)
            return super().__torch_function__(func, types, args, kwargs)

    for function, inputs in CASES.values():
        with forward_ad.dual_level(), Spy(), sdpa_kernel(SDPBackend.MATH):
            function(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs))
    assert set(_RULES) <= called
