"""The first layer at which a collapsed network parts from its original."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxrep.errors import Refusal
from fxrep.mutation import TWIN_SUFFIX
from fxrep.rewrite import PROVENANCE
from fxrep.trace import trace
from fxrep.verification.compare import difference
from fxrep.verification.inputs import Case
from fxrep.verification.verdict import Parting

COARSEST, FINEST = 0.02, 1e-9
SAMPLES = 64
PREPARES = (F.pad, torch.narrow, torch.index_select)
JOINS = (operator.add, torch.cat)


def localise(original: nn.Module, collapsed: GraphModule, case: Case, tolerance: float) -> Parting | str | None:
    """The layer, or why it cannot be told, or None where all agree.

    Both are in float64 and get equal inputs; `tolerance` is for the rounding of the stored weights. Values are matched
    by what they are, not by name: one of the collapsed network that equals one of the original's is taken to be it, and
    goes on exact, so that errors do not add up. The two part at the first layer whose value equals none although it
    stands for one, or the first value from which none follows that equals one.
    """
    traced = trace(original, case.arguments)
    if isinstance(traced, Refusal):
        return f"the original cannot be traced: {traced.reason}"
    known = Values(min(max(tolerance, FINEST), COARSEST))
    try:
        _Recorder(GraphModule(traced.root, traced.graph), case, known).run(enable_io_processing=False)
        follower = _Follower(collapsed, case, known)
        follower.run(enable_io_processing=False)
    except Exception as error:  # a forward may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    labelled = _by_label(traced.graph, known)
    node = _first_lost(collapsed, follower, labelled)
    return None if node is None else _told(node, follower, labelled)


@dataclass
class Values:
    """The values of the original by their shape, each with its name, a sample of its entries and its scale."""

    tolerance: float
    of: dict[str, Tensor] = field(default_factory=dict)
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.of[name] = value
        scale = float(value.abs().max()) if value.numel() else 0.0
        self.by_shape.setdefault(value.shape, []).append((value, _sample(value), self.tolerance * scale))

    def equal_to(self, value: Tensor) -> Tensor | None:
        """The original's value that this is, up to rounding."""
        sample = _sample(value)
        for candidate, its_sample, allowed in self.by_shape.get(value.shape, ()):
            if _within(sample, its_sample, allowed) and _within(value, candidate, allowed):
                return candidate
        return None


def _sample(value: Tensor) -> Tensor:
    return value.flatten()[:: max(value.numel() // SAMPLES, 1)]


def _within(a: Tensor, b: Tensor, allowed: float) -> bool:
    return bool(((a - b).abs() <= allowed).all())


class _Recorder(Interpreter):
    """Runs a graph on named arguments and notes every floating-point value, before anything can overwrite it."""

    def __init__(self, module: GraphModule, case: Case, known: Values) -> None:
        super().__init__(module)
        self.case, self.known = case.mapped(Tensor.clone), known

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = self.case.arguments
        name = str(target).lstrip("*")
        if name in arguments:
            return arguments[name]
        return args[0] if args else {} if str(target).startswith("**") else ()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return self.noted(n, value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def noted(self, node: Node, value: Tensor) -> Tensor:
        self.known.add(node.name, value.detach().clone())
        return value


class _Follower(_Recorder):
    """Runs the collapsed graph, and notes which values are known."""

    def __init__(self, module: GraphModule, case: Case, known: Values) -> None:
        super().__init__(module, case, known)
        self.found: set[Node] = set()
        self.lost: dict[Node, Tensor] = {}

    def noted(self, node: Node, value: Tensor) -> Tensor:
        if node.op in ("placeholder", "get_attr"):
            return value
        true = self.known.equal_to(value)
        if true is None:
            self.lost[node] = value.detach().clone()
            return value
        self.found.add(node)
        with suppress(RuntimeError):  # an expanded value cannot be written
            value.copy_(true)
        return value


def _first_lost(collapsed: GraphModule, follower: _Follower, labelled: Mapping[str, list[Tensor]]) -> Node | None:
    regained = set(follower.found)
    for node in reversed(collapsed.graph.nodes):
        if any(user in regained for user in node.users):
            regained.add(node)
    stands = {n for n in follower.lost if _truths(_names(n, collapsed)[1], labelled)}
    wrong = {n for n in stands if all(j in follower.lost for j in _joined(n))}
    return next((n for n in collapsed.graph.nodes if n in wrong or (n in follower.lost and n not in regained)), None)


def _truths(computes: str, labelled: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return labelled.get(computes.rpartition(":")[2], [])


def _by_label(graph: torch.fx.Graph, known: Values) -> dict[str, list[Tensor]]:
    """The original's values by the name of their layer, and by the name of their node."""
    found: dict[str, list[Tensor]] = {}
    for node in graph.nodes:
        if node.name in known.of:
            labels = {node.name, str(node.target)} if node.op == "call_module" else {node.name}
            for label in labels:
                found.setdefault(label, []).append(known.of[node.name])
    return found


def _told(lost: Node, follower: _Follower, labelled: Mapping[str, list[Tensor]]) -> Parting:
    node = next((u for u in lost.users if u.op == "call_module"), lost) if lost.target in PREPARES else lost
    layer, computes = _names(node, follower.module)
    values = [follower.lost[n] for n in _joined(node) if n in follower.lost]
    pairs = [(v, t) for v in values for t in _truths(computes, labelled) if t.shape == v.shape]
    places = [place for pair in pairs if (place := difference(*pair))]
    nearest = min(places, key=lambda p: max(p.border, p.interior), default=None)
    return Parting(layer, computes, max(nearest.border, nearest.interior) if nearest else None, nearest)


def _names(node: Node, root: nn.Module) -> tuple[str, str]:
    """The layer, and the layer or node of the original whose value it computes, if that is known."""
    owners = [str(a.target).rpartition(".")[0] for a in node.all_input_nodes if a.op == "get_attr"]
    for path in [str(node.target)] if node.op == "call_module" else owners:
        provenance = getattr(root.get_submodule(path), PROVENANCE, ())
        if provenance:
            return path, provenance[-1]
    if node.op != "call_module":
        return node.name, ""  # a new sum may bear the name of an old one
    name = str(node.target).removesuffix(TWIN_SUFFIX)
    return name, name


def _joined(node: Node | None) -> Iterator[Node]:
    """The node, and its sums with the other terms of the same value."""
    while node is not None:
        yield node
        node = next((u for u in node.users if u.target in JOINS), None)
