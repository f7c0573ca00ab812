"""Makes a graph honest about writes: in-place ops become new versions of a value, and what cannot be told is pinned.

A write is a dependency. Once each version of a value has a name of its own, folding can reorder nothing that matters;
afterwards `restore` turns an op back in place where nobody else holds what it writes to.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

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
FUNCTIONS = {
    torch.relu_: torch.relu, torch.sigmoid_: torch.sigmoid, torch.tanh_: torch.tanh, torch.neg_: torch.neg,
    torch.nn.functional.leaky_relu_: torch.nn.functional.leaky_relu, torch.nn.functional.elu_: torch.nn.functional.elu,
    torch.nn.functional.hardtanh_: torch.nn.functional.hardtanh, torch.nn.functional.selu_: torch.nn.functional.selu,
}  # fmt: skip
#: Methods that end in an underscore and yet write no numbers.
HARMLESS = ("requires_grad_", "detach_", "share_memory_", "rename_")
IDENTITY_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
#: Ops whose result is the operand itself, entry for entry.
SAME_ENTRIES: tuple[Any, ...] = (
    "detach", torch.detach, "contiguous", "to", "type", "float", "half", "double", "bfloat16", "cpu", "cuda", "view_as",
    "alias", *IDENTITY_MODULES,
    torch.nn.functional.dropout, torch.nn.functional.dropout2d, torch.dropout,
)  # fmt: skip
#: Ops whose result may share memory with the operand, in another arrangement.
VIEWS: tuple[Any, ...] = (
    "view", "reshape", torch.reshape, "flatten", torch.flatten, nn.Flatten, nn.Unflatten, "transpose", torch.transpose,
    "permute", torch.permute, "squeeze", torch.squeeze, "unsqueeze", torch.unsqueeze, "expand", "expand_as",
    torch.broadcast_to, "chunk", torch.chunk, "split", torch.split, "narrow", torch.narrow, "select", torch.select,
    "unbind", torch.unbind, operator.getitem, "unfold", "diagonal", torch.diagonal, "swapaxes", torch.swapaxes,
    "movedim", torch.movedim, "t", "reshape_as", torch.tensor_split, "tensor_split", "real", "imag", getattr,
    "unflatten", torch.unflatten, "ravel", torch.ravel,
)  # fmt: skip
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
    """Which values may share memory: classes of nodes, merged as views are met."""

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


def functionalize(graph: Graph, modules: dict[str, nn.Module]) -> set[str]:
    """Turns in-place ops into new versions of their value, in `graph`; gives the names of the nodes to leave alone.

    Those are values that share memory with a write that cannot be followed: a slice that is written, the network's own
    input or a parameter that is overwritten, an op that nothing is known about.
    """
    memory = _Memory()
    pinned: set[str] = set()
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        written = _written_operand(node, modules)
        if written is None:
            memory.join(node, _may_share_with(node, modules))
            continue
        sharing = memory.sharing(written)
        if _follow(node, written, sharing, position, modules):
            memory.fresh(node)
        else:
            memory.join(node, [written])
            pinned.update(n.name for n in memory.sharing(node))
    return pinned


def drop_identities(graph: Graph, modules: dict[str, nn.Module]) -> None:
    """Removes `nn.Identity` and eval-mode dropout, which give the very tensor that they get."""
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = modules[str(node.target)]
        if type(module) in IDENTITY_MODULES and not module.training and not is_hooked(module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at, or may change, what goes in or comes out."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _written_operand(node: Node, modules: dict[str, nn.Module]) -> Node | None:
    """The operand that the node writes into, if it writes."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if node.op == "call_module":
        return first if getattr(modules.get(str(node.target)), "inplace", False) is True else None
    if node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
        return first if writes or name == "__setitem__" else None
    if node.op != "call_function":
        return None
    if isinstance(out := node.kwargs.get("out"), Node):
        return out
    name = getattr(node.target, "__name__", "")
    known = node.target in OPERATORS or node.target in FUNCTIONS or node.target is operator.setitem
    writes = known or node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
    return first if writes else None


def _may_share_with(node: Node, modules: dict[str, nn.Module]) -> list[Node]:
    """The operands whose memory the result may share: a view's source, and all of them for an op nobody knows."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    target = node.target
    if node.op == "call_module":
        module = modules[str(node.target)]
        target = type(module)
        if target.__module__.startswith("torch.nn") and target not in SAME_ENTRIES + VIEWS:
            return []
    elif target not in SAME_ENTRIES + VIEWS and _is_known(node):
        return []
    return list(node.all_input_nodes)


def _is_known(node: Node) -> bool:
    if node.op == "call_method":
        return hasattr(Tensor, str(node.target))
    origin = str(getattr(node.target, "__module__", None) or "torch")
    return origin.split(".")[0] in ("torch", "_operator", "operator", "math", "builtins")


def _follow(
    node: Node, written: Node, sharing: list[Node], position: dict[Node, int], modules: dict[str, nn.Module]
) -> bool:
    """Makes the node functional and lets later readers of what it wrote read the new version. False: cannot be told."""
    if any(n.op in ("placeholder", "get_attr") for n in sharing) or "out" in node.kwargs:
        return False
    later = [(n, u) for n in sharing for u in n.users if u is not node and position[u] > position[node]]
    if any(_origin(n, modules) is not _origin(written, modules) for n, _ in later):
        return False
    if not _make_functional(node, modules):
        return False
    for stale, user in later:
        user.replace_input_with(stale, node)
    return True


def _origin(node: Node, modules: dict[str, nn.Module]) -> Node:
    while node.args and isinstance(node.args[0], Node):
        target = type(modules[str(node.target)]) if node.op == "call_module" else node.target
        if target not in SAME_ENTRIES:
            break
        node = node.args[0]
    return node


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
    elif node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        return False
    node.meta[META_KEY] = before
    return True


def restore(graph: Graph, ours: set[Node], modules: dict[str, nn.Module]) -> None:
    """Turns ops back in place where what they write to was made for them alone: a fresh value with one reader."""
    for node in graph.nodes:
        before: InPlace | None = node.meta.pop(META_KEY, None)
        operand = node.args[0] if node.args else None
        if before is None or not isinstance(operand, Node) or len(operand.users) != 1:
            continue
        if operand in ours or (operand.op not in ("placeholder", "get_attr") and not _may_share_with(operand, modules)):
            node.target = before.target
            node.kwargs = {**node.kwargs, **({"inplace": True} if "inplace" in before.kwargs else {})}
