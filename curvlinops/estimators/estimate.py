"""Means of samples with their standard errors, and what estimators return: the averaging half of every estimator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Rows times columns that are converted to float64 at once for inner products.
_INNER_NUMEL = 2**22


class Estimate(NamedTuple):
    """The mean of independent samples, with its standard error.

    For many samples, the mean lies within two standard errors of the truth in about 95 % of all runs.

    Attributes:
        value: The estimate.
        stderr: Its standard error, in the same shape.

    >>> float(Estimate(torch.tensor(3.0), torch.tensor(0.1)).value)
    3.0
    """

    value: Tensor
    stderr: Tensor


class EstimateWithError(NamedTuple):
    """An estimate whose samples depend on each other, with an indication of how far it is off.

    The error is a size for the root mean square of the true error, mostly within a factor of two of it. It is
    **optimistic**: samples share most of a sketch, and what they share does not show in their spread. Neither is it a
    bound, nor the width of a confidence interval, nor does it include rounding. See each estimator for its formula.

    Attributes:
        value: The estimate.
        error_estimate: Estimate of the root mean square of its error, in the same shape.

    >>> float(EstimateWithError(torch.tensor(3.0), torch.tensor(0.1)).error_estimate)
    0.10000000149011612
    """

    value: Tensor
    error_estimate: Tensor


class SampleMean:
    """The mean of samples that come in chunks, and its standard error, in float64.

    **Reference**: Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance,
    doi:10.1080/00031305.1983.10483115.

    Args:
        has_error: Whether the standard error will be asked for, which costs another sum of the size of the samples.

    >>> mean = SampleMean()
    >>> mean.add(torch.tensor([1.0, 2.0]))
    >>> mean.add(torch.tensor([3.0]))
    >>> mean.value.item()
    2.0
    """

    def __init__(self, has_error: bool = True) -> None:
        self._has_error = has_error
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, samples: Tensor) -> None:
        """Take in a chunk of samples ``[..., k]``, the last axis being that of the samples."""
        k = samples.shape[-1]
        mean = samples.mean(-1, dtype=torch.float64)
        squares = (samples - mean.unsqueeze(-1)).square().sum(-1) if self._has_error else None
        if self._mean is None:
            self._count, self._mean, self._squares = k, mean, squares
            return
        total, step = self._count + k, mean - self._mean
        self._mean = self._mean + step * (k / total)
        if self._squares is not None and squares is not None:
            self._squares = self._squares + squares + step.square() * (self._count * k / total)
        self._count = total

    @property
    def value(self) -> Tensor:
        """The mean ``[...]``."""
        if self._mean is None:
            raise ValueError("There are no samples to average.")
        return self._mean

    @property
    def stderr(self) -> Tensor:
        """The standard error of the mean ``[...]``: the root of Σ (x - mean)² / (k (k - 1))."""
        if self._squares is None or self._count < 2:
            raise ValueError(f"A standard error needs at least 2 samples, got {self._count}.")
        return (self._squares / (self._count * (self._count - 1))).sqrt()


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """The inner products Xᵀ Y of columns ``[D, k]`` and ``[D, l]`` in float64, a few rows at a time."""
    rows = max(1, _INNER_NUMEL // max(X.shape[1], Y.shape[1], 1))
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    for x, y in zip(X.split(rows), Y.split(rows), strict=True):
        total += x.double().T @ y.double()
    return total


def independent(mean: SampleMean, dtype: torch.dtype, return_stderr: bool) -> Tensor | Estimate:
    """What an estimator returns whose samples are independent."""
    value = rounded(mean.value, dtype)
    return Estimate(value, rounded(mean.stderr, dtype)) if return_stderr else value


def dependent(value: Tensor, error: Tensor | None, dtype: torch.dtype) -> Tensor | EstimateWithError:
    """What an estimator returns whose samples depend on each other; the bare value where no error is wanted."""
    value = rounded(value, dtype)
    return value if error is None else EstimateWithError(value, rounded(error, dtype))


def averaged(
    samples: Tensor, dtype: torch.dtype, return_stderr: bool, share: float = 0.5
) -> Tensor | EstimateWithError:
    """The mean of samples ``[..., k]`` that depend on each other, its error being their spread / k^share.

    Args:
        samples: The samples.
        dtype: Of the operator.
        return_stderr: Whether the error is wanted.
        share: 1/2 as if the samples were independent, 0 as if they were all the same.
    """
    mean = SampleMean(return_stderr)
    mean.add(samples)
    error = mean.stderr * samples.shape[-1] ** (0.5 - share) if return_stderr else None
    return dependent(mean.value, error, dtype)


def exact(value: Tensor, dtype: torch.dtype, return_stderr: bool) -> Tensor | EstimateWithError:
    """What an estimator returns where as many products as it may make give the exact answer."""
    return dependent(value, torch.zeros_like(value) if return_stderr else None, dtype)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A number in the dtype of the operator.

    Raises:
        FloatingPointError: If it is not finite there.
    """
    result = value.to(dtype)
    if not bool(result.isfinite().all()):
        raise FloatingPointError(
            f"The estimate, of size {float(value.abs().max()):.1e}, is not finite in {dtype}. Use an operator of "
            "higher precision."
        )
    return result
