"""One step of learning: the product with the matrix, and what Adam makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops import LinearOperator, Space
from curvlinops.applications.checked_numbers import checked_count

#: An operator, or a function of a vector, that multiplies by the matrix to be inverted.
Matrix: TypeAlias = LinearOperator | Callable[[Any], Any]


class Format(Protocol):
    """How a vector was given, as :meth:`Space.read` tells."""

    def write(self, columns: Sequence[Tensor], space: Space) -> Any:
        """Columns-last tensors in this format."""


def product_of(matvec: Matrix, v: Sequence[Tensor], form: Format, space: Space) -> list[Tensor]:
    """The product of the matrix with a vector or columns, as columns-last tensors.

    Args:
        matvec: The matrix.
        v: What it is multiplied by, as columns-last tensors.
        form: The format in which a function gets it.
        space: The space of both.

    Raises:
        TypeError: If the matrix is neither an operator nor a function, or its answer is not made of tensors.
        ValueError: If it does not fit the space.
    """
    # A copy, since a function may write to what it gets.
    v = [part.detach().to(space.dtype, copy=True) for part in v]
    if isinstance(matvec, LinearOperator):
        space.join(matvec.domain, "matvec")
        answer = matvec @ Space.merge(v)
    elif callable(matvec):
        answer = matvec(form.write(v, space))
    else:
        raise TypeError(f"matvec: expected an operator or a function of a vector, got {type(matvec).__name__}.")
    product, _ = space.read(answer)
    if product[0].shape[-1] != v[0].shape[-1]:
        raise ValueError(f"matvec: expected {v[0].shape[-1]} columns in answer, got {product[0].shape[-1]}.")
    return product


def prepared(A: Matrix) -> Matrix:
    """The matrix ready for many products; itself where its model cannot be frozen (it closes over its parameters)."""
    try:
        return A.linearize() if isinstance(A, LinearOperator) else A
    except NotImplementedError:
        return A


def mean_dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The inner products of columns, averaged over them, summed in float64."""
    total = sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))
    return total / left[0].shape[-1]


def take_step(adam: torch.optim.Adam, value: float, v: Sequence[Tensor], cotangent: Sequence[Tensor]) -> None:
    """Take a step of Adam along the gradient of what it learns.

    Args:
        adam: The optimiser.
        value: The value of the loss.
        v: The vector as a function of what is learned.
        cotangent: The gradient with respect to v of the sum over the columns.

    Raises:
        FloatingPointError: If the value or the gradient is not finite; then nothing has changed.
    """
    learned = adam.param_groups[0]["params"]
    num_columns = v[0].shape[-1]
    pairs = [(part, along / num_columns) for part, along in zip(v, cotangent, strict=True) if part.requires_grad]
    gradients = torch.autograd.grad([part for part, _ in pairs], learned, [along for _, along in pairs])
    if not isfinite(value) or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise FloatingPointError(
            f"The auxiliary loss ({value:.3g}) or its gradient is not finite, so no step was taken: check the product "
            "with A and the direction u."
        )
    for raw, gradient in zip(learned, gradients, strict=True):
        raw.grad = gradient
    adam.step()
    adam.zero_grad()


def counted_steps(num_steps: int, progressbar: bool) -> Iterable[int]:
    """The steps of a fit, shown in a progress bar if asked for.

    Raises:
        ValueError: If their number is no integer of at least 0.
    """
    count = checked_count(num_steps, "num_steps", least=0)
    steps: Iterable[int] = tqdm(range(count), desc="Learned inverse", disable=not progressbar, leave=False)
    return steps
