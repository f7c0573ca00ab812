"""Sizes: what a graph asks of the metadata of a value, and the arithmetic on it; no numbers of the value are read."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxrep.readers.registry import Call, Facts, SizesOf, base_name
from fxrep.shapes import Shape, Size, multiplied

SHAPE_ATTRIBUTES = ("shape", "ndim")
OTHER_METADATA = ("dtype", "device", "is_cuda", "layout", "requires_grad", "is_quantized")
METADATA_METHODS = ("size", "dim", "ndimension", "numel", "is_floating_point", "stride", "is_contiguous")
#: How aten graphs and Dynamo ask for the same, by the op's name.
METADATA_OPS = {"sym_size": "size", "sym_numel": "numel", "sym_stride": "stride", "_assert_tensor_metadata": "dtype"}
ASSERTS = (torch._assert, torch.ops.aten._assert_scalar.default)


def note_number(node: Node, facts: Facts) -> bool:
    """Notes nodes that read sizes, and arithmetic on them: uses of the metadata of a value, not of its numbers."""
    if node.op not in ("call_function", "call_method"):
        return False
    operands = node.all_input_nodes
    if _reads_metadata(node):
        facts.scalars[node.name] = _size_value(node, facts)
        return True
    if operands and all(o.name in facts.scalars for o in operands) and _computes_numbers(node):
        facts.scalars[node.name] = _number_value(node, facts)
        if node.target in ASSERTS:
            _learn_from_assert(node, facts)
        return True
    return False


def _computes_numbers(node: Node) -> bool:
    """Whether the function makes numbers of numbers, and not tensors as `torch.arange(n)` does."""
    origin = str(getattr(node.target, "__module__", "")).split(".")[0]
    numeric = origin in ("_operator", "operator", "math", "builtins") or node.target in ASSERTS
    numeric |= base_name(node.target).startswith("sym_")
    return node.op == "call_function" and numeric


def _learn_from_assert(node: Node, facts: Facts) -> None:
    """`assert x.ndim == 4` says that only values with four axes are accepted."""
    condition = node.args[0]
    if not isinstance(condition, Node) or condition.target is not operator.eq:
        return
    axes, number = condition.args
    if not isinstance(axes, Node) or not isinstance(number, int) or not axes.args or not isinstance(axes.args[0], Node):
        return
    value = axes.args[0]
    reads_rank = axes.target in ("dim", "ndimension") or (axes.target is getattr and axes.args[1] == "ndim")
    if reads_rank and value.name in facts.shapes.of:
        facts.shapes.require_rank(facts.shapes.of[value.name], number)
        rank = facts.shapes.rank(facts.shapes.of[value.name])
        facts.scalars[axes.name], facts.scalars[condition.name] = rank, rank == number


def _reads_metadata(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in METADATA_METHODS
    if node.target is getattr:
        return node.args[1] in SHAPE_ATTRIBUTES + OTHER_METADATA
    return node.target is len or (isinstance(node.target, OpOverload) and node.target._opname in METADATA_OPS)


def _size_value(node: Node, facts: Facts) -> Any:
    x = node.args[0]
    shape = facts.shapes.of.get(x.name) if isinstance(x, Node) else None
    if shape is None and isinstance(x, Node) and x.name in facts.constants:
        shape = Shape(None, facts.constants[x.name].shape)
    if shape is None:
        return None
    rank = facts.shapes.rank(shape)
    what = node.args[1] if node.target is getattr else METADATA_OPS.get(base_name(node.target), node.target)
    if what in ("ndim", "dim", "ndimension"):
        return rank
    index = node.args[1] if what == "size" and len(node.args) > 1 else node.kwargs.get("dim")
    if what == "size" and isinstance(index, int):
        return _axis(facts, shape, index, rank)
    if what in ("shape", "size") and rank is not None:
        return tuple(facts.shapes.dim(shape, i) for i in range(-rank, 0))
    if what in ("shape", "size"):
        return SizesOf(shape)
    return None


def _axis(facts: Facts, shape: Shape, index: int, rank: int | None) -> Any:
    if index >= 0:
        if rank is None:
            return None
        index -= rank
    return facts.shapes.dim(shape, index)


def _number_value(node: Node, facts: Facts) -> Any:
    """Arithmetic on known integers, and picking one size out of a shape."""
    call = Call(node, facts)
    args = [facts.scalars.get(a.name) if isinstance(a, Node) else a for a in node.args]
    if node.target is operator.getitem:
        sizes, index = args
        if isinstance(sizes, tuple):
            return sizes[index] if isinstance(index, (int, slice)) and _within(sizes, index) else None
        if isinstance(sizes, SizesOf) and isinstance(index, int):
            return _axis(facts, sizes.shape, index, facts.shapes.rank(sizes.shape))
        return None
    if node.target is operator.mul:
        factors: list[Any] = [a for a in args if isinstance(a, (int, Size))]
        return multiplied(*factors) if len(factors) == len(args) else None
    if all(isinstance(call.number(a), int) for a in node.args) and callable(node.target) and node.target not in ASSERTS:
        return node.target(*args)
    return None


def _within(sizes: tuple[Any, ...], index: int | slice) -> bool:
    return isinstance(index, slice) or -len(sizes) <= index < len(sizes)
