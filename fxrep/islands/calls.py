"""What a forward that is not traced does with its sub-modules, as far as its source proves it.

A sub-module may be replaced by another that computes the same only if the forward around it does nothing but call it:
one that reads its weights, iterates over its parts or hands it to somebody else would see the difference.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from fxrep.islands.function import INTERNALS, Arguments, Function, Slot, parsed
from fxrep.readers import is_hooked

#: What a forward may read of any module without learning what is in it.
HARMLESS = ("training", "__class__", "_get_name")


@dataclass
class Calls:
    """The sub-modules that a forward certainly does nothing with but call them, and how; why not, of the others."""

    of: dict[Slot, list[Arguments]] = field(default_factory=dict)
    #: by attribute: how many levels of the container there are opened, by a loop or an index
    opened: dict[str, int] = field(default_factory=dict)
    touched: dict[str, str] = field(default_factory=dict)
    #: attributes called one on the result of the other, which nobody else sees, innermost first
    chains: list[tuple[str, ...]] = field(default_factory=list)
    opaque: str = ""
    """Why nothing is certain of any of them, if so."""

    def why_not(self, name: str) -> str:
        """Why the sub-module may be more than called; empty if it is not."""
        return self.opaque or self.touched.get(name, "")


def calls_of(module: nn.Module) -> Calls:
    """Reads the source of the module's forward, and of the methods and properties that it uses."""
    reader = _Reader(module)
    if "forward" in vars(module):
        reader.found.opaque = "its forward was replaced on the instance"
    elif is_hooked(module):
        reader.found.opaque = "a hook on it may look inside"
    else:
        reader.read()
    return reader.found


class _Reader:
    """Follows all code of one module that its forward may run."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.found = module, Calls()
        self.seen: set[tuple[type, str]] = set()
        self.chains: list[tuple[str, ...]] = []

    def read(self) -> None:
        self._note_aliases()
        self._follow(type(self.module), "forward")
        sites = {slot.name: 0 for slot in self.found.of}
        for slot, calls in self.found.of.items():
            sites[slot.name] += len(calls)
        pieces = {piece for chain in self.chains for piece in _pieces(chain, sites)}
        self.found.chains = _longest(sorted(pieces, key=len, reverse=True))

    def _note_aliases(self) -> None:
        """Sub-modules that an attribute holds once more, and functions that may hold anything."""
        inside = {name: set(map(id, child.modules())) for name, child in self.module.named_children()}
        for name, value in vars(self.module).items():
            held = set[int]() if name in (*INTERNALS, "training") else _held(value)
            if held is None:
                self._give_up(f"its attribute {name} is a function that may use anything in it")
            for child in (child for child, parts in inside.items() if parts & (held or set())):
                self.found.touched[child] = f"the attribute {name} holds it too"

    def _follow(self, kind: type, name: str, after: type | None = None) -> None:
        """Reads the method or property `name` of the class, or the one that comes after `after` in its order."""
        order = kind.__mro__ if after is None else kind.__mro__[kind.__mro__.index(after) + 1 :]
        owner = next((k for k in order if name in vars(k)), None)
        if owner is None or (owner, name) in self.seen or name in HARMLESS:
            return
        self.seen.add((owner, name))
        attribute = vars(owner)[name]
        function = getattr(attribute, "fget", attribute)
        if owner is nn.Module or owner is object:
            self._give_up(f"its forward uses {name}, which reaches everything in it")
        elif callable(function) and not isinstance(attribute, (staticmethod, classmethod, type)):
            self._read_function(owner, name, function)

    def _read_function(self, owner: type, name: str, function: Callable[..., Any]) -> None:
        plain = inspect.unwrap(function)
        tree = parsed(plain)
        if tree is None or not isinstance(plain, FunctionType) or not tree.args.args:
            return self._give_up(f"the source of its {name} cannot be read")
        if not all(_is_torchs(d, plain) for d in tree.decorator_list):
            return self._give_up(f"a decorator of its {name} may do anything with it")
        read = Function(tree, self.module, plain.__globals__)
        for slot, calls in read.calls.items():
            self.found.of.setdefault(slot, []).extend(calls)
        for slot in read.opened:
            self.found.opened[slot.name] = max(self.found.opened.get(slot.name, 0), slot.depth + 1)
        self.found.touched = {**read.touched, **self.found.touched}
        self.chains += read.chains
        if read.uses_whole:
            self._give_up(read.uses_whole)
        for used in read.own_attributes - vars(self.module).keys():
            self._follow(type(self.module), used)
        for used in read.inherited:
            self._follow(type(self.module), used, owner)

    def _give_up(self, reason: str) -> None:
        self.found.opaque = self.found.opaque or reason


def _held(value: Any) -> set[int] | None:
    """The modules that a value holds, by identity; None where it is bound to what cannot be looked into."""
    held: set[int] = set()
    seen: set[int] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if id(current) in seen or isinstance(current, type):
            continue
        seen.add(id(current))
        if isinstance(current, nn.Module):
            held.update(map(id, current.modules()))
        elif isinstance(current, dict):
            todo.extend(current.values())
        elif isinstance(current, (list, tuple, set, frozenset)):
            todo.extend(current)
        elif isinstance(current, FunctionType):
            todo.extend(cell.cell_contents for cell in current.__closure__ or ())
            todo.extend(current.__defaults__ or ())
        elif isinstance(current, (MethodType, partial)) or getattr(current, "__self__", None) is not None:
            todo.extend(_bound_to(current))
        elif hasattr(current, "__dict__"):
            todo.append(vars(current))
        elif callable(current):
            return None
    return held


def _bound_to(function: Any) -> list[Any]:
    """What a method, a partial or a function of a built-in type takes along."""
    if isinstance(function, partial):
        return [function.func, function.args, function.keywords]
    return [] if isinstance(function.__self__, ModuleType) else [function.__self__]


def _is_torchs(decorator: ast.expr, function: FunctionType) -> bool:
    """Whether a decorator is torch's, or `property`: one that does nothing else with the module."""
    root = decorator
    while isinstance(root, (ast.Call, ast.Attribute)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if not isinstance(root, ast.Name):
        return False
    value = function.__globals__.get(root.id)
    origin = root.id if value is None else getattr(value, "__module__", None) or getattr(value, "__name__", "")
    return str(origin).split(".")[0] in ("torch", "property")


def _pieces(chain: tuple[str, ...], sites: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """The runs of a chain in which each module is called nowhere else."""
    run: list[str] = []
    for name in (*chain, None):
        if name is not None and sites.get(name) == 1:
            run.append(name)
            continue
        if len(run) > 1:
            yield tuple(run)
        run = []


def _longest(chains: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Chains, longest first, without those that share a module with a longer one."""
    taken: set[str] = set()
    kept = []
    for chain in chains:
        if taken.isdisjoint(chain):
            kept.append(chain)
            taken.update(chain)
    return kept
