"""Which losses are known, and their terms, gradients, Hessians, square roots and samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvlinops.risk.losses.base import Loss, Terms
from curvlinops.risk.losses.bce import BCEWithLogits
from curvlinops.risk.losses.cross_entropy import CrossEntropy
from curvlinops.risk.losses.generic import GenericLoss
from curvlinops.risk.losses.mse import SquaredError

__all__ = ["Loss", "Terms", "as_loss"]

_KNOWN: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.MSELoss: SquaredError,
    nn.BCEWithLogitsLoss: BCEWithLogits,
}
_FUNCTIONS: list[tuple[Any, Callable[..., Callable[[Tensor, Any], Tensor]]]] = [
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.mse_loss, nn.MSELoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
]


def as_loss(loss_func: Callable[[Tensor, Any], Tensor]) -> Loss:
    """The terms of a loss function: of its own class where it is known, else by automatic differentiation.

    A subclass of a known loss is known as long as it keeps its ``forward``, and so is a function of
    ``torch.nn.functional``, also with options that ``functools.partial`` gives it by keyword.

    Raises:
        TypeError: If the loss cannot be called.
        NotImplementedError: If its reduction is neither 'mean' nor 'sum'.
    """
    if not callable(loss_func):
        raise TypeError(f"Expected a loss function (prediction, y) -> scalar, got {type(loss_func).__name__}.")
    loss_func = _as_module(loss_func)
    reduction = getattr(loss_func, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise NotImplementedError(
            f"{type(loss_func).__name__} has reduction={reduction!r}: only 'mean' and 'sum' are supported."
        )
    for known, make in _KNOWN.items():
        if isinstance(loss_func, known) and type(loss_func).forward is known.forward:
            return make(loss_func)
    return GenericLoss(loss_func, reduction)


def _as_module(loss_func: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """The module of a known function; any other loss as it is."""
    called: Any = loss_func
    options: dict[str, Any] = {}
    if isinstance(loss_func, partial) and not loss_func.args:
        called, options = loss_func.func, loss_func.keywords
    for function, module in _FUNCTIONS:
        if called is function:
            return module(**options)
    return loss_func
