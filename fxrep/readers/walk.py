"""Reads a whole graph: shapes, constants, sizes, and the affine form of every node that has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.equal import Equal, noting
from fxrep.errors import Illegal, Refusal
from fxrep.evaluation import evaluate
from fxrep.form import AffineForm
from fxrep.kernel import Kernel
from fxrep.readers.registry import Call, Facts, SizesOf, base_name, find, find_shape_rule
from fxrep.readers.sizes import note_number
from fxrep.readers.views import LIKE_ANOTHER
from fxrep.shapes import Axis, Dim, Shape, Shapes, Size, multiplied, shifted

LATER_KNOWN = ("shape-unknown", "rank-unknown", "broadcast")  # refusals that a later op's facts may lift
#: Methods that end in an underscore and yet write no numbers.
HARMLESS = ("requires_grad_", "detach_", "share_memory_", "rename_")
ASSIGNING = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
RANDOM = ("rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial", "poisson", "exponential",
          "uniform", "cauchy", "geometric", "log_normal", "random", "rrelu", "gumbel_softmax")  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What a graph's metadata says, by node name: shapes of tensors, sizes that are numbers of the graph, and the sizes
    that its inputs had when it was captured."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    numbers: Mapping[str, Dim] = field(default_factory=dict)
    examples: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


NOTHING = Told()


@dataclass(frozen=True)
class Readings:
    """What was read of a graph, by node name. A node has a form, or a refusal, or neither: it is no affine op."""

    forms: Mapping[str, AffineForm]
    refusals: Mapping[str, Refusal]
    facts: Facts
    bypassed: frozenset[str]
    #: what was found equal by its numbers
    equal: tuple[Equal, ...] = ()
    #: the sizes of free axes at which regions were drawn, by what was run for them: the blocks of a network are alike
    drawn: dict[Any, Sequence[dict[Axis, int]]] = field(default_factory=dict)

    def is_value(self, node: Node) -> bool:
        return node.name not in self.facts.constants and node.name not in self.facts.scalars


def read_graph(
    graph: Graph,
    modules: dict[str, nn.Module],
    ranks: Mapping[str, int] | None = None,
    told: Told = NOTHING,
) -> Readings:
    """Reads every node, operands first. `ranks` gives the number of axes of placeholders, where it is known, and `told`
    what the graph itself says of shapes and sizes.

    What a later op tells of an earlier value (its channels, its axes) may let an earlier op be read: then once more,
    until no more is told.
    """
    known, assumed = Shapes(ranks=dict(ranks or {})), dict[str, int]()
    while True:
        before = known.ranks.copy(), known.sizes.copy(), known.equal.copy()
        readings = _read_once(graph, modules, known, told)
        facts = readings.facts
        _learn_from_parts(facts)
        taken = {root: rank for root, rank in facts.assumed.items() if root not in known.ranks}
        facts.assumed = assumed = assumed | taken
        sizes_read = any(isinstance(value, (Size, SizesOf, tuple)) for value in facts.scalars.values())
        is_open = taken or sizes_read or any(r.code in LATER_KNOWN for r in readings.refusals.values())
        if not is_open or before == (known.ranks | taken, known.sizes, known.equal):
            return readings
        known = Shapes(ranks=known.ranks | taken, sizes=known.sizes.copy(), equal=known.equal.copy())


def _learn_from_parts(facts: Facts) -> None:
    """A value has as many axes as its parts have: the layer that reads one tells."""
    shapes = facts.shapes
    for part, whole in reversed(facts.parts.items()):
        rank, least = shapes.ranks.get(part), shapes.least_rank(Shape(part))
        if rank is not None:
            shapes.ranks.setdefault(whole, rank)
        elif least > 1 and whole not in shapes.ranks:  # a layer has told its channels: there is a batch before them
            facts.assumed.setdefault(whole, facts.assumed.get(part, least + 1))


def _read_once(graph: Graph, modules: dict[str, nn.Module], known: Shapes, told: Told) -> Readings:
    facts = Facts(modules, known)
    found: dict[str, AffineForm] = {}
    refusals: dict[str, Refusal] = {}
    with noting() as equal:
        for node in graph.nodes:
            if node.name in told.numbers:
                facts.scalars[node.name] = told.numbers[node.name]
                continue
            if note_number(node, facts) or _note_constant(node, facts) or node.op == "output":
                continue
            form = _read_node(node, facts, told.shapes.get(node.name))
            if isinstance(form, AffineForm):
                found[node.name] = form
            elif isinstance(form, Refusal):
                refusals[node.name] = form
    bypassed = _bypassed(graph, found)
    forms = {name: form for name, form in found.items() if name not in bypassed}
    return Readings(forms, refusals, facts, bypassed, tuple(equal))


def _read_node(node: Node, facts: Facts, told: Shape | None) -> AffineForm | Refusal | None:
    call = Call(node, facts)
    by_rule = _shape_by_rule(call)  # which notes what a view does, whatever is told of its shape
    call.out_shape = told or by_rule
    facts.shapes.of[node.name] = call.out_shape or Shape(node.name)
    if node.op in ("placeholder", "get_attr"):
        return None
    read, arguments = find(call)
    if read is None:
        return None
    call.assumes = True
    if node.op == "call_module" and is_hooked(facts.modules[str(node.target)]):
        return Refusal(node.name, "hooked", "a forward hook looks at it")
    result = _attempt(read, arguments, node)
    if isinstance(result, AffineForm):
        facts.shapes.of[node.name] = call.out_shape or _shape_of_form(result, facts)
    return result


def _attempt(read: Callable[..., Any], arguments: tuple[Any, ...], node: Node) -> AffineForm | Refusal:
    try:
        return read(*arguments)
    except Illegal as illegal:
        return Refusal(node.name, illegal.code, illegal.reason, illegal.hint)
    except Exception as error:  # a reader may be the user's own; one that fails takes nothing else down
        fact = f"{read.__name__} raised {type(error).__name__}: {error}"
        return Refusal(node.name, "reader-failed", fact)


def _shape_by_rule(call: Call) -> Shape | None:
    rule, arguments = find_shape_rule(call)
    if rule is None:
        return None
    try:
        return rule(*arguments)
    except Illegal:
        return None


def _shape_of_form(form: AffineForm, facts: Facts) -> Shape:
    """From any operator's geometry and its anchor's shape; a sum of plain values has the shape of each."""
    terms = list(form.terms)
    anchor, term = next(((a, t) for a, t in terms if isinstance(t, AffineConv)), terms[0])
    shape = facts.shapes.full(facts.shapes.of[anchor.source])
    if not isinstance(term, AffineConv):
        return shape
    dims = term.dims
    spatial = []
    for i in range(dims):
        size = facts.shapes.dim(shape, i - dims)
        if size is None:
            return Shape(None)
        spatial.append(_convolved(size, term, i))
    before = [facts.shapes.dim(shape, -i) for i in range(len(shape.tail), dims + 1, -1)]
    return Shape(shape.root, (*(b for b in before if b is not None), form.channels or term.out_channels, *spatial))


def _convolved(size: Any, term: AffineConv, i: int) -> Any:
    stride = term.stride[i]
    if not term.transposed:
        return shifted(size, term.net_pad[i] - 1 + stride, stride)
    scaled = multiplied(shifted(size, -1), stride)
    return shifted(scaled, term.span[i] + 1 - term.pad_lo[i] - term.pad_hi[i])


def is_bypass(node: Node, readings: Readings) -> bool:
    """Whether every value made with this op has a form that looks through it: the chunk under its pieces."""
    return node.name in readings.bypassed


def _bypassed(graph: Graph, found: Mapping[str, AffineForm]) -> frozenset[str]:
    """The ops that no form reads, all of whose users are forms or such ops; `seen` is what is read through each.

    Their own form, if they have one, is of no use: whoever reads them looks through.
    """
    seen: dict[str, frozenset[str]] = {}
    for node in reversed(graph.nodes):
        is_op = node.op in ("call_function", "call_method") or (node.op == "call_module" and node.name in found)
        if not is_op or not node.users:
            continue
        read = [seen.get(u.name) or (frozenset(found[u.name].sources) if u.name in found else None) for u in node.users]
        if any(base_name(u.target) in LIKE_ANOTHER and u.args[0] is not node for u in node.users):
            continue  # its size is asked for
        through = frozenset().union(*(r for r in read if r is not None))
        if None not in read and node.name not in through:
            seen[node.name] = through
    return frozenset(seen)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at, or may change, what goes in or comes out."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _note_constant(node: Node, facts: Facts) -> bool:
    """Notes parameters, and what is computed from parameters alone, as kernels."""
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        owner = facts.modules.get(path)
        tensor = getattr(owner, name, None) if owner is not None else attribute_of(facts.modules[""], str(node.target))
        if isinstance(tensor, Tensor) and K.is_plain(tensor):
            facts.constants[node.name] = K.Leaf.of(tensor)
            return True
        return False
    operands = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or any(o.name not in facts.constants for o in operands):
        return False
    if not operands and not isinstance(node.target, OpOverload):  # aten makes zeros and ones within the graph
        return False
    if is_random(node) or writes(node.target, node.kwargs):
        return False
    kernel = _computed(node, operands, facts)
    if kernel is not None:
        facts.constants[node.name] = kernel
    return kernel is not None


def writes(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function or method writes into its first operand, as far as its name tells."""
    return _writes_by_name(base_name(target)) or kwargs.get("inplace") is True


@lru_cache(maxsize=1024)
def _writes_by_name(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    return in_place or name.strip("_") in ASSIGNING


def is_random(node: Node) -> bool:
    name = base_name(node.target).removesuffix("_").removesuffix("_like")
    return name in RANDOM or "dropout" in name


def _computed(node: Node, operands: list[Node], facts: Facts) -> Kernel | None:
    """The node as a `Map` over the kernels of its operands; its shape is found by running it once."""
    indices = {o: k.tensor for o in operands if isinstance(k := facts.constants[o.name], K.Leaf) and not _is_float(k)}
    weights = [o for o in operands if o not in indices]
    kernels = tuple(facts.constants[o.name] for o in weights)

    def run(*values: Tensor) -> Any:
        number = {**indices, **dict(zip(weights, values, strict=True))}
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: number[n])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with torch.no_grad():
            sample = run(*(_as_stored(k) for k in kernels))
    except Exception:
        return None
    if isinstance(sample, (tuple, list)) and all(isinstance(t, Tensor) for t in sample):
        return K.Several((), run, kernels)
    if not isinstance(sample, Tensor):
        return None
    if not sample.is_floating_point():
        return K.Leaf.of(sample)
    return K.Map(tuple(sample.shape), run, kernels)


def _is_float(leaf: K.Leaf) -> bool:
    return leaf.tensor.is_floating_point() or leaf.tensor.is_complex()


def _as_stored(kernel: Kernel) -> Any:
    """In the dtype of the parameters that it is computed from, as the forward would have it; of several, a tuple."""
    if isinstance(kernel, K.Leaf):
        return kernel.tensor
    value: Any = evaluate(kernel)
    first = next(K.leaves(kernel), None)
    if first is None:
        return value
    return tuple(v.to(first.tensor.dtype) for v in value) if isinstance(value, tuple) else value.to(first.tensor.dtype)


def attribute_of(root: nn.Module, target: str) -> Any:
    """What a dotted path names, None where there is nothing."""
    owner: Any = root
    for part in target.split("."):
        owner = getattr(owner, part, None)
    return owner
