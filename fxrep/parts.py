"""`Part`: Σ_a A_a(a) + b on a range of channels, and what is done to it: composed, added, cut, stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import pairwise
from math import prod

from fxrep import affine, composition
from fxrep import kernel as K
from fxrep.affine import AffineConv, Ints
from fxrep.errors import Illegal
from fxrep.frozen import frozen, replace
from fxrep.kernel import Kernel


@frozen()
class Anchor:
    """A computed value, or the channels `rows` of it (None: all of them, in order).

    Terms on one anchor are one operator. Where they are cheaper apart, `slot` tells them apart.
    """

    source: str
    rows: Ints | None = None
    slot: int = 0
    #: how many channels the value has, where some of them are told and that is known
    width: int | None = field(default=None, compare=False)

    @property
    def is_slice(self) -> bool:
        """Whether its channels lie side by side, in order."""
        return self.rows is None or self.rows == tuple(range(self.rows[0], self.rows[0] + len(self.rows)))

    @property
    def unslotted(self) -> Anchor:
        return self if self.slot == 0 else replace(self, slot=0)

    def narrowed(self, columns: Ints | None, channels: int | None) -> Anchor:
        """The channels `columns` of the `channels` that it reads."""
        if columns is None:
            return self
        if self.rows is None:
            return replace(self, rows=columns, width=channels)
        return replace(self, rows=tuple(self.rows[c] for c in columns))

    def on(self, rows: Ints) -> Anchor:
        """The channels `rows` of the same value, or all of it."""
        whole = self.width is not None and rows == tuple(range(self.width))
        return Anchor(self.source, None if whole else rows, width=None if whole else self.width)


@frozen(eq=False)
class Gain:
    """x ↦ factor·x, whatever the layout of x is; `factor` has the shape ()."""

    factor: Kernel

    @property
    def is_identity(self) -> bool:
        return isinstance(self.factor, K.Constant) and self.factor.value == 1.0


Term = AffineConv | Gain
ONE = Gain(K.Constant((), 1.0))


@frozen(eq=False)
class Part:
    """Σ terms + bias on a contiguous range of channels. Terms carry no biases of their own; None is zero."""

    terms: Mapping[Anchor, Term]
    bias: Kernel | None = None
    width: int | None = None

    @property
    def channels(self) -> int | None:
        for term in self.terms.values():
            if isinstance(term, AffineConv):
                return term.out_channels
        return self.bias.shape[0] if self.bias is not None and self.bias.shape else self.width


Join = Callable[[dict[Anchor, "Term"], Anchor, "Term"], None]


def merge(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
    """Adds a term to a sum: terms on one value become one operator. Raises Illegal where they cannot."""
    anchor = anchor.unslotted
    terms[anchor] = _add_terms(terms[anchor], term) if anchor in terms else term


def merge_where(accepted: Callable[[Term, Term, Term], bool]) -> Join:
    """A join by which terms on one value, or on some channels of it, become one operator where that is legal and
    `accepted(one, a, b)`; else each has a slot of its own."""

    def join(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
        apart = [(a, terms.pop(a)) for a in tuple(terms) if a.source == anchor.source]
        todo = [(anchor, term)]
        while todo:
            new = todo.pop()
            for i, old in enumerate(apart):
                both = _merged_if_legal(old, new)
                if both is not None and accepted(both[1], old[1], new[1]):
                    del apart[i]
                    todo.append(both)
                    break
            else:
                apart.append(new)
        for where, each in apart:
            keep_apart(terms, where.unslotted, each)

    return join


def keep_apart(terms: dict[Anchor, Term], anchor: Anchor, term: Term) -> None:
    """Adds a term to a sum as an operator of its own."""
    while anchor in terms:
        anchor = replace(anchor, slot=anchor.slot + 1)
    terms[anchor] = term


Bound = tuple[Anchor, Term]  # a term, and what it is a term on


def _merged_if_legal(a: Bound, b: Bound) -> Bound | None:
    try:
        return merged_terms(a, b)
    except Illegal:
        return None


def merged_terms(a: Bound, b: Bound) -> Bound:
    """Two terms on one source as one operator on all the channels that they read.

    Raises Illegal where they are none.
    """
    (p, s), (q, t) = a, b
    if p.rows == q.rows:
        return p.unslotted, _add_terms(s, t)
    operators = [x for x in (s, t) if isinstance(x, AffineConv)]
    if not operators:
        raise Illegal("broadcast", "the same numbers are read in another order, and in none does an operator read them")
    one = operators[0]
    pair = [(r, _as_operator(x, one.out_channels, one.dims)) for r, x in ((p.rows, s), (q.rows, t))]
    whole = next((x.in_channels for rows, x in pair if rows is None), None)
    rows = tuple(sorted({c for r, _ in pair if r is not None for c in r})) if whole is None else tuple(range(whole))
    wide = [x if r is None else x.widened(tuple(rows.index(c) for c in r), len(rows)) for r, x in pair]
    return Anchor(p.source) if whole is not None else p.on(rows), affine.add(*wide)


def weights_of(term: Term) -> int:
    """How many numbers a kernel holds; what scales or copies has none."""
    return 0 if isinstance(term, Gain) or term.is_diagonal or term.copies else prod(term.weight.shape)


def times(term: Term, factor: Kernel) -> Term:
    if isinstance(term, Gain):
        return Gain(factor) if term.is_identity else Gain(K.scale(term.factor, factor))
    return term.scaled(factor)


def without_zero(part: Part) -> Part:
    """Without a zero that the code adds, as `sum` begins with one: together with anything else it is nothing."""
    is_zero = isinstance(part.bias, K.Constant) and not part.bias.shape and part.bias.value == 0
    return replace(part, bias=None) if is_zero else part


def compose_part(operator: AffineConv, part: Part) -> Part:
    if part.bias is None and [t.is_identity for t in part.terms.values()] == [True]:
        return Part(dict.fromkeys(part.terms, operator.without_bias()), operator.bias, operator.out_channels)
    terms: dict[Anchor, Term] = {}
    outside = part.bias
    changes = not operator.is_identity
    for anchor, term in part.terms.items():
        if changes and isinstance(term, Gain) and term.is_identity:
            terms[anchor] = replace(operator, bias=None, fill=None)
            continue
        inner = _as_operator(term, operator.in_channels, operator.dims)
        composition.check_geometry(operator, inner)
        outside = K.total(outside, inner.outside())
        terms[anchor] = composition.compose_weights(operator, inner)
    composition.check_outside(operator, outside)
    bias = K.total(operator.bias, composition.bias_through(operator, part.bias))
    return Part(terms, bias, operator.out_channels)


def compose_stack(operator: AffineConv, parts: Sequence[Part]) -> tuple[Part, ...]:
    """A convolution over a concatenation: by parts where its groups allow, else columns split and added."""
    bounds = bounds_of(parts)
    width = operator.in_channels // operator.groups
    if operator.groups > 1 and all(b % width == 0 for b in bounds):
        rows = operator.out_channels // operator.groups
        pieces = [operator.take(tuple(range(lo // width * rows, hi // width * rows)))[0] for lo, hi in pairwise(bounds)]
        return tuple(compose_part(o, p) for o, p in zip(pieces, parts, strict=True))
    applied = [compose_part(operator.columns(lo, hi), p) for (lo, hi), p in zip(pairwise(bounds), parts, strict=True)]
    result = applied[0]
    for piece in applied[1:]:
        result = add_parts(result, piece)
    return (replace(result, bias=K.total(operator.bias, result.bias)),)


def bounds_of(parts: Sequence[Part]) -> list[int]:
    bounds = [0]
    for part in parts:
        if part.channels is None:
            raise Illegal("shape-unknown", "the channels of a concatenated value are not known")
        bounds.append(bounds[-1] + part.channels)
    return bounds


def add_parts(p: Part, q: Part, join: Join = merge) -> Part:
    terms = dict(p.terms)
    channels = q.channels if p.channels is None else p.channels
    if p.channels is not None and q.channels not in (None, p.channels):
        raise Illegal("broadcast", f"{p.channels} channels are added to {q.channels}")
    for anchor, term in q.terms.items():
        join(terms, anchor, term)
    return Part(terms, K.total(p.bias, q.bias), channels)


def take_rows(part: Part, rows: Ints) -> Part:
    if part.channels is not None and rows == tuple(range(part.channels)):
        return part
    terms: dict[Anchor, Term] = {}
    for anchor, term in part.terms.items():
        if isinstance(term, Gain):
            merge(terms, anchor.narrowed(rows, part.channels), term)
        else:
            taken, columns = term.take(rows)
            merge(terms, anchor.narrowed(columns, term.in_channels), taken)
    bias = part.bias if part.bias is None or not part.bias.shape else K.take(part.bias, rows)
    return Part(terms, bias, len(rows))


def take_from_stack(parts: Sequence[Part], rows: Ints) -> Iterator[Part]:
    """`rows` of a concatenation, cut wherever they cross from one part to another."""
    bounds = bounds_of(parts)
    owner = [i for i, p in enumerate(parts) for _ in range(p.channels or 0)]
    crossings = sum(owner[a] != owner[b] for a, b in pairwise(rows))
    if crossings > 2 * len(parts):
        raise Illegal("layout", f"the channels of {len(parts)} concatenated values are interleaved")
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or owner[rows[end]] != owner[rows[start]]:
            part = owner[rows[start]]
            yield take_rows(parts[part], tuple(r - bounds[part] for r in rows[start:end]))
            start = end


def stack_two(p: Part, q: Part, dims: int) -> Part:
    """Two parts, each of one term, as one: rows on the same anchor, or groups on other channels of one source."""
    if len(p.terms) != 1 or len(q.terms) != 1 or p.channels is None or q.channels is None:
        raise Illegal("broadcast", "several anchors cannot be stacked into one operator")
    ((a, s), (b, t)) = ((anchor.unslotted, term) for r in (p, q) for anchor, term in r.terms.items())
    if isinstance(s, Gain) and isinstance(t, Gain) and s.is_identity and t.is_identity and a != b:
        term: Term = ONE
    else:
        term = affine.stack(_as_operator(s, p.channels, dims), _as_operator(t, q.channels, dims), same_input=a == b)
    anchor = a
    if a != b:
        if a.source != b.source or a.rows is None or b.rows is None:
            raise Illegal("broadcast", "several anchors cannot be stacked into one operator")
        anchor = a.on(a.rows + b.rows)
    width = p.channels + q.channels
    bias = None
    if p.bias is not None or q.bias is not None:
        zeros = [K.Constant((n,), 0.0) for n in (p.channels, q.channels)]
        bias = K.stack(
            [K.spread(r.bias or z, n) for r, z, n in zip((p, q), zeros, (p.channels, q.channels), strict=True)]
        )
    return Part({anchor: term}, bias, width)


def _as_operator(term: Term, channels: int, dims: int) -> AffineConv:
    if isinstance(term, AffineConv):
        return term
    return affine.identity(channels, dims) if term.is_identity else affine.diagonal(term.factor, channels, dims)


def _add_terms(a: Term, b: Term) -> Term:
    if isinstance(a, Gain) and isinstance(b, Gain):
        return Gain(K.Sum((), (a.factor, b.factor)))
    operator = a if isinstance(a, AffineConv) else b
    assert isinstance(operator, AffineConv)
    return affine.add(*(_as_operator(t, operator.out_channels, operator.dims) for t in (a, b)))


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
