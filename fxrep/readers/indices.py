"""Readers of an axis indexed by constant numbers: how aten writes a border that repeats what is inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxrep import affine
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.readers.channels import rows_of
from fxrep.readers.registry import Call, reader, shape_rule
from fxrep.shapes import Shape

index = torch.ops.aten.index.Tensor
BORDERS = ("reflect", "replicate", "circular")


@shape_rule(index)
def shape_of_index(at: Call) -> Shape:
    x, axis, places = _indexed(at)
    shape = at.shapes.full(at.shape(x))
    tail = [len(places) if i == axis else at.dim(x, i) for i in range(-at.rank(x), 0)]
    return Shape(shape.root, tuple(t for t in tail if t is not None))


@reader(index)
def read_index(at: Call) -> AffineForm:
    """x[:, :, [1, 0, 1, 2, …]] pads by reflection, and likewise; along the channels it takes some of them."""
    x, axis, places = _indexed(at)
    if axis == 1 - at.rank(x):
        return rows_of(at, x, -1 - axis, places.tolist())
    size, dims = at.dim(x, axis), at.rank(x) - 2
    if not isinstance(size, int) or not -axis <= dims:
        raise Illegal("not-affine", "it indexes an axis of which the size is not known")
    mode, lo, hi = _border(places, size)
    none = [0] * dims
    before, after = ([*none[:axis], pad, *none[len(none) + axis + 1 :]] for pad in (lo, hi))
    same = affine.identity(at.channels(x, dims), dims)
    return at.value(x).then(replace(same, pad_lo=tuple(before), pad_hi=tuple(after), mode=mode))


def _indexed(at: Call) -> tuple[Node, int, Tensor]:
    """What is indexed, along which axis (negative), at which places. Raises Illegal unless it is one, by constants."""
    x, indices = at.bind("input indices")
    given = [i for i, places in enumerate(indices) if places is not None]
    if len(given) != 1:
        raise Illegal("not-affine", "it indexes several axes at once")
    places: Any = getattr(at.constant(indices[given[0]]), "tensor", None)
    if places is None or places.is_floating_point() or places.dtype == torch.bool or places.ndim != 1:
        raise Illegal("not-affine", "it indexes by what is computed, or by a mask")
    return x, given[0] - at.rank(x), places


def _border(places: Tensor, size: int) -> tuple[str, int, int]:
    """The mode and the pads, before and after, of which these places of an axis of that size come."""
    inside, more = torch.arange(size), len(places) - size
    for lo in range(more + 1):
        if not torch.equal(places[lo : lo + size].cpu(), inside):
            continue
        for mode in BORDERS:
            if torch.equal(_padded(inside, lo, more - lo, mode), places.cpu()):
                return mode, lo, more - lo
    raise Illegal("not-affine", "it indexes, and no padding does the same")


def _padded(places: Tensor, lo: int, hi: int, mode: str) -> Tensor:
    if max(lo, hi) >= len(places):
        return places.new_empty(0)
    return F.pad(places.double()[None], (lo, hi), mode)[0].long()
