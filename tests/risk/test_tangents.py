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

from curvlinops.risk.tangents import _RULES, TangentRules, TooLargeError


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
    "layer norm with a shift alone": (
        lambda x, b: F.layer_norm(x, (4,), None, b),
        [normal(3, 5, 4, seed=0), normal(4, seed=1)],
    ),
    "layer norm of one row": (
        lambda x, w, b: F.layer_norm(x, (4,), w, b),
        [normal(4, seed=0), normal(4, seed=1), normal(4, seed=2)],
    ),
    "layer norm of a transpose": (
        lambda x, w, b: F.layer_norm(x.mT, (4,), w, b),
        [normal(3, 4, 5, seed=0), normal(4, seed=1), normal(4, seed=2)],
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
    "gelu": (F.gelu, [normal(3, 4, seed=0)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [normal(3, 4, seed=0)]),
    "gelu far out": (F.gelu, [40 * normal(3, 4, seed=0)]),
    "silu": (F.silu, [normal(3, 4, seed=0)]),
    "silu far out": (F.silu, [40 * normal(3, 4, seed=0)]),
    "silu in place": (lambda x: F.silu(x * 1.0, inplace=True), [normal(3, 4, seed=0)]),
    "attention": (F.scaled_dot_product_attention, QKV),
    "attention with a scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), QKV),
    "attention without batches": (F.scaled_dot_product_attention, [x[0, 0] for x in QKV]),
    "attention that broadcasts": (F.scaled_dot_product_attention, [QKV[0], QKV[1][:1, :1], QKV[2][:, :1]]),
    "attention of transposes": (
        lambda q, k, v: F.scaled_dot_product_attention(q.mT, k.mT, v.mT),
        [x.mT.contiguous() for x in QKV],
    ),
    "attention to itself": (lambda x: F.scaled_dot_product_attention(x, x, x), SQUARE[:1]),
    "causal attention with a scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        SQUARE,
    ),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in CASES if "bias" not in n and "nowhere" not in n])
def test_tangents_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """They have the dtype of the result, and its accuracy."""
    function, inputs = CASES[name]
    tangents = {i: normal(*x.shape, seed=10 + i) for i, x in enumerate(inputs)}
    low = [x.to(dtype) for x in inputs]
    _, expected = pushed(function, [x.double() for x in low], {i: t.to(dtype).double() for i, t in tangents.items()})
    primal, tangent = pushed(function, low, {i: t.to(dtype) for i, t in tangents.items()})
    assert primal.dtype == tangent.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 0.05
    assert (tangent.double() - expected).norm() <= allowed * expected.norm()


def test_a_forward_that_holds_too_much_is_stopped() -> None:
    """What the calls return is counted, views and all else that has no memory of its own are not."""
    x = torch.ones(100, dtype=torch.float64)
    with TangentRules(max_bytes=1600):
        y = (x + 1).view(10, 10).T[:5]
        y = y * 2
        with pytest.raises(TooLargeError):
            x + 2
    with TangentRules(max_bytes=None):
        x + 2


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
