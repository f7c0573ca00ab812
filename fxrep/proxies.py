"""What stands for a value while it is traced: proxies that record writes and assertions, and know what is constant."""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import fx

from fxrep.readers.walk import is_random, writes

SPLIT_SIZES = ("chunks", "split_size", "split_size_or_sections")
IS_CONSTANT, VALUE = "fxrep_constant", "fxrep_value"


class Proxy(fx.Proxy):
    """A proxy that records `x += y`, `x[i] = y` and assertions.

    fx's own takes the first for `x = x + y`, loses the second, and stops at the third.
    """

    def __getattr__(self, name: str) -> Attribute:
        return Attribute(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __bool__(self) -> bool:
        """A branch of which one way only raises is an assertion that the other is taken."""
        frame = inspect.currentframe()
        taken = None if frame is None or frame.f_back is None else _only_way(frame.f_back)
        if taken is None:
            return bool(super().__bool__())
        holds = self if taken else self.tracer.create_proxy("call_function", operator.not_, (self,), {})
        torch._assert(holds, f"an assertion of the network's own, at {self.node.name}")
        return taken


class Attribute(fx.proxy.Attribute, Proxy):
    """An attribute of a proxy, which records the same."""


def _only_way(frame: FrameType) -> bool | None:
    """The truth value with which the branch that the frame stands at does not raise, if with the other it must."""
    function = dis.Bytecode(frame.f_code)
    code = list(function)
    place = {instruction.offset: i for i, instruction in enumerate(code)}
    at = place.get(frame.f_lasti)
    if at is not None and code[at].opname == "TO_BOOL":  # Python 3.13 asks for the truth in an instruction of its own
        at += 1
    if at is None or not code[at].opname.startswith("POP_JUMP") or not code[at].opname.endswith(("_TRUE", "_FALSE")):
        return None
    jumps_if = code[at].opname.endswith("_TRUE")
    caught = _caught(function, code, place)
    next_raises, target_raises = (_raises(code, place, caught, start) for start in (at + 1, place[code[at].argval]))
    if next_raises == target_raises:
        return None
    return jumps_if if next_raises else not jumps_if


def _raises(code: Sequence[dis.Instruction], place: Mapping[int, int], caught: Collection[int], start: int) -> bool:
    """Whether every way on from here ends in a `raise` that leaves the function, and none goes back."""
    todo, seen = [start], set[int]()
    while todo:
        at = todo.pop()
        while at not in seen and (code[at].opname != "RAISE_VARARGS" or at in caught):
            seen.add(at)
            name = code[at].opname
            if name.startswith(("RETURN", "YIELD", "FOR_ITER", "RAISE")) or at + 1 == len(code):
                return False
            if "JUMP" in name:
                target = place[code[at].argval]
                if target <= at:
                    return False
                todo.append(target)
            if name in ("JUMP_FORWARD", "JUMP_ABSOLUTE"):
                break
            at += 1
    return True


def _caught(function: dis.Bytecode, code: Sequence[dis.Instruction], place: Mapping[int, int]) -> set[int]:
    """The instructions of which an `except` or `finally` of the same function sees what they raise."""
    known = getattr(function, "exception_entries", None)
    if known is None:  # before Python 3.11
        spans = [(i.offset, i.argval) for i in code if i.opname == "SETUP_FINALLY"]
    else:
        spans = [(e.start, e.end) for e in known if code[place[e.target] + 1].opname != "WITH_EXCEPT_START"]
    return {i for i, one in enumerate(code) if any(start <= one.offset < end for start, end in spans)}


class Rest(Proxy):
    """`*args` or `**kwargs`: nothing is in them where the forward asks what is, and the graph asserts so.

    What it takes by an index or a name it needs, so that is given, and recorded.
    """

    _is_asserted = False

    def _none(self) -> tuple[Any, ...]:
        if not self._is_asserted:
            self._is_asserted = True
            holds = self.tracer.create_proxy("call_function", operator.not_, (self,), {})
            name = self.node.target
            torch._assert(holds, f"collapsed for a call without {name}; pass {name} in example_inputs to allow them")
        return ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._none())

    def __len__(self) -> int:
        return len(self._none())

    def __bool__(self) -> bool:
        return bool(self._none())

    def __contains__(self, name: object) -> bool:
        return name in self._none()

    def keys(self) -> Any:
        return self._none()

    values = items = keys

    def get(self, name: str, default: Any = None) -> Any:
        return default if name not in self else None

    def pop(self, name: str, *default: Any) -> Any:
        if not default:
            raise KeyError(name)
        return self.get(name, *default)


class Pieces(Proxy):
    """The pieces of a chunk or split whose number is written, which can be iterated; fx itself can only unpack."""

    def __iter__(self) -> Any:
        return iter([operator.getitem(self, i) for i in range(len(self))])

    def __len__(self) -> int:
        return count_of_pieces(self.node)


class ConstantProxy(Proxy):
    """What parameters alone compute: its shape is known while tracing, and so is how often it can be iterated."""

    @property
    def shape(self) -> torch.Size:
        return _value(self.node).shape

    @property
    def ndim(self) -> int:
        return _value(self.node).ndim

    def size(self, dim: int | None = None) -> Any:
        return _value(self.node).size() if dim is None else _value(self.node).size(dim)

    def dim(self) -> int:
        return _value(self.node).dim()

    def numel(self) -> int:
        return _value(self.node).numel()

    def __len__(self) -> int:
        return len(_value(self.node))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, i) for i in range(len(self))])


def _value(node: fx.Node) -> Any:
    """The numbers that a constant node stands for, computed when they are asked for."""
    if VALUE not in node.meta:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        with torch.no_grad():
            if node.op == "call_method":
                node.meta[VALUE] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta[VALUE] = node.target(*args, **kwargs)  # type: ignore[operator]
    return node.meta[VALUE]


def is_constant(node: fx.Node) -> bool:
    """Whether parameters alone decide the node's value, by an op that draws no random numbers."""
    if VALUE in node.meta:
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    operands = node.all_input_nodes
    if not operands or not all(n.meta.get(IS_CONSTANT) for n in operands):
        return False
    return not (is_random(node) or writes(node.target, node.kwargs))


#: Ops whose result may be another view of the operand's memory.
_VIEWS = """
    getattr getitem __getitem__ view view_as reshape detach t transpose swapaxes permute movedim flatten unflatten
    squeeze unsqueeze expand expand_as narrow select chunk split unbind diagonal contiguous to type float double half
"""
VIEWS = frozenset(_VIEWS.split())


def reaches_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter, or may be a view of one."""
    while node.op != "get_attr":
        first = node.args[0] if node.args else None
        if str(getattr(node.target, "__name__", node.target)) not in VIEWS or not isinstance(first, fx.Node):
            return False
        node = first
    return True


SPLITS = ("chunk", torch.chunk, "split", torch.split)


def count_of_pieces(node: fx.Node) -> int:
    """How many pieces a chunk or split gives, 0 where that is not written."""
    if node.target not in SPLITS:
        return 0
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
