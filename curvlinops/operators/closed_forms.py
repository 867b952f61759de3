"""Methods that some operators of a class have and others lack, so that ``hasattr`` tells which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload


class HasParts(Protocol):
    """An operator whose closed forms depend on its parts."""

    def _check_closed(self, quantity: str) -> None: ...


P = ParamSpec("P")
Owner = TypeVar("Owner", bound=HasParts)
Result = TypeVar("Result")


class NoClosedForm(NotImplementedError, AttributeError):
    """A part of an operator lacks the closed form that is asked for, so that ``hasattr`` says no."""


class ClosedForm(Generic[Owner, P, Result]):
    """A method that an operator has where its parts have what it needs.

    Args:
        quantity: The method that every part needs.
        function: The method.
    """

    def __init__(self, quantity: str, function: Callable[Concatenate[Owner, P], Result]) -> None:
        self._quantity, self._function = quantity, function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[Owner, P], Result]: ...
    @overload
    def __get__(self, instance: Owner, owner: type) -> Callable[P, Result]: ...
    def __get__(self, instance: Owner | None, owner: type) -> Any:
        """The function on the class; on an operator the bound method, or :class:`NoClosedForm`."""
        if instance is None:
            return self._function
        instance._check_closed(self._quantity)
        return self._function.__get__(instance, owner)


def needs(
    quantity: str,
) -> Callable[[Callable[Concatenate[Owner, P], Result]], ClosedForm[Owner, P, Result]]:
    """Declare that a method exists only where every part has another one."""
    return lambda function: ClosedForm(quantity, function)


def check_parts(parts: Sequence[object], quantity: str, what: str) -> None:
    """Raise :class:`NoClosedForm` if one of an operator's parts lacks a quantity."""
    for number, part in enumerate(parts):
        if not hasattr(part, quantity):
            name = quantity.strip("_")
            raise NoClosedForm(f"{what} {number} ({type(part).__name__}) has no closed form of '{name}'.")
