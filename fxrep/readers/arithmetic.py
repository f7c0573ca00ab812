"""Readers of sums, differences and scales, in functional, method, operator and in-place spellings."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxrep import form as forms
from fxrep import kernel as K
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.readers.registry import Call, base_name, reader

#: Every spelling of an op on two operands.
ADDS = (operator.add, torch.add, "add", operator.iadd, "add_")
SUBS = (operator.sub, torch.sub, "sub", operator.isub, "sub_", torch.subtract, "subtract")
RSUBS = (torch.rsub, "__rsub__")
MULS = (operator.mul, torch.mul, "mul", operator.imul, "mul_", torch.multiply, "multiply")
DIVS = (
    operator.truediv, torch.div, "div", operator.itruediv, "div_", torch.true_divide, torch.divide, "divide",
)  # fmt: skip


@reader(*ADDS)
def read_add(at: Call) -> AffineForm:
    """a + alpha·b."""
    a, b, alpha = at.bind("input other alpha", alpha=1)
    return _combine(at, a, 1.0, b, alpha)


@reader(*SUBS)
def read_sub(at: Call) -> AffineForm:
    """a - alpha·b."""
    a, b, alpha = at.bind("input other alpha", alpha=1)
    return _combine(at, a, 1.0, b, -alpha)


@reader(*RSUBS)
def read_rsub(at: Call) -> AffineForm:
    """b - alpha·a."""
    a, b, alpha = at.bind("input other alpha", alpha=1)
    return _combine(at, a, -alpha, b, 1.0)


@reader(*MULS)
def read_mul(at: Call) -> AffineForm:
    """γ·x, for a constant γ that is a scalar or varies along one axis only."""
    a, b = at.bind("input other")
    x, gain = (b, a) if at.is_value(b) else (a, b)
    if at.is_value(gain):
        raise Illegal("not-affine", "both factors depend on the network's input")
    vector, dims = per_channel(at, x, at.constant(gain))
    return at.value(x).scale(vector, dims=dims)


@reader(*DIVS)
def read_div(at: Call) -> AffineForm:
    """x / σ, for a constant σ."""
    x, divisor, rounding = at.bind("input other rounding_mode", rounding_mode=None)
    if rounding is not None or not at.is_value(x) or at.is_value(divisor):
        raise Illegal("not-affine", "it divides by a value of the network, or rounds")
    vector, dims = per_channel(at, x, at.constant(divisor))
    return at.value(x).scale(K.Map(vector.shape, torch.reciprocal, (vector,)), dims=dims)


@reader(torch.addcmul, "addcmul", "addcmul_")
def read_addcmul(at: Call) -> AffineForm:
    """x + value·γ·y, where one of γ and y is constant, or both are; x may be constant too."""
    x, a, b, factor = at.bind("input tensor1 tensor2 value", value=1)
    y, gain = (b, a) if at.is_value(b) else (a, b)
    if at.is_value(gain) or not isinstance(factor, (int, float)):
        raise Illegal("not-affine", "both factors depend on the network's input")
    if not at.is_value(y):
        one, other = at.constant(y), at.constant(gain)
        product = K.Map(tuple(torch.broadcast_shapes(one.shape, other.shape)), torch.mul, (one, other))
        return _shifted(at, x, at.value(x), K.scale(product, K.Constant((), float(factor))))
    vector, dims = per_channel(at, y, at.constant(gain))
    scaled = _weighted(at, y, factor).scale(vector, dims=dims)
    if not at.is_value(x):
        return _shifted(at, y, scaled, at.constant(x))
    aligned = _require_addable(at, x, y)
    return _sum(at.value(x), scaled, aligned)


@reader(operator.neg, torch.neg, "neg", "neg_", torch.negative, "negative")
def read_neg(at: Call) -> AffineForm:
    """-x."""
    return at.operand().scale(K.Constant((), -1.0))


@reader(
    operator.pos, torch.positive, "positive", nn.Identity, torch.clone, "clone", "contiguous",
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh_copy.default,
)  # fmt: skip
def read_identity(at: Call, module: nn.Module | None = None) -> AffineForm:
    """The same numbers, perhaps in another memory."""
    return at.operand()


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
FUNCTIONAL_DROPOUTS = (torch.nn.functional.dropout, torch.nn.functional.dropout2d, torch.dropout)


def drops(module: Any) -> bool:
    """Whether a dropout drops something, as one in training mode does: its result is not its operand then."""
    return module.training and module.p > 0


@reader(*DROPOUTS)
def read_dropout(at: Call, module: Any) -> AffineForm:
    """The identity in eval mode."""
    if drops(module):
        raise Illegal("random", "it is in training mode")
    return at.operand()


@reader(*FUNCTIONAL_DROPOUTS)
def read_functional_dropout(at: Call) -> AffineForm:
    x, _p, training, _inplace = at.bind("input p training inplace", p=0.5, training=True, inplace=False)
    if training is not False:
        raise Illegal("random", "it is called with training=True")
    return at.value(x)


@reader(torch.sum, "sum")
def read_sum_of_stack(at: Call) -> AffineForm:
    """torch.stack([a, b, …], d).sum(d) is a + b + …"""
    x, dim, keepdim, dtype = at.bind("input dim keepdim dtype", dim=None, keepdim=False, dtype=None)
    return _of_stack(at, x, dim, keepdim, dtype, K.Constant((), 1.0))


@reader(torch.mean, "mean")
def read_mean_of_stack(at: Call) -> AffineForm:
    """torch.stack([a, b, …], d).mean(d) is (a + b + …)/n."""
    x, dim, keepdim, dtype = at.bind("input dim keepdim dtype", dim=None, keepdim=False, dtype=None)
    count = len(_stacked(at, x)[0])
    return _of_stack(at, x, dim, keepdim, dtype, K.Constant((), 1.0 / count))


def _of_stack(at: Call, x: Any, dim: Any, keepdim: Any, dtype: Any, gain: Kernel) -> AffineForm:
    values, axis = _stacked(at, x)
    reduced = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    if keepdim or dtype is not None or reduced != (axis,):
        raise Illegal("not-affine", "it reduces other axes than the stacked one")
    total = at.value(values[0])
    for other in values[1:]:
        _require_same_shape(at, values[0], other)
        total = total + at.value(other)
    return total.scale(gain)


def _stacked(at: Call, x: Any) -> tuple[list[Node], int]:
    """The values and the axis of `torch.stack(values, axis)`, which is also decomposed: see `_stacked_by_views`."""
    if isinstance(x, Node) and base_name(x.target) == "view":
        return _stacked_by_views(at, x)
    if not (isinstance(x, Node) and x.target in (torch.stack, torch.ops.aten.stack.default) and x.args):
        raise Illegal("not-affine", "it reduces over axes of one value")
    values, axis = x.args[0], x.kwargs.get("dim", x.args[1] if len(x.args) > 1 else 0)
    if not isinstance(values, (tuple, list)) or not isinstance(axis, int):
        raise Illegal("not-affine", "it reduces over axes of one value")
    return list(values), axis


def _stacked_by_views(at: Call, x: Node) -> tuple[list[Node], int]:
    """A concatenation along an axis of which a view makes two: so many values, and each one's own size."""
    joined = x.args[0]
    if not (isinstance(joined, Node) and base_name(joined.target) in ("cat", "concat", "concatenate")):
        raise Illegal("not-affine", "it reduces over axes of one value")
    values, axis = Call(joined, at.facts).bind("tensors dim", dim=0)
    own, whole = at.shapes.full(at.shape(values[0])), at.shapes.full(at.shape(x))
    if axis < 0 or whole.tail != (*own.tail[:axis], len(values), *own.tail[axis:]):
        raise Illegal("not-affine", "it reduces over axes of one value")
    return list(values), axis


def _combine(at: Call, a: Any, alpha: Any, b: Any, beta: Any) -> AffineForm:
    """α·a + β·b, where one of the two may be constant."""
    if not all(isinstance(n, (int, float)) for n in (alpha, beta)):
        raise Illegal("not-affine", "alpha is computed at run time")
    if at.is_value(a) and at.is_value(b):
        aligned = _require_addable(at, a, b)
        return _sum(_weighted(at, a, alpha), _weighted(at, b, beta), aligned)
    if at.is_value(b):
        a, alpha, b, beta = b, beta, a, alpha
    shift = at.constant(b)
    return _shifted(at, a, _weighted(at, a, alpha), shift if beta == 1 else K.scale(shift, K.Constant((), float(beta))))


def _sum(one: AffineForm, other: AffineForm, aligned: bool) -> AffineForm:
    result = one + other
    return result if aligned else AffineForm(result.parts, result.dims, aligned=False)


def _shifted(at: Call, x: Node, form: AffineForm, shift: Kernel) -> AffineForm:
    """The form, of the shape of x, with a constant added."""
    vector, dims = per_channel(at, x, shift)
    return form + forms.constant(vector, dims)


def _weighted(at: Call, x: Any, factor: float) -> AffineForm:
    value = at.value(x)
    return value if factor == 1 else value.scale(K.Constant((), float(factor)))


def _require_same_shape(at: Call, a: Node, b: Node) -> None:
    if not at.shapes.same(at.shape(a), at.shape(b)):
        raise Illegal("broadcast", f"{a.name} and {b.name} are not provably of one size", "pass example_inputs")


def _require_addable(at: Call, a: Node, b: Node) -> bool:
    """Whether the two are of one size. Raises Illegal unless they differ, if at all, along spatial axes only."""
    left, right = at.shape(a), at.shape(b)
    if at.shapes.same(left, right):
        return True
    rank = at.shapes.rank(left)
    channels = None if rank is None or rank < 3 else [at.shapes.dim(s, 1 - rank) for s in (left, right)]
    if rank == at.shapes.rank(right) and channels and isinstance(channels[0], int) and channels[0] == channels[1]:
        return False
    raise Illegal("broadcast", f"{a.name} and {b.name} are not provably of one size")


def per_channel(at: Call, x: Any, constant: Kernel) -> tuple[Kernel, int | None]:
    """A constant as (vector of shape (C,), dims), or as (scalar, None), for the axis of `x` along which it varies."""
    shape = constant.shape
    if prod(shape) == 1:
        _require_no_new_axes(at, x, len(shape))
        return K.Map((), torch.Tensor.squeeze, (constant,)) if shape else constant, None
    varying = [i for i, n in enumerate(shape) if n != 1]
    if len(varying) > 1:
        raise Illegal("broadcast", f"a constant of shape {shape} varies along several axes")
    dims = len(shape) - 1 - varying[0]
    _require_no_new_axes(at, x, len(shape))
    channels = shape[varying[0]]
    if at.channels(x, dims) != channels:
        raise Illegal("broadcast", f"a constant of shape {shape} meets {at.channels(x, dims)} channels")
    return K.Map((channels,), torch.Tensor.flatten, (constant,)), dims


def _require_no_new_axes(at: Call, x: Node, axes: int) -> None:
    known = len(at.shape(x).tail)
    if axes > known and axes > at.shapes.least_rank(at.shape(x)) and axes > at.rank(x):
        raise Illegal("broadcast", f"a constant with {axes} axes adds axes to {x.name}")
