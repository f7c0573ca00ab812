"""Depthwise convolutions in float64, which torch runs one channel at a time; by taps they take a fifth of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
MOST_TAPS = 25  # above, torch's own loop over channels is as fast


class ByTaps(TorchFunctionMode):
    """While it is entered, float64 convolutions of one channel per group run as one product and sum for each tap."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in CONVOLUTIONS and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            return _convolve(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolve(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    dims = weight.ndim - 2
    is_depthwise = 1 < groups == len(weight) and x.ndim == dims + 2 and x.shape[1] == groups and weight.shape[1] == 1
    if not is_depthwise or isinstance(padding, str) or prod(weight.shape[2:]) > MOST_TAPS:
        return function(x, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = ((v,) * dims if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
    return depthwise(x, weight, bias, stride, padding, dilation)


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
