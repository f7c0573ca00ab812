"""Dataclasses that are made from others by the thousand, as planning does: arguments told by the class, at once.

Attributes are read one by one: to ask an object for all of them makes it keep them in a dict of its own.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def replace(value: T, **changes: Any) -> T:
    """The value with some of its arguments changed."""
    kind: Any = type(value)
    made: T = kind(**{**arguments(value), **changes})
    return made


def arguments(value: Any) -> dict[str, Any]:
    """What the value was made with, by name."""
    kind: Any = type(value)
    return {name: getattr(value, name) for name in _names(kind)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.init)
