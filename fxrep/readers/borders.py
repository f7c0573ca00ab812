"""Readers of item assignment: a border that is written after padding is what the padding inserts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.equal import same_vector
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.readers.arithmetic import per_channel
from fxrep.readers.channels import only_slice
from fxrep.readers.registry import Call, find, reader, shape_rule
from fxrep.shapes import Shape

Side = tuple[int, bool]  # a spatial axis, and whether it is its end


def assigned(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x[index] = value` as a new version of x."""
    version = x.clone()
    version[index] = value
    return version


@shape_rule(assigned)
def shape_of_assigned(at: Call) -> Shape:
    return at.shape(at.first)


@reader(assigned)
def read_border(at: Call) -> AffineForm:
    """pad(x), then v written into every strip of the border: the identity with those pads, filled with v.

    So a block pads with what its batch norm makes of zero (Ding et al., "Diverse Branch Block", arXiv 2103.13425).
    """
    padded, strips = _strips(at)
    form = _form_of(at, padded)
    anchor, term = next(form.terms)
    if not isinstance(term, AffineConv) or not term.copies or len(list(form.terms)) > 1:
        raise Illegal("not-affine", "it writes into a part of a value")
    fills = [_fill(at, padded, value, term) for _, value in strips]
    if {side: size for (side, size), _ in strips} != _border(term):
        raise Illegal("not-affine", "what it writes is not all of the border, or more")
    if not all(same_vector(fills[0], other, term.in_channels) for other in fills[1:]):
        raise Illegal("pad-value", "the sides of the border hold different values")
    part = replace(form.parts[0], terms={anchor: replace(term, fill=fills[0])})
    return replace(form, parts=(part,))


def _strips(at: Call) -> tuple[Node, list[tuple[tuple[Side, int], Any]]]:
    """The value before all assignments, and of each the side, its width and what is written."""
    node, strips = at.node, []
    while node.target is assigned:
        x, index, value = node.args
        assert isinstance(x, Node), "only values of the network are written"
        strips.append((_side(at, x, index), value))
        node = x
    return node, strips


def _side(at: Call, x: Node, index: Any) -> tuple[Side, int]:
    axis, cut = only_slice(index)
    bounds = (cut.start or 0, cut.stop)
    if cut.step not in (None, 1) or not all(b is None or isinstance(b, int) for b in bounds):
        raise Illegal("not-affine", "it writes into every so many entries, or into a range computed at run time")
    axis = at.from_end(x, axis)
    if bounds[0] < 0 and bounds[1] is None:
        return (axis, True), -bounds[0]
    if bounds[0] == 0 and bounds[1] is not None and bounds[1] > 0:
        return (axis, False), bounds[1]
    raise Illegal("not-affine", "it writes into the middle of a value")


def _form_of(at: Call, node: Node) -> AffineForm:
    read, arguments = find(Call(node, at.facts))
    form = read(*arguments) if read is not None else None
    if not isinstance(form, AffineForm):
        raise Illegal("not-affine", "it writes into a part of a value")
    return form


def _border(term: AffineConv) -> dict[Side, int]:
    """How wide the border is on each side that has one."""
    sides = {(i - term.dims, False): p for i, p in enumerate(term.pad_lo)}
    sides |= {(i - term.dims, True): p for i, p in enumerate(term.pad_hi)}
    return {side: width for side, width in sides.items() if width}


def _fill(at: Call, padded: Node, value: Any, term: AffineConv) -> Kernel:
    vector, dims = per_channel(at, padded, at.constant(value))
    if dims not in (None, term.dims):
        raise Illegal("pad-value", "what it writes varies along the border")
    return K.spread(vector, term.in_channels)
