"""Proofs that notes can be relied on: that they say all about a parameter, and which rows belong to which datum."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from curvlinops.risk.graph import nodes_of
from curvlinops.risk.layers.notes import Layout, Note
from curvlinops.risk.layers.recorder import LayerRecorder, Region
from curvlinops.risk.losses.base import at_least_float32

#: Layouts that a note can have as far as was measured: one, none, or several where too few rows have a gradient.
Layouts = tuple[Layout, ...]

#: Layouts of the notes that were measured, by everything that they depend on.
Proofs = dict[Hashable, tuple[Layouts, ...]]

#: Names of nodes that can move rows from datum to datum, in a way that depends on the data.
_ROUTING = ("Index", "Gather", "Scatter", "MaskedSelect", "MaskedScatter", "Take", "Put", "Sort", "Topk", "Segment")

#: Attributes of nodes that are axes, or numbers of places to move by.
_AXES = tuple(f"_saved_{name}" for name in ("dim", "dims", "dim0", "dim1", "keepdim", "shifts", "split_size", "start"))
#: Those that each kind of node has.
_NAMES_OF_AXES: dict[type, tuple[str, ...]] = {}

#: Directions on which rows are compared.
_NUM_DIRECTIONS = 4

#: So many rows with a gradient make it certain that a layout is not found by chance.
_ENOUGH_ROWS = 16


@dataclass(frozen=True)
class CompleteNotes:
    """Notes of one forward that lead to the prediction.

    Attributes:
        notes: The notes.
        positions: Parameters that these notes say all about.
        structure: Names, shapes and axes of all nodes of the prediction's graph; ``None`` where it moves rows by
            indices, or in a user's function, which can differ in the next mini-batch.
    """

    notes: list[Note]
    positions: set[int]
    structure: Hashable


def complete_notes(recorder: LayerRecorder, prediction: Tensor) -> CompleteNotes:
    """Find the parameters that enter the prediction by noted calls only.

    Every edge of the prediction's graph that ends at a parameter, or inside of what a noted call made of it, must
    come from that call itself. An edge from elsewhere is a use that is not noted: of a call that is not known, of a
    scripted module, of vmap inside of the model, or of a gradient taken inside of the model, which reads a weight
    through the nodes of its call.

    Cost: a walk through the graph; no work with numbers.

    Args:
        recorder: What was noted.
        prediction: What the forward gave.
    """
    values = recorder.values
    positions = {id(value): i for i, value in enumerate(values)}
    owners = {node: region for region in recorder.regions for node in region.nodes}
    reached, structure, doubtful = (
        set(),
        [],
        {i for i, v in enumerate(values) if v._backward_hooks or v.grad_fn is not None},
    )
    for node in nodes_of(prediction):
        reached.add(node)
        structure.append((node.name(), tuple(tuple(m.shape) for m in node._input_metadata), _axes_of(node)))
        reader = owners.get(node)
        for parent, _ in node.next_functions:
            if parent is not None:
                doubtful |= _unknown_use(parent, reader, owners, positions)
    notes = [note for note, region in recorder.notes if region.output in reached and note.is_intact]
    lost = {
        use.position
        for note, region in recorder.notes
        if region.output in reached and not note.is_intact
        for use in note.uses
    }
    used = {use.position for note in notes for use in note.uses}
    routed = any(name.startswith(_ROUTING) for name, _, _ in structure) or any(
        isinstance(node, BackwardCFunction) for node in reached
    )
    return CompleteNotes(notes, used - doubtful - lost, None if routed else tuple(structure))


def _axes_of(node: Any) -> tuple[Any, ...]:
    """The axes and sizes that a node works along, which neither its name nor its shapes tell."""
    kind = type(node)
    if kind not in _NAMES_OF_AXES:
        _NAMES_OF_AXES[kind] = tuple(name for name in _AXES if hasattr(kind, name))
    values = (getattr(node, name) for name in _NAMES_OF_AXES[kind])
    return tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in values)


def _unknown_use(parent: Any, reader: Region | None, owners: dict[Any, Region], positions: dict[int, int]) -> set[int]:
    """The parameters that an edge uses in a way that is not known."""
    if hasattr(parent, "variable"):
        position = positions.get(id(parent.variable))
        known = position is None or (reader is not None and position in reader.positions)
        return set() if known else {position}  # type: ignore[arg-type]
    region = owners.get(parent)
    if region is None or region is reader or (parent is region.output and not region.is_view):
        return set()
    if parent is region.output and reader is not None and region in reader.views:
        return set()
    return _positions_behind(region)


def _positions_behind(region: Region) -> set[int]:
    return region.positions.union(*(_positions_behind(view) for view in region.views))


# ------------------------------------------------------------------- rows and data


class RowMeasurement:
    """Finds where the datum is among the leading axes of each layer's output, at one mini-batch.

    With datum n's column scaled by z_n, a row of datum n gets z_n times its output gradient. Rows are compared on a
    few random directions: where rows differ, these differ as much.

    Args:
        prediction: The prediction.

    Attributes:
        z: The factors ``[N]``: powers of two with random signs, by which a backward scales without rounding.
    """

    def __init__(self, prediction: Tensor) -> None:
        num_data, device, dtype = len(prediction), prediction.device, prediction.dtype
        self._generator = torch.Generator().manual_seed(0)
        largest = 2 if dtype == torch.float16 else 6
        powers = 2.0 ** torch.arange(-largest, largest + 1)
        choices = torch.cat([powers, -powers])
        # For few data all factors differ.
        order = [torch.randperm(len(choices), generator=self._generator) for _ in range(-(-num_data // len(choices)))]
        self.z = choices[torch.cat(order)[:num_data]].to(device, dtype)
        self._known: dict[tuple[int, torch.dtype], tuple[list[Layout], Tensor]] = {}

    def scaled(self, column: Tensor) -> Tensor:
        """A column with each datum's entries scaled."""
        return column * self.z.reshape(-1, *(1 for _ in column.shape[1:]))

    def layouts(self, note: Note, g: Tensor, scaled: Tensor) -> tuple[Layouts, bool]:
        """The layouts that explain every row, and whether they are certain to do so in other mini-batches.

        Several give each row that has a gradient to the same datum. With few gradients that are not zero it is not
        certain.

        Args:
            note: The note.
            g: Its output gradient, in the output's shape.
            scaled: The same for the scaled column.
        """
        if note.num_rows == 0 or note.num_rows % len(self.z):
            return (), True
        rows, scaled_rows = self._on_directions(note.num_rows, g, scaled)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        if not bool(lengths.isfinite().all()):
            return tuple(self._candidates(note.num_rows, rows.dtype)[0]), False  # the sums will be refused
        noise = 64 * torch.finfo(g.dtype).eps * lengths.max()
        live = lengths > noise
        num_live = int(live.sum())
        layouts, factors = self._candidates(note.num_rows, rows.dtype)
        if num_live == 0:
            return tuple(layouts), False
        certain = num_live >= min(note.num_rows, _ENOUGH_ROWS)
        ratios = (scaled_rows * rows).sum(1) / lengths.square()
        # Factors differ by a factor of two at least, so that a wrong one is far away in any precision.
        fits = (((ratios / factors - 1).abs_() <= 0.2) | ~live).all(1).nonzero().flatten().tolist()
        if not fits or not _are_alike([layouts[fit] for fit in fits], live):
            return (), certain and not fits
        expected = factors[fits[0]].unsqueeze(1)
        errors = torch.linalg.vector_norm(scaled_rows - rows * expected, dim=1)
        allowed = (_tolerance(g) * lengths).masked_fill_(~live, 0.0) + noise
        agrees = bool((errors <= allowed * expected.squeeze(1).abs()).all())
        return (tuple(layouts[fit] for fit in fits) if agrees else ()), certain and len(fits) == 1

    def _on_directions(self, num_rows: int, *gradients: Tensor) -> list[Tensor]:
        width = gradients[0].numel() // num_rows
        directions = torch.randn(_NUM_DIRECTIONS, width, generator=self._generator).T
        directions = directions.to(gradients[0].device, gradients[0].dtype)
        return [at_least_float32(g.reshape(num_rows, width) @ directions) for g in gradients]

    def _candidates(self, num_rows: int, dtype: torch.dtype) -> tuple[list[Layout], Tensor]:
        """The layouts that so many rows can have, and the factor of each row in them ``[layouts, rows]``."""
        if (num_rows, dtype) not in self._known:
            num_data, each = len(self.z), num_rows // len(self.z)
            divisors = [k for k in range(1, each + 1) if each % k == 0] if num_data > 1 else [1]
            layouts = [Layout(k, num_data, each // k) for k in divisors]
            z = self.z.to(dtype).reshape(1, -1, 1)
            factors = [z.expand(t.before, num_data, t.after).reshape(-1) for t in layouts]
            self._known[num_rows, dtype] = layouts, torch.stack(factors)
        return self._known[num_rows, dtype]


def _are_alike(layouts: list[Layout], live: Tensor) -> bool:
    """Whether layouts give each row that has a gradient to the same datum."""
    if len(layouts) == 1:
        return True
    first, *others = (
        torch.arange(t.num_data, device=live.device).reshape(1, -1, 1).expand(t.before, -1, t.after).reshape(-1)[live]
        for t in layouts
    )
    return all(torch.equal(first, other) for other in others)


def _tolerance(g: Tensor) -> float:
    """How much of a row's gradient rounding may change."""
    if g.dtype in (torch.float16, torch.bfloat16):
        return 0.1
    return 1e-6 if g.dtype == torch.float64 else 2e-3


# ---------------------------------------------------------------------- by inputs


def permutation_of(num_data: int) -> Tensor:
    """An order of the data in which none is at its place."""
    return torch.arange(num_data).roll(1)


def layouts_by_inputs(note: Note, permuted: Note, layouts: Layouts, num_data: int) -> Layouts:
    """Those layouts by which the inputs of a note follow the data, which were put in another order.

    It tells what no gradient tells, where the rows differ.

    Args:
        note: The note.
        permuted: The same call in a forward over the data in the order of :func:`permutation_of`.
        layouts: What is possible.
        num_data: Number of data.
    """
    order = permutation_of(num_data)
    for use, moved in zip(note.uses, permuted.uses, strict=True):
        a, b = getattr(use, "input", None), getattr(moved, "input", None)
        if a is None or b is None or a.shape != b.shape:
            continue
        size = 1e-3 * float(a.abs().amax()) if a.numel() else 0.0
        fits = []
        for t in layouts:
            rows = a.reshape(t.before, num_data, t.after, -1)[:, order.to(a.device)]
            if torch.allclose(rows, b.reshape(rows.shape), rtol=1e-3, atol=size):
                fits.append(t)
        return tuple(fits[:1])  # rows that fit several are the same in all of them
    return layouts[:1]  # nothing but sums over all rows is made of it
