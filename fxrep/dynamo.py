"""The door for `torch.compile(model, backend="fxrep")`: what Dynamo captures is collapsed and handed on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule, Node

from fxrep.cost import Aim, profile_for
from fxrep.errors import FxrepError
from fxrep.metadata import told_by
from fxrep.mutation import written_inputs
from fxrep.pipeline import Pipeline
from fxrep.refolding import DRAFT
from fxrep.trace import Traced
from fxrep.trees import named_modules

TRAINABLE = (
    'backend="fxrep" freezes weights, and gradients are wanted: this graph goes to the next backend as it is. '
    "Call eval() and run under torch.no_grad() or torch.inference_mode() to collapse it"
)


def backend(
    captured: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Collapses what Dynamo captured. `mode` and `options` are Inductor's; `options={"then": name}` names another one.

    Weights are constants of the result: a call after one was replaced or written in place raises FxrepError.
    """
    rest = dict(options or {})
    then = _next(rest.pop("then", "inductor"), mode, rest)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        warnings.warn(TRAINABLE, stacklevel=2)
        return then(captured, list(inputs))
    weights = _weights(captured, inputs)
    if not weights:
        return then(captured, list(inputs))
    collapsed = _collapsed(captured, weights)
    places = {node.target: i for i, node in enumerate(captured.graph.find_nodes(op="placeholder"))}
    left = [places[node.target] for node in collapsed.graph.find_nodes(op="placeholder")]
    return _Frozen(then(collapsed, [inputs[i] for i in left]), tuple(left), tuple(weights.values()))


def _next(name: Any, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    if mode or options:
        raise FxrepError(f"mode and options are Inductor's, and {name} comes next; leave out {mode or sorted(options)}")
    return lookup_backend(name)


@dataclass(frozen=True)
class _Weight:
    """A tensor that is an input of the captured graph and a constant of the collapsed one."""

    name: str
    place: int
    tensor: Tensor
    version: int
    number: float | None = None  # of a setting (eps, momentum), which Dynamo passes in a new tensor at each call

    def is_stale(self, given: Tensor) -> bool:
        if self.number is not None:
            return given.item() != self.number
        return given is not self.tensor or given._version != self.version


@dataclass(frozen=True)
class _Frozen:
    """The compiled graph, under the arguments of the captured one."""

    run: Callable[..., Any]
    left: tuple[int, ...]
    weights: tuple[_Weight, ...]

    def __call__(self, *args: Any) -> Any:
        stale = next((w for w in self.weights if w.is_stale(args[w.place])), None)
        if stale is not None:
            raise FxrepError(
                f"{stale.name} was changed after it was folded; call torch.compiler.reset() to fold it anew"
            )
        return self.run(*(args[i] for i in self.left))


def _weights(captured: GraphModule, inputs: Sequence[Any]) -> dict[str, _Weight]:
    """The parameters and buffers among the inputs that the graph does not write, by the names of their nodes."""
    nodes = captured.graph.find_nodes(op="placeholder")
    written = written_inputs(captured.graph, dict(named_modules(captured)))
    return {
        node.name: _Weight(str(node.target), place, value, value._version, _setting(node, value))
        for place, (node, value) in enumerate(zip(nodes, inputs, strict=True))
        if node.name not in written and _is_weight(node, value)
    }


def _is_weight(node: Node, value: Any) -> bool:
    """Whether the input is a module's own; one without a version counter could change unseen."""
    if not isinstance(value, Tensor) or value.is_inference():
        return False
    source = getattr(node.meta.get("grapharg"), "source", None)
    return isinstance(value, nn.Parameter) or (source is not None and source.guard_source.is_unspecialized_nn_module())


def _setting(node: Node, value: Tensor) -> float | None:
    return value.item() if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False) else None


def _collapsed(captured: GraphModule, weights: Mapping[str, _Weight]) -> GraphModule:
    graph = torch.fx.Graph()
    root = nn.Module()
    for name, module in captured.named_children():  # the bodies of control flow
        root.add_module(name, module)
    copies: dict[Node, Any] = {}
    for node in captured.graph.nodes:
        operand = node.args[0] if node.target == "item" else None
        if isinstance(operand, Node) and operand.name in weights and weights[operand.name].number is not None:
            copies[node] = weights[operand.name].number
        elif node.name in weights:
            root.register_buffer(node.name, weights[node.name].tensor.detach())
            copies[node] = graph.create_node("get_attr", node.name, name=node.name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                copies[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    traced = Traced(root, graph, modules=dict(named_modules(root)))
    device = next(iter(weights.values())).tensor.device.type
    told = told_by(graph, "example_value")
    collapsed = Pipeline("captured", traced, {}, Aim(profile_for(device)), False, told).rewrite()[0]
    vars(collapsed).pop(DRAFT)  # functions, which Inductor cannot hash for its cache
    return collapsed
