"""The columns of F = Jᵀ S at one mini-batch in structured form, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import grad

from curvlinops.risk.layers.dense import DirectPart, LinearPart
from curvlinops.risk.layers.notes import BroadcastUse, ConvolutionUse, LinearUse, Note
from curvlinops.risk.layers.parts import CHUNK_NUMEL, Part, gram_of_gradients, slices, summed_gradients
from curvlinops.risk.layers.proofs import (
    CompleteNotes,
    Layouts,
    Proofs,
    RowMeasurement,
    complete_notes,
    layouts_by_inputs,
)
from curvlinops.risk.layers.recorder import LayerRecorder
from curvlinops.risk.losses.base import at_least_float32

#: How many shapes of mini-batches are remembered.
_MAX_PROOFS = 64


class Engine(Protocol):
    """What is known about a model.

    Attributes:
        vmap: Whether several columns may go through the network at once.
    """

    vmap: bool

    def give_up_vmap(self, error: Exception) -> None:
        """Go column by column from now on."""


class LayerNotes:
    """The notes of one forward that can be relied on.

    Args:
        recorder: What the forward noted.
        prediction: What it gave, with its graph.
        engine: What is known about the model.
        proofs: What was measured so far; kept between mini-batches, and added to.

    Attributes:
        complete: Positions of the parameters whose uses are all noted.
    """

    def __init__(self, recorder: LayerRecorder, prediction: Tensor, engine: Engine, proofs: Proofs) -> None:
        self._prediction = prediction
        self._engine = engine
        self._proofs = proofs
        self._values = recorder.values
        complete = complete_notes(recorder, prediction) if len(prediction) else CompleteNotes([], set(), None)
        self._notes = [n for n in complete.notes if any(use.position in complete.positions for use in n.uses)]
        self.complete = complete.positions
        # The same structure and kinds, at the same shapes, have the same layouts.
        self._signature = (complete.structure, tuple(note.signature for note in self._notes))
        self._layouts: Sequence[Layouts] | None = proofs.get(self._signature)
        self._permuted: Callable[[], LayerNotes | None] | None = None

    @property
    def is_proved(self) -> bool:
        """Whether it is known, or there is nothing to know, which rows belong to which datum."""
        return self._layouts is not None or not self._notes

    @property
    def numel(self) -> int:
        """How many numbers the output gradients of one column have."""
        return sum(note.output.numel() for note in self._notes)

    def prove(self) -> None:
        """Measure, with a random column, which rows belong to which datum; two backwards, unless it is known."""
        if not self.is_proved:
            u = self._prediction
            generator = torch.Generator(u.device).manual_seed(0)
            column = torch.randn(u.shape, dtype=u.dtype, device=u.device, generator=generator)
            self._measure(column, self._gradients(column.unsqueeze(0)))

    def factors(self, U: Tensor) -> LayerFactors:
        """The columns of F that loss-factor columns ``[M, *out]`` give.

        Cost: a backward a column; where the layouts are not known yet, one more, with a combination of these columns.
        For no columns, and columns that do not reach every layer and position, call :meth:`prove` before.
        """
        gradients = self._gradients(U)
        if not self.is_proved:
            self._measure(*_combination(U, gradients))
        parts: dict[int, list[Part]] = {}
        left = set(self.complete)
        for note, g, layouts in zip(self._notes, gradients, self._layouts or (), strict=False):
            found = _parts_of(note, g, layouts)
            for use, part in zip(note.uses, found, strict=True):
                if part is None:
                    left.discard(use.position)
                else:
                    parts.setdefault(use.position, []).append(part)
        known = {i: _merged(found) for i, found in sorted(parts.items()) if i in left}
        like = at_least_float32(self._values[0].detach().new_empty(0))
        return LayerFactors(known, len(self._prediction), len(U), like)

    def decide_by(self, permuted: Callable[[], LayerNotes | None]) -> None:
        """Have rows without a gradient matched to data, too, though they have no part in columns.

        Args:
            permuted: Gives the notes of a forward over the data in the order of ``permutation_of``, or ``None`` if
                there is no way to make one.
        """
        self._permuted = permuted

    def _decided(self, layouts: Sequence[Layouts]) -> Sequence[Layouts]:
        """The layouts with those that gradients leave open decided by inputs."""
        if self._permuted is None or all(len(found) <= 1 for found in layouts):
            return layouts
        other = self._permuted()
        if other is None or [n.signature for n in other._notes] != [n.signature for n in self._notes]:
            return [found if len(found) == 1 else () for found in layouts]
        num_data = len(self._prediction)
        return [
            found if len(found) == 1 else layouts_by_inputs(note, moved, found, num_data)
            for note, moved, found in zip(self._notes, other._notes, layouts, strict=True)
        ]

    def biases(self) -> dict[int, int]:
        """The position of the bias of each weight, where the two are used by the same calls, and no others are."""
        pairs: set[tuple[int, int]] = set()
        for note in self._notes:
            weights = [use for use in note.uses if isinstance(use, (LinearUse, ConvolutionUse))]
            plain = [use for use in note.uses if isinstance(use, BroadcastUse) and use.factor is use.index is None]
            whole = [use for use in plain if prod(use.aligned) == use.shape.numel() == max(use.aligned)]
            pairs |= {(w.position, b.position) for w in weights for b in whole}
        uses = [Counter(use.position for use in note.uses) for note in self._notes]
        return {w: b for w, b in pairs if {w, b} <= self.complete and all(count[w] == count[b] <= 1 for count in uses)}

    def _measure(self, column: Tensor, gradients: Sequence[Tensor]) -> None:
        rows = RowMeasurement(self._prediction)
        scaled = self._gradients(rows.scaled(column).unsqueeze(0))
        pairs = zip(self._notes, gradients, scaled, strict=True)
        found = [rows.layouts(note, g[0], h[0]) for note, g, h in pairs]
        self._layouts = tuple(layouts for layouts, _ in found)
        if self._signature[0] is not None and all(certain for _, certain in found):
            if len(self._proofs) >= _MAX_PROOFS:  # of sequences of ever new lengths, say
                self._proofs.clear()
            self._proofs[self._signature] = self._layouts
        self._layouts = self._decided(self._layouts)

    def _gradients(self, U: Tensor) -> list[Tensor]:
        """The gradients of ⟨u_m, prediction⟩ at the outputs of the noted layers ``[M, *output]``."""
        if not self._notes:
            return []
        if len(U) == 0:
            return [U.new_zeros(0, *note.output) for note in self._notes]
        convolutions = any(isinstance(use, ConvolutionUse) for note in self._notes for use in note.uses)
        # Under vmap, the backward of a convolution costs twice as much.
        if len(U) > 1 and self._engine.vmap and not convolutions:
            try:
                return self._backward(U, batched=True)
            except RuntimeError as error:
                self._engine.give_up_vmap(error)
        columns = [self._backward(u, batched=False) for u in U]
        if len(columns) == 1:
            return [g.unsqueeze(0) for g in columns[0]]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]

    def _backward(self, U: Tensor, batched: bool) -> list[Tensor]:
        edges = [note.edge for note in self._notes]
        found = grad(self._prediction, edges, U, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        lead = (len(U),) if batched else ()
        return [
            U.new_zeros(*lead, *note.output) if g is None else g.detach()
            for g, note in zip(found, self._notes, strict=True)
        ]


def _parts_of(note: Note, g: Tensor, layouts: Layouts) -> list[Part | None]:
    """What each use of a note contributes; by the first layout that suits all, since columns are the same by all."""
    found: list[Part | None] = [None for _ in note.uses]
    with torch.no_grad():
        for layout in layouts:
            found = [use.part(g, note.num_leading, layout) for use in note.uses]
            if all(part is not None for part in found):
                break
    return found


def _combination(U: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A random combination of columns, with its output gradients; a single column stays as it is."""
    if len(U) == 1:
        return U[0], list(gradients)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(U), generator=generator).to(U.device, U.dtype)

    def combine(columns: Tensor) -> Tensor:
        total: Tensor = torch.tensordot(weights.to(columns.dtype), columns, 1)
        return total

    return combine(U), [combine(g).unsqueeze(0) for g in gradients]


def _merged(parts: list[Part]) -> list[Part]:
    """The uses of one parameter, in as few parts as their kinds allow."""
    result: list[Part] = []
    for part in parts:
        for k, other in enumerate(result):
            merged = other.merged(part)
            if merged is not None:
                result[k] = merged
                break
        else:
            result.append(part)
    return result


class LayerFactors:
    r"""The columns of :math:`F = J^\top S` for the parameters of noted layers, at one mini-batch.

    A column for each datum n and each column m of the loss factor. Sums over a mini-batch are in the dtype of the
    parameters; squares, gradients and Gram matrices in at least float32.

    Attributes:
        positions: Parameters that are covered.
        num_data: N.
        num_columns: M.
        like: An empty tensor of the dtype and the device of sums.
    """

    def __init__(
        self, parts: Mapping[int, list[Part]], num_data: int, num_columns: int, like: Tensor | None = None
    ) -> None:
        self._parts = dict(parts)
        self.like = torch.empty(0) if like is None else like
        self.positions = sorted(self._parts)
        self.num_data = num_data
        self.num_columns = num_columns

    def parts(self, position: int) -> list[Part]:
        """What the uses of a covered parameter contribute."""
        return self._parts[position]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        return (t for parts in self._parts.values() for part in parts for t in part.tensors())

    def rmatmat(self, V: Mapping[int, Tensor]) -> Tensor:
        """Fᵀ V ``[N, M, K]`` for columns-last tensors ``[*shape, K]`` of covered parameters.

        Cost: a forward a column.
        """
        return _sum(part.rmatmat(V[i]) for i in self.positions if i in V for part in self._parts[i])

    def matmat(self, Z: Tensor) -> dict[int, Tensor]:
        """F Z as ``[*shape, K]`` for each covered parameter, with Z ``[N, M, K]``.

        Cost: the weight gradients of a backward a column, however many columns the loss factor has.
        """
        return {i: _sum(part.matmat(Z) for part in parts) for i, parts in self._parts.items()}

    def squares(self) -> dict[int, Tensor]:
        """The diagonal of F Fᵀ ``[*shape]`` for each covered parameter."""
        return {i: self.squares_of(i) for i in self._parts}

    def squares_of(self, position: int) -> Tensor:
        """The entries of the diagonal of F Fᵀ that belong to one covered parameter."""
        parts = self._parts[position]
        if len(parts) == 1:
            return parts[0].squares()
        return _sum(summed_gradients(parts, data).square_().sum((0, 1)) for data in self._some_data(parts))

    def _some_data(self, parts: list[Part]) -> Iterable[slice]:
        return slices(self.num_data, max(1, CHUNK_NUMEL // (self.num_columns * parts[0].shape.numel())))

    def gradients(self, data: slice) -> dict[int, Tensor]:
        """The columns of some data ``[n, M, *shape]`` for each covered parameter."""
        start, stop, _ = data.indices(self.num_data)
        return {i: summed_gradients(parts, slice(start, stop)) for i, parts in self._parts.items()}

    def column_squares(self) -> Tensor:
        """The squared norms of the columns ``[N, M]``: the diagonal of FᵀF."""
        return _sum(self._column_squares_of(parts) for parts in self._parts.values())

    def _column_squares_of(self, parts: list[Part]) -> Tensor:
        if len(parts) == 1:
            return parts[0].column_squares()
        return torch.cat([summed_gradients(parts, data).square_().flatten(2).sum(2) for data in self._some_data(parts)])

    def gram(self, other: LayerFactors | None = None, positions: Iterable[int] | None = None) -> Tensor:
        """FᵀF' ``[N M, N' M']``, the datum counting slower.

        Args:
            other: Columns of another mini-batch or another model of the same architecture; ``None`` for these.
            positions: Covered parameters that take part, ``None`` for all.
        """
        other = self if other is None else other
        chosen = self.positions if positions is None else sorted(positions)
        biases = self._biases(chosen)
        both = {i: j for i, j in other._biases(chosen).items() if biases.get(i) == j}
        here = self._with_biases(both)
        there = here if other is self else other._with_biases(both)
        merged = set(both.values())
        total = _sum(_gram_of(here[i], there[i]) for i in chosen if i not in merged)
        return total.reshape(self.num_data * self.num_columns, other.num_data * other.num_columns)

    def _biases(self, positions: Sequence[int]) -> dict[int, int]:
        """The position of the bias of each layer whose bias has the same output gradients as its weight."""
        alone = {i: self._parts[i][0] for i in positions if len(self._parts[i]) == 1}
        at = {part.h.data_ptr(): j for j, part in alone.items() if isinstance(part, DirectPart)}
        found: dict[int, int] = {}
        for i, part in alone.items():
            if isinstance(part, LinearPart) and part.g.data_ptr() in at and part.has_bias(alone[at[part.g.data_ptr()]]):
                found[i] = at.pop(part.g.data_ptr())  # which is the bias of one layer only
        return found

    def _with_biases(self, biases: Mapping[int, int]) -> dict[int, list[Part]]:
        """The parts, the weight of a layer with a bias being that of a layer whose last input is always one."""
        joined: dict[int, list[Part]] = {}
        for i in biases:
            (weight,) = self._parts[i]
            assert isinstance(weight, LinearPart)
            joined[i] = [weight.with_bias()]
        return {**self._parts, **joined}


def _gram_of(parts: list[Part], others: list[Part]) -> Tensor:
    if len(parts) == len(others) == 1:
        return parts[0].gram(others[0])
    return gram_of_gradients(parts, others)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors that nobody else holds."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total.add_(term)
    assert total is not None
    return total
