"""Channels that are stacked, cut and permuted: rows of one convolution, or columns of the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reader_cases import TOLERANCE, Case, Net, bn, check, conv, image, linear, over, sequence, tokens
from torch import Tensor, nn

import fxrep


def wide(taps: int = 3, **options: Any) -> nn.Module:
    """From 4 to 8 channels."""
    return conv(taps, out=8, **options)


def parts() -> dict[str, Any]:
    return {
        "wide": wide(), "a": conv(), "b": conv(1), "c": conv(), "bn": bn(), "bn8": bn(8), "point": conv(1, 8, 4),
        "relu": nn.ReLU(),
        "order": torch.tensor([2, 0, 3, 1]), "shuffle": nn.ChannelShuffle(2), "twice": torch.tensor([1, 1, 0, 3, 2]),
    }  # fmt: skip


def pooled(x: Tensor) -> Tensor:
    """To 6×6 pixels, a size that is known."""
    return nn.functional.adaptive_avg_pool2d(x, 6)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def shuffle_unit(m: Any, x: Tensor) -> Tensor:
    """ShuffleNetV2's: half of the channels go through, then all are shuffled."""
    left, right = m.wide(x).chunk(2, dim=1)
    out = torch.cat((left, m.bn(m.a(right))), dim=1)
    return m.point(m.relu(shuffled(out, 2)))


def unpacked(m: Any, x: Tensor) -> Tensor:
    first, second = m.wide(x).chunk(2, dim=1)
    return m.bn(first) + second


BODIES = {
    "cat": (lambda m, x: torch.cat([m.a(x), m.c(x)], 1), "c1"),
    "cat and bn": (lambda m, x: m.bn8(torch.cat([m.a(x), m.c(x)], dim=1)), "c1 b0"),
    "cat of two sizes and bn": (lambda m, x: m.bn8(torch.cat([m.a(x), m.b(x)], dim=1)), "c2 b0"),
    "concat": (lambda m, x: m.bn8(torch.concat((m.a(x), m.c(x)), -3)), "c1 b0"),
    "concatenate": (lambda m, x: m.bn8(torch.concatenate(tensors=[m.a(x), x], dim=1)), "c1"),
    "cat of activations": (lambda m, x: m.bn8(torch.cat([m.a(x).relu(), m.b(x).tanh()], 1)), "c2"),
    "channel_shuffle": (lambda m, x: m.point(torch.channel_shuffle(m.bn8(m.wide(x)), 2)), "c2 b0"),
    "conv over cat": (lambda m, x: m.point(torch.cat([m.b(x), m.bn(x)], 1)), "c1 b0"),
    "conv over cat with identity": (lambda m, x: m.point(torch.cat([m.a(x), x], 1)) + x, "c1 a0"),
    "conv over cat of activations": (lambda m, x: m.point(m.bn8(torch.cat([m.a(x).relu(), x.tanh()], 1))), "c2 b0"),
    "cat of one": (lambda m, x: m.bn(torch.cat([m.a(x)], 1)), "c1 b0"),
    "cat of rows": (lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 2)), "c2"),
    "cat of batches": (lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 0)), "c2"),
    "slices": (lambda m, x: (y := m.wide(x))[:, :4] + y[:, 4:], "c1 a0"),
    "slices with dots": (lambda m, x: (y := m.wide(x))[..., 0:4, :, :] - y[..., -4:, :, :], "c1 a0"),
    "strided slices": (lambda m, x: m.bn((y := m.wide(x))[:, ::2] + y[:, 1::2]), "c1 b0 a0"),
    "slice of a norm": (lambda m, x: m.a(y := m.bn(x)) + torch.cat([y[:, 2:], y[:, :2]], 1), "c1"),
    "slice of rows": (lambda m, x: m.bn(m.a(x)[:, :, 1:-1]), "c1"),
    "pooled and sliced in rows": (lambda m, x: m.bn(pooled(m.a(x))[:, :, 1:5]), "c1"),
    "pooled and swapped in rows": (lambda m, x: torch.cat([(y := pooled(m.a(x)))[:, :, 2:], y[:, :, :2]], 2), "c1"),
    "index of a channel": (lambda m, x: m.a(x)[:, 1] + m.b(x)[:, 2], "c2"),
    "split by size": (lambda m, x: (p := m.wide(x).split(4, 1))[0] + p[1] * 2, "c1 a0 m0"),
    "iterated": (lambda m, x: sum(m.bn(p) for p in m.wide(x).split(4, 1)), ""),
    "listed": (lambda m, x: torch.cat([*(p := list(m.bn(m.a(x)).chunk(2, 1))), p[0].relu()], 1), ""),
    "split by a size that leaves a rest": (lambda m, x: (p := torch.split(m.wide(x), 3, dim=1))[0] + p[1], "c1 a0"),
    "split by sizes": (lambda m, x: (
        (p := torch.split(m.wide(x), [1, 3, 4], dim=1))[2] + m.bn(torch.cat([p[1], p[0]], 1))
    ), "c1 b0 a0"),
    "split by keyword": (lambda m, x: (
        (p := torch.split(tensor=m.wide(x), split_size_or_sections=4, dim=1))[0] - p[1]
    ), "c1 a0"),
    "method split by keyword": (lambda m, x: (p := m.wide(x).split(split_size=(4, 4), dim=1))[0] - p[-1], "c1 a0"),
    "chunk": (lambda m, x: (p := torch.chunk(m.wide(x), 2, dim=1))[0] * 2 + p[1], "c1 a0 m0"),
    "chunk that leaves a rest": (lambda m, x: (p := m.wide(x).chunk(3, 1))[0] - p[1], "c1 a0"),
    "chunk of rows": (lambda m, x: (p := pooled(m.a(x)).chunk(2, 2))[0] - p[1], ""),
    "tensor_split": (lambda m, x: (p := m.wide(x).tensor_split(2, dim=1))[0] - p[1], ""),
    "unpacked": (unpacked, "c1 b0 a0"),
    "narrow": (lambda m, x: m.wide(x).narrow(1, 0, 4) + torch.narrow(m.wide(x), dim=1, start=-4, length=4), "c1 a0"),
    "index_select": (lambda m, x: m.bn(m.a(x).index_select(1, m.order)), "c1 b0"),
    "torch.index_select": (lambda m, x: torch.index_select(m.bn(m.a(x)), dim=1, index=m.twice), "c1 b0"),
    "index_select of a norm": (lambda m, x: torch.index_select(y := m.bn(x), 1, m.order) + m.b(y), "c1 b0 a0"),
    "index by a tensor": (lambda m, x: m.bn(m.a(x)[:, m.order]), "c1 b0"),
    "index by a tensor, from the end": (lambda m, x: m.bn(m.a(x)[..., m.order - 4, :, :]), "c1 b0"),
    "shuffle module": (lambda m, x: m.shuffle(m.bn(m.a(x))), "c1 b0"),
    "shuffle by views": (lambda m, x: shuffled(m.bn8(m.wide(x)), 4), "c1 b0"),
    "shuffle by views of a sum": (lambda m, x: m.point(shuffled(m.wide(x), 2)) + shuffled(x, 2), ""),
    "shuffle unit": (shuffle_unit, "c3 b0"),
    "flip": (lambda m, x: m.bn(m.a(x).flip(1)), "c1"),
    "slice whose axes a layer tells": (lambda m, x: 2 * torch.stack([x, m.a(x)]).sum(0).narrow(1, 2, 1), "c1 a0 m0"),
    "cat of a shared part": (lambda m, x: m.bn8(torch.cat([y := m.a(x), y], 1)), "c1"),
    "cat, split, cat": (lambda m, x: torch.cat(torch.cat([m.a(x), m.c(x)], 1).split([3, 5], 1)[::-1], 1), "c1"),
}  # fmt: skip


def joined(m: Any, x: Tensor) -> Tensor:
    """Of what size an interpolation is, its concatenation tells: the sum of the two layers does not broadcast."""
    y = F.interpolate(x.tanh(), scale_factor=1.0)
    return torch.cat([x, y, m.bn(m.a(x) + m.b(y))], 1)


def dense(m: Any, x: Tensor) -> Tensor:
    """DenseNet's: every layer reads the concatenation of all before it."""
    y = [x]
    for norm, layer in zip(m.norms, m.layers, strict=True):
        y.append(layer(norm(torch.cat(y, 1)).relu()))
    return torch.cat(y, 1)


def dense_parts() -> dict[str, nn.Module]:
    widths = (4, 6, 8)
    return {
        "norms": nn.ModuleList(bn(w) for w in widths),
        "layers": nn.ModuleList(nn.Sequential(conv(1, w, 4, bias=False), bn(), conv(3, 4, 2)) for w in widths),
    }


def ghost(m: Any, x: Tensor) -> Tensor:
    """GhostNet's: cheap channels beside the primary ones."""
    y = m.bn(m.b(x)).relu()
    return torch.cat([y, m.cheap_bn(m.cheap(y)).relu()], 1)[:, :6]


def branches_over_cat(m: Any, x: Tensor) -> Tensor:
    """GhostNetV3's strided middle: depthwise branches over a concatenation, that would be twice as many over its parts
    and yet fewer than the branches."""
    x = torch.cat([m.a(x).relu(), m.b(x).relu()], 1)
    x = m.middle[0](x) + m.middle[1](x) + m.middle[2](x)
    return m.point[0](x) + m.point[1](x)


def middle() -> nn.ModuleList:
    layers = (
        conv(3, 16, 16, groups=16, stride=2),
        conv(3, 16, 16, groups=16, stride=2),
        conv(1, 16, 16, groups=16, stride=2),
    )
    return nn.ModuleList(nn.Sequential(layer, bn(16)) for layer in layers)


CASES = [
    Case("sizes that a concatenation tells", lambda: Net(joined, a=conv(), b=conv(1, 4, 4), bn=bn()), "c2 b0"),
    Case("branches over cat", lambda: Net(
        branches_over_cat, a=conv(out=8), b=conv(1, out=8), middle=middle(),
        point=nn.ModuleList([conv(1, 16, 6), conv(1, 16, 6)]),
    ), "c4 a0 b0"),
    *(Case(name, lambda f=f: Net(f, **parts()), left) for name, (f, left) in BODIES.items()),
    Case("dense", lambda: Net(dense, **dense_parts()), "c6 b3"),
    Case("ghost", lambda: Net(ghost, b=conv(1), bn=bn(), cheap=conv(3, groups=4), cheap_bn=bn()), "c2 b0"),
    Case("grouped rows", lambda: Net(
        lambda m, x: (y := m.grouped(x))[:, 4:] + m.bn(y[:, :4]), grouped=wide(groups=2), bn=bn()
    ), ""),
    Case("whole groups", lambda: Net(
        lambda m, x: m.bn(m.grouped(x)[:, 2:6]), grouped=wide(groups=4), bn=bn()
    ), "c1 b0"),
    Case("depthwise halves", lambda: Net(
        lambda m, x: torch.cat([m.a((y := m.start(x).relu())[:, :2]), m.b(y[:, 2:])], 1),
        a=conv(3, 2, 2, groups=2), b=conv(3, 2, 2, groups=2), start=conv(),
    ), "c2", bare=False),
    Case("partial convolution", lambda: Net(
        lambda m, x: torch.cat([m.part((p := torch.split(m.a(x).relu(), [1, 3], 1))[0]), p[1]], 1),
        a=conv(), part=conv(3, 1, 1),
    ), "c2"),
    Case("1d", lambda: Net(
        lambda m, x: m.bn(torch.cat([(p := m.a(x).chunk(2, 1))[1], p[0]], 1) + x), a=conv(dims=1), bn=bn(dims=1)
    ), "c1 b0 a0", image(dims=1)),
    Case("3d", lambda: Net(
        lambda m, x: m.bn(torch.cat([m.a(x), m.a(x)[:, :1]], 1)), a=conv(1, dims=3), bn=bn(5, dims=3)
    ), "c1 b0", image(dims=3)),
    Case("queries, keys and values", lambda: Net(
        lambda m, x: m.out((p := m.qkv(x).chunk(3, dim=-1))[0] - p[1] + p[2]), qkv=linear(4, 12), out=linear()
    ), "l1 a0", tokens()),
    Case("linear over cat", lambda: Net(
        lambda m, x: m.out(torch.cat([m.a(x), x], dim=-1)), a=linear(4, 3), out=linear(7, 5)
    ), "l1", tokens()),
    Case("shuffled twice", sequence(conv(1), nn.ChannelShuffle(2), bn(), nn.ChannelShuffle(2), conv(1)), "c1 b0"),
]  # fmt: skip


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


def test_a_concatenation_is_rows_on_rows() -> None:
    case = Case("rows", lambda: Net(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(3), b=conv(3)))
    network = case.network()
    (layer,) = (m for m in fxrep.reparameterize(network).modules() if isinstance(m, nn.Conv2d))
    assert relative_error(layer.weight, torch.cat([network.a.weight, network.b.weight])) <= TOLERANCE
    assert relative_error(layer.bias, torch.cat([network.a.bias, network.b.bias])) <= TOLERANCE


@pytest.mark.parametrize("groups", [2, 4])
def test_a_shuffle_permutes_the_rows(groups: int) -> None:
    """Channel c of group g becomes channel c·groups + g."""
    case = Case("shuffle", sequence(conv(3, out=8, bias=False), nn.ChannelShuffle(groups), bn(8)))
    network = case.network()
    (layer,) = (m for m in fxrep.reparameterize(network).modules() if isinstance(m, nn.Conv2d))
    order = [g * (8 // groups) + c for c in range(8 // groups) for g in range(groups)]
    norm = network[2]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    assert relative_error(layer.weight, network[0].weight[order] * gain) <= TOLERANCE
