"""The check that model and data repeat: what a streamed matrix needs to be one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops.risk.batches import Batch, has_rows, map_tensors, tensors_of
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.surroundings import differentiable, preserved_random_state, seed_everything

_SEEDS = (2906, 1711)


class DeterminismError(RuntimeError):
    """Two passes over the data do not give the same numbers."""


def check_deterministic(risk: EmpiricalRisk, order_matters: bool) -> None:
    """Find what makes two passes differ: dropout, batch norm, shuffling, random augmentation.

    Two passes are made under two different seeds. In the first, the model runs twice on each mini-batch: whole, and
    on its two halves under the other seed, which must agree within rounding; so must the loss, which has to be a sum
    or mean over data. The second pass only compares the data. Random states are put back at the end. Cost: two
    forwards, two passes over the loader.

    Args:
        risk: The risk to check.
        order_matters: Whether the matrix depends on the order of the data.

    Raises:
        DeterminismError: Naming the mini-batch and what differed.
        FloatingPointError: If a prediction or loss is not finite.
        NotImplementedError: If the loss is neither a sum nor a mean over data.
    """
    with preserved_random_state(risk.data, risk.device), differentiable(risk.model):
        seed_everything(_SEEDS[0])
        first = _checked_pass(risk)
        seed_everything(_SEEDS[1])
        second = [_fingerprint(batch.X, batch.y) for batch in risk.batches("checking that data repeat")]
    _compare_passes(first, second, order_matters)


def _checked_pass(risk: EmpiricalRisk) -> list[Tensor]:
    """Check each mini-batch; the fingerprints of their data."""
    prints: list[Tensor] = []
    coupled: list[int] = []
    num_data = 0
    for batch in risk.batches("checking that the model repeats"):
        # The loader goes on with the random numbers that it would have drawn without the model.
        with preserved_random_state(None, risk.device):
            whole, halves = _checked_predictions(risk, batch)
            if not _loss_is_sum(risk, batch, whole, halves):
                coupled.append(batch.index)
        if risk.num_data is not None:
            num_data += risk.batch_size(batch.X, batch.y)
        prints.append(_fingerprint(batch.X, batch.y))
    if risk.process_group is None:
        risk.check_num_data(num_data)
    is_cut = len(prints) > 1 or risk.process_group is not None
    if coupled and is_cut and risk.loss is not None:
        raise NotImplementedError(
            f"{risk.name}: the loss {risk.loss.name} of mini-batch {coupled[0]} is not the {risk.loss.reduction} over "
            "its data of something that each datum has alone (class weights of a loss that is not known? a contrast "
            "between data?), so the result would depend on how data are cut into mini-batches. Give all data in one "
            "mini-batch, set the loss's reduction attribute, or pass check_deterministic=False."
        )
    return prints


def _checked_predictions(risk: EmpiricalRisk, batch: Batch) -> tuple[Tensor, list[Tensor] | None]:
    """The prediction of a mini-batch, and of its halves where X can be cut."""
    seed_everything(_SEEDS[0] + batch.index)
    whole = risk.predict(batch.X)
    if not whole.isfinite().all():
        raise FloatingPointError(f"{risk.name}: the prediction of mini-batch {batch.index} is not finite.")
    seed_everything(_SEEDS[1] + batch.index)
    halves = _on_halves(risk, batch.X, whole)
    again = torch.cat(halves) if halves is not None else _with_company(risk, batch.X, whole)
    layers = risk.model.training_layers
    normalising = [layer for layer in layers if "Norm" in layer]
    if halves is None and normalising:
        raise DeterminismError(f"{risk.name}: batch norm in training mode mixes data: {', '.join(normalising)}.")
    if not _agree(whole, again):
        hint = f" In training mode: {', '.join(layers[:5])}; call model.eval()." if layers else ""
        raise DeterminismError(
            f"{risk.name}: two forward passes over mini-batch {batch.index}, the second on its halves under another "
            f"seed, differ by {float((whole - again).abs().max()):.2g}: the model is random, or its output for a datum "
            f"depends on the rest of the mini-batch.{hint} Pass check_deterministic=False if you want this."
        )
    return whole, halves


def _on_halves(risk: EmpiricalRisk, X: Any, whole: Tensor) -> list[Tensor] | None:
    """The predictions of two halves; ``None`` where X cannot be cut along the datum axis."""
    if len(whole) < 2 or not has_rows(X, len(whole)):
        return None
    try:
        predictions = [risk.predict(part) for part in _halved(X, len(whole))]
    except Exception:
        return None  # what goes wrong with a half says nothing about the whole
    if sum(len(p) for p in predictions) != len(whole) or predictions[0].shape[1:] != whole.shape[1:]:
        return None
    return predictions


def _with_company(risk: EmpiricalRisk, X: Any, whole: Tensor) -> Tensor:
    """The prediction with the first datum once more at the end, where halves are too small for the model."""
    if len(whole) and has_rows(X, len(whole)):
        try:
            longer = risk.predict(map_tensors(lambda t: torch.cat([t, t[:1]]), X))
        except Exception:
            longer = whole
        if longer.shape[1:] == whole.shape[1:] and len(longer) == len(whole) + 1:
            return longer[:-1]
    return risk.predict(X)


def _halved(tree: Any, size: int) -> list[Any]:
    middle = (size + 1) // 2
    return [map_tensors(lambda t: t[:middle], tree), map_tensors(lambda t: t[middle:], tree)]


def _loss_is_sum(risk: EmpiricalRisk, batch: Batch, whole: Tensor, halves: list[Tensor] | None) -> bool:
    """Whether the mini-batch's loss is finite and, for a loss whose terms are unknown, that of its halves together."""
    if risk.loss is None:
        return True
    value = risk.terms(whole, batch.X, batch.y).value().detach()
    if not value.isfinite():
        raise FloatingPointError(f"{risk.name}: the loss of mini-batch {batch.index} is not finite.")
    if risk.loss.is_known or halves is None or not has_rows(batch.y, len(whole)):
        return True
    parts = zip(halves, _halved(batch.y, len(whole)), strict=True)
    total = sum(risk.loss.terms(prediction, y, None).value() for prediction, y in parts)
    return _agree(value, torch.as_tensor(total))


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal within rounding."""
    if one.numel() == 0:
        return True
    allowed = 1e-8 if one.dtype == torch.float64 else 1e-3 if one.dtype == torch.float32 else 0.1
    return bool((one - other).abs().max() <= allowed * one.abs().max())


def _fingerprint(X: Any, y: Any) -> Tensor:
    """A number for each datum that tells it from others ``[N]``; one for all where the datum axis is unclear."""
    tensors = [t for t in (*tensors_of(X), *tensors_of(y)) if t.numel()]
    sizes = {len(t) if t.ndim else None for t in tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    prints = torch.zeros(size or 1, dtype=torch.float64)
    for t in tensors:
        # NaN marks missing values in some data sets; it is equal to itself here.
        rows = (
            t.detach().to("cpu", torch.float64).nan_to_num(nan=0.7071, posinf=1e6, neginf=-1e6).reshape(size or 1, -1)
        )
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
