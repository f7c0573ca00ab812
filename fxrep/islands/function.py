"""One function of a module, read from its source: which names stand for its sub-modules, and what is done with them."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

PLAIN = (int, float, str, bool, type(None))
#: Where a module keeps what is in it.
INTERNALS = vars(nn.Module()).keys() - {"training"}


@dataclass(frozen=True)
class Slot:
    """A sub-module by its attribute (`depth` 0), or all that are so many levels down in the container there."""

    name: str
    depth: int = 0

    @property
    def inner(self) -> Slot:
        return Slot(self.name, self.depth + 1)


@dataclass(frozen=True)
class Arguments:
    """How a module is called: so many positional arguments, these keywords; None where the source does not say."""

    positional: int | None
    keywords: frozenset[str] | None

    @staticmethod
    def of(call: ast.Call) -> Arguments:
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        names = [k.arg for k in call.keywords]
        keywords = None if None in names else frozenset(n for n in names if n is not None)
        return Arguments(None if starred else len(call.args), keywords)


ONE = Arguments(1, frozenset())


class Function:
    """What one method does. Everything that it may do with a sub-module and that is not understood is in `touched`."""

    def __init__(self, tree: ast.FunctionDef, module: nn.Module, scope: Mapping[str, Any]) -> None:
        self.tree, self.module, self.scope = tree, module, scope
        self.children = {name for name, child in module._modules.items() if child is not None}
        self.self_name = tree.args.args[0].arg
        self.nodes = list(ast.walk(tree))
        self.parents: dict[ast.AST, ast.AST] = {child: n for n in self.nodes for child in ast.iter_child_nodes(n)}
        self.names: dict[str, set[Slot]] = {}
        self.calls: dict[Slot, list[Arguments]] = {}
        self.opened: set[Slot] = set()
        self.touched: dict[str, str] = {}
        self.uses_whole = ""
        self.own_attributes: set[str] = set()
        self.inherited: set[str] = set()
        while self._bound():
            pass
        for node in self.nodes:
            self._use(node)
        self.chains = list(self._chains())

    # Which names stand for sub-modules

    def _bound(self) -> bool:
        """One more round of binding, since a name may stand for another; whether it found anything."""
        before = sum(map(len, self.names.values()))
        for node in self.nodes:
            if isinstance(node, (ast.For, ast.comprehension)):
                self._bind_loop(node.target, node.iter)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                self._bind(node.targets[0], self.slots(node.value))
            elif isinstance(node, ast.NamedExpr):
                self._bind(node.target, self.slots(node.value))
        return sum(map(len, self.names.values())) > before

    def _bind_loop(self, target: ast.expr, iterated: ast.expr) -> None:
        """`for t in self.blocks`, `for i, t in enumerate(self.blocks)`, `for a, b in zip(self.p, self.q)`, …"""
        for name, container in _pairs(target, iterated):
            self._bind(name, {s.inner for s in self.slots(container)})

    def _bind(self, target: ast.expr, slots: set[Slot]) -> None:
        if isinstance(target, ast.Name) and slots:
            self.names.setdefault(target.id, set()).update(slots)

    def slots(self, node: ast.AST) -> set[Slot]:
        """The sub-modules that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute) and self._is_self(node.value) and node.attr in self.children:
            return {Slot(node.attr)}
        if isinstance(node, ast.Subscript):
            within = self.slots(node.value)
            return within if isinstance(node.slice, ast.Slice) else {s.inner for s in within}
        return set()

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name

    # What is done with them

    def _use(self, node: ast.AST) -> None:
        if self._is_self(node):
            self._use_self(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call) and _is_named(node.value.func, "super"):
            self.inherited.add(node.attr)
        for slot in self.slots(node):
            self._use_slot(node, slot)

    def _use_self(self, node: ast.AST) -> None:
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            stores = not isinstance(parent.ctx, ast.Load)
            if parent.attr in self.children and stores:
                self._touch(parent.attr, node, "assigns it")
            elif parent.attr in INTERNALS:
                self.uses_whole = f"line {_line(node)} of its {self.tree.name} uses {parent.attr}"
            elif parent.attr not in self.children:
                self.own_attributes.add(parent.attr)
        elif not (isinstance(parent, ast.Call) and (_is_named(parent.func, "hasattr", "super"))):
            self.uses_whole = f"line {_line(node)} of its {self.tree.name} uses the whole of it"

    def _use_slot(self, node: ast.AST, slot: Slot) -> None:
        parent = self.parents[node]
        if isinstance(parent, ast.Call) and parent.func is node:
            self.calls.setdefault(slot, []).append(Arguments.of(parent))
        elif self._opens(node, parent):
            self.opened.add(slot)
        elif not self._is_harmless(node, parent, slot):
            self._touch(slot.name, node, "does more with it than call it")

    def _touch(self, name: str, node: ast.AST, what: str) -> None:
        self.touched.setdefault(name, f"line {_line(node)} of its parent's {self.tree.name} {what}")

    def _is_harmless(self, node: ast.AST, parent: ast.AST, slot: Slot) -> bool:
        """Whether any other module that computes the same would do as well there."""
        if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            return isinstance(node, ast.Name)
        if isinstance(parent, ast.Attribute):
            return self._is_plain_attribute(parent, slot)
        if isinstance(parent, ast.Call):
            return self._is_handed_for_plain_attributes(node, parent, slot)
        if isinstance(parent, ast.Compare):  # `self.conv is not None`
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Assign):
            return len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name)
        return isinstance(parent, ast.NamedExpr) or (isinstance(parent, (ast.If, ast.IfExp)) and parent.test is node)

    def _is_plain_attribute(self, node: ast.Attribute, slot: Slot) -> bool:
        """Whether a number or name is read that a replacement has as well."""
        child = self.module._modules[slot.name]
        return not slot.depth and isinstance(node.ctx, ast.Load) and _is_plain(vars(child).get(node.attr, node))

    def _is_handed_for_plain_attributes(self, node: ast.AST, call: ast.Call, slot: Slot) -> bool:
        """Whether a function that it is given to only reads its stride and the like, as a padding by hand does."""
        function = self.scope.get(call.func.id) if isinstance(call.func, ast.Name) else None
        tree = parsed(function) if isinstance(function, FunctionType) else None
        if tree is None or tree.decorator_list or node not in call.args:
            return False
        starred = any(isinstance(a, ast.Starred) for a in call.args)
        place, taken = call.args.index(node), [*tree.args.posonlyargs, *tree.args.args]
        if starred or place >= len(taken):
            return False
        owners = {id(n.value): n for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == taken[place].arg]
        reads = all(id(n) in owners and self._is_plain_attribute(owners[id(n)], slot) for n in uses)
        return reads and not any(_is_named(n, "locals", "vars", "eval", "exec") for n in ast.walk(tree))

    def _opens(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether the entries of a container are what is asked for: an index, a loop, perhaps through `enumerate`."""
        if isinstance(parent, ast.Subscript):
            return parent.value is node and isinstance(parent.ctx, ast.Load)
        if isinstance(parent, (ast.For, ast.comprehension)):
            return parent.iter is node and isinstance(parent.target, ast.Name)
        if isinstance(parent, ast.Attribute) and parent.attr in ("values", "items", "keys"):
            call = self.parents[parent]
            return isinstance(call, ast.Call) and call.func is parent and self._is_read_pairwise(call, parent.attr)
        if not isinstance(parent, ast.Call) or parent.func is node:
            return False
        return _is_named(parent.func, "len") or self._is_read_pairwise(parent, "")

    def _is_read_pairwise(self, call: ast.Call, method: str) -> bool:
        """Whether the call is one that `_pairs` sees through, in a loop whose names it understands."""
        if method == "keys":
            return True
        if not method and not _is_named(call.func, "enumerate", "zip", "reversed"):
            return False
        outer = self.parents[call]
        if isinstance(outer, (ast.For, ast.comprehension)) and outer.iter is call:
            pairs = [(t, c) for t, c in _pairs(outer.target, outer.iter) if isinstance(t, ast.Name)]
            understood = {id(n) for _, container in pairs for n in ast.walk(container)}
            inside = (n for n in ast.walk(call) if self.slots(n))
            return all(id(n) in understood for n in inside)
        return isinstance(outer, ast.Call) and self._is_read_pairwise(outer, "")

    # Which of them are called one on the result of the other

    def _chains(self) -> Iterator[tuple[str, ...]]:
        """Chains of calls with one argument each, whose results between nobody else can see."""
        if any(isinstance(n, (ast.Try, ast.Lambda, ast.FunctionDef)) and n is not self.tree for n in self.nodes):
            return  # which may see a variable that is assigned again
        for node in self.nodes:
            yield _links(self, node)[0]
            for name in ("body", "orelse"):
                block = getattr(node, name, None)
                if isinstance(block, list):
                    yield from self._chains_of(block)

    def _chains_of(self, block: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
        """`x = self.a(x)` and right after it `x = self.b(x)` or `return self.b(x)`, perhaps if there is such a one."""
        chain: tuple[str, ...] = ()
        result = ""
        for statement in self._decided(block):
            value = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
            links, argument = _links(self, value)
            target = _target(statement)
            if not (result and links and self._only_takes(argument, result, statement, target)):
                yield chain
                chain = ()
            chain, result = (*chain, *links), target if links else ""
        yield chain

    def _decided(self, block: list[ast.stmt]) -> Iterator[ast.stmt]:
        """The statements, with the body of `if self.norm is not None` in its place where there is such a sub-module."""
        for statement in block:
            way = self._way(statement) if isinstance(statement, ast.If) else None
            if way is None:
                yield statement
            else:
                yield from self._decided(way)

    def _way(self, statement: ast.If) -> list[ast.stmt] | None:
        """The branch that is taken, where it depends on nothing but whether there is a certain sub-module."""
        test = statement.test
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.left, ast.Attribute)):
            return None
        other, name = test.comparators[0], test.left.attr
        is_none = isinstance(other, ast.Constant) and other.value is None
        if not (is_none and self._is_self(test.left.value) and isinstance(test.ops[0], (ast.Is, ast.IsNot))):
            return None
        there = name in self.children
        if not there and (getattr(self.module, name, self) is not None or _is_assigned(name, type(self.module))):
            return None
        return statement.body if there == isinstance(test.ops[0], ast.IsNot) else statement.orelse

    def _only_takes(self, argument: ast.AST | None, result: str, statement: ast.stmt, target: str) -> bool:
        """Whether the variable `result` is what the statement takes, and nothing can read it afterwards."""
        if not isinstance(argument, ast.Name) or argument.id != result:
            return False
        reads = [n for n in self.nodes if isinstance(n, ast.Name) and n.id == result and isinstance(n.ctx, ast.Load)]
        return target == result or isinstance(statement, ast.Return) or len(reads) == 1


def _links(function: Function, node: ast.AST | None) -> tuple[tuple[str, ...], ast.AST | None]:
    """`self.b(self.a(x))` as the attributes a, b and the x that the innermost takes."""
    names: list[str] = []
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and Arguments.of(node) == ONE:
        slots = function.slots(node.func)
        if len(slots) != 1:
            break
        names.insert(0, next(iter(slots)).name)
        node = node.args[0]
    return tuple(names), node


def _target(statement: ast.stmt) -> str:
    """The one variable that a statement assigns, if it is of that kind."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else ""
    return ""


def _pairs(target: ast.expr, iterated: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What a loop sets, with the container whose entries it takes: through enumerate, zip, reversed, values, items."""
    if not isinstance(iterated, ast.Call):
        yield target, iterated
        return
    function, args = iterated.func, iterated.args
    within = target.elts if isinstance(target, ast.Tuple) else []
    if _is_named(function, "enumerate") and len(within) == 2 and args:
        yield from _pairs(within[1], args[0])
    elif _is_named(function, "zip") and len(within) == len(args):
        for inner, argument in zip(within, args, strict=True):
            yield from _pairs(inner, argument)
    elif _is_named(function, "reversed") and args:
        yield from _pairs(target, args[0])
    elif isinstance(function, ast.Attribute) and function.attr == "values":
        yield target, function.value
    elif isinstance(function, ast.Attribute) and function.attr == "items" and len(within) == 2:
        yield within[1], function.value


def parsed(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """The source of a function, if there is one."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _is_assigned(name: str, kind: type) -> bool:
    """Whether any method but the constructors may give instances another attribute of that name."""
    methods = (f for k in kind.__mro__ for n, f in vars(k).items() if n != "__init__" and k is not nn.Module)
    codes = (f.__code__ for f in methods if isinstance(f, FunctionType))
    return any(i.opname == "STORE_ATTR" and i.argval == name for code in codes for i in dis.get_instructions(code))


def _is_plain(value: Any) -> bool:
    entries = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(e, PLAIN) for e in entries)


def _is_named(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _line(node: ast.AST) -> int:
    """The line, counted from the function's own `def`."""
    return getattr(node, "lineno", 0)
