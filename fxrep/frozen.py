"""Values that are made from others by the thousand, as planning does.

They are dataclasses that the type checker alone keeps from being changed: Python's own guard makes each three times as
dear. Attributes are read one by one: to ask an object for all of them makes it keep them in a dict of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter
from typing import Any, Generic, TypeVar

from typing_extensions import dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(*, eq: bool = True) -> Callable[[type[T]], type[T]]:
    """A dataclass that nobody changes; `eq` compares by value, and not by identity."""
    return dataclass(eq=eq, unsafe_hash=eq)


class lazily(Generic[T]):
    """`functools.cached_property`, without the lock that Python's own took before 3.12: it is asked for as often."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: Any, owner: type) -> T:
        value: T = self.compute(instance)
        vars(instance)[self.name] = value
        return value


def replace(value: T, **changes: Any) -> T:
    """The value with some of its arguments changed."""
    kind: Any = type(value)
    places, read = _arguments(kind)
    given = list(read(value))
    for name, change in changes.items():
        given[places[name]] = change
    made: T = kind(*given)
    return made


def arguments(value: Any) -> tuple[Any, ...]:
    """What the value was made with."""
    kind: Any = type(value)
    return _arguments(kind)[1](value)


@cache
def _arguments(kind: Any) -> tuple[dict[str, int], Callable[[Any], tuple[Any, ...]]]:
    """The places of a class's arguments by name, and what reads them all of an object."""
    names = [f.name for f in fields(kind) if f.init]
    read: Any = attrgetter(*names)
    return {name: i for i, name in enumerate(names)}, read if len(names) > 1 else lambda value: (read(value),)
