"""Networks of other tasks and libraries, small: unmodified code, equal in float64, and no batch norm left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from helpers import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import MobileNetV3, resnet, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.optical_flow import raft
from torchvision.models.video import resnet as video

import fxrep
from fxrep.zoo.calls import Calls, Widened

Network = tuple[Callable[[], nn.Module], list[tuple[int, ...]]]
IMAGE = (2, 3, 64, 80)


def fcn() -> nn.Module:
    return of_segmentation(segmentation.fcn.FCN, segmentation.fcn.FCNHead(64, 4))


def deeplab() -> nn.Module:
    head = segmentation.deeplabv3.DeepLabHead(64, 4, atrous_rates=(2, 3))
    return of_segmentation(segmentation.deeplabv3.DeepLabV3, head)


def of_segmentation(kind: type[nn.Module], head: nn.Module) -> nn.Module:
    backbone = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    layers = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool, backbone.layer1)
    return kind(IntermediateLayerGetter(layers, {"4": "out"}), head)


def lraspp() -> nn.Module:
    settings = [
        InvertedResidualConfig(8, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 5, 32, 24, True, "HS", 2, 1, 1.0),
    ]
    features = MobileNetV3(settings, 32).features
    backbone = IntermediateLayerGetter(features, {"1": "low", "2": "high"})
    return segmentation.lraspp.LRASPP(backbone, 16, 24, 4, inter_channels=16)


def of_video(block: type[nn.Module], conv: type[nn.Module]) -> Callable[[], nn.Module]:
    makers: Any = [video.Conv3DSimple, *[conv] * 3]
    return lambda: video.VideoResNet(block, makers, [1, 1, 1, 1], video.BasicStem, num_classes=5)


def flow() -> nn.Module:
    return raft._raft(
        feature_encoder_layers=(8, 8, 12, 16, 24),
        feature_encoder_block=raft.ResidualBlock,
        feature_encoder_norm_layer=nn.BatchNorm2d,
        context_encoder_layers=(8, 8, 12, 16, 40),
        context_encoder_block=raft.BottleneckBlock,
        context_encoder_norm_layer=nn.BatchNorm2d,
        corr_block_num_levels=2,
        corr_block_radius=1,
        motion_encoder_corr_layers=(16, 12),
        motion_encoder_flow_layers=(16, 8),
        motion_encoder_out_channels=20,
        recurrent_block_hidden_state_size=16,
        recurrent_block_kernel_size=((1, 5), (5, 1)),
        recurrent_block_padding=((0, 2), (2, 0)),
        flow_head_hidden_size=16,
        use_mask_predictor=True,
    )


def of_config(name: str, **settings: Any) -> Callable[[], nn.Module]:
    kind, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    return lambda: kind(config(**settings))


SMALL = {"hidden_sizes": [8, 16], "depths": [1, 2]}
STRIDES = {"num_attention_heads": [2, 2, 2], "key_dim": [4, 4, 4], "depths": [1, 1, 1], "hidden_sizes": [16, 24, 32]}
NETWORKS: dict[str, Network] = {
    "FCN": (fcn, [IMAGE]),
    "DeepLab": (deeplab, [IMAGE]),
    "LR-ASPP": (lraspp, [IMAGE]),
    "R3D": (of_video(video.BasicBlock, video.Conv3DSimple), [(2, 3, 4, 24, 32)]),
    "R(2+1)D": (of_video(video.BasicBlock, video.Conv2Plus1D), [(2, 3, 4, 24, 32)]),
    "RAFT": (flow, [(1, 3, 128, 136), (1, 3, 128, 136)]),
    "transformers ResNet": (of_config("ResNet", embedding_size=8, **SMALL), [IMAGE]),
    "transformers RegNet": (of_config("RegNet", embedding_size=8, groups_width=4, **SMALL), [IMAGE]),
    "transformers MobileNetV2": (of_config("MobileNetV2", depth_multiplier=0.25, tf_padding=False), [IMAGE]),
    "transformers Levit": (of_config("Levit", image_size=64, **STRIDES), [(2, 3, 64, 64)]),
}


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """By default too: what is made while a network runs is of that type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_other_tasks_and_libraries_collapse(name: str):
    make, shapes = NETWORKS[name]
    torch.manual_seed(0)
    network = randomise(make()).eval()
    inputs = [torch.rand(shape) for shape in shapes]
    expected, before = counted(network, inputs)
    got, after = counted(fxrep.reparameterize(network), inputs)
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-9
    assert before.counts["bn"] > 0
    assert after.counts["bn"] == 0
    assert after.macs <= before.macs
    assert all(after.counts[kind] <= before.counts[kind] for kind in ("conv", "linear", "add"))


def counted(network: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], Calls]:
    with Widened(), Calls() as calls:
        out = network(*inputs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], calls


def test_a_convolution_that_is_handed_on_keeps_its_batch_norm_and_says_why():
    """Padding that the sizes decide, computed from the convolution's own attributes."""
    network = randomise(of_config("MobileNetV2", depth_multiplier=0.25, tf_padding=True)()).eval()
    refusals = fxrep.explain(network).refusals
    assert any(r.code == "not-traceable" and r.node == "conv_stem.first_conv" for r in refusals)
