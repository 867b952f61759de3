"""What must be known of PyTorch's modules: their wrappers, where their tensors lie, and who uses them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def places_of(module: nn.Module, kind: str) -> dict[str, Tensor]:
    """The tensors of a module by name, one name for each place that holds one.

    Weights that are tied lie in several places, and a module under two names is one place all the same: replaced twice,
    it would not get its own tensors back.
    """
    found: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, tensor in getattr(part, kind).items():
            if tensor is not None:
                found.setdefault((id(part), name), (f"{prefix}.{name}" if prefix else name, tensor))
    return dict(found.values())


def slots_of(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The names of the places that hold the same parameter as each given name."""
    places = places_of(module, "_parameters")
    own = dict(module.named_parameters(remove_duplicate=False))
    return [[place for place, tensor in places.items() if tensor is own[name]] for name in names]


def unwrapped(model_func: Any) -> Any:
    """The model inside of data-parallel and compilation wrappers."""
    while True:
        if isinstance(model_func, (DataParallel, DistributedDataParallel)):
            model_func = model_func.module
        elif isinstance(model_func, nn.Module) and hasattr(model_func, "_orig_mod"):
            model_func = model_func._orig_mod
        elif not isinstance(model_func, nn.Module) and hasattr(model_func, "_torchdynamo_orig_callable"):
            model_func = model_func._torchdynamo_orig_callable
        else:
            return model_func


def modules_used_by(holder: Any, depth: int = 3) -> list[nn.Module]:
    """Modules that a callable, or an object or container that it uses, holds."""
    if isinstance(holder, nn.Module):
        return [holder]
    if depth == 0:
        return []
    held: list[Any] = []
    if isinstance(holder, partial):
        held = [holder.func, *holder.args, *holder.keywords.values()]
    elif inspect.ismethod(holder):
        held = [holder.__self__, holder.__func__]
    elif inspect.isfunction(holder):
        variables = inspect.getclosurevars(holder)
        held = [*variables.nonlocals.values(), *variables.globals.values()]
    elif isinstance(holder, Mapping):
        held = list(holder.values())
    elif isinstance(holder, (list, tuple)):
        held = list(holder)
    elif hasattr(holder, "__dict__") and not inspect.ismodule(holder) and not inspect.isclass(holder):
        held = list(vars(holder).values())
    found = [module for item in held for module in modules_used_by(item, depth - 1)]
    return list({id(module): module for module in found}.values())


#: What was measured of modules' layers, by the names of the parameters. It holds no tensors and dies with the module.
_PROOFS: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], dict[Hashable, Any]]] = WeakKeyDictionary()


def proofs_of(module: nn.Module, names: Sequence[str]) -> dict[Hashable, Any]:
    """What was measured of a module's layers, to be added to; the same for all who study the same parameters."""
    return _PROOFS.setdefault(module, {}).setdefault(tuple(names), {})


def refuse_hidden_tensors(modules: Iterable[nn.Module], passed: Collection[str]) -> None:
    """Refuse to freeze a callable that reads buffers or parameters which are not passed to it."""
    for module in modules:
        hidden = [n for n, _ in module.named_buffers()] + [n for n, _ in module.named_parameters() if n not in passed]
        if hidden:
            raise NotImplementedError(
                f"The callable uses a module with tensors that are not in params ({', '.join(hidden[:4])}), so a "
                "frozen copy would still follow them: pass the module itself as model."
            )
