"""Readers: one small function per op, from an fx node to its affine form over its direct operands, or a refusal."""

from fxrep.readers import (
    arithmetic,
    borders,
    channels,
    convolution,
    indices,
    moved,
    normalization,
    opaque,
    pooling,
    resizing,
    views,
)  # fmt: skip
from fxrep.readers.registry import Call, Facts, base_name, canonical, reader, registered, shape_rule
from fxrep.readers.walk import NOTHING, Readings, Told, is_bypass, is_hooked, read_graph

__all__ = [
    "NOTHING", "Call", "Facts", "Readings", "Told", "arithmetic", "base_name", "borders", "canonical", "channels",
    "convolution", "indices", "is_bypass", "is_hooked", "moved", "normalization", "opaque", "pooling", "read_graph",
    "reader", "registered", "resizing", "shape_rule", "views",
]  # fmt: skip
