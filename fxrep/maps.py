"""Random maps for a certificate: as small as has a border all around an interior, of unequal sides, at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain

import torch
from torch import Tensor

from fxrep.affine import AffineConv
from fxrep.double import InDouble
from fxrep.lower import Emit
from fxrep.readers import Readings
from fxrep.shapes import Axis, Dim, Shape, Shapes, Size, free_axes
from fxrep.sketch import signs

SEED, OF_CHANNELS = 0x5EED, 0xC4A
MORE = 8  # how much larger a map may be than the least
#: The size of what an operator reads, and the operator (None: what is read is passed on).
Reading = tuple[Shape, AffineConv | None]


class Maps:
    """Draws values by name, for what is computed by `emits`, of which `last` give the result, in place of `replaced`.

    `node_of` names the node of the graph that has the size of a source.
    """

    def __init__(
        self, replaced: Collection[str], emits: Sequence[Emit], last: Sequence[Emit], node_of: Callable[[str], str],
        readings: Readings, dims: int,
    ) -> None:  # fmt: skip
        known = readings.facts.shapes
        self.readings, self.dims = readings, dims

        def read(some: Sequence[Emit]) -> list[Reading]:
            return [(known.full(known.of[node_of(e.anchor.source)]), e.operator) for e in some]

        self.terms = read(last)
        self.before = read(emits)
        self.before += [
            (known.full(known.of[a.source]), term)
            for form in map(readings.forms.get, replaced) if form is not None
            for a, term in form.terms if isinstance(term, AffineConv) and term.dims == dims
        ]  # fmt: skip
        whole = [(e.anchor.source, e.operator) for e in emits if e.operator and e.anchor.rows is None]
        self.channels = {source: operator.in_channels for source, operator in reversed(whole)}

    def drawing(self, mode: InDouble, extra: int, device: torch.device) -> Callable[[str], Tensor]:
        """Gives maps that are `extra` larger than the least.

        Each is a number per channel, the same at every size, times one map, so that convolutions of it cost little.
        """
        known, dims = self.readings.facts.shapes, self.dims
        sizes = _axis_sizes(self.terms, self.before, self.readings, dims, extra)
        generator = torch.Generator().manual_seed(SEED + extra)

        def draw(name: str) -> Tensor:
            shape = _concrete(
                known.full(known.of[name]), self.readings, lambda a: sizes.get(a, 2 - extra), dims,
                self.channels.get(name, 3),
            )  # fmt: skip
            one = (*shape[: -dims - 1], 1, *shape[len(shape) - dims :])
            values = torch.randn(one, generator=generator, dtype=torch.float64).to(device)
            return mode.product(signs(shape[-dims - 1], OF_CHANNELS).to(device), values, -dims - 1)

        return draw


def _axis_sizes(
    terms: Sequence[Reading], before: Sequence[Reading], readings: Readings, dims: int, extra: int
) -> dict[Axis, int]:
    """The smallest sizes of the free axes for which every term has border and interior, and all give one size.

    `before` are operators that are run too, and need maps as large as they are.
    The sides are kept apart, so that a fold which confuses them is seen.
    """
    known = readings.facts.shapes
    sizes: dict[Axis, int] = {}
    for i in range(dims):
        least: dict[Dim | None, int] = {}
        for shape, op in (*terms, *before):
            dim = known.dim(shape, i - dims)
            least[dim] = max(least.get(dim, 1), _least(op, i))
        for dim, enough in least.items():
            if dim is not None:
                _enlarge(sizes, dim, enough, known)
        read = [(known.dim(shape, i - dims), op) for shape, op in terms]
        now = {d: n if d is None else known.evaluate(d, lambda a: sizes.get(a, 1)) for d, n in least.items()}
        wanted = max(_output_size(op, i, max(least[dim], now[dim]) + extra + i % 2) for dim, op in read)
        for dim, op in read:
            if dim is not None:
                _enlarge(sizes, dim, max(least[dim], _input_size(op, i, wanted)), known)
        _settle(sizes, i, read, known)
    return sizes


def _settle(
    sizes: dict[Axis, int], i: int, read: Sequence[tuple[Dim | None, AffineConv | None]], known: Shapes
) -> None:
    """Where the terms do not give one size, takes the nearest at which they do: a network may be one for few sizes."""
    terms = [(dim, op) for dim, op in read if dim is not None and dim != 1]  # of size 1: it is broadcast
    axes = free_axes(dim for dim, _ in terms)
    if len(axes) != 1:
        return
    (axis,) = axes

    def agree(size: int) -> bool:
        given = {_output_size(op, i, known.evaluate(dim, lambda _: size)) for dim, op in terms}
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


def _least(op: AffineConv | None, axis: int) -> int:
    """The size along an axis at which an operator has a pixel that its padding does not reach."""
    if op is None:
        return 1
    lo, hi = op.pad_lo[axis], op.pad_hi[axis]
    if op.transposed:
        return 1 + lo + hi
    mirrored = 0 if op.mode == "zeros" else max(lo, hi)  # torch reflects no more than there is
    return 1 + max(op.span[axis] + max(-lo, 0) + max(-hi, 0), mirrored)


def _input_size(op: AffineConv | None, axis: int, size: int) -> int:
    """The least input for which the output along an axis is at least `size`."""
    if op is None:
        return size
    net = op.pad_lo[axis] + op.pad_hi[axis]
    if op.transposed:
        return -(-(size - op.span[axis] - 1 + net) // op.stride[axis]) + 1
    return (size - 1) * op.stride[axis] - net + op.span[axis] + 1


def _output_size(op: AffineConv | None, axis: int, size: int) -> int:
    if op is None:
        return size
    net = op.pad_lo[axis] + op.pad_hi[axis]
    if op.transposed:
        return (size - 1) * op.stride[axis] + op.span[axis] + 1 - net
    return (size + net - op.span[axis] - 1) // op.stride[axis] + 1


def _concrete(
    shape: Shape, readings: Readings, size: Callable[[Axis], int], dims: int, channels: int
) -> tuple[int, ...]:
    known = readings.facts.shapes
    rank = known.rank(shape) or max(known.least_rank(shape), dims + 1) + 1
    numbers = []
    for i in range(-rank, 0):
        dim: Dim | None = known.dim(shape, i)
        if dim is None or (not isinstance(dim, int) and i == -dims - 1):
            numbers.append(channels)
        else:
            numbers.append(max(known.evaluate(dim, size), 1))
    return tuple(numbers)
