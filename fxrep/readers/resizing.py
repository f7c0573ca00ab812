"""Shapes of the ops that resize maps: interpolation keeps the channels, a pixel shuffle trades them for pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxrep.errors import Illegal
from fxrep.readers.opaque import known_size, own_sizes, resized
from fxrep.readers.registry import Call, shape_rule
from fxrep.shapes import Dim, Shape, Size, multiplied, shifted


@shape_rule(nn.Upsample, F.interpolate)
def interpolated_shape(at: Call, module: Any = None) -> Shape:
    """The sizes asked for, or ⌊n·factor⌋; where that has no closed form, a size of its own."""
    if module is not None:
        x, size, factor = at.first, module.size, module.scale_factor
    else:
        x, size, factor, *_ = at.bind(
            "input size scale_factor mode align_corners recompute_scale_factor antialias",
            size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None,
            antialias=False,
        )  # fmt: skip
    dims = at.rank(x) - 2
    asked = _for_each(factor if size is None else size, dims)
    spatial = [n if size is not None else _scaled(at.dim(x, i - dims), n) for i, n in enumerate(asked)]
    return resized(at, x, [
        n if isinstance(n, (int, Size)) else own for n, own in zip(spatial, own_sizes(at, dims), strict=True)
    ])  # fmt: skip


def _for_each(value: Any, dims: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * dims
    if len(values) != dims:
        raise Illegal("shape-unknown", f"it resizes {len(values)} axes of {dims}")
    return values


def _scaled(size: Dim | None, factor: Any) -> Dim | None:
    """⌊size·factor⌋, where floating point gives it exactly: the factor is whole, or one over a power of two."""
    if size is None or not isinstance(factor, (int, float)) or factor <= 0:
        return None
    if isinstance(size, int):
        return math.floor(size * factor)
    if float(factor).is_integer():
        return multiplied(size, int(factor))
    mantissa, exponent = math.frexp(factor)
    return shifted(size, 0, 1 << (1 - exponent)) if mantissa == 0.5 and exponent < 1 else None


@shape_rule(nn.PixelShuffle, torch.pixel_shuffle)
def shuffled_shape(at: Call, module: Any = None) -> Shape:
    """(…, C·r², H, W) -> (…, C, H·r, W·r)."""
    x, factor = (at.first, module.upscale_factor) if module is not None else at.bind("input upscale_factor")
    return _traded(at, x, at.channels(x, 2) // factor**2, lambda size: multiplied(size, factor))


@shape_rule(nn.PixelUnshuffle, torch.pixel_unshuffle)
def unshuffled_shape(at: Call, module: Any = None) -> Shape:
    """(…, C, H·r, W·r) -> (…, C·r², H, W)."""
    x, factor = (at.first, module.downscale_factor) if module is not None else at.bind("input downscale_factor")
    return _traded(at, x, at.channels(x, 2) * factor**2, lambda size: shifted(size, 0, factor))


def _traded(at: Call, x: Node, channels: int, sized: Callable[[Dim], Dim]) -> Shape:
    return resized(at, x, [channels, *(sized(known_size(at, x, i)) for i in (-2, -1))])
