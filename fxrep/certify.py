"""The certificate: before a fold is installed, it is compared in float64 with the sub-graph it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxrep import kernel as K
from fxrep.double import COMPUTED, CONVERTED, InDouble
from fxrep.errors import Refusal
from fxrep.evaluation import Doubles, evaluate
from fxrep.fold import Caller, Folded, directly, run, sketch_of, value_of
from fxrep.frozen import lazily
from fxrep.lower import Emit, Recipe
from fxrep.maps import SIZES, Maps
from fxrep.parts import Anchor
from fxrep.plan import Decision
from fxrep.readers import Readings, is_bypass
from fxrep.sketch import sketched

TOLERANCE = 1e-8  # relative to the largest output, in float64: some 1e7 units of rounding


@dataclass(frozen=True)
class Region:
    """A fold and what it replaces. Terms that have no value of their own in the graph are part of what reads them."""

    decision: Decision
    folded: Mapping[int, Folded]
    terms: Mapping[str, Region]

    @property
    def numbers(self) -> list[Folded]:
        return list(self.folded.values())

    @lazily
    def inner(self) -> tuple[Region, ...]:
        """The terms that it reads."""
        return tuple(self.terms[s] for s in self.decision.recipe.form.sources if s in self.terms)

    @lazily
    def replaced(self) -> set[str]:
        """The nodes of the graph that it and its terms stand for."""
        return set(self.decision.replaced).union(*(t.replaced for t in self.inner))

    @lazily
    def sources(self) -> set[str]:
        """The values of the graph that it is computed from."""
        own = set(self.decision.recipe.form.sources) - set(self.terms)
        return own.union(*(t.sources for t in self.inner))

    @property
    def emits(self) -> Iterator[Emit]:
        return chain(self.decision.recipe.emits, *(term.emits for term in self.inner))

    def node_of(self, source: str) -> str:
        """The node of the graph that has the size of a source."""
        return self.terms[source].decision.at if source in self.terms else source

    def proof(self, value: Callable[[str], Tensor], doubles: Doubles, call: Caller) -> list[Tensor]:
        return run(self.decision.recipe, self.folded, self._operands(value, doubles, call), call)

    def value(self, value: Callable[[str], Tensor], doubles: Doubles, call: Caller = directly) -> Tensor:
        operands = self._operands(value, doubles, call)
        return value_of(self.decision.recipe, self.folded, operands, doubles, call)

    def _operands(self, value: Callable[[str], Tensor], doubles: Doubles, call: Caller) -> Callable[[Anchor], Tensor]:
        def operand(anchor: Anchor) -> Tensor:
            term = self.terms.get(anchor.source)
            found = value(anchor.source) if term is None else term.value(value, doubles, call)
            return _rows(found, anchor, self.dims)

        return operand

    @property
    def dims(self) -> int:
        return self.decision.recipe.dims or 0


def certify(region: Region, nodes: Mapping[str, Node], readings: Readings, doubles: Doubles) -> Refusal | None:
    """None if the fold gives what its sub-graph gives, on random data with border pixels, at two sizes.

    A term has no sub-graph of its own: it gives what its kernel says, and what reads it is compared with the sub-graph.
    """
    decision = region.decision
    if _device(region.folded).type == "meta":
        return None  # no numbers, nothing to compare
    try:
        fact = _difference(region, _Interpreter(region, nodes, readings, doubles))
    except Exception as error:  # any failure to run it means that it is not certified
        fact = f"could not be run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None if fact is None else _failed(decision, fact)


@torch.no_grad()
def _difference(region: Region, interpreter: _Interpreter) -> str | None:
    """How the fold differs from its sub-graph at any of the sizes, or None."""
    recipe, device = region.decision.recipe, _device(region.folded)
    doubles, mode = interpreter.doubles, interpreter.mode
    emits, last, wanted = list(region.emits), recipe.emits, region.decision.node
    maps = Maps(region.replaced, emits, last, region.node_of, interpreter.readings, region.dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for extra in SIZES:
            mode.forget_products()
            interpreter.restart(maps.drawing(mode, extra, device))
            anchors = {s: interpreter.value(s) for s in sorted(region.sources)}
            got = region.proof(anchors.__getitem__, doubles, mode.call)
            is_term = wanted not in interpreter.nodes
            expected = region.value(anchors.__getitem__, doubles) if is_term else interpreter.value(wanted)
            fact = _compared(recipe, got, expected, anchors.values())
            if fact is not None:
                return fact
    return None


def _compared(recipe: Recipe, got: Sequence[Tensor], expected: Tensor, anchors: Collection[Tensor]) -> str | None:
    """How the parts differ from the channels of `expected` that they stand for."""
    axis, start, scale = -(recipe.dims or 0) - 1, 0, _largest(expected)
    for part, value in zip(recipe.parts, got, strict=True):
        sketch = sketch_of(part)
        width = expected.shape[axis] - start if len(got) == 1 else sketch[1] if sketch else value.shape[axis]
        if start + width > expected.shape[axis]:
            return f"gives more channels than {expected.shape[axis]}"
        wanted = expected if len(got) == 1 else expected.narrow(axis, start, width)
        if sketch is not None:
            wanted = sketched(wanted, sketch[0], axis, sketch[1])
        if value.shape != wanted.shape:
            return f"gives another shape than {tuple(expected.shape)}"
        distance = _largest(value - wanted)
        if not (distance <= TOLERANCE * scale or distance <= TOLERANCE * (scale + _spread(anchors))):  # nan differs too
            return f"differs by {distance:.2g} where the values are up to {scale:.2g}"
        start += width
    return None if len(got) == 1 or start == expected.shape[axis] else f"gives {start} channels"


def _failed(decision: Decision, fact: str) -> Refusal:
    return Refusal(decision.at, "certificate-failed", f"the fold into {decision.recipe.describe()} {fact}")


def _spread(anchors: Collection[Tensor]) -> float:
    return 1e-6 * max(map(_largest, anchors), default=0.0)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _device(folded: Mapping[int, Folded]) -> torch.device:
    return next((f.like.device for f in folded.values() if f.weight is not None), torch.device("cpu"))


def _rows(value: Tensor, anchor: Anchor, dims: int) -> Tensor:
    if anchor.rows is None:
        return value
    return value.index_select(-dims - 1, torch.tensor(anchor.rows, device=value.device))


class _Interpreter:
    """Runs the nodes that a decision replaces, on demand, in float64, on random values of what they are made from."""

    def __init__(self, region: Region, nodes: Mapping[str, Node], readings: Readings, doubles: Doubles) -> None:
        self.nodes, self.readings, self.doubles, self.mode = nodes, readings, doubles, InDouble(doubles)
        self.inside, self.sources = region.replaced, region.sources
        self.seen = self.sources | self.inside
        self.values: dict[str, Any] = {}
        self.runs: dict[str, bool] = {}
        self.orders: dict[str, list[Node]] = {}
        self.forwards: dict[int, Callable[..., Any]] = {}

    def restart(self, draw: Callable[[str], Tensor]) -> None:
        """Forgets the values, but those of constants."""
        self.draw = draw
        self.values = {n: v for n, v in self.values.items() if n in self.readings.facts.constants}

    def value(self, wanted: str) -> Any:
        if wanted not in self.orders:
            self.orders[wanted] = list(self._order(wanted))
        for node in self.orders[wanted]:
            if node.name not in self.values:
                self.values[node.name] = self._run(node) if self._is_run(node) else self.draw(node.name)
        return self.values[wanted]

    def _order(self, wanted: str) -> Iterator[Node]:
        """What a value is made from, operands first, and its own node."""
        todo, done = [self.nodes[wanted]], set[Node]()
        while todo:
            node = todo[-1]
            missing = [n for n in self._operands(node) if n not in done]
            todo.extend(missing)
            if not missing:
                todo.pop()
                yield node
                done.add(node)

    def _operands(self, node: Node) -> list[Node]:
        return [] if node.name in self.readings.facts.constants or not self._is_run(node) else node.all_input_nodes

    def _is_run(self, node: Node) -> bool:
        """Whether the node is part of what is checked."""
        if node.name not in self.runs:
            self.runs[node.name] = self._is_part(node)
        return self.runs[node.name]

    def _is_part(self, node: Node) -> bool:
        """Whether it is replaced, a number, or made of (views of) anchors; an anchor is drawn, whatever computes it."""
        facts = self.readings.facts
        if node.name in self.inside or node.name in facts.constants or node.name in facts.scalars:
            return True
        if node.name in self.sources:
            return False
        form = self.readings.forms.get(node.name)
        if form is None and node.users and is_bypass(node, self.readings):
            return True
        sources = () if form is None else form.sources
        return self._is_view(node.name) or (bool(sources) and all(map(self._is_seen, sources)))

    def _is_seen(self, name: str) -> bool:
        return name in self.seen or (name in self.nodes and self._is_run(self.nodes[name]))

    def _is_view(self, name: str) -> bool:
        view = self.readings.facts.layouts.get(name)
        return view is not None and view.source.name in self.seen

    def _run(self, node: Node) -> Any:
        constant = self.readings.facts.constants.get(node.name)
        if constant is not None:
            known = constant.tensor if isinstance(constant, K.Leaf) else None
            if known is not None and not known.is_floating_point():
                return known
            return evaluate(constant, self.doubles)
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n.name])
        if node.op == "call_module":
            return self._call(self.readings.facts.modules[str(node.target)], args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op != "call_function":
            raise RuntimeError(f"{node.name} is not between the anchors and the value")
        with self.mode if node.target in COMPUTED else nullcontext():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward with its parameters and buffers in float64, without changing it."""
        if id(module) not in self.forwards:
            self.forwards[id(module)] = self._forward(module)
        return self.forwards[id(module)](*args, **kwargs)

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        if module._modules or "forward" in vars(module):
            tensors = [*module.named_parameters(), *module.named_buffers()]
            doubles = {n: self._double(t) for n, t in tensors}
            called = partial(torch.func.functional_call, module, doubles)
            return partial(_within, self.mode, lambda *args, **kwargs: called(args, kwargs))
        scales = all(t is None or t.ndim < 2 for t in module._parameters.values())
        forward = self._twin(module).forward
        return forward if scales else partial(_within, self.mode, forward)

    def _twin(self, module: nn.Module) -> nn.Module:
        twin: nn.Module = object.__new__(type(module))
        vars(twin).update(vars(module))
        as_stored = self.doubles.as_stored and type(module).forward in CONVERTED
        for store in ("_parameters", "_buffers"):
            found: dict[str, Tensor | None] = vars(module)[store]
            vars(twin)[store] = {
                n: t if t is None or (as_stored and t.ndim > 1) else self._double(t) for n, t in found.items()
            }
        return twin

    def _double(self, tensor: Tensor) -> Tensor:
        return self.doubles.of(tensor) if tensor.is_floating_point() else tensor


def _within(mode: InDouble, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with mode:
        return function(*args, **kwargs)
