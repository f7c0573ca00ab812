"""What there is to draw, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

Edge = tuple[int, int]
Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Box:
    """One value of the original network."""

    label: str
    """Qualified name of the layer, or of the module and the op."""
    does: str
    """What computes it, such as `Conv2d k3x3 s1 p1` or `relu`."""
    kind: str
    """conv, linear, bn, add, mul, pool, input, output or other."""
    into: int | None
    """Which collapse of the report it falls into; None where it stays, or is no longer needed."""
    stays: bool
    """Whether it is computed in the collapsed network as it was."""


@dataclass(frozen=True)
class Scene:
    """A network before and after. In `after`, number i < len(boxes) is a box, and len(boxes) + k the k-th collapse."""

    boxes: tuple[Box, ...]
    before: tuple[Edge, ...]
    after: tuple[Edge, ...]


@dataclass(frozen=True)
class Summand:
    """One branch's kernel where it falls in the window of the sum."""

    label: str
    taps: str
    """Its own size, such as 1×1."""
    grid: Grid


@dataclass(frozen=True)
class Picture:
    """One filter of a new layer, W[out, in], and the branches' filters that add up to it exactly."""

    layer: str
    """Qualified name of the new layer."""
    row: int
    column: int
    summands: tuple[Summand, ...]
    total: Grid
