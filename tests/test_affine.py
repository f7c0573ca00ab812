"""The algebra of operators, against torch's own layers run in sequence, summed and concatenated, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layers import Layer, assert_equal, execute, image, layer, random, same, scale, transposed
from torch import Tensor

from fxrep import affine
from fxrep import kernel as K
from fxrep.affine import AffineConv, add, stack
from fxrep.composition import compose
from fxrep.evaluation import evaluate

SPATIAL = (1, 2, 3)
ANY = (0, *SPATIAL)
BIAS = random(2, 4)  # of every layer(c_out=4, bias=True, seed=1)


def composed(outer: Layer, inner: Layer) -> AffineConv:
    """outer ∘ inner, compared with torch's layers one after the other."""
    operator = compose(outer.operator, inner.operator)
    assert_equal(operator, lambda x: outer.run(inner.run(x)), inner.operator.in_channels)
    return operator


def added(a: Layer, b: Layer) -> AffineConv:
    """a + b and b + a, compared with the sum of torch's layers."""
    for first, second in ((b, a), (a, b)):
        operator = add(first.operator, second.operator)
        assert_equal(operator, lambda x: a.run(x) + b.run(x), a.operator.in_channels)
    return operator


# name -> (outer, inner) for a number of dimensions.
SEQUENCES: dict[str, Callable[[int], tuple[Layer, Layer]]] = {
    "1x1 then padded 3x3": lambda n: (layer(n, k=3, lo=1, bias=True), layer(n, 3, 4, seed=5)),
    "biased 1x1 then unpadded 3x3": lambda n: (layer(n, k=3, bias=True), layer(n, 3, 4, bias=True, seed=5)),
    "3x3 then biased 1x1": lambda n: (layer(n, 4, 5, bias=True), layer(n, 3, 4, k=3, lo=1, bias=True, seed=5)),
    "3x3 then 2x2": lambda n: (layer(n, k=2), layer(n, k=3, lo=1, bias=True, seed=5)),
    "strides 2 and 3": lambda n: (layer(n, k=2, s=3, bias=True), layer(n, k=3, s=2, lo=1, seed=5)),
    "strided 1x1 then padded 3x3": lambda n: (layer(n, k=3, s=2, lo=1), layer(n, s=2, seed=5)),
    "stride 3 then dilation 2": lambda n: (layer(n, k=2, d=2), layer(n, k=2, s=3, lo=3, seed=5)),
    "dilations 2 and 3": lambda n: (layer(n, k=2, d=3), layer(n, k=3, d=2, lo=2, seed=5)),
    "dilations 4 and 2 on a grid of 2": lambda n: (layer(n, k=2, d=4), layer(n, k=2, d=2, lo=2, seed=5)),
    "asymmetric pads": lambda n: (layer(n, k=2, bias=True), layer(n, k=3, lo=2, hi=0, bias=True, seed=5)),
    "padded on one side over 1x1": lambda n: (layer(n, k=3, lo=0, hi=2), layer(n, s=2, seed=5)),
    "crop after padding": lambda n: (layer(n, lo=-1, hi=-2, bias=True), layer(n, k=3, lo=2, bias=True, seed=5)),
    "crop before padding on the other side": lambda n: (layer(n, k=2, lo=1, hi=0), layer(n, lo=0, hi=-1, seed=5)),
    "crop of a strided map": lambda n: (layer(n, k=2, lo=-1, hi=0), layer(n, k=2, s=2, lo=1, bias=True, seed=5)),
    "groups 2 after groups 4": lambda n: (layer(n, k=2, g=2), layer(n, k=2, g=4, bias=True, seed=5)),
    "groups 2 after groups 3": lambda n: (layer(n, 6, 4, k=2, g=2), layer(n, 3, 6, k=2, g=3, bias=True, seed=5)),
    "pointwise after depthwise": lambda n: (layer(n, 4, 6), layer(n, k=3, lo=1, g=4, bias=True, seed=5)),
    "depthwise after pointwise": lambda n: (layer(n, k=3, lo=1, g=4, bias=True), layer(n, 3, 4, seed=5)),
    "depthwise with a multiplier": lambda n: (layer(n, 8, 4, k=2, g=4), layer(n, 4, 8, k=2, g=4, bias=True, seed=5)),
    "per-channel affine before": lambda n: (layer(n, k=3, g=2, bias=True), scale(n, bias=True, seed=5)),
    "per-channel affine after": lambda n: (scale(n, bias=True), layer(n, k=3, lo=1, g=2, bias=True, seed=5)),
    "scalar before, ungrouped": lambda n: (layer(n, k=3, lo=1), scale(n, scalar=True, seed=5)),
    "scalar before, grouped": lambda n: (layer(n, k=3, lo=1, g=2), scale(n, scalar=True, seed=5)),
    "scalar after, grouped": lambda n: (scale(n, scalar=True), layer(n, k=3, lo=1, g=2, bias=True, seed=5)),
    "affine after affine": lambda n: (scale(n, bias=True), scale(n, bias=True, seed=5)),
    "identity before": lambda n: (layer(n, k=3, lo=1, bias=True), same(n)),
    "identity after": lambda n: (same(n), layer(n, 3, 4, k=3, s=2, lo=1, bias=True, seed=5)),
    "pads with the bias before it": lambda n: (layer(n, k=3, lo=1, fill=BIAS), layer(n, 3, 4, bias=True)),
    "a padded 1x1 with bias": lambda n: (layer(n, k=3, bias=True), layer(n, 3, 4, lo=1, bias=True)),
    "padding twice with the bias between": lambda n: (layer(n, k=3, lo=1, fill=BIAS), layer(n, 3, 4, lo=1, bias=True)),
    "a fill under taps": lambda n: (layer(n, k=2, bias=True), layer(n, 3, 4, k=3, lo=1, bias=True, fill=random(9, 3))),
}  # fmt: skip


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("name", SEQUENCES)
def test_compose_is_the_layers_in_sequence(name, dims):
    composed(*SEQUENCES[name](dims))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", SPATIAL)
def test_compose_with_other_paddings(dims, mode):
    composed(layer(dims, k=2, s=2, bias=True), layer(dims, k=3, lo=2, bias=True, mode=mode, seed=5))
    composed(layer(dims, k=3, lo=1, bias=True, mode=mode), layer(dims, 3, 4, bias=True, seed=5))
    operator = composed(layer(dims, k=3, lo=2, mode=mode, g=2), scale(dims, bias=True, seed=5))
    assert operator.mode == mode


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_a_mirrored_border_is_seen_before_the_crop(dims, mode):
    composed(layer(dims, k=2, lo=0, hi=-2, bias=True), layer(dims, k=3, lo=1, bias=True, mode=mode, seed=5))


@pytest.mark.parametrize(("k", "lo"), [((3, 1), (0, 0)), ((3, 3), (0, 1)), ((1, 5), (0, 2)), ((1, 1), (0, 3))])
def test_separable_kernels_pad_each_axis_once(k, lo):
    """After (3, 1) the outer may pad the axis along which the inner has one tap."""
    inner = layer(2, 3, 4, k=(3, 1), lo=(1, 0), seed=5)
    operator = composed(layer(2, k=k, lo=lo, bias=True), inner)
    assert (operator.pad_lo, operator.pad_hi) == ((1, lo[1]), (1, lo[1]))
    composed(layer(2, k=k, s=(2, 1), bias=True), inner)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_separable_kernels_with_one_other_padding(mode):
    inner = layer(2, k=(3, 1), lo=(1, 0), bias=True, mode=mode, seed=5)
    composed(layer(2, k=(1, 3), lo=(0, 1), bias=True, mode=mode), inner)


def test_per_axis_geometry():
    inner = layer(3, 3, 4, k=(2, 3, 1), s=(1, 2, 1), lo=(1, 0, 0), hi=(0, 1, 0), d=(2, 1, 1), seed=5)
    operator = composed(layer(3, k=(1, 2, 3), s=(2, 1, 1), lo=(0, 0, 1), d=(1, 1, 2), bias=True), inner)
    assert (operator.stride, operator.taps, operator.dilation) == ((2, 2, 1), (2, 5, 3), (2, 1, 2))


TRANSPOSED = [
    {"k": 3},
    {"k": 4, "s": 2, "p": 1},
    {"k": 3, "s": 2, "p": 1, "extra": 1},
    {"k": 2, "s": 3, "d": 2, "g": 2},
]


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("geometry", TRANSPOSED, ids=str)
def test_transposed_composes_with_pointwise(dims, geometry):
    composed(layer(dims, 4, 5, bias=True), transposed(dims, 6, 4, bias=True, seed=5, **geometry))
    composed(transposed(dims, 6, 4, bias=True, **geometry), layer(dims, 3, 6, seed=5))
    composed(scale(dims, bias=True), transposed(dims, 6, 4, bias=True, seed=5, **geometry))
    composed(transposed(dims, 6, 4, **geometry), scale(dims, 6, seed=5))


def test_linear_layers_compose():
    composed(layer(0, 4, 5, bias=True), layer(0, 3, 4, bias=True, seed=5))
    composed(layer(0, 4, 5), scale(0, bias=True, seed=5))
    composed(layer(0, 4, 6, g=2, bias=True), layer(0, 8, 4, g=4, bias=True, seed=5))
    composed(same(0), layer(0, 3, 4, bias=True, seed=5))


SUMS: dict[str, Callable[[int], tuple[Layer, Layer]]] = {
    "3x3 + 1x1": lambda n: (layer(n, k=3, lo=1, bias=True), layer(n, bias=True, seed=5)),
    "5x5 + 3x3, strided": lambda n: (layer(n, k=5, s=2, lo=2), layer(n, k=3, s=2, lo=1, bias=True, seed=5)),
    "3x3 + identity": lambda n: (layer(n, k=3, lo=1, bias=True), same(n)),
    "depthwise 3x3 + identity": lambda n: (layer(n, k=3, lo=1, g=4), same(n)),
    "grouped 3x3 + affine": lambda n: (layer(n, k=3, lo=1, g=2), scale(n, bias=True, seed=5)),
    "1x1 + scalar": lambda n: (layer(n), scale(n, scalar=True, seed=5)),
    "even and odd": lambda n: (layer(n, k=4, lo=1, hi=2), layer(n, k=3, lo=1, bias=True, seed=5)),
    "even kernels, opposite sides": lambda n: (layer(n, k=2, lo=1, hi=0), layer(n, k=2, lo=0, hi=1, seed=5)),
    "dilations 2 and 3": lambda n: (layer(n, k=3, d=2, lo=2, bias=True), layer(n, k=3, d=3, lo=3, seed=5)),
    "dilations 4 and 2": lambda n: (layer(n, k=3, d=4, lo=4), layer(n, k=5, d=2, lo=4, seed=5)),
    "dilation 2 + 1x1": lambda n: (layer(n, k=3, d=2, lo=2), layer(n, seed=5)),
    "taps off the grid": lambda n: (layer(n, k=2, d=4, lo=2), layer(n, k=1, lo=1, hi=-1, seed=5)),
    "groups 4 and 2": lambda n: (layer(n, k=3, lo=1, g=4), layer(n, k=1, g=2, bias=True, seed=5)),
    "groups 2 and 3": lambda n: (layer(n, 6, 6, k=3, lo=1, g=2), layer(n, 6, 6, g=3, bias=True, seed=5)),
    "unpadded 3x3 + cropped input": lambda n: (layer(n, k=3), layer(n, lo=-1, bias=True, seed=5)),
    "shifts": lambda n: (layer(n, lo=2, hi=-2), layer(n, lo=-1, hi=1, bias=True, seed=5)),
    "identity + identity": lambda n: (same(n), same(n)),
    "the same fill": lambda n: (layer(n, k=3, lo=1, fill=BIAS, bias=True), layer(n, k=5, lo=2, fill=BIAS, seed=5)),
    "a fill + none needed": lambda n: (layer(n, k=3, lo=1, fill=BIAS, bias=True), layer(n, seed=5)),
}  # fmt: skip


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("name", SUMS)
def test_add_is_the_sum_of_the_layers(name, dims):
    added(*SUMS[name](dims))


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_add_with_other_paddings(dims, mode):
    wide = layer(dims, k=5, lo=2, bias=True, mode=mode)
    assert added(wide, layer(dims, k=3, lo=1, mode=mode, seed=5)).mode == mode
    assert added(wide, layer(dims, seed=5)).mode == mode
    assert added(wide, same(dims)).mode == mode


def test_add_of_strips():
    """ACNet: 3x3 + 1x3 + 3x1."""
    square, lying = layer(2, k=3, lo=1, bias=True), layer(2, k=(1, 3), lo=(0, 1), seed=5)
    operator = added(square, lying)
    assert operator.taps == (3, 3)
    standing = layer(2, k=(3, 1), lo=(1, 0), seed=9)
    strips = added(lying, standing)
    assert strips.taps == (3, 3)
    assert evaluate(strips.weight)[:, :, 0, 0].abs().max() == 0


@pytest.mark.parametrize("dims", SPATIAL)
def test_add_of_transposed(dims):
    wide = transposed(dims, k=4, s=2, p=1, bias=True)
    added(wide, transposed(dims, k=2, s=2, seed=5))
    added(transposed(dims, k=3, s=2, p=1, extra=1, g=2), transposed(dims, k=2, s=2, bias=True, seed=5))


def test_add_of_linear_layers():
    added(layer(0, bias=True), layer(0, seed=5))
    added(layer(0, g=2, bias=True), same(0))


def test_add_keeps_what_the_narrower_branch_had_no_need_of():
    operator = added(layer(2, k=3, lo=1, d=2, hi=3, bias=True), layer(2, k=1, seed=5))
    assert (operator.groups, operator.dilation, operator.taps) == (1, (1, 1), (5, 5))


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("gain", [random(7, 6), random(8)], ids=["rows", "scalar"])
def test_scaled(dims, gain):
    plain = layer(dims, 4, 6, k=3, lo=1, g=2, bias=True)
    across = gain.reshape(-1, *(1,) * dims) if gain.ndim else gain
    assert_equal(plain.operator.scaled(K.Leaf.of(gain)), lambda x: across * plain.run(x), 4)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_regrouped(dims, groups):
    plain = layer(dims, 8, 12, k=2, lo=1, g=4, bias=True)
    operator = plain.operator.regrouped(groups)
    assert operator.groups == groups
    assert_equal(operator, plain.run, 8)
    assert_equal(affine.identity(8, dims).regrouped(groups), lambda x: x, 8)


@pytest.mark.parametrize("dims", SPATIAL)
def test_regrouped_transposed(dims):
    plain = transposed(dims, 8, 12, k=3, s=2, p=1, g=4, bias=True)
    assert_equal(plain.operator.regrouped(2), plain.run, 8)


def taken(plain: Layer, rows: tuple[int, ...], channels: int) -> tuple[AffineConv, tuple[int, ...] | None]:
    """A[rows] on the columns it asks for, compared with the channels `rows` of torch's layer."""
    operator, columns = plain.operator.take(rows)
    x = image(operator.dims, channels)
    got = execute(operator, x if columns is None else x[:, list(columns)])
    assert torch.allclose(got, plain.run(x)[:, list(rows)], rtol=0, atol=1e-12)
    return operator, columns


ROWS = [(0, 1, 2), (3, 4, 5), (5,), (2, 1, 0), (3, 5, 4, 1, 0, 2), (0, 0, 4), (1, 4), tuple(range(6))]


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_take(dims, rows, groups):
    taken(layer(dims, 4, 6, k=3, lo=1, g=groups, bias=True), rows, 4)
    taken(scale(dims, 6, bias=True), rows, 6)
    taken(same(dims, 6), rows, 6)


def test_take_of_whole_groups_reads_their_columns_alone():
    assert affine.identity(6, 2).take((4, 1))[0].is_identity
    operator, columns = taken(layer(2, 6, 6, k=3, lo=1, g=3, bias=True, fill=random(9, 6)), (4, 5, 1, 0), 6)
    assert (operator.groups, columns) == (2, (4, 5, 0, 1))
    operator, columns = taken(layer(2, 6, 6, k=3, g=3), (4, 1), 6)
    assert (operator.groups, columns) == (1, None)


@pytest.mark.parametrize("dims", SPATIAL)
def test_take_of_transposed(dims):
    for rows in ((0, 1), (2, 3, 1, 0), (1,)):
        taken(transposed(dims, 6, 4, k=3, s=2, p=1, g=2, bias=True), rows, 6)


@pytest.mark.parametrize("dims", ANY)
@pytest.mark.parametrize("groups", [1, 2])
def test_columns_are_the_parts_of_a_layer_over_a_concatenation(dims, groups):
    plain = layer(dims, 6, 4, k=3, lo=1, s=2, g=groups, bias=True, fill=None if not dims else random(9, 6))
    x = image(dims, 6)
    parts = [execute(plain.operator.columns(lo, hi), x[:, lo:hi]) for lo, hi in ((0, 1), (1, 4), (4, 6))]
    bias = evaluate(plain.operator.bias).reshape(-1, *(1,) * dims)
    assert torch.allclose(sum(parts) + bias, plain.run(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", ANY)
def test_stack_on_the_same_input(dims):
    a, b = layer(dims, 4, 3, k=3, lo=1), layer(dims, 4, 6, g=2, seed=5)
    operator = stack(a.operator, b.operator, same_input=True)
    assert_equal(operator, lambda x: torch.cat([a.run(x), b.run(x)], 1), 4)


@pytest.mark.parametrize("dims", ANY)
def test_stack_side_by_side(dims):
    a, b = layer(dims, 4, 6, k=3, lo=1, g=2), layer(dims, 2, 3, seed=5)
    operator = stack(a.operator, b.operator, same_input=False)
    assert operator.groups == 3
    assert_equal(operator, lambda x: torch.cat([a.run(x[:, :4]), b.run(x[:, 4:])], 1), 6)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("same_input", [True, False])
def test_stack_keeps_the_padding_of_the_padded_part(first, same_input):
    both = [layer(2, k=3, lo=1, mode="reflect"), layer(2, seed=5)]
    a, b = both[first], both[1 - first]

    def expected(x: Tensor) -> Tensor:
        return torch.cat([a.run(x), b.run(x)] if same_input else [a.run(x[:, :4]), b.run(x[:, 4:])], 1)

    assert_equal(stack(a.operator, b.operator, same_input), expected, 4 if same_input else 8)


def test_stack_of_operators_with_one_fill():
    a, b = layer(2, 2, 4, k=3, lo=1, fill=random(9, 2)), layer(2, 2, 4, k=3, lo=1, fill=random(9, 2), seed=5)
    operator = stack(a.operator, b.operator, same_input=False)
    assert_equal(operator, lambda x: torch.cat([a.run(x[:, :2]), b.run(x[:, 2:])], 1), 4)


def test_a_fill_that_is_never_inserted_is_forgotten():
    inner = layer(2, 3, 4, lo=1, fill=random(9, 3))
    cropped = composed(layer(2, lo=-1, seed=5), inner)
    unpadded = Layer(cropped, lambda x: layer(2, lo=-1, seed=5).run(inner.run(x)))
    composed(layer(2, k=3, lo=1, seed=9), unpadded)


def test_outside_is_what_an_operator_gives_beyond_its_input():
    plain = layer(2, 3, 4, lo=2, bias=True, fill=random(9, 3))
    corner = plain.run(image(2, 3))[0, :, 0, 0]
    assert torch.allclose(evaluate(plain.operator.outside()), corner, rtol=0, atol=1e-12)
    assert layer(2, k=3, lo=1).operator.outside() is None


def test_a_pointwise_transposed_operator_is_pointwise():
    operator = transposed(2, 6, 4, k=1, g=2, bias=True).operator
    assert (operator.transposed, operator.is_pointwise) == (False, True)
    assert_equal(operator, transposed(2, 6, 4, k=1, g=2, bias=True).run, 6)
    assert transposed(2, k=1, s=2).operator.transposed


@pytest.mark.parametrize(("lo", "hi", "k", "d"), [(1, 1, 3, 1), (2, 0, 3, 1), (-1, 3, 2, 2), (0, 0, 1, 3)])
def test_net_pad_decides_the_output_size(lo, hi, k, d):
    plain = layer(1, k=k, lo=lo, hi=hi, d=d)
    x = image(1, 4)
    assert plain.run(x).shape[-1] - x.shape[-1] == plain.operator.net_pad[0]


IDENTITY = affine.identity(4, 2)
KINDS = {  # what: (operators that are it, operators that are not)
    "is_identity": ([IDENTITY], [scale(2).operator, replace(IDENTITY, bias=K.Leaf.of(BIAS)), layer(2, g=4).operator]),
    "is_diagonal": ([IDENTITY, scale(2).operator], [layer(2).operator, layer(2, g=4, s=2).operator]),
    "is_pointwise": ([layer(2).operator], [layer(2, s=2).operator, layer(2, lo=1).operator, layer(2, k=3).operator]),
    "is_one_tap": ([layer(2, s=2, lo=1).operator], [layer(2, k=(1, 2)).operator]),
    "moves": ([layer(2, s=2).operator, layer(2, lo=-1).operator], [layer(2, d=2).operator]),
    "pads": ([layer(2, lo=-1, hi=1).operator], [layer(2, lo=-1).operator, transposed(2, k=3, p=1).operator]),
}


@pytest.mark.parametrize("what", KINDS)
def test_what_an_operator_is(what):
    those, others = KINDS[what]
    assert all(getattr(o, what) for o in those)
    assert not any(getattr(o, what) for o in others)


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (layer(0, 3, 4).operator, "Linear(3, 4)"),
        (layer(2, 3, 4, k=3, lo=1).operator, "Conv2d(3, 4, k3x3 s1 p1)"),
        (layer(2, 4, 6, k=(1, 3), s=2, lo=(0, 1), g=2).operator, "Conv2d(4, 6, k1x3 s2 p0x1 g2)"),
        (layer(1, k=2, lo=0, hi=1, d=2).operator, "Conv1d(4, 4, k2 s1 p0/1 d2)"),
        (transposed(3, k=2, s=2).operator, "ConvTranspose3d(4, 4, k2x2x2 s2 p0)"),
    ],
)
def test_describe(operator, text):
    assert operator.describe() == text
