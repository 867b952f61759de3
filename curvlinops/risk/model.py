"""One view of all forms of models and parameters: parameter values and X in, prediction out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops.risk.modules import modules_used_by, places_of, proofs_of, refuse_hidden_tensors, slots_of, unwrapped

T = TypeVar("T")
Parameters = Sequence[Tensor] | Mapping[str, Tensor]


class FunctionalModel:
    """A model as a function of the parameters under study.

    Three forms are understood: a module, a callable ``(params_dict, X)``, and a callable of X alone that closes over
    the tensors in ``params``. Wrappers for data-parallel training and compilation are taken off: the original runs.

    Args:
        model_func: The model.
        params: List of parameters, or dict from names to tensors.
    """

    def __init__(self, model_func: Callable[..., Any], params: Parameters) -> None:
        if not callable(model_func):
            raise TypeError(f"Expected a module or a callable as model, got {type(model_func).__name__}.")
        self.params = _checked_params(params)
        self._names_given = list(params) if isinstance(params, Mapping) else None
        self.model_func = model_func
        self._inner = unwrapped(model_func)
        self.is_module = isinstance(self._inner, nn.Module)
        self.takes_params = not self.is_module and _takes_params(self._inner, self._names_given is not None)
        if self.takes_params and self._names_given is None:
            raise TypeError(
                "A model called as model(params, X) needs params as a dict from names to tensors, got a list."
            )
        self._module_names = self._names_in_module() if self.is_module else None
        self._slots = slots_of(self._inner, self._module_names) if self._module_names is not None else []
        self._check_alike()

    # ------------------------------------------------------------------- calling

    @property
    def is_closure(self) -> bool:
        """Whether the parameters cannot be replaced, since the callable closes over them."""
        return not (self.is_module or self.takes_params)

    def __call__(self, values: Sequence[Tensor], X: Any) -> Tensor:
        """The prediction at the given parameter values, with its graph.

        Raises:
            TypeError: If the model does not return a tensor.
        """
        if self.is_closure:
            return prediction_of(self._inner(X))
        if self.takes_params:
            return prediction_of(self._inner(dict(zip(self._names_given or (), values, strict=True)), X))
        args, kwargs = self._as_arguments(X)
        return prediction_of(functional_call(self._inner, self._replacements(values), args, kwargs, tie_weights=False))

    @property
    def buffers(self) -> list[Tensor]:
        """Buffers of floating point numbers that the prediction may depend on, as far as the model shows them."""
        modules = [self._inner] if self.is_module else self.hidden_modules
        return [b for module in modules for b in module.buffers() if b.is_floating_point()]

    @property
    def proofs(self) -> dict[Hashable, Any]:
        """What was measured of the layers, shared by all who study the same parameters of the same module."""
        if self._module_names is None:
            return {}
        return proofs_of(self._inner, self._module_names)

    def leaves(self) -> list[Tensor]:
        """Tensors over the same memory for autograd to follow; a closure's own tensors."""
        return list(self.params) if self.is_closure else [p.detach().requires_grad_() for p in self.params]

    def restricted(self, positions: Sequence[int]) -> FunctionalModel:
        """The same model as a function of some of its parameters."""
        return _Restricted(self, positions)

    def holding(self, values: Sequence[Tensor], action: Callable[[], T]) -> T:
        """Run an action while the module holds the given values.

        Non-reentrant checkpointing runs parts of the forward again during the backward. It reads the parameters
        from the module then, so where the values are not the module's own they must still be in place.
        """
        if not self.is_module or self._holds_own_values:
            return action()
        held = _Holder(self._inner)
        replacements = {f"module.{name}": value for name, value in self._replacements(values).items()}
        return functional_call(held, replacements, (action,), tie_weights=False)  # type: ignore[no-any-return]

    def _replacements(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        # Buffers go in as copies: what a forward writes to them is not the user's.
        copies: dict[int, Tensor] = {}
        buffers = {
            name: copies.setdefault(id(buffer), buffer.clone())
            for name, buffer in places_of(self._inner, "_buffers").items()
        }
        return {**buffers, **{name: value for names, value in zip(self._slots, values, strict=True) for name in names}}

    def _as_arguments(self, X: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(X, Mapping) and all(key in self._forward_names for key in X):
            return (), {key: value for key, value in X.items() if key != "labels"}
        return (X,), {}

    @cached_property
    def _forward_names(self) -> set[str]:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = _signature(self._inner.forward)
        return {name for name, p in (parameters or {}).items() if p.kind in kinds}

    # ----------------------------------------------------------------- describing

    @property
    def training_layers(self) -> list[str]:
        """Dropout and batch-norm layers in training mode, as 'Class name'."""
        if not self.is_module:
            return []
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        return [f"{type(m).__name__} '{name}'" for name, m in self._inner.named_modules() if _acts(m, kinds)]

    @cached_property
    def hidden_modules(self) -> list[nn.Module]:
        """Modules that a callable closes over or is bound to; none where the model is a module itself."""
        return [] if self.is_module else modules_used_by(self._inner)

    @property
    def has_recurrence(self) -> bool:
        """Whether a layer is recurrent; the fused GPU kernels of these cannot be differentiated twice."""
        modules = [self._inner] if self.is_module else self.hidden_modules
        return any(isinstance(m, nn.RNNBase) for module in modules for m in module.modules())

    def frozen(self) -> FunctionalModel:
        """The same model at copies of its parameters and buffers.

        Raises:
            NotImplementedError: If the callable closes over its parameters.
        """
        if self.is_closure:
            raise NotImplementedError(
                "A model that closes over its parameters cannot be frozen: pass the module itself, or a callable "
                "model(params, X) with params as a dict."
            )
        if self.takes_params:
            refuse_hidden_tensors(self.hidden_modules, self._names_given or ())
            copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in self.params]
            return FunctionalModel(self.model_func, dict(zip(self._names_given or (), copies, strict=True)))
        with torch.no_grad():  # copies of scripted modules would be computed from the originals
            inner = copy.deepcopy(self._inner)
        originals = dict(self._inner.named_parameters(remove_duplicate=False))
        for name, p in inner.named_parameters(remove_duplicate=False):
            p.requires_grad_(originals[name].requires_grad)
        own = dict(inner.named_parameters(remove_duplicate=False))
        if self._holds_own_tensors:
            copies = [own[name] for name in self._module_names or ()]
        else:
            copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in self.params]
        params = copies if self._names_given is None else dict(zip(self._names_given, copies, strict=True))
        return FunctionalModel(inner, params)

    # ------------------------------------------------------------------- checking

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the parameters: as given in a dict, else as the module knows them."""
        names = self._names_given if self._names_given is not None else self._module_names
        return None if names is None else tuple(names)

    def label(self, index: int) -> str:
        """How error messages call a parameter."""
        return f"'{self.names[index]}'" if self.names is not None else f"number {index}"

    def _check_alike(self) -> None:
        first = self.params[0]
        for index, p in enumerate(self.params):
            if p.dtype != first.dtype or p.device != first.device:
                raise ValueError(
                    f"All parameters need one dtype and device: {self.label(0)} is {first.dtype} on {first.device}, "
                    f"{self.label(index)} is {p.dtype} on {p.device}."
                )

    @property
    def _holds_own_tensors(self) -> bool:
        own = dict(self._inner.named_parameters(remove_duplicate=False))
        return all(own[n] is p for n, p in zip(self._module_names or (), self.params, strict=True))

    @property
    def _holds_own_values(self) -> bool:
        return self._holds_own_tensors and all(p.requires_grad for p in self.params)

    def _names_in_module(self) -> list[str]:
        """Under which name the module knows each parameter: found by identity, else by the name given."""
        own = dict(self._inner.named_parameters(remove_duplicate=False))
        by_identity = {id(p): name for name, p in reversed(own.items())}
        names = []
        for index, p in enumerate(self.params):
            given = None if self._names_given is None else self._names_given[index]
            label = f"'{given}'" if given is not None else f"number {index} of shape {list(p.shape)}"
            plain = None if given is None else _without_wrappers(given, own)
            if id(p) in by_identity:
                if plain in own and own[plain] is not p:
                    raise ValueError(
                        f"Parameter {label} is the model's '{by_identity[id(p)]}', but the model has another parameter "
                        "of that name: rename the entry."
                    )
                names.append(by_identity[id(p)] if plain not in own else plain)
            elif plain in own:
                if own[plain].shape != p.shape:
                    raise ValueError(
                        f"Parameter {label}: expected shape {list(own[plain].shape)} as in the model, got "
                        f"{list(p.shape)}."
                    )
                names.append(plain)
            else:
                raise ValueError(
                    f"Parameter {label} is not a parameter of the model. Pass tensors from model.parameters(), or a "
                    f"dict with names from model.named_parameters(): {', '.join(list(own)[:8])}"
                    f"{', ...' if len(own) > 8 else ''}."
                )
        return [str(name) for name in names]


class _Restricted(FunctionalModel):
    """A model as a function of some of its parameters; the others stay as they are."""

    def __init__(self, whole: FunctionalModel, positions: Sequence[int]) -> None:
        self.__dict__.update(vars(whole))
        self._whole = whole
        self._positions = list(positions)
        self.params = [whole.params[i] for i in positions]

    def __call__(self, values: Sequence[Tensor], X: Any) -> Tensor:
        return self._whole(self._with_others(values), X)

    def leaves(self) -> list[Tensor]:
        every = self._whole.leaves()
        return [every[i] for i in self._positions]

    def holding(self, values: Sequence[Tensor], action: Callable[[], T]) -> T:
        return self._whole.holding(self._with_others(values), action)

    def _with_others(self, values: Sequence[Tensor]) -> list[Tensor]:
        replaced = dict(zip(self._positions, values, strict=True))
        return [replaced.get(i, p.detach()) for i, p in enumerate(self._whole.params)]


class _Holder(nn.Module):
    """Lets an action run inside `functional_call`, while the module's parameters are replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, action: Callable[[], T]) -> T:
        return action()


def prediction_of(output: Any) -> Tensor:
    """The tensor that a model's output stands for."""
    if not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Expected the model to return a tensor (or an object with .logits), got {type(output).__name__}. Wrap it: "
            "`def predict(params, X): return torch.func.functional_call(model, params, (X,))[0]`, and pass params as "
            "a dict."
        )
    if output.ndim == 0:
        raise ValueError("Expected a prediction with the datum on axis 0, got a scalar: return one row per datum.")
    return output


def _checked_params(params: Any) -> list[Tensor]:
    if isinstance(params, Tensor) or not isinstance(params, (Mapping, Sequence)):
        raise TypeError(
            f"Expected params as a list of parameters or a dict from names to tensors, got {type(params).__name__}. "
            "A generator such as model.parameters() can be read only once: wrap it in list(...)."
        )
    tensors = list(params.values()) if isinstance(params, Mapping) else list(params)
    labels = [f"'{n}'" for n in params] if isinstance(params, Mapping) else [f"number {i}" for i in range(len(tensors))]
    if not tensors:
        raise ValueError("Expected at least one parameter, got none.")
    seen: dict[int, str] = {}
    for label, p in zip(labels, tensors, strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(f"Parameter {label}: expected a tensor, got {type(p).__name__}.")
        if not p.is_floating_point():
            raise ValueError(f"Parameter {label}: expected a real floating-point tensor, got {p.dtype}.")
        if not p.is_leaf:
            raise ValueError(f"Parameter {label} is not a leaf of the graph: pass the parameter it was computed from.")
        if p.is_inference():
            raise ValueError(
                f"Parameter {label} was made in inference mode and cannot be differentiated: build the model outside "
                "of torch.inference_mode()."
            )
        if id(p) in seen:
            raise ValueError(f"Parameters {seen[id(p)]} and {label} are the same tensor: pass tied weights once.")
        seen[id(p)] = label
    return tensors


def _without_wrappers(name: str, own: Mapping[str, Tensor]) -> str:
    """A name without the prefixes that wrappers put in front, where the rest is known."""
    plain = name.replace("_orig_mod.", "")
    while plain not in own and plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return name if name in own else plain


def _signature(function: Any) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _takes_params(function: Any, is_dict: bool) -> bool:
    """Whether a callable wants (params, X): two required positional arguments, or unreadable with a dict."""
    parameters = _signature(function)
    if parameters is None:
        return is_dict
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in kinds and p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) and not required:
        return is_dict
    if len(required) not in (1, 2):
        raise TypeError(
            f"Expected a model called as model(X) or model(params, X), got a callable with {len(required)} required "
            "positional arguments."
        )
    return len(required) == 2


def _acts(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    if not isinstance(module, kinds) or not module.training:
        return False
    return not isinstance(module, nn.modules.dropout._DropoutNd) or module.p > 0
