"""Readings of a kernel: its numbers in float64, or in whatever its leaves are read as, and where it is zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxrep.frozen import arguments
from fxrep.kernel import Constant, Dirac, Kernel, Leaf, Map, topological

LeafValue = Callable[[Leaf], Tensor]


def in_float64(leaf: Leaf) -> Tensor:
    return leaf.tensor.detach().to(torch.float64)


class Doubles:
    """Leaf values as `in_float64` gives them, each tensor converted once; forget it as soon as its region is done.

    `as_stored` says that its values are the tensors' own, so that a large one may be converted elsewhere, piecewise.
    """

    as_stored = True

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, leaf: Leaf) -> Tensor:
        return self.of(leaf.tensor)

    def rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """A copy of some rows of a large tensor, as it is stored; not kept."""
        return tensor.detach()[start:stop].to(torch.float64, copy=True)

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._of:
            self._of[id(tensor)] = tensor, tensor.detach().to(torch.float64)
        return self._of[id(tensor)][1]


def has_zeros(kernel: Kernel) -> bool:
    """Whether an entry is zero by construction, whatever the numbers of the model are: it was laid into a larger
    window, or among more columns, and nothing else was added there."""
    positive: dict[int, Kernel] = {}
    for node in topological((kernel,)):
        positive[id(node)] = _positive(node, positive)
    return not evaluate(positive[id(kernel)]).all()


def _positive(node: Kernel, operands: dict[int, Kernel]) -> Kernel:
    """The node with ones in the place of all numbers, so that nothing cancels."""
    if isinstance(node, (Leaf, Constant, Map)):
        return Constant(node.shape, 1.0)

    def swapped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(swapped, value))
        return operands[id(value)] if isinstance(value, Kernel) else value

    return type(node)(*map(swapped, arguments(node)))


def evaluate(kernel: Kernel, leaf_value: LeafValue = in_float64, like: Tensor | None = None) -> Tensor:
    """The numbers of `kernel`, with every leaf read through `leaf_value`.

    The default folds for deployment: detached, in float64. Other leaf values give other readings of the same fold:
    live parameters (with autograd, or under `torch.func`) give online folds and the rules of a target's gradients.
    Constants are made in the dtype and on the device of `like` (None: float64, where the leaves are).
    """
    if isinstance(kernel, Leaf):
        return _leaf(kernel, leaf_value)
    order = topological((kernel,))
    last = {id(operand): node for node in order for operand in node.operands}
    numbers: dict[int, Tensor] = {}
    kind = (torch.float64, _device(order)) if like is None else (like.dtype, like.device)
    for node in order:
        numbers[id(node)] = _number(node, leaf_value, [numbers[id(o)] for o in node.operands], *kind)
        for operand in node.operands:
            if last[id(operand)] is node:  # temporaries die as soon as their last reader has run
                numbers.pop(id(operand), None)
    return numbers[id(kernel)]


def _number(
    node: Kernel, leaf_value: LeafValue, values: list[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(node, Leaf):
        return _leaf(node, leaf_value)
    if isinstance(node, Constant):
        return torch.full(node.shape, node.value, dtype=dtype, device=device)
    if isinstance(node, Dirac):
        return node._compute().to(device, dtype)
    return node._compute(*values)


def _leaf(leaf: Leaf, leaf_value: LeafValue) -> Tensor:
    value = leaf_value(leaf)
    return value if leaf.axes is None else value.permute(leaf.axes)


def _device(order: Sequence[Kernel]) -> torch.device:
    return next((n.tensor.device for n in order if isinstance(n, Leaf)), torch.device("cpu"))
