"""Operators on the matrices that the tensors of a space form."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from curvlinops.operators.algebra import _recut
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.sampling import normal_columns
from curvlinops.operators.space import Space, working_dtype
from curvlinops.operators.structured import checked_logdet


class Arranged(LinearOperator):
    """A symmetric operator on matrices ``[G, R, S]`` that the tensors of its space form.

    Args:
        arrangement: How they form them; by default from one tensor, ``[G · R, S]``.
        space: The space, of the shapes of the arrangement or flat; by default nameless and of these shapes.
        matrix_shape: Groups, rows and columns that the operator acts on.
        dtype: Dtype of the space, where none is given.
        device: Device of the space.
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        arrangement: Arrangement | None,
        space: Space | None,
        matrix_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        groups, rows, columns = matrix_shape
        if arrangement is None:
            arrangement = Arrangement(((groups * rows, columns),), groups)
            flat = Space.flat(groups * rows * columns, dtype, device)
            space = flat if space is None else space
        if arrangement.matrix_shape != matrix_shape:
            raise ValueError(
                f"arrangement: expected matrices {list(matrix_shape)} (groups, rows, columns), which the factors act "
                f"on; {arrangement} has {list(arrangement.matrix_shape)}."
            )
        space = Space(arrangement.shapes, dtype, device) if space is None else space
        if space.numel != groups * rows * columns or not (space.is_flat or space.shapes == arrangement.shapes):
            shapes = [list(shape) for shape in arrangement.shapes]
            raise ValueError(f"space: expected tensors {shapes}, or a flat one of as many entries, got {space}.")
        if space.device != device or working_dtype(space.dtype) != working_dtype(dtype):
            raise ValueError(f"space: {space.dtype} on {space.device} does not go with {dtype} on {device}.")
        self._place(arrangement, space)

    def _place(self, arrangement: Arrangement, space: Space) -> None:
        LinearOperator.__init__(self, space, space)
        self.arrangement = arrangement
        self._arranged = Space(arrangement.shapes, space.dtype, space.device)

    def _multiply(self, X: Tensor) -> Tensor:
        """The product with matrices ``[K, G, R, S]`` in the working dtype."""
        raise NotImplementedError

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        matrices = self.arrangement.gather(_recut(X, self.domain, self._arranged))
        product = self._multiply(matrices.to(working_dtype(self.dtype))).to(self.dtype)
        return _recut(self.arrangement.scatter(product), self._arranged, self.domain)

    def _flat(self, entries: Tensor) -> Tensor:
        """One number for each entry of the matrices ``[G, R, S]`` as a vector ``[D]`` in the dtype of the space."""
        return Space.merge(self.arrangement.scatter(entries.unsqueeze(0).to(self.dtype))).squeeze(-1)

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sqrt(self) -> LinearOperator:
        """The symmetric positive semi-definite square root."""
        raise NotImplementedError

    def _spectrum(self) -> Tensor:
        """The eigenvalues ``[G, R, S]``, in the order of the eigenvectors."""
        raise NotImplementedError

    def _in_eigenbasis(self, values: Tensor) -> LinearOperator:
        """The matrix of the same eigenvectors and other eigenvalues ``[G, R, S]``."""
        raise NotImplementedError

    def pinv(self) -> LinearOperator:
        """The pseudo-inverse: eigenvalues that are zero but for rounding stay zero, in each group."""
        A: Arranged = self.frozen()  # type: ignore[assignment]
        values = A._spectrum()
        rounding = max(values.shape[1:]) * torch.finfo(values.dtype).eps * values.abs().amax((1, 2), keepdim=True)
        return A._in_eigenbasis(torch.where(values.abs() > rounding, 1.0 / values, 0.0))

    def det(self) -> Tensor:
        """The determinant; infinite or zero where it is beyond the range of the dtype."""
        sign, logabsdet = self._slogdet()
        return (sign * logabsdet.exp()).to(self.dtype)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        return checked_logdet(*self._slogdet()).to(self.dtype)

    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        Cost: that of :meth:`sqrt`, and a product with it. Samples with the inverse as covariance are
        ``A.inverse().sample(...)``.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            ValueError: If the matrix is not positive semi-definite, num_samples is below 1, or the generator lives on
                another device.
        """
        noise, _ = normal_columns(self, num_samples, seed, generator)
        samples: Tensor = self.sqrt() @ noise
        return samples

    def block(self, *patterns: str) -> LinearOperator:
        """The diagonal block of the parameters whose names match a pattern; see :meth:`LinearOperator.block`."""
        found = super().block(*patterns)
        chosen: list[int] = found.chosen  # type: ignore[attr-defined]
        return self if len(chosen) == len(self.domain.shapes) else found
