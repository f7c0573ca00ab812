"""A lazy weight expression: every node knows its shape at once and its numbers only when asked.

Weights have the layout (rows O, columns per group I/g, *taps); vectors have the shape (O,); scalars (). Planning needs
shapes alone, so legality and cost never touch a number. One chosen kernel is evaluated once, in float64, and cast once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxrep.frozen import frozen, lazily

Shape = tuple[int, ...]


@frozen(eq=False)
class Kernel:
    """A node of the expression. `operands` are the kernels among its fields; `_compute` turns their numbers into its
    own."""

    shape: Shape

    @lazily
    def operands(self) -> tuple[Kernel, ...]:
        found: list[Kernel] = []
        kind: Any = type(self)
        for name in _holding(kind):
            value = getattr(self, name)
            found += value if isinstance(value, tuple) else (value,)
        return tuple(found)

    @lazily
    def below(self) -> tuple[Kernel, ...]:
        """All that it is computed from, operands before users, each once."""
        return tuple(_ordered(self.operands))

    def _compute(self, *values: Tensor) -> Tensor:
        raise NotImplementedError


@cache
def _holding(kind: Any) -> tuple[str, ...]:
    """Which fields of a kind of kernel are kernels, or tuples of them."""
    return tuple(f.name for f in fields(kind) if str(f.type) in ("Kernel", "tuple[Kernel, ...]"))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are stored one by one: it is not sparse, quantised, sharded or of such a class."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not is_traceable_wrapper_subclass(tensor)


@frozen(eq=False)
class Leaf(Kernel):
    """A parameter, buffer or constant of the model. `axes` permutes the stored tensor into kernel layout."""

    tensor: Tensor
    axes: tuple[int, ...] | None = None

    @staticmethod
    def of(tensor: Tensor, axes: tuple[int, ...] | None = None) -> Leaf:
        shape = tuple(tensor.shape) if axes is None else tuple(tensor.shape[a] for a in axes)
        assert all(isinstance(n, int) for n in shape), shape
        return Leaf(shape, tensor, axes)


@frozen(eq=False)
class Constant(Kernel):
    """The number `value` everywhere."""

    value: float


@frozen(eq=False)
class Map(Kernel):
    """`function(*operands)`, for what parameters are computed from: γ/σ, a standardised weight, a reshape."""

    function: Callable[..., Tensor]
    inputs: tuple[Kernel, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        return self.function(*values).reshape(self.shape)


@frozen(eq=False)
class Several(Map):
    """A `function(*operands)` that gives several tensors: what a chunk of a parameter is, until one piece is taken."""

    def _compute(self, *values: Tensor) -> Tensor:
        return self.function(*values)


@frozen(eq=False)
class Dirac(Kernel):
    """The identity of a depthwise one-tap operator, or with fewer groups its denser form: W[c, c mod I/g] = 1."""

    def _compute(self, *values: Tensor) -> Tensor:
        rows, columns, *taps = self.shape
        blocks = -(-rows // columns)
        eye = torch.zeros(blocks * columns, columns, *taps)
        eye.view(blocks, columns, columns, -1)[..., 0].diagonal(dim1=1, dim2=2).fill_(1.0)
        return eye[:rows]


@frozen(eq=False)
class ScaleRows(Kernel):
    """diag(v)·W, for v of shape (O,) or ()."""

    weight: Kernel
    gain: Kernel

    def _compute(self, *values: Tensor) -> Tensor:
        weight, gain = values
        return weight * over_rows(gain, weight.ndim)


@frozen(eq=False)
class ScaleColumns(Kernel):
    """W·diag(v), for v of shape (I,): with groups each row meets the slice of v that its group reads."""

    weight: Kernel
    gain: Kernel
    groups: int

    def _compute(self, *values: Tensor) -> Tensor:
        weight, gain = values
        per_row = gain.reshape(self.groups, -1).repeat_interleave(weight.shape[0] // self.groups, dim=0)
        return weight * per_row.reshape(per_row.shape + (1,) * (weight.ndim - 2))


@frozen(eq=False)
class Place(Kernel):
    """W laid into a larger window of taps: tap t goes to offset + step·t; everything else is zero (enlarge, dilate)."""

    weight: Kernel
    offset: tuple[int, ...]
    step: tuple[int, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        (weight,) = values
        window = weight.new_zeros(self.shape)
        self.region(window).copy_(weight)
        return window

    def region(self, window: Tensor) -> Tensor:
        """The part of a window that the taps of W are laid into."""
        taps = zip(self.offset, self.step, self.weight.shape[2:], strict=True)
        return window[(slice(None), slice(None), *(slice(o, o + s * (k - 1) + 1, s) for o, s, k in taps))]


@frozen(eq=False)
class Regroup(Kernel):
    """The same operator written with fewer groups: each row's columns are placed where its old group sat."""

    weight: Kernel
    groups_from: int
    groups_to: int

    def _compute(self, *values: Tensor) -> Tensor:
        (weight,) = values
        ratio = self.groups_from // self.groups_to
        rows = weight.reshape(self.groups_to, ratio, -1, *weight.shape[1:])
        wide = weight.new_zeros(self.groups_to, ratio, rows.shape[2], ratio, *weight.shape[1:])
        index = torch.arange(ratio, device=weight.device)
        wide[:, index, :, index] = rows.transpose(0, 1)
        return wide.reshape(self.shape)


@frozen(eq=False)
class Sum(Kernel):
    """Σ terms, all of one shape (scalars broadcast)."""

    terms: tuple[Kernel, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        total = values[0].expand(self.shape).clone()
        for value in values[1:]:
            total = total + value
        return total


@frozen(eq=False)
class Compose(Kernel):
    """W[o,i,u] = Σ_{c, step₁t₁ + step₂t₂ = u} W₂[o,c,t₂]·W₁[c,i,t₁], both with `groups` groups."""

    outer: Kernel
    inner: Kernel
    groups: int
    step_outer: tuple[int, ...]
    step_inner: tuple[int, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        outer, inner = (v.reshape(self.groups, v.shape[0] // self.groups, *v.shape[1:]) for v in values)
        taps = self.shape[2:]
        result = outer.new_zeros(self.groups, outer.shape[1], inner.shape[2], *taps)
        flat = inner.flatten(2)
        for tap in product(*(range(k) for k in outer.shape[3:])):
            part = torch.bmm(outer[(slice(None),) * 3 + tap], flat).reshape(*result.shape[:3], *inner.shape[3:])
            region = tuple(
                slice(s2 * t, s2 * t + s1 * (k - 1) + 1, s1)
                for s2, t, s1, k in zip(self.step_outer, tap, self.step_inner, inner.shape[3:], strict=True)
            )
            result[(slice(None),) * 3 + region] += part
        return result.reshape(self.shape)


@frozen(eq=False)
class Contract(Kernel):
    """(Σ_{c,t} W[o,c,t]·v[c])_o: what an operator makes of a constant map."""

    weight: Kernel
    vector: Kernel
    groups: int

    def _compute(self, *values: Tensor) -> Tensor:
        weight, vector = values
        per_column = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        grouped = per_column.reshape(self.groups, -1, weight.shape[1])
        return torch.bmm(grouped, vector.reshape(self.groups, -1, 1)).reshape(self.shape)


@frozen(eq=False)
class StackRows(Kernel):
    """Parts one above the other: the weight of a concatenation of outputs."""

    parts: tuple[Kernel, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        return torch.cat(values)


@frozen(eq=False)
class TakeRows(Kernel):
    """The rows `index` of a weight or vector, in that order: slice, chunk, permute."""

    source: Kernel
    index: tuple[int, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        return values[0][torch.tensor(self.index, device=values[0].device)]


@frozen(eq=False)
class TakeColumns(Kernel):
    """The columns [start, stop) of an ungrouped weight: one part of a convolution over a concatenation."""

    source: Kernel
    start: int
    stop: int

    def _compute(self, *values: Tensor) -> Tensor:
        return values[0][:, self.start : self.stop]


@frozen(eq=False)
class PlaceColumns(Kernel):
    """An ungrouped weight over more input channels: its columns at `index`, zero elsewhere."""

    source: Kernel
    index: tuple[int, ...]

    def _compute(self, *values: Tensor) -> Tensor:
        (weight,) = values
        wide = weight.new_zeros(self.shape)
        return wide.index_add(1, torch.tensor(self.index, device=weight.device), weight)


def over_rows(gain: Tensor, ndim: int) -> Tensor:
    """A gain of shape (O,) or () so that it broadcasts over the rows of a weight with `ndim` axes."""
    return gain.reshape(gain.shape + (1,) * (ndim - gain.ndim)) if gain.ndim else gain


def scale(kernel: Kernel, gain: Kernel) -> Kernel:
    """Rows of a weight, or entries of a vector or scalar, times `gain` (shape (O,) or ())."""
    if not kernel.shape:
        return ScaleRows(gain.shape, gain, kernel)
    return ScaleRows(kernel.shape, kernel, gain)


def total(*terms: Kernel | None) -> Kernel | None:
    """Σ of the terms that are not None (None is an exact zero); None if there are none."""
    present = tuple(t for t in terms if t is not None)
    if len(present) < 2:
        return present[0] if present else None
    return Sum(max((t.shape for t in present), key=lambda s: (math.prod(s), len(s))), present)


def spread(scalar: Kernel, length: int) -> Kernel:
    """A scalar as a vector of `length` equal entries."""
    return scalar if scalar.shape else Sum((length,), (scalar,))


def stack(parts: Sequence[Kernel]) -> Kernel:
    if len(parts) == 1:
        return parts[0]
    return StackRows((sum(p.shape[0] for p in parts), *parts[0].shape[1:]), tuple(parts))


def take(kernel: Kernel, index: tuple[int, ...]) -> Kernel:
    if index == tuple(range(kernel.shape[0])):
        return kernel
    return TakeRows((len(index), *kernel.shape[1:]), kernel, index)


def leaves(*kernels: Kernel | None) -> Iterator[Leaf]:
    """Every distinct leaf under `kernels`, in a fixed order."""
    orders = (topological((k,)) for k in kernels if k is not None)
    return iter({id(node): node for order in orders for node in order if isinstance(node, Leaf)}.values())


def topological(kernels: Sequence[Kernel | None]) -> Sequence[Kernel]:
    """Operands before users, each node once."""
    if len(kernels) == 1 and kernels[0] is not None:
        return (*kernels[0].below, kernels[0])
    return _ordered(kernels)


def _ordered(kernels: Sequence[Kernel | None]) -> list[Kernel]:
    """Iterative, since a fold may be deeper than Python's stack."""
    order: list[Kernel] = []
    done: set[int] = set()
    todo = [k for k in reversed(kernels) if k is not None]
    while todo:
        node = todo[-1]
        missing = [o for o in node.operands if id(o) not in done]
        if missing:
            todo += reversed(missing)
            continue
        todo.pop()
        if id(node) not in done:
            done.add(id(node))
            order.append(node)
    return order
