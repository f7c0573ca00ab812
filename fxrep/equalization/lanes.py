"""Which channels of which layers must be scaled as one, found through the ops that a scale commutes with."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxrep.readers import is_hooked
from fxrep.trees import named_modules

LAYERS: Mapping[Any, int] = MappingProxyType({
    nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
})  # fmt: skip
"""Layers whose ranges are equalised -> the number of axes after the channels."""

ANY, SPATIAL = -1, -2
HOMOGENEOUS: Mapping[Any, int] = MappingProxyType({
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), ANY),
    **dict.fromkeys((torch.relu, F.relu, "relu", "relu_", torch.relu_, F.leaky_relu, F.prelu, "contiguous"), ANY),
    **dict.fromkeys((operator.neg, torch.neg), ANY),
    **dict.fromkeys((nn.Upsample, F.interpolate, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), SPATIAL),
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, F.max_pool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, F.max_pool3d), 3),
    **dict.fromkeys((F.avg_pool1d, F.adaptive_avg_pool1d), 1),
    **dict.fromkeys((F.avg_pool2d, F.adaptive_avg_pool2d), 2),
    **dict.fromkeys((F.avg_pool3d, F.adaptive_avg_pool3d), 3),
})  # fmt: skip
"""Ops with f(s·x) = s·f(x) for s > 0, channel by channel -> the axes they act on. ANY: on each number
alone, SPATIAL: on all axes after the channels."""

SUMS = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_")
UNSCALED = ("shape", "ndim", "dtype", "device")
"""Attributes of a value that no scale changes."""


class Lanes(NamedTuple):
    """The channels of a value: a number for each, the same for those that one scale must serve."""

    ids: tuple[int, ...]
    dims: int
    """Axes after that of the channels; 0: they are the last axis."""
    is_flat: bool = False
    """Each channel stands for a run of equally many entries of the last axis."""


NOBODYS = Lanes((), -1)
"""Of a value that a layer gives which must stay: no layer's input has that many axes."""


@dataclass
class Classes:
    """Numbers that were found to be one, and why the scales of some must stay."""

    parents: list[int] = field(default_factory=list)
    fixed: list[tuple[tuple[int, ...], str]] = field(default_factory=list)

    def fresh(self, count: int) -> tuple[int, ...]:
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number

    def unite(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        for a, b in zip(ours, theirs, strict=True):
            self.parents[self.root(a)] = self.root(b)

    def reasons(self) -> dict[int, str]:
        """By class, the first reason for which its scale must stay."""
        told: dict[int, str] = {}
        for ids, reason in self.fixed:
            for number in ids:
                told.setdefault(self.root(number), reason)
        return told


@dataclass
class Wiring:
    """The layers of a graph, and the class of each channel that they write and read."""

    writes: dict[str, tuple[int, ...]]
    reads: dict[str, tuple[int, ...]]
    """Of a Linear after a flatten, fewer than its columns: each for a run of them."""
    why_fixed: Mapping[int, str]
    stays: Mapping[str, str]
    """The layers that nothing may be done to, and why."""


def wiring_of(module: GraphModule) -> Wiring:
    """Reads a graph once, in its order."""
    walk = _Walk(module)
    for node in module.graph.nodes:
        walk.lanes[node] = walk.result_of(node)
    find = walk.classes.root
    writes = {name: tuple(map(find, ids)) for name, ids in walk.writes.items()}
    reads = {name: tuple(map(find, ids)) for name, ids in walk.reads.items()}
    return Wiring(writes, reads, walk.classes.reasons(), {str(n.target): why for n, why in walk.own.items()})


class _Walk:
    def __init__(self, module: GraphModule) -> None:
        self.modules: dict[str, Any] = dict(named_modules(module))
        calls = [n for n in module.graph.nodes if n.op == "call_module" and type(self.modules[n.target]) in LAYERS]
        self.own = dict(_fixed(module, calls, self.modules))
        self.classes = Classes()
        self.lanes: dict[Node, Lanes | None] = {}
        self.writes: dict[str, tuple[int, ...]] = {}
        self.reads: dict[str, tuple[int, ...]] = {}

    def result_of(self, node: Node) -> Lanes | None:
        """The lanes of a node's value; what no rule knows has none, and the scales of what it reads must stay."""
        if node.op in ("placeholder", "get_attr") or _asks_for_sizes(node):
            return None
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        if module is None or not is_hooked(module):
            kind: Any = node.target if module is None else type(module)
            rule = RULES.get(kind)
            result = rule(self, node, kind) if rule else None
            if result is not None:
                return result
        self.fix_inputs(node, f"{node.name} reads it")
        return None

    def fix_inputs(self, node: Node, reason: str) -> None:
        for read in node.all_input_nodes:
            lanes = self.lanes[read]
            if lanes is not None:
                self.classes.fixed.append((lanes.ids, reason))

    def only(self, node: Node) -> Lanes | None:
        """The lanes of the one value that a node takes as its first argument, and nowhere else."""
        first = node.args[0] if node.args else None
        return self.lanes[first] if isinstance(first, Node) and node.all_input_nodes == [first] else None


Rule = Callable[[_Walk, Node, Any], "Lanes | None"]


def _layer(walk: _Walk, node: Node, kind: Any) -> Lanes | None:
    """Reads the lanes of its input, and writes lanes of its own."""
    name, layer, x = str(node.target), walk.modules[str(node.target)], walk.only(node)
    if node in walk.own:
        walk.fix_inputs(node, f"{name} reads it: {walk.own[node]}")
        return NOBODYS
    columns, rows = (
        (layer.in_features, layer.out_features) if kind is nn.Linear else (layer.in_channels, layer.out_channels)
    )
    if x is not None and x.dims == LAYERS[kind] and _runs(x, int(columns)):
        walk.reads[name] = x.ids
    else:
        walk.fix_inputs(node, f"{node.name} reads it")
    walk.writes[name] = walk.classes.fresh(int(rows))
    return Lanes(walk.writes[name], LAYERS[kind])


def _runs(x: Lanes, columns: int) -> bool:
    return bool(x.ids) and (columns % len(x.ids) == 0 if x.is_flat else columns == len(x.ids))


def _homogeneous(walk: _Walk, node: Node, kind: Any) -> Lanes | None:
    first = node.args[0] if node.args else None
    x = walk.lanes[first] if isinstance(first, Node) else None
    others = [n for n in node.all_input_nodes if n is not first]
    if x is None or any(walk.lanes[n] is not None for n in others):
        return None
    acts_on = HOMOGENEOUS[kind]
    return x if acts_on in (ANY, x.dims) or (acts_on == SPATIAL and x.dims > 0) else None


def _sum(walk: _Walk, node: Node, _: Any) -> Lanes | None:
    """s·a + s·b = s·(a + b): the lanes of both are one."""
    values = [walk.lanes[a] if isinstance(a, Node) else None for a in node.args]
    if len(values) != 2 or node.kwargs:
        return None
    a, b = values
    if a is None or b is None or (a.dims, a.is_flat, len(a.ids)) != (b.dims, b.is_flat, len(b.ids)):
        return None
    walk.classes.unite(a.ids, b.ids)
    return a


def _scaled(walk: _Walk, node: Node, _: Any) -> Lanes | None:
    number = node.args[1] if len(node.args) == 2 else None
    return walk.only(node) if isinstance(number, (int, float)) and not node.kwargs else None


def _flat(walk: _Walk, node: Node, kind: Any) -> Lanes | None:
    """Everything after the batch as one axis: the entries of a channel stay together."""
    x = walk.only(node)
    if x is None or x.dims < 1 or x.is_flat:
        return None
    if kind is nn.Flatten:
        module = walk.modules[str(node.target)]
        start, end = module.start_dim, module.end_dim
    else:
        start, end = (
            node.args[i] if len(node.args) > i else node.kwargs.get(key, default)
            for i, key, default in ((1, "start_dim", 0), (2, "end_dim", -1))
        )
    return Lanes(x.ids, 0, True) if (start, end) in ((1, -1), (1, x.dims + 1)) else None


def _reshaped(walk: _Walk, node: Node, _: Any) -> Lanes | None:
    """`x.view(x.size(0), -1)`."""
    first = node.args[0] if node.args else None
    x = walk.lanes[first] if isinstance(first, Node) else None
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if x is None or x.dims < 1 or x.is_flat or len(sizes) != 2 or sizes[1] != -1:
        return None
    batch = sizes[0]
    return Lanes(x.ids, 0, True) if isinstance(batch, Node) and _is_batch(batch, first) else None


def _asks_for_sizes(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in UNSCALED


def _is_batch(size: Node, value: Any) -> bool:
    """`value.size(0)` or `value.shape[0]`."""
    if size.op == "call_method":
        return size.target == "size" and size.args == (value, 0)
    shape = size.args[0] if size.target is operator.getitem and size.args[1] == 0 else None
    return isinstance(shape, Node) and _asks_for_sizes(shape) and shape.args[0] is value


def _mean(walk: _Walk, node: Node, _: Any) -> Lanes | None:
    """Over all axes after the channels."""
    x = walk.only(node)
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if x is None or x.dims < 1 or not isinstance(axes, (tuple, list)) or not all(isinstance(a, int) for a in axes):
        return None
    if {int(a) % (x.dims + 2) for a in axes} != set(range(2, x.dims + 2)):
        return None
    return x if keeps else Lanes(x.ids, 0)


def _joined(walk: _Walk, node: Node, _: Any) -> Lanes | None:
    """A concatenation of channels is one of lanes."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    found = [walk.lanes[p] if isinstance(p, Node) else None for p in parts] if isinstance(parts, (tuple, list)) else []
    lanes = [x for x in found if x is not None and not x.is_flat]
    if not lanes or len(lanes) < len(found) or len({x.dims for x in lanes}) > 1:
        return None
    dims = lanes[0].dims
    if axis not in ((1, -dims - 1) if dims else (-1,)):
        return None
    return Lanes(tuple(i for x in lanes for i in x.ids), dims)


RULES: Mapping[Any, Rule] = MappingProxyType({
    **dict.fromkeys(LAYERS, _layer),
    **dict.fromkeys(HOMOGENEOUS, _homogeneous),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys((operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"), _scaled),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), _flat),
    **dict.fromkeys(("view", "reshape", torch.reshape), _reshaped),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.cat, torch.concat), _joined),
})  # fmt: skip
"""What is known of an op: the lanes of its value from those that it reads, or None where no scale goes through."""


def _fixed(module: GraphModule, calls: Sequence[Node], modules: Mapping[str, Any]) -> Iterator[tuple[Node, str]]:
    """The calls of layers whose numbers must stay, and why."""
    holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    called = Counter(id(modules[str(n.target)]) for n in calls)
    read = {str(n.target).rpartition(".")[0] for n in module.graph.find_nodes(op="get_attr")}
    for node in calls:
        name = str(node.target)
        layer = modules[name]
        if called[id(layer)] > 1:
            yield node, "it is called twice"
        elif name in read:
            yield node, "its weight is read besides"
        elif any(holders[id(p)] > 1 for p in layer.parameters()):
            yield node, "its weight is shared"
        elif is_hooked(layer):
            yield node, "a hook is on it"
