"""A random sum over the output channels, with which two operators are compared without running either in full.

For random numbers u, Σ_o u[o]·(W ⊛ x)[o] = (Σ_o u[o]·W[o]) ⊛ x, and two maps that differ in one channel differ in this
sum but for a set of u of measure zero (Freivalds, "Fast probabilistic algorithms", 1979). So the folded operator, which
is known, is checked with one row a group; what it replaces is run as it is, in full.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SEED, OF_CHANNELS = 0x51, 0xC4A


@lru_cache(maxsize=256)
def signs(channels: int, seed: int = SEED) -> Tensor:
    """u: of both signs, none near zero."""
    generator = torch.Generator().manual_seed(seed + channels)
    sizes = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    return torch.where(torch.rand(channels, generator=generator) < 0.5, -sizes, sizes)


def channel_numbers(channels: int) -> Tensor:
    """What a map that is drawn for a certificate is made of: a number for each channel."""
    return signs(channels, OF_CHANNELS)


def rows_sketched(block: Tensor, start: int, channels: int, into: Tensor) -> None:
    """Adds u[o]·W[o] for the rows of a block to `into`, which has one row a group. W (O, I/g, *K) -> (g, I/g, *K)."""
    u = signs(channels)[start : start + len(block)].to(block.device)
    if len(into) == 1:
        into.view(-1).addmv_(block.flatten(1).t(), u)
        return
    rows = block * u.reshape(-1, *(1,) * (block.ndim - 1))
    if len(into) == channels:
        into[start : start + len(rows)] += rows
        return
    groups = torch.arange(start, start + len(rows), device=rows.device) // (channels // len(into))
    into.index_add_(0, groups, rows)


def sketched(value: Tensor, groups: int, axis: int, channels: int) -> Tensor:
    """u[o]·y[o] summed within each of `groups` groups of channels, which are on `axis` (negative)."""
    u = signs(channels).to(value.device).reshape(-1, *(1,) * (-axis - 1))
    return gathered(value * u, groups, axis)


def gathered(value: Tensor, groups: int, axis: int) -> Tensor:
    """Sums within each of `groups` equal runs along `axis` (negative)."""
    if value.shape[axis] == groups:
        return value
    if groups == 1:
        return value.sum(axis, keepdim=True)
    return value.unflatten(axis, (groups, -1)).sum(axis)
