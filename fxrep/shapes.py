"""Symbolic shapes: enough to prove that two values have one size, for every input. Pure; no fx, no tensors.

A spatial size is floor((n + c) / s) of a size n of some *root* (a placeholder, or a value nothing is known about): a
chain of convolutions and poolings stays in that form, since nested floors collapse. Equal expressions are equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from fxrep.frozen import frozen


class Axis(NamedTuple):
    """Axis `place` (counted from the end, negative) of the value `root`, of unknown size."""

    root: str
    place: int


@frozen()
class Product:
    """The product of sizes: flattened axes, or a size times a factor."""

    sizes: tuple[Dim, ...]


@frozen()
class Size:
    """floor((base + add) / divide)."""

    base: Axis | Product
    add: int = 0
    divide: int = 1


Dim = int | Size


@frozen()
class Shape:
    """The axes `tail` at the end; before them, the axes of `root` as they are (root None: there are none)."""

    root: str | None
    tail: tuple[Dim, ...] = ()


def shifted(dim: Dim, add: int, divide: int = 1) -> Dim:
    """floor((dim + add) / divide), in normal form: ⌊(⌊(n+c)/s⌋ + a)/d⌋ = ⌊(n + c + s·a)/(s·d)⌋."""
    if isinstance(dim, int):
        return (dim + add) // divide
    return Size(dim.base, dim.add + dim.divide * add, dim.divide * divide)


def axis_of(dim: Dim | None) -> Axis | None:
    """The axis that a size is, as it is; None for a number, and for what is computed from axes."""
    if isinstance(dim, Size) and isinstance(dim.base, Axis) and (dim.add, dim.divide) == (0, 1):
        return dim.base
    return None


def multiplied(*dims: Dim) -> Dim:
    """The product of sizes, integers gathered into one factor and symbols in a fixed order."""
    factor = prod(d for d in dims if isinstance(d, int))
    symbols: list[Size] = []
    for dim in dims:
        if isinstance(dim, Size):
            symbols.append(dim)
    flat: list[Dim] = []
    for symbol in symbols:  # a product of products is one product
        plain = isinstance(symbol.base, Product) and (symbol.add, symbol.divide) == (0, 1)
        flat.extend(symbol.base.sizes if plain and isinstance(symbol.base, Product) else (symbol,))
    factor *= prod(d for d in flat if isinstance(d, int))
    rest = sorted((d for d in flat if isinstance(d, Size)), key=repr)
    if not rest or factor == 0:
        return factor
    if factor == 1 and len(rest) == 1:
        return rest[0]
    return Size(Product((*rest, factor) if factor != 1 else tuple(rest)))


def divided(dim: Dim, by: Dim) -> Dim | None:
    """dim / by where it is certainly whole: an exact quotient, or a product less some of its factors."""
    if by == 1:
        return dim
    if dim == by:
        return 1
    if isinstance(dim, int):
        return dim // by if isinstance(by, int) and by and dim % by == 0 else None
    factors, gone = _factors(dim), _factors(by)
    for factor in gone:
        if isinstance(factor, int):
            number = next((f for f in factors if isinstance(f, int) and f % factor == 0), None)
            if number is None:
                return None
            factors[factors.index(number)] = number // factor
        elif factor in factors:
            factors.remove(factor)
        else:
            return None
    return multiplied(*factors)


def _factors(dim: Dim) -> list[Dim]:
    if isinstance(dim, Size) and isinstance(dim.base, Product) and (dim.add, dim.divide) == (0, 1):
        return list(dim.base.sizes)
    return [dim]


@dataclass
class Shapes:
    """What is known of every value's shape. Facts found later (a rank, a channel count) serve earlier values too."""

    of: dict[str, Shape] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    sizes: dict[Axis, int] = field(default_factory=dict)
    #: axes that are as long as something of a value before theirs
    equal: dict[Axis, Dim] = field(default_factory=dict)
    #: by root: the number of axes that an op asked for although another was known
    conflicts: dict[str, int] = field(default_factory=dict)

    def rank(self, shape: Shape) -> int | None:
        if shape.root is None:
            return len(shape.tail)
        return self.ranks.get(shape.root)

    def least_rank(self, shape: Shape) -> int:
        """How many axes there are at least: those that are spelled out, or that an op asked a size of."""
        asked = [-axis.place for axis in self.sizes if axis.root == shape.root]
        return max(len(shape.tail), *asked) if asked else len(shape.tail)

    def require_rank(self, shape: Shape, rank: int) -> None:
        """An op that takes only `rank` axes accepted this value."""
        if shape.root is not None and self.ranks.setdefault(shape.root, rank) != rank:
            self.conflicts[shape.root] = rank

    def dim(self, shape: Shape, index: int) -> Dim | None:
        """Axis `index` (negative), or None where it is before the first axis."""
        if -index <= len(shape.tail):
            return self.known(shape.tail[index])
        if shape.root is None or -index > self.ranks.get(shape.root, -index):
            return None
        return self.known(Size(Axis(shape.root, index)))

    def require_size(self, shape: Shape, index: int, size: int) -> None:
        """An op that takes only `size` along an axis accepted this value."""
        axis = axis_of(self.dim(shape, index))
        if axis is not None:
            self.sizes.setdefault(axis, size)

    def require_equal(self, a: Shape, b: Shape, index: int) -> None:
        """An op that takes only values of one size along an axis accepted these two."""
        dims = self.dim(a, index), self.dim(b, index)
        for dim, other in (dims, dims[::-1]):
            axis = axis_of(dim)
            if axis is None or other is None:
                continue
            if isinstance(other, int):
                self.sizes.setdefault(axis, other)
            elif self._is_before(other, axis):
                self.equal.setdefault(axis, other)

    def _is_before(self, dim: Dim, axis: Axis) -> bool:
        """Whether all that a size depends on is there before the root of an axis."""
        roots = {a.root for a in free_axes([dim])}
        first = next((name for name in self.of if name == axis.root or name in roots), axis.root)
        return axis.root not in roots and first != axis.root

    def full(self, shape: Shape) -> Shape:
        """The same shape with every axis that is known spelled out."""
        rank = self.rank(shape)
        if rank is None:
            return Shape(shape.root, tuple(self.known(d) for d in shape.tail))
        axes = [self.dim(shape, i) for i in range(-rank, 0)]
        return Shape(None, tuple(a for a in axes if a is not None))

    def same(self, a: Shape, b: Shape) -> bool:
        """Whether the two are provably equal, for every input."""
        a, b = self.full(a), self.full(b)
        if a.root != b.root:
            return False
        longest = max(len(a.tail), len(b.tail))
        return all(self.dim(a, -i) == self.dim(b, -i) for i in range(1, longest + 1))

    def same_before(self, a: Shape, b: Shape, axes: int) -> bool:
        """Whether all axes before the last `axes` are provably equal."""
        return self.same(self._cut(a, axes), self._cut(b, axes))

    def _cut(self, shape: Shape, axes: int) -> Shape:
        shape = self.full(shape)
        tail = [self.dim(shape, -i) if i > axes else 0 for i in range(max(len(shape.tail), axes), 0, -1)]
        return Shape(shape.root, tuple(t for t in tail if t is not None))

    def known(self, dim: Dim) -> Dim:
        """The size by all that is known by now."""
        while isinstance(dim, Size) and isinstance(dim.base, Axis):
            known = self.sizes.get(dim.base, self.equal.get(dim.base))
            if known is None:
                break
            dim = shifted(known, dim.add, dim.divide)
        return dim

    def evaluate(self, dim: Dim, size_of: Callable[[Axis], int]) -> int:
        """The number that `dim` is when every free axis has the size that `size_of` gives."""
        dim = self.known(dim)
        if isinstance(dim, int):
            return dim
        if isinstance(dim.base, Axis):
            base = size_of(dim.base)
        else:
            base = prod(self.evaluate(d, size_of) for d in dim.base.sizes)
        return (base + dim.add) // dim.divide


def free_axes(dims: Iterable[Dim]) -> set[Axis]:
    """The roots' axes that `dims` depend on."""
    found: set[Axis] = set()
    for dim in dims:
        if isinstance(dim, Size):
            found |= {dim.base} if isinstance(dim.base, Axis) else free_axes(dim.base.sizes)
    return found
