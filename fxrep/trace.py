"""From a module to a graph. Owns every failure of tracing, and what is done about it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxrep.errors import Refusal
from fxrep.readers import is_hooked
from fxrep.snapshot import Snapshot

RANDOM_FACTORIES = (
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli",
)
SPLIT_SIZES = ("chunks", "split_size", "split_size_or_sections")


@dataclass(frozen=True)
class Traced:
    """A graph over `root`, and the modules that were kept whole because their forward cannot be traced."""

    root: nn.Module
    graph: fx.Graph
    kept: tuple[Refusal, ...] = ()
    modules: dict[str, nn.Module] = field(default_factory=dict)


def trace(root: nn.Module, examples: Mapping[str, Any] | None = None) -> Traced | Refusal:
    """Traces `root`; a sub-module that cannot be traced becomes a leaf, and tracing starts again.

    A Refusal comes back where the outermost forward itself cannot be traced.
    """
    obstacle = _obstacle(root)
    if obstacle:
        return Refusal(type(root).__name__, "not-traceable", obstacle)
    kept: dict[str, Refusal] = {}
    while True:
        tracer = Tracer(frozenset(kept), examples or {})
        snapshot = Snapshot(root)
        try:
            with _RecordRandom(tracer):
                graph = tracer.trace(root)
        except Exception as error:  # whatever a forward does with a proxy may raise anything
            snapshot.restore()
            name = tracer.current
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            graph.lint()
            for node in graph.nodes:  # fx would write a postponed annotation into its code as it stands
                node.type = None if isinstance(node.type, str) else node.type
            written = snapshot.restore()
            if written is None:
                return Traced(root, graph, tuple(kept.values()), dict(root.named_modules()))
            name, reason = written, "its forward writes what the module keeps"
        refusal = Refusal(name or type(root).__name__, "not-traceable", f"kept with its own forward: {reason}")
        if not name or name in kept:
            return refusal
        kept[name] = refusal


def _obstacle(root: nn.Module) -> str:
    """Why fx would trace something else than what the root runs, or nothing."""
    if "forward" in vars(root):
        return "the root's forward was replaced on the instance"
    kinds = {p.kind for p in inspect.signature(type(root).forward).parameters.values()}
    if kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}:
        return "the root's forward has keyword-only arguments after *args, which a traced graph cannot take"
    return ""


class _RecordRandom(TorchFunctionMode):
    """Records random numbers that depend on no input, so that they are drawn at each run and not once while tracing."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in RANDOM_FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class Proxy(fx.Proxy):
    """A proxy that records `x += y` and `x[i] = y`; fx's own takes the first for `x = x + y` and loses the write."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class Pieces(Proxy):
    """The pieces of a chunk or split whose number is written, which can be iterated; fx itself can only unpack."""

    def __iter__(self) -> Any:
        return iter([operator.getitem(self, i) for i in range(len(self))])

    def __len__(self) -> int:
        return _count_of_pieces(self.node)


def _count_of_pieces(node: fx.Node) -> int:
    """How many pieces a chunk or split gives, 0 where that is not written."""
    sizes = (
        node.args[1] if len(node.args) > 1 else next((node.kwargs[k] for k in SPLIT_SIZES if k in node.kwargs), None)
    )
    if node.target in ("chunk", torch.chunk) and isinstance(sizes, int):
        return sizes
    return len(sizes) if node.target in ("split", torch.split) and isinstance(sizes, (tuple, list)) else 0


def _records(target: Any) -> Any:
    def assign(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return assign


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Proxy, f"__{_name}__", _records(getattr(operator, _name)))


class Recorder(fx.Tracer):
    """A tracer that sees writes; a pickled result is traced again by it when it is loaded."""

    def proxy(self, node: fx.Node) -> Proxy:
        return (Pieces if _count_of_pieces(node) else Proxy)(node, self)


class Tracer(Recorder):
    """fx's tracer with leaves for what must stay whole, and arguments with defaults specialised to their default."""

    def __init__(self, kept: frozenset[str] = frozenset(), examples: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.kept = kept
        self.examples = examples or {}
        self.path: list[str] = []
        self.current = ""
        self.names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if isinstance(root, nn.Module):
            tensors = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
            for name, tensor in reversed(tensors):
                self.names[id(tensor)] = name
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.kept or is_hooked(m) or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.path.append(self.path_of_module(m))
        self.current = self.path[-1]
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not in a finally: after a failure `current` must name where it happened
        self.current = self.path[-1] if self.path else ""
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter as a proxy, found by identity in constant time (fx searches the whole model each time)."""
        if not isinstance(attr_val, nn.Parameter) or id(attr_val) not in self.names:
            return attr_val
        name = self.names[id(attr_val)]
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) in self.names:
            return self.create_node("get_attr", self.names[id(a)], (), {})
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """An argument with a default is taken to have it, and the graph asserts so; `if mask is None` then decides."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        for i, arg in enumerate(args):
            if not isinstance(arg, fx.Proxy):
                continue
            name = str(arg.node.target)
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if default is inspect.Parameter.empty or isinstance(self.examples.get(name), Tensor):
                continue
            args[i] = default = self.examples.get(name, default)
            same = operator.is_ if default is None or isinstance(default, bool) else operator.eq
            message = f"collapsed for {name}={default!r}; pass {name} in example_inputs to collapse it for a tensor"
            torch._assert(self.create_proxy("call_function", same, (arg, default), {}), message)
        return function, args
