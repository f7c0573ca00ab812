"""Readers of convolutions, transposed convolutions, linear layers and explicit padding."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxrep import affine
from fxrep import kernel as K
from fxrep.affine import AffineConv, Ints
from fxrep.errors import Illegal, Refusal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.readers.registry import Call, reader, shape_rule
from fxrep.shapes import Shape, shifted

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
aten = torch.ops.aten
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def each(value: Any, dims: int) -> Ints:
    """An int, or one int per axis, as one int per axis. Raises Illegal for a size that is only known at run time."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,)
    if not all(isinstance(v, int) for v in values):
        raise Illegal("dynamic-padding", f"the geometry {values} depends on the input's size")
    return values * dims if len(values) == 1 else values


def real_weight(weight: Kernel) -> Kernel:
    """The weight, if its numbers are stored as such. Raises Illegal of complex, sparse, quantised and sharded ones."""
    for leaf in K.leaves(weight):
        if leaf.tensor.is_complex():
            raise Illegal("unsupported-options", "the weights are complex")
        if not K.is_plain(leaf.tensor):
            kind = type(leaf.tensor).__name__ if type(leaf.tensor) is not Tensor else str(leaf.tensor.layout)
            raise Illegal("unsupported-options", f"the weights are stored in a way of their own ({kind})")
    return weight


def pads_of(padding: Any, taps: Ints, dilation: Ints) -> tuple[Ints, Ints]:
    """`padding` as pads before and after; "same" puts the odd pixel of an even kernel after, as torch does."""
    if padding == "valid":
        return (0,) * len(taps), (0,) * len(taps)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
        return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    both = each(padding, len(taps))
    return both, both


def _convolve(at: Call, x: Any, operator: AffineConv) -> AffineForm:
    at.require_channels(x, operator.dims, operator.in_channels)
    size = at.dim(x, -operator.dims - 1)
    if isinstance(size, int) and size != operator.in_channels:
        raise Illegal("broadcast", f"the input has {size} channels, not {operator.in_channels}")
    return at.value(x).then(operator)


@reader(*CONVS)
def read_conv(at: Call, conv: _ConvNd) -> AffineForm:
    """y = W ⊛ pad(x) + b, cross-correlation as torch has it. Weight (O, I/g, *K)."""
    weight = real_weight(K.Leaf.of(conv.weight))  # the attribute: a parametrized weight is its effective one
    lo, hi = pads_of(conv.padding, weight.shape[2:], conv.dilation)
    bias = None if conv.bias is None else K.Leaf.of(conv.bias)
    operator = AffineConv(weight, conv.groups, conv.stride, lo, hi, conv.dilation, bias, mode=conv.padding_mode)
    return _convolve(at, at.first, operator)


@reader(F.conv1d, F.conv2d, F.conv3d)
def read_functional_conv(at: Call) -> AffineForm:
    """`F.conv2d(x, W, b, …)` with W and b computed from parameters alone."""
    x, weight, bias, stride, padding, dilation, groups = at.bind(
        "input weight bias stride padding dilation groups", bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    kernel = real_weight(at.constant(weight))
    dims = len(kernel.shape) - 2
    dilation = each(dilation, dims)
    lo, hi = pads_of(padding, kernel.shape[2:], dilation)
    return _convolve(at, x, AffineConv(kernel, groups, each(stride, dims), lo, hi, dilation, at.optional(bias)))


@reader(aten.convolution.default)
def read_aten_convolution(at: Call) -> AffineForm:
    """What every convolution of torch is decomposed into, the transposed ones too."""
    x, weight, bias, stride, padding, dilation, transposed, extra, groups, *_ = at.bind(
        "input weight bias stride padding dilation transposed output_padding groups "
        "benchmark deterministic cudnn_enabled allow_tf32",
        benchmark=None, deterministic=None, cudnn_enabled=None, allow_tf32=None,
    )  # fmt: skip
    kernel, shift = real_weight(at.constant(weight)), at.optional(bias)
    if transposed:
        return _transposed(at, x, kernel, shift, stride, padding, extra, groups, dilation)
    dims = len(kernel.shape) - 2
    lo, hi = pads_of(padding, kernel.shape[2:], dilation)
    return _convolve(at, x, AffineConv(kernel, groups, each(stride, dims), lo, hi, each(dilation, dims), shift))


@reader(*TRANSPOSED)
def read_transposed_conv(at: Call, conv: _ConvTransposeNd) -> AffineForm | Refusal:
    """The adjoint of a convolution: y[s·i + d·t - p] += W[c,o,t]·x[c,i]. Weight (I, O/g, *K)."""
    if len(at.node.args) + len(at.node.kwargs) > 1:
        return Refusal(at.node.name, "unsupported-options", "its output size is given at run time")
    return _transposed(
        at, at.first, real_weight(K.Leaf.of(conv.weight)), None if conv.bias is None else K.Leaf.of(conv.bias),
        conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation,
    )  # fmt: skip


@reader(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def read_functional_transposed_conv(at: Call) -> AffineForm:
    x, weight, bias, stride, padding, output_padding, groups, dilation = at.bind(
        "input weight bias stride padding output_padding groups dilation",
        bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
    )  # fmt: skip
    return _transposed(at, x, at.constant(weight), at.optional(bias), stride, padding, output_padding, groups, dilation)


def _transposed(
    at: Call, x: Any, weight: Kernel, bias: Kernel | None, stride: Any, padding: Any, extra: Any, groups: int,
    dilation: Any,
) -> AffineForm:  # fmt: skip
    real_weight(weight)
    dims = len(weight.shape) - 2
    lo = each(padding, dims)
    hi = tuple(p - e for p, e in zip(lo, each(extra, dims), strict=True))
    rows_first = _rows_first(weight, groups)
    operator = AffineConv(rows_first, groups, each(stride, dims), lo, hi, each(dilation, dims), bias, transposed=True)
    return _convolve(at, x, operator)


def _rows_first(weight: Kernel, groups: int) -> Kernel:
    """(I, O/g, *K) as (O, I/g, *K)."""
    columns, rows, *taps = weight.shape

    def swap(w: torch.Tensor) -> torch.Tensor:
        return w.reshape(groups, columns // groups, rows, *taps).transpose(1, 2).flatten(0, 1)

    return K.Map((rows * groups, columns // groups, *taps), swap, (weight,))


@reader(nn.Linear)
def read_linear(at: Call, linear: Any) -> AffineForm:
    """y = x·Wᵀ + b on the last axis: the 0-dimensional convolution. Weight (O, I)."""
    bias = None if linear.bias is None else K.Leaf.of(linear.bias)
    return _linear(at, at.first, real_weight(K.Leaf.of(linear.weight)), bias)


@reader(F.linear)
def read_functional_linear(at: Call) -> AffineForm:
    x, weight, bias = at.bind("input weight bias", bias=None)
    return _linear(at, x, at.constant(weight), at.optional(bias))


@reader(torch.addmm)
def read_addmm(at: Call) -> AffineForm:
    """β·b + α·x·W for a constant W of shape (I, O) and a constant b: what a Linear is decomposed into."""
    bias, x, weight, beta, alpha = at.bind("input mat1 mat2 beta alpha", beta=1, alpha=1)
    if (beta, alpha) != (1, 1):
        raise Illegal("unsupported-options", f"beta={beta} and alpha={alpha} scale the sum")
    shift = at.constant(bias)
    columns = at.constant(weight)
    if shift.shape not in ((columns.shape[-1],), (1, columns.shape[-1])):
        raise Illegal("broadcast", f"a bias of shape {shift.shape} is no vector")
    return _linear(at, x, _transpose(columns), K.Map(shift.shape[-1:], torch.Tensor.flatten, (shift,)))


@reader(torch.mm, torch.matmul, "matmul", operator.matmul)
def read_matmul(at: Call) -> AffineForm:
    """x·W for a constant W of shape (I, O)."""
    node, (x, weight) = at.node, at.node.args if len(at.node.args) == 2 else at.bind("input other")
    if not at.is_value(x) or at.is_value(weight):
        raise Illegal("not-affine", f"{node.name} multiplies two values of the network, or from the left")
    return _linear(at, x, _transpose(at.constant(weight)), None)


def _transpose(weight: Kernel) -> Kernel:
    if len(weight.shape) != 2:
        raise Illegal("unsupported-options", f"the second factor has the shape {weight.shape}")
    return K.Map(weight.shape[::-1], torch.t, (weight,))


def _linear(at: Call, x: Any, weight: Kernel, bias: Kernel | None) -> AffineForm:
    if len(weight.shape) != 2:
        raise Illegal("unsupported-options", "a linear layer's weight is a vector")
    return _convolve(at, x, AffineConv(real_weight(weight), 1, (), (), (), (), bias))


PADS = (
    F.pad, aten.constant_pad_nd.default,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip


@shape_rule(*PADS)
def padded_shape(at: Call, module: Any = None) -> Shape:
    """The last axes grow by their pads; the others, the channels among them, are those of the operand."""
    x = at.first
    amounts = each(module.padding if module is not None else at.node.args[1], 1)
    dims = len(amounts) // 2
    shape = at.shapes.full(at.shape(x))
    tail = [at.dim(x, -i) for i in range(max(len(shape.tail), dims), 0, -1)]
    for i in range(dims):
        size = tail[-1 - i]
        if size is None:
            raise Illegal("shape-unknown", f"{x.name} has too few axes")
        tail[-1 - i] = shifted(size, amounts[2 * i] + amounts[2 * i + 1])
    return Shape(shape.root, tuple(t for t in tail if t is not None))


@reader(F.pad)
def read_pad(at: Call) -> AffineForm:
    """Padding is the identity with pads; the value it inserts decides what it may be merged with."""
    x, pad, mode, value = at.bind("input pad mode value", mode="constant", value=None)
    return _pad(at, x, pad, mode, value or 0.0)


@reader(aten.constant_pad_nd.default)
def read_aten_constant_pad(at: Call) -> AffineForm:
    x, pad, value = at.bind("input pad value", value=0)
    return _pad(at, x, pad, "constant", value)


@reader(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def read_constant_pad(at: Call, module: Any) -> AffineForm:
    return _pad(at, at.first, module.padding, "constant", module.value)


@reader(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
def read_reflection_pad(at: Call, module: Any) -> AffineForm:
    return _pad(at, at.first, module.padding, "reflect", 0.0)


@reader(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
def read_replication_pad(at: Call, module: Any) -> AffineForm:
    return _pad(at, at.first, module.padding, "replicate", 0.0)


@reader(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def read_circular_pad(at: Call, module: Any) -> AffineForm:
    return _pad(at, at.first, module.padding, "circular", 0.0)


def _pad(at: Call, x: Any, pad: Any, mode: str, value: float) -> AffineForm:
    amounts = each(pad, 1)
    dims = len(amounts) // 2
    channels = at.channels(x, dims)
    lo, hi = (tuple(reversed(amounts[start::2])) for start in (0, 1))  # torch lists the last axis first
    fill = K.Constant((channels,), float(value)) if mode == "constant" and value else None
    identity = affine.identity(channels, dims)
    kind = "zeros" if mode == "constant" else mode
    padded = AffineConv(identity.weight, channels, identity.stride, lo, hi, identity.dilation, mode=kind, fill=fill)
    return at.value(x).then(padded)
