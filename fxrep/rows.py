"""The numbers of a large kernel some rows at a time: what is folded, checked and cast never leaves the cache, and no
second copy of a weight in float64 is ever there.

Most kernels are local in their rows: W[a:b] needs the rows a:b of their operands alone. What is not is evaluated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxrep import kernel as K
from fxrep.evaluation import Doubles, evaluate
from fxrep.kernel import Kernel

BLOCK = 1 << 16  # entries: half a megabyte in float64, which a core's own cache holds twice
SMALL = BLOCK >> 4  # entries that are evaluated at once
DEEPEST = 200  # nodes of a kernel that is read by recursion


def blocks(kernel: Kernel, doubles: Doubles) -> Iterator[tuple[int, Tensor]]:
    """(start, W[start:stop]) in float64, in order, no block much larger than `BLOCK`."""
    order = K.topological((kernel,))
    if prod(kernel.shape) <= SMALL or len(order) > DEEPEST:
        yield 0, evaluate(kernel, doubles)
        return
    reader = _Reader(doubles, next((n.tensor.device for n in order if isinstance(n, K.Leaf)), torch.device("cpu")))
    step = max(BLOCK // prod(kernel.shape[1:]), 1)
    for start in range(0, kernel.shape[0], step):
        yield start, reader.rows(kernel, start, min(start + step, kernel.shape[0]))


class _Reader:
    """Reads rows; what must be evaluated whole is, once."""

    def __init__(self, doubles: Doubles, device: torch.device) -> None:
        self.doubles, self.device, self.wholes = doubles, device, dict[int, Tensor]()

    def rows(self, node: Kernel, start: int, stop: int) -> Tensor:
        rule = _RULES.get(type(node))
        found = rule(self, node, start, stop) if rule and prod(node.shape) > SMALL else None
        return self.whole(node)[start:stop] if found is None else found

    def own(self, node: Kernel, start: int, stop: int) -> Tensor:
        """Rows that may be written."""
        found = self.rows(node, start, stop)
        return found.clone() if id(node) in self.wholes else found

    def whole(self, node: Kernel) -> Tensor:
        if id(node) not in self.wholes:
            self.wholes[id(node)] = evaluate(node, self.doubles).to(self.device)
        return self.wholes[id(node)]


_RULES: dict[type[Kernel], Callable[[_Reader, Any, int, int], Tensor | None]] = {}


def _local(kind: type[Kernel]) -> Callable[[Any], Any]:
    """Registers how the rows of a kind of kernel follow from those of its operands; None: they do not."""

    def register(rule: Any) -> Any:
        _RULES[kind] = rule
        return rule

    return register


@_local(K.Leaf)
def _leaf(at: _Reader, node: K.Leaf, start: int, stop: int) -> Tensor | None:
    if not at.doubles.as_stored or (node.axes is not None and node.axes[0] != 0):
        return None
    value = at.doubles.rows(node.tensor, start, stop)
    return value if node.axes is None else value.permute(node.axes)


@_local(K.Dirac)
def _dirac(at: _Reader, node: K.Dirac, start: int, stop: int) -> Tensor:
    eye = torch.zeros((stop - start, *node.shape[1:]), dtype=torch.float64, device=at.device)
    rows = torch.arange(start, stop, device=at.device)
    eye.view(stop - start, node.shape[1], -1)[rows - start, rows % node.shape[1], 0] = 1.0
    return eye


@_local(K.ScaleRows)
def _scale_rows(at: _Reader, node: K.ScaleRows, start: int, stop: int) -> Tensor:
    gain = at.whole(node.gain)
    return at.own(node.weight, start, stop).mul_(K.over_rows(gain[start:stop] if gain.ndim else gain, len(node.shape)))


@_local(K.ScaleColumns)
def _scale_columns(at: _Reader, node: K.ScaleColumns, start: int, stop: int) -> Tensor | None:
    if node.groups > 1:
        return None
    return node._compute(at.rows(node.weight, start, stop), at.whole(node.gain))


@_local(K.Place)
def _place(at: _Reader, node: K.Place, start: int, stop: int) -> Tensor:
    return _cut(node, start, stop)._compute(at.rows(node.weight, start, stop))


@_local(K.Regroup)
def _regroup(at: _Reader, node: K.Regroup, start: int, stop: int) -> Tensor:
    rows = at.rows(node.weight, start, stop)
    wide = rows.new_zeros(stop - start, *node.shape[1:])
    wide[_places(node, start, rows)] = rows
    return wide


def _places(node: K.Regroup, start: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of some rows of W go among the columns of its regrouped form."""
    number, width = torch.arange(len(rows), device=rows.device), rows.shape[1]
    height = node.shape[0] // node.groups_from
    group = number + start if height == 1 else (number + start) // height
    columns = group if node.groups_to == 1 else group % (node.groups_from // node.groups_to)
    if width > 1:
        return number.unsqueeze(1), columns.unsqueeze(1) * width + torch.arange(width, device=rows.device)
    return number.unsqueeze(1), columns.unsqueeze(1)


@_local(K.Sum)
def _sum(at: _Reader, node: K.Sum, start: int, stop: int) -> Tensor | None:
    terms = sorted(node.terms, key=lambda t: t.shape != node.shape)
    if terms[0].shape != node.shape:
        return None
    total = at.own(terms[0], start, stop)
    for term in terms[1:]:
        _add(at, term, start, stop, total)
    return total


def _add(at: _Reader, term: K.Kernel, start: int, stop: int, total: Tensor) -> None:
    """Adds the rows of a term; nothing where they are zero by construction."""
    if isinstance(term, K.Place):
        _add(at, term.weight, start, stop, term.region(total))
    elif isinstance(term, K.Regroup):
        rows = at.rows(term.weight, start, stop)
        total[_places(term, start, rows)] += rows
    else:
        total += at.rows(term, start, stop) if len(term.shape) == total.ndim else at.whole(term)


@_local(K.Compose)
def _compose(at: _Reader, node: K.Compose, start: int, stop: int) -> Tensor | None:
    if node.groups > 1:
        return None
    return _cut(node, start, stop)._compute(at.rows(node.outer, start, stop), at.whole(node.inner))


@_local(K.StackRows)
def _stack_rows(at: _Reader, node: K.StackRows, start: int, stop: int) -> Tensor:
    found, offset = [], 0
    for part in node.parts:
        lo, hi = max(start - offset, 0), min(stop - offset, part.shape[0])
        if lo < hi:
            found.append(at.rows(part, lo, hi))
        offset += part.shape[0]
    return torch.cat(found)


@_local(K.TakeColumns)
@_local(K.PlaceColumns)
def _columns(at: _Reader, node: Any, start: int, stop: int) -> Tensor:
    return _cut(node, start, stop)._compute(at.rows(node.source, start, stop))


def _cut(node: Any, start: int, stop: int) -> Any:
    """The node as one of fewer rows; only its own formula is asked for."""
    return replace(node, shape=(stop - start, *node.shape[1:]))
