"""Whose tensors are whose: the caller's model keeps its own, or, in place, gives them up one region at a time."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxrep import kernel as K
from fxrep.copying import HOOKS
from fxrep.fold import Folded, Into, Like, anew, nowhere
from fxrep.lower import Emit
from fxrep.plan import Decision, Plan
from fxrep.readers.walk import attribute_of
from fxrep.refolding import refold
from fxrep.trees import named_modules


class Ledger:
    """Counts who still needs each tensor of a model that is collapsed in place, and frees it after its last use."""

    def __init__(
        self, root: nn.Module, nodes: Mapping[str, Node], modules: Mapping[str, nn.Module], plan: Plan,
        constants: Collection[str],
    ) -> None:  # fmt: skip
        self.root, self.nodes, self.modules, self.constants = root, nodes, modules, constants
        self.regions = {d.node: self.tensors(d.replaced) for d in plan.decisions.values()}
        self.uses = Counter(m for region in self.regions.values() for m in {memory_of(t) for t in region})
        settled = {*plan.removed, *plan.decisions, *constants}
        elsewhere = (n for n in nodes if n not in settled)
        self.kept = {memory_of(t) for t in self.tensors(elsewhere)}

    def is_read_elsewhere(self, tensor: Tensor) -> bool:
        """Whether more than one decision reads the tensor's memory, or something that goes on being computed."""
        return self.uses[memory_of(tensor)] > 1 or memory_of(tensor) in self.kept

    def memory_for(self, decision: Decision) -> Into:
        """Where the weights of a decision go: each into the tensor of its kind that it is computed from, if nothing
        else reads that any more, so that there is never a second copy of a large weight."""
        free = self._free(decision, uses=1)
        read = {id(e): [leaf.tensor for leaf in K.leaves(*e.kernels)] for e in decision.recipe.emits}

        def into(emit: Emit, like: Like) -> Tensor:
            others = [t for key, found in read.items() if key != id(emit) for t in found]
            alone = [t for t in free if _only_reader(t, read[id(emit)], others)]
            held = next((t.detach() for t in alone if _can_hold(t, emit, like)), None)
            return anew(emit, like) if held is None else held

        return into

    def settle(self, decision: Decision, folded: Iterable[Folded]) -> list[Folded]:
        """The decision is done: puts its numbers into tensors that it frees, where they fit, and lets the others go."""
        self.uses.subtract({memory_of(t) for t in self.regions[decision.node]})
        free = self._free(decision, uses=0)
        settled = {memory_of(t) for t in free} & {memory_of(f.weight) for f in folded if f.weight is not None}
        free = [t for t in free if memory_of(t) not in settled]
        result = [f if f.weight is not None and memory_of(f.weight) in settled else _into(f, free) for f in folded]
        for tensor in free:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return result

    def _free(self, decision: Decision, uses: int) -> list[Tensor]:
        """The tensors of a decision that so many decisions read still, and nobody else."""
        region = self.regions[decision.node]
        return [t for t in region if self.uses[memory_of(t)] == uses and memory_of(t) not in self.kept]

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """What nodes of the old graph read, of parameters and buffers."""
        found: dict[int, Tensor] = {}
        for name in names:
            node = self.nodes[name]
            if node.op == "call_module":
                module = self.modules[str(node.target)]
                found |= {id(t): t for t in (*module.parameters(), *module.buffers())}
            found |= {id(t): t for t in self._constants(node)}
        return list(found.values())

    def _constants(self, node: Node) -> Iterable[Tensor]:
        """The parameters from which the node's constant operands are computed."""
        todo = [node]
        while todo:
            current = todo.pop()
            todo += [n for n in current.all_input_nodes if n.name in self.constants]
            if current.op == "get_attr" and isinstance(t := attribute_of(self.root, str(current.target)), Tensor):
                yield t


def _only_reader(tensor: Tensor, own: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether of all that occupies its memory the tensor itself is read, by `own` alone."""
    memory = memory_of(tensor)
    readings = {id(t) for t in own if memory_of(t) == memory}
    return readings == {id(tensor)} and all(memory_of(t) != memory for t in others)


def _can_hold(tensor: Tensor, emit: Emit, like: Like) -> bool:
    """Whether a tensor, while it is read, can take the weight that is folded from it. In float64 it is read as it is
    stored, not by copies, and might be read again once it is written."""
    if emit.operator is None or emit.operator.transposed or like.dtype == torch.float64:
        return False
    new = nowhere(emit, like)
    if like.channels_last and new.ndim == 4:
        new = new.contiguous(memory_format=torch.channels_last)
    return _kind(tensor) == (new.shape, like.dtype, like.device, new.stride())


def _into(folded: Folded, free: list[Tensor]) -> Folded:
    """The same numbers, in the memory of a freed tensor of their kind if there is one."""
    shared = Counter(memory_of(t) for t in free)
    for i, tensor in enumerate(free):
        if folded.weight is not None and _kind(tensor) == _kind(folded.weight) and shared[memory_of(tensor)] == 1:
            del free[i]
            return replace(folded, weight=tensor.detach().copy_(folded.weight))
    return folded


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def memory_of(tensor: Tensor) -> int:
    """What identifies the memory that a tensor occupies; two parameters may share one."""
    if is_traceable_wrapper_subclass(tensor):  # whose own storage has no address
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


class Collapsed(GraphModule):
    """A GraphModule whose plain attributes (the report, `names`, `stride`, …) survive copying and pickling."""

    def refold(self, model: nn.Module) -> None:
        """Folds new weights of the same architecture in: `fxrep.refold(self, model)`."""
        refold(self, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied = super().__deepcopy__(memo)
        _give_attributes(vars(self), copied, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, super().__reduce__()


def _rebuilt(load: Any, arguments: tuple[Any, ...]) -> Collapsed:
    plain = load(*arguments)
    result = Collapsed(plain, plain.graph, type(plain).__name__)
    _give_attributes(vars(plain), result, {})
    return result.train(plain.training)


def _give_attributes(attributes: Mapping[str, Any], result: nn.Module, memo: dict[int, Any]) -> None:
    for name, attribute in attributes.items():
        if name not in vars(result):
            vars(result)[name] = copy.deepcopy(attribute, memo)


def own_tensors(result: nn.Module, model: nn.Module) -> None:
    """Copies every tensor that still belongs to the caller's model; tied ones stay tied."""
    theirs = {id(t) for _, m in named_modules(model) for t in _stored(m)}
    memo: dict[int, Any] = {}
    for _, module in named_modules(result):
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, Tensor) and id(tensor) in theirs:
                    store[name] = _copied(tensor, memo)


def _stored(module: nn.Module) -> Iterable[Tensor]:
    stores = (module._parameters, module._buffers, vars(module))
    return [t for store in stores for t in store.values() if isinstance(t, Tensor)]


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo and not tensor.is_leaf:  # computed by a hook, such as the old weight_norm's
        memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(tensor, memo)


def carry_attributes(root: nn.Module, result: nn.Module) -> None:
    """Gives the result the model's plain attributes (`default_cfg`, `names`, `stride`, …) and the root's own hooks."""
    plain = vars(nn.Module())
    carried = {
        name: attribute for name, attribute in vars(root).items()
        if name not in plain and not hasattr(result, name) and not isinstance(attribute, nn.Module)
    }  # fmt: skip
    for name, attribute in carried.items():
        setattr(result, name, attribute)
    for name in HOOKS:
        vars(result)[name].update(vars(root)[name])
