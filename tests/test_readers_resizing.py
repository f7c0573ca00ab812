"""Shapes of what resizes maps, against those of torch at sizes that nothing was told of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import error_against_original, randomise
from torch import Tensor, nn

import fxrep
from fxrep.readers import read_graph
from fxrep.trace import Traced, trace

SIZES = ((1, 3, 19, 24), (2, 3, 33, 31))
OPS: dict[str, Callable[..., Tensor] | nn.Module] = {
    "whole factor": lambda m, y: F.interpolate(y, scale_factor=2),
    "half": lambda m, y: F.interpolate(y, scale_factor=0.5),
    "a factor for each axis": lambda m, y: F.interpolate(y, scale_factor=(0.25, 3.0), mode="bilinear"),
    "sizes": lambda m, y: F.interpolate(y, size=(7, 9)),
    "one size": lambda m, y: F.interpolate(y, 7),
    "the size of another": lambda m, y: F.interpolate(m.strided(y), size=y.shape[-2:]),
    "computed sizes": lambda m, y: F.interpolate(m.strided(y), size=(y.shape[2], 2 * y.size(3))),
    "module": nn.Upsample(scale_factor=2, mode="bilinear"),
    "module of a size": nn.UpsamplingNearest2d(size=(5, 4)),
    "shuffle": lambda m, y: F.pixel_shuffle(y, 2),
    "shuffle module": nn.PixelShuffle(2),
    "unshuffle": lambda m, y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
    "unshuffle module": nn.Sequential(nn.Upsample(scale_factor=4), nn.PixelUnshuffle(2)),
}  # fmt: skip


class Resized(nn.Module):
    def __init__(self, op: Callable[..., Tensor] | nn.Module) -> None:
        super().__init__()
        self.op = op
        self.first, self.strided = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.op(y) if isinstance(self.op, nn.Module) else self.op(self, y)


def evaluated(model: nn.Module) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """What the readers say of the output's shape, by that of the input; -1 for an axis that they do not know."""
    traced = trace(model)
    assert isinstance(traced, Traced)
    shapes = read_graph(traced.graph, traced.modules, {"x": 4}).facts.shapes
    result = next(iter(traced.graph.find_nodes(op="output"))).args[0]
    shape = shapes.full(shapes.of[result.name])
    assert shape.root is None
    return lambda size: tuple(shapes.evaluate(d, lambda a: size[a.place] if a.root == "x" else -1) for d in shape.tail)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_size_is_known(op: Callable[..., Tensor] | nn.Module):
    model = Resized(op)
    told = evaluated(model)
    for size in SIZES:
        assert told(size) == tuple(model(torch.randn(size)).shape)


def test_what_floating_point_may_round_is_not_guessed():
    told = evaluated(Resized(lambda m, y: F.interpolate(y, scale_factor=1.3)))
    assert told(SIZES[0]) == (1, 8, -1, -1)


class Decoder(nn.Module):
    """A level of a U-Net that adds, in a spelling that takes values of one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1, bias=False)
        self.norm, self.skip = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.other, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.down(x).relu(), size=x.shape[-2:], mode="nearest")
        return self.last(torch.stack([self.norm(self.up(y)), self.other(self.skip(x))]).sum(0))


def test_what_was_resized_is_added_to_what_it_was_resized_to():
    model = randomise(Decoder()).double()
    result = fxrep.reparameterize(model)
    for size in ((1, 4, 9, 12), (2, 4, 7, 5)):
        assert error_against_original(result, model, torch.randn(size, dtype=torch.float64)) < 1e-12
    assert (result.report.after["conv"], result.report.after["bn"]) == (3, 0)
