"""Notes of the linear layers that a forward runs through, with the proofs that they can be relied on.

A note is taken when the weight or bias of a call *is* a tracked parameter. Two things are proved, not assumed: that
the notes are all there is (each parameter is used as often in the graph as it is noted), and that row n of a layer's
output belongs to datum n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlinops.risk.graph import nodes_of
from curvlinops.risk.verification import coarsest_dtype, tolerance


@dataclass(frozen=True)
class LinearNote:
    """One call of a linear layer.

    Attributes:
        weight: Position of its weight among the parameters, if it is one of them.
        bias: Position of its bias likewise.
        input: Its input ``[N, ..., in]``.
        edge: The gradient edge of its output ``[N, ..., out]``, as it was before any in-place activation.
    """

    weight: int | None
    bias: int | None
    input: Tensor
    edge: GradientEdge

    @property
    def parameters(self) -> list[int]:
        """Positions of the parameters it uses."""
        return [i for i in (self.weight, self.bias) if i is not None]


class LinearLayerRecorder(TorchFunctionMode):
    """Takes notes of the calls of `F.linear` while it is active.

    Args:
        values: The tracked parameters.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self._positions = {id(value): i for i, value in enumerate(values)}
        self.notes: list[LinearNote] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and output.requires_grad:
            self._note(output, *args, **(kwargs or {}))
        return output

    def _note(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        positions = self._positions.get(id(weight)), self._positions.get(id(bias))
        if positions != (None, None):
            self.notes.append(LinearNote(*positions, input.detach(), get_gradient_edge(output)))


def reliable_notes(
    notes: Sequence[LinearNote], prediction: Tensor, values: Sequence[Tensor], proved: set[tuple[int, ...]] | None
) -> list[LinearNote]:
    """The notes whose parameters are used nowhere else, and whose rows are the data.

    Uses are counted in the graph of each mini-batch. What counting cannot see is measured at the first: which axis is
    the datum, and whether the gradient from the note is autograd's (it is not where a graph was differentiated inside
    of the model, or a noted call leads nowhere).

    Cost: three backwards at the first mini-batch.

    Args:
        notes: Notes of one forward.
        prediction: What the forward gave.
        values: The tracked parameters.
        proved: Parameters of the layers that were found reliable at the first mini-batch, or ``None`` there.
    """
    uses = _uses_in_graph(prediction, values)
    noted = Counter(i for note in notes for i in note.parameters)
    single = [note for note in notes if all(uses[i] == noted[i] == 1 for i in note.parameters)]
    with_rows = [note for note in single if note.input.ndim > 1 and len(note.input) == len(prediction)]
    if proved is not None:
        return [note for note in with_rows if tuple(note.parameters) in proved]
    return _measured(with_rows, prediction, values) if with_rows else []


def _uses_in_graph(prediction: Tensor, values: Sequence[Tensor]) -> Counter[int]:
    """How often the graph of the prediction reads each parameter."""
    positions = {id(value): i for i, value in enumerate(values)}
    uses: Counter[int] = Counter()
    for node in nodes_of(prediction):
        for parent, _ in node.next_functions:
            if parent is not None and hasattr(parent, "variable"):
                uses[positions.get(id(parent.variable), -1)] += 1
    return uses


def _measured(notes: Sequence[LinearNote], prediction: Tensor, values: Sequence[Tensor]) -> list[LinearNote]:
    """Scale datum n's output gradient by z_n: in the layers whose rows are the data, row n is scaled by z_n."""
    generator = torch.Generator(prediction.device).manual_seed(0)
    u = torch.randn(prediction.shape, dtype=prediction.dtype, device=prediction.device, generator=generator)
    z = torch.randn(len(prediction), dtype=prediction.dtype, device=prediction.device, generator=generator)
    plain = output_gradients(notes, prediction, u)
    scaled = output_gradients(notes, prediction, u * _along_rows(z, u))
    used = sorted({i for note in notes for i in note.parameters})
    gradients = grad(prediction, [values[i] for i in used], u, retain_graph=True, allow_unused=True)
    of_autograd = dict(zip(used, gradients, strict=True))
    allowed = tolerance(coarsest_dtype(prediction, *values), prediction.device)
    return [
        note
        for note, g, h in zip(notes, plain, scaled, strict=True)
        if _close(h, g * _along_rows(z, g), allowed)
        and all(_close(of_autograd[i], part, allowed) for i, part in _gradients_from(note, g))
    ]


def _gradients_from(note: LinearNote, g: Tensor) -> list[tuple[int, Tensor]]:
    rows, a = g.flatten(0, -2), note.input.flatten(0, -2)
    parts = [(note.weight, rows.T @ a), (note.bias, rows.sum(0))]
    return [(i, part) for i, part in parts if i is not None]


def _close(expected: Tensor | None, actual: Tensor, allowed: float) -> bool:
    if expected is None or expected.shape != actual.shape:
        return False
    return bool((actual - expected).abs().max() <= allowed * expected.abs().max())


def _along_rows(z: Tensor, like: Tensor) -> Tensor:
    return z.reshape(-1, *(1 for _ in like.shape[1:]))


def output_gradients(notes: Sequence[LinearNote], prediction: Tensor, u: Tensor) -> list[Tensor]:
    """The gradients of ⟨u, prediction⟩ at the outputs of the noted layers."""
    edges = [note.edge for note in notes]
    gradients = grad(prediction, edges, u, retain_graph=True, allow_unused=True)
    outputs = [(*note.input.shape[:-1], 1) for note in notes]
    return [u.new_zeros(shape) if g is None else g for g, shape in zip(gradients, outputs, strict=True)]
