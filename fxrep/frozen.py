"""`dataclasses.replace`, some times quicker: planning makes many thousand frozen values from others."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def replace(value: T, **changes: Any) -> T:
    """The value of a dataclass with some of its arguments changed."""
    kind: Any = type(value)
    attributes = vars(value)
    made: T = kind(**{**{name: attributes[name] for name in _arguments(kind)}, **changes})
    return made


@cache
def _arguments(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.init)
