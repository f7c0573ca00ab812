"""Batch norms in every place where they fold: after and before layers, alone on a branch, on images and on rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import error_against_original, relative_error
from reader_cases import (
    CONVS,
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

DIMS = (1, 2, 3)


def per_dims(name: str, build: Any, left: str, **options: Any) -> list[Case]:
    return [Case(f"{name} {d}d", lambda d=d: build(d), left, image(dims=d), **options) for d in DIMS]


AFTER = [
    *per_dims("conv bn", lambda d: nn.Sequential(conv(3, dims=d), bn(dims=d)), "c1 b0"),
    *per_dims("conv without bias", lambda d: nn.Sequential(conv(3, dims=d, bias=False), bn(dims=d)), "c1 b0"),
    Case("grouped", sequence(conv(3, groups=2, out=6), bn(6)), "c1 b0"),
    Case("depthwise", sequence(conv(3, groups=4, out=8), bn(8)), "c1 b0"),
    Case("strided and dilated", sequence(conv(3, stride=2, dilation=2), bn()), "c1 b0"),
    *(Case(f"padded by {m}", sequence(conv(3, padding_mode=m), bn()), "c1 b0") for m in ("reflect", "circular")),
    Case("no affine", sequence(conv(), bn(affine=False)), "c1 b0"),
    Case("large eps", sequence(conv(), bn(eps=0.7)), "c1 b0"),
    Case("bn on bn", sequence(conv(), bn(), bn()), "c1 b0"),
    Case("conv bn conv bn", sequence(conv(), bn(), conv(1), bn()), "c1 b0"),
    Case("two norms of one conv", lambda: Net(
        lambda m, x: m.a(y := m.conv(x)) - m.b(y), conv=conv(), a=bn(), b=bn()
    ), "c1 b0 a0"),
    Case("conv read twice", lambda: Net(
        lambda m, x: m.a(y := m.conv(x)).relu() + m.b(y).relu(), conv=conv(), a=bn(), b=bn()
    ), "c1 b2", refused="shared"),
    Case("bn called twice", lambda: Net(
        lambda m, x: m.bn(m.b(m.bn(m.a(x)).relu())), a=conv(), b=conv(), bn=bn()
    ), "c2 b0"),
    Case("conv called twice", lambda: Net(
        lambda m, x: m.b(m.conv(m.a(m.conv(x)).relu())), conv=conv(), a=bn(), b=bn()
    ), "c2 b0"),
]  # fmt: skip
BEFORE = [
    *per_dims(
        "bn to unpadded conv", lambda d: nn.Sequential(bn(dims=d), conv(3, dims=d, padding=0)), "c1 b0", bare=False
    ),
    *per_dims("bn to 1x1", lambda d: nn.Sequential(bn(dims=d), conv(1, dims=d)), "c1 b0", bare=False),
    Case("bn to grouped", sequence(bn(8), conv(3, 8, 6, groups=2, padding=0)), "c1 b0", image(8)),
    Case("bn to padded conv", sequence(bn(), conv()), "c1", refused="pads-over-bias"),
    Case("bn to reflect conv", sequence(bn(), conv(padding_mode="reflect")), "c1 b0"),
    Case("pre-activation", sequence(bn(), nn.ReLU(), conv(padding=0), bn(), nn.ReLU(), conv(), bn()), "c2 b1"),
    Case("bn conv bn", sequence(bn(), conv(3, padding=0), bn()), "c1 b0"),
    Case("activation bn conv", sequence(conv(), nn.ReLU(), bn(), conv(1)), "c2 b0"),
]
ALONE = [
    Case("identity branch", branches(conv(), bn()), "c1 b0 a0"),
    Case("two norms of the input", branches(conv(1), bn(), bn(), identity=True), "c1 b0 a0"),
    Case("norms only", branches(bn(), bn()), "b0 a0 c0 m1"),
    Case("norm of a norm", sequence(bn(), bn()), "b0 c0 m1"),
    Case("norm and identity", branches(bn(), identity=True), "b0 c0 a0 m1"),
]
ROWS = [
    Case("linear bn", sequence(linear(), bn(dims=1)), "l1 b0", rows(), bare=False),
    Case("bn linear bn linear", sequence(
        bn(dims=1), linear(4, 7), bn(7, dims=1), linear(7, 5)
    ), "l1 b0", rows(), bare=False),
    Case("classifier", sequence(
        conv(), bn(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(), bn(dims=1), nn.ReLU(), bn(dims=1), linear()
    ), "c1 l2 b0"),
    Case("bn on the tokens' axis", sequence(linear(), bn(7, dims=1)), "l1", ((1, 7, 4), (3, 7, 4)), bare=False),
    Case("as many tokens as channels", sequence(
        linear(7, 7), bn(7, dims=1)
    ), "l1", ((1, 7, 7), (3, 7, 7)), bare=False),
    Case("linear transposed to bn", lambda: Net(
        lambda m, x: m.bn(m.linear(x).transpose(1, 2)).transpose(1, 2), linear=linear(), bn=bn(dims=1)
    ), "l1", tokens()),
    Case("linear on 4-d to bn of axis 1", sequence(linear(13, 9), bn()), "l1", ((1, 4, 9, 13), (3, 4, 11, 13))),
]  # fmt: skip


def functional(**options: Any) -> nn.Module:
    parts = {"mean": torch.randn(4), "var": torch.rand(4) + 0.5, "w": weight(4), "b": weight(4)}

    def body(m: Any, x: Tensor) -> Tensor:
        named = {k: getattr(m, v) if isinstance(v, str) else v for k, v in options.items()}
        return F.batch_norm(m.conv(x), m.mean, m.var, **named)

    return Net(body, conv=conv(), **parts)


class Inheriting(nn.BatchNorm2d):
    """A subclass with the forward of its base."""


class Activating(nn.BatchNorm2d):
    """timm's kind: asserts on the rank, then a functional batch norm, then an activation."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps)
        return x.relu()


class Shifted(nn.BatchNorm2d):
    """A subclass that gives something else, by its base's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 3


SPELLINGS = [
    Case("functional", lambda: functional(weight="w", bias="b", training=False, momentum=0.1, eps=1e-3), "c1 b0"),
    Case("functional defaults", functional, "c1 b0"),
    Case("functional weight alone", lambda: functional(weight="w"), "c1 b0"),
    Case("functional bias alone", lambda: functional(bias="b"), "c1 b0"),
    Case("functional in training", lambda: functional(training=True), "c1 b1", refused="batch-statistics"),
    Case("batch statistics", sequence(conv(), bn(track_running_stats=False)), "c1 b1", refused="batch-statistics"),
    Case("synchronised", sequence(conv(), nn.SyncBatchNorm(4)), "c1 b0"),
    Case("inheriting", sequence(conv(), Inheriting(4)), "c1 b0"),
    Case("activating", sequence(conv(), Activating(4), conv(), Activating(4)), "c2 b0"),
    Case("shifted", sequence(conv(), Shifted(4)), "c1"),
]
CASES = [*AFTER, *BEFORE, *ALONE, *ROWS, *SPELLINGS]


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dims", DIMS)
def test_the_convolutions_own_bias_goes_through(dims: int) -> None:
    """γ/σ·W and γ/σ·(b - μ) + β, by hand."""
    case = Case("bias", lambda: nn.Sequential(conv(3, dims=dims), bn(dims=dims)), shapes=image(dims=dims))
    network = case.network()
    before, norm = network
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    collapsed = fxrep.reparameterize(network, case.inputs()[0])
    (layer,) = (m for m in collapsed.modules() if isinstance(m, CONVS[dims]))
    assert relative_error(layer.weight, before.weight * gain.view(-1, 1, *(1,) * dims)) <= TOLERANCE
    assert relative_error(layer.bias, gain * (before.bias - norm.running_mean) + norm.bias) <= TOLERANCE


def test_a_norm_without_a_shift_goes_through_padding() -> None:
    network = Case("scale", sequence(bn(), conv())).network()
    network[0].running_mean.zero_()
    network[0].bias.data.zero_()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    collapsed = fxrep.reparameterize(network)
    assert error_against_original(collapsed, network, x) <= TOLERANCE
    assert executed(collapsed, x)["b"] == 0


def test_zero_padding_over_a_shift_is_refused_and_the_refusal_is_needed() -> None:
    norm, layer = Case("border", sequence(bn(), conv())).network().eval()
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * gain
    with torch.no_grad():
        bias = layer.bias + torch.einsum("oitu,i->o", layer.weight, shift)
        error = (F.conv2d(x, layer.weight * gain.view(1, -1, 1, 1), bias, padding=1) - layer(norm(x))).abs()
    assert error[:, :, 1:-1, 1:-1].max() < 1e-12
    assert error[:, :, 0].min() > 1e-6


def test_a_norm_after_a_single_unbatched_signal_still_normalises_its_first_axis() -> None:
    """`Conv1d` takes (C, L); then `BatchNorm1d` sees a batch of C rows with L channels."""
    network = Case("unbatched", sequence(conv(3, dims=1, out=5), bn(4, dims=1))).network()
    x = torch.randn(4, 4, dtype=torch.float64)
    assert error_against_original(fxrep.reparameterize(network), network, x) <= TOLERANCE


def test_training_mode_of_the_model_does_not_matter() -> None:
    case = Case("mode", sequence(conv(), bn(), nn.Dropout(0.5), conv(1)))
    network, (x, _) = case.network().train(), case.inputs()
    collapsed = fxrep.reparameterize(network)
    assert network.training
    assert not any(m.training for m in collapsed.modules())
    assert error_against_original(collapsed, network, x) <= TOLERANCE
