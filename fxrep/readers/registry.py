"""The registry: which reader says what an op of the graph means, and the `Call` that a reader reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from fxrep import form as forms
from fxrep import kernel as K
from fxrep.errors import Illegal, Refusal
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.shapes import Dim, Shape, Shapes

Target = Any  # an nn.Module type, a function, or the name of a Tensor method
Reader = Callable[..., "AffineForm | Refusal"]
ShapeRule = Callable[..., "Shape | None"]

_READERS: dict[Target, Reader] = {}
_SHAPE_RULES: dict[Target, ShapeRule] = {}
_REQUIRED = object()
#: What the schema of an aten op calls an argument, where readers call it otherwise.
_SCHEMA_NAMES = {
    "input": ("self",), "training": ("train",), "split_size_or_sections": ("split_size", "split_sizes"),
    "split_size": ("split_sizes",),
}  # fmt: skip
#: Arguments of aten ops that choose an implementation, or a layout of memory, and change no number.
_NO_MEANING = frozenset({"cudnn_enabled", "memory_format", "implicit", "non_blocking"})


@dataclass(frozen=True)
class First:
    """The first of the results of an op that gives several: what `getitem(op(…), 0)` is registered as."""

    target: Target


def base_name(target: Target) -> str:
    """The name of a function, method or aten op without its overload: `add` for `torch.ops.aten.add.Tensor`."""
    if isinstance(target, OpOverload):
        return target._opname
    return str(getattr(target, "__name__", target))


def canonical(target: Target) -> Target:
    """The function or method of torch that readers know an aten op by, since the two share their name and meaning.

    `torch.ops.aten.conv2d.default` is `F.conv2d`; `torch.ops.aten.add_.Tensor` is the method "add_". An op that has no
    such twin (`aten.convolution.default`) is registered as itself.
    """
    if not isinstance(target, OpOverload) or target.namespace != "aten" or _is_registered(target):
        return target
    names = dict.fromkeys((target._opname, target._opname.removeprefix("_")))  # `_softmax` is `softmax`
    twins = (twin for name in names for twin in (name, getattr(F, name, None), getattr(torch, name, None)))
    return next((twin for twin in twins if twin is not None and _is_registered(twin)), target)


def _is_registered(target: Target) -> bool:
    return target in _READERS or target in _SHAPE_RULES


def reader(*targets: Target) -> Callable[[Reader], Reader]:
    """Registers a reader for module types, functions and method names (`"add"` for `x.add(...)`).

    A reader of a module type is called as `read(at, module)`, any other as `read(at)`; it returns the `AffineForm` of
    the node over its direct operands, returns a `Refusal`, or lets an `Illegal` of the algebra pass.
    """
    return _register(_READERS, targets)


def shape_rule(*targets: Target) -> Callable[[ShapeRule], ShapeRule]:
    """Registers what is known of the shape of an op that has no affine reading, or whose reading was refused."""
    return _register(_SHAPE_RULES, targets)


def _register(registry: dict[Target, Any], targets: Iterable[Target]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for target in targets:
            if target in registry:
                raise ValueError(f"{target!r} already has {registry[target].__name__}; one target has one reader")
            registry[target] = function
        return function

    return add


def registered() -> dict[Target, Reader]:
    """Every target with its reader, for docs and tests."""
    return dict(_READERS)


@dataclass
class Facts:
    """What is known of the graph while it is read, operands first."""

    modules: dict[str, nn.Module]
    shapes: Shapes = field(default_factory=Shapes)
    constants: dict[str, Kernel] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    #: values taken to have so many axes, since a convolution was made of them and nothing says otherwise
    assumed: dict[str, int] = field(default_factory=dict)
    #: by value that is a part of another: that other, which has as many axes
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SizesOf:
    """`x.shape` of a value whose rank is not known: only axes counted from the end can be told."""

    shape: Shape


@dataclass(frozen=True)
class Atom:
    """A piece of one axis of a value: `size` entries, `stride` apart. A whole axis has stride 1 and all of its size."""

    axis: int
    size: Dim
    stride: Fraction = Fraction(1)


@dataclass(frozen=True)
class Layout:
    """A view: its axes, each a row-major product of pieces of the axes of `source`."""

    source: Node
    axes: tuple[tuple[Atom, ...], ...]


@dataclass
class Call:
    """One node, as its reader sees it: arguments bound by name, operands as forms, constants as kernels."""

    node: Node
    facts: Facts
    out_shape: Shape | None = None
    assumes: bool = False

    @property
    def shapes(self) -> Shapes:
        return self.facts.shapes

    @property
    def target(self) -> Target:
        """What is called, an aten op by the function or method of torch that it is."""
        return canonical(self.node.target)

    def _given(self, order: list[str]) -> dict[str, Any]:
        """The arguments by name; those of an aten op by the names of its schema."""
        if not isinstance(self.node.target, OpOverload):
            return dict(zip(order, self.node.args, strict=False)) | dict(self.node.kwargs)
        schema = [a.name for a in self.node.target._schema.arguments]
        given = dict(zip(schema, self.node.args, strict=False)) | dict(self.node.kwargs)
        ours = {theirs: name for name in order for theirs in _SCHEMA_NAMES.get(name, ()) if theirs not in order}
        return {ours.get(name, name): value for name, value in given.items() if name not in _NO_MEANING}

    def bind(self, names: str, **defaults: Any) -> list[Any]:
        """The arguments in the order of `names`, positional or by keyword."""
        order = names.split()
        given = self._given(order)
        unknown = [k for k in given if k not in order]
        if unknown or (len(self.node.args) > len(order) and not isinstance(self.node.target, OpOverload)):
            raise Illegal(
                "unsupported-options", f"has arguments that its reader does not know: {unknown or self.node.args}"
            )
        bound = [given.get(n, defaults.get(n, _REQUIRED)) for n in order]
        if any(b is _REQUIRED for b in bound):
            raise Illegal("unsupported-options", f"is called without {order[bound.index(_REQUIRED)]}")
        return [self.number(b) for b in bound]

    def number(self, argument: Any) -> Any:
        """A traced number as the `Dim` it is known to be; every other argument unchanged."""
        if isinstance(argument, Node) and argument.name in self.facts.scalars:
            known = self.facts.scalars[argument.name]
            return argument if known is None else known
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.number(a) for a in argument)
        return argument

    def is_value(self, argument: Any) -> bool:
        """Whether the argument is a tensor that depends on the network's input."""
        facts = self.facts
        return (
            isinstance(argument, Node) and argument.name not in facts.constants and argument.name not in facts.scalars
        )

    def constant(self, argument: Any) -> Kernel:
        """A parameter, constant tensor or number as a kernel. Raises Illegal for a value of the network."""
        if isinstance(argument, Node) and argument.name in self.facts.constants:
            return self.facts.constants[argument.name]
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return K.Constant((), float(argument))
        if isinstance(argument, Tensor):
            return K.Leaf.of(argument)
        raise Illegal("not-affine", f"a weight of it, {argument}, is computed from the network's input")

    def optional(self, argument: Any) -> Kernel | None:
        return None if argument is None else self.constant(argument)

    def value(self, argument: Any) -> AffineForm:
        """The form of a tensor operand, an anchor."""
        if not self.is_value(argument):
            raise Illegal("not-affine", f"{argument} is not a value of the network")
        return forms.value(argument.name)

    def operand(self) -> AffineForm:
        """The form of the first argument."""
        return self.value(self.first)

    @property
    def first(self) -> Any:
        return self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)

    def shape(self, argument: Any) -> Shape:
        """The shape of a tensor operand, as far as it is known."""
        if not isinstance(argument, Node) or argument.name in self.facts.scalars:
            raise Illegal("not-affine", f"{argument} is no tensor of the network")
        if argument.name in self.facts.constants:
            return Shape(None, self.facts.constants[argument.name].shape)
        return self.shapes.of[argument.name]

    def rank(self, argument: Any) -> int:
        shape = self.shape(argument)
        rank = self.shapes.rank(shape)
        least = self.shapes.least_rank(shape)
        has_channels = least > 1 and isinstance(self.shapes.dim(shape, -least), int)  # a pad tells only the last axes
        if rank is None and self.assumes and shape.root is not None and has_channels:
            self.facts.assumed[shape.root] = least + 1
            return least + 1
        if rank is None:
            raise Illegal(
                "rank-unknown",
                f"the number of axes of {argument.name} decides which one holds the channels",
            )
        return rank

    def dim(self, argument: Any, index: int) -> Dim | None:
        return self.shapes.dim(self.shape(argument), index)

    def from_end(self, argument: Any, axis: int) -> int:
        """An axis counted from the end, which needs no rank where it already is."""
        return axis if axis < 0 else axis - self.rank(argument)

    def channels(self, argument: Any, dims: int) -> int:
        """How many channels an operand has before its last `dims` axes."""
        size = self.dim(argument, -dims - 1)
        if not isinstance(size, int):
            raise Illegal("shape-unknown", f"the channels of {argument.name} are not known")
        return size

    def require_channels(self, argument: Any, dims: int, channels: int) -> None:
        """Notes that the op accepts only this many channels."""
        self.shapes.require_size(self.shape(argument), -dims - 1, channels)


def find(call: Call) -> tuple[Reader | None, tuple[Any, ...]]:
    """The reader of a node and what to call it with. A module matches by exact type, or by an inherited forward."""
    return _find(_READERS, call)


def find_shape_rule(call: Call) -> tuple[ShapeRule | None, tuple[Any, ...]]:
    return _find(_SHAPE_RULES, call)


def _find(registry: dict[Target, Any], call: Call) -> tuple[Any, tuple[Any, ...]]:
    node = call.node
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(several := node.args[0], Node):
        whole = First(several.target)
        if whole in registry:
            return registry[whole], (Call(several, call.facts, assumes=call.assumes),)
    if node.op != "call_module":
        return registry.get(call.target), (call,)
    module = call.facts.modules[str(node.target)]
    return registry.get(meaning_of(module, registry)), (call, module)


def meaning_of(module: nn.Module, registry: dict[Target, Any]) -> type | None:
    """The registered type whose `forward` this module runs, or None. A subclass with its own forward is not guessed."""
    kind = effective_type(module)
    for base in kind.__mro__:
        if base in registry:
            return base if _forward(kind) is _forward(base) and "forward" not in vars(module) else None
    return None


def _forward(kind: type) -> Any:
    return kind.forward  # type: ignore[attr-defined]


def effective_type(module: nn.Module) -> type:
    """The module's class, without the one that `torch.nn.utils.parametrize` puts in front of it."""
    kind = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        return kind.__mro__[1]
    return kind
