"""The check that model and data repeat: what a streamed matrix needs to be one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlinops.risk.batches import Batch, map_tensors, tensors_of
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.surroundings import differentiable, preserved_random_state, seed_everything

_SEEDS = (2906, 1711)


class DeterminismError(RuntimeError):
    """Two passes over the data do not give the same numbers."""


def check_deterministic(risk: EmpiricalRisk, order_matters: bool) -> None:
    """Find what makes two passes differ: dropout, batch norm, shuffling, random augmentation.

    Two passes are made under two different seeds. In the first, the model runs twice on each mini-batch: whole, and
    on its two halves under the other seed, which must agree within rounding. The second only compares the data.
    Random states are put back at the end. Cost: two forwards, two passes over the loader.

    Args:
        risk: The risk to check.
        order_matters: Whether the matrix depends on the order of the data.

    Raises:
        DeterminismError: Naming the mini-batch and what differed.
    """
    with preserved_random_state(risk.data, risk.device), differentiable(risk.model), torch.no_grad():
        seed_everything(_SEEDS[0])
        first = [_fingerprint(batch.X, batch.y) for batch in _checked_batches(risk)]
        seed_everything(_SEEDS[1])
        second = [_fingerprint(batch.X, batch.y) for batch in risk.batches("checking that data repeat")]
    _compare_passes(first, second, order_matters)


def _checked_batches(risk: EmpiricalRisk) -> Iterator[Batch]:
    num_data = 0
    for batch in risk.batches("checking that the model repeats"):
        _check_model(risk, batch.index, batch.X)
        if risk.num_data is not None:
            num_data += risk.batch_size(batch.X, batch.y)
        yield batch
    if risk.num_data is not None and risk.process_group is None and num_data != risk.num_data:
        raise ValueError(f"num_data={risk.num_data}, but the mini-batches hold {num_data} data.")


def _check_model(risk: EmpiricalRisk, index: int, X: Any) -> None:
    state = torch.get_rng_state()
    seed_everything(_SEEDS[0] + index)
    whole = risk.model(risk.model.params, X)
    if not whole.isfinite().all():
        raise FloatingPointError(f"{risk.name}: the prediction of mini-batch {index} is not finite.")
    seed_everything(_SEEDS[1] + index)
    halves = _on_halves(risk, X, whole)
    again = risk.model(risk.model.params, X) if halves is None else halves
    normalising = [layer for layer in risk.model.training_layers if "Norm" in layer]
    if halves is None and normalising:
        raise DeterminismError(f"{risk.name}: batch norm in training mode mixes data: {', '.join(normalising)}.")
    torch.set_rng_state(state)
    difference = float((whole - again).abs().max()) if whole.numel() else 0.0
    if difference > _rounding(whole):
        layers = risk.model.training_layers
        hint = f" In training mode: {', '.join(layers[:5])}; call model.eval()." if layers else ""
        raise DeterminismError(
            f"{risk.name}: two forward passes over mini-batch {index}, the second on its halves under another seed, "
            f"differ by {difference:.2g}: the model is random, or its output for a datum depends on the rest of the "
            f"mini-batch.{hint} Pass check_deterministic=False if you want this."
        )


def _on_halves(risk: EmpiricalRisk, X: Any, whole: Tensor) -> Tensor | None:
    """The prediction put together from two halves; ``None`` where X cannot be cut along the datum axis."""
    size = len(whole)
    if size < 2 or any(t.ndim == 0 or len(t) != size for t in tensors_of(X)):
        return None
    middle = (size + 1) // 2
    parts = [map_tensors(lambda t: t[:middle], X), map_tensors(lambda t: t[middle:], X)]
    try:
        predictions = [risk.model(risk.model.params, part) for part in parts]
    except (RuntimeError, ValueError, IndexError):
        return None
    if [len(p) for p in predictions] != [middle, size - middle] or predictions[0].shape[1:] != whole.shape[1:]:
        return None
    return torch.cat(predictions)


def _rounding(prediction: Tensor) -> float:
    scale = 1e-8 if prediction.dtype == torch.float64 else 1e-3 if prediction.dtype == torch.float32 else 0.1
    return scale * float(prediction.abs().max())


def _fingerprint(X: Any, y: Any) -> Tensor:
    """A number for each datum that tells it from others ``[N]``; one for all where the datum axis is unclear."""
    tensors = [t for t in (*tensors_of(X), *tensors_of(y)) if t.numel()]
    sizes = {len(t) if t.ndim else None for t in tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    prints = torch.zeros(size or 1, dtype=torch.float64)
    for t in tensors:
        rows = t.detach().to("cpu", torch.float64).reshape(size or 1, -1)
        waves = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64)
        prints += (rows * (1.0 + (0.37 * waves).sin())).sum(1) + 0.5 * prints
    return prints


def _compare_passes(first: list[Tensor], second: list[Tensor], order_matters: bool) -> None:
    same = len(first) == len(second)
    differing = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a.shape != b.shape or not torch.equal(a, b)),
        None if same else min(len(first), len(second)),
    )
    if differing is None:
        return
    one, other = torch.cat(first).sort().values, torch.cat(second).sort().values
    shuffled = one.shape == other.shape and torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    if not shuffled:
        raise DeterminismError(
            f"Two passes over the data give different data, first in mini-batch {differing}: random augmentation, or "
            "shuffling with drop_last=True? Every product would be of another matrix. Fix the data, or pass "
            "check_deterministic=False if you want this."
        )
    if order_matters:
        raise DeterminismError(
            f"Two passes give the data in different order, first in mini-batch {differing}: this matrix depends on "
            "the order (its random numbers or rows are assigned in turn). Load with shuffle=False."
        )
