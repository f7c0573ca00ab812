"""Every node of a weight expression against its formula written out, and what evaluation promises about all of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from layers import random
from torch import Tensor

from fxrep import affine
from fxrep import kernel as K
from fxrep.affine import AffineConv, add, stack
from fxrep.composition import compose
from fxrep.evaluation import evaluate
from fxrep.kernel import Kernel, Leaf


@dataclass(frozen=True)
class Node:
    """A kernel over leaves of the given shapes, and the same number from the leaves' values, by its definition."""

    shapes: Sequence[tuple[int, ...]]
    build: Callable[..., Kernel]
    formula: Callable[..., Tensor]


def fill(shape: tuple[int, ...], entry: Callable[..., Tensor | float], like: Tensor) -> Tensor:
    """The tensor whose entry at every index is `entry(*index)`."""
    entries = [torch.as_tensor(entry(*i), dtype=like.dtype) for i in product(*(range(n) for n in shape))]
    return torch.stack(entries).reshape(shape)


def scaled_columns(w: Tensor, v: Tensor, groups: int) -> Tensor:
    rows = w.shape[0] // groups
    return fill(w.shape, lambda o, i, *t: w[(o, i, *t)] * v[o // rows * w.shape[1] + i], w)


def placed(w: Tensor, shape: tuple[int, ...], offset: tuple[int, ...], step: tuple[int, ...]) -> Tensor:
    taps = {tuple(o + s * t for o, s, t in zip(offset, step, tap, strict=True)): tap for tap in _taps(w)}
    return fill(shape, lambda o, i, *t: w[(o, i, *taps[t])] if t in taps else 0.0, w)


def _taps(w: Tensor) -> list[tuple[int, ...]]:
    return list(product(*(range(n) for n in w.shape[2:])))


def dense(w: Tensor, groups: int) -> Tensor:
    """The weight of the ungrouped operator: a block on the diagonal for each group."""
    rows, width = w.shape[0] // groups, w.shape[1]
    shape = (w.shape[0], width * groups, *w.shape[2:])
    return fill(shape, lambda o, i, *t: w[(o, i % width, *t)] if i // width == o // rows else 0.0, w)


def composed(w2: Tensor, w1: Tensor, step2: tuple[int, ...], step1: tuple[int, ...]) -> Tensor:
    """Ungrouped: Σ over all pairs of taps, each at its place."""
    pairs = [(tuple(a * x + b * y for a, x, b, y in zip(step2, t2, step1, t1, strict=True)), t2, t1)
             for t2, t1 in product(_taps(w2), _taps(w1))]  # fmt: skip
    size = tuple(max(axis) + 1 for axis in zip(*(u for u, *_ in pairs), strict=True))

    def entry(o: int, i: int, *u: int) -> Tensor | float:
        return sum((w2[o][(slice(None), *t2)] * w1[:, i][(slice(None), *t1)]).sum() for at, t2, t1 in pairs if at == u)

    return fill((w2.shape[0], w1.shape[1], *size), entry, w2)


def contracted(w: Tensor, v: Tensor, groups: int) -> Tensor:
    return dense(w, groups).flatten(2).sum(2) @ v if w.ndim > 2 else dense(w, groups) @ v


def gain_over_deviation(gain: Tensor, variance: Tensor) -> Tensor:
    return gain / (variance * variance + 1e-3).sqrt()


NODES: dict[str, Node] = {
    "leaf": Node([(2, 3)], lambda w: w, lambda w: w),
    "map": Node([(3,), (3,)], lambda a, b: K.Map((3,), gain_over_deviation, (a, b)), gain_over_deviation),
    "map that reshapes": Node([(2, 3)], lambda w: K.Map((6,), torch.clone, (w,)), lambda w: w.flatten()),
    "scale rows": Node([(3, 2, 2), (3,)], lambda w, v: K.ScaleRows(w.shape, w, v), lambda w, v: w * v[:, None, None]),
    "scale all": Node([(3, 2), ()], lambda w, s: K.ScaleRows(w.shape, w, s), lambda w, s: w * s),
    "scale columns": Node(
        [(4, 3, 2), (3,)], lambda w, v: K.ScaleColumns(w.shape, w, v, 1), lambda w, v: w * v[:, None]
    ),
    "scale grouped columns": Node(
        [(4, 3, 2), (6,)], lambda w, v: K.ScaleColumns(w.shape, w, v, 2), lambda w, v: scaled_columns(w, v, 2)
    ),
    "enlarge": Node(
        [(2, 2, 1, 3)],
        lambda w: K.Place((2, 2, 3, 4), w, (1, 0), (1, 1)),
        lambda w: placed(w, (2, 2, 3, 4), (1, 0), (1, 1)),
    ),
    "dilate": Node(
        [(2, 1, 3)], lambda w: K.Place((2, 1, 8), w, (1,), (3,)), lambda w: placed(w, (2, 1, 8), (1,), (3,))
    ),
    "regroup 4 to 2": Node(
        [(8, 3, 2)], lambda w: K.Regroup((8, 6, 2), w, 4, 2), lambda w: torch.cat([dense(h, 2) for h in w.chunk(2)])
    ),
    "regroup 3 to 1": Node([(6, 2)], lambda w: K.Regroup((6, 6), w, 3, 1), lambda w: dense(w, 3)),
    "sum": Node([(2, 3), (2, 3)], lambda a, b: K.Sum((2, 3), (a, b, a)), lambda a, b: 2 * a + b),
    "sum with a scalar": Node([(), (3,)], lambda s, v: K.Sum((3,), (s, v)), lambda s, v: s + v),
    "compose": Node(
        [(2, 3, 2), (3, 2, 3)],
        lambda a, b: K.Compose((2, 2, 6), a, b, 1, (3,), (1,)),
        lambda a, b: composed(a, b, (3,), (1,)),
    ),
    "compose on both grids": Node(
        [(2, 2, 2, 1), (2, 1, 2, 2)],
        lambda a, b: K.Compose((2, 1, 6, 3), a, b, 1, (2, 1), (3, 2)),
        lambda a, b: composed(a, b, (2, 1), (3, 2)),
    ),
    "compose matrices": Node([(2, 3), (3, 4)], lambda a, b: K.Compose((2, 4), a, b, 1, (), ()), lambda a, b: a @ b),
    "compose groups": Node(
        [(4, 2, 2), (4, 1, 2)],
        lambda a, b: K.Compose((4, 1, 3), a, b, 2, (1,), (1,)),
        lambda a, b: torch.cat([composed(p, q, (1,), (1,)) for p, q in zip(a.chunk(2), b.chunk(2), strict=True)]),
    ),
    "contract": Node([(3, 2, 2, 2), (2,)], lambda w, v: K.Contract((3,), w, v, 1), lambda w, v: contracted(w, v, 1)),
    "contract groups": Node([(4, 2), (4,)], lambda w, v: K.Contract((4,), w, v, 2), lambda w, v: contracted(w, v, 2)),
    "stack rows": Node([(2, 3), (1, 3)], lambda a, b: K.StackRows((3, 3), (a, b)), lambda a, b: torch.cat([a, b])),
    "take rows": Node([(4, 2)], lambda w: K.TakeRows((3, 2), w, (3, 0, 0)), lambda w: torch.stack([w[3], w[0], w[0]])),
    "take columns": Node([(2, 4, 2)], lambda w: K.TakeColumns((2, 2, 2), w, 1, 3), lambda w: w[:, 1:3]),
    "place columns": Node(
        [(2, 3, 2)],
        lambda w: K.PlaceColumns((2, 4, 2), w, (3, 0, 3)),
        lambda w: torch.stack([w[:, 1], 0 * w[:, 1], 0 * w[:, 1], w[:, 0] + w[:, 2]], 1),
    ),
    "permuted leaf": Node([(2, 3, 4)], lambda w: Leaf.of(w.tensor, (1, 0, 2)), lambda w: w.transpose(0, 1)),
}


def test_every_kind_of_node_is_here():
    """Those without operands are tested by themselves."""
    built = {type(node.build(*map(Leaf.of, numbers(node)))) for node in NODES.values()}
    assert built | {K.Constant, K.Dirac} == set(Kernel.__subclasses__())


def numbers(node: Node, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(10 + i, *shape).to(dtype) for i, shape in enumerate(node.shapes)]


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_its_formula(name):
    node = NODES[name]
    values = numbers(node)
    kernel, expected = node.build(*map(Leaf.of, values)), node.formula(*values)
    assert kernel.shape == tuple(expected.shape)
    assert torch.allclose(evaluate(kernel), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NODES)
def test_folding_is_in_float64_whatever_the_model_is(name, dtype):
    node = NODES[name]
    values = numbers(node, dtype)
    got = evaluate(node.build(*map(Leaf.of, values)))
    assert got.dtype == torch.float64
    assert torch.allclose(got, node.formula(*(v.double() for v in values)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NODES)
def test_gradients_flow_to_live_leaves(name):
    node = NODES[name]
    values = [v.requires_grad_() for v in numbers(node)]
    kernel = node.build(*map(Leaf.of, values))
    assert not evaluate(kernel).requires_grad, "folding for deployment is detached"
    cotangent = random(99, *kernel.shape)
    got = torch.autograd.grad((evaluate(kernel, live) * cotangent).sum(), values)
    expected = torch.autograd.grad((node.formula(*values) * cotangent).sum(), values)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-13)


def live(leaf: Leaf) -> Tensor:
    return leaf.tensor


@pytest.mark.parametrize("name", NODES)
def test_evaluation_writes_into_no_leaf(name):
    node = NODES[name]
    values = numbers(node)
    before = [v.clone() for v in values]
    evaluate(node.build(*map(Leaf.of, values)))
    assert all(torch.equal(v, b) for v, b in zip(values, before, strict=True))


class Unread:
    """A tensor that knows its shape, and whose numbers must not be asked for."""

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"{name} was read")


def unread(*shape: int) -> Leaf:
    return Leaf.of(Unread(*shape))


@pytest.mark.parametrize("name", NODES)
def test_building_reads_no_number(name):
    node = NODES[name]
    kernel = node.build(*(unread(*s) for s in node.shapes))
    assert kernel.shape == node.build(*map(Leaf.of, numbers(node))).shape
    assert len(list(K.leaves(kernel))) == len(node.shapes)
    with pytest.raises(AssertionError, match="was read"):
        evaluate(kernel)


def unread_conv(*weight: int, pad: int = 0, bias: bool = False, groups: int = 1) -> AffineConv:
    ones, pads = (1,) * (len(weight) - 2), (pad,) * (len(weight) - 2)
    offset = unread(weight[0]) if bias else None
    return AffineConv(unread(*weight), groups, ones, pads, pads, ones, offset)


def test_the_algebra_reads_no_number():
    """Planning asks for shapes alone. A border is judged by numbers only where a bias or a fill meets a padding."""
    wide, point = unread_conv(4, 4, 3, 3, pad=1, bias=True), unread_conv(4, 4, 1, 1, bias=True)
    assert compose(point, wide).taps == (3, 3)
    assert compose(unread_conv(4, 4, 3, 3, bias=True), point).taps == (3, 3)
    assert compose(wide, point.without_bias()).pad_lo == (1, 1)
    assert add(wide, point).taps == (3, 3)
    assert add(wide, affine.identity(4, 2)).groups == 1
    assert stack(wide, point, same_input=True).out_channels == 8
    assert wide.take((2, 1))[0].out_channels == 2
    assert wide.columns(1, 3).in_channels == 2
    assert unread_conv(4, 1, 3, 3, groups=4).regrouped(2).weight.shape == (4, 2, 3, 3)
    assert wide.scaled(unread(4)).outside().shape == (4,)
    with pytest.raises(AssertionError, match="was read"):
        compose(wide, point)


@pytest.mark.parametrize("name", NODES)
def test_meta_tensors_have_shapes_too(name):
    node = NODES[name]
    kernel = node.build(*(Leaf.of(torch.empty(s, device="meta")) for s in node.shapes))
    assert kernel.shape == node.build(*map(Leaf.of, numbers(node))).shape


@pytest.mark.parametrize(("groups", "shape"), [(4, (4, 1, 1, 1)), (2, (4, 2, 1)), (1, (4, 4, 1, 1, 1)), (1, (3, 3))])
def test_dirac_is_the_identity(groups, shape):
    weight = evaluate(K.Dirac(shape)).flatten(1)
    assert torch.equal(dense(weight, groups), torch.eye(shape[0], dtype=torch.float64))


def test_a_constant_is_one_number():
    assert torch.equal(evaluate(K.Constant((2, 3), 0.25)), torch.full((2, 3), 0.25, dtype=torch.float64))


def repvgg_block(channels: int = 3) -> tuple[AffineConv, list[Leaf], list[Leaf]]:
    """s·(3×3) + t·(1×1) + identity, its trainable weights, and its constant scales."""
    shapes = ((channels, channels, 3, 3), (channels, channels, 1, 1))
    weights = [Leaf.of(random(i, *shape)) for i, shape in enumerate(shapes)]
    scales = [Leaf.of(random(7 + i, channels)) for i in range(2)]
    ones = (1, 1)
    branches = [
        AffineConv(w, 1, ones, (p, p), (p, p), ones).scaled(g) for w, g, p in zip(weights, scales, (1, 0), strict=True)
    ]
    return add(add(*branches), affine.identity(channels, 2)), weights, scales


def test_ones_and_squares_give_the_gradient_multiplier():
    """RepOptimizer (arXiv 2205.15242): s² everywhere, s² + t² at the centre, and 1 more on the centre's diagonal."""
    block, weights, scales = repvgg_block()

    def squares(leaf: Leaf) -> Tensor:
        return torch.ones_like(leaf.tensor) if leaf in weights else leaf.tensor.square()

    s, t = (leaf.tensor.square()[:, None] for leaf in scales)
    expected = s[..., None, None].expand(3, 3, 3, 3).clone()
    expected[:, :, 1, 1] = s + t + torch.eye(3, dtype=torch.float64)
    assert torch.allclose(evaluate(block.weight, squares), expected, rtol=0, atol=1e-15)


def test_the_same_fold_on_live_parameters_trains():
    """Online re-parameterisation: the gradient of the branches through the merged kernel is that of the branches."""
    block, weights, scales = repvgg_block()
    leaves = [leaf.tensor.requires_grad_() for leaf in (*weights, *scales)]
    w3, w1, s, t = leaves
    x = random(5, 2, 3, 6, 7)
    conv = torch.nn.functional.conv2d
    apart = conv(x, w3, padding=1) * s[:, None, None] + conv(x, w1) * t[:, None, None] + x
    merged = conv(x, evaluate(block.weight, live), padding=1)
    assert torch.allclose(merged, apart, rtol=0, atol=1e-13)
    got, expected = (torch.autograd.grad(y.square().sum(), leaves) for y in (merged, apart))
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-11)


DEPTH = 5000  # five times the depth at which Python's own stack ends


def test_depth_is_no_recursion():
    leaf = Leaf.of(torch.ones(2, 1, dtype=torch.float64, requires_grad=True))
    half, kernel = Leaf.of(torch.tensor(0.5)), leaf
    for _ in range(DEPTH // 2):
        kernel = K.Sum((2, 1), (K.ScaleRows((2, 1), kernel, half), leaf))
    assert [type(n) for n in K.leaves(kernel)] == [Leaf, Leaf]
    assert torch.allclose(evaluate(kernel), torch.full((2, 1), 2.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(evaluate(kernel, lambda n: n.tensor).sum(), [leaf.tensor])
    assert torch.allclose(gradient, torch.full((2, 1), 2.0, dtype=torch.float64))


def test_a_shared_node_is_computed_once():
    """Sixty doublings: a tree of 2⁶⁰ leaves, a graph of 61 nodes."""
    calls = []

    def double(value: Tensor, same: Tensor) -> Tensor:
        calls.append(value)
        return value + same

    kernel: Kernel = Leaf.of(torch.tensor([1.0]))
    for _ in range(60):
        kernel = K.Map((1,), double, (kernel, kernel))
    assert evaluate(kernel).item() == 2.0**60
    assert len(calls) == 60


def test_temporaries_die_with_their_last_reader():
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def step(value: Tensor) -> Tensor:
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        result = value + 1
        alive.append(weakref.ref(result))
        return result

    kernel: Kernel = Leaf.of(torch.zeros(3))
    for _ in range(20):
        kernel = K.Map((3,), step, (kernel,))
    assert torch.equal(evaluate(kernel), torch.full((3,), 20.0, dtype=torch.float64))
    assert max(most) <= 2


def test_every_leaf_once_in_a_fixed_order():
    a, b, c = (Leaf.of(torch.zeros(2)) for _ in range(3))
    kernel = K.Sum((2,), (K.Sum((2,), (b, a)), c, a))
    assert list(K.leaves(kernel, None, b)) == [b, a, c]
    assert list(K.leaves(None)) == []


def test_none_is_an_exact_zero():
    a, scalar = Leaf.of(random(1, 3)), Leaf.of(random(2))
    assert K.total(None, None) is None
    assert K.total(None, a, None) is a
    assert torch.equal(evaluate(K.total(scalar, None, a)), random(2) + random(1, 3))


def test_small_constructors():
    a, b, scalar = Leaf.of(random(1, 3)), Leaf.of(random(2, 2)), Leaf.of(random(3))
    assert K.stack([a]) is a
    assert torch.equal(evaluate(K.stack([a, b])), torch.cat([random(1, 3), random(2, 2)]))
    assert K.take(a, (0, 1, 2)) is a
    assert torch.equal(evaluate(K.take(a, (2, 0))), random(1, 3)[[2, 0]])
    assert K.spread(a, 3) is a
    assert torch.equal(evaluate(K.spread(scalar, 4)), random(3).expand(4))
    assert torch.equal(evaluate(K.scale(scalar, a)), random(3) * random(1, 3))
    assert torch.equal(evaluate(K.scale(scalar, scalar)), random(3) ** 2)
