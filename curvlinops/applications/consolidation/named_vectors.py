"""Parameters as one vector and back, read whenever somebody asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops import LinearOperator, Space
from curvlinops.applications.named_tensors import as_operator, named_tensors, space_of


class NamedVectors:
    """Vectors in the space of some parameters: flat inside, tensors by name outside.

    Args:
        params: A module (its parameters that require gradients), a dict name -> parameter, or a list, whose names are
            the positions "0", "1", ....

    Attributes:
        names: Names of the parameters.
        space: Their space, in float32 where they are of half precision; of a list it has no names.

    Raises:
        TypeError: If the parameters are none of these.
        ValueError: If there are none, or they have different dtypes or devices.

    >>> vectors = NamedVectors([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
    >>> vectors.flat(None, "params").tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(self, params: nn.Module | Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        self._module = params if isinstance(params, nn.Module) else None
        self._tensors = _studied(params)
        self.names = tuple(self._tensors)
        given = space_of(self._tensors, "params")
        # Operators on a list know the parameters by other names, or by none.
        names = self.names if isinstance(params, (nn.Module, Mapping)) else None
        self._given = Space(given.shapes, given.dtype, given.device, names)
        dtype = torch.float32 if given.dtype in (torch.bfloat16, torch.float16) else given.dtype
        self.space = Space(given.shapes, dtype, given.device, names)

    def operator(self, fisher: Any, what: str, names: Sequence[str] | None = None) -> LinearOperator:
        """A Fisher matrix as an operator on the parameters in their order; zero on those that it does not name.

        Args:
            fisher: Operator, which may be in half precision as the parameters are, or a diagonal.
            what: How messages call it.
            names: What a matrix without names acts on, in order; by default the parameters.

        Raises:
            TypeError: If it is neither.
            ValueError: If it does not fit the parameters, is not symmetric, or a diagonal has negative entries.
        """
        is_as_given = isinstance(fisher, LinearOperator) and fisher.dtype == self._given.dtype
        space = self._given if is_as_given else self.space
        own = fisher.domain.names if isinstance(fisher, LinearOperator) else _keys(fisher)
        names = own or names
        if space.names is None or names is None:
            return as_operator(fisher, space, what)
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(
                f"{what}: expected names of the parameters, which are settled at construction, {list(self.names)}; "
                f"unknown are {unknown}."
            )
        part = space.select([self.names.index(name) for name in names])
        return as_operator(fisher, part, what).embedded(space, names)

    def flat(self, source: Any, what: str) -> Tensor:
        """Named tensors as one vector, with their graph.

        Args:
            source: Module, dict or list, as ``params``; by default the parameters as they are now.
            what: How messages call it.

        Raises:
            ValueError: If names or shapes are not those of the parameters.
        """
        if source is None:
            source = self._tensors if self._module is None else self._module
        tensors = named_tensors(source, what)
        if isinstance(source, nn.Module):
            tensors = {name: tensors[name] for name in self.names if name in tensors}
        missing, unknown = [n for n in self.names if n not in tensors], [n for n in tensors if n not in self.names]
        if missing or unknown:
            raise ValueError(f"{what}: the names do not fit the parameters: missing {missing}, unknown {unknown}.")
        for name, shape in zip(self.names, self.space.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{what}: expected '{name}' in the shape of the parameter, {list(shape)}, got "
                    f"{list(tensors[name].shape)}."
                )
        parts = [tensors[name].to(self.space.device, self.space.dtype).reshape(-1) for name in self.names]
        return torch.cat(parts)

    def copied(self, source: Any, what: str) -> Tensor:
        """Named tensors as a vector without a graph that nobody else holds; see :meth:`flat`.

        Raises:
            ValueError: If names or shapes are not those of the parameters, or a number is not finite.
        """
        vector = self.flat(source, what).detach().clone()
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"{what}: {int((~torch.isfinite(vector)).sum())} numbers are not finite.")
        return vector

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector in the shapes of the parameters, each in memory of its own."""
        return {name: part.clone() for name, part in zip(self.names, self.space.shaped(vector), strict=True)}


def _keys(fisher: Any) -> tuple[str, ...] | None:
    return tuple(fisher) if isinstance(fisher, Mapping) else None


def _studied(params: Any) -> dict[str, Tensor]:
    """The tensors by name; of a module those that require gradients."""
    found = named_tensors(params, "params")
    if not isinstance(params, nn.Module):
        return found
    learnt = {name: p for name, p in found.items() if p.requires_grad}
    if not learnt:
        raise ValueError("params: no parameter of the module requires gradients. Pass a dict of those that matter.")
    return learnt
