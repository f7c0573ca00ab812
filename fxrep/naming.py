"""What new layers are called, and how nodes are told to the user: by the names of the modules that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count

from torch import nn
from torch.fx import Node

from fxrep.plan import Plan
from fxrep.sharing import Keys


def layer_names(plan: Plan, nodes: Mapping[str, Node], modules: Mapping[str, nn.Module], keys: Keys) -> dict[int, str]:
    """By emit: the qualified name of its new layer, `reparam` in the innermost module that encloses all it replaces.

    Equal layers, as the calls of one layer of the model become, are one and have one name.
    """
    leaves = {str(n.target) for n in nodes.values() if n.op == "call_module"}
    taken, names = set(modules), dict[int, str]()
    named: dict[int, str] = {}
    shared = keys.shared(e for d in plan.decisions.values() for e in d.recipe.emits if e.stores)
    for decision in plan.decisions.values():
        scope = common_scope([nodes[r] for r in decision.replaced], leaves)
        stem = f"{scope}.reparam" if scope else "reparam"
        for emit in decision.recipe.emits:
            key = shared.get(id(emit))
            if key in named:
                names[id(emit)] = named[key]
                continue
            numbered = chain((stem,), (f"{stem}_{i}" for i in count(1)))
            name = next(n for n in numbered if n not in taken and not hasattr(modules.get(scope), n.rpartition(".")[2]))
            if emit.stores or emit.anchor.rows is not None:
                taken.add(name)
            if key is not None:
                named[key] = name
            names[id(emit)] = name
    return names


def common_scope(nodes: list[Node], leaves: set[str]) -> str:
    """The innermost module that encloses all of `nodes` and is no layer itself."""
    paths = [scope_of(n).split(".") for n in nodes]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1 or ".".join([*common, level[0]]) in leaves:
            break
        common.append(level[0])
    return ".".join(common)


def scope_of(node: Node) -> str:
    """The path of the module whose forward made this node; for a layer, of the module that called it."""
    stack = node.meta.get("nn_module_stack") or {}
    innermost: str = next(reversed(stack.values()), ("",))[0] if stack else ""
    return innermost.rpartition(".")[0] if node.op == "call_module" else innermost


def label_of(node: Node) -> str:
    """The qualified name of a layer; for another op that of the module whose forward made it, and the op's own."""
    if node.op == "call_module":
        return str(node.target)
    scope = scope_of(node)
    return f"{scope}:{node.name}" if scope else node.name
