"""Every operator twice: as the algebra has it, and as torch itself runs it. `execute` runs what the algebra made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep import affine
from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.evaluation import evaluate

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {0: (), 1: (13,), 2: (11, 8), 3: (7, 8, 9)}  # odd and even, and no two equal


@dataclass(frozen=True)
class Layer:
    """`operator` is the algebra's; `run` is torch's own, and shares nothing with it but the numbers."""

    operator: AffineConv
    run: Callable[[Tensor], Tensor]


def each(value: Any, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * dims


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(dims: int, channels: int, grow: int = 0, seed: int = 0) -> Tensor:
    """A batch of two maps of no two equal sides."""
    return random(1000 + seed, 2, channels, *(n + grow for n in SIZES[dims]))


def layer(
    dims: int, c_in: int = 4, c_out: int = 4, *, k: Any = 1, s: Any = 1, lo: Any = 0, hi: Any = None, d: Any = 1,
    g: int = 1, bias: bool = False, mode: str = "zeros", fill: Tensor | None = None, seed: int = 1,
) -> Layer:  # fmt: skip
    """A convolution (dims 0: a linear layer) with random numbers; `lo`, `hi` (None: as `lo`) are pads, or crops."""
    k, s, lo, hi, d = (each(v, dims) for v in (k, s, lo, lo if hi is None else hi, d))
    weight = random(seed, c_out, c_in // g, *k)
    offset = random(seed + 1, c_out) if bias else None
    leaves = [None if v is None else K.Leaf.of(v) for v in (offset, fill)]
    operator = AffineConv(K.Leaf.of(weight), g, s, lo, hi, d, leaves[0], mode=mode, fill=leaves[1])
    return Layer(operator, lambda x: _run(x, weight, offset, (s, lo, hi, d, g), mode, fill))


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, mode: str, fill: Tensor | None) -> Tensor:
    """torch's layer with its own padding where it has such a one, else an explicit pad before an unpadded layer."""
    s, lo, hi, d, g = geometry
    if not s:
        return _grouped_linear(x, weight, bias, g)
    padding: Any = 0
    if lo == hi and min(lo) >= 0 and fill is None:
        padding = lo
    elif fill is None:
        x = pad(x, lo, hi, mode)
    else:
        across = fill.reshape(-1, *(1,) * len(s))
        x = F.pad(x - across, pads_of(lo, hi)) + across
    channels = weight.shape[1] * g, weight.shape[0]
    conv = CONVS[len(s)](*channels, weight.shape[2:], s, padding, d, g, bias is not None, mode, dtype=torch.float64)
    conv.weight, conv.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return conv(x).detach()


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    parts = [F.linear(p, w) for p, w in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)]
    return torch.cat(parts, 1) + (0 if bias is None else bias)


def transposed(
    dims: int, c_in: int = 4, c_out: int = 4, *, k: Any, s: Any = 1, p: Any = 0, extra: int = 0, d: Any = 1, g: int = 1,
    bias: bool = False, seed: int = 1,
) -> Layer:  # fmt: skip
    """A transposed convolution; `extra` is torch's output padding."""
    k, s, p, d = (each(v, dims) for v in (k, s, p, d))
    stored = random(seed, c_in, c_out // g, *k)
    rows = torch.cat([w.transpose(0, 1) for w in stored.chunk(g)])  # (I, O/g, *K) -> (O, I/g, *K)
    offset = random(seed + 1, c_out) if bias else None
    hi = tuple(n - extra for n in p)
    leaf = None if offset is None else K.Leaf.of(offset)
    operator = AffineConv(K.Leaf.of(rows), g, s, p, hi, d, leaf, transposed=True)
    return Layer(operator, lambda x: TRANSPOSED[dims](x, stored, offset, s, p, extra, g, d))


def same(dims: int, channels: int = 4) -> Layer:
    """The identity branch."""
    return Layer(affine.identity(channels, dims), lambda x: x)


def scale(dims: int, channels: int = 4, *, scalar: bool = False, bias: bool = False, seed: int = 1) -> Layer:
    """A gain per channel (or one for all), perhaps with an offset: a BN in eval mode, a LayerScale, a `2 * x`."""
    gain = random(seed).abs() + 0.5 if scalar else random(seed, channels)
    offset = random(seed + 1, channels) if bias else None
    operator = affine.diagonal(K.Leaf.of(gain), channels, dims)
    if offset is not None:
        operator = replace(operator, bias=K.Leaf.of(offset))
    across = [None if v is None or not v.ndim else v.reshape(-1, *(1,) * dims) for v in (gain, offset)]
    factor = gain if across[0] is None else across[0]
    return Layer(operator, lambda x: x * factor + (0 if across[1] is None else across[1]))


def pads_of(lo: tuple[int, ...], hi: tuple[int, ...]) -> list[int]:
    """In the order of `F.pad`: the last axis first."""
    return list(chain.from_iterable(zip(reversed(lo), reversed(hi), strict=True)))


def pad(x: Tensor, lo: tuple[int, ...], hi: tuple[int, ...], mode: str) -> Tensor:
    """What is inserted is seen before anything is cropped."""
    inserted = pads_of(tuple(max(p, 0) for p in lo), tuple(max(p, 0) for p in hi))
    if any(inserted):
        x = F.pad(x, inserted, "constant" if mode == "zeros" else mode)
    return F.pad(x, pads_of(tuple(min(p, 0) for p in lo), tuple(min(p, 0) for p in hi)))


def execute(operator: AffineConv, x: Tensor) -> Tensor:
    """The operator on numbers, with torch's functional convolution on an explicitly padded map."""
    weight = evaluate(operator.weight)
    bias = None if operator.bias is None else evaluate(K.spread(operator.bias, operator.out_channels))
    if not operator.dims:
        return _grouped_linear(x, weight, bias, operator.groups)
    if operator.transposed:
        return _execute_transposed(operator, weight, bias, x)
    across = torch.zeros(())
    if operator.fill is not None and operator.pads:
        across = evaluate(K.spread(operator.fill, operator.in_channels)).reshape(-1, *(1,) * operator.dims)
    x = pad(x - across, operator.pad_lo, operator.pad_hi, operator.mode) + across
    return CONVOLVE[operator.dims](x, weight, bias, operator.stride, 0, operator.dilation, operator.groups)


def _execute_transposed(operator: AffineConv, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Uncropped, then cropped on either side: so it says nothing of which crops a layer offers."""
    stored = torch.cat([w.transpose(0, 1) for w in weight.chunk(operator.groups)])
    whole = TRANSPOSED[operator.dims](x, stored, None, operator.stride, 0, 0, operator.groups, operator.dilation)
    crop = pads_of(tuple(-p for p in operator.pad_lo), tuple(-p for p in operator.pad_hi))
    return F.pad(whole, crop) + (0 if bias is None else bias.reshape(-1, *(1,) * operator.dims))


def assert_equal(operator: AffineConv, expected: Callable[[Tensor], Tensor], channels: int) -> None:
    """The operator gives what torch gives, at several sizes, border pixels and all."""
    for grow in (0, 1, 2):
        x = image(operator.dims, channels, grow, seed=grow)
        got, wanted = execute(operator, x), expected(x)
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        error = (got - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-12, f"{operator.describe()}: {error:.2g}"


def interior(error: Tensor, width: int = 1) -> Tensor:
    """The error away from the border of every spatial axis."""
    inside = (slice(width, -width),) * (error.ndim - 2)
    return error[(slice(None), slice(None), *inside)]


def border(error: Tensor, width: int = 1) -> Tensor:
    """The error at the border pixels."""
    outside = torch.ones(error.shape, dtype=torch.bool)
    interior(outside, width).fill_(False)
    return error[outside]
