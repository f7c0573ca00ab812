"""From a plan to a graph: the only writer."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxrep import mutation
from fxrep.fold import AVERAGE, Folded, layer_of, pad_arguments, pad_mode, scale_of
from fxrep.kernel import Kernel, Leaf
from fxrep.lower import Emit, needs_explicit_pad
from fxrep.naming import common_scope, label_of
from fxrep.ownership import Collapsed
from fxrep.plan import Decision, Plan
from fxrep.readers import Readings, is_bypass
from fxrep.readers.sizes import ASSERTS
from fxrep.recorder import Recorder
from fxrep.refolding import DRAFT, Draft, Fold
from fxrep.shapes import Dim, Product, Size

PROVENANCE = "fxrep_provenance"


@dataclass
class Rewriter:
    """Writes the new graph next to the old one. `folded` holds the numbers of every emit of every decision, `names`
    what their layers are called."""

    old: Graph
    plan: Plan
    readings: Readings
    modules: dict[str, nn.Module]
    folded: Mapping[int, Folded]
    names: Mapping[int, str]
    new: Graph = field(default_factory=lambda: Graph(tracer_cls=Recorder))
    env: dict[Node, Any] = field(default_factory=dict)
    ours: set[Node] = field(default_factory=set)
    droppable: list[Node] = field(default_factory=list)
    folds: dict[str, Fold] = field(default_factory=dict)
    #: by name, the values of terms that are no nodes of the old graph
    values: dict[str, Node] = field(default_factory=dict)
    #: the new nodes that compute sizes
    numbers: set[str] = field(default_factory=set)
    #: the names of the new layers
    installed: set[str] = field(default_factory=set)

    def write(self, class_name: str) -> GraphModule:
        """The collapsed module, over the modules and tensors that are still called."""
        self.nodes = {n.name: n for n in self.old.nodes}
        self.new._codegen = self.old._codegen
        self.guarded = self._assumptions()
        self.terms: dict[str, list[Decision]] = {}
        for decision in self.plan.decisions.values():
            if decision.node != decision.at:
                self.terms.setdefault(decision.at, []).append(decision)
        for node in self.old.nodes:
            self._node(node)
        for node in reversed(self.droppable):
            if not node.users:
                self.new.erase_node(node)
        mutation.restore(self.new, self.ours, self.modules)
        self.new.lint()
        assert len(self.new.find_nodes(op="output")) == 1, "the network's result was not computed"
        targets = {
            str(n.target): held_at(str(n.target), self.modules)
            for n in self.new.nodes
            if n.op in ("call_module", "get_attr")
        }
        result = Collapsed(targets, self.new, class_name)
        vars(result)[DRAFT] = self._draft()
        return result

    def _draft(self) -> Draft:
        equal = [*self.readings.equal, *(e for d in self.plan.decisions.values() for e in d.equal)]
        constants = (k.tensor for k in self.readings.facts.constants.values() if isinstance(k, Leaf))
        return Draft(self.folds, equal, [t for t in constants if not t.is_floating_point()])

    def _node(self, node: Node) -> None:
        name = node.name
        for decision in self.terms.get(name, ()):
            self.values[decision.node] = self._decision(decision)
        if name in self.plan.removed:
            return
        if name in self.plan.decisions:
            self.env[node] = self._traced_to(self.plan.decisions[name])
            return
        size = name in self.readings.facts.scalars and node.op != "placeholder" and node.target not in ASSERTS
        stranded = any(n not in self.env for n in node.all_input_nodes)
        if self._is_settled_assert(node) or (size and not node.users):
            return
        if stranded:  # it led only to values that are now computed without it, such as a chunk whose pieces were folded
            if size:
                self.env[node] = self._metadata(node)
            return
        copied = self.new.node_copy(node, lambda n: self.env[n])
        self.env[node] = copied
        if name in self.guarded:
            self._guard(copied, self.guarded[name])
        if size or name in self.readings.facts.constants or is_bypass(node, self.readings):
            self.droppable.append(copied)

    def _assumptions(self) -> dict[str, int]:
        """The values whose number of axes was taken for granted, and that number, if anything was folded."""
        return dict(self.readings.facts.assumed) if self.plan.decisions else {}

    def _guard(self, value: Node, rank: int) -> None:
        """Unbatched inputs, for which the fold would mean something else, are refused aloud."""
        axes = self.new.call_function(getattr, (value, "ndim"))
        fits = self.new.call_function(operator.eq, (axes, rank))
        message = f"collapsed for {rank} axes (a batch); pass example_inputs to collapse it for another number"
        self.new.call_function(torch._assert, (fits, message))

    def _is_settled_assert(self, node: Node) -> bool:
        """An assertion that holds for every accepted input: `x.ndim == 4` after an op that takes nothing else."""
        condition = node.args[0] if node.target in ASSERTS and node.args else None
        return isinstance(condition, Node) and self.readings.facts.scalars.get(condition.name) is True

    def _traced_to(self, decision: Decision) -> Node:
        """The decision's nodes, which say like any traced node whose forward they are part of."""
        before = len(self.new.nodes)
        value = self._decision(decision)
        replaced = [self.nodes[n] for n in (*decision.inlined, decision.node)]
        scope = f"{common_scope(replaced, set())}."
        stack = replaced[-1].meta.get("nn_module_stack") or {}
        for node in islice(reversed(self.new.nodes), len(self.new.nodes) - before):
            around = {k: v for k, v in stack.items() if not v[0] or scope.startswith(f"{v[0]}.")}
            node.meta["nn_module_stack"] = around | self._own_scope(node)
        return value

    def _own_scope(self, node: Node) -> dict[str, tuple[str, str]]:
        """What says of a layer that it is one: quantisers look for it."""
        if node.op != "call_module":
            return {}
        name, kind = str(node.target), type(held_at(str(node.target), self.modules))
        return {name: (name, f"{kind.__module__}.{kind.__qualname__}")}

    def _decision(self, decision: Decision) -> Node:
        parts = [self._sum(part, decision) for part in decision.recipe.parts]
        if len(parts) == 1:
            return parts[0]
        return self._call(torch.cat, (parts, -(decision.recipe.dims or 0) - 1))

    def _sum(self, part: tuple[Emit, ...], decision: Decision) -> Node:
        total = None
        for emit in part:
            term = self._emit(self.folded[id(emit)], decision)
            total = term if total is None else self._call(operator.add, (total, term))
        assert total is not None
        return total

    def _emit(self, folded: Folded, decision: Decision) -> Node:
        x = self._anchor(folded, decision)
        if folded.emit.is_pass:
            return x
        if folded.emit.operator is None:
            return self._scale(folded, x, decision)
        operator_ = folded.emit.operator
        if folded.emit.is_pool:
            return self._call(AVERAGE[operator_.dims], (x, operator_.taps, operator_.stride, operator_.pad_lo))
        if folded.emit.is_pad or needs_explicit_pad(operator_):
            mode = pad_mode(operator_)
            value = folded.fill if mode == "constant" else None
            x = self._call(F.pad, (x, pad_arguments(operator_)), {"mode": mode, "value": value})
        if folded.emit.is_pad:
            return x
        name = self.names[id(folded.emit)]
        if not self._is_installed(name, decision):
            layer = layer_of(folded)
            self._install(layer, folded.emit, decision)
            groups = operator_.groups if operator_.transposed else None
            self._note(f"{name}.weight", operator_.weight, layer.weight, groups)
            self._note(f"{name}.bias", operator_.bias, layer.bias)
        called = self.new.call_module(name, (x,))
        self.ours.add(called)
        return called

    def _anchor(self, folded: Folded, decision: Decision) -> Node:
        anchor = folded.emit.anchor
        source = anchor.source
        value: Node = self.values[source] if source in self.values else self.env[self.nodes[source]]
        if anchor.rows is None:
            return value
        rows, axis = anchor.rows, -(decision.recipe.dims or 0) - 1
        if anchor.is_slice:
            view = self.new.call_function(torch.narrow, (value, axis, rows[0], len(rows)))
            return self.new.call_method("contiguous", (view,)) if folded.emit.dense else view
        holder = nn.Module()
        holder.register_buffer("index", torch.tensor(rows, device=folded.like.device))
        path = f"{self.names[id(folded.emit)]}_rows"
        self.modules[path] = holder
        return self._call(torch.index_select, (value, axis, self.new.get_attr(f"{path}.index")))

    def _scale(self, folded: Folded, x: Node, decision: Decision) -> Node:
        """γ·x + β in one operator: addcmul where both are there."""
        if folded.emit.is_in_code:
            return self._scale_in_code(x, *(None if n is None else n.item() for n in folded.proof))
        path = self.names[id(folded.emit)]
        if not self._is_installed(path, decision):
            self._install(self._held(folded, decision.recipe.dims or 0), folded.emit, decision)
            for name, parameter in self.modules[path].named_parameters():
                self._note(f"{path}.{name}", folded.emit.gain if name == "weight" else folded.emit.bias, parameter)
        named = {name: self.new.get_attr(f"{path}.{name}") for name, _ in self.modules[path].named_parameters()}
        if len(named) == 2:
            return self._call(torch.addcmul, (named["bias"], x, named["weight"]))
        return (
            self._call(operator.mul, (x, named["weight"]))
            if folded.bias is None
            else self._call(operator.add, (x, named["bias"]))
        )

    def _scale_in_code(self, x: Node, gain: float | None, shift: float | None) -> Node:
        if gain is None:
            return self._call(operator.add, (x, shift))
        if shift is None:
            return self._call(operator.mul, (x, gain))
        return self._call(torch.rsub, (x, shift), {"alpha": -gain})

    def _note(self, target: str, kernel: Kernel | None, made: Any, groups: int | None = None) -> None:
        """Keeps how a tensor of the new graph is folded, for other weights."""
        if kernel is not None:
            self.folds[target] = Fold(kernel, made.dtype, tuple(made.shape), groups)

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        node = self.new.call_function(function, args, kwargs)
        self.ours.add(node)
        return node

    @staticmethod
    def _held(folded: Folded, dims: int) -> nn.Module:
        """The parameters of a scale."""
        holder = nn.Module()
        for name, vector in (("weight", folded.weight), ("bias", folded.bias)):
            if vector is not None:
                holder.register_parameter(name, scale_of(vector, folded, dims))
        return holder

    def _install(self, module: nn.Module, emit: Emit, decision: Decision) -> str:
        name = self.names[id(emit)]
        setattr(module, PROVENANCE, self._provenance(decision))
        self.modules[name] = module.eval()
        self.installed.add(name)
        return name

    def _is_installed(self, name: str, decision: Decision) -> bool:
        """Whether another call has the same layer already; it then stands for what this one replaces too."""
        if name in self.installed:
            layer = self.modules[name]
            both = (*getattr(layer, PROVENANCE), *self._provenance(decision))
            setattr(layer, PROVENANCE, tuple(dict.fromkeys(both)))
        return name in self.installed

    def _provenance(self, decision: Decision) -> tuple[str, ...]:
        return tuple(label_of(self.nodes[n]) for n in decision.replaced)

    def _metadata(self, node: Node) -> Any:
        """A size of a value that is no longer computed: known, or computed from a value that is."""
        known = self.readings.facts.scalars[node.name]
        if isinstance(known, tuple):
            return tuple(self._size(d) for d in known)
        if isinstance(known, Size):
            return self._size(known)
        if known is not None:
            return known
        source = node.args[0]
        assert isinstance(source, Node)
        carrier = next(s for s in _carriers(source, self.readings, self.env) if s in self.env)
        return self._number(self.new.node_copy(node, lambda n: self.env[carrier] if n is source else self.env[n]))

    def _number(self, node: Node) -> Node:
        """A size, which nobody may ask for after all: then it goes again."""
        self.droppable.append(node)
        self.numbers.add(node.name)
        return node

    def _size(self, dim: Dim) -> Any:
        if isinstance(dim, int):
            return dim
        if isinstance(dim.base, Product):
            value: Any = 1
            for factor in dim.base.sizes:
                value = self._number(self.new.call_function(operator.mul, (value, self._size(factor))))
        else:
            value = self._number(self.new.call_method("size", (self.env[self.nodes[dim.base.root]], dim.base.place)))
        if dim.add:
            value = self._number(self.new.call_function(operator.add, (value, dim.add)))
        if dim.divide != 1:
            value = self._number(self.new.call_function(operator.floordiv, (value, dim.divide)))
        return value


def held_at(target: str, modules: Mapping[str, nn.Module]) -> Any:
    """The module, or the attribute of one, that a node's target names."""
    if target in modules:
        return modules[target]
    owner, _, name = target.rpartition(".")
    return getattr(modules[owner], name)


def settles(node: Node, readings: Readings) -> bool:
    """Whether what the node reads of a value's size can still be told once the value is no longer computed."""
    known = readings.facts.scalars.get(node.name)
    if isinstance(known, tuple):
        return all(k is not None for k in known)
    if known is not None:
        return isinstance(known, (int, Size))
    what = node.args[1] if node.target is getattr and len(node.args) > 1 else None
    return what in ("dtype", "device", "is_cuda")


def _carriers(node: Node, readings: Readings, env: Mapping[Node, Any]) -> list[Node]:
    """The values from which `node` was computed, nearest first."""
    found, todo = [], [node]
    while todo:
        current = todo.pop(0)
        found.append(current)
        todo.extend(n for n in current.all_input_nodes if readings.is_value(n) and n not in found)
    return found
