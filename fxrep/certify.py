"""The certificate: before a fold is installed, it is compared in float64 with the sub-graph it replaces."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.double import CONVERTED, InDouble
from fxrep.errors import Refusal
from fxrep.evaluation import Doubles, evaluate
from fxrep.fold import Folded, run, sketch_of, value_of
from fxrep.lower import Emit, Recipe
from fxrep.parts import Anchor
from fxrep.plan import Decision
from fxrep.readers import Readings, is_bypass
from fxrep.shapes import Axis, Dim, Shape, Shapes, Size, free_axes
from fxrep.sketch import signs, sketched

TOLERANCE = 1e-8  # relative to the largest output, in float64: some 1e7 units of rounding
SEED, OF_CHANNELS = 0x5EED, 0xC4A


@dataclass(frozen=True)
class Region:
    """A fold and what it replaces. Terms that have no value of their own in the graph are part of what reads them."""

    decision: Decision
    folded: Mapping[int, Folded]
    terms: Mapping[str, Region]

    @property
    def numbers(self) -> list[Folded]:
        return list(self.folded.values())

    @property
    def inner(self) -> Iterator[Region]:
        """The terms that it reads."""
        return (self.terms[s] for s in self.decision.recipe.form.sources if s in self.terms)

    @property
    def replaced(self) -> set[str]:
        """The nodes of the graph that it and its terms stand for."""
        return set(self.decision.replaced).union(*(t.replaced for t in self.inner))

    @property
    def sources(self) -> set[str]:
        """The values of the graph that it is computed from."""
        own = set(self.decision.recipe.form.sources) - set(self.terms)
        return own.union(*(t.sources for t in self.inner))

    @property
    def emits(self) -> Iterator[Emit]:
        yield from self.decision.recipe.emits
        for term in self.inner:
            yield from term.emits

    def node_of(self, source: str) -> str:
        """The node of the graph that has the size of a source."""
        return self.terms[source].decision.at if source in self.terms else source

    def proof(self, value: Callable[[str], Tensor], doubles: Doubles) -> list[Tensor]:
        return run(self.decision.recipe, self.folded, self._operands(value, doubles))

    def value(self, value: Callable[[str], Tensor], doubles: Doubles) -> Tensor:
        return value_of(self.decision.recipe, self.folded, self._operands(value, doubles), doubles)

    def _operands(self, value: Callable[[str], Tensor], doubles: Doubles) -> Callable[[Anchor], Tensor]:
        def operand(anchor: Anchor) -> Tensor:
            term = self.terms.get(anchor.source)
            return _rows(value(anchor.source) if term is None else term.value(value, doubles), anchor, self.dims)

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
    interpreter, mode = _Interpreter(region, nodes, readings, doubles), InDouble()
    for extra in (0, 1):
        fact = _difference(region, interpreter, mode, extra)
        if fact is not None:
            return _failed(decision, fact)
    return None


@torch.no_grad()
def _difference(region: Region, interpreter: _Interpreter, mode: InDouble, extra: int) -> str | None:
    """How the fold differs from its sub-graph on maps that are `extra` larger than the least, or None."""
    try:
        mode.forget_products()
        interpreter.restart(_draw(region, interpreter.readings, mode, extra))
        with mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            anchors = {s: interpreter.value(s) for s in sorted(region.sources)}
            doubles, wanted = interpreter.doubles, region.decision.node
            got = region.proof(anchors.__getitem__, doubles)
            is_term = wanted not in interpreter.nodes
            expected = region.value(anchors.__getitem__, doubles) if is_term else interpreter.value(wanted)
    except Exception as error:  # any failure to run it means that it is not certified
        return f"could not be run: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return _compared(region.decision.recipe, got, expected, _spread(anchors))


def _compared(recipe: Recipe, got: Sequence[Tensor], expected: Tensor, spread: float) -> str | None:
    """How the parts differ from the channels of `expected` that they stand for."""
    axis, start, scale = -(recipe.dims or 0) - 1, 0, expected.abs().max()
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
        distance = (value - wanted).abs().max()
        if not distance <= TOLERANCE * (scale + spread):  # a nan is a difference too
            return f"differs by {distance:.2g} where the values are up to {scale:.2g}"
        start += width
    return None if len(got) == 1 or start == expected.shape[axis] else f"gives {start} channels"


def _failed(decision: Decision, fact: str) -> Refusal:
    return Refusal(decision.at, "certificate-failed", f"the fold into {decision.recipe.describe()} {fact}")


def _spread(anchors: Mapping[str, Tensor]) -> float:
    return 1e-6 * max((float(t.abs().max()) for t in anchors.values()), default=0.0)


def _device(folded: Mapping[int, Folded]) -> torch.device:
    return next((f.like.device for f in folded.values() if f.weight is not None), torch.device("cpu"))


def _rows(value: Tensor, anchor: Anchor, dims: int) -> Tensor:
    if anchor.rows is None:
        return value
    return value.index_select(-dims - 1, torch.tensor(anchor.rows, device=value.device))


def _draw(region: Region, readings: Readings, mode: InDouble, extra: int) -> Callable[[str], Tensor]:
    """Random values by name: small maps with a border all around an interior, of no two equal sides.

    Each is a number per channel, the same at every size, times one map, so that convolutions of it cost little.
    """
    dims = region.dims
    known = readings.facts.shapes
    sources = region.sources
    emits = list(region.emits)
    terms, before = (
        [(known.full(known.of[region.node_of(e.anchor.source)]), e.operator) for e in some]
        for some in (region.decision.recipe.emits, emits)
    )
    before += [  # one anchor may be computed from another
        (known.full(known.of[a.source]), term)
        for form in (readings.forms.get(s) for s in sources) if form is not None and sources.issuperset(form.sources)
        for a, term in form.terms if isinstance(term, AffineConv) and term.dims == dims
    ]  # fmt: skip
    sizes = _axis_sizes(terms, before, readings, dims, extra)
    device = _device(region.folded)
    generator = torch.Generator().manual_seed(SEED + extra)

    def draw(name: str) -> Tensor:
        whole = [e.operator for e in emits if e.operator and e.anchor.source == name and e.anchor.rows is None]
        channels = whole[0].in_channels if whole else 3
        shape = _concrete(known.full(known.of[name]), readings, lambda a: sizes.get(a, 2 - extra), dims, channels)
        one = (*shape[: -dims - 1], 1, *shape[len(shape) - dims :])
        values = torch.randn(one, generator=generator, dtype=torch.float64).to(device)
        return mode.product(signs(shape[-dims - 1], OF_CHANNELS).to(device), values, -dims - 1)

    return draw


def _axis_sizes(
    terms: Sequence[tuple[Shape, AffineConv | None]],
    before: Sequence[tuple[Shape, AffineConv | None]],
    readings: Readings,
    dims: int,
    extra: int,
) -> dict[Axis, int]:
    """The smallest sizes of the free axes for which every term has border and interior, and all give one size.

    `before` are operators that are run too, and need maps as large as they are.
    The sides are kept apart, so that a fold which confuses them is seen.
    """
    known = readings.facts.shapes
    sizes: dict[Axis, int] = {}
    for i in range(dims):
        least: dict[Dim | None, int] = {}
        for shape, op in (*terms, *before):
            dim = known.dim(shape, i - dims)
            least[dim] = max(least.get(dim, 1), _least(op, i))
        read = [(known.dim(shape, i - dims), op) for shape, op in terms]
        wanted = max(_output_size(op, i, least[dim] + extra + i % 2) for dim, op in read)
        for dim, op in read:
            if dim is not None:
                _enlarge(sizes, dim, max(least[dim], _input_size(op, i, wanted)), known)
    return sizes


def _enlarge(sizes: dict[Axis, int], dim: Dim, enough: int, known: Shapes) -> None:
    """Raises the sizes of the axes that `dim` depends on until it is `enough`."""
    for axis in free_axes([dim]):
        sizes.setdefault(axis, 1)
        while known.evaluate(dim, lambda a: sizes.get(a, 1)) < enough and sizes[axis] < 1 << 20:
            direct = isinstance(dim, Size) and dim.base == axis  # floor((n + add) / divide): solved
            sizes[axis] = (
                enough * dim.divide - dim.add  # type: ignore[union-attr]
                if direct else sizes[axis] + max(1, sizes[axis] // 16)
            )  # fmt: skip


def _least(op: AffineConv | None, axis: int) -> int:
    """The size along an axis at which an operator has a pixel that its padding does not reach."""
    if op is None:
        return 1
    lo, hi = op.pad_lo[axis], op.pad_hi[axis]
    if op.transposed:
        return 1 + lo + hi
    mirrored = 0 if op.mode == "zeros" else max(lo, hi)  # torch reflects no more than there is
    return 1 + max(op.span[axis] + max(-lo, 0) + max(-hi, 0), mirrored)


def _input_size(op: AffineConv | None, axis: int, size: int) -> int:
    """The least input for which the output along an axis is at least `size`."""
    if op is None:
        return size
    net = op.pad_lo[axis] + op.pad_hi[axis]
    if op.transposed:
        return -(-(size - op.span[axis] - 1 + net) // op.stride[axis]) + 1
    return (size - 1) * op.stride[axis] - net + op.span[axis] + 1


def _output_size(op: AffineConv | None, axis: int, size: int) -> int:
    if op is None:
        return size
    net = op.pad_lo[axis] + op.pad_hi[axis]
    if op.transposed:
        return (size - 1) * op.stride[axis] + op.span[axis] + 1 - net
    return (size + net - op.span[axis] - 1) // op.stride[axis] + 1


def _concrete(
    shape: Shape, readings: Readings, size: Callable[[Axis], int], dims: int, channels: int
) -> tuple[int, ...]:
    known = readings.facts.shapes
    rank = known.rank(shape) or max(len(shape.tail), dims + 1) + 1
    numbers = []
    for i in range(-rank, 0):
        dim: Dim | None = known.dim(shape, i)
        if dim is None or (not isinstance(dim, int) and i == -dims - 1):
            numbers.append(channels)
        else:
            numbers.append(max(known.evaluate(dim, size), 1))
    return tuple(numbers)


class _Interpreter:
    """Runs the nodes that a decision replaces, on demand, in float64, on random values of what they are made from."""

    def __init__(self, region: Region, nodes: Mapping[str, Node], readings: Readings, doubles: Doubles) -> None:
        self.nodes, self.readings, self.doubles = nodes, readings, doubles
        self.inside, self.sources = region.replaced, region.sources

    def restart(self, draw: Callable[[str], Tensor]) -> None:
        """Forgets the values."""
        self.draw, self.values = draw, dict[str, Any]()

    def value(self, wanted: str) -> Any:
        todo = [self.nodes[wanted]]
        while todo:
            node = todo[-1]
            missing = [n for n in self._operands(node) if n.name not in self.values]
            if node.name in self.values or not missing:
                todo.pop()
                if node.name not in self.values:
                    self.values[node.name] = self._run(node) if self._is_run(node) else self.draw(node.name)
            else:
                todo.extend(missing)
        return self.values[wanted]

    def _operands(self, node: Node) -> list[Node]:
        return [] if node.name in self.readings.facts.constants or not self._is_run(node) else node.all_input_nodes

    def _is_run(self, node: Node) -> bool:
        """Whether the node is part of what is checked: replaced, a number, or a view of an anchor."""
        facts = self.readings.facts
        if node.name in self.inside or node.name in facts.constants or node.name in facts.scalars:
            return True
        form, view = self.readings.forms.get(node.name), facts.layouts.get(node.name)
        if form is None and node.users and is_bypass(node, self.readings):
            return True
        read = set() if form is None else set(form.sources)
        seen = (self.sources | self.inside) - {node.name}
        return (bool(read) and read <= seen) or (view is not None and view.source.name in seen)

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
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward with its parameters and buffers in float64, without changing it."""
        if module._modules or "forward" in vars(module):
            tensors = [*module.named_parameters(), *module.named_buffers()]
            return torch.func.functional_call(module, {n: self._double(t) for n, t in tensors}, args, kwargs)
        twin = copy.copy(module)
        lazily = self.doubles.as_stored and type(module).forward in CONVERTED
        for store in ("_parameters", "_buffers"):
            found: dict[str, Tensor | None] = vars(module)[store]
            vars(twin)[store] = {
                n: t if t is None or (lazily and t.ndim > 1) else self._double(t) for n, t in found.items()
            }
        return twin.forward(*args, **kwargs)

    def _double(self, tensor: Tensor) -> Tensor:
        return self.doubles.of(tensor) if tensor.is_floating_point() else tensor
