"""From a form to the operators that compute it: convolutions, scales, sums and concatenations. Decides nothing by cost
but one thing: whether parts on one anchor are stacked into one operator or stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from fxrep import form as forms
from fxrep import kernel as K
from fxrep.affine import AffineConv, diagonal_of
from fxrep.cost import Aim, Work, kind_of
from fxrep.errors import Illegal
from fxrep.evaluation import has_zeros
from fxrep.form import AffineForm
from fxrep.frozen import replace
from fxrep.kernel import Kernel
from fxrep.parts import Anchor, Gain, Part, Term
from fxrep.shapes import Axis, Dim, Shape, Shapes

DEFAULT_SIZE = 56  # of an axis about which nothing is known; choices inside a region depend on ratios alone
ROUNDING = 1e-9  # relative, of sums of multiply-adds
IMAGE_SIZE = 224  # of the height and width of what is certainly an image


@dataclass(frozen=True, eq=False)
class Emit:
    """One term to compute: a convolution, a scale (a `gain` and perhaps a `bias`), or the anchor as it is."""

    anchor: Anchor
    operator: AffineConv | None = None
    gain: Kernel | None = None
    bias: Kernel | None = None
    #: whether channels that are passed on are made contiguous
    dense: bool = False

    @property
    def kernels(self) -> tuple[Kernel | None, Kernel | None]:
        """Its weight, or gain, and its bias."""
        return (self.gain, self.bias) if self.operator is None else (self.operator.weight, self.operator.bias)

    @property
    def is_pass(self) -> bool:
        return self.operator is None and self.gain is None and self.bias is None

    @property
    def is_pad(self) -> bool:
        """Whether nothing but the border changes: no layer, `F.pad` alone."""
        op = self.operator
        return op is not None and op.copies and op.bias is None and all(s == 1 for s in op.stride)

    @property
    def is_pool(self) -> bool:
        """Whether an average pool computes it, without weights."""
        return self.operator is not None and self.operator.dims > 0 and self.operator.is_average_pool

    @property
    def stores(self) -> bool:
        """Whether it has numbers of its own, in a layer or a scale."""
        return not (self.is_pass or self.is_pad or self.is_pool)

    @property
    def numbers(self) -> dict[int, int]:
        """How many numbers it stores, by kernel. Of one that stands in the code alone there is nothing to save."""
        stored = (k for k in self.kernels if k is not None) if self.stores else ()
        return {id(k): prod(k.shape) for k in stored if k.shape or any(True for _ in K.leaves(k))}

    @property
    def pads_by_channel(self) -> bool:
        """Whether what is inserted differs from channel to channel, which no layer offers."""
        op = self.operator
        return op is not None and op.pads and op.fill is not None and not isinstance(op.fill, K.Constant)

    @property
    def steps(self) -> int:
        """How many operators it starts."""
        if self.is_pass or self.is_pad or self.operator is None:
            return int(not self.is_pass)
        return 1 + needs_explicit_pad(self.operator)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a value is computed from its anchors: the sum of the terms of each part, the parts concatenated."""

    form: AffineForm
    parts: tuple[tuple[Emit, ...], ...]

    @property
    def emits(self) -> Iterator[Emit]:
        return (e for part in self.parts for e in part)

    @property
    def dims(self) -> int | None:
        return self.form.dims

    @cached_property
    def convolutions(self) -> int:
        """How many layers with a kernel it needs; an average pool is one."""
        return sum(e.operator is not None and not e.is_pad for e in self.emits)

    @cached_property
    def additions(self) -> int:
        return sum(len(part) - 1 for part in self.parts)

    @property
    def shifts(self) -> int:
        """How many terms are nothing but an added constant."""
        return sum(e.operator is None and e.gain is None and e.bias is not None for e in self.emits)

    @cached_property
    def steps(self) -> int:
        """How many operators it starts."""
        return sum(e.steps for e in self.emits) + self.additions + (len(self.parts) > 1)

    @cached_property
    def has_zeros(self) -> bool:
        """Whether a kernel of it is zero somewhere by construction."""
        return any(has_zeros(e.operator.weight) for e in self.emits if e.operator is not None)

    @property
    def numbers(self) -> int:
        """How many numbers it stores; what several terms have in common once."""
        return sum({key: size for e in self.emits for key, size in e.numbers.items()}.values())

    def describe(self) -> str:
        """Like `Conv2d(64, 64, k3x3 s1 p1)`, or a sum of such."""
        names = [" + ".join(_describe(e) for e in part) for part in self.parts]
        return names[0] if len(names) == 1 else f"cat({', '.join(names)})"


def _describe(emit: Emit) -> str:
    if emit.operator is not None:
        return "pad" if emit.is_pad else "average" if emit.is_pool else emit.operator.describe()
    if emit.is_pass and emit.anchor.rows is not None:
        return f"{len(emit.anchor.rows)} channels of a shared layer"
    return "identity" if emit.is_pass else "scale" if emit.gain is not None else "shift"


def lower(form: AffineForm, stacks: Callable[[Recipe, Recipe], bool]) -> Recipe:
    """The parts apart, or stacked where they are one operator and `stacks(apart, stacked)`; no layer where there is
    none.

    Raises Illegal for a form that no operator computes.
    """
    apart = recipe_of(form)
    stacked = forms.merged(form) if len(form.parts) > 1 else None
    if stacked is None:
        return apart
    together = recipe_of(stacked)
    return together if together.convolutions <= apart.convolutions and stacks(apart, together) else apart


def recipe_of(form: AffineForm) -> Recipe:
    """One emit for each term. Raises Illegal for a form that no operator computes."""
    return Recipe(form, tuple(_emits(p, form.dims) for p in form.parts))


def _emits(part: Part, dims: int | None) -> tuple[Emit, ...]:
    """One emit a term; the part's bias goes to a convolution if there is one, else to a scale, else to a shift."""
    if not part.terms:
        raise Illegal("not-affine", "the value is a constant, computed from no input")
    emits = [_emit(anchor, term) for anchor, term in part.terms.items()]
    if part.bias is not None:
        carrier = max(range(len(emits)), key=lambda i: (emits[i].operator is not None, emits[i].gain is not None))
        emits[carrier] = _with_bias(emits[carrier], part.bias)
    return tuple(emits)


def _emit(anchor: Anchor, term: Term) -> Emit:
    if isinstance(term, Gain):
        return Emit(anchor) if term.is_identity else Emit(anchor, gain=term.factor)
    if term.is_identity:
        return Emit(anchor)
    if term.is_diagonal:
        return Emit(anchor, gain=diagonal_of(term))
    if not term.dims:
        return Emit(anchor, operator=term.regrouped(1))  # a linear layer has no groups
    if term.transposed and not all(0 <= lo - hi < max(s, d) for lo, hi, s, d in _output_paddings(term)):
        raise Illegal("transposed", "its crop is not one that a transposed convolution offers")
    return Emit(anchor, operator=term)


def _output_paddings(term: AffineConv) -> Iterator[tuple[int, int, int, int]]:
    return zip(term.pad_lo, term.pad_hi, term.stride, term.dilation, strict=True)


def _with_bias(emit: Emit, bias: Kernel) -> Emit:
    if emit.operator is None:
        return replace(emit, bias=bias)
    return replace(emit, operator=replace(emit.operator, bias=K.spread(bias, emit.operator.out_channels)))


def needs_explicit_pad(operator: AffineConv) -> bool:
    """Whether the pads are not ones that a layer of torch.nn offers by itself."""
    if operator.transposed:
        return False
    crops = any(p < 0 for p in operator.pad_lo + operator.pad_hi)
    return (
        crops
        or (operator.pads and operator.fill is not None)
        or not (operator.pad_lo == operator.pad_hi or is_same(operator))
    )


def is_same(operator: AffineConv) -> bool:
    """Whether the pads are those of `padding="same"`."""
    halves = tuple(s // 2 for s in operator.span)
    rest = tuple(s - h for s, h in zip(operator.span, halves, strict=True))
    return all(s == 1 for s in operator.stride) and (operator.pad_lo, operator.pad_hi) == (halves, rest)


@dataclass(frozen=True)
class Sizes:
    """The sizes at which costs are counted: those of the example inputs, else nominal ones."""

    shapes: Shapes
    examples: dict[str, tuple[int, ...]]
    known: dict[tuple[int, int], tuple[Shape, tuple[int, ...]]] = field(default_factory=dict)

    def numbers(self, shape: Shape, least: int) -> tuple[int, ...]:
        """The shape in numbers, at least its last `least` axes and the batch."""
        key = id(shape), least
        if key not in self.known:
            self.known[key] = shape, self._numbers(shape, least)
        return self.known[key][1]

    def _numbers(self, shape: Shape, least: int) -> tuple[int, ...]:
        rank = self.shapes.rank(shape) or max(len(shape.tail), least + 1)
        dims = [self.shapes.dim(shape, i) for i in range(-rank, 0)]
        return tuple(self.number(d, i == 0) for i, d in enumerate(dims))

    def number(self, dim: Dim | None, is_batch: bool = False) -> int:
        if dim is None:
            return 1
        return max(self.shapes.evaluate(dim, lambda axis: self._size_of(axis, is_batch)), 1)

    def _size_of(self, axis: Axis, is_batch: bool) -> int:
        if axis.root in self.examples:
            return self.examples[axis.root][axis.index]
        rank = self.shapes.ranks.get(axis.root)
        if is_batch or (rank is not None and -axis.index == rank):
            return 1
        is_image = rank == 4 or (rank is None and Axis(axis.root, -3) in self.shapes.sizes)
        return IMAGE_SIZE if is_image else DEFAULT_SIZE


class Effort(NamedTuple):
    """What no plan may raise: calls of layers and of additions, multiply-adds and weights of the layers."""

    layers: float
    additions: float
    macs: float
    weights: float

    def beyond(self, other: Effort) -> str:
        """What of it is more, like `7,225,344 multiply-adds (apart 1,024)`."""
        return ", ".join(f"{a:,.0f} {name} (apart {b:,.0f})" for a, b, name in self._more(other))

    def exceeds(self, other: Effort) -> bool:
        return any(True for _ in self._more(other))

    def _more(self, other: Effort) -> Iterator[tuple[float, float, str]]:
        names = "layers", "additions", "multiply-adds", "weights"
        return (row for row in zip(self, other, names, strict=True) if row[0] > row[1] * (1 + ROUNDING))


def total(efforts: Iterable[Effort]) -> Effort:
    return Effort(*map(sum, zip(*efforts, strict=True)))


class Job(NamedTuple):
    """A recipe at sizes: of its value, and of what it reads."""

    recipe: Recipe
    result: tuple[int, ...]
    read: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pricer:
    """Seconds of a recipe whose value has the shape `out` and whose anchors have the shapes `of`."""

    sizes: Sizes
    aim: Aim
    #: what is known of emits already, by the size of what they give
    known: dict[tuple[int, tuple[int, ...]], tuple[Emit, list[Work]]] = field(default_factory=dict)

    def seconds(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> float:
        return sum(w.seconds(self.aim.profile) for w in self.works(recipe, out, of))

    def job(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> Job:
        least = (recipe.dims or 0) + 1
        read = {source: self.sizes.numbers(of(source), least) for source in recipe.form.sources}
        return Job(recipe, self.sizes.numbers(out, least), read)

    def cost(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> float:
        """By what is to be made least."""
        return sum(map(self.aim.cost, self.works(recipe, out, of)))

    def effort(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape], written: bool) -> Effort:
        """`written` says that the recipe is to be written, in layers: what the model has as a pool is no layer."""
        dims = recipe.dims or 0
        result = self.sizes.numbers(out, dims + 1)
        layers = [e for e in recipe.emits if e.operator and e.stores and (written or not e.operator.averages)]
        works = [w for e in layers for w in self._term(e, dims, result, of)]
        weights = sum(w.weights for w in works)
        return Effort(len(layers), recipe.additions + recipe.shifts, sum(w.macs for w in works), weights)

    def works(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> list[Work]:
        dims = recipe.dims or 0
        result = self.sizes.numbers(out, dims + 1)
        works = [w for e in recipe.emits for w in self._term(e, dims, result, of)]
        written = float(prod(result))
        works += [Work(elements=3 * written / len(recipe.parts), steps=1)] * recipe.additions
        works += [Work(elements=2 * written, steps=1)] if len(recipe.parts) > 1 else []
        return works

    def _term(self, emit: Emit, dims: int, result: tuple[int, ...], of: Callable[[str], Shape]) -> list[Work]:
        key = id(emit), result
        if key not in self.known:
            self.known[key] = emit, list(self._steps(emit, dims, result, of))
        return self.known[key][1]

    def _steps(self, emit: Emit, dims: int, result: tuple[int, ...], of: Callable[[str], Shape]) -> Iterator[Work]:
        rows = emit.anchor.rows
        read = self.sizes.numbers(of(emit.anchor.source), dims + 1)
        elements = float(prod(read))
        if rows is not None:
            elements *= len(rows) / max(read[-dims - 1], 1)
            if not emit.anchor.is_slice or (emit.dense and prod(read[: -dims - 1]) > 1):
                yield Work(elements=2 * elements, steps=1)
        if emit.is_pass:
            return
        if emit.operator is None or emit.is_pad:
            yield Work(elements=2 * elements, steps=1)
            return
        yield from _convolution(emit.operator, elements, read, result)


def numbers_behind(form: AffineForm) -> int:
    """How many numbers of the model a form is computed from."""
    return sum({id(leaf.tensor): leaf.tensor.numel() for leaf in K.leaves(*form.kernels)}.values())


def _convolution(op: AffineConv, elements: float, read: tuple[int, ...], result: tuple[int, ...]) -> Iterator[Work]:
    dims = op.dims
    spatial = read if op.transposed else result  # a transposed operator works once per input pixel
    lead = prod(result[: -dims - 1])
    positions = lead * prod(spatial[len(spatial) - dims :])
    weights = float(prod(op.weight.shape))
    written = float(lead * op.out_channels * prod(result[len(result) - dims :]))
    if needs_explicit_pad(op):
        yield Work(elements=2 * elements, steps=1)
        padded = (max(n + p + q, 1) / n for n, p, q in zip(read[-dims:], op.pad_lo, op.pad_hi, strict=True))
        elements *= prod(padded)  # the layer reads what the pad wrote
    kind = kind_of(prod(op.taps), dims, op.groups, op.in_channels)
    yield Work(weights * positions, kind, elements + written, 1, weights)
