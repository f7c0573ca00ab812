"""Networks of constant-scale branches in the shape of published ones, and the loop that trains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Make = Callable[[Iterable[nn.Parameter]], Optimizer]


class Scale(nn.Module):
    """A factor per channel, constant unless it `trains`."""

    def __init__(self, channels: int, trains: bool = False) -> None:
        super().__init__()
        values = torch.rand(channels, 1, 1) * 1.5 + 0.25
        values[0] *= -1  # a negative scale is a scale like any other
        self.weight = nn.Parameter(values, requires_grad=trains)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Fixed(nn.Module):
    """A depthwise Sobel kernel that nothing trains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernel", kernel.expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel, padding=1, groups=len(self.kernel))


class Sum(nn.Module):
    """Branches of one input, summed; one batch norm after the sum."""

    def __init__(self, channels: int, *branches: nn.Module, norm: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return torch.relu(self.norm(total))


def scaled(inputs: int, outputs: int, kernel: Any, *, trains: bool = False, **options: Any) -> nn.Sequential:
    pads = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    options = {"bias": False, "padding": pads, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), Scale(outputs, trains))


def repvgg(channels: int = 4, **options: Any) -> Sum:
    wide, narrow = scaled(channels, channels, 3, **options), scaled(channels, channels, 1, **options)
    return Sum(channels, wide, narrow, Scale(channels, trains=True))


def acnet(channels: int = 4) -> Sum:
    return Sum(channels, *(scaled(channels, channels, k, bias=True) for k in (3, (3, 1), (1, 3))))


def strided(inputs: int = 4, outputs: int = 6) -> Sum:
    return Sum(outputs, *(scaled(inputs, outputs, k, stride=2) for k in (3, 1)))


def same_size(channels: int = 4) -> Sum:
    return Sum(channels, scaled(channels, channels, 3), scaled(channels, channels, 3))


def dilated(channels: int = 4) -> Sum:
    return Sum(channels, scaled(channels, channels, 5), scaled(channels, channels, 3, dilation=2, padding=2))


def residual(channels: int = 4) -> Sum:
    """The identity without a scale: a part of the kernel that nothing trains."""
    return Sum(channels, scaled(channels, channels, 3), nn.Identity())


def edges(channels: int = 4) -> Sum:
    """ECBSR's branches: what trains is followed by a fixed operator."""
    before = [nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2)]
    return Sum(channels, scaled(channels, channels, 3), *(nn.Sequential(c, Fixed(channels)) for c in before))


def repghost(channels: int = 4) -> Sum:
    """Depthwise beside the identity."""
    return Sum(channels, scaled(channels, channels, 3, groups=channels), Scale(channels, trains=True))


class Masked(nn.Module):
    """A kernel of which a constant mask lets through its middle row and column."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) * 0.2)
        self.register_buffer("mask", torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * self.mask, padding=1)


def masked(channels: int = 4) -> Sum:
    return Sum(channels, scaled(channels, channels, 3), nn.Sequential(Masked(channels), Scale(channels)))


BLOCKS: dict[str, Callable[[], list[nn.Module]]] = {
    "repvgg": lambda: [repvgg(), repvgg()],
    "acnet": lambda: [acnet()],
    "grouped": lambda: [repvgg(groups=2)],
    "depthwise": lambda: [repvgg(groups=4)],
    "strided, more channels": lambda: [strided()],
    "same size": lambda: [same_size()],
    "dilated": lambda: [dilated()],
    "residual": lambda: [residual()],
    "edges": lambda: [edges()],
    "repghost": lambda: [repghost()],
    "masked": lambda: [masked()],
}


def network(blocks: list[nn.Module], seed: int = 0) -> nn.Sequential:
    """The blocks between a stem and a head that train plainly, in float64."""
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3)]
    net = nn.Sequential(*stem, *blocks, *head)
    net(torch.randn(2, 3, 8, 8))
    return net.double().train()


def built(name: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return network(BLOCKS[name]())


def batches(steps: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = shape or (4, 3, 7, 6)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (shape[0],), generator=generator),
        )
        for _ in range(steps)
    ]


def train(net: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
