"""The algebra over random geometry that is legal by construction: it associates and distributes, and torch agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from layers import Layer, execute, layer, random
from torch import Tensor

from fxrep.affine import AffineConv, add
from fxrep.composition import compose

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHANNELS = 4
Draw = st.DrawFn


@dataclass(frozen=True)
class Case:
    """Layers, and an input on which each of them gives at least one pixel."""

    layers: tuple[Layer, ...]
    x: Tensor


def per_axis(draw: Draw, dims: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, most)) for _ in range(dims))


def sizes_for(operators: Sequence[AffineConv], out: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest input from which the operators, applied in this order, give at least `out`."""
    for operator in reversed(operators):
        crops = tuple(-min(lo, 0) - min(hi, 0) for lo, hi in zip(operator.pad_lo, operator.pad_hi, strict=True))
        reach = zip(out, operator.stride, operator.net_pad, crops, strict=True)
        out = tuple(max((n - 1) * s + 1 - net, crop + 1) for n, s, net, crop in reach)
    return out


def numbers(draw: Draw, dims: int, sizes: tuple[int, ...]) -> Tensor:
    grown = tuple(n + extra for n, extra in zip(sizes, per_axis(draw, dims, 0, 3), strict=True))
    return random(draw(st.integers(0, 99)), 2, CHANNELS, *grown)


def random_layer(draw: Draw, dims: int, seed: int, k: Any, **geometry: Any) -> Layer:
    options = {"g": draw(st.sampled_from((1, 2, 4))), "d": per_axis(draw, dims, 1, 2), "bias": False} | geometry
    return layer(dims, CHANNELS, CHANNELS, k=k, seed=seed, **options)


@st.composite
def chains(draw: Draw) -> Case:
    """Three layers, the first one first. Only over one-tap layers without bias or crop does a later one pad."""
    dims = draw(st.integers(1, 3))
    still = draw(st.integers(0, 2))  # this many layers with one tap come first
    layers, clean = [], True
    for i in range(3):
        k = per_axis(draw, dims, 1, 1 if i < still else 3)
        least, most = (0, 2) if i < still else (-1, 3 if clean else 0)
        lo, hi = per_axis(draw, dims, least, most), per_axis(draw, dims, least, most)
        bias = i >= still and draw(st.booleans())
        layers.append(random_layer(draw, dims, i, k, s=per_axis(draw, dims, 1, 3), lo=lo, hi=hi, bias=bias))
        clean = clean and i < still
    sizes = sizes_for([one.operator for one in layers], (2,) * dims)
    return Case(tuple(layers), numbers(draw, dims, sizes))


@st.composite
def sums(draw: Draw, branches: int = 3) -> Case:
    """Branches of one stride and one net padding, of any kernels, dilations, groups and shifts."""
    dims = draw(st.integers(1, 3))
    stride, net = per_axis(draw, dims, 1, 2), per_axis(draw, dims, -2, 1)
    layers = []
    for i in range(branches):
        k, d, lo = per_axis(draw, dims, 1, 3), per_axis(draw, dims, 1, 3), per_axis(draw, dims, -1, 3)
        hi = tuple(n + di * (ki - 1) - low for n, di, ki, low in zip(net, d, k, lo, strict=True))
        layers.append(random_layer(draw, dims, i, k, d=d, s=stride, lo=lo, hi=hi, bias=draw(st.booleans())))
    least = [sizes_for([one.operator], (2,) * dims) for one in layers]
    return Case(tuple(layers), numbers(draw, dims, tuple(max(axis) for axis in zip(*least, strict=True))))


def assert_gives(operator: AffineConv, x: Tensor, expected: Tensor) -> None:
    got = execute(operator, x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1.0), operator.describe()


def test_composition_is_associative_and_is_the_sequence():
    seen: Counter[str] = Counter()

    @QUICK
    @given(chains())
    def check(case: Case) -> None:
        first, second, third = (one.operator for one in case.layers)
        expected = case.layers[2].run(case.layers[1].run(case.layers[0].run(case.x)))
        assert_gives(compose(compose(third, second), first), case.x, expected)
        assert_gives(compose(third, compose(second, first)), case.x, expected)
        seen.update(_features((first, second, third)))

    check()
    for feature in ("second pads", "third pads", "third crops", "strides", "grids", "groups"):
        assert seen[feature] >= 5, f"{feature}: {seen[feature]} of {seen['all']} examples"


def _features(operators: tuple[AffineConv, ...]) -> list[str]:
    names = zip(("first", "second", "third"), operators, strict=True)
    found = ["all"] + [f"{name} pads" for name, o in names if o.pads]
    found += ["third crops"] if min(operators[2].pad_lo + operators[2].pad_hi) < 0 else []
    found += ["strides"] if sum(max(o.stride) > 1 for o in operators) > 1 else []
    found += ["grids"] if len({d for o in operators for d in o.dilation if not o.is_one_tap}) > 1 else []
    found += ["groups"] if len({o.groups for o in operators}) > 1 else []
    for feature in found:
        event(feature)
    return found


@QUICK
@given(sums())
def test_addition_is_associative_and_commutative_and_is_the_sum(case: Case):
    a, b, c = (one.operator for one in case.layers)
    expected = sum((one.run(case.x) for one in case.layers), torch.zeros((), dtype=torch.float64))
    for operator in (add(add(a, b), c), add(a, add(b, c)), add(c, add(b, a))):
        assert_gives(operator, case.x, expected)
    event(f"groups: {add(a, b).groups}")


@QUICK
@given(sums(branches=2), st.sampled_from((1, 2, 4)), st.integers(1, 2), st.integers(1, 3))
def test_composition_distributes_over_addition(case: Case, groups: int, stride: int, taps: int):
    a, b = (one.operator for one in case.layers)
    outer = layer(a.dims, CHANNELS, CHANNELS, k=taps, s=stride, g=groups, bias=True, seed=9)
    least = [sizes_for([one, outer.operator], (2,) * a.dims) for one in (a, b)]
    x = random(5, 2, CHANNELS, *(max(axis) for axis in zip(*least, strict=True)))
    expected = outer.run(case.layers[0].run(x) + case.layers[1].run(x))
    assert_gives(compose(outer.operator, add(a, b)), x, expected)
    assert_gives(add(compose(outer.operator, a), compose(outer.operator.without_bias(), b)), x, expected)


@QUICK
@given(chains(), st.lists(st.integers(0, CHANNELS - 1), min_size=1, max_size=6))
def test_taking_rows_commutes_with_composition(case: Case, rows: list[int]):
    inner, outer = case.layers[0], case.layers[1]
    expected = outer.run(inner.run(case.x))[:, rows]
    taken, columns = compose(outer.operator, inner.operator).take(tuple(rows))
    assert_gives(taken, _channels(case.x, columns), expected)
    last, middle = outer.operator.take(tuple(rows))
    first, columns = (inner.operator, None) if middle is None else inner.operator.take(middle)
    assert_gives(compose(last, first), _channels(case.x, columns), expected)


def _channels(x: Tensor, columns: tuple[int, ...] | None) -> Tensor:
    return x if columns is None else x[:, list(columns)]
