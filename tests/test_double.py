"""The certificate's own convolutions in float64 are torch's."""

import pytest
import torch
import torch.nn.functional as F

from fxrep import kernel as K
from fxrep.double import Contracting, InDouble
from fxrep.evaluation import Doubles
from fxrep.rows import blocks
from fxrep.sketch import channel_numbers

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# stride, padding, dilation
GEOMETRY = {
    "plain": (1, 0, 1), "padded": (1, 1, 1), "strided": (2, 1, 1), "dilated": (1, 2, 2), "all": (3, 2, 2),
    "longer than the map": (9, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("dims", CONVOLVE)
def test_it_is_torchs_convolution(dims, name, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *(7, 8, 9)[:dims], dtype=torch.float64)
    weight = torch.randn(6, 1, *(3, 2, 3)[:dims], dtype=torch.float64)
    vector = torch.randn(6, dtype=torch.float64) if bias else None
    expected = CONVOLVE[dims](x, weight, vector, *GEOMETRY[name], groups=6)
    with InDouble(Doubles()):
        got = CONVOLVE[dims](x, weight, vector, *GEOMETRY[name], groups=6)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-14)


def test_different_geometry_on_each_axis():
    x, weight = torch.randn(1, 4, 11, 12, dtype=torch.float64), torch.randn(4, 1, 3, 1, dtype=torch.float64)
    arguments = {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1), "groups": 4}
    expected = F.conv2d(x, weight, **arguments)
    with InDouble(Doubles()):
        assert torch.allclose(F.conv2d(x, weight, **arguments), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((8, 1, 3, 3), {"groups": 4}), ((4, 2, 3, 3), {"groups": 2}), ((4, 4, 3, 3), {}), ((4, 1, 7, 7), {"groups": 4}),
     ((4, 1, 2, 2), {"groups": 4, "padding": "same"})],
    ids=["two rows a channel", "groups", "dense", "many taps", "same"],
)  # fmt: skip
def test_all_else_is_torchs_own(shape, options):
    x, weight = torch.randn(1, 4, 9, 9, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    expected = F.conv2d(x, weight, **options)
    with InDouble(Doubles()):
        assert torch.equal(F.conv2d(x, weight, **options), expected)


def test_one_row_a_group_of_several_channels():
    """What the certificate makes of a grouped convolution when it sums the rows of each group."""
    x, weight = torch.randn(1, 64, 9, 9, dtype=torch.float64), torch.randn(32, 2, 3, 3, dtype=torch.float64)
    expected = F.conv2d(x, weight, groups=32)
    with InDouble(Doubles()):
        assert torch.equal(F.conv2d(x, weight, groups=32), expected)


def test_an_unbatched_map_is_torchs_own():
    x, weight = torch.randn(4, 9, 9, dtype=torch.float64), torch.randn(4, 1, 3, 3, dtype=torch.float64)
    with InDouble(Doubles()):
        assert F.conv2d(x, weight, groups=4).shape == (4, 7, 7)


@pytest.mark.parametrize("name", [n for n in GEOMETRY if n != "longer than the map"])
def test_a_dense_float32_weight_is_taken_as_it_is_stored(name):
    """More entries than a block has rows for: several products."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 300, 7, 8, dtype=torch.float64), torch.randn(150, 300, 3, 2)
    vector = torch.randn(150, dtype=torch.float64)
    expected = F.conv2d(x, weight.double(), vector, *GEOMETRY[name])
    with InDouble(Doubles()):
        got = F.conv2d(x, weight, vector, *GEOMETRY[name])
    assert got.dtype == torch.float64
    assert torch.allclose(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(600,), (3, 600), (2, 5, 600)], ids=str)
def test_a_linear_layer(shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(400, 600), torch.randn(400).double()
    with InDouble(Doubles()):
        got = F.linear(x, weight, bias)
    assert torch.allclose(got, F.linear(x, weight.double(), bias), rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize(("rows", "groups"), [(150, 1), (12, 6), (300, 300), (600, 300)], ids=str)
@pytest.mark.parametrize("dims", CONVOLVE)
def test_a_product_of_channels_and_one_map(dims, rows, groups, name, bias):
    """Dense, grouped and channel-wise, of a weight as it is stored."""
    torch.manual_seed(0)
    channels, one = torch.randn(300).double(), torch.randn(2, 1, *(7, 8, 9)[:dims], dtype=torch.float64)
    weight = torch.randn(rows, 300 // groups, *(3, 2, 3)[:dims])
    vector = torch.randn(rows, dtype=torch.float64) if bias else None
    mode = InDouble(Doubles())
    x = mode.product(channels, one, -dims - 1)
    assert torch.equal(x, channels.reshape(-1, *(1,) * dims) * one)
    with mode:
        got = CONVOLVE[dims](x, weight, vector, *GEOMETRY[name], groups=groups)
    expected = CONVOLVE[dims](x, weight.double(), vector, *GEOMETRY[name], groups=groups)
    assert got.dtype == torch.float64
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-11)


def test_products_of_several_sizes_with_the_same_channels():
    """What was contracted for the first is used for the second, but not for other channels or another weight."""
    torch.manual_seed(0)
    mode, weight, other = InDouble(Doubles()), torch.randn(7, 5, 3, 3), torch.randn(7, 5, 3, 3)
    a, b = torch.randn(2, 5).double()
    for size in (4, 6):
        mode.forget_products()
        for channels in (a, b):
            x = mode.product(channels, torch.randn(1, 1, size, size, dtype=torch.float64), -3)
            for w in (weight, other):
                with mode:
                    got = F.conv2d(x, w, padding=1)
                assert torch.allclose(got, F.conv2d(x, w.double(), padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_a_product_along_another_axis_is_any_map(axis):
    """Channels of the product that are not those of the convolution, nor of the linear layer."""
    torch.manual_seed(0)
    mode, shape = InDouble(Doubles()), [2, 5, 5, 5]
    shape[axis] = 1
    x = mode.product(torch.randn(5).double(), torch.randn(shape).double(), axis)
    weight, matrix = torch.randn(4, 5, 3, 3).double(), torch.randn(6, 5).double()
    expected = F.conv2d(x, weight), F.linear(x, matrix)
    with mode:
        got = F.conv2d(x, weight), F.linear(x, matrix)
    assert all(torch.allclose(g, e, rtol=0, atol=1e-13) for g, e in zip(got, expected, strict=True))


def test_a_product_that_was_written_since_is_any_map():
    mode, weight = InDouble(Doubles()), torch.randn(4, 5, 3, 3).double()
    x = mode.product(torch.randn(5).double(), torch.randn(1, 1, 6, 6).double(), -3)
    x[0, 0, 2, 2] += 1.0
    expected = F.conv2d(x, weight)
    with mode:
        assert torch.allclose(F.conv2d(x, weight), expected, rtol=0, atol=1e-13)


def test_values_of_another_type_are_left_to_torch():
    x, weight = torch.randn(1, 64, 5, 5), torch.randn(64, 64, 3, 3)
    with InDouble(Doubles()):
        assert torch.equal(F.conv2d(x, weight), F.conv2d(x, weight.clone()))


@pytest.mark.parametrize("shape", [(96, 400, 3, 3), (900, 100, 1, 1), (900, 100)], ids=str)
def test_what_was_folded_is_not_contracted_again(shape: tuple[int, ...]):
    """The contraction of a weight is that of its stored numbers, whatever the fold makes of the rows that it reads."""
    weight, gain = torch.randn(shape), torch.rand(shape[0])
    doubles, channels = Contracting(), channel_numbers(shape[1])
    read = blocks(K.ScaleRows(shape, K.Leaf.of(weight), K.Leaf.of(gain)), doubles)
    next(read)
    assert doubles.contracted(weight, channels) is None, "not all of it was read"
    assert len(list(read)) > 0
    got = doubles.contracted(weight, channels)
    expected = torch.einsum("oc...,c->o...", weight.double(), channels)
    assert got is not None
    assert torch.allclose(got.reshape(expected.shape), expected, rtol=0, atol=1e-11)
    assert doubles.contracted(weight, channels.clone()) is None, "other numbers"
    assert doubles.contracted(weight.clone(), channels) is None, "another tensor"
