"""Random vectors from generators of their own, the same however many are drawn together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from curvlinops.operators.sampling import generator_for as generator_for
from curvlinops.operators.space import working_dtype

#: Distributions of random vectors: independent signs, independent standard normal numbers, uniform on the sphere of
#: radius √D.
DISTRIBUTIONS = ("rademacher", "normal", "sphere")
#: The seed of every random method, unless another is given.
DEFAULT_SEED = 2147483647


def check_distribution(distribution: str) -> None:
    """Refuse a distribution that is not known."""
    if distribution not in DISTRIBUTIONS:
        known = ", ".join(repr(d) for d in DISTRIBUTIONS)
        raise ValueError(f"distribution: expected one of {known}, got {distribution!r}.")


def draw_columns(numel: int, distribution: str, generators: Iterator[Generator], dtype: torch.dtype) -> Tensor:
    """Random columns v with E[v vᵀ] = I, one from each generator, in the working dtype.

    Args:
        numel: Number of entries of a column, D.
        distribution: One of :data:`DISTRIBUTIONS`.
        generators: Where the numbers of each column come from. One draw a column: a draw of many numbers is not the
            sequence of several draws of fewer.
        dtype: Dtype of the columns; half precision is drawn in float32.

    Returns:
        The columns ``[D, K]``.
    """
    rows = []
    for generator in generators:
        row = torch.empty(numel, dtype=working_dtype(dtype), device=generator.device)
        if distribution == "rademacher":
            row.random_(0, 2, generator=generator).mul_(2).sub_(1)
        else:
            row.normal_(generator=generator)
        if distribution == "sphere":
            row.mul_(numel**0.5 / torch.linalg.vector_norm(row))
        rows.append(row)
    return torch.stack(rows).T
