"""What a graph's own metadata tells: exported and captured graphs carry a fake value for every node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._sympy.functions import CleanDiv, FloorDiv

from fxrep.readers import Told
from fxrep.shapes import Axis, Dim, Shape, Size, multiplied, shifted


def told_by(graph: Graph, key: str) -> Told:
    """Reads `node.meta[key]`: "val" in an exported graph, "example_value" in one that Dynamo captured.

    No guard is added: symbols are read as expressions, and an axis of an input stands for each.
    """
    values = {node: node.meta[key] for node in graph.nodes if key in node.meta}
    inputs = [(node, value) for node, value in values.items() if node.op == "placeholder" and isinstance(value, Tensor)]
    axes: dict[sympy.Symbol, Size] = {}
    for node, value in inputs:
        for i, size in enumerate(value.shape):
            expression = _expression(size)
            if isinstance(expression, sympy.Symbol):
                axes.setdefault(expression, Size(Axis(node.name, i - value.ndim)))
    shapes = {n.name: _shape(n, v, axes) for n, v in values.items() if isinstance(v, Tensor)}
    numbers = {n.name: _dim(v, axes) for n, v in values.items() if isinstance(v, torch.SymInt)}
    known = {name: dim for name, dim in numbers.items() if dim is not None}
    return Told(shapes, known, {node.name: tuple(map(_hint, value.shape)) for node, value in inputs})


def _shape(node: Node, value: Tensor, axes: Mapping[sympy.Symbol, Size]) -> Shape:
    """Sizes that are no expression of the inputs' are the node's own."""
    told = [_dim(size, axes) for size in value.shape]
    own = [Size(Axis(node.name, i - value.ndim)) for i in range(value.ndim)]
    return Shape(None, tuple(o if t is None else t for t, o in zip(told, own, strict=True)))


def _dim(size: Any, axes: Mapping[sympy.Symbol, Size]) -> Dim | None:
    expression = _expression(size)
    return None if expression is None else _translated(expression, axes)


def _expression(size: Any) -> sympy.Expr | None:
    if isinstance(size, torch.SymInt):
        expression: sympy.Expr = size.node.expr
        return expression
    return sympy.Integer(size) if isinstance(size, int) else None


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 2


def _translated(expression: sympy.Expr, axes: Mapping[sympy.Symbol, Size]) -> Dim | None:
    """n + c, n·m and ⌊n/d⌋ of axes and numbers; None for any other expression."""
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return axes.get(expression)
    terms = [_translated(term, axes) for term in expression.args]
    if not terms or None in terms:
        return None
    known: list[Dim] = [term for term in terms if term is not None]
    if isinstance(expression, sympy.Mul):
        return multiplied(*known)
    first, *rest = sorted(known, key=lambda dim: isinstance(dim, int)) if isinstance(expression, sympy.Add) else known
    if len(rest) != 1 or not isinstance(rest[0], int):
        return None
    if isinstance(expression, sympy.Add):
        return shifted(first, rest[0])
    return shifted(first, 0, rest[0]) if isinstance(expression, (FloorDiv, CleanDiv)) else None
