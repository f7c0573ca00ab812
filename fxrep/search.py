"""Which values to compute at all: every affine value starts materialised, and is inlined into its users where that is
legal and not dearer. Works on forms and shapes; no tensors (but where a padding value is compared with a bias)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from math import fsum, inf

from fxrep import kernel as K
from fxrep.affine import AffineConv
from fxrep.cost import Aim
from fxrep.equal import Equal, noting
from fxrep.errors import Illegal, Refusal
from fxrep.evaluation import has_zeros
from fxrep.form import AffineForm
from fxrep.frozen import replace
from fxrep.lower import Recipe, lower, total
from fxrep.parts import Anchor, Term, merge_where, merged_terms, weights_of
from fxrep.plan import Legal, Plan, Problem
from fxrep.siblings import merge_siblings
from fxrep.state import Candidate, State

TOLERANCE = 1e-9  # relative; below it two costs are a tie
MOST_STEPS = 64  # of one cone: an affine region this long without a merge that pays is left as it is
APART = "nothing, they are better apart"
MOST_DETOURS = 4  # around values of a cone that no operator computes


#: The form that comes of an inlining, or why none does, and what had to be equal for it.
Substitution = tuple[AffineForm | Illegal, list[Equal]]


def make_plan(problem: Problem, aim: Aim, strict: bool = False, legal: Legal = lambda _: None) -> Plan:
    """Greedy in graph order: for each affine value its cone of values that nobody else reads, the best prefix of it;
    then for each scale all of its readers at once, or the layer before the average before it; and again, until nothing
    is found.

    `strict` allows no kernel with zeros that the model does not multiply by: 0·∞ is not a number. `legal` raises
    Illegal for a recipe that may not be taken for some other reason.
    """
    search = _Search(problem, aim, strict, legal)
    todo = dict.fromkeys(name for name in problem.forms if problem.readers[name])
    while todo:
        queue, waiting = deque(todo), set(todo)
        while queue:
            node = queue.popleft()
            waiting.discard(node)
            again = [n for n in search.in_order(search.improve(node)) if n not in waiting]
            queue.extend(again)
            waiting.update(again)
        looks = (search.spread, search.sink)
        found = (n for node in tuple(search.state.recipes) for look in looks for n in search.in_order(look(node)))
        todo = dict.fromkeys(found)
    merge_siblings(search.state)
    return search.state.plan(search.refusals.values())


def _has_floats(recipe: Recipe) -> bool:
    """Whether it has numbers of the model: those are floats."""
    return recipe.convolutions > 0 or any(True for e in recipe.emits for _ in K.leaves(e.gain, e.bias))


def _why_apart(one: Term, a: Term, b: Term) -> tuple[str, str]:
    """The code and the reason why two terms on one value are not one operator, although that is legal."""
    wide, narrow = weights_of(one), weights_of(a) + weights_of(b)
    if wide > narrow:
        return "costs-more", f"as one operator two terms of it would have {wide} weights, apart they have {narrow}"
    fact = "one operator would have zeros where its terms do not read"
    return "non-finite", f"{fact}: with them inf becomes nan"


class _Search:
    """Tries candidates for a value, and notes why what was in sight was not taken."""

    def __init__(self, problem: Problem, aim: Aim, strict: bool, legal: Legal) -> None:
        self.problem, self.strict, self.legal = problem, strict, legal
        self.join = merge_where(self._is_free)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.known: dict[tuple[int, str, int], tuple[AffineForm, AffineForm, Substitution]] = {}
        self.lowered: dict[int, tuple[AffineForm, Recipe | Illegal, float, list[Equal]]] = {}
        self.state = State(problem, aim)
        for name, form in problem.forms.items():
            self.state.start(name, self._lower(name, form))

    def in_order(self, nodes: set[str]) -> list[str]:
        """In graph order, so that a plan is the same in every process."""
        return sorted(nodes, key=lambda n: (self.state.order[n], n))

    def improve(self, node: str) -> set[str]:
        """Inlines into `node` what pays, until nothing does; gives the values to look at again."""
        if node in self.problem.fixed or node in self.state.removed:
            return set()
        touched: set[str] = set()
        best = self._best(node)
        if best is None:
            return set()
        while best is not None:
            touched |= self.state.accept(node, best)
            best = self._best(node)
        terms = self.state.split(node)
        if terms:
            touched |= {*terms, *self.state.readers.get(node, ())}
        return self._concerned(touched) - {node}

    def spread(self, node: str) -> set[str]:
        """Inlines a value without layers into all that read it at once, where only that pays."""
        state = self.state
        readers = self._readers_through_views(node)
        if len(readers) < 2 or node in state.removed or node in self.problem.fixed or state.recipes[node].convolutions:
            return set()
        chosen: dict[str, Candidate] = {}
        for reader in readers:
            options = [c for c in self._candidates(reader) if node in c.absorbed and self._is_float(c.recipe)]
            if not options:
                return set()
            chosen[reader] = min(options, key=lambda c: (c.cost, c.steps))
        replaced = {node, *readers, *(g for c in chosen.values() for g in c.gone)}
        saved = fsum((*(state.costs[r] for r in replaced), *(-c.cost for c in chosen.values())))
        fewer = sum(state.recipes[r].steps for r in replaced) - sum(c.steps for c in chosen.values())
        effort = total(state.effort(r, c.recipe) for r, c in chosen.items())
        recipes = {r: c.recipe for r, c in chosen.items()}
        if fewer <= 0 or saved < 0 or effort.exceeds(total(state.efforts[r] for r in replaced)):
            return set()
        if self._stores_more(recipes, replaced):
            return set()
        touched = {r for reader, candidate in chosen.items() for r in state.accept(reader, candidate)}
        return self._concerned(touched | set(chosen))

    def sink(self, node: str) -> set[str]:
        """Moves a scale before the average that it follows, into the layer there: γ·mean(x) + β = mean(γ·x + β)."""
        state = self.state
        pool = self._averaged(node)
        if pool is None:
            return set()
        (layer,), own, inner = state.sources(pool), state.recipes[node].form, state.recipes[pool].form
        (part,) = own.parts
        moved = replace(own, parts=(replace(part, terms={Anchor(layer): t for t in part.terms.values()}),))
        form, noted = self._substituted(moved, layer, state.recipes[layer].form)
        if isinstance(form, Illegal) or own.dims not in (None, inner.dims):
            return set()
        recipe, cost, equal = self._priced(layer, form)
        apart = total(state.efforts[n] for n in (node, pool, layer))
        if isinstance(recipe, Illegal) or state.effort(layer, recipe).exceeds(apart):
            return set()
        if cost > state.costs[layer] + state.costs[node] or self._stores_more({node: recipe}, (layer,)):
            return set()
        candidate = Candidate(recipe, (layer,), frozenset((layer,)), cost, (*noted, *equal))
        self._withdraw(node)
        return self._concerned(state.sink(node, pool, candidate))

    def _averaged(self, node: str) -> str | None:
        """The average without a border that the value is a scale of, if a layer is before it and nobody else reads."""
        state, recipe = self.state, self.state.recipes[node]
        if node in state.removed or node in self.problem.fixed or recipe.convolutions or recipe.steps != 1:
            return None
        emit, *others = recipe.emits
        if others:
            return None
        (pool,) = state.sources(node)
        averages = state.recipes[pool].emits if pool in state.recipes and self._may_follow(pool, node) else ()
        plain = [e.is_pool and e.operator and not e.operator.pads and e.anchor.rows is None for e in averages]
        if emit.is_pad or emit.anchor.rows is not None or plain != [True]:
            return None
        (layer,) = state.sources(pool)
        is_layer = layer in state.recipes and state.recipes[layer].convolutions
        return pool if is_layer and self._may_follow(layer, pool) and not self._crosses_write(layer, node) else None

    def _may_follow(self, anchor: str, node: str) -> bool:
        return self._may_absorb(anchor, node, set()) and self.state.is_read_only_by(anchor, {node})

    def _readers_through_views(self, node: str) -> list[str]:
        """Who computes something of the value, if all who read it do."""
        found: dict[str, None] = {}
        todo, seen = list(self.state.readers.get(node, ())), set[str]()
        while todo:
            reader = todo.pop()
            if reader in seen:
                continue
            seen.add(reader)
            recipe = self.state.recipes.get(reader)
            if recipe is None or reader in self.problem.fixed:
                return []
            if recipe.steps:
                found[reader] = None
            else:
                todo += self.state.readers.get(reader, ())
        return sorted(found, key=self.state.order.__getitem__)

    def _concerned(self, touched: set[str]) -> set[str]:
        """The nodes to look at again, and those whose cones end with them: through all but convolutions."""
        concerned: set[str] = set()
        todo = list(touched)
        while todo:
            node = todo.pop()
            if node not in self.state.recipes or node in self.state.removed or node in concerned:
                continue
            concerned.add(node)
            if not self.state.recipes[node].convolutions:
                todo.extend(self.state.readers.get(node, ()))
        return concerned

    def _best(self, node: str) -> Candidate | None:
        state = self.state
        cost, steps = state.costs[node], state.recipes[node].steps
        best, margin = None, (0.0, 0)
        smaller: list[Candidate] = []
        for candidate in self._candidates(node):
            fewer = steps + sum(state.recipes[g].steps for g in candidate.gone) - candidate.steps
            if fewer <= 0 or not self._is_float(candidate.recipe) or self._grows(node, candidate, smaller):
                continue
            smaller.append(candidate)
            saved = state.saved((node, *candidate.gone), node, candidate.recipe, candidate.cost)
            tie = TOLERANCE * max(cost, candidate.cost)
            if abs(saved) <= tie:
                saved = 0.0  # a tie goes to fewer operators
            if saved - margin[0] > tie or (abs(saved - margin[0]) <= tie and fewer > margin[1]):
                best, margin = candidate, (saved, fewer)  # of equal ones the smallest: what is left may be of use
            elif saved < 0:
                self._decline(node, candidate, -saved)
        if best is not None:
            self._withdraw(node)
            self._note_apart(node, best.recipe.form)
        return best

    def _is_float(self, recipe: Recipe) -> bool:
        """Whether the result is certainly a float: scales of plain numbers might act on integers."""
        read = (self.state.recipes.get(source) for source in recipe.form.sources)
        scales = (e for e in recipe.emits if not (e.is_pass or e.is_pad))
        return not any(scales) or any(r is not None and _has_floats(r) for r in (recipe, *read))

    def _grows(self, node: str, candidate: Candidate, smaller: Iterable[Candidate]) -> bool:
        """Whether there would be more layers, additions, multiply-adds or weights than in what is replaced, or than in
        a smaller candidate and what is replaced beside it: what one merge saves is not for another to spend."""
        whole = self.state.effort(node, candidate.recipe)
        apart = total(self.state.efforts[n] for n in (node, *candidate.gone))
        within = [s for s in smaller if s.gone <= candidate.gone]
        beside = (
            total((self.state.effort(node, s.recipe), *(self.state.efforts[g] for g in candidate.gone - s.gone)))
            for s in within
        )
        exceeded = next((e for e in (apart, *beside) if whole.exceeds(e)), None)
        if exceeded is not None:
            fact = f"as one {candidate.recipe.describe()} it would need {whole.beyond(exceeded)}"
            self._refuse(node, "costs-more", fact, APART)
            return True
        more = self._stores_more({node: candidate.recipe}, candidate.gone)
        if more:
            self._refuse(node, "costs-more", more, APART)
        return bool(more)

    def _stores_more(self, recipes: Mapping[str, Recipe], gone: Iterable[str]) -> str:
        """That values which must be lean store more numbers than what they replace, if they do."""
        state = self.state
        if not any(state.hosts.get(node, node) in self.problem.lean for node in recipes):
            return ""
        stored, behind = sum(r.numbers for r in recipes.values()), state.numbers_behind({*recipes, *gone})
        return f"it would store {stored:,} numbers in the place of {behind:,}" if stored > behind else ""

    def _candidates(self, node: str) -> Iterable[Candidate]:
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
            open_ = [s for s in form.sources if s in frontier - blocked and self._may_absorb(s, node, gone)]
            if not open_:
                break
            anchor = max(open_, key=state.order.__getitem__)
            inner = state.recipes[anchor].form
            larger, noted = self._substituted(form, anchor, inner)
            if isinstance(larger, Illegal):
                self._refuse(node, larger.code, f"{larger.reason} ({anchor} stays apart)", larger.hint)
                blocked.add(anchor)
                continue
            form = larger
            absorbed.append(anchor)
            equal += [*noted, *state.equal.get(anchor, ())]
            self._note_apart(node, form)
            frontier |= set(inner.sources)
            gone |= {anchor} if state.is_read_only_by(anchor, {node, *gone}) else set()
            recipe, cost, noted = self._priced(node, form)
            if isinstance(recipe, Illegal):  # no operator computes this much of the cone; a larger part may be one
                self._refuse(node, recipe.code, recipe.reason, recipe.hint)
                stuck = stuck or anchor
                continue
            stuck = ""
            yield Candidate(recipe, tuple(absorbed), frozenset(gone), cost, (*equal, *noted))
        if stuck and len(avoided) < MOST_DETOURS:
            yield from self._cone(node, start, avoided | {stuck})

    def _substituted(self, form: AffineForm, anchor: str, inner: AffineForm) -> Substitution:
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

    def _priced(self, node: str, form: AffineForm) -> tuple[Recipe | Illegal, float, list[Equal]]:
        """The form as operators with their cost, or why no operator computes it."""
        if id(form) not in self.lowered:
            with noting() as noted:
                try:
                    recipe = self._lower(node, form, check=True)
                    self.lowered[id(form)] = form, recipe, self.state.cost(node, recipe), noted
                except Illegal as illegal:
                    self.lowered[id(form)] = form, illegal, inf, noted
        return self.lowered[id(form)][1:]

    def _is_free(self, one: Term, a: Term, b: Term) -> bool:
        """Whether one operator has no more weights than two, and, if `strict`, no zeros."""
        if self.strict and isinstance(one, AffineConv) and has_zeros(one.weight):
            return False
        return weights_of(one) <= weights_of(a) + weights_of(b)

    def _note_apart(self, node: str, form: AffineForm) -> None:
        """A refusal for each pair of terms on one value that are not one operator."""
        for part in form.parts:
            for (a, s), (b, t) in combinations(part.terms.items(), 2):
                if (a.source, a.rows) != (b.source, b.rows):
                    continue
                try:
                    one = merged_terms((a, s), (b, t))[1]
                except Illegal as illegal:
                    self._refuse(node, illegal.code, illegal.reason, illegal.hint)
                    continue
                self._refuse(node, *_why_apart(one, s, t))

    def _may_absorb(self, anchor: str, node: str, gone: set[str]) -> bool:
        if anchor not in self.state.recipes or anchor in self.state.removed:
            return False
        if self._crosses_write(anchor, node):
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

    def _crosses_write(self, anchor: str, node: str) -> bool:
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
            self._refuse(node, code, f"{anchor} must be computed for itself: {reason}")

    def _decline(self, node: str, candidate: Candidate, extra: float) -> None:
        whole, apart = candidate.cost, candidate.cost - extra
        told = self.state.pricer.aim.told(whole, apart)
        self._refuse(node, "costs-more", f"as one {candidate.recipe.describe()} {told}")

    def _refuse(self, node: str, code: str, reason: str, hint: str = "") -> None:
        self.refusals.setdefault((node, code), Refusal(node, code, reason, hint))

    def _withdraw(self, node: str) -> None:
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
