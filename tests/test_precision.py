"""Rounding: a collapsed network is as exact as its original in float32, and more so in bfloat16 and float16.

Networks are stored in float32 with the statistics of their inputs, more or less, so that no signal dies on its way. The
truth is the float32 network run in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from helpers import randomise
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm

import fxrep
from fxrep import verify

pytestmark = pytest.mark.slow


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    fold: Callable[[nn.Module], nn.Module]
    """Its authors' (or torch's) own fold, which computes in the dtype that it finds."""


NETWORKS = {
    "repvgg_a0": Network(lambda: timm.create_model("repvgg_a0"), reparameterize_model),
    "fastvit_t8": Network(lambda: timm.create_model("fastvit_t8"), reparameterize_model),
    "resnet18": Network(lambda: torchvision.models.resnet18(weights=None), fuse),
}
SIDE, IMAGES, DRAWS = 96, 4, 3
LOW = (torch.bfloat16, torch.float16)
AT_MOST_IN_FLOAT32 = 1.3


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(NETWORKS[name].build()).double().eval()
    with torch.no_grad():
        calibrate(model, images(IMAGES, seed=100).double())
    return model.float()


@cache
def collapsed(name: str) -> nn.Module:
    return fxrep.reparameterize(network(name))


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Random BN statistics around those of `x`."""
    hooks = [m.register_forward_pre_hook(take_statistics) for m in model.modules() if isinstance(m, _BatchNorm)]
    model(x)
    for hook in hooks:
        hook.remove()


def take_statistics(norm: _BatchNorm, args: tuple[Tensor]) -> None:
    var, mean = torch.var_mean(args[0], [axis for axis in range(args[0].ndim) if axis != 1])
    var = var.clamp(min=0.1 * float(var.mean()))
    norm.running_mean.copy_(mean + 0.3 * var.sqrt() * torch.randn_like(mean))
    norm.running_var.copy_(var * (torch.rand_like(var) + 0.5))


@torch.no_grad()
def errors(models: Sequence[nn.Module], truth: nn.Module, dtype: torch.dtype) -> Tensor:
    """The error of each model on each of some inputs, in the Euclidean norm, relative to that of the truth."""
    cast, wide = [copy.deepcopy(m).to(dtype) for m in models], copy.deepcopy(truth).double()
    rows = []
    for seed in range(DRAWS):
        x = images(IMAGES, seed).to(dtype)
        expected = wide(x.double())
        assert (expected - expected.roll(1, 0)).norm() > 0.05 * expected.norm()
        rows.append([float((m(x).double() - expected).norm() / expected.norm()) for m in cast])
    return torch.tensor(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_error_is_that_of_the_original(name: str):
    original, ours = errors([network(name), collapsed(name)], network(name), torch.float32).T
    assert float((ours / original).mean()) <= AT_MOST_IN_FLOAT32


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_one_cast_is_more_exact_than_the_original_and_a_fold_in_low_precision_less(name: str, dtype: torch.dtype):
    folded_low = NETWORKS[name].fold(copy.deepcopy(network(name)).to(dtype))
    models = [network(name), collapsed(name), folded_low]
    original, ours, theirs = errors(models, network(name), dtype).mean(0)
    assert ours < 0.9 * original
    assert original < theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_verify_passes_a_real_network_and_fails_it_with_one_bias_dropped(name: str, dtype: torch.dtype):
    original, ours = (copy.deepcopy(m).to(dtype) for m in (network(name), collapsed(name)))
    right = verify(original, ours, images(1, seed=0).to(dtype), trials=2)
    assert right, right
    assert right.ratio < 2
    layer = [n for n, m in ours.named_modules() if hasattr(m, "fxrep_provenance")][3]
    ours.get_submodule(layer).bias.data.zero_()
    wrong = verify(original, ours, images(1, seed=0).to(dtype), trials=1)
    assert not wrong
    assert wrong.parted.layer == layer
