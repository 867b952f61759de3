"""Random probe vectors and products with them, in chunks: the sampling half of every estimator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.dense import TensorLinearOperator
from curvlinops.solvers.checks import checked_count
from curvlinops.solvers.columns import flat_product, prepared, working_dtype
from curvlinops.solvers.random_vectors import check_distribution, draw_columns, generator_for

#: Numbers of a chunk of probes, or of products with it, that are held at once by default.
_CHUNK_NUMEL = 2**26


def as_operator(A: LinearOperator | Tensor, name: str, square: bool = True) -> LinearOperator:
    """An operator, or a dense matrix as one, if its estimates make sense.

    Raises:
        TypeError: If A is neither, or is not of real floating point.
        ValueError: If A is empty, or not square where it must be.
    """
    if isinstance(A, Tensor):
        A = TensorLinearOperator(A)
    if not isinstance(A, LinearOperator):
        raise TypeError(f"{name}: A: expected a linear operator or a matrix as a tensor, got {type(A).__name__}.")
    if not A.dtype.is_floating_point:
        raise TypeError(f"{name}: A: expected real floating point, got {A.dtype}. Convert it first.")
    if square and A.shape[0] != A.shape[1]:
        raise ValueError(f"{name}: A: expected a square matrix, got shape {A.shape}.")
    if 0 in A.shape:
        raise ValueError(f"{name}: A: expected at least one row and one column, got shape {A.shape}.")
    return A


@dataclass(frozen=True)
class Sampler:
    """Probes of one operator, and products with it, in chunks of columns.

    Args:
        name: Of the estimator, for errors and the progress bar.
        A: The operator.
        distribution: Of the probes.
        generator: Where the probes come from.
        chunk_size: Columns that are multiplied at once.
        progressbar: Whether to show the chunks.
    """

    name: str
    A: LinearOperator
    distribution: str
    generator: Generator
    chunk_size: int
    progressbar: bool

    @staticmethod
    def of(
        name: str,
        A: LinearOperator | Tensor,
        distribution: str,
        seed: int,
        generator: Generator | None,
        chunk_size: int | None,
        progressbar: bool,
        square: bool = True,
    ) -> Sampler:
        """Check the arguments that all estimators share, and prepare the operator for many products.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If the shape, the distribution, the generator or the chunk size does not fit.
        """
        A = as_operator(A, name, square)
        check_distribution(distribution)
        if chunk_size is None:
            chunk_size = max(1, _CHUNK_NUMEL // max(A.shape))
        chunk_size = checked_count(chunk_size, 1, f"{name}: chunk_size")
        generator = generator_for(A.device, seed, generator)
        return Sampler(name, prepared(A), distribution, generator, chunk_size, progressbar)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that sums are made in."""
        return working_dtype(self.A.dtype)

    def probes(self, num_probes: int) -> Tensor:
        """The next probes ``[D, K]``, which the operator's dtype can hold."""
        drawn = draw_columns(self.A.shape[1], self.distribution, repeat(self.generator, num_probes), self.A.dtype)
        return drawn.to(self.A.dtype).to(self.dtype)

    def pairs(self, num_probes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield chunks of probes V ``[D, k]`` and of products A V."""
        for start, stop in self._chunks(num_probes):
            V = self.probes(stop - start)
            yield V, self._times(V)

    def product(self, X: Tensor, adjoint: bool = False) -> Tensor:
        """The product A X with given columns ``[D, K]``, or Aᵀ X."""
        parts = [self._times(X[:, start:stop], adjoint) for start, stop in self._chunks(X.shape[1])]
        rows = self.A.shape[1 if adjoint else 0]
        return parts[0] if len(parts) == 1 else torch.cat([X.new_zeros(rows, 0), *parts], 1)

    def _times(self, X: Tensor, adjoint: bool = False) -> Tensor:
        result = flat_product(self.A.H if adjoint else self.A, self.A.dtype)(X)
        if not bool(result.isfinite().all()):
            raise FloatingPointError(
                f"{self.name}: a product with A in {self.A.dtype} has entries that are not finite. Does A hold NaN or "
                "infinities, or overflow in this precision?"
            )
        return result

    def _chunks(self, num_columns: int) -> Iterator[tuple[int, int]]:
        starts = range(0, num_columns, self.chunk_size)
        for start in tqdm(starts, desc=f"{self.name}: products", disable=not self.progressbar, leave=False):
            yield start, min(start + self.chunk_size, num_columns)
