"""Which values to compute at all: every affine value starts materialised, and is inlined into its users where that is
legal and not dearer. Works on forms and shapes; no tensors (but where a padding value is compared with a bias)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from math import fsum

from fxrep.candidates import Candidates
from fxrep.cost import Aim
from fxrep.errors import Illegal
from fxrep.frozen import replace
from fxrep.lower import Recipe
from fxrep.parts import Anchor
from fxrep.plan import Legal, Plan, Problem
from fxrep.pricing import Effort, total
from fxrep.siblings import merge_siblings
from fxrep.state import Candidate

TOLERANCE = 1e-9  # relative; below it two costs are a tie
APART = "nothing, they are better apart"


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


def _is_dearer(costs: Iterable[float], apart: Iterable[float]) -> bool:
    """Whether the one costs more than the other, beyond a tie."""
    return fsum(costs) > fsum(apart) * (1 + TOLERANCE)


class _Search(Candidates):
    """Takes candidates, one value or several at a time."""

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
        if node in state.removed or node in self.problem.fixed or state.recipes[node].convolutions:
            return set()
        readers = self._readers_through_views(node)
        if len(readers) < 2:
            return set()
        chosen: dict[str, Candidate] = {}
        for reader in readers:
            options = [c for c in self.candidates(reader) if node in c.absorbed and self.is_float(reader, c.recipe)]
            if not options:
                return set()
            chosen[reader] = min(options, key=lambda c: (state.cost(reader, c.recipe), c.recipe.steps))
        replaced = {node, *readers, *(g for c in chosen.values() for g in c.gone)}
        fewer = sum(state.recipes[r].steps for r in replaced) - sum(c.recipe.steps for c in chosen.values())
        effort = total(state.effort(r, c.recipe) for r, c in chosen.items())
        costs = (state.cost(r, c.recipe) for r, c in chosen.items())
        dearer = _is_dearer(costs, (state.costs[r] for r in replaced))
        if fewer <= 0 or dearer or effort.exceeds(total(state.efforts[r] for r in replaced)):
            return set()
        if self._stores_more({r: c.recipe for r, c in chosen.items()}, replaced):
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
        form, noted = self.substituted(moved, layer, state.recipes[layer].form)
        if isinstance(form, Illegal) or own.dims not in (None, inner.dims):
            return set()
        recipe, equal = self.lowered(layer, form)
        apart = total(state.efforts[n] for n in (node, pool, layer))
        if isinstance(recipe, Illegal) or state.effort(layer, recipe).exceeds(apart):
            return set()
        candidate = Candidate(recipe, (layer,), frozenset((layer,)), (*noted, *equal))
        dearer = _is_dearer((state.cost(layer, recipe),), (state.costs[layer], state.costs[node]))
        if dearer or self._stores_more({node: recipe}, (layer,)):
            return set()
        self.withdraw(node)
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
        return pool if is_layer and self._may_follow(layer, pool) and not self.crosses_write(layer, node) else None

    def _may_follow(self, anchor: str, node: str) -> bool:
        return self.may_absorb(anchor, node, set()) and self.state.is_read_only_by(anchor, {node})

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
        """The nodes to look at again, and all whose cones may reach them."""
        concerned: set[str] = set()
        todo = list(touched)
        while todo:
            node = todo.pop()
            if node not in self.state.recipes or node in self.state.removed or node in concerned:
                continue
            concerned.add(node)
            todo.extend(self.state.readers.get(node, ()))
        return concerned

    def _best(self, node: str) -> Candidate | None:
        state = self.state
        apart, steps = state.costs[node], state.recipes[node].steps
        best, margin = None, (0.0, 0)
        smaller: list[tuple[frozenset[str], Effort]] = []
        for candidate in self.candidates(node):
            fewer = steps + sum(state.recipes[g].steps for g in candidate.gone) - candidate.recipe.steps
            if fewer <= 0 or not self.is_float(node, candidate.recipe):
                continue
            cost, effort = state.price(node, candidate.recipe)
            if self._grows(node, candidate, effort, smaller):
                continue
            smaller.append((candidate.gone, effort))
            saved = state.saved((node, *candidate.gone), node, candidate.recipe, cost)
            tie = TOLERANCE * max(apart, cost)
            if abs(saved) <= tie:
                saved = 0.0  # a tie goes to fewer operators
            if saved - margin[0] > tie or (abs(saved - margin[0]) <= tie and fewer > margin[1]):
                best, margin = candidate, (saved, fewer)  # of equal ones the smallest: what is left may be of use
            elif saved < 0:
                self.decline(node, candidate, -saved)
        if best is not None:
            self.withdraw(node)
            self.note_apart(node, best.recipe.form)
        return best

    def _grows(
        self, node: str, candidate: Candidate, whole: Effort, smaller: Iterable[tuple[frozenset[str], Effort]]
    ) -> bool:
        """Whether there would be more layers, additions, multiply-adds or weights than in what is replaced, or than in
        a smaller candidate and what is replaced beside it: what one merge saves is not for another to spend."""
        efforts, gone = self.state.efforts, candidate.gone
        apart = total(efforts[n] for n in (node, *gone))
        beside = (total((effort, *(efforts[g] for g in gone - own))) for own, effort in smaller if own <= gone)
        exceeded = next((e for e in (apart, *beside) if whole.exceeds(e)), None)
        if exceeded is not None:
            fact = f"as one {candidate.recipe.describe()} it would need {whole.beyond(exceeded)}"
            self.refuse(node, "costs-more", fact, APART)
            return True
        more = self._stores_more({node: candidate.recipe}, candidate.gone)
        if more:
            self.refuse(node, "costs-more", more, APART)
        return bool(more)

    def _stores_more(self, recipes: Mapping[str, Recipe], gone: Iterable[str]) -> str:
        """That values which must be lean store more numbers than what they replace, if they do."""
        state = self.state
        if not any(state.hosts.get(node, node) in self.problem.lean for node in recipes):
            return ""
        stored, behind = sum(r.numbers for r in recipes.values()), state.numbers_behind({*recipes, *gone})
        return f"it would store {stored:,} numbers in the place of {behind:,}" if stored > behind else ""
