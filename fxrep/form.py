"""`AffineForm`: a value as Σ_a A_a(a) + b over *anchors*, the values that are really computed.

A residual `x + conv(h)` is a form like any other. A form may be a stack of *parts* (a concatenation of channels), each
with its own sum; a term is an `AffineConv`, or a `Gain`, the scalar multiple of the identity in whatever layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fxrep import affine, composition
from fxrep import kernel as K
from fxrep.affine import AffineConv, Ints
from fxrep.errors import Illegal
from fxrep.kernel import Kernel


@dataclass(frozen=True)
class Anchor:
    """A computed value, or the channels `rows` of it (None: all of them, in order).

    Terms on one anchor are one operator. Where they are cheaper apart, `slot` tells them apart.
    """

    source: str
    rows: Ints | None = None
    slot: int = 0

    def narrowed(self, columns: Ints | None) -> Anchor:
        if columns is None:
            return self
        return replace(self, rows=columns if self.rows is None else tuple(self.rows[c] for c in columns))


@dataclass(frozen=True, eq=False)
class Gain:
    """x ↦ factor·x, whatever the layout of x is; `factor` has the shape ()."""

    factor: Kernel

    @property
    def is_identity(self) -> bool:
        return isinstance(self.factor, K.Constant) and self.factor.value == 1.0


Term = AffineConv | Gain
ONE = Gain(K.Constant((), 1.0))


@dataclass(frozen=True, eq=False)
class Part:
    """Σ terms + bias on a contiguous range of channels. Terms carry no biases of their own; None is zero."""

    terms: Mapping[Anchor, Term]
    bias: Kernel | None = None
    width: int | None = None

    @property
    def channels(self) -> int | None:
        known = [t.out_channels for t in self.terms.values() if isinstance(t, AffineConv)]
        known += [self.bias.shape[0]] if self.bias is not None and self.bias.shape else []
        return known[0] if known else self.width


@dataclass(frozen=True, eq=False)
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

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a.source for a, _ in self.terms))

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
            parts: tuple[Part, ...] = (_apply(operator, self.parts[0]),)
        else:
            parts = _apply_to_stack(operator, self.parts)
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
            return replace(self, parts=(_take_rows(self.parts[0], rows),), dims=dims_)
        return replace(self, parts=tuple(_take_from_stack(self.parts, rows)), dims=dims_)

    def substitute(self, source: str, definition: AffineForm, join: Join | None = None) -> AffineForm:
        """self with `definition` in the place of every term on `source`; `join` says how terms on one value meet."""
        dims = _one_layout(self.dims, definition.dims)
        stacked: list[Part] = []
        aligned = self.aligned and definition.aligned
        for part in self.parts:
            kept = {a: t for a, t in part.terms.items() if a.source != source}
            form = AffineForm((replace(part, terms=kept),), dims, aligned)
            for anchor, term in part.terms.items():
                if anchor.source == source:
                    inner = definition if anchor.rows is None else definition.take(anchor.rows, dims or 0)
                    form = _sum(form, inner.then(term), join or merge)
            stacked.extend(form.parts)
        return AffineForm(tuple(stacked), dims, aligned)

    def _times(self, factor: Kernel) -> AffineForm:
        parts = tuple(
            replace(
                p,
                terms={a: _scaled(t, factor) for a, t in p.terms.items()},
                bias=None if p.bias is None else K.scale(p.bias, factor),
            )
            for p in self.parts
        )
        return replace(self, parts=parts)


Join = Callable[[dict[Anchor, "Term"], Anchor, "Term"], None]


def merge(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
    """Adds a term to a sum: terms on one value become one operator. Raises Illegal where they cannot."""
    anchor = replace(anchor, slot=0)
    terms[anchor] = _add_terms(terms[anchor], term) if anchor in terms else term


def merge_where_legal(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
    """Adds a term to a sum: to the first slot in which it and what is there are one operator."""
    anchor = replace(anchor, slot=0)
    while anchor in terms:
        try:
            terms[anchor] = _add_terms(terms[anchor], term)
            return
        except Illegal:
            anchor = replace(anchor, slot=anchor.slot + 1)
    terms[anchor] = term


def keep_apart(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
    """Adds a term to a sum as an operator of its own."""
    while anchor in terms:
        anchor = replace(anchor, slot=anchor.slot + 1)
    terms[anchor] = term


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
            part = _stack_two(part, following, form.dims or 0)
    except Illegal:
        return None
    return replace(form, parts=(part,))


def _one_layout(a: int | None, b: int | None) -> int | None:
    if a is not None and b is not None and a != b:
        raise Illegal("layout", f"one operand has its channels before {a} axes, the other before {b}")
    return b if a is None else a


def _scaled(term: Term, factor: Kernel) -> Term:
    if isinstance(term, Gain):
        return Gain(factor) if term.is_identity else Gain(K.scale(term.factor, factor))
    return term.scaled(factor)


def _as_operator(term: Term, channels: int, dims: int) -> AffineConv:
    if isinstance(term, AffineConv):
        return term
    return affine.identity(channels, dims) if term.is_identity else affine.diagonal(term.factor, channels, dims)


def _apply(operator: AffineConv, part: Part) -> Part:
    if part.bias is None and [t.is_identity for t in part.terms.values()] == [True]:
        return Part(dict.fromkeys(part.terms, operator.without_bias()), operator.bias, operator.out_channels)
    terms: dict[Anchor, Term] = {}
    outside = part.bias
    for anchor, term in part.terms.items():
        inner = _as_operator(term, operator.in_channels, operator.dims)
        composition.check_geometry(operator, inner)
        outside = K.total(outside, inner.outside())
        terms[anchor] = composition.compose_weights(operator, inner)
    composition.check_outside(operator, outside)
    bias = K.total(operator.bias, composition.bias_through(operator, part.bias))
    return Part(terms, bias, operator.out_channels)


def _apply_to_stack(operator: AffineConv, parts: Sequence[Part]) -> tuple[Part, ...]:
    """A convolution over a concatenation: by parts where its groups allow, else columns split and added."""
    bounds = _bounds(parts)
    width = operator.in_channels // operator.groups
    if operator.groups > 1 and all(b % width == 0 for b in bounds):
        rows = operator.out_channels // operator.groups
        pieces = [operator.take(tuple(range(lo // width * rows, hi // width * rows)))[0] for lo, hi in pairwise(bounds)]
        return tuple(_apply(o, p) for o, p in zip(pieces, parts, strict=True))
    applied = [_apply(operator.columns(lo, hi), p) for (lo, hi), p in zip(pairwise(bounds), parts, strict=True)]
    result = applied[0]
    for piece in applied[1:]:
        result = _add_parts(result, piece)
    return (replace(result, bias=K.total(operator.bias, result.bias)),)


def _bounds(parts: Sequence[Part]) -> list[int]:
    bounds = [0]
    for part in parts:
        if part.channels is None:
            raise Illegal("shape-unknown", "the channels of a concatenated value are not known")
        bounds.append(bounds[-1] + part.channels)
    return bounds


def _sum(f: AffineForm, g: AffineForm, join: Join) -> AffineForm:
    dims = _one_layout(f.dims, g.dims)
    left, right = _common_parts(f, g)
    parts = tuple(_add_parts(p, q, join) for p, q in zip(left, right, strict=True))
    return AffineForm(parts, dims, f.aligned and g.aligned)


def _add_parts(p: Part, q: Part, join: Join = merge) -> Part:
    terms = dict(p.terms)
    channels = q.channels if p.channels is None else p.channels
    if p.channels is not None and q.channels not in (None, p.channels):
        raise Illegal("broadcast", f"{p.channels} channels are added to {q.channels}")
    for anchor, term in q.terms.items():
        join(terms, anchor, term)
    return Part(_gathered(terms, channels), K.total(p.bias, q.bias), channels)


def _gathered(terms: dict[Anchor, Term], channels: int | None) -> dict[Anchor, Term]:
    """Terms on some channels of a value joined to a dense one on all of them, where there is one."""
    joined = dict(terms)
    for anchor, term in terms.items():
        whole = joined.get(replace(anchor, rows=None))
        if anchor.rows is None or not isinstance(whole, AffineConv) or whole.groups > 1 or channels is None:
            continue
        part = _as_operator(term, channels, whole.dims).widened(anchor.rows, whole.in_channels)
        joined[replace(anchor, rows=None)] = affine.add(whole, part)
        del joined[anchor]
    return joined


def _add_terms(a: Term, b: Term) -> Term:
    if isinstance(a, Gain) and isinstance(b, Gain):
        return Gain(K.Sum((), (a.factor, b.factor)))
    operator = a if isinstance(a, AffineConv) else b
    assert isinstance(operator, AffineConv)
    return affine.add(*(_as_operator(t, operator.out_channels, operator.dims) for t in (a, b)))


def _common_parts(f: AffineForm, g: AffineForm) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Both forms cut at the same channels."""
    if len(f.parts) == len(g.parts) == 1:
        return f.parts, g.parts
    known = [_bounds(h.parts) for h in (f, g) if len(h.parts) > 1]
    widths = {b[-1] for b in known} | {h.channels for h in (f, g) if h.channels is not None}
    if len(widths) > 1:
        raise Illegal("broadcast", "concatenations of different numbers of channels are added")
    bounds = sorted({b for one in known for b in one})
    ranges = [tuple(range(lo, hi)) for lo, hi in pairwise(bounds)]
    left, right = (tuple(p for r in ranges for p in _cut(h.parts, r)) for h in (f, g))
    return left, right


def _cut(parts: tuple[Part, ...], rows: Ints) -> list[Part]:
    return [_take_rows(parts[0], rows)] if len(parts) == 1 else list(_take_from_stack(parts, rows))


def _take_rows(part: Part, rows: Ints) -> Part:
    if part.channels is not None and rows == tuple(range(part.channels)):
        return part
    terms: dict[Anchor, Term] = {}
    for anchor, term in part.terms.items():
        if isinstance(term, Gain):
            merge(terms, anchor.narrowed(rows), term)
        else:
            taken, columns = term.take(rows)
            merge(terms, anchor.narrowed(columns), taken)
    bias = part.bias if part.bias is None or not part.bias.shape else K.take(part.bias, rows)
    return Part(terms, bias, len(rows))


def _take_from_stack(parts: Sequence[Part], rows: Ints) -> Iterator[Part]:
    """`rows` of a concatenation, cut wherever they cross from one part to another."""
    bounds = _bounds(parts)
    owner = [i for i, p in enumerate(parts) for _ in range(p.channels or 0)]
    crossings = sum(owner[a] != owner[b] for a, b in pairwise(rows))
    if crossings > 2 * len(parts):
        raise Illegal("layout", f"the channels of {len(parts)} concatenated values are interleaved")
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or owner[rows[end]] != owner[rows[start]]:
            part = owner[rows[start]]
            yield _take_rows(parts[part], tuple(r - bounds[part] for r in rows[start:end]))
            start = end


def _stack_two(p: Part, q: Part, dims: int) -> Part:
    """Two parts, each of one term, as one: rows on the same anchor, or groups on other channels of one source."""
    if len(p.terms) != 1 or len(q.terms) != 1 or p.channels is None or q.channels is None:
        raise Illegal("broadcast", "several anchors cannot be stacked into one operator")
    ((a, s), (b, t)) = ((replace(anchor, slot=0), term) for r in (p, q) for anchor, term in r.terms.items())
    if isinstance(s, Gain) and isinstance(t, Gain) and s.is_identity and t.is_identity and a != b:
        term: Term = ONE
    else:
        term = affine.stack(_as_operator(s, p.channels, dims), _as_operator(t, q.channels, dims), same_input=a == b)
    anchor = a
    if a != b:
        if a.source != b.source or a.rows is None or b.rows is None:
            raise Illegal("broadcast", "several anchors cannot be stacked into one operator")
        anchor = Anchor(a.source, a.rows + b.rows)
    width = p.channels + q.channels
    bias = None
    if p.bias is not None or q.bias is not None:
        zeros = [K.Constant((n,), 0.0) for n in (p.channels, q.channels)]
        bias = K.stack(
            [K.spread(r.bias or z, n) for r, z, n in zip((p, q), zeros, (p.channels, q.channels), strict=True)]
        )
    return Part({anchor: term}, bias, width)
