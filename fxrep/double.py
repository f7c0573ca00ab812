"""Convolutions and linear layers in float64 on a CPU, faster than torch's, from weights of any floating type.

Of a map that is a number per channel times one map for all channels, x[b,c,p] = a[c]·s[b,p], a convolution is that of
s with one input channel: (W ⊛ x)[o] = (W·a)[o] ⊛ s with (W·a)[o,t] = Σ_c W[o,c,t]·a[c]. So the weight is read once, and
for maps of several sizes with the same a only once. A linear operator that is not zero is zero on almost none of such
maps (its values are polynomials in a and s, linear in each), so that they are as good for comparing two as any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxrep.evaluation import Doubles
from fxrep.rows import BLOCK
from fxrep.sketch import channel_numbers

COMPUTED = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear}
#: Forwards whose weight goes to one of the functions below and nowhere else: it may stay as it is stored.
CONVERTED = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward)


class Contracting(Doubles):
    """Contracts large weights as they are read, with the numbers that a map of their channels is drawn with: a weight
    that is folded and then run, as it is stored, is so fetched from memory once."""

    def __init__(self) -> None:
        super().__init__()
        self._contractions: dict[int, _Contraction] = {}

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        rows = super().rows(tensor, start, stop)
        if rows.ndim > 1 and rows.device.type == "cpu":
            if id(tensor) not in self._contractions:
                self._contractions[id(tensor)] = _Contraction(tensor)
            self._contractions[id(tensor)].add(rows, start)
        return rows

    def contracted(self, weight: Tensor, channels: Tensor) -> Tensor | None:
        """W·a as (O, K), if all rows of W were read and a is what they were contracted with."""
        found = self._contractions.get(id(weight))
        return found.result if found and found.is_whole and channels is found.channels else None


class _Contraction:
    """W·a (O, K) of a weight that is read in order."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.channels, self.read = weight, channel_numbers(weight.shape[1]), 0
        self.result = self.channels.new_empty(len(weight), prod(weight.shape[2:]))

    @property
    def is_whole(self) -> bool:
        return self.read == len(self.result)

    def add(self, rows: Tensor, start: int) -> None:
        if start == self.read:  # and was not before
            self.read += len(rows)
            _contract_rows(rows, self.channels, self.result[start : self.read])


class _Product(NamedTuple):
    """What a map was made of: itself, a number for each channel, and the map of one channel."""

    whole: Tensor
    channels: Tensor
    one: Tensor


class InDouble(TorchFunctionMode):
    """While it is entered, convolutions and linear layers of float64 values are computed here, from weights of any
    floating type; of a map that `product` made, quickly."""

    def __init__(self, doubles: Doubles) -> None:
        super().__init__()
        self.doubles = doubles
        self._products: dict[int, _Product] = {}
        self._contracted: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def product(self, channels: Tensor, one: Tensor, axis: int) -> Tensor:
        """x = a·s for a (C,) on `axis` (negative) and s with one entry there."""
        whole = channels.reshape(-1, *(1,) * (-axis - 1)) * one
        self._products[id(whole)] = _Product(whole, channels, one)
        return whole

    def forget_products(self) -> None:
        """What was contracted with their channels stays, for other products with the same."""
        self._products.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.call(func, *args, **(kwargs or {}))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a call of the function gives while the mode is entered."""
        if function in COMPUTED and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if function is F.linear:
                return self._linear(*args, **kwargs)
            return self._convolve(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _convolve(
        self, function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        dims = weight.ndim - 2
        fits = x.ndim == dims + 2 and x.shape[1] == groups * weight.shape[1]
        known = self._product(x, 1) if fits else None
        if known is not None:
            narrow = self._times_channels(weight, known.channels, groups)
            if prod(weight.shape[2:]) == 1 and padding in (0, (0,) * dims):
                return _scaled(known.one, narrow, bias, (stride,) * dims if isinstance(stride, int) else tuple(stride))
            return function(known.one, narrow, bias, stride, padding, dilation)
        if fits and dims == 2 and groups == 1 and not isinstance(padding, str):
            pairs = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
            return _dense(x, weight, bias, *pairs)
        return function(x, weight.double(), bias, stride, padding, dilation, groups)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
            return F.linear(x, weight.double(), bias)
        known = self._product(x, -1)
        if known is not None:
            out = known.one * self._times_channels(weight, known.channels, 1).flatten()
        else:
            out = _times(weight, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], len(weight))
        return out if bias is None else out + bias

    def _product(self, x: Tensor, axis: int) -> _Product | None:
        """What x was made of, if its channels are on that axis and it was not written since."""
        known = self._products.get(id(x)) if x.is_inference() or not x._version else None
        return known if known and known.one.shape[axis] == 1 and len(known.channels) == x.shape[axis] else None

    def _times_channels(self, weight: Tensor, channels: Tensor, groups: int) -> Tensor:
        """(W·a)[o,0,t] = Σ_c W[o,c,t]·a[c], each row with the channels that its group reads; kept."""
        key = id(weight), id(channels)
        if key not in self._contracted:
            found = self.doubles.contracted(weight, channels) if isinstance(self.doubles, Contracting) else None
            if found is None:
                found = _contract(weight.detach().reshape(*weight.shape[:2], -1), channels, groups)
            self._contracted[key] = weight, channels, found.reshape(len(weight), 1, *weight.shape[2:])
        return self._contracted[key][2]


def _contract(weight: Tensor, channels: Tensor, groups: int) -> Tensor:
    """weight (O, I/g, K) of any floating type, channels (I,) in float64 -> (O, K)."""
    if groups > 1:
        each = weight.double().reshape(groups, -1, *weight.shape[1:]) * channels.reshape(groups, 1, -1, 1)
        return each.sum(2).flatten(0, 1)
    out = channels.new_empty(len(weight), weight.shape[2])
    step = max(BLOCK // max(prod(weight.shape[1:]), 1), 1)
    for start in range(0, len(weight), step):
        _contract_rows(weight[start : start + step].double(), channels, out[start : start + step])
    return out


def _contract_rows(rows: Tensor, channels: Tensor, out: Tensor) -> None:
    """rows (R, I, *K), channels (I,) -> (R, K)."""
    if out.shape[1] == 1:
        torch.mv(rows.flatten(1), channels, out=out.view(-1))
    else:
        torch.matmul(channels, rows.flatten(2), out=out)


def _scaled(one: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    """one (B, 1, *n), weight (O, 1, *1) -> (B, O, *m): a convolution of one tap that pads nothing."""
    steps: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
    out = weight.reshape(-1, *(1,) * len(stride)) * (one[steps] if max(stride) > 1 else one)
    return out if bias is None else out + bias.reshape(-1, *(1,) * len(stride))


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
