"""Small networks in the shape of real ones."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from helpers import randomise
from torch import Tensor, nn


class Block(nn.Module):
    """RepVGG's three branches in training form: 3×3, 1×1 and identity, each with its batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.identity = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.identity(x))


class Net(nn.Module):
    """Blocks in stages between a stem that collapses and a head that has nothing to collapse."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(nn.Sequential(Block(width), Block(width)), nn.Sequential(Block(width)))
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.drop(self.stages(self.stem(x)))).flatten(1))


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """In training mode, with random statistics."""
    torch.manual_seed(seed)
    model = Net()
    randomise(model, seed)
    return model.to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    shape = shape or (2, 3, 18, 14)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv_bn(channels: int = 3, **options: Any) -> nn.Sequential:
    return randomise(nn.Sequential(nn.Conv2d(channels, 4, 3, **options), nn.BatchNorm2d(4))).double()


def real_network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(torchvision.models.resnet18(weights=None, num_classes=10)).double()


class Asserting(nn.Module):
    """Checks what it is given, in the ways in which this is written."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        assert channels == 4, f"got {channels} channels"
        assert height > 2 and width > 2  # noqa: PT018
        if height > 99 or width > 99:
            raise ValueError(f"{height} is too large")
        if not x.is_floating_point():
            raise TypeError("no float")
        return self.body(x) / max(height, width) + min(x.shape[-2:]) + max(1, 2)
