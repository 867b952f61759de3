"""Eigendecompositions and inverses of many small symmetric matrices: together where they have one size, and robust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlinops.operators.space import working_dtype

_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

#: Entries of the matrices that are decomposed in one call; a CPU gains nothing by it but fewer calls.
_STACK_NUMEL = {"cpu": 2**16, "cuda": 2**26}


class Decomposition(NamedTuple):
    """What is done to a stack of matrices ``[B, n, n]``.

    Attributes:
        attempt: Gives tensors ``[B, ...]``, or None where the precision does not suffice.
        failure: The error that says so.
    """

    attempt: Callable[[Tensor], tuple[Tensor, ...] | None]
    failure: Callable[[Tensor], Exception]


def symmetric_eigen(matrices: Sequence[Tensor], retry_double_precision: bool = True) -> list[tuple[Tensor, Tensor]]:
    """The eigenvalues, ascending, and eigenvectors of symmetric matrices.

    Matrices of one size are stacked and decomposed together. Half precision is decomposed in float32. What fails in
    float32 is repeated in float64; what does not fit into the memory of a GPU is done on the CPU.

    Cost: O(n³) a matrix.

    Args:
        matrices: Stacks of symmetric matrices ``[G, n, n]``, the size of each its own.
        retry_double_precision: Whether to repeat in float64 what fails in float32.

    Returns:
        Eigenvalues ``[G, n]`` and eigenvectors ``[G, n, n]`` as columns, for each stack.

    Raises:
        ValueError: If a matrix has entries that are not finite.
        torch.linalg.LinAlgError: If a decomposition fails in the last precision that is allowed.

    >>> [(values, vectors)] = symmetric_eigen([torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])])
    >>> [round(value, 4) for value in values[0].tolist()]
    [1.0, 3.0]
    """
    found = _in_stacks(matrices, EIGEN, retry_double_precision)
    return [(values, vectors) for values, vectors in found]


def inverses_of_positive(matrices: Sequence[Tensor], retry_double_precision: bool = True) -> list[Tensor]:
    """The inverses of symmetric positive definite matrices, exactly symmetric; see :func:`symmetric_eigen`.

    Cost: O(n³) a matrix, by Cholesky's decomposition.

    Args:
        matrices: Stacks of matrices ``[G, n, n]``, the size of each its own.
        retry_double_precision: Whether to repeat in float64 what fails in float32.

    Returns:
        The inverses ``[G, n, n]``, for each stack.

    Raises:
        ValueError: If a matrix is not positive definite, or has entries that are not finite.

    >>> inverses_of_positive([torch.tensor([[[4.0]], [[16.0]]])])[0].flatten().tolist()
    [0.25, 0.0625]
    """
    return [inverse for (inverse,) in _in_stacks(matrices, INVERSE, retry_double_precision)]


def choleskys(matrices: Sequence[Tensor], retry_double_precision: bool = True) -> list[Tensor]:
    """The Cholesky factors of symmetric positive definite matrices; see :func:`inverses_of_positive`.

    Raises:
        ValueError: If a matrix is not positive definite, or has entries that are not finite.

    >>> choleskys([torch.tensor([[[4.0]]])])[0].item()
    2.0
    """
    return [lower for (lower,) in _in_stacks(matrices, CHOLESKY, retry_double_precision)]


# -- stacks ------------------------------------------------------------------------------------------------------------


def _in_stacks(matrices: Sequence[Tensor], decompose: Decomposition, retry: bool) -> list[tuple[Tensor, ...]]:
    """Decompose matrices of one size, dtype and device together, as many as the cap on a stack allows."""
    for number, matrix in enumerate(matrices):
        _check(matrix, number)
    results: list[tuple[Tensor, ...]] = [()] * len(matrices)
    for numbers in _stacks(matrices):
        chosen = [matrices[i] for i in numbers]
        stack = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
        found = _robust(stack.to(working_dtype(stack.dtype)), decompose, retry)
        cut = [part.split([len(matrix) for matrix in chosen]) for part in found]
        for position, number in enumerate(numbers):
            # Not a view: a factor that is kept alone must not keep the whole stack.
            parts = [part[position] for part in cut]
            results[number] = tuple(parts if len(chosen) == 1 else [part.clone() for part in parts])
    return results


def _stacks(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the matrices that are decomposed together."""
    alike: dict[tuple[int, torch.dtype, torch.device], list[list[int]]] = {}
    for number, matrix in enumerate(matrices):
        stacks = alike.setdefault((matrix.shape[-1], matrix.dtype, matrix.device), [[]])
        held = sum(matrices[i].numel() for i in stacks[-1])
        if stacks[-1] and held + matrix.numel() > _STACK_NUMEL.get(matrix.device.type, 2**26):
            stacks.append([])
        stacks[-1].append(number)
    return [stack for stacks in alike.values() for stack in stacks]


def _check(matrix: Tensor, number: int) -> None:
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"Matrix {number}: expected a stack [G, n, n] of square matrices, got {list(matrix.shape)}.")
    if not are_finite(matrix):
        count = int((~matrix.isfinite()).sum())
        raise ValueError(
            f"Matrix {number} of shape {list(matrix.shape)} has {count} entries that are not finite. Look at the data "
            "and the parameters that it was computed from."
        )


# -- one stack ---------------------------------------------------------------------------------------------------------


def _robust(stack: Tensor, decompose: Decomposition, retry: bool) -> tuple[Tensor, ...]:
    """Decompose; in float64 where float32 fails, and on the CPU where the GPU's memory does not suffice."""
    try:
        return _with_retry(stack, decompose, retry)
    except torch.OutOfMemoryError:
        if stack.device.type == "cpu":
            raise
    # Outside of the handler, which would keep the frames of the failure and the memory that they hold.
    return tuple(part.to(stack.device) for part in _with_retry(stack.cpu(), decompose, retry))


def _with_retry(stack: Tensor, decompose: Decomposition, retry: bool) -> tuple[Tensor, ...]:
    found = decompose.attempt(stack)
    if found is None and retry and stack.dtype != torch.float64:
        found = decompose.attempt(stack.double())
        # What is finite in float64 may be beyond the range of float32.
        found = None if found is None else tuple(part.to(stack.dtype) for part in found)
        found = found if found is not None and all(map(are_finite, found)) else None
    if found is None:
        raise decompose.failure(stack)
    return found


def _eigen(stack: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(stack)
    except _LinAlgError:
        return None
    return (values, vectors) if are_finite(values) and are_finite(vectors) else None


def _eigen_failure(stack: Tensor) -> Exception:
    return _LinAlgError(
        f"The eigendecomposition of matrices of shape {list(stack.shape)} in {stack.dtype} does not converge. Use "
        "float64, or look whether the entries are of very different sizes."
    )


def _cholesky(stack: Tensor) -> tuple[Tensor] | None:
    lower, failed = torch.linalg.cholesky_ex(stack)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    # Pivots that differ by more than the precision show a matrix that is singular but for rounding.
    is_regular = pivots.amin(-1).square() > 4 * torch.finfo(stack.dtype).eps * pivots.amax(-1).square()
    return (lower,) if bool(((failed == 0) & is_regular).all()) else None


def _inverse_of_positive(stack: Tensor) -> tuple[Tensor] | None:
    found = _cholesky(stack)
    if found is None:
        return None
    inverse = torch.cholesky_inverse(found[0])  # symmetric to the bit: one half is the other's mirror image
    return (inverse,) if are_finite(inverse) else None


def are_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; their sum mostly tells, at a fraction of the cost."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _inverse_failure(stack: Tensor) -> Exception:
    values = torch.linalg.eigvalsh(stack.double())
    worst = values.amin(-1).argmin()
    return ValueError(
        f"A matrix of size {stack.shape[-1]} is singular or not positive definite in {stack.dtype}: its smallest "
        f"eigenvalue is {float(values[worst].min()):.2e}, its largest {float(values[worst].max()):.2e}. Pass a larger "
        "damping."
    )


EIGEN = Decomposition(_eigen, _eigen_failure)
CHOLESKY = Decomposition(_cholesky, _inverse_failure)
INVERSE = Decomposition(_inverse_of_positive, _inverse_failure)
