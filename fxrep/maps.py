"""Random maps for a certificate: as small as has a border all around an interior, of unequal sides, at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain, count
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrep.affine import AffineConv
from fxrep.double import InDouble
from fxrep.lower import Emit
from fxrep.readers import Readings
from fxrep.shapes import Axis, Dim, Shape, Shapes, Size, free_axes
from fxrep.sketch import channel_numbers

SEED = 0x5EED
SIZES = (0, 1)  # how much larger than the least the maps are
MORE = 8  # how much larger a map may be than the least


class Along(NamedTuple):
    """What decides on sizes along one axis: the size of what is read, and what the operator that reads it does there.
    By default it is passed on."""

    dim: Dim | None
    lo: int = 0
    hi: int = 0
    span: int = 0
    stride: int = 1
    transposed: bool = False
    mirrored: bool = False

    @property
    def least(self) -> int:
        """The size at which there is a pixel that the padding does not reach."""
        if self.transposed:
            return 1 + self.lo + self.hi
        mirrored = max(self.lo, self.hi) if self.mirrored else 0  # torch reflects no more than there is
        return 1 + max(self.span + max(-self.lo, 0) + max(-self.hi, 0), mirrored)

    def input_size(self, size: int) -> int:
        """The least input for which the output is at least `size`."""
        net = self.lo + self.hi
        if self.transposed:
            return -(-(size - self.span - 1 + net) // self.stride) + 1
        return (size - 1) * self.stride - net + self.span + 1

    def output_size(self, size: int) -> int:
        net = self.lo + self.hi
        if self.transposed:
            return (size - 1) * self.stride + self.span + 1 - net
        return (size + net - self.span - 1) // self.stride + 1


#: The spatial sizes of what is read, and the geometry of what reads it, if it is an operator.
Use = tuple[tuple[Dim | None, ...], tuple[Any, ...] | None]
#: The terms of a result, and all that is run, the terms among it; each once.
Read = tuple[tuple[Use, ...], tuple[Use, ...]]

_geometry = attrgetter("pad_lo", "pad_hi", "dilation", "taps", "stride", "transposed", "mode")


class Maps:
    """Draws values by name, for what is computed by `emits`, `last` of them giving the result, in place of `replaced`.

    `node_of` names the node of the graph that has the size of a source.
    """

    def __init__(
        self, replaced: Collection[str], emits: Sequence[Emit], last: Sequence[Emit], node_of: Callable[[str], str],
        readings: Readings, dims: int,
    ) -> None:  # fmt: skip
        self.readings, self.dims = readings, dims
        terms = [(node_of(e.anchor.source), e.operator) for e in last]
        run = [(node_of(e.anchor.source), e.operator) for e in emits] + [
            (a.source, term)
            for form in map(readings.forms.get, replaced) if form is not None
            for a, term in form.terms if isinstance(term, AffineConv) and term.dims == dims
        ]  # fmt: skip
        shapes = readings.facts.shapes
        self.sizes = self._sizes((_uses(terms, dims, shapes), _uses(run, dims, shapes)))
        whole = [(e.anchor.source, e.operator) for e in emits if e.operator and e.anchor.rows is None]
        self.channels = {source: operator.in_channels for source, operator in reversed(whole)}

    def drawing(self, mode: InDouble, extra: int, device: torch.device) -> Callable[[str], Tensor]:
        """Gives maps that are `extra` larger than the least.

        Each is a number per channel, the same at every size, times one map, so that convolutions of it cost little.
        """
        known, dims = self.readings.facts.shapes, self.dims
        sizes, seeds = self.sizes[extra], count(SEED + extra, len(SIZES))

        def draw(name: str) -> Tensor:
            shape = _concrete(
                known.of[name], known, lambda a: sizes.get(a, 2 - extra), dims, self.channels.get(name, 3)
            )
            one = _noise((*shape[: -dims - 1], 1, *shape[len(shape) - dims :]), next(seeds)).to(device)
            return mode.product(channel_numbers(shape[-dims - 1]).to(device), one, -dims - 1)

        return draw

    def _sizes(self, read: Read) -> Sequence[dict[Axis, int]]:
        drawn, shapes = self.readings.drawn, self.readings.facts.shapes
        if read not in drawn:
            drawn[read] = [_axis_sizes(read, self.dims, shapes, extra) for extra in SIZES]
        return drawn[read]


@lru_cache(maxsize=32)
def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Drawn once for regions that are alike; nobody writes to it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _uses(read: Iterable[tuple[str, AffineConv | None]], dims: int, known: Shapes) -> tuple[Use, ...]:
    found = dict.fromkeys((source, None if op is None else _geometry(op)) for source, op in read)
    return tuple((tuple(known.dim(known.of[s], i - dims) for i in range(dims)), how) for s, how in found)


def _along(use: Use, i: int) -> Along:
    """What is read along the spatial axis `i`, and how."""
    sizes, geometry = use
    if geometry is None:
        return Along(sizes[i])
    lo, hi, dilation, taps, stride, transposed, mode = geometry
    return Along(sizes[i], lo[i], hi[i], dilation[i] * (taps[i] - 1), stride[i], transposed, mode != "zeros")


def _axis_sizes(read: Read, dims: int, known: Shapes, extra: int) -> dict[Axis, int]:
    """The smallest sizes of the free axes for which every term has border and interior, and all give one size.

    The sides are kept apart, so that a fold which confuses them is seen.
    """
    sizes: dict[Axis, int] = {}
    for i in range(dims):
        terms, run = ([_along(use, i) for use in uses] for uses in read)
        least: dict[Dim | None, int] = {}
        for along in run:
            least[along.dim] = max(least.get(along.dim, 1), along.least)
        for dim, enough in least.items():
            if dim is not None:
                _enlarge(sizes, dim, enough, known)
        now = {d: n if d is None else known.evaluate(d, lambda a: sizes.get(a, 1)) for d, n in least.items()}
        wanted = max(a.output_size(max(least[a.dim], now[a.dim]) + extra + i % 2) for a in terms)
        for along in terms:
            if along.dim is not None:
                _enlarge(sizes, along.dim, max(least[along.dim], along.input_size(wanted)), known)
        _settle(sizes, terms, known)
    return sizes


def _settle(sizes: dict[Axis, int], read: Sequence[Along], known: Shapes) -> None:
    """Where the terms do not give one size, takes the nearest at which they do: a network may be one for few sizes."""
    terms = [(a.dim, a) for a in read if a.dim is not None and a.dim != 1]  # of size 1: it is broadcast
    axes = free_axes(dim for dim, _ in terms)
    if len(axes) != 1:
        return
    (axis,) = axes

    def agree(size: int) -> bool:
        given = {a.output_size(known.evaluate(dim, lambda _: size)) for dim, a in terms}
        return len(given) == 1 and min(given) > 0

    start = sizes[axis]
    sizes[axis] = next(filter(agree, chain(range(start, start + MORE), range(start - 1, 0, -1))), start)


def _enlarge(sizes: dict[Axis, int], dim: Dim, enough: int, known: Shapes) -> None:
    """Raises the sizes of the axes that `dim` depends on until it is `enough`."""
    for axis in free_axes([dim]):
        sizes.setdefault(axis, 1)
        while known.evaluate(dim, lambda a: sizes.get(a, 1)) < enough and sizes[axis] < 1 << 20:
            direct = isinstance(dim, Size) and dim.base == axis  # floor((n + add) / divide): solved
            sizes[axis] = (
                enough * dim.divide - dim.add  # type: ignore[union-attr]
                if direct else sizes[axis] + max(1, sizes[axis] // 16)
            )  # fmt: skip


def _concrete(shape: Shape, known: Shapes, size: Callable[[Axis], int], dims: int, channels: int) -> tuple[int, ...]:
    rank = known.rank(shape) or max(known.least_rank(shape), dims + 1) + 1
    numbers = []
    for i in range(-rank, 0):
        dim: Dim | None = known.dim(shape, i)
        if dim is None or (not isinstance(dim, int) and i == -dims - 1):
            numbers.append(channels)
        else:
            numbers.append(max(known.evaluate(dim, size), 1))
    return tuple(numbers)
