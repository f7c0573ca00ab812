"""Convolutions given branches: what they compute, and that they fall back into the layers that they came from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import randomise, relative_error
from torch import Tensor, nn
from torch.fx import GraphModule

import fxrep
from fxrep.errors import FxrepError

BLOCKS = ("repvgg", "acnet", "dbb", "mobileone", "ecbsr", "dilated")
#: name -> convolution, size of the map
SITES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 4, 3, padding=1, bias=False), (9, 8)),
    "large": (nn.Conv2d(4, 4, 7, padding=3, bias=False), (9, 8)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), (9, 8)),
    "depthwise, strided": (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (9, 8)),
    "dilated": (nn.Conv2d(4, 4, 3, padding=2, dilation=2), (9, 8)),
    "1d": (nn.Conv1d(4, 4, 3, padding=1), (11,)),
    "1d, large and grouped": (nn.Conv1d(4, 8, 5, padding=2, groups=2), (11,)),
    "3d": (nn.Conv3d(4, 4, 3, padding=1), (5, 6, 5)),
    "3d, strided": (nn.Conv3d(4, 6, 3, stride=2, padding=1), (5, 6, 5)),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: What a block has no branches for: strips along one axis are the kernel itself; ECBSR's edge filters are 3 taps wide;
#: UniRepLKNet's branches stand beside large undilated kernels.
LEFT_ALONE = {
    *((site, "acnet") for site in ("1d", "1d, large and grouped")),
    *((site, "ecbsr") for site in ("large", "depthwise", "1d, large and grouped")),
    *((site, "dilated") for site in SITES if site not in ("large", "depthwise", "1d, large and grouped")),
}  # fmt: skip
EXPANDED = [(site, block) for site in SITES for block in BLOCKS if (site, block) not in LEFT_ALONE]


def around(site: str) -> tuple[nn.Module, Tensor]:
    conv, size = SITES[site]
    conv, x = copy.deepcopy(conv), torch.randn(2, 4, *size, dtype=torch.float64)
    return nn.Sequential(conv, NORMS[len(size)](conv.out_channels), nn.ReLU()).double(), x


def layers(net: GraphModule) -> list[str]:
    """Convolutions and linear layers in the order in which they run: channels, kernel sizes, geometry, bias."""
    modules = [net.get_submodule(str(n.target)) for n in net.graph.nodes if n.op == "call_module"]
    return [str(m) for m in modules if isinstance(m, LAYERS)]


@pytest.mark.parametrize(("site", "block"), EXPANDED)
def test_expanded_and_collapsed_it_has_the_deploy_shape(site: str, block: str):
    net, x = around(site)
    expanded = fxrep.expand(net, block)
    assert expanded.expansion.expanded == ("0",)
    randomise(expanded)
    collapsed = fxrep.reparameterize(expanded, x)
    assert layers(collapsed) == layers(fxrep.reparameterize(net, x))
    assert relative_error(collapsed(x), expanded.eval()(x)) < 1e-10


@pytest.mark.parametrize(("site", "block"), sorted(LEFT_ALONE))
def test_what_a_block_cannot_express_stays_alone(site: str, block: str):
    net, x = around(site)
    expanded = fxrep.expand(net, block)
    (refusal,) = expanded.expansion.refusals
    assert refusal.code == "not-expandable"
    assert torch.equal(expanded.eval()(x), net.eval()(x))


@pytest.mark.parametrize(("site", "block"), EXPANDED)
def test_preserved_it_computes_what_it_computed_and_trains_its_branches(site: str, block: str):
    net, x = around(site)
    expanded = fxrep.expand(randomise(net), block, preserve=True)
    for training in (False, True):
        assert relative_error(expanded.train(training)(x), net.train(training)(x)) < 1e-12
    assert (fxrep.expand(net, block).train()(x) - net(x)).abs().max() > 1e-3
    before = [p.clone() for p in expanded.parameters()]
    _train(expanded, x)
    after = list(expanded.parameters())
    assert len(after) > len(list(net.parameters()))
    # A bias under a batch norm has no gradient; every weight moves, and so does each branch.
    assert all((a - b).abs().max() > 0 for a, b in zip(after, before, strict=True) if a.ndim > 1)
    collapsed = fxrep.reparameterize(expanded, x)
    assert layers(collapsed) == layers(fxrep.reparameterize(net, x))
    assert relative_error(collapsed(x), expanded.eval()(x)) < 1e-10


def _train(net: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(net.train().parameters(), lr=1e-2, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenetv2_050": lambda: timm.create_model("mobilenetv2_050", num_classes=10),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block", "sites"), [
    ("resnet18", "repvgg", 17), ("resnet18", "acnet", 17), ("resnet18", "dbb", 17), ("resnet18", "ecbsr", 16),
    ("mobilenetv2_050", "mobileone", 52), ("mobilenetv2_050", "dbb", 18), ("mobilenetv3_small_050", "mobileone", 53),
    ("mobilenetv3_small_050", "dilated", 8),
])  # fmt: skip
def test_a_real_network_after_some_steps(name: str, block: str, sites: int):
    torch.manual_seed(0)
    net, x = randomise(NETWORKS[name]()).double(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expanded = fxrep.expand(net, block, preserve=True)
    assert len(expanded.expansion.expanded) == sites
    with torch.no_grad():
        assert relative_error(expanded.eval()(x), net.eval()(x)) < 1e-12
    _train(expanded, x, steps=2)
    collapsed, deployed = (fxrep.reparameterize(m, x) for m in (expanded, net))
    assert layers(collapsed) == layers(deployed)
    with torch.no_grad():
        assert relative_error(collapsed(x), expanded.eval()(x)) < 1e-10
        assert relative_error(collapsed(x), net(x)) > 1e-6


# Exactly the deploy shape: no bias and no merge that the deploy form of the model does not have.


def _normalised_twin(conv: Any) -> dict[str, nn.Module]:
    return {"twin": nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(conv.out_channels, dtype=torch.float64))}


@pytest.mark.parametrize("block", ["repvgg", "ecbsr"])
def test_where_the_deployed_layer_has_no_bias_a_block_with_shifts_is_refused(block: str):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU()).double()
    expanded = fxrep.expand(net, block, preserve=True)
    (refusal,) = expanded.expansion.refusals
    assert refusal.code == "not-expandable"
    assert "has none" in refusal.reason
    gained = fxrep.reparameterize(randomise(fxrep.expand(net, _normalised_twin)))  # what it is refused for
    assert gained.get_submodule("0.reparam").bias is not None
    assert fxrep.reparameterize(net).get_submodule("0").bias is None


class NormAfterTheSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.wide(x) + self.narrow(x)).relu()


def test_a_shift_that_goes_into_a_norm_further_on_is_no_obstacle():
    net = randomise(NormAfterTheSum()).double()
    expanded = randomise(fxrep.expand(net, "mobileone"))
    assert expanded.expansion.expanded == ("wide", "narrow")
    (layer,) = layers(fxrep.reparameterize(expanded))
    assert [layer] == layers(fxrep.reparameterize(net))
    assert "bias" not in layer


def test_branches_pay_for_no_merge_of_what_they_become():
    """1×1 → 1×1 through a bottleneck are two layers: as one they have more multiply-adds. So they are with branches,
    although one layer has fewer than all the branches together."""
    convs = [nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)]
    net, x = nn.Sequential(*convs).double(), torch.randn(1, 16, 5, 5, dtype=torch.float64)
    expanded = randomise(fxrep.expand(net, "mobileone"))
    collapsed = fxrep.reparameterize(expanded, x)
    assert layers(collapsed) == layers(fxrep.reparameterize(net, x))
    assert len(layers(collapsed)) == 2
    assert relative_error(collapsed(x), expanded.eval()(x)) < 1e-10


# Any network: convolutions on their own, and those inside of what cannot be traced.


class DecidesByValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.reached = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) if x.sum() > 0 else x * self.reached.weight.sum()


def test_inside_of_what_cannot_be_traced_what_is_only_called_is_expanded():
    net, x = randomise(DecidesByValues()).double(), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expanded = fxrep.expand(net, preserve=True)
    assert expanded.expansion.expanded == ("body.0", "head")
    (refusal,) = expanded.expansion.refusals
    assert (refusal.node, refusal.code) == ("reached", "not-traceable")
    for training in (False, True):
        assert relative_error(expanded.train(training)(x), net.train(training)(x)) < 1e-12
    assert isinstance(expanded.body[1], nn.Identity)  # its norm is in the branch


def test_a_convolution_on_its_own():
    conv, x = nn.Conv2d(4, 4, 3, padding=1).double(), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expanded = fxrep.expand(conv, preserve=True)
    assert str(expanded.expansion) == "expanded: the model itself"
    assert relative_error(expanded(x), conv(x)) < 1e-12


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.sum()


def test_a_weight_that_is_read_elsewhere_stays():
    net, x = ReadsTheWeight(), torch.randn(2, 4, 7, 6)
    expanded = fxrep.expand(net)
    assert [r.code for r in expanded.expansion.refusals] == ["tied-parameters"]
    assert torch.equal(expanded(x), net(x))


# Initialised as published.


def test_blocks_begin_as_published():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    dbb, ecbsr = (fxrep.expand(conv, block) for block in ("dbb", "ecbsr"))
    assert torch.equal(dbb["sequence"][0].weight[:, :, 0, 0], torch.eye(4))
    assert torch.equal(dbb["average"][2].weight, torch.full((4, 1, 3, 3), 1 / 9))
    kernels = [ecbsr[name][3].weight[0, 0].tolist() for name in ("sobel0", "sobel1", "laplace")]
    assert kernels == [
        [[1, 2, 1], [0, 0, 0], [-1, -2, -1]], [[1, 0, -1], [2, 0, -2], [1, 0, -1]], [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    ]  # fmt: skip
    wide = fxrep.expand(nn.Conv2d(512, 512, 3, padding=1), "ecbsr")
    assert wide["laplace"][4].weight.std().item() == pytest.approx(1e-3, rel=0.15)
    copies = [name for name in fxrep.expand(conv, "mobileone") if name.startswith("copy")]
    assert len(copies) == 3  # beside the convolution: four in all


def test_where_and_a_block_of_ones_own():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()

    def twin(conv: Any) -> dict[str, nn.Module]:
        return {"twin": copy.deepcopy(conv)}

    expanded = fxrep.expand(net, twin, where="2")
    assert expanded.expansion.expanded == ("2",)
    assert layers(fxrep.reparameterize(expanded)) == layers(fxrep.reparameterize(net))
    assert fxrep.expand(net, twin, where=lambda name, conv: conv.kernel_size == (3, 3)).expansion.expanded == ("0", "2")
    assert fxrep.expand(net, lambda conv: None).expansion.expanded == ()
    with pytest.raises(FxrepError, match="fits no convolution"):
        fxrep.expand(net, where="stages.*")
    with pytest.raises(FxrepError, match="there is no block"):
        fxrep.expand(net, "repvg")
    with pytest.raises(FxrepError, match="same stride"):
        fxrep.expand(net, lambda conv: {"valid": nn.Conv2d(4, 4, 3).double()})
    with pytest.raises(FxrepError, match="does not end in a layer with weights"):
        fxrep.expand(net, lambda conv: {"twin": nn.Sequential(copy.deepcopy(conv), nn.Sigmoid())}, preserve=True)
