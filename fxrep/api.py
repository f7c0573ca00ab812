"""The public door: trace → read → plan → fold → certify → rewrite → report."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxrep.census import census
from fxrep.certify import certify
from fxrep.cost import Profile, profile_for
from fxrep.errors import FxrepError, Illegal, Refusal
from fxrep.fold import Folded, fold
from fxrep.mutation import drop_identities, functionalize
from fxrep.ownership import Ledger, carry_attributes, own_tensors
from fxrep.plan import Decision, Plan, Problem, make_plan
from fxrep.readers import Readings, read_graph
from fxrep.report import Collapse, Report
from fxrep.rewrite import Rewriter, is_bypass, scope_of, settles
from fxrep.trace import Traced, structural_copy, trace

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None


def reparameterize(
    model: nn.Module, example_inputs: Examples = None, *, inplace: bool = False, profile: Profile | None = None
) -> nn.Module:
    """The network with every affine region that pays replaced by the one convolution that it equals.

    Args:
        model: any module, in training or eval mode; it is not touched (but see `inplace`).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. They sharpen costs, and tell
            the number of axes of each input where the network itself does not; nothing is specialised to their sizes.
        inplace: reuse the model's tensors instead of copying those that are kept. The model must not be used afterwards.
        profile: the device to choose for (default: the shipped profile of the device that holds the parameters).

    Returns:
        A `torch.fx.GraphModule` in eval mode, equal to `model.eval()`, with a `Report` at `.report`. Where the
        outermost forward cannot be traced: a copy of the model, with a report that says so.

    Raises:
        FxrepError: `model` is no module, or `example_inputs` do not fit its forward.
    """
    _check_model(model)
    root = structural_copy(model)
    examples = _bind(model, example_inputs)
    outcome = trace(root, examples)
    if isinstance(outcome, Refusal):
        report = Report(type(model).__name__, (), (outcome,), {}, {}, 0.0, 0.0)
        return _finished(root, root, model, report, inplace)
    prepared = _Prepared(outcome, examples, profile or _profile(model))
    collapsed, report = prepared.rewrite(type(model).__name__, inplace)
    return _finished(collapsed, root, model, report, inplace)


def explain(model: nn.Module, example_inputs: Examples = None, *, profile: Profile | None = None) -> Report:
    """The report that `reparameterize` would give, without rewriting: nothing is folded, so nothing is certified."""
    _check_model(model)
    examples = _bind(model, example_inputs)
    outcome = trace(structural_copy(model), examples)
    if isinstance(outcome, Refusal):
        return Report(type(model).__name__, (), (outcome,), {}, {}, 0.0, 0.0)
    return _Prepared(outcome, examples, profile or _profile(model)).report(type(model).__name__)


class _Prepared:
    """A traced model with its readings and its plan."""

    def __init__(self, traced: Traced, examples: Mapping[str, Any], profile: Profile) -> None:
        self.traced = traced
        self.graph = traced.graph
        self.modules = traced.modules
        self.before = census(self.graph, self.modules)
        drop_identities(self.graph, self.modules)
        pinned = functionalize(self.graph, self.modules)
        inputs = {n: examples[str(n.target)] for n in self.graph.nodes if n.op == "placeholder" and str(n.target) in examples}
        tensors = {n.name: t for n, t in inputs.items() if isinstance(t, Tensor)}
        self.readings = read_graph(self.graph, self.modules, {name: t.ndim for name, t in tensors.items()})
        sizes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.nodes: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        self.problem = _problem(self.graph, self.readings, pinned, sizes)
        self.plan = make_plan(self.problem, profile)

    def report(self, name: str, plan: Plan | None = None, refusals: tuple[Refusal, ...] = (), after: dict[str, int] | None = None,
               layers: Mapping[str, tuple[str, ...]] | None = None) -> Report:  # fmt: skip
        plan = plan or self.plan
        named = {replaced[-1]: layer for layer, replaced in (layers or {}).items()}
        collapses = tuple(
            Collapse(named.get(d.node, d.node), tuple(self._label(i) for i in (*d.inlined, d.node)), d.recipe.describe(),
                     d.seconds_before - d.seconds_after)
            for d in plan.decisions.values()
        )  # fmt: skip
        read = [r for r in self.readings.refusals.values() if self._is_declined(r)]
        labelled = (self._told(r) for r in (*read, *plan.refusals, *refusals))
        return Report(
            name, collapses, (*self.traced.kept, *labelled), self.before, after or {}, plan.seconds_before, plan.seconds_after
        )

    def rewrite(self, name: str, inplace: bool = False) -> tuple[GraphModule, Report]:
        """Folds and certifies every decision, one region at a time, and writes what passed."""
        ledger = Ledger(self.traced.root, self.nodes, self.modules, self.plan) if inplace else None
        plan, folded, refused = self.plan, {}, []
        for decision in self.plan.decisions.values():
            numbers = self._fold(decision)
            if isinstance(numbers, Refusal):
                refused.append(numbers)
                plan = plan.without(decision.node)
                if ledger:
                    ledger.keep(decision)
                continue
            cast = [f.cast() for f in numbers]
            folded |= {id(f.emit): f for f in (ledger.settle(decision, cast) if ledger else cast)}
        rewriter = Rewriter(self.graph, plan, self.readings, self.modules, folded)
        collapsed = rewriter.write(name).eval()
        after = census(collapsed.graph, dict(collapsed.named_modules()), self.readings.facts.scalars)
        return collapsed, self.report(name, plan, tuple(refused), after, rewriter.layers)

    def _fold(self, decision: Decision) -> list[Folded] | Refusal:
        """The decision's numbers in float64, certified."""
        try:
            numbers = [fold(e) for e in decision.recipe.emits]
        except Illegal as illegal:
            return Refusal(decision.node, illegal.code, illegal.reason, illegal.hint)
        refusal = certify(decision, {id(f.emit): f for f in numbers}, self.nodes, self.readings)
        return refusal or numbers

    def _is_declined(self, refusal: Refusal) -> bool:
        """Whether a merge was in sight: an op that is affine in other circumstances, on an affine value."""
        operands = self.nodes[refusal.node].all_input_nodes
        return refusal.code != "not-affine" and any(o.name in self.readings.forms for o in operands)

    def _label(self, name: str) -> str:
        """The qualified name of a layer, else of the module whose forward made the node, and the node's name."""
        node = self.nodes.get(name)
        if node is None or node.op == "call_module":
            return name if node is None else str(node.target)
        scope = scope_of(node)
        return f"{scope}:{name}" if scope else name

    def _told(self, refusal: Refusal) -> Refusal:
        """The refusal in the user's names."""
        reason = re.sub(r"\w+", lambda m: self._label(m[0]) if m[0] in self.nodes else m[0], refusal.reason)
        return Refusal(self._label(refusal.node), refusal.code, reason, refusal.hint)


def _problem(graph: Graph, readings: Readings, pinned: set[str], examples: dict[str, tuple[int, ...]]) -> Problem:
    """Who reads what: forms read their sources, everything else its operands; sizes are no readers."""
    readers: dict[str, set[str]] = {n.name: set() for n in graph.nodes}
    for name, form in readings.forms.items():
        for source in form.sources:
            readers[source].add(name)
    for node in graph.nodes:
        if node.name in readings.forms or node.name in readings.facts.scalars or is_bypass(node, readings):
            continue
        for operand in node.all_input_nodes:
            readers[operand.name].add(node.name)
    fixed = {name: ("mutation", "its memory is written in place") for name in pinned}
    for node in graph.nodes:
        sizes_read = [u for u in node.users if u.name in readings.facts.scalars and u.users]
        unsettled = [u for u in sizes_read if not settles(u, readings)]
        if unsettled and node.name in readings.forms:
            fixed[node.name] = ("metadata", f"{unsettled[0].name} reads its {_what(unsettled[0])}")
    return Problem(
        readings.forms, readings.facts.shapes, {k: frozenset(v) for k, v in readers.items()}, fixed, frozenset(pinned), examples
    )


def _what(node: Node) -> str:
    return str(node.args[1]) if len(node.args) > 1 else str(node.target)


def _check_model(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, Mapping):
        raise FxrepError("got a state dict, not a model; build the model, call load_state_dict on it, and pass the model")
    raise FxrepError(f"got {type(model).__name__}, not a torch.nn.Module; pass the model itself")


def _bind(model: nn.Module, example_inputs: Examples) -> dict[str, Any]:
    """The example inputs by the names of the forward's parameters."""
    if example_inputs is None:
        return {}
    signature = inspect.signature(model.forward)
    try:
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(**example_inputs)
        else:
            bound = signature.bind(*((example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs))
    except TypeError as error:
        raise FxrepError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from None
    return dict(bound.arguments)


def _profile(model: nn.Module) -> Profile:
    return profile_for(next((p.device.type for p in model.parameters()), "cpu"))


def _finished(result: nn.Module, root: nn.Module, model: nn.Module, report: Report, inplace: bool) -> nn.Module:
    """Gives the result tensors of its own, the model's attributes, its hooks and the report."""
    if not inplace:
        own_tensors(result, model)
    if isinstance(result, GraphModule):
        carry_attributes(root, result)
        result.meta["_user_preserved_attributes"]["report"] = report
    result.report = report  # type: ignore[assignment]
    return result.eval()
