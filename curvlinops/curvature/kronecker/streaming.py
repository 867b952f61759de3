"""Passes over the data that sum what the blocks are made of; they can be interrupted, saved and gone on with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from curvlinops.curvature.base import CurvatureLinearOperator
from curvlinops.curvature.kronecker.accumulation import Accumulation, fingerprint_of, is_same_fingerprint
from curvlinops.curvature.kronecker.blocks import Block, Columns, FactorPool, Scaling
from curvlinops.curvature.kronecker.columns import BatchColumns, KeptColumns
from curvlinops.curvature.kronecker.plan import UNSUPPORTED, Options, planned
from curvlinops.curvature.kronecker.types import FisherType
from curvlinops.curvature.sandwich import Sampling
from curvlinops.memory import default_budget
from curvlinops.operators.base import LinearOperator
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.risk.batches import copied, has_rows, map_tensors, visible_size
from curvlinops.risk.collective import agreed, any_of, raise_together
from curvlinops.risk.columns import Piece
from curvlinops.risk.empirical_risk import BatchSum
from curvlinops.risk.layers.factors import LayerFactors
from curvlinops.risk.linearization import Use
from curvlinops.risk.losses import Terms
from curvlinops.risk.losses.factors import HessianFactor, LossFactor, gradient_factor, sampled_factor
from curvlinops.risk.passes import Pass
from curvlinops.risk.surroundings import differentiable, preserved_random_state

#: Data on which the two directions through the network are compared.
_NUM_CHECKED = 4


class UncoveredError(Exception):
    """Parameters that layer notes do not cover in some mini-batch, so that the blocks must be chosen anew."""

    def __init__(self, positions: Iterable[int]) -> None:
        super().__init__(positions)
        self.positions = set(positions)


class StreamedBlocks(CurvatureLinearOperator):
    """A matrix of blocks that takes one pass over the data or more; computed once, and frozen from then on."""

    _STREAMS_PRODUCTS = False

    _fisher_type: FisherType
    _sampling: Sampling
    _options: Options
    _terms: str
    _num_positions: int | None
    _state: Accumulation
    #: Parameters that layer notes did not cover in some mini-batch.
    _uncovered: set[int]
    #: The blocks as operators, once they are asked for.
    _structure: BlockDiagonal | None

    def _check_deterministic(self) -> None:
        """Also, since columns are read off the backward alone, that the backward agrees with the forward."""
        super()._check_deterministic()
        if not self._options.has_gradients:
            return
        error = None
        try:
            random_state = preserved_random_state(self._risk.data, self.device)
            with torch.inference_mode(False), random_state, differentiable(self._risk.model):
                batch = next(iter(self._risk.batches("directions")))
                self._check_directions(batch.X, visible_size(batch.X, batch.y))
        except Exception as found:
            error = found
        raise_together(error, self.device, self._risk.process_group)

    def _check_directions(self, X: Any, num_data: int | None) -> None:
        """Compare the two directions on a few data, which tell as much as all, where the model takes so few."""
        if num_data is not None and num_data > _NUM_CHECKED and has_rows(X, num_data):
            try:
                self._risk.check_directions(map_tensors(lambda t: t[:_NUM_CHECKED], X))
                return
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if isinstance(error, NotImplementedError):
                    raise
        self._risk.check_directions(X)

    def compute(self, num_batches: int | None = None) -> Self:
        """Compute the matrix, or go on computing it.

        Any use of the operator computes what is left. Between calls, :meth:`state_dict` saves how far it is.

        Args:
            num_batches: How many more mini-batches to take at most; ``None`` for all. With a ``process_group``, all
                ranks call alike, and a call ends with a pass over the data at the latest.

        Returns:
            The operator itself.

        Raises:
            ValueError: If the parameters changed while a part of the data was summed.
        """
        if num_batches is not None and (
            not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1
        ):
            raise ValueError(
                f"num_batches: expected a number of mini-batches, at least 1, or None, got {num_batches!r}."
            )
        with torch.inference_mode(False):
            while not self._state.is_done and num_batches != 0:
                taken = self._go_on(num_batches)
                if taken is None:
                    break
                num_batches = None if num_batches is None else num_batches - taken
                if num_batches is not None and self._risk.process_group is not None:
                    break  # the ranks have different numbers left
        return self

    def _go_on(self, num_batches: int | None) -> int | None:
        """Take more mini-batches of the current pass.

        Returns:
            Their number if the pass is finished, else ``None``.
        """
        state, step = self._state, self._step
        begun = 0 if state.current is None else state.current.num_batches
        found = self._current_pass()
        try:
            is_at_end = self._risk.accumulate(self._sums_of_batches, found, step, num_batches)
        except UncoveredError as error:
            found.error = error
            is_at_end = True
        except BaseException:
            if not found.is_whole:
                self._state = Accumulation()
            raise
        if self._must_begin_anew(found):
            return 0
        # The ranks reduce their sums when the last of them is at the end of its shard.
        if agreed(not is_at_end, self.device, self._risk.process_group):
            return None
        taken = found.num_batches - begun
        try:
            sums, scale = self._risk.finished(self._sums_of_batches, found, step)
            state.current = None
            self._finish(state, sums, Scaling(scale))
            if state.is_done:
                state.columns, state.generator_states = KeptColumns(), {}
        except BaseException:  # sums are scaled in place, so what is half finished is of no use
            self._state = Accumulation()
            raise
        return taken

    def _current_pass(self) -> Pass:
        state = self._state
        fingerprint = fingerprint_of([*self._params, *self._risk.model.buffers])
        is_untouched = state.num_passes == 0 and (state.current is None or state.current.num_batches == 0)
        if is_untouched:
            state.fingerprint = fingerprint
        elif not is_same_fingerprint(state.fingerprint, fingerprint):
            raise ValueError(
                f"{type(self).__name__}: the parameters have changed since a part of the data was summed. Restore "
                "them, or build the operator anew."
            )
        if state.current is None:
            state.current, state.generator_states = Pass.empty([], self._params[0], Use()), {}
        return state.current

    def _must_begin_anew(self, found: Pass) -> bool:
        """Whether blocks must be chosen anew, on this rank or another; other errors are raised."""
        group, error = self._risk.process_group, found.error
        found.error = None
        ours = error.positions if isinstance(error, UncoveredError) else set()
        if group is not None:  # the blocks must be the same on all ranks
            ours |= {i for b in self._state.blocks or [] if b.reason in UNSUPPORTED for i in b.positions}
        flags = torch.tensor([i in ours and i not in self._uncovered for i in range(len(self._params))])
        everywhere = any_of(flags, self.device, group)
        is_ours = isinstance(error, Exception) and not isinstance(error, UncoveredError)
        raise_together(error if is_ours else None, self.device, group)  # type: ignore[arg-type]
        if not bool(everywhere.any()):
            return False
        self._uncovered |= set(everywhere.nonzero().flatten().tolist())
        self._state = Accumulation()
        return True

    @property
    def _step(self) -> str:
        """What the current pass is called."""
        return "factors"

    def _sums_of_batches(self) -> BatchSum:
        """Called when a pass begins or goes on."""
        rank, state = self._risk.rank, self._state
        self._sampling.restart(self.device, rank)
        generator = self._sampling.generator(self.device, rank)
        done = state.current.num_batches if state.current is not None else 0
        if done in state.generator_states:
            generator.set_state(state.generator_states[done])
        return self._pieces_of_batch

    def _pieces_of_batch(self, X: Any, y: Any) -> list[Piece]:
        """What a mini-batch contributes; nothing if it has no data."""
        sums = self._sums_of_batch(X, y)
        return [(None, sums)] if sums else []

    def _sums_of_batch(self, X: Any, y: Any) -> list[Tensor]:
        state = self._state
        assert state.current is not None
        batch = state.current.num_batches
        kept = state.columns.of(batch) if state.num_passes else None
        if kept is None:
            return self._sums_of_new_batch(batch, X, y)
        # Another operator may go on from here, and draw.
        state.generator_states = {k: state.columns.generator_states[k] for k in (batch, batch + 1)}
        sums = _Sums()
        for factors in kept:
            self._add(sums, Columns(factors, None, factors.like))
        return sums.found

    def _sums_of_new_batch(self, batch: int, X: Any, y: Any) -> list[Tensor]:
        state, generator = self._state, self._sampling.generator(self.device, self._risk.rank)
        state.note_generator(batch, generator)
        keeps = self._keeps_columns and state.num_passes == 0
        columns = BatchColumns(
            self._risk,
            copied(X) if keeps else X,  # a loader may fill the same memory anew
            y,
            self._loss_factor if self._options.has_gradients else None,
            self._num_positions,
            averages_inputs=self._options.reduces and state.num_passes == 0,
            squares_masses=self._fisher_type == FisherType.EMPIRICAL,
            columns_at_once=self._chunk_size,
        )
        sums, squares = _Sums(), {}
        if columns.is_empty:
            return []

        def add(factors: LayerFactors) -> None:
            if not sums.is_begun:
                self._check_blocks(factors, columns)
                rest = [i for i in range(len(self._params)) if i not in factors.positions]
                squares.update(columns.squares(rest) if state.num_passes == 0 else {})
            if keeps:
                state.columns.add(batch, factors, not sums.is_begun)
            self._add(sums, Columns(factors, columns.weight, factors.like, squares={} if sums.is_begun else squares))

        if batch == 0 and state.num_passes == 0:
            state.columns.max_bytes = self._max_kept_bytes if keeps else 0
        columns.for_each(add)
        state.note_generator(batch + 1, generator)
        if keeps:
            state.columns.generator_states |= state.generator_states
        return sums.found

    def _add(self, sums: _Sums, columns: Columns) -> None:
        blocks = self._state.blocks or []
        sums.add([self._sums(number, block, columns, not sums.is_begun) for number, block in enumerate(blocks)])

    #: Whether further passes want the columns of the first.
    _keeps_columns = False

    @property
    def _max_kept_bytes(self) -> int:
        """Bytes of columns that may be kept for further passes."""
        return default_budget(self.device)

    def _loss_factor(self, terms: Terms) -> LossFactor:
        if self._fisher_type == FisherType.TYPE2:
            return HessianFactor(terms)
        if self._fisher_type == FisherType.EMPIRICAL:
            return gradient_factor(terms, self._terms)
        generator = self._sampling.generator(self.device, self._risk.rank)
        return sampled_factor(terms, self._sampling.num_samples, generator)

    def _check_blocks(self, factors: LayerFactors, columns: BatchColumns) -> None:
        """Choose the blocks, which the first mini-batch decides and all others must bear out."""
        labels = [self.domain.label(i) for i in range(len(self._params))]
        ours = planned(self._params, labels, factors, columns.biases, self._uncovered, self._options)
        if self._state.blocks is None:
            self._state.blocks = ours
        known, found = ({b.signature: set(b.positions) for b in blocks} for blocks in (self._state.blocks, ours))
        if known.keys() != found.keys():
            raise UncoveredError(set().union(*((known | found)[key] for key in known.keys() ^ found.keys())))

    def _sums(self, number: int, block: Block, columns: Columns, is_first: bool) -> list[Tensor]:
        """What the current pass sums of a block; inputs are the same for all pieces of the columns."""
        inputs = block.input_sums(columns) if is_first else []
        return [*inputs, *(block.gradient_sums(columns) if self._options.has_gradients else [])]

    def _finish(self, state: Accumulation, sums: Sequence[Tensor], scaling: Scaling) -> None:
        """Called with the sums of the pass that is done, which are not scaled yet."""
        if state.blocks is None:
            raise ValueError("The data are empty: no mini-batch has a datum.")
        remaining = iter(sums)
        for block in state.blocks:
            names = block.of_inputs + (block.of_gradients if self._options.has_gradients else ())
            state.kept.append(block.finished({name: next(remaining) for name in names}, scaling))
        state.num_passes += 1
        state.is_done = True

    def _built(self) -> BlockDiagonal:
        """The matrix as a block-diagonal operator, computed if that is still to be done."""
        self.compute()
        if self._structure is None:
            blocks = self._state.blocks or []
            pool = FactorPool()
            operators = [self._block_operator(number, block, pool) for number, block in enumerate(blocks)]
            self._structure = BlockDiagonal(
                operators, positions=[block.positions for block in blocks], space=self.domain
            )
        return self._structure

    def _block_operator(self, number: int, block: Block, pool: FactorPool) -> LinearOperator:
        return block.operator(self._state.kept[number], self.domain.select(block.positions), pool)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._built()._matmat(X)


class _Sums:
    """Sums over pieces of a mini-batch's columns, of which the first brings more than the others."""

    def __init__(self) -> None:
        self._of_blocks: list[list[Tensor]] = []

    @property
    def is_begun(self) -> bool:
        """Whether there was a piece."""
        return bool(self._of_blocks)

    def add(self, found: list[list[Tensor]]) -> None:
        """Add a piece; what it brings stands at the end of each block's list."""
        if not self._of_blocks:
            self._of_blocks = found
            return
        for sums, more in zip(self._of_blocks, found, strict=True):
            for k, tensor in enumerate(more, len(sums) - len(more)):
                sums[k] = sums[k] + tensor

    @property
    def found(self) -> list[Tensor]:
        """All sums, block by block."""
        return [tensor for sums in self._of_blocks for tensor in sums]
