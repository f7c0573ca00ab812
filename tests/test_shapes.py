"""What the symbolic sizes prove must hold for every integer; what they cannot prove they must not claim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from layers import layer, random, transposed

from fxrep.shapes import Axis, Dim, Product, Shape, Shapes, Size, free_axes, multiplied, shifted

HEIGHT, WIDTH = Axis("x", -2), Axis("x", -1)
N, M = Size(HEIGHT), Size(WIDTH)
steps = st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 5)), max_size=6)
sizes = st.integers(0, 60)


def number(dim: Dim, height: int = 0, width: int = 0) -> int:
    return Shapes().evaluate(dim, lambda axis: height if axis == HEIGHT else width)


def chained(dim: Dim, chain: list[tuple[int, int]]) -> Dim:
    for add, divide in chain:
        dim = shifted(dim, add, divide)
    return dim


@given(steps, sizes)
def test_nested_floors_collapse(chain: list[tuple[int, int]], n: int):
    """⌊(⌊(n+c)/s⌋ + a)/d⌋ = ⌊(n + c + s·a)/(s·d)⌋, for all integers: negative ones round down too."""
    dim = chained(N, chain)
    assert isinstance(dim, Size)
    assert dim.base == HEIGHT, "one floor, however many steps"
    assert number(dim, n) == chained(n, chain)
    event(f"steps: {len(chain)}")


@given(steps, steps)
def test_equal_expressions_are_equal_sizes_and_only_those(one: list[tuple[int, int]], other: list[tuple[int, int]]):
    shapes = Shapes()
    a, b = chained(N, one), chained(N, other)
    equal = all(number(a, n) == number(b, n) for n in range(200))
    assert shapes.same(Shape(None, (a,)), Shape(None, (b,))) == (a == b)
    assert equal or a != b
    event(f"proved: {a == b}, equal: {equal}")


@pytest.mark.parametrize("chain", [[(-1, 2), (1, 1)], [(1, 1), (-2, 2)], [(2, 3), (-1, 2), (1, 1)]])
def test_the_order_of_floors_matters(chain):
    straight, reverse = chained(N, chain), chained(N, chain[::-1])
    assert straight != reverse
    assert any(number(straight, n) != number(reverse, n) for n in range(50))


GEOMETRIES = [
    {"k": 3, "lo": 1},
    {"k": 3, "s": 2},
    {"k": 2, "s": 3, "lo": 2, "hi": 0},
    {"k": 3, "d": 2, "lo": -1},
    {"s": 2},
]


@pytest.mark.parametrize("second", GEOMETRIES, ids=str)
@pytest.mark.parametrize("first", GEOMETRIES, ids=str)
def test_chains_of_convolutions_have_torchs_sizes(first, second):
    """n ↦ ⌊(n + pad_lo + pad_hi - d(k-1) - 1)/s⌋ + 1."""
    layers = [layer(1, 1, 1, **geometry) for geometry in (first, second)]
    dim: Dim = N
    for one in layers:
        (net,), (stride,) = one.operator.net_pad, one.operator.stride
        dim = shifted(dim, net - 1 + stride, stride)
    for n in range(20, 32):
        assert number(dim, n) == layers[1].run(layers[0].run(random(1, 1, 1, n))).shape[-1]


@pytest.mark.parametrize("geometry", [{"k": 3, "s": 2, "p": 1, "extra": 1}, {"k": 2, "s": 3}, {"k": 3, "d": 2, "p": 1}])
def test_transposed_convolutions_have_torchs_sizes(geometry):
    """n ↦ s(n - 1) + d(k-1) + 1 - pad_lo - pad_hi."""
    one = transposed(1, 1, 1, **geometry)
    operator = one.operator
    grown = multiplied(shifted(N, -1), operator.stride[0])
    dim = shifted(grown, operator.span[0] + 1 - operator.pad_lo[0] - operator.pad_hi[0])
    for n in (1, 2, 5, 8):
        assert number(dim, n) == one.run(random(1, 1, 1, n)).shape[-1]


symbols = st.sampled_from([N, M, Size(HEIGHT, 1, 2), Size(WIDTH, -3), Size(HEIGHT, 0, 4)])
factors = st.lists(st.one_of(st.integers(0, 6), symbols), min_size=1, max_size=5)


@given(factors, sizes, sizes)
def test_a_product_is_the_product(dims: list[Dim], height: int, width: int):
    expected = 1
    for dim in dims:
        expected *= number(dim, height, width)
    assert number(multiplied(*dims), height, width) == expected


@given(factors, st.randoms(use_true_random=False), st.integers(0, 5))
def test_a_product_has_one_form(dims: list[Dim], order, cut: int):
    """In any order and however it is bracketed."""
    shuffled = order.sample(dims, len(dims))
    assert multiplied(*shuffled) == multiplied(*dims)
    assert multiplied(multiplied(*dims[:cut]), *dims[cut:]) == multiplied(*dims)


def test_products_of_little():
    assert multiplied(2, 3, 4) == 24
    assert multiplied(N) == multiplied(1, N) == N
    assert multiplied(0, N) == 0
    assert multiplied() == 1
    assert multiplied(3, N, 2) == Size(Product((N, 6)))
    assert multiplied(shifted(multiplied(N, 2), 1), 2) != multiplied(N, 4)


@given(steps, sizes, sizes)
def test_a_shifted_product_is_one_floor_too(chain: list[tuple[int, int]], height: int, width: int):
    product = multiplied(N, M, 3)
    assert number(chained(product, chain), height, width) == chained(3 * height * width, chain)


def test_a_rank_learned_late_serves_earlier_values():
    shapes = Shapes()
    image = Shape("x")
    assert shapes.rank(image) is None
    assert shapes.dim(image, -4) == Size(Axis("x", -4))
    shapes.require_rank(image, 4)
    assert shapes.rank(image) == 4
    assert shapes.dim(image, -5) is None
    assert shapes.full(image) == Shape(None, tuple(Size(Axis("x", i)) for i in (-4, -3, -2, -1)))
    assert shapes.rank(Shape("x", (8,))) == 4, "other values on the same root"
    assert shapes.rank(Shape(None, (2, 3))) == 2


def test_the_first_fact_stays():
    shapes = Shapes()
    for rank in (4, 3):
        shapes.require_rank(Shape("x"), rank)
    assert shapes.rank(Shape("x")) == 4
    assert shapes.conflicts == {"x": 3}
    shapes.require_rank(Shape(None, (1, 2)), 5)
    assert shapes.rank(Shape(None, (1, 2))) == 2


def test_a_size_learned_late_serves_earlier_values():
    """A convolution takes only so many channels: what was computed from that axis before is then a number."""
    shapes = Shapes()
    image, half = Shape("x"), Shape("x", (Size(Axis("x", -1), 1, 2),))
    assert not shapes.same(half, Shape("x", (4,)))
    shapes.require_size(image, -1, 7)
    assert shapes.dim(image, -1) == 7
    assert shapes.dim(half, -1) == 4
    assert shapes.same(half, Shape("x", (4,)))
    assert shapes.evaluate(Size(Axis("x", -1), 3), lambda axis: pytest.fail("it is known")) == 10
    shapes.require_size(image, -1, 9)
    assert shapes.dim(image, -1) == 7


def test_a_size_that_is_no_axis_of_its_own_tells_nothing():
    """⌊n/2⌋ = 4 leaves n = 8 or n = 9."""
    shapes = Shapes()
    shapes.require_size(Shape("x", (Size(Axis("x", -1), 0, 2),)), -1, 4)
    shapes.require_size(Shape("x", (5,)), -1, 4)
    assert shapes.dim(Shape("x"), -1) == Size(Axis("x", -1))


def test_sizes_that_an_op_found_equal_are_those_of_the_earlier_value():
    """Of two concatenated values the later is as long as the earlier, whichever the op names first."""
    x, y = Shape("x"), Shape("y")
    for pair in ((x, y), (y, x)):
        shapes = Shapes({"x": x, "y": y, "z": Shape("z", (Size(Axis("z", -1), 2, 2),))})
        shapes.require_equal(*pair, -1)
        assert shapes.dim(y, -1) == shapes.dim(x, -1) == Size(Axis("x", -1))
        assert shapes.dim(Shape("y", (Size(Axis("y", -1), 3, 2),)), -1) == Size(Axis("x", -1), 3, 2)
        shapes.require_equal(Shape("z"), Shape("x", (Size(Axis("x", -1), 1, 4),)), -1)
        assert shapes.dim(shapes.of["z"], -1) == Size(Axis("x", -1), 9, 8)
        shapes.require_size(x, -1, 7)
        assert shapes.dim(y, -1) == 7
        assert shapes.dim(shapes.of["z"], -1) == 2


def test_sizes_that_cannot_be_told_apart_tell_nothing():
    """n = ⌊(n + 1)/2⌋ holds for some n; ⌊n/2⌋ = ⌊m/2⌋ leaves two m for each n."""
    shapes = Shapes({"x": Shape("x"), "y": Shape("y")})
    half_x, half_y = (Shape(root, (Size(Axis(root, -1), 0, 2),)) for root in ("x", "y"))
    shapes.require_equal(Shape("x"), Shape("x", (Size(Axis("x", -1), 1, 2),)), -1)
    shapes.require_equal(half_x, half_y, -1)
    shapes.require_equal(Shape("x", (5,)), Shape("y", (6,)), -1)
    assert shapes.dim(Shape("x"), -1) == Size(Axis("x", -1))
    assert shapes.dim(half_y, -1) == Size(Axis("y", -1), 0, 2)


SAME = [
    (Shape("x"), Shape("x"), True),
    (Shape("x", (8,)), Shape("x", (8,)), True),
    (Shape("x", (N, M)), Shape("x"), True),
    (Shape("x", (M,)), Shape("x", (N, M)), True),
    (Shape("x", (8,)), Shape("x"), False),
    (Shape("x", (8, M)), Shape("x", (9, M)), False),
    (Shape("x"), Shape("y"), False),
    (Shape("x", (8, 8)), Shape("y", (8, 8)), False),
    (Shape(None, (2, 8)), Shape(None, (2, 8)), True),
    (Shape(None, (2, 8)), Shape(None, (8,)), False),
    (Shape(None, (8,)), Shape("x", (8,)), False),
]


@pytest.mark.parametrize(("a", "b", "expected"), SAME)
def test_same(a, b, expected):
    assert Shapes().same(a, b) is expected
    assert Shapes().same(b, a) is expected


def test_same_with_a_known_rank():
    shapes = Shapes()
    shapes.require_rank(Shape("x"), 2)
    assert shapes.same(Shape("x", (8,)), Shape(None, (N, 8)))
    assert not shapes.same(Shape("x", (8,)), Shape(None, (2, N, 8)))


SAME_BEFORE = [
    (Shape("x", (8, M)), Shape("x", (9, M)), 1, False),
    (Shape("x", (8, M)), Shape("x", (9, M)), 2, True),
    (Shape("x", (8, 5)), Shape("x", (8, 6)), 1, True),
    (Shape("x", (8,)), Shape("x"), 1, True),
    (Shape("x"), Shape("x", (3, 8)), 1, False),
    (Shape("x"), Shape("y"), 3, False),
    (Shape(None, (2, N, 8)), Shape(None, (2, N, 9)), 1, True),
    (Shape(None, (multiplied(2, N), 8)), Shape(None, (2, N, 8)), 1, False),
]


@pytest.mark.parametrize(("a", "b", "axes", "expected"), SAME_BEFORE)
def test_same_before(a, b, axes, expected):
    assert Shapes().same_before(a, b, axes) is expected
    assert Shapes().same_before(b, a, axes) is expected


def test_what_is_claimed_to_be_the_same_is_so_for_real_tensors():
    """x.flatten(1) and x.reshape(n, -1) of the same axes; a transpose of equal sides is another shape."""
    flat, other = multiplied(4, N, M), multiplied(M, 4, N)
    assert Shapes().same(Shape(None, (2, flat)), Shape(None, (2, other)))
    assert not Shapes().same(Shape(None, (N, M)), Shape(None, (M, N)))
    x = torch.zeros(2, 4, 3, 5)
    assert x.flatten(1).shape[1] == number(flat, 3, 5)


def test_free_axes():
    assert free_axes([3, N, shifted(M, 2, 2)]) == {HEIGHT, WIDTH}
    assert free_axes([multiplied(N, 2, shifted(multiplied(M, 3), 1))]) == {HEIGHT, WIDTH}
    assert free_axes([1, 2]) == set()
