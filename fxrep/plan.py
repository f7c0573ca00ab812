"""Which values to compute at all: every affine value starts materialised, and is inlined into its users where that is
legal and not dearer. Works on forms and shapes; no tensors (but where a padding value is compared with a bias)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from fxrep import kernel as K
from fxrep.affine import Equal, noting
from fxrep.cost import Profile, duration
from fxrep.errors import Illegal, Refusal
from fxrep.form import AffineForm
from fxrep.lower import Pricer, Recipe, Sizes, lower
from fxrep.parts import Join, keep_apart, merge, merge_where_legal
from fxrep.shapes import Shape, Shapes

TOLERANCE = 1e-9  # relative; below it two costs are a tie
MOST_STEPS = 64  # of one cone: an affine region this long without a merge that pays is left as it is


@dataclass(frozen=True)
class Problem:
    """What there is to decide on: forms over direct operands in graph order, and who reads each value."""

    forms: Mapping[str, AffineForm]
    shapes: Shapes
    readers: Mapping[str, frozenset[str]]
    #: values that must be computed where they stand, with the code and reason why
    fixed: Mapping[str, tuple[str, str]]
    #: by value, the places in graph order where its memory may be written: no reader may move past one
    writes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Legal = Callable[[Recipe], None]


@dataclass(frozen=True)
class Decision:
    """One value and how it is computed; `inlined` are the values folded into it."""

    node: str
    recipe: Recipe
    inlined: tuple[str, ...]
    seconds_before: float
    seconds_after: float
    #: what was found equal by its numbers, without which it would not be legal
    equal: tuple[Equal, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to compute: `decisions` replace their nodes, `removed` are no longer computed, all else stays as it is."""

    decisions: Mapping[str, Decision]
    removed: frozenset[str]
    refusals: tuple[Refusal, ...]
    seconds_before: float
    seconds_after: float

    def without(self, node: str) -> Plan:
        """The plan with one decision taken back."""
        kept = {n: d for n, d in self.decisions.items() if n != node}
        dropped = self.decisions[node]
        after = self.seconds_after - dropped.seconds_after + dropped.seconds_before
        return replace(self, decisions=kept, removed=self.removed - frozenset(dropped.inlined), seconds_after=after)


def make_plan(problem: Problem, profile: Profile, strict: bool = False, legal: Legal = lambda _: None) -> Plan:
    """Greedy in graph order: for each affine value its cone of values that nobody else reads, the best prefix of it.

    `strict` allows no kernel with zeros that the model does not multiply by: 0·∞ is not a number. `legal` raises
    Illegal for a recipe that may not be taken for some other reason.
    """
    state = _State(problem, profile, strict, legal)
    todo = deque(name for name in problem.forms if problem.readers[name])
    while todo:
        node = todo.popleft()
        if node not in state.removed:
            todo.extend(state.improve(node))
    return state.plan()


@dataclass(frozen=True)
class _Candidate:
    """A form for a node with `absorbed` inlined, of which `gone` need not be computed any more."""

    recipe: Recipe
    absorbed: tuple[str, ...]
    gone: frozenset[str]
    seconds: float
    steps: int
    equal: tuple[Equal, ...]


def _is_float(recipe: Recipe) -> bool:
    """Whether the result is certainly a float: scales of plain numbers might act on integers."""
    scales = [e for e in recipe.emits if not (e.is_pass or e.is_pad)]
    return recipe.convolutions > 0 or not scales or any(True for e in scales for _ in K.leaves(e.gain, e.bias))


#: The forms that come of an inlining, why others do not, and what had to be equal for it.
Substitution = tuple[list[AffineForm], list[Illegal], list[Equal]]


def _substitute(form: AffineForm, anchor: str, inner: AffineForm) -> Substitution:
    ways: list[Join] = [merge]
    if not set(inner.sources).isdisjoint(s for s in form.sources if s != anchor):
        ways += [keep_apart]
    found, refused = [], []
    with noting() as noted:
        for join in ways:
            try:
                found.append(form.substitute(anchor, inner, join))
            except Illegal as illegal:
                refused.append(illegal)
                if join is merge:
                    ways.insert(1, merge_where_legal)
    return found, refused, noted


class _State:
    """The plan while it is made."""

    def __init__(self, problem: Problem, profile: Profile, strict: bool, legal: Legal) -> None:
        self.problem, self.strict, self.legal = problem, strict, legal
        self.order = {name: i for i, name in enumerate(problem.forms)}
        self.pricer = Pricer(Sizes(problem.shapes, dict(problem.sizes)), profile)
        self.readers = {name: set(users) for name, users in problem.readers.items()}
        self.recipes: dict[str, Recipe] = {}
        self.inlined: dict[str, tuple[str, ...]] = {}
        self.removed: set[str] = set()
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.seconds: dict[str, float] = {}
        self.known: dict[tuple[int, str, int], tuple[AffineForm, AffineForm, Substitution]] = {}
        self.lowered: dict[int, tuple[AffineForm, Recipe | Illegal, float, list[Equal]]] = {}
        self.equal: dict[str, tuple[Equal, ...]] = {}
        for name, form in problem.forms.items():
            self.recipes[name] = self._lower(name, form)
            self.seconds[name] = self._seconds(name, self.recipes[name])
        self.original = dict(self.seconds)

    def improve(self, node: str) -> set[str]:
        """Inlines into `node` what pays, until nothing does; gives the nodes that share a value with fewer now."""
        if node in self.problem.fixed:
            return set()
        touched: set[str] = set()
        while (best := self._best(node)) is not None:
            touched |= self._accept(node, best)
        return self._concerned(touched) - {node}

    def _concerned(self, touched: set[str]) -> set[str]:
        """The nodes to look at again, and those whose cones end with them: through all but convolutions."""
        concerned: set[str] = set()
        todo = list(touched)
        while todo:
            node = todo.pop()
            if node not in self.recipes or node in self.removed or node in concerned:
                continue
            concerned.add(node)
            if not self.recipes[node].convolutions:
                todo.extend(self.readers.get(node, ()))
        return concerned

    def _best(self, node: str) -> _Candidate | None:
        now = self.seconds[node], self.recipes[node].steps
        best, margin = None, (0.0, 0)
        for candidate in self._candidates(node):
            saved = now[0] + sum(self.seconds[g] for g in candidate.gone) - candidate.seconds
            fewer = now[1] + sum(self.recipes[g].steps for g in candidate.gone) - candidate.steps
            if fewer <= 0 or self._grows(node, candidate) or not _is_float(candidate.recipe):
                continue
            if abs(saved) <= TOLERANCE * max(now[0], candidate.seconds):
                saved = 0.0  # a tie goes to fewer operators
            if (saved, fewer) > margin:
                best, margin = candidate, (saved, fewer)
            elif saved < 0:
                self._decline(node, candidate, -saved)
        if best is not None:
            for code in ("costs-more", "layout"):
                self.refusals.pop((node, code), None)
        return best

    def _grows(self, node: str, candidate: _Candidate) -> bool:
        """Whether an operator would be distributed over a sum or a concatenation: more layers, or more additions."""
        replaced = [self.recipes[n] for n in (node, *candidate.gone)]
        layers, additions = (sum(r.convolutions for r in replaced), sum(r.additions for r in replaced))
        return candidate.recipe.convolutions > layers or candidate.recipe.additions > additions

    def _candidates(self, node: str) -> Iterable[_Candidate]:
        anchors = [s for s in self.recipes[node].form.sources if s in self.recipes]
        yield from self._cone(node, lambda _: True)
        if len(anchors) > 1:
            for anchor in anchors:
                yield from self._cone(node, lambda s, a=anchor: s == a)  # type: ignore[misc]

    def _cone(self, node: str, start: Callable[[str], bool]) -> Iterable[_Candidate]:
        """Ever larger parts of the cone of values that end in `node`, nearest first."""
        form = self.recipes[node].form
        absorbed: list[str] = []
        gone: set[str] = set()
        blocked: set[str] = set()
        equal: list[Equal] = []
        frontier = {s for s in form.sources if start(s)}
        while len(absorbed) < MOST_STEPS:
            open_ = [s for s in form.sources if s in frontier - blocked and self._may_absorb(s, node, gone)]
            if not open_:
                return
            anchor = max(open_, key=lambda s: self.order[s])
            inner = self.recipes[anchor].form
            found, refused, noted = self._substituted(form, anchor, inner)
            for illegal in refused:
                self._refuse(node, illegal.code, f"{illegal.reason} ({anchor} stays apart)", illegal.hint)
            if not found:
                blocked.add(anchor)
                continue
            form = found[0]
            absorbed.append(anchor)
            equal += [*noted, *self.equal.get(anchor, ())]
            frontier |= set(inner.sources)
            gone |= {anchor} if self._read_only_by(anchor, node, gone) else set()
            for each in found:
                recipe, seconds, noted = self._priced(node, each)
                if isinstance(recipe, Illegal):  # no operator computes this much of the cone; a larger part may be one
                    self._refuse(node, recipe.code, recipe.reason, recipe.hint)
                    continue
                needed = (*equal, *noted)
                yield _Candidate(recipe, tuple(absorbed), frozenset(gone), seconds, recipe.steps, needed)

    def _substituted(self, form: AffineForm, anchor: str, inner: AffineForm) -> Substitution:
        """The form with `anchor` inlined: added to its own terms on the same values, and apart from them; and why not.

        Known from the last time, where the search starts again over forms that have not changed since.
        """
        key = id(form), anchor, id(inner)
        if key not in self.known:
            self.known[key] = form, inner, _substitute(form, anchor, inner)
        return self.known[key][2]

    def _priced(self, node: str, form: AffineForm) -> tuple[Recipe | Illegal, float, list[Equal]]:
        """The form as operators with their cost, or why no operator computes it."""
        if id(form) not in self.lowered:
            with noting() as noted:
                try:
                    recipe = self._lower(node, form, check=True)
                    self.lowered[id(form)] = form, recipe, self._seconds(node, recipe), noted
                except Illegal as illegal:
                    self.lowered[id(form)] = form, illegal, inf, noted
        return self.lowered[id(form)][1:]

    def _may_absorb(self, anchor: str, node: str, gone: set[str]) -> bool:
        if anchor not in self.recipes or anchor in self.removed:
            return False
        if self._crosses_write(anchor, node):
            self._note_held(node, anchor, "mutation", "what it reads is written before it would be read again")
            return False
        fixed = self.problem.fixed.get(anchor)
        alone = self._read_only_by(anchor, node, gone)
        if fixed is not None:
            self._note_held(node, anchor, *fixed)
            return False
        if not alone and self.recipes[anchor].convolutions:
            self._note_held(
                node, anchor, "shared", "other layers read it too, and each would need a copy of its weights"
            )
            return False
        return True

    def _crosses_write(self, anchor: str, node: str) -> bool:
        """Whether `anchor`, or what it reads, may be written between its place and that of `node`."""
        if not self.problem.writes:
            return False
        start, end = self.problem.places[anchor], self.problem.places[node]
        values = (anchor, *self.recipes[anchor].form.sources)
        return any(start < write < end for s in values for write in self.problem.writes.get(s, ()))

    def _note_held(self, node: str, anchor: str, code: str, reason: str) -> None:
        """A refusal where a merge was in sight: a scale or a batch norm after a convolution that must stay."""
        scales = not self.recipes[node].convolutions
        if scales and self.recipes[node].form.sources == (anchor,) and self.recipes[anchor].convolutions:
            self._refuse(node, code, f"{anchor} must be computed for itself: {reason}")

    def _read_only_by(self, anchor: str, node: str, gone: Iterable[str]) -> bool:
        return anchor not in self.problem.fixed and self.readers.get(anchor, set()) <= {node, *gone}

    def _accept(self, node: str, candidate: _Candidate) -> set[str]:
        """Takes the candidate; gives the other readers of the values that lost a reader by it."""
        lost = {*self.recipes[node].form.sources, *(s for g in candidate.gone for s in self.recipes[g].form.sources)}
        for source in self.recipes[node].form.sources:
            self.readers[source].discard(node)
        for name in candidate.gone:
            self.removed.add(name)
            for source in self.recipes[name].form.sources:
                self.readers[source].discard(name)
        self.recipes[node] = candidate.recipe
        self.seconds[node] = candidate.seconds
        self.equal[node] = (*self.equal.get(node, ()), *candidate.equal)
        nested = tuple(i for a in candidate.absorbed for i in (*self.inlined.get(a, ()), a))
        self.inlined[node] = tuple(dict.fromkeys((*self.inlined.get(node, ()), *nested)))
        for source in candidate.recipe.form.sources:
            self.readers.setdefault(source, set()).add(node)
        return {reader for source in lost for reader in self.readers[source]}

    def _decline(self, node: str, candidate: _Candidate, extra: float) -> None:
        whole, parts = candidate.seconds, candidate.seconds - extra
        fact = (
            f"as one {candidate.recipe.describe()} it is predicted to take {duration(whole)}, apart {duration(parts)}"
        )
        self._refuse(node, "costs-more", fact)

    def _refuse(self, node: str, code: str, reason: str, hint: str = "") -> None:
        self.refusals.setdefault((node, code), Refusal(node, code, reason, hint))

    def _lower(self, node: str, form: AffineForm, check: bool = False) -> Recipe:
        strict = check and self.strict
        recipe = lower(form, lambda r: inf if strict and r.has_zeros else self._seconds(node, r))
        if check and any(e.pads_by_channel for e in recipe.emits):
            raise Illegal("pad-value", "the padding value differs from channel to channel, which no layer offers")
        if check and recipe.dims == 0:
            self._check_rows(self.problem.shapes.of[node], recipe)
        if strict and recipe.has_zeros:
            fact = f"{recipe.describe()} would have zeros where the branches do not read: with them inf becomes nan"
            raise Illegal("non-finite", fact)
        if check:
            self.legal(recipe)
        return recipe

    def _check_rows(self, out: Shape, recipe: Recipe) -> None:
        for source in recipe.form.sources:
            if not self.problem.shapes.same_before(out, self.problem.shapes.of[source], 1):
                raise Illegal("layout", "the axes before the channels were reshaped, and are not reshaped back")

    def _seconds(self, node: str, recipe: Recipe) -> float:
        return self.pricer.seconds(recipe, self.problem.shapes.of[node], self.problem.shapes.of.__getitem__)

    def plan(self) -> Plan:
        decisions = {
            node: Decision(
                node, self.recipes[node], tuple(sorted(inlined, key=self.order.__getitem__)),
                self.original[node] + sum(self.original[i] for i in inlined if i in self.removed), self.seconds[node],
                self.equal.get(node, ()),
            )
            for node, inlined in self.inlined.items() if node not in self.removed
        }  # fmt: skip
        refusals = tuple(r for r in self.refusals.values() if r.node not in self.removed)
        after = sum(s for n, s in self.seconds.items() if n not in self.removed)
        return Plan(decisions, frozenset(self.removed), refusals, sum(self.original.values()), after)
