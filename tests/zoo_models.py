"""What the tests of the zoo sweep: networks that collapse, crash, hang and fail."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from blocks import Block
from torch import Tensor, nn

HERE = Path(__file__)


def branches() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Block(6))


class Unrolled(nn.Module):
    """A convolution and its batch norm in a forward that branches on numbers; a second pair that it does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if float(y.sum()) > 0 else y * 2


def linear() -> nn.Module:
    head = (nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def crashes() -> nn.Module:
    os._exit(3)


def hangs() -> nn.Module:
    time.sleep(1000)
    raise AssertionError("it was not stopped")


def beats() -> nn.Module:
    """Writes the time, again and again, as long as it lives."""
    while True:
        Path(os.environ["HEARTBEAT"]).write_text(str(time.monotonic()))
        time.sleep(0.02)


def greedy() -> nn.Module:
    torch.empty(1 << 40, dtype=torch.float64).fill_(1)
    raise AssertionError("it got 8 TiB")


def broken() -> nn.Module:
    raise ValueError("no such network")
