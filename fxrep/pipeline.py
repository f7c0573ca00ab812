"""The whole line for one traced graph: read → plan → fold → certify → rewrite → report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxrep.census import census, planned
from fxrep.certify import Region, certify
from fxrep.cost import Aim
from fxrep.double import Contracting
from fxrep.drawing import MOST_PICTURES, parameter_names, pictures, scene
from fxrep.errors import UNTOLD, FxrepError, Illegal, Refusal
from fxrep.evaluation import Doubles
from fxrep.fold import Folded, Into, anew, fold, like_of, nowhere
from fxrep.mutation import Writes, drop_identities, functionalize
from fxrep.naming import label_of, layer_names
from fxrep.ownership import Ledger, memory_of
from fxrep.page import Picture
from fxrep.plan import Decision, Legal, Problem
from fxrep.readers import NOTHING, Readings, Told, is_bypass, read_graph
from fxrep.report import Collapse, Report
from fxrep.rewrite import Rewriter, settles
from fxrep.search import make_plan
from fxrep.sharing import Keys, growing
from fxrep.trace import Traced
from fxrep.trees import named_modules


class Pipeline:
    """A traced model, read and planned; `rewrite` carries the plan out."""

    def __init__(
        self, name: str, traced: Traced, examples: Mapping[str, Any], aim: Aim, strict: bool = False,
        told: Told = NOTHING, legal: Legal = lambda _: None, trains: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.traced, self.graph, self.modules = name, traced, traced.graph, dict(traced.modules)
        self.before = census(self.graph, self.modules)
        drop_identities(self.graph, self.modules)
        writes = functionalize(self.graph, self.modules, trains=trains)
        shapes = {**_example_shapes(self.graph, examples), **told.examples}
        self.readings = read_graph(self.graph, self.modules, {name: len(shape) for name, shape in shapes.items()}, told)
        self.nodes: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        _check_examples(self.graph, self.readings, shapes)
        self.like = like_of(traced.modules.items())
        self.problem = _problem(self.graph, self.modules, self.readings, writes, shapes)
        self.make_plan = partial(make_plan, aim=aim, strict=strict, legal=legal)
        self.counts_copies = aim.objective == "params"  # of weights that several calls share
        self.refused: list[Refusal] = []
        self.keys = Keys()
        self._plan()

    def explain(self) -> Report:
        """The report of the plan, with nothing folded and so nothing certified."""
        return self._report(planned(self.graph, self.modules, self.plan, self.readings.facts.scalars), self.names())

    def names(self) -> dict[int, str]:
        """By emit, what its layer is called."""
        return layer_names(self.plan, self.nodes, self.traced.modules, self.keys)

    def _plan(self) -> None:
        """Plans, and plans anew while the network would hold more numbers than before, with what grows kept lean; or,
        where that was of no use and parameters are what counts, as it is."""
        self.plan = self.make_plan(self.problem)
        while grown := list(self._growing()):
            before, lean = self.problem.lean, self.problem.lean.union(n for d, _ in grown for n in d.replaced)
            if self.counts_copies:
                self._fix(Refusal(d.at, "costs-more", fact) for d, fact in grown if d.at in before)
            elif lean == before:
                return
            self.problem = replace(self.problem, lean=lean)
            self.plan = self.make_plan(self.problem)

    def _growing(self) -> Iterator[tuple[Decision, str]]:
        return growing(self.plan, self.readings.forms, self._kept() if self.counts_copies else None, self.keys)

    def _kept(self) -> set[int]:
        """The memory of parameters that are read by what has no form, and stays."""
        known = {*self.readings.forms, *self.readings.facts.constants, *self.readings.bypassed}
        return {memory_of(t) for t in self.ledger().tensors(n for n in self.nodes if n not in known)}

    def decline(self, refusals: Iterable[Refusal]) -> None:
        """Plans anew, with the nodes of the refusals as they are."""
        self._fix(refusals)
        self._plan()

    def _fix(self, refusals: Iterable[Refusal]) -> None:
        told = {r.node: r for r in refusals}
        self.refused += told.values()
        assert told.keys().isdisjoint(self.problem.fixed), "what is fixed is never refused again"
        fixed = {**self.problem.fixed, **{node: (r.code, r.reason) for node, r in told.items()}}
        self.problem = replace(self.problem, fixed=fixed)

    def rewrite(self, inplace: bool = False, writer: type[Rewriter] = Rewriter) -> tuple[GraphModule, Report]:
        """Folds and certifies every decision, one region at a time, and writes the first plan of which all pass."""
        numbers = self._certified(keep=not inplace)
        ledger = self.ledger() if inplace else None
        folded: dict[int, Folded] = {}
        shown: dict[int, Picture] = {}
        parameters = parameter_names(list(self.traced.modules.items()))
        for decision in self.plan.decisions.values():
            shown |= pictures(decision, parameters) if len(shown) < MOST_PICTURES else {}
            own = numbers.get(decision.node, [])
            if ledger:
                region = self.region(decision, {}, Doubles(), ledger.memory_for(decision))
                own = ledger.settle(decision, region.numbers)
            folded |= {id(f.emit): f for f in own}
        rewriter = writer(self.graph, self.plan, self.readings, self.modules, folded, self.names())
        collapsed = rewriter.write(self.name)
        sizes = {*self.readings.facts.scalars, *rewriter.numbers}
        after = census(collapsed.graph, dict(named_modules(collapsed)), sizes)
        return collapsed, self._report(after, rewriter.names, shown)

    def _certified(self, keep: bool) -> dict[str, list[Folded]]:
        """The numbers of every decision, if they are to be kept. Plans anew until no decision is refused."""
        while True:
            numbers: dict[str, list[Folded]] = {}
            terms: dict[str, Region] = {}
            refused: list[Refusal] = []
            for decision in self.plan.decisions.values():
                if any(s not in self.nodes and s not in terms for s in decision.recipe.form.sources):
                    continue  # a term of it is refused already
                found = self._certified_region(decision, terms, anew if keep else nowhere)
                if isinstance(found, Refusal):
                    refused.append(found)
                    continue
                if decision.node not in self.nodes:
                    terms[decision.node] = found
                if keep:
                    numbers[decision.node] = found.numbers
            if not refused:
                return numbers
            self.decline(refused)

    def ledger(self) -> Ledger:
        return Ledger(self.traced.root, self.nodes, self.modules, self.plan, self.readings.facts.constants)

    def region(self, decision: Decision, terms: Mapping[str, Region], doubles: Doubles, into: Into = anew) -> Region:
        """The decision folded, on leaves of those values. Raises Illegal where that cannot be."""
        return Region(decision, {id(e): fold(e, doubles, self.like, into) for e in decision.recipe.emits}, terms)

    def certify(self, region: Region, doubles: Doubles) -> Refusal | None:
        return certify(region, self.nodes, self.readings, doubles)

    def _certified_region(self, decision: Decision, terms: Mapping[str, Region], into: Into) -> Region | Refusal:
        """The decision's numbers in float64, certified."""
        doubles = Contracting()
        try:
            region = self.region(decision, terms, doubles, into)
        except Illegal as illegal:
            return Refusal(decision.at, illegal.code, illegal.reason, illegal.hint)
        return self.certify(region, doubles) or region

    def _report(
        self, after: dict[str, int], names: Mapping[int, str], shown: Mapping[int, Picture] | None = None
    ) -> Report:
        """The plan in the user's names."""
        plan = self.plan
        collapses = tuple(
            Collapse(
                next((names[id(e)] for e in d.recipe.emits if e.stores), self._label(d.at)),
                tuple(self._label(i) for i in d.replaced),
                d.recipe.describe(),
                d.seconds_before - d.seconds_after,
            )
            for d in plan.decisions.values()
        )
        read = [r for r in self.readings.refusals.values() if self._is_declined(r)]
        told = tuple(self._told(r) for r in (*read, *plan.refusals, *self.refused))
        drawn = scene(self.graph, self.modules, self.readings, plan)
        return Report(
            self.name, collapses, told, self.before, after, plan.seconds_before, plan.seconds_after,
            not self.problem.sizes, drawn,
            tuple(replace(picture, layer=names[emit]) for emit, picture in (shown or {}).items()),
        )  # fmt: skip

    def _is_declined(self, refusal: Refusal) -> bool:
        """Whether a merge was in sight: an op that is affine in other circumstances, on an affine value.

        Where the rank is not known, a view between the two cannot be read either, and is looked through.
        """
        near = _neighbours(self.nodes[refusal.node])
        if refusal.code == "rank-unknown":
            near += [n for view in near for n in _neighbours(view)]
        return refusal.code not in UNTOLD and any(n.name in self.readings.forms for n in near)

    def _label(self, name: str) -> str:
        decision = self.plan.decisions.get(name)
        name = decision.at if decision else name
        return label_of(self.nodes[name]) if name in self.nodes else name

    def _told(self, refusal: Refusal) -> Refusal:
        """The refusal in the user's names."""
        reason = re.sub(r"\w+", lambda m: self._label(m[0]) if m[0] in self.nodes else m[0], refusal.reason)
        return Refusal(self._label(refusal.node), refusal.code, reason, refusal.hint)


def _neighbours(node: Node) -> list[Node]:
    return [*node.all_input_nodes, *node.users]


def _example_shapes(graph: Graph, examples: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the example inputs, by the names of their placeholders."""
    inputs = {n.name: examples.get(str(n.target)) for n in graph.nodes if n.op == "placeholder"}
    return {name: tuple(t.shape) for name, t in inputs.items() if isinstance(t, Tensor)}


def _check_examples(graph: Graph, readings: Readings, examples: Mapping[str, tuple[int, ...]]) -> None:
    """Raises FxrepError where an op of the network refuses an example input."""
    shapes = readings.facts.shapes
    called = {n.name: n.target for n in graph.nodes if n.op == "placeholder"}  # as the forward calls them
    for name, given in examples.items():
        if name in shapes.conflicts:
            wanted = shapes.conflicts[name]
            raise FxrepError(f"example_inputs: {called[name]} has {len(given)} axes; the network takes {wanted}")
        for axis, size in shapes.sizes.items():
            if axis.root == name and -axis.place <= len(given) and given[axis.place] != size:
                fact = f"{given[axis.place]} at axis {axis.place} of its shape {given}"
                raise FxrepError(f"example_inputs: {called[name]} has {fact}; the network takes {size}")


def _problem(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    readings: Readings,
    writes: Writes,
    examples: dict[str, tuple[int, ...]],
) -> Problem:
    """Who reads what: forms read their sources, everything else its operands; sizes are no readers."""
    readers: dict[str, set[str]] = {n.name: set() for n in graph.nodes}
    for name, form in readings.forms.items():
        for source in form.sources:
            readers[source].add(name)
    for node in graph.nodes:
        if node.name in readings.facts.scalars or is_bypass(node, readings):
            continue
        for operand in node.all_input_nodes:  # the one that reshape_as asks for its size among them
            if not (node.name in readings.forms and is_bypass(operand, readings)):
                readers[operand.name].add(node.name)
    for operand, found in _on_the_way(graph, readings):
        readers[operand] |= found
    for name in reversed(list(readings.forms)):  # a view that every reader looks through reads nothing itself
        if not readers[name]:
            for source in readings.forms[name].sources:
                readers[source].discard(name)
    return Problem(
        forms=readings.forms,
        shapes=readings.facts.shapes,
        readers={name: frozenset(found) for name, found in readers.items()},
        fixed=_fixed(graph, readings, writes),
        writes=writes.places,
        places={node.name: i for i, node in enumerate(graph.nodes)},
        sizes=examples,
        dense=frozenset(n.name for n in graph.nodes if not all(_takes_views(u, modules) for u in n.users)),
    )


def _on_the_way(graph: Graph, readings: Readings) -> Iterator[tuple[str, set[str]]]:
    """Values before what is looked through, and the forms that look past them: as the model has it, they need them."""
    through: dict[str, set[str]] = {}
    for node in reversed(graph.nodes):
        if not is_bypass(node, readings) or node.name in readings.facts.scalars:
            continue
        found = (through.get(u.name, {u.name}) for u in node.users)
        looking = through[node.name] = {name for names in found for name in names if name in readings.forms}
        for operand in node.all_input_nodes:
            if operand.name in readings.forms:
                yield operand.name, {n for n in looking if operand.name not in readings.forms[n].sources}


#: Ops that read channels of a larger value as fast as a value of their own, and give a new one: names of classes,
#: functions and methods.
ELEMENTWISE = frozenset((
    "ReLU", "ReLU6", "SiLU", "GELU", "Sigmoid", "Hardswish", "Hardsigmoid", "LeakyReLU", "ELU", "Mish", "Tanh",
    "relu", "relu6", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "tanh",
    "add", "sub", "mul", "truediv", "cat", "mean", "softmax",
))  # fmt: skip


def _takes_views(reader: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a reader can do with channels that lie apart in memory."""
    target = type(modules[str(reader.target)]) if reader.op == "call_module" else reader.target
    return str(getattr(target, "__name__", target)) in ELEMENTWISE


def _fixed(graph: Graph, readings: Readings, writes: Writes) -> dict[str, tuple[str, str]]:
    """The values that must be computed where they stand, with the code and the reason."""
    fixed = dict.fromkeys(writes.pinned, ("mutation", "its memory is written in place"))
    for node in graph.nodes:
        sizes_read = [u for u in node.users if u.name in readings.facts.scalars and u.users]
        unsettled = [u for u in sizes_read if not (settles(u, readings) or _only_for_views(u, node, readings))]
        if unsettled and node.name in readings.forms:
            fixed[node.name] = ("metadata", f"{unsettled[0].name} reads its {_what(unsettled[0])}")
    return fixed


def _only_for_views(size: Node, value: Node, readings: Readings) -> bool:
    """Whether the size is only read by what reads the value too, and is computed without it where it is folded."""
    forms = (readings.forms.get(u.name) for u in size.users)
    return all(form is not None and value.name in form.sources for form in forms)


def _what(node: Node) -> str:
    return str(node.args[1]) if len(node.args) > 1 else str(node.target)
