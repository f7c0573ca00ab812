"""Convolutions in float64 on a CPU, faster than torch's: channel-wise ones tap by tap, dense ones as one product over
blocks of rows, so that a large float32 weight is turned into float64 in the cache and is never held twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxrep.rows import BLOCK

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
#: Forwards whose weight goes to one of the functions below and nowhere else: it may stay as it is stored.
CONVERTED = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)
MOST_TAPS = 25  # above, torch's own loop over channels is as fast
SMALL = 1 << 8  # entries of a weight below which torch's own is as fast


class InDouble(TorchFunctionMode):
    """While it is entered, convolutions and linear layers of float64 values are computed here, from weights of any
    floating type."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in CONVOLUTIONS:
                return _convolve(func, *args, **(kwargs or {}))
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolve(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    dims = weight.ndim - 2
    plain = x.ndim == dims + 2 and not isinstance(padding, str) and x.shape[1] == groups * weight.shape[1]
    if not plain or 1 < groups < len(weight) or weight.numel() < SMALL:
        return function(x, weight.double(), bias, stride, padding, dilation, groups)
    stride, padding, dilation = ((v,) * dims if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
    if 1 < groups == len(weight) and weight.shape[1] == 1 and prod(weight.shape[2:]) <= MOST_TAPS:
        return depthwise(x, weight.double(), bias, stride, padding, dilation)
    if groups == 1 and dims == 2:
        return _dense(x, weight, bias, stride, padding, dilation)
    return function(x, weight.double(), bias, stride, padding, dilation, groups)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight.double(), bias)
    out = _times(weight, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """x (B, I, H, W), weight (O, I, *K): one product of the rows of W with all windows of x."""
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in
             zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)]  # fmt: skip
    windows = F.unfold(x, tuple(weight.shape[2:]), dilation, padding, stride)  # (B, I·K, L)
    out = _times(weight.flatten(1), windows.transpose(0, 1).flatten(1)).unflatten(1, (len(x), *sizes)).transpose(0, 1)
    return out if bias is None else out + bias.reshape(-1, 1, 1)


def _times(weight: Tensor, columns: Tensor) -> Tensor:
    """W·c for W (O, I) of any floating type and c (I, N) in float64, some rows at a time."""
    out = columns.new_empty(len(weight), columns.shape[1])
    step = max(BLOCK // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        torch.mm(weight[start : start + step].double(), columns, out=out[start : start + step])
    return out


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """x (B, C, *S), weight (C, 1, *K): the sum over the taps of one window of x times one number per channel."""
    dims, taps = len(stride), weight.shape[2:]
    padded = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)]) if any(padding) else x
    per_tap = weight.flatten(1).t().reshape(-1, len(weight), *(1,) * dims)
    total = torch.zeros(()) if bias is None else bias.reshape(-1, *(1,) * dims)
    for number, tap in zip(per_tap, product(*map(range, taps)), strict=True):
        window = padded
        for axis, (k, t, s, d) in enumerate(zip(taps, tap, stride, dilation, strict=True), start=2):
            size = padded.shape[axis]
            window = window.narrow(axis, t * d, size - d * (k - 1))[(slice(None),) * axis + (slice(None, None, s),)]
        total = total + window * number
    return total
