"""Readers of axes that are moved and moved back, and of a scale between: γ acts on its channels wherever they are."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fxrep import form as forms
from fxrep.affine import AffineConv, diagonal_of
from fxrep.errors import Illegal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.parts import Part
from fxrep.readers.registry import Call, find, reader
from fxrep.readers.views import PERMUTES, TRANSPOSES, axes_of, keeps_rows, layout_of, recorded_layout
from fxrep.readers.walk import is_hooked

MOVES = "it moves axes"


@reader(*TRANSPOSES, *PERMUTES)
def read_moved(at: Call) -> AffineForm:
    """Axes moved back to where they were. A scale between, as BatchNorm1d of tokens, scales the axis that was moved."""
    source, axes = axes_of(at)
    if not at.is_value(source):
        raise Illegal("not-affine", "it is a view of a constant")
    whole = layout_of(at, source).axes
    if axes == whole:
        return forms.value(source.name)
    scale = _scale_of(at, source)
    (part,), (view,) = scale.parts, scale.sources
    inner = recorded_layout(at, view)
    if inner is None or any(axis not in whole for axis in axes):
        raise Illegal("not-affine", MOVES)
    back = tuple(inner.axes[whole.index(axis)] for axis in axes)
    if back != layout_of(at, inner.source).axes and not keeps_rows(at, inner.source, back):
        raise Illegal("not-affine", MOVES)
    dims = None if scale.dims is None else -1 - inner.axes[-scale.dims - 1][0].axis
    below = forms.value(inner.source.name)
    at.facts.layouts.pop(at.node.name, None)  # a value of its own, of which later views are views
    if back != layout_of(at, inner.source).axes:
        below = replace(below, dims=0)
    return below.scale(_gain(part), part.bias, dims)


def _scale_of(at: Call, node: Node) -> AffineForm:
    """What a node, and those before it, do with a view, where that is a scale. Raises Illegal where it is not."""
    if node.op == "call_module" and is_hooked(at.facts.modules[str(node.target)]):
        raise Illegal("not-affine", MOVES)
    read, arguments = find(Call(node, at.facts, assumes=at.assumes))
    form = read(*arguments) if read is not None else None
    if not isinstance(form, AffineForm) or len(form.parts) > 1 or len(form.parts[0].terms) > 1:
        raise Illegal("not-affine", MOVES)
    ((anchor, term),) = form.parts[0].terms.items()
    if anchor.rows is not None or (isinstance(term, AffineConv) and not term.is_diagonal):
        raise Illegal("not-affine", MOVES)
    if anchor.source in at.facts.layouts:
        return form
    below = next(n for n in arguments[0].node.all_input_nodes if n.name == anchor.source)
    return form.substitute(anchor.source, _scale_of(at, below))


def _gain(part: Part) -> Kernel:
    (term,) = part.terms.values()
    return diagonal_of(term) if isinstance(term, AffineConv) else term.factor
