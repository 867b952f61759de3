"""The columns of one mini-batch, in pieces, and what else of it enters Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from curvlinops.memory import num_bytes
from curvlinops.risk.batches import has_rows, map_tensors
from curvlinops.risk.empirical_risk import EmpiricalRisk
from curvlinops.risk.layers.factors import LayerFactors, LayerNotes
from curvlinops.risk.layers.proofs import permutation_of
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import LossFactor
from curvlinops.risk.per_datum import factors_of_columns, squares_datum_by_datum


class BatchColumns:
    """The columns of F = Jᵀ S at one mini-batch.

    Args:
        risk: Model, loss and data.
        X: Inputs.
        y: Targets.
        loss_factor: Makes S of the loss's terms; ``None`` for no columns, only inputs.
        num_positions: Positions that a datum's loss is said to have, ``None`` if nothing is said.
        averages_inputs: Whether inputs are averaged over the positions of a datum.
        squares_masses: Whether weights of terms enter squared, as they do in outer products of actual gradients.
        columns_at_once: Columns of a datum that go through the network together, ``None`` for what memory allows.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        X: Any,
        y: Any,
        loss_factor: Callable[[Terms], LossFactor] | None,
        num_positions: int | None,
        averages_inputs: bool,
        squares_masses: bool,
        columns_at_once: int | None,
    ) -> None:
        self._columns_at_once = columns_at_once
        self._risk, self._X = risk, X
        self._lin, self._notes = risk.noted(X)
        terms = risk.terms(self._lin.output, X, y)
        if num_positions is not None and terms.num_positions != num_positions:
            raise ValueError(
                f"num_per_example_loss_terms={num_positions}, but the loss of a datum has {terms.num_positions} terms."
            )
        self._factor = None if loss_factor is None else loss_factor(terms)
        self.weight = datum_weights(terms, squares_masses)
        if averages_inputs or self.weight is not None:
            self._notes.decide_by(lambda: self._permuted_notes(X))

    def _permuted_notes(self, X: Any) -> LayerNotes | None:
        """The notes of a forward over the data in another order, where they can be put into one."""
        num_data = len(self._lin.output)
        if not has_rows(X, num_data):
            return None
        order = permutation_of(num_data)
        return self._risk.noted(map_tensors(lambda t: t[order.to(t.device)], X))[1]

    @property
    def is_empty(self) -> bool:
        """Whether the mini-batch has no data."""
        return len(self._lin.output) == 0

    @property
    def biases(self) -> dict[int, int]:
        """The position of the bias of each weight that has one to itself."""
        return self._notes.biases()

    def for_each(self, action: Callable[[LayerFactors], None]) -> None:
        """Act on all columns, as many at a time as memory allows; without a loss factor, on a piece without columns."""

        def act() -> None:
            for piece in self._pieces():
                action(piece)

        self._risk.model.holding(self._lin.values, act)

    def _pieces(self) -> Iterator[LayerFactors]:
        if self._factor is not None:
            yield from factors_of_columns(self._notes, self._factor.columns, self._columns_at_once)
            return
        self._notes.prove()
        yield self._notes.factors(self._lin.output.new_zeros(0, *self._lin.output.shape))

    def squares(self, positions: list[int]) -> dict[int, Tensor]:
        """Row sums of squares for parameters that are not covered, from per-datum gradients."""
        factor = self._factor
        if not positions or factor is None:
            return {}
        # The notes are read off the backward itself; what is differentiated in other ways must agree with it.
        self._risk.check_directions(self._X)
        found = self._risk.model.holding(
            self._lin.values,
            lambda: squares_datum_by_datum(self._risk.model, self._X, self._lin, positions, factor.columns),
        )
        return dict(zip(positions, found, strict=True))


class KeptColumns:
    """The columns of all mini-batches, for further passes over the data; none of them where they take too much.

    Args:
        max_bytes: Bytes that they may take.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._batches: list[list[LayerFactors]] = []
        #: The state of the random generator before each mini-batch.
        self.generator_states: dict[int, Tensor] = {}

    def add(self, batch: int, piece: LayerFactors, is_first: bool) -> None:
        """Keep a piece of a mini-batch, if everything before it is kept, and it fits."""
        if batch != len(self._batches) - (0 if is_first else 1):
            self.max_bytes = 0  # the pass did not begin here
        self._num_bytes += num_bytes(piece.tensors())
        if self._num_bytes > self.max_bytes:
            self.max_bytes, self._batches = 0, []
            return
        if is_first:
            self._batches.append([])
        self._batches[-1].append(piece)

    def of(self, batch: int) -> list[LayerFactors] | None:
        """The pieces of a mini-batch, if all mini-batches are kept."""
        return self._batches[batch] if batch < len(self._batches) else None


def datum_weights(terms: Terms, squared: bool) -> Tensor | None:
    """The weight of each datum in the curvature ``[N]``, the mean over its entries; ``None`` if all are one."""
    masses = terms.masses()
    if masses is None or bool((masses == 1).all()):
        return None
    return (masses.square() if squared else masses).flatten(1).mean(1)
