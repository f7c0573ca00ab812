"""The door for `torch.export.ExportedProgram`: parameters become attributes, the line runs, and all is lifted again."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, default_decompositions
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from fxrep.cost import Aim
from fxrep.metadata import told_by
from fxrep.mutation import written_inputs
from fxrep.pipeline import Pipeline
from fxrep.readers.walk import attribute_of
from fxrep.trace import Traced
from fxrep.trees import named_modules

STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
aten = torch.ops.aten
#: Ops that torch cannot run on symbolic sizes where they broadcast, as others.
SPELLED: dict[Any, Any] = {torch.addcmul: lambda shift, x, gain: x * gain + shift}


def pipeline_of(program: ExportedProgram, aim: Aim, strict: bool) -> Pipeline:
    """The program read and planned. Its parameters, buffers and constants are constants, unless it writes them."""
    root, graph = _unlifted(program)
    traced = Traced(root, graph, modules=dict(named_modules(root)))
    return Pipeline("ExportedProgram", traced, {}, aim, strict, told_by(graph, "val"))


def collapse(program: ExportedProgram, aim: Aim, strict: bool) -> ExportedProgram:
    """The program with every affine region that pays replaced; inputs, outputs, symbols and constraints stay.

    Its state dict holds the new weights and copies of those that are still read; `program` is left as it is.
    """
    collapsed, report = pipeline_of(program, aim, strict).rewrite()
    result = _Lift(program, collapsed).program()
    result.report = report  # type: ignore[attr-defined]
    return result


def _unlifted(program: ExportedProgram) -> tuple[nn.Module, Graph]:
    """The graph over a module that holds what the program is given as state, as far as the program only reads it."""
    graph = copy.deepcopy(program.graph)
    root = nn.Module()
    for name, module in program.graph_module.named_children():  # the bodies of control flow
        root.add_module(name, module)
    written = written_inputs(graph, dict(named_modules(root)))
    state = _state_of(program)
    for node, spec in zip(graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True):
        node.target = spec.arg.name  # a copied node may be named otherwise
        if spec.kind in STATE and node.name not in written and spec.target is not None:
            _attach(root, spec.target, state[spec.target])
            node.op, node.target = "get_attr", spec.target
    return root, graph


def _state_of(program: ExportedProgram) -> dict[str, Any]:
    return {**program.constants, **program.state_dict}


def _attach(root: nn.Module, path: str, tensor: Tensor) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not isinstance(getattr(root, owner, None), nn.Module):
            root.add_module(owner, nn.Module())
        root = getattr(root, owner)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)


@dataclass
class _Lift:
    """Writes the collapsed module as a program in the dialect of the old one."""

    old: ExportedProgram
    collapsed: GraphModule
    graph: Graph = field(default_factory=Graph)
    #: by node of the collapsed module, what stands for it in the program
    env: dict[Node, Any] = field(default_factory=dict)
    #: by qualified name, the placeholder of a parameter, buffer or constant
    state: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = [n.meta["val"] for n in self.old.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        self.fake = torch._guards.detect_fake_mode(values) or FakeTensorMode()
        self.decomposed = not any(_is_composite(n.target) for n in self.old.graph.nodes)
        self.placeholders = {n.name: n for n in self.old.graph.find_nodes(op="placeholder")}
        self.modules = dict(named_modules(self.collapsed))
        self.tensors = {**_state_of(self.old), **_tensors_of(self.collapsed, self.modules)}

    def program(self) -> ExportedProgram:
        inputs = self._inputs()
        with self.fake, torch.no_grad():
            for node in self.collapsed.graph.nodes:
                self._node(node)
        memo: dict[int, Any] = {}  # tied tensors stay tied
        given = {s.target: copy.deepcopy(self.tensors[s.target], memo) for s in inputs if s.kind in STATE and s.target}
        constants = {t: v for t, v in self.old.constants.items() if not isinstance(v, Tensor)}
        constants |= {t: v for t, v in given.items() if t in self.old.constants}
        weights = {t: v for t, v in given.items() if t not in constants}
        return ExportedProgram(
            GraphModule(dict(self.old.graph_module.named_children()), self.graph), self.graph,
            ExportGraphSignature(inputs, self._outputs()), weights, copy.deepcopy(self.old.range_constraints),
            self._calls(), self.old.example_inputs, constants, verifiers=self.old.verifiers,
        )  # fmt: skip

    def _inputs(self) -> list[InputSpec]:
        """The old inputs that are still there, in their order, the new weights after the parameters."""
        remaining = {n.target for n in self.collapsed.graph.find_nodes(op="placeholder")}
        read = _tensors_of(self.collapsed, self.modules)
        old = self.old.graph_signature.input_specs
        unread = {name for name, n in self.placeholders.items() if not n.users}
        owners = {_owner(target) for target in read}
        kept = [
            s for s in old
            if s.arg.name in remaining or s.target in read
            or (s.arg.name in unread and _owner(s.target or "") in owners)
        ]  # fmt: skip
        known = {s.target for s in old}
        new = [_new_spec(target, tensor) for target, tensor in read.items() if target not in known]
        new.sort(key=lambda spec: STATE.index(spec.kind))
        place = sum(s.kind in (InputKind.TOKEN, InputKind.PARAMETER) for s in kept)
        return [self._placed(spec) for spec in (*kept[:place], *new, *kept[place:])]

    def _placed(self, spec: InputSpec) -> InputSpec:
        """Writes the placeholder of an input."""
        node = self.graph.placeholder(spec.arg.name)
        old = self.placeholders.get(spec.arg.name)
        if old is not None:
            node.meta = dict(old.meta)
        else:
            node.meta["val"] = self.fake.from_tensor(self.tensors[str(spec.target)], static_shapes=True)
            spec = replace(spec, arg=TensorArgument(node.name))
        node.name = node.target = spec.arg.name  # as torch has it, even where that shadows a builtin
        self.state[spec.arg.name] = self.state[spec.target or spec.arg.name] = node
        return spec

    def _node(self, node: Node) -> None:
        if node.op == "placeholder":
            self.env[node] = self.state[str(node.target)]
        elif node.op == "get_attr":
            target = str(node.target)
            self.env[node] = self.state[target] if target in self.state else self.graph.get_attr(target)
        elif node.op == "output" or _is_of_program(node):
            self.env[node] = copied = self.graph.node_copy(node, self.env.__getitem__)
            if node.op != "output" and "val" not in copied.meta:  # sizes that are computed anew
                copied.meta["val"] = node.target(*self._fakes(node.args), **node.kwargs)  # type: ignore[operator]
        else:
            self.env[node] = self._recorded(node)

    def _fakes(self, args: Any) -> Any:
        """The arguments as fake values."""
        return map_arg(args, lambda n: self.env[n].meta["val"] if isinstance(self.env[n], Node) else self.env[n])

    def _recorded(self, node: Node) -> Any:
        """What a layer or a function of torch does, in aten ops; a number where it gives one."""
        operands = [n for n in node.all_input_nodes if isinstance(self.env[n], Node)]
        if node.op == "call_method" and node.target == "size":
            return self._size(node)

        def run(*values: Any) -> Any:
            given = {**self.env, **dict(zip(operands, values, strict=False))}
            args, kwargs = map_arg((node.args, dict(node.kwargs)), given.__getitem__)
            if node.op != "call_module":
                return SPELLED.get(node.target, node.target)(*args, **kwargs)
            weights = dict(zip(names, values[len(operands) :], strict=True))
            return torch.func.functional_call(self.modules[str(node.target)], weights, args, kwargs)

        names = [n for n, _ in self.modules[str(node.target)].named_parameters()] if node.op == "call_module" else []
        sources = [self.env[n] for n in operands] + [self.state[f"{node.target}.{name}"] for name in names]
        fakes = [s.meta["val"] for s in sources]
        if not any(isinstance(f, Tensor) for f in fakes) or not isinstance(value := run(*fakes), Tensor):
            return run(*fakes) if not sources else value
        table: Any = default_decompositions() if self.decomposed else {}
        return self._spliced(make_fx(run, table, pre_dispatch=not self.decomposed)(*fakes).graph, sources, node)

    def _size(self, node: Node) -> Any:
        x = self.env[node.args[0]]  # type: ignore[index]
        axis = int(node.args[1]) % x.meta["val"].ndim  # type: ignore[arg-type]
        size = x.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        read = self.graph.call_function(aten.sym_size.int, (x, axis))
        read.meta["val"] = size
        return read

    def _spliced(self, recorded: Graph, sources: list[Node], node: Node) -> Node:
        inner: dict[Node, Any] = dict(zip(recorded.find_nodes(op="placeholder"), sources, strict=True))
        for op in recorded.nodes:
            if op.op == "call_function":
                inner[op] = copied = self.graph.node_copy(op, inner.__getitem__)
                copied.meta = {**{k: v for k, v in node.meta.items() if k == "nn_module_stack"}, "val": op.meta["val"]}
        return inner[recorded.output_node().args[0]]  # type: ignore[index]

    def _outputs(self) -> list[OutputSpec]:
        """The old outputs, under the names that now stand for them."""
        values = self.graph.output_node().args[0]
        pairs = zip(self.old.graph_signature.output_specs, values, strict=True)  # type: ignore[arg-type]
        return [replace(s, arg=replace(s.arg, name=v.name)) if isinstance(v, Node) else s for s, v in pairs]

    def _calls(self) -> list[ModuleCallEntry]:
        """The modules that were called; one whose own inputs and outputs are gone keeps its name alone."""
        names = {n.name for n in self.graph.nodes}
        entries = copy.deepcopy(self.old.module_call_graph)
        for entry in entries:
            signature = entry.signature
            arguments = [] if signature is None else [*signature.inputs, *signature.outputs]
            if any(isinstance(a, TensorArgument) and a.name not in names for a in arguments):
                entry.signature = None
        return entries


def _owner(target: str) -> str:
    return target.rpartition(".")[0]


def _is_composite(target: Any) -> bool:
    """Whether the op is one that decomposition takes apart."""
    kinds = torch._C.DispatchKey.CompositeImplicitAutograd
    sizes = isinstance(target, OpOverload) and target._opname.startswith("sym_")
    return isinstance(target, OpOverload) and not sizes and target.has_kernel_for_dispatch_key(kinds)


def _is_of_program(node: Node) -> bool:
    """Whether the node is one that a program may hold: an op of a library, control flow, or arithmetic of sizes."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, (OpOverload, HigherOrderOperator)) or "val" in node.meta:
        return True
    return node.target is operator.getitem


def _tensors_of(collapsed: GraphModule, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and buffers that the collapsed graph reads, by qualified name."""
    found: dict[str, Tensor] = {}
    for node in collapsed.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            found |= {f"{target}.{name}": p for name, p in modules[target].named_parameters()}
        elif node.op == "get_attr" and isinstance(tensor := attribute_of(collapsed, target), Tensor):
            found[target] = tensor
    return found


def _new_spec(target: str, tensor: Tensor) -> InputSpec:
    is_parameter = isinstance(tensor, nn.Parameter)
    kind, letter = (InputKind.PARAMETER, "p") if is_parameter else (InputKind.BUFFER, "b")
    name = TensorArgument(f"{letter}_{target.replace('.', '_')}")
    return InputSpec(kind, name, target, persistent=None if is_parameter else True)
