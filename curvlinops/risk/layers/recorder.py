"""Takes notes of the calls that a forward makes with tracked parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvlinops.risk.layers import broadcasting, kinds
from curvlinops.risk.layers.attention import multi_head_attention
from curvlinops.risk.layers.kinds import Describe, Source
from curvlinops.risk.layers.notes import Note, versions_of

T = torch.Tensor
_KINDS: dict[Any, Describe] = {
    F.linear: kinds.linear,
    torch.addmm: kinds.addmm,
    **dict.fromkeys([torch.matmul, torch.mm, T.matmul, T.mm, T.__matmul__], kinds.matmul),
    F.embedding: kinds.embedding,
    F.layer_norm: broadcasting.layer_norm,
    F.rms_norm: broadcasting.rms_norm,
    F.batch_norm: broadcasting.batch_norm,
    F.group_norm: broadcasting.group_norm,
    F.instance_norm: broadcasting.instance_norm,
    **dict.fromkeys([torch.add, T.add, T.add_, T.__add__, T.__radd__, T.__iadd__], broadcasting.add),
    **dict.fromkeys([torch.mul, torch.multiply, T.mul, T.multiply, T.__mul__, T.__rmul__], broadcasting.multiply),
    **dict.fromkeys([T.expand, T.expand_as, T.repeat, torch.broadcast_to, T.broadcast_to], broadcasting.expand),
    F.conv1d: kinds.convolution(1, False),
    F.conv2d: kinds.convolution(2, False),
    F.conv3d: kinds.convolution(3, False),
    F.conv_transpose1d: kinds.convolution(1, True),
    F.conv_transpose2d: kinds.convolution(2, True),
    F.conv_transpose3d: kinds.convolution(3, True),
}
_METHOD_VIEWS = [T.__getitem__, T.unsqueeze, T.squeeze, T.view, T.reshape, T.transpose, T.permute, T.t, T.flatten]
_FUNCTION_VIEWS = [
    torch.unsqueeze,
    torch.squeeze,
    torch.reshape,
    torch.transpose,
    torch.permute,
    torch.t,
    torch.flatten,
]
_PROPERTY_VIEWS = [T.T.__get__, T.mT.__get__]  # type: ignore[attr-defined]
_VIEWS = {*_METHOD_VIEWS, *_FUNCTION_VIEWS, *_PROPERTY_VIEWS, T.expand, T.contiguous}


@dataclass(eq=False)
class Region:
    """The nodes of the graph that one call made.

    Attributes:
        nodes: All of them.
        output: The last of them.
        positions: Parameters that it uses in a known way.
        views: Views of parameters that it uses in a known way.
        is_view: Whether it is itself a view, which only known uses may read.
    """

    nodes: set[Any]
    output: Any
    positions: set[int]
    views: list[Region] = field(default_factory=list)
    is_view: bool = False


class LayerRecorder(TorchFunctionMode):
    """Takes notes while it is active.

    A call is noted when a tensor that it is given *is* a tracked parameter, or a view of one. Nothing is left behind
    in the model.

    Args:
        values: The tracked parameters.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self.values = list(values)
        self.regions: list[Region] = []
        self._noted: list[tuple[Note, Region]] = []
        self._sources = {id(v): Source(i, v.shape, v, strides=v.stride()) for i, v in enumerate(values)}
        self._regions_of: dict[int, Region] = {}

    @property
    def notes(self) -> list[tuple[Note, Region]]:
        """The notes, without embeddings that turned out to be broadcast along the data later."""
        return [(note, region) for note, region in self._noted if not region.is_view]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and torch.is_grad_enabled():
            found = self._attend(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        if func in _KINDS or func in _VIEWS:
            return self._run(func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        def linear(*arguments: Any) -> Any:
            return self._run(F.linear, arguments, {})

        return multi_head_attention(linear, *args, **kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call and note it if it uses tracked parameters."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        sources = [s for s in map(self._source, tensors) if s is not None]
        if not sources or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        before = [t.grad_fn for t in tensors]
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or output.grad_fn is None or any(output.grad_fn is n for n in before):
            return output
        if all(_is_plain(t) for t in (output, *tensors)):
            self._note(func, args, kwargs, output, sources, before)
        return output

    def _source(self, tensor: Any) -> Source | None:
        found = self._sources.get(id(tensor))
        # A view that was changed in place is another tensor now.
        if found is None or found.tensor is not tensor:
            return None
        region = self._regions_of.get(id(tensor))
        return found if region is None or tensor.grad_fn is region.output else None

    def _note(
        self, func: Any, args: Any, kwargs: Any, output: Tensor, sources: list[Source], before: list[Any]
    ) -> None:
        region = Region(_nodes_between(output.grad_fn, before), output.grad_fn, set())
        describe = _KINDS.get(func)
        found = None
        if describe is not None:
            try:
                found = describe(self._source, output, *args, **kwargs)
            except TypeError:  # arguments that the description does not know
                found = None
        counts = Counter(s.position for s in sources)
        uses = [use for use in (found.uses if found is not None else []) if use is not None]
        noted = Counter(use.position for use in uses)
        uses = [use for use in uses if noted[use.position] == counts[use.position]]
        if found is not None and uses:
            self._accept(region, [s for s in sources if noted[s.position] == counts[s.position]])
            note = Note(
                tuple(uses), get_gradient_edge(output), output.shape, found.num_leading, versions_of(*found.kept)
            )
            self._noted.append((note, region))
        is_lookup = func is F.embedding and bool(uses) and uses[0].padding_idx is None  # type: ignore[attr-defined]
        if is_lookup or (func in _VIEWS and not uses and _is_of_first(sources, args)):
            self._keep_view(func, args, kwargs, output, sources[0], region, is_lookup)
        self.regions.append(region)

    def _accept(self, region: Region, sources: list[Source]) -> None:
        for source in sources:
            view = self._regions_of.get(id(source.tensor))
            if view is None:
                region.positions.add(source.position)
            else:
                region.views.append(view)
                view.is_view = True

    def _keep_view(
        self, func: Any, args: Any, kwargs: Any, output: Tensor, source: Source, region: Region, is_lookup: bool
    ) -> None:
        if not is_lookup:
            self._accept(region, [source])
            region.is_view = True
        index = _index_of_lookup(source, args[0]) if is_lookup else _index_of_view(source, func, args, kwargs)
        self._sources[id(output)] = Source(source.position, source.shape, output, index, is_lookup, source.strides)
        self._regions_of[id(output)] = region


def _entries(source: Source) -> Tensor:
    """Which entries of the flattened parameter a source shows, in its shape."""
    if source.index is not None:
        return source.index()
    return torch.arange(source.shape.numel(), device=source.tensor.device).reshape(source.shape)


def _index_of_view(source: Source, func: Any, args: Any, kwargs: Any) -> Callable[[], Tensor]:
    return lambda: func(_entries(source), *args[1:], **kwargs)


def _index_of_lookup(source: Source, indices: Tensor) -> Callable[[], Tensor]:
    indices = indices.clone()  # the caller may change its own
    return lambda: _entries(source)[indices]


def _is_of_first(sources: list[Source], args: Any) -> bool:
    """Whether a view is of the first argument, and of nothing that can change meanwhile, like a tensor of indices."""
    keys = [k for arg in args[1:] for k in (arg if isinstance(arg, tuple) else (arg,))]
    return [s.tensor is args[0] for s in sources] == [True] and not any(isinstance(k, (Tensor, list)) for k in keys)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor, not a subclass with a meaning of its own or one under vmap."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not wrapped


def _nodes_between(output: Any, before: list[Any]) -> set[Any]:
    """The nodes that lead from a call's output to its arguments."""
    stop = {node for node in before if node is not None}
    nodes, stack = set(), [output]
    while stack:
        node = stack.pop()
        if node is None or node in nodes or node in stop or hasattr(node, "variable"):
            continue
        nodes.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return nodes
