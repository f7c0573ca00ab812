"""Readers of average pools."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.readers.convolution import each
from fxrep.readers.registry import Call, reader

POOLS: dict[Any, int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3, F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3,
}  # fmt: skip


@reader(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def read_avg_pool(at: Call, pool: Any) -> AffineForm:
    """The depthwise box kernel (DBB transform V), where every window has the same count."""
    divisor = getattr(pool, "divisor_override", None)
    dims = next(n for kind, n in POOLS.items() if isinstance(kind, type) and isinstance(pool, kind))
    return _box(
        at, at.first, dims, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad, divisor
    )


@reader(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def read_functional_avg_pool(at: Call) -> AffineForm:
    arguments = at.bind(
        "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
        stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
    )  # fmt: skip
    return _box(at, arguments[0], POOLS[at.target], *arguments[1:])


def _box(
    at: Call, x: Any, dims: int, size: Any, stride: Any, padding: Any, ceil: bool, count_pads: bool, divisor: int | None
) -> AffineForm:  # fmt: skip
    taps, pad = each(size, dims), each(padding, dims)
    if ceil:
        raise Illegal("pool-border", "ceil_mode=True lets windows reach beyond the padding", "ceil_mode=False")
    if any(pad) and not count_pads and divisor is None:
        raise Illegal(
            "pool-border", "count_include_pad=False divides by fewer pixels at the border", "count_include_pad=True"
        )
    count = 1
    for k in taps:
        count *= k
    channels = at.channels(x, dims)
    weight = K.Constant((channels, 1, *taps), 1.0 / (divisor or count))
    steps = taps if stride in (None, [], ()) else each(stride, dims)
    return at.value(x).then(AffineConv(weight, channels, steps, pad, pad, (1,) * dims))
