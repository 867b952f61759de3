"""A tape of the tangents of one forward: the linear operations that make J v from v, ready to run again.

While a forward carries dual numbers, every operation on a tangent is linear in it, and what else it takes was computed
from the primal values alone. The tape notes these operations below autograd, at the level of PyTorch's kernels, with
those other arguments as constants. Running it again costs 2 forward-units for each vector, reads nothing from the
model, and works where the forward looks at values, since only tensors are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_Geometry = tuple[Any, ...]


class NoTapeError(NotImplementedError):
    """A forward whose tangents cannot be replayed."""


@dataclass
class _Operation:
    """One kernel call.

    Attributes:
        function: The kernel.
        arguments: Its arguments, flat; constants are in place.
        structure: What the flat arguments are the leaves of.
        inputs: Positions that tangents fill, with their slots.
        buffers: Positions of constants that it writes to, each run to a fresh copy.
        outputs: Slots of its results.
        finished: Slots that nobody reads after it.
        is_flat: Whether the arguments are positional and not nested.
    """

    function: Any
    arguments: list[Any]
    structure: TreeSpec
    inputs: list[tuple[int, int]]
    buffers: list[int]
    outputs: list[int | None]
    finished: list[int]
    is_flat: bool

    def run(self, slots: dict[int, Tensor], under_vmap: bool) -> None:
        function = _UNDER_VMAP.get(self.function, self.function) if under_vmap else self.function
        arguments = list(self.arguments)
        for position, slot in self.inputs:
            arguments[position] = slots[slot]
        for position in self.buffers:
            arguments[position] = arguments[position].clone()
        if self.is_flat:
            result = function(*arguments)
        else:
            args, kwargs = tree_unflatten(arguments, self.structure)
            result = function(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else tree_flatten(result)[0]
        for output, tensor in zip(self.outputs, results, strict=True):
            if output is not None:
                slots[output] = tensor
        for slot in self.finished:
            slots.pop(slot, None)


class Tape:
    """The map v -> J v at one mini-batch, as a list of operations."""

    def __init__(self, operations: Sequence[_Operation], result: int | None, shape: torch.Size) -> None:
        self._operations = operations
        self._result = result
        self._shape = shape

    def replay(self, V: Sequence[Tensor], under_vmap: bool = False) -> Tensor:
        """J v for one vector, given as a tensor for each parameter; under vmap for many."""
        if self._result is None:
            return V[0].new_zeros(self._shape)
        slots = dict(enumerate(V))
        for operation in self._operations:
            operation.run(slots, under_vmap)
        return slots[self._result]

    def constants(self) -> Iterator[Tensor]:
        """The tensors that the tape holds."""
        for operation in self._operations:
            yield from (a for a in operation.arguments if isinstance(a, Tensor))


class TapeRecorder(TorchDispatchMode):
    """Notes the operations on tangents while it is active.

    A tangent is known by its memory, not by its Python object, since the same one is handed out anew by every layer
    of PyTorch. What the tape could not repeat faithfully is refused: a constant that is changed afterwards, a buffer
    that tangents are written to through a view, a tangent that becomes a Python number.

    Args:
        tangents: The tangents of the parameters; they fill the first slots.
    """

    def __init__(self, tangents: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots: dict[_Geometry, int] = {}
        self._storages: dict[int, StorageWeakRef] = {}
        self._operations: list[_Operation] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._num_slots = 0
        for tangent in tangents:
            self._new_slot(tangent)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments, structure = tree_flatten((args, kwargs))
        inputs = [
            (i, slot)
            for i, a in enumerate(arguments)
            if isinstance(a, Tensor) and (slot := self._slot_of(a)) is not None
        ]
        if not inputs or func in _WITHOUT_RESULT:
            return func(*args, **kwargs)
        if func in _TO_PYTHON:
            raise NoTapeError("The forward turns a tangent into a Python number.")
        buffers = self._buffers(func, arguments, inputs) if func._schema.is_mutable else []
        for i in buffers:
            arguments[i] = arguments[i].clone()
        result = func(*args, **kwargs)
        is_flat = not kwargs and not any(isinstance(a, (list, tuple, dict)) for a in args)
        self._note(_Operation(func, arguments, structure, inputs, buffers, [], [], is_flat), result)
        return result

    def finish(self, tangent: Tensor | None, shape: torch.Size) -> Tape:
        """The tape of the operations that the prediction's tangent depends on.

        Args:
            tangent: The tangent of the prediction, ``None`` if it depends on no parameter.
            shape: Shape of the prediction.

        Raises:
            NoTapeError: If the tape could not repeat what was done.
        """
        result = None if tangent is None else self._slot_of(tangent)
        if tangent is not None and result is None:
            raise NoTapeError("The tangent of the prediction was made by operations that cannot be followed.")
        for constant, version in self._versions:
            if constant._version != version:
                raise NoTapeError("The forward changes a tensor in place that its tangents depend on.")
        operations = _needed(self._operations, result)
        return Tape(operations, result, shape)

    def _slot_of(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()._cdata
        known = self._storages.get(storage)
        if known is None or known.expired():
            return None
        slot = self._slots.get(_geometry(tensor))
        if slot is None:
            raise NoTapeError("A tangent's memory is read in a way that cannot be followed.")
        return slot

    def _new_slot(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        slot = self._slots[_geometry(tensor)] = self._num_slots
        self._num_slots += 1
        return slot

    def _buffers(self, func: Any, arguments: list[Any], inputs: list[tuple[int, int]]) -> list[int]:
        """Positions of constants that tangents are about to be written to."""
        filled = {i for i, _ in inputs}
        written = [
            i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        buffers = [i for i in written if i not in filled]
        if any(i >= len(arguments) or not isinstance(arguments[i], Tensor) for i in buffers):
            raise NoTapeError("The forward writes tangents to a list of buffers.")
        if any(arguments[i]._is_view() for i in buffers):
            raise NoTapeError("The forward writes tangents through a view of a buffer.")
        return buffers

    def _note(self, operation: _Operation, result: Any) -> None:
        for i, _ in operation.inputs:
            operation.arguments[i] = None
        self._versions += [(c, c._version) for c in operation.arguments if isinstance(c, Tensor)]
        results = tree_flatten(result)[0]
        operation.outputs = [self._slot_for(r) if isinstance(r, Tensor) else None for r in results]
        self._operations.append(operation)

    def _slot_for(self, tensor: Tensor) -> int:
        """The slot of a result, which is an old one where an operation works in place."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        is_old = known is not None and not known.expired() and _geometry(tensor) in self._slots
        return self._slots[_geometry(tensor)] if is_old else self._new_slot(tensor)


def _geometry(tensor: Tensor) -> _Geometry:
    """Which numbers of which memory a tensor shows."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _needed(operations: Sequence[_Operation], result: int | None) -> list[_Operation]:
    """The operations that the result depends on, with the slots that each is the last to read."""
    needed = set() if result is None else {result}
    chosen: list[_Operation] = []
    for operation in reversed(operations):
        # What is written in place may be seen through another slot.
        if operation.function._schema.is_mutable or any(slot in needed for slot in operation.outputs):
            inputs = {slot for _, slot in operation.inputs}
            operation.finished = [slot for slot in inputs if slot not in needed]
            needed |= inputs
            chosen.append(operation)
    return chosen[::-1]


#: Kernels in place that vmap would run column by column.
_UNDER_VMAP: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.addmm_.default: lambda total, A, B: total.add_(A @ B),
    torch.ops.aten.baddbmm_.default: lambda total, A, B: total.add_(A @ B),
}
_WITHOUT_RESULT = {torch.ops.aten.is_same_size.default, torch.ops.aten._has_same_storage_numel.default}
_TO_PYTHON = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
