"""What a value may be computed as instead: ever larger parts of the cone of values that end in it, inlined where that
is legal, and lowered to operators; and why what was in sight was not taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from itertools import combinations

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.cost import Aim
from fxrep.equal import Equal, noting
from fxrep.errors import Illegal, Refusal
from fxrep.evaluation import has_zeros
from fxrep.form import AffineForm
from fxrep.lower import Recipe, lower
from fxrep.parts import Term, merge_where, merged_terms, weights_of
from fxrep.plan import Legal, Problem
from fxrep.state import Candidate, State

MOST_STEPS = 64  # of one cone: an affine region this long without a merge that pays is left as it is
MOST_DETOURS = 4  # around values of a cone that no operator computes


#: The form that comes of an inlining, or why none does, and what had to be equal for it.
Substitution = tuple[AffineForm | Illegal, list[Equal]]


def _has_floats(recipe: Recipe) -> bool:
    """Whether it has numbers of the model: those are floats."""
    return recipe.convolutions > 0 or any(True for e in recipe.emits for _ in K.leaves(e.gain, e.bias))


def _is_free(strict: bool, one: Term, a: Term, b: Term) -> bool:
    """Whether one operator has no more weights than two, and, if `strict`, no zeros."""
    if strict and isinstance(one, AffineConv) and has_zeros(one.weight):
        return False
    return weights_of(one) <= weights_of(a) + weights_of(b)


def _why_apart(one: Term, a: Term, b: Term) -> tuple[str, str]:
    """The code and the reason why two terms on one value are not one operator, although that is legal."""
    wide, narrow = weights_of(one), weights_of(a) + weights_of(b)
    if wide > narrow:
        return "costs-more", f"as one operator two terms of it would have {wide} weights, apart they have {narrow}"
    fact = "one operator would have zeros where its terms do not read"
    return "non-finite", f"{fact}: with them inf becomes nan"


class Candidates:
    """The candidates for each value of a plan in its making, and the refusals of what cannot be or does not pay."""

    def __init__(self, problem: Problem, aim: Aim, strict: bool, legal: Legal) -> None:
        self.problem, self.strict, self.legal = problem, strict, legal
        self.join = merge_where(partial(_is_free, strict))  # which holds no more: a cycle would keep all for a while
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.known: dict[tuple[int, str, int], tuple[AffineForm, AffineForm, Substitution]] = {}
        self.lowerings: dict[int, tuple[AffineForm, Recipe | Illegal, list[Equal]]] = {}
        self.state = State(problem, aim)
        for name, form in problem.forms.items():
            self.state.start(name, self._lower(name, form))

    def candidates(self, node: str) -> Iterable[Candidate]:
        anchors = [s for s in self.state.sources(node) if s in self.state.recipes]
        yield from self._cone(node, anchors)
        if len(anchors) > 1:
            for anchor in anchors:
                yield from self._cone(node, [anchor])

    def _cone(self, node: str, start: Collection[str], avoided: frozenset[str] = frozenset()) -> Iterable[Candidate]:
        """Ever larger parts of the cone of values that end in `node`, nearest first.

        Where a value leads to nothing that an operator computes, there is a second cone without it.
        """
        state = self.state
        form = state.recipes[node].form
        absorbed: list[str] = []
        equal: list[Equal] = []
        gone: set[str] = set()
        blocked, frontier, stuck = set(avoided), set(start), ""
        while len(absorbed) < MOST_STEPS:
            near = [s for s in form.sources if s in frontier and s not in blocked]
            open_ = [s for s in near if self.may_absorb(s, node, gone)]
            if not open_:
                break
            anchor = max(open_, key=state.order.__getitem__)
            inner = state.recipes[anchor].form
            larger, noted = self.substituted(form, anchor, inner)
            if isinstance(larger, Illegal):
                self.refuse(node, larger.code, f"{larger.reason} ({anchor} stays apart)", larger.hint)
                blocked.add(anchor)
                continue
            form = larger
            absorbed.append(anchor)
            equal += [*noted, *state.equal.get(anchor, ())]
            self.note_apart(node, form)
            frontier |= set(inner.sources)
            gone |= {anchor} if state.is_read_only_by(anchor, {node, *gone}) else set()
            recipe, noted = self.lowered(node, form)
            if isinstance(recipe, Illegal):  # no operator computes this much of the cone; a larger part may be one
                self.refuse(node, recipe.code, recipe.reason, recipe.hint)
                stuck = stuck or anchor
                continue
            stuck = ""
            yield Candidate(recipe, tuple(absorbed), frozenset(gone), (*equal, *noted))
        if stuck and len(avoided) < MOST_DETOURS:
            yield from self._cone(node, start, avoided | {stuck})

    def substituted(self, form: AffineForm, anchor: str, inner: AffineForm) -> Substitution:
        """The form with `anchor` inlined, or why not; terms on one value are one operator where that is no more work.

        Known from the last time, where the search starts again over forms that have not changed since.
        """
        key = id(form), anchor, id(inner)
        if key not in self.known:
            with noting() as noted:
                try:
                    found: AffineForm | Illegal = form.substitute(anchor, inner, self.join)
                except Illegal as illegal:
                    found = illegal
            self.known[key] = form, inner, (found, noted)
        return self.known[key][2]

    def lowered(self, node: str, form: AffineForm) -> tuple[Recipe | Illegal, list[Equal]]:
        """The form as operators, or why no operator computes it."""
        if id(form) not in self.lowerings:
            with noting() as noted:
                try:
                    self.lowerings[id(form)] = form, self._lower(node, form, check=True), noted
                except Illegal as illegal:
                    self.lowerings[id(form)] = form, illegal, noted
        return self.lowerings[id(form)][1:]

    def note_apart(self, node: str, form: AffineForm) -> None:
        """A refusal for each pair of terms on one value that are not one operator."""
        for part in form.parts:
            for (a, s), (b, t) in combinations(part.terms.items(), 2):
                if (a.source, a.rows) != (b.source, b.rows):
                    continue
                try:
                    one = merged_terms((a, s), (b, t))[1]
                except Illegal as illegal:
                    self.refuse(node, illegal.code, illegal.reason, illegal.hint)
                    continue
                self.refuse(node, *_why_apart(one, s, t))

    def may_absorb(self, anchor: str, node: str, gone: set[str]) -> bool:
        if anchor not in self.state.recipes or anchor in self.state.removed:
            return False
        if self.crosses_write(anchor, node):
            self._note_held(node, anchor, "mutation", "what it reads is written before it would be read again")
            return False
        fixed = self.problem.fixed.get(anchor)
        if fixed is not None:
            self._note_held(node, anchor, *fixed)
            return False
        if self.state.recipes[anchor].convolutions and not self.state.is_read_only_by(anchor, {node, *gone}):
            self._note_held(
                node, anchor, "shared", "other layers read it too, and each would need a copy of its weights"
            )
            return False
        return True

    def crosses_write(self, anchor: str, node: str) -> bool:
        """Whether `anchor`, or what it reads, may be written between its place and that of `node`."""
        if not self.problem.writes:
            return False
        start, end = self.state.place(anchor), self.state.place(node)
        values = (anchor, *self.state.sources(anchor))
        return any(start < write < end for s in values for write in self.problem.writes.get(s, ()))

    def _note_held(self, node: str, anchor: str, code: str, reason: str) -> None:
        """A refusal where a merge was in sight: a scale or a batch norm after a convolution that must stay."""
        scales = not self.state.recipes[node].convolutions
        if scales and self.state.sources(node) == (anchor,) and self.state.recipes[anchor].convolutions:
            self.refuse(node, code, f"{anchor} must be computed for itself: {reason}")

    def decline(self, node: str, candidate: Candidate, extra: float) -> None:
        whole = self.state.cost(node, candidate.recipe)
        apart = whole - extra
        told = self.state.pricer.aim.told(whole, apart)
        self.refuse(node, "costs-more", f"as one {candidate.recipe.describe()} {told}")

    def refuse(self, node: str, code: str, reason: str, hint: str = "") -> None:
        self.refusals.setdefault((node, code), Refusal(node, code, reason, hint))

    def withdraw(self, node: str) -> None:
        """Forgets what was refused on the way to what is done after all."""
        for code in ("costs-more", "layout", "non-finite"):
            self.refusals.pop((node, code), None)

    def _lower(self, node: str, form: AffineForm, check: bool = False) -> Recipe:
        strict = check and self.strict
        recipe = lower(form, lambda apart, stacked: self._stacks(node, apart, stacked, strict))
        if check and any(e.pads_by_channel for e in recipe.emits):
            raise Illegal("pad-value", "the padding value differs from channel to channel, which no layer offers")
        if check and recipe.dims == 0:
            self._check_rows(node, recipe)
        if strict and recipe.has_zeros:
            fact = f"{recipe.describe()} would have zeros where the branches do not read: with them inf becomes nan"
            raise Illegal("non-finite", fact)
        if check:
            self.legal(recipe)
        return recipe

    def _stacks(self, node: str, apart: Recipe, stacked: Recipe, strict: bool) -> bool:
        """Whether parts are better one operator: no more work, not slower, and, if `strict`, without zeros."""
        if self.state.effort(node, stacked).exceeds(self.state.effort(node, apart)) or (strict and stacked.has_zeros):
            return False
        return self.state.cost(node, stacked) <= self.state.cost(node, apart)

    def _check_rows(self, node: str, recipe: Recipe) -> None:
        for source in recipe.form.sources:
            if not self.problem.shapes.same_before(self.state.shapes[node], self.state.shapes[source], 1):
                raise Illegal("layout", "the axes before the channels were reshaped, and are not reshaped back")

    def is_float(self, node: str, recipe: Recipe) -> bool:
        """Whether the result is certainly a float: scales of plain numbers might act on integers.

        A term is one: its sum is.
        """
        read = (self.state.recipes.get(source) for source in recipe.form.sources)
        return (
            node in self.state.hosts
            or all(e.is_pass or e.is_pad for e in recipe.emits)
            or any(r is not None and _has_floats(r) for r in (recipe, *read))
        )
