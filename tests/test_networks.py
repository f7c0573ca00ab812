"""Real, unmodified networks of timm and torchvision: equal in float64, and no more calls left than promised.

Calls are counted where they happen, below Python, and not by the package's own census of a graph.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import randomise, relative_error
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import fxrep

pytestmark = pytest.mark.slow

KINDS = {
    "convolution": "conv", "mkldnn_convolution": "conv", "_convolution": "conv",
    "addmm": "linear", "mm": "linear", "linear": "linear",
    "native_batch_norm": "bn", "_native_batch_norm_legit": "bn", "_native_batch_norm_legit_no_training": "bn",
    "add": "add", "add_": "add", "rsub": "sub", "sub": "sub", "sub_": "sub", "mul": "mul", "mul_": "mul",
}  # fmt: skip

# Executed calls: of the original, exactly, and at most of its collapsed form.
TIMM = {
    "repvgg_a0": ({"conv": 44, "bn": 61, "add": 39}, {"conv": 22, "bn": 0, "add": 0}),
    "mobileone_s0": ({"conv": 191, "bn": 226, "add": 212}, {"conv": 43, "bn": 0, "add": 0}),
    "mobileone_s1": ({"conv": 65, "bn": 99, "add": 86}, {"conv": 43, "bn": 0, "add": 0}),
    "fastvit_t8": ({"conv": 68, "bn": 70, "add": 67, "mul": 21}, {"conv": 52, "bn": 0, "add": 10, "mul": 1, "sub": 0}),
    "repvit_m1": ({"conv": 126, "bn": 108, "add": 73}, {"conv": 103, "linear": 1, "bn": 0, "add": 26}),
    "repghostnet_050": ({"conv": 95, "bn": 112, "add": 48}, {"conv": 95, "bn": 0, "add": 16}),
    "ghostnetv3_050": ({"conv": 309, "bn": 326}, {"conv": 137, "bn": 0, "add": 16}),
    "shvit_s1": ({"conv": 77, "bn": 74, "add": 39}, {"conv": 77, "bn": 0, "add": 24}),
    "levit_128s": ({"bn": 52}, {"bn": 0}),
    "hgnetv2_b0": ({"conv": 43, "bn": 42}, {"conv": 43, "bn": 0}),
    "lcnetv2_small": ({"conv": 46, "bn": 37}, {"conv": 36, "bn": 0}),
}  # fmt: skip
TORCHVISION = (
    "resnet50", "mobilenet_v2", "inception_v3", "googlenet", "regnet_y_400mf", "efficientnet_b0", "shufflenet_v2_x1_0",
    "mnasnet1_0",
)  # fmt: skip
DEPLOYED_BY_AUTHORS = ("repvgg_a0", "mobileone_s0", "mobileone_s1")


class Calls(TorchDispatchMode):
    """Counts the operators that run; sums of integers (sizes, positions) are none of the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(result, Tensor) and not result.is_floating_point():
            return result
        if name == "addcmul":
            self.counts.update(("add", "mul"))
        self.counts[KINDS.get(name, name)] += 1
        return result


def run_counted(model: nn.Module, x: Tensor) -> tuple[Tensor, Counter[str]]:
    with torch.no_grad(), Calls() as calls:
        out = model(x)
    return out, calls.counts


def build(name: str) -> nn.Module:
    """The network in float64, in eval mode, with no value that would hide an error."""
    torch.manual_seed(0)
    if name in TIMM:
        model = timm.create_model(name, pretrained=False)
    else:
        quick = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        model = torchvision.models.get_model(name, weights=None, **quick)
    randomise(model)
    for parameter in model.parameters():  # LayerScale starts at 1e-5, where no error in its branch would be seen
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()) and parameter.abs().max() < 0.1:
            parameter.data.normal_(0, 0.2)
    calibrate(model.double().eval(), images(name, model))
    return model


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Random BN statistics around those of `x`: far from them, a deep network forgets its input."""
    hooks = [m.register_forward_pre_hook(take_statistics) for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()


def take_statistics(norm: _BatchNorm, args: tuple[Tensor]) -> None:
    rest = [axis for axis in range(args[0].ndim) if axis != 1]
    var, mean = torch.var_mean(args[0], rest)
    var = var.clamp(min=0.1 * float(var.mean()))  # two images may agree in a channel: its gain would be noise
    norm.running_mean.copy_(mean + 0.3 * var.sqrt() * torch.randn_like(mean))
    norm.running_var.copy_(var * (torch.rand_like(var) + 0.5))


def images(name: str, model: nn.Module) -> Tensor:
    """Two different images of the network's default size."""
    side = 299 if name == "inception_v3" else 224
    size = getattr(model, "default_cfg", {}).get("input_size", (3, side, side))
    return torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def compare(name: str, model: nn.Module, collapsed: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Asserts that the two are equal, on outputs that depend on the input; gives the calls of both."""
    x = images(name, model)
    expected, before = run_counted(model, x)
    got, after = run_counted(collapsed, x)
    assert relative_error(expected[0], expected[1]) > 0.05
    assert relative_error(got, expected) <= 1e-10
    return before, after


@pytest.mark.parametrize("name", TIMM)
def test_timm_network(name: str):
    model = build(name)
    expected_before, at_most = TIMM[name]
    before, after = compare(name, model, fxrep.reparameterize(model))
    assert {kind: before[kind] for kind in expected_before} == expected_before
    assert {kind: after[kind] for kind in at_most if after[kind] > at_most[kind]} == {}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_network(name: str):
    model = build(name)
    before, after = compare(name, model, fxrep.reparameterize(model))
    assert before["bn"] > 0
    assert after["bn"] == 0
    assert after["conv"] <= before["conv"]
    assert after["add"] + after["sub"] <= before["add"] + before["sub"]
    assert after["mul"] <= before["mul"]


def test_densenet_is_left_with_no_more_than_by_torchs_own_fuse():
    """Most of its BNs stand before a ReLU and after a concatenation: they follow no convolution."""
    model = build("densenet121")
    before, after = compare("densenet121", model, fxrep.reparameterize(model))
    _, fused = run_counted(fuse(model), images("densenet121", model))
    assert before["bn"] == 121
    assert fused["bn"] < before["bn"]
    assert after["bn"] <= fused["bn"]
    assert after["conv"] <= fused["conv"]


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "resnet50"])
def test_reports_own_census_agrees_with_what_runs(name: str):
    model = build(name)
    collapsed = fxrep.reparameterize(model)
    before, after = compare(name, model, collapsed)
    for kind in ("conv", "linear", "bn"):
        assert (collapsed.report.before[kind], collapsed.report.after[kind]) == (before[kind], after[kind])


@pytest.mark.parametrize("name", DEPLOYED_BY_AUTHORS)
def test_convolutions_are_those_of_the_authors_deploy_form(name: str):
    model = build(name)
    deployed = called_convolutions(reparameterize_model(model), images(name, model))
    collapsed = called_convolutions(fxrep.reparameterize(model), images(name, model))
    assert [geometry(c) for c in collapsed] == [geometry(c) for c in deployed]
    for ours, theirs in zip(collapsed, deployed, strict=True):
        assert relative_error(ours.weight.detach(), theirs.weight.detach()) <= 1e-10
        assert relative_error(ours.bias.detach(), theirs.bias.detach()) <= 1e-10


def called_convolutions(model: nn.Module, x: Tensor) -> list[nn.Conv2d]:
    """The plain `nn.Conv2d`s in the order of their calls, which are all the convolutions that run."""
    called: list[nn.Conv2d] = []
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.register_forward_hook(lambda m, _args, _out: called.append(m))
    _, counts = run_counted(model, x)
    assert len(called) == counts["conv"]
    return called


def geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return type(conv), *sizes, conv.groups, conv.padding_mode, conv.bias is not None
