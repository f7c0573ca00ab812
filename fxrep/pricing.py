"""What recipes take, at the sizes of the example inputs or at nominal ones: work, seconds, and what must not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import NamedTuple

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.cost import Aim, Work, kind_of
from fxrep.form import AffineForm
from fxrep.lower import Emit, Recipe, needs_explicit_pad
from fxrep.shapes import Axis, Dim, Shape, Shapes

DEFAULT_SIZE = 56  # of an axis about which nothing is known; choices inside a region depend on ratios alone
ROUNDING = 1e-9  # relative, of sums of multiply-adds
IMAGE_SIZE = 224  # of the height and width of what is certainly an image


@dataclass(frozen=True)
class Sizes:
    """The sizes at which costs are counted: those of the example inputs, else nominal ones."""

    shapes: Shapes
    examples: dict[str, tuple[int, ...]]
    known: dict[tuple[int, int], tuple[Shape, tuple[int, ...]]] = field(default_factory=dict)
    of_dims: dict[tuple[int, bool], tuple[Dim, int]] = field(default_factory=dict)

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
        if dim is None or isinstance(dim, int):
            return max(dim or 1, 1)
        key = id(dim), is_batch
        if key not in self.of_dims:
            self.of_dims[key] = dim, max(self.shapes.evaluate(dim, lambda axis: self._size_of(axis, is_batch)), 1)
        return self.of_dims[key][1]

    def _size_of(self, axis: Axis, is_batch: bool) -> int:
        if axis.root in self.examples:
            return self.examples[axis.root][axis.place]
        rank = self.shapes.ranks.get(axis.root)
        if is_batch or (rank is not None and -axis.place == rank):
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


NO_EFFORT = Effort(0.0, 0.0, 0.0, 0.0)


def total(efforts: Iterable[Effort]) -> Effort:
    return Effort(*map(sum, zip(*efforts, strict=True)))


class Price(NamedTuple):
    """What a recipe, or one emit of it, costs by what is to be made least, and what no plan may raise."""

    cost: float
    effort: Effort


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
    known: dict[tuple[int, tuple[int, ...]], tuple[Emit, list[Work], Price]] = field(default_factory=dict)
    #: and of recipes, by the shape of what they give, and whether they are to be written
    prices: dict[tuple[int, int, bool], tuple[Recipe, Shape, Price]] = field(default_factory=dict)

    def seconds(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> float:
        dims = recipe.dims or 0
        result = self.sizes.numbers(out, dims + 1)
        works = chain(*(self._term(e, dims, result, of)[1] for e in recipe.emits), _joining(recipe, result))
        return sum(w.seconds(self.aim.profile) for w in works)

    def job(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape]) -> Job:
        least = (recipe.dims or 0) + 1
        read = {source: self.sizes.numbers(of(source), least) for source in recipe.form.sources}
        return Job(recipe, self.sizes.numbers(out, least), read)

    def price(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape], written: bool = True) -> Price:
        """`written` says that the recipe is to be written, in layers: what the model has as a pool is no layer."""
        key = id(recipe), id(out), written
        if key not in self.prices:
            self.prices[key] = recipe, out, self._price(recipe, out, of, written)
        return self.prices[key][2]

    def _price(self, recipe: Recipe, out: Shape, of: Callable[[str], Shape], written: bool) -> Price:
        dims = recipe.dims or 0
        result = self.sizes.numbers(out, dims + 1)
        cost = layers = macs = weights = 0.0
        for emit in recipe.emits:
            own = self._term(emit, dims, result, of)[2]
            cost += own.cost
            if written or not (emit.operator and emit.operator.averages):
                layers += own.effort.layers
                macs += own.effort.macs
                weights += own.effort.weights
        cost += sum(map(self.aim.cost, _joining(recipe, result)))
        return Price(cost, Effort(layers, recipe.additions + recipe.shifts, macs, weights))

    def _term(
        self, emit: Emit, dims: int, result: tuple[int, ...], of: Callable[[str], Shape]
    ) -> tuple[Emit, list[Work], Price]:
        key = id(emit), result
        if key not in self.known:
            works, effort = list(self._steps(emit, dims, result, of)), NO_EFFORT
            if emit.operator and emit.stores:
                effort = Effort(1.0, 0.0, sum([w.macs for w in works]), sum([w.weights for w in works]))
            self.known[key] = emit, works, Price(sum(map(self.aim.cost, works)), effort)
        return self.known[key]

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


def _joining(recipe: Recipe, result: tuple[int, ...]) -> list[Work]:
    """The additions of terms, and the concatenation of parts."""
    written = float(prod(result))
    works = [Work(elements=3 * written / len(recipe.parts), steps=1)] * recipe.additions
    return works + ([Work(elements=2 * written, steps=1)] if len(recipe.parts) > 1 else [])


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
