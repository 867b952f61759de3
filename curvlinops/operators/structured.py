"""Diagonal matrices, the identity among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from curvlinops.operators.base import LinearOperator
from curvlinops.operators.sampling import normal_columns
from curvlinops.operators.space import Space


class Diagonal(LinearOperator):
    """A diagonal matrix; closed under sums, scalings, products and damping.

    Cost: O(D) each.

    Args:
        entries: The diagonal as a flat tensor, or as a list or dict of tensors in the shapes of the parameters.

    >>> A = Diagonal({"weight": torch.ones(2, 2), "bias": torch.full((2,), 3.0)})
    >>> (A + A).inverse(damping=2.0).diagonal().tolist()
    [0.25, 0.25, 0.25, 0.25, 0.125, 0.125]
    """

    SELF_ADJOINT = True

    def __init__(self, entries: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        names = tuple(entries) if isinstance(entries, Mapping) else None
        tensors = list(entries.values()) if isinstance(entries, Mapping) else entries
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if not tensors:
            raise ValueError("Expected at least one tensor of diagonal entries, got none.")
        first = tensors[0]
        space = Space(tuple(tuple(t.shape) for t in tensors), first.dtype, first.device, names)
        for index, tensor in enumerate(tensors):
            space._check_kind(tensor, space.label(index))
        self._kept_entries: list[Tensor] | None = [t.detach() for t in tensors]
        self._owns_entries = False
        LinearOperator.__init__(self, space, space)

    @property
    def _entries(self) -> list[Tensor]:
        assert self._kept_entries is not None
        return self._kept_entries

    def _like(self, entries: Sequence[Tensor], space: Space | None = None, is_positive: bool = False) -> Diagonal:
        """A plain diagonal operator on the same space."""
        result = Diagonal(entries)
        result._domain = result._codomain = self.domain if space is None else space
        result.POSITIVE_SEMIDEFINITE = is_positive
        result._owns_entries = True
        return result

    def frozen(self) -> Diagonal:
        """The same operator with copies of the entries that it was given."""
        if self._holds_values:
            return self
        result = self._like([entry.clone() for entry in self._entries])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE
        return result

    @property
    def _holds_values(self) -> bool:
        return self._owns_entries

    @property
    def _is_definite(self) -> bool:
        return self.POSITIVE_SEMIDEFINITE and all(bool((entry > 0).all()) for entry in self._entries)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [entry.unsqueeze(-1) * x for entry, x in zip(self._entries, X, strict=True)]

    def diagonal(self) -> Tensor:
        """The diagonal ``[D]``."""
        return torch.cat([entry.flatten() for entry in self._entries])

    def trace(self) -> Tensor:
        """The trace."""
        return self.diagonal().sum()

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, which must be positive."""
        return checked_logdet(*self._slogdet())

    def _slogdet(self) -> tuple[Tensor, Tensor]:
        diagonal = self.diagonal()
        return diagonal.sign().prod(), diagonal.abs().log().sum()

    def det(self) -> Tensor:
        """The determinant; infinite or zero where it is beyond the range of the dtype."""
        sign, logabsdet = self._slogdet()
        return sign * logabsdet.exp()

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm."""
        return self.diagonal().square().sum().sqrt()

    def sqrt(self) -> Diagonal:
        """The positive semi-definite square root of a positive semi-definite diagonal matrix.

        Raises:
            ValueError: If an entry is negative.
        """
        num_negative = sum(int((~(entry >= 0)).sum()) for entry in self._entries)
        if num_negative:
            raise ValueError(
                f"{num_negative} of {self.shape[0]} diagonal entries are negative or not a number: the square root "
                "does not exist. Add damping first."
            )
        result = self._like([entry.sqrt() for entry in self._entries])
        result.POSITIVE_SEMIDEFINITE = True
        return result

    def sample(self, num_samples: int, *, seed: int = 2147483647, generator: Generator | None = None) -> Tensor:
        """Draw from the normal distribution of mean zero with this matrix as its covariance.

        Args:
            num_samples: Number of samples, K.
            seed: Seed of the samples.
            generator: Drawn from in place of a new one with this seed; it must live on the operator's device.

        Returns:
            The samples as columns ``[D, K]``.

        Raises:
            ValueError: If an entry is negative, num_samples is below 1, or the generator lives on another device.
        """
        noise, _ = normal_columns(self, num_samples, seed, generator)
        samples: Tensor = self.sqrt() @ noise
        return samples

    def inverse(self, damping: float = 0.0) -> Diagonal:
        """The operator (A + damping · I)⁻¹.

        Args:
            damping: Number added to the diagonal.

        Raises:
            ValueError: If an entry is zero after damping.
        """
        damped = [entry + damping for entry in self._entries]
        zeros = sum(int((entry == 0).sum()) for entry in damped)
        if zeros:
            raise ValueError(
                f"{zeros} of {self.shape[0]} diagonal entries are zero with damping={damping}: the inverse does not "
                "exist. Pass a positive damping."
            )
        result = self._like([1.0 / entry for entry in damped])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and damping >= 0
        return result

    def pinv(self) -> Diagonal:
        """The pseudo-inverse: entries that are zero, or too small to have an inverse in their dtype, stay zero."""
        least = torch.finfo(self.dtype).tiny
        inverse = [torch.where(entry.abs() >= least, 1.0 / entry, 0.0) for entry in self._entries]
        return self._like(inverse, is_positive=self.POSITIVE_SEMIDEFINITE)

    def block(self, *patterns: str) -> LinearOperator:
        """The entries of the parameters whose names match a pattern; see :meth:`LinearOperator.block`."""
        chosen = super().block(*patterns).chosen  # type: ignore[attr-defined]
        result = self._like([self._entries[i] for i in chosen], self.domain.select(chosen))
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE
        return result

    def _closed_sum(self, other: LinearOperator) -> LinearOperator | None:
        if not isinstance(other, Diagonal):
            return None
        space = self.domain.join(other.domain, "sum of diagonals")
        result = self._like([a + b for a, b in zip(self._on(space), other._on(space), strict=True)], space)
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and other.POSITIVE_SEMIDEFINITE
        return result

    def _closed_scaling(self, factor: float) -> LinearOperator:
        result = self._like([entry * factor for entry in self._entries])
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and factor >= 0
        return result

    def _closed_product(self, other: LinearOperator) -> LinearOperator | None:
        if hasattr(other, "_multiplied_by_diagonal"):
            closed: LinearOperator | None = other._multiplied_by_diagonal(self)
            return closed
        if not isinstance(other, Diagonal):
            return None
        space = self.domain.join(other.domain, "product of diagonals")
        result = self._like([a * b for a, b in zip(self._on(space), other._on(space), strict=True)], space)
        result.POSITIVE_SEMIDEFINITE = self.POSITIVE_SEMIDEFINITE and other.POSITIVE_SEMIDEFINITE
        return result

    def _closed_conversion(self, dtype: torch.dtype, device: torch.device) -> Diagonal:
        entries = [entry.to(dtype=dtype, device=device) for entry in self._entries]
        return self._like(entries, self.domain.to(dtype, device), self.POSITIVE_SEMIDEFINITE)

    def _on(self, space: Space) -> list[Tensor]:
        """The entries in the shapes of a space of the same size."""
        if self.domain.shapes == space.shapes:
            return self._entries
        return space.shaped(self.diagonal())


class IdentityLinearOperator(Diagonal):
    """The identity on tensors of the given shapes.

    Args:
        shapes: Shapes of the tensors, or a space: ``A.domain`` for the identity that goes with an operator A.
        device: Their device; a space has its own.
        dtype: Their dtype, likewise.

    >>> G = 0.5 * IdentityLinearOperator([(2, 3), (3,)], "cpu", torch.float32)
    >>> G.trace().item()
    4.5
    """

    POSITIVE_SEMIDEFINITE = True

    def __init__(
        self,
        shapes: Sequence[Sequence[int]] | Space,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(shapes, Space):
            sizes = tuple(tuple(shape) for shape in shapes)
            super().__init__([torch.ones(size, device=torch.device(device), dtype=dtype) for size in sizes])
            return
        super().__init__([torch.ones(shape, device=shapes.device, dtype=shapes.dtype) for shape in shapes.shapes])
        self._domain = self._codomain = shapes


def checked_logdet(sign: Tensor, logabsdet: Tensor) -> Tensor:
    """The logarithm of a determinant, where it exists."""
    if not sign > 0:
        raise ValueError("The determinant is not positive, so its logarithm does not exist. Add damping first.")
    return logabsdet


def multiple_of_identity(A: LinearOperator) -> float | None:
    """The number c where an operator is known to be c · I; None for any other.

    Exactly diagonals and identities: the entries of a diagonal that is still to be computed are not asked for.
    """
    if type(A) not in (Diagonal, IdentityLinearOperator):
        return None
    entries = A.diagonal()  # type: ignore[attr-defined]
    return float(entries[0]) if len(entries) and bool((entries == entries[0]).all()) else None
