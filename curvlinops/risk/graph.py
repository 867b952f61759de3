"""What the autograd graph of a prediction says about the model: parts that cannot be differentiated as needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode


def nodes_of(*outputs: Tensor) -> Iterator[Any]:
    """All nodes of the graph behind some tensors."""
    stack, seen = [output.grad_fn for output in outputs], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def saved_tensors(*outputs: Tensor) -> Iterator[Tensor]:
    """The tensors that the graph behind some tensors holds for its backward.

    What checkpointing does not hold is left out: to read it would compute it.
    """
    for node in nodes_of(*outputs):
        is_ours = isinstance(node, BackwardCFunction)
        for name in ["saved_tensors"] if is_ours else _saved_names(type(node)):  # type: ignore[arg-type]
            saved = _read(node, name)
            yield from (t for t in (saved if isinstance(saved, tuple) else (saved,)) if isinstance(t, Tensor))


def _read(node: Any, name: str) -> Any:
    with contextlib.suppress(_WouldComputeError), _NothingComputed():  # type: ignore[no-untyped-call]
        return getattr(node, name)


class _WouldComputeError(Exception):
    """What is read is not held."""


class _NothingComputed(TorchDispatchMode):
    """Refuses every kernel but the one by which a node hands out its own result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return func(*args, **(kwargs or {}))
        raise _WouldComputeError


@cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def are_used(prediction: Tensor, values: Sequence[Tensor]) -> list[bool]:
    """Whether the graph behind a tensor reaches each of some leaves."""
    parents = (parent for node in nodes_of(prediction) for parent, _ in node.next_functions)
    reached = {id(parent.variable) for parent in parents if parent is not None and hasattr(parent, "variable")}
    return [id(value) in reached for value in values]


def operations_in(prediction: Tensor, names: Sequence[str]) -> list[str]:
    """Which of some operations are in the graph behind a tensor, by part of their names."""
    kinds = {type(node).__name__ for node in nodes_of(prediction)}
    return [name for name in names if any(name in kind for kind in kinds)]


def custom_functions(prediction: Tensor) -> list[str]:
    """Names of the user-written autograd functions behind a tensor."""
    found = {_name(node) for node in nodes_of(prediction) if isinstance(node, BackwardCFunction) and not _is_ours(node)}
    return sorted(found - {"CheckpointFunction"})


def named(prediction: Tensor) -> str:
    """The user-written autograd functions behind a tensor, for an error message."""
    functions = custom_functions(prediction)
    return f" (custom functions here: {', '.join(functions)})" if functions else ""


def refuse_by_name(prediction: Tensor, twice: bool) -> None:
    """Refuse what would give a wrong number or an obscure error.

    Args:
        prediction: A prediction with its graph.
        twice: Whether the graph is going to be differentiated twice.

    Raises:
        NotImplementedError: For reentrant checkpointing and, when differentiated twice, `once_differentiable`.
    """
    for node in nodes_of(prediction):
        if not isinstance(node, BackwardCFunction):
            continue
        if _name(node) == "CheckpointFunction":
            raise NotImplementedError(
                "Reentrant activation checkpointing is not supported: call torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)."
            )
        if twice and _is_once_differentiable(node):
            raise NotImplementedError(
                f"The autograd function {_name(node)} is marked once_differentiable, but it must be differentiated "
                "twice here: write its backward with differentiable operations, or give it a jvp."
            )


def _name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def _is_ours(node: Any) -> bool:
    return str(node._forward_cls.__module__).startswith(f"{__package__}.")


def _is_once_differentiable(node: Any) -> bool:
    backward = getattr(node._forward_cls, "backward", None)
    code = getattr(backward, "__code__", None)
    return hasattr(backward, "__wrapped__") and code is not None and "torch" in code.co_filename
