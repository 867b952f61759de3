"""Checks that the ways through a network agree, since they can differ without a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from curvlinops.risk.graph import custom_functions, named, operations_in
from curvlinops.risk.linearization import Linearization
from curvlinops.risk.losses.base import at_least_float32
from curvlinops.risk.model import FunctionalModel
from curvlinops.risk.second_order import SecondOrder


def disagree(U: Tensor, JV: Tensor, V: Sequence[Tensor], R: Sequence[Tensor]) -> Tensor:
    """Whether ⟨U, push V⟩ = ⟨pull U, V⟩ fails in any column, as a boolean tensor; costs a few inner products.

    Args:
        U: What was pulled back ``[*out, K]``.
        JV: What was pushed forward ``[*out, K]``.
        V: Columns of the parameters ``[*shape, K]``.
        R: What `pull` gave for U ``[*shape, K]``.
    """
    coarsest = coarsest_dtype(U, *V)
    difference = (_inner([U], [JV]) - _inner(V, R)).abs()
    sizes = (_inner([U], [U]) * _inner([JV], [JV])).sqrt()
    failed = difference > tolerance(coarsest, U.device) * sizes
    if U.device.type == "cpu" and not failed.any():
        return failed.any()
    # Long vectors that are nearly orthogonal leave a difference by rounding alone.
    rounding = 64 * torch.finfo(coarsest).eps * (_inner(V, V) * _inner(R, R)).sqrt()
    return (difference > tolerance(coarsest, U.device) * sizes + rounding).any()


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Inner products of the columns ``[K]``."""
    return _sum_of(_columnwise(at_least_float32(a), at_least_float32(b)) for a, b in zip(one, other, strict=True))


def _columnwise(a: Tensor, b: Tensor) -> Tensor:
    num_columns = a.shape[-1]
    rows, columns = a.movedim(-1, 0).reshape(num_columns, 1, -1), b.movedim(-1, 0).reshape(num_columns, -1, 1)
    return torch.bmm(rows, columns).flatten()  # without an elementwise product in memory


def _sum_of(values: Iterator[Tensor]) -> Tensor:
    total: Tensor = torch.stack(list(values)).sum(0)
    return total


def coarsest_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that rounds most."""
    return max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference of two ways through a network that rounding may explain."""
    if dtype == torch.float64:
        return 1e-6
    if dtype == torch.float32:
        return 2e-2 if device.type == "cuda" else 2e-3  # TF32 on the GPU
    return 0.2


def check_by_difference(model: FunctionalModel, X: Any, linearization: Linearization) -> None:
    """Compare `push` with a central difference of the model, in a direction of the range of `pull`.

    Cost: a product and two forwards, once.

    Raises:
        NotImplementedError: If the two differ.
    """
    dtype = linearization.output.dtype
    if coarsest_dtype(linearization.output, *model.params) in (torch.bfloat16, torch.float16):
        return
    generator = torch.Generator(linearization.output.device).manual_seed(0)
    u = torch.randn(linearization.output.shape, dtype=dtype, device=linearization.output.device, generator=generator)
    v = [r.squeeze(-1) for r in linearization.pull(u.unsqueeze(-1))]
    pushed = linearization.push([r.unsqueeze(-1) for r in v]).squeeze(-1)
    if not _matches([pushed], v, model, lambda values: [model(values, X).detach()], linearization.output):
        raise NotImplementedError(
            "Double backward and a central difference of the model disagree, so no product would be right. Look for "
            "no_grad() or detach() sections, gradient hooks, autocast or randomness (dropout) inside of the model, or "
            "an autograd function with a "
            f"backward that cannot be differentiated{named(linearization.prediction)}."
        )


def check_hessian_by_difference(model: FunctionalModel, second_order: SecondOrder, gradient: Any) -> None:
    """Compare the Hessian with a central difference of the gradient, where there is reason to doubt it.

    Cost: a product and some gradients, once, and only for models with custom autograd functions or with operations
    of PyTorch whose double backward is known to be wrong.

    Raises:
        NotImplementedError: If the two differ.
    """
    prediction = second_order.prediction
    doubtful = [*custom_functions(prediction), *operations_in(prediction, _WRONG_DOUBLE_BACKWARD)]
    if not doubtful:
        return
    if coarsest_dtype(prediction, *model.params) in (torch.bfloat16, torch.float16):
        return
    v = second_order.gradient
    product = [r.squeeze(-1) for r in second_order([g.unsqueeze(-1) for g in v])]
    if not _matches(product, v, model, gradient, torch.cat([g.flatten() for g in v])):
        raise NotImplementedError(
            f"The Hessian and a central difference of the gradient disagree (look at: {', '.join(doubtful)}): the "
            "backward of a custom autograd function must itself be written with differentiable operations on saved "
            "tensors; weight_norm must be written out."
        )


#: The fused kernel of weight_norm, on the CPU; and a third derivative, of models that differentiate a layer norm.
_WRONG_DOUBLE_BACKWARD = ("WeightNormInterface", "NativeLayerNormBackwardBackward")


def _matches(
    derivative: Sequence[Tensor], v: Sequence[Tensor], model: FunctionalModel, function: Any, scale: Tensor
) -> bool:
    """Whether a derivative along v equals a central difference for one of several step sizes, in each tensor."""
    length = _norm(v)
    if length == 0:
        return True
    eps = torch.finfo(scale.dtype).eps
    allowed = 1e-3 if scale.dtype == torch.float64 else 3e-2
    for power in (1 / 3, 1 / 2, 1 / 4):
        step = eps**power * (1 + _norm([p.detach() for p in model.params])) / length
        rounding = 8 * eps * _norm([scale]) / step
        points = zip(_at(model, v, step, function), _at(model, v, -step, function), derivative, strict=True)
        errors = [(_norm([(plus - minus) / (2 * step) - d]), _norm([d])) for plus, minus, d in points]
        if all(error <= allowed * size + rounding for error, size in errors):
            return True
    return False


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(get_total_norm([t.double() for t in tensors]))


def _at(model: FunctionalModel, v: Sequence[Tensor], step: float, function: Any) -> list[Tensor]:
    with _shifted(model, v, step) as values:
        return [t.detach() for t in function(values)]


@contextmanager
def _shifted(model: FunctionalModel, v: Sequence[Tensor], step: float) -> Iterator[list[Tensor]]:
    """The parameter values moved along v; a closure's own tensors point to other memory for a while."""
    moved = [p.detach() + step * direction for p, direction in zip(model.params, v, strict=True)]
    if not model.is_closure:
        yield [m.requires_grad_() for m in moved]
        return
    kept = [p.data for p in model.params]
    try:
        for p, m in zip(model.params, moved, strict=True):
            p.data = m
        yield list(model.params)
    finally:
        for p, data in zip(model.params, kept, strict=True):
            p.data = data
