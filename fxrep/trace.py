"""From a module to a graph. Owns every failure of tracing, and what is done about it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from fxrep.errors import Refusal
from fxrep.kinds import KIND
from fxrep.proxies import IS_CONSTANT, VALUE
from fxrep.snapshot import Snapshot
from fxrep.tracer import Tracer, told
from fxrep.trees import first_names, named_modules


@dataclass(frozen=True)
class Traced:
    """A graph over `root`, and why the modules were kept whole whose forward cannot be traced."""

    root: nn.Module
    graph: fx.Graph
    kept: Mapping[str, str] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)


def trace(
    root: nn.Module, examples: Mapping[str, Any] | None = None, *, trains: bool = False,
    whole: Mapping[str, str] = MappingProxyType({}),
) -> Traced | Refusal:  # fmt: skip
    """Traces `root`; a sub-module that cannot be traced becomes a leaf, and where the graph `trains`, one that turns
    autograd off. `whole` names more of them, and why.

    A Refusal comes back where the outermost forward itself cannot be traced.
    """
    obstacle = _obstacle(root)
    if obstacle:
        return untraceable(type(root).__name__, *obstacle)
    kept = dict(whole)
    while True:
        kept_from_the_start = frozenset(kept)
        modules = first_names(named_modules(root))
        snapshot = Snapshot(modules)
        try:
            graph = Tracer(kept, examples, trains).trace(root)
        except Exception as error:  # whatever a forward does with a proxy may raise anything
            snapshot.restore()
            return untraceable(type(root).__name__, told(error))
        written = snapshot.restore()
        if written is None:
            return _finished(root, graph, kept, modules)
        if not written or written in kept_from_the_start:
            return untraceable(written or type(root).__name__, WRITES)
        kept.setdefault(written, WRITES)  # and once more, without what an attempt that failed has left behind


WRITES = "its forward writes what the module keeps"


def untraceable(name: str, reason: str, hint: str = "") -> Refusal:
    return Refusal(name, "not-traceable", f"kept with its own forward: {reason}", hint)


def _finished(
    root: nn.Module, graph: fx.Graph, kept: Mapping[str, str], modules: list[tuple[str, nn.Module]]
) -> Traced:
    for node in graph.nodes:
        if isinstance(node.type, str):  # a postponed annotation, which fx would write into its code as it stands
            node.type = None
        for known in (VALUE, IS_CONSTANT, KIND):  # for tracing alone; some are numbers of the model
            node.meta.pop(known, None)
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    inside = {name: reason for name, reason in kept.items() if name in called}
    return Traced(root, graph, inside, dict(modules))


def _obstacle(root: nn.Module) -> tuple[str, ...]:
    """Why fx would trace something else than what the root runs, and a hint; or nothing."""
    if isinstance(root, torch.jit.ScriptModule):
        return "it is a TorchScript program", "collapse the module that it was made from, then script or trace that"
    if type(root).forward is nn.Module.forward:
        return "it has no forward: it is a container", "collapse its entries one by one, or the module that calls them"
    if "forward" in vars(root):
        return ("the root's forward was replaced on the instance",)
    kinds = {p.kind for p in inspect.signature(type(root).forward).parameters.values()}
    if kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}:
        return ("the root's forward has keyword-only arguments after *args, which a traced graph cannot take",)
    return ()
