"""`AffineForm`: a value as Σ_a A_a(a) + b over *anchors*, the values that are really computed.

A residual `x + conv(h)` is a form like any other. A form may be a stack of *parts* (a concatenation of channels), each
with its own sum; a term is an `AffineConv`, or a `Gain`, the scalar multiple of the identity in whatever layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import is_

from fxrep import affine
from fxrep import kernel as K
from fxrep.affine import AffineConv, Ints
from fxrep.errors import Illegal
from fxrep.frozen import frozen, lazily, replace
from fxrep.kernel import Kernel
from fxrep.parts import (
    ONE,
    Anchor,
    Gain,
    Join,
    Part,
    Term,
    add_parts,
    bounds_of,
    compose_part,
    compose_stack,
    merge,
    stack_two,
    take_from_stack,
    take_rows,
    times,
    without_zero,
)  # fmt: skip


@frozen(eq=False)
class AffineForm:
    """y = stack_p(Σ_a A_pa(a) + b_p).

        F + G          `f + g`              sums of terms; terms on one anchor are added as operators
        A ∘ F          `f.then(A)`          composed with every term
        γ·F + β        `f.scale(γ, β)`      rows scaled, bias shifted
        F[rows]        `f.take(rows, dims)`
        cat(F, G)      `cat([f, g], dims)`
        F[a := G]      `f.substitute(a, G)` the algebra of inlining

    `dims` is the number of spatial axes after the channel axis (None while nothing has said which axis that is).
    `aligned` says that all terms provably have equal sizes, so that none broadcasts over space.
    """

    parts: tuple[Part, ...]
    dims: int | None = None
    aligned: bool = True

    @property
    def channels(self) -> int | None:
        widths = [p.channels for p in self.parts]
        return None if None in widths else sum(w for w in widths if w is not None)

    @property
    def terms(self) -> Iterator[tuple[Anchor, Term]]:
        return ((a, t) for p in self.parts for a, t in p.terms.items())

    @lazily
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a.source for a, _ in self.terms))

    @property
    def kernels(self) -> Iterator[Kernel]:
        """All that its numbers are computed by."""
        for part in self.parts:
            operators = [t for t in part.terms.values() if isinstance(t, AffineConv)]
            gains = (t.factor for t in part.terms.values() if isinstance(t, Gain))
            known = (*gains, *(o.weight for o in operators), *(o.fill for o in operators), part.bias)
            yield from (k for k in known if k is not None)

    def __add__(self, other: AffineForm) -> AffineForm:
        return _sum(self, other, merge)

    def then(self, operator: Term) -> AffineForm:
        """operator ∘ self. Raises Illegal where that is not one operator per anchor."""
        if isinstance(operator, Gain):
            return self if operator.is_identity else self._times(operator.factor)
        dims = _one_layout(self.dims, operator.dims)
        if not (self.aligned or operator.is_pointwise):
            raise Illegal("broadcast", f"{operator.describe()} follows a sum whose terms may differ in size")
        if self.channels not in (None, operator.in_channels):
            fact = f"{self.channels} channels meet an operator that reads {operator.in_channels}"
            raise Illegal("broadcast", fact)
        if len(self.parts) == 1:
            parts: tuple[Part, ...] = (compose_part(operator, self.parts[0]),)
        else:
            parts = compose_stack(operator, self.parts)
        return replace(self, parts=parts, dims=dims)

    def scale(self, gain: Kernel, shift: Kernel | None = None, dims: int | None = None) -> AffineForm:
        """γ·self + β, for per-channel vectors (with `dims`) or scalars."""
        if not gain.shape and (shift is None or not shift.shape):
            scaled = self._times(gain)
            return replace(scaled, parts=tuple(replace(p, bias=K.total(p.bias, shift)) for p in scaled.parts))
        assert dims is not None, "a vector acts on a channel axis"
        channels = (gain.shape or shift.shape)[0]  # type: ignore[union-attr]
        operator = affine.diagonal(gain, channels, dims)
        return self.then(replace(operator, bias=None if shift is None else K.spread(shift, channels)))

    def take(self, rows: Ints, dims: int) -> AffineForm:
        """The channels `rows`, in that order."""
        dims_ = _one_layout(self.dims, dims)
        if len(self.parts) == 1:
            return replace(self, parts=(take_rows(self.parts[0], rows),), dims=dims_)
        return replace(self, parts=tuple(take_from_stack(self.parts, rows)), dims=dims_)

    def substitute(self, source: str, definition: AffineForm, join: Join | None = None) -> AffineForm:
        """self with `definition` in the place of every term on `source`; `join` says how terms on one value meet."""
        dims = _one_layout(self.dims, definition.dims)
        stacked: list[Part] = []
        aligned = self.aligned and definition.aligned
        definition = definition._without_zeros()
        for part in map(without_zero, self.parts):
            kept = {a: t for a, t in part.terms.items() if a.source != source}
            form = AffineForm((Part(kept, part.bias, part.width),), dims, aligned)
            for anchor, term in part.terms.items():
                if anchor.source == source:
                    inner = definition if anchor.rows is None else definition.take(anchor.rows, dims or 0)
                    form = _sum(form, inner.then(term), join or merge)
            stacked.extend(form.parts)
        return AffineForm(tuple(stacked), dims, aligned)

    def _without_zeros(self) -> AffineForm:
        parts = tuple(map(without_zero, self.parts))
        return self if all(map(is_, parts, self.parts)) else replace(self, parts=parts)

    def _times(self, factor: Kernel) -> AffineForm:
        parts = tuple(
            replace(
                p,
                terms={a: times(t, factor) for a, t in p.terms.items()},
                bias=None if p.bias is None else K.scale(p.bias, factor),
            )
            for p in self.parts
        )
        return replace(self, parts=parts)


def value(source: str, channels: int | None = None) -> AffineForm:
    """The form of a computed value: itself."""
    return AffineForm((Part({Anchor(source): ONE}, width=channels),))


def constant(bias: Kernel, dims: int | None = None) -> AffineForm:
    """A constant map: no anchor, a bias of shape (C,) on `dims`, or ()."""
    return AffineForm((Part({}, bias),), dims)


def cat(forms: Sequence[AffineForm], dims: int) -> AffineForm:
    """Concatenation along the channel axis; every form must know its channels."""
    if any(f.channels is None for f in forms):
        raise Illegal("shape-unknown", "the channels of a concatenated value are not known")
    for form in forms:
        _one_layout(form.dims, dims)
    return AffineForm(tuple(p for f in forms for p in f.parts), dims, all(f.aligned for f in forms))


def merged(form: AffineForm) -> AffineForm | None:
    """The same form with its parts stacked into one operator on one anchor, or None where they are no such stack."""
    if len(form.parts) == 1:
        return form
    try:
        part = form.parts[0]
        for following in form.parts[1:]:
            part = stack_two(part, following, form.dims or 0)
    except Illegal:
        return None
    return replace(form, parts=(part,))


def _one_layout(a: int | None, b: int | None) -> int | None:
    if a is not None and b is not None and a != b:
        raise Illegal("layout", f"one operand has its channels before {a} axes, the other before {b}")
    return b if a is None else a


def _sum(f: AffineForm, g: AffineForm, join: Join) -> AffineForm:
    dims = _one_layout(f.dims, g.dims)
    left, right = _common_parts(f, g)
    parts = tuple(add_parts(p, q, join) for p, q in zip(left, right, strict=True))
    return AffineForm(parts, dims, f.aligned and g.aligned)


def _common_parts(f: AffineForm, g: AffineForm) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Both forms cut at the same channels."""
    if len(f.parts) == len(g.parts) == 1:
        return f.parts, g.parts
    known = [bounds_of(h.parts) for h in (f, g) if len(h.parts) > 1]
    widths = {b[-1] for b in known} | {h.channels for h in (f, g) if h.channels is not None}
    if len(widths) > 1:
        raise Illegal("broadcast", "concatenations of different numbers of channels are added")
    bounds = sorted({b for one in known for b in one})
    ranges = [tuple(range(lo, hi)) for lo, hi in pairwise(bounds)]
    left, right = (tuple(p for r in ranges for p in _cut(h.parts, r)) for h in (f, g))
    return left, right


def _cut(parts: tuple[Part, ...], rows: Ints) -> list[Part]:
    return [take_rows(parts[0], rows)] if len(parts) == 1 else list(take_from_stack(parts, rows))
