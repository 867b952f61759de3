"""The tensor formats: what vectors look like on the way into and out of an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """Names, shapes, dtype and device of the tensors that together form one vector.

    Args:
        shapes: Shape of each tensor, in order.
        dtype: Their common dtype.
        device: Their common device.
        names: Name of each tensor, or ``None`` where they have none.

    >>> space = Space(((2, 3), (3,)), torch.float32, torch.device("cpu"), ("weight", "bias"))
    >>> space.numel
    9
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    names: tuple[str, ...] | None = None

    @staticmethod
    def flat(numel: int, dtype: torch.dtype, device: torch.device) -> Space:
        """The nameless space of one tensor ``[numel]``; it adopts any space of its size."""
        return Space(((numel,),), dtype, device)

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each tensor."""
        return [prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Number of entries of a vector, D."""
        return sum(self.sizes)

    @property
    def is_flat(self) -> bool:
        """Whether this is the space of plain vectors, without a structure of its own."""
        return self.names is None and len(self.shapes) == 1 and len(self.shapes[0]) == 1

    def label(self, index: int) -> str:
        """How error messages call the tensor at a position."""
        return f"'{self.names[index]}'" if self.names is not None else f"number {index}"

    def select(self, indices: Sequence[int]) -> Space:
        """The space of some of the tensors."""
        names = None if self.names is None else tuple(self.names[i] for i in indices)
        return Space(tuple(self.shapes[i] for i in indices), self.dtype, self.device, names)

    def to(self, dtype: torch.dtype, device: torch.device) -> Space:
        """The same tensors in another dtype or on another device."""
        return Space(self.shapes, dtype, device, self.names)

    def join(self, other: Space, what: str) -> Space:
        """The space two operators share: shapes agree, names agree where both have them.

        Raises:
            ValueError: If the two are different spaces.
        """
        if self.dtype != other.dtype or self.device != other.device:
            raise ValueError(
                f"{what}: both need one dtype and device, got {self.dtype} on {self.device} and "
                f"{other.dtype} on {other.device}."
            )
        if self == other:
            return self
        if self.numel == other.numel and (self.is_flat or other.is_flat):
            return other if self.is_flat else self
        if self.shapes == other.shapes and (self.names is None or other.names is None):
            return other if self.names is None else self
        raise ValueError(f"{what}: the spaces differ.\n  left:  {self.describe()}\n  right: {other.describe()}")

    def describe(self) -> str:
        """Names and shapes in one line, shortened when long."""
        names = self.names if self.names is not None else ("",) * len(self.shapes)
        entries = [f"{name}{list(shape)}" for name, shape in zip(names, self.shapes, strict=True)]
        shown = entries if len(entries) <= 8 else [*entries[:6], "...", entries[-1]]
        return ", ".join(shown)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut ``[D, K]`` into columns-last tensors ``[*shape, K]``."""
        parts = torch.split(flat, self.sizes)
        return [part.reshape(*shape, flat.shape[1]) for part, shape in zip(parts, self.shapes, strict=True)]

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector ``[D]`` in the shapes of the tensors."""
        return [part.squeeze(-1) for part in self.split(vector.unsqueeze(-1))]

    @staticmethod
    def merge(columns: Sequence[Tensor]) -> Tensor:
        """Glue columns-last tensors ``[*shape, K]`` to ``[D, K]``, each column in one piece of memory."""
        together = _as_one(columns)
        if together is not None:
            return together
        rows = [c.movedim(-1, 0).reshape(c.shape[-1], prod(c.shape[:-1])) for c in columns]
        return (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).T

    def read(self, M: Any, columns_first: bool = False) -> tuple[list[Tensor], Format]:
        """Bring a vector or matrix in any of the four formats to columns-last tensors.

        Args:
            M: Flat tensor ``[D]`` or ``[D, K]``, or list, tuple or dict of ``[*shape]`` or ``[*shape, K]``.
            columns_first: Whether the column axis comes first (for ``M @ A``).

        Returns:
            The tensors ``[*shape, K]`` and the format in which the answer is to be given.

        Raises:
            TypeError: If M is not made of tensors.
            ValueError: If a shape, dtype, device or name does not fit this space.
        """
        if isinstance(M, Tensor):
            return self._read_flat(M, columns_first)
        if isinstance(M, Mapping):
            kind, tensors = "dict", self._in_order(M)
        elif isinstance(M, (list, tuple)):
            kind, tensors = "list", list(M)
        else:
            raise TypeError(
                f"Expected a tensor, or a list or dict of tensors, got {type(M).__name__}. "
                "Wrap the operator with .to_scipy() to multiply NumPy arrays."
            )
        if len(tensors) != len(self.shapes):
            raise ValueError(f"Expected {len(self.shapes)} tensors ({self.describe()}), got {len(tensors)}.")
        for index, tensor in enumerate(tensors):
            self._check_kind(tensor, self.label(index))
        is_vector = self._is_vector(tensors, columns_first)
        moved = [
            t.unsqueeze(-1) if is_vector else (t.movedim(0, -1) if columns_first else t) for t in map(_plain, tensors)
        ]
        return moved, Format(kind, is_vector, columns_first)

    def _read_flat(self, M: Tensor, columns_first: bool) -> tuple[list[Tensor], Format]:
        self._check_kind(M, "M")
        axis = -1 if columns_first else 0
        if M.ndim not in (1, 2) or M.shape[axis] != self.numel:
            expected = f"[{self.numel}] or " + (f"[K, {self.numel}]" if columns_first else f"[{self.numel}, K]")
            raise ValueError(f"Expected a tensor of shape {expected}, got {list(M.shape)}.")
        is_vector = M.ndim == 1
        M = _plain(M)
        flat = M.unsqueeze(-1) if is_vector else (M.T if columns_first else M)
        return self.split(flat), Format("flat", is_vector, columns_first)

    def _in_order(self, M: Mapping[str, Tensor]) -> list[Tensor]:
        if self.names is None:
            raise ValueError("A dict was given, but this space has no names: pass a list or a flat tensor.")
        missing = [name for name in self.names if name not in M]
        unknown = [name for name in M if name not in self.names]
        if missing or unknown:
            raise ValueError(f"The dict's names do not fit: missing {missing}, unknown {unknown}.")
        return [M[name] for name in self.names]

    def _check_kind(self, tensor: Any, label: str) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Entry {label}: expected a tensor, got {type(tensor).__name__}.")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"Entry {label}: expected {self.dtype} on {self.device}, got {tensor.dtype} on {tensor.device}."
            )

    def _is_vector(self, tensors: Sequence[Tensor], columns_first: bool) -> bool:
        shapes = [tuple(t.shape) for t in tensors]
        if shapes == list(self.shapes):
            return True
        stripped = [(s[1:], s[:1]) if columns_first else (s[:-1], s[-1:]) for s in shapes]
        counts = {count for _, count in stripped}
        if [s for s, _ in stripped] == list(self.shapes) and len(counts) == 1 and counts != {()}:
            return False
        form = "[K, *shape]" if columns_first else "[*shape, K]"
        wrong = [
            f"{self.label(i)}: expected {list(want)}, got {list(got)}"
            for i, (want, got) in enumerate(zip(self.shapes, shapes, strict=True))
            if got != want
        ]
        raise ValueError(
            f"Expected all tensors in the shapes of the space, or all as {form} with one K. " + "; ".join(wrong)
        )


@dataclass(frozen=True)
class Format:
    """How a question was asked, hence how its answer is given."""

    kind: str
    is_vector: bool
    columns_first: bool

    def check(self, space: Space) -> None:
        """Raise before any work if the answer could not be given in this format."""
        if self.kind == "dict" and space.names is None:
            raise ValueError("A dict was given, but the answer has no names: pass a list or a flat tensor.")

    def write(self, columns: Sequence[Tensor], space: Space) -> Any:
        """Columns-last tensors in this format."""
        if self.kind == "flat":
            flat = space.merge(columns)
            return flat.squeeze(-1) if self.is_vector else (flat.T if self.columns_first else flat)
        moved = [c.squeeze(-1) if self.is_vector else (c.movedim(-1, 0) if self.columns_first else c) for c in columns]
        return dict(zip(space.names or (), moved, strict=True)) if self.kind == "dict" else moved


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32 for half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _as_one(columns: Sequence[Tensor]) -> Tensor | None:
    """The matrix ``[D, K]`` that columns-last tensors are the consecutive rows of, where they share its memory."""
    first, num_columns = columns[0], columns[0].shape[-1]
    if num_columns < 2:
        return None
    numel = sum(c[..., 0].numel() for c in columns)
    offset = first.storage_offset()
    if any(c.requires_grad for c in columns):  # the graph of a matrix over their memory would be that of the first
        return None
    for c in columns:
        same = c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and c.storage_offset() == offset
        if numel == 0 or not same or c.stride(-1) != numel or not c[..., 0].is_contiguous():
            return None
        offset += c[..., 0].numel()
    return torch.as_strided(first, (numel, num_columns), (1, numel))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its graph; tensors of inference mode are copied since autograd cannot save them."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
