"""Traces of the diagonal blocks: which tensor of the parameters carries the curvature."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvlinops.estimators.estimate import Estimate, independent
from curvlinops.estimators.hutchinson import checked_num_probes, mean_of
from curvlinops.estimators.probes import Sampler
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.space import Space
from curvlinops.solvers.random_vectors import DEFAULT_SEED


def block_trace_samples(V: Tensor, AV: Tensor, space: Space) -> Tensor:
    """One sample vᵀA v, summed over the entries of each tensor of a space, for each probe ``[blocks, k]``."""
    return torch.stack([part.sum(0, dtype=torch.float64) for part in (V * AV).split(space.sizes)])


def block_traces(
    A: LinearOperator | Tensor,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    seed: int = DEFAULT_SEED,
    generator: Generator | None = None,
    progressbar: bool = False,
    return_stderr: bool = False,
    chunk_size: int | None = None,
) -> dict[str, Tensor] | dict[str, Estimate] | list[Tensor] | list[Estimate]:
    r"""Estimate the trace of each diagonal block of a square matrix, one for each tensor of its vectors.

    The block of a tensor with the index set b has the estimate mean of :math:`\sum_{i \in b} v_i (A v)_i` over random
    vectors v, all blocks from the same products. Their sum is :func:`hutchinson_trace` for the same vectors. Unbiased
    for every square matrix; what couples a tensor to the others adds to the variance.

    **Cost**: ``num_matvecs`` products, whatever the number of blocks, and the memory of one chunk.

    **Reference**: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines, doi:10.1080/03610919008812866.

    Args:
        A: A square operator, or a matrix ``[D, D]``, which is one block.
        num_matvecs: Number of products with vectors.
        distribution: Of the vectors: ``"rademacher"`` (signs), ``"normal"``, or ``"sphere"`` (uniform on the sphere of
            radius √D).
        seed: Seed of the vectors; the same seed gives the same estimate.
        generator: Drawn from in place of a new one with this seed, so that successive calls are independent; it must
            live on the device of A.
        progressbar: Whether to show progress over the chunks.
        return_stderr: Whether to return an :class:`Estimate` with the standard error of each trace, for which two
            vectors are needed.
        chunk_size: Vectors that are multiplied at once; by default as many as fit into 2²⁶ numbers. It changes the
            estimate by rounding only.

    Returns:
        The estimates, tensors without axes in the dtype of A, by the names of the tensors where they have names, else
        as a list in their order; with ``return_stderr`` pairs of estimate and error.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If A is not square, or maps to another space, or another argument is out of range.
        FloatingPointError: If a product is not finite.

    >>> from curvlinops import Diagonal
    >>> A = Diagonal({"weight": torch.ones(2, 3), "bias": torch.tensor([2.0, 5.0])})
    >>> {name: trace.item() for name, trace in block_traces(A, num_matvecs=2).items()}
    {'weight': 6.0, 'bias': 7.0}
    """
    num_matvecs = checked_num_probes("block_traces", num_matvecs, return_stderr)
    sampler = Sampler.of("block_traces", A, distribution, seed, generator, chunk_size, progressbar)
    space = sampler.A.domain.join(sampler.A.codomain, "block_traces")
    mean = mean_of(lambda V, AV: block_trace_samples(V, AV, space), sampler, num_matvecs, return_stderr)
    found = independent(mean, sampler.A.dtype, return_stderr)
    if isinstance(found, Estimate):
        pairs = [Estimate(value, stderr) for value, stderr in zip(found.value, found.stderr, strict=True)]
        return pairs if space.names is None else dict(zip(space.names, pairs, strict=True))
    blocks = list(found)
    return blocks if space.names is None else dict(zip(space.names, blocks, strict=True))
