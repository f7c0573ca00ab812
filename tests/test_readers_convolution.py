"""Convolutions, linear layers and pads: branches that add up to one, sequences that compose to one, what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import error_against_original, relative_error
from reader_cases import (
    TOLERANCE,
    Case,
    Net,
    bn,
    branches,
    check,
    conv,
    executed,
    image,
    linear,
    over,
    rows,
    sequence,
    tokens,
    weight,
)  # fmt: skip
from torch import Tensor, nn

import fxrep

TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
F_CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
F_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DIMS = (1, 2, 3)


def rep_block(dims: int) -> nn.Module:
    """RepVGG's: k×k, 1×1 and identity, each with its batch norm, and the plain identity besides."""
    parts = {f"conv{k}": conv(k, dims=dims, bias=False) for k in (1, 3, 5)}
    norms = {f"bn{k}": bn(dims=dims) for k in (0, 1, 3, 5)}
    return Net(lambda m, x: m.bn5(m.conv5(x)) + m.bn3(m.conv3(x)) + m.bn1(m.conv1(x)) + m.bn0(x) + x, **parts, **norms)


def valid(taps: Any, **options: Any) -> nn.Module:
    return conv(taps, padding=0, **options)


def dilated(taps: int, dilation: int, **options: Any) -> nn.Module:
    return conv(taps, dilation=dilation, padding=dilation * (taps // 2), **options)


SUMS = [
    *(Case(f"rep block {d}d", lambda d=d: rep_block(d), "c1 b0 a0", image(dims=d), bare=d != 1) for d in DIMS),
    Case("sizes 1 3 5 7", branches(conv(1), conv(3), conv(5), conv(7), identity=True), "c1 a0"),
    Case("three biased", branches(conv(3), conv(3), conv(3)), "c1 a0"),
    Case("unpadded", branches(valid(3), valid(3)), "c1 a0"),
    Case("asymmetric shapes", branches(conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0)), conv(3)), "c1 a0"),
    Case("1x3 and 3x1", branches(conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0))), "c2"),
    Case("3x5 and 5x3", branches(conv((3, 5), padding=(1, 2)), conv((5, 3), padding=(2, 1))), "c1 a0"),
    Case("even same", branches(conv(2, padding="same"), conv(4, padding="same"), identity=True), "c1 a0"),
    Case("even same and odd", branches(conv(4, padding="same"), conv(3), conv(1)), "c1 a0"),
    Case("same dilated", branches(conv(2, padding="same", dilation=3), conv(3, padding="same", dilation=2)), "c2"),
    Case("same in a same", branches(conv(2, padding="same", dilation=3), conv(4, padding="same")), "c1 a0"),
    Case("valid", branches(conv(3, padding="valid"), valid(3)), "c1 a0"),
    Case("dilations 1 2", branches(conv(3), dilated(3, 2)), "c2"),
    Case("dilations 1 2 beside 5", branches(conv(3), dilated(3, 2), conv(5)), "c1 a0"),
    Case("dilations 2 3", branches(dilated(3, 2), dilated(3, 3), conv(7)), "c1 a0", bare=False),
    Case("dilations 2 4", branches(dilated(5, 2), dilated(3, 4), identity=True), "c1 a0"),
    Case("dilated depthwise", branches(conv(7, groups=4), dilated(3, 3, groups=4), dilated(5, 1, groups=4)), "c1 a0"),
    Case("groups 1 2 4", branches(conv(3), conv(3, groups=2), conv(3, groups=4)), "c1 a0"),
    Case("groups 4 6", branches(conv(3, 12, 12, groups=4), conv(3, 12, 12, groups=6)), "c2", image(12)),
    Case("groups 4 6 2", branches(*(conv(3, 12, 12, groups=g) for g in (4, 6, 2))), "c1 a0", image(12)),
    Case("strided", branches(conv(3, stride=2), conv(1, stride=2), conv(5, stride=2)), "c1 a0"),
    Case("strides (1, 2)", branches(conv(3, stride=(1, 2)), conv(1, stride=(1, 2))), "c1 a0"),
    Case("widening", branches(conv(3, out=7), conv(1, out=7)), "c1 a0"),
    Case("reflect and 1x1", branches(conv(3, padding_mode="reflect"), conv(1), identity=True), "c1 a0"),
    Case("circular twice", branches(conv(3, padding_mode="circular"), conv(3, padding_mode="circular")), "c1 a0"),
    Case("reflect and zeros", branches(conv(3, padding_mode="reflect"), conv(3)), "c2"),
    Case("1x1 and reflect", branches(conv(1), conv(3, padding_mode="reflect")), "c1 a0"),
]  # fmt: skip
SEQUENCES = [
    Case("1x1 to 3x3", sequence(conv(1), valid(3)), "c1"),
    Case("unbiased 1x1 to padded 3x3", sequence(conv(1, bias=False), conv(3)), "c1"),
    Case("biased 1x1 to padded 3x3", sequence(conv(1), conv(3)), "c2", refused="pads-over-bias"),
    Case("3x3 to 1x1", sequence(conv(3), conv(1)), "c1"),
    Case("strided 3x3 to 1x1", sequence(conv(3, stride=2), conv(1)), "c1"),
    Case("strided 1x1 to 3x3", sequence(conv(1, stride=2, bias=False), conv(3)), "c1"),
    Case("3x3 to strided 1x1", sequence(conv(3), conv(1, stride=2)), "c1"),
    Case("1x1 to 3x3 to 1x1", sequence(conv(1), valid(3), conv(1)), "c1"),
    Case("depthwise to 1x1 to depthwise", sequence(conv(3, groups=4), conv(1, groups=2), conv(1, groups=4)), "c2"),
    Case("1x3 to 3x1 unpadded", sequence(conv((1, 3)), conv((3, 1))), "c2"),
    Case("wide 1x3 to 3x1", sequence(conv((1, 3), out=8), conv((3, 1), 8)), "c1"),
    Case("1x3 to padded 3x1", sequence(conv((1, 3), padding=(0, 1), bias=False), conv((3, 1), padding=(1, 0))), ""),
    Case("3x3 to 3x3 strided", sequence(conv(3, stride=2), valid(3, dilation=2)), ""),
    Case("3x3 to padded 3x3", sequence(conv(3), conv(3)), "c2"),
    Case("even same to 1x1", sequence(conv(4, padding="same"), conv(1)), "c1"),
    Case("branches in sequence", lambda: nn.Sequential(rep_block(2), conv(1), rep_block(2)), "c2 b0 a0"),
    Case("1d", sequence(conv(1, dims=1), valid(3, dims=1)), "c1", image(dims=1)),
    Case("3d", sequence(conv(3, dims=3), conv(1, dims=3)), "c1", image(dims=3)),
    Case("biased 1x1 to reflect 3x3", sequence(conv(1), conv(3, padding_mode="reflect")), "c1"),
    Case("biased 1x1 to replicate 3x3", sequence(conv(1), conv(3, padding_mode="replicate")), "c1"),
    Case("biased 1x1 to circular 3x3", sequence(conv(1), conv(3, padding_mode="circular")), "c1"),
    Case("reflect 3x3 to 1x1", sequence(conv(3, padding_mode="reflect"), conv(1)), "c1"),
    Case("strided 1x1 to reflect 3x3", sequence(conv(1, stride=2, bias=False), conv(3, padding_mode="reflect")), "c2"),
]  # fmt: skip
PADS = [
    Case("zero pad 1d", sequence(nn.ZeroPad1d(1), valid(3, dims=1)), "c1 z0", image(dims=1)),
    Case("zero pad 2d", sequence(nn.ZeroPad2d((1, 2, 0, 3)), valid(3), bn()), "c1 b0"),
    Case("zero pad 3d", sequence(nn.ZeroPad3d(1), valid(3, dims=3)), "c1 z0", image(dims=3)),
    Case("constant pad 1d", sequence(nn.ConstantPad1d(1, 0.5), valid(3, dims=1)), "c1", image(dims=1)),
    Case("constant pad 2d", sequence(nn.ConstantPad2d((2, 1, 0, 1), -0.5), conv(3), conv(1)), "c2"),
    Case("constant pad 3d", sequence(nn.ConstantPad3d(1, 0.5), valid(3, dims=3), conv(1, dims=3)), "c1", image(dims=3)),
    *(
        Case(f"{kind} pad {d}d", sequence(getattr(nn, f"{kind}Pad{d}d")(1), valid(3, dims=d)), "c1", image(dims=d))
        for kind in ("Reflection", "Replication", "Circular") for d in DIMS
    ),
    Case("pad, pad, crop, pad", sequence(
        *(nn.ZeroPad2d(p) for p in (1, (1, 0, 2, 1), (0, -1, -1, 0), (0, 1, 0, 1))), valid(3), bn()
    ), "c1 b0 z1"),
    Case("pad and conv", lambda: Net(
        lambda m, x: m.valid(F.pad(x, (1, 1, 1, 1))) + m.conv(x), valid=valid(3), conv=conv(1)
    ), "c1 a0 z0"),
    *(
        Case(f"{m} pad and conv", lambda m=m: Net(
            lambda n, x: n.valid(F.pad(x, (1, 1, 1, 1), mode=n.mode)) + n.conv(x), valid=valid(3), conv=conv(1), mode=m
        ), "c1 a0 z1") for m in ("reflect", "replicate", "circular")
    ),
    Case("crop", sequence(nn.ZeroPad2d(-1), conv(3)), "c1"),
    Case("crop after", sequence(conv(3), nn.ZeroPad2d((-1, 0, -1, 0)), bn()), "c1 b0"),
    Case("pad after bias", sequence(conv(1), nn.ZeroPad2d(1), valid(3)), "c2"),
    Case("pad after no bias", sequence(conv(1, bias=False), nn.ZeroPad2d(1), valid(3)), "c1"),
    *(
        Case(f"F.pad {mode}", lambda mode=mode: Net(
            lambda m, x: m.bn(m.conv(F.pad(input=x, pad=(1, 1, 1, 1), mode=mode))), conv=valid(3), bn=bn()
        ), "c1 b0") for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Case("F.pad value", lambda: Net(
        lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=0.5)) + m.other(x), conv=valid(3), other=conv(3)
    ), "c2"),
    Case("F.pad of channels", lambda: Net(lambda m, x: m.conv(F.pad(x, (0, 0, 0, 0, 1, 2))), conv=conv(3, 7)), "c1"),
    Case("pads of another size", lambda: Net(
        lambda m, x: m.conv(F.pad(x, (0, x.shape[-1] % 2, 0, x.size(2) % 2))), conv=valid(2, stride=2)
    ), "c1"),
]  # fmt: skip


def standardised(m: Any) -> Tensor:
    w = m.w
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)


COMPUTED = {
    "weight + eye": lambda m: m.w + m.eye[:, :, None, None],
    "weight standardisation": standardised,
    "gamma / sigma": lambda m: m.w * (m.gamma / (m.var + 1e-5).sqrt()).reshape(-1, 1, 1, 1),
    "weight norm by hand": lambda m: m.gamma.view(-1, 1, 1, 1) * m.w / m.w.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
    "F.normalize": lambda m: F.normalize(m.w.flatten(1), dim=1).view_as(m.w),
    "padded weight": lambda m: m.w + F.pad(m.eye[:, :, None, None], (1, 1, 1, 1)),
    "two weights": lambda m: torch.stack([m.w, m.w.flip(2)]).sum(0),
    "concatenated": lambda m: torch.cat([m.w[:2], m.w[2:] * 2], dim=0),
}


def with_computed(compute: Callable[[Any], Tensor]) -> nn.Module:
    parts = {
        "w": weight(4, 4, 3, 3),
        "gamma": weight(4),
        "var": torch.rand(4) + 0.5,
        "eye": torch.eye(4),
        "bn": bn(),
    }

    def body(m: Any, x: Tensor) -> Tensor:
        w = compute(m)
        return m.bn(F.conv2d(x, w, m.gamma * 2, padding=w.shape[-1] // 2)) + m.bn(x)

    return Net(body, **parts)


def functional(dims: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a = F_CONVS[dims](x, m.w, padding="same")
        b = F_CONVS[dims](input=x, weight=m.grouped, bias=m.b, stride=1, padding=2, dilation=2, groups=2)
        return a + b + F_CONVS[dims](x, m.point, m.b)

    k = (3,) * dims
    return Net(
        body, w=weight(4, 4, *(5,) * dims), grouped=weight(4, 2, *k), point=weight(4, 4, *(1,) * dims), b=weight(4)
    )


FUNCTIONALS = [
    *(Case(f"functional {d}d", lambda d=d: functional(d), "c1 a0", image(dims=d), bare=False) for d in DIMS),
    *(Case(name, lambda f=f: with_computed(f), "c1 b0 a0") for name, f in COMPUTED.items()),
    Case("weight of the input", lambda: Net(
        lambda m, x: m.bn(F.conv2d(x, m.w * x.mean())), w=weight(4, 4, 3, 3), bn=bn()
    ), "c1"),
    Case("weight norm", sequence(torch.nn.utils.parametrizations.weight_norm(conv(3)), bn()), "c1 b0"),
    Case("spectral norm", sequence(torch.nn.utils.parametrizations.spectral_norm(conv(3)), bn()), "c1 b0"),
]  # fmt: skip


def transposed_functional(dims: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a = F_TRANSPOSED[dims](x, m.w, None, 2, 1)
        return a + F_TRANSPOSED[dims](
            x, weight=m.small, bias=m.b, stride=2, padding=0, output_padding=0, groups=2, dilation=1
        )

    return Net(body, w=weight(4, 4, *(4,) * dims), small=weight(4, 2, *(2,) * dims), b=weight(4))


def up(taps: int = 4, dims: int = 2, **options: Any) -> nn.Module:
    return TRANSPOSED[dims](4, 4, taps, **{"stride": 2, "padding": 1, **options})


UPS = [
    *(
        Case(f"transposed and bn {d}d", sequence(up(dims=d), bn(dims=d)), "c1 b0", image(dims=d))
        for d in DIMS
    ),
    *(Case(f"transposed functional {d}d", lambda d=d: transposed_functional(d), "c1 a0", image(dims=d)) for d in DIMS),
    Case("output padding", sequence(up(3, output_padding=1), bn()), "c1 b0"),
    Case("transposed groups", sequence(up(3, groups=2), bn()), "c1 b0"),
    Case("transposed to 1x1", sequence(up(), conv(1)), "c1"),
    Case("1x1 to transposed", sequence(conv(1, bias=False), up()), "c1"),
    Case("biased 1x1 to transposed", sequence(conv(1), up()), "c2"),
    Case("bn to transposed", sequence(bn(), up(dilation=2)), ""),
    Case("transposed sum", branches(up(4), up(2, padding=0), up(6, padding=2)), "c1 a0"),
    Case("transposed and plain", branches(up(3, stride=1), conv(3)), ""),
    Case("transposed to 3x3", sequence(up(), valid(3)), "c2"),
    Case("strided to transposed", sequence(valid(2, stride=2), up()), "c2"),
    Case("output size", lambda: Net(
        lambda m, x: m.bn(m.up(x, output_size=[31, 31])), up=up(3), bn=bn()
    ), "c1", ((1, 4, 16, 16), (3, 4, 16, 16))),
]  # fmt: skip


PRODUCTS: dict[str, Any] = {
    "addmm": lambda m, x: torch.addmm(m.b, m.first(x), m.w),
    "mm": lambda m, x: torch.mm(m.first(x), m.w),
    "matmul": lambda m, x: torch.matmul(m.first(x), m.w),
    "matmul as a method": lambda m, x: m.first(x).matmul(m.w),
    "@": lambda m, x: m.first(x) @ m.w,
}
LINEARS = [
    Case("sequence of linears", sequence(linear(4, 7), linear(7, 4), linear(bias=False)), "l1", rows()),
    *(
        Case(f"linear and {name}", lambda f=f: Net(f, first=linear(4, 7), w=weight(7, 4), b=weight(4)), "l1", rows())
        for name, f in PRODUCTS.items()
    ),
    Case("sequence of linears on tokens", sequence(linear(4, 7), linear(7, 4)), "l1", tokens()),
    Case("branches of linears", branches(linear(), linear(bias=False), identity=True), "l1 a0", tokens()),
    Case("functional linear", lambda: Net(
        lambda m, x: F.linear(input=x, weight=m.w, bias=m.b) + F.linear(x, m.w.t() + m.eye) - x,
        w=weight(4, 4), b=weight(4), eye=torch.eye(4),
    ), "l1 a0", tokens()),
    Case("linear between activations", sequence(linear(), nn.GELU(), linear(), linear()), "l2", tokens()),
    Case("linear on a 4-d value", sequence(linear(13, 15), linear(15, 13)), "l1", ((1, 4, 9, 13), (3, 4, 11, 13))),
]  # fmt: skip


class Inheriting(nn.Conv2d):
    """A subclass with the forward of its base."""


class Overriding(nn.Conv2d):
    """A subclass that does more than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 + 1


class Standardising(nn.Conv2d):
    """Weight standardisation, as timm and BiT spell it."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


KINDS_OF_CONV = [
    Case("inheriting", sequence(Inheriting(4, 4, 3), bn()), "c1 b0"),
    Case("overriding", sequence(Overriding(4, 4, 3), bn()), "c1 b0"),
    Case("standardising", sequence(Standardising(4, 4, 3, padding=1), bn()), "c1 b0"),
]
CASES = [*SUMS, *SEQUENCES, *PADS, *FUNCTIONALS, *UPS, *LINEARS, *KINDS_OF_CONV]


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


def test_even_kernels_give_one_asymmetric_window() -> None:
    """2×2 and 4×4 with padding="same": 4 taps, padded by 1 before and 2 after, as torch pads them."""
    case = Case("even", branches(conv(2, padding="same"), conv(4, padding="same")))
    network = case.network()
    small, large = network.layers
    wanted = large.weight + F.pad(small.weight, (1, 1, 1, 1))
    (layer,) = (m for m in fxrep.reparameterize(network).modules() if isinstance(m, nn.Conv2d))
    assert relative_error(layer.weight, wanted) <= TOLERANCE
    assert layer.padding == "same"


def test_sums_of_depthwise_branches_stay_depthwise() -> None:
    case = Case("depthwise", branches(conv(5, groups=4), conv(3, groups=4), dilated(3, 2, groups=4), identity=True))
    (layer,) = (m for m in check(case).modules() if isinstance(m, nn.Conv2d))
    assert (layer.groups, layer.kernel_size, layer.dilation) == (4, (5, 5), (1, 1))


def test_dilations_with_a_common_factor_keep_it() -> None:
    case = Case("dilated", branches(dilated(3, 2), dilated(5, 2)))
    (layer,) = (m for m in check(case).modules() if isinstance(m, nn.Conv2d))
    assert (layer.kernel_size, layer.dilation) == ((5, 5), (2, 2))


def test_zero_padding_over_a_bias_is_refused_and_the_refusal_is_needed() -> None:
    """The naive 1×1→3×3 fold is right inside, and wrong by the bias on the border."""
    inner, outer = conv(1).double(), conv(3).double()
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        folded = torch.einsum("octu,ci->oitu", outer.weight, inner.weight[:, :, 0, 0])
        bias = outer.bias + torch.einsum("octu,c->o", outer.weight, inner.bias)
        error = (F.conv2d(x, folded, bias, padding=1) - outer(inner(x))).abs()
    assert error[:, :, 1:-1, 1:-1].max() < 1e-12
    assert error[:, :, 0].min() > 0
    assert executed(fxrep.reparameterize(nn.Sequential(inner, outer)), x)["c"] == 2


@pytest.mark.parametrize(
    "case", [c for c in SUMS if c.left.startswith("c1") and "b0" not in c.left], ids=lambda c: c.name
)
def test_unbatched_and_empty_batches_are_taken_as_before(case: Case) -> None:
    network = case.network()
    collapsed = fxrep.reparameterize(network)
    (_, x) = case.inputs()
    assert error_against_original(collapsed, network, x[0]) <= TOLERANCE
    assert collapsed(x[:0]).shape == network(x[:0]).shape
