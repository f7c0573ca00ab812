"""Shapes of the ops that are not affine: activations keep them, pools shrink them, products broadcast."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.nn.modules import activation

from fxrep.errors import Illegal
from fxrep.readers.arithmetic import ADDS, DIVS, MULS, RSUBS, SUBS
from fxrep.readers.convolution import each
from fxrep.readers.normalization import NATIVE_BATCH_NORMS
from fxrep.readers.registry import Call, First, shape_rule
from fxrep.shapes import Axis, Dim, Shape, Size, shifted

aten = torch.ops.aten
ACTIVATIONS = tuple(
    kind for name, kind in vars(activation).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == activation.__name__
    and name not in ("MultiheadAttention", "Module", "GLU")
)  # fmt: skip
NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm, *NATIVE_BATCH_NORMS,
    First(aten.native_layer_norm.default), First(aten.native_group_norm.default),
)  # fmt: skip
SAME_FUNCTIONS = (
    F.relu, F.relu6, F.elu, F.selu, F.celu, F.leaky_relu, F.prelu, F.rrelu, F.silu, F.mish, F.gelu, F.hardtanh,
    F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid, F.hardshrink, F.softshrink,
    F.threshold, F.softmax, F.log_softmax, F.softmin, F.layer_norm, F.group_norm, F.instance_norm, F.normalize,
    F.local_response_norm, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.abs,
    torch.sqrt, torch.rsqrt, torch.square, torch.pow, torch.clamp, torch.clip, torch.erf, torch.sin, torch.cos,
    torch.softmax, torch.detach, torch.nan_to_num, torch.reciprocal, operator.pow,
)  # fmt: skip
SAME_METHODS = (
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "exp", "log", "abs", "sqrt", "rsqrt", "square", "pow", "clamp",
    "clamp_", "clip", "clamp_min", "softmax", "log_softmax", "float", "half", "double", "bfloat16", "to", "type",
    "type_as", "detach", "cuda", "cpu", "reciprocal", "requires_grad_", "nan_to_num", "round", "floor",
)  # fmt: skip
BROADCASTING = (*ADDS, *SUBS, *RSUBS, *MULS, *DIVS, torch.maximum, torch.minimum)
MAX_POOLS: dict[Any, int] = {
    nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3,
    First(aten.max_pool2d_with_indices.default): 2, First(aten.max_pool3d_with_indices.default): 3,
}  # fmt: skip
AVERAGE_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3, F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
ADAPTIVE: dict[Any, int] = {
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3, nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3, F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3, F.adaptive_max_pool1d: 1, F.adaptive_max_pool2d: 2, F.adaptive_max_pool3d: 3,
}  # fmt: skip


@shape_rule(*ACTIVATIONS, *NORMS, *SAME_FUNCTIONS, *SAME_METHODS)
def same_shape(at: Call, module: nn.Module | None = None) -> Shape:
    return at.shape(at.first)


@shape_rule(*BROADCASTING)
def broadcast_shape(at: Call) -> Shape | None:
    """Axis by axis: equal sizes stay, 1 gives way, anything else is unknown."""
    operands = [*at.node.args, *at.node.kwargs.values()][:2]
    tensors = [a for a in operands if isinstance(a, Node) and a.name not in at.facts.scalars]
    shapes = [at.shapes.full(at.shape(t)) for t in tensors]
    if len(shapes) == 1:
        return shapes[0]
    a, b = sorted(shapes, key=lambda s: len(s.tail), reverse=True)
    if a.root != b.root and b.root is not None:
        return None
    tail: list[Dim] = []
    for i in range(-len(a.tail), 0):
        left, right = at.shapes.dim(a, i), at.shapes.dim(b, i)
        joined = left if right in (None, 1, left) else right if left == 1 else None
        if joined is None:
            return None
        tail.append(joined)
    return Shape(a.root, tuple(tail))


@shape_rule(*MAX_POOLS, *AVERAGE_POOLS)
def pooled_shape(at: Call, pool: Any = None) -> Shape:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if pool is not None:
        dims = next(
            n for kind, n in {**MAX_POOLS, **AVERAGE_POOLS}.items() if isinstance(kind, type) and isinstance(pool, kind)
        )
        size, stride, padding, dilation, ceil = (getattr(pool, n, 1) for n in names)
        x = at.first
    elif (maximum := MAX_POOLS.get(at.target, MAX_POOLS.get(First(at.target)))) is not None:
        dims = maximum
        x, size, stride, padding, dilation, ceil, _ = at.bind(
            "input kernel_size stride padding dilation ceil_mode return_indices",
            stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False,
        )  # fmt: skip
    else:
        dims, dilation = AVERAGE_POOLS[at.target], 1
        x, size, stride, padding, ceil, *_ = at.bind(
            "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
            stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
        )  # fmt: skip
    if getattr(pool, "return_indices", False):
        raise Illegal("shape-unknown", "it gives a tuple")
    taps = each(size, dims)
    steps = taps if stride in (None, [], ()) else each(stride, dims)
    if ceil and any(s != 1 for s in steps):  # such a size has no closed form here: a size of its own, on known axes
        return resized(at, x, own_sizes(at, dims))
    spans = [2 * p - d * (k - 1) for p, d, k in zip(each(padding, dims), each(dilation, dims), taps, strict=True)]
    return resized(
        at,
        x,
        [shifted(known_size(at, x, i - dims), n - 1 + s, s) for i, (n, s) in enumerate(zip(spans, steps, strict=True))],
    )


@shape_rule(*ADAPTIVE)
def adaptive_shape(at: Call, pool: Any = None) -> Shape:
    if pool is not None:
        dims = next(n for kind, n in ADAPTIVE.items() if isinstance(kind, type) and isinstance(pool, kind))
        x, size = at.first, pool.output_size
    else:
        dims = ADAPTIVE[at.target]
        x, size, *_ = at.bind("input output_size return_indices", return_indices=False)
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size,) * dims
    kept = [known_size(at, x, i - dims) if s is None else s for i, s in enumerate(sizes)]
    if not all(isinstance(k, int) or not isinstance(k, Node) for k in kept):
        raise Illegal("shape-unknown", "the pooled size is computed at run time")
    return resized(at, x, kept)


@shape_rule(torch.mean, "mean", torch.sum, "sum", torch.amax, "amax")
def reduced_shape(at: Call) -> Shape:
    x, dim, keepdim, *_ = at.bind("input dim keepdim dtype", dim=None, keepdim=False, dtype=None)
    rank = at.rank(x)
    axes = {d % rank for d in (dim if isinstance(dim, (tuple, list)) else (dim,)) if isinstance(d, int)}
    if not axes:
        return Shape(None, ())
    dims = [at.dim(x, i - rank) for i in range(rank)]
    kept = [1 if i in axes else d for i, d in enumerate(dims) if keepdim or i not in axes]
    return Shape(None, tuple(k for k in kept if k is not None))


def known_size(at: Call, x: Node, index: int) -> Dim:
    size = at.dim(x, index)
    if size is None:
        raise Illegal("shape-unknown", f"{x.name} has too few axes")
    return size


def own_sizes(at: Call, dims: int) -> list[Dim]:
    """Sizes of which nothing is known."""
    return [Size(Axis(at.node.name, i - dims)) for i in range(dims)]


def resized(at: Call, x: Node, spatial: list[Dim]) -> Shape:
    """The shape of x with other sizes at the end."""
    shape = at.shapes.full(at.shape(x))
    dims = len(spatial)
    length = max(len(shape.tail), dims + 1)
    tail = [at.shapes.dim(shape, -i) for i in range(length, dims, -1)]
    return Shape(shape.root, (*(t for t in tail if t is not None), *spatial))
