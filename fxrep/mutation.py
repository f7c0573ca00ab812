"""Makes a graph honest about writes: in-place ops become new versions of a value, and what cannot be told is pinned.

A write is a dependency. Once each version of a value has a name of its own, folding can reorder nothing that matters;
afterwards `restore` turns an op back in place where nobody else holds what it writes to.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxrep.readers import base_name, canonical, is_hooked
from fxrep.readers.arithmetic import DROPOUTS, FUNCTIONAL_DROPOUTS, drops
from fxrep.readers.borders import assigned
from fxrep.readers.walk import writes

OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ipow: operator.pow,
}  # fmt: skip
METHODS = {
    f"{name}_": name
    for name in (
        "add", "sub", "mul", "div", "neg", "relu", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "exp", "sqrt",
        "abs", "pow", "square", "addcmul", "hardswish", "silu",
    ) if hasattr(Tensor, name)
}  # fmt: skip
FUNCTIONS: dict[Any, Any] = {
    torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh, torch.neg_: torch.neg,
    torch.nn.functional.leaky_relu_: torch.nn.functional.leaky_relu, torch.nn.functional.elu_: torch.nn.functional.elu,
    torch.nn.functional.hardtanh_: torch.nn.functional.hardtanh, torch.nn.functional.selu_: torch.nn.functional.selu,
    operator.setitem: assigned,
}  # fmt: skip
IDENTITY_MODULES = (nn.Identity, *DROPOUTS)
DETACHED: frozenset[Any] = frozenset(("detach", torch.detach))
#: Ops whose result is the operand itself, entry for entry. Not "contiguous" or "to", which may copy.
SAME_ENTRIES: tuple[Any, ...] = (
    *DETACHED, "view_as", torch.ops.aten.alias.default, *IDENTITY_MODULES, *FUNCTIONAL_DROPOUTS,
)  # fmt: skip
#: Modules of torch.nn whose result may share memory with the operand.
VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold, nn.Unfold, nn.ChannelShuffle)
#: Names of torch's functions, operators and methods that certainly write into new memory. All others may give a view.
_FRESH = """
    add sub mul truediv div floordiv mod neg pow matmul mm bmm addmm baddbmm addcmul addcdiv rsub eq ne lt le gt ge
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding batch_norm
    layer_norm group_norm instance_norm local_response_norm rms_norm normalize relu relu6 elu selu celu leaky_relu
    prelu silu mish gelu glu hardtanh hardswish hardsigmoid sigmoid tanh softplus softsign logsigmoid hardshrink
    softshrink threshold softmax log_softmax softmin max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d lp_pool2d interpolate grid_sample cat concat concatenate stack clone mean sum amax amin prod
    std var norm argmax argmin cumsum exp log abs sqrt rsqrt square reciprocal sin cos erf sign maximum minimum
    pad where zeros_like ones_like full_like scaled_dot_product_attention index_select gather roll flip
    convolution _native_batch_norm_legit_no_training native_layer_norm native_group_norm max_pool2d_with_indices
    _softmax _log_softmax _adaptive_avg_pool2d constant_pad_nd slice_scatter _to_copy
"""
FRESH = frozenset(_FRESH.split())
META_KEY = "fxrep_in_place"
TWIN_SUFFIX = "_out_of_place"


@dataclass(frozen=True)
class InPlace:
    """What an op was before it was made functional."""

    op: str
    target: Any
    kwargs: dict[str, Any]
    module: nn.Module | None = None


@dataclass
class _Memory:
    """Which values may share memory: classes of nodes, merged as views are met; `same` give their very operand."""

    same: frozenset[Any]
    of: dict[Node, int] = field(default_factory=dict)
    members: dict[int, list[Node]] = field(default_factory=dict)

    def fresh(self, node: Node) -> None:
        self.of[node] = len(self.of)
        self.members.setdefault(self.of[node], []).append(node)

    def join(self, node: Node, others: list[Node]) -> None:
        self.fresh(node)
        for other in others:
            self._merge(self.of[node], self.of[other])

    def _merge(self, a: int, b: int) -> None:
        if a != b:
            for node in self.members.pop(b):
                self.of[node] = a
                self.members[a].append(node)

    def sharing(self, node: Node) -> list[Node]:
        return self.members[self.of[node]]


@dataclass(frozen=True)
class Writes:
    """What is left of writing: values to leave alone, and by value the places in the graph where it may be written."""

    pinned: frozenset[str]
    places: Mapping[str, tuple[int, ...]]


def functionalize(graph: Graph, modules: dict[str, nn.Module], *, trains: bool = False) -> Writes:
    """Turns in-place ops into new versions of their value, in `graph`, and tells of those that cannot be followed.

    Those are writes into a value of which a view is read later, to the network's own input or to a parameter, and
    whatever a module or function that nothing is known about may do to what it is given. In a graph that `trains` a
    detached value is no version of the other: what is written into one has other gradients when read as the other.
    """
    memory = _Memory(frozenset(SAME_ENTRIES) - (DETACHED if trains else frozenset()))
    pinned: set[str] = set()
    places: dict[str, list[int]] = {}
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = _written_operand(node, modules)
        if written is not None and _follow(node, written, memory, position, modules):
            memory.fresh(node)
            continue
        if written is not None and node.target is not operator.setitem and "out" not in node.kwargs:
            _read_after(node, written, memory, position, modules)
        memory.join(node, _may_share_with(node, modules) if written is None else [written])
        touched = [] if written is None else memory.sharing(node)
        pinned.update(n.name for n in touched)
        if written is None and not _is_known(node, modules):
            touched = [n for operand in node.all_input_nodes for n in memory.sharing(operand)]
        for value in touched:
            places.setdefault(value.name, []).append(position[node])
    return Writes(frozenset(pinned), {name: tuple(found) for name, found in places.items()})


def written_inputs(graph: Graph, modules: dict[str, nn.Module]) -> frozenset[str]:
    """The placeholders whose memory the graph may write, running statistics among them; `graph` is left as it is."""
    copied = copy.deepcopy(graph)
    statistics = [o.name for node in graph.nodes if _updates_statistics(node) for o in node.all_input_nodes[1:]]
    writes = functionalize(copied, dict(modules))
    written = {*writes.pinned, *writes.places, *statistics}
    return frozenset(n.name for n in graph.nodes if n.op == "placeholder" and n.name in written)


def _updates_statistics(node: Node) -> bool:
    """A batch or instance norm by the batch's statistics writes its running ones, which no schema says."""
    if node.op != "call_function" or base_name(node.target) not in ("batch_norm", "instance_norm"):
        return False
    by_batch = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", node.kwargs.get("use_input_stats"))
    return by_batch is not False


def drop_identities(graph: Graph, modules: dict[str, nn.Module]) -> None:
    """Removes `nn.Identity` and eval-mode dropout, which give the very tensor that they get."""
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = modules[str(node.target)]
        if type(module) in IDENTITY_MODULES and not module.training and not is_hooked(module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _written_operand(node: Node, modules: dict[str, nn.Module]) -> Node | None:
    """The operand that the node writes into, if it writes."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if node.op == "call_module":
        return first if getattr(modules.get(str(node.target)), "inplace", False) is True else None
    if isinstance(node.target, OpOverload):
        return _written_by_schema(node)
    if isinstance(out := node.kwargs.get("out"), Node):
        return out
    return first if writes(node.target, node.kwargs) else None


def _written_by_schema(node: Node) -> Node | None:
    """The operand that an op says it writes: `add_(Tensor(a!) self, …)`; its running statistics, for a batch norm."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    written = (named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return next((operand for operand in written if isinstance(operand, Node)), None)


def _may_share_with(node: Node, modules: dict[str, nn.Module]) -> list[Node]:
    """The operands whose memory the result may share: all of them, unless the op certainly makes new memory."""
    return [] if node.op in ("placeholder", "get_attr") or _is_fresh(node, modules) else list(node.all_input_nodes)


def _is_fresh(node: Node, modules: dict[str, nn.Module]) -> bool:
    if not _is_known(node, modules):
        return False
    if node.op == "call_module":
        kinds = VIEW_MODULES if _draws(node, modules) else (*IDENTITY_MODULES, *VIEW_MODULES)
        return type(modules[str(node.target)]) not in kinds
    return node.target is assigned or base_name(node.target) in FRESH


def _is_known(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the op is one of torch's, which write into nothing but what they are named for."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module).__module__.startswith("torch.nn") and not is_hooked(module)
    if node.op == "call_function" and node.target is not assigned:
        origin = str(getattr(node.target, "__module__", None) or "torch")
        return origin.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins")
    return True


def _follow(
    node: Node, written: Node, memory: _Memory, position: dict[Node, int], modules: dict[str, nn.Module]
) -> bool:
    """Makes the node functional and lets later readers of what it wrote read the new version. False: cannot be told."""
    sharing = memory.sharing(written)
    if any(n.op in ("placeholder", "get_attr") for n in sharing) or "out" in node.kwargs:
        return False
    later = [(n, u) for n in sharing for u in n.users if u is not node and position[u] > position[node]]
    if any(_origin(n, memory, modules) is not _origin(written, memory, modules) for n, _ in later):
        return False
    if not _make_functional(node, modules):
        return False
    for stale, user in later:
        user.replace_input_with(stale, node)
    return True


def _read_after(
    node: Node, written: Node, memory: _Memory, position: dict[Node, int], modules: dict[str, nn.Module]
) -> None:
    """Lets later readers of what is written in place read the result, which is the same tensor: one value, one name."""
    for same in memory.sharing(written):
        if _origin(same, memory, modules) is _origin(written, memory, modules):
            for user in [u for u in same.users if position[u] > position[node]]:
                user.replace_input_with(same, node)


def _origin(node: Node, memory: _Memory, modules: dict[str, nn.Module]) -> Node:
    while node.args and isinstance(node.args[0], Node):
        target = type(modules[str(node.target)]) if node.op == "call_module" else canonical(node.target)
        if target not in memory.same or _draws(node, modules):
            break
        node = node.args[0]
    return node


def _draws(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is a dropout that drops something."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in DROPOUTS and drops(module)
    given = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
    is_dropout = canonical(node.target) in FUNCTIONAL_DROPOUTS
    return is_dropout and given.get("training", given.get("train", True)) is not False


def _make_functional(node: Node, modules: dict[str, nn.Module]) -> bool:
    before = InPlace(node.op, node.target, dict(node.kwargs))
    if node.op == "call_module":
        module = modules[str(node.target)]
        before = InPlace(node.op, node.target, dict(node.kwargs), module)
        twin = copy.copy(module)
        twin.inplace = False  # type: ignore[assignment]
        name = f"{node.target}{TWIN_SUFFIX}"  # another site of the module may have to stay as it is
        modules[name] = modules.get(name, twin)
        node.target = name
    elif node.op == "call_method" and node.target in METHODS:
        node.target = METHODS[str(node.target)]
    elif node.target in OPERATORS:
        node.target = OPERATORS[node.target]
    elif node.target in FUNCTIONS:
        node.target = FUNCTIONS[node.target]
    elif (op := _out_of_place(node.target)) is not None:
        node.target = op
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        return False
    node.meta[META_KEY] = before
    return True


def _out_of_place(target: Any) -> OpOverload | None:
    """`aten.add.Tensor` for `aten.add_.Tensor`: the op of that name and overload which makes new memory."""
    if not isinstance(target, OpOverload) or not target._opname.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    same = twin is not None and [a.name for a in twin._schema.arguments] == [a.name for a in target._schema.arguments]
    return twin if same else None


def restore(graph: Graph, ours: set[Node], modules: dict[str, nn.Module]) -> None:
    """Turns ops back in place where what they write to was made for them alone: a fresh value with one reader."""
    alone = {node: _is_alone(node, ours, modules) for node in graph.nodes if META_KEY in node.meta}
    for node, may_write in alone.items():
        before: InPlace = node.meta.pop(META_KEY)
        if before.target is operator.setitem:
            _assign(graph, node, may_write)
        elif may_write:
            node.target = before.target
            node.kwargs = {**node.kwargs, **({"inplace": True} if "inplace" in before.kwargs else {})}


def _is_alone(node: Node, ours: set[Node], modules: dict[str, nn.Module]) -> bool:
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node) or len(operand.users) != 1:
        return False
    return operand in ours or (operand.op.startswith("call") and _is_fresh(operand, modules))


def _assign(graph: Graph, node: Node, may_write: bool) -> None:
    """An assignment as torch has it: into the value itself, or into a copy; later readers read what was written to."""
    target, *rest = node.args
    assert isinstance(target, Node), "only values of the network are written"
    if not may_write:
        with graph.inserting_before(node):
            target = graph.call_function(torch.clone, (target,))
    node.replace_all_uses_with(target)
    node.target, node.args = operator.setitem, (target, *rest)
