"""Loss factors S with S Sᵀ ≈ ∇²_f ℓ: the only difference between GGN, Monte-Carlo and empirical Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import sqrt

import torch
from torch import Generator, Tensor

from curvlinops.risk.losses.base import Terms


class LossFactor(ABC):
    """The factor S of one mini-batch, block-diagonal over data."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms

    def gram(self, U: Tensor) -> Tensor:
        """S Sᵀ U for columns in the prediction's shape ``[*out, K]``."""
        return self._terms.from_rows(self._gram_rows(self._terms.to_rows(U)))

    def held(self) -> Iterator[Tensor]:
        """The tensors that it and its terms hold."""
        values = (*vars(self).values(), *vars(self._terms).values())
        yield from (value for value in values if isinstance(value, Tensor))

    def columns(self) -> Iterator[Tensor]:
        """The columns of S in the prediction's shape ``[*out]``, one of each datum at a time."""
        for column in self._column_rows():
            yield self._terms.from_rows(column.unsqueeze(-1)).squeeze(-1)

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """Columns of a datum."""

    @abstractmethod
    def _gram_rows(self, U: Tensor) -> Tensor: ...

    @abstractmethod
    def _column_rows(self) -> Iterator[Tensor]: ...


class HessianFactor(LossFactor):
    """S Sᵀ = ∇²_f ℓ exactly: gives the generalised Gauss-Newton matrix."""

    @property
    def num_columns(self) -> int:
        """One for each position and channel."""
        return self._terms.rows.shape[1:].numel()

    def _gram_rows(self, U: Tensor) -> Tensor:
        return self._terms.hessian_matmat(U)

    def _column_rows(self) -> Iterator[Tensor]:
        first = self._terms.hessian_sqrt(0)
        num_positions, num_channels = first.shape[1:]
        for channel in range(num_channels):
            column = first if channel == 0 else self._terms.hessian_sqrt(channel)
            for position in range(num_positions):
                yield _only(column, position)


class OuterProductFactor(LossFactor):
    """Columns s ``[N, T, C, M]`` that span the positions of a datum: S Sᵀ = Σ_m s_m s_mᵀ for each datum."""

    def __init__(self, terms: Terms, columns: Tensor) -> None:
        super().__init__(terms)
        self._columns = columns

    @property
    def num_columns(self) -> int:
        """M."""
        return self._columns.shape[-1]

    def _gram_rows(self, U: Tensor) -> Tensor:
        S = self._columns.flatten(1, 2)
        V = U.flatten(1, 2)
        # With more columns than rows, S Sᵀ of each datum is the smaller of the two intermediate results.
        SSV = (S @ S.mT) @ V if S.shape[2] > S.shape[1] else S @ (S.mT @ V)
        return SSV.reshape(U.shape)

    def _column_rows(self) -> Iterator[Tensor]:
        yield from self._columns.unbind(-1)


class PositionFactor(LossFactor):
    """One column g ``[N, T, C]`` for each position of a datum."""

    def __init__(self, terms: Terms, columns: Tensor) -> None:
        super().__init__(terms)
        self._columns = columns

    @property
    def num_columns(self) -> int:
        """One for each position."""
        return self._columns.shape[1]

    def _gram_rows(self, U: Tensor) -> Tensor:
        g = self._columns.unsqueeze(-1)
        return g * (g * U).sum(2, keepdim=True)

    def _column_rows(self) -> Iterator[Tensor]:
        for position in range(self._columns.shape[1]):
            yield _only(self._columns, position)


def _only(rows: Tensor, position: int) -> Tensor:
    """The rows with all positions but one set to zero."""
    if rows.shape[1] == 1:
        return rows
    result = torch.zeros_like(rows)
    result[:, position] = rows[:, position]
    return result


def sampled_factor(terms: Terms, num_samples: int, generator: Generator) -> LossFactor:
    """The columns s_m / √M of would-be gradients; its S Sᵀ has the Hessian as expectation."""
    return OuterProductFactor(terms, terms.sample_gradients(num_samples, generator) / sqrt(num_samples))


def gradient_factor(terms: Terms, by: str) -> LossFactor:
    """The actual gradients, one column a position or one a datum."""
    gradient = terms.gradient()
    return PositionFactor(terms, gradient) if by == "position" else OuterProductFactor(terms, gradient.unsqueeze(-1))
