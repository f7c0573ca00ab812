"""A tracer of `torch.fx` that sees writes, assertions and sizes, and goes on around a module that cannot be traced."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from fxrep.asking import asked
from fxrep.kinds import KIND, kind_of
from fxrep.proxies import Proxy, Rest, reaches_parameter
from fxrep.readers import is_hooked
from fxrep.readers.walk import writes
from fxrep.recorder import Recorder, Stack
from fxrep.trees import buffers, named_modules, parameters

RANDOM_FACTORIES = (
    "rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like", "randint_like", "bernoulli",
)  # fmt: skip
ATOMS = frozenset((type(None), bool, int, float, str))
#: Arguments, and containers of arguments, that are what they are for every tracer.
PLAIN = ATOMS | {list, dict, slice}
#: Arguments in which there is no proxy.
NO_PROXIES = ATOMS | {Tensor, nn.Parameter}
FUNCTIONS = frozenset((FunctionType, BuiltinFunctionType))


class Watch(TorchFunctionMode):
    """Sees the functions that run while tracing, though nothing of them is traced.

    Random numbers that depend on no input are recorded, so that they are drawn at each run and not once. What is
    computed from buffers is remembered, so that it can be recorded as what it is where it meets a proxy.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM_FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        if any(issubclass(kind, fx.Proxy) for kind in types):  # what calling it would come to
            if type(func) in FUNCTIONS and all(map(self._is_known, (*args, *kwargs.values()))):
                kind, target = kind_and_target(func)
                return self.tracer.create_proxy(kind, target, args, kwargs)
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        if type(result) is Tensor:
            self.tracer.remember(result, func, args, kwargs)
        elif type(result) in (tuple, list) and all(type(piece) is Tensor for piece in result):
            self.tracer.remember_pieces(tuple(result), func, args, kwargs)
        return result

    def _is_known(self, argument: Any) -> bool:
        """Whether fx would find nothing in an argument, if it searched, but this tracer's own proxies."""
        if type(argument) in NO_PROXIES:
            return True
        return isinstance(argument, fx.Proxy) and argument.tracer is self.tracer


def kind_and_target(function: Any) -> tuple[str, Any]:
    """How a graph calls a function of torch; a method by its name."""
    if is_tensor_method_or_property(function):
        return "call_method", function.__name__
    return "call_function", function


@dataclass(frozen=True)
class Remembered:
    """A tensor that was computed while tracing, at which of its versions, and how."""

    tensor: Tensor
    version: int
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: which one it is, of several that the function gives
    piece: int | None = None


class Tracer(Recorder):
    """fx's tracer with leaves for what must stay whole, and arguments with defaults specialised to their default.

    `kept` names the modules to keep with their own forward, and why; those that fail on the way are added to it.
    """

    def __init__(
        self, kept: dict[str, str] | None = None, examples: Mapping[str, Any] | None = None, trains: bool = False
    ) -> None:
        super().__init__()
        self.trains = trains
        self.kept = {} if kept is None else kept
        self.examples = examples or {}
        self.names: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.remembered: dict[int, Remembered] = {}
        #: by identity: the nodes of parameters and remembered tensors
        self.recorded: dict[int, fx.Proxy] = {}
        #: what could not be traced; a forward may go on after it, by an `except` of its own
        self.failures: list[Exception] = []
        self.module_stack = Stack()
        #: what was taken back; a forward may have kept it
        self.erased: set[fx.Node] = set()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if isinstance(root, nn.Module):
            modules = named_modules(root)
            self.tensors = {**parameters(modules), **buffers(modules)}
            self.modules = dict(modules)
            self.names = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        try:
            with Watch(self), asked():
                graph = super().trace(root, concrete_args)
                self._check_failures(0)
                return graph
        finally:
            vars(self).clear()  # fx leaves the tracer in a cycle, which would keep the model's tensors for a while

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.kept or is_hooked(m) or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> Proxy:
        if node.op == "placeholder" and node.prev.op == "placeholder":
            name = str(node.target)
            if name.startswith("*") and name.lstrip("*") not in self.examples:
                return Rest(node, self)
        return super().proxy(node)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's result; one whose forward fails on proxies is called as a whole, as if it had been a leaf."""
        before, depth = self._latest(), len(self.module_stack)
        known = len(self.failures)
        try:
            result = super().call_module(m, forward, args, kwargs)
            self._check_failures(known)
            return result
        except Exception as error:  # whatever a forward does with a proxy may raise anything
            name = self.path_of_module(m)
            if not name or name in self.kept:
                raise
            self.kept[name] = told(error)
            del self.failures[known:]
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            self._forget_since(before)
            return super().call_module(m, forward, args, kwargs)

    def kind(self, proxy: fx.Proxy) -> type:
        """The type of the value that a proxy stands for. Raises TraceError where it is not known."""
        found: type = self._noting(self._known_kind, proxy)
        return found

    def _known_kind(self, proxy: fx.Proxy) -> type:
        found = kind_of(proxy.node, self.modules)
        if found is None:
            raise fx.proxy.TraceError(f"it asks for the type of {proxy.node.name}, which is known only when it runs")
        return found

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self._noting(super().to_bool, obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        found: Iterator[Any] = self._noting(super().iter, obj)
        return found

    def _noting(self, ask: Callable[[fx.Proxy], Any], proxy: fx.Proxy) -> Any:
        try:
            return ask(proxy)
        except fx.proxy.TraceError as error:  # which is a ValueError, as a network may raise and catch its own
            self.failures.append(error)
            raise

    def _check_failures(self, known: int) -> None:
        """Raises what the forward caught of those that came after the `known` ones: it went another way for them."""
        if len(self.failures) > known:
            raise self.failures[known]

    def _forget_since(self, before: fx.Node | None) -> None:
        """Takes back what was recorded after the node `before`."""
        while (last := self._latest()) is not before and last is not None:
            self.graph.erase_node(last)
            self.erased.add(last)
            self.recorded = {key: proxy for key, proxy in self.recorded.items() if proxy.node is not last}

    def _latest(self) -> fx.Node | None:
        """The last node that was recorded."""
        return next(iter(reversed(self.graph.nodes)), None)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter as a proxy, found by identity in constant time (fx searches the whole model each time)."""
        if id(attr_val) not in self.names or not isinstance(attr_val, nn.Parameter):
            return attr_val
        return self._recorded(attr_val)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        first = args[0] if args else None
        if isinstance(first, fx.Proxy) and writes(target, kwargs) and reaches_parameter(first.node):
            raise fx.proxy.TraceError("it writes into a parameter")
        if self.trains and not torch.is_grad_enabled():
            raise fx.proxy.TraceError("it turns autograd off, and a graph has it on throughout")
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind is tuple:
            return tuple([self.create_arg(entry) for entry in a])
        if isinstance(a, fx.Proxy):
            return self._own(a)
        if kind in ATOMS or (kind is dict and not a):
            return a
        if kind in PLAIN:  # which fx.Tracer finds out last
            return fx.proxy.TracerBase.create_arg(self, a)
        known = self.remembered.get(id(a)) if isinstance(a, Tensor) else None
        if id(a) in self.names or (known is not None and known.version == known.tensor._version):
            return self._recorded(a).node
        return super().create_arg(a)

    def _own(self, proxy: fx.Proxy) -> fx.Node:
        """The node of a proxy. Raises TraceError where it is not of this graph, or no longer."""
        node = proxy.node
        if proxy.tracer is self and node not in self.erased:
            return node
        self.failures.append(fx.proxy.TraceError("it uses a value that was kept from a trace that failed, or is over"))
        raise self.failures[-1]

    def _recorded(self, tensor: Tensor) -> fx.Proxy:
        """The proxy of a parameter, a buffer, or of what was computed from buffers: one each."""
        key = id(tensor)
        if key not in self.recorded:
            named = key in self.names
            self.recorded[key] = (
                self.create_proxy("get_attr", self.names[key], (), {}) if named else self._record(self.remembered[key])
            )
        return self.recorded[key]

    def remember(self, tensor: Tensor, *call: Any, piece: int | None = None) -> None:
        """Notes how a tensor was computed (function, args, kwargs), if buffers are among what it was computed from."""
        operands: list[Any] = []
        fx.node.map_aggregate(call[1:], operands.append)
        if any(a is tensor for a in operands) or id(tensor) in self.names or tensor.is_inference():
            return
        if any(isinstance(a, Tensor) and (id(a) in self.names or id(a) in self.remembered) for a in operands):
            function, args, kwargs = call
            self.remembered[id(tensor)] = Remembered(tensor, tensor._version, function, args, kwargs, piece)

    def remember_pieces(self, pieces: tuple[Tensor, ...], *call: Any) -> None:
        for i, piece in enumerate(pieces):
            self.remember(piece, *call, piece=i)

    def _record(self, known: Remembered) -> fx.Proxy:
        (kind, target), args = kind_and_target(known.function), known.args
        if known.function.__name__ == "__get__":  # a property, such as `T`
            kind, target, args = "call_function", getattr, (*known.args[:1], known.function.__self__.__name__)
        made = self.create_proxy(kind, target, args, {} if target is getattr else known.kwargs)
        if known.piece is None:
            return made
        return self.create_proxy("call_function", operator.getitem, (made, known.piece), {})

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """An argument with a default is taken to have it, and the graph asserts so; `if mask is None` then decides.

        Of a first argument that defaults to None the contrary is taken: it is what the network is a function of.
        `*args` and `**kwargs` after others are taken to be empty where the forward looks into them.
        """
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        given = next(iter([name for name in parameters if name != "self"]), "")
        for i, arg in enumerate(args):
            if not isinstance(arg, fx.Proxy):
                continue
            name = str(arg.node.target)
            if name in self.examples:
                arg.node.meta[KIND] = type(self.examples[name])
            elif name in parameters and not _is_tensor(parameters[name].annotation):
                arg.node.meta[KIND] = None
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if default is inspect.Parameter.empty:
                continue
            if name == given and default is None and name not in self.examples:
                self._assert(operator.is_not, arg, None, f"collapsed for a {name} that is given")
                continue
            args[i] = self._as_given(arg, self.examples.get(name, default), name)
        return function, args

    def _as_given(self, arg: fx.Proxy, given: Any, name: str) -> Any:
        """A tensor is whatever comes, in a list, tuple or dict as well; all else is taken to be what is given here."""
        if isinstance(given, Tensor):
            return arg
        if type(given) in (tuple, list, dict) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
            keys = list(given) if isinstance(given, dict) else range(len(given))
            message = f"collapsed for {len(given)} entries of {name}"
            self._assert(operator.is_not, arg, None, message)
            self._assert(operator.eq, self.create_proxy("call_function", len, (arg,), {}), len(given), message)
            entries = {key: self.create_proxy("call_function", operator.getitem, (arg, key), {}) for key in keys}
            parts = {key: self._as_given(entries[key], given[key], f"{name}[{key!r}]") for key in keys}
            return parts if isinstance(given, dict) else type(given)(parts.values())
        same = operator.is_ if given is None or isinstance(given, bool) else operator.eq
        message = f"collapsed for {name}={given!r}; pass {name} in example_inputs to collapse it for a tensor"
        self._assert(same, arg, given, message)
        return given

    def _assert(self, relation: Callable[[Any, Any], bool], arg: fx.Proxy, other: Any, message: str) -> None:
        torch._assert(self.create_proxy("call_function", relation, (arg, other), {}), message)


def _is_tensor(annotation: Any) -> bool:
    """Whether an argument so annotated is a tensor, as far as is told."""
    words = set(re.findall(r"\w+", annotation if isinstance(annotation, str) else str(annotation)))
    return annotation is inspect.Parameter.empty or words <= {"class", "torch", "Tensor", "typing", "Optional", "None"}


def told(error: Exception) -> str:
    """An exception in one line, without where torch's documents say more."""
    fact = " ".join(str(error).split()).partition(" See the torch.fx docs")[0]
    return f"{type(error).__name__}: {fact[:160].rstrip('.')}"
