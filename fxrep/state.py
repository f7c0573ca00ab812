"""A plan while it is made: how each value is computed now, who reads it, and what it costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from math import fsum
from typing import NamedTuple

from fxrep import affine
from fxrep.cost import Aim
from fxrep.equal import Equal
from fxrep.errors import Refusal
from fxrep.form import AffineForm
from fxrep.frozen import replace
from fxrep.lower import Emit, Recipe
from fxrep.parts import ONE, Anchor, Gain, Part, Term, keep_apart
from fxrep.plan import Decision, Plan, Problem
from fxrep.pricing import Effort, Job, Price, Pricer, Sizes, numbers_behind
from fxrep.shapes import Shape


class Candidate(NamedTuple):
    """A recipe for a node with `absorbed` inlined, of which `gone` need not be computed any more."""

    recipe: Recipe
    absorbed: tuple[str, ...]
    gone: frozenset[str]
    equal: tuple[Equal, ...] = ()


class State:
    """Every value starts computed. What a decision has for a term is a value too, with a name of its own: it may be
    folded further, or into other values, as a layer of the model may."""

    def __init__(self, problem: Problem, aim: Aim) -> None:
        self.problem = problem
        self.pricer = Pricer(Sizes(problem.shapes, dict(problem.sizes)), aim)
        self.order: dict[str, float] = {name: i for i, name in enumerate(problem.forms)}
        self.shapes = dict(problem.shapes.of)
        self.readers = {name: set(users) for name, users in problem.readers.items()}
        #: by value: what it reads besides the sources of its form while the model computes it, for a size or to look
        #: through
        self.asked: dict[str, set[str]] = {}
        for name, users in problem.readers.items():
            for user in users:
                if user in problem.forms and name not in problem.forms[user].sources:
                    self.asked.setdefault(user, set()).add(name)
        self.recipes: dict[str, Recipe] = {}
        self.costs: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.efforts: dict[str, Effort] = {}
        self.inlined: dict[str, tuple[str, ...]] = {}
        self.removed: set[str] = set()
        #: by term: the value of the graph whose term it was
        self.hosts: dict[str, str] = {}
        self.original: dict[str, float] = {}
        self.equal: dict[str, tuple[Equal, ...]] = {}

    def start(self, node: str, recipe: Recipe) -> None:
        """The value as the model computes it."""
        self._set(node, recipe, written=False)
        self.original[node] = self.seconds[node]

    def _set(self, node: str, recipe: Recipe, written: bool = True) -> None:
        self.recipes[node] = recipe
        self.costs[node], self.efforts[node] = self.price(node, recipe, written)
        self.seconds[node] = self._seconds(node, recipe)

    def _seconds(self, node: str, recipe: Recipe) -> float:
        if self.pricer.aim.objective == "latency":
            return self.costs[node]
        return self.pricer.seconds(recipe, self.shapes[node], self.shapes.__getitem__)

    def cost(self, node: str, recipe: Recipe) -> float:
        return self.price(node, recipe).cost

    def price(self, node: str, recipe: Recipe, written: bool = True) -> Price:
        return self.pricer.price(recipe, self.shapes[node], self.shapes.__getitem__, written)

    def saved(self, replaced: Sequence[str], node: str, recipe: Recipe, cost: float) -> float:
        """What a recipe costs less than the values that it replaces; measured where the prediction is unsure."""
        before, aim = [self.costs[n] for n in replaced], self.pricer.aim
        saved = fsum((*before, -cost))
        if aim.trial is None or not aim.is_unsure(saved, fsum(before)):
            return saved
        measured = aim.trial([self._job(n, self.recipes[n]) for n in replaced], [self._job(node, recipe)])
        return saved if measured is None else measured

    def share(self, members: Sequence[str], stacked: Recipe, views: Sequence[Recipe]) -> None:
        """One layer, where the first of its members stands, and every member the view of its channels."""
        name, first = self.shared_name(members), members[0]
        self.hosts[name], self.order[name] = first, self.order[first] - 0.5
        self.inlined[name] = tuple(i for m in members for i in (*self.inlined.get(m, ()), m) if i != first)
        self.equal[name] = tuple(e for m in members for e in self.equal.get(m, ()))
        self._stops_reading(members)
        self._set(name, stacked)
        self._starts_reading(name)
        self.readers[name] = set(members)
        for member, view in zip(members, views, strict=True):
            self.inlined.setdefault(member, ())
            self._set(member, view)

    @staticmethod
    def shared_name(members: Sequence[str]) -> str:
        return f"{members[0]}.siblings"

    def _job(self, node: str, recipe: Recipe) -> Job:
        return self.pricer.job(recipe, self.shapes[node], self.shapes.__getitem__)

    def effort(self, node: str, recipe: Recipe) -> Effort:
        return self.price(node, recipe).effort

    def numbers_behind(self, nodes: Collection[str]) -> int:
        """How many numbers the model computes values from, with all that is in them and computed for nobody else."""
        within = {i for n in nodes for i in (n, *self.inlined.get(n, ()))}
        forms = (self.problem.forms.get(n) for n in within if n in nodes or n in self.removed)
        return sum(numbers_behind(form) for form in forms if form is not None)

    def place(self, node: str) -> int:
        return self.problem.places[self.hosts.get(node, node)]

    def sources(self, node: str) -> tuple[str, ...]:
        return self.recipes[node].form.sources

    def is_read_only_by(self, anchor: str, nodes: Iterable[str]) -> bool:
        return anchor not in self.problem.fixed and self.readers.get(anchor, set()) <= {*nodes}

    def accept(self, node: str, candidate: Candidate) -> set[str]:
        """Takes the candidate; gives the other readers of the values that lost a reader by it."""
        lost = self._stops_reading((node, *candidate.gone))
        self.removed |= candidate.gone
        self._set(node, candidate.recipe)
        self._inline(node, candidate.absorbed)
        self.equal[node] = (*self.equal.get(node, ()), *candidate.equal)
        self._starts_reading(node)
        lost |= self._sweep(node, lost)
        return {reader for source in lost for reader in self.readers[source]}

    def _starts_reading(self, node: str) -> None:
        for source in self.sources(node):
            self.readers.setdefault(source, set()).add(node)

    def _stops_reading(self, nodes: Iterable[str]) -> set[str]:
        """Gives the values that lost a reader."""
        lost = set[str]()
        for name in nodes:
            read = {*self.sources(name), *self.asked.pop(name, ())}
            for source in read:
                self.readers[source].discard(name)
            lost |= read
        return lost

    def _inline(self, node: str, absorbed: Iterable[str]) -> None:
        nested = (i for a in absorbed for i in (*self.inlined.get(a, ()), a))
        self.inlined[node] = tuple(dict.fromkeys((*self.inlined.get(node, ()), *nested)))

    def _sweep(self, node: str, lost: set[str]) -> set[str]:
        """Removes what nobody reads any more, on account of `node`; gives what that was computed from."""
        todo, found = list(lost), set[str]()
        while todo:
            name = todo.pop()
            if self.readers[name] or name not in self.recipes or name in self.problem.fixed or name in self.removed:
                continue
            self.removed.add(name)
            self._inline(node, [name])
            read = self._stops_reading([name])
            found |= read
            todo += read
        return found

    def sink(self, node: str, pool: str, inner: Candidate) -> set[str]:
        """The average of `pool` over a value of its own, which `inner` computes; gives both."""
        (layer,), (emit,) = self.sources(pool), self.recipes[pool].emits
        name, dims = self._new_name(node), self.recipes[pool].dims
        self.hosts[name] = self.hosts.get(node, node)
        self.order[name], self.shapes[name] = self.order[node] - 0.25, self.shapes[layer]
        self._inline(name, inner.absorbed)
        self.equal[name] = (*self.equal.get(layer, ()), *inner.equal)
        self._stops_reading((node, pool, layer))
        self.removed |= {pool, layer}
        self._set(name, inner.recipe)
        self._starts_reading(name)
        anchor = Anchor(name)
        channels = emit.operator.out_channels if emit.operator else None
        form = AffineForm((Part({anchor: emit.operator or ONE}, None, channels),), dims)
        self._set(node, Recipe(form, ((replace(emit, anchor=anchor),),)))
        self._inline(node, (pool, *inner.absorbed))
        self.readers[name] = {node}
        return {name, node}

    def _new_name(self, node: str) -> str:
        return next(name for name in (f"{node}.{i}" for i in count()) if name not in self.recipes)

    def split(self, node: str) -> list[str]:
        """Makes every sum that a decision stacks, and every term of a sum, a value of its own; gives their names."""
        recipe, made = self.recipes[node], list[str]()
        if node not in self.inlined or node in self.problem.fixed or not recipe.form.aligned:
            return []
        if len(recipe.parts) == 1 and not recipe.additions:
            return []
        emits = tuple(
            self._split_part(node, part, terms, made)
            for part, terms in zip(recipe.form.parts, recipe.parts, strict=True)
        )
        if not made:
            return []
        parts = tuple(
            Part(dict.fromkeys((e.anchor for e in terms), ONE), None, part.channels)
            for part, terms in zip(recipe.form.parts, emits, strict=True)
        )
        self._stops_reading([node])
        self._set(node, Recipe(replace(recipe.form, parts=parts), emits))
        self._starts_reading(node)
        return [*made, *(name for term in made for name in self.split(term))]

    def _split_part(self, node: str, part: Part, terms: tuple[Emit, ...], made: list[str]) -> tuple[Emit, ...]:
        if len(terms) > 1 and len(self.recipes[node].parts) > 1:
            form = AffineForm((part,), self.recipes[node].dims)
            return (self._value_of_its_own(node, Recipe(form, (terms,)), made),)
        return tuple(e if e.is_pass else self._term(node, e, part, made) for e in terms)

    def _term(self, node: str, emit: Emit, part: Part, made: list[str]) -> Emit:
        anchor, dims = emit.anchor.unslotted, self.recipes[node].dims
        form = AffineForm((Part({anchor: _term_of(emit, part.channels, dims)}, emit.kernels[1], part.channels),), dims)
        return self._value_of_its_own(node, Recipe(form, ((replace(emit, anchor=anchor),),)), made)

    def _value_of_its_own(self, node: str, recipe: Recipe, made: list[str]) -> Emit:
        """What a decision has computed by a recipe as a value of its own; gives the emit that passes that value on."""
        name = self._new_name(node)
        made.append(name)
        self.hosts[name] = self.hosts.get(node, node)
        self.order[name] = self.order[node] - 0.5 / (1 + len(made))
        self.shapes[name] = self.shape_of(node, recipe.form.channels, recipe.dims)
        self.inlined[name] = tuple(dict.fromkeys((*self.inlined[node], node)))
        self.equal[name] = self.equal.get(node, ())
        self._set(name, recipe)
        self._starts_reading(name)
        return Emit(Anchor(name))

    def shape_of(self, node: str, channels: int | None, dims: int | None) -> Shape:
        """That of the node, with the channels of one of its parts."""
        shape = self.problem.shapes.full(self.shapes[node])
        if len(self.recipes[node].parts) == 1 or channels is None or dims is None:
            return shape
        return self.with_channels(node, channels, dims)

    def with_channels(self, node: str, channels: int, dims: int) -> Shape:
        """The shape of the node, with another number of channels."""
        shape = self.problem.shapes.full(self.shapes[node])
        return Shape(shape.root, (*shape.tail[: -dims - 1], channels, *shape.tail[len(shape.tail) - dims :]))

    def plan(self, refusals: Iterable[Refusal]) -> Plan:
        """What was decided, with the terms back in the values that they are terms of."""
        folded_back = {n for n in self.hosts if n not in self.removed and self._is_only_passed_on(n)}
        decided = sorted((n for n in self.inlined if n not in self.removed and n not in folded_back), key=self._order)
        decisions = {n: self._decision(n, folded_back) for n in decided}
        gone = frozenset(n for n in self.removed if n not in self.hosts)
        after = sum(s for n, s in self.seconds.items() if n not in self.removed)
        kept = tuple(r for r in refusals if r.node not in self.removed and r.node not in self.hosts)
        return Plan(decisions, gone, kept, sum(self.original.values()), after)

    def _is_only_passed_on(self, term: str) -> bool:
        """Whether one decision alone reads the term, as a term of its sum as it is."""
        (reader, *others) = self.readers[term] or {""}
        if others or reader not in self.inlined or len(self.recipes[term].parts) > 1:
            return False
        emits = [e for e in self.recipes[reader].emits if e.anchor.source == term]
        return len(emits) == 1 and emits[0].is_pass and emits[0].anchor.rows is None

    def _decision(self, node: str, folded_back: set[str]) -> Decision:
        recipe, seconds = self._whole(node, folded_back)
        within = [node, *self._folded_back(node, folded_back)]
        names = {i for n in within for i in self.inlined[n] if i not in self.hosts and i != node}
        inlined = tuple(sorted(names, key=self._order))
        equal = tuple({id(e): e for n in within for e in self.equal.get(n, ())}.values())
        if node in self.hosts:  # what it takes is counted with what reads it
            return Decision(node, recipe, inlined, self.hosts[node], 0.0, 0.0, equal)
        terms = (n for n in recipe.form.sources if n in self.hosts and min(self.readers[n], key=self._order) == node)
        seconds += sum(self.seconds[n] for n in terms)
        before = sum(self.original[i] for i in (node, *inlined) if i in self.removed or i == node)
        return Decision(node, recipe, inlined, node, before, seconds, equal)

    def _folded_back(self, node: str, folded_back: set[str]) -> Iterator[str]:
        """The terms that are in the value again, and theirs."""
        for source in self.sources(node):
            if source in folded_back:
                yield source
                yield from self._folded_back(source, folded_back)

    def _order(self, node: str) -> float:
        return self.order[node]

    def _whole(self, node: str, folded_back: set[str]) -> tuple[Recipe, float]:
        """The recipe with the terms that are read by nobody else in it again, and what it takes."""
        form, seconds = self.recipes[node].form, self.seconds[node]
        parts: list[tuple[Emit, ...]] = []
        for part in self.recipes[node].parts:
            emits: list[Emit] = []
            for emit in part:
                if emit.anchor.source in folded_back:
                    inner, taken = self._whole(emit.anchor.source, folded_back)
                    form, seconds = form.substitute(emit.anchor.source, inner.form, keep_apart), seconds + taken
                    emits += inner.parts[0]
                else:
                    emits.append(emit)
            parts.append(tuple(emits))
        return Recipe(form, tuple(parts)), seconds


def _term_of(emit: Emit, channels: int | None, dims: int | None) -> Term:
    if emit.operator is not None:
        return emit.operator.without_bias()
    if emit.gain is None:
        return ONE
    if not emit.gain.shape or channels is None:
        return Gain(emit.gain)
    return affine.diagonal(emit.gain, channels, dims or 0)
