"""Layers on one value that stay apart: one layer and views where measured costs say so, equal in every case."""

from __future__ import annotations

import pytest
import torch
from helpers import error_against_original, randomise
from torch import Tensor, nn

import fxrep
from fxrep.cost import KINDS, Profile

#: Launches are dear and copies cheap; the same not measured; copies so dear that none is worth a launch.
LAUNCHES = Profile("launches", dict.fromkeys(KINDS, 1e15), 1e15, 1e-3, measured=True, view=1e-6)
SHIPPED = Profile("shipped", LAUNCHES.peak, 1e15, 1e-3)
COPIES = Profile("copies", LAUNCHES.peak, 1e3, 1e-6, measured=True, view=1e-6)
VIEWS = Profile("views", LAUNCHES.peak, 1e15, 1e-6, measured=True, view=1e-3)


def conv(a: int, b: int, k: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, k, padding=k // 2, bias=bias), nn.BatchNorm2d(b))


class Heads(nn.Module):
    """Inception's heads: three 1x1 layers on one value, of which one goes on into another layer as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 6, 3), conv(6, 4, 1), conv(6, 5, 1, bias=True), conv(6, 2, 1)
        self.after, self.act = conv(4, 3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.cat([self.after(self.a(x).relu()), self.act(self.b(x)), self.c(x).sigmoid()], 1)


class Attention(nn.Module):
    """q, k and v, with the views that take them for contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.size(0), -1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Outputs(nn.Module):
    """Two results that the caller gets, and may view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind()).double().eval()


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_are_one_layer(batch):
    fast = fxrep.reparameterize(made(Heads), image(batch), profile=LAUNCHES)
    assert fast.report.after["conv"] == 3
    assert fast.report.after["bn"] == 0
    assert not [r for r in fast.report.refusals if r.code == "certificate-failed"]
    for each in (1, 2, 3):
        assert error_against_original(fast, made(Heads), image(each)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"profile": SHIPPED},
        {"profile": VIEWS},
        {"profile": LAUNCHES, "objective": "macs"},
        {"profile": LAUNCHES, "objective": "params"},
    ],
)
def test_they_stay_apart_unless_measured_costs_say_that_it_pays(options):
    assert fxrep.explain(made(Heads), image(), **options).after["conv"] == 5


def test_views_that_want_them_contiguous_run_on_copies():
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    fast = fxrep.reparameterize(made(Attention), x, profile=LAUNCHES)
    assert fast.report.after["linear"] == 1
    assert sum(n.target == "contiguous" for n in fast.graph.nodes) == 3
    for batch in (1, 2, 3):
        y = torch.randn(batch, 7, 8, dtype=torch.float64)
        assert error_against_original(fast, made(Attention), y) < 1e-12


def test_copies_are_counted():
    """At a batch of one the views are contiguous as they are; else their copies cost more than two launches."""
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert fxrep.explain(made(Attention), x, profile=COPIES).after["linear"] == 3


def test_what_the_caller_gets_is_contiguous():
    fast = fxrep.reparameterize(made(Outputs), image(1), profile=LAUNCHES)
    assert fast.report.after["conv"] == 1
    for got, expected in zip(fast(image()), made(Outputs)(image()), strict=True):
        assert got.is_contiguous()
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_other_geometries_stay_apart():
    class Mixed(Outputs):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Conv2d(3, 5, 1)

    assert fxrep.explain(made(Mixed), image(), profile=LAUNCHES).after["conv"] == 2


def test_a_value_written_between_them_keeps_them_apart():
    class Written(Outputs):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * 1.0
            a = self.a(x)
            x.relu_()
            return a, self.b(x)

    fast = fxrep.reparameterize(made(Written), image(), profile=LAUNCHES)
    for got, expected in zip(fast(image()), made(Written)(image()), strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Heads, Outputs])
def test_in_place_and_refolded(kind):
    model = made(kind)
    fast = fxrep.reparameterize(made(kind), image(1), profile=LAUNCHES, inplace=True)

    def flat(y: Tensor | tuple[Tensor, ...]) -> Tensor:
        return y if isinstance(y, Tensor) else torch.cat(y, 1)

    assert torch.allclose(flat(fast(image())), flat(model(image())), rtol=1e-12, atol=1e-12)
    other = randomise(made(kind), seed=3)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    refolded = fxrep.reparameterize(made(kind), image(1), profile=LAUNCHES)
    refolded.refold(other)
    assert torch.allclose(flat(refolded(image())), flat(other(image())), rtol=1e-12, atol=1e-12)
