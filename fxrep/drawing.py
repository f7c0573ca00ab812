"""From a graph and its plan to what a page draws: boxes, edges, kernels that add up. Knows fx; draws nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.census import kinds
from fxrep.evaluation import Doubles, evaluate
from fxrep.lower import Emit
from fxrep.mutation import TWIN_SUFFIX
from fxrep.naming import label_of
from fxrep.page import Box, Edge, Picture, Scene, Summand
from fxrep.page.scene import Grid
from fxrep.plan import Decision, Plan
from fxrep.readers import Readings
from fxrep.readers.sizes import ASSERTS
from fxrep.trees import buffers, parameters

MOST_PICTURES = 6
MOST_SUMMANDS = 6
LARGEST_KERNEL = 1 << 21  # entries: a picture of one filter is not worth more
ENDS = {"placeholder": "input", "output": "output"}
LINEAR = (K.ScaleRows, K.ScaleColumns, K.Place, K.Regroup, K.TakeRows, K.TakeColumns, K.PlaceColumns)


def scene(graph: Graph, modules: Mapping[str, nn.Module], readings: Readings, plan: Plan) -> Scene:
    """The values of the graph before and after the plan; sizes and weights are none."""
    facts = readings.facts
    shown = [n for n in graph.nodes if _is_shown(n) and n.name not in facts.scalars and n.name not in facts.constants]
    number = {n: i for i, n in enumerate(shown)}
    group = _groups(plan)
    before = [(number[o], number[n]) for n in shown for o in n.all_input_nodes if o in number]
    places = {n.name: len(shown) + group[n.name] if n.name in group else i for n, i in number.items()}
    after: dict[Edge, None] = {}
    for node in shown:
        if node.name in plan.removed:
            continue
        decision = plan.decisions.get(node.name)
        sources = plan.sources(node.name) if decision else [o.name for o in node.all_input_nodes if o in number]
        after |= dict.fromkeys((places[s], places[node.name]) for s in sources if s in places)
    alive = _alive(after, [places[n.name] for n in shown if n.op == "output"])
    boxes = tuple(
        Box(
            label_of(n).removesuffix(TWIN_SUFFIX), _does(n, modules, readings), _kind(n, modules), group.get(n.name),
            n.name not in group and places[n.name] in alive,
        )
        for n in shown
    )  # fmt: skip
    return Scene(boxes, tuple(dict.fromkeys(before)), tuple(e for e in after if alive >= {*e}))


def _is_shown(node: Node) -> bool:
    return node.op != "get_attr" and node.target not in ASSERTS


def _groups(plan: Plan) -> dict[str, int]:
    """By name of a value that is no longer computed, or not as before: the number of the decision it falls into."""
    group: dict[str, int] = {}
    for number, decision in enumerate(plan.decisions.values()):
        for name in (decision.node, *(i for i in decision.inlined if i in plan.removed)):
            group.setdefault(name, number)
    return group


def _alive(edges: Iterable[Edge], ends: Iterable[int]) -> set[int]:
    """What leads to the network's result."""
    sources: dict[int, list[int]] = {}
    for source, target in edges:
        sources.setdefault(target, []).append(source)
    found: set[int] = set()
    todo = list(ends)
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            todo.extend(sources.get(number, ()))
    return found


def _does(node: Node, modules: Mapping[str, nn.Module], readings: Readings) -> str:
    if node.op in ENDS:
        return ENDS[node.op]
    if node.op == "call_module":
        name = type(modules[str(node.target)]).__name__
    else:
        name = str(getattr(node.target, "__name__", node.target))
    form = readings.forms.get(node.name)
    terms = [t for _, t in form.terms if isinstance(t, AffineConv) and not t.is_diagonal] if form is not None else []
    return f"{name} {_geometry(terms[0])}".strip() if len(terms) == 1 else name


def _geometry(operator: AffineConv) -> str:
    """Like `64→128 3×3 /2`."""
    taps = f" {'×'.join(map(str, operator.taps))}" if operator.dims else ""
    stride = f" /{max(operator.stride)}" if operator.dims and max(operator.stride) > 1 else ""
    return f"{operator.in_channels}→{operator.out_channels}{taps}{stride}"


def _kind(node: Node, modules: Mapping[str, nn.Module]) -> str:
    return ENDS.get(node.op) or next(iter(kinds(node, modules)), "other")


def pictures(decision: Decision, names: Mapping[int, str]) -> dict[int, Picture]:
    """By emit, the decision's sums of branches, each as the one filter in which every branch is seen best."""
    found = {id(e): _picture(e, names, Doubles()) for e in decision.recipe.emits}
    return {emit: picture for emit, picture in found.items() if picture is not None}


def parameter_names(modules: Sequence[tuple[str, nn.Module]]) -> dict[int, str]:
    found = (*buffers(modules).items(), *parameters(modules).items())
    return {id(p): name for name, p in reversed(found)}


def _picture(emit: Emit, names: Mapping[int, str], doubles: Doubles) -> Picture | None:
    operator = emit.operator
    if operator is None or operator.dims not in (1, 2) or operator.transposed:
        return None
    if prod(operator.weight.shape) > LARGEST_KERNEL or any(leaf.tensor.is_meta for leaf in K.leaves(operator.weight)):
        return None
    parts = summands(operator.weight)
    if not 2 <= len(parts) <= MOST_SUMMANDS:
        return None
    with torch.no_grad():
        numbers = [evaluate(p, doubles) for p in parts]
        filters = [n.flatten(2).abs().amax(2) for n in numbers]
        largest = torch.stack([f / f.max().clamp_min(1e-300) for f in filters])
        row, column = divmod(int(largest.amin(0).argmax()), operator.weight.shape[1])
        grids = [_grid(n[row, column]) for n in numbers]
        total = _grid(torch.stack([n[row, column] for n in numbers]).sum(0))
    shown = tuple(Summand(*_named(p, names), grid) for p, grid in zip(parts, grids, strict=True))
    column += row // (operator.out_channels // operator.groups) * operator.weight.shape[1]
    return Picture("", row, column, shown, total)


def _grid(taps: Tensor) -> Grid:
    return tuple(tuple(row) for row in taps.reshape(-1, taps.shape[-1]).tolist())


def summands(kernel: K.Kernel) -> list[K.Kernel]:
    """The kernel as a sum, with every linear map of one kernel distributed over it."""
    if isinstance(kernel, K.Sum):
        return [part for term in kernel.terms for part in summands(term)]
    if isinstance(kernel, LINEAR) and len(kernel.shape) > 1:
        first = next(name for name in ("weight", "source") if hasattr(kernel, name))
        change: Any = replace  # of a field whose name differs from class to class
        return [change(kernel, **{first: part}) for part in summands(getattr(kernel, first))]
    return [kernel]


def _named(kernel: K.Kernel, names: Mapping[int, str]) -> tuple[str, str]:
    """The parameter that a branch's kernel comes from, and its own size."""
    found = list(K.leaves(kernel))
    weights = [leaf for leaf in found if leaf.tensor.ndim > 1]
    if not weights:
        label = names.get(id(found[0].tensor), "") if found else ""
        return " of ".join(filter(None, ["identity", label.rpartition(".")[0]])), "1×1"
    label = " ∘ ".join(names.get(id(leaf.tensor), "computed") for leaf in reversed(weights))
    return label, " ∘ ".join("×".join(map(str, leaf.shape[2:])) or "1×1" for leaf in reversed(weights))
