"""Dataclasses that are made from others by the thousand, as planning does: arguments told by the class, at once.

Attributes are read one by one: to ask an object for all of them makes it keep them in a dict of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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
    made: T = kind(**{**arguments(value), **changes})
    return made


def arguments(value: Any) -> dict[str, Any]:
    """What the value was made with, by name."""
    kind: Any = type(value)
    names, read = _arguments(kind)
    return dict(zip(names, read(value), strict=True))


@cache
def _arguments(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a class's arguments, and what reads them all of an object."""
    names = tuple(f.name for f in fields(kind) if f.init)
    read: Any = attrgetter(*names)
    return names, read if len(names) > 1 else lambda value: (read(value),)
