"""Readers of what stacks, cuts and permutes channels."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxrep import form as forms
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.readers.registry import Call, canonical, reader, shape_rule
from fxrep.readers.views import FLATTENS, LIKE_ANOTHER, RESHAPES, axes_of, channel_permutation, keeps_rows, layout_of
from fxrep.shapes import Axis, Shape, Size

SPLITS = (
    torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split",
    torch.ops.aten.split_with_sizes.default,
)  # fmt: skip


@shape_rule(operator.getitem)
def shape_of_slice(at: Call) -> Shape | None:
    """The axes of the operand, where of how many channels it takes some is not known: a later op may tell."""
    x, index = at.bind("input index")
    if isinstance(x, Node) and canonical(x.target) in SPLITS:
        x, _, axis = _split(Call(x, at.facts))
    else:
        axis = only_slice(index)[0]
    return _with_own_size(at, x, axis)


@shape_rule(torch.cat, torch.concat, torch.concatenate)
def shape_of_cat(at: Call) -> Shape | None:
    """The axes of a part of which it is not known how many channels it has; all others of the parts are equal."""
    values, axis = at.bind("tensors dim", dim=0)
    if not isinstance(values, (tuple, list)):
        return None
    _note_equal(at, values, axis)
    shapes = (_with_own_size(at, v, axis) for v in values)
    return next((shape for shape in shapes if shape is not None), None)


def _note_equal(at: Call, values: Sequence[Any], axis: int) -> None:
    """The parts are of one size, along all axes but one; an empty vector may be among any."""
    shapes = [at.shape(v) for v in values if at.is_value(v)]
    rank = next((r for r in map(at.shapes.rank, shapes) if r is not None and r > 1), None)
    if rank is None:
        return
    for shape in shapes:
        if at.shapes.rank(shape) is None:
            at.shapes.require_rank(shape, rank)
    first, *others = [s for s in shapes if at.shapes.rank(s) == rank]
    for index in {*range(-rank, 0)} - {axis if axis < 0 else axis - rank}:
        for other in others:
            at.shapes.require_equal(first, other, index)


def _with_own_size(at: Call, x: Node, axis: int) -> Shape | None:
    """The axes of x, with a size along one of them that is known to nobody; None where that one is known after all."""
    shape = at.shape(x)
    rank = at.shapes.rank(shape)
    if rank is None and shape.root is not None:
        at.facts.parts[at.node.name] = shape.root
    if rank is None or isinstance(at.dim(x, at.from_end(x, axis)), int):
        return None
    tail = [at.dim(x, i) for i in range(-rank, 0)]
    tail[axis] = Size(Axis(at.node.name, axis if axis < 0 else axis - rank))
    return Shape(None, tuple(d for d in tail if d is not None))


@shape_rule(*SPLITS)
def shape_of_split(at: Call) -> None:
    """None: its pieces have shapes, and are read one by one."""


@reader(torch.cat, torch.concat, torch.concatenate)
def read_cat(at: Call) -> AffineForm:
    """A concatenation stacks the rows of its parts, if it is along the channels."""
    values, axis = at.bind("tensors dim", dim=0)
    if not isinstance(values, (tuple, list)) or not all(at.is_value(v) for v in values):
        raise Illegal("not-affine", "it joins constants, or a list that is built at run time")
    dims = -1 - at.from_end(values[0], axis)
    widths = [at.channels(v, dims) for v in values]
    for value in values[1:]:
        if not at.shapes.same(_with_channels(at, value, dims, 0), _with_channels(at, values[0], dims, 0)):
            raise Illegal("shape-unknown", f"{value.name} and {values[0].name} are not provably of one size")
    at.out_shape = _with_channels(at, values[0], dims, sum(widths))
    return forms.cat([forms.value(v.name, w) for v, w in zip(values, widths, strict=True)], dims)


@reader(operator.getitem)
def read_getitem(at: Call) -> AffineForm:
    """x[:, a:b] and x[:, constants] take channels; chunk(x, n)[i] and split(x, sizes)[i] do too."""
    source, index = at.node.args
    if isinstance(source, Node) and canonical(source.target) in SPLITS:
        return _piece_of_split(at, source, index)
    return _slice(at, source, index)


@reader(torch.ops.aten.slice.Tensor)
def read_aten_slice(at: Call) -> AffineForm:
    """x[…, start:end:step, …] along one axis."""
    x, axis, *bounds = at.bind("input dim start end step", dim=0, start=None, end=None, step=1)
    return _cut(at, x, axis, slice(*bounds))


@reader(torch.narrow, "narrow")
def read_narrow(at: Call) -> AffineForm:
    """The channels [start, start + length)."""
    x, axis, start, length = at.bind("input dim start length")
    if not (isinstance(start, int) and isinstance(length, int)):
        raise Illegal("shape-unknown", "the range is computed at run time")
    dims = -1 - at.from_end(x, axis)
    start %= at.channels(x, dims)
    return rows_of(at, x, dims, range(start, start + length))


@reader(torch.index_select, "index_select")
def read_index_select(at: Call) -> AffineForm:
    """A constant permutation or selection of channels."""
    x, axis, index = at.bind("input dim index")
    return _picked(at, x, axis, index)


def _picked(at: Call, x: Node, axis: int, index: Any) -> AffineForm:
    """The entries of a channel axis at constant places."""
    places: Any = getattr(at.constant(index), "tensor", None)
    if places is None or places.ndim != 1 or places.is_floating_point() or places.dtype == torch.bool:
        raise Illegal("shape-unknown", "the index is computed, or a mask")
    dims = -1 - at.from_end(x, axis)
    channels = at.channels(x, dims)
    return rows_of(at, x, dims, [place % channels for place in places.tolist()])


@reader(nn.ChannelShuffle, torch.channel_shuffle)
def read_channel_shuffle(at: Call, module: Any = None) -> AffineForm:
    """Channel c of group g goes to c·groups + g (ShuffleNet)."""
    groups = module.groups if module is not None else at.bind("input groups")[1]
    dims = at.rank(at.first) - 2
    channels = at.channels(at.first, dims)
    order = torch.arange(channels).view(groups, -1).t().flatten().tolist()
    return rows_of(at, at.first, dims, order)


@reader(*RESHAPES, *FLATTENS, *LIKE_ANOTHER)
def read_view(at: Call, module: Any = None) -> AffineForm:
    """A reshape that only regroups the axes before the last one, or one that ends a channel shuffle."""
    if at.out_shape is not None and at.shapes.same(at.out_shape, at.shape(at.first)):
        return forms.value(at.first.name)  # the sizes that it has already
    source, axes = axes_of(at)
    if not at.is_value(source):
        raise Illegal("not-affine", "it is a view of a constant")
    if axes == layout_of(at, source).axes:
        return forms.value(source.name)
    if keeps_rows(at, source, axes):
        return replace(forms.value(source.name), dims=0)
    dims, order = channel_permutation(at, source, axes)
    return rows_of(at, source, dims, order)


def _piece_of_split(at: Call, split: Node, index: Any) -> AffineForm:
    inner = Call(split, at.facts)
    x, sizes, axis = _split(inner)
    dims = -1 - at.from_end(x, axis)
    if isinstance(sizes, (tuple, list)) and all(isinstance(s, int) for s in sizes):
        at.require_channels(x, dims, sum(sizes))  # torch accepts no other
    bounds = _bounds(inner, at.channels(x, dims), sizes)
    if not isinstance(index, int) or not -len(bounds) <= index < len(bounds):
        raise Illegal("shape-unknown", "the piece is chosen at run time")
    return rows_of(at, x, dims, range(*bounds[index]))


def _split(split: Call) -> list[Any]:
    """What is split, into which sizes or how many, along which axis."""
    names = "input sizes dim"
    if split.target in (torch.chunk, "chunk"):
        names = "input chunks dim"
    elif split.target in (torch.split, "split", torch.ops.aten.split_with_sizes.default):
        sections = "split_size_or_sections"
        names = f"input {sections} dim" if sections in split.node.kwargs else "input split_size dim"
    return split.bind(names, dim=0)


def _bounds(split: Call, channels: int, sizes: Any) -> list[tuple[int, int]]:
    """Where each piece starts and stops."""
    if split.target in (torch.tensor_split, "tensor_split"):
        raise Illegal("unsupported-options", "tensor_split has no reader")
    if isinstance(sizes, int):
        step = -(-channels // sizes) if split.target in (torch.chunk, "chunk") else sizes
        return [(start, min(start + step, channels)) for start in range(0, channels, step)]
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(s, int) for s in sizes):
        raise Illegal("shape-unknown", "the sizes of the pieces are computed at run time")
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return list(pairwise(starts))


def _slice(at: Call, x: Any, index: Any) -> AffineForm:
    if not at.is_value(x):
        raise Illegal("not-affine", "it picks from something that is not a tensor of the network")
    entries = index if isinstance(index, tuple) else (index,)
    order = [e for e in entries if isinstance(e, Node)]
    if len(order) == 1:
        axis, _ = only_slice(tuple(slice(0) if e is order[0] else e for e in entries))
        return _picked(at, x, axis, order[0])
    return _cut(at, x, *only_slice(index))


def only_slice(index: Any) -> tuple[int, slice]:
    """The axis that an index slices, and how. Raises Illegal for one that does anything else."""
    entries = index if isinstance(index, tuple) else (index,)
    if not all(e is Ellipsis or isinstance(e, slice) for e in entries):
        raise Illegal("not-affine", "it indexes, and does not only slice")
    cut = [i for i, e in enumerate(entries) if e is not Ellipsis and e != slice(None)]
    if len(cut) != 1:
        raise Illegal("not-affine", "it slices several axes, or none")
    position = cut[0]
    return (position - len(entries) if Ellipsis in entries[:position] else position), entries[position]


def _cut(at: Call, x: Node, axis: int, cut: slice) -> AffineForm:
    if cut.start in (None, 0) and cut.step in (None, 1) and cut.stop in (None, sys.maxsize):
        at.out_shape = at.shape(x)
        return at.value(x)
    if not all(b is None or isinstance(b, int) for b in (cut.start, cut.stop, cut.step)):
        raise Illegal("shape-unknown", "the range is computed at run time")
    dims = -1 - at.from_end(x, axis)
    return rows_of(at, x, dims, range(at.channels(x, dims))[cut])


def rows_of(at: Call, x: Node, dims: int, rows: Any) -> AffineForm:
    """The channels `rows`, which are before the last `dims` axes."""
    channels = at.channels(x, dims)
    rows = tuple(rows)
    at.out_shape = at.out_shape or _with_channels(at, x, dims, len(rows))
    if dims < 0 or not rows:
        raise Illegal("shape-unknown", "nothing is left of the channels")
    return forms.value(x.name, channels).take(rows, dims)


def _with_channels(at: Call, x: Node, dims: int, channels: int) -> Shape:
    """The shape of x with another number of channels."""
    shape = at.shapes.full(at.shape(x))
    tail = [at.shapes.dim(shape, -i) for i in range(max(len(shape.tail), dims + 1), 0, -1)]
    tail[-dims - 1] = channels
    return Shape(shape.root, tuple(t for t in tail if t is not None))
