"""Views: which axes of a value a reshape, transpose or flatten merges, splits and moves (in the manner of einops)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxrep.errors import Illegal
from fxrep.readers.registry import Atom, Call, Layout, SizesOf, shape_rule
from fxrep.shapes import Axis, Dim, Shape, Size, divided, multiplied

Axes = tuple[tuple[Atom, ...], ...]

RESHAPES = ("view", "reshape", torch.reshape)
FLATTENS = (torch.flatten, "flatten", nn.Flatten)
LIKE_ANOTHER = ("reshape_as", "view_as")
TRANSPOSES = (torch.transpose, "transpose", "swapaxes", torch.swapaxes)
PERMUTES = (torch.permute, "permute")
SQUEEZES = (torch.squeeze, "squeeze")
UNSQUEEZES = (torch.unsqueeze, "unsqueeze")


def layout_of(at: Call, value: Node) -> Layout:
    """The layout of a value: the one recorded for a view, else its own axes, whole."""
    recorded = recorded_layout(at, value.name)
    if recorded is not None:
        return recorded
    rank = at.rank(value)
    dims = [at.dim(value, i) for i in range(-rank, 0)]
    return Layout(value, tuple((Atom(i, d),) for i, d in zip(range(-rank, 0), dims, strict=True) if d is not None))


def recorded_layout(at: Call, view: str) -> Layout | None:
    """The layout of a view, in the sizes that are known by now: a layer after it may have told some."""
    layout = at.facts.layouts.get(view)
    if layout is None:
        return None
    axes = (tuple(replace(a, size=at.shapes.known(a.size)) for a in axis) for axis in layout.axes)
    return Layout(layout.source, tuple(axes))


def _view(at: Call, source: Node, axes: Axes) -> Shape:
    at.facts.layouts[at.node.name] = Layout(source, axes)
    return Shape(None, tuple(multiplied(*(a.size for a in axis)) for axis in axes))


@shape_rule(*RESHAPES)
def shape_of_reshape(at: Call) -> Shape:
    args = [at.number(a) for a in at.node.args[1:]] + [at.number(v) for k, v in at.node.kwargs.items() if k != "input"]
    if len(args) == 1 and isinstance(args[0], SizesOf):
        return args[0].shape
    if len(args) == 1 and isinstance(args[0], Node):
        return Shape(at.node.name)  # one size, or all of them
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    return _reshaped(at, at.first, list(sizes))


@shape_rule(*LIKE_ANOTHER)
def shape_of_reshape_as(at: Call) -> Shape:
    other = at.node.args[1]
    rank = at.shapes.rank(at.shape(other))
    if rank is None:
        return at.shape(other)
    return _reshaped(at, at.first, [at.dim(other, i) for i in range(-rank, 0)])


@shape_rule(*FLATTENS)
def shape_of_flatten(at: Call, module: Any = None) -> Shape:
    if module is not None:
        x, start, end = at.first, module.start_dim, module.end_dim
    else:
        x, start, end = at.bind("input start_dim end_dim", start_dim=0, end_dim=-1)
    layout = layout_of(at, x)
    count = len(layout.axes)
    start, end = start % count, end % count
    merged = tuple(a for axis in layout.axes[start : end + 1] for a in axis)
    return _view(at, layout.source, (*layout.axes[:start], merged, *layout.axes[end + 1 :]))


@shape_rule(*TRANSPOSES)
def shape_of_transpose(at: Call) -> Shape:
    x, first, second = at.bind("input dim0 dim1")
    layout = layout_of(at, x)
    axes = list(layout.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return _view(at, layout.source, tuple(axes))


@shape_rule(*PERMUTES)
def shape_of_permute(at: Call) -> Shape:
    order: Any = at.node.args[1:] or tuple(at.node.kwargs.values())[-1:]
    order = order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
    layout = layout_of(at, at.first)
    return _view(at, layout.source, tuple(layout.axes[i] for i in order))


@shape_rule(*SQUEEZES)
def shape_of_squeeze(at: Call) -> Shape:
    x, dim = at.bind("input dim", dim=None)
    layout = layout_of(at, x)
    if not isinstance(dim, int) or not -len(layout.axes) <= dim < len(layout.axes):
        raise Illegal("shape-unknown", "which axes it drops depends on their number")
    if multiplied(*(a.size for a in layout.axes[dim])) != 1:
        raise Illegal("shape-unknown", "which axes it drops depends on their sizes")
    axes = list(layout.axes)
    del axes[dim]
    return _view(at, layout.source, tuple(axes))


@shape_rule(*UNSQUEEZES)
def shape_of_unsqueeze(at: Call) -> Shape:
    x, dim = at.bind("input dim")
    layout = layout_of(at, x)
    axes = list(layout.axes)
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, ())
    return _view(at, layout.source, tuple(axes))


@shape_rule(torch.t, "t")
def shape_of_t(at: Call) -> Shape:
    layout = layout_of(at, at.first)
    return _view(at, layout.source, layout.axes[::-1])


@shape_rule("contiguous", torch.clone, "clone", torch.ops.aten.alias.default)
def shape_of_contiguous(at: Call) -> Shape:
    layout = layout_of(at, at.first)
    return _view(at, layout.source, layout.axes)


def _reshaped(at: Call, x: Node, sizes: list[Any]) -> Shape:
    """Matches the sizes against the axes; where that fails the shape is still known as far as it is written."""
    told = [s if isinstance(s, (int, Size)) else None for s in sizes]
    known = None if None in told else _matched(at, x, told)  # type: ignore[arg-type]
    if known is not None:
        return known
    own = [Size(Axis(at.node.name, i - len(told))) for i in range(len(told))]  # the sizes that are not told
    return Shape(None, tuple(o if t in (None, -1) else t for t, o in zip(told, own, strict=True)))


def _matched(at: Call, x: Node, sizes: list[Dim]) -> Shape | None:
    try:
        layout = layout_of(at, x)
    except Illegal:  # the rank is not known: then the sizes may still say the shape
        return None
    atoms = [a for axis in layout.axes for a in axis]
    hole = sizes.index(-1) if -1 in sizes else len(sizes)
    head, atoms = _match(atoms, sizes[:hole])
    if head is None:
        return None
    if hole == len(sizes):
        return None if atoms else _view(at, layout.source, tuple(head))
    tail, atoms = _match(atoms[::-1], sizes[:hole:-1], from_end=True)
    return None if tail is None else _view(at, layout.source, (*head, tuple(reversed(atoms)), *reversed(tail)))


def _match(
    atoms: list[Atom], sizes: list[Dim], from_end: bool = False
) -> tuple[list[tuple[Atom, ...]] | None, list[Atom]]:
    """Takes atoms from the front for each size in turn, splitting an axis where only a factor of it is wanted."""
    rest, axes = list(atoms), []
    for size in sizes:
        taken: list[Atom] = []
        while (have := multiplied(*(a.size for a in taken))) != size:
            if not rest:
                return None, atoms
            atom = rest.pop(0)
            need = divided(size, have)
            left = None if need is None or need == atom.size else divided(atom.size, need)
            if need is not None and left is not None:
                atom, piece = _split(atom, need, left, from_end)
                rest.insert(0, piece)
            taken.append(atom)
        axes.append(tuple(reversed(taken)) if from_end else tuple(taken))
    return axes, rest


def _split(atom: Atom, need: Dim, left: Dim, from_end: bool) -> tuple[Atom, Atom]:
    """The outer (or, from the end, the inner) factor `need` of an axis, and the factor that is left.

    Where a size is symbolic its stride is; what stands in its place then tells only the order of the pieces.
    """
    outer, inner = (left, need) if from_end else (need, left)
    known = isinstance(outer, int) and isinstance(inner, int)
    step = Fraction(inner) if known and isinstance(inner, int) else Fraction(1)
    if known:
        pieces = Atom(atom.axis, outer, atom.stride * step), Atom(atom.axis, inner, atom.stride)
    else:
        pieces = Atom(atom.axis, outer, atom.stride), Atom(atom.axis, inner, atom.stride / 2)
    return (pieces[1], pieces[0]) if from_end else pieces


def axes_of(at: Call) -> tuple[Node, Axes]:
    """The source and the axes of the view that this node is. Raises Illegal where they are not known."""
    layout = recorded_layout(at, at.node.name)
    if layout is None:
        raise Illegal("not-affine", "its sizes do not say which axes it merges and splits")
    return layout.source, layout.axes


def keeps_rows(at: Call, source: Node, axes: Axes) -> bool:
    """Whether the view only regroups the axes before the last one: the rows of a linear layer, in the same order."""
    whole = layout_of(at, source).axes
    if axes[-1:] != whole[-1:] or len(whole) < 2:
        return False
    atoms = [a for axis in axes for a in axis]
    position = [(a.axis, -a.stride) for a in atoms]
    return position == sorted(position)


def channel_permutation(at: Call, source: Node, axes: Axes) -> tuple[int, tuple[int, ...]]:
    """The `dims` and the order of a view that permutes one axis and leaves the others. Raises Illegal for any other."""
    whole = layout_of(at, source).axes
    changed = [i for i, (a, b) in enumerate(zip(axes, whole, strict=False)) if a != b]
    if len(axes) != len(whole) or len(changed) != 1 or len({a.axis for a in axes[changed[0]]}) != 1:
        raise Illegal("not-affine", "the view moves or merges axes")
    atoms = axes[changed[0]]
    sizes = [a.size for a in atoms if isinstance(a.size, int)]
    if len(sizes) != len(atoms) or prod(sizes) != at.dim(source, changed[0] - len(whole)):
        raise Illegal("not-affine", "the sizes that the view permutes are not known")
    ranges = [range(0, s * int(a.stride), int(a.stride)) for s, a in zip(sizes, atoms, strict=True)]
    return len(whole) - 1 - changed[0], tuple(sum(p) for p in product(*ranges))
