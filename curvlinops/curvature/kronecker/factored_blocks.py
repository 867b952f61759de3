"""Blocks of weights that meet inputs: Kronecker products of the two sides' covariances."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlinops.curvature.kronecker.blocks import Block, Columns, FactorPool, Scaling
from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.factors import DiagonalFactor, Factor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.space import Space
from curvlinops.risk.layers.weights import TableColumns, WeightColumns, table_of


class FactoredBlock(Block):
    """A block B ⊗ A: the gradient covariance B acts on the rows of the weight's matrix, A on its columns."""

    def __init__(
        self, positions: Sequence[int], shapes: Sequence[torch.Size], arrangement: Arrangement, reason: str = ""
    ) -> None:
        super().__init__(positions, shapes, reason)
        self.arrangement = arrangement

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name."""
        groups, rows, columns = self.arrangement.matrix_shape
        if name == "eigenvalues":
            return groups, rows, columns
        return {"gradient": (groups, rows, rows), "input": (groups, columns, columns)}[name.split("_")[0]]

    @abstractmethod
    def correction(self, columns: Columns, kept: Mapping[str, Tensor]) -> Tensor:
        """Σ_nm (Lᵀ G_nm R)² ``[G, R, S]`` for the eigenbases L of rows and R of columns."""

    @abstractmethod
    def contraction(self, columns: Columns, kept: Mapping[str, Tensor], of_inputs: bool) -> Tensor:
        """Σ_nm G A Gᵀ in the form of B; of inputs, Σ_nm Gᵀ B G in the form of A."""

    @abstractmethod
    def bases(self, kept: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The eigenbases of rows and columns ``[G, n, n]``, ``None`` for unit vectors."""


class KroneckerBlock(FactoredBlock):
    """The weight of a linear layer or a convolution, alone or with its bias."""

    kind = "Kronecker"
    of_inputs = ("input_covariance", "num_positions")
    of_gradients = ("gradient_covariance",)

    def __init__(
        self,
        positions: Sequence[int],
        shapes: Sequence[torch.Size],
        arrangement: Arrangement,
        reduces: bool,
        reason: str = "",
    ) -> None:
        super().__init__(positions, shapes, arrangement, reason)
        self._reduces = reduces

    @property
    def layout(self) -> list[int]:
        """Groups, whether the weight is transposed, and whether positions are reduced."""
        return [self.arrangement.groups, int(self.arrangement.transposed), int(self._reduces)]

    @classmethod
    def restored(cls, positions: Sequence[int], shapes: Sequence[torch.Size], layout: Sequence[int]) -> Block:
        """The block of a saved layout."""
        groups, transposed, reduces = layout
        sizes = tuple(tuple(shape) for shape in shapes)
        return cls(positions, shapes, Arrangement(sizes, groups, bool(transposed)), bool(reduces))

    def _weight(self, columns: Columns) -> WeightColumns:
        has_bias = len(self.positions) == 2
        return WeightColumns(columns.factors.parts(self.positions[0]), has_bias, columns.moments)

    def input_sums(self, columns: Columns) -> list[Tensor]:
        """Σ a aᵀ and the number of positions."""
        return list(self._weight(columns).input_moment(columns.weight, self._reduces))

    def gradient_sums(self, columns: Columns) -> list[Tensor]:
        """Σ g gᵀ."""
        return [self._weight(columns).gradient_moment(self._reduces)]

    def finished(self, sums: Mapping[str, Tensor], scaling: Scaling) -> dict[str, Tensor]:
        """The covariances, of which that of the inputs is a mean; without gradients it carries the scale."""
        moment = sums["input_covariance"]
        if "gradient_covariance" not in sums:
            return {"input_covariance": scaling.times(moment)}
        return {
            "input_covariance": scaling.mean(moment, sums["num_positions"]),
            "gradient_covariance": scaling.times(sums["gradient_covariance"]),
        }

    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """B ⊗ A."""
        A = kept["input_covariance"]
        left: Factor
        if "gradient_covariance" in kept:
            left = pool.dense(kept["gradient_covariance"])
        else:
            left = DiagonalFactor(A.new_ones(len(A), self.arrangement.num_rows), is_owned=True)
        return Kronecker(left, pool.dense(A), arrangement=self.arrangement, space=space, is_positive=True)

    def correction(self, columns: Columns, kept: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`FactoredBlock.correction`."""
        return self._weight(columns).rotated_squares(kept["gradient_basis"], kept["input_basis"])

    def contraction(self, columns: Columns, kept: Mapping[str, Tensor], of_inputs: bool) -> Tensor:
        """See :meth:`FactoredBlock.contraction`."""
        middle = kept["gradient_covariance" if of_inputs else "input_covariance"]
        return self._weight(columns).contraction(middle, of_inputs)

    def bases(self, kept: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`FactoredBlock.bases`."""
        return kept["gradient_basis"], kept["input_basis"]


class EmbeddingBlock(FactoredBlock):
    """The table of an embedding: its input is a unit vector, so that A is diagonal, with the frequencies of rows."""

    kind = "embedding"
    of_inputs = ("input_covariance", "num_positions")
    of_gradients = ("gradient_covariance",)

    @classmethod
    def restored(cls, positions: Sequence[int], shapes: Sequence[torch.Size], layout: Sequence[int]) -> Block:
        """The block of a saved layout."""
        return cls(positions, shapes, Arrangement(tuple(tuple(shape) for shape in shapes)))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of what is kept under a name."""
        groups, rows, width = self.arrangement.matrix_shape
        if name == "eigenvalues":
            return groups, rows, width
        return {"gradient": (width, width), "input": (rows,)}[name.split("_")[0]]

    def _table(self, columns: Columns) -> TableColumns:
        part = table_of(columns.factors.parts(self.positions[0]))
        assert part is not None
        return TableColumns(part)

    def input_sums(self, columns: Columns) -> list[Tensor]:
        """How often each row is looked up, and how often any is."""
        return list(self._table(columns).counts(columns.weight))

    def gradient_sums(self, columns: Columns) -> list[Tensor]:
        """Σ g gᵀ."""
        return [self._table(columns).gradient_moment()]

    def finished(self, sums: Mapping[str, Tensor], scaling: Scaling) -> dict[str, Tensor]:
        """Frequencies of rows and the covariance of gradients; without gradients counts, which carry the scale."""
        counts = sums["input_covariance"]
        if "gradient_covariance" not in sums:
            return {"input_covariance": scaling.times(counts)}
        return {
            "input_covariance": scaling.mean(counts, sums["num_positions"]),
            "gradient_covariance": scaling.times(sums["gradient_covariance"]),
        }

    def operator(self, kept: Mapping[str, Tensor], space: Space, pool: FactorPool) -> LinearOperator:
        """A ⊗ B, of which A is diagonal."""
        left = DiagonalFactor(kept["input_covariance"].unsqueeze(0), is_owned=True)
        right: Factor
        if "gradient_covariance" in kept:
            right = pool.dense(kept["gradient_covariance"].unsqueeze(0))
        else:
            right = DiagonalFactor(left.diagonal().new_ones(1, self.arrangement.num_columns), is_owned=True)
        return Kronecker(left, right, arrangement=self.arrangement, space=space, is_positive=True)

    def correction(self, columns: Columns, kept: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`FactoredBlock.correction`; the rows keep their unit vectors."""
        return self._table(columns).rotated_squares(kept["gradient_basis"]).unsqueeze(0)

    def contraction(self, columns: Columns, kept: Mapping[str, Tensor], of_inputs: bool) -> Tensor:
        """See :meth:`FactoredBlock.contraction`."""
        middle = kept["gradient_covariance" if of_inputs else "input_covariance"]
        return self._table(columns).contraction(middle, of_inputs)

    def bases(self, kept: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """See :meth:`FactoredBlock.bases`."""
        return None, kept["gradient_basis"].unsqueeze(0)
