"""What both files of tests of verify need: a network with branches, its collapse, and the devices to try."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn
from torch.fx import GraphModule

import fxrep

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
HALF = (torch.float16, torch.bfloat16)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class Branches(nn.Module):
    """A stem, then a 3-wide, a 1-wide and an identity branch, each with its batch norm."""

    def __init__(self, dims: int = 2, width: int = 8, **options: Any) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.stem = nn.Sequential(conv(3, width, 3, stride=2, padding=1), norm(width), nn.ReLU())
        self.wide = nn.Sequential(conv(width, width, 3, padding=1, bias=False, **options), norm(width))
        self.point = nn.Sequential(conv(width, width, 1, bias=False, **options), norm(width))
        self.identity = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.relu(self.wide(x) + self.point(x) + self.identity(x))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.abs().sum() > 0 else x


def build(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, GraphModule]:
    randomise(model).to(dtype)
    collapsed = fxrep.reparameterize(model)
    assert isinstance(collapsed, GraphModule)
    return model, collapsed
