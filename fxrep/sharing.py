"""Whose numbers are the same by construction: layers that several calls share, and what a plan stores in all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from fxrep import kernel as K
from fxrep.form import AffineForm
from fxrep.frozen import arguments
from fxrep.kernel import Kernel
from fxrep.lower import Emit
from fxrep.ownership import memory_of
from fxrep.plan import Decision, Plan


@dataclass
class Keys:
    """What two expressions have in common exactly if they give the same numbers for all numbers of their leaves, as far
    as their form tells."""

    known: dict[Any, int] = field(default_factory=dict)
    of_kernel: dict[int, int] = field(default_factory=dict)
    emits: dict[int, int] = field(default_factory=dict)
    #: what is known by its identity must live as long as that is compared
    held: list[Kernel | Emit] = field(default_factory=list)

    def of_emit(self, emit: Emit) -> int:
        """Of a layer: its geometry and the expressions of its numbers."""
        if id(emit) not in self.emits:
            self.held.append(emit)
            self.emits[id(emit)] = self._number(self._of_layer(emit))
        return self.emits[id(emit)]

    def shared(self, emits: Iterable[Emit]) -> dict[int, int]:
        """By emit: what it has in common with the equal layers among them, where there may be one."""
        alike: dict[Any, list[Emit]] = {}
        for emit in emits:
            read = frozenset(id(leaf.tensor) for leaf in K.leaves(*emit.kernels))
            alike.setdefault(read, []).append(emit)
        return {id(e): self.of_emit(e) for several in alike.values() if len(several) > 1 for e in several}

    def _of_layer(self, emit: Emit) -> Any:
        op = emit.operator
        geometry = () if op is None else tuple(map(self._plain, arguments(op)))
        kernels = tuple(None if k is None else self.of(k) for k in (emit.gain, emit.bias))
        return geometry, kernels, emit.anchor.rows

    def of(self, kernel: Kernel) -> int:
        for node in () if id(kernel) in self.of_kernel else K.topological((kernel,)):
            if id(node) not in self.of_kernel:
                self.held.append(node)
                content = tuple(map(self._plain, arguments(node)))
                self.of_kernel[id(node)] = self._number((type(node), content))
        return self.of_kernel[id(kernel)]

    def _plain(self, value: Any) -> Any:
        if type(value) is int:
            return value
        if isinstance(value, Kernel):
            return self.of(value)
        if isinstance(value, tuple):
            return tuple(map(self._plain, value))
        if isinstance(value, Tensor):
            return "tensor", id(value)
        if isinstance(value, partial):
            return self._plain((value.func, value.args, tuple(value.keywords.items())))
        return self._of_function(value) if callable(value) else value

    def _of_function(self, function: Callable[..., Any]) -> Any:
        """A function made anew at each call of a reader is the same if what it closes over is."""
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
        held = tuple(c.cell_contents for c in cells)
        if (
            code is None
            or getattr(function, "__defaults__", None)
            or not all(isinstance(v, (int, float)) for v in held)
        ):
            return "function", id(function)
        return code, held

    def _number(self, content: Any) -> int:
        return self.known.setdefault(content, len(self.known))


def growing(
    plan: Plan, forms: Mapping[str, AffineForm], kept: Collection[int] | None, keys: Keys
) -> Iterator[tuple[Decision, str]]:
    """The decisions that store more numbers than they free, if the plan as a whole does, and how many.

    Equal layers are stored once: decisions that have one, or a tensor, in common are judged together. A weight that
    several calls share, with another scale after each, needs a copy for each. It counts as freed by each call; or,
    given the memory of what is `kept` whatever is planned, only once, if nobody reads it any more.
    """
    if kept is None and not _may_grow(plan, forms):
        return
    groups = list(_groups(plan, forms, kept, keys))
    if sum(stored - freed for _, stored, freed in groups) <= 0:
        return
    for decisions, stored, freed in groups:
        if stored > freed:
            fact = f"it would store {stored:,} numbers in the place of {freed:,}"
            yield from ((decision, fact) for decision in decisions)


def _may_grow(plan: Plan, forms: Mapping[str, AffineForm]) -> bool:
    """Whether more is stored than is freed if nothing is stored once for several."""
    decisions = plan.decisions.values()
    stored = (size for d in decisions for e in d.recipe.emits for size in e.numbers.values())
    freed = (size for d in decisions for n in d.replaced if n in forms for size in _numbers([forms[n]]).values())
    return sum(stored) > sum(freed)


def _groups(
    plan: Plan, forms: Mapping[str, AffineForm], kept: Collection[int] | None, keys: Keys
) -> Iterator[tuple[list[Decision], int, int]]:
    """Decisions that share tensors or layers, with how many numbers they store and free together."""
    stored = {d.node: _stored(d, keys) for d in plan.decisions.values()}
    calls = {d.node: [forms[n] for n in d.replaced if n in forms] for d in plan.decisions.values()}
    alive = {*kept, *_numbers(_computed(plan, forms))} if kept is not None else set()
    for names in _connected({n: {*stored[n], *_numbers(calls[n])} for n in stored}):
        made = {key: size for n in names for key, size in stored[n].items()}
        read = enumerate(_numbers([call]) for n in names for call in calls[n])
        freed = {(m, kept is None and i): size for i, r in read for m, size in r.items() if m not in alive}
        yield [plan.decisions[n] for n in names], sum(made.values()), sum(freed.values())


def _computed(plan: Plan, forms: Mapping[str, AffineForm]) -> Iterator[AffineForm]:
    """What is computed as the model has it."""
    return (form for name, form in forms.items() if name not in plan.removed and name not in plan.decisions)


def _numbers(forms: Iterable[AffineForm]) -> dict[int, int]:
    """How many numbers forms are computed from, by the memory that they are in."""
    kernels = (k for form in forms for k in form.kernels)
    return {memory_of(leaf.tensor): leaf.tensor.numel() for leaf in K.leaves(*kernels)}


def _stored(decision: Decision, keys: Keys) -> dict[Any, int]:
    """How many numbers each new layer of a decision holds, by its key."""
    written = (e for e in decision.recipe.emits if e.stores)
    return {("layer", keys.of_emit(e)): sum(e.numbers.values()) for e in written}


def _connected(belongings: Mapping[str, set[Any]]) -> list[list[str]]:
    """Names that have something in common, directly or through others; each group in the order given."""
    group_of: dict[Any, list[str]] = {}
    for name, things in belongings.items():
        joined = {id(group_of[t]): group_of[t] for t in things if t in group_of}
        merged = [*(n for group in joined.values() for n in group), name]
        group_of |= dict.fromkeys((*things, *(t for n in merged for t in belongings[n])), merged)
    found = {id(g): g for g in group_of.values()}
    places = {name: i for i, name in enumerate(belongings)}
    return [sorted(g, key=places.__getitem__) for g in found.values()]
