"""The modules that training-time branches are made of; each is one that fxrep's readers see through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrep.fold import CONVOLVE

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Branches(nn.ModuleDict):
    """norm(Σ branch(x)), over the branches in order; `norm` may be the identity."""

    def __init__(self, branches: Mapping[str, nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__(branches)
        self.summed = tuple(branches)
        if norm is not None:
            self["norm"] = norm

    def forward(self, x: Tensor) -> Tensor:
        total = self[self.summed[0]](x)
        for name in self.summed[1:]:
            total = total + self[name](x)
        return self["norm"](total) if "norm" in self else total


class ChannelAffine(nn.Module):
    """γ·x + β per channel (β optional), on maps with `dims` spatial axes; constant unless it `trains`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dims: int, trains: bool = True) -> None:
        super().__init__()
        self.shape = (-1, *(1,) * dims)
        for name, value in (("weight", weight), ("bias", bias)):
            if trains:
                self.register_parameter(name, None if value is None else nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight.reshape(self.shape)
        return y if self.bias is None else y + self.bias.reshape(self.shape)


class ChannelShift(nn.Module):
    """x + β per channel."""

    bias: Tensor

    def __init__(self, bias: Tensor, dims: int) -> None:
        super().__init__()
        self.shape = (-1, *(1,) * dims)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.reshape(self.shape)


class FixedKernel(nn.Module):
    """A depthwise kernel that nothing trains. Shapes: kernel (*taps) -> weight (C, 1, *taps)."""

    weight: Tensor

    def __init__(self, kernel: Tensor, channels: int, stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("weight", kernel.expand(channels, 1, *kernel.shape).clone())
        self.stride, self.dilation = tuple(stride), tuple(dilation)

    def forward(self, x: Tensor) -> Tensor:
        convolve: Any = CONVOLVE[self.weight.ndim - 2]
        y: Tensor = convolve(x, self.weight, None, self.stride, 0, self.dilation, self.weight.shape[0])
        return y


class NormThenPad(nn.Module):
    """Batch norm, then a border of what it makes of zero, so that a convolution after it may be merged with it.

    (Ding et al., arXiv 2103.13425, section 3.3.) Statistics are those of the map without its border.
    """

    def __init__(self, norm: nn.Module, pads: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.pads = norm, list(pads)

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        zero = torch.zeros_like(norm.weight).unsqueeze(0)
        outside = F.batch_norm(zero, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        outside = outside.reshape(-1, *(1,) * (len(self.pads) // 2))
        return F.pad(norm(x) - outside, self.pads) + outside


def batch_norm(channels: int, dims: int, like: Tensor) -> nn.Module:
    return NORMS[dims](channels, device=like.device, dtype=like.dtype)
