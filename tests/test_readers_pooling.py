"""Average pools as the convolutions that they are, and the borders where they are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reader_cases import TOLERANCE, Case, Net, bn, branches, check, conv, image, over, sequence
from torch import nn

import fxrep

POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
F_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def functional(dims: int) -> nn.Module:
    def body(m: Any, x: Any) -> Any:
        pooled = F_POOLS[dims](input=m.point(x), kernel_size=3, stride=1, padding=1, count_include_pad=True)
        return pooled + F_POOLS[dims](x, 1) + m.conv(x)

    return Net(body, point=conv(1, dims=dims, bias=False), conv=conv(3, dims=dims))


def pooled_beside(dims: int) -> nn.Module:
    """As in DBB: a 1×1 and an average of its result, beside a convolution that reads as many taps."""
    return Net(
        lambda m, x: m.pool(m.point(x)) + m.conv(x), point=conv(1, dims=dims), pool=POOLS[dims](2),
        conv=conv(2, dims=dims, stride=2, padding=0),
    )  # fmt: skip


def per_dims(name: str, build: Any, left: str) -> list[Case]:
    return [Case(f"{name} {d}d", lambda d=d: build(d), left, image(dims=d), bare=False) for d in POOLS]


CASES = [
    *per_dims("pool and conv", lambda d: branches(POOLS[d](3, 1, 1), conv(3, dims=d))(), "c1 a0 p0"),
    *per_dims("functional", functional, "c1 a0 p0"),
    *per_dims("conv to pool", lambda d: nn.Sequential(conv(1, dims=d), POOLS[d](2)), "c1 p1"),
    *per_dims("conv to pool beside", lambda d: pooled_beside(d), "c1 a0 p0"),
    Case("DBB's average branch", lambda: Net(
        lambda m, x: m.bn1(m.pool(m.bn0(m.conv1(x)))) + m.bn2(m.conv3(x)),
        conv1=conv(1, bias=False), bn0=bn(), pool=nn.AvgPool2d(3, 1), bn1=bn(), conv3=conv(3, padding=0), bn2=bn(),
    ), "c1 b0 a0 p0", bare=False),
    Case("pool to 1x1", sequence(nn.AvgPool2d(2), conv(1)), "c1 p1", bare=False),
    Case("pool to bn", sequence(nn.AvgPool2d(3, 2, 1), bn()), "b1 p1 c0"),
    Case("pool of two axes", branches(
        nn.AvgPool2d((2, 3), (1, 2)), conv((2, 3), stride=(1, 2), padding=0)
    ), "c1 a0 p0", bare=False),
    Case("pool less identity", lambda: Net(
        lambda m, x: m.pool(y := m.conv(x).relu()) - y, conv=conv(), pool=nn.AvgPool2d(3, 1, 1)
    ), "c1 a1 p1", bare=False),
    Case("divisor", lambda: Net(
        lambda m, x: m.conv(x) + F.avg_pool2d(x, 3, 1, 1, divisor_override=5) + m.pool(x),
        conv=conv(), pool=nn.AvgPool2d(3, 1, 1, divisor_override=2),
    ), "c1 a0 p0", bare=False),
    Case("biased conv to padded pool", sequence(conv(1), nn.AvgPool2d(3, 1, 1)), "c1 p1", refused="pads-over-bias"),
    Case("pads that do not count", sequence(
        conv(1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    ), "c1 p1", refused="pool-border"),
    Case("divisor and pads that do not count", branches(
        conv(), nn.AvgPool2d(3, 1, 1, count_include_pad=False, divisor_override=9)
    ), "c1 a0 p0", bare=False),
    Case("ceil mode", sequence(conv(1), nn.AvgPool2d(2, ceil_mode=True), bn()), "c1", refused="pool-border"),
    Case("ceil mode, stride 1", branches(conv(), nn.AvgPool2d(3, 1, 1, ceil_mode=True)), "c1"),
    Case("conv, pool, bn", sequence(conv(), nn.AvgPool2d(2), bn()), "c1 p1 b0", bare=False),
    Case("max pool between", sequence(conv(), nn.MaxPool2d(3, 2, 1), bn(), conv(1)), "c2 b0"),
    Case("global pool between", sequence(conv(), bn(), nn.AdaptiveAvgPool2d(3), conv(3, padding=0), bn()), "c2 b0"),
]  # fmt: skip


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pool_is_the_depthwise_box(dims: int) -> None:
    """Every tap is 1 / k^dims; on a sum with a convolution it lands on the diagonal."""
    case = Case("box", branches(POOLS[dims](3, 1, 1), conv(3, dims=dims)), shapes=image(dims=dims))
    network = case.network()
    collapsed = fxrep.reparameterize(network, case.inputs()[0])
    box = torch.eye(4, dtype=torch.float64).view(4, 4, *(1,) * dims) / 3**dims
    (layer,) = (m for m in collapsed.modules() if isinstance(m, type(network.layers[1])))
    assert relative_error(layer.weight, network.layers[1].weight + box) <= TOLERANCE


def test_a_scale_after_a_pool_goes_into_the_layer_before_it() -> None:
    """γ·mean(Wx + b) + β is the mean of (γW)x + γb + β: the pool stays a pool."""
    case = Case("sunk", sequence(conv(), nn.AvgPool2d(2), bn()))
    network = case.network()
    collapsed = fxrep.reparameterize(network, case.inputs()[0])
    (layer,) = (m for m in collapsed.modules() if isinstance(m, nn.Conv2d))
    norm = network[2]
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * gain
    assert relative_error(layer.weight, network[0].weight * gain.view(-1, 1, 1, 1)) <= TOLERANCE
    assert relative_error(layer.bias, network[0].bias * gain + shift) <= TOLERANCE
    assert [(c.name, c.replaced) for c in collapsed.report.collapses] == [
        ("reparam", ("0", "2")),
        ("2", ("0", "1", "2")),
    ]


STAY: dict[str, Any] = {
    "padded": sequence(conv(), nn.AvgPool2d(3, 2, 1), bn()),
    "read by another": lambda: Net(
        lambda m, x: m.bn(y := m.pool(m.conv(x))) * y.sigmoid(), conv=conv(), pool=nn.AvgPool2d(2), bn=bn()
    ),
    "the layer is read by another": lambda: Net(
        lambda m, x: m.bn(m.pool(y := m.conv(x))).mean() * y.sigmoid(), conv=conv(), pool=nn.AvgPool2d(2), bn=bn()
    ),
    "another divisor": sequence(conv(), nn.AvgPool2d(2, divisor_override=3), bn()),
}


@pytest.mark.parametrize("name", STAY)
def test_a_scale_after_a_pool_stays_where_that_would_not_be_the_same_or_more(name: str) -> None:
    check(case := Case(name, STAY[name], "c1 p1", bare=False))
    assert fxrep.reparameterize(case.network()).report.after["bn"] == 1
