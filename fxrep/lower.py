"""From a form to the operators that compute it: convolutions, scales, sums and concatenations. Decides nothing by cost
but one thing: whether parts on one anchor are stacked into one operator or stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import prod

from fxrep import form as forms
from fxrep import kernel as K
from fxrep.affine import AffineConv, diagonal_of
from fxrep.errors import Illegal
from fxrep.evaluation import has_zeros
from fxrep.form import AffineForm
from fxrep.frozen import frozen, lazily, replace
from fxrep.kernel import Kernel
from fxrep.parts import Anchor, Gain, Part, Term


@frozen(eq=False)
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
        return not (self.is_pass or self.is_pad or self.is_pool or self.is_in_code)

    @property
    def numbers(self) -> dict[int, int]:
        """How many numbers it stores, by kernel."""
        stored = (k for k in self.kernels if k is not None) if self.stores else ()
        return {id(k): prod(k.shape) for k in stored}

    @property
    def is_in_code(self) -> bool:
        """Whether it is a scale by plain numbers: those stand in the code and are not stored."""
        kernels = [k for k in self.kernels if k is not None]
        alike = self.operator is None and not any(k.shape for k in kernels)
        return bool(kernels) and alike and not any(True for _ in K.leaves(*kernels))

    @property
    def is_shift(self) -> bool:
        """Whether it is computed by adding a constant."""
        return self.operator is None and self.bias is not None and (self.gain is None or self.is_in_code)

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


@frozen(eq=False)
class Recipe:
    """How a value is computed from its anchors: the sum of the terms of each part, the parts concatenated."""

    form: AffineForm
    parts: tuple[tuple[Emit, ...], ...]

    @lazily
    def emits(self) -> tuple[Emit, ...]:
        return self.parts[0] if len(self.parts) == 1 else tuple(chain(*self.parts))

    @property
    def dims(self) -> int | None:
        return self.form.dims

    @lazily
    def convolutions(self) -> int:
        """How many layers with a kernel it needs; an average pool is one."""
        return sum(e.operator is not None and not e.is_pad for e in self.emits)

    @property
    def additions(self) -> int:
        return len(self.emits) - len(self.parts)

    @property
    def shifts(self) -> int:
        """How many terms are computed by adding a constant."""
        return sum(e.is_shift for e in self.emits)

    @lazily
    def steps(self) -> int:
        """How many operators it starts."""
        return sum(e.steps for e in self.emits) + self.additions + (len(self.parts) > 1)

    @lazily
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
    return "identity" if emit.is_pass else "shift" if emit.gain is None else "scale"


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
        carrier = max(emits, key=lambda e: (e.operator is not None, e.gain is not None))
        emits[emits.index(carrier)] = _with_bias(carrier, part.bias)
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
        return Emit(emit.anchor, None, emit.gain, bias)
    return Emit(emit.anchor, replace(emit.operator, bias=K.spread(bias, emit.operator.out_channels)))


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
