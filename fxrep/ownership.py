"""Whose tensors are whose: the caller's model keeps its own, or, in place, gives them up one region at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxrep.fold import Folded
from fxrep.plan import Decision, Plan

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


class Ledger:
    """Counts who still needs each tensor of a model that is collapsed in place, and frees it after its last use."""

    def __init__(
        self, root: nn.Module, nodes: Mapping[str, Node], modules: Mapping[str, nn.Module], plan: Plan
    ) -> None:
        self.root, self.nodes, self.modules = root, nodes, modules
        self.regions = {d.node: self._tensors((*d.inlined, d.node)) for d in plan.decisions.values()}
        self.uses = Counter(id(t) for region in self.regions.values() for t in region)
        self.kept = {
            id(t) for t in self._tensors(n for n in nodes if n not in plan.removed and n not in plan.decisions)
        }

    def keep(self, decision: Decision) -> None:
        """The decision was not installed: what it stands for goes on being computed."""
        self.kept |= {id(t) for t in self.regions[decision.node]}

    def settle(self, decision: Decision, folded: Iterable[Folded]) -> list[Folded]:
        """The decision is done: puts its numbers into tensors that it frees, where they fit, and lets the others go."""
        free = []
        for tensor in self.regions[decision.node]:
            self.uses[id(tensor)] -= 1
            if not self.uses[id(tensor)] and id(tensor) not in self.kept:
                free.append(tensor)
        result = [_into(f, free) for f in folded]
        for tensor in free:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return result

    def _tensors(self, names: Iterable[str]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for name in names:
            node = self.nodes[name]
            if node.op == "call_module":
                module = self.modules[str(node.target)]
                found |= {id(t): t for t in (*module.parameters(), *module.buffers())}
            for operand in (node, *node.all_input_nodes):
                if operand.op == "get_attr" and isinstance(t := _attribute(self.root, str(operand.target)), Tensor):
                    found[id(t)] = t
        return list(found.values())


def _into(folded: Folded, free: list[Tensor]) -> Folded:
    """The same numbers, in the memory of a freed tensor of their shape if there is one."""
    weight = folded.weight
    for i, tensor in enumerate(free):
        if weight is not None and (tensor.shape, tensor.dtype, tensor.device) == (
            weight.shape,
            weight.dtype,
            weight.device,
        ):
            del free[i]
            return replace(folded, weight=tensor.detach().copy_(weight))
    return folded


def _attribute(root: nn.Module, target: str) -> Any:
    owner: Any = root
    for part in target.split("."):
        owner = getattr(owner, part, None)
    return owner


def own_tensors(result: nn.Module, model: nn.Module) -> None:
    """Copies every tensor that still belongs to the caller's model; tied ones stay tied."""
    theirs = {id(t) for m in model.modules() for t in _stored(m)}
    memo: dict[int, Any] = {}
    for module in result.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, Tensor) and id(tensor) in theirs:
                    store[name] = _copied(tensor, memo)


def _stored(module: nn.Module) -> Iterable[Tensor]:
    stores = (module._parameters, module._buffers, vars(module))
    return (t for store in stores for t in store.values() if isinstance(t, Tensor))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo and not tensor.is_leaf:  # computed by a hook, such as the old weight_norm's
        memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(tensor, memo)


def carry_attributes(root: nn.Module, result: GraphModule) -> None:
    """Gives the result the model's plain attributes (`default_cfg`, `names`, `stride`, …) and the root's own hooks."""
    plain = vars(nn.Module())
    carried = {
        name: attribute for name, attribute in vars(root).items()
        if name not in plain and not hasattr(result, name) and not isinstance(attribute, (Tensor, nn.Module))
    }  # fmt: skip
    for name, attribute in carried.items():
        setattr(result, name, attribute)
    result.meta["_user_preserved_attributes"] = carried  # what a deep copy of a GraphModule would lose
    for name in HOOKS:
        vars(result)[name].update(vars(root)[name])
