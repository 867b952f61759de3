"""How each noted function uses its parameters: one function a kind, with the arguments of the function it describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops.risk.layers.convolution import ConvolutionSettings
from curvlinops.risk.layers.notes import BroadcastUse, ConvolutionUse, LinearUse, LookupUse, Use


@dataclass(frozen=True)
class Source:
    """A tracked parameter, or a view of one.

    Attributes:
        position: Position of the parameter.
        shape: Its shape.
        tensor: The tensor that the call is given.
        index: Gives the entries of the flattened parameter that the view shows; ``None`` for the parameter itself.
        is_lookup: Whether it is the output of an embedding, which may be one with a datum axis.
    """

    position: int
    shape: torch.Size
    tensor: Tensor
    index: Callable[[], Tensor] | None = None
    is_lookup: bool = False

    @property
    def is_transposed(self) -> bool:
        """Whether it is the transpose of a matrix."""
        if self.index is None or self.is_lookup or len(self.shape) != 2:
            return False
        return self.tensor.shape == self.shape[::-1] and self.tensor.stride() == self.strides[::-1]

    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """What is to be noted of a call.

    Attributes:
        uses: How it uses its parameters.
        num_leading: How many leading axes of the output can hold the datum.
        kept: Tensors that the gradients are computed from.
    """

    uses: list[Use | None]
    num_leading: int
    kept: tuple[Tensor, ...] = ()


#: Tells whether a tensor is tracked.
SourceOf = Callable[[Any], Source | None]


class Describe(Protocol):
    """Describes a call from its output and its arguments; ``None`` for options that are not known."""

    def __call__(self, source: SourceOf, output: Tensor, *args: Any, **kwargs: Any) -> Description | None:
        """What is to be noted of the call."""


def _weight(source: Source | None, input: Tensor, transposed: bool) -> Use | None:
    """A matrix, or its transpose, as the weight of a linear layer."""
    if source is None or len(source.shape) != 2 or not (source.index is None or source.is_transposed):
        return None
    return LinearUse(source.position, source.shape, input.detach(), transposed != source.is_transposed)


def broadcast(
    source: Source | None, output: Tensor, axis: int | None = None, factor: Callable[[], Tensor] | None = None
) -> Use | None:
    """The use of a parameter that is aligned with the last axes of the output, or a vector on a given axis."""
    if source is None:
        return None
    shape = source.tensor.shape
    sizes = [1] * (output.ndim - len(shape)) + list(shape)
    if axis is not None:
        sizes = [1] * output.ndim
        sizes[axis] = len(source.tensor)
    is_lookup = source.is_lookup and factor is None
    return BroadcastUse(source.position, source.shape, tuple(sizes), factor, source.index, is_lookup)


def linear(
    source: SourceOf, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Description | None:
    """`F.linear` with any number of leading axes."""
    if weight.ndim != 2 or output.ndim < 2:
        return None
    uses = [_weight(source(weight), input, False), broadcast(source(bias), output)]
    return Description(uses, output.ndim - 1, (input,))


def matmul(source: SourceOf, output: Tensor, input: Tensor, other: Tensor) -> Description | None:
    """`x @ W`."""
    if other.ndim != 2 or output.ndim < 2 or source(input) is not None:
        return None
    return Description([_weight(source(other), input, True)], output.ndim - 1, (input,))


def addmm(
    source: SourceOf, output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Description | None:
    """`torch.addmm` as Hugging Face's `Conv1D` calls it."""
    if beta != 1 or alpha != 1:
        return None
    return Description([_weight(source(mat2), mat1, True), broadcast(source(input), output)], 1, (mat1,))


def convolution(dim: int, transposed: bool) -> Describe:
    """Convolutions of one to three dimensions."""

    def describe(
        source: SourceOf,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Description | None:
        if output.ndim != dim + 2:
            return None
        dilation = _numbers(dilation, dim)
        if isinstance(padding, str):
            input, padding = _padded(input, padding, weight.shape[2:], dilation)
        settings = ConvolutionSettings(
            _numbers(stride, dim), _numbers(padding, dim), dilation, (0,) * dim, groups, False
        )
        return _convolution(source, output, input, weight, bias, settings)

    def describe_transposed(
        source: SourceOf,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Description | None:
        if output.ndim != dim + 2:
            return None
        strides, sizes, dilations, ends = (_numbers(o, dim) for o in (stride, padding, dilation, output_padding))
        settings = ConvolutionSettings(strides, sizes, dilations, ends, groups, True)
        return _convolution(source, output, input, weight, bias, settings)

    return describe_transposed if transposed else describe


def _convolution(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: ConvolutionSettings,
) -> Description:
    found = source(weight)
    whole = found is not None and found.index is None
    use = ConvolutionUse(found.position, found.shape, input.detach(), settings) if found and whole else None
    return Description([use, broadcast(source(bias), output, axis=1)], 1, (input,))


def _numbers(option: Any, dim: int) -> tuple[int, ...]:
    numbers = (option,) if isinstance(option, int) else tuple(option)
    return numbers * dim if len(numbers) == 1 else numbers


def _padded(input: Tensor, padding: str, kernel: torch.Size, dilation: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Padding given as a word, in numbers; 'same' may have one more at the end, which then goes on the input."""
    if padding == "valid":
        return input, 0
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    odd = [total % 2 for total in totals]
    if any(odd):
        input = F.pad(input.detach(), [p for extra in reversed(odd) for p in (0, extra)])
    return input, tuple(total // 2 for total in totals)


def embedding(
    source: SourceOf,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Description | None:
    """`F.embedding`; the datum can be on any axis of the indices."""
    found = source(weight)
    if found is None or found.index is not None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if input.ndim == 0:
        return None
    row = None if padding_idx is None else padding_idx % len(weight)
    return Description([LookupUse(found.position, found.shape, input, row)], input.ndim, (input,))
