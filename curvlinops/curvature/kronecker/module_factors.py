"""Kronecker factors by the names of modules, in the form that laplace-torch reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from curvlinops.operators.arrangement import Arrangement
from curvlinops.operators.block_diagonal import BlockDiagonal
from curvlinops.operators.factors import DenseFactor
from curvlinops.operators.kronecker import Kronecker
from curvlinops.operators.space import Space

_WHY = (
    "laplace-torch, which reads factors by the names of modules, would leave it out or pair it with the factors of "
    "another parameter, without a word"
)
_ADVICE = f"{_WHY}. Leave it out of params, or use factors(name), which takes the names of parameters."


class FactorsByModule:
    r"""What clients read of a KFAC operator by the names of modules; the public way is ``factors``, by parameter.

    They take :math:`B \otimes A` for the weight of a module, further axes flattened, and B for its bias, which is the
    bias's own block where a datum meets the layer once. They add up the factors of several mini-batches, which the
    scales allow: A is a mean over data and positions, B what the loss's reduction makes of a sum over data.

    Nothing else can be told in this form: each parameter must be the weight or the bias of one module, the weight must
    come with its bias and have two dense factors, and all must be in the order of the modules. The rest is refused.
    """

    _model_func: Callable[..., Any]

    @property
    @abstractmethod
    def domain(self) -> Space:
        """The space of the parameters."""

    @property
    @abstractmethod
    def _params(self) -> list[Tensor]:
        """The parameters."""

    @property
    @abstractmethod
    def _computed(self) -> BlockDiagonal:
        """The matrix as a block-diagonal operator."""

    def compute_kronecker_factors(self) -> None:
        """Compute the factors, if that is still to be done, and check that they can be read by module.

        Raises:
            NotImplementedError: If they cannot.
            TypeError: If the model is no module.
        """
        for name in self._mapping:
            self._factors_of_module(name)

    @cached_property
    def _mapping(self) -> dict[str, dict[str, int]]:
        """Where the weight and the bias of each module are among the parameters."""
        if not isinstance(self._model_func, nn.Module):
            raise TypeError(
                "Factors can be read by the names of modules if the model is a module, got "
                f"{type(self._model_func).__name__}: use factors(name), which takes the names of parameters."
            )
        names = self.domain.names
        assert names is not None  # those that the module has for them
        return modules_of(self._model_func, self._params, names)

    def _factors_of_module(self, name: str) -> tuple[Tensor, Tensor]:
        """B ``[R, R]`` and A ``[S, S]`` of a module."""
        position = self._mapping[name]["weight"]
        operator = self._computed
        block = next(b for b, own in zip(operator.blocks, operator.positions, strict=True) if position in own)
        if isinstance(block, Kronecker) and _is_plain(block.arrangement):
            left, right = block.left, block.right
            if isinstance(left, DenseFactor) and isinstance(right, DenseFactor):
                return left.to_dense()[0], right.to_dense()[0]
        assert self.domain.names is not None
        raise NotImplementedError(
            f"Parameter '{self.domain.names[position]}' has no two dense factors, for the outputs and the inputs of "
            f"module '{name}', that make up the block of its weight: {block}. {_ADVICE}"
        )

    @property
    def _gradient_covariances(self) -> Mapping[str, Tensor]:
        """B of each module ``[R, R]``, copied when it is read."""
        return _OneSide(self, 0)

    @property
    def _input_covariances(self) -> Mapping[str, Tensor]:
        """A of each module ``[S, S]``, copied when it is read."""
        return _OneSide(self, 1)


class _OneSide(Mapping[str, Tensor]):
    """One factor of each module; each time a copy, since clients write to what they read."""

    def __init__(self, operator: FactorsByModule, side: int) -> None:
        self._operator, self._side = operator, side

    def __getitem__(self, name: str) -> Tensor:
        return self._operator._factors_of_module(name)[self._side].to(self._operator.domain.dtype, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._operator._mapping)

    def __len__(self) -> int:
        return len(self._operator._mapping)


def _is_plain(form: Arrangement) -> bool:
    return form.groups == 1 and not form.transposed and not form.has_bias


def modules_of(model: nn.Module, params: Sequence[Tensor], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Where the weights and biases of a model's modules are among its parameters, by the modules' names.

    Args:
        model: The model.
        params: Parameters, its own or values for them.
        names: What the model calls them.

    Raises:
        NotImplementedError: If a parameter is not the weight or the bias of one module, in the order of the modules.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2, bias=False))
    >>> modules_of(model, list(model.parameters()), [name for name, _ in model.named_parameters()])
    {'0': {'weight': 0, 'bias': 1}, '2': {'weight': 2}}
    """
    positions = {id(p): i for i, p in enumerate(params)}
    by_name = {name: i for i, name in enumerate(names)}
    found = {}
    for module_name, module in model.named_modules():
        owned = {}
        for own_name, p in module.named_parameters(module_name, recurse=False):
            position = positions.get(id(p), by_name.get(own_name))
            if position is not None:
                owned[own_name.rpartition(".")[2]] = position
        if owned:
            _check_complete(owned, module, module_name, names)
            found[module_name] = {local: owned[local] for local in ("weight", "bias") if local in owned}
    _check_order([i for owned in found.values() for i in owned.values()], names)
    return found


def _check_complete(owned: Mapping[str, int], module: nn.Module, module_name: str, names: Sequence[str]) -> None:
    """Refuse a module that has parameters of other names, or only one of a weight and a bias."""
    for local, position in owned.items():
        if local not in ("weight", "bias"):
            raise NotImplementedError(
                f"Parameter '{names[position]}' is neither the weight nor the bias of module '{module_name}': {_ADVICE}"
            )
    wanted = {"weight"} if getattr(module, "bias", None) is None else {"weight", "bias"}
    for local in wanted - set(owned):
        raise NotImplementedError(
            f"Parameter '{names[min(owned.values())]}' is in params, but the {local} of its module '{module_name}' is "
            "not: laplace-torch, which reads factors by the names of modules, takes the two together. Pass both or "
            "none, or use factors(name), which takes the names of parameters."
        )


def _check_order(positions: Sequence[int], names: Sequence[str]) -> None:
    """Refuse parameters that belong to no module or to several, or come in another order than the modules."""
    for i, name in enumerate(names):
        if (count := positions.count(i)) != 1:
            owners = "no module" if count == 0 else f"{count} modules"
            raise NotImplementedError(f"Parameter '{name}' is the weight or the bias of {owners}: {_ADVICE}")
    for place, position in enumerate(positions):
        if place != position:
            raise NotImplementedError(
                f"Parameter '{names[position]}' is number {position} of params, but number {place} of the weights and "
                f"biases of the modules, in their order: {_WHY}. Pass params in that order."
            )
