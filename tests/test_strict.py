"""Infinities: what a merged kernel does to them, and the switch that keeps the branches which would suffer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxrep
from fxrep import kernel as K
from fxrep.evaluation import has_zeros
from fxrep.testing import Inputs, Network, inputs_for, networks


class Cross(nn.Module):
    """A tall and a wide window of taps, and the pixel itself: the square around them has corners that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Conv2d(4, 4, (5, 3), padding=(2, 1))
        self.wide = nn.Conv2d(4, 4, (3, 5), padding=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(x) + self.wide(x) + x


class Square(Cross):
    """With a square of taps beside them, every corner is read anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(4, 4, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.square(x)


def one_infinity() -> Tensor:
    x = torch.ones(1, 4, 5, 5)
    x[0, 0, 2, 2] = torch.inf
    return x


@torch.no_grad()
def finite(model: nn.Module) -> Tensor:
    return model.eval()(one_infinity()).isfinite()[0, 1]


def test_a_merged_kernel_spreads_an_infinity_to_its_corners():
    """The witness: without `strict` the corners of the square, which no branch reads, become nan."""
    model = Cross()
    fast = fxrep.reparameterize(model)
    assert fast.report.after["conv"] == 1
    assert finite(model)[0, 0]
    assert not finite(fast)[0, 0]


def test_strict_keeps_such_branches_and_says_so():
    model = Cross()
    kept = fxrep.reparameterize(model, strict=True)
    assert kept.report.after["conv"] == 2
    assert "non-finite" in {r.code for r in kept.report.refusals}
    assert torch.equal(finite(kept), finite(model))
    assert "non-finite" in {r.code for r in fxrep.explain(model, strict=True).refusals}


def test_strict_merges_what_spreads_nothing():
    model = Square()
    fast = fxrep.reparameterize(model, strict=True)
    assert fast.report.after["conv"] == 1
    assert torch.equal(finite(fast), finite(model))


def test_strict_does_not_widen_groups():
    """A depthwise branch beside a dense one of fewer taps: dense with all the taps, it would mix the channels there."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.deep = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.point(x) + self.deep(x)

    assert fxrep.reparameterize(Mixed(), strict=True).report.after["conv"] == 2


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, Inputs, bool, float, int]:
    network = draw(networks())
    value = draw(st.sampled_from([torch.inf, -torch.inf, torch.nan]))
    return network, draw(inputs_for(network)), draw(st.booleans()), value, draw(st.integers(0, 10**6))


@given(cases())
def test_a_number_stays_a_number(case: tuple[Network, Inputs, bool, float, int]):
    """Where the network gives a number or an infinity, so does its strict collapse."""
    network, inputs, with_example, value, place = case
    strict = fxrep.reparameterize(network, tuple(inputs) if with_example else None, strict=True)
    for expected, got in zip(*(run(m, inputs, value, place) for m in (network, strict)), strict=True):
        assert not (got.isnan() & ~expected.isnan()).any()
        assert torch.equal(got[expected.isinf()], expected[expected.isinf()])


@torch.no_grad()
def run(network: nn.Module, inputs: Inputs, value: float, place: int) -> list[Tensor]:
    first, *others = [t.clone() for t in tuple(inputs)]
    first[torch.unravel_index(torch.tensor(place % first.numel()), first.shape)] = value
    outputs = network(first, *others)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


LEAF = K.Leaf.of(torch.zeros(2, 2, 1, 1))


@pytest.mark.parametrize(
    ("kernel", "zeros"),
    [
        (LEAF, False),
        (K.Place((2, 2, 3, 3), LEAF, (1, 1), (1, 1)), True),
        (K.Sum((2, 2, 3, 3), (K.Place((2, 2, 3, 3), LEAF, (1, 1), (1, 1)), K.Leaf.of(torch.zeros(2, 2, 3, 3)))), False),
        (K.Dirac((2, 2, 1, 1)), True),
        (K.Dirac((2, 1, 1, 1)), False),
        (K.scale(LEAF, K.Constant((), 0.0)), False),
        (K.Sum((2, 2, 1, 1), (LEAF, K.scale(LEAF, K.Constant((), -1.0)))), False),
        (K.Map((2, 2, 1, 1), torch.tril, (LEAF,)), False),
    ],
    ids=["numbers", "enlarged", "covered", "dense identity", "identity", "times zero", "cancelled", "computed"],
)
def test_a_zero_by_construction_is_no_zero_by_value(kernel: K.Kernel, zeros: bool):
    assert has_zeros(kernel) is zeros
