"""How normalisations, sums and products use parameters that are broadcast along the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops.risk.layers.kinds import Description, Source, SourceOf, broadcast
from curvlinops.risk.losses.base import at_least_float32


def _normalized(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    axis: int | None,
) -> Description:
    """Scale and shift after a normalisation; the axis of the channels is given where they are not the last axes."""
    x = input.detach()

    def factor() -> Tensor:
        with torch.no_grad():
            return normalize(at_least_float32(x))

    uses = [broadcast(source(weight), output, axis, factor), broadcast(source(bias), output, axis)]
    num_trailing = output.ndim - 1 if axis == 1 else (axis or 1)
    return Description(uses, output.ndim - num_trailing, (input,))


def layer_norm(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Description | None:
    """`F.layer_norm`."""
    shape = list(normalized_shape)
    if output.ndim == len(shape):
        return None
    found = _normalized(source, output, input, weight, bias, lambda x: F.layer_norm(x, shape, None, None, eps), None)
    return Description(found.uses, output.ndim - len(shape), found.kept)


def rms_norm(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Description | None:
    """`F.rms_norm`, whose default ``eps`` follows the input's dtype."""
    shape = list(normalized_shape)
    if output.ndim == len(shape):
        return None
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    found = _normalized(source, output, input, weight, None, lambda x: F.rms_norm(x, shape, None, eps), None)
    return Description(found.uses, output.ndim - len(shape), found.kept)


def batch_norm(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Description | None:
    """`F.batch_norm` with running statistics, which does not mix data."""
    if training or running_mean is None or running_var is None:
        return None
    mean, var = at_least_float32(running_mean), at_least_float32(running_var)
    found = _normalized(
        source, output, input, weight, bias, lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps), 1
    )
    return Description(found.uses, 1, (input, running_mean, running_var))


def group_norm(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Description | None:
    """`F.group_norm`."""
    return _normalized(source, output, input, weight, bias, lambda x: F.group_norm(x, num_groups, None, None, eps), 1)


def instance_norm(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Description | None:
    """`F.instance_norm` with the statistics of the input."""
    if not use_input_stats or running_mean is not None or running_var is not None:
        return None
    normalize = lambda x: F.instance_norm(x, None, None, None, None, True, 0.0, eps)  # noqa: E731
    return _normalized(source, output, input, weight, bias, normalize, 1)


def add(source: SourceOf, output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> Description | None:
    """An addend that is broadcast along the data."""
    pair = _parameter_and_other(source, input, other)
    if pair is None or alpha != 1 or not _is_enlarged(pair[0], output):
        return None
    return Description([broadcast(pair[0], output)], max(1, output.ndim - 1))


def multiply(source: SourceOf, output: Tensor, input: Any, other: Any) -> Description | None:
    """A factor that is broadcast along the data."""
    pair = _parameter_and_other(source, input, other)
    if pair is None or not _is_enlarged(pair[0], output):
        return None
    x = pair[1].detach()
    return Description([broadcast(pair[0], output, factor=lambda: at_least_float32(x))], max(1, output.ndim - 1), (x,))


def expand(source: SourceOf, output: Tensor, input: Tensor, *sizes: Any) -> Description | None:
    """A parameter that gets its datum axis by repetition, as class tokens do."""
    found = source(input)
    if found is None or not _is_enlarged(found, output):
        return None
    padded = [1] * (output.ndim - input.ndim) + list(input.shape)
    if any(size not in (1, new) for size, new in zip(padded, output.shape, strict=True)):
        return None
    return Description([broadcast(found, output)], max(1, output.ndim - 1))


def _parameter_and_other(source: SourceOf, input: Any, other: Any) -> tuple[Source, Tensor] | None:
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return None
    first, second = source(input), source(other)
    # The sum of a position embedding [1, T] and a token embedding [N, T]: the smaller one is broadcast.
    if first is not None and second is not None and first.tensor.numel() != second.tensor.numel():
        smaller = first if first.tensor.numel() < second.tensor.numel() else second
        larger = second if smaller is first else first
        return (smaller, larger.tensor) if larger.is_lookup else None
    if (first is None) == (second is None):
        return None
    return (first, other) if first is not None else (second, input)  # type: ignore[return-value]


def _is_enlarged(source: Source, output: Tensor) -> bool:
    return output.numel() > source.tensor.numel() or (not source.is_lookup and output.ndim > source.tensor.ndim)
