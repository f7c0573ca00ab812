"""Networks that other tools fold wrongly or cannot take, that no other test file is about: each is equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from reader_cases import Net
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

import fxrep


class OfTwo(Net):
    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Any:
        return self.body(self, x, y, scale)


@dataclass
class Features:
    """What a backbone gives."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Trap:
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image(),)
    left: dict[str, int] = field(default_factory=dict)
    """How many calls of a kind are left, where that is the point."""


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 7), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def conv(kernel: int = 3, inputs: int = 4, outputs: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def bn() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def chain() -> nn.Sequential:
    return nn.Sequential(conv(), bn())


def with_gain(values: list[float]) -> nn.Module:
    network = chain()
    network[1].weight.data = torch.tensor(values)
    return network


def with_variance(value: float) -> nn.Module:
    network = chain()
    network[1].running_var.fill_(value)
    return network


def frozen() -> nn.Module:
    norm = FrozenBatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 2)
    norm.bias.normal_()
    return nn.Sequential(conv(), norm)


def initialised() -> nn.Module:
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).double()
    network(image())
    return network


def of_two_dtypes() -> nn.Module:
    """Half-precision weights, and statistics in single precision: only a cast between the two lets it run."""
    return Net(lambda m, x: m.bn(m.conv(x.bfloat16()).float()), conv=conv().bfloat16(), bn=bn().float())


def as_class(m: Any, x: Tensor) -> Features:
    h = m.bn(m.conv(x))
    return Features(low=h, high=m.head(h.relu()))


def forever_training() -> nn.Module:
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(True)

    return nn.Sequential(conv(), Stubborn(4, momentum=0.0))


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.block(x).relu()
    return x


def one_bn_of_two(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)).relu() + m.conv(x.sigmoid())


def two_bns(m: Any, x: Tensor) -> Tensor:
    return m.a(m.conv(x)).relu() + m.b(m.conv(x.sigmoid()))


def gain_over_width(m: Any, x: Tensor) -> Tensor:
    """γ of 4 numbers meets (N, 4, H, 4): it scales columns, not channels."""
    return m.conv(x) * m.conv.bias


def one_pixel_wide(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + m.other(F.adaptive_avg_pool2d(x, 1))


def written_through_alias(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    alias = m.same(h).detach()
    alias.view(-1)[0] = 7.0
    alias[:, 1:2] *= 3
    return m.bn(h)


def dropped_and_used(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.conv(x)
    return m.bn(h), h


TRAPS: dict[str, Trap] = {
    "zero and negative gain": Trap(lambda: with_gain([0.0, -1.5, 1.0, -0.0]), left={"bn": 0}),
    "tiny variance": Trap(lambda: with_variance(1e-14), left={"bn": 0}),
    "no variance": Trap(lambda: with_variance(0.0), left={"bn": 0}),
    "frozen batch norm": Trap(frozen, left={"bn": 0, "mul": 0, "add": 0}),
    "lazy modules that have run": Trap(initialised, left={"bn": 0}),
    "a batch norm that never leaves training": Trap(forever_training, left={"bn": 1}),
    "old weight norm": Trap(lambda: nn.Sequential(nn.utils.weight_norm(conv()), bn())),
    "old spectral norm": Trap(lambda: nn.Sequential(nn.utils.spectral_norm(conv()), bn())),
    "conv and norm of two dtypes": Trap(of_two_dtypes),
    "a block in a loop": Trap(lambda: Net(in_a_loop, block=chain()), left={"conv": 3, "bn": 0}),
    "called twice, one batch norm": Trap(lambda: Net(one_bn_of_two, conv=conv(), bn=bn()), left={"conv": 2, "bn": 0}),
    "called twice, two batch norms": Trap(
        lambda: Net(two_bns, conv=conv(), a=bn(), b=bn()), left={"conv": 2, "bn": 0}
    ),
    "a gain over the width": Trap(lambda: Net(gain_over_width, conv=conv()), lambda: (image(2, 4, 5, 4),)),
    "an add that broadcasts over space": Trap(
        lambda: Net(one_pixel_wide, conv=conv(), other=conv(1)), left={"conv": 2}
    ),
    "writes through aliases": Trap(lambda: Net(written_through_alias, conv=conv(), bn=bn(), same=nn.Identity())),
    "a value that escapes": Trap(lambda: Net(dropped_and_used, conv=conv(), bn=bn())),
    "complex inputs": Trap(
        lambda: Net(lambda m, x: m.bn(m.conv(x.real)) * x, conv=conv(), bn=bn()),
        lambda: (torch.complex(image(), image()),),
    ),
    "integer inputs": Trap(
        lambda: Net(lambda m, x: m.bn(m.conv(x.double() / 255)), conv=conv(), bn=bn()),
        lambda: ((image() * 100).byte(),),
    ),
    "integers that stay integers": Trap(lambda: Net(lambda m, x: (x + 1) * 2 - 3), lambda: (torch.arange(6),)),
    "an embedding before a convolution": Trap(
        lambda: Net(lambda m, i: m.bn(m.conv(m.table(i).transpose(1, 2))),
                    table=nn.Embedding(9, 4), conv=nn.Conv1d(4, 4, 3), bn=nn.BatchNorm1d(4)),
        lambda: (torch.arange(8).reshape(1, 8),), left={"bn": 0},
    ),
    "an unbatched input": Trap(lambda: nn.Sequential(conv(), nn.ReLU(), conv(1)), lambda: (image(4, 6, 7),)),
    "several inputs": Trap(
        lambda: OfTwo(lambda m, x, y, scale: m.bn(m.conv(x)) + scale * m.bn(m.conv(y)), conv=conv(), bn=bn()),
        lambda: (image(), image(2, 4, 6, 7).flip(0)), left={"bn": 0},
    ),
    "a dict of tuples": Trap(
        lambda: Net(lambda m, x: {"a": (h := m.bn(m.conv(x))), "b": [h.relu(), (m.conv(h),)]}, conv=conv(), bn=bn())
    ),
    "one convolution": Trap(conv, left={"conv": 1}),
    "no convolution": Trap(lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), left={"conv": 0}),
    "nothing at all": Trap(nn.Identity),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("example", [False, True], ids=["no example", "example"])
@pytest.mark.parametrize("name", TRAPS)
def test_it_is_equal(name: str, example: bool):
    torch.manual_seed(0)
    trap = TRAPS[name]
    network = trap.build()
    if name != "conv and norm of two dtypes":
        network = network.double()
    network = randomise(network) if "variance" not in name and "gain" not in name else network
    network, inputs = network.eval(), trap.inputs()
    collapsed = fxrep.reparameterize(network, inputs if example else None)
    for kind, count in trap.left.items():
        assert collapsed.report.after[kind] == count, kind
    with torch.no_grad():
        got, expected = (tree_leaves(m(*[x.clone() for x in inputs])) for m in (collapsed, network))
    tolerance = 1e-2 if name == "conv and norm of two dtypes" else 1e-11
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert torch.allclose(g, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_a_class_of_outputs():
    network = randomise(Net(as_class, conv=conv(), bn=bn(), head=conv(1))).double().eval()
    got, expected = fxrep.reparameterize(network)(image()), network(image())
    assert type(got) is Features
    assert torch.allclose(got.low, expected.low, atol=1e-12)
    assert torch.allclose(got.high, expected.high, atol=1e-12)


def test_lazy_modules_that_have_not_run_are_named():
    with pytest.raises(fxrep.FxrepError, match=r"lazy parameter 0\.weight has no shape yet"):
        fxrep.reparameterize(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_tied_weights_stay_tied():
    network = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
    network[2].weight = network[0].weight
    collapsed = fxrep.reparameterize(network)
    kept = [m.weight for m in collapsed.modules() if isinstance(m, nn.Conv2d)]
    assert len(kept) == 2
    assert kept[0] is kept[1]
